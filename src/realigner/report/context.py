"""The template values of one trace's part of the page: everything computed, rounded and put into words."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import xarray as xr
from markupsafe import Markup

from realigner.analysis import Consensus, layer_counts, leading_indices, run_maps, top_histogram
from realigner.analysis.timing import PLACES
from realigner.dialogues import spoken
from realigner.prompts import PAPER_PROMPTS
from realigner.report import charts, diagram, page_tables as tables
from realigner.report.charts import Line, fmt
from realigner.report.explanation_section import MARKS, explanation_section
from realigner.report.indices import index_pages
from realigner.report.plot_style import as_svg
from realigner.report.report_input import ReportInput
from realigner.report.run_styles import RunStyles
from realigner.report.token_maps import ARROW, explorer, questions
from realigner.training.run_dir import RECIPE_FILE
from realigner.training.run_record import loss_name

_BINS = 20  # of the histograms over a text
BUDGET = 14_500_000  # bytes of a page; what everything else leaves is spent on maps token by token
_PROMPTS_SHOWN = 50  # in the commands
MARKED = 5  # leading indices marked above a map, each with a page
_STRIATION = ("icc", "kendall_w", "eta_squared_neuron", "omega_squared_neuron", "svd_share")
_TIMING = ("centre_of_mass", "prompt_share", "first_share", "largest_share", "entropy", "late_share_1000")
_PLACES = (*(f"{place}_share" for place in PLACES), "reply_centre_of_mass")
_SPARSITY = ("hoyer", "participation", "kurtosis", "gini", "small_share")
_RATIOS = ("energy_ratio", "size_ratio")
_P_HOST = ("p_host", "p_host_holm", "p_host_bh")
_LEFT_OUT = ("run", "tone", "unit", "test", "difference", "difference_low", *_P_HOST, "score", "runs")
_SHADES = {
    diagram.INK: "ink",
    diagram.SOFT: "soft",
    diagram.TRAINED: "c1",
    diagram.FILL: "ground",
    diagram.TINT: "paper",
    "#ffffff": "paper",
}  # of the diagram, on the page
_FIGURES = re.compile(r" \((?:expected|95%)[^()]*\)")  # the page shows them separately


def page_context(item: ReportInput, number: int = 0, budget_bytes: int = BUDGET) -> dict[str, Any]:
    """The template values of one trace.

    Args:
        item: the trace, its statistics, and the records of its runs.
        number: zero-based index of the trace on the page.
        budget_bytes: size of its part of the page.
    """
    trace, found = item.trace, item.analysis
    runs, count = RunStyles.of(trace), trace["count"].values
    maps = {kind: run_maps(trace, kind) for kind in ("signed", "absolute")}
    leading = {run: leading_indices(maps["absolute"].sel(run=run), trace.sizes["neuron"]) for run in runs.names}
    top = {run: leading_indices(maps["absolute"].sel(run=run), 10) for run in runs.names}
    marks = {run: [int(index) for index in table["neuron"][:MARKED]] for run, table in leading.items()}
    record = next((item.records[run] for run in runs.trained if run in item.records), None)  # stands for all
    pages = index_pages(trace, found.consensus if found else None, runs, maps, leading, marks, item.explained)
    page = {
        "name": item.name,
        "prefix": "" if number == 0 else f"{number + 1}-",
        "runs": [runs.shown(run) for run in runs.names],
        "counts": {
            "tokens": int(count.sum()),
            "counted": _range([int(count[trace["text_run"].values == run, :2].sum()) for run in runs.names]),
            "prompts": len(set(trace["text_prompt"].values.tolist())),
            "layers": trace.sizes["layer"],
            "neurons": trace.sizes["neuron"],
            "kept": trace.sizes["rank"],
        },
        "host": Path(str(trace.attrs["host"])).name,  # as explanations have it
        "host_source": str(trace.attrs["host"]),
        "settings": trace.attrs["notes"].get("settings", {}),
        "verdicts": [_verdict(verdict) for verdict in found.verdicts] if found else [],
        "replies": _replies(item, runs),
        "leading": {run: top[run].to_dict("records") for run in runs.names},
        "striation": _striation(found.striation, runs) if found else [],
        "consensus": _consensus(found.consensus, runs.names) if found and len(found.consensus.table) else None,
        "timing": _timing(trace, found.timing if found else None, runs),
        "sparsity": _sparsity(trace, found.sparsity if found else None, runs),
        "turns": _turns(found.turns, runs) if found else None,
        "explanations": [explanation_section(found, at, runs) for at, found in enumerate(item.explained, 1)],
        "training": _training(item, runs),
        "records": {run: item.records[run] for run in runs.names if run in item.records},
        "indices": pages,
        "paged": {entry["index"] for entry in pages},
        "record": record,
        "diagram": _diagram(record, trace.sizes["neuron"]) if record else None,
        "marked": MARKED,
        "prompts": questions(trace),
        "has_tokens": "delta" in trace,
        "start": {"left": runs.trained[0], "right": runs.twin(runs.trained[0])},
        "commands": _commands(item, runs),
    }
    page |= explorer(trace, runs, maps, marks, budget_bytes - int(1.2 * len(json.dumps(page, default=str))) - 150_000)
    return page


def _range(numbers: Sequence[int]) -> str:
    """The number, or the smallest and the largest."""
    low, high = min(numbers), max(numbers)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _diagram(record: Mapping[str, Any], neurons: int) -> Markup:
    """Figure 1, in the colours of the page's theme."""
    text = as_svg(diagram.figure1(record, neurons)).replace("<svg", '<svg role="img" aria-label="The architecture"', 1)
    for colour, name in _SHADES.items():
        text = text.replace(colour, f"var(--{name})")
    return Markup(text)


