# SPDX-License-Identifier: Apache-2.0
"""Memory that a process has had stays with it: fresh pages cost more than what is computed in them."""

import ctypes
import os
import sys

# glibc's mallopt(3).
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8
_LARGEST_INT = 2**31 - 1
_TOP = 64 << 20


def keep_pages() -> bool:
    """Tells glibc to keep freed memory, and torch to ask for huge pages; returns whether that could be told.

    Every large tensor is otherwise mapped anew, page by page, and given back after the step: half of the time of an
    LSTM's step on a CPU. The process then stays as large as it has been at its peak. For programs, before they make
    their first tensors, after which torch does not look whether large pages are asked for; a library must not decide
    this for its users.
    """
    if not sys.platform.startswith("linux"):
        return False
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False  # Another C library than glibc.
    told = [mallopt(option, value) for option, value in _SETTINGS]
    return all(told)


# One arena, since what a thread that makes batches has freed is otherwise of no use to the one that trains.
_SETTINGS = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, _LARGEST_INT), (_TOP_PAD, _TOP), (_ARENA_MAX, 1))
