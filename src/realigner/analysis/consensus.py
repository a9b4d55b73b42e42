"""Consensus: do the same indices lead in every run?

Each run ranks the indices by `leading_score`, 1 for the largest. Runs of one tone share their data, and runs of one seed their
initialisation, so only runs that differ in both are independent. Under the null the runs of a tone are relabelled together, and
keep their agreement with each other; then those of a seed; p is the larger one. n counts tones.

Agreement is expected of runs that share a host and prompts. So residual scores are tested too: logarithms of the scores, with
those of the untrained run (and measurements of the host, if given) regressed out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pandas as pd
import xarray as xr
from scipy.special import betainc, betaincinv, comb
from scipy.stats import false_discovery_control

from realigner.analysis.per_run import each_run, layer_scale, leading_score, prompts_of, twins
from realigner.analysis.resampling import Relabelling, check_draws, interval, p_value, prompt_weights, ranks
from realigner.analysis.tables import ALL
from realigner.errors import UsageError
from realigner.traces.layout import UNTRAINED

TOP = 10  # indices that count as leading
PERSISTENCE = 0.9  # of rank-biased overlap: the first 10 ranks make up 86% of it
RESAMPLES = 200  # at most: each ranks every run anew
TEST = "neuron labels permuted within each tone, and within each seed; the larger p"
_COLUMNS = ["run", "tone", "seed", "statistic", "model", "value", "null", "low", "high", "p", "n", "unit", "test"]
_COLUMNS += ["untrained", "difference", "difference_low", "difference_high"]
_KNOTS = (0.5, 0.9, 0.99)
_DEPTH = 200  # ranks beyond weigh less than 1e-10
MODELS = ("uniform", "untrained", "host_residual")
_COUNTED = ("top1_agreement", "in_top")  # shares of a few runs: resampling prompts does not say how sure they are
STATISTICS = ("top1_agreement", "in_top", "mean_reciprocal_rank", "rank_biased_overlap")


@dataclass(frozen=True)
class Consensus:
    """The agreement of runs on leading indices.

    Attributes:
        table: statistics over the trained runs, a row per statistic and ``model``: what was taken out of the scores before
            they were ranked: ``uniform`` nothing, ``untrained`` their untrained twins, ``host_residual`` the
            host's measurements. Columns as in `tabulate`; ``n`` counts tones, ``untrained`` is the statistic over the
            untrained runs. Statistics: ``top1_agreement`` (the share of runs in which the commonest leading index leads),
            ``in_top`` (the largest share of runs that have one index among their 10 leading), ``mean_reciprocal_rank`` (of the
            index where it is largest) and ``rank_biased_overlap`` (mean over pairs of runs that differ in tone and seed).
        indices: a row per index, by p: ``neuron``, ``score`` (mean over runs), ``runs_in_top``, ``runs``,
            ``mean_reciprocal_rank``, ``best_rank``, ``median_rank``; robust rank aggregation ``p`` (over tones or over seeds,
            the larger), ``p_holm``, ``p_bh``, and the same of what is left: ``p_untrained``, ``p_untrained_holm``,
            ``p_untrained_bh``, ``p_host``, ... (NaN where there is nothing to take out); ``untrained_rank``: the median rank
            in the untrained runs.
        pairs: rank-biased overlap of every two runs: ``run_a, run_b, tone_a, tone_b, seed_a, seed_b, value, null``.
    """

    table: pd.DataFrame
    indices: pd.DataFrame
    pairs: pd.DataFrame


@dataclass(frozen=True)
class _Run:
    """A run's scores.

    Attributes:
        run, tone, seed: the run.
        score: `leading_score` ``[neuron]``.
        sums: of each prompt ``[prompt, neuron]``: ``|delta|`` over the layer's scale, summed over tokens, averaged over layers.
        counts: each prompt's tokens ``[prompt]``.
    """

    run: str
    tone: str
    seed: int
    score: np.ndarray
    sums: np.ndarray
    counts: np.ndarray

    def resampled(self, weights: np.ndarray) -> np.ndarray:
        """The score with prompts counting `weights` times; the layers' scales stay those of all prompts."""
        return np.asarray(weights @ self.sums / max(1.0, float(weights @ self.counts)))


