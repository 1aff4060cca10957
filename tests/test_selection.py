# SPDX-License-Identifier: Apache-2.0
"""When a run changes its ranks: the rule alone, on made-up records, and in fit."""

import math

import pytest
import torch
from torch import nn

import rankfall as rf
from rankfall import _selection
from rankfall._evidence import RankChange

EPOCHS = 100


def next_step(history, epochs, first, can_grow=True):
    return _selection.next_step(history, epochs, first, can_grow)


def records(losses, events=None, ranks=None, error=1e-3, prices=None):
    """Records of a run; `events` are {epoch: selection}, `ranks` {epoch: rank from then on}."""
    rank, out = 8, []
    for epoch, (loss, price) in enumerate(zip(losses, prices or [1.0] * len(losses), strict=True)):
        record = {"nll": loss, "nll_error": error, "price": price, "ranks": {"0": {"r1": rank}}}
        record["selection"] = (events or {}).get(epoch, "wait")
        if record["selection"] in ("grow", "try"):
            record["from"] = {"0": {"r1": rank}}
        if record["selection"] == "try":
            record |= {"cuts": [{"name": "0", "bond": "r1"}]}
        rank = (ranks or {}).get(epoch, rank)
        record["ranks"] = {"0": {"r1": rank}}
        out.append(record)
    return out


def falling(count, pace):
    return [2.0 * math.exp(-pace * k) for k in range(count)]


def flat(count):
    return [2.0] + [0.5] * (count - 1)


def test_a_run_that_still_falls_fast_waits():
    assert next_step(records(falling(20, 0.1)), EPOCHS, 5) == "wait"


def test_a_settled_run_asks():
    assert next_step(records(flat(20)), EPOCHS, 5) == "ask"


def test_a_fall_within_the_noise_counts_as_settled():
    losses = [2.0, *(0.5 - 0.004 * k for k in range(20))]
    assert next_step(records(losses, error=1e-3), EPOCHS, 5) == "wait"
    assert next_step(records(losses, error=1e-2), EPOCHS, 5) == "ask"


def test_the_same_pace_counts_less_the_less_is_left():
    losses = [2.0, *(0.5 - 0.004 * k for k in range(20))]
    assert next_step(records(losses), EPOCHS, 5) == "wait"
    assert next_step(records(losses), 30, 5) == "ask"


@pytest.mark.parametrize(
    ("pace", "error", "epochs", "step"),
    [
        (0.02, 1e-3, EPOCHS, "wait"),  # 80 more epochs at this pace are more than half of the price.
        (0.02, 3e-2, EPOCHS, "ask"),  # Within the noise of the data.
        (0.02, 1e-3, 40, "ask"),  # 18 more epochs are less than half of the price.
        (0.001, 1e-3, EPOCHS, "ask"),
        (-0.02, 1e-3, EPOCHS, "ask"),
    ],
)
def test_a_price_that_still_falls_is_waited_for(pace, error, epochs, step):
    prices = [1.0 + pace * k for k in reversed(range(20))]
    assert next_step(records(flat(20), error=error, prices=prices), epochs, 5) == step


def test_the_bound_may_rest_while_a_price_is_paid_for_what_the_data_win():
    prices = [1.0 - 0.02 * k for k in range(20)]
    data = [2.0, *(0.5 + 0.02 * k for k in range(19))]
    assert next_step(records(data, prices=prices), EPOCHS, 5) == "ask"
    assert next_step(records(flat(20), prices=prices), EPOCHS, 5) == "wait"


def test_nothing_is_asked_before_the_kl_has_its_full_weight():
    assert next_step(records(flat(10)), EPOCHS, 20) == "wait"


def test_a_cut_is_followed_by_a_pause():
    assert next_step(records(flat(20), {18: "cut"}), EPOCHS, 5) == "wait"
    assert next_step(records(flat(20), {17: "cut"}), EPOCHS, 5) == "ask"


