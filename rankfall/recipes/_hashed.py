# SPDX-License-Identifier: Apache-2.0
"""Tables in fewer rows than they have ids, as recommenders usually save memory: hashed, as two factors, or left out.

All three share out one number of rows by one rule: tables up to a limit keep a row for every id, larger ones are
replaced, and the limit is the highest that the budget bears.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from rankfall.recipes._recommender import WIDTH, Recommender

_WORD = 0xFFFFFFFF  # The lower 32 bits.


def mixed(ids: Int[Tensor, "*n"]) -> Int[Tensor, "*n"]:
    """A hash of ids from 0 to 2^32 - 1 (the last steps of MurmurHash3), int64 of the same range; no two agree.

    Example:
        >>> mixed(torch.tensor([0, 1, 2])).tolist()
        [0, 1364076727, 821347078]
    """
    h = ids.long()
    h = ((h ^ (h >> 16)) * 0x85EBCA6B) & _WORD
    h = ((h ^ (h >> 13)) * 0xC2B2AE35) & _WORD
    return h ^ (h >> 16)


class Hashed(nn.Module):
    """Feature hashing: the row of an id is its hash modulo the number of rows, and ids share rows by chance.

    Args:
        rows: Of the table.
    """

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.table = nn.Embedding(rows, WIDTH)

    def forward(self, ids: Int[Tensor, " n"]) -> Float[Tensor, "n width"]:
        """The vectors of ids."""
        return self.table(mixed(ids) % self.table.num_embeddings)


class QuotientRemainder(nn.Module):
    """Two small tables whose rows are multiplied entry by entry (Shi et al., arXiv 1909.02107).

        e(id) = quotients[id // m] * remainders[id % m],  m = rows of `remainders`

    Each pair of rows is then that of one id. Where the tables have fewer pairs than there are ids, ids are hashed to
    the pairs first.

    Args:
        size: Number of ids.
        rows: Of both tables together, 2 or more; halves make the most pairs.
    """

    def __init__(self, size: int, rows: int) -> None:
        super().__init__()
        self.quotients = nn.Embedding(rows // 2, WIDTH)
        self.remainders = nn.Embedding(rows - rows // 2, WIDTH)
        self.is_hashed = self.pairs < size

    @property
    def pairs(self) -> int:
        """Vectors that the tables can make."""
        return self.quotients.num_embeddings * self.remainders.num_embeddings

    def forward(self, ids: Int[Tensor, " n"]) -> Float[Tensor, "n width"]:
        """The vectors of ids."""
        places = mixed(ids) % self.pairs if self.is_hashed else ids
        m = self.remainders.num_embeddings
        return self.quotients(places.div(m, rounding_mode="floor")) * self.remainders(places % m)


class LeftOut(nn.Module):
    """A table that is not there: zeros for every id."""

    def forward(self, ids: Int[Tensor, " n"]) -> Float[Tensor, "n width"]:
        """Zeros."""
        return torch.zeros(len(ids), WIDTH, device=ids.device)


@dataclass(frozen=True)
class Saving:
    """A way to hold tables in fewer rows.

    Attributes:
        method: Its name on the command line.
        rows: rows(size, limit) of the tables that take the place of one with more than `limit` ids.
        make: make(size, rows) of what takes its place.
        least: The lowest limit that makes sense.
    """

    method: str
    rows: Callable[[int, int], int]
    make: Callable[[int, int], nn.Module]
    least: int

    def held(self, size: int, limit: int) -> int:
        """Rows that a table of so many ids takes."""
        return size if size <= limit else self.rows(size, limit)

    def total(self, sizes: Sequence[int], limit: int) -> int:
        """Rows that all tables take."""
        return sum(self.held(size, limit) for size in sizes)


def _both(size: int) -> int:
    """Rows of the smallest two tables with a pair for every id.

    Example:
        >>> _both(10_131_227)
        6366
    """
    m = math.isqrt(size - 1) + 1
    return m + -(-size // m)


HASHING = Saving("hashing", lambda _, limit: limit, lambda _, rows: Hashed(rows), 1)
QUOTIENT_REMAINDER = Saving(
    "quotient-remainder",
    lambda size, limit: min(limit, _both(size)),
    QuotientRemainder,
    2,
)
DROP_TABLE = Saving("drop-table", lambda size, limit: 0, lambda size, rows: LeftOut(), 0)


def save_rows_(model: nn.Module, budget: int, saving: Saving) -> None:
    """Replaces the tables of a recommender so that the whole model has at most so many parameters, and hardly fewer.

    What is beside the tables stays as it is and counts: the two networks of DLRM alone have 614,529 weights and biases,
    more than a small budget. So they come in the format and at the rank that the whole model of one fixed rank has at
    that budget; methods then differ in their tables alone.

    Args:
        model: A `Recommender`; its tables may be in any form.
        budget: Parameters of the whole model, factors counted once.
        saving: How.

    Raises:
        ValueError: If the budget does not even bear the smallest tables of this kind. The model is then as it was.
    """
    assert isinstance(model, Recommender)
    sizes = model.sizes
    beside = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("tables."))
    limits = range(saving.least, max(*sizes, saving.least) + 1)
    fitting = bisect_right(limits, budget - beside, key=lambda limit: WIDTH * saving.total(sizes, limit))
    if not fitting:
        raise ValueError(
            f"a budget of {budget:,} parameters is too small for {saving.method}: apart from the tables the model has "
            f"{beside:,}, and {len(sizes)} tables of at least {saving.least} x {WIDTH} have "
            f"{WIDTH * saving.total(sizes, saving.least):,}. Pass a larger --budget or a lower --max-rank."
        )
    model.tables = nn.ModuleList(_table(size, saving, limits[fitting - 1]) for size in sizes)


def _table(size: int, saving: Saving, limit: int) -> nn.Module:
    rows = saving.held(size, limit)
    return nn.Embedding(size, WIDTH) if rows == size else saving.make(size, rows)
