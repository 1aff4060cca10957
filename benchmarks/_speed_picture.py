# SPDX-License-Identifier: Apache-2.0
"""The picture of benchmarks/speed.py: what was measured against what the machine allows."""

from collections.abc import Sequence
from pathlib import Path

from _peers import is_peer
from matplotlib.figure import Figure


def draw(results: Sequence[dict], title: str, path: Path) -> None:
    """Writes a PNG with a line per case: times as multiples of its limit, from left to right.

    Args:
        results: What speed.py writes as `cases`.
        title: The machine.
        path: The file to write.
    """
    figure = Figure(figsize=(8, 1.4 + 0.27 * len(results)), layout="constrained")
    axes = figure.subplots()
    places = range(len(results), 0, -1)
    kinds = (("dense", "dense", "o", "0.55"), ("best peer", None, "s", "C1"), ("rankfall", "rankfall", "D", "C0"))
    for label, name, marker, colour in kinds:
        known = [
            (_time(result["ms"], name), result["limit"], place) for result, place in zip(results, places, strict=True)
        ]
        known = [(time / limit, place) for time, limit, place in known if time is not None]
        if known:
            axes.plot(*zip(*known, strict=True), marker, color=colour, label=label, linestyle="", markersize=5)
    axes.axvline(1, color="0.2", linewidth=1)
    axes.set(xscale="log", xlabel="time of a step, in multiples of the limit", title=title)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_yticks(list(places), [result["case"] for result in results])
    axes.grid(alpha=0.3, which="both", axis="x")
    axes.legend(frameon=False, loc="upper right")
    figure.savefig(path, dpi=120)


def _time(ms: dict[str, float], name: str | None) -> float | None:
    if name is not None:
        return ms.get(name)
    return min((t for rival, t in ms.items() if is_peer(rival)), default=None)
