# SPDX-License-Identifier: Apache-2.0
import copy
import math
from collections import namedtuple

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import nn
from torch.utils.checkpoint import checkpoint

import rankfall as rf
from fit_runs import N, data, fit, model_of, same_bits, shuffled, squared_error, state_of
from rankfall._progress import listed


def test_the_loss_falls(posterior):
    history = fit(model_of(posterior), epochs=60, kl_warmup=5, selection=None)
    assert history[-1]["nll"] < 0.3 * history[0]["nll"]
    assert [record["epoch"] for record in history] == list(range(60))


def test_a_record_says_what_happened():
    model = model_of()
    history = fit(model, epochs=2, evaluate=lambda: {"accuracy": 0.5}, kl_warmup=0)
    expected = {"epoch", "loss", "nll", "nll_error", "kl", "lr", "parameters", "compression", "ranks", "rows"}
    expected |= {"seconds", "selection", "selection_seconds", "price", "accuracy"}
    assert all(set(record) == expected for record in history)
    last = history[-1]
    assert last["ranks"] == rf.ranks(model)
    assert last["parameters"] == rf.summary(model).parameters
    assert last["compression"] == pytest.approx(rf.summary(model).compression)
    assert last["loss"] == pytest.approx(last["nll"] + last["kl"] / N, rel=1e-5)
    assert last["price"] == pytest.approx(model[0].weight.entry_kl() / N)
    assert last["accuracy"] == 0.5
    assert last["seconds"] > 0


