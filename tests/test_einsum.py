# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import laws
import rankfall as rf
from rankfall import _matmul
from rankfall._contract import Mixing, halves, mixing, thin_matrices
from rankfall._einsum import BATCH, contract, einsum, plan, power_of_two, rounded, run, shapes_of
from rankfall._machine import Machine, use
from table_rows import gradients_match


def test_a_contraction_is_what_matrix_products_give():
    a, b, c = torch.randn(2, 3), torch.randn(3, 4), torch.randn(4, 5)
    names = [("i", "r"), ("r", "s"), ("s", "j")]
    torch.testing.assert_close(contract(names, ("i", "j"), [a, b, c]), a @ b @ c)
    torch.testing.assert_close(contract(names, ("j", "i"), [a, b, c]), (a @ b @ c).T)
    torch.testing.assert_close(contract(names, (), [a, b, c]), (a @ b @ c).sum())


def test_one_tensor_is_permuted_and_summed():
    a = torch.randn(2, 3, 4)
    torch.testing.assert_close(contract([("i", "j", "k")], ("k", "i"), [a]), a.sum(1).T)


def test_a_name_of_three_tensors_is_summed_once():
    a, b, c = (torch.randn(4, 3) for _ in range(3))
    names = [("i", "r"), ("j", "r"), ("k", "r")]
    torch.testing.assert_close(contract(names, ("i", "j", "k"), [a, b, c]), torch.einsum("ir,jr,kr->ijk", a, b, c))


def test_a_network_of_more_names_than_letters():
    # 40 bonds and 41 modes of size 1 or 2: a chain, so the reference is a product of matrices.
    count = 41
    sizes = [2 if k % 10 == 0 else 1 for k in range(count)]
    cores = [torch.randn(3, n, 3, dtype=torch.float64) for n in sizes]
    names = [(f"r{k}", f"m{k}", f"r{k + 1}") for k in range(count)]
    assert len({name for axes in names for name in axes}) > 52
    modes = tuple(f"m{k}" for k in range(count))
    actual = contract(names, ("r0", *modes, f"r{count}"), cores)
    expected = torch.eye(3, dtype=torch.float64)[None]
    for core in cores:
        expected = torch.stack([e @ core[:, j] for e in expected for j in range(core.shape[1])])
    laws.close(actual.reshape(3, -1, 3).movedim(1, 0), expected)


def test_a_bond_of_size_zero_gives_zeros():
    a, b, c = torch.randn(2, 3), torch.randn(3, 0), torch.randn(0, 5)
    out = contract([("i", "r"), ("r", "s"), ("s", "j")], ("i", "j"), [a, b, c])
    assert torch.equal(out, torch.zeros(2, 5))


@pytest.mark.parametrize("batch", [(), (7,), (2, 3), (0, 4)], ids=str)
def test_batch_dimensions_lead(batch):
    x, a, b = torch.randn(*batch, 4, 5), torch.randn(4, 6), torch.randn(5, 2)
    sizes = (("i", 4), ("j", 5), ("k", 6), ("l", 2), (BATCH, 8))
    steps = plan(((BATCH, "i", "j"), ("i", "k"), ("j", "l")), (BATCH, "k", "l"), sizes)
    torch.testing.assert_close(run(steps, [x, a, b]), torch.einsum("...ij,ik,jl->...kl", x, a, b))


