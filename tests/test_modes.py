# SPDX-License-Identifier: Apache-2.0
import math

import pytest

from rankfall._modes import balanced_modes, mode_count, paired_modes


@pytest.mark.parametrize("count", [1, 2, 3, 4, 6])
def test_modes_carry_the_width_with_little_padding(count):
    for width in [*range(1, 200), 509, 784, 787, 1021, 4096, 9973]:
        modes = balanced_modes(width, count)
        assert len(modes) == count
        assert all(mode >= 1 for mode in modes)
        assert math.prod(modes) >= width
        assert math.prod(modes) <= width * 1.5
        if math.isqrt(width) ** 2 != width:  # A square is padded as its side, twice.
            # Otherwise no unit of the largest mode holds nothing but padding.
            assert math.prod(modes) // max(modes) * (max(modes) - 1) < width


@pytest.mark.parametrize(("width", "count"), [(512, 3), (784, 4), (1000, 3), (4096, 6), (3072, 4), (256, 4), (64, 2)])
def test_composite_widths_are_not_padded(width, count):
    assert math.prod(balanced_modes(width, count)) == width


@pytest.mark.parametrize("width", [13, 101, 509, 787, 9973])
def test_primes_are_padded_into_balance(width):
    modes = balanced_modes(width, 3)
    assert math.prod(modes) > width
    useful = [mode for mode in modes if mode > 1]
    assert max(useful) <= 2.5 * min(useful)


def test_balance_saves_parameters():
    # The sum of the modes is what a tensor train or CP pays for; never far above the geometric mean.
    for width in (512, 784, 1000, 3072, 4096, 9973):
        for count in (2, 3, 4):
            assert sum(balanced_modes(width, count)) <= 1.25 * count * width ** (1 / count)


def test_a_square_width_is_split_as_its_side_twice():
    assert balanced_modes(784, 4) == (4, 7, 4, 7)
    assert balanced_modes(784, 2) == (28, 28)
    assert balanced_modes(4096, 4) == balanced_modes(64, 2) * 2


def test_small_widths_stay_whole():
    assert balanced_modes(1, 1) == (1,)
    assert balanced_modes(1, 3) == (1, 1, 1)
    assert balanced_modes(7, 2) == (1, 7)


def test_mode_count_grows_with_the_logarithm():
    assert [mode_count(width, 5.0) for width in (1, 2, 5, 25, 125, 784)] == [1, 1, 1, 2, 3, 4]


def test_pairs_are_balanced_between_the_axes():
    for widths in [(10, 512), (512, 784), (512, 512), (100, 1000), (11, 13), (1, 64), (4, 6, 400)]:
        rows = paired_modes(widths, 4)
        assert all(len(row) == 4 for row in rows)
        assert all(math.prod(row) >= width for row, width in zip(rows, widths, strict=True))
        for row, width in zip(rows, widths, strict=True):
            assert sorted(row) == sorted(balanced_modes(width, 4))
        assert rows[-1] == balanced_modes(widths[-1], 4)
        products = [math.prod(column) for column in zip(*rows, strict=True)]
        in_order = [math.prod(c) for c in zip(*(sorted(row) for row in rows), strict=True)]
        assert max(products) <= max(in_order)


def test_the_square_of_a_prime_is_not_split_as_its_side():
    assert math.prod(balanced_modes(169, 4)) < 1.1 * 169
