# SPDX-License-Identifier: Apache-2.0
"""Holds the kernels against torch, on a CPU by Triton's interpreter; run by test_kernels.py with TRITON_INTERPRET=1."""

import copy
import sys

import pytest
import torch

import rankfall as rf
from conftest import FORMATS
from rankfall import _chain, _draw_kernels, _elbo, _kernels
from rankfall._elbo import JointDraw


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


def check_the_trials():
    for kernels, name, report in (
        (_kernels, "_products", "they give other numbers"),
        (_draw_kernels, "_gradients", "they give other numbers"),
        (_draw_kernels, "kl_of_factors", "they give another KL"),
    ):
        kernels.try_on(torch.device("cpu"))
        right = getattr(kernels, name)
        setattr(kernels, name, lambda *arguments, right=right: right(*arguments) + 1)
        with pytest.raises(RuntimeError, match=report):
            kernels.try_on(torch.device("cpu"))
        setattr(kernels, name, right)


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


def check_draws():
    """The KL and all gradients are those of autograd in float64, the noise held fixed, for chunks of any size."""
    _elbo._has_kernels = lambda _device: True
    for number, kind in enumerate(FORMATS):
        for chunk in (16, 1024):
            _draw_kernels._CHUNK, _draw_kernels._MANY = chunk, 4
            torch.manual_seed(number)
            prior = rf.HalfCauchy(0.5) if number % 2 else rf.LogUniform()
            model = torch.nn.ModuleList(
                rf.LowRankTensor(shape, kind(3), prior=prior, posterior=rf.MeanField(0.3))
                for shape in ((9, 40), (7, 5), (1, 3))
            )
            for log_std in (s for t in model for s in t.log_stds):
                log_std.data += 0.5 * torch.randn_like(log_std)
            model[1].keep_slices_(next(iter(model[1].ranks)), torch.tensor([], dtype=torch.int64))
            check_draw(model)


def check_draw(model):
    draw, weights = JointDraw(model), [torch.randn_like(f) for t in model for f in t.factors]
    with draw() as kl:
        drawn = [f for t in model for f in t.drawn()]
    assert type(kl.grad_fn).__name__ == "_KernelDrawBackward"
    loss = 0.7 * kl + sum((f * w).sum() for f, w in zip(drawn, weights, strict=True))
    found = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    again = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
    wide = copy.deepcopy(model).double()
    pairs = [(m, s) for t in wide for m, s in zip(t.factors, t.log_stds, strict=True)]
    noise = [((f - m) / s.exp()).detach() for f, (m, s) in zip(drawn, pairs, strict=True)]
    exact = [m + s.exp() * e for e, (m, s) in zip(noise, pairs, strict=True)]
    value = rf.kl(wide)
    loss = 0.7 * value + sum((f * w.double()).sum() for f, w in zip(exact, weights, strict=True))
    wanted = torch.autograd.grad(loss, list(wide.parameters()))
    assert abs(float(torch.cat([e.flatten() for e in noise]).mean())) < 0.3
    torch.testing.assert_close(kl.double(), value, rtol=1e-5, atol=1e-3)
    for gradients in (found, again):
        torch.testing.assert_close([g.double() for g in gradients], list(wanted), rtol=2e-4, atol=2e-4)
    assert all(g.requires_grad for g in again[: len(model[0].factors)])


def check_noise():
    """The kernels' noise is normal, independent of place and draw, and follows torch's generator."""
    _draw_kernels._CHUNK = 1024
    tensor = rf.LowRankTensor((20_000, 1), rf.TT(1, out_modes=(20_000,), in_modes=(1,)))
    tensor.factors[0].data.fill_(0)
    tensor.log_stds[0].data.fill_(0)
    model = torch.nn.ModuleList([tensor])
    draw = JointDraw(model)

    def noise():
        with draw():
            return tensor.drawn()[0].detach().flatten().double()

    torch.manual_seed(3)
    one, other = noise(), noise()
    torch.manual_seed(3)
    assert torch.equal(noise(), one)
    z = torch.cat([one, other])
    for power, wanted in ((1, 0.0), (2, 1.0), (3, 0.0), (4, 3.0)):
        values = z**power
        assert abs(float(values.mean()) - wanted) < 5 * float(values.std()) / len(z) ** 0.5
    for apart in (1, 2, 32, 1024, 20_000):
        products = z[apart:] * z[:-apart]
        assert abs(float(products.mean())) < 5 * float(products.std()) / len(products) ** 0.5


def check_draws_by_torch():
    """Where the kernels cannot: other numbers, other priors, nothing left."""
    for change in (lambda t: t.double(), lambda t: t.keep_slices_("r1", torch.tensor([], dtype=torch.int64))):
        tensor = rf.LowRankTensor((6, 4), rf.TT(2, out_modes=(6,), in_modes=(4,)))
        change(tensor)
        with JointDraw(torch.nn.ModuleList([tensor]))() as kl:
            assert type(kl.grad_fn).__name__ == "_DrawBackward"


if __name__ == "__main__":
    for check in (
        check_draws,
        check_noise,
        check_draws_by_torch,
        check_products,
        check_a_single_gradient,
        check_second_derivatives,
        check_autocast,
        check_the_trials,
        check_tables,
    ):
        check()
        sys.stdout.write(f"{check.__name__}: fine\n")
