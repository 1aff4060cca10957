# SPDX-License-Identifier: Apache-2.0
"""What is learned of an entry of a factor: its value alone (Point), or a mean and a standard deviation (MeanField)."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Posterior(ABC):
    """q(factors): how uncertain the entries of a factor are."""

    @abstractmethod
    def initial_log_std(self, mean: Tensor) -> Tensor | None:
        """Log standard deviations to start from, of the shape of `mean`; None where the posterior has none."""


@dataclass(frozen=True)
class Point(Posterior):
    """All mass on one value: maximum a posteriori training, half the memory of MeanField and no noise.

    Example:
        >>> Point().initial_log_std(torch.ones(3)) is None
        True
    """

    def initial_log_std(self, mean: Tensor) -> None:
        """None: a point has no spread."""


@dataclass(frozen=True)
class MeanField(Posterior):
    """Independent normals N(mean, std^2), one per entry.

    In train mode a layer draws its factors once per forward, mean + std * noise; in eval mode it uses the means, and
    since the formats are multilinear that is the exact posterior mean of the weight.

    Example:
        >>> MeanField(initial_std=0.5).initial_log_std(torch.tensor([3.0, 4.0])).exp()
        tensor([1.7678, 1.7678])

    Args:
        initial_std: Standard deviation at the start, relative to the root mean square of each factor. Raise it if a
            run should explore more at first.

    Raises:
        ValueError: If `initial_std` is not positive.
    """

    initial_std: float = 0.01

    def __post_init__(self) -> None:
        if not self.initial_std > 0:
            raise ValueError(
                f"MeanField: initial_std must be positive, got {self.initial_std}. "
                "Pass for example initial_std=0.01, or use rf.Point() for no spread at all."
            )

    def initial_log_std(self, mean: Tensor) -> Tensor:
        """Log(initial_std * root mean square of `mean`) everywhere."""
        size = mean.square().mean().sqrt() if mean.numel() else mean.new_ones(())
        return torch.full_like(mean, self.initial_std).log() + size.clamp_min(1e-12).log()


def draw(mean: Tensor, log_std: Tensor) -> Tensor:
    """One reparameterised draw mean + std * noise; differentiable in both, noise from torch's global generator."""
    return torch.addcmul(mean, log_std.exp(), torch.randn_like(mean))
