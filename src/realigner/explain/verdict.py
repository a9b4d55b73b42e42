"""From measurements, ablations and trials to conclusions in words, by the rules of docs/explain.md. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import pandas as pd

from realigner.analysis.resampling import change_per_target, prompt_weights
from realigner.analysis.tables import table_rows
from realigner.errors import UsageError
from realigner.explain.predict import ABOUT
from realigner.traces.layout import UNTRAINED

Answer = Literal["supported", "not supported", "cannot tell"]
CHANNEL = 4.0  # times the layer's median: from here on an index is called a channel
UNUSUAL = 3.0  # times the median, or a third of it: a gain, or a head's column, out of the ordinary
_RARE = 0.05  # of random indices, at most so many are like it
_HALF = 0.5  # of what an index stands out by: less is left when it drops; of what an IRM does: from here on it is enough
CAUSES = {
    "channel through the norm": "a channel of the host that its head hardly sees: it acts through the final norm's scale",
    "channel": "a channel of the host",
    "gain": "the final norm's gain",
    "head": "the column of the head",
    "optimiser": "the optimiser",
    "chance": "chance: this training alone",
    "idle channel": "a channel of the host that these IRMs do not lead by: it does not lead, or led by chance",
    "not leading": "it does not lead",
    "none": "none of the causes that were tested",
    "cannot tell": "cannot tell",
}
KINDS = {  # of trials
    "reference": "as it was",
    "permuted": "the host's indices in another order, the same function",
    "gain": "the final norm's gain set so that the head sees the index as it sees the median",
    "masked": "no delta at the index",
    "sgd": "SGD in place of Adam",
    "one layer": "deltas in the middle layer alone",
    "random host": "a host with random weights",
    "no channel": "a host whose residual is 0 at the index",
    "ordinary": "both: residual 0, and that gain",
}


@dataclass(frozen=True)
class Conclusion:
    """One question about an index, answered.

    Attributes:
        key, question: its short name, and in words.
        answer: ``"supported"``, ``"not supported"``, ``"cannot tell"``.
        words: what was found, with effect, interval and n.
        n: how many runs, trials, rows or indices it rests on, and `unit`: which.
    """

    key: str
    question: str
    answer: Answer
    words: str
    n: int
    unit: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Evidence:
    """Everything that a verdict is taken from.

    Attributes:
        index: the index in question, of `width` ones.
        standings: a row an IRM: ``irm, rank, ratio`` (times the median), ``leader``.
        facts: from `index_facts`.
        trials: from `trials.trial_table`; None: none were made.
        ablated: IRM -> how -> from `ablate.against_controls`.
        host: the same of the bare host with its residual held at 0 there; None: it was not asked.
        shorter: trials' steps as a share of the run's, where they took fewer; else 1.
        refused: kind of trial -> why there is none.
        masked: the loss with the index masked less the reference's, paired by row: ``change, low, high, n``, and ``spread``
            (between references); empty without such trials.
        explained: of the IRMs and of the untrained ones: from `predict.explained`.
    """

    index: int
    width: int
    standings: pd.DataFrame
    facts: pd.DataFrame
    trials: pd.DataFrame | None
    ablated: Mapping[str, Mapping[str, Mapping[str, float]]]
    host: Mapping[str, float] | None
    masked: Mapping[str, float]
    explained: Mapping[str, Mapping[str, float]]
    shorter: float = 1.0
    refused: Mapping[str, str] = field(default_factory=dict)

    @property
    def top(self) -> int:
        """Up to which rank an index counts as leading: 1% of the indices, at least 3."""
        return top_ranks(self.width)


def top_ranks(width: int) -> int:
    """Up to which rank an index of so many counts as leading: 1% of them, at least 3."""
    return max(3, round(width / 100))


def refuse_index(index: int | None, width: int) -> None:
    """Raise UsageError for an index that a host of this width does not have; None is any."""
    if index is not None and not 0 <= index < width:
        raise UsageError(f"explain: --index {index}: this host has indices 0 to {width - 1}")


def index_facts(measured: pd.DataFrame, index: int) -> pd.DataFrame:
    """What is measured at an index: ``measurement, about, value, times_median, rank`` (1 the largest), ``n``."""
    rows = []
    for name in measured:
        column = measured[name].to_numpy(dtype=float)
        value, median = float(column[index]), float(np.median(column))
        rank = int((column > value).sum()) + 1
        times = value / median if median > 0 else math.nan
        rows.append({"measurement": name, "about": ABOUT[str(name)], "value": value, "times_median": times, "rank": rank})
    return pd.DataFrame(rows).assign(n=len(measured))


def times_median(facts: pd.DataFrame, *names: str) -> float:
    """The largest of some measurements, over their medians; NaN where a host has none of them."""
    values = facts[facts["measurement"].isin(names)]["times_median"].dropna()
    return float(values.max()) if len(values) else math.nan


def is_channel(facts: pd.DataFrame) -> bool:
    """Whether the host's residual is unusually large there, at any kind of token."""
    return times_median(facts, "residual", "residual_first", "residual_delimiter") >= CHANNEL


