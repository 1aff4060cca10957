# SPDX-License-Identifier: Apache-2.0
"""What holds for every format, each law stated once against a reference that shares no code with the library."""

import math
from collections import Counter

import torch
from torch.distributions import HalfCauchy, Normal, kl_divergence

import rankfall as rf
from rankfall import _contract

CORE_STD = 10.0
AXIS_ORDER = "oiklmnpqstuvwxyz"


def close(actual, expected, tolerance=1e-10):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def make(format, shape, prior=None, posterior=None, dtype=torch.float64):
    """A tensor with entries of order one, and posterior standard deviations that all differ."""
    t = rf.LowRankTensor(shape, format, prior=prior, posterior=posterior, initial_std=1.0, dtype=dtype)
    with torch.no_grad():
        for log_std in t.log_stds:
            log_std.add_(torch.randn_like(log_std))
    return t


def drawn(t, seed):
    """The factors as a forward pass sees them: one draw of each in train mode, the means in eval mode."""
    if not (t.training and len(t.log_stds)):
        return list(t.factors)
    torch.manual_seed(seed)
    return [
        mean + log_std.exp() * torch.randn(mean.shape, dtype=mean.dtype)
        for mean, log_std in zip(t.factors, t.log_stds, strict=True)
    ]


def naive_padded(t, factors):
    """One torch.einsum over all factors, from their axis names alone: a name that occurs once is a mode."""
    axes = t.layout.factors
    seen = Counter(name for names in axes for name in names)
    number = {name: k for k, name in enumerate(seen)}
    modes = sorted((n for n in seen if seen[n] == 1), key=lambda n: (AXIS_ORDER.index(n[0]), int(n[1:])))
    operands = [part for f, names in zip(factors, axes, strict=True) for part in (f, [number[n] for n in names])]
    full = torch.einsum(*operands, [number[n] for n in modes])
    widths = {}
    for name, size in zip(modes, full.shape, strict=True):
        widths[name[0]] = widths.get(name[0], 1) * size
    return full.reshape(tuple(widths.values()))


def naive_dense(t, factors):
    return naive_padded(t, factors)[tuple(slice(n) for n in t.shape)]


def dense_is_the_contraction(t):
    close(t.dense(), naive_dense(t, t.factors))
    assert t.dense().shape == t.shape


def sample_is_the_contraction_of_one_draw(t):
    t.train()
    expected = naive_dense(t, drawn(t, seed=3))
    torch.manual_seed(3)
    close(t.sample(), expected)


def linear_is_the_dense_product(t, x):
    """Values, and gradients with respect to x and to every factor (and to the log stds, in train mode)."""
    x = x.clone().requires_grad_()
    leaves = [x, *t.factors, *(t.log_stds if t.training else [])]
    expected = x @ naive_dense(t, drawn(t, seed=3)).T
    torch.manual_seed(3)
    y = t.linear(x)
    direction = torch.randn_like(expected)
    close(y, expected)
    pairs = zip(
        torch.autograd.grad(y, leaves, direction), torch.autograd.grad(expected, leaves, direction), strict=True
    )
    for actual, reference in pairs:
        close(actual, reference)


def governor(t, k):
    """The dimension of factor k whose bond governs it (None: the Tucker core), by the table of arXiv 2010.08689."""
    if isinstance(t.format, rf.Tucker) and k == 0:
        return None
    ends_a_chain = isinstance(t.format, rf.TT | rf.TTM) and k == len(t.factors) - 1
    return 0 if ends_a_chain else t.factors[k].dim() - 1


def reference_scales(t):
    """Prior scales by the textbook formulas, differentiable; float64 needs no care about cancellation."""
    moment, count = {}, {}
    for k, factor in enumerate(t.factors):
        dim = governor(t, k)
        if dim is None:
            continue
        squares = factor**2 + (torch.exp(2 * t.log_stds[k]) if len(t.log_stds) else 0)
        bond = t.layout.factors[k][dim]
        moment[bond] = moment.get(bond, 0) + squares.movedim(dim, 0).flatten(1).sum(1)
        count[bond] = count.get(bond, 0) + factor.numel() // factor.shape[dim]
    scales = {}
    for bond, m in moment.items():
        d = count[bond]
        if isinstance(t.prior, rf.LogUniform):
            variance = m / (d + 1)
        else:
            e = t.prior.scale**2
            variance = (m - d * e + torch.sqrt((m - d * e) ** 2 + 4 * (d + 2) * m * e)) / (2 * (d + 2))
        scales[bond] = variance.sqrt()
    return scales


