"""Does an IRM work, and against what? Three tones on the embedded host, every method of `realigner.evaluation`, 105 questions.

    python benchmarks/evaluation.py [--jobs 2] [--quick] [--methods NAMES] [--out docs/results/evaluation]

Authored rows, 24 topics: 11 to learn from, 2 to tune on, 4 to train the scorers on, 7 to test on (`evaluation.task`). In this
order, each step kept in --out and not done again:

1. rates     in anger, every method that is trained, at three learning rates, and at a fourth where the best is at an end of
             these; the best validation loss on the tuning rows counts for all tones.
2. methods   in each tone; three seeds of those in `SEEDED`, of which the second and third are asked the test questions alone.
             Methods that can be scaled once at their own size and once at that of LoRA of rank 8.
3. derived   from the compact IRM: the mean of its deltas as constant vectors, and random ones of the same norm.
4. strength  of the compact IRM: chosen on the tuning questions, tested on the others; and the curve over -1 to 2.

A unit of work is a process's; --jobs of them run at a time, each on one thread. Interrupt it and start it again as you like.
What was said (measured.json) and found (method.json) is kept in git, weights are not: what was measured is not fitted again.
--quick: one tone, 24 questions, 40 steps, one seed, a few methods (a quarter of an hour).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import bfloat16
import numpy as np
import torch

import realigner as ra
from realigner.data import TONES, authored
from realigner.evaluation.measured import Effort, Measured
from realigner.evaluation.method_protocol import RECORD_FILE, Method
from realigner.evaluation.methods import METHODS, find_method
from realigner.evaluation.results import table, tone_results
from realigner.evaluation.strength_choice import STRENGTHS, choose_strength
from realigner.evaluation.task import make_task
from realigner.evaluation.tone_evaluation import Subject, ToneEvaluation
from realigner.files import read_object, write_text
from realigner.hosts import EMBEDDED, has_slow_bfloat16
from realigner.report.evaluation_figures import save_evaluation_figures
from realigner.sweep.worker import die_with
from realigner.training import make_recipe

SIZE = 460_800  # parameters of LoRA of rank 8 on the queries and values of the embedded host
DTYPE = "bfloat16"  # of the host, on every machine (see `bfloat16`): what was measured in another is refused
SEEDS = (42, 43, 44)
SEEDED = ("irm-compact", "irm-paper", "lora", "shadow", "constant")
DERIVED = ("mean-delta", "random")
PROMPTS = ("prompt", "few-shot")  # without weights
SCALED = ("psr", "reft", "shadow")  # that are tried at LoRA's size too
CURVE = (-1.0, -0.5, 0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
RATES_IN = "anger"
STEPS = 110  # of training, of 4 rows; with twice as many LoRA learns its rows by heart and does worse (docs/presets.md)
QUICK = ("bare", "prompt", "constant", "lora", "irm-compact", "mean-delta", "random")


@dataclass(frozen=True)
class Plan:
    """What is done, of everything."""

    out: Path
    quick: bool
    only: Sequence[str] = ()  # methods to work on; all when empty

    @property
    def tones(self) -> Sequence[str]:
        return TONES[:1] if self.quick else TONES

    @property
    def methods(self) -> list[Method]:
        names = QUICK if self.quick else [method.name for method in METHODS]
        return [find_method(name) for name in names if not self.only or name in self.only]

    @property
    def seeds(self) -> Sequence[int]:
        return SEEDS[:1] if self.quick else SEEDS

    def units(self) -> Iterator[Unit]:
        """Those of step 2: one for each seed, method, tone and size."""
        for seed in self.seeds:
            for method in self.methods:
                if method.name in ("bare", *DERIVED) or (seed != SEEDS[0] and method.name not in SEEDED):
                    continue
                for tone in self.tones:
                    yield Unit(tone, method.name, seed)
                    if method.name in SCALED and not self.quick:
                        yield Unit(tone, method.name, seed, sized=True)


@dataclass(frozen=True)
class Unit:
    """One fit and its questions.

    Attributes:
        sized: at LoRA's number of parameters, not at the method's own size.
        rate: of the search for one, or None for that which was found.
    """

    tone: str
    method: str
    seed: int
    sized: bool = False
    rate: float | None = None

    @property
    def name(self) -> str:
        return f"{self.method}@{SIZE}" if self.sized else self.method

    @property
    def label(self) -> str:
        return f"{self.tone} {self.name} {self.seed}" + ("" if self.rate is None else f" at {self.rate:g}")


# In a process of its own.


@cache
def _host() -> tuple[Any, Any]:
    torch.set_num_threads(1)
    host, tokenizer = ra.load_host(EMBEDDED, dtype=DTYPE)
    if has_slow_bfloat16(torch.device("cpu")):
        bfloat16.multiply_in_float32()
        bfloat16.keep_in_float32(host)
    return host, tokenizer


@cache
def _evaluation(plan: Plan, tone: str) -> ToneEvaluation:
    host, tokenizer = _host()
    task = make_task([row for name in TONES for row in authored(name)], tone)
    recipe = make_recipe(threads=1, steps=40 if plan.quick else STEPS)
    if plan.quick:
        task = replace(task, test=task.test[::4][:24], tune=task.tune[::3])
    effort = Effort(dialogues=2, dropped=6, passages=6, answers=8) if plan.quick else Effort()
    return ToneEvaluation(host, tokenizer, task, plan.out / tone, recipe, effort)


def _method(unit: Unit) -> Method:
    method = find_method(unit.method)
    if not unit.sized:
        return method
    scaled = method.sized(_host()[0].config, SIZE)
    assert scaled is not None  # those in SCALED are
    return scaled


def _place(plan: Plan, unit: Unit) -> Path:
    return plan.out / unit.tone / f"{unit.name}-{unit.seed}"


def _fitted(plan: Plan, unit: Unit) -> Path:
    """The folder of a unit's fit, made now if need be; with its weights, which are fitted anew where only its record is."""
    evaluation, method, place, rate = _evaluation(plan, unit.tone), _method(unit), _place(plan, unit), best_rate(plan, unit)
    searched = plan.out / RATES_IN / "rates" / f"{unit.name}-{rate}-{unit.seed}"
    if unit.tone == RATES_IN and rate is not None and not place.exists() and _has_weights(searched):
        aside = place.with_name(f".{place.name}.{os.getpid()}")
        shutil.copytree(searched, aside)
        aside.rename(place)
    irm = _fitted(plan, replace(unit, method="irm-compact")) if unit.method in DERIVED else None
    lost = (place / RECORD_FILE).is_file() and unit.method not in PROMPTS and not _has_weights(place)
    return evaluation.fit(method, f"again/{unit.name}" if lost else unit.name, unit.seed, rate, irm)


