# SPDX-License-Identifier: Apache-2.0
"""What `rankfall plan` counts, against sums done by hand."""

import pytest
import torch
from torch import nn

import rankfall as rf
from rankfall._costs import costs


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
