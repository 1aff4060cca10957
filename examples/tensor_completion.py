# SPDX-License-Identifier: Apache-2.0
"""Fills in a noisy tensor of which nine entries in ten are missing. Its rank and its noise are found, not given.

python examples/tensor_completion.py --format cp
"""

import argparse
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributions import Normal
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

import rankfall as rf

FORMATS = {"cp": rf.CP, "tucker": rf.Tucker, "tt": rf.TT, "tr": rf.TR}
START_RANK = {"cp": 10, "tucker": 6, "tt": 8, "tr": 5}
SHAPE, OBSERVED = (40, 45, 50), 0.1


@dataclass(frozen=True)
class Result:
    """What was found, beside what is true. Errors are root mean squares over the entries that were never seen."""

    ranks: dict[str, int]
    true_ranks: dict[str, int]
    noise: float
    true_noise: float
    missing_error: float
    signal_std: float


class NoisyTensor(nn.Module):
    """y = tensor[place] + noise, the noise normal and of a scale that is learned along with the tensor."""

    def __init__(self, tensor: rf.LowRankTensor) -> None:
        super().__init__()
        self.tensor = tensor
        self.log_noise = nn.Parameter(torch.zeros(()))

    def forward(self, places: Tensor) -> Normal:
        # One draw from the posterior per step while training, its mean afterwards: what rf.nn layers do, too.
        dense = self.tensor.sample() if self.training else self.tensor.dense()
        return Normal(dense.flatten()[places], self.log_noise.exp())


def nll(model: nn.Module, batch: list[Tensor]) -> Tensor:
    """The negative log likelihood of each observed entry, in nats."""
    places, values = batch
    return -model(places).log_prob(values)


def main(format: str = "cp", rank: int = 3, noise: float = 0.2, epochs: int = 80, seed: int = 0) -> Result:
    torch.manual_seed(seed)
    kind = FORMATS[format]
    truth = rf.LowRankTensor(SHAPE, kind(rank), posterior=rf.Point(), initial_std=1.0)
    signal = truth.dense().detach().flatten()
    seen, missing = torch.randperm(len(signal)).tensor_split([round(OBSERVED * len(signal))])
    values = signal[seen] + noise * torch.randn(len(seen))

    # It starts at the size of the data: from far below, where a product of factors has hardly a gradient, the prior can
    # draw the whole tensor to zero before the data is heard.
    model = NoisyTensor(rf.LowRankTensor(SHAPE, kind(START_RANK[format]), initial_std=float(values.std())))
    groups = rf.parameter_groups(model.tensor, lr=1e-3)
    optimizer = torch.optim.Adam([*groups, {"params": [model.log_noise], "lr": 1e-2}])
    batches = BatchSampler(RandomSampler(values), 250, drop_last=False)
    loader = DataLoader(TensorDataset(seen, values), sampler=batches, batch_size=None)  # a whole batch at once
    rf.fit(model, loader, nll, optimizer=optimizer, epochs=epochs, num_data=len(seen), kl_warmup=10, progress=False)

    error = (model.tensor.dense().detach().flatten() - signal)[missing]
    return Result(
        ranks=model.tensor.ranks,
        true_ranks=truth.ranks,
        noise=model.log_noise.exp().item(),
        true_noise=noise,
        missing_error=error.square().mean().sqrt().item(),
        signal_std=signal.std().item(),
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--format", choices=FORMATS, default="cp")
    parser.add_argument("--rank", type=int, default=3, help="the rank that is planted")
    parser.add_argument("--noise", type=float, default=0.2, help="its standard deviation; that of the signal is 1")
    parser.add_argument("--epochs", type=int, default=80)
    parser.add_argument("--seed", type=int, default=0)
    found = main(**vars(parser.parse_args()))
    print(f"ranks            found {found.ranks}, planted {found.true_ranks}")
    print(f"noise            found {found.noise:.3f}, true {found.true_noise:.3f}")
    print(
        f"missing entries  error {found.missing_error:.3f}: {found.missing_error / found.true_noise:.0%} of the noise, "
        f"{found.missing_error / found.signal_std:.1%} of the signal"
    )
