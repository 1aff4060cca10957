# SPDX-License-Identifier: Apache-2.0
"""The evidence test: slices go when the bound on the evidence rises without them, beyond sampling error."""

import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rankfall._cuts import Criterion, RankChange, apply_cuts_, price_of, select
from rankfall._elbo import check_weights
from rankfall._losses import Agree, Batches, Losses
from rankfall._memo import Memo
from rankfall._statistics import evaluating
from rankfall._tensor import LowRankTensor
from rankfall._walk import finite_tensors, layer_path, low_rank_tensors

PerExampleNLL = Callable[[], Tensor]

_NOT_PER_EXAMPLE = (
    "nll must return the negative log likelihood of each example of one fixed batch, shape (n,) with n of 2 or more, "
    "got {}. Pass reduction='none' to torch's losses."
)


def _checked_losses(criterion: Criterion) -> Losses:
    """The losses of the model as it is, of all examples, so that a refusal comes before any change."""
    batches = [lambda batch=batch: _checked(batch()) for batch in criterion.batches]
    losses = Losses(batches, criterion.memo.filling)
    losses.first(sys.maxsize)
    if losses.count < 2:
        raise ValueError(_NOT_PER_EXAMPLE.format(f"shape ({losses.count},)"))
    return losses


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
    slices S of a bond, a part p of it, go if

        num_data * ( mean(d) + z * std(d) * sqrt(1/n - 1/num_data) )  <  beta * saved(S) + p

    with d_i = nll_i(without S) - nll_i(with S), and saved(S) the fall of the KL of entries with rf.MeanField, or
    1/2 log(num_data) per removed parameter (Laplace) with rf.Point. The n examples are drawn from the training set, so
    nothing is uncertain once all of it is asked. A whole bond has to be worth a nat, less than which is "not worth more
    than a bare mention" (Kass, Raftery 1995): slices that have come to rest at the prior cost nothing and tell nothing,
    and would otherwise stay or go by chance.

    Of many million examples a sample tells little about a weak slice: its share in d_i has either sign, and their sum
    is far below the margin. Where that leaves doubt, and slices have standard deviations, d is also taken with S at
    half its size. The part of d that is linear in S then drops out; its mean over all of the training set is known
    where the bound is at rest: what the KL gains by the first bit of S that goes, times beta. What is left, of second
    order in S, has the smaller margin by far (a control variate: Owen, Monte Carlo theory, methods and examples,
    section 8.9). Parts of third order are neglected, so this decides only where it halves the standard error at least
    and does not contradict the plain mean by more than four of them.

    A bond goes to the rank at which saved(S) - num_data * mean(d) is largest, if that passes; it is found by bisection
    in at most about 2 log2 of the rank evaluations of `nll`, or in two where all that may go tells nothing. For CP and
    the ring, whose slices overlap, the candidate is the best tensor of the smaller rank (least squares on Gram
    matrices; the weight is never formed). All cuts of a tensor together have to pay for what turning its slices costs
    the KL; where they cannot, they are tried on the slices as they lie. A tensor that loses nothing stays as it was,
    bit for bit.

    Of the tables of rf.nn.Embedding and EmbeddingBag that keep their slices the last rows are tried, by the same
    criterion, in steps of the leading digit: of ids that are numbered by frequency the rarest go, about which the data
    say too little to pay for numbers of their own. They read as zeros from then on.

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
            example of one fixed batch of the training set in nats, shape (n,). A few thousand examples are enough.
        num_data: Size of the training set.
        beta: Weight of the KL, as in training.
        z: How many standard errors the loss of likelihood is taken to be worse than measured. Raise it to cut less.
        max_cut: The largest part of a bond that one call may remove, above 0 and up to 1; a single slice may always go.
            Rows of a table may go as far as it pays, and a weight that is zero goes as a whole.

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
    criterion = Criterion(memo.over(batches), num_data, beta, z, agree, memo)
    changes: list[RankChange] = []
    misses: list[RankChange] = []
    with torch.no_grad(), evaluating(model), memo.watching():
        base = _checked_losses(criterion)
        for path, tensor in tensors:
            with memo.changing(tensor):
                cuts = select(tensor, layer_path(path), criterion, base, max_cut)
            if cuts.found:
                apply_cuts_(tensor, cuts.found, optimizer, moved=cuts.moved)
                memo.forget(tensor)
            changes += cuts.found
            misses += cuts.missed
            base = cuts.losses
    return changes, misses


def apply_(model: nn.Module, optimizer: Optimizer, change: RankChange) -> None:
    """Carries out a change that `search_ranks_` has found."""
    with torch.no_grad():
        apply_cuts_(_tensor_of(model, change), [change], optimizer, moved=True)


def undo_(model: nn.Module, optimizer: Optimizer, change: RankChange) -> None:
    """Gives a bond its slices back, without a change of the function."""
    _tensor_of(model, change).grow_slices_(change.bond, change.before - change.after, optimizer)


def _tensor_of(model: nn.Module, change: RankChange) -> LowRankTensor:
    return next(tensor for path, tensor in finite_tensors(model, "cut") if layer_path(path) == change.name)


def prior_side(model: nn.Module, num_data: int, beta: float) -> float:
    """What all low-rank tensors cost apart from the data, in nats: their side of the evidence test."""
    with torch.no_grad():
        return sum(beta * price_of(tensor, num_data) for _, tensor in low_rank_tensors(model))
