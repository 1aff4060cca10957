# SPDX-License-Identifier: Apache-2.0
"""What is done with a low-rank weight, once for all formats: form it whole or in two halves, and measure it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rankfall._einsum import BATCH, Axes, Plan, Shapes, contract, plan, planned_once, run, shapes_of
from rankfall._layout import Layout
from rankfall._machine import machine
from rankfall._products import product, sum_of_rows

LEAST_RANK = 16
"""Thinner products take two to three times as long on a CPU, so zeros make up for what is missing."""

# How much longer than counted it takes to form a tensor pair by pair: small products, and copies of the whole.
_SLOWER_IN_PAIRS = 2
NARROW = 16  # Columns, or inner ones, at which a product of many rows runs at half of its speed.


def _flat_modes(layout: Layout) -> Axes:
    return tuple(name for axes in layout.axes for name in axes)


@planned_once
def dense_plan(layout: Layout, shapes: Shapes) -> Plan:
    """The order in which `dense` contracts factors of these shapes."""
    sizes = layout.mode_sizes | layout.ranks(shapes)
    return plan(layout.factors, _flat_modes(layout), tuple(sizes.items()))


def dense(layout: Layout, factors: Sequence[Tensor]) -> Float[Tensor, "*shape"]:
    """The tensor that the factors stand for, of the shape its user gave: padding is cut off."""
    shapes = shapes_of(factors)
    way = forming(layout, shapes)
    if way.pair is not None:
        a, b = matrices(layout, factors, way.pair)
        assert a is not None
        return product(a, b)
    if way.bond is not None:
        padded = _by_cut(layout, factors, way.bond)
    else:
        padded = run(dense_plan(layout, shapes), factors).reshape(layout.padded_shape)
    if layout.padded_shape == layout.shape:
        return padded
    return padded[tuple(slice(n) for n in layout.shape)]


@dataclass(frozen=True)
class Halves:
    """A matrix as a product of two: W = A B, over the bonds between the factors of A and those of B.

    Attributes:
        first: The factors of A, which bear the modes of the first axis.
        second: The factors of B.
        joint: The bonds between.
    """

    first: tuple[int, ...]
    second: tuple[int, ...]
    joint: Axes


def matrices(
    layout: Layout, factors: Sequence[Tensor], pair: Halves, *, first: bool = True
) -> tuple[Tensor | None, Tensor]:
    """A, shape (first axis, joint ranks), or None if not `first`; B, shape (joint ranks, second axis).

    Padding is cut off.
    """
    (rows, width), joint = layout.axes, pair.joint
    b = _matrix(layout, factors, pair.second, (*joint, *width), len(joint))[:, : layout.shape[1]]
    if not first:
        return None, b
    return _matrix(layout, factors, pair.first, (*rows, *joint), len(rows))[: layout.shape[0]], b


def thin_matrices(layout: Layout, factors: Sequence[Tensor], pair: Halves) -> tuple[Tensor, Tensor]:
    """The same, both with the joint ranks first: (joint ranks, first axis) and (joint ranks, second axis)."""
    first, second = (
        _matrix(layout, factors, which, (*pair.joint, *axes), len(pair.joint))[:, :size]
        for which, axes, size in zip((pair.first, pair.second), layout.axes, layout.shape, strict=True)
    )
    return first, second


def _matrix(layout: Layout, factors: Sequence[Tensor], which: Sequence[int], axes: Axes, leading: int) -> Tensor:
    found = contract([layout.factors[k] for k in which], axes, [factors[k] for k in which])
    return found.reshape(math.prod(found.shape[:leading]), math.prod(found.shape[leading:]))


@planned_once
def halves(layout: Layout, shapes: Shapes) -> Halves | None:
    """The thinnest product of two matrices that a layout of two axes has; None for a TT-matrix.

    Factors with modes of one axis alone stand on its side; a Tucker core stands where fewer slices are between.
    """
    sides: list[int | None] = []
    for axes in layout.factors:
        on = {side for side in (0, 1) if set(layout.axes[side]) & set(axes)}
        if len(on) == 2:
            return None
        sides.append(on.pop() if on else None)
    sizes, found = layout.ranks(shapes), []
    for core_side in (0, 1):
        first, second = (
            tuple(k for k, side in enumerate(sides) if (core_side if side is None else side) == which)
            for which in (0, 1)
        )
        names = [{n for k in which for n in layout.factors[k]} for which in (first, second)]
        joint = tuple(bond for bond in layout.bonds if bond in names[0] & names[1])
        found.append((math.prod([sizes[bond] for bond in joint]), Halves(first, second, joint)))
    return min(found, key=lambda pair: pair[0])[1]


def part_plan(layout: Layout, shapes: Shapes, which: Sequence[int], axes: Axes) -> Plan:
    """The order in which some of the factors are contracted to a tensor with the given axes."""
    inputs = tuple(layout.factors[k] for k in which)
    used = {n for names in inputs for n in names}
    sizes = layout.mode_sizes | layout.ranks(shapes)
    return plan(inputs, axes, tuple((n, size) for n, size in sizes.items() if n in used))


def plan_of_halves(layout: Layout, shapes: Shapes, pair: Halves) -> Plan:
    """What making the two matrices costs."""
    first = part_plan(layout, shapes, pair.first, (*layout.axes[0], *pair.joint))
    second = part_plan(layout, shapes, pair.second, (*pair.joint, *layout.axes[1]))
    return Plan((), first.flops + second.flops, first.elements + second.elements)


@dataclass(frozen=True)
class Forming:
    """How a tensor is formed.

    Attributes:
        plan: What that costs.
        pair: The two matrices, if it is their product.
        bond: The bond, from 0, if it is a TT-matrix that is formed from two parts and turned once.
    """

    plan: Plan
    pair: Halves | None = None
    bond: int | None = None


@planned_once
def forming(layout: Layout, shapes: Shapes) -> Forming:
    """The cheapest way to form the tensor: factor by factor, or as one large product of two parts."""
    one_by_one = dense_plan(layout, shapes)
    if len(layout.axes) != 2 or len(layout.factors) < 2:
        return Forming(one_by_one)
    pair = halves(layout, shapes)
    if pair is None:
        found = [Forming(_plan_of_cut(layout, shapes, bond), bond=bond) for bond in range(len(layout.bonds))]
    else:
        parts, (rows, width) = plan_of_halves(layout, shapes, pair), layout.shape
        rank = math.prod([layout.ranks(shapes)[bond] for bond in pair.joint])
        flops, elements = 2 * rows * rank * width, rows * width + rank * (rows + width)
        found = [Forming(Plan((), parts.flops + flops, parts.elements + elements), pair)]
    best = min(found, key=lambda way: way.plan.cost)
    return best if best.plan.cost < _SLOWER_IN_PAIRS * one_by_one.cost else Forming(one_by_one)


_SHORT_RUN = 16  # A copy that keeps so few neighbours together takes twice as long as a plain one.


def _plan_of_cut(layout: Layout, shapes: Shapes, bond: int) -> Plan:
    (o_left, o_right), (i_left, i_right), rank = cut_at(layout, bond)
    count = len(o_left)
    left = part_plan(layout, shapes, range(count), (*o_left, *i_left, rank))
    right = part_plan(layout, shapes, range(count, len(layout.factors)), (rank, *o_right, *i_right))
    whole, run_length = math.prod(layout.padded_shape), math.prod([layout.mode_sizes[n] for n in i_right])
    turned = 2 * whole * (1 + _SHORT_RUN / run_length)
    flops = 2 * whole * layout.ranks(shapes)[rank]
    return Plan((), left.flops + right.flops + flops, left.elements + right.elements + whole + round(turned))


def cut_at(layout: Layout, bond: int) -> tuple[tuple[Axes, Axes], tuple[Axes, Axes], str]:
    """The modes of a TT-matrix left and right of a bond, of its first and of its second axis, and the bond's name."""
    rows, width = layout.axes
    return (rows[: bond + 1], rows[bond + 1 :]), (width[: bond + 1], width[bond + 1 :]), layout.bonds[bond]


