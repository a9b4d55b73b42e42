"""All analyses of a trace, and verdicts on the paper's claims in plain words.

The rules are in docs/statistics.md. A claim is supported where chance does not explain it (p, adjusted by Holm for the claims
asked together) and untrained IRMs of the same seeds show it less (the interval of the difference); where either is missing, the
verdict is "cannot tell".
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
import xarray as xr

from realigner.analysis.consensus import Consensus, consensus, holm
from realigner.analysis.mean_maps import leading_indices
from realigner.analysis.per_run import each_run, split_by_run, text_table, twins
from realigner.analysis.resampling import ALPHA, exchange_least
from realigner.analysis.sparsity import sparsity
from realigner.analysis.striation import striation
from realigner.analysis.tables import ALL, dealt_weights, json_value, records, table_rows
from realigner.analysis.timing import REPLY, timing
from realigner.analysis.turns import LAST, turns
from realigner.traces.layout import UNTRAINED

Verdict = Literal["supported", "not supported", "cannot tell"]
LEADING = 10  # indices a run
_NOTHING: dict[str, Any] = dict.fromkeys(
    ("value", "null", "low", "high", "p", "untrained", "difference", "difference_low", "difference_high"), math.nan
)


@dataclass(frozen=True)
class Analysis:
    """All tables of a trace, and the verdicts.

    Attributes:
        striation, timing, sparsity, turns: see the functions of these names; `turns` is empty where no conversation has two
            replies.
        consensus: see `Consensus`.
        leading: each run's 10 leading indices: ``run, tone, seed, rank, neuron, ratio, layers_in_top, layers``.
        verdicts: a dict per claim: ``claim``, ``verdict`` ("supported", "not supported", "cannot tell"), ``words``, ``value``,
            ``null``, ``low``, ``high``, ``p``, ``n``; and ``key`` (the claim's short name), ``measure`` (what the value is),
            ``why`` (the reason, the last sentence of ``words``), ``statistic``, ``p_adjusted``,
            ``unit``, ``runs``, ``prompts``, ``tokens`` (of the trained runs), ``untrained``, ``difference``,
            ``difference_low``, ``difference_high``. Claims of agreement between runs are left out where there is one run.
    """

    striation: pd.DataFrame
    consensus: Consensus
    timing: pd.DataFrame
    sparsity: pd.DataFrame
    leading: pd.DataFrame
    verdicts: list[dict[str, Any]]
    turns: pd.DataFrame

    def to_dict(self) -> dict[str, Any]:
        """JSON values: tables as lists of records, NaN as None; without turns where there are none."""
        tables = {"striation": self.striation, "timing": self.timing, "sparsity": self.sparsity, "leading": self.leading}
        if len(self.turns):
            tables["turns"] = self.turns
        agreed = {"table": self.consensus.table, "indices": self.consensus.indices, "pairs": self.consensus.pairs}
        return {
            "verdicts": [{key: json_value(value) for key, value in verdict.items()} for verdict in self.verdicts],
            **{name: records(table) for name, table in tables.items()},
            "consensus": {name: records(table) for name, table in agreed.items()},
        }


def analyze(
    trace: xr.Dataset,
    seed: int = 0,
    permutations: int = 1000,
    resamples: int = 1000,
    host: pd.DataFrame | np.ndarray | None = None,
) -> Analysis:
    """Striation, consensus, timing, sparsity and turns of a trace, and verdicts.

    A trace may be larger than memory: it is read run by run, and raw deltas a few tokens at a time.

    Args:
        trace: a trace, in memory or from `load_trace`.
        seed: of all draws.
        permutations, resamples: how many draws p-values and intervals are taken from.
        host: measurements of the host ``[neuron, measurement]`` (see `consensus`).

    Raises:
        UsageError: when this is no trace, or for fewer than one draw.

    Example:
        >>> [(v["claim"], v["verdict"]) for v in analyze(trace).verdicts]  # doctest: +SKIP
    """
    draws = {"permutations": permutations, "resamples": resamples, "seed": seed}
    tables = {"striation": striation(trace, **draws), "timing": timing(trace, **draws), "sparsity": sparsity(trace, **draws)}
    tables["turns"] = turns(trace, **draws)
    agreed = consensus(trace, host, **draws)
    leading = _leading(trace)
    measured = _measured(trace)
    claims = _claims(
        *(tables["striation"], agreed, tables["timing"], tables["sparsity"], tables["turns"], leading),
        *(measured["prompts"], _least_dealt(trace)),
    )
    adjusted = holm(np.array([claim.row["p"] for claim in claims], dtype=float))
    bare = len(set(trace["text_run"].values[trace["text_tone"].values == UNTRAINED].tolist()))
    decided = [_decided(claim, float(p), permutations, bare) for claim, p in zip(claims, adjusted, strict=True)]
    verdicts = [_verdict(claim, float(p), measured, *found) for claim, p, found in zip(claims, adjusted, decided, strict=True)]
    return Analysis(consensus=agreed, leading=leading, verdicts=verdicts, **tables)


def _measured(trace: xr.Dataset) -> dict[str, int]:
    """What the verdicts rest on: trained runs, prompts, and the tokens of these runs."""
    trained = trace["text_tone"].values != UNTRAINED
    return {
        "runs": len(set(trace["text_run"].values[trained].tolist())),
        "prompts": len(set(trace["text_prompt"].values[trained].tolist())),
        "tokens": int(trace["count"].values[trained].sum()),
    }


def _leading(trace: xr.Dataset) -> pd.DataFrame:
    tables = []
    for run in each_run(trace):
        m = xr.DataArray(run.mean(), {"neuron": run.neurons}, ("layer", "neuron"))
        found = leading_indices(m, LEADING if m.values.any() else 0)
        facts = {"run": run.run, "tone": run.tone, "seed": run.seed, "rank": np.arange(1, len(found) + 1)}
        tables.append(pd.concat([pd.DataFrame(facts, index=found.index), found], axis=1))
    some = [table for table in tables if len(table)]
    return pd.concat(some, ignore_index=True) if some else tables[0]


@dataclass(frozen=True)
class _Claim:
    """A claim and its evidence.

    Attributes:
        key, claim: short name, and the claim as a sentence.
        row: of a table, or `_NOTHING`.
        measure: description of the value.
        more: whether larger values support it.
        extra: an additional sentence.
        drawn: what the permutations rearrange, if it is few: prompts, or conversations.
        least: the smallest p that so few allow; ties are broken at random, so that it may be smaller by luck.
        untrained_too: whether the index that leads most often leads in half of the untrained runs or more.
    """

    key: str
    claim: str
    row: dict[str, Any]
    measure: str
    more: bool = True
    extra: str = ""
    drawn: str = ""
    least: float = 0.0
    untrained_too: bool = False


def _claims(
    striped: pd.DataFrame,
    agreed: Consensus,
    timed: pd.DataFrame,
    sparse: pd.DataFrame,
    turned: pd.DataFrame,
    leading: pd.DataFrame,
    prompts: int,
    dealt: float,
) -> list[_Claim]:
    """The claims that the trace can say something about.

    Args:
        dealt: the smallest p from dealing runs and their twins anew by prompt.
    """
    by_prompt: dict[str, Any] = {"drawn": "prompts", "least": 0.5**prompts}  # signs are flipped
    led, led_untrained = _led(leading)
    agreement = [
        _Claim(
            "one_leader",
            "One index leads in every run",
            _both(agreed, "top1_agreement"),
            "share of runs",
            extra=led,
            untrained_too=led_untrained,
        ),
        _Claim(
            "shared_indices",
            "Runs trained for different tones share their leading indices",
            _both(agreed, "rank_biased_overlap"),
            "rank-biased overlap of runs that differ in tone and seed",
        ),
    ]
    within = _find(timed, statistic="reply_centre_of_mass", without=0)
    claims = [
        _Claim(
            "striation",
            "Indices that are large in one layer tend to be large in the others",
            _find(striped, statistic="icc", without=0),
            "intraclass correlation over layers",
        ),
        _Claim(
            "many_indices",
            "Many indices make up the striation, not one",
            _find(striped, statistic="icc", without=10),
            "intraclass correlation without the 10 leading indices",
        ),
        _Claim(
            "neuron_over_layer",
            "What is added varies more with the neuron index than with the layer",
            _find(striped, statistic="omega_squared_difference", without=0),
            "share of variance (omega squared) by neuron minus that by layer",
        ),
        *(agreement if len(agreed.table) else ()),
        _Claim("early", "The largest values fall early in a text", *_timed(timed), more=False, **by_prompt),
        _Claim(
            "early_in_reply",
            "Within a reply, more is added to its first tokens",
            within,
            f"centre of mass of the energy over a reply's first {REPLY} tokens, 0 the first of them, 1 the last",
            more=False,
            **by_prompt,
        ),
        _Claim(
            "sparser",
            "Training makes what is added sparser",
            _find(sparse, statistic="hoyer", layer=ALL),
            "Hoyer's sparsity of a token's values",
            drawn="prompts",
            least=dealt,
        ),
    ]
    if len(turned):
        faded = _find(turned, statistic="energy_ratio", reply=LAST)
        sentence = "What is added fades from the first reply of a conversation to the last"
        few: dict[str, Any] = {"drawn": "conversations", "least": _least_drawn(turned)}
        claims.append(_Claim("fading", sentence, faded, "energy of a token, last reply over first", more=False, **few))
    return claims


def _least_dealt(trace: xr.Dataset) -> float:
    """The smallest p that there can be when runs and their untrained twins are dealt anew in each prompt that all have."""
    texts, twin_of = text_table(trace), twins(trace)
    asked = {label["run"]: set(own["prompt"]) for label, own in split_by_run(texts)}
    tones = {label["run"]: label["tone"] for label, _ in split_by_run(texts) if label["run"] in twin_of}
    if not tones:
        return 0.0
    shared = set.intersection(*(asked[run] for run in {*tones, *(twin_of[run] for run in tones)}))
    return exchange_least([np.array([*own.values()]) for own in dealt_weights(tones, twin_of)], len(shared))


def _least_drawn(turned: pd.DataFrame) -> float:
    """The smallest p that there can be when a first and a last reply are drawn in each conversation, of n (n - 1) pairs."""
    least = 1.0
    energy = turned[(turned["statistic"] == "energy") & ~turned["tone"].isin([UNTRAINED, ALL])]
    for _, own in energy.groupby("run"):
        having = dict(zip(own["reply"].astype(int), own["n"].astype(int), strict=True))  # conversations with so many or more
        ways = [float(n * (n - 1)) ** (count - having.get(n + 1, 0)) for n, count in having.items() if n > 1]
        least = min(least, 1 / math.prod(ways))
    return least


def _find(table: pd.DataFrame, **keys: Any) -> dict[str, Any]:
    """The row over all trained runs."""
    chosen = table[table["run"] == ALL] if len(table) else table
    for key, value in keys.items():
        chosen = chosen[chosen[key] == value] if len(chosen) else chosen
    rows = table_rows(chosen.head(1))
    return rows[0] if rows else _NOTHING | {"n": 0, "unit": "tones", "statistic": ""}


def _both(agreed: Consensus, statistic: str) -> dict[str, Any]:
    """Agreement, with the larger p of the two nulls: chance, and the untrained run."""
    row = _find(agreed.table, statistic=statistic, model="uniform")
    left = _find(agreed.table, statistic=statistic, model="untrained")
    return row | {"p": max(row["p"], left["p"]) if np.isfinite(left["p"]) else math.nan}


def _timed(table: pd.DataFrame) -> tuple[dict[str, Any], str]:
    row = _find(table, statistic="late_share_1000", without=0)
    if np.isfinite(row["value"]):
        return row, "share of the 1,000 largest values in the second half of a text"
    return _find(table, statistic="centre_of_mass", without=0), "centre of mass of the energy, 0 first token, 1 last"


def _led(leading: pd.DataFrame) -> tuple[str, bool]:
    """A sentence on the index that leads most often, and whether it leads in half of the untrained runs or more."""
    leaders = leading[leading["rank"] == 1] if len(leading) else leading
    bare = leaders["tone"] == UNTRAINED if len(leaders) else np.zeros(0, dtype=bool)
    first, untrained = leaders[~bare], leaders[bare]
    if not len(first):
        return "", False
    counts = first["neuron"].value_counts()
    index = int(counts.index[counts.to_numpy() == counts.max()].min())
    too = len(untrained) > 0 and bool((untrained["neuron"] == index).mean() >= 0.5)
    return f"Index {index} leads in {int(counts.max())} of {len(first)} runs. ", too


def _verdict(claim: _Claim, p: float, measured: Mapping[str, int], verdict: Verdict, why: str) -> dict[str, Any]:
    row = claim.row
    shown = f"{claim.extra}{claim.measure[:1].upper()}{claim.measure[1:]}: {row['value']:.3f}"
    facts = [f"expected without an effect {row['null']:.3f}"] if np.isfinite(row["null"]) else []
    facts += [f"95% interval {row['low']:.3f} to {row['high']:.3f}"] if np.isfinite(row["low"]) else []
    facts += [f"untrained {row['untrained']:.3f}"] if np.isfinite(row["untrained"]) else []
    facts += [f"p = {row['p']:.2g}, {p:.2g} after Holm"] if np.isfinite(p) else []
    facts.append(", ".join(f"{n:,} {unit[:-1] if n == 1 else unit}" for unit, n in {row["unit"]: row["n"], **measured}.items()))
    words = f"{shown} ({'; '.join(facts)}). {why}" if np.isfinite(row["value"]) else why
    kept = ("value", "null", "low", "high", "p", "n", "unit", "statistic", "untrained", "difference")
    facts_of = {key: row[key] for key in (*kept, "difference_low", "difference_high")}
    said = {"key": claim.key, "claim": claim.claim, "verdict": verdict, "words": words, "measure": claim.measure, "why": why}
    return {**said, "p_adjusted": p, **facts_of, **measured}


def _decided(claim: _Claim, p: float, permutations: int, twins: int) -> tuple[Verdict, str]:
    """The verdict and its reason, of a trace with so many untrained runs."""
    row = claim.row
    if not np.isfinite(row["value"]) and claim.key != "shared_indices":
        return "cannot tell", "The trace has no data to measure it."
    if claim.key == "neuron_over_layer":
        own = _by_interval(row["low"], row["high"], "The index explains more", "The layer explains more")
        if own[0] != "supported":
            return own
        if twins == 1:  # there is no p, and other initial weights may show as much
            return "cannot tell", "The index explains more, but it takes untrained IRMs of two seeds or more to compare."
        return _beyond_untrained(claim, "The index explains more", twins)
    if claim.key == "one_leader" and row["n"] > 1 and row["value"] < 1:
        return "not supported", "It is not the same index in every run."
    if not np.isfinite(p):
        if claim.key not in ("one_leader", "shared_indices"):
            lacking = (
                "5 prompts or more"
                if np.isfinite(row["untrained"])
                else "an untrained IRM of the same seed, and 5 prompts or more"
            )
            return "cannot tell", f"It takes {lacking}."
        if not np.isfinite(row["null"]):
            why = "runs share their data or their initialisation, and are not independent samples."
            return "cannot tell", f"It takes two tones and two seeds or more: {why}"
        return "cannot tell", "There is no untrained IRM of the same seed to compare with."
    if p >= ALPHA and (1 + permutations) * row["p"] < 1 + 1e-9:
        return (
            "cannot tell",
            f"No permutation is as extreme, and there are too few: {permutations}; ask for more (permutations).",
        )
    if row["p"] <= claim.least * (1 + 1e-9) and max(p, claim.least) >= ALPHA:
        return "cannot tell", f"Nothing could be more extreme with so few {claim.drawn}; it takes more."
    if p >= ALPHA:
        return "not supported", "Chance explains as much."
    if claim.key == "one_leader":
        if claim.untrained_too:
            return "not supported", "It leads in the untrained IRMs too."
        return "supported", "Neither chance nor the untrained IRMs explain it."
    return _beyond_untrained(claim, "It is more than chance", twins)


def _beyond_untrained(claim: _Claim, found: str, twins: int) -> tuple[Verdict, str]:
    """The verdict on what was found in the trained runs, held against the untrained ones."""
    low, high = claim.row["difference_low"], claim.row["difference_high"]
    if not np.isfinite(low):
        return "cannot tell", f"{found}, but there is no untrained IRM of the same seed, or one prompt only, to compare."
    low, high = (low, high) if claim.more else (-high, -low)
    shown = "The one untrained IRM shows" if twins == 1 else "Untrained IRMs show"
    return _by_interval(low, high, f"{shown} less of it", f"{shown} more of it", " of the difference from untrained IRMs")


def _by_interval(low: float, high: float, above: str, below: str, what: str = "") -> tuple[Verdict, str]:
    if low > 0:
        return "supported", f"{above}."
    if high < 0:
        return "not supported", f"{below}."
    if not np.isfinite(low):
        return "cannot tell", "One prompt gives no interval."
    return "cannot tell", f"The interval{what} includes 0."
