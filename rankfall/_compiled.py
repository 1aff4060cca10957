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
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from ctypes import c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from rankfall._files import cache_folder, write_atomic

T = TypeVar("T")

_FOLDER = Path(__file__).parent
_FLAGS = ("-std=gnu11", "-O3", "-fPIC", "-shared")
_FOR_THIS_PROCESSOR = ("-march=native",), ("-mcpu=native",), ()  # The first that the compiler knows.
_SECONDS = 60


@dataclass(frozen=True)
class Source:
    """A file of C in this folder.

    Attributes:
        name: Of the file.
        flags: For the compiler, those that all files have aside.
        includes: Files beside it that it takes in.
    """

    name: str
    flags: tuple[str, ...]
    includes: tuple[str, ...] = ()

    @property
    def path(self) -> Path:
        """Where it is."""
        return _FOLDER / self.name

    def text(self) -> list[str]:
        """What is compiled."""
        return [(_FOLDER / name).read_text() for name in (self.name, *self.includes)]

    def command(self, compiler: Sequence[str]) -> list[str]:
        """What compiles it, but for the processor, the file and where the library is to go."""
        return [*compiler, *_FLAGS, *self.flags]


def compiled(source: Source, use: Callable[[ctypes.CDLL], T], otherwise: str) -> T | None:
    """What `use` makes of a compiled file; None where there is no C compiler, and where RANKFALL_COMPILE is 0.

    CC names another compiler than cc, gcc or clang.

    Args:
        source: The file.
        use: Takes the library, and tries whether it is right.
        otherwise: What happens without it, which is said if compiling, loading or trying fails.
    """
    compiler = find_compiler()
    if os.environ.get("RANKFALL_COMPILE") == "0" or compiler is None:
        return None
    try:
        with torch.autocast("cpu", enabled=False):  # What it is held against is not to be rounded.
            return use(_loaded(source, compiler))
    except Exception as error:
        message = f"{source.name} cannot be compiled or does not run ({error}), so {otherwise}."
        warnings.warn(message, RuntimeWarning, stacklevel=3)
        return None


def is_unseen() -> bool:
    """Whether nobody traces, transforms or counts what torch is called for, who would not see compiled code at work."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # pyright: ignore
        return False
    if torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack():
        return False
    return forward_ad._current_level < 0  # pyright: ignore


def find_compiler() -> list[str] | None:
    """The command of the machine's C compiler; None if there is none."""
    named = shlex.split(os.environ.get("CC", ""))
    if named:
        return named if shutil.which(named[0]) else None
    return next(([name] for name in ("cc", "gcc", "clang") if shutil.which(name)), None)


def address(tensor: Tensor | None) -> int | None:
    """Where a tensor's numbers begin; None for none."""
    return None if tensor is None else tensor.data_ptr()


def addresses(tensors: Iterable[Tensor | None]) -> "ctypes.Array[c_void_p]":
    """The same of several, as C takes them."""
    found = list(map(address, tensors))
    return (c_void_p * len(found))(*found)


def _loaded(source: Source, compiler: Sequence[str]) -> ctypes.CDLL:
    """The library, from the user's cache if this one is there; else made there, or beside if that cannot be written."""
    command = source.command(compiler)
    of = (source.text(), command, platform.system(), platform.machine(), _processor())
    name = f"{source.path.stem.strip('_')}-{hashlib.sha256(repr(of).encode()).hexdigest()[:16]}.so"
    with suppress(OSError, RuntimeError):
        path = cache_folder() / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, lambda temporary: _compile(command, source.path, temporary))
        return ctypes.CDLL(str(path))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        _compile(command, source.path, path)
        return ctypes.CDLL(str(path))


def _compile(command: Sequence[str], source: Path, path: Path) -> None:
    """Raises ValueError with what the compiler said last, if it fails."""
    last: list[str] = []
    for native in _FOR_THIS_PROCESSOR:
        whole = [*command, *native, "-o", str(path), str(source), "-lm"]
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