def reference_kl(t):
    """KL of every entry by torch.distributions, and -log of the hyperprior; the scales are not held fixed."""
    scales = reference_scales(t)
    total = torch.zeros((), dtype=torch.float64)
    for k, mean in enumerate(t.factors):
        dim = governor(t, k)
        if dim is None:
            scale = torch.full_like(mean, CORE_STD)
        else:
            line = scales[t.layout.factors[k][dim]]
            scale = line.reshape([-1 if d == dim else 1 for d in range(mean.dim())]).expand(mean.shape)
        if len(t.log_stds):
            total = total + kl_divergence(Normal(mean, t.log_stds[k].exp()), Normal(0.0, scale)).sum()
        else:
            total = total - (Normal(0.0, scale).log_prob(mean) + 0.5 * math.log(2 * math.pi)).sum()
    for s in scales.values():
        if isinstance(t.prior, rf.LogUniform):
            total = total + s.log().sum()
        else:
            p = HalfCauchy(torch.tensor(t.prior.scale, dtype=torch.float64))
            total = total + (p.log_prob(torch.zeros_like(s)) - p.log_prob(s)).sum()
    return total


def kl_is_that_of_the_distributions(t):
    close(t.kl(), reference_kl(t))
    for bond, scale in t.prior_scales().items():
        close(scale, reference_scales(t)[bond].detach())


def kl_gradient_is_that_of_the_profiled_bound(t):
    leaves = list(t.parameters())
    for actual, expected in zip(
        torch.autograd.grad(t.kl(), leaves), torch.autograd.grad(reference_kl(t), leaves), strict=True
    ):
        close(actual, expected)


def energies_are_sums_of_squares(t):
    energies = t.energies()
    assert list(energies) == list(t.ranks)
    for bond, rank in t.ranks.items():
        for j in range(rank):
            bearing = [
                f.select(names.index(bond), j)
                for f, names in zip(t.factors, t.layout.factors, strict=True)
                if bond in names
            ]
            assert len(bearing) >= 2
            close(energies[bond][j], sum(f.detach().square().sum() for f in bearing))


def squared_norm_is_that_of_the_padded_tensor(t):
    close(_contract.squared_norm(t.layout, list(t.factors)), naive_padded(t, t.factors).square().sum())


def cutting_takes_exactly_the_slice(t, bond, index):
    """Cutting one slice leaves what the contraction without it gives, in data and gradients, and smaller state."""
    optimizer = torch.optim.Adam(t.parameters(), lr=1e-3)
    t.sample().square().sum().backward()
    optimizer.step()
    before, objects = t.ranks, list(t.parameters())
    kept = torch.tensor([k for k in range(before[bond]) if k != index], dtype=torch.int64)
    smaller = [
        f.detach().index_select(names.index(bond), kept) if bond in names else f.detach()
        for f, names in zip(t.factors, t.layout.factors, strict=True)
    ]
    expected = naive_dense(t, smaller)
    t.keep_slices_(bond, kept, optimizer)
    assert t.ranks == before | {bond: before[bond] - 1}
    assert [id(p) for p in t.parameters()] == [id(p) for p in objects]
    close(t.dense(), expected)
    assert [f.shape for f in t.factors] == [f.shape for f in smaller]
    for p in t.parameters():
        assert p.grad.shape == p.shape == optimizer.state[p]["exp_avg"].shape == optimizer.state[p]["exp_avg_sq"].shape
    optimizer.zero_grad()
    (t.sample().square().sum() + t.kl()).backward()
    optimizer.step()
    assert all(bool(torch.isfinite(p).all()) for p in t.parameters())


def cutting_a_zero_slice_changes_nothing(t, bond, index):
    """One factor has zeros in that slice, the others do not: the function and the other gradients stay."""
    k = next(k for k, names in enumerate(t.layout.factors) if bond in names)
    with torch.no_grad():
        t.factors[k].select(t.layout.factors[k].index(bond), index).zero_()
    t.eval()
    direction = torch.randn(t.shape, dtype=torch.float64)
    before = t.dense().detach()
    (t.dense() * direction).sum().backward()
    kept = torch.tensor([j for j in range(t.ranks[bond]) if j != index], dtype=torch.int64)
    t.keep_slices_(bond, kept)
    close(t.dense(), before)
    inherited = [f.grad.clone() for f in t.factors]
    for f in t.factors:
        f.grad = None
    (t.dense() * direction).sum().backward()
    for f, expected in zip(t.factors, inherited, strict=True):
        close(f.grad, expected)


def state_dict_crosses_ranks(t, other):
    """A cut state_dict loads into a tensor of other ranks, bit for bit, and that one still works."""
    other.load_state_dict(t.state_dict())
    assert other.ranks == t.ranks
    for key, value in t.state_dict().items():
        assert torch.equal(other.state_dict()[key], value)
    assert torch.equal(other.dense(), t.dense())
    (other.sample().square().sum() + other.kl()).backward()
    assert all(p.grad.shape == p.shape for p in other.parameters())
