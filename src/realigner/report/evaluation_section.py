"""The chapter "Does it work?": an evaluation as claims, tables, charts and examples, a part for each tone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from realigner.analysis.resampling import ALPHA
from realigner.evaluation.compare import share_interval
from realigner.evaluation.evaluation_file import Difference, EvaluationFile, Mean, MethodResults, ToneResults
from realigner.report import charts, page_tables as tables
from realigner.report.charts import ChartAxis, Dot, Line, Spot, fmt
from realigner.report.method_styles import KINDS, method_kind
from realigner.report.page_tables import fixed, fixed_interval, probability

_LOWER_IS_BETTER = ("nats", "target")
MEASURES = {
    "summary": "summary",
    "named": "concept",
    "fact": "fact kept",
    "content": "content",
    "nats": "fluency, nats",
    "target": "target, nats",
    "probability": "P(tone)",
    "named_2": "concept, second scorer",
    "fluency": "fluency",
    "away": "moved away",
    "words": "words",
    "ended": "ended",
    "distinct_1": "distinct-1",
    "distinct_2": "distinct-2",
    "repeated": "repeated 4-grams",
    "kl": "KL",
    "same": "same next token",
    "text_loss": "neutral text, nats more",
    "about": "passage accuracy",
    "shift_median": "shift, median layer",
    "shift_max": "shift, largest",
    "ms_per_token": "ms per token",
}
_IN_TABLE = ("summary", "named", "fact", "content", "nats", "target")
_WHOLE = ("kl", "same", "text_loss", "about", "shift_median", "shift_max", "ms_per_token")
_RIVALS = {
    "prompt": "the best system prompt",
    "mean-delta": "the mean of its own deltas, which reads nothing",
    "constant": "a trained constant vector in each layer",
    "lora": "LoRA",
    "shadow": "ShadowPEFT",
}
_SHIFTS = ("irm-compact, tuned", "irm-paper", "prompt", "lora", "shadow", "constant", "mean-delta")  # drawn beside the IRM's
_KEPT_TO_0 = 2e-4  # scores at strength 0 are written with four digits


def evaluation_section(item: EvaluationFile, number: int) -> dict[str, Any]:
    """The template values of one evaluation.

    Args:
        item: what was read.
        number: its place among the page's evaluations, from 1; ids begin with it.
    """
    tones = [
        {"id": f"works-{number}-{at}", "tone": tone, **_tone(tone, own)} for at, (tone, own) in enumerate(item.tones.items(), 1)
    ]
    return {
        "id": f"works-{number}",
        "host": Path(item.host or "its host").name,
        "irm": item.irm,
        "path": str(item.path),
        "tones": tones,
    }


def _tone(tone: str, own: ToneResults) -> dict[str, Any]:
    ranked = own.ranked()
    asked = own.methods[own.against if own.irm else ranked[0]].asked
    return {
        "questions": own.questions,
        "asked": asked,
        "against": own.against,
        "kinds": [kind for kind in KINDS if kind in set(map(method_kind, ranked))],
        "methods": [(name, own.methods[name]) for name in ranked],
        "claims": _claims(tone, own),
        "table": [_row(name, own) for name in ranked],
        "holm": _holm(own),
        "by_summary": _by_summary(own, ranked),
        "trade": _trade(own, ranked),
        "strength": _strength(own),
        "shift": _shift(own),
        "examples": _examples(own),
        "costs": _costs(own, ranked),
        "lasting": _lasting(own, ranked),
        "scorers": _scorers(own, ranked),
        "judged": _judged(own),
        "all": _all_measures(own, ranked),
        "compared": _compared(own),
    }


def _claims(tone: str, own: ToneResults) -> list[dict[str, Any]]:
    """Claims about the IRM, each held against another method on the same questions."""
    like = f"Are its replies in {tone} more often than the bare host's?"
    if own.only_own_voice:
        like = "Are its replies more often like the data's rows than like the bare host's own?"
    found = [
        _claim(own, "bare", "named", like, up=True),
        _claim(own, "bare", "fact", "Does it lose facts that the bare host's replies have?", up=False),
        _claim(own, "bare", "nats", "Is its language less usual for the host than the host's own?", up=True),
    ]
    for name in own.methods:
        base, _, size = name.partition("@")
        if base in _RIVALS and name != own.against:
            sized = f" with {own.methods[name].facts.parameters:,} parameters" if size else ""
            found.append(_claim(own, name, "summary", f"Is it better than {_RIVALS[base]}{sized}?", up=True))
    return [claim for claim in found if claim]


def _claim(own: ToneResults, other: str, measure: str, question: str, up: bool) -> dict[str, Any] | None:
    """Whether the IRM has more (`up`) or less of a measure than another method."""
    found, irm = own.difference(measure, other), own.irm
    if found is None or irm is None:
        return None
    low, high = -found.difference.high, -found.difference.low
    mean, name = -found.difference.mean, MEASURES[measure]
    ours, theirs = (getattr(one.estimates, measure).mean for one in (irm, own.methods[other]))
    known = math.isfinite(low) and math.isfinite(high)
    apart = known and not low <= 0 <= high
    held = apart and found.p_holm < ALPHA
    untested = apart and not math.isfinite(found.p_holm)
    answer = "cannot tell" if untested or not known else "supported" if held and (mean > 0) == up else "not supported"
    tested = f"; p {probability(found.p_holm)} after Holm's adjustment" if math.isfinite(found.p_holm) else ""
    between = f" (95% interval {_signed(low)} to {_signed(high)}{tested})" if known else ""
    words = f"{name.capitalize()} {fixed(ours)} against {fixed(theirs)}: {_signed(mean)}{between}."
    if known and not apart:
        words += " The interval includes 0."
    elif untested:
        words += " There are too few questions for a test."
    elif apart and not held:
        words += " Not significant after Holm's adjustment."
    elif answer == "not supported":
        words += " The difference is in the opposite direction."
    if other == "prompt":
        words += "".join(_beside(own, other, measure) for measure in ("named", "content"))
    mark = {"supported": "yes", "not supported": "no"}.get(answer, "unknown")
    return {"mark": mark, "answer": answer, "question": question, "words": words, "n": found.difference.n, "unit": "questions"}


def _beside(own: ToneResults, other: str, measure: str) -> str:
    found = own.difference(measure, other)
    if found is None or not math.isfinite(found.difference.low):
        return ""
    ends = f"{_signed(-found.difference.high)} to {_signed(-found.difference.low)}"
    return f" {MEASURES[measure].capitalize()}: {_signed(-found.difference.mean)} ({ends})."


def _signed(value: float) -> str:
    return fixed(value, 3, signed=True)


def _standing(measure: str, found: Difference | None) -> str:
    """``better`` or ``worse`` than the IRM, where the difference survives Holm's adjustment."""
    if found is None or not found.p_holm < ALPHA:
        return ""
    return "better" if (found.difference.mean < 0) == (measure in _LOWER_IS_BETTER) else "worse"


