# SPDX-License-Identifier: Apache-2.0
"""Recurrent layers whose weights are low-rank tensors."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from rankfall._cudnn import cudnn_where_right
from rankfall._einsum import rounded, shapes_of
from rankfall._formats import Format
from rankfall._matmul import least_effort, linear
from rankfall._posteriors import Posterior
from rankfall._priors import Prior
from rankfall._products import varying
from rankfall._recurrence import (
    Clock,
    Recurrent,
    Sequences,
    as_given,
    gru_steps,
    lstm_steps,
    mirrored,
    recurrent_of,
    rows_of,
)
from rankfall._tensor import LowRankTensor
from rankfall.nn._formed import Formed, blocks_apart, others_of

_CHEAP_INPUTS = 0.5  # Of the dense work on inputs: torch's fused kernel takes a fifth less time for the steps.

_Layer = TypeVar("_Layer", bound="_Recurrent")  # Not typing.Self: checkers of single methods refuse it.


class _Recurrent(Formed):
    """What LSTM and GRU share; `_dense` is torch's layer, `_gates` how many blocks its weights stack."""

    _options = (
        "mode",
        "input_size",
        "hidden_size",
        "num_layers",
        "bias",
        "batch_first",
        "dropout",
        "bidirectional",
        "proj_size",
    )
    _dense: ClassVar[type[nn.LSTM | nn.GRU]]
    _gates: ClassVar[int]

    def __init__(  # noqa: PLR0913  torch's own signature
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        *,
        format: Format,
        prior: Prior | None = None,
        posterior: Posterior | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if proj_size:
            raise ValueError(f"proj_size must be 0, got {proj_size}. Put an rf.nn.Linear after the layer instead.")
        like = self._dense(
            input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device="meta"
        )
        weights, bound = {}, 1 / math.sqrt(hidden_size)
        for name in weight_names(like):
            shape = tuple(like.get_parameter(name).shape)
            weights[name] = LowRankTensor(
                shape,
                gates_apart(like, name, format),
                prior=prior,
                posterior=posterior,
                initial_std=std_of(like),
                device=device,
                dtype=dtype,
            )
        biases = {
            name: nn.Parameter(torch.empty(p.shape, device=device, dtype=dtype).uniform_(-bound, bound))
            for name, p in others_of(like, weights).items()
        }
        self._hold(like, weights, biases)

    @classmethod
    def from_dense(
        cls: type[_Layer],
        module: nn.LSTM | nn.GRU,
        *,
        format: Format,
        prior: Prior | None = None,
        posterior: Posterior | None = None,
    ) -> _Layer:
        """The layer that computes what torch's layer computes, as well as `max_rank` allows; biases are shared.

        Example:
            >>> layer = rf.nn.GRU.from_dense(nn.GRU(8, 6), format=rf.TT(8))
            >>> layer.weight_ih_l0.shape
            (18, 8)

        Args:
            module: The torch layer of the same name; its weights stay as they are.
            format: As for the class.
            prior: As for the class.
            posterior: As for the class.
        """
        check_projection(module)
        weights = {
            name: LowRankTensor.from_dense(
                module.get_parameter(name), gates_apart(module, name, format), prior=prior, posterior=posterior
            )
            for name in weight_names(module)
        }
        return cls.around(weights, module)

    @classmethod
    def around(cls: type[_Layer], weights: Mapping[str, LowRankTensor], module: nn.LSTM | nn.GRU) -> _Layer:
        """A layer of weights that are already there, with the options and the biases of torch's layer.

        Example:
            >>> dense = nn.GRU(8, 6)
            >>> sizes = {"weight_ih_l0": 8, "weight_hh_l0": 6}
            >>> parts = {name: rf.LowRankTensor((18, size), rf.TT(4)) for name, size in sizes.items()}
            >>> rf.nn.GRU.around(parts, dense)(torch.zeros(3, 2, 8))[0].shape
            torch.Size([3, 2, 6])

        Args:
            weights: A low-rank tensor for each of torch's weight matrices, by its name.
            module: The torch layer of the same name.
        """
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        like = cls._dense(
            module.input_size,
            module.hidden_size,
            module.num_layers,
            module.bias,
            module.batch_first,
            module.dropout,
            module.bidirectional,
            device="meta",
        )
        self._hold(like, weights, others_of(module, weights))
        return self

    def flatten_parameters(self) -> None:
        """Does nothing: the weights are formed anew for each call. Models of torch's layers call it."""

    def forward(self, input: Sequences, hx: Any = None) -> tuple[Sequences, Any]:  # noqa: ANN401  torch's states
        """What torch's layer gives: the outputs of the last layer at each step, and the last states of all layers.

        Args:
            input: Shape (length, batch, input_size), with batch_first (batch, length, input_size), without a batch
                (length, input_size), or a PackedSequence.
            hx: The first states as torch takes them; None for zeros.
        """
        self._check(input)
        if self._steps_are_own(input, hx):
            return self._through_time(input, hx)
        data = input.data if isinstance(input, PackedSequence) else input
        with cudnn_where_right(self.like, data):
            return self._run(input, hx)

    def _steps_are_own(self, input: Sequences, hx: Any) -> bool:  # noqa: ANN401
        """Whether the library's own steps run, where they are faster than torch's; what torch refuses is left to it.

        On a CPU torch has a fused kernel for sequences of equal length alone, and it takes no inputs that are
        multiplied already, which at low ranks saves more than the kernel does.
        """
        data = input.data if isinstance(input, PackedSequence) else input
        if data.device.type != "cpu" or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
            return False
        if not data.numel() or data.dim() not in ((2,) if isinstance(input, PackedSequence) else (2, 3)):
            return False
        own = self._tensor("weight_hh_l0").dtype
        states = () if hx is None else hx if isinstance(hx, tuple) else (hx,)
        shape, count = self._states_shape(input), 2 if self._dense is nn.LSTM else 1
        fit = all(isinstance(s, Tensor) and s.shape == shape and s.dtype == own for s in states)
        return data.dtype == own and fit and len(states) in (0, count) and self._is_worth_it(input)

    def _is_worth_it(self, input: Sequences) -> bool:
        if isinstance(input, PackedSequence) and int(input.batch_sizes[0]) != int(input.batch_sizes[-1]):
            return True
        data = input.data if isinstance(input, PackedSequence) else input
        rows = rounded(math.prod(data.shape[:-1]))
        tensors = [self._tensor(name) for name in self._weights if "_ih_" in name]
        planned = sum(least_effort(t.layout, shapes_of(t.factors), rows) for t in tensors)
        return planned < _CHEAP_INPUTS * sum(2 * rows * math.prod(t.shape) for t in tensors)

    def _states_shape(self, input: Sequences) -> tuple[int, ...]:
        like = self.like
        most = like.num_layers * (2 if like.bidirectional else 1)
        if isinstance(input, PackedSequence):
            return most, int(input.batch_sizes[0]), like.hidden_size
        if input.dim() == 2:
            return most, like.hidden_size
        return most, input.shape[0 if like.batch_first else 1], like.hidden_size

    def _through_time(self, input: Sequences, hx: Any) -> tuple[Sequences, Any]:  # noqa: ANN401
        like, is_alone = self.like, not isinstance(input, PackedSequence) and input.dim() == 2
        data, clock = rows_of(input, like.batch_first)
        given = hx if isinstance(hx, tuple) else (hx,) * (hx is not None)
        if is_alone:
            given = [state.unsqueeze(1) for state in given]
        elif isinstance(input, PackedSequence) and input.sorted_indices is not None:
            given = [state.index_select(1, input.sorted_indices) for state in given]
        directions = 2 if like.bidirectional else 1
        shape = (like.num_layers * directions, clock.sizes[0], like.hidden_size)
        states = given or [data.new_zeros(shape) for _ in range(2 if self._dense is nn.LSTM else 1)]
        drawn = {name: self._tensor(name).drawn() for name in self._weights}
        ends: list[Sequence[Tensor]] = []
        for layer in range(like.num_layers):
            names = [f"_l{layer}{end}" for end in ("", "_reverse")[:directions]]
            first = [state[layer * directions : (layer + 1) * directions] for state in states]
            out, *last = self._steps(names, drawn, mirrored([data] * directions, clock), first, clock)
            data = torch.cat(mirrored(out.unbind(), clock), 1) if like.bidirectional else out[0]
            if layer < like.num_layers - 1:
                data = F.dropout(data, like.dropout, self.training)
            ends.append(last)
        final = [torch.cat(parts) for parts in zip(*ends, strict=True)]
        if is_alone:
            final = [state.squeeze(1) for state in final]
        elif isinstance(input, PackedSequence) and input.unsorted_indices is not None:
            final = [state.index_select(1, input.unsorted_indices) for state in final]
        return as_given(input, data, clock, like.batch_first), tuple(final) if len(final) > 1 else final[0]

    def _steps(
        self,
        names: Sequence[str],
        drawn: Mapping[str, list[Tensor]],
        inputs: Sequence[Tensor],
        states: Sequence[Tensor],
        clock: Clock,
    ) -> tuple[Tensor, ...]:
        """Outputs and last states of the directions of one layer."""
        with varying():
            projected = [
                linear(self._tensor(f"weight_ih{name}").layout, drawn[f"weight_ih{name}"], x, self._input_bias(name))
                for name, x in zip(names, inputs, strict=True)
            ]
        recurrent = [f"weight_hh{name}" for name in names]
        weights = recurrent_of([(self._tensor(name).layout, drawn[name]) for name in recurrent])
        return self._advance(names, weights, states, clock, projected)

    def _input_bias(self, name: str) -> Tensor | None:
        """What is added to the inputs before the steps."""
        raise NotImplementedError

    def _advance(
        self, names: Sequence[str], weights: Recurrent, states: Sequence[Tensor], clock: Clock, projected: list[Tensor]
    ) -> tuple[Tensor, ...]:
        """The steps themselves."""
        raise NotImplementedError

    def _bias(self, name: str) -> Tensor | None:
        return self._parameter(f"bias{name}") if self.like.bias else None

    def _tensor(self, name: str) -> LowRankTensor:
        tensor = self.get_submodule(name)
        assert isinstance(tensor, LowRankTensor)
        return tensor

    def _check(self, input: Sequences) -> None:
        tensor = self._tensor("weight_ih_l0")
        where = repr(tensor.path.rpartition(".")[0] or tensor.path) if tensor.path else type(self).__name__
        data = input.data if isinstance(input, PackedSequence) else input
        if data.shape[-1] != self.like.input_size:
            raise ValueError(
                f"{where} has input_size={self.like.input_size}, but the input has shape {tuple(data.shape)}. "
                f"Reshape it to (..., {self.like.input_size})."
            )
        if isinstance(input, PackedSequence) and bool((input.batch_sizes.diff() > 0).any()):
            raise ValueError(
                f"{where} was given a packed sequence whose batch sizes rise, so its texts are not sorted by length. "
                "Make it by pack_padded_sequence(..., enforce_sorted=False)."
            )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.like.extra_repr()}){self._extra_lines()}"


