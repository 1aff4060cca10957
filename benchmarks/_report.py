# SPDX-License-Identifier: Apache-2.0
"""What every benchmark prints first: on what it ran."""

import platform
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

import rankfall


def machine(threads: int = 1) -> str:
    """One line: processor, threads, the GPU if that is what computes, and versions."""
    cpuinfo = Path("/proc/cpuinfo")
    names = [
        line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
    ]
    processor = names[0] if names else platform.processor() or platform.machine()
    gpu = f"{torch.cuda.get_device_name()}, " if torch.get_default_device().type == "cuda" else ""
    return (
        f"{gpu}{processor}, {threads} thread{'s' if threads > 1 else ''}; Python {platform.python_version()}, "
        f"torch {torch.__version__}, rankfall {rankfall.__version__}"
    )


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
