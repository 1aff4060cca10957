# SPDX-License-Identifier: Apache-2.0
"""Cuts of one low-rank tensor: which of its slices, or rows, cost the data less than they cost the prior side."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import NamedTuple

from torch import Tensor
from torch.optim import Optimizer

from rankfall._formats import CP, TR
from rankfall._losses import Agree, Batches, Halfway, Losses, Verdict, weigh
from rankfall._memo import Memo
from rankfall._tensor import LowRankTensor

_ROWS = "rows"
_BARE_MENTION = 1.0  # Nats of evidence that are "not worth more than a bare mention" (Kass, Raftery 1995, section 3.2).
_BIT = 0.05  # Part of a slice small enough for a derivative, and large enough to be seen in a KL in float32.
_ROWS_LEFT = (3 / 4, 1 / 2, 1 / 4, 1 / 8, 1 / 16)  # Parts of a table that are weighed, as far as less is better.


@dataclass(frozen=True)
class RankChange:
    """One bond that the evidence test made smaller, or the rows of a table.

    Attributes:
        name: Path of the layer.
        bond: Name of the bond; "rows" for the rows of a table.
        before: Rank before, or rows.
        after: Rank after, or rows; rank 0 if the weight carries nothing that pays for itself.
        nll_cost: What the data loses by it, over all of `num_data`, in nats: the upper bound that was tested.
        saved: What the prior side gains by it, in nats, times beta, and that part of one nat which went of the bond or
            of the rows.
    """

    name: str
    bond: str
    before: int
    after: int
    nll_cost: float
    saved: float


@dataclass(frozen=True)
class Criterion:
    """The criterion that `rf.select_ranks_` states: its numbers, the data, and what other processes say."""

    batches: Batches
    num_data: int
    beta: float
    z: float
    agree: Agree
    memo: Memo

    def saved(self, before: float, tensor: LowRankTensor, gone: float) -> float:
        """What the prior side gains by a tensor as it is, against what it charged before.

        For a whole bond that goes a nat comes on top, and for a part of it that part: slices that have come to rest at
        the prior cost nothing and tell nothing, and without it noise would decide.
        """
        (value,) = self.agree([self.beta * (before - price_of(tensor, self.num_data))])
        return value + _BARE_MENTION * gone

    def weigh(
        self,
        one: Losses,
        other: Losses,
        saved: float,
        z: float = 0.0,
        between: Callable[[], Halfway] | None = None,
    ) -> Verdict:
        """Whether the data lose less by `one` against `other` than is saved."""
        return weigh(one, other, self.num_data, saved, z, self.agree, between)

    def losses(self) -> Losses:
        """Those of the model as it is."""
        return Losses(self.batches, self.memo.filling)


@contextmanager
def _trying(tensor: LowRankTensor) -> Iterator[None]:
    """Whatever happens to data and gradients inside is undone, bit for bit."""
    parameters = list(tensor.parameters())
    before = [(p.data, p.grad) for p in parameters]
    for p in parameters:
        p.data = p.data.clone()
    try:
        yield
    finally:
        for p, (data, grad) in zip(parameters, before, strict=True):
            p.grad = None
            p.data = data
            p.grad = grad


@contextmanager
def _holding(tensor: LowRankTensor, data: Sequence[Tensor]) -> Iterator[None]:
    """The tensor with other numbers, for a while."""
    with _trying(tensor):
        for p, values in zip(tensor.parameters(), data, strict=True):
            p.grad = None
            p.data = values
        yield


class Cuts(NamedTuple):
    """Cuts of a tensor that pass, the others at their expected cost, and the losses with the cuts made.

    Attributes:
        moved: Whether slices are aligned before the cuts and refitted at them, or stay as they are.
    """

    found: list[RankChange]
    missed: list[RankChange]
    losses: Losses
    moved: bool


def least_rank(rank: int, max_cut: float) -> int:
    """The lowest rank that a bond may go to in one test.

    Example:
        >>> least_rank(8, 0.5), least_rank(1, 0.5), least_rank(8, 1.0)
        (4, 0, 0)
    """
    return rank - max(1, math.floor(rank * max_cut))


def select(tensor: LowRankTensor, name: str, criterion: Criterion, base: Losses, max_cut: float) -> Cuts:
    """What of a tensor can go: tried with slices moved first, so that those that go take least with them.

    Moving has its price, since correlations of the posterior are dropped and refitted means are larger; cuts have to
    bear it too. Slices that have come to rest at the prior cannot, and go as they are.
    """
    before, missed = price_of(tensor, criterion.num_data), []
    for moved in (True, False):
        with _trying(tensor):
            if moved:
                tensor.align_()
            cuts = _search(tensor, name, criterion, base, max_cut, moved=moved)
            saved = criterion.saved(before, tensor, sum(1 - change.after / change.before for change in cuts.found))
        missed = missed or cuts.missed
        pays = saved > sum(change.nll_cost for change in cuts.found)
        if cuts.found and pays:
            return cuts._replace(missed=missed)
        if not cuts.found and not isinstance(tensor.format, CP | TR):
            break
    return Cuts([], missed, base, moved=False)


def _search(
    tensor: LowRankTensor, name: str, criterion: Criterion, base: Losses, max_cut: float, *, moved: bool
) -> Cuts:
    """Tries the bonds of a tensor in turn, and makes it smaller on the way."""
    found: list[RankChange] = []
    missed: list[RankChange] = []
    for bond, rank in tensor.ranks.items():
        if 0 in tensor.ranks.values():
            break
        at = _candidates(tensor, bond, criterion, moved=moved)
        best = _best_rank(at, rank, criterion, base, least_rank(rank, max_cut))
        if best.passes:
            found.append(RankChange(name, bond, rank, best.rank, best.bound, best.saved))
            _reduce(tensor, bond, best.rank, None, moved=moved)
            base = criterion.losses()
        else:
            missed.append(RankChange(name, bond, rank, best.rank, best.cost, best.saved))
    if 0 in tensor.ranks.values():
        found += _rest_of_nothing(tensor, name, criterion, moved=moved)
        missed = []
    # What a row says depends on the slices that are left, and rows do not come back: so they go after the slices.
    if not found and (cut := _cut_rows(tensor, name, criterion, base)) is not None:
        found.append(cut)
        _reduce(tensor, _ROWS, cut.after, None, moved=moved)
        base = criterion.losses()
    return Cuts(found, missed, base, moved)


def _rest_of_nothing(tensor: LowRankTensor, name: str, criterion: Criterion, *, moved: bool) -> list[RankChange]:
    """What is left of a weight with a bond of rank 0 goes too: it is zero all the same, and nobody need be asked."""
    found = []
    for bond, rank in tensor.ranks.items():
        if rank > 0:
            saved = _candidates(tensor, bond, criterion, moved=moved)(0).saved
            found.append(RankChange(name, bond, rank, 0, 0.0, saved))
            _reduce(tensor, bond, 0, None, moved=moved)
    return found


def _cut_rows(tensor: LowRankTensor, name: str, criterion: Criterion, base: Losses) -> RankChange | None:
    """The cut of a table's last rows for which saved - cost is expected to be largest, if it passes.

    Few sizes are tried: what a single row says is lost in sampling error, what a thousand of them say is not.
    """
    rows, each = tensor.rows, tensor.leading_rows
    sizes = {max(math.ceil(part * rows / each), 1) * each for part in _ROWS_LEFT}
    sizes = sorted((size for size in sizes if size < rows), reverse=True)
    if not tensor.may_lose_rows or 0 in tensor.ranks.values() or not sizes:
        return None
    at = _candidates(tensor, _ROWS, criterion, moved=False)
    best, *others = map(at, sizes)
    for further in others:
        if not criterion.weigh(further.losses, best.losses, further.saved - best.saved).is_less:
            break
        best = further
    verdict = criterion.weigh(best.losses, base, best.saved, criterion.z)
    return RankChange(name, _ROWS, rows, best.rank, verdict.bound, best.saved) if verdict.is_less else None


class _Weighed(NamedTuple):
    rank: int
    cost: float
    bound: float
    saved: float
    passes: bool


class _Candidate(NamedTuple):
    rank: int
    saved: float
    losses: Losses
    between: Callable[[], Halfway] | None


def _best_rank(at: Callable[[int], _Candidate], rank: int, criterion: Criterion, base: Losses, least: int) -> _Weighed:
    """The rank, from `least` to one below the present, at which saved - cost is expected to be largest, by bisection.

    The smallest rank that passes would be too small: a slice that is worth keeping could go on the account of
    worthless ones that go with it.
    """
    single = rank - 1

    def gains_more(one: _Candidate, than: _Candidate) -> bool:
        return criterion.weigh(one.losses, than.losses, one.saved - than.saved, between=_between(one, than)).is_less

    low, high = least, single
    # Most bonds lose nothing, so a single slice is tried first; the others follow only if that pays.
    if not criterion.weigh(at(single).losses, base, at(single).saved, between=at(single).between).is_less:
        low = single
    elif least < single:
        # Slices at rest at the prior tell nothing: where all that may go cost less than one of them saves, they go.
        most = at(least)
        verdict = criterion.weigh(most.losses, base, most.saved, criterion.z, most.between)
        if verdict.bound < most.saved - at(least + 1).saved:
            return _Weighed(least, verdict.expected, verdict.bound, most.saved, verdict.is_less)
    while low < high:
        middle = (low + high) // 2
        if gains_more(at(middle), at(middle + 1)):
            high = middle
        else:
            low = middle + 1
    best = at(high)
    verdict = criterion.weigh(best.losses, base, best.saved, criterion.z, best.between)
    return _Weighed(best.rank, verdict.expected, verdict.bound, best.saved, verdict.is_less)


def _between(one: _Candidate, other: _Candidate) -> Callable[[], Halfway] | None:
    first, second = one.between, other.between
    return None if first is None or second is None else lambda: first().less(second())


def _candidates(tensor: LowRankTensor, bond: str, criterion: Criterion, *, moved: bool) -> Callable[[int], _Candidate]:
    """Each rank of a bond, or number of rows, with what it saves and costs."""
    before, whole = price_of(tensor, criterion.num_data), tensor.rows if bond == _ROWS else tensor.ranks[bond]

    @cache
    def at(size: int) -> _Candidate:
        with _trying(tensor):
            _reduce(tensor, bond, size, None, moved=moved)
            saved = criterion.saved(before, tensor, 1 - size / whole)
            held = partial(_holding, tensor, [p.data for p in tensor.parameters()])
        straight = bond != _ROWS and not _refits(tensor, size, moved=moved) and len(tensor.log_stds)
        between = cache(partial(_halfway, tensor, bond, size, criterion)) if straight else None
        return _Candidate(size, saved, Losses(criterion.batches, held), between)

    return at


def _halfway(tensor: LowRankTensor, bond: str, size: int, criterion: Criterion) -> Halfway:
    """The tensor with the slices that are to go at half their size, and what the data lose by the first bit of them."""
    weakest = tensor.strengths(bond).argsort(descending=True, stable=True)[size:]
    before = price_of(tensor, criterion.num_data)
    with _trying(tensor):
        _scale(tensor, bond, weakest, 1 - _BIT)
        (slope,) = criterion.agree([criterion.beta * (before - price_of(tensor, criterion.num_data)) / _BIT])
    with _trying(tensor):
        _scale(tensor, bond, weakest, 0.5)
        held = partial(_holding, tensor, [p.data for p in tensor.parameters()])
    return Halfway(Losses(criterion.batches, held), slope)


def _scale(tensor: LowRankTensor, bond: str, slices: Tensor, by: float) -> None:
    """Scales the means of what slices add to a tensor; all factors that bear them take an equal part in it."""
    places = tensor.layout.places(bond)
    for factor, dim in places:
        means = tensor.factors[factor].data
        means.index_copy_(dim, slices, means.index_select(dim, slices) * by ** (1 / len(places)))


def price_of(tensor: LowRankTensor, num_data: int) -> float:
    """What the prior side charges for a tensor, in nats."""
    if len(tensor.log_stds):
        return tensor.entry_kl()
    return 0.5 * math.log(num_data) * sum(f.numel() for f in tensor.factors)


def _reduce(tensor: LowRankTensor, bond: str, rank: int, optimizer: Optimizer | None, *, moved: bool) -> None:
    """The tensor with a bond of a smaller rank: its strongest slices, refitted to the whole where they may overlap.

    Of the rows of a table the first ones stay.
    """
    if bond == _ROWS:
        tensor.keep_rows_(min(rank, tensor.rows), optimizer)
        return
    strongest = tensor.strengths(bond).argsort(descending=True, stable=True)[:rank].sort().values
    if _refits(tensor, rank, moved=moved):
        tensor.refit_(bond, strongest, optimizer)
    else:
        tensor.keep_slices_(bond, strongest, optimizer)


def _refits(tensor: LowRankTensor, rank: int, *, moved: bool) -> bool:
    """Whether the slices that stay take over what they can from those that go."""
    return moved and isinstance(tensor.format, CP | TR) and rank > 0 and all(tensor.ranks.values())


def apply_cuts_(tensor: LowRankTensor, found: list[RankChange], optimizer: Optimizer | None, *, moved: bool) -> None:
    """Carries out cuts that were found together."""
    if moved:
        tensor.align_(optimizer)
    for change in found:
        _reduce(tensor, change.bond, change.after, optimizer, moved=moved)
