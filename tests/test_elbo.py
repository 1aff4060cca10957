# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch import nn

import rankfall as rf
from rankfall._divergence import kl_of_factors


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
        return kl_of_factors(t.layout, t.prior, values[:count], values[count:])

    assert torch.autograd.gradcheck(value, parameters, eps=1e-6, atol=1e-6, rtol=1e-5)


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
