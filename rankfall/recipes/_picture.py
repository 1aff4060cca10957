# SPDX-License-Identifier: Apache-2.0
"""A picture of a run: how its ranks fell, and what became of its size and its accuracy."""

from collections.abc import Mapping, Sequence
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

    A colour is a layer, a kind of line a bond of it. Without low-rank tensors only the lower part is drawn.

    Args:
        history: The records of `rf.fit`.
        path: The file to write.
    """
    layers = list(history[-1]["ranks"])
    figure = Figure(figsize=(7, 6 if layers else 3), layout="constrained")
    *above, below = figure.subplots(2 if layers else 1, 1, sharex=True, squeeze=False)[:, 0]
    for panel in above:
        _draw_ranks(panel, history, layers)
    _draw_size(below, history)
    write_atomic(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))


def _epochs(history: Sequence[Mapping[str, Any]]) -> list[int]:
    return [record["epoch"] + 1 for record in history]


def _draw_ranks(panel: Axes, history: Sequence[Mapping[str, Any]], layers: Sequence[str]) -> None:
    lines = [(layer, bond) for layer in layers for bond in history[-1]["ranks"][layer]]
    for layer, bond in lines:
        number, place = layers.index(layer), list(history[-1]["ranks"][layer]).index(bond)
        # A run that is decomposed halfway has no ranks before.
        known = [(e, r["ranks"][layer][bond]) for e, r in zip(_epochs(history), history, strict=True) if r["ranks"]]
        panel.step(
            *zip(*known, strict=True), f"C{number % 10}{_LINES[place % 4]}", where="post", label=f"{layer} {bond}"
        )
    panel.set(ylabel="rank", ylim=(0, None))
    panel.yaxis.set_major_locator(MaxNLocator(integer=True))
    panel.grid(alpha=0.3)
    if len(lines) <= _MOST_NAMED:
        panel.legend(ncols=2, fontsize="small", frameon=False)
    else:
        panel.set_title(f"{len(lines)} bonds of {len(layers)} weights; a colour is a weight", fontsize="small")


def _draw_size(panel: Axes, history: Sequence[Mapping[str, Any]]) -> None:
    epochs = _epochs(history)
    size = panel.step(epochs, [r["parameters"] for r in history], "C0", where="post", label="parameters")
    panel.set(xlabel="epoch", ylabel="parameters", yscale="log")
    panel.grid(alpha=0.3)
    other = panel.twinx()
    errors = other.plot(epochs, [100 * (1 - r["test_accuracy"]) for r in history], "C3", label="test error")
    other.set(ylabel="test error, %", yscale="log")
    for axis, form in ((panel.yaxis, "{x:,.0f}"), (other.yaxis, "{x:g}")):
        axis.set_major_formatter(form)
        axis.set_minor_formatter(form)
    panel.legend(handles=[*size, *errors], fontsize="small", frameon=False)
