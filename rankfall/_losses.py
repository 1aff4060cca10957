# SPDX-License-Identifier: Apache-2.0
"""The NLL of a fixed sample of examples under states of a model, asked for only as far as a decision needs it."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

Batches: TypeAlias = Sequence[Callable[[], Tensor]]
State: TypeAlias = Callable[[], AbstractContextManager[object]]
Agree: TypeAlias = Callable[[Sequence[float]], Sequence[float]]

_FIRST_LOOK = 512  # Examples before the first decision; the next looks come at twice, four times as many, and so on.
# Examples on which the state between is asked, if they leave doubt: that is the surer of the two ways on, and so many
# still tell whether the bound was at rest.
_ENOUGH = 2048
_SURE = 4.0  # Standard errors after which the rest of the sample is not asked.
_MUCH_SHARPER = 0.5  # What the standard error has to fall to, for third orders to be worth neglecting.


class Losses:
    """NLL of each example under one state of the model, for as many of the first examples as were asked for.

    Args:
        batches: Each gives the NLL of the examples of one batch, always the same ones, shape (n,).
        state: Brings the model into the state, and back; the model is in it already if left out.
    """

    def __init__(self, batches: Batches, state: State = nullcontext) -> None:
        self._batches, self._state = batches, state
        self._taken: list[Tensor] = []
        self.count = 0

    @property
    def complete(self) -> bool:
        """Whether all examples were asked."""
        return len(self._taken) == len(self._batches)

    @property
    def size(self) -> float:
        """How many examples there are, if all batches are like those that were asked."""
        return self.count * len(self._batches) / len(self._taken)

    def first(self, count: int) -> Tensor:
        """The NLL of at least so many examples, or of all; infinity where it is not a number. Shape (n,), float64."""
        if self.count < count and not self.complete:
            with self._state():
                while self.count < count and not self.complete:
                    values = self._batches[len(self._taken)]().double()
                    self._taken.append(values.nan_to_num(math.inf, math.inf, -math.inf))
                    self.count += len(values)
        return self._taken[0] if len(self._taken) == 1 else torch.cat(self._taken)


class Halfway(NamedTuple):
    """The state in which what is to go is half gone: its mean, after scaling by 1/2.

    Attributes:
        losses: The losses there.
        slope: What the data would lose over all of the training set, in nats, if what is to go went on costing what
            the very first bit of it does. Where the bound is at rest, that is what the prior side gains by the bit.
        others: Where two states are weighed in both of which something is gone, the losses in the second with half of
            that; the slope is then the difference of both.
    """

    losses: Losses
    slope: float
    others: Losses | None = None

    def less(self, other: "Halfway") -> "Halfway":
        """Of this state against another."""
        return Halfway(self.losses, self.slope - other.slope, other.losses)


class Verdict(NamedTuple):
    """What the data lose by one state against another, over all of the training set, in nats, and if that is less."""

    expected: float
    bound: float
    is_less: bool


def weigh(
    one: Losses,
    other: Losses,
    num_data: int,
    limit: float,
    z: float = 0.0,
    agree: Agree = list,
    between: Callable[[], Halfway] | None = None,
) -> Verdict:
    """Whether N (mean(d) + z std(d) / sqrt(n)) < limit, d = NLL of `one` - NLL of `other`, paired by the example.

    The sample is asked in growing parts. Once the sum stands so far from the limit that sampling error is ruled out,
    the rest is not asked, and the bound has that larger margin. Where a good part of it does not rule it out, the state
    between is asked as well, if there is one. `agree` makes of numbers those that every process of a run goes by.
    """
    count, sure = _FIRST_LOOK, max(_SURE, z)
    while True:
        b, a = other.first(count), one.first(count)
        n = min(len(a), len(b))
        a, b = a[:n], b[:n]
        complete = one.complete and other.complete
        expected, error = agree(_total(torch.where(a == b, 0.0, a - b), num_data))
        # Where the sample is the whole training set, the rest of it will leave no doubt.
        is_enough = complete or (n >= _ENOUGH and one.size < num_data)
        if abs(expected - limit) <= sure * error and between is not None and is_enough:
            expected, error = _sharper(a, b, between(), num_data, (expected, error), agree)
        if complete:
            return Verdict(expected, expected + z * error, expected + z * error < limit)
        if abs(expected - limit) > sure * error:
            return Verdict(expected, expected + sure * error, expected < limit)
        count = 2 * n


def _sharper(
    one: Tensor, other: Tensor, between: Halfway, num_data: int, plain: tuple[float, float], agree: Agree
) -> tuple[float, float]:
    """(expected, standard error) of the loss by `one` with its first-order part known instead of sampled, if better.

    With f(s) the NLL of what is to go scaled by s, f(0) - f(1) = -f'(1) + f''/2 to second order, and the second part
    is 2 f(0) - 2 f(1) - 4 (f(1/2) - f(1)). An example's share in the first part has either sign and is of the order of
    the slice, that in the second of its square: weak slices are weighed by far fewer examples. The first part is a
    control variate (Owen, Monte Carlo theory, methods and examples, section 8.9) whose mean is known at a stationary
    point.
    """
    half, other_half = (
        other if losses is None else losses.first(len(one))[: len(one)] for losses in (between.losses, between.others)
    )
    curvature, error = agree(_total(2 * (one - other) - 4 * (half - other_half), num_data))
    expected = curvature + between.slope
    # Two estimates of one number: where they contradict each other, the bound was not at rest.
    agrees = abs(expected - plain[0]) <= _SURE * plain[1]
    return (expected, error) if agrees and error < _MUCH_SHARPER * plain[1] else plain


def _total(d: Tensor, num_data: int) -> tuple[float, float]:
    """(expected, standard error) over the whole training set; the infinity that an infinite loss calls for, and 0.

    The examples are drawn from the training set without repetition, so that nothing is uncertain once all were asked
    (Cochran, Sampling Techniques, section 2.6).
    """
    expected = float(d.mean())
    if not math.isfinite(expected):
        return (math.inf if math.isnan(expected) else expected), 0.0
    unasked = max(1 - len(d) / num_data, 0.0)
    return num_data * expected, num_data * float(d.std()) * math.sqrt(unasked / len(d))
