# SPDX-License-Identifier: Apache-2.0
"""The steps of an LSTM and of a GRU through time, after the input projection, with hand-written gradients.

Without a fused kernel torch records some twenty operations a step on a CPU and adds to the gradient of the recurrent
weight at each one. Here both directions take a step together, and the gradient of the weight is one product.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from rankfall._contract import LEAST_RANK, Halves, halves, matrices
from rankfall._einsum import shapes_of
from rankfall._forming import dense
from rankfall._layout import Layout
from rankfall._products import multiply_into, pays, product, varying

Sequences: TypeAlias = Tensor | PackedSequence


@dataclass(frozen=True)
class Clock:
    """How many sequences, sorted by falling length, are still running at each step; rows are packed step by step."""

    sizes: tuple[int, ...]

    @cached_property
    def rows(self) -> int:
        """Steps of all sequences together."""
        return sum(self.sizes)

    @property
    def is_even(self) -> bool:
        """Whether all sequences are equally long."""
        return self.sizes[0] == self.sizes[-1]

    @cached_property
    def _place(self) -> tuple[Tensor, Tensor, Tensor]:
        """(step, sequence of each row; first row of each step)."""
        sizes = torch.tensor(self.sizes, device="cpu")
        first = sizes.cumsum(0) - sizes
        step = torch.repeat_interleave(torch.arange(len(sizes), device="cpu"), sizes)
        return step, torch.arange(self.rows, device="cpu") - first[step], first

    @cached_property
    def mirror(self) -> Int[Tensor, " rows"]:
        """The row in which a sequence stands when it is read from its end; its own inverse.

        Example:
            >>> Clock((2, 2, 1)).mirror.tolist()  # steps of sequence a and b: a0 b0 a1 b1 a2
            [4, 3, 2, 1, 0]
        """
        step, sequence, first = self._place
        lengths = torch.bincount(sequence)
        return first[lengths[sequence] - 1 - step] + sequence

    def by_step(self, *values: Tensor) -> list[tuple[Tensor, ...]]:
        """Views of the rows of each step, step by step, of tensors of shape (directions, rows, ...)."""
        return list(zip(*(v.split(self.sizes, 1) for v in values), strict=True))

    def before(self, states: Tensor) -> Tensor:
        """Of states (first ones, then those after each row), those before each row; shape (directions, rows, size)."""
        if self.is_even:
            return states[:, : self.rows]
        step, sequence, first = self._place
        index = torch.where(step > 0, self.sizes[0] + first[step - 1] + sequence, sequence)
        return states.index_select(1, index)

    def last(self, states: Tensor) -> Tensor:
        """Of the same, those after the last row of each sequence; shape (directions, sequences, size)."""
        _, sequence, first = self._place
        lengths = torch.bincount(sequence, minlength=self.sizes[0])
        return states.index_select(1, self.sizes[0] + first[lengths - 1] + sequence[: self.sizes[0]])


class _Buffer:
    """First states and room for those after each row: (directions, sequences + rows, size)."""

    def __init__(self, first: Tensor, clock: Clock) -> None:
        directions, sequences, size = first.shape
        self.all = first.new_empty(directions, sequences + clock.rows, size)
        self.all[:, :sequences] = first
        self.first, self.after = self.all[:, :sequences], self.all[:, sequences:]


# From the value of a sigmoid or a tanh; a step's numbers are still in the processor's cache, so step by step is best.
_sigmoid_backward, _tanh_backward = torch.ops.aten.sigmoid_backward, torch.ops.aten.tanh_backward


class Recurrent(NamedTuple):
    """The recurrent weight of each direction, or two matrices that it is the product of, W = A B.

    Attributes:
        left: The weight, shape (directions, gates, size); or A, shape (directions, gates, rank).
        right: B, shape (directions, rank, size), or None.
    """

    left: Tensor
    right: Tensor | None

    def times(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """(x, M) with x M = states W^T, so that the last product can be added to something."""
        left = self.left.transpose(1, 2)
        return (states, left) if self.right is None else (torch.bmm(states, self.right.transpose(1, 2)), left)

    def backwards(self, gradient: Tensor, between: Tensor) -> tuple[Tensor, Tensor]:
        """(x, M) with x M = gradient W. What stands between A and B is kept in `between`, (directions, n, rank)."""
        if self.right is None:
            return gradient, self.left
        return _products(gradient, self.left, between), self.right

    def room(self, clock: Clock) -> Tensor:
        """For what stands between A and B at each row; none without them."""
        rank = 0 if self.right is None else self.right.shape[1]
        return self.left.new_empty(len(self.left), clock.rows, rank)

    def gradients(self, gates: Tensor, past: Tensor, between: Tensor) -> tuple[Tensor, Tensor | None]:
        """Those of `left` and `right`, from the gradients of all gates and the states before each row."""
        with varying():
            return self._gradients(gates, past, between)

    def _gradients(self, gates: Tensor, past: Tensor, between: Tensor) -> tuple[Tensor, Tensor | None]:
        of_left = torch.empty_like(self.left)
        if self.right is None:
            return _products(gates.transpose(1, 2), past, of_left), None
        heard = _products(past, self.right.transpose(1, 2), torch.empty_like(between))
        of_right = _products(between.transpose(1, 2), past, torch.empty_like(self.right))
        return _products(gates.transpose(1, 2), heard, of_left), of_right


_THIN = 3  # How many times more operations the weight wants than two thin matrices, from where those are faster.


def recurrent_of(weights: Sequence[tuple[Layout, list[Tensor]]]) -> Recurrent:
    """The recurrent weights of the directions of a layer, as each of the steps wants them.

    Formed once, unless the format has two thin matrices in place of each.
    """
    pairs = [halves(layout, shapes_of(factors)) for layout, factors in weights]
    ranks = [_joint_rank(pair, *weight) for pair, weight in zip(pairs, weights, strict=True) if pair is not None]
    gates, size = weights[0][0].shape
    if len(ranks) < len(weights) or _THIN * max(ranks) * (gates + size) > gates * size:
        return Recurrent(torch.stack([dense(layout, factors) for layout, factors in weights]), None)
    found, widest = [], max(ranks) and max(*ranks, LEAST_RANK)
    for (layout, factors), pair, rank in zip(weights, pairs, ranks, strict=True):
        assert pair is not None
        left, right = matrices(layout, factors, pair)
        assert left is not None
        missing = widest - rank
        found.append((F.pad(left, (0, missing)), F.pad(right, (0, 0, 0, missing))))
    left, right = (torch.stack(parts) for parts in zip(*found, strict=True))
    return Recurrent(left, right)


def _joint_rank(pair: Halves, layout: Layout, factors: Sequence[Tensor]) -> int:
    sizes = layout.ranks(shapes_of(factors))
    return math.prod([sizes[bond] for bond in pair.joint])


def lstm_steps(
    recurrent: Recurrent,
    h: Float[Tensor, "directions sequences size"],
    c: Float[Tensor, "directions sequences size"],
    clock: Clock,
    projected: Sequence[Float[Tensor, "rows gates"]],
) -> tuple[Float[Tensor, "directions rows size"], Tensor, Tensor]:
    """(outputs, last h, last c) of all directions of a layer; gates i, f, g, o as torch orders them.

    Args:
        recurrent: The recurrent weight of each direction, 4 size x size, whole or in two.
        h: The first outputs.
        c: The first cells.
        clock: Which rows belong to which step.
        projected: For each direction W_ih x and both biases, in the order in which it reads.
    """
    return _LSTMSteps.apply(*recurrent, h, c, clock, *projected)  # pyright: ignore


def gru_steps(
    recurrent: Recurrent,
    bias: Float[Tensor, "directions 1 gates"],
    h: Float[Tensor, "directions sequences size"],
    clock: Clock,
    projected: Sequence[Float[Tensor, "rows gates"]],
) -> tuple[Float[Tensor, "directions rows size"], Tensor]:
    """(outputs, last h) of all directions of a layer; gates r, z, n as torch orders them.

    Args:
        recurrent: The recurrent weight of each direction, 3 size x size, whole or in two.
        bias: That of the recurrent product, which r multiplies in the third gate.
        h: The first outputs.
        clock: Which rows belong to which step.
        projected: For each direction W_ih x and its bias, in the order in which it reads.
    """
    return _GRUSteps.apply(*recurrent, bias, h, clock, *projected)  # pyright: ignore


class _LSTMSteps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        left: Tensor,
        right: Tensor | None,
        h: Float[Tensor, "directions sequences size"],
        c: Float[Tensor, "directions sequences size"],
        clock: Clock,
        *projected: Float[Tensor, "rows gates"],
    ) -> tuple[Tensor, Tensor, Tensor]:
        size = h.shape[2]
        gates, recurrent = torch.stack(projected), Recurrent(left, right)
        states, cells = _Buffer(h, clock), _Buffer(c, clock)
        squashed = gates.new_empty(len(gates), clock.rows, size)
        h, c = states.first, cells.first
        pieces = (gates, *gates.split(size, 2), gates[..., : 2 * size], squashed)
        for g_all, i, f, g, o, i_and_f, tanh_c, h_next, c_next in clock.by_step(*pieces, states.after, cells.after):
            n = h_next.shape[1]
            _add_products(g_all, *recurrent.times(h[:, :n]))
            i_and_f.sigmoid_()
            torch.mul(f, c[:, :n], out=c_next)
            c_next.addcmul_(i, g.tanh_())
            torch.tanh(c_next, out=tanh_c)
            torch.mul(o.sigmoid_(), tanh_c, out=h_next)
            h, c = h_next, c_next
        ctx.clock = clock
        ctx.save_for_backward(left, right, gates, states.all, cells.all, squashed)
        return states.after, clock.last(states.all), clock.last(cells.all)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor, d_h: Tensor, d_c: Tensor) -> tuple[Any, ...]:  # noqa: ANN401  # pyright: ignore
        _check_first_order()
        left, right, gates, states, cells, squashed = ctx.saved_tensors
        clock, size, recurrent = ctx.clock, d_h.shape[2], Recurrent(left, right)
        d_gates, d_h, d_c = torch.empty_like(gates), d_h.clone(), d_c.clone()
        between = recurrent.room(clock)
        pieces = (
            d_out,
            *gates.split(size, 2),
            squashed,
            clock.before(cells),
            between,
            d_gates,
            *d_gates.split(size, 2),
        )
        for out, i, f, g, o, tanh_c, before, inner, d_all, d_i, d_f, d_g, d_o in reversed(clock.by_step(*pieces)):
            h, c = d_h[:, : out.shape[1]], d_c[:, : out.shape[1]]
            h.add_(out)
            c.add_(_tanh_backward(h * o, tanh_c))
            _sigmoid_backward.grad_input(h * tanh_c, o, grad_input=d_o)
            _sigmoid_backward.grad_input(c * g, i, grad_input=d_i)
            _sigmoid_backward.grad_input(c * before, f, grad_input=d_f)
            _tanh_backward.grad_input(c * i, g, grad_input=d_g)
            _products(*recurrent.backwards(d_all, inner), h)
            c.mul_(f)
        return *recurrent.gradients(d_gates, clock.before(states), between), d_h, d_c, None, *d_gates


class _GRUSteps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        left: Tensor,
        right: Tensor | None,
        bias: Float[Tensor, "directions 1 gates"],
        h: Float[Tensor, "directions sequences size"],
        clock: Clock,
        *projected: Float[Tensor, "rows gates"],
    ) -> tuple[Tensor, Tensor]:
        size = h.shape[2]
        gates, recurrent = torch.stack(projected), Recurrent(left, right)
        states, heard = _Buffer(h, clock), gates.new_empty(len(gates), clock.rows, size)
        h = states.first
        pieces = (gates[..., : 2 * size], *gates.split(size, 2), heard)
        for r_and_z, r, z, n, heard_now, h_next in clock.by_step(*pieces, states.after):
            past = h[:, : h_next.shape[1]]
            said = _add_products(bias.repeat(1, past.shape[1], 1), *recurrent.times(past))
            r_and_z.add_(said[..., : 2 * size]).sigmoid_()
            heard_now.copy_(said[..., 2 * size :])
            n.addcmul_(r, heard_now).tanh_()
            torch.lerp(n, past, z, out=h_next)
            h = h_next
        ctx.clock = clock
        ctx.save_for_backward(left, right, gates, states.all, heard)
        return states.after, clock.last(states.all)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor, d_h: Tensor) -> tuple[Any, ...]:  # noqa: ANN401  # pyright: ignore
        _check_first_order()
        left, right, gates, states, heard = ctx.saved_tensors
        clock, size, recurrent = ctx.clock, d_h.shape[2], Recurrent(left, right)
        r, z, n = gates.split(size, 2)
        past = clock.before(states)
        to_n = (1 - z) * (1 - n * n)
        slopes = torch.empty_like(gates)
        s_r, s_z, s_n = slopes.split(size, 2)
        torch.mul(_slope(r), to_n * heard, out=s_r)
        torch.mul(_slope(z), past - n, out=s_z)
        torch.mul(to_n, r, out=s_n)
        d_h, d_states, between = d_h.clone(), torch.empty_like(to_n), recurrent.room(clock)
        pieces = (d_out, z, slopes, slopes.unflatten(2, (3, size)), d_states, between)
        for out, z_now, d_product, by_gate, kept, inner in reversed(clock.by_step(*pieces)):
            h = d_h[:, : out.shape[1]]
            torch.add(h, out, out=kept)
            by_gate.mul_(kept.unsqueeze(2))
            torch.mul(kept, z_now, out=h)
            _add_products(h, *recurrent.backwards(d_product, inner))
        d_recurrent = recurrent.gradients(slopes, past, between)
        d_bias = slopes.sum(1, keepdim=True)
        # The projected inputs stand outside of the product that r multiplies.
        torch.mul(to_n, d_states, out=s_n)
        return *d_recurrent, d_bias, d_h, None, *slopes


def _check_first_order() -> None:
    """Refuses a backward pass that is to be differentiated in its turn, which would leave out these steps unsaid."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "rf.nn.LSTM and rf.nn.GRU have no second derivatives on a CPU, so create_graph=True does not go through "
            "them. Differentiate torch's layers with the same weights: rf.export(model, dense=True)."
        )


