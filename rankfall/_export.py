# SPDX-License-Identifier: Apache-2.0
"""Plain modules without priors: what a device needs to run the model, and nothing of rankfall."""

import copy
import math
import operator
from typing import Any, TypeAlias, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from rankfall import _contract, _matmul
from rankfall._convolve import conv_plan, small_kernels
from rankfall._einsum import Plan, shapes_of
from rankfall._lookup import lookup_plan
from rankfall._swap import swap_
from rankfall._tensor import LowRankTensor
from rankfall._walk import low_rank_tensors
from rankfall.nn import GRU, LSTM, Conv1d, Conv2d, Conv3d, Embedding, EmbeddingBag, Linear, MultiheadAttention
from rankfall.nn._formed import Formed

_Layer: TypeAlias = Linear | Embedding | EmbeddingBag | Conv1d | Conv2d | Conv3d | LSTM | GRU | MultiheadAttention
_LAYERS = get_args(_Layer)
_POINTS = 256  # Positions of the output of a convolution, taken for its plan: a picture of 16 x 16.
_CONVOLUTIONS = {Conv1d: nn.Conv1d, Conv2d: nn.Conv2d, Conv3d: nn.Conv3d}
_SLIDING = ("stride", "padding", "dilation", "groups", "padding_mode")
_OPTIONS = {
    Linear: ("in_features", "out_features"),
    Embedding: ("num_embeddings", "embedding_dim", "padding_idx"),
    EmbeddingBag: ("num_embeddings", "embedding_dim", "padding_idx", "mode", "include_last_offset"),
} | dict.fromkeys(_CONVOLUTIONS, ("in_channels", "out_channels", "kernel_size", *_SLIDING))


def export(model: nn.Module, dense: bool = False, *, batch_size: int = 1) -> nn.Module:
    """A copy of the model made of plain torch modules, at the posterior mean.

    The copy keeps the factors of linear layers, embeddings, bags and convolutions and their contraction (a
    torch.fx.GraphModule of einsums per layer), or has formed weights. A convolution that is cheaper as a sequence of
    small ones (1 x 1, k x k, 1 x 1) becomes an nn.Sequential of them. All have the options of torch's layer, such as
    in_features or padding_idx, as attributes. Recurrent and attention layers always become torch's own with formed
    weights. `torch.save(export(model), path)` gives a file that loads where rankfall is not installed.

    Example:
        >>> model = nn.Sequential(rf.nn.Linear(12, 20, format=rf.TTM(4)), nn.ReLU()).eval()
        >>> x = torch.randn(3, 12)
        >>> torch.allclose(rf.export(model)(x), model(x), atol=1e-6), rf.export(model, dense=True)[0]
        (True, Linear(in_features=12, out_features=20, bias=True))

    Args:
        model: A model with low-rank layers; it stays as it is.
        dense: True forms all weights: nn.Linear again, for runtimes that want nothing else.
        batch_size: The number of rows for which the order of contractions is chosen, if the factors are kept.

    Raises:
        ValueError: If a low-rank tensor stands alone in the model, outside a rankfall layer.
    """
    layers = {path: module for path, module in model.named_modules() if isinstance(module, _LAYERS)}
    inside = {id(t) for layer in layers.values() for t in layer.modules() if isinstance(t, LowRankTensor)}
    for path, tensor in low_rank_tensors(model):
        if id(tensor) not in inside:
            raise ValueError(
                f"{path or 'the model'!r} is an rf.LowRankTensor outside a rankfall layer, so its use cannot be "
                "exported. Export its .dense() as a parameter of your own module."
            )
    copied = copy.deepcopy(model)
    shared: dict[int, list[nn.Parameter]] = {}
    replacements: dict[int, nn.Module] = {}
    for path in layers:
        layer = copied.get_submodule(path)
        replacements[id(layer)] = _plain(cast(_Layer, layer), dense, batch_size, shared).train(layer.training)
    for module in copied.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            # Its fused kernel reads the `weight` of its linear layers, which a chain of factors does not have.
            module.activation_relu_or_gelu = 0 if not dense else module.activation_relu_or_gelu
    return swap_(copied, replacements)