def _commands(item: ReportInput, runs: RunStyles) -> list[str]:
    """The commands that reproduce this page, beside what it was made of."""
    made_of = list(dict.fromkeys(str(runs.facts[run]["irm"]) for run in runs.names if runs.facts[run]["irm"]))
    settings = item.trace.attrs["notes"].get("settings", {})
    # What has no recipe (a ready-made IRM, an adapter alone) is not trained again.
    known = [folder for folder in made_of if (Path(folder) / RECIPE_FILE).is_file() or not Path(folder).is_dir()]
    lines = [
        f"realigner train --recipe {shlex.quote(f'{folder}/{RECIPE_FILE}')} --out {shlex.quote(_again(folder))}"
        for folder in known
    ]
    folders = [_again(folder) if folder in known else folder for folder in made_of]
    parents = {str(Path(folder).parent) for folder in folders}
    places = sorted(parents) if len(folders) > 2 and len(parents) == 1 else folders
    irms = " ".join(f"--irm {shlex.quote(place)}" for place in places) or "--irm RUN"
    strengths = {runs.facts[run]["strength"] for run in runs.names}
    options = "".join(f" --strength {strength}" for strength in strengths if len(strengths) == 1 and strength != 1)
    options += f" --max-new-tokens {settings['max_new_tokens']}" if "max_new_tokens" in settings else ""
    if variables := settings.get("chat_template_kwargs"):
        options += f" --chat-template-kwargs {shlex.quote(json.dumps(variables))}"
    asked = item.trace.attrs["notes"].get("prompts", [])
    if asked == [*PAPER_PROMPTS]:
        prompts = "paper"
    else:
        prompts = "prompts.jsonl"
        if 0 < len(asked) <= _PROMPTS_SHOWN:  # no line of JSON is END
            lines += ["cat > prompts.jsonl <<'END'", *(json.dumps(prompt, ensure_ascii=False) for prompt in asked), "END"]
    keep = " --keep raw" if "delta" in item.trace else ""
    explains = []
    for found in item.explained:
        given = " ".join(f"--irm {shlex.quote(_again(folder))}" for folder in found.irms.values())
        how = " --quick" * found.quick + ("" if found.steps is None else f" --steps {found.steps}")
        how += "" if found.trials else " --no-trials"
        explains.append(f"realigner explain {given} --index {found.index}{how} --out {shlex.quote(_again(str(found.folder)))}")
    sources = ["again/trace.zarr", *(shlex.quote(_again(str(found.folder))) for found in item.explained)]
    return [
        *lines,
        f"realigner trace {irms} --prompts {prompts} --out again/trace.zarr{keep}{options}",
        "realigner analyze again/trace.zarr",
        *explains,
        f"realigner report {' '.join(sources)} --out again/report.html",
    ]


