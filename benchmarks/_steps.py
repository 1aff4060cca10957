# SPDX-License-Identifier: Apache-2.0
"""Training steps of the recipes' networks, on rows of the right shape, and how long they take."""

import statistics
from collections.abc import Callable

import torch
from _device import seconds
from torch import Tensor

from rankfall.recipes._clicks import draw
from rankfall.recipes._recommender import KAGGLE_SIZES

CLASSES = {"mnist": 10, "cifar10": 10, "imdb": 2, "transformer": 2, "criteo": 2}
"""The recipes that there are rows for, and their classes."""


def rows_of(recipe: str, count: int) -> Tensor:
    """Random inputs of a recipe's network."""
    if recipe == "mnist":
        return torch.randn(count, 784)
    if recipe == "cifar10":
        return torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8)
    if recipe in ("imdb", "transformer"):
        return torch.randint(1, 25_000, (count, 128))
    device = torch.get_default_device()
    with torch.device("cpu"):
        return draw(count, KAGGLE_SIZES, torch.Generator().manual_seed(0)).to(device)


def medians(works: list[Callable[[], object]], rounds: int, in_turn: int = 1) -> list[float]:
    """Of each work, the median of its milliseconds; they take turns, and two rounds are not counted.

    With several times `in_turn` a work follows itself, as steps of a training do, and finds in the caches what they
    leave there: the first time of a turn is not counted then.
    """
    taken: list[list[float]] = [[] for _ in works]
    for round_ in range(rounds + 2):
        for work, times in zip(works, taken, strict=True):
            for k in range(in_turn):
                taken_now = 1e3 * seconds(work)
                if round_ >= 2 and (k or in_turn == 1):
                    times.append(taken_now)
    return [statistics.median(times) for times in taken]
