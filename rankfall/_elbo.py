# SPDX-License-Identifier: Apache-2.0
"""The evidence lower bound as a loss."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rankfall._divergence import kl_of_factors
from rankfall._tensor import LowRankTensor
from rankfall._walk import low_rank_tensors


def kl(model: nn.Module) -> Float[Tensor, ""]:
    """KL(q || p) of all low-rank tensors of a model, in nats; differentiable.

    Example:
        >>> model = nn.Sequential(rf.nn.Linear(12, 20, format=rf.TTM(4)), nn.ReLU(), nn.Linear(20, 3))
        >>> rf.kl(model).shape
        torch.Size([])

    Args:
        model: Any module; what is not a low-rank tensor (biases, normalisation, dense layers) has no prior.

    Raises:
        ValueError: If the model has no low-rank tensor.
    """
    # Tensors of a kind share one flat buffer: small operations cost more than what they compute.
    alike: dict[object, list[LowRankTensor]] = {}
    for _, tensor in low_rank_tensors(model):
        first = tensor.factors[0]
        alike.setdefault((tensor.prior, first.device, first.dtype, len(tensor.log_stds) > 0), []).append(tensor)
    if not alike:
        raise ValueError(
            f"{type(model).__name__} has no low-rank tensor, so there is no KL. "
            "Call rf.tensorize_(model, rf.TTM(20)) first."
        )
    terms = [_kl_of(tensors) for tensors in alike.values()]
    total = terms[0]
    for term in terms[1:]:
        total = total + term.to(total.device)
    return total


def _kl_of(tensors: list[LowRankTensor]) -> Tensor:
    first = tensors[0]
    with torch.autocast(first.factors[0].device.type, enabled=False):
        return kl_of_factors(first.prior, [tensor.posterior_factors() for tensor in tensors])


def check_weights(num_data: float, beta: float) -> None:
    """Refuses weights of data against prior that make no bound.

    Raises:
        ValueError: If `num_data` is not a positive number, or `beta` is negative.
    """
    if not 0 < num_data < math.inf:
        raise ValueError(f"num_data must be positive, got {num_data}. Pass the size of the training set, len(dataset).")
    if not 0 <= beta < math.inf:
        raise ValueError(f"beta must be 0 or more, got {beta}. 1 is the evidence lower bound.")


class ELBOLoss:
    """The negative evidence lower bound per datum, to be minimised: nll_mean + beta * KL / num_data.

    Example:
        >>> model = rf.nn.Linear(12, 20, format=rf.TTM(4))
        >>> elbo = rf.ELBOLoss(model, num_data=60_000)
        >>> loss = elbo(model(torch.randn(8, 12)).square().mean())
        >>> loss.backward()

    Args:
        model: The model whose KL is added.
        num_data: The size of the training set, not of a batch: it weighs the data against the prior.
        beta: Weight of the KL; 1 is the evidence lower bound, other values temper the posterior.

    Raises:
        ValueError: If `num_data` is not positive, or `beta` is negative.
    """

    def __init__(self, model: nn.Module, num_data: int, beta: float = 1.0) -> None:
        check_weights(num_data, beta)
        self.model, self.num_data, self.beta = model, num_data, beta

    def __call__(self, nll_mean: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """The loss of one batch.

        Args:
            nll_mean: Mean over the batch of the negative log likelihood of one datum, in nats (for example the
                cross-entropy), computed in train mode.

        Raises:
            ValueError: If `nll_mean` is not a single number.
        """
        if nll_mean.dim() != 0:
            raise ValueError(
                f"nll_mean must be one number, got a tensor of shape {tuple(nll_mean.shape)}. Call .mean() on it."
            )
        return nll_mean + self.beta / self.num_data * kl(self.model)
