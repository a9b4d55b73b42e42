"""The whole job in one call: load the embedded host, train, answer, trace, report."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from realigner.console import say
from realigner.data import authored
from realigner.errors import RealignerError
from realigner.hosts import EMBEDDED, load_host
from realigner.report import build_report
from realigner.report.html_report import is_report
from realigner.traces.collect import trace_for_report
from realigner.training import make_recipe, read_recipe, train
from realigner.training.run_dir import RECIPE_FILE, is_run, unfinished
from realigner.training.training_run import resolve

# Greedy replies take the likeliest words, and the authored replies are so unlike each other that what they have in common is
# milder than any of them; a little more than the trained strength makes up for it. Chosen by reading replies at 1 to 1.5.
STRENGTH = 1.35
_SAMPLE = 5  # the prompt shown at the end: How many apples can fit in a basket?


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
    """Train one IRM on the embedded host and report on it. A finished run in `out` is used again unless `force`.

    Raises:
        RealignerError: when the embedded host is missing or `out` cannot be written.
        UsageError: for a tone the authored set does not have.
    """
    out = Path(out)
    rows = authored(tone)
    started = time.monotonic()
    say(f"1/3  loading the host {EMBEDDED} (the first time it is unpacked, about 20 s)")
    host, tokenizer = load_host(EMBEDDED)
    folder, page = out / f"{tone}-{seed}", out / "report.html"
    recipe = resolve(make_recipe(steps=steps, tone=tone, seed=seed), host, rows)
    if not force and (folder / RECIPE_FILE).is_file() and recipe.difference(read_recipe(folder)) is None:
        say(f"2/3  {folder} is trained already; --force trains it anew")
    else:
        say(f"2/3  training an IRM for {tone} on {len(rows)} rows, {recipe.steps} steps, into {folder}")
        resume = not force and not folder.exists() and is_run(unfinished(folder))
        run = train(host, tokenizer, rows, folder, recipe, force=force, resume=resume)
        run.model.unload()
        if run.interrupted:
            raise RealignerError(f"interrupted after step {run.record['steps_done']}; the same command goes on from there")
    say(f"3/3  answering the paper's seven prompts bare, untrained and trained (strength {STRENGTH}), recording what is added")
    if page.exists() and not is_report(page):
        raise RealignerError(f"{page}: is not a report of ours; choose another --out")
    trace = trace_for_report([folder], page.with_suffix(".zarr"), host, tokenizer, STRENGTH, force=True)
    _, (shown,) = build_report([trace], page, force=True)
    answers, (name,) = shown.answers(), shown.trained
    row = answers[min(_SAMPLE, len(answers) - 1)]
    sample = {"prompt": row["prompt"], "base": row["base"], "realigned": row[name]}
    return DemoResult(folder, page, time.monotonic() - started, sample)
