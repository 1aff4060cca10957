# SPDX-License-Identifier: Apache-2.0
"""Recipes: their data readers, and what they refuse."""

import gzip
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import rankfall as rf
from mnist_files import IMAGES, LABELS, write_mnist
from rankfall.recipes import digits, imdb, mnist
from rankfall.recipes._data import PADDING
from rankfall.recipes._options import TrainOptions, make_format
from rankfall.recipes._run import RECIPES, build_model
from rankfall.recipes.mnist import read_idx


@pytest.mark.parametrize("zipped", [True, False])
def test_mnist_reads_what_was_written_zipped_or_not(tmp_path: Path, zipped):
    images, labels = write_mnist(tmp_path, zipped=zipped)
    data = mnist.RECIPE.load(tmp_path)
    assert data.train[0].shape == (len(images), 784)
    torch.testing.assert_close(
        data.train[0] * 0.3081 + 0.1307, torch.from_numpy(images.reshape(len(images), -1) / 255).float()
    )
    assert data.train[1].tolist() == labels.tolist()


def test_real_mnist_has_its_known_first_labels(mnist_dir: Path):
    data = mnist.RECIPE.load(mnist_dir)
    assert data.train[0].shape == (60_000, 784)
    assert data.train[1][:5].tolist() == [5, 0, 4, 1, 9]
    assert data.test[1][:5].tolist() == [7, 2, 1, 0, 4]


def test_digits_splits_once_and_for_all():
    first, second = digits.RECIPE.load(None), digits.RECIPE.load(None)
    assert first.train[0].shape == (1437, 64)
    assert first.test[0].shape == (360, 64)
    assert torch.equal(first.train[0], second.train[0])
    assert torch.equal(first.test[1], second.test[1])


def test_digits_reads_no_folder(tmp_path: Path):
    with pytest.raises(ValueError, match=r"reads no folder. Leave --data-dir out"):
        digits.RECIPE.load(tmp_path)


def test_missing_folder_and_file(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere. Pass --data-dir with the four idx files"):
        mnist.RECIPE.load(tmp_path / "nowhere")
    write_mnist(tmp_path)
    (tmp_path / f"t10k-{LABELS}.gz").unlink()
    with pytest.raises(FileNotFoundError, match=r"no file t10k-labels-idx1-ubyte.gz or t10k-labels-idx1-ubyte in"):
        mnist.RECIPE.load(tmp_path)


def test_truncated_file_names_both_sizes(tmp_path: Path):
    images, _ = write_mnist(tmp_path, zipped=False)
    path = tmp_path / f"train-{IMAGES}"
    path.write_bytes(path.read_bytes()[:-7])
    whole = 16 + images.size
    with pytest.raises(ValueError, match=rf"{IMAGES} is truncated.* says {whole} bytes .* but there are {whole - 7}"):
        mnist.RECIPE.load(tmp_path)


def test_truncated_gzip_is_damage(tmp_path: Path):
    write_mnist(tmp_path)
    path = tmp_path / f"train-{IMAGES}.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=rf"train-{IMAGES}.gz is damaged"):
        mnist.RECIPE.load(tmp_path)


def test_flipped_bytes_in_gzip_are_damage(tmp_path: Path):
    path = tmp_path / "x.gz"
    content = bytearray(gzip.compress(bytes(range(256)) * 40))
    content[30:60] = bytes(30)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"x.gz is damaged"):
        read_idx(path, 1)


def test_other_files_are_not_taken_for_idx(tmp_path: Path):
    path = tmp_path / "labels"
    path.write_text("label,pixel\n")
    with pytest.raises(ValueError, match="not an idx file of bytes in 1 dimensions"):
        read_idx(path, 1)


def test_counts_of_images_and_labels_must_agree(tmp_path: Path):
    write_mnist(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    write_mnist(other, rows=7)
    (other / f"train-{LABELS}.gz").rename(tmp_path / f"train-{LABELS}.gz")
    with pytest.raises(ValueError, match="holds 40 train images, but 7 labels"):
        mnist.RECIPE.load(tmp_path)


def test_without_folder_and_without_datasets_one_line_says_what_to_pass(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"datasets is not installed. Pass --data-dir with the four idx files"):
        mnist.RECIPE.load(None)


def test_without_network_one_line_says_what_to_pass(monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise ConnectionError("no route")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=refuse))
    with pytest.raises(ValueError, match=r"could not be fetched .*ConnectionError.*Pass --data-dir"):
        mnist.RECIPE.load(None)