def test_the_first_step_is_that_of_the_elbo_loss():
    model, by_hand = model_of(rf.Point()), model_of(rf.Point())
    history = fit(model, epochs=1, kl_warmup=0, beta=0.5, optimizer=torch.optim.SGD(model.parameters(), lr=1e-2))
    loss = rf.ELBOLoss(by_hand, N, beta=0.5)(squared_error(by_hand, data()).mean())
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=1e-2)
    loss.backward()
    optimizer.step()
    assert history[0]["loss"] == pytest.approx(loss.item(), rel=1e-6)
    for p, q in zip(model.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_warm_up_raises_the_weight_of_the_kl_from_zero():
    model = model_of(rf.Point())
    history = fit(model, epochs=6, kl_warmup=4, beta=2.0)
    weights = [(record["loss"] - record["nll"]) * N / record["kl"] for record in history]
    assert weights == pytest.approx([0, 0.5, 1, 1.5, 2, 2], abs=1e-3)


def test_cuts_happen_after_the_warm_up_and_stay():
    model = model_of(rf.Point())
    with torch.no_grad():
        for k, dim in model[0].weight.layout.places("r1"):
            model[0].weight.factors[k].select(dim, 0).mul_(1e-4)
    history = fit(model, epochs=5, kl_warmup=2, selection=rf.Shrinkage(0.05))
    ranks = [record["ranks"]["0"]["r1"] for record in history]
    assert ranks[:2] == [4, 4]
    assert ranks[2] == 3
    assert ranks == sorted(ranks, reverse=True)
    assert history[-1]["parameters"] < history[0]["parameters"]


def test_batches_of_unequal_size_weigh_by_datum():
    x, y = data()
    model = model_of(rf.Point())
    expected = squared_error(model, (x, y)).mean().item()
    frozen = torch.optim.SGD(model.parameters(), lr=0.0)
    history = fit(model, [(x[:50], y[:50]), (x[50:], y[50:])], optimizer=frozen, epochs=1)
    assert history[0]["nll"] == pytest.approx(expected, rel=1e-5)


def test_a_dense_model_is_trained_on_its_nll_alone():
    torch.manual_seed(0)
    model = nn.Linear(12, 3)
    history = fit(model, epochs=40, selection=rf.Shrinkage(0.1))
    assert history[-1]["nll"] < 0.5 * history[0]["nll"]
    assert all(record["kl"] == 0 and record["loss"] == pytest.approx(record["nll"]) for record in history)
    assert history[-1]["ranks"] == {}


def test_default_schedule_is_a_cosine_to_zero():
    model = model_of()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    history = fit(model, optimizer=optimizer, epochs=4)
    expected = [1e-2 * (1 + torch.cos(torch.tensor(torch.pi * k / 4)).item()) / 2 for k in range(4)]
    assert [record["lr"] for record in history] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("lr", [1e-2, torch.tensor(1e-2)])
def test_an_optimizer_gets_its_step_size_back_for_who_goes_on_with_it(lr):
    model = model_of()
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    first = fit(model, optimizer=optimizer, epochs=4, selection=None)
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(1e-2)
    again = fit(model, optimizer=optimizer, epochs=4, selection=None)
    assert [float(record["lr"]) for record in again] == pytest.approx([float(record["lr"]) for record in first])


def test_a_custom_scheduler_steps_once_an_epoch():
    model = model_of()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
    history = fit(model, shuffled(), optimizer=optimizer, scheduler=scheduler)
    assert [record["lr"] for record in history] == pytest.approx([1e-2, 5e-3, 2.5e-3])


def test_evaluate_runs_in_eval_mode_without_gradients_and_training_goes_on():
    model, seen = model_of(), []

    def evaluate():
        seen.append((model.training, torch.is_grad_enabled()))
        return {}

    modes = []
    fit(model, nll=lambda m, batch: modes.append(model.training) or squared_error(m, batch), evaluate=evaluate)
    assert seen == [(False, False)] * 3
    assert modes == [True] * 3


def test_batches_may_be_mappings_and_nested():
    x, y = data()

    def nll(model, batch):
        return (model(batch["in"][0]) - batch["out"]).square().sum(1)

    assert len(fit(model_of(), [{"in": [x], "out": y, "name": "first"}], nll, epochs=1)) == 1


def test_batches_may_be_what_moves_itself_and_tuples_with_names():
    Named = namedtuple("Named", ["packed", "y"])
    torch.manual_seed(0)
    layer = rf.nn.LSTM(12, 3, format=rf.TT(4))
    x, y = data()
    packed = nn.utils.rnn.pack_sequence([x[:4], x[4:6]])

    def nll(model, batch):
        return (nn.utils.rnn.pad_packed_sequence(model(batch.packed)[0])[0][-1] - batch.y).square().sum(1)

    assert len(fit(layer, [Named(packed, y[:2])], nll, epochs=1, num_data=2, selection=None)) == 1


def test_nan_in_the_data_stops_before_it_reaches_the_parameters():
    x, y = data()
    bad = x.clone()
    bad[3, 5] = float("nan")
    model = model_of()
    start = state_of(model)
    good = [(x, y), (x, y)]
    text = r"the loss became nan in epoch 1, step 3: all parameters are still finite.*check the inputs for NaN"
    with pytest.raises(ValueError, match=text):
        fit(model, [*good, (bad, y)])
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
    assert not same_bits(state_of(model), start)
    before = state_of(model)
    with pytest.raises(ValueError, match=r"in epoch 1, step 1"):
        fit(model, [(bad, y)])
    assert same_bits(state_of(model), before)


def test_the_epoch_of_the_nan_is_counted_from_one():
    calls = []

    def nll(model, batch):
        calls.append(1)
        return squared_error(model, batch) * (float("inf") if len(calls) > 2 else 1.0)

    with pytest.raises(ValueError, match=r"the loss became inf in epoch 3, step 1"):
        fit(model_of(), nll=nll)


def test_a_parameter_that_is_not_finite_is_named():
    model = model_of()
    with torch.no_grad():
        model[2].bias[0] = float("inf")
    with pytest.raises(ValueError, match=r"'2.bias' is no longer finite"):
        fit(model)


@pytest.mark.parametrize(
    ("returned", "came"),
    [(lambda each: each.mean(), r"shape \(\)"), (lambda each: each[:, None], r"shape \(64, 1\)"), (float, "float")],
)
def test_nll_is_one_number_per_datum(returned, came):
    def nll(model, batch):
        each = squared_error(model, batch)
        return returned(each) if returned is not float else 1.0

    with pytest.raises(ValueError, match=rf"nll must return one number per datum.*got {came}.*reduction='none'"):
        fit(model_of(), nll=nll)


def test_an_empty_loader_is_refused():
    with pytest.raises(ValueError, match=r"loader gave no batch. Pass a DataLoader or a list"):
        fit(model_of(), [])
    with pytest.raises(ValueError, match=r"loader gave no batch"):
        fit(model_of(), iter([data()]), epochs=2)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"num_data": 0}, r"num_data must be positive, got 0. Pass the size of the training set, len\(dataset\)"),
        ({"num_data": -5}, r"num_data must be positive, got -5"),
        ({"epochs": 0}, r"epochs must be 1 or more, got 0"),
        ({"beta": -1.0}, r"beta must be 0 or more, got -1.0. 1 is the evidence lower bound"),
        ({"kl_warmup": -1}, r"kl_warmup must be 0 epochs or more, got -1"),
        ({"num_data": float("inf")}, r"num_data must be positive, got inf"),
        ({"checkpoint": "nowhere/run.pt"}, r"no folder nowhere for the checkpoint. Make it first"),
        (
            {"optimizer": torch.optim.LBFGS([torch.zeros(1)])},
            r"rf.fit makes one pass for each step, and LBFGS asks for several. Pass for example Adam",
        ),
        (
            {"scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau(torch.optim.SGD([torch.zeros(1)]))},
            r"rf.fit steps a scheduler by epochs, and ReduceLROnPlateau by a loss. Pass another one",
        ),
    ],
)
def test_arguments_out_of_range_change_nothing(arguments, text):
    model = model_of()
    before = state_of(model)
    with pytest.raises(ValueError, match=text):
        fit(model, **arguments)
    assert same_bits(state_of(model), before)