def _again(folder: str) -> str:
    """Where what is in a folder is made again."""
    return str(Path("again", *(part for part in Path(folder).parts if part not in ("/", ".."))))


def _verdict(verdict: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **dict.fromkeys((*tables.CELL, "p_adjusted", "n", "runs", "prompts", "tokens")),
        "unit": "",
        **verdict,
        "mark": MARKS.get(verdict["verdict"], "unknown"),
        "words": _FIGURES.sub("", verdict["words"]),
    }


def _replies(item: ReportInput, runs: RunStyles) -> list[dict[str, Any]]:
    """The replies to each prompt; initially one untrained run and the first run of each tone are shown."""
    answers = item.answers()
    columns = [run for run in ["base", *runs.names] if any(run in answer for answer in answers)]
    firsts = {runs.facts[run]["tone"]: run for run in reversed(columns) if run != "base"}
    shown = {"base", *firsts.values()}
    order = sorted(columns, key=lambda run: (run != "base", run != "base" and not runs.facts[run]["untrained"]))
    found = []
    for answer in answers:
        *before, (_, last) = spoken(answer["prompt"])
        is_dialogue = any(isinstance(answer.get(run), list) for run in order)
        questions = [text for role, text in spoken(answer["prompt"]) if role == "user"]
        cells = [
            {
                "run": run,
                "colour": runs.colour(run),
                "shown": run in shown,
                "turns": list(zip(questions, answer.get(run, []), strict=False))
                if is_dialogue
                else [("", answer.get(run, ""))],
            }
            for run in order
        ]
        title = ARROW.join(questions) if is_dialogue else last
        before = [turn for turn in before if turn[0] == "system"] if is_dialogue else before
        found.append({"prompt": title, "before": before, "cells": cells})
    return found


def _turns(table: pd.DataFrame, runs: RunStyles) -> dict[str, Any] | None:
    """What is added to each reply of a conversation, as a chart; the last against the first, as a table."""
    if not len(table):
        return None
    own = table[table["run"] != "all"]
    lines = [
        runs.line(run, part["reply"].astype(int).tolist(), (part["value"] / (part["value"].iloc[0] or math.nan)).tolist())
        for run in runs.names
        if len(part := own[(own["run"] == run) & (own["statistic"] == "energy")])
    ]
    whole = table[table["reply"] == "last"]
    return {
        "chart": tables.charted(lines, "reply", "energy, first reply = 1", "Energy of a token by reply", from_zero=True),
        "table": tables.by_run(whole, _RATIOS, runs.names),
        "all": tables.full_table(table, ("tone", "unit")),
    }


def _striation(table: pd.DataFrame, runs: RunStyles) -> list[dict[str, Any]]:
    return [
        {
            "without": int(own["without"].iloc[0]),
            "table": tables.by_run(own, _STRIATION, runs.names),
            "all": tables.full_table(own, ("without", "tone", "unit")),
        }
        for _, own in table.groupby("without")
    ]


def _consensus(found: Consensus, order: Sequence[str]) -> dict[str, Any]:
    pairs = found.pairs
    runs = [run for run in order if run in {*pairs["run_a"], *pairs["run_b"]}]
    both = zip(pairs["run_a"], pairs["run_b"], pairs["value"], strict=True)
    overlap = {pair: value for a, b, value in both for pair in ((a, b), (b, a))}
    null = float(pairs["null"].iloc[0]) if len(pairs) else 0.0  # coloured from here on: the same rankings in full
    matrix = [
        [
            None if a == b else {"text": fmt(value, 2), "weight": round(max(0.0, (value - null) / (1 - null)), 2)}
            for b in runs
            for value in [overlap[a, b] if a != b else 1.0]
        ]
        for a in runs
    ]
    return {
        "table": tables.full_table(found.table, _LEFT_OUT),
        "indices": tables.full_table(found.indices.head(12), _LEFT_OUT),
        "runs": int(found.indices["runs"].iloc[0]) if len(found.indices) else 0,
        "pairs": {"runs": runs, "matrix": matrix, "null": fmt(null)},
    }


