# SPDX-License-Identifier: Apache-2.0
"""Rows of a low-rank matrix: what an embedding computes; the table is formed only where that is cheaper."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from rankfall import _contract
from rankfall._contract import NARROW, Halves, cut_at, effort_of_mixed, halves, matrices, mixed, part_plan
from rankfall._einsum import (
    Axes,
    Plan,
    Shapes,
    contract,
    cost_of,
    plan,
    planned_once,
    power_of_two,
    rounded,
    run,
    shapes_of,
)
from rankfall._layout import Layout
from rankfall._rows import OwnRows, Rows, TableRows, may_look_at

_SORTED = 3000  # Operations in the time that it takes to sort an id among others.
_ROW = "row"  # The axis of the wanted rows, which all factors of row modes share.


def digits(rows: Int[Tensor, " n"], modes: Sequence[int]) -> list[Int[Tensor, " n"]]:
    """The index of each row along each row mode: mixed-radix digits, the last mode running fastest.

    Integers all the way: a float32 quotient is wrong beyond 2^24 rows.

    Example:
        >>> digits(torch.tensor([0, 5, 11]), (2, 2, 3))
        [tensor([0, 0, 1]), tensor([0, 1, 1]), tensor([0, 2, 2])]
    """
    out = []
    for mode in reversed(modes):
        out.append(rows % mode)
        rows = torch.div(rows, mode, rounding_mode="floor")
    return out[::-1]


def lookup_plan(layout: Layout, shapes: Shapes, rows: int) -> Plan:
    """The cheapest order in which the wanted rows are contracted from all factors, each read at its digit.

    Args:
        layout: A layout with two axes.
        shapes: The shapes of the factors, at today's ranks.
        rows: The number of rows; rounded up to a power of two, so that few plans are made.
    """
    return _row_plan(layout, shapes, rows, tuple(range(len(layout.factors))), layout.axes[1])


def _row_plan(layout: Layout, shapes: Shapes, rows: int, which: Sequence[int], kept: Axes) -> Plan:
    """The order for some of the factors, whose rows have the axes `kept`."""
    row_modes = set(layout.axes[0])
    inputs = tuple(tuple(_ROW if n in row_modes else n for n in layout.factors[k]) for k in which)
    inputs = tuple(tuple(sorted(axes, key=lambda name: name != _ROW)) for axes in inputs)
    used = {n for axes in inputs for n in axes}
    sizes = layout.mode_sizes | layout.ranks(shapes) | {_ROW: rounded(rows)}
    return plan(inputs, (_ROW, *kept), tuple((n, size) for n, size in sizes.items() if n in used))


@dataclass(frozen=True)
class Reading:
    """How rows of a low-rank matrix are read.

    Attributes:
        forms_table: Whether a table of all rows is formed; else only the distinct rows that are asked for.
        pair: If rows of the first of two thin matrices are read, and multiplied by the second after that: those two.
        bond: For a TT-matrix whose table is formed, the bond at which it is done in two parts.
        cost: Time, in floating-point operations.
    """

    forms_table: bool
    pair: Halves | None
    bond: int
    cost: int

    def described(self) -> str:
        """The way in words."""
        read = "a table of all rows" if self.forms_table else "the distinct rows"
        return read if self.pair is None else f"{read} of one half, times the other"


@planned_once
def reading(layout: Layout, shapes: Shapes, ids: int, outputs: int) -> Reading:
    """The cheapest way to read so many ids and to reduce them to so many outputs; see `readings`."""
    return min(readings(layout, shapes, ids, outputs), key=lambda way: way.cost)


def readings(layout: Layout, shapes: Shapes, ids: int, outputs: int) -> list[Reading]:
    """All ways that a layout has, with their costs.

    Args:
        layout: A layout with two axes, rows first.
        shapes: The shapes of the factors, at today's ranks.
        ids: How many ids are read; how many of them differ is not known beforehand.
        outputs: How many rows come out: the number of bags, or that of ids.
    """
    rows, width = layout.shape
    distinct = min(ids, rows)
    found: list[Reading] = []

    def consider(forms: bool, pair: Halves | None, bond: int, before: Plan, row_width: int) -> None:
        # Read and written by each id; then, row by row or after the reduction, widened by a product.
        flops, elements = before.flops, before.elements + 2 * ids * row_width
        if not forms:
            flops += _SORTED * ids
        if pair is not None:
            flops += 2 * outputs * (row_width + NARROW) * width
            elements += outputs * (row_width + width)
        found.append(Reading(forms, pair, bond, cost_of(flops, elements)))

    everything = tuple(range(len(layout.factors)))
    thin = halves(layout, shapes)
    if thin is None:
        for bond in range(len(layout.bonds)):
            consider(True, None, bond, _table_by_cut(layout, shapes, bond), width)
    else:
        consider(True, None, 0, _contract.forming(layout, shapes).plan, width)
        rank = math.prod([layout.ranks(shapes)[bond] for bond in thin.joint])
        part = part_plan(layout, shapes, thin.first, (*layout.axes[0], *thin.joint))
        consider(True, thin, 0, part, rank)
        consider(False, thin, 0, _row_plan(layout, shapes, distinct, thin.first, thin.joint), rank)
    consider(False, None, 0, _row_plan(layout, shapes, distinct, everything, layout.axes[1]), width)
    return found


def _table_by_cut(layout: Layout, shapes: Shapes, bond: int) -> Plan:
    rows, width = layout.padded_shape
    rank = layout.ranks(shapes)[layout.bonds[bond]]
    left, right = (
        math.prod([math.prod(modes[part]) for modes in layout.modes]) * rank
        for part in (slice(bond + 1), slice(bond + 1, None))
    )
    before, after = (math.prod(modes) for modes in (layout.modes[1][: bond + 1], layout.modes[1][bond + 1 :]))
    high, low = (math.prod(modes) for modes in (layout.modes[0][: bond + 1], layout.modes[0][bond + 1 :]))
    effort = effort_of_mixed(low, high * before, rank, after)
    return Plan((), effort + 2 * rank * (left + right), rows * width + 2 * (left + right))


def read(layout: Layout, factors: Sequence[Tensor], ids: Int[Tensor, "*ids"], outputs: int | None = None) -> Rows:
    """What `dense()[ids]`, or sums of its rows, are read from in the cheapest way; the table need not be formed.

    Time and memory grow with the number of ids (on a CPU: of distinct ones), not with the table, unless the table is so
    small that forming it is cheaper. Gradients reach every factor densely. A GPU is never waited for.

    Args:
        layout: A layout with two axes, rows first.
        factors: The factors, at today's ranks.
        ids: Row numbers, from 0 up to but not including the number of rows; not checked.
        outputs: How many sums of rows are wanted; None for the rows of all ids.
    """
    shapes = shapes_of(factors)
    count = rounded(ids.numel())
    return read_by(reading(layout, shapes, count, count if outputs is None else rounded(outputs)), layout, factors, ids)


def read_by(way: Reading, layout: Layout, factors: Sequence[Tensor], ids: Int[Tensor, "*ids"]) -> Rows:
    """The same in a given way."""
    after = first = None
    if way.pair is not None:
        first, after = matrices(layout, factors, way.pair, first=way.forms_table)
    if way.forms_table:
        if first is None and halves(layout, shapes_of(factors)) is None:
            table, strides = _cut_table(layout, factors, way.bond)
            places = ids if strides[0] == 1 else ids % strides[1] * strides[0] + ids // strides[1]
            return TableRows(table, places, None, None, strides)
        return TableRows(_contract.dense(layout, factors) if first is None else first, ids, after, None)
    which = tuple(range(len(factors))) if way.pair is None else way.pair.first
    kept = layout.axes[1] if way.pair is None else way.pair.joint
    if not may_look_at(ids):
        return OwnRows(_rows_of(layout, factors, ids.flatten(), which, kept), ids, after)
    distinct, places = _distinct(ids)
    return TableRows(_rows_of(layout, factors, distinct, which, kept), places, after, distinct)


def _distinct(ids: Int[Tensor, "*ids"]) -> tuple[Int[Tensor, " n"], Int[Tensor, "*ids"]]:
    """The ids that rows are made for, and the place of each id among them."""
    if not ids.numel():
        return ids.new_zeros(1), ids  # One row, so that there is a table to read nothing from.
    return torch.unique(ids, return_inverse=True)


def _cut_table(layout: Layout, factors: Sequence[Tensor], bond: int) -> tuple[Tensor, tuple[int, int]]:
    """All rows of a TT-matrix in an order that needs no copy: by the row digits right of a bond, then those left."""
    (o_left, o_right), (i_left, i_right), rank = cut_at(layout, bond)
    rows, width = ([layout.mode_sizes[n] for n in names] for names in (layout.axes[0], layout.axes[1]))
    high, low = math.prod(rows[: bond + 1]), math.prod(rows[bond + 1 :])
    left = contract(layout.factors[: bond + 1], (*o_left, *i_left, rank), factors[: bond + 1])
    right = contract(layout.factors[bond + 1 :], (*o_right, rank, *i_right), factors[bond + 1 :])
    # Sizes are spelled out, since a rank of zero leaves nothing to find them from.
    before, after, slices = math.prod(width[: bond + 1]), math.prod(width[bond + 1 :]), factors[bond].shape[-1]
    table = mixed(left.reshape(high * before, slices), right.reshape(low, slices, after)).view(
        low * high, before * after
    )
    return table if layout.shape[1] == table.shape[1] else table[:, : layout.shape[1]], (high, low)


def _rows_of(
    layout: Layout, factors: Sequence[Tensor], rows: Int[Tensor, " n"], which: Sequence[int], kept: Axes
) -> Float[Tensor, "n width"]:
    """Rows of what some of the factors stand for: each factor at its digit, then a batch of small contractions."""
    digit = dict(zip(layout.axes[0], digits(rows, layout.modes[0]), strict=True))
    if kept == layout.axes[1] and is_chain_of_matrices(layout):
        return _chain_rows(layout, factors, list(digit.values()))
    taken = []
    for k in which:
        factor, axes = factors[k], layout.factors[k]
        dims = [d for d, name in enumerate(axes) if name in digit]
        taken.append(factor.movedim(dims[0], 0).index_select(0, digit[axes[dims[0]]]) if dims else factor)
    steps = _row_plan(layout, shapes_of(factors), len(rows), which, kept)
    found = run(steps, taken).flatten(1)
    width = layout.shape[1]
    return found[:, :width] if kept == layout.axes[1] and found.shape[1] > width else found


def is_chain_of_matrices(layout: Layout) -> bool:
    """Whether every factor has one mode of each axis between its bonds, as a TT-matrix has."""
    pairs = list(zip(*layout.axes, strict=False))
    inside = [tuple(n for n in axes if n not in layout.bonds) for axes in layout.factors]
    return len(layout.axes) == 2 and len(layout.axes[0]) == len(layout.axes[1]) and inside == pairs


def _chain_rows(
    layout: Layout, factors: Sequence[Tensor], digit: Sequence[Int[Tensor, " n"]]
) -> Float[Tensor, "n width"]:
    """Rows of a TT-matrix from left to right: a row so far is (width so far x rank), and each factor widens it."""
    first, *others = factors
    rows, width = first.index_select(0, digit[0]), first.shape[1]
    for factor, of_row in zip(others, digit[1:], strict=True):
        # (rank before, rows, width, rank after) to (rows, rank before, width x rank after); the last has no bond after.
        matrices = factor.movedim(1, 0).flatten(2)
        width *= factor.shape[2]
        rows = _times_own(rows, matrices, of_row).reshape(len(rows), width, *factor.shape[3:])
    return rows[:, : layout.shape[1]]


@cache
def _has_kernels(device: torch.device) -> bool:
    """Whether Triton is there, and does on the device what torch.bmm does: NVIDIA's from Volta on, and AMD's."""
    if device.type != "cuda" or find_spec("triton") is None or torch.cuda.get_device_capability(device) < (7, 0):
        return False
    from rankfall._kernels import try_on  # noqa: PLC0415  Triton is loaded where it runs.

    try:
        try_on(device)
    except Exception as error:
        message = f"Triton's kernels do not run on {device} ({error}), so rows of tables are read by torch.bmm."
        warnings.warn(message, RuntimeWarning, stacklevel=2)
        return False
    return True


_TOGETHER, _MOST_TOGETHER = 4, 16
_FAST_FROM = 400  # Multiplications of one product, as torch has it in LinearAlgebra.cpp.
_LARGE_SLICE = 512  # Entries of a matrix beyond which it pays to read it once for several rows.


def _times_own(
    left: Float[Tensor, "n p q"], matrices: Float[Tensor, "m q s"], which: Int[Tensor, " n"]
) -> Float[Tensor, "n p s"]:
    """left[k] @ matrices[which[k]]: those with the same matrix are multiplied together, a few at a time.

    That makes one product of several small ones, and reads and adds to a matrix once for all of them. On a GPU a kernel
    reads each matrix where it stands, unless its gradients, added up in any order, must be the same every time.
    """
    as_ever = torch.compiler.is_compiling() or torch.are_deterministic_algorithms_enabled()
    if not as_ever and _has_kernels(left.device):
        from rankfall._kernels import own_products  # noqa: PLC0415  Triton is loaded where it runs.

        return own_products(left, matrices, which)
    count, p, q = left.shape
    each, size = count // len(matrices), q * matrices.shape[2]
    if each < 2 or size < _LARGE_SLICE or not may_look_at(which):
        # A GPU has no such loop, and in a graph sizes may be symbols.
        missing = _missing(p, q, matrices.shape[2]) if may_look_at(which) else 0
        if missing:
            left, matrices = F.pad(left, (0, missing)), F.pad(matrices, (0, 0, 0, missing))
        return torch.bmm(left, matrices.index_select(0, which))
    together = min(max(power_of_two(each), _TOGETHER), _MOST_TOGETHER)
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
