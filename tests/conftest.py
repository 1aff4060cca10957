# SPDX-License-Identifier: Apache-2.0
import os
import tempfile
from pathlib import Path

import pytest
import torch

import rankfall as rf
from rankfall import _joint_draw, _machine
from rankfall._row_library import library

pytest.register_assert_rewrite("laws")
torch.set_num_threads(1)

# Compiled beforehand, and kept for the next time: tests have deadlines.
for _dtype in (torch.float32, torch.float64):
    library(_dtype)
    library(_dtype, in_blocks=True)
_joint_draw.library()

# Plans rest on how fast a machine is; tests reckon with the usual figures, and leave the user's cache alone.
_cache = tempfile.TemporaryDirectory()
os.environ["XDG_CACHE_HOME"] = _cache.name
_machine.keep(_machine.USUAL)

# What a test compares lies on the CPU, so rf.fit trains there even where a GPU is; test_gpu.py asks for it.
os.environ["ACCELERATE_USE_CPU"] = "true"

# A new format is one line here; every law then holds for it, or its tests fail.
FORMATS = [
    rf.CP,
    rf.Tucker,
    rf.TT,
    rf.TTM,
    rf.TR,
]


@pytest.fixture(params=FORMATS, ids=lambda kind: kind.__name__)
def kind(request):
    """The class of a format; `kind(4)` is the format of rank 4."""
    return request.param


@pytest.fixture(params=[rf.LogUniform(), rf.HalfCauchy(0.5)], ids=["log-uniform", "half-cauchy"])
def prior(request):
    return request.param


@pytest.fixture(params=[rf.Point(), rf.MeanField(0.3)], ids=["point", "mean-field"])
def posterior(request):
    return request.param


@pytest.fixture(autouse=True)
def _same_noise_for_every_test():
    torch.manual_seed(0)


@pytest.fixture
def mnist_dir() -> Path:
    """The four real MNIST files: RANKFALL_DATA/mnist, or ../shared/data/mnist beside the checkout."""
    beside = Path(__file__).parent.parent.parent / "shared" / "data"
    folder = Path(os.environ.get("RANKFALL_DATA", beside)) / "mnist"
    if not folder.is_dir():
        pytest.skip("no MNIST: set RANKFALL_DATA to a folder that holds mnist/ with the four idx files")
    return folder