def test_the_pause_doubles_with_every_test_in_vain():
    vain = {10: "kept", 12: "kept"}
    ranks = {9: 8}
    assert next_step(records(flat(16), vain, ranks), EPOCHS, 5, can_grow=False) == "wait"
    assert next_step(records(flat(17), vain, ranks), EPOCHS, 5, can_grow=False) == "ask"
    vain |= {16: "kept"}
    assert next_step(records(flat(24), vain, ranks), EPOCHS, 5, can_grow=False) == "wait"
    assert next_step(records(flat(25), vain, ranks), EPOCHS, 5, can_grow=False) == "ask"


def test_nothing_changes_in_the_last_fifth():
    assert next_step(records(flat(81)), EPOCHS, 5) == "ask"
    for count in (82, 90, 100):
        assert next_step(records(flat(count)), EPOCHS, 5) == "wait"


def test_slices_come_back_when_nothing_more_is_cut():
    events = {10: "cut", 12: "kept"}
    assert next_step(records(flat(15), events, {10: 4}), EPOCHS, 5) == "grow"
    assert next_step(records(flat(15), events, {10: 4}), EPOCHS, 5, can_grow=False) == "ask"


def test_ranks_that_were_confirmed_are_not_grown_again():
    events = {10: "cut", 12: "kept", 14: "grow", 16: "cut", 18: "kept"}
    back = {10: 4, 14: 5, 16: 4}
    assert next_step(records(flat(21), events, back), EPOCHS, 5) == "ask"
    moved = {10: 4, 14: 6, 16: 5}
    assert next_step(records(flat(21), events, moved), EPOCHS, 5) == "grow"


def test_slices_that_came_back_are_judged_in_any_case():
    events = {70: "cut", 72: "kept", 79: "grow"}
    assert next_step(records(falling(81, 0.1), events, {70: 4, 79: 5}), EPOCHS, 5) == "ask"
    assert next_step(records(falling(81, 0.01), {70: "cut"}, {70: 4}), EPOCHS, 5) == "wait"


def test_a_trial_is_judged_after_four_settled_epochs():
    assert next_step(records(flat(19), {15: "try"}), EPOCHS, 5) == "wait"
    assert next_step(records(flat(20), {15: "try"}), EPOCHS, 5) == "judge"
    assert next_step(records(falling(20, 0.1), {15: "try"}), EPOCHS, 5) == "wait"


def test_a_trial_is_judged_in_any_case_before_the_rest():
    assert next_step(records(falling(81, 0.1), {79: "try"}), EPOCHS, 5) == "judge"


def tried(losses, before, now, at=10):
    """Records of a run with a trial at an epoch, and the price of the weights before and after it."""
    prices = [before] * (at + 1) + [now] * (len(losses) - at - 1)
    return records(losses, {at: "try"}, prices=prices)


@pytest.mark.parametrize(("rise", "paid"), [(0.0, True), (0.19, True), (0.21, False)])
def test_a_trial_has_paid_if_the_data_lost_less_than_the_prior_side_won(rise, paid):
    assert _selection.has_paid(tried([2.0] + [0.5] * 10 + [0.5 + rise] * 4, 1.0, 0.8)) == paid


def test_what_training_wins_anyhow_is_not_put_down_to_a_trial():
    losses = [2.0 - 0.1 * k for k in range(15)]  # As before, without a break.
    assert _selection.has_paid(tried(losses, 1.0, 0.999))
    assert not _selection.has_paid(tried(losses, 1.0, 1.0001))


def test_a_run_that_slows_down_by_itself_is_not_held_to_its_old_pace():
    assert _selection.has_paid(tried([2.0 - 0.1 * k for k in range(11)] + [1.0] * 4, 1.0, 0.999))


def test_the_last_trial_counts():
    history = records([0.5] * 6 + [0.9] * 10, {5: "try", 11: "try"}, prices=[1.0] * 12 + [0.999] * 4)
    assert _selection.has_paid(history)