def oddness(times: float) -> int:
    """Of so many times the median: 1 far above it, -1 far below, 0 ordinary or not known."""
    return 1 if times >= UNUSUAL else -1 if times <= 1 / UNUSUAL else 0


def is_seen_oddly(facts: pd.DataFrame) -> bool:
    """Whether the final norm's gain or the head's column there is out of the ordinary."""
    return any(oddness(times_median(facts, name)) for name in ("final_gain", "head_norm"))


def conclude(evidence: Evidence) -> tuple[str, list[Conclusion]]:
    """The cause (a key of `CAUSES`) and the conclusions behind it."""
    conclusions = [
        _leads(evidence),
        _recurs(evidence),
        _moves(evidence),
        _channel(evidence),
        *_cause_tests(evidence),
        _optimiser(evidence),
        *_other_trials(evidence),
        _needed(evidence),
        *_matters(evidence),
        *_host_needs(evidence),
        *_foreseen(evidence),
    ]
    found = {conclusion.key: conclusion.answer for conclusion in conclusions}
    return _cause(evidence, found), conclusions


def _cause(evidence: Evidence, found: Mapping[str, Answer]) -> str:
    if "not supported" in (found["leads"], found["recurs"]):
        unled = "not leading" if found["leads"] == "not supported" else "chance"
        return "idle channel" if is_channel(evidence.facts) else unled
    dropped = {key for key in ("no channel", "gain", "ordinary") if found.get(key) == "supported"}
    unseen = oddness(times_median(evidence.facts, "head_reach")) < 0
    by_residual = "no channel" in dropped or ("ordinary" in dropped and "gain" not in dropped)  # or by each of two causes
    if is_channel(evidence.facts) and (by_residual or (unseen and "gain" in dropped)):
        return "channel through the norm" if unseen and ("gain" in dropped or dropped == {"ordinary"}) else "channel"
    if "gain" in dropped:
        return "gain" if oddness(times_median(evidence.facts, "final_gain")) else "head"
    if found.get("sgd") == "supported":
        return "optimiser"
    return "cannot tell" if "cannot tell" in (found["recurs"], found["moves"]) else "none"


def _leads(evidence: Evidence) -> Conclusion:
    table = evidence.standings
    leading = int((table["rank"] <= evidence.top).sum())
    answer: Answer = "supported" if 2 * leading >= len(table) else "not supported"
    places = ", ".join(f"{row['irm']}: rank {row['rank']} ({row['ratio']:.2f} times the median)" for row in table_rows(table))
    words = f"Among the first {evidence.top} of {evidence.width} in {leading} of {len(table)} IRMs. {places}."
    return Conclusion("leads", "The index leads in the IRMs given", answer, words, len(table), "IRMs")


def _of_kind(evidence: Evidence, kind: str) -> pd.DataFrame:
    return evidence.trials[evidence.trials["kind"] == kind] if evidence.trials is not None else pd.DataFrame()


def _standing(evidence: Evidence, table: pd.DataFrame) -> str:
    return "; ".join(
        f"rank {row['rank']} of {evidence.width}, {row['ratio']:.2f} times the median" for row in table_rows(table)
    )


