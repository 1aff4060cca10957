# SPDX-License-Identifier: Apache-2.0
import copy
from functools import partial

import pytest
import torch
from torch import nn

import rankfall as rf
from rankfall._resize import forget_, grow_, keep_, resize_

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.9, centered=True),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.1),
}
ENTRIES = {"sgd": 0, "momentum": 1, "adam": 2, "adamw": 2, "amsgrad": 3, "adagrad": 1, "rmsprop": 3, "nadam": 2}


def step(parameter, optimizer, target):
    optimizer.zero_grad()
    (parameter - target).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_is_cut_and_training_goes_on_as_if_the_rest_had_never_been(name):
    """Entries train independently here, so a run on the kept entries alone is the reference."""
    index = torch.tensor([3, 0])
    whole = nn.Parameter(torch.randn(3, 4, 2))
    target = torch.randn(3, 4, 2)
    alone = nn.Parameter(whole.detach()[:, index].clone())
    optimizer, reference = OPTIMIZERS[name]([whole]), OPTIMIZERS[name]([alone])
    for _ in range(3):
        step(whole, optimizer, target)
        step(alone, reference, target[:, index])
    before = copy.deepcopy(dict(optimizer.state[whole]))
    identity = id(whole)
    keep_(whole, 1, index, optimizer)
    assert id(whole) == identity == id(optimizer.param_groups[0]["params"][0])
    assert torch.equal(whole, alone)
    assert torch.equal(whole.grad, alone.grad)
    shaped = [k for k, v in before.items() if isinstance(v, torch.Tensor) and v.shape == (3, 4, 2)]
    assert len(shaped) == ENTRIES[name]
    for key, value in optimizer.state[whole].items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, before[key][:, index] if key in shaped else before[key])
    for _ in range(3):
        step(whole, optimizer, target[:, index])
        step(alone, reference, target[:, index])
    torch.testing.assert_close(whole, alone)


def test_memory_of_the_removed_entries_is_given_back():
    p = nn.Parameter(torch.randn(8, 100))
    optimizer = torch.optim.Adam([p])
    step(p, optimizer, torch.zeros(8, 100))
    keep_(p, 1, torch.arange(3), optimizer)
    for t in (p.data, p.grad, *(v for v in optimizer.state[p].values() if v.dim())):
        assert t.untyped_storage().nbytes() == 4 * 8 * 3


def test_nothing_may_be_kept():
    p = nn.Parameter(torch.randn(4, 3))
    keep_(p, 0, torch.empty(0, dtype=torch.int64))
    assert p.shape == (0, 3)


def test_without_gradient_state_or_ownership():
    p, other = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(4, 3))
    optimizer = torch.optim.Adam([other])
    step(other, optimizer, 0)
    keep_(p, 0, torch.tensor([1]), optimizer)
    assert p.shape == (1, 3)
    assert p.grad is None
    assert p not in optimizer.state
    assert optimizer.state[other]["exp_avg"].shape == (4, 3)


def test_frozen_parameter_stays_frozen():
    p = nn.Parameter(torch.randn(4, 3), requires_grad=False)
    keep_(p, 0, torch.tensor([1, 2]))
    assert p.shape == (2, 3)
    assert not p.requires_grad


def test_resize_drops_the_gradient_only_if_the_shape_changes():
    p = nn.Parameter(torch.ones(2, 3))
    p.grad = torch.ones(2, 3)
    resize_(p, (2, 3))
    assert p.grad is not None
    assert torch.equal(p, torch.ones(2, 3))
    resize_(p, (2, 5))
    assert p.shape == (2, 5)
    assert p.grad is None


DENSE = [c for c in vars(torch.optim).values() if isinstance(c, type) and c is not torch.optim.SparseAdam]
DENSE = sorted(set(DENSE) - {torch.optim.Optimizer}, key=lambda c: c.__name__)


def loss_of(t):
    return (t.dense() - 1).square().mean() + sum(s.square().mean() for s in t.log_stds)


def next_step(t, optimizer):
    def closure():
        optimizer.zero_grad()
        loss = loss_of(t)
        loss.backward()
        return loss

    optimizer.step(closure)


