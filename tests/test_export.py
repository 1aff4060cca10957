# SPDX-License-Identifier: Apache-2.0
import copy
import io
import pickle
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import fx, nn

import rankfall as rf
from conftest import FORMATS

# Both widths prime, so both are padded; and one that is not.
WIDTHS = [(13, 11), (12, 20)]


def model_of(kind, widths=(13, 11), posterior=None):
    n, m = widths
    return nn.Sequential(
        rf.nn.Linear(n, m, format=kind(3), posterior=posterior),
        nn.Tanh(),
        rf.nn.Linear(m, n, bias=False, format=kind(2), posterior=posterior),
    )


def holds_rankfall(model):
    return [type(m).__name__ for m in model.modules() if type(m).__module__.startswith("rankfall")]


@pytest.mark.parametrize("dense", [False, True], ids=["factored", "dense"])
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_the_export_computes_what_the_model_computes(kind, posterior, dense, widths):
    model = model_of(kind, widths, posterior).double().eval()
    with torch.no_grad():
        model[0].bias.normal_()
    plain = rf.export(model, dense=dense)
    assert holds_rankfall(plain) == []
    for batch in ((), (1,), (3, 4), (200,)):
        x = torch.randn(*batch, widths[0], dtype=torch.float64)
        torch.testing.assert_close(plain(x), model(x), rtol=1e-12, atol=1e-12)


def test_factors_are_kept_or_formed(kind):
    model = model_of(kind)
    factored, dense = rf.export(model), rf.export(model, dense=True)
    assert isinstance(factored[0], fx.GraphModule)
    assert type(dense[0]) is nn.Linear
    assert dense[2].bias is None
    assert sum(p.numel() for p in factored.parameters()) == rf.summary(model).parameters
    assert sum(p.numel() for p in dense.parameters()) == rf.summary(model).dense_parameters


def test_the_model_itself_stays(kind):
    model = model_of(kind).train()
    before = {name: p.clone() for name, p in model.named_parameters()}
    plain = rf.export(model)
    with torch.no_grad():
        for p in plain.parameters():
            p.zero_()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert isinstance(model[0], rf.nn.Linear)
    assert plain.training


def test_train_mode_of_the_export_has_no_noise():
    model = model_of(rf.TTM, posterior=rf.MeanField(0.5)).train()
    plain, x = rf.export(model), torch.randn(3, 13)
    assert torch.equal(plain(x), plain(x))
    torch.testing.assert_close(plain(x), model.eval()(x))


@pytest.mark.parametrize("dense", [False, True], ids=["factored", "dense"])
def test_tied_weights_stay_tied(dense):
    weight = rf.LowRankTensor((12, 12), rf.TTM(3))
    model = nn.Sequential(rf.nn.Linear.around(weight), nn.ReLU(), rf.nn.Linear.around(weight)).eval()
    plain, x = rf.export(model, dense=dense), torch.randn(3, 12)
    expected = 144 if dense else sum(f.numel() for f in weight.factors)
    assert sum(p.numel() for p in plain.parameters()) == expected
    torch.testing.assert_close(plain(x), model(x))


def test_a_layer_at_two_places_and_a_root_layer():
    layer = rf.nn.Linear(12, 12, format=rf.TT(3)).eval()
    model = nn.Sequential(layer, layer)
    plain, x = rf.export(model), torch.randn(3, 12)
    assert plain[0] is plain[1]
    torch.testing.assert_close(plain(x), model(x))
    torch.testing.assert_close(rf.export(layer)(x), layer(x))


def test_rank_zero_exports():
    layer = rf.nn.Linear(12, 20, format=rf.TT(3)).eval()
    layer.weight.keep_slices_("r1", torch.empty(0, dtype=torch.int64))
    x = torch.randn(3, 12)
    for dense in (False, True):
        assert torch.equal(rf.export(layer, dense=dense)(x), layer(x))


def test_frozen_stays_frozen():
    model = model_of(rf.TTM).requires_grad_(False)
    for dense in (False, True):
        assert not any(p.requires_grad for p in rf.export(model, dense=dense).parameters())


def test_a_tensor_outside_a_layer_is_refused():
    model = nn.ModuleDict({"layer": rf.nn.Linear(12, 20, format=rf.TT(3)), "table": rf.LowRankTensor((4, 5), rf.CP(2))})
    with pytest.raises(ValueError, match=r"'table' is an rf.LowRankTensor outside a rankfall layer.*Export its .dense"):
        rf.export(model)
    with pytest.raises(ValueError, match=r"'the model' is an rf.LowRankTensor outside"):
        rf.export(rf.LowRankTensor((4, 5), rf.CP(2)))


