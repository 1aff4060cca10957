# SPDX-License-Identifier: Apache-2.0
"""What the Bayesian part of a training step costs, and how a step gets faster as ranks fall.

    python benchmarks/bayesian_part.py [mnist] [imdb] [criteo] [--rounds 20] [--device cuda]

A whole training step of a recipe (forward, backward, Adam) on rows of the right shape, on one thread or on a GPU: as
rf.fit makes it, the same with log standard deviations that Adam leaves alone, with a draw and the KL of each tensor by
itself, and at the posterior means without a KL. The four take turns of eight steps, of which the first is not counted;
medians. The share of draws and KL is what the second takes more than the last; that "with Adam" is what the first takes
more, so that Adam's part of the log standard deviations is in it. Prior scales are part of the KL. Every network is
measured as its recipe begins and at other ranks. On a GPU steps are also replayed as CUDA graphs, as `rankfall train
--cuda-graphs` does, and their shares are those of these.
"""

import argparse
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
import torch.nn.functional as F
from _device import Step, add_device, captured, on_gpu, use_device
from _report import machine, table
from _steps import medians, rows_of
from torch import Tensor, nn

import rankfall as rf
from rankfall._elbo import JointDraw
from rankfall._pages import keep_pages
from rankfall.recipes._options import TrainOptions
from rankfall.recipes._run import RECIPES, build_model

_RANKS = {"mnist": (20, 10, 5, 2), "imdb": (8, 4, 2), "criteo": (None, 8, 4, 2)}  # None as the recipe has them.


def main() -> None:
    keep_pages()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipes", nargs="*", metavar="RECIPE")
    parser.add_argument("--rounds", type=int, default=20)
    add_device(parser)
    options = parser.parse_args()
    use_device(options.device)
    print(machine() + "\n")
    rows = []
    for recipe in options.recipes or _RANKS:
        for rank in _RANKS[recipe]:
            rows.append((recipe, str(rank or "as in the recipe"), *_measured(recipe, rank, options.rounds)))
            print(*rows[-1], flush=True)
    ways = ("step, ms", "log stds left alone, ms", "each by itself, ms", "at the means, ms")
    graphs = tuple(f"{way} (graph)" for way in ways) if on_gpu() else ()
    heads = ("recipe", "ranks up to", "parameters", *ways, *graphs, "share", "with Adam")
    print("\n" + table(heads, rows))


def _measured(recipe: str, rank: int | None, rounds: int) -> tuple[str, ...]:
    torch.manual_seed(0)
    network = RECIPES[recipe].network(None)
    model = build_model(network, replace(TrainOptions(recipe), max_rank=rank))  # pyright: ignore[reportArgumentType]
    optimizer = torch.optim.Adam(rf.parameter_groups(model, network.lr), fused=True, capturable=on_gpu())
    x = rows_of(recipe, network.batch_size)
    y = torch.randint(0, 10 if recipe == "mnist" else 2, (len(x),))
    joint = JointDraw(model)

    def step(draw: Callable[[], AbstractContextManager[Tensor]], left_alone: Sequence[Tensor] = ()) -> None:
        with draw() as kl:
            loss = F.cross_entropy(model(x), y) + kl / 60_000
        optimizer.zero_grad()
        loss.backward()
        joint.hand_on_()
        for parameter in left_alone:
            parameter.grad = None
        optimizer.step()

    def alone() -> None:
        loss = F.cross_entropy(model(x), y) + rf.kl(model) / 60_000
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def plain() -> None:
        for tensor in tensors:
            tensor.training = False
        step(lambda: nullcontext(torch.zeros(())))
        for tensor in tensors:
            tensor.training = True

    tensors = [module for module in model.modules() if isinstance(module, rf.LowRankTensor)]
    log_stds = [parameter for tensor in tensors for parameter in tensor.log_stds]
    steps: list[Step] = [lambda: step(joint), lambda: step(joint, log_stds), alone, plain]
    if on_gpu():
        steps += [captured(each) for each in steps]
    taken = medians(steps, rounds, in_turn=8)
    whole, without, _, mean = taken[-4:]
    shares = (without - mean) / whole, (whole - mean) / whole
    return f"{_count(model):,}", *(f"{ms:.3g}" for ms in taken), *(f"{share:.1%}" for share in shares)


def _count(model: nn.Module) -> int:
    return rf.summary(model).parameters


if __name__ == "__main__":
    main()
