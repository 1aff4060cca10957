# SPDX-License-Identifier: Apache-2.0
"""What a recipe is: data, a dense model, and the numbers that train it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from rankfall._formats import Modes


@dataclass(frozen=True)
class Data:
    """Inputs and class labels, all in memory: (train_inputs, train_labels), (test_inputs, test_labels)."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]

    def limited(self, rows: int | None) -> "Data":
        """The first `rows` training rows, and as many for testing; None keeps all."""
        first = slice(rows)
        return Data((self.train[0][first], self.train[1][first]), (self.test[0][first], self.test[1][first]))

    def batches(self, size: int) -> DataLoader:
        """Shuffled batches of the training rows, each gathered by one indexing."""
        rows = TensorDataset(*self.train)
        return DataLoader(rows, sampler=BatchSampler(RandomSampler(rows), size, drop_last=False), batch_size=None)


@dataclass(frozen=True)
class Recipe:
    """A training run that is ready to go.

    Attributes:
        name: What `rankfall train` calls it.
        load: Reads the data from a folder, or from where it is at home if the folder is None.
        model: Makes the dense model.
        epochs: Passes over the data.
        batch_size: Rows per step.
        lr: Adam's step size for weights and biases; `rf.parameter_groups` finds that of factors.
        max_rank: Rank of every bond at the start. The KL of all entries is shared out over the data, so few data and
            high ranks make it drown the likelihood before anything is learned.
        paired_modes: For a TT-matrix, the (out_modes, in_modes) of a layer by its path; others are chosen.
    """

    name: str
    load: Callable[[Path | None], Data]
    model: Callable[[], nn.Module]
    epochs: int
    batch_size: int
    lr: float
    max_rank: int
    paired_modes: dict[str, tuple[Modes, Modes]]
