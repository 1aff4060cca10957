# SPDX-License-Identifier: Apache-2.0
"""The choices of a training run, as the command line takes them."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, get_args

import torch
import tyro

from rankfall._formats import CP, TR, TT, TTM, Format, Tucker
from rankfall._layout import Modes
from rankfall._posteriors import MeanField, Point, Posterior
from rankfall._priors import HalfCauchy, LogUniform, Prior
from rankfall._selection import Evidence, Shrinkage

RecipeName: TypeAlias = Literal["digits", "mnist", "cifar10", "imdb", "transformer", "criteo"]
FormatName: TypeAlias = Literal["cp", "tucker", "tt", "ttm", "tr"]
MethodName: TypeAlias = Literal[
    "evidence", "shrinkage", "fixed", "compress", "dense", "hashing", "quotient-remainder", "drop-table"
]
PriorName: TypeAlias = Literal["half-cauchy", "log-uniform"]
PosteriorName: TypeAlias = Literal["mean-field", "point"]
PrecisionName: TypeAlias = Literal["float32", "bfloat16"]


def _left_out(metavar: str) -> Any:  # noqa: ANN401  tyro keeps the type to itself
    """Of an option whose text says what holds without it, so that the help shows no `None`."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint="")


OptionalFolder: TypeAlias = Annotated[Path | None, _left_out("DIR")]
OptionalNumber: TypeAlias = Annotated[int | None, _left_out("INT")]
OptionalName: TypeAlias = Annotated[str | None, _left_out("NAME")]
_FORMAT_NAMES: tuple[FormatName, ...] = get_args(FormatName)
OptionalFormat: TypeAlias = Annotated[
    FormatName | None,
    # Of itself tyro would take, and name, None as one of the choices.
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=f"{{{','.join(_FORMAT_NAMES)}}}",
        instance_from_str=lambda given: given[0],
        is_instance=lambda value: value is None or value in _FORMAT_NAMES,
        str_from_instance=lambda value: [str(value)],
        choices=_FORMAT_NAMES,
    ),
    tyro.conf.arg(help_behavior_hint=""),
]
_FORMATS: dict[str, type[Format]] = {"cp": CP, "tucker": Tucker, "tt": TT, "ttm": TTM, "tr": TR}


_METHODS = (  # One line, which tyro breaks as it should.
    "evidence removes the slices that do not pay for themselves, shrinkage those of small prior scale; fixed keeps all "
    "ranks and has no prior, compress trains the usual net for half of the epochs, decomposes its weights at the given "
    "rank and trains on, dense is the usual net. Of criteo: hashing, quotient-remainder and drop-table are fixed with "
    "fewer rows in its large tables, with two small tables in place of each, or with zeros, within --budget."
)
# Two thin matrices in place of a weight that has to be formed: for each step of an LSTM, for each word of a text.
_USUAL_FORMATS: dict[RecipeName, FormatName] = {"imdb": "tt", "transformer": "tt"}
_WIDE_MODES = 2


def usual_format(recipe: RecipeName) -> FormatName:
    """How a recipe holds its weights unless told otherwise."""
    return _USUAL_FORMATS.get(recipe, "ttm")


def make_format(name: FormatName, max_rank: int, modes: tuple[Modes, Modes] | None = None) -> Format:
    """The format of a name.

    Args:
        name: As `--format` takes it.
        max_rank: The rank of every bond at the start.
        modes: The (out_modes, in_modes) of a TT-matrix; None to have them chosen. Other formats have no need of the
            ones that make them equally many, and choose for themselves where an axis has three modes or more.
    """
    if modes is not None and name != "ttm":
        out_modes, in_modes = (tuple(n for n in axis if n > 1) or (1,) for axis in modes)
        modes = (out_modes, in_modes) if max(len(out_modes), len(in_modes)) <= _WIDE_MODES else None
    out_modes, in_modes = modes or (None, None)
    return _FORMATS[name](max_rank, out_modes=out_modes, in_modes=in_modes)


