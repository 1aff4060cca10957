# SPDX-License-Identifier: Apache-2.0
"""Libraries that only one recipe needs, imported when it does."""

import importlib
from typing import Any


def polars() -> Any:  # noqa: ANN401  a module
    """The module polars.

    Raises:
        ImportError: If it is not installed.
    """
    try:
        return importlib.import_module("polars")
    except ImportError as error:
        raise ImportError("Criteo's rows need polars: pip install 'rankfall[train]'.") from error
