# SPDX-License-Identifier: Apache-2.0
import io

import pytest
from rich.console import Console

from rankfall._progress import ProgressBar


@pytest.mark.parametrize("width", [40, 80])
def test_a_narrow_terminal_shows_the_epoch_and_the_time_left(monkeypatch, width):
    out = io.StringIO()
    monkeypatch.setattr("rich.console.Console", lambda **_: Console(file=out, width=width, force_terminal=True))
    with ProgressBar(7, 0, shown=True) as bar:
        bar.show({"epoch": 2, "loss": 0.7, "compression": 48.2, "ranks": {f"{k}": {"r1": 3} for k in range(33)}})
    last = out.getvalue().replace("\x1b", "\n")
    assert "3/7" in last
    assert "0:00:0" in last or "-:--:--" in last
