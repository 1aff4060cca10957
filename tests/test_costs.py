# SPDX-License-Identifier: Apache-2.0
"""What `rankfall plan` counts, against sums done by hand, and what benchmarks/speed.py says of peers."""

import copy
import importlib
from pathlib import Path

import pytest
import torch
from torch import nn

import rankfall as rf
from rankfall import _convolve, _lookup
from rankfall._costs import costs
from rankfall._einsum import counted_in_steps, rounded, shapes_of
from rankfall._matmul import linear_plan, linear_way
from rankfall._row_library import library


def by_path(model, format, *example):
    return {layer.path: layer for layer in costs(model, format, example=example).layers}


def test_a_recurrent_layer_is_counted_step_by_step():
    layer = nn.LSTM(6, 8, batch_first=True)
    counted = by_path(nn.Sequential(layer), rf.TT(2), torch.zeros(3, 5, 6))["0"]
    # Of each of 3 x 5 tokens, 32 gates of 6 inputs and 8 states; the compact layer forms its recurrent weight.
    assert counted.dense_flops == 2 * 15 * 32 * (6 + 8)
    assert 2 * 15 * 32 * 8 < counted.flops < 2 * counted.dense_flops


def test_attention_is_counted_beside_the_rest():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    counted = by_path(layer, rf.TT(2), torch.zeros(2, 10, 16))
    projections, products = 2 * 20 * 16 * 64, 2 * 2 * 20 * 10 * 16
    assert counted["self_attn"].dense_flops == projections + products
    assert counted["linear1"].dense_flops == 2 * 20 * 16 * 32


def test_a_table_costs_nothing_dense_and_something_compact():
    counted = by_path(nn.Sequential(nn.Embedding(1000, 16)), rf.TTM(4), torch.arange(20))["0"]
    assert counted.dense_flops == 0 < counted.flops < 2 * 1000 * 16


FORMATS = [rf.CP, rf.Tucker, rf.TT, rf.TTM, rf.TR]


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("rows", [9, 33, 100, 129, 257, 2100])
def test_operations_are_those_of_the_way_that_is_shown(kind, rows):
    """What runs is chosen for a rounded number of rows; to the true number another way may seem the cheapest."""
    for rank in (2, 4, 8):
        layer = rf.nn.Linear(784, 512, format=kind(rank))
        layout, shapes = layer.weight.layout, shapes_of(layer.weight.factors)
        chosen = linear_way(layout, shapes, rounded(rows))
        counted = costs(nn.Linear(784, 512), kind(rank), batch_size=rows).layers[0]
        assert counted.way == chosen.described(layout)
        assert rows / rounded(rows) * chosen.flops <= counted.flops < chosen.flops


@pytest.mark.parametrize("kind", FORMATS)
def test_a_way_costs_what_it_was_chosen_by_where_nothing_is_rounded(kind):
    for rank, rows in ((2, 128), (4, 2048), (16, 128)):
        layer = rf.nn.Linear(784, 512, format=kind(rank))
        layout, shapes = layer.weight.layout, shapes_of(layer.weight.factors)
        assert rounded(rows) == rows
        assert layer.expected(rows).cost == linear_way(layout, shapes, rows).cost


def test_steps_are_counted_for_the_true_number_of_rows():
    """What multiplies the rows grows with them, and what joins factors alone does not."""
    layer = rf.nn.Linear(784, 512, format=rf.Tucker(4))
    layout, shapes = layer.weight.layout, shapes_of(layer.weight.factors)
    plan, sizes = linear_plan(layout, shapes, 100), layout.modes[1]
    assert rounded(100) == 112
    of = {rows: counted_in_steps(plan, ((rows, *sizes), *shapes)) for rows in (1, 100, 112)}
    assert of[112] == (plan.flops, plan.elements)
    for one, some, many in zip(*of.values(), strict=True):
        assert 111 * (some - one) == 99 * (many - one)


