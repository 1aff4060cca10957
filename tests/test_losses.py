# SPDX-License-Identifier: Apache-2.0
"""Decisions by sample: the same as by the whole, of fewer examples."""

import math
from contextlib import contextmanager

import pytest
import torch

from rankfall._losses import Halfway, Losses, weigh

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


def squares(first, second, seed=3):
    """Losses f(s) = first (s - 1) + second (s - 1)^2 of examples with what is to go scaled by s = 1, 1/2 and 0."""
    noise = torch.randn(2, N, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    a, b = (mean + std * drawn for (mean, std), drawn in zip((first, second), noise, strict=True))
    return [Losses(Asked(a * (s - 1) + b * (s - 1) ** 2).batches) for s in (1.0, 0.5, 0.0)], (a, b)


def test_a_known_first_order_part_is_not_sampled():
    (other, half, one), (_, b) = squares((-2e-5, 0.02), (3e-5, 3e-5))
    verdict = weigh(one, other, DATA, 60.0, z=2.0, between=lambda: Halfway(half, 20.0))
    assert verdict.is_less
    assert one.count == other.count == half.count == 2048
    assert verdict.expected == pytest.approx(20.0 + DATA * float(b[:2048].mean()), rel=1e-6)
    error = DATA * float(b[:2048].std()) * (1 / 2048 - 1 / DATA) ** 0.5
    assert verdict.bound - verdict.expected == pytest.approx(4 * error, rel=1e-6)
    close = weigh(one, other, DATA, 51.0, z=2.0, between=lambda: Halfway(half, 20.0))
    assert one.count == N  # Where even that leaves doubt, all are asked.
    assert close.expected == pytest.approx(20.0 + DATA * float(b.mean()), rel=1e-6)
    error = DATA * float(b.std()) * (1 / N - 1 / DATA) ** 0.5
    assert close.bound - close.expected == pytest.approx(2 * error, rel=1e-6)
    assert not weigh(one, other, DATA, 60.0, z=2.0).is_less  # The margin alone is 440 nats.


def test_two_states_in_both_of_which_something_is_gone():
    (whole, half, one), (_, b) = squares((-2e-5, 0.02), (3e-5, 3e-5))
    (_, other_half, other), (_, c) = squares((-1e-5, 0.02), (1e-5, 1e-5), seed=4)
    both = Halfway(half, 20.0).less(Halfway(other_half, 10.0))
    verdict = weigh(one, other, DATA, 40.0, between=lambda: both)
    few = slice(0, one.count)
    assert one.count == 2048
    assert verdict.expected == pytest.approx(10.0 + DATA * float((b - c)[few].mean()), rel=1e-6)
    by_one = weigh(one, whole, DATA, 40.0, between=lambda: Halfway(half, 20.0)).expected
    by_other = weigh(other, whole, DATA, 40.0, between=lambda: Halfway(other_half, 10.0)).expected
    assert verdict.expected == pytest.approx(by_one - by_other, rel=1e-6)


@pytest.mark.parametrize(
    ("second", "slope"),
    [((3e-5, 0.015), 20.0), ((3e-5, 3e-5), 2000.0)],
    ids=["the second order is sampled no better", "the bound is not at rest"],
)
def test_a_first_order_part_that_does_not_help_or_contradicts_is_left_alone(second, slope):
    (other, half, one), _ = squares((-2e-5, 0.02), second)
    found = weigh(one, other, DATA, 60.0, z=2.0, between=lambda: Halfway(half, slope))
    assert found == weigh(one, other, DATA, 60.0, z=2.0)


@pytest.mark.parametrize(
    ("mean", "num_data"), [(1.0, DATA), (0.001, N)], ids=["clear at first sight", "all were asked"]
)
def test_the_state_between_is_asked_only_where_the_sample_leaves_doubt(mean, num_data):
    def between():
        raise AssertionError("asked")

    one, zero = Losses(Asked(drawn(mean)).batches), Losses(Asked(torch.zeros(N)).batches)
    weigh(one, zero, num_data, limit=-100.0, between=between)
