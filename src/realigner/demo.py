"""The whole job in one call: load the embedded host, answer with a ready-made IRM, train one, trace, report."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from realigner.console import say
from realigner.data import authored
from realigner.errors import RealignerError
from realigner.files import Output, claimed, discard, locked, unfinished
from realigner.generation import answer
from realigner.hosts import EMBEDDED, load_host
from realigner.irm_config import check_adapter
from realigner.irm_sources import find_irm
from realigner.report import build_report
from realigner.report.html_report import REPORT
from realigner.report.report_input import read_inputs
from realigner.traces.collect import trace_for_report
from realigner.traces.store import TRACE, is_trace, load_trace, refuse_trace
from realigner.training import make_recipe, read_recipe, train
from realigner.training.run_dir import RECIPE_FILE, is_run, refuse_run
from realigner.training.training_run import resolve
from realigner.tuner import load_irm

_SAMPLE = 0  # the prompt shown at the end: the one whose reply is shown while it learns
_FIRST = "Why do I have to wait so long?"  # that the ready-made IRM is asked
_FIRST_TOKENS = 40
_SAMPLE_TOKENS = 24  # of the replies while it learns, of which a line is shown
STEPS = 90  # of training: less than a pass over the rows, and enough to hear


@dataclass(frozen=True)
class DemoResult:
    """Where everything is, the seconds it took, and one prompt's replies."""

    run: Path
    report: Path
    seconds: float
    sample: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        return {key: str(value) if isinstance(value, Path) else value for key, value in asdict(self).items()}


def run_demo(
    out: str | Path = "demo", tone: str = "anger", seed: int = 42, steps: int | None = None, force: bool = False
) -> DemoResult:
    """Answer with a ready-made IRM, train one like it, report on it. What is finished in `out` is used again unless `force`.

    Args:
        out: folder for the run, its trace and the report.
        tone: of the authored set, which has a ready-made IRM too.
        seed: of the training.
        steps: of training; `STEPS` when None.
        force: train, trace and report anew.

    Raises:
        RealignerError: when the embedded host is missing, `out` cannot be written, holds something else, or another process
            works there.
        UsageError: for a tone the authored set does not have.
    """
    out = Path(out)
    rows = authored(tone)
    started = time.monotonic()
    folder, page = out / f"{tone}-{seed}", out / "report.html"
    with claimed(locked(page)):
        resume = not force and is_run(unfinished(folder))
        if force or not is_run(folder):  # before the host is loaded
            _refuse(folder, page, force, resume)
        say(f"1/4  loading the host {EMBEDDED} (the first time it is unpacked, about 20 s)")
        host, tokenizer = load_host(EMBEDDED)
        say(f"2/4  asking it with the ready-made IRM for {tone}:")
        _say_replies(tone, host, tokenizer)
        say(f"     ({time.monotonic() - started:.0f} s after the start)")
        recipe = make_recipe(steps=STEPS if steps is None else steps, samples=_SAMPLE_TOKENS, tone=tone, seed=seed)
        recipe = resolve(recipe, host, tokenizer, rows)
        if not force and is_run(folder) and recipe.difference(read_recipe(folder / RECIPE_FILE)) is None:
            say(f"3/4  {folder} is trained already; --force trains it anew")
        else:
            _refuse(folder, page, force, resume)
            say(f"3/4  training an IRM for {tone} on {len(rows)} rows, {recipe.steps} steps, into {folder}")
            run = train(host, tokenizer, rows, folder, recipe, force=force, resume=resume)
            run.model.unload()
            if run.interrupted:
                raise RealignerError(f"interrupted after step {run.record['steps_done']}; the same command goes on from there")
        say("4/4  answering the paper's seven prompts bare, untrained and trained, recording what is added")
        (shown,) = read_inputs([_traced(folder, page.with_suffix(".zarr"), host, tokenizer, force)])
        if force or not page.exists():
            build_report([page.with_suffix(".zarr")], page, force)
    answers, (name,) = shown.answers(), shown.trained
    row = answers[min(_SAMPLE, len(answers) - 1)]
    sample = {"prompt": row["prompt"], "base": row["base"], "realigned": row[name]}
    return DemoResult(folder, page, time.monotonic() - started, sample)


def _say_replies(tone: str, host: Any, tokenizer: Any) -> None:
    """One question's replies, bare and with the ready-made IRM at its own strength."""
    folder = find_irm(tone)
    model, own = load_irm(host, folder), float(check_adapter(folder).get("strength", 1.0))
    try:
        say(f"     Q: {_FIRST}")
        for label, strength in (("base:     ", 0.0), ("realigned:", own)):
            (reply,) = answer(model, tokenizer, [_FIRST], _FIRST_TOKENS, strength=strength)
            say(f"     {label} {' '.join(reply.split())}")
    finally:
        model.unload()


def _refuse(folder: Path, page: Path, force: bool, resume: bool) -> None:
    """Raise unless the run, the trace and the page can all be written."""
    refuse_run(folder, force, resume)
    refuse_trace(page.with_suffix(".zarr"), force)
    Output(page, REPORT, force).refuse()


def _traced(folder: Path, trace: Path, host: Any, tokenizer: Any, force: bool) -> Path:
    """The trace of a run: what is there already, or a new one. One that is interrupted leaves nothing."""
    if not force and is_trace(trace):
        irms = {str(facts["irm"]) for facts in load_trace(trace).attrs["runs"].values()}
        if irms != {str(folder)}:
            raise RealignerError(f"{trace}: is not a trace of {folder}; move it, or replace it (force)")
        return trace
    refuse_trace(trace, force)
    try:
        return trace_for_report([folder], trace, host, tokenizer, force=force)
    except BaseException:
        discard(unfinished(trace), TRACE)
        raise