def test_a_bag_is_read_like_its_ids_and_widened_once():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.bags = nn.EmbeddingBag(100_000, 64, mode="sum")

        def forward(self, ids, offsets):
            return self.bags(ids, offsets=offsets)

    ids, offsets = torch.arange(300), torch.arange(0, 300, 30)
    few, all_ = by_path(Named(), rf.TT(4), ids, offsets), by_path(Named(), rf.TT(4), ids, torch.arange(300))
    rows = by_path(nn.Sequential(nn.Embedding(100_000, 64)), rf.TT(4), ids)["0"]
    assert few["bags"].way == rows.way == "the distinct rows of one half, times the other"
    assert few["bags"].seconds < all_["bags"].seconds == rows.seconds
    assert few["bags"].dense_seconds == all_["bags"].dense_seconds == rows.dense_seconds
    (same_size,) = by_path(nn.Sequential(nn.EmbeddingBag(100_000, 64)), rf.TT(4), ids.view(10, 30)).values()
    assert same_size.seconds == few["bags"].seconds


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_convolution_runs_in_the_way_that_is_shown(kind, dims, monkeypatch):
    made = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
    words = {
        (False, False): "by the formed kernel",
        (True, False): "by 1 x 1 convolutions before a small one",
        (False, True): "by 1 x 1 convolutions after a small one",
        (True, True): "by 1 x 1 convolutions before and after a small one",
    }
    ran, convolve_by = [], _convolve.convolve_by
    monkeypatch.setattr(_convolve, "convolve_by", lambda *a: (ran.append(a[4]), convolve_by(*a))[1])
    for channels, stride, batch in ((4, 1, 2), (64, 2, 3), (64, 1, 3)):
        net = nn.Sequential(made(channels, 64, 3, stride))
        x = torch.zeros(batch, channels, *[9] * dims)
        for inputs in (x, x[0]):
            counted = by_path(net, rf.Tucker(2) if kind is rf.Tucker else kind(4), inputs)["0"]
            assert counted.way == words[ran[-1]]
            assert counted.dense_seconds > 0
            # With the kernel formed all that the dense layer does is still to do.
            assert counted.seconds > (counted.dense_seconds if ran[-1] == (False, False) else 0)


def test_ways_stand_under_each_other():
    model = nn.Sequential(nn.Conv1d(32, 64, 3), nn.Flatten(), nn.Linear(64 * 8, 10))
    counted = costs(model, rf.Tucker(2), example=(torch.zeros(2, 32, 10),))
    (convolution, linear), ways = str(counted).splitlines()[-4:-2], [layer.way for layer in counted.layers]
    assert convolution.index(ways[0]) == linear.index(ways[1])


LAYERS = [
    (rf.nn.Linear(784, 512, format=rf.TT(8)), [torch.zeros(2, 64, 784)], "128 rows by two thin matrices in "),
    (rf.nn.Conv1d(64, 64, 3, format=rf.TT(4)), [torch.zeros(64, 16)], "16 points by 1 x 1 convolutions "),
    (rf.nn.Embedding(10_000, 64, format=rf.CP(4)), [torch.arange(300)], "300 ids by the distinct rows"),
    (
        rf.nn.EmbeddingBag(10_000, 64, format=rf.TTM(4)),
        [torch.arange(300), torch.tensor([0, 7])],
        "300 ids in 2 bags by the distinct rows",
    ),
]


@pytest.mark.parametrize(("layer", "inputs", "said"), LAYERS, ids=lambda value: type(value).__name__)
def test_print_says_how_the_last_call_was_made_and_in_what_time(layer, inputs, said):
    made = copy.deepcopy(layer)
    assert repr(made).endswith("})")
    made(*inputs)
    expected = made.expected(*made.seen)
    assert repr(made) == f"{repr(layer).removesuffix(')')}, {expected})"
    assert str(expected).startswith(said)
    assert str(expected).endswith(f"in {1e3 * expected.seconds:.2f} ms (dense {1e3 * expected.dense_seconds:.2f})")
    for bond in made.weight.ranks:
        made.weight.keep_slices_(bond, torch.tensor([0]))
    assert made.expected(*made.seen).cost < expected.cost


