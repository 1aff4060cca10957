# SPDX-License-Identifier: Apache-2.0
"""`rankfall compare`: one table of all methods, resumed by the same command; and the method train-then-compress."""

import json
import shutil
import statistics
from pathlib import Path

import pytest
import torch

import rankfall as rf
from commands import files, refused
from rankfall.cli import main
from rankfall.recipes import _run
from rankfall.recipes._compare import _FIGURES, CompareOptions, compare, rank_of_size
from rankfall.recipes._folder import RunFolder
from rankfall.recipes._options import TrainOptions

METHODS = ["dense", "fixed", "compress", "shrinkage", "evidence"]
SHORT = ["--epochs", "4", "--limit", "200", "--seeds", "0", "1"]
RUN = ["compare", "digits", *SHORT, "--out", "all"]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The folder of a finished comparison; copy it before changing anything."""
    folder = tmp_path_factory.mktemp("whole") / "all"
    compare(CompareOptions("digits", epochs=4, limit=200, seeds=(0, 1), out=folder), progress=False)
    return folder


def content_of(folder: Path) -> dict:
    return json.loads((folder / "compare.json").read_text())


def test_rows_hold_every_figure_of_every_seed(whole: Path):
    content = content_of(whole)
    assert content["seeds"] == [0, 1]
    assert [row["method"] for row in content["rows"]] == METHODS
    for row in content["rows"]:
        for name in ("test_accuracy", "test_nll", "parameters", "compression", "seconds"):
            runs = [json.loads((whole / f"{row['method']}-seed{seed}/metrics.json").read_text()) for seed in (0, 1)]
            values = [run[name] for run in runs]
            std = statistics.stdev(values)
            figure = {"mean": statistics.mean(values), "std": std, "error": std / 2**0.5, "values": values}
            assert row[name] == figure
        assert row["epoch_seconds_first"]["mean"] > 0
        assert row["epoch_seconds_last"]["mean"] > 0


def test_folders_are_whole(whole: Path):
    folders = [f"{method}-seed{seed}" for method in METHODS for seed in (0, 1)]
    assert sorted(p.name for p in whole.iterdir()) == sorted(["compare.json", *folders])
    for name in folders:
        assert sorted(p.name for p in (whole / name).iterdir()) == [
            "config.json", "history.jsonl", "metrics.json", "model.safetensors", "ranks.png",
        ]  # fmt: skip
        model = rf.load(whole / name / "model.safetensors", _run.RECIPES["digits"].network(None).make())
        assert rf.summary(model).parameters == json.loads((whole / name / "metrics.json").read_text())["parameters"]


def test_second_call_trains_nothing_and_prints_the_table(whole: Path, monkeypatch, capsys):
    shutil.copytree(whole, "all")
    monkeypatch.setattr(_run, "_fit", None)
    main(RUN)
    assert content_of(Path("all")) == content_of(whole)
    printed = capsys.readouterr().out.splitlines()
    first = next(k for k, line in enumerate(printed) if line.startswith("method"))
    assert [line.split()[0] for line in printed[first + 1 : first + 6]] == METHODS
    accuracy = content_of(whole)["rows"][0]["test_accuracy"]
    assert f"{accuracy['mean']:.2%} ± {accuracy['std']:.2%}" in printed[first + 1]
    assert "…" not in "".join(printed)


def test_what_is_finished_needs_no_memory(whole: Path, monkeypatch):
    shutil.copytree(whole, "all")
    monkeypatch.setattr("rankfall.recipes._compare.obstacle", lambda *_: "it is too large.")
    monkeypatch.setattr(_run, "_in_memory", None)
    main(RUN)
    assert content_of(Path("all")) == content_of(whole)


def test_one_seed_has_no_spread(whole: Path, monkeypatch, capsys):
    shutil.copytree(whole, "all")
    monkeypatch.setattr(_run, "_fit", None)
    main([*RUN, "--seeds", "1"])
    assert content_of(Path("all"))["rows"][0]["test_nll"]["std"] is None
    assert "±" not in capsys.readouterr().out


# A run writes its history after each of four epochs, and once at its end.
@pytest.mark.parametrize("writes", [1, 12, 23], ids=["in the first run", "in the third run", "in the factors"])
def test_interrupted_comparison_goes_on_by_the_same_command(whole: Path, monkeypatch, capsys, writes):
    write, calls = RunFolder.write_history, []

    def interrupt(folder: RunFolder, history: list) -> None:
        calls.append(folder)
        if len(calls) == writes:
            raise KeyboardInterrupt
        write(folder, history)

    with monkeypatch.context() as patched:
        patched.setattr(RunFolder, "write_history", interrupt)
        with pytest.raises(SystemExit) as stop:
            main([*RUN, "--seeds", "0"])
    assert stop.value.code == 130
    assert "interrupted; the same command goes on." in capsys.readouterr().err
    assert not Path("all/compare.json").exists()
    done = {path: time for path, time in files().items() if path.name == "metrics.json"}
    main([*RUN, "--seeds", "0"])
    assert done.items() <= files().items()
    for method in METHODS:
        one, other = (folder / f"{method}-seed0/model.safetensors" for folder in (whole, Path("all")))
        assert one.read_bytes() == other.read_bytes()


def test_given_ranks_are_of_the_size_that_evidence_ended_at(monkeypatch):
    seen = {}

    def train(run: TrainOptions, *, progress: bool) -> tuple:
        seen[run.method] = run.max_rank
        figures = dict.fromkeys(_FIGURES, 1.0) | {"epochs": 1}
        folder = RunFolder(run)
        folder.path.mkdir(parents=True)
        folder.write_history([{"seconds": 1.0}])
        return folder, None, figures | {"parameters": size + 20}

    options = TrainOptions("digits", method="fixed", max_rank=3)
    size = rf.summary(_run.build_model(_run.RECIPES["digits"].network(None), options)).parameters
    monkeypatch.setattr("rankfall.recipes._compare.train", train)
    content = compare(CompareOptions("digits", seeds=(0,)))
    assert seen == {"dense": None, "evidence": None, "shrinkage": None, "fixed": 3, "compress": 3}
    assert [row["max_rank"] for row in content["rows"]] == [[None], [3], [3], [8], [8]]


def test_some_methods_alone(whole: Path, monkeypatch):
    shutil.copytree(whole, "all")
    monkeypatch.setattr(_run, "_fit", None)
    rows = {row["method"]: row for row in content_of(whole)["rows"]}
    for methods in (["evidence", "fixed"], ["shrinkage", "dense"]):
        main([*RUN, "--methods", *methods])
        assert content_of(Path("all"))["rows"] == [rows[method] for method in METHODS if method in methods]
        assert content_of(Path("all"))["epochs"] == 4


def test_a_budget_stands_in_for_evidence():
    options = CompareOptions("digits", epochs=2, limit=50, seeds=(0,), methods=("fixed",), budget=5000)
    (row,) = compare(options, progress=False)["rows"]
    assert row["max_rank"] == [rank_of_size(options.run("fixed", 0), 5000)]


def test_nearest_rank():
    run = TrainOptions("digits", method="fixed", format="tt")
    sizes = {
        rank: rf.summary(
            _run.build_model(
                _run.RECIPES["digits"].network(None), TrainOptions("digits", method="fixed", format="tt", max_rank=rank)
            )
        ).parameters
        for rank in (1, 4, 5, 8)
    }
    assert [rank_of_size(run, size) for size in (0, *sizes.values(), 10**9)] == [1, 1, 4, 5, 8, 8]
    assert rank_of_size(run, sizes[4] + (sizes[5] - sizes[4]) // 3) == 4
    assert rank_of_size(run, sizes[5] - (sizes[5] - sizes[4]) // 3) == 5


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--seeds"], "--seeds must be one seed or more, got none. Pass for example --seeds 0 1 2."),
        (["--seeds", "0", "1", "0"], "--seeds must differ from each other, got 0 1 0."),
        (["--epochs", "0"], "--epochs must be 1 or more, got 0."),
        (["--epochs", "1"], "--epochs must be 2 or more to compress, got 1."),
        (["--limit", "0"], "--limit must be 1 row or more, got 0."),
        (["--beta", "-1"], "--beta must be 0 or more, got -1.0."),
        (["--max-rank", "0"], "TTM: max_rank must be 1 or more, got 0."),
        (["--methods", "hashing"], "digits has no method hashing. It has dense, fixed, compress, shrinkage, evidence."),
        (
            ["--methods", "dense", "fixed"],
            "fixed gets the size that evidence ends at, and evidence is not among --methods. Add it, or pass --budget.",
        ),
        (["--data-dir", "."], "digits comes with scikit-learn and reads no folder."),
    ],
)
def test_bad_arguments(capsys, arguments, text):
    assert text in refused(capsys, "compare", "digits", *arguments)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            ["--epochs", "6"],
            "was started with --epochs 4, not with --epochs 6. Pass --epochs 4 to resume it, or start anew in",
        ),
        (["--format", "tt"], "was started with --format ttm, not with --format tt."),
        (["--max-rank", "5"], "was started without --max-rank, not with --max-rank 5. Leave --max-rank out to resume"),
    ],
)
def test_other_options_are_refused(whole: Path, capsys, arguments, text):
    shutil.copytree(whole, "all")
    assert text in refused(capsys, *RUN, *arguments)


def rewrite_configs(change: dict[str, object]) -> None:
    """Rewrites the options of all runs; None removes one."""
    for path in Path("all").glob("*/config.json"):
        options = json.loads(path.read_text()) | change
        path.write_text(json.dumps({name: value for name, value in options.items() if name not in change or value}))


def test_runs_older_than_an_option_go_on_without_it(whole: Path, capsys):
    shutil.copytree(whole, "all")
    rewrite_configs({"cuda_graphs": None})
    main(RUN)
    assert "evidence" in capsys.readouterr().out


def test_a_switch_that_was_on_is_named(whole: Path, capsys):
    shutil.copytree(whole, "all")
    rewrite_configs({"cuda_graphs": True})
    text = "was started with --cuda-graphs, not without --cuda-graphs. Pass --cuda-graphs to resume it"
    assert text in refused(capsys, *RUN)


def test_a_folder_of_a_later_run_that_is_taken_is_refused_first(capsys):
    Path("all/shrinkage-seed1").mkdir(parents=True)
    Path("all/shrinkage-seed1/notes.txt").write_text("mine")
    assert "all/shrinkage-seed1 exists." in refused(capsys, *RUN)


@pytest.mark.parametrize("name", ["tucker", "tt", "ttm"])
def test_compression_at_full_rank_keeps_the_function(name):
    network = _run.RECIPES["digits"].network(None)
    options = TrainOptions("digits", method="compress", format=name, max_rank=10_000)
    model, x = _run.build_model(network, options), torch.randn(5, 64)
    dense = {path: parameter.detach().clone() for path, parameter in model.named_parameters()}
    expected = model(x)
    _run.to_format(model, network, options, from_dense=True)
    for k in (0, 2, 4):
        assert isinstance(model[k], rf.nn.Linear)
        assert model[k].weight.posterior == rf.Point()
        torch.testing.assert_close(model[k].weight.dense(), dense[f"{k}.weight"], atol=1e-5, rtol=1e-5)
        assert torch.equal(model[k].bias, dense[f"{k}.bias"])
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)


def test_compression_splits_layers_as_training_in_the_format_does():
    network = _run.RECIPES["mnist"].network(None)
    compressed, fixed = (
        _run.build_model(network, TrainOptions("mnist", method=method, max_rank=2)) for method in ("compress", "fixed")
    )
    assert not rf.ranks(compressed)
    _run.to_format(compressed, network, TrainOptions("mnist", method="compress", max_rank=2), from_dense=True)
    assert compressed[0].weight.layout == fixed[0].weight.layout
    assert compressed[0].weight.layout.modes == ((8, 4, 2, 8), (7, 4, 4, 7))
    assert compressed[3].weight.layout == fixed[3].weight.layout


def test_the_dense_half_is_a_dense_run_and_tuning_goes_on_from_it():
    common = {"recipe": "digits", "limit": 300, "out": Path("run")}
    _, _, dense = _run.train(TrainOptions(**common | {"out": Path("half")}, method="dense", epochs=3), progress=False)
    folder, _, metrics = _run.train(
        TrainOptions(**common, method="compress", epochs=5, max_rank=10_000), progress=False
    )
    history = folder.read_history()
    assert [record["epoch"] for record in history] == [0, 1, 2, 3, 4]
    assert [bool(record["ranks"]) for record in history] == [False, False, False, True, True]
    assert history[2]["test_nll"] == dense["test_nll"]
    assert history[-1]["nll"] < history[3]["nll"] < history[2]["nll"]
    assert metrics["seconds"] == sum(record["seconds"] for record in history)
    assert (metrics["format"], metrics["prior"]) == ("ttm", None)


def test_a_narrow_terminal_cuts_no_figure_off(whole: Path, monkeypatch, capsys):
    shutil.copytree(whole, "all")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("rich.console.Console.is_terminal", True)
    main(RUN)
    assert "…" not in capsys.readouterr().out


def test_a_history_without_an_epoch_is_named(whole: Path, capsys):
    shutil.copytree(whole, "all")
    Path("all/evidence-seed0/history.jsonl").write_text("")
    capsys.readouterr()
    assert "all/evidence-seed0/history.jsonl is damaged: it is empty." in refused(capsys, *RUN)
