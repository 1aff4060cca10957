# SPDX-License-Identifier: Apache-2.0
"""Gives every process the first one's model and optimizer, bit for bit."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rankfall._processes import Processes
from rankfall._resize import resize_
from rankfall._walk import layer_path, low_rank_tensors


class _Place(NamedTuple):
    """A tensor that is sent by itself."""

    shape: torch.Size
    dtype: torch.dtype


def check_alike(model: nn.Module, optimizer: Optimizer, processes: Processes) -> None:
    """Refuses models that differ from process to process in more than ranks, before anything is sent.

    Raises:
        ValueError: If they do, on every process.
    """
    if processes.alone:
        return
    own = _described(model, optimizer)
    first = processes.from_first(lambda: own)

    def check() -> None:
        different = [name for name in {**first, **own} if first.get(name) != own.get(name)]
        if different:
            raise ValueError(
                f"{different[0]!r} is {own.get(different[0], 'missing')} on process {processes.index}, but "
                f"{first.get(different[0], 'missing')} on process 0. Make the same model on every process."
            )

    processes.together(check)


def _described(model: nn.Module, optimizer: Optimizer) -> dict[str, str]:
    """What has to be equal from the start: everything but ranks, so of factors only how many there are, and modes."""
    ranked = {p for _, tensor in low_rank_tensors(model) for p in tensor.parameters()}
    kept = {name: _shape(p) if p not in ranked else f"of {p.dtype}" for name, p in model.named_parameters()}
    kept |= {name: _shape(buffer) for name, buffer in model.named_buffers()}
    kept |= {layer_path(path): f"{tensor.format} of {tensor.shape}" for path, tensor in low_rank_tensors(model)}
    return kept | {f"parameter {k} beside the model": _shape(p) for k, p in enumerate(_outside(model, optimizer))}


def _shape(tensor: Tensor) -> str:
    return f"of shape {tuple(tensor.shape)} and {tensor.dtype}"


def share_(model: nn.Module, optimizer: Optimizer, processes: Processes) -> None:
    """Overwrites parameters, ranks, buffers and the optimizer's groups and state by those of the first process.

    Every Parameter stays the same object. What a process had of its own, statistics of batch normalisation above all,
    is lost: the first one's count.
    """
    if processes.alone:
        return
    parameters = [*model.parameters(), *_outside(model, optimizer)]
    notes = processes.from_first(lambda: _notes(parameters, optimizer, processes.device))
    if not processes.is_first:
        _take_(parameters, optimizer, notes)
    states = [optimizer.state.get(p, {}) for p in parameters]
    kept = [v for state in states for v in state.values() if _is_sent(v, processes.device)]
    processes.broadcast_([*(p.data for p in parameters), *model.buffers(), *kept])


def share_buffers_(model: nn.Module, processes: Processes) -> None:
    """Overwrites buffers by those of the first process."""
    if not processes.alone:
        processes.broadcast_(list(model.buffers()))


def _outside(model: nn.Module, optimizer: Optimizer) -> list[nn.Parameter]:
    """Parameters that are trained but not the model's: a noise scale that `nll` holds, say."""
    inside = set(model.parameters())
    return [p for group in optimizer.param_groups for p in group["params"] if p not in inside]


def _is_sent(value: object, device: torch.device) -> bool:
    """Whether a part of the state can go between processes as a tensor; Adam's step counts may lie on the host."""
    return isinstance(value, Tensor) and value.device.type == device.type


class _Notes(NamedTuple):
    """All that is no large tensor: shapes, groups, and what the optimizer keeps of each parameter."""

    shapes: list[torch.Size]
    groups: list[dict[str, Any]]
    states: list[dict[str, Any]]


def _notes(parameters: list[nn.Parameter], optimizer: Optimizer, device: torch.device) -> _Notes:
    numbers = {p: k for k, p in enumerate(parameters)}
    groups = [group | {"params": [numbers[p] for p in group["params"]]} for group in optimizer.param_groups]
    states = [
        {name: _Place(v.shape, v.dtype) if _is_sent(v, device) else v for name, v in optimizer.state.get(p, {}).items()}
        for p in parameters
    ]
    return _Notes([p.shape for p in parameters], groups, states)


def _take_(parameters: list[nn.Parameter], optimizer: Optimizer, notes: _Notes) -> None:
    # Groups may differ where processes were seeded differently: `rf.parameter_groups` sorts factors by their size.
    optimizer.param_groups[:] = [group | {"params": [parameters[k] for k in group["params"]]} for group in notes.groups]
    for parameter, shape, state in zip(parameters, notes.shapes, notes.states, strict=True):
        resize_(parameter, tuple(shape))
        optimizer.state.pop(parameter, None)
        if state:
            optimizer.state[parameter] = {
                name: torch.empty(v.shape, dtype=v.dtype, device=parameter.device) if isinstance(v, _Place) else v
                for name, v in state.items()
            }
