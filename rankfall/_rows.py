# SPDX-License-Identifier: Apache-2.0
"""Rows that were read of a low-rank matrix, on their way to what a layer gives: each alone, or reduced over bags."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rankfall._products import product

_MANY = 4096  # Ids at which a function of our own has paid for its call.


def may_look_at(values: Tensor) -> bool:
    """Whether a decision may hang on what a tensor holds: no graph has it, and the host would wait for a GPU."""
    return values.is_cpu and not torch.compiler.is_compiling()


@dataclass(frozen=True)
class Bags:
    """Which ids belong together, and how they are reduced.

    Attributes:
        offsets: Where each bag begins among ids of one dimension; None for ids of shape (bags, n).
        with_last: Whether `offsets` ends with the number of ids.
        mode: "sum" or "mean".
        left_out: An id that is left out of every bag; None leaves out none.
        weights: A weight for each id, of the shape of the ids; None for 1.
    """

    offsets: Int[Tensor, " offsets"] | None
    with_last: bool
    mode: str
    left_out: int | None
    weights: Float[Tensor, "*ids"] | None

    def places(self, ids: Int[Tensor, "*ids"]) -> tuple[Int[Tensor, " n"], int]:
        """The bag of each id, -1 for what lies behind a last offset and is in none; and the number of bags."""
        if self.offsets is None:
            count, size = ids.shape
            return torch.arange(count, device=ids.device).repeat_interleave(size), count
        sizes = _sizes(self.offsets, len(ids), self.with_last)
        bags = torch.repeat_interleave(sizes.long())
        behind = len(ids) - len(bags)
        return F.pad(bags, (0, behind), value=-1) if behind else bags, len(sizes)


def _sizes(offsets: Int[Tensor, " offsets"], ids: int, with_last: bool) -> Int[Tensor, " bags"]:
    """How many ids each bag has."""
    ends = offsets[1:] if with_last else torch.cat([offsets[1:], offsets.new_tensor([ids])])
    return ends - offsets[: len(ends)]


class Rows(ABC):
    """What the rows of ids are taken from.

    Attributes:
        after: The matrix that rows, or sums of them, are multiplied by at last, (rank, width); or None.
    """

    after: Tensor | None

    @abstractmethod
    def without(self, id: int) -> "Rows":
        """The same with zeros for an id, which then learns nothing."""

    @abstractmethod
    def with_zeros(self, which: Bool[Tensor, "*ids"] | None) -> "Rows":
        """The same with a row of zeros for the ids that `which` marks; None marks none."""

    @abstractmethod
    def taken(self) -> Float[Tensor, "*ids width"]:
        """The row of each id."""

    @abstractmethod
    def reduced(self, bags: Bags) -> Float[Tensor, "bags width"]:
        """The sum or mean of the rows of each bag; zeros for an empty one."""

    def widened(self, read: Tensor) -> Tensor:
        """Rows, or sums of them, as rows of the whole matrix."""
        return read if self.after is None else product(read, self.after, varies=True)


@dataclass(frozen=True)
class TableRows(Rows):
    """A small table, and where in it the row of each id stands.

    Attributes:
        table: Shape (n, width), or (n, rank) if `after` is there.
        places: The row of the table for each id, of the shape of the ids.
        after: As for `Rows`.
        distinct: The id of each row of the table, in order; None if all ids are there, by `strides`.
        strides: Id = first * strides[1] + second stands at second * strides[0] + first.
    """

    table: Tensor
    places: Tensor
    after: Tensor | None
    distinct: Tensor | None
    strides: tuple[int, int] = (1, 1)

    def without(self, id: int) -> "TableRows":
        """As for `Rows`."""
        if self.distinct is None:
            its = torch.arange(len(self.table), device=self.table.device) == self._place(id)
        else:
            its = self.distinct == id
        table = self.table.masked_fill(its.unsqueeze(1), 0.0)
        return TableRows(table, self.places, self.after, self.distinct, self.strides)

    def with_zeros(self, which: Bool[Tensor, "*ids"] | None) -> "TableRows":
        """As for `Rows`; those ids stand for one more row."""
        if which is None:
            return self
        places = torch.where(which, len(self.table), self.places)
        return TableRows(F.pad(self.table, (0, 0, 0, 1)), places, self.after, self.distinct, self.strides)

    def taken(self) -> Float[Tensor, "*ids width"]:
        """As for `Rows`."""
        if _adds_faster(self.table, self.places) or _adds_in_any_order(self.table):
            rows: Tensor = _Taken.apply(self.table, self.places.flatten())  # pyright: ignore
            return rows.view(*self.places.shape, self.table.shape[1])
        return F.embedding(self.places, self.table)

    def reduced(self, bags: Bags) -> Float[Tensor, "bags width"]:
        """As for `Rows`."""
        offsets = None if bags.offsets is None else bags.offsets.to(self.places.dtype)
        if bags.left_out is None and bags.weights is None and _adds_faster(self.table, self.places):
            sums: Tensor = _Reduced.apply(self.table, self.places, offsets, bags.mode, bags.with_last)  # pyright: ignore
            return sums
        return F.embedding_bag(
            self.places,
            self.table,
            offsets,
            mode=bags.mode,
            per_sample_weights=None if bags.weights is None else bags.weights.to(self.table.dtype),
            include_last_offset=bags.with_last,
            padding_idx=None if bags.left_out is None else self._place(bags.left_out),
        )

    def _place(self, id: int) -> int | None:
        """Where an id stands in the table; None if it is not there."""
        if self.distinct is None:
            return id % self.strides[1] * self.strides[0] + id // self.strides[1]
        place = int(torch.searchsorted(self.distinct, id))
        return place if place < len(self.distinct) and int(self.distinct[place]) == id else None


def _adds_faster(table: Tensor, places: Tensor) -> bool:
    """Whether gradients of rows are added faster by our own functions than by torch's, which make many threads work."""
    return may_look_at(table) and torch.get_num_threads() == 1 and places.numel() >= _MANY


