# SPDX-License-Identifier: Apache-2.0
"""TT-matrices that compiled code forms row by row, against the same weight by einsum."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rankfall as rf
from laws import close, make, naive_dense
from rankfall import _contract, _forming, _sorted_rows
from rankfall._row_library import library
from table_rows import gradients_match

pytestmark = pytest.mark.skipif(library(torch.float64) is None, reason="no C compiler")

modes = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=2, max_size=4)


@pytest.fixture
def passes(monkeypatch):
    """How many rows each pass makes."""
    made, apply = [], _sorted_rows._Read.apply
    monkeypatch.setattr(_sorted_rows._Read, "apply", lambda *a: made.append(len(a[1])) or apply(*a))
    return made


def by_pass(monkeypatch, so=True):
    monkeypatch.setattr(_forming, "_is_row_by_row", lambda *_: so)


@settings(max_examples=40, deadline=None)
@given(modes=modes, rank=st.integers(1, 6), cut=st.tuples(st.integers(0, 2), st.integers(0, 2)))
def test_a_formed_weight_is_that_of_its_factors(modes, rank, cut):
    out_modes, in_modes = zip(*modes, strict=True)
    shape = tuple(max(1, torch.Size(m).numel() - less) for m, less in zip((out_modes, in_modes), cut, strict=True))
    try:
        t = make(rf.TTM(rank, out_modes=out_modes, in_modes=in_modes), shape)
    except ValueError:  # So much padding is refused.
        return
    with pytest.MonkeyPatch.context() as patch:
        by_pass(patch)
        gradients_match(t.dense(), naive_dense(t, list(t.factors)), list(t.factors))


def test_a_tt_matrix_of_usual_size_is_formed_in_a_pass(passes):
    t = make(rf.TTM(8, out_modes=(8, 8, 8), in_modes=(7, 14, 8)), (512, 784), dtype=torch.float32)
    close(t.dense(), _contract.dense(t.layout, list(t.factors)), 1e-4)
    assert passes == [512]
    t.sample()
    assert passes == [512, 512]


@pytest.mark.parametrize("format", [rf.TT(4), rf.CP(4), rf.Tucker(4), rf.TR(4)], ids=lambda f: type(f).__name__)
def test_other_formats_are_one_product(format, passes):
    make(format, (512, 784)).dense()
    assert not passes


def test_a_weight_without_slices_is_zeros(passes):
    t = make(rf.TTM(3), (12, 20))
    t.keep_slices_("r1", torch.tensor([], dtype=torch.int64))
    assert not bool(t.dense().any())
    assert not passes


def test_gradients_can_be_differentiated(monkeypatch):
    by_pass(monkeypatch)
    t = make(rf.TTM(2, out_modes=(2, 3), in_modes=(2, 2)), (6, 4))
    assert torch.autograd.gradgradcheck(lambda *f: _forming.dense(t.layout, f), tuple(t.factors))


def test_who_transforms_or_rounds_has_torch_form_it(monkeypatch, passes):
    by_pass(monkeypatch)
    t = make(rf.TTM(3), (12, 20), dtype=torch.float32)
    factors = tuple(t.factors)
    torch.func.jacrev(lambda *f: _forming.dense(t.layout, f))(*factors)
    with torch.autocast("cpu", torch.bfloat16):
        assert t.dense().dtype == torch.bfloat16
    assert not passes


def test_a_layer_forms_its_weight_so(passes):
    linear = rf.nn.Linear(784, 512, format=rf.TTM(20, out_modes=(8, 8, 8), in_modes=(7, 14, 8)), posterior=rf.Point())
    y = linear(torch.randn(2000, 784))
    assert passes == [512]
    y.sum().backward()
    assert all(f.grad is not None for f in linear.weight.factors)
