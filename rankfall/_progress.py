# SPDX-License-Identifier: Apache-2.0
"""What a training run shows while it goes on: a bar on a terminal, a line now and then elsewhere."""

from collections.abc import Mapping
from types import TracebackType
from typing import Any

_LINES = 10  # How many lines a whole run prints where there is no terminal.
_LAYERS = 4  # Ranks of more layers than this do not fit a line.


def listed(ranks: Mapping[str, Mapping[str, int]]) -> str:
    """The ranks by layer, or what they span if there are many."""
    if len(ranks) <= _LAYERS:
        return "  ".join(f"{path} {' '.join(map(str, bonds.values()))}".strip() for path, bonds in ranks.items())
    every = sorted(rank for bonds in ranks.values() for rank in bonds.values())
    if not every:
        return ""
    return f"{every[0]} to {every[-1]}, median {every[len(every) // 2]}, of {len(every)} bonds in {len(ranks)} layers"


class ProgressBar:
    """A bar with loss, compression and ranks, as a context manager; needs rich, which `rankfall[train]` brings."""

    def __init__(self, epochs: int, done: int, *, shown: bool) -> None:
        try:
            from rich import progress as parts  # noqa: PLC0415
            from rich.console import Console  # noqa: PLC0415  the core does not need rich
            from rich.table import Column  # noqa: PLC0415
        except ImportError as error:
            raise ImportError(
                "the progress bar needs rich: pip install 'rankfall[train]', or progress=False."
            ) from error
        self._console = Console(quiet=not shown)
        self._epochs = epochs
        self._bar = parts.Progress(
            parts.TextColumn("epoch"),
            parts.MofNCompleteColumn(),
            parts.BarColumn(bar_width=20),
            parts.TimeRemainingColumn(),
            # What does not fit is cut off here, and not where the epoch and the time left stand.
            parts.TextColumn("{task.fields[state]}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")),
            console=self._console,
            expand=True,
            disable=not (shown and self._console.is_terminal),
        )
        self._task = self._bar.add_task("", total=epochs, completed=done, state="")

    def __enter__(self) -> "ProgressBar":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def show(self, record: Mapping[str, Any]) -> None:
        """Shows one finished epoch."""
        ranks = listed(record["ranks"])
        state = f"loss {record['loss']:.4f}  {record['compression']:.1f}x" + (f"  ranks {ranks}" if ranks else "")
        done = record["epoch"] + 1
        self._bar.update(self._task, completed=done, state=state)
        stride = -(-self._epochs // _LINES)
        if not self._console.is_terminal and (done % stride == 0 or done == self._epochs):
            self._console.print(f"epoch {done}/{self._epochs}  {state}", highlight=False, soft_wrap=True)
