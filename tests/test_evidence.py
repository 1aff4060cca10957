# SPDX-License-Identifier: Apache-2.0
"""The evidence test: what it cuts, what it leaves bit for bit, and what it refuses."""

import copy
import math
from functools import partial

import pytest
import torch
from torch import nn

import rankfall as rf
from rankfall import _cuts, _evidence, _losses

N, NOISE = 2000, 0.1


class Teacher:
    """y = relu(W x) + noise with W of a planted rank, and a student that starts above it."""

    def __init__(self, kind, true, start, posterior, size=16):
        torch.manual_seed(0)
        planted = rf.LowRankTensor((size, size), kind(true), posterior=rf.Point(), initial_std=math.sqrt(2 / size))
        self.x = torch.randn(N, size)
        clean = torch.relu(self.x @ planted.dense().detach().T)
        self.sigma = NOISE * float(clean.std())
        self.y = clean + self.sigma * torch.randn_like(clean)
        self.layer = rf.nn.Linear(size, size, bias=False, format=kind(start), posterior=posterior)
        self.optimizer = torch.optim.Adam(self.layer.parameters(), lr=2e-2)
        self.calls = 0

    def each(self, rows):
        error = (torch.relu(self.layer(self.x[rows])) - self.y[rows]) / self.sigma
        return 0.5 * error.square().sum(1)

    def nll(self):
        self.calls += 1
        return self.each(slice(1000))

    def train(self, epochs):
        self.layer.train()
        for _ in range(epochs):
            for rows in torch.randperm(N).split(100):
                loss = self.each(rows).mean() + rf.kl(self.layer) / N
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()

    def select(self, **options):
        return rf.select_ranks_(self.layer, self.optimizer, nll=self.nll, num_data=N, **options)


def fingerprint(model):
    return [
        (p, p.data_ptr(), p.detach().clone(), None if p.grad is None else p.grad.clone()) for p in model.parameters()
    ]


def assert_untouched(model, before):
    for p, (old, place, data, grad) in zip(model.parameters(), before, strict=True):
        assert p is old
        assert p.data_ptr() == place
        assert torch.equal(p, data)
        assert (p.grad is None) if grad is None else torch.equal(p.grad, grad)


@pytest.mark.parametrize(
    ("kind", "true", "start"), [(rf.TTM, 2, 6), (rf.TT, 2, 6), (rf.CP, 3, 8), (rf.Tucker, 2, 4)], ids=str
)
def test_the_planted_ranks_are_found(kind, true, start, posterior):
    # A start of 0.3 would be far too noisy a posterior here; the fixture's MeanField only says which kind.
    teacher = Teacher(kind, true, start, posterior if isinstance(posterior, rf.Point) else rf.MeanField())
    teacher.train(25)
    changes = []
    for lr in (1e-2, 5e-3, 2e-3, 2e-3):
        changes += teacher.select()
        # As the end of a schedule would: the noise of large steps holds slices up.
        teacher.optimizer.param_groups[0]["lr"] = lr
        teacher.train(5)
    changes += teacher.select()
    assert set(teacher.layer.weight.ranks.values()) == {true}
    assert all(change.nll_cost < change.saved for change in changes)
    assert all(change.after >= change.before / 2 for change in changes)
    for p in teacher.layer.parameters():
        assert teacher.optimizer.state[p]["exp_avg"].shape == p.shape


def test_a_change_says_what_the_data_loses_and_the_prior_gains():
    teacher = Teacher(rf.TTM, 2, 4, rf.Point())
    teacher.train(20)
    teacher.layer.eval()
    with torch.no_grad():
        before, entries = teacher.nll().double(), sum(p.numel() for p in teacher.layer.parameters())
    (change,) = teacher.select()
    with torch.no_grad():
        d = teacher.nll().double() - before
    assert (change.name, change.bond, change.before, change.after) == ("", "r1", 4, 2)
    removed = entries - sum(p.numel() for p in teacher.layer.parameters())
    assert change.saved == pytest.approx(0.5 * math.log(N) * removed + 0.5)  # A nat for the bond, of which half went.
    # The gauge step before the cut is done in float32, hence the tolerance. Half of the examples were asked.
    error = float(d.std()) / math.sqrt(len(d)) * math.sqrt(0.5)
    assert change.nll_cost == pytest.approx(N * (float(d.mean()) + 2 * error), rel=0.02, abs=0.5)


