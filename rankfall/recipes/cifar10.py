# SPDX-License-Identifier: Apache-2.0
"""CIFAR-10 with six convolutions in the manner of VGG, and with ResNet-20; shifts and mirror images as augmentation."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from rankfall.recipes._data import Data, Rows
from rankfall.recipes._recipe import Network, Recipe

_SHEETS = {"train": [f"train_{k}.webp" for k in range(5)], "test": ["test.webp"]}
_SIDE, _PER_SIDE = 32, 100  # Pixels of a picture; pictures in a row and in a column of a sheet.
_CLASSES = 10
_MEAN, _STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
_SHIFT = 4
# Moved and mirrored, a picture tells more than once what its class looks like: the data set is larger than the number
# of pictures (Osawa et al., arXiv 1906.02506, section 3, on augmentation).
_VIEWS = 10


def _load(data_dir: Path | None) -> Data:
    if data_dir is None or not data_dir.is_dir():
        where = "" if data_dir is None else f"no folder {data_dir}. "
        raise FileNotFoundError(f"{where}Pass --data-dir with the sheets {', '.join(_SHEETS['train'])} and test.webp.")
    return Data(_rows(data_dir, "train"), _rows(data_dir, "test"), augment=shifted_and_mirrored, views=_VIEWS)


def _rows(folder: Path, part: str) -> Rows:
    sheets = [read_sheet(folder / name) for name in _SHEETS[part]]
    labels = torch.arange(_PER_SIDE**2) % _CLASSES
    return torch.from_numpy(np.concatenate(sheets)), labels.repeat(len(sheets))


def read_sheet(path: Path) -> np.ndarray:
    """Reads 10,000 pictures, which stand row by row on one sheet of 100 x 100; picture i is of class i modulo 10.

    Returns:
        Shape (10000, 3, 32, 32), uint8.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, or no such sheet.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}. Pass --data-dir with the sheets of CIFAR-10.")
    side = _SIDE * _PER_SIDE
    try:
        with Image.open(path) as image:
            if image.size != (side, side):
                raise ValueError(f"{path} is a picture of {image.size}, not a sheet of {side} x {side}.")
            pixels = np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError) as error:
        raise ValueError(
            f"{path} is damaged within its {path.stat().st_size} bytes: {error}. Get the file again."
        ) from error
    cells = pixels.reshape(_PER_SIDE, _SIDE, _PER_SIDE, _SIDE, 3)
    return np.ascontiguousarray(cells.transpose(0, 2, 4, 1, 3)).reshape(-1, 3, _SIDE, _SIDE)


def shifted_and_mirrored(images: Tensor) -> Tensor:
    """Each picture moved by up to 4 pixels either way, zeros coming in, and mirrored with probability 1/2.

    Example:
        >>> shifted_and_mirrored(torch.ones(5, 3, 32, 32, dtype=torch.uint8)).shape
        torch.Size([5, 3, 32, 32])
    """
    count, _, height, width = images.shape
    padded = F.pad(images, (_SHIFT,) * 4)
    rows = torch.randint(2 * _SHIFT + 1, (count, 1)) + torch.arange(height)
    columns = torch.randint(2 * _SHIFT + 1, (count, 1)) + torch.arange(width)
    columns = torch.where(torch.rand(count, 1) < 0.5, columns.flip(1), columns)
    picture = torch.arange(count).view(-1, 1, 1)
    # Indices beside a slice bring their dimensions to the front: (n, height, width, 3).
    return padded[picture, :, rows.unsqueeze(2), columns.unsqueeze(1)].movedim(-1, 1)


class _Normalised(nn.Module):
    """Bytes to numbers of mean 0 and variance 1: the pictures stay bytes in memory."""

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name, value in (("mean", _MEAN), ("std", _STD)):
            self.register_buffer(name, torch.tensor(value).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        # Channels last is the layout that convolutions on a CPU and tensor cores are fastest in; it lasts to the end.
        return ((images / 255 - self.mean) / self.std).contiguous(memory_format=torch.channels_last)


def _convolution(width_in: int, width_out: int, stride: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(width_in, width_out, 3, stride, 1, bias=False), nn.BatchNorm2d(width_out)]


def _vgg() -> nn.Module:
    """Convolutions of Courbariaux et al., arXiv 1511.00363, at an eighth of their width; one of its hidden layers."""
    layers: list[nn.Module] = [_Normalised()]
    width_in, hidden = 3, 1024
    for width in (16, 32, 64):
        layers += [*_convolution(width_in, width), nn.ReLU(), *_convolution(width, width), nn.ReLU(), nn.MaxPool2d(2)]
        width_in = width
    layers += [nn.Flatten(), nn.Linear(width_in * 16, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU()]
    return nn.Sequential(*layers, nn.Dropout(0.5), nn.Linear(hidden, _CLASSES))


class _Block(nn.Module):
    """Two convolutions beside a shortcut without parameters (He et al., arXiv 1512.03385, section 4.2)."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.stride, self.added = width_out // width_in, width_out - width_in
        first, second = _convolution(width_in, width_out, self.stride), _convolution(width_out, width_out)
        self.body = nn.Sequential(*first, nn.ReLU(), *second)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x[:, :, :: self.stride, :: self.stride]
        return F.relu(self.body(x) + F.pad(shortcut, (0, 0, 0, 0, 0, self.added)))


def _resnet20() -> nn.Module:
    widths = (16, 16, 16, 16, 32, 32, 32, 64, 64, 64)
    blocks = [_Block(before, after) for before, after in pairwise(widths)]
    return nn.Sequential(
        _Normalised(),
        *_convolution(3, 16),
        nn.ReLU(),
        *blocks,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, _CLASSES),
    )


RECIPE = Recipe(
    "cifar10",
    _load,
    {
        "vgg": Network(_vgg, epochs=20, batch_size=128, lr=1e-3, max_rank=48, kl_warmup=6),
        "resnet20": Network(_resnet20, epochs=40, batch_size=128, lr=1e-3, max_rank=16),
    },
)