def _has_weights(folder: Path) -> bool:
    return any(folder.rglob("*.safetensors"))


def _subject(plan: Plan, unit: Unit) -> Subject:
    """Whoever a unit asks; fitted by the time it is asked what it has not been asked before."""
    evaluation, method, place = _evaluation(plan, unit.tone), _method(unit), _place(plan, unit)
    if not (place / RECORD_FILE).is_file():
        _fitted(plan, unit)
    host, tokenizer = _host()
    return replace(evaluation.subject(method, place), attach=lambda: method.attach(host, tokenizer, _fitted(plan, unit)))


def search_rate(plan: Plan, unit: Unit) -> None:
    """Step 1: fit at one learning rate."""
    _evaluation(plan, unit.tone).fit(_method(unit), f"rates/{unit.name}-{unit.rate:g}", unit.seed, unit.rate)


def do_unit(plan: Plan, unit: Unit) -> None:
    """Steps 2 and 3: fit, and ask."""
    _evaluation(plan, unit.tone).measured(_subject(plan, unit), cheap=unit.seed != SEEDS[0])


def ask_bare(plan: Plan, unit: Unit) -> None:
    """Ask the bare host."""
    _evaluation(plan, unit.tone).prepare()


def at_strength(plan: Plan, unit: Unit) -> None:
    """Step 4: the compact IRM at one strength (the unit's `rate`)."""
    evaluation, irm = _evaluation(plan, unit.tone), _subject(plan, replace(unit, rate=None))
    assert unit.rate is not None
    if unit.rate in STRENGTHS:
        evaluation.measured(irm, unit.rate, tuning=True, cheap=True)
    if unit.rate in CURVE:
        evaluation.measured(irm, unit.rate, cheap=True)


