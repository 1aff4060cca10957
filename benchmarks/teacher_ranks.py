# SPDX-License-Identifier: Apache-2.0
"""How often the planted ranks are found exactly, at all defaults, over a wide mix of teacher problems.

    python benchmarks/teacher_ranks.py --seeds 20 --jobs 2

Each seed draws its own problem: true rank 1 to 6, 64 x 64 to 256 x 256, noise 5 to 50 %, relu, tanh or softmax, Point
or MeanField, half-cauchy or log-uniform; the formats share these draws. Start rank 10, 4,000 examples (20,000 labels
for softmax, which say less each), batch 200, 60 epochs (20), beta 1. A planted tensor is drawn again while its weakest
slice carries less than a tenth of the strongest of its bond.
"""

import argparse
import random
import statistics

from _report import machine, table
from _teacher import FORMATS, POSTERIORS, PRIORS, Problem, Result, solve_all


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--formats", nargs="+", default=list(FORMATS))
    parser.add_argument("--jobs", type=int, default=1)
    arguments = parser.parse_args()
    print(f"{arguments.seeds} problems a format, {arguments.jobs} side by side. {machine(1)}\n", flush=True)
    rows = []
    for name in arguments.formats:
        results = solve_all([draw(name, seed) for seed in range(arguments.seeds)], arguments.jobs)
        rows.append([name, *_cells(results)])
    header = ("format", "exact", "over", "under", "median error of W", "learned / true noise", "median s")
    print("\n" + table(header, rows))


def draw(name: str, seed: int) -> Problem:
    dice = random.Random(seed)
    link = dice.choice(["relu", "tanh", "softmax"])
    return Problem(
        name,
        seed,
        true_rank=dice.randint(1, 6),
        size=dice.choice([64, 128, 256]),
        noise=dice.choice([0.05, 0.1, 0.2, 0.5]),
        link=link,
        posterior=dice.choice(list(POSTERIORS)),
        prior=dice.choice(list(PRIORS)),
        num_data=20_000 if link == "softmax" else 4000,
    )


def _cells(results: list[Result]) -> list[str]:
    verdicts = [result.verdict for result in results]
    ratios = [r.noise_ratio for r in results if r.noise_ratio == r.noise_ratio]
    return [
        f"{verdicts.count('exact')} of {len(results)}",
        str(verdicts.count("over")),
        str(verdicts.count("under")),
        f"{statistics.median(r.error for r in results):.4f}",
        f"{min(ratios):.3f} to {max(ratios):.3f}",
        f"{statistics.median(r.seconds for r in results):.1f}",
    ]


if __name__ == "__main__":
    main()
