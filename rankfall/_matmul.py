# SPDX-License-Identifier: Apache-2.0
"""Vectors times a low-rank matrix, in the cheapest of several ways."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from rankfall._compiled import is_unseen
from rankfall._contract import (
    LEAST_RANK,
    cut_at,
    effort_of_mixed,
    forming,
    halves,
    mixed,
    mixing,
    plan_of_halves,
    thin_matrices,
)
from rankfall._einsum import (
    BATCH,
    Plan,
    Shapes,
    contract,
    cost_of,
    counted_in_steps,
    einsum,
    plan,
    planned_once,
    rounded,
    run_but_last,
    shapes_of,
)
from rankfall._forming import dense
from rankfall._layout import Layout
from rankfall._machine import machine
from rankfall._products import is_varying, product, sum_of_rows, transposed_product, varying


def linear_plan(layout: Layout, shapes: Shapes, rows: int) -> Plan:
    """The cheapest order in which `rows` vectors and the factors of a matrix are contracted pair by pair.

    Args:
        layout: A layout with two axes.
        shapes: The shapes of the factors, at today's ranks.
        rows: The number of vectors; rounded up, so that few plans are made.
    """
    out_names, in_names = layout.axes
    sizes = layout.mode_sizes | layout.ranks(shapes) | {BATCH: rounded(rows)}
    return plan(((BATCH, *in_names), *layout.factors), (BATCH, *out_names), tuple(sizes.items()))


@dataclass(frozen=True)
class Way:
    """How vectors are multiplied by a matrix in factors.

    Attributes:
        kind: "formed" (one product with W), "halves" (two products with thin matrices), "cut" (a TT-matrix in two
            parts at a bond, one applied after the other), or "steps" (factor by factor).
        bond: The bond of a cut, from 0.
        right_first: Whether the part to the right of the cut comes first.
        flops: Multiplications and additions.
        elements: Elements read and written.
        effort: Operations of one large product that take as long.
        again: Whether the formed weight is forgotten, and formed once more for the gradients.
    """

    kind: Literal["formed", "halves", "cut", "steps"]
    flops: int
    elements: int
    effort: int
    bond: int = 0
    right_first: bool = True
    again: bool = False

    @property
    def cost(self) -> int:
        """Time, in floating-point operations."""
        return cost_of(self.effort, self.elements) + round(machine().flops * _CALLS[self.kind])

    def is_like(self, other: "Way") -> bool:
        """Whether it is the same way, for another number of vectors."""
        return (self.kind, self.bond, self.right_first) == (other.kind, other.bond, other.right_first)

    def described(self, layout: Layout) -> str:
        """The way in words."""
        cut = f"in two parts, cut at {layout.bonds[self.bond]}" if self.kind == "cut" else ""
        formed = "by the formed weight" + ", formed again for gradients" * self.again
        words = {"formed": formed, "halves": "by two thin matrices", "steps": "factor by factor"}
        return words.get(self.kind, cut)


# A weight of so many entries is not kept for the gradients where forming it takes no more than this part of a forward
# pass: to form it again makes a training step of three such passes longer by a third of that part.
_WORTH_FORGETTING, _LITTLE = 1 << 18, 0.05
# Fitted to benchmarks/planner.py: what a step reads or writes is also brought into the order of axes that its product
# wants. Then the seconds that it takes to call all operations of a forward pass.
_COPIES = 1.5
_CALLS = {"formed": 3e-5, "halves": 1.3e-4, "cut": 1e-4, "steps": 1.7e-4}


@planned_once
def linear_way(layout: Layout, shapes: Shapes, rows: int) -> Way:
    """The cheapest way to multiply so many vectors by a matrix in factors; see `linear_ways`."""
    return min(linear_ways(layout, shapes, rows), key=lambda way: way.cost)


@planned_once
def least_effort(layout: Layout, shapes: Shapes, rows: int) -> int:
    """How many operations of one large product the way with the least of them takes."""
    return min(way.effort for way in linear_ways(layout, shapes, rows))


def way_of_rows(layout: Layout, shapes: Shapes, rows: int) -> Way:
    """What `linear` does with so many vectors: chosen for a rounded number of them, counted for the true one."""
    chosen = linear_way(layout, shapes, rounded(rows))
    if chosen.kind != "steps":
        counted = next(way for way in linear_ways(layout, shapes, rows) if way.is_like(chosen))
        return replace(counted, again=chosen.again)
    # The order of steps is planned for a rounded number whatever it is asked for.
    steps = linear_plan(layout, shapes, rows)
    flops, elements = counted_in_steps(steps, ((rows, *layout.modes[1]), *shapes))
    effort = chosen.effort * flops // max(chosen.flops, 1)
    return replace(chosen, flops=flops, effort=effort, elements=chosen.elements * elements // steps.elements)


def dense_cost(layout: Layout, rows: int) -> int:
    """The time of so many vectors times a dense matrix, as torch's layers multiply, in floating-point operations."""
    out, width = layout.shape
    effort = round(machine().slowness_of_batches * 2 * rows * out * width)
    return cost_of(effort, out * width + rows * (out + width))


