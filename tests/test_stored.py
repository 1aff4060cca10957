# SPDX-License-Identifier: Apache-2.0
"""Rows in Parquet files: every one of them once per pass, mixed, in an order that a seed settles, and few at a time."""

import json
import shutil
import threading
from pathlib import Path

import polars as pl
import pytest
import torch

from criteo_files import click_lines
from rankfall.cli import main
from rankfall.recipes import _stored, criteo
from rankfall.recipes._folder import RunFolder
from rankfall.recipes._prepare import PrepareOptions, prepare
from rankfall.recipes._stored import StoredRows, check_numbers

COUNTS = (70, 0, 31, 55)


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch):
    monkeypatch.setattr(_stored, "PIECE", 8)
    monkeypatch.setattr(_stored, "_AT_ONCE", 6)


@pytest.fixture
def files(tmp_path) -> list[Path]:
    """Four files; the two inputs of row k are k and -k, its label is k modulo 2."""
    start, paths = 0, []
    for place, count in enumerate(COUNTS):
        numbers = torch.arange(start, start + count, dtype=torch.int32)
        rows = {"label": (numbers % 2).to(torch.int8), "a": numbers, "b": -numbers}
        paths.append(tmp_path / f"part [{place}].parquet")  # No pattern, though it looks like one.
        pl.DataFrame({name: values.numpy() for name, values in rows.items()}).write_parquet(paths[-1])
        start += count
    return paths


def numbers(loader) -> list[int]:
    return [number for inputs, _ in loader for number in inputs[:, 0].tolist()]


@pytest.mark.parametrize("shuffled", [True, False])
@pytest.mark.parametrize("size", [1, 7, 16, 48, 100, 156, 200])
def test_every_row_comes_once_and_only_the_last_batch_is_smaller(files, shuffled, size):
    loader = StoredRows.of(files).batches(size, shuffled=shuffled)
    batches = list(loader)
    assert len(batches) == len(loader)
    assert [len(labels) for _, labels in batches[:-1]] == [size] * (len(batches) - 1)
    assert 0 < len(batches[-1][1]) <= size
    inputs, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert inputs.dtype is torch.int32
    assert labels.dtype is torch.int64
    assert torch.equal(inputs[:, 1], -inputs[:, 0])
    assert torch.equal(labels, inputs[:, 0].long() % 2)
    found = inputs[:, 0].tolist()
    assert sorted(found) == list(range(156))
    assert (found == sorted(found)) is not shuffled


def test_the_order_is_the_seeds(files):
    loader = StoredRows.of(files).batches(10, shuffled=True)
    torch.manual_seed(3)
    first, second = numbers(loader), numbers(loader)
    torch.manual_seed(3)
    assert numbers(loader) == first
    state = torch.get_rng_state()
    assert numbers(loader) == second
    torch.set_rng_state(state)
    assert numbers(loader) == second
    assert first != second


def test_a_pass_takes_the_same_from_the_generator_wherever_it_ends(files):
    loader = StoredRows.of(files).batches(10, shuffled=True)
    states = []
    for batches in (1, 16):
        torch.manual_seed(3)
        for _, _ in zip(range(batches), loader, strict=False):
            pass
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_a_batch_is_mixed_from_all_over_the_files(files):
    loader = StoredRows.of(files).batches(24, shuffled=True)
    for inputs, _ in list(loader)[:-1]:
        pieces = (inputs[:, 0] // 8).unique()
        assert len(pieces) >= 4
        assert int(pieces.max() - pieces.min()) >= 5


def test_few_pieces_are_read_ahead_and_none_once_a_pass_is_left(files, monkeypatch):
    read, seen = _stored._read, []
    monkeypatch.setattr(_stored, "_read", lambda pieces: seen.append(len(pieces)) or read(pieces))
    threads = threading.active_count()
    loader = iter(StoredRows.of(files).batches(10, shuffled=True))
    next(loader)
    assert sum(seen) <= 12
    del loader
    assert threading.active_count() == threads
    assert sum(seen) <= 12


def test_the_first_rows(files):
    rows = StoredRows.of(files)
    assert len(rows) == 156
    assert rows.first(None) is rows
    for count in (1, 8, 75, 156, 500):
        first = rows.first(count)
        assert len(first) == min(count, 156)
        assert first.read()[0][:, 0].tolist() == list(range(min(count, 156)))


def test_a_file_that_is_damaged_meanwhile(files):
    rows = StoredRows.of(files)
    pl.DataFrame({"label": [0], "a": [0], "b": [0]}).write_parquet(files[2])
    with pytest.raises(ValueError, match=r"part \[2\].parquet has fewer rows than before. Prepare the rows again"):
        numbers(rows.batches(10, shuffled=True))
    files[2].write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"part \[2\].parquet is missing or damaged: .*. Prepare the rows again"):
        numbers(rows.batches(10, shuffled=False))
    files[2].unlink()
    with pytest.raises(ValueError, match=r"part \[2\].parquet is missing or damaged"):
        StoredRows.of(files)


def test_labels_are_read_by_themselves(files):
    rows = StoredRows.of(files)
    assert torch.equal(torch.cat(list(rows.labels())), rows.read()[1])
    assert [len(part) for part in rows.first(13).labels()] == [8, 5]


