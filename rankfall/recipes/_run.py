# SPDX-License-Identifier: Apache-2.0
"""One training run of a recipe, from data to run folder."""

import random
import resource
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankfall._checkpoint import load, save
from rankfall._conversions import conversion_of
from rankfall._fit import fit, join_processes
from rankfall._formats import Format
from rankfall._groups import parameter_groups
from rankfall._posteriors import MeanField
from rankfall._processes import Processes
from rankfall._ranks import ranks
from rankfall._summary import summary
from rankfall._tensorize import tensorize_
from rankfall.recipes import cifar10, criteo, digits, imdb, mnist
from rankfall.recipes._data import Data
from rankfall.recipes._folder import RunFolder
from rankfall.recipes._metrics import check_both, measure
from rankfall.recipes._options import PrecisionName, TrainOptions, make_format
from rankfall.recipes._picture import draw
from rankfall.recipes._recipe import Network, Recipe
from rankfall.recipes._stored import StoredRows

_ALL = (digits.RECIPE, mnist.RECIPE, cifar10.RECIPE, imdb.RECIPE, imdb.TRANSFORMER, criteo.RECIPE)
RECIPES = {recipe.name: recipe for recipe in _ALL}
_ADAM = 4  # Of each parameter, its gradient and two moments are kept beside it.
_TEST_BATCHES = 2  # Batches of training that one forward pass takes when the test set is measured.


def train(options: TrainOptions, *, progress: bool = True) -> tuple[RunFolder, nn.Module, dict[str, Any]]:
    """Trains a recipe and writes its run folder; a finished run that is resumed is only read.

    Of several processes that torchrun has started each trains on its part of the batches, and the first one writes.

    Args:
        options: The choices of the run.
        progress: Whether a progress bar is shown.

    Returns:
        The folder, the trained model in eval mode, and the content of metrics.json.

    Raises:
        ValueError: If an option is out of range, data is damaged, or the folder is taken, is written by another process
            or was started with other options or rows. Nothing is written then.
        FileNotFoundError: If data is missing. Nothing is written then.
    """
    processes = join_processes()
    folder = processes.from_first(lambda: _checked_folder(options))
    recipe = RECIPES[options.recipe]
    network = recipe.network(options.model, options.data_dir)
    random.seed(options.seed)
    torch.manual_seed(options.seed)
    model = processes.together(lambda: build_model(network, options))
    if processes.from_first(lambda: folder.is_finished):
        return folder, load(folder.model, model).eval(), folder.read_metrics()
    data = processes.together(lambda: load_data(recipe, options))
    with ExitStack() as until_the_end:
        processes.on_first(lambda: until_the_end.enter_context(folder.open()))
        history = _fit(network, options, model, data, folder, processes, progress)
        metrics = processes.from_first(lambda: _finish(network, options, model, data, folder, history))
    return folder, model.eval(), metrics


def _checked_folder(options: TrainOptions) -> RunFolder:
    options.check()
    recipe = RECIPES[options.recipe]
    check_data(recipe, options)
    _check_method(recipe, recipe.network(options.model, options.data_dir), options)
    folder = run_folder(options)
    folder.check()
    return folder


def run_folder(options: TrainOptions) -> RunFolder:
    """The folder of a run, with what it has to know of the rows that are learned from.

    Raises:
        ValueError: If the note of prepared rows is damaged.
        FileNotFoundError: If prepared rows are missing.
    """
    if options.recipe != criteo.RECIPE.name or options.data_dir is None:
        return RunFolder(options)
    return RunFolder(options, criteo.fingerprint(options.data_dir))


def _finish(
    network: Network,
    options: TrainOptions,
    model: nn.Module,
    data: Data,
    folder: RunFolder,
    history: list[dict[str, Any]],
) -> dict[str, Any]:
    """Writes what a run folder still lacks; returns the content of metrics.json."""
    folder.write_history(history)  # A run killed between its last checkpoint and the record of it lacks that one.
    save(model, folder.model)
    draw(history, folder.picture)
    metrics = _metrics(network, options, model, history) | dict(data.known)
    folder.write("metrics.json", metrics)
    for phase in _phases(network, options):
        (folder.path / phase.checkpoint).unlink(missing_ok=True)
    return metrics


