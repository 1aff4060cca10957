# SPDX-License-Identifier: Apache-2.0
"""The compiled functions of _sorted_rows.c and _block_rows.c, which take the same arguments."""

import ctypes
import math
from collections.abc import Sequence
from ctypes import c_int64, c_void_p
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from rankfall._compiled import Source, address, addresses, compiled

_REALS = {torch.float32: "float", torch.float64: "double"}
# Numbers side by side may be added up in any order, without which that cannot be done at once. Not all of -ffast-math,
# which would have the whole process take the smallest numbers for zero. What is long is written in vectors; compilers
# would make them of what is left over, too, and those loops are short.
_FLAGS = ("-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math", "-fno-tree-vectorize")
MOST_FACTORS, MOST_ROWS = 16, 1 << 61  # Of a table, padded ones included.
PASS_CALL = 3e-8
"""Seconds that each product of a pass takes besides its operations."""


_MOST_KEPT = 1 << 19  # Numbers: what is more is sooner made anew than read from memory.


@dataclass(frozen=True)
class Sizes:
    """Those of a chain.

    Attributes:
        factors: How many there are.
        lists: Digits, widths and ranks, as C reads them.
        width: Of a row.
        beginning: How many numbers the product of the first two factors has that is kept; 0 if it is a row.
    """

    factors: int
    lists: tuple["ctypes.Array[c_int64]", ...]
    width: int
    beginning: int


def sizes_of(chain: Sequence[Tensor]) -> Sizes:
    """The sizes of a chain.

    Args:
        chain: As for `Library.rows`.
    """
    return _sizes(*[factor.shape for factor in chain])


@lru_cache(maxsize=4096)
def _sizes(first: torch.Size, *others: torch.Size) -> Sizes:
    digits, widths = (first[0], *(shape[1] for shape in others)), (first[1], *(shape[2] for shape in others))
    ranks = (*(shape[0] for shape in others), 1)
    lists = tuple((c_int64 * len(digits))(*numbers) for numbers in (digits, widths, ranks))
    beginning = widths[0] * widths[1] * ranks[1] if len(digits) > 2 else 0
    return Sizes(len(digits), lists, math.prod(widths), beginning)


def room(sizes: Sizes, order: Tensor, dtype: torch.dtype) -> Tensor | None:
    """What the products of the first two factors of a chain can be kept in; None if there would be many.

    Args:
        sizes: Of the chain.
        order: As for `Library.rows`.
        dtype: The type of its numbers.
    """
    numbers = order.shape[0] * sizes.beginning
    return order.new_empty(numbers, dtype=dtype) if sizes.beginning and numbers <= _MOST_KEPT else None


