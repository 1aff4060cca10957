# SPDX-License-Identifier: Apache-2.0
"""Rows of a low-rank matrix: what an embedding computes; the table is formed only where that is cheaper."""

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rankfall import _contract
from rankfall._chain import (
    APART,
    WORTH_PARTING,
    Joined,
    chain_of,
    chain_rows,
    costs_of_own,
    is_chain,
    is_chain_of_matrices,
    modes_of,
    parts_of,
)
from rankfall._contract import (
    NARROW,
    Halves,
    cut_at,
    effort_of_mixed,
    halves,
    matrices,
    mixed,
    part_plan,
    plan_of_halves,
)
from rankfall._einsum import Axes, Plan, Shapes, contract, cost_of, plan, planned_once, rounded, run, shapes_of
from rankfall._layout import Layout
from rankfall._machine import machine
from rankfall._row_library import MOST_FACTORS, MOST_ROWS
from rankfall._rows import OwnRows, Rows, TableRows, may_look_at
from rankfall._sorted_rows import JOINING, SortedRows, blocks_plan, may_pass, pass_plan

_SORTED = 120  # Numbers moved in the time that it takes to sort an id among others.
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
        rows: The number of rows; rounded up, so that few plans are made.
    """
    return _row_plan(layout, shapes, rows, tuple(range(len(layout.factors))), layout.axes[1])


def _row_plan(layout: Layout, shapes: Shapes, rows: int, which: Sequence[int], kept: Axes) -> Plan:
    """The order for some of the factors, whose rows have the axes `kept`."""
    return _order(layout, shapes, rows, [layout.factors[k] for k in which], kept)


def _order(layout: Layout, shapes: Shapes, rows: int, factors: Sequence[Axes], kept: Axes) -> Plan:
    """The same for factors with these axes."""
    row_modes = set(layout.axes[0])
    inputs = tuple(
        (_ROW, *(n for n in axes if n not in row_modes)) if row_modes & set(axes) else axes for axes in factors
    )
    used = {n for axes in inputs for n in axes}
    sizes = layout.mode_sizes | layout.ranks(shapes) | {_ROW: rounded(rows)}
    return plan(inputs, (_ROW, *kept), tuple((n, size) for n, size in sizes.items() if n in used))


@dataclass(frozen=True)
class Reading:
    """How rows of a low-rank matrix are read.

    Attributes:
        forms_table: Whether a table of all rows is formed; else only the distinct rows that are asked for.
        pair: If rows of the first of two thin matrices are read, and multiplied by the second after that: those two.
            For a table in blocks, the matrices that it is the product of; None for a TT-matrix.
        bond: For a TT-matrix whose table is formed, the bond at which it is done in two parts.
        cost: Time, in floating-point operations.
        joined: For a chain whose rows are read, how many of its first factors are contracted to one beforehand, and
            how many of the last: with fewer rows than are wanted, that is cheaper once than for each.
        compiled: Whether compiled code does it in one pass: rows of a chain, or those of a table that it forms in
            blocks.
    """

    forms_table: bool
    pair: Halves | None
    bond: int
    cost: int
    joined: Joined = APART
    compiled: bool = False

    def described(self) -> str:
        """The way in words."""
        if self.compiled and self.forms_table:
            return "a table of all rows in blocks"
        read = "a table of all rows" if self.forms_table else "the distinct rows"
        if self.compiled:
            read += " in one pass"
        if self.joined != APART:
            read += " of joined factors"
        return read if self.pair is None else f"{read} of one half, times the other"


@planned_once
def reading(layout: Layout, shapes: Shapes, ids: int, outputs: int, compiled: bool = False) -> Reading:
    """The cheapest way to read so many ids and to reduce them to so many outputs; see `readings`."""
    return min(readings(layout, shapes, ids, outputs, compiled), key=lambda way: way.cost)


def reading_of_ids(layout: Layout, shapes: Shapes, ids: int, outputs: int, compiled: bool = False) -> Reading:
    """What `read` does with so many ids: chosen for rounded numbers, its cost counted for the true ones."""
    chosen = reading(layout, shapes, rounded(ids), rounded(outputs), compiled)
    # A few ids less may be too few for ends to be joined.
    alike = (w for w in readings(layout, shapes, ids, outputs, compiled) if replace(w, cost=chosen.cost) == chosen)
    return next(alike, chosen)


def readings(layout: Layout, shapes: Shapes, ids: int, outputs: int, compiled: bool = False) -> list[Reading]:
    """All ways that a layout has, with their costs.

    Args:
        layout: A layout with two axes, rows first.
        shapes: The shapes of the factors, at today's ranks.
        ids: How many ids are read; how many of them differ is not known beforehand.
        outputs: How many rows come out: the number of bags, or that of ids.
        compiled: Whether there is compiled code for these factors.
    """
    rows, width = layout.shape
    distinct = min(ids, rows)
    found: list[Reading] = []

    def consider(
        forms: bool, pair: Halves | None, bond: int, before: Plan, row_width: int, joined: Joined = APART
    ) -> None:
        # Read and written by each id; then, row by row or after the reduction, widened by a product.
        effort, elements = before.effort, before.elements + 2 * ids * row_width
        if not forms:
            elements += _SORTED * ids
        if pair is not None:
            effort += 2 * outputs * (row_width + NARROW) * width
            elements += outputs * (row_width + width)
        found.append(Reading(forms, pair, bond, cost_of(effort, elements), joined))

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
    if not is_chain_of_matrices(layout):
        consider(False, None, 0, _row_plan(layout, shapes, distinct, everything, layout.axes[1]), width)
    else:
        for joined in (APART, *_joinable(layout, distinct)):
            consider(False, None, 0, _plan_of_chain(layout, shapes, distinct, joined), width, joined)
    compiled = compiled and layout.padded_shape[0] < MOST_ROWS
    return [*found, *_by_compiled_code(layout, shapes, ids)] if compiled else found


def _by_compiled_code(layout: Layout, shapes: Shapes, ids: int) -> Iterator[Reading]:
    """The ways that it has."""
    joining = round(machine().flops * JOINING)
    if is_chain(layout):
        for joined in _tails(layout, min(ids, layout.shape[0])):
            cost = _plan_of_pass(layout, shapes, ids, joined).cost + joining * (joined != APART)
            yield Reading(False, None, 0, cost, joined, compiled=True)
    thin = halves(layout, shapes)
    if thin is not None:
        (rows, width), ranks = layout.shape, layout.ranks(shapes)
        parts = plan_of_halves(layout, shapes, thin)
        made = blocks_plan((rows, 1), math.prod([ranks[bond] for bond in thin.joint]), (1, width), ids)
        yield Reading(True, thin, 0, parts.cost + made.cost + joining, compiled=True)
    elif is_chain_of_matrices(layout):
        for bond in range(len(layout.bonds)):
            yield Reading(True, None, bond, _table_in_blocks(layout, shapes, ids, bond).cost + joining, compiled=True)


def _tails(layout: Layout, rows: int) -> Iterator[Joined]:
    """The last factor of a chain, or several that have far fewer rows than are wanted.

    What the first ones have to say a pass makes once by itself.
    """
    count = len(layout.factors)
    for last in range(max(1, count + 1 - MOST_FACTORS), count):
        names, _ = modes_of(layout, range(count - last, count))
        if last == 1 or 2 * math.prod([layout.mode_sizes[name] for name in names]) <= rows:
            yield 1, last


def _joinable(layout: Layout, rows: int) -> Iterator[Joined]:
    """The ends of a TT-matrix that have far fewer rows than are wanted."""
    count = len(layout.factors)
    if not is_chain_of_matrices(layout):
        return
    for first in range(1, count):
        for last in range(1, count - first + 1):
            head, *_, tail = parts_of(count, (first, last))
            modes = [math.prod(layout.modes[0][part.start : part.stop]) for part in (head, tail) if len(part) > 1]
            if modes and 2 * max(modes) <= rows:
                yield first, last


def _plan_of_chain(layout: Layout, shapes: Shapes, rows: int, joined: Joined) -> Plan:
    """What the ends cost, and rows of what is a shorter chain then, as `chain_rows` makes them of random rows."""
    ranks = layout.ranks(shapes)
    bonds = [1, *(ranks[bond] for bond in layout.bonds), 1]
    parts = parts_of(len(layout.factors), joined)
    flops, elements, batched = *_of_joining(layout, shapes, parts), 0
    beginnings = [rows]  # Of each part the rows that differ up to there, from the last part to the first.
    for part in reversed(parts[1:]):
        distinct = math.prod(layout.modes[0][: part.start])
        beginnings.append(distinct if distinct <= WORTH_PARTING * beginnings[-1] else beginnings[-1])
    width, before = 1, 0
    for part, count in zip(parts, reversed(beginnings), strict=True):
        left, right = bonds[part.start], bonds[part.stop]
        matrices, wider = (math.prod(modes[part.start : part.stop]) for modes in layout.modes)
        if part.start:
            effort, moved = costs_of_own(count, matrices, width, left, wider * right)
            batched += effort
            elements += moved + 2 * count * width * left * (count > before)
        else:
            elements += 2 * count * wider * right
        width, before = width * wider, count
    return Plan((), flops + batched, elements, batched)


def _of_joining(layout: Layout, shapes: Shapes, parts: Sequence[range]) -> tuple[int, int]:
    """(operations, elements) of contracting the neighbours that are one."""
    plans = []
    for part in (part for part in parts if len(part) > 1):
        names = [name for axes in layout.factors[part.start : part.stop] for name in axes]
        plans.append(part_plan(layout, shapes, part, tuple(name for name in names if names.count(name) == 1)))
    return sum(made.flops for made in plans), sum(made.elements for made in plans)


def _plan_of_pass(layout: Layout, shapes: Shapes, ids: int, joined: Joined) -> Plan:
    """What the ends cost, and a pass over the shorter chain."""
    parts, ranks = parts_of(len(layout.factors), joined), layout.ranks(shapes)
    names = zip(*(modes_of(layout, part) for part in parts), strict=True)
    modes = [[math.prod([layout.mode_sizes[n] for n in own]) for own in axis] for axis in names]
    made = pass_plan(modes, [ranks[layout.bonds[part.start - 1]] for part in parts[1:]], ids)
    flops, elements = _of_joining(layout, shapes, parts)
    return replace(made, flops=made.flops + flops, elements=made.elements + elements)


def _table_in_blocks(layout: Layout, shapes: Shapes, ids: int, bond: int) -> Plan:
    """A TT-matrix in two parts, and a table of them in blocks."""
    parts = [range(bond + 1), range(bond + 1, len(layout.factors))]
    flops, elements = _of_joining(layout, shapes, parts)
    head, tail = ([math.prod(modes[part.start : part.stop]) for modes in layout.modes] for part in parts)
    made = blocks_plan(head, layout.ranks(shapes)[layout.bonds[bond]], tail, ids)
    return replace(made, flops=made.flops + flops, elements=made.elements + elements)


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
    outputs = count if outputs is None else rounded(outputs)
    return read_by(reading(layout, shapes, count, outputs, may_pass(factors, ids)), layout, factors, ids)


def read_by(way: Reading, layout: Layout, factors: Sequence[Tensor], ids: Int[Tensor, "*ids"]) -> Rows:
    """The same in a given way."""
    if way.compiled:
        # Compiled code takes factors of one type.
        narrows = torch.is_autocast_enabled("cpu")
        with torch.autocast("cpu", enabled=False) if narrows else nullcontext():
            chain = _chain_by(way, layout, factors)
        return SortedRows(chain, ids, layout.shape[1], in_blocks=way.forms_table)
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
        return OwnRows(_rows_of(layout, factors, ids.flatten(), which, kept, way.joined), ids, after)
    distinct, places = _distinct(ids)
    return TableRows(_rows_of(layout, factors, distinct, which, kept, way.joined), places, after, distinct)


def _chain_by(way: Reading, layout: Layout, factors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The factors that compiled code goes through."""
    if way.pair is not None:
        first, second = matrices(layout, factors, way.pair)
        assert first is not None
        return first.unsqueeze(1), second.unsqueeze(1)
    joined = (way.bond + 1, len(factors) - way.bond - 1) if way.forms_table else way.joined
    return tuple(chain_of(layout, factors, joined))


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
    layout: Layout,
    factors: Sequence[Tensor],
    rows: Int[Tensor, " n"],
    which: Sequence[int],
    kept: Axes,
    joined: Joined,
) -> Float[Tensor, "n width"]:
    """Rows of what some of the factors stand for: each factor at its digit, then a batch of small contractions."""
    width = layout.shape[1]
    if kept == layout.axes[1] and is_chain_of_matrices(layout):
        return chain_rows(chain_of(layout, factors, joined), rows)[:, :width]
    digit, taken = dict(zip(layout.axes[0], digits(rows, layout.modes[0]), strict=True)), []
    for k in which:
        factor, axes = factors[k], layout.factors[k]
        dims = [d for d, name in enumerate(axes) if name in digit]
        taken.append(factor.movedim(dims[0], 0).index_select(0, digit[axes[dims[0]]]) if dims else factor)
    steps = _row_plan(layout, shapes_of(factors), len(rows), which, kept)
    found = run(steps, taken).flatten(1)
    return found[:, :width] if kept == layout.axes[1] and found.shape[1] > width else found
