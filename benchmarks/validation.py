"""Are the statistics right? P-values on null data, power on planted effects, how often intervals hold the truth.

    python -m benchmarks.validation [--traces 4000] [--sets 400] [--jobs 1] [--only null power coverage]

From the repository's root. What comes out (tests/validation.py says of what) is printed, written to results/validation.json
and put into docs/statistics.md, between its marks.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from realigner.files import write_text
from tests.validation import NULLS, PLANTED, Planted, coverage, judged, put_into, simulate, tables, turns_coverage

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "validation.json"
DOCS = HERE.parent / "docs" / "statistics.md"
WORLDS = [(5, 1.0), (7, 1.0), (7, 4.0), (20, 1.0), (20, 4.0)]  # prompts and noise of the intervals
TALKS = [(5, 0.0), (5, 0.3), (7, 0.3), (20, 0.3)]  # prompts, and how much is planted, of the intervals over turns


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=int, default=4000)
    parser.add_argument("--sets", type=int, default=400)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=("null", "power", "coverage"), default=("null", "power", "coverage"))
    options = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    if "null" in options.only:
        results["null"] = {}
        for number, (name, make) in enumerate(NULLS.items()):
            found = simulate(make, options.traces, 100 + number, options.jobs)
            results["null"] |= {key: judged(p) for key, p in found.items()}
            print(f"null data: {name}", flush=True)
    if "power" in options.only:
        results["power"] = {}
        for name, (_, sizes) in PLANTED.items():
            results["power"][name] = []
            for size in sizes:
                found = simulate(Planted(name, size), options.sets, 1000, options.jobs)
                power = {key: float((p <= 0.05).mean()) for key, p in found.items()}
                results["power"][name].append({"size": size, "sets": options.sets, "power": power})
            print(f"planted: {name}", flush=True)
    if "coverage" in options.only:
        results["coverage"] = [coverage(prompts, noise, options.sets, 7) for prompts, noise in WORLDS]
        results["turns_coverage"] = [turns_coverage(prompts, size, options.sets, 8) for prompts, size in TALKS]
    write_text(RESULTS, json.dumps(results, indent=2) + "\n")
    print(tables(results))
    write_text(DOCS, put_into(DOCS.read_text(), results))


if __name__ == "__main__":
    main()
