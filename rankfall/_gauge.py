# SPDX-License-Identifier: Apache-2.0
"""Canonical forms: the tensor stays, its slices become orthogonal, sorted, and as cheap as the prior lets them be.

Any invertible X may stand on a bond with X^-1 beside it. The likelihood does not see it, the KL does, so the best
point of that orbit is found here in closed form for the rotation (singular value decompositions of the tensor's own
unfoldings) and, where the KL is bounded below, by a small smooth minimisation for the scale of each slice. All in
float64.

What the KL sees of a slice is its energy, mean^2 + std^2 of its entries. So with standard deviations the unfoldings are
decomposed in two ways, by their means and by their second moments, E[A^T A] = mean^T mean + diag(sum of variances), and
the cheaper form is taken. Where slices are known well the two agree. Where they are mostly noise, to make their means
orthogonal is to stretch their noise, and the second moments leave them alone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rankfall._divergence import Factors, kl_of_factors, second_moments
from rankfall._formats import CP, TR, Format, Tucker
from rankfall._layout import Layout
from rankfall._priors import Prior

# Singular values under this fraction of the largest are rounding errors of float64: the slice carries nothing.
_DEAD = 1e-14
# Under this fraction of the largest a singular value of the means no longer stretches variances further.
_STRETCH = 1e-6
_RING_SWEEPS, _RING_SETTLED = 50, 1e-8
_TURNS = 3
# Scales stay within this many e-folds of an even split: a slice of tiny entries beside huge ones would be the cheapest
# place for a dead one, and the next step of an optimizer there would be an explosion.
_SCALE_STEPS, _SCALE_BOUND = 60, 2.0


@dataclass
class Gauge:
    """Factors in float64 with the variances of their entries, or no variances; a working copy that is changed."""

    layout: Layout
    means: list[Tensor]
    variances: list[Tensor]


def canonical(
    layout: Layout, format: Format, prior: Prior, means: Sequence[Tensor], log_stds: Sequence[Tensor]
) -> Gauge | None:
    """The canonical form of a set of factors: the same tensor at the means, the lowest KL that was found.

    Tensor train and TT-matrix: right-to-left QR, left-to-right SVD (Oseledets 2011, algorithm 2). Tucker: HOSVD. Ring:
    the two-factor step bond by bond until the slice energies settle. CP: scales only. Means are exact. Variances go
    through the squares of the same maps, which drops the correlations that the rotation makes; where that costs more
    than the rotation saves, only the scales change.

    Args:
        layout: The layout of the factors.
        format: The format they are in.
        prior: The hyperprior whose KL the scales minimise.
        means: The factors.
        log_stds: Log posterior standard deviations, or nothing.

    Returns:
        Factors of the same shapes, in float64; None if none with a lower KL were found.
    """
    best, now = None, _gauge(layout, means, log_stds)
    lowest = _kl(now, prior)
    # A turn drops correlations of the variances, so that with them a second one still finds something.
    for _ in range(_TURNS if now.variances else 1):
        now = _lowered(now, format, prior)
        if _kl(now, prior) >= lowest:
            break
        best, lowest = now, _kl(now, prior)
    return best


def _lowered(start: Gauge, format: Format, prior: Prior) -> Gauge:
    """The better one of the factors turned and the factors as they lie, scales included."""
    found = _rotations(start, format)
    # Without variances the KL falls without end as a slice's scale moves from the factor that its bond governs to the
    # next one, so the even split of the rotation stays. CP is safe: its bond governs all factors.
    if start.variances or isinstance(format, CP):
        found = [_balanced(_equalised(gauge), prior) for gauge in (*found, start)]
    # The fixed prior of a core sees its size, so with variances sizes stay where the KL has put them.
    if start.layout.core is None or not start.variances:
        found = [_equalised(gauge) for gauge in found]
    return min(found, key=lambda gauge: _kl(gauge, prior))


def aligned(layout: Layout, format: Format, prior: Prior, means: Sequence[Tensor], log_stds: Sequence[Tensor]) -> Gauge:
    """The rotation of `canonical`, whatever it does to the KL: slices orthogonal and sorted, factors of one size.

    A slice that is spread over all others cannot be removed. This is the form in which removals are tried.
    """
    start = _gauge(layout, means, log_stds)
    turned = [_equalised(gauge) for gauge in _rotations(start, format) or [start]]
    if start.variances:
        turned = [_equalised(_balanced(gauge, prior)) for gauge in turned]
    return min(turned, key=lambda gauge: _kl(gauge, prior))


def _gauge(layout: Layout, means: Sequence[Tensor], log_stds: Sequence[Tensor]) -> Gauge:
    """On the CPU: thousands of small operations, many of which wait for the one before."""
    return Gauge(layout, [m.cpu().double() for m in means], [(2 * s.cpu().double()).exp() for s in log_stds])


def _rotations(start: Gauge, format: Format) -> list[Gauge]:
    """The factors turned by their means, and by their second moments if they have any; none for CP."""
    if isinstance(format, CP):
        return []
    rotate = _rotate_tucker if isinstance(format, Tucker) else _rotate_ring if isinstance(format, TR) else _rotate_chain
    found = []
    for by_noise in (False, True) if start.variances else (False,):
        gauge = Gauge(start.layout, list(start.means), list(start.variances))
        rotate(gauge, by_noise)
        found.append(gauge)
    return found


def _kl(gauge: Gauge, prior: Prior) -> float:
    value = float(kl_of_factors(prior, [Factors(gauge.layout, gauge.means, [0.5 * v.log() for v in gauge.variances])]))
    return value if math.isfinite(value) else math.inf


def _columns(factor: Tensor, dim: int) -> Tensor:
    """The factor as a matrix with one dimension as columns."""
    return factor.movedim(dim, -1).reshape(-1, factor.shape[dim])


def _map(factor: Tensor, dim: int, matrix: Tensor) -> Tensor:
    """Replaces index a of one dimension by q: sum over a of factor[.., a, ..] matrix[a, q]."""
    return (factor.movedim(dim, -1) @ matrix).movedim(-1, dim)


def _triangle(factor: Tensor, dim: int, variance: Tensor | None = None) -> Tensor:
    """R with R^T R = E[A^T A], A the factor as a matrix with one dimension as columns."""
    columns = _columns(factor, dim)
    if variance is not None:
        columns = torch.cat([columns, _columns(variance, dim).sum(0).sqrt().diag()])
    return torch.linalg.qr(columns, mode="r").R


def _energies(triangle: Tensor) -> Tensor:
    """The diagonal of R^T R, as one column: what a block makes of the variances of the factor beside it."""
    return triangle.square().sum(0)[:, None]


def _widened(matrix: Tensor, columns: int) -> Tensor:
    """Columns of zeros for slices of a rank beyond the unfolding's: they are there in vain."""
    return F.pad(matrix, (0, columns - matrix.shape[1]))


