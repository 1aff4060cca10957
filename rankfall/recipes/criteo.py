# SPDX-License-Identifier: Apache-2.0
"""Clicks on advertisements: DLRM with 26 tables, on prepared rows of Criteo's data or on made-up ones of full size."""

from dataclasses import replace
from functools import partial
from pathlib import Path

from rankfall.recipes._clicks import Truth, make_clicks
from rankfall.recipes._data import Data
from rankfall.recipes._metrics import click_figures
from rankfall.recipes._recipe import Network, Recipe
from rankfall.recipes._recommender import KAGGLE_SIZES, Recommender, table_modes

_ROWS = 2_000_000
_TEST_PART = 10  # One row in so many is for testing.
_TRAIN_SEED, _TEST_SEED = 0, 1


def _load(data_dir: Path | None) -> Data:
    raise ValueError("criteo has no rows of its own. Pass --synthetic for made-up ones of full size.")


def _made_up(rows: int | None) -> Data:
    """Made-up rows, and a tenth as many others to test with."""
    truth, rows = Truth(), rows or _ROWS
    train = make_clicks(rows, _TRAIN_SEED, truth)
    test = make_clicks(max(rows // _TEST_PART, 2), _TEST_SEED, truth)
    known = click_figures(test.log_odds, test.labels)
    return Data(
        (train.rows, train.labels),
        (test.rows, test.labels),
        clicks=True,
        known={f"truth_{name}": value for name, value in known.items()},
    )


def _of_sizes(network: Network, sizes: tuple[int, ...]) -> Network:
    modes = {f"tables.{k}": table_modes(rows) for k, rows in enumerate(sizes)}
    return replace(network, make=partial(Recommender, sizes), modes=modes)


_DLRM = Network(Recommender, epochs=10, batch_size=1024, lr=1e-3, max_rank=6, kl_warmup=2, test_examples=16_384)

RECIPE = Recipe("criteo", _load, {"dlrm": _of_sizes(_DLRM, KAGGLE_SIZES)}, made_up=_made_up)
