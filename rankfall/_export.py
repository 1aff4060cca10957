# SPDX-License-Identifier: Apache-2.0
"""Plain modules without priors: what a device needs to run the model, and nothing of rankfall."""

import copy
import operator

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from rankfall import _contract
from rankfall._swap import swap_
from rankfall._walk import low_rank_tensors
from rankfall.nn import Linear


def export(model: nn.Module, dense: bool = False, *, batch_size: int = 1) -> nn.Module:
    """A copy of the model made of plain torch modules, at the posterior mean.

    The copy keeps the factors and their contraction (a torch.fx.GraphModule of einsums per layer), or has formed
    weights. `torch.save(export(model), path)` gives a file that loads where rankfall is not installed.

    Example:
        >>> model = nn.Sequential(rf.nn.Linear(12, 20, format=rf.TTM(4)), nn.ReLU()).eval()
        >>> x = torch.randn(3, 12)
        >>> torch.allclose(rf.export(model)(x), model(x), atol=1e-6), rf.export(model, dense=True)[0]
        (True, Linear(in_features=12, out_features=20, bias=True))

    Args:
        model: A model with low-rank layers; it stays as it is.
        dense: True forms the weights: nn.Linear again, for runtimes that want nothing else.
        batch_size: The number of rows for which the order of contractions is chosen, if the factors are kept.

    Raises:
        ValueError: If a low-rank tensor stands alone in the model, outside a rankfall layer.
    """
    layers = {path: module for path, module in model.named_modules() if isinstance(module, Linear)}
    inside = {id(layer.weight) for layer in layers.values()}
    for path, tensor in low_rank_tensors(model):
        if id(tensor) not in inside:
            raise ValueError(
                f"{path or 'the model'!r} is an rf.LowRankTensor outside a rankfall layer, so its use cannot be "
                "exported. Export its .dense() as a parameter of your own module."
            )
    copied = copy.deepcopy(model)
    factors: dict[int, list[nn.Parameter]] = {}
    replacements: dict[int, nn.Module] = {}
    for path in layers:
        layer = copied.get_submodule(path)
        assert isinstance(layer, Linear)
        shared = factors.setdefault(id(layer.weight), _weights(layer, dense))
        plain = _dense_linear(layer, shared[0]) if dense else _factored_linear(layer, shared, batch_size)
        replacements[id(layer)] = plain.train(layer.training)
    for module in copied.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            # Its fused kernel reads the `weight` of its linear layers, which a chain of factors does not have.
            module.activation_relu_or_gelu = 0 if not dense else module.activation_relu_or_gelu
    return swap_(copied, replacements)


def _weights(layer: Linear, dense: bool) -> list[nn.Parameter]:
    def plain(tensor: Tensor) -> nn.Parameter:
        return nn.Parameter(tensor.detach().clone(), requires_grad=layer.weight.factors[0].requires_grad)

    return [plain(layer.weight.dense())] if dense else [plain(f) for f in layer.weight.factors]


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
