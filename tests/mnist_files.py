# SPDX-License-Identifier: Apache-2.0
"""A tiny data set in MNIST's own file format."""

import gzip
from pathlib import Path

import numpy as np

IMAGES, LABELS = "images-idx3-ubyte", "labels-idx1-ubyte"


def write_mnist(folder: Path, *, rows: int = 40, zipped: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Writes the four files, train and test alike, and returns their images and labels."""
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (rows, 28, 28), dtype=np.uint8)
    labels = random.integers(0, 10, rows, dtype=np.uint8)
    for prefix in ("train", "t10k"):
        for stem, array in ((IMAGES, images), (LABELS, labels)):
            header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
            content = header + array.tobytes()
            path = folder / f"{prefix}-{stem}{'.gz' if zipped else ''}"
            path.write_bytes(gzip.compress(content) if zipped else content)
    return images, labels
