# SPDX-License-Identifier: Apache-2.0
"""Two processes that speak by nccl and share a GPU; test_processes.py has what they do by gloo."""

import os
import subprocess
import sys

import pytest
import torch

from two_processes import LIMIT, assert_same_bits, environment, free_port, run_two

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(autouse=True)
def _on_a_gpu(monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_CPU")


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """What both processes gave; they are started once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("ACCELERATE_USE_CPU")
        names = "cuts", "grows", "nan_in_one_part", "evaluate_fails_on_the_second"
        return run_two(tmp_path_factory.mktemp("nccl"), *names, machines=2)


def test_factors_optimizer_and_ranks_are_equal_after_cuts(answers):
    first, second = answers["cuts"]
    assert not isinstance(first, str), first
    assert {t.device.type for t in first["state"].values()} == {"cuda"}
    for key in ("state", "optimizer", "ranks", "history", "steps"):
        assert_same_bits(first[key], second[key])
    assert not set(first["noise"]) & set(second["noise"])
    made = [cut for record in first["history"] if record["selection"] == "cut" for cut in record["cuts"]]
    assert len(made) >= 3, "too few cuts: a weaker test"


def test_new_slices_are_equal_too(answers):
    first, second = answers["grows"]
    assert not isinstance(first, str), first
    assert_same_bits(first, second)
    assert first[1] == [{"0": {"r1": 3, "r2": 3, "r3": 3}}, {"0": {"r1": 4, "r2": 4, "r3": 4}}]


@pytest.mark.parametrize(
    ("name", "origin", "text"),
    [
        ("nan_in_one_part", 0, "ValueError: the loss became nan in epoch 1, step 1"),
        ("evaluate_fails_on_the_second", 1, "ZeroDivisionError: division by zero"),
    ],
)
def test_an_error_on_one_process_stops_all(answers, name, origin, text):
    for index, answer in enumerate(answers[name]):
        assert text in answer
        assert ("This happened on process" in answer) == (index != origin)


def test_the_command_line_trains_and_says_nothing_else(tmp_path):
    port = free_port()
    command = [sys.executable, "-W", "error::UserWarning:torch", "-m", "rankfall", "train", "digits"]
    options = ["--epochs", "4", "--limit", "500", "--out", "run"]
    processes = [
        subprocess.Popen(
            command + options,
            env=os.environ | environment(index, port, machines=2),
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    try:
        (output, errors), (quiet, other_errors) = (process.communicate(timeout=LIMIT) for process in processes)
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], errors + other_errors
    assert "run folder: run" in output
    assert quiet == ""
    assert "Warning" not in errors + other_errors
