# SPDX-License-Identifier: Apache-2.0
"""Recurrent layers leave cuDNN where its gradients are not torch's own; test_gpu.py asks a GPU."""

import copy

import pytest
import torch
from torch import nn

import rankfall as rf
from rankfall import _cudnn
from rankfall._graphs import Replayed

OPTIONS = (12, 8, 2, True, True)


@pytest.fixture(autouse=True)
def _asked_anew():
    _cudnn._TRIED.clear()
    yield
    _cudnn._TRIED.clear()


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_the_trial_has_all_gradients_and_leaves_the_noise_as_it_was(kind):
    state = torch.get_rng_state()
    with torch.no_grad():
        found = _cudnn._gradients(kind, OPTIONS, torch.device("cpu"), torch.float32, cudnn=True)
    assert torch.equal(torch.get_rng_state(), state)
    layer = kind(12, 8, 2, bidirectional=True)
    assert [g.shape for g in found] == [(32, 64, 12), *(p.shape for p in layer.parameters())]
    assert _cudnn._agrees((kind, OPTIONS, torch.device("cpu"), torch.float32))


def test_wrong_gradients_are_reported_once(monkeypatch):
    monkeypatch.setattr(_cudnn, "_gradients", lambda *_, cudnn: [torch.ones(3) * (0.5 if cudnn else 1.0)])
    asked = nn.LSTM, OPTIONS, torch.device("cpu"), torch.float32
    with pytest.warns(RuntimeWarning, match="cuDNN's LSTM of hidden_size=8 gives other gradients on cpu .*50%"):
        assert not _cudnn._agrees(asked)
    assert not _cudnn._agrees(asked)


@pytest.mark.parametrize(("is_right", "is_captured"), [(True, False), (False, False), (True, True)])
@pytest.mark.parametrize("make", [rf.nn.LSTM, rf.nn.GRU])
def test_a_layer_runs_without_cudnn_where_that_is_wrong_or_cannot_be_tried(make, is_right, is_captured, monkeypatch):
    layer, seen, call = make(12, 8, format=rf.TT(3)), [], torch.func.functional_call

    def noted(*arguments):
        seen.append(torch.backends.cudnn.enabled)
        return call(*arguments)

    monkeypatch.setattr(torch.func, "functional_call", noted)
    monkeypatch.setattr(type(layer), "_steps_are_own", lambda *_: False)
    monkeypatch.setattr(_cudnn, "_is_asked", lambda _: True)
    monkeypatch.setattr(_cudnn, "_is_captured", lambda: is_captured)
    monkeypatch.setattr(_cudnn, "_is_right", lambda *_: is_right)
    layer(torch.randn(5, 2, 12))
    assert seen == [is_right and not is_captured]
    monkeypatch.setattr(_cudnn, "_is_captured", lambda: False)
    layer(torch.randn(5, 2, 12))
    assert seen[1:] == [is_right]
    monkeypatch.setattr(_cudnn, "_is_captured", lambda: True)
    layer(torch.randn(5, 2, 12))
    assert seen[2:] == [is_right], "it was tried before the capture"
    assert torch.backends.cudnn.enabled


@pytest.mark.parametrize("make", [rf.nn.LSTM, rf.nn.GRU])
def test_parameters_stay_where_they_are_though_torch_moves_what_it_is_given(make, monkeypatch):
    """As it does for cuDNN, which wants weights and biases side by side; test_..._in_graphs asks cuDNN itself."""
    layer, call, moved = make(12, 8, format=rf.TT(3), posterior=rf.Point()), torch.func.functional_call, []
    places, x = [p.data_ptr() for p in layer.parameters()], torch.randn(5, 2, 12)
    monkeypatch.setattr(type(layer), "_steps_are_own", lambda *_: False)
    layer(x)[0].square().sum().backward()
    wanted = [p.grad for p in layer.parameters()]
    layer.zero_grad()

    def moving(module, values, *arguments):
        with torch.no_grad():
            for value in values.values():
                moved.append(value.set_(value.clone()))
        return call(module, values, *arguments)

    monkeypatch.setattr(torch.func, "functional_call", moving)
    layer(x)[0].square().sum().backward()
    assert len(moved) == 4
    assert [p.data_ptr() for p in layer.parameters()] == places
    for parameter, gradient in zip(layer.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_no_other_device_is_asked():
    assert not _cudnn._is_asked(torch.device("cpu"))


on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def layer_on_gpu(make) -> nn.Module:
    sizes = {"num_layers": 2, "bidirectional": True, "batch_first": True}
    return make(64, 128, **sizes, format=rf.TT(8), posterior=rf.Point(), device="cuda")


@on_gpu
@pytest.mark.parametrize("make", [rf.nn.LSTM, rf.nn.GRU])
def test_parameters_stay_where_they_are(make):
    """cuDNN lays weights side by side, and what a CUDA graph reads must not go with them."""
    layer = layer_on_gpu(make)
    places = [p.data_ptr() for p in layer.parameters()]
    for length in (9, 5):
        layer(torch.randn(3, length, 64, device="cuda"))[0].sum().backward()
    assert [p.data_ptr() for p in layer.parameters()] == places


@on_gpu
@pytest.mark.filterwarnings("ignore:cuDNN's:RuntimeWarning")  # Of GPUs on which it is wrong.
@pytest.mark.parametrize("make", [rf.nn.LSTM, rf.nn.GRU])
def test_gradients_of_a_recurrent_layer_are_the_same_in_graphs(make):
    """Also of graphs between whose replays other passes were made by hand, of lengths that come once."""
    layer = layer_on_gpu(make)
    twin = copy.deepcopy(layer)

    def run(which: nn.Module, given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        loss = which(given)[0].square().mean()
        loss.backward()
        return (loss.detach(),)

    replayed = Replayed(lambda given: run(layer, given), list(layer.parameters()), torch.device("cuda"))
    for length in (128, 40, 128, 128, 128, 7, 128, 33, 40, 128, 40, 21, 40, 128, 50, 40, 128):
        x = torch.randn(64, length, 64)
        layer.zero_grad()
        twin.zero_grad()
        (found,), (wanted,) = replayed(x), run(twin, x.cuda())
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)
        for one, other in zip(layer.parameters(), twin.parameters(), strict=True):
            assert (one.grad - other.grad).norm() <= 0.01 * other.grad.norm() + 1e-7
