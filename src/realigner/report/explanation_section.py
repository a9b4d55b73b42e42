"""The chapter "Why this index?": explanations as charts, tables and text, and their summaries on the pages of indices."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from markupsafe import Markup

from realigner.explain.explanation import Ablation, Conclusion, Explanation, TrialResult
from realigner.explain.verdict import CAUSES, KINDS, outlier_sign, top_ranks
from realigner.report import charts, page_tables as tables
from realigner.report.charts import ChartAxis, Dot, Line, fmt
from realigner.report.page import page_filter
from realigner.report.run_styles import COLOURS, RunStyles
from realigner.traces.layout import UNTRAINED

MARKS = {"supported": "yes", "not supported": "no", "cannot tell": "unknown"}
page_filter(outlier_sign)
_OF_AN_IRM = ("matters", "enough")
_INDEX, _HOST = 2, 3  # colours: of the index in question, and of what is measured of the host's gradient
_HOWS = {
    "zero": ("Without a delta", "the loss without an index's delta"),
    "mean": ("With its mean in place of a delta", "the loss with an index's mean delta in place of its deltas"),
    "keep": ("With one delta alone", "the loss with an index's delta and no other"),
}
_HOST_HOWS = {"zero": ("With the residual held at 0", "the loss with the residual held at 0 at an index")}
_GROUPS = {"": "index {}", "leading": "the other leading indices", "matched": "indices of its size", "random": "random indices"}


def explanation_section(item: Explanation, number: int, runs: RunStyles) -> dict[str, Any]:
    """The chapter's template values of one explanation."""
    conclusions = [
        {"mark": MARKS[own.answer], **own.model_dump(), "unit": own.unit[:-1] if own.n == 1 else own.unit}
        for own in item.conclusions
    ]
    return {
        "id": f"why-{number}",
        "index": item.index,
        "found": item,
        "conclusions": [own for own in conclusions if own["n"]],
        "untried": [own for own in conclusions if not own["n"]],
        "trials": _trials(item),
        "ablations": [_ablations(item.index, irm, own, _HOWS) for irm, own in item.ablations.items()],
        "host": _ablations(item.index, "the bare host", item.host_ablation, _HOST_HOWS) if item.host_ablation else None,
        "profiles": _profiles(item, runs),
        "correlations": _correlations(item),
    }


def comparison(explained: Sequence[Explanation]) -> dict[str, Any] | None:
    """Several explanations side by side: their verdicts, and each question's answer in each; None of fewer than two."""
    if len(explained) < 2:
        return None

    def question(own: Conclusion) -> str:
        return own.question.rpartition(" (")[0] if own.key in _OF_AN_IRM else own.question  # less the IRM's name

    rows = []
    for asked in dict.fromkeys(question(own) for item in explained for own in item.conclusions):
        found = [[own for own in item.conclusions if question(own) == asked] for item in explained]
        rows.append({"question": asked, "cells": [_answered(own) for own in found]})
    heads = [{"host": item.host, "index": item.index, "cause": CAUSES.get(item.cause, item.cause)} for item in explained]
    return {"heads": heads, "rows": rows}


def _answered(conclusions: Sequence[Conclusion]) -> dict[str, str] | None:
    """One cell: the answer, or of several IRMs in how many it is supported."""
    if not conclusions:
        return None
    answers = [own.answer for own in conclusions]
    if len(set(answers)) == 1:
        return {"mark": MARKS[answers[0]], "text": answers[0]}
    return {"mark": "unknown", "text": f"supported in {answers.count('supported')} of {len(answers)} IRMs"}


def _trials(item: Explanation) -> dict[str, Any] | None:
    """The index in each training, one row for each kind of trial, as a chart and a table."""
    if not item.trials:
        return None
    first = top_ranks(item.width)
    ratios = [trial.ratio for trial in item.trials]
    references = [trial.ratio for trial in item.trials if trial.kind == "reference"]
    mean = sum(references) / len(references) if references else math.nan

    def dot(trial: TrialResult) -> Dot:
        title = f"seed {trial.seed}: {fmt(trial.ratio)} times the median, rank {trial.rank}; index {trial.leader} leads"
        return Dot(trial.ratio, title, _INDEX, trial.rank <= first)

    kinds = dict.fromkeys(trial.kind for trial in item.trials)
    rows = [(KINDS.get(kind, kind), [dot(trial) for trial in item.trials if trial.kind == kind]) for kind in kinds]
    axis = ChartAxis.over([*ratios, 1.0], charts.spans_much(ratios))
    lines = [(1.0, "c0"), *([(mean, f"c{_INDEX} d1")] if math.isfinite(mean) else [])]
    title = f"Index {item.index} in trainings with one thing changed"
    return {
        "chart": charts.dot_chart(rows, axis, "times the median" + " (log)" * axis.log, title, lines),
        "first": first,
        "mean": mean,
        "kinds": KINDS,
    }


def _ablations(index: int, whose: str, own: Sequence[Ablation], hows: Mapping[str, tuple[str, str]]) -> dict[str, Any]:
    """The ablations of an IRM or the host: a chart for each kind, and a table."""
    by_how = {how: rows for how in hows if (rows := [row for row in own if row.how == how])}
    losses = {row.how: fmt(row.loss, 4) for row in own}
    return {
        "whose": whose,
        "n": max((row.n for row in own), default=0),
        "losses": [losses.get(how, "") for how in ("whole", "none")],
        "charts": [
            (hows[how][0], _ablation_chart(index, f"{whose}: change of {hows[how][1]}, beside other indices", rows))
            for how, rows in by_how.items()
        ],
        "rows": [
            (hows[how][0], _GROUPS.get(row.group, row.group).format(row.index), row)
            for how, rows in by_how.items()
            for row in rows
        ],
    }


