# SPDX-License-Identifier: Apache-2.0
"""Click logs: their preparation against a reading in plain Python, made-up rows, and the model of the recipe."""

import gzip
import json
import lzma
from collections import Counter

import polars as pl
import pytest
import torch

import rankfall as rf
from criteo_files import click_lines
from rankfall.cli import main
from rankfall.recipes import _clicks, _prepare, criteo
from rankfall.recipes._metrics import click_figures
from rankfall.recipes._options import TrainOptions
from rankfall.recipes._prepare import PrepareOptions, prepare
from rankfall.recipes._recommender import COUNTS, KAGGLE_SIZES, Recommender, table_modes
from rankfall.recipes._run import build_model, load_data

SIZES = (5, 1200, 17, *[3] * 23)


def prepared(tmp_path, lines, *, name="train.txt", opener=open, **options):
    path = tmp_path / name
    with opener(path, "wt") as file:
        file.write("".join(f"{line}\n" for line in lines))
    out = tmp_path / "out"
    return prepare(PrepareOptions("criteo", (path,), out, **options), progress=False), out


def read(out, part):
    files = json.loads((out / "criteo.json").read_text())["files"][part]
    return pl.concat([pl.read_parquet(out / name) for name in files])


def by_hand(lines, is_test, least_count):
    """(columns of all rows with ids by falling frequency among the training rows, rows of each table)."""
    fields = [line.split("\t") for line in lines]
    columns, sizes = [], []
    for k in range(26):
        values = [int(f[1 + COUNTS + k], 16) if f[1 + COUNTS + k] else None for f in fields]
        seen = Counter(v for v, t in zip(values, is_test, strict=True) if v is not None and not t)
        kept = [v for v, n in sorted(seen.items(), key=lambda item: (-item[1], item[0])) if n >= least_count]
        ids = {value: place + 1 for place, value in enumerate(kept)}
        columns.append([ids.get(v, 0) for v in values])
        sizes.append(len(kept) + 1)
    counts = [[int(f[1 + k]) if f[1 + k] else -1 for f in fields] for k in range(COUNTS)]
    return [[int(f[0]) for f in fields], *counts, *columns], sizes


@pytest.mark.parametrize("least_count", [1, 9])
@pytest.mark.parametrize(("name", "opener"), [("t.txt", open), ("t.txt.gz", gzip.open), ("t.txt.xz", lzma.open)])
def test_prepared_rows_are_those_of_the_file(tmp_path, monkeypatch, least_count, name, opener):
    monkeypatch.setattr(_prepare, "_BLOCK", 7_000)  # Some forty lines.
    lines = click_lines(200)
    index, out = prepared(tmp_path, lines, name=name, opener=opener, least_count=least_count, test_part=0.3)
    is_test = _prepare._is_test(torch.arange(200).numpy().astype("uint64"), 0.3)
    columns, sizes = by_hand(lines, is_test, least_count)
    assert index["sizes"] == sizes
    for part, chosen in (("train", ~is_test), ("test", is_test)):
        rows = read(out, part)
        assert index["rows"][part] == len(rows) == int(chosen.sum())
        assert [rows[name].to_list() for name in rows.columns] == [
            [value for value, taken in zip(column, chosen, strict=True) if taken] for column in columns
        ]
    assert 30 < index["rows"]["test"] < 90
    assert len(index["files"]["train"]) > 3


def test_rows_for_testing_do_not_depend_on_the_files(tmp_path):
    lines = click_lines(60)
    _, whole = prepared(tmp_path, lines, test_part=0.4)
    paths = [tmp_path / "a", tmp_path / "b"]
    for path, part in zip(paths, (lines[:25], lines[25:]), strict=True):
        path.write_text("\n".join(part))  # No newline at the end.
    prepare(PrepareOptions("criteo", tuple(paths), tmp_path / "two", test_part=0.4), progress=False)
    for part in ("train", "test"):
        assert read(whole, part).equals(read(tmp_path / "two", part))


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("2\t1", "at byte BAD"),
        ("1" + "\t" * 38, "at byte BAD"),
        ("1\tx" + "\t" * 38, "at byte BAD"),
        ("1" + "\t" * 38 + "\tzz", "at byte BAD"),
        ("1" + "\t" * 38 + "\t123456789", "at byte BAD"),
    ],
)
def test_a_damaged_line_is_named_and_nothing_looks_whole(tmp_path, line, text):
    lines = click_lines(20)
    place = sum(len(good) + 1 for good in lines)
    with pytest.raises(ValueError, match=text.replace("BAD", str(place))) as error:
        prepared(tmp_path, [*lines, line, *lines])
    assert "train.txt is damaged after byte 0" in str(error.value)
    assert "A line has a label, 13 integers and 26 hexadecimal numbers" in str(error.value)
    assert not (tmp_path / "out" / "criteo.json").exists()