def consensus(
    source: xr.Dataset | xr.DataArray,
    host: pd.DataFrame | np.ndarray | None = None,
    permutations: int = 1000,
    resamples: int = 1000,
    seed: int = 0,
) -> Consensus:
    """The agreement of trained runs on leading indices, and whether chance, their untrained twins or the host explain it.

    Args:
        source: a trace, or what `text_maps` made of it.
        host: measurements of the host ``[neuron, measurement]``, one row per index of the trace; pass sizes as logarithms.
        permutations: relabellings that p-values of the table are taken from.
        resamples: bootstrap resamples of prompts for the table's intervals (none for the two shares of runs); at most 200.
        seed: of all draws.

    Raises:
        UsageError: for a source that is neither, measurements of other indices, or fewer than one draw.

    Returns:
        See `Consensus`. With a single run the table is empty. With fewer than two tones or two seeds, p-values and overlap are
        NaN: such runs are not independent samples. A run with a constant map is left out.

    Example:
        >>> consensus(trace).indices.head(3)  # doctest: +SKIP
    """
    check_draws(permutations, resamples)
    rng = np.random.default_rng(seed)
    neurons, prompts = source["neuron"].values, prompts_of(source)
    measured: np.ndarray | None = None
    if host is not None:
        measured = np.asarray(host, dtype=float)
        measured = measured[:, None] if measured.ndim == 1 else measured
        if len(measured) != len(neurons) or not np.isfinite(measured).all():
            raise UsageError(
                "consensus: host measurements are [neuron, measurement], finite, a row for each of the trace's "
                f"{len(neurons)} indices; these are {list(measured.shape)}"
            )
        spread = measured.std(axis=0)
        measured = (measured - measured.mean(axis=0)) / np.where(spread > 0, spread, 1.0)
    runs = list(_runs(source, prompts))
    trained, untrained = ([run for run in runs if (run.tone == UNTRAINED) == bare] for bare in (False, True))
    by_name = {run.run: run for run in untrained}
    twin_of = {run: by_name[twin] for run, twin in twins(source).items() if twin in by_name}
    weights = prompt_weights(len(prompts), min(resamples, RESAMPLES), rng)
    rows, aggregated = [], {}
    for model in MODELS:
        own, control = _Model(model, trained, twin_of, measured), _Model(model, untrained, {}, measured)
        rows += _rows(own, control, weights, permutations, rng)
        aggregated[model] = _aggregated(own, len(neurons))
    return Consensus(pd.DataFrame(rows, columns=_COLUMNS), _indices(neurons, trained, untrained, aggregated), _pairs(runs))


def robust_rank_aggregation(places: np.ndarray) -> np.ndarray:
    """The exact p-value of an index that several independent lists rank highly.

    rho is the smallest p-value of an order statistic of its places (Kolde et al. 2012: the k-th smallest of n uniform numbers
    is Beta(k, n - k + 1)); p is the chance of such a rho, by counting how many places lie below each order statistic's bound.

    Args:
        places: ``[list, index]``: rank over the number of indices, in (0, 1].

    Returns:
        ``[index]``; NaN with fewer than two lists.
    """
    lists, indices = places.shape
    if lists < 2:
        return np.full(indices, np.nan)
    k = np.arange(1, lists + 1)[:, None]
    rho = np.maximum(betainc(k, lists - k + 1, np.sort(places, axis=0)).min(axis=0), 1e-300)
    found, where = np.unique(rho, return_inverse=True)
    if len(found) > 400:  # p is a smooth function of rho: between 400 points of it p is wrong by 5% at most, with 60 lists
        grid = np.geomspace(found[0], 1.0, 400)
        return np.asarray(np.exp(np.interp(np.log(rho), np.log(grid), np.log(_chance(grid, lists)))))
    return np.asarray(_chance(found, lists)[where])


def holm(p: np.ndarray) -> np.ndarray:
    """Holm's adjustment of p-values; NaN stay NaN and do not count."""
    result, there = np.full(p.shape, np.nan), np.flatnonzero(np.isfinite(p))
    order = there[np.argsort(p[there], kind="stable")]
    result[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)), 1.0)
    return result


def benjamini_hochberg(p: np.ndarray) -> np.ndarray:
    """Benjamini and Hochberg's adjustment of p-values; NaN stay NaN and do not count."""
    result, there = np.full(p.shape, np.nan), np.isfinite(p)
    if there.any():
        result[there] = false_discovery_control(p[there])
    return result