def test_rows_of_the_hub_are_read_as_those_of_the_files(monkeypatch, tmp_path: Path):
    images, labels = write_mnist(tmp_path)

    def rows(name: str, split: str) -> dict[str, list]:
        assert name == "ylecun/mnist"
        assert split in ("train", "test")
        return {"image": [Image.fromarray(np.array(image)) for image in images], "label": labels.tolist()}

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=rows))
    fetched, read = mnist.RECIPE.load(None), mnist.RECIPE.load(tmp_path)
    assert torch.equal(fetched.train[0], read.train[0])
    assert torch.equal(fetched.train[1], read.train[1])


def test_dropout_rests_where_weights_have_a_spread():
    def noise(method, posterior="mean-field"):
        options = TrainOptions("imdb", method=method, posterior=posterior)
        model = build_model(RECIPES["imdb"].network(None), options)
        return model.dropout.p, model.lstm.dropout

    assert noise("evidence") == (0.0, 0.0)
    assert noise("evidence", "point") == noise("fixed") == noise("dense") == (0.5, 0.3)


class Echo(torch.nn.Module):
    """In place of what reads words in their order."""

    def forward(self, words, src_key_padding_mask=None):
        return (words, None) if src_key_padding_mask is None else words


@pytest.mark.parametrize(("network", "reads"), [(imdb.Reader, "lstm"), (imdb.Encoder, "encoder")])
def test_a_text_is_the_mean_of_its_words_and_of_no_padding(network, reads):
    model = network().eval()
    setattr(model, reads, Echo())
    ids = torch.randint(2, 25_000, (3, 7))
    padded = torch.nn.functional.pad(ids, (0, 4), value=PADDING)
    torch.testing.assert_close(model(padded), model(ids))
    assert torch.isfinite(model(torch.zeros(2, 5, dtype=torch.int64))).all()
    for place in (0, 6):
        changed = ids.clone()
        changed[:, place] = ids[:, place] % 20_000 + 5
        assert not torch.allclose(model(changed), model(ids))


def test_a_recipe_has_a_usual_format():
    assert TrainOptions("imdb").held == TrainOptions("transformer").held == "tt"
    assert TrainOptions("imdb", format="cp").held == "cp"
    assert TrainOptions("mnist").held == "ttm"
    model = build_model(RECIPES["imdb"].network(None), TrainOptions("imdb"))
    assert model.lstm.weight_hh_l0.format == rf.TT(8, out_modes=model.lstm.weight_hh_l0.format.out_modes)
    assert [tuple(f.shape) for f in model.embedding.weight.factors] == [(25_000, 8), (8, 256)]


def test_a_network_may_hold_some_layers_in_another_way_unless_told_otherwise():
    network = RECIPES["criteo"].network(None)
    usual = build_model(network, TrainOptions("criteo", synthetic=True))
    assert {type(table.weight.format) for table in usual.tables} == {rf.TTM}
    assert {type(layer.weight.format) for part in (usual.bottom, usual.top) for layer in part[::2]} == {rf.TT}
    told = build_model(network, TrainOptions("criteo", synthetic=True, format="ttm"))
    assert {type(tensor.format) for tensor in told.modules() if isinstance(tensor, rf.LowRankTensor)} == {rf.TTM}


@pytest.mark.parametrize(
    ("name", "modes", "expected"),
    [
        ("ttm", ((25, 1), (1, 6)), ((25, 1), (1, 6))),
        ("tt", ((25, 1), (1, 6)), ((25,), (6,))),
        ("cp", ((1, 1), (1, 6)), ((1,), (6,))),
        ("tucker", ((5, 5, 1), (2, 1, 3)), ((5, 5), (2, 3))),
        ("tr", ((5, 5, 2), (2, 1, 3)), (None, None)),
    ],
)
def test_modes_of_a_tt_matrix_serve_other_formats_without_their_ones(name, modes, expected):
    format = make_format(name, 4, modes)
    assert (format.out_modes, format.in_modes) == expected
