# SPDX-License-Identifier: Apache-2.0
"""Click logs on their way to the recommender: prepared from text, and read batch by batch from Parquet files.

    python benchmarks/clicks_loader.py [STAGE ...] [--rows 4000000] [--text-rows 1000000] [--steps 60]

Rows as `rankfall train criteo --synthetic` draws them, in a temporary folder; each stage in a process of its own, torch
on one thread, polars on all cores. Stages:

    prepare  `rankfall prepare criteo` of a text file in the format of Kaggle's train.txt
    loader   a pass over shuffled batches of 1,024 rows, with nothing else to do
    model    training steps of the recipe on the same batch again and again: what the model needs
    both     training steps on batches of the loader, a group of pieces and more in; how long the model waits for rows

Memory is the highest that was resident, beside what was resident before the stage began, interpreter and libraries.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import polars as pl
import torch
import torch.nn.functional as F
from _report import machine, table
from torch import Tensor

import rankfall as rf
from rankfall._pages import keep_pages
from rankfall.recipes._clicks import draw
from rankfall.recipes._hashed import mixed
from rankfall.recipes._options import TrainOptions
from rankfall.recipes._prepare import PrepareOptions, prepare
from rankfall.recipes._recommender import COUNTS, KAGGLE_SIZES
from rankfall.recipes._run import RECIPES, build_model
from rankfall.recipes._stored import LABEL, PIECE, StoredRows

_PART = 190_000  # Rows of a file, about as many as `rankfall prepare` writes.
_BATCH = 1024
_WARM = 5  # Steps that are not timed.

Found = dict[str, float]
Batch = tuple[Tensor, Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stages", nargs="*", metavar="STAGE")
    parser.add_argument("--rows", type=int, default=4_000_000)
    parser.add_argument("--text-rows", type=int, default=1_000_000)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--alone", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        print(json.dumps(_measured(options.stages[0], options.alone, options.steps)))
        return
    print(f"{machine(1)}, polars {pl.__version__}, {pl.thread_pool_size()} threads\n")
    with tempfile.TemporaryDirectory() as name:
        lines = [_run(stage, Path(name), options) for stage in options.stages or _STAGES]
    heads = ("stage", "rows", "seconds", "rows per second", "waiting", "resident before, MB", "at most, MB", "more, MB")
    print("\n" + table(heads, lines))


def _run(stage: str, folder: Path, options: argparse.Namespace) -> tuple[str, ...]:
    if stage == "prepare":
        _write_text(folder / "train.txt", options.text_rows)
    elif stage != "model" and not list(folder.glob("*.parquet")):
        _write_parquet(folder, options.rows)
    command = [sys.executable, __file__, stage, "--alone", str(folder), "--steps", str(options.steps)]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    waiting = f"{found['waiting'] / found['seconds']:.1%}" if "waiting" in found else ""
    rate = found["rows"] / found["seconds"]
    memory = (f"{value / 1e6:,.0f}" for value in (found["before"], found["peak"], found["peak"] - found["before"]))
    line = (stage, f"{found['rows']:,}", f"{found['seconds']:.1f}", f"{rate:,.0f}", waiting, *memory)
    print(*line, flush=True)
    return line


def _measured(stage: str, folder: Path, steps: int) -> Found:
    torch.set_num_threads(1)
    keep_pages()
    torch.manual_seed(0)
    return _STAGES[stage](folder, steps)


def _prepare(folder: Path, steps: int) -> Found:
    before, started = _memory("VmRSS"), time.perf_counter()
    index = prepare(PrepareOptions("criteo", (folder / "train.txt",), folder / "prepared"), progress=False)
    rows = index["rows"]["train"] + index["rows"]["test"]
    return {"rows": rows, "seconds": time.perf_counter() - started, "before": before, "peak": _memory("VmHWM")}


def _loader(folder: Path, steps: int) -> Found:
    before, started = _memory("VmRSS"), time.perf_counter()
    rows = sum(len(labels) for _, labels in _batches(folder))
    return {"rows": rows, "seconds": time.perf_counter() - started, "before": before, "peak": _memory("VmHWM")}


def _model(folder: Path, steps: int) -> Found:
    batch = draw(_BATCH, KAGGLE_SIZES, torch.Generator().manual_seed(0)), torch.randint(0, 2, (_BATCH,))
    return _trained([batch] * (_WARM + steps))


def _both(folder: Path, steps: int) -> Found:
    return _trained(islice(_batches(folder), _WARM + steps))


def _trained(batches: Iterable[Batch]) -> Found:
    network = RECIPES["criteo"].network(None)
    model = build_model(network, TrainOptions("criteo", synthetic=True))
    optimizer = torch.optim.Adam(rf.parameter_groups(model, network.lr), fused=True)
    before, times, waits = _memory("VmRSS"), [], []
    came = time.perf_counter()
    for inputs, labels in batches:
        started = time.perf_counter()
        loss = F.cross_entropy(model(inputs), labels) + rf.kl(model) / 45e6
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        waits.append(started - came)
        came = time.perf_counter()
        times.append(came - started)
    seconds, waiting = sum(times[_WARM:]), sum(waits[_WARM:])
    rows = _BATCH * len(times[_WARM:])
    figures = {"rows": rows, "seconds": seconds + waiting, "waiting": waiting}
    return figures | {"before": before, "peak": _memory("VmHWM")}


def _batches(folder: Path) -> Iterable[Batch]:
    return StoredRows.of(sorted(folder.glob("*.parquet"))).batches(_BATCH, shuffled=True)


def _memory(name: str) -> int:
    """Bytes that are resident now (VmRSS) or were at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])


