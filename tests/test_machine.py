# SPDX-License-Identifier: Apache-2.0
"""What is known of the computer: measured once, kept, and never trusted blindly."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

import rankfall as rf
from rankfall import _machine
from rankfall._costs import costs
from rankfall._einsum import shapes_of
from rankfall._machine import USUAL, Machine, cache_path, calibrate, machine, use
from rankfall._matmul import linear_way
from rankfall._row_library import library
from rankfall._sorted_rows import blocks_plan, pass_plan
from rankfall.cli import main

OTHER = Machine(flops=100e9, elements=5e9)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    use(None)
    yield
    monkeypatch.undo()
    use(None)


def test_without_figures_the_usual_ones_hold():
    assert machine() == USUAL
    assert (USUAL.flops_per_element, USUAL.flops_per_call) == (50, 20_000)
    slow = Machine(flops=1.0, elements=100.0, call=1e-9)
    assert (slow.flops_per_element, slow.flops_per_call) == (1, 1)


def test_calibration_is_kept_and_not_repeated(monkeypatch):
    found = calibrate()
    assert json.loads(cache_path().read_text())["flops"] == found.flops
    for name in ("flops", "elements", "call", "convolved", "batched", "passed", "blocked"):
        assert 1 / 8 <= getattr(found, name) / getattr(USUAL, name) <= 8
    monkeypatch.setattr(_machine, "_measured", lambda: OTHER)
    assert calibrate() == found
    use(None)
    assert machine() == found
    assert calibrate(anew=True) == machine() == OTHER


def test_a_home_that_cannot_be_written_to(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(_machine, "_measured", lambda: OTHER)
    assert calibrate() == machine() == OTHER


def test_a_home_that_is_not_to_be_found(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(_machine.Path, "home", no_home)
    monkeypatch.setattr(_machine, "_measured", lambda: OTHER)
    assert calibrate() == machine() == OTHER


@pytest.mark.parametrize(
    "change",
    [
        lambda kept: "{",
        lambda kept: "[]",
        lambda kept: json.dumps(kept | {"of": "another machine"}),
        lambda kept: json.dumps(kept | {"flops": "many"}),
        lambda kept: json.dumps(kept | {"flops": 0.0}),
        lambda kept: json.dumps(kept | {"speed": 1.0}),
        lambda kept: json.dumps({name: kept[name] for name in ("of", "flops", "elements")}),
        lambda kept: json.dumps(kept | {"flops": float("nan")}),
        lambda kept: json.dumps(kept | {"flops": 10**400}),
    ],
)
def test_figures_that_are_not_of_this_machine_or_make_no_sense(change):
    _machine.keep(OTHER)
    assert machine() == OTHER
    cache_path().write_text(change(json.loads(cache_path().read_text())))
    use(None)
    assert machine() == USUAL


def test_what_was_measured_beside_other_work_is_bounded(monkeypatch):
    monkeypatch.setattr(_machine, "_seconds", lambda work: 1.0)
    slow = Machine(USUAL.flops / 8, USUAL.elements / 8, USUAL.call * 8, USUAL.convolved / 8, USUAL.batched / 8)
    by = 8 if library(torch.float32) else 1
    assert _machine._measured() == replace(slow, passed=USUAL.passed / by, blocked=USUAL.blocked / by)
    monkeypatch.setattr(_machine, "library", lambda dtype, **_: None)
    assert _machine._measured() == slow


def test_plans_follow_the_speed_of_compiled_code():
    modes, ranks = ((200, 220, 250), (4, 4, 8)), (16, 16)
    found = []
    for passed in (USUAL.passed, USUAL.passed / 4):
        use(replace(USUAL, passed=passed))
        found.append(pass_plan(modes, ranks, 2048).flops)
    assert 3 < found[1] / found[0] < 4
    found = []
    for blocked in (USUAL.blocked, USUAL.blocked / 4):
        use(replace(USUAL, blocked=blocked))
        found.append(blocks_plan((100, 4), 16, (250, 8), 2048).flops)
    assert found[1] == pytest.approx(4 * found[0], rel=1e-3)


def test_plans_follow_the_figures():
    layer = rf.nn.Linear(256, 256, format=rf.TTM(4))
    arguments = layer.weight.layout, shapes_of(layer.weight.factors), 1024
    ways = set()
    for elements in (1e9, 1e12):  # The slower the memory, the better one large product.
        use(Machine(flops=70e9, elements=elements))
        ways.add(linear_way(*arguments).kind)
    assert len(ways) == 2


@pytest.mark.parametrize("kind", [rf.CP, rf.Tucker, rf.TT, rf.TTM, rf.TR])
def test_a_count_says_how_and_how_long(kind):
    found = costs(nn.Sequential(nn.Linear(784, 512)), kind(4), batch_size=100).layers[0]
    assert found.flops / USUAL.flops < found.seconds < 4 * found.flops / USUAL.flops + 3e-4
    flops, elements = 2 * 100 * 784 * 512, 784 * 512 + 100 * (784 + 512)
    assert found.dense_seconds == pytest.approx(flops / USUAL.batched + elements / USUAL.elements)
    assert any(words in found.way for words in ("formed", "thin", "cut at r", "factor by factor"))


def test_plan_shows_the_ways_of_an_example(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a_net.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def make(): return nn.Sequential(nn.Embedding(10**6, 64), nn.Linear(64, 256)), torch.zeros(3, 5).long()\n"
    )
    monkeypatch.setattr(_machine, "_measured", lambda: OTHER)
    main(["plan", "a_net:make", "--format", "tt", "--max-rank", "4", "--calibrate"])
    printed = capsys.readouterr().out
    assert machine() == OTHER
    assert "and the time expected" in printed
    (table, layer) = (line for line in printed.splitlines() if " ms  dense " in line)
    assert table.endswith("  the distinct rows of one half, times the other")
    assert layer.split("ms")[-1].strip().split("  ")[-1] in (
        "by the formed weight",
        "by two thin matrices",
        "factor by factor",
    )
