"""Sparsity: are a token's deltas concentrated in few neurons?

Statistics are computed for each token, of a layer's values over neurons and (``layer="all"``) of all layers together, then
averaged over a text's tokens and over prompts.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import numpy as np
import pandas as pd
import xarray as xr

from realigner.analysis.per_run import prompts_of, split_by_run, text_table, twins
from realigner.analysis.resampling import check_draws, mean_of_some, prompt_weights, weighted_mean
from realigner.analysis.tables import ALL, RunStatistic, tabulate

STATISTICS = ("hoyer", "gini", "participation", "kurtosis", "small_share")
_CHUNK = 16  # tokens in a chunk of a trace
_VALUES = 1 << 21  # read at once, if a chunk has no more: 16 tokens of 32 x 4096


def sparsity(trace: xr.Dataset, permutations: int = 1000, resamples: int = 1000, seed: int = 0) -> pd.DataFrame:
    """Every run's sparsity, layer by layer and over all layers.

    Args:
        trace: a trace. The Gini coefficient needs raw deltas, which are read once, a few tokens at a time; it is NaN without.
        permutations: flips of signs that p-values are taken from.
        resamples: bootstrap resamples of prompts.
        seed: of all draws.

    Raises:
        UsageError: when this is no trace, or for fewer than one draw.

    Returns:
        A row per run, statistic and ``layer`` (a label, or ``all``: over layers and neurons together), and rows ``run="all"``;
        columns as in `tabulate`. ``null`` is what Gaussian noise gives. Of n values:

        - ``hoyer``: (sqrt(n) - l1 / l2) / (sqrt(n) - 1); 0 all alike, 1 a single one (Hoyer 2004).
        - ``gini`` of the absolute values; 0 all alike, 1 - 1/n a single one.
        - ``participation``: (sum v^2)^2 / (n sum v^4), the share of values that take part; small is sparse.
        - ``kurtosis``: its inverse, n sum v^4 / (sum v^2)^2, about zero and not about the mean; 3 for Gaussian noise.
        - ``small_share``: the share of ``|v|`` < 1e-4, the paper's; it depends on the scale, and has no null.

        p (two-sided) is from flipping the signs of the differences from the untrained twin, prompt by prompt; over all runs,
        from exchanging values between a twin and the runs trained from it, prompt by prompt. NaN without a twin, and with fewer
        than 5 prompts. Tokens without energy do not count; with one neuron Hoyer is NaN.

    Example:
        >>> sparsity(trace).query("layer == 'all'")  # doctest: +SKIP
    """
    check_draws(permutations, resamples)
    rng = np.random.default_rng(seed)
    texts, prompts = text_table(trace), prompts_of(trace)
    weights = prompt_weights(len(prompts), resamples, rng)
    layers = [*trace["layer"].values.tolist(), ALL]
    entries: list[RunStatistic] = []
    for label, own in split_by_run(texts):
        found = _per_prompt(trace, own, prompts)
        value = weighted_mean(found, np.ones((1, len(prompts))))[0]
        draws = weighted_mean(found, weights) if np.isfinite(weights).all() else np.full((resamples, *value.shape), np.nan)
        there = np.isfinite(found).sum(axis=0)
        has = np.append(there[:-1].any(axis=1), True)
        null = _of_noise(trace.sizes["neuron"], int(has[:-1].sum()))
        for at, layer in enumerate(layers):
            for which, statistic in enumerate(STATISTICS):
                if has[at]:
                    entries.append(
                        RunStatistic(
                            **label,
                            keys={"statistic": statistic, "layer": layer},
                            value=float(value[at, which]),
                            draws=draws[:, at, which],
                            n=int(there[at, which]),
                            bounds=(0.0, np.inf if statistic == "kurtosis" else 1.0),
                            null=null[layer == ALL][which],
                            per_prompt=found[:, at, which],
                            flip="untrained",
                            side="both",
                            there=np.isfinite(found[:, at, which]),
                            over=partial(mean_of_some, found[:, at, which], weights),
                        )
                    )
    return tabulate(entries, twins(trace), permutations, rng)


def _per_prompt(trace: xr.Dataset, own: pd.DataFrame, prompts: np.ndarray) -> np.ndarray:
    """Of each prompt, the mean over its tokens ``[prompt, layer and all, statistic]``; NaN where the run has nothing."""
    shape = (len(prompts), trace.sizes["layer"] + 1, len(STATISTICS))
    total, count = np.zeros(shape), np.zeros(shape)
    for prompt, start, stop in zip(own["prompt"], own["start"], own["stop"], strict=True):
        at = np.searchsorted(prompts, prompt)
        values = _of_tokens(trace, int(start), int(stop))
        there = np.isfinite(values)
        total[at] += np.where(there, values, 0.0).sum(axis=0)
        count[at] += there.sum(axis=0)
    return np.asarray(np.divide(total, count, out=np.full(shape, np.nan), where=count > 0))


def _of_tokens(trace: xr.Dataset, start: int, stop: int) -> np.ndarray:
    """Every statistic of a text's tokens ``[token, layer and all, statistic]``."""
    energy, l1, l4, small = (trace[name][start:stop].values.astype(float) for name in ("energy", "l1", "l4", "small"))
    missing = np.isnan(energy)
    small = np.where(missing, np.nan, small)
    n = np.where(missing, 0, trace.sizes["neuron"])
    # [token, layer] and, last, the sum over layers that are there.
    energy, l1, l4, n, small = (
        np.concatenate([values, np.nansum(values, axis=1, keepdims=True)], axis=1) for values in (energy, l1, l4, n, small)
    )
    some, root = (energy > 0) & (l4 > 0), np.sqrt(n)

    def ratio(over: np.ndarray, under: np.ndarray, where: np.ndarray = some) -> np.ndarray:
        return np.asarray(np.divide(over, under, out=np.full(energy.shape, np.nan), where=where))

    hoyer = ratio(root - ratio(l1, np.sqrt(energy)), root - 1, some & (n > 1))
    ginis = _ginis(trace, start, stop) if "delta" in trace else np.full(energy.shape, np.nan)
    participation, kurtosis = ratio(energy**2, n * l4), ratio(n * l4, energy**2)
    return np.stack([hoyer, ginis, participation, kurtosis, ratio(small, n.astype(float), n > 0)], axis=-1)