def test_a_few_ids_less_than_rounded_are_shown_all_the_same():
    """For 497 to 511 ids it is planned as for 512, of which ends of 256 rows are half."""
    table = rf.nn.Embedding(4096, 64, format=rf.TTM(16, out_modes=(16, 16, 16), in_modes=(4, 4, 4)))
    layout, shapes = table.weight.layout, shapes_of(table.weight.factors)
    compiled = library(torch.float32) is not None
    shown = {ids: table.expected(ids, ids) for ids in range(440, 520)}
    for ids, expected in shown.items():
        assert expected.way == _lookup.reading(layout, shapes, rounded(ids), rounded(ids), compiled).described()
        assert expected.cost > 0


def test_a_call_that_is_refused_is_not_shown():
    layer = rf.nn.Linear(12, 4, format=rf.TT(2))
    with pytest.raises(ValueError, match="in_features=12"):
        layer(torch.zeros(3, 5))
    assert layer.seen == ()


def test_the_model_and_torch_stay_as_they_were():
    model = nn.Sequential(nn.Linear(6, 4)).train()
    costs(model, rf.TT(2), example=(torch.zeros(2, 6),))
    assert type(model[0]) is nn.Linear
    assert model.training
    assert torch.backends.mha.get_fastpath_enabled()
    assert torch.backends.mkldnn.enabled


def test_refuses():
    with pytest.raises(ValueError, match="batch_size must be 1 row or more, got 0"):
        costs(nn.Linear(4, 4), rf.TT(2), batch_size=0)
    with pytest.raises(ValueError, match="Linear cannot run the example: RuntimeError"):
        costs(nn.Linear(4, 4), rf.TT(2), example=(torch.zeros(3, 5),))


@pytest.fixture
def benchmark_module(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    return importlib.import_module


ON_A_GPU = {"dense": 4.0, "dense, graph": 1.0, "rankfall": 2.0, "rankfall, graph": 0.5}


def test_a_graph_of_our_own_is_no_peer(benchmark_module, tmp_path):
    picture = benchmark_module("_speed_picture")
    assert picture._time(ON_A_GPU, None) is None
    assert picture._time(ON_A_GPU | {"tednet": 3.0, "TensorLy-Torch factorized": 5.0}, None) == 3.0
    picture.draw([{"case": "one", "ms": ON_A_GPU, "limit": 0.1}], "a machine", tmp_path / "speed.png")
    assert (tmp_path / "speed.png").stat().st_size > 1000


def test_peers_are_named_with_their_versions(benchmark_module, monkeypatch):
    speed, peers = benchmark_module("speed"), benchmark_module("_peers")
    monkeypatch.setattr(peers, "version", {"TensorLy-Torch": "0.5.0", "tednet": "0.1.3"}.__getitem__)
    theirs = {"TensorLy-Torch factorized": 3.0, "TensorLy-Torch reconstructed": 5.0, "tednet": 6.0}
    found = peers.versions(ON_A_GPU | theirs)
    assert found == {"TensorLy-Torch": "0.5.0", "tednet": "0.1.3"}
    case = {"case": "one", "what": "a step", "limit": 0.1, "ms": ON_A_GPU | theirs}
    assert speed._markdown([case | {"peers": found}]).startswith(
        "Peers: TensorLy-Torch 0.5.0, tednet 0.1.3.\n\n| case |"
    )
    assert speed._caption([case]).startswith("Peers: TensorLy-Torch of an unknown version, tednet of")
    assert speed._caption([case | {"ms": ON_A_GPU}]) == "Peers: none."
