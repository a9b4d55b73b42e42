"""How good is an IRM of a shape, for its parameters and its seconds of training? Validation loss of presets and variants.

    python -m benchmarks.presets [--out runs/presets] [--jobs 2] [--only compact,lora] [--results docs/results]

Anger on the embedded host, on the rows that `benchmarks.evaluation` trains on (11 topics, 165 rows), 110 steps of 4 unless the
variant's name says otherwise. The validation loss is taken on the rows of 6 other topics (90 rows: those that evaluation tunes
and trains its scorers on; its test rows are not looked at). What is trained is kept in --out and not trained again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from os import getpid
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from matplotlib import pyplot as plt

import realigner as ra
from realigner.data import TONES, authored
from realigner.errors import RealignerError
from realigner.evaluation.constant_vectors import TrainedVectors
from realigner.evaluation.irm_methods import IRMMethod
from realigner.evaluation.method_protocol import RECORD_FILE, Method, refuse_other_fit
from realigner.evaluation.methods import find_method
from realigner.evaluation.peft_methods import LoRA
from realigner.evaluation.task import make_task
from realigner.files import made_folder, read_object, write_text
from realigner.hosts import EMBEDDED
from realigner.report.plot_style import STYLE, TONES as COLOURS, save_figure
from realigner.sweep.worker import die_with
from realigner.training import Recipe, make_recipe

TONE, STEPS = "anger", 110  # as in benchmarks/evaluation.py
SEEDS = (42, 43, 44)


@dataclass(frozen=True)
class Variant:
    """What is trained.

    Attributes:
        method: of `evaluation.methods`.
        keys: of the recipe.
        rate: learning rate; the method's own when None.
        seeds: of the training.
    """

    method: Method
    keys: Mapping[str, Any] = field(default_factory=dict)
    rate: float | None = None
    seeds: tuple[int, ...] = SEEDS[:1]

    @property
    def kind(self) -> str:
        return {IRMMethod: "IRM", LoRA: "LoRA", TrainedVectors: "constant vectors"}[type(self.method)]


COMPACT, LORA = find_method("irm-compact"), find_method("lora")
assert isinstance(COMPACT, IRMMethod)
assert isinstance(LORA, LoRA)
VARIANTS: dict[str, Variant] = {
    "compact": Variant(COMPACT, seeds=SEEDS),
    "compact, no dropout": Variant(COMPACT, {"dropout": 0.0}),
    "compact, dropout 0.3": Variant(COMPACT, {"dropout": 0.3}),
    "compact, dropout 0.8": Variant(COMPACT, {"dropout": 0.8}),
    "compact, one scale for all layers": Variant(COMPACT, {"delta_scale": 1.0}),
    "compact, rank 5, width 40": Variant(replace(COMPACT, widths=(40,), rank=5)),
    "compact, rank 10, width 80": Variant(replace(COMPACT, widths=(80,), rank=10)),
    "compact, rank 40, width 320": Variant(replace(COMPACT, widths=(320,), rank=40)),
    "compact, two hidden layers": Variant(replace(COMPACT, widths=(136, 136))),
    "compact, layers 0-14": Variant(COMPACT, {"layers": "0-14"}),
    "compact, layers 15-29": Variant(COMPACT, {"layers": "15-29"}),
    "compact, weight decay 0.3": Variant(COMPACT, {"weight_decay": 0.3}),
    "compact, 5e-3": Variant(COMPACT, rate=5e-3),
    "compact, 2e-2": Variant(COMPACT, rate=2e-2),
    "compact, cosine": Variant(COMPACT, {"schedule": "cosine"}),
    "compact, 55 steps": Variant(COMPACT, {"steps": 55}),
    "compact, 220 steps": Variant(COMPACT, {"steps": 220}),
    "compact, first edition": Variant(COMPACT, {"edition": 1}, seeds=SEEDS),
    "compact, first edition, dropout 0.6": Variant(COMPACT, {"edition": 1, "dropout": 0.6}),
    "paper": Variant(find_method("irm-paper"), rate=1e-4),
    "LoRA, rank 8": Variant(LORA, rate=2e-3, seeds=SEEDS),
    "LoRA, rank 2": Variant(replace(LORA, rank=2), rate=2e-3),
    "LoRA, rank 32": Variant(replace(LORA, rank=32), rate=2e-3),
    "LoRA, rank 8, 1e-3": Variant(LORA, rate=1e-3),
    "LoRA, rank 8, 5e-3": Variant(LORA, rate=5e-3),
    "LoRA, rank 8, 55 steps": Variant(LORA, {"steps": 55}, rate=2e-3),
    "LoRA, rank 8, 220 steps": Variant(LORA, {"steps": 220}, rate=2e-3),
    "constant vectors": Variant(find_method("constant"), rate=3e-2),
}


def place(out: Path, name: str, seed: int) -> Path:
    return out / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"


def fit(out: Path, name: str, seed: int) -> None:
    """Train one variant, in a process of its own."""
    torch.set_num_threads(1)
    task = make_task([row for tone in TONES for row in authored(tone)], TONE)
    task = replace(task, tune=[*task.tune, *(row for row in task.scorer if row.tone == TONE)])
    host, tokenizer = ra.load_host(EMBEDDED)
    variant = VARIANTS[name]
    variant.method.fit(host, tokenizer, task, recipe_of(variant, seed), variant.rate, place(out, name, seed))


def recipe_of(variant: Variant, seed: int) -> Recipe:
    return make_recipe(threads=1, seed=seed, **{"steps": STEPS, **variant.keys})


def rows(out: Path) -> Iterator[dict[str, Any]]:
    """Of the table: what has been trained."""
    for name, variant in VARIANTS.items():
        records = [place(out, name, seed) / RECORD_FILE for seed in variant.seeds]
        found = [read_object(path) for path in records if path.is_file()]
        if found:
            losses = [record["validation_loss"][-1] for record in found]
            yield {
                "name": name,
                "kind": variant.kind,
                "parameters": found[0]["parameters"],
                "seconds": found[0]["seconds"],
                "losses": losses,
                "loss": round(mean(losses), 4),
            }


def save_figure_of(found: list[dict[str, Any]], place: Path) -> None:
    """Loss against parameters and against seconds, the front drawn through what nothing is better than."""
    kinds = list(dict.fromkeys(row["kind"] for row in found))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 2, figsize=(11, 4.6), sharey=True, layout="constrained")
        for one, axis, label in zip(axes, ("parameters", "seconds"), ("parameters", "seconds of training"), strict=True):
            for kind, colour in zip(kinds, COLOURS, strict=False):
                own = [row for row in found if row["kind"] == kind]
                one.scatter([row[axis] for row in own], [row["loss"] for row in own], color=colour, label=kind, s=28)
            front = [
                row
                for row in found
                if not any(other["loss"] <= row["loss"] and other[axis] <= row[axis] and other is not row for other in found)
            ]
            front.sort(key=lambda row: row[axis])
            one.plot([row[axis] for row in front], [row["loss"] for row in front], color="#999999", lw=1, zorder=0)
            for row in front:
                one.annotate(row["name"], (row[axis], row["loss"]), xytext=(4, 5), textcoords="offset points", fontsize=7)
            one.set_xlabel(label)
        axes[0].set_xscale("log")
        axes[0].set_ylabel("validation loss (nats per token)")
        axes[0].legend()
        save_figure(figure, place)
        plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/presets"))
    parser.add_argument("--results", type=Path, default=Path("docs/results"))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", help="names that begin with one of these, separated by commas")
    options = parser.parse_args()
    begins = tuple(options.only.split(",")) if options.only else ("",)
    wanted = [(name, seed) for name, variant in VARIANTS.items() if name.startswith(begins) for seed in variant.seeds]
    missing = [(name, seed) for name, seed in wanted if not (place(options.out, name, seed) / RECORD_FILE).is_file()]
    for name, seed in set(wanted) - set(missing):
        variant = VARIANTS[name]
        try:
            refuse_other_fit(place(options.out, name, seed), variant.method, recipe_of(variant, seed), variant.rate)
        except RealignerError as error:
            sys.exit(f"presets: {error}")
    made_folder(options.out)
    faults = 0
    with ProcessPoolExecutor(options.jobs, get_context("spawn"), die_with, (getpid(),)) as pool:
        waiting = {pool.submit(fit, options.out, *one): one for one in missing}
        for count, future in enumerate(as_completed(waiting), start=1):
            name, seed = waiting[future]
            fault = future.exception()
            faults += fault is not None
            print(f"[{count}/{len(missing)}] {name} {seed}: {fault or 'done'}", file=sys.stderr, flush=True)
    found = list(rows(options.out))
    made_folder(options.results)
    write_text(options.results / "presets.json", json.dumps({"host": EMBEDDED, "tone": TONE, "rows": found}, indent=1) + "\n")
    save_figure_of(found, options.results / "presets.png")
    print("| | parameters | seconds | validation loss (seeds) |\n| --- | --- | --- | --- |")
    for row in sorted(found, key=lambda row: float(row["loss"])):
        each = "" if len(row["losses"]) == 1 else f" ({', '.join(f'{loss:.3f}' for loss in row['losses'])})"
        print(f"| {row['name']} | {row['parameters']:,} | {row['seconds']:.0f} | {row['loss']:.3f}{each} |")
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
