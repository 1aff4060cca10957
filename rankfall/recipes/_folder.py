# SPDX-License-Identifier: Apache-2.0
"""Run folders: config.json, history.jsonl, and at the end model.safetensors, ranks.png and metrics.json."""

import dataclasses
import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rankfall._files import write_atomic
from rankfall.recipes._options import TrainOptions

# Where a run stands and whether it goes on is not part of what it computes.
_NOT_COMPUTED = ("out", "resume", "data_dir")
_ROWS = "rows_fingerprint"  # Its name in config.json.
_FIGURES = "test_accuracy", "test_nll", "parameters"  # Some of those that every finished run has.


class RunFolder:
    """The files of one run.

    Args:
        options: The options of the run; the folder is made by `open`, not before.
        rows: What tells the rows that it learns from apart from others; None where they do not change.
    """

    def __init__(self, options: TrainOptions, rows: str | None = None) -> None:
        self.options, self.rows = options, rows
        self.path = options.out or _default_path(options)

    @property
    def config(self) -> Path:
        """The options of a run; written first, so a folder that has it can be resumed."""
        return self.path / "config.json"

    @property
    def history(self) -> Path:
        """One record per epoch."""
        return self.path / "history.jsonl"

    @property
    def model(self) -> Path:
        """The trained model."""
        return self.path / "model.safetensors"

    @property
    def picture(self) -> Path:
        """Ranks, size and accuracy over the epochs."""
        return self.path / "ranks.png"

    @property
    def metrics(self) -> Path:
        """The figures of a finished run; written last, so a folder that has it is whole."""
        return self.path / "metrics.json"

    @property
    def is_finished(self) -> bool:
        """Whether a run that is resumed has nothing left to do."""
        return self.options.resume and self.metrics.is_file()

    def check(self) -> None:
        """Refuses a folder that would be overwritten, or that cannot be resumed, before anything is written.

        Raises:
            ValueError: If the folder holds something and `--resume` was not given, or the other way round, or the
                options or the rows of the interrupted run were others.
        """
        if not self.options.resume:
            if self.path.exists() and not _is_vacant(self.path):
                raise ValueError(f"{self.path} exists. Pass --resume to go on with it, or another --out.")
            return
        if not self.config.is_file():
            raise ValueError(f"no run to resume in {self.path}: it has no config.json. Leave --resume out to start it.")
        # A run that is older than an option was made as it is without it.
        usual = {field.name: field.default for field in dataclasses.fields(self.options)}
        started = usual | _object(self.config.read_text(), self.config)
        if started["recipe"] != self.options.recipe:
            raise ValueError(
                f"{self.path} is a run of {started['recipe']}, not {self.options.recipe}. Pass another --out."
            )
        for name, value in _computed(self.options).items():
            if started[name] != value:
                flag = "--" + name.replace("_", "-")
                was, now, again = _as_given(flag, started[name]), _as_given(flag, value), _to_give(flag, started[name])
                raise ValueError(
                    f"{self.path} was started {was}, not {now}. {again} to resume it, or start anew in another --out."
                )
        # A run that is older than this note of its rows goes on as it did.
        if started.get(_ROWS) not in (None, self.rows):
            raise ValueError(
                f"{self.path} was started with other rows than {self.options.data_dir} holds now. Pass the --data-dir "
                "with those to resume it, or start anew in another --out."
            )

    @contextmanager
    def open(self) -> Iterator[None]:
        """Makes the folder with its config.json, unless it is there already, and clears what a killed run left.

        Inside no other process can open it; whoever is killed holds it no longer.

        Raises:
            ValueError: If another process has it open, or as for `check`, since one may have had it until now.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.path, os.O_RDONLY)
        try:
            _lock(handle, self.path)
            self.check()
            for entry in self.path.iterdir():
                if _is_leftover(entry):
                    entry.unlink()
            if not self.options.resume:
                rows = {} if self.rows is None else {_ROWS: self.rows}
                self.write(self.config.name, _computed(self.options) | rows)
            yield
        finally:
            os.close(handle)

    def write(self, name: str, content: Mapping[str, Any]) -> None:
        """Writes one JSON file."""
        write_atomic(self.path / name, lambda p: p.write_text(json.dumps(content, indent=2) + "\n"))

    def read_metrics(self) -> dict[str, Any]:
        """Reads metrics.json.

        Raises:
            ValueError: If it is damaged.
        """
        found = _object(self.metrics.read_text(), self.metrics)
        if missing := next((name for name in _FIGURES if name not in found), None):
            raise _damaged(self.metrics, f"it has no {missing}")
        return found

    def read_history(self) -> list[dict[str, Any]]:
        """Reads history.jsonl.

        Raises:
            ValueError: If it is damaged.
        """
        found = [_object(line, self.history) for line in self.history.read_text().splitlines()]
        if not found:
            raise _damaged(self.history, "it is empty")
        return found

    def write_history(self, history: Iterable[Mapping[str, Any]]) -> None:
        """Writes history.jsonl, one line per epoch."""
        lines = "".join(json.dumps(record) + "\n" for record in history)
        write_atomic(self.history, lambda p: p.write_text(lines))


def _lock(handle: int, path: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(f"{path} is being written by another process. Wait for it, or pass another --out.") from error
    except OSError:
        return  # A file system without locks.


def _object(text: str, path: Path) -> dict[str, Any]:
    """What a file of a run, or a line of it, says."""
    try:
        found = json.loads(text)
    except ValueError as error:
        raise _damaged(path, str(error)) from error
    if not isinstance(found, dict):
        raise _damaged(path, f"it holds a {type(found).__name__}")
    return found


def _damaged(path: Path, reason: str) -> ValueError:
    return ValueError(f"{path} is damaged: {reason}. Remove {path.parent} to start anew.")


def _as_given(flag: str, value: object) -> str:
    if value is True:
        return f"with {flag}"
    return f"without {flag}" if value is None or value is False else f"with {flag} {value}"


def _to_give(flag: str, value: object) -> str:
    if value is None or value is False:
        return f"Leave {flag} out"
    return f"Pass {flag}" if value is True else f"Pass {flag} {value}"


def _is_leftover(path: Path) -> bool:
    return path.name.startswith(".") and path.suffix == ".tmp"


def _is_vacant(path: Path) -> bool:
    """Whether nothing stands in a folder but what a run that was killed at its very start may have left."""
    return path.is_dir() and all(_is_leftover(entry) for entry in path.iterdir())


def _computed(options: TrainOptions) -> dict[str, Any]:
    chosen = dataclasses.asdict(options) | {"format": options.held}
    return {name: value for name, value in chosen.items() if name not in _NOT_COMPUTED}


def _default_path(options: TrainOptions) -> Path:
    held = "" if options.is_dense else f"-{options.held}"
    network = "" if options.model is None else f"-{options.model}"
    first = Path("runs") / f"{options.recipe}{network}{held}-{options.method}-seed{options.seed}"
    taken = [first] if first.exists() else []
    while taken and (later := first.with_name(f"{first.name}-{len(taken) + 1}")).exists():
        taken.append(later)
    if options.resume:
        return taken[-1] if taken else first
    return first.with_name(f"{first.name}-{len(taken) + 1}") if taken else first
