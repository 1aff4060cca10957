# SPDX-License-Identifier: Apache-2.0
"""What a cut frees: bytes of parameters, gradients and Adam's state of the factors, before and after.

    python benchmarks/memory_after_cut.py

The limit is 4 bytes x 4 copies (parameter, gradient, two moments) per trained entry of a factor.
"""

import itertools

import torch
from _report import machine, table
from torch import nn

import rankfall as rf


def _bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    total = 0
    for parameter in model.parameters():
        kept = [parameter.data, parameter.grad, *optimizer.state[parameter].values()]
        # The storage counts, not the view: a slice of an old tensor would keep all of it.
        total += sum(t.untyped_storage().nbytes() for t in kept if isinstance(t, torch.Tensor))
    return total


def _step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    (model(torch.randn(32, 784)).square().mean() + rf.kl(model) / 60_000).backward()
    optimizer.step()


def main() -> None:
    torch.manual_seed(0)
    print(machine(torch.get_num_threads()) + "\n")
    rows = []
    for make, posterior in itertools.product((rf.CP, rf.Tucker, rf.TT, rf.TTM, rf.TR), (rf.Point(), rf.MeanField())):
        layer = rf.nn.Linear(784, 512, bias=False, format=make(20), posterior=posterior)
        optimizer = torch.optim.Adam(layer.parameters())
        _step(layer, optimizer)
        before = _bytes(layer, optimizer)
        for bond, rank in layer.weight.ranks.items():
            layer.weight.keep_slices_(bond, torch.arange(max(1, rank // 4)), optimizer)
        after = _bytes(layer, optimizer)
        _step(layer, optimizer)
        assert _bytes(layer, optimizer) == after, "the step after the cut changed the sizes"
        entries = sum(p.numel() for p in layer.parameters())
        rows.append(
            [
                make.__name__,
                type(posterior).__name__,
                f"{before:,}",
                f"{after:,}",
                f"{entries:,}",
                f"{after / (4 * 4 * entries):.3f}",
            ]
        )
    header = (
        "format",
        "posterior",
        "bytes before",
        "bytes after",
        "trained entries after",
        "after / (4 x 4 x entries)",
    )
    print(table(header, rows))


if __name__ == "__main__":
    main()