@dataclass
class _Bond:
    """The gauge of one bond between a left and a right block with triangles ra and rb: W = Q_a ra rb^T Q_b^T.

    With ra rb^T = u s v^T, X = rb^T v s^-1/2 stands on the left block and X^-1 = s^-1/2 u^T ra on the right one;
    neither inverts a triangle.
    """

    u: Tensor
    root: Tensor
    v: Tensor
    x: Tensor
    x_inverse: Tensor
    dead: Tensor

    @classmethod
    def between(cls, ra: Tensor, rb: Tensor, least: float = _STRETCH) -> "_Bond":
        rank = ra.shape[1]
        u, s, vh = torch.linalg.svd(ra @ rb.T, full_matrices=False)
        u, v, s = _widened(u, rank), _widened(vh.T, rank), F.pad(s, (0, rank - len(s)))
        largest = float(s.max()) or 1.0
        bounded = s.clamp_min(least * largest).rsqrt()
        return cls(u, s.sqrt(), v, rb.T @ v * bounded, ra.T @ u * bounded, s <= _DEAD * largest)


def _turn(gauge: Gauge, bond: _Bond, left: tuple[int, int], right: tuple[int, int]) -> None:
    """X on one factor of a bond, X^-1 on the other, each a (factor, dimension); variances by the squares."""
    for (factor, dim), matrix in ((left, bond.x), (right, bond.x_inverse)):
        gauge.means[factor] = _map(gauge.means[factor], dim, matrix)
        gauge.variances[factor] = _map(gauge.variances[factor], dim, matrix.square())


def _carry(gauge: Gauge, bond: _Bond, left: tuple[int, int], right: tuple[int, int]) -> None:
    """The variances alone; dead slices, which the means leave undefined, get the smallest."""
    if not gauge.variances:
        return
    for (factor, dim), matrix in ((left, bond.x), (right, bond.x_inverse)):
        moved = _map(gauge.variances[factor], dim, matrix.square())
        alive = [moved.select(dim, k) for k in range(len(bond.dead)) if not bond.dead[k]]
        floor = min((float(part.min()) for part in alive), default=1.0)
        shape = [-1 if d == dim else 1 for d in range(moved.dim())]
        gauge.variances[factor] = torch.where(bond.dead.reshape(shape), floor, moved)


