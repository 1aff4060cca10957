# SPDX-License-Identifier: Apache-2.0
"""What is done with a low-rank weight, once for all formats: form it, apply it as a matrix, measure it."""

from collections.abc import Sequence

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from rankfall._einsum import BATCH, Axes, Plan, contract, plan, run
from rankfall._formats import Layout


def _flat_modes(layout: Layout) -> Axes:
    return tuple(name for axes in layout.axes for name in axes)


def dense_plan(layout: Layout, shapes: Sequence[Sequence[int]]) -> Plan:
    """The order in which `dense` contracts factors of these shapes."""
    sizes = layout.mode_sizes | layout.ranks(shapes)
    return plan(layout.factors, _flat_modes(layout), tuple(sizes.items()))


def dense(layout: Layout, factors: Sequence[Tensor]) -> Float[Tensor, "*shape"]:
    """The tensor that the factors stand for, of the shape its user gave: padding is cut off."""
    padded = run(dense_plan(layout, [f.shape for f in factors]), factors).reshape(layout.padded_shape)
    if layout.padded_shape == layout.shape:
        return padded
    return padded[tuple(slice(n) for n in layout.shape)]


def linear_plan(layout: Layout, shapes: Sequence[Sequence[int]], rows: int) -> Plan:
    """The cheapest way to multiply `rows` vectors by a matrix in factors: form the matrix, or never do.

    One search covers all ways: factors first and x last is the formed matrix; out-factors and in-factors apart is a
    product of two thin matrices; x first is factor by factor.

    Args:
        layout: A layout with two axes.
        shapes: The shapes of the factors, at today's ranks.
        rows: The number of vectors; rounded up to a power of two, so that few plans are made.
    """
    out_names, in_names = layout.axes
    sizes = layout.mode_sizes | layout.ranks(shapes) | {BATCH: 1 << (max(rows, 1) - 1).bit_length()}
    return plan(((BATCH, *in_names), *layout.factors), (BATCH, *out_names), tuple(sizes.items()))


def linear(
    layout: Layout, factors: Sequence[Tensor], x: Float[Tensor, "*batch in_features"]
) -> Float[Tensor, "*batch out_features"]:
    """X @ dense().T, in the order that `linear_plan` finds."""
    out_modes, in_modes = layout.modes
    (out_features, in_features), (padded_out, padded_in) = layout.shape, layout.padded_shape
    rows = x.numel() // in_features
    steps = linear_plan(layout, [f.shape for f in factors], rows)
    if padded_in > in_features:
        x = F.pad(x, (0, padded_in - in_features))
    y = run(steps, [x.unflatten(-1, in_modes), *factors]).flatten(-len(out_modes))
    return y[..., :out_features] if padded_out > out_features else y


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
