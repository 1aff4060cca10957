# SPDX-License-Identifier: Apache-2.0
"""The gauge step: the tensor stays, the KL falls, slices become orthogonal."""

import math
from functools import partial

import pytest
import torch

import rankfall as rf
from rankfall import _gauge
from rankfall._contract import dense

SHAPE = (12, 30)


def tensor_of(kind, posterior=None, prior=None, dtype=torch.float64, rank=4):
    """A tensor in a poor gauge: every bond of two factors carries a random matrix and its inverse."""
    t = rf.LowRankTensor(SHAPE, kind(rank), posterior=posterior, prior=prior, initial_std=1.0, dtype=dtype)
    for bond, places in ((bond, t.layout.places(bond)) for bond in t.layout.bonds):
        if len(places) == 2:
            x = torch.randn(t.ranks[bond], t.ranks[bond], dtype=dtype) + 2 * torch.eye(t.ranks[bond], dtype=dtype)
            for (k, dim), matrix in zip(places, (x, torch.linalg.inv(x).T), strict=True):
                t.factors[k].data = (t.factors[k].data.movedim(dim, -1) @ matrix).movedim(-1, dim).contiguous()
        else:  # CP: the slices of one factor large, those of another small.
            scales = torch.logspace(0, 1, t.ranks[bond], dtype=dtype)
            t.factors[0].data, t.factors[1].data = t.factors[0].data * scales, t.factors[1].data / scales
    return t


def change(before, after):
    return float((after.detach().double() - before.double()).norm() / before.double().norm())


def block(t, first, last):
    """Factors first to last of a chain, contracted by torch.einsum: (left rank, all modes, right rank)."""
    out = None
    for factor in t.factors[first : last + 1]:
        f = factor.detach()
        f = f[None] if factor is t.factors[0] else f
        f = f[..., None] if factor is t.factors[-1] else f
        f = f.reshape(f.shape[0], -1, f.shape[-1])
        out = f if out is None else torch.einsum("anb,bmc->anmc", out, f).reshape(out.shape[0], -1, f.shape[-1])
    return out


def test_the_tensor_stays_and_the_kl_falls(kind, posterior, prior):
    t = tensor_of(kind, posterior, prior)
    before, kl = t.dense().detach(), float(t.kl().detach())
    ranks = t.ranks
    rf.canonicalize_(t)
    assert change(before, t.dense()) < 1e-12
    assert float(t.kl().detach()) < kl - 1
    assert t.ranks == ranks


def test_float32_is_kept_to_a_millionth(kind, posterior):
    t = tensor_of(kind, posterior, dtype=torch.float32)
    before = dense(t.layout, [f.detach().double() for f in t.factors])
    rf.canonicalize_(t)
    assert t.factors[0].dtype == torch.float32
    assert change(before, dense(t.layout, [f.detach().double() for f in t.factors])) < 1e-6


def test_singular_values_over_twelve_decades(kind, posterior):
    t = tensor_of(kind, posterior)
    with torch.no_grad():
        for bond in t.layout.bonds:
            k, dim = t.layout.places(bond)[0]
            scale = torch.logspace(0, -12, t.ranks[bond], dtype=torch.float64)
            t.factors[k].data = (t.factors[k].data.movedim(dim, -1) * scale).movedim(-1, dim).contiguous()
    before = t.dense().detach()
    rf.canonicalize_(t)
    assert change(before, t.dense()) < 1e-12
    assert all(bool(torch.isfinite(p).all()) for p in t.parameters())


@pytest.mark.parametrize("places", [1, 2], ids=["one factor", "two factors"])
def test_slices_of_zeros(kind, posterior, places):
    t = tensor_of(kind, posterior)
    with torch.no_grad():
        for bond in t.layout.bonds:
            for k, dim in t.layout.places(bond)[:places]:
                t.factors[k].data.movedim(dim, 0)[-1] = 0
    before = t.dense().detach()
    rf.canonicalize_(t)
    assert change(before, t.dense()) < 1e-12
    assert all(bool(torch.isfinite(p).all()) for p in t.parameters())
    assert math.isfinite(float(t.kl().detach()))


def test_a_tensor_of_zeros_stays_one(kind, posterior):
    t = tensor_of(kind, posterior)
    with torch.no_grad():
        for factor in t.factors:
            factor.zero_()
    rf.canonicalize_(t)
    assert bool((t.dense() == 0).all())
    assert all(bool(torch.isfinite(p).all()) for p in t.parameters())