def test_the_cheapest_cut_for_what_it_saves_is_tried_and_once_only():
    cheap = RankChange("0", "r1", 4, 3, nll_cost=150.0, saved=100.0)
    dear = RankChange("0", "r2", 4, 3, nll_cost=170.0, saved=100.0)
    hopeless = RankChange("0", "r3", 4, 3, nll_cost=201.0, saved=100.0)
    history = records(flat(20))
    assert _selection.trial(history, [hopeless, dear, cheap]) == cheap
    assert _selection.trial(history, [hopeless]) is None
    undone = records(flat(20), {10: "try", 14: "undo"}, {10: 7, 14: 8})
    assert _selection.trial(undone, [hopeless, dear, cheap]) == dear
    elsewhere = records(flat(20), {10: "try", 14: "undo", 16: "cut"}, {10: 7, 14: 8, 16: 6})
    assert _selection.trial(elsewhere, [hopeless, dear, cheap]) == cheap


@pytest.mark.parametrize(("events", "step"), [({}, "ask"), ({60: "cut"}, "wait")])
def test_a_run_that_does_not_come_to_rest_is_asked_once(events, step):
    losses = [2.0, *(1.5 - 0.01 * k for k in range(80))]  # Up to four fifths of the run.
    prices = [10.0 - 0.01 * k for k in range(81)]
    assert next_step(records(losses, events, prices=prices), EPOCHS, 5) == step
    assert next_step(records(losses[:-1], events, prices=prices[:-1]), EPOCHS, 5) == "wait"


@pytest.mark.parametrize(("limited", "step"), [(True, "ask"), (False, "wait")])
def test_what_a_limit_left_is_asked_about_at_the_last_test(limited, step):
    """Else a run that was cut by half on its last chance to come to rest would stay there."""
    losses = [2.0, *(1.5 - 0.01 * k for k in range(80))]
    history = records(losses, {78: "cut"}, {78: 4}, prices=[10.0 - 0.1 * k for k in range(81)])
    history[78]["limited"] = limited
    assert next_step(history, EPOCHS, 5) == step
    assert next_step(history[:-1], EPOCHS, 5) == "wait"
    history[79] |= {"selection": "cut", "limited": limited}  # No time for anything to be seen.
    assert next_step(history, EPOCHS, 5) == "wait"


@pytest.mark.parametrize(("first", "step"), [(5, "ask"), (6, "ask"), (7, "wait")])
def test_a_short_run_with_a_long_warm_up_is_asked_once(first, step):
    losses = [0.71, 0.66, 0.63, 0.62, 0.61, 0.6, 0.59, 0.57]  # Ten epochs; the whole KL comes in with the sixth or so.
    prices = [86.0, 56.0, 21.0, 6.2, 4.1, 3.1, 2.5, 2.2]
    assert next_step(records(losses, prices=prices), 10, first) == step
    assert next_step(records(losses[:-1], prices=prices[:-1]), 10, first) == "wait"


def test_a_run_that_has_most_to_learn_yet_is_not_asked():
    losses = [2.0] * 77 + [1.9, 1.8, 1.7, 1.6]
    assert next_step(records(losses), EPOCHS, 5) == "wait"


def test_a_run_too_short_to_settle_is_not_cut():
    for epochs in (1, 2, 3):
        for count in range(1, epochs + 1):
            assert next_step(records(falling(count, 0.1)), epochs, 0) == "wait"


N, SIZE = 1000, 16


class Teacher:
    def __init__(self, true=2, start=6, posterior=None, kind=rf.TTM):
        torch.manual_seed(0)
        planted = rf.LowRankTensor((SIZE, SIZE), kind(true), posterior=rf.Point(), initial_std=math.sqrt(2 / SIZE))
        x = torch.randn(N, SIZE)
        clean = torch.relu(x @ planted.dense().detach().T)
        self.sigma = 0.1 * float(clean.std())
        y = clean + self.sigma * torch.randn_like(clean)
        self.batches = list(zip(x.split(100), y.split(100), strict=True))
        self.model = nn.Sequential(
            rf.nn.Linear(SIZE, SIZE, bias=False, format=kind(start), posterior=posterior), nn.ReLU()
        )

    def nll(self, model, batch):
        return 0.5 * ((model(batch[0]) - batch[1]) / self.sigma).square().sum(1)

    def fit(self, **options):
        return rf.fit(self.model, self.batches, self.nll, num_data=N, progress=False, **{"epochs": 40} | options)