def load_data(recipe: Recipe, options: TrainOptions) -> Data:
    """The rows that a run learns from and is measured with.

    Raises:
        ValueError: If data is damaged, an option does not go with it, or too few clicks are left to measure with.
        FileNotFoundError: If data is missing.
    """
    check_data(recipe, options)
    if options.synthetic and recipe.made_up is not None:
        return recipe.made_up(options.limit)
    data = recipe.load(options.data_dir).limited(options.limit).cut(options.length or recipe.length)
    if data.clicks and isinstance(data.test, StoredRows):
        check_both(data.test.labels())
    elif data.clicks and isinstance(data.test, tuple):
        check_both(data.test[1:])
    return data


def check_data(recipe: Recipe, options: TrainOptions) -> None:
    """Refuses a choice of data by itself: whether the network fits into memory does not matter then.

    Raises:
        ValueError: If an option does not go with the recipe, or with another one.
        FileNotFoundError: If a recipe whose rows are in a folder or made up has neither.
    """
    if options.length is not None and recipe.length is None:
        raise ValueError(f"--length is for texts, and {recipe.name} has none. Leave it out.")
    if options.synthetic:
        if recipe.made_up is None:
            raise ValueError(f"--synthetic is for criteo, and {recipe.name} has no made-up rows. Leave it out.")
        if options.data_dir is not None:
            raise ValueError("--synthetic makes rows up, and --data-dir reads them. Pass one of the two.")
    elif recipe.made_up is not None and options.data_dir is None:
        recipe.load(None)  # It says what to pass.


def _check_method(recipe: Recipe, network: Network, options: TrainOptions) -> None:
    if options.fills_budget and options.method not in network.baselines:
        raise ValueError(
            f"--method {options.method} is for the tables of criteo, and {recipe.name} has none. "
            "Pass evidence, shrinkage, fixed, compress or dense."
        )


def build_model(network: Network, options: TrainOptions) -> nn.Module:
    """A recipe's network as training starts from it: dense, or its weights in the chosen format.

    Where weights have a spread of their own, the network's dropout is turned off.

    Raises:
        ValueError: If the dense network does not fit into memory, or a budget is too small.
    """
    model = network.make()
    if isinstance(options.make_posterior(), MeanField):
        _without_dropout(model)
    if options.starts_dense:
        return _in_memory(model)
    to_format(model, network, options)
    if options.fills_budget:
        network.baselines[options.method](model, options.budget or summary(model).parameters)
    return model


def obstacle(network: Network, options: TrainOptions) -> str | None:
    """Why a network of the size that a method gives it cannot be trained here; None if it can."""
    try:
        if options.starts_dense:
            _check_memory(network.make())
        elif options.fills_budget:
            build_model(network, options)
    except ValueError as error:
        return str(error)
    return None


def _absent(model: nn.Module) -> list[nn.Module]:
    """The parts of a network that are held without memory."""
    return [module for module in model.modules() if any(p.is_meta for p in module.parameters(recurse=False))]


def _check_memory(model: nn.Module) -> None:
    needed = _ADAM * sum(p.nbytes for module in _absent(model) for p in module.parameters(recurse=False))
    if needed > (free := psutil.virtual_memory().available):
        raise ValueError(
            f"the dense network needs {needed / 1e9:,.1f} GB with gradients and Adam's moments, and {free / 1e9:,.1f} "
            "GB are free. Train it with another --method."
        )


def _in_memory(model: nn.Module) -> nn.Module:
    """Gives what a network holds without memory its first values, if they and what Adam keeps of them fit."""
    _check_memory(model)
    for module in _absent(model):
        module.to_empty(device=torch.get_default_device(), recurse=False)
        module.reset_parameters()  # pyright: ignore
    return model


