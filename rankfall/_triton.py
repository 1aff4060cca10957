# SPDX-License-Identifier: Apache-2.0
"""Whether kernels that are written for Triton run on a device."""

import warnings
from collections.abc import Callable
from importlib.util import find_spec

import torch

Trial = Callable[[torch.device], None]


def runs_on(device: torch.device, trial: Trial, otherwise: str) -> bool:
    """Whether Triton is there, and a trial of kernels is passed on the device: NVIDIA's from Volta on, and AMD's.

    Args:
        device: Where they would run.
        trial: Holds them against torch; raises whatever it likes where they do not run, or give other numbers.
        otherwise: What is done without them, for the warning.
    """
    if device.type != "cuda" or find_spec("triton") is None or torch.cuda.get_device_capability(device) < (7, 0):
        return False
    try:
        trial(device)
    except Exception as error:
        message = f"Triton's kernels do not run on {device} ({error}), so {otherwise}."
        warnings.warn(message, RuntimeWarning, stacklevel=3)
        return False
    return True
