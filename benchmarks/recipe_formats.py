# SPDX-License-Identifier: Apache-2.0
"""Accuracy, size and time of a recipe: dense, and every format with every hyperprior, at the recipe's defaults.

    python benchmarks/recipe_formats.py mnist --data-dir path/to/mnist
    python benchmarks/recipe_formats.py digits --seeds 0 1 2 3 4

Each run is a process of its own (`rankfall train ...`) with one thread; `--jobs` of them run side by side. A run folder
that is finished is read, not run again, so the benchmark can be interrupted.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from _report import machine, table

_FORMATS = ("cp", "tucker", "tt", "ttm", "tr")
_PRIORS = ("half-cauchy", "log-uniform")


def main() -> None:
    arguments = _arguments()
    variants: list[dict[str, str]] = [{"method": "dense"}]
    variants += [
        {"method": "shrinkage", "format": f, "prior": p, "posterior": arguments.posterior}
        for f in arguments.formats
        for p in arguments.priors
    ]
    runs = [(variant, seed) for seed in arguments.seeds for variant in variants]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        results = list(pool.map(lambda run: _run(arguments, *run), runs))
    print(f"{arguments.recipe}, seeds {arguments.seeds}, {arguments.jobs} runs side by side. {machine(1)}\n")
    header = (
        "weights",
        "prior",
        "test accuracy",
        "test NLL",
        "parameters",
        "compression",
        "s/epoch first",
        "s/epoch last",
        "seconds",
    )
    rows = []
    for variant in variants:
        of_variant = [result for (v, _), result in zip(runs, results, strict=True) if v == variant]
        rows.append(_row(variant, of_variant))
    print(table(header, rows))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe")
    parser.add_argument("--data-dir")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--formats", nargs="+", default=_FORMATS)
    parser.add_argument("--priors", nargs="+", default=_PRIORS)
    parser.add_argument("--posterior", default="mean-field")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark"))
    return parser.parse_args()


def _run(arguments: argparse.Namespace, variant: dict[str, str], seed: int) -> dict[str, Any]:
    name = "-".join([arguments.recipe, *variant.values(), f"seed{seed}"])
    folder = arguments.out / name
    if not (folder / "metrics.json").exists():
        options = {**variant, "seed": str(seed), "out": str(folder)}
        options |= {"data-dir": arguments.data_dir} if arguments.data_dir else {}
        options |= {"epochs": str(arguments.epochs)} if arguments.epochs else {}
        flags = [part for key, value in options.items() for part in (f"--{key}", value)]
        resume = ["--resume"] if folder.exists() else []
        program = [str(Path(sys.executable).with_name("rankfall")), "train", arguments.recipe]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run([*program, *flags, *resume], check=True, env=environment, stdout=subprocess.DEVNULL)
    metrics = json.loads((folder / "metrics.json").read_text())
    lines = (folder / "history.jsonl").read_text().splitlines()
    return metrics | {"epoch_seconds": [json.loads(line)["seconds"] for line in lines]}


def _row(variant: dict[str, str], results: Sequence[dict[str, Any]]) -> list[str]:
    def spread(name: str, form: str) -> str:
        values = [result[name] for result in results]
        middle = format(statistics.mean(values), form)
        return middle if len(values) == 1 else f"{middle} ± {format(statistics.stdev(values), form)}"

    ends = [
        statistics.median(s for r in results for s in r["epoch_seconds"][part]) for part in (slice(3), slice(-3, None))
    ]
    return [
        variant.get("format", "dense").upper() if "format" in variant else "dense",
        variant.get("prior", ""),
        spread("test_accuracy", ".2%"),
        spread("test_nll", ".4f"),
        spread("parameters", ",.0f"),
        spread("compression", ".1f"),
        *(f"{seconds:.2f}" for seconds in ends),
        spread("seconds", ".0f"),
    ]


if __name__ == "__main__":
    main()
