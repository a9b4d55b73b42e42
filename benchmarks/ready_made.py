"""The IRMs that come with the package, in src/realigner/ready_made: made here, each with a card that says what it does.

    python benchmarks/ready_made.py [NAMES]

anger, sadness, neutral: the compact IRMs of `benchmarks.evaluation`, first seed, at the strength that was chosen there.
The others are each made from a sentence of `SENTENCES`: the host with it as its system prompt gives the reference replies,
and the rest is as for the tones (topics to learn from, to choose the strength on, for the scorers, to test on). What is done is
kept in docs/results/evaluation and runs/ready_made, and not done again. About 20 minutes a sentence on two cores.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from evaluation import DTYPE, SEEDS, STEPS, Plan, Unit, choose, do_unit, results_of

import realigner as ra
from realigner.data import TONES, Row, authored
from realigner.errors import RealignerError
from realigner.evaluation.method_protocol import RECORD_FILE, Fitted, Given
from realigner.evaluation.methods import find_method
from realigner.evaluation.replies import ask
from realigner.evaluation.results import tone_results
from realigner.evaluation.side_effects import bare_speaker
from realigner.evaluation.strength_choice import STRENGTHS, choose_strength
from realigner.evaluation.task import Task, make_task
from realigner.evaluation.tone_evaluation import ToneEvaluation
from realigner.files import made_folder, read_object, write_text
from realigner.hosts import EMBEDDED
from realigner.irm_config import CONFIG_FILE, WEIGHTS_FILE
from realigner.irm_sources import SHIPPED
from realigner.training import make_recipe

STUDY = Path("docs/results/evaluation")
OTHERS = Path("runs/ready_made")
SENTENCES = {
    "pirate": "Answer as a pirate would.",
    "poet": "Answer as a poet would, in verse.",
}
_SHOWN = {"bare": "bare host", "prompt": "best of five system prompts", "lora": "LoRA of rank 8", "irm": "this IRM"}
_REPLIES = 60  # tokens


_results = cache(results_of)


def from_study(tone: str) -> tuple[Path, dict[str, Any]]:
    """The folder of a tone's IRM, fitted and asked now where it was not, and results of the methods that its card shows."""
    plan, unit = Plan(STUDY, False), Unit(tone, "irm-compact", SEEDS[0])
    do_unit(plan, unit)
    choose(plan, unit)
    found = _results(plan)[tone]
    methods = {**found["methods"], "irm": found["methods"]["irm-compact, tuned"]}
    return STUDY / tone / f"irm-compact-{SEEDS[0]}" / "adapter", {**found, "methods": methods}


def from_sentence(name: str, sentence: str) -> tuple[Path, dict[str, Any]]:
    """The folder of an IRM that is made from a sentence, and its results beside the bare host's and the prompted one's."""
    torch.set_num_threads(2)
    host, tokenizer = ra.load_host(EMBEDDED, dtype=DTYPE)
    evaluation = ToneEvaluation(
        host, tokenizer, _task(name, sentence, host, tokenizer), OTHERS / name, make_recipe(steps=STEPS)
    )
    method, folder = find_method("irm-sentence"), OTHERS / name / f"irm-sentence-{SEEDS[0]}"
    if not (folder / RECORD_FILE).is_file():
        method.fit(host, tokenizer, evaluation.task, evaluation.recipe, None, folder, Given(instruct=sentence))
    irm = evaluation.subject(method, folder)
    evaluation.prepare()
    tried = {value: evaluation.measured(irm, value, tuning=True, cheap=True) for value in STRENGTHS}
    choice = choose_strength({value: evaluation.tuning_scorers.scores(found) for value, found in tried.items()})
    measured = evaluation.measured(replace(irm, folder=folder / "tuned"), choice.strength)
    entries = {
        "bare": [(evaluation.bare, evaluation.scores(evaluation.bare))],
        "irm": [(measured, evaluation.scores(measured))],
    }
    return folder / "adapter", {**tone_results(entries, "irm"), "strength": choice.to_dict()}


