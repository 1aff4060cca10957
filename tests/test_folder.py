# SPDX-License-Identifier: Apache-2.0
"""Run folders: of one recipe, of one process at a time, damaged ones, and disks that are full."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from commands import SHORT, refused
from mnist_files import write_mnist
from rankfall.cli import main
from rankfall.recipes._folder import RunFolder
from rankfall.recipes._options import TrainOptions


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_a_run_of_another_recipe_is_not_gone_on_with(capsys, tmp_path_factory):
    data = tmp_path_factory.mktemp("mnist")
    write_mnist(data)
    main(["train", "digits", "--out", "run", *SHORT])
    capsys.readouterr()
    line = refused(capsys, "train", "mnist", "--data-dir", str(data), "--out", "run", "--resume")
    assert "run is a run of digits, not mnist. Pass another --out." in line


def test_a_folder_takes_one_process_at_a_time(capsys):
    run = RunFolder(TrainOptions("digits", epochs=3, limit=200, out=Path("run")))
    text = "run is being written by another process. Wait for it, or pass another --out."
    with run.open():
        assert text in refused(capsys, "train", "digits", "--out", "run", *SHORT, "--resume")
        with pytest.raises(ValueError, match=re.escape(text)), run.open():  # As two that begin at the same moment.
            pass
    main(["train", "digits", "--out", "run", *SHORT, "--resume"])


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("config.json", '{"a"', "Expecting ':' delimiter: line 1 column 5 (char 4)"),
        ("config.json", "[1]", "it holds a list"),
        ("metrics.json", "{}", "it has no test_accuracy"),
    ],
)
def test_damaged_files_of_a_run_are_named(capsys, name, text, reason):
    main(["train", "digits", "--out", "run", *SHORT])
    Path("run", name).write_text(text)
    capsys.readouterr()
    line = refused(capsys, "train", "digits", "--out", "run", "--resume", *SHORT)
    assert f"run/{name} is damaged: {reason}. Remove run to start anew." in line


def test_a_full_disk_is_named_with_the_file_and_leaves_no_half():
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); "
        "from rankfall.cli import main; main(['train', 'digits', '--epochs', '1', '--out', 'run'])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert run.stderr.strip().splitlines()[-1].endswith("File too large: 'run/checkpoint.pt'")
    assert not [path for path in Path("run").iterdir() if path.suffix in {".tmp", ".pt"}]
