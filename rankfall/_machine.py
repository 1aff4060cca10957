# SPDX-License-Identifier: Apache-2.0
"""How fast this computer does what planners count: the usual figures, or those that were measured and kept."""

import json
import math
import platform
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from rankfall._files import cache_folder, write_atomic
from rankfall._onednn import by_onednn, has_onednn
from rankfall._row_library import PASS_CALL, library, sizes_of

_MOST_UNUSUAL = 8.0  # A figure that is further from the usual one than this was measured beside something else.
_ROUNDS = 5


@dataclass(frozen=True)
class Machine:
    """Figures of one CPU and number of threads, float32.

    Attributes:
        flops: Operations per second of one large matrix product, by the faster one of torch's libraries.
        elements: Numbers per second that a large copy into another order of axes reads or writes. What moves beside
            products is seldom a plain copy, which can be three times as fast.
        call: Seconds that each product of a batch of the smallest takes.
        convolved: Operations per second of one large convolution.
        batched: Operations per second of large products in a batch, which MKL does.
        passed: Operations per second of a pass over rows of a table by compiled code, gradients included.
        blocked: The same of a table that it makes block by block.
    """

    flops: float = 200e9
    elements: float = 4e9
    call: float = 1e-7
    convolved: float = 200e9
    batched: float = 100e9
    passed: float = 105e9
    blocked: float = 105e9

    @property
    def flops_per_element(self) -> int:
        """How many operations take as long as moving one number, at least 1."""
        return max(1, round(self.flops / self.elements))

    @property
    def slowness_of_batches(self) -> float:
        """How many operations of one large product take as long as one of a batch of them."""
        return self.flops / self.batched

    @property
    def slowness_of_passes(self) -> float:
        """How many operations of a product in a batch take as long as one of a pass."""
        return self.batched / self.passed

    @property
    def slowness_of_blocks(self) -> float:
        """The same of one of a table in blocks."""
        return self.batched / self.blocked

    @property
    def slowness_of_convolutions(self) -> float:
        """How many operations of one large product take as long as one of a large convolution."""
        return self.flops / self.convolved

    @property
    def flops_per_call(self) -> int:
        """How many operations take as long as one product of a batch takes to get going, at least 1."""
        return max(1, round(self.flops * self.call))


USUAL = Machine()


class _Known:
    """The machine that planners reckon with; read from the cache when it is first asked for."""

    def __init__(self) -> None:
        self.machine: Machine | None = None
        self.watchers: list[Callable[[], object]] = []


_known = _Known()


def on_change(forget: Callable[[], object]) -> None:
    """Has a function called when the figures change, so that plans made by the old ones are forgotten."""
    _known.watchers.append(forget)


def machine() -> Machine:
    """The figures to plan with: measured ones if `calibrate` has ever run here with as many threads, else the usual."""
    if _known.machine is None:
        _known.machine = _read() or USUAL
    return _known.machine


def use(found: Machine | None) -> None:
    """Plans with these figures from now on in this process; None for those of the cache, or the usual ones."""
    before, _known.machine = _known.machine, found
    if before == found:
        return
    for forget in _known.watchers:
        forget()


def calibrate(*, anew: bool = False) -> Machine:
    """Measures this computer in less than a second, keeps the figures in the user's cache, and plans with them.

    Args:
        anew: Whether figures that are kept already are measured again.
    """
    found = None if anew else _read()
    if found is None:
        found = _measured()
        # A home that cannot be written to, or is not to be found: the figures hold for this process.
        with suppress(OSError, RuntimeError):
            keep(found)
    use(found)
    return found


def keep(found: Machine) -> None:
    """Writes figures to the cache."""
    path = cache_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    content = json.dumps({"of": _name(), **asdict(found)}, indent=2) + "\n"
    write_atomic(path, lambda p: p.write_text(content))


def cache_path() -> Path:
    """Where figures are kept: machine-THREADS.json in the folder of the cache."""
    return cache_folder() / f"machine-{torch.get_num_threads()}.json"


