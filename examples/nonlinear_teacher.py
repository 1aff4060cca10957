# SPDX-License-Identifier: Apache-2.0
"""Learns y = relu(W x) + noise, with W a TT-matrix of low ranks. The ranks and the noise are found, not given.

python examples/nonlinear_teacher.py --seed 0
"""

import argparse
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributions import Normal
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

import rankfall as rf

WIDTH, NUM_DATA = 64, 4000


@dataclass(frozen=True)
class Result:
    """What was found, beside what is true. The error is |W found - W| / |W|."""

    ranks: dict[str, int]
    true_ranks: dict[str, int]
    noise: float
    true_noise: float
    weight_error: float


class Student(nn.Module):
    """y = relu(W x) + noise, the noise normal and of a scale that is learned along with W."""

    def __init__(self, weight: rf.LowRankTensor) -> None:
        super().__init__()
        self.weight = weight
        self.log_noise = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Normal:
        # linear() draws one W from the posterior per call while training and takes its mean afterwards.
        return Normal(self.weight.linear(x).relu(), self.log_noise.exp())


def nll(model: nn.Module, batch: list[Tensor]) -> Tensor:
    """The negative log likelihood of each example, in nats: summed over its outputs."""
    x, y = batch
    return -model(x).log_prob(y).sum(1)


def main(rank: int = 3, noise: float = 0.1, epochs: int = 60, seed: int = 0) -> Result:
    torch.manual_seed(seed)
    # Rows of norm sqrt(2), so that relu(W x) is as large as x.
    truth = rf.LowRankTensor((WIDTH, WIDTH), rf.TTM(rank), posterior=rf.Point(), initial_std=math.sqrt(2 / WIDTH))
    weight = truth.dense().detach()
    x = torch.randn(NUM_DATA, WIDTH)
    clean = (x @ weight.T).relu()
    y = clean + noise * torch.randn_like(clean)

    model = Student(rf.LowRankTensor((WIDTH, WIDTH), rf.TTM(max_rank=10)))
    groups = rf.parameter_groups(model.weight, lr=1e-3)
    optimizer = torch.optim.Adam([*groups, {"params": [model.log_noise], "lr": 1e-2}])
    batches = BatchSampler(RandomSampler(x), 200, drop_last=False)
    loader = DataLoader(TensorDataset(x, y), sampler=batches, batch_size=None)  # a whole batch at once
    rf.fit(model, loader, nll, optimizer=optimizer, epochs=epochs, num_data=NUM_DATA, kl_warmup=10, progress=False)

    return Result(
        ranks=model.weight.ranks,
        true_ranks=truth.ranks,
        noise=model.log_noise.exp().item(),
        true_noise=noise,
        weight_error=((model.weight.dense() - weight).norm() / weight.norm()).item(),
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=3, help="the rank that is planted in every bond")
    parser.add_argument(
        "--noise", type=float, default=0.1, help="its standard deviation; that of relu(W x) is about 0.8"
    )
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    found = main(**vars(parser.parse_args()))
    print(f"ranks   found {found.ranks}, planted {found.true_ranks}")
    print(f"noise   found {found.noise:.4f}, true {found.true_noise:.4f}")
    print(f"weight  off by {found.weight_error:.2%} of its norm")
