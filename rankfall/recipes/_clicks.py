# SPDX-License-Identifier: Apache-2.0
"""Made-up clicks at the size of Criteo's Kaggle data, whose truth is known: tables of low rank, planted."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from rankfall._layout import Modes
from rankfall.recipes._recommender import COUNTS, KAGGLE_SIZES, WIDTH, table_modes
from rankfall.recipes._stored import Rows

_CLICK_RATE = 0.2562  # Of Criteo's training rows.
_SPREAD = 1.6  # Standard deviation of the planted log odds: an AUC of some 0.8 for who knows them.
_PAIRS = 0.1  # Part of the variance of the log odds that pairs of tables account for.
_EXPONENT = 1.05  # Of the frequencies of ids: the k-th most frequent one is worth k to the power of minus this.
_FEW = 512  # Rows whose vectors are looked at at once.
_CHUNK = 1 << 16  # Rows that are drawn at once, each chunk from a seed of its own.
_SEEDS_APART = 1_000_003  # Chunks between the streams of two seeds; only the lower 32 bits of a seed count.
_TRUTH_SEED = 2010_08689


class Truth:
    """Who clicks: log odds from planted tables, one by one and in products of pairs, as the model can say them.

        log odds = a + b * (<u, sum over i of e_i> + c * sum over i < j of s_i s_j <e_i, e_j>),  e_0 = V log(1 + counts)

    The signs s_i are 1 or -1, which makes the pairs a factorisation machine (Rendle, ICDM 2010). Each e_i is a row of a
    table that is a TT-matrix in the modes of `table_modes`: what the digits of an id say is added up,

        e = x_1 (x) v_2 (x) v_3 + v_1 (x) x_2 (x) v_3 + v_1 (x) v_2 (x) x_3,  x_k of digit k, v_k the same for all

    which has rank 2 in every bond; a table whose id is a digit by itself has the first term only, and rank 1. a and b
    give the log odds a spread of 1.6 and a click rate of 25.62 % over rows as `draw` makes them, and c gives the pairs
    a tenth of the variance.

    Args:
        sizes: Rows of each table.

    Attributes:
        sizes: Rows of each table.
        ranks: The planted rank of each table.
    """

    def __init__(self, sizes: Sequence[int] = KAGGLE_SIZES) -> None:
        self.sizes = tuple(sizes)
        modes = [table_modes(rows) for rows in sizes]
        self.ranks = tuple(1 if out_modes[1] == 1 else 2 for out_modes, _ in modes)
        noise = partial(torch.randn, generator=torch.Generator().manual_seed(_TRUTH_SEED))
        # What a digit says, for all digits of all tables one after another, and where those of a table begin.
        self._says = torch.cat([_planted(*of_table, noise) for of_table in modes])
        self._modes = torch.tensor([out_modes for out_modes, _ in modes])
        counts = self._modes.flatten().cumsum(0)
        self._firsts = (counts - self._modes.flatten()).view(-1, 3)
        self._of_counts = noise(COUNTS, WIDTH) / math.sqrt(COUNTS)
        self._alone = noise(WIDTH)
        self._signs = noise(len(sizes) + 1).sign()
        alone, pairs = self._scores(draw(_CHUNK // 4, self.sizes, torch.Generator().manual_seed(_TRUTH_SEED)))
        self._of_pairs = math.sqrt(_PAIRS / (1 - _PAIRS)) * float(alone.std() / pairs.std())
        score = alone + self._of_pairs * pairs
        self._scale = _SPREAD / float(score.std())
        self._shift = _shift_for(self._scale * score, _CLICK_RATE)

    def __call__(self, rows: Int[Tensor, "n columns"]) -> Float[Tensor, " n"]:
        """The log odds of a click."""
        alone, pairs = self._scores(rows)
        return self._scale * (alone + self._of_pairs * pairs) + self._shift

    def vectors(self, rows: Int[Tensor, "n columns"]) -> Float[Tensor, "n vectors width"]:
        """What the counts and each table say, e_0 to e_26."""
        counts = torch.log1p(rows[:, :COUNTS].clamp(min=0).float()) @ self._of_counts
        ids, (_, middle, last) = rows[:, COUNTS:].long(), self._modes.unbind(1)
        digits = torch.stack([ids // (middle * last), ids // last % middle, ids % last], 2) + self._firsts
        found = nn.functional.embedding_bag(digits.flatten(0, 1), self._says, mode="sum").view(len(rows), -1, WIDTH)
        return torch.cat([counts.unsqueeze(1), found], 1)

    def parts(self, rows: Int[Tensor, "n columns"]) -> tuple[Float[Tensor, "n vectors"], Float[Tensor, "n vectors"]]:
        """What each vector adds to the log odds by itself, and in its pairs, of which it gets one half each.

        All of it adds up to the log odds, but for a.
        """
        alone, pairs = [], []
        for few in rows.split(_FEW):
            vectors = self.vectors(few)
            signed = vectors * self._signs.unsqueeze(1)
            alone.append(vectors @ self._alone)
            pairs.append((signed * (signed.sum(1, keepdim=True) - signed)).sum(2) / 2)
        return self._scale * torch.cat(alone), self._scale * self._of_pairs * torch.cat(pairs)

    def _scores(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        # A few rows at a time, whose vectors stay in the processor's cache.
        return tuple(map(torch.cat, zip(*map(self._few_scores, rows.split(_FEW)), strict=True)))  # pyright: ignore

    def _few_scores(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        vectors = self.vectors(rows)
        signed = torch.einsum("nvw,v->nw", vectors, self._signs)
        return vectors.sum(1) @ self._alone, (signed.square().sum(1) - vectors.square().sum((1, 2))) / 2


def _planted(out_modes: Modes, in_modes: Modes, noise: Callable[..., Tensor]) -> Tensor:
    """What each digit adds to the row of a table, shape (sum of `out_modes`, 128), of mean square 1 in a row."""
    same = [math.sqrt(n) * nn.functional.normalize(noise(n), dim=0) for n in in_modes]
    says = []
    for k, (digits, width) in enumerate(zip(out_modes, in_modes, strict=True)):
        own = [noise(digits, width) if k == j else same[j].expand(digits, -1) for j in range(3)]
        says.append(torch.einsum("da,db,dc->dabc", *own).flatten(1) * (digits > 1))
    return torch.cat(says) / math.sqrt(sum(digits > 1 for digits in out_modes))


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
    truth = Truth() if truth is None else truth
    parts = [_chunk(k, count, seed, truth) for k in range(_chunks(count))]
    return Clicks(*(torch.cat([getattr(part, name) for part in parts]) for name in ("rows", "labels", "log_odds")))


def _chunks(count: int) -> int:
    return -(-count // _CHUNK)


def _chunk(k: int, count: int, seed: int, truth: Truth) -> Clicks:
    """The k-th chunk of `count` rows, of which the last one may be shorter."""
    generator = torch.Generator().manual_seed(seed * _SEEDS_APART + k)
    rows = draw(_CHUNK, truth.sizes, generator)
    chance = torch.rand(_CHUNK, generator=generator)
    kept = min(_CHUNK, count - k * _CHUNK)
    rows, chance = rows[:kept], chance[:kept]
    log_odds = truth(rows)
    return Clicks(rows, (chance < log_odds.sigmoid()).long(), log_odds)


class ClickStream:
    """The rows of `make_clicks`, made as they are asked for: any number of them in the memory of a few.

    Args:
        count: How many rows there are, after which they come again.
        seed: Of the stream.
        truth: Who clicks.
        per_epoch: Rows of one epoch, or somewhat more; the next one goes on from there.
    """

    def __init__(self, count: int, seed: int, truth: Truth, per_epoch: int) -> None:
        self._count, self._seed, self._truth = count, seed, truth
        self._per_epoch = min(max(_chunks(per_epoch), 1), _chunks(count))

    def __len__(self) -> int:
        return self._count

    def first(self, rows: int | None) -> "ClickStream":
        """So many rows from the start; None keeps all."""
        count = self._count if rows is None else min(rows, self._count)
        return ClickStream(count, self._seed, self._truth, self._per_epoch * _CHUNK)

    def batches(self, size: int, *, shuffled: bool = True) -> "ClickBatches":
        """Batches of one epoch, the next one each time that the last has been gone through."""
        make = partial(_chunk, count=self._count, seed=self._seed, truth=self._truth)
        return ClickBatches(make, _chunks(self._count), self._per_epoch, size)


class ClickBatches:
    """An epoch of a stream each time; the next chunk is made while the present one is learned from.

    Args:
        make: Makes the k-th chunk.
        chunks: How many there are.
        per_epoch: How many of them make an epoch.
        size: Rows of a batch, fewer in the last of a chunk.
    """

    def __init__(self, make: Callable[[int], Clicks], chunks: int, per_epoch: int, size: int) -> None:
        self._make, self._chunks, self._per_epoch, self._size = make, chunks, per_epoch, size
        self._place = 0

    def __iter__(self) -> Iterator[Rows]:
        places = [(self._place + k) % self._chunks for k in range(self._per_epoch)]
        with ThreadPoolExecutor(1) as pool:
            coming = pool.submit(self._make, places[0])
            for after in (*places[1:], None):
                chunk = coming.result()
                if after is not None:
                    coming = pool.submit(self._make, after)
                yield from zip(chunk.rows.split(self._size), chunk.labels.split(self._size), strict=True)
        # Who stops in the middle, as the evidence test does, leaves the place as it is.
        self._place = (self._place + self._per_epoch) % self._chunks

    def state_dict(self) -> dict[str, int]:
        """Where the next epoch begins."""
        return {"place": self._place}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Goes on where `state_dict` was called."""
        self._place = state["place"]