def test_gradients_flow_to_every_tensor():
    tensors = [torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    names = (("i", "r"), ("j", "r"), ("k", "r"))
    assert torch.autograd.gradcheck(lambda *ts: contract(names, ("i", "j", "k"), ts), tensors)


@given(st.data())
def test_a_product_without_a_sum_is_laid_out_as_its_axes_come(data):
    """Whatever the order of axes of what it is made of, and in memory."""
    axes = data.draw(st.permutations("abcd"))
    first, second = (data.draw(st.permutations([n for n, k in zip("abcd", of, strict=True) if k])) for of in _HAVE)
    size = dict(zip("abcd", data.draw(st.lists(st.integers(0, 4), min_size=4, max_size=4)), strict=True))
    pair = [
        torch.randn([size[n] for n in reversed(names)], dtype=torch.float64).permute(*reversed(range(len(names))))
        for names in (first, second)
    ]
    pair = [t.requires_grad_() for t in pair]
    equation = f"{''.join(first)},{''.join(second)}->{''.join(axes)}"
    made, expected = einsum(equation, pair), torch.einsum(equation, *pair)
    assert made.is_contiguous()
    torch.testing.assert_close(made, expected)
    direction = torch.randn_like(expected)
    for one, other in zip(*(torch.autograd.grad(y, pair, direction) for y in (made, expected)), strict=True):
        torch.testing.assert_close(one, other)


_HAVE = (1, 1, 0, 1), (1, 0, 1, 1)


@pytest.mark.parametrize("modes", [((6, 5), (4, 7)), ((3, 5, 2), (2, 7, 2))], ids=str)
def test_thin_matrices_of_cp_lie_along_their_long_side(modes):
    """With the rank last in memory gradients take up to a third longer, and what factors get of these several times."""
    out_modes, in_modes = modes
    tensor = rf.LowRankTensor((30, 28), rf.CP(20, out_modes=out_modes, in_modes=in_modes))
    shapes = shapes_of(tensor.factors)
    pair = thin_matrices(tensor.layout, tensor.factors, halves(tensor.layout, shapes))
    assert all(m.is_contiguous() for m in pair)
    torch.testing.assert_close(pair[0].T @ pair[1], tensor.dense())


def test_the_order_is_the_cheap_one():
    # (i r)(r j)(j): matrix-vector twice costs 2*2*10*1000, the matrix first 2*1000*10*1000.
    steps = plan((("i", "r"), ("r", "j"), ("j",)), ("i",), (("i", 1000), ("r", 10), ("j", 1000)))
    assert steps.flops == 2 * 2 * 10 * 1000
    assert steps.steps[0][0] == (1, 2)


def test_counts_are_those_of_the_steps():
    steps = plan((("i", "r"), ("r", "j")), ("i", "j"), (("i", 3), ("r", 4), ("j", 5)))
    assert steps.flops == 2 * 3 * 4 * 5
    assert steps.elements == 3 * 4 + 4 * 5 + 3 * 5


def test_the_planner_forms_the_weight_only_for_many_rows():
    t = rf.LowRankTensor((64, 64), rf.TTM(8, out_modes=(4, 4, 4), in_modes=(4, 4, 4)))
    shapes = shapes_of(t.factors)
    few, many = (_matmul.linear_plan(t.layout, shapes, rows) for rows in (1, 1 << 14))
    # Position 0 is x: the formed weight meets it in the last step alone.
    assert 0 in few.steps[0][0]
    assert all(0 not in positions for positions, _ in many.steps[:-1])
    dense = 2 * 64 * 64
    assert few.flops < dense * 8
    assert many.flops <= 1.1 * dense * (1 << 14)


def test_low_ranks_are_cheaper_than_the_dense_weight(kind):
    t = rf.LowRankTensor((256, 256), kind(2))
    steps = _matmul.linear_plan(t.layout, shapes_of(t.factors), 1024)
    assert steps.flops < 0.5 * 2 * 1024 * 256 * 256


@given(st.integers(0, 10**9))
def test_rounded_is_a_little_more_and_takes_few_values(count):
    assert max(count, 1) <= rounded(count) <= max(1.25 * count, 1)
    assert rounded(rounded(count)) == rounded(count)
    assert rounded(2 * count) == 2 * rounded(count) or count < 4
    assert count <= power_of_two(count) < max(2 * count, 2)
    assert power_of_two(count).bit_count() == 1


EQUATIONS = ("ab,...cb->...ac", "...cb,ab->...ac", "abd,...bcd->...ac", "...bc,dab->...dac", "a,...a->...")


@pytest.mark.parametrize("equation", EQUATIONS[:4])
@given(sizes=st.tuples(*[st.integers(1, 5)] * 4), batch=st.lists(st.integers(1, 4), max_size=2), biased=st.booleans())
def test_axes_of_a_factor_are_mixed_in_before_those_of_a_batch(equation, sizes, batch, biased):
    size = dict(zip("abcd", sizes, strict=True))
    names, kept = equation.split("->")
    tensors = [
        torch.randn(*(batch if "..." in axes else []), *(size[n] for n in axes.replace("...", "")), dtype=torch.float64)
        for axes in names.split(",")
    ]
    shape = [size[n] for n in kept.replace("...", "")]
    bias = torch.randn(*shape, dtype=torch.float64) if biased else None
    leaves = [t.requires_grad_() for t in (*tensors, *([] if bias is None else [bias]))]
    mix = mixing(equation)
    assert mix is not None
    wanted = torch.einsum(equation, *tensors) + (0 if bias is None else bias)
    gradients_match(mix(*tensors, bias), wanted, leaves)


@pytest.mark.parametrize("equation", [EQUATIONS[4], "ab,...cb->...ca", "ab,bc->ac", "...a->...a", "...ab,...bc->...ac"])
def test_other_equations_mix_nothing(equation):
    assert mixing(equation) is None


@pytest.mark.parametrize("batched", [1e9, 1e8])
def test_large_results_are_mixed_where_products_in_batches_are_fast(batched, monkeypatch):
    use(Machine(flops=1e9, elements=1e8, call=1e-7, convolved=1e9, batched=batched, passed=1e9, blocked=1e9))
    mixed, call = [], Mixing.__call__
    monkeypatch.setattr(Mixing, "__call__", lambda *a: mixed.append(a) or call(*a))
    t = laws.make(rf.Tucker(6, out_modes=(64, 16), in_modes=(4, 3)), (1024, 12), posterior=rf.Point())
    steps = next(way for way in _matmul.linear_ways(t.layout, shapes_of(t.factors), 300) if way.kind == "steps")
    for rows in (2, 300):
        x, bias = torch.randn(rows, 12, dtype=torch.float64), torch.randn(1024, dtype=torch.float64)
        found = _matmul.linear_by(steps, t.layout, list(t.factors), x, bias)
        laws.close(found, x @ laws.naive_dense(t, t.factors).T + bias)
    assert len(mixed) == (batched == 1e9)
    use(None)
