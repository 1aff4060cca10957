# SPDX-License-Identifier: Apache-2.0
"""Click logs to Parquet: against a reading in plain Python, and what is refused, or left as it is."""

import bz2
import errno
import gzip
import json
import lzma
from collections import Counter
from pathlib import Path

import polars as pl
import pytest
import torch

from criteo_files import click_lines
from rankfall.cli import main
from rankfall.recipes import _prepare, _xz
from rankfall.recipes._prepare import PrepareOptions, prepare
from rankfall.recipes._recommender import COUNTS


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


def test_ids_are_summed_when_as_many_have_come_as_there_are(monkeypatch):
    """Blocks that bring few new ids are not all paid for by another pass over those that are known."""
    counts, truth, sums = _prepare._Counts(), Counter(), []
    total = _prepare._Counts.total
    monkeypatch.setattr(_prepare._Counts, "total", lambda self: sums.append(1) or total(self))
    for block in range(40):
        ids = range(0, 1000) if block == 0 else range(block * 20, block * 20 + 50)
        counts.add(pl.DataFrame({"value": list(ids), "count": [2] * len(ids)}))
        truth.update(dict.fromkeys(ids, 2))
    assert len(sums) <= 4
    assert dict(counts.total().iter_rows()) == truth


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


EMPTY = "\t" * 38  # Between the first field and the last, if all others are missing.


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("2\t1", "2 columns, not 40"),
        ("PK", "1 column, not 40"),
        (f"1{EMPTY}\t\t", "41 columns, not 40"),
        (f"1{EMPTY}", "39 columns, not 40 (it may be the test file, which has no labels)"),
        (f"label{EMPTY}\t", "column 1 has 'label', not 0 or 1"),
        (f"2{EMPTY}\t", "column 1 has '2', not 0 or 1"),
        (f"{EMPTY}\t", "column 1 has '', not 0 or 1"),
        (f"1\tx{EMPTY}", "column 2 has 'x', not an integer of 32 bits"),
        (f"1\t1_0{EMPTY}", "column 2 has '1_0', not an integer of 32 bits"),
        (f"1\t2147483648{EMPTY}", "column 2 has '2147483648', not an integer of 32 bits"),
        (f"1{EMPTY}\tzz", "column 40 has 'zz', not a hexadecimal number of 32 bits"),
        (f"1{EMPTY}\t0x1", "column 40 has '0x1', not a hexadecimal number of 32 bits"),
        (f"1{EMPTY}\t{'1' * 5000}", f"column 40 has '{'1' * 20}', not a hexadecimal number of 32 bits"),
    ],
)
@pytest.mark.parametrize("place", [0, 20])
def test_a_damaged_line_is_named_and_nothing_looks_whole(tmp_path, line, reason, place):
    lines = click_lines(20)
    byte = sum(len(good) + 1 for good in lines[:place])
    with pytest.raises(ValueError, match=r"train.txt is damaged after byte 0, at byte \d+: ") as error:
        prepared(tmp_path, [*lines[:place], line, *lines])
    assert str(error.value).endswith(
        f"at byte {byte}: {reason}. A line has a label, 13 integers and 26 hexadecimal numbers, tabs between. "
        "Get the file again."
    )
    assert not (tmp_path / "out" / "criteo.json").exists()


def test_what_only_polars_refuses_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(_prepare, "_fault", lambda line: None)
    with pytest.raises(ValueError, match=r"at an unknown byte: column names [^\n]*[^.\n]\. A line has a label"):
        prepared(tmp_path, [line.partition("\t")[2] for line in click_lines(20)])


@pytest.mark.parametrize(("ending", "pack"), [(".gz", gzip.compress), (".xz", lzma.compress)])
def test_a_truncated_archive(tmp_path, ending, pack):
    path = tmp_path / f"train.txt{ending}"
    path.write_bytes(pack("\n".join(click_lines(50)).encode())[:-30])
    with pytest.raises(ValueError, match=r"train.txt\..z is damaged before byte \d+: [^.]*\. Get the file again\.$"):
        prepare(PrepareOptions("criteo", (path,), tmp_path / "out"), progress=False)


def two_streams(first: int = 40, padding: int = 0) -> tuple[bytes, bytes, list[str]]:
    """(a stream with padding after it, another, the lines of both)."""
    lines = click_lines(90)
    text = "".join(f"{line}\n" for line in lines).encode()
    cut = sum(len(line) + 1 for line in lines[:first]) + 7  # Within a line.
    return lzma.compress(text[:cut]) + bytes(padding), lzma.compress(text[cut:]), lines


