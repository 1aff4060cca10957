# SPDX-License-Identifier: Apache-2.0
"""A search that remembers what layers gave finds the same, and runs only what follows from the layer that changes."""

import copy
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import rankfall as rf
from rankfall import _evidence
from rankfall._memo import Memo

N = 300


def network():
    torch.manual_seed(0)
    widths = (12, 16, 16, 4)
    layers = [rf.nn.Linear(a, b, format=rf.TTM(3)) for a, b in pairwise(widths)]
    # What writes into its input would spoil what is remembered, were it not a copy.
    return nn.Sequential(layers[0], nn.ReLU(inplace=True), layers[1], nn.ReLU(inplace=True), layers[2])


def batches_of(model):
    x, y = torch.randn(N, 12), torch.randint(4, (N,))
    each = nn.CrossEntropyLoss(reduction="none")
    return [lambda a=a, b=b: each(model(a), b) for a, b in zip(x.split(100), y.split(100), strict=True)]


def search(model, batches):
    options = {"num_data": 20_000, "beta": 1.0, "z": 2.0, "max_cut": 0.5}
    return _evidence.search_ranks_(model, None, batches=batches, **options)


@pytest.fixture
def runs(monkeypatch):
    """How often each tensor was multiplied with."""
    counts = {}
    original = rf.LowRankTensor.linear

    def counted(self, *arguments):
        counts[self] = counts.get(self, 0) + 1
        return original(self, *arguments)

    monkeypatch.setattr(rf.LowRankTensor, "linear", counted)
    return counts


def test_a_search_with_a_memory_finds_the_same_and_does_less(runs, monkeypatch):
    model = network()
    found = {}
    for name, most in (("with", 2**20), ("without", 0)):
        one = copy.deepcopy(model)
        torch.manual_seed(1)
        batches = batches_of(one)
        monkeypatch.setattr(_evidence, "Memo", lambda model, most=most: Memo(model, most))
        runs.clear()
        found[name] = (*search(one, batches), list(one.parameters()), [runs[one[k].weight] for k in (0, 2, 4)])
    (cuts, misses, parameters, few), (same_cuts, same_misses, same_parameters, many) = found.values()
    assert cuts
    assert (cuts, misses) == (same_cuts, same_misses)
    assert all(torch.equal(a, b) for a, b in zip(parameters, same_parameters, strict=True))
    assert len(set(many)) == 1  # Without it every layer runs each time,
    assert few[0] <= many[0] / 2  # with it the first one only while it is the one that changes,
    assert few[2] == many[2]  # and what comes last always.


def test_what_a_layer_gave_is_repeated_for_equal_inputs_alone(runs):
    layer = rf.nn.Linear(12, 16, format=rf.TT(2)).eval()
    memo, x = Memo(layer), torch.randn(5, 12)
    (batch,) = memo.over([lambda: layer(x)])
    with memo.watching(), torch.no_grad():
        with memo.filling():
            first = batch()
        assert torch.equal(batch(), first)
        assert runs[layer.weight] == 1
        first.zero_()  # As an activation in place would.
        assert not torch.equal(batch(), first)
        x[0, 0] += 1
        batch()
        assert runs[layer.weight] == 2
    assert "forward" not in vars(layer)


def test_a_layer_whose_tensor_changes_is_run(runs):
    layers = nn.ModuleList(rf.nn.Linear(12, 12, format=rf.TT(2)) for _ in range(3)).eval()
    layers[1].weight = layers[0].weight  # Shared: it changes in both.
    memo, x = Memo(layers), torch.randn(5, 12)
    (batch,) = memo.over([lambda: sum(layer(x) for layer in layers)])
    with memo.watching(), torch.no_grad():
        with memo.filling():
            batch()
        with memo.changing(layers[0].weight):
            batch()
        assert (runs[layers[0].weight], runs[layers[2].weight]) == (4, 1)
        batch()
        assert (runs[layers[0].weight], runs[layers[2].weight]) == (4, 1)
        memo.forget(layers[0].weight)
        batch()
        assert (runs[layers[0].weight], runs[layers[2].weight]) == (6, 1)


def test_no_more_is_kept_than_fits(runs):
    layer = rf.nn.Linear(12, 16, format=rf.TT(2)).eval()
    inputs = torch.randn(4, 10, 12)
    memo = Memo(layer, most=2 * 10 * (12 + 16) * 4)  # Two batches.
    batches = memo.over([lambda x=x: layer(x) for x in inputs])
    with memo.watching(), torch.no_grad():
        for _ in range(2):
            with memo.filling():
                for batch in batches:
                    batch()
        assert runs[layer.weight] == 4 + 2
        inputs += 1  # Another state: what is kept gives its place to it.
        for _ in range(2):
            with memo.filling():
                for batch in batches:
                    batch()
    assert runs[layer.weight] == 6 + 4 + 2


@pytest.mark.parametrize("packed", [False, True])
def test_sequences_options_and_tuples_are_remembered(packed):
    layer = rf.nn.LSTM(6, 8, batch_first=True, format=rf.TT(2)).eval()
    steps = torch.randn(2, 5, 6)
    x = pack_sequence(list(steps)) if packed else steps
    state = torch.zeros(1, 2, 8), torch.zeros(1, 2, 8)
    memo = Memo(layer)
    (batch,) = memo.over([lambda: layer(x, state)])
    (named,) = memo.over([lambda: layer(input=x, hx=state)])
    with memo.watching(), torch.no_grad():
        with memo.filling():
            output, (h, c) = batch()
        with memo.changing(layer.weight_ih_l0):
            again, (h2, c2) = batch()
        repeated, (h3, c3) = batch()
        torch.testing.assert_close(named()[1][0], h)
    for one in (again, repeated):
        assert type(one) is type(output)
        assert isinstance(one, PackedSequence) == packed
    flat = [value.data if packed else value for value in (output, again, repeated)]
    torch.testing.assert_close(flat[1], flat[0])
    assert torch.equal(flat[2], flat[0])
    assert torch.equal(h3, h)
    assert torch.equal(c3, c)
    torch.testing.assert_close((h2, c2), (h, c))


def test_an_error_leaves_the_layers_as_they_were():
    model = network()
    batches = batches_of(model)

    def fails():
        raise RuntimeError("no more rows")

    with pytest.raises(RuntimeError, match="no more rows"):
        search(model, [*batches, fails])
    assert all("forward" not in vars(module) for module in model.modules())


def test_a_forward_of_its_own_is_kept():
    layer = rf.nn.Linear(12, 16, format=rf.TT(2)).eval()
    original = layer.forward
    layer.forward = lambda x: original(x) + 1
    given, x = layer.forward, torch.randn(5, 12)
    memo = Memo(layer)
    with memo.watching(), torch.no_grad():
        assert torch.equal(layer(x), original(x) + 1)
    assert layer.forward is given


def test_compiled_models_are_left_alone():
    model = network()
    assert Memo(model)._layers
    assert not Memo(torch.compile(model, backend="eager"))._layers
    model[0].compile(backend="eager")
    assert not Memo(model)._layers
