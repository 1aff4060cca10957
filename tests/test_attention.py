# SPDX-License-Identifier: Apache-2.0
"""Attention against torch's own layer with weights that share no code with the library."""

import copy
import pickle

import pytest
import torch
from torch import nn

import rankfall as rf
from laws import close, make, naive_dense
from rankfall.nn._formed import Formed

SEED = 3
OPTIONS = {
    "plain": {},
    "no bias": {"bias": False},
    "other widths": {"kdim": 6, "vdim": 10, "batch_first": True},
    "more rows": {"add_bias_kv": True, "add_zero_attn": True},
}


def tensors_of(layer):
    return {n: m for n, m in layer.named_modules() if isinstance(m, rf.LowRankTensor)}


def pair(format, **options):
    dense = nn.MultiheadAttention(8, 2, dtype=torch.float64, **options)
    layer = rf.nn.MultiheadAttention.from_dense(dense, format=format)
    for name, tensor in tensors_of(layer).items():
        path, _, leaf = name.rpartition(".")
        setattr(layer.get_submodule(path), leaf, make(tensor.format, tensor.shape))
    return layer, dense


def drawn_weights(layer):
    torch.manual_seed(SEED)
    found = {}
    for name in layer._weights:
        t = tensors_of(layer)[name]
        factors = list(t.factors)
        if t.training and len(t.log_stds):
            factors = [
                m + s.exp() * torch.randn(m.shape, dtype=m.dtype) for m, s in zip(t.factors, t.log_stds, strict=True)
            ]
        found[name] = naive_dense(t, factors)
    return found


@pytest.mark.parametrize("name", OPTIONS)
def test_it_is_torchs_layer_with_the_dense_weights(kind, name):
    options = OPTIONS[name]
    layer, dense = pair(kind(3), **options)
    inputs = [
        torch.randn(3, 4, n, dtype=torch.float64, requires_grad=True)
        for n in (8, options.get("kdim", 8), options.get("vdim", 8))
    ]
    for mode in (True, False):
        layer.train(mode)
        dense.train(mode)
        others = {n: p for n, p in layer.named_parameters() if "factors" not in n and "log_stds" not in n}
        expected = torch.func.functional_call(dense, drawn_weights(layer) | others, tuple(inputs))
        torch.manual_seed(SEED)
        actual = layer(*inputs)
        trained = [p for n, p in layer.named_parameters() if mode or "log_stds" not in n]
        direction = torch.randn_like(expected[0])
        close(actual[0], expected[0])
        close(actual[1], expected[1])
        for ours, theirs in zip(
            torch.autograd.grad(actual[0], [*inputs, *trained], direction),
            torch.autograd.grad(expected[0], [*inputs, *trained], direction),
            strict=True,
        ):
            close(ours, theirs, 1e-9)


def test_masks_and_the_weights_left_out():
    layer, dense = pair(rf.TT(3), batch_first=True)
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    masks = {
        "key_padding_mask": torch.tensor([[False] * 5, [False] * 3 + [True] * 2]),
        "attn_mask": torch.ones(5, 5).triu(1).bool(),
    }
    layer.eval()
    parameters = drawn_weights(layer) | {"in_proj_bias": layer.in_proj_bias, "out_proj.bias": layer.out_proj.bias}
    arguments = {**masks, "need_weights": False}
    expected = torch.func.functional_call(dense.eval(), parameters, (x, x, x), arguments)
    actual = layer(x, x, x, **arguments)
    close(actual[0], expected[0])
    assert actual[1] is expected[1] is None


