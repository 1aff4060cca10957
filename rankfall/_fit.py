# SPDX-License-Identifier: Apache-2.0
"""The reference training loop: the evidence lower bound, its warm-up, and cuts between steps."""

import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler

from rankfall._elbo import JointDraw, check_weights
from rankfall._files import write_atomic
from rankfall._groups import parameter_groups
from rankfall._losses import Batches
from rankfall._progress import ProgressBar
from rankfall._ranks import ranks
from rankfall._selection import Evidence, Selection, Training, select_
from rankfall._states import check_state
from rankfall._summary import summary
from rankfall._walk import low_rank_tensors

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer

Batch: TypeAlias = Any
NLL: TypeAlias = Callable[[nn.Module, Batch], Tensor]
Record: TypeAlias = dict[str, Any]

# How often a loss on an accelerator is looked at: every look makes the host wait for the device.
_STEPS_BETWEEN_CHECKS = 50
_LR = 1e-3
_WARMUP_PART = 20


def fit(  # noqa: PLR0913  one call with defaults is what a reference loop is for
    model: nn.Module,
    loader: Iterable[Batch],
    nll: NLL,
    *,
    epochs: int,
    num_data: int,
    optimizer: Optimizer | None = None,
    beta: float = 1.0,
    kl_warmup: int | None = None,
    selection: Selection | None = Evidence(),
    scheduler: LRScheduler | None = None,
    evaluate: Callable[[], Mapping[str, float]] | None = None,
    on_epoch: Callable[[list[Record]], object] | None = None,
    checkpoint: Path | str | None = None,
    accelerator: "Accelerator | None" = None,
    progress: bool = True,
) -> list[Record]:
    """Trains a model by minimising nll_mean + beta * KL / num_data, cutting slices between epochs.

    A model without low-rank tensors is trained on its NLL alone, so that the dense twin of a comparison uses the same
    loop. Devices and mixed precision come from Accelerate; the KL stays in float32.

    Example:
        >>> model = nn.Sequential(rf.nn.Linear(4, 8, format=rf.TTM(4)), nn.Tanh(), nn.Linear(8, 1))
        >>> x = torch.randn(64, 4)
        >>> history = rf.fit(
        ...     model,
        ...     [(x, x.sum(1, keepdim=True))],
        ...     lambda model, batch: (model(batch[0]) - batch[1]).square().sum(1),
        ...     optimizer=torch.optim.Adam(model.parameters(), lr=1e-2),
        ...     epochs=2,
        ...     num_data=64,
        ...     progress=False,
        ... )
        >>> len(history), sorted(history[0])[:4]
        (2, ['compression', 'epoch', 'kl', 'loss'])

    Args:
        model: Any module, moved to Accelerate's device.
        loader: Batches, as often as it is iterated: a DataLoader or a list; tensors are moved to the device.
        nll: nll(model, batch) returns the negative log likelihood of each datum of the batch in nats, shape (n,).
        epochs: Passes over the loader, all in all: a resumed run does what is left.
        num_data: Size of the training set.
        optimizer: Any torch optimizer over the model's parameters; None for Adam on `rf.parameter_groups(model, 1e-3)`.
        beta: Weight of the KL; 1 is the evidence lower bound.
        kl_warmup: Epochs over which that weight rises from 0, so that the data speaks first; no cut happens in them.
            None for a twentieth of the run.
        selection: When and how ranks change: rf.Evidence(), rf.Shrinkage(threshold), or None for fixed ranks.
        scheduler: Stepped once an epoch; None for a cosine from the optimizer's learning rate to 0.
        evaluate: Called after each epoch in eval mode without gradients; what it returns joins the record.
        on_epoch: Called after each epoch with the history so far, once the checkpoint is safe.
        checkpoint: File that the whole state is written to after each epoch, whole or not at all. If it is there at
            the start, training goes on from it and ends as the uninterrupted run would have.
        accelerator: An accelerate.Accelerator for a device, mixed precision or seed of your choice.
        progress: Whether a progress bar is shown.

    Returns:
        One record per epoch: epoch, loss, nll (mean, nats) and its standard error nll_error, kl (nats), lr, parameters,
        compression, ranks, seconds. With a selection also selection_seconds, the part that it took, and with
        rf.Evidence the selection made ("wait", "cut", "kept", "try", "undo", "grow")
        and its cuts, as rf.RankChange has them.

    Raises:
        ValueError: If an argument is out of range, `nll` returns another shape, the loss stops being finite, or the
            checkpoint is of another run.
        ImportError: If accelerate is not installed.
    """
    kl_warmup = epochs // _WARMUP_PART if kl_warmup is None else kl_warmup
    _check_arguments(epochs, num_data, beta, kl_warmup)
    if checkpoint is not None and not Path(checkpoint).parent.is_dir():
        raise ValueError(f"no folder {Path(checkpoint).parent} for the checkpoint. Make it first.")
    accelerator = _make_accelerator() if accelerator is None else accelerator
    if accelerator.num_processes > 1:
        raise ValueError("rf.fit runs on one process; start it without torchrun or `accelerate launch`.")
    optimizer = torch.optim.Adam(parameter_groups(model, _LR)) if optimizer is None else optimizer
    scheduler = CosineAnnealingLR(optimizer, T_max=max(epochs, 1)) if scheduler is None else scheduler
    has_kl = any(low_rank_tensors(model))
    state = _State(model, optimizer, scheduler, loader, epochs)
    history = state.restore(checkpoint)
    training = Training(epochs, kl_warmup, num_data, beta, partial(_sample, model, loader, nll, accelerator))
    with (
        _prepared(accelerator, model, optimizer) as (prepared, stepper),
        ProgressBar(epochs, len(history), shown=progress) as bar,
    ):
        for epoch in range(len(history), epochs):
            started = time.perf_counter()
            warm = beta * min(1.0, epoch / kl_warmup) if kl_warmup else beta
            objective = _Objective(prepared, nll, warm / num_data if has_kl else None, accelerator, epoch)
            record = {"epoch": epoch, **_train_epoch(objective, loader, stepper), "lr": scheduler.get_last_lr()[0]}
            scheduler.step()
            record["ranks"] = ranks(model)
            if selection is not None and has_kl:
                trained = time.perf_counter()
                record |= select_(selection, model, optimizer, [*history, record], training)
                record["selection_seconds"] = time.perf_counter() - trained
            counts = summary(model)
            record |= {"parameters": counts.parameters, "compression": counts.compression, "ranks": ranks(model)}
            record["seconds"] = time.perf_counter() - started
            if evaluate is not None:
                record |= _evaluated(model, evaluate)
            history.append(record)
            state.save(checkpoint, history)
            if on_epoch is not None:
                on_epoch(history)
            bar.show(record)
    return history


