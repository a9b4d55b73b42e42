"""Turns: do deltas keep their size from reply to reply in a conversation?

Each of the assistant's messages is a reply; its value is a mean over the tokens of its content. The null discards the order of
a conversation's replies: which of them counts as first and which as last is drawn at random.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd
import xarray as xr

from realigner.analysis.per_run import split_by_run, text_table, twins
from realigner.analysis.resampling import check_draws, mean_of_some, mean_over_first, prompt_weights, weighted_mean
from realigner.analysis.tables import ALL, RunStatistic, tabulate
from realigner.traces.layout import UNTRAINED

STATISTICS = ("energy", "size")
LAST = "last"  # the reply of the rows that hold a conversation's last reply against its first
TEST = "which reply is the first and which the last, drawn anew in each conversation"


def turns(trace: xr.Dataset, permutations: int = 1000, resamples: int = 1000, seed: int = 0) -> pd.DataFrame:
    """What each run adds to the first reply of a conversation, the second and so on, and how the last compares with the first.

    Only texts count whose conversation has two replies or more, the recorded one included; a reply without a token does not
    count.

    Args:
        trace: a trace whose tokens have their turn and role (`traces.layout`).
        permutations: draws of the order of replies that p-values are taken from.
        resamples: bootstrap resamples of prompts.
        seed: of all draws.

    Raises:
        UsageError: when this is no trace, or for fewer than one draw.

    Returns:
        Empty where no text has two replies. Else rows per run, statistic and ``reply``, and rows ``run="all"``; columns as in
        `tabulate`, and ``tokens``, how many a value is taken from.

        - ``energy``, for reply 1, 2, ...: a token's sum of delta^2 over layers and neurons, averaged over the reply's tokens,
            then over prompts.
        - ``size``: in the same way, a token's mean ``|delta|`` over layers and neurons.
        - ``energy_ratio``, ``size_ratio``, with reply ``last``: a conversation's last reply over its first, the geometric mean
            over prompts; null 1, p one-sided for "less" from drawing anew which replies of a conversation are the first and the
            last (for all runs together). NaN where a reply has no energy at all.

    Example:
        >>> turns(trace).query("statistic == 'energy_ratio'")  # doctest: +SKIP
    """
    check_draws(permutations, resamples)
    texts = text_table(trace)
    of_texts = dict(_replies(trace, texts))
    if not of_texts:
        return pd.DataFrame()
    rng = np.random.default_rng(seed)
    prompts = np.unique(texts["prompt"].to_numpy()[list(of_texts)])
    weights = prompt_weights(len(prompts), resamples, rng)
    pairs = rng.random((2, permutations, len(prompts)))
    entries: list[RunStatistic] = []
    tokens: dict[tuple[str, int | str], int] = {}
    for label, own in split_by_run(texts):
        talks = [
            (int(np.searchsorted(prompts, prompt)), of_texts[at]) for at, prompt in own["prompt"].items() if at in of_texts
        ]
        if not talks:
            continue
        values = _by_reply(talks, len(prompts))
        for nth in range(values.shape[1]):
            tokens[label["run"], nth + 1] = sum(int(talk.tokens[nth]) for _, talk in talks if nth < len(talk.tokens))
            for which, statistic in enumerate(STATISTICS):
                of_prompts = values[:, nth, which]
                entries.append(
                    RunStatistic(
                        **label,
                        keys={"statistic": statistic, "reply": nth + 1},
                        value=float(mean_over_first(of_prompts)),
                        draws=weighted_mean(of_prompts, weights),
                        n=int(np.isfinite(of_prompts).sum()),
                        bounds=(0.0, np.inf),
                        per_prompt=of_prompts,
                        there=np.isfinite(of_prompts),
                        over=partial(mean_of_some, of_prompts, weights),
                    )
                )
        tokens[label["run"], LAST] = sum(int(talk.tokens[[0, -1]].sum()) for _, talk in talks)
        change, nulls = _last_over_first(talks, pairs)
        for which, statistic in enumerate(STATISTICS):
            logs = change[:, which]
            entries.append(
                RunStatistic(
                    **label,
                    keys={"statistic": f"{statistic}_ratio", "reply": LAST},
                    value=float(np.exp(mean_over_first(logs))),
                    draws=np.exp(weighted_mean(logs, weights)),
                    n=int(np.isfinite(logs).sum()),
                    bounds=(0.0, np.inf),
                    null=1.0,
                    nulls=np.exp(nulls[:, which]),
                    joint=True,
                    test=TEST,
                    side="less",
                    there=np.isfinite(logs),
                    over=partial(_ratio_of_some, logs, weights),
                )
            )
    table = tabulate(entries, twins(trace), permutations, rng)
    trained = set(table["run"][~table["tone"].isin([UNTRAINED, ALL])])
    return table.assign(
        tokens=[
            sum(tokens.get((one, reply), 0) for one in (trained if run == ALL else {run}))
            for run, reply in zip(table["run"], table["reply"], strict=True)
        ]
    )


def _ratio_of_some(logs: np.ndarray, weights: np.ndarray, prompts: np.ndarray) -> tuple[float, np.ndarray]:
    """The geometric mean over some prompts, and its bootstrap draws."""
    value, draws = mean_of_some(logs, weights, prompts)
    return float(np.exp(value)), np.exp(draws)


@dataclass(frozen=True)
class _Talk:
    """The replies of one text, in order.

    Attributes:
        values: `STATISTICS`, a mean over each reply's tokens ``[reply, statistic]``.
        tokens: of each reply ``[reply]``.
    """

    values: np.ndarray
    tokens: np.ndarray


def _replies(trace: xr.Dataset, texts: pd.DataFrame) -> Iterator[tuple[int, _Talk]]:
    """The texts that have two replies or more, by their numbers."""
    if not {"turn", "role"} <= {*trace.variables}:
        return
    is_reply = trace["role"].values == "assistant"
    turn = trace["turn"].values
    for at, start, stop in zip(texts.index, texts["start"], texts["stop"], strict=True):
        span = slice(int(start), int(stop))
        mine = is_reply[span]
        numbers, place, count = np.unique(turn[span][mine], return_inverse=True, return_counts=True)
        if len(numbers) < 2:
            continue
        energy, size = (trace[name][span].values.astype(float)[mine] for name in ("energy", "l1"))
        layers = max(1, int(np.isfinite(energy).any(axis=0).sum()))
        of_tokens = np.nansum(energy, axis=1), np.nansum(size, axis=1) / (layers * trace.sizes["neuron"])
        yield int(at), _Talk(np.stack([np.bincount(place, values) / count for values in of_tokens], axis=1), count)


def _by_reply(talks: list[tuple[int, _Talk]], prompts: int) -> np.ndarray:
    """The values of each prompt's replies ``[prompt, reply, statistic]``; NaN where it has no such reply."""
    shape = (prompts, max(len(talk.tokens) for _, talk in talks), len(STATISTICS))
    total, count = np.zeros(shape), np.zeros(shape)
    for prompt, talk in talks:
        total[prompt, : len(talk.tokens)] += talk.values
        count[prompt, : len(talk.tokens)] += 1
    return np.asarray(np.divide(total, count, out=np.full(shape, np.nan), where=count > 0))