def _plain(layer: _Layer, dense: bool, batch_size: int, shared: dict[int, list[nn.Parameter]]) -> nn.Module:
    if isinstance(layer, Formed):
        return _formed(layer)
    if isinstance(layer, Linear | Embedding | EmbeddingBag) and not dense:
        make: Any = {Linear: _factored_linear, Embedding: _factored_embedding, EmbeddingBag: _factored_bag}[type(layer)]
        return _with_options(make(layer, _shared_factors(layer.weight, shared), batch_size), layer)
    if isinstance(layer, Conv1d | Conv2d | Conv3d) and not dense:
        return _with_options(_factored_convolution(layer, shared, batch_size), layer)
    if id(layer.weight) not in shared:
        shared[id(layer.weight)] = [_parameter(layer.weight.dense(), layer.weight)]
    weight = shared[id(layer.weight)][0]
    if isinstance(layer, Linear):
        return _dense_linear(layer, weight)
    if isinstance(layer, Embedding | EmbeddingBag):
        return _dense_table(layer, weight)
    return _dense_convolution(layer, weight)


def _with_options(plain: nn.Module, layer: nn.Module) -> nn.Module:
    """With what the forward of a model may read of torch's layer."""
    options = {name: getattr(layer, name) for name in _OPTIONS[type(layer)]}
    for name, value in options.items():
        setattr(plain, name, value)
    if isinstance(plain, fx.GraphModule):
        plain.meta["_user_preserved_attributes"] = options  # A deep copy of it has no others.
    return plain


def _shared_factors(weight: LowRankTensor, shared: dict[int, list[nn.Parameter]]) -> list[nn.Parameter]:
    return shared.setdefault(id(weight), [_parameter(f, weight) for f in weight.factors])


def _parameter(value: Tensor, of: LowRankTensor) -> nn.Parameter:
    return nn.Parameter(value.detach().clone(), requires_grad=of.factors[0].requires_grad)


def _formed(layer: Formed) -> nn.Module:
    plain = copy.deepcopy(layer.like)
    for name, _ in list(plain.named_parameters()):
        path, _, leaf = name.rpartition(".")
        tensor = layer.get_submodule(name) if name in layer.weight_names else None
        value = _parameter(tensor.dense(), tensor) if isinstance(tensor, LowRankTensor) else layer.get_parameter(name)
        setattr(plain.get_submodule(path), leaf, value)
    return plain


def _factored_convolution(
    layer: Conv1d | Conv2d | Conv3d, shared: dict[int, list[nn.Parameter]], batch_size: int
) -> nn.Module:
    layout, factors = layer.weight.layout, list(layer.weight.factors)
    ranks = tuple(layout.ranks(shapes_of(factors)).items())
    points = batch_size * _POINTS
    plan = conv_plan(layout, ranks, layer.groups, points, points // math.prod(layer.stride))
    small = small_kernels(layout, factors, (plan.maps_in, plan.maps_out))
    held = sum(value.numel() for value in (small.before, small.kernel, small.after) if value is not None)
    # Factors of a chain that are joined to small kernels may hold more than the chain, or even the whole.
    if plan.forms_weight or held > math.prod(layout.shape):
        return _forming_convolution(layer, _shared_factors(layer.weight, shared))
    make: Any = _CONVOLUTIONS[type(layer)]
    dims, steps = len(layer.stride), []
    slides = _options_of(layer) | {"groups": small.groups}
    for value, options in ((small.before, {}), (small.kernel, slides), (small.after, {})):
        if value is None:
            continue
        weight = value.reshape(*value.shape, *[1] * (dims + 2 - value.dim()))
        inside = weight.shape[1] * options.get("groups", 1)
        step = make(inside, weight.shape[0], tuple(weight.shape[2:]), bias=False, device="meta", **options)
        step.weight = _parameter(weight, layer.weight)
        steps.append(step)
    steps[-1].bias = layer.bias
    return nn.Sequential(*steps)


def _options_of(layer: Conv1d | Conv2d | Conv3d) -> dict[str, Any]:
    return {name: getattr(layer, name) for name in _SLIDING}


def _forming_convolution(layer: Conv1d | Conv2d | Conv3d, factors: list[nn.Parameter]) -> fx.GraphModule:
    """The einsums that form the kernel, and torch's convolution with it, written down as a graph of torch calls."""
    layout, geometry = layer.weight.layout, layer.geometry
    root, graph = nn.Module(), fx.Graph()
    x = graph.placeholder("x")
    pending = []
    for k, factor in enumerate(factors):
        root.register_parameter(f"factor_{k}", factor)
        pending.append(graph.get_attr(f"factor_{k}"))
    kernel = _einsums(graph, pending, _contract.dense_plan(layout, shapes_of(factors)))
    kernel = graph.call_method("reshape", (kernel, layout.padded_shape))
    for axis, (size, padded) in enumerate(zip(layout.shape, layout.padded_shape, strict=True)):
        kernel = graph.call_method("narrow", (kernel, axis, 0, size)) if padded > size else kernel
    padding: Any = tuple(before for before, _ in geometry.padding)
    if geometry.padding_mode != "zeros" or any(before != after for before, after in geometry.padding):
        sides = [n for pair in reversed(geometry.padding) for n in pair]
        mode = "constant" if geometry.padding_mode == "zeros" else geometry.padding_mode
        x, padding = graph.call_function(F.pad, (x, sides, mode)), 0
    root.register_parameter("bias", layer.bias)
    bias = None if layer.bias is None else graph.get_attr("bias")
    slide = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}[_CONVOLUTIONS[type(layer)]]
    options = (geometry.stride, padding, geometry.dilation, geometry.groups)
    graph.output(graph.call_function(slide, (x, kernel, bias, *options)))
    return fx.GraphModule(root, graph, class_name="FactoredConvolution")


