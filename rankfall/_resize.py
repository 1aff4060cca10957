# SPDX-License-Identifier: Apache-2.0
"""Changes the size of a Parameter in place: data, gradient and optimizer state, the object staying the same."""

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

# What torch's optimizers call a running mean of gradients.
_MOMENTA = ("exp_avg", "momentum_buffer", "grad_avg", "prev")
# Second moments of Adafactor, and the dimension that each has a single mean of.
_MEANS_OVER = {"row_var": -1, "col_var": -2}


@torch.no_grad()
def keep_(parameter: nn.Parameter, dim: int, index: Tensor, optimizer: Optimizer | None = None) -> None:
    """Keeps the given indices of one dimension of a parameter, of its gradient and of its optimizer state.

    The Parameter object stays the same, so parameter groups, schedulers and averages go on working. Every state tensor
    of the parameter's shape is cut alike (momentum buffers, Adam's moments, AMSGrad's maxima), and so are the means
    that Adafactor has of it; scalars such as the step count stay. L-BFGS starts anew.

    Example:
        >>> p = nn.Parameter(torch.arange(6.0).reshape(2, 3))
        >>> keep_(p, 1, torch.tensor([0, 2]))
        >>> p.shape
        torch.Size([2, 2])

    Args:
        parameter: The parameter to shrink, between steps: a backward pass through a graph made before cannot follow.
        dim: The dimension that is cut.
        index: The indices that stay, in the order they stay in, shape (kept,).
        optimizer: The optimizer that owns the parameter; None where there is none yet, or it does not own it.
    """
    _start_anew(parameter, optimizer)
    for name, value in _state_along(parameter, dim, optimizer).items():
        optimizer.state[parameter][name] = value.index_select(dim, index)  # pyright: ignore[reportOptionalMemberAccess]
    gradient = parameter.grad
    _replace_(parameter, parameter.data.index_select(dim, index))
    if gradient is not None:
        parameter.grad = gradient.index_select(dim, index)


def grow_(parameter: nn.Parameter, dim: int, values: Tensor, optimizer: Optimizer | None = None) -> None:
    """Appends entries to one dimension of a parameter; its gradient is dropped, its optimizer state grows with it.

    In the new places signed state (momenta) is 0 and state that is never negative (second moments) has its mean, so
    that the next steps there are of the usual size. L-BFGS starts anew.

    Example:
        >>> p = nn.Parameter(torch.zeros(2, 3))
        >>> grow_(p, 1, torch.ones(2, 1))
        >>> p.shape
        torch.Size([2, 4])

    Args:
        parameter: The parameter to enlarge, between steps.
        dim: The dimension that grows.
        values: What is appended, of the parameter's shape but for `dim`.
        optimizer: The optimizer that owns the parameter, if there is one.
    """
    _start_anew(parameter, optimizer)
    for name, value in _state_along(parameter, dim, optimizer).items():
        # An empty mean is NaN, where there is nothing to take after.
        new = 0.0 if _is_signed(name, value) or not value.numel() else float(value.mean())
        shape = [*value.shape[:dim], values.shape[dim], *value.shape[dim + 1 :]]
        optimizer.state[parameter][name] = torch.cat([value, value.new_full(shape, new)], dim)  # pyright: ignore[reportOptionalMemberAccess]
    _replace_(parameter, torch.cat([parameter.data, values.to(parameter.dtype)], dim))


def _state_of(parameter: nn.Parameter, optimizer: Optimizer | None) -> dict[str, Tensor]:
    """The optimizer's state that has one number for each entry of a parameter, or for the mean of a row of them."""
    if optimizer is None or parameter not in optimizer.state:
        return {}
    return {
        name: value
        for name, value in optimizer.state[parameter].items()
        if isinstance(value, Tensor) and value.shape == _state_shape(name, parameter) and value.dim() > 0
    }


def _state_shape(name: str, parameter: nn.Parameter) -> tuple[int, ...]:
    shape = list(parameter.shape)
    if name in _MEANS_OVER and len(shape) > 1:
        shape[_MEANS_OVER[name]] = 1
    return tuple(shape)


def _state_along(parameter: nn.Parameter, dim: int, optimizer: Optimizer | None) -> dict[str, Tensor]:
    """The part of it that has one place for each index of a dimension."""
    dims = parameter.dim()
    return {
        name: value for name, value in _state_of(parameter, optimizer).items() if _MEANS_OVER.get(name) != dim - dims
    }


def _start_anew(parameter: nn.Parameter, optimizer: Optimizer | None) -> None:
    """Drops what L-BFGS knows of steps before: vectors of all parameters end to end, kept as state of the first."""
    if not isinstance(optimizer, LBFGS):
        return
    owned = optimizer.param_groups[0]["params"]
    if any(p is parameter for p in owned):
        optimizer.state.pop(owned[0], None)
        optimizer._numel_cache = None  # How many numbers there are in all.


def _is_signed(name: str, value: Tensor) -> bool:
    return name in _MOMENTA or bool((value < 0).any())


def _replace_(parameter: nn.Parameter, data: Tensor) -> None:
    # A gradient of the old shape may not stand beside data of the new one, not even for a moment.
    parameter.grad = None
    # While a loss of an earlier step is still referred to, its graph keeps the node that accumulates this parameter's
    # gradient, old shape and all, and the next step would be handed that node. A change of type makes torch drop it.
    other_type = torch.float32 if parameter.dtype == torch.float64 else torch.float64
    parameter.data = data.new_empty(0, dtype=other_type)
    parameter.data = data


@torch.no_grad()
def forget_(parameter: nn.Parameter, optimizer: Optimizer) -> None:
    """Makes the optimizer forget which entry of a parameter was which, after the entries have been mixed.

    Momenta become 0, and so does other signed state; state that is never negative (second moments) becomes its mean
    over the parameter. The next steps have the usual size, and no direction of the time before. Step counts stay.
    L-BFGS starts anew.

    Example:
        >>> p = nn.Parameter(torch.ones(2))
        >>> optimizer = torch.optim.Adam([p])
        >>> p.grad = torch.tensor([1.0, 3.0])
        >>> optimizer.step()
        >>> forget_(p, optimizer)
        >>> optimizer.state[p]["exp_avg"], optimizer.state[p]["exp_avg_sq"]
        (tensor([0., 0.]), tensor([0.0050, 0.0050]))
    """
    _start_anew(parameter, optimizer)
    for name, value in _state_of(parameter, optimizer).items():
        if value.numel():
            value.fill_(0.0 if _is_signed(name, value) else value.mean())


def resize_(parameter: nn.Parameter, shape: tuple[int, ...]) -> None:
    """Gives a parameter a new shape with undefined content, to be filled at once (by a checkpoint); drops its gradient.

    Example:
        >>> p = nn.Parameter(torch.zeros(2, 3))
        >>> resize_(p, (2, 2))
        >>> p.shape
        torch.Size([2, 2])
    """
    if parameter.shape != shape:
        _replace_(parameter, parameter.data.new_empty(shape))
