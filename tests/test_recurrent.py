# SPDX-License-Identifier: Apache-2.0
"""Recurrent layers against torch's own with weights that share no code with the library."""

import copy
import math
import pickle

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import rankfall as rf
from laws import close, make, naive_dense
from rankfall import _machine, _onednn, _products, _recurrence
from rankfall.nn._formed import blocks_apart

PAIRS = [(rf.nn.LSTM, nn.LSTM), (rf.nn.GRU, nn.GRU)]
FORMATS = [rf.CP, rf.Tucker, rf.TT, rf.TTM, rf.TR]
SEED = 3


def pair(ours, theirs, format, **options):
    """A layer of ours with tensors of entries of order one, and torch's of the same options and biases."""
    dense = theirs(6, 8, dtype=torch.float64, **options)
    layer = ours.from_dense(dense, format=format)
    for name, tensor in weights_of(layer).items():
        setattr(layer, name, make(tensor.format, tensor.shape))
    return layer, dense


def weights_of(layer):
    return {name: module for name, module in layer.named_children() if isinstance(module, rf.LowRankTensor)}


def drawn_weights(layer):
    """The dense weights of one forward: tensors are drawn in the order of torch's parameters."""
    torch.manual_seed(SEED)
    found = {}
    for name, t in weights_of(layer).items():
        factors = list(t.factors)
        if t.training and len(t.log_stds):
            factors = [
                m + s.exp() * torch.randn(m.shape, dtype=m.dtype) for m, s in zip(t.factors, t.log_stds, strict=True)
            ]
        found[name] = naive_dense(t, factors)
    return found


def flat(output):
    """All tensors of an output of torch's layer, in order."""
    if isinstance(output, torch.Tensor):
        return [output]
    if isinstance(output, PackedSequence):
        return [output.data]
    return [tensor for part in output for tensor in flat(part)]


def check(layer, dense, arguments, leaves=()):
    for mode in (True, False):
        layer.train(mode)
        dense.train(mode)
        biases = {n: p for n, p in layer.named_parameters() if n.startswith("bias")}
        expected = flat(torch.func.functional_call(copy.deepcopy(dense), drawn_weights(layer) | biases, arguments))
        torch.manual_seed(SEED)
        actual = flat(layer(*arguments))
        trained = [p for n, p in layer.named_parameters() if mode or "log_stds" not in n]
        directions = [torch.randn_like(e) for e in expected]
        for ours, theirs in zip(actual, expected, strict=True):
            close(ours, theirs)
        for ours, theirs in zip(
            torch.autograd.grad(actual, [*leaves, *trained], directions, retain_graph=True),
            torch.autograd.grad(expected, [*leaves, *trained], directions, retain_graph=True),
            strict=True,
        ):
            close(ours, theirs, 1e-9)


def sequences(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_it_is_torchs_layer_with_the_dense_weights(steps, kind, ours, theirs):
    x = sequences(5, 3, 6)
    check(*pair(ours, theirs, kind(3)), (x,), [x])
    check(*pair(ours, theirs, kind(3), num_layers=2, bidirectional=True, batch_first=True), (x,), [x])
    alone = sequences(5, 6)
    check(*pair(ours, theirs, kind(3), bias=False), (alone,), [alone])


@pytest.fixture(params=["own steps", "own steps by thin matrices", "torch's kernel"])
def steps(request, monkeypatch):
    """What does the steps; by itself a layer takes the fastest."""
    own = request.param != "torch's kernel"
    monkeypatch.setattr(_recurrence, "_THIN", 0 if "thin" in request.param else math.inf)
    monkeypatch.setattr(rf.nn.LSTM, "_is_worth_it", lambda *_: own)
    monkeypatch.setattr(rf.nn.GRU, "_is_worth_it", lambda *_: own)


def test_the_faster_steps_are_taken():
    layer = rf.nn.LSTM(256, 128, format=rf.TTM(20))
    even = torch.zeros(100, 4, 256)
    uneven = pack_padded_sequence(even, torch.tensor([100, 100, 100, 99]))
    assert not layer._steps_are_own(even, None)
    assert not layer._steps_are_own(pack_padded_sequence(even, torch.full((4,), 100)), None)
    assert layer._steps_are_own(uneven, None)
    cheap = rf.nn.LSTM(256, 128, format=rf.TT(2))
    assert cheap._steps_are_own(even, None)
    with torch.autocast("cpu", torch.bfloat16):
        assert not layer._steps_are_own(uneven, None)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    which=st.sampled_from(FORMATS),
    of=st.sampled_from(PAIRS),
    layers=st.integers(1, 2),
    both=st.booleans(),
    first=st.booleans(),
    bias=st.booleans(),
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4),
)
def test_any_packed_sequence(steps, which, of, layers, both, first, bias, lengths):
    ordered = lengths == sorted(lengths, reverse=True)
    lengths = torch.tensor(lengths)
    x = sequences(int(lengths.max()), len(lengths), 6)
    packed = pack_padded_sequence(x, lengths, enforce_sorted=ordered)
    options = {"num_layers": layers, "bidirectional": both, "batch_first": first, "bias": bias}
    check(*pair(*of, which(2), **options), (packed,), [x])


