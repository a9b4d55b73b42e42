"""Conclusions from measurements, ablations and trials, by the rules of docs/explain.md. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from scipy.stats import norm, t

from realigner.analysis.resampling import ALPHA, change_per_target, prompt_weights
from realigner.errors import UsageError
from realigner.explain.explanation import Answer, Conclusion, IndexFact, IndexRank, Regression, TrialResult
from realigner.explain.predict import ABOUT
from realigner.traces.layout import UNTRAINED

CHANNEL = 4.0  # an index with this many times the layer's median residual is an outlier channel
UNUSUAL = 3.0  # a gain or a head's column is an outlier from so many times the median on, or from its inverse down
_RARE = 0.05  # largest share of random indices that may have as large an effect
_MOST_LEFT = 0.75  # an index that no longer leads has dropped if it keeps no more of the logarithm of its score
_HALF = 0.5  # a dropped index keeps less of the logarithm of its score; a sufficient one makes more of the IRM's effect
_AS_LARGE = 0.9  # of an index's size, that others must have for its effect not to be said to be its size's
_MOST_MORE = 30  # trainings that are still worth naming as what would settle a question
_RESIDUALS = ("residual", "residual_first", "residual_delimiter")
CAUSES = {
    "channel through the norm": "a channel of the host that its head hardly sees: it acts through the final norm's scale",
    "channel": "a channel of the host",
    "gain": "the final norm's gain",
    "head": "the column of the head",
    "optimiser": "the optimiser",
    "chance": "chance: this training alone",
    "idle channel": "an outlier channel of the host that these IRMs do not rely on: it does not lead, or led by chance",
    "not leading": "it does not lead",
    "none": "none of the causes that were tested",
    "cannot tell": "cannot tell",
}
KINDS = {  # of trials
    "reference": "as it was",
    "permuted": "the host's indices in another order, the same function",
    "gain": "the final norm's gain, or the head's column, such that the head sees the index as it sees the median",
    "masked": "no delta at the index",
    "sgd": "SGD in place of Adam",
    "one layer": "deltas in the middle layer alone",
    "random host": "a host with random weights",
    "no channel": "a host whose residual is 0 at the index",
    "ordinary": "both: residual 0, and that gain",
}


@dataclass(frozen=True)
class Spread:
    """How far an index's score varies between training runs that differ in their seed only.

    Attributes:
        sd: the standard deviation of the score's logarithm, pooled over the leading indices and the one in question.
        df: its degrees of freedom; 0: there was one training, and `sd` is NaN.
    """

    sd: float = math.nan
    df: int = 0

    @classmethod
    def of(cls, scores: np.ndarray, top: int, index: int | None = None) -> Spread:
        """Estimate it from scores ``[training, neuron]``, over the `top` indices with the largest mean and `index`."""
        if len(scores) < 2:
            return cls()
        logs = np.log(np.maximum(scores, 1e-12))
        leading = {*np.argsort(-logs.mean(axis=0), kind="stable")[:top].tolist(), *([] if index is None else [index])}
        return cls(float(np.sqrt(logs[:, sorted(leading)].var(axis=0, ddof=1).mean())), len(leading) * (len(scores) - 1))

    def margin(self, *trainings: int) -> float:
        """Half the width of a 95% interval: of a mean over n runs or, given two numbers, of the difference of such means."""
        weight = math.sqrt(sum(1 / count for count in trainings))
        return float(t.ppf(0.975, self.df)) * self.sd * weight if self.df else math.inf


@dataclass(frozen=True)
class Evidence:
    """Everything that a verdict is based on.

    Attributes:
        index, width: the index in question, and the number of indices.
        ranks: its rank in each IRM.
        facts: from `index_facts`.
        trials: from `trials.trial_results`; None: none were run.
        ablated: IRM -> how -> from `ablate.against_controls`.
        host: the same of the bare host with its residual held at 0 there; None: not run.
        masked: from `masked_loss`; empty without such trials.
        predicted: ``IRMs`` and ``untrained`` -> from `predict.cross_validated_r2`.
        spread: of the references' scores.
        shorter: trials' steps as a share of the run's, if they took fewer; else 1.
        refused: kind of trial -> why there is none.
    """

    index: int
    width: int
    ranks: Sequence[IndexRank]
    facts: Sequence[IndexFact]
    trials: Sequence[TrialResult] | None
    ablated: Mapping[str, Mapping[str, Mapping[str, float]]]
    host: Mapping[str, float] | None
    masked: Mapping[str, float]
    predicted: Mapping[str, Regression]
    spread: Spread = Spread()
    shorter: float = 1.0
    refused: Mapping[str, str] = field(default_factory=dict)

    @property
    def top(self) -> int:
        """The largest rank that counts as leading."""
        return top_ranks(self.width)


def top_ranks(width: int) -> int:
    """The largest rank that counts as leading: 1% of the number of indices, at least 3."""
    return max(3, round(width / 100))


def check_index(index: int | None, width: int) -> None:
    """Raise UsageError for an index that a host of this width does not have."""
    if index is not None and not 0 <= index < width:
        raise UsageError(f"explain: index {index}: this host has indices 0 to {width - 1}")


def index_facts(measured: pd.DataFrame, index: int) -> list[IndexFact]:
    """Every measurement at an index; see `predict.measurement_table`."""
    facts = []
    for name in map(str, measured):
        column = measured[name].to_numpy(dtype=float)
        value, median = float(column[index]), float(np.median(column))
        facts.append(
            IndexFact(
                measurement=name,
                about=ABOUT[name],
                value=value,
                times_median=value / median if median > 0 else math.nan,
                rank=int((column > value).sum()) + 1,
                n=len(column),
            )
        )
    return facts


def times_median(facts: Sequence[IndexFact], *names: str) -> float:
    """The largest of some measurements, in multiples of their medians; NaN if a host has none of them."""
    times = (fact.times_median for fact in facts if fact.measurement in names)
    return max((value for value in times if not math.isnan(value)), default=math.nan)


def is_channel(facts: Sequence[IndexFact]) -> bool:
    """Whether the host's residual is unusually large at the index, at any kind of token."""
    return times_median(facts, *_RESIDUALS) >= CHANNEL


