"""The template values of one trace's part of the page: everything computed, rounded and put into words."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import xarray as xr
from markupsafe import Markup

from realigner.analysis import layer_counts, leading_indices, run_maps, top_histogram
from realigner.explain.explanation import Explanation
from realigner.report import charts, diagram, page_tables as tables
from realigner.report.charts import Line, fmt
from realigner.report.explanation_section import MARKS, explanation_sections
from realigner.report.indices import index_pages
from realigner.report.plot_style import as_svg
from realigner.report.report_input import ReportInput
from realigner.report.run_styles import RunStyles
from realigner.report.token_maps import explorer, questions

_BINS = 20  # of the histograms over a text
BUDGET = 14_500_000  # bytes of a page; what everything else leaves is spent on maps token by token
MARKED = 5  # leading indices marked above a map, each with a page
_STRIATION = ("icc", "kendall_w", "eta_squared_neuron", "omega_squared_neuron", "svd_share")
_TIMING = ("centre_of_mass", "prompt_share", "first_share", "largest_share", "entropy", "late_share_1000")
_SPARSITY = ("hoyer", "participation", "kurtosis", "gini", "small_share")
_FIGURES = re.compile(r" \((?:expected|95%)[^()]*\)")  # the page shows them separately


def page_context(item: ReportInput, number: int = 0, budget_bytes: int = BUDGET) -> dict[str, Any]:
    """The template values of one trace.

    Args:
        item: the trace, its statistics, and the records of its runs.
        number: zero-based index of the trace on the page.
        budget_bytes: size of its part of the page.
    """
    trace = item.trace
    runs = RunStyles.of(trace)
    maps = {kind: run_maps(trace, kind) for kind in ("signed", "absolute")}
    leading = {run: leading_indices(maps["absolute"].sel(run=run), trace.sizes["neuron"]) for run in runs.names}
    top = {run: leading_indices(maps["absolute"].sel(run=run), 10) for run in runs.names}
    marks = {run: [int(index) for index in table["neuron"][:MARKED]] for run, table in leading.items()}
    prefix = "" if number == 0 else f"{number + 1}-"
    page = {
        "name": item.name,
        "prefix": prefix,
        "runs": [runs.shown(run) for run in runs.names],
        "trained": runs.trained,
        "counts": _counts(trace),
        "host": str(trace.attrs["host"]),
        "settings": trace.attrs["notes"].get("settings", {}),
        "verdicts": [_verdict(verdict) for verdict in _found(item, "verdicts", [])],
        "replies": _replies(item, runs),
        "leading": {run: top[run].to_dict("records") for run in runs.names},
        "striation": _striation(item, runs),
        "consensus": _consensus(item, runs.names),
        "timing": _timing(item, runs),
        "sparsity": _sparsity(item, runs),
        "explanations": explanation_sections(item.explained, runs),
        "training": _training(item, runs),
        "records": {run: item.records[run] for run in runs.names if run in item.records},
        "indices": index_pages(trace, _found(item, "consensus", None), runs, maps, leading, marks, item.explained),
        "marked": MARKED,
        "prompts": questions(trace),
        "has_tokens": "delta" in trace,
        "start": {"left": runs.trained[0], "right": runs.twin(runs.trained[0])},
        "commands": _commands(item, runs),
    }
    page |= _words(item, runs, page)
    page |= explorer(trace, runs, maps, marks, budget_bytes - int(1.2 * len(json.dumps(page, default=str))) - 150_000)
    return page


def _words(item: ReportInput, runs: RunStyles, page: Mapping[str, Any]) -> dict[str, Any]:
    """Title, lead and menu, and the record of the first trained run, which stands for all."""
    record = next((item.records[run] for run in runs.trained if run in item.records), None)
    counts, host = page["counts"], page["host"] or "its host"
    trained = [run for run in runs.names if not runs.facts[run]["untrained"]]
    tones = sorted({str(runs.facts[run]["tone"]) for run in trained})
    what = f"{_list(tones)} on {host}" if tones else item.name
    size = ""
    if record:
        share = 100 * record["irm"]["parameters"] / record["irm"]["host_parameters"]
        size = f" of {record['irm']['parameters']:,} parameters ({share:.1f}% of the host)"
    networks = tables.counted(len(trained), "small network")
    twins = tables.counted(len(runs.names) - len(trained), "untrained twin")
    lead = (
        f"A frozen language model, {host}, and {networks}{size} that read its first post-attention residual and add to the "
        f"residual stream of {counts['layers']} layers; {twins} beside them. {tables.counted(counts['prompts'], 'prompt')}, "
        f"{counts['tokens']:,} tokens. Not one of the host's weights was changed."
    )
    menu = [
        ("summary", "Findings", page["verdicts"]),
        ("replies", "Replies", page["replies"]),
        ("maps", "Maps", True),
        ("striation", "Striation", page["striation"]),
        ("consensus", "Consensus", page["consensus"]),
        ("timing", "Timing", True),
        ("sparsity", "Sparsity", True),
        ("why", "Why", page["explanations"]),
        ("indices", "Indices", page["indices"]),
        ("training", "Training", page["training"]),
        ("methods", "Methods", True),
        ("reproduce", "Reproduce", True),
    ]
    return {
        "title": what[:1].upper() + what[1:],
        "lead": lead,
        "menu": menu,
        "record": record,
        "paged": {entry["index"] for entry in page["indices"]},
        "diagram": _diagram(record, counts["neurons"]) if record else None,
        "diagram_layers": len(record["irm"]["layers"]) if record else 0,
    }


def _diagram(record: Mapping[str, Any], neurons: int) -> Markup:
    """Figure 1, in the colours of the page's theme."""
    text = as_svg(diagram.figure1(record, neurons))
    shades = {
        diagram.INK: "ink",
        diagram.SOFT: "soft",
        diagram.TRAINED: "c1",
        diagram.FILL: "ground",
        diagram.TINT: "paper",
        "#ffffff": "paper",
    }
    for colour, name in shades.items():
        text = text.replace(colour, f"var(--{name})")
    return Markup(text.replace("<svg", '<svg role="img" aria-label="The architecture"', 1))