def test_first_states(steps, kind):
    x, h, c = sequences(4, 3, 6), sequences(2, 3, 8), sequences(2, 3, 8)
    check(*pair(rf.nn.LSTM, nn.LSTM, kind(2), num_layers=2), (x, (h, c)), [x, h, c])
    check(*pair(rf.nn.GRU, nn.GRU, kind(2), num_layers=2), (x, h), [x, h])


def test_the_gate_is_a_mode_and_is_never_padded():
    for format in (rf.CP(4), rf.Tucker(4), rf.TT(4), rf.TTM(4), rf.TR(4)):
        for hidden in (128, 127, 24, 1):
            for blocks in (3, 4):
                held = blocks_apart(format, blocks, (blocks * hidden, 100))
                layout = held.layout((blocks * hidden, 100))
                assert layout.modes[0][0] == blocks
                assert layout.padded_shape[0] == blocks * hidden
    assert blocks_apart(rf.TTM(4), 4, (512, 256)).layout((512, 256)).modes == ((4, 4, 4, 8), (1, 4, 8, 8))
    assert blocks_apart(rf.TT(4, out_modes=(16, 32)), 4, (512, 256)).out_modes == (16, 32)
    given = rf.TT(4, out_modes=(4, 128), in_modes=(16, 16))
    assert blocks_apart(given, 4, (512, 256)).in_modes == (16, 16)
    assert blocks_apart(given, 4, (512, 128)).in_modes == (8, 16)


def test_in_modes_hold_for_the_weights_that_they_fit():
    layer = rf.nn.LSTM(12, 16, format=rf.TT(3, in_modes=(3, 4)))
    assert layer.weight_ih_l0.layout.modes[1] == (3, 4)
    assert layer.weight_hh_l0.layout.padded_shape[1] == 16
    layer = rf.nn.LSTM(12, 16, format=rf.TTM(3, in_modes=(1, 3, 4)))
    assert layer.weight_ih_l0.layout.modes[1] == (1, 3, 4)


def test_dropout_between_layers_follows_the_mode():
    layer = rf.nn.LSTM(6, 8, 2, dropout=0.9, format=rf.TT(3), posterior=rf.Point())
    x = torch.randn(4, 3, 6)
    assert not torch.equal(layer(x)[0], layer(x)[0])
    layer.eval()
    assert torch.equal(layer(x)[0], layer(x)[0])


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_options_may_be_set_afterwards(steps, ours, theirs):
    layer, dense = pair(ours, theirs, rf.TT(3), num_layers=2, dropout=0.9)
    x = sequences(4, 3, 6)
    layer(x)
    for one in (layer, dense):
        one.dropout, one.batch_first = 0.0, True
    check(layer, dense, (x,), [x])
    assert (layer.dropout, layer.batch_first) == (0.0, True)
    assert repr(layer).startswith(f"{ours.__name__}(6, 8, num_layers=2, batch_first=True)")
    assert repr(copy.deepcopy(layer)) == repr(pickle.loads(pickle.dumps(layer))) == repr(layer)
    plain = rf.export(nn.Sequential(layer))[0]
    assert (plain.dropout, plain.batch_first) == (0.0, True)


