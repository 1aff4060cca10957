# SPDX-License-Identifier: Apache-2.0
"""Embeddings against F.embedding and F.embedding_bag on a table that shares no code with the library."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import rankfall as rf
from laws import close, drawn, make, naive_dense
from rankfall import _chain, _lookup, _rows
from rankfall._einsum import shapes_of
from rankfall._lookup import digits, reading, readings
from rankfall._row_library import library
from table_rows import SEED, check_rows, gradients_match, layer_around

SHAPES = [(30, 8), (97, 6), (7, 1), (250, 12)]


@pytest.fixture(params=[False, True], ids=["distinct ids", "ids as they came"])
def as_on_a_gpu(request, monkeypatch):
    """Rows as the planner has them; or never those of a formed table, and without a look at the ids."""
    if not request.param:
        return

    def reading_rows(*sizes):
        return min((way for way in readings(*sizes) if not way.forms_table), key=lambda way: way.cost)

    for module in (_lookup, _chain):
        monkeypatch.setattr(module, "may_look_at", lambda _: False)
    monkeypatch.setattr(_lookup, "reading", reading_rows)


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_are_those_of_the_dense_table(kind, shape, posterior):
    t = make(kind(4), shape, posterior=posterior)
    check_rows(t, torch.randint(shape[0], (5, 4)))
    check_rows(t, torch.tensor([0, shape[0] - 1], dtype=torch.int32))
    check_rows(t, torch.randint(shape[0], ()))
    check_rows(t, torch.zeros(0, 3, dtype=torch.int64))


@pytest.fixture(params=[1, 2])
def threads(request, monkeypatch):
    """On one thread gradients of rows are added by functions of our own, of however few ids here."""
    monkeypatch.setattr(_rows, "_MANY", 0)
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_rows_do_not_depend_on_the_number_of_threads(kind):
    check_rows(make(kind(4), (97, 6)), torch.randint(97, (5, 4)))
    check_rows(make(kind(4), (97, 6)), torch.randint(97, (3,), dtype=torch.int32))
    check_rows(make(kind(4), (97, 6)), torch.zeros(0, 3, dtype=torch.int64))
    t = make(kind(2), (7, 4), posterior=rf.Point())
    layer, ids = layer_around(t), torch.tensor([3, 6, 3])
    assert torch.autograd.gradgradcheck(lambda *_: layer(ids), tuple(t.factors))


@pytest.mark.parametrize("looks", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_all_ways_give_the_same_rows_and_bags(kind, shape, looks, monkeypatch):
    for module in (_lookup, _chain):
        monkeypatch.setattr(module, "may_look_at", lambda _: looks)
    t = make(kind(3), shape)
    ids = torch.randint(shape[0], (40,))
    compiled = looks and library(torch.float64) is not None
    ways = readings(t.layout, shapes_of(t.factors), 40, 40, compiled)
    assert len(ways) >= 2
    assert {way.forms_table for way in ways} == {True, False}
    for way in ways:
        monkeypatch.setattr(_lookup, "reading", lambda *_, way=way: way)
        check_rows(t, ids)
        for padding in (None, int(ids[3])):
            layer = layer_around(t.eval(), rf.nn.EmbeddingBag, mode="mean", padding_idx=padding)
            expected = F.embedding_bag(
                ids.view(8, 5), naive_dense(t, t.factors), mode="mean", padding_idx=layer.padding_idx
            )
            gradients_match(layer(ids.view(8, 5)), expected, list(t.factors))
            layer = layer_around(t, padding_idx=padding)
            expected = F.embedding(ids, naive_dense(t, t.factors))
            if padding is not None:
                expected = expected.masked_fill((ids == padding).unsqueeze(1), 0.0)
            gradients_match(layer(ids), expected, list(t.factors))


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(2, 400),
    width=st.integers(2, 20),
    rank=st.integers(1, 5),
    ids=st.lists(st.integers(0, 10**6), min_size=1, max_size=30),
    which=st.sampled_from([rf.CP, rf.Tucker, rf.TT, rf.TTM, rf.TR]),
)
def test_any_vocabulary(rows, width, rank, ids, which):
    t = make(which(rank), (rows, width))
    check_rows(t, torch.tensor(ids) % rows)


@pytest.mark.usefixtures("as_on_a_gpu")
def test_a_rank_of_zero_gives_zeros(kind):
    t = make(kind(3), (30, 8), posterior=rf.Point())
    t.keep_slices_(next(iter(t.ranks)), torch.zeros(0, dtype=torch.int64))
    assert torch.equal(layer_around(t)(torch.tensor([3, 4])), torch.zeros(2, 8, dtype=torch.float64))


@given(rows=st.integers(0, 2**62), modes=st.lists(st.integers(1, 1000), min_size=1, max_size=6))
def test_digits_make_the_number_again(rows, modes):
    size = 1
    for mode in modes:
        size *= mode
    number = rows % min(size, 2**62)
    value = 0
    for digit, mode in zip(digits(torch.tensor([number]), modes), modes, strict=True):
        assert 0 <= int(digit) < mode
        value = value * mode + int(digit)
    assert value == number


def test_cost_grows_with_the_distinct_ids_and_not_with_the_table():
    layouts = [
        rf.TTM(16, out_modes=modes, in_modes=(4, 4, 8)).layout((rows, 128))
        for rows, modes in ((1000, (10, 10, 10)), (10_131_227, (200, 220, 250)))
    ]
    plans = [_lookup.lookup_plan(layout, layout.factor_shapes({"r1": 16, "r2": 16}), 500) for layout in layouts]
    assert plans[0].flops == plans[1].flops
    few = _lookup.lookup_plan(layouts[1], layouts[1].factor_shapes({"r1": 16, "r2": 16}), 5)
    assert few.cost * 50 < plans[1].cost


def test_a_table_beyond_memory_is_read_at_its_last_rows():
    rows = 10_131_227
    table = rf.nn.Embedding(rows, 128, format=rf.TTM(4, out_modes=(200, 220, 250), in_modes=(4, 4, 8))).eval()
    ids = torch.tensor([rows - 1, 2**23 + 1, 0])
    f1, f2, f3 = table.weight.factors
    for place, row in enumerate(ids.tolist()):
        first, second, third = row // (220 * 250), row // 250 % 220, row % 250
        expected = torch.einsum("xa,ayb,bz->xyz", f1[first], f2[:, second], f3[:, third]).flatten()
        torch.testing.assert_close(table(ids)[place], expected)


def test_the_cheap_way_is_found(kind):
    layout = kind(4).layout((250, 12))
    shapes = layout.factor_shapes(kind(4).start_ranks(layout))
    assert not reading(layout, shapes, 1, 1).forms_table
    assert reading(layout, shapes, 1 << 17, 1 << 17).forms_table


def test_bags_are_reduced_before_they_are_widened():
    layout = rf.TT(4, out_modes=(50, 50), in_modes=(8, 8)).layout((2500, 64))
    shapes = layout.factor_shapes({"r1": 4, "r2": 4, "r3": 4})
    way = reading(layout, shapes, 4096, 128)
    assert way.pair is not None
    assert way.pair.joint == ("r2",)


@pytest.mark.usefixtures("as_on_a_gpu")
def test_gradients_are_dense_and_padding_learns_nothing(kind):
    t = make(kind(3), (30, 8))
    ids = torch.tensor([[3, 5], [3, 29]])
    layer = layer_around(t, padding_idx=3).eval()
    table = naive_dense(t, t.factors)
    expected = F.embedding(ids, table.index_fill(0, torch.tensor([3]), 0.0))
    assert torch.equal(layer(ids)[:, 0], torch.zeros(2, 8, dtype=torch.float64))
    gradients_match(layer(ids), expected, list(t.factors))
    layer(ids).sum().backward()
    assert all(f.grad.layout is torch.strided for f in t.factors)


def test_the_row_of_padding_is_that_of_the_dense_table(tmp_path):
    """Tied to an output layer, or trained before it was padding, it is not zeros."""
    dense = nn.Embedding(24, 6, padding_idx=3)
    dense.weight.data.normal_()
    ids = torch.tensor([[3, 5], [23, 3]])
    model = nn.Sequential(rf.nn.Embedding.from_dense(dense, format=rf.TT(150), posterior=rf.Point()))
    close(model(ids), dense(ids), 1e-5)
    assert torch.equal(model(ids)[0, 0], dense.weight[3])
    (model(ids)[0, 0].sum() + 0 * model(ids).sum()).backward()
    assert all(not bool(factor.grad.any()) for factor in model[0].weight.factors)
    changed = rf.tensorize_(nn.Sequential(dense), rf.TT(150), posterior=rf.Point(), from_dense=True)
    close(changed(ids), dense(ids), 1e-5)
    for made in (rf.export(changed.eval()), rf.export(changed, dense=True)):
        close(made(ids), dense(ids), 1e-5)
    rf.save(changed, tmp_path / "table.safetensors")
    for other in (
        nn.Sequential(nn.Embedding(24, 6, 3)),
        nn.Sequential(rf.nn.Embedding(24, 6, 3, format=rf.TT(2), posterior=rf.Point())),
    ):
        assert torch.equal(rf.load(tmp_path / "table.safetensors", other)(ids), changed(ids))
    afresh = rf.tensorize_(nn.Sequential(nn.Embedding(24, 6, padding_idx=3)), rf.TT(4), from_dense=True)
    assert afresh[0].padding_row is None
    changed.load_state_dict({k: v for k, v in afresh.state_dict().items() if "log_stds" not in k})
    assert torch.equal(changed(ids)[0, 0], torch.zeros(6))
    assert rf.tensorize_(nn.Sequential(dense), rf.TT(2))[0].padding_row is None


def test_a_state_of_other_layers_leaves_the_row_of_padding():
    dense = nn.Embedding(24, 6, padding_idx=3)
    with torch.no_grad():
        dense.weight[3] = 1.0  # As an output layer that shares the weight teaches it.
    layer = rf.nn.Embedding.from_dense(dense, format=rf.TT(4))
    nn.ModuleDict({"a": layer, "b": nn.Linear(2, 2)}).load_state_dict({"b.bias": torch.zeros(2)}, strict=False)
    assert torch.equal(layer.padding_row, torch.ones(6))
    unpadded = rf.nn.Embedding.around(rf.LowRankTensor.from_dense(dense.weight, rf.TT(4)), nn.Embedding(24, 6))
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "padding_row"'):
        unpadded.load_state_dict(layer.state_dict())
    unpadded.load_state_dict(layer.state_dict(), strict=False)
    ids = torch.tensor([3, 4])
    assert torch.equal(unpadded.eval()(ids)[1], layer.eval()(ids)[1])


BAGS = {
    "one bag each": torch.tensor([0, 1, 2, 3, 4, 5]),
    "two bags": torch.tensor([0, 4]),
    "empty bags": torch.tensor([0, 0, 3, 3, 6]),
    "ends with a bag that is empty": torch.tensor([0, 2, 6]),
}


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("offsets", BAGS.values(), ids=BAGS)
@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("padding_idx", [None, 5, 11])
def test_bags_are_those_of_the_dense_table(kind, mode, offsets, padding_idx):
    t = make(kind(4), (30, 8))
    ids = torch.tensor([3, 5, 5, 29, 0, 3])
    for last in (False, True):
        layer = layer_around(t, rf.nn.EmbeddingBag, mode=mode, padding_idx=padding_idx, include_last_offset=last)
        for _ in (layer.train(), layer.eval()):
            bounds = torch.cat([offsets, torch.tensor([6])]) if last else offsets
            table = naive_dense(t, drawn(t, SEED))
            expected = F.embedding_bag(ids, table, bounds, mode=mode, padding_idx=padding_idx, include_last_offset=last)
            torch.manual_seed(SEED)
            gradients_match(layer(ids, bounds), expected, [*t.factors, *(t.log_stds if t.training else [])])


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_gradients_of_bags_do_not_depend_on_the_number_of_threads(mode, threads):
    t = make(rf.TT(4), (30, 8), posterior=rf.Point())
    ids = torch.tensor([3, 5, 5, 29, 0, 3])
    for last in (False, True):
        layer = layer_around(t, rf.nn.EmbeddingBag, mode=mode, include_last_offset=last)
        for offsets in BAGS.values():
            bounds = torch.cat([offsets, torch.tensor([6])]) if last else offsets
            expected = F.embedding_bag(ids, naive_dense(t, t.factors), bounds, mode=mode, include_last_offset=last)
            gradients_match(layer(ids, bounds), expected, list(t.factors))
            if threads == 1:  # torch's own has none.
                again = (lambda *_, layer=layer, bounds=bounds: layer(ids, bounds)), tuple(t.factors)
                assert torch.autograd.gradgradcheck(*again)
    layer = layer_around(t, rf.nn.EmbeddingBag, mode=mode)
    for pairs in (ids.view(3, 2), ids.view(2, 3).int()):
        expected = F.embedding_bag(pairs, naive_dense(t, t.factors), mode=mode)
        gradients_match(layer(pairs), expected, list(t.factors))


@pytest.mark.usefixtures("as_on_a_gpu")
def test_bags_of_one_size_and_weights(kind):
    t = make(kind(4), (30, 8))
    ids = torch.randint(30, (3, 4))
    mean = layer_around(t, rf.nn.EmbeddingBag).eval()
    gradients_match(mean(ids), F.embedding_bag(ids, naive_dense(t, t.factors)), list(t.factors))
    weights = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    total = layer_around(t, rf.nn.EmbeddingBag, mode="sum").eval()
    expected = F.embedding_bag(ids, naive_dense(t, t.factors), mode="sum", per_sample_weights=weights)
    gradients_match(total(ids, per_sample_weights=weights), expected, [weights, *t.factors])


@pytest.mark.usefixtures("as_on_a_gpu")
def test_no_ids_at_all(kind):
    layer = rf.nn.EmbeddingBag(30, 8, format=kind(3))
    none = torch.zeros(0, dtype=torch.int64)
    assert torch.equal(layer(none, torch.zeros(2, dtype=torch.int64)), torch.zeros(2, 8))
    assert layer(none, none).shape == (0, 8)


@pytest.mark.parametrize("cls", [rf.nn.Embedding, rf.nn.EmbeddingBag])
def test_from_dense_reads_the_same(kind, cls):
    dense = (nn.Embedding if cls is rf.nn.Embedding else nn.EmbeddingBag)(24, 6, dtype=torch.float64)
    layer = cls.from_dense(dense, format=kind(150), posterior=rf.Point())
    ids = torch.randint(24, (5, 3))
    if kind is not rf.CP:  # Alternating least squares stops near, not at, a random table.
        close(layer(ids), dense(ids), 1e-8)
    assert layer.num_embeddings == 24
    assert layer.embedding_dim == 6


def test_entries_start_with_the_variance_of_torch():
    for layer in (rf.nn.Embedding(512, 64, format=rf.TT(8)), rf.nn.EmbeddingBag(512, 64, format=rf.TTM(8))):
        torch.testing.assert_close(layer.weight.dense().square().mean(), torch.tensor(1.0))


def test_only_the_weight_has_state(kind):
    layer = rf.nn.EmbeddingBag(30, 8, mode="sum", padding_idx=2, format=kind(3))
    assert all(key.startswith(("weight.factors.", "weight.log_stds.")) for key in layer.state_dict())
    other = copy.deepcopy(layer).eval()
    ids = torch.randint(30, (2, 5))
    assert torch.equal(other(ids), layer.eval()(ids))
    assert "TT" in repr(layer) or "ranks=" in repr(layer)


def message(error, text, call):
    with pytest.raises(error, match=re.escape(text)):
        call()


def test_errors_name_the_layer():
    table = rf.nn.Embedding(30, 8, format=rf.TT(3))
    bag = rf.nn.EmbeddingBag(30, 8, format=rf.TT(3))
    model = rf.tensorize_(nn.Sequential(nn.Embedding(30, 8)), rf.TT(3))
    message(IndexError, "'0' has 30 rows, but ids go from 4 to 30.", lambda: model(torch.tensor([30, 4])))
    message(IndexError, "Embedding has 30 rows, but ids go from -1 to 2.", lambda: table(torch.tensor([-1, 2])))
    message(ValueError, "Embedding takes ids of type int64 or int32, got torch.float32.", lambda: table(torch.ones(2)))
    message(IndexError, "EmbeddingBag has 30 rows", lambda: bag(torch.tensor([[31, 0]])))
    message(ValueError, "EmbeddingBag takes ids of type", lambda: bag(torch.ones(2, 2)))
    message(ValueError, "needs offsets: where each bag begins", lambda: bag(torch.tensor([1, 2])))
    message(ValueError, "has bags of one size, so leave out", lambda: bag(torch.ones(2, 2).long(), torch.tensor([0])))
    message(ValueError, "shape (n,) or (bags, n), got (1, 1, 1)", lambda: bag(torch.ones(1, 1, 1).long()))
    message(ValueError, "integers of shape (bags,), got torch.float32", lambda: bag(torch.tensor([1]), torch.ones(1)))
    ids, total = torch.tensor([[1, 2], [3, 4]]), rf.nn.EmbeddingBag(30, 8, "sum", format=rf.TT(3))
    text = "per_sample_weights must have the shape of the ids, (2, 2), got (2, 1)."
    message(ValueError, text, lambda: total(ids, per_sample_weights=torch.ones(2, 1)))
    text = "EmbeddingBag: per_sample_weights go with mode='sum', and the mode is 'mean'."
    message(NotImplementedError, text, lambda: bag(ids, per_sample_weights=torch.ones(2, 2)))


@pytest.mark.parametrize("offsets", [[1, 2], [0, 2, 1], [0, 4]])
def test_offsets_rise_from_zero_to_the_end(offsets):
    bag = rf.nn.EmbeddingBag(30, 8, format=rf.TT(3))
    shown = ", ".join(map(str, offsets))
    text = f"offsets must begin with 0, never fall, and end at 3 ids at most, got {shown}."
    message(ValueError, text, lambda: bag(torch.tensor([1, 2, 3]), torch.tensor(offsets)))


def test_options_of_rows_are_refused():
    for options in ({"max_norm": 1.0}, {"scale_grad_by_freq": True}):
        text = f"{next(iter(options))} acts on each row as a parameter of its own"
        message(
            ValueError, text, lambda o=options: rf.nn.Embedding.from_dense(nn.Embedding(9, 4, **o), format=rf.TT(2))
        )
        model = nn.Sequential(nn.EmbeddingBag(9, 4, **options))
        message(ValueError, f"'0': {text}", lambda m=model: rf.tensorize_(m, rf.TT(2)))
    text = "mode must be 'mean' or 'sum', got 'max'."
    message(ValueError, text, lambda: rf.nn.EmbeddingBag(9, 4, "max", format=rf.TT(2)))
    text = "padding_idx must be a row, from -9 to 8, got 9."
    message(ValueError, text, lambda: rf.nn.Embedding(9, 4, 9, format=rf.TT(2)))
    assert rf.nn.Embedding(9, 4, -1, format=rf.TT(2)).padding_idx == 8


def test_a_bag_that_is_too_long_to_show_is_cut():
    bag = rf.nn.EmbeddingBag(30, 8, format=rf.TT(3))
    message(ValueError, "got 1, 2, 3, 4, 5, 6, 7, 8, ....", lambda: bag(torch.zeros(20).long(), torch.arange(1, 12)))


def test_a_row_is_looked_up_once(monkeypatch):
    seen = []
    contract_rows = _lookup._rows_of
    monkeypatch.setattr(_lookup, "_rows_of", lambda *a: seen.append(a[2]) or contract_rows(*a))
    rf.nn.Embedding(3000, 8, format=rf.TT(3))(torch.tensor([[7, 7, 2], [2, 7, 2]]))
    assert [s.tolist() for s in seen] == [[2, 7]]


def test_modes_given_may_pad_a_little():
    assert rf.TTM(2, out_modes=(10, 10), in_modes=(2, 4)).layout((97, 8)).padded_shape == (100, 8)
    check_rows(make(rf.TTM(2, out_modes=(10, 10), in_modes=(2, 4)), (97, 8)), torch.tensor([96, 0, 50]))


def test_digits_of_an_id_speak_from_the_start(kind):
    """The mean over all other digits of what a digit says varies from digit to digit."""
    torch.manual_seed(0)
    format = kind(3) if kind is rf.CP else kind(3, out_modes=(12, 12), in_modes=(2, 4))
    table = rf.nn.Embedding(144, 8, format=format)
    weight = table.weight.dense().detach()
    assert float(weight.square().mean()) == pytest.approx(1.0, rel=1e-3)
    first, last = table.weight.layout.modes[0][0], weight.shape[0] // table.weight.layout.modes[0][0]
    rows = weight.view(first, last, 8)
    for mean in (rows.mean(0), rows.mean(1)):
        # Without anything shared the mean over 12 digits has a variance of 1/12 only, noise included.
        assert float(mean.square().mean()) > 0.4
    assert float(rows.var()) > 0.1


def test_rows_of_one_digit_share_nothing():
    torch.manual_seed(0)
    table = rf.nn.Embedding(400, 8, format=rf.TTM(3, out_modes=(400, 1), in_modes=(2, 4)))
    weight = table.weight.dense().detach()
    assert float(weight.mean(0).square().mean()) < 0.05
