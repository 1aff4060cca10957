# SPDX-License-Identifier: Apache-2.0
"""Step sizes that fit factors."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import rankfall as rf
from rankfall._walk import low_rank_tensors

KINDS = [rf.CP, rf.Tucker, rf.TT, rf.TTM, rf.TR]


def by_name(groups):
    found = {}
    for group in groups:
        found.setdefault(group["name"], []).extend(group["params"])
    return found


def test_every_parameter_is_in_one_group(kind, posterior):
    model = nn.Sequential(rf.nn.Linear(12, 20, format=kind(4), posterior=posterior), nn.ReLU(), nn.Linear(20, 3))
    groups = rf.parameter_groups(model, lr=1e-3)
    ids = [id(p) for group in groups for p in group["params"]]
    assert sorted(ids) == sorted(id(p) for p in model.parameters())
    named = by_name(groups)
    assert {id(p) for p in named["factors"]} == {id(p) for p in model[0].weight.factors}
    assert {id(p) for p in named.get("log stds", [])} == {id(p) for p in model[0].weight.log_stds}
    assert {id(p) for p in named["other"]} == {id(model[0].bias), *(id(p) for p in model[2].parameters())}
    assert all(group["lr"] == 1e-3 for group in groups if group["name"] == "other")
    torch.optim.Adam(groups)


@pytest.mark.parametrize("layer", [nn.LSTM(32, 32), nn.GRU(32, 32), nn.Embedding(99, 32), nn.EmbeddingBag(99, 32)])
def test_recurrent_layers_and_tables_change_by_a_sixth_of_what_others_do(layer):
    model = rf.tensorize_(nn.Sequential(layer, nn.Linear(32, 32)), rf.TT(3), posterior=rf.Point())
    gentle = {id(f) for _, tensor in low_rank_tensors(model[0]) for f in tensor.factors}
    for _, tensor in low_rank_tensors(model):
        (step,) = {g["lr"] for g in rf.parameter_groups(model, 1e-3) for p in g["params"] if p is tensor.factors[0]}
        relative = step * math.sqrt(sum(1 / float(f.detach().square().mean()) for f in tensor.factors))
        assert relative == pytest.approx(0.02 if id(tensor.factors[0]) in gentle else 0.12, rel=0.06)


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    rank=st.integers(1, 12),
    modes=st.lists(st.integers(3, 6), min_size=2, max_size=4),
    seed=st.integers(0, 99),
)
def test_a_step_of_any_format_order_and_rank_changes_the_weight_alike(kind, rank, modes, seed):
    """Law: independent steps of the size of the learning rate change the weight by 120 * lr of its norm."""
    torch.manual_seed(seed)
    held = kind(rank, out_modes=modes, in_modes=modes)
    size = math.prod(modes)
    tensor = rf.LowRankTensor((size, size), held, posterior=rf.Point(), dtype=torch.float64)
    (group,) = rf.parameter_groups(tensor, lr=1e-5)
    before, changes = tensor.dense().detach(), []
    start = [f.detach().clone() for f in tensor.factors]
    for _ in range(20):
        with torch.no_grad():
            for f, s in zip(tensor.factors, start, strict=True):
                f.copy_(s + group["lr"] * torch.randn_like(s).sign())
        changes.append(float((tensor.dense() - before).detach().square().sum()))
    relative = math.sqrt(sum(changes) / len(changes)) / float(before.norm())
    # Tiny tensors scatter: with a few entries in a factor their sizes are not what they are on average.
    assert 0.4 * 120e-5 < relative < 2.5 * 120e-5


def test_unequal_factors_are_counted_each_with_its_own_size():
    tensor = rf.LowRankTensor((12, 20), rf.TTM(3), posterior=rf.Point())
    with torch.no_grad():
        for value, factor in zip((1.0, 0.1), tensor.factors, strict=True):
            factor.fill_(value)
    (group,) = rf.parameter_groups(tensor, lr=1e-3)
    assert group["lr"] == pytest.approx(0.12 / math.sqrt(1 + 100), rel=0.05)


def test_one_step_size_for_all_factors_on_request():
    model = nn.Sequential(rf.nn.Linear(12, 20, format=rf.TTM(4)), rf.nn.Linear(20, 300, format=rf.CP(9)))
    default = [g for g in rf.parameter_groups(model, lr=1e-3) if g["name"] == "factors"]
    assert len({g["lr"] for g in default}) == 2
    (group,) = (g for g in rf.parameter_groups(model, lr=1e-3, factor_lr=0.03) if g["name"] == "factors")
    assert group["lr"] == 0.03


def test_modules_by_their_paths_change_by_what_they_are_given():
    def relative(model, tensor, **options):
        (step,) = {g["lr"] for g in rf.parameter_groups(model, 1e-3, **options) for p in g["params"] if p is tensor}
        weight = next(t for _, t in low_rank_tensors(model) if any(f is tensor for f in t.factors))
        return step * math.sqrt(sum(1 / float(f.detach().square().mean()) for f in weight.factors))

    tables = nn.ModuleList([rf.nn.Embedding(50, 12, format=rf.TTM(3)) for _ in range(2)])
    model = nn.ModuleDict({"tables": tables, "top": rf.nn.Linear(12, 20, format=rf.TT(3))})
    first, second, top = (m.weight.factors[0] for m in (*tables, model["top"]))
    changes = {"tables": 120.0, "tables.1": 60.0}
    for tensor, usual, changed in ((first, 0.02, 0.12), (second, 0.02, 0.06), (top, 0.12, 0.12)):
        assert relative(model, tensor) == pytest.approx(usual, rel=0.06)
        assert relative(model, tensor, changes=changes) == pytest.approx(changed, rel=0.06)


def test_changes_must_be_positive_and_for_modules_that_are_there():
    with pytest.raises(ValueError, match=r"changes: Linear has no module 'top'. Pass a path of named_modules\(\)"):
        rf.parameter_groups(nn.Linear(3, 4), lr=1e-3, changes={"top": 120.0})
    with pytest.raises(ValueError, match=r"changes: that of '' must be positive, got 0.0. 120 is the usual one"):
        rf.parameter_groups(nn.Linear(3, 4), lr=1e-3, changes={"": 0.0})


def test_a_dense_model_has_one_group():
    (group,) = rf.parameter_groups(nn.Linear(3, 4), lr=2e-3)
    assert (group["name"], group["lr"], len(group["params"])) == ("other", 2e-3, 2)


def test_a_tensor_of_zeros_still_gets_a_step_size(kind):
    tensor = rf.LowRankTensor((12, 20), kind(3), posterior=rf.Point())
    for bond in tensor.ranks:
        tensor.keep_slices_(bond, torch.tensor([], dtype=torch.int64))
    assert all(0 < g["lr"] < 1 for g in rf.parameter_groups(tensor, lr=1e-3))


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_step_sizes_must_be_positive(value):
    with pytest.raises(ValueError, match=r"lr must be positive, got .*Pass for example lr=1e-3"):
        rf.parameter_groups(nn.Linear(3, 4), lr=value)
    with pytest.raises(ValueError, match=r"factor_lr must be positive"):
        rf.parameter_groups(nn.Linear(3, 4), lr=1e-3, factor_lr=value)
