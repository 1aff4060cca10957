# SPDX-License-Identifier: Apache-2.0
"""The five tensor formats, each a value object that names the axes of its factors; all else is read off those names."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from rankfall._einsum import Axes
from rankfall._layout import Layout, Modes, mode_names
from rankfall._modes import balanced_modes, mode_count, paired_modes

# Mode size at which a chain needs few parameters and still few factors; and the largest number of modes an axis is
# split into for Tucker, whose core has a dimension per mode, and CP, whose gradients are products over all modes.
_MODE_SIZE, _WIDE_MODES = 5.0, 2
# Modes that a user gives may make an axis a little longer, as the vocabulary of a table wants it; more is a mistake.
_MOST_PADDED = 1.1


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


@dataclass(frozen=True)
class Format(ABC):
    """How a weight is written as a contraction of factors.

    Args:
        max_rank: The rank of every bond at the start, or one per bond; capped by what the modes can carry. Ranks only
            fall from there, so raise it when no slice of a bond is removed.
        out_modes: How the first axis (out_features, rows) is split: modes whose product is the axis, or up to a tenth
            more, which is padded. None lets rankfall choose, padding if it must.
        in_modes: How the second axis (in_features, width) is split.

    Raises:
        ValueError: If a rank or a mode is under 1.
        TypeError: If `max_rank` is neither an integer nor a sequence of integers, or modes are not such a sequence.
    """

    max_rank: int | tuple[int, ...]
    out_modes: Modes | None = field(default=None, kw_only=True)
    in_modes: Modes | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        kind = type(self).__name__
        for name in ("max_rank", "out_modes", "in_modes"):
            value = getattr(self, name)
            if isinstance(value, list | tuple):
                # A list is welcome, but a frozen value has to be hashable.
                object.__setattr__(self, name, tuple(value))
            one = name == "max_rank"
            numbers = tuple(value) if isinstance(value, list | tuple) else (value,) if one else ()
            example = f"{kind}(8); training lowers it" if one else f"{name}=(4, 8), or leave it out"
            if any(not isinstance(n, int) for n in numbers) or not (one or value is None or numbers):
                what = "an integer, or one integer per bond" if one else "a sequence of integers"
                raise TypeError(f"{kind}: {name} must be {what}, got {value!r}. Pass for example {example}.")
            if not all(_is_count(n) for n in numbers):
                raise ValueError(f"{kind}: {name} must be 1 or more, got {value!r}. Pass for example {example}.")

    def layout(self, shape: Sequence[int]) -> Layout:
        """Applies the format to a shape.

        Raises:
            ValueError: If given modes do not multiply to their axis, or the format cannot take them.
        """
        shape = tuple(shape)
        if not shape or not all(_is_count(n) for n in shape):
            raise ValueError(f"shape must be one or more sizes of 1 or more, got {shape}. Pass for example (512, 784).")
        modes = self._choose_modes(shape, self._given_modes(shape))
        return self._arrange(shape, modes)

    def start_ranks(self, layout: Layout) -> dict[str, int]:
        """`max_rank` for every bond, no more than the modes can carry.

        Raises:
            ValueError: If `max_rank` has another number of entries than there are bonds.
        """
        wanted = self.max_rank if isinstance(self.max_rank, tuple) else (self.max_rank,) * len(layout.bonds)
        if len(wanted) != len(layout.bonds):
            raise ValueError(
                f"{type(self).__name__}: max_rank has {len(wanted)} entries, but modes {layout.modes} make "
                f"{len(layout.bonds)} bonds {', '.join(layout.bonds)}. Pass one integer, or one per bond."
            )
        return self._cap(layout, dict(zip(layout.bonds, wanted, strict=True)))

    @abstractmethod
    def _choose_modes(self, shape: tuple[int, ...], given: tuple[Modes | None, ...]) -> tuple[Modes, ...]: ...

    @abstractmethod
    def _arrange(self, shape: tuple[int, ...], modes: tuple[Modes, ...]) -> Layout: ...

    @abstractmethod
    def _cap(self, layout: Layout, ranks: dict[str, int]) -> dict[str, int]: ...

    def _given_modes(self, shape: tuple[int, ...]) -> tuple[Modes | None, ...]:
        given: list[Modes | None] = [None] * len(shape)
        for axis, (name, width, modes) in enumerate(
            (("out_modes", "out_features", self.out_modes), ("in_modes", "in_features", self.in_modes))
        ):
            if modes is None:
                continue
            if axis >= len(shape):
                raise ValueError(
                    f"{name} was given for a tensor of shape {shape}, which has no such axis. Leave it out."
                )
            if not shape[axis] <= math.prod(modes) <= shape[axis] * _MOST_PADDED:
                fitting = balanced_modes(shape[axis], mode_count(shape[axis], _MODE_SIZE))
                advice = f"Pass {name}={fitting}, or leave" if math.prod(fitting) == shape[axis] else "Leave"
                raise ValueError(
                    f"{name} must multiply to {width}: {modes} gives {math.prod(modes)}, but {width} is {shape[axis]}. "
                    f"{advice} it out to let rankfall choose."
                )
            given[axis] = modes
        return tuple(given)


def _split_axes(shape: tuple[int, ...], given: tuple[Modes | None, ...], most: int | None = None) -> tuple[Modes, ...]:
    # Three axes or more are a tensor already: each is one mode unless its user says otherwise.
    def split(width: int) -> Modes:
        count = mode_count(width, _MODE_SIZE) if len(shape) <= 2 else 1
        count = max(count, 2) if len(shape) == 1 else count
        return balanced_modes(width, count if most is None else min(count, most))

    return tuple(modes or split(width) for width, modes in zip(shape, given, strict=True))


def _flat(names: Iterable[Axes]) -> list[str]:
    return [name for axes in names for name in axes]


@dataclass(frozen=True)
class CP(Format):
    """Canonical polyadic: W = sum over r of a product of one vector per mode. One bond, shared by all factors.

        (o1 r) (o2 r) (i1 r) (i2 r)

    Example:
        >>> CP(8).layout((512, 784)).factors[0]
        ('o1', 'r')

    Source: Kolda, Bader, SIAM Review 2009, section 3.
    """

    def _choose_modes(self, shape: tuple[int, ...], given: tuple[Modes | None, ...]) -> tuple[Modes, ...]:
        return _split_axes(shape, given, _WIDE_MODES)

    def _arrange(self, shape: tuple[int, ...], modes: tuple[Modes, ...]) -> Layout:
        factors = tuple((name, "r") for name in _flat(mode_names(modes)))
        return Layout(shape, modes, factors, (("r", tuple((k, 1) for k in range(len(factors)))),))

    def _cap(self, layout: Layout, ranks: dict[str, int]) -> dict[str, int]:
        sizes = layout.mode_sizes.values()
        return {"r": min(ranks["r"], math.prod(sizes) // max(sizes))}


@dataclass(frozen=True)
class Tucker(Format):
    """A core with one bond per mode, and one matrix per mode. The first factor is the core.

        (r1 r2 r3 r4) (o1 r1) (o2 r2) (i1 r3) (i2 r4)

    An axis is split into two modes at most, because the core grows with the power of their number.

    Example:
        >>> Tucker(8).layout((512, 784)).modes
        ((16, 32), (28, 28))

    Source: Kolda, Bader, SIAM Review 2009, section 4.
    """

    def _choose_modes(self, shape: tuple[int, ...], given: tuple[Modes | None, ...]) -> tuple[Modes, ...]:
        return _split_axes(shape, given, _WIDE_MODES)

    def _arrange(self, shape: tuple[int, ...], modes: tuple[Modes, ...]) -> Layout:
        names = _flat(mode_names(modes))
        bonds = tuple(f"r{k + 1}" for k in range(len(names)))
        governs = tuple((bond, ((k + 1, 1),)) for k, bond in enumerate(bonds))
        return Layout(shape, modes, (bonds, *zip(names, bonds, strict=True)), governs, core=0)

    def _cap(self, layout: Layout, ranks: dict[str, int]) -> dict[str, int]:
        capped = {b: min(r, n) for (b, r), n in zip(ranks.items(), layout.mode_sizes.values(), strict=True)}
        while True:
            total = math.prod(capped.values())
            tighter = {b: min(r, total // r) for b, r in capped.items()}
            if tighter == capped:
                return capped
            # One bond at a time: lowering one changes what the others can carry.
            bond = next(b for b in capped if tighter[b] < capped[b])
            capped[bond] = tighter[bond]


def _chain(shape: tuple[int, ...], modes: tuple[Modes, ...], groups: list[Axes], *, ring: bool) -> Layout:
    last = len(groups)
    left = [f"r{k}" for k in range(last)]
    right = [f"r{(k + 1) % last}" for k in range(last)]
    if ring:
        factors = tuple((a, *names, b) for a, names, b in zip(left, groups, right, strict=True))
        governs = [(right[k], [(k, len(factors[k]) - 1)]) for k in range(last)]
        return Layout(shape, modes, factors, tuple((b, tuple(p)) for b, p in [governs[-1], *governs[:-1]]))
    factors = tuple(
        (*((left[k],) if k else ()), *names, *((right[k],) if k < last - 1 else ())) for k, names in enumerate(groups)
    )
    governs = [(right[k], [(k, len(factors[k]) - 1)]) for k in range(last - 1)]
    # The last factor has no bond to its right, so the last bond governs it too.
    governs[-1][1].append((last - 1, 0))
    return Layout(shape, modes, factors, tuple((b, tuple(p)) for b, p in governs))


def _cap_chain(layout: Layout, ranks: dict[str, int]) -> dict[str, int]:
    sizes = [math.prod(layout.mode_sizes.get(name, 1) for name in axes) for axes in layout.factors]
    sides = ((math.prod(sizes[: k + 1]), math.prod(sizes[k + 1 :])) for k in range(len(ranks)))
    return {bond: min(rank, *side) for (bond, rank), side in zip(ranks.items(), sides, strict=True)}


@dataclass(frozen=True)
class TT(Format):
    """Tensor train: a chain of factors, one per mode, out-modes first.

        (o1 r1) (r1 o2 r2) (r2 i1 r3) (r3 i2)

    Example:
        >>> TT(8).layout((512, 784)).factors[1]
        ('r1', 'o2', 'r2')

    Source: Oseledets, Tensor-Train Decomposition, SIAM J. Sci. Comput. 2011.
    """

    def _choose_modes(self, shape: tuple[int, ...], given: tuple[Modes | None, ...]) -> tuple[Modes, ...]:
        return _split_axes(shape, given)

    def _arrange(self, shape: tuple[int, ...], modes: tuple[Modes, ...]) -> Layout:
        groups = [(name,) for name in _flat(mode_names(modes))]
        if len(groups) < 2:
            raise ValueError(f"TT needs two modes or more, got {modes}. Pass out_modes with at least two entries.")
        return _chain(shape, modes, groups, ring=False)

    def _cap(self, layout: Layout, ranks: dict[str, int]) -> dict[str, int]:
        return _cap_chain(layout, ranks)


@dataclass(frozen=True)
class TTM(Format):
    """TT-matrix: a chain of factors, each with one mode of every axis; all axes have equally many modes.

        (o1 i1 r1) (r1 o2 i2 r2) (r2 o3 i3)

    Where modes of 1 leave each factor one axis, it is a tensor train.

    Example:
        >>> TTM(8).layout((512, 784)).modes
        ((8, 4, 4, 4), (4, 7, 4, 7))
        >>> TTM(8, out_modes=(512, 1), in_modes=(1, 784)).layout((512, 784)).factors
        (('o1', 'r1'), ('r1', 'i1'))

    Source: Novikov et al., Tensorizing Neural Networks, NeurIPS 2015.
    """

    def _choose_modes(self, shape: tuple[int, ...], given: tuple[Modes | None, ...]) -> tuple[Modes, ...]:
        counts = {len(modes) for modes in given if modes is not None}
        if len(counts) > 1 or counts == {1}:
            raise ValueError(
                "TTM pairs the modes of the axes one to one, so out_modes and in_modes must have the same number of "
                f"entries, two or more: got {given[0]} and {given[1] if len(given) > 1 else None}. "
                "Pass modes of 1 to fill up the shorter one, or leave one of them out."
            )
        mean = math.prod(shape) ** (1 / len(shape))
        count = counts.pop() if counts else max(2, mode_count(round(mean), _MODE_SIZE))
        chosen = paired_modes(shape, count)
        return tuple(modes or choice for modes, choice in zip(given, chosen, strict=True))

    def _arrange(self, shape: tuple[int, ...], modes: tuple[Modes, ...]) -> Layout:
        wide = [[axis for axis, size in enumerate(pair) if size > 1] for pair in zip(*modes, strict=True)]
        if len(shape) == 2 and all(len(axes) == 1 for axes in wide) and {axis for (axis,) in wide} == {0, 1}:
            # Modes of 1 only fill up: each factor stands for one axis, so that two thin matrices make the whole.
            counts = [iter(names) for names in mode_names(modes)]
            modes = tuple(tuple(size for size in axis if size > 1) for axis in modes)
            return _chain(shape, modes, [(next(counts[axis]),) for (axis,) in wide], ring=False)
        return _chain(shape, modes, list(zip(*mode_names(modes), strict=True)), ring=False)

    def _cap(self, layout: Layout, ranks: dict[str, int]) -> dict[str, int]:
        return _cap_chain(layout, ranks)


@dataclass(frozen=True)
class TR(Format):
    """Tensor ring: a tensor train whose ends are joined by one more bond, r0.

        (r0 o1 r1) (r1 o2 r2) (r2 i1 r3) (r3 i2 r0)

    Example:
        >>> TR(4).layout((512, 784)).factors[-1]
        ('r7', 'i4', 'r0')

    Source: Zhao et al., Tensor Ring Decomposition, arXiv 1606.05535.
    """

    def _choose_modes(self, shape: tuple[int, ...], given: tuple[Modes | None, ...]) -> tuple[Modes, ...]:
        return _split_axes(shape, given)

    def _arrange(self, shape: tuple[int, ...], modes: tuple[Modes, ...]) -> Layout:
        groups = [(name,) for name in _flat(mode_names(modes))]
        if len(groups) < 2:
            raise ValueError(f"TR needs two modes or more, got {modes}. Pass out_modes with at least two entries.")
        return _chain(shape, modes, groups, ring=True)

    def _cap(self, layout: Layout, ranks: dict[str, int]) -> dict[str, int]:
        # Two cuts take a ring apart. With rank 1 at the other cut a bond carries at most the smaller of the two parts.
        sizes = list(layout.mode_sizes.values())
        total = math.prod(sizes)

        def carried(k: int) -> int:
            arcs = (math.prod((sizes * 2)[k : k + n]) for n in range(1, len(sizes)))
            return max(min(arc, total // arc) for arc in arcs)

        return {bond: min(rank, carried(k)) for k, (bond, rank) in enumerate(ranks.items())}
