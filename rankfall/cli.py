# SPDX-License-Identifier: Apache-2.0
"""The command line: `rankfall train`, `rankfall compare`, `rankfall plan` and `rankfall prepare`."""

import importlib
import io
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table
from torch import nn

from rankfall._costs import Example, costs
from rankfall._fit import join_processes
from rankfall._machine import calibrate, use
from rankfall._pages import keep_pages
from rankfall._processes import is_elsewhere, is_first_started, leave
from rankfall._summary import summary
from rankfall.recipes._compare import CompareOptions, compare
from rankfall.recipes._comparison import as_table, notes
from rankfall.recipes._options import FormatName, TrainOptions, make_format
from rankfall.recipes._prepare import PrepareOptions, prepare
from rankfall.recipes._run import train

_FILE_WIDTH = 160  # Columns of a table where there is no terminal.
_WIDEST = 1000
_OTHERS_SPEAK = 1.0  # Seconds. torchrun ends all processes as soon as one has ended, also the one that has the word.


@dataclass(frozen=True)
class PlanOptions:
    """Show what would be tensorized in your own model, with parameters, operations and memory, before training."""

    target: tyro.conf.Positional[str]
    """MODULE:FACTORY, a function without arguments, for example my_net:make, that returns the model, or (model, inputs)
    with the inputs of one batch, so that the operations of all layers are counted."""
    format: FormatName = "ttm"
    """How the weights would be held."""
    max_rank: int = 20
    """Rank of every bond at the start."""
    batch_size: int = 128
    """Rows per batch, for the count of operations of linear layers without an example."""
    calibrate: bool = False
    """Measure again how fast this computer is; it is done once, in less than a second, and kept in the user's cache."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command; a wrong argument or file ends it with one line and exit code 2.

    Of several processes that torchrun has started, the first one speaks.

    Args:
        arguments: The command line without the program's name; None for the real one.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # Where there is no ± it is a question mark.
    options = _parsed(arguments)
    keep_pages()
    command, goes_on = _COMMANDS[type(options)]
    try:
        _start(options)
        command(options)
        if leave():
            _end()
    except (ValueError, TypeError, OSError, ImportError) as error:
        if is_elsewhere(error):
            time.sleep(_OTHERS_SPEAK)
        else:
            print(f"rankfall: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        if is_first_started():
            print(f"rankfall: interrupted; {goes_on}.", file=sys.stderr)
        sys.exit(130)


def _end() -> None:
    """Ends one of several processes, all of whose work is done, at once.

    A thread of gloo that still clears up would ask for an interpreter that is going, and abort the process (exit code
    -6), which torchrun takes for a failure of the run.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _read_or_not(parse: Callable[[], Any]) -> Any:  # noqa: ANN401  what it parses
    """What `parse` gives; without a word where whoever reads its help has had enough, as `head` has."""
    try:
        try:
            return parse()
        except SystemExit:
            sys.stdout.flush()
            raise
    except BrokenPipeError:
        # The interpreter flushes once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _parsed(arguments: Sequence[str] | None) -> Any:  # noqa: ANN401  one of _COMMANDS
    parse = partial(
        tyro.extras.subcommand_cli_from_dict,
        {"train": TrainOptions, "compare": CompareOptions, "plan": PlanOptions, "prepare": PrepareOptions},
        prog="rankfall",
        description="Compact neural networks, trained end to end.",
        args=arguments,
    )
    if is_first_started():
        return _read_or_not(parse)
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        try:
            return parse()
        except SystemExit:
            time.sleep(_OTHERS_SPEAK)
            raise


def _start(options: object) -> None:
    """Joins the processes of a run, and finds out how fast the machine is, where that is asked."""
    processes = join_processes()
    processes.on_first(lambda: _check_processes(options, processes.count))
    if not isinstance(options, PrepareOptions):
        use(processes.from_first(lambda: calibrate(anew=isinstance(options, PlanOptions) and options.calibrate)))