def _recurs(evidence: Evidence) -> Conclusion:
    question = "It leads again when the training is repeated with other seeds"
    table = _of_kind(evidence, "reference")
    if not len(table):
        return Conclusion("recurs", question, "cannot tell", "No training was repeated.", 0, "trials")
    again = int((table["rank"] <= evidence.top).sum())
    answer: Answer = "supported" if again == len(table) else "not supported" if not again else "cannot tell"
    words = f"In {again} of {len(table)} trainings: {_standing(evidence, table)}."
    given = int((evidence.standings["rank"] <= evidence.top).sum())
    if answer == "not supported" and evidence.shorter < 1:
        answer, words = "cannot tell", f"{words} They took {100 * evidence.shorter:.0f}% of the run's steps."
    if answer == "not supported" and given > 1:
        answer, words = "cannot tell", f"{words} But it leads in {given} of the IRMs given."
    return Conclusion("recurs", question, answer, words, len(table), "trials")


def _against(evidence: Evidence, kind: str) -> tuple[list[str], str, int]:
    """What became of the index in trials of a kind: ``dropped``, ``stayed`` or ``between`` each, in words, and their number.

    Dropped: it is not among the leading ones, and less than half is left of what it stood out by in the reference of the same
    seed. Stayed: it is among them. Trials whose reference did not lead are left out: there was nothing to drop from.
    """
    references = {row["seed"]: row for row in table_rows(_of_kind(evidence, "reference"))}
    led = {seed: row["ratio"] for seed, row in references.items() if row["rank"] <= evidence.top}
    rows = [row for row in table_rows(_of_kind(evidence, kind)) if row["seed"] in led]
    became = []
    for row in rows:
        before = led[row["seed"]] - 1
        fell = row["rank"] > evidence.top and before > 0 and (row["ratio"] - 1) / before < _HALF
        became.append("dropped" if fell else "stayed" if row["rank"] <= evidence.top else "between")
    told = [f"rank {row['rank']}, {row['ratio']:.2f} times the median (reference {led[row['seed']]:.2f})" for row in rows]
    why = evidence.refused.get(kind, "")
    none = "no training to compare: the references of these seeds do not lead" if references else "no trial was made"
    return became, "; ".join(told) or (f"no trial: {why}" if why else none), len(rows)


def _moves(evidence: Evidence) -> Conclusion:
    question = (
        "The host decides which index it is: in a host with its indices in another order, the index leads in its new place"
    )
    became, told, n = _against(evidence, "permuted")
    if not n:
        return Conclusion("moves", question, "cannot tell", f"{told[:1].upper()}{told[1:]}.", 0, "trials")
    answer: Answer = (
        "supported" if set(became) == {"stayed"} else "not supported" if set(became) == {"dropped"} else "cannot tell"
    )
    return Conclusion("moves", question, answer, f"In its new place: {told}.", n, "trials")


def _channel(evidence: Evidence) -> Conclusion:
    facts = evidence.facts.set_index("measurement")
    kinds = [name for name in ("residual", "residual_first", "residual_delimiter") if name in facts.index]
    times = facts["times_median"].to_dict()
    told = ", ".join(f"{times[name]:.1f} ({ABOUT[name]})" for name in kinds)
    answer: Answer = "supported" if is_channel(evidence.facts) else "not supported"
    words = f"Times the median: {told}. From {CHANNEL:g} on it is called a channel."
    return Conclusion("channel", "It is a channel of the host", answer, words, evidence.width, "indices")


