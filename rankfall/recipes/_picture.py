# SPDX-License-Identifier: Apache-2.0
"""A picture of a run: how its ranks fell, and what became of its size and its accuracy."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from rankfall._files import write_atomic

_LINES = ("-", "--", ":", "-.")
_MOST_NAMED = 12  # Lines that a legend can still name.


def draw(history: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Writes a PNG with the ranks of every bond above, and parameters and test accuracy below, epoch by epoch.

    A colour is a layer, a kind of line a bond of it. Tables that lost rows have a part in the middle. Without low-rank
    tensors only the lower part is drawn.

    Args:
        history: The records of `rf.fit`.
        path: The file to write.
    """
    layers = list(history[-1]["ranks"])
    parts: list[Callable[[Axes, Sequence[Mapping[str, Any]]], None]] = (
        [partial(_draw_ranks, layers=layers)] if layers else []
    )
    if tables := [layer for layer in layers if len({_rows(record, layer) for record in history} - {None}) > 1]:
        parts.append(partial(_draw_rows, tables=tables, layers=layers))
    parts.append(_draw_size)
    figure = Figure(figsize=(7, 3 * len(parts)), layout="constrained")
    for part, panel in zip(parts, figure.subplots(len(parts), 1, sharex=True, squeeze=False)[:, 0], strict=True):
        part(panel, history)
    write_atomic(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))


def _epochs(history: Sequence[Mapping[str, Any]]) -> list[int]:
    return [record["epoch"] + 1 for record in history]


def _mark(points: Sequence[object]) -> str | None:
    """A dot for a line of one point, which could not be seen otherwise."""
    return "o" if len(points) == 1 else None


def _draw_ranks(panel: Axes, history: Sequence[Mapping[str, Any]], layers: Sequence[str]) -> None:
    lines = [(layer, bond) for layer in layers for bond in history[-1]["ranks"][layer]]
    for layer, bond in lines:
        number, place = layers.index(layer), list(history[-1]["ranks"][layer]).index(bond)
        # A run that is decomposed halfway has no ranks before.
        known = [(e, r["ranks"][layer][bond]) for e, r in zip(_epochs(history), history, strict=True) if r["ranks"]]
        style = f"C{number % 10}{_LINES[place % 4]}"
        panel.step(*zip(*known, strict=True), style, where="post", label=f"{layer} {bond}", marker=_mark(known))
    panel.set(ylabel="rank", ylim=(0, None))
    panel.yaxis.set_major_locator(MaxNLocator(integer=True))
    panel.grid(alpha=0.3)
    if len(lines) <= _MOST_NAMED:
        panel.legend(ncols=2, fontsize="small", frameon=False)
    else:
        panel.set_title(f"{len(lines)} bonds of {len(layers)} weights; a colour is a weight", fontsize="small")


def _rows(record: Mapping[str, Any], layer: str) -> int | None:
    """Rows of a table; None of another layer, and where it was dense then."""
    return record.get("rows", {}).get(layer)


def _draw_rows(panel: Axes, history: Sequence[Mapping[str, Any]], tables: Sequence[str], layers: Sequence[str]) -> None:
    for layer in tables:
        known = [(e, rows) for e, r in zip(_epochs(history), history, strict=True) if (rows := _rows(r, layer))]
        panel.step(*zip(*known, strict=True), f"C{layers.index(layer) % 10}", where="post", label=layer)
    panel.set(ylabel="rows left", yscale="log")
    _plain_numbers(panel, "{x:,.0f}")
    if len(tables) <= _MOST_NAMED:
        panel.legend(fontsize="small", frameon=False)
    panel.grid(alpha=0.3)


def _plain_numbers(panel: Axes, form: str) -> None:
    panel.yaxis.set_major_formatter(form)
    panel.yaxis.set_minor_formatter(form)


def _draw_size(panel: Axes, history: Sequence[Mapping[str, Any]]) -> None:
    epochs = _epochs(history)
    mark, parameters = _mark(epochs), [r["parameters"] for r in history]
    size = panel.step(epochs, parameters, "C0", where="post", label="parameters", marker=mark)
    panel.set(xlabel="epoch", ylabel="parameters", yscale="log")
    panel.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    panel.grid(alpha=0.3)
    other = panel.twinx()
    errors = other.plot(
        epochs, [100 * (1 - r["test_accuracy"]) for r in history], "C3", label="test error", marker=mark
    )
    other.set(ylabel="test error, %", yscale="log")
    _plain_numbers(panel, "{x:,.0f}")
    _plain_numbers(other, "{x:g}")
    panel.legend(handles=[*size, *errors], fontsize="small", frameon=False)
