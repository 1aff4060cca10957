# SPDX-License-Identifier: Apache-2.0
"""Attention whose projections are low-rank tensors."""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankfall._formats import Format
from rankfall._posteriors import Posterior
from rankfall._priors import Prior
from rankfall._tensor import LowRankTensor
from rankfall.nn._formed import Formed, blocks_apart, others_of

_STACKED, _OUT = "in_proj_weight", "out_proj.weight"
_APART = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
_DIMS = 3  # Of a batch of sequences.


class MultiheadAttention(Formed):
    """Multi-head attention with low-rank projections; torch.nn.MultiheadAttention otherwise.

    in_proj_weight (3 embed_dim x embed_dim), with query, key and value as a mode of its own, or q_proj_weight,
    k_proj_weight and v_proj_weight where key or value have another width, and out_proj.weight are low-rank tensors.
    They are drawn from the posterior once per call in train mode and at its mean in eval mode, in the order of torch's
    parameters. Where a sequence attends to itself and the attention weights are not asked for, as in torch's
    transformer layers, it is multiplied by the factors in the cheapest way (`rf.nn.Linear`); otherwise the weights are
    formed, and torch's own code does the rest.

    Example:
        >>> layer = rf.nn.MultiheadAttention(32, 4, batch_first=True, format=rf.TT(max_rank=8))
        >>> x = torch.zeros(2, 5, 32)
        >>> layer(x, x, x)[0].shape, layer.in_proj_weight.dense().shape
        (torch.Size([2, 5, 32]), torch.Size([96, 32]))

    Args:
        embed_dim: As for torch.nn.MultiheadAttention, like all up to `batch_first`.
        num_heads: How many heads attend side by side.
        dropout: Of the attention weights, in train mode.
        bias: Whether there are biases; they have no low-rank prior.
        add_bias_kv: Whether keys and values get one more learned row.
        add_zero_attn: Whether they get one more row of zeros.
        kdim: Width of keys, None for embed_dim.
        vdim: Width of values, None for embed_dim.
        batch_first: Whether the batch is the first dimension.
        format: rf.CP, rf.Tucker, rf.TT, rf.TTM or rf.TR; modes of its own hold for the weights that they fit.
        prior: The hyperprior of the prior scales, rf.HalfCauchy() by default.
        posterior: rf.MeanField() by default, or rf.Point().
        device: As for torch.nn.MultiheadAttention.
        dtype: As for torch.nn.MultiheadAttention.

    Raises:
        ValueError: If the format cannot take a weight.

    Attributes:
        in_proj_weight: The rf.LowRankTensor of torch's weight of that name; likewise out_proj.weight.
    """

    # Also what torch's transformer layers look at before they choose a kernel.
    _options = (
        "embed_dim",
        "kdim",
        "vdim",
        "num_heads",
        "dropout",
        "batch_first",
        "head_dim",
        "add_zero_attn",
        "_qkv_same_embed_dim",
    )

    def __init__(  # noqa: PLR0913, PLR0917  torch's own signature
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        *,
        format: Format,
        prior: Prior | None = None,
        posterior: Posterior | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        # Made for real, since its biases start as torch starts them; its weights are dropped.
        made = nn.MultiheadAttention(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype
        )
        weights = {
            name: LowRankTensor(
                made.get_parameter(name).shape,
                projections_apart(made, name, format),
                prior=prior,
                posterior=posterior,
                initial_std=std_of(made, name),
                device=device,
                dtype=dtype,
            )
            for name in weight_names(made)
        }
        self._take(weights, made)

    @classmethod
    def from_dense(
        cls,
        module: nn.MultiheadAttention,
        *,
        format: Format,
        prior: Prior | None = None,
        posterior: Posterior | None = None,
    ) -> "MultiheadAttention":
        """The layer that computes what torch's layer computes, as well as `max_rank` allows; biases are shared.

        Example:
            >>> rf.nn.MultiheadAttention.from_dense(nn.MultiheadAttention(8, 2), format=rf.TT(9)).out_proj.weight.shape
            (8, 8)

        Args:
            module: A torch.nn.MultiheadAttention; its weights stay as they are.
            format: As for the class.
            prior: As for the class.
            posterior: As for the class.
        """
        weights = {
            name: LowRankTensor.from_dense(
                module.get_parameter(name), projections_apart(module, name, format), prior=prior, posterior=posterior
            )
            for name in weight_names(module)
        }
        return cls.around(weights, module)

    @classmethod
    def around(cls, weights: Mapping[str, LowRankTensor], module: nn.MultiheadAttention) -> "MultiheadAttention":
        """A layer of weights that are already there, with the options and the biases of torch's layer.

        Example:
            >>> stacked, out = rf.LowRankTensor((24, 8), rf.TT(4)), rf.LowRankTensor((8, 8), rf.TT(4))
            >>> parts = {"in_proj_weight": stacked, "out_proj.weight": out}
            >>> rf.nn.MultiheadAttention.around(parts, nn.MultiheadAttention(8, 2)).num_heads
            2

        Args:
            weights: A low-rank tensor for each of torch's weight matrices, by its name.
            module: A torch.nn.MultiheadAttention.
        """
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self._take(weights, module)
        return self

    def _take(self, weights: Mapping[str, LowRankTensor], module: nn.MultiheadAttention) -> None:
        own = others_of(module, weights)
        like = nn.MultiheadAttention(
            module.embed_dim,
            module.num_heads,
            module.dropout,
            bias=module.in_proj_bias is not None,
            add_bias_kv=module.bias_k is not None,
            add_zero_attn=module.add_zero_attn,
            kdim=module.kdim,
            vdim=module.vdim,
            batch_first=module.batch_first,
            device="meta",
        )
        self._hold(like, weights, own)
        for name in ("in_proj_bias", "bias_k", "bias_v"):
            if name not in own:
                self.register_parameter(name, None)
        if "out_proj.bias" not in own:
            self.get_submodule("out_proj").register_parameter("bias", None)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """The attended values and, with `need_weights`, the attention weights, as torch's layer gives them."""
        if self._is_plain(query, key, value) and not need_weights and self._fit(query, attn_mask, key_padding_mask):
            if is_causal and key_padding_mask is None and attn_mask is not None:
                return self._attend(query, None, is_causal=True), None  # The mask says no more than the hint then.
            if not is_causal or attn_mask is not None:
                return self._attend(query, self._joint_mask(query, attn_mask, key_padding_mask)), None
        return self._run(
            query,
            key,
            value,
            key_padding_mask=key_padding_mask,
            need_weights=need_weights,
            attn_mask=attn_mask,
            average_attn_weights=average_attn_weights,
            is_causal=is_causal,
        )

    def _is_plain(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        """Whether a batch of sequences attends to itself, by three projections of one weight and nothing besides."""
        is_sequences = query is key is value and query.dim() == _DIMS and not query.is_nested
        no_more_rows = self.bias_k is None and not self.add_zero_attn
        return is_sequences and no_more_rows and self._qkv_same_embed_dim and query.shape[-1] == self.embed_dim

    def _fit(self, x: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None) -> bool:
        """Whether masks are of a shape and type that torch takes; what it thinks of others it says itself."""
        batch, length = self._sizes(x)
        square = ((length, length), (batch * self.num_heads, length, length))
        given = [(m, s) for m, s in ((attn_mask, square), (key_padding_mask, ((batch, length),))) if m is not None]
        return all(m.shape in shapes and (m.dtype == torch.bool or m.is_floating_point()) for m, shapes in given)

    def _sizes(self, x: Tensor) -> tuple[int, int]:
        first, second, _ = x.shape
        return (first, second) if self.batch_first else (second, first)

    def _joint_mask(self, x: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None) -> Tensor | None:
        """What is added to the scores, for shape (batch, heads, length, length); minus infinity where a mask is set."""
        batch, length = self._sizes(x)
        masks = []
        if attn_mask is not None:
            masks.append(attn_mask if attn_mask.dim() < _DIMS else attn_mask.view(batch, -1, length, length))
        if key_padding_mask is not None:
            masks.append(key_padding_mask.view(batch, 1, 1, length))
        added = [
            torch.zeros_like(m, dtype=x.dtype).masked_fill_(m, -math.inf) if m.dtype == torch.bool else m.to(x.dtype)
            for m in masks
        ]
        return sum(added[1:], added[0]) if added else None

    def _attend(self, x: Tensor, mask: Tensor | None, *, is_causal: bool = False) -> Tensor:
        to_heads, back = ((0, 2, 1, 3),) * 2 if self.batch_first else ((1, 2, 0, 3), (2, 0, 1, 3))
        parts = self._project(_STACKED, "in_proj_bias", x).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)).permute(to_heads) for part in parts)
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal)
        return self._project(_OUT, "out_proj.bias", attended.permute(back).flatten(2))

    def _project(self, weight: str, bias: str, x: Tensor) -> Tensor:
        tensor = self.get_submodule(weight)
        assert isinstance(tensor, LowRankTensor)
        return tensor.linear(x, self._parameter(bias) if bias in self._others else None)

    def merge_masks(self, *masks: Any) -> Any:  # noqa: ANN401  torch's helper of its transformer layers
        """What torch's method of that name gives."""
        return self.like.merge_masks(*masks)

    def __repr__(self) -> str:
        return f"MultiheadAttention({self.embed_dim}, {self.num_heads}){self._extra_lines()}"


def weight_names(module: nn.Module) -> tuple[str, ...]:
    """The weight matrices of a torch.nn.MultiheadAttention, in its order, also if it computes them from others."""
    return (*((_STACKED,) if module._qkv_same_embed_dim else _APART), _OUT)


def projections_apart(module: nn.Module, name: str, format: Format) -> Format:
    """The format of one weight: query, key and value are a mode where they are stacked."""
    weight = module.get_parameter(name)
    return blocks_apart(format, 3 if name == _STACKED else 1, (weight.shape[0], weight.shape[1]))


def std_of(module: nn.Module, name: str) -> float:
    """Root mean square of a weight as torch starts it."""
    rows, width = module.get_parameter(name).shape
    return 1 / math.sqrt(3 * width) if name == _OUT else math.sqrt(2 / (rows + width))
