"""What `realigner serve` gives to one client at a time, and to 16 at once.

    python benchmarks/serving_laptop.py [--host HOST] [--repeats 3] [--requests 16] [--tokens 64] [--json FILE]

A server of its own on 127.0.0.1 with two compact IRMs (randomly initialised; its numbers do not change the cost) on the
embedded host. --requests questions, greedy, --tokens tokens of a reply at most; tokens are the server's own count (`usage`).

bare       the host alone
one IRM    all requests with one IRM
mixed      bare, one IRM at two strengths, and a sum of two, request by request

serial: one request after the other. at once: all of them together, each on a connection of its own. Serial and at once
alternate; a ratio is the median over the repeats of tokens a second at once over serial. Replies must be the same both ways.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import torch
from peft import get_peft_model

import realigner as ra
from realigner.extras import versions
from realigner.files import write_text
from realigner.hosts import EMBEDDED
from realigner.irm_config import IRMConfig

HERE = Path(__file__).resolve().parent
GOAL = 3.0  # times serial, at 16 at once
MIXES = {
    "bare": [""],
    "one IRM": ["+one"],
    "mixed": ["", "+one", "+one@0.5", "+one@0.7+two@-0.5"],
}
SUBJECTS = ("the moon", "rain", "bread", "a bicycle", "winter", "salt", "a clock", "the sea")


def random_irms(host_name: str, place: Path) -> dict[str, Path]:
    """Two IRMs that were never trained, in folders."""
    host, _ = ra.load_host(host_name)
    folders = {}
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        model = get_peft_model(host, IRMConfig(preset="compact"))
        model.save_pretrained(str(place / name))
        model.unload()
        folders[name] = place / name
    return folders


def ask(client: openai.OpenAI, model: str, question: str, tokens: int) -> tuple[str, int]:
    """A reply and its tokens."""
    reply = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": question}], max_tokens=tokens, temperature=0
    )
    assert reply.usage is not None
    return reply.choices[0].message.content or "", reply.usage.completion_tokens


def measure(client: openai.OpenAI, host: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each setting."""
    questions = [f"What do you know about {SUBJECTS[n % len(SUBJECTS)]}? ({n})" for n in range(options.requests)]
    rows = []
    for setting, mixes in MIXES.items():
        models = [host + mixes[n % len(mixes)] for n in range(options.requests)]
        speeds: dict[str, list[float]] = {"serial": [], "at once": []}
        for _ in range(options.repeats):
            replies = {}
            for way, workers in (("serial", 1), ("at once", options.requests)):
                began = time.perf_counter()
                with ThreadPoolExecutor(workers) as pool:
                    said = list(
                        pool.map(lambda model, question: ask(client, model, question, options.tokens), models, questions)
                    )
                speeds[way].append(sum(count for _, count in said) / (time.perf_counter() - began))
                replies[way] = [text for text, _ in said]
            same = sum(a == b for a, b in zip(*replies.values(), strict=True))
        ratios = [b / a for a, b in zip(*speeds.values(), strict=True)]
        row: dict[str, Any] = {"setting": setting, **{way: statistics.median(values) for way, values in speeds.items()}}
        rows.append(row | {"ratio": statistics.median(ratios), "ratios": ratios, "same": same, "requests": options.requests})
    return rows


def main() -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", default=EMBEDDED, help="a folder or a hub id")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64, help="of a reply at most")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--json", type=Path, default=HERE / "results" / "serving_laptop.json", metavar="FILE")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as place:
        irms = random_irms(options.host, Path(place))
        named = [part for name, folder in irms.items() for part in ("--irm", f"{name}={folder}")]
        command = [sys.executable, "-m", "realigner", "serve", options.host, *named, "--port", "0", "--dtype", options.dtype]
        server = subprocess.Popen([*command, "--host-name", "host"], stdout=subprocess.PIPE, text=True)
        try:
            assert server.stdout is not None
            found = re.search(r" at (http\S+)", server.stdout.readline())
            if found is None:
                sys.exit("the server did not start")
            client = openai.OpenAI(base_url=found[1], api_key="none", max_retries=0, timeout=600)
            ask(client, "host+one", "Are you there?", 8)
            rows = measure(client, "host", options)
        finally:
            server.terminate()
            server.wait()
    print(f"{'setting':<10}{'serial':>12}{'at once':>12}{'ratio':>8}{'same replies':>14}   (tokens a second)")
    for row in rows:
        speeds = f"{row['serial']:>12.1f}{row['at once']:>12.1f}{row['ratio']:>8.2f}"
        print(f"{row['setting']:<10}{speeds}{row['same']:>9}/{row['requests']}")
    reached = all(row["ratio"] >= GOAL for row in rows)
    print(f"goal: {options.requests} at once give {GOAL:g} times serial or more: {'reached' if reached else 'not reached'}")
    machine = {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "system": platform.platform(), "load": load}
    result = {"rows": rows, "goal": GOAL, "reached": reached, "machine": machine, "versions": versions()}
    write_text(options.json, json.dumps(result, indent=2) + "\n")
    print(f"written to {options.json}")


if __name__ == "__main__":
    main()
