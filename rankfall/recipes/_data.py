# SPDX-License-Identifier: Apache-2.0
"""Rows of a data set, and the batches that they are given out in."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, Sampler, SequentialSampler

from rankfall.recipes._stored import Rows

PADDING = 0
"""The id of the token that fills up short texts."""

_BATCHES_SORTED = 50  # Texts of so many batches are sorted by length together: little padding, and still a mix.


class Source(Protocol):
    """Rows that are not all in memory at once: they are read or made when they are asked for."""

    def __len__(self) -> int: ...

    def first(self, rows: int | None) -> "Source":
        """So many rows from the start; None keeps all."""
        ...

    def batches(self, size: int, *, shuffled: bool) -> Iterable[Rows]:
        """Batches of one epoch, as often as it is iterated; an epoch of training may be a part of the rows."""
        ...


@dataclass(frozen=True)
class Data:
    """Inputs and class labels, in memory or not.

    Attributes:
        train: (inputs, labels) to learn from.
        test: (inputs, labels) to measure with.
        augment: Changes the inputs of a training batch at random.
        views: How many rows an augmented one counts as beside the prior.
        texts: Whether inputs are token ids, filled up with PADDING: batches are then of similar length, and cut to
            their longest text.
        clicks: Whether class 1 is an event that is rare, and its probability what is wanted.
        known: Figures that whoever made the rows reaches on the test rows.
    """

    train: Rows | Source
    test: Rows | Source
    augment: Callable[[Tensor], Tensor] | None = None
    views: int = 1
    texts: bool = False
    clicks: bool = False
    known: Mapping[str, Any] = field(default_factory=dict)

    def limited(self, rows: int | None) -> "Data":
        """The first `rows` training rows, and as many for testing; None keeps all."""
        return replace(self, train=_first(self.train, rows), test=_first(self.test, rows))

    def cut(self, length: int | None) -> "Data":
        """Texts cut to so many tokens; None keeps them.

        Raises:
            ValueError: If they are not so long.
        """
        if length is None:
            return self
        longest = self.train[0].shape[1] if isinstance(self.train, tuple) else length
        if length > longest:
            raise ValueError(f"--length must be {longest} tokens or fewer, got {length}. No more of a text is read.")
        return replace(self, train=_cut(self.train, length), test=_cut(self.test, length))

    @property
    def num_train(self) -> int:
        """Training rows."""
        return len(self.train[0] if isinstance(self.train, tuple) else self.train)

    @property
    def num_data(self) -> int:
        """The size of the training set that the bound is of: all views of all rows."""
        return self.views * self.num_train

    def batches(self, size: int) -> Iterable[Rows]:
        """Shuffled batches of the training rows, each gathered by one indexing."""
        return self._loader(self.train, size, shuffled=True, augment=self.augment)

    def test_batches(self, size: int) -> Iterable[Rows]:
        """Batches of the test rows."""
        return self._loader(self.test, size, shuffled=False, augment=None)

    def _loader(
        self, rows: Rows | Source, size: int, *, shuffled: bool, augment: Callable[[Tensor], Tensor] | None
    ) -> Iterable[Rows]:
        if not isinstance(rows, tuple):
            return rows.batches(size, shuffled=shuffled)
        gathered = _Gathered(rows, self.texts, augment)
        order = RandomSampler(gathered) if shuffled else SequentialSampler(gathered)
        sampler = (
            _OfSimilarLength(order, size, gathered.lengths, size * _BATCHES_SORTED if shuffled else len(gathered))
            if self.texts
            else _NoneAlone(order, size, drop_last=False)
        )
        return DataLoader(gathered, sampler=sampler, batch_size=None)


def _first(rows: Rows | Source, count: int | None) -> Rows | Source:
    return (rows[0][:count], rows[1][:count]) if isinstance(rows, tuple) else rows.first(count)


def _cut(rows: Rows | Source, length: int) -> Rows | Source:
    return (rows[0][:, :length], rows[1]) if isinstance(rows, tuple) else rows


class _Gathered(Dataset[Rows]):
    """Rows that are asked for by the batch; texts are cut to the longest of it."""

    def __init__(self, rows: Rows, texts: bool, augment: Callable[[Tensor], Tensor] | None) -> None:
        self.rows, self.augment = rows, augment
        self.lengths = (rows[0] != PADDING).sum(1).tolist() if texts else []

    def __len__(self) -> int:
        return len(self.rows[0])

    def __getitem__(self, which: list[int]) -> Rows:
        inputs, labels = self.rows[0][which], self.rows[1][which]
        if self.lengths:
            inputs = inputs[:, : max(1, *(self.lengths[k] for k in which))].long()
        return (inputs if self.augment is None else self.augment(inputs)), labels


class _NoneAlone(BatchSampler):
    """Batches of which none is a single row, which has no variance to be normalised by: it joins the batch before."""

    def __len__(self) -> int:
        return super().__len__() - self._joins

    def __iter__(self) -> Iterator[list[int]]:
        batches = super().__iter__()
        if self._joins:
            yield from islice(batches, len(self) - 1)
            batches = [[k for batch in batches for k in batch]]
        yield from batches

    @property
    def _joins(self) -> bool:
        rows = len(self.sampler)  # pyright: ignore[reportArgumentType]
        return rows > self.batch_size > 1 and rows % self.batch_size == 1


class _OfSimilarLength(Sampler[list[int]]):
    """Batches of texts of similar length: `chunk` rows are sorted at a time, and their batches shuffled."""

    def __init__(self, order: Sampler[int], size: int, lengths: Sequence[int], chunk: int) -> None:
        self.order, self.size, self.lengths, self.chunk = order, size, lengths, chunk

    def __len__(self) -> int:
        return math.ceil(len(self.lengths) / self.size)

    def __iter__(self) -> Iterator[list[int]]:
        rows, batches = list(self.order), []
        for start in range(0, len(rows), self.chunk):
            alike = sorted(rows[start : start + self.chunk], key=self.lengths.__getitem__)
            batches += [alike[k : k + self.size] for k in range(0, len(alike), self.size)]
        places = torch.randperm(len(batches)).tolist() if self.chunk < len(rows) else range(len(batches))
        return iter([batches[k] for k in places])