def test_an_accelerator_that_adds_up_batches_is_refused():
    text = (
        r"rf.fit makes a step of each batch, and the accelerator adds up 4 of them. "
        r"Pass one without gradient_accumulation_steps, and larger batches"
    )
    try:
        with pytest.raises(ValueError, match=text):
            fit(model_of(), accelerator=Accelerator(gradient_accumulation_steps=4))
    finally:  # All accelerators of a process share it.
        GradientState._reset_state()


def test_progress_is_shown_only_if_wanted(capsys, monkeypatch):
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    fit(model_of(), progress=False)
    assert capsys.readouterr().out == ""
    fit(model_of(), progress=True)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[-1].startswith("epoch 3/3  loss ")
    assert lines[-1].endswith("ranks 0 4")


@pytest.mark.parametrize(
    ("ranks", "text"),
    [
        ({"": {"r1": 3, "r2": 2}}, "3 2"),
        ({"a": {"r1": 3}, "b": {"r1": 4, "r2": 5}}, "a 3  b 4 5"),
        ({str(k): {"r1": k, "r2": 9} for k in range(5)}, "0 to 9, median 9, of 10 bonds in 5 layers"),
        ({str(k): {} for k in range(5)}, ""),
    ],
)
def test_ranks_of_many_layers_are_summed_up(ranks, text):
    assert listed(ranks) == text


def test_mixed_precision_keeps_the_kl_wide_and_leaves_the_model_as_it_was():
    model = model_of()
    seen = []
    model[0].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    # Accelerate keeps one precision per process.
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        fit(model, accelerator=Accelerator(mixed_precision="bf16", cpu=True))
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert set(seen) == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not hasattr(model.forward, "__wrapped__")


def test_a_fit_leaves_a_model_that_can_be_copied():
    model = model_of()
    fit(model)
    twin = copy.deepcopy(model)
    x, _ = data()
    assert torch.equal(twin.eval()(x), model.eval()(x))


class _Again(nn.Module):
    """A network that is computed again for its gradient, or not."""

    def __init__(self, reentrant):
        super().__init__()
        self.block, self.reentrant = model_of(), reentrant

    def forward(self, x):
        if self.reentrant is None:
            return self.block(x)
        return checkpoint(self.block, x.detach().requires_grad_(), use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_changes_nothing(reentrant):
    """What is computed again for the gradient has the draw of the forward."""
    found = []
    for kind in (None, reentrant):
        model = _Again(kind)
        torch.manual_seed(5)
        fit(model, epochs=1, kl_warmup=0, selection=None, optimizer=torch.optim.SGD(model.parameters(), lr=1e-2))
        found.append(state_of(model))
    assert same_bits(*found)


def test_the_error_of_the_nll_is_that_of_its_spread_however_large_it_is():
    model = nn.Linear(12, 3)
    spread = torch.randn(N, generator=torch.Generator().manual_seed(0)).double()

    def nll(model, batch):
        return 1e4 + spread.float() + 0 * model(batch[0]).sum(1)

    (record,) = fit(model, nll=nll, epochs=1)
    assert record["nll_error"] == pytest.approx(float(spread.std(unbiased=False)) / math.sqrt(N), rel=1e-2)