def _rotate_chain(gauge: Gauge, by_noise: bool) -> None:
    """Right-to-left QR, left-to-right SVD, then the root of each singular value to either side of its bond."""
    means, last = gauge.means, len(gauge.means) - 1
    for k, bond in enumerate(_chain_bonds(gauge, by_noise) if gauge.variances else []):
        (_turn if by_noise else _carry)(gauge, bond, (k, means[k].dim() - 1), (k + 1, 0))
    if by_noise:
        return
    shapes = [tuple(m.shape) for m in means]
    for k in range(last, 0, -1):
        q, r = torch.linalg.qr(_columns(means[k], 0))
        means[k] = _widened(q, means[k].shape[0]).T.reshape(shapes[k])
        means[k - 1] = means[k - 1] @ _widened(r.T, means[k].shape[0])
    roots = []
    for k in range(last):
        u, s, vh = torch.linalg.svd(means[k].reshape(-1, shapes[k][-1]), full_matrices=False)
        rank = shapes[k][-1]
        means[k] = _widened(u, rank).reshape(shapes[k])
        means[k + 1] = torch.tensordot(_widened((s[:, None] * vh).T, rank).T, means[k + 1], dims=1)
        roots.append(F.pad(s, (0, rank - len(s))).sqrt())
    for k, root in enumerate(roots):
        means[k] = means[k] * root
        means[k + 1] = (means[k + 1].movedim(0, -1) * _inverse(root)).movedim(-1, 0)


def _chain_bonds(gauge: Gauge, by_noise: bool) -> list[_Bond]:
    """The gauge of every bond of a chain, from the triangles of all that lies left of it and right of it."""
    means, last = gauge.means, len(gauge.means) - 1
    spreads = gauge.variances if by_noise else [None] * len(means)
    lefts = [_triangle(means[0], means[0].dim() - 1, spreads[0])]
    rights = [_triangle(means[-1], 0, spreads[-1])]
    for k in range(1, last):
        spread = _spread_beside(lefts[-1], spreads[k], 0)
        lefts.append(_triangle(torch.tensordot(lefts[-1], means[k], dims=1), means[k].dim() - 1, spread))
    for k in range(last - 1, 0, -1):
        spread = _spread_beside(rights[-1], spreads[k], means[k].dim() - 1)
        rights.append(_triangle(means[k] @ rights[-1].T, 0, spread))
    least = _DEAD if by_noise else _STRETCH
    return [_Bond.between(ra, rb, least) for ra, rb in zip(lefts, reversed(rights), strict=True)]


def _spread_beside(triangle: Tensor, variance: Tensor | None, dim: int) -> Tensor | None:
    """The variances of a factor, as many times as the block on one of its bonds has energy."""
    return None if variance is None else _map(variance, dim, _energies(triangle))


def _rotate_tucker(gauge: Gauge, by_noise: bool) -> None:
    """HOSVD: sides orthogonal, core all-orthogonal, the root of each singular value to either side of its bond."""
    core, sides = gauge.means[0], gauge.means[1:]
    for k, bond in enumerate(_tucker_bonds(gauge, by_noise) if gauge.variances else []):
        (_turn if by_noise else _carry)(gauge, bond, (k + 1, 1), (0, k))
    if by_noise:
        return
    split = [torch.linalg.qr(side) for side in sides]
    whole = _absorbed(core, [r for _, r in split])
    rotations, roots = [], []
    for k, (q, r) in enumerate(split):
        rank = core.shape[k]
        w, s, _ = torch.linalg.svd(whole.movedim(k, 0).reshape(r.shape[0], -1), full_matrices=False)
        rotations.append(_widened(w, rank))
        roots.append(F.pad(s, (0, rank - len(s))).sqrt())
        gauge.means[k + 1] = _widened(q @ w, rank) * roots[k]
    # Scales last: an unfolding whose other modes are scaled has other singular vectors.
    for k, (rotation, root) in enumerate(zip(rotations, roots, strict=True)):
        whole = _map(whole, k, rotation * _inverse(root))
    gauge.means[0] = whole


def _tucker_bonds(gauge: Gauge, by_noise: bool) -> list[_Bond]:
    """The gauge of every bond of a Tucker tensor, from the triangles of its side and of core and other sides."""
    core, *sides = gauge.means
    core_spread, *spreads = gauge.variances if by_noise else [None] * len(gauge.means)
    triangles = [_triangle(side, 1, spread) for side, spread in zip(sides, spreads, strict=True)]
    bonds = []
    for k, triangle in enumerate(triangles):
        others = [None if j == k else t for j, t in enumerate(triangles)]
        energies = [None if t is None else _energies(t).T for t in others]
        spread = None if core_spread is None else _absorbed(core_spread, energies)
        rest = _triangle(_absorbed(core, others), k, spread)
        bonds.append(_Bond.between(triangle, rest, _DEAD if by_noise else _STRETCH))
    return bonds