def rank_biased_overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Rank-biased overlap at persistence 0.9 of two rankings ``[neuron]`` (ranks from 1), 1 for the same ranking.

    Webber, Moffat and Zobel (2010): (1-p) sum over d of p^(d-1) times the share of the first d that both have. An index adds to
    all depths from the larger of its two ranks on, so the sum is one over indices.
    """
    weight = _overlap_weight(len(a))
    return float(weight[np.maximum(_depth(a), _depth(b))].sum())


def _runs(source: xr.Dataset | xr.DataArray, prompts: np.ndarray) -> Iterator[_Run]:
    for run in each_run(source):
        m = run.mean()
        score = leading_score(m)
        if score.max() == score.min():
            continue  # it ranks nothing
        sums, counts = np.zeros((len(prompts), m.shape[1])), np.zeros(len(prompts))
        for text, prompt in enumerate(np.searchsorted(prompts, run.prompts)):
            sums[prompt] += (run.sums[text] / layer_scale(m)).mean(axis=0)
            counts[prompt] += run.counts[text]
        yield _Run(run.run, run.tone, run.seed, score, sums, counts)


class _Model:
    """Runs with the scores that are ranked: raw, or residual after regressing out a control.

    Args:
        name: one of `MODELS`.
        runs: those to rank; what lacks its control is left out.
        twin_of: a run's untrained twin, by the run's name.
        measured: of the host ``[neuron, measurement]``.

    Attributes:
        runs, twins: the runs, and their untrained twins.
        clusters: each run's tone, and its seed, by number ``[run]``; every untrained run is a tone of its own.
        alike: groups of runs, with signs: all pairs of runs, and those of these groups by their signs, are the pairs that
            differ in tone and seed.
    """

    def __init__(self, name: str, runs: list[_Run], twin_of: Mapping[str, _Run], measured: np.ndarray | None) -> None:
        self.name, self.measured = name, measured
        own = [twin_of.get(run.run) for run in runs]
        there = [name == "uniform" or (measured if name == "host_residual" else twin) is not None for twin in own]
        self.runs = [run for run, kept in zip(runs, there, strict=True) if kept]
        self.twins = [twin for twin, kept in zip(own, there, strict=True) if kept]
        tones = [run.tone if run.tone != UNTRAINED else run.run for run in self.runs]
        seeds = [run.seed for run in self.runs]
        self.clusters = tuple(np.unique(np.array(own), return_inverse=True)[1] for own in (tones, seeds))
        by_tone, by_seed = self.clusters
        # Pairs that share both are taken away twice, and put back.
        kinds = ((by_tone, -1), (by_seed, -1), (by_tone * len(runs) + by_seed, 1))
        groups = [(np.flatnonzero(labels == label), sign) for labels, sign in kinds for label in np.unique(labels)]
        self.alike = [(group, sign) for group, sign in groups if len(group) > 1]

    def scores(self, weights: np.ndarray | None = None) -> np.ndarray:
        """The scores that are ranked ``[run, neuron]``; of one resample of prompts if its weights are given."""

        def of(run: _Run) -> np.ndarray:
            return run.score if weights is None else run.resampled(weights)

        if self.name == "uniform" or not self.runs:
            return np.array([of(run) for run in self.runs])
        out = [self.measured if twin is None or self.name != "untrained" else _log(of(twin))[:, None] for twin in self.twins]
        return np.array([_residual(_log(of(run)), taken) for run, taken in zip(self.runs, out, strict=True)])


def _log(score: np.ndarray) -> np.ndarray:
    """log of scores; an index with a score of 0 gets half of the smallest other one."""
    positive = score[score > 0]
    return np.asarray(np.log(np.maximum(score, positive.min() / 2 if len(positive) else 1.0)))


def _residual(y: np.ndarray, x: np.ndarray | None) -> np.ndarray:
    """y less its least-squares fit on the columns of x ``[neuron, column]``, each with bends at its median, 90% and 99%.

    One slope would be that of the bulk, which is noise for the most part: an index far out in both would stay far out.
    """
    assert x is not None  # runs without a control were left out
    if (1 + len(_KNOTS)) * x.shape[1] * 10 <= len(y):
        x = np.column_stack([x, *(np.maximum(x - np.quantile(x, knot, axis=0), 0) for knot in _KNOTS)])
    design = np.column_stack([np.ones(len(y)), x])
    return np.asarray(y - design @ np.linalg.lstsq(design, y, rcond=None)[0])


def _rows(
    own: _Model, control: _Model, weights: np.ndarray, permutations: int, rng: np.random.Generator
) -> list[dict[str, object]]:
    """A model's rows of the table; none of one run, which cannot disagree with itself."""
    if len(own.runs) < 2:
        return []
    ranked = ranks(-own.scores())
    value, bare = _agreement(ranked, own.alike), _overlap_of(control)
    draws: list[dict[str, float]] = []
    bare_draws: list[float] = []
    if np.isfinite(weights).all():
        draws = [_agreement(ranks(-own.scores(chosen)), own.alike) for chosen in weights]
        bare_draws = [_overlap_of(control, chosen) for chosen in weights]
    nulls: list[list[dict[str, float]]] = []
    if all(cluster.max() > 0 for cluster in own.clusters):
        for cluster in own.clusters:
            relabelling = Relabelling(int(cluster.max()) + 1, ranked.shape[1], permutations, rng)
            nulls.append([_agreement(drawn, own.alike) for drawn in relabelling.each(ranked, cluster)])
    rows: list[dict[str, object]] = []
    for statistic in STATISTICS:
        under_null = [np.array([draw[statistic] for draw in null]) for null in nulls]
        drawn = np.array([draw[statistic] for draw in draws])
        low = high = float("nan")
        if statistic not in _COUNTED:
            low, high = interval(value[statistic], drawn, weights.shape[1], (0.0, 1.0))
        same = statistic == "rank_biased_overlap"  # the others depend on the number of runs: nothing to compare
        difference = value[statistic] - bare if same else float("nan")
        differences = drawn - np.array(bare_draws) if same else np.empty(0)
        lower, higher = interval(difference, differences, weights.shape[1])
        rows.append(
            {"run": ALL, "tone": ALL, "seed": -1, "statistic": statistic, "model": own.name, "value": value[statistic]}
            | {"null": max((float(null.mean()) for null in under_null), default=float("nan")), "low": low, "high": high}
            | {"p": max((p_value(value[statistic], null, rng) for null in under_null), default=float("nan"))}
            | {"n": int(own.clusters[0].max()) + 1, "unit": "tones"}
            | {"test": TEST if len(nulls) else "", "untrained": bare if same else float("nan"), "difference": difference}
            | {"difference_low": lower, "difference_high": higher}
        )
    return rows


