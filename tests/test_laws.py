# SPDX-License-Identifier: Apache-2.0
import math
from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

import laws
import rankfall as rf
from conftest import FORMATS
from rankfall import _contract, _lookup, _matmul
from rankfall._einsum import shapes_of
from rankfall._row_library import library

# A composite one, two primes (padded), and one short axis beside a long one.
SHAPES = [(12, 20), (11, 13), (7, 64)]
# One, three and four axes: not a matrix, so no linear().
OTHER_SHAPES = [(30,), (13,), (4, 5, 6), (2, 3, 4, 3)]
GIVEN_MODES = [
    (rf.CP(4, out_modes=(3, 4), in_modes=(5, 2, 2)), (12, 20)),
    (rf.Tucker(3, out_modes=(12,), in_modes=(5, 2, 2)), (12, 20)),
    (rf.Tucker((2, 2, 3), out_modes=(12,), in_modes=(5, 4)), (12, 20)),
    (rf.TT(4, out_modes=(12,), in_modes=(2, 2, 5)), (12, 20)),
    (rf.TT((2, 3, 4), out_modes=(3, 4)), (12, 13)),
    (rf.TTM(4, out_modes=(4, 3, 1), in_modes=(5, 2, 2)), (12, 20)),
    (rf.TTM((3, 2), in_modes=(1, 1, 20)), (12, 20)),
    (rf.TR(3, out_modes=(12,), in_modes=(2, 10)), (12, 20)),
    (rf.TR((2, 3, 2), out_modes=(1, 12), in_modes=(20,)), (12, 20)),
]


def check_values(t):
    laws.dense_is_the_contraction(t)
    laws.sample_is_the_contraction_of_one_draw(t)
    laws.energies_are_sums_of_squares(t)
    laws.squared_norm_is_that_of_the_padded_tensor(t)


def check_linear(t, batch=(2, 3)):
    x = torch.randn(*batch, t.shape[1], dtype=torch.float64)
    laws.linear_is_the_dense_product(t.train(), x)
    laws.linear_is_the_dense_product(t.eval(), x)


@pytest.mark.parametrize("shape", [*SHAPES, *OTHER_SHAPES], ids=str)
def test_values(kind, shape, posterior):
    check_values(laws.make(kind(4), shape, posterior=posterior))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear(kind, shape, posterior):
    check_linear(laws.make(kind(4), shape, posterior=posterior))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dense_in_every_way(kind, shape, monkeypatch):
    t = laws.make(kind(4), shape, posterior=rf.Point())
    shapes = tuple(tuple(f.shape) for f in t.factors)
    plan, pair = _contract.dense_plan(t.layout, shapes), _contract.halves(t.layout, shapes)
    bonds = range(len(t.layout.bonds)) if pair is None else ()
    for way in (_contract.Forming(plan, pair), *(_contract.Forming(plan, bond=bond) for bond in bonds)):
        monkeypatch.setattr(_contract, "forming", lambda *_, way=way: way)
        check_values(t)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_in_every_way(kind, shape, monkeypatch):
    t = laws.make(kind(4), shape, posterior=rf.Point())
    ways = _matmul.linear_ways(t.layout, shapes_of(t.factors), 6)
    expected = {"formed", "steps", "cut"} if kind is rf.TTM else {"formed", "steps", "halves"}
    assert {way.kind for way in ways} == expected
    for way in (*ways, _formed_again(ways)):
        monkeypatch.setattr(_matmul, "linear_way", lambda *_, way=way: way)
        check_linear(t)
        bias, x = torch.randn(shape[0], dtype=torch.float64), torch.randn(5, shape[1], dtype=torch.float64)
        laws.close(t.linear(x, bias), x @ laws.naive_dense(t, t.factors).T + bias)


