# SPDX-License-Identifier: Apache-2.0
import copy
import sys
import types
import warnings

import pytest
import torch
from torch import nn

import rankfall as rf


def mlp():
    return nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Sequential(nn.Linear(20, 11), nn.Linear(11, 6, bias=False)))


def fingerprint(model):
    """Which modules and parameters there are, by identity, and a copy of all values."""
    modules = [(name, id(m), m.training) for name, m in model.named_modules(remove_duplicate=False)]
    parameters = [(name, id(p)) for name, p in model.named_parameters(remove_duplicate=False)]
    return modules, parameters, copy.deepcopy(model.state_dict())


def assert_untouched(model, before):
    modules, parameters, state = before
    now = fingerprint(model)
    assert now[:2] == (modules, parameters)
    assert now[2].keys() == state.keys()
    assert all(torch.equal(now[2][key], state[key]) for key in state)


def test_all_linear_layers_by_default(kind, prior, posterior):
    model = mlp()
    activation = model[1]
    assert rf.tensorize_(model, kind(3), prior=prior, posterior=posterior) is model
    assert [type(m) for m in (model[0], model[2][0], model[2][1])] == [rf.nn.Linear] * 3
    assert model[1] is activation
    assert set(rf.ranks(model)) == {"0", "2.0", "2.1"}
    assert (model[0].weight.prior, model[0].weight.posterior) == (prior, posterior)
    assert model(torch.randn(3, 12)).shape == (3, 6)


def test_filter_sees_layer_and_path():
    model, seen = mlp(), []

    def wide(module, path):
        seen.append(path)
        return module.out_features > 15

    rf.tensorize_(model, rf.TTM(3), filter_fn=wide)
    assert seen == ["0", "2.0", "2.1"]
    assert set(rf.ranks(model)) == {"0"}
    assert type(model[2][0]) is nn.Linear


def test_several_formats_by_several_calls():
    model = mlp()
    rf.tensorize_(model, rf.TTM(3), filter_fn=lambda module, path: path == "0")
    first = model[0]
    rf.tensorize_(model, rf.CP(2))
    assert model[0] is first
    assert [type(m.weight.format) for m in (model[0], model[2][0])] == [rf.TTM, rf.CP]


def test_root_is_returned_new_and_the_old_one_stays():
    old = nn.Linear(12, 20)
    before = fingerprint(old)
    new = rf.tensorize_(old, rf.TT(3))
    assert isinstance(new, rf.nn.Linear)
    assert new.bias is old.bias
    assert_untouched(old, before)


def test_biases_stay_the_same_parameter_and_layers_without_stay_without():
    model = mlp()
    bias = model[0].bias
    rf.tensorize_(model, rf.TT(3))
    assert model[0].bias is bias
    assert model[2][1].bias is None


def test_from_dense_computes_the_same(kind):
    torch.manual_seed(1)
    model = mlp().double().eval()
    x = torch.randn(7, 12, dtype=torch.float64)
    y = model(x)
    rf.tensorize_(model, kind(400), from_dense=True, posterior=rf.Point())
    # CP is found by iteration: near, where the others are exact.
    torch.testing.assert_close(model(x), y, rtol=0, atol=1e-3 if kind is rf.CP else 1e-6)


def test_tied_weights_stay_tied_and_count_once():
    model = nn.ModuleDict({"a": nn.Linear(12, 12), "b": nn.Linear(12, 12), "c": nn.Linear(12, 12)})
    model["b"].weight = model["a"].weight
    bias = model["b"].bias
    rf.tensorize_(model, rf.TTM(3))
    assert model["a"].weight is model["b"].weight
    assert model["c"].weight is not model["a"].weight
    assert model["b"].bias is bias is not model["a"].bias
    counts = rf.summary(model)
    assert counts.dense_parameters == 2 * 144 + 3 * 12
    assert [layer.path for layer in counts.layers] == ["a", "c"]
    assert rf.kl(model).item() == pytest.approx((model["a"].weight.kl() + model["c"].weight.kl()).item())


def test_a_module_at_two_places_stays_one_module():
    shared = nn.Linear(12, 12)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared), "c": shared})
    rf.tensorize_(model, rf.TT(3))
    assert isinstance(model["a"], rf.nn.Linear)
    assert model["a"] is model["b"][0] is model["c"]
    assert len(rf.ranks(model)) == 1


