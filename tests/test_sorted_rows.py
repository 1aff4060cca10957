# SPDX-License-Identifier: Apache-2.0
"""Rows of chains in one pass of compiled code, against rows of the dense table."""

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

import rankfall as rf
from laws import make, naive_dense
from rankfall import _lookup, _sorted_rows
from rankfall._chain import is_chain
from rankfall._einsum import shapes_of
from rankfall._machine import Machine, use
from rankfall._row_library import library
from rankfall._sorted_rows import may_pass
from table_rows import check_rows, gradients_match, layer_around

pytestmark = pytest.mark.skipif(library(torch.float64) is None, reason="no C compiler")

BY_TORCH = _lookup.Reading(False, None, 0, 0)


@pytest.fixture
def made(monkeypatch):
    """The ids of each pass."""
    made, apply = [], _sorted_rows._Read.apply
    monkeypatch.setattr(_sorted_rows._Read, "apply", lambda *a: made.append(a[1]) or apply(*a))
    return made


@pytest.fixture(params=[False, True], ids=["rows", "blocks"])
def passes(request, made, monkeypatch):
    """Rows are read in one pass of one kind wherever that can be; the ids of each."""

    def reading(layout, shapes, ids, outputs, compiled=False):
        ways = _lookup.readings(layout, shapes, ids, outputs, compiled)
        return next((w for w in ways if w.compiled and w.forms_table == request.param), BY_TORCH)

    monkeypatch.setattr(_lookup, "reading", reading)
    return made


@pytest.mark.parametrize("format", [rf.TTM(4), rf.TT(4)], ids=["TTM", "TT"])
@pytest.mark.parametrize("shape", [(30, 8), (97, 6), (7, 1), (250, 12)], ids=str)
def test_a_layer_reads_the_rows_of_its_table(format, shape, passes, posterior):
    t = make(format, shape, posterior=posterior)
    for ids in (
        torch.randint(shape[0], (5, 4)),
        torch.randint(shape[0], (6, 4), dtype=torch.int32).T,
        torch.randint(shape[0], (9,))[::2],
        torch.randint(shape[0], ()),
        torch.zeros(0, 3, dtype=torch.int64),
    ):
        check_rows(t, ids)
    assert len(passes) == 10


@pytest.mark.parametrize("joined", [(1, 1), (1, 2)], ids=str)
def test_factors_without_rows_or_columns_of_their_own(joined, made, monkeypatch):
    monkeypatch.setattr(_lookup, "reading", lambda *_: replace(BY_TORCH, joined=joined, compiled=True))
    check_rows(make(rf.TTM(3, out_modes=(24, 1, 1), in_modes=(1, 2, 4)), (24, 8)), torch.randint(24, (9,)))
    check_rows(make(rf.TTM(3, out_modes=(4, 1, 6), in_modes=(1, 8, 1)), (24, 8)), torch.randint(24, (9,)))
    check_rows(make(rf.TT(3, out_modes=(2, 3, 4), in_modes=(8,)), (24, 8)), torch.randint(24, (9,)))
    assert len(made) == 6


def test_autocast_leaves_factors_as_wide_as_they_are(kind, made, monkeypatch):
    layer = rf.nn.Embedding(300, 12, format=kind(3), posterior=rf.Point())
    weight, ids = layer.weight, torch.arange(40)
    expected = weight.dense()[ids]
    for way in _lookup.readings(weight.layout, shapes_of(weight.factors), 40, 40, True):
        if way.compiled:
            monkeypatch.setattr(_lookup, "reading", lambda *_, way=way: way)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                rows = layer(ids)
            torch.testing.assert_close(rows, expected)
            gradients = [torch.autograd.grad(y.sum(), list(weight.factors)) for y in (rows, weight.dense()[ids])]
            torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)
    assert made


def test_which_layouts_are_chains():
    for format, is_one in (
        (rf.TT(2), True),
        (rf.TTM(2), True),
        (rf.TR(2), False),
        (rf.CP(2), False),
        (rf.Tucker(2), False),
    ):
        assert is_chain(format.layout((24, 8))) == is_one
    assert not is_chain(rf.TT(2).layout((4, 3, 2)))
    assert is_chain(rf.TTM(2, out_modes=(4, 1, 6), in_modes=(1, 8, 1)).layout((24, 8)))


@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("padding", [None, 3])
@pytest.mark.parametrize("with_last", [False, True])
def test_bags_are_those_of_torch(mode, padding, with_last, passes):
    t = make(rf.TTM(3), (30, 7), posterior=rf.Point())
    options = {"mode": mode, "padding_idx": padding}
    ids = torch.randint(30, (24,))
    ids[::4] = 3
    layer, dense = layer_around(t, rf.nn.EmbeddingBag, **options), naive_dense(t, t.factors)
    gradients_match(layer(ids.view(6, 4)), F.embedding_bag(ids.view(6, 4), dense, **options), list(t.factors))
    dense = naive_dense(t, t.factors)
    layer = layer_around(t, rf.nn.EmbeddingBag, include_last_offset=with_last, **options)
    offsets = torch.tensor([0, 0, 5, 5, 17, 24])
    expected = F.embedding_bag(ids, dense, offsets, include_last_offset=with_last, **options)
    gradients_match(layer(ids, offsets), expected, list(t.factors))
    assert len(passes) == 2


