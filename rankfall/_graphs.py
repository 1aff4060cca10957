# SPDX-License-Identifier: Apache-2.0
"""Passes of a training step as CUDA graphs: the GPU repeats what it was given, and the host gives it one call."""

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from rankfall._samples import Batch, to_device

Pass: TypeAlias = Callable[[Batch], tuple[Tensor, ...]]

_BY_HAND = 3  # Passes of a shape before it is captured: what is made once, such as a compiled kernel, is made in them.
_MOST = 16  # Shapes that are captured; each holds what its passes need.


class Replayed:
    """A forward and backward pass that is captured for each shape of batch, and replayed from then on.

    Small layers leave a GPU waiting for the host, which takes ten microseconds and more for every operation. Holds as
    long as parameters keep their shapes, and what the pass reads from the host stays as it is: make another one once
    they do not.

    Args:
        run: Computes on a batch that is on the device, and leaves gradients on the parameters. It must not look at
            what a tensor holds.
        parameters: Those that gradients are wanted of.
        device: A GPU.
    """

    def __init__(self, run: Pass, parameters: Sequence[Tensor], device: torch.device) -> None:
        self._run, self._parameters, self._device = run, parameters, device
        self._seen: Counter[Hashable] = Counter()
        self._graphs: dict[Hashable, _Graph] = {}
        self._stream, self._pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()

    def __call__(self, batch: Batch) -> tuple[Tensor, ...]:
        """What `run` returns, on the current stream; of a replayed pass it holds until the next one.

        Raises:
            ValueError: If a pass cannot be captured.
        """
        kind = _kind(batch)
        graph = self._graphs.get(kind)
        if graph is None:
            self._seen[kind] += 1
            if self._seen[kind] <= _BY_HAND or len(self._graphs) == _MOST:
                return self._by_hand(batch)
            graph = self._graphs[kind] = self._captured(batch)
        return graph.replay(batch)

    def _by_hand(self, batch: Batch) -> tuple[Tensor, ...]:
        # On the stream of the capture, since gradients are added up on the one that they were first made on.
        now = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(now)
        with torch.cuda.stream(self._stream):
            found = self._run(to_device(batch, self._device))
        now.wait_stream(self._stream)
        return found

    def _captured(self, batch: Batch) -> "_Graph":
        graph, kept = torch.cuda.CUDAGraph(), to_device(batch, self._device)
        for parameter in self._parameters:
            parameter.grad = None
        try:
            # Threads that load data may do as they like meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                found = self._run(kept)
        except RuntimeError as error:
            raise ValueError(
                f"a step cannot be repeated as a CUDA graph: {str(error).splitlines()[0]}. The model must not look at "
                "what a tensor holds, nor make one from numbers of the host. Pass cuda_graphs=False."
            ) from error
        gradients = [(parameter, parameter.grad) for parameter in self._parameters]
        return _Graph(graph, list(_tensors(kept)), found, gradients)


class _Graph:
    def __init__(
        self,
        graph: "torch.cuda.CUDAGraph",
        inputs: Sequence[Tensor],
        found: tuple[Tensor, ...],
        gradients: Sequence[tuple[Tensor, Tensor | None]],
    ) -> None:
        self._graph, self._inputs, self._found, self._gradients = graph, inputs, found, gradients

    def replay(self, batch: Batch) -> tuple[Tensor, ...]:
        for kept, given in zip(self._inputs, _tensors(batch), strict=True):
            kept.copy_(given, non_blocking=True)
        self._graph.replay()
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        return self._found


def _tensors(batch: Batch) -> Iterator[Tensor]:
    """All tensors of a batch, however deep, in an order of their own."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from _tensors(value)
    elif isinstance(batch, Sequence) and not isinstance(batch, str):
        for value in batch:
            yield from _tensors(value)


def _kind(batch: Batch) -> Hashable:
    """What batches of one graph share: all but the numbers in their tensors."""
    if isinstance(batch, Tensor):
        return batch.shape, batch.dtype
    if isinstance(batch, Mapping):
        return tuple((key, _kind(value)) for key, value in batch.items())
    if isinstance(batch, Sequence) and not isinstance(batch, str):
        return tuple(map(_kind, batch))
    return batch if isinstance(batch, Hashable) else object()