def test_saved_is_the_fall_of_the_kl_with_mean_field():
    teacher = Teacher(rf.TTM, 2, 4, rf.MeanField())
    teacher.train(20)
    rf.canonicalize_(teacher.layer, teacher.optimizer)
    before = float(rf.kl(teacher.layer).detach())
    changes = teacher.select(beta=0.5)
    # A second gauge step before the cut lowers the KL a little more.
    assert changes
    assert sum(c.saved for c in changes) == pytest.approx(
        0.5 * (before - float(rf.kl(teacher.layer).detach())), rel=0.05
    )


def test_slices_at_rest_at_the_prior_go_and_the_others_stay(kind):
    """They cost nothing and tell nothing; to turn them, or to refit the others to their loss, would cost."""
    torch.manual_seed(0)
    layer = rf.nn.Linear(12, 20, bias=False, format=kind(4), prior=rf.HalfCauchy(), posterior=rf.MeanField(1e-2))
    tensor = layer.weight
    bond = next(iter(tensor.ranks))
    with torch.no_grad():
        for mean, log_std in zip(tensor.factors, tensor.log_stds, strict=True):
            mean.normal_()
            log_std.fill_(math.log(1e-2))
        for k, dim in tensor.layout.places(bond):
            tensor.factors[k].movedim(dim, 0)[1:] *= 1e-5
            tensor.log_stds[k].movedim(dim, 0)[1:] = 0.0
    x = torch.randn(500, 12)
    target = layer.eval()(x).detach()

    def nll():
        return (10 * (layer(x) - target)).square().sum(1)

    for _ in range(3):
        rf.select_ranks_(layer, nll=nll, num_data=500)
    assert tensor.ranks[bond] == 1
    torch.testing.assert_close(layer(x), target, rtol=1e-2, atol=1e-2)


def weak_and_strong(nats):
    """A layer of rank 2 that knows its teacher, and NLL of 4,096 of a million examples; slice 2 is worth some nats."""
    count, num_data, random = 4096, 1_000_000, torch.Generator().manual_seed(0)
    layer = rf.nn.Linear(12, 20, bias=False, format=rf.TT(2, in_modes=(12,), out_modes=(20,)))
    u, v = (torch.linalg.qr(torch.randn(size, 2, generator=random)).Q for size in (20, 12))
    sizes = torch.tensor([1.0, math.sqrt(2 * nats / num_data)])
    stds = torch.tensor([1 / math.sqrt(num_data), 0.3])  # What the data leave of the first; the prior's of the second.
    with torch.no_grad():
        for means, log_stds, values in zip(
            layer.weight.factors, layer.weight.log_stds, (u * sizes.sqrt(), (v * sizes.sqrt()).T), strict=True
        ):
            means.copy_(values)
            log_stds.copy_(stds.log().expand(20, 2) if values.shape[0] == 20 else stds.log()[:, None].expand(2, 12))
    x = torch.randn(count, 12, generator=random)
    y = x @ layer.weight.dense().detach().T + torch.randn(count, 20, generator=random)
    return layer, lambda: (layer(x) - y).square().sum(1) / 2, num_data


@pytest.mark.parametrize(("nats", "rank"), [(0.1, 1), (5.0, 2)])
def test_weak_slices_are_weighed_by_few_of_many_examples(nats, rank, monkeypatch):
    layer, nll, num_data = weak_and_strong(nats)
    with monkeypatch.context() as patch:
        patch.setattr(_losses, "_MUCH_SHARPER", 0.0)
        assert rf.select_ranks_(layer, nll=nll, num_data=num_data) == []  # Lost in sampling error.
    found = rf.select_ranks_(layer, nll=nll, num_data=num_data)
    assert layer.weight.ranks == {"r1": rank}
    assert all(nats < change.nll_cost < change.saved for change in found)


@pytest.mark.parametrize(("cost", "rank"), [(0.9, 0), (1.1, 1)])
def test_a_whole_bond_has_to_be_worth_a_nat(cost, rank):
    layer = rf.nn.Linear(12, 8, bias=False, format=rf.TT(1, in_modes=(12,), out_modes=(8,)), posterior=rf.MeanField())
    saved = layer.weight.entry_kl()

    def nll():
        return torch.full((500,), 0.0 if layer.weight.ranks["r1"] else (saved + cost) / 500, dtype=torch.float64)

    layer.weight.align_ = lambda optimizer=None: None  # Whose price this is not about.
    rf.select_ranks_(layer, nll=nll, num_data=500)
    assert layer.weight.ranks == {"r1": rank}


