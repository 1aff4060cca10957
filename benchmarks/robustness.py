# SPDX-License-Identifier: Apache-2.0
"""How often the rank is exactly right, over or under, when one thing at a time is far from usual.

    python benchmarks/robustness.py --jobs 2

Teacher of 64 x 64 with rank 3, y = relu(W x) + 10 % noise, 4,000 examples, batch 200, start rank 10, lr 1e-3 (factors:
120e-3 of the weight per step), 1,200 steps or 20 epochs, whichever is more. Of the seeds of a case half are Point and
half MeanField, and both hyperpriors take turns. A cell is exact / over / under.
"""

import argparse

from _report import machine, table
from _teacher import FORMATS, Problem, Result, solve_all

_CASES = {
    "as usual": {},
    "batch 50": {"batch": 50},
    "batch 800": {"batch": 800},
    "lr / 3": {"lr": 1e-3 / 3},
    "lr x 3": {"lr": 3e-3},
    "start rank 6 (x 2)": {"start_rank": 6},
    "start rank 12 (x 4)": {"start_rank": 12},
    "start rank 24 (x 8)": {"start_rank": 24},
    "500 examples": {"num_data": 500},
    "2,000 examples": {"num_data": 2000},
    "10,000 examples": {"num_data": 10_000},
    "50,000 examples": {"num_data": 50_000},
    "noise 1 %": {"noise": 0.01},
    "noise 30 %": {"noise": 0.3},
    "noise 100 %": {"noise": 1.0},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--formats", nargs="+", default=list(FORMATS))
    parser.add_argument("--cases", nargs="+", default=list(_CASES))
    parser.add_argument("--jobs", type=int, default=1)
    arguments = parser.parse_args()
    print(f"{arguments.seeds} seeds a cell, {arguments.jobs} runs side by side. {machine(1)}\n", flush=True)
    rows = []
    for case in arguments.cases:
        problems = [_problem(name, seed, case) for name in arguments.formats for seed in range(arguments.seeds)]
        results = dict(zip(problems, solve_all(problems, arguments.jobs), strict=True))
        cells = [_cell([r for p, r in results.items() if p.format == name]) for name in arguments.formats]
        rows.append([case, *cells])
        print(" ".join(rows[-1]), flush=True)
    print("\n" + table(["case", *arguments.formats], rows))


def _problem(name: str, seed: int, case: str) -> Problem:
    posterior = ("Point", "MeanField")[seed % 2]
    prior = ("half-cauchy", "log-uniform")[seed // 2 % 2]
    return Problem(name, seed, posterior=posterior, prior=prior, **_CASES[case])


def _cell(results: list[Result]) -> str:
    verdicts = [result.verdict for result in results]
    return " / ".join(str(verdicts.count(verdict)) for verdict in ("exact", "over", "under"))


if __name__ == "__main__":
    main()