def choose(plan: Plan, unit: Unit) -> None:
    """Step 4: choose the strength, and ask the test questions at it."""
    evaluation, irm = _evaluation(plan, unit.tone), _subject(plan, unit)
    tried = {value: evaluation.measured(irm, value, tuning=True, cheap=True) for value in STRENGTHS}
    choice = choose_strength({value: evaluation.tuning_scorers.scores(found) for value, found in tried.items()})
    write_text(irm.folder / "strength.json", json.dumps(choice.to_dict(), indent=1) + "\n")
    evaluation.measured(replace(irm, folder=irm.folder / "tuned"), choice.strength)


# In the one that hands out the work.


def best_rate(plan: Plan, unit: Unit) -> float | None:
    """The learning rate that was found for a method; None where none was searched for."""
    found = _losses(plan, unit, _rates_with_ends(unit))
    return min(found, key=lambda rate: found[rate]) if found else None


def _losses(plan: Plan, unit: Unit, rates: Sequence[float]) -> dict[float, float]:
    """Rate -> validation loss, of those that were tried."""
    found = {}
    for rate in rates:
        path = plan.out / RATES_IN / "rates" / f"{unit.name}-{rate:g}-{SEEDS[0]}" / RECORD_FILE
        if path.is_file():
            found[rate] = read_object(path)["validation_loss"][-1]
    return found


def _rates_with_ends(unit: Unit) -> list[float]:
    """A method's rates, and one more at either end, a step of the same size away (one digit)."""
    rates = find_method(unit.method).rates
    if not rates:
        return []
    ends = rates[0] ** 2 / rates[1], rates[-1] ** 2 / rates[-2]
    return [float(f"{ends[0]:.0e}"), *rates, float(f"{ends[1]:.0e}")]


def work(plan: Plan, step: str, units: Sequence[Unit], do: Callable[[Plan, Unit], None], jobs: int) -> list[str]:
    """Do a step's units in processes; what went wrong, a line each."""
    faults, started = [], time.monotonic()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, die_with, (os.getpid(),)) as pool:
        waiting = {pool.submit(do, plan, unit): unit for unit in units}
        for count, future in enumerate(as_completed(waiting), start=1):
            unit, passed = waiting[future], time.monotonic() - started
            left = passed / count * (len(units) - count)
            if error := future.exception():
                faults.append(f"{step}: {unit.label}: {type(error).__name__}: {error}")
            print(
                f"[{step} {count}/{len(units)}] {unit.label}: {'failed' if error else 'done'}; {left / 60:.0f} minutes left",
                file=sys.stderr,
                flush=True,
            )
    return faults


def results_of(plan: Plan) -> dict[str, Any]:
    """Scores of everything that was measured, made anew from the files."""
    found: dict[str, Any] = {}
    for tone in plan.tones:
        evaluation = _evaluation(plan, tone)
        entries: dict[str, list[tuple[Measured, Any]]] = {"bare": [(evaluation.bare, evaluation.scores(evaluation.bare))]}
        for path in sorted(evaluation.folder.glob("*/measured.json")):
            name = path.parent.name.rpartition("-")[0]
            if path.parent.name not in ("bare", "bare-tune"):  # not of `rates` and `again`, a folder deeper
                measured = Measured.load(path)
                entries.setdefault(name, []).append((measured, evaluation.scores(measured)))
        irm = evaluation.folder / f"irm-compact-{SEEDS[0]}"
        choice = read_object(irm / "strength.json") if (irm / "strength.json").is_file() else None
        if choice is not None and (path := irm / "tuned" / f"measured-{choice['strength']:g}.json").is_file():
            measured = Measured.load(path)
            entries["irm-compact, tuned"] = [(measured, evaluation.scores(measured))]
        curve = {}
        for strength in CURVE:
            if (path := irm / f"measured-{strength:g}.json").is_file():
                curve[f"{strength:g}"] = _point(evaluation, Measured.load(path))
        about = {"reference": evaluation.scorers.reference, "contrast": evaluation.task.contrast}
        found[tone] = tone_results(entries, "irm-compact") | about | {"curve": curve}
        if choice is not None:
            found[tone]["strength"] = choice
    return found