def _row(name: str, own: ToneResults) -> dict[str, Any]:
    """A method's row of the main table."""
    method = own.methods[name]
    cells = []
    for measure in _IN_TABLE:
        estimate: Mean = getattr(method.estimates, measure)
        found = own.difference(measure, name)
        interval = fixed_interval(estimate.low, estimate.high) if measure in ("summary", "named", "fact") else ""
        p = "" if found is None else f", p {probability(found.p_holm)} (Holm)"
        title = "" if found is None else f"{_signed(found.difference.mean)} from {own.against}{p}"
        cells.append({"mean": estimate.mean, "interval": interval, "standing": _standing(measure, found), "title": title})
    seconds = [value for value in method.seconds if value is not None and math.isfinite(value)]
    return {
        "name": name,
        "colour": method_kind(name).colour,
        "own": name == own.against,
        "seeds": len(method.seeds),
        "strength": method.strength,
        "parameters": method.facts.parameters,
        "cells": cells,
        "kl": method.whole.kl,
        "about": method.whole.about,
        "about_interval": fixed_interval(*share_interval(method.whole.about, method.asked.answers)),
        "seconds": sum(seconds) / len(seconds) if seconds else math.nan,
    }


def _holm(own: ToneResults) -> dict[str, Any] | None:
    """Which methods' summaries differ from the IRM's after Holm's adjustment."""
    found = own.compared.get("summary", [])
    if not found:
        return None
    sides: dict[str, list[str]] = {"better": [], "worse": [], "": []}
    for one in found:
        sides[_standing("summary", one)].append(one.method)
    return {
        "count": len(found),
        "n": found[0].difference.n,
        "better": sides["better"],
        "worse": sides["worse"],
        "same": sides[""],
    }