def test_what_loses_nothing_stays_bit_for_bit(kind, posterior):
    torch.manual_seed(0)
    layer = rf.nn.Linear(12, 8, format=kind(2), posterior=posterior)
    layer(torch.randn(4, 12)).sum().backward()
    x = torch.randn(500, 12)
    target = (x @ layer.weight.dense().detach().T) * 1e4
    before = fingerprint(layer)
    layer.train()

    def nll():
        assert not layer.training
        assert not torch.is_grad_enabled()
        return (1e4 * layer(x) - target).square().sum(1) + 1

    assert rf.select_ranks_(layer, nll=nll, num_data=500) == []
    assert_untouched(layer, before)
    assert layer.training
    assert layer.weight.training


@pytest.mark.parametrize(("margin", "passes"), [(0.0, True), (299.0, True), (302.0, False)])
def test_the_best_rank_is_taken_not_the_smallest_that_passes(margin, passes):
    """A slice that is worth keeping does not go on the account of worthless ones; the margin decides if any goes."""
    gains = {7: 100.0, 6: 200.0, 5: 300.0, 4: 50.0, 3: -900.0}  # By the rank that is left of 8.
    tensor = rf.LowRankTensor((16, 16), rf.TTM(8), posterior=rf.Point())
    data, entries = 2 * N, 2 * 16
    saved = {rank: 0.5 * math.log(data) * entries * (8 - rank) for rank in gains}

    def nll():
        rank = tensor.ranks["r1"]
        if rank == 8:
            return torch.zeros(N)
        spread = margin * math.sqrt((N - 1) / 2) / (2.0 * N) * torch.ones(N).where(torch.arange(N) % 2 == 0, -1)
        return (saved[rank] - gains[rank]) / data + spread

    criterion = _cuts.Criterion([nll], data, beta=1.0, z=2.0, agree=list, memo=_evidence.Memo(tensor))
    at = _cuts._candidates(tensor, "r1", criterion, moved=True)
    best = _cuts._best_rank(at, 8, criterion, criterion.losses(), 3)
    expected = (5, saved[5] - 300.0, saved[5] - 300.0 + margin, saved[5] + 3 / 8)
    assert best[:4] == pytest.approx(expected, rel=1e-5)
    assert best.passes == passes
    assert tensor.ranks == {"r1": 8}


def test_few_evaluations_are_enough():
    teacher = Teacher(rf.TTM, 2, 10, rf.Point())
    teacher.train(15)
    for _ in range(3):
        teacher.calls = 0
        rank = teacher.layer.weight.ranks["r1"]
        teacher.select()
        # The base, its renewal after a cut, a single slice, and a bisection of half of the bond, two to each slope.
        assert teacher.calls <= 4 + 2 * math.log2(rank)


@pytest.mark.parametrize(("max_cut", "left"), [(0.5, 16), (1.0, 0)])
def test_slices_that_tell_nothing_go_by_three_evaluations(max_cut, left):
    layer = rf.nn.Linear(64, 64, bias=False, format=rf.TT(32, in_modes=(64,), out_modes=(64,)))
    calls = []

    def nll():
        calls.append(layer.weight.ranks["r1"])
        return torch.ones(500)

    rf.select_ranks_(layer, nll=nll, num_data=500, max_cut=max_cut)
    assert layer.weight.ranks == {"r1": left}
    assert calls == [32, 31, left], "as it is, without one slice, and without all that may go"


def search_by_batches(teacher, size):
    seen = []

    def of(rows):
        seen.append(len(rows))
        return teacher.each(rows)

    batches = [partial(of, rows) for rows in torch.arange(N).split(size)]
    options = {"num_data": N, "beta": 1.0, "z": 2.0, "max_cut": 0.5}
    return *_evidence.search_ranks_(teacher.layer, None, batches=batches, **options), sum(seen)


@pytest.mark.parametrize("posterior", [rf.Point(), rf.MeanField()], ids=["point", "mean-field"])
def test_batches_say_what_the_whole_says(posterior):
    results = []
    for size in (N, 128):
        teacher = Teacher(rf.TTM, 3, 8, posterior)
        teacher.train(15)
        asked = 0
        while True:
            cuts, misses, seen = search_by_batches(teacher, size)
            asked += seen
            if not cuts:
                break
        results.append((teacher.layer.weight.ranks, [(m.bond, m.after) for m in misses], asked))
    whole, batches = results
    assert whole[:2] == batches[:2]
    assert whole[0] == {"r1": 3}
    # Slices that the teacher has are missed badly and others not at all, which a part of the data shows.
    assert batches[2] < 0.7 * whole[2]


