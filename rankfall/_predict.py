# SPDX-License-Identifier: Apache-2.0
"""The posterior predictive: what a model says under draws of its factors."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rankfall._statistics import keeping, measuring, normalised_layers
from rankfall._tensor import LowRankTensor
from rankfall._walk import finite_tensors

# Modes and draws are the model's, so a second thread would take those of the first for its own.
_ONE_AT_A_TIME = threading.RLock()


@torch.no_grad()
def predict(
    model: nn.Module,
    *inputs: Any,  # noqa: ANN401
    samples: int = 32,
    batch_norm_inputs: Sequence[Any] = (),
) -> Float[Tensor, "draws ..."]:
    """The outputs of a model under draws of all its factors from the posterior, stacked.

    Every draw is one set of factors for the whole input. Dropout and normalisation act as in eval mode; the model is
    left in the modes that it was in. Calls from several threads wait for each other. The predictive distribution is the
    mean over draws of the likelihood, so average probabilities and not logits:

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
        batch_norm_inputs: Batches of training inputs, some thousand examples together, on which batch normalisation
            gets the statistics of each draw, as for the draws of Maddox et al., arXiv 1902.02476, section 3. Those that
            the model has are of the posterior mean, and of no draw. It keeps them.

    Raises:
        ValueError: If `samples` is under 1, there is no low-rank tensor, or a factor is not finite.
        TypeError: If the model returns something other than a tensor.
    """
    if samples < 1:
        raise ValueError(f"samples must be 1 or more, got {samples}.")
    tensors = [tensor for _, tensor in finite_tensors(model, "draw from")]
    outputs, layers = [], normalised_layers(model) if batch_norm_inputs else []
    with _ONE_AT_A_TIME, _drawing(model), keeping(layers):
        for _ in range(samples):
            with _held_draw(tensors):
                with measuring(layers):
                    for batch in batch_norm_inputs:
                        model(batch)
                output = model(*inputs)
            if not isinstance(output, Tensor):
                raise TypeError(
                    f"{type(model).__name__} returned a {type(output).__name__}, and only tensors can be stacked. "
                    "Wrap it in a module that returns the tensor of interest."
                )
            outputs.append(output)
    return torch.stack(outputs)


@contextmanager
def _held_draw(tensors: list[LowRankTensor]) -> Iterator[None]:
    """One draw of all factors, for every forward inside."""
    try:
        for tensor in tensors:
            tensor.given[:] = tensor.drawn()
        yield
    finally:
        for tensor in tensors:
            tensor.given.clear()


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
