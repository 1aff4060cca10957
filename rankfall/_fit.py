# SPDX-License-Identifier: Apache-2.0
"""The reference training loop: the evidence lower bound, its warm-up, and cuts between steps."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, ReduceLROnPlateau

from rankfall._elbo import JointDraw, check_weights
from rankfall._graphs import Pass, Replayed
from rankfall._groups import parameter_groups
from rankfall._processes import Processes, number_started
from rankfall._progress import ProgressBar
from rankfall._ranks import ranks, table_rows
from rankfall._resume import Record, RunState
from rankfall._samples import Batch, normalise_, take_sample, to_device
from rankfall._selection import Evidence, Selection, Training, select_
from rankfall._shards import NO_BATCH, Shard
from rankfall._summary import summary
from rankfall._walk import low_rank_tensors

if TYPE_CHECKING:
    from accelerate import Accelerator

NLL: TypeAlias = Callable[[nn.Module, Batch], Tensor]

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
    cuda_graphs: bool = False,
    progress: bool = True,
) -> list[Record]:
    """Trains a model by minimising nll_mean + beta * KL / num_data, cutting slices between epochs.

    A model without low-rank tensors is trained on its NLL alone, so that the dense twin of a comparison uses the same
    loop. Devices and mixed precision come from Accelerate; the KL stays in float32. Before ranks are chosen and the
    model is evaluated, batch normalisation gets the statistics of the posterior mean (`rf.refit_batch_norm_`) on 4,096
    examples of another pass over the data.

    Several processes, started by torchrun or `accelerate launch`, train one model: call it in the same way on each.
    They begin as the first one does, whatever their seeds. Each step is that of the mean over all their examples, each
    process drawing its own noise, and they decide on ranks together, so that factors, ranks and history are the same
    everywhere. After each epoch all take over the state of the first one, statistics of batch normalisation included.

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
        loader: Batches, as often as it is iterated: a DataLoader or a list; tensors are moved to the device. One with
            state_dict and load_state_dict, as torchdata's StatefulDataLoader, goes on from a checkpoint where it was.
            Pass the whole of it on every process. They take its batches in turn, so that a step is made on as many
            batches as there are processes: of half the size on two, it is the step that one makes.
        nll: nll(model, batch) returns the negative log likelihood of each datum of the batch in nats, shape (n,).
        epochs: Passes over the loader, all in all: a resumed run does what is left.
        num_data: Size of the whole training set. With augmentation it is larger than the number of examples, by as
            many views as each is worth.
        optimizer: Any torch optimizer but LBFGS over the model's parameters; None for Adam on
            `rf.parameter_groups(model, 1e-3)`.
        beta: Weight of the KL; 1 is the evidence lower bound.
        kl_warmup: Epochs over which that weight rises from 0, so that the data speaks first; no cut happens in them.
            None for a twentieth of the run.
        selection: When and how ranks change: rf.Evidence(), rf.Shrinkage(threshold), or None for fixed ranks.
        scheduler: Stepped once an epoch; None for a cosine from the optimizer's learning rate to 0, which is put back.
        evaluate: Called after each epoch in eval mode without gradients, on every process; what it returns on the
            first one joins the record.
        on_epoch: Called after each epoch with the history so far, once the checkpoint is safe, on the first process.
        checkpoint: File that the whole state is written to after each epoch, whole or not at all. If it is there at
            the start, training goes on from it and ends as the uninterrupted run would have. Only the first process
            writes and reads it. Another number of processes may go on from it, though not to the same bits.
        accelerator: An accelerate.Accelerator for a device, mixed precision or seed of your choice.
        cuda_graphs: Whether a single process on a GPU captures forward and backward passes as CUDA graphs, one for each
            shape of batch in each epoch, and replays them: small layers leave a GPU waiting for the host. Model and
            `nll` must not look at what a tensor holds, nor at anything of the host that changes from step to step.
        progress: Whether a progress bar is shown, by the first process.

    Returns:
        One record per epoch: epoch, loss, nll (mean, nats) and its standard error nll_error, kl (nats), lr, parameters,
        compression, ranks, rows (of each table, those left), seconds. With a selection also selection_seconds, the part
        that it took, and with rf.Evidence the selection made ("wait", "cut", "kept", "try", "undo", "grow"), its cuts,
        as rf.RankChange has them, and before it the price of the weights in the test (nats per datum).

    Raises:
        ValueError: If an argument is out of range, `nll` returns another shape, the loss stops being finite, the
            checkpoint is of another run, a step cannot be captured as a CUDA graph, or processes have different models,
            sparse gradients, a loader that has been dealt out already, or an accelerator that does not know of all of
            them.
        ImportError: If accelerate is not installed.
    """
    kl_warmup = epochs // _WARMUP_PART if kl_warmup is None else kl_warmup
    _check_arguments(epochs, num_data, beta, kl_warmup)
    accelerator = make_accelerator() if accelerator is None else accelerator
    processes = processes_of(accelerator)
    processes.on_first(lambda: _check_folder(checkpoint))
    batches = Shard(loader, processes)
    optimizer = torch.optim.Adam(parameter_groups(model, _LR)) if optimizer is None else optimizer
    _check_steps(optimizer, scheduler, accelerator)
    has_own, scheduler = scheduler is not None, scheduler or CosineAnnealingLR(optimizer, T_max=epochs)
    has_kl = any(low_rank_tensors(model))
    state = RunState(model, optimizer, scheduler, loader, epochs)
    state.check_alike(processes)
    history = processes.from_first(lambda: state.restore(checkpoint))
    sample = partial(take_sample, model, batches, nll, accelerator, processes)
    training = Training(epochs, kl_warmup, num_data, beta, sample, processes.agree)
    with (
        nullcontext() if has_own else _step_sizes_put_back(optimizer),
        _prepared(accelerator, model, optimizer) as (prepared, stepper),
        ProgressBar(epochs, len(history), shown=progress and processes.is_first) as bar,
    ):
        state.share_(processes)
        for epoch in range(len(history), epochs):
            started = time.perf_counter()
            warm = beta * min(1.0, epoch / kl_warmup) if kl_warmup else beta
            kl_weight = warm / num_data if has_kl else None
            objective = _Objective(prepared, nll, kl_weight, accelerator, processes, epoch)
            state.start_epoch(processes)
            record = {"epoch": epoch, **_train_epoch(objective, batches, stepper, cuda_graphs)}
            record["lr"] = scheduler.get_last_lr()[0]
            scheduler.step()
            record["ranks"] = ranks(model)
            normalise_(model, sample, processes)
            sizes = [p.shape for p in model.parameters()]
            if selection is not None and has_kl:
                trained = time.perf_counter()
                record |= select_(selection, model, optimizer, [*history, record], training)
                record["selection_seconds"] = time.perf_counter() - trained
                if [p.shape for p in model.parameters()] != sizes:
                    normalise_(model, sample, processes)
            state.share_(processes)
            counts = summary(model)
            record |= {"parameters": counts.parameters, "compression": counts.compression}
            record |= {"ranks": ranks(model), "rows": table_rows(model)}
            record["seconds"] = time.perf_counter() - started
            if evaluate is not None:
                record |= processes.together(partial(_evaluated, model, evaluate))
            history.append(processes.from_first(lambda record=record: record))
            processes.on_first(lambda: state.save(checkpoint, history))
            if on_epoch is not None:
                processes.on_first(lambda: on_epoch(history))
            bar.show(record)
    return history


def _check_arguments(epochs: int, num_data: int, beta: float, kl_warmup: int) -> None:
    if epochs < 1:
        raise ValueError(f"epochs must be 1 or more, got {epochs}.")
    check_weights(num_data, beta)
    if kl_warmup < 0:
        raise ValueError(f"kl_warmup must be 0 epochs or more, got {kl_warmup}.")


def _check_steps(optimizer: Optimizer, scheduler: LRScheduler | None, accelerator: "Accelerator") -> None:
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError("rf.fit makes one pass for each step, and LBFGS asks for several. Pass for example Adam.")
    if isinstance(scheduler, ReduceLROnPlateau):
        raise ValueError("rf.fit steps a scheduler by epochs, and ReduceLROnPlateau by a loss. Pass another one.")
    if (parts := accelerator.gradient_accumulation_steps) != 1:
        raise ValueError(
            f"rf.fit makes a step of each batch, and the accelerator adds up {parts} of them. "
            "Pass one without gradient_accumulation_steps, and larger batches."
        )


def _check_folder(checkpoint: Path | str | None) -> None:
    if checkpoint is not None and not Path(checkpoint).parent.is_dir():
        raise ValueError(f"no folder {Path(checkpoint).parent} for the checkpoint. Make it first.")


def make_accelerator() -> "Accelerator":
    """Accelerate's object for this process, which joins it to the others that were started with it.

    Raises:
        ImportError: If accelerate is not installed.
    """
    try:
        from accelerate import Accelerator  # noqa: PLC0415  the core does not need it
    except ImportError as error:
        raise ImportError("rf.fit needs accelerate: pip install 'rankfall[train]'.") from error
    # Accelerate does not look for other processes on a machine without GPU unless told to compute on the CPU.
    return Accelerator(cpu=number_started() > 1 and not torch.cuda.is_available())


def join_processes() -> Processes:
    """The processes that were started together with this one.

    Raises:
        ValueError: As for `processes_of`.
    """
    return processes_of(make_accelerator()) if number_started() > 1 else Processes()


def processes_of(accelerator: "Accelerator") -> Processes:
    """The processes that an accelerator has joined.

    Raises:
        ValueError: If it has joined others than were started, or shards the model.
    """
    kind = accelerator.distributed_type.value
    if accelerator.num_processes == 1:
        if number_started() > 1:
            raise ValueError(
                f"{number_started()} processes were started (WORLD_SIZE), but the accelerator knows of one. "
                "Without a GPU for each, pass rf.fit accelerator=Accelerator(cpu=True)."
            )
        return Processes()
    if not kind.startswith("MULTI_"):
        raise ValueError(
            f"rf.fit trains a whole model on every process, and Accelerate is set to {kind}, which splits it. "
            "Start it by torchrun, or by `accelerate launch --multi_gpu`."
        )
    return Processes(accelerator.num_processes, accelerator.process_index, accelerator.device)


@contextmanager
def _prepared(
    accelerator: "Accelerator", model: nn.Module, optimizer: Optimizer
) -> Iterator[tuple[nn.Module, Optimizer]]:
    """Model and optimizer as Accelerate wants them; afterwards the model's forward is its own again."""
    # "Evaluation" leaves out nothing but the wrapper for several processes; Processes.average_ says why.
    prepared = accelerator.prepare_model(model, evaluation_mode=True)
    stepper = accelerator.prepare_optimizer(optimizer)
    try:
        yield prepared, stepper
    finally:
        accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)


