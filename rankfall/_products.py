# SPDX-License-Identifier: Apache-2.0
"""Products of matrices by the faster one of the two libraries that torch has on a CPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from rankfall._machine import machine
from rankfall._onednn import by_onednn, has_onednn

_LEAST = 8_000_000  # Operations; a product of fewer loses more by the call than it gains.
# oneDNN writes a program for each new shape, which takes half a millisecond: too long for a product that is made once.
_LEAST_ONCE = 150_000_000
_WORTH_IT = 1.1  # How much faster a library has to be.


_varies: ContextVar[bool] = ContextVar("varies", default=False)


@contextmanager
def varying(so: bool = True) -> Iterator[None]:
    """Inside, shapes of products are taken to be new at every step, as those of sequences of any length are."""
    token = _varies.set(so)
    try:
        yield
    finally:
        _varies.reset(token)


def is_varying() -> bool:
    """Whether shapes are taken to be new at every step."""
    return _varies.get()


def product(
    a: Float[Tensor, "*batch k"],
    b: Float[Tensor, "k n"],
    bias: Float[Tensor, " n"] | None = None,
    *,
    varies: bool = False,
) -> Float[Tensor, "*batch n"]:
    """A @ B, plus a bias; `varies` is as inside of `varying`.

    torch multiplies float32 matrices on a CPU by MKL, which on some, AMD's among them, reaches half of the speed of
    oneDNN, by which torch convolves, and compiled models multiply. Where that is faster on this machine it is taken.
    """
    if torch.compiler.is_compiling() or not pays(a, b, varies=varies):
        return a @ b if bias is None else F.linear(a, b.mT, bias)
    rows = a.reshape(-1, a.shape[-1])
    value: Tensor = _Product.apply(rows, b, bias) if torch.is_grad_enabled() else by_onednn(rows, b.T, bias)  # pyright: ignore
    return value.view(*a.shape[:-1], b.shape[1])


def transposed_product(a: Float[Tensor, "m k"], b: Float[Tensor, "m n"]) -> Float[Tensor, "k n"]:
    """A.T @ B, the longer one of its sides last in memory, which takes half as long where the other is short."""
    return product(a.T, b) if a.shape[1] <= b.shape[1] else product(b.T, a).T


def sum_of_rows(a: Float[Tensor, "m n"]) -> Float[Tensor, " n"]:
    """a.sum(0): on a CPU as a product with ones, which takes up to half of the time."""
    if a.device.type != "cpu" or a.dtype not in (torch.float32, torch.float64) or torch.compiler.is_compiling():
        return a.sum(0)
    return torch.mv(a.T, a.new_ones(len(a)))


def multiply_into(a: Float[Tensor, "m k"], b: Float[Tensor, "k n"], out: Float[Tensor, "m n"]) -> Tensor:
    """A @ B written to `out`, without gradients."""
    return out.copy_(by_onednn(a, b.T)) if pays(a, b) else torch.mm(a, b, out=out)


def pays(a: Float[Tensor, "*batch k"], b: Float[Tensor, "k n"], *, varies: bool = False) -> bool:
    """Whether `product` takes oneDNN for these."""
    if not (a.device.type == "cpu" and a.dtype == b.dtype == torch.float32 and a.dim() and b.shape[0]):
        return False
    least = _LEAST_ONCE if varies or _varies.get() else _LEAST
    if 2 * a.numel() * b.shape[1] < least or torch.is_autocast_enabled("cpu") or torch.jit.is_tracing():  # pyright: ignore
        return False
    if torch._C._are_functorch_transforms_active():  # As torch.autograd.Function itself asks.
        return False
    # Who turns oneDNN off, to count operations for example, means this too.
    return torch.backends.mkldnn.enabled and has_onednn() and machine().flops > _WORTH_IT * machine().batched  # pyright: ignore


class _Product(torch.autograd.Function):
    # Of the two forms that torch has for this, the one that takes less time.
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:  # noqa: ANN401  # pyright: ignore
        ctx.save_for_backward(a, b)
        ctx.save_for_forward(a, b)
        return by_onednn(a, b.T, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401  # pyright: ignore
        (a, b), wanted = ctx.saved_tensors, ctx.needs_input_grad
        of_a = product(gradient, b.T) if wanted[0] else None
        of_b = transposed_product(a, gradient) if wanted[1] else None
        return of_a, of_b, sum_of_rows(gradient) if wanted[2] else None

    @staticmethod
    def jvp(ctx: Any, of_a: Tensor | None, of_b: Tensor | None, of_bias: Tensor | None) -> Tensor:  # noqa: ANN401  # pyright: ignore
        a, b = ctx.saved_tensors
        parts = [] if of_a is None else [of_a @ b]
        parts += [] if of_b is None else [a @ of_b]
        parts += [] if of_bias is None else [of_bias.expand(len(a), -1)]
        return torch.stack(parts).sum(0)
