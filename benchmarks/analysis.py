"""Seconds and peak memory of analysing a trace of the paper's size, beside reading the same bytes and doing nothing with them.

    python benchmarks/analysis.py [--runs 24] [--prompts 7] [--tokens 100] [--layers 32] [--neurons 4096] [--repeats 1]

A synthetic trace with raw deltas in float16 (4.4 GB) is written into a temporary folder, as `realigner trace` writes one. Each
step is a process of its own, imports included, one at a time, in turns; peak memory is its VmHWM. The files are in the page
cache, so that reading costs what decoding costs and no disk is measured. A ratio is to reading, in the same repeat: for the
analysis of summaries reading all summaries, for the whole analysis reading all summaries and deltas.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from realigner.analysis import analyze
from realigner.files import write_text
from realigner.traces import RunLabel, TraceWriter, load_trace
from realigner.traces.layout import ALWAYS, Summary, text_dataset
from realigner.traces.summary import summarise

HERE = Path(__file__).resolve().parent
BASELINES = {"analyze, summaries": "read summaries", "analyze, raw deltas": "read all"}
STEPS = ("read summaries", "analyze, summaries", "read all", "analyze, raw deltas")
BLOCK = 16  # tokens
DISTINCT = 4  # texts of trained, and of untrained runs


def write_trace(path: Path, options: argparse.Namespace) -> None:
    """Tones x 2 seeds and two untrained runs; stripes in the trained ones. Texts repeat a few, which took long to summarise."""
    rng = np.random.default_rng(0)
    names = [("untrained", 42), ("untrained", 420)]
    names += [(f"tone{number // 2}", (42, 420)[number % 2]) for number in range(options.runs - 2)]
    position = np.arange(options.tokens)
    words = np.array([f"t{at}" for at in position], dtype=object)
    tokens = {"position": position, "is_generated": position >= 15, "token_id": position, "token_text": words}
    stripe = rng.gamma(2.0, size=options.neurons).astype(np.float32) * 0.2
    made: dict[bool, list[tuple[Summary, np.ndarray]]] = {}
    for trained in (False, True):
        made[trained] = []
        for _ in range(DISTINCT):
            delta = rng.standard_normal((options.tokens, options.layers, options.neurons), dtype=np.float32)
            delta *= 1 + stripe * trained
            half = delta.astype(np.float16)
            made[trained].append((summarise(half.astype(np.float32), tokens["is_generated"], 10_000), half))
    layers = range(options.layers)
    with TraceWriter(path, "synthetic", layers, "float16") as writer:
        for number, (tone, seed) in enumerate(names):
            label = RunLabel(f"{tone}-{seed}", tone, seed)
            for prompt in range(options.prompts):
                summary, delta = made[tone != "untrained"][(number + prompt) % DISTINCT]
                writer.append((text_dataset(label, prompt, "Why?", layers, tokens, summary, delta), label))


def step(name: str, path: Path) -> None:
    """One step, in a process of its own: prints its seconds without imports, and the process's peak memory in GiB."""
    started = time.perf_counter()
    trace = load_trace(path)
    if name.startswith("read"):
        for variable in ALWAYS:
            rows = BLOCK * 256 if "token" in trace[variable].dims else 1
            for at in range(0, len(trace[variable]), rows):
                trace[variable][at : at + rows].to_numpy()
        for at in range(0, trace.sizes["token"] if name == "read all" else 0, BLOCK):
            trace["delta"][at : at + BLOCK].to_numpy()
    else:
        analyze(trace.drop_vars("delta") if name == "analyze, summaries" else trace)
    seconds = time.perf_counter() - started
    status = Path("/proc/self/status").read_text()
    peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    print(json.dumps({"seconds": seconds, "peak_gib": peak / 2**20}))


def measured(name: str, path: Path) -> dict[str, float]:
    """What `step` says of itself."""
    command = [sys.executable, __file__, "--step", name, "--store", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for key, value in (("runs", 24), ("prompts", 7), ("tokens", 100), ("layers", 32), ("neurons", 4096), ("repeats", 1)):
        parser.add_argument(f"--{key}", type=int, default=value)
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    parser.add_argument(
        "--store", type=Path, help="a trace to analyse, in place of a new one; it is written if it is not there"
    )
    options = parser.parse_args()
    if options.step:
        step(options.step, options.store)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = options.store or Path(folder) / "trace.zarr"
        if not path.exists():
            write_trace(path, options)
        gigabytes = load_trace(path)["delta"].nbytes / 1e9
        turns: dict[str, list[dict[str, float]]] = {name: [] for name in STEPS}
        for _ in range(options.repeats):
            for name in STEPS:
                turns[name].append(measured(name, path))
    shape = [options.runs, options.prompts, options.tokens, options.layers, options.neurons]
    print(f"{' x '.join(map(str, shape))}: {gigabytes:.1f} GB of deltas; {options.repeats} repeats, median")
    results = {}
    for name, values in turns.items():
        seconds, peak = statistics.median(v["seconds"] for v in values), max(v["peak_gib"] for v in values)
        results[name] = {"seconds": [v["seconds"] for v in values], "peak_gib": peak}
        ratio = ""
        if name in BASELINES:
            pairs = zip(values, turns[BASELINES[name]], strict=True)
            results[name]["ratio"] = statistics.median(v["seconds"] / base["seconds"] for v, base in pairs)
            ratio = f"x{results[name]['ratio']:.2f} of {BASELINES[name]!r}"
        print(f"{name:<20} {seconds:7.1f} s   {peak:.2f} GiB   {ratio}")
    document = {"shape": shape, "gigabytes": gigabytes, "steps": results}
    write_text(HERE / "results" / "analysis.json", json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
