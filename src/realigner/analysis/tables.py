"""Tables of statistics: each run's value with that of its untrained twin, and a row over all trained runs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pandas as pd

from realigner.analysis.resampling import Side, exchange_p, interval, mean_over_first, p_value, sign_flip_p
from realigner.traces.layout import UNTRAINED

ALL = "all"  # the name of the row over all trained runs
_DEALT = "a twin and the runs trained from it, dealt out anew by prompt"
_FLIPPED = {
    "": "",
    "untrained": "signs of the difference from the untrained run, by prompt",
    "null": "signs of the difference from the null, by prompt",
}


@dataclass(frozen=True)
class RunStatistic:
    """One statistic of one run, with everything that its table row needs.

    Attributes:
        run, tone, seed: the run.
        keys: ``statistic`` and further keys that identify it within the run.
        value: the statistic.
        draws: bootstrap draws ``[resample]``; one resample has the same prompts in every run.
        n: sample size.
        unit: what n counts.
        resampled: number of prompts, or tones, that are resampled; `n` if 0.
        bounds: range of the statistic.
        null: expected value without an effect.
        nulls: draws under the null ``[draw]``, from which p is computed if given.
        joint: whether a draw is the same relabelling in every run, so that draws may be averaged over runs.
        test: description of those draws.
        per_prompt: values ``[prompt]``, if it is a mean over prompts; NaN for a missing prompt.
        null_per_prompt: expected value for each prompt.
        flip: without `nulls`, p is from flipping the signs of differences from the untrained run, or from the null.
        side: what counts as extreme.
        there: the prompts that it is over ``[prompt]``, if it can be taken over some of them.
        over: its value and draws over some of these prompts.
    """

    run: str
    tone: str
    seed: int
    keys: dict[str, Any]
    value: float
    draws: np.ndarray
    n: int
    unit: str = "prompts"
    resampled: int = 0
    bounds: tuple[float, float] = (-np.inf, np.inf)
    null: float = float("nan")
    nulls: np.ndarray | None = None
    joint: bool = False
    test: str = ""
    per_prompt: np.ndarray | None = None
    null_per_prompt: np.ndarray | None = None
    flip: Literal["", "untrained", "null"] = ""
    side: Side = "greater"
    there: np.ndarray | None = None
    over: Callable[[np.ndarray], tuple[float, np.ndarray]] | None = None

    def paired(self, other: RunStatistic) -> tuple[RunStatistic, RunStatistic]:
        """Both over the prompts that both have."""
        if self.there is None or other.there is None or np.array_equal(self.there, other.there):
            return self, other
        shared = self.there & other.there
        return self._on(shared), other._on(shared)

    def _on(self, prompts: np.ndarray) -> RunStatistic:
        if self.over is None or not prompts.any():
            value, draws = float("nan"), np.full(self.draws.shape, np.nan)
        else:
            value, draws = self.over(prompts)
        return replace(self, value=value, draws=draws, n=int(prompts.sum()), there=prompts)

    def minus(self, other: RunStatistic) -> RunStatistic:
        """The difference from another run, prompt by prompt."""
        difference = None
        if self.per_prompt is not None and other.per_prompt is not None:
            difference = self.per_prompt - other.per_prompt
        return replace(
            self,
            value=self.value - other.value,
            draws=self.draws - other.draws,
            n=min(self.n, other.n),
            bounds=(-np.inf, np.inf),
            per_prompt=difference,
            nulls=None,
            there=None,
            over=None,
        )

    def interval(self) -> tuple[float, float]:
        """Its 95% interval."""
        return interval(self.value, self.draws, self.resampled or self.n, self.bounds)


def tabulate(entries: list[RunStatistic], twins: Mapping[str, str], flips: int, rng: np.random.Generator) -> pd.DataFrame:
    """Entries of every run as a tidy table.

    Args:
        entries: of all runs.
        twins: each trained run's untrained one (`per_run.twins`).
        flips: how many draws of signs.

    Returns:
        ``run, tone, seed``, the entries' keys, ``value, null, low, high, p, n, unit, test`` (the null that p tests), then
        ``untrained`` (the value of the untrained twin), ``difference`` (value - untrained) and its interval
        ``difference_low, difference_high``; these four are over the prompts that both runs have. The rows ``run="all"`` are
        over the trained runs: each tone counts the same, n is the number of tones, and intervals are over prompts, then tones.
    """
    there = {(entry.run, *entry.keys.items()): entry for entry in entries}
    rows: list[dict[str, Any]] = []
    trained: dict[tuple[Any, ...], list[tuple[RunStatistic, RunStatistic, RunStatistic | None]]] = {}
    for entry in entries:
        base = there.get((twins.get(entry.run, ""), *entry.keys.items()))
        paired, twin = entry.paired(base) if base is not None else (entry, None)
        difference = paired.minus(twin) if twin is not None else None
        rows.append(_row(entry, difference, paired.value, *_p(entry, difference, flips, rng)))
        if entry.tone != UNTRAINED:
            trained.setdefault(tuple(entry.keys.items()), []).append((entry, paired, difference))
    for members in trained.values():
        whole = _over_runs([entry for entry, _, _ in members], rng)
        pairs = [(paired, own) for _, paired, own in members if own is not None and np.isfinite(own.value)]
        difference = _over_runs([difference for _, difference in pairs], rng) if pairs else None
        of_pairs = _over_runs([paired for paired, _ in pairs], rng).value if pairs else float("nan")
        if whole.flip == "untrained":
            p, test = _dealt_p([difference for _, difference in pairs], twins, flips, rng), _DEALT
        else:
            p, test = _p(whole, difference, flips, rng)
        rows.append(_row(whole, difference, of_pairs, p, test))
    return pd.DataFrame(rows)


def _p(entry: RunStatistic, difference: RunStatistic | None, flips: int, rng: np.random.Generator) -> tuple[float, str]:
    """p of an entry, and what it is held against."""
    if entry.nulls is not None:
        middle = entry.null if entry.side == "both" else 0.0  # on both sides of what is expected
        return p_value(entry.value - middle, entry.nulls - middle, rng, entry.side), entry.test
    test = entry.test or _FLIPPED[entry.flip]
    if entry.flip == "null" and entry.per_prompt is not None and entry.null_per_prompt is not None:
        return sign_flip_p(entry.per_prompt - entry.null_per_prompt, flips, rng, entry.side), test
    if entry.flip == "untrained" and difference is not None and difference.per_prompt is not None:
        return sign_flip_p(difference.per_prompt, flips, rng), test
    return float("nan"), test


def _dealt_p(differences: list[RunStatistic], twins: Mapping[str, str], draws: int, rng: np.random.Generator) -> float:
    """p of all runs' differences from their untrained twins, several of which may share one."""
    if not differences or any(entry.per_prompt is None for entry in differences):
        return float("nan")
    of_run = {entry.run: entry.per_prompt for entry in differences}
    dealt = dealt_weights({entry.run: entry.tone for entry in differences}, twins)
    values = [np.array([of_run[run] for run in own]) for own in dealt]
    return exchange_p(values, np.array([weight for own in dealt for weight in own.values()]), draws, rng)


