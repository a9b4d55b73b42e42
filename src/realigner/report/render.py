"""The report: one HTML page, everything inside it, of what runs do and what their IRMs add."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import xarray as xr
from transformers import PreTrainedModel

from realigner.analysis import Analysis, analyze
from realigner.errors import RealignerError
from realigner.files import refuse_existing, write_text
from realigner.hosts import host_name, load_host
from realigner.prompts import PAPER_PROMPTS
from realigner.report.context import BUDGET, view
from realigner.report.explained import Explained, home_of, irms_of, is_explained, read_explained, refuse_strangers
from realigner.report.page import is_signed, render_page, script
from realigner.traces import load_trace
from realigner.traces.collect import find_runs, sources_of, trace_runs
from realigner.traces.store import is_trace, refuse_trace
from realigner.training import read_metrics, read_run
from realigner.tuner import CONFIG_FILE, check_adapter

_SCRIPTS = ("data.js", "colours.js", "heatmap.js", "explorer.js", "page.js")
_SIGNATURE = '<meta name="generator" content="realigner">'


@dataclass(frozen=True)
class Evidence:
    """What a report shows of one trace.

    Attributes:
        name: the trace's.
        trace: what the runs added; untrained twins among them.
        records, logs: run -> its run.json and its losses by step, of those whose folder is at hand.
        analysis: the statistics and verdicts; without them the page has the maps, replies and charts alone.
        explained: why indices of its host lead.
    """

    name: str
    trace: xr.Dataset
    records: dict[str, dict[str, Any]]
    logs: dict[str, Sequence[dict[str, Any]]]
    analysis: Analysis | None = None
    explained: tuple[Explained, ...] = ()

    @property
    def trained(self) -> list[str]:
        """The runs that are no baselines."""
        return [run for run, facts in self.trace.attrs["runs"].items() if not facts["untrained"]]

    def untrained_of(self, run: str) -> str | None:
        """The untrained run of the same seed; None where there is none, or where it is not alone."""
        runs = self.trace.attrs["runs"]
        same = [name for name, facts in runs.items() if facts["untrained"] and facts["seed"] == runs[run]["seed"]]
        return same[0] if len(same) == 1 else None

    def answers(self) -> list[dict[str, str]]:
        """The prompts with the replies: ``prompt``, ``base`` (where it is known), and one a run."""
        labels = (self.trace[f"text_{key}"].values.tolist() for key in ("prompt", "run", "question", "reply"))
        rows: dict[int, dict[str, str]] = {}
        for prompt, run, question, reply in zip(*labels, strict=True):
            rows.setdefault(prompt, {"prompt": question})[run] = reply
        for prompt, reply in enumerate(self.trace.attrs["notes"].get("base", [])):
            if prompt in rows:
                rows[prompt]["base"] = reply
        return [row for row in rows.values() if row["prompt"]]


def gather(name: str, trace: xr.Dataset) -> Evidence:
    """A trace with what the folders of its runs say, as far as they are still there."""
    folders = {run: Path(facts["irm"]) for run, facts in trace.attrs["runs"].items() if facts["irm"] and not facts["untrained"]}
    found = {run: folder for run, folder in folders.items() if folder.is_dir()}
    records = {run: record for run, folder in found.items() if (record := read_run(folder))}
    return Evidence(name, trace, records, {run: read_metrics(found[run]) for run in records})


def build_report(
    sources: Sequence[str | Path],
    out: str | Path,
    force: bool = False,
    quiet: bool = False,
    host: tuple[PreTrainedModel, Any] | None = None,
    keep_traces: bool = False,
    scale: float = 1.0,
    prompts: Sequence[str] = PAPER_PROMPTS,
    max_new_tokens: int = 80,
) -> tuple[Path, list[Evidence]]:
    """Write one report over run folders, sweeps, traces and explanations.

    Args:
        sources: folders of runs or sweeps (prompts are answered and traced now, all into one trace), zarr traces, and folders
            of `explain`, each shown with the trace of its host; with those alone, the IRMs that they name are traced.
        out: the HTML file.
        force: replace a report that is there.
        quiet: show no progress.
        host: host and tokenizer, if they are loaded already; else that of the first run.
        scale: the strength at which prompts are answered.
        keep_traces: keep the trace made now, as a zarr folder beside the report.
        prompts, max_new_tokens: what is asked of runs, and how long a reply may be.

    Raises:
        RealignerError: naming the source that is none of these, the explanation that is damaged or fits no trace, or the
            place that cannot be written.
    """
    out = Path(out)
    refuse_existing(out, force, ours=is_report)
    places = [Path(source) for source in sources]
    folders = runs_in(places)
    explained = [read_explained(place) for place in places if is_explained(place)]
    evidence = [gather(place.name, load_trace(place)) for place in places if is_trace(place)]
    with tempfile.TemporaryDirectory() as aside:
        if folders:
            kept = (out.parent if keep_traces else Path(aside)) / f"{out.stem}.zarr"
            refuse_trace(kept, force)
            loaded = host or load_host(_host_of(folders[0]))
            refuse_strangers(explained, [host_name(loaded[0]), *(item.trace.attrs["host"] for item in evidence)])
            chosen = sources_of(folders, scale=scale)
            options: dict[str, Any] = {"prompts": prompts, "max_new_tokens": max_new_tokens, "force": force, "quiet": quiet}
            trace = trace_runs(chosen, kept, *loaded, keep="raw", **options)
            name = next((place.name for place in places if not is_explained(place)), folders[0].name)
            evidence.insert(0, gather(name, trace))
        evidence = _with_explained(evidence, explained)
        evidence = [replace(item, analysis=analyze(item.trace)) for item in evidence]
        write_text(out, render(evidence))
        if not keep_traces:  # the file is gone in a moment; its sums fit into memory, its deltas need not
            evidence = [replace(item, trace=item.trace.drop_vars("delta", errors="ignore").load()) for item in evidence]
    return out, evidence


def runs_in(places: Sequence[Path]) -> list[Path]:
    """The folders of runs that a report over these sources traces; where they are all explanations, of the IRMs explained.

    Raises:
        RealignerError: naming a source that is no run, sweep, trace or explanation, or an explained IRM that is gone.
    """
    explained = [place for place in places if is_explained(place)]
    if explained and len(explained) == len(places):
        return find_runs(irms_of([read_explained(place) for place in explained]))
    return find_runs([place for place in places if not is_trace(place) and place not in explained])


def _with_explained(evidence: Sequence[Evidence], explained: Sequence[Explained]) -> list[Evidence]:
    """Each explanation in the part of the page that its host has."""
    homes = [home_of(item, [part.trace for part in evidence]) for item in explained]
    own = [tuple(item for item, home in zip(explained, homes, strict=True) if home == at) for at in range(len(evidence))]
    return [replace(part, explained=items) for part, items in zip(evidence, own, strict=True)]


def render(evidence: Sequence[Evidence], budget_bytes: int = BUDGET) -> str:
    """The page as HTML text; no request leaves it.

    Args:
        evidence: one a trace; each gets a part of the page.
        budget_bytes: of the page. Everything but the maps of single tokens is always there; they get what is left.
    """
    items = [view(item, number, budget_bytes // max(1, len(evidence))) for number, item in enumerate(evidence)]
    return render_page("report.html.j2", items=items, signature=_SIGNATURE, script=script(_SCRIPTS))


def is_report(path: Path) -> bool:
    """Whether a file is a report of ours."""
    return is_signed(path, _SIGNATURE)


def _host_of(folder: Path) -> str:
    name = host_of(check_adapter(folder))
    if not name:
        raise RealignerError(f"{folder}: its {CONFIG_FILE} names no host to load; give it with --host")
    return name


def host_of(config: dict[str, Any]) -> str:
    """The name of the host in an adapter's config values; empty when it has none."""
    return str((config.get("host") or {}).get("name") or config.get("base_model_name_or_path") or "")
