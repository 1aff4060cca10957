# SPDX-License-Identifier: Apache-2.0
"""Where a benchmark computes: on the CPU, or on a GPU, which is waited for, and whose steps can become a graph."""

import argparse
import time
from collections.abc import Callable

import torch

Step = Callable[[], object]


def add_device(parser: argparse.ArgumentParser) -> None:
    """The option `--device`."""
    parser.add_argument("--device", default="cpu", help="cpu, or cuda for a GPU")


def use_device(name: str) -> None:
    """Whatever is made from now on is made there; a CPU computes on one thread."""
    torch.set_num_threads(1)
    if name != "cpu":  # A default device that is named costs every call of torch some microseconds of Python.
        torch.set_default_device(name)


def on_gpu() -> bool:
    """Whether a GPU computes."""
    return torch.get_default_device().type == "cuda"


def seconds(step: Step) -> float:
    """How long a step takes, until the device has done it."""
    wait()
    started = time.perf_counter()
    step()
    wait()
    return time.perf_counter() - started


def wait() -> None:
    """Until the device has done what it was given."""
    if on_gpu():
        torch.cuda.synchronize()


def captured(step: Step) -> Step:
    """The step as a CUDA graph: the GPU repeats all that it was given, and the host gives it one call.

    The step must leave its gradients to be made anew, and its optimizer must be capturable.
    """
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay
