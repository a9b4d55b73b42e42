"""Tables of statistics for the page: short names, few digits, the null next to the value."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd

from realigner.report.charts import MINUS, NONE, Line, fmt, key, line_chart
from realigner.report.page import number, page_filter

NAMES = {
    "icc": "ICC(C,1)",
    "eta_squared_neuron": "η² of neuron",
    "eta_squared_layer": "η² of layer",
    "omega_squared_neuron": "ω² of neuron",
    "omega_squared_layer": "ω² of layer",
    "omega_squared_difference": "ω², neuron less layer",
    "svd_share": "rank-1 share",
    "kendall_w": "Kendall's W",
    "top1_agreement": "runs with one leading index",
    "in_top": "runs with one index in the top 10",
    "mean_reciprocal_rank": "mean reciprocal rank",
    "rank_biased_overlap": "rank-biased overlap",
    "entropy": "entropy over tokens",
    "gini": "Gini",
    "largest_share": "largest token's share",
    "prompt_share": "prompt's share",
    "first_share": "first token's share",
    "centre_of_mass": "centre of mass",
    "template_share": "chat template",
    "question_share": "messages",
    "last_share": "prompt's last token",
    "opening_share": "reply's first 10",
    "reply_centre_of_mass": "centre of mass in the reply",
    "late_share_100": "late share, 100 largest",
    "late_share_1000": "late share, 1,000 largest",
    "late_share_10000": "late share, 10,000 largest",
    "hoyer": "Hoyer",
    "participation": "participation ratio",
    "kurtosis": "kurtosis",
    "small_share": "share |v| < 0.0001",
    "energy": "energy of a token",
    "size": "mean |δ|",
    "energy_ratio": "energy, last over first",
    "size_ratio": "mean |δ|, last over first",
    "model": "taken out first",
    "null": "null",
    "low": "95% interval",
    "difference": "difference from untrained",
    "difference_low": "95% interval of it",
    "neuron": "index",
    "runs_in_top": "in the top 10 of",
    "best_rank": "best rank",
    "median_rank": "median rank",
    "untrained_rank": "untrained rank",
    "p_holm": "p (Holm)",
    "p_bh": "p (BH)",
    "p_untrained": "p, untrained taken out",
    "p_untrained_holm": "(Holm)",
    "p_untrained_bh": "(BH)",
    "test": "p is held against",
    "ratio": "times the median",
}

CELL = ("value", "low", "high", "null", "p", "difference", "difference_low", "difference_high")  # of one statistic
_MODELS = {"uniform": "nothing", "untrained": "the untrained twins' scores", "host_residual": "the host's measurements"}


def name_of(key: Any) -> str:
    """A statistic's or a column's name in words."""
    return NAMES.get(str(key), str(key).replace("_", " "))


@page_filter
def probability(p: Any) -> str:
    """A p-value."""
    value = number(p)
    if math.isnan(value):
        return NONE
    return "<0.0001" if value < 1e-4 else f"{value:.4f}".rstrip("0") if value < 1e-3 else fmt(value, 2)


@page_filter
def fixed(value: Any, digits: int = 2, signed: bool = False) -> str:
    """A number with so many decimals, to stand under others; with `signed`, a plus too.

    Example:
        >>> fixed(0.9), fixed(0.1234, 3, signed=True), fixed(-0.001), fixed(None)
        ('0.90', '+0.123', '0.00', '\u2013')
    """
    found = number(value)
    if not math.isfinite(found):
        return NONE
    text = f"{found:,.{digits}f}"
    if not text.strip("-0.,"):
        return text.removeprefix("-")
    return text.replace("-", MINUS) if found < 0 else "+" * signed + text


@page_filter
def fixed_interval(low: Any, high: Any, digits: int = 2) -> str:
    """An interval with so many decimals; empty where there is none."""
    return "" if NONE in (ends := (fixed(low, digits), fixed(high, digits))) else " to ".join(ends)


@page_filter
def fmt_interval(low: Any, high: Any) -> str:
    """An interval; empty where there is none."""
    ends = number(low), number(high)
    return "" if any(map(math.isnan, ends)) else f"{fmt(ends[0], zeros=True)} to {fmt(ends[1], zeros=True)}"


def by_run(table: pd.DataFrame, statistics: Sequence[str], order: Sequence[str]) -> dict[str, Any]:
    """Runs down in this order, statistics across; the row over all trained runs first."""
    there = [statistic for statistic in statistics if (table["statistic"] == statistic).any()]
    rows = []
    runs = set(table["run"])
    for run in [name for name in ("all", *order) if name in runs]:
        own = table[table["run"] == run].drop_duplicates("statistic").set_index("statistic")
        cells = own.reindex(index=there, columns=CELL).to_dict("records")
        counts = own.reindex(index=there)["n"].dropna()
        n = fmt(counts.min()) if counts.nunique() == 1 else f"{fmt(counts.min())} to {fmt(counts.max())}"
        rows.append({"run": run, "cells": cells, "n": (n, str(own.iloc[0].get("unit", "")))})
    return {"head": [name_of(statistic) for statistic in there], "rows": rows}


def full_table(table: pd.DataFrame, without: Sequence[str] = ()) -> dict[str, Any]:
    """All numbers of a table; an interval is one column; empty columns are left out."""
    columns = [column for column in table.columns if column not in (*without, "seed", "high", "difference_high")]
    columns = [column for column in columns if not (table[column].isna() | (table[column].astype(str) == "")).all()]
    rows = [[_shown(column, row) for column in columns] for row in table.to_dict("records")]
    numeric = [pd.api.types.is_numeric_dtype(table[column]) for column in columns]
    return {"head": [name_of(column) for column in columns], "rows": rows, "numeric": numeric}


def _shown(column: str, row: dict[Any, Any]) -> str:
    value = row[column]
    if column in ("low", "difference_low"):
        return fmt_interval(value, row[column.replace("low", "high")])
    if column == "p" or column.startswith("p_"):
        return probability(value)
    if isinstance(value, str):
        return _MODELS.get(value, value) if column == "model" else NAMES.get(value, value)
    if column in ("neuron", "without", "n", "runs", "runs_in_top", "layer", "reply", "tokens") and not math.isnan(
        number(value)
    ):
        return str(int(value))
    return fmt(value)


def points(lines: Sequence[Line], x: str) -> dict[str, Any]:
    """A chart's numbers, one row for each x."""
    across = sorted({value for line in lines for value in line.x})
    of_line = [dict(zip(line.x, line.y, strict=True)) for line in lines]
    rows = [[fmt(at), *(fmt(values.get(at, math.nan)) for values in of_line)] for at in across]
    return {"head": [x, *(line.label for line in lines)], "rows": rows, "numeric": [True] * (len(lines) + 1)}


def charted(
    lines: Sequence[Line],
    x: str,
    y_label: str,
    title: str,
    from_zero: bool = False,
    log: bool = False,
    band: tuple[float, float] | None = None,
) -> dict[str, Any]:
    """A line chart with its key and its numbers; see `charts.line_chart`."""
    chart = line_chart(lines, x, y_label, title, from_zero, log, band)
    return {"chart": chart, "key": key(lines), "table": points(lines, x)}
