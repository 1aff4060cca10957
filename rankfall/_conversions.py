# SPDX-License-Identifier: Apache-2.0
"""Which of torch's layers have a low-rank twin, which of their parameters become tensors, and how the twin is made."""

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor, nn

from rankfall._formats import Format
from rankfall._tensor import LowRankTensor
from rankfall.nn import (
    GRU,
    LSTM,
    Conv1d,
    Conv2d,
    Conv3d,
    Embedding,
    EmbeddingBag,
    Linear,
    MultiheadAttention,
    _attention,
    _recurrent,
)
from rankfall.nn._embedding import INITIAL_SHARE, INITIAL_STD, check_rows_are_plain

Module: TypeAlias = nn.Module
Weights: TypeAlias = Mapping[str, LowRankTensor]


def _only_weight(module: Module) -> tuple[str, ...]:
    """The weight, and nothing else."""
    return ("weight",)


def _as_given(module: Module, name: str, format: Format) -> Format:
    """The format of the layer."""
    return format


def _nothing(module: Module) -> None:
    """Refuses no layer."""


def _nothing_else(twin: Module, module: Module) -> None:
    """There is nothing else."""


def _as_it_is(weight: Tensor) -> Tensor:
    """The weight."""
    return weight


@dataclass(frozen=True)
class Conversion:
    """How one kind of layer is converted.

    Attributes:
        around: Makes the low-rank layer of its tensors by name and the dense layer, whose other parameters it shares.
        initial_std: Root mean square of the entries of a tensor that starts afresh.
        names: The parameters that become tensors; a dot leads into a submodule.
        format_of: The format of one of them, from that of the layer.
        check: Refuses a layer that its twin cannot stand for, with a ValueError.
        oriented: A weight as the twin holds it, for layers that store it transposed.
        initial_share: As for `LowRankTensor`, where it starts afresh.
        carry_over: Hands on what the dense layer knows beside its weights, to the twin that is made of its values.
    """

    around: Callable[..., nn.Module]
    initial_std: Callable[[nn.Module, str], float]
    names: Callable[[nn.Module], tuple[str, ...]] = _only_weight
    format_of: Callable[[nn.Module, str, Format], Format] = _as_given
    check: Callable[[nn.Module], None] = _nothing
    oriented: Callable[[Tensor], Tensor] = _as_it_is
    initial_share: float = 0.0
    carry_over: Callable[[Any, Any], None] = _nothing_else

    def parameters(self, module: nn.Module) -> dict[str, Tensor]:
        """The parameters that become tensors, by name.

        Raises:
            ValueError: If the layer computes one of them from others.
        """
        found = {}
        for name in self.names(module):
            path, _, leaf = name.rpartition(".")
            owner = module.get_submodule(path)
            if leaf not in owner._parameters:
                raise ValueError(
                    f"computes its {leaf} from other parameters ({', '.join(owner._parameters)}). Undo that first, for "
                    "example with torch.nn.utils.remove_weight_norm, or leave it out with filter_fn."
                )
            found[name] = owner._parameters[leaf]
        return found


def conversion_of(module: nn.Module) -> Conversion | None:
    """How a layer is converted; None if it has no low-rank twin.

    Subclasses are left alone: some are read as a bare weight, which has to be a Tensor, others compute something else.
    """
    known = _CONVERSIONS.get(type(module))
    if known is None and type(module) is _hugging_face_conv1d():
        return _HUGGING_FACE_CONV1D
    return known


def convertible() -> str:
    """The kinds of layers that have a low-rank twin, for an error."""
    return ", ".join(f"torch.nn.{kind.__name__}" for kind in _CONVERSIONS)


def _hugging_face_conv1d() -> type | None:
    # Not imported: a model that has such a layer has imported it already.
    return getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)


def _std_of_fan_in(module: nn.Module, name: str) -> float:
    weight = module.get_parameter(name)
    return math.sqrt(2 * weight.shape[0] / max(weight.numel(), 1))


def _of_one_weight(make: Callable[..., nn.Module]) -> Callable[[Weights, nn.Module], nn.Module]:
    return lambda weights, module: make(weights["weight"], module)


def _linear(weights: Weights, module: nn.Module) -> Linear:
    return Linear.around(weights["weight"], module._parameters["bias"])


def _recurrent_layer(make: Callable[..., nn.Module]) -> Conversion:
    return Conversion(
        make,
        lambda module, name: _recurrent.std_of(module),
        names=_recurrent.weight_names,
        format_of=_recurrent.gates_apart,
        check=_recurrent.check_projection,
    )


_TABLE = {
    "initial_std": lambda module, name: INITIAL_STD,
    "initial_share": INITIAL_SHARE,
    "check": check_rows_are_plain,
}
_CONVERSIONS: dict[type[nn.Module], Conversion] = {
    nn.Linear: Conversion(_linear, _std_of_fan_in),
    nn.Embedding: Conversion(_of_one_weight(Embedding.around), carry_over=Embedding.keep_padding_of, **_TABLE),
    nn.EmbeddingBag: Conversion(_of_one_weight(EmbeddingBag.around), **_TABLE),
    nn.Conv1d: Conversion(_of_one_weight(Conv1d.around), _std_of_fan_in),
    nn.Conv2d: Conversion(_of_one_weight(Conv2d.around), _std_of_fan_in),
    nn.Conv3d: Conversion(_of_one_weight(Conv3d.around), _std_of_fan_in),
    nn.LSTM: _recurrent_layer(LSTM.around),
    nn.GRU: _recurrent_layer(GRU.around),
    nn.MultiheadAttention: Conversion(
        MultiheadAttention.around,
        _attention.std_of,
        names=_attention.weight_names,
        format_of=_attention.projections_apart,
    ),
}
# y = x @ W + b: a linear layer whose weight is stored transposed.
_HUGGING_FACE_CONV1D = Conversion(
    _linear, lambda module, name: math.sqrt(2 / module.get_parameter(name).shape[0]), oriented=lambda weight: weight.T
)
