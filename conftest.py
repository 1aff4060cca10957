# SPDX-License-Identifier: Apache-2.0
"""Names that every docstring example may use."""

from typing import Any

import pytest
import torch

import rankfall as rf


@pytest.fixture(autouse=True)
def _example_names(doctest_namespace: dict[str, Any]) -> None:
    torch.manual_seed(0)
    doctest_namespace.update(rf=rf, torch=torch, nn=torch.nn)
