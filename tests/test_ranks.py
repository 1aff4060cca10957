# SPDX-License-Identifier: Apache-2.0
import copy

import pytest
import torch
from torch import nn

import laws
import rankfall as rf


def faint(layer, bond, index, size):
    """Scales one slice of a bond down, in every factor that bears it, stds included."""
    t = layer.weight
    with torch.no_grad():
        for k, dim in t.layout.places(bond):
            t.factors[k].select(dim, index).mul_(size)
            if len(t.log_stds):
                t.log_stds[k].select(dim, index).add_(torch.tensor(size).log())


def test_ranks_are_by_layer_and_root_has_no_name():
    layer = rf.nn.Linear(12, 20, format=rf.CP(3))
    assert rf.ranks(layer) == {"": {"r": 3}}
    model = nn.Sequential(layer, nn.ReLU(), nn.ModuleDict({"head": rf.nn.Linear(20, 6, format=rf.CP(2))}))
    assert rf.ranks(model) == {"0": {"r": 3}, "2.head": {"r": 2}}
    assert rf.ranks(nn.Linear(2, 2)) == {}


def test_ranks_name_a_lone_tensor_by_its_whole_path():
    model = nn.Module()
    model.weight = rf.LowRankTensor((4, 6), rf.CP(2))
    model.low_rank_weight = rf.LowRankTensor((4, 6), rf.CP(2))
    assert sorted(rf.ranks(model)) == ["", "low_rank_weight"]


def test_prune_removes_faint_slices_and_nothing_else(kind, prior, posterior):
    layer = rf.nn.Linear(12, 20, format=kind(3), prior=prior, posterior=posterior, dtype=torch.float64).eval()
    before, expected = layer.weight.ranks, dict(layer.weight.ranks)
    for bond, rank in before.items():
        if rank > 1:
            faint(layer, bond, 1, 1e-4)
            expected[bond] = rank - 1
    t = layer.weight
    keep = {bond: [j for j in range(rank) if rank == 1 or j != 1] for bond, rank in before.items()}
    smaller = list(t.factors)
    for bond, kept in keep.items():
        for k, dim in t.layout.places(bond):
            smaller[k] = smaller[k].detach().index_select(dim, torch.tensor(kept))
    dense = laws.naive_dense(t, smaller)
    assert rf.prune_(layer, threshold=1e-2) is layer
    assert t.ranks == expected != before
    laws.close(t.dense(), dense)


def test_a_slice_of_noise_alone_is_removed():
    """Its std keeps the prior scale up, but the compact model computes with the means."""
    layer = rf.nn.Linear(12, 20, format=rf.TTM(3), posterior=rf.MeanField(0.5))
    with torch.no_grad():
        for k, dim in layer.weight.layout.places("r1"):
            layer.weight.factors[k].select(dim, 1).mul_(1e-4)
    assert bool((layer.weight.prior_scales()["r1"] > 0.1 * layer.weight.prior_scales()["r1"].max()).all())
    rf.prune_(layer, threshold=0.1)
    assert layer.weight.ranks == {"r1": 2}


def test_a_slice_at_the_threshold_stays():
    layer = rf.nn.Linear(12, 20, format=rf.CP(2), prior=rf.LogUniform(), posterior=rf.Point())
    with torch.no_grad():
        for factor in layer.weight.factors:
            factor[:, 1] = factor[:, 0] / 2  # Exactly half the scale: powers of two are not rounded.
    assert rf.prune_(layer, threshold=0.5).weight.ranks == {"r": 2}
    assert rf.prune_(layer, threshold=0.501).weight.ranks == {"r": 1}


def test_prune_with_threshold_zero_removes_nothing(kind):
    layer = rf.nn.Linear(12, 20, format=kind(3))
    state = copy.deepcopy(layer.state_dict())
    rf.prune_(layer, threshold=0)
    assert all(torch.equal(value, state[key]) for key, value in layer.state_dict().items())


def test_prune_keeps_the_largest_slice_of_every_bond(kind, posterior):
    layer = rf.nn.Linear(12, 20, format=kind(4), posterior=posterior)
    for bond, rank in layer.weight.ranks.items():
        for j in range(rank):
            faint(layer, bond, j, 1.0 if j == rank - 1 else 1e-3)
    rf.prune_(layer, threshold=0.5)
    assert set(layer.weight.ranks.values()) == {1}
    assert bool(torch.isfinite(layer(torch.randn(2, 12))).all())


def test_prune_of_rank_zero_goes_on():
    model = nn.Sequential(rf.nn.Linear(12, 20, format=rf.TT(3)), rf.nn.Linear(20, 12, format=rf.TT(3)))
    model[0].weight.keep_slices_("r1", torch.empty(0, dtype=torch.int64))
    faint(model[1], "r1", 0, 1e-6)
    rf.prune_(model, threshold=0.1)
    assert model[0].weight.ranks["r1"] == 0
    assert model[1].weight.ranks["r1"] < 3


