# SPDX-License-Identifier: Apache-2.0
"""Rows of chains by compiled code, and their gradients, against those by torch."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rankfall import _row_library, _sorted_rows
from rankfall._chain import chain_rows
from rankfall._row_library import library, sizes_of
from rankfall._rows import Bags
from rankfall._sorted_rows import SortedRows

pytestmark = pytest.mark.skipif(library(torch.float64) is None, reason="no C compiler")


@st.composite
def chains(draw):
    """Factors of a chain, of one or more, with ranks from 0 on."""
    count = draw(st.integers(1, 5))
    sides = st.integers(1, 5)
    digits, widths = ([draw(sides) for _ in range(count)] for _ in range(2))
    widths[0] = draw(st.sampled_from([1, 3, 4, 9, 17]))
    ranks = [draw(st.sampled_from([0, 1, 2, 3, 5, 17, 20])) for _ in range(count - 1)]
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    return chain_and_ids(digits, widths, ranks, draw(st.integers(0, 40)), dtype, draw(st.integers(0, 99)))


def chain_and_ids(digits, widths, ranks, count, dtype=torch.float64, seed=0):
    bonds = [1, *ranks, 1]
    shapes = [[bonds[k], digits[k], widths[k], bonds[k + 1]] for k in range(len(digits))]
    shapes[0], shapes[-1] = shapes[0][1:], shapes[-1][:-1]
    if len(digits) == 1:
        shapes = [[digits[0], widths[0]]]
    generator = torch.Generator().manual_seed(seed)
    chain = [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]
    return chain, torch.randint(math.prod(digits), (count,), generator=generator)


def agree(found, wanted, leaves):
    """Values and gradients, those of float32 to its digits."""
    direction = torch.randn_like(wanted)
    pairs = [(found.detach(), wanted.detach())]
    pairs += zip(
        *(
            torch.autograd.grad(y, leaves, direction, allow_unused=True, materialize_grads=True)
            for y in (found, wanted)
        ),
        strict=True,
    )
    tolerance = 1e-10 if wanted.dtype == torch.float64 else 1e-4
    for ours, theirs in pairs:
        size = 1 + float(theirs.abs().max()) if theirs.numel() else 1
        torch.testing.assert_close(ours / size, theirs / size, rtol=0, atol=tolerance)


@settings(deadline=None)
@given(of=chains(), weighted=st.booleans(), seed=st.integers(0, 99))
def test_rows_and_sums_are_those_of_the_chain(of, weighted, seed):
    chain, ids = of
    check_rows_and_sums(chain, ids, weighted, seed, in_blocks=False)
    if len(chain) == 2:
        check_rows_and_sums(chain, ids, weighted, seed, in_blocks=True)


def check_rows_and_sums(chain, ids, weighted, seed, in_blocks):
    empty = torch.empty_like

    def of_nans(*like, **options):
        made = empty(*like, **options)
        return made.fill_(math.nan) if made.is_floating_point() else made

    with pytest.MonkeyPatch.context() as patch:
        # Gradients are written whole, whatever the memory that they get has held.
        patch.setattr(_row_library.torch, "empty_like", of_nans)
        _check_rows_and_sums(chain, ids, weighted, seed, in_blocks)


def _check_rows_and_sums(chain, ids, weighted, seed, in_blocks):
    width = chain_rows(chain, torch.zeros(1, dtype=torch.int64)).shape[1]
    rows = SortedRows(tuple(chain), ids, width, in_blocks=in_blocks)
    agree(rows.taken(), chain_rows(chain, ids), chain)
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.cat([torch.zeros(1), torch.randint(len(ids) + 1, (5,), generator=generator).sort().values]).long()
    weights = torch.randn(len(ids), generator=generator, dtype=chain[0].dtype).requires_grad_() if weighted else None
    out = (ids % 3 == 0) if seed % 2 else None
    rows = rows.with_zeros(out)
    for with_last in (False, True):
        wanted = chain_rows(chain, ids) if out is None else chain_rows(chain, ids).masked_fill(out.unsqueeze(1), 0)
        wanted = wanted if weights is None else wanted * weights.unsqueeze(1)
        bags = Bags(offsets, with_last, "sum", None, weights)
        places, count = bags.places(ids)
        there = places >= 0
        sums = wanted.new_zeros(count, width).index_add(0, places[there], wanted[there])
        agree(rows.reduced(bags), sums, [*chain, *([weights] if weighted else [])])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    ("digits", "widths", "rank", "ids"),
    [
        ((700, 1), (1, 100), 20, 2000),  # Several blocks.
        ((40, 30), (4, 9), 7, 300),  # Several, and a head's rows are not all wanted.
        ((5, 400), (3, 31), 4, 90),  # A head is more than a block.
        ((30, 2), (8, 5), 300, 50),  # More slices than are gone through at once.
        ((9, 40), (2, 8), 3, 0),
    ],
)
def test_blocks(digits, widths, rank, ids, weighted, dtype):
    chain, ids = chain_and_ids(digits, widths, (rank,), ids, dtype)
    check_rows_and_sums(chain, ids, weighted, 1, in_blocks=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    ("digits", "widths", "ranks", "ids"),
    [
        ((300, 2, 3), (4, 4, 8), (16, 16), 900),  # More first digits of a second one, and more ids, than in a block.
        ((300, 2), (4, 9), (7,), 900),
        ((9, 3, 4), (40, 32, 2), (20, 20), 90),  # A first digit has more than a block has room for.
        ((2, 3, 400, 2), (2, 3, 2, 3), (5, 4, 3), 700),  # Many ids have their first two digits in common.
        ((40, 30, 1, 1), (1, 1, 16, 9), (20, 20, 12), 600),  # As in a tensor train.
        ((2,) * 16, (1, 2, 1, 2) * 4, (3,) * 15, 30),
        ((200, 30, 20), (4, 8, 2), (16, 16), 1500),  # Products that are too many to be kept.
        ((7, 5, 3), (2, 3, 4), (3, 3), 1),
    ],
)
def test_passes(digits, widths, ranks, ids, weighted, dtype):
    chain, ids = chain_and_ids(digits, widths, ranks, ids, dtype)
    check_rows_and_sums(chain, ids, weighted, 1, in_blocks=False)


def test_products_are_kept_where_a_gradient_wants_few_of_them(monkeypatch):
    chain, ids = chain_and_ids((20, 7, 5), (4, 4, 8), (6, 6), 50)
    sizes, room = [], _sorted_rows.room
    monkeypatch.setattr(_sorted_rows, "room", lambda *a: sizes.append(room(*a)) or sizes[-1])
    rows = SortedRows(tuple(chain), ids, 128)
    with torch.no_grad():
        rows.taken()
    assert not sizes
    found = rows.taken()
    assert len(sizes[0]) == 50 * 4 * 4 * 6
    once, again = (torch.autograd.grad(found.square().sum(), chain, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, once, again))
    SortedRows(tuple(chain), ids.repeat(200), 128).taken()
    SortedRows((chain[0].flatten(1).unsqueeze(2).repeat(1, 1, 6), chain[2]), ids, 192).taken()
    assert sizes[1:] == [None, None]


@settings(deadline=None)
@given(
    digits=st.lists(st.sampled_from([1, 2, 3, 7, 50, 3000, 2**30]), min_size=2, max_size=4),
    count=st.sampled_from([0, 1, 2, 9, 300]),
    placed=st.booleans(),
    seed=st.integers(0, 99),
)
def test_ids_are_sorted_by_their_second_digit_first(digits, count, placed, seed):
    while math.prod(digits) >= 2**61:
        digits = digits[:-1]
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(math.prod(digits), (count,), generator=generator)
    ids[::3] = ids[:1].clone()
    places = torch.randint(-1, 2, (count,), generator=generator) if placed else None
    numbers = [k for k in range(count) if places is None or places[k] >= 0]
    number, others = torch.zeros(()), math.prod(digits[2:])
    chain = [number.expand(n, 1, 1) if not k else number.expand(1, n, 1, 1) for k, n in enumerate(digits)]

    def of(k):
        beginning, other = divmod(int(ids[k]), others)
        return beginning % digits[1], beginning // digits[1], other

    order = library(torch.float32).order(sizes_of(chain), ids, places)
    assert order[:, 1].tolist() == sorted(numbers, key=of)
    bits = [max(n - 1, 0).bit_length() for n in (digits[0], others)]
    keys = [(of(k)[0] << sum(bits)) + (of(k)[1] << bits[1]) + of(k)[2] for k in order[:, 1].tolist()]
    assert order[:, 0].tolist() == keys
    in_blocks, ids = library(torch.float32, in_blocks=True), ids % (digits[0] * digits[1])
    order = in_blocks.order(sizes_of(chain[:2]), ids, places)
    assert order[:, 1].tolist() == sorted(numbers, key=lambda k: int(ids[k]))
