# SPDX-License-Identifier: Apache-2.0
"""Readers of pictures and texts, and the batches that rows are given out in."""

import copy
import lzma
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import rankfall as rf
from rankfall.recipes import _run, cifar10, imdb
from rankfall.recipes._data import Data
from rankfall.recipes._metrics import auroc, figures
from rankfall.recipes._options import TrainOptions
from rankfall.recipes._picture import draw
from rankfall.recipes._recipe import Network, Recipe


def sheet(path, seed=0):
    """A sheet whose pictures are known: picture i has colour i at every place, and one bright point."""
    pictures = np.random.default_rng(seed).integers(0, 256, (10_000, 32, 32, 3), dtype=np.uint8)
    cells = pictures.reshape(100, 100, 32, 32, 3).transpose(0, 2, 1, 3, 4)
    Image.fromarray(cells.reshape(3200, 3200, 3)).save(path, lossless=True, quality=0, method=0)
    return pictures


def test_a_sheet_is_read_picture_by_picture(tmp_path: Path):
    pictures = sheet(tmp_path / "test.webp")
    read = cifar10.read_sheet(tmp_path / "test.webp")
    assert read.shape == (10_000, 3, 32, 32)
    for k in (0, 1, 99, 100, 9_999):
        assert np.array_equal(read[k], pictures[k].transpose(2, 0, 1))
    content = (tmp_path / "test.webp").read_bytes()
    (tmp_path / "half.webp").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=rf"half.webp is damaged within its {len(content) // 2} bytes: .*Get the file"):
        cifar10.read_sheet(tmp_path / "half.webp")


def test_other_pictures_are_no_sheets(tmp_path: Path):
    Image.new("RGB", (32, 32)).save(tmp_path / "small.webp")
    with pytest.raises(ValueError, match=r"small.webp is a picture of \(32, 32\), not a sheet of 3200 x 3200"):
        cifar10.read_sheet(tmp_path / "small.webp")
    (tmp_path / "text.webp").write_text("no picture")
    with pytest.raises(ValueError, match=r"text.webp is damaged within its 10 bytes"):
        cifar10.read_sheet(tmp_path / "text.webp")
    with pytest.raises(FileNotFoundError, match=r"no file .*none.webp. Pass --data-dir with the sheets"):
        cifar10.read_sheet(tmp_path / "none.webp")


@pytest.mark.parametrize("recipe", [cifar10.RECIPE, imdb.RECIPE], ids=lambda r: r.name)
def test_a_folder_must_be_given(recipe, tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"^Pass --data-dir with"):
        recipe.load(None)
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere. Pass --data-dir with"):
        recipe.load(tmp_path / "nowhere")


def test_shifted_pictures_hold_what_was_there():
    images = torch.arange(1, 3 * 32 * 32 + 1).reshape(1, 3, 32, 32).repeat(200, 1, 1, 1)
    moved = cifar10.shifted_and_mirrored(images)
    kept = (moved != 0).float().mean((1, 2, 3))
    assert float(kept.min()) >= (28 / 32) ** 2
    assert float(kept.max()) == 1.0
    mirrored = (moved[:, 0, 16, 16] > moved[:, 0, 16, 17]).float().mean()
    assert 0.3 < float(mirrored) < 0.7
    for image in moved[:20]:
        steps = image[0].diff(dim=1)[6:26, 6:26]
        assert bool((steps == steps[0, 0]).all())
        assert abs(int(steps[0, 0])) == 1


@pytest.mark.parametrize(("name", "size"), [("vgg", 1_133_178), ("resnet20", 269_722)])
def test_networks_of_pictures_run_dense_and_tensorized(name, size):
    network = cifar10.RECIPE.network(name)
    model = network.make()
    assert sum(p.numel() for p in model.parameters()) == size
    images = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8)
    assert model(images).shape == (3, 10)
    assert rf.tensorize_(model, rf.Tucker(4))(images).shape == (3, 10)
    assert "mean" not in model.state_dict()


