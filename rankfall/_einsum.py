# SPDX-License-Identifier: Apache-2.0
"""Contraction of a network of tensors with named axes: the order is planned once per shape, then run pair by pair."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache, wraps
from typing import Any, TypeAlias, TypeVar

import opt_einsum
import torch
from torch import Tensor

from rankfall._machine import machine, on_change
from rankfall._products import product

Axes: TypeAlias = tuple[str, ...]
Shapes: TypeAlias = tuple[tuple[int, ...], ...]

BATCH = "..."
"""The name of any number of leading dimensions; at most one tensor of a network carries it, in front."""

_LARGEST = 8**20

# Numbers in two tensors from which it is worth while to find out whether their product is a large one.
_LARGE_PAIR = 1 << 13

# The exact search takes milliseconds up to here, and seconds for networks of twice as many tensors.
_MOST_PLANNED_EXACTLY = 16


@dataclass(frozen=True)
class Plan:
    """The order in which a network of tensors is contracted.

    Attributes:
        steps: (positions, equation) in turn: the tensors at these positions leave the list, the result joins its end.
        flops: Multiplications and additions of all steps.
        elements: Elements read and written by all steps.
        batched: Those of the operations that are done in batches of products.
    """

    steps: tuple[tuple[tuple[int, ...], str], ...]
    flops: int
    elements: int
    batched: int = 0

    @property
    def effort(self) -> int:
        """How many operations of one large product take as long."""
        return self.flops + round((machine().slowness_of_batches - 1) * self.batched)

    @property
    def cost(self) -> int:
        """Time, in floating-point operations: what plans are compared by."""
        return cost_of(self.effort, self.elements)


def cost_of(flops: int, elements: int) -> int:
    """The time of so many operations and of so many elements read or written, in floating-point operations.

    It keeps planners from orders that save arithmetic and lose it to copies.
    """
    return flops + machine().flops_per_element * elements


_Planner = TypeVar("_Planner", bound=Callable[..., object])


def planned_once(planner: _Planner) -> _Planner:
    """A planner whose results are kept, and are constants of a graph that torch.compile makes for given sizes.

    What an argument is made of, its `parts`, goes into a graph in its place: up to torch 2.11 at least, a constant
    function takes nothing but numbers, strings, and tuples of them.
    """
    kept = lru_cache(maxsize=4096)(planner)
    on_change(kept.cache_clear)

    def constant(*plain: Any) -> object:  # noqa: ANN401  the arguments of any planner
        return kept(*[kind(*value) if kind else value for kind, value in plain])

    # What torch.compiler.assume_constant_result sets; calling it would import the compiler with the library.
    constant._dynamo_marked_constant = True  # pyright: ignore

    @wraps(planner)
    def planned(*arguments: Any) -> object:  # noqa: ANN401
        if torch.compiler.is_compiling():
            return constant(*[(type(a), a.parts) if hasattr(a, "parts") else (None, a) for a in arguments])
        return kept(*arguments)

    return planned  # pyright: ignore


def shapes_of(tensors: Iterable[Tensor]) -> Shapes:
    """The shapes of tensors, as planners take them."""
    return tuple([tuple(t.shape) for t in tensors])


def power_of_two(count: int) -> int:
    """The next power of two."""
    return 1 << (max(count, 1) - 1).bit_length()


def rounded(count: int) -> int:
    """A little more than a number, at most a quarter, so that few plans are made: 4 5 6 7 8 10 12 14 16 20 ...

    While torch.compile traces, a power of eight that is not less: numbers of rows in between share a graph then.
    """
    if torch.compiler.is_compiling():
        bound = 1
        while count > bound and bound < _LARGEST:  # Compared, and nothing else, a symbol stays one.
            bound *= 8
        return bound
    step = power_of_two(count) // 8 or 1
    return -(-max(count, 1) // step) * step


def counted_in_steps(plan: Plan, shapes: Shapes) -> tuple[int, int]:
    """Operations and elements of a plan, carried out on tensors of other sizes than it was made for."""
    pending, flops, elements = list(shapes), 0, 0
    for positions, equation in plan.steps:
        names, kept = equation.replace(BATCH, ".").split("->")
        taken = [dict(zip(axes, pending[k], strict=True)) for axes, k in zip(names.split(","), positions, strict=True)]
        size = {name: n for tensor in taken for name, n in tensor.items()}
        pending = [shape for k, shape in enumerate(pending) if k not in positions] + [tuple(size[n] for n in kept)]
        flops += math.prod(size.values()) * (2 if len(size) > len(kept) else 1) if len(taken) > 1 else 0
        elements += sum(math.prod(tensor.values()) for tensor in taken) + math.prod(pending[-1])
    return flops, elements


def _equation(inputs: Sequence[Axes], output: Axes) -> str:
    # Letters are given out afresh per step, so a network may have more than 52 names.
    names = dict.fromkeys(name for axes in (*inputs, output) for name in axes if name != BATCH)
    letter = {name: opt_einsum.get_symbol(k) for k, name in enumerate(names)} | {BATCH: BATCH}
    return ",".join("".join(letter[n] for n in axes) for axes in inputs) + "->" + "".join(letter[n] for n in output)


def _order(inputs: Sequence[Axes], output: Axes, sizes: dict[str, int]) -> list[tuple[int, ...]]:
    if len(inputs) == 1:
        return [(0,)]
    symbol = {name: opt_einsum.get_symbol(k) for k, name in enumerate(sizes)}
    spelled = ["".join(symbol[n] for n in axes) for axes in (*inputs, output)]
    shapes = [tuple(max(1, sizes[n]) for n in axes) for axes in inputs]
    exact = opt_einsum.DynamicProgramming(minimize=f"combo-{machine().flops_per_element}")
    search = exact if len(inputs) <= _MOST_PLANNED_EXACTLY else "greedy"
    path, _ = opt_einsum.contract_path(
        ",".join(spelled[:-1]) + "->" + spelled[-1], *shapes, shapes=True, optimize=search
    )
    return [tuple(sorted(step)) for step in path]


@planned_once
def plan(inputs: tuple[Axes, ...], output: Axes, sizes: tuple[tuple[str, int], ...]) -> Plan:
    """Plans the contraction of tensors with named axes; cached, since ranks and batch sizes recur.

    Args:
        inputs: The axis names of every tensor. A name in two or more tensors and not in `output` is summed over.
        output: The axis names of the result, in its order.
        sizes: (name, size) of every axis, `BATCH` among them where it is used.

    Returns:
        The cheapest order by floating-point operations and elements moved, found by dynamic programming.
    """
    size = dict(sizes)
    pending, steps, flops, elements, batched = list(inputs), [], 0, 0, 0
    for positions in _order(inputs, output, size):
        taken = [pending[k] for k in positions]
        pending = [axes for k, axes in enumerate(pending) if k not in positions]
        alive = set(output).union(*pending)
        names = dict.fromkeys(name for axes in taken for name in axes)
        result = tuple(sorted((n for n in names if n in alive), key=lambda n: n != BATCH)) if pending else output
        summed = len(names) > len(result)
        if len(taken) > 1:
            operations = math.prod(size[n] for n in names) * (2 if summed else 1)
            flops, batched = flops + operations, batched + operations * bool(_shared(taken, result))
        elements += sum(math.prod(size[n] for n in axes) for axes in (*taken, result))
        steps.append((positions, _equation(taken, result)))
        pending.append(result)
    return Plan(tuple(steps), flops, elements, batched)


def _shared(taken: Sequence[Axes], result: Axes) -> set[str]:
    """The names that all have, along which products stand side by side."""
    return set(result).intersection(*taken)


def run(steps: Plan, tensors: Sequence[Tensor]) -> Tensor:
    """Carries out a plan on tensors in the order of its inputs."""
    pending, last = run_but_last(steps, tensors)
    return einsum(last, pending)


def run_but_last(steps: Plan, tensors: Sequence[Tensor]) -> tuple[list[Tensor], str]:
    """What the last step of a plan is made of, and its equation."""
    pending = list(tensors)
    for positions, equation in steps.steps[:-1]:
        taken = [pending[k] for k in positions]
        pending = [tensor for k, tensor in enumerate(pending) if k not in positions]
        pending.append(einsum(equation, taken))
    return pending, steps.steps[-1][1]


def einsum(equation: str, taken: Sequence[Tensor]) -> Tensor:
    """torch.einsum; on a CPU by one large product where there is one, and what sums over nothing laid out in order."""
    if len(taken) == 2 and not torch.compiler.is_compiling() and taken[0].device.type == "cpu":
        if side_by_side := _side_by_side(equation):
            return side_by_side(*taken)
        large = taken[0].dtype == torch.float32 and taken[0].numel() + taken[1].numel() >= _LARGE_PAIR
        if large and (pair := _pair(equation)):
            return pair(*taken)
    return torch.einsum(equation, *taken)


@dataclass(frozen=True)
class _SideBySide:
    """A product of two tensors that sums over nothing, laid out in memory as its axes come.

    torch would lay it out as its operands are: that of CP factors with the rank last in memory wherever it stands, so
    that gradients go through memory in jumps, and what factors get of them takes three to seven times as long.

    Attributes:
        orders: How the axes of each tensor stand in the result.
        shared: For each axis of the result which of the tensors have it.
    """

    orders: tuple[tuple[int, ...], tuple[int, ...]]
    shared: tuple[tuple[bool, bool], ...]

    def __call__(self, first: Tensor, second: Tensor) -> Tensor:
        a, b = (t.permute(order).contiguous() for t, order in zip((first, second), self.orders, strict=True))
        for axis, (in_first, in_second) in enumerate(self.shared):
            a, b = a if in_first else a.unsqueeze(axis), b if in_second else b.unsqueeze(axis)
        return (a * b).contiguous()  # Axes of one element may lead torch astray.


@lru_cache(maxsize=4096)
def _side_by_side(equation: str) -> _SideBySide | None:
    names, kept = equation.split("->")
    pair = names.split(",")
    if BATCH in equation or set(kept) != set(pair[0] + pair[1]):
        return None
    first, second = (tuple(axes.index(n) for n in kept if n in axes) for axes in pair)
    return _SideBySide((first, second), tuple((n in pair[0], n in pair[1]) for n in kept))


@dataclass(frozen=True)
class _Pair:
    """A sum of products of two tensors as one product of matrices.

    Attributes:
        turned: Whether the second tensor stands on the left.
        left: Where the axes of the left tensor stand in a matrix, its own first, the summed ones behind.
        right: The same of the right one, the summed ones first.
        summed: How many axes are summed over.
        order: How the axes of the product, those of the left tensor first, stand in the result.
        batch: Which of left and right has any number of leading dimensions in place of its first axis; None if neither.
    """

    turned: bool
    left: tuple[int, ...]
    right: tuple[int, ...]
    summed: int
    order: tuple[int, ...]
    batch: int | None

    def __call__(self, first: Tensor, second: Tensor) -> Tensor:
        pair, leading = [second, first] if self.turned else [first, second], ()
        if self.batch is not None:
            many = pair[self.batch]
            dims = many.dim() - len((self.left, self.right)[self.batch]) + 1
            leading = many.shape[:dims]
            pair[self.batch] = many.reshape((math.prod(leading), *many.shape[dims:]))
        a, b = pair[0].permute(self.left), pair[1].permute(self.right)
        own, others = a.shape[: a.dim() - self.summed], b.shape[self.summed :]
        inner = math.prod(b.shape[: self.summed])
        value = product(a.reshape(math.prod(own), inner), b.reshape(inner, math.prod(others)))
        value = value.view((*own, *others)).permute(self.order)
        return value if self.batch is None else value.reshape((*leading, *value.shape[1:]))


@lru_cache(maxsize=4096)
def _pair(equation: str) -> _Pair | None:
    names, kept = equation.replace(BATCH, ".").split("->")
    first, second = names.split(",")
    summed = [n for n in first if n in second]
    if not summed or set(summed) & set(kept) or set(first + second) - set(summed) != set(kept) or kept.find(".") > 0:
        return None
    # What stands last in the result stands on the right, so that little is to be copied into order.
    turned = kept != "" and kept[-1] in first
    left, right = (second, first) if turned else (first, second)
    # In the order of the result, which is seldom the smallest of the three.
    own, others = ([n for n in kept if n in axes] for axes in (left, right))
    sides = [k for k, axes in enumerate((left, right)) if axes.startswith(".")]
    return _Pair(
        turned,
        tuple(map(left.index, [*own, *summed])),
        tuple(map(right.index, [*summed, *others])),
        len(summed),
        tuple(map([*own, *others].index, kept)),
        sides[0] if sides else None,
    )


def contract(inputs: Sequence[Axes], output: Axes, tensors: Sequence[Tensor]) -> Tensor:
    """Contracts a network of tensors without batch dimensions: sizes are read from the tensors.

    Example:
        >>> a, b = torch.ones(2, 3), torch.ones(3, 4)
        >>> contract([("i", "r"), ("r", "j")], ("i", "j"), [a, b]).shape
        torch.Size([2, 4])
    """
    sizes = {
        name: size for axes, t in zip(inputs, tensors, strict=True) for name, size in zip(axes, t.shape, strict=True)
    }
    return run(plan(tuple(inputs), output, tuple(sizes.items())), tensors)