def dealt_weights(tones: Mapping[str, str], twins: Mapping[str, str]) -> list[dict[str, float]]:
    """Of each twin, the runs that are dealt out with it, and their weights in the mean over tones.

    Args:
        tones: of the runs that have a twin.
    """
    count = Counter(tones.values())
    weights = {run: 1 / (len(count) * count[tone]) for run, tone in tones.items()}
    return [{run: weights[run] for run in tones if twins[run] == twin} for twin in dict.fromkeys(twins[run] for run in tones)]


def _row(entry: RunStatistic, difference: RunStatistic | None, paired: float, p: float, test: str) -> dict[str, Any]:
    """A table's row: an entry, its difference from the untrained, and the value that this is the difference of."""
    low, high = entry.interval()
    row = {"run": entry.run, "tone": entry.tone, "seed": entry.seed, **entry.keys, "value": entry.value, "null": entry.null}
    row |= {"low": low, "high": high, "p": p, "n": entry.n, "unit": entry.unit, "test": test if np.isfinite(p) else ""}
    lower, higher = difference.interval() if difference is not None else (float("nan"), float("nan"))
    change = difference.value if difference is not None else float("nan")
    row |= {"untrained": paired - change, "difference": change, "difference_low": lower, "difference_high": higher}
    return row


def _over_runs(entries: list[RunStatistic], rng: np.random.Generator) -> RunStatistic:
    """One entry over several runs: the mean over tones of the mean over a tone's runs; those without a value do not count."""
    entries = [entry for entry in entries if np.isfinite(entry.value)] or entries
    first = entries[0]
    by_tone = [[entry for entry in entries if entry.tone == tone] for tone in sorted({entry.tone for entry in entries})]

    def of_tones(get: Callable[[RunStatistic], Any]) -> np.ndarray:
        return np.array([mean_over_first(np.array([get(entry) for entry in runs])) for runs in by_tone])

    def mean(name: str) -> Any:
        values = [getattr(entry, name) for entry in entries]
        return None if any(value is None for value in values) else mean_over_first(of_tones(lambda e: getattr(e, name)))

    draws = of_tones(lambda entry: entry.draws)
    if len(by_tone) > 1:
        weights = rng.multinomial(len(by_tone), np.full(len(by_tone), 1 / len(by_tone)), size=draws.shape[1])
        draws = (draws * weights.T).sum(axis=0) / len(by_tone)
    else:
        draws = draws[0]
    return replace(
        first,
        run=ALL,
        tone=ALL,
        seed=-1,
        value=float(mean("value")),
        null=float(mean("null")),
        draws=draws,
        n=len(by_tone),
        unit="tones",
        resampled=len(by_tone) if len(by_tone) > 1 else min(entry.n for entry in entries),
        nulls=mean("nulls") if first.joint else None,
        test=first.test if first.joint else "",
        per_prompt=mean("per_prompt"),
        null_per_prompt=mean("null_per_prompt"),
        there=None,
        over=None,
    )


def table_rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    """A table's rows as dicts."""
    return [{str(key): value for key, value in row.items()} for row in table.to_dict("records")]


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """A table's rows as JSON values; NaN is None."""
    return [json_value(row) for row in table_rows(table)]


def json_value(value: Any) -> Any:
    """A value, and everything in it, as JSON values: Python numbers; NaN and infinities are None."""
    if isinstance(value, Mapping):
        return {str(key): json_value(item) for key, item in value.items()}
    if isinstance(value, list):
        return [json_value(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
