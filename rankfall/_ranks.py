# SPDX-License-Identifier: Apache-2.0
"""Ranks of a model: reading them, and removing slices for good."""

from typing import TypeVar

import torch
from torch import nn
from torch.optim import Optimizer

from rankfall._tensor import layer_path, low_rank_tensors

M = TypeVar("M", bound=nn.Module)


def ranks(model: nn.Module) -> dict[str, dict[str, int]]:
    """The current rank of every bond of every low-rank tensor, by layer.

    Example:
        >>> model = nn.Sequential(rf.nn.Linear(12, 20, format=rf.TTM(4)))
        >>> rf.ranks(model)
        {'0': {'r1': 4}}
    """
    return {layer_path(path): tensor.ranks for path, tensor in low_rank_tensors(model)}


def check_threshold(threshold: float) -> None:
    """Refuses a threshold that is no fraction.

    Raises:
        ValueError: If `threshold` is outside 0 to 1.
    """
    if not 0 <= threshold < 1:
        raise ValueError(
            f"threshold must be from 0 up to but not including 1, got {threshold}: it is a fraction of the "
            "largest prior scale of a bond. Pass for example threshold=1e-2."
        )


def prune_(model: M, optimizer: Optimizer | None = None, *, threshold: float) -> M:
    """Removes the slices whose prior scale has fallen away, in place.

    A slice of a bond is kept if its scale is at least `threshold` times the largest of that bond; the largest always
    stays. The scale is the one that the posterior means call for, since they are what the compact model computes with
    (`LowRankTensor.prior_scales`; with rf.Point there is no other). Factors, gradients and the optimizer's per-element
    state get smaller together, every Parameter stays the same object, and the function at the posterior mean changes
    by exactly the slices that go.

    Call it between steps, after `optimizer.step()`.

    Example:
        >>> layer = rf.nn.Linear(12, 20, format=rf.TTM(max_rank=6))
        >>> optimizer = torch.optim.Adam(layer.parameters())
        >>> rf.ranks(rf.prune_(layer, optimizer, threshold=1e-3))
        {'': {'r1': 6}}

    Args:
        model: Any module; only low-rank tensors inside it change.
        optimizer: The optimizer that owns the factors. Leave it out before training or for inference.
        threshold: Ratio of two standard deviations, from 0 up to 1. Raise it for smaller models; 0 removes nothing.

    Returns:
        The model itself.

    Raises:
        ValueError: If `threshold` is outside 0 to 1, or the model has no low-rank tensor.

    Source: Hawkins, Liu, Zhang, arXiv 2010.08689, section 3.4; there slices are masked, here they are gone.
    """
    check_threshold(threshold)
    tensors = list(low_rank_tensors(model))
    if not tensors:
        raise ValueError(
            f"{type(model).__name__} has no low-rank tensor to prune. Call rf.tensorize_(model, rf.TTM(20)) first."
        )
    scales = {path: tensor.prior_scales(means_only=True) for path, tensor in tensors}
    for path, by_bond in scales.items():
        if not all(bool(torch.isfinite(scale).all()) for scale in by_bond.values()):
            raise ValueError(f"{layer_path(path)!r} has factors that are NaN or infinite. Go back to a checkpoint.")
    for path, tensor in tensors:
        # All scales are read before the first cut, since a bond's scale depends on its neighbour's rank.
        keep = {bond: scale >= threshold * scale.max() for bond, scale in scales[path].items() if len(scale)}
        for bond, kept in keep.items():
            if not bool(kept.all()):
                tensor.keep_slices_(bond, kept.nonzero()[:, 0], optimizer)
    return model
