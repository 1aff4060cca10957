# SPDX-License-Identifier: Apache-2.0
"""Embeddings: rows of a low-rank table, alone or reduced over bags."""

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from rankfall._einsum import cost_of, shapes_of
from rankfall._formats import Format
from rankfall._lookup import read, reading_of_ids
from rankfall._posteriors import Posterior
from rankfall._priors import Prior
from rankfall._rows import Bags
from rankfall._sorted_rows import has_compiled_rows
from rankfall._tensor import LowRankTensor
from rankfall.nn._ids import check_ids, check_offsets, check_weights, left
from rankfall.nn._planned import Expected, Planned, counted

_Device: TypeAlias = torch.device | str | None
INITIAL_STD = 1.0
"""torch starts its embeddings from N(0, 1)."""

INITIAL_SHARE = 0.9
"""A digit of a row's id should have something to say from the start, whatever the others are."""


class _Table(Planned):
    """What both share: rows of a low-rank matrix."""

    @property
    def num_embeddings(self) -> int:
        """Number of rows."""
        return self.weight.shape[0]

    @property
    def embedding_dim(self) -> int:
        """Width of a row."""
        return self.weight.shape[1]

    def expected(self, *sizes: int) -> Expected:
        """What a forward pass of so many ids, and of so many rows or bags, does at the current ranks, and its time."""
        (ids, outputs), layout = sizes, self.weight.layout
        factors = list(self.weight.factors)
        way = reading_of_ids(layout, shapes_of(factors), ids, outputs, has_compiled_rows(factors))
        batch = counted(ids, "id") + f" in {counted(outputs, 'bag')}" * (outputs != ids)
        return Expected(f"{batch} by", way.described(), way.cost, cost_of(0, 2 * ids * layout.shape[1]))


class Embedding(_Table):
    """Row `id` of W for every id, W (num_embeddings x embedding_dim) a low-rank tensor; torch.nn.Embedding otherwise.

    Row ids become one digit per row mode. Each distinct id of a call is computed once (on a GPU, which would have to be
    waited for, each id), so time and memory grow with the ids and not with the table, unless the table is so small that
    forming it is cheaper; gradients reach the factors densely, for they are small. In train mode W is one draw from the
    posterior per call, in eval mode its mean.

    Example:
        >>> table = rf.nn.Embedding(10_131_227, 128, format=rf.TTM(16, out_modes=(200, 220, 250), in_modes=(4, 4, 8)))
        >>> table(torch.tensor([[3, 10_131_226], [3, 0]])).shape, sum(f.numel() for f in table.weight.factors)
        (torch.Size([2, 2, 128]), 270080)

    Args:
        num_embeddings: Number of rows. Any number: a prime is padded, and ids of padded rows are refused.
        embedding_dim: Width of a row.
        padding_idx: An id whose row is zeros and learns nothing. (W itself has no row of its own to hold at zero, so
            weight.dense() has other numbers there.) A layer made of a dense one has the row of that.
        format: rf.CP, rf.Tucker, rf.TT, rf.TTM or rf.TR.
        prior: The hyperprior of the prior scales, rf.HalfCauchy() by default.
        posterior: rf.MeanField() by default, or rf.Point().
        device: As for torch.nn.Embedding.
        dtype: As for torch.nn.Embedding.

    Raises:
        ValueError: If the format cannot take the shape, or `padding_idx` is no row; in forward, if ids are no integers.
        IndexError: In forward, if an id is no row. In a compiled graph that is a RuntimeError, and a GPU stops, as it
            does for torch's own.

    Attributes:
        weight: The rf.LowRankTensor.
        padding_row: What `padding_idx` reads, shape (embedding_dim,); None for zeros.
    """

    padding_row: Tensor | None

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        format: Format,
        prior: Prior | None = None,
        posterior: Posterior | None = None,
        device: _Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.padding_idx = _checked_padding(padding_idx, num_embeddings)
        self.weight = _table(num_embeddings, embedding_dim, format, prior, posterior, device, dtype)
        self._has_padding_row()
        _becomes_table(self.weight, self.padding_idx)

    @classmethod
    def from_dense(
        cls, module: nn.Embedding, *, format: Format, prior: Prior | None = None, posterior: Posterior | None = None
    ) -> "Embedding":
        """The layer that reads what `module` reads, as well as `max_rank` allows.

        Example:
            >>> rf.nn.Embedding.from_dense(nn.Embedding(30, 8), format=rf.TT(8)).num_embeddings
            30

        Args:
            module: A torch.nn.Embedding; its weight stays as it is.
            format: As for the class.
            prior: As for the class.
            posterior: As for the class.

        Raises:
            ValueError: If `module` has max_norm or scale_grad_by_freq, which act on rows of their own.
        """
        check_rows_are_plain(module)
        self = cls.around(LowRankTensor.from_dense(module.weight, format, prior=prior, posterior=posterior), module)
        self.keep_padding_of(module)
        return self

    @classmethod
    def around(cls, weight: LowRankTensor, module: nn.Embedding) -> "Embedding":
        """A layer of a weight that is already there, with the padding of a torch.nn.Embedding.

        Example:
            >>> rf.nn.Embedding.around(rf.LowRankTensor((20, 12), rf.TTM(4)), nn.Embedding(20, 12, 3)).padding_idx
            3

        Args:
            weight: A low-rank tensor of two axes, (num_embeddings, embedding_dim).
            module: Where padding_idx is taken from.
        """
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self.padding_idx, self.weight = module.padding_idx, weight
        self._has_padding_row()
        _becomes_table(weight, module.padding_idx)
        return self

    def _has_padding_row(self) -> None:
        self.register_buffer("padding_row", None)
        self.register_load_state_dict_pre_hook(_expect_padding_row)

    def keep_padding_of(self, module: nn.Embedding) -> None:
        """From now on the row of padding is that of a dense table, which may have learned it as an output layer's."""
        row = None if self.padding_idx is None else module.weight[self.padding_idx].detach().clone()
        self.padding_row = row if row is not None and bool(row.any()) else None

    def forward(self, input: Int[Tensor, "*ids"]) -> Float[Tensor, "*ids embedding_dim"]:
        """The rows of the ids."""
        weight, count = self.weight, input.numel()
        check_ids(weight, input, "Embedding")
        self._see(count, count)
        layout = weight.layout
        ids, gone = left(weight, layout, input)
        factors = weight.drawn()
        rows = read(layout, factors, ids)
        if self.padding_idx is not None:
            rows = rows.without(self.padding_idx)
        rows = rows.with_zeros(gone)
        read_rows = _of_type(factors[0].dtype, rows.widened(rows.taken()))
        if self.padding_row is None:
            return read_rows
        return torch.where((input == self.padding_idx).unsqueeze(-1), self.padding_row, read_rows)

    def __repr__(self) -> str:
        padding = "" if self.padding_idx is None else f"padding_idx={self.padding_idx}, "
        return f"Embedding({self.num_embeddings}, {self.embedding_dim}, {padding}{self._described()})"


