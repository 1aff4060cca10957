# SPDX-License-Identifier: Apache-2.0
"""What tables learn of planted clicks by how much of their factors the digits of an id share at the start.

    python benchmarks/table_start.py [--seeds 0 1 2] [--rows 524288]

DLRM with eight tables of 24 to 10 million rows, TT-matrices of rank 2 without a prior, on one pass over made-up clicks
whose truth has rank 2. Test figures of 131,072 other rows, beside those of the truth.
"""

import argparse
import statistics

import torch
import torch.nn.functional as F
from _report import machine, table
from torch import Tensor

import rankfall as rf
from rankfall.recipes._clicks import ClickStream, Truth, make_clicks
from rankfall.recipes._metrics import click_figures
from rankfall.recipes._recommender import WIDTH, Recommender, table_modes

_SIZES = (1460, 10131227, 305, 93145, 5461306, 24, 12517, 633)
_SHARES = (0.0, 0.5, 0.9, 0.97)
_EPOCHS = 2
_BATCH = 1024


def main() -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", type=int, default=1 << 19)
    options = parser.parse_args()
    print(machine(1) + "\n")
    truth = Truth(_SIZES)
    test = make_clicks(1 << 17, 1, truth)
    best = F.binary_cross_entropy_with_logits(test.log_odds, test.labels.float())
    rows = [("truth", f"{best:.4f}", f"{click_figures(test.log_odds, test.labels)['auc']:.4f}")]
    for share in _SHARES:
        found = []
        for seed in options.seeds:
            found.append(_trained(share, seed, options.rows, truth, test.rows, test.labels))
            print(share, seed, *found[-1], flush=True)
        rows.append((f"{share:g}", *(_spread(values) for values in zip(*found, strict=True))))
    print("\n" + table(("share", "test NLL", "AUC"), rows))


def _trained(share: float, seed: int, count: int, truth: Truth, rows: Tensor, clicked: Tensor) -> tuple[float, float]:
    torch.manual_seed(seed)
    model = Recommender(_SIZES)
    rf.tensorize_(model, rf.TTM(2), posterior=rf.Point(), device="cpu")
    for layer, size in zip(model.tables, _SIZES, strict=True):
        out_modes, in_modes = table_modes(size)
        format = rf.TTM(2, out_modes=out_modes, in_modes=in_modes)
        layer.weight = rf.LowRankTensor(
            (size, WIDTH), format, posterior=rf.Point(), initial_std=1.0, initial_share=share
        )
    rf.fit(
        model,
        ClickStream(count, 0, truth, count // _EPOCHS).batches(_BATCH),
        lambda model, batch: F.cross_entropy(model(batch[0]), batch[1], reduction="none"),
        epochs=_EPOCHS,
        num_data=count,
        beta=0.0,
        optimizer=torch.optim.Adam(rf.parameter_groups(model, 2e-3), fused=True),
        selection=None,
        progress=False,
    )
    with torch.no_grad():
        logits = torch.cat([model.eval()(part)[:, 1] for part in rows.split(4096)])
    nll = F.binary_cross_entropy_with_logits(logits, clicked.float())
    return float(nll), click_figures(logits, clicked)["auc"]


def _spread(values: tuple[float, ...]) -> str:
    return f"{statistics.mean(values):.4f} +- {statistics.pstdev(values):.4f}"


if __name__ == "__main__":
    main()
