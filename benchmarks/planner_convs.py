# SPDX-License-Identifier: Apache-2.0
"""How well the planner of convolutions knows: times expected and measured of every way, with their gradients.

    python benchmarks/planner_convs.py [--rounds 5] [--device cuda]

3 x 3 kernels with padding 1; forward and backward in float32 on one thread, or on a GPU as a CUDA graph; shortest of
the rounds. Expected is three times what the planner says of the forward pass, by the figures of this machine (measured
anew). The dense layer stands beside.
"""

import math

import torch
from _device import captured, on_gpu, seconds
from _planners import begin
from _report import table

import rankfall as rf
from rankfall import _convolve

_SIZES = ((16, 32, 64), (64, 16, 64), (128, 8, 64), (256, 14, 16))  # Channels in and out, height and width, pictures.
_RANKS = (4, 16, 32)
_FORMATS = (rf.CP, rf.Tucker, rf.TT, rf.TTM)


def main() -> None:
    rounds, flops = begin(__doc__)
    rows, losses, off, of_dense = [], [], [], []
    for channels, side, pictures in _SIZES:
        x = torch.randn(pictures, channels, side, side, requires_grad=True)
        dense = torch.nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        dense_ms = _milliseconds(lambda net=dense, x=x: net(x), [x, *dense.parameters()], rounds)
        for format in (kind(rank) for kind in _FORMATS for rank in _RANKS):
            what = f"{channels} channels, {pictures} of {side} x {side}, {type(format).__name__} {format.max_rank}"
            found, chosen = _measured(x, format, rounds, flops)
            best = min(measured for *_, measured in found)
            for way, expected, measured in found:
                off.append(abs(math.log(measured / expected)))
                if way == chosen:
                    losses.append(measured / best)
                    of_dense.append(measured / dense_ms)
                times = f"{expected:.2f}", f"{measured:.2f}", f"{dense_ms:.2f}"
                rows.append((what, way, *times, "chosen" if way == chosen else ""))
                print(*rows[-1], sep=" | ", flush=True)
    print("\n" + table(("case", "way", "expected, ms", "measured, ms", "dense, ms", ""), rows))
    print(
        f"\n{len(losses)} cases: chosen over fastest {_mean(losses):.3f} (geometric mean), at most {max(losses):.2f}; "
        f"chosen over dense {_mean(of_dense):.2f}, {min(of_dense):.2f} to {max(of_dense):.2f}. {len(off)} ways: "
        f"measured and expected differ by a factor of {math.exp(sum(off) / len(off)):.2f} (geometric mean), at most "
        f"{math.exp(max(off)):.1f}."
    )


def _mean(ratios: list[float]) -> float:
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def _measured(x: torch.Tensor, format: rf.CP, rounds: int, flops: float) -> tuple[list[tuple], str]:
    """(way, ms expected, ms measured), forward and backward, and the way that the layer takes."""
    layer = rf.nn.Conv2d(x.shape[1], x.shape[1], 3, padding=1, bias=False, format=format, posterior=rf.Point())
    layout, factors, geometry = layer.weight.layout, list(layer.weight.factors), layer.geometry
    ranks, points = tuple(layer.weight.ranks.items()), x.numel() // x.shape[1]
    found = []
    for way in _convolve.conv_ways(layout, ranks, 1, points, points):
        maps = way.maps_in, way.maps_out
        taken = _milliseconds(
            lambda maps=maps: _convolve.convolve_by(layout, factors, x, geometry, maps), [x, *factors], rounds
        )
        found.append((way.described(), 1e3 * 3 * way.cost / flops, taken))
    return found, layer.expected(points).way


def _milliseconds(forward, parameters, rounds: int) -> float:
    direction = torch.randn_like(forward())

    def step() -> None:
        for parameter in parameters:
            parameter.grad = None
        forward().backward(direction)

    step()
    repeated = captured(step) if on_gpu() else step
    return 1e3 * min(seconds(repeated) for _ in range(rounds))


if __name__ == "__main__":
    main()
