# SPDX-License-Identifier: Apache-2.0
"""What the optimizer's moments should become at a gauge step: the loss curve after it, four ways.

    python benchmarks/gauge_moments.py

A planted rank-3 weight of 64 x 64 with noise, N = 1000, Adam 1e-2, 400 steps, then one gauge step. Shown are the
highest and the mean loss of the next 20 steps, less the mean of the 20 steps before; lower is smoother.
"""

import argparse
import statistics
from collections.abc import Callable
from unittest import mock

import torch
from _report import machine, table

import rankfall as rf
from rankfall import _resize


def _remove(parameter: torch.nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
    optimizer.state.pop(parameter, None)


def _keep(parameter: torch.nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
    pass


def _zero(parameter: torch.nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
    for value in optimizer.state[parameter].values():
        if value.shape == parameter.shape:
            value.zero_()


WAYS: dict[str, Callable[..., None]] = {
    "momenta 0, second moments to their mean (the library's)": _resize.forget_,
    "state removed, steps counted anew": _remove,
    "kept as they are": _keep,
    "all moments 0": _zero,
}


def _curve(kind: rf.TT, posterior: rf.Point, way: Callable[..., None], seed: int) -> tuple[float, float]:
    torch.manual_seed(seed)
    layer = rf.nn.Linear(64, 64, format=kind, posterior=posterior)
    x = torch.randn(1000, 64)
    y = x @ (torch.randn(64, 3) @ torch.randn(3, 64) / 20).T + 0.1 * torch.randn(1000, 64)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    elbo = rf.ELBOLoss(layer, num_data=1000)

    def steps(count: int) -> list[float]:
        losses = []
        for _ in range(count):
            rows = torch.randint(0, 1000, (100,))
            loss = elbo(0.5 * ((layer(x[rows]) - y[rows]) / 0.1).square().sum(1).mean())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        return losses

    before = statistics.mean(steps(400)[-20:])
    with mock.patch("rankfall._tensor.forget_", way):
        rf.canonicalize_(layer, optimizer)
    after = steps(20)
    return max(after) - before, statistics.mean(after) - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    seeds = parser.parse_args().seeds
    torch.set_num_threads(1)
    print(f"seeds {seeds}, nats per datum. {machine(1)}\n")
    rows = []
    for kind in (rf.TTM(10), rf.TT(10), rf.TR(5), rf.Tucker(6), rf.CP(10)):
        for posterior in (rf.Point(), rf.MeanField()):
            curves = [[_curve(kind, posterior, way, seed) for seed in seeds] for way in WAYS.values()]
            cells = [" / ".join(f"{statistics.mean(c):+.1f}" for c in zip(*of_way, strict=True)) for of_way in curves]
            rows.append([type(kind).__name__, type(posterior).__name__, *cells])
    print(table(["format", "posterior", *(f"{way}: highest / mean" for way in WAYS)], rows))


if __name__ == "__main__":
    main()