def _adds_in_any_order(table: Tensor) -> bool:
    """Whether a GPU adds gradients of rows by atomic operations, as they come: torch sorts the ids first."""
    as_ever = torch.compiler.is_compiling() or torch.are_deterministic_algorithms_enabled()
    # Narrower numbers torch adds up in float32.
    return table.device.type == "cuda" and table.dtype.itemsize >= 4 and not as_ever


class _Taken(torch.autograd.Function):
    """table[places], the gradient added up row by row.

    On one thread that takes two thirds of the time of F.embedding's, which is shared out among several threads; on a
    GPU, from 2,048 ids on, a fifth to three fifths of it.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(table: Tensor, places: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return table.index_select(0, places)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:  # noqa: ANN401  autograd's
        ctx.save_for_backward(inputs[1])
        ctx.rows = len(inputs[0])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401  # pyright: ignore
        (places,) = ctx.saved_tensors
        # Rows that lie apart, as those of a stack do, would be added one small call at a time.
        return gradient.new_zeros(ctx.rows, gradient.shape[1]).index_add_(0, places, gradient.contiguous()), None


class _Reduced(torch.autograd.Function):
    """F.embedding_bag, the gradient added up row by row, in two fifths of the time of its own."""

    generate_vmap_rule = True

    @staticmethod
    def forward(table: Tensor, places: Tensor, offsets: Tensor | None, mode: str, with_last: bool) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return F.embedding_bag(places, table, offsets, mode=mode, include_last_offset=with_last)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ANN401  autograd's
        table, places, offsets, ctx.mode, ctx.with_last = inputs
        ctx.save_for_backward(places, offsets)
        ctx.rows = len(table)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401  # pyright: ignore
        places, offsets = ctx.saved_tensors
        if offsets is None:
            sizes = places.new_full((len(places),), places.shape[1])
        else:
            sizes = _sizes(offsets, len(places), ctx.with_last)
        if ctx.mode == "mean":
            gradient = gradient / sizes.clamp_min(1).unsqueeze(1)
        bags = torch.repeat_interleave(torch.arange(len(sizes), device=sizes.device), sizes)
        of_each = gradient.index_select(0, bags)
        # What lies behind a last offset is in no bag.
        summed = gradient.new_zeros(ctx.rows, gradient.shape[1])
        return summed.index_add_(0, places.flatten()[: len(of_each)], of_each), None, None, None, None


@dataclass(frozen=True)
class OwnRows(Rows):
    """A row for each id as they came, equal ones too: how many differ is known on the device alone.

    Attributes:
        rows: Shape (number of ids, width), or (number of ids, rank) if `after` is there.
        ids: The ids.
        after: As for `Rows`.
    """

    rows: Tensor
    ids: Int[Tensor, "*ids"]
    after: Tensor | None

    def without(self, id: int) -> "OwnRows":
        """As for `Rows`."""
        return self.with_zeros(self.ids == id)

    def with_zeros(self, which: Bool[Tensor, "*ids"] | None) -> "OwnRows":
        """As for `Rows`."""
        if which is None:
            return self
        return OwnRows(self.rows.masked_fill(which.reshape(-1, 1), 0.0), self.ids, self.after)

    def taken(self) -> Float[Tensor, "*ids width"]:
        """As for `Rows`."""
        return self.rows.view(*self.ids.shape, self.rows.shape[1])

    def reduced(self, bags: Bags) -> Float[Tensor, "bags width"]:
        """As for `Rows`."""
        rows, counted = self.taken(), self.rows.new_ones(*self.ids.shape, 1)
        if bags.left_out is not None:
            counted = (self.ids != bags.left_out).unsqueeze(-1).to(rows.dtype)
            rows = rows * counted
        if bags.weights is not None:
            rows = rows * bags.weights.unsqueeze(-1).to(rows.dtype)
        total = self._summed(rows, bags)
        return total if bags.mode == "sum" else total / self._summed(counted, bags).clamp_min(1)

    def _summed(self, rows: Tensor, bags: Bags) -> Tensor:
        if bags.offsets is None:
            return rows.sum(1)
        places = torch.arange(len(rows), device=rows.device, dtype=bags.offsets.dtype)
        of = torch.searchsorted(bags.offsets, places, right=True) - 1
        # What lies behind a last offset is in no bag.
        return rows.new_zeros(len(bags.offsets), rows.shape[1]).index_add(0, of, rows)[
            : len(bags.offsets) - bags.with_last
        ]
