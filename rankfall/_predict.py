# SPDX-License-Identifier: Apache-2.0
"""The posterior predictive: what a model says under draws of its factors."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rankfall._tensor import LowRankTensor
from rankfall._walk import finite_tensors


@torch.no_grad()
def predict(model: nn.Module, *inputs: Any, samples: int = 32) -> Float[Tensor, "draws ..."]:  # noqa: ANN401
    """The outputs of a model under draws of all its factors from the posterior, stacked.

    Every draw is one set of factors for the whole input. Dropout and normalisation act as in eval mode; the model is
    left in the modes that it was in. The predictive distribution is the mean over draws of the likelihood, so average
    probabilities and not logits:

        p(y | x) = mean over draws w of p(y | x, w)

    Example:
        >>> model = nn.Sequential(rf.nn.Linear(12, 3, format=rf.TTM(4)))
        >>> logits = rf.predict(model, torch.randn(5, 12), samples=8)
        >>> logits.shape, logits.softmax(-1).mean(0).shape
        (torch.Size([8, 5, 3]), torch.Size([5, 3]))

    Args:
        model: A model with low-rank tensors that returns one tensor. With rf.Point all draws are the same.
        *inputs: What its forward takes.
        samples: Number of draws; the error of the predictive mean falls with its square root.

    Raises:
        ValueError: If `samples` is under 1, there is no low-rank tensor, or a factor is not finite.
        TypeError: If the model returns something other than a tensor.
    """
    if samples < 1:
        raise ValueError(f"samples must be 1 or more, got {samples}.")
    finite_tensors(model, "draw from")
    outputs = []
    with _drawing(model):
        for _ in range(samples):
            output = model(*inputs)
            if not isinstance(output, Tensor):
                raise TypeError(
                    f"{type(model).__name__} returned a {type(output).__name__}, and only tensors can be stacked. "
                    "Wrap it in a module that returns the tensor of interest."
                )
            outputs.append(output)
    return torch.stack(outputs)


@contextmanager
def _drawing(model: nn.Module) -> Iterator[None]:
    """Low-rank tensors in train mode, so that they draw, and everything else in eval mode."""
    modes = {module: module.training for module in model.modules()}
    try:
        for module in modes:
            module.training = isinstance(module, LowRankTensor)
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
