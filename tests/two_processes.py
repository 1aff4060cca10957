# SPDX-License-Identifier: Apache-2.0
"""What two processes do in test_processes.py, and how they are started."""

import multiprocessing
import os
import socket
import time
import traceback
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import rankfall as rf
from rankfall import _selection

N = 600
MARK = 9.0
LIMIT = 240  # Seconds after which two processes count as hanging.


def run_two(folder: Path, *scenarios: str, machines: int = 1) -> dict[str, list]:
    """Runs scenarios one after another on two processes; returns what each gave on either, an error as its text.

    With two `machines`, nccl takes the processes for two machines, so that they may share a GPU.
    """
    context = multiprocessing.get_context("spawn")
    port = free_port()
    processes = [
        context.Process(target=_work, args=(index, environment(index, port, machines), folder, scenarios))
        for index in range(2)
    ]
    for process in processes:
        process.start()
    end = time.monotonic() + LIMIT
    for process in processes:
        process.join(max(end - time.monotonic(), 0.0))
    hanging = [process for process in processes if process.is_alive()]
    for process in hanging:
        process.kill()
    files = {name: [folder / f"{name}-{index}.pt" for index in range(2)] for name in scenarios}
    return {
        name: [torch.load(path, weights_only=False) if path.exists() else "no answer: it hung" for path in paths]
        for name, paths in files.items()
    }


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(index: int, port: int, machines: int = 1) -> dict[str, str]:
    """What torchrun tells one of two processes."""
    alone = {"NCCL_HOSTID": f"machine {index}", "NCCL_SOCKET_IFNAME": "lo"} if machines == 2 else {}
    return alone | {
        "RANK": str(index),
        "LOCAL_RANK": str(index if machines == 1 else 0),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": str(2 // machines),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }


def _work(index: int, place: dict[str, str], folder: Path, scenarios: tuple[str, ...]) -> None:
    os.environ |= place
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    for name in scenarios:
        try:
            answer = globals()[name](index, folder)
        except Exception as error:
            answer = "".join(traceback.format_exception(error))
        torch.save(answer, folder / f"{name}-{index}.pt")
    dist.destroy_process_group()


def assert_same_bits(one, other):
    """Of whatever a state_dict holds."""
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same_bits(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same_bits(a, b)
    else:
        assert one == other


def data(dtype: torch.dtype = torch.float32):
    """Outputs of a layer whose weight has rank 1 at every bond, with noise of 0.1."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        weight = 3 * rf.LowRankTensor((20, 24), rf.TT(1), posterior=rf.Point()).dense().detach()
        x = torch.randn(N, 24)
        y = torch.tanh(x @ weight.T) + 0.1 * torch.randn(N, 20)
    return x.to(dtype), y.to(dtype)


def squared_error(model, batch):
    x, y = batch
    return (model(x) - y).square().sum(1) / (2 * 0.1**2)


def model_of(seed: int, *before: nn.Module):
    torch.manual_seed(seed)
    return nn.Sequential(*before, rf.nn.Linear(24, 20, format=rf.TT(5)), nn.Tanh())


def loader_of(size: int):
    return DataLoader(TensorDataset(*data()), batch_size=size, shuffle=True)


def fingerprint(parameters) -> float:
    return sum(float(p.detach().double().sum()) for p in parameters)


def fit(model, loader=None, nll=squared_error, optimizer=None, **arguments):
    optimizer = optimizer or torch.optim.Adam(rf.parameter_groups(model, 1e-3))
    return rf.fit(
        model,
        loader_of(25) if loader is None else loader,
        nll,
        optimizer=optimizer,
        **{"epochs": 3, "num_data": N, "progress": False} | arguments,
    )


def cuts(index: int, folder: Path):
    """Trains from states that have nothing in common; keeps what the parameters were before every step."""
    model = model_of(seed=index)
    optimizer = torch.optim.Adam(rf.parameter_groups(model, 5e-3 * (1 + index)), betas=(0.9 - 0.1 * index, 0.999))
    optimizer.param_groups.reverse() if index else None
    steps, noise, means = [], [], []

    def nll(model, batch):
        if torch.is_grad_enabled():
            steps.append(fingerprint(model.parameters()))
            noise.append(float(torch.rand(())))
            means.append(float(batch[0].mean()))
        return squared_error(model, batch)

    history = fit(model, nll=nll, optimizer=optimizer, epochs=40, kl_warmup=3)
    return {
        "state": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "ranks": rf.ranks(model),
        "history": history,
        "steps": steps,
        "noise": noise,
        "means": means,
    }


def grows(index: int, folder: Path):
    """Two epochs that end with a slice more at every bond."""
    model, usual = model_of(seed=index), _selection.next_step
    for bond in model[0].weight.ranks:
        model[0].weight.keep_slices_(bond, torch.arange(2))
    _selection.next_step = lambda *_: "grow"
    try:
        history = fit(model, epochs=2, kl_warmup=0)
    finally:
        _selection.next_step = usual
    return model.state_dict(), [record["ranks"] for record in history]


class Marked(nn.Module):
    """A network with a parameter that only the rows with a mark need, and one that nothing does."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Sequential(rf.nn.Linear(24, 20, format=rf.CP(3), posterior=rf.Point()), nn.Tanh()).double()
        self.shift = nn.Parameter(torch.zeros(20, dtype=torch.float64))
        self.unused = nn.Parameter(torch.ones(3, dtype=torch.float64))

    def forward(self, x):
        marked = x[:, 0] == MARK
        return self.net(x) + marked[:, None] * self.shift if bool(marked.any()) else self.net(x)


def gradient_run(rows: list[slice]):
    """An epoch over batches of these rows; where it leads, the gradients of its last step, and its record."""
    x, y = data(torch.float64)
    x[:10, 0] = MARK
    model = Marked()
    log_scale = nn.Parameter(torch.zeros((), dtype=torch.float64))  # Of the noise: trained, though not the model's.

    def nll(model, batch):
        x, y = batch
        return 0.5 * ((model(x) - y) * torch.exp(-log_scale)).square().sum(1) + 20 * log_scale

    optimizer = torch.optim.SGD([*model.parameters(), log_scale], lr=1e-3)
    batches = [(x[part], y[part]) for part in rows]
    (record,) = fit(model, batches, nll, optimizer, epochs=1, kl_warmup=0, selection=None, num_data=100)
    parameters = [*model.parameters(), log_scale]
    return [p.detach() for p in parameters], [p.grad for p in parameters], record


def even(index: int, folder: Path):
    return gradient_run([slice(0, 50), slice(50, 100)])


def uneven(index: int, folder: Path):
    """Three batches: in the last round one process has none."""
    return gradient_run([slice(0, 60), slice(60, 75), slice(75, 100)])


def one_batch(index: int, folder: Path):
    return gradient_run([slice(0, 100)])


def resumed(index: int, folder: Path):
    """Three runs: whole, stopped after two epochs and resumed; only the first process can read and write."""
    folder = folder if index == 0 else folder / "no such folder"
    answers = []
    for name, stop in (("whole", None), ("part", 2), ("part", None)):
        model, seen = model_of(5 + len(answers) * index, nn.BatchNorm1d(24)), []
        optimizer = torch.optim.Adam(rf.parameter_groups(model, 1e-3))

        def evaluate(seen=seen, stop=stop, model=model):
            seen.append(1)
            if stop is not None and len(seen) > stop:
                raise KeyboardInterrupt
            return {"probe": model(data()[0]).sum().item()}

        torch.manual_seed(11 if name == "whole" or stop else 99)
        try:
            history = fit(
                model,
                optimizer=optimizer,
                epochs=6,
                kl_warmup=1,
                selection=rf.Shrinkage(0.6),
                evaluate=evaluate,
                checkpoint=folder / name,
            )
        except KeyboardInterrupt:
            continue
        answers.append((model.state_dict(), optimizer.state_dict(), history))
    return answers


def goes_on(index: int, folder: Path):
    """Goes on from a checkpoint that one process has left after two of four epochs."""
    model = model_of(seed=index)
    history = fit(model, epochs=4, checkpoint=folder / "one.pt")
    return model.state_dict(), history


def stops(index: int, folder: Path):
    """The first two of four epochs."""
    return _interrupted(folder / "two.pt")


def _interrupted(path: Path):
    seen = []

    def evaluate():
        seen.append(1)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return {}

    model = model_of(seed=0)
    try:
        fit(model, epochs=4, evaluate=evaluate, checkpoint=path)
    except KeyboardInterrupt:
        return rf.ranks(model)


def nan_in_one_part(index: int, folder: Path):
    x, y = data()
    return fit(model_of(0), [(x, y), (x * float("nan"), y)])


def evaluate_fails_on_the_second(index: int, folder: Path):
    return fit(model_of(0), evaluate=lambda: {"accuracy": 1 / (1 - index)})


class StrangeError(Exception):
    """An error that cannot be sent as it is."""

    def __init__(self, this: str, that: str) -> None:
        super().__init__(f"{this} and {that}")


def strange_error(index: int, folder: Path):
    def evaluate():
        if index == 1:
            raise StrangeError("this", "that")
        return {}

    return fit(model_of(0), evaluate=evaluate)


def damaged_checkpoint(index: int, folder: Path):
    (folder / "damaged.pt").write_bytes(b"no zip file")
    return fit(model_of(0), checkpoint=folder / "damaged.pt")


def no_folder(index: int, folder: Path):
    return fit(model_of(0), checkpoint=folder / "nowhere" / "run.pt")


def another_model(index: int, folder: Path):
    return fit(nn.Sequential(nn.Linear(24, 20 + index)))


def sparse_gradients(index: int, folder: Path):
    model = nn.Sequential(nn.Embedding(10, 3, sparse=True))
    batches = [torch.arange(5), torch.arange(5)]
    return fit(model, batches, lambda model, batch: model(batch).sum(1), torch.optim.SGD(model.parameters(), 0.1))


def no_batch(index: int, folder: Path):
    return fit(model_of(0), [])


def only_the_first_writes(index: int, folder: Path):
    called = []
    fit(model_of(0), epochs=2, on_epoch=lambda history: called.append(len(history)))
    return called


def other_modes(index: int, folder: Path):
    in_modes = (4, 6) if index == 0 else (6, 4)
    return fit(nn.Sequential(rf.nn.Linear(24, 20, format=rf.TTM(2, in_modes=in_modes))))