@pytest.mark.parametrize(("ending", "pack"), [(".gz", gzip.compress), (".xz", lzma.compress)])
def test_a_truncated_archive(tmp_path, ending, pack):
    path = tmp_path / f"train.txt{ending}"
    path.write_bytes(pack("\n".join(click_lines(50)).encode())[:-30])
    with pytest.raises(ValueError, match=r"train.txt\..z is damaged before byte \d+"):
        prepare(PrepareOptions("criteo", (path,), tmp_path / "out"), progress=False)


def test_what_an_interruption_leaves_is_cleared_and_what_is_whole_is_kept(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "train-00007.parquet").write_text("half")
    (out / ".criteo.json.abcd.tmp").write_text("half")
    prepared(tmp_path, click_lines(30))
    assert not (out / "train-00007.parquet").exists()
    assert not (out / ".criteo.json.abcd.tmp").exists()
    with pytest.raises(ValueError, match=r"out holds prepared rows. Pass another --out"):
        prepared(tmp_path, click_lines(30))
    (out / "criteo.json").unlink()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"out holds notes.txt, which is not of a preparation"):
        prepared(tmp_path, click_lines(30))
    assert (out / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"files": ()}, r"no file to prepare"),
        ({"least_count": 0}, r"--least-count must be 1 or more, got 0"),
        ({"test_part": 1.0}, r"--test-part must be above 0 and below 1, got 1.0"),
    ],
)
def test_bad_choices(tmp_path, options, text):
    (tmp_path / "t").write_text("")
    given = {"files": (tmp_path / "t",), "out": tmp_path / "out"} | options
    with pytest.raises(ValueError, match=text):
        prepare(PrepareOptions("criteo", **given), progress=False)
    with pytest.raises(FileNotFoundError, match=r"no file .*gone"):
        prepare(PrepareOptions("criteo", (tmp_path / "gone",), tmp_path / "out"), progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "error", "text"),
    [
        (None, FileNotFoundError, r"no .*criteo.json. Make it by `rankfall prepare criteo train.txt --out"),
        ("{", ValueError, r"criteo.json is damaged: .*Prepare the rows again"),
        ("{}", ValueError, r"criteo.json is damaged: files, rows or sizes are missing"),
    ],
)
def test_a_folder_that_is_not_prepared(tmp_path, content, error, text):
    if content is not None:
        (tmp_path / "criteo.json").write_text(content)
    with pytest.raises(error, match=text):
        criteo.RECIPE.network(None, tmp_path)


def test_a_damaged_part_is_named(tmp_path):
    _, out = prepared(tmp_path, click_lines(30))
    (out / "train-00000.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"train-00000.parquet is missing or damaged: .*Prepare the rows again"):
        criteo.RECIPE.load(out)


def test_rows_are_needed(tmp_path):
    recipe = criteo.RECIPE
    with pytest.raises(FileNotFoundError, match=r"criteo needs --synthetic, or --data-dir"):
        load_data(recipe, TrainOptions("criteo"))
    with pytest.raises(ValueError, match=r"--synthetic makes rows up, and --data-dir reads them"):
        load_data(recipe, TrainOptions("criteo", synthetic=True, data_dir=tmp_path))


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


def test_on_few_rows_training_is_longer_and_in_smaller_batches(tmp_path, monkeypatch):
    _, out = prepared(tmp_path, click_lines(30))
    few, many = criteo.RECIPE.network(None, out), criteo.RECIPE.network(None)
    assert (few.batch_size, few.lr, few.epochs, len(few.formats)) == (128, 5e-4, 40, 0)
    assert (many.batch_size, many.lr, many.epochs, len(many.formats)) == (1024, 5e-4, 16, 7)
    monkeypatch.setattr(criteo, "_FEW", 10)
    assert criteo.RECIPE.network(None, out).batch_size == 1024


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


def test_click_figures_of_the_truth_are_best():
    made = _clicks.make_clicks(4_000, 0, _clicks.Truth(SIZES))
    known = click_figures(made.log_odds, made.labels)
    worse = click_figures(made.log_odds + torch.randn(4_000), made.labels)
    assert 0.75 < known["auc"] < 0.9
    assert worse["auc"] < known["auc"]
    assert known["normalised_entropy"] < worse["normalised_entropy"]
    constant = click_figures(torch.zeros(4_000).fill_(float(made.labels.float().mean().logit())), made.labels)
    assert constant == {"auc": 0.5, "normalised_entropy": pytest.approx(1.0)}
