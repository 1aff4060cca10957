# SPDX-License-Identifier: Apache-2.0
"""Models on disk: one safetensors file with the state_dict and what each low-rank tensor is."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from rankfall._files import write_atomic
from rankfall._formats import CP, TR, TT, TTM, Format, Tucker
from rankfall._posteriors import MeanField, Point, Posterior
from rankfall._priors import HalfCauchy, LogUniform, Prior
from rankfall._states import check_state
from rankfall._swap import swap_
from rankfall._tensor import LowRankTensor
from rankfall._tensorize import Spec, build_replacements

_KEY = "rankfall"
_KINDS = {kind.__name__: kind for kind in (CP, Tucker, TT, TTM, TR, LogUniform, HalfCauchy, Point, MeanField)}


def save(model: nn.Module, path: Path | str) -> None:
    """Writes a model to one safetensors file, whole or not at all.

    The file holds the state_dict (shared tensors once) and, for each low-rank tensor, its format, prior and posterior.
    Loading it gives every tensor back bit for bit.

    Example:
        >>> import tempfile, pathlib
        >>> model = nn.Sequential(rf.nn.Linear(12, 20, format=rf.TTM(4)))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     rf.save(model, pathlib.Path(folder) / "model.safetensors")
        ...     same = rf.load(pathlib.Path(folder) / "model.safetensors", nn.Sequential(nn.Linear(12, 20)))
        >>> torch.equal(same[0].weight.dense(), model[0].weight.dense())
        True

    Args:
        model: Any module.
        path: A file in a folder that exists; an older file there is replaced.

    Raises:
        TypeError: If the state_dict holds something other than tensors.
        FileNotFoundError: If the folder does not exist.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"no folder {path.parent} to save {path.name} in. Make it first.")
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[object, str] = {}
    for key, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{key!r} of the state_dict is a {type(value).__name__}, and only tensors can be saved.")
        place = (value.data_ptr(), value.shape, value.stride(), value.dtype) if value.numel() else key
        if place in first:
            aliases[key] = first[place]
        else:
            first[place] = key
            tensors[key] = value.contiguous()
    layers = {
        name: {part: _to_json(getattr(module, part)) for part in ("format", "prior", "posterior")}
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, LowRankTensor)
    }
    # One key only: safetensors writes several in an order that differs from process to process.
    metadata = {_KEY: json.dumps({"layers": layers, "aliases": aliases})}
    write_atomic(path, lambda temporary: _write(tensors, temporary, metadata))


def _write(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:  # Of a full disk, for one.
        raise OSError(str(error)) from error


def load(path: Path | str, model: nn.Module | None = None) -> Any:  # noqa: ANN401  a module or a state_dict
    """Reads a file that `save` wrote: into a model, or as a state_dict.

    A model that is still dense is tensorized as the file says; one with low-rank layers takes the file's ranks and
    keeps its own prior. Values are cast to the model's types. Dense weights that become low-rank may stand on torch's
    meta device, as tables do that fit nowhere; their factors are made on the CPU. Make the optimizer afterwards, or
    load its state too.

    Args:
        path: The file.
        model: A model of the same architecture, dense or tensorized; it is changed in place. None returns the
            state_dict, which `model.load_state_dict` of a tensorized model takes, whatever its ranks.

    Returns:
        The model with the file's weights, or the state_dict.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, not from `save`, or of another architecture, or the model has anything else
            on the meta device; the model is then as it was.
    """
    state, layers = _read(Path(path))
    if model is None:
        return state
    here = {name for name, module in model.named_modules(remove_duplicate=False) if isinstance(module, LowRankTensor)}
    dense = dict(model.named_parameters(remove_duplicate=False))
    specs = {name: _to_spec(layer, dense.get(name)) for name, layer in layers.items() if name not in here}
    replacements = build_replacements(model, specs)
    replaced = {id(replacements[id(m)]): m for m in model.modules() if id(m) in replacements}
    model = swap_(model, replacements)
    try:
        check_state(model, state, path)
        _check_real(model)
    except ValueError:
        swap_(model, replaced)
        raise
    model.load_state_dict(state)
    return model


def _check_real(model: nn.Module) -> None:
    empty = next((name for name, value in model.state_dict().items() if value.is_meta), None)
    if empty is not None:
        raise ValueError(
            f"{empty} is on the meta device, where no value can be loaded to. Make the model on a real device, or call "
            "its to_empty(device=...) first."
        )


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}. Pass the path that rf.save wrote.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  not a dict
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or not a safetensors file ({error}). Save the model again.") from error
    if _KEY not in metadata:
        raise ValueError(
            f"{path} was not written by rf.save. Read it with safetensors and call model.load_state_dict instead."
        )
    notes = json.loads(metadata[_KEY])
    state |= {key: state[original] for key, original in notes["aliases"].items()}
    return state, notes["layers"]


def _to_json(value: Format | Prior | Posterior) -> dict[str, Any]:
    return {"kind": type(value).__name__} | dataclasses.asdict(value)


def _from_json(notes: Mapping[str, Any]) -> Any:  # noqa: ANN401  one of _KINDS
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in notes.items()}
    return _KINDS[fields.pop("kind")](**fields)


def _to_spec(notes: Mapping[str, Any], dense: Tensor | None) -> Spec:
    device = "cpu" if dense is not None and dense.is_meta else None
    return Spec(*(_from_json(notes[part]) for part in ("format", "prior", "posterior")), device=device)