class Library:
    """The functions of one of them for numbers of one type.

    Args:
        loaded: What has been compiled.
        dtype: Their type.

    Raises:
        ValueError: If what it gives is wrong.
    """

    def __init__(self, loaded: ctypes.CDLL, dtype: torch.dtype) -> None:
        one = c_void_p
        self._order, self._rows, self._gradients = loaded.order_of, loaded.rows, loaded.gradients_of_rows
        self._order.argtypes, self._order.restype = (c_int64, one, one, c_int64, one, one), c_int64
        self._rows.argtypes = (c_int64, one, one, one, c_int64, one, one, one, one, one, one)
        self._gradients.argtypes = (*self._rows.argtypes, one, one)
        _try(self, dtype)

    def order(self, sizes: Sizes, ids: Tensor, places: Tensor | None) -> Tensor:
        """The ids in the order in which they are gone through, without those that have no place: (key, number) of each.

        Args:
            sizes: Of the chain.
            ids: Row numbers, int64, without gaps.
            places: Less than 0 for a row that is left out, int64; None for no places.
        """
        count = ids.numel()
        order = ids.new_empty(count, 2)
        kept = self._order(count, ids.data_ptr(), address(places), sizes.factors, sizes.lists[0], order.data_ptr())
        _check(kept < 0)
        return order if kept == count else order[:kept]

    def rows(
        self,
        sizes: Sizes,
        chain: Sequence[Tensor],
        order: Tensor,
        places: Tensor | None,
        weights: Tensor | None,
        out: Tensor,
        kept: Tensor | None = None,
    ) -> None:
        """Writes the row of the k-th id to row k of `out`, or adds weights[k] times it to row places[k].

        Args:
            sizes: Of the chain.
            chain: Factors of shape (digits, width, rank), (rank, digits, width, rank), ..., (rank, digits, width), two
                or more; for a table in blocks there are two. All tensors are without gaps, and of the library's type.
            order: What `order` gives.
            places: As for `order`; None for no places.
            weights: None for 1.
            out: Holds zeros, if there are places.
            kept: What `room` gives, for `gradients`.
        """
        _check(self._rows(*_arguments(sizes, chain, order, places, weights), out.data_ptr(), address(kept)))

    def gradients(
        self,
        sizes: Sizes,
        chain: Sequence[Tensor],
        order: Tensor,
        places: Tensor | None,
        weights: Tensor | None,
        gradient: Tensor,
        kept: Tensor | None = None,
    ) -> tuple[list[Tensor], Tensor | None]:
        """Those of the factors, and of the weights if there are any, from the gradient of `out`."""
        of_factors = [torch.empty_like(factor) for factor in chain]
        of_weights = None if weights is None else torch.zeros_like(weights)
        found = addresses(of_factors), address(of_weights), address(kept)
        _check(self._gradients(*_arguments(sizes, chain, order, places, weights), gradient.data_ptr(), *found))
        return of_factors, of_weights


def _arguments(
    sizes: Sizes, chain: Sequence[Tensor], order: Tensor, places: Tensor | None, weights: Tensor | None
) -> tuple[Any, ...]:
    of_ids = order.shape[0], order.data_ptr(), address(places), address(weights)
    return *of_ids, sizes.factors, *sizes.lists, addresses(chain)


def _check(failed: int) -> None:
    if failed:
        raise MemoryError("no memory for the product of a table's factors.")


def library(dtype: torch.dtype, *, in_blocks: bool = False) -> Library | None:
    """The functions for numbers of a type; None for others than float32 and float64, and as `compiled` says.

    Args:
        dtype: The type.
        in_blocks: Whether those that make a table of two factors block by block, else those that make row by row.
    """
    return _library(dtype, in_blocks)


@cache
def _library(dtype: torch.dtype, in_blocks: bool) -> Library | None:
    if dtype not in _REALS:
        return None
    name = "_block_rows.c" if in_blocks else "_sorted_rows.c"
    source = Source(name, (f"-DREAL={_REALS[dtype]}", *_FLAGS), ("_id_order.h", "_row_blocks.h"))
    return compiled(source, partial(Library, dtype=dtype), "rows of tables are read by torch")


def _try(found: Library, dtype: torch.dtype) -> None:
    """Raises ValueError unless a small product is right, with its gradients."""
    first = torch.arange(12, dtype=dtype, device="cpu").view(2, 2, 3)
    last = torch.arange(60, dtype=dtype, device="cpu").view(3, 4, 5)
    ids = torch.tensor([7, 0, 7], device="cpu")
    sizes = sizes_of((first, last))
    order = found.order(sizes, ids, None)
    out, gradient = first.new_empty(3, 10), first.new_ones(3, 10)
    found.rows(sizes, (first, last), order, None, None, out)
    wanted = torch.einsum("nar,rnb->nab", first[ids // 4], last[:, ids % 4]).flatten(1)
    (of_first, of_last), _ = found.gradients(sizes, (first, last), order, None, None, gradient)
    row = last.sum(2)[:, ids % 4].T
    wanted_first = torch.zeros_like(first).index_add_(0, ids // 4, row.unsqueeze(1).expand(-1, 2, -1))
    sums = first.sum(1)[ids // 4].T.unsqueeze(2).expand(-1, -1, 5)
    wanted_last = torch.zeros_like(last).index_add_(1, ids % 4, sums)
    pairs = ((out, wanted), (of_first, wanted_first), (of_last, wanted_last))
    if not all(torch.equal(a, b) for a, b in pairs):
        raise ValueError("its results are wrong")
