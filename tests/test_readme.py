# SPDX-License-Identifier: Apache-2.0
"""Every command and code block of the README, run."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from criteo_files import click_lines
from mnist_files import write_mnist
from rankfall.recipes._prepare import PrepareOptions, prepare

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
PYTHON = [code for kind, code in BLOCKS if kind == "python"]
COMMANDS = [line for kind, code in BLOCKS if kind == "sh" for line in code.splitlines()]
MAKE = [line for line in COMMANDS if line.startswith("make ")]
OURS = [line for line in COMMANDS if line not in MAKE]
MY_NET = (
    "from torch import nn\n\n\ndef make():\n    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 2))\n"
)


def test_blocks_are_of_the_kinds_that_are_run():
    assert {kind for kind, _ in BLOCKS} == {"python", "sh", "text"}
    assert MAKE == ["make demo", "make test"]
    assert all(line.startswith(("rankfall ", "torchrun ")) for line in OURS)


def test_continuous_integration_runs_the_make_commands():
    script = (ROOT / ".ci/run").read_text()
    for command in MAKE:
        assert command in script


@pytest.mark.parametrize("code", PYTHON)
def test_python_block(code: str, tmp_path: Path):
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, cwd=tmp_path, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("command", OURS)
def test_command(command: str, tmp_path: Path):
    """As it stands, on a few rows for two epochs where it trains."""
    (tmp_path / "my_net.py").write_text(MY_NET)
    write_mnist(tmp_path)
    (tmp_path / "train.txt").write_text("\n".join(click_lines(100)))
    if "--data-dir clicks" in command:
        prepare(PrepareOptions("criteo", (tmp_path / "train.txt",), tmp_path / "clicks"), progress=False)
    short = " --epochs 2 --limit 300" if "rankfall train" in command else ""
    folder = Path(sys.executable).parent
    environment = os.environ | {"MNIST": str(tmp_path), "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
    subprocess.run(command + short, shell=True, check=True, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL)
