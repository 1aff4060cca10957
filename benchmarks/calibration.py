# SPDX-License-Identifier: Apache-2.0
"""How far the probabilities of finished runs can be trusted: at the posterior mean, and averaged over draws.

    python benchmarks/calibration.py --data-dir $MNIST runs/mnist-ttm-evidence-seed0 ...
    python benchmarks/calibration.py --data-dir $IMDB runs/imdb-tt-evidence-seed0 runs/imdb-dense-seed0 --draws 8

Accuracy, NLL, expected calibration error (15 bins) and Brier score on the test rows; for MNIST also how well the
entropy of the prediction tells the 10,000 pictures from some that are none of digits (AUROC): the same ones turned by a
quarter, and with their pixels shuffled, by one permutation for all. A dense run is a row of its own. "draws" averages
the probabilities of 32 draws of all factors (`--draws`), drawn anew for each batch of 512 rows.
"""

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from _report import machine, table
from torch import Tensor

import rankfall as rf
from rankfall.recipes._metrics import FIGURES, auroc, figures
from rankfall.recipes._options import TrainOptions
from rankfall.recipes._run import RECIPES, load_data

_SIDE, _BATCH = 28, 512


def main() -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", help="of one recipe, and with the same length of texts")
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--draws", type=int, default=32)
    arguments = parser.parse_args()
    print(machine(1) + "\n")
    config = json.loads((arguments.runs[0] / "config.json").read_text())
    recipe = RECIPES[config["recipe"]]
    data = load_data(recipe, TrainOptions(recipe.name, data_dir=arguments.data_dir, length=config.get("length")))
    batches, labels = zip(*data.test_batches(_BATCH), strict=True)
    strange = [list(map(change, batches)) for change in (_turned, _shuffled)] if recipe.name == "mnist" else []
    rows = []
    for run in arguments.runs:
        notes = json.loads((run / "metrics.json").read_text())
        model = rf.load(run / "model.safetensors", recipe.network(notes["model"]).make()).eval()
        for name, predict in _ways(model, notes, arguments.draws).items():
            rows.append((run.name, name, *_row(predict, batches, torch.cat(labels), strange)))
    auroc_heads = ("AUROC turned", "AUROC shuffled") if strange else ()
    print(table(("run", "prediction", *(name.removeprefix("test_") for name in FIGURES), *auroc_heads), rows))


def _turned(x: Tensor) -> Tensor:
    return x.view(-1, _SIDE, _SIDE).rot90(1, (1, 2)).reshape(len(x), -1)


def _shuffled(x: Tensor) -> Tensor:
    return x[:, torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(0))]


def _ways(model: torch.nn.Module, notes: dict, draws: int) -> dict[str, Callable[[Tensor], Tensor]]:
    ways = {"mean": lambda x: model(x).log_softmax(1)}
    if notes["posterior"] == "mean-field":

        def drawn(x: Tensor) -> Tensor:
            return rf.predict(model, x, samples=draws).softmax(2).mean(0).log()

        ways[f"{draws} draws"] = drawn
    return ways


@torch.no_grad()
def _row(
    predict: Callable[[Tensor], Tensor],
    batches: Iterable[Tensor],
    labels: Tensor,
    strange: Iterable[Iterable[Tensor]],
) -> list[str]:
    known = torch.cat([predict(x) for x in batches])
    found = [f"{value:.4f}" for value in figures(known, labels).values()]
    others = (torch.cat([predict(x) for x in rows]) for rows in strange)
    return found + [f"{auroc(_entropy(known), _entropy(other)):.4f}" for other in others]


def _entropy(log_probabilities: Tensor) -> Tensor:
    """Between 0 and 1: of the largest that so many classes can have."""
    entropy = -(log_probabilities.exp() * log_probabilities).nan_to_num().sum(1)
    return entropy / torch.log(torch.tensor(float(log_probabilities.shape[1])))


if __name__ == "__main__":
    main()
