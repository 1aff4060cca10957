# SPDX-License-Identifier: Apache-2.0
"""Rows in one pass over sorted ids, by compiled code: each from a chain, or of a table that is made block by block."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from rankfall._chain import chain_rows
from rankfall._compiled import is_unseen
from rankfall._einsum import Plan
from rankfall._machine import machine
from rankfall._row_library import PASS_CALL, Sizes, library, room, sizes_of
from rankfall._rows import Bags, Rows

# Fitted to what passes take, with their gradients.
_DOWN, _SIDE_BY_SIDE = 8, 12  # The block that is made at once: of a smaller one the time falls by the square root.
JOINING = 2.5e-5  # Seconds that it takes to call what joins factors for a pass.
_CACHED = 1 << 18  # Entries of a factor up to which it stays at hand.
_APART = 16  # Numbers moved in the time that it takes to ask memory for some that stand side by side.
_SORTED = 80  # Numbers moved in the time that it takes to sort an id among others.
_AHEAD, _IN_PLACE = 2, 3  # How much faster rows move that memory has been asked for; and that are made where they go.
_BLOCK = 1 << 15  # Numbers that a block of a table has, if one head has no more.
_SHORT = 4  # Numbers side by side that take twice as long to move as they would among many.
_PLAIN = Tensor, nn.Parameter  # Others may not be what their memory says.
_NEAR, _FAR = 8, 3  # How much faster a factor is read from the nearest caches, and from that beyond.


def has_compiled_rows(factors: Sequence[Tensor]) -> bool:
    """Whether compiled code can read rows of factors like these, ids aside."""
    return _are_like(factors) and _is_compiled(factors[0].dtype)


def may_pass(factors: Sequence[Tensor], ids: Tensor) -> bool:
    """The same for these ids, now."""
    return ids.is_cpu and is_unseen() and _are_like(factors, _PLAIN) and _is_compiled(factors[0].dtype)


def _are_like(factors: Sequence[Tensor], kinds: tuple[type, ...] | None = None) -> bool:
    """Whether they are of one type of numbers, on a CPU, and of these classes."""
    dtype = factors[0].dtype
    for factor in factors:  # In two thirds of the time that all() of a generator takes.
        if not factor.is_cpu or factor.dtype != dtype or (kinds and type(factor) not in kinds):
            return False
    return True


def _is_compiled(dtype: torch.dtype) -> bool:
    return library(dtype, in_blocks=False) is not None and library(dtype, in_blocks=True) is not None


def pass_plan(modes: Sequence[Sequence[int]], ranks: Sequence[int], ids: int) -> Plan:
    """What a pass over random ids takes: products, for as many rows as begin differently, and each id sorted and moved.

    Args:
        modes: Digits and columns of each factor.
        ranks: Of the bonds between them.
        ids: How many ids.
    """
    (beginnings, *_), (width, *_) = modes
    flops = calls = elements = 0
    for rank, after, digits, columns in zip(ranks, (*ranks[1:], 1), *(m[1:] for m in modes), strict=True):
        beginnings *= digits
        products = min(ids, beginnings)
        # Of the first two factors there is one product for all first digits that a second one occurs with.
        together = max(1, products // digits) if not calls else 1
        products //= together
        block = _at_least(width * together, _DOWN) * _at_least(columns * after, _SIDE_BY_SIDE)
        flops, calls = flops + round(2 * products * rank * block), calls + products
        if rank * digits * columns * after > _CACHED:
            elements += 2 * products * rank * (columns * after + _APART)
        width *= columns
    # One thread goes through them, while batches of products are shared out among all.
    found = machine()
    effort = torch.get_num_threads() * found.slowness_of_passes
    batched = round(effort * flops + calls * found.batched * PASS_CALL)
    moved = ids * width // _IN_PLACE + ids * _SORTED // _AHEAD
    return Plan((), batched, elements + moved, batched)


def blocks_plan(head: Sequence[int], rank: int, tail: Sequence[int], ids: int) -> Plan:
    """What it takes to make a table of two factors in blocks, only of heads that occur, and to move the rows of ids.

    Args:
        head: Digits and columns of the first factor.
        rank: Of the bond between them.
        tail: Digits and columns of the second factor.
        ids: How many ids.
    """
    heads, last = min(ids, head[0]), tail[0] * tail[1]
    effort = torch.get_num_threads() * machine().slowness_of_blocks
    flops = round(effort * 2 * heads * head[1] * rank * last)
    # All of the second factor is read for each block. Short pieces of a row take longer than a long one.
    blocks = -(-heads // max(1, _BLOCK // (head[1] * last)))
    read = blocks * rank * last // (_NEAR if rank * last <= _CACHED else _FAR)
    moved = ids * (head[1] * (tail[1] + _SHORT) + _SORTED) // _AHEAD
    return Plan((), flops, read + moved, flops)


def _at_least(size: int, whole: int) -> float:
    return math.sqrt(size * whole) if size < whole else float(size)


@dataclass(frozen=True)
class SortedRows(Rows):
    """The row of each id, made when it is known where it goes.

    Attributes:
        chain: What `chain_of` gives; of two factors, if the table is made in blocks.
        ids: The ids.
        width: Columns that are there; a chain may have a few more.
        gone: Ids whose row is zeros; None for none.
        after: None, as for `Rows`.
        in_blocks: Whether the table is made block by block.
    """

    chain: tuple[Tensor, ...]
    ids: Int[Tensor, "*ids"]
    width: int
    gone: Bool[Tensor, "*ids"] | None = None
    after: Tensor | None = None
    in_blocks: bool = False

    def without(self, id: int) -> "SortedRows":
        """As for `Rows`."""
        return self.with_zeros(self.ids == id)

    def with_zeros(self, which: Bool[Tensor, "*ids"] | None) -> "SortedRows":
        """As for `Rows`."""
        if which is None:
            return self
        return replace(self, gone=which if self.gone is None else self.gone | which)

    def taken(self) -> Float[Tensor, "*ids width"]:
        """As for `Rows`."""
        count = self.ids.numel()
        places = None if self.gone is None else torch.arange(count).masked_fill_(self.gone.flatten(), -1)
        rows = self._read(places, None, count)
        return rows if self.ids.dim() == 1 else rows.view(*self.ids.shape, self.width)

    def reduced(self, bags: Bags) -> Float[Tensor, "bags width"]:
        """As for `Rows`."""
        places, count = bags.places(self.ids)
        if bags.left_out is not None:
            places = places.masked_fill(self.ids.flatten() == bags.left_out, -1)
        there = places if self.gone is None else places.masked_fill(self.gone.flatten(), -1)
        sums = self._read(there, bags.weights, count)
        if bags.mode == "sum":
            return sums
        in_bags = torch.bincount(places + 1, minlength=count + 1)[1:]
        return sums / in_bags.clamp_min(1).unsqueeze(1)

    def _read(self, places: Tensor | None, weights: Tensor | None, count: int) -> Tensor:
        ids = self.ids.flatten().long().contiguous()  # One dimension may have gaps, flat as it is.
        weights = None if weights is None else weights.flatten().to(self.chain[0].dtype).contiguous()
        chain = [factor.contiguous() for factor in self.chain]
        if len(chain) == 1:
            chain = [chain[0].new_ones(1, 1, 1), chain[0].unsqueeze(0)]
        learns = torch.is_grad_enabled() and any(f.requires_grad for f in chain)
        how = _How(count, sizes_of(chain), self.in_blocks, learns)
        found: Tensor = _Read.apply(how, ids, places, weights, *chain)  # pyright: ignore
        return found if found.shape[1] == self.width else found[:, : self.width]


class _How(NamedTuple):
    """What `_Read` does.

    Attributes:
        outputs: How many rows there are, or sums.
        sizes: Of the chain.
        in_blocks: Whether the table is made block by block.
        learns: Whether gradients of factors may be asked for.
    """

    outputs: int
    sizes: Sizes
    in_blocks: bool
    learns: bool


class _Read(torch.autograd.Function):
    """Rows of `ids`, or sums of them by `places`, shape (outputs, columns of the chain)."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,  # noqa: ANN401  autograd's
        how: _How,
        ids: Tensor,
        places: Tensor | None,
        weights: Tensor | None,
        *chain: Tensor,
    ) -> Tensor:
        sizes, dtype = how.sizes, chain[0].dtype
        make = chain[0].new_empty if places is None else chain[0].new_zeros
        out, compiled = make(how.outputs, sizes.width), library(dtype, in_blocks=how.in_blocks)
        assert compiled is not None
        assert _are_like(chain), "compiled code would read past the end of narrower ones"
        order = compiled.order(sizes, ids, places)
        kept = room(sizes, order, dtype) if how.learns else None
        compiled.rows(sizes, chain, order, places, weights, out, kept)
        ctx.save_for_backward(order, ids, places, weights, kept, *chain)
        ctx.how = how
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401  autograd's  # pyright: ignore
        order, ids, places, weights, kept, *chain = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _differentiable(ids, places, weights, ctx.how.outputs, chain, gradient)
        how, gradient = ctx.how, gradient.contiguous()
        compiled = library(gradient.dtype, in_blocks=how.in_blocks)
        assert compiled is not None
        of_chain, of_weights = compiled.gradients(how.sizes, chain, order, places, weights, gradient, kept)
        return None, None, None, of_weights, *of_chain


def _differentiable(
    ids: Tensor, places: Tensor | None, weights: Tensor | None, count: int, chain: Sequence[Tensor], gradient: Tensor
) -> tuple[Tensor | None, ...]:
    """The gradients by torch, which can be asked for theirs."""
    rows = chain_rows(chain, ids)
    if weights is not None:
        rows = rows * weights.unsqueeze(1)
    if places is not None:
        there = places >= 0
        rows = rows.new_zeros(count, rows.shape[1]).index_add(0, places[there], rows[there])
    inputs = [*chain, *([] if weights is None else [weights])]
    wanted = [t for t in inputs if t.requires_grad]
    found = iter(torch.autograd.grad(rows, wanted, gradient, create_graph=True))
    of_inputs = [next(found) if t.requires_grad else None for t in inputs]
    return None, None, None, *(of_inputs[len(chain) :] or [None]), *of_inputs[: len(chain)]
