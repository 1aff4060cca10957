# SPDX-License-Identifier: Apache-2.0
from functools import partial

import pytest
import torch
from torch import nn

import rankfall as rf
from rankfall import _divergence
from rankfall._divergence import Factors, draw_with_kl, kl_of_factors
from rankfall._elbo import JointDraw


def two_layers():
    return nn.Sequential(rf.nn.Linear(12, 20, format=rf.TTM(3)), nn.ReLU(), rf.nn.Linear(20, 4, format=rf.CP(2)))


def test_kl_is_the_sum_over_all_tensors():
    model = two_layers()
    expected = model[0].weight.kl() + model[2].weight.kl()
    assert rf.kl(model).item() == pytest.approx(expected.item(), rel=1e-6)
    assert rf.kl(model).dim() == 0


def test_kl_reaches_every_factor_and_no_bias():
    model = two_layers()
    rf.kl(model).backward()
    assert all(bool((p.grad != 0).any()) for p in (*model[0].weight.parameters(), *model[2].weight.parameters()))
    assert model[0].bias.grad is None


@pytest.mark.parametrize("prior", [rf.HalfCauchy(0.5), rf.LogUniform()], ids=["half-cauchy", "log-uniform"])
def test_the_gradient_of_the_kl_is_that_of_finite_differences(kind, prior, posterior):
    """Scales are held fixed in the closed form; finite differences move them along."""
    torch.manual_seed(0)
    t = rf.LowRankTensor((4, 6), kind(2), prior=prior, posterior=posterior, dtype=torch.float64)
    parameters = [p.detach().clone().requires_grad_() for p in t.parameters()]
    count = len(t.factors)

    def value(*values):
        return kl_of_factors(t.prior, [Factors(t.layout, values[:count], values[count:])])

    assert torch.autograd.gradcheck(value, parameters, eps=1e-6, atol=1e-6, rtol=1e-5)
    assert torch.autograd.gradgradcheck(value, parameters, eps=1e-6, atol=1e-6, rtol=1e-5)


def test_a_draw_with_its_kl_can_be_differentiated_twice(kind):
    torch.manual_seed(0)
    t = rf.LowRankTensor((4, 6), kind(2), posterior=rf.MeanField(0.3), dtype=torch.float64)
    parameters = [p.detach().clone().requires_grad_() for p in t.parameters()]
    count = len(t.factors)

    def value_and_draw(*values):
        torch.manual_seed(1)
        value, (drawn,) = draw_with_kl(t.prior, [Factors(t.layout, values[:count], values[count:])])
        return value, *drawn

    assert torch.autograd.gradcheck(value_and_draw, parameters)
    assert torch.autograd.gradgradcheck(value_and_draw, parameters)


def test_the_curvature_of_a_loss_has_that_of_the_kl_in_it():
    """Not only where the incoming gradient needs one itself: `create_graph` alone has to do."""
    torch.manual_seed(0)
    layer = rf.nn.Linear(6, 4, format=rf.TT(2), dtype=torch.float64)
    factors = list(layer.weight.factors)
    factors[0].requires_grad_()
    first = torch.autograd.grad(rf.kl(layer), factors, create_graph=True)
    assert all(gradient.requires_grad for gradient in first)
    layer.weight.log_stds[0].requires_grad_(False)
    frozen = torch.autograd.grad(rf.kl(layer), factors, create_graph=True)
    torch.testing.assert_close(frozen, first)