def outlier_sign(times: float) -> int:
    """1 far above the median, -1 far below it (in multiples of it), 0 in between or unknown."""
    return 1 if times >= UNUSUAL else -1 if times <= 1 / UNUSUAL else 0


def has_atypical_readout(facts: Sequence[IndexFact]) -> bool:
    """Whether the final norm's gain or the head's column at the index is an outlier."""
    return any(outlier_sign(times_median(facts, name)) for name in ("final_gain", "head_norm"))


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
        *_predicted(evidence),
    ]
    found = {conclusion.key: conclusion.answer for conclusion in conclusions}
    return _cause(evidence, found), conclusions


def _cause(evidence: Evidence, found: Mapping[str, Answer]) -> str:
    if "not supported" in (found["leads"], found["recurs"]):
        unled = "not leading" if found["leads"] == "not supported" else "chance"
        return "idle channel" if is_channel(evidence.facts) else unled
    dropped = {key for key in ("no channel", "gain", "ordinary") if found.get(key) == "supported"}
    unseen = outlier_sign(times_median(evidence.facts, "head_reach")) < 0
    by_residual = "no channel" in dropped or ("ordinary" in dropped and "gain" not in dropped)  # or by each of two causes
    if is_channel(evidence.facts) and (by_residual or (unseen and "gain" in dropped)):
        return "channel through the norm" if unseen and ("gain" in dropped or dropped == {"ordinary"}) else "channel"
    if "gain" in dropped:
        return "gain" if outlier_sign(times_median(evidence.facts, "final_gain")) else "head"
    if found.get("sgd") == "supported":
        return "optimiser"
    is_open = [found["leads"], found["recurs"], found["moves"], *(found.get(key) for key in ("no channel", "gain", "ordinary"))]
    return "cannot tell" if "cannot tell" in is_open else "none"