def test_a_rank_of_zero_gives_zeros_in_every_way(kind, monkeypatch):
    x, ids = torch.randn(5, 20, dtype=torch.float64), torch.tensor([3, 11, 3])
    for bonds in (1, None):  # The first bond alone, and all of them.
        t = laws.make(kind(3), (12, 20), posterior=rf.Point())
        for bond in list(t.ranks)[:bonds]:
            t.keep_slices_(bond, torch.zeros(0, dtype=torch.int64))
        shapes = shapes_of(t.factors)
        ways = _matmul.linear_ways(t.layout, shapes, 5)
        for way in (*ways, _formed_again(ways)):
            y = _matmul.linear_by(way, t.layout, list(t.factors), x)
            assert torch.equal(y, torch.zeros(5, 12, dtype=torch.float64))
            y.sum().backward()
        for way in _lookup.readings(t.layout, shapes, 3, 3, library(torch.float64) is not None):
            rows = _lookup.read_by(way, t.layout, list(t.factors), ids)
            assert torch.equal(rows.widened(rows.taken()), torch.zeros(3, 20, dtype=torch.float64))
        for bond in range(len(t.layout.bonds)) if kind is rf.TTM else ():
            way = _contract.Forming(_contract.dense_plan(t.layout, shapes), bond=bond)
            monkeypatch.setattr(_contract, "forming", lambda *_, way=way: way)
            assert torch.equal(t.dense(), torch.zeros(12, 20, dtype=torch.float64))


def test_second_derivatives_of_a_cut():
    left, right = torch.randn(3, 4, dtype=torch.float64), torch.randn(2, 4, 5, dtype=torch.float64)
    bias = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    for inputs in ((left.requires_grad_(), right.requires_grad_()), (left, right, bias), (left.detach(), right, bias)):
        assert torch.autograd.gradcheck(_contract.mixed, inputs)
        assert torch.autograd.gradgradcheck(_contract.mixed, inputs)


@pytest.mark.parametrize("rank", [3, 20])
@pytest.mark.parametrize("bias", [True, False])
def test_derivatives_of_two_thin_matrices(rank, bias, monkeypatch):
    t = laws.make(rf.TT(rank, out_modes=(24,), in_modes=(22,)), (24, 22), posterior=rf.Point())
    monkeypatch.setattr(_matmul, "linear_way", lambda *given: _way(_matmul.linear_ways(*given), "halves"))
    factors = list(t.factors)
    x = torch.randn(4, 22, dtype=torch.float64, requires_grad=True)
    others = (torch.randn(24, dtype=torch.float64, requires_grad=True),) if bias else ()

    def layer(x, *rest):
        return _matmul.linear(t.layout, factors, x, *rest)

    laws.close(layer(x, *others), x @ laws.naive_dense(t, factors).T + (others[0] if bias else 0))
    inputs = (x, *others, *factors)
    assert torch.autograd.gradcheck(lambda *given: layer(*given[: 1 + bias]), inputs)
    assert torch.autograd.gradgradcheck(lambda *given: layer(*given[: 1 + bias]), inputs)
    laws.close(torch.func.vmap(lambda row: layer(row.unsqueeze(0), *others)[0])(x), layer(x, *others))
    check_linear(t)


@pytest.mark.parametrize("bias", [True, False])
def test_derivatives_of_a_weight_that_is_formed_again(kind, bias):
    t = laws.make(kind(2), (6, 10), posterior=rf.Point())
    way, factors = _formed_again(_matmul.linear_ways(t.layout, shapes_of(t.factors), 4)), list(t.factors)
    x = torch.randn(2, 2, 10, dtype=torch.float64, requires_grad=True)
    others = (torch.randn(6, dtype=torch.float64, requires_grad=True),) if bias else ()

    def layer(x, *rest):
        own = rest[bias:]
        return _matmul.linear_by(way, t.layout, own or factors, x, rest[0] if bias else None)

    inputs = (x, *others, *factors)
    assert torch.autograd.gradcheck(layer, inputs)
    assert torch.autograd.gradgradcheck(layer, inputs)
    laws.close(torch.func.vmap(lambda row: layer(row, *others))(x), layer(x, *others))
    by_rows = torch.func.vmap(torch.func.grad(lambda f, row: layer(row, *others, f, *factors[1:]).sum()), (None, 0))
    (summed,) = torch.autograd.grad(layer(*inputs).sum(), factors[0])
    laws.close(by_rows(factors[0], x).sum(0), summed)
    laws.close(layer(x[0, 0], *others), layer(x, *others)[0, 0])
    assert layer(x[:0], *others).shape == (0, 2, 6)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # By torch's own forward derivatives.