def _overlap_of(model: _Model, weights: np.ndarray | None = None) -> float:
    return _agreement(ranks(-model.scores(weights)), model.alike)["rank_biased_overlap"] if model.runs else float("nan")


def _agreement(ranked: np.ndarray, alike: list[tuple[np.ndarray, int]]) -> dict[str, float]:
    """The table's statistics of ranks ``[run, neuron]``; `alike` as in `_Model`."""
    runs, neurons = ranked.shape
    weight = _overlap_weight(neurons)[_depth(ranked)]
    overlap = _shared(weight) + sum(sign * _shared(weight[group]) for group, sign in alike)
    pairs = comb(runs, 2) + sum(sign * comb(len(group), 2) for group, sign in alike)
    return {
        "top1_agreement": float((ranked == 1).sum(axis=0).max() / runs),
        "in_top": float((ranked <= TOP).sum(axis=0).max() / runs),
        "mean_reciprocal_rank": float((1 / ranked).sum(axis=0).max() / runs),
        "rank_biased_overlap": overlap / pairs if pairs else float("nan"),
    }


def _shared(weight: np.ndarray) -> float:
    """The sum over pairs of rows, and over columns, of the smaller weight."""
    some = weight[:, (weight > 0).sum(axis=0) > 1]
    return float((np.sort(some, axis=0) * np.arange(len(some) - 1, -1, -1)[:, None]).sum())


def _overlap_weight(neurons: int) -> np.ndarray:
    """An index's contribution to the overlap, by the larger of its two ranks (0 is not used); it falls with the rank."""
    depth = np.arange(1, min(neurons, _DEPTH) + 1)
    per_depth = (1 - PERSISTENCE) * PERSISTENCE ** (depth - 1) / depth
    per_depth[-1] += PERSISTENCE ** depth[-1] / depth[-1]  # deeper than we look, lists are taken to agree as they do there
    return np.concatenate([[0.0], np.cumsum(per_depth[::-1])[::-1], [0.0]])


