# SPDX-License-Identifier: Apache-2.0
"""Made-up clicks at the size of Criteo's Kaggle data, whose truth is known: tables of low rank, planted."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from rankfall._formats import TTM
from rankfall._posteriors import Point
from rankfall.nn import Embedding
from rankfall.recipes._recommender import COUNTS, KAGGLE_SIZES, WIDTH, table_modes

PLANTED_RANK = 2

_CLICK_RATE = 0.2562  # Of Criteo's training rows.
_SPREAD = 1.6  # Standard deviation of the planted log odds: an AUC of some 0.8 for who knows them.
_PAIRS = 0.1  # Part of the variance of the log odds that pairs of tables account for.
_EXPONENT = 1.05  # Of the frequencies of ids: the k-th most frequent one is worth k to the power of minus this.
_CHUNK = 1 << 16  # Rows that are drawn at once, each chunk from a seed of its own.
_SEEDS_APART = 1_000_003  # Chunks between the streams of two seeds; only the lower 32 bits of a seed count.
_TRUTH_SEED = 2010_08689


class Truth(nn.Module):
    """Who clicks: log odds from planted tables, in products of pairs and one by one, as the model can say them.

        log odds = a + b * (sum over i of <u, e_i> + c * sum over i < j of s_ij <e_i, e_j>),  e_0 = V log(1 + counts)

    The tables are TT-matrices of rank `PLANTED_RANK` in the modes of `table_modes`. What the three digits of an id say
    is added up, which has that rank in every bond:

        e = x_1 (x) v_2 (x) v_3 + v_1 (x) x_2 (x) v_3 + v_1 (x) v_2 (x) x_3,  x_k of digit k, v_k the same for all

    a and b give the log odds a spread of 1.6 and a click rate of 25.62 % over rows as `draw` makes them, and c gives
    the pairs a tenth of the variance.

    Args:
        sizes: Rows of each table.
    """

    def __init__(self, sizes: Sequence[int] = KAGGLE_SIZES) -> None:
        super().__init__()
        self.sizes = tuple(sizes)
        with torch.random.fork_rng(devices=()), torch.no_grad():
            torch.manual_seed(_TRUTH_SEED)
            self.tables = nn.ModuleList(_planted(rows) for rows in sizes)
            self.of_counts = torch.randn(COUNTS, WIDTH) / math.sqrt(COUNTS)
            self.alone = torch.randn(WIDTH, 1)
            signs = torch.randint(0, 2, (len(sizes) + 1,) * 2) * 2.0 - 1.0
            self.signs = signs.tril(-1)
            rows = draw(_CHUNK // 4, self.sizes, torch.Generator().manual_seed(_TRUTH_SEED))
            alone, pairs = (torch.cat(c) for c in zip(*(self._scores(p) for p in rows.split(1 << 12)), strict=True))
            self.of_pairs = math.sqrt(_PAIRS / (1 - _PAIRS)) * float(alone.std() / pairs.std())
            score = alone + self.of_pairs * pairs
            self.scale = _SPREAD / float(score.std())
            self.shift = _shift_for(self.scale * score, _CLICK_RATE)
        self.requires_grad_(False).eval()

    def forward(self, rows: Int[Tensor, "n columns"]) -> Float[Tensor, " n"]:
        """The log odds of a click."""
        alone, pairs = self._scores(rows)
        return self.scale * (alone + self.of_pairs * pairs) + self.shift

    def _scores(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        counts = torch.log1p(rows[:, :COUNTS].clamp(min=0).float()) @ self.of_counts
        found = [table(ids) for table, ids in zip(self.tables, rows[:, COUNTS:].T, strict=True)]
        vectors = torch.stack([counts, *found], 1)
        products = (vectors * (self.signs @ vectors)).sum((1, 2))
        return (vectors.sum(1) @ self.alone).squeeze(1), products


def _planted(rows: int) -> Embedding:
    out_modes, in_modes = table_modes(rows)
    format = TTM(PLANTED_RANK, out_modes=out_modes, in_modes=in_modes)
    table = Embedding(rows, WIDTH, format=format, posterior=Point())
    first, middle, last = table.weight.factors
    if rows > WIDTH:
        # [x v] [v 0; x v] [v; x], digit by digit.
        first[:, :, 1] = torch.randn(first.shape[1])
        middle[0, :, :, 0] = torch.randn(middle.shape[2])
        middle[0, :, :, 1] = 0.0
        middle[1, :, :, 1] = torch.randn(middle.shape[2])
        last[0] = torch.randn(last.shape[2])
    return table


def _shift_for(log_odds: Tensor, rate: float) -> float:
    low, high = -20.0, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if float((log_odds + middle).sigmoid().mean()) < rate else (low, middle)
    return (low + high) / 2


def draw(count: int, sizes: Sequence[int], generator: torch.Generator) -> Int[Tensor, "count columns"]:
    """Rows of 13 counts (-1 where one is missing) and an id per table, int32.

    Ids follow Zipf's law; which id is the how most frequent is scattered over the table.

    Example:
        >>> draw(5, (10, 1000), torch.Generator().manual_seed(0)).shape
        torch.Size([5, 15])
    """
    counts = torch.randn(count, COUNTS, generator=generator).mul_(1.3).add_(torch.linspace(0, 3, COUNTS)).exp_().int()
    counts[torch.rand(count, COUNTS, generator=generator) < 0.1] = -1
    rows = torch.tensor(sizes, dtype=torch.float64)
    uniform = torch.rand(count, len(sizes), generator=generator, dtype=torch.float64)
    # The inverse of the continuous distribution function of a power law from 1 to rows + 1.
    power = 1 - _EXPONENT
    place = (1 + uniform * ((rows + 1) ** power - 1)) ** (1 / power)
    place = place.long().sub_(1).clamp_(min=0).minimum(rows.long() - 1)
    steps = torch.tensor([_coprime(n) for n in sizes])
    return torch.cat([counts, ((place * steps + steps // 2) % rows.long()).int()], 1)


def _coprime(rows: int) -> int:
    step = max(1, int(0.618 * rows))
    while math.gcd(step, rows) > 1:
        step += 1
    return step


@dataclass(frozen=True)
class Clicks:
    """Made-up rows with their labels, and what the truth says of each."""

    rows: Tensor
    labels: Tensor
    log_odds: Tensor


def make_clicks(count: int, seed: int, truth: Truth | None = None) -> Clicks:
    """The first `count` rows of the stream of a seed, labels drawn from the truth.

    Args:
        count: How many rows.
        seed: Of the stream; another one gives other rows under the same truth.
        truth: Who clicks; at full size if left out.
    """
    parts = list(_chunks(count, seed, Truth() if truth is None else truth))
    return Clicks(*(torch.cat([getattr(part, name) for part in parts]) for name in ("rows", "labels", "log_odds")))


@torch.no_grad()
def _chunks(count: int, seed: int, truth: Truth) -> Iterator[Clicks]:
    for k in range(-(-count // _CHUNK)):
        generator = torch.Generator().manual_seed(seed * _SEEDS_APART + k)
        rows = draw(_CHUNK, truth.sizes, generator)
        chance = torch.rand(_CHUNK, generator=generator)
        kept = min(_CHUNK, count - k * _CHUNK)
        rows, chance = rows[:kept], chance[:kept]
        log_odds = torch.cat([truth(part) for part in rows.split(1 << 12)])
        yield Clicks(rows, (chance < log_odds.sigmoid()).long(), log_odds)
