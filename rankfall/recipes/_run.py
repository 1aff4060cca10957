# SPDX-License-Identifier: Apache-2.0
"""One training run of a recipe, from data to run folder."""

import json
import random
import resource
from collections.abc import Mapping
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

_RECIPES = {recipe.name: recipe for recipe in (digits.RECIPE, mnist.RECIPE)}
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
    recipe = _RECIPES[options.recipe]
    random.seed(options.seed)
    torch.manual_seed(options.seed)
    model = build_model(recipe, options)
    if options.resume and folder.metrics.is_file():
        return folder, load(folder.model, model).eval(), json.loads(folder.metrics.read_text())
    data = recipe.load(options.data_dir).limited(options.limit)
    folder.open()
    history = _fit(recipe, options, model, data, folder, progress)
    save(model, folder.model)
    metrics = _metrics(options, model, history)
    folder.write("metrics.json", metrics)
    folder.checkpoint.unlink(missing_ok=True)
    return folder, model.eval(), metrics


def build_model(recipe: Recipe, options: TrainOptions) -> nn.Module:
    """The recipe's network, its linear layers in the chosen format."""
    model = recipe.model()
    if options.is_dense:
        return model
    prior, posterior = options.make_prior(), options.make_posterior()
    rank = recipe.max_rank if options.max_rank is None else options.max_rank
    special = recipe.paired_modes if options.format == "ttm" else {}
    for path, modes in special.items():
        held = make_format(options.format, rank, modes)
        tensorize_(model, held, prior=prior, posterior=posterior, filter_fn=lambda _, p, path=path: p == path)
    return tensorize_(model, make_format(options.format, rank), prior=prior, posterior=posterior)


def _fit(
    recipe: Recipe, options: TrainOptions, model: nn.Module, data: Data, folder: RunFolder, progress: bool
) -> list[dict[str, Any]]:
    epochs = options.epochs or recipe.epochs
    return fit(
        model,
        data.batches(recipe.batch_size),
        _cross_entropy,
        optimizer=torch.optim.Adam(parameter_groups(model, recipe.lr)),
        epochs=epochs,
        num_data=len(data.train[0]),
        beta=options.beta if options.shrinks else 0.0,
        # A run shorter than the recipe's still has a time with the whole KL.
        kl_warmup=min(recipe.kl_warmup, epochs // 3),
        selection=options.make_selection(),
        evaluate=lambda: _test(model, data.test),
        on_epoch=folder.write_history,
        checkpoint=folder.checkpoint,
        progress=progress,
    )


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
        "prior": options.prior if options.method == "shrinkage" else None,
        "posterior": options.posterior if options.method == "shrinkage" else None,
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
