# SPDX-License-Identifier: Apache-2.0
"""A format applied to a shape: the factors of a tensor, and the names of their axes.

A name that stands in the data is a mode (`o1`, `i2`); a name that stands only in factors is a bond (`r1`); the rank is
the size of a bond. Everything that rankfall computes, from contraction to pruning, is written once over these names.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeAlias

from rankfall._einsum import Axes, planned_once

Modes: TypeAlias = tuple[int, ...]

_AXIS_LETTERS = "oiklmnpqstuvwxyz"


@dataclass(frozen=True)
class Layout:
    """A format applied to a shape: which factors there are, which axes they have, which bond governs which entries.

    Attributes:
        shape: The shape of the tensor as its user sees it.
        modes: The modes of each axis; their product is the axis, or more where it is padded.
        factors: The axis names of each factor.
        governs: For each bond, the (factor, dimension) pairs whose entries have the prior scale of that bond's slices.
        core: The index of the Tucker core, which has a fixed prior; None for other formats.
    """

    shape: tuple[int, ...]
    modes: tuple[Modes, ...]
    factors: tuple[Axes, ...]
    governs: tuple[tuple[str, tuple[tuple[int, int], ...]], ...]
    core: int | None = None

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        # Asked for several times in each step.
        return hash(self.parts)

    def __reduce__(self) -> tuple[Any, ...]:
        # Without what is kept: texts have other hashes in another process.
        return Layout, self.parts

    @property
    def parts(self) -> tuple[Any, ...]:
        """What it is made of, in order."""
        return self.shape, self.modes, self.factors, self.governs, self.core

    @property
    def axes(self) -> tuple[Axes, ...]:
        """The mode names of each axis of the tensor."""
        return mode_names(self.modes)

    @property
    def bonds(self) -> tuple[str, ...]:
        """The names of all bonds."""
        return tuple(bond for bond, _ in self.governs)

    @property
    def mode_sizes(self) -> dict[str, int]:
        """The size of each mode."""
        return {
            n: size
            for names, sizes in zip(self.axes, self.modes, strict=True)
            for n, size in zip(names, sizes, strict=True)
        }

    @property
    def padded_shape(self) -> tuple[int, ...]:
        """The product of the modes of each axis."""
        return tuple(math.prod(modes) for modes in self.modes)

    @property
    def leading(self) -> tuple[int, int]:
        """(factor, dimension) of the leading digit of a row: the first mode of the first axis that is not 1."""
        name = next((n for n in self.axes[0] if self.mode_sizes[n] > 1), self.axes[0][0])
        return next((k, axes.index(name)) for k, axes in enumerate(self.factors) if name in axes)

    @property
    def leading_digits(self) -> int:
        """How many values the leading digit has."""
        k, dim = self.leading
        return self.mode_sizes[self.factors[k][dim]]

    @property
    def leading_rows(self) -> int:
        """How many rows have the same leading digit."""
        return self.padded_shape[0] // self.leading_digits

    def places(self, bond: str) -> tuple[tuple[int, int], ...]:
        """Every (factor, dimension) that bears a bond."""
        return tuple((k, dim) for k, axes in enumerate(self.factors) for dim, name in enumerate(axes) if name == bond)

    def factor_shapes(self, ranks: Mapping[str, int]) -> tuple[tuple[int, ...], ...]:
        """The shapes of all factors at the given ranks."""
        sizes = self.mode_sizes | dict(ranks)
        return tuple(tuple(sizes[name] for name in axes) for axes in self.factors)

    def ranks(self, shapes: Sequence[Sequence[int]]) -> dict[str, int]:
        """The rank of every bond, read off the shapes of the factors: it is stored nowhere else."""
        return {bond: shapes[places[0][0]][places[0][1]] for bond, places in self.governs}


@planned_once
def cut_to(layout: Layout, digits: int) -> Layout:
    """The layout of the first rows alone: those whose leading digit is below `digits`.

    Example:
        >>> layout = rf.TT(8).layout((120, 8))
        >>> layout.modes, cut_to(layout, 3).modes
        (((4, 5, 6), (8,)), ((3, 5, 6), (8,)))
    """
    k, dim = layout.leading
    leading, rows = layout.factors[k][dim], min(layout.shape[0], digits * layout.leading_rows)
    first = tuple(digits if name == leading else layout.mode_sizes[name] for name in layout.axes[0])
    return replace(layout, shape=(rows, *layout.shape[1:]), modes=(first, *layout.modes[1:]))


def mode_names(modes: Sequence[Modes]) -> tuple[Axes, ...]:
    """A name for each mode of each axis: o1, o2 and so on for the first, i1 for the second, oo1 for the 17th."""
    count = len(_AXIS_LETTERS)
    letters = (_AXIS_LETTERS[axis % count] * (1 + axis // count) for axis in range(len(modes)))
    return tuple(
        tuple(f"{letter}{k + 1}" for k in range(len(sizes))) for letter, sizes in zip(letters, modes, strict=True)
    )
