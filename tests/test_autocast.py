# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch import nn

import rankfall as rf


def test_kl_is_float32_under_autocast(kind, posterior):
    layer = rf.nn.Linear(64, 48, format=kind(4), posterior=posterior)
    exact = layer.weight.kl()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = rf.kl(layer)
    assert value.dtype == torch.float32
    assert torch.equal(value, exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_kl_of_half_precision_parameters_is_float32(kind, posterior, dtype):
    layer = rf.nn.Linear(64, 48, format=kind(4), posterior=posterior, dtype=dtype)
    wide = rf.nn.Linear(64, 48, format=kind(4), posterior=posterior)
    wide.load_state_dict(layer.state_dict())
    value = rf.kl(layer)
    assert value.dtype == torch.float32
    # The same numbers in float32: no step of the sum is rounded to half precision.
    torch.testing.assert_close(value, rf.kl(wide), rtol=1e-5, atol=1e-4)
    value.backward()
    assert all(p.grad.dtype == dtype and bool(torch.isfinite(p.grad).all()) for p in layer.weight.parameters())
    assert all(scale.dtype == torch.float32 for scale in layer.weight.prior_scales().values())


def test_kl_of_float64_parameters_is_float64(kind):
    assert rf.nn.Linear(6, 4, format=kind(2), dtype=torch.float64).weight.kl().dtype == torch.float64


def test_layers_work_under_autocast(kind, posterior):
    layer = rf.nn.Linear(63, 48, format=kind(4), posterior=posterior)
    x = torch.randn(16, 63)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = layer.eval()(x)
        layer.train()(x).float().square().mean().backward()
    assert low.dtype == torch.bfloat16  # As of nn.Linear.
    torch.testing.assert_close(low.float(), layer.eval()(x), rtol=0.1, atol=0.1)
    assert not torch.equal(low.float(), layer(x))
    assert all(p.grad.dtype == torch.float32 and bool(torch.isfinite(p.grad).all()) for p in layer.parameters())


@pytest.mark.parametrize("make", [rf.nn.Embedding, rf.nn.EmbeddingBag])
def test_tables_give_their_own_type_as_torchs_do(make, kind):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert make(300, 12, format=kind(3))(torch.tensor([[3, 5]])).dtype == torch.float32


def test_layers_work_in_bfloat16(kind, posterior):
    model = nn.Sequential(nn.Linear(63, 48), nn.ReLU()).to(torch.bfloat16)
    model = rf.tensorize_(model, kind(4), posterior=posterior).train()
    y = model(torch.randn(5, 63, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_initial_variance_survives_half_precision(kind):
    layer = rf.nn.Linear(64, 48, format=kind(4), dtype=torch.bfloat16)
    size = layer.weight.dense().float().square().mean().sqrt().item()
    assert size == pytest.approx((2 / 64) ** 0.5, rel=0.05)


@pytest.mark.parametrize("make", [rf.nn.LSTM, rf.nn.GRU])
def test_torch_gets_recurrent_weights_and_biases_of_one_type(make, kind, monkeypatch):
    layer, seen, call = make(12, 8, format=kind(3)), [], torch.func.functional_call

    def noted(module, values, *rest):
        seen.extend(value.dtype for value in values.values())
        return call(module, values, *rest)

    monkeypatch.setattr(torch.func, "functional_call", noted)
    x = torch.randn(5, 2, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        try:
            getattr(nn, make.__name__)(12, 8)(x)
        except RuntimeError as error:  # An LSTM without AVX-512.
            pytest.skip(f"torch's own layer cannot here: {error}")
        layer(x)
    assert set(seen) == {torch.float32}
