# SPDX-License-Identifier: Apache-2.0
"""One model trained by two processes; tests/two_processes.py is what they run."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, RandomSampler, TensorDataset

import rankfall as rf
import two_processes
from rankfall import cli
from rankfall._fit import processes_of
from rankfall._processes import Processes
from rankfall._shards import NO_BATCH, Shard
from rankfall.recipes._data import Data
from rankfall.recipes._options import TrainOptions
from two_processes import assert_same_bits

UNTIMED = {"seconds": 0, "selection_seconds": 0}
RUN = ["train", "digits", "--method", "shrinkage", "--epochs", "8", "--limit", "500", "--threshold", "0.5"]
# The command line, with one process killed as its epoch begins.
KILLED = """
import os, signal, sys
from rankfall import _resume
from rankfall.cli import main

victim, epochs = sys.argv.pop(1), int(sys.argv.pop(1))
start, calls = _resume.RunState.start_epoch, []

def counted(state, processes):
    calls.append(1)
    if os.environ["RANK"] == victim and len(calls) > epochs:
        os.kill(os.getpid(), signal.SIGKILL)
    start(state, processes)

_resume.RunState.start_epoch = counted
main()
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """What both processes gave; they are started once."""
    folder = tmp_path_factory.mktemp("two")
    two_processes._interrupted(folder / "one.pt")
    scenarios = [name for name, value in vars(two_processes).items() if _is_scenario(name, value)]
    return two_processes.run_two(folder, *scenarios) | {"folder": folder}


def _is_scenario(name, value):
    return not name.startswith("_") and "index" in getattr(value, "__annotations__", ())


def both(answers, name):
    first, second = answers[name]
    assert not isinstance(first, str), first
    assert not isinstance(second, str), second
    return first, second


def test_factors_optimizer_and_ranks_are_equal_after_cuts(answers):
    first, second = both(answers, "cuts")
    assert_same_bits(first["state"], second["state"])
    assert_same_bits(first["optimizer"], second["optimizer"])
    assert first["history"] == second["history"]
    assert first["ranks"] == second["ranks"]
    made = [cut for record in first["history"] if record["selection"] == "cut" for cut in record["cuts"]]
    assert len(made) >= 3, "too few cuts: a weaker test"


def test_new_slices_are_equal_too(answers):
    """Though their entries are random."""
    first, second = both(answers, "grows")
    assert_same_bits(first, second)
    _, ranks = first
    assert ranks == [{"0": {"r1": 3, "r2": 3, "r3": 3}}, {"0": {"r1": 4, "r2": 4, "r3": 4}}]


def test_parameters_are_equal_before_every_step(answers):
    """Not only where an epoch ends, at which all take those of the first process anyway."""
    first, second = both(answers, "cuts")
    assert first["steps"] == second["steps"]
    assert len(set(first["steps"])) > 300


def test_every_process_has_batches_and_noise_of_its_own(answers):
    first, second = both(answers, "cuts")
    assert not set(first["noise"]) & set(second["noise"])
    assert not set(first["means"]) & set(second["means"])


