# SPDX-License-Identifier: Apache-2.0
"""Conversion of a whole model: find, check all, then swap."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from torch import nn

from rankfall._formats import Format
from rankfall._posteriors import Posterior
from rankfall._priors import Prior
from rankfall._swap import swap_
from rankfall._tensor import LowRankTensor
from rankfall.nn import Linear

logger = logging.getLogger(__name__)

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)

Filter: TypeAlias = Callable[[nn.Module, str], bool]


@dataclass(frozen=True)
class Spec:
    """How one weight is held: arguments of LowRankTensor."""

    format: Format
    prior: Prior | None
    posterior: Posterior | None


def tensorize_(
    model: nn.Module,
    format: Format,
    *,
    prior: Prior | None = None,
    posterior: Posterior | None = None,
    filter_fn: Filter | None = None,
    from_dense: bool = False,
) -> nn.Module:
    """Makes the big weights of a model low-rank tensors, in place, and returns the model.

    Every torch.nn.Linear that `filter_fn` accepts is replaced. Layers that share a weight share the low-rank tensor;
    biases stay the same Parameter. Make the optimizer afterwards: the old weights are gone.

    Example:
        >>> model = nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 10))
        >>> model = rf.tensorize_(model, rf.TTM(max_rank=20))
        >>> rf.ranks(model)
        {'0': {'r1': 20, 'r2': 20, 'r3': 20}, '2': {'r1': 20, 'r2': 8}}

    Args:
        model: Any module. If it is itself a layer to convert, only the returned module is the converted one.
        format: The format of every converted weight. Call several times with filters for several formats.
        prior: The hyperprior of the prior scales, rf.HalfCauchy() by default.
        posterior: rf.MeanField() by default, or rf.Point().
        filter_fn: Called with a layer and its path; True converts it. None converts every linear layer.
        from_dense: True decomposes the weights that are there (for a trained model), False starts afresh.

    Raises:
        ValueError: If nothing matches, a format does not fit a layer, or a weight is shared with a layer that stays
            dense. The model is then as it was.
        TypeError: If `format`, `prior` or `posterior` is of another kind.
    """
    found = _find(model, filter_fn)
    if not found:
        raise _nothing_matches(model)
    spec = Spec(format, prior, posterior)
    replacements = build_replacements(model, {path: spec for path, _ in found}, from_dense=from_dense)
    logger.info("tensorized %d layers: %s", len(found), ", ".join(path for path, _ in found))
    return swap_(model, replacements)


def build_replacements(model: nn.Module, specs: Mapping[str, Spec], *, from_dense: bool = False) -> dict[int, Linear]:
    """Makes the low-rank layer of every linear layer at the given paths; the model stays as it is.

    Returns:
        New layers by the id() of the layers that they stand for, as `swap_` takes them.

    Raises:
        ValueError: As for `tensorize_`.
    """
    layers = {path: layer for path, layer in _find(model, None) if path in specs}
    for path, layer in layers.items():
        if "weight" not in layer._parameters:
            raise ValueError(
                f"{path!r} computes its weight from other parameters ({', '.join(layer._parameters)}). "
                "Undo that first, for example with torch.nn.utils.remove_weight_norm, or leave it out with filter_fn."
            )
    _check_sharing(model, {id(layer.weight): path for path, layer in layers.items()}, set(map(id, layers.values())))
    weights: dict[int, LowRankTensor] = {}
    replacements: dict[int, Linear] = {}
    for path, layer in layers.items():
        try:
            if id(layer.weight) not in weights:
                weights[id(layer.weight)] = _convert(layer, specs[path], from_dense)
                weights[id(layer.weight)].path = path
        except (ValueError, TypeError) as error:
            raise type(error)(f"{path or type(layer).__name__!r}: {error}") from error
        replacements[id(layer)] = _with_hooks_of(layer, Linear.around(weights[id(layer.weight)], layer.bias))
    return replacements


def _with_hooks_of(old: nn.Linear, new: Linear) -> Linear:
    # The dictionaries themselves, so that the handles that remove a hook go on working.
    for name in _HOOKS:
        setattr(new, name, getattr(old, name))
    return new.train(old.training)


def _find(model: nn.Module, filter_fn: Filter | None) -> list[tuple[str, nn.Linear]]:
    # Subclasses are left alone: some (in nn.MultiheadAttention) are read as a bare weight, which has to be a Tensor.
    return [
        (path, module)
        for path, module in model.named_modules()
        if type(module) is nn.Linear and (filter_fn is None or filter_fn(module, path))
    ]


def _convert(layer: nn.Linear, spec: Spec, from_dense: bool) -> LowRankTensor:
    old = layer.weight
    if from_dense:
        weight = LowRankTensor.from_dense(old, spec.format, prior=spec.prior, posterior=spec.posterior)
    else:
        weight = Linear(
            layer.in_features,
            layer.out_features,
            bias=False,
            format=spec.format,
            prior=spec.prior,
            posterior=spec.posterior,
            device=old.device,
            dtype=old.dtype,
        ).weight
    return weight.requires_grad_(old.requires_grad).train(layer.training)


def _nothing_matches(model: nn.Module) -> ValueError:
    candidates = [path or "the model itself" for path, _ in _find(model, None)]
    shown = ", ".join(candidates[:8]) + (", ..." if len(candidates) > 8 else "")
    if candidates:
        return ValueError(f"filter_fn matches no layer of {type(model).__name__}. It could match: {shown}.")
    return ValueError(
        f"{type(model).__name__} has no torch.nn.Linear to tensorize. Pass a model that has one, "
        "or use rf.nn.Linear in it."
    )


def _check_sharing(model: nn.Module, weights: dict[int, str], converted: set[int]) -> None:
    for path, module in model.named_modules():
        if id(module) in converted:
            continue
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in weights:
                other = weights[id(parameter)]
                raise ValueError(
                    f"{other!r} shares its weight with {f'{path}.{name}'!r}, which stays dense, so converting it would "
                    f"untie them. Leave it out: filter_fn=lambda module, path: path != {other!r}."
                )
