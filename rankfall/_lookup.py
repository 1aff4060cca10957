# SPDX-License-Identifier: Apache-2.0
"""Rows of a low-rank matrix: what an embedding computes, without forming the table."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rankfall import _contract
from rankfall._einsum import Plan, plan, run
from rankfall._formats import Layout

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


def lookup_plan(layout: Layout, shapes: Sequence[Sequence[int]], rows: int) -> Plan:
    """The cheapest order in which the wanted rows are contracted; see `lookup`.

    Args:
        layout: A layout with two axes.
        shapes: The shapes of the factors, at today's ranks.
        rows: The number of rows; rounded up to a power of two, so that few plans are made.
    """
    row_modes = set(layout.axes[0])
    inputs = tuple(tuple(_ROW if name in row_modes else name for name in axes) for axes in layout.factors)
    sizes = layout.mode_sizes | layout.ranks(shapes) | {_ROW: 1 << (max(rows, 1) - 1).bit_length()}
    inputs = tuple(tuple(sorted(axes, key=lambda name: name != _ROW)) for axes in inputs)
    return plan(inputs, (_ROW, *layout.axes[1]), tuple(sizes.items()))


def forms_table(layout: Layout, shapes: Sequence[Sequence[int]], rows: int) -> bool:
    """Whether forming the whole matrix and reading the rows off it is cheaper than contracting row by row."""
    table, apart = _contract.dense_plan(layout, shapes), lookup_plan(layout, shapes, rows)
    return table.cost < apart.cost


def lookup(layout: Layout, factors: Sequence[Tensor], rows: Int[Tensor, " n"]) -> Float[Tensor, "n width"]:
    """dense()[rows]: each factor is read at its digit of each row, and the rest is a batch of small contractions.

    Time and memory grow with the number of rows, not with the table, unless the table is so small that forming it is
    cheaper. Gradients reach every factor densely. Give distinct rows: equal ones are computed again.

    Args:
        layout: A layout with two axes, rows first.
        factors: The factors, at today's ranks.
        rows: Row numbers, from 0 up to but not including the number of rows; not checked.
    """
    shapes = [f.shape for f in factors]
    if forms_table(layout, shapes, len(rows)):
        return _contract.dense(layout, factors).index_select(0, rows)
    digit = dict(zip(layout.axes[0], digits(rows, layout.modes[0]), strict=True))
    read = []
    for factor, axes in zip(factors, layout.factors, strict=True):
        dim = next((d for d, name in enumerate(axes) if name in digit), None)
        read.append(factor if dim is None else factor.movedim(dim, 0).index_select(0, digit[axes[dim]]))
    width = layout.shape[1]
    found = run(lookup_plan(layout, shapes, len(rows)), read).flatten(1)
    return found if found.shape[1] == width else found[:, :width]