def test_ranks_beyond_what_the_unfoldings_carry(kind, posterior):
    t = tensor_of(kind, posterior)
    with torch.no_grad():
        for bond in t.layout.bonds:
            for k, dim in t.layout.places(bond):
                shape = list(t.factors[k].shape)
                shape[dim] = 15
                t.factors[k].data = torch.randn(shape, dtype=torch.float64)
                if len(t.log_stds):
                    t.log_stds[k].data = torch.randn(shape, dtype=torch.float64) - 3
    before, kl = t.dense().detach(), float(t.kl().detach())
    rf.canonicalize_(t)
    assert change(before, t.dense()) < 1e-12
    assert set(t.ranks.values()) == {15}
    assert float(t.kl().detach()) < kl


@pytest.mark.parametrize("kind", [rf.TT, rf.TTM])
def test_slices_of_a_chain_are_the_singular_vectors_of_its_unfoldings(kind):
    t = tensor_of(kind, rf.Point())
    rf.canonicalize_(t)
    for k in range(len(t.factors) - 1):
        left, right = block(t, 0, k)[0], block(t, k + 1, len(t.factors) - 1)[..., 0].T
        values = []
        for side in (left, right):
            gram = side.T @ side
            torch.testing.assert_close(gram, gram.diag().diag(), rtol=0, atol=1e-9 * float(gram.max()))
            values.append(gram.diag().sqrt())
        found = values[0] * values[1]
        torch.testing.assert_close(found, torch.linalg.svdvals(left @ right.T)[: len(found)], rtol=1e-9, atol=1e-12)


def test_slices_of_a_tucker_tensor_are_the_singular_vectors_of_its_unfoldings():
    t = tensor_of(rf.Tucker, rf.Point())
    rf.canonicalize_(t)
    for factor in t.factors:
        factor.requires_grad_(False)
    full = dense(t.layout, list(t.factors)).reshape(tuple(t.layout.mode_sizes.values()))
    for k, side in enumerate(t.factors[1:]):
        gram = side.T @ side
        torch.testing.assert_close(gram, gram.diag().diag(), rtol=0, atol=1e-9 * float(gram.max()))
        core = t.factors[0].movedim(k, 0).reshape(side.shape[1], -1)
        unfolding = full.movedim(k, 0).reshape(full.shape[k], -1)
        projected = (side / gram.diag().sqrt()).T @ unfolding
        values = torch.linalg.svdvals(unfolding)[: side.shape[1]]
        torch.testing.assert_close(projected.norm(dim=1), values, rtol=1e-9, atol=1e-12)
        assert core.shape[0] == side.shape[1]


def test_a_second_time_changes_next_to_nothing(kind, posterior, prior):
    t = tensor_of(kind, posterior, prior)
    start = float(t.kl().detach())
    rf.canonicalize_(t)
    first = float(t.kl().detach())
    rf.canonicalize_(t)
    assert float(t.kl().detach()) <= first
    assert first - float(t.kl().detach()) < 0.05 * (start - first)


def test_what_cannot_fall_stays_bit_for_bit(kind, monkeypatch):
    t = tensor_of(kind)
    before = [p.detach().clone() for p in t.parameters()]
    monkeypatch.setattr("rankfall._gauge._kl", lambda gauge, prior: 0.0)
    rf.canonicalize_(t)
    assert all(torch.equal(p, old) for p, old in zip(t.parameters(), before, strict=True))


def test_training_goes_on_without_a_jump(kind, posterior):
    torch.manual_seed(1)
    layer = rf.nn.Linear(30, 12, format=kind(4), posterior=posterior)
    truth, x = torch.randn(12, 30) / 5, torch.randn(200, 30)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    elbo = rf.ELBOLoss(layer, num_data=200)

    def steps(count):
        losses = []
        for _ in range(count):
            loss = elbo((layer(x) - x @ truth.T).square().sum(1).mean())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        return losses

    before = steps(150)[-20:]
    rf.canonicalize_(layer, optimizer)
    after = steps(20)
    spread = max(before) - min(before)
    assert max(after) < max(before) + spread


def test_a_changed_tensor_has_no_gradient_and_no_momentum(kind, posterior):
    t = tensor_of(kind, posterior)
    optimizer = torch.optim.Adam(t.parameters())
    t.sample().square().sum().backward()
    optimizer.step()
    second = [float(optimizer.state[p]["exp_avg_sq"].mean()) for p in t.parameters()]
    rf.canonicalize_(t, optimizer)
    for p, mean in zip(t.parameters(), second, strict=True):
        assert p.grad is None
        assert not optimizer.state[p]["exp_avg"].any()
        torch.testing.assert_close(optimizer.state[p]["exp_avg_sq"], torch.full_like(p, mean).detach())