def _list(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _commands(item: ReportInput, runs: RunStyles) -> list[str]:
    """The commands that reproduce this page."""
    folders = list(dict.fromkeys(str(runs.facts[run]["irm"]) for run in runs.names if runs.facts[run]["irm"]))
    settings = item.trace.attrs["notes"].get("settings", {})
    lines = [f"realigner train --recipe {folder}/recipe.yaml --out {folder}" for folder in folders]
    parents = {str(Path(folder).parent) for folder in folders}
    places = sorted(parents) if len(folders) > 2 and len(parents) == 1 else folders
    irms = " ".join(f"--irm {place}" for place in places) or "--irm RUN"
    strengths = {runs.facts[run]["strength"] for run in runs.names}
    options = "".join(f" --strength {strength}" for strength in strengths if len(strengths) == 1 and strength != 1)
    options += f" --max-new-tokens {settings['max_new_tokens']}" if "max_new_tokens" in settings else ""
    keep = " --keep raw" if "delta" in item.trace else ""
    return [
        *lines,
        f"realigner trace {irms} --out trace.zarr{keep}{options}",
        "realigner analyze trace.zarr",
        *(_explain_command(found) for found in item.explained),
        f"realigner report {' '.join(['trace.zarr', *(str(found.folder) for found in item.explained)])} --out report.html",
    ]


def _explain_command(found: Explanation) -> str:
    irms = " ".join(f"--irm {folder}" for folder in found.irms.values())
    untried = "" if found.trials else " --no-trials"
    return f"realigner explain {irms} --index {found.index}{' --quick' * found.quick}{untried} --out {found.folder}"


def _found(item: ReportInput, name: str, otherwise: Any) -> Any:
    return otherwise if item.analysis is None else getattr(item.analysis, name)


def _counts(trace: xr.Dataset) -> dict[str, int]:
    count = trace["count"].values
    return {
        "tokens": int(count.sum()),
        "counted": int(count[:, :2].sum()),
        "prompts": len(set(trace["text_prompt"].values.tolist())),
        "layers": trace.sizes["layer"],
        "neurons": trace.sizes["neuron"],
        "kept": trace.sizes["rank"],
    }


def _verdict(verdict: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "claim": verdict["claim"],
        "verdict": verdict["verdict"],
        "mark": MARKS.get(verdict["verdict"], "unknown"),
        "words": _FIGURES.sub("", verdict["words"]),
        "p_adjusted": "" if math.isnan(tables.number(verdict.get("p_adjusted"))) else tables.probability(verdict["p_adjusted"]),
        "n": verdict.get("n"),
        "unit": verdict.get("unit", ""),
        **tables.cell(verdict),
    }


def _replies(item: ReportInput, runs: RunStyles) -> list[dict[str, Any]]:
    """The replies to each prompt; initially one untrained run and the first run of each tone are shown."""
    answers = item.answers()
    columns = [run for run in ["base", *runs.names] if any(run in answer for answer in answers)]
    shown, tones = {"base"}, set[str]()
    for run in columns[1:] if columns[:1] == ["base"] else columns:
        if runs.facts[run]["tone"] not in tones:
            shown.add(run)
            tones.add(runs.facts[run]["tone"])
    order = sorted(columns, key=lambda run: (run != "base", run != "base" and not runs.facts[run]["untrained"]))
    return [
        {
            "prompt": answer["prompt"],
            "cells": [
                {"run": run, "text": answer.get(run, ""), "colour": runs.colour(run), "shown": run in shown} for run in order
            ],
        }
        for answer in answers
    ]


def _striation(item: ReportInput, runs: RunStyles) -> list[dict[str, Any]]:
    table = _found(item, "striation", None)
    if table is None:
        return []
    return [
        {
            "without": int(without),
            "table": tables.by_run(own, _STRIATION, runs.names),
            "all": tables.full_table(own, ("without", "tone", "unit")),
        }
        for without, own in table.groupby("without")
    ]


def _consensus(item: ReportInput, order: Sequence[str]) -> dict[str, Any] | None:
    found = _found(item, "consensus", None)
    if found is None or not len(found.table):
        return None
    drop = (
        "run",
        "tone",
        "unit",
        "test",
        "difference",
        "difference_low",
        "p_host",
        "p_host_holm",
        "p_host_bh",
        "score",
        "runs",
    )
    pairs = found.pairs
    there = {*pairs["run_a"], *pairs["run_b"]}
    runs = [run for run in order if run in there]
    overlap = {(a, b): value for a, b, value in zip(pairs["run_a"], pairs["run_b"], pairs["value"], strict=True)}
    top = max([value for value in overlap.values() if math.isfinite(value)], default=1.0) or 1.0
    matrix = [
        [
            None if a == b else {"text": fmt(value, 2), "weight": round(min(1.0, max(0.0, value / top)), 2)}
            for b in runs
            if (value := overlap.get((a, b), overlap.get((b, a), 0.0))) is not None
        ]
        for a in runs
    ]
    return {
        "table": tables.full_table(found.table, drop),
        "indices": tables.full_table(found.indices.head(12), drop),
        "neurons": [int(index) for index in found.indices["neuron"].head(12)],
        "runs": int(found.indices["runs"].iloc[0]) if len(found.indices) else 0,
        "pairs": {"runs": runs, "matrix": matrix, "null": fmt(float(pairs["null"].iloc[0])) if len(pairs) else ""},
    }


def _timing(item: ReportInput, runs: RunStyles) -> dict[str, Any]:
    table = _found(item, "timing", None)
    figures = []
    for k in (100, 1000, 10_000):
        if k <= item.trace.sizes["rank"]:
            histogram = top_histogram(item.trace, k, bins=_BINS)
            lines = [
                Line(run, own["position"].tolist(), (own["count"] / max(1, own["count"].sum())).tolist(), runs.colour(run))
                for run in runs.names
                if len(own := histogram[histogram["run"] == run])
            ]
            title = f"Where in their texts the {k:,} largest values lie: "
            figures.append({"k": f"{k:,}", "charts": _bars(lines, (0, 1), title), "table": tables.points(lines, "place")})
    if table is None:
        return {"figures": figures, "table": None, "all": None}
    whole = table[table["without"] == 0] if "without" in table else table
    return {
        "figures": figures,
        "table": tables.by_run(whole, _TIMING, runs.names),
        "all": tables.full_table(table, ("tone", "unit")),
    }


def _sparsity(item: ReportInput, runs: RunStyles) -> dict[str, Any]:
    found: dict[str, Any] = {"table": None, "all": None, "chart": None}
    k = min(1000, item.trace.sizes["rank"])
    counts = layer_counts(item.trace, k)
    lines = [_layers(runs, run, counts[counts["run"] == run], "count") for run in runs.names]
    layers = item.trace["layer"].values.tolist()
    found["layers"] = _bars(lines, (layers[0], layers[-1]), f"How many of the {k:,} largest values lie in each layer: ")
    found["k"], found["layer_table"] = f"{k:,}", tables.points(lines, "layer")
    table = _found(item, "sparsity", None)
    if table is not None:
        of_all = table["layer"].astype(str) == "all"
        found["table"] = tables.by_run(table[of_all], _SPARSITY, runs.names)
        hoyer = table[~of_all & (table["statistic"] == "hoyer")]
        drawn = [_layers(runs, run, hoyer[hoyer["run"] == run], "value") for run in runs.names]
        null = float(hoyer["null"].iloc[0]) if len(hoyer) else math.nan
        if math.isfinite(null):
            drawn.append(Line("Gaussian noise", layers, [null] * len(layers), 0, 3))
        found["chart"] = charts.line_chart(drawn, "layer", "Hoyer's sparsity", "Hoyer's sparsity by layer")
        found["chart_key"], found["all"] = charts.key(drawn), tables.points(drawn, "layer")
    return found


def _bars(lines: Sequence[Line], ends: tuple[float, float], title: str) -> list[dict[str, Any]]:
    """A small histogram for each line, all on one scale."""
    highest = max((max(line.y) for line in lines if len(line.y)), default=1.0)
    return [
        {"run": line.label, "chart": charts.bar_chart(line.y, ends, highest, line.colour, title + line.label)} for line in lines
    ]


def _layers(runs: RunStyles, run: str, own: pd.DataFrame, column: str) -> Line:
    own = own.assign(layer=own["layer"].astype(int)).sort_values("layer")
    return Line(run, own["layer"].tolist(), own[column].astype(float).tolist(), runs.colour(run), runs.dash(run))


def _training(item: ReportInput, runs: RunStyles) -> dict[str, Any] | None:
    """Validation loss of every run by step, with a ring around the step that was kept."""
    lines, bare = [], []
    for run in runs.names:
        log = item.logs.get(run) or []
        own = [(entry["step"], entry["validation_loss"]) for entry in log if "validation_loss" in entry]
        batches = [(entry["step"], entry["loss"]) for entry in log if "loss" in entry]
        if own:
            kept = item.records.get(run, {}).get("kept_step")
            steps, losses = zip(*own, strict=True)
            lines.append(Line(run, steps, losses, runs.colour(run), runs.dash(run), kept))
        if batches:
            steps, losses = zip(*batches, strict=True)
            bare.append(Line(run, steps, losses, runs.colour(run), runs.dash(run)))
    if not lines and not bare:
        return None
    name = "loss, nats per token"
    return {
        "validation": charts.line_chart(lines, "step", name, "Validation loss by step"),
        "batches": charts.line_chart(bare, "step", name, "Training loss by step, one batch each"),
        "key": charts.key(lines or bare),
        "table": tables.points(lines, "step"),
    }
