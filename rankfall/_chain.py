# SPDX-License-Identifier: Apache-2.0
"""Single rows of a TT-matrix: small products from left to right, those with the same matrix together."""

import math
from collections.abc import Sequence
from functools import cache
from typing import TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from rankfall._einsum import contract, planned_once, power_of_two
from rankfall._layout import Layout
from rankfall._machine import machine
from rankfall._rows import may_look_at
from rankfall._triton import runs_on

Joined: TypeAlias = tuple[int, int]
APART: Joined = (1, 1)


@cache
def is_chain_of_matrices(layout: Layout) -> bool:
    """Whether every factor has one mode of each axis between its bonds, as a TT-matrix has."""
    pairs = list(zip(*layout.axes, strict=False))
    inside = [tuple(n for n in axes if n not in layout.bonds) for axes in layout.factors]
    return len(layout.axes) == 2 and len(layout.axes[0]) == len(layout.axes[1]) and inside == pairs


@cache
def is_chain(layout: Layout) -> bool:
    """Whether factors stand in a row, each with a mode of the rows, of the columns or of both between its bonds.

    So they do in a tensor train as in a TT-matrix, modes of size 1 or none.
    """
    if len(layout.axes) != 2 or len(layout.factors) != len(layout.bonds) + 1:
        return False
    bonds = layout.bonds
    for k, axes in enumerate(layout.factors):
        own = [[n for n in axis if n in axes] for axis in layout.axes]
        if axes != (*bonds[max(k - 1, 0) : k], *own[0], *own[1], *bonds[k : k + 1]) or max(map(len, own)) > 1:
            return False
    names = [n for axes in layout.factors for n in axes]
    return all(list(axis) == [n for n in names if n in axis] for axis in layout.axes)


def modes_of(layout: Layout, part: range) -> tuple[list[str], list[str]]:
    """The modes of the rows and of the columns that neighbours in a chain have."""
    names = [name for axes in layout.factors[part.start : part.stop] for name in axes]
    rows, columns = ([n for n in axis if n in names] for axis in layout.axes)
    return rows, columns


def chain_of(layout: Layout, factors: Sequence[Tensor], joined: Joined = APART) -> list[Tensor]:
    """The factors of a chain with a mode of rows and one of columns each, neighbours at the ends contracted to one.

    Args:
        layout: That of a chain.
        factors: Its factors.
        joined: How many of the first factors are contracted to one, and how many of the last.

    Returns:
        Tensors of shape (rows, columns, rank), (rank, rows, columns, rank), ..., (rank, rows, columns); if there is one
        only, (rows, columns). Where a factor has no mode of an axis, its size is 1.
    """
    if joined == APART and is_chain_of_matrices(layout):
        return list(factors)
    parts = zip(parts_of(len(factors), joined), _joint_sizes(layout, joined), strict=True)
    return [_joint_factor(layout, factors, part, sizes) for part, sizes in parts]


def chain_rows(chain: Sequence[Tensor], rows: Int[Tensor, " n"]) -> Float[Tensor, "n width"]:
    """Rows of a chain from left to right: a row so far is (width so far x rank), and each factor widens it.

    Neighbours that have their first digits in common, as sorted rows often have, are one until they part.

    Args:
        chain: What `chain_of` gives.
        rows: Row numbers.
    """
    first, *others = chain
    heads, levels = _levels(rows, [len(first), *(factor.shape[1] for factor in others)])
    found, width = first.index_select(0, heads), first.shape[1]
    for factor, (digit, place) in zip(others, levels, strict=True):
        # (rank before, rows, width, rank after) to (rows, rank before, width x rank after); the last has no bond after.
        matrices = factor.movedim(1, 0).flatten(2)
        width *= factor.shape[2]
        found = _times_own(found, matrices, digit, place).reshape(len(digit), width, *factor.shape[3:])
    return found


WORTH_PARTING = 0.75  # Part of the rows that distinct beginnings may be and still pay for their own step.
_Level: TypeAlias = tuple[Int[Tensor, " _"], Int[Tensor, " _"] | None]  # Each of a length of its own.


