# SPDX-License-Identifier: Apache-2.0
"""Ranks of a model: reading them, and removing slices for good."""

from typing import TypeVar

from torch import nn
from torch.optim import Optimizer

from rankfall._walk import finite_tensors, layer_path, low_rank_tensors

M = TypeVar("M", bound=nn.Module)


def ranks(model: nn.Module) -> dict[str, dict[str, int]]:
    """The current rank of every bond of every low-rank tensor, by layer.

    Example:
        >>> model = nn.Sequential(rf.nn.Linear(12, 20, format=rf.TTM(4)))
        >>> rf.ranks(model)
        {'0': {'r1': 4}}
    """
    return {layer_path(path): tensor.ranks for path, tensor in low_rank_tensors(model)}


def table_rows(model: nn.Module) -> dict[str, int]:
    """How many rows of each low-rank table are left, by layer."""
    return {layer_path(path): tensor.rows for path, tensor in low_rank_tensors(model) if tensor.is_table}


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
        ValueError: If `threshold` is outside 0 to 1, the model has no low-rank tensor, or a factor is NaN or infinite.
            Nothing has changed then.

    Source: Hawkins, Liu, Zhang, arXiv 2010.08689; its code masks slices, here they are gone.
    """
    check_threshold(threshold)
    tensors = finite_tensors(model, "prune")
    scales = {path: tensor.prior_scales(means_only=True) for path, tensor in tensors}
    for path, tensor in tensors:
        # All scales are read before the first cut, since a bond's scale depends on its neighbour's rank.
        keep = {bond: scale >= threshold * scale.max() for bond, scale in scales[path].items() if len(scale)}
        for bond, kept in keep.items():
            if not bool(kept.all()):
                tensor.keep_slices_(bond, kept.nonzero()[:, 0], optimizer)
    return model


def canonicalize_(model: M, optimizer: Optimizer | None = None) -> M:
    """Moves every low-rank tensor to the cheapest factors of the same tensor, in place: the gauge step.

    X and X^-1 may be inserted on any bond without changing the function. The KL does change, and this takes it down
    from the factors alone, without data and without noise. Slices become orthogonal and sorted by singular value (TT,
    TT-matrix, Tucker; the ring bond by bond; CP keeps its slices), then the scale of each slice is split between the
    factors that bear it: with rf.MeanField, and for CP, by a small minimisation of the KL under the model's own prior;
    otherwise evenly, since with rf.Point moving a slice to one side lowers the KL without end. Scales stay within two
    e-folds of an even split, and factors as a whole get the same root mean square, so that one step size fits them all
    (not the core of Tucker with rf.MeanField, whose prior is fixed). All of it in float64.

    Means are exact, so the function at the posterior mean stays. Standard deviations of rf.MeanField are carried
    through the same maps with correlations dropped. Where that costs more than the rotation saves, only the scales
    change and slices stay as they lie; a tensor whose KL would not fall at all keeps its factors bit for bit.
    Where factors change, their gradients are dropped, the optimizer's momenta become 0 and its second moments their
    mean, since entries have been mixed. Call it between steps.

    Example:
        >>> layer = rf.nn.Linear(12, 20, format=rf.TTM(max_rank=6)).eval()
        >>> x, before = torch.randn(3, 12), rf.kl(layer)
        >>> y = layer(x)
        >>> _ = rf.canonicalize_(layer)
        >>> torch.allclose(layer(x), y, atol=1e-5), bool(rf.kl(layer) < before)
        (True, True)

    Args:
        model: Any module; only low-rank tensors inside it change.
        optimizer: The optimizer that owns the factors, if there is one.

    Returns:
        The model itself.

    Raises:
        ValueError: If the model has no low-rank tensor, or a factor is NaN or infinite. Nothing has changed then.

    Source: Oseledets, SIAM J. Sci. Comput. 2011 (TT rounding without the truncation); De Lathauwer et al. 2000 (HOSVD).
    """
    for _, tensor in finite_tensors(model, "canonicalize"):
        tensor.canonicalize_(optimizer)
    return model


def grow_ranks_(model: M, optimizer: Optimizer | None = None, *, slices: int = 1) -> M:
    """Gives bonds slices back, in place, without changing the function: the way out of a cut that was one too many.

    Every bond gets `slices` more, up to the rank it started from. A new slice has random entries in all factors that
    bear it but the last, where it is 0; training fills it if the data has a use for it, and the next
    `rf.select_ranks_` removes it if not. Call it between steps.

    Example:
        >>> layer = rf.nn.Linear(12, 20, format=rf.TTM(max_rank=6))
        >>> layer.weight.keep_slices_("r1", torch.tensor([0, 1]))
        >>> rf.ranks(rf.grow_ranks_(layer))
        {'': {'r1': 3}}

    Args:
        model: Any module; only low-rank tensors inside it change.
        optimizer: The optimizer that owns the factors, if there is one.
        slices: How many slices a bond gets.

    Returns:
        The model itself.

    Raises:
        ValueError: If `slices` is negative, the model has no low-rank tensor, or a factor is NaN or infinite. Nothing
            has changed then.
    """
    if slices < 0:
        raise ValueError(f"slices must be 0 or more, got {slices}. rf.select_ranks_ removes slices.")
    for _, tensor in finite_tensors(model, "grow"):
        largest = tensor.format.start_ranks(tensor.layout)
        for bond, rank in tensor.ranks.items():
            # A rank may be above its start, by load_state_dict, or because rows were cut since.
            tensor.grow_slices_(bond, max(min(slices, largest[bond] - rank), 0), optimizer)
    return model
