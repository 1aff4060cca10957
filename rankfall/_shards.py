# SPDX-License-Identifier: Apache-2.0
"""Batches dealt out to several processes."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Final, Protocol, runtime_checkable

from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from rankfall._processes import Processes

NO_BATCH: Final = object()
"""Stands for a batch where the last round does not reach this process."""

# What a DataLoader is made of, apart from its data set and the order of it.
_SETTINGS = (
    "num_workers",
    "collate_fn",
    "pin_memory",
    "timeout",
    "worker_init_fn",
    "multiprocessing_context",
    "generator",
    "prefetch_factor",
    "persistent_workers",
)


@runtime_checkable
class Placed(Protocol):
    """A loader that knows where it is."""

    def state_dict(self) -> dict[str, Any]:
        """Where it is."""
        ...

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Goes to where it was."""
        ...


class Shard:
    """The batches of one process: every `count`-th that a loader gives, from the `index`-th on.

    Each process gets as many: in a last round that does not reach all of them, NO_BATCH stands for what is missing. Of
    a DataLoader over rows that can be asked for by number, only the process's own batches are gathered; of anything
    else, which may be a list, a stream or a loader of another kind, every process goes through all of them.

    Args:
        loader: Gives the same batches on every process, as long as their random numbers are the same.
        processes: Those that share it.

    Raises:
        ValueError: If the loader has been dealt out already.
    """

    def __init__(self, loader: Iterable[Any], processes: Processes) -> None:
        self._alone = processes.alone
        self._batches = self._loader = loader
        if self._alone:
            return
        _check_whole(loader)
        if type(loader) is DataLoader and not isinstance(loader.dataset, IterableDataset):
            order = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
            self._part = _Part(order, processes)
            self._batches = _with_order(loader, self._part)
        else:
            self._batches = self._part = _Part(loader, processes)

    def __iter__(self) -> Iterator[Any]:
        yield from self._batches
        if not self._alone and self._part.misses_one:
            yield NO_BATCH

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Batches taken inside leave the loader where it was, if it is one that knows."""
        place = self._loader.state_dict() if isinstance(self._loader, Placed) else None
        yield
        if place is not None and isinstance(self._loader, Placed):
            self._loader.load_state_dict(place)


class _Part:
    """Every `count`-th of what something gives, from the `index`-th on."""

    def __init__(self, whole: Iterable[Any], processes: Processes) -> None:
        self._whole, self._count, self._index = whole, processes.count, processes.index
        self._seen = 0

    def __iter__(self) -> Iterator[Any]:
        self._seen = 0
        for item in self._whole:
            self._seen += 1
            if (self._seen - 1) % self._count == self._index:
                yield item

    @property
    def misses_one(self) -> bool:
        """Whether, after all were seen, the last round has ended before this process."""
        return 0 < self._seen % self._count <= self._index


def _with_order(loader: DataLoader[Any], order: Iterable[Any]) -> DataLoader[Any]:
    """The same loader with numbers of rows in another order, by the batch if it was so."""
    by = {"sampler": order, "batch_size": None} if loader.batch_sampler is None else {"batch_sampler": order}
    return DataLoader(loader.dataset, **by, **{name: getattr(loader, name) for name in _SETTINGS})


def _check_whole(loader: Iterable[Any]) -> None:
    samplers = [getattr(loader, "sampler", None), getattr(getattr(loader, "batch_sampler", None), "sampler", None)]
    dealt = type(loader).__module__.startswith("accelerate.")
    if dealt or any(isinstance(sampler, DistributedSampler) for sampler in samplers):
        kind = type(loader).__name__ if dealt else "DistributedSampler"
        raise ValueError(
            f"loader is dealt out among processes already (by {kind}), and rf.fit would take only a part of each part. "
            "Pass the loader of the whole training set."
        )