class LSTM(_Recurrent):
    """Long short-term memory with low-rank weights; torch.nn.LSTM otherwise, with all its options but proj_size.

    Each of torch's weight matrices, weight_ih_l0 (4 hidden_size x input_size), weight_hh_l0 and so on, is one low-rank
    tensor that has the gate as a mode of its own. They are formed once per call, drawn from the posterior in train mode
    and at its mean in eval mode, in the order of torch's parameters. On a CPU, for packed
    sequences of different length and where low ranks make the inputs cheap, the inputs of all steps are multiplied at
    once in the cheapest way and the library's own steps, with hand-written gradients, do the rest; otherwise, and on
    other devices, under autocast and in torch.compile, torch's kernel runs on the formed weights: cuDNN's where its
    gradients are those of torch's own.

    Example:
        >>> layer = rf.nn.LSTM(32, 24, num_layers=2, bidirectional=True, format=rf.TT(max_rank=8))
        >>> y, (h, c) = layer(torch.zeros(5, 3, 32))
        >>> y.shape, h.shape, layer.weight_ih_l0.dense().shape
        (torch.Size([5, 3, 48]), torch.Size([4, 3, 24]), torch.Size([96, 32]))

    Args:
        input_size: As for torch.nn.LSTM, like all up to `bidirectional`.
        hidden_size: Width of the states.
        num_layers: How many layers stand on each other.
        bias: Whether there are biases; they have no low-rank prior.
        batch_first: Whether the batch is the first dimension.
        dropout: Between layers, in train mode.
        bidirectional: Whether a second chain reads from the end.
        proj_size: Must be 0.
        format: rf.CP, rf.Tucker, rf.TT, rf.TTM or rf.TR; modes of its own hold for the weights that they fit.
        prior: The hyperprior of the prior scales, rf.HalfCauchy() by default.
        posterior: rf.MeanField() by default, or rf.Point().
        device: As for torch.nn.LSTM.
        dtype: As for torch.nn.LSTM.

    Raises:
        ValueError: If the format cannot take a weight, or proj_size is given; in forward, if the input has another
            width, or a packed sequence is not sorted.

    Attributes:
        weight_ih_l0: The rf.LowRankTensor of torch's weight of that name; likewise the others. Biases are parameters.
    """

    _dense, _gates = nn.LSTM, 4

    def _input_bias(self, name: str) -> Tensor | None:
        inner, outer = self._bias(f"_ih{name}"), self._bias(f"_hh{name}")
        return None if inner is None or outer is None else inner + outer

    def _advance(
        self, names: Sequence[str], weights: Recurrent, states: Sequence[Tensor], clock: Clock, projected: list[Tensor]
    ) -> tuple[Tensor, ...]:
        h, c = states
        return lstm_steps(weights, h, c, clock, projected)


