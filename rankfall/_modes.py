# SPDX-License-Identifier: Apache-2.0
"""Integers only: split a width into balanced modes, pad where its factors are poor, pair modes for a TT-matrix."""

import math
from functools import lru_cache
from itertools import combinations_with_replacement

# A width of its own factors is worth a little more balance than a padded one: no wasted entries, no cut, no copy.
_PADDING_PRICE = 1.05
# Modes under about this size carry little of their own; an axis no longer than _WHOLE is not worth a split.
_SMALL_MODE, _WHOLE = 3.2, 7


def mode_count(width: int, mode_size: float) -> int:
    """Number of modes of about `mode_size` each that `width` splits into, at least 1.

    Example:
        >>> mode_count(784, 5.0), mode_count(10, 5.0)
        (4, 1)
    """
    return max(1, round(math.log(width) / math.log(mode_size))) if width > 1 else 1


@lru_cache(maxsize=4096)
def balanced_modes(width: int, count: int) -> tuple[int, ...]:
    """Splits `width` into `count` modes of similar size whose product is `width`, or a little more.

    The modes minimise (sum of modes / smallest possible sum) * (product / width): few parameters, little padding.
    A prime, or a width of few factors, is padded; an axis too small for `count` modes gets modes of 1 in front.
    A square width with an even count is split as its side, twice, so that the modes of a flattened image follow its
    rows and columns.

    Example:
        >>> balanced_modes(784, 4), balanced_modes(512, 4), balanced_modes(787, 3), balanced_modes(5, 3)
        ((4, 7, 4, 7), (4, 4, 4, 8), (8, 9, 11), (1, 1, 5))

    Args:
        width: The size to split, 1 or more.
        count: The number of modes, 1 or more.

    Returns:
        `count` integers, ascending but for squares; their product is at least `width`.
    """
    side = math.isqrt(width)
    if count % 2 == 0 and side * side == width and width > 1:
        half = balanced_modes(side, count // 2)
        if math.prod(half) == side:
            return half + half
    useful = min(count, mode_count(width, _SMALL_MODE)) if width > _WHOLE else 1
    if useful == 1:
        return (1,) * (count - 1) + (width,)
    root = width ** (1 / useful)
    choices = range(max(2, math.floor(root * 0.6)), math.ceil(root * 1.5) + 1)
    best, best_score = (width,), math.inf
    for head in combinations_with_replacement(choices, useful - 1):
        modes = (*head, -(-width // math.prod(head)))
        padding = math.prod(modes) / width
        score = sum(modes) / (useful * root) * padding * (_PADDING_PRICE if padding > 1 else 1.0)
        if score < best_score:
            best, best_score = modes, score
    return (1,) * (count - len(best)) + tuple(sorted(best))


def paired_modes(widths: tuple[int, ...], count: int) -> tuple[tuple[int, ...], ...]:
    """Splits every width into `count` modes, so that the k-th modes of all axes together are of similar size.

    The last axis keeps its own order; the others are assigned large against small, which keeps the factors of a
    TT-matrix, each of which carries one mode of every axis, balanced.

    Example:
        >>> paired_modes((10, 512), 3)
        ((5, 2, 1), (8, 8, 8))
        >>> paired_modes((512, 784), 4)
        ((8, 4, 4, 4), (4, 7, 4, 7))
    """
    rows = [balanced_modes(widths[-1], count)]
    load = list(rows[0])
    for width in reversed(widths[:-1]):
        row = [1] * count
        largest_first = sorted(balanced_modes(width, count), reverse=True)
        for place, mode in zip(sorted(range(count), key=lambda k: load[k]), largest_first, strict=True):
            row[place] = mode
        load = [have * mode for have, mode in zip(load, row, strict=True)]
        rows.insert(0, tuple(row))
    return tuple(rows)