def _by_cut(layout: Layout, factors: Sequence[Tensor], bond: int) -> Tensor:
    """The padded matrix, W[o o', i i'] = sum over r of L[o, i, r] R[r, o', i']."""
    (o_left, o_right), (i_left, i_right), rank = cut_at(layout, bond)
    left = contract(layout.factors[: bond + 1], (*o_left, *i_left, rank), factors[: bond + 1])
    right = contract(layout.factors[bond + 1 :], (rank, *o_right, *i_right), factors[bond + 1 :])
    sizes = [math.prod([layout.mode_sizes[n] for n in names]) for names in (o_left, i_left, o_right, i_right)]
    slices = factors[bond].shape[-1]  # Spelled out, since a rank of zero leaves nothing to find a size from.
    whole = product(left.reshape(sizes[0] * sizes[1], slices), right.reshape(slices, sizes[2] * sizes[3]))
    return whole.view(sizes).transpose(1, 2).reshape(layout.padded_shape)


def mixed(
    left: Float[Tensor, "p q"], right: Float[Tensor, "n q s"], bias: Float[Tensor, "p s"] | None = None
) -> Float[Tensor, "n p s"]:
    """left @ right[k] + bias for every k. Autograd alone would keep a gradient of `left` for each of them."""
    if right.shape[2] == 1:
        return product(right.squeeze(2), left.T, None if bias is None else bias.squeeze(1)).unsqueeze(2)
    if torch.is_autocast_enabled(right.device.type):
        dtype = torch.get_autocast_dtype(right.device.type)
        left, right, bias = left.to(dtype), right.to(dtype), None if bias is None else bias.to(dtype)
    value: Tensor = _Mixed.apply(left, right, bias)  # pyright: ignore
    return value