def _conclusion(key: str, question: str, answer: Answer, words: str, n: int, unit: str) -> Conclusion:
    return Conclusion(key=key, question=question, answer=answer, words=words, n=n, unit=unit)


def _leads(evidence: Evidence) -> Conclusion:
    ranks = evidence.ranks
    leading, often, where = _leading(evidence)
    answer: Answer = "supported" if 2 * leading >= len(ranks) else "not supported"
    places = ", ".join(f"{own.irm}: rank {own.rank} ({own.ratio:.2f} times the median)" for own in ranks)
    words = f"Among the first {evidence.top} of {evidence.width} in {leading} of {len(ranks)} IRMs. {places}."
    if answer == "not supported" and often:
        answer, words = "cannot tell", f"{words} But it leads {where}."
    return _conclusion("leads", "The index leads in the IRMs given", answer, words, len(ranks), "IRMs")


def _leading(evidence: Evidence) -> tuple[int, bool, str]:
    """In how many of the IRMs given the index leads.

    Also whether it leads in half or more of these and the trainings that repeat them together, and in how many, in words.
    """
    both = (evidence.ranks, _of_kind(evidence, "reference"))
    given, repeated = (sum(own.rank <= evidence.top for own in some) for some in both)
    where = f"in {given} of the {len(both[0])} IRMs given and {repeated} of the {len(both[1])} trainings that repeat them"
    return given, 2 * (given + repeated) >= sum(map(len, both)), where


def _of_kind(evidence: Evidence, kind: str) -> list[TrialResult]:
    return [trial for trial in evidence.trials or () if trial.kind == kind]


def _log_ratios(trials: Sequence[TrialResult] | Sequence[IndexRank]) -> np.ndarray:
    return np.asarray(np.log([max(own.ratio, 1e-12) for own in trials]))


def _recurs(evidence: Evidence) -> Conclusion:
    """Whether the index stands in the references, beside the IRMs given."""
    question = "It stands out again when the training is repeated with other seeds"
    trials, spread = _of_kind(evidence, "reference"), evidence.spread
    if not trials:
        return _conclusion("recurs", question, "cannot tell", "No training was repeated.", 0, "trials")
    stands, words = _stands(trials, evidence.ranks, "the IRMs given", spread, others_grow=False)
    words = words[:1].upper() + words[1:]
    answer: Answer = "cannot tell" if stands is None else "supported" if stands else "not supported"
    before = float(_log_ratios(evidence.ranks).mean())
    if stands is not None and before > 0:
        least, error = max(_HALF * before, spread.margin(len(trials))), spread.sd / math.sqrt(len(trials))
        missed = norm.cdf((least - before) / error) if error else 0.0
        words += (
            f" If the index were as strong as in the IRMs given, {len(trials)} training{'s' * (len(trials) > 1)} would miss it "
            f"with a probability of {'less than 0.001' if missed < 0.001 else f'{missed:.2g}'}."
        )
    given, often, where = _leading(evidence)
    if answer == "not supported" and evidence.shorter < 1:
        answer, words = "cannot tell", f"{words} They took {100 * evidence.shorter:.0f}% of the run's steps."
    if answer == "not supported" and (often or given > 1):
        answer, words = "cannot tell", f"{words} But it leads {where}."
    return _conclusion("recurs", question, answer, words, len(trials), "trials")


