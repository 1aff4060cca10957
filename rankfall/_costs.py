# SPDX-License-Identifier: Apache-2.0
"""What a tensorized model will cost, counted before it is trained."""

from dataclasses import dataclass

from torch import nn

from rankfall import _contract
from rankfall._summary import Summary, summary
from rankfall.nn import Linear

_COPIES, _BYTES = 4, 4  # Adam keeps a parameter, its gradient and two moments, four bytes each in float32.


@dataclass(frozen=True)
class LayerCosts:
    """One layer's forward pass.

    Attributes:
        path: Path of the layer.
        flops: Multiplications and additions of one batch by the planned order.
        dense_flops: The same by the dense layer.
        forms_weight: Whether the planned order contracts all factors before the input meets them.
    """

    path: str
    flops: int
    dense_flops: int
    forms_weight: bool


@dataclass(frozen=True)
class Costs:
    """A whole model's costs; printed, it is text for a terminal.

    Attributes:
        batch_size: Rows per batch.
        layers: One entry per low-rank linear layer.
        training_bytes: Parameters, gradients and Adam's moments in float32; activations are not counted.
        dense_training_bytes: The same for the dense model.
        counts: The parameters.
    """

    batch_size: int
    layers: tuple[LayerCosts, ...]
    training_bytes: int
    dense_training_bytes: int
    counts: Summary

    def __str__(self) -> str:
        lines = [str(self.counts)]
        if self.layers:
            lines += ["", f"linear layers, forward pass of a batch of {self.batch_size}, in millions of operations:"]
        width = max((len(layer.path or "(root)") for layer in self.layers), default=0)
        for layer in self.layers:
            how = "forms the weight" if layer.forms_weight else "never forms the weight"
            lines.append(
                f"  {layer.path or '(root)':<{width}}  {layer.flops / 1e6:>10,.1f}  "
                f"dense {layer.dense_flops / 1e6:>10,.1f}  {how}"
            )
        lines += [
            "",
            f"memory of parameters, gradients and Adam's moments: {_megabytes(self.training_bytes)} at the start, "
            f"dense {_megabytes(self.dense_training_bytes)}. Training lowers the ranks, and all of this with them.",
        ]
        return "\n".join(lines)


def costs(model: nn.Module, batch_size: int) -> Costs:
    """Counts parameters, floating-point operations and training memory at the current ranks.

    Example:
        >>> model = rf.tensorize_(nn.Sequential(nn.Linear(784, 512)), rf.TT(8))
        >>> costs(model, 128).layers[0].flops < costs(model, 128).layers[0].dense_flops
        True

    Args:
        model: A model with low-rank layers.
        batch_size: Rows per batch.

    Raises:
        ValueError: If `batch_size` is not positive.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be 1 row or more, got {batch_size}.")
    layers = []
    for path, layer in model.named_modules():
        if isinstance(layer, Linear):
            shapes = [f.shape for f in layer.weight.factors]
            plan = _contract.linear_plan(layer.weight.layout, shapes, batch_size)
            dense = 2 * batch_size * layer.in_features * layer.out_features
            # The input is tensor 0 until it is taken; only the last step may take it if the weight is formed.
            forms_weight = all(0 not in positions for positions, _ in plan.steps[:-1])
            layers.append(LayerCosts(path, plan.flops, dense, forms_weight))
    counts = summary(model)
    size = _COPIES * _BYTES
    return Costs(batch_size, tuple(layers), counts.trained_parameters * size, counts.dense_parameters * size, counts)


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
