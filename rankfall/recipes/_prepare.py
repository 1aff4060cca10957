# SPDX-License-Identifier: Apache-2.0
"""Criteo's text files to Parquet: ids by falling frequency, in two passes over the files and in bounded memory."""

import gzip
import json
import lzma
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

import numpy as np
import tyro
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from rankfall._files import write_atomic
from rankfall.recipes._optional import polars
from rankfall.recipes._recommender import COUNTS
from rankfall.recipes._stored import PIECE

TABLES = 26
MISSING = -1
"""What stands for a count that is missing; an id that is missing, rare or not seen in training is 0."""

INDEX = "criteo.json"
"""The name of the file that is written last, so a folder that has it is whole."""

_COUNTS = [f"I{k + 1}" for k in range(COUNTS)]
_IDS = [f"C{k + 1}" for k in range(TABLES)]
_BLOCK = 48 << 20  # Bytes of text that are parsed at once.
_OPENERS: dict[str, Callable[[BinaryIO], Any]] = {".gz": gzip.open, ".xz": lzma.open}


@dataclass(frozen=True)
class PrepareOptions:
    """Turn Criteo's click logs (Kaggle's train.txt, or days of the Terabyte set) into Parquet for `rankfall train`."""

    dataset: tyro.conf.Positional[Literal["criteo"]]
    """Whose files they are."""
    files: tyro.conf.Positional[tuple[Path, ...]]
    """Text files with a label, 13 integers and 26 hexadecimal numbers a line, tabs between; also as .gz or .xz."""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Folder of the Parquet files, their vocabularies and criteo.json."""
    least_count: int = 1
    """An id that the training rows have less often gets the id 0, as a missing one does; 1 keeps all."""
    test_part: float = 0.1
    """Part of the rows, picked by a fixed hash of the row's number, that is kept for testing."""

    def check(self) -> None:
        """Refuses what argument types let through, before anything is written.

        Raises:
            ValueError: If a number is out of range, or the folder holds something else.
            FileNotFoundError: If a file is missing.
        """
        if not self.files:
            raise ValueError("no file to prepare. Pass Criteo's train.txt.")
        for path in self.files:
            if not path.is_file():
                raise FileNotFoundError(f"no file {path}.")
        if self.least_count < 1:
            raise ValueError(f"--least-count must be 1 or more, got {self.least_count}.")
        if not 0 < self.test_part < 1:
            raise ValueError(f"--test-part must be above 0 and below 1, got {self.test_part}.")
        if (self.out / INDEX).exists():
            raise ValueError(f"{self.out} holds prepared rows. Pass another --out, or remove it.")
        strange = [path.name for path in self.out.glob("*") if not _is_ours(path)] if self.out.exists() else []
        if strange:
            raise ValueError(f"{self.out} holds {strange[0]}, which is not of a preparation. Pass another --out.")


def prepare(options: PrepareOptions, *, progress: bool = True) -> dict[str, Any]:
    """Prepares click logs; what an interrupted preparation left is cleared away, and it starts anew.

    Args:
        options: The choices.
        progress: Whether a progress bar is shown.

    Returns:
        The content of criteo.json: rows for training and testing, the files, and how many rows each table needs.

    Raises:
        ValueError: If an option is out of range or a line is damaged.
        FileNotFoundError: If a file is missing.
    """
    options.check()
    options.out.mkdir(parents=True, exist_ok=True)
    for path in options.out.glob("*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    total = 2 * sum(path.stat().st_size for path in options.files)
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn(), disable=not progress
    )
    with bar:
        task = bar.add_task("counting ids", total=total)
        vocabularies = _vocabularies(options, lambda count: bar.advance(task, count))
        bar.update(task, description="writing rows")
        rows, files = _write(options, vocabularies, lambda count: bar.advance(task, count))
    index = {
        "least_count": options.least_count,
        "test_part": options.test_part,
        "sizes": [len(vocabulary.values) + 1 for vocabulary in vocabularies],
        "rows": rows,
        "files": files,
    }
    write_atomic(options.out / INDEX, lambda p: p.write_text(json.dumps(index, indent=2) + "\n"))
    return index


def _is_ours(path: Path) -> bool:
    return path.suffix == ".parquet" or (path.name.startswith(".") and path.suffix == ".tmp")


@dataclass(frozen=True)
class _Vocabulary:
    """The values of one column in rising order, and the id of each."""

    values: np.ndarray
    ids: np.ndarray

    def of(self, values: np.ndarray, present: np.ndarray) -> np.ndarray:
        """The ids of values; 0 for those that are missing or unknown."""
        if not len(self.values):
            return np.zeros(len(values), np.int32)
        place = np.searchsorted(self.values, values).clip(max=len(self.values) - 1)
        return np.where(present & (self.values[place] == values), self.ids[place], 0).astype(np.int32)


Advance = Callable[[int], object]


def _vocabularies(options: PrepareOptions, advance: Advance) -> list[_Vocabulary]:
    pl = polars()
    counts = [pl.DataFrame(schema={"value": pl.UInt32, "count": pl.UInt32}) for _ in _IDS]
    for rows, is_test in _blocks(options, advance):
        learned = rows.filter(~pl.Series(is_test))
        for k, name in enumerate(_IDS):
            seen = learned[name].drop_nulls().value_counts(name="count").rename({name: "value"})
            both = pl.concat([counts[k], seen.cast({"count": pl.UInt32})])
            counts[k] = both.group_by("value").agg(pl.col("count").sum())
    return [_vocabulary(options, name, found) for name, found in zip(_IDS, counts, strict=True)]


