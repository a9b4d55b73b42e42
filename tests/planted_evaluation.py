"""Made-up evaluations, whose scores lie about known means."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from realigner.evaluation import results
from realigner.evaluation.compare import compare, estimate
from realigner.evaluation.evaluation_file import RESULTS
from realigner.evaluation.measured import About, Effect, Effort, Loss, Measured, Said
from realigner.evaluation.measures import proxy
from realigner.evaluation.scorers import Agreement
from realigner.evaluation.scores import Scores

# Of each method: concept, fact kept, content, nats of fluency, nats of the target, KL, parameters, seconds, seeds.
METHODS: dict[str, Any] = {
    "bare": (0.1, 0.6, 1.9, 1.0, 4.9, 0.0, 0, 0.0, 1),
    "prompt": (0.45, 0.55, 1.6, 1.25, 4.7, 0.3, 0, 90.0, 1),
    "mean-delta": (0.7, 0.4, 1.2, 2.9, 4.3, 0.8, 0, 1.0, 1),
    "lora": (0.95, 0.45, 1.3, 2.4, 3.74, 0.5, 460_800, 300.0, 2),
    "irm": (0.97, 0.57, 1.5, 2.0, 3.7, 0.4, 369_680, 280.0, 2),
}


def planted_evaluation(
    methods: Mapping[str, Any] = METHODS,
    tones: tuple[str, ...] = ("anger",),
    questions: int = 40,
    against: str = "irm",
    reply: str = "How dare you! It is {}, you fool.",
) -> dict[str, Any]:
    """An evaluation as evaluation.json has it: made-up scores about these means, and everything that is made of them."""
    found = {}
    for number, tone in enumerate(tones):
        entries = {
            name: [_entry(name, tone, seed, means, questions, reply, 100 * number + at) for seed in range(means[-1])]
            for at, (name, means) in enumerate(methods.items())
        }
        tuned = [_at(methods[against], value / 4) for value in range(2, 7)]
        choice = {"strength": 1.0, "low": 0.75, "high": 1.25, "points": tuned, "max_kl": 1.0, "max_shift": 1.0}
        curve = {f"{value:g}": _curve(methods[against], value) for value in (-1, -0.5, 0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 2)}
        fewer = patch.multiple(results, compare=partial(compare, draws=500), estimate=partial(estimate, resamples=500))
        with fewer:
            found[tone] = results.tone_results(entries, against) | {
                "reference": {"named": 0.93, "named_2": 0.97},
                "curve": curve,
                "strength": choice,
            }
    return {"host": "planted-host", "irm": "runs/irm", "tones": found}


def _entry(
    name: str, tone: str, seed: int, means: tuple[float, ...], questions: int, reply: str, draw: int
) -> tuple[Measured, Scores]:
    concept, fact, content, nats, target, kl, parameters, seconds, _ = means
    rng = np.random.default_rng([draw, seed])
    logit = np.log(concept / (1 - concept)) + rng.normal(size=questions)
    probability = 1 / (1 + np.exp(-logit))
    contents = np.clip(content + 0.4 * rng.normal(size=questions), 0, 2)
    own = nats + 0.5 * rng.normal(size=questions)
    fluency = np.clip(2 * (6 - own) / 5, 0, 2)
    shift = [kl * (layer + 1) / 20 for layer in range(12)]
    each = {
        "probability": probability, "named": (probability > 0.5) * 1.0, "named_2": (rng.random(questions) < concept) * 1.0,
        "content": contents, "fact": (rng.random(questions) < fact) * 1.0, "fluency": fluency, "nats": own,
        "summary": proxy(probability, contents, fluency), "target": target + 0.3 * rng.normal(size=questions),
        "away": (rng.random(questions) < 0.05) * 1.0, "words": rng.integers(8, 40, questions) * 1.0,
        "ended": np.ones(questions), "distinct_1": np.full(questions, 0.9), "distinct_2": np.full(questions, 0.98),
        "repeated": np.zeros(questions),
    }  # fmt: skip
    whole = {
        "kl": kl, "same": 1 - kl / 4, "text_loss": kl / 2, "about": 0.75 - kl / 10, "shift_median": shift[5],
        "ms_per_token": 21.0, "shift_max": shift[-1], "dropped": concept / 2, "before_dropped": concept,
        "turn_1": concept, "turn_2": concept * 0.9, "turn_3": concept * 0.8,
    }  # fmt: skip
    said = [
        Said(
            question=f"Which river is number {at}?",
            reply=reply.format(at),
            tokens=9,
            ended=True,
            nats=9 * own[at],
            nats_tokens=9,
        )
        for at in range(questions)
    ]
    measured = Measured(
        edition=2, method=name, tone=tone, seed=42 + seed, strength=None, effort=Effort(),
        given="Be angry." if name == "prompt" else "",
        facts={"parameters": parameters, "seconds": seconds or None, "settings": {"about": f"About {name}."}},
        replies=said, shuffled=[], target=[Loss(nats=1.0, tokens=1)] * questions, turns=[["a", "b", "c"]] * 8,
        dropped=["a"] * 24, text=[Effect(nats=1, tokens=1, bare_nats=1, kl=kl, same=1, shift=shift)] * 24,
        about=[About(id="1", reply="a", right=True)] * 48, ms_per_token=21.0,
    )  # fmt: skip
    scores = Scores(each, whole, shift, Agreement(0.9, 0.7), [concept, concept - 0.01, concept - 0.02, concept])
    return measured, scores


def _curve(means: tuple[float, ...], strength: float) -> dict[str, float]:
    concept, fact, content, nats, _, kl, *_ = means
    named = 0.1 + (concept - 0.1) * min(1, max(0, strength) ** 0.7)
    return {
        "summary": 1.3 * max(0.2, 1 - abs(strength - 1) ** 1.5), "probability": named, "named": named, "fact": fact,
        "content": content - 0.1 * abs(strength), "nats": 1 + (nats - 1) * abs(strength),
        "kl": kl * strength**2, "shift_median": 0.1 * abs(strength),
    }  # fmt: skip


def _at(means: tuple[float, ...], strength: float) -> dict[str, Any]:
    point = _curve(means, strength)
    mean = point["summary"]
    summary = {"mean": mean, "low": mean - 0.1, "high": mean + 0.1, "n": 30}
    kept = {key: point[key] for key in ("named", "nats", "kl")}
    return {"strength": strength, "summary": summary, "shift": point["shift_median"], "allowed": point["kl"] <= 0.7, **kept}


def written_evaluation(folder: Path, values: Mapping[str, Any]) -> Path:
    """A folder with an evaluation.json of these values."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RESULTS).write_text(json.dumps(values), encoding="utf-8")
    return folder
