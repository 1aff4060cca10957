# SPDX-License-Identifier: Apache-2.0
"""KL(q || p) of a set of factors, and the moments that the prior scales are found from."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.autograd.function import FunctionCtx

from rankfall._layout import Layout
from rankfall._priors import Prior, kl_of_moments

CORE_STD = 10.0  # Prior standard deviation of the Tucker core (arXiv 2010.08689).


def wide(tensor: Tensor) -> Tensor:
    """The tensor in float32 at least."""
    return tensor if tensor.dtype.itemsize >= 4 else tensor.float()


def second_moments(means: Sequence[Tensor], log_stds: Sequence[Tensor] = ()) -> list[Tensor]:
    """mean^2 + std^2 of every entry; without `log_stds` as if std were 0."""
    squares = [wide(mean).square() for mean in means]
    if not log_stds:
        return squares
    return [s + (2 * wide(log_std)).exp() for s, log_std in zip(squares, log_stds, strict=True)]


def per_slice(squares: Sequence[Tensor], places: Sequence[tuple[int, int]]) -> Tensor:
    """The sum over each slice of the factors at the given (factor, dimension) pairs, shape (rank,)."""
    total = None
    for k, dim in places:
        part = squares[k].sum([d for d in range(squares[k].dim()) if d != dim])
        total = part if total is None else total + part
    assert total is not None, "a bond governs something"
    return total


def governed_moments(layout: Layout, squares: Sequence[Tensor]) -> dict[str, tuple[Tensor, int]]:
    """For each bond the second moment of every slice, and the number of entries that a slice governs."""
    out = {}
    for bond, places in layout.governs:
        count = sum(squares[k].numel() // max(squares[k].shape[dim], 1) for k, dim in places)
        out[bond] = (per_slice(squares, places), count)
    return out


class Factors(NamedTuple):
    """The posterior of one tensor: its layout, the means and the log standard deviations, if it has any."""

    layout: Layout
    means: Sequence[Tensor]
    log_stds: Sequence[Tensor] = ()


def kl_of_factors(prior: Prior, tensors: Sequence[Factors], *, hyperprior: bool = True) -> Tensor:
    """KL(q || p) at the best prior scales, in nats, with -log p(s) of the scales or without; see `LowRankTensor.kl`.

    All tensors have the same prior, are on one device and of one type, and all or none have standard deviations.
    """
    flat, parameters = joined_factors(tensors)
    with torch.autocast(parameters[0].device.type, enabled=False):
        if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
            # torch.func has no use for a gradient in closed form.
            return _followed_value(flat, prior, hyperprior, parameters)
        value: Tensor = _Divergence.apply(flat, prior, hyperprior, *parameters)  # pyright: ignore
    return value


def draw_with_kl(prior: Prior, tensors: Sequence[Factors]) -> tuple[Tensor, list[list[Tensor]]]:
    """(`kl_of_factors`, a draw of the factors of each tensor), for tensors with standard deviations.

    One call for all layers, in which the draws and the KL share what both need, and one backward.
    """
    flat, parameters = joined_factors(tensors)
    with torch.autocast(parameters[0].device.type, enabled=False):
        value, *draws = _Draw.apply(flat, prior, *parameters)  # pyright: ignore
    return value, arranged(draws, flat, tensors)


def arranged(values: Sequence[Tensor], flat: "Flat", tensors: Sequence[Factors]) -> list[list[Tensor]]:
    """What there is for each factor in the order of the buffer, as the factors of each tensor come."""
    found = dict(zip(flat.order, values, strict=True))
    return [[found[k, factor] for factor in range(len(t.means))] for k, t in enumerate(tensors)]


def joined_factors(tensors: Sequence[Factors]) -> tuple["Flat", list[Tensor]]:
    """How the factors lie in one buffer, and all means in that order, then all log standard deviations."""
    first = tensors[0].means[0]
    shapes = tuple((t.layout, tuple(mean.shape for mean in t.means)) for t in tensors)
    flat = flat_of(shapes, first.device, wide(first.new_empty(0)).dtype)
    means = [tensors[k].means[factor] for k, factor in flat.order]
    return flat, means + ([tensors[k].log_stds[factor] for k, factor in flat.order] if tensors[0].log_stds else [])


def unflattened(flat: Tensor, like: Sequence[Tensor]) -> Sequence[Tensor]:
    """Views of one buffer in the shapes of tensors."""
    views = _unflatten_dense_tensors(flat, like)
    if all(map(Tensor.numel, like)):
        return views
    # From earlier versions of torch one without entries comes in another shape.
    return [view.view_as(tensor) for view, tensor in zip(views, like, strict=True)]


class _Divergence(torch.autograd.Function):
    """The KL with its gradient in closed form: mean / s^2, and std^2 / s^2 - 1 for a log std.

    All factors lie in one flat buffer: autograd would record some thirty small operations a factor, at every step. The
    scales s are held fixed in the gradient: at their optimum, and where they rest on their lower bound, the partial
    gradient is the total one. A gradient that is to be differentiated again is left to autograd, scales and all.
    """

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: FunctionCtx, flat: "Flat", prior: Prior, hyperprior: bool, *parameters: Tensor
    ) -> Tensor:
        mean, log_std = flat.joined(parameters)
        std = None if log_std is None else log_std.exp()
        value, partials = _bound(flat, prior, mean, log_std, std, hyperprior=hyperprior)
        ctx.save_for_backward(*partials, *parameters)
        ctx.of = flat, prior, hyperprior, len(partials)  # pyright: ignore[reportAttributeAccessIssue]
        return value

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        flat, prior, hyperprior, count = ctx.of  # pyright: ignore[reportAttributeAccessIssue]
        saved = ctx.saved_tensors  # pyright: ignore[reportAttributeAccessIssue]
        partials, parameters = saved[:count], saved[count:]
        if torch.is_grad_enabled():
            value = _followed_value(flat, prior, hyperprior, parameters)
            return None, None, None, *_followed([value], [gradient], parameters)
        found = torch.cat([gradient * partial for partial in partials])
        return (None, None, None, *unflattened(found, parameters))


def _followed_value(flat: "Flat", prior: Prior, hyperprior: bool, parameters: Sequence[Tensor]) -> Tensor:
    """The KL, every operation of which is left to autograd."""
    mean, log_std = flat.joined(parameters)
    std = None if log_std is None else log_std.exp()
    return _bound(flat, prior, mean, log_std, std, hyperprior=hyperprior)[0]


class _Draw(torch.autograd.Function):
    """The KL as `_Divergence` has it, and mean + std * noise of every factor."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: FunctionCtx, flat: "Flat", prior: Prior, *parameters: Tensor
    ) -> tuple[Tensor, ...]:
        mean, log_std = flat.joined(parameters)
        assert log_std is not None, "a draw needs standard deviations"
        std = log_std.exp()
        value, partials = _bound(flat, prior, mean, log_std, std, hyperprior=True)
        away = torch.randn_like(std).mul_(std)
        ctx.save_for_backward(away, *partials, *parameters)
        ctx.of = flat, prior  # pyright: ignore[reportAttributeAccessIssue]
        drawn = (mean + away).to(parameters[0].dtype)
        return value, *unflattened(drawn, parameters[: len(flat.order)])

    @staticmethod
    def backward(ctx: FunctionCtx, of_kl: Tensor, *of_draws: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        flat, prior = ctx.of  # pyright: ignore[reportAttributeAccessIssue]
        away, of_mean, of_log_std, *parameters = ctx.saved_tensors  # pyright: ignore[reportAttributeAccessIssue]
        if torch.is_grad_enabled():
            return None, None, *followed_draw(flat, prior, parameters, away, [of_kl, *of_draws])
        of_draw = _flatten_dense_tensors(of_draws).to(away.dtype)
        parts = torch.addcmul(of_draw, of_mean, of_kl), torch.addcmul(of_draw * away, of_log_std, of_kl)
        found = torch.cat(parts)
        return (None, None, *unflattened(found, parameters))


def followed_draw(
    flat: "Flat", prior: Prior, parameters: Sequence[Tensor], away: Tensor, gradients: Sequence[Tensor]
) -> list[Tensor | None]:
    """Gradients, that can be differentiated again, of the KL and of a draw that is so far from the means."""
    mean, log_std = flat.joined(parameters)
    assert log_std is not None, "a draw needs standard deviations"
    value, _ = _bound(flat, prior, mean, log_std, log_std.exp(), hyperprior=True)
    drawn = (mean + away * (log_std - log_std.detach()).exp()).to(parameters[0].dtype)
    outputs = [value, *unflattened(drawn, parameters[: len(flat.order)])]
    return _followed(outputs, gradients, parameters)


def _followed(
    outputs: Sequence[Tensor], gradients: Sequence[Tensor], parameters: Sequence[Tensor]
) -> list[Tensor | None]:
    """Gradients of parameters that can be differentiated again."""
    wanted = [p for p in parameters if p.requires_grad]
    pairs = [(output, its) for output, its in zip(outputs, gradients, strict=True) if output.requires_grad]
    outputs, gradients = zip(*pairs, strict=True)  # A draw without entries has no graph.
    found = iter(torch.autograd.grad(outputs, wanted, gradients, create_graph=True))
    return [next(found) if p.requires_grad else None for p in parameters]


def _bound(
    flat: "Flat", prior: Prior, mean: Tensor, log_std: Tensor | None, std: Tensor | None, *, hyperprior: bool
) -> tuple[Tensor, list[Tensor]]:
    """The KL of all factors, and its gradient in `mean` and `log_std`."""
    squares = mean.square()
    variance = None if std is None else std.square()
    moments, core, _ = flat.moments(squares if variance is None else squares.add_(variance)).split(flat.kinds)
    value, scales = kl_of_moments(prior, moments, flat.counts, hyperprior=hyperprior)
    if flat.core_entries:
        value = value + 0.5 * core.sum() / CORE_STD**2 + flat.core_entries * math.log(CORE_STD)
    precision = flat.spread(torch.cat([scales.reciprocal(), flat.other_precisions]), len(mean))
    if variance is None or log_std is None:
        return value, [precision.mul_(mean)]
    value = value - log_std.sum() - 0.5 * len(log_std)
    return value, [mean * precision, variance.mul_(precision).sub_(1)]


# A sum of its own costs a few microseconds whatever the size, a scattered one a few nanoseconds an entry.
_SMALL = 2048
# Beyond, the slices of a factor are not written down entry by entry: that would take as much memory as the factor.
_LARGE = 16_384


class Place(NamedTuple):
    """Where a factor lies in the flat buffer, its shape as (before, rank, after), and the number of its first slice."""

    start: int
    shape: tuple[int, int, int]
    first: int

    @property
    def entries(self) -> slice:
        """Its part of the buffer."""
        return slice(self.start, self.start + math.prod(self.shape))

    @property
    def slices(self) -> slice:
        """Its part of the slices."""
        return slice(self.first, self.first + self.shape[1])


@dataclass(frozen=True)
class Flat:
    """How the factors of several tensors lie in one flat buffer, small ones first, and which slice an entry is of.

    Slices of all bonds are numbered through; two more numbers follow, of the entries of Tucker cores, and of those that
    nothing governs.

    Attributes:
        order: (tensor, factor) by its place in the buffer.
        slices: The number of the slice of each entry, for all factors but the large ones.
        counts: How many entries each slice governs.
        small: The size of the first part of the buffer, which is summed entry by entry.
        places: Each factor: where it begins, its shape as (before, rank, after), its first slice.
        others: Those after the first part.
        other_precisions: 1 / s^2 of the last two numbers.
        core_entries: How many entries cores have.
    """

    order: tuple[tuple[int, int], ...]
    slices: Tensor
    counts: Tensor
    small: int
    places: tuple["Place", ...]
    others: tuple["Place", ...]
    other_precisions: Tensor
    core_entries: int

    @property
    def kinds(self) -> tuple[int, int, int]:
        """How many numbers of slices there are, of cores, and of what nothing governs."""
        return len(self.counts), 1, 1

    def joined(self, parameters: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """Means and log standard deviations, if there are any, each in one buffer of the type that is computed in."""
        joined = _flatten_dense_tensors(parameters).to(self.counts.dtype)
        if len(parameters) == len(self.order):
            return joined, None
        mean, log_std = joined.chunk(2)
        return mean, log_std

    def moments(self, squares: Tensor) -> Tensor:
        """The sum over each slice."""
        total = squares.new_zeros(len(self.counts) + 2)
        total.index_add_(0, self.slices[: self.small], squares[: self.small])
        for place in self.others:
            total[place.slices].add_(squares[place.entries].view(place.shape).sum((0, 2)))
        return total

    def spread(self, of_slices: Tensor, entries: int) -> Tensor:
        """The number of its slice for each of so many entries."""
        known = of_slices.index_select(0, self.slices)
        if len(known) == entries:
            return known
        out = of_slices.new_empty(entries)
        out[: len(known)] = known
        for place in self.others:
            if place.start >= len(known):
                out[place.entries].view(place.shape).copy_(of_slices[place.slices].unsqueeze(1))
        return out


_Shapes: TypeAlias = tuple[tuple[Layout, tuple[torch.Size, ...]], ...]


@lru_cache(maxsize=32)
@torch.inference_mode(mode=False)  # What is kept may be needed where gradients are.
def flat_of(tensors: _Shapes, device: torch.device, dtype: torch.dtype) -> Flat:
    """Made once for today's ranks, since that waits for the device."""
    counts: list[int] = []
    first_slice: dict[tuple[int, int], tuple[int, int]] = {}  # (tensor, factor): (dimension, number of its first slice)
    for k, (layout, shapes) in enumerate(tensors):
        for _, places in layout.governs:
            count = sum(shapes[factor].numel() // max(shapes[factor][dim], 1) for factor, dim in places)
            if count:
                first_slice |= {(k, factor): (dim, len(counts)) for factor, dim in places}
                counts += [count] * shapes[places[0][0]][places[0][1]]
    places = [(k, factor) for k, (_, shapes) in enumerate(tensors) for factor in range(len(shapes))]
    order = sorted(places, key=lambda place: _size_class(tensors[place[0]][1][place[1]].numel()))
    start, small, core_entries, placed = 0, 0, 0, []
    numbers = [torch.zeros(0, dtype=torch.int32, device="cpu")]
    for k, factor in order:
        layout, shapes = tensors[k]
        shape, is_core = shapes[factor], layout.core == factor
        first, viewed = _slices_of(shape, first_slice.get((k, factor)), len(counts) + (0 if is_core else 1))
        core_entries += shape.numel() if is_core else 0
        if _size_class(shape.numel()) < 2:
            of_slices = torch.arange(first, first + viewed[1], dtype=torch.int32, device="cpu")
            numbers.append(of_slices.view(1, -1, 1).expand(viewed).reshape(-1))
        if _size_class(shape.numel()) == 0:
            small += shape.numel()
        placed.append(Place(start, viewed, first))
        start += shape.numel()
    return Flat(
        tuple(order),
        torch.cat(numbers).to(device),
        torch.tensor(counts, device=device, dtype=dtype),
        small,
        tuple(placed),
        tuple(place for place in placed if _size_class(math.prod(place.shape)) > 0),
        torch.tensor([CORE_STD**-2, 0.0], device=device, dtype=dtype),
        core_entries,
    )


def _size_class(entries: int) -> int:
    return (entries >= _SMALL) + (entries >= _LARGE)


def _slices_of(shape: torch.Size, governed: tuple[int, int] | None, otherwise: int) -> tuple[int, tuple[int, int, int]]:
    """The number of a factor's first slice, and its shape as (before, rank, after)."""
    if governed is None:
        return otherwise, (1, 1, shape.numel())
    dim, first = governed
    return first, (math.prod(shape[:dim]), shape[dim], math.prod(shape[dim + 1 :]))