def _by_summary(own: ToneResults, ranked: Sequence[str]) -> Any:
    rows = []
    for name in ranked:
        found = own.methods[name].estimates.summary
        title = f"{name}: {fmt(found.mean)} ({fixed_interval(found.low, found.high)})"
        rows.append((name, [Dot(found.mean, title, method_kind(name).colour, True, found.low, found.high)]))
    return charts.dot_chart(rows, ChartAxis(0.0, 2.0), "summary, 0 to 2", "Summary of each method")


def _trade(own: ToneResults, ranked: Sequence[str]) -> Any:
    """Concept against KL: every method, and the IRM over strength."""
    spots = []
    for name in ranked:
        found, kl = own.methods[name].estimates.named.mean, own.methods[name].whole.kl
        spots.append(Spot(name, kl, found, method_kind(name).colour, f"{name}: concept {fmt(found)}, KL {fmt(kl)}"))
    trail = [
        Spot(name, at.kl, at.named, 1, f"strength {name}: concept {fmt(at.named)}, KL {fmt(at.kl)}", small=True)
        for name, at in ((fmt(value, 4), at) for value, at in sorted(own.curve.items()) if value >= 0)
    ]
    return charts.scatter_chart(
        spots, "KL, nats per token of neutral text", "concept, share of replies", "Concept against KL", trail, ends=(0.0, 1.0)
    )


def _strength(own: ToneResults) -> dict[str, Any] | None:
    """The IRM over strength, and the range that was chosen."""
    chosen, curve = own.strength, sorted(own.curve.items())
    if not chosen and len(curve) < 2:
        return None
    at = [value for value, _ in curve]
    shares = [
        Line("concept", at, [point.named for _, point in curve], 1),
        Line("fact kept", at, [point.fact for _, point in curve], 3),
    ]
    summaries = [Line("summary, test questions", at, [point.summary for _, point in curve], 1)] if curve else []
    if chosen:
        tried = [point.strength for point in chosen.points]
        marked = chosen.strength
        summaries.append(Line("tuning questions", tried, [point.summary.mean for point in chosen.points], 2, 1, marked))
    changes = [
        Line("KL, nats per token", at, [point.kl for _, point in curve], 4),
        Line("shift of the median layer, of its size", at, [point.shift_median for _, point in curve], 6),
    ]
    fluency = [Line("fluency", at, [point.nats for _, point in curve], 5)]
    band = (chosen.low, chosen.high) if chosen else None
    drawn = [
        (shares, "share", "Concept and fact kept"),
        (summaries, "0 to 2", "Summary"),
        (changes, "change", "What else changes: KL on neutral text, and the shift of the residual stream"),
        (fluency, "nats per token", "Fluency: the bare host's nats per token of the replies"),
    ]
    return {
        "chosen": chosen,
        "limits": sum(not point.allowed for point in chosen.points) if chosen else 0,
        "n": max((point.summary.n for point in chosen.points), default=0) if chosen else 0,
        "charts": [
            {
                "words": words,
                **tables.charted(lines, "strength", label, words + " over strength", label != "nats per token", band=band),
            }
            for lines, label, words in drawn
            if any(line.x for line in lines)
        ],
        "falls": _falls(own),
        "nothing": _nothing_at_0(own),
        "measured": len(curve),
    }


def _falls(own: ToneResults) -> list[tuple[float, float]] | None:
    """Between which neighbouring strengths from 0 to 1 concept falls; None where there are fewer than three."""
    within = [(value, point.named) for value, point in sorted(own.curve.items()) if 0 <= value <= 1]
    if len(within) < 3:
        return None
    return [(low, high) for (low, before), (high, after) in pairwise(within) if after < before]


