# SPDX-License-Identifier: Apache-2.0
"""What a recipe is: data, dense networks, and the numbers that train them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from rankfall._layout import Modes
from rankfall.recipes._data import Data
from rankfall.recipes._options import FormatName, MethodName


@dataclass(frozen=True)
class Network:
    """A dense network and the numbers that train it.

    Attributes:
        make: Makes the network.
        epochs: Passes over the data.
        batch_size: Rows per step.
        lr: Adam's step size for weights and biases; `rf.parameter_groups` finds that of factors.
        max_rank: Rank of every bond at the start. The KL of all entries is shared out over the data, so few data and
            high ranks make it drown the likelihood before anything is learned.
        kl_warmup: Epochs over which the weight of the KL rises from 0; None for a twentieth of the run.
        test_examples: Training examples that the evidence test looks at; None as rf.Evidence has it.
        modes: The (out_modes, in_modes) of a layer by its path, as a TT-matrix takes them; others are chosen.
        ranks: The rank at the start of a layer by its path, where it is not `max_rank`.
        formats: How a layer by its path is held where it is not as the recipe usually holds weights, unless `--format`
            holds all of them in one way.
        changes: Steps of factors by the path of a module, as `rf.parameter_groups` takes them.
        baselines: Methods that only this network has, by their names: each changes the network of a fixed rank, in
            place, so that the whole has at most so many parameters.
    """

    make: Callable[[], nn.Module]
    epochs: int
    batch_size: int
    lr: float
    max_rank: int
    kl_warmup: int | None = None
    test_examples: int | None = None
    modes: Mapping[str, tuple[Modes, Modes]] = field(default_factory=dict)
    ranks: Mapping[str, int] = field(default_factory=dict)
    formats: Mapping[str, FormatName] = field(default_factory=dict)
    changes: Mapping[str, float] = field(default_factory=dict)
    baselines: Mapping[MethodName, Callable[[nn.Module, int], object]] = field(default_factory=dict)


def _as_it_is(network: Network, data_dir: Path | None) -> Network:
    """The network, whatever the data."""
    return network


@dataclass(frozen=True)
class Recipe:
    """A training run that is ready to go.

    Attributes:
        name: What `rankfall train` calls it.
        load: Reads the data from a folder, or from where it is at home if the folder is None.
        networks: The networks by what `--model` calls them, the usual one first.
        length: For texts, how many tokens of each are read; None for other data.
        fitted: A network of the sizes that the data in a folder need.
        made_up: Makes so many rows whose truth is known, None for the usual number; None if the recipe has none.
    """

    name: str
    load: Callable[[Path | None], Data]
    networks: Mapping[str, Network]
    length: int | None = None
    fitted: Callable[[Network, Path | None], Network] = _as_it_is
    made_up: Callable[[int | None], Data] | None = None

    @property
    def usual(self) -> str:
        """The network that is trained if none is named."""
        return next(iter(self.networks))

    def network(self, name: str | None, data_dir: Path | None = None) -> Network:
        """The network of a name, None for the usual one, for the data in a folder.

        Raises:
            ValueError: If there is no such network.
            FileNotFoundError: If its size rests on data that is missing.
        """
        known = self.networks.get(self.usual if name is None else name)
        if known is None:
            raise ValueError(f"{self.name} has no --model {name}. It has {', '.join(self.networks)}.")
        return self.fitted(known, data_dir)
