# SPDX-License-Identifier: Apache-2.0
"""Convolution with a low-rank kernel: as a sequence of small convolutions, or by forming the kernel."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch.nn.functional as F
from torch import Tensor

from rankfall import _contract
from rankfall._einsum import Axes, contract, cost_of, planned_once, rounded, shapes_of
from rankfall._layout import Layout

Sizes: TypeAlias = tuple[int, ...]
_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
# A convolution that keeps channels apart reaches about this fraction of the speed of one that mixes them.
_SPEED_OF_GROUPS = 0.1


@dataclass(frozen=True)
class Geometry:
    """How a kernel moves over its input, one number per spatial dimension.

    Attributes:
        stride: Steps of the kernel.
        padding: What is added (before, after) each spatial dimension.
        dilation: Distance between the kernel's points.
        groups: Into how many parts the channels fall that do not see each other.
        padding_mode: What stands in the padding: "zeros", "reflect", "replicate" or "circular".
    """

    stride: Sizes
    padding: tuple[tuple[int, int], ...]
    dilation: Sizes
    groups: int
    padding_mode: str


@dataclass(frozen=True)
class ConvPlan:
    """The way in which one convolution is carried out.

    Attributes:
        maps_in: Whether a 1 x 1 convolution by the factors of in-channels comes first.
        maps_out: Whether a 1 x 1 convolution by the factors of out-channels comes last.
        flops: Multiplications and additions of all steps.
        dense_flops: Those of the dense layer.
    """

    maps_in: bool
    maps_out: bool
    flops: int
    dense_flops: int

    @property
    def forms_weight(self) -> bool:
        """Whether the whole kernel is formed."""
        return not (self.maps_in or self.maps_out)


@dataclass(frozen=True)
class Parts:
    """Factors before, inside and after the k x k convolution, and the bonds between.

    Attributes:
        inner: Factors of in-channels alone, by their index.
        core: Factors of the small kernel.
        outer: Factors of out-channels alone.
        shared: Bonds that run from `inner` to `outer`: channels that the small kernel keeps apart.
        entering: Other bonds from `inner`: its in-channels.
        leaving: Other bonds to `outer`: its out-channels.
    """

    inner: tuple[int, ...]
    core: tuple[int, ...]
    outer: tuple[int, ...]
    shared: Axes
    entering: Axes
    leaving: Axes


class SmallKernels(NamedTuple):
    """A convolution as a sequence: 1 x 1, k x k, 1 x 1.

    Attributes:
        before: The first, a matrix, (channels out, channels in); None if there is none.
        kernel: The second.
        groups: Groups of channels that the second keeps apart.
        after: The third, a matrix; None if there is none.
    """

    before: Tensor | None
    kernel: Tensor
    groups: int
    after: Tensor | None


@planned_once
def parts_of(layout: Layout, maps_in: bool, maps_out: bool) -> Parts | None:
    """Splits the factors; None where the format has no factors of channels alone, as a TT-matrix has none."""
    modes = set(layout.mode_sizes)

    def alone(axis: int) -> tuple[int, ...] | None:
        own = set(layout.axes[axis])
        found = tuple(k for k, axes in enumerate(layout.factors) if (held := modes & set(axes)) and held <= own)
        covered = {name for k in found for name in layout.factors[k]} & own
        return found if covered == own else None

    inner, outer = alone(1) if maps_in else (), alone(0) if maps_out else ()
    if inner is None or outer is None:
        return None
    core = tuple(k for k in range(len(layout.factors)) if k not in inner and k not in outer)

    def names(which: Sequence[int]) -> dict[str, None]:
        return dict.fromkeys(n for k in which for n in layout.factors[k] if n not in modes)

    entering = [n for n in names(inner) if n in names((*core, *outer))]
    leaving = [n for n in names(outer) if n in names((*core, *inner))]
    shared = tuple(n for n in entering if n in leaving)
    apart = set(shared)
    return Parts(
        inner,
        core,
        outer,
        shared,
        tuple(n for n in entering if n not in apart),
        tuple(n for n in leaving if n not in apart),
    )


@planned_once
def conv_plan(
    layout: Layout, ranks: tuple[tuple[str, int], ...], groups: int, points_in: int, points_out: int
) -> ConvPlan:
    """The cheapest way to convolve: one of four, with and without a map of channels before and after.

    Args:
        layout: A layout with the axes of torch's kernel: out-channels, in-channels of a group, spatial dimensions.
        ranks: (bond, rank) of every bond.
        groups: As in Geometry; more than one always forms the kernel.
        points_in: Batch times spatial positions of the input.
        points_out: The same of the output.
    """
    sizes = layout.mode_sizes | dict(ranks)
    out_channels, in_channels, *kernel = layout.shape
    area = math.prod(kernel)
    dense = 2 * points_out * out_channels * in_channels * area
    shapes = layout.factor_shapes(dict(ranks))
    formed = _contract.dense_plan(layout, shapes)
    best, least = ConvPlan(False, False, dense + formed.flops, dense), dense + formed.cost
    if groups > 1 or 0 in dict(ranks).values():
        return best
    for maps_in, maps_out in ((True, False), (False, True), (True, True)):
        parts = parts_of(layout, maps_in, maps_out)
        if parts is None:
            continue
        apart, entering, leaving = (
            math.prod([sizes[n] for n in axes]) for axes in (parts.shared, parts.entering, parts.leaving)
        )
        wide_in = apart * entering if maps_in else in_channels
        wide_out = apart * leaving if maps_out else out_channels
        first = 2 * points_in * in_channels * wide_in if maps_in else 0
        last = 2 * points_out * out_channels * wide_out if maps_out else 0
        middle = 2 * points_out * wide_in * wide_out // apart * area
        moved = 2 * (points_in * wide_in * maps_in + points_out * wide_out * maps_out)
        cost = first + last + (middle if apart == 1 else round(middle / _SPEED_OF_GROUPS)) + cost_of(0, moved)
        if cost < least:
            best, least = ConvPlan(maps_in, maps_out, first + middle + last, dense), cost
    return best


def convolve(layout: Layout, factors: Sequence[Tensor], x: Tensor, geometry: Geometry) -> Tensor:
    """The convolution of torch's functions of that name with the kernel that the factors stand for, without bias.

    Args:
        layout: A layout with the axes of torch's kernel.
        factors: The factors, at today's ranks.
        x: Shape (batch, channels, *spatial).
        geometry: How the kernel moves.
    """
    ranks = tuple(layout.ranks(shapes_of(factors)).items())
    points_in = rounded(x.shape[0] * math.prod(x.shape[2:]))
    points_out = rounded(points_in // math.prod(geometry.stride))
    plan = conv_plan(layout, ranks, geometry.groups, points_in, points_out)
    return convolve_by(layout, factors, x, geometry, (plan.maps_in, plan.maps_out))


def convolve_by(
    layout: Layout, factors: Sequence[Tensor], x: Tensor, geometry: Geometry, maps: tuple[bool, bool]
) -> Tensor:
    """The same in a given way: whether maps of channels come (before, after) the convolution proper."""
    if not any(maps):
        return _slide(x, _contract.dense(layout, factors), geometry, geometry.groups)
    small = small_kernels(layout, factors, maps)
    x = x if small.before is None else _map_channels(x, small.before)
    x = _slide(x, small.kernel, geometry, small.groups)
    return x if small.after is None else _map_channels(x, small.after)


def small_kernels(layout: Layout, factors: Sequence[Tensor], maps: tuple[bool, bool]) -> SmallKernels:
    """What a convolution by the given maps of channels multiplies with."""
    out_channels, in_channels = layout.shape[:2]
    parts = parts_of(layout, *maps)
    assert parts is not None, "conv_plan names only ways that the format has"
    before = after = None
    if parts.inner:
        axes = (*parts.shared, *parts.entering, *layout.axes[1])
        before = _of(layout, factors, parts.inner, axes, len(layout.axes[1]))[:, :in_channels]
    if parts.outer:
        axes = (*parts.shared, *parts.leaving, *layout.axes[0])
        after = _of(layout, factors, parts.outer, axes, len(layout.axes[0]))[:, :out_channels].T
    groups = _size(layout, factors, parts.shared)
    return SmallKernels(before, _small_kernel(layout, factors, parts), groups, after)


def _size(layout: Layout, factors: Sequence[Tensor], names: Axes) -> int:
    ranks = layout.ranks(shapes_of(factors))
    return math.prod([ranks[n] for n in names])


def _of(layout: Layout, factors: Sequence[Tensor], which: Sequence[int], axes: Axes, modes: int) -> Tensor:
    """Some factors contracted to a matrix: bonds by channels."""
    joined = contract([layout.factors[k] for k in which], axes, [factors[k] for k in which])
    return joined.flatten(len(axes) - modes).flatten(0, -2)


def _map_channels(x: Tensor, matrix: Tensor) -> Tensor:
    dims = x.dim() - 2
    return _CONVOLUTIONS[dims](x, matrix.reshape(*matrix.shape, *[1] * dims))


def _small_kernel(layout: Layout, factors: Sequence[Tensor], parts: Parts) -> Tensor:
    """The kernel between the maps, shape (shared x leaving, entering, *kernel); channels stand where no map is."""
    out_axes = parts.leaving if parts.outer else layout.axes[0]
    in_axes = parts.entering if parts.inner else layout.axes[1]
    held = {n for k in parts.core for n in layout.factors[k]}
    shared = tuple(n for n in parts.shared if n in held)
    spatial = layout.axes[2:]
    axes = (*shared, *out_axes, *in_axes, *(n for names in spatial for n in names))
    kernel = contract([layout.factors[k] for k in parts.core], axes, [factors[k] for k in parts.core])
    sizes = layout.mode_sizes | layout.ranks(shapes_of(factors))
    inside = (math.prod([sizes[n] for n in out_axes]), math.prod([sizes[n] for n in in_axes]), *layout.padded_shape[2:])
    # A bond that passes the kernel by, from one map to the other, has the same kernel for each of its slices.
    kernel = kernel.reshape(*[sizes[n] if n in held else 1 for n in parts.shared], *inside)
    kernel = kernel.expand(*[sizes[n] for n in parts.shared], *inside)
    kernel = kernel.reshape(math.prod(kernel.shape[: len(parts.shared) + 1]), *inside[1:])
    channels = (
        kernel.shape[0] if parts.outer else layout.shape[0],
        kernel.shape[1] if parts.inner else layout.shape[1],
    )
    return kernel[tuple(slice(n) for n in (*channels, *layout.shape[2:]))]


def _slide(x: Tensor, kernel: Tensor, geometry: Geometry, groups: int) -> Tensor:
    padding: list[int] | int = [before for before, _ in geometry.padding]
    if geometry.padding_mode != "zeros" or any(before != after for before, after in geometry.padding):
        sides = [n for pair in reversed(geometry.padding) for n in pair]
        mode = "constant" if geometry.padding_mode == "zeros" else geometry.padding_mode
        x, padding = F.pad(x, sides, mode=mode), 0
    return _CONVOLUTIONS[x.dim() - 2](x, kernel, None, geometry.stride, padding, geometry.dilation, groups)