@pytest.mark.parametrize("kind_of_optimizer", [torch.optim.Adam, torch.optim.SGD], ids=["adam", "sgd"])
def test_training_goes_on_without_a_jump(kind_of_optimizer, posterior):
    layer = rf.nn.Linear(12, 20, format=rf.TTM(4), posterior=posterior)
    optimizer = kind_of_optimizer(layer.parameters(), lr=1e-2)
    x = torch.randn(256, 12)
    y = x @ torch.randn(12, 20)

    def loss():
        return (layer(x) - y).square().mean()

    def step():
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    for _ in range(50):
        step()
    faint(layer, "r1", 2, 1e-6)
    layer.eval()
    before = loss().item()
    layer.train()
    rf.prune_(layer, optimizer, threshold=1e-3)
    assert layer.weight.ranks == {"r1": 3}
    layer.eval()
    assert loss().item() == pytest.approx(before, rel=1e-5)
    layer.train()
    step()
    layer.eval()
    assert loss().item() < before * 1.05
    layer.train()
    for _ in range(100):
        step()
    layer.eval()
    assert loss().item() < before


def test_memory_after_a_cut_is_that_of_the_small_model(kind, posterior):
    """Parameter, gradient and Adam's two moments, four bytes each: nothing is left of what was cut."""
    layer = rf.nn.Linear(64, 64, bias=False, format=kind(6), posterior=posterior)
    optimizer = torch.optim.Adam(layer.parameters())
    layer(torch.randn(4, 64)).square().sum().backward()
    optimizer.step()
    for bond, rank in layer.weight.ranks.items():
        for j in range(1, rank):
            faint(layer, bond, j, 1e-5)
    rf.prune_(layer, optimizer, threshold=1e-2)
    trained = rf.summary(layer).trained_parameters
    assert trained == sum(p.numel() for p in layer.parameters())
    held = [t for p in layer.parameters() for t in (p.data, p.grad, *optimizer.state[p].values())]
    steps = sum(t.untyped_storage().nbytes() for t in held if t.dim() == 0)
    bytes_held = sum(t.untyped_storage().nbytes() for t in held) - steps
    assert steps == 4 * len(list(layer.parameters()))
    assert bytes_held <= 1.1 * 4 * 4 * trained


def test_tied_layers_are_pruned_once():
    weight = rf.LowRankTensor((12, 12), rf.TTM(3))
    model = nn.Sequential(rf.nn.Linear.around(weight), rf.nn.Linear.around(weight))
    faint(model[0], "r1", 0, 1e-6)
    rf.prune_(model, threshold=0.1)
    assert model[0].weight is model[1].weight
    assert rf.ranks(model) == {"0": {"r1": 2}}


@pytest.mark.parametrize("threshold", [-0.1, 1, 1.5, float("nan")])
def test_threshold_is_a_fraction(threshold):
    with pytest.raises(ValueError, match=rf"threshold must be from 0 up to but not including 1, got {threshold}"):
        rf.prune_(rf.nn.Linear(4, 6, format=rf.TT(2)), threshold=threshold)


def test_a_model_without_factors_is_refused():
    with pytest.raises(ValueError, match=r"Sequential has no low-rank tensor to prune. Call rf.tensorize_"):
        rf.prune_(nn.Sequential(nn.Linear(4, 4)), threshold=0.1)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_factors_that_are_not_finite_are_refused_and_stay(value):
    model = nn.Sequential(rf.nn.Linear(12, 20, format=rf.TT(3)), rf.nn.Linear(20, 12, format=rf.TT(3)))
    faint(model[0], "r1", 0, 1e-6)
    with torch.no_grad():
        model[1].weight.factors[0][0, 0] = value
    before = rf.ranks(model)
    with pytest.raises(ValueError, match=r"'1' has factors that are NaN or infinite. Go back to a checkpoint"):
        rf.prune_(model, threshold=0.1)
    assert rf.ranks(model) == before


def test_training_goes_on_while_the_last_loss_is_still_referred_to(kind, posterior):
    """Every training loop has such a variable: it keeps the graph of the step before the cut."""
    layer = rf.nn.Linear(12, 20, format=kind(3), posterior=posterior)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    x = torch.randn(6, 12)
    for cut in (None, 2, 1):
        if cut is not None:
            for bond in layer.weight.ranks:
                layer.weight.keep_slices_(bond, torch.arange(cut), optimizer)
        loss = layer(x).square().mean() + 1e-3 * rf.kl(layer)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad.shape == p.shape for p in layer.parameters())
        optimizer.step()


def test_loading_other_ranks_while_a_loss_is_still_referred_to(kind):
    layer, smaller = (rf.nn.Linear(12, 20, format=kind(rank)) for rank in (3, 2))
    x = torch.randn(6, 12)
    loss = layer(x).square().mean()
    loss.backward()
    layer.load_state_dict(smaller.state_dict())
    loss = layer(x).square().mean()
    loss.backward()
    assert layer.weight.factors[0].grad.shape == smaller.weight.factors[0].shape


def test_a_rank_above_its_start_does_not_grow():
    layer = rf.nn.Linear(64, 64, format=rf.TTM(4))
    layer.load_state_dict(rf.nn.Linear(64, 64, format=rf.TTM(8)).state_dict())
    before = rf.ranks(layer)
    assert rf.ranks(rf.grow_ranks_(layer)) == before