def _check_arguments(epochs: int, num_data: int, beta: float, kl_warmup: int) -> None:
    if epochs < 1:
        raise ValueError(f"epochs must be 1 or more, got {epochs}.")
    check_weights(num_data, beta)
    if kl_warmup < 0:
        raise ValueError(f"kl_warmup must be 0 epochs or more, got {kl_warmup}.")


def _make_accelerator() -> "Accelerator":
    try:
        from accelerate import Accelerator  # noqa: PLC0415  the core does not need it
    except ImportError as error:
        raise ImportError("rf.fit needs accelerate: pip install 'rankfall[train]'.") from error
    return Accelerator()


@contextmanager
def _prepared(
    accelerator: "Accelerator", model: nn.Module, optimizer: Optimizer
) -> Iterator[tuple[nn.Module, "AcceleratedOptimizer"]]:
    """Model and optimizer as Accelerate wants them; afterwards the model's forward is its own again."""
    prepared, stepper = accelerator.prepare(model, optimizer)
    try:
        yield prepared, stepper
    finally:
        accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)


class _Objective:
    """The loss of one batch in one epoch, checked."""

    def __init__(
        self, model: nn.Module, nll: NLL, kl_weight: float | None, accelerator: "Accelerator", epoch: int
    ) -> None:
        self.model, self.nll, self.kl_weight, self.accelerator, self.epoch = model, nll, kl_weight, accelerator, epoch
        self.draw = None if kl_weight is None else JointDraw(model)

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """(nll of each datum, KL, loss)."""
        if self.draw is None or self.kl_weight is None:
            each = self._nll(batch)
            return each, each.new_zeros(()), each.mean()
        with self.draw() as divergence:
            each = self._nll(batch)
        return each, divergence, each.mean() + self.kl_weight * divergence

    def _nll(self, batch: Batch) -> Tensor:
        with self.accelerator.autocast():
            each = self.nll(self.model, batch)
        if not isinstance(each, Tensor) or each.dim() != 1:
            came = f"shape {tuple(each.shape)}" if isinstance(each, Tensor) else type(each).__name__
            raise ValueError(
                f"nll must return one number per datum, a tensor of shape (n,), got {came}. "
                "Pass reduction='none' to torch's losses, and sum over everything but the batch."
            )
        return each

    def check(self, loss: Tensor, step: int) -> None:
        """Stops at a loss that is not finite, before it reaches the parameters."""
        if loss.device.type != "cpu" and step % _STEPS_BETWEEN_CHECKS:
            return
        if not bool(torch.isfinite(loss)):
            broken = [n for n, p in self.model.named_parameters() if not bool(torch.isfinite(p).all())]
            where = (
                f"{broken[0]!r} is no longer finite"
                if broken
                else "all parameters are still finite, so look at nll and the data"
            )
            raise ValueError(
                f"the loss became {loss.item()} in epoch {self.epoch + 1}, step {step + 1}: {where}. "
                "Lower the learning rate, or check the inputs for NaN."
            )


