# SPDX-License-Identifier: Apache-2.0
"""Clicks on advertisements: DLRM with 26 tables, on prepared rows of Criteo's data or on made-up ones of full size."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch

from rankfall.recipes._clicks import Clicks, ClickStream, Truth, make_clicks
from rankfall.recipes._data import Data
from rankfall.recipes._hashed import DROP_TABLE, HASHING, QUOTIENT_REMAINDER, Saving, save_rows_
from rankfall.recipes._metrics import click_figures, figures
from rankfall.recipes._options import FormatName, MethodName
from rankfall.recipes._prepare import ID_COLUMNS, INDEX, PARTS
from rankfall.recipes._recipe import Network, Recipe
from rankfall.recipes._recommender import KAGGLE_SIZES, Recommender, table_modes
from rankfall.recipes._stored import LABEL, StoredRows, check_numbers

_ROWS = 16_777_216
_TEST_PART = 10  # One row in so many is for testing.
_TEST_ROWS = 131_072
_LEAST_TEST_ROWS = 16  # Of fewer it may be that nobody clicks.
_TRAIN_SEED, _TEST_SEED = 0, 1
_FEW = 1_000_000  # Rows.
_IN_MEMORY = 4_000_000  # Rows up to which they are held, 160 bytes each; more are read in every pass.


def _load(data_dir: Path | None) -> Data:
    if data_dir is None:
        raise FileNotFoundError(
            "criteo needs --synthetic, or --data-dir with what `rankfall prepare criteo train.txt --out DIR` has made."
        )
    index = read_index(data_dir)
    train, test = (_stored(data_dir, index, part) for part in PARTS)
    if len(train) + len(test) > _IN_MEMORY:
        return Data(train, test, clicks=True)
    return Data(train.read(), test.read(), clicks=True)


def read_index(data_dir: Path) -> dict[str, Any]:
    """What the preparation has noted of its rows: files, rows and how many rows each table needs.

    Raises:
        FileNotFoundError: If the folder has not been prepared, or not to the end.
        ValueError: If the note is damaged or lacks something.
    """
    path = data_dir / INDEX
    if not path.is_file():
        raise FileNotFoundError(f"no {path}. Make it by `rankfall prepare criteo train.txt --out {data_dir}`.")
    try:
        index = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}. Prepare the rows again.") from error
    if fault := next(_faults(index), None):
        raise ValueError(f"{path} is damaged: {fault} is missing or wrong. Prepare the rows again.")
    return index


def _faults(index: object) -> Iterator[str]:
    """What a note of prepared rows lacks, or has in another form."""
    for part in PARTS:
        if not _are(str, _at(index, "files", part)):
            yield f"files.{part}"
        if not _are(int, [_at(index, "rows", part)]):
            yield f"rows.{part}"
    sizes = _at(index, "sizes")
    if not _are(int, sizes) or len(sizes) != len(ID_COLUMNS):
        yield "sizes"


def _at(index: Any, *names: str) -> Any:  # noqa: ANN401  as JSON has it
    for name in names:
        index = index.get(name) if isinstance(index, dict) else None
    return index


def _are(kind: type, values: object) -> bool:
    """Whether values are a list of one text or more, or of one number above 0 or more."""
    if not isinstance(values, list) or not values:
        return False
    return all(type(value) is kind and (kind is str or value > 0) for value in values)


def fingerprint(data_dir: Path) -> str:
    """What tells prepared rows apart from others; the same wherever their folder stands.

    Raises:
        FileNotFoundError: If the folder has not been prepared.
        ValueError: If the note of its rows is damaged.
    """
    index = read_index(data_dir)
    kept = {name: index.get(name) for name in ("files", "rows", "sizes", "hashes")}
    if kept["hashes"] is None:  # Of an earlier preparation; its files tell something too.
        paths = [data_dir / name for part in PARTS for name in index["files"][part]]
        kept["bytes"] = [path.stat().st_size if path.exists() else None for path in paths]
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def _stored(folder: Path, index: Mapping[str, Any], part: str) -> StoredRows:
    paths = [folder / name for name in index["files"][part]]
    rows, noted = StoredRows.of(paths), index["rows"][part]
    if len(rows) != noted:
        raise ValueError(
            f"{folder} holds {len(rows):,} {part} rows, and {INDEX} says {noted:,}. Prepare the rows again."
        )
    limits = {LABEL: 2} | dict(zip(ID_COLUMNS, index["sizes"], strict=True))
    for path in paths:
        check_numbers(path, limits)
    return rows


@lru_cache(maxsize=1)  # A comparison is measured with the same rows in every run.
def _made_up(rows: int | None) -> Data:
    """Made-up rows, a sixteenth of them in an epoch, and about a tenth as many others to test with."""
    truth, rows = Truth(), rows or _ROWS
    test = make_clicks(min(max(rows // _TEST_PART, _LEAST_TEST_ROWS), _TEST_ROWS), _TEST_SEED, truth)
    train = ClickStream(rows, _TRAIN_SEED, truth, rows // _DLRM.epochs)
    return Data(train, (test.rows, test.labels), clicks=True, known=_known(test, truth))


def _known(test: Clicks, truth: Truth) -> dict[str, Any]:
    """The figures of whoever knows the truth, and the planted rank of each table."""
    logits = torch.stack([torch.zeros_like(test.log_odds), test.log_odds], 1)
    found = figures(logits.log_softmax(1), test.labels) | click_figures(test.log_odds, test.labels)
    planted = {f"tables.{k}": rank for k, rank in enumerate(truth.ranks)}
    return {f"truth_{name.removeprefix('test_')}": value for name, value in found.items()} | {"truth_ranks": planted}


def of_sizes(network: Network, sizes: tuple[int, ...]) -> Network:
    """The network for tables of other sizes."""
    modes = {f"tables.{k}": table_modes(rows) for k, rows in enumerate(sizes)}
    ranks = dict.fromkeys(modes, _TABLE_RANK)
    baselines = {name: partial(save_rows_, saving=saving) for name, saving in _SAVINGS.items()}
    return replace(network, make=partial(Recommender, sizes), modes=modes, ranks=ranks, baselines=baselines)


# A tensor train is two thin matrices to a batch; a TT-matrix of usual ranks has to be formed.
_THIN: dict[str, FormatName] = {
    f"{part}.{2 * k}": "tt" for part, layers in (("bottom", 4), ("top", 3)) for k in range(layers)
}
# Rows of a table add to products with all other tables, and bear larger steps than those that a recurrent layer reads.
# With the usual ones for tables, 20, a million rows teach little of what pairs of them say.
_DLRM = Network(
    Recommender,
    epochs=16,
    batch_size=1024,
    lr=5e-4,
    max_rank=8,
    kl_warmup=2,
    test_examples=65_536,
    formats=_THIN,
    changes={"tables": 120.0},
)
# With the usual batches a few thousand rows are a few hundred steps, in which the KL does not come to rest. A KL that
# comes in at once presses all tables to the prior before they have learned anything.
# Tensor trains are faster there too, but TT-matrices predict better.
_ON_FEW: dict[str, Any] = {
    "epochs": 40,
    "batch_size": 128,
    "kl_warmup": 12,
    "test_examples": None,
    "formats": {},
    "changes": {},
}
_TABLE_RANK = 3
_SAVINGS: dict[MethodName, Saving] = {
    "drop-table": DROP_TABLE,
    "hashing": HASHING,
    "quotient-remainder": QUOTIENT_REMAINDER,
}


def _fitted(network: Network, data_dir: Path | None) -> Network:
    """The network for tables of the sizes that the data need, trained for longer and in smaller batches on few rows."""
    if data_dir is None:
        return of_sizes(network, KAGGLE_SIZES)
    index = read_index(data_dir)
    if index["rows"]["train"] < _FEW:
        network = replace(network, **_ON_FEW)
    return of_sizes(network, tuple(index["sizes"]))


RECIPE = Recipe("criteo", _load, {"dlrm": _DLRM}, made_up=_made_up, fitted=_fitted)
