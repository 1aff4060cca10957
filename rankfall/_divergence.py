# SPDX-License-Identifier: Apache-2.0
"""KL(q || p) of a set of factors, and the moments that the prior scales are found from."""

import math
from collections.abc import Sequence

from torch import Tensor

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
    squares = second_moments(means, log_stds)
    total = squares[0].new_zeros(())
    for moment, count in governed_moments(layout, squares).values():
        total = total + kl_of_moments(prior, moment, count, hyperprior=hyperprior)
    if layout.core is not None:
        core = squares[layout.core]
        total = total + 0.5 * core.sum() / _CORE_STD**2 + core.numel() * math.log(_CORE_STD)
    for log_std in log_stds:
        total = total - wide(log_std).sum() - 0.5 * log_std.numel()
    return total
