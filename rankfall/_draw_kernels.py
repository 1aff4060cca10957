# SPDX-License-Identifier: Apache-2.0
"""A draw of many factors with their KL on a GPU: two Triton kernels, and one for their gradients.

Imported only where they run. By calls of torch it is some forty kernels, each of which takes longer to begin than to
compute. Entries of a slice are worked on in chunks; what a chunk adds up, a second kernel adds up for its slice.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._utils import _flatten_dense_tensors

from rankfall._divergence import (
    CORE_STD,
    Factors,
    Flat,
    arranged,
    draw_with_kl,
    followed_draw,
    joined_factors,
    kl_of_factors,
    unflattened,
)
from rankfall._formats import TT
from rankfall._priors import MIN_SCALE, HalfCauchy, LogUniform, Prior

_CHUNK = 1024  # Entries that a program works on.
_MANY = 128  # Chunks whose sums a program reads at once.
_MOST = 1 << 28  # Entries: places are numbers of 32 bits.


@triton.jit
def _own_entries(chunks, CHUNK: tl.constexpr):
    """Where the entries of this program's chunk stand, and which of them there are."""
    own = chunks + 6 * tl.program_id(0)
    start, first, end = tl.load(own), tl.load(own + 1), tl.load(own + 2)
    after, apart = tl.load(own + 3), tl.load(own + 4)
    entry = first + tl.arange(0, CHUNK)
    return start + entry // after * apart + entry % after, entry < end


@triton.jit
def draw_kernel(joined, drawn, seed, chunks, sums, entries, CHUNK: tl.constexpr):
    """drawn = mean + std noise for a chunk of a slice, and its sums of mean^2 + std^2 and of log std."""
    at, inside = _own_entries(chunks, CHUNK)  # pyright: ignore[reportGeneralTypeIssues]
    mean = tl.load(joined + at, mask=inside, other=0.0)
    log_std = tl.load(joined + entries + at, mask=inside, other=0.0)
    std = tl.exp(log_std)
    tl.store(drawn + at, mean + std * tl.randn(tl.load(seed), at), mask=inside)
    to = sums + 2 * tl.program_id(0)
    tl.store(to, tl.sum(tl.where(inside, mean * mean + std * std, 0.0), 0))
    tl.store(to + 1, tl.sum(log_std, 0))


@triton.jit
def scale_kernel(
    sums, chunk_of, most, counts, held, constants, precisions, values, scale, LEAST: tl.constexpr, MANY: tl.constexpr
):
    """1 / s^2 of a slice, and its part of the KL: at the best scale s, or at that which is held, if it is not below 0.

    The scale is that of the half-Cauchy prior, or 0 for the log-uniform one.
    """
    own = tl.program_id(0)
    first, end = tl.load(chunk_of + own), tl.load(chunk_of + own + 1)
    moments = tl.zeros((MANY,), tl.float32)
    logs = tl.zeros((MANY,), tl.float32)
    for k in range(0, most, MANY):
        chunk = first + k + tl.arange(0, MANY)
        moments += tl.load(sums + 2 * chunk, mask=chunk < end, other=0.0)
        logs += tl.load(sums + 2 * chunk + 1, mask=chunk < end, other=0.0)
    moment, count, precision = tl.sum(moments, 0), tl.load(counts + own), tl.load(held + own)
    value = 0.5 * moment * precision
    if precision < 0:
        if scale > 0:
            e = scale * scale
            b = moment - count * e
            root = tl.sqrt(b * b + 4 * (count + 2) * e * moment)
            # Either form alone cancels on one side of b = 0.
            variance = tl.where(b > 0, (b + root) / (2 * (count + 2)), 2 * e * moment / tl.maximum(root - b, 2e-38))
            variance = tl.maximum(variance, LEAST, propagate_nan=tl.PropagateNan.ALL)
            penalty = tl.log(1 + variance / e)
        else:
            variance = tl.maximum(moment / (count + 1), LEAST, propagate_nan=tl.PropagateNan.ALL)
            penalty = 0.5 * tl.log(variance)
        precision = 1 / variance
        value = 0.5 * (moment * precision + count * tl.log(variance)) + penalty
    tl.store(precisions + own, precision)
    tl.store(values + own, value - tl.sum(logs, 0) + tl.load(constants + own))