CHANGES = {
    "cut": lambda t, bond, optimizer: t.keep_slices_(bond, torch.tensor([2, 0]), optimizer),
    "cut to one": lambda t, bond, optimizer: t.keep_slices_(bond, torch.tensor([1]), optimizer),
    "grown": lambda t, bond, optimizer: t.grow_slices_(bond, 2, optimizer),
    "turned": lambda t, _, optimizer: t.canonicalize_(optimizer),
    "refitted": lambda t, bond, optimizer: t.refit_(bond, torch.tensor([0, 1]), optimizer),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("format", [rf.CP(3), rf.TT(3)], ids=lambda f: type(f).__name__)
@pytest.mark.parametrize("kind", DENSE, ids=lambda c: c.__name__)
def test_every_optimizer_steps_after_a_change(kind, format, change):
    if kind is torch.optim.Muon and not isinstance(format, rf.CP):
        pytest.skip("Muon takes matrices alone.")
    t = rf.LowRankTensor((12, 20), format)
    optimizer = kind(t.parameters(), lr=1e-3)
    next_step(t, optimizer)
    for bond in t.ranks:
        CHANGES[change](t, bond, optimizer)
    next_step(t, optimizer)
    CHANGES["grown"](t, next(iter(t.ranks)), optimizer)
    next_step(t, optimizer)
    assert all(bool(p.isfinite().all()) for p in t.parameters())


@pytest.mark.parametrize("kind", [torch.optim.LBFGS, torch.optim.Adafactor], ids=lambda c: c.__name__)
def test_pruning_a_model_leaves_an_optimizer_that_steps(kind):
    model = nn.Sequential(nn.Linear(12, 20), rf.nn.Linear(20, 12, format=rf.TT(4)))
    optimizer = kind(model.parameters(), lr=1e-3)
    x = torch.randn(8, 12)

    def closure():
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    before = model[1].weight.ranks
    rf.prune_(model, optimizer, threshold=0.999)
    assert model[1].weight.ranks != before
    optimizer.step(closure)


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_the_means_of_adafactor_are_cut_along_what_they_are_not_over(dim):
    p, index = nn.Parameter(torch.randn(3, 4, 5)), torch.tensor([2, 0])
    optimizer = torch.optim.Adafactor([p])
    step(p, optimizer, torch.randn(3, 4, 5))
    rows, columns = (optimizer.state[p][name].clone() for name in ("row_var", "col_var"))
    assert (rows.shape, columns.shape) == ((3, 4, 1), (3, 1, 5))
    keep_(p, dim, index, optimizer)
    assert torch.equal(optimizer.state[p]["row_var"], rows if dim == 2 else rows.index_select(dim, index))
    assert torch.equal(optimizer.state[p]["col_var"], columns if dim == 1 else columns.index_select(dim, index))


def test_a_single_slice_is_not_taken_for_a_mean():
    """With one column the means over columns have the parameter's shape, and stay one number a row all the same."""
    p = nn.Parameter(torch.randn(3, 1))
    optimizer = torch.optim.Adafactor([p])
    step(p, optimizer, torch.randn(3, 1))
    grow_(p, 1, torch.randn(3, 2), optimizer)
    assert optimizer.state[p]["row_var"].shape == (3, 1)
    assert optimizer.state[p]["col_var"].shape == (1, 3)
    forget_(p, optimizer)
    assert len(optimizer.state[p]["row_var"].unique()) == 1
    step(p, optimizer, torch.randn(3, 3))


@pytest.mark.parametrize(
    "change",
    [partial(keep_, dim=0, index=torch.tensor([0, 2])), partial(grow_, dim=0, values=torch.ones(1, 2)), forget_],
    ids=["cut", "grown", "mixed"],
)
def test_lbfgs_starts_anew(change):
    """After a change of any of its parameters it steps as one that was made then."""
    first, second, strange = (nn.Parameter(torch.randn(4, 2)) for _ in range(3))
    optimizer = torch.optim.LBFGS([first, second], lr=0.1, max_iter=3)

    def closure(parameters, optimizer):
        optimizer.zero_grad()
        loss = sum((p - 1).square().square().sum() for p in parameters)
        loss.backward()
        return loss

    optimizer.step(partial(closure, [first, second], optimizer))
    change(parameter=strange, optimizer=optimizer)
    assert optimizer.state[first]["n_iter"] > 1
    change(parameter=second, optimizer=optimizer)
    fresh = [nn.Parameter(p.detach().clone()) for p in (first, second)]
    other = torch.optim.LBFGS(fresh, lr=0.1, max_iter=3)
    optimizer.step(partial(closure, [first, second], optimizer))
    other.step(partial(closure, fresh, other))
    assert torch.equal(first, fresh[0])
    assert torch.equal(second, fresh[1])
