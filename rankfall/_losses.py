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
_SURE = 4.0  # Standard errors after which the rest of the sample is not asked.


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

    def first(self, count: int) -> Tensor:
        """The NLL of at least so many examples, or of all; infinity where it is not a number. Shape (n,), float64."""
        if self.count < count and not self.complete:
            with self._state():
                while self.count < count and not self.complete:
                    values = self._batches[len(self._taken)]().double()
                    self._taken.append(values.nan_to_num(math.inf, math.inf, -math.inf))
                    self.count += len(values)
        return self._taken[0] if len(self._taken) == 1 else torch.cat(self._taken)


class Verdict(NamedTuple):
    """What the data lose by one state against another, over all of the training set, in nats, and if that is less."""

    expected: float
    bound: float
    is_less: bool


def weigh(one: Losses, other: Losses, num_data: int, limit: float, z: float = 0.0, agree: Agree = list) -> Verdict:
    """Whether N (mean(d) + z std(d) / sqrt(n)) < limit, d = NLL of `one` - NLL of `other`, paired by the example.

    The sample is asked in growing parts. Once the sum stands so far from the limit that sampling error is ruled out,
    the rest is not asked, and the bound has that larger margin. `agree` makes of numbers those that every process of a
    run goes by.
    """
    count, sure = _FIRST_LOOK, max(_SURE, z)
    while True:
        b, a = other.first(count), one.first(count)
        n = min(len(a), len(b))
        a, b = a[:n], b[:n]
        expected, error = agree(_total(torch.where(a == b, 0.0, a - b), num_data))
        if one.complete and other.complete:
            return Verdict(expected, expected + z * error, expected + z * error < limit)
        if abs(expected - limit) > sure * error:
            return Verdict(expected, expected + sure * error, expected < limit)
        count = 2 * n


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
