# SPDX-License-Identifier: Apache-2.0
"""How the benchmarks of planners begin: with the speed of the machine, measured anew."""

import argparse

from _device import add_device, use_device
from _report import machine

from rankfall._machine import calibrate
from rankfall._pages import keep_pages


def begin(description: str) -> tuple[int, float]:
    """(rounds, operations per second of a large product) by the options and by measuring; says on what it runs."""
    keep_pages()
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    add_device(parser)
    options = parser.parse_args()
    use_device(options.device)
    flops = calibrate(anew=True).flops
    print(f"{machine()}; {flops / 1e9:.0f} GFLOP/s\n")
    return options.rounds, flops
