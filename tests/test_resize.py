# SPDX-License-Identifier: Apache-2.0
import copy

import pytest
import torch
from torch import nn

from rankfall._resize import keep_, resize_

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
