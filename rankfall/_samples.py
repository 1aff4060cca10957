# SPDX-License-Identifier: Apache-2.0
"""The same training examples again: what ranks are tested with, and statistics at the posterior mean."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from rankfall._losses import Batches
from rankfall._processes import Processes
from rankfall._shards import NO_BATCH, Shard
from rankfall._sharing import share_buffers_
from rankfall._statistics import evaluating, learns_under_draws, measuring, normalised_layers

if TYPE_CHECKING:
    from accelerate import Accelerator

Batch: TypeAlias = Any

_NORMALISED_BY = 4096  # Examples that statistics of batch normalisation at the posterior mean are averages over.


def normalise_(model: nn.Module, sample: Callable[[int], object], processes: Processes) -> None:
    """Statistics of batch normalisation as they are at the posterior mean, and those of the first process on each."""
    if learns_under_draws(model):
        # Layers that are in eval mode while the model trains are frozen, and keep their statistics.
        learning = [layer for layer in normalised_layers(model) if layer.training]
        with evaluating(model), measuring(learning):
            sample(_NORMALISED_BY)
    share_buffers_(model, processes)


def take_sample(
    model: nn.Module,
    batches: Shard,
    nll: Callable[[nn.Module, Batch], Tensor],
    accelerator: "Accelerator",
    processes: Processes,
    examples: int,
) -> Batches:
    """The NLL of each of so many examples by the batch, always the same ones: the first of a new pass over the data.

    Each process computes that of its own batches, and all get what the others have found. A loader that knows where it
    is stays there.
    """

    def of(batch: Batch) -> Tensor:
        if batch is NO_BATCH:
            return processes.gather(torch.zeros(0, device=accelerator.device))
        with accelerator.autocast():
            return processes.gather(nll(model, batch))

    found, count = [], 0
    with torch.no_grad(), batches.aside():
        for batch in batches:
            found.append(partial(of, to_device(batch, accelerator.device)))
            count += len(found[-1]())
            if count >= examples:
                break
    return found


def to_device(batch: Batch, device: torch.device) -> Batch:
    """A batch with all its tensors, however deep in mappings and sequences, on a device."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if callable(move := getattr(batch, "to", None)):  # A PackedSequence, or what a tokenizer gives.
        return move(device)
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(value, device) for value in batch))
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, Sequence) and not isinstance(batch, str):
        return [to_device(value, device) for value in batch]
    return batch