def _depth(ranked: np.ndarray) -> np.ndarray:
    """Ranks as places in `_overlap_weight`."""
    return np.asarray(np.minimum(np.ceil(ranked), min(ranked.shape[-1], _DEPTH) + 1)).astype(np.intp)


def _aggregated(model: _Model, neurons: int) -> np.ndarray:
    """Robust rank aggregation over tones, and over seeds ``[neuron]``; the larger p."""
    if not model.runs:
        return np.full(neurons, np.nan)
    scores = model.scores()
    found = []
    for cluster in model.clusters:
        lists = np.array([scores[cluster == label].mean(axis=0) for label in np.unique(cluster)])
        found.append(robust_rank_aggregation(ranks(-lists) / neurons))
    return np.asarray(np.maximum(*found))


def _chance(rho: np.ndarray, lists: int) -> np.ndarray:
    """The chance that of so many uniform numbers some k-th smallest has a p-value of rho or less.

    Going up the bounds b_1 < b_2 < ...: `below[c]` is the chance that c numbers lie below the bound and no order statistic was
    early so far. What gets to k numbers below b_k leaves, and is added up: no differences, so tiny chances keep their digits.
    """
    bounds = betaincinv(np.arange(1, lists + 1)[:, None], lists - np.arange(lists)[:, None], rho)
    below, left = np.zeros((lists + 1, len(rho))), np.zeros(len(rho))
    below[0] = 1.0
    last = np.zeros(len(rho))
    for k in range(1, lists + 1):
        share = np.clip((bounds[k - 1] - last) / np.maximum(1 - last, 1e-300), 0.0, 1.0)
        moved = np.zeros_like(below)
        for c in range(k):
            more = np.arange(lists - c + 1)[:, None]
            moved[c:] += below[c] * comb(lists - c, more) * share**more * (1 - share) ** (lists - c - more)
        left += moved[k:].sum(axis=0)
        moved[k:] = 0.0
        below, last = moved, bounds[k - 1]
    # Where the bounds are too small for a number, p is close to what it is for separate events.
    return np.asarray(np.where(left > 0, np.minimum(left, 1.0), np.minimum(lists * rho, 1.0)))


def _indices(
    neurons: np.ndarray, trained: list[_Run], untrained: list[_Run], aggregated: dict[str, np.ndarray]
) -> pd.DataFrame:
    nothing = np.full((1, len(neurons)), np.nan)
    ranked = ranks(-np.array([run.score for run in trained])) if trained else nothing
    bare = ranks(-np.array([run.score for run in untrained])) if untrained else nothing
    columns: dict[str, np.ndarray | int] = {
        "neuron": neurons,
        "score": np.mean([run.score for run in trained], axis=0) if trained else nothing[0],
        "runs_in_top": (ranked <= TOP).sum(axis=0),
        "runs": len(trained),
        "mean_reciprocal_rank": (1 / ranked).mean(axis=0),
        "best_rank": ranked.min(axis=0),
        "median_rank": np.median(ranked, axis=0),
        "untrained_rank": np.median(bare, axis=0),
    }
    for model, name in zip(MODELS, ("p", "p_untrained", "p_host"), strict=True):
        p = aggregated[model]
        columns |= {name: p, f"{name}_holm": holm(p), f"{name}_bh": benjamini_hochberg(p)}
    table = pd.DataFrame(columns)
    return table.sort_values(["p", "mean_reciprocal_rank"], ascending=[True, False], kind="stable", ignore_index=True)


def _pairs(runs: list[_Run]) -> pd.DataFrame:
    """Every two runs' overlap; `null` is what unrelated rankings have."""
    ranked, rows = {run.run: ranks(-run.score) for run in runs}, []
    for a, b in combinations(runs, 2):
        # Of two unrelated rankings the larger of two ranks is m in 2m - 1 of D^2 cases.
        weight = _overlap_weight(len(a.score))[1:-1]
        null = float(((2 * np.arange(1, len(weight) + 1) - 1) * weight).sum() / len(a.score))
        labels = (a.run, b.run, a.tone, b.tone, a.seed, b.seed)
        rows.append((*labels, rank_biased_overlap(ranked[a.run], ranked[b.run]), null))
    return pd.DataFrame(rows, columns=["run_a", "run_b", "tone_a", "tone_b", "seed_a", "seed_b", "value", "null"])