def _cause_tests(evidence: Evidence) -> list[Conclusion]:
    """Whether it leads because of the channel, and because of the gain: where these are ordinary, they are not the cause."""
    facts, channel, seen = evidence.facts, is_channel(evidence.facts), is_seen_oddly(evidence.facts)
    gain = f"The final norm's gain is {times_median(facts, 'final_gain'):.2g} and the head's column"
    gain += f" {times_median(facts, 'head_norm'):.2g} times the median."
    large, view = "the host's residual is large there", "of how the final norm and the head see it"
    small = "Its residual is of ordinary size."
    found = [
        _dropping(evidence, "no channel", f"It leads because {large}", "Without it" if channel else small, channel),
        _dropping(
            evidence,
            "gain",
            f"It leads because {view}",
            f"{gain} With a gain that makes the head see it as the median" if seen else gain,
            seen,
        ),
    ]
    if seen and channel:
        found.append(_dropping(evidence, "ordinary", f"It leads because {large} or because {view}", "Without both", True))
    return found


def _dropping(evidence: Evidence, kind: str, question: str, words: str, asked: bool) -> Conclusion:
    """Whether the index drops in trials of a kind; not supported where there was nothing to change."""
    if not asked:
        return Conclusion(kind, question, "not supported", words, evidence.width, "indices")
    became, told, n = _against(evidence, kind)
    return Conclusion(kind, question, _dropped(became), f"{words}: {told}.", n, "trials")


def _dropped(became: Sequence[str]) -> Answer:
    """Whether an index dropped, of what became of it in each trial."""
    return "supported" if set(became) == {"dropped"} else "not supported" if set(became) == {"stayed"} else "cannot tell"


def _optimiser(evidence: Evidence) -> Conclusion:
    question = "It leads because of Adam: with SGD it does not"
    table = _of_kind(evidence, "sgd")
    became, told, n = _against(evidence, "sgd")
    if not n:
        return Conclusion("sgd", question, "cannot tell", f"{told[:1].upper()}{told[1:]}.", 0, "trials")
    learned = _of_kind(evidence, "reference")["learned"].mean()
    share = float(table["learned"].mean() / learned)
    words = f"With SGD: {told}; it learned {100 * share:.0f}% of what Adam did."
    if share < _HALF:
        return Conclusion("sgd", question, "cannot tell", words + " That is too little to compare.", n, "trials")
    return Conclusion("sgd", question, _dropped(became), words, n, "trials")


def _other_trials(evidence: Evidence) -> list[Conclusion]:
    asked = {
        "one layer": "It takes many layers: with deltas in one layer alone it does not lead",
        "random host": "It takes a trained host: with random weights it does not lead",
    }
    found = []
    for kind, question in asked.items():
        became, told, n = _against(evidence, kind)
        if n:
            found.append(Conclusion(kind, question, _dropped(became), f"{told}.", n, "trials"))
    return found


def _needed(evidence: Evidence) -> Conclusion:
    question = "Training needs the index: without a delta there, the loss is higher"
    masked = evidence.masked
    if not masked:
        return Conclusion("needed", question, "cannot tell", "No such trial was made.", 0, "rows")
    words = (
        f"Loss with the index masked less the reference's: {masked['change']:+.4f} nats per target "
        f"(95% over rows {masked['low']:+.4f} to {masked['high']:+.4f}; references differ by {masked['spread']:.4f})."
    )
    table = _of_kind(evidence, "masked")
    words += f" Index {int(table['leader'].iloc[0])} leads in its place, {table['leader_ratio'].iloc[0]:.2f} times the median."
    more = masked["low"] > 0 and masked["change"] > masked["spread"]
    return Conclusion("needed", question, _known(masked, more), words, int(masked["n"]), "rows")


def _matters(evidence: Evidence) -> list[Conclusion]:
    found = []
    for irm, hows in evidence.ablated.items():
        zero = hows["zero"]
        words = (
            f"Without its delta the loss changes by {zero['change']:+.4f} nats per target (95% {zero['low']:+.4f} to "
            f"{zero['high']:+.4f}); without another index's by {zero['random']:+.4f}, without one of about its size by "
            f"{zero['matched']:+.4f} (p {zero['p_random']:.2g}, {zero['p_matched']:.2g}; "
            f"these are {zero['size']:.2f} times as large)."
        )
        more = zero["low"] > 0 and zero["p_matched"] <= 0.1 and zero["p_random"] <= _RARE
        answer = _known(zero, more)
        if more and zero["size"] < _HALF:
            answer = "cannot tell"  # it is larger than all that it is held against
        question = f"Its delta matters more than those of its size ({irm})"
        found.append(Conclusion("matters", question, answer, words, int(zero["n"]), "rows"))
        if "keep" in hows:
            found.append(_enough(irm, hows["keep"]))
    return found


