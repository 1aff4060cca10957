# SPDX-License-Identifier: Apache-2.0
"""What is written in C: where it is compiled, kept and left out."""

import shutil
import stat
import subprocess

import pytest
import torch

import rankfall as rf
from rankfall import _compiled, _joint_draw, _row_library
from rankfall._row_library import library

pytestmark = pytest.mark.skipif(library(torch.float64) is None, reason="no C compiler")


SOURCES = [
    *((name, (f"-DREAL={real}",)) for name in ("_sorted_rows.c", "_block_rows.c") for real in ("float", "double")),
    ("_joint_draw.c", ()),
]


@pytest.mark.parametrize(("name", "flags"), SOURCES)
def test_a_compiler_has_nothing_to_say_to_it(name, flags):
    strict = ("-Wall", "-Wextra", "-Werror", "-Wno-psabi", "-fsyntax-only")
    source = _compiled.Source(name, flags)
    command = [*source.command(_compiled.find_compiler() or []), *strict, str(source.path)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.fixture
def anew(monkeypatch, tmp_path):
    """An empty cache, and nothing loaded; what is compiled."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    made, compile_ = [], _compiled._compile
    monkeypatch.setattr(_compiled, "_compile", lambda *a: made.append(a) or compile_(*a))
    forget()
    yield made
    forget()


def forget():
    _row_library._library.cache_clear()
    _joint_draw.library.cache_clear()


def test_it_is_compiled_once_and_kept(anew, tmp_path):
    for _ in range(2):
        assert library(torch.float32) is not None
        assert library(torch.float64) is not None
        assert library(torch.bfloat16) is None
        assert library(torch.float32, in_blocks=True) is not None
        assert _joint_draw.library() is not None
        forget()
    assert len(anew) == 4
    names = sorted(path.name for path in (tmp_path / "cache" / "rankfall").iterdir())
    assert [name.rpartition("-")[0] for name in names] == ["block_rows", "joint_draw", "sorted_rows", "sorted_rows"]


def test_another_source_or_processor_is_compiled_anew(anew, monkeypatch, tmp_path):
    library(torch.float32)
    _row_library._library.cache_clear()
    monkeypatch.setattr(_compiled, "_processor", lambda: "another")
    library(torch.float32)
    _row_library._library.cache_clear()
    monkeypatch.setattr(_compiled, "_FOLDER", shutil.copytree(_compiled._FOLDER, tmp_path / "copy"))
    for changed in ("_sorted_rows.c", "_id_order.h", "_row_blocks.h"):
        with (_compiled._FOLDER / changed).open("a") as file:
            file.write("\n")
        _row_library._library.cache_clear()
        library(torch.float32)
    assert len(anew) == 5


def test_a_cache_that_cannot_be_written_is_done_without(anew, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert library(torch.float32) is not None
    assert len(anew) == 1


@pytest.mark.usefixtures("anew")
def test_without_a_compiler_torch_reads_rows(monkeypatch, tmp_path):
    table = rf.nn.Embedding(30, 6, format=rf.TTM(2), posterior=rf.Point())
    with_it = table(torch.tensor([3, 29, 3]))
    for name, value in (("CC", str(tmp_path / "none")), ("PATH", str(tmp_path)), ("RANKFALL_COMPILE", "0")):
        with monkeypatch.context() as patch:
            patch.delenv("CC", raising=False)
            patch.setenv(name, value)
            _row_library._library.cache_clear()
            assert library(torch.float32) is None
            torch.testing.assert_close(table(torch.tensor([3, 29, 3])), with_it)


@pytest.mark.usefixtures("anew")
def test_a_compiler_that_fails_is_said_once(monkeypatch, tmp_path):
    script = tmp_path / "cc"
    script.write_text("#!/bin/sh\necho 'some lines'\necho 'no such flag' >&2\nexit 1\n")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CC", f"{script} -m64")
    text = r"_rows\.c cannot be compiled or does not run \(no such flag\), so rows of tables are read by torch\."
    with pytest.warns(RuntimeWarning, match=text):
        assert library(torch.float32) is None
    assert library(torch.float32) is None
    script.write_text("#!/bin/sh\nexit 1\n")
    _row_library._library.cache_clear()
    with pytest.warns(RuntimeWarning, match=r"\(.*cc failed\)"):
        assert library(torch.float32) is None


@pytest.mark.usefixtures("anew")
def test_its_first_use_may_be_under_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert library(torch.float32) is not None
        assert library(torch.float32, in_blocks=True) is not None
        assert _joint_draw.library() is not None


def test_nothing_is_tried_twice(anew):
    assert library(torch.float32) is library(torch.float32, in_blocks=False)
    assert len(anew) == 1


@pytest.mark.usefixtures("anew")
def test_wrong_results_are_not_taken(monkeypatch):
    monkeypatch.setattr(_row_library.Library, "rows", lambda *a: a[-1].zero_())
    with pytest.warns(RuntimeWarning, match="its results are wrong"):
        assert library(torch.float32) is None


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("return kl - 0.5 * (double)entries", "return kl"),
        ("= std * noise;", "= std;"),
        ("= of_draw + pull", "= of_draw - pull"),
        (" - of_kl);", ");"),
        ("return noise;", "memset(&noise, 0, sizeof noise); return noise;"),
    ],
)
@pytest.mark.usefixtures("anew")
def test_wrong_draws_are_not_taken(monkeypatch, tmp_path, right, wrong):
    text = (_compiled._FOLDER / "_joint_draw.c").read_text()
    assert right in text
    (tmp_path / "_joint_draw.c").write_text(text.replace(right, wrong))
    monkeypatch.setattr(_compiled, "_FOLDER", tmp_path)
    with pytest.warns(RuntimeWarning, match=r"_draw\.c .* \(its results are wrong\), so factors are drawn by torch\."):
        assert _joint_draw.library() is None


def test_the_smallest_numbers_stay_what_they_are():
    """Not so in a process that has loaded what was compiled by -ffast-math."""
    assert library(torch.float32) is not None
    assert float(torch.tensor(1e-40) * torch.tensor(1.0)) > 0


def test_no_memory_is_an_error():
    with pytest.raises(MemoryError, match=r"no memory for the product of a table's factors\."):
        _row_library._check(1)
