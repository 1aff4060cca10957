# SPDX-License-Identifier: Apache-2.0
"""Statistics of batch normalisation that belong to the weights in use."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rankfall._walk import low_rank_tensors


@torch.no_grad()
def refit_batch_norm_(model: nn.Module, batches: Iterable[Any]) -> None:
    """Gives batch normalisation the statistics that activations have at the posterior mean, in place.

    What it gathers in training are those under draws of the factors, whose noise adds to the variance: a network at its
    mean is then scaled down at every such layer. `rf.fit` does this after each epoch; call it after a loop of your own,
    once the last step is made. Averages over some thousand examples do, as in stochastic weight averaging (Izmailov et
    al., arXiv 1803.05407, section 3.2). A model without batch normalisation stays as it is.

    Example:
        >>> model = nn.Sequential(rf.nn.Linear(12, 20, format=rf.TTM(4)), nn.BatchNorm1d(20))
        >>> x = torch.randn(64, 12)
        >>> rf.refit_batch_norm_(model, [x[:32], x[32:]])
        >>> y = model.eval()(x)
        >>> torch.allclose(y.mean(0), torch.zeros(20), atol=1e-4), torch.allclose(y.std(0), torch.ones(20), atol=0.2)
        (True, True)

    Args:
        model: Any module; the modes that it is in are left as they are.
        batches: Inputs of training, model(batch), of a few dozen examples or more each.

    Raises:
        ValueError: If there is no batch.
    """
    seen = False
    with evaluating(model), measuring(normalised_layers(model)):
        for batch in batches:
            seen = True
            model(batch)
        if not seen:
            raise ValueError("batches is empty, so there is nothing to take statistics from. Pass a list of inputs.")


def normalised_layers(model: nn.Module) -> list[_BatchNorm]:
    """The layers of batch normalisation that keep statistics."""
    return [module for module in model.modules() if isinstance(module, _BatchNorm) and module.running_mean is not None]


def learns_under_draws(model: nn.Module) -> bool:
    """Whether statistics of training are those of drawn factors, and others at the posterior mean."""
    return any(len(tensor.log_stds) for _, tensor in low_rank_tensors(model)) and bool(normalised_layers(model))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, and afterwards every module in the mode that it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def measuring(layers: list[_BatchNorm]) -> Iterator[None]:
    """Inside, layers normalise by each batch; afterwards their statistics are the average of those of the batches.

    After an error they are what they were.
    """
    settings = [(layer.momentum, layer.training) for layer in layers]
    before = _statistics_of(layers)
    try:
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum, layer.training = None, True
        yield
    except BaseException:
        _restore_(before)
        raise
    finally:
        for layer, (momentum, training) in zip(layers, settings, strict=True):
            layer.momentum, layer.training = momentum, training


@contextmanager
def keeping(layers: list[_BatchNorm]) -> Iterator[None]:
    """Whatever happens to statistics inside is undone."""
    before = _statistics_of(layers)
    try:
        yield
    finally:
        _restore_(before)


def _statistics_of(layers: list[_BatchNorm]) -> list[tuple[Tensor, Tensor]]:
    """Every buffer of layers, with a copy of its values."""
    return [(buffer, buffer.clone()) for layer in layers for buffer in layer.buffers()]


@torch.no_grad()
def _restore_(kept: list[tuple[Tensor, Tensor]]) -> None:
    for buffer, values in kept:
        buffer.copy_(values)