def _dense_convolution(layer: Conv1d | Conv2d | Conv3d, weight: nn.Parameter) -> nn.Module:
    make: Any = _CONVOLUTIONS[type(layer)]
    plain = make(
        layer.in_channels,
        layer.out_channels,
        layer.kernel_size,
        bias=layer.bias is not None,
        device="meta",
        **_options_of(layer),
    )
    plain.weight, plain.bias = weight, layer.bias
    return plain


def _dense_table(layer: Embedding | EmbeddingBag, weight: nn.Parameter) -> nn.Module:
    if isinstance(layer, EmbeddingBag):
        bag = nn.EmbeddingBag(
            layer.num_embeddings,
            layer.embedding_dim,
            mode=layer.mode,
            padding_idx=layer.padding_idx,
            include_last_offset=layer.include_last_offset,
            device="meta",
        )
        bag.weight = weight
        return bag
    if layer.padding_idx is not None:
        # The row of padding is its own, which a tied output layer has no part in.
        weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
        weight.data[layer.padding_idx] = 0.0 if layer.padding_row is None else layer.padding_row
    plain = nn.Embedding(*layer.weight.shape, padding_idx=layer.padding_idx, device="meta")
    plain.weight = weight
    return plain


def _dense_linear(layer: Linear, weight: nn.Parameter) -> nn.Linear:
    plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    plain.weight = weight
    plain.register_parameter("bias", layer.bias)
    return plain


def _factored_linear(layer: Linear, factors: list[nn.Parameter], batch_size: int) -> fx.GraphModule:
    """The einsums of `linear_plan` written down as a graph of torch calls."""
    layout = layer.weight.layout
    (out_modes, in_modes), (padded_out, padded_in) = layout.modes, layout.padded_shape
    root, graph = nn.Module(), fx.Graph()
    x = graph.placeholder("x")
    if padded_in > layer.in_features:
        x = graph.call_function(F.pad, (x, (0, padded_in - layer.in_features)))
    pending = [graph.call_method("unflatten", (x, -1, in_modes))]
    for k, factor in enumerate(factors):
        root.register_parameter(f"factor_{k}", factor)
        pending.append(graph.get_attr(f"factor_{k}"))
    y = _einsums(graph, pending, _matmul.linear_plan(layout, shapes_of(factors), batch_size))
    y = graph.call_method("flatten", (y, -len(out_modes)))
    rows = layer.weight.rows  # Of a tied table some may be gone.
    if padded_out > rows:
        y = graph.call_method("narrow", (y, -1, 0, rows))
    if rows < layer.out_features:
        y = graph.call_function(F.pad, (y, (0, layer.out_features - rows)))
    root.register_parameter("bias", layer.bias)
    if layer.bias is not None:
        y = graph.call_function(operator.add, (y, graph.get_attr("bias")))
    graph.output(y)
    return fx.GraphModule(root, graph, class_name="FactoredLinear")


