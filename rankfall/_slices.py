# SPDX-License-Identifier: Apache-2.0
"""What can be done to the slices and the rows of a low-rank tensor while it is trained, optimizer state included."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import Optimizer

from rankfall import _contract, _decompose, _gauge
from rankfall._formats import Format
from rankfall._layout import Layout
from rankfall._posteriors import Posterior
from rankfall._priors import Prior
from rankfall._resize import forget_, grow_, keep_


class Sliced(nn.Module):
    """Factors whose slices can be removed, added, turned and measured; `LowRankTensor` says what they are."""

    format: Format
    prior: Prior
    posterior: Posterior
    factors: nn.ParameterList
    log_stds: nn.ParameterList
    is_table: bool
    keeps_all_rows: bool
    _leading: tuple[int, int]

    @property
    def layout(self) -> Layout:
        """The format applied to the rows that are left, read off the factors as ranks are."""
        raise NotImplementedError

    @property
    def rows(self) -> int:
        """How many rows of the first axis are left; all that come after are zeros."""
        return self.layout.shape[0]

    @property
    def leading_rows(self) -> int:
        """How many rows have the same leading digit, and go together; also when only one such digit is left."""
        raise NotImplementedError

    @property
    def may_lose_rows(self) -> bool:
        """Whether last rows may go: of a table, unless a layer that reads it has padding behind the first row."""
        return self.is_table and not self.keeps_all_rows

    @property
    def ranks(self) -> dict[str, int]:
        """The current rank of every bond."""
        return self.layout.ranks([f.shape for f in self.factors])

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

    def keep_rows_(self, rows: int, optimizer: Optimizer | None = None) -> None:
        """Keeps the first rows and removes all later ones, which are zeros from then on; for the tables of embeddings.

        Entries of factors go where a row has a leading digit of its own, so that as many rows stay as have the same
        leading digits as the first `rows`: exactly those with `out_modes` (rows, 1, ...) or one mode. Gradients and
        optimizer state go with them; `shape` and ids stay what they are.

        Example:
            >>> table = rf.nn.Embedding(1000, 16, format=rf.TTM(4, out_modes=(1000, 1), in_modes=(1, 16)))
            >>> table.weight.keep_rows_(300)
            >>> [tuple(f.shape) for f in table.weight.factors], table(torch.tensor([999])).any().item()
            ([(300, 4), (4, 16)], False)

        Args:
            rows: How many rows stay at least.
            optimizer: The optimizer that owns the factors, if there is one.

        Raises:
            ValueError: If this is no table, a layer has padding in its midst, or there are not so many rows.
        """
        if not self.is_table:
            raise ValueError("only the table of an rf.nn.Embedding or EmbeddingBag loses rows. Cut ranks instead.")
        if self.keeps_all_rows:
            raise ValueError("a layer of this table has padding behind the first row, which would go with the rows.")
        if not 1 <= rows <= self.rows:
            raise ValueError(f"rows must be from 1 to the {self.rows} that are left, got {rows}.")
        factor, dim = self._leading
        index = torch.arange(-(-rows // self.leading_rows), device=self.factors[factor].device)
        for parameters in (self.factors, self.log_stds) if len(self.log_stds) else (self.factors,):
            keep_(parameters[factor], dim, index, optimizer)
        assert self.rows >= rows, "the layout is today's before anything is compiled"

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
            self._take(
                _gauge.aligned(self.layout, self.format, self.prior, list(self.factors), list(self.log_stds)), optimizer
            )

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

        Least squares on Gram matrices, on the CPU; dense() is never formed. Standard deviations stay those of the
        slices kept.
        """
        before = [f.cpu().double() for f in self.factors]
        self.keep_slices_(bond, index, optimizer)
        after = _decompose.refit(self.layout, before, [f.cpu().double() for f in self.factors])
        for factor, value in zip(self.factors, after, strict=True):
            factor.copy_(value)
            if optimizer is not None:
                forget_(factor, optimizer)
