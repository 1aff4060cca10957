# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

import rankfall as rf


def layer_of(posterior, format=None):
    return rf.nn.Linear(12, 20, format=format or rf.TTM(3), posterior=posterior)


def test_train_mode_draws_once_per_forward():
    layer = layer_of(rf.MeanField(0.5)).train()
    row = torch.randn(1, 12)
    y = layer(row.expand(64, 12))
    torch.testing.assert_close(y, y[:1].expand_as(y), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(layer(row), layer(row), rtol=1e-3)


def test_eval_mode_is_the_mean_and_deterministic(kind):
    layer = layer_of(rf.MeanField(0.5), kind(3)).eval()
    x = torch.randn(5, 12)
    assert torch.equal(layer(x), layer(x))
    torch.testing.assert_close(layer(x), x @ layer.weight.dense().T, rtol=1e-5, atol=1e-5)


def test_point_has_no_noise_and_no_second_parameters(kind):
    layer = layer_of(rf.Point(), kind(3)).train()
    x = torch.randn(5, 12)
    assert torch.equal(layer(x), layer(x))
    assert torch.equal(layer.weight.sample(), layer.weight.dense())
    assert len(layer.weight.log_stds) == 0
    state = torch.get_rng_state()
    layer(x)
    assert torch.equal(torch.get_rng_state(), state)


def test_draws_have_the_mean_and_std_that_are_learned():
    t = rf.LowRankTensor((2, 3), rf.TTM(1), posterior=rf.MeanField(0.5), dtype=torch.float64)
    with torch.no_grad():
        for factor, log_std in zip(t.factors, t.log_stds, strict=True):
            factor.copy_(1 + torch.rand_like(factor))
            log_std.copy_(torch.linspace(-2, -0.5, log_std.numel()).reshape(log_std.shape))
    # W is a product of two independent factors: E W = product of means, E W^2 = product of second moments.
    draws = torch.stack([t.sample() for _ in range(4000)]).detach()
    second = [f.square() + (2 * s).exp() for f, s in zip(t.factors, t.log_stds, strict=True)]
    with torch.no_grad():
        mean = t.dense()
        for factor, m in zip(t.factors, second, strict=True):
            factor.copy_(m)
        square = t.dense()
    error = (square - mean.square()).sqrt() / 4000**0.5
    assert bool(((draws.mean(0) - mean).abs() < 4 * error).all())
    torch.testing.assert_close(draws.square().mean(0), square, rtol=0.1, atol=0)


def test_initial_std_is_relative_to_each_factor():
    t = rf.LowRankTensor((12, 20), rf.Tucker(3), posterior=rf.MeanField(0.25))
    for factor, log_std in zip(t.factors, t.log_stds, strict=True):
        expected = 0.25 * factor.detach().square().mean().sqrt()
        torch.testing.assert_close(log_std.detach().exp(), expected.expand_as(log_std))


def test_log_std_is_trained_by_data_and_kl():
    t = rf.LowRankTensor((12, 20), rf.TT(3))
    for loss in (t.sample().square().sum(), t.kl()):
        gradients = torch.autograd.grad(loss, list(t.log_stds))
        assert all(bool((g != 0).all()) for g in gradients)


def test_scales_of_the_means_alone_are_those_of_a_point(kind, prior):
    t = rf.LowRankTensor((12, 20), kind(3), prior=prior, posterior=rf.MeanField(2.0))
    point = rf.LowRankTensor((12, 20), kind(3), prior=prior, posterior=rf.Point())
    point.factors = t.factors
    with_noise = t.prior_scales()
    for bond, scale in t.prior_scales(means_only=True).items():
        assert torch.equal(scale, point.prior_scales()[bond])
        assert bool((scale < with_noise[bond]).all())


def test_the_defaults_are_half_cauchy_and_mean_field():
    t = rf.LowRankTensor((12, 20), rf.TT(3))
    assert (t.prior, t.posterior) == (rf.HalfCauchy(1.0), rf.MeanField(0.01))


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_scales_must_be_positive(value):
    with pytest.raises(ValueError, match=f"initial_std must be positive, got {value}.*Pass for example initial_std"):
        rf.MeanField(value)
    with pytest.raises(ValueError, match=f"scale must be positive, got {value}. Pass for example scale=1.0"):
        rf.HalfCauchy(value)
