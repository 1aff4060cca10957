# SPDX-License-Identifier: Apache-2.0
import copy

import pytest
import torch
from torch import nn

import rankfall as rf
from fit_runs import data, fit, same_bits, state_of
from rankfall._statistics import learns_under_draws


def network(posterior=None, momentum=0.1):
    torch.manual_seed(3)
    return nn.Sequential(
        rf.nn.Linear(12, 20, format=rf.TTM(4), posterior=posterior or rf.MeanField(0.5)),
        nn.BatchNorm1d(20, momentum=momentum),
        nn.Tanh(),
        rf.nn.Linear(20, 6, format=rf.TT(4), posterior=posterior or rf.MeanField(0.5)),
        nn.BatchNorm1d(6, momentum=momentum),
        nn.Dropout(0.5),
        nn.Linear(6, 3),
    )


def normalised_by(model, batches):
    """Mean and variance of what comes to each normalisation, where each batch is normalised by its own."""
    first, second = [], []
    for x in batches:
        h = x @ model[0].weight.dense().T + model[0].bias
        first.append(h)
        whitened = (h - h.mean(0)) / (h.var(0, unbiased=False) + model[1].eps).sqrt()
        g = torch.tanh(whitened * model[1].weight + model[1].bias)
        second.append(g @ model[3].weight.dense().T + model[3].bias)
    return [
        (torch.stack([v.mean(0) for v in values]).mean(0), torch.stack([v.var(0) for v in values]).mean(0))
        for values in (first, second)
    ]


def assert_normalised_by(model, batches):
    for layer, (mean, variance) in zip((model[1], model[4]), normalised_by(model, batches), strict=True):
        torch.testing.assert_close(layer.running_mean, mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(layer.running_var, variance, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_statistics_are_those_of_the_posterior_mean(momentum):
    model, batches = network(momentum=momentum), torch.randn(3, 16, 12)
    model[4].eval()
    modes = [module.training for module in model.modules()]
    rf.refit_batch_norm_(model, list(batches))
    assert_normalised_by(model, batches)
    assert [module.training for module in model.modules()] == modes
    assert [layer.momentum for layer in (model[1], model[4])] == [momentum] * 2


def test_statistics_stay_after_an_error_and_without_a_batch():
    model = network()
    model(torch.randn(16, 12))
    before = state_of(model)
    with pytest.raises(ValueError, match=r"batches is empty, .* Pass a list of inputs\."):
        rf.refit_batch_norm_(model, [])
    with pytest.raises(ValueError, match="in_features=12"):
        rf.refit_batch_norm_(model, [torch.randn(16, 12), torch.randn(16, 13)])
    assert same_bits(state_of(model), before)
    assert all(module.training for module in model.modules())


def test_a_run_is_evaluated_with_the_statistics_of_the_mean_and_ends_with_them():
    model, batches = network(), [data()[0][:32], data()[0][32:]]
    loader = [(x, y) for x, y in zip(batches, data()[1].split(32), strict=True)]
    fit(model, loader, evaluate=lambda: assert_normalised_by(model, batches) or {})
    assert_normalised_by(model, batches)


def test_ranks_are_chosen_and_their_cuts_evaluated_with_the_statistics_of_the_mean():
    model = network()
    dead = torch.tensor([1.0, 1.0, 1.0, 1e-4])
    with torch.no_grad():
        for k, dim in model[0].weight.layout.places("r1"):
            for parameter, change in (
                (model[0].weight.factors[k], dead.mul),
                (model[0].weight.log_stds[k], dead.log().add),
            ):
                parameter.copy_(change(parameter.movedim(dim, -1)).movedim(-1, dim))
    history = fit(model, epochs=2, selection=rf.Shrinkage(0.05), kl_warmup=0)
    assert history[-1]["ranks"]["0"]["r1"] < 4
    assert_normalised_by(model, [data()[0]])


@pytest.mark.parametrize("posterior", [rf.Point(), rf.MeanField()])
def test_only_statistics_under_draws_are_replaced(posterior):
    model = network(posterior)
    assert learns_under_draws(model) == isinstance(posterior, rf.MeanField)
    assert not learns_under_draws(nn.Sequential(rf.nn.Linear(4, 4, format=rf.TT(2))))
    assert not learns_under_draws(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
    silent = nn.BatchNorm1d(4, track_running_stats=False)
    assert not learns_under_draws(nn.Sequential(rf.nn.Linear(4, 4, format=rf.TT(2)), silent))
    fit(model, epochs=1, optimizer=torch.optim.SGD(model.parameters(), lr=0.0))
    with torch.no_grad():
        gathered = 0.9 + 0.1 * model[0](data()[0]).var(0)
    assert torch.allclose(model[1].running_var, gathered) == isinstance(posterior, rf.Point)


def test_draws_have_the_statistics_of_each_draw_where_inputs_are_given():
    model, x, batches = network(), torch.randn(7, 12), list(torch.randn(3, 16, 12))
    model(batches[0])
    before, drawn = state_of(model), copy.deepcopy(model)
    torch.manual_seed(7)
    outputs = rf.predict(model, x, samples=2, batch_norm_inputs=batches)
    assert same_bits(state_of(model), before)
    torch.manual_seed(7)
    for output in outputs:
        with torch.no_grad():
            for mine, its in ((drawn[0], model[0]), (drawn[3], model[3])):
                for factor, value in zip(mine.weight.factors, its.weight.drawn(), strict=True):
                    factor.copy_(value)
        rf.refit_batch_norm_(drawn, batches)
        torch.testing.assert_close(output, drawn.eval()(x))


def test_frozen_normalisation_keeps_its_statistics_in_a_fit():
    class Frozen(nn.Sequential):
        def train(self, mode=True):
            super().train(mode)
            self[1].eval()
            return self

    model = Frozen(*network())
    model[1].running_mean.fill_(5.0)
    last = model[4].running_mean.clone()
    fit(model, epochs=1)
    assert bool((model[1].running_mean == 5.0).all())
    assert not torch.equal(model[4].running_mean, last)