def _vocabulary(options: PrepareOptions, name: str, counts: Any) -> _Vocabulary:  # noqa: ANN401  polars' frame
    pl = polars()
    kept = counts.filter(pl.col("count") >= options.least_count).sort(["count", "value"], descending=[True, False])
    kept = kept.with_columns(pl.int_range(1, len(kept) + 1, dtype=pl.Int32).alias("id"))
    write_atomic(options.out / f"vocabulary-{name}.parquet", kept.write_parquet)
    by_value = kept.sort("value")
    return _Vocabulary(by_value["value"].to_numpy(), by_value["id"].to_numpy())


def _write(
    options: PrepareOptions, vocabularies: Sequence[_Vocabulary], advance: Advance
) -> tuple[dict[str, int], dict[str, list[str]]]:
    pl = polars()
    rows, files = {"train": 0, "test": 0}, {"train": [], "test": []}
    for block, is_test in _blocks(options, advance):
        ids = [
            pl.Series(name, vocabulary.of(block[name].fill_null(0).to_numpy(), block[name].is_not_null().to_numpy()))
            for name, vocabulary in zip(_IDS, vocabularies, strict=True)
        ]
        counts = block.select("label", *(pl.col(name).fill_null(MISSING) for name in _COUNTS))
        ready = counts.with_columns(ids)
        for part, which in (("train", ~is_test), ("test", is_test)):
            name = f"{part}-{len(files[part]):05}.parquet"
            chosen = ready.filter(pl.Series(which))
            write_atomic(options.out / name, partial(chosen.write_parquet, row_group_size=PIECE))
            rows[part] += len(chosen)
            files[part].append(name)
    return rows, files


def _blocks(options: PrepareOptions, advance: Advance) -> Iterator[tuple[Any, np.ndarray]]:
    """The rows of all files, block by block, and whether each is for testing."""
    number = 0
    for path in options.files:
        for text, start in _texts(path, advance):
            rows = _parsed(text, path, start)
            yield rows, _is_test(np.arange(number, number + len(rows), dtype=np.uint64), options.test_part)
            number += len(rows)


def _is_test(numbers: np.ndarray, part: float) -> np.ndarray:
    """A fixed hash of row numbers (SplitMix64's finaliser), so that neither order nor size of blocks matters."""
    z = (numbers + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = (z ^ (z >> np.uint64(shift))) * np.uint64(factor)
    return (z ^ (z >> np.uint64(31))) < np.uint64(int(part * 2**64))


def _texts(path: Path, advance: Advance) -> Iterator[tuple[bytes, int]]:
    """Whole lines, some 48 MB at a time, with the byte of the text at which they start."""
    rest, start, reported = b"", 0, 0
    opener = _OPENERS.get(path.suffix)
    with path.open("rb") as raw, nullcontext(raw) if opener is None else opener(raw) as file:
        while True:
            try:
                block = file.read(_BLOCK)
            except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
                raise ValueError(f"{path} is damaged before byte {raw.tell()}: {error} Get the file again.") from error
            end = block.rfind(b"\n") + 1
            text, rest = (rest + block[:end], block[end:]) if block else (rest, b"")
            if text:
                yield text, start
            start += len(text)
            advance(raw.tell() - reported)
            reported = raw.tell()
            if not block:
                return


def _parsed(text: bytes, path: Path, start: int) -> Any:  # noqa: ANN401  polars' frame
    pl = polars()
    schema = {"label": pl.Int8} | dict.fromkeys(_COUNTS, pl.Int32) | dict.fromkeys(_IDS, pl.String)
    try:
        rows = pl.read_csv(text, has_header=False, separator="\t", quote_char=None, schema=schema)
        rows = rows.with_columns(pl.col(name).str.to_integer(base=16, dtype=pl.UInt32) for name in _IDS)
        if text.count(b"\t") != (COUNTS + TABLES) * len(rows):
            raise ValueError("a line has other than 40 columns")
        if not rows["label"].is_in([0, 1]).fill_null(False).all():
            raise ValueError("a label is not 0 or 1")
        return rows
    except (pl.exceptions.PolarsError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"{path} is damaged after byte {start}, at {_bad_line(text, start)}: {reason}. A line has a label, 13 "
            "integers and 26 hexadecimal numbers, tabs between. Get the file again."
        ) from error


def _bad_line(text: bytes, start: int) -> str:
    for line in text.split(b"\n"):
        if line and not _is_row(line):
            return f"byte {start}"
        start += len(line) + 1
    return "an unknown byte"


def _is_row(line: bytes) -> bool:
    fields = line.split(b"\t")
    try:
        counts = [int(f) for f in fields[1 : COUNTS + 1] if f]
        ids = [int(f, 16) for f in fields[COUNTS + 1 :] if f]
    except ValueError:
        return False
    in_range = all(abs(v) < 2**31 for v in counts) and all(0 <= v < 2**32 for v in ids)
    return in_range and fields[0] in (b"0", b"1") and len(fields) == 1 + COUNTS + TABLES