def _train_epoch(objective: _Objective, loader: Iterable[Batch], optimizer: "AcceleratedOptimizer") -> Record:
    objective.model.train()
    device = objective.accelerator.device
    total, weighted, squared, divergence = (torch.zeros((), device=device) for _ in range(4))
    count = steps = 0
    for step, batch in enumerate(loader):
        each, divergence, loss = objective(_to_device(batch, device))
        objective.check(loss, step)
        optimizer.zero_grad()
        objective.accelerator.backward(loss)
        optimizer.step()
        weighted += each.detach().sum()
        squared += each.detach().square().sum()
        count += len(each)
        total += loss.detach()
        steps += 1
    if steps == 0:
        raise ValueError("loader gave no batch. Pass a DataLoader or a list, which can be iterated again each epoch.")
    objective.check(total, 0)
    mean = float(weighted) / count
    spread = math.sqrt(max(float(squared) / count - mean**2, 0.0) / count)
    return {"loss": float(total) / steps, "nll": mean, "nll_error": spread, "kl": float(divergence.detach())}


def _sample(model: nn.Module, loader: Iterable[Batch], nll: NLL, accelerator: "Accelerator", examples: int) -> Batches:
    """The NLL of each of so many examples by the batch, always the same ones: the first of a new pass over the data."""

    def of(batch: Batch) -> Tensor:
        with accelerator.autocast():
            return nll(model, batch)

    batches, count = [], 0
    with torch.no_grad():
        for batch in loader:
            batches.append(partial(of, _to_device(batch, accelerator.device)))
            count += len(batches[-1]())
            if count >= examples:
                break
    return batches


def _to_device(batch: Batch, device: torch.device) -> Batch:
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {key: _to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, Sequence) and not isinstance(batch, str):
        return [_to_device(value, device) for value in batch]
    return batch


@torch.no_grad()
def _evaluated(model: nn.Module, evaluate: Callable[[], Mapping[str, float]]) -> Mapping[str, float]:
    model.eval()
    try:
        return evaluate()
    finally:
        model.train()


class _State:
    """Everything an epoch depends on, to and from one file."""

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, scheduler: LRScheduler, loader: object, epochs: int
    ) -> None:
        self.model, self.optimizer = model, optimizer
        self.parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
        self.generator = getattr(loader, "generator", None)
        self.epochs = epochs

    def save(self, path: Path | str | None, history: list[Record]) -> None:
        if path is None:
            return
        state: Record = {name: part.state_dict() for name, part in self.parts.items()}
        state |= {"epochs": self.epochs, "history": history, "random": self._random_states()}
        write_atomic(path, lambda temporary: torch.save(state, temporary))

    def restore(self, path: Path | str | None) -> list[Record]:
        if path is None or not Path(path).exists():
            return []
        try:
            state = torch.load(path, weights_only=True)
            started, parts = state["epochs"], {name: state[name] for name in self.parts}
        except Exception as error:
            raise ValueError(
                f"{path} is damaged or no checkpoint of rf.fit ({error}). Remove it to start anew."
            ) from error
        if started != self.epochs:
            raise ValueError(f"{path} is of a run of {started} epochs, not {self.epochs}. Pass epochs={started}.")
        check_state(self.model, parts["model"], path)
        groups, saved = self.optimizer.param_groups, parts["optimizer"]["param_groups"]
        if [len(g["params"]) for g in groups] != [len(g["params"]) for g in saved]:
            raise ValueError(f"{path} is of an optimizer with other parameter groups. Make the optimizer as before.")
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        self._set_random_states(state["random"])
        return state["history"]

    def _random_states(self) -> Record:
        return {
            "python": random.getstate(),
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "loader": None if self.generator is None else self.generator.get_state(),
        }

    def _set_random_states(self, states: Record) -> None:
        random.setstate(states["python"])
        torch.set_rng_state(states["torch"])
        if torch.cuda.is_available():
            torch.cuda.set_rng_state_all(states["cuda"])
        if self.generator is not None and states["loader"] is not None:
            self.generator.set_state(states["loader"])
