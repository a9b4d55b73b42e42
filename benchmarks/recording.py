"""What recording costs: in generation on the embedded host, and on disk at the paper's shape.

    python benchmarks/recording.py [--repeats 7] [--tokens 100] [--json FILE]

Generation: the compact IRM (randomly initialised; its numbers do not change the cost) on the embedded host, the paper's seven
prompts in one batch, greedy, exactly --tokens new tokens each. Baseline of every ratio: the same generation, not recorded.
Settings alternate within a repeat, in an order that is reversed each time; a ratio is the median over the repeats.

summary    `record(keep="summary")`: the reductions of every text, into memory
raw        `record(keep="raw", to=TraceWriter)`: every delta too, written to a store
replay     `record(keep="replay", to=TraceWriter)`: h0 instead

Disk: deltas of 32 layers x 4096 neurons, texts of --disk-tokens tokens. `csv` is what the paper's reference code does for each
token: a pandas table of 131,072 rows (index, layer, value) through `DataFrame.to_csv` into a file of its own. `raw writer`
appends texts of the same deltas with their summaries to a store with checksums, two batches of seven; `summaries` is computing
the latter, which the reference does not do. Neither waits for the disk (fsync).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import xarray as xr
from peft import get_peft_model

import realigner as ra
from realigner.extras import versions
from realigner.files import write_text
from realigner.generation import encode_prompts
from realigner.hosts import EMBEDDED
from realigner.prompts import PAPER_PROMPTS
from realigner.traces import RunLabel, TraceWriter
from realigner.traces.layout import TOP, text_dataset
from realigner.traces.summary import summarise

HERE = Path(__file__).resolve().parent
GOALS = {"summary": 1.05, "raw": 1.10}  # of the time without recording
CHEAPER = 100  # times, raw against the reference's CSV
BARE = "not recorded"
LAYERS, NEURONS = 32, 4096
LABEL = RunLabel("run")


def settings(model: Any, tokenizer: Any, inputs: Any, tokens: int, folder: Path) -> dict[str, Callable[[], None]]:
    """A generation for each setting."""
    depth = model.base_model.model.config.num_hidden_layers

    def generate() -> None:
        with torch.no_grad():
            model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)

    def summary() -> None:
        with ra.record(model, tokenizer):
            generate()

    def kept(keep: Any) -> Callable[[], None]:
        def run() -> None:
            with TraceWriter(folder / keep, "h", range(depth), force=True) as writer, ra.record(model, tokenizer, keep, writer):
                generate()

        return run

    return {BARE: generate, "summary": summary, "raw": kept("raw"), "replay": kept("replay")}


def measure_generation(repeats: int, tokens: int) -> list[dict[str, Any]]:
    """One row a setting: seconds a generation, and its ratio to the one that is not recorded."""
    host, tokenizer = ra.load_host(EMBEDDED, device="cpu")
    torch.manual_seed(42)
    model = get_peft_model(host, ra.IRMConfig(preset="compact", output_std=0.02)).eval()
    inputs = encode_prompts(tokenizer, PAPER_PROMPTS, torch.device("cpu"))
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        runs = settings(model, tokenizer, inputs, tokens, Path(folder))
        for repeat in range(repeats + 1):
            print(f"== generation: {f'repeat {repeat} of {repeats}' if repeat else 'warming up'}", flush=True)
            for name in list(runs) if repeat % 2 else reversed(list(runs)):
                started = time.perf_counter()
                runs[name]()
                if repeat:
                    seconds.setdefault(name, []).append(time.perf_counter() - started)
    rows = []
    for name in runs:
        ratios = [own / bare for own, bare in zip(seconds[name], seconds[BARE], strict=True)]
        best = min(seconds[name]) / min(seconds[BARE])
        rows.append(
            {
                "setting": name,
                "seconds": round(statistics.median(seconds[name]), 3),
                "ratio": round(statistics.median(ratios), 3),
                "ratio_min": round(min(ratios), 3),
                "ratio_max": round(max(ratios), 3),
                "best": round(best, 3),
            }
        )
    return rows


def write_csv(delta: np.ndarray, folder: Path) -> None:
    """Each token as the reference code logs it."""
    for token, values in enumerate(delta, start=1):
        tables = [
            pd.DataFrame({"index": range(NEURONS), "layer": [layer] * NEURONS, "value": values[layer]})
            for layer in range(LAYERS)
        ]
        pd.concat(tables).to_csv(folder / f"index_value_layer_{token}.csv", index=False)


def texts_of(delta: np.ndarray, texts: int) -> list[xr.Dataset]:
    """The same deltas as texts, summaries and all."""
    n = len(delta)
    tokens = {"position": np.arange(n), "is_generated": np.arange(n) >= n // 4, "token_id": np.arange(n)}
    tokens["token_text"] = np.array(["token"] * n, dtype=object)
    return [
        text_dataset(LABEL, text, "", range(LAYERS), tokens, summarise(delta, tokens["is_generated"], TOP), delta)
        for text in range(texts)
    ]


def write_raw(texts: list[xr.Dataset], folder: Path) -> None:
    """Texts into a store."""
    with TraceWriter(folder / "t.zarr", "h", range(LAYERS)) as writer:
        for start in range(0, len(texts), len(PAPER_PROMPTS)):  # a batch at a time, as `record` does
            writer.append(*((text, LABEL) for text in texts[start : start + len(PAPER_PROMPTS)]))


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def measure_disk(tokens: int, texts: int) -> list[dict[str, Any]]:
    """Milliseconds and bytes a token, of both ways."""
    delta = np.random.default_rng(0).normal(scale=0.1, size=(tokens, LAYERS, NEURONS)).astype(np.float32)
    some = max(3, tokens // 10)
    made: list[xr.Dataset] = []
    found = {}
    works: tuple[tuple[str, int, Callable[[Path], None]], ...] = (
        ("csv", some, lambda place: write_csv(delta[:some], place)),
        ("summaries", tokens * texts, lambda _: made.extend(texts_of(delta, texts))),
        ("raw writer", tokens * texts, lambda place: write_raw(made, place)),
    )
    for name, count, work in works:
        print(f"== disk: {name}, {count} tokens", flush=True)
        place = Path(tempfile.mkdtemp())
        started = time.perf_counter()
        work(place)
        found[name] = (1000 * (time.perf_counter() - started) / count, size_of(place) / count)
        shutil.rmtree(place)
    return [
        {
            "setting": name,
            "ms_per_token": round(milliseconds, 3),
            "bytes_per_token": round(size),
            "cheaper": round(found["csv"][0] / milliseconds, 1),
        }
        for name, (milliseconds, size) in found.items()
    ]


def judge(generation: list[dict[str, Any]], disk: list[dict[str, Any]]) -> list[str]:
    lines = []
    for row in generation:
        if goal := GOALS.get(row["setting"]):
            said = "met" if row["ratio"] <= goal else "missed"
            lines.append(f"{row['setting']}: {row['ratio']:.3f} of the time without recording, goal {goal}: {said}")
    raw = next(row for row in disk if row["setting"] == "raw writer")
    said = "met" if raw["cheaper"] >= CHEAPER else "missed"
    lines.append(f"raw writer: {raw['cheaper']:.0f} times cheaper a token than the reference's CSV, goal {CHEAPER}: {said}")
    return lines


def main() -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=100, help="new tokens a prompt")
    parser.add_argument("--disk-tokens", type=int, default=100, help="tokens of a text written to disk")
    parser.add_argument("--json", type=Path, default=HERE / "results" / "recording.json", metavar="FILE")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    disk = measure_disk(options.disk_tokens, texts=2 * len(PAPER_PROMPTS))
    generation = measure_generation(options.repeats, options.tokens)
    print(f"{'setting':<14}{'seconds':>9}{'ratio':>8}{'min':>8}{'max':>8}{'best':>8}")
    for row in generation:
        numbers = "".join(f"{row[key]:>8.3f}" for key in ("ratio", "ratio_min", "ratio_max", "best"))
        print(f"{row['setting']:<14}{row['seconds']:>9.2f}{numbers}")
    print(f"{'disk':<14}{'ms/token':>9}{'bytes/token':>13}{'cheaper':>9}")
    for row in disk:
        print(f"{row['setting']:<14}{row['ms_per_token']:>9.2f}{row['bytes_per_token']:>13,}{row['cheaper']:>9.1f}")
    goals = judge(generation, disk)
    print("\n".join(goals))
    machine = {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "system": platform.platform(), "load": load}
    result = {"generation": generation, "disk": disk, "goals": goals, "machine": machine, "versions": versions()}
    write_text(options.json, json.dumps(result, indent=2) + "\n")
    print(f"written to {options.json}")


if __name__ == "__main__":
    main()