MASKS = {
    "none": {},
    "padding": {"key_padding_mask": torch.tensor([[False] * 5, [False] * 3 + [True] * 2])},
    "causal": {"attn_mask": torch.ones(5, 5).triu(1).bool()},
    "causal by a hint": {"attn_mask": torch.ones(5, 5).triu(1).bool(), "is_causal": True},
    "of numbers": {"attn_mask": torch.linspace(-1, 1, 25, dtype=torch.float64).view(5, 5)},
    "of each head": {"attn_mask": torch.linspace(-1, 1, 100, dtype=torch.float64).view(4, 5, 5)},
}
MASKS["both"] = MASKS["padding"] | MASKS["causal"]
MASKS["both, with a hint"] = MASKS["padding"] | MASKS["causal by a hint"]
MASKS["padding of numbers"] = {
    "key_padding_mask": torch.zeros(2, 5, dtype=torch.float64).index_fill(1, torch.tensor(4), -2.0)
}


@pytest.fixture
def no_weight_is_formed(monkeypatch):
    monkeypatch.setattr(Formed, "_run", lambda *_, **__: pytest.fail("torch's own code ran"))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.usefixtures("no_weight_is_formed")
def test_a_sequence_that_attends_to_itself(kind, masks, bias, batch_first):
    layer, dense = pair(kind(3), bias=bias, batch_first=batch_first)
    shape = (2, 5, 8) if batch_first else (5, 2, 8)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    for mode in (True, False):
        layer.train(mode)
        others = {n: p for n, p in layer.named_parameters() if "factors" not in n and "log_stds" not in n}
        arguments = {"need_weights": False, **MASKS[masks]}
        expected, _ = torch.func.functional_call(dense.train(mode), drawn_weights(layer) | others, (x, x, x), arguments)
        torch.manual_seed(SEED)
        actual, no_weights = layer(x, x, x, **arguments)
        assert no_weights is None
        close(actual, expected)
        trained = [x, *(p for n, p in layer.named_parameters() if mode or "log_stds" not in n)]
        direction = torch.randn_like(expected)
        for ours, theirs in zip(
            torch.autograd.grad(actual, trained, direction),
            torch.autograd.grad(expected, trained, direction),
            strict=True,
        ):
            close(ours, theirs, 1e-9)


@pytest.mark.usefixtures("no_weight_is_formed")
def test_attention_drops_out_in_train_mode_alone():
    layer = rf.nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True, format=rf.TT(3), posterior=rf.Point())
    x = torch.randn(2, 5, 8)

    def differs() -> bool:
        one, other = (layer(x, x, x, need_weights=False)[0] for _ in range(2))
        return not torch.equal(one, other)

    assert differs()
    layer.eval()
    assert not differs()


@pytest.mark.parametrize("need_weights", [True, False], ids=["torch's own", "by the factors"])
def test_options_may_be_set_afterwards(need_weights):
    layer, dense = pair(rf.TT(3), dropout=0.9)
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    layer(x, x, x, need_weights=need_weights)
    for one in (layer, dense):
        one.dropout, one.batch_first, one.num_heads = 0.0, True, 4
    others = {n: p for n, p in layer.named_parameters() if "factors" not in n and "log_stds" not in n}
    expected = torch.func.functional_call(dense, drawn_weights(layer) | others, (x, x, x))[0]
    torch.manual_seed(SEED)
    close(layer(x, x, x, need_weights=need_weights)[0], expected)
    assert (layer.dropout, layer.batch_first, layer.num_heads) == (0.0, True, 4)
    assert repr(layer).startswith("MultiheadAttention(8, 4)")


