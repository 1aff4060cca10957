# SPDX-License-Identifier: Apache-2.0
"""The deep learning recommendation model of Naumov et al., arXiv 1906.00091, at the size of Criteo's Kaggle data."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from rankfall._layout import Modes
from rankfall._modes import balanced_modes

COUNTS = 13
"""Integer features of a row; its other columns are ids."""

WIDTH = 128
# Kaggle's display advertising challenge, after facebookresearch/dlrm; 33,762,577 rows in all.
KAGGLE_SIZES = (
    *(1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194),
    *(27, 14992, 5461306, 10, 5652, 2173, 4, 7046547, 18, 15, 286181, 105, 142572),
)
_BOTTOM, _TOP = (512, 256, 256, WIDTH), (512, 256, 1)
# Rows of a table start with a spread of 1, and count as so much of it: before they have learned anything, each is noise
# to the others.
_SMALLER = 0.3
_SMALL = 1000  # Rows up to which each has numbers of its own.


def table_modes(rows: int) -> tuple[Modes, Modes]:
    """(row modes, column modes) of a table: three digits of an id, or for a small table the id itself.

    Example:
        >>> table_modes(10_131_227), table_modes(24)
        (((204, 215, 231), (4, 4, 8)), ((24, 1, 1), (1, 8, 16)))
    """
    if rows <= _SMALL:
        return (rows, 1, 1), (1, 8, 16)
    return balanced_modes(rows, 3), (4, 4, 8)


class _Products(torch.autograd.Function):
    """Inner products of pairs of vectors: (n, vectors, width) to (n, pairs), with one product for the gradient.

    Of `vectors @ vectors.mT` autograd knows no symmetry, and takes two, and their sum.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, vectors: Tensor, pairs: Tensor) -> Tensor:  # pyright: ignore
        ctx.save_for_backward(vectors, pairs)
        return (vectors @ vectors.mT).flatten(1).index_select(1, pairs)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, None]:  # pyright: ignore
        vectors, pairs = ctx.saved_tensors  # pyright: ignore[reportAttributeAccessIssue]
        n, count, _ = vectors.shape
        upper = gradient.new_zeros(n, count * count).index_copy_(1, pairs, gradient).view(n, count, count)
        return (upper + upper.mT) @ vectors, None


class Recommender(nn.Module):
    """13 counts through one network, 26 ids through tables, their products in pairs, and a second network to one logit.

    The tables of the dense model have 4.3 billion entries, so they are made without memory, on torch's meta device;
    `rf.tensorize_` gives them factors.

    Args:
        sizes: Rows of each table.
        stored: Whether the tables are made in memory.
    """

    pairs: Tensor
    weights: Tensor

    def __init__(self, sizes: Sequence[int] = KAGGLE_SIZES, *, stored: bool = False) -> None:
        super().__init__()
        self.sizes = tuple(sizes)
        device = None if stored else "meta"
        tables = (nn.Embedding(rows, WIDTH, device=device) for rows in sizes)
        self.tables = nn.ModuleList(tables)
        self.bottom = _perceptron((COUNTS, *_BOTTOM), last=nn.ReLU())
        vectors = len(sizes) + 1
        # Those with the counts' vector first: what a table says by itself comes in side by side, as modes like it.
        i, j = torch.triu_indices(vectors, vectors, offset=1)
        self.register_buffer("pairs", i * vectors + j, persistent=False)
        weights = torch.where(i == 0, _SMALLER, _SMALLER**2) / WIDTH**0.5
        self.register_buffer("weights", weights, persistent=False)
        self.top = _perceptron((WIDTH + len(i), *_TOP), last=nn.Identity())

    def forward(self, rows: Tensor) -> Tensor:
        """Logits of no click, always 0, and of a click, shape (n, 2), from counts and ids, shape (n, 13 + tables)."""
        counts = self.bottom(torch.log1p(rows[:, :COUNTS].clamp(min=0).float()))
        ids = rows[:, COUNTS:].T
        vectors = torch.stack([counts, *(table(one) for table, one in zip(self.tables, ids, strict=True))], 1)
        products: Tensor = _Products.apply(vectors, self.pairs)  # pyright: ignore
        logit = self.top(torch.cat([counts, products * self.weights], 1))
        return torch.cat([torch.zeros_like(logit), logit], 1)


def _perceptron(widths: Sequence[int], last: nn.Module) -> nn.Sequential:
    layers = [part for a, b in pairwise(widths) for part in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1], last)
