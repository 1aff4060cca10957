# SPDX-License-Identifier: Apache-2.0
"""A low-rank tensor with a shrinkage prior: the one place where factors, prior and posterior meet."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import Optimizer

from rankfall import _contract, _decompose, _gauge, _matmul
from rankfall._divergence import Factors, governed_moments, kl_of_factors, per_slice, second_moments
from rankfall._formats import Format
from rankfall._posteriors import MeanField, Posterior, draw
from rankfall._priors import HalfCauchy, Prior
from rankfall._resize import forget_, grow_, keep_, resize_

_TRUNCATION = 2.0  # Factors start from a normal cut off at this many standard deviations.


class LowRankTensor(nn.Module):
    """A tensor of any number of axes, held as factors, whose slices a shrinkage prior draws to zero.

    W = contraction of the factors over their bonds; an entry governed by slice r of a bond has the prior N(0, s_r^2),
    and s_r the hyperprior `prior`. Use it as the weight of a layer, or alone in any forward model.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> t = rf.LowRankTensor((12, 20), rf.TTM(max_rank=4))
        >>> t.dense().shape, t.sample().shape, t.ranks
        (torch.Size([12, 20]), torch.Size([12, 20]), {'r1': 4})
        >>> loss = (t.sample() - torch.ones(12, 20)).square().sum() + t.kl()
        >>> loss.backward()

    Args:
        shape: The sizes of the axes. How the format splits them into modes, and any padding, never shows outside.
        format: rf.CP, rf.Tucker, rf.TT, rf.TTM or rf.TR.
        prior: The hyperprior of the prior scales; lower its scale to shrink harder.
        posterior: rf.MeanField learns a standard deviation per entry; rf.Point saves that memory.
        initial_std: Root mean square of the entries of dense() at the start; None for sqrt(2 / (rows + columns)).
        initial_share: What part of the variance of a factor's entries is the same for all digits of a row at the start,
            where rows have several digits. At 0 a digit by itself says nothing, for on average over the other digits
            its factor is multiplied by zero, and learning has to find out of that first.
        device: Where the factors live.
        dtype: Their type, a floating one.

    Raises:
        ValueError: If the format cannot take the shape, `initial_std` is not positive, or `initial_share` not from 0 to
            1.

    Attributes:
        factors: The factors, or their posterior means: an nn.ParameterList.
        log_stds: Log posterior standard deviations, one tensor per factor; empty with rf.Point.
        path: Path of the layer that `rf.tensorize_` made it for, so that errors can name it; empty elsewhere.
        given: A draw of the factors that was made elsewhere and is to be used; else empty.
    """

    def __init__(
        self,
        shape: Sequence[int],
        format: Format,
        *,
        prior: Prior | None = None,
        posterior: Posterior | None = None,
        initial_std: float | None = None,
        initial_share: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_kinds(format, prior, posterior)
        self.path = ""
        self.given: list[Tensor] = []
        self.format = format
        self.prior = HalfCauchy() if prior is None else prior
        self.posterior = MeanField() if posterior is None else posterior
        self.layout = format.layout(shape)
        if initial_std is None:
            initial_std = math.sqrt(2 / (self.shape[0] + math.prod(self.shape[1:])))
        if not initial_std > 0:
            raise ValueError(f"initial_std must be positive, got {initial_std}. Pass None for the default.")
        if not 0 <= initial_share <= 1:
            raise ValueError(f"initial_share must be from 0 to 1, got {initial_share}. 0 shares nothing.")
        shapes = self.layout.factor_shapes(format.start_ranks(self.layout))
        self.factors = nn.ParameterList(torch.empty(s, device=device, dtype=dtype) for s in shapes)
        self._initialise(initial_std, initial_share)
        self.log_stds = nn.ParameterList(self._initial_log_stds())
        self.register_load_state_dict_pre_hook(_resize_to_incoming)

    @classmethod
    def from_dense(
        cls, weight: Tensor, format: Format, *, prior: Prior | None = None, posterior: Posterior | None = None
    ) -> "LowRankTensor":
        """The tensor in factors: TT-SVD, HOSVD or alternating least squares, exact where `max_rank` suffices.

        Example:
            >>> weight = torch.randn(12, 3) @ torch.randn(3, 20)
            >>> t = rf.LowRankTensor.from_dense(weight, rf.TTM(max_rank=20))
            >>> torch.allclose(t.dense(), weight, atol=1e-5)
            True

        Args:
            weight: The tensor to decompose; it stays as it is.
            format: As for the class; ranks that the weight does not need are left out.
            prior: As for the class.
            posterior: As for the class.

        Raises:
            ValueError: If the format cannot take the shape, or the weight holds a NaN or an infinity.
        """
        if not bool(torch.isfinite(weight).all()):
            raise ValueError("weight to decompose holds NaN or infinity. Train or load the dense layer again first.")
        self = cls(weight.shape, format, prior=prior, posterior=posterior, device=weight.device, dtype=weight.dtype)
        factors = _decompose.decompose(weight.detach(), format, self.layout)
        for parameter, factor in zip(self.factors, factors, strict=True):
            parameter.data = factor.contiguous()
        self.log_stds = nn.ParameterList(self._initial_log_stds())
        return self

    @property
    def shape(self) -> tuple[int, ...]:
        """The sizes of the axes, as given."""
        return self.layout.shape

    @property
    def ranks(self) -> dict[str, int]:
        """The current rank of every bond."""
        return self.layout.ranks([f.shape for f in self.factors])

    def dense(self) -> Float[Tensor, "*shape"]:
        """The tensor at the posterior mean; exact, since every format is linear in each of its factors."""
        return _contract.dense(self.layout, list(self.factors))

    def sample(self) -> Float[Tensor, "*shape"]:
        """The tensor at one draw of all factors from the posterior; dense() with rf.Point."""
        return _contract.dense(self.layout, self._sampled())

    def linear(
        self, x: Float[Tensor, "*batch in_features"], bias: Float[Tensor, " out_features"] | None = None
    ) -> Float[Tensor, "*batch out_features"]:
        """Computes x @ W.T + bias for a tensor of two axes, in the cheapest way at the current ranks.

        W is one draw for the whole call in train mode, the posterior mean in eval mode.

        Raises:
            ValueError: If the tensor has not two axes, or the last dimension of `x` is not the second of them.
        """
        if len(self.shape) != 2:
            raise ValueError(f"linear needs a tensor of two axes, this one has shape {self.shape}. Use dense().")
        if x.dim() == 0 or x.shape[-1] != self.shape[1]:
            where = f"{self.path!r}" if self.path else f"a weight of shape {self.shape}"
            raise ValueError(
                f"{where} has in_features={self.shape[1]}, but the input has shape {tuple(x.shape)}. "
                f"Reshape it to (..., {self.shape[1]})."
            )
        return _matmul.linear(self.layout, self.drawn(), x, bias)

    def drawn(self) -> list[Tensor]:
        """The factors that a layer's forward uses: one draw from the posterior in train mode, its mean in eval mode."""
        return self._sampled() if self.training else list(self.factors)

    def kl(self) -> Float[Tensor, ""]:
        """KL(q || p) of all factors at the best prior scales, in nats; differentiable, float32 or wider.

        MeanField: sum over entries of 1/2 [(mean^2 + std^2)/s^2 - 1 - log(std^2/s^2)], and -log p(s) of every slice.
        Point: the negative log prior up to a constant; terms in std are dropped (model of arXiv 2010.08689).
        """
        with torch.autocast(self.factors[0].device.type, enabled=False):
            return kl_of_factors(self.prior, [self.posterior_factors()])

    @torch.no_grad()
    def entry_kl(self) -> float:
        """The part of `kl` that entries are charged, without -log p(s): what removing slices saves, never negative.

        A hyperprior is a density of scales, so its value would depend on their unit when slices are counted.
        """
        return float(kl_of_factors(self.prior, [self.posterior_factors()], hyperprior=False))

    def posterior_factors(self) -> Factors:
        """What `kl` is computed from."""
        return Factors(self.layout, list(self.factors), list(self.log_stds))

    @torch.no_grad()
    def prior_scales(self, *, means_only: bool = False) -> dict[str, Float[Tensor, " rank"]]:
        """The best prior scale (standard deviation) of every slice of every bond.

        Args:
            means_only: True gives the scale that the posterior means call for by themselves, as if std were 0. With
                rf.MeanField the scale of a dead slice rests on its own noise, a factor of ten or so below the others;
                that of its means goes on falling.
        """
        squares = second_moments(list(self.factors), [] if means_only else list(self.log_stds))
        return {
            bond: self.prior.variance(moment, max(count, 1)).sqrt()
            for bond, (moment, count) in governed_moments(self.layout, squares).items()
        }

    @torch.no_grad()
    def energies(self) -> dict[str, Float[Tensor, " rank"]]:
        """The energy of every slice: sum of squares of its entries (posterior means) in all factors that bear it."""
        squares = second_moments(list(self.factors))
        return {bond: per_slice(squares, self.layout.places(bond)) for bond in self.layout.bonds}

    def keep_slices_(self, bond: str, index: Tensor, optimizer: Optimizer | None = None) -> None:
        """Keeps the given slices of a bond and removes the others from factors, gradients and optimizer state.

        Example:
            >>> t = rf.LowRankTensor((12, 20), rf.TTM(max_rank=4))
            >>> t.keep_slices_("r1", torch.tensor([0, 2]))
            >>> t.ranks
            {'r1': 2}

        Args:
            bond: A key of `ranks`.
            index: The slices that stay, int64, shape (kept,); may be empty.
            optimizer: The optimizer that owns the factors, if there is one.

        Raises:
            ValueError: If there is no such bond.
        """
        self._check_bond(bond)
        for factor, dim in self.layout.places(bond):
            for parameters in (self.factors, self.log_stds) if len(self.log_stds) else (self.factors,):
                keep_(parameters[factor], dim, index, optimizer)

    @torch.no_grad()
    def grow_slices_(self, bond: str, count: int, optimizer: Optimizer | None = None) -> None:
        """Adds slices to a bond without changing dense(): random entries in all factors that bear it, 0 in the last.

        The random entries have the root mean square of their factor, so that the gradient of the zeros says at once
        what the slice could carry. New standard deviations are what the posterior starts with.

        Example:
            >>> t = rf.LowRankTensor((12, 20), rf.TTM(max_rank=4))
            >>> before = t.dense()
            >>> t.grow_slices_("r1", 2)
            >>> t.ranks, torch.allclose(t.dense(), before)
            ({'r1': 6}, True)

        Args:
            bond: A key of `ranks`.
            count: How many slices are added.
            optimizer: The optimizer that owns the factors, if there is one.

        Raises:
            ValueError: If there is no such bond, or `count` is negative.
        """
        self._check_bond(bond)
        if count < 0:
            raise ValueError(f"count must be 0 or more, got {count}. Call keep_slices_ to remove slices.")
        places = self.layout.places(bond)
        for k, dim in places:
            factor = self.factors[k]
            shape = [count if d == dim else n for d, n in enumerate(factor.shape)]
            size = self._typical_size(k)
            grow_(
                factor,
                dim,
                factor.new_zeros(shape) if k == places[-1][0] else size * factor.new_empty(shape).normal_(),
                optimizer,
            )
            start = self.posterior.initial_log_std(factor.new_full((1,), size))
            if start is not None:
                grow_(self.log_stds[k], dim, start.expand(shape), optimizer)

    def _typical_size(self, k: int) -> float:
        """Root mean square of a factor; of all of them where this one is empty or 0."""
        sizes = [float(f.square().mean().sqrt()) if f.numel() else 0.0 for f in self.factors]
        known = [size for size in sizes if size > 0]
        return sizes[k] or (math.exp(sum(map(math.log, known)) / len(known)) if known else 1.0)

    def _check_bond(self, bond: str) -> None:
        if bond not in self.layout.bonds:
            raise ValueError(f"no bond {bond!r}; this tensor has {', '.join(self.layout.bonds)}. See .ranks.")

    @torch.no_grad()
    def canonicalize_(self, optimizer: Optimizer | None = None) -> None:
        """Brings the factors into canonical form; see `rf.canonicalize_`."""
        if 0 in self.ranks.values():
            return  # A tensor of zeros has no better factors.
        gauge = _gauge.canonical(self.layout, self.format, self.prior, list(self.factors), list(self.log_stds))
        if gauge is not None:
            self._take(gauge, optimizer)

    @torch.no_grad()
    def align_(self, optimizer: Optimizer | None = None) -> None:
        """Makes slices orthogonal and sorted, where the format allows it, whatever that does to the KL."""
        if 0 not in self.ranks.values():
            self._take(_gauge.aligned(self.layout, self.format, list(self.factors), list(self.log_stds)), optimizer)

    def _take(self, gauge: _gauge.Gauge, optimizer: Optimizer | None) -> None:
        for parameters, values in (
            (self.factors, gauge.means),
            (self.log_stds, [v.log() / 2 for v in gauge.variances]),
        ):
            for parameter, value in zip(parameters, values, strict=True):
                parameter.copy_(value)
                parameter.grad = None
                if optimizer is not None:
                    forget_(parameter, optimizer)

    @torch.no_grad()
    def strengths(self, bond: str) -> Float[Tensor, " rank"]:
        """The Frobenius norm of what each slice of a bond adds to dense() (padding included)."""
        return _contract.slice_norms(self.layout, [f.double() for f in self.factors], bond)

    @torch.no_grad()
    def refit_(self, bond: str, index: Tensor, optimizer: Optimizer | None = None) -> None:
        """Keeps the given slices of a bond as `keep_slices_` does, then moves the means as near to dense() as they get.

        Least squares on Gram matrices; dense() is never formed. Standard deviations stay those of the slices kept.
        """
        before = [f.double() for f in self.factors]
        self.keep_slices_(bond, index, optimizer)
        for factor, value in zip(
            self.factors, _decompose.refit(self.layout, before, [f.double() for f in self.factors]), strict=True
        ):
            factor.copy_(value)
            if optimizer is not None:
                forget_(factor, optimizer)

    def fits(self, shapes: Sequence[Sequence[int]]) -> bool:
        """Whether factors of these shapes are this tensor at some ranks: all factors, their modes, bonds that agree."""
        same_dims = [len(shape) for shape in shapes] == [len(axes) for axes in self.layout.factors]
        return same_dims and [tuple(s) for s in shapes] == list(self.layout.factor_shapes(self.layout.ranks(shapes)))

    @classmethod
    def __torch_function__(cls, function: Callable[..., Any], *_: object) -> NoReturn:
        # That this is there also tells nn.TransformerEncoderLayer not to hand `weight` to its fused kernel.
        raise TypeError(f"torch.{function.__name__} was given an rf.LowRankTensor. Pass its .dense() or .sample().")

    def __repr__(self) -> str:
        return f"LowRankTensor({self.shape}, {self.describe()})"

    def describe(self) -> str:
        """Format, modes and ranks in one line, for print(model)."""
        modes = " x ".join("(" + " ".join(map(str, m)) + ")" for m in self.layout.modes)
        return f"{type(self.format).__name__}, modes={modes}, ranks={self.ranks}"

    @torch.no_grad()
    def _initialise(self, std: float, share: float) -> None:
        if self.factors[0].is_meta:
            return
        digits = {name for name in self.layout.axes[0] if self.layout.mode_sizes[name] > 1}
        for axes, factor in zip(self.layout.factors, self.factors, strict=True):
            nn.init.trunc_normal_(factor, a=-_TRUNCATION, b=_TRUNCATION)
            if share and len(digits) > 1 and digits & set(axes):
                same = factor.new_empty(
                    [1 if name in digits else n for name, n in zip(axes, factor.shape, strict=True)]
                )
                nn.init.trunc_normal_(same, a=-_TRUNCATION, b=_TRUNCATION)
                factor.mul_(math.sqrt(1 - share)).add_(same, alpha=math.sqrt(share))
        # Rescaled to the wanted size draw by draw: products of many random factors scatter over decades.
        wide = [f.double() for f in self.factors]
        mean_square = float(_contract.squared_norm(self.layout, wide)) / math.prod(self.layout.padded_shape)
        for factor in self.factors:
            factor.mul_((std / math.sqrt(mean_square)) ** (1 / len(self.factors)))

    @torch.no_grad()
    def _initial_log_stds(self) -> list[Tensor]:
        starts = [self.posterior.initial_log_std(f.detach()) for f in self.factors]
        return [start for start in starts if start is not None]

    def _sampled(self) -> list[Tensor]:
        if self.given:
            return list(self.given)
        if not len(self.log_stds):
            return list(self.factors)
        return [draw(mean, log_std) for mean, log_std in zip(self.factors, self.log_stds, strict=True)]


def _check_kinds(format: object, prior: object, posterior: object) -> None:
    for name, value, kind, example in (
        ("format", format, Format, "rf.TTM(20)"),
        ("prior", prior or HalfCauchy(), Prior, "rf.HalfCauchy()"),
        ("posterior", posterior or MeanField(), Posterior, "rf.MeanField()"),
    ):
        if not isinstance(value, kind):
            shown = f"the class {value.__name__}" if isinstance(value, type) else repr(value)
            raise TypeError(f"{name} must be a rankfall {name} object, got {shown}. Pass for example {example}.")


def _resize_to_incoming(module: nn.Module, state: Mapping[str, Any], prefix: str, *_: object) -> None:
    """Takes the ranks of an incoming state_dict, so that plain load_state_dict works across cuts.

    Only if every factor is there and fits the layout; otherwise torch reports the mismatch itself.
    """
    assert isinstance(module, LowRankTensor)
    shapes = [tuple(state[key].shape) for k in range(len(module.factors)) if (key := f"{prefix}factors.{k}") in state]
    if not module.fits(shapes):
        return
    for parameters in (module.factors, module.log_stds):
        for parameter, shape in zip(parameters, shapes, strict=False):
            resize_(parameter, shape)
