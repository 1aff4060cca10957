# SPDX-License-Identifier: Apache-2.0
"""Every method on one recipe, over several seeds, in one table."""

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import tyro

from rankfall._files import write_atomic
from rankfall._summary import summary
from rankfall.recipes._folder import RunFolder
from rankfall.recipes._options import (
    MethodName,
    OptionalFolder,
    OptionalFormat,
    OptionalName,
    OptionalNumber,
    PosteriorName,
    PrecisionName,
    PriorName,
    RecipeName,
    TrainOptions,
    usual_format,
)
from rankfall.recipes._recipe import Network
from rankfall.recipes._run import RECIPES, build_model, check_data, obstacle, run_folder, train

# Ranks and budgets that are given are those of the size that evidence ends at, so they come after it.
_FREE: tuple[MethodName, ...] = ("dense", "evidence", "shrinkage")

_CLICK_FIGURES = ("test_auc", "test_normalised_entropy")
_FIGURES = (
    "test_accuracy",
    "test_nll",
    "parameters",
    "compression",
    "tensorized_parameters",
    "tensorized_dense_parameters",
    "epoch_seconds_first",
    "epoch_seconds_last",
    "seconds",
)

Result: TypeAlias = dict[str, Any]


@dataclass(frozen=True)
class CompareOptions:
    """Dense, fixed rank, train-then-compress, shrinkage and evidence in one table, over several seeds.

    Fixed rank and train-then-compress get the one rank at which the model is nearest in size to what evidence ended at
    with the same seed. Of criteo there are also tables left out, hashed, or as quotient and remainder: the two networks
    beside them are then those of fixed rank, and tables get what is left of evidence's size. A network that is too
    large for the memory is left out, and the table says so. What is finished is read and what was interrupted is
    resumed, so the same command goes on.
    """

    recipe: tyro.conf.Positional[RecipeName]
    """What to train: digits needs nothing, the others --data-dir; mnist can also fetch from the Hugging Face hub."""
    data_dir: OptionalFolder = None
    """Folder of the data set."""
    model: OptionalName = None
    """Which of the recipe's networks; mnist has mlp and lenet5, cifar10 vgg and resnet20. The first if left out."""
    format: OptionalFormat = None
    """How the weights are held; the recipe's own way (imdb and transformer tt, others ttm) if left out."""
    methods: tuple[MethodName, ...] = ()
    """Which of them; all that the recipe has if left out. A method of a given size needs --budget, or evidence
    beside it."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """One run of each method per seed."""
    epochs: OptionalNumber = None
    """Passes over the data; the network's own number if left out."""
    limit: OptionalNumber = None
    """Use only so many rows, for a quick trial."""
    synthetic: bool = False
    """Of criteo: made-up rows of full size, with labels from planted low-rank tables; --limit says how many."""
    length: OptionalNumber = None
    """Tokens of each text that are read; the recipe's own number (imdb and transformer 128) if left out."""
    precision: PrecisionName = "float32"
    """Of matrix products and convolutions while training; parameters, KL and the figures stay float32."""
    cuda_graphs: bool = False
    """On a GPU: capture the steps of each epoch as CUDA graphs and replay them."""
    prior: PriorName = "half-cauchy"
    """Hyperprior of the prior scales."""
    posterior: PosteriorName = "mean-field"
    """mean-field learns a standard deviation for every entry; point saves that memory."""
    max_rank: OptionalNumber = None
    """Rank of every bond at the start of shrinkage and evidence; the network's own (digits 8, mnist 20) if left out."""
    budget: OptionalNumber = None
    """Parameters of the whole model that the methods of a given size get; as many as evidence ends at if left out."""
    beta: float = 1.0
    """Weight of the KL; 1 is the evidence lower bound."""
    out: OptionalFolder = None
    """Folder of the run folders METHOD-seedN and of compare.json; runs/compare-RECIPE-FORMAT if left out."""

    @property
    def path(self) -> Path:
        """The folder of all runs."""
        network = "" if self.model is None else f"-{self.model}"
        return self.out or Path("runs") / f"compare-{self.recipe}{network}-{self.format or usual_format(self.recipe)}"

    @property
    def network(self) -> Network:
        """What is trained."""
        return RECIPES[self.recipe].network(self.model, self.data_dir)

    @property
    def offered(self) -> tuple[MethodName, ...]:
        """All methods that the network has, as the table shows them."""
        return ("dense", *self.network.baselines, "fixed", "compress", "shrinkage", "evidence")

    @property
    def compared(self) -> tuple[MethodName, ...]:
        """Those that are wanted, in the same order."""
        return tuple(method for method in self.offered if not self.methods or method in self.methods)

    def run(
        self, method: MethodName, seed: int, max_rank: int | None = None, budget: int | None = None
    ) -> TrainOptions:
        """The options of one run, which goes on if it was started; `max_rank` None is that of the comparison."""
        options = TrainOptions(
            recipe=self.recipe,
            data_dir=self.data_dir,
            model=self.model,
            format=self.format,
            max_rank=self.max_rank if max_rank is None else max_rank,
            method=method,
            budget=budget,
            prior=self.prior,
            posterior=self.posterior,
            beta=self.beta,
            epochs=self.epochs,
            seed=seed,
            limit=self.limit,
            synthetic=self.synthetic,
            length=self.length,
            precision=self.precision,
            cuda_graphs=self.cuda_graphs,
            out=self.path / f"{method}-seed{seed}",
        )
        return replace(options, resume=RunFolder(options).config.is_file())

    def check(self) -> None:
        """Refuses what argument types let through, and run folders that were started with other options.

        Raises:
            ValueError: If there are no seeds or a seed comes twice, the recipe lacks a method or there is no size for
                it, a number is out of range, or a folder is taken.
            FileNotFoundError: If a folder of data is needed and none is given, or it has not been prepared.
        """
        if not self.seeds:
            raise ValueError("--seeds must be one seed or more, got none. Pass for example --seeds 0 1 2.")
        if len(set(self.seeds)) < len(self.seeds):
            came = " ".join(map(str, self.seeds))
            raise ValueError(f"--seeds must differ from each other, got {came}. A seed gives the same run each time.")
        if self.budget is not None and self.budget < 1:
            raise ValueError(f"--budget must be 1 parameter or more, got {self.budget}.")
        self._check_methods()
        for method in self.compared:
            self.run(method, self.seeds[0]).check()
            check_data(RECIPES[self.recipe], self.run(method, self.seeds[0]))
        for method in self.compared:
            for seed in self.seeds if method in _FREE else ():
                run_folder(self.run(method, seed)).check()

    def _check_methods(self) -> None:
        for method in self.methods:
            if method not in self.offered:
                raise ValueError(f"{self.recipe} has no method {method}. It has {', '.join(self.offered)}.")
            if method not in _FREE and self.budget is None and "evidence" not in self.methods:
                raise ValueError(
                    f"{method} gets the size that evidence ends at, and evidence is not among --methods. "
                    "Add it, or pass --budget."
                )