def test_the_run_learns_as_one_process_does(answers):
    """The start and the noise differ, the size of all batches together does not."""
    model = two_processes.model_of(seed=0)
    optimizer = torch.optim.Adam(rf.parameter_groups(model, 5e-3))
    history = two_processes.fit(model, two_processes.loader_of(50), optimizer=optimizer, epochs=40, kl_warmup=3)
    first, _ = both(answers, "cuts")
    assert first["history"][-1]["nll"] == pytest.approx(history[-1]["nll"], rel=0.1)
    assert first["ranks"] == rf.ranks(model) == {"0": {"r1": 1, "r2": 1, "r3": 1}}


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("even", [slice(0, 100)]),
        ("uneven", [slice(0, 75), slice(75, 100)]),
        ("one_batch", [slice(0, 100)]),
    ],
)
def test_a_step_is_that_of_the_mean_over_all_examples(answers, name, rows):
    """Whatever part of them each process has, and for parameters that only one of them needs."""
    first, second = both(answers, name)
    assert_same_bits(first, second)
    parameters, gradients, record = two_processes.gradient_run(rows)
    torch.testing.assert_close(first[0], parameters, rtol=1e-12, atol=1e-14)
    for one, other in zip(first[1], gradients, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    figures = ("loss", "nll", "nll_error", "kl")
    assert [first[2][key] for key in figures] == pytest.approx([record[key] for key in figures], rel=1e-6)
    assert sum(gradient is None for gradient in first[1]) == (1 if len(rows) == 1 else 2)


def test_an_interrupted_run_ends_as_the_uninterrupted_one(answers):
    """Other seeds at the resumption, and files on the first process alone."""
    (whole, again), (whole_2, again_2) = both(answers, "resumed")
    for run in (again, whole_2, again_2):
        assert_same_bits(run[:2], whole[:2])
        assert [r | UNTIMED for r in run[2]] == [r | UNTIMED for r in whole[2]]
    assert whole[2][-1]["ranks"] != whole[2][0]["ranks"], "no cut: a weaker test"
    assert sorted(p.name for p in answers["folder"].glob("[wp]*") if p.suffix == "") == ["part", "whole"]


def test_a_checkpoint_goes_on_with_another_number_of_processes(answers):
    (state, history), (other, _) = both(answers, "goes_on")
    assert_same_bits(state, other)
    assert [record["epoch"] for record in history] == [0, 1, 2, 3]
    ranks, _ = both(answers, "stops")
    model = two_processes.model_of(seed=9)
    history = two_processes.fit(model, epochs=4, checkpoint=answers["folder"] / "two.pt")
    assert [record["epoch"] for record in history] == [0, 1, 2, 3]
    assert history[1]["ranks"] == ranks


@pytest.mark.parametrize(
    ("name", "origin", "text"),
    [
        ("nan_in_one_part", 0, "ValueError: the loss became nan in epoch 1, step 1: all parameters are still finite"),
        ("evaluate_fails_on_the_second", 1, "ZeroDivisionError: division by zero"),
        ("strange_error", 1, "StrangeError: this and that"),
        ("damaged_checkpoint", 0, "damaged.pt is damaged or no checkpoint of rf.fit"),
        ("no_folder", 0, "for the checkpoint. Make it first."),
        (
            "another_model",
            1,
            "'0.weight' is of shape (21, 24) and torch.float32 on process 1, but of shape (20, 24) an",
        ),
        ("other_modes", 1, "'0' is TTM(max_rank=2, out_modes=None, in_modes=(6, 4)) of (20, 24) on process 1, but TTM"),
    ],
)
def test_an_error_on_one_process_stops_all_and_says_where_it_was(answers, name, origin, text):
    for index, answer in enumerate(answers[name]):
        assert text in answer
        assert ("This happened on process" in answer) == (index != origin)
        assert f"process {origin}, and stopped the others" in answer or index == origin


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("sparse_gradients", "a parameter of shape (10, 3) has a sparse gradient, which several processes cannot"),
        ("no_batch", "loader gave no batch. Pass a DataLoader or a list"),
    ],
)
def test_refused_on_every_process(answers, name, text):
    assert all(text in answer for answer in answers[name])


def test_only_the_first_process_is_called_after_an_epoch(answers):
    assert both(answers, "only_the_first_writes") == ([1, 2], [])


def test_batch_statistics_are_those_of_the_first(answers):
    (first, *_), (second, *_) = (runs[0] for runs in both(answers, "resumed"))
    assert first["0.running_mean"].abs().sum() > 0
    assert torch.equal(first["0.running_mean"], second["0.running_mean"])


def loaders(count):
    rows = TensorDataset(torch.arange(count))
    by_batch = BatchSampler(RandomSampler(rows), 4, drop_last=False)
    return {
        "loader": DataLoader(rows, batch_size=4, shuffle=True),
        "sampler of batches": DataLoader(rows, sampler=by_batch, batch_size=None),
        "workers": DataLoader(rows, batch_size=4, shuffle=True, num_workers=1),
        "list": list(torch.arange(count).split(4)),
        "stream": DataLoader(Stream(count), batch_size=4),
    }


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, count):
        self.count = count

    def __iter__(self):
        return iter(range(self.count))


@pytest.mark.parametrize("kind", loaders(4))
@pytest.mark.parametrize("count", [24, 26, 29, 3])
def test_shards_give_every_row_once_and_each_process_as_many_batches(kind, count):
    parts = []
    for index in range(3):
        torch.manual_seed(1)
        shard = Shard(loaders(count)[kind], Processes(3, index))
        parts.append(list(shard))
        torch.manual_seed(1)
        assert len(list(shard)) == len(parts[-1])
    assert len({len(part) for part in parts}) == 1
    rows = [batch[0] if isinstance(batch, list | tuple) else batch for part in parts for batch in part]
    rows = torch.cat([batch for batch in rows if batch is not NO_BATCH])
    assert sorted(rows.tolist()) == list(range(count))


def test_only_the_rows_of_a_process_are_gathered():
    class Rows(TensorDataset):
        asked = 0

        def __getitem__(self, index):
            Rows.asked += 1
            return super().__getitem__(index)

    list(Shard(DataLoader(Rows(torch.arange(40)), batch_size=4), Processes(2, 1)))
    assert Rows.asked == 20


def test_alone_a_shard_is_the_loader():
    batches = [torch.arange(3), torch.arange(2)]
    assert list(Shard(batches, Processes())) == batches


def test_texts_of_similar_length_are_dealt_out_too():
    tokens = torch.zeros(23, 9, dtype=torch.int64)
    for row in range(23):
        tokens[row, : row % 8 + 1] = row + 1
    data = Data((tokens, torch.arange(23)), (tokens, torch.arange(23)), texts=True)
    parts = []
    for index in range(2):
        torch.manual_seed(1)
        parts.append([batch for batch in Shard(data.batches(5), Processes(2, index)) if batch is not NO_BATCH])
    labels = torch.cat([labels for part in parts for _, labels in part])
    assert sorted(labels.tolist()) == list(range(23))