def linear_ways(layout: Layout, shapes: Shapes, rows: int) -> list[Way]:
    """All ways that a layout has, counted in operations and elements moved.

    Args:
        layout: A layout with two axes.
        shapes: The shapes of the factors, at today's ranks.
        rows: The number of vectors.
    """
    out, width = layout.shape
    formed = forming(layout, shapes).plan
    steps = linear_plan(layout, shapes, rows)
    whole = _with_products("formed", formed, rows, (width, out))
    again = out * width >= _WORTH_FORGETTING and formed.cost <= _LITTLE * whole.cost
    ways = [
        replace(whole, again=again),
        Way("steps", steps.flops, round(_COPIES * steps.elements) + _bias_added(rows, out), steps.effort),
    ]
    pair = halves(layout, shapes)
    if pair is None:
        ways += [_cut_way(layout, shapes, rows, k, right) for k in range(len(shapes) - 1) for right in (True, False)]
    else:
        rank = math.prod([layout.ranks(shapes)[bond] for bond in pair.joint])
        thin = max(rank, LEAST_RANK) if rank else 0
        ways.append(_with_products("halves", plan_of_halves(layout, shapes, pair), rows, (width, thin, out)))
    return ways


def _with_products(kind: Literal["formed", "halves"], before: Plan, rows: int, widths: Sequence[int]) -> Way:
    """What forming matrices costs, and products of so many rows by matrices of these widths after it."""
    products = list(pairwise(widths))
    flops = before.flops + sum(2 * rows * a * b for a, b in products)
    elements = before.elements + sum(a * b + rows * (a + b) for a, b in products)
    return Way(kind, flops, elements, flops)


def _bias_added(rows: int, out: int) -> int:
    """Numbers moved to add a bias where no product takes it along; most layers have one."""
    return 2 * rows * out


def _cut_way(layout: Layout, shapes: Shapes, rows: int, bond: int, right_first: bool) -> Way:
    (out_left, out_right), (in_left, in_right) = (
        (math.prod(modes[: bond + 1]), math.prod(modes[bond + 1 :])) for modes in layout.modes
    )
    rank = layout.ranks(shapes)[layout.bonds[bond]]
    if right_first:
        middle = rows * in_left * rank * out_right
        plain, mix = 2 * middle * in_right, effort_of_mixed(rows, out_left, in_left * rank, out_right)
    else:
        middle = rows * out_left * rank * in_right
        plain, mix = 2 * middle * out_right, effort_of_mixed(rows, out_left * rank, in_left, in_right)
    parts = rank * (out_left * in_left + out_right * in_right)
    elements = rows * (in_left * in_right + out_left * out_right) + 2 * middle + 2 * parts
    elements += _bias_added(rows, out_left * out_right)
    plain += 2 * parts * rank
    counted = plain + 2 * middle * (out_left if right_first else in_left)
    return Way("cut", counted, elements, plain + mix, bond, right_first)


def linear(
    layout: Layout,
    factors: Sequence[Tensor],
    x: Float[Tensor, "*batch in_features"],
    bias: Float[Tensor, " out_features"] | None = None,
) -> Float[Tensor, "*batch out_features"]:
    """X @ dense().T + bias, in the way that `linear_way` finds."""
    rows = rounded(math.prod(x.shape[:-1]))
    way = linear_way(layout, shapes_of(factors), rows)
    return linear_by(way, layout, factors, x, bias)


