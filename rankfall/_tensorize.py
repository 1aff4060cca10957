# SPDX-License-Identifier: Apache-2.0
"""Conversion of a whole model: find, check all, then swap."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

from rankfall._conversions import Conversion, conversion_of, convertible
from rankfall._formats import Format
from rankfall._posteriors import Posterior
from rankfall._priors import Prior
from rankfall._swap import swap_
from rankfall._tensor import LowRankTensor

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
    device: torch.device | str | None = None


def tensorize_(
    model: nn.Module,
    format: Format,
    *,
    prior: Prior | None = None,
    posterior: Posterior | None = None,
    filter_fn: Filter | None = None,
    from_dense: bool = False,
    device: torch.device | str | None = None,
) -> nn.Module:
    """Makes the big weights of a model low-rank tensors, in place, and returns the model.

    Every layer that has a low-rank twin in `rf.nn` and that `filter_fn` accepts is replaced: torch's Linear, Embedding,
    EmbeddingBag, Conv1d to Conv3d, LSTM, GRU, MultiheadAttention, and the Conv1D of Hugging Face transformers. Layers
    that share a weight, such as an embedding and a tied output layer, share the low-rank tensor; biases stay the same
    Parameter. Make the optimizer afterwards: the old weights are gone.

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
        filter_fn: Called with a layer and its path; True converts it. None converts every layer that can be.
        from_dense: True decomposes the weights that are there (for a trained model), False starts afresh.
        device: Where factors that start afresh are made, None for where each weight is. So a table that fits nowhere
            can stand on the meta device, without memory, and its factors on a real one.

    Raises:
        ValueError: If nothing matches, a format does not fit a layer, or a weight is shared with a layer that stays
            dense. The model is then as it was.
        TypeError: If `format`, `prior` or `posterior` is of another kind.
    """
    found = _find(model, filter_fn)
    if not found:
        raise _nothing_matches(model)
    specs: dict[str, Spec] = {}
    for path, layer, conversion in found:
        with _named(path, layer):
            for name in conversion.parameters(layer):
                specs[_join(path, name)] = Spec(conversion.format_of(layer, name, format), prior, posterior, device)
    replacements = build_replacements(model, specs, from_dense=from_dense)
    logger.info("tensorized %d layers: %s", len(found), ", ".join(path for path, _, _ in found))
    return swap_(model, replacements)


def build_replacements(
    model: nn.Module, specs: Mapping[str, Spec], *, from_dense: bool = False
) -> dict[int, nn.Module]:
    """Makes the low-rank twin of every layer whose weights stand at the given paths; the model stays as it is.

    Args:
        model: Any module.
        specs: How each weight is held, by its path: "fc1.weight", "lstm.weight_ih_l0".
        from_dense: True decomposes the weights that are there.

    Returns:
        New layers by the id() of the layers that they stand for, as `swap_` takes them.

    Raises:
        ValueError: As for `tensorize_`.
    """
    layers = [
        (path, layer, conversion)
        for path, layer, conversion in _find(model, None)
        if any(_join(path, name) in specs for name in conversion.names(layer))
    ]
    _check_sharing(model, layers)
    tensors: dict[int, LowRankTensor] = {}
    replacements: dict[int, nn.Module] = {}
    for path, layer, conversion in layers:
        with _named(path, layer):
            conversion.check(layer)
            weights = {}
            for name, weight in conversion.parameters(layer).items():
                if id(weight) not in tensors:
                    spec = specs[_join(path, name)]
                    tensors[id(weight)] = _convert(layer, name, weight, conversion, spec, from_dense)
                    tensors[id(weight)].path = path if name == "weight" else _join(path, name)
                weights[name] = tensors[id(weight)]
            twin = conversion.around(weights, layer)
            if from_dense:
                conversion.carry_over(twin, layer)
            replacements[id(layer)] = _with_hooks_of(layer, twin)
    return replacements


def _with_hooks_of(old: nn.Module, new: nn.Module) -> nn.Module:
    # The dictionaries themselves, so that the handles that remove a hook go on working.
    for name in _HOOKS:
        setattr(new, name, getattr(old, name))
    return new.train(old.training)


def _find(model: nn.Module, filter_fn: Filter | None) -> list[tuple[str, nn.Module, Conversion]]:
    return [
        (path, module, conversion)
        for path, module in model.named_modules()
        if (conversion := conversion_of(module)) is not None and (filter_fn is None or filter_fn(module, path))
    ]


def _convert(
    layer: nn.Module,
    name: str,
    old: Tensor,
    conversion: Conversion,
    spec: Spec,
    from_dense: bool,
) -> LowRankTensor:
    value = conversion.oriented(old)
    if from_dense and old.is_meta:
        raise ValueError("its weight is on the meta device and has no values to decompose. Pass from_dense=False.")
    if from_dense:
        weight = LowRankTensor.from_dense(value, spec.format, prior=spec.prior, posterior=spec.posterior)
    else:
        weight = LowRankTensor(
            value.shape,
            spec.format,
            prior=spec.prior,
            posterior=spec.posterior,
            initial_std=conversion.initial_std(layer, name),
            initial_share=conversion.initial_share,
            device=old.device if spec.device is None else spec.device,
            dtype=old.dtype,
        )
    return weight.requires_grad_(old.requires_grad).train(layer.training)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


@contextmanager
def _named(path: str, layer: nn.Module) -> Iterator[None]:
    """Errors inside name the layer."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise type(error)(f"{path or type(layer).__name__!r}: {error}") from error


def _nothing_matches(model: nn.Module) -> ValueError:
    candidates = [path or "the model itself" for path, _, _ in _find(model, None)]
    shown = ", ".join(candidates[:8]) + (", ..." if len(candidates) > 8 else "")
    if candidates:
        return ValueError(f"filter_fn matches no layer of {type(model).__name__}. It could match: {shown}.")
    return ValueError(
        f"{type(model).__name__} has no layer to tensorize. Pass a model that has one of {convertible()}, "
        "or use the layers of rf.nn in it."
    )


def _check_sharing(model: nn.Module, layers: Sequence[tuple[str, nn.Module, Conversion]]) -> None:
    weights: dict[int, str] = {}
    for path, layer, conversion in layers:
        with _named(path, layer):
            weights |= {id(weight): path for weight in conversion.parameters(layer).values()}
    converted = {id(part) for _, layer, _ in layers for part in layer.modules()}
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
