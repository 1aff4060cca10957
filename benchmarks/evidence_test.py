# SPDX-License-Identifier: Apache-2.0
"""How long an evidence test takes that remembers what layers gave, beside one that runs them all each time.

    python benchmarks/evidence_test.py RUN ... [--data-dir DIR] [--examples 8192] [--rounds 3]

A test of each finished run, at its end, on so many training rows (of criteo, made-up ones if there is no --data-dir).
Both find the same cuts, or this ends with an error. They take turns; medians of the rounds.
"""

import argparse
import copy
import json
import statistics
import time
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from _report import machine, table

import rankfall as rf
from rankfall import _evidence
from rankfall._memo import Memo
from rankfall._pages import keep_pages
from rankfall.recipes._options import TrainOptions
from rankfall.recipes._run import RECIPES, load_data

_WAYS = {"remembering": Memo, "without": lambda model: Memo(model, most=0)}


def main() -> None:
    torch.set_num_threads(1)
    keep_pages()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--examples", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    print(machine(1) + "\n")
    rows = [_row(run, options) for run in options.runs]
    print(table(("run", "examples", *(f"{way}, s" for way in _WAYS), "part of the time", "cuts"), rows))


def _row(run: Path, options: argparse.Namespace) -> tuple[str, ...]:
    config = json.loads((run / "config.json").read_text())
    recipe = RECIPES[config["recipe"]]
    made_up = recipe.made_up is not None and options.data_dir is None
    chosen = TrainOptions(recipe.name, data_dir=options.data_dir, synthetic=made_up, length=config.get("length"))
    data = load_data(recipe, chosen)
    network = recipe.network(config["model"], options.data_dir)
    model = rf.load(run / "model.safetensors", network.make())
    torch.manual_seed(0)
    batches = list(islice(data.batches(network.batch_size), -(-options.examples // network.batch_size)))
    seconds: dict[str, list[float]] = {way: [] for way in _WAYS}
    cuts = []
    for _ in range(options.rounds):
        for way, memo in _WAYS.items():
            twin = copy.deepcopy(model)
            _evidence.Memo = memo
            begun = time.perf_counter()
            nll = [lambda x=x, y=y, twin=twin: F.cross_entropy(twin(x), y, reduction="none") for x, y in batches]
            found, _ = _evidence.search_ranks_(twin, batches=nll, num_data=data.num_data, beta=1.0, z=2.0, max_cut=0.5)
            seconds[way].append(time.perf_counter() - begun)
            cuts.append(found)
    assert all(found == cuts[0] for found in cuts)
    fast, slow = (statistics.median(times) for times in seconds.values())
    examples = sum(len(y) for _, y in batches)
    return run.name, f"{examples:,}", f"{fast:.1f}", f"{slow:.1f}", f"{fast / slow:.2f}", str(len(cuts[0]))


if __name__ == "__main__":
    main()