def _stands(
    trials: Sequence[TrialResult],
    others: Sequence[TrialResult] | Sequence[IndexRank],
    where: str,
    spread: Spread,
    others_grow: bool = True,
) -> tuple[bool | None, str]:
    """Whether an index stands out in trainings as it does in others (True), has fallen (False), or either may be (None).

    By the means of the logarithms of its scores. It stands where more than half is left of what it stands out by in the
    others, and the interval excludes that nothing is; it has fallen where less than half is left, and the interval excludes
    that all is. Also the finding, in words; with `others_grow`, more trainings would be more of the others too.
    """
    count, before, mean = len(trials), float(_log_ratios(others).mean()), float(_log_ratios(trials).mean())
    places = ", ".join(f"{trial.ratio:.2f} (rank {trial.rank})" for trial in trials)
    words = (
        f"its score in {count} training{'s' * (count != 1)} is {places} times the median; in {where}, {math.exp(before):.2f}"
    )
    if not before > 0:
        return None, f"{words}: it does not stand out there."
    alone, apart = spread.margin(count), spread.margin(count, len(others))
    words += f". Of what it stands out by there (in logarithms) {100 * mean / before:.0f}% is left"
    words += (
        f" (95% interval {100 * (mean - alone) / before:.0f}% to {100 * (mean + alone) / before:.0f}%)." if spread.df else "."
    )
    stands = mean > _HALF * before
    if not spread.df:
        return None, f"{words} One training gives no interval; make two or more."
    if mean > alone if stands else before - mean > apart:
        return stands, words
    for more in range(1, _MOST_MORE + 1):
        alone, apart = spread.margin(count + more), spread.margin(count + more, len(others) + more * others_grow)
        if mean > alone if stands else before - mean > apart:
            return None, f"{words} If this is the true size, {more} more training{'s' * (more > 1)} would settle it."
    return None, f"{words} {_MOST_MORE} more trainings would not settle it."


def _dropped(evidence: Evidence, kind: str) -> tuple[Answer, str, int]:
    """Whether the index has dropped in the trials of a kind, beside the references; the finding; how many trials there are.

    It has where it has fallen (`_stands`); and where less is left than in the references, three quarters at most, and it leads
    in fewer than half of the trials, as it did not in the references. Where it leads in half of the trials, it has not.
    """
    references, trials = _of_kind(evidence, "reference"), _of_kind(evidence, kind)
    if not trials:
        why = evidence.refused.get(kind, "")
        return "cannot tell", f"no trial: {why}" if why else "no trial was made", 0
    if not references:
        return "cannot tell", "no training to compare", len(trials)
    stands, words = _stands(trials, references, "the references", evidence.spread)
    led, leads = (2 * sum(trial.rank <= evidence.top for trial in some) >= len(some) for some in (references, trials))
    before, after = (float(_log_ratios(some).mean()) for some in (references, trials))
    is_less = before - after > evidence.spread.margin(len(trials), len(references)) and after <= _MOST_LEFT * before
    if stands is False and leads:
        stands, words = None, f"{words} And yet it leads."
    elif stands and is_less and led and not leads:
        stands, words = False, f"{words} It no longer leads."
    return "cannot tell" if stands is None else "not supported" if stands else "supported", words.removesuffix("."), len(trials)


def _moves(evidence: Evidence) -> Conclusion:
    question = (
        "The host decides which index it is: in a host with its indices in another order, the index leads in its new place"
    )
    dropped, found, n = _dropped(evidence, "permuted")
    opposite: dict[Answer, Answer] = {"supported": "not supported", "not supported": "supported", "cannot tell": "cannot tell"}
    words = f"In its new place: {found}." if n else f"{found[:1].upper()}{found[1:]}."
    return _conclusion("moves", question, opposite[dropped], words, n, "trials")


def _channel(evidence: Evidence) -> Conclusion:
    times = ", ".join(f"{fact.times_median:.1f} ({fact.about})" for fact in evidence.facts if fact.measurement in _RESIDUALS)
    answer: Answer = "supported" if is_channel(evidence.facts) else "not supported"
    words = f"Times the median: {times}. From {CHANNEL:g} on it is called a channel."
    return _conclusion("channel", "It is a channel of the host", answer, words, evidence.width, "indices")


