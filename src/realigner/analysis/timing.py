"""Timing: at which tokens deltas are largest.

The energy of a token is e_t = sum over layers and neurons of delta^2. Values in one token depend on each other, so the null
permutes whole tokens within each text.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from realigner.analysis.per_run import prompts_of, split_by_run, text_table, twins
from realigner.analysis.resampling import Side, check_draws, prompt_weights
from realigner.analysis.sparsity import gini
from realigner.analysis.tables import RunStatistic, tabulate
from realigner.errors import UsageError
from realigner.traces.layout import OPENING

LARGEST = (100, 1000, 10_000)  # how many of a run's largest values the paper's Figure 3 counts
TEST = "whole tokens permuted within each text"
REPLY = 32  # generated tokens that a statistic of the reply looks at, however long it is
PLACES = ("template", "question", "last", "opening")  # of the prompt's tokens and the reply's first 10, each in one of them
_PLACED: dict[str, Side] = {
    "prompt_share": "greater",
    "first_share": "greater",
    "centre_of_mass": "less",
    **{f"{place}_share": "both" for place in PLACES},
    "reply_centre_of_mass": "less",
}
_RATIOS = ("prompt_share", *(f"{place}_share" for place in PLACES))  # of shares
_SPREAD = ("entropy", "gini", "largest_share")  # the same in whatever order tokens come


def timing(trace: xr.Dataset, permutations: int = 1000, resamples: int = 1000, seed: int = 0) -> pd.DataFrame:
    """Every run's timing statistics: means over its texts.

    Args:
        trace: a trace.
        permutations: of tokens (and of signs) that p-values are taken from.
        resamples: bootstrap resamples of prompts.
        seed: of all draws.

    Raises:
        UsageError: when this is no trace, or for fewer than one draw.

    Returns:
        A row per run, statistic and ``without`` (0: all tokens; 1: each text's first token left out, which in many hosts is
        unlike all others), and rows ``run="all"``; columns as in `tabulate`.

        How unevenly energy is spread over tokens: ``entropy`` (over log of the number of tokens; 1 is even), ``gini``,
        ``largest_share``. They do not depend on the order of tokens; ``null`` is an even spread, and p comes from flipping the
        signs of the differences from the untrained twin, prompt by prompt (two-sided; over all runs, from exchanging values
        between a twin and the runs trained from it; NaN without a twin, and with fewer than 5 prompts).

        Where it falls, p one-sided for "early": ``prompt_share`` (the prompt's share of the energy over its share of the
        tokens; null 1), ``first_share`` (the first token's share; null 1/T), ``centre_of_mass`` (0 the first token, 1 the last;
        null 1/2), and ``late_share_K`` for K = 100, 1000, 10000 (the share of the run's K largest ``|delta|`` that lies in the
        second half of its text; null 1/2, a middle token counts half; only where the trace keeps as many values, and K is at
        most half of the run's). p of the row ``run="all"``: runs answer the same prompts, so signs of the differences from the
        null are flipped by prompt; only where these are symmetric, for ``centre_of_mass``, ``reply_centre_of_mass`` and
        ``late_share_K``.

        All of these depend on the length of the reply; the following do not. Over the prompt and the first 10 generated tokens,
        each place's share of the energy divided by its share of the tokens (null 1, p two-sided): ``template_share`` (what the
        chat template adds), ``question_share`` (the messages' content), ``last_share`` (the prompt's last token, whichever
        place it belongs to) and ``opening_share`` (the 10 generated ones). And ``reply_centre_of_mass``, over the first 32
        generated tokens alone (p one-sided for "early").

        NaN: texts without energy; ``prompt_share`` of texts without prompt or without reply; the share of a place that none or
        all of a text's tokens are in, and all four such shares if the trace has no roles of tokens; for texts of a single
        token, everything but ``largest_share`` and ``first_share``.

    Example:
        >>> timing(trace).query("statistic == 'centre_of_mass'")  # doctest: +SKIP
    """
    check_draws(permutations, resamples)
    rng = np.random.default_rng(seed)
    texts, prompts = text_table(trace), prompts_of(trace)
    weights = prompt_weights(len(prompts), resamples, rng)
    entries: list[RunStatistic] = []
    for label, own in split_by_run(texts):
        of_prompts = np.searchsorted(prompts, own["prompt"])
        for without in (0, 1):
            found = [_of_text(text, permutations, rng) for text in _texts(trace, own, without)]
            for name in found[0]:
                keys = {"statistic": name, "without": without}
                entries.append(_of_run(label, keys, [text[name] for text in found], of_prompts, weights))
    return tabulate(entries, twins(trace), permutations, rng)


def top_histogram(trace: xr.Dataset, k: int = 1000, bins: int | None = None) -> pd.DataFrame:
    """Where the k largest ``|delta|`` of each run lie: the paper's Figure 3.

    Args:
        trace: a trace.
        k: how many, over all texts of a run together.
        bins: number of equal bins of the relative position, from 0 (first token) to 1 (last); None: one row per token position.

    Raises:
        UsageError: when the trace keeps too few values per text for this `k`.

    Returns:
        ``run, tone, seed, position, count``, and ``tokens``: how many tokens of the run's texts lie there. ``position`` is the
        token's, or the middle of the bin. Rows with a count of 0 are included.
    """
    rows = []
    for largest in _largest(trace, k):
        if bins is None:
            place = largest.position
            every = np.concatenate([np.arange(tokens) for tokens in largest.tokens])
            labels = np.arange(int(largest.tokens.max()), dtype=float)
        else:
            place = _bin(largest.position, largest.tokens[largest.text], bins)
            every = np.concatenate([_bin(np.arange(tokens), np.full(tokens, tokens), bins) for tokens in largest.tokens])
            labels = (np.arange(bins) + 0.5) / bins
        counts, tokens = (np.bincount(places, minlength=len(labels)) for places in (place, every))
        rows.append(pd.DataFrame(largest.label | {"position": labels, "count": counts, "tokens": tokens}))
    return pd.concat(rows, ignore_index=True)


def layer_counts(trace: xr.Dataset, k: int = 1000) -> pd.DataFrame:
    """How many of the k largest ``|delta|`` of each run lie in each layer.

    Args and raises: as `top_histogram`.

    Returns:
        ``run, tone, seed, layer, count``. Layers that no run of the trace has are left out; counts of 0 are included.
    """
    layers, rows = trace["layer"].values, []
    for largest in _largest(trace, k):
        count = np.bincount(np.searchsorted(layers, largest.layer), minlength=len(layers))
        rows.append(pd.DataFrame(largest.label | {"layer": layers, "count": count}))
    return pd.concat(rows, ignore_index=True)


@dataclass(frozen=True)
class _Largest:
    """The largest values of a run (`label`): text, position and layer of each; and the number of tokens of each text."""

    label: dict[str, Any]
    text: np.ndarray
    position: np.ndarray
    layer: np.ndarray
    tokens: np.ndarray


def _largest(trace: xr.Dataset, k: int) -> Iterator[_Largest]:
    texts = text_table(trace)
    if k < 1:
        raise UsageError(f"timing: k={k}; give the number of largest values to count, e.g. 1000")
    if k > _kept(trace, texts):
        raise UsageError(f"timing: the {k} largest values are wanted, and the trace keeps {trace.sizes['rank']} of a text")
    for label, own in split_by_run(texts):
        numbers = own.index.to_numpy()
        text, position, layer = _places(trace, numbers, k)
        yield _Largest(label, text, position, layer, (own["stop"] - own["start"]).to_numpy())


def _rows(trace: xr.Dataset, name: str, texts: np.ndarray) -> np.ndarray:
    """A variable of some texts ``[text, rank]``, read one by one."""
    return np.stack([trace[name][int(text)].values for text in texts])


def _places(trace: xr.Dataset, texts: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Text (its place in `texts`), position and layer of each of the k largest of all these texts' values."""
    size = np.nan_to_num(np.abs(_rows(trace, "top_value", texts)), nan=-1.0)
    chosen = np.argsort(-size, axis=None, kind="stable")[:k]
    text, rank = np.unravel_index(chosen[size.flat[chosen] >= 0], size.shape)
    position, layer = (_rows(trace, name, texts)[text, rank] for name in ("top_position", "top_layer"))
    return np.asarray(text), position, layer