@pytest.mark.parametrize(
    "sizes", [(0, 0), (20, 40), (20, 20), (10**6, 10**6)], ids=["all large", "of each", "no middle ones", "all small"]
)
def test_all_tensors_together_are_the_sum_of_each(monkeypatch, kind, posterior, sizes):
    """Law: one buffer for all layers changes neither the KL nor its gradient, however its sums are done."""
    torch.manual_seed(0)
    make = partial(rf.LowRankTensor, posterior=posterior, dtype=torch.float64)
    tensors = [make((4, 6), kind(2)), make((9, 8), kind(3)), make((5, 7), rf.Tucker(3)), make((3, 4, 5), rf.CP(2))]
    tensors[1].keep_slices_(next(iter(tensors[1].ranks)), torch.tensor([], dtype=torch.int64))
    other = make((6, 6), kind(2), prior=rf.LogUniform())
    model = nn.ModuleList([*tensors, other])
    alone = sum(t.kl() for t in model)
    expected = torch.autograd.grad(alone, list(model.parameters()))
    for name, size in zip(("_SMALL", "_LARGE"), sizes, strict=True):
        monkeypatch.setattr(_divergence, name, size)
    _divergence.flat_of.cache_clear()
    together = rf.kl(model)
    torch.testing.assert_close(together, alone)
    torch.testing.assert_close(torch.autograd.grad(together, list(model.parameters())), expected)
    _divergence.flat_of.cache_clear()


def test_what_is_kept_of_each_set_of_ranks_is_smaller_than_the_factors():
    layer = rf.nn.Embedding(20_000, 8, format=rf.TT(16, out_modes=(20_000,), in_modes=(8,)), posterior=rf.Point())
    _divergence.flat_of.cache_clear()
    rf.kl(layer)
    rf.kl(layer)
    factors = layer.weight.posterior_factors()
    shapes = ((factors.layout, tuple(mean.shape for mean in factors.means)),)
    kept = _divergence.flat_of(shapes, torch.device("cpu"), torch.float32)
    assert _divergence.flat_of.cache_info().hits == 2
    entries = sum(mean.numel() for mean in factors.means)
    assert entries > 10 * (kept.slices.nbytes + kept.counts.nbytes) / 4


def test_tensors_of_several_types_have_one_kl():
    model = nn.ModuleList(
        [rf.LowRankTensor((4, 6), rf.TT(2), dtype=dtype) for dtype in (torch.float64, torch.float32, torch.bfloat16)]
    )
    rf.kl(model).backward()
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in model.parameters())


def test_kl_of_a_lone_tensor():
    t = rf.LowRankTensor((4, 5, 6), rf.Tucker(2))
    assert torch.equal(rf.kl(t), t.kl())


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0, 3.0])
def test_loss_is_nll_plus_weighted_kl(beta):
    model = two_layers()
    nll = torch.tensor(2.5, requires_grad=True)
    loss = rf.ELBOLoss(model, num_data=1000, beta=beta)(nll)
    assert loss.item() == pytest.approx(2.5 + beta * rf.kl(model).item() / 1000, rel=1e-6)
    loss.backward()
    assert nll.grad.item() == 1.0
    gradient = model[0].weight.factors[0].grad
    expected = torch.autograd.grad(rf.kl(model), model[0].weight.factors[0])[0] * beta / 1000
    torch.testing.assert_close(gradient, expected)


def test_beta_is_one_unless_said():
    model = two_layers()
    assert rf.ELBOLoss(model, 10).beta == 1.0


def test_kl_follows_a_cut():
    model = two_layers()
    loss = rf.ELBOLoss(model, num_data=10)
    before = loss(torch.zeros(())).item()
    model[0].weight.keep_slices_("r1", torch.tensor([1]))
    assert loss(torch.zeros(())).item() < before


def test_minimising_the_loss_shrinks_what_the_data_does_not_need():
    """Data that is all zero: the KL pulls the energy of every slice down."""
    layer = rf.nn.Linear(6, 8, format=rf.TT(3), posterior=rf.Point())
    loss, x = rf.ELBOLoss(layer, num_data=20), torch.randn(20, 6)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    before = layer.weight.energies()
    for _ in range(200):
        optimizer.zero_grad()
        loss(layer(x).square().mean()).backward()
        optimizer.step()
    assert all(bool((after < before[bond]).all()) for bond, after in layer.weight.energies().items())