class EmbeddingBag(_Table):
    """Sum or mean of the rows of each bag of ids, W a low-rank tensor; torch.nn.EmbeddingBag otherwise.

    On a CPU each distinct id of a call is computed once, however many bags hold it, and bags are reduced before the
    rows are widened, where the format lets them; see `Embedding`.

    Example:
        >>> table = rf.nn.EmbeddingBag(1000, 16, mode="sum", format=rf.TT(max_rank=8))
        >>> table(torch.tensor([3, 7, 7, 999]), offsets=torch.tensor([0, 3])).shape
        torch.Size([2, 16])

    Args:
        num_embeddings: Number of rows.
        embedding_dim: Width of a row.
        mode: "mean" or "sum"; an empty bag is zeros.
        padding_idx: An id that is left out of every bag.
        include_last_offset: Whether `offsets` ends with the number of ids.
        format: rf.CP, rf.Tucker, rf.TT, rf.TTM or rf.TR.
        prior: The hyperprior of the prior scales, rf.HalfCauchy() by default.
        posterior: rf.MeanField() by default, or rf.Point().
        device: As for torch.nn.EmbeddingBag.
        dtype: As for torch.nn.EmbeddingBag.

    Raises:
        ValueError: If the format cannot take the shape, `mode` is another, or `padding_idx` is no row; in forward, if
            ids are no integers, offsets do not rise from 0 to the number of ids at most, or weights have another shape.
        NotImplementedError: In forward, if there are weights and the mode is not "sum".
        IndexError: In forward, if an id is no row. In a compiled graph that is a RuntimeError, and a GPU stops, as it
            does for torch's own.

    Attributes:
        weight: The rf.LowRankTensor.
    """

    def __init__(  # noqa: PLR0913  torch's own signature
        self,
        num_embeddings: int,
        embedding_dim: int,
        mode: Literal["mean", "sum"] = "mean",
        padding_idx: int | None = None,
        include_last_offset: bool = False,
        *,
        format: Format,
        prior: Prior | None = None,
        posterior: Posterior | None = None,
        device: _Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.mode, self.include_last_offset = _checked_mode(mode), include_last_offset
        self.padding_idx = _checked_padding(padding_idx, num_embeddings)
        self.weight = _table(num_embeddings, embedding_dim, format, prior, posterior, device, dtype)
        _becomes_table(self.weight, self.padding_idx)

    @classmethod
    def from_dense(
        cls, module: nn.EmbeddingBag, *, format: Format, prior: Prior | None = None, posterior: Posterior | None = None
    ) -> "EmbeddingBag":
        """The layer that reads what `module` reads, as well as `max_rank` allows.

        Example:
            >>> rf.nn.EmbeddingBag.from_dense(nn.EmbeddingBag(30, 8, mode="sum"), format=rf.TT(8)).mode
            'sum'

        Args:
            module: A torch.nn.EmbeddingBag; its weight stays as it is.
            format: As for the class.
            prior: As for the class.
            posterior: As for the class.

        Raises:
            ValueError: If `module` has max_norm or scale_grad_by_freq, which act on rows of their own, or mode "max".
        """
        check_rows_are_plain(module)
        return cls.around(LowRankTensor.from_dense(module.weight, format, prior=prior, posterior=posterior), module)

    @classmethod
    def around(cls, weight: LowRankTensor, module: nn.EmbeddingBag) -> "EmbeddingBag":
        """A layer of a weight that is already there, with the options of a torch.nn.EmbeddingBag.

        Example:
            >>> rf.nn.EmbeddingBag.around(rf.LowRankTensor((20, 12), rf.TTM(4)), nn.EmbeddingBag(20, 12)).mode
            'mean'

        Args:
            weight: A low-rank tensor of two axes, (num_embeddings, embedding_dim).
            module: Where mode, padding_idx and include_last_offset are taken from.

        Raises:
            ValueError: If the mode is "max".
        """
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self.mode, self.include_last_offset = _checked_mode(module.mode), module.include_last_offset
        self.padding_idx, self.weight = module.padding_idx, weight
        _becomes_table(weight, module.padding_idx)
        return self

    def forward(
        self,
        input: Int[Tensor, "*ids"],
        offsets: Int[Tensor, " offsets"] | None = None,
        per_sample_weights: Float[Tensor, "*ids"] | None = None,
    ) -> Float[Tensor, "bags embedding_dim"]:
        """The reduced rows of each bag.

        Args:
            input: Ids, shape (n,) with `offsets`, or (bags, n) for bags of one size.
            offsets: Where each bag begins in a one-dimensional `input`.
            per_sample_weights: A weight for each id, of the shape of `input`, with mode "sum".
        """
        check_offsets(self.weight, input, offsets, self.include_last_offset)
        weight = self.weight
        check_weights(weight, self.mode, input, per_sample_weights)
        check_ids(weight, input, "EmbeddingBag")
        bags = len(input if offsets is None else offsets)
        self._see(input.numel(), bags)
        layout = weight.layout
        ids, gone = left(weight, layout, input)
        factors = weight.drawn()
        rows = read(layout, factors, ids, bags).with_zeros(gone)
        how = Bags(offsets, self.include_last_offset, self.mode, self.padding_idx, per_sample_weights)
        return _of_type(factors[0].dtype, rows.widened(rows.reduced(how)))

    def __repr__(self) -> str:
        return f"EmbeddingBag({self.num_embeddings}, {self.embedding_dim}, {self.mode!r}, {self._described()})"


def _of_type(dtype: torch.dtype, rows: Tensor) -> Tensor:
    """As torch has it, the narrow type of autocast ends at the table."""
    return rows if rows.dtype == dtype else rows.to(dtype)


def _expect_padding_row(layer: nn.Module, state: Mapping[str, Any], prefix: str, *_: object) -> None:
    """Makes room for a row of padding, or forgets it, as an incoming state of this layer has one."""
    assert isinstance(layer, Embedding)
    if layer.padding_idx is None:
        return
    if f"{prefix}padding_row" in state:
        layer.padding_row = layer.weight.factors[0].new_zeros(layer.embedding_dim)
    elif any(name.startswith(f"{prefix}weight.") for name in state):
        layer.padding_row = None


def check_rows_are_plain(module: nn.Embedding | nn.EmbeddingBag) -> None:
    """Refuses options of torch's that act on rows as parameters of their own.

    Raises:
        ValueError: If max_norm or scale_grad_by_freq is set.
    """
    for option in ("max_norm", "scale_grad_by_freq"):
        if getattr(module, option):
            raise ValueError(
                f"{option} acts on each row as a parameter of its own, and the rows of a low-rank table share theirs. "
                f"Make the {type(module).__name__} without {option}."
            )


def _table(
    rows: int,
    width: int,
    format: Format,
    prior: Prior | None,
    posterior: Posterior | None,
    device: _Device,
    dtype: torch.dtype | None,
) -> LowRankTensor:
    return LowRankTensor(
        (rows, width),
        format,
        prior=prior,
        posterior=posterior,
        initial_std=INITIAL_STD,
        initial_share=INITIAL_SHARE,
        device=device,
        dtype=dtype,
    )


def _becomes_table(weight: LowRankTensor, padding_idx: int | None) -> None:
    weight.is_table = True
    # Padding that is not the first row, as the last one is in some vocabularies, would go with the rows. One layer of
    # a shared table is enough to say so.
    weight.keeps_all_rows |= padding_idx not in (None, 0)


def _checked_padding(padding_idx: int | None, rows: int) -> int | None:
    if padding_idx is None:
        return None
    if not -rows <= padding_idx < rows:
        raise ValueError(f"padding_idx must be a row, from {-rows} to {rows - 1}, got {padding_idx}.")
    return padding_idx % rows


def _checked_mode(mode: str) -> Literal["mean", "sum"]:
    if mode not in ("mean", "sum"):
        raise ValueError(
            f"mode must be 'mean' or 'sum', got {mode!r}. Use rf.nn.Embedding and reduce its rows yourself."
        )
    return mode  # pyright: ignore[reportReturnType]
