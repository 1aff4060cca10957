# SPDX-License-Identifier: Apache-2.0
"""Single rows of TT-matrices: small products, shared matrices, joined ends."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import rankfall as rf
from laws import make
from rankfall import _chain, _lookup
from rankfall._lookup import reading
from table_rows import check_rows


@pytest.mark.parametrize(
    ("p", "q", "s", "filled"),
    [(16, 3, 8, 4), (16, 2, 8, 4), (4, 4, 16, 7), (4, 3, 12, 3), (16, 4, 8, 4), (16, 0, 8, 0)],
)
def test_small_products_are_filled_up_to_where_torch_is_fast(p, q, s, filled, monkeypatch):
    inner, bmm = [], torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda a, b: inner.append(b.shape[1]) or bmm(a, b))
    left = torch.randn(9, p, q, dtype=torch.float64, requires_grad=True)
    matrices, which = torch.randn(5, q, s, dtype=torch.float64, requires_grad=True), torch.arange(9) % 4
    found, wanted = _chain._times_own(left, matrices, which), left @ matrices[which]
    assert inner == [filled]
    torch.testing.assert_close(found, wanted)
    direction = torch.randn_like(wanted)
    for ours, theirs in zip(
        *(torch.autograd.grad(y, [left, matrices], direction) for y in (found, wanted)), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("skewed", [False, True])
def test_rows_that_share_a_matrix_are_multiplied_together(skewed, monkeypatch):
    monkeypatch.setattr(_chain, "_LARGE_SLICE", 1)
    monkeypatch.setattr(_chain, "power_of_two", lambda n: 4)
    t = make(rf.TTM(3, out_modes=(40, 3, 5), in_modes=(2, 2, 3)), (600, 12))
    seated = []
    seats = _chain._seats
    monkeypatch.setattr(_chain, "_seats", lambda *a: seated.append(a) or seats(*a))
    monkeypatch.setattr(_lookup, "reading", lambda *_: _lookup.Reading(False, None, 0, 0))
    ids = torch.randint(600, (200,))
    check_rows(t, ids // 15 * 15 + 7 if skewed else ids)
    assert len(seated) >= 4


@pytest.mark.parametrize("looks", [True, False])
@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("joined", [(1, 1), (2, 1), (1, 2), (2, 2), (3, 1), (1, 3)], ids=str)
def test_the_ends_of_a_chain_may_be_joined(joined, rank, looks, monkeypatch):
    for module in (_lookup, _chain):
        monkeypatch.setattr(module, "may_look_at", lambda _: looks)
    t = make(rf.TTM(3, out_modes=(3, 2, 4, 5), in_modes=(2, 1, 2, 3)), (113, 11))
    t.keep_slices_("r2", torch.arange(rank))
    monkeypatch.setattr(_lookup, "reading", lambda *_: _lookup.Reading(False, None, 0, 0, joined))
    check_rows(t, torch.randint(113, (50,)))


def test_ends_are_joined_where_they_have_few_rows():
    """A hundred rows or ten thousand at an end, in place of a product for each of 65,536 ids."""
    format = rf.TTM(16, out_modes=(100, 100, 100), in_modes=(4, 4, 4))
    layout = format.layout((10**6, 64))
    shapes = layout.factor_shapes({"r1": 16, "r2": 16})
    many, few = (reading(layout, shapes, ids, ids) for ids in (65_536, 4096))
    assert not many.forms_table
    assert many.joined in ((2, 1), (1, 2))
    assert few.joined == (1, 1)
    assert many.described() == "the distinct rows of joined factors"


@given(which=st.lists(st.integers(0, 6), max_size=40), together=st.integers(1, 8))
def test_nobody_shares_a_seat_and_tables_are_of_one_group(which, together):
    which = torch.tensor(which, dtype=torch.int64)
    place, owner = _chain._seats(which, 7, together)
    assert len(place.unique()) == len(which)
    assert torch.equal(owner[place // together], which)
    assert len(owner) <= len(which)
