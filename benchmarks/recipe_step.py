# SPDX-License-Identifier: Apache-2.0
"""How long a training step takes in factors, beside the dense network.

    python benchmarks/recipe_step.py [mnist] [cifar10] [imdb] [transformer] [--formats tt ttm] [--rounds 20]

A whole step of a recipe as rf.fit makes it (a draw of all factors, forward, backward, KL, Adam) on rows of the right
shape, on one thread, at the start rank and at lower ones; dense is the same network with the same optimizer. All take
turns; medians of the rounds.
"""

import argparse
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from _report import machine, table
from _steps import CLASSES, medians, rows_of

import rankfall as rf
from rankfall._elbo import JointDraw
from rankfall._pages import keep_pages
from rankfall.recipes._options import TrainOptions
from rankfall.recipes._run import RECIPES, build_model

_RECIPES = [name for name in CLASSES if name != "criteo"]  # Whose dense network fits nowhere.


def main() -> None:
    torch.set_num_threads(1)
    keep_pages()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipes", nargs="*", metavar="RECIPE", default=_RECIPES)
    parser.add_argument("--model", help="which of a recipe's networks; the first if left out")
    parser.add_argument("--formats", nargs="+", default=["tt", "ttm"])
    parser.add_argument("--ranks", nargs="+", type=int, help="start ranks; the network's own, a half and a quarter")
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    print(machine(1) + "\n")
    rows = [row for recipe in options.recipes for row in _rows(recipe, options)]
    print(table(("recipe", "weights", "ranks up to", "parameters", "step, ms", "of dense"), rows))


def _rows(recipe: str, options: argparse.Namespace) -> list[Sequence[str]]:
    most = RECIPES[recipe].network(options.model).max_rank
    kinds: list[dict[str, Any]] = [{"method": "dense"}]
    for name in options.formats:
        kinds += [{"format": name, "max_rank": rank} for rank in options.ranks or (most, most // 2, most // 4)]
    made = [_made(recipe, replace(TrainOptions(recipe), model=options.model, **kind)) for kind in kinds]
    counts, steps = zip(*made, strict=True)
    times = medians(list(steps), options.rounds)
    return [
        (
            recipe,
            kind.get("format", "dense"),
            str(kind.get("max_rank", "")),
            f"{count:,}",
            f"{time:.1f}",
            f"{time / times[0]:.2f}",
        )
        for kind, count, time in zip(kinds, counts, times, strict=True)
    ]


def _made(recipe: str, options: TrainOptions) -> tuple[int, Callable[[], None]]:
    """A network's number of parameters, and a step of its training."""
    torch.manual_seed(0)
    network = RECIPES[recipe].network(options.model)
    model = build_model(network, options)
    optimizer = torch.optim.Adam(rf.parameter_groups(model, network.lr), fused=True)
    x, y = rows_of(recipe, network.batch_size), torch.randint(CLASSES[recipe], (network.batch_size,))
    joint = None if options.is_dense else JointDraw(model)

    def step() -> None:
        optimizer.zero_grad()
        with joint() if joint else nullcontext() as kl:
            loss = F.cross_entropy(model(x), y)
        (loss if kl is None else loss + kl / 60_000).backward()
        if joint:
            joint.hand_on_()
        optimizer.step()

    return rf.summary(model).parameters, step


if __name__ == "__main__":
    main()
