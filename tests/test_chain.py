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
from rankfall._machine import Machine, use
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


@pytest.mark.parametrize("turned", [True, False])
@pytest.mark.parametrize("place", [True, False])
def test_tall_products_of_few_columns_are_made_on_their_side(turned, place, monkeypatch):
    shapes, bmm = [], torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda a, b: shapes.append(tuple(a.shape)) or bmm(a, b))
    (p, q, s), n = (18, 9, 6) if turned else (18, 9, 10), 7
    left = torch.randn(4 if place else n, p, q, dtype=torch.float64, requires_grad=True)
    matrices, which = torch.randn(5, q, s, dtype=torch.float64, requires_grad=True), torch.arange(n) % 5
    places = torch.arange(n) % 4 if place else None

    def ours(left, matrices):
        return _chain._times_own(left, matrices, which, places)

    wanted = (left if places is None else left[places]) @ matrices[which]
    found = ours(left, matrices)
    assert shapes == [(n, s, q) if turned else (n, p, q)]
    torch.testing.assert_close(found, wanted)
    direction = torch.randn_like(wanted)
    for own, theirs in zip(
        *(torch.autograd.grad(y, [left, matrices], direction) for y in (found, wanted)), strict=True
    ):
        torch.testing.assert_close(own, theirs)
    assert torch.autograd.gradgradcheck(ours, (left, matrices))


@pytest.mark.parametrize("looks", [True, False])
@pytest.mark.parametrize("joined", [(1, 1), (2, 1), (1, 2)], ids=str)
def test_rows_that_begin_alike_are_one_until_they_part(joined, looks, monkeypatch):
    for module in (_lookup, _chain):
        monkeypatch.setattr(module, "may_look_at", lambda _: looks)
    t = make(rf.TTM(3, out_modes=(3, 2, 4, 5), in_modes=(2, 1, 2, 3)), (113, 11))
    monkeypatch.setattr(_lookup, "reading", lambda *_: _lookup.Reading(False, None, 0, 0, joined))
    counts, times_own = [], _chain._times_own

    def counted(left, matrices, which, place=None):
        counts.append((len(left), len(which)))
        return times_own(left, matrices, which, place)

    monkeypatch.setattr(_chain, "_times_own", counted)
    ids = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 100, 101, 102, 112, 112, 7, 3])
    found = rf.nn.Embedding.around(t.eval(), torch.nn.Embedding(113, 11, device="meta"))(ids)
    torch.testing.assert_close(found, t.dense()[ids])
    steps = {(1, 1): [(2, 2), (2, 4), (4, 12)], (2, 1): [(2, 4), (4, 12)], (1, 2): [(2, 2), (2, 12)]}[joined]
    assert counts == (steps if looks else [(15, 15)] * len(steps))
    check_rows(t, ids)


def test_rows_that_seldom_begin_alike_go_their_own_way():
    heads, levels = _chain._levels(torch.tensor([0, 1, 20, 40]), (3, 4, 5))
    assert torch.equal(heads, torch.tensor([0, 0, 1, 2]))
    assert [digit.tolist() for digit, _ in levels] == [[0, 0, 0, 0], [0, 1, 0, 0]]
    assert [place for _, place in levels] == [None, None]


def test_a_chain_costs_what_its_products_do():
    """Of 4, 12 and 60 rows: two products, for as many rows as begin alike where these are fewer, and for all."""
    layout = rf.TTM(3, out_modes=(4, 3, 5), in_modes=(2, 3, 4)).layout((60, 24))
    shapes = layout.factor_shapes({"r1": 3, "r2": 3})
    use(Machine(flops=1e9, batched=1e9, call=1e-9))
    found = {rows: _lookup._plan_of_chain(layout, shapes, rows, _chain.APART) for rows in (10, 1000)}
    joined = _lookup._plan_of_chain(layout, shapes, 1000, (2, 1))
    use(None)
    for rows, beginnings in ((10, 10), (1000, 12)):
        plan = found[rows]
        assert plan.flops == plan.batched == 2 * beginnings * 2 * 3 * 3 * 3 + 2 * rows * 6 * 3 * 4
    assert joined.batched == 2 * 1000 * 6 * 3 * 4


def test_seats_of_whole_tables_cost_as_such(monkeypatch):
    use(Machine(flops=1e9, batched=1e9, call=1e-9))
    alone, _ = _chain.costs_of_own(64, 8, 4, 16, 64)
    monkeypatch.setattr(_chain, "_LARGE_SLICE", 10**9)
    each, _ = _chain.costs_of_own(64, 8, 4, 16, 64)
    use(None)
    assert each == 64 * 2 * 4 * 16 * 64
    assert alone == (8 // 2 + 64 // 8) * 8 * 2 * 4 * 16 * 64