def _last_over_first(talks: list[tuple[int, _Talk]], pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The log of the last reply over the first of each prompt ``[prompt, statistic]``, and its mean in each draw.

    Args:
        talks: a run's texts by prompt.
        pairs: uniform numbers ``[2, draw, prompt]``, from which two different replies of each conversation are drawn.
    """
    draws, prompts = pairs.shape[1:]
    total, count = np.zeros((prompts, len(STATISTICS))), np.zeros(prompts)
    drawn = np.zeros((draws, len(STATISTICS)))
    with np.errstate(divide="ignore"):
        logs = [(prompt, np.log(talk.values)) for prompt, talk in talks if (talk.values > 0).all()]
    texts = np.bincount([prompt for prompt, _ in logs], minlength=prompts)
    for prompt, values in logs:
        first = (pairs[0, :, prompt] * len(values)).astype(int)
        last = (pairs[1, :, prompt] * (len(values) - 1)).astype(int)
        last += last >= first
        total[prompt] += values[-1] - values[0]
        count[prompt] += 1
        drawn += (values[last] - values[first]) / texts[prompt]
    there = int((texts > 0).sum())
    change = np.divide(total, count[:, None], out=np.full(total.shape, np.nan), where=count[:, None] > 0)
    return change, drawn / there if there else np.full(drawn.shape, np.nan)