def _ablation_chart(index: int, title: str, own: Sequence[Ablation]) -> Markup:
    def dot(row: Ablation) -> Dot:
        title = f"index {row.index}: {fmt(row.change)} ({tables.fmt_interval(row.low, row.high)})"
        if row.group:
            return Dot(row.change, title, 0, False, small=True)
        return Dot(row.change, title, _INDEX, True, row.low, row.high)

    ends = [end for row in own if not row.group for end in (row.low, row.high)]
    sizes = sorted(abs(value) for value in [*(row.change for row in own), *ends])
    edge = 5 * sizes[int(0.9 * (len(sizes) - 1))]  # one index with a huge effect would squeeze all others into a point
    far = {row.index: row for row in own if row.group and abs(row.change) > edge}
    shown = [row for row in own if row.index not in far]
    rows = [
        (name.format(index), [dot(row) for row in shown if row.group == group])
        for group, name in _GROUPS.items()
        if any(row.group == group for row in own)
    ]
    axis = ChartAxis.over([*(row.change for row in shown), *ends, 0.0])
    beyond = ", ".join(f"index {row.index} ({fmt(row.change)})" for row in far.values())
    label = "change of loss, nats per target" + (f"; beyond the axis: {beyond}" if far else "")
    return charts.dot_chart(rows, axis, label, title, [(0.0, "c0")])


def _profiles(item: Explanation, runs: RunStyles) -> list[dict[str, Any]]:
    """The index layer by layer: in the host, in the IRMs' deltas, and what these cancel of the host's residual."""
    found = item.profiles
    host = [Line("residual", found.layer, found.residual, _INDEX), Line("gradient", found.layer, found.gradient, _HOST)]
    over, cancelled = "over the median", "share cancelled"
    drawn = [
        (host, over, f"The host's residual and the loss's gradient at index {item.index}, over the layer's median"),
        (_of_irms(found.layer, found.delta, runs), over, "Mean |delta| there, over the layer's median"),
        (
            _of_irms(found.layer, found.cancelled, runs),
            cancelled,
            "The share of the host's residual there that the deltas up to a layer cancel: 1 is all of it, negative adds to it",
        ),
    ]
    entries = []
    for lines, name, words in drawn:
        log = name == over and charts.spans_much([y for line in lines for y in line.y])
        entries.append({"words": words, **tables.charted(lines, "layer", name + " (log)" * log, words, not log, log)})
    return entries


def _of_irms(layers: Sequence[float], values: Mapping[str, Sequence[float]], runs: RunStyles) -> list[Line]:
    """One line for each IRM, in the page's colour if the run is on the page."""
    lines = []
    for number, (irm, line) in enumerate(values.items()):
        known = irm in runs.names
        colour = 0 if irm == UNTRAINED else runs.colour(irm) if known else number % COLOURS + 1
        lines.append(Line(irm, layers, line, colour, runs.dash(irm) if known else number // COLOURS % 4))
    return lines


def _correlations(item: Explanation) -> dict[str, Any] | None:
    """Each measurement's rank correlation with the scores, of trained and of untrained IRMs."""
    if not item.correlations:
        return None
    about = {fact.measurement: fact.about for fact in item.facts}
    measurements = dict.fromkeys(row.measurement for row in item.correlations)
    rows = []
    for name in measurements:
        own = [row for row in item.correlations if row.measurement == name]
        dots = []
        for row in own:
            trained = row.scores != UNTRAINED
            title = f"{'trained' if trained else UNTRAINED}: {fmt(row.rho)} ({tables.fmt_interval(row.low, row.high)})"
            dots.append(Dot(row.rho, title, _INDEX if trained else 0, trained, row.low, row.high, down=36 if trained else 66))
        rows.append((about.get(name, name), dots))
    table = pd.DataFrame([row.model_dump() for row in item.correlations])
    table["measurement"] = table["measurement"].map(lambda name: about.get(name, name))
    return {
        "chart": charts.dot_chart(
            rows, ChartAxis(-1.0, 1.0), "Spearman's rho", "Rank correlations of measurements", [(0.0, "c0")]
        ),
        "table": tables.full_table(table, ("n",)),
        "n": f"{item.correlations[0].n:,}",
    }


def index_summary(items: Sequence[Explanation], index: int) -> dict[str, Any] | None:
    """The content of explanations on the page of an index; None if they have none."""
    known = [item.pages[index] for item in items if index in item.pages]
    if not known:
        return None
    losses: dict[str, Ablation] = {}
    for item in items:
        for name, table in {**item.ablations, "": item.host_ablation}.items():
            row = next((row for row in table if row.how == "zero" and row.index == index), None)
            if row is not None:
                losses.setdefault(name, row)
    return {
        "known": known[0],
        "host_loss": losses.pop("", None),
        "losses": losses,
        "chapters": [
            {"id": f"why-{number}", "words": item.words} for number, item in enumerate(items, 1) if item.index == index
        ],
    }
