# SPDX-License-Identifier: Apache-2.0
"""A training step of the whole recommender of 4.3 billion parameters: rankfall beside dense tables.

    python benchmarks/recommender.py [RIVAL ...] [--batch 512] [--rounds 30] [--device cuda]

Rows as `rankfall train criteo --synthetic` draws them; forward, backward and optimizer, float32, on one thread or a
GPU, each rival in a process of its own; medians. On a GPU all but the dense tables' steps are also replayed as graphs,
and memory is what the allocator gave at its peak. Rivals:

    dense    all tables dense (17 GB) with sparse gradients and SGD, the two networks dense with Adam
    adam     the same with SparseAdam. Three numbers for each entry are 52 GB; so tables are cut to a million rows, and
             their ids taken modulo that, which leaves each step as many rows to change
    five     the five largest tables as TT-matrices of rank 16 with Adam, all else as in `dense`
    whole    every table as a TT-matrix and every weight as a tensor train, as the recipe has them at its start ranks,
             MeanField and KL, Adam
    wholeR   the same with every bond of rank R, for example whole2: what a step costs once ranks have fallen

Dense tables hold one number everywhere: their speed does not depend on their content, and drawing it takes minutes.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from _device import add_device, captured, on_gpu, seconds, use_device
from _report import machine, table
from torch import Tensor, nn

import rankfall as rf
from rankfall._elbo import JointDraw
from rankfall._pages import keep_pages
from rankfall.recipes._clicks import draw
from rankfall.recipes._options import TrainOptions
from rankfall.recipes._recommender import COUNTS, KAGGLE_SIZES, Recommender, table_modes
from rankfall.recipes._run import RECIPES, build_model

_LARGEST = sorted(range(len(KAGGLE_SIZES)), key=lambda k: -KAGGLE_SIZES[k])[:5]
_RIVALS = ("dense", "adam", "five", "whole", "whole4", "whole2")
_CUT = 1_000_000  # Rows of the largest tables under SparseAdam.
_SETS = 8  # Batches that take turns.

Step = Callable[[Tensor, Tensor], None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rivals", nargs="*", metavar="RIVAL")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    add_device(parser)
    options = parser.parse_args()
    use_device(options.device)
    if options.alone:
        print(json.dumps(_measured(options.rivals[0], options.batch, options.rounds)))
        return
    print(f"{machine()}; batches of {options.batch}\n")
    rows = []
    for rival in options.rivals or _RIVALS:
        numbers = ("--batch", str(options.batch), "--rounds", str(options.rounds), "--device", options.device)
        command = [sys.executable, __file__, rival, *numbers, "--alone"]
        found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        times = (f"{found[name]:.2f}" if name in found else "" for name in ("median", "low", "high", "graph"))
        each = 1e3 * options.batch / found.get("graph", found["median"])
        rows.append((rival, *times, f"{each:,.0f}", f"{found['memory'] / 1e9:.2f}"))
        print(*rows[-1], flush=True)
    heads = ("rival", "ms per step", "lower quartile", "upper quartile", "as a graph", "examples per second", "GB")
    print("\n" + table(heads, rows))


def _measured(rival: str, batch: int, rounds: int) -> dict[str, float]:
    keep_pages()
    torch.manual_seed(0)
    step = _whole(rival) if rival.startswith("whole") else _with_dense_tables(rival)
    generator, here = torch.Generator().manual_seed(1), torch.get_default_device()
    with torch.device("cpu"):
        rows = [draw(batch, KAGGLE_SIZES, generator).to(here) for _ in range(_SETS)]
        if rival == "adam":
            rows = [torch.cat([r[:, :COUNTS], r[:, COUNTS:] % _CUT], 1) for r in rows]
        labels = [torch.randint(0, 2, (batch,), generator=generator).to(here) for _ in range(_SETS)]
    low, median, high = _quartiles(step, rows, labels, rounds)
    found = {"median": median, "low": low, "high": high, "memory": _memory()}
    if on_gpu() and rival.startswith("whole"):
        now = rows[0].clone(), labels[0].clone()
        of_graph = captured(lambda: step(*now))

        def replay(*batch: Tensor) -> None:
            for kept, tensor in zip(now, batch, strict=True):
                kept.copy_(tensor)
            of_graph()

        found["graph"] = _quartiles(replay, rows, labels, rounds)[1]
    return found


def _quartiles(step: Step, rows: list[Tensor], labels: list[Tensor], rounds: int) -> list[float]:
    times = [1e3 * seconds(lambda k=k: step(rows[k % _SETS], labels[k % _SETS])) for k in range(rounds + 5)]
    return statistics.quantiles(times[5:], n=4)


def _memory() -> int:
    """Bytes that the process holds, or on a GPU those that it held at its peak."""
    if on_gpu():
        return torch.cuda.max_memory_allocated()
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return 1024 * int(line.split()[1])


def _whole(rival: str) -> Step:
    network, rank = RECIPES["criteo"].network(None), rival.removeprefix("whole")
    options = TrainOptions("criteo", synthetic=True, max_rank=int(rank) if rank else None)
    model = build_model(network, options)
    optimizer = torch.optim.Adam(rf.parameter_groups(model, network.lr), fused=True, capturable=on_gpu())
    sample = JointDraw(model)

    def step(rows: Tensor, labels: Tensor) -> None:
        with sample() as kl:
            loss = F.cross_entropy(model(rows), labels) + kl / 45e6
        optimizer.zero_grad()
        loss.backward()
        sample.hand_on_()
        optimizer.step()

    return step


def _with_dense_tables(rival: str) -> Step:
    model, here = Recommender(), torch.get_default_device()
    compact = _LARGEST if rival == "five" else []
    for k in compact:
        out_modes, in_modes = table_modes(KAGGLE_SIZES[k])
        held = rf.TTM(16, out_modes=out_modes, in_modes=in_modes)
        chosen = f"tables.{k}"
        rf.tensorize_(model, held, posterior=rf.Point(), filter_fn=lambda _, p, chosen=chosen: p == chosen, device=here)
    dense = []
    for k, rows in enumerate(KAGGLE_SIZES):
        if k not in compact:
            kept = min(rows, _CUT) if rival == "adam" else rows
            model.tables[k] = nn.Embedding(kept, 128, sparse=True, _weight=torch.full((kept, 128), 0.05))
            dense += list(model.tables[k].parameters())
    chosen_ids = {id(p) for p in dense}
    others = [p for p in model.parameters() if id(p) not in chosen_ids]
    of_tables = torch.optim.SparseAdam(dense, lr=1e-3) if rival == "adam" else torch.optim.SGD(dense, lr=0.1)
    optimizers = [of_tables, torch.optim.Adam(others, lr=1e-3, fused=True)]

    def step(rows: Tensor, labels: Tensor) -> None:
        loss = F.cross_entropy(model(rows), labels)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()

    return step


if __name__ == "__main__":
    main()
