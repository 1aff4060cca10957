# SPDX-License-Identifier: Apache-2.0
"""Decisions by sample: the same as by the whole, of fewer examples."""

import math
from contextlib import contextmanager

import pytest
import torch

from rankfall._losses import Losses, weigh

N, SIZE, DATA = 8192, 128, 1_000_000


class Asked:
    """Batches of given losses, and how many of the examples were asked for."""

    def __init__(self, values):
        self.values, self.count = values, 0
        self.batches = [lambda part=part: self.give(part) for part in values.split(SIZE)]

    def give(self, part):
        self.count += len(part)
        return part


def drawn(mean, std=1.0, seed=0):
    return mean + std * torch.randn(N, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("mean", "asked"), [(-1.0, 512), (1.0, 512), (0.06, 8192)])
def test_a_clear_case_needs_few_examples(mean, asked):
    one, zero = Asked(drawn(mean)), Asked(torch.zeros(N))
    verdict = weigh(Losses(one.batches), Losses(zero.batches), DATA, limit=50_000.0, z=2.0)
    assert one.count == zero.count == asked
    assert verdict.is_less == (mean < 0)
    seen = one.values[:asked]
    assert verdict.expected == pytest.approx(DATA * float(seen.mean()), rel=1e-6)
    margin = 2.0 if asked == N else 4.0
    error = DATA * float(seen.std()) * (1 / asked - 1 / DATA) ** 0.5
    assert verdict.bound == pytest.approx(verdict.expected + margin * error, rel=1e-5)


def test_a_wide_margin_also_holds_for_a_part():
    one, zero = Asked(drawn(0.0)), Asked(torch.zeros(N))
    verdict = weigh(Losses(one.batches), Losses(zero.batches), DATA, limit=300_000.0, z=6.0)
    assert one.count == 1024  # 6 / sqrt(512) is 0.27 and too near to 0.3, 6 / sqrt(1024) is 0.19.
    assert verdict.is_less


def test_pairs_of_examples_are_compared():
    both = drawn(0.0, std=100.0)
    one, other = Asked(both + 0.2 + 0.01 * drawn(0.0, seed=1)), Asked(both)
    assert not weigh(Losses(one.batches), Losses(other.batches), DATA, limit=100_000.0).is_less
    assert one.count == 512


def test_what_is_known_is_not_asked_again():
    one = Asked(drawn(1.0))
    losses = Losses(one.batches)
    losses.first(300)
    assert losses.first(200).tolist() == one.values[:384].tolist()
    assert one.count == 384
    assert not losses.complete
    losses.first(N)
    assert one.count == N
    assert losses.complete


@pytest.mark.parametrize(("num_data", "error"), [(2 * N, (2 * N) ** 0.5), (N, 0.0)])
def test_the_sum_over_the_training_set_is_certain_once_all_of_it_was_asked(num_data, error):
    values = drawn(0.0)
    one, zero = Losses(Asked(values).batches), Losses(Asked(torch.zeros(N)).batches)
    verdict = weigh(one, zero, num_data, limit=0.0, z=3.0)
    assert verdict.expected == pytest.approx(num_data * float(values.double().mean()), abs=1e-6)
    assert verdict.bound - verdict.expected == pytest.approx(3 * error * float(values.double().std()), rel=1e-6)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("place", [0, N - 1])
def test_a_loss_that_is_not_finite_costs_all_there_is(bad, place):
    values = drawn(0.0)
    values[place] = bad
    zero = Losses(Asked(torch.zeros(N)).batches)
    verdict = weigh(Losses(Asked(values).batches), zero, DATA, limit=1000.0)
    assert not verdict.is_less
    assert verdict.expected == math.inf
    assert weigh(zero, Losses(Asked(values).batches), DATA, limit=-1e4).is_less


def test_the_model_is_in_the_state_only_while_it_is_asked():
    entered = []

    @contextmanager
    def state():
        entered.append(True)
        yield
        entered.append(False)

    losses = Losses(Asked(drawn(0.0)).batches, state)
    losses.first(256)
    losses.first(128)
    assert entered == [True, False]
