# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch

import rankfall as rf
from rankfall._priors import kl_of_moments

MIN_VARIANCE = 1e-10
PRIORS = [rf.LogUniform(), rf.HalfCauchy(1e-3), rf.HalfCauchy(1.0), rf.HalfCauchy(1e3)]


def bound(prior, variance, moment, count):
    """What the closed form minimises, in plain Python from the densities of the paper."""
    hyper = 0.5 * math.log(variance) if isinstance(prior, rf.LogUniform) else math.log1p(variance / prior.scale**2)
    return 0.5 * (moment / variance + count * math.log(variance)) + hyper


def minimiser(prior, moment, count):
    """Golden-section search over log10 of the variance; the bound has one minimum."""
    low, high, ratio = -40.0, 40.0, (math.sqrt(5) - 1) / 2
    for _ in range(200):
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        if bound(prior, 10**left, moment, count) < bound(prior, 10**right, moment, count):
            high = right
        else:
            low = left
    return 10 ** ((low + high) / 2)


@pytest.mark.parametrize("prior", PRIORS, ids=str)
@pytest.mark.parametrize("count", [1, 7, 1000])
def test_closed_form_minimises_the_bound(prior, count):
    for decade in range(-6, 9, 2):
        moment = 10.0**decade
        best = minimiser(prior, moment, count)
        if best < 10 * MIN_VARIANCE:
            continue
        actual = float(prior.variance(torch.tensor([moment], dtype=torch.float64), count))
        assert actual == pytest.approx(best, rel=1e-5)  # As sharply as an almost flat minimum can be found.
        for factor in (0.999, 1.001):
            assert bound(prior, actual, moment, count) < bound(prior, actual * factor, moment, count)


@pytest.mark.parametrize("prior", PRIORS, ids=str)
def test_float32_is_as_good_as_float64(prior):
    # M from far below D * eta^2 to far above: either form of the root alone loses all digits at one end.
    moment = torch.logspace(-8, 12, 81, dtype=torch.float64)
    for count in (1, 50, 10_000):
        exact = prior.variance(moment, count)
        torch.testing.assert_close(prior.variance(moment.float(), count).double(), exact, rtol=2e-6, atol=0)


def test_small_moment_of_half_cauchy_is_the_mean_square():
    # For M << D eta^2 the hyperprior is flat and the best variance is M / D.
    variance = rf.HalfCauchy(1000.0).variance(torch.tensor([1e-4]), 100)
    assert float(variance) == pytest.approx(1e-6, rel=1e-5)


@pytest.mark.parametrize("prior", PRIORS, ids=str)
def test_variance_has_a_floor_and_the_kl_stays_finite(prior):
    value, variance = kl_of_moments(prior, torch.zeros(3), 5)
    assert torch.equal(variance, torch.full((3,), MIN_VARIANCE))
    assert bool(torch.isfinite(value))


@pytest.mark.parametrize("prior", PRIORS, ids=str)
def test_gradient_is_that_of_the_profile(prior):
    """Central differences of the minimum over the scale: the envelope theorem, without autograd."""
    for count in (3, 200):
        moment = torch.tensor([0.02, 1.3, 55.0], dtype=torch.float64)
        _, variance = kl_of_moments(prior, moment, count)
        for k, value in enumerate(moment.tolist()):
            step = 1e-4 * value
            high, low = (bound(prior, minimiser(prior, m, count), m, count) for m in (value + step, value - step))
            assert float(0.5 / variance[k]) == pytest.approx((high - low) / (2 * step), rel=1e-4)


@pytest.mark.parametrize("prior", PRIORS, ids=str)
def test_kl_of_moments_is_the_bound_at_its_minimum(prior):
    moment = torch.tensor([0.02, 1.3, 55.0], dtype=torch.float64)
    expected = sum(bound(prior, minimiser(prior, m, 9), m, 9) for m in moment.tolist())
    value, _ = kl_of_moments(prior, moment, 9)
    assert float(value) == pytest.approx(expected, rel=1e-9)
    counts = torch.tensor([9.0, 4.0, 2.0], dtype=torch.float64)
    together, _ = kl_of_moments(prior, moment, counts)
    apart = [kl_of_moments(prior, m[None], int(n))[0] for m, n in zip(moment, counts, strict=True)]
    assert float(together) == pytest.approx(float(sum(apart)), rel=1e-12)


def test_slices_that_govern_nothing_cost_nothing(prior):
    tensor = rf.LowRankTensor((12, 20), rf.TT(3, out_modes=(3, 4), in_modes=(4, 5)), prior=prior)
    for bond in tensor.ranks:
        tensor.keep_slices_(bond, torch.arange(0))
    assert float(tensor.kl().detach()) == 0


def test_smaller_half_cauchy_shrinks_harder():
    moment, count = torch.tensor([50.0]), 10
    small, large = (rf.HalfCauchy(scale).variance(moment, count) for scale in (0.1, 10.0))
    assert float(small) < float(large)
