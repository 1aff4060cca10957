# SPDX-License-Identifier: Apache-2.0
"""What a recommender that was trained on made-up clicks has learned of their truth, table by table.

    python benchmarks/clicks_learned.py RUN [--rows 65536]

On so many test rows, what the model's log odds differ by from the truth is regressed on what the truth says: what each
table adds by itself, and what it adds in its pairs with the others. "Learned" is 1 where all of it is there, 0 where
nothing is. RUN is a run folder of `rankfall train criteo --synthetic`.
"""

import argparse
import json
from pathlib import Path

import torch
from _report import machine, table
from torch import Tensor

import rankfall as rf
from rankfall.recipes._clicks import Truth, make_clicks
from rankfall.recipes._run import RECIPES

_TEST_SEED = 1  # As the recipe draws its test rows.
_FEW = 2048


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--rows", type=int, default=65_536)
    options = parser.parse_args()
    model = rf.load(options.run / "model.safetensors", RECIPES["criteo"].network(None).make()).eval()
    ranks = json.loads((options.run / "metrics.json").read_text())["ranks"]
    truth = Truth()
    clicks = make_clicks(options.rows, _TEST_SEED, truth)
    with torch.no_grad():
        missed = torch.cat([model(rows)[:, 1] for rows in clicks.rows.split(_FEW)]) - clicks.log_odds
    print(machine(torch.get_num_threads()) + "\n")
    alone, pairs = truth.parts(clicks.rows)
    columns = ("vector", "rows", "planted", "found", "alone: std", "learned", "pairs: std", "learned")
    print(table(columns, _rows(truth, ranks, alone, pairs, missed)))
    _, explained = _along(torch.cat([alone, pairs], 1), missed)
    print(
        f"\nVariance of the log odds {clicks.log_odds.var():.3f}, of what is missed {missed.var():.3f}, of that along"
    )
    print(f"the columns above {explained:.3f}.")


def _rows(truth: Truth, ranks: dict, alone: Tensor, pairs: Tensor, missed: Tensor) -> list[tuple[str, ...]]:
    missing, _ = _along(torch.cat([alone, pairs], 1), missed)
    found = []
    for k, (by_itself, in_pairs) in enumerate(missing.view(2, -1).T.tolist()):
        of_table = (f"{truth.sizes[k - 1]:,}", str(truth.ranks[k - 1])) if k else ("", "")
        bonds = " ".join(map(str, ranks.get(f"tables.{k - 1}", {}).values()))
        std_alone, std_pairs = (f"{float(part[:, k].std()):.3f}" for part in (alone, pairs))
        row = (f"table {k - 1}" if k else "counts", *of_table, bonds)
        found.append((*row, std_alone, f"{1 + by_itself:.2f}", std_pairs, f"{1 + in_pairs:.2f}"))
    return found


def _along(parts: Tensor, missed: Tensor) -> tuple[Tensor, Tensor]:
    """(coefficients, explained variance) of a regression."""
    centred = (parts - parts.mean(0)).double()
    coefficients = torch.linalg.lstsq(centred, (missed - missed.mean()).double().unsqueeze(1)).solution.squeeze(1)
    return coefficients, (centred @ coefficients).var()


if __name__ == "__main__":
    main()
