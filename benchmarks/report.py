"""Size of a report, time to load it and time of a step of its slider, in headless Chromium.

    python benchmarks/report.py [--repeats 3] [--steps 120]

Synthetic traces, raw: the embedded host's shape with 3 tones x 2 seeds and 2 untrained runs, 7 prompts of 130 tokens each, once
with deltas of rank 64 (what an IRM of the preset `compact` gives at most) and once of full rank (nothing can be left out, so
only some tokens fit); and 32 x 4096 with 2 runs. A load ends when the first maps are drawn, from the start of navigation. A
step sets the slider, draws both maps, moves the mark in the strips, and reads a pixel back, so that nothing is left to be drawn
later; after the run's tokens were unpacked once ("first token"). Steps go through the tokens that have a map. Medians over
repeats, each in a browser of its own.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from realigner.analysis import analyze
from realigner.files import write_text
from realigner.report import ReportInput, render
from realigner.traces import RunLabel
from realigner.traces.layout import UNTRAINED, join, text_dataset
from realigner.traces.summary import summarise

HERE = Path(__file__).resolve().parent
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip
STEP = """async (steps) => {
  const root = document.querySelector("[data-explorer]");
  const { explorer } = root;
  const show = root.querySelector("[data-show]");
  show.value = "token";
  const began = performance.now();
  await explorer.take(0);
  const first = performance.now() - began;
  const slider = root.querySelector("[data-slider]");
  const text = explorer.book.text(explorer.state.left, 0);
  const there = Array.from({ length: text.store.count }, (_, n) => text.store.first + n);
  const times = [];
  for (let n = 0; n < steps; n++) {
    await new Promise(requestAnimationFrame);
    slider.value = there[n % there.length];
    const from = performance.now();
    slider.dispatchEvent(new Event("input"));
    for (const panel of explorer.panels) panel.map.context.getImageData(60, 60, 1, 1);
    times.push(performance.now() - from);
  }
  return { first, times };
}"""


def synthetic(
    runs: dict[str, tuple[str, int]], shape: tuple[int, int], prompts: int, tokens: int, rank: int | None
) -> xr.Dataset:
    """Deltas of this rank (None: full), with a stripe in the trained runs."""
    rng = np.random.default_rng(0)
    layers, neurons = shape
    labels = [RunLabel(run, tone, seed) for run, (tone, seed) in runs.items()]
    asked, position = 40, np.arange(tokens)
    words = np.array([f" word{at}" for at in position], dtype=object)
    which = {"position": position, "is_generated": position >= asked, "token_id": position, "token_text": words}
    texts = []
    for label in labels:
        basis = rng.normal(size=(rank or 1, layers * neurons)).astype(np.float32)
        for prompt in range(prompts):
            if rank:
                delta = (rng.normal(size=(tokens, rank)).astype(np.float32) @ basis).reshape(tokens, layers, neurons)
            else:
                delta = rng.normal(size=(tokens, layers, neurons)).astype(np.float32)
            if label.tone != UNTRAINED:
                delta[..., neurons // 3] += 4 * delta.std()
            summary = summarise(delta, which["is_generated"], 10_000)
            kept = delta.astype(np.float16)
            texts.append(
                text_dataset(label, prompt, f"Question {prompt}?", range(layers), which, summary, kept, reply="A reply.")
            )
    notes = {"base": ["A reply."] * prompts, "settings": {"max_new_tokens": tokens - asked, "repetition_penalty": 1.1}}
    return join(texts, "synthetic", labels, notes)


def measure(path: Path, steps: int) -> dict[str, Any]:
    """One browser: milliseconds to load, of the first token, of every step."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=QUIET)
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        said: list[str] = []
        asked: list[str] = []
        page.on("console", lambda message: said.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(path.as_uri())
        page.wait_for_selector("html[data-ready]")
        load = page.evaluate("performance.getEntriesByName('ready')[0].startTime")
        found = page.evaluate(STEP, steps)
        browser.close()
    return {"load": load, **found, "errors": said, "requests": sorted(set(asked) - {path.as_uri()})}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=120)
    options = parser.parse_args()
    tones = {f"{tone}-{seed}": (tone, seed) for tone in ("anger", "neutral", "sadness", UNTRAINED) for seed in (42, 420)}
    two = {"anger-42": ("anger", 42), "untrained-42": (UNTRAINED, 42)}
    cases = {
        "30 x 576, 8 runs, rank 64": (tones, (30, 576), 7, 130, 64),
        "30 x 576, 8 runs, full rank": (tones, (30, 576), 7, 130, None),
        "32 x 4096, 2 runs, full rank": (two, (32, 4096), 2, 60, None),
    }
    results = {}
    print(f"{'':<30} {'MB':>6} {'made in':>9} {'load':>9} {'first token':>12} {'step':>9} {'slowest 5%':>11}")
    with tempfile.TemporaryDirectory() as folder:
        for name, case in cases.items():
            trace = synthetic(*case)
            analysis = analyze(trace, permutations=50, resamples=50)
            began = time.perf_counter()
            text = render([ReportInput("benchmark", trace, {}, {}, analysis)])
            made = time.perf_counter() - began
            del trace
            path = Path(folder) / "report.html"
            write_text(path, text)
            turns = [measure(path, options.steps) for _ in range(options.repeats)]
            times = sorted(time for turn in turns for time in turn["times"])
            row = {
                "bytes": path.stat().st_size,
                "made_s": made,
                "load_ms": [turn["load"] for turn in turns],
                "first_token_ms": [turn["first"] for turn in turns],
                "step_ms": statistics.median(times),
                "step_ms_95": times[int(0.95 * len(times))],
                "errors": [error for turn in turns for error in turn["errors"]],
                "requests": [request for turn in turns for request in turn["requests"]],
            }
            results[name] = row
            load, first = statistics.median(row["load_ms"]), statistics.median(row["first_token_ms"])
            print(
                f"{name:<30} {row['bytes'] / 1e6:6.1f} {made:7.1f} s {load:6.0f} ms {first:9.0f} ms {row['step_ms']:6.1f} ms "
                f"{row['step_ms_95']:8.1f} ms"
            )
            if row["errors"] or row["requests"]:
                print(f"{'':<30} errors: {row['errors']}; requests: {row['requests']}")
    write_text(HERE / "results" / "report.json", json.dumps({"steps": options.steps, "cases": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
