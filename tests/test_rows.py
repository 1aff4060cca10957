# SPDX-License-Identifier: Apache-2.0
"""Tables that have lost their last rows: zeros there, and the same as ever before them."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import rankfall as rf
from laws import close, make, naive_padded
from rankfall import _cuts
from test_embedding import gradients_match, layer_around

SHAPES = [(30, 8), (97, 6), (250, 12)]


def cut_table(kind, shape, rows, posterior=None, cls=rf.nn.Embedding, **options):
    layer = layer_around(make(kind(3), shape, posterior=posterior), cls, **options)
    layer.weight.keep_rows_(rows)
    return layer


def naive_table(t, factors):
    """By the contraction of what is left, and zeros."""
    left = naive_padded(t, factors)[: t.rows, : t.shape[1]]
    return torch.cat([left, left.new_zeros(t.shape[0] - t.rows, t.shape[1])])


@pytest.mark.parametrize("shape", SHAPES)
def test_the_first_rows_stay_and_the_others_are_zeros(kind, shape, posterior):
    layer = layer_around(make(kind(3), shape, posterior=posterior))
    t, before = layer.weight, layer.weight.dense()
    each, count = t.leading_rows, sum(p.numel() for p in t.parameters())
    t.keep_rows_(shape[0] // 2)
    assert shape[0] // 2 <= t.rows < shape[0] // 2 + each
    assert t.shape == shape == tuple(t.dense().shape)
    close(t.dense()[: t.rows], before[: t.rows])
    assert not t.dense()[t.rows :].any()
    assert sum(p.numel() for p in t.parameters()) < count
    close(t.dense(), naive_table(t, t.factors))
    close(t.eval().linear(torch.eye(shape[1], dtype=torch.float64)), t.dense().T)
    bias = torch.randn(shape[0], dtype=torch.float64)
    close(t.linear(torch.zeros(2, shape[1], dtype=torch.float64), bias), bias.expand(2, -1))
    assert (t.train().sample()[t.rows :] == 0).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_of_one_leading_digit_stay_together(kind, shape):
    """With a single leading digit left, the next digit is not taken for it."""
    layer = layer_around(make(kind(3), shape))
    t = layer.eval().weight
    each = t.leading_rows
    t.keep_rows_(1)
    assert t.rows == each == t.leading_rows
    t.keep_rows_(max(each // 2, 1))
    assert t.rows == each
    close(t.dense(), naive_table(t, t.factors))
    ids = torch.randint(shape[0], (50,))
    close(layer(ids), t.dense()[ids])
    assert _cuts._cut_rows(t, "", None, None) is None


@pytest.mark.parametrize("padding_idx", [None, 0])
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_are_read_as_zeros_where_they_are_gone(kind, shape, padding_idx):
    layer = cut_table(kind, shape, 10, padding_idx=padding_idx)
    t = layer.eval().weight
    for ids in (torch.randint(shape[0], (4, 9)), torch.tensor([0, shape[0] - 1]), torch.full((3,), shape[0] - 1)):
        table = naive_table(t, t.factors)
        expected = F.embedding(ids, table if padding_idx is None else table.index_fill(0, torch.tensor([0]), 0.0))
        gradients_match(layer(ids), expected, list(t.factors))


@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("padding_idx", [None, 0])
def test_bags_count_rows_that_are_gone_as_zeros(kind, mode, padding_idx):
    layer = cut_table(kind, (97, 6), 20, cls=rf.nn.EmbeddingBag, mode=mode, padding_idx=padding_idx)
    t = layer.eval().weight
    ids, offsets = torch.tensor([3, 0, 96, 50, 3, 0, 96, 96]), torch.tensor([0, 2, 2, 6])
    expected = F.embedding_bag(ids, naive_table(t, t.factors), offsets, mode=mode, padding_idx=padding_idx)
    gradients_match(layer(ids, offsets), expected, list(t.factors))


@given(rows=st.integers(2, 300), width=st.integers(1, 9), keep=st.floats(0, 1), which=st.sampled_from(range(5)))
@settings(max_examples=40, deadline=None)
def test_any_number_of_rows(rows, width, keep, which):
    kind = [rf.CP, rf.Tucker, rf.TT, rf.TTM, rf.TR][which]
    layer = cut_table(kind, (rows, width), max(1, int(keep * rows)))
    t = layer.eval().weight
    assert max(1, int(keep * rows)) <= t.rows <= rows
    ids = torch.randint(rows, (20,))
    close(layer(ids), naive_table(t, t.factors)[ids])


def test_optimizer_state_and_gradients_follow():
    table = rf.nn.Embedding(50, 8, format=rf.TTM(3, out_modes=(50, 1), in_modes=(1, 8)))
    optimizer = torch.optim.Adam(table.parameters(), lr=0.1)
    table(torch.arange(50)).square().sum().backward()
    optimizer.step()
    first, moments = table.weight.factors[0], optimizer.state[table.weight.factors[0]]["exp_avg"].clone()
    table.weight.keep_rows_(20, optimizer)
    assert table.weight.factors[0] is first
    assert first.grad is not None
    assert first.grad.shape == first.shape == (20, 3)
    assert torch.equal(optimizer.state[first]["exp_avg"], moments[:20])
    table(torch.arange(50)).square().sum().backward()
    optimizer.step()


def test_a_file_brings_its_rows(kind, tmp_path):
    small = cut_table(kind, (97, 6), 20)
    rf.save(small, tmp_path / "table.safetensors")
    loaded = rf.load(tmp_path / "table.safetensors", nn.Embedding(97, 6, dtype=torch.float64))
    assert loaded.weight.rows == small.weight.rows
    close(loaded.weight.dense(), small.weight.dense())
    fresh = layer_around(make(kind(3), (97, 6)))
    whole = copy.deepcopy(fresh.state_dict())
    fresh.load_state_dict(small.state_dict())
    assert fresh.weight.rows == small.weight.rows
    close(fresh.weight.dense(), small.weight.dense())
    small.load_state_dict(whole)
    assert small.weight.rows == 97
    assert small.num_embeddings == 97


def test_a_matrix_that_is_no_table_keeps_its_rows(tmp_path):
    layer = rf.nn.Linear(6, 20, bias=False, format=rf.TT(2, out_modes=(4, 5), in_modes=(6,)))
    with pytest.raises(ValueError, match=re.escape("only the table of an rf.nn.Embedding or EmbeddingBag loses rows.")):
        layer.weight.keep_rows_(10)
    rf.save(rf.nn.Linear(6, 15, bias=False, format=rf.TT(2, out_modes=(3, 5), in_modes=(6,))), tmp_path / "a")
    with pytest.raises(ValueError, match="Make the layer with the format and sizes it was saved with"):
        rf.load(tmp_path / "a", layer)


@pytest.mark.parametrize("rows", [0, 31])
def test_rows_that_are_not_there_cannot_be_kept(rows):
    table = rf.nn.Embedding(30, 8, format=rf.TTM(3))
    with pytest.raises(ValueError, match=re.escape(f"rows must be from 1 to the 30 that are left, got {rows}.")):
        table.weight.keep_rows_(rows)


def test_padding_behind_the_first_row_keeps_all_rows():
    assert not rf.nn.Embedding(30, 8, padding_idx=29, format=rf.TTM(3)).weight.may_lose_rows
    assert rf.nn.EmbeddingBag(30, 8, padding_idx=0, format=rf.TTM(3)).weight.may_lose_rows
    with pytest.raises(ValueError, match=re.escape("a layer of this table has padding behind the first row")):
        rf.nn.Embedding(30, 8, padding_idx=29, format=rf.TTM(3)).weight.keep_rows_(10)


@pytest.mark.parametrize("paddings", [(29, 0), (0, 29), (None, 29)])
def test_one_layer_with_padding_behind_the_first_row_keeps_the_rows_of_a_shared_table(paddings):
    weight = rf.LowRankTensor((30, 8), rf.TTM(3))
    layers = [rf.nn.Embedding.around(weight, nn.Embedding(30, 8, padding)) for padding in paddings]
    assert not weight.may_lose_rows
    assert all(layer.weight.rows == 30 for layer in layers)


@pytest.mark.parametrize("dense", [True, False])
def test_exported_tables_are_the_same(kind, dense):
    for layer, inputs in (
        (cut_table(kind, (97, 6), 20, padding_idx=0), (torch.tensor([[0, 3], [96, 19]]),)),
        (cut_table(kind, (97, 6), 20, cls=rf.nn.EmbeddingBag), (torch.tensor([0, 3, 96, 19]), torch.tensor([0, 2]))),
    ):
        close(rf.export(layer.eval(), dense=dense)(*inputs), layer(*inputs))


def test_a_tied_layer_has_no_logits_but_its_bias_where_rows_are_gone(kind):
    table = cut_table(kind, (97, 6), 20)
    out = rf.nn.Linear.around(table.weight, nn.Parameter(torch.randn(97, dtype=torch.float64)))
    x = torch.randn(4, 6, dtype=torch.float64)
    model = nn.Sequential(table, out).eval()
    close(out(x), x @ table.weight.dense().T + out.bias)
    close(rf.export(model)[1](x), out(x))


def test_counts_and_descriptions_say_what_is_left():
    table = rf.nn.Embedding(50, 8, format=rf.TTM(3, out_modes=(50, 1), in_modes=(1, 8)))
    table.weight.keep_rows_(20)
    (layer,) = rf.summary(table).layers
    assert (layer.rows, layer.parameters, layer.dense_parameters, layer.padding) == (20, 84, 400, 0)
    assert "the layer has 20 of 50 rows left; those after are zeros." in str(rf.summary(table))
    assert "rows=20 of 50" in repr(table)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")  # The compiler's own.
def test_compiled_tables_read_zeros():
    for cls, options in ((rf.nn.Embedding, {}), (rf.nn.EmbeddingBag, {"padding_idx": 0})):
        layer = cut_table(rf.TTM, (250, 12), 30, cls=cls, **options).eval()
        ids = torch.tensor([[0, 3, 249], [29, 0, 200]])
        close(torch.compile(layer, fullgraph=True, backend="aot_eager")(ids), layer(ids))


def frequent(posterior, true_rows=12):
    """A classifier of ids, of which all but the first say nothing, and the NLL of its examples."""
    table = rf.nn.Embedding(64, 6, format=rf.TTM(2, out_modes=(64, 1), in_modes=(1, 6)), posterior=posterior)
    ids = (torch.rand(4000).pow(2) * 64).long()
    heard = torch.randn(64).masked_fill(torch.arange(64) >= true_rows, 0.0).sign()
    labels = (3 * heard[ids] + torch.randn(4000) > 0).float()
    model = nn.Sequential(table, nn.Linear(6, 1))

    def nll():
        return F.binary_cross_entropy_with_logits(model(ids).squeeze(1), labels, reduction="none")

    return model, nll


def test_rows_go_that_do_not_pay_for_numbers_of_their_own(posterior):
    model, nll = frequent(posterior)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    elbo = rf.ELBOLoss(model, 4000)
    calls = []
    for _ in range(4):
        for _ in range(150):
            optimizer.zero_grad()
            elbo(nll().mean()).backward()
            optimizer.step()
        calls.append(rf.select_ranks_(model, optimizer, nll=nll, num_data=4000))
    cuts = [cut for found in calls for cut in found if cut.bond == "rows"]
    assert 12 <= model[0].weight.rows <= 24
    assert cuts[0].before == 64
    assert cuts[-1].after == model[0].weight.rows
    assert all(cut.nll_cost < cut.saved for cut in cuts)
    # What a row says depends on the slices that are left, and rows do not come back.
    assert [cut.bond for cut in calls[0]] == ["r1"]
    assert all(len(found) == 1 for found in calls if "rows" in {cut.bond for cut in found})


def test_rows_that_all_speak_stay():
    model, nll = frequent(rf.MeanField(), true_rows=64)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    elbo = rf.ELBOLoss(model, 4000)
    for _ in range(300):
        optimizer.zero_grad()
        elbo(nll().mean()).backward()
        optimizer.step()
    rf.select_ranks_(model, optimizer, nll=nll, num_data=4000)
    assert model[0].weight.rows > 56