def _nothing_at_0(own: ToneResults) -> str:
    """Whether the scores at strength 0 are the bare host's, in words; empty where either is not known."""
    if 0.0 not in own.curve or "bare" not in own.methods:
        return ""
    bare, off = own.methods["bare"].estimates, own.curve[0.0]
    pairs = [(getattr(off, name), getattr(bare, name).mean) for name in ("summary", "named", "content", "fact", "nats")]
    alike = all(abs(a - b) < _KEPT_TO_0 for a, b in pairs if math.isfinite(a) and math.isfinite(b))
    if off.kl != 0:
        return "At strength 0 the scores are not the bare host's."
    if alike:
        return "At strength 0 the scores are the bare host's."
    return "At strength 0 the predictions are the bare host's (KL 0); the replies differ, as they do between machines."


def _shift(own: ToneResults) -> dict[str, Any] | None:
    """How far each layer's residual stream moves: of the IRM, and of a few methods beside it."""
    shown = [name for name in (own.against, *_SHIFTS) if name in own.methods and any(own.methods[name].shift)]
    if not shown:
        return None
    seen: dict[int, int] = {}
    lines = []
    for name in dict.fromkeys(shown):
        colour, shift = method_kind(name).colour, own.methods[name].shift
        lines.append(Line(name, range(len(shift)), shift, colour, seen.get(colour, 0) % 4))
        seen[colour] = seen.get(colour, 0) + 1
    first = own.methods[shown[0]]
    title = "Shift of the residual stream by layer"
    return {
        **tables.charted(lines, "layer", "shift, of the stream's size", title, from_zero=True),
        "whole": first.whole,
        "n": first.asked.passages,
        "name": shown[0],
    }


def _examples(own: ToneResults) -> list[dict[str, Any]]:
    """The questions with the IRM's best and worst summaries, with the bare host's, the prompted host's and its reply."""
    shown = [name for name in ("bare", "prompt", own.against) if name in own.methods]
    found = []
    for at, example in enumerate(own.examples):
        cells = [
            {
                "name": name,
                "colour": method_kind(name).colour,
                "text": example.replies[name],
                "summary": example.summary.get(name),
            }
            for name in shown
            if name in example.replies
        ]
        best = 2 * at < len(own.examples)
        found.append({"question": example.question, "cells": cells, "best": best})
    return found


def _costs(own: ToneResults, ranked: Sequence[str]) -> dict[str, Any]:
    """What methods cost: parameters, training, time for a token."""
    spots, rows = [], []
    for name in ranked:
        method = own.methods[name]
        summary, parameters = method.estimates.summary.mean, method.facts.parameters
        if parameters:
            title = f"{name}: {parameters:,} parameters, summary {fmt(summary)}"
            spots.append(Spot(name, parameters, summary, method_kind(name).colour, title))
        seconds = ", ".join(f"{value:,.0f}" for value in method.seconds if value is not None and math.isfinite(value))
        rate = "" if method.facts.rate is None else fmt(method.facts.rate)
        rows.append([name, f"{parameters:,}" if parameters else "", seconds, rate, fmt(method.whole.ms_per_token)])
    head = ["method", "parameters", "seconds of training, by seed", "learning rate", "ms per token"]
    chart = charts.scatter_chart(spots, "parameters (log)", "summary, 0 to 2", "Summary against parameters", log=True)
    return {"chart": chart, "table": {"head": head, "rows": rows, "numeric": [False, *[True] * 4]}}


def _share(value: float, n: int) -> str:
    if not math.isfinite(value):
        return fixed(value)
    between = fixed_interval(*share_interval(value, n))
    return f"{fixed(value)} ({between})" if between else fixed(value)


def _lasting(own: ToneResults, ranked: Sequence[str]) -> dict[str, Any] | None:
    """Whether the tone lasts over the turns of a conversation, and against a request to drop it."""
    rows = []
    for name in ranked:
        method = own.methods[name]
        whole, asked = method.whole, method.asked
        turns = [_share(value, asked.dialogues) for value in (whole.turn_1, whole.turn_2, whole.turn_3)]
        rows.append([name, *turns, *(_share(value, asked.dropped) for value in (whole.before_dropped, whole.dropped))])
    irm = own.irm
    if irm is None or not any(map(math.isfinite, (irm.whole.turn_1, irm.whole.dropped))):
        return None
    head = ["method", "turn 1", "turn 2", "turn 3", "asked plainly", "asked to drop the tone"]
    return {
        "whole": irm.whole,
        "asked": irm.asked,
        "turns": [_share(value, irm.asked.dialogues) for value in (irm.whole.turn_1, irm.whole.turn_3)],
        "dropped": [_share(value, irm.asked.dropped) for value in (irm.whole.before_dropped, irm.whole.dropped)],
        "table": {"head": head, "rows": rows, "numeric": [False, *[True] * 5]},
    }