def _enough(irm: str, keep: Mapping[str, float]) -> Conclusion:
    """Whether an index's delta alone does half of what the whole IRM does for the loss."""
    whole, question = keep["none"], f"Its delta alone does most of the work ({irm})"  # what is lost with no delta at all
    if not whole > 0:
        return Conclusion("enough", question, "cannot tell", "The IRM takes nothing off the loss.", int(keep["n"]), "rows")
    share, low, high, other = (1 - keep[key] / whole for key in ("change", "high", "low", "random"))
    words = (
        f"Of the {whole:+.4f} nats per target between the bare host and the IRM, its delta alone makes {100 * share:.0f}% (95% "
        f"{100 * low:.0f}% to {100 * high:.0f}%), another index's alone {100 * other:.0f}% (p {keep['p_random']:.2g})."
    )
    answer = _known(keep, low >= _HALF and keep["p_random"] <= _RARE)
    return Conclusion("enough", question, answer, words, int(keep["n"]), "rows")


def _known(found: Mapping[str, float], so: bool) -> Answer:
    """An answer from losses; with a single row there is no interval, and none."""
    return "cannot tell" if math.isnan(found["low"]) else "supported" if so else "not supported"


def _host_needs(evidence: Evidence) -> list[Conclusion]:
    """What the host itself needs there, IRM or not."""
    if evidence.host is None:
        return []
    zero = evidence.host
    words = (
        f"With its residual held at 0 there, the bare host's loss changes by {zero['change']:+.4f} nats per target (95% "
        f"{zero['low']:+.4f} to {zero['high']:+.4f}); at another index by {zero['random']:+.4f} (p {zero['p_random']:.2g})."
    )
    answer = _known(zero, zero["low"] > 0 and zero["p_random"] <= _RARE)
    question = "The host itself needs the index more than others"
    return [Conclusion("host needs", question, answer, words, int(zero["n"]), "rows")]


def _foreseen(evidence: Evidence) -> list[Conclusion]:
    found = []
    for what, facts in evidence.explained.items():
        trained = what != UNTRAINED
        subject = "IRMs stand out" if trained else "untrained IRMs stand out"
        answer: Answer = "supported" if facts["p"] <= 0.05 and facts["low"] > 0 else "not supported"
        words = (
            f"Share of the ranks' variance that a regression foresees for indices it has not seen: {facts['r2']:.3f} (95% "
            f"{facts['low']:.3f} to {facts['high']:.3f}; permuted {facts['null']:.3f}; p {facts['p']:.2g})."
        )
        key = "foreseen" if trained else "foreseen untrained"
        question = f"The host's measurements foresee where {subject}"
        found.append(Conclusion(key, question, answer, words, int(facts["n"]), "indices"))
    return found


def masked_loss(
    masked: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]], references: Sequence[tuple[np.ndarray, np.ndarray]]
) -> dict[str, float]:
    """The loss with the index masked less the reference's of the same seed, paired by row.

    Args:
        masked: of each such trial, its rows' summed losses, those of the reference of its seed, and their targets.
        references: of all of them, the rows' summed losses and targets.

    Returns:
        ``change, low, high`` (95%, bootstrap over rows), ``n`` rows, ``spread`` (the references' standard deviation; each has
        rows of its own, so that it is rather too large).
    """
    apart = np.concatenate([own - reference for own, reference, _ in masked])
    counts = np.concatenate([targets for _, _, targets in masked])
    weights = prompt_weights(len(counts), 1000, np.random.default_rng(0))
    change, low, high = change_per_target(apart, counts, weights)
    means = [float(own.sum() / targets.sum()) for own, targets in references]
    spread = float(np.std(means, ddof=1)) if len(means) > 1 else 0.0
    return {"change": change, "low": low, "high": high, "n": len(counts), "spread": spread}
