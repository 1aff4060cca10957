# SPDX-License-Identifier: Apache-2.0
"""What layers gave for inputs that they have had before, for a search in which one layer changes at a time."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rankfall._losses import Batches
from rankfall._tensor import LowRankTensor
from rankfall.nn import GRU, LSTM, Conv1d, Conv2d, Conv3d, Embedding, EmbeddingBag, Linear, MultiheadAttention

# In eval mode, functions of their inputs and parameters and of nothing else.
_LAYERS = (Linear, Embedding, EmbeddingBag, Conv1d, Conv2d, Conv3d, LSTM, GRU, MultiheadAttention)
_MOST_BYTES = 2**28  # Inputs and outputs, of the first batches first: these are asked most often.


@dataclass(frozen=True)
class _Entry:
    arguments: tuple[Any, ...]
    output: Any

    @property
    def bytes(self) -> int:
        return _bytes((self.arguments, self.output))


class Memo:
    """Outputs of a model's low-rank layers by the batch, so that a change of one layer costs what follows from it.

    A layer whose input is to the bit what it was gives what it gave. Inputs are compared, not traced, so any forward
    will do. Only what `filling` sees is kept, and only as much as fits.

    Args:
        model: In eval mode whenever it is run.
        most: Bytes to keep at most.
    """

    def __init__(self, model: nn.Module, most: int = _MOST_BYTES) -> None:
        # A compiled model would be compiled again for every layer that is looked after.
        compiled = any("_orig_mod" in m._modules or m._compiled_call_impl is not None for m in model.modules())
        self._layers = [] if compiled else [module for module in model.modules() if type(module) in _LAYERS]
        self._free = most
        self._entries: dict[tuple[nn.Module, int, int], _Entry] = {}
        self._changing: set[nn.Module] = set()
        self._filling = False
        self._batch, self._calls = -1, Counter[nn.Module]()

    def over(self, batches: Batches) -> Batches:
        """The same batches, each of which says that it is the one."""
        return [partial(self._run, index, batch) for index, batch in enumerate(batches)]

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Layers remember and repeat inside; outside nothing is left of it."""
        own = {layer: vars(layer).get("forward") for layer in self._layers}  # As Accelerate gives to a whole model.
        for layer in self._layers:
            layer.forward = partial(self._forward, layer, layer.forward)
        try:
            yield
        finally:
            for layer, forward in own.items():
                del layer.forward
                if forward is not None:
                    layer.forward = forward
            for slot in list(self._entries):
                self._drop(slot)

    @contextmanager
    def filling(self) -> Iterator[None]:
        """What is run inside is kept: the state of the model from which others are tried."""
        self._filling = True
        try:
            yield
        finally:
            self._filling = False

    @contextmanager
    def changing(self, tensor: LowRankTensor) -> Iterator[None]:
        """Inside, layers that a tensor is a weight of are run; what they gave before holds again after it."""
        self._changing = {layer for layer in self._layers if tensor in layer.modules()}
        try:
            yield
        finally:
            self._changing = set()

    def forget(self, tensor: LowRankTensor) -> None:
        """Layers that a tensor is a weight of give something else from now on."""
        for slot in [slot for slot in self._entries if tensor in slot[0].modules()]:
            self._drop(slot)

    def _run(self, index: int, batch: Callable[[], Tensor]) -> Tensor:
        self._batch = index
        self._calls.clear()
        return batch()

    def _forward(self, layer: nn.Module, forward: Callable[..., Any], *arguments: Any, **options: Any) -> Any:  # noqa: ANN401  what the layer takes and gives
        slot = layer, self._batch, self._calls[layer]
        self._calls[layer] += 1
        if layer in self._changing:
            return forward(*arguments, **options)
        entry = self._entries.get(slot)
        given = (*arguments, *sorted(options.items()))
        if entry is not None and _same(entry.arguments, given):
            return _copy(entry.output)
        kept = _copy(given) if self._filling else ()  # Before the call, which may write into its input.
        output = forward(*arguments, **options)
        if self._filling:
            self._keep(slot, _Entry(kept, _copy(output)))
        return output

    def _keep(self, slot: tuple[nn.Module, int, int], entry: _Entry) -> None:
        if slot in self._entries:
            self._drop(slot)
        if entry.bytes <= self._free:
            self._entries[slot] = entry
            self._free -= entry.bytes

    def _drop(self, slot: tuple[nn.Module, int, int]) -> None:
        self._free += self._entries.pop(slot).bytes


def _same(one: Any, other: Any) -> bool:  # noqa: ANN401  anything that a layer takes
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        alike = (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)
        return alike and torch.equal(one, other)
    if isinstance(one, tuple | list):
        return type(one) is type(other) and len(one) == len(other) and all(map(_same, one, other))
    return type(one) is type(other) and one == other


def _copy(value: Any) -> Any:  # noqa: ANN401  anything that a layer takes or gives
    """With tensors of its own: what comes after a layer may write into what it gave."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, tuple | list):
        copies = map(_copy, value)
        return type(value)._make(copies) if hasattr(value, "_make") else type(value)(copies)  # pyright: ignore
    return value


def _bytes(value: Any) -> int:  # noqa: ANN401  anything that a layer takes or gives
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(map(_bytes, value)) if isinstance(value, tuple | list) else 0
