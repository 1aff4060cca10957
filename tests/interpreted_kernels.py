# SPDX-License-Identifier: Apache-2.0
"""Holds the kernels against torch, on a CPU by Triton's interpreter; run by test_kernels.py with TRITON_INTERPRET=1."""

import sys

import pytest
import torch

import rankfall as rf
from rankfall import _chain, _kernels


def check_products():
    torch.manual_seed(0)
    cases = [  # n, m, p, q, s
        (1, 1, 1, 1, 1),
        (7, 3, 4, 5, 6),
        (70, 2, 2, 3, 4),
        (3, 2, 70, 2, 40),
        (3, 2, 2, 70, 40),
        (4, 3, 2, 0, 5),
        (0, 3, 2, 2, 2),
    ]
    for case in cases:
        check_case(*case, torch.float64)
    for dtype in (torch.float32, torch.bfloat16):
        check_case(*cases[1], dtype)


def check_case(n, m, p, q, s, dtype):
    # Neither is contiguous, and most rows choose one matrix, as frequent words do.
    left = torch.randn(n, q, p, dtype=dtype).transpose(1, 2).requires_grad_()
    matrices = torch.randn(q, m, s, dtype=dtype).movedim(1, 0).requires_grad_()
    which = torch.where(torch.rand(n) < 0.5, m - 1, torch.randint(m, (n,)))
    grad = torch.randn(n, s, p, dtype=dtype).transpose(1, 2)
    found = _kernels.own_products(left, matrices, which)
    gradients = torch.autograd.grad(found, (left, matrices), grad)
    exact = [t.detach().double().requires_grad_() for t in (left, matrices)]
    wanted = torch.bmm(exact[0], exact[1][which])
    of_exact = torch.autograd.grad(wanted, exact, grad.double())
    accuracy = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 2e-2}[dtype]
    for one, other in zip((found, *gradients), (wanted, *of_exact), strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one.double(), other, rtol=accuracy, atol=accuracy * 10)


def check_a_single_gradient():
    left, matrices = torch.randn(6, 2, 3), torch.randn(4, 3, 5)
    which = torch.randint(4, (6,))
    for k in (0, 1):
        inputs = [left.clone(), matrices.clone()]
        inputs[k].requires_grad_()
        _kernels.own_products(*inputs, which).sum().backward()
        assert inputs[k].grad is not None
        assert inputs[1 - k].grad is None


def check_second_derivatives():
    inputs = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 2, 2), (2, 2, 3))]
    which = torch.tensor([1, 0, 1])
    assert torch.autograd.gradgradcheck(lambda *given: _kernels.own_products(*given, which), inputs)
    products = _kernels.own_products(*inputs, which)
    first = torch.autograd.grad(products.sum(), inputs, create_graph=True)
    assert all(gradient.requires_grad for gradient in first)


def check_autocast():
    left, matrices = torch.randn(6, 2, 3), torch.randn(4, 3, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert _kernels.own_products(left, matrices, torch.zeros(6, dtype=torch.int64)).dtype == torch.bfloat16


def check_the_trial():
    _kernels.try_on(torch.device("cpu"))
    products = _kernels._products
    _kernels._products = lambda *arguments: products(*arguments) + 1
    with pytest.raises(RuntimeError, match="they give other numbers"):
        _kernels.try_on(torch.device("cpu"))
    _kernels._products = products


def check_tables():
    _chain._has_kernels = lambda _device: True
    calls, kernel = [], _kernels.own_products

    def counted(*arguments):
        calls.append(arguments)
        return kernel(*arguments)

    _kernels.own_products = counted
    for kind in (rf.nn.Embedding, rf.nn.EmbeddingBag):
        layer = kind(10_000, 12, format=rf.TTM(3, out_modes=(20, 20, 25), in_modes=(2, 2, 3)), dtype=torch.float64)
        layer.eval()
        ids = torch.randint(10_000, (4, 3))
        found = layer(ids)
        of_table = torch.nn.functional.embedding(ids, layer.weight.dense())
        wanted = of_table if kind is rf.nn.Embedding else of_table.mean(1)
        grad = torch.randn_like(found)
        gradients = [torch.autograd.grad(y, tuple(layer.weight.factors), grad) for y in (found, wanted)]
        torch.testing.assert_close(found, wanted)
        torch.testing.assert_close(*gradients)
    assert len(calls) == 4


if __name__ == "__main__":
    for check in (
        check_products,
        check_a_single_gradient,
        check_second_derivatives,
        check_autocast,
        check_the_trial,
        check_tables,
    ):
        check()
        sys.stdout.write(f"{check.__name__}: fine\n")
