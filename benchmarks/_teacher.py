# SPDX-License-Identifier: Apache-2.0
"""A teacher with planted ranks, and a student that starts above them and is trained by rf.fit at its defaults."""

import math
import os
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

import rankfall as rf

FORMATS = {"CP": rf.CP, "Tucker": rf.Tucker, "TT": rf.TT, "TTM": rf.TTM, "TR": rf.TR}
LINKS = {"relu": torch.relu, "tanh": torch.tanh, "softmax": lambda z: z}
POSTERIORS = {"Point": rf.Point(), "MeanField": rf.MeanField()}
PRIORS = {"half-cauchy": rf.HalfCauchy(), "log-uniform": rf.LogUniform()}

# A slice under this fraction of the strongest of its bond would be a planted rank that no data of this size shows.
_WEAKEST = 0.1
_LOGIT_SCALE, _STEPS, _LEAST_EPOCHS = 3.0, 1200, 20


@dataclass(frozen=True)
class Problem:
    """y = link(W x) + noise with W (size x size) of planted ranks, or y drawn from softmax(3 W x).

    Attributes:
        noise: Standard deviation of the noise as a part of that of link(W x); without meaning for softmax.
        lr: Step size of what is not a factor; `rf.parameter_groups` finds the factors' own.
    """

    format: str
    seed: int
    true_rank: int = 3
    size: int = 64
    num_data: int = 4000
    noise: float = 0.1
    link: str = "relu"
    posterior: str = "MeanField"
    prior: str = "half-cauchy"
    start_rank: int = 10
    batch: int = 200
    lr: float = 1e-3


class Result(NamedTuple):
    found: tuple[int, ...]
    planted: tuple[int, ...]
    error: float
    noise_ratio: float
    seconds: float

    @property
    def verdict(self) -> str:
        if self.found == self.planted:
            return "exact"
        return "over" if any(f > p for f, p in zip(self.found, self.planted, strict=True)) else "under"


class Student(nn.Module):
    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.layer = rf.nn.Linear(
            problem.size,
            problem.size,
            bias=False,
            format=FORMATS[problem.format](problem.start_rank),
            posterior=POSTERIORS[problem.posterior],
            prior=PRIORS[problem.prior],
        )
        self.link = problem.link
        self.log_sigma = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return LINKS[self.link](self.layer(x))


def negative_log_likelihood(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    if model.link == "softmax":
        return F.cross_entropy(model(x), y, reduction="none")
    return (0.5 * ((model(x) - y) / model.log_sigma.exp()).square() + model.log_sigma).sum(1)


def plant(problem: Problem) -> rf.LowRankTensor:
    """A random tensor whose slices all carry something; random ones are drawn until one does."""
    while True:
        scale = math.sqrt(2 / problem.size)
        held = FORMATS[problem.format](problem.true_rank)
        tensor = rf.LowRankTensor((problem.size, problem.size), held, posterior=rf.Point(), initial_std=scale)
        tensor.canonicalize_()
        strengths = [tensor.strengths(bond) for bond in tensor.ranks]
        if all(float(s.min()) >= _WEAKEST * float(s.max()) for s in strengths):
            return tensor


def draw_data(problem: Problem, weight: Tensor) -> tuple[Tensor, Tensor, float]:
    x = torch.randn(problem.num_data, problem.size)
    if problem.link == "softmax":
        return x, torch.distributions.Categorical(logits=_LOGIT_SCALE * x @ weight.T).sample(), math.nan
    clean = LINKS[problem.link](x @ weight.T)
    sigma = problem.noise * float(clean.std())
    return x, clean + sigma * torch.randn_like(clean), sigma


def solve(problem: Problem) -> Result:
    torch.set_num_threads(1)
    torch.manual_seed(1000 + problem.seed)
    planted = plant(problem)
    weight = planted.dense().detach()
    x, y, sigma = draw_data(problem, weight)
    torch.manual_seed(problem.seed)
    model = Student(problem)
    rows = TensorDataset(x, y)
    loader = DataLoader(rows, sampler=BatchSampler(RandomSampler(rows), problem.batch, False), batch_size=None)
    groups = rf.parameter_groups(model.layer, problem.lr)
    optimizer = torch.optim.Adam([*groups, {"params": [model.log_sigma], "lr": 10 * problem.lr}])
    started = time.perf_counter()
    rf.fit(
        model,
        loader,
        negative_log_likelihood,
        optimizer=optimizer,
        epochs=max(_LEAST_EPOCHS, round(_STEPS * problem.batch / problem.num_data)),
        num_data=problem.num_data,
        progress=False,
    )
    found = model.layer.weight
    dense = found.dense().detach()
    target = weight * (_LOGIT_SCALE if problem.link == "softmax" else 1.0)
    return Result(
        tuple(found.ranks.values()),
        tuple(planted.ranks.values()),
        float((dense - target).norm() / target.norm()),
        float(model.log_sigma.detach().exp()) / sigma,
        time.perf_counter() - started,
    )


def solve_all(problems: Iterable[Problem], jobs: int) -> list[Result]:
    problems, results = list(problems), []
    with ProcessPoolExecutor(jobs) as pool:
        for problem, result in zip(problems, pool.map(solve, problems), strict=True):
            if result.verdict != "exact" and "QUIET" not in os.environ:
                print(f"{result.verdict}: {problem} found {result.found}", flush=True)
            results.append(result)
    return results