def _without_dropout(model: nn.Module) -> None:
    """Dropout is noise in place of a posterior (Gal, Ghahramani, arXiv 1506.02142); MeanField has its own."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(module, nn.RNNBase | nn.MultiheadAttention):
            module.dropout = 0.0


def to_format(model: nn.Module, network: Network, options: TrainOptions, *, from_dense: bool = False) -> nn.Module:
    """Brings the weights of a recipe's network into the chosen format, in place; afresh, or as they are."""

    def format_of(path: str | None = None) -> Format:
        rank = options.max_rank or network.ranks.get(path or "", network.max_rank)
        name = options.format or network.formats.get(path or "", options.held)
        return make_format(name, rank, network.modes.get(path or ""))

    convert = partial(
        tensorize_,
        prior=options.make_prior(),
        posterior=options.make_posterior(),
        from_dense=from_dense,
        device=torch.get_default_device(),
    )
    for path in {**network.ranks, **network.modes, **network.formats}:
        convert(model, format_of(path), filter_fn=lambda _, p, path=path: p == path)
    if any(conversion_of(module) for module in model.modules()):
        convert(model, format_of())
    return model


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


def _phases(network: Network, options: TrainOptions) -> list[_Phase]:
    epochs = options.epochs or network.epochs
    if options.method != "compress":
        return [_Phase("checkpoint.pt", epochs)]
    decompose = partial(to_format, network=network, options=options, from_dense=True)
    return [
        _Phase("checkpoint.pt", epochs - epochs // 2),
        _Phase("checkpoint-factors.pt", epochs // 2, decompose),
    ]


def _fit(
    network: Network,
    options: TrainOptions,
    model: nn.Module,
    data: Data,
    folder: RunFolder,
    processes: Processes,
    progress: bool,
) -> list[dict[str, Any]]:
    history: list[dict[str, Any]] = []
    # A step is that of one batch, however dealt out. All phases have the same loader: a stream goes on in the next one.
    batches = data.batches(-(-network.batch_size // processes.count))
    for phase in _phases(network, options):
        started = time.perf_counter()
        phase.prepare(model)
        joined = partial(_joined, history, time.perf_counter() - started)
        records = fit(
            model,
            batches,
            partial(_cross_entropy, precision=options.precision),
            optimizer=torch.optim.Adam(parameter_groups(model, network.lr, changes=network.changes), fused=True),
            epochs=phase.epochs,
            num_data=data.num_data,
            beta=options.beta if options.shrinks else 0.0,
            kl_warmup=network.kl_warmup,
            selection=options.make_selection(network.test_examples),
            evaluate=lambda: measure(model, data, _TEST_BATCHES * network.batch_size),
            on_epoch=lambda records, joined=joined: folder.write_history(joined(records)),
            checkpoint=folder.path / phase.checkpoint,
            cuda_graphs=options.cuda_graphs,
            progress=progress,
        )
        history = joined(records)
    return history


def _joined(before: list[dict[str, Any]], preparing: float, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records of one phase after those before it; its first epoch bears the seconds of its preparation."""
    first, *others = records
    after = [first | {"seconds": first["seconds"] + preparing}, *others]
    return [*before, *(record | {"epoch": len(before) + record["epoch"]} for record in after)]


def _cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor], precision: PrecisionName) -> Tensor:
    inputs, labels = batch
    # Accelerate keeps one mixed precision for the whole process, and a comparison may follow other runs.
    with torch.autocast(inputs.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        logits = model(inputs)
    return F.cross_entropy(logits.float(), labels, reduction="none")


def _metrics(
    network: Network, options: TrainOptions, model: nn.Module, history: list[dict[str, Any]]
) -> dict[str, Any]:
    counts, last = summary(model), history[-1]
    if options.fills_budget:  # A count of what is there does not know of rows that ids share.
        counts = replace(counts, dense_parameters=sum(p.numel() for p in network.make().parameters()))
    return {
        "recipe": options.recipe,
        "model": options.model or RECIPES[options.recipe].usual,
        "format": None if options.is_dense else options.held,
        "prior": options.prior if options.shrinks else None,
        "posterior": options.posterior if options.shrinks else None,
        "method": options.method,
        "precision": options.precision,
        "seed": options.seed,
        "epochs": len(history),
        **{name: value for name, value in last.items() if name.startswith("test_")},
        "parameters": counts.parameters,
        "dense_parameters": counts.dense_parameters,
        "compression": counts.compression,
        "tensorized_parameters": sum(layer.parameters for layer in counts.layers),
        "tensorized_dense_parameters": sum(layer.dense_parameters for layer in counts.layers),
        "ranks": ranks(model),
        "seconds": sum(record["seconds"] for record in history),
        # Linux counts kibibytes; the highest mark of the process, data and libraries included.
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