def _products(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """The product of each direction: one by one, since a batched product of two reaches a third of the speed."""
    for a, b, c in zip(left, right, out, strict=True):
        multiply_into(a, b, c)
    return out


def _add_products(to: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Adds the product of each direction to what is there."""
    if not pays(left[0], right[0]):
        return torch.baddbmm(to, left, right, out=to)  # In place would be hidden from counters.
    for there, a, b in zip(to, left, right, strict=True):
        there.add_(product(a, b))
    return to


def _slope(gate: Tensor) -> Tensor:
    """The derivative of a sigmoid from its value."""
    return torch.addcmul(gate, gate, gate, value=-1)


def mirrored(values: Sequence[Tensor], clock: Clock) -> list[Tensor]:
    """Rows of the second direction read from the end of each sequence; the first direction is as it is."""
    return [v.index_select(0, clock.mirror) if k else v for k, v in enumerate(values)]


def rows_of(input: Sequences, batch_first: bool) -> tuple[Tensor, Clock]:
    """The inputs step by step, shape (rows, width), and how many sequences each step has."""
    if isinstance(input, PackedSequence):
        return input.data, Clock(tuple(input.batch_sizes.tolist()))
    steps = input.unsqueeze(1) if input.dim() == 2 else input.transpose(0, 1) if batch_first else input
    return steps.flatten(0, 1), Clock((steps.shape[1],) * steps.shape[0])


def as_given(input: Sequences, data: Tensor, clock: Clock, batch_first: bool) -> Sequences:
    """Rows as sequences of the kind that came in."""
    if isinstance(input, PackedSequence):
        return PackedSequence(data, input.batch_sizes, input.sorted_indices, input.unsorted_indices)
    steps = data.unflatten(0, (len(clock.sizes), clock.sizes[0]))
    return steps.squeeze(1) if input.dim() == 2 else steps.transpose(0, 1) if batch_first else steps
