# SPDX-License-Identifier: Apache-2.0
"""What a second process brings: examples per second of the MNIST network on one process and on two, one thread each.

    python benchmarks/processes.py

784-512-10 in TT-matrix form, MeanField, start rank 20, random inputs; steps of 512 and of 4,096 examples in all, which
two processes share. Timed are epochs of `rf.fit` after the first, the median of them. Then two processes train for
twenty epochs, make three cuts or more, and say whether their factors are equal to the bit.
"""

import hashlib
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator

import torch
from _report import machine, table

import rankfall as rf
from rankfall._processes import is_first_started, leave, number_started
from rankfall.recipes._options import TrainOptions
from rankfall.recipes._run import RECIPES, build_model

_ROWS, _EPOCHS, _CUTS = 16_384, 6, 3
_BATCHES = (512, 4096)


def main() -> None:
    print(machine(1) + " in each process\n")
    one, two = ([_started(count, "speed", size) for size in _BATCHES] for count in (1, 2))
    rows = [
        (f"{size:,}", f"{a:,.0f}", f"{b:,.0f}", f"{b / a:.2f}") for size, a, b in zip(_BATCHES, one, two, strict=True)
    ]
    print(table(("examples a step", "one process, examples/s", "two processes, examples/s", "gain"), rows) + "\n")
    cuts, equal = _started(2, "cuts", 512)
    print(f"{cuts} cuts on two processes; factors and optimizer state equal to the bit: {'yes' if equal else 'NO'}")


def _started(count: int, what: str, size: int):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    command = [sys.executable, *torchrun, __file__, what, str(size)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def _nll(model: torch.nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    inputs, labels = batch
    return torch.nn.functional.cross_entropy(model(inputs), labels, reduction="none")


class _Batches:
    """Rows of a teacher with ten classes, by the batch: labels that a thin network can learn."""

    def __init__(self, size: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.size = size // number_started()
        self.inputs = torch.randn(_ROWS, 784, generator=generator)
        self.labels = (self.inputs[:, :64] @ torch.randn(64, 10, generator=generator)).argmax(1)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return iter(zip(self.inputs.split(self.size), self.labels.split(self.size), strict=True))


def _run(size: int, **arguments):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = build_model(RECIPES["mnist"].network(None), TrainOptions("mnist"))
    optimizer = torch.optim.Adam(rf.parameter_groups(model, 1e-3))
    fixed = {"optimizer": optimizer, "num_data": _ROWS, "progress": False}
    return rf.fit(model, _Batches(size), _nll, **fixed, **arguments), model, optimizer


def _speed(size: int) -> float:
    history, _, _ = _run(size, epochs=_EPOCHS, selection=None)
    return _ROWS / statistics.median(record["seconds"] for record in history[1:])


def _cuts(size: int) -> tuple[int, bool]:
    history, model, optimizer = _run(size, epochs=20, kl_warmup=1, selection=rf.Evidence(2048))
    made = sum(len(record["cuts"]) for record in history if record["selection"] == "cut")
    assert made >= _CUTS, f"{made} cuts are too few to say anything"
    kept = [p.detach() for p in model.parameters()]
    kept += [value for p in model.parameters() for value in optimizer.state[p].values()]
    digest = hashlib.sha256(b"".join(t.numpy().tobytes() for t in kept)).hexdigest()
    digests = [""] * number_started()
    torch.distributed.all_gather_object(digests, digest)
    return made, len(set(digests)) == 1


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    else:
        answer = {"speed": _speed, "cuts": _cuts}[sys.argv[1]](int(sys.argv[2]))
        if is_first_started():
            print(json.dumps(answer))
        leave()
