# SPDX-License-Identifier: Apache-2.0
"""Clicks: what is read of prepared rows, made-up rows, their figures, and the model of the recipe."""

import json
import math
import types
from functools import partial
from pathlib import Path

import polars as pl
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import rankfall as rf
from criteo_files import click_lines
from rankfall._processes import Processes
from rankfall.cli import main
from rankfall.recipes import _clicks, _run, criteo
from rankfall.recipes._data import Data
from rankfall.recipes._folder import RunFolder
from rankfall.recipes._metrics import click_figures
from rankfall.recipes._options import TrainOptions
from rankfall.recipes._prepare import PrepareOptions, prepare
from rankfall.recipes._recommender import COUNTS, KAGGLE_SIZES, Recommender, table_modes
from rankfall.recipes._run import build_model, load_data

SIZES = (5, 1200, 17, *[3] * 23)


@pytest.fixture
def rows(tmp_path, monkeypatch):
    """A folder of prepared rows, from an empty working directory."""
    monkeypatch.chdir(tmp_path)
    Path("train.txt").write_text("\n".join(click_lines(60)))
    prepare(PrepareOptions("criteo", (Path("train.txt"),), Path("rows"), test_part=0.3), progress=False)
    return Path("rows")


@pytest.fixture
def small_tables(monkeypatch):
    """Made-up rows of small tables in place of the full size."""
    monkeypatch.setattr(criteo, "KAGGLE_SIZES", SIZES)
    monkeypatch.setattr(criteo, "Truth", partial(_clicks.Truth, SIZES))
    criteo._made_up.cache_clear()
    yield
    criteo._made_up.cache_clear()


def refused(capsys, command: str) -> str:
    """The one line that a command ends with, after checking that nothing else came of it."""
    before = sorted(Path().rglob("*"))
    with pytest.raises(SystemExit) as stop:
        main(command.split())
    assert stop.value.code == 2
    assert sorted(Path().rglob("*")) == before
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize(
    ("content", "error", "text"),
    [
        (None, FileNotFoundError, r"no .*criteo.json. Make it by `rankfall prepare criteo train.txt --out"),
        ("{", ValueError, r"criteo.json is damaged: .*Prepare the rows again"),
        ("{}", ValueError, r"criteo.json is damaged: files.train is missing or wrong. Prepare the rows again"),
        ("[3]", ValueError, r"criteo.json is damaged: files.train is missing or wrong"),
    ],
)
def test_a_folder_that_is_not_prepared(tmp_path, content, error, text):
    if content is not None:
        (tmp_path / "criteo.json").write_text(content)
    with pytest.raises(error, match=text):
        criteo.RECIPE.network(None, tmp_path)


def renote(rows: Path, change) -> None:
    """Changes the note of prepared rows."""
    note = rows / "criteo.json"
    index = json.loads(note.read_text())
    change(index)
    note.write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda index: index["files"].pop("test"), "files.test"),
        (lambda index: index["files"].update(train=[]), "files.train"),
        (lambda index: index["files"].update(train=[3]), "files.train"),
        (lambda index: index.update(files=["train-00000.parquet"]), "files.train"),
        (lambda index: index.pop("rows"), "rows.train"),
        (lambda index: index["rows"].update(test=0), "rows.test"),
        (lambda index: index["sizes"].pop(), "sizes"),
        (lambda index: index.update(sizes=["many"] * 26), "sizes"),
    ],
)
def test_a_note_that_lacks_something(rows, capsys, change, fault):
    renote(rows, change)
    line = refused(capsys, "train criteo --data-dir rows --out run")
    assert f"criteo.json is damaged: {fault} is missing or wrong. Prepare the rows again." in line


def test_ids_must_be_rows_of_their_tables(rows, capsys):
    renote(rows, lambda index: index["sizes"].__setitem__(25, 2))
    line = refused(capsys, "train criteo --data-dir rows --out run")
    assert "rows/train-00000.parquet holds " in line
    assert " in column C26, where numbers from 0 to 1 are expected. Prepare the rows again." in line


def test_a_column_that_is_missing(rows, capsys):
    path = rows / "test-00000.parquet"
    pl.read_parquet(path).drop("C7").write_parquet(path)
    line = refused(capsys, "train criteo --data-dir rows --out run")
    assert "test-00000.parquet is missing or damaged: " in line
    assert "C7" in line


