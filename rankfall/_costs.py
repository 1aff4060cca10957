# SPDX-License-Identifier: Apache-2.0
"""What a tensorized model will cost, counted before it is trained."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from rankfall._conversions import conversion_of
from rankfall._einsum import shapes_of
from rankfall._formats import Format
from rankfall._matmul import way_of_rows
from rankfall._summary import Summary, summary
from rankfall._tensorize import tensorize_
from rankfall.nn import Linear
from rankfall.nn._planned import Expected, Planned

_COPIES, _BYTES = 4, 4  # Adam keeps a parameter, its gradient and two moments, four bytes each in float32.
_TIMES_WIDTH = 30  # Columns of what a layer and the dense one take.

Example: TypeAlias = tuple[Any, ...]


@dataclass(frozen=True)
class LayerCosts:
    """One layer's forward pass.

    Attributes:
        path: Path of the layer.
        flops: Multiplications and additions of one batch, as they are planned.
        dense_flops: The same by the dense layer.
        way: How it is done, for linear layers, embeddings and convolutions: what their planners choose at these ranks.
        seconds: What the planner expects its forward pass to take on this computer; None without a way.
        dense_seconds: The same of the dense layer.
    """

    path: str
    flops: int
    dense_flops: int
    way: str | None = None
    seconds: float | None = None
    dense_seconds: float | None = None


@dataclass(frozen=True)
class Costs:
    """A whole model's costs; printed, it is text for a terminal.

    Attributes:
        batch: What was counted, for a heading.
        layers: One entry per layer that was counted.
        complete: Whether every low-rank layer was counted.
        training_bytes: Parameters, gradients and Adam's moments in float32; activations are not counted.
        dense_training_bytes: The same for the dense model.
        counts: The parameters.
    """

    batch: str
    layers: tuple[LayerCosts, ...]
    complete: bool
    training_bytes: int
    dense_training_bytes: int
    counts: Summary

    def __str__(self) -> str:
        lines = [str(self.counts)]
        if self.layers:
            lines += [
                "",
                f"forward pass of {self.batch}, in millions of operations, and the time expected:",
                *self._table(),
            ]
        if not self.complete:
            lines += [
                "",
                "Layers other than linear ones need an example to be counted: let the function return (model, inputs), "
                "with the inputs of one batch.",
            ]
        lines += [
            "",
            f"memory of parameters, gradients and Adam's moments: {_megabytes(self.training_bytes)} at the start, "
            f"dense {_megabytes(self.dense_training_bytes)}. Training lowers the ranks, and all of this with them.",
        ]
        return "\n".join(lines)

    def _table(self) -> list[str]:
        names = [layer.path or "(root)" for layer in self.layers]
        width = max(map(len, names))
        return [f"  {name:<{width}}  {_line(layer)}" for name, layer in zip(names, self.layers, strict=True)]


def _line(layer: LayerCosts) -> str:
    counted = f"{layer.flops / 1e6:>10,.1f}  dense {layer.dense_flops / 1e6:>10,.1f}"
    if layer.way is None:
        return counted
    times = ""
    if layer.seconds is not None and layer.dense_seconds is not None:
        times = f"{1e3 * layer.seconds:>8,.2f} ms  dense {1e3 * layer.dense_seconds:>8,.2f} ms"
    return f"{counted}  {times:<{_TIMES_WIDTH}}  {layer.way}"


def costs(model: nn.Module, format: Format, *, batch_size: int = 128, example: Example | None = None) -> Costs:
    """Tensorizes a copy of a model and counts parameters, floating-point operations and training memory of both.

    Example:
        >>> counted = costs(nn.Sequential(nn.Linear(784, 512)), rf.TT(8), batch_size=128)
        >>> counted.layers[0].flops < counted.layers[0].dense_flops
        True

    Args:
        model: A dense model.
        format: How its weights would be held.
        batch_size: Rows that a linear layer is counted for, if there is no example.
        example: The positional inputs of one batch; the model is run on it, in eval mode, and all layers are counted.

    Raises:
        ValueError: If `batch_size` is not positive, the model has no layer to tensorize, or it cannot run the example.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be 1 row or more, got {batch_size}.")
    dense = copy.deepcopy(model).eval()
    paths = [path for path, module in dense.named_modules() if conversion_of(module)]
    compact = tensorize_(copy.deepcopy(dense), format)
    count = partial(_planned, batch_size=batch_size) if example is None else partial(_counted, example=example)
    before, after = count(dense), count(compact)
    ways = _ways(compact, batch_size if example is None else None)
    layers = tuple(
        _layer_costs(path, after[path], before[path], ways.get(path))
        for path in paths
        if path in after and path in before
    )
    counts, size = summary(compact), _COPIES * _BYTES
    return Costs(
        f"{batch_size} rows by linear layers" if example is None else "the example",
        layers,
        example is not None or len(layers) == len(paths),
        counts.trained_parameters * size,
        counts.dense_parameters * size,
        counts,
    )


def _planned(model: nn.Module, batch_size: int) -> dict[str, int]:
    """Operations of linear layers by their path, for so many rows."""
    found = {}
    for path, layer in model.named_modules():
        if isinstance(layer, Linear):
            found[path] = way_of_rows(layer.weight.layout, shapes_of(layer.weight.factors), batch_size).flops
        elif type(layer) is nn.Linear:
            found[path] = 2 * batch_size * layer.in_features * layer.out_features
    return found


def _layer_costs(path: str, flops: int, dense_flops: int, chosen: Expected | None) -> LayerCosts:
    if chosen is None:
        return LayerCosts(path, flops, dense_flops)
    return LayerCosts(path, flops, dense_flops, chosen.way, chosen.seconds, chosen.dense_seconds)


def _ways(model: nn.Module, rows: int | None) -> dict[str, Expected]:
    """What layers choose: linear ones for so many rows, or all for what they were given last."""
    found = {}
    for path, layer in model.named_modules():
        if rows is not None and isinstance(layer, Linear):
            found[path] = layer.expected(rows)
        elif rows is None and isinstance(layer, Planned) and layer.seen:
            found[path] = layer.expected(*layer.seen)
    return found


def _counted(model: nn.Module, example: Example) -> Mapping[str, int]:
    """Operations of all modules by their path, in one pass over the example."""
    counter = FlopCounterMode(display=False)
    try:
        with torch.no_grad(), _by_plain_kernels(), counter:
            model(*example)
    except Exception as error:
        raise ValueError(
            f"{type(model).__name__} cannot run the example: {type(error).__name__}: {error}. "
            "Return the positional inputs of one batch beside the model."
        ) from error
    by_name = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    root = type(model).__name__
    return {path: by_name.get(f"{root}.{path}" if path else root, 0) for path, _ in model.named_modules()}


@contextmanager
def _by_plain_kernels() -> Iterator[None]:
    """Fused recurrent and attention kernels hide their products from the counter, so they are taken apart."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        as_it_is: Any = None
        with torch.backends.mkldnn.flags(False, as_it_is, as_it_is, as_it_is), sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
