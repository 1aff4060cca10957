# SPDX-License-Identifier: Apache-2.0
"""The ids that a table is asked for: what is refused of them, and what is left of their rows."""

import torch
from torch import Tensor

from rankfall._layout import Layout
from rankfall._rows import may_look_at
from rankfall._tensor import LowRankTensor


def left(weight: LowRankTensor, layout: Layout, ids: Tensor) -> tuple[Tensor, Tensor | None]:
    """Ids of rows that are left in today's layout, and which ids stood for one that is gone; None if all are there."""
    rows = layout.shape[0]
    if rows == weight.shape[0]:
        return ids, None
    return ids.clamp(max=rows - 1), ids >= rows


def _named(weight: LowRankTensor, kind: str) -> str:
    return repr(weight.path) if weight.path else kind


def check_ids(weight: LowRankTensor, ids: Tensor, kind: str) -> None:
    """Refuses ids that are no integers, or no rows of the table; `kind` names it where it has no path.

    Raises:
        ValueError: If their type is no integer's.
        IndexError: If one is no row.
    """
    if ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{_named(weight, kind)} takes ids of type int64 or int32, got {ids.dtype}. Call ids.long().")
    if not ids.numel():
        return
    if not may_look_at(ids):
        # As torch has it on a device, where an error with the ids in it would have to be waited for.
        inside = ids.clamp(0, weight.shape[0] - 1).eq(ids).all()
        message = f"{_named(weight, kind)} has {weight.shape[0]} rows, and an id is none of them."
        torch._assert_async(inside, message)  # pyright: ignore[reportPrivateImportUsage]
        return
    low, high = map(int, ids.aminmax())
    if low < 0 or high >= weight.shape[0]:
        raise IndexError(
            f"{_named(weight, kind)} has {weight.shape[0]} rows, but ids go from {low} to {high}. "
            "Make the table as large as the vocabulary, or map unknown ids to one of its rows."
        )


def check_weights(weight: LowRankTensor, mode: str, ids: Tensor, weights: Tensor | None) -> None:
    """Refuses weights of ids that a bag of this mode has no use for, or that are not one for each id.

    Raises:
        NotImplementedError: If the mode is not "sum".
        ValueError: If their shape is not that of the ids.
    """
    if weights is None:
        return
    name = _named(weight, "EmbeddingBag")
    if mode != "sum":
        raise NotImplementedError(f"{name}: per_sample_weights go with mode='sum', and the mode is {mode!r}.")
    if weights.shape != ids.shape:
        raise ValueError(
            f"{name}: per_sample_weights must have the shape of the ids, {tuple(ids.shape)}, "
            f"got {tuple(weights.shape)}."
        )


def check_offsets(weight: LowRankTensor, ids: Tensor, offsets: Tensor | None, with_last: bool) -> None:
    """Refuses bags that are none.

    Raises:
        ValueError: If ids and offsets do not go together, or offsets do not rise from 0 to the number of ids at most.
    """
    name = _named(weight, "EmbeddingBag")
    if ids.dim() not in (1, 2):
        raise ValueError(f"{name} takes ids of shape (n,) or (bags, n), got {tuple(ids.shape)}.")
    if (offsets is None) != (ids.dim() == 2):
        what = (
            "needs offsets: where each bag begins" if ids.dim() == 1 else "has bags of one size, so leave out offsets"
        )
        raise ValueError(f"{name}: ids of shape {tuple(ids.shape)}: {what}.")
    if offsets is None:
        return
    if offsets.dim() != 1 or offsets.dtype not in (torch.int64, torch.int32) or (with_last and not len(offsets)):
        raise ValueError(
            f"{name}: offsets must be integers of shape (bags,), got {offsets.dtype} {tuple(offsets.shape)}."
        )
    if not may_look_at(offsets) or not len(offsets):
        return  # Nor does torch look at them on a device.
    if int(offsets[0]) != 0 or int(offsets[-1]) > len(ids) or bool((offsets.diff() < 0).any()):
        raise ValueError(
            f"{name}: offsets must begin with 0, never fall, and end at {len(ids)} ids at most, "
            f"got {', '.join(map(str, offsets[:8].tolist()))}{', ...' if len(offsets) > 8 else ''}."
        )
