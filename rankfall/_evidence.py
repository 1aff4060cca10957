# SPDX-License-Identifier: Apache-2.0
"""The evidence test: slices go when the bound on the evidence rises without them, beyond sampling error."""

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rankfall._elbo import check_weights
from rankfall._formats import CP, TR
from rankfall._losses import Agree, Batches, Losses, Verdict, weigh
from rankfall._memo import Memo
from rankfall._statistics import evaluating
from rankfall._tensor import LowRankTensor
from rankfall._walk import finite_tensors, layer_path, low_rank_tensors

_ROWS = "rows"
_ROWS_LEFT = (3 / 4, 1 / 2, 1 / 4, 1 / 8, 1 / 16)  # Parts of a table that are weighed, as far as less is better.

PerExampleNLL = Callable[[], Tensor]


@dataclass(frozen=True)
class RankChange:
    """One bond that the evidence test made smaller, or the rows of a table.

    Attributes:
        name: Path of the layer.
        bond: Name of the bond; "rows" for the rows of a table.
        before: Rank before, or rows.
        after: Rank after, or rows; rank 0 if the weight carries nothing that pays for itself.
        nll_cost: What the data loses by it, over all of `num_data`, in nats: the upper bound that was tested.
        saved: What the prior side gains by it, in nats, times beta.
    """

    name: str
    bond: str
    before: int
    after: int
    nll_cost: float
    saved: float


@dataclass(frozen=True)
class _Test:
    """The criterion N (mean(d) + z std(d) / sqrt(n)) < beta * saved, d paired per example."""

    batches: Batches
    num_data: int
    beta: float
    z: float
    agree: Agree
    memo: Memo

    def saved(self, before: float, tensor: LowRankTensor) -> float:
        """What the prior side gains by a tensor as it is, against what it charged before."""
        (value,) = self.agree([self.beta * (before - _worth(tensor, self.num_data))])
        return value

    def weigh(self, one: Losses, other: Losses, saved: float, z: float = 0.0) -> Verdict:
        """Whether the data lose less by `one` against `other` than is saved."""
        return weigh(one, other, self.num_data, saved, z, self.agree)

    def losses(self) -> Losses:
        """Those of the model as it is."""
        return Losses(self.batches, self.memo.filling)

    def checked_losses(self) -> Losses:
        """Those of the model as it is, of all examples, so that a refusal comes before any change."""
        losses = Losses([lambda batch=batch: _checked(batch()) for batch in self.batches], self.memo.filling)
        losses.first(sys.maxsize)
        if losses.count < 2:
            raise ValueError(_NOT_PER_EXAMPLE.format(f"shape ({losses.count},)"))
        return losses


_NOT_PER_EXAMPLE = (
    "nll must return the negative log likelihood of each example of one fixed batch, shape (n,) with n of 2 or more, "
    "got {}. Pass reduction='none' to torch's losses."
)


def _checked(values: object) -> Tensor:
    if not isinstance(values, Tensor) or values.dim() != 1:
        came = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(_NOT_PER_EXAMPLE.format(came))
    if not bool(torch.isfinite(values).all()):
        raise ValueError("nll returned NaN or infinity before any cut. Go back to a checkpoint, or check the batch.")
    return values