def _cause_tests(evidence: Evidence) -> list[Conclusion]:
    """Whether it leads because of the channel, and because of the gain: where these are ordinary, they are not the cause."""
    facts, channel, seen = evidence.facts, is_channel(evidence.facts), has_atypical_readout(evidence.facts)
    gain = f"The final norm's gain is {times_median(facts, 'final_gain'):.2g} and the head's column"
    gain += f" {times_median(facts, 'head_norm'):.2g} times the median."
    large, view = "the host's residual is large there", "of how the final norm and the head see it"
    small = "Its residual is of ordinary size."
    shown = f"{gain} With gain and column as at a median index" if seen else gain
    tests = [
        ("no channel", f"It leads because {large}", "Without it" if channel else small, channel),
        ("gain", f"It leads because {view}", shown, seen),
        ("ordinary", f"It leads because {large} or because {view}", "Without both", channel and seen),
    ]
    found = []
    for kind, question, words, asked in tests:
        if asked:
            answer, ranks, n = _dropped(evidence, kind)
            found.append(_conclusion(kind, question, answer, f"{words}: {ranks}.", n, "trials"))
        elif kind != "ordinary":
            found.append(_conclusion(kind, question, "not supported", words, evidence.width, "indices"))
    return found


def _optimiser(evidence: Evidence) -> Conclusion:
    question = "It leads because of Adam: with SGD it does not"
    answer, ranks, n = _dropped(evidence, "sgd")
    words = f"{ranks[:1].upper()}{ranks[1:]}."
    if n:
        learned, of_adam = ([trial.learned for trial in _of_kind(evidence, kind)] for kind in ("sgd", "reference"))
        words = f"With SGD: {ranks}; "
        if np.mean(of_adam) <= 0:
            answer, words = "cannot tell", f"{words}with Adam nothing was learned that it could be compared with."
        else:
            share = float(np.mean(learned) / np.mean(of_adam))
            words += f"it learned {100 * share:.0f}% of what Adam did."
            if share < _HALF:
                answer, words = "cannot tell", f"{words} That is too little to compare."
    return _conclusion("sgd", question, answer, words, n, "trials")


def _other_trials(evidence: Evidence) -> list[Conclusion]:
    questions = {
        "one layer": "It takes many layers: with deltas in one layer alone it does not lead",
        "random host": "It takes a trained host: with random weights it does not lead",
    }
    found = []
    for kind, question in questions.items():
        answer, ranks, n = _dropped(evidence, kind)
        if n or kind in evidence.refused:
            found.append(_conclusion(kind, question, answer, f"{ranks[:1].upper()}{ranks[1:]}.", n, "trials"))
    return found


def _needed(evidence: Evidence) -> Conclusion:
    question = "Training needs the index: without a delta there, the loss is higher"
    masked = evidence.masked
    if not masked:
        return _conclusion("needed", question, "cannot tell", "No such trial was made.", 0, "rows")
    words = (
        f"Loss with the index masked less the reference's: {masked['change']:+.4f} nats per target "
        f"(95% interval over rows {masked['low']:+.4f} to {masked['high']:+.4f}; between seeds, what the references learned "
        f"has a standard deviation of {masked['spread']:.4f})."
    )
    first = _of_kind(evidence, "masked")[0]
    words += f" Index {first.leader} leads in its place, {first.leader_ratio:.2f} times the median."
    more = masked["low"] > 0 and masked["change"] > masked["spread"]
    return _conclusion("needed", question, _known(masked, more), words, int(masked["n"]), "rows")


def _matters(evidence: Evidence) -> list[Conclusion]:
    found = []
    for irm, hows in evidence.ablated.items():
        zero = hows["zero"]
        words = (
            f"Without its delta the loss changes by {zero['change']:+.4f} nats per target (95% interval {zero['low']:+.4f} to "
            f"{zero['high']:+.4f}); without another index's by {zero['random']:+.4f} (p {zero['p_random']:.2g}), without one "
            f"of its size by {zero['matched']:+.4f} (p {zero['p_matched']:.2g}; these are {zero['size']:.2f} times as large)."
        )
        more = zero["low"] > 0 and zero["p_matched"] <= 0.1 and zero["p_random"] <= _RARE
        answer = _known(zero, more)
        if more and zero["size"] < _AS_LARGE:
            answer, words = "cannot tell", f"{words} A larger delta may matter more by its size alone."
        question = f"Its delta matters more than those of its size ({irm})"
        found.append(_conclusion("matters", question, answer, words, int(zero["n"]), "rows"))
        if "keep" in hows:
            found.append(_enough(irm, hows["keep"]))
    return found


