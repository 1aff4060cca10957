# SPDX-License-Identifier: Apache-2.0
"""The evidence lower bound as a loss."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rankfall._divergence import draw_with_kl, kl_of_factors
from rankfall._joint_draw import CompiledDraw, has_draw
from rankfall._tensor import LowRankTensor
from rankfall._triton import runs_on
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
    kinds = _alike([tensor for _, tensor in low_rank_tensors(model)])
    if not kinds:
        raise ValueError(
            f"{type(model).__name__} has no low-rank tensor, so there is no KL. "
            "Call rf.tensorize_(model, rf.TTM(20)) first."
        )
    return _total([_kl_of(tensors) for tensors in kinds])


def _alike(tensors: Sequence[LowRankTensor]) -> list[list[LowRankTensor]]:
    """Tensors of a kind share one flat buffer: small operations cost more than what they compute."""
    alike: dict[object, list[LowRankTensor]] = {}
    for tensor in tensors:
        first = tensor.factors[0]
        alike.setdefault((tensor.prior, first.device, first.dtype, len(tensor.log_stds) > 0), []).append(tensor)
    return list(alike.values())


def _total(terms: Sequence[Tensor]) -> Tensor:
    total = terms[0]
    for term in terms[1:]:
        total = total + term.to(total.device)
    return total


def _kl_of(tensors: list[LowRankTensor]) -> Tensor:
    return kl_of_factors(tensors[0].prior, [tensor.posterior_factors() for tensor in tensors])


class JointDraw:
    """Draws the factors of all low-rank tensors of a model in one go, with their KL.

    What each layer would do by itself at every step, for all of them in one flat buffer: it pays where there are many
    small factors. Make another one once the model has got other tensors, or other parameters; ranks may change. One
    draw at a time: a backward pass comes before the next draw.

    Example:
        >>> model = nn.Sequential(rf.nn.Linear(12, 20, format=rf.TTM(4)), rf.nn.Linear(20, 3, format=rf.TT(2)))
        >>> draw = JointDraw(model)
        >>> with draw() as kl:
        ...     y = model(torch.randn(5, 12))
        >>> torch.allclose(kl, rf.kl(model))
        True
        >>> (y.square().mean() + kl / 1000).backward()
        >>> draw.hand_on_()
        >>> model[0].weight.factors[0].grad.shape == model[0].weight.factors[0].shape
        True

    Args:
        model: A model with low-rank tensors.
    """

    def __init__(self, model: nn.Module) -> None:
        self._kinds = [(tensors, _draw_of(tensors)) for tensors in _alike([t for _, t in low_rank_tensors(model)])]

    @contextmanager
    def __call__(self) -> Iterator[Float[Tensor, ""]]:
        """Inside, every forward in train mode uses the same draw; gives KL(q || p) of all tensors, in nats."""
        terms: list[Tensor] = []
        try:
            for tensors, draw in self._kinds:
                value, draws = draw()
                for tensor, its in zip(tensors, draws, strict=False):  # Points have none.
                    tensor.given[:] = its
                terms.append(value)
            yield _total(terms)
        finally:
            for tensors, _ in self._kinds:
                for tensor in tensors:
                    tensor.given.clear()

    def hand_on_(self) -> None:
        """After each backward pass: gives the parameters the gradients that are still with their draws and the KL."""
        for _, draw in self._kinds:
            if isinstance(draw, CompiledDraw):
                draw.hand_on_()


def _draw_of(tensors: list[LowRankTensor]) -> Callable[[], tuple[Tensor, list[list[Tensor]]]]:
    """The KL of tensors of a kind each time, and a draw of each one's factors if they have a spread."""
    prior, factors = tensors[0].prior, [tensor.posterior_factors() for tensor in tensors]
    if has_draw(prior, factors):
        return CompiledDraw(prior, factors)
    if factors[0].log_stds and _has_kernels(factors[0].means[0].device):
        from rankfall._draw_kernels import KernelDraw  # noqa: PLC0415  Triton is loaded where it runs.

        return KernelDraw(prior, factors)
    if factors[0].log_stds:
        return partial(draw_with_kl, prior, factors)
    return lambda: (kl_of_factors(prior, factors), [])


@cache
def _has_kernels(device: torch.device) -> bool:
    """Whether factors are drawn by kernels there."""
    return runs_on(device, _try_kernels, "factors are drawn by torch")


def _try_kernels(device: torch.device) -> None:
    from rankfall._draw_kernels import try_on  # noqa: PLC0415  Triton is loaded where it runs.

    try_on(device)


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
