# SPDX-License-Identifier: Apache-2.0
"""Hyperpriors on the scale of a slice. The best scale is a closed form of the factors, so it is never stored."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

# Standard deviation under which a prior scale is not followed down. Without it the log prior of a Point posterior
# grows without bound as a slice goes to zero, and its gradient with it.
MIN_SCALE = 1e-5


def _check_positive(kind: str, name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{kind}: {name} must be positive, got {value}. Pass for example {name}=1.0.")


@dataclass(frozen=True)
class Prior(ABC):
    """A hyperprior p(s) on the prior scale s (a standard deviation) of a slice; entries of the slice are N(0, s^2)."""

    @abstractmethod
    def variance(self, moment: Tensor, count: int | Tensor) -> Tensor:
        """The prior variance s^2 that maximises the ELBO, in closed form.

        It solves d/dv [ 1/2 (moment/v + count log v) - log p(sqrt v) ] = 0 (Hawkins, Liu, Zhang, arXiv 2010.08689).

        Args:
            moment: Sum of mean^2 + std^2 over the entries that the slice governs, one number per slice, shape (rank,).
            count: Number of those entries; one number, or one per slice.

        Returns:
            Variances, shape (rank,), never under the smallest scale that is followed.
        """

    @abstractmethod
    def penalty(self, variance: Tensor) -> Tensor:
        """-log p(s) up to a constant, in nats, shape (rank,)."""


@dataclass(frozen=True)
class LogUniform(Prior):
    """p(s) proportional to 1/s on a bounded interval: every order of magnitude of the scale is as likely.

    Example:
        >>> LogUniform().variance(torch.tensor([6.0]), 5)
        tensor([1.])
    """

    def variance(self, moment: Tensor, count: int | Tensor) -> Tensor:
        """Moment / (count + 1); see `Prior.variance`."""
        return (moment / (count + 1)).clamp_min(MIN_SCALE**2)

    def penalty(self, variance: Tensor) -> Tensor:
        """1/2 log variance; see `Prior.penalty`."""
        return 0.5 * variance.log()


@dataclass(frozen=True)
class HalfCauchy(Prior):
    """p(s) proportional to 1 / (1 + s^2 / scale^2): flat up to `scale`, a heavy tail beyond.

    Example:
        >>> HalfCauchy(scale=1.0).variance(torch.tensor([0.0, 6.0]), 5) > 0
        tensor([True, True])

    Args:
        scale: The hyperprior scale, in units of a factor's entries. Lower it to shrink all slices of a bond harder.

    Raises:
        ValueError: If `scale` is not positive.
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        _check_positive("HalfCauchy", "scale", self.scale)

    def variance(self, moment: Tensor, count: int | Tensor) -> Tensor:
        """The positive root of (count+2) v^2 + (count e - moment) v - moment e = 0 with e = scale^2."""
        e = self.scale**2
        b = moment - count * e
        root = torch.sqrt(b * b + 4 * (count + 2) * e * moment)
        # Either form alone cancels on one side of b = 0; the denominator is never near zero where it is used.
        low = 2 * e * moment / (root - b).clamp_min(torch.finfo(moment.dtype).tiny)
        return torch.where(b > 0, (b + root) / (2 * (count + 2)), low).clamp_min(MIN_SCALE**2)

    def penalty(self, variance: Tensor) -> Tensor:
        """Log(1 + variance / scale^2); see `Prior.penalty`."""
        return torch.log1p(variance / self.scale**2)


def kl_of_moments(
    prior: Prior, moment: Tensor, count: int | Tensor, *, hyperprior: bool = True
) -> tuple[Tensor, Tensor]:
    """The part of the KL that the prior sees, over a number of slices, and the variances at which it stands.

    sum over slices of 1/2 (moment / v + count log v) - log p(sqrt v), in nats, at the best variance v; the last term is
    left out on request. Its derivative by a moment is 1 / (2 v): at an optimum, and where v rests on its lower bound,
    the partial derivative is the total one.

    Args:
        prior: The hyperprior.
        moment: As for `Prior.variance`.
        count: As for `Prior.variance`, or one number per slice.
        hyperprior: Whether -log p(s) counts.
    """
    variance = prior.variance(moment, count)
    entries = 0.5 * (moment / variance + count * variance.log())
    return (entries + prior.penalty(variance) if hyperprior else entries).sum(), variance
