# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

import laws
import rankfall as rf

MODES = {"out_modes": (4, 3), "in_modes": (5, 4)}
SHAPE = (12, 20)


def planted(kind, rank, dtype=torch.float64, **modes):
    """A weight that is exactly of this format at this rank."""
    torch.manual_seed(5)
    t = laws.make(kind(rank, **(modes or MODES)), SHAPE, posterior=rf.Point())
    return t.dense().detach().to(dtype)


def error(weight, t):
    return ((t.dense() - weight).norm() / weight.norm()).item()


def decomposed(weight, format):
    return rf.LowRankTensor.from_dense(weight, format, posterior=rf.Point())


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_an_exactly_low_rank_weight_is_found(kind, rank):
    weight = planted(kind, rank)
    # A ring is searched for by least squares: given one bond more than it needs, it is found.
    t = decomposed(weight, kind(rank if kind is not rf.TR else 2 * rank, **MODES))
    assert error(weight, t) < (1e-4 if kind in (rf.CP, rf.TR) else 1e-6)


def test_ranks_that_the_weight_does_not_need_are_left_out():
    for kind in (rf.TT, rf.TTM, rf.Tucker):
        weight = planted(kind, 2)
        t = decomposed(weight, kind(50, **MODES))
        assert t.ranks == laws.make(kind(2, **MODES), SHAPE).ranks
        assert error(weight, t) < 1e-6


def test_float32_weights_are_decomposed_to_their_precision(kind):
    weight = planted(kind, 2, torch.float32)
    t = decomposed(weight, kind(4, **MODES))
    assert {f.dtype for f in t.factors} == {torch.float32}
    assert error(weight, t) < (1e-3 if kind is rf.CP else 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_weights(kind, dtype):
    weight = planted(kind, 2).mul(0.1).to(dtype)
    t = decomposed(weight, kind(4, **MODES))
    assert {f.dtype for f in t.factors} == {dtype}
    assert error(weight.double(), decomposed(weight.double(), kind(4, **MODES))) < 0.01
    assert ((t.dense().double() - weight.double()).norm() / weight.double().norm()).item() < 0.05


def test_the_error_falls_with_the_rank(kind):
    weight = torch.randn(SHAPE, dtype=torch.float64)
    errors = [error(weight, decomposed(weight, kind(rank, **MODES))) for rank in (1, 2, 4, 8)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > errors[-1] + 0.1
    assert errors[0] < 1


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_two_factors_are_as_good_as_the_singular_values_allow(rank):
    """A matrix as a train of two factors: Eckart and Young say how good it can be."""
    weight = torch.randn(SHAPE, dtype=torch.float64)
    best = torch.linalg.svdvals(weight)[rank:].square().sum().sqrt() / weight.norm()
    t = decomposed(weight, rf.TT(rank, out_modes=(12,), in_modes=(20,)))
    assert error(weight, t) == pytest.approx(best.item(), rel=1e-9)


def test_train_error_is_within_the_bound_of_tt_svd():
    """Oseledets 2011, theorem 2.2: the squared error is at most the sum of those of all unfoldings."""
    weight = torch.randn(SHAPE, dtype=torch.float64)
    full = weight.reshape(4, 3, 5, 4)
    tails = sum(torch.linalg.svdvals(full.reshape(n, -1))[3:].square().sum() for n in (4, 12, 60))
    t = decomposed(weight, rf.TT(3, **MODES))
    assert (t.dense() - weight).square().sum() <= tails * (1 + 1e-9)


def test_hosvd_keeps_the_leading_sides():
    weight = torch.randn(SHAPE, dtype=torch.float64)
    t = decomposed(weight, rf.Tucker(2, out_modes=(12,), in_modes=(20,)))
    u, _, vh = torch.linalg.svd(weight)
    for factor, expected in ((t.factors[1], u[:, :2]), (t.factors[2], vh[:2].T)):
        q = torch.linalg.qr(factor.detach())[0]
        laws.close(q @ q.T, expected @ expected.T, 1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_weight_of_zeros(kind, dtype):
    t = rf.LowRankTensor.from_dense(torch.zeros(SHAPE, dtype=dtype), kind(3))
    assert t.dense().abs().max().item() < 1e-300
    assert all(bool(torch.isfinite(p).all()) for p in t.parameters())
    assert bool(torch.isfinite(t.kl()))


@pytest.mark.parametrize("size", [1e-18, 1e18])
def test_the_size_of_the_weight_does_not_matter(kind, size):
    weight = planted(kind, 2)
    t = decomposed((weight * size).float(), kind(4, **MODES))
    assert error(weight, decomposed(weight, kind(4, **MODES))) < 1e-3
    torch.testing.assert_close(t.dense().double() / size, weight, rtol=0, atol=1e-3)


@pytest.mark.parametrize("shape", [(11, 13), (30,), (4, 5, 6)], ids=str)
def test_padded_and_other_shapes(shape):
    weight = torch.randn(shape, dtype=torch.float64)
    for kind in (rf.TT, rf.TTM, rf.Tucker):
        assert error(weight, decomposed(weight, kind(100))) < 1e-6


def test_factors_are_of_similar_size(kind):
    """One step size serves them all: no factor is a hundred times another."""
    t = decomposed(torch.randn(SHAPE), kind(4, **MODES))
    sizes = [f.detach().square().mean().sqrt().item() for f in t.factors]
    assert max(sizes) < 10 * min(sizes)


def test_decomposing_is_repeatable_and_draws_no_global_noise(kind):
    weight = torch.randn(SHAPE)
    state = torch.get_rng_state()
    first = decomposed(weight, kind(3, **MODES))
    assert first.factors[0].untyped_storage().nbytes() == 4 * first.factors[0].numel()
    torch.manual_seed(1)
    second = decomposed(weight, kind(3, **MODES))
    assert all(torch.equal(a, b) for a, b in zip(first.factors, second.factors, strict=True))
    assert state is not None


def test_the_weight_stays_as_it_is(kind):
    weight = torch.nn.Parameter(torch.randn(SHAPE))
    copy = weight.detach().clone()
    t = rf.LowRankTensor.from_dense(weight, kind(3))
    with torch.no_grad():
        for factor in t.factors:
            factor.zero_()
    assert torch.equal(weight, copy)
    assert weight.grad is None


def test_a_layer_from_dense_shares_the_bias(kind):
    dense = torch.nn.Linear(20, 12).double()
    with torch.no_grad():
        dense.weight.copy_(planted(kind, 2))
    layer = rf.nn.Linear.from_dense(dense, format=kind(4, **MODES), posterior=rf.Point())
    x = torch.randn(5, 20, dtype=torch.float64)
    assert layer.bias is dense.bias
    torch.testing.assert_close(layer(x), dense(x), rtol=0, atol=1e-2)
