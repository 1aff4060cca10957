# SPDX-License-Identifier: Apache-2.0
"""How good a classifier is, and how far its probabilities can be trusted."""

import importlib
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from rankfall.recipes._data import Data

FIGURES = ("test_accuracy", "test_nll", "test_ece", "test_brier")
"""The names of what `measure` gives."""

_BINS = 15


def measure(model: nn.Module, data: Data, rows: int) -> dict[str, float]:
    """The figures of a model on the test rows of its data.

    Args:
        model: Returns logits, shape (n, classes).
        data: The data.
        rows: How many rows a forward pass takes.
    """
    device = next(model.parameters()).device
    logits, labels = zip(*((model(x.to(device)), y.to(device)) for x, y in data.test_batches(rows)), strict=True)
    found, truth = torch.cat(logits).float(), torch.cat(labels)
    clicks = click_figures(found[:, 1].double() - found[:, 0].double(), truth) if data.clicks else {}
    return figures(found.log_softmax(1), truth) | {f"test_{name}": value for name, value in clicks.items()}


def figures(log_probabilities: Float[Tensor, "n classes"], labels: Int[Tensor, " n"]) -> dict[str, float]:
    """Accuracy, NLL in nats, expected calibration error and Brier score.

    The calibration error is the mean distance of confidence and accuracy over 15 bins of equal width (Guo et al., On
    Calibration of Modern Neural Networks, ICML 2017); the Brier score is the mean over rows of the sum over classes of
    (p - [class is the label])^2.

    Example:
        >>> sure = torch.tensor([[0.75, 0.25], [0.75, 0.25]]).log()
        >>> {name: round(value, 3) for name, value in figures(sure, torch.tensor([0, 1])).items()}
        {'test_accuracy': 0.5, 'test_nll': 0.837, 'test_ece': 0.25, 'test_brier': 0.625}
    """
    metrics = _classification()
    probabilities, classes = log_probabilities.exp(), log_probabilities.shape[1]
    accuracy = metrics.multiclass_accuracy(log_probabilities, labels, num_classes=classes, average="micro")
    ece = metrics.multiclass_calibration_error(probabilities, labels, num_classes=classes, n_bins=_BINS)
    brier = (probabilities - F.one_hot(labels, classes)).square().sum(1).mean()
    nll = F.nll_loss(log_probabilities, labels)
    return dict(zip(FIGURES, map(float, (accuracy, nll, ece, brier)), strict=True))


def click_figures(log_odds: Float[Tensor, " n"], clicked: Int[Tensor, " n"]) -> dict[str, float]:
    """Area under the ROC curve, and normalised entropy (He et al., Practical Lessons from Predicting Clicks, 2014).

    Normalised entropy is the mean NLL over that of always predicting the rate of clicks among these rows; below 1 is
    better than that.

    Example:
        >>> figures = click_figures(torch.tensor([2.0, -1.0, -3.0, 0.0]), torch.tensor([1, 1, 0, 0]))
        >>> {name: round(value, 3) for name, value in figures.items()}
        {'auc': 0.75, 'normalised_entropy': 0.787}

    Args:
        log_odds: Of a click. Probabilities would not do: those of large log odds are 1, and tie.
        clicked: 1 where one came, else 0.

    Raises:
        ValueError: If a click came in all rows, or in none.
    """
    check_both([clicked])
    came = clicked.double()
    usual = F.binary_cross_entropy(came.mean().expand(len(came)), came)
    nll = F.binary_cross_entropy_with_logits(log_odds.double(), came)
    return {"auc": _area(log_odds, clicked), "normalised_entropy": float(nll / usual)}


def check_both(labels: Iterable[Int[Tensor, " n"]]) -> None:
    """Refuses rows that all have the same label, for which figures of clicks are not defined.

    Args:
        labels: Part by part; those after the first that settles it are not asked for.

    Raises:
        ValueError: If there are no two labels that differ.
    """
    seen: set[int] = set()
    for part in labels:
        seen.update(part.unique().tolist())
        if len(seen) > 1:
            return
    raise ValueError(
        "all rows to test with have the same label, and AUC and normalised entropy need both. "
        "Pass a larger --limit, or prepare more rows."
    )


def _area(scores: Float[Tensor, " n"], labels: Int[Tensor, " n"]) -> float:
    """The area under the ROC curve: how often a row of label 1 has the higher score, one half for each tie.

    Only the order of scores matters, and torchmetrics would make probabilities of them, in which large ones tie.
    """
    values, place = scores.double().unique(return_inverse=True)
    return float(_classification().binary_auroc(place.double() / max(len(values) - 1, 1), labels))


def auroc(known: Float[Tensor, " n"], strange: Float[Tensor, " m"]) -> float:
    """How well a score tells rows of another kind: the chance that a strange row has a higher one than a known row.

    Example:
        >>> auroc(torch.tensor([0.1, 0.3]), torch.tensor([0.2, 0.4]))
        0.75

    Args:
        known: Scores of rows like those of the training set.
        strange: Scores of other rows.
    """
    truth = torch.cat([torch.zeros(len(known), dtype=torch.int64), torch.ones(len(strange), dtype=torch.int64)])
    return _area(torch.cat([known, strange]).cpu(), truth)


def _classification() -> Any:  # noqa: ANN401  a module
    """Of torchmetrics; loaded late, since it makes tensors, from when on torch does not look which pages to ask for."""
    return importlib.import_module("torchmetrics.functional.classification")
