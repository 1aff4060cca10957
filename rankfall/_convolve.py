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
from rankfall._machine import machine

Sizes: TypeAlias = tuple[int, ...]
_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
# Measured by benchmarks/planner_convs.py. Convolutions that keep channels apart take so many times as long for an
# operation: single channels, or small groups of them.
_SLOWER_ALONE, _SLOWER_IN_GROUPS = 5, 60
_BLOCK = 8  # Channels stand in blocks of so many, of which the last is filled up.
_NARROW = 2  # So many channels more are as if they were there, on either side.
_COPIES = 1.7  # Numbers are also brought into blocks and back.


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
    """One way to carry out a convolution.

    Attributes:
        maps_in: Whether a 1 x 1 convolution by the factors of in-channels comes first.
        maps_out: Whether a 1 x 1 convolution by the factors of out-channels comes last.
        flops: Multiplications and additions of all steps.
        cost: Time, in floating-point operations.
    """

    maps_in: bool
    maps_out: bool
    flops: int
    cost: int

    @property
    def forms_weight(self) -> bool:
        """Whether the whole kernel is formed."""
        return not (self.maps_in or self.maps_out)

    def described(self) -> str:
        """The way in words."""
        maps = " and ".join(word for word, is_there in (("before", self.maps_in), ("after", self.maps_out)) if is_there)
        return f"by 1 x 1 convolutions {maps} a small one" if maps else "by the formed kernel"


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
    """The cheapest way to convolve; see `conv_ways`."""
    return min(conv_ways(layout, ranks, groups, points_in, points_out), key=lambda way: way.cost)


def plan_of_points(layout: Layout, ranks: tuple[tuple[str, int], ...], geometry: Geometry, points_in: int) -> ConvPlan:
    """What `convolve` does with so many points: chosen for a rounded number of them, counted for the true one."""
    chosen = _chosen(layout, ranks, geometry, points_in)
    points_out = points_in // math.prod(geometry.stride)
    ways = conv_ways(layout, ranks, geometry.groups, points_in, points_out)
    return next(way for way in ways if (way.maps_in, way.maps_out) == (chosen.maps_in, chosen.maps_out))


def _chosen(layout: Layout, ranks: tuple[tuple[str, int], ...], geometry: Geometry, points_in: int) -> ConvPlan:
    points_in = rounded(points_in)
    points_out = rounded(points_in // math.prod(geometry.stride))
    return conv_plan(layout, ranks, geometry.groups, points_in, points_out)


def conv_ways(
    layout: Layout, ranks: tuple[tuple[str, int], ...], groups: int, points_in: int, points_out: int
) -> list[ConvPlan]:
    """All ways that a layout has: with and without a map of channels before and after.

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
    formed = _contract.dense_plan(layout, layout.factor_shapes(dict(ranks)))
    flops = 2 * points_out * out_channels * in_channels * area + formed.flops
    ways = [ConvPlan(False, False, flops, _dense_cost(layout, groups, points_in, points_out) + formed.cost)]
    if groups > 1 or 0 in dict(ranks).values():
        return ways
    for maps_in, maps_out in ((True, False), (False, True), (True, True)):
        parts = parts_of(layout, maps_in, maps_out)
        if parts is None:
            continue
        apart, entering, leaving = (
            math.prod([sizes[n] for n in axes]) for axes in (parts.shared, parts.entering, parts.leaving)
        )
        wide_in = apart * entering if maps_in else in_channels
        wide_out = apart * leaving if maps_out else out_channels
        slid = [_Slide(points_out, wide_in, wide_out, apart, area)]
        slid += [_Slide(points_in, in_channels, wide_in)] if maps_in else []
        slid += [_Slide(points_out, wide_out, out_channels)] if maps_out else []
        moved = points_in * (in_channels + 2 * wide_in * maps_in)
        moved += points_out * (out_channels + 2 * wide_out * maps_out)
        cost = cost_of(round(sum(one.effort for one in slid)), round(_COPIES * moved))
        ways.append(ConvPlan(maps_in, maps_out, sum(one.flops for one in slid), cost))
    return ways


class _Slide(NamedTuple):
    """One convolution of a sequence: points of its output, channels in and out, groups, and points of its kernel."""

    points: int
    wide_in: int
    wide_out: int
    groups: int = 1
    area: int = 1

    @property
    def flops(self) -> int:
        return 2 * self.points * self.wide_in * self.wide_out // self.groups * self.area

    @property
    def effort(self) -> float:
        """Operations of one large matrix product that take as long."""
        slowness = machine().slowness_of_convolutions
        if self.groups > 1:
            alone = self.wide_in == self.wide_out == self.groups
            return slowness * self.flops * (_SLOWER_ALONE if alone else _SLOWER_IN_GROUPS)
        blocks = [-(-n // _BLOCK) * _BLOCK + _NARROW for n in (self.wide_in, self.wide_out)]
        return slowness * 2 * self.points * self.area * math.prod(blocks)


def dense_conv_cost(layout: Layout, geometry: Geometry, points_in: int) -> int:
    """The time of the dense layer, in floating-point operations."""
    return _dense_cost(layout, geometry.groups, points_in, points_in // math.prod(geometry.stride))


def _dense_cost(layout: Layout, groups: int, points_in: int, points_out: int) -> int:
    out_channels, in_channels, *kernel = layout.shape
    slid = _Slide(points_out, in_channels * groups, out_channels, groups, math.prod(kernel))
    return cost_of(round(slid.effort), round(_COPIES * (points_in * slid.wide_in + points_out * out_channels)))


def convolve(layout: Layout, factors: Sequence[Tensor], x: Tensor, geometry: Geometry) -> Tensor:
    """The convolution of torch's functions of that name with the kernel that the factors stand for, without bias.

    Args:
        layout: A layout with the axes of torch's kernel.
        factors: The factors, at today's ranks.
        x: Shape (batch, channels, *spatial).
        geometry: How the kernel moves.
    """
    ranks = tuple(layout.ranks(shapes_of(factors)).items())
    plan = _chosen(layout, ranks, geometry, x.shape[0] * math.prod(x.shape[2:]))
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