def _absorbed(core: Tensor, matrices: Sequence[Tensor | None]) -> Tensor:
    for k, matrix in enumerate(matrices):
        if matrix is not None:
            core = _map(core, k, matrix.T)
    return core


def _inverse(root: Tensor) -> Tensor:
    """1 / root, and 0 for dead slices."""
    return torch.where(root > math.sqrt(_DEAD) * root.max(), 1 / root, 0.0)


def _rotate_ring(gauge: Gauge, by_noise: bool) -> None:
    """The two-factor SVD step, bond by bond, until the singular values settle; a ring has no global canonical form."""
    count, before = len(gauge.means), None
    for _ in range(_RING_SWEEPS):
        values = []
        for k in range(count):
            values.append(_two_factor_step(gauge, k, (k + 1) % count, by_noise))
        now = torch.cat(values)
        if before is not None and float((now - before).norm()) <= _RING_SETTLED * float(now.norm()):
            return
        before = now


def _two_factor_step(gauge: Gauge, a: int, b: int, by_noise: bool) -> Tensor:
    left, right = gauge.means[a], gauge.means[b]
    i, rank = left.dim() - 1, left.shape[-1]
    if by_noise:
        ra, rb = _triangle(left, i, gauge.variances[a]), _triangle(right, 0, gauge.variances[b])
        bond = _Bond.between(ra, rb, _DEAD)
        _turn(gauge, bond, (a, i), (b, 0))
        return bond.root.square()
    (qa, ra), (qb, rb) = torch.linalg.qr(_columns(left, i)), torch.linalg.qr(_columns(right, 0))
    bond = _Bond.between(ra, rb)
    _carry(gauge, bond, (a, i), (b, 0))
    gauge.means[a] = ((qa @ bond.u) * bond.root).reshape(left.shape)
    gauge.means[b] = ((qb @ bond.v) * bond.root).reshape(*right.shape[1:], rank).movedim(-1, 0)
    return bond.root.square()


def _balanced(gauge: Gauge, prior: Prior) -> Gauge:
    """The scales of all slices on all factors that bear them, those with the lowest KL; their products stay 1."""
    layout = gauge.layout
    free = {
        bond: gauge.means[0].new_zeros(len(places) - 1, gauge.means[places[0][0]].shape[places[0][1]])
        for bond in layout.bonds
        if (places := layout.places(bond))
    }
    variables = [v.requires_grad_() for v in free.values() if v.numel()]
    if not variables:
        return gauge
    search = torch.optim.LBFGS(variables, max_iter=_SCALE_STEPS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        search.zero_grad()
        scaled = _scaled(gauge, free)
        value = kl_of_factors(prior, [Factors(layout, scaled.means, [0.5 * v.log() for v in scaled.variances])])
        value.backward()
        return value

    with torch.enable_grad():
        search.step(loss)
    found = _scaled(gauge, {bond: v.detach() for bond, v in free.items()})
    return found if _kl(found, prior) < _kl(gauge, prior) else gauge


def _equalised(gauge: Gauge) -> Gauge:
    """All factors with the same root mean square: one step size serves them all, and the KL is all but blind to it."""
    moments = second_moments(gauge.means, [v.log() / 2 for v in gauge.variances])
    sizes = [float(moment.mean().sqrt()) for moment in moments]
    if min(sizes) == 0:
        return gauge
    common = math.exp(sum(map(math.log, sizes)) / len(sizes))
    means = [m * (common / size) for m, size in zip(gauge.means, sizes, strict=True)]
    variances = [v * (common / size) ** 2 for v, size in zip(gauge.variances, sizes, strict=False)]
    return Gauge(gauge.layout, means, variances)


def _scaled(gauge: Gauge, free: dict[str, Tensor]) -> Gauge:
    means, variances = list(gauge.means), list(gauge.variances)
    for bond, logs in free.items():
        # Bounded, since a slice that carries nothing may be scaled for ever.
        bounded = _SCALE_BOUND * torch.tanh(logs / _SCALE_BOUND)
        if gauge.layout.core is None:
            # A factor as a whole keeps its size: under a log-uniform hyperprior the KL lets it grow or fall for ever.
            bounded = bounded - bounded.mean(1, keepdim=True)
        exponents = torch.cat([bounded, -bounded.sum(0, keepdim=True)])
        for (k, dim), exponent in zip(gauge.layout.places(bond), exponents, strict=True):
            shape = [-1 if d == dim else 1 for d in range(means[k].dim())]
            means[k] = means[k] * exponent.exp().reshape(shape)
            if variances:
                variances[k] = variances[k] * (2 * exponent).exp().reshape(shape)
    return Gauge(gauge.layout, means, variances)