def test_after_cuts_down_to_zero(kind):
    layer, dense = pair(rf.nn.GRU, nn.GRU, kind(3))
    for tensor in weights_of(layer).values():
        for bond, rank in tensor.ranks.items():
            tensor.keep_slices_(bond, torch.arange(max(rank - 1, 1)))
    x = sequences(4, 3, 6)
    check(layer, dense, (x,), [x])
    bond = next(iter(layer.weight_hh_l0.ranks))
    layer.weight_hh_l0.keep_slices_(bond, torch.zeros(0, dtype=torch.int64))
    assert torch.isfinite(layer(x)[0]).all()


def test_a_forward_leaves_nothing_behind():
    layer = rf.nn.LSTM(6, 8, format=rf.TT(3))
    x = torch.randn(4, 3, 6)
    layer(x)
    assert all(weight.is_meta for weight in layer.like._flat_weights)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other.eval()(x)[0], layer.eval()(x)[0])
    assert all(
        k.startswith("bias") or ".factors." in k or ".log_stds." in k
        for k in (*layer.state_dict(), *dict(layer.named_parameters()))
    )
    assert not any(p.is_meta for p in layer.parameters())


def test_the_rest_of_the_library_sees_every_tensor(kind):
    model = rf.tensorize_(nn.Sequential(nn.LSTM(12, 16, num_layers=2)), kind(3))
    names = {f"0.weight_{part}_l{k}" for part in ("ih", "hh") for k in (0, 1)}
    assert rf.ranks(model).keys() == names
    assert len(rf.summary(model).layers) == 4
    assert rf.summary(model).dense_parameters == sum(p.numel() for p in nn.LSTM(12, 16, num_layers=2).parameters())
    assert float(rf.kl(model).detach()) == pytest.approx(
        sum(float(t.kl().detach()) for t in weights_of(model[0]).values())
    )
    assert sum(len(g["params"]) for g in rf.parameter_groups(model, 1e-3)) == len(list(model.parameters()))
    rf.canonicalize_(model)
    rf.prune_(model, threshold=0.1)
    assert model(torch.randn(3, 2, 12))[0].shape == (3, 2, 16)


def test_tensorize_shares_biases_and_load_finds_the_weights(tmp_path):
    model = nn.ModuleDict({"lstm": nn.LSTM(12, 16), "out": nn.Linear(16, 2)})
    bias = model["lstm"].bias_hh_l0
    rf.tensorize_(model, rf.TTM(3))
    assert model["lstm"].bias_hh_l0 is bias
    rf.save(model, tmp_path / "m.safetensors")
    same = rf.load(tmp_path / "m.safetensors", nn.ModuleDict({"lstm": nn.LSTM(12, 16), "out": nn.Linear(16, 2)}))
    x = torch.randn(4, 3, 12)
    assert torch.equal(same.eval()["lstm"](x)[0], model.eval()["lstm"](x)[0])


def test_from_dense_at_full_rank():
    dense = nn.LSTM(6, 8, 2, bidirectional=True, dtype=torch.float64)
    for format in (rf.TT(100), rf.TTM(100), rf.Tucker(100)):
        layer = rf.nn.LSTM.from_dense(dense, format=format, posterior=rf.Point())
        x = sequences(5, 3, 6)
        close(layer(x)[0], dense(x)[0], 1e-8)


def test_it_starts_with_the_variance_of_torch():
    layer = rf.nn.LSTM(64, 64, format=rf.TT(8))
    std = float(nn.LSTM(64, 64).weight_ih_l0.detach().square().mean().sqrt())
    assert float(layer.weight_ih_l0.dense().detach().square().mean().sqrt()) == pytest.approx(std, rel=0.02)
    assert float(layer.bias_ih_l0.detach().abs().max()) <= 1 / 8


def test_options_and_repr_are_torchs():
    layer = rf.nn.LSTM(6, 8, 2, batch_first=True, bidirectional=True, format=rf.TT(3))
    assert (layer.input_size, layer.hidden_size, layer.num_layers) == (6, 8, 2)
    assert layer.batch_first
    assert layer.bidirectional
    assert layer.flatten_parameters() is None
    assert repr(layer).startswith("LSTM(6, 8, num_layers=2, batch_first=True, bidirectional=True)\n  weight_ih_l0: TT,")
    with pytest.raises(AttributeError, match="no attribute 'inputsize'"):
        _ = layer.inputsize