@pytest.mark.parametrize("training", [True, False])
def test_mode_dtype_and_requires_grad_are_kept(training):
    model = mlp().to(torch.bfloat16).train(training)
    model[0].weight.requires_grad_(False)
    rf.tensorize_(model, rf.TTM(3))
    assert all(m.training is training for m in model.modules())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in model[0].weight.parameters())
    assert all(p.requires_grad for p in model[2].parameters())


@pytest.mark.parametrize("device", ["meta", "cuda" if torch.cuda.is_available() else "cpu"])
def test_device_is_kept(device):
    model = rf.tensorize_(mlp().to(device), rf.TT(3), from_dense=device != "meta")
    assert {p.device.type for p in model.parameters()} == {device}


def test_a_table_without_memory_gets_factors_where_it_is_told():
    with torch.device("meta"):
        model = nn.Sequential(nn.Embedding(10**9, 64))
    rf.tensorize_(model, rf.TTM(2), device="cpu")
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert torch.isfinite(model(torch.tensor([0, 10**9 - 1]))).all()


def test_a_table_without_values_cannot_be_decomposed():
    model = nn.Sequential(nn.Embedding(50, 8, device="meta"))
    with pytest.raises(ValueError, match=r"^'0': its weight is on the meta device and has no values to decompose"):
        rf.tensorize_(model, rf.TTM(2), from_dense=True, device="cpu")


def test_attention_can_be_left_alone_and_its_feed_forward_works_in_eval_mode():
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    attention = model.self_attn.out_proj
    rf.tensorize_(model, rf.TT(3), filter_fn=lambda module, path: path != "self_attn")
    assert model.self_attn.out_proj is attention
    assert set(rf.ranks(model)) == {"linear1", "linear2"}
    model.eval()
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        # In eval mode torch would hand the weights to a fused kernel; the dense export takes that way.
        torch.testing.assert_close(model(x), rf.export(model, dense=True)(x), rtol=1e-4, atol=1e-5)


def test_subclasses_of_linear_are_left_alone():
    class Special(nn.Linear):
        pass

    model = nn.Sequential(Special(12, 12), nn.Linear(12, 12))
    rf.tensorize_(model, rf.TT(3))
    assert type(model[0]) is Special


def shared_with_embedding():
    model = nn.ModuleDict({"embed": nn.Embedding(20, 12), "out": nn.Linear(12, 20), "other": nn.Linear(12, 12)})
    model["out"].weight = model["embed"].weight
    return model


def half_of_a_tie():
    model = nn.ModuleDict({"a": nn.Linear(12, 12), "b": nn.Linear(12, 12)})
    model["b"].weight = model["a"].weight
    return model


def broken_weight():
    model = mlp()
    with torch.no_grad():
        model[2][0].weight[0, 0] = float("inf")
    return model


