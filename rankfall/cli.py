# SPDX-License-Identifier: Apache-2.0
"""The command line: `rankfall train` and `rankfall plan`."""

import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table
from torch import nn

from rankfall._costs import costs
from rankfall._summary import summary
from rankfall._tensorize import tensorize_
from rankfall.recipes._options import FormatName, TrainOptions, make_format
from rankfall.recipes._run import train


@dataclass(frozen=True)
class PlanOptions:
    """Show what would be tensorized in your own model, with parameters, operations and memory, before training."""

    target: tyro.conf.Positional[str]
    """MODULE:FACTORY, a function without arguments that returns the model, for example my_net:make."""
    format: FormatName = "ttm"
    """How the weights would be held."""
    max_rank: int = 20
    """Rank of every bond at the start."""
    batch_size: int = 128
    """Rows per batch, for the count of operations."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command; a wrong argument or file ends it with one line and exit code 2.

    Args:
        arguments: The command line without the program's name; None for the real one.
    """
    options = tyro.extras.subcommand_cli_from_dict(
        {"train": TrainOptions, "plan": PlanOptions},
        prog="rankfall",
        description="Compact neural networks, trained end to end.",
        args=arguments,
    )
    try:
        _train(options) if isinstance(options, TrainOptions) else _plan(options)
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"rankfall: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("rankfall: interrupted; the same command with --resume goes on.", file=sys.stderr)
        sys.exit(130)


def _train(options: TrainOptions) -> None:
    folder, model, metrics = train(options)
    console = Console(highlight=False)
    print(summary(model))
    print()
    console.print(_results(metrics))
    console.print(f"run folder: {folder.path}", soft_wrap=True)


def _results(metrics: dict[str, Any]) -> Table:
    shown = {
        "test accuracy": f"{metrics['test_accuracy']:.2%}",
        "test NLL": f"{metrics['test_nll']:.4f} nats",
        "parameters": f"{metrics['parameters']:,} (dense {metrics['dense_parameters']:,})",
        "compression": f"{metrics['compression']:.1f}x",
        "training": f"{metrics['epochs']} epochs, {metrics['seconds']:.1f} s",
        "peak memory": f"{metrics['peak_rss_bytes'] / 1e6:,.0f} MB",
    }
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in shown.items():
        table.add_row(name, value)
    return table


def _plan(options: PlanOptions) -> None:
    model = _make(options.target)
    print(costs(tensorize_(model, make_format(options.format, options.max_rank)), options.batch_size))


def _make(target: str) -> nn.Module:
    module_name, colon, name = target.partition(":")
    if not (module_name and colon and name):
        raise ValueError(f"the model must be given as MODULE:FACTORY, got {target!r}. Pass for example my_net:make.")
    sys.path.insert(0, str(Path.cwd()))
    try:
        factory = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{target!r} cannot be imported: {error}. Start in the folder of the module.") from error
    finally:
        sys.path.remove(str(Path.cwd()))
    model = factory()
    if not isinstance(model, nn.Module):
        raise TypeError(f"{target!r} returned a {type(model).__name__}. It must return a torch.nn.Module.")
    return model
