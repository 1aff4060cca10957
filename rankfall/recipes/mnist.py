# SPDX-License-Identifier: Apache-2.0
"""MNIST: a network of one hidden layer, 784-512-10, the sizes of arXiv 2010.08689, and LeNet-5."""

import gzip
import importlib
import math
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from rankfall.recipes._data import Data
from rankfall.recipes._recipe import Network, Recipe

_MEAN, _STD = 0.1307, 0.3081
_PREFIXES = {"train": "train", "test": "t10k"}
_IMAGES, _LABELS = "images-idx3-ubyte", "labels-idx1-ubyte"
_UNSIGNED_BYTE = 8


def _load(data_dir: Path | None) -> Data:
    if data_dir is None:
        return Data(_from_hub("train"), _from_hub("test"))
    if not data_dir.is_dir():
        raise FileNotFoundError(f"no folder {data_dir}. Pass --data-dir with the four idx files of MNIST.")
    return Data(_from_idx(data_dir, "train"), _from_idx(data_dir, "test"))


def _from_idx(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    images = read_idx(_find(folder, f"{_PREFIXES[part]}-{_IMAGES}"), 3)
    labels = read_idx(_find(folder, f"{_PREFIXES[part]}-{_LABELS}"), 1)
    if len(images) != len(labels):
        raise ValueError(f"{folder} holds {len(images)} {part} images, but {len(labels)} labels. Get the files again.")
    return _normalised(images), torch.from_numpy(labels.astype(np.int64))


def _normalised(images: np.ndarray) -> Tensor:
    flat = torch.from_numpy(images.reshape(len(images), -1).astype(np.float32))
    return (flat / 255 - _MEAN) / _STD


def _find(folder: Path, stem: str) -> Path:
    for name in (f"{stem}.gz", stem):
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(
        f"no file {stem}.gz or {stem} in {folder}. Pass --data-dir with the four idx files of MNIST."
    )


def read_idx(path: Path, dims: int) -> np.ndarray:
    """Reads an idx file of unsigned bytes, gzip or not.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "labels"
        ...     _ = path.write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 2, 7, 9]))
        ...     read_idx(path, 1)
        array([7, 9], dtype=uint8)

    Args:
        path: The file; a name that ends in .gz is decompressed.
        dims: The number of dimensions that it must have.

    Returns:
        The array, read-only, uint8.

    Raises:
        ValueError: If the file is damaged, truncated, or of another kind.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is damaged: {error}. Get the file again.") from error
    header = 4 * (1 + dims)
    if len(content) < header or content[:4] != bytes([0, 0, _UNSIGNED_BYTE, dims]):
        raise ValueError(f"{path} is not an idx file of bytes in {dims} dimensions. Pass the files of MNIST.")
    shape = tuple(int(n) for n in np.frombuffer(content, ">i4", count=dims, offset=4))
    if len(content) != header + math.prod(shape):
        raise ValueError(
            f"{path} is truncated or padded: its header says {header + math.prod(shape)} bytes for shape {shape}, "
            f"but there are {len(content)}. Get the file again."
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def _from_hub(part: str) -> tuple[Tensor, Tensor]:
    advice = "Pass --data-dir with the four idx files of MNIST (train-images-idx3-ubyte.gz and the others)."
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise ValueError(f"no --data-dir, and Hugging Face datasets is not installed. {advice}") from error
    try:
        rows = datasets.load_dataset("ylecun/mnist", split=part)
    except Exception as error:
        raise ValueError(
            f"MNIST could not be fetched from the Hugging Face hub ({type(error).__name__}). {advice}"
        ) from error
    images = np.stack([np.asarray(image) for image in rows["image"]])
    return _normalised(images), torch.tensor(rows["label"], dtype=torch.int64)


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Dropout(0.1), nn.Linear(512, 10))


def _lenet5() -> nn.Module:
    """The convolutional network of LeCun et al., Proceedings of the IEEE 1998, as Caffe's widths made it usual."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 28, 28)),
        nn.Conv2d(1, 20, 5),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Conv2d(20, 50, 5),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(800, 500),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.Linear(500, 10),
    )


RECIPE = Recipe(
    "mnist",
    _load,
    {
        "mlp": Network(
            _mlp,
            epochs=100,
            batch_size=128,
            lr=1e-3,
            max_rank=20,
            # Seven rows, a row, a column, seven columns: the modes follow the picture. The large modes stand at the
            # ends, where a factor has one bond and not two.
            modes={"0": ((8, 4, 2, 8), (7, 4, 4, 7))},
        ),
        "lenet5": Network(_lenet5, epochs=50, batch_size=128, lr=1e-3, max_rank=20),
    },
)