def test_a_loader_that_is_dealt_out_already_is_refused():
    rows = TensorDataset(torch.arange(8))
    text = r"loader is dealt out among processes already \(by {}\).*Pass the loader of the whole training set"
    sampler = DistributedSampler(rows, num_replicas=2, rank=0)
    for loader in (DataLoader(rows, sampler=sampler), DataLoader(rows, batch_sampler=BatchSampler(sampler, 2, False))):
        with pytest.raises(ValueError, match=text.format("DistributedSampler")):
            Shard(loader, Processes(2, 0))
    with pytest.raises(ValueError, match=text.format("DataLoaderShard")):
        Shard(Accelerator(cpu=True).prepare_data_loader(DataLoader(rows)), Processes(2, 0))


def test_processes_that_do_not_know_of_each_other_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    text = r"2 processes were started \(WORLD_SIZE\), but the accelerator knows of one.*Accelerator\(cpu=True\)"
    with pytest.raises(ValueError, match=text):
        rf.fit(nn.Linear(2, 2), [], lambda model, batch: batch, epochs=1, num_data=1, accelerator=Accelerator())


def test_a_model_in_pieces_is_refused():
    pieces = SimpleNamespace(num_processes=2, distributed_type=SimpleNamespace(value="FSDP"))
    with pytest.raises(
        ValueError, match=r"rf.fit trains a whole model on every process, and Accelerate is set to FSDP"
    ):
        processes_of(pieces)


def test_alone_nothing_is_sent():
    alone = Processes()
    values = torch.ones(3)
    assert alone.gather(values) is values
    assert alone.from_first(lambda: 5) == alone.together(lambda: 5) == 5
    assert alone.total([1.5]) == alone.agree([1.5]) == [1.5]
    before = torch.get_rng_state()
    alone.new_noise()
    with alone.own_noise():
        assert torch.equal(torch.get_rng_state(), before)


def torchrun(*arguments: str) -> tuple[int, str, str]:
    """Exit code, output and errors of two processes; if they hang, the test fails."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    try:
        output, errors = process.communicate(timeout=two_processes.LIMIT)
    except subprocess.TimeoutExpired:
        process.terminate()  # It takes its processes with it.
        process.communicate(timeout=60)
        raise
    return process.returncode, output, errors


def test_killed_processes_lose_nothing_on_the_command_line(tmp_path, monkeypatch):
    """Of a run of eight epochs the second process is killed after three, then the first one after three more."""
    monkeypatch.chdir(tmp_path)
    Path("killed.py").write_text(KILLED)
    code, output, errors = torchrun("-m", "rankfall", *RUN, "--out", "whole")
    assert code == 0, errors
    assert output.count("whole model") == output.count("run folder: whole") == output.count("epoch 8/8") == 1
    for victim, resume in (("1", []), ("0", ["--resume"])):
        code, _, errors = torchrun("killed.py", victim, "3", *RUN, "--out", "cut", *resume)
        assert code != 0
        assert f"exitcode  : -{signal.SIGKILL.value}" in errors
        assert not Path("cut/metrics.json").exists()
    assert len(Path("cut/history.jsonl").read_text().splitlines()) == 6
    code, _, errors = torchrun("-m", "rankfall", *RUN, "--out", "cut", "--resume")
    assert code == 0, errors
    assert sorted(p.name for p in Path("cut").iterdir()) == sorted(p.name for p in Path("whole").iterdir())
    assert Path("cut/model.safetensors").read_bytes() == Path("whole/model.safetensors").read_bytes()
    whole, cut = (
        [json.loads(line) | UNTIMED for line in Path(folder, "history.jsonl").read_text().splitlines()]
        for folder in ("whole", "cut")
    )
    assert whole == cut
    assert whole[-1]["ranks"] != whole[0]["ranks"], "no cut: a weaker test"


def test_an_error_before_training_ends_all_processes_with_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, errors = torchrun("-m", "rankfall", "train", "digits", "--epochs", "0")
    assert code == 1
    assert errors.count("rankfall: ") == 1
    assert "rankfall: --epochs must be 1 or more, got 0." in errors
    assert not list(tmp_path.iterdir())


def test_other_commands_run_on_one_process():
    with pytest.raises(ValueError, match=r"2 processes were started, and only `rankfall train` runs on several. Start"):
        cli._check_processes(cli.PlanOptions("my_net:make"), 2)
    cli._check_processes(TrainOptions("digits"), 2)


def test_others_are_quiet_about_a_wrong_argument(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(cli, "_OTHERS_SPEAK", 0)
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "digits", "--format", "svd"])
    assert stop.value.code == 2
    assert capsys.readouterr() == ("", "")