def _kept(trace: xr.Dataset, texts: pd.DataFrame) -> float:
    """The largest k for which a run's k largest values are certainly among those kept."""
    values = int((texts["stop"] - texts["start"]).max()) * trace.sizes["layer"] * trace.sizes["neuron"]
    return float("inf") if values <= trace.sizes["rank"] else trace.sizes["rank"]


def _layers(trace: xr.Dataset, own: pd.DataFrame) -> int:
    """How many layers a run adds to: a token's sums are NaN in the others."""
    return int(np.isfinite(trace["energy"][int(own["start"].iloc[0])].values).sum())


def _bin(position: np.ndarray, tokens: np.ndarray, bins: int) -> np.ndarray:
    """The bin that the middle of each token lies in, of a text whose tokens are equally wide."""
    return np.asarray((2 * position + 1) * bins // (2 * tokens)).astype(np.intp)


@dataclass(frozen=True)
class _Text:
    """One text: each token's energy, whether it was generated, its place, and how many of the run's largest values it has."""

    energy: np.ndarray
    is_generated: np.ndarray
    place: np.ndarray
    largest: dict[int, np.ndarray]


def _texts(trace: xr.Dataset, own: pd.DataFrame, without: int) -> Iterator[_Text]:
    numbers = own.index.to_numpy()
    counts: dict[int, list[np.ndarray]] = {}
    tokens = (own["stop"] - own["start"]).to_numpy()
    if "top_value" in trace:
        values = tokens.sum() * _layers(trace, own) * trace.sizes["neuron"]
        for k in LARGEST:
            if k <= _kept(trace, own) and 2 * k <= values:  # of all values, half are in the second halves by construction
                text, position, _ = _places(trace, numbers, k)
                counts[k] = [
                    np.bincount(position[text == row], minlength=size)[without:].astype(float)
                    for row, size in enumerate(tokens)
                ]
    for row, (start, stop) in enumerate(zip(own["start"], own["stop"], strict=True)):
        energy = np.nansum(trace["energy"][int(start) : int(stop)].values.astype(float), axis=1)
        new = trace["is_generated"][int(start) : int(stop)].values.astype(bool)
        turn = trace["turn"][int(start) : int(stop)].values if "turn" in trace.variables else np.full(len(new), -1)
        places = _places_of(new, turn)
        yield _Text(energy[without:], new[without:], places[without:], {k: values[row] for k, values in counts.items()})


def _places_of(is_generated: np.ndarray, turn: np.ndarray) -> np.ndarray:
    """Each token's place, of `PLACES`: empty in the reply after its opening, and everywhere where no message is known."""
    place = np.full(len(turn), "", dtype=object)
    if (turn < 0).all() or is_generated.all():
        return place
    place[:] = np.where(turn >= 0, "question", "template")
    place[is_generated] = np.where(np.cumsum(is_generated)[is_generated] <= OPENING, "opening", "")
    place[np.flatnonzero(~is_generated)[-1]] = "last"
    return place


@dataclass(frozen=True)
class _Found:
    """A statistic of one text: its value, expected value, and null draws (empty if token order does not matter)."""

    value: float
    null: float
    nulls: np.ndarray
    side: Side
    weight: float = 1.0  # of the text in the run's mean


def _of_text(text: _Text, permutations: int, rng: np.random.Generator) -> dict[str, _Found]:
    tokens = len(text.energy)
    share, order = _shares(text.energy, permutations, rng)
    found = {
        name: _Found(value, null, np.empty(0), "both")
        for name, value, null in zip(_SPREAD, _spread(share), (1.0, 0.0, 1 / tokens if tokens else np.nan), strict=True)
    }
    counted, reply = text.place != "", text.is_generated & (np.cumsum(text.is_generated) <= REPLY)
    for weights, own, drawn in (
        (_position_weights(text), share, order),
        (_place_weights(text.place[counted]), *_shares(text.energy[counted], permutations, rng)),
        ({"reply_centre_of_mass": _along(int(reply.sum()))}, *_shares(text.energy[reply], permutations, rng)),
    ):
        for name, weight in weights.items():
            null = float(weight.mean()) if len(weight) else float("nan")
            value = float(own @ weight) if len(weight) else float("nan")
            found[name] = _Found(value, null, own[drawn] @ weight, _PLACED[name])
    late = (np.sign(2 * np.arange(tokens) - (tokens - 1)) + 1) / 2  # 1 in the second half, 1/2 in the middle of an odd one
    for k, counts in text.largest.items():
        # Per text the number in its second half, to be divided by the run's whole number: a mean weighted by how many it has.
        number = counts.sum()
        of_token = counts / number if number else np.full(tokens, np.nan)
        found[f"late_share_{k}"] = _Found(float(of_token @ late), 0.5, of_token[order] @ late, "less", number)
    return found


def _shares(energy: np.ndarray, permutations: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Each token's share of the energy, and orders of the tokens ``[permutation, token]``."""
    total, tokens = energy.sum(), len(energy)
    share = energy / total if total > 0 else np.full(tokens, np.nan)
    return share, rng.permuted(np.broadcast_to(np.arange(tokens), (permutations, tokens)), axis=1)


def _spread(share: np.ndarray) -> tuple[float, float, float]:
    """Normalised entropy, Gini and the largest share, of shares that sum to 1."""
    tokens = len(share)
    if not tokens or not np.isfinite(share).all():
        return (float("nan"),) * 3
    if tokens == 1:
        return float("nan"), float("nan"), 1.0
    positive = share[share > 0]
    entropy = -(positive * np.log(positive)).sum() / np.log(tokens)
    return float(entropy), float(gini(share)), float(share.max())


def _position_weights(text: _Text) -> dict[str, np.ndarray]:
    """Statistics that are a weighted sum over tokens of the share of the energy; the weights' mean is what is expected."""
    tokens, prompt = len(text.energy), ~text.is_generated
    both = 0 < prompt.sum() < tokens
    first = np.zeros(tokens)
    first[:1] = 1.0
    return {
        "prompt_share": prompt / prompt.mean() if both else np.full(tokens, np.nan),
        "first_share": first,
        "centre_of_mass": _along(tokens),
    }


def _place_weights(place: np.ndarray) -> dict[str, np.ndarray]:
    """The same of the tokens' places; NaN for one that no token, or every token, is in."""
    found = {}
    for name in PLACES:
        share = np.mean(place == name) if len(place) else 0.0
        found[f"{name}_share"] = (place == name) / share if 0 < share < 1 else np.full(len(place), np.nan)
    return found


def _along(tokens: int) -> np.ndarray:
    """0 for the first token, 1 for the last."""
    return np.arange(tokens) / (tokens - 1) if tokens > 1 else np.full(tokens, np.nan)


def _of_run(
    label: dict[str, Any], keys: dict[str, Any], found: list[_Found], of_prompts: np.ndarray, weights: np.ndarray
) -> RunStatistic:
    """One statistic of a run: the weighted mean over its texts, those without a value left out.

    A prompt's value is put so that the mean over prompts is the run's: its weighted value over the mean weight.
    """
    there = np.array([np.isfinite(text.value) for text in found])
    size = np.array([text.weight for text in found]) * there
    prompts = weights.shape[1]

    def per_prompt(values: list[float]) -> np.ndarray:
        return np.bincount(of_prompts, np.where(there, values, 0.0) * size, minlength=prompts)

    value, null = per_prompt([text.value for text in found]), per_prompt([text.null for text in found])
    weight = per_prompt([1.0] * len(found))
    total = weight.sum()
    if not total:
        nothing = np.full(prompts, np.nan)
        return RunStatistic(
            **label, keys=keys, value=float("nan"), draws=np.full(len(weights), np.nan), n=0, per_prompt=nothing
        )

    def over(some: np.ndarray) -> tuple[float, np.ndarray]:
        under, drawn = weight[some].sum(), weights[:, some] @ weight[some]
        draws = (weights[:, some] @ value[some]) / np.where(drawn > 0, drawn, np.nan)
        return float(value[some].sum() / under) if under else float("nan"), draws

    drawn = weights @ weight
    # A text without any of the largest values counts: with a share of nothing.
    measured = np.bincount(of_prompts, [finite or not text.weight for text, finite in zip(found, there, strict=True)], prompts)
    kept = np.where(weight > 0, total / (weight > 0).sum(), np.nan)
    ordered = [text.nulls * size[row] for row, text in enumerate(found) if there[row] and len(text.nulls)]
    placed = len(ordered) > 0
    symmetric = keys["statistic"].startswith(("centre_of_mass", "reply_centre_of_mass", "late_share"))
    return RunStatistic(
        **label,
        keys=keys,
        value=float(value.sum() / total),
        draws=(weights @ value) / np.where(drawn > 0, drawn, np.nan),
        n=int((weight > 0).sum()),
        bounds=(0.0, np.inf if keys["statistic"] in _RATIOS else 1.0),
        null=float(null.sum() / total),
        nulls=np.sum(ordered, axis=0) / total if placed else None,
        test=TEST if placed else "",
        per_prompt=value / kept,
        null_per_prompt=null / kept if symmetric else None,
        flip="null" if symmetric else "" if placed else "untrained",
        side=found[0].side,
        there=measured > 0,
        over=over,
    )
