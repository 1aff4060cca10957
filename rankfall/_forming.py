# SPDX-License-Identifier: Apache-2.0
"""A low-rank weight formed whole, by compiled code where that is faster."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from rankfall import _contract
from rankfall._chain import chain_of
from rankfall._einsum import Shapes, planned_once, shapes_of
from rankfall._layout import Layout
from rankfall._row_library import MOST_FACTORS
from rankfall._sorted_rows import SortedRows, may_pass, pass_plan

_MOST_ROWS = 1 << 20  # Of more the numbers by which they are sorted would need much memory.
_SLOWER = 1.6  # How much longer than counted it takes to form a tensor pair by pair, at most, beside a pass.


def dense(layout: Layout, factors: Sequence[Tensor]) -> Float[Tensor, "*shape"]:
    """`_contract.dense`; a TT-matrix on a CPU row by row, in one pass that needs nothing to be brought into order."""
    if not _is_row_by_row(layout, shapes_of(factors)) or torch.is_autocast_enabled(factors[0].device.type):
        return _contract.dense(layout, factors)
    rows, width = layout.shape
    ids = torch.arange(rows, device=factors[0].device)
    if not may_pass(factors, ids):
        return _contract.dense(layout, factors)
    return SortedRows(tuple(chain_of(layout, factors)), ids, width).taken()


@planned_once
def _is_row_by_row(layout: Layout, shapes: Shapes) -> bool:
    """Whether a pass over all rows is the cheapest way, where there is compiled code for it."""
    if len(layout.axes) != 2 or not 1 < len(shapes) <= MOST_FACTORS or layout.shape[0] > _MOST_ROWS:
        return False
    ranks = list(layout.ranks(shapes).values())
    if not all(ranks) or _contract.halves(layout, shapes) is not None:
        return False
    pass_ = pass_plan(layout.modes, ranks, layout.shape[0])
    return pass_.cost < _SLOWER * _contract.forming(layout, shapes).plan.cost
