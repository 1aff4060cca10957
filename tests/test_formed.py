# SPDX-License-Identifier: Apache-2.0
"""Layers of several weights, some of which torch computes from other parameters."""

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import rankfall as rf

COMPUTED = {
    "out_proj by weight_norm": (lambda: nn.MultiheadAttention(8, 2), "out_proj", "weight", nn.utils.weight_norm),
    "out_proj by spectral_norm": (lambda: nn.MultiheadAttention(8, 2), "out_proj", "weight", nn.utils.spectral_norm),
    "out_proj parametrized": (
        lambda: nn.MultiheadAttention(8, 2),
        "out_proj",
        "weight",
        nn.utils.parametrizations.weight_norm,
    ),
    "stacked": (lambda: nn.MultiheadAttention(8, 2), "", "in_proj_weight", prune.identity),
    "apart": (lambda: nn.MultiheadAttention(8, 2, kdim=4, vdim=6), "", "k_proj_weight", prune.identity),
    "LSTM": (lambda: nn.LSTM(8, 6), "", "weight_hh_l0", nn.utils.weight_norm),
    "GRU": (lambda: nn.GRU(8, 6, bidirectional=True), "", "weight_ih_l0_reverse", prune.identity),
}


@pytest.mark.parametrize("from_dense", [True, False])
@pytest.mark.parametrize("name", COMPUTED)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_weights_of_a_layer_with_several_are_refused_alike(name, from_dense):
    make, path, leaf, change = COMPUTED[name]
    model = nn.Sequential(make(), nn.Linear(8, 8))
    change(model[0].get_submodule(path), leaf)
    before = list(model.named_parameters())
    with pytest.raises(ValueError, match=rf"'0': computes its {leaf} from other parameters \(.*Undo that first"):
        rf.tensorize_(model, rf.TT(3), from_dense=from_dense)
    assert [(name, id(p)) for name, p in model.named_parameters()] == [(name, id(p)) for name, p in before]
    assert type(model[0]).__module__.startswith("torch.nn")


@pytest.mark.parametrize(
    ("make", "path", "leaf"),
    [
        (lambda: nn.MultiheadAttention(8, 2), "out_proj", "bias"),
        (lambda: nn.MultiheadAttention(8, 2), "", "in_proj_bias"),
        (lambda: nn.GRU(8, 6), "", "bias_hh_l0"),
    ],
)
def test_a_bias_computed_from_others_is_refused(make, path, leaf):
    model = nn.Sequential(make())
    prune.identity(model[0].get_submodule(path), leaf)
    before = list(model.named_parameters())
    text = rf"'0': computes a bias from other parameters \(.*{leaf}_orig\)\. Undo that first.*prune\.remove, or leave"
    with pytest.raises(ValueError, match=text):
        rf.tensorize_(model, rf.TT(3))
    assert [(name, id(p)) for name, p in model.named_parameters()] == [(name, id(p)) for name, p in before]
    assert type(model[0]).__module__.startswith("torch.nn")


def test_one_bias_without_the_other_is_kept():
    dense = nn.MultiheadAttention(8, 2)
    nn.init.ones_(dense.out_proj.bias)
    dense.in_proj_bias = None
    layer, x = rf.nn.MultiheadAttention.from_dense(dense, format=rf.TT(100), posterior=rf.Point()), torch.randn(3, 4, 8)
    torch.testing.assert_close(layer(x, x, x)[0], dense(x, x, x)[0], rtol=1e-4, atol=1e-5)