def compare(
    options: CompareOptions, *, on_run: Callable[[TrainOptions], object] = lambda _: None, progress: bool = True
) -> dict[str, Any]:
    """Runs what is left of a comparison, one run after the other, and writes compare.json.

    Args:
        options: The choices of the comparison.
        on_run: Called with the options of each run before it, also of one that is only read.
        progress: Whether each run shows a progress bar.

    Returns:
        The content of compare.json: the options and one row per method. A figure of a row has `mean`, `std` and
        `error`, the standard error of the mean (None for one seed), and `values`, one per seed. The row of a method
        that cannot be run here has the reason instead. `known` are the figures of whoever made the rows up.

    Raises:
        ValueError: If an option is out of range, data is damaged, or a folder is taken or of other options.
        FileNotFoundError: If data is missing.
    """
    options.check()
    network = options.network

    def finish(run: TrainOptions) -> Result:
        on_run(run)
        folder = run_folder(run)
        if folder.is_finished:  # Its figures are there, whatever the memory would bear now.
            folder.check()
            metrics = folder.read_metrics()
        elif reason := obstacle(network, run):
            return {"reason": reason}
        else:
            _, _, metrics = train(run, progress=progress)
        return metrics | {"max_rank": _start_rank(run)} | _epoch_seconds(folder.read_history())

    results: dict[MethodName, list[Result]] = {method: [] for method in options.compared}
    free: list[MethodName] = [method for method in _FREE if method in results]
    given: list[MethodName] = [method for method in results if method not in free]
    for seed in options.seeds:
        for method in free:
            results[method].append(finish(options.run(method, seed)))
        size = options.budget or (results["evidence"][-1]["parameters"] if given else 0)
        rank = rank_of_size(options.run("fixed", seed), size) if given else None
        for method in given:
            budget = size if method in network.baselines else None
            results[method].append(finish(options.run(method, seed, rank, budget)))
    content = _content(options, results)
    write_atomic(options.path / "compare.json", lambda p: p.write_text(json.dumps(content, indent=2) + "\n"))
    return content


def rank_of_size(run: TrainOptions, parameters: int) -> int:
    """The one rank of all bonds, up to that of a run, at which the whole model is nearest to a number of parameters."""
    network = RECIPES[run.recipe].network(run.model, run.data_dir)
    most = network.max_rank if run.max_rank is None else run.max_rank

    def distance(rank: int) -> int:
        return abs(summary(build_model(network, replace(run, max_rank=rank))).parameters - parameters)

    return min(range(1, most + 1), key=distance)


def _start_rank(run: TrainOptions) -> int | None:
    if run.is_dense:
        return None
    return RECIPES[run.recipe].network(run.model, run.data_dir).max_rank if run.max_rank is None else run.max_rank


def _epoch_seconds(history: Sequence[Mapping[str, Any]]) -> Result:
    seconds = [record["seconds"] for record in history]
    return {
        "epoch_seconds_first": statistics.median(seconds[:3]),
        "epoch_seconds_last": statistics.median(seconds[-3:]),
    }


def _content(options: CompareOptions, results: Mapping[MethodName, Sequence[Result]]) -> dict[str, Any]:
    names = (
        *("recipe", "model", "format", "prior", "posterior", "beta", "limit", "synthetic", "length", "precision"),
        "budget",
    )
    some: Result = next((run for runs in results.values() for run in runs if "reason" not in run), {})
    return {
        **{name: getattr(options, name) for name in names},
        "epochs": some.get("epochs"),
        "seeds": list(options.seeds),
        "known": {name: value for name, value in some.items() if name.startswith("truth_")},
        "rows": [_row(method, found) for method, found in results.items()],
    }


def _row(method: MethodName, results: Sequence[Result]) -> dict[str, Any]:
    for result in results:
        if "reason" in result:
            return {"method": method, "reason": result["reason"]}
    names = (*_FIGURES, *(name for name in _CLICK_FIGURES if name in results[0]))
    ranks = [result["max_rank"] for result in results]
    return {"method": method, "max_rank": ranks, **{name: _spread([r[name] for r in results]) for name in names}}


def _spread(values: list[float]) -> dict[str, Any]:
    std = statistics.stdev(values) if len(values) > 1 else None
    error = None if std is None else std / math.sqrt(len(values))
    return {"mean": statistics.mean(values), "std": std, "error": error, "values": values}