def _levels(rows: Int[Tensor, " n"], modes: Sequence[int]) -> tuple[Int[Tensor, " heads"], list[_Level]]:
    """The first digits that occur; then for each further mode the digits, and whose beginning each goes on from.

    The mode that runs fastest is the last. None in place of places says that each goes on from its own.
    """
    levels: list[_Level] = []
    for mode in reversed(modes[1:]):
        digit, rows = rows % mode, torch.div(rows, mode, rounding_mode="floor")
        place = None
        if may_look_at(rows) and (rows[1:] != rows[:-1]).sum() < WORTH_PARTING * len(rows) - 1:
            rows, place = torch.unique_consecutive(rows, return_inverse=True)
        levels.append((digit, place))
    return rows, levels[::-1]


def parts_of(factors: int, joined: Joined) -> list[range]:
    """Which neighbours of a chain are one: some of the first, each in the middle, some of the last."""
    head, tail = range(joined[0]), range(factors - joined[1], factors)
    return [head, *(range(k, k + 1) for k in range(head.stop, tail.start)), tail] if factors > 1 else [head]


@planned_once
def _joint_sizes(layout: Layout, joined: Joined) -> tuple[tuple[int, ...], ...]:
    """The rows and columns of the factors that `chain_of` gives."""
    modes = (modes_of(layout, part) for part in parts_of(len(layout.factors), joined))
    return tuple(tuple(math.prod([layout.mode_sizes[name] for name in names]) for names in axes) for axes in modes)


def _joint_factor(layout: Layout, factors: Sequence[Tensor], part: range, sizes: tuple[int, ...]) -> Tensor:
    """Neighbours as one factor, whose modes are theirs together."""
    if len(part) == 1:
        found = factors[part.start]
    else:
        taken, bonds = slice(part.start, part.stop), layout.bonds
        rows, columns = modes_of(layout, part)
        before, after = bonds[max(part.start - 1, 0) : part.start], bonds[part.stop - 1 : part.stop]
        found = contract(layout.factors[taken], (*before, *rows, *columns, *after), factors[taken])
    rank, end = found.shape[: part.start > 0], found.dim() - (part.stop < len(factors))
    shape = (*rank, *sizes, *found.shape[end:])
    return found if found.shape == shape else found.reshape(shape)


@cache
def _has_kernels(device: torch.device) -> bool:
    """Whether Triton is there, and does on the device what torch.bmm does."""
    return runs_on(device, _try_kernels, "rows of tables are read by torch.bmm")


def _try_kernels(device: torch.device) -> None:
    from rankfall._kernels import try_on  # noqa: PLC0415  Triton is loaded where it runs.

    try_on(device)


_TOGETHER, _MOST_TOGETHER = 4, 16
_FAST_FROM = 400  # Multiplications of one product, as torch has it in LinearAlgebra.cpp.
# On a CPU products of so many rows and so few columns, with as many or more summed, take half of the time on their
# side, gradients included.
_TALL, _THIN = 16, 8
_LARGE_SLICE = 512  # Entries of a matrix beyond which it pays to read it once for several rows.


