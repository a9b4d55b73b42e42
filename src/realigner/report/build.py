"""The report: one HTML page, everything inside it, of what a run does and what its IRM adds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xarray as xr
from transformers import PreTrainedModel, set_seed

from realigner.analysis import chosen_tokens, leading_indices, mean_map
from realigner.console import progress
from realigner.data import PAPER_PROMPTS
from realigner.errors import RealignerError
from realigner.files import refuse_existing, write_text
from realigner.generation import answer
from realigner.hosts import load_host
from realigner.report.figures import figure2, figure4
from realigner.report.page import is_signed, picture, render_page
from realigner.traces import load_trace, record, save_trace
from realigner.training import read_metrics, read_run
from realigner.training.curve import loss_curve
from realigner.tuner import CONFIG_FILE, IRMConfig, check_adapter, load_irm, strength

_MARKED = 5  # leading indices marked above a map
_SIGNATURE = '<meta name="generator" content="realigner">'


@dataclass(frozen=True)
class Evidence:
    """What a report shows of one run (or of one trace, where the rest is empty).

    Attributes:
        name: the run's or trace's name.
        record, log: run.json and the losses by step.
        answers: one dict a prompt: ``prompt``, ``base``, ``untrained``, ``realigned``.
        settings: how they were made: strength, seed, max_new_tokens, temperature.
        trace: what the trained IRM added; run names are tones.
        untrained: the same of the untrained IRM of the same seed.
    """

    name: str
    record: dict[str, Any]
    log: Sequence[dict[str, float]]
    answers: Sequence[dict[str, str]]
    settings: dict[str, Any]
    trace: xr.Dataset
    untrained: xr.Dataset | None = None


def collect(
    folder: str | Path,
    host: PreTrainedModel,
    tokenizer: Any,
    prompts: Sequence[str] = PAPER_PROMPTS,
    max_new_tokens: int = 80,
    scale: float = 1.0,
    seed: int = 42,
    quiet: bool = False,
) -> Evidence:
    """Answer the prompts bare, with the untrained and with the trained IRM of a run, recording what both IRMs add.

    The untrained IRM has the same shape and the same initial weights (the run's seed). Replies are greedy.

    Args:
        folder: a run's folder.
        host, tokenizer: the host it was made for; left as it was.
        prompts: the paper's seven by default.
        max_new_tokens: of each reply.
        scale: the strength of both IRMs.
        seed: noted with the replies (greedy ones do not depend on it).
        quiet: show no progress.
    """
    folder = Path(folder)
    run = read_run(folder)
    model = load_irm(host, folder)
    config = model.peft_config["default"]
    set_seed(int(run.get("seed", seed)))
    model.add_adapter("untrained", _untrained(config))
    replies: dict[str, list[str]] = {}
    traces: dict[str, xr.Dataset] = {}
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "seed": seed, "repetition_penalty": 1.1}
    try:
        with progress("answering", 3 * len(prompts), quiet) as task:
            with model.disable_adapter():
                replies["base"] = answer(model, tokenizer, prompts, **options, done=task.advance)
            for name, key in (("untrained", "untrained"), ("default", "realigned")):
                model.set_adapter(name, inference_mode=True)
                with strength(model, scale), record(model, tokenizer) as trace:
                    replies[key] = answer(model, tokenizer, prompts, **options, done=task.advance)
                traces[key] = trace
    finally:
        model.unload()
    tone = str(run.get("tone") or config.tone or folder.name)
    for key, name in (("realigned", tone), ("untrained", "untrained")):
        traces[key] = traces[key].assign_coords(run=[name]).assign_attrs(strength={name: scale})
    answers = [
        {"prompt": prompt, **{key: replies[key][i] for key in ("base", "untrained", "realigned")}}
        for i, prompt in enumerate(prompts)
    ]
    settings = {"strength": scale, "temperature": 0.0, **options}
    return Evidence(folder.name, run, read_metrics(folder), answers, settings, traces["realigned"], traces["untrained"])


def build_report(
    sources: Sequence[str | Path],
    out: str | Path,
    force: bool = False,
    quiet: bool = False,
    host: tuple[PreTrainedModel, Any] | None = None,
    keep_traces: bool = False,
    scale: float = 1.0,
) -> tuple[Path, list[Evidence]]:
    """Write one report over run folders and traces.

    Args:
        sources: run folders (prompts are answered and traced now) or zarr traces (shown as they are).
        out: the HTML file.
        force: replace a report that is there.
        quiet: show no progress.
        host: host and tokenizer, if they are loaded already; else each run's own is loaded.
        scale: the strength at which prompts are answered.
        keep_traces: also save the traces made now, as zarr folders beside the report.

    Raises:
        RealignerError: naming the source that is neither, or the place that cannot be written.
    """
    out = Path(out)
    refuse_existing(out, force, ours=is_report)
    evidence = []
    for source in map(Path, sources):
        if (source / "zarr.json").is_file():
            evidence.append(Evidence(source.name, {}, [], [], {}, load_trace(source)))
            continue
        if not (source / CONFIG_FILE).is_file():
            raise RealignerError(f"{source}: neither a run's folder nor a trace")
        loaded = host or load_host(_host_of(source))
        evidence.append(collect(source, *loaded, scale=scale, quiet=quiet))
    write_text(out, render(evidence))
    if keep_traces:
        for item in evidence:
            save_trace(item.trace, out.parent / f"{item.name}.zarr", force=True)
            if item.untrained is not None:
                save_trace(item.untrained, out.parent / f"{item.name}-untrained.zarr", force=True)
    return out, evidence


def render(evidence: Sequence[Evidence]) -> str:
    """The page as HTML text; no request leaves it."""
    return render_page("report.html.j2", runs=[_view(item) for item in evidence], signature=_SIGNATURE)


def is_report(path: Path) -> bool:
    """Whether a file is a report of ours."""
    return is_signed(path, _SIGNATURE)


def _view(item: Evidence) -> dict[str, Any]:
    """Figures and tables of one run, ready for the template."""
    counted = chosen_tokens(item.trace)
    signed, size = mean_map(item.trace), mean_map(item.trace, absolute=True)
    sections = []
    for run in item.trace["run"].values:
        magnitude = size.sel(run=run)
        leading = leading_indices(magnitude)
        marks = [int(n) for n in leading["neuron"][:_MARKED]]
        label = f"{run}, trained" if item.record else str(run)
        maps, tables = {label: magnitude}, {label: leading}
        if item.untrained is not None:
            maps["untrained"] = mean_map(item.untrained, absolute=True).isel(run=0)
            tables["untrained"] = leading_indices(maps["untrained"])
        sections.append(
            {
                "name": str(run),
                "figure2": picture(figure2(signed.sel(run=run), f"{run}: mean of the IRM's outputs", marks)),
                "figure4": picture(figure4(maps, {key: [int(n) for n in t["neuron"][:_MARKED]] for key, t in tables.items()})),
                "tables": {key: table.to_dict("records") for key, table in tables.items()},
            }
        )
    return {
        "name": item.name,
        "record": item.record,
        "answers": item.answers,
        "settings": item.settings,
        "loss": picture(loss_curve(item.log, item.record.get("kept_step"))) if item.log else None,
        "sections": sections,
        "tokens": int(item.trace.sizes["token"]),
        "counted": int(counted.sizes["token"]),
        "counted_prompt": int((~counted["is_generated"].astype(bool)).sum()),
        "trace_host": str(item.trace.attrs.get("host", "")),
        "trace_strength": dict(item.trace.attrs.get("strength", {})),
        "prompts": len(set(item.trace["prompt"].values.tolist())),
        "neurons": int(item.trace.sizes["neuron"]),
    }


def _untrained(config: IRMConfig) -> IRMConfig:
    return IRMConfig(
        preset=config.preset,
        layers=config.layers,
        widths=config.widths,
        rank=config.rank,
        output_std=config.output_std,
        input_norm=config.input_norm,
        layers_path=config.layers_path,
        inference_mode=True,
    )


def _host_of(folder: Path) -> str:
    name = host_of(check_adapter(folder))
    if not name:
        raise RealignerError(f"{folder}: its config names no host to load; give it with --host")
    return name


def host_of(config: dict[str, Any]) -> str:
    """The name of the host in an adapter's config values; empty when it has none."""
    return str((config.get("host") or {}).get("name") or config.get("base_model_name_or_path") or "")
