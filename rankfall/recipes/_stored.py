# SPDX-License-Identifier: Apache-2.0
"""Rows of a data set in Parquet files: read a few pieces at a time, mixed, and the next ones while these are used."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from rankfall.recipes._optional import polars

Rows: TypeAlias = tuple[Tensor, Tensor]

PIECE = 1 << 15
"""Rows that are read together; files whose row groups have this size are read fastest."""

LABEL = "label"
"""The column of class labels; all others are int32 and make the inputs."""

_AT_ONCE = 32  # Pieces that are mixed: with the criteo recipe's 39 columns a million rows of 160 MB, held twice.


@dataclass(frozen=True)
class _Piece:
    path: Path
    start: int
    rows: int


@dataclass(frozen=True)
class StoredRows:
    """Rows in files, as many as there may be: what is held of them at any time does not grow with them.

    Attributes:
        pieces: Where they lie.
    """

    pieces: tuple[_Piece, ...]

    @classmethod
    def of(cls, files: Sequence[Path]) -> "StoredRows":
        """All rows of Parquet files, in their order.

        Raises:
            ValueError: If a file is missing or damaged at its end, where its size stands.
        """
        counts = [_count(path) for path in files]
        return cls(
            tuple(
                _Piece(path, start, min(PIECE, count - start))
                for path, count in zip(files, counts, strict=True)
                for start in range(0, count, PIECE)
            )
        )

    def __len__(self) -> int:
        return sum(piece.rows for piece in self.pieces)

    def first(self, rows: int | None) -> "StoredRows":
        """So many rows from the start; None keeps all."""
        if rows is None:
            return self
        kept: list[_Piece] = []
        for piece in self.pieces:
            if rows > 0:
                kept.append(replace(piece, rows=min(piece.rows, rows)))
            rows -= piece.rows
        return StoredRows(tuple(kept))

    def read(self) -> Rows:
        """All of them, in memory.

        Raises:
            ValueError: If a file is missing or damaged.
        """
        return _read(self.pieces)

    def labels(self) -> Iterator[Tensor]:
        """The labels of all of them, a piece at a time; no other column is read.

        Raises:
            ValueError: If a file is missing or damaged.
        """
        for piece in self.pieces:
            yield torch.tensor(_frame(piece, LABEL)[LABEL].to_numpy())

    def batches(self, size: int, *, shuffled: bool) -> DataLoader:
        """Batches of all rows, in a new order for each pass or in that of the files.

        Shuffled, pieces come in random order, and the rows of 32 of them, some million, are mixed. The order is drawn
        from torch's default generator by one number when a pass begins, so that a run which is resumed between two
        passes sees the rows that it would have seen.
        """
        return DataLoader(_Batches(self, size, shuffled), batch_size=None)


class _Batches(IterableDataset[Rows]):
    """Batches of stored rows, each gathered by one indexing from what is in memory."""

    def __init__(self, rows: StoredRows, size: int, shuffled: bool) -> None:
        self.rows, self.size, self.shuffled = rows, size, shuffled

    def __len__(self) -> int:
        return math.ceil(len(self.rows) / self.size)

    def __iter__(self) -> Iterator[Rows]:
        generator = torch.Generator()
        if self.shuffled:
            generator.manual_seed(int(torch.empty((), dtype=torch.int64).random_()))
        left: Rows | None = None
        for inputs, labels in self._read_ahead(generator):
            order = self._order(len(inputs), generator)
            # What the rows before left over comes first, so that only the last batch of all is smaller.
            cut = self.size - (0 if left is None else len(left[0]))
            for which in (order[:cut], *order[cut:].split(self.size)):
                batch = _joined(left, (inputs[which], labels[which]))
                left = None if len(batch[0]) == self.size else batch
                if left is None:
                    yield batch
        if left is not None and len(left[0]):
            yield left

    def _read_ahead(self, generator: torch.Generator) -> Iterator[Rows]:
        """A few pieces at a time; a thread reads the next ones meanwhile."""
        order = self._order(len(self.rows.pieces), generator).tolist()
        groups = [[self.rows.pieces[k] for k in order[i : i + _AT_ONCE]] for i in range(0, len(order), _AT_ONCE)]
        with ThreadPoolExecutor(1, "rankfall-rows") as reader:
            coming = None
            for group in groups:
                ready, coming = coming, reader.submit(_read, group)
                if ready is not None:
                    yield ready.result()
            if coming is not None:
                yield coming.result()

    def _order(self, count: int, generator: torch.Generator) -> Tensor:
        return torch.randperm(count, generator=generator) if self.shuffled else torch.arange(count)


def check_numbers(path: Path, limits: Mapping[str, int]) -> None:
    """Refuses a file where a number of a column is below 0, or not below the limit of that column.

    Row groups whose statistics rule it out are not read.

    Raises:
        ValueError: If there is one, a column is missing, or the file is missing or damaged.
    """
    col = polars().col
    outside = reduce(or_, ((col(name) < 0) | (col(name) >= limit) for name, limit in limits.items()))
    for row in _collected(path, lambda rows: rows.filter(outside).select(*limits).head(1)).to_dicts():
        name, number = next((n, v) for n, v in row.items() if v is not None and not 0 <= v < limits[n])
        raise ValueError(
            f"{path} holds {number:,} in column {name}, where numbers from 0 to {limits[name] - 1:,} are expected. "
            "Prepare the rows again."
        )


def _joined(one: Rows | None, other: Rows) -> Rows:
    return other if one is None else (torch.cat([one[0], other[0]]), torch.cat([one[1], other[1]]))


def _read(pieces: Sequence[_Piece]) -> Rows:
    labels = torch.empty(sum(piece.rows for piece in pieces), dtype=torch.int64)
    inputs, start = torch.empty(0, 0, dtype=torch.int32), 0
    for frame in map(_frame, pieces):
        if start == 0:  # Filled piece by piece, so that no row is held twice.
            inputs = inputs.new_empty(len(labels), frame.width - 1)
        end = start + len(frame)
        inputs.numpy()[start:end] = frame.drop(LABEL).to_numpy(order="c")
        labels.numpy()[start:end] = frame[LABEL].to_numpy()
        start = end
    return inputs, labels


def _count(path: Path) -> int:
    pl = polars()
    return _collected(path, lambda rows: rows.select(pl.len())).item()


def _frame(piece: _Piece, *columns: str) -> Any:  # noqa: ANN401  polars' frame
    pl = polars()
    chosen = columns or (pl.all(),)
    frame = _collected(piece.path, lambda rows: rows.select(*chosen).slice(piece.start, piece.rows))
    if len(frame) < piece.rows:
        raise ValueError(f"{piece.path} has fewer rows than before. Prepare the rows again.")
    return frame


def _collected(path: Path, ask: Callable[[Any], Any]) -> Any:  # noqa: ANN401  polars' frames
    pl = polars()
    try:
        return ask(pl.scan_parquet(path, glob=False)).collect()
    except (OSError, pl.exceptions.PolarsError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"{path} is missing or damaged: {reason}. Prepare the rows again.") from error