def _enough(irm: str, keep: Mapping[str, float]) -> Conclusion:
    """Whether an index's delta alone does half of what the whole IRM does for the loss."""
    whole, question = keep["none"], f"Its delta alone does most of the work ({irm})"  # what is lost with no delta at all
    if not whole > 0:
        return _conclusion("enough", question, "cannot tell", "The IRM takes nothing off the loss.", int(keep["n"]), "rows")
    share, low, high, other = (1 - keep[key] / whole for key in ("change", "high", "low", "random"))
    words = (
        f"Of the {whole:+.4f} nats per target between the bare host and the IRM, its delta alone makes {100 * share:.0f}% (95% "
        f"interval {100 * low:.0f}% to {100 * high:.0f}%), another index's alone {100 * other:.0f}% (p {keep['p_random']:.2g})."
    )
    answer = _known(keep, low >= _HALF and keep["p_random"] <= _RARE)
    return _conclusion("enough", question, answer, words, int(keep["n"]), "rows")


def _known(loss: Mapping[str, float], so: bool) -> Answer:
    """An answer based on a change of loss; "cannot tell" with a single row, which has no interval."""
    return "cannot tell" if math.isnan(loss["low"]) else "supported" if so else "not supported"


def _host_needs(evidence: Evidence) -> list[Conclusion]:
    """What the host itself needs there, IRM or not."""
    if evidence.host is None:
        return []
    zero = evidence.host
    words = (
        f"With its residual held at 0 there, the bare host's loss changes by {zero['change']:+.4f} nats per target (95% "
        f"interval {zero['low']:+.4f} to {zero['high']:+.4f}); at another index by {zero['random']:+.4f} "
        f"(p {zero['p_random']:.2g})."
    )
    answer = _known(zero, zero["low"] > 0 and zero["p_random"] <= _RARE)
    question = "The host itself needs the index more than others"
    return [_conclusion("host needs", question, answer, words, int(zero["n"]), "rows")]


def _predicted(evidence: Evidence) -> list[Conclusion]:
    found = []
    for scores, own in evidence.predicted.items():
        trained = scores != UNTRAINED
        answer: Answer = "supported" if own.p < ALPHA and own.low > 0 else "not supported"
        words = (
            f"Cross-validated R^2 of a regression of the ranks: {own.r2:.3f} (95% interval {own.low:.3f} to {own.high:.3f}; "
            f"permuted {own.null:.3f}; p {own.p:.2g})."
        )
        key = "predicted" if trained else "predicted untrained"
        question = f"The host's measurements predict how {'' if trained else 'untrained '}IRMs rank the indices"
        found.append(_conclusion(key, question, answer, words, own.n, "indices"))
    return found


def masked_loss(
    masked: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]], references: Sequence[tuple[np.ndarray, np.ndarray]]
) -> dict[str, float]:
    """The loss with the index masked minus that of the reference trial of the same seed, paired by row.

    Args:
        masked: for each trial with the index masked, its rows' summed losses, those of its reference, and their targets.
        references: for each reference, how far its rows' summed losses are below the bare host's, and their targets.

    Returns:
        ``change, low, high`` (95%, bootstrap over rows), ``n`` rows, ``spread`` (the standard deviation over references of the
        gain over the bare host. Each seed holds out different rows; comparing on the same rows cancels how hard they are).
    """
    difference = np.concatenate([own - reference for own, reference, _ in masked])
    counts = np.concatenate([targets for _, _, targets in masked])
    weights = prompt_weights(len(counts), 1000, np.random.default_rng(0))
    change, low, high = change_per_target(difference, counts, weights)
    means = [float(own.sum() / targets.sum()) for own, targets in references]
    spread = float(np.std(means, ddof=1)) if len(means) > 1 else 0.0
    return {"change": change, "low": low, "high": high, "n": len(counts), "spread": spread}
