# SPDX-License-Identifier: Apache-2.0
"""Layers that can say how they compute, and what their planner expects that to take."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import nn

from rankfall._machine import machine
from rankfall._tensor import LowRankTensor

Sizes: TypeAlias = tuple[int, ...]


@dataclass(frozen=True)
class Expected:
    """One forward pass of a layer, as its planner sees it.

    Attributes:
        batch: What it is of, in words.
        way: How it is done, in words.
        cost: Time, in floating-point operations.
        dense_cost: The same of the dense layer.
    """

    batch: str
    way: str
    cost: int
    dense_cost: int

    @property
    def seconds(self) -> float:
        """The time expected on this computer, by the figures of `rankfall plan` if it has ever run."""
        return self.cost / machine().flops

    @property
    def dense_seconds(self) -> float:
        """The same of the dense layer."""
        return self.dense_cost / machine().flops

    def __str__(self) -> str:
        return f"{self.batch} {self.way} in {1e3 * self.seconds:.2f} ms (dense {1e3 * self.dense_seconds:.2f})"


def counted(count: int, what: str) -> str:
    """A number and what it is of, in the plural where it is one.

    Example:
        >>> counted(1, "row"), counted(2048, "id")
        ('1 row', '2,048 ids')
    """
    return f"{count:,} {what}{'s' * (count != 1)}"


class Planned(nn.Module):
    """A layer that chooses how it computes by the size of what it is given."""

    weight: LowRankTensor
    seen: Sizes = ()
    """The sizes of the last call; empty before the first."""

    @abstractmethod
    def expected(self, *sizes: int) -> Expected:
        """What a forward pass of such sizes does at the current ranks, and the time it should take."""

    def _see(self, *sizes: int) -> None:
        # Past nn.Module's own way to set an attribute, which takes longer than all else here. A compiled graph has
        # symbols for sizes, which are nothing to keep.
        if not torch.compiler.is_compiling():
            self.__dict__["seen"] = sizes

    def _described(self) -> str:
        """The weight, and how the last call's sizes would be computed now, for print(model)."""
        plan = f", {self.expected(*self.seen)}" if self.seen else ""
        return f"{self.weight.describe()}{plan}"