def _times_own(
    left: Float[Tensor, "k p q"],
    matrices: Float[Tensor, "m q s"],
    which: Int[Tensor, " n"],
    place: Int[Tensor, " n"] | None = None,
) -> Float[Tensor, "n p s"]:
    """left[place[k]] @ matrices[which[k]]: those with the same matrix are multiplied together, a few at a time.

    That makes one product of several small ones, and reads and adds to a matrix once for all of them. On a GPU a kernel
    reads each matrix where it stands, unless its gradients, added up in any order, must be the same every time.

    Args:
        left: What stands on the left.
        matrices: What stands on the right.
        which: The matrix of each product.
        place: What stands on its left; None for each its own.
    """
    as_ever = torch.compiler.is_compiling() or torch.are_deterministic_algorithms_enabled()
    if not as_ever and _has_kernels(left.device):
        from rankfall._kernels import own_products  # noqa: PLC0415  Triton is loaded where it runs.

        return own_products(left, matrices, which)
    count, (_, p, q), s = len(which), left.shape, matrices.shape[2]
    each = count // len(matrices)
    if each >= 2 and q * s >= _LARGE_SLICE and may_look_at(which):  # A GPU has no such loop.
        return _times_shared(left if place is None else left.index_select(0, place), matrices, which)
    if may_look_at(which) and (missing := _missing(p, q, s)):  # In a graph sizes may be symbols.
        left, matrices = F.pad(left, (0, missing)), F.pad(matrices, (0, 0, 0, missing))
    if p >= _TALL and s <= _THIN <= q and may_look_at(which):
        # Turned before they are picked, so that gradients of what is picked lie in order and are added in one go.
        matrices, left = matrices.mT.contiguous(), left.mT
        left = left if place is None else left.contiguous().index_select(0, place)
        return torch.bmm(matrices.index_select(0, which), left).mT
    left = left if place is None else left.index_select(0, place)
    return torch.bmm(left, matrices.index_select(0, which))


def costs_of_own(count: int, matrices: int, p: int, q: int, s: int) -> tuple[int, int]:
    """(operations in a batch that take as long as `_times_own` on these sizes, elements read and written)."""
    each, size = count // matrices, q * s
    thin = s <= _THIN and not (p >= _TALL and q >= _THIN)
    call = round(machine().batched * machine().call) * (1 + thin)
    if each < 2 or size < _LARGE_SLICE:
        return count * max(2 * p * size, call), count * (p * s + 2 * size)
    # Seats for whole tables, of which about one of each matrix is not full.
    together = _together(each)
    tables = min(matrices, count) // 2 + count // together
    return tables * max(2 * together * p * size, call), count * p * (2 * q + 2 * s) + 2 * tables * size


def _together(each: int) -> int:
    return min(max(power_of_two(each), _TOGETHER), _MOST_TOGETHER)


def _times_shared(
    left: Float[Tensor, "n p q"], matrices: Float[Tensor, "m q s"], which: Int[Tensor, " n"]
) -> Float[Tensor, "n p s"]:
    count, p, q = left.shape
    together = _together(count // len(matrices))
    place, owner = _seats(which, len(matrices), together)
    seats = left.new_zeros(len(owner) * together, p * q).index_copy(0, place, left.reshape(count, p * q))
    products = torch.bmm(seats.view(len(owner), together * p, q), matrices.index_select(0, owner))
    s = matrices.shape[2]
    return products.view(len(owner) * together, p * s).index_select(0, place).view(count, p, s)


def _missing(p: int, q: int, s: int) -> int:
    """How many zeros fill up the inner side of small products so that torch.bmm takes its fast way with them, if few.

    On a CPU it multiplies matrices with fewer than 400 multiplications by a plain loop: 16 x 3 by 3 x 8 takes 0.39
    microseconds, and 16 x 4 by 4 x 8 takes 0.09.
    """
    wanted = -(-_FAST_FROM // max(p * s, 1))
    return wanted - q if q < wanted <= 2 * q else 0


def _seats(which: Int[Tensor, " n"], groups: int, together: int) -> tuple[Int[Tensor, " n"], Int[Tensor, " tables"]]:
    """Seats at tables of `together`, each of one group: the seat of every member, and the group of every table."""
    order = which.argsort()
    sorted_ = which[order]
    sizes = torch.bincount(which, minlength=groups)
    tables = torch.div(sizes + together - 1, together, rounding_mode="floor")
    within = torch.arange(len(which), device=which.device) - (sizes.cumsum(0) - sizes)[sorted_]
    place = torch.empty_like(order)
    place[order] = (tables.cumsum(0) - tables)[sorted_] * together + within
    return place, torch.repeat_interleave(torch.arange(groups, device=which.device), tables)