def test_weights_of_ids_learn_too(passes):
    t = make(rf.TTM(3), (30, 7), posterior=rf.Point())
    ids, weights = torch.randint(30, (6, 4)), torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    layer = layer_around(t, rf.nn.EmbeddingBag, mode="sum", padding_idx=int(ids[2, 1]))
    expected = F.embedding_bag(
        ids, naive_dense(t, t.factors), mode="sum", per_sample_weights=weights, padding_idx=layer.padding_idx
    )
    gradients_match(layer(ids, per_sample_weights=weights), expected, [*t.factors, weights])
    assert len(passes) == 1


def test_rows_that_are_gone_and_padding_are_zeros(passes):
    t = make(rf.TTM(3), (30, 7), posterior=rf.Point())
    layers = layer_around(t, padding_idx=0), layer_around(t, rf.nn.EmbeddingBag, mode="mean")
    t.keep_rows_(20)
    ids = torch.tensor([[0, 29, 7, 7], [19, 21, 3, 0]])
    expected = F.embedding(ids, _with_zeros(t)).masked_fill((ids == 0).unsqueeze(2), 0.0)
    gradients_match(layers[0](ids), expected, list(t.factors))
    gradients_match(layers[1](ids), F.embedding_bag(ids, _with_zeros(t), mode="mean"), list(t.factors))
    assert len(passes) == 2


def _with_zeros(t):
    left = naive_dense(t, t.factors)[: t.rows]
    return F.pad(left, (0, 0, 0, t.shape[0] - len(left)))


@pytest.mark.parametrize("bags", [False, True])
def test_second_derivatives(bags, passes):
    t = make(rf.TTM(2), (30, 6), posterior=rf.Point())
    ids, weights = torch.tensor([[3, 29, 3], [0, 5, 5]]), torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    layer = layer_around(t, *([rf.nn.EmbeddingBag] if bags else []), **({"mode": "sum"} if bags else {}))

    def rows(*tensors):
        return layer(ids, per_sample_weights=tensors[-1]) if bags else layer(ids)

    assert torch.autograd.gradgradcheck(rows, (*t.factors, *([weights] if bags else [])))
    frozen = copy.deepcopy(layer)
    frozen.weight.factors[0].requires_grad_(False)
    of_last = torch.autograd.grad(frozen(ids).square().sum(), frozen.weight.factors[-1], create_graph=True)[0]
    assert of_last.requires_grad
    assert passes


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # By torch's own forward derivatives.
def test_who_traces_transforms_or_counts_sees_calls_of_torch(passes):
    t = make(rf.TTM(2), (30, 6), posterior=rf.Point())
    layer, ids = layer_around(t), torch.tensor([3, 29, 3])
    expected = naive_dense(t, t.factors)[ids]
    given = {name: value.detach() for name, value in layer.named_parameters()}

    def of(parameters):
        return torch.func.functional_call(layer, parameters, ids)

    torch.testing.assert_close(torch.func.jvp(of, (given,), (given,))[0], expected)
    several = {name: torch.stack([value, 2 * value]) for name, value in given.items()}
    torch.testing.assert_close(torch.func.vmap(of)(several), torch.stack([expected, 2 ** len(given) * expected]))
    with forward_ad.dual_level():
        torch.testing.assert_close(layer(ids), expected)
    with FlopCounterMode(display=False) as counter:
        layer(ids)
    assert counter.get_total_flops() > 0
    assert not passes
    layer(ids)
    assert len(passes) == 1


def test_what_is_not_plain_is_left_to_torch():
    factors, ids = [torch.zeros(3, 2), torch.zeros(2)], torch.tensor([1])
    assert not may_pass([f.to("meta") for f in factors], ids)
    assert not may_pass([f.half() for f in factors], ids)
    assert not may_pass([factors[0], factors[1].double()], ids)
    assert not may_pass([nn.Buffer(factors[0]).as_subclass(_Other), factors[1]], ids)
    assert may_pass(factors, ids)


class _Other(torch.Tensor):
    """A tensor that may not be what its memory says."""


