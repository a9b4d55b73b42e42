"""Does the verdict name what was planted? `realigner explain --quick` on tiny hosts whose truth is known, counted.

    python -m benchmarks.verdicts [--seeds 12] [--first 300 400] [--jobs 2] [--again]

From the repository's root. The hosts, and which verdicts count as right, are those of tests/planted_hosts.py. The rules were
made while looking at seeds below 400 (docs/explain.md tells how); those from 400 on are fresh. The tables are
printed, and those in which every kind of host has 12 seeds put into docs/explain.md between its marks; every verdict is in
docs/results/verdicts.json with what it rests on, to which each call adds what is not there yet (--seeds 0: nothing); causes are
found by the rules as they are now. --again: everything anew, when trainings have changed.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import warnings
from collections import Counter
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from realigner.files import write_text
from tests.planted_hosts import CELLS, cause_of, name_of

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "docs" / "results" / "verdicts.json"
DOCS = HERE.parent / "docs" / "explain.md"
SEEDS = 12
RIGHT = {name_of(cell): right for cell, right in CELLS.items()}
CAUSES = ("channel through the norm", "channel", "idle channel", "gain", "head", "none", "chance", "cannot tell")  # in tables
FIRST = {300: "looked at when the current rules were made", 400: "fresh"}
BEGIN, END = "<!-- planted hosts: written by make validation -->", "<!-- end of planted hosts -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--first", type=int, nargs="+", choices=tuple(FIRST), default=tuple(FIRST))
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--again", action="store_true")
    options = parser.parse_args()

    found: dict[str, dict[int, dict[str, Any]]] = {}
    if RESULTS.is_file() and not options.again:
        for planted, entries in json.loads(RESULTS.read_text()).items():
            found[planted] = {own["seed"]: own | {"cause": cause_of(own)} for own in entries}
    wanted = [(cell, first + seed) for first in options.first for seed in range(options.seeds) for cell in CELLS]
    wanted = [(cell, seed) for cell, seed in wanted if seed not in found.get(name_of(cell), {})]
    with get_context("spawn").Pool(options.jobs, _prepare, maxtasksperchild=20) as pool:
        for cell, seed, verdict in pool.imap_unordered(_verdict, wanted):
            found.setdefault(name_of(cell), {})[seed] = {"seed": seed, **verdict}
            print(f"{name_of(cell)}, seed {seed}: {verdict['cause']}", flush=True)
            write_text(RESULTS, _lines(ordered(found)))  # what was found outlives an interruption
    results = ordered(found)
    write_text(RESULTS, _lines(results))
    whole = []
    for first, what in FIRST.items():
        own = {
            planted: [entry for entry in entries if first <= entry["seed"] < first + 100]
            for planted, entries in results.items()
        }
        if own := {planted: entries for planted, entries in own.items() if entries}:
            part = f"Seeds from {first} on, {what}:\n\n{table(own)}"
            print(f"{part}\n")
            if len(own) == len(CELLS) and all(len(entries) >= SEEDS for entries in own.values()):
                whole.append(part)
    before, rest = DOCS.read_text().split(BEGIN)
    write_text(DOCS, "\n\n".join([before + BEGIN, *whole, END + rest.split(END)[1]]))


def ordered(found: dict[str, dict[int, dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """The verdicts by what was planted, in the order of `CELLS`, by seed."""
    known = [name_of(cell) for cell in CELLS if name_of(cell) in found]
    return {planted: [found[planted][seed] for seed in sorted(found[planted])] for planted in known}


def _lines(results: dict[str, list[dict[str, Any]]]) -> str:
    """The record as JSON, a host on a line."""
    kinds = [f"{json.dumps(name)}: [\n" + ",\n".join(map(json.dumps, entries)) + "\n]" for name, entries in results.items()]
    return "{\n" + ",\n".join(kinds) + "\n}\n"


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """Planted things down, verdicts across, as Markdown."""
    seen = {entry["cause"] for entries in results.values() for entry in entries}
    causes = [cause for cause in CAUSES if cause in seen]
    lines = [_line(["planted", *causes, "n", "correct", "leads"]), _line(["---"] * (len(causes) + 4))]
    for planted, entries in results.items():
        told = Counter(entry["cause"] for entry in entries)
        correct = sum(entry["cause"] in RIGHT[planted] for entry in entries) / len(entries)
        leads = sum(entry["rank"] == 1 for entry in entries)
        lines.append(_line([planted, *(told[cause] or "" for cause in causes), len(entries), f"{100 * correct:.0f}%", leads]))
    return "\n".join(lines)


def _line(cells: Sequence[Any]) -> str:
    return f"| {' | '.join(str(cell) for cell in cells)} |"


def _prepare() -> None:
    import torch
    from transformers.utils import logging

    os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.simplefilter("ignore", FutureWarning)  # of libraries, of one another
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
