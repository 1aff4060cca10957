# SPDX-License-Identifier: Apache-2.0
"""What tables learn of planted clicks: by what digits of an id share at the start, by their steps, and by the evidence.

    python benchmarks/table_start.py [--seeds 0 1 2]
    python benchmarks/table_start.py --steps [--seeds 0 1 2]
    python benchmarks/table_start.py --evidence [--seeds 0]

DLRM with eight tables of 24 to 10 million rows, on made-up clicks whose truth has rank 2, or 1 in small tables; test
figures of 131,072 other rows, beside those of the truth. First TT-matrices of rank 2 without a prior, one pass over
524,288 rows. With --steps five tables of 305 to 93,145 rows at the recipe's start ranks, without a prior, one pass over
1,048,576 rows with the recipe's step size, by the relative change of a table per step and unit of it. With --evidence
the recipe's start ranks, prior and posterior, one pass over 3,145,728 rows in 12 epochs, and the ranks that are found.
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from _report import machine, table
from torch import Tensor, nn

import rankfall as rf
from rankfall.recipes._clicks import Clicks, ClickStream, Truth, make_clicks
from rankfall.recipes._metrics import click_figures
from rankfall.recipes._options import TrainOptions
from rankfall.recipes._recommender import WIDTH, Recommender, table_modes
from rankfall.recipes._run import build_model
from rankfall.recipes.criteo import RECIPE, of_sizes

_SIZES = (1460, 10131227, 305, 93145, 5461306, 24, 12517, 633)
_SHARES = (0.0, 0.5, 0.9, 0.97)
_FEWER_SIZES = (1460, 93145, 305, 12517, 633)
_CHANGES = (20.0, 60.0, 120.0, 240.0)
_BATCH = 1024


def main() -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--steps", action="store_true")
    kind.add_argument("--evidence", action="store_true")
    options = parser.parse_args()
    print(machine(1) + "\n")
    truth = Truth(_FEWER_SIZES if options.steps else _SIZES)
    test = make_clicks(1 << 17, 1, truth)
    if options.evidence:
        for seed in options.seeds:
            _by_evidence(seed, truth, test.rows, test.labels)
        return
    best = float(F.binary_cross_entropy_with_logits(test.log_odds, test.labels.float()))
    rows = [("truth", f"{best:.4f}", f"{click_figures(test.log_odds, test.labels)['auc']:.4f}")]
    train, values = (_stepped, _CHANGES) if options.steps else (_shared, _SHARES)
    rows += _compared(train, values, options.seeds, truth, test)
    print("\n" + table(("change" if options.steps else "share", "test NLL", "AUC"), rows))


def _compared(
    train: Callable[[float, int, Truth], nn.Module],
    values: Sequence[float],
    seeds: Sequence[int],
    truth: Truth,
    test: Clicks,
) -> list[tuple[str, ...]]:
    rows = []
    for value in values:
        found = []
        for seed in seeds:
            found.append(_figures(train(value, seed, truth), test.rows, test.labels))
            print(value, seed, *found[-1], flush=True)
        rows.append((f"{value:g}", *(_spread(figures) for figures in zip(*found, strict=True))))
    return rows


def _shared(share: float, seed: int, truth: Truth) -> nn.Module:
    torch.manual_seed(seed)
    model = Recommender(_SIZES)
    rf.tensorize_(model, rf.TTM(2), posterior=rf.Point(), device="cpu")
    for layer, size in zip(model.tables, _SIZES, strict=True):
        out_modes, in_modes = table_modes(size)
        format = rf.TTM(2, out_modes=out_modes, in_modes=in_modes)
        layer.weight = rf.LowRankTensor(
            (size, WIDTH), format, posterior=rf.Point(), initial_std=1.0, initial_share=share
        )
    _fit(model, truth, rows=1 << 19, epochs=2, beta=0.0, selection=None)
    return model


def _stepped(change: float, seed: int, truth: Truth) -> nn.Module:
    torch.manual_seed(seed)
    network = of_sizes(RECIPE.network(None), truth.sizes)
    model = build_model(network, TrainOptions("criteo", synthetic=True, posterior="point"))
    groups = rf.parameter_groups(model, network.lr, changes={"tables": change})
    _fit(model, truth, groups, rows=1 << 20, epochs=2, beta=0.0, selection=None)
    return model


def _by_evidence(seed: int, truth: Truth, rows: Tensor, clicked: Tensor) -> None:
    torch.manual_seed(seed)
    network = of_sizes(RECIPE.network(None), _SIZES)
    model = build_model(network, TrainOptions("criteo", synthetic=True))
    selection = rf.Evidence(network.test_examples)
    _fit(model, truth, rows=12 << 18, epochs=12, kl_warmup=network.kl_warmup, selection=selection)
    nll, auc = _figures(model, rows, clicked)
    print(f"seed {seed}: NLL {nll:.4f}, AUC {auc:.4f}, {rf.summary(model).parameters:,} parameters")
    for (layer, found), planted in zip(rf.ranks(model).items(), truth.ranks, strict=False):
        print(f"{layer}: ranks {tuple(found.values())}, planted {planted}")


def _fit(
    model: nn.Module, truth: Truth, groups: Sequence[dict] | None = None, *, rows: int, epochs: int, **options: Any
) -> None:
    rf.fit(
        model,
        ClickStream(rows, 0, truth, rows // epochs).batches(_BATCH),
        lambda model, batch: F.cross_entropy(model(batch[0]), batch[1], reduction="none"),
        epochs=epochs,
        num_data=rows,
        optimizer=torch.optim.Adam(groups or rf.parameter_groups(model, 2e-3), fused=True),
        on_epoch=lambda history: print({k: history[-1][k] for k in ("epoch", "nll", "kl", "parameters")}, flush=True),
        progress=False,
        **options,
    )


@torch.no_grad()
def _figures(model: nn.Module, rows: Tensor, clicked: Tensor) -> tuple[float, float]:
    logits = torch.cat([model.eval()(part)[:, 1] for part in rows.split(4096)])
    nll = F.binary_cross_entropy_with_logits(logits, clicked.float())
    return float(nll), click_figures(logits, clicked)["auc"]


def _spread(values: tuple[float, ...]) -> str:
    return f"{statistics.mean(values):.4f} +- {statistics.pstdev(values):.4f}"


if __name__ == "__main__":
    main()
