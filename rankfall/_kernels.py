# SPDX-License-Identifier: Apache-2.0
"""Triton kernels for what torch has no call for: rows that are each multiplied by a matrix of their own choice.

Imported only where they run, on a GPU with Triton. Gathering the matrices first, as torch.bmm needs, would write and
read one for every row, where a few hundred of them stay in the cache; and their gradients would be added one by one.
Sizes and ranks are arguments, so that a cut compiles nothing anew.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from rankfall._einsum import power_of_two

_UNROLLED = 4  # Steps of a sum whose numbers are fetched together.
_LONGEST = 64  # Side of the tile that a program holds in registers.
_TILE = 2048  # Entries of that tile.
_ONE_WARP = 512  # Entries that a single warp is enough for.


@triton.jit
def product_kernel(
    left,
    matrices,
    which,
    out,
    p,
    q,
    s,
    left_n,
    left_p,
    left_q,
    matrices_m,
    matrices_q,
    matrices_s,
    UNROLLED: tl.constexpr,
    SUM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """out[n] = left[n] @ matrices[which[n]], one tile of one n; `out` is contiguous, the others have strides."""
    n = tl.program_id(0).to(tl.int64)
    rows = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.program_id(2) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    is_row, is_column = rows < p, columns < s
    own = tl.load(which + n).to(tl.int64)
    x_at = left + n * left_n + rows * left_p
    y_at = matrices + own * matrices_m + columns * matrices_s
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), SUM)
    for k0 in range(0, q, UNROLLED):
        for k in tl.static_range(UNROLLED):  # pyright: ignore[reportGeneralTypeIssues]
            inside = k0 + k < q
            x = tl.load(x_at + (k0 + k) * left_q, mask=is_row & inside, other=0.0).to(SUM)
            y = tl.load(y_at + (k0 + k) * matrices_q, mask=is_column & inside, other=0.0).to(SUM)
            total += x[:, None] * y[None, :]
    place = n * p * s + rows[:, None] * s + columns[None, :]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])


@triton.jit
def gradient_kernel(
    left,
    grad,
    which,
    out,
    p,
    q,
    s,
    left_n,
    left_p,
    left_q,
    grad_n,
    grad_p,
    grad_s,
    UNROLLED: tl.constexpr,
    SUM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """out[which[n]] += left[n].T @ grad[n], one tile of one n.

    To sort the rows by their matrix first, and add up neighbours, takes longer than the programs wait for each other.
    """
    n = tl.program_id(0).to(tl.int64)
    rows = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.program_id(2) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    is_row, is_column = rows < q, columns < s
    x_at = left + n * left_n + rows * left_q
    y_at = grad + n * grad_n + columns * grad_s
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), SUM)
    for k0 in range(0, p, UNROLLED):
        for k in tl.static_range(UNROLLED):  # pyright: ignore[reportGeneralTypeIssues]
            inside = k0 + k < p
            x = tl.load(x_at + (k0 + k) * left_p, mask=is_row & inside, other=0.0).to(SUM)
            y = tl.load(y_at + (k0 + k) * grad_p, mask=is_column & inside, other=0.0).to(SUM)
            total += x[:, None] * y[None, :]
    place = tl.load(which + n).to(tl.int64) * q * s + rows[:, None] * s + columns[None, :]
    tl.atomic_add(out + place, total, mask=is_row[:, None] & is_column[None, :], sem="relaxed")


def own_products(
    left: Float[Tensor, "n p q"], matrices: Float[Tensor, "m q s"], which: Int[Tensor, " n"]
) -> Float[Tensor, "n p s"]:
    """left[k] @ matrices[which[k]] for every k, with gradients; sums are of float32, or float64 for such numbers.

    Inside torch.autocast numbers are read in its type, and the result has it, as that of torch.bmm has. No call waits
    for the GPU.

    Args:
        left: May have any strides, as may `matrices`.
        matrices: A few that many rows choose from.
        which: From 0 up to but not including m; not checked.
    """
    kind = left.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        left, matrices = left.to(dtype), matrices.to(dtype)
    return _OwnProducts.apply(left, matrices, which)  # pyright: ignore[reportReturnType]


def try_on(device: torch.device) -> None:
    """Holds the kernels against torch.bmm on a device, with small numbers that both of them have to get right.

    Raises:
        RuntimeError: If they differ; or what Triton raises where it cannot compile.
    """
    left = torch.arange(60.0, device=device).view(5, 3, 4) % 7
    matrices = torch.arange(40.0, device=device).view(2, 4, 5) % 5
    which = torch.tensor([0, 1, 1, 0, 1], device=device)
    chosen = matrices[which]
    wanted = torch.bmm(left, chosen)
    gradient = matrices.new_zeros(2, 4, 5).index_add_(0, which, torch.bmm(left.mT, wanted))
    found = _products(left, matrices, which)
    if not (torch.equal(found, wanted) and torch.equal(_gradients(left, found, which, 2), gradient)):
        raise RuntimeError("they give other numbers")


class _OwnProducts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, left: Tensor, matrices: Tensor, which: Tensor) -> Tensor:  # noqa: ANN401  torch's context
        ctx.save_for_backward(left, matrices, which)
        return _products(left, matrices, which)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # noqa: ANN401  # pyright: ignore
        left, matrices, which = ctx.saved_tensors
        needs_left, needs_matrices, _ = ctx.needs_input_grad
        if torch.is_grad_enabled():  # What is to be differentiated again is left to operations that autograd knows.
            chosen = matrices.index_select(0, which)
            of_chosen = torch.zeros_like(matrices).index_add(0, which, torch.bmm(left.mT, grad))
            return torch.bmm(grad, chosen.mT), of_chosen, None
        of_left = _products(grad, matrices.transpose(1, 2), which) if needs_left else None
        of_matrices = _gradients(left, grad, which, len(matrices)).to(matrices.dtype) if needs_matrices else None
        return of_left, of_matrices, None


def _products(left: Tensor, matrices: Tensor, which: Tensor) -> Tensor:
    (n, p, _), s = left.shape, matrices.shape[2]
    return _run(product_kernel, left, matrices, which, left.new_empty(n, p, s))


def _gradients(left: Tensor, grad: Tensor, which: Tensor, groups: int) -> Tensor:
    """The sum of left[k].T @ grad[k] over the k that chose each matrix, shape (groups, q, s)."""
    dtype = torch.float64 if left.dtype == torch.float64 else torch.float32
    return _run(gradient_kernel, left, grad, which, left.new_zeros(groups, left.shape[2], grad.shape[2], dtype=dtype))


def _run(kernel: Any, left: Tensor, right: Tensor, which: Tensor, out: Tensor) -> Tensor:  # noqa: ANN401  a type of Triton's
    """`out`, filled in by a program for each row and tile of a matrix."""
    n, p, q = left.shape
    if not n * out.numel():
        return out
    rows, columns = _tile(*out.shape[1:])
    kernel[n, triton.cdiv(out.shape[1], rows), triton.cdiv(out.shape[2], columns)](
        left,
        right,
        which,
        out,
        p,
        q,
        right.shape[2],
        *left.stride(),
        *right.stride(),
        UNROLLED=_UNROLLED,
        SUM=tl.float64 if left.dtype == torch.float64 else tl.float32,
        BLOCK_ROWS=rows,
        BLOCK_COLUMNS=columns,
        num_warps=1 if rows * columns <= _ONE_WARP else 4,
    )
    return out


def _tile(rows: int, columns: int) -> tuple[int, int]:
    """Sides of the part of a matrix that one program works out, powers of two."""
    high = min(power_of_two(rows), _LONGEST)
    return high, min(power_of_two(columns), _TILE // high)
