# SPDX-License-Identifier: Apache-2.0
"""What a sample tells of the weakest slice of each table: by itself, and with its first-order part known.

    python benchmarks/weak_slices.py [--examples 12288] [--many 1048576]

DLRM with the eight tables of table_start.py is trained on 3.1 million made-up clicks without any cut; then, for each
bond of each table, what all clicks would lose by its weakest slice, in nats, is estimated from a sample and from many
more rows: plainly, and as `rf.select_ranks_` does where a plain sample leaves doubt. Standard errors are those of the
sample alone.
"""

import argparse
import math
import sys
from collections.abc import Iterator

import table_start
import torch
import torch.nn.functional as F
from _report import machine, table
from torch import Tensor, nn

from rankfall._cuts import Criterion, _candidates, _trying
from rankfall._losses import Losses
from rankfall._memo import Memo
from rankfall._statistics import evaluating
from rankfall._walk import low_rank_tensors
from rankfall.recipes._clicks import Truth, make_clicks
from rankfall.recipes._options import TrainOptions
from rankfall.recipes._run import build_model
from rankfall.recipes.criteo import RECIPE, of_sizes

_ROWS, _EPOCHS, _BATCH = 12 << 18, 12, 4096


def main() -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=12_288, help="what the recipe asks for so many rows")
    parser.add_argument("--many", type=int, default=1 << 20)
    options = parser.parse_args()
    print(machine(1) + "\n")
    truth = Truth(table_start._SIZES)
    torch.manual_seed(0)
    network = of_sizes(RECIPE.network(None), table_start._SIZES)
    model = build_model(network, TrainOptions("criteo", synthetic=True))
    table_start._fit(model, truth, rows=_ROWS, epochs=_EPOCHS, kl_warmup=network.kl_warmup, selection=None)
    counts = (options.many, options.examples)
    criteria = [_criterion(model, truth, count, seed) for seed, count in enumerate(counts, 7)]
    heads = (f"{way}, {count:,} rows" for count in counts for way in ("plain", "first order known"))
    rows = []
    for row in _weighed(model, criteria):
        rows.append(row)
        print(*row, sep=" | ", flush=True)
    print("\n" + table(("table", "bond", "saved", *heads), rows))


def _criterion(model: nn.Module, truth: Truth, count: int, seed: int) -> Criterion:
    clicks = make_clicks(count, seed, truth)
    parts = zip(clicks.rows.split(_BATCH), clicks.labels.split(_BATCH), strict=True)
    batches = [lambda a=a, b=b: F.cross_entropy(model(a), b, reduction="none") for a, b in parts]
    return Criterion(batches, _ROWS, 1.0, 2.0, list, Memo(model))


@torch.no_grad()
def _weighed(model: nn.Module, criteria: list[Criterion]) -> Iterator[tuple[str, ...]]:
    with evaluating(model):
        bases = [Losses(criterion.batches) for criterion in criteria]
        for path, tensor in low_rank_tensors(model):
            if not path.startswith("tables"):
                continue
            with _trying(tensor):
                tensor.align_()
                for bond, rank in tensor.ranks.items():
                    saved, estimates = 0.0, []
                    for criterion, base in zip(criteria, bases, strict=True):
                        candidate = _candidates(tensor, bond, criterion, moved=True)(rank - 1)
                        assert candidate.between is not None, "a TT-matrix with rf.MeanField has a state between"
                        saved, halfway = candidate.saved, candidate.between()
                        states = (candidate.losses, halfway.losses, base)
                        without, half, whole = (losses.first(sys.maxsize) for losses in states)
                        curvature, error = _total(2 * (without - half) - 2 * (half - whole))
                        estimates += [_total(without - whole), (curvature + halfway.slope, error)]
                    shown = (f"{value:,.0f} ± {error:,.0f}" for value, error in estimates)
                    yield path.removesuffix(".weight"), bond, f"{saved:,.0f}", *shown


def _total(d: Tensor) -> tuple[float, float]:
    """(estimate, standard error) for all rows."""
    return _ROWS * float(d.mean()), _ROWS * float(d.std()) / math.sqrt(len(d))


if __name__ == "__main__":
    main()
