"""Does the default recipe train every host? Losses on tiny trained hosts, also with a scaled stream; the old recipe beside.

    python -m benchmarks.one_recipe [--hosts llama,gpt2] [--scaled llama] [--factors 0.01,100] [--steps 220] [--threads 1]

Thirteen hosts (twelve families, and one whose residual at the first site is a hundredth of that at the last) are trained on
authored replies (tests/trained_hosts.py); each gets an IRM for anger by the recipe ``default`` as it is, and as it was before
deltas were scaled (scales of 1, a learning rate of 1e-2). Some (--scaled, pre-norm ones) are also taken with their residual
stream multiplied by factors, which leaves what they compute as it was (tests/scaled_hosts.py). The validation loss, in nats per
token, is taken after every step.

start, end  Before and after.
highest     The highest on the way.
above       Steps that it was above its start without a break, at most.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from realigner.data import authored
from realigner.errors import RealignerError
from realigner.extras import versions
from realigner.files import write_text
from realigner.locate import find_sites
from realigner.residuals import delta_scale, residual_sizes
from tests.scaled_hosts import scaled_host
from tests.trained_hosts import DEEP, FAMILIES, longest_above, losses_by_step, trained_host

HERE = Path(__file__).resolve().parent
RECIPES: dict[str, dict[str, Any]] = {
    "new": {},
    "old": {"input_scale": 1.0, "delta_scale": 1.0, "learning_rate": 1e-2},
}


def course(host: Any, tokenizer: Any, steps: int, folder: Path, keys: dict[str, Any]) -> dict[str, Any]:
    """How the validation loss went."""
    try:
        losses = losses_by_step(host, tokenizer, authored("anger"), folder, steps=steps, **keys)
    except RealignerError as error:  # it diverged
        return {"error": str(error)}
    return {"start": losses[0], "end": losses[-1], "highest": max(losses), "above": longest_above(losses)}


def line(name: str, factor: float, recipe: str, row: dict[str, Any]) -> str:
    shown = f"{name:22} {factor:6g} {row['first']:9.3g} {row['last']:9.3g} {row['scale']:9.3g}  {recipe:4}"
    if "error" in row:
        return f"{shown} {row['error']}"
    return f"{shown} {row['start']:8.3f} {row['end']:8.3f} {row['highest']:8.3f} {row['above']:6}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", default=",".join(FAMILIES))
    parser.add_argument("--scaled", default="llama,gemma2")
    parser.add_argument("--factors", default="0.01,100")
    parser.add_argument("--steps", type=int, default=220)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    names = [*options.hosts.split(","), *([DEEP] if options.hosts == parser.get_default("hosts") else [])]
    print("host                   factor      first      last     scale  recipe  start      end  highest  above")
    rows: list[dict[str, Any]] = []
    for name in names:
        with tempfile.TemporaryDirectory() as place:
            host, tokenizer = trained_host(name, Path(place))
            factors = map(float, options.factors.split(",") if name in options.scaled.split(",") else ())
            for factor in (1.0, *factors):
                one = scaled_host(host, factor)
                sizes = residual_sizes(one, find_sites(one))
                known = {"host": name, "factor": factor, "first": sizes[0], "last": sizes[-1]}
                known["scale"] = delta_scale(sizes, range(len(sizes)))
                for recipe, keys in RECIPES.items():
                    found = course(one, tokenizer, options.steps, Path(place) / f"{factor} {recipe}", keys)
                    rows.append({**known, "recipe": recipe, **found})
                    print(line(name, factor, recipe, rows[-1]), flush=True)
    document = {"steps": options.steps, "versions": versions(), "rows": rows}
    write_text(HERE / "results" / "one_recipe.json", json.dumps(document, indent=2) + "\n")
    new = [row for row in rows if row["recipe"] == "new"]
    bad = [row for row in new if "error" in row or row["end"] >= row["start"] or row["above"] > 5]
    print(f"{len(new) - len(bad)} of {len(new)} runs of the recipe end below their start and are never above it for long")
    if bad:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