def select_ranks_(
    model: nn.Module,
    optimizer: Optimizer | None = None,
    *,
    nll: PerExampleNLL,
    num_data: int,
    beta: float = 1.0,
    z: float = 2.0,
    max_cut: float = 0.5,
) -> list[RankChange]:
    """Removes the slices without which the evidence lower bound is higher, in place: no threshold, no rank to pick.

    The slices of each low-rank tensor are made orthogonal and sorted, then its bonds are tried in turn. The weakest
    slices S of a bond go if

        num_data * ( mean(d) + z * std(d) / sqrt(n) )  <  beta * saved(S),   d_i = nll_i(without S) - nll_i(with S)

    where saved(S) is the fall of the KL of entries with rf.MeanField, and 1/2 log(num_data) per removed parameter
    (Laplace) with rf.Point. A bond goes to the rank at which saved(S) - num_data * mean(d) is largest, if that passes;
    it is found by bisection in at most about 2 log2 of the rank evaluations of `nll`. For CP and the ring, whose slices
    overlap, the candidate is the best tensor of the smaller rank (least squares on Gram matrices; the weight is never
    formed). All cuts of a tensor together have to pay for what turning its slices costs the KL. A tensor that loses
    nothing stays as it was, bit for bit.

    Of the tables of rf.nn.Embedding and EmbeddingBag the last rows are tried as well, by the same criterion, in steps
    of the leading digit: of ids that are numbered by frequency the rarest go, about which the data say too little to
    pay for numbers of their own. They read as zeros from then on.

    Call it between steps, once the training loss has settled: a model that has not learned yet is cut too far.

    Example:
        >>> x = torch.randn(400, 12)
        >>> y = x @ torch.randn(12, 1) @ torch.randn(1, 20)  # a weight of rank 1
        >>> y += 0.1 * torch.randn_like(y)
        >>> layer = rf.nn.Linear(12, 20, bias=False, format=rf.TT(2, in_modes=(12,), out_modes=(20,)))
        >>> optimizer = torch.optim.Adam(layer.parameters(), lr=2e-2)
        >>> def nll():
        ...     return ((layer(x) - y) / 0.1).square().sum(1) / 2
        >>> for _ in range(400):
        ...     optimizer.zero_grad()
        ...     (nll().mean() + rf.kl(layer) / 400).backward()
        ...     optimizer.step()
        >>> [(c.bond, c.before, c.after) for c in rf.select_ranks_(layer, optimizer, nll=nll, num_data=400)]
        [('r1', 2, 1)]

    Args:
        model: Any module; only low-rank tensors inside it change.
        optimizer: The optimizer that owns the factors, if there is one.
        nll: Called without arguments, in eval mode and without gradients; returns the negative log likelihood of each
            example of one fixed batch in nats, shape (n,). A few thousand examples are enough.
        num_data: Size of the training set.
        beta: Weight of the KL, as in training.
        z: How many standard errors the loss of likelihood is taken to be worse than measured. Raise it to cut less.
        max_cut: The largest part of a bond that one call may remove, above 0 and up to 1; a single slice may always go.
            Rows of a table may go as far as it pays.

    Returns:
        What was cut and why, in nats; empty if nothing was.

    Raises:
        ValueError: If an argument is out of range, `nll` returns something else, or a factor is not finite. Nothing
            has changed then.
    """
    found, _ = search_ranks_(model, optimizer, batches=[nll], num_data=num_data, beta=beta, z=z, max_cut=max_cut)
    return found


def search_ranks_(
    model: nn.Module,
    optimizer: Optimizer | None = None,
    *,
    batches: Batches,
    num_data: int,
    beta: float,
    z: float,
    max_cut: float,
    agree: Agree = list,
) -> tuple[list[RankChange], list[RankChange]]:
    """`select_ranks_`, and what nearly passed: of every other bond its best cut, with the cost that is expected.

    `batches` give the NLL of each example by the batch. As many of them are asked as a decision needs: most cuts cost
    far more, or far less, than they save, and the first ones say so. Where several processes search together, `batches`
    give the same numbers on each, and `agree` makes one number of those that each has worked out for itself.
    """
    check_weights(num_data, beta)
    if not z >= 0 or not 0 < max_cut <= 1:
        raise ValueError(f"z must be 0 or more and max_cut above 0 and up to 1, got z={z} and max_cut={max_cut}.")
    tensors = finite_tensors(model, "select ranks of")
    memo = Memo(model)
    test = _Test(memo.over(batches), num_data, beta, z, agree, memo)
    changes: list[RankChange] = []
    misses: list[RankChange] = []
    with torch.no_grad(), evaluating(model), memo.watching():
        base = test.checked_losses()
        for path, tensor in tensors:
            with memo.changing(tensor):
                found, missed, base = _select(tensor, layer_path(path), test, base, max_cut)
            if found:
                _apply(tensor, found, optimizer)
                memo.forget(tensor)
            changes += found
            misses += missed
    return changes, misses


def apply_(model: nn.Module, optimizer: Optimizer, change: RankChange) -> None:
    """Carries out a change that `search_ranks_` has found."""
    with torch.no_grad():
        _apply(_tensor_of(model, change), [change], optimizer)


def undo_(model: nn.Module, optimizer: Optimizer, change: RankChange) -> None:
    """Gives a bond its slices back, without a change of the function."""
    _tensor_of(model, change).grow_slices_(change.bond, change.before - change.after, optimizer)


def _tensor_of(model: nn.Module, change: RankChange) -> LowRankTensor:
    return next(tensor for path, tensor in finite_tensors(model, "cut") if layer_path(path) == change.name)


def prior_side(model: nn.Module, num_data: int, beta: float) -> float:
    """What all low-rank tensors cost apart from the data, in nats: their side of the evidence test."""
    with torch.no_grad():
        return sum(beta * _worth(tensor, num_data) for _, tensor in low_rank_tensors(model))


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


