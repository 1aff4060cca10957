# SPDX-License-Identifier: Apache-2.0
"""What a tensorized model will cost, counted before it is trained."""

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from rankfall._conversions import conversion_of
from rankfall._convolve import conv_plan
from rankfall._einsum import BATCH, Plan, Shapes, cost_of, rounded, shapes_of
from rankfall._formats import Format
from rankfall._lookup import reading, readings
from rankfall._machine import machine
from rankfall._matmul import Way, linear_plan, linear_way, linear_ways
from rankfall._summary import Summary, summary
from rankfall._tensorize import tensorize_
from rankfall.nn import Conv1d, Conv2d, Conv3d, Embedding, EmbeddingBag, Linear

_COPIES, _BYTES = 4, 4  # Adam keeps a parameter, its gradient and two moments, four bytes each in float32.
_TIMES_WIDTH = 30  # Columns of what a layer and the dense one take.

Example: TypeAlias = tuple[Any, ...]
_Conv: TypeAlias = Conv1d | Conv2d | Conv3d
_Planned: TypeAlias = Linear | Embedding | EmbeddingBag | _Conv


@dataclass(frozen=True)
class LayerCosts:
    """One layer's forward pass.

    Attributes:
        path: Path of the layer.
        flops: Multiplications and additions of one batch, as they are planned.
        dense_flops: The same by the dense layer.
        way: How it is done, for linear layers, embeddings and convolutions: what their planners choose at these ranks.
        seconds: What the planner expects its forward pass to take on this computer; None for convolutions, and without
            a way.
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
    ways = _ways_of_rows(compact, batch_size) if example is None else _ways_of_example(compact, example)
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
            found[path] = _linear_way(layer, batch_size).flops
        elif type(layer) is nn.Linear:
            found[path] = 2 * batch_size * layer.in_features * layer.out_features
    return found


# (what is done, its cost and that of the dense layer in operations, None where a planner does not tell)
_Chosen: TypeAlias = tuple[str, int | None, int | None]


def _layer_costs(path: str, flops: int, dense_flops: int, chosen: _Chosen | None) -> LayerCosts:
    if chosen is None:
        return LayerCosts(path, flops, dense_flops)
    way, *both = chosen
    seconds, dense_seconds = (None if cost is None else cost / machine().flops for cost in both)
    return LayerCosts(path, flops, dense_flops, way, seconds, dense_seconds)


def _ways_of_rows(model: nn.Module, rows: int) -> dict[str, _Chosen]:
    return {path: _of_linear(layer, rows) for path, layer in model.named_modules() if isinstance(layer, Linear)}


def _ways_of_example(model: nn.Module, example: Example) -> dict[str, _Chosen]:
    """What linear layers, embeddings and convolutions choose for the inputs that reach them."""
    found: dict[str, _Chosen] = {}

    def look(layer: nn.Module, inputs: Example, named: dict[str, Any], *, path: str) -> None:
        if isinstance(layer, _Planned):
            found[path] = _of_input(layer, *inputs, **named)

    handles = [
        layer.register_forward_pre_hook(partial(look, path=path), with_kwargs=True)
        for path, layer in model.named_modules()
    ]
    try:
        with torch.no_grad():
            model(*example)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _of_input(layer: _Planned, input: Tensor, offsets: Tensor | None = None, *_: object, **__: object) -> _Chosen:
    """What a layer chooses for the arguments of its forward pass."""
    if isinstance(layer, Linear):
        return _of_linear(layer, math.prod(input.shape[:-1]))
    if isinstance(layer, Embedding):
        return _of_table(layer, input.numel(), input.numel())
    if isinstance(layer, EmbeddingBag):
        return _of_table(layer, input.numel(), len(input if offsets is None else offsets))
    return _of_convolution(layer, input.numel() // layer.in_channels)


def _linear_way(layer: Linear, rows: int) -> Way:
    """The way is chosen for a rounded number of rows, as when the layer runs; it is counted for the true number."""
    layout, shapes = layer.weight.layout, shapes_of(layer.weight.factors)
    chosen = linear_way(layout, shapes, rounded(rows))
    if chosen.kind != "steps":
        return next(way for way in linear_ways(layout, shapes, rows) if way.is_like(chosen))
    # The order of steps is planned for a rounded number whatever it is asked for.
    plan = linear_plan(layout, shapes, rows)
    flops, elements = _counted_in_steps(plan, ((rows, *layout.modes[1]), *shapes))
    return replace(chosen, flops=flops, effort=flops, elements=chosen.elements * elements // plan.elements)


def _counted_in_steps(plan: Plan, shapes: Shapes) -> tuple[int, int]:
    """Operations and elements of a plan, carried out on tensors of other sizes than it was made for."""
    pending, flops, elements = list(shapes), 0, 0
    for positions, equation in plan.steps:
        names, kept = equation.replace(BATCH, ".").split("->")
        taken = [dict(zip(axes, pending[k], strict=True)) for axes, k in zip(names.split(","), positions, strict=True)]
        size = {name: n for tensor in taken for name, n in tensor.items()}
        pending = [shape for k, shape in enumerate(pending) if k not in positions] + [tuple(size[n] for n in kept)]
        flops += math.prod(size.values()) * (2 if len(size) > len(kept) else 1) if len(taken) > 1 else 0
        elements += sum(math.prod(tensor.values()) for tensor in taken) + math.prod(pending[-1])
    return flops, elements


def _of_linear(layer: Linear, rows: int) -> _Chosen:
    way, (out, width) = _linear_way(layer, rows), layer.weight.shape
    dense_cost = cost_of(2 * rows * out * width, out * width + rows * (out + width))
    return way.described(layer.weight.layout), way.cost, dense_cost


def _of_table(layer: Embedding | EmbeddingBag, ids: int, outputs: int) -> _Chosen:
    layout, shapes = layer.weight.layout, shapes_of(layer.weight.factors)
    chosen = reading(layout, shapes, rounded(ids), rounded(outputs))
    # As of linear layers: chosen for rounded numbers, counted for the true ones.
    way = next(w for w in readings(layout, shapes, ids, outputs) if replace(w, cost=chosen.cost) == chosen)
    return way.described(), way.cost, cost_of(0, 2 * ids * layout.shape[1])


def _of_convolution(layer: _Conv, points: int) -> _Chosen:
    layout = layer.weight.layout
    # Rounded as `convolve` rounds them. Its planner compares costs, but keeps none.
    points_in = rounded(points)
    points_out = rounded(points_in // math.prod(layer.stride))
    plan = conv_plan(layout, tuple(layer.weight.ranks.items()), layer.groups, points_in, points_out)
    maps = " and ".join(word for word, is_there in (("before", plan.maps_in), ("after", plan.maps_out)) if is_there)
    return f"1 x 1 convolutions {maps} a small one" if maps else "by the formed kernel", None, None


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
