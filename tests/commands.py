# SPDX-License-Identifier: Apache-2.0
"""Commands as tests give them, and what they leave in the folder that they run in."""

from pathlib import Path

import pytest

from rankfall.cli import main

SHORT = ["--epochs", "3", "--limit", "200"]


def files() -> dict[Path, int]:
    """When each file in this folder was written."""
    return {path: path.stat().st_mtime_ns for path in Path().rglob("*")}


def refused(capsys, *arguments: str) -> str:
    """The one line that a command ends with, after checking that nothing else came of it."""
    before = files()
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert files() == before
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    return lines[0]