@pytest.mark.parametrize("piece", [1, 1000, 1 << 16])
@pytest.mark.parametrize("padding", [0, 4, 5000])
def test_streams_of_xz_are_read_to_the_last(tmp_path, monkeypatch, piece, padding):
    monkeypatch.setattr(_xz, "_PIECE", piece)
    first, second, lines = two_streams(padding=padding)
    _, whole = prepared(tmp_path, lines)
    (tmp_path / "t.xz").write_bytes(first + lzma.compress(b"") + second + bytes(padding))
    prepare(PrepareOptions("criteo", (tmp_path / "t.xz",), tmp_path / "two"), progress=False)
    for part in ("train", "test"):
        assert read(whole, part).equals(read(tmp_path / "two", part))


def damages() -> dict[str, bytes]:
    first, second, _ = two_streams(padding=4)
    whole, size = first + second, len(second)
    found = {"junk": whole + b"junk", "junk after padding": whole + bytes(8) + b"junk"}
    for place in (0, 3, 7, 12, 30, size // 2, size - 20, size - 1):
        byte = len(first) + place
        found[f"damage at {place}"] = whole[:byte] + bytes([whole[byte] ^ 255]) + whole[byte + 1 :]
    for kept in (1, 5, 12, 30, size // 2, size - 1):
        found[f"cut at {kept}"] = whole[: len(first) + kept]
    return found


@pytest.mark.parametrize("name", damages())
def test_damage_of_a_later_stream_of_xz(tmp_path, name):
    path = tmp_path / "train.txt.xz"
    path.write_bytes(damages()[name])
    reason = "the file ends within an xz stream" if name.startswith("cut") else "[^.]+"
    with pytest.raises(ValueError, match=rf"xz is damaged before byte \d+: {reason}\. Get the file again\.$"):
        prepare(PrepareOptions("criteo", (path,), tmp_path / "out"), progress=False)
    assert not (tmp_path / "out" / "criteo.json").exists()


def test_what_an_interruption_leaves_is_cleared_and_what_is_whole_is_kept(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "train-00007.parquet").write_text("half")
    (out / "vocabulary-C3.parquet").write_text("half")
    (out / ".criteo.json.0123abcd.tmp").write_text("half")
    prepared(tmp_path, click_lines(30))
    assert not (out / "train-00007.parquet").exists()
    assert not (out / ".criteo.json.0123abcd.tmp").exists()
    with pytest.raises(ValueError, match=r"out holds prepared rows. Pass another --out"):
        prepared(tmp_path, click_lines(30))
    (out / "criteo.json").unlink()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"out holds notes.txt, which is not of a preparation"):
        prepared(tmp_path, click_lines(30))
    assert (out / "notes.txt").read_text() == "mine"


def contents(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


@pytest.mark.parametrize(
    "name",
    [
        "mine.parquet", "train.parquet", "train-00000-of-00005.parquet", "vocabulary.parquet", ".notes.tmp",
        ".mine.parquet.0123abcd.tmp", "train-00000.parquet/mine.txt", "folder.parquet/mine.txt",
    ],
)  # fmt: skip
def test_what_others_have_put_there_is_left_alone(tmp_path, name):
    path = tmp_path / "out" / name
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    (tmp_path / "out" / "test-00003.parquet").write_text("half")
    before = contents(tmp_path / "out")
    foreign = path.relative_to(tmp_path / "out").parts[0]
    with pytest.raises(ValueError, match=rf"out holds {foreign}, which is not of a preparation. Pass another --out"):
        prepared(tmp_path, click_lines(30))
    assert contents(tmp_path / "out") == before


def test_a_link_and_a_file_in_place_of_the_folder_are_left_alone(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (tmp_path / "mine").write_text("mine")
    (out / "train-00000.parquet").symlink_to(tmp_path / "mine")
    with pytest.raises(ValueError, match=r"out holds train-00000.parquet, which is not of a preparation"):
        prepared(tmp_path, click_lines(30))
    assert (out / "train-00000.parquet").read_text() == "mine"
    with pytest.raises(ValueError, match=r"mine is not a folder. Pass another --out"):
        prepare(PrepareOptions("criteo", (tmp_path / "train.txt",), tmp_path / "mine"), progress=False)


@pytest.mark.parametrize("block", [64, 180, 1000])
@pytest.mark.parametrize("ending", ["", "\n", "\n\n\n", "\r\n\r\n"])
def test_blocks_end_anywhere_and_the_last_line_as_it_likes(tmp_path, monkeypatch, block, ending):
    lines = click_lines(12)
    _, whole = prepared(tmp_path, lines, test_part=0.4)
    monkeypatch.setattr(_prepare, "_BLOCK", block)
    (tmp_path / "t").write_text("\n".join(lines) + ending)
    prepare(PrepareOptions("criteo", (tmp_path / "t",), tmp_path / "two", test_part=0.4), progress=False)
    for part in ("train", "test"):
        assert read(whole, part).equals(read(tmp_path / "two", part))


@pytest.mark.parametrize("block", [64, 10_000])
@pytest.mark.parametrize("blank", ["", "\r", " "])
@pytest.mark.parametrize("place", [0, 5])
def test_a_blank_line_between_others_is_named(tmp_path, monkeypatch, block, blank, place):
    monkeypatch.setattr(_prepare, "_BLOCK", block)
    lines = click_lines(10)
    byte = sum(len(line) + 1 for line in lines[:place])
    with pytest.raises(ValueError, match=rf"train.txt is damaged after byte \d+, at byte {byte}: a line is blank. A"):
        prepared(tmp_path, [*lines[:place], blank, *lines[place:]])
    assert not (tmp_path / "out" / "criteo.json").exists()


def test_a_text_without_lines_does_not_fill_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(_prepare, "_BLOCK", 100)
    monkeypatch.setattr(_prepare, "_LONGEST", 400)
    (tmp_path / "t").write_text("1" * 100_000)
    held = []
    parsed = _prepare._parsed
    monkeypatch.setattr(_prepare, "_parsed", lambda text, *where: held.append(len(text)) or parsed(text, *where))
    with pytest.raises(ValueError, match=r"t is damaged after byte 0, at byte 0"):
        prepare(PrepareOptions("criteo", (tmp_path / "t",), tmp_path / "out"), progress=False)
    assert held == [600]


@pytest.mark.parametrize(
    ("lines", "test_part", "train", "test"),
    [([], 0.1, 0, 0), (["", ""], 0.1, 0, 0), (click_lines(1), 0.1, 1, 0), (click_lines(1), 0.99, 0, 1)],
)
def test_both_parts_need_rows(tmp_path, lines, test_part, train, test):
    text = rf"give {train} rows to train with and {test} to test with, and both are needed. Pass files with more rows"
    with pytest.raises(ValueError, match=text):
        prepared(tmp_path, lines, test_part=test_part)
    assert not (tmp_path / "out" / "criteo.json").exists()


@pytest.mark.parametrize(("ending", "pack"), [(".gz", gzip.compress), (".xz", lzma.compress)])
def test_a_packed_file_is_named_so(tmp_path, ending, pack):
    path = tmp_path / "train.txt"
    path.write_bytes(pack("\n".join(click_lines(50)).encode()))
    text = rf"train.txt is packed, and its name does not end in {ending}. Rename it to \S*train.txt{ending}."
    with pytest.raises(ValueError, match=text):
        prepare(PrepareOptions("criteo", (path,), tmp_path / "out"), progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("head", "kind"),
    [
        (b"PK\x03\x04", "a zip archive"),
        (bz2.compress(b"1\t2"), "packed with bzip2"),
        (b"\x28\xb5\x2f\xfd", "packed with zstd"),
    ],
)
@pytest.mark.parametrize("name", ["train.txt", "train.txt.gz"])
def test_a_file_that_is_packed_otherwise(tmp_path, head, kind, name):
    (tmp_path / name).write_bytes(head + bytes(50))
    with pytest.raises(ValueError, match=rf"{name} is {kind}; unpack it first\.$"):
        prepare(PrepareOptions("criteo", (tmp_path / name,), tmp_path / "out"), progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("during", ["_vocabularies", "_write"])
def test_a_file_that_changes_between_the_passes(tmp_path, monkeypatch, during):
    read_all = getattr(_prepare, during)

    def growing(*arguments):
        found = read_all(*arguments)
        with (tmp_path / "train.txt").open("a") as file:
            file.write(click_lines(1)[0])
        return found

    monkeypatch.setattr(_prepare, during, growing)
    with pytest.raises(ValueError, match=r"train.txt has changed while it was read. Prepare it again once it is"):
        prepared(tmp_path, click_lines(30))
    assert not (tmp_path / "out" / "criteo.json").exists()
    assert bool(list((tmp_path / "out").glob("train-*"))) is (during == "_write")


FULL = "parquet: underlying IO error: No space left on device (os error 28)"


@pytest.mark.parametrize(
    ("error", "file", "reason"),
    [
        (pl.exceptions.ComputeError(f"{FULL}\nmore"), "train-00000.parquet", FULL),
        (pl.exceptions.ComputeError(FULL), "vocabulary-C26.parquet", FULL),
        (OSError(errno.ENOSPC, "No space left on device", "x"), "criteo.json", "No space left on device"),
    ],
)
def test_a_full_disk_is_one_line(tmp_path, monkeypatch, capsys, error, file, reason):
    monkeypatch.chdir(tmp_path)
    Path("train.txt").write_text("\n".join(click_lines(30)))
    write_atomic = _prepare.write_atomic

    def write(path, of):
        if path.name == file:
            raise error
        write_atomic(path, of)

    monkeypatch.setattr(_prepare, "write_atomic", write)
    with pytest.raises(SystemExit) as stop:
        main(["prepare", "criteo", "train.txt", "--out", "rows"])
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines == [f"rankfall: rows/{file} cannot be written: {reason}. Make room for it, or pass another --out."]
    assert not Path("rows/criteo.json").exists()


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
