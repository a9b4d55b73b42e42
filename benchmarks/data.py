"""Seconds and peak memory of building and checking a tone dataset, beside the least that could be done with the same bytes.

    python benchmarks/data.py [--rows 60000] [--repeats 3]

Each step is a process of its own, imports included, one at a time, in turns. The baseline reads the finished rows as JSON and
counts the tokens of each question and reply with the host's tokenizer, and does nothing else: a check that is to say anything
about lengths cannot do less. A ratio is to the baseline of the same repeat.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from realigner.files import write_text
from realigner.hosts import EMBEDDED, embedded_folder

HERE = Path(__file__).resolve().parent
BASELINE = "baseline"
READ_AND_COUNT = """
import json, sys
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
rows = [json.loads(line) for line in open(sys.argv[2], encoding="utf-8")]
count = 0
for start in range(0, len(rows), 1000):
    for key in ("question", "text"):
        count += sum(map(len, tokenizer([row[key] for row in rows[start : start + 1000]])["input_ids"]))
print(count)
"""


def squad(path: Path, rows: int) -> Path:
    """A made-up SQuAD file: articles of 400 questions, no two alike."""
    words = ("river", "treaty", "engine", "council", "enzyme", "harbour", "theorem", "mountain", "reform", "satellite")
    articles = []
    for first in range(0, rows, 400):
        questions = [
            {
                "id": str(n),
                "question": f"Which {words[n % 10]} came after {words[n // 10 % 10]} number {n}?",
                "answers": [{"text": f"the {words[n // 100 % 10]} of {n}"}],
            }
            for n in range(first, min(rows, first + 400))
        ]
        articles.append({"title": f"Article {first // 400}", "paragraphs": [{"context": "", "qas": questions}]})
    path.write_text(json.dumps({"data": articles}))
    return path


def measured(command: list[str]) -> tuple[float, float]:
    """Seconds and peak memory (GiB) of one process."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    if status:
        said = process.stderr.read().decode() if process.stderr else ""
        raise SystemExit(f"{' '.join(command)} ended with status {status}: {said}")
    return seconds, usage.ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=60_000)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source, rows = squad(folder / "squad.json", options.rows), folder / "rows.jsonl"
        realigner = [sys.executable, "-m", "realigner", "data"]
        build = [*realigner, "build", "--squad", str(source), "--tone", "anger", "--out", str(rows), "--force"]
        steps = {
            "build, template": build,
            BASELINE: [sys.executable, "-c", READ_AND_COUNT, str(embedded_folder()), str(rows)],
            "check": [*realigner, "check", str(rows), "--host", EMBEDDED],
        }
        turns: dict[str, list[tuple[float, float]]] = {step: [] for step in steps}
        for _ in range(options.repeats):
            for step, command in steps.items():
                turns[step].append(measured(command))
    results = {}
    print(f"{options.rows:,} rows, {options.repeats} repeats, median (min to max); ratio to the baseline of the same repeat")
    for step, values in turns.items():
        seconds, memory = [s for s, _ in values], max(m for _, m in values)
        ratio = statistics.median(s / b for (s, _), (b, _) in zip(values, turns[BASELINE], strict=True))
        results[step] = {"seconds": seconds, "peak_gib": memory, "ratio": ratio}
        spread = f"{statistics.median(seconds):6.1f} s ({min(seconds):.1f} to {max(seconds):.1f})"
        print(f"{step:<16} {spread:<26} {memory:.2f} GiB   x{ratio:.2f}")
    write_text(HERE / "results" / "data.json", json.dumps({"rows": options.rows, "steps": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