def test_a_saved_export_runs_where_rankfall_is_not_installed(tmp_path):
    x, cases = torch.randn(3, 13), []
    for kind in FORMATS:
        model = model_of(kind).eval()
        cases += [(rf.export(model, dense=dense), (x,), model(x).detach()) for dense in (False, True)]
    for name in ("embedding", "bag", "convolution", "grouped"):
        layer, inputs = layers(rf.Tucker)[name]
        cases += [(rf.export(layer.eval()), inputs, layer(*inputs).detach())]
    torch.save(cases, tmp_path / "plain.pt")
    script = """
        import sys
        sys.modules["rankfall"] = None
        import torch
        cases = torch.load(sys.argv[1], weights_only=False)
        for model, x, y in cases:
            torch.testing.assert_close(model(*x), y)
        assert not [name for name in sys.modules if name.startswith("rankfall.")]
        try:
            import rankfall
        except ImportError:
            print(len(cases), "loaded")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "plain.pt")],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.stdout == f"{2 * len(FORMATS) + 4} loaded\n", done.stderr


@pytest.mark.parametrize("dense", [False, True], ids=["factored", "dense"])
def test_a_transformer_layer_is_exported(dense):
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    rf.tensorize_(model, rf.TT(3))
    model.eval()
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        torch.testing.assert_close(rf.export(model, dense=dense)(x), model(x), rtol=1e-4, atol=1e-5)


def layers(kind):
    return {
        "embedding": (rf.nn.Embedding(97, 8, padding_idx=3, format=kind(3)), (torch.tensor([[3, 96], [0, 50]]),)),
        "bag": (rf.nn.EmbeddingBag(97, 8, mode="sum", format=kind(3)), (torch.tensor([[3, 96], [0, 50]]),)),
        "convolution": (rf.nn.Conv2d(4, 6, 3, stride=2, padding="valid", format=kind(3)), (torch.randn(2, 4, 9, 9),)),
        "grouped": (rf.nn.Conv1d(4, 6, 3, padding=1, groups=2, bias=False, format=kind(3)), (torch.randn(2, 4, 9),)),
        "lstm": (rf.nn.LSTM(8, 6, 2, bidirectional=True, format=kind(3)), (torch.randn(5, 2, 8),)),
        "gru": (rf.nn.GRU(8, 6, batch_first=True, format=kind(3)), (torch.randn(5, 2, 8),)),
        "attention": (rf.nn.MultiheadAttention(8, 2, format=kind(3)), (torch.randn(5, 2, 8),) * 3),
    }


@pytest.mark.parametrize("name", layers(rf.TT))
@pytest.mark.parametrize("dense", [False, True], ids=["factored", "dense"])
def test_every_layer_becomes_torchs_own(kind, name, dense):
    layer, inputs = layers(kind)[name]
    plain = rf.export(nn.ModuleDict({"only": layer}).eval(), dense=dense)["only"]
    torch.testing.assert_close(plain(*inputs), layer.eval()(*inputs), rtol=1e-4, atol=1e-5)
    assert not any("rankfall" in type(module).__module__ for module in plain.modules())
    assert not any(p.is_meta for p in plain.parameters())
    if dense:
        assert type(plain) is getattr(nn, type(layer).__name__)


def test_a_factored_table_stays_small_and_tied(kind):
    model = nn.ModuleDict({"embed": nn.Embedding(500, 8), "out": nn.Linear(8, 500, bias=False)})
    model["out"].weight = model["embed"].weight
    rf.tensorize_(model, kind(2))
    for dense, size in ((False, rf.summary(model).parameters), (True, 4000)):
        plain = rf.export(model.eval(), dense=dense)
        assert sum(p.numel() for p in plain.parameters()) == size
        torch.testing.assert_close(plain["out"](torch.eye(8)), plain["embed"](torch.arange(500)).T)


CONVOLUTIONS = {
    "same, even kernel": (rf.nn.Conv1d, (5, 7, 4), {"padding": "same", "dilation": 3}, (2, 5, 11)),
    "reflect": (
        rf.nn.Conv2d,
        (6, 9, (3, 5)),
        {"padding": 2, "padding_mode": "reflect", "stride": 2},
        (2, 6, 9, 8),
    ),
    "unbatched": (rf.nn.Conv2d, (6, 9, 3), {"padding": 1, "bias": False}, (6, 9, 8)),
    "three dimensions": (rf.nn.Conv3d, (4, 6, 2), {"padding": 1}, (1, 4, 5, 4, 3)),
    "grouped": (rf.nn.Conv2d, (6, 9, 3), {"groups": 3}, (2, 6, 9, 8)),
    "wide": (rf.nn.Conv2d, (64, 96, 3), {"padding": 1}, (1, 64, 6, 6)),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")  # What torch's own layer says.
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_factored_convolution_computes_what_the_layer_does(kind, name):
    make, sizes, options, shape = CONVOLUTIONS[name]
    layer = make(*sizes, format=kind(3), **options).eval()
    x = torch.randn(shape)
    plain = rf.export(layer)
    torch.testing.assert_close(plain(x), layer(x), rtol=1e-4, atol=1e-5)
    kept = sum(p.numel() for p in plain.parameters())
    summary = rf.summary(layer)
    assert kept <= max(summary.parameters, summary.dense_parameters)


@pytest.mark.parametrize("kind", [rf.CP, rf.Tucker], ids=lambda k: k.__name__)
def test_a_wide_convolution_becomes_three_small_ones(kind):
    layer = rf.nn.Conv2d(64, 96, 3, format=kind(8))
    plain = rf.export(layer.eval())
    assert [type(step) for step in plain] == [nn.Conv2d] * 3
    assert [step.kernel_size for step in plain] == [(1, 1), (3, 3), (1, 1)]
    assert sum(p.numel() for p in plain.parameters()) < 5 * rf.summary(layer).parameters < 64 * 96 * 9 / 2


@pytest.mark.parametrize("kind", [rf.Tucker, rf.TTM], ids=lambda k: k.__name__)
def test_a_frozen_convolution_stays_frozen(kind):
    layer = rf.nn.Conv2d(64, 96, 3, format=kind(4), bias=False).requires_grad_(False)
    assert not any(p.requires_grad for p in rf.export(layer.eval()).parameters())


@pytest.mark.parametrize("padding_idx", [None, 3])
@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_a_factored_bag_reduces_as_the_layer_does(kind, mode, padding_idx, dtype):
    layer = rf.nn.EmbeddingBag(97, 7, mode, padding_idx, include_last_offset=True, format=kind(3)).eval()
    plain = rf.export(layer)
    assert sum(p.numel() for p in plain.parameters()) == rf.summary(layer).parameters
    ids = torch.tensor([3, 96, 3, 0, 50, 3, 3], dtype=dtype)
    offsets = torch.tensor([0, 2, 2, 5, 7], dtype=dtype)  # One bag is empty, one holds padding alone.
    torch.testing.assert_close(plain(ids, offsets), layer(ids, offsets), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(plain(ids.view(1, 7)), layer(ids.view(1, 7)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(plain(ids[:0].view(0, 4)), layer(ids[:0].view(0, 4)))
    if mode == "sum":
        weights = torch.randn(7)
        torch.testing.assert_close(plain(ids, offsets, weights), layer(ids, offsets, weights), rtol=1e-4, atol=1e-5)


PLAIN = {
    "linear": (rf.nn.Linear, nn.Linear, (12, 20), {}),
    "embedding": (rf.nn.Embedding, nn.Embedding, (40, 12), {"padding_idx": -3}),
    "bag": (rf.nn.EmbeddingBag, nn.EmbeddingBag, (40, 12), {"mode": "sum", "padding_idx": 1}),
    "convolution that forms": (rf.nn.Conv1d, nn.Conv1d, (8, 6, 3), {"padding": "same", "padding_mode": "circular"}),
    "small convolutions": (rf.nn.Conv2d, nn.Conv2d, (64, 96, 3), {"stride": 2, "padding": 1, "dilation": 2}),
    "groups": (rf.nn.Conv3d, nn.Conv3d, (4, 8, (1, 2, 3)), {"groups": 2}),
}
OF_LINEAR = ("in_features", "out_features")
OF_TABLES = ("num_embeddings", "embedding_dim", "padding_idx", "mode", "include_last_offset")
OF_CONVOLUTIONS = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
OPTIONS = (*OF_LINEAR, *OF_TABLES, *OF_CONVOLUTIONS, "padding_mode")


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("dense", [False, True], ids=["factored", "dense"])
@pytest.mark.parametrize("name", PLAIN)
def test_the_export_has_the_options_of_torchs_layer(name, dense):
    ours, theirs, sizes, options = PLAIN[name]
    wanted = vars(theirs(*sizes, **options))
    model = rf.export(nn.Sequential(ours(*sizes, format=rf.CP(3), **options)).eval(), dense=dense)
    copies = (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), saved_and_loaded(copy.deepcopy(model)))
    for made in (model, *copies, saved_and_loaded(copies[1])):
        assert {key: getattr(made[0], key) for key in OPTIONS if key in wanted} == {
            key: wanted[key] for key in OPTIONS if key in wanted
        }


class Reader(nn.Module):
    """Its forward reads the options of its layers, as those of many models do."""

    def __init__(self):
        super().__init__()
        self.words = rf.nn.Embedding(40, 12, padding_idx=3, format=rf.TT(3))
        self.slide = rf.nn.Conv1d(12, 96, 3, padding=1, format=rf.CP(2))
        self.last = rf.nn.Linear(96, 5, format=rf.TT(3))

    def forward(self, ids):
        x = self.words(ids).view(*ids.shape, self.words.embedding_dim) * (ids != self.words.padding_idx).unsqueeze(-1)
        x = self.slide(x.mT) * self.slide.kernel_size[0]
        return self.last(x.mT.reshape(-1, self.last.in_features))


def test_a_forward_that_reads_options_runs_and_is_exported_by_torch():
    model, ids = Reader().eval(), torch.tensor([[3, 39, 0, 7]])
    plain, expected = rf.export(model), model(ids)
    for made in (plain, saved_and_loaded(plain), torch.export.export(plain, (ids,)).module()):
        torch.testing.assert_close(made(ids), expected)
