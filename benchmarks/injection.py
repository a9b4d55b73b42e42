"""Seconds per generated token: the bare host against the same host with an IRM.

    python benchmarks/injection.py [--tokens 64] [--repeats 5] [--out benchmarks/results/injection.json]

Greedy, cached, embedded host. The settings take turns within each repeat, so that a slow moment of the machine hits all of
them; the ratio is to the bare host of the same repeat.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model

import realigner as ra
from realigner.files import write_text
from realigner.generation import encode_prompts
from realigner.training import versions

PROMPT = "How do magnets work?"


def timed(model: Any, inputs: dict[str, torch.Tensor], tokens: int) -> float:
    """Seconds per token of one generation."""
    start = time.perf_counter()
    model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
    return (time.perf_counter() - start) / tokens


def measure(batch: int, tokens: int, repeats: int) -> list[dict[str, Any]]:
    """One row a setting: milliseconds per token, and the ratio to bare (median, min, max)."""
    host, tokenizer = ra.load_host()
    inputs = encode_prompts(tokenizer, [PROMPT] * batch, host.device)
    model = get_peft_model(host, ra.IRMConfig(preset="compact"), adapter_name="compact").eval()
    model.add_adapter("paper", ra.IRMConfig(preset="paper"))

    def with_irm(name: str) -> float:
        model.set_adapter(name, inference_mode=True)
        return timed(model, inputs, tokens)

    def bare() -> float:
        with model.disable_adapter():
            return timed(model, inputs, tokens)

    settings: dict[str, Callable[[], float]] = {
        "bare": bare,
        "compact": lambda: with_irm("compact"),
        "paper": lambda: with_irm("paper"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in settings}
    for repeat in range(repeats + 1):
        for name, run in settings.items():
            value = run()
            if repeat:  # the first round warms up
                seconds[name].append(value)
    rows = []
    for name, values in seconds.items():
        ratios = [a / b for a, b in zip(values, seconds["bare"], strict=True)]
        rows.append(
            {
                "batch": batch,
                "setting": name,
                "ms_per_token": round(1000 * statistics.median(values), 2),
                "ratio": round(statistics.median(ratios), 3),
                "ratio_min": round(min(ratios), 3),
                "ratio_max": round(max(ratios), 3),
            }
        )
    return rows


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/injection.json"))
    arguments = parser.parse_args()
    rows = [row for batch in (1, 8) for row in measure(batch, arguments.tokens, arguments.repeats)]
    print(f"{'batch':>5}  {'setting':<8}  {'ms/token':>8}  {'ratio to bare':>13}  {'min':>6}  {'max':>6}")
    for row in rows:
        numbers = f"{row['ms_per_token']:>8.2f}  {row['ratio']:>13.3f}  {row['ratio_min']:>6.3f}  {row['ratio_max']:>6.3f}"
        print(f"{row['batch']:>5}  {row['setting']:<8}  {numbers}")
    write_text(arguments.out, json.dumps({"versions": versions(), "rows": rows}, indent=2) + "\n")
    print(f"written to {arguments.out}")


if __name__ == "__main__":
    main()
