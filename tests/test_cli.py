# SPDX-License-Identifier: Apache-2.0
"""The command line: run folders, resuming, and one-line errors with exit code 2."""

import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

import rankfall as rf
from commands import SHORT, refused
from mnist_files import write_mnist
from rankfall.cli import main
from rankfall.recipes import _run
from rankfall.recipes._options import TrainOptions

KEYS = {
    "recipe", "model", "format", "prior", "posterior", "method", "precision", "seed", "epochs", "test_accuracy",
    "test_nll", "test_ece", "test_brier", "parameters", "dense_parameters", "compression", "tensorized_parameters",
    "tensorized_dense_parameters", "ranks", "seconds", "peak_rss_bytes",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("method", ["evidence", "shrinkage", "fixed", "compress", "dense"])
def test_train_writes_a_whole_run_folder(capsys, method):
    main(["train", "digits", "--method", method, "--out", "run", *SHORT])
    metrics = json.loads(Path("run/metrics.json").read_text())
    assert set(metrics) == KEYS
    assert sorted(p.name for p in Path("run").iterdir()) == [
        "config.json", "history.jsonl", "metrics.json", "model.safetensors", "ranks.png",
    ]  # fmt: skip
    history = [json.loads(line) for line in Path("run/history.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in history] == [0, 1, 2]
    assert history[-1]["ranks"] == metrics["ranks"]
    printed = capsys.readouterr().out
    assert "whole model" in printed
    assert f"{metrics['test_accuracy']:.2%}" in printed
    model = rf.load("run/model.safetensors", _run.RECIPES["digits"].network(None).make())
    assert rf.summary(model).parameters == metrics["parameters"]
    assert rf.ranks(model) == metrics["ranks"]


def test_every_format_trains(mini_mnist: Path):
    for name in ("cp", "tucker", "tt", "ttm", "tr"):
        main(["train", "mnist", "--data-dir", str(mini_mnist), "--format", name, "--max-rank", "3", "--epochs", "1"])
        metrics = json.loads(Path(f"runs/mnist-{name}-evidence-seed0/metrics.json").read_text())
        assert metrics["format"] == name
        assert metrics["dense_parameters"] == 407_050


def test_default_folders_do_not_collide():
    for _ in range(3):
        main(["train", "digits", *SHORT])
    assert sorted(p.name for p in Path("runs").iterdir()) == [
        "digits-ttm-evidence-seed0", "digits-ttm-evidence-seed0-2", "digits-ttm-evidence-seed0-3",
    ]  # fmt: skip


def test_equal_seeds_give_equal_models():
    for name in ("a", "b"):
        main(["train", "digits", "--out", name, *SHORT])
    assert Path("a/model.safetensors").read_bytes() == Path("b/model.safetensors").read_bytes()


PROGRAM = "import torch; torch.set_num_threads(1); from rankfall.cli import main; main()"
KILLED = """
import os, pathlib, signal
replace, calls = pathlib.Path.replace, []

def counted(self, target):
    calls.append(target)
    if len(calls) == {last} and {before}:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(self, target)
    if len(calls) == {last}:
        os.kill(os.getpid(), signal.SIGKILL)

pathlib.Path.replace = counted
"""
RUN = ["train", "digits", "--method", "shrinkage", "--epochs", "10", "--limit", "500", "--threshold", "0.5"]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    subprocess.run([sys.executable, "-c", PROGRAM, *RUN, "--out", str(folder)], check=True, stdout=subprocess.DEVNULL)
    return folder


def kill(arguments: list[str], last: int, before: bool) -> None:
    """Runs a command that is killed at its `last` rename of a file."""
    program = KILLED.format(last=last, before=before) + PROGRAM
    stopped = subprocess.run([sys.executable, "-c", program, *arguments], check=False, capture_output=True)
    assert stopped.returncode == -signal.SIGKILL


# The first file is config.json; then come checkpoint.pt and history.jsonl of each epoch.
@pytest.mark.parametrize("last", [1, 2, 10, 11], ids=["config", "first checkpoint", "a checkpoint", "a history"])
@pytest.mark.parametrize("before", [True, False], ids=["before its rename", "after its rename"])
def test_a_killed_run_resumes_to_the_same_model(whole_run: Path, last, before):
    kill([*RUN, "--out", "cut"], last, before)
    assert not Path("cut/metrics.json").exists()
    resume = ["--resume"] if Path("cut/config.json").exists() else []
    main([*RUN, "--out", "cut", *resume])
    assert not list(Path("cut").glob(".*"))
    assert Path("cut/model.safetensors").read_bytes() == (whole_run / "model.safetensors").read_bytes()
    whole, cut = (json.loads((folder / "metrics.json").read_text()) for folder in (whole_run, Path("cut")))
    same = ("ranks", "test_nll", "epochs", "parameters")
    assert [whole[key] for key in same] == [cut[key] for key in same]
    assert min(rank for bonds in cut["ranks"].values() for rank in bonds.values()) < 8, "no cut: a weaker test"


# Two epochs dense, two of factors: the files are 1 config, 2-5 checkpoint and history, 6-9 the same of the factors.
@pytest.mark.parametrize(
    ("last", "before"),
    [(4, False), (6, True), (8, False)],
    ids=["dense half not recorded", "no checkpoint of factors yet", "last epoch not recorded"],
)
def test_a_killed_compression_resumes_to_the_same_model(last, before):
    run = ["train", "digits", "--method", "compress", "--epochs", "4", "--limit", "300"]
    main([*run, "--out", "whole"])
    kill([*run, "--out", "cut"], last, before)
    main([*run, "--out", "cut", "--resume"])
    assert sorted(p.name for p in Path("cut").iterdir()) == sorted(p.name for p in Path("whole").iterdir())
    assert Path("cut/model.safetensors").read_bytes() == Path("whole/model.safetensors").read_bytes()
    whole, cut = (
        [json.loads(line) | {"seconds": None} for line in Path(folder, "history.jsonl").read_text().splitlines()]
        for folder in ("whole", "cut")
    )
    assert whole == cut
    assert [record["epoch"] for record in whole] == [0, 1, 2, 3]


def test_resuming_a_finished_run_reads_it(monkeypatch, capsys):
    main(["train", "digits", "--out", "run", *SHORT])
    first = capsys.readouterr().out
    monkeypatch.setattr(_run, "_fit", None)
    main(["train", "digits", "--out", "run", "--resume", *SHORT])
    tables = [text[text.index("layer") :] for text in (first, capsys.readouterr().out)]
    assert tables[0] == tables[1]


def test_resume_without_folder_takes_the_latest():
    main(["train", "digits", *SHORT])
    main(["train", "digits", "--resume", *SHORT])
    assert [p.name for p in Path("runs").iterdir()] == ["digits-ttm-evidence-seed0"]


def test_interruption_says_how_to_go_on(monkeypatch, capsys):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(_run, "_fit", interrupt)
    with pytest.raises(SystemExit) as stop:
        main(["train", "digits"])
    assert stop.value.code == 130
    assert "the same command with --resume goes on" in capsys.readouterr().err


def test_taken_folder(capsys):
    Path("run").mkdir()
    Path("run/notes.txt").write_text("mine")
    assert "run exists. Pass --resume to go on with it, or another --out." in refused(
        capsys, "train", "digits", "--out", "run"
    )


def test_nothing_to_resume(capsys):
    assert "no run to resume in run" in refused(capsys, "train", "digits", "--out", "run", "--resume")


def test_resuming_with_other_options(capsys):
    main(["train", "digits", "--out", "run", *SHORT])
    capsys.readouterr()
    line = refused(capsys, "train", "digits", "--out", "run", "--resume", "--format", "tt", *SHORT)
    assert "started with --format ttm, not with --format tt. Pass --format ttm to resume it" in line


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--epochs", "0"], "--epochs must be 1 or more, got 0"),
        (["--epochs", "1", "--method", "compress"], "--epochs must be 2 or more to compress, got 1"),
        (["--max-rank", "0", "--method", "compress"], "TTM: max_rank must be 1 or more, got 0"),
        (["--limit", "0"], "--limit must be 1 row or more, got 0"),
        (["--beta", "-1"], "--beta must be 0 or more, got -1.0"),
        (["--beta", "inf"], "--beta must be 0 or more, got inf"),
        (["--seed", str(2**64)], f"--seed must be an integer of 64 bits, got {2**64}"),
        pytest.param(
            ["--cuda-graphs"],
            "--cuda-graphs needs a GPU, and torch finds none. Leave it out.",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU"),
        ),
        (["--threshold", "1.5"], "--threshold must be from 0 up to but not including 1, got 1.5"),
        (["--max-rank", "0"], "TTM: max_rank must be 1 or more, got 0"),
        (["--max-rank", "-3"], "TTM: max_rank must be 1 or more, got -3"),
        (["--data-dir", "."], "digits comes with scikit-learn and reads no folder"),
    ],
)
def test_bad_numbers(capsys, arguments, text):
    assert text in refused(capsys, "train", "digits", *arguments)


def test_a_terminal_that_lacks_a_sign_shows_another():
    command = ["compare", "digits", *SHORT, "--methods", "fixed", "--budget", "900", "--seeds", "0", "1"]
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii"}
    run = subprocess.run([sys.executable, "-m", "rankfall", *command], capture_output=True, env=ascii_only, check=False)
    assert run.returncode == 0, run.stderr
    assert b"% ? " in run.stdout


def test_missing_and_truncated_data(capsys, mini_mnist: Path):
    assert "no folder nowhere. Pass --data-dir" in refused(capsys, "train", "mnist", "--data-dir", "nowhere")
    damaged = next(mini_mnist.glob("train-images*"))
    damaged.write_bytes(damaged.read_bytes()[:100])
    assert "is damaged" in refused(capsys, "train", "mnist", "--data-dir", str(mini_mnist))


@pytest.mark.parametrize("command", ["train", "compare"])
def test_help_names_values_that_can_be_passed(capsys, command):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    shown = capsys.readouterr().out
    assert "--format {cp,tucker,tt,ttm,tr}" in shown
    assert "None" not in shown


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_help_may_be_cut_off(unbuffered):
    reads, writes = os.pipe()
    os.close(reads)
    command = [sys.executable, "-m", "rankfall", "train", "--help"]
    env = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(command, stdout=writes, stderr=subprocess.PIPE, text=True, env=env, check=False)
    os.close(writes)
    assert (done.returncode, done.stderr) == (1, "")


def test_unknown_choices_list_the_known(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "digits", "--format", "svd"])
    assert stop.value.code == 2
    said = " ".join(capsys.readouterr().err.replace("│", "").split())
    assert "invalid choice 'svd' for argument '--format'. Expected one of ('cp', 'tucker', 'tt', 'ttm', 'tr')." in said