def _timing(trace: xr.Dataset, table: pd.DataFrame | None, runs: RunStyles) -> dict[str, Any]:
    figures = []
    for k in (100, 1000, 10_000):
        if k <= trace.sizes["rank"]:
            histogram = top_histogram(trace, k, bins=_BINS)
            lines = [
                runs.line(run, own["position"].tolist(), (own["count"] / max(1, own["count"].sum())).tolist())
                for run in runs.names
                if len(own := histogram[histogram["run"] == run])
            ]
            title = f"Where in their texts the {k:,} largest values lie: "
            even = histogram.groupby("position")["tokens"].sum() / max(1, histogram["tokens"].sum())
            numbers = [*lines, Line("all tokens", even.index.tolist(), even.tolist(), 0, 0)]
            figures.append({"k": f"{k:,}", "charts": _bars(lines, (0, 1), title), "table": tables.points(numbers, "place")})
    found: dict[str, Any] = {"figures": figures, "table": None, "places": None, "all": None}
    if table is not None:
        whole = table[table["without"] == 0] if "without" in table else table
        found["table"] = tables.by_run(whole, _TIMING, runs.names)
        found["places"] = tables.by_run(whole, _PLACES, runs.names)
        found["all"] = tables.full_table(table, ("tone", "unit"))
    return found


def _sparsity(trace: xr.Dataset, table: pd.DataFrame | None, runs: RunStyles) -> dict[str, Any]:
    k = min(1000, trace.sizes["rank"])
    counts = layer_counts(trace, k)
    lines = [_layers(runs, run, counts[counts["run"] == run], "count") for run in runs.names]
    layers = trace["layer"].values.tolist()
    found: dict[str, Any] = {
        "table": None,
        "k": f"{k:,}",
        "layers": _bars(lines, (layers[0], layers[-1]), f"How many of the {k:,} largest values lie in each layer: "),
        "layer_table": tables.points(lines, "layer"),
        "hoyer": None,
    }
    if table is not None:
        of_all = table["layer"].astype(str) == "all"
        found["table"] = tables.by_run(table[of_all], _SPARSITY, runs.names)
        hoyer = table[~of_all & (table["statistic"] == "hoyer")]
        drawn = [_layers(runs, run, hoyer[hoyer["run"] == run], "value") for run in runs.names]
        null = float(hoyer["null"].iloc[0]) if len(hoyer) else math.nan
        if math.isfinite(null):
            drawn.append(Line("Gaussian noise", layers, [null] * len(layers), 0, 3))
        found["hoyer"] = tables.charted(drawn, "layer", "Hoyer's sparsity", "Hoyer's sparsity by layer")
    return found


def _bars(lines: Sequence[Line], ends: tuple[float, float], title: str) -> list[dict[str, Any]]:
    """A small histogram for each line, all on one scale."""
    highest = max((max(line.y) for line in lines if len(line.y)), default=1.0)
    return [
        {"run": line.label, "chart": charts.bar_chart(line.y, ends, highest, line.colour, title + line.label)} for line in lines
    ]


def _layers(runs: RunStyles, run: str, own: pd.DataFrame, column: str) -> Line:
    own = own.assign(layer=own["layer"].astype(int)).sort_values("layer")
    return runs.line(run, own["layer"].tolist(), own[column].astype(float).tolist())


def _training(item: ReportInput, runs: RunStyles) -> dict[str, Any] | None:
    """Validation loss of every run by step, with a ring around the step that was kept."""
    drawn: dict[str, list[Line]] = {"validation_loss": [], "loss": []}
    for run in runs.names:
        for name, lines in drawn.items():
            own = [(entry["step"], entry[name]) for entry in item.logs.get(run, ()) if name in entry]
            if own:
                steps, losses = zip(*own, strict=True)
                kept = item.records.get(run, {}).get("kept_step") if name == "validation_loss" else None
                lines.append(runs.line(run, steps, losses, kept))
    lines, bare = drawn.values()
    if not lines and not bare:
        return None
    name = "loss, nats per token"
    names = {loss_name(record) for record in item.records.values()}
    title = " or ".join(f"{one[:1].upper()}{one[1:]}" for one in sorted(names, reverse=True))
    return {
        "validation": tables.charted(lines, "step", name, f"{title} by step"),
        "title": title,
        "batches": tables.charted(bare, "step", name, "Training loss by step, one batch each"),
    }
