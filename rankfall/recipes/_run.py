# SPDX-License-Identifier: Apache-2.0
"""One training run of a recipe, from data to run folder."""

import json
import random
import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_accuracy

from rankfall._checkpoint import load, save
from rankfall._fit import fit
from rankfall._groups import parameter_groups
from rankfall._ranks import ranks
from rankfall._summary import summary
from rankfall._tensorize import tensorize_
from rankfall.recipes import digits, mnist
from rankfall.recipes._folder import RunFolder
from rankfall.recipes._options import TrainOptions, make_format
from rankfall.recipes._recipe import Data, Recipe

RECIPES = {recipe.name: recipe for recipe in (digits.RECIPE, mnist.RECIPE)}
_TEST_ROWS = 5000  # Rows per forward pass when the test set is evaluated.


def train(options: TrainOptions, *, progress: bool = True) -> tuple[RunFolder, nn.Module, dict[str, Any]]:
    """Trains a recipe and writes its run folder; a finished run that is resumed is only read.

    Args:
        options: The choices of the run.
        progress: Whether a progress bar is shown.

    Returns:
        The folder, the trained model in eval mode, and the content of metrics.json.

    Raises:
        ValueError: If an option is out of range, data is damaged, or the folder is taken. Nothing is written then.
        FileNotFoundError: If data is missing. Nothing is written then.
    """
    options.check()
    folder = RunFolder(options)
    folder.check()
    recipe = RECIPES[options.recipe]
    random.seed(options.seed)
    torch.manual_seed(options.seed)
    model = build_model(recipe, options)
    if options.resume and folder.metrics.is_file():
        return folder, load(folder.model, model).eval(), json.loads(folder.metrics.read_text())
    data = recipe.load(options.data_dir).limited(options.limit)
    folder.open()
    history = _fit(recipe, options, model, data, folder, progress)
    folder.write_history(history)  # A run killed between its last checkpoint and the record of it lacks that one.
    save(model, folder.model)
    metrics = _metrics(options, model, history)
    folder.write("metrics.json", metrics)
    for phase in _phases(recipe, options):
        (folder.path / phase.checkpoint).unlink(missing_ok=True)
    return folder, model.eval(), metrics


def build_model(recipe: Recipe, options: TrainOptions) -> nn.Module:
    """The recipe's network as training starts from it: dense, or its linear layers in the chosen format."""
    model = recipe.model()
    return model if options.starts_dense else to_format(model, recipe, options)


def to_format(model: nn.Module, recipe: Recipe, options: TrainOptions, *, from_dense: bool = False) -> nn.Module:
    """Brings the linear layers of a recipe's network into the chosen format, in place; afresh, or as they are."""
    prior, posterior = options.make_prior(), options.make_posterior()
    rank = recipe.max_rank if options.max_rank is None else options.max_rank
    convert = partial(tensorize_, prior=prior, posterior=posterior, from_dense=from_dense)
    special = recipe.paired_modes if options.format == "ttm" else {}
    for path, modes in special.items():
        held = make_format(options.format, rank, modes)
        convert(model, held, filter_fn=lambda _, p, path=path: p == path)
    return convert(model, make_format(options.format, rank))


@dataclass(frozen=True)
class _Phase:
    """A stretch of training with an optimizer of its own.

    Attributes:
        checkpoint: Name of the file that holds its state.
        epochs: Its length.
        prepare: Changes the model before it.
    """

    checkpoint: str
    epochs: int
    prepare: Callable[[nn.Module], object] = lambda model: model


def _phases(recipe: Recipe, options: TrainOptions) -> list[_Phase]:
    epochs = options.epochs or recipe.epochs
    if options.method != "compress":
        return [_Phase("checkpoint.pt", epochs)]
    decompose = partial(to_format, recipe=recipe, options=options, from_dense=True)
    return [
        _Phase("checkpoint.pt", epochs - epochs // 2),
        _Phase("checkpoint-factors.pt", epochs // 2, decompose),
    ]


def _fit(
    recipe: Recipe, options: TrainOptions, model: nn.Module, data: Data, folder: RunFolder, progress: bool
) -> list[dict[str, Any]]:
    history: list[dict[str, Any]] = []
    for phase in _phases(recipe, options):
        started = time.perf_counter()
        phase.prepare(model)
        joined = partial(_joined, history, time.perf_counter() - started)
        records = fit(
            model,
            data.batches(recipe.batch_size),
            _cross_entropy,
            optimizer=torch.optim.Adam(parameter_groups(model, recipe.lr)),
            epochs=phase.epochs,
            num_data=len(data.train[0]),
            beta=options.beta if options.shrinks else 0.0,
            selection=options.make_selection(),
            evaluate=lambda: _test(model, data.test),
            on_epoch=lambda records, joined=joined: folder.write_history(joined(records)),
            checkpoint=folder.path / phase.checkpoint,
            progress=progress,
        )
        history = joined(records)
    return history


def _joined(before: list[dict[str, Any]], preparing: float, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records of one phase after those before it; its first epoch bears the seconds of its preparation."""
    first, *others = records
    after = [first | {"seconds": first["seconds"] + preparing}, *others]
    return [*before, *(record | {"epoch": len(before) + record["epoch"]} for record in after)]


def _cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def _test(model: nn.Module, rows: tuple[Tensor, Tensor]) -> Mapping[str, float]:
    device = next(model.parameters()).device
    logits = torch.cat([model(part.to(device)) for part in rows[0].split(_TEST_ROWS)])
    labels = rows[1].to(device)
    accuracy = multiclass_accuracy(logits, labels, num_classes=logits.shape[1], average="micro")
    return {"test_accuracy": float(accuracy), "test_nll": float(F.cross_entropy(logits, labels))}


def _metrics(options: TrainOptions, model: nn.Module, history: list[dict[str, Any]]) -> dict[str, Any]:
    counts, last = summary(model), history[-1]
    return {
        "recipe": options.recipe,
        "format": None if options.is_dense else options.format,
        "prior": options.prior if options.shrinks else None,
        "posterior": options.posterior if options.shrinks else None,
        "method": options.method,
        "seed": options.seed,
        "epochs": len(history),
        "test_accuracy": last["test_accuracy"],
        "test_nll": last["test_nll"],
        "parameters": counts.parameters,
        "dense_parameters": counts.dense_parameters,
        "compression": counts.compression,
        "ranks": ranks(model),
        "seconds": sum(record["seconds"] for record in history),
        # Linux counts kibibytes; the highest mark of the process, data and libraries included.
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
