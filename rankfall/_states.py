# SPDX-License-Identifier: Apache-2.0
"""Whether a state_dict fits a model, ranks aside, asked before any value changes."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from rankfall._tensor import LowRankTensor
from rankfall.nn import Embedding


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
    rows = _rows_of_padding(model)
    known = own.keys() | rows.keys()
    missing, unexpected = sorted(own.keys() - rows.keys() - state.keys()), sorted(state.keys() - known)
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
    shapes = {key: tuple(value.shape) for key, value in own.items() if key not in of_tensors} | rows
    for key in shapes.keys() & state.keys():
        if shapes[key] != state[key].shape:
            raise ValueError(
                f"{key!r} has shape {tuple(state[key].shape)} in {source}, but {shapes[key]} in this {kind}. "
                "Make the model with the sizes it was saved with."
            )


def _rows_of_padding(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shapes of what a table may hold beside its tensor, and need not."""
    return {
        f"{name}.padding_row".removeprefix("."): (module.embedding_dim,)
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, Embedding) and module.padding_idx is not None
    }


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