def test_a_bias_is_added_on_the_way_into_order():
    y = torch.randn(3, 4, 5, dtype=torch.float64).mT.requires_grad_()
    bias = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    found = _matmul._Laid.apply(y, bias)
    assert found.is_contiguous()
    assert torch.equal(found, y + bias)
    for pair in ((y, bias), (y, bias.detach()), (y.detach(), bias)):
        assert torch.autograd.gradcheck(_matmul._Laid.apply, pair, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(_matmul._Laid.apply, pair)


@pytest.mark.parametrize("turned", [True, False])
def test_what_steps_give_is_laid_with_the_bias_unless_it_lies_in_order(turned, monkeypatch):
    laid, apply = [], _matmul._Laid.apply
    monkeypatch.setattr(_matmul._Laid, "apply", lambda *a: laid.append(a[0].shape) or apply(*a))
    einsum = _matmul.einsum
    monkeypatch.setattr(_matmul, "einsum", lambda *a: _in_order(einsum(*a), turned))
    t = laws.make(rf.Tucker(3, out_modes=(6, 4), in_modes=(4, 3)), (24, 12), posterior=rf.Point())
    bias, x = torch.randn(24, dtype=torch.float64, requires_grad=True), torch.randn(2, 3, 12, dtype=torch.float64)
    steps = next(way for way in _matmul.linear_ways(t.layout, shapes_of(t.factors), 6) if way.kind == "steps")

    def of(bias):
        return _matmul.linear_by(steps, t.layout, list(t.factors), x, bias)

    y, expected = of(bias), x @ laws.naive_dense(t, t.factors).T + bias
    laws.close(y, expected)
    direction = torch.randn_like(y)
    gradients = (torch.autograd.grad(v, [*t.factors, bias], direction) for v in (y, expected))
    for own, theirs in zip(*gradients, strict=True):
        laws.close(own, theirs)
    laws.close(torch.func.vmap(of)(bias.expand(2, -1))[1], expected)
    assert laid == [(2, 3, 6, 4)] * turned


def _in_order(y, turned):
    return y.mT.contiguous().mT if turned else y.contiguous()


def test_a_weight_that_costs_little_beside_its_product_is_formed_again():
    t = laws.make(rf.TTM(20), (768, 640), posterior=rf.Point(), dtype=torch.float32)
    kept = []

    def keep(tensor):
        kept.append(tensor.numel())
        return tensor

    for rows, again in ((64, False), (4096, True)):
        ways = _matmul.linear_ways(t.layout, shapes_of(t.factors), rows)
        way, x = _way(ways, "formed"), torch.randn(rows, 640, requires_grad=True)
        assert way.again == again
        assert ("again" in way.described(t.layout)) == again
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            y = _matmul.linear_by(way, t.layout, list(t.factors), x)
        y.sum().backward()
        assert (sum(kept) < x.numel() + 768 * 640) == again
    small = laws.make(rf.TTM(20), (256, 256), posterior=rf.Point(), dtype=torch.float32)
    assert not _way(_matmul.linear_ways(small.layout, shapes_of(small.factors), 1 << 16), "formed").again


def _way(ways, kind):
    return next(way for way in ways if way.kind == kind)


def _formed_again(ways):
    return replace(_way(ways, "formed"), again=True)


# Few rows and many, since the planner forms the weight for one and not for the other.
@pytest.mark.parametrize("batch", [(), (1,), (0,), (500,)], ids=str)
def test_linear_of_any_batch(kind, batch):
    t = laws.make(kind(3), (16, 18), posterior=rf.Point())
    x = torch.randn(*batch, 18, dtype=torch.float64)
    assert t.linear(x).shape == (*batch, 16)
    laws.linear_is_the_dense_product(t, x)


@pytest.mark.parametrize(("format", "shape"), GIVEN_MODES, ids=str)
def test_given_modes(format, shape, posterior):
    t = laws.make(format, shape, posterior=posterior)
    for wanted, modes in zip((format.out_modes, format.in_modes), t.layout.modes, strict=False):
        # Ones that only fill up a TT-matrix go where it is a tensor train without them.
        assert wanted in (None, modes) or tuple(n for n in wanted if n > 1) == modes
    check_values(t)
    check_linear(t)
    laws.kl_is_that_of_the_distributions(t)
    laws.kl_gradient_is_that_of_the_profiled_bound(t)
    for bond in t.ranks:
        laws.cutting_takes_exactly_the_slice(t, bond, 0)


@pytest.mark.parametrize("shape", [(12, 20), (11, 13), (30,), (4, 5, 6), (2, 3, 4, 3)], ids=str)
def test_kl(kind, shape, prior, posterior):
    t = laws.make(kind(4), shape, prior, posterior)
    laws.kl_is_that_of_the_distributions(t)
    laws.kl_gradient_is_that_of_the_profiled_bound(t)


@pytest.mark.parametrize("shape", [(12, 20), (11, 13), (30,), (4, 5, 6)], ids=str)
def test_cuts(kind, shape, posterior):
    for bond in laws.make(kind(4), shape).ranks:
        laws.cutting_takes_exactly_the_slice(laws.make(kind(4), shape, posterior=posterior).train(), bond, 1)
        laws.cutting_a_zero_slice_changes_nothing(laws.make(kind(4), shape, posterior=posterior), bond, 0)


def test_many_cuts_in_a_row_end_at_rank_zero(kind, posterior):
    t = laws.make(kind(2), (6, 8), posterior=posterior)
    for bond in t.ranks:
        while t.ranks[bond]:
            laws.cutting_takes_exactly_the_slice(t, bond, 0)
    assert set(t.ranks.values()) == {0}
    assert torch.equal(t.dense(), torch.zeros(6, 8, dtype=torch.float64))
    assert torch.equal(t.linear(torch.randn(3, 8, dtype=torch.float64)), torch.zeros(3, 6, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(12, 20), (11, 13), (4, 5, 6)], ids=str)
def test_state_dict(kind, shape, posterior):
    t = laws.make(kind(4), shape, posterior=posterior)
    laws.state_dict_crosses_ranks(t, laws.make(kind(2), shape, posterior=posterior))
    for bond in t.ranks:
        t.keep_slices_(bond, torch.arange(1, t.ranks[bond]))
    laws.state_dict_crosses_ranks(t, laws.make(kind(4), shape, posterior=posterior))


@pytest.mark.parametrize("shape", [(64, 48), (31, 47)], ids=str)
def test_initial_variance_is_that_of_he(kind, shape):
    out_features, in_features = shape
    mean_square = sum(
        rf.nn.Linear(in_features, out_features, format=kind(5)).weight.dense().square().mean().item() for _ in range(50)
    )
    assert math.sqrt(mean_square / 50) == pytest.approx(math.sqrt(2 / in_features), rel=0.1)


def test_initial_std_of_a_lone_tensor(kind):
    draws = [rf.LowRankTensor((24, 5, 8), kind(3), initial_std=0.7).dense().square().mean().item() for _ in range(10)]
    assert math.sqrt(sum(draws) / 10) == pytest.approx(0.7, rel=0.1)


@st.composite
def formats_and_shapes(draw):
    kind = draw(st.sampled_from(FORMATS))
    rank = draw(st.integers(1, 5))
    modes = st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple)
    out_modes, in_modes = draw(modes), draw(modes)
    if kind is rf.TTM:
        count = max(2, len(out_modes), len(in_modes))
        out_modes += (1,) * (count - len(out_modes))
        in_modes = (1,) * (count - len(in_modes)) + in_modes
    shape = (math.prod(out_modes), math.prod(in_modes))
    if draw(st.booleans()):
        return kind(rank, out_modes=out_modes, in_modes=in_modes), shape
    return kind(rank), draw(st.tuples(st.integers(1, 40), st.integers(1, 40)))


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    case=formats_and_shapes(),
    prior=st.sampled_from([rf.LogUniform(), rf.HalfCauchy(2.0)]),
    posterior=st.sampled_from([rf.Point(), rf.MeanField(0.1)]),
    seed=st.integers(0, 2**16),
)
def test_any_shape_rank_and_modes(case, prior, posterior, seed):
    torch.manual_seed(seed)
    t = laws.make(*case, prior, posterior)
    check_values(t)
    check_linear(t)
    laws.kl_is_that_of_the_distributions(t)
    laws.kl_gradient_is_that_of_the_profiled_bound(t)
    bond = list(t.ranks)[seed % len(t.ranks)]
    laws.cutting_takes_exactly_the_slice(t, bond, seed % t.ranks[bond])