def write_net(body: str) -> None:
    Path("my_net.py").write_text(f"import torch\nfrom torch import nn\n\ndef make():\n    return {body}\n")
    importlib.invalidate_caches()
    sys.modules.pop("my_net", None)


def test_plan_counts_the_model_of_a_user(capsys):
    write_net("nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 10))")
    main(["plan", "my_net:make", "--format", "tt", "--max-rank", "8"])
    printed = capsys.readouterr().out
    expected = rf.tensorize_(nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 10)), rf.TT(8))
    assert f"{rf.summary(expected).parameters:,}" in printed
    assert "dense      102.8" in printed
    assert "6.5 MB" in printed
    assert "need an example" not in printed


def test_plan_counts_every_layer_of_an_example(capsys):
    write_net("nn.Sequential(nn.Conv2d(16, 32, 3), nn.Flatten(), nn.Linear(32 * 36, 10)), torch.zeros(5, 16, 8, 8)")
    main(["plan", "my_net:make", "--format", "tucker", "--max-rank", "4"])
    printed = capsys.readouterr().out
    assert f"dense {2 * 5 * 36 * 32 * 16 * 9 / 1e6:>10,.1f}" in printed
    assert "forward pass of the example" in printed
    assert "need an example" not in printed


def test_plan_says_what_it_could_not_count(capsys):
    write_net("nn.Sequential(nn.Conv2d(16, 32, 3), nn.Flatten(), nn.Linear(32 * 36, 10))")
    main(["plan", "my_net:make"])
    assert "let the function return (model, inputs)" in capsys.readouterr().out


