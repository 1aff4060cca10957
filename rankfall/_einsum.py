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

Axes: TypeAlias = tuple[str, ...]
Shapes: TypeAlias = tuple[tuple[int, ...], ...]

BATCH = "..."
"""The name of any number of leading dimensions; at most one tensor of a network carries it, in front."""

_LARGEST = 8**20

# The exact search takes milliseconds up to here, and seconds for networks of twice as many tensors.
_MOST_PLANNED_EXACTLY = 16


@dataclass(frozen=True)
class Plan:
    """The order in which a network of tensors is contracted.

    Attributes:
        steps: (positions, equation) in turn: the tensors at these positions leave the list, the result joins its end.
        flops: Multiplications and additions of all steps.
        elements: Elements read and written by all steps.
    """

    steps: tuple[tuple[tuple[int, ...], str], ...]
    flops: int
    elements: int

    @property
    def cost(self) -> int:
        """Time, in floating-point operations: what plans are compared by."""
        return cost_of(self.flops, self.elements)


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
    pending, steps, flops, elements = list(inputs), [], 0, 0
    for positions in _order(inputs, output, size):
        taken = [pending[k] for k in positions]
        pending = [axes for k, axes in enumerate(pending) if k not in positions]
        alive = set(output).union(*pending)
        names = dict.fromkeys(name for axes in taken for name in axes)
        result = tuple(sorted((n for n in names if n in alive), key=lambda n: n != BATCH)) if pending else output
        summed = len(names) > len(result)
        flops += math.prod(size[n] for n in names) * (2 if summed else 1) if len(taken) > 1 else 0
        elements += sum(math.prod(size[n] for n in axes) for axes in (*taken, result))
        steps.append((positions, _equation(taken, result)))
        pending.append(result)
    return Plan(tuple(steps), flops, elements)


def run(steps: Plan, tensors: Sequence[Tensor]) -> Tensor:
    """Carries out a plan on tensors in the order of its inputs."""
    pending = list(tensors)
    for positions, equation in steps.steps:
        taken = [pending[k] for k in positions]
        pending = [tensor for k, tensor in enumerate(pending) if k not in positions]
        pending.append(torch.einsum(equation, *taken))
    return pending[0]


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