@triton.jit
def gradients_kernel(joined, of_draw, of_kl, seed, chunks, precisions, out, entries, CHUNK: tl.constexpr):
    """Of means, then of log standard deviations: what the gradients of a draw and its KL say of a chunk."""
    at, inside = _own_entries(chunks, CHUNK)  # pyright: ignore[reportGeneralTypeIssues]
    pull, precision = tl.load(of_kl), tl.load(precisions + tl.load(chunks + 6 * tl.program_id(0) + 5))
    gradient = tl.load(of_draw + at, mask=inside, other=0.0)
    mean = tl.load(joined + at, mask=inside, other=0.0)
    std = tl.exp(tl.load(joined + entries + at, mask=inside, other=0.0))
    away = std * tl.randn(tl.load(seed), at)
    tl.store(out + at, gradient + pull * mean * precision, mask=inside)
    tl.store(out + entries + at, gradient * away + pull * (std * std * precision - 1), mask=inside)


class _Chunks(NamedTuple):
    """How programs share out the entries of a buffer: by slices, which `Flat` numbers through.

    Attributes:
        entries: How many there are.
        chunks: For each chunk six numbers: where the slice begins in the buffer, the first entry of the chunk in the
            slice and that behind its last one, how many entries follow each other, how far those are apart, and the
            number of the slice.
        chunk_of: The first chunk of each slice, and at last the number of chunks.
        most: How many chunks a slice has at most.
        counts: How many entries each slice governs.
        held: 1 / s^2 of slices whose scale is not found, else -1.
        constants: What is added to the KL of each slice.
    """

    entries: int
    chunks: Tensor
    chunk_of: Tensor
    most: int
    counts: Tensor
    held: Tensor
    constants: Tensor


def _shared_out(flat: Flat) -> _Chunks:
    slices = len(flat.counts) + 2
    rows = sorted(row for place in flat.places for row in _of_factor(place.start, place.shape, place.first))
    sizes, chunk_of = [0] * slices, [0] * (slices + 1)
    for own, _, first, end, *_ in rows:
        sizes[own] += end - first
        chunk_of[own + 1] += 1
    most = max(chunk_of)
    for own in range(slices):
        chunk_of[own + 1] += chunk_of[own]
    constants = [-0.5 * size for size in sizes]
    constants[-2] += flat.core_entries * math.log(CORE_STD)
    device = flat.counts.device
    chunks = [(start, first, end, after, apart, own) for own, start, first, end, after, apart in rows]
    numbers = torch.tensor([*chain.from_iterable(chunks), *chunk_of], dtype=torch.int32, device="cpu").to(device)
    floats = torch.tensor([*[-1.0] * (slices - 2), CORE_STD**-2, 0.0, *constants], device="cpu").to(device)
    counts = torch.cat([flat.counts, flat.counts.new_zeros(2)])
    of_chunks, of_slices = numbers.split([6 * len(rows), slices + 1])
    return _Chunks(sum(sizes), of_chunks, of_slices, most, counts, *floats.split(slices))


def _of_factor(start: int, shape: tuple[int, int, int], slice_: int) -> Iterator[tuple[int, ...]]:
    """(slice, start, first, end, after, apart) of each chunk of a factor of shape (before, rank, after)."""
    before, rank, after = shape
    for k in range(rank):
        for first in range(0, before * after, _CHUNK):
            end = min(first + _CHUNK, before * after)
            yield slice_ + k, start + k * after, first, end, after, rank * after


class KernelDraw:
    """Draws of the factors of tensors of a kind, with their KL, on a GPU; by torch where kernels cannot.

    Args:
        prior: Of all tensors.
        tensors: Their factors, which may change in size.
    """

    def __init__(self, prior: Prior, tensors: Sequence[Factors]) -> None:
        self._prior, self._tensors = prior, tensors
        self._of: tuple[Flat, _Chunks] | None = None

    def __call__(self) -> tuple[Tensor, list[list[Tensor]]]:
        """As `draw_with_kl`."""
        flat, parameters = joined_factors(self._tensors)
        usable = type(self._prior) in (HalfCauchy, LogUniform) and all(p.dtype == torch.float32 for p in parameters)
        if not usable or not 0 < sum(map(Tensor.numel, parameters)) < 2 * _MOST:
            return draw_with_kl(self._prior, self._tensors)
        if self._of is None or flat is not self._of[0]:
            self._of = flat, _shared_out(flat)
        with torch.autocast(parameters[0].device.type, enabled=False):
            value, *draws = _KernelDraw.apply(*self._of, self._prior, *parameters)  # pyright: ignore
        return value, arranged(draws, flat, self._tensors)