def write_reviews(folder, texts=("A good film.<br />Good!", "bad, bad film"), labels=(1, 0)):
    for part in ("train", "test"):
        rows = "".join(f'{label},5,x,"{text}"\n' for text, label in zip(texts, labels, strict=True))
        (folder / f"imdb_{part}.csv.xz").write_bytes(lzma.compress(f"label,rating,id,text\n{rows}".encode()))


def test_reviews_become_ids(tmp_path: Path):
    write_reviews(tmp_path)
    texts, labels = imdb.read_reviews(tmp_path / "imdb_train.csv.xz")
    assert texts == ["A good film. Good!", "bad, bad film"]
    assert labels == [1, 0]
    data = imdb._load.__wrapped__(tmp_path)
    assert data.texts
    assert data.train[0].shape == (2, 512)
    row = int((data.train[1] == 1).nonzero())
    assert int((data.train[0][row] != 0).sum()) == 6
    assert data.train[0][row][1] == data.train[0][row][4]  # "good" twice, in small letters
    assert int(data.cut(3).train[0].shape[1]) == 3
    assert data.cut(None) is data


def test_damaged_texts_name_the_file_and_the_place(tmp_path: Path):
    write_reviews(tmp_path)
    path = tmp_path / "imdb_train.csv.xz"
    whole = path.read_bytes()
    for content, place in (
        (whole[:-9], rf"at byte {len(whole) - 9}: the file ends there"),
        (whole + b"more", rf"at byte {len(whole)}: its xz stream ends there, and the file goes on"),
        (whole + whole, rf"at byte {len(whole)}: its xz stream ends there, and the file goes on"),
        (whole[:-20] + bytes(8) + whole[-12:], r"before byte \d+: Corrupt input data"),
        (b"", "at byte 0: the file ends there"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"^\S*imdb_train.csv.xz is damaged {place}.*\. Get the file again\.$"):
            imdb.read_reviews(path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"no file .*imdb_train.csv.xz"):
        imdb.read_reviews(path)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"label,text\n1,fine\n7,what\n", "is damaged at line 3: label '7' is not 0 or 1"),
        (b"a,b\n", "has columns ['a', 'b'], but needs label and text"),
        (b"", "has columns [], but needs label and text"),
        (b"label,text\n", "has columns, but no rows"),
        (
            b'label,text\n1,"a\nb"\n0,"bad\n1,good\n',
            "is damaged in the row that begins at line 4: unexpected end of data",
        ),
        (b'label,text\n1,"good\n0,"bad"\n', "is damaged in the row that begins at line 2: ',' expected after '\"'"),
        (b'label,text\n1,"' + b"long\n" * 30_000, "begins at line 2: field larger than field limit (131072)"),
        (b"label,text\n1,fine\n0,bad,worse\n", "is damaged at line 3: 2 columns, but 3 values"),
        (b"label,text\n1,fine\n0\n", "is damaged at line 3: 2 columns, but 1 values"),
        (b"label,text\n1,fi\0ne\n", "is damaged at line 2: byte 0x00 belongs in no UTF-8 text"),
        (b"label,text\n1,fine\n0,b\xe9te\n", "is damaged at line 3: byte 0xe9 belongs in no UTF-8 text"),
    ],
)
def test_damaged_rows_name_the_file_and_the_line(tmp_path: Path, content, problem):
    path = tmp_path / "imdb_train.csv.xz"
    path.write_bytes(lzma.compress(content))
    with pytest.raises(ValueError, match=r"^\S*imdb_train\.csv\.xz " + ".*" + re.escape(problem)) as raised:
        imdb.read_reviews(path)
    assert str(raised.value).endswith(". Get the file again.")
    assert "\n" not in str(raised.value)


def test_texts_are_not_said_to_be_longer_than_they_are_read(tmp_path: Path):
    write_reviews(tmp_path)
    options = TrainOptions("imdb", data_dir=tmp_path, length=513)
    imdb._load.cache_clear()
    with pytest.raises(
        ValueError, match=r"^--length must be 512 tokens or fewer, got 513\. No more of a text is read\.$"
    ):
        _run.load_data(imdb.RECIPE, options)
    assert _run.load_data(imdb.RECIPE, replace(options, length=512)).train[0].shape == (2, 512)
    imdb._load.cache_clear()


