# SPDX-License-Identifier: Apache-2.0
"""Convolutions whose kernel is a low-rank tensor."""

import math
from typing import Any, ClassVar, Literal, TypeAlias, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rankfall._convolve import Geometry, convolve, dense_conv_cost, plan_of_points
from rankfall._formats import Format
from rankfall._posteriors import Posterior
from rankfall._priors import Prior
from rankfall._tensor import LowRankTensor
from rankfall.nn._planned import Expected, Planned, counted

_Size: TypeAlias = int | tuple[int, ...]
_Padding: TypeAlias = _Size | Literal["same", "valid"]
_PaddingMode: TypeAlias = Literal["zeros", "reflect", "replicate", "circular"]


_Layer = TypeVar("_Layer", bound="_Conv")  # Not typing.Self: checkers of single methods refuse it.


class _Conv(Planned):
    """What the convolutions share; `_dense` is torch's layer, which checks and completes their arguments."""

    _dense: ClassVar[type[nn.Conv1d | nn.Conv2d | nn.Conv3d]]

    def __init__(  # noqa: PLR0913, PLR0917  torch's own signature
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: _Size,
        stride: _Size = 1,
        padding: _Padding = 0,
        dilation: _Size = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: _PaddingMode = "zeros",
        *,
        format: Format,
        prior: Prior | None = None,
        posterior: Posterior | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        make: Any = self._dense
        like = make(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device="meta"
        )
        self.weight = LowRankTensor(
            like.weight.shape,
            format,
            prior=prior,
            posterior=posterior,
            initial_std=math.sqrt(2 * out_channels / max(like.weight.numel(), 1)),
            device=device,
            dtype=dtype,
        )
        self._take_options(like)
        self.bias = nn.Parameter(torch.zeros(out_channels, device=device, dtype=dtype)) if bias else None

    @classmethod
    def from_dense(
        cls: type[_Layer],
        module: nn.Module,
        *,
        format: Format,
        prior: Prior | None = None,
        posterior: Posterior | None = None,
    ) -> _Layer:
        """The layer that computes what torch's layer computes, as well as `max_rank` allows; the bias is shared.

        Example:
            >>> layer = rf.nn.Conv2d.from_dense(nn.Conv2d(4, 6, 3), format=rf.Tucker(4))
            >>> layer(torch.zeros(2, 4, 8, 8)).shape
            torch.Size([2, 6, 6, 6])

        Args:
            module: The torch layer of the same name; its weight stays as it is.
            format: As for the class.
            prior: As for the class.
            posterior: As for the class.
        """
        weight = module.get_parameter("weight")
        return cls.around(LowRankTensor.from_dense(weight, format, prior=prior, posterior=posterior), module)

    @classmethod
    def around(cls: type[_Layer], weight: LowRankTensor, module: nn.Module) -> _Layer:
        """A layer of a kernel that is already there, with the options and the bias of torch's layer.

        Example:
            >>> kernel = rf.LowRankTensor((6, 4, 3), rf.CP(5))
            >>> rf.nn.Conv1d.around(kernel, nn.Conv1d(4, 6, 3, stride=2)).stride
            (2,)

        Args:
            weight: A low-rank tensor of the shape of the layer's weight.
            module: The torch layer of the same name.
        """
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self.weight, self.bias = weight, module._parameters["bias"]
        self._take_options(module)
        return self

    def _take_options(self, like: Any) -> None:  # noqa: ANN401  one of three classes without a common public one
        self.in_channels: int = like.in_channels
        self.out_channels: int = like.out_channels
        self.kernel_size: tuple[int, ...] = like.kernel_size
        self.stride: tuple[int, ...] = like.stride
        self.padding: tuple[int, ...] | str = like.padding
        self.dilation: tuple[int, ...] = like.dilation
        self.groups: int = like.groups
        self.padding_mode: str = like.padding_mode

    @property
    def geometry(self) -> Geometry:
        """How the kernel moves, with the padding in numbers."""
        if self.padding == "same":
            total = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
            sides = tuple((n // 2, n - n // 2) for n in total)
        elif isinstance(self.padding, str):
            sides = ((0, 0),) * len(self.stride)
        else:
            sides = tuple((n, n) for n in self.padding)
        return Geometry(self.stride, sides, self.dilation, self.groups, self.padding_mode)

    def forward(self, input: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The convolution of the input, shape (batch, in_channels, *spatial) or (in_channels, *spatial)."""
        dims = len(self.stride)
        if input.dim() not in (dims + 1, dims + 2) or input.shape[-dims - 1] != self.in_channels:
            where = repr(self.weight.path) if self.weight.path else type(self).__name__
            spatial = ", ".join("length" if dims == 1 else f"size{k + 1}" for k in range(dims))
            raise ValueError(
                f"{where} has in_channels={self.in_channels}, but the input has shape {tuple(input.shape)}. "
                f"Give it the shape (batch, {self.in_channels}, {spatial})."
            )
        batched = input if input.dim() == dims + 2 else input.unsqueeze(0)
        self._see(batched.numel() // self.in_channels)
        y = convolve(self.weight.layout, self.weight.drawn(), batched, self.geometry)
        y = y if input.dim() == dims + 2 else y.squeeze(0)
        # Under autocast y has the narrow type, which the bias must not widen again.
        return y if self.bias is None else y + self.bias.to(y.dtype).reshape(-1, *[1] * dims)

    def expected(self, *sizes: int) -> Expected:
        """What a forward pass over so many points (batch times positions) does at the current ranks, and its time."""
        (points,), layout, geometry = sizes, self.weight.layout, self.geometry
        plan = plan_of_points(layout, tuple(self.weight.ranks.items()), geometry, points)
        dense = dense_conv_cost(layout, geometry, points)
        return Expected(counted(points, "point"), plan.described(), plan.cost, dense)

    def __repr__(self) -> str:
        ones, none = (1,) * len(self.stride), (0,) * len(self.stride)
        usual = {"padding": none, "dilation": ones, "groups": 1, "padding_mode": "zeros"}
        options = {name: getattr(self, name) for name, value in usual.items() if getattr(self, name) != value}
        shown = "".join(f"{name}={value}, " for name, value in {"stride": self.stride, **options}.items())
        return (
            f"{type(self).__name__}({self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, {shown}"
            f"bias={self.bias is not None}, {self._described()})"
        )


class Conv1d(_Conv):
    """1D convolution with W (out_channels x in_channels / groups x length) low-rank; torch.nn.Conv1d otherwise.

    See `Conv2d` for how it is computed and for the arguments.

    Example:
        >>> layer = rf.nn.Conv1d(16, 32, 5, padding="same", format=rf.CP(max_rank=8))
        >>> layer(torch.zeros(2, 16, 40)).shape, layer.weight.shape
        (torch.Size([2, 32, 40]), (32, 16, 5))
    """

    _dense = nn.Conv1d


class Conv2d(_Conv):
    """2D convolution with W (out_channels x in_channels / groups x height x width) low-rank; torch.nn.Conv2d otherwise.

    y[o] = sum over i of the cross-correlation of x[i] with W[o, i], plus bias[o]

    Formats with factors of channels alone (CP, Tucker, TT, TR) run as a 1 x 1 convolution to few channels, a small
    convolution there, and a 1 x 1 convolution back, wherever that is cheaper at the current ranks than forming W; a
    TT-matrix and grouped convolutions form it. In train mode W is one draw from the posterior per call, in eval mode
    its mean. W starts with the variance 2 / fan-in (He), the bias at zero.

    Example:
        >>> layer = rf.nn.Conv2d(16, 32, 3, stride=2, padding=1, format=rf.Tucker(max_rank=8))
        >>> layer(torch.zeros(2, 16, 28, 28)).shape, layer.weight.shape
        (torch.Size([2, 32, 14, 14]), (32, 16, 3, 3))

    Args:
        in_channels: As for torch.nn.Conv2d, like all up to `padding_mode`.
        out_channels: Channels of the output.
        kernel_size: Size of the kernel.
        stride: Steps of the kernel.
        padding: Numbers, "same" or "valid".
        dilation: Distance between the kernel's points.
        groups: Into how many parts the channels fall that do not see each other.
        bias: Whether a dense bias is added; it has no low-rank prior.
        padding_mode: "zeros", "reflect", "replicate" or "circular".
        format: rf.CP, rf.Tucker, rf.TT, rf.TTM or rf.TR.
        prior: The hyperprior of the prior scales, rf.HalfCauchy() by default.
        posterior: rf.MeanField() by default, or rf.Point().
        device: As for torch.nn.Conv2d.
        dtype: As for torch.nn.Conv2d.

    Raises:
        ValueError: If the format cannot take the shape, or groups do not divide the channels; in forward, if the input
            has other channels.

    Attributes:
        weight: The rf.LowRankTensor; weight.dense() has the shape of torch's weight.
        bias: The bias parameter, or None.
    """

    _dense = nn.Conv2d


class Conv3d(_Conv):
    """3D convolution with W (out_channels x in_channels / groups x the kernel) low-rank; torch.nn.Conv3d otherwise.

    See `Conv2d` for how it is computed and for the arguments.

    Example:
        >>> layer = rf.nn.Conv3d(4, 8, 3, format=rf.TR(max_rank=2))
        >>> layer(torch.zeros(1, 4, 6, 6, 6)).shape, layer.weight.shape
        (torch.Size([1, 8, 4, 4, 4]), (8, 4, 3, 3, 3))
    """

    _dense = nn.Conv3d
