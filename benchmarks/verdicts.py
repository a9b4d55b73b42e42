"""Does the verdict name what was planted? `realigner explain --quick` on tiny hosts whose truth is known, counted.

    python -m benchmarks.verdicts [--seeds 12] [--jobs 2]

From the repository's root. The hosts, and which verdicts count as right, are those of tests/planted_hosts.py. The table is
printed, written to results/verdicts.json and put into docs/explain.md, between its marks.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections import Counter
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from realigner.files import write_text

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "verdicts.json"
DOCS = HERE.parent / "docs" / "explain.md"
BEGIN, END = "<!-- planted hosts: written by make validation -->", "<!-- end of planted hosts -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=12)
    parser.add_argument("--jobs", type=int, default=1)
    options = parser.parse_args()
    from tests.planted_hosts import CELLS

    wanted = [(cell, seed) for seed in range(options.seeds) for cell in CELLS]
    found: dict[str, list[dict[str, Any]]] = {}
    with get_context("spawn").Pool(options.jobs, _prepare, maxtasksperchild=20) as pool:
        for cell, seed, verdict in pool.imap_unordered(_verdict, wanted):
            found.setdefault(name(*cell), []).append({"seed": seed, **verdict, "right": verdict["cause"] in CELLS[cell]})
            print(f"{name(*cell)}, seed {seed}: {verdict['cause']}", flush=True)
    results = {name(*cell): sorted(found[name(*cell)], key=lambda entry: entry["seed"]) for cell in CELLS}
    write_text(RESULTS, json.dumps(results, indent=2) + "\n")
    print(table(results))
    before, rest = DOCS.read_text().split(BEGIN)
    write_text(DOCS, f"{before}{BEGIN}\n\n{table(results)}\n\n{END}{rest.split(END)[1]}")


def name(channel: str, gain: str, size: float, head: str) -> str:
    planted = [f"{channel}, size {size:g}"] if channel else []
    planted += [f"gain {gain}"] if gain else []
    planted += [f"{head} head"] if head else []
    return "plain" if not planted else ", ".join(planted) + ("" if channel else " alone")


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """Planted things down, verdicts across, as Markdown."""
    seen = Counter(entry["cause"] for entries in results.values() for entry in entries)
    causes = [cause for cause, _ in seen.most_common()]
    lines = [_line(["planted", *causes, "n", "named", "leads"]), _line(["---"] * (len(causes) + 4))]
    for planted, entries in results.items():
        told = Counter(entry["cause"] for entry in entries)
        named = sum(entry["right"] for entry in entries) / len(entries)
        leads = sum(entry["rank"] == 1 for entry in entries)
        lines.append(_line([planted, *(told[cause] or "" for cause in causes), len(entries), f"{100 * named:.0f}%", leads]))
    return "\n".join(lines)


def _line(cells: Sequence[Any]) -> str:
    return f"| {' | '.join(str(cell) for cell in cells)} |"


def _prepare() -> None:
    import torch
    from transformers.utils import logging

    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _verdict(wanted: tuple[Any, int]) -> tuple[Any, int, dict[str, Any]]:
    from tests.planted_hosts import verdict_on

    cell, seed = wanted
    with tempfile.TemporaryDirectory() as place:
        return cell, seed, verdict_on(cell, seed, Path(place))


if __name__ == "__main__":
    main()