def _point(evaluation: ToneEvaluation, measured: Measured) -> dict[str, float]:
    scores = evaluation.scores(measured)
    names = ("summary", "probability", "named", "content", "fact", "nats")
    means = {name: round(float(np.nanmean(scores.each[name])), 4) for name in names}
    return means | {key: round(scores.whole[key], 4) for key in ("kl", "shift_median")}


def page(found: dict[str, Any]) -> str:
    """The results as Markdown, docs/results/evaluation.md: tables, the IRM against the others, the curve over strength."""
    parts = [_HEAD.format(host=found["host"])]
    for tone, own in found["tones"].items():
        several = {name: len(one["seeds"]) for name, one in own["methods"].items() if len(one["seeds"]) > 1}
        seeds = "; ".join(f"{name} with {count} seeds" for name, count in several.items())
        trained = f"{seeds}; the others with one" if seeds else "One seed of each method"
        named = " and ".join(f"{own['reference'][key]:.2f} ({what})" for key, what in _SCORERS.items())
        parts.append(
            f"## {tone.capitalize()}\n\n{own['questions']} questions. {trained}. Of the test rows' own replies the scorers "
            f"name {named} in the tone; concept is that of words.\n\n{table(own)}\n"
        )
        lines = [
            f"| {own['against']} minus | summary | concept | fact kept | fluency (nats) |",
            "| --- | --- | --- | --- | --- |",
        ]
        names = ("summary", "named", "fact", "nats")
        compared = {name: {one["method"]: one for one in own["compared"][name]} for name in names}
        for method in compared["summary"]:
            cells = []
            for name in names:
                one, difference = compared[name][method], compared[name][method]["difference"]
                if difference["mean"] is None or difference["low"] is None:
                    cells.append("-")
                    continue
                clear = one["p_holm"] is not None and one["p_holm"] < 0.05
                low, high = -difference["high"], -difference["low"]
                cells.append(f"{'**' * clear}{-difference['mean']:+.2f}{'**' * clear} ({low:+.2f} to {high:+.2f})")
            lines.append(f"| {method} | {' | '.join(cells)} |")
        parts.append("\n".join(lines) + "\n")
        if own["curve"]:
            lines = ["| strength | summary | concept | fact kept | content | fluency (nats) | KL |", "| --- " * 7 + "|"]
            for value, at in own["curve"].items():
                shown = (at[key] for key in ("summary", "named", "fact", "content", "nats", "kl"))
                lines.append(f"| {value} | {' | '.join(f'{number:.2f}' for number in shown)} |")
            parts.append("The compact IRM over strength:\n\n" + "\n".join(lines) + "\n")
        if choice := own.get("strength"):
            parts.append(
                f"Chosen on the tuning questions: strength {choice['strength']:g}; no clear difference from {choice['low']:g} "
                f"to {choice['high']:g}.\n"
            )
        if missing := [method.name for method in METHODS if method.name not in own["methods"]]:
            parts.append(f"Not measured yet: {', '.join(missing)}.\n")
    return "\n".join(parts)


