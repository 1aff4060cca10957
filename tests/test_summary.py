# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch import nn

import rankfall as rf


def model_of(kind, posterior=None):
    torch.manual_seed(0)
    return nn.Sequential(
        rf.nn.Linear(12, 20, format=kind(3), posterior=posterior), nn.BatchNorm1d(20), nn.Linear(20, 13)
    )


def test_counts_are_sums_of_numel(kind, posterior):
    model = model_of(kind, posterior)
    counts = rf.summary(model)
    factors = sum(f.numel() for f in model[0].weight.factors)
    rest = 20 + 40 + 20 * 13 + 13
    assert counts.parameters == factors + rest
    assert counts.trained_parameters == sum(p.numel() for p in model.parameters())
    assert counts.trained_parameters - counts.parameters == sum(s.numel() for s in model[0].weight.log_stds)
    assert counts.dense_parameters == 240 + rest
    assert counts.compression == pytest.approx(counts.dense_parameters / counts.parameters)
    (layer,) = counts.layers
    assert (layer.path, layer.format, layer.shape) == ("0", kind.__name__, (20, 12))
    assert (layer.parameters, layer.dense_parameters) == (factors, 240)
    assert layer.compression == pytest.approx(240 / factors)
    assert layer.ranks == model[0].weight.ranks
    assert layer.padding == 0


def test_counts_are_those_after_the_cut():
    model = model_of(rf.TTM)
    before = rf.summary(model)
    shape = model[0].weight.factors[0].shape, model[0].weight.factors[1].shape
    model[0].weight.keep_slices_("r1", torch.tensor([0]))
    cut = (shape[0].numel() + shape[1].numel()) // 3 * 2
    assert rf.summary(model).parameters == before.parameters - cut
    assert rf.summary(model).dense_parameters == before.dense_parameters


def test_rank_zero_is_counted():
    layer = rf.nn.Linear(12, 20, bias=False, format=rf.CP(2))
    layer.weight.keep_slices_("r", torch.empty(0, dtype=torch.int64))
    counts = rf.summary(layer)
    assert counts.parameters == 0
    assert counts.compression == float("inf")
    root, _, _, whole = [line for line in str(counts).splitlines()[2:] if line]
    assert root.startswith("(root)")
    assert all(line.split()[-4:] == ["0", "240", "all", "zeros"] for line in (root, whole))


def test_padding_is_reported():
    layer = rf.nn.Linear(13, 20, format=rf.TT(3, out_modes=(4, 5)))
    (counted,) = rf.summary(layer).layers
    padded = counted.modes[1][0] * counted.modes[1][1]
    assert padded > 13
    assert counted.padding == pytest.approx(padded / 13 - 1)
    assert counted.dense_parameters == 13 * 20
    expected = f"the layer is padded: modes make 20 x {padded}, {padded / 13 - 1:.1%} more entries than 20 x 13."
    assert expected in str(rf.summary(layer))


def test_a_dense_model_is_counted_too():
    counts = rf.summary(nn.Linear(4, 3))
    assert (counts.parameters, counts.dense_parameters, counts.layers, counts.compression) == (15, 15, (), 1.0)


def test_shared_parameters_count_once():
    weight = rf.LowRankTensor((12, 12), rf.TTM(3))
    model = nn.Sequential(rf.nn.Linear.around(weight), rf.nn.Linear.around(weight))
    counts = rf.summary(model)
    assert counts.parameters == sum(f.numel() for f in weight.factors)
    assert counts.dense_parameters == 144


def test_printed_it_is_a_table():
    model = nn.Sequential(rf.nn.Linear(13, 20, format=rf.TT(2)), nn.Linear(20, 1000))
    lines = str(rf.summary(model)).splitlines()
    assert lines[0].split() == ["layer", "format", "shape", "modes", "ranks", "parameters", "dense", "compression"]
    assert set(lines[1]) == {"-", " "}
    assert lines[2].startswith("0 ")
    assert "20 x 13" in lines[2]
    assert lines[3].startswith("everything else")
    assert "21,020" in lines[3]
    assert lines[5].startswith("whole model")
    assert lines[5].endswith("x")
    assert lines[6].startswith("0 is padded")
    ends = {len(line) for line in (lines[0], lines[1], lines[2], lines[5])}
    assert len(ends) == 1
