# SPDX-License-Identifier: Apache-2.0
"""What is written in C: compiled for this processor by the machine's own compiler at its first use, and kept."""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Sequence
from contextlib import suppress
from ctypes import c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankfall._files import write_atomic
from rankfall._machine import cache_folder

_SOURCE = Path(__file__).with_name("_sorted_rows.c")
_REALS = {torch.float32: "float", torch.float64: "double"}
# Numbers side by side may be added up in any order, without which that cannot be done at once. Not all of -ffast-math,
# which would have the whole process take the smallest numbers for zero.
_FLAGS = ("-O3", "-fPIC", "-shared", "-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math")
_FOR_THIS_PROCESSOR = ("-march=native",), ("-mcpu=native",), ()  # The first that the compiler knows.
_SECONDS = 60
MOST_FACTORS = 16


class Library:
    """The compiled functions, for numbers of one type; see _sorted_rows.c.

    Args:
        path: Of the shared library.

    Raises:
        OSError: If it cannot be loaded.
        AttributeError: If it lacks a function.
    """

    def __init__(self, path: Path) -> None:
        loaded, one = ctypes.CDLL(str(path)), c_void_p
        self._rows, self._gradients = loaded.rows, loaded.gradients_of_rows
        self._rows.argtypes = (c_int64, one, one, one, one, c_int64, one, one, one, one, one)
        self._gradients.argtypes = (*self._rows.argtypes, one, one)

    def rows(
        self,
        chain: Sequence[Tensor],
        order: Tensor,
        ids: Tensor,
        places: Tensor | None,
        weights: Tensor | None,
        out: Tensor,
    ) -> None:
        """Writes row ids[k] of a chain to row k of `out`, or adds weights[k] times it to row places[k].

        Args:
            chain: Factors of shape (digits, width, rank), (rank, digits, width, rank), ..., (rank, digits, width); if
                there is one only, (digits, width). All tensors are without gaps, and of the library's type.
            order: What sorts `ids`, int64.
            ids: Row numbers, int64.
            places: Less than 0 for a row that is left out, int64; None for no places.
            weights: None for 1.
            out: Holds zeros, if there are places.
        """
        _check(self._rows(*_arguments(chain, order, ids, places, weights), out.data_ptr()))

    def gradients(
        self,
        chain: Sequence[Tensor],
        order: Tensor,
        ids: Tensor,
        places: Tensor | None,
        weights: Tensor | None,
        gradient: Tensor,
    ) -> tuple[list[Tensor], Tensor | None]:
        """Those of the factors, and of the weights if there are any, from the gradient of `out`."""
        of_factors = [torch.zeros_like(factor) for factor in chain]
        of_weights = None if weights is None else torch.zeros_like(weights)
        found = _addresses(of_factors), _address(of_weights)
        _check(self._gradients(*_arguments(chain, order, ids, places, weights), gradient.data_ptr(), *found))
        return of_factors, of_weights


def _arguments(
    chain: Sequence[Tensor], order: Tensor, ids: Tensor, places: Tensor | None, weights: Tensor | None
) -> tuple[Any, ...]:
    first, *others = chain
    digits = [len(first), *(factor.shape[1] for factor in others)]
    widths = [first.shape[1], *(factor.shape[2] for factor in others)]
    ranks = [*(len(factor) for factor in others), 1]
    sizes = ((c_int64 * len(chain))(*numbers) for numbers in (digits, widths, ranks))
    of_ids = order.data_ptr(), ids.data_ptr(), _address(places), _address(weights)
    return len(ids), *of_ids, len(chain), *sizes, _addresses(chain)


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _addresses(tensors: Sequence[Tensor]) -> ctypes.Array[c_void_p]:
    return (c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))


def _check(failed: int) -> None:
    if failed:
        raise MemoryError("no memory for the product of a table's factors.")


@cache
def library(dtype: torch.dtype) -> Library | None:
    """The functions for numbers of a type; None if there are none.

    That is so for other types than float32 and float64, where there is no C compiler, and where RANKFALL_COMPILE is 0.
    CC names another compiler than cc, gcc or clang.
    """
    compiler = _compiler()
    if dtype not in _REALS or os.environ.get("RANKFALL_COMPILE") == "0" or compiler is None:
        return None
    try:
        found = _loaded(compiler, _REALS[dtype])
        _try(found, dtype)
    except Exception as error:
        message = f"{_SOURCE.name} cannot be compiled or does not run ({error}), so rows of tables are read by torch."
        warnings.warn(message, RuntimeWarning, stacklevel=2)
        return None
    return found


def _compiler() -> list[str] | None:
    named = shlex.split(os.environ.get("CC", ""))
    if named:
        return named if shutil.which(named[0]) else None
    return next(([name] for name in ("cc", "gcc", "clang") if shutil.which(name)), None)


def _loaded(compiler: list[str], real: str) -> Library:
    """The library, from the user's cache if this one is there; else made there, or beside if that cannot be written."""
    command = (*compiler, *_FLAGS, f"-DREAL={real}")
    of = (_SOURCE.read_text(), *command, platform.system(), platform.machine(), _processor())
    name = f"rows-{real}-{hashlib.sha256(repr(of).encode()).hexdigest()[:16]}.so"
    with suppress(OSError, RuntimeError):
        path = cache_folder() / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, lambda temporary: _compile(command, temporary))
        return Library(path)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        _compile(command, path)
        return Library(path)


def _compile(command: Sequence[str], path: Path) -> None:
    """Raises ValueError with what the compiler said last, if it fails."""
    last: list[str] = []
    for native in _FOR_THIS_PROCESSOR:
        whole = [*command, *native, "-o", str(path), str(_SOURCE)]
        done = subprocess.run(whole, check=False, capture_output=True, text=True, timeout=_SECONDS)
        if not done.returncode:
            return
        last = done.stderr.strip().splitlines()[-1:]
    raise ValueError(" ".join(last) or f"{command[0]} failed")


def _processor() -> str:
    """What a processor can do; a home may be shared by several."""
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return "".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))
    return platform.processor()


def _try(found: Library, dtype: torch.dtype) -> None:
    """Raises ValueError unless a small product is right, with its gradients."""
    first = torch.arange(12, dtype=dtype, device="cpu").view(2, 2, 3)
    last = torch.arange(60, dtype=dtype, device="cpu").view(3, 4, 5)
    ids, order = torch.tensor([7, 0, 7], device="cpu"), torch.tensor([1, 0, 2], device="cpu")
    out, gradient = first.new_empty(3, 10), first.new_ones(3, 10)
    found.rows((first, last), order, ids, None, None, out)
    wanted = torch.einsum("nar,rnb->nab", first[ids // 4], last[:, ids % 4]).flatten(1)
    (of_first, of_last), _ = found.gradients((first, last), order, ids, None, None, gradient)
    row = last.sum(2)[:, ids % 4].T
    wanted_first = torch.zeros_like(first).index_add_(0, ids // 4, row.unsqueeze(1).expand(-1, 2, -1))
    sums = first.sum(1)[ids // 4].T.unsqueeze(2).expand(-1, -1, 5)
    wanted_last = torch.zeros_like(last).index_add_(1, ids % 4, sums)
    pairs = ((out, wanted), (of_first, wanted_first), (of_last, wanted_last))
    if not all(torch.equal(a, b) for a, b in pairs):
        raise ValueError("its results are wrong")
