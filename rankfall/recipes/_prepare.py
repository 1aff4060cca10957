# SPDX-License-Identifier: Apache-2.0
"""Criteo's text files to Parquet: ids by falling frequency, in two passes over the files and in bounded memory."""

import gzip
import hashlib
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal, TypeAlias

import numpy as np
import tyro
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from rankfall._files import write_atomic
from rankfall.recipes._optional import polars
from rankfall.recipes._recommender import COUNTS
from rankfall.recipes._stored import PIECE
from rankfall.recipes._xz import open_xz

TABLES = 26
MISSING = -1
"""What stands for a count that is missing; an id that is missing, rare or not seen in training is 0."""

INDEX = "criteo.json"
"""The name of the file that is written last, so a folder that has it is whole."""

PARTS = ("train", "test")
"""Rows to learn from, and rows to measure with."""

ID_COLUMNS = tuple(f"C{k + 1}" for k in range(TABLES))
"""The columns of ids, one per table."""

_COUNTS = [f"I{k + 1}" for k in range(COUNTS)]
_BLOCK = 48 << 20  # Bytes of text that are parsed at once.
_LONGEST = 1 << 20  # Bytes without a line in them that are held; a line has some 400 at most.
_OPENERS: dict[str, Callable[[BinaryIO], Any]] = {".gz": gzip.open, ".xz": open_xz}
_PACKED = {".gz": b"\x1f\x8b", ".xz": b"\xfd7zXZ\x00"}  # What such a file begins with.
_OTHERS = {b"PK\x03\x04": "a zip archive", b"BZh": "packed with bzip2", b"\x28\xb5\x2f\xfd": "packed with zstd"}
_OURS = re.compile(r"(train|test)-\d{5,}\.parquet|vocabulary-C\d{1,2}\.parquet|criteo\.json")
_OUR_TEMPORARY = re.compile(rf"\.({_OURS.pattern})\.[0-9a-f]{{8}}\.tmp")
_KINDS = (
    [(range(2), 10, "0 or 1")]
    + [(range(-(2**31), 2**31), 10, "an integer of 32 bits")] * COUNTS
    + [(range(2**32), 16, "a hexadecimal number of 32 bits")] * TABLES
)  # What each column of a line has: the values, their base, and words for them.


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
            ValueError: If a number is out of range, a file is packed and not named so or not in these ways, or the
                folder holds something else.
            FileNotFoundError: If a file is missing.
        """
        if not self.files:
            raise ValueError("no file to prepare. Pass Criteo's train.txt.")
        for path in self.files:
            if not path.is_file():
                raise FileNotFoundError(f"no file {path}.")
            _check_ending(path)
        if self.least_count < 1:
            raise ValueError(f"--least-count must be 1 or more, got {self.least_count}.")
        if not 0 < self.test_part < 1:
            raise ValueError(f"--test-part must be above 0 and below 1, got {self.test_part}.")
        self._check_out()

    def _check_out(self) -> None:
        if not self.out.exists():
            return
        if not self.out.is_dir():
            raise ValueError(f"{self.out} is not a folder. Pass another --out.")
        if (self.out / INDEX).exists():
            raise ValueError(f"{self.out} holds prepared rows. Pass another --out, or remove it.")
        strange = sorted(path.name for path in self.out.iterdir() if not _is_ours(path))
        if strange:
            raise ValueError(f"{self.out} holds {strange[0]}, which is not of a preparation. Pass another --out.")


def prepare(options: PrepareOptions, *, progress: bool = True) -> dict[str, Any]:
    """Prepares click logs; what an interrupted preparation left is cleared away, and it starts anew.

    Args:
        options: The choices.
        progress: Whether a progress bar is shown.

    Returns:
        The content of criteo.json: rows for training and testing, the files with hashes of their rows, and how many
        rows each table needs.

    Raises:
        ValueError: If an option is out of range, a line is damaged, a file changes while it is read, or there are no
            rows for training or for testing. The folder has no criteo.json then.
        FileNotFoundError: If a file is missing.
        OSError: If the folder cannot be written to.
    """
    options.check()
    before = _versions(options.files)
    options.out.mkdir(parents=True, exist_ok=True)
    for path in options.out.iterdir():
        path.unlink()
    total = 2 * sum(size for size, _ in before.values())
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn(), disable=not progress
    )
    with bar:
        task = bar.add_task("counting ids", total=total)
        vocabularies = _vocabularies(options, lambda count: bar.advance(task, count))
        _check_unchanged(before)
        bar.update(task, description="writing rows")
        written = _write(options, vocabularies, lambda count: bar.advance(task, count))
    _check_unchanged(before)
    _check_parts(written["rows"])
    index = {
        "least_count": options.least_count,
        "test_part": options.test_part,
        "sizes": [len(vocabulary.values) + 1 for vocabulary in vocabularies],
        **written,
    }
    _write_file(options.out / INDEX, lambda p: p.write_text(json.dumps(index, indent=2) + "\n"))
    return index


def _is_ours(path: Path) -> bool:
    """Whether a preparation makes files of this name. Whatever else a folder holds may be all that is left of it."""
    named = _OURS.fullmatch(path.name) or _OUR_TEMPORARY.fullmatch(path.name)
    return bool(named) and path.is_file() and not path.is_symlink()


def _check_ending(path: Path) -> None:
    with path.open("rb") as file:
        head = file.read(max(map(len, [*_PACKED.values(), *_OTHERS])))
    for magic, kind in _OTHERS.items():
        if head.startswith(magic):
            raise ValueError(f"{path} is {kind}; unpack it first.")
    for ending, magic in _PACKED.items():
        if head.startswith(magic) and path.suffix != ending:
            raise ValueError(f"{path} is packed, and its name does not end in {ending}. Rename it to {path}{ending}.")


_Versions: TypeAlias = dict[Path, tuple[int, int]]


def _versions(files: Iterable[Path]) -> _Versions:
    """Size and time of the last change of each file."""
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


def _check_unchanged(before: _Versions) -> None:
    now = _versions(before)
    for path, version in before.items():
        if now[path] != version:
            raise ValueError(f"{path} has changed while it was read. Prepare it again once it is complete.")


def _check_parts(rows: Mapping[str, int]) -> None:
    if not all(rows.values()):
        raise ValueError(
            f"the files give {rows['train']:,} rows to train with and {rows['test']:,} to test with, and both are "
            "needed. Pass files with more rows, or another --test-part."
        )


def _write_file(path: Path, write: Callable[[Path], object]) -> None:
    try:
        write_atomic(path, write)
    except (OSError, polars().exceptions.PolarsError) as error:
        reason = getattr(error, "strerror", None) or _reason(error)
        raise OSError(f"{path} cannot be written: {reason}. Make room for it, or pass another --out.") from error


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
    counts = [_Counts() for _ in ID_COLUMNS]
    for rows, is_test in _blocks(options, advance):
        learned = rows.filter(~pl.Series(is_test))
        for name, of_column in zip(ID_COLUMNS, counts, strict=True):
            seen = learned[name].drop_nulls().value_counts(name="count").rename({name: "value"})
            of_column.add(seen)
    return [_vocabulary(options, name, found.total()) for name, found in zip(ID_COLUMNS, counts, strict=True)]


class _Counts:
    """How often each id of a column was seen.

    What blocks have added is kept apart until it is as long as the sum, and summed then: to go through millions of ids
    at every block would take longer than to read the block.
    """

    def __init__(self) -> None:
        pl = polars()
        self._schema = {"value": pl.UInt32, "count": pl.UInt32}
        self._sum = pl.DataFrame(schema=self._schema)
        self._added: list[Any] = []

    def add(self, seen: Any) -> None:  # noqa: ANN401  polars' frame
        """Adds the ids of a block, each once, with their counts."""
        self._added.append(seen.cast(self._schema))
        if sum(map(len, self._added)) >= len(self._sum):
            self.total()

    def total(self) -> Any:  # noqa: ANN401  polars' frame
        """All ids, in any order, with their counts."""
        pl = polars()
        parts = pl.concat([self._sum, *self._added])
        self._sum, self._added = parts.group_by("value").agg(pl.col("count").sum()), []
        return self._sum


def _vocabulary(options: PrepareOptions, name: str, counts: Any) -> _Vocabulary:  # noqa: ANN401  polars' frame
    pl = polars()
    kept = counts.filter(pl.col("count") >= options.least_count).sort(["count", "value"], descending=[True, False])
    kept = kept.with_columns(pl.int_range(1, len(kept) + 1, dtype=pl.Int32).alias("id"))
    _write_file(options.out / f"vocabulary-{name}.parquet", kept.write_parquet)
    by_value = kept.sort("value")
    return _Vocabulary(by_value["value"].to_numpy(), by_value["id"].to_numpy())


def _write(options: PrepareOptions, vocabularies: Sequence[_Vocabulary], advance: Advance) -> dict[str, Any]:
    """Writes the rows; returns of each part how many there are, its files, and a hash of the rows in each of them."""
    pl = polars()
    rows, files, hashes = dict.fromkeys(PARTS, 0), {part: [] for part in PARTS}, {part: [] for part in PARTS}
    for block, is_test in _blocks(options, advance):
        ids = [
            pl.Series(name, vocabulary.of(block[name].fill_null(0).to_numpy(), block[name].is_not_null().to_numpy()))
            for name, vocabulary in zip(ID_COLUMNS, vocabularies, strict=True)
        ]
        counts = block.select("label", *(pl.col(name).fill_null(MISSING) for name in _COUNTS))
        ready = counts.with_columns(ids)
        for part, which in zip(PARTS, (~is_test, is_test), strict=True):
            name = f"{part}-{len(files[part]):05}.parquet"
            chosen = ready.filter(pl.Series(which))
            _write_file(options.out / name, partial(chosen.write_parquet, row_group_size=PIECE))
            rows[part] += len(chosen)
            files[part].append(name)
            hashes[part].append(_hash(chosen))
    return {"rows": rows, "files": files, "hashes": hashes}


def _hash(rows: Any) -> str:  # noqa: ANN401  polars' frame
    """Of the numbers, not of the file: another version of polars may pack the same rows otherwise."""
    digest = hashlib.sha256()
    for column in rows.get_columns():
        digest.update(column.to_numpy())
    return digest.hexdigest()


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
                where = f"{path} is damaged before byte {raw.tell()}"
                raise ValueError(f"{where}: {_reason(error)}. Get the file again.") from error
            rest += block
            end = _end(rest, is_last=not block)
            text, rest = rest[:end], rest[end:]
            if text:
                yield text, start
            start += len(text)
            advance(raw.tell() - reported)
            reported = raw.tell()
            if not block:
                return


def _end(text: bytes, *, is_last: bool) -> int:
    """How much of a text can be parsed by itself: up to its last whole line, without blank lines after that.

    If more text follows, these are not the end of the file, and stand before a line of it.
    """
    if not is_last and len(text) > _BLOCK + _LONGEST:
        return len(text)  # No line in so much: it is damaged, and is not to fill the memory.
    end = len(text) if is_last else text.rfind(b"\n") + 1
    while text.endswith((b"\n\n", b"\n\r\n"), 0, end):
        end -= 2 if text.endswith(b"\r\n", 0, end) else 1
    return 0 if text[:end] in (b"\n", b"\r\n") else end


def _parsed(text: bytes, path: Path, start: int) -> Any:  # noqa: ANN401  polars' frame
    pl = polars()
    schema = {"label": pl.Int8} | dict.fromkeys(_COUNTS, pl.Int32) | dict.fromkeys(ID_COLUMNS, pl.String)
    try:
        rows = pl.read_csv(text, has_header=False, separator="\t", quote_char=None, schema=schema)
        rows = rows.with_columns(pl.col(name).str.to_integer(base=16, dtype=pl.UInt32) for name in ID_COLUMNS)
        if text.count(b"\t") != (COUNTS + TABLES) * len(rows):
            raise ValueError("a line has other than 40 columns")
        if not rows["label"].is_in([0, 1]).fill_null(False).all():
            raise ValueError("a label is not 0 or 1")
        return rows
    except (pl.exceptions.PolarsError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged after byte {start}, at {_bad_line(text, start, error)}. A line has a label, 13 "
            "integers and 26 hexadecimal numbers, tabs between. Get the file again."
        ) from error


def _bad_line(text: bytes, start: int, error: Exception) -> str:
    """The byte at which the first line that is no row begins, and what is wrong with it."""
    for line in text.removesuffix(b"\n").split(b"\n"):
        fault = _fault(line)
        if fault:
            return f"byte {start}: {fault}"
        start += len(line) + 1
    return f"an unknown byte: {_reason(error)}"


def _reason(error: Exception) -> str:
    """The first line of what another library says, without a full stop: ours has one after it."""
    return str(error).strip().split("\n")[0].rstrip(".")


def _fault(line: bytes) -> str | None:
    """What is wrong with a line, if anything is."""
    if not line.strip(b" \r"):
        return "a line is blank"
    fields = line.removesuffix(b"\r").split(b"\t")
    if len(fields) != len(_KINDS):
        hint = " (it may be the test file, which has no labels)" if len(fields) == len(_KINDS) - 1 else ""
        return f"{len(fields)} column{'s' if len(fields) > 1 else ''}, not {len(_KINDS)}{hint}"
    for column, (field, (values, base, words)) in enumerate(zip(fields, _KINDS, strict=True), 1):
        is_missing = not field and column > 1
        if not is_missing and not _is_number(field, values, base):
            return f"column {column} has {repr(field[:20])[1:]}, not {words}"
    return None


def _is_number(field: bytes, values: range, base: int) -> bool:
    """Whether polars reads a field as one of the values. `int` alone would take 1_0 and 0x10, which polars does not."""
    form = rb" *[+-]?[0-9]{1,20}" if base == 10 else rb"\+?[0-9a-fA-F]{1,20}"
    return bool(re.fullmatch(form, field)) and int(field, base) in values