@pytest.mark.parametrize("recipe", [imdb.RECIPE, imdb.TRANSFORMER], ids=lambda r: r.name)
def test_networks_of_texts_run_dense_and_tensorized(recipe):
    model = recipe.network(None).make().eval()
    ids = torch.randint(1, 25_000, (3, 9))
    ids[1, 4:] = 0
    ids[2] = 0
    longer = torch.cat([ids, torch.zeros(3, 5, dtype=torch.int64)], 1)
    for change in (lambda model: model, lambda model: rf.tensorize_(model, rf.TT(3), posterior=rf.Point())):
        model = change(model)
        with torch.no_grad():
            assert model(ids).shape == (3, 2)
            if recipe is imdb.TRANSFORMER:  # The LSTM reads texts from their end as well, and begins in the padding.
                torch.testing.assert_close(model(ids), model(longer))
    assert rf.summary(model).compression > 50


def texts_of(lengths):
    rows = torch.zeros(len(lengths), max(lengths), dtype=torch.int16)
    for row, length in zip(rows, lengths, strict=True):
        row[:length] = 1
    rows[:, 0] = torch.arange(1, len(lengths) + 1)
    labels = torch.arange(len(lengths))
    return Data((rows, labels), (rows, labels), texts=True)


def test_texts_of_similar_length_come_together():
    lengths = torch.randint(1, 100, (1000,), generator=torch.Generator().manual_seed(1)).tolist()
    data = texts_of(lengths)
    seen, entries = [], 0
    for ids, labels in data.batches(10):
        assert ids.dtype is torch.int64
        assert ids.shape[1] == max(lengths[k] for k in labels.tolist())
        seen += labels.tolist()
        entries += ids.numel()
    assert sorted(seen) == list(range(1000))
    assert seen != sorted(seen)
    assert entries < 1.1 * sum(lengths)
    assert len(data.batches(10)) == 100
    assert torch.cat([labels for _, labels in data.test_batches(300)]).sort()[0].tolist() == list(range(1000))


@pytest.mark.parametrize(
    ("rows", "size", "lengths"),
    [(9, 4, [4, 5]), (5, 4, [5]), (10, 4, [4, 4, 2]), (8, 4, [4, 4]), (1, 4, [1]), (3, 1, [1, 1, 1])],
)
def test_no_row_is_a_batch_alone(rows, size, lengths):
    """Batch normalisation refuses one: a single row has no variance."""
    values = torch.arange(rows)
    data = Data((values.float().unsqueeze(1), values), (values.float().unsqueeze(1), values))
    for batches in (data.batches(size), data.test_batches(size)):
        found = [labels.tolist() for _, labels in batches]
        assert [len(batch) for batch in found] == lengths
        assert len(batches) == len(lengths)
        assert sorted(k for batch in found for k in batch) == list(range(rows))


def test_equal_seeds_give_equal_batches():
    data = texts_of([3, 1, 2] * 50)
    orders = []
    for _ in range(2):
        torch.manual_seed(5)
        orders.append(torch.cat([labels for _, labels in data.batches(4)]).tolist())
    assert orders[0] == orders[1]


def test_figures_are_those_of_the_formulas():
    torch.manual_seed(0)
    logits, labels = torch.randn(500, 4), torch.randint(4, (500,))
    p = logits.softmax(1)
    found = figures(logits.log_softmax(1), labels)
    confidence, guess = p.max(1)
    right = (guess == labels).double()
    bins = (confidence * 15).ceil().long() - 1
    ece = sum(
        float((bins == b).double().mean() * (right[bins == b].mean() - confidence[bins == b].mean()).abs())
        for b in bins.unique()
    )
    assert found["test_accuracy"] == pytest.approx(float(right.mean()))
    assert found["test_nll"] == pytest.approx(float(-p[range(500), labels].log().mean()), rel=1e-5)
    assert found["test_ece"] == pytest.approx(ece, rel=1e-4)
    truth = torch.eye(4)[labels]
    assert found["test_brier"] == pytest.approx(float(((p - truth) ** 2).sum(1).mean()), rel=1e-5)


