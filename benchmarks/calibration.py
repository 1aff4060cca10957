# SPDX-License-Identifier: Apache-2.0
"""How far the probabilities of finished MNIST runs can be trusted: at the posterior mean, and averaged over draws.

    python benchmarks/calibration.py --data-dir $MNIST runs/mnist-ttm-evidence-seed0 ...

Accuracy, NLL, expected calibration error (15 bins) and Brier score on the 10,000 test pictures; and how well the
entropy of the prediction tells them from pictures that are none of digits (AUROC): the same ones turned by a quarter,
and with their pixels shuffled, by one permutation for all. A dense run is a row of its own. "draws" averages the
probabilities of 32 draws of all factors.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from _report import machine, table
from torch import Tensor

import rankfall as rf
from rankfall.recipes._metrics import FIGURES, auroc, figures
from rankfall.recipes._run import RECIPES

_DRAWS, _SIDE = 32, 28


def main() -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--data-dir", type=Path, required=True)
    arguments = parser.parse_args()
    print(machine(1) + "\n")
    x, labels = RECIPES["mnist"].load(arguments.data_dir).test
    turned = x.view(-1, _SIDE, _SIDE).rot90(1, (1, 2)).reshape(len(x), -1)
    shuffled = x[:, torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(0))]
    rows = []
    for run in arguments.runs:
        notes = json.loads((run / "metrics.json").read_text())
        network = RECIPES["mnist"].network(notes["model"])
        model = rf.load(run / "model.safetensors", network.make()).eval()
        for name, predict in _ways(model, notes).items():
            rows.append((run.name, name, *_row(predict, x, labels, turned, shuffled)))
    heads = ("run", "prediction", *(name.removeprefix("test_") for name in FIGURES), "AUROC turned", "AUROC shuffled")
    print(table(heads, rows))


def _ways(model: torch.nn.Module, notes: dict) -> dict[str, Callable[[Tensor], Tensor]]:
    ways = {"mean": lambda x: model(x).log_softmax(1)}
    if notes["posterior"] == "mean-field":

        def drawn(x: Tensor) -> Tensor:
            return rf.predict(model, x, samples=_DRAWS).softmax(2).mean(0).log()

        ways[f"{_DRAWS} draws"] = drawn
    return ways


@torch.no_grad()
def _row(predict: Callable[[Tensor], Tensor], x: Tensor, labels: Tensor, *strange: Tensor) -> list[str]:
    known = predict(x)
    found = [f"{value:.4f}" for value in figures(known, labels).values()]
    return found + [f"{auroc(_entropy(known), _entropy(predict(other))):.4f}" for other in strange]


def _entropy(log_probabilities: Tensor) -> Tensor:
    """Between 0 and 1: of the largest that so many classes can have."""
    entropy = -(log_probabilities.exp() * log_probabilities).nan_to_num().sum(1)
    return entropy / torch.log(torch.tensor(float(log_probabilities.shape[1])))


if __name__ == "__main__":
    main()
