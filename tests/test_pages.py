# SPDX-License-Identifier: Apache-2.0
"""Memory that stays with a program: told to glibc in a process of its own, since it cannot be taken back."""

import os
import subprocess
import sys

import pytest

from rankfall import _pages

CODE = """
import ctypes
import resource
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: else the kernel may fill a tensor in a few large pages.
from rankfall._pages import keep_pages
told = {keep}
import torch
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    x = torch.zeros(2**23)
    x += 1
    del x
before = faults()
for _ in range(10):
    x = torch.zeros(2**23)
    x += 1
    del x
print(told, faults() - before)
"""


def faults(keep: str) -> tuple[str, int]:
    done = subprocess.run(
        [sys.executable, "-c", CODE.format(keep=keep)], capture_output=True, text=True, check=True, timeout=120
    )
    told, count = done.stdout.split()
    return told, int(count)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's settings")
def test_memory_that_was_had_is_not_mapped_anew():
    _, usual = faults("None")
    told, kept = faults("keep_pages()")
    if told != "True":
        pytest.skip("another C library than glibc")
    # Ten tensors of 32 MB: mapped by pages of 4 kB each time, or never, or once more where something small took room.
    assert kept < usual / 3, (kept, usual)


TENSOR = """
import rankfall.cli
import torch
from rankfall._pages import keep_pages
{keep}
print(torch.empty(2**23).data_ptr() % 4096)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's settings")
def test_the_command_line_asks_for_large_pages_before_its_first_tensor():
    """Torch aligns to pages what it asks large ones for, and looks once whether it shall."""

    # A command line that other tests have called leaves its wish to the programs that this one starts.
    given = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}

    def past_a_page(keep: str) -> int:
        program = [sys.executable, "-c", TENSOR.format(keep=keep)]
        return int(subprocess.check_output(program, text=True, timeout=120, env=given))

    assert past_a_page("") != 0
    assert past_a_page("keep_pages()") == 0


def test_elsewhere_nothing_is_told(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert _pages.keep_pages() is False
