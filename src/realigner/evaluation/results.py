"""The results of an evaluation as JSON values and as a table: every method's estimates, and each against one of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from realigner.evaluation.compare import compare, estimate
from realigner.evaluation.measured import Measured
from realigner.evaluation.measures import BEST
from realigner.evaluation.scores import Scores, mean

BY_REPLY = (
    "summary", "named", "probability", "named_2", "content", "fact", "fluency", "nats", "target", "away", "words", "ended",
    "distinct_1", "distinct_2", "repeated",
)  # fmt: skip
EXAMPLES = 3  # best, and worst
_OF_2, _ABOVE_0 = ("summary", "content", "fluency"), ("nats", "target", "words")
_BOUNDS = {name: (0.0, BEST if name in _OF_2 else np.inf if name in _ABOVE_0 else 1.0) for name in BY_REPLY}
COMPARED = ("summary", "named", "content", "fact", "nats", "target")
Entry = tuple[Measured, Scores]


def tone_results(entries: Mapping[str, Sequence[Entry]], against: str) -> dict[str, Any]:
    """The results in one tone.

    Args:
        entries: method -> one entry for each seed; all were asked the same questions.
        against: the method that others are compared with, in paired tests over the questions, adjusted by Holm.

    Returns:
        ``questions``, their number; ``methods``: name -> ``seeds``, ``facts`` (of the first seed), ``asked`` (how much,
        besides the questions), ``estimates`` (measure -> mean, low, high, n; over questions, seeds averaged), ``whole``
        (measure -> mean over the seeds that were asked for it), ``shift`` by site, ``scorers`` (agreement, by_seed);
        ``against`` and ``compared``: measure -> a list of comparisons; ``examples``: the questions with the best and the worst
        summaries of `against`. A number that cannot be had is None.
    """
    each = {
        measure: {method: np.stack([scores.each[measure] for _, scores in own]) for method, own in entries.items()}
        for measure in BY_REPLY
    }
    methods = {}
    for method, own in entries.items():
        first, whole = own[0][0], [scores.whole for _, scores in own]
        methods[method] = {
            "seeds": [measured.seed for measured, _ in own],
            "strength": first.strength,
            "facts": {key: value for key, value in first.facts.items() if key not in ("system", "history")},
            "given": first.given,
            "asked": {
                "dialogues": len(first.turns),
                "dropped": len(first.dropped),
                "passages": len(first.text),
                "answers": len(first.about),
            },
            "seconds": [measured.facts.get("seconds") for measured, _ in own],
            "estimates": {measure: asdict(estimate(each[measure][method], bounds=_BOUNDS[measure])) for measure in BY_REPLY},
            "whole": {key: mean([one.get(key, math.nan) for one in whole]) for key in whole[0]},
            "shift": np.mean([scores.shift for _, scores in own], axis=0).tolist(),
            "scorers": {**asdict(own[0][1].agreement), "by_seed": own[0][1].by_seed},
        }
    compared = {
        measure: [asdict(one) for one in compare(each[measure], against)] if against in entries and len(entries) > 1 else []
        for measure in COMPARED
    }
    questions = len(next(iter(entries.values()))[0][0].replies)
    found: dict[str, Any] = plain(
        {
            "questions": questions,
            "methods": methods,
            "against": against,
            "compared": compared,
            "examples": _examples(entries, against) if against in entries else [],
        }
    )
    return found


def _examples(entries: Mapping[str, Sequence[Entry]], of: str) -> list[dict[str, Any]]:
    """The questions on which a method's first seed has its best and its worst summaries, with all methods' replies."""
    measured, scores = entries[of][0]
    order = np.argsort(-scores.each["summary"], kind="stable").tolist()
    shown = sorted({*order[:EXAMPLES], *order[-EXAMPLES:]}, key=order.index)
    return [
        {
            "question": measured.replies[number].question,
            "summary": {method: float(own[0][1].each["summary"][number]) for method, own in entries.items()},
            "replies": {method: own[0][0].replies[number].reply for method, own in entries.items()},
        }
        for number in shown
    ]


def plain(value: Any) -> Any:
    """JSON values, with null where a number is not finite."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def table(results: Mapping[str, Any]) -> str:
    """One tone's results as Markdown, the best summary first."""
    lines = [
        "| | parameters | summary | concept | by embeddings | fact kept "
        "| content | fluency (nats) | target (nats) | KL | right with passage | fitting (s) |",
        "| --- " * 12 + "|",
    ]
    methods = results["methods"]
    for name in sorted(methods, key=lambda method: -(methods[method]["estimates"]["summary"]["mean"] or 0)):
        own, found = methods[name], methods[name]["estimates"]
        parameters, seconds = own["facts"].get("parameters", 0), own["seconds"][0]
        cells = [
            name,
            f"{parameters:,}" if parameters else "",
            *(_interval(found[key]) for key in ("summary", "named")),
            _number(found["named_2"]["mean"]),
            _interval(found["fact"]),
            *(_number(found[key]["mean"]) for key in ("content", "nats", "target")),
            *(_number(own["whole"].get(key)) for key in ("kl", "about")),
            f"{seconds:.0f}" if seconds else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _interval(found: Mapping[str, float | None]) -> str:
    return f"{_number(found['mean'])} ({_number(found['low'])} to {_number(found['high'])})"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