def _name() -> str:
    return f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"


def _read() -> Machine | None:
    try:
        kept = json.loads(cache_path().read_text())
        if kept.pop("of") != _name():
            return None  # A home that several machines share, or another version of torch.
        found = Machine(**{name: float(kept.pop(name)) for name in asdict(USUAL)})
        if kept:
            return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RuntimeError):
        return None
    return found if all(map(math.isfinite, asdict(found).values())) and _plausible(found) == found else None


def _plausible(found: Machine) -> Machine:
    usual = asdict(USUAL)
    bounds = {name: (value / _MOST_UNUSUAL, value * _MOST_UNUSUAL) for name, value in usual.items()}
    return Machine(**{name: min(max(value, bounds[name][0]), bounds[name][1]) for name, value in asdict(found).items()})


@torch.no_grad()
def _measured() -> Machine:
    a = torch.rand(768, 768, device="cpu")
    batched = flops = 2 * 768**3 / _seconds(lambda: a @ a)
    if has_onednn():
        flops = max(flops, 2 * 768**3 / _seconds(lambda: by_onednn(a, a)))
    many = torch.rand(1 << 13, 32, 32, device="cpu")
    other = torch.empty_like(many)
    elements = 2 * many.numel() / _seconds(lambda: other.copy_(many.mT))
    small = torch.rand(1 << 12, 8, 8, device="cpu")
    call = _seconds(lambda: torch.bmm(small, small)) / len(small)
    pictures, kernel = torch.rand(16, 64, 32, 32, device="cpu"), torch.rand(64, 64, 3, 3, device="cpu")
    slid = F.conv2d(pictures, kernel)
    convolved = 2 * slid.numel() * kernel[0].numel() / _seconds(lambda: F.conv2d(pictures, kernel))
    return _plausible(Machine(flops, elements, call, convolved, batched, _passed(), _blocked()))


def _passed() -> float:
    """Operations per second of a pass, the usual number where there is no compiled code."""
    chain = [torch.rand(shape, device="cpu") for shape in ((70, 8, 16), (16, 70, 4, 16), (16, 70, 16))]
    # No two rows have their first two digits in common. Steps of a power of 2 would do harm to a cache.
    ids = torch.arange(1 << 12, device="cpu") * 70
    taken = _seconds_of_rows(chain, ids, in_blocks=False)
    if taken is None:
        return USUAL.passed
    flops, calls = 2 * len(ids) * (8 * 16 * 64 + 32 * 16 * 16), 2 * len(ids)
    return flops / max(taken - calls * PASS_CALL, 1e-9)


def _blocked() -> float:
    """The same of a table in blocks."""
    count, rank, width = 1 << 11, 64, 256
    chain = [torch.rand(shape, device="cpu") for shape in ((count, 1, rank), (rank, 1, width))]
    taken = _seconds_of_rows(chain, torch.arange(count, device="cpu"), in_blocks=True)
    return USUAL.blocked if taken is None else 2 * count * rank * width / taken


def _seconds_of_rows(chain: list[Tensor], ids: Tensor, *, in_blocks: bool) -> float | None:
    """A third of what rows take with their gradients; None where there is no compiled code."""
    compiled = library(torch.float32, in_blocks=in_blocks)
    if compiled is None:
        return None
    rows = torch.empty(len(ids), math.prod([f.shape[-2] for f in chain[:-1]]) * chain[-1].shape[-1], device="cpu")
    sizes = sizes_of(chain)
    order = compiled.order(sizes, ids, None)
    read = _seconds(lambda: compiled.rows(sizes, chain, order, None, None, rows))
    learned = _seconds(lambda: compiled.gradients(sizes, chain, order, None, None, rows))
    return (read + learned) / 3


def _seconds(work: Callable[[], object]) -> float:
    """The shortest of a few runs: what is measured is the machine, not what else it does."""
    work()
    taken = []
    for _ in range(_ROUNDS):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return min(taken)
