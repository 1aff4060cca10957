# SPDX-License-Identifier: Apache-2.0
"""Dense weight to factors: TT-SVD, HOSVD, and alternating least squares for CP and the tensor ring. All in float64."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rankfall._contract import squared_norm
from rankfall._einsum import Axes, contract
from rankfall._formats import CP, TR, Format, Tucker
from rankfall._layout import Layout

# Singular values under this fraction of the largest are rounding errors of float32 weights read into float64.
_NUMERICAL_ZERO = 1e-7
_ALS_SWEEPS, _ALS_STARTS, _ALS_PROGRESS, _ALS_EXACT = 200, 3, 1e-5, 1e-9
# A sweep of a ring is dear, and what it ends at is judged by data and trained afterwards.
_RING_SWEEPS, _RING_PROGRESS = 40, 1e-2


@torch.no_grad()
def decompose(weight: Tensor, format: Format, layout: Layout) -> list[Tensor]:
    """Factors whose contraction is `weight`, or near it where the ranks do not suffice.

    TT and TT-matrix by TT-SVD (Oseledets 2011, algorithm 1), Tucker by HOSVD (De Lathauwer et al. 2000), CP and tensor
    ring by alternating least squares; the ring starts from TR-SVD (Zhao et al. 2016, algorithm 1). TT, TT-matrix and
    Tucker are exact when the ranks suffice; so is the ring when they suffice for a tensor train. Ranks that the weight
    does not need are left out.

    Args:
        weight: Any real tensor of shape `layout.shape`.
        format: The format; its `max_rank` bounds every rank.
        layout: `format.layout(weight.shape)`.

    Returns:
        One tensor per factor, of the weight's dtype and device.
    """
    padded = weight.new_zeros(layout.padded_shape, dtype=torch.float64)
    padded[tuple(slice(n) for n in layout.shape)] = weight.double()
    target = padded.reshape(tuple(layout.mode_sizes.values()))
    ranks = format.start_ranks(layout)
    names = tuple(layout.mode_sizes)
    if isinstance(format, CP):
        factors = _cp_als(layout, names, target, ranks["r"])
    elif isinstance(format, Tucker):
        factors = _hosvd(target, list(ranks.values()))
    elif isinstance(format, TR):
        factors = _ring(layout, names, target, ranks)
    else:
        factors = _train(layout, names, target, list(ranks.values()))
    return [f.to(weight.dtype) for f in factors]


def _svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    needed = int((s > _NUMERICAL_ZERO * s[0]).sum()) if s.numel() else 0
    kept = max(1, min(rank, needed))
    # A weight of zeros keeps one slice; its singular value must still divide.
    return u[:, :kept], s[:kept].clamp_min(torch.finfo(s.dtype).tiny), vh[:kept]


def _train(layout: Layout, names: Axes, target: Tensor, ranks: list[int]) -> list[Tensor]:
    groups = [tuple(name for name in axes if name in names) for axes in layout.factors]
    target = target.permute([names.index(name) for group in groups for name in group])
    sizes = [[layout.mode_sizes[name] for name in group] for group in groups]
    factors, rest, left, split = [], target.reshape(1, -1), [], target.new_ones(1)
    for k, rank in enumerate(ranks):
        u, s, vh = _svd(rest.reshape(rest.shape[0] * math.prod(sizes[k]), -1), rank)
        # The square root of each singular value goes to either side, so that no factor dwarfs the next.
        factor = u.reshape(split.numel(), -1) / split.sqrt()[:, None]
        factors.append(factor.reshape(*left, *sizes[k], s.numel()) * s.sqrt())
        rest, left, split = s[:, None] * vh, [s.numel()], s
    last = rest.reshape(split.numel(), -1) / split.sqrt()[:, None]
    factors.append(last.reshape(*left, *sizes[-1]))
    return factors


def _hosvd(target: Tensor, ranks: list[int]) -> list[Tensor]:
    core, sides = target, []
    for dim, rank in enumerate(ranks):
        u, _, _ = _svd(target.movedim(dim, 0).reshape(target.shape[dim], -1), rank)
        core = (core.movedim(dim, -1) @ u).movedim(-1, dim)
        sides.append(u)
    # The sides are orthonormal and the core has the weight's own size; one step size is to serve them all.
    return _balance([core, *sides])


def _cp_als(layout: Layout, names: Axes, target: Tensor, rank: int) -> list[Tensor]:
    starts = [_leading_vectors(target, rank)]
    generator = torch.Generator().manual_seed(0)
    for _ in range(_ALS_STARTS - 1):
        starts.append([_noise((n, rank), target, generator) for n in target.shape])
    return _best_als(layout, names, target, starts)


def _noise(shape: Sequence[int], like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float64, device="cpu").to(like.device)


def _leading_vectors(target: Tensor, rank: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    sides = []
    for dim, size in enumerate(target.shape):
        u, _, _ = _svd(target.movedim(dim, 0).reshape(size, -1), rank)
        sides.append(torch.cat([u, _noise((size, rank - u.shape[1]), target, generator)], dim=1))
    return sides


def _ring(layout: Layout, names: Axes, target: Tensor, ranks: Mapping[str, int]) -> list[Tensor]:
    train_ranks = list(ranks.values())[1:]
    candidates = [_open_ring(target, 1, train_ranks)]
    if _error(layout, names, target, candidates[0]) > _ALS_EXACT * target.norm():
        # A true ring: r0 about the square root of what the first unfolding carries, then least squares.
        first = torch.linalg.matrix_rank(target.reshape(target.shape[0], -1), rtol=_NUMERICAL_ZERO)
        r0 = max(1, min(ranks["r0"], math.isqrt(int(first))))
        if r0 > 1:
            candidates.append(_open_ring(target, r0, train_ranks))
        shapes = layout.factor_shapes(ranks)
        generator = torch.Generator().manual_seed(0)
        candidates.append([_noise(shape, target, generator) for shape in shapes])
        return _best_als(layout, names, target, candidates)
    return candidates[0]


def _open_ring(target: Tensor, r0: int, ranks: list[int]) -> list[Tensor]:
    """TR-SVD: the first split carries r0 * r1, r0 travels along the rest and closes the ring."""
    sizes = list(target.shape)
    u, s, vh = _svd(target.reshape(sizes[0], -1), r0 * ranks[0])
    r1 = max(1, s.numel() // r0)
    u, s, vh = u[:, : r0 * r1], s[: r0 * r1], vh[: r0 * r1]
    factors = [(u * s.sqrt()).reshape(sizes[0], r0, r1).movedim(1, 0)]
    rest = (s.sqrt()[:, None] * vh).reshape(r0, r1, -1).movedim(0, -1).reshape(r1, -1)
    for size, rank in zip(sizes[1:-1], ranks[1:], strict=True):
        left = rest.shape[0]
        u, s, vh = _svd(rest.reshape(left * size, -1), rank)
        factors.append((u * s.sqrt()).reshape(left, size, s.numel()))
        rest = s.sqrt()[:, None] * vh
    factors.append(rest.reshape(rest.shape[0], sizes[-1], r0))
    return factors


def _best_als(layout: Layout, names: Axes, target: Tensor, starts: Sequence[list[Tensor]]) -> list[Tensor]:
    best, best_error = starts[0], math.inf
    for start in starts:
        factors = _als(layout, _Goal([names], [target], float(target.square().sum())), start)
        error = _error(layout, names, target, factors)
        if error < best_error:
            best, best_error = factors, error
        if best_error <= _ALS_EXACT * target.norm():
            break
    return _balance(best)


def _error(layout: Layout, names: Axes, target: Tensor, factors: Sequence[Tensor]) -> float:
    return float((contract(layout.factors, names, factors) - target).norm())


@torch.no_grad()
def refit(layout: Layout, target: Sequence[Tensor], start: Sequence[Tensor]) -> list[Tensor]:
    """The nearest factors of smaller rank to given factors, by alternating least squares on Gram matrices.

    Neither tensor is ever formed; for CP a sweep costs O(rank^2 * sum of modes).

    Args:
        layout: The layout of both sets of factors.
        target: Factors of the tensor to come near, float64.
        start: Factors of the ranks wanted, float64.
    """
    bonds = set(layout.bonds)
    renamed = [tuple(f"{name}*" if name in bonds else name for name in axes) for axes in layout.factors]
    goal = _Goal(renamed, list(target), float(squared_norm(layout, target)))
    is_ring = len(bonds) > 1
    effort = (_RING_SWEEPS, _RING_PROGRESS) if is_ring else (_ALS_SWEEPS, _ALS_PROGRESS)
    return _balance(_als(layout, goal, start, *effort))


@dataclass(frozen=True)
class _Goal:
    """The tensor that least squares come near: a network whose only names in common with the factors are modes."""

    axes: list[Axes]
    tensors: list[Tensor]
    square: float


def _als(
    layout: Layout, goal: _Goal, start: Sequence[Tensor], sweeps: int = _ALS_SWEEPS, progress: float = _ALS_PROGRESS
) -> list[Tensor]:
    """Alternating least squares for any network of factors: each in turn solves its normal equations."""
    factors, before = list(start), math.inf
    for _ in range(sweeps):
        for k in range(len(factors)):
            factors[k] = _solve_factor(layout, goal, factors, k)
        # At a least-squares point the residual is |W|^2 - |fit|^2, so progress costs no formed tensor.
        residual = max(goal.square - float(squared_norm(layout, factors)), 0.0)
        if before - residual <= progress * max(residual, 1e-20 * goal.square):
            break
        before = residual
    return factors


def _solve_factor(layout: Layout, goal: _Goal, factors: Sequence[Tensor], k: int) -> Tensor:
    axes = layout.factors[k]
    bonds = tuple(name for name in axes if name in layout.bonds)
    modes = tuple(name for name in axes if name not in layout.bonds)
    others = [j for j in range(len(factors)) if j != k]
    inputs = [layout.factors[j] for j in others]
    tensors = [factors[j] for j in others]
    known = set(layout.bonds)
    mirrored = [tuple(f"{n}'" if n in known else n for n in axes_) for axes_ in inputs]
    mirror = tuple(f"{n}'" for n in bonds)
    gram = contract([*inputs, *mirrored], (*bonds, *mirror), [*tensors, *tensors])
    right = contract([*goal.axes, *inputs], (*bonds, *modes), [*goal.tensors, *tensors])
    width = math.prod(gram.shape[: len(bonds)])
    solved = _least_squares(gram.reshape(width, width), right.reshape(width, -1)).reshape(right.shape)
    order = (*bonds, *modes)
    return solved.permute([order.index(name) for name in axes])


def _least_squares(gram: Tensor, right: Tensor) -> Tensor:
    # Collinear slices make the Gram matrix singular; the pseudo-inverse then takes the smallest solution.
    values, vectors = torch.linalg.eigh(gram)
    inverse = torch.where(values > 1e-14 * values[-1], 1 / values, 0.0)
    return vectors @ (inverse[:, None] * (vectors.T @ right))


def _balance(factors: list[Tensor]) -> list[Tensor]:
    """Gives all factors the same root mean square; their product stays."""
    sizes = [float(f.square().mean().sqrt()) for f in factors]
    if min(sizes) == 0:
        return factors
    common = math.exp(sum(math.log(s) for s in sizes) / len(sizes))
    return [f * (common / s) for f, s in zip(factors, sizes, strict=True)]