class _KernelDraw(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,  # noqa: ANN401  torch's context
        flat: Flat,
        own: _Chunks,
        prior: Prior,
        *parameters: Tensor,
    ) -> tuple[Tensor, ...]:
        joined, slices = _flatten_dense_tensors(parameters), len(own.counts)
        seed = torch.empty((), dtype=torch.int64, device=joined.device).random_()  # A graph draws another each time.
        drawn, sums = joined.new_empty(own.entries), joined.new_empty(len(own.chunks) // 3)
        precisions, values = joined.new_empty(2, slices)
        _run(draw_kernel, len(own.chunks) // 6, joined, drawn, seed, own.chunks, sums, own.entries, CHUNK=_CHUNK)
        scale = prior.scale if isinstance(prior, HalfCauchy) else 0.0
        of_slices = own.chunk_of, own.most, own.counts, own.held, own.constants
        constants = {"LEAST": MIN_SCALE**2, "MANY": _MANY, "num_warps": 1}
        _run(scale_kernel, slices, sums, *of_slices, precisions, values, scale, **constants)
        ctx.save_for_backward(joined, seed, precisions, *parameters)
        ctx.of = flat, own, prior
        return values.sum(), *unflattened(drawn, parameters[: len(flat.order)])

    @staticmethod
    def backward(ctx: Any, of_kl: Tensor, *of_draws: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401  # pyright: ignore
        flat, own, prior = ctx.of
        joined, seed, precisions, *parameters = ctx.saved_tensors
        if torch.is_grad_enabled():
            # A gradient of 1 for the draw alone leaves the noise, times std, to log standard deviations.
            ones = joined.new_ones(own.entries)
            away = _gradients(joined, ones, torch.zeros_like(of_kl), seed, own, precisions)[own.entries :]
            return None, None, None, *followed_draw(flat, prior, parameters, away, [of_kl, *of_draws])
        found = _gradients(joined, _flatten_dense_tensors(of_draws), of_kl, seed, own, precisions)
        return None, None, None, *unflattened(found, parameters)


def _gradients(
    joined: Tensor, of_draw: Tensor, of_kl: Tensor, seed: Tensor, own: _Chunks, precisions: Tensor
) -> Tensor:
    out, given = torch.empty_like(joined), (of_draw, of_kl, seed, own.chunks, precisions)
    _run(gradients_kernel, len(own.chunks) // 6, joined, *given, out, own.entries, CHUNK=_CHUNK)
    return out


def _run(kernel: Any, programs: int, *given: object, **constants: object) -> None:  # noqa: ANN401  a type of Triton's
    kernel[(programs,)](*given, **constants)


def try_on(device: torch.device) -> None:
    """Holds the kernels against torch on a device, with factors of several chunks.

    Raises:
        RuntimeError: If they differ; or what Triton raises where it cannot compile.
    """
    tensor = _example(device)
    parameters, devices = [*tensor.means, *tensor.log_stds], [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.enable_grad():
        value, (drawn,) = KernelDraw(HalfCauchy(), [tensor])()
        known = kl_of_factors(HalfCauchy(), [tensor])
        of_kl = torch.autograd.grad(2 * known, parameters)
        found = torch.autograd.grad(2 * value + drawn[0].sum() + drawn[1].sum(), parameters)
    away = [(f - m).detach() for f, m in zip(drawn, tensor.means, strict=True)]
    wanted = [g + more for g, more in zip(of_kl, [1, 1, *away], strict=True)]
    right = all(torch.allclose(a, b, rtol=1e-3, atol=1e-3) for a, b in zip(found, wanted, strict=True))
    noise = torch.cat([(a / s.detach().exp()).flatten() for a, s in zip(away, tensor.log_stds, strict=True)])
    # Standard deviations of a mean and of a spread of 2,820 are .019 and .013.
    if not right or abs(float(noise.mean())) > 0.15 or abs(float(noise.std()) - 1) > 0.1:
        raise RuntimeError("they give other numbers")
    if not torch.allclose(value, known, rtol=1e-4):
        raise RuntimeError("they give another KL")


def _example(device: torch.device) -> Factors:
    layout = TT(3, out_modes=(900,), in_modes=(40,)).layout((900, 40))
    ranges, shapes = ((-2, 1), (-3, 0)), ((900, 3), (3, 40))
    means, log_stds = (
        [torch.linspace(*of, math.prod(s), device=device).view(s).requires_grad_() for s in shapes] for of in ranges
    )
    return Factors(layout, means, log_stds)
