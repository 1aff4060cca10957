# SPDX-License-Identifier: Apache-2.0
"""When a training run changes its ranks, and how: policies that `rf.fit` asks after every epoch."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Literal, TypeAlias

from torch import nn
from torch.optim import Optimizer

from rankfall._cuts import least_rank
from rankfall._evidence import RankChange, apply_, prior_side, search_ranks_, undo_
from rankfall._losses import Agree, Batches
from rankfall._ranks import check_threshold, grow_ranks_, prune_, ranks
from rankfall._walk import low_rank_tensors

Record: TypeAlias = dict[str, Any]
Step: TypeAlias = Literal["wait", "ask", "grow", "judge"]

_COOLDOWN = 2  # Epochs after a change before the loss can say anything.
_TRIAL = 4  # Epochs in which the slices that stay may take over from those that are gone on trial.
_REST = 0.2  # The last part of a run, in which what is left settles.
_HOPE = (
    2.0  # A cut is tried if it costs up to so many times what it saves: the slices that stay may take over the rest.
)
_EXAMPLES, _ONE_IN = 8192, 256  # Examples of a test, and the part of a large training set that they are.
_OVERCHARGE = 0.5  # What the rest of the run may still take off the price of the weights when they are tested.
_PROMISE = 0.1  # What the rest of the run may still promise, as a part of what was learned, for a loss to be settled.
_LAST_PROMISE = 0.5  # The same at the last test, if there was none before.


@dataclass(frozen=True)
class Evidence:
    """Ranks by the evidence test (`rf.select_ranks_`), asked when the run itself says that it has settled.

    A run has settled when the NLL of its training data falls by less than its sampling noise, or at a pace at which all
    that remains of the run would lower it by less than a tenth of what it has been lowered so far; and when that is so
    of the bound as well, price of the weights included, or the price could at most be halved by the end. After a change
    it gets two epochs at least; after a test that cut nothing the wait doubles. The last test comes at four fifths of
    the run; after that what is left can settle. If none came before it, it comes also where the rest
    of the run may still lower the NLL, or the bound, by up to half of what was learned, and two epochs with the whole
    KL are enough; and where the test before it removed as much of a bond as `max_cut` lets it. A test that no other can
    follow any more removes all that does not pay.

    The test knows what a cut costs at once, not what training wins back. So when it cuts nothing, the cut that came
    nearest to paying is tried, if it costs less than twice what it saves. Four epochs later the same criterion is put
    to the run itself: if the data have lost more than the prior side has gained, against the course that the run was
    on, the bond gets its slices back, without a change of the function. When no trial is left either, every bond below
    its start rank gets a slice back in the same way: should an earlier cut have been one too many, the next test keeps
    it.

    Example:
        >>> Evidence()
        Evidence(examples=None, z=2.0, max_cut=0.5, regrow=True)

    Args:
        examples: Training examples that a test is made on, held in memory during it. The more, the smaller the margin
            for sampling error, and the smaller the model. None takes 8,192, or one in 256 of a training set of more
            than two million: the margin grows with the size of the set, and what a slice saves hardly does.
        z: As for `rf.select_ranks_`.
        max_cut: As for `rf.select_ranks_`, in all tests that another one can follow.
        regrow: Whether slices are given back; without it no cut is tried either.

    Raises:
        ValueError: If a number is out of range.
    """

    examples: int | None = None
    z: float = 2.0
    max_cut: float = 0.5
    regrow: bool = True

    def __post_init__(self) -> None:
        if self.examples is not None and self.examples < 2:
            raise ValueError(f"Evidence: examples must be 2 or more, got {self.examples}. Pass a few thousand.")
        if not self.z >= 0 or not 0 < self.max_cut <= 1:
            raise ValueError(
                f"Evidence: z must be 0 or more and max_cut above 0 and up to 1, got z={self.z} and "
                f"max_cut={self.max_cut}."
            )

    def count(self, num_data: int) -> int:
        """How many examples a test is made on.

        Example:
            >>> Evidence().count(60_000), Evidence().count(45_000_000), Evidence(examples=500).count(60_000)
            (8192, 175781, 500)
        """
        return max(_EXAMPLES, num_data // _ONE_IN) if self.examples is None else self.examples


@dataclass(frozen=True)
class Shrinkage:
    """Ranks by the prior scale of slices (`rf.prune_`), after every epoch once the KL has its full weight.

    Args:
        threshold: As for `rf.prune_`.

    Raises:
        ValueError: If `threshold` is outside 0 to 1.
    """

    threshold: float = 0.1

    def __post_init__(self) -> None:
        check_threshold(self.threshold)


Selection: TypeAlias = Evidence | Shrinkage


def next_step(history: Sequence[Record], epochs: int, first: int, can_grow: bool) -> Step:
    """What the evidence policy does after the last epoch of `history`: a pure function of the records.

    Args:
        history: Records so far, the last one of the epoch that has just ended; `nll`, `nll_error`, `price`, `ranks`,
            and `selection` in all but the last; `limited` where a cut had to leave slices.
        epochs: Length of the whole run.
        first: The first epoch with the whole KL; nothing is asked before.
        can_grow: Whether slices may be given back, and some bond is below its start rank.
    """
    now, stop = len(history) - 1, _last_test(epochs)
    events = [e for e, record in enumerate(history[:-1]) if record["selection"] != "wait"]
    last_event = events[-1] if events else first - 1
    kind = history[last_event]["selection"] if events else "wait"
    if now < first or now > stop:
        return "wait"
    if now == stop and kind in ("grow", "try"):  # What was given back, or taken on trial, is judged in any case.
        return "ask" if kind == "grow" else "judge"
    wait = _TRIAL if kind == "try" else _patience(history, events)
    # On data seen once the likelihood may rise to the end: what never came to rest is asked when it is nearly there.
    only = now == stop and not events
    # Of what a test had to leave by its limit more did not pay at that time either, when the run was at rest.
    left_some = now == stop and kind == "cut" and history[last_event].get("limited", False)
    recent = history[max(last_event, first) :][-_COOLDOWN - 1 :]
    # In a short run a long warm-up may leave no more than two epochs with the whole KL until then.
    too_early = len(recent) < (2 if only else _COOLDOWN + 1) or (now < stop and now - last_event < wait)
    if too_early or not (left_some or _settled(history, recent, epochs, _LAST_PROMISE if only else _PROMISE)):
        return "wait"
    if kind == "try":
        return "judge"
    if can_grow and kind == "kept" and stop - now >= 4 * _COOLDOWN and _may_grow(history, events):
        return "grow"
    return "ask"


def _last_test(epochs: int) -> int:
    return min(math.floor(epochs * (1 - _REST)), epochs - 1 - _COOLDOWN)


def _patience(history: Sequence[Record], events: Sequence[int]) -> int:
    """Epochs to wait after the last event, doubled for every test in a row that cut nothing."""
    fruitless = 0
    for e in reversed(events):
        if history[e]["selection"] != "kept":
            break
        fruitless += 1
    return _COOLDOWN * 2 ** max(fruitless - 1, 0)


def _settled(history: Sequence[Record], recent: Sequence[Record], epochs: int, promise: float) -> bool:
    """Whether the data's side of the bound, and the bound as a whole, have come to rest in the recent epochs.

    At rest is what promises, for the rest of the run, no more than a part of what was learned.

    The data settle first. While the price of the weights still falls, removing anything seems to pay: what the test
    saves is a price that training is about to lower by itself.
    """
    left = epochs - len(history)
    error, learned = history[-1]["nll_error"], history[0]["nll"] - min(record["nll"] for record in history)
    nll, price = ((recent[0][name] - recent[-1][name]) / (len(recent) - 1) for name in ("nll", "price"))
    of_data, of_bound = (pace < error or pace * left < promise * learned for pace in (nll, nll + price))
    return of_data and (of_bound or price * left < _OVERCHARGE * recent[-1]["price"])


def _may_grow(history: Sequence[Record], events: Sequence[int]) -> bool:
    """Whether the present ranks have not been confirmed by growing from them and coming back."""
    grown = (history[e]["from"] for e in events if history[e]["selection"] == "grow")
    return all(before != history[-1]["ranks"] for before in grown)


def has_paid(history: Sequence[Record]) -> bool:
    """Whether the run is better off, in evidence, than without the cut that it last tried; pure as well.

    What training wins anyhow is not put down to the cut: without it the data are taken to have gone on at the pace of
    the last two epochs before, or of the last two if that is slower, as it is where a run slows down by itself.

    Args:
        history: Records so far, the last one of the epoch that has just ended.
    """
    tried = max(e for e, record in enumerate(history[:-1]) if record["selection"] == "try")
    now, nll = len(history) - 1, [record["nll"] for record in history]
    paces = [(nll[max(e - _COOLDOWN, 0)] - nll[e]) / _COOLDOWN for e in (tried, now)]
    expected = nll[tried] - max(min(paces), 0) * (now - tried)
    return nll[now] - expected < history[tried]["price"] - history[now]["price"]


def trial(history: Sequence[Record], misses: Sequence[RankChange]) -> RankChange | None:
    """The cut to try of those that did not pass: the cheapest for what it saves; none that failed at the same ranks."""
    changes = [record for record in history[:-1] if record["selection"] != "wait"]
    undone = [one for one, after in pairwise(changes) if after["selection"] == "undo"]
    failed = [one["cuts"][0] for one in undone if one["from"] == history[-1]["ranks"]]
    bonds = {(cut["name"], cut["bond"]) for cut in failed}
    open_ = [m for m in misses if m.nll_cost < _HOPE * m.saved and (m.name, m.bond) not in bonds]
    return min(open_, key=lambda m: m.nll_cost / m.saved, default=None)


def _has_room(model: nn.Module) -> bool:
    return any(
        rank < tensor.format.start_ranks(tensor.layout)[bond]
        for _, tensor in low_rank_tensors(model)
        for bond, rank in tensor.ranks.items()
    )


@dataclass(frozen=True)
class Training:
    """What a policy needs to know of the run that it serves."""

    epochs: int
    first: int
    num_data: int
    beta: float
    sample: Callable[[int], Batches]
    agree: Agree = list


def select_(
    policy: Selection, model: nn.Module, optimizer: Optimizer, history: Sequence[Record], training: Training
) -> Record:
    """Does what a policy asks for after the last epoch of `history`; returns what joins its record."""
    if isinstance(policy, Shrinkage):
        if len(history) > training.first:
            prune_(model, optimizer, threshold=policy.threshold)
        return {}
    price = {"price": _price(model, training)}
    history = [*history[:-1], {**history[-1], **price}]
    step = next_step(history, training.epochs, training.first, policy.regrow and _has_room(model))
    if step == "judge" and not has_paid(history):
        undo_(model, optimizer, RankChange(**_last_trial(history)["cuts"][0]))
        return price | {"selection": "undo"}
    if step == "grow":
        before = ranks(model)
        grow_ranks_(model, optimizer)
        return price | {"selection": "grow", "from": before}
    if step == "wait":
        return price | {"selection": "wait"}
    return price | _ask_(policy, model, optimizer, history, training)


def _ask_(
    policy: Evidence, model: nn.Module, optimizer: Optimizer, history: Sequence[Record], training: Training
) -> Record:
    before, left = ranks(model), _last_test(training.epochs) - len(history) + 1
    # No other can follow if there is no time for the run to come to rest after a cut.
    max_cut = 1.0 if left < _COOLDOWN else policy.max_cut
    cuts, misses = search_ranks_(
        model,
        optimizer,
        batches=training.sample(policy.count(training.num_data)),
        num_data=training.num_data,
        beta=training.beta,
        z=policy.z,
        max_cut=max_cut,
        agree=training.agree,
    )
    if cuts:
        limited = any(0 < c.after <= least_rank(c.before, max_cut) for c in cuts if c.bond != "rows")
        return {"selection": "cut", "cuts": [asdict(cut) for cut in cuts], "limited": limited}
    if policy.regrow and left >= _TRIAL:
        cut = trial(history, misses)
        if cut:
            apply_(model, optimizer, cut)
            return {"selection": "try", "cuts": [asdict(cut)], "from": before}
    return {"selection": "kept", "cuts": []}


def _price(model: nn.Module, training: Training) -> float:
    """What the low-rank tensors cost apart from the data, in nats per datum: their side of the evidence test."""
    (value,) = training.agree([prior_side(model, training.num_data, training.beta)])
    return value / training.num_data


def _last_trial(history: Sequence[Record]) -> Record:
    return next(record for record in reversed(history[:-1]) if record["selection"] == "try")