def _scorers(own: ToneResults, ranked: Sequence[str]) -> dict[str, Any]:
    """How far the two scorers agree, and how far words' scorers of several seeds differ."""
    rows, spans = [], dict[str, float]()
    for name in ranked:
        method = own.methods[name]
        by_seed = [value for value in method.scorers.by_seed if math.isfinite(value)]
        if by_seed:
            spans[name] = max(by_seed) - min(by_seed)
        seeds = fixed_interval(min(by_seed), max(by_seed)) if by_seed else fixed(math.nan)
        estimates = method.estimates
        agree = [fixed(method.scorers.equal), fixed(method.scorers.kappa)]
        rows.append([name, fixed(estimates.named.mean), fixed(estimates.named_2.mean), *agree, seeds])
    head = ["method", "by words", "by embeddings", "agree on", "kappa", "by words, over seeds"]
    most = max(spans, key=lambda name: spans[name]) if spans else None
    return {
        "irm": own.irm,
        "reference": own.reference,
        "only_own_voice": own.only_own_voice,
        "seeds": len(own.irm.scorers.by_seed) if own.irm else 0,
        "span": spans.get(own.against, math.nan),
        "most": (most, spans[most]) if most is not None else None,
        "table": {"head": head, "rows": rows, "numeric": [False, *[True] * 5]},
    }


def _judged(own: ToneResults) -> dict[str, Any] | None:
    """A judge's ratings, the best score first."""
    if own.judge is None:
        return None
    rated = own.judge.methods
    rows = []
    for name in sorted(rated, key=lambda name: -np.nan_to_num(rated[name].score.mean)):
        means = (rated[name].score, rated[name].concept, rated[name].instruction, rated[name].fluency)
        rows.append([name, *(_mean(found) for found in means), str(rated[name].missing)])
    head = ["method", "score", "concept", "instruction", "fluency", "not rated"]
    return {"model": own.judge.model, "table": {"head": head, "rows": rows, "numeric": [False, *[True] * 5]}}


def _mean(found: Mean) -> str:
    between = fixed_interval(found.low, found.high)
    return f"{fixed(found.mean)} ({between})" if between and found.low < found.high else fixed(found.mean)


def _all_measures(own: ToneResults, ranked: Sequence[str]) -> dict[str, Any]:
    means = [name for name in MEASURES if name not in _WHOLE]
    rows = [[name, *_means(own.methods[name], means)] for name in ranked]
    head = ["method", *(MEASURES[name] for name in (*means, *_WHOLE))]
    return {"head": head, "rows": rows, "numeric": [False, *[True] * (len(head) - 1)]}


def _means(method: MethodResults, means: Sequence[str]) -> list[str]:
    cells = [_mean(getattr(method.estimates, name)) for name in means]
    return [*cells, *(fmt(getattr(method.whole, name)) for name in _WHOLE)]


def _compared(own: ToneResults) -> dict[str, Any] | None:
    """Every comparison with the IRM in numbers."""
    rows = [
        [
            MEASURES.get(measure, measure),
            one.method,
            _signed(one.difference.mean),
            fixed_interval(one.difference.low, one.difference.high, 3),
            probability(one.p),
            probability(one.p_holm),
            str(one.difference.n),
        ]
        for measure, found in _in_order(own.compared).items()
        for one in found
    ]
    head = ["measure", "method", f"less {own.against}", "95% interval", "p", "p (Holm)", "n"]
    return {"head": head, "rows": rows, "numeric": [False, False, *[True] * 5]} if rows else None


def _in_order(compared: Mapping[str, list[Difference]]) -> dict[str, list[Difference]]:
    return {measure: compared[measure] for measure in (*MEASURES, *compared) if measure in compared}