def test_decisions_go_by_the_numbers_agreed_on():
    """Another process that is told the same numbers decides alike, whatever its own are."""
    teacher = Teacher(rf.TTM, 2, 6, rf.Point())
    teacher.train(15)
    twin, told = copy.deepcopy(teacher.layer), []

    def tell(values):
        told.append(list(values))
        return values

    options = {"num_data": N, "beta": 1.0, "z": 2.0, "max_cut": 0.5}
    decided = _evidence.search_ranks_(teacher.layer, None, batches=[teacher.nll], agree=tell, **options)
    heard = iter(told)
    of_twin = _evidence.search_ranks_(
        twin, None, batches=[lambda: torch.rand(N)], agree=lambda _: next(heard), **options
    )
    assert of_twin == decided
    assert decided[0]
    assert next(heard, None) is None
    assert rf.ranks(twin) == rf.ranks(teacher.layer)


def test_at_most_the_given_part_of_a_bond_goes():
    teacher = Teacher(rf.TTM, 1, 8, rf.Point())
    teacher.train(15)
    (change,) = teacher.select(max_cut=0.25)
    assert (change.before, change.after) == (8, 6)


@pytest.mark.parametrize("posterior", [rf.Point(), rf.MeanField()], ids=["point", "mean-field"])
def test_a_bond_of_one_slice_goes_to_zero_if_it_carries_nothing(posterior):
    teacher = Teacher(rf.TTM, 1, 1, posterior)
    teacher.y = teacher.sigma * torch.randn_like(teacher.y)  # Nothing to learn but what relu makes of noise.
    teacher.train(15)
    (change,) = teacher.select()
    assert (change.before, change.after) == (1, 0)
    assert not bool(teacher.layer.weight.dense().any())


def test_a_wider_margin_cuts_less():
    found = []
    for z in (0.0, 1e4):
        teacher = Teacher(rf.TTM, 2, 6, rf.Point())
        teacher.train(15)
        teacher.select(z=z)
        found.append(teacher.layer.weight.ranks["r1"])
    assert found[0] < found[1] == 6


def test_a_failing_nll_leaves_the_model_as_it_was():
    teacher = Teacher(rf.TT, 2, 6, rf.MeanField())
    teacher.train(2)
    before = fingerprint(teacher.layer)

    def nll():
        values = teacher.nll()
        if teacher.calls > 2:
            raise RuntimeError("out of memory")
        return values

    with pytest.raises(RuntimeError, match="out of memory"):
        rf.select_ranks_(teacher.layer, teacher.optimizer, nll=nll, num_data=N)
    assert_untouched(teacher.layer, before)
    assert teacher.layer.training


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"num_data": 0}, r"num_data must be positive, got 0"),
        ({"beta": -1.0}, r"beta must be 0 or more, got -1.0"),
        ({"z": -1.0}, r"z must be 0 or more and max_cut above 0 and up to 1, got z=-1.0"),
        ({"max_cut": 0.0}, r"max_cut above 0 and up to 1, got z=2.0 and max_cut=0.0"),
        ({"max_cut": 1.5}, r"max_cut=1.5"),
        ({"nll": lambda: torch.tensor(1.0)}, r"of each example of one fixed batch.*got shape \(\).*reduction='none'"),
        ({"nll": lambda: 1.0}, r"got float"),
        ({"nll": lambda: torch.tensor([1.0])}, r"got shape \(1,\)"),
        ({"nll": lambda: torch.tensor([1.0, math.nan])}, r"NaN or infinity before any cut. Go back to a checkpoint"),
    ],
)
def test_refused(options, text):
    layer = rf.nn.Linear(12, 8, format=rf.TT(2))
    before = fingerprint(layer)
    with pytest.raises(ValueError, match=text):
        rf.select_ranks_(layer, **{"nll": lambda: torch.ones(3), "num_data": 10} | options)
    assert_untouched(layer, before)


def test_a_dense_model_has_no_ranks_to_select():
    with pytest.raises(ValueError, match=r"Linear has no low-rank tensor to select ranks of. Call rf.tensorize_"):
        rf.select_ranks_(nn.Linear(3, 3), nll=lambda: torch.ones(3), num_data=10)