@dataclass(frozen=True)
class Mixing:
    """A contraction of a factor with a batch of tensors whose own axes come between the batch and theirs.

    By one large product they would come before the batch, and the whole result would have to be brought into order.

    Attributes:
        turned: Whether the batch stands first.
        left: The axes of the factor, its own first, the summed ones behind.
        right: Those of the batch, the summed ones first.
        summed: How many axes are summed over.
    """

    turned: bool
    left: tuple[int, ...]
    right: tuple[int, ...]
    summed: int

    def __call__(self, first: Tensor, second: Tensor, bias: Tensor | None) -> Tensor:
        """The result plus a bias, (*batch, own axes of the factor, own axes of the others)."""
        factor, many = (second, first) if self.turned else (first, second)
        batch = many.shape[: many.dim() - len(self.right)]
        a = factor.permute(self.left)
        b = many.reshape(math.prod(batch), *many.shape[len(batch) :]).permute(0, *self.right)
        own, others = a.shape[: a.dim() - self.summed], b.shape[1 + self.summed :]
        p, q, s = math.prod(own), math.prod(b.shape[1 : 1 + self.summed]), math.prod(others)
        bias = None if bias is None else bias.view(p, s)
        return mixed(a.reshape(p, q), b.reshape(len(b), q, s), bias).view(*batch, *own, *others)

    def pays(self, first: Tensor, second: Tensor) -> bool:
        """Whether it is faster: where products in a batch are as fast as large ones, and not too small."""
        factor, many = (second, first) if self.turned else (first, second)
        inner = math.prod([factor.shape[k] for k in self.left[-self.summed :]])
        p, each = factor.numel() // max(inner, 1), math.prod(many.shape[many.dim() - len(self.right) :])
        numbers = p * (each // max(inner, 1))
        large = numbers >= _WORTH_MIXING and many.numel() // max(each, 1) * numbers >= _MANY_MIXED
        return large and machine().slowness_of_batches <= _AS_FAST


# Numbers that each of a batch gives, and all of them, from which `Mixing` is faster than to bring the whole in order.
_WORTH_MIXING, _MANY_MIXED = 1 << 10, 1 << 18
_AS_FAST = 1.1


@lru_cache(maxsize=4096)
def mixing(equation: str) -> Mixing | None:
    """How a contraction of two tensors mixes the axes of one of them with those of a batch; None if it does not."""
    names, kept = equation.replace(BATCH, ".").split("->")
    if names.count(",") != 1:
        return None
    first, second = names.split(",")
    turned = first.startswith(".")
    factor, many = (second, first) if turned else (first, second)
    summed = [n for n in factor if n in many]
    own, others = [n for n in kept if n in factor], [n for n in kept[1:] if n in many]
    if not (many.startswith(".") and "." not in factor and summed and own and others):
        return None
    if list(kept) != [".", *own, *others] or len(factor) + len(many) != len(kept) + 2 * len(summed):
        return None
    left = tuple(map(factor.index, [*own, *summed]))
    return Mixing(turned, left, tuple(map(many.index, [*summed, *others])), len(summed))


def effort_of_mixed(n: int, p: int, q: int, s: int) -> int:
    """How many operations of one large product take as long as `mixed` on these sizes."""
    flops = 2 * n * p * q * s
    if s == 1:
        return flops
    return round(machine().slowness_of_batches * flops * (1 + NARROW / max(s, 1))) + machine().flops_per_call * n


_WORTH_A_CALL = 90_000  # Operations of a product from which to call it takes no longer than to copy for a larger one.


class _Mixed(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        many = left.expand(len(right), *left.shape)
        return torch.bmm(many, right) if bias is None else torch.baddbmm(bias, many, right)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:  # noqa: ANN401  autograd's
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401  # pyright: ignore
        left, right = ctx.saved_tensors
        of_left = of_right = of_bias = None
        if ctx.needs_input_grad[0]:
            of_left = _summed_products(gradient, right)
        if ctx.needs_input_grad[1]:
            of_right = torch.bmm(left.T.expand(len(right), *left.T.shape), gradient)
        if ctx.needs_input_grad[2]:
            of_bias = sum_of_rows(gradient.reshape(len(gradient), -1)).view(gradient.shape[1:])
        return of_left, of_right, of_bias


def _summed_products(a: Tensor, b: Tensor) -> Tensor:
    """The sum over i of a[i] @ b[i].T: one product of copies, unless each is large enough to be called alone.

    On a GPU, which makes as many calls of torch.addbmm one after the other, none is.
    """
    if a.device.type == "cpu" and 2 * a.shape[1] * a.shape[2] * b.shape[1] > _WORTH_A_CALL:
        return torch.addbmm(a.new_zeros(a.shape[1], b.shape[1]), a, b.transpose(1, 2))
    summed = a.shape[0] * a.shape[2]  # Spelled out, since a rank of zero leaves nothing to find it from.
    return product(a.transpose(0, 1).reshape(a.shape[1], summed), b.transpose(1, 2).reshape(summed, b.shape[1]))


def squared_norm(layout: Layout, factors: Sequence[Tensor]) -> Float[Tensor, ""]:
    """The sum of squares of the (padded) tensor, from the factors alone: the tensor is never formed."""
    bonds = set(layout.bonds)
    mirrored = tuple(tuple(f"{name}'" if name in bonds else name for name in axes) for axes in layout.factors)
    return contract((*layout.factors, *mirrored), (), (*factors, *factors))


def slice_norms(layout: Layout, factors: Sequence[Tensor], bond: str) -> Float[Tensor, " rank"]:
    """The Frobenius norm of what each slice of a bond adds to the (padded) tensor, from the factors alone.

    In the canonical form of a tensor train these are the singular values of its unfolding at that bond.
    """
    others = set(layout.bonds) - {bond}
    mirrored = tuple(tuple(f"{name}'" if name in others else name for name in axes) for axes in layout.factors)
    return contract((*layout.factors, *mirrored), (bond,), (*factors, *factors)).clamp_min(0).sqrt()
