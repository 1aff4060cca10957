# SPDX-License-Identifier: Apache-2.0
"""The worked examples find what was planted, and say so."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parent.parent / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"examples.{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def lines_of(name: str, *arguments: str) -> list[str]:
    """What an example prints as a script that trains for a moment; warnings are errors there, too."""
    command = [sys.executable, "-W", "error", str(FOLDER / f"{name}.py"), "--epochs", "2", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


@pytest.mark.parametrize("seed", [0, 1])
def test_completion_finds_rank_noise_and_missing_entries(seed):
    found = example("tensor_completion").main("cp", seed=seed)
    assert found.ranks == found.true_ranks == {"r": 3}
    assert found.noise == pytest.approx(found.true_noise, rel=0.05)
    assert found.missing_error < 0.3 * found.true_noise
    assert found.missing_error < 0.06 * found.signal_std


# Half the epochs: the ranks are there long before the noise scale has settled.
@pytest.mark.parametrize(("format", "ranks"), [("tucker", [3, 3, 3]), ("tt", [3, 3]), ("tr", [3, 3, 3])])
def test_completion_finds_the_ranks_of_other_formats(format, ranks):
    found = example("tensor_completion").main(format, epochs=40)
    assert list(found.ranks.values()) == list(found.true_ranks.values()) == ranks
    assert found.missing_error < 0.5 * found.true_noise


@pytest.mark.parametrize("seed", [0, 1])
def test_teacher_finds_ranks_noise_and_weight(seed):
    found = example("nonlinear_teacher").main(seed=seed)
    assert found.ranks == found.true_ranks == {"r1": 3, "r2": 3}
    assert found.noise == pytest.approx(found.true_noise, rel=0.05)
    assert found.weight_error < 0.01


def test_completion_prints_what_it_found():
    ranks, noise, error = lines_of("tensor_completion", "--format", "tt", "--rank", "2")
    assert re.fullmatch(r"ranks +found {'r1': \d, 'r2': \d}, planted {'r1': 2, 'r2': 2}", ranks)
    assert re.fullmatch(r"noise +found \d\.\d{3}, true 0\.200", noise)
    assert re.fullmatch(r"missing entries +error \d\.\d{3}: \d+% of the noise, \d+\.\d% of the signal", error)


def test_teacher_prints_what_it_found():
    ranks, noise, weight = lines_of("nonlinear_teacher", "--noise", "0.3")
    assert re.fullmatch(r"ranks +found {'r1': \d+, 'r2': \d+}, planted {'r1': 3, 'r2': 3}", ranks)
    assert re.fullmatch(r"noise +found \d\.\d{4}, true 0\.3000", noise)
    assert re.fullmatch(r"weight +off by \d+\.\d{2}% of its norm", weight)
