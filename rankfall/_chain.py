# SPDX-License-Identifier: Apache-2.0
"""Single rows of a TT-matrix: small products from left to right, those with the same matrix together."""

import math
import warnings
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from typing import TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from rankfall._einsum import contract, power_of_two
from rankfall._layout import Layout
from rankfall._rows import may_look_at

Joined: TypeAlias = tuple[int, int]
APART: Joined = (1, 1)


def is_chain_of_matrices(layout: Layout) -> bool:
    """Whether every factor has one mode of each axis between its bonds, as a TT-matrix has."""
    pairs = list(zip(*layout.axes, strict=False))
    inside = [tuple(n for n in axes if n not in layout.bonds) for axes in layout.factors]
    return len(layout.axes) == 2 and len(layout.axes[0]) == len(layout.axes[1]) and inside == pairs


def chain_rows(
    layout: Layout, factors: Sequence[Tensor], digit: Sequence[Int[Tensor, " n"]], joined: Joined = APART
) -> Float[Tensor, "n width"]:
    """Rows of a TT-matrix from left to right: a row so far is (width so far x rank), and each factor widens it.

    Args:
        layout: That of a TT-matrix.
        factors: Its factors.
        digit: For each row its digits, along each row mode.
        joined: How many of the first factors are contracted to one beforehand, and how many of the last.
    """
    parts = parts_of(len(factors), joined)
    first, *others = (_joint_factor(layout, factors, part) for part in parts)
    digit = [_joint_digit(layout, digit, part) for part in parts]
    rows, width = first.index_select(0, digit[0]), first.shape[1]
    for factor, of_row in zip(others, digit[1:], strict=True):
        # (rank before, rows, width, rank after) to (rows, rank before, width x rank after); the last has no bond after.
        matrices = factor.movedim(1, 0).flatten(2)
        width *= factor.shape[2]
        rows = _times_own(rows, matrices, of_row).reshape(len(rows), width, *factor.shape[3:])
    return rows[:, : layout.shape[1]]


def parts_of(factors: int, joined: Joined) -> list[range]:
    """Which neighbours of a chain are one: some of the first, each in the middle, some of the last."""
    head, tail = range(joined[0]), range(factors - joined[1], factors)
    return [head, *(range(k, k + 1) for k in range(head.stop, tail.start)), tail] if factors > 1 else [head]


def _joint_factor(layout: Layout, factors: Sequence[Tensor], part: range) -> Tensor:
    """Neighbours as one factor, whose modes are theirs together."""
    if len(part) == 1:
        return factors[part.start]
    taken, bonds = slice(part.start, part.stop), layout.bonds
    rows, columns = (axes[taken] for axes in layout.axes)
    before, after = bonds[max(part.start - 1, 0) : part.start], bonds[part.stop - 1 : part.stop]
    found = contract(layout.factors[taken], (*before, *rows, *columns, *after), factors[taken])
    sizes = [math.prod([layout.mode_sizes[name] for name in names]) for names in (rows, columns)]
    return found.reshape(*found.shape[: len(before)], *sizes, *found.shape[found.dim() - len(after) :])


def _joint_digit(layout: Layout, digit: Sequence[Int[Tensor, " n"]], part: range) -> Int[Tensor, " n"]:
    joint = digit[part.start]
    for k in part[1:]:
        joint = joint * layout.modes[0][k] + digit[k]
    return joint


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