def test_a_damaged_part_is_named(rows):
    (rows / "train-00000.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"train-00000.parquet is missing or damaged: .*Prepare the rows again"):
        criteo.RECIPE.load(rows)


def test_rows_are_needed(tmp_path):
    recipe = criteo.RECIPE
    with pytest.raises(FileNotFoundError, match=r"criteo needs --synthetic, or --data-dir"):
        load_data(recipe, TrainOptions("criteo"))
    with pytest.raises(ValueError, match=r"--synthetic makes rows up, and --data-dir reads them"):
        load_data(recipe, TrainOptions("criteo", synthetic=True, data_dir=tmp_path))


def test_missing_rows_come_before_missing_memory(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(_run.psutil, "virtual_memory", lambda: types.SimpleNamespace(available=1))
    for command in ("train criteo --method dense", "compare criteo --methods dense"):
        assert "criteo needs --synthetic, or --data-dir" in refused(capsys, command)


@pytest.mark.parametrize("in_memory", [1000, 1])
def test_figures_of_clicks_need_rows_with_and_without(tmp_path, monkeypatch, capsys, in_memory):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(criteo, "_IN_MEMORY", in_memory)
    Path("train.txt").write_text("\n".join(f"0{line[1:]}" for line in click_lines(60)))
    prepare(PrepareOptions("criteo", (Path("train.txt"),), Path("rows")), progress=False)
    line = refused(capsys, "train criteo --data-dir rows --out run")
    assert "all rows to test with have the same label, and AUC and normalised entropy need both. Pass a larger" in line
    with pytest.raises(ValueError, match=r"all rows to test with have the same label"):
        click_figures(torch.randn(5), torch.ones(5, dtype=torch.int64))


@pytest.mark.usefixtures("small_tables")
@pytest.mark.parametrize("limit", [1, 10])
def test_few_made_up_rows(tmp_path, monkeypatch, limit):
    monkeypatch.chdir(tmp_path)
    main(f"train criteo --synthetic --limit {limit} --epochs 1 --max-rank 2 --out run".split())
    metrics = json.loads(Path("run/metrics.json").read_text())
    assert 0 <= metrics["test_auc"] <= 1
    planted = {f"tables.{k}": rank for k, rank in enumerate(_clicks.Truth(SIZES).ranks)}
    assert metrics["truth_ranks"] == planted
    assert planted.keys() <= metrics["ranks"].keys()


@pytest.mark.parametrize("method", ["dense", "evidence"])
def test_prepare_and_train(tmp_path, monkeypatch, capsys, method):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.txt").write_text("\n".join(click_lines(300)))
    main(["prepare", "criteo", "train.txt", "--out", "rows"])
    assert "rows in 26 tables\nnext: rankfall train criteo --data-dir rows" in capsys.readouterr().out
    main(f"train criteo --data-dir rows --method {method} --epochs 1 --max-rank 2 --out run".split())
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert 0 <= metrics["test_auc"] <= 1
    assert metrics["test_normalised_entropy"] > 0
    sizes = json.loads((tmp_path / "rows" / "criteo.json").read_text())["sizes"]
    assert metrics["dense_parameters"] == sum(p.numel() for p in Recommender(sizes).parameters())


def test_on_few_rows_training_is_longer_and_in_smaller_batches(rows, monkeypatch):
    few, many = criteo.RECIPE.network(None, rows), criteo.RECIPE.network(None)
    assert (few.batch_size, few.lr, few.epochs, len(few.formats)) == (128, 5e-4, 40, 0)
    assert (many.batch_size, many.lr, many.epochs, len(many.formats)) == (1024, 5e-4, 16, 7)
    monkeypatch.setattr(criteo, "_FEW", 10)
    assert criteo.RECIPE.network(None, rows).batch_size == 1024


def test_the_published_size():
    model = Recommender()
    assert sum(p.numel() for p in model.parameters()) == 4_322_224_385
    assert sum(KAGGLE_SIZES) == 33_762_577
    network = criteo.RECIPE.network(None)
    compact = build_model(network, TrainOptions("criteo", synthetic=True))
    assert not any(p.is_meta for p in compact.parameters())
    counts = rf.summary(compact)
    assert counts.dense_parameters == 4_322_224_385
    assert len(counts.layers) == 26 + 7
    with pytest.raises(ValueError, match=r"the dense network needs 69.1 GB with gradients .* GB are free"):
        build_model(network, TrainOptions("criteo", synthetic=True, method="dense"))


def test_the_model_is_dlrm():
    torch.manual_seed(0)
    model = Recommender(SIZES, stored=True)
    rows = _clicks.draw(6, SIZES, torch.Generator().manual_seed(0))
    vectors = [model.bottom(torch.log1p(rows[:, :COUNTS].clamp(min=0).float()))]
    vectors += [0.3 * table.weight[ids.long()] for table, ids in zip(model.tables, rows[:, COUNTS:].T, strict=True)]
    products = [(vectors[i] * vectors[j]).sum(1) / 128**0.5 for i in range(27) for j in range(i + 1, 27)]
    logits = model(rows)
    expected = model.top(torch.cat([vectors[0], torch.stack(products, 1)], 1))
    assert torch.allclose(logits[:, 1:], expected, atol=1e-4)
    assert not bool(logits[:, 0].any())
    direction = torch.randn(6)
    leaves = list(model.parameters())
    found = torch.autograd.grad((logits[:, 1] * direction).sum(), leaves)
    close = torch.autograd.grad((expected[:, 0] * direction).sum(), leaves)
    torch.testing.assert_close(found, close, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("rows", [3, 1000, 1001, 5461306])
def test_modes_hold_every_row(rows):
    (a, b, c), width = table_modes(rows)
    assert rows <= a * b * c <= 1.02 * rows
    assert width[0] * width[1] * width[2] == 128


def test_the_parts_of_the_truth_add_up_to_it():
    truth = _clicks.Truth(SIZES)
    rows = _clicks.draw(700, SIZES, torch.Generator().manual_seed(0))
    alone, pairs = truth.parts(rows)
    assert alone.shape == pairs.shape == (700, 27)
    rest = truth(rows) - alone.sum(1) - pairs.sum(1)
    assert torch.allclose(rest, rest[:1], atol=1e-4)
    assert float(pairs.std()) > 0.01


def test_made_up_rows_are_those_of_their_seed():
    truth = _clicks.Truth(SIZES)
    few, many = (_clicks.make_clicks(count, 3, truth) for count in (50, 70_000))
    assert torch.equal(few.rows, many.rows[:50])
    assert torch.equal(few.labels, many.labels[:50])
    assert not torch.equal(few.rows, _clicks.make_clicks(50, 4, truth).rows)
    again = _clicks.Truth(SIZES)
    assert torch.equal(again(few.rows), few.log_odds)
    ids = many.rows[:, COUNTS:]
    assert bool((ids >= 0).all() & (ids < torch.tensor(SIZES)).all())
    assert int(many.rows[:, :COUNTS].min()) == -1


def test_a_stream_gives_the_rows_of_its_seed_an_epoch_at_a_time(monkeypatch):
    monkeypatch.setattr(_clicks, "_CHUNK", 40)
    truth = _clicks.Truth((30, 1001))
    whole = _clicks.make_clicks(100, 3, truth)
    batches = _clicks.ClickStream(100, 3, truth, per_epoch=50).batches(16)
    assert len(_clicks.ClickStream(100, 3, truth, per_epoch=50)) == 100
    first = list(batches)
    assert [len(labels) for _, labels in first] == [16, 16, 8, 16, 16, 8]
    assert torch.equal(torch.cat([rows for rows, _ in first]), whole.rows[:80])
    assert torch.equal(torch.cat([labels for _, labels in first]), whole.labels[:80])
    state = batches.state_dict()
    assert torch.equal(next(iter(batches))[0], whole.rows[80:96])  # Who only looks does not move it on.
    second = torch.cat([rows for rows, _ in batches])
    assert torch.equal(second, torch.cat([whole.rows[80:], whole.rows[:40]]))
    again = _clicks.ClickStream(200, 3, truth, per_epoch=50).first(100).batches(16)
    again.load_state_dict(state)
    assert torch.equal(torch.cat([rows for rows, _ in again]), second)


def test_a_stream_goes_on_where_the_phase_before_has_left_it(monkeypatch):
    monkeypatch.setattr(_clicks, "_CHUNK", 40)
    truth, seen = _clicks.Truth((30, 1001)), []

    def fit(model, loader, nll, *, epochs, **_):
        for _ in range(epochs):
            seen.extend(rows for rows, _ in loader)
        return [{"epoch": epoch, "seconds": 0.0} for epoch in range(epochs)]

    monkeypatch.setattr(_run, "fit", fit)
    network, options = _run.RECIPES["digits"].network(None), TrainOptions("digits", method="compress", epochs=4)
    data = Data(_clicks.ClickStream(200, 3, truth, per_epoch=40), (torch.zeros(0), torch.zeros(0)))
    _run._fit(network, options, build_model(network, options), data, RunFolder(options), Processes(), False)
    assert torch.equal(torch.cat(seen), _clicks.make_clicks(200, 3, truth).rows[:160])


def test_made_up_clicks_follow_the_truth():
    made = _clicks.make_clicks(60_000, 0, _clicks.Truth(SIZES))
    assert float(made.labels.float().mean()) == pytest.approx(_clicks._CLICK_RATE, abs=0.02)
    assert float(made.log_odds.std()) == pytest.approx(_clicks._SPREAD, rel=0.1)
    for low in (-4.0, -2.0, 0.0, 1.0):
        chosen = (made.log_odds > low) & (made.log_odds < low + 1)
        said, came = made.log_odds[chosen].sigmoid().mean(), made.labels[chosen].float().mean()
        assert float(came) == pytest.approx(float(said), abs=5 * 0.5 / int(chosen.sum()) ** 0.5)
    frequency = torch.bincount(made.rows[:, COUNTS + 1]).sort(descending=True).values.float()
    assert float(frequency[0] / frequency[9]) == pytest.approx(10**_clicks._EXPONENT, rel=0.4)


def test_the_truth_is_of_the_planted_rank():
    sizes = (30, 1001, 1)
    truth = _clicks.Truth(sizes)
    rows = torch.zeros(1001, COUNTS + 3, dtype=torch.int32)
    rows[:, COUNTS + 1] = torch.arange(1001)
    rows[:, COUNTS] = torch.arange(1001) % 30
    vectors = truth.vectors(rows)
    for k, rank in enumerate(truth.ranks[:2]):
        (a, b, c), width = table_modes(sizes[k])
        table = torch.zeros(a * b * c, 128)
        table[: sizes[k]] = vectors[: sizes[k], k + 1]
        matrices = table[: a * b * c].view(a, b, c, *width).permute(0, 3, 1, 4, 2, 5)
        # The rows that pad the last digits are not those of the table.
        whole = matrices if a * b * c == sizes[k] else matrices[: a - 1]
        first = whole.reshape(len(whole) * width[0], -1)
        last = whole.reshape(-1, c * width[2])
        assert [int(torch.linalg.matrix_rank(m)) for m in (first, last)] == [rank, rank]
    assert truth.ranks == (1, 2, 1)


@given(st.lists(st.tuples(st.sampled_from([-90.0, -1.5, 0.0, 40.0, 40.5, 41.0]), st.booleans()), min_size=2))
def test_auc_counts_pairs_and_half_of_the_ties(drawn):
    scores, clicked = torch.tensor([s for s, _ in drawn]), torch.tensor([int(c) for _, c in drawn])
    assume(0 < int(clicked.sum()) < len(drawn))
    above = scores[clicked == 1].unsqueeze(1) - scores[clicked == 0]
    pairs = ((above > 0).double() + (above == 0).double() / 2).mean()
    found = click_figures(scores, clicked)
    assert found["auc"] == pytest.approx(float(pairs), abs=1e-6)  # The library's sums are of float32.
    assert math.isfinite(found["normalised_entropy"])


def test_large_log_odds_do_not_tie():
    figures = click_figures(torch.tensor([50.0, 40.0, 60.0, 45.0]), torch.tensor([1, 0, 1, 0]))
    assert figures["auc"] == 1.0
    assert figures["normalised_entropy"] == pytest.approx(85 / 4 / math.log(2), rel=1e-12)


def test_click_figures_of_the_truth_are_best():
    made = _clicks.make_clicks(4_000, 0, _clicks.Truth(SIZES))
    known = click_figures(made.log_odds, made.labels)
    worse = click_figures(made.log_odds + torch.randn(4_000), made.labels)
    assert 0.75 < known["auc"] < 0.9
    assert worse["auc"] < known["auc"]
    assert known["normalised_entropy"] < worse["normalised_entropy"]
    constant = click_figures(torch.zeros(4_000).fill_(float(made.labels.float().mean().logit())), made.labels)
    assert constant == {"auc": 0.5, "normalised_entropy": pytest.approx(1.0)}