def _ginis(trace: xr.Dataset, start: int, stop: int) -> np.ndarray:
    """Gini of ``|delta|`` over neurons, and, last, over layers and neurons ``[token, layer and all]``.

    Blocks end where a trace's chunks do, so that each chunk is read once.
    """
    block = _CHUNK * max(1, _VALUES // (_CHUNK * trace.sizes["layer"] * trace.sizes["neuron"]))
    edges = [start, *range((start // block + 1) * block, stop, block), stop]
    found = []
    for first, last in pairwise(edges):
        size = np.abs(trace["delta"][first:last].values)
        whole = size[:, ~np.isnan(size).all(axis=(0, 2))]
        found.append(np.concatenate([gini(size), gini(whole.reshape(len(size), whole[0].size))[:, None]], axis=1))
    return np.concatenate(found)


def gini(size: np.ndarray) -> np.ndarray:
    """The Gini coefficient of non-negative values along the last axis; NaN where they are all 0, or any is NaN.

    With values in order, v_1 <= ... <= v_n: 2 sum(i v_i) / (n sum v_i) - (n + 1) / n.
    """
    n = size.shape[-1]
    if not n:
        return np.full(size.shape[:-1], np.nan)
    if size.dtype == np.float16:  # without a sign they sort as 16-bit numbers do: by radix, six times faster
        ordered = np.sort(size.view(np.uint16), axis=-1, kind="stable").view(np.float16).astype(np.float32)
    else:
        ordered = np.sort(size, axis=-1)
    total = ordered.sum(axis=-1, dtype=float)
    placed = (ordered @ np.arange(1, n + 1, dtype=ordered.dtype)).astype(float)
    some = total > 0  # NaN is not
    return np.asarray(2 * np.divide(placed, n * total, out=np.full(total.shape, np.nan), where=some) - (n + 1) / n)


def _of_noise(neurons: int, layers: int) -> dict[bool, list[float]]:
    """What Gaussian noise gives, of a layer's values and (True) of all layers': Hoyer, Gini, participation, kurtosis."""
    found = {}
    for whole in (False, True):
        n = neurons * (layers if whole else 1)
        hoyer = float((np.sqrt(n) - np.sqrt(2 * n / np.pi)) / (np.sqrt(n) - 1)) if n > 1 else float("nan")
        found[whole] = [hoyer, float(np.sqrt(2) - 1), 1 / 3, 3.0, float("nan")]
    return found