def _frames(rows: int, part: int) -> Iterator[pl.DataFrame]:
    """Made-up rows with labels, part by part."""
    names = [*(f"I{k + 1}" for k in range(COUNTS)), *(f"C{k + 1}" for k in range(len(KAGGLE_SIZES)))]
    generator = torch.Generator().manual_seed(0)
    for start in range(0, rows, part):
        drawn = draw(min(part, rows - start), KAGGLE_SIZES, generator)
        label = torch.rand(len(drawn), generator=generator) < 0.2562
        frame = pl.DataFrame(drawn.numpy(), schema=names)
        yield frame.insert_column(0, pl.Series(LABEL, label.to(torch.int8).numpy()))


def _write_parquet(folder: Path, rows: int) -> None:
    for k, frame in enumerate(_frames(rows, _PART)):
        frame.write_parquet(folder / f"train-{k:05}.parquet", row_group_size=PIECE)


def _write_text(path: Path, rows: int) -> None:
    """Kaggle's format: ids are 32-bit hashes in hexadecimal, a missing count and the id 0 are empty."""
    with path.open("wb") as file:
        for frame in _frames(rows, _PART):
            counts = [pl.when(pl.col(name) >= 0).then(pl.col(name)) for name in frame.columns[1 : COUNTS + 1]]
            ids = [_hexadecimal(frame[name], k) for k, name in enumerate(frame.columns[COUNTS + 1 :])]
            frame.select(LABEL, *counts).with_columns(ids).write_csv(file, include_header=False, separator="\t")


def _hexadecimal(ids: pl.Series, number: int) -> pl.Series:
    hashes = mixed(ids.to_torch() + 1_000_003 * number).numpy().astype(">u4")
    nibbles = np.repeat(hashes.view(np.uint8).reshape(-1, 4), 2, axis=1)
    nibbles = np.where(np.arange(8) % 2, nibbles & 15, nibbles >> 4)
    texts = np.frombuffer(b"0123456789abcdef", np.uint8)[nibbles].view("S8").ravel().astype("U8")
    return pl.Series(ids.name, texts).set(ids == 0, None)


_STAGES: dict[str, Callable[[Path, int], Found]] = {
    "prepare": _prepare,
    "loader": _loader,
    "model": _model,
    "both": _both,
}


if __name__ == "__main__":
    main()
