# SPDX-License-Identifier: Apache-2.0
"""One layer called by several threads at once, which serves requests as torch's layers do."""

import copy
import io
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import rankfall as rf

THREADS, CALLS = 4, 200


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = rf.nn.MultiheadAttention(16, 2, format=rf.TT(16))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self.attention(x, x, x)


LAYERS = {
    "LSTM": lambda: rf.nn.LSTM(16, 16, format=rf.TT(16)),
    "GRU": lambda: rf.nn.GRU(16, 16, format=rf.TT(16)),
    "attention": SelfAttention,
}


def outputs_of_threads(call, inputs):
    """The first output for each input; grad mode is one of each thread."""
    with ThreadPoolExecutor(THREADS) as pool:
        return [y[0] for y in pool.map(torch.no_grad()(call), inputs)]


def saved_and_loaded(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("name", LAYERS)
def test_threads_do_not_meet_in_a_layer(name):
    layer = LAYERS[name]().eval()
    kinds = [torch.randn(5, 2, 16) for _ in range(4)]
    expected = [layer(x)[0].detach() for x in kinds]
    found = outputs_of_threads(layer, kinds * (CALLS // 4))
    for k, y in enumerate(found):
        torch.testing.assert_close(y, expected[k % 4])
    for other in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), saved_and_loaded(layer)):
        torch.testing.assert_close(other(kinds[0])[0], expected[0])


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_of_threads_are_those_of_one(name):
    layer, xs = LAYERS[name]().eval(), [torch.randn(5, 2, 16) for _ in range(CALLS // 4)]

    def gradients(x):
        return torch.autograd.grad(layer(x)[0].sum(), [p for n, p in layer.named_parameters() if "log_stds" not in n])

    expected = [gradients(x) for x in xs]
    with ThreadPoolExecutor(THREADS) as pool:
        torch.testing.assert_close(list(pool.map(gradients, xs)), expected)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")  # The compiler's own.
@pytest.mark.parametrize("name", LAYERS)
def test_threads_do_not_meet_in_a_compiled_layer(name):
    layer, x = LAYERS[name]().eval(), torch.randn(5, 2, 16)
    expected = layer(x)[0].detach()
    torch.compiler.reset()
    # Only attention is one graph; torch runs its recurrent layers uncompiled.
    compiled = torch.compile(layer, fullgraph=name == "attention", backend="eager")
    for y in (compiled(x)[0], *outputs_of_threads(compiled, [x] * CALLS), layer(x)[0]):
        torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("name", LAYERS)
def test_a_call_may_call_the_layer_again(name, monkeypatch):
    layer, x = LAYERS[name]().eval(), torch.randn(5, 2, 16)
    expected, inside = layer(x)[0], []
    run = torch.func.functional_call

    def run_twice(*arguments):
        with monkeypatch.context() as once:
            once.setattr(torch.func, "functional_call", run)
            inside.append(layer(x)[0])
        return run(*arguments)

    monkeypatch.setattr(torch.func, "functional_call", run_twice)
    assert torch.equal(layer(x)[0], expected)
    assert len(inside) == 1
    assert torch.equal(inside[0], expected)
