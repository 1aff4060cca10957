# SPDX-License-Identifier: Apache-2.0
"""Parameter groups with a step size that fits factors."""

import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from rankfall._tensor import LowRankTensor
from rankfall._walk import low_rank_tensors
from rankfall.nn import GRU, LSTM, Embedding, EmbeddingBag

# Relative change of a reconstructed weight that one step of Adam makes, per unit of `lr`. Found by a sweep over
# formats, orders and ranks (benchmarks/factor_steps.py).
_CHANGE_PER_LR = 120.0
# A recurrent weight acts again at every token and a table's factors on all rows at once; at 120 an LSTM over an
# embedding learns nothing. 20 is about what Adam does to a dense recurrent weight.
_GENTLE_CHANGE_PER_LR = 20.0
_SENSITIVE = (LSTM, GRU, Embedding, EmbeddingBag)


def parameter_groups(
    model: nn.Module, lr: float, factor_lr: float | None = None, *, changes: Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    """Parameter groups for any torch optimizer: factors, their log standard deviations, everything else.

    Entries of a factor are larger than entries of the weight that they make, by decades for many modes, and a weight
    is a product of n factors. Steps of Adam are of the size of the learning rate whatever the gradient is, so
    independent steps of size `factor_lr` change the weight by

        |dW| / |W|  =  factor_lr * sqrt( sum over the n factors of 1 / rms_k^2 ),   rms_k^2 = mean square of factor k

    The default makes that 120 * lr for every tensor, whatever its format, order and rank: 0.12 for lr = 1e-3. In
    recurrent layers and embeddings, of which many bear less, it is 20 * lr. Call it once the model has the weights that
    training starts from.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(rf.nn.Linear(64, 64, format=rf.TT(10)), nn.ReLU(), nn.Linear(64, 10))
        >>> groups = rf.parameter_groups(model, lr=1e-3)
        >>> [(g["name"], len(g["params"]), round(g["lr"], 3)) for g in groups]
        [('factors', 6, 0.017), ('log stds', 6, 0.01), ('other', 3, 0.001)]
        >>> optimizer = torch.optim.Adam(groups)

    Args:
        model: Any module.
        lr: The step size of everything that is not a factor: biases, normalisation, dense layers.
        factor_lr: One step size for all factors; None for the default, found for each tensor.
        changes: What takes the place of 120 and 20, by the path of a module that it is for, with all within it; the
            last one that fits counts. Tables of a recommender, for example, learn better at 120.

    Returns:
        Groups with the keys params, lr and name. Tensors that want the same step size, to two digits, share a group.

    Raises:
        ValueError: If a step size or a change is not positive, or a path is none of the model's.
    """
    for name, value in (("lr", lr), ("factor_lr", factor_lr)):
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive, got {value}. Pass for example {name}=1e-3.")
    known_changes = _changes(model, changes or {})
    factors: dict[float, list[nn.Parameter]] = {}
    log_stds: list[nn.Parameter] = []
    for _, tensor in low_rank_tensors(model):
        change = known_changes.get(id(tensor), _CHANGE_PER_LR)
        step = _fitting_step(tensor, lr * change) if factor_lr is None else factor_lr
        factors.setdefault(step, []).extend(tensor.factors)
        log_stds.extend(tensor.log_stds)
    known = {p for params in factors.values() for p in params} | set(log_stds)
    groups = [{"params": params, "lr": step, "name": "factors"} for step, params in factors.items()]
    groups.append({"params": log_stds, "lr": lr * _LOG_STD_FACTOR, "name": "log stds"})
    groups.append({"params": [p for p in model.parameters() if p not in known], "lr": lr, "name": "other"})
    return [group for group in groups if group["params"]]


_LOG_STD_FACTOR = 10.0


def _changes(model: nn.Module, changes: Mapping[str, float]) -> dict[int, float]:
    """The relative change per unit of `lr` of tensors, by their ids, where it is not the usual one."""
    gentle = [layer for layer in model.modules() if isinstance(layer, _SENSITIVE)]
    found = {id(tensor): _GENTLE_CHANGE_PER_LR for layer in gentle for _, tensor in low_rank_tensors(layer)}
    paths = dict(model.named_modules())
    for path, change in changes.items():
        if path not in paths:
            raise ValueError(f"changes: {type(model).__name__} has no module {path!r}. Pass a path of named_modules().")
        if not 0 < change < math.inf:
            raise ValueError(f"changes: that of {path!r} must be positive, got {change}. 120 is the usual one.")
        found |= {id(tensor): change for _, tensor in low_rank_tensors(paths[path])}
    return found


def _fitting_step(tensor: LowRankTensor, change: float) -> float:
    """The step size that changes a tensor by the given part of its norm, to two digits."""
    squares = [float(f.detach().square().mean()) for f in tensor.factors if f.numel()]
    weights = sum(1 / s for s in squares if s > 0)
    step = change / math.sqrt(weights) if weights else change
    return float(f"{step:.1e}")