def _check_processes(options: object, count: int) -> None:
    if count > 1 and not isinstance(options, TrainOptions):
        raise ValueError(f"{count} processes were started, and only `rankfall train` runs on several. Start one.")


def _train(options: TrainOptions) -> None:
    folder, model, metrics = train(options)
    if not is_first_started():
        return
    console = Console(highlight=False)
    if not options.fills_budget:  # What is tensorized is not what makes such a model small.
        print(summary(model))
        print()
    console.print(_results(metrics))
    console.print(f"run folder: {folder.path}", soft_wrap=True)


def _results(metrics: dict[str, Any]) -> Table:
    shown = {
        "test accuracy": f"{metrics['test_accuracy']:.2%}",
        "test NLL": f"{metrics['test_nll']:.4f} nats",
        **_click_results(metrics),
        "parameters": f"{metrics['parameters']:,} (dense {metrics['dense_parameters']:,})",
        "compression": f"{metrics['compression']:.1f}x",
        "training": f"{metrics['epochs']} epochs, {metrics['seconds']:.1f} s",
        "peak memory": f"{metrics['peak_rss_bytes'] / 1e6:,.0f} MB",
    }
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in shown.items():
        table.add_row(name, value)
    return table


def _click_results(metrics: Mapping[str, Any]) -> dict[str, str]:
    shown = {"test AUC": "auc", "normalised entropy": "normalised_entropy"}
    known = {
        name: f" (of the truth {metrics[key]:.4f})" for name in shown.values() if (key := f"truth_{name}") in metrics
    }
    return {
        head: f"{metrics[f'test_{name}']:.4f}{known.get(name, '')}"
        for head, name in shown.items()
        if f"test_{name}" in metrics
    }


def _compare(options: CompareOptions) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _FILE_WIDTH
    content = compare(options, on_run=lambda run: console.print(f"{run.method}, seed {run.seed}"))
    table = as_table(content)
    # A terminal breaks a line that is too long for it, while a table that is made to fit has figures cut off.
    console.width = max(
        console.width, console.measure(table, options=console.options.update(max_width=_WIDEST)).maximum
    )
    console.print(table)
    for note in notes(content):
        console.print(note, soft_wrap=True)
    console.print(f"compare.json and run folders: {options.path}", soft_wrap=True)


def _prepare(options: PrepareOptions) -> None:
    index = prepare(options)
    rows, sizes = index["rows"], index["sizes"]
    print(f"{rows['train']:,} rows to train with, {rows['test']:,} to test with; {sum(sizes):,} rows in 26 tables")
    print(f"next: rankfall train criteo --data-dir {options.out}")


def _plan(options: PlanOptions) -> None:
    model, example = _make(options.target)
    held = make_format(options.format, options.max_rank)
    print(costs(model, held, batch_size=options.batch_size, example=example))


def _make(target: str) -> tuple[nn.Module, Example | None]:
    module_name, colon, name = target.partition(":")
    if not (module_name and colon and name):
        raise ValueError(f"the model must be given as MODULE:FACTORY, got {target!r}. Pass for example my_net:make.")
    sys.path.insert(0, str(Path.cwd()))
    try:
        factory = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError, SyntaxError) as error:
        raise ValueError(f"{target!r} cannot be imported: {error}. Start in the folder of the module.") from error
    finally:
        sys.path.remove(str(Path.cwd()))
    if not callable(factory):
        raise TypeError(f"{target!r} is a {type(factory).__name__}, and must be a function that makes the model.")
    made = factory()
    model, example = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"{target!r} returned a {type(model).__name__}. It must return a torch.nn.Module, or (model, inputs)."
        )
    return model, example if example is None or isinstance(example, tuple) else (example,)


# What each command does, and what an interruption of it leaves to say.
_COMMANDS: dict[type, tuple[Callable[[Any], None], str]] = {
    TrainOptions: (_train, "the same command with --resume goes on, if it has begun to train"),
    CompareOptions: (_compare, "the same command goes on"),
    PlanOptions: (_plan, "nothing was written"),
    PrepareOptions: (_prepare, "the same command starts anew"),
}
