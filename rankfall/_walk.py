# SPDX-License-Identifier: Apache-2.0
"""Finds the low-rank tensors of a model, and what their layers are called."""

from collections.abc import Iterator

import torch
from torch import nn

from rankfall._tensor import LowRankTensor


def low_rank_tensors(model: nn.Module) -> Iterator[tuple[str, LowRankTensor]]:
    """Every low-rank tensor of a model with its path; a tensor that two layers share is given once."""
    for path, module in model.named_modules():
        if isinstance(module, LowRankTensor):
            yield path, module


def layer_path(path: str) -> str:
    """The path of the layer that a low-rank tensor at `path` is the weight of."""
    parent, _, name = path.rpartition(".")
    return parent if name == "weight" else path


def finite_tensors(model: nn.Module, verb: str) -> list[tuple[str, LowRankTensor]]:
    """Every low-rank tensor of a model with its path, for something that only finite factors can bear.

    Raises:
        ValueError: If there is none, or a factor is NaN or infinite.
    """
    tensors = list(low_rank_tensors(model))
    if not tensors:
        raise ValueError(
            f"{type(model).__name__} has no low-rank tensor to {verb}. Call rf.tensorize_(model, rf.TTM(20)) first."
        )
    for path, tensor in tensors:
        if not all(bool(torch.isfinite(p).all()) for p in tensor.parameters()):
            raise ValueError(f"{layer_path(path)!r} has factors that are NaN or infinite. Go back to a checkpoint.")
    return tensors
