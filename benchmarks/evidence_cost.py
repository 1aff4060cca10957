# SPDX-License-Identifier: Apache-2.0
"""What the KL, the gauge step and the evidence test cost, as a part of training time.

    python benchmarks/evidence_cost.py runs/mnist-ttm-evidence-seed0 ...

The KL: one training step of the MNIST network (784-512-10, TT-matrix, MeanField, batch 128) with and without it, taken
in turns, medians of 200, at the start rank and at the ranks of the first run folder given. Gauge and test: the seconds
that finished runs spent on them, from their history.jsonl, which also says how long an epoch took at first and at last.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from _report import machine, table

import rankfall as rf
from rankfall.recipes._options import TrainOptions
from rankfall.recipes._run import RECIPES, build_model

_BATCH, _STEPS = 128, 200


def main() -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+")
    runs = parser.parse_args().runs
    print(machine(1) + "\n")
    torch.manual_seed(0)
    model = build_model(RECIPES["mnist"].network(None), TrainOptions("mnist"))
    rows = [
        ("start rank 20", *_step_times(model)),
        ("at the end", *_step_times(rf.load(runs[0] / "model.safetensors", model))),
    ]
    print(table(("ranks", "step without KL, ms", "with KL, ms", "share of the KL"), rows) + "\n")
    print(
        table(("run", "gauge and test, s", "training, s", "share", "s/epoch first", "s/epoch last"), map(_shares, runs))
    )


def _step_times(model: torch.nn.Module) -> tuple[str, str, str]:
    optimizer = torch.optim.Adam(rf.parameter_groups(model, 1e-3))
    x, y = torch.randn(_BATCH, 784), torch.randint(10, (_BATCH,))
    model.train()

    def step(with_kl: bool) -> float:
        started = time.perf_counter()
        loss = F.cross_entropy(model(x), y)
        loss = loss + rf.kl(model) / 60_000 if with_kl else loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return 1e3 * (time.perf_counter() - started)

    pairs = [(step(False), step(True)) for _ in range(_STEPS)]
    without, with_kl = (statistics.median(times) for times in zip(*pairs, strict=True))
    return f"{without:.2f}", f"{with_kl:.2f}", f"{(with_kl - without) / with_kl:.1%}"


def _shares(run: Path) -> tuple[str, ...]:
    history = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    spent, seconds = (sum(record[name] for record in history) for name in ("selection_seconds", "seconds"))
    trained = [record["seconds"] - record["selection_seconds"] for record in history]
    first, last = (statistics.median(part) for part in (trained[:3], trained[-3:]))
    return run.name, f"{spent:.1f}", f"{seconds:.0f}", f"{spent / seconds:.1%}", f"{first:.2f}", f"{last:.2f}"


if __name__ == "__main__":
    main()
