# SPDX-License-Identifier: Apache-2.0
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import rankfall as rf
from laws import close, make, naive_dense


def network(format, posterior=None):
    return nn.Sequential(
        rf.nn.Linear(12, 20, format=format, posterior=posterior),
        nn.BatchNorm1d(20),
        nn.ReLU(),
        nn.Dropout(0.5),
        rf.nn.Linear(20, 3, format=format, posterior=posterior),
    )


def test_every_draw_is_a_linear_layer_of_drawn_factors(kind):
    t = make(kind(3), (6, 8))
    layer = rf.nn.Linear.around(t)
    x = torch.randn(5, 8, dtype=torch.float64)
    torch.manual_seed(7)
    outputs = rf.predict(layer, x, samples=3)
    t.train()
    torch.manual_seed(7)
    for output in outputs:
        pairs = zip(t.factors, t.log_stds, strict=True)
        factors = [m + s.exp() * torch.randn(m.shape, dtype=m.dtype) for m, s in pairs]
        close(output, x @ naive_dense(t, factors).T)


def test_the_mean_of_a_linear_models_draws_is_the_posterior_mean(kind):
    t = make(kind(2), (4, 6), posterior=rf.MeanField(0.1))
    x = torch.randn(3, 6, dtype=torch.float64)
    draws = rf.predict(rf.nn.Linear.around(t), x, samples=20_000)
    error = draws.std(0) / 20_000**0.5
    assert bool(((draws.mean(0) - x @ t.dense().T).abs() < 6 * error).all())


def test_dropout_and_normalisation_rest_and_modes_stay():
    model = network(rf.TTM(3), rf.Point())
    model[3].eval()
    before = {name: module.training for name, module in model.named_modules()}
    statistics = model[1].running_mean.clone()
    x = torch.randn(7, 12)
    outputs = rf.predict(model, x, samples=4)
    assert torch.equal(model[1].running_mean, statistics)
    assert {name: module.training for name, module in model.named_modules()} == before
    assert all(torch.equal(output, model.eval()(x)) for output in outputs)
    assert not outputs.requires_grad


def test_modes_stay_after_an_error():
    model = network(rf.TTM(3))
    with pytest.raises(ValueError, match="in_features=12"):
        rf.predict(model, torch.randn(7, 13))
    assert all(module.training for module in model.modules())


def test_draws_differ_where_the_posterior_is_wide():
    outputs = rf.predict(network(rf.TTM(3), rf.MeanField(0.5)), torch.randn(7, 12))
    assert outputs.shape == (32, 7, 3)
    assert float(outputs.std(0).min()) > 0


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = rf.nn.Linear(4, 4, format=rf.TT(2))

    def forward(self, x):
        return self.layer(x), x


@pytest.mark.parametrize(
    ("model", "samples", "error", "text"),
    [
        (network(rf.TTM(3)), 0, ValueError, "samples must be 1 or more, got 0."),
        (nn.Linear(12, 3), 4, ValueError, "Linear has no low-rank tensor to draw from."),
        (Pair(), 4, TypeError, "Pair returned a tuple, and only tensors can be stacked."),
    ],
    ids=["no samples", "dense", "a pair"],
)
def test_errors(model, samples, error, text):
    with pytest.raises(error, match=re.escape(text)):
        rf.predict(model, torch.randn(2, 12 if not isinstance(model, Pair) else 4), samples=samples)


def test_calls_from_several_threads_leave_the_modes_of_a_model():
    model = nn.Sequential(rf.nn.Linear(12, 3, format=rf.TTM(4))).eval()
    x = torch.randn(5, 12)
    before = model(x)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: rf.predict(model, x, samples=4), range(100)))
    assert all(one.shape == (4, 5, 3) for one in found)
    assert not any(module.training for module in model.modules())
    assert torch.equal(model(x), before)