def test_numbers_outside_their_limits_are_named(files):
    check_numbers(files[0], {"label": 2, "a": 70})
    with pytest.raises(ValueError, match=r"part \[0\].parquet holds 69 in column a, where numbers from 0 to 68 are"):
        check_numbers(files[0], {"label": 2, "a": 69})
    with pytest.raises(ValueError, match=r"holds -1 in column b, where numbers from 0 to 99 are expected. Prepare the"):
        check_numbers(files[0], {"a": 70, "b": 100})


@pytest.fixture
def clicks(tmp_path, monkeypatch) -> Path:
    """Prepared rows that are too many to be held, from an empty working directory."""
    monkeypatch.chdir(tmp_path)
    Path("train.txt").write_text("\n".join(click_lines(300)))
    prepare(PrepareOptions("criteo", (Path("train.txt"),), Path("clicks")), progress=False)
    monkeypatch.setattr(criteo, "_IN_MEMORY", 200)
    return Path("clicks")


def test_rows_in_memory_and_in_files_are_the_same(clicks, monkeypatch):
    stored = criteo.RECIPE.load(clicks)
    monkeypatch.setattr(criteo, "_IN_MEMORY", 300)
    held = criteo.RECIPE.load(clicks)
    assert isinstance(stored.train, StoredRows)
    assert isinstance(held.train, tuple)
    assert stored.num_train == held.num_train == len(held.train[0])
    for one, other in zip(stored.train.read(), held.train, strict=True):
        assert torch.equal(one, other)
    for data in (stored, held):
        few = data.limited(20)
        assert few.num_train == 20
        assert sum(len(labels) for _, labels in few.test_batches(16)) == 20
    for one, other in zip(stored.test_batches(16), held.test_batches(16), strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])


def test_files_and_the_note_of_them_must_agree(clicks):
    note = clicks / "criteo.json"
    index = json.loads(note.read_text())
    rows = index["rows"]["train"]
    note.write_text(json.dumps(index | {"rows": index["rows"] | {"train": 9000}}))
    with pytest.raises(ValueError, match=rf"clicks holds {rows} train rows, and criteo.json says 9,000. Prepare the"):
        criteo.RECIPE.load(clicks)


def test_an_interrupted_run_on_stored_rows_ends_as_it_would_have(clicks, monkeypatch):
    run = f"train criteo --data-dir {clicks} --epochs 3 --max-rank 2"
    main([*run.split(), "--out", "whole"])
    write = RunFolder.write_history

    def interrupt(folder: RunFolder, history: list) -> None:
        if len(history) == 2:
            raise KeyboardInterrupt
        write(folder, history)

    with monkeypatch.context() as patched:
        patched.setattr(RunFolder, "write_history", interrupt)
        with pytest.raises(SystemExit):
            main([*run.split(), "--out", "cut"])
    torch.manual_seed(99)
    main([*run.split(), "--out", "cut", "--resume"])
    whole, cut = (json.loads(Path(folder, "metrics.json").read_text()) for folder in ("whole", "cut"))
    assert [whole[name] for name in ("test_nll", "test_auc")] == [cut[name] for name in ("test_nll", "test_auc")]


def again(clicks: Path, lines: list[str]) -> None:
    """Prepares rows in place of those that are there."""
    shutil.rmtree(clicks)
    Path("train.txt").write_text("\n".join(lines))
    prepare(PrepareOptions("criteo", (Path("train.txt"),), clicks), progress=False)


@pytest.fixture
def run(clicks) -> list[str]:
    """The command of a run that has been started, and is finished."""
    command = f"train criteo --data-dir {clicks} --epochs 1 --max-rank 2 --out run".split()
    main(command)
    return command


def test_a_run_is_not_resumed_on_other_rows(clicks, run, capsys):
    lines = click_lines(300)
    other = [f"{1 - int(line[0])}{line[1:]}" for line in lines]  # As many, in tables of the same sizes.
    again(clicks, other)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([*run, "--resume"])
    assert stop.value.code == 2
    text = "run was started with other rows than clicks holds now. Pass the --data-dir with those to resume it, or"
    assert text in capsys.readouterr().err
    again(clicks, lines)
    main([*run, "--resume"])


def test_a_run_is_resumed_where_the_rows_have_gone(clicks, run):
    clicks.rename("moved")
    run[3] = "moved"
    main([*run, "--resume"])


def test_a_run_that_is_older_than_the_note_of_its_rows_is_resumed(clicks, run):
    config = Path("run/config.json")
    options = json.loads(config.read_text())
    assert len(options.pop("rows_fingerprint")) == 64
    config.write_text(json.dumps(options))
    main([*run, "--resume"])


def test_rows_that_are_older_than_their_hashes_are_told_apart_by_size(clicks):
    note = clicks / "criteo.json"
    hashed = criteo.fingerprint(clicks)
    note.write_text(json.dumps({k: v for k, v in json.loads(note.read_text()).items() if k != "hashes"}))
    first = criteo.fingerprint(clicks)
    assert first not in (hashed, None)
    (clicks / "train-00000.parquet").write_bytes(b"PAR1")
    second = criteo.fingerprint(clicks)
    (clicks / "train-00000.parquet").unlink()
    assert len({first, second, criteo.fingerprint(clicks)}) == 3