def test_only_low_rank_tensors_and_only_finite_ones():
    with pytest.raises(ValueError, match=r"Linear has no low-rank tensor to canonicalize. Call rf.tensorize_"):
        rf.canonicalize_(torch.nn.Linear(3, 3))
    model = torch.nn.Sequential(rf.nn.Linear(12, 20, format=rf.TT(3)), rf.nn.Linear(20, 12, format=rf.TT(3)))
    with torch.no_grad():
        model[1].weight.factors[0][0] = math.nan
    before = [p.detach().clone() for p in model[0].parameters()]
    with pytest.raises(ValueError, match=r"'1' has factors that are NaN or infinite. Go back to a checkpoint"):
        rf.canonicalize_(model)
    assert all(torch.equal(p, old) for p, old in zip(model[0].parameters(), before, strict=True))


def second_moment(means, variances):
    """E[A^T A] of a left block, A with its last bond as columns, factors (bond, modes, bond); by torch.einsum."""
    moment = torch.ones(1, 1, dtype=torch.float64)
    for mean, variance in zip(means, variances, strict=True):
        moment = (
            torch.einsum("ab,ans,bnr->sr", moment, mean, mean)
            + torch.einsum("aa,ans->s", moment, variance).diag_embed()
        )
    return moment


@pytest.mark.parametrize("kind", [rf.TT, rf.TTM])
def test_with_noise_the_second_moments_of_both_sides_of_a_bond_become_the_same_numbers(kind):
    t = tensor_of(kind, rf.MeanField(0.3))
    gauge = _gauge._gauge(t.layout, [f.detach() for f in t.factors], [s.detach() for s in t.log_stds])
    ends = [(1, *f.shape) if k == 0 else (*f.shape, 1) for k, f in ((0, t.factors[0]), (1, t.factors[-1]))]
    shapes = [ends[0], *(f.shape for f in t.factors[1:-1]), ends[1]]
    means, variances = (
        [v.reshape(shape[0], -1, shape[-1]) for v, shape in zip(values, shapes, strict=True)]
        for values in (gauge.means, gauge.variances)
    )
    for k, bond in enumerate(_gauge._chain_bonds(gauge, by_noise=True)):
        left = second_moment(means[: k + 1], variances[: k + 1])
        right = second_moment(*([v.transpose(0, 2) for v in reversed(vs[k + 1 :])] for vs in (means, variances)))
        values = bond.root.square().diag()
        close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-9 * float(values.max()))
        close(bond.x.T @ left @ bond.x, values)
        close(bond.x_inverse.T @ right @ bond.x_inverse, values)
        torch.testing.assert_close(bond.x @ bond.x_inverse.T, torch.eye(len(values), dtype=torch.float64))


def test_slices_that_are_all_noise_are_not_stretched(kind):
    t = tensor_of(kind, rf.MeanField(), rf.HalfCauchy())
    with torch.no_grad():
        for mean, log_std in zip(t.factors, t.log_stds, strict=True):
            mean.copy_(1e-3 * torch.randn_like(mean))
            log_std.zero_()
    before, kl = t.dense().detach(), t.entry_kl()
    t.align_()
    assert change(before, t.dense()) < 1e-12
    assert t.entry_kl() < kl + 1


def root_mean_squares(t):
    """With the noise of the posterior, which is all there is to a factor at rest."""
    spreads = [log_std.detach().exp() for log_std in t.log_stds] or [torch.zeros(1)] * len(t.factors)
    pairs = zip(t.factors, spreads, strict=True)
    return torch.stack([(f.detach().square() + s.square()).mean().sqrt() for f, s in pairs])


def test_factors_end_alike_in_size_so_that_one_step_size_fits_them(kind, prior):
    for posterior in (rf.Point(), rf.MeanField()):
        t = tensor_of(kind, posterior, prior)
        with torch.no_grad():
            t.factors[0].mul_(1e-3)
        t.align_()
        sizes = root_mean_squares(t)
        assert float(sizes.max() / sizes.min()) < 1 + 1e-9


def test_aligning_keeps_the_tensor_whatever_the_kl_says(kind, posterior):
    t = tensor_of(kind, posterior)
    before = t.dense().detach()
    t.align_()
    assert change(before, t.dense()) < 1e-12
    for bond in t.ranks if kind in (rf.TT, rf.TTM) and isinstance(posterior, rf.Point) else ():
        strengths = t.strengths(bond)
        assert torch.equal(strengths, strengths.sort(descending=True).values)


def test_no_factor_runs_off_where_the_kl_would_let_it(kind, prior):
    """Under a log-uniform hyperprior the KL of a bond falls for ever as all its scales move to one side."""
    t = tensor_of(kind, rf.MeanField(), prior)
    with torch.no_grad():
        for bond in t.ranks:
            for k, dim in t.layout.places(bond):
                t.factors[k].select(dim, 0).mul_(1e-12)
    for _ in range(3):
        t.canonicalize_()
    sizes = root_mean_squares(t)
    # The core of Tucker is drawn to the size of its fixed prior, 10, but only so far.
    assert float(sizes.max() / sizes.min()) < (300 if kind is rf.Tucker else 1 + 1e-9)
