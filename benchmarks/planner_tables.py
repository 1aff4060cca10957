# SPDX-License-Identifier: Apache-2.0
"""How well the planner of tables knows: times expected and measured of every way to read rows, with their gradients.

    python benchmarks/planner_tables.py [--rounds 5] [--device cuda]

Random ids; forward and backward in float32 on one thread, or on a GPU as a CUDA graph; shortest of the rounds. Expected
is three times what the planner says of the forward pass, by the figures of this machine (measured anew). Ways that are
expected to take over a second are not run: the table of ten million rows as a whole, above all.
"""

import math

import torch
from _device import captured, on_gpu, seconds
from _planners import begin
from _report import table

import rankfall as rf
from rankfall import _lookup
from rankfall._einsum import rounded, shapes_of
from rankfall._sorted_rows import has_compiled_rows

_TOO_LONG = 1.0  # Seconds.
_CASES = (
    (25_000, 256, rf.TTM(20, out_modes=(25, 25, 40), in_modes=(4, 8, 8)), (2_048, 51_200)),
    (25_000, 256, rf.TT(20, out_modes=(25, 25, 40), in_modes=(4, 8, 8)), (2_048, 51_200)),
    (1_000_000, 64, rf.TTM(4, out_modes=(100, 100, 100), in_modes=(4, 4, 4)), (2_048, 65_536)),
    (1_000_000, 64, rf.TTM(16, out_modes=(100, 100, 100), in_modes=(4, 4, 4)), (2_048, 65_536)),
    (1_000_000, 64, rf.CP(32, out_modes=(100, 100, 100), in_modes=(4, 4, 4)), (2_048, 65_536)),
    (10_131_227, 128, rf.TTM(16, out_modes=(200, 220, 250), in_modes=(4, 4, 8)), (2_048, 65_536, 262_144)),
)


def main() -> None:
    rounds, flops = begin(__doc__)
    rows, losses, off = [], [], []
    for count, width, format, sets in _CASES:
        weight = rf.LowRankTensor((count, width), format, posterior=rf.Point())
        for ids in sets:
            found = _measured(weight, ids, rounds, flops)
            chosen = _lookup.reading(*_sizes(weight, ids))
            best = min(measured for *_, measured in found)
            what = f"{ids:,} ids of {count:,} x {width}, {type(format).__name__} {format.max_rank}"
            for way, expected, measured in found:
                off.append(abs(math.log(measured / expected)))
                if way == chosen:
                    losses.append(measured / best)
                mark = "chosen" if way == chosen else ""
                joined = "" if way.joined == (1, 1) else f", {way.joined[0]} first and {way.joined[1]} last in one"
                rows.append((what, way.described() + joined, f"{expected:.2f}", f"{measured:.2f}", mark))
                print(*rows[-1], sep=" | ", flush=True)
    print("\n" + table(("case", "way", "expected, ms", "measured, ms", ""), rows))
    print(
        f"\n{len(losses)} cases: chosen over fastest {math.exp(sum(map(math.log, losses)) / len(losses)):.3f} "
        f"(geometric mean), at most {max(losses):.2f}. {len(off)} ways: measured and expected differ by a factor of "
        f"{math.exp(sum(off) / len(off)):.2f} (geometric mean), at most {math.exp(max(off)):.1f}."
    )


def _measured(weight: rf.LowRankTensor, count: int, rounds: int, flops: float) -> list[tuple]:
    """(way, ms expected, ms measured), forward and backward."""
    factors, layout = list(weight.factors), weight.layout
    ids = torch.randint(weight.shape[0], (count,))
    direction = torch.randn(count, weight.shape[1])
    found = []
    for way in _lookup.readings(*_sizes(weight, count)):
        expected = 3 * way.cost / flops
        if expected > _TOO_LONG:
            continue

        def step(way: _lookup.Reading = way) -> None:
            for factor in factors:
                factor.grad = None
            rows = _lookup.read_by(way, layout, factors, ids)
            rows.widened(rows.taken()).backward(direction)

        step()
        repeated = captured(step) if on_gpu() else step
        found.append((way, 1e3 * expected, 1e3 * min(seconds(repeated) for _ in range(rounds))))
    return found


def _sizes(weight: rf.LowRankTensor, count: int) -> tuple:
    layout, factors = weight.layout, list(weight.factors)
    return layout, shapes_of(factors), rounded(count), rounded(count), has_compiled_rows(factors)


if __name__ == "__main__":
    main()
