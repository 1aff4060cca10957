# SPDX-License-Identifier: Apache-2.0
"""Products by oneDNN, which torch multiplies with in compiled models, and in others only convolves."""

from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor


def by_onednn(a: Float[Tensor, "m k"], b: Float[Tensor, "n k"], bias: Float[Tensor, " n"] | None = None) -> Tensor:
    """A @ B.T + bias in float32, in any order of axes, without gradients."""
    value: Tensor = torch.ops.mkldnn._linear_pointwise.default(_without_gaps(a), _without_gaps(b), bias, "none", [], "")
    return value


def _without_gaps(matrix: Tensor) -> Tensor:
    # Of a matrix that is part of a larger one a plain loop may take hold, a thousand times slower.
    return matrix if matrix.is_contiguous() or matrix.T.is_contiguous() else matrix.contiguous()


@cache
def has_onednn() -> bool:
    """Whether this torch has such products, and they are right."""
    if not torch.backends.mkldnn.is_available():
        return False
    a, b = torch.arange(6.0, device="cpu").view(2, 3), torch.arange(12.0, device="cpu").view(4, 3)
    try:
        return torch.equal(by_onednn(a, b), a @ b.T)
    except (AttributeError, RuntimeError):
        return False
