"""Layer x neuron maps of a trace, and the neuron indices with the largest values in them."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pandas as pd
import xarray as xr

from realigner.analysis.per_run import CHOSEN_PARTS, leading_score, mean_over_tokens, text_sums
from realigner.errors import UsageError
from realigner.traces.layout import OPENING, PARTS

FIRST_GENERATED = OPENING  # the paper's Figure 2 averages over the prompt and the first 10 generated tokens
Kind = Literal["absolute", "signed", "rms", "max"]

_SUMS = {"absolute": "sum_abs", "signed": "sum", "rms": "sum_sq", "max": "max_abs"}
_PARTS: dict[int | None, int] = {0: 1, FIRST_GENERATED: CHOSEN_PARTS, None: len(PARTS)}
_RUN = ("run", "tone", "seed")


def text_maps(trace: xr.Dataset, kind: Kind = "absolute", generated: int | None = FIRST_GENERATED) -> xr.DataArray:
    """A map ``[text, layer, neuron]`` of each text, from a trace's summaries; for traces whose summaries fit into memory.

    Args:
        trace: see `traces.layout`.
        kind: ``absolute``: the mean of |delta| (M in docs/statistics.md); ``signed``: the mean of delta, as in the paper's
            Figure 2, in which values of opposite sign cancel; ``rms``: the root of the mean of delta^2; ``max``: the largest
            |delta|.
        generated: how many generated tokens of each text count beside its prompt: 10 (the paper's choice), 0, or None: all.

    Returns:
        The maps, with the coordinates ``run``, ``tone``, ``seed``, ``prompt`` and ``count`` (tokens) on ``text``.

    Raises:
        UsageError: for another `kind` or `generated`.

    Example:
        >>> text_maps(trace).dims  # doctest: +SKIP
        ('text', 'layer', 'neuron')
    """
    name, parts = _reduction(kind, generated)
    values, count = text_sums(trace, np.arange(trace.sizes["text"]), name, parts)
    maps = values if kind == "max" else values / np.maximum(count, 1)[:, None, None]
    coords = {"layer": trace["layer"].values, "neuron": trace["neuron"].values}
    labels: dict[str, Any] = {key: ("text", trace[f"text_{key}"].values) for key in (*_RUN, "prompt")}
    labels["count"] = ("text", count.astype(int))
    maps = np.sqrt(maps) if kind == "rms" else maps
    attributes = {"runs": trace.attrs.get("runs", {})}  # by which `per_run.twins` knows their networks
    return xr.DataArray(maps, coords, ("text", "layer", "neuron"), attrs=attributes).assign_coords(labels)


def run_maps(trace: xr.Dataset, kind: Kind = "absolute", generated: int | None = FIRST_GENERATED) -> xr.DataArray:
    """A map ``[run, layer, neuron]`` of each run over the tokens of all its texts; read text by text.

    Args:
        trace, kind, generated: see `text_maps`.

    Returns:
        The maps, in the order of the trace's runs, with the coordinates ``tone`` and ``seed`` on ``run``.

    Example:
        >>> leading_indices(run_maps(trace).sel(run="anger-42"), count=3)  # doctest: +SKIP
    """
    name, parts = _reduction(kind, generated)
    runs = trace["text_run"].values
    names = list(dict.fromkeys(runs.tolist()))
    maps = []
    for run in names:
        values, count = text_sums(trace, np.flatnonzero(runs == run), name, parts)
        pooled = values.max(axis=0) if kind == "max" else mean_over_tokens(values, count)
        maps.append(np.sqrt(pooled) if kind == "rms" else pooled)
    coords = {"run": names, "layer": trace["layer"].values, "neuron": trace["neuron"].values}
    first = [int(np.flatnonzero(runs == run)[0]) for run in names]
    labels = {key: ("run", trace[f"text_{key}"].values[first]) for key in ("tone", "seed")}
    return xr.DataArray(np.stack(maps), coords, ("run", "layer", "neuron")).assign_coords(labels)


def _reduction(kind: Kind, generated: int | None) -> tuple[str, int]:
    """The trace's variable and the number of parts that a map is made of."""
    if kind not in _SUMS:
        raise UsageError(f"maps: kind={kind!r}; choose {', '.join(_SUMS)}")
    if generated not in _PARTS:
        raise UsageError(f"maps: generated={generated!r}; summaries have 0, {FIRST_GENERATED} and None (all)")
    return _SUMS[kind], _PARTS[generated]


def leading_indices(magnitude: xr.DataArray, count: int = 10) -> pd.DataFrame:
    """The neuron indices with the largest relative magnitude (`leading_score`).

    Args:
        magnitude: M ``[layer, neuron]``, the mean of |delta|.
        count: how many indices.

    Raises:
        UsageError: for a map of several runs.

    Returns:
        One row per index, largest first: ``neuron``; ``ratio`` (mean over layers of M over the layer's median);
        ``layers_in_top`` (in how many layers it is among that layer's `count` largest); ``layers`` (of how many). No rows
        where no layer has numbers.
    """
    if "run" in magnitude.dims:
        if magnitude.sizes["run"] != 1:
            raise UsageError("leading_indices: choose one run, e.g. magnitude.sel(run=...)")
        magnitude = magnitude.isel(run=0)
    magnitude = magnitude.dropna("layer", how="all")  # layers that another run has and this one does not
    values = magnitude.transpose("layer", "neuron").values.astype(float)
    score = leading_score(values)
    top = np.argsort(-score, kind="stable")[: count if len(values) else 0]
    ranks = (-values).argsort(axis=1, kind="stable").argsort(axis=1, kind="stable")
    return pd.DataFrame(
        {
            "neuron": magnitude["neuron"].values[top],
            "ratio": score[top],
            "layers_in_top": (ranks[:, top] < count).sum(axis=0),
            "layers": len(values),
        }
    )