def test_errors_name_the_layer():
    model = rf.tensorize_(nn.ModuleDict({"read": nn.LSTM(6, 8)}), rf.TT(3))
    with pytest.raises(ValueError, match=r"'read' has input_size=6, but the input has shape \(4, 3, 7\)"):
        model["read"](torch.randn(4, 3, 7))
    rising = PackedSequence(torch.randn(3, 6), torch.tensor([1, 2]))
    with pytest.raises(ValueError, match=r"'read' was given a packed sequence whose batch sizes rise"):
        model["read"](rising)
    with pytest.raises(ValueError, match=r"proj_size must be 0, got 4. Put an rf.nn.Linear after"):
        rf.nn.LSTM(6, 8, proj_size=4, format=rf.TT(3))
    with pytest.raises(ValueError, match=r"'0': proj_size must be 0, got 4"):
        rf.tensorize_(nn.Sequential(nn.LSTM(6, 8, proj_size=4)), rf.TT(3))
    with pytest.raises(RuntimeError, match="Expected hidden"):
        rf.nn.GRU(6, 8, format=rf.TT(3))(torch.randn(4, 3, 6), torch.randn(1, 2, 8))


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_second_derivatives_are_refused_where_they_would_be_left_out(ours, theirs):
    layer, x = ours(64, 32, format=rf.TT(1)), torch.randn(8, 2, 64, requires_grad=True)
    assert layer._steps_are_own(x, None)
    with pytest.raises(RuntimeError, match=r"no second derivatives on a CPU, .*rf.export\(model, dense=True\)"):
        torch.autograd.grad(layer(x)[0].sum(), x, create_graph=True)
    plain = rf.export(nn.Sequential(layer).eval(), dense=True)[0]
    (gradient,) = torch.autograd.grad(plain(x)[0].sum(), x, create_graph=True)
    assert bool(torch.autograd.grad(gradient.square().sum(), x)[0].any())


@pytest.mark.parametrize("format", [rf.TT(1), rf.TTM(9)], ids=["own steps", "torch's"])
@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_functional_call_takes_plain_tensors(ours, theirs, format):
    layer, x = ours(6, 8, format=format).eval(), torch.randn(3, 2, 6)
    values = {name: parameter.detach() for name, parameter in layer.named_parameters()}
    assert torch.equal(torch.func.functional_call(layer, values, (x,))[0], layer(x)[0])


@pytest.mark.parametrize("ours", [rf.nn.LSTM, rf.nn.GRU])
@pytest.mark.parametrize("rank", [2, 24], ids=["thin matrices", "formed"])
def test_own_steps_multiply_by_onednn_where_it_pays(ours, rank, monkeypatch):
    if not _onednn.has_onednn():
        pytest.skip("this torch has no products by oneDNN")
    made, by_onednn = [], _products.by_onednn
    monkeypatch.setattr(_products, "_LEAST", 0)
    monkeypatch.setattr(_products, "by_onednn", lambda *a: made.append(a[0].shape) or by_onednn(*a))
    monkeypatch.setattr(ours, "_is_worth_it", lambda *_: True)
    _machine.use(_machine.USUAL)
    layer = ours(24, 32, bidirectional=True, format=rf.TT(rank), posterior=rf.Point()).train()
    x = torch.randn(5, 3, 24, requires_grad=True)
    leaves, direction = [x, *layer.parameters()], torch.randn(5, 3, 64)
    found = layer(x)[0]
    own = torch.autograd.grad(found, leaves, direction)
    _machine.use(None)
    steps = [shape for shape in made if shape[0] == 3]
    assert len(steps) >= 2 * 5 * 2  # Of each direction and step, forwards and backwards.
    layer.double()
    wide = x.detach().double().requires_grad_()
    wanted = layer(wide)[0]
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)
    theirs = torch.autograd.grad(wanted, [wide, *layer.parameters()], direction.double())
    for a, b in zip(own, theirs, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-3)
