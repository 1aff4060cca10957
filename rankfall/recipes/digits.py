# SPDX-License-Identifier: Apache-2.0
"""Handwritten digits of 8 x 8 pixels, which scikit-learn ships: a whole run in well under a minute, without network."""

from pathlib import Path

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

from rankfall.recipes._data import Data
from rankfall.recipes._recipe import Network, Recipe


def _load(data_dir: Path | None) -> Data:
    if data_dir is not None:
        raise ValueError("digits comes with scikit-learn and reads no folder. Leave --data-dir out.")
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images / 16.0, labels, test_size=0.2, random_state=0, stratify=labels)
    train_x, test_x = (torch.tensor(part, dtype=torch.float32) for part in parts[:2])
    train_y, test_y = (torch.tensor(part, dtype=torch.int64) for part in parts[2:])
    return Data((train_x, train_y), (test_x, test_y))


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))


RECIPE = Recipe("digits", _load, {"mlp": Network(_mlp, epochs=150, batch_size=32, lr=1e-3, max_rank=8)})
