# SPDX-License-Identifier: Apache-2.0
"""Counts that are true: read off the tensors that are there, after the cuts, per layer and for the whole model."""

import math
from dataclasses import dataclass

from torch import nn

from rankfall._walk import layer_path, low_rank_tensors


@dataclass(frozen=True)
class LayerSummary:
    """One low-rank tensor of a model.

    Attributes:
        path: Path of the layer.
        format: Name of the format.
        shape: Shape of the dense weight.
        modes: Modes of each axis.
        ranks: Current rank of every bond.
        parameters: Entries of the factors.
        dense_parameters: Entries of the dense weight.
        padding: Entries of the padded weight beyond the dense one, as a fraction of the dense one; 0 without padding.
        rows: Rows of a table that are left; all after them are zeros.
    """

    path: str
    format: str
    shape: tuple[int, ...]
    modes: tuple[tuple[int, ...], ...]
    ranks: dict[str, int]
    parameters: int
    dense_parameters: int
    padding: float
    rows: int

    @property
    def compression(self) -> float:
        """Dense parameters / factor parameters, biases not counted."""
        return _ratio(self.dense_parameters, self.parameters)


@dataclass(frozen=True)
class Summary:
    """The counts of a whole model; printed, it is a table.

    Attributes:
        parameters: Parameters of the compact model: factors (posterior means), biases, all other layers.
        trained_parameters: The same with the posterior standard deviations that training carries beside the means.
        dense_parameters: Parameters of the model as it would be without low-rank tensors.
        layers: One entry per low-rank tensor.
    """

    parameters: int
    trained_parameters: int
    dense_parameters: int
    layers: tuple[LayerSummary, ...]

    @property
    def compression(self) -> float:
        """Dense parameters / parameters of the whole model; above 1 is good."""
        return _ratio(self.dense_parameters, self.parameters)

    def __str__(self) -> str:
        header = ("layer", "format", "shape", "modes", "ranks", "parameters", "dense", "compression")
        rows = [header, *(_row(layer) for layer in self.layers)]
        rest = self.parameters - sum(layer.parameters for layer in self.layers)
        rows.append(("everything else", "", "", "", "", f"{rest:,}", f"{rest:,}", ""))
        rows.append(
            (
                "whole model",
                "",
                "",
                "",
                "",
                f"{self.parameters:,}",
                f"{self.dense_parameters:,}",
                f"{self.compression:.1f}x" if self.parameters else _NOTHING,
            )
        )
        widths = [max(len(row[k]) for row in rows) for k in range(len(header))]
        lines = [
            "  ".join(
                _align(cell, w, right=k >= 5) for k, (cell, w) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        lines.insert(1, "  ".join("-" * w for w in widths))
        lines.insert(-1, lines[1])
        lines += [
            f"{layer.path or 'the layer'} is padded: modes make {' x '.join(str(math.prod(m)) for m in layer.modes)}, "
            f"{layer.padding:.1%} more entries than {' x '.join(map(str, (layer.rows, *layer.shape[1:])))}."
            for layer in self.layers
            if layer.padding
        ]
        lines += [
            f"{layer.path or 'the layer'} has {layer.rows:,} of {layer.shape[0]:,} rows left; those after are zeros."
            for layer in self.layers
            if layer.rows < layer.shape[0]
        ]
        return "\n".join(lines)


def summary(model: nn.Module) -> Summary:
    """Counts the parameters of a model as it stands, and as it would be dense.

    Example:
        >>> model = nn.Sequential(rf.nn.Linear(784, 512, format=rf.TT(2)), nn.ReLU(), nn.Linear(512, 10))
        >>> print(rf.summary(model))
        layer            format  shape      modes             ranks          parameters    dense  compression
        ---------------  ------  ---------  ----------------  -------------  ----------  -------  -----------
        0                TT      512 x 784  4 4 4 8, 4 7 4 7  2 2 2 2 2 2 2         146  401,408     2749.4x
        everything else                                                           5,642    5,642
        ---------------  ------  ---------  ----------------  -------------  ----------  -------  -----------
        whole model                                                               5,788  407,050        70.3x

    Args:
        model: Any module, with or without low-rank tensors. Shared parameters are counted once.
    """
    tensors = list(low_rank_tensors(model))
    layers = tuple(
        LayerSummary(
            path=layer_path(path),
            format=type(tensor.format).__name__,
            shape=tensor.shape,
            modes=tensor.layout.modes,
            ranks=tensor.ranks,
            parameters=sum(f.numel() for f in tensor.factors),
            dense_parameters=math.prod(tensor.shape),
            padding=math.prod(tensor.layout.padded_shape) / math.prod(tensor.layout.shape) - 1,
            rows=tensor.rows,
        )
        for path, tensor in tensors
    )
    trained = sum(p.numel() for p in model.parameters())
    parameters = trained - sum(log_std.numel() for _, tensor in tensors for log_std in tensor.log_stds)
    saved = sum(layer.dense_parameters - layer.parameters for layer in layers)
    return Summary(parameters, trained, parameters + saved, layers)


_NOTHING = "all zeros"


def _row(layer: LayerSummary) -> tuple[str, ...]:
    return (
        layer.path or "(root)",
        layer.format,
        " x ".join(map(str, layer.shape)),
        ", ".join(" ".join(map(str, modes)) for modes in layer.modes),
        " ".join(map(str, layer.ranks.values())),
        f"{layer.parameters:,}",
        f"{layer.dense_parameters:,}",
        # A bond of rank 0 makes all of the weight zeros, whatever factors are left beside it.
        f"{layer.compression:.1f}x" if all(layer.ranks.values()) else _NOTHING,
    )


def _align(cell: str, width: int, *, right: bool) -> str:
    return cell.rjust(width) if right else cell.ljust(width)


def _ratio(dense: int, compact: int) -> float:
    return dense / compact if compact else math.inf