def test_a_plan_says_that_it_is_one_pass():
    table = rf.nn.Embedding(10_131_227, 128, format=rf.TTM(16, out_modes=(200, 220, 250), in_modes=(4, 4, 8)))
    table(torch.arange(2048) * 4000)
    assert "2,048 ids by the distinct rows in one pass in" in repr(table)
    bag = rf.nn.EmbeddingBag(10_131_227, 128, format=rf.TTM(16, out_modes=(200, 220, 250), in_modes=(4, 4, 8)))
    bag(torch.arange(2048) * 4000, torch.arange(64) * 32)
    assert "2,048 ids in 64 bags by the distinct rows in one pass in" in repr(bag)


def test_only_last_factors_are_joined_for_a_pass():
    layout, shapes = words(rf.TTM(8, **MODES), 8)
    ways = [w for w in _lookup.readings(layout, shapes, 51_200, 51_200, True) if w.compiled and not w.forms_table]
    assert {way.joined[0] for way in ways} == {1}
    assert {way.joined[1] for way in ways} >= {1, 2, 3}
    assert ways[1].described() == "the distinct rows in one pass of joined factors"
    layout, shapes = words(rf.TTM(2, out_modes=(2,) * 18, in_modes=(2,) * 18), 2)
    ways = [w for w in _lookup.readings(layout, shapes, 51_200, 51_200, True) if w.compiled and not w.forms_table]
    assert min(way.joined[1] for way in ways) == 3  # No more factors than it has room for.


def test_rows_that_have_no_key_are_read_by_torch(monkeypatch):
    layout, shapes = words(rf.TTM(2, out_modes=(3, 4), in_modes=(2, 2)), 2)
    for most, compiled in ((13, True), (12, False)):
        monkeypatch.setattr(_lookup, "MOST_ROWS", most)
        assert any(way.compiled for way in _lookup.readings(layout, shapes, 40, 40, True)) == compiled


MODES = {"out_modes": (5, 5, 5, 5, 5, 8), "in_modes": (2, 2, 2, 2, 4, 4)}


def words(format, rank):
    layout = format.layout((math.prod(format.out_modes), math.prod(format.in_modes)))
    return layout, layout.factor_shapes(dict.fromkeys(layout.bonds, rank))


@pytest.mark.parametrize("format", [rf.TTM(20, **MODES), rf.TT(20, **MODES), rf.CP(100, **MODES)], ids=str)
@pytest.mark.usefixtures("narrow")
def test_a_table_of_many_words_is_made_in_blocks(format):
    layout, shapes = words(format, format.max_rank)
    assert _lookup.reading(layout, shapes, 51_200, 51_200, True).described() == "a table of all rows in blocks"
    assert not _lookup.reading(layout, shapes, 51_200, 51_200, False).compiled


@pytest.fixture
def narrow():
    """The figures of a processor without AVX-512."""
    use(Machine(97e9, 2.1e9, 1.4e-7, 86e9, 97e9, 43e9, 84e9))
    yield
    use(None)


def test_the_cut_of_a_table_in_blocks_leaves_a_small_second_factor():
    costs = [_sorted_rows.blocks_plan((25_000 // n, 256 // m), 20, (n, m), 51_200).cost for n, m in CUTS]
    assert min(costs) == costs[1]


CUTS = (8, 4), (40, 16), (1000, 64)  # Short pieces of rows; in between; more than a cache holds.


@pytest.mark.parametrize("joined", [(1, 2), (1, 3)], ids=str)
def test_a_pass_over_joined_factors(joined, made, monkeypatch):
    monkeypatch.setattr(_lookup, "reading", lambda *_: replace(BY_TORCH, joined=joined, compiled=True))
    t = make(rf.TTM(3, out_modes=(3, 2, 4, 5), in_modes=(2, 1, 2, 3)), (113, 11))
    check_rows(t, torch.randint(113, (50,)))
    assert len(made) == 2


@pytest.mark.parametrize("shape", [(24, 8), (113, 11)], ids=str)
def test_a_table_of_every_format_in_blocks(kind, shape, made, monkeypatch):
    t = make(kind(3), shape)
    for way in _lookup.readings(t.layout, shapes_of(t.factors), 40, 40, True):
        if way.compiled and way.forms_table:
            monkeypatch.setattr(_lookup, "reading", lambda *_, way=way: way)
            check_rows(t, torch.randint(shape[0], (40,)))
            assert way.described() == "a table of all rows in blocks"
    assert made


def test_a_pass_over_what_no_cache_holds_is_dearer():
    small, large = (_sorted_rows.pass_plan(((200, n, 250), (4, 4, 8)), (16, 16), 2048) for n in (250, 260))
    assert large.elements > 2 * small.elements


def test_more_threads_make_a_pass_dearer_than_batches(monkeypatch):
    """One thread goes through the rows, while products in batches are shared out."""
    modes, ranks = ((200, 220, 250), (4, 4, 8)), (16, 16)
    one = _sorted_rows.pass_plan(modes, ranks, 2048)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    assert one.cost < _sorted_rows.pass_plan(modes, ranks, 2048).cost