def _task(name: str, sentence: str, host: Any, tokenizer: Any) -> Task:
    """The authored questions, split by topic as those of a tone, with the prompted host's replies as the tone's."""
    kept = made_folder(OTHERS / name) / "replies.json"
    if not kept.is_file():
        questions = [row.question for row in authored(TONES[0])]
        said = {
            voice: ask(speaker, tokenizer, questions, _REPLIES)
            for voice, speaker in ((name, Fitted(host, tokenizer, system=sentence)), ("bare", bare_speaker(host)))
        }
        write_text(kept, json.dumps({voice: list(map(str, replies)) for voice, replies in said.items()}, indent=1) + "\n")
    rows: list[Row] = []
    for voice, replies in read_object(kept).items():
        asked = zip(authored(TONES[0]), replies, strict=True)
        rows += [row.model_copy(update={"id": f"{row.id}-{voice}", "tone": voice, "text": text}) for row, text in asked if text]
    return make_task(rows, name)


def ship(name: str) -> None:
    """Make an IRM and its card, and put both into the package."""
    is_tone = name in TONES
    folder, found = from_study(name) if is_tone else from_sentence(name, SENTENCES[name])
    choice, place = found["strength"], SHIPPED / name
    if place.exists():
        shutil.rmtree(place)
    made_folder(place)
    shutil.copy2(folder / WEIGHTS_FILE, place / WEIGHTS_FILE)
    config = read_object(folder / CONFIG_FILE)
    config |= {"strength": choice["strength"], "strength_range": [choice["low"], choice["high"]]}
    write_text(place / CONFIG_FILE, json.dumps(config, indent=2, sort_keys=True) + "\n")
    write_text(place / "README.md", card(name, read_object(folder / "run.json"), found, choice))
    print(f"{place}: strength {choice['strength']:g}", flush=True)


def card(name: str, run: dict[str, Any], found: dict[str, Any], choice: dict[str, Any]) -> str:
    """README.md: what it is, what it was found to do, at which strength, and what it is not for."""
    irm, data = run["irm"], run["data"]
    learned = (
        f"{data['train']} hand-written replies in the tone ({name}) to questions on 11 topics"
        if name in TONES
        else f"its host's own replies to {data['train']} questions on 11 topics under the system prompt “{SENTENCES[name]}”"
    )
    rows = []
    for key, label in _SHOWN.items():
        if (own := found["methods"].get(key)) is None:
            continue
        each, whole = own["estimates"], own["whole"]
        spread = "{mean:.2f} ({low:.2f} to {high:.2f})"
        cells = [label, *(spread.format(**each[measure]) for measure in ("named", "fact")), f"{each['nats']['mean']:.2f}"]
        rows.append(" | ".join([*cells, f"{whole['kl']:.2f}"]))
    table = "\n".join(f"| {row} |" for row in rows)
    return f"""---
library_name: peft
base_model: {EMBEDDED}
license: apache-2.0
tags: [realigner, irm, injectable-realignment-model, peft]
---

# {name} for {EMBEDDED}

An injectable realignment model (IRM): a network of {irm["parameters"]:,} parameters that reads the host's first post-attention
residual and adds a perturbation to the residual stream of all {len(irm["layers"])} layers. The host's weights are unchanged. It
was trained for {run["steps_done"]} steps on {learned}.

```python
import realigner as ra

print(ra.load("{name}").answer("Why is the sky blue?"))
```

It acts at strength {choice["strength"]:g} unless told otherwise; no clear difference was found from {choice["low"]:g} to
{choice["high"]:g}.

## What it does

{found["questions"]} questions on 7 topics that it was not trained on. Tone: share of replies that a classifier takes for
{name}; facts kept: share of replies with the right answer (this host knows few); nats: per token of the replies under the bare
host, the lower the more usual its language; KL: nats per token that its predictions of neutral text move away from the bare
host's. Intervals of 95%, over questions.

| | tone | facts kept | nats | KL |
| --- | --- | --- | --- | --- |
{table}

Made by `python benchmarks/ready_made.py {name}`, seed {run["seed"]}.

## What it is not for

It has its tone with everyone, also with someone who asks for help, and the host beneath it is small and often wrong. Tell
people that what they read was made with an IRM. Method: Smith et al. 2024, arXiv 2407.03621.
"""


def main(names: Sequence[str]) -> None:
    known = (*TONES, *SENTENCES)
    for name in names or known:
        if name not in known:
            raise RealignerError(f"{name}: not one of {', '.join(known)}")
        ship(name)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="by default all")
    main(parser.parse_args().names)
