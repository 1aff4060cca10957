# SPDX-License-Identifier: Apache-2.0
"""Products of matrices by oneDNN, against float64 and against torch's own."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad

import rankfall as rf
from rankfall import _einsum, _machine, _onednn, _products
from rankfall._machine import USUAL
from rankfall._products import product, transposed_product

pytestmark = pytest.mark.skipif(not _onednn.has_onednn(), reason="this torch has no products by oneDNN")


@pytest.fixture
def calls(monkeypatch):
    """The products that oneDNN makes, of any size."""
    made, by_onednn = [], _products.by_onednn
    monkeypatch.setattr(_products, "_LEAST", 0)
    monkeypatch.setattr(_products, "by_onednn", lambda a, b, bias=None: made.append(a.shape) or by_onednn(a, b, bias))
    _machine.use(USUAL)
    yield made
    _machine.use(None)


def near(actual, expected):
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-4)


SIDES = [(5, 7, 3), (1, 1, 1), (33, 2, 65), (4, 0, 3), (0, 4, 3), (3, 4, 0)]


@pytest.mark.parametrize("sides", SIDES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("turned", [True, False])
def test_values_and_gradients(sides, bias, turned, calls):
    m, k, n = sides
    a = torch.randn(k, m).T if turned else torch.randn(m, 2 * k)[:, :k]
    b = torch.randn(n, k).T if turned else torch.randn(k, n)
    given = [a, b, *([torch.randn(n)] if bias else [])]
    ours = [value.clone().requires_grad_() for value in given]
    wide = [value.double().requires_grad_() for value in given]
    found, wanted = product(*ours), wide[0] @ wide[1] + (wide[2] if bias else 0)
    near(found, wanted)
    direction = torch.randn(m, n)
    for own, theirs in zip(
        torch.autograd.grad(found, ours, direction), torch.autograd.grad(wanted, wide, direction.double()), strict=True
    ):
        near(own, theirs)
    if k:
        assert len(calls) >= 1
    near(transposed_product(a.T, b), a.double() @ b.double())


def test_leading_dimensions_and_expanded_gradients(calls):
    a, b = torch.randn(2, 3, 5, requires_grad=True), torch.randn(5, 4)
    near(product(a, b), a.double() @ b.double())
    product(a, b).sum().backward()
    near(a.grad, b.sum(1).double().expand(2, 3, 5))
    near(product(a[0, 0], b), a[0, 0].double() @ b.double())
    assert len(calls) == 4


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # By torch's own forward derivatives.
def test_derivatives_of_gradients_and_forward_ones(calls):
    a, b = torch.randn(6, 5, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    bias = torch.randn(4, requires_grad=True)

    def penalty(a, b, bias, make):
        first = torch.autograd.grad(make(a, b, bias).sin().sum(), (a, b, bias), create_graph=True)
        return sum(g.square().sum() for g in first)

    found = torch.autograd.grad(penalty(a, b, bias, product), (a, b, bias))
    wide = [value.detach().double().requires_grad_() for value in (a, b, bias)]
    wanted = torch.autograd.grad(penalty(*wide, lambda a, b, bias: a @ b + bias), wide)
    for own, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(own.double(), theirs, rtol=1e-3, atol=1e-3)
    tangents = [torch.randn_like(value) for value in (a, b, bias)]
    with forward_ad.dual_level():
        duals = [
            forward_ad.make_dual(v.detach(), t).requires_grad_() for v, t in zip((a, b, bias), tangents, strict=True)
        ]
        tangent = forward_ad.unpack_dual(product(*duals)).tangent
    near(tangent, (tangents[0] @ b + a @ tangents[1] + tangents[2]).double())
    assert calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_sums_of_rows(dtype):
    for a in (torch.randn(7, 5, dtype=dtype), torch.randn(5, 7, dtype=dtype).T, torch.zeros(0, 5, dtype=dtype)):
        torch.testing.assert_close(_products.sum_of_rows(a), a.sum(0))
    expanded = torch.ones((), dtype=dtype).expand(7, 5)
    assert _products.sum_of_rows(expanded).tolist() == [7.0] * 5


def test_transforms_take_torch_s_own(calls):
    a, b = torch.randn(6, 5), torch.randn(3, 5, 4)
    near(torch.func.vmap(product, (None, 0))(a, b), a.double() @ b.double())
    near(torch.func.grad(lambda b: product(a, b).sum())(b[0]), a.sum(0).double()[:, None].expand(5, 4))
    assert not calls


def test_where_it_does_not_pay_or_is_not_wanted_torch_s_own_is_taken(calls, monkeypatch):
    a, b = torch.randn(6, 5), torch.randn(5, 4)
    product(a.double(), b.double())
    with torch.autocast("cpu", torch.bfloat16):
        assert product(a, b, torch.randn(4)).dtype == torch.bfloat16
    with torch.backends.mkldnn.flags(False, None, None, None):
        product(a, b)
    monkeypatch.setattr(torch.jit, "is_tracing", lambda: True)
    product(a, b)
    monkeypatch.setattr(torch.jit, "is_tracing", lambda: False)
    _machine.use(replace(USUAL, flops=USUAL.batched))
    product(a, b)
    _machine.use(USUAL)
    monkeypatch.setattr(_products, "has_onednn", lambda: False)
    product(a, b)
    product(a, b)
    assert not calls
    monkeypatch.undo()
    product(a, b)  # Too small.
    assert not calls


def test_no_matrix_with_gaps_reaches_it(monkeypatch):
    given, linear = [], torch.ops.mkldnn._linear_pointwise.default

    class Watched:
        @staticmethod
        def default(a, b, *others):
            given.extend([a, b])
            return linear(a, b, *others)

    a, b = torch.randn(6, 9)[:, :5], torch.randn(12, 4).T[:, :5]
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", Watched)
    near(_onednn.by_onednn(a, b), a.double() @ b.double().T)
    near(_onednn.by_onednn(torch.ones(()).expand(3, 5), b), torch.ones(3, 5).double() @ b.double().T)
    assert len(given) == 4
    assert all(matrix.is_contiguous() or matrix.T.is_contiguous() for matrix in given)


def test_products_of_varying_shapes_have_to_be_larger(calls, monkeypatch):
    monkeypatch.setattr(_products, "_LEAST_ONCE", 200)
    a, b = torch.randn(5, 4, requires_grad=True), torch.randn(4, 5)
    with _products.varying():
        assert _products.is_varying()
        product(a, b[:, :4])
        assert not calls
        product(a, b).sum().backward()
    assert len(calls) == 2
    assert not _products.is_varying()


def test_gradients_of_thin_matrices_are_made_as_these_were(calls, monkeypatch):
    monkeypatch.setattr(_products, "_LEAST_ONCE", 10**9)
    layer = rf.nn.Linear(30, 24, format=rf.TT(4), posterior=rf.Point())
    x = torch.randn(200, 30, requires_grad=True)
    for varies in (True, False):
        with _products.varying(varies):
            y = layer(x)
        y.sum().backward()
        assert (not calls) == varies


def test_a_torch_without_it(monkeypatch):
    def missing(*_):
        raise AttributeError("'_OpNamespace' 'mkldnn' object has no attribute '_linear_pointwise'")

    for wrong in (missing, lambda a, b, bias=None: torch.zeros(2, 4)):
        monkeypatch.setattr(_onednn, "by_onednn", wrong)
        assert not _onednn.has_onednn.__wrapped__()
    monkeypatch.undo()
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not _onednn.has_onednn.__wrapped__()


@pytest.mark.parametrize("kind", [rf.CP, rf.Tucker, rf.TT, rf.TTM, rf.TR])
def test_layers_compute_the_same_by_it(kind, calls, monkeypatch):
    monkeypatch.setattr(_einsum, "_LARGE_PAIR", 0)
    for layer, x in (
        (rf.nn.Linear(30, 24, format=kind(4), posterior=rf.Point()), torch.randn(2, 7, 30, requires_grad=True)),
        (rf.nn.Embedding(40, 12, format=kind(3), posterior=rf.Point()), torch.randint(40, (2000,))),
    ):
        calls.clear()
        found = layer(x)
        leaves = [*layer.weight.factors, *([x] if x.requires_grad else [])]
        direction = torch.randn_like(found)
        own = torch.autograd.grad(found, leaves, direction)
        assert calls
        layer.double()
        wide = x.detach().double().requires_grad_() if x.requires_grad else x
        wanted = layer(wide)
        near(found, wanted)
        leaves = [*layer.weight.factors, *([wide] if x.requires_grad else [])]
        for ours, theirs in zip(own, torch.autograd.grad(wanted, leaves, direction.double()), strict=True):
            near(ours, theirs)


@st.composite
def pairs(draw):
    names = draw(st.permutations("abcdef"))
    cut = sorted(draw(st.lists(st.integers(0, 6), min_size=2, max_size=2)))
    own, summed, others = names[: cut[0]], names[cut[0] : cut[1]], names[cut[1] :]
    first, second = (draw(st.permutations([*mine, *summed])) for mine in (own, others))
    kept = draw(st.permutations([*own, *others]))
    batch = draw(st.sampled_from([(), ("first",), ("second",)]))
    dots = ["..." if side in batch else "" for side in ("first", "second")]
    equation = f"{dots[0]}{''.join(first)},{dots[1]}{''.join(second)}->{'...' if batch else ''}{''.join(kept)}"
    sizes = {n: draw(st.integers(1, 3)) for n in names}
    leading = draw(st.lists(st.integers(1, 3), max_size=2)) if batch else []
    shapes = [
        [*(leading if d else []), *(sizes[n] for n in axes)] for d, axes in zip(dots, (first, second), strict=True)
    ]
    return equation, shapes


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(pairs())
def test_sums_of_products_are_one_product(case):
    equation, shapes = case
    tensors = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    pair = _einsum._pair(equation)
    names = equation.split("->")[0].replace("...", "").split(",")
    assert (pair is None) == (not set(names[0]) & set(names[1]))
    if pair is not None:
        torch.testing.assert_close(pair(*tensors), torch.einsum(equation, *tensors))


@pytest.mark.parametrize("equation", ["ab,ab->a", "ab,bc->a", "ab,cd->abcd", "abc,bc->a", "...ab,bc->a..."])
def test_other_sums_are_torch_s(equation):
    expected = {"abc,bc->a": True}.get(equation, False)
    assert (_einsum._pair(equation) is not None) == expected
