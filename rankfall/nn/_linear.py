# SPDX-License-Identifier: Apache-2.0
"""The linear layer."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rankfall._einsum import shapes_of
from rankfall._formats import Format
from rankfall._matmul import dense_cost, way_of_rows
from rankfall._posteriors import Posterior
from rankfall._priors import Prior
from rankfall._tensor import LowRankTensor
from rankfall.nn._planned import Expected, Planned, counted


class Linear(Planned):
    """y = x @ W.T + bias with W (out_features x in_features) a low-rank tensor; torch.nn.Linear otherwise.

    In train mode W is one draw from the posterior per call, the same for the whole batch; in eval mode its mean. W
    starts with the variance 2 / in_features (He) of a dense layer before a ReLU, the bias at zero.

    Example:
        >>> layer = rf.nn.Linear(784, 512, format=rf.TTM(max_rank=20))
        >>> layer(torch.zeros(32, 784)).shape, layer.weight.dense().shape
        (torch.Size([32, 512]), torch.Size([512, 784]))

    Args:
        in_features: Size of the last dimension of the input.
        out_features: Size of the last dimension of the output.
        bias: Whether a dense bias is added; it has no low-rank prior.
        format: rf.CP, rf.Tucker, rf.TT, rf.TTM or rf.TR.
        prior: The hyperprior of the prior scales, rf.HalfCauchy() by default.
        posterior: rf.MeanField() by default, or rf.Point().
        device: As for torch.nn.Linear.
        dtype: As for torch.nn.Linear.

    Raises:
        ValueError: If the format cannot take the shape; in forward, if the input has another width.

    Attributes:
        weight: The rf.LowRankTensor; weight.dense() has the shape of torch's weight.
        bias: The bias parameter, or None.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        format: Format,
        prior: Prior | None = None,
        posterior: Posterior | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = LowRankTensor(
            (out_features, in_features),
            format,
            prior=prior,
            posterior=posterior,
            initial_std=math.sqrt(2 / in_features) if in_features >= 1 else None,
            device=device,
            dtype=dtype,
        )
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None

    @classmethod
    def from_dense(
        cls, module: nn.Linear, *, format: Format, prior: Prior | None = None, posterior: Posterior | None = None
    ) -> "Linear":
        """The layer that computes what `module` computes, as well as `max_rank` allows; the bias is shared with it.

        Example:
            >>> layer = rf.nn.Linear.from_dense(nn.Linear(12, 20), format=rf.TTM(max_rank=20))
            >>> layer.weight.ranks["r1"] <= 20
            True

        Args:
            module: A torch.nn.Linear; its weight stays as it is.
            format: As for the class.
            prior: As for the class.
            posterior: As for the class.
        """
        weight = LowRankTensor.from_dense(module.weight, format, prior=prior, posterior=posterior)
        return cls.around(weight, module.bias)

    @classmethod
    def around(cls, weight: LowRankTensor, bias: nn.Parameter | None = None) -> "Linear":
        """A layer of a weight that is already there, for example one that two layers share.

        Example:
            >>> rf.nn.Linear.around(rf.LowRankTensor((20, 12), rf.TTM(4))).in_features
            12

        Args:
            weight: A low-rank tensor of two axes, (out_features, in_features).
            bias: Shape (out_features,), or None.
        """
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.weight, self.bias = weight, bias
        return self

    def forward(self, input: Float[Tensor, "*batch in_features"]) -> Float[Tensor, "*batch out_features"]:
        """Computes input @ W.T + bias."""
        y = self.weight.linear(input, self.bias)
        self._see(math.prod(input.shape[:-1]))
        return y

    def expected(self, *sizes: int) -> Expected:
        """What a forward pass of so many rows does at the current ranks, and the time it should take."""
        (rows,), layout = sizes, self.weight.layout
        way = way_of_rows(layout, shapes_of(self.weight.factors), rows)
        return Expected(counted(rows, "row"), way.described(layout), way.cost, dense_cost(layout, rows))

    def __repr__(self) -> str:
        return f"Linear({self.in_features}, {self.out_features}, bias={self.bias is not None}, {self._described()})"