_SCORERS = {"named": "words", "named_2": "embeddings"}
_HEAD = """# The study of methods

Written by `python benchmarks/evaluation.py --only results` from the records in docs/results/evaluation; no number is typed by
hand. Host: {host}. [Evaluation](../evaluation.md) explains the columns. Intervals are 95% intervals over questions;
where a method was trained with several seeds, its values are averaged over them first. Bold marks differences with p below 0.05
after Holm's adjustment over the methods.

The records were made on more than one machine. In bfloat16 another CPU rounds differently, and greedy replies diverge. At
strength 0 the compact IRM is the bare host to the bit on the same machine (its KL is 0); its row differs from the bare host's
only by the effect of the machine.

![Summary by method](evaluation-summary.svg)

![Concept against KL on neutral text](evaluation-concept-kl.svg)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/results/evaluation"))
    parser.add_argument("--results", type=Path, default=Path("docs/results"))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--methods", help="work on these alone, separated by commas")
    parser.add_argument("--only", choices=["results"], help="make the results from what is there, without new work")
    options = parser.parse_args()
    methods = tuple(find_method(name).name for name in options.methods.split(",")) if options.methods else ()
    out = options.out / "quick" if options.quick else options.out
    plan, started = Plan(out, options.quick, methods), time.monotonic()
    faults: list[str] = []
    if options.only is None:
        steps: list[tuple[str, Iterable[Unit], Callable[[Plan, Unit], None]]] = [
            ("bare", [Unit(tone, "bare", SEEDS[0]) for tone in plan.tones], ask_bare),
            ("rates", [] if plan.quick else rate_units(plan), search_rate),
            ("rates beyond", [] if plan.quick else rate_units(plan, beyond=True), search_rate),
            ("methods", plan.units(), do_unit),
        ]
        if "irm-compact" in {method.name for method in plan.methods}:
            derived = [Unit(tone, name, SEEDS[0]) for tone in plan.tones for name in DERIVED]
            steps += [
                ("derived", derived, do_unit),
                ("strength", strength_units(plan), at_strength),
                ("chosen", [Unit(tone, "irm-compact", SEEDS[0]) for tone in plan.tones], choose),
            ]
        for step, units, do in steps:  # the rates beyond depend on the rates
            if todo := list(units):
                faults += work(plan, step, todo, do, options.jobs)
    for fault in faults:
        print(fault, file=sys.stderr)
    seconds = time.monotonic() - started
    found = {
        "host": EMBEDDED,
        "machine": platform.machine(),
        "jobs": options.jobs,
        "seconds_of_this_call": round(seconds),
        "tones": results_of(plan),
    }
    options.results.mkdir(parents=True, exist_ok=True)
    name = "evaluation-quick" if plan.quick else "evaluation"
    write_text(options.results / f"{name}.json", json.dumps(found, indent=1) + "\n")
    if not plan.quick:
        save_evaluation_figures(found, options.results)
        write_text(options.results / "evaluation.md", page(found))
    for tone, own in found["tones"].items():
        print(f"\n## {tone}, {own['questions']} questions\n\n{table(own)}")
    sys.exit(1 if faults else 0)


def rate_units(plan: Plan, beyond: bool = False) -> Iterator[Unit]:
    """Those of step 1; `beyond`: the fourth rates, once the three are known."""
    for unit in plan.units():
        if unit.tone != RATES_IN or unit.seed != SEEDS[0] or not find_method(unit.method).rates:
            continue
        low, *rates, high = _rates_with_ends(unit)
        if not beyond:
            yield from (replace(unit, rate=rate) for rate in rates)
        elif len(losses := _losses(plan, unit, rates)) == len(rates):
            best = min(losses, key=lambda rate: losses[rate])
            if best in (rates[0], rates[-1]):
                yield replace(unit, rate=low if best == rates[0] else high)


def strength_units(plan: Plan) -> Iterator[Unit]:
    """Those of step 4."""
    for tone in plan.tones:
        for strength in sorted({*STRENGTHS, *CURVE}):
            yield Unit(tone, "irm-compact", SEEDS[0], rate=strength)


if __name__ == "__main__":
    main()