@pytest.mark.parametrize("posterior", [rf.Point(), rf.MeanField()], ids=["point", "mean-field"])
def test_fit_finds_planted_ranks_by_itself(kind, posterior):
    teacher = Teacher(posterior=posterior, kind=kind)
    history = teacher.fit()
    assert set(teacher.model[0].weight.ranks.values()) == {2}
    cuts = [cut for record in history for cut in record.get("cuts", [])]
    assert cuts
    assert all(cut["nll_cost"] < cut["saved"] and cut["after"] < cut["before"] for cut in cuts)
    assert {record["selection"] for record in history} >= {"wait", "cut", "kept"}


def test_a_bond_that_was_cut_too_far_gets_its_slice_back():
    teacher = Teacher(true=3, start=6)
    weight = teacher.model[0].weight
    weight.keep_slices_("r1", torch.tensor([0, 1]))
    history = teacher.fit(epochs=60)
    assert weight.ranks == {"r1": 3}
    assert any(record["selection"] == "grow" and record["from"]["0"]["r1"] == 2 for record in history)


@pytest.mark.parametrize("posterior", [rf.Point(), rf.MeanField()], ids=["point", "mean-field"])
def test_a_trial_that_costs_evidence_is_undone(posterior, monkeypatch):
    """Every slice that is left is tried, however dear; each comes back, and the planted ranks stay."""
    monkeypatch.setattr(_selection, "_HOPE", math.inf)
    teacher = Teacher(posterior=posterior)
    history = teacher.fit(epochs=60)
    steps = [record["selection"] for record in history if record["selection"] != "wait"]
    assert "try" in steps
    assert steps.count("undo") == steps.count("try")
    assert teacher.model[0].weight.ranks == {"r1": 2}


def test_a_trial_that_pays_stays():
    """With a margin that only a slice of exactly no effect passes, trials bring the rank down."""
    teacher = Teacher(true=1, start=3, posterior=rf.Point())
    history = teacher.fit(epochs=60, selection=rf.Evidence(500, z=1e9))
    steps = [record["selection"] for record in history]
    assert steps.count("try") > steps.count("undo")
    assert teacher.model[0].weight.ranks == {"r1": 1}


def test_without_regrowth_it_stays_cut():
    teacher = Teacher(true=3, start=6)
    weight = teacher.model[0].weight
    weight.keep_slices_("r1", torch.tensor([0, 1]))
    history = teacher.fit(epochs=60, selection=rf.Evidence(regrow=False))
    assert weight.ranks == {"r1": 2}
    assert not any(record["selection"] == "grow" for record in history)


@pytest.mark.parametrize(("at", "rank"), [(30, 3), (31, 1), (32, 1)])
def test_a_test_that_no_other_can_follow_removes_all_that_does_not_pay(at, rank, monkeypatch):
    """Of rank 6, where one slice carries something: half before, and all five from where the run could not come to rest
    again by four fifths of 40 epochs."""
    monkeypatch.setattr(_selection, "next_step", lambda history, *_: "ask" if len(history) == at + 1 else "wait")
    teacher = Teacher(true=1)
    history = teacher.fit()
    assert teacher.model[0].weight.ranks == {"r1": rank}
    assert history[at]["limited"] == (rank == 3)


def test_fixed_ranks_stay():
    teacher = Teacher()
    history = teacher.fit(selection=None, epochs=10)
    assert teacher.model[0].weight.ranks == {"r1": 6}
    assert all("selection" not in record for record in history)


