# SPDX-License-Identifier: Apache-2.0
"""A low-rank tensor with a shrinkage prior: the one place where factors, prior and posterior meet."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from rankfall import _contract, _decompose, _forming, _matmul
from rankfall._divergence import Factors, governed_moments, kl_of_factors, per_slice, second_moments
from rankfall._formats import Format
from rankfall._layout import Layout, cut_to
from rankfall._posteriors import MeanField, Posterior, draw
from rankfall._priors import HalfCauchy, Prior
from rankfall._resize import resize_
from rankfall._slices import Sliced

_TRUNCATION = 2.0  # Factors start from a normal cut off at this many standard deviations.


class LowRankTensor(Sliced):
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
        is_table: Whether this is the table of an embedding, of which last rows may be gone; see `keep_rows_`.
        keeps_all_rows: Whether a layer that reads it has padding of its own behind the first row.
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
        self.is_table = self.keeps_all_rows = False
        self._whole = format.layout(shape)
        self._leading, self._digits = self._whole.leading, self._whole.leading_digits
        self._left = self._digits, self._whole
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
        return self._whole.shape

    @property
    def dtype(self) -> torch.dtype:
        """The type of the factors, as code that asks a weight for its type expects it."""
        return _held(self.factors)[0].dtype

    @property
    def device(self) -> torch.device:
        """Where the factors are."""
        return _held(self.factors)[0].device

    @property
    def layout(self) -> Layout:
        """The format applied to the rows that are left, read off the factors as ranks are."""
        if not self.is_table:
            return self._whole
        factor, dim = self._leading
        digits = _held(self.factors)[factor].shape[dim]
        if digits != self._left[0]:  # Kept, since a compiled graph takes it as it is here.
            self._left = digits, self._whole if digits == self._digits else cut_to(self._whole, digits)
        return self._left[1]

    @property
    def leading_rows(self) -> int:
        """How many rows have the same leading digit, and go together; also when only one such digit is left."""
        return self._whole.leading_rows

    def dense(self) -> Float[Tensor, "*shape"]:
        """The tensor at the posterior mean; exact, since every format is linear in each of its factors."""
        return self._filled_up(_forming.dense(self.layout, list(self.factors)), 0)

    def sample(self) -> Float[Tensor, "*shape"]:
        """The tensor at one draw of all factors from the posterior; dense() with rf.Point."""
        return self._filled_up(_forming.dense(self.layout, self._sampled()), 0)

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
        if self.rows == self.shape[0]:
            return _matmul.linear(self.layout, self.drawn(), x, bias)
        y = self._filled_up(_matmul.linear(self.layout, self.drawn(), x), -1)
        return y if bias is None else y + bias.to(y.dtype)

    def drawn(self) -> list[Tensor]:
        """The factors that a layer's forward uses: one draw from the posterior in train mode, its mean in eval mode."""
        return self._sampled() if self.training else _held(self.factors)

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

    def fits(self, shapes: Sequence[Sequence[int]]) -> bool:
        """Whether factors of these shapes are this tensor at some ranks: all factors, their modes, bonds that agree."""
        layout = self._whole
        if [len(shape) for shape in shapes] != [len(axes) for axes in layout.factors]:
            return False
        factor, dim = self._leading
        if self.is_table and 1 <= shapes[factor][dim] < self._digits:
            layout = cut_to(layout, shapes[factor][dim])
        return [tuple(s) for s in shapes] == list(layout.factor_shapes(layout.ranks(shapes)))

    @classmethod
    def __torch_function__(cls, function: Callable[..., Any], *_: object) -> NoReturn:
        # That this is there also tells nn.TransformerEncoderLayer not to hand `weight` to its fused kernel.
        raise TypeError(f"torch.{function.__name__} was given an rf.LowRankTensor. Pass its .dense() or .sample().")

    def __repr__(self) -> str:
        return f"LowRankTensor({self.shape}, {self.describe()})"

    def describe(self) -> str:
        """Format, modes and ranks in one line, for print(model)."""
        modes = " x ".join("(" + " ".join(map(str, m)) + ")" for m in self.layout.modes)
        rows = f", rows={self.rows} of {self.shape[0]}" if self.rows < self.shape[0] else ""
        return f"{type(self.format).__name__}, modes={modes}, ranks={self.ranks}{rows}"

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

    def _filled_up(self, values: Tensor, dim: int) -> Tensor:
        """Zeros in place of the rows that are gone, which stand along a dimension."""
        missing = self.shape[0] - self.rows
        return values if not missing else F.pad(values.movedim(dim, -1), (0, missing)).movedim(-1, dim)

    def _sampled(self) -> list[Tensor]:
        if self.given:
            return list(self.given)
        if not len(self.log_stds):
            return _held(self.factors)
        return [draw(mean, log_std) for mean, log_std in zip(self.factors, self.log_stds, strict=True)]


def _held(parameters: nn.ParameterList) -> list[Tensor]:
    """The parameters of a list, past its own way to name each of them, which takes longer than to read a few rows."""
    found = parameters._parameters
    # Some wrappers put plain tensors in their place.
    return list(found.values()) if len(found) == len(parameters) else list(parameters)  # pyright: ignore


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
    before = [log_std.shape for log_std in module.log_stds]
    for parameters in (module.factors, module.log_stds):
        for parameter, shape in zip(parameters, shapes, strict=False):
            resize_(parameter, shape)
    for k, (log_std, shape) in enumerate(zip(module.log_stds, before, strict=True)):
        # A state of a Point posterior has none: where ranks are others, they start afresh.
        if log_std.shape != shape and f"{prefix}log_stds.{k}" not in state:
            start = module.posterior.initial_log_std(state[f"{prefix}factors.{k}"].detach())
            assert start is not None, "who has log stds has a start for them"
            log_std.data.copy_(start)
    assert module.rows <= module.shape[0], "the layout is today's before anything is compiled"
