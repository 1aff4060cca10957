# SPDX-License-Identifier: Apache-2.0
"""Weights that the evidence test leaves nothing of."""

import math

import torch

import rankfall as rf


def test_a_weight_that_carries_nothing_goes_to_rank_zero(kind):
    torch.manual_seed(0)
    layer = rf.nn.Linear(12, 8, format=kind(2), posterior=rf.Point())
    x = torch.randn(500, 12)

    def nll():
        return 0.5 * (1e-3 * layer(x)).square().sum(1)

    for _ in range(6):
        rf.select_ranks_(layer, nll=nll, num_data=500, max_cut=1.0)
    assert not any(layer.weight.ranks.values())
    assert bool((layer.weight.dense() == 0).all())
    assert math.isfinite(float(rf.kl(layer).detach()))
    torch.testing.assert_close(layer(x), layer.bias.expand(500, 8))
    layer(x).sum().backward()


def test_a_weight_that_is_zero_goes_as_a_whole_and_no_example_is_asked():
    torch.manual_seed(0)
    layer = rf.nn.Linear(12, 8, bias=False, format=rf.TT(3, in_modes=(3, 4), out_modes=(2, 4)))
    layer.weight.keep_slices_("r2", torch.tensor([], dtype=torch.int64))
    x, asked = torch.randn(500, 12), []

    def nll():
        asked.append(1)
        return layer(x).square().sum(1)

    changes = rf.select_ranks_(layer, nll=nll, num_data=500, max_cut=0.25)
    assert [(c.bond, c.after, c.nll_cost) for c in changes] == [("r1", 0, 0.0), ("r3", 0, 0.0)]
    assert all(c.saved > 0 for c in changes)
    assert len(asked) == 1  # Of the model as it was.