def test_a_joint_draw_is_one_draw_with_the_kl(kind, posterior):
    """Law: the KL and its gradient are those of `rf.kl`, and draws that of mean + std * noise, noise held fixed."""
    torch.manual_seed(0)
    make = partial(rf.LowRankTensor, posterior=posterior, dtype=torch.float64)
    model = nn.ModuleList([make((4, 6), kind(2)), make((9, 8), kind(3)), make((6, 6), kind(2), prior=rf.LogUniform())])
    model[1].keep_slices_(next(iter(model[1].ranks)), torch.tensor([], dtype=torch.int64))
    parameters = list(model.parameters())
    with JointDraw(model)() as kl:
        drawn = [f for t in model for f in t.drawn()]
        assert all(a is b for a, b in zip(drawn, [f for t in model for f in t.drawn()], strict=True))
    assert not any(t.given for t in model)
    torch.testing.assert_close(kl, rf.kl(model))
    weights = [torch.randn_like(f) for f in drawn]
    loss = 3 * kl + sum((f.square() * w).sum() for f, w in zip(drawn, weights, strict=True))
    found = torch.autograd.grad(loss, parameters)
    means = [m for t in model for m in t.factors]
    stds = [s.exp() if len(t.log_stds) else 0.0 for t in model for s in (t.log_stds or t.factors)]
    noise = [
        (f - m).detach() / (s.detach() if posterior != rf.Point() else 1.0)
        for f, m, s in zip(drawn, means, stds, strict=True)
    ]
    again = [m + s * e for m, s, e in zip(means, stds, noise, strict=True)]
    expected = 3 * rf.kl(model) + sum((f.square() * w).sum() for f, w in zip(again, weights, strict=True))
    torch.testing.assert_close(found, torch.autograd.grad(expected, parameters))


def test_a_joint_draw_ends_with_an_error():
    model = two_layers()
    with pytest.raises(KeyError), JointDraw(model)():
        raise KeyError
    x = torch.randn(3, 12)
    assert not torch.equal(model(x), model(x))


def test_joint_draws_have_the_spread_of_the_posterior():
    model = two_layers()
    tensor = model[0].weight
    draw = JointDraw(model)
    with torch.no_grad():
        tensor.log_stds[0].copy_(torch.linspace(-3, 1, tensor.log_stds[0].numel()).view(tensor.log_stds[0].shape))
        drawn = []
        for _ in range(4000):
            with draw():
                drawn.append(tensor.drawn()[0])
    drawn = torch.stack(drawn)
    torch.testing.assert_close(drawn.std(0), tensor.log_stds[0].exp(), rtol=0.1, atol=0)
    assert bool(((drawn.mean(0) - tensor.factors[0]).abs() < 5 * tensor.log_stds[0].exp() / 4000**0.5).all())


def test_the_gradient_of_the_kl_by_torch_func_is_that_of_autograd(posterior):
    tensor = rf.LowRankTensor((12, 20), rf.TTM(4), posterior=posterior)
    parameters = dict(tensor.named_parameters())
    found = torch.func.grad(lambda p: torch.func.functional_call(_Kl(tensor), p, ()))(
        {f"tensor.{name}": p.detach() for name, p in parameters.items()}
    )
    wanted = torch.autograd.grad(rf.kl(tensor), list(parameters.values()))
    for name, gradient in zip(parameters, wanted, strict=True):
        torch.testing.assert_close(found[f"tensor.{name}"], gradient)


class _Kl(nn.Module):
    def __init__(self, tensor):
        super().__init__()
        self.tensor = tensor

    def forward(self):
        return self.tensor.kl()


def test_a_kl_in_inference_mode_leaves_nothing_behind():
    layer = rf.nn.Linear(13, 21, format=rf.TTM(3))
    with torch.inference_mode():
        rf.kl(layer)
    first = torch.autograd.grad(rf.kl(layer), list(layer.weight.factors), create_graph=True)
    sum(one.square().sum() for one in first).backward()
    assert all(bool(factor.grad.isfinite().all()) for factor in layer.weight.factors)
