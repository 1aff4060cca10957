# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of rf.fit: a run that was stopped ends as it would have, and what does not fit is refused."""

import numpy as np
import pytest
import torch
from torch import nn

import rankfall as rf
from fit_runs import N, data, fit, model_of, same_bits, shuffled, squared_error, state_of


class Placed:
    """Batches of a stream, three an epoch, that says where it is as torchdata's StatefulDataLoader does."""

    def __init__(self):
        self.place = 0

    def __iter__(self):
        x, y = data()
        for k in range(self.place, self.place + 3):
            where = torch.arange(16 * k, 16 * k + 16) % len(x)
            yield x[where], y[where]
        self.place += 3

    def state_dict(self):
        return {"place": self.place}

    def load_state_dict(self, state):
        self.place = state["place"]


@pytest.mark.parametrize("kind_of_loader", ["global generator", "own generator", "place"])
@pytest.mark.parametrize("at", [1, 4])
def test_an_interrupted_run_ends_as_the_uninterrupted_one(at, kind_of_loader, posterior, tmp_path):
    """Noise, shuffling, momentum, schedule and cuts: all go on from where they were, bit for bit."""

    def run(path, stop_at=None):
        model = model_of(posterior)
        with torch.no_grad():
            model[0].weight.factors[0][..., 0] *= 1e-3
            model[0].weight.factors[1][0] *= 1e-3
        torch.manual_seed(11)
        loader = {
            "global generator": shuffled,
            "own generator": lambda: shuffled(torch.Generator().manual_seed(5)),
            "place": Placed,
        }[kind_of_loader]()
        seen = []

        def evaluate():
            seen.append(1)
            if stop_at is not None and len(seen) > stop_at:
                raise KeyboardInterrupt
            return {"probe": model(data()[0]).sum().item()}

        arguments = {
            "epochs": 6,
            "kl_warmup": 2,
            "selection": rf.Shrinkage(0.2),
            "evaluate": evaluate,
            "checkpoint": path,
        }
        return model, lambda: fit(model, loader, **arguments)

    whole, go = run(tmp_path / "whole")
    expected = go()
    _, go = run(tmp_path / "part", stop_at=at)
    with pytest.raises(KeyboardInterrupt):
        go()
    torch.randn(100)  # Another process has other random numbers behind it.
    resumed, go = run(tmp_path / "part")
    torch.manual_seed(99)
    history = go()
    assert rf.ranks(resumed) == rf.ranks(whole) != rf.ranks(model_of())
    assert same_bits(state_of(resumed), state_of(whole))
    untimed = {"seconds": 0, "selection_seconds": 0}
    assert [r | untimed for r in history] == [r | untimed for r in expected]
    finished, go = run(tmp_path / "part")
    assert go() == history
    assert same_bits(state_of(finished), state_of(whole))


def test_a_loader_that_knows_its_place_is_where_training_left_it():
    """Statistics at the posterior mean and the evidence test look at batches, and training misses none for it."""
    starts = []

    def nll(model, batch):
        if torch.is_grad_enabled():
            starts.append(batch[0][0, 0].item())
        return squared_error(model, batch)

    model = nn.Sequential(rf.nn.Linear(12, 20, format=rf.TTM(4)), nn.BatchNorm1d(20), nn.Linear(20, 3))
    loader = Placed()
    fit(model, loader, nll, epochs=8, kl_warmup=0, selection=rf.Evidence(examples=16))
    assert loader.place == 24
    assert starts == [data()[0][16 * k % N, 0].item() for k in range(24)]


def test_the_checkpoint_does_not_change_the_run(tmp_path):
    with_one, without = model_of(), model_of()
    for model, path in ((with_one, tmp_path / "c"), (without, None)):
        torch.manual_seed(2)
        fit(model, shuffled(), checkpoint=path)
    assert same_bits(state_of(with_one), state_of(without))
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    path = tmp_path / "run.pt"
    fit(model_of(), checkpoint=path)
    cases = [
        (model_of(), {"epochs": 5}, r"run.pt is of a run of 3 epochs, not 5. Pass epochs=3"),
        (nn.Linear(12, 3), {}, r"run.pt is of another architecture than this Linear: missing bias, weight"),
    ]
    for model, arguments, text in cases:
        before = state_of(model)
        with pytest.raises(ValueError, match=text):
            fit(model, checkpoint=path, **arguments)
        assert same_bits(state_of(model), before)


@pytest.mark.parametrize("keep", [0, 1000, -100])
def test_a_damaged_checkpoint_is_refused(keep, tmp_path):
    path = tmp_path / "run.pt"
    fit(model_of(), checkpoint=path)
    path.write_bytes(path.read_bytes()[:keep])
    model = model_of()
    before = state_of(model)
    with pytest.raises(ValueError, match=r"run.pt is damaged .*Remove it to start anew"):
        fit(model, checkpoint=path)
    assert same_bits(state_of(model), before)


def test_a_checkpoint_of_other_widths_or_no_checkpoint_changes_nothing(tmp_path):
    path = tmp_path / "run.pt"
    fit(model_of(), checkpoint=path)
    wider = nn.Sequential(rf.nn.Linear(12, 9, format=rf.TTM(4)), nn.Tanh(), nn.Linear(9, 3))
    assert wider.state_dict().keys() == model_of().state_dict().keys()
    before = state_of(wider)
    with pytest.raises(ValueError, match=r"run.pt holds factors .*Make the layer with the format and sizes"):
        fit(wider, checkpoint=path)
    torch.save({"model": {}}, path)
    with pytest.raises(ValueError, match=r"damaged or no checkpoint of rf.fit \('epochs'\)"):
        fit(wider, checkpoint=path)
    assert same_bits(state_of(wider), before)


def test_a_checkpoint_of_another_optimizer_changes_nothing(tmp_path):
    path = tmp_path / "run.pt"
    fit(model_of(), checkpoint=path)
    model = model_of()
    before = state_of(model)
    optimizer = torch.optim.Adam([{"params": [p]} for p in model.parameters()])
    with pytest.raises(ValueError, match=r"of an optimizer with other parameter groups. Make the optimizer as before"):
        fit(model, checkpoint=path, optimizer=optimizer)
    assert same_bits(state_of(model), before)


def test_numbers_of_numpy_do_not_keep_a_run_from_going_on(tmp_path):
    """They pass for Python's, as a metric or a step size, and torch does not read them back."""

    def run():
        model = model_of()
        optimizer = torch.optim.Adam(model.parameters(), lr=np.float64(1e-2))
        found = fit(
            model, optimizer=optimizer, checkpoint=tmp_path / "run.pt", evaluate=lambda: {"auc": np.float64(0.5)}
        )
        assert [record["auc"] for record in found] == [0.5] * 3
        return state_of(model)

    assert same_bits(run(), run())