def _select(
    tensor: LowRankTensor, name: str, test: _Test, base: Losses, max_cut: float
) -> tuple[list[RankChange], list[RankChange], Losses]:
    """(cuts that pass, the others at their expected cost, losses with the cuts made)."""
    found: list[RankChange] = []
    missed: list[RankChange] = []
    before, uncut = _worth(tensor, test.num_data), base
    with _trying(tensor):
        tensor.align_()
        for bond, rank in tensor.ranks.items():
            if rank == 0:
                continue
            best = _best_rank(tensor, bond, test, base, rank - max(1, math.floor(rank * max_cut)))
            if best.passes:
                found.append(RankChange(name, bond, rank, best.rank, best.bound, best.saved))
                _reduce(tensor, bond, best.rank, None)
                base = test.losses()
            else:
                missed.append(RankChange(name, bond, rank, best.rank, best.cost, best.saved))
        if (cut := _cut_rows(tensor, name, test, base)) is not None:
            found.append(cut)
            _reduce(tensor, _ROWS, cut.after, None)
            base = test.losses()
        # Turning the slices has its price, since correlations of the posterior are dropped; cuts have to bear it too.
        saved = test.saved(before, tensor)
    if saved > sum(change.nll_cost for change in found):
        return found, missed, base
    return [], missed, uncut


def _cut_rows(tensor: LowRankTensor, name: str, test: _Test, base: Losses) -> RankChange | None:
    """The cut of a table's last rows for which saved - cost is expected to be largest, if it passes.

    Few sizes are tried: what a single row says is lost in sampling error, what a thousand of them say is not.
    """
    rows, each = tensor.rows, tensor.leading_rows
    sizes = {max(math.ceil(part * rows / each), 1) * each for part in _ROWS_LEFT}
    sizes = sorted((size for size in sizes if size < rows), reverse=True)
    if not tensor.may_lose_rows or 0 in tensor.ranks.values() or not sizes:
        return None
    at = _candidates(tensor, _ROWS, test)
    best, *others = map(at, sizes)
    for further in others:
        if not test.weigh(further.losses, best.losses, further.saved - best.saved).is_less:
            break
        best = further
    verdict = test.weigh(best.losses, base, best.saved, test.z)
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


def _best_rank(tensor: LowRankTensor, bond: str, test: _Test, base: Losses, least: int) -> _Weighed:
    """The rank, from `least` to one below the present, at which saved - cost is expected to be largest, by bisection.

    The smallest rank that passes would be too small: a slice that is worth keeping could go on the account of
    worthless ones that go with it.
    """
    at, single = _candidates(tensor, bond, test), tensor.ranks[bond] - 1

    def gains_more(one: _Candidate, losses: Losses, saved: float) -> bool:
        return test.weigh(one.losses, losses, one.saved - saved).is_less

    low, high = least, single
    # Most bonds lose nothing, so a single slice is tried first; bisection follows only if that pays.
    if not gains_more(at(single), base, 0.0):
        low = single
    while low < high:
        middle = (low + high) // 2
        if gains_more(at(middle), at(middle + 1).losses, at(middle + 1).saved):
            high = middle
        else:
            low = middle + 1
    best = at(high)
    verdict = test.weigh(best.losses, base, best.saved, test.z)
    return _Weighed(best.rank, verdict.expected, verdict.bound, best.saved, verdict.is_less)


def _candidates(tensor: LowRankTensor, bond: str, test: _Test) -> Callable[[int], _Candidate]:
    """Each rank of a bond, or number of rows, with what it saves and costs."""
    worth = _worth(tensor, test.num_data)

    @cache
    def at(size: int) -> _Candidate:
        with _trying(tensor):
            _reduce(tensor, bond, size, None)
            saved = test.saved(worth, tensor)
            held = partial(_holding, tensor, [p.data for p in tensor.parameters()])
        return _Candidate(size, saved, Losses(test.batches, held))

    return at


def _worth(tensor: LowRankTensor, num_data: int) -> float:
    """What the prior side charges for a tensor, in nats."""
    if len(tensor.log_stds):
        return tensor.entry_kl()
    return 0.5 * math.log(num_data) * sum(f.numel() for f in tensor.factors)


def _reduce(tensor: LowRankTensor, bond: str, rank: int, optimizer: Optimizer | None) -> None:
    """The tensor with a bond of a smaller rank: its strongest slices, refitted to the whole where they may overlap.

    Of the rows of a table the first ones stay.
    """
    if bond == _ROWS:
        tensor.keep_rows_(min(rank, tensor.rows), optimizer)
        return
    strongest = tensor.strengths(bond).argsort(descending=True, stable=True)[:rank].sort().values
    if isinstance(tensor.format, CP | TR) and rank and all(tensor.ranks.values()):
        tensor.refit_(bond, strongest, optimizer)
    else:
        tensor.keep_slices_(bond, strongest, optimizer)


def _apply(tensor: LowRankTensor, found: list[RankChange], optimizer: Optimizer | None) -> None:
    tensor.align_(optimizer)
    for change in found:
        _reduce(tensor, change.bond, change.after, optimizer)