@pytest.mark.parametrize("masks", ["none", "padding", "causal by a hint", "both"])
def test_attention_under_autocast(masks):
    layer = rf.nn.MultiheadAttention(8, 2, batch_first=True, format=rf.TT(3))
    x = torch.randn(2, 5, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low, _ = layer.eval()(x, x, x, need_weights=False, **MASKS[masks])
        layer.train()(x, x, x, need_weights=False, **MASKS[masks])[0].float().square().mean().backward()
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(
        low.float(), layer.eval()(x, x, x, need_weights=False, **MASKS[masks])[0], rtol=0.1, atol=0.1
    )
    assert all(bool(torch.isfinite(p.grad).all()) for p in layer.parameters())


@pytest.mark.parametrize(
    "arguments",
    [
        {"is_causal": True},
        {"attn_mask": torch.zeros(4, 5, dtype=torch.float64)},
        {"attn_mask": torch.zeros(3, 5, 5, dtype=torch.float64)},
        {"key_padding_mask": torch.zeros(2, 4, dtype=torch.float64)},
        {"key_padding_mask": torch.zeros(2, 5, dtype=torch.int64)},
    ],
)
def test_what_torch_refuses_is_refused_in_its_words(arguments):
    layer, dense = pair(rf.TT(3), batch_first=True)
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    texts = []
    for one in (layer, dense):
        with pytest.raises((RuntimeError, AssertionError)) as refused:
            one(x, x, x, need_weights=False, **arguments)
        texts.append(str(refused.value))
    assert texts[0] == texts[1]


def dense_twin(layer, tensorized):
    """A deep copy of a dense module with the weights of a tensorized one."""
    twin = copy.deepcopy(layer)
    state = {n: p for n, p in tensorized.state_dict().items() if ".factors." not in n and ".log_stds." not in n}
    for path, module in tensorized.named_modules():
        if isinstance(module, rf.LowRankTensor):
            state[path] = module.dense().detach()
    twin.load_state_dict(state)
    return twin


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("mode", [True, False])
def test_inside_torchs_transformer_layers(kind, mode, grad):
    options = {"dropout": 0.0, "batch_first": True, "dtype": torch.float64}
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, **options), 2, enable_nested_tensor=False)
    decoder = nn.TransformerDecoderLayer(8, 2, 12, **options)
    x = torch.randn(3, 4, 8, dtype=torch.float64)
    padding = torch.tensor([[False] * 4, [False] * 4, [False] * 2 + [True] * 2])
    for dense, arguments in ((encoder, {"src_key_padding_mask": padding}), (decoder, {"memory": x})):
        tensorized = rf.tensorize_(copy.deepcopy(dense), kind(3), posterior=rf.Point()).train(mode)
        twin = dense_twin(dense, tensorized).train(mode)
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(tensorized(x, **arguments)[:2], twin(x, **arguments)[:2])


def test_tensorize_takes_all_of_it(kind):
    model = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    size = sum(p.numel() for p in model.parameters())
    rf.tensorize_(model, kind(2))
    assert rf.ranks(model).keys() == {"self_attn.in_proj_weight", "self_attn.out_proj", "linear1", "linear2"}
    assert rf.summary(model).dense_parameters == size
    assert model.self_attn.in_proj_weight.layout.modes[0][0] == 3
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        x = torch.randn(2, 3, 8)
        assert torch.equal(other.eval()(x), model.eval()(x))


def test_from_dense_at_full_rank():
    dense = nn.MultiheadAttention(8, 2, dtype=torch.float64)
    x = torch.randn(3, 4, 8, dtype=torch.float64)
    for format in (rf.TT(100), rf.TTM(100), rf.Tucker(100)):
        layer = rf.nn.MultiheadAttention.from_dense(dense, format=format, posterior=rf.Point())
        assert layer.in_proj_bias is dense.in_proj_bias
        close(layer(x, x, x)[0], dense(x, x, x)[0], 1e-8)


def test_it_starts_as_torch_does():
    layer, dense = rf.nn.MultiheadAttention(64, 4, format=rf.TT(8)), nn.MultiheadAttention(64, 4)
    for name, tensor in tensors_of(layer).items():
        std = float(dense.get_parameter(name).detach().square().mean().sqrt())
        assert float(tensor.dense().detach().square().mean().sqrt()) == pytest.approx(std, rel=0.03)
    assert torch.equal(layer.in_proj_bias, torch.zeros(192))
    assert repr(layer).startswith("MultiheadAttention(64, 4)\n  in_proj_weight: TT,")
