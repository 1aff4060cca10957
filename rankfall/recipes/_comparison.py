# SPDX-License-Identifier: Apache-2.0
"""A finished comparison as a table, and the lines under it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

from rich.table import Column, Table

Row: TypeAlias = Mapping[str, Any]
_Cell: TypeAlias = Callable[[Row], str]


def as_table(content: Mapping[str, Any]) -> Table:
    """One line per method, and for made-up clicks one for whoever knows the truth.

    Args:
        content: Of compare.json.
    """
    is_clicks = any("test_auc" in row for row in content["rows"])
    columns = _OF_CLICKS if is_clicks else _USUAL
    table = Table(Column("method", no_wrap=True), box=None, padding=(0, 2, 0, 0))
    for head in columns:
        table.add_column(head, justify="right")
    for row in content["rows"]:
        table.add_row(row["method"], *("-" if "reason" in row else cell(row) for cell in columns.values()))
    if is_clicks and content["known"]:
        table.add_row("the truth", *_truth(content["known"]))
    return table


def notes(content: Mapping[str, Any]) -> Iterator[str]:
    """What the table does not say: what ± means, and why a method has no figures."""
    if len(content["seeds"]) > 1:
        is_clicks = any("test_auc" in row for row in content["rows"])
        what = "standard error of the mean" if is_clicks else "standard deviation"
        yield f"±: {what} over {len(content['seeds'])} seeds"
    for row in content["rows"]:
        if "reason" in row:
            yield f"{row['method']}: not trained, for {row['reason']}"


def _truth(known: Mapping[str, float]) -> Sequence[str]:
    shown = {head: known[name] for head, name in _OF_THE_TRUTH.items()}
    return [format(shown[head], ".2%" if head == _ACCURACY else ".4f") if head in shown else "" for head in _OF_CLICKS]


def _start_rank(row: Row) -> str:
    return " ".join(dict.fromkeys(str(rank) for rank in row["max_rank"] if rank))


def _spread(row: Row, name: str, form: str, width: str = "std") -> str:
    figure = row[name]
    middle = format(figure["mean"], form)
    return middle if figure[width] is None else f"{middle} ± {format(figure[width], form)}"


def _mean(row: Row, name: str, form: str, unit: str = "") -> str:
    return f"{format(row[name]['mean'], form)}{unit}"


def _tensorized(row: Row) -> str:
    return _spread(row, "tensorized_parameters", ",.0f") if row["tensorized_parameters"]["mean"] else ""


def _tensorized_compression(row: Row) -> str:
    compact, dense = row["tensorized_parameters"]["mean"], row["tensorized_dense_parameters"]["mean"]
    return f"{dense / compact:.1f}x" if compact else ""


def _with_error(name: str, form: str) -> _Cell:
    return partial(_spread, name=name, form=form, width="error")


_ACCURACY = "accuracy"
_TIMES: dict[str, _Cell] = {
    "s/epoch first": partial(_mean, name="epoch_seconds_first", form=".3f"),
    "last": partial(_mean, name="epoch_seconds_last", form=".3f"),
    "seconds": partial(_mean, name="seconds", form=".1f"),
}
_USUAL: dict[str, _Cell] = {
    "start rank": _start_rank,
    "test accuracy": partial(_spread, name="test_accuracy", form=".2%"),
    "test NLL": partial(_spread, name="test_nll", form=".4f"),
    "parameters": partial(_spread, name="parameters", form=",.0f"),
    "compression": partial(_mean, name="compression", form=".1f", unit="x"),
    "tensorized part": _tensorized,
    "its compression": _tensorized_compression,
    **_TIMES,
}
_OF_CLICKS: dict[str, _Cell] = {
    "start rank": _start_rank,
    "log-loss": _with_error("test_nll", ".4f"),
    "AUC": _with_error("test_auc", ".4f"),
    "normalised entropy": _with_error("test_normalised_entropy", ".4f"),
    _ACCURACY: _with_error("test_accuracy", ".2%"),
    "parameters": _with_error("parameters", ",.0f"),
    "compression": partial(_mean, name="compression", form=",.1f", unit="x"),
    **_TIMES,
}
_OF_THE_TRUTH = {
    "log-loss": "truth_nll",
    "AUC": "truth_auc",
    "normalised entropy": "truth_normalised_entropy",
    _ACCURACY: "truth_accuracy",
}
