# SPDX-License-Identifier: Apache-2.0
"""Everything that the next epoch of a run depends on: to and from a file, and from process to process."""

import numbers
import random
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from rankfall._files import write_atomic
from rankfall._processes import Processes
from rankfall._shards import Placed
from rankfall._sharing import check_alike, share_
from rankfall._states import check_state

Record: TypeAlias = dict[str, Any]


class RunState:
    """Model, optimizer, scheduler and random numbers of a run.

    Args:
        model: The model.
        optimizer: The optimizer itself, not what Accelerate makes of it.
        scheduler: The scheduler.
        loader: What gives the batches; its `generator` is part of the state if it has one, and its `state_dict`, as
            torchdata's StatefulDataLoader has it.
        epochs: Length of the whole run, which the schedule depends on.
    """

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, scheduler: LRScheduler, loader: object, epochs: int
    ) -> None:
        self.model, self.optimizer, self.scheduler = model, optimizer, scheduler
        self.parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
        self.generator = getattr(loader, "generator", None)
        self.loader = loader if isinstance(loader, Placed) else None
        self.epochs = epochs

    def save(self, path: Path | str | None, history: list[Record]) -> None:
        """Writes the state and the history so far to a file, whole or not at all; None writes nothing."""
        if path is None:
            return
        state: Record = {name: part.state_dict() for name, part in self.parts.items()}
        state |= {"epochs": self.epochs, "history": history, "random": self._order_and_noise()}
        state |= {name: _plain(part) for name, part in state.items() if name != "model"}
        write_atomic(path, lambda temporary: _write(state, temporary))

    def restore(self, path: Path | str | None) -> list[Record]:
        """Reads a file of `save` back, if it is there; returns its history.

        Raises:
            ValueError: If the file is damaged or of another run. Nothing has changed then.
        """
        if path is None or not Path(path).exists():
            return []
        try:
            state = torch.load(path, weights_only=True, map_location="cpu")
            started, parts = state["epochs"], {name: state[name] for name in self.parts}
        except Exception as error:
            raise ValueError(
                f"{path} is damaged or no checkpoint of rf.fit ({error}). Remove it to start anew."
            ) from error
        if started != self.epochs:
            raise ValueError(f"{path} is of a run of {started} epochs, not {self.epochs}. Pass epochs={started}.")
        check_state(self.model, parts["model"], path)
        groups, saved = self.optimizer.param_groups, parts["optimizer"]["param_groups"]
        if [len(g["params"]) for g in groups] != [len(g["params"]) for g in saved]:
            raise ValueError(f"{path} is of an optimizer with other parameter groups. Make the optimizer as before.")
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        self._set_order_and_noise(state["random"])
        return state["history"]

    def check_alike(self, processes: Processes) -> None:
        """Refuses models that differ from process to process in more than numbers and ranks.

        Raises:
            ValueError: If they do.
        """
        check_alike(self.model, self.optimizer, processes)

    def share_(self, processes: Processes) -> None:
        """Gives every process the model, the optimizer and the schedule of the first one."""
        share_(self.model, self.optimizer, processes)
        schedule = processes.from_first(self.scheduler.state_dict)
        if not processes.is_first:
            self.scheduler.load_state_dict(schedule)

    def start_epoch(self, processes: Processes) -> None:
        """Gives every process the order of batches of the first one, and noise of its own."""
        states = processes.from_first(self._order_and_noise)
        if not processes.is_first:
            self._set_order_and_noise(states)
        processes.new_noise()

    def _order_and_noise(self) -> Record:
        return {
            "python": random.getstate(),
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "loader": None if self.generator is None else self.generator.get_state(),
            "place": None if self.loader is None else self.loader.state_dict(),
        }

    def _set_order_and_noise(self, states: Record) -> None:
        random.setstate(states["python"])
        torch.set_rng_state(states["torch"])
        if torch.cuda.is_available():
            torch.cuda.set_rng_state_all(states["cuda"])
        if self.generator is not None and states["loader"] is not None:
            self.generator.set_state(states["loader"])
        if self.loader is not None and states.get("place") is not None:
            self.loader.load_state_dict(states["place"])


def _write(state: Record, path: Path) -> None:
    with path.open("wb") as file:  # Given a path, torch says of a full disk "unexpected pos".
        try:
            torch.save(state, file)
        except RuntimeError as error:
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None


def _plain(value: Any) -> Any:  # noqa: ANN401
    """The same with Python's numbers for NumPy's, such as a step size or a metric: no file with these is read back."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_plain, value))
    is_numpy = isinstance(value, numbers.Number) and type(value).__module__ == "numpy"
    return value.item() if is_numpy else value  # pyright: ignore[reportAttributeAccessIssue]