def _factored_embedding(layer: Embedding, factors: list[nn.Parameter], batch_size: int) -> fx.GraphModule:
    """The reads and einsums of `lookup_plan` written down as a graph of torch calls."""
    root, graph = nn.Module(), fx.Graph()
    ids = graph.placeholder("ids")
    flat = graph.call_method("reshape", (ids, -1))
    rows = _read_rows(root, graph, flat, layer.weight, factors, batch_size)
    if layer.padding_idx is not None:
        words = graph.call_method("unsqueeze", (graph.call_function(operator.ne, (flat, layer.padding_idx)), 1))
        rows = graph.call_function(operator.mul, (rows, words))
        if layer.padding_row is not None:
            root.register_buffer("padding_row", layer.padding_row)
            rows = graph.call_function(torch.where, (words, rows, graph.get_attr("padding_row")))
    shape = graph.call_function(operator.add, (graph.call_method("size", (ids,)), (layer.embedding_dim,)))
    graph.output(graph.call_method("reshape", (rows, shape)))
    return fx.GraphModule(root, graph, class_name="FactoredEmbedding")


def _factored_bag(layer: EmbeddingBag, factors: list[nn.Parameter], batch_size: int) -> fx.GraphModule:
    """The rows of all ids, and torch's reduction of them: bags of places, of which 0 is padding."""
    root, graph = nn.Module(), fx.Graph()
    ids = graph.placeholder("input")
    offsets, weights = (graph.placeholder(name, default_value=None) for name in ("offsets", "per_sample_weights"))
    flat = graph.call_method("reshape", (ids, -1))
    rows = _read_rows(root, graph, flat, layer.weight, factors, batch_size)
    table = graph.call_function(F.pad, (rows, (0, 0, 1, 0)))
    places = graph.call_method("cumsum", (graph.call_function(torch.ones_like, (flat,)), 0))
    if layer.padding_idx is not None:
        places = graph.call_function(
            operator.mul, (places, graph.call_function(operator.ne, (flat, layer.padding_idx)))
        )
    places = graph.call_method("view_as", (graph.call_method("type_as", (places, ids)), ids))
    options = {
        "offsets": offsets,
        "mode": layer.mode,
        "per_sample_weights": weights,
        "include_last_offset": layer.include_last_offset,
        "padding_idx": None if layer.padding_idx is None else 0,
    }
    graph.output(graph.call_function(F.embedding_bag, (places, table), options))
    return fx.GraphModule(root, graph, class_name="FactoredEmbeddingBag")


def _read_rows(
    root: nn.Module,
    graph: fx.Graph,
    flat: fx.Node,
    weight: LowRankTensor,
    factors: list[nn.Parameter],
    batch_size: int,
) -> fx.Node:
    """Rows of a table in factors by their ids, shape (n, width); registers the factors."""
    layout, digit = weight.layout, {}
    rest = flat if weight.rows == weight.shape[0] else graph.call_method("clamp", (flat,), {"max": weight.rows - 1})
    for name, mode in zip(reversed(layout.axes[0]), reversed(layout.modes[0]), strict=True):
        digit[name] = graph.call_function(torch.remainder, (rest, mode))
        rest = graph.call_function(torch.div, (rest, mode), {"rounding_mode": "floor"})
    pending = []
    for k, (factor, axes) in enumerate(zip(factors, layout.factors, strict=True)):
        root.register_parameter(f"factor_{k}", factor)
        read = graph.get_attr(f"factor_{k}")
        dim = next((d for d, name in enumerate(axes) if name in digit), None)
        if dim is not None:
            read = graph.call_method("movedim", (read, dim, 0))
            read = graph.call_method("index_select", (read, 0, digit[axes[dim]]))
        pending.append(read)
    rows = _einsums(graph, pending, lookup_plan(layout, shapes_of(factors), batch_size))
    rows = graph.call_method("narrow", (graph.call_method("flatten", (rows, 1)), 1, 0, layout.shape[1]))
    if weight.rows == weight.shape[0]:
        return rows
    is_left = graph.call_method("unsqueeze", (graph.call_function(operator.lt, (flat, weight.rows)), 1))
    return graph.call_function(operator.mul, (rows, is_left))


def _einsums(graph: fx.Graph, pending: list[fx.Node], plan: Plan) -> fx.Node:
    """The steps of a plan as calls of torch.einsum."""
    for positions, equation in plan.steps:
        taken = [pending[k] for k in positions]
        pending = [node for k, node in enumerate(pending) if k not in positions]
        pending.append(graph.call_function(torch.einsum, (equation, *taken)))
    return pending[0]
