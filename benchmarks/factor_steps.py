# SPDX-License-Identifier: Apache-2.0
"""Which step size factors want: a sweep over formats, orders and ranks, against plain Adam.

    python benchmarks/factor_steps.py --jobs 2

y = W x without noise, W (64 x 64) planted in the format and of the rank that is trained, batches of 128 fresh inputs,
Adam with a constant step size. Counted are the steps until |W - W*| is a tenth of |W*|, at most 2,000, median of three
seeds. A column is a relative change of the weight per step (what `rf.parameter_groups` holds constant: 0.12 at
lr = 1e-3), or the same step size for every parameter ("Adam").
"""

import argparse
import math
import statistics
from concurrent.futures import ProcessPoolExecutor
from itertools import product

import torch
from _report import machine, table
from _teacher import FORMATS

import rankfall as rf

_SIZE, _BATCH, _MOST, _NEAR = 64, 128, 2000, 0.1
_MODES = {1: (64,), 2: (8, 8), 3: (4, 4, 4)}
_RANKS = (3, 10)
_CHANGES = (0.015, 0.03, 0.06, 0.12, 0.24, 0.48)
_PLAIN = (1e-3, 3e-3, 1e-2, 3e-2)


def steps(name: str, order: int, rank: int, change: float | None, plain: float | None, seed: int) -> int:
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    held = FORMATS[name](rank, out_modes=_MODES[order], in_modes=_MODES[order])
    scale = math.sqrt(2 / _SIZE)
    target = rf.LowRankTensor((_SIZE, _SIZE), held, posterior=rf.Point(), initial_std=scale).dense().detach()
    layer = rf.nn.Linear(_SIZE, _SIZE, bias=False, format=held, posterior=rf.Point())
    groups = rf.parameter_groups(layer, (change or 0.12) / 120, factor_lr=plain)
    optimizer = torch.optim.Adam(groups)
    for step in range(_MOST):
        with torch.no_grad():
            if float((layer.weight.dense() - target).norm()) <= _NEAR * float(target.norm()):
                return step
        x = torch.randn(_BATCH, _SIZE)
        loss = (layer(x) - x @ target.T).square().sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return _MOST


def _median(task: tuple) -> int:
    return round(statistics.median(steps(*task, seed) for seed in range(3)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=1)
    arguments = parser.parse_args()
    # One mode a side leaves a single factor to a TT-matrix.
    cases = [c for c in product(FORMATS, _MODES, _RANKS) if not (c[0] == "TTM" and c[1] == 1)]
    columns = [(change, None) for change in _CHANGES] + [(None, plain) for plain in _PLAIN]
    tasks = [(*case, *column) for case in cases for column in columns]
    with ProcessPoolExecutor(arguments.jobs) as pool:
        counted = dict(zip(tasks, pool.map(_median, tasks, chunksize=4), strict=True))
    print(machine(1) + "\n")
    header = ["format", "modes a side", "rank", *map(str, _CHANGES), *(f"Adam {lr:g}" for lr in _PLAIN)]
    rows = [[c[0], str(c[1]), str(c[2]), *(_shown(counted[*c, *col]) for col in columns)] for c in cases]
    middle = [math.exp(statistics.mean(math.log(counted[*c, *col]) for c in cases)) for col in columns]
    rows.append(["geometric mean", "", "", *(f"{m:.0f}" for m in middle)])
    best = [min(counted[*c, *col] for col in columns) for c in cases]
    worst = [max(counted[*c, *col] / b for c, b in zip(cases, best, strict=True)) for col in columns]
    rows.append(["worst case against the best of its row", "", "", *(f"{w:.1f}x" for w in worst)])
    print(table(header, rows))


def _shown(count: int) -> str:
    return str(count) if count < _MOST else f"over {_MOST - 1}"


if __name__ == "__main__":
    main()
