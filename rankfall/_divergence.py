# SPDX-License-Identifier: Apache-2.0
"""KL(q || p) of a set of factors, and the moments that the prior scales are found from."""

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from rankfall._formats import Layout
from rankfall._priors import Prior, kl_of_moments

_CORE_STD = 10.0  # Prior standard deviation of the Tucker core (arXiv 2010.08689).


def wide(tensor: Tensor) -> Tensor:
    """The tensor in float32 at least."""
    return tensor if tensor.dtype.itemsize >= 4 else tensor.float()


def second_moments(means: Sequence[Tensor], log_stds: Sequence[Tensor] = ()) -> list[Tensor]:
    """mean^2 + std^2 of every entry; without `log_stds` as if std were 0."""
    squares = [wide(mean).square() for mean in means]
    if not log_stds:
        return squares
    return [s + (2 * wide(log_std)).exp() for s, log_std in zip(squares, log_stds, strict=True)]


def per_slice(squares: Sequence[Tensor], places: Sequence[tuple[int, int]]) -> Tensor:
    """The sum over each slice of the factors at the given (factor, dimension) pairs, shape (rank,)."""
    total = None
    for k, dim in places:
        part = squares[k].sum([d for d in range(squares[k].dim()) if d != dim])
        total = part if total is None else total + part
    assert total is not None, "a bond governs something"
    return total


def governed_moments(layout: Layout, squares: Sequence[Tensor]) -> dict[str, tuple[Tensor, int]]:
    """For each bond the second moment of every slice, and the number of entries that a slice governs."""
    out = {}
    for bond, places in layout.governs:
        count = sum(squares[k].numel() // max(squares[k].shape[dim], 1) for k, dim in places)
        out[bond] = (per_slice(squares, places), count)
    return out


def kl_of_factors(
    layout: Layout,
    prior: Prior,
    means: Sequence[Tensor],
    log_stds: Sequence[Tensor] = (),
    *,
    hyperprior: bool = True,
) -> Tensor:
    """KL(q || p) at the best prior scales, in nats, with -log p(s) of the scales or without; see `LowRankTensor.kl`."""
    value: Tensor = _Divergence.apply(layout, prior, hyperprior, len(means), *means, *log_stds)  # pyright: ignore
    return value


class _Divergence(torch.autograd.Function):
    """The KL with its gradient in closed form: mean / s^2, and std^2 / s^2 - 1 for a log std.

    Autograd would record some thirty small operations a factor, at every step. The scales s are held fixed in the
    gradient: at their optimum, and where they rest on their lower bound, the partial gradient is the total one.
    """

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: FunctionCtx, layout: Layout, prior: Prior, hyperprior: bool, count: int, *parameters: Tensor
    ) -> Tensor:
        means, log_stds = parameters[:count], parameters[count:]
        variances = [(2 * wide(log_std)).exp() for log_std in log_stds]
        squares = [wide(mean).square() for mean in means]
        squares = [s + v for s, v in zip(squares, variances, strict=True)] if variances else squares
        governed = {bond: (moment, n) for bond, (moment, n) in governed_moments(layout, squares).items() if n}
        value = squares[0].new_zeros(())
        precisions: dict[int, Tensor | float] = {}
        if governed:
            sizes = [len(moment) for moment, _ in governed.values()]
            moments = torch.cat([moment for moment, _ in governed.values()])
            counts = _counts(tuple(sizes), tuple(n for _, n in governed.values()), moments.device, moments.dtype)
            value, scales = kl_of_moments(prior, moments, counts, hyperprior=hyperprior)
            for bond, inverse in zip(governed, scales.reciprocal().split(sizes), strict=True):
                for k, dim in dict(layout.governs)[bond]:
                    precisions[k] = inverse.reshape([-1 if d == dim else 1 for d in range(means[k].dim())])
        if layout.core is not None:
            core = squares[layout.core]
            value = value + 0.5 * core.sum() / _CORE_STD**2 + core.numel() * math.log(_CORE_STD)
            precisions[layout.core] = _CORE_STD**-2
        for log_std in log_stds:
            value = value - wide(log_std).sum() - 0.5 * log_std.numel()
        if any(ctx.needs_input_grad):  # pyright: ignore[reportAttributeAccessIssue]
            gradients = [mean * precisions.get(k, 0.0) for k, mean in enumerate(means)]
            gradients += [v * precisions.get(k, 0.0) - 1 for k, v in enumerate(variances)]
            ctx.save_for_backward(*gradients)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        partial = ctx.saved_tensors  # pyright: ignore[reportAttributeAccessIssue]
        return (None, None, None, None, *(gradient * p for p in partial))


@lru_cache(maxsize=256)
def _counts(sizes: tuple[int, ...], counts: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """How many entries each slice governs, for all bonds in a row; made once, since that waits for the device."""
    each = [n for size, n in zip(sizes, counts, strict=True) for _ in range(size)]
    return torch.tensor(each, device=device, dtype=dtype)
