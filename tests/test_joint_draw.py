# SPDX-License-Identifier: Apache-2.0
"""Draws of all factors with their KL, by compiled code."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import rankfall as rf
from conftest import FORMATS
from rankfall._elbo import JointDraw
from rankfall._joint_draw import library

pytestmark = pytest.mark.skipif(library() is None, reason="no C compiler")


def is_compiled(kl):
    """Draws and KL are leaves then."""
    return kl.grad_fn is None and kl.requires_grad


def drawn_of(model):
    return [f for t in model for f in t.drawn()]


def grads(model):
    return [p.grad for p in model.parameters()]


def expected(model, noise, weights, of_kl):
    """Gradients of means and log standard deviations by autograd, in float64, the noise held fixed."""
    wide = copy.deepcopy(model).double()
    means = [m for t in wide for m in t.factors]
    stds = [s.exp() for t in wide for s in t.log_stds]
    again = [m + s * e for m, s, e in zip(means, stds, noise, strict=True)]
    value = rf.kl(wide)
    loss = of_kl * value + sum((f * w.double()).sum() for f, w in zip(again, weights, strict=True))
    return value.float(), [g.float() for g in torch.autograd.grad(loss, list(wide.parameters()))]


def check(model, of_kl=0.7):
    weights = [torch.randn_like(f) for t in model for f in t.factors]
    draw = JointDraw(model)
    with draw() as kl:
        drawn = drawn_of(model)
    assert is_compiled(kl)
    pairs = [(m, s) for t in model for m, s in zip(t.factors, t.log_stds, strict=True)]
    noise = [(f.double() - m.double()).detach() / s.double().exp() for f, (m, s) in zip(drawn, pairs, strict=True)]
    assert all(bool((n.abs() < 7).all()) for n in noise)
    (of_kl * kl + sum((f * w).sum() for f, w in zip(drawn, weights, strict=True))).backward()
    draw.hand_on_()
    value, wanted = expected(model, noise, weights, of_kl)
    torch.testing.assert_close(kl.detach(), value.detach(), rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(grads(model), wanted, rtol=2e-4, atol=2e-4)


shapes = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 60)), min_size=1, max_size=3)


@settings(max_examples=20, deadline=None)
@pytest.mark.parametrize("kind", FORMATS)
@given(shapes=shapes, rank=st.integers(1, 9), half_cauchy=st.booleans(), seed=st.integers(0, 2**32))
def test_the_kl_and_all_gradients_are_those_of_autograd(kind, shapes, rank, half_cauchy, seed):
    torch.manual_seed(seed)
    prior = rf.HalfCauchy(0.5) if half_cauchy else rf.LogUniform()
    model = nn.ModuleList(
        rf.LowRankTensor(shape, kind(rank), prior=prior, posterior=rf.MeanField(0.3)) for shape in shapes
    )
    for t in model:
        for log_std in t.log_stds:
            log_std.data += 0.5 * torch.randn_like(log_std)
    check(model)


def test_large_factors_and_bonds_without_slices(kind):
    model = nn.ModuleList([rf.LowRankTensor((300, 200), kind(11)), rf.LowRankTensor((9, 8), kind(3))])
    model[1].keep_slices_(next(iter(model[1].ranks)), torch.tensor([], dtype=torch.int64))
    check(model)


@pytest.mark.parametrize("rank", [1, 5, 8, 20, 63, 64, 65, 80])
def test_many_rows_of_every_rank(rank):
    """Up to a rank several rows are worked on at once; sums of so many numbers as float would be nats away."""
    model = nn.ModuleList([rf.LowRankTensor((2100 + rank, 90), rf.TT(rank, out_modes=(2100 + rank,), in_modes=(90,)))])
    assert model[0].factors[0].shape == (2100 + rank, rank)
    check(model)


def one_factor(entries, log_std=0.0):
    """A tensor whose first factor has so many entries, of mean 0."""
    t = rf.LowRankTensor((entries, 1), rf.TT(1, out_modes=(entries,), in_modes=(1,)))
    with torch.no_grad():
        t.factors[0].fill_(0)
        t.log_stds[0].fill_(log_std)
    return nn.ModuleList([t])


def noise_of(model, draw):
    with draw():
        return model[0].drawn()[0].detach().flatten().clone()


def test_noise_is_normal_and_independent():
    model = one_factor(200_000)
    draw = JointDraw(model)
    rounds = torch.stack([noise_of(model, draw) for _ in range(5)])
    z = rounds.flatten().double()
    n = len(z)
    for power, wanted in ((1, 0.0), (2, 1.0), (3, 0.0), (4, 3.0), (6, 15.0)):
        values = z**power
        assert abs(float(values.mean()) - wanted) < 5 * float(values.std()) / math.sqrt(n)
    # Equally many in a hundred parts of equal chance: chi-squared of 99 degrees of freedom, 99 +- 14.
    counts = torch.bincount((torch.special.ndtr(z) * 100).long().clamp_max(99), minlength=100).double()
    assert float(((counts - n / 100) ** 2 / (n / 100)).sum()) < 99 + 5 * 14.1
    assert 4.2 < float(z.abs().max()) < 6.0
    # Neighbours, lanes, the two numbers of a pair, and the same entry in the next draw.
    for apart in (1, 2, 4, 8, 16, 32, 200_000):
        for a, b in ((z[apart:], z[:-apart]), (z[apart:] ** 2 - 1, z[:-apart] ** 2 - 1)):
            products = a * b
            assert abs(float(products.mean())) < 5 * float(products.std()) / math.sqrt(len(products))


def test_noise_follows_the_generator_of_torch():
    model = one_factor(37)
    draw = JointDraw(model)
    torch.manual_seed(3)
    first, second = noise_of(model, draw), noise_of(model, draw)
    torch.manual_seed(3)
    assert torch.equal(noise_of(model, JointDraw(model)), first)
    assert not torch.equal(first, second)


def test_standard_deviations_are_exact_over_all_decades():
    logs = torch.linspace(-80, 40, 4001)
    model = one_factor(len(logs))
    draw = JointDraw(model)
    torch.manual_seed(0)
    noise = noise_of(model, draw)
    model[0].log_stds[0].data.copy_(logs.view_as(model[0].log_stds[0]))
    torch.manual_seed(0)
    std = noise_of(model, draw).double() / noise.double()
    torch.testing.assert_close(std, logs.double().exp(), rtol=5e-7, atol=0)


@pytest.mark.parametrize("log_std", [-math.inf, math.inf, math.nan])
def test_what_is_no_number_shows(log_std):
    """So that rf.fit stops at it."""
    model = one_factor(20, log_std)
    with JointDraw(model)() as kl:
        pass
    assert not bool(torch.isfinite(kl))


def test_gradients_are_added_to_those_that_are_there():
    model = nn.ModuleList([rf.LowRankTensor((12, 20), rf.TTM(3))])
    draw = JointDraw(model)
    found = []
    for _ in range(3):
        with draw() as kl:
            loss = kl + drawn_of(model)[0].square().sum()
        loss.backward()
        draw.hand_on_()
        found.append([g.clone() for g in grads(model)])
    with draw() as kl:
        pass
    kl.backward()
    for p in model.parameters():
        p.grad = None
    draw.hand_on_()
    alone = [g.clone() for g in grads(model)]
    again, wanted = rf.kl(model), list(model.parameters())
    torch.testing.assert_close(alone, list(torch.autograd.grad(again, wanted)))
    assert all(bool((b - a).abs().max() > 0) for a, b in zip(found[0], found[1], strict=True))
    # The part of the KL is the same each time, and that of the draw is nothing but for the first factor.
    torch.testing.assert_close(found[2][1] - found[1][1], found[1][1] - found[0][1])
    torch.testing.assert_close(found[2][1], 3 * alone[1])


def test_a_layer_that_is_left_out_has_the_gradient_of_the_kl():
    model = nn.ModuleList([rf.LowRankTensor((12, 20), rf.TTM(3)), rf.LowRankTensor((8, 8), rf.TT(2))])
    draw = JointDraw(model)
    with draw() as kl:
        loss = 2 * kl + model[0].sample().square().sum()
    loss.backward()
    draw.hand_on_()
    alone = torch.autograd.grad(2 * rf.kl(model), list(model[1].parameters()))
    torch.testing.assert_close([p.grad for p in model[1].parameters()], list(alone))
    draw.hand_on_()  # Nothing is left.
    torch.testing.assert_close([p.grad for p in model[1].parameters()], list(alone))


def test_ranks_may_change_between_draws():
    model = nn.ModuleList([rf.LowRankTensor((12, 20), rf.TTM(4))])
    draw = JointDraw(model)
    for kept in (4, 2, 0):
        model[0].keep_slices_("r1", torch.arange(kept))
        with draw() as kl:
            assert [f.shape for f in drawn_of(model)] == [f.shape for f in model[0].factors]
        assert is_compiled(kl)
        torch.testing.assert_close(kl.detach(), rf.kl(model).detach())


def test_a_backward_pass_through_an_earlier_draw_is_refused():
    model = nn.ModuleList([rf.LowRankTensor((12, 20), rf.TTM(3))])
    draw = JointDraw(model)
    with draw():
        loss = model[0].sample().square().sum()
    with draw(), pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def other_priors(model):
    class Wide(rf.HalfCauchy):
        pass

    model[0].prior = Wide()


def hooked(model):
    model[0].factors[0].register_hook(lambda gradient: 0 * gradient)


def frozen(model):
    model[0].factors[0].requires_grad_(requires_grad=False)


def widened(model):
    model.double()


def nothing(model):
    pass


@pytest.mark.parametrize("change", [other_priors, hooked, frozen, widened])
def test_torch_draws_where_compiled_code_cannot(change):
    model = nn.ModuleList([rf.LowRankTensor((12, 20), rf.TTM(3))])
    change(model)
    draw = JointDraw(model)
    with draw() as kl:
        loss = kl + drawn_of(model)[0].sum()
    assert not is_compiled(kl)
    loss.backward()
    draw.hand_on_()
    assert model[0].log_stds[1].grad is not None
    if change is hooked:
        assert not bool(model[0].factors[0].grad.any())


@pytest.mark.parametrize("change", [nothing, frozen, widened])
def test_what_changes_between_draws_is_seen(change):
    model = nn.ModuleList([rf.LowRankTensor((12, 20), rf.TTM(3))])
    draw = JointDraw(model)
    with draw() as kl:
        assert is_compiled(kl)
    change(model)
    with draw() as kl:
        assert is_compiled(kl) == (change is nothing)
        loss = kl + drawn_of(model)[0].sum()
    loss.backward()
    draw.hand_on_()
    torch.testing.assert_close(kl.detach(), rf.kl(model).detach())
    assert (model[0].factors[0].grad is None) == (change is frozen)


def test_without_gradients_torch_draws():
    model = nn.ModuleList([rf.LowRankTensor((12, 20), rf.TTM(3))])
    with torch.no_grad(), JointDraw(model)() as kl:
        assert not kl.requires_grad
    torch.testing.assert_close(kl, rf.kl(model).detach())


@pytest.mark.parametrize("posterior", [rf.MeanField(1e-5), rf.MeanField(0.1)], ids=["little noise", "noise"])
def test_training_is_the_same_without_it(monkeypatch, posterior):
    x = torch.randn(256, 12)
    y = x @ torch.randn(12, 4)

    def trained():
        torch.manual_seed(1)
        model = nn.Sequential(rf.nn.Linear(12, 4, format=rf.TTM(3), posterior=posterior))
        return rf.fit(
            model,
            [(x[k : k + 64], y[k : k + 64]) for k in range(0, 256, 64)],
            lambda model, batch: (model(batch[0]) - batch[1]).square().sum(1),
            epochs=8,
            num_data=100_000,
            selection=None,
            progress=False,
        )

    compiled = trained()
    library.cache_clear()
    monkeypatch.setenv("RANKFALL_COMPILE", "0")
    plain = trained()
    library.cache_clear()
    tolerance = 1e-3 if posterior == rf.MeanField(1e-5) else 0.1
    for name in ("loss", "kl"):
        assert [r[name] for r in compiled] == pytest.approx([r[name] for r in plain], rel=tolerance)
    assert compiled[-1]["nll"] < compiled[0]["nll"]
    assert compiled != plain