def test_a_test_sees_as_many_examples_as_asked_for():
    teacher, seen = Teacher(), []

    def nll(model, batch):
        each = teacher.nll(model, batch)
        if not torch.is_grad_enabled():
            seen.append(len(each))
        return each

    rf.fit(teacher.model, teacher.batches, nll, num_data=N, progress=False, epochs=30, selection=rf.Evidence(250))
    assert seen
    assert sum(seen) % 300 == 0, "batches of 100 up to 250 examples are three"


def test_growing_keeps_the_function_and_the_optimizer_alive(kind, posterior):
    torch.manual_seed(0)
    layer = rf.nn.Linear(12, 20, format=kind(4), posterior=posterior)
    optimizer = torch.optim.Adam(rf.parameter_groups(layer, 1e-3))
    x = torch.randn(30, 12)
    layer(x).square().mean().backward()
    optimizer.step()
    start = layer.weight.ranks
    for bond in start:
        layer.weight.keep_slices_(bond, torch.tensor([0, 1]), optimizer)
    layer.eval()
    before = layer(x)
    assert rf.grow_ranks_(layer, optimizer, slices=1) is layer
    assert layer.weight.ranks == {bond: min(3, rank) for bond, rank in start.items()}
    torch.testing.assert_close(layer(x), before)
    layer.train()
    for _ in range(2):
        optimizer.zero_grad()
        layer(x).square().mean().backward()
        assert all(bool(p.grad.isfinite().all()) for p in layer.parameters())
        optimizer.step()
    for p in layer.weight.factors:
        assert optimizer.state[p]["exp_avg"].shape == p.shape
    rf.grow_ranks_(layer, optimizer, slices=100)
    assert layer.weight.ranks == start, "no bond grows beyond its start rank"


def test_a_new_slice_can_learn_at_once(kind):
    torch.manual_seed(0)
    tensor = rf.LowRankTensor((12, 20), kind(4), posterior=rf.Point())
    for bond in tensor.ranks:
        tensor.keep_slices_(bond, torch.tensor([0]))
    for bond in tensor.ranks:
        tensor.grow_slices_(bond, 1)
        tensor.dense().sum().backward()
        k, dim = tensor.layout.places(bond)[-1]
        assert bool((tensor.factors[k].grad.select(dim, 1) != 0).any())


def test_a_tensor_of_rank_zero_can_come_back(kind, posterior):
    tensor = rf.LowRankTensor((12, 20), kind(3), posterior=posterior)
    for bond in tensor.ranks:
        tensor.keep_slices_(bond, torch.tensor([], dtype=torch.int64))
    rf.grow_ranks_(tensor)
    assert set(tensor.ranks.values()) == {1}
    assert all(bool(p.isfinite().all()) for p in tensor.parameters())
    assert bool((tensor.dense() == 0).all())


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: rf.Evidence(examples=1), r"Evidence: examples must be 2 or more, got 1"),
        (lambda: rf.Evidence(z=-1.0), r"Evidence: z must be 0 or more and max_cut above 0 and up to 1, got z=-1.0"),
        (lambda: rf.Evidence(max_cut=0.0), r"max_cut=0.0"),
        (lambda: rf.Shrinkage(1.0), r"threshold must be from 0 up to but not including 1, got 1.0"),
        (lambda: rf.grow_ranks_(nn.Linear(3, 3)), r"Linear has no low-rank tensor to grow. Call rf.tensorize_"),
        (lambda: rf.grow_ranks_(nn.Linear(3, 3), slices=-1), r"slices must be 0 or more, got -1. rf.select_ranks_"),
        (lambda: rf.LowRankTensor((4, 4), rf.CP(2)).grow_slices_("x", 1), r"no bond 'x'; this tensor has r"),
        (lambda: rf.LowRankTensor((4, 4), rf.CP(2)).grow_slices_("r", -1), r"count must be 0 or more, got -1"),
    ],
)
def test_refused(make, text):
    with pytest.raises(ValueError, match=text):
        make()