@contextmanager
def _step_sizes_put_back(optimizer: Optimizer) -> Iterator[None]:
    """Afterwards an optimizer has the step sizes that its schedule began with, for whoever goes on with it."""
    try:
        yield
    finally:
        for group in optimizer.param_groups:
            lr, first = group["lr"], group["initial_lr"]
            group["lr"] = lr.copy_(first) if isinstance(lr, Tensor) else first


class _Objective:
    """The loss of one batch in one epoch, checked."""

    def __init__(
        self,
        model: nn.Module,
        nll: NLL,
        kl_weight: float | None,
        accelerator: "Accelerator",
        processes: Processes,
        epoch: int,
    ) -> None:
        self.model, self.nll, self.kl_weight = model, nll, kl_weight
        self.accelerator, self.processes, self.epoch = accelerator, processes, epoch
        self.draw = None if kl_weight is None else JointDraw(model)

    def passes(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """(nll of each datum, KL, loss) without their graph; the parameters have their gradients then."""
        batch = to_device(batch, self.accelerator.device)
        if self.draw is None or self.kl_weight is None:
            each = self._nll(batch)
            loss, divergence = each.mean(), each.new_zeros(())
            self.accelerator.backward(loss)
        else:
            # Backward inside, since what is computed again for it (activation checkpointing) needs the same draw.
            with self.draw() as divergence:
                each = self._nll(batch)
                loss = each.mean() + self.kl_weight * divergence
                self.accelerator.backward(loss)
            self.draw.hand_on_()
        return each.detach(), divergence.detach(), loss.detach()

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
            # All processes have this loss, and one report is enough.
            self.processes.on_first(lambda: self._refuse(loss, step))

    def _refuse(self, loss: Tensor, step: int) -> None:
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


class _Sums:
    """What an epoch adds up."""

    def __init__(self, device: torch.device) -> None:
        # Squares of large losses leave nothing of their spread in float32, which is all that Apple's GPUs have.
        self.wide = torch.float32 if device.type == "mps" else torch.float64
        self.nll, self.square, self.loss, self.kl = (torch.zeros((), device=device, dtype=self.wide) for _ in range(4))
        self.examples = self.steps = 0

    def add(self, each: Tensor, loss: Tensor) -> None:
        """One step: the NLL of this process's examples, and the loss of all of them."""
        each = each.to(self.wide)
        self.nll += each.sum()
        self.square += each.square().sum()
        self.loss += loss
        self.examples += len(each)
        self.steps += 1

    def record(self, processes: Processes) -> Record:
        """Figures of the examples of all processes, the same on each."""
        total, squared, count = processes.total([float(self.nll), float(self.square), self.examples])
        mean = total / count
        spread = math.sqrt(max(squared / count - mean**2, 0.0) / count)
        figures = {"loss": float(self.loss) / self.steps, "nll": mean, "nll_error": spread, "kl": float(self.kl)}
        return processes.from_first(lambda: figures)


def _train_epoch(objective: _Objective, batches: Shard, optimizer: Optimizer, cuda_graphs: bool) -> Record:
    objective.model.train()
    accelerator, processes = objective.accelerator, objective.processes
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    passes: Pass = objective.passes
    if cuda_graphs and accelerator.device.type == "cuda" and processes.count == 1:
        passes = Replayed(passes, parameters, accelerator.device)
    sums = _Sums(accelerator.device)
    for step, batch in enumerate(batches):
        optimizer.zero_grad()
        each, loss = torch.zeros(0, device=accelerator.device), torch.zeros((), device=accelerator.device)
        if batch is not NO_BATCH:
            with processes.own_noise():
                each, sums.kl, loss = passes(batch)
        loss = processes.average_(parameters, loss, len(each))
        objective.check(loss, step)
        optimizer.step()
        sums.add(each, loss)
    if sums.steps == 0:
        raise ValueError("loader gave no batch. Pass a DataLoader or a list, which can be iterated again each epoch.")
    objective.check(sums.loss, 0)
    return sums.record(processes)


@torch.no_grad()
def _evaluated(model: nn.Module, evaluate: Callable[[], Mapping[str, float]]) -> Mapping[str, float]:
    model.eval()
    try:
        return evaluate()
    finally:
        model.train()