def test_plan_refuses_an_example_that_does_not_fit(capsys):
    write_net("nn.Sequential(nn.Linear(784, 512)), torch.zeros(2, 3)")
    assert "Sequential cannot run the example: RuntimeError" in refused(capsys, "plan", "my_net:make")


@pytest.mark.parametrize(
    ("target", "text"),
    [
        ("my_net", "must be given as MODULE:FACTORY, got 'my_net'"),
        ("no_such_module:make", "'no_such_module:make' cannot be imported"),
        ("torch:no_such_name", "'torch:no_such_name' cannot be imported"),
        ("builtins:dict", "returned a dict. It must return a torch.nn.Module, or (model, inputs)"),
        ("torch.nn:ReLU", "ReLU has no layer to tensorize"),
        ("math:pi", "'math:pi' is a float, and must be a function that makes the model."),
    ],
)
def test_plan_refuses(capsys, target, text):
    assert text in refused(capsys, "plan", target)


def test_plan_refuses_a_module_with_a_mistake(capsys):
    write_net("(")
    assert "'my_net:make' cannot be imported: '(' was never closed" in refused(capsys, "plan", "my_net:make")


def test_precision_reaches_the_products_and_not_the_parameters(monkeypatch):
    seen = set()
    forward = rf.nn.Linear.forward
    monkeypatch.setattr(rf.nn.Linear, "forward", lambda layer, x: _noted(seen, layer.training, forward(layer, x)))
    _run.train(TrainOptions("digits", precision="bfloat16", epochs=2, limit=100), progress=False)
    assert seen == {(True, torch.bfloat16), (False, torch.float32)}
    saved = safetensors.torch.load_file("runs/digits-ttm-evidence-seed0/model.safetensors")
    assert {value.dtype for value in saved.values() if value.is_floating_point()} == {torch.float32}


def _noted(seen, training, value):
    seen.add((training, value.dtype))
    return value


def test_options_reach_the_model():
    options = TrainOptions("digits", format="cp", max_rank=3, prior="log-uniform", posterior="point")
    model = _run.build_model(_run.RECIPES["digits"].network(None), options)
    weight = model[0].weight
    assert (weight.format, weight.prior, weight.posterior) == (rf.CP(3), rf.LogUniform(), rf.Point())


@pytest.fixture
def mini_mnist(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mnist")
    write_mnist(folder)
    return folder