@dataclass(frozen=True)
class TrainOptions:
    """Train a compact network on real data and write a run folder."""

    recipe: tyro.conf.Positional[RecipeName]
    """What to train: digits needs nothing, the others --data-dir; mnist can also fetch from the Hugging Face hub."""
    data_dir: OptionalFolder = None
    """Folder of the data set."""
    model: OptionalName = None
    """Which of the recipe's networks; mnist has mlp and lenet5, cifar10 vgg and resnet20. The first if left out."""
    format: OptionalFormat = None
    """How the weights are held; the recipe's own way (imdb and transformer tt, others ttm) if left out."""
    max_rank: OptionalNumber = None
    """Rank of every bond at the start, which training lowers; the network's own (digits 8, mnist 20) if left out."""
    method: Annotated[MethodName, tyro.conf.arg(help=_METHODS)] = "evidence"
    budget: OptionalNumber = None
    """Of hashing, quotient-remainder and drop-table: parameters of the whole model; those of fixed if left out."""
    prior: PriorName = "half-cauchy"
    """Hyperprior of the prior scales."""
    posterior: PosteriorName = "mean-field"
    """mean-field learns a standard deviation for every entry; point saves that memory."""
    threshold: float = 0.1
    """shrinkage removes a slice whose scale falls under this fraction of the largest of its bond."""
    beta: float = 1.0
    """Weight of the KL; 1 is the evidence lower bound."""
    epochs: OptionalNumber = None
    """Passes over the data; the network's own number if left out."""
    seed: int = 0
    """Of the initial factors, the order of the data and the posterior's noise."""
    limit: OptionalNumber = None
    """Use only so many rows, for a quick trial."""
    synthetic: bool = False
    """Of criteo: made-up rows of full size, with labels from planted low-rank tables; --limit says how many."""
    length: OptionalNumber = None
    """Tokens of each text that are read; the recipe's own number (imdb and transformer 128) if left out."""
    precision: PrecisionName = "float32"
    """Of matrix products and convolutions while training; parameters, KL and the figures stay float32."""
    cuda_graphs: bool = False
    """On a GPU: capture the steps of each epoch as CUDA graphs and replay them, which small networks gain most from."""
    out: OptionalFolder = None
    """Run folder; runs/RECIPE-FORMAT-METHOD-seedN if left out."""
    resume: bool = False
    """Go on with an interrupted run, with the options it was started with."""

    @property
    def is_dense(self) -> bool:
        """Whether the network stays as it is."""
        return self.method == "dense"

    @property
    def starts_dense(self) -> bool:
        """Whether training begins with the network as it is."""
        return self.method in ("dense", "compress")

    @property
    def held(self) -> FormatName:
        """How the weights are held."""
        return usual_format(self.recipe) if self.format is None else self.format

    @property
    def shrinks(self) -> bool:
        """Whether the prior is at work."""
        return self.method in ("evidence", "shrinkage")

    @property
    def fills_budget(self) -> bool:
        """Whether the size of the model is given, and not its tables' ranks."""
        return self.method in ("hashing", "quotient-remainder", "drop-table")

    def make_selection(self, test_examples: int | None) -> Evidence | Shrinkage | None:
        """How ranks change."""
        return {"evidence": Evidence(test_examples), "shrinkage": Shrinkage(self.threshold)}.get(self.method)

    def make_prior(self) -> Prior:
        """The chosen hyperprior."""
        return HalfCauchy() if self.prior == "half-cauchy" else LogUniform()

    def make_posterior(self) -> Posterior:
        """The chosen posterior; a fixed rank has no prior, so no spread either."""
        return MeanField() if self.posterior == "mean-field" and self.shrinks else Point()

    def check(self) -> None:
        """Refuses what argument types let through.

        Raises:
            ValueError: If a number is out of range.
        """
        if self.epochs is not None and self.epochs < 1:
            raise ValueError(f"--epochs must be 1 or more, got {self.epochs}.")
        if self.epochs == 1 and self.method == "compress":
            raise ValueError("--epochs must be 2 or more to compress, got 1. Half of them train the dense net.")
        if self.max_rank is not None:
            make_format(self.held, self.max_rank)
        if self.budget is not None and self.budget < 1:
            raise ValueError(f"--budget must be 1 parameter or more, got {self.budget}.")
        if self.budget is not None and not self.fills_budget:
            raise ValueError(
                f"--budget is for --method hashing, quotient-remainder and drop-table, not {self.method}. Leave it out."
            )
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"--limit must be 1 row or more, got {self.limit}.")
        if self.length is not None and self.length < 1:
            raise ValueError(f"--length must be 1 token or more, got {self.length}.")
        if self.cuda_graphs and not torch.cuda.is_available():
            raise ValueError("--cuda-graphs needs a GPU, and torch finds none. Leave it out.")
        if not 0 <= self.beta < math.inf:
            raise ValueError(f"--beta must be 0 or more, got {self.beta}. 1 is the evidence lower bound.")
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"--seed must be an integer of 64 bits, got {self.seed}.")
        if not 0 <= self.threshold < 1:
            raise ValueError(f"--threshold must be from 0 up to but not including 1, got {self.threshold}.")
