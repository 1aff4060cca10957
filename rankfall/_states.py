# SPDX-License-Identifier: Apache-2.0
"""Whether a state_dict fits a model, ranks aside, asked before any value changes."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from rankfall._tensor import LowRankTensor


def check_state(model: nn.Module, state: Mapping[str, Tensor], source: Path | str) -> None:
    """Refuses a state_dict of another architecture; other ranks are no other architecture.

    Args:
        model: The model that is to take the state.
        state: A state_dict.
        source: Where it came from, for the error.

    Raises:
        ValueError: If keys are missing or unexpected, or a tensor has another shape.
    """
    own = model.state_dict()
    kind = type(model).__name__
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or unexpected:
        raise ValueError(
            f"{source} is of another architecture than this {kind}: missing {_some(missing)}; "
            f"unexpected {_some(unexpected)}. Make the model that was saved, then load."
        )
    of_tensors: set[str] = set()
    for name, tensor in model.named_modules(remove_duplicate=False):
        if isinstance(tensor, LowRankTensor):
            keys = [f"{name}.{key}".removeprefix(".") for key in tensor.state_dict()]
            of_tensors.update(keys)
            _check_tensor(tensor, name, [tuple(state[key].shape) for key in keys], source)
    for key in own.keys() - of_tensors:
        if own[key].shape != state[key].shape:
            raise ValueError(
                f"{key!r} has shape {tuple(state[key].shape)} in {source}, but {tuple(own[key].shape)} in this {kind}. "
                "Make the model with the sizes it was saved with."
            )


def _check_tensor(tensor: LowRankTensor, name: str, shapes: list[tuple[int, ...]], source: Path | str) -> None:
    count = len(tensor.factors)
    factors, log_stds = shapes[:count], shapes[count:]
    if not tensor.fits(factors) or log_stds not in ([], factors):
        raise ValueError(
            f"{name!r} is {tensor.format} of shape {tensor.shape} here, with factors like "
            f"{[tuple(f.shape) for f in tensor.factors]}, but {source} holds factors {factors}. "
            "Make the layer with the format and sizes it was saved with."
        )


def _some(keys: list[str]) -> str:
    return (", ".join(keys[:4]) + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")) or "nothing"
