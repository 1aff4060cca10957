# SPDX-License-Identifier: Apache-2.0
"""How well the planner of linear layers knows: times expected and measured, and what its choice loses to the best way.

    python benchmarks/planner.py [--rounds 7] [--device cuda] [--out planner.json] [--plot planner.png]

Every way of every case is run forward and backward in float32 on one thread, or on a GPU as a CUDA graph; shortest of
the rounds. Expected is three
times what the planner says of the forward pass, by the figures of this machine (measured anew). The loss of a case is
the time of the chosen way over that of the fastest one.
"""

import argparse
import json
import math
from dataclasses import asdict
from pathlib import Path

import torch
from _device import add_device, captured, on_gpu, seconds, use_device
from _report import machine as described
from _report import table

import rankfall as rf
from rankfall import _matmul
from rankfall._einsum import rounded, shapes_of
from rankfall._machine import calibrate
from rankfall._pages import keep_pages

_SIZES = (((512, 784), 128), ((512, 256), 8192), ((3072, 768), 2048), ((4096, 4096), 256))
_RANKS = (2, 4, 8, 16, 32)
_FORMATS = (rf.CP, rf.Tucker, rf.TT, rf.TTM)
_TOO_LONG = 1.5  # Seconds expected, beyond which a way is not run.


def main() -> None:
    keep_pages()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="what was counted and measured of every way")
    parser.add_argument("--plot", type=Path)
    add_device(parser)
    options = parser.parse_args()
    use_device(options.device)
    found = calibrate(anew=True)
    print(f"{described()}; {found.flops / 1e9:.0f} GFLOP/s, {found.elements / 1e9:.1f} billion numbers/s\n")
    rows, points, losses, counted = [], [], [], []
    for shape, count in _SIZES:
        for kind in _FORMATS:
            for rank in _RANKS:
                weight = rf.LowRankTensor(shape, kind(rank), posterior=rf.Point())
                ways = _measured(weight, count, options.rounds, found.flops)
                chosen = _matmul.linear_way(weight.layout, shapes_of(weight.factors), rounded(count))
                (mine,) = [w for w in ways if w[0].is_like(chosen)]
                best = min(ways, key=lambda w: w[2])
                losses.append(mine[2] / best[2])
                points += [(kind.__name__, way.kind, *times) for way, *times in ways]
                counted += [(shape, count, kind.__name__, rank, asdict(way), *times) for way, *times in ways]
                what = f"{shape[1]} -> {shape[0]}, {count} rows, {kind.__name__} {rank}"
                named = (mine[0].described(weight.layout), best[0].described(weight.layout))
                rows.append((what, named[0], f"{mine[1]:.2f}", f"{mine[2]:.2f}", f"{losses[-1]:.2f}", named[1]))
                print(*rows[-1], sep=" | ", flush=True)
    print("\n" + table(("case", "chosen", "expected, ms", "measured, ms", "over the fastest", "fastest"), rows))
    off = [abs(math.log(measured / expected)) for *_, expected, measured in points]
    print(
        f"\n{len(losses)} cases: chosen over fastest {_geometric(losses):.3f} (geometric mean), at most "
        f"{max(losses):.2f}; within 1.05 in {sum(loss <= 1.05 for loss in losses)}. {len(points)} ways: measured and "
        f"expected differ by a factor of {math.exp(sum(off) / len(off)):.2f} (geometric mean), at most "
        f"{math.exp(max(off)):.1f}."
    )
    if options.out:
        options.out.write_text(json.dumps({"machine": described(), "figures": asdict(found), "ways": counted}))
    if options.plot:
        _plot(points, options.plot)


def _measured(weight: rf.LowRankTensor, rows: int, rounds: int, flops: float) -> list[tuple[_matmul.Way, float, float]]:
    """(way, ms expected, ms measured), forward and backward."""
    factors, x = list(weight.factors), torch.randn(rows, weight.shape[1], requires_grad=True)
    direction = torch.randn(rows, weight.shape[0])
    found = []
    for way in _matmul.linear_ways(weight.layout, shapes_of(factors), rows):
        expected = 3 * way.cost / flops
        if expected > _TOO_LONG:
            continue

        def step(way: _matmul.Way = way) -> None:
            for tensor in (x, *factors):
                tensor.grad = None
            _matmul.linear_by(way, weight.layout, factors, x).backward(direction)

        step()
        repeated = captured(step) if on_gpu() else step
        found.append((way, 1e3 * expected, 1e3 * min(seconds(repeated) for _ in range(rounds))))
    return found


def _geometric(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def _plot(points: list[tuple[str, str, float, float]], path: Path) -> None:
    import matplotlib  # noqa: PLC0415  only a picture needs it

    matplotlib.use("Agg")
    from matplotlib import pyplot  # noqa: PLC0415

    figure, axes = pyplot.subplots(figsize=(6, 6), layout="constrained")
    for kind, marker in (("formed", "s"), ("halves", "o"), ("cut", "^"), ("steps", "x")):
        chosen = [(expected, measured) for _, way, expected, measured in points if way == kind]
        axes.loglog(*zip(*chosen, strict=True), marker, markersize=5, alpha=0.7, label=kind)
    ends = [min(min(p[2:]) for p in points), max(max(p[2:]) for p in points)]
    axes.loglog(ends, ends, color="0.6", linewidth=1, zorder=0)
    axes.set(xlabel="expected, ms", ylabel="measured, ms", title="Linear layers, forward and backward")
    axes.legend(title="way")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