def linear_by(way: Way, layout: Layout, factors: Sequence[Tensor], x: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same in a given way."""
    if way.kind == "formed":
        # The weight is kept for the gradient of x alone. A compiler decides by itself what is made again, and under
        # autocast what is kept is of half the size.
        plain = not torch.compiler.is_compiling() and not torch.is_autocast_enabled(x.device.type)
        if way.again and x.requires_grad and plain:
            y: Tensor = _FormedAgain.apply(x, bias, layout, *factors)  # pyright: ignore
            return y
        return product(x, dense(layout, factors).T, bias)
    if way.kind == "halves":
        return _by_halves(layout, factors, x, bias)
    (out_features, in_features), (padded_out, padded_in) = layout.shape, layout.padded_shape
    if padded_in > in_features:
        x = F.pad(x, (0, padded_in - in_features))
    if way.kind == "steps":
        modes = layout.modes[0]
        fitting = bias if padded_out == out_features else None
        y, added = _in_steps(layout, factors, x, None if fitting is None else fitting.view(modes))
        bias = None if added else bias
        y = y.flatten(-len(modes))
    else:
        y = _by_cut(way, layout, factors, x)
    y = y[..., :out_features] if padded_out > out_features else y
    # Under autocast y has the narrow type, which the bias must not widen again.
    return y if bias is None else y + bias.to(y.dtype)


class _FormedAgain(torch.autograd.Function):
    """x @ dense().T + bias, of which x and the factors are kept, and not the weight."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, bias: Tensor | None, layout: Layout, *factors: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return product(x, dense(layout, factors).T, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ANN401  autograd's
        x, _, ctx.layout, *factors = inputs
        ctx.save_for_backward(x, *factors)

    @staticmethod
    def backward(ctx: Any, of_y: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401  # pyright: ignore
        x, *factors = ctx.saved_tensors
        weight, gradients_of = torch.func.vjp(partial(_dense_of, ctx.layout), *factors)  # pyright: ignore
        of_x = product(of_y, weight) if ctx.needs_input_grad[0] else None
        of_rows = of_y.reshape(-1, of_y.shape[-1])
        of_bias = sum_of_rows(of_rows) if ctx.needs_input_grad[1] else None
        return of_x, of_bias, None, *gradients_of(transposed_product(of_rows, x.reshape(-1, x.shape[-1])))


def _dense_of(layout: Layout, *factors: Tensor) -> Tensor:
    return dense(layout, factors)


def _by_halves(layout: Layout, factors: Sequence[Tensor], x: Tensor, bias: Tensor | None) -> Tensor:
    pair = halves(layout, shapes_of(factors))
    assert pair is not None, "linear_way names only ways that the format has"
    a, b = thin_matrices(layout, factors, pair)
    plain = x.device.type == "cpu" and not torch.is_autocast_enabled("cpu") and not torch.compiler.is_compiling()
    if plain and 0 < len(b) < LEAST_RANK:
        y, _ = _TwoThin.apply(x.reshape(-1, x.shape[-1]), b, a, bias)  # pyright: ignore
        return y.view(*x.shape[:-1], a.shape[1])
    # As a view, so that the gradient of `a` has its long side last, which takes half as long.
    return product(product(x, b.T), a, bias)


class _TwoThin(torch.autograd.Function):
    """x @ b.T @ a + bias, and x @ b.T, with the rank as the rows of every thin matrix, gradients included.

    With the rank as columns, as autograd has it, products of a few of them take two to three times as long on a CPU.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, b: Tensor, a: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        between = product(b, x.T)
        y = product(between.T, a, bias)
        return y, between

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor | None, ...], output: tuple[Tensor, Tensor]) -> None:  # noqa: ANN401  autograd's
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:3], output[1])
        ctx.has_bias, ctx.varies = inputs[3] is not None, is_varying()

    @staticmethod
    def backward(ctx: Any, of_y: Tensor | None, of_between: Tensor | None) -> tuple[Tensor | None, ...]:  # noqa: ANN401  # pyright: ignore
        with varying(ctx.varies):
            return _TwoThin._gradients(ctx, of_y, of_between)

    @staticmethod
    def _gradients(ctx: Any, of_y: Tensor | None, of_between: Tensor | None) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        x, b, a, between = ctx.saved_tensors
        of_a = of_bias = None
        if of_y is not None:
            through = product(a, of_y.T)
            of_between = through if of_between is None else of_between + through
            of_a = product(between, of_y) if ctx.needs_input_grad[2] else None
            of_bias = sum_of_rows(of_y) if ctx.has_bias and ctx.needs_input_grad[3] else None
        if of_between is None:
            return None, None, of_a, of_bias
        of_x = product(of_between.T, b) if ctx.needs_input_grad[0] else None
        return of_x, product(of_between, x) if ctx.needs_input_grad[1] else None, of_a, of_bias


def _in_steps(
    layout: Layout, factors: Sequence[Tensor], x: Tensor, bias: Tensor | None
) -> tuple[Float[Tensor, "..."], bool]:
    """Y, and whether the bias is in it, which is added where that comes with what is done anyway."""
    steps = linear_plan(layout, shapes_of(factors), math.prod(x.shape[:-1]))
    pair, last = run_but_last(steps, [x.unflatten(-1, layout.modes[1]), *factors])
    # Forward derivatives, which a product in a batch has none of, and transforms see einsum.
    mix = mixing(last) if x.device.type == "cpu" and is_unseen() else None
    if mix is not None and mix.pays(pair[0], pair[1]):
        return mix(pair[0], pair[1], bias), bias is not None
    y = einsum(last, pair)
    if bias is None or not _is_laid_faster(y, bias):
        return y, False
    return _Laid.apply(y, bias), True  # pyright: ignore


def _is_laid_faster(y: Tensor, bias: Tensor) -> bool:
    """Whether a bias is added while y is brought into order; not where torch traces or transforms."""
    if y.is_contiguous() or y.device.type != "cpu" or y.dtype != bias.dtype or torch.compiler.is_compiling():
        return False
    return not torch._C._are_functorch_transforms_active()


class _Laid(torch.autograd.Function):
    """Y + bias with the axes side by side in memory, in one pass and not two."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, bias: Tensor) -> Tensor:  # noqa: ANN401  # pyright: ignore
        ctx.shape, ctx.of_bias = y.shape, bias.shape
        return torch.add(y, bias, out=torch.empty(y.shape, dtype=y.dtype, device=y.device))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None]:  # noqa: ANN401  # pyright: ignore
        if not ctx.needs_input_grad[1]:
            return gradient, None
        return gradient, sum_of_rows(gradient.reshape(-1, ctx.of_bias.numel())).view(ctx.of_bias)

    @staticmethod
    def jvp(ctx: Any, of_y: Tensor | None, of_bias: Tensor | None) -> Tensor:  # noqa: ANN401  # pyright: ignore
        assert of_y is not None or of_bias is not None, "a derivative along something"
        if of_y is None or of_bias is None:
            return (of_bias if of_y is None else of_y).expand(ctx.shape)  # pyright: ignore
        return of_y + of_bias


def _by_cut(way: Way, layout: Layout, factors: Sequence[Tensor], x: Tensor) -> Tensor:
    """Y[b, o o'] = sum over i, i' and r of L[o, i, r] R[r, o', i'] x[b, i i'], without a copy of anything large."""
    (o_left, o_right), (i_left, i_right), rank = cut_at(layout, way.bond)
    o1, o2, i1, i2 = (math.prod([layout.mode_sizes[m] for m in names]) for names in (o_left, o_right, i_left, i_right))
    left = [layout.factors[: way.bond + 1], factors[: way.bond + 1]]
    right = [layout.factors[way.bond + 1 :], factors[way.bond + 1 :]]
    # Sizes are spelled out, since a rank or a batch of zero leaves nothing to find them from.
    slices, batch = factors[way.bond].shape[-1], math.prod(x.shape[:-1])
    if way.right_first:
        b = contract(right[0], (*i_right, rank, *o_right), right[1]).reshape(i2, slices * o2)
        a = contract(left[0], (*o_left, *i_left, rank), left[1]).reshape(o1, i1 * slices)
        middle = product(x.reshape(batch * i1, i2), b)
        y = mixed(a, middle.view(batch, i1 * slices, o2))
    else:
        a = contract(left[0], (*o_left, rank, *i_left), left[1]).reshape(o1 * slices, i1)
        b = contract(right[0], (rank, *i_right, *o_right), right[1]).reshape(slices * i2, o2)
        middle = mixed(a, x.reshape(batch, i1, i2))
        y = product(middle.view(batch * o1, slices * i2), b)
    return y.reshape(*x.shape[:-1], o1 * o2)
