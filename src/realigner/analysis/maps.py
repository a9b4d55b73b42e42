"""Layer x neuron maps of a trace, and the neuron indices that lead in them."""

from __future__ import annotations

import numpy as np
import pandas as pd
import xarray as xr

from realigner.errors import UsageError

FIRST_GENERATED = 10  # the paper's Figure 2 averages over the prompt and the first 10 generated tokens


def chosen_tokens(trace: xr.Dataset, generated: int | None = FIRST_GENERATED) -> xr.Dataset:
    """The tokens statistics are taken over: each prompt's own and its first `generated` ones (all when None)."""
    if generated is None:
        return trace
    prompt, position = trace["prompt"].values, trace["position"].values
    new = trace["is_generated"].values.astype(bool)
    starts = pd.Series(position[new]).groupby(prompt[new]).min()
    rank = position - pd.Series(prompt).map(starts).fillna(0).to_numpy()
    return trace.isel(token=np.flatnonzero(~new | (rank < generated)))


def mean_map(trace: xr.Dataset, absolute: bool = False, generated: int | None = FIRST_GENERATED) -> xr.DataArray:
    """Mean delta ``[run, layer, neuron]`` over the chosen tokens.

    Args:
        trace: a trace as `traces.record` makes it.
        absolute: mean of |delta| (M of docs: magnitudes) instead of the signed mean of the paper's Figure 2, in which
            values of opposite sign cancel.
        generated: how many generated tokens of each prompt count; None for all.

    Example:
        >>> mean_map(trace).dims  # doctest: +SKIP
        ('run', 'layer', 'neuron')
    """
    delta = chosen_tokens(trace, generated)["delta"]
    return (abs(delta) if absolute else delta).mean("token")


def leading_indices(magnitude: xr.DataArray, count: int = 10) -> pd.DataFrame:
    """The neuron indices with the largest mean magnitude over layers.

    Layers are put on one footing first: each layer's magnitudes are divided by that layer's median, so that one loud layer
    does not decide.

    Args:
        magnitude: M ``[layer, neuron]``, the mean of |delta|.
        count: how many indices.

    Raises:
        UsageError: for a map of several runs.

    Returns:
        One row an index, largest first: ``neuron``; ``ratio`` (mean over layers of M over the layer's median);
        ``layers_in_top`` (in how many layers it is among that layer's `count` largest); ``layers`` (of how many).
    """
    if "run" in magnitude.dims:
        if magnitude.sizes["run"] != 1:
            raise UsageError("leading_indices: choose one run, e.g. magnitude.sel(run=...)")
        magnitude = magnitude.isel(run=0)
    magnitude = magnitude.dropna("layer", how="all")  # layers that another run has and this one does not
    values = magnitude.transpose("layer", "neuron").values.astype(float)
    median = np.median(values, axis=1, keepdims=True)
    relative = values / np.where(median > 0, median, 1.0)
    score = relative.mean(axis=0)
    top = np.argsort(-score, kind="stable")[:count]
    ranks = (-values).argsort(axis=1, kind="stable").argsort(axis=1, kind="stable")
    return pd.DataFrame(
        {
            "neuron": magnitude["neuron"].values[top],
            "ratio": score[top],
            "layers_in_top": (ranks[:, top] < count).sum(axis=0),
            "layers": len(values),
        }
    )