class GRU(_Recurrent):
    """Gated recurrent unit with low-rank weights; torch.nn.GRU otherwise. See `LSTM`; a GRU has three gates.

    Example:
        >>> layer = rf.nn.GRU(32, 24, batch_first=True, format=rf.TTM(max_rank=4))
        >>> y, h = layer(torch.zeros(3, 5, 32))
        >>> y.shape, layer.weight_hh_l0.dense().shape
        (torch.Size([3, 5, 24]), torch.Size([72, 24]))
    """

    _dense, _gates = nn.GRU, 3

    def _input_bias(self, name: str) -> Tensor | None:
        return self._bias(f"_ih{name}")

    def _advance(
        self, names: Sequence[str], weights: Recurrent, states: Sequence[Tensor], clock: Clock, projected: list[Tensor]
    ) -> tuple[Tensor, ...]:
        (h,), outer = states, [self._bias(f"_hh{name}") for name in names]
        rows = [weights.left.new_zeros(weights.left.shape[1]) if bias is None else bias for bias in outer]
        return gru_steps(weights, torch.stack(rows).unsqueeze(1), h, clock, projected)


def weight_names(module: nn.Module) -> tuple[str, ...]:
    """The weight matrices of a recurrent torch layer, in its order, also if it computes them from others."""
    return tuple(name for name in module._flat_weights_names if name.startswith("weight_"))  # pyright: ignore


def gates_apart(module: nn.Module, name: str, format: Format) -> Format:
    """The format of one weight of a recurrent torch layer: its gates are a mode."""
    weight = module.get_parameter(name)
    return blocks_apart(format, 4 if isinstance(module, nn.LSTM) else 3, (weight.shape[0], weight.shape[1]))


def std_of(module: nn.Module) -> float:
    """Root mean square of a weight as torch starts it, uniform between -1 and 1 over the root of hidden_size."""
    return 1 / math.sqrt(3 * module.hidden_size)  # pyright: ignore


def check_projection(module: nn.Module) -> None:
    """Refuses a torch layer with a projection.

    Raises:
        ValueError: If it has one.
    """
    if module.proj_size:
        raise ValueError(f"proj_size must be 0, got {module.proj_size}. Put an rf.nn.Linear after the layer instead.")