REFUSED = {
    "shared with embedding": (
        shared_with_embedding,
        {"filter_fn": lambda module, path: path == "out"},
        ValueError,
        r"'out' shares its weight with 'embed.weight', which stays dense.*filter_fn=lambda module, path: path != 'out'",
    ),
    "half of a tie": (
        half_of_a_tie,
        {"filter_fn": lambda module, path: path == "a"},
        ValueError,
        r"'a' shares its weight with 'b.weight'.*path != 'a'",
    ),
    "no match": (
        mlp,
        {"filter_fn": lambda module, path: False},
        ValueError,
        r"filter_fn matches no layer of Sequential. It could match: 0, 2.0, 2.1\.",
    ),
    "nothing linear": (
        lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm1d(3)),
        {},
        ValueError,
        r"Sequential has no layer to tensorize. Pass a model that has one of torch.nn.Linear",
    ),
    "modes of the first layer only": (
        mlp,
        {"format": rf.TTM(3, in_modes=(3, 4))},
        ValueError,
        r"'2.0': in_modes must multiply to in_features: \(3, 4\) gives 12, but in_features is 20. "
        r"Pass in_modes=\(4, 5\), or leave it out",
    ),
    "infinity in the second layer": (
        broken_weight,
        {"from_dense": True},
        ValueError,
        r"'2.0': weight to decompose holds NaN or infinity",
    ),
    "class for object": (mlp, {"format": rf.TT}, TypeError, r"'0': format must be .* got the class TT.*rf.TTM\(20\)"),
    "wrong prior": (mlp, {"prior": rf.Point()}, TypeError, r"'0': prior must be .* got Point\(\).*rf.HalfCauchy\(\)"),
    "wrong posterior": (mlp, {"posterior": "point"}, TypeError, r"posterior must be .* got 'point'.*rf.MeanField\(\)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_call_leaves_the_model_as_it_was(name):
    build, arguments, error, text = REFUSED[name]
    model = build()
    before = fingerprint(model)
    with pytest.raises(error, match=text):
        rf.tensorize_(model, **{"format": rf.TTM(3)} | arguments)
    assert_untouched(model, before)


def test_an_embedding_and_its_tied_output_stay_tied(kind):
    model = rf.tensorize_(shared_with_embedding(), kind(3))
    assert model["out"].weight is model["embed"].weight
    assert set(rf.ranks(model)) == {"embed", "other"}
    table, ids = model["embed"].weight.dense(), torch.tensor([3, 19])
    model.eval()
    torch.testing.assert_close(model["embed"](ids), table[ids])
    torch.testing.assert_close(model["out"](torch.eye(12)), table.T + model["out"].bias)
    assert rf.summary(model).dense_parameters == 20 * 12 + 20 + 12 * 12 + 12


def test_shared_with_embedding_can_be_left_out_as_the_error_says():
    model = shared_with_embedding()
    rf.tensorize_(model, rf.TT(3), filter_fn=lambda module, path: path not in ("out", "embed"))
    assert model["out"].weight is model["embed"].weight
    assert set(rf.ranks(model)) == {"other"}


def test_a_weight_can_be_asked_for_its_type_and_place():
    """As forward passes of others do before they call a layer: pixels.to(dtype=self.patches.weight.dtype)."""
    layer = rf.tensorize_(nn.Sequential(nn.Conv2d(4, 6, 2, dtype=torch.float64)), rf.CP(2))[0]
    assert (layer.weight.dtype, layer.weight.device) == (torch.float64, torch.device("cpu"))
    assert layer(input=torch.ones(1, 4, 3, 3).to(layer.weight.dtype)).shape == (1, 6, 2, 2)


class Conv1D(nn.Module):
    """Stands for the layer of that name in Hugging Face transformers: y = x @ W + b."""

    def __init__(self, nf, nx):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x):
        return x @ self.weight + self.bias


def test_conv1d_of_transformers_is_a_linear_layer_stored_transposed(kind, monkeypatch):
    model = nn.Sequential(Conv1D(20, 12), nn.Linear(20, 3))
    x = torch.randn(5, 12)
    expected = model(x)
    assert rf.ranks(rf.tensorize_(copy.deepcopy(model), kind(2))).keys() == {"1"}
    monkeypatch.setitem(sys.modules, "transformers.pytorch_utils", types.SimpleNamespace(Conv1D=Conv1D))
    rf.tensorize_(model, rf.TT(240), from_dense=True, posterior=rf.Point())
    assert rf.ranks(model).keys() == {"0", "1"}
    assert model[0].weight.shape == (20, 12)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    fresh = rf.tensorize_(nn.Sequential(Conv1D(20, 12)), kind(3))
    assert fresh(x).shape == (5, 20)


def test_a_converted_model_still_trains():
    model = rf.tensorize_(mlp(), rf.TTM(4), posterior=rf.Point())
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-2)
    x = torch.randn(64, 12)
    y = x[:, :6]
    losses = []
    for _ in range(150):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


def test_an_input_of_another_width_names_the_layer():
    model = rf.tensorize_(mlp(), rf.TT(3))
    with pytest.raises(ValueError, match=r"'2.0' has in_features=20, but the input has shape \(3, 19\)"):
        model[2](torch.randn(3, 19))


def test_log_names_the_layers(caplog):
    with caplog.at_level("INFO", logger="rankfall"):
        rf.tensorize_(mlp(), rf.TT(3))
    assert "tensorized 3 layers: 0, 2.0, 2.1" in caplog.text


def test_hooks_are_carried_and_their_handles_still_remove_them():
    model = mlp()
    seen = []
    handle = model[0].register_forward_hook(lambda module, inputs, output: seen.append(type(module)))
    rf.tensorize_(model, rf.TT(3))
    model(torch.randn(2, 12))
    handle.remove()
    model(torch.randn(2, 12))
    assert seen == [rf.nn.Linear]


def test_a_weight_computed_from_others_is_refused():
    model = mlp()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(model[0])
    before = fingerprint(model)
    with pytest.raises(ValueError, match=r"'0': computes its weight from other parameters \(.*weight_g, weight_v\)"):
        rf.tensorize_(model, rf.TT(3))
    assert_untouched(model, before)