def test_augmented_rows_count_as_many_as_their_views(tmp_path: Path, monkeypatch):
    """The KL of a run is shared out over them: loss = NLL + KL / (views * rows)."""
    rows = torch.rand(60, 8), torch.randint(2, (60,))
    data = Data(rows, rows, views=7)
    assert (data.num_data, data.limited(10).num_data, Data(rows, rows).num_data) == (420, 70, 60)
    network = Network(lambda: nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 2)), 2, 60, 1e-3, 2, kl_warmup=0)
    monkeypatch.setitem(_run.RECIPES, "digits", Recipe("digits", lambda _: data, {"mlp": network}))
    folder, _, _ = _run.train(TrainOptions("digits", out=tmp_path / "run"), progress=False)
    for record in folder.read_history():
        assert record["loss"] == pytest.approx(record["nll"] + record["kl"] / 420, rel=1e-5)


@pytest.mark.parametrize("change", [1e-9, 120.0])
def test_a_network_says_how_far_its_layers_step(tmp_path: Path, monkeypatch, change):
    """At a billionth of a change a layer stays where it starts, and it moves at the usual one."""
    rows, starts = (torch.rand(60, 8), torch.randint(2, (60,))), []

    def starting(network, options):
        starts.append(build_model(network, options))
        starts.append(copy.deepcopy(starts[0]))
        return starts[0]

    build_model = _run.build_model
    monkeypatch.setattr(_run, "build_model", starting)
    network = Network(lambda: nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 2)), 4, 10, 1e-3, 2, changes={"0": change})
    monkeypatch.setitem(_run.RECIPES, "digits", Recipe("digits", lambda _: Data(rows, rows), {"mlp": network}))
    _run.train(TrainOptions("digits", posterior="point", out=tmp_path / "run"), progress=False)
    # The gauge step does not change the weight.
    moved, still = (model[0].weight.dense().detach() for model in starts)
    assert torch.allclose(moved, still, atol=1e-5) == (change < 1)


def test_auroc_counts_pairs():
    known, strange = torch.rand(40), torch.rand(30)
    pairs = (strange.unsqueeze(1) > known).double().mean()
    assert auroc(known, strange) == pytest.approx(float(pairs), rel=1e-5)


@pytest.mark.parametrize("bonds", [0, 2, 20])
def test_a_picture_of_a_run(tmp_path: Path, bonds):
    ranks = {"layer": {f"r{k}": 5 for k in range(bonds)}} if bonds else {}
    history = [
        {"epoch": k, "ranks": ranks if k else {}, "parameters": 100 - k, "test_accuracy": 0.5 + k / 10}
        for k in range(3)
    ]
    draw(history, tmp_path / "ranks.png")
    with Image.open(tmp_path / "ranks.png") as picture:
        assert picture.size == (840, 720 if bonds else 360)
        assert len(picture.convert("RGB").getcolors(2**24)) > 20


def test_a_picture_of_one_epoch_shows_its_points(tmp_path: Path):
    history = [{"epoch": 0, "ranks": {"0": {"r1": 5}}, "parameters": 100, "test_accuracy": 0.5}]
    draw(history, tmp_path / "ranks.png")
    with Image.open(tmp_path / "ranks.png") as picture:
        colours = {colour for _, colour in picture.convert("RGB").getcolors(2**24)}
    assert {(31, 119, 180), (214, 39, 40)} <= colours


@pytest.mark.parametrize(("rows", "parts"), [((50, 50), 2), ((50, 20), 3), ((None, 20), 2), ((None, 50, 20), 3)])
def test_a_picture_shows_tables_that_lost_rows(tmp_path: Path, rows, parts):
    history = [
        {"epoch": k, "ranks": {"table": {"r1": 5}}, "rows": {} if left is None else {"table": left}}
        | {"parameters": 100, "test_accuracy": 0.5}
        for k, left in enumerate(rows)
    ]
    draw(history, tmp_path / "ranks.png")
    with Image.open(tmp_path / "ranks.png") as picture:
        assert picture.size == (840, 360 * parts)
