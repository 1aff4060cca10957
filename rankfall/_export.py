# SPDX-License-Identifier: Apache-2.0
"""Plain modules without priors: what a device needs to run the model, and nothing of rankfall."""

import copy
import operator
from typing import Any, TypeAlias, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from rankfall import _contract
from rankfall._lookup import lookup_plan
from rankfall._swap import swap_
from rankfall._tensor import LowRankTensor
from rankfall._walk import low_rank_tensors
from rankfall.nn import GRU, LSTM, Conv1d, Conv2d, Conv3d, Embedding, EmbeddingBag, Linear, MultiheadAttention
from rankfall.nn._formed import Formed

_Layer: TypeAlias = Linear | Embedding | EmbeddingBag | Conv1d | Conv2d | Conv3d | LSTM | GRU | MultiheadAttention
_LAYERS = get_args(_Layer)
_CONVOLUTIONS = {Conv1d: nn.Conv1d, Conv2d: nn.Conv2d, Conv3d: nn.Conv3d}


def export(model: nn.Module, dense: bool = False, *, batch_size: int = 1) -> nn.Module:
    """A copy of the model made of plain torch modules, at the posterior mean.

    The copy keeps the factors of linear layers and embeddings and their contraction (a torch.fx.GraphModule of einsums
    per layer), or has formed weights. Convolutions, recurrent and attention layers, and bags, always become torch's own
    with formed weights. `torch.save(export(model), path)` gives a file that loads where rankfall is not installed.

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
    if isinstance(layer, Linear | Embedding) and not dense:
        factors = shared.setdefault(id(layer.weight), [_parameter(f, layer.weight) for f in layer.weight.factors])
        make = _factored_linear if isinstance(layer, Linear) else _factored_embedding
        return make(layer, factors, batch_size)  # pyright: ignore[reportArgumentType]
    if id(layer.weight) not in shared:
        shared[id(layer.weight)] = [_parameter(layer.weight.dense(), layer.weight)]
    weight = shared[id(layer.weight)][0]
    if isinstance(layer, Linear):
        return _dense_linear(layer, weight)
    if isinstance(layer, Embedding | EmbeddingBag):
        return _dense_table(layer, weight)
    return _dense_convolution(layer, weight)


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


def _dense_convolution(layer: Conv1d | Conv2d | Conv3d, weight: nn.Parameter) -> nn.Module:
    make: Any = _CONVOLUTIONS[type(layer)]
    plain = make(
        layer.in_channels,
        layer.out_channels,
        layer.kernel_size,
        layer.stride,
        layer.padding,
        layer.dilation,
        layer.groups,
        layer.bias is not None,
        layer.padding_mode,
        device="meta",
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
        # The row of padding is zeros, which a tied output layer has no part in.
        weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
        weight.data[layer.padding_idx] = 0.0
    plain = nn.Embedding(*layer.weight.shape, padding_idx=layer.padding_idx, device="meta")
    plain.weight = weight
    return plain


def _dense_linear(layer: Linear, weight: nn.Parameter) -> nn.Linear:
    plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    plain.weight = weight
    plain.register_parameter("bias", layer.bias)
    return plain


def _factored_linear(layer: Linear, factors: list[nn.Parameter], batch_size: int) -> fx.GraphModule:
    """The einsums of `_contract.linear` written down as a graph of torch calls."""
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
    for positions, equation in _contract.linear_plan(layout, [f.shape for f in factors], batch_size).steps:
        taken = [pending[k] for k in positions]
        pending = [node for k, node in enumerate(pending) if k not in positions]
        pending.append(graph.call_function(torch.einsum, (equation, *taken)))
    y = graph.call_method("flatten", (pending[0], -len(out_modes)))
    if padded_out > layer.out_features:
        y = graph.call_method("narrow", (y, -1, 0, layer.out_features))
    root.register_parameter("bias", layer.bias)
    if layer.bias is not None:
        y = graph.call_function(operator.add, (y, graph.get_attr("bias")))
    graph.output(y)
    return fx.GraphModule(root, graph, class_name="FactoredLinear")


def _factored_embedding(layer: Embedding, factors: list[nn.Parameter], batch_size: int) -> fx.GraphModule:
    """The reads and einsums of `_lookup.lookup` written down as a graph of torch calls."""
    layout = layer.weight.layout
    root, graph = nn.Module(), fx.Graph()
    ids = graph.placeholder("ids")
    rest = graph.call_method("reshape", (ids, -1))
    flat, digit = rest, {}
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
    for positions, equation in lookup_plan(layout, [f.shape for f in factors], batch_size).steps:
        taken = [pending[k] for k in positions]
        pending = [node for k, node in enumerate(pending) if k not in positions]
        pending.append(graph.call_function(torch.einsum, (equation, *taken)))
    rows = graph.call_method("flatten", (pending[0], 1))
    rows = graph.call_method("narrow", (rows, 1, 0, layer.embedding_dim))
    if layer.padding_idx is not None:
        words = graph.call_method("unsqueeze", (graph.call_function(operator.ne, (flat, layer.padding_idx)), 1))
        rows = graph.call_function(operator.mul, (rows, words))
    shape = graph.call_function(operator.add, (graph.call_method("size", (ids,)), (layer.embedding_dim,)))
    graph.output(graph.call_method("reshape", (rows, shape)))
    return fx.GraphModule(root, graph, class_name="FactoredEmbedding")
