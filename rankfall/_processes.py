# SPDX-License-Identifier: Apache-2.0
"""Several processes that train one model: what they tell each other."""

import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")

_SEEDS = 2**62


def number_started() -> int:
    """How many processes torchrun or `accelerate launch` has started for this run; 1 without them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first_started() -> bool:
    """Whether this is the process that prints, also before it has joined the others."""
    return os.environ.get("RANK", "0") == "0"


def leave() -> bool:
    """Leaves the processes of the run, at its end; returns whether there were any."""
    if not dist.is_initialized():
        return False
    # Where one is gone while another still ends, gloo's threads may abort the latter. nccl asks where to wait.
    dist.barrier(device_ids=[torch.cuda.current_device()] if dist.get_backend() == "nccl" else None)
    dist.destroy_process_group()
    return True


def is_elsewhere(error: Exception) -> bool:
    """Whether an error came about on another process, which reports it."""
    return any(note.startswith(_ELSEWHERE) for note in getattr(error, "__notes__", ()))


_ELSEWHERE = "This happened on process "


class Processes:
    """The processes of a run as one of them sees them. Alone, which is the default, every method is for free.

    All processes must call the same methods in the same order; each call waits for the others.

    Args:
        count: How many there are.
        index: Which of them this one is, from 0.
        device: Where this one computes: what goes between processes must lie there.
    """

    def __init__(self, count: int = 1, index: int = 0, device: torch.device | str = "cpu") -> None:
        self.count, self.index, self.device = count, index, torch.device(device)
        self._own_noise: list[Tensor] = []

    @property
    def alone(self) -> bool:
        """Whether there is no other process."""
        return self.count == 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes files and prints."""
        return self.index == 0

    def from_first(self, make: Callable[[], T]) -> T:
        """What `make` returns on the first process, the only one that calls it; an error there is one everywhere."""
        if self.alone:
            return make()
        result, error = _attempt(make) if self.is_first else (None, None)
        box = [(result, _portable(error))]
        dist.broadcast_object_list(box, src=0, device=self.device)
        if not self.is_first:
            result, error = box[0]
        if error is not None:
            self._raise(error, 0)
        return result  # pyright: ignore[reportReturnType]  None only if `make` says so

    def on_first(self, action: Callable[[], object]) -> None:
        """Has the first process do something that the others wait for."""
        self.from_first(lambda: (action(), None)[1])

    def together(self, make: Callable[[], T]) -> T:
        """What `make` returns here, once it has on every process; an error on one is an error everywhere."""
        if self.alone:
            return make()
        result, error = _attempt(make)
        errors: list[Exception | None] = [None] * self.count
        dist.all_gather_object(errors, _portable(error))
        for index, other in enumerate(errors):
            if other is not None:
                self._raise(error if error is not None and index == self.index else other, index)
        return result  # pyright: ignore[reportReturnType]

    def _raise(self, error: Exception, index: int) -> NoReturn:
        if index != self.index:
            error.add_note(f"{_ELSEWHERE}{index}, and stopped the others.")
        raise error

    def agree(self, values: Sequence[float]) -> Sequence[float]:
        """The first process's numbers, for decisions that must not hang on the last bit of each one's own."""
        if self.alone:
            return values
        numbers = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.broadcast(numbers, src=0)
        return numbers.tolist()

    def total(self, values: Sequence[float]) -> Sequence[float]:
        """The sums over processes, the same bits on each."""
        if self.alone:
            return values
        numbers = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(numbers)
        return numbers.tolist()

    def gather(self, values: Tensor) -> Tensor:
        """The numbers of all processes behind one another, however many each has; float64 if there are others."""
        if self.alone:
            return values
        lengths = torch.zeros(self.count, dtype=torch.int64, device=self.device)
        lengths[self.index] = len(values)
        dist.all_reduce(lengths)
        padded = torch.zeros(int(lengths.max()), dtype=torch.float64, device=self.device)
        padded[: len(values)] = values
        parts = [torch.empty_like(padded) for _ in range(self.count)]
        dist.all_gather(parts, padded)
        return torch.cat([part[:length] for part, length in zip(parts, lengths.tolist(), strict=True)])

    def broadcast_(self, tensors: Sequence[Tensor]) -> None:
        """Overwrites tensors by those of the first process; shapes and types must agree already."""
        whole = [t.contiguous() for t in tensors]
        for work in [dist.broadcast(t, src=0, async_op=True) for t in whole if t.numel()]:
            work.wait()  # pyright: ignore[reportOptionalMemberAccess]
        for tensor, values in zip(tensors, whole, strict=True):
            if values is not tensor:
                tensor.copy_(values)

    def average_(self, parameters: Sequence[nn.Parameter], loss: Tensor, examples: int) -> Tensor:
        """Gives parameters the gradient of the mean over all processes' examples; returns that mean of the loss.

        sum_i n_i x_i / sum_i n_i with n_i the `examples` of process i, none of which have to be there. The KL, equal
        on all, keeps its weight.

        One flat buffer and one all-reduce after the backward pass, instead of torch's DistributedDataParallel: its
        buckets are laid out once, for the shapes that parameters have then, so that every cut would have to wrap the
        model anew, and its mean is over processes, whatever the number of examples on each. The price is that nothing
        is sent while the backward pass still runs, and a second copy of the gradients; low-rank gradients are small,
        and get smaller with the ranks.
        """
        if self.alone:
            return loss
        gradients = [_gradient(p) for p in parameters]
        present = torch.tensor([1.0, *(p.grad is not None for p in parameters)], device=loss.device)
        wide = torch.float64 if any(g.dtype == torch.float64 for g in gradients) else torch.float32
        flat = torch.cat([g.reshape(-1).to(wide) for g in (*gradients, loss.detach(), present)]).mul_(examples)
        dist.all_reduce(flat)
        flat /= flat[-len(present)].clone()  # The first of `present`, 1, has become the number of all examples.
        *means, mean_loss, present = flat.split([*(g.numel() for g in gradients), 1, len(present)])
        for k, (parameter, mean) in enumerate(zip(parameters, means, strict=True)):
            # Where no process has a gradient there is none to step by. That is looked up only if it is in question.
            if parameter.grad is not None or bool(present[k + 1] > 0):
                parameter.grad = mean.view_as(parameter).to(parameter.dtype)
        return mean_loss[0]

    def new_noise(self) -> None:
        """Starts this process's own random numbers anew, from a draw of those that all have in common."""
        if self.alone:
            return
        seed = int(torch.randint(_SEEDS, (), device="cpu"))
        common = self._random_state()
        torch.manual_seed(seed + self.index)
        self._own_noise = self._random_state()
        self._set_random_state(common)

    @contextmanager
    def own_noise(self) -> Iterator[None]:
        """Random numbers inside are this process's own; outside, all draw the same ones.

        Other draws from the posterior on each process lower the variance of the gradient, as more examples do. The
        order of batches and the entries of new slices have to be the same everywhere.
        """
        if self.alone:
            yield
            return
        common = self._random_state()
        self._set_random_state(self._own_noise)
        try:
            yield
        finally:
            self._own_noise = self._random_state()
            self._set_random_state(common)

    def _random_state(self) -> list[Tensor]:
        on_device = [torch.cuda.get_rng_state(self.device)] if self.device.type == "cuda" else []
        return [torch.get_rng_state(), *on_device]

    def _set_random_state(self, state: Sequence[Tensor]) -> None:
        torch.set_rng_state(state[0])
        for on_device in state[1:]:
            torch.cuda.set_rng_state(on_device, self.device)


def _attempt(make: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return make(), None
    except Exception as error:
        return None, error


def _portable(error: Exception | None) -> Exception | None:
    """An error that another process can read: itself, or what it says."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # Whatever its class makes of it.
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _gradient(parameter: nn.Parameter) -> Tensor:
    gradient = parameter.grad
    if gradient is None:
        return torch.zeros_like(parameter)
    if gradient.layout != torch.strided:
        raise ValueError(
            f"a parameter of shape {tuple(parameter.shape)} has a sparse gradient, which several processes cannot "
            "average. Make its embedding with sparse=False, or start one process."
        )
    return gradient
