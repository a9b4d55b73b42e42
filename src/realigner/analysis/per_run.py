"""A trace seen run by run: each run's texts, its untrained twin, and which of its indices stand out.

A trace may be larger than memory, so one run's texts are read at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
import xarray as xr

from realigner.errors import UsageError

UNTRAINED = "untrained"  # the tone of a baseline
_CHOSEN = slice(0, 2)  # parts: the prompt and the first 10 generated tokens, which M is the mean over


@dataclass(frozen=True)
class RunTexts:
    """What one run added, text by text, in the layers that it has.

    Attributes:
        run, tone, seed: whose.
        layers: labels of its layers.
        neurons: labels of the indices.
        sums: ``[text, layer, neuron]``, the sum of |delta| over the chosen tokens.
        counts: ``[text]``, how many tokens those are.
        prompts: ``[text]``, the prompt's number.
    """

    run: str
    tone: str
    seed: int
    layers: np.ndarray
    neurons: np.ndarray
    sums: np.ndarray
    counts: np.ndarray
    prompts: np.ndarray

    def mean(self) -> np.ndarray:
        """M ``[layer, neuron]``: the mean over all chosen tokens.

        Without any layer or token, or with values that are not finite, there is nothing to measure: one layer of zeros.
        """
        tokens = self.counts.sum()
        if not len(self.layers) or not tokens or not np.isfinite(self.sums).all():
            return np.zeros((1, len(self.neurons)))
        return np.asarray(self.sums.sum(axis=0, dtype=float) / tokens)


def text_table(trace: xr.Dataset) -> pd.DataFrame:
    """A row per text: ``run, tone, seed, prompt``, and ``start, stop``, its place on the token axis.

    Raises:
        UsageError: when this is no trace of ours, or it has no texts.
    """
    missing = [name for name in ("text_run", "text_tone", "text_seed", "text_prompt", "count") if name not in trace.variables]
    if missing:
        raise UsageError(f"analysis: not a trace ({missing[0]!r} is missing); give what ra.record or load_trace returned")
    if not trace.sizes["text"]:
        raise UsageError("analysis: the trace has no texts; record at least one prompt")
    stop = np.cumsum(trace["count"].values.sum(axis=1)).astype(int)
    return pd.DataFrame(
        {
            "run": [str(run) for run in trace["text_run"].values],
            "tone": [str(tone) for tone in trace["text_tone"].values],
            "seed": trace["text_seed"].values.astype(int),
            "prompt": trace["text_prompt"].values.astype(int),
            "start": np.append(0, stop[:-1]),
            "stop": stop,
        }
    )


def each_run(source: xr.Dataset | xr.DataArray) -> Iterator[RunTexts]:
    """One run after the other, of a trace or of `text_maps` of kind ``absolute``.

    Layers that a run does not have are left out of what it gives.

    Raises:
        UsageError: for anything else.
    """
    if isinstance(source, xr.DataArray):
        missing = [name for name in ("run", "tone", "seed", "prompt", "count") if name not in source.coords]
        if missing or "text" not in source.dims:
            raise UsageError("analysis: these maps have no texts; give a trace, or what text_maps(trace) returned")
        texts = pd.DataFrame({key: source[key].values for key in ("run", "tone", "seed", "prompt")})
    else:
        texts = text_table(source)
    for run, own in texts.groupby("run", sort=False):
        sums, counts = _sums(source, own.index.to_numpy())
        there = ~np.isnan(sums).all(axis=(0, 2))
        yield RunTexts(
            run=str(run),
            tone=str(own["tone"].iloc[0]),
            seed=int(own["seed"].iloc[0]),
            layers=source["layer"].values[there],
            neurons=source["neuron"].values,
            sums=sums[:, there],
            counts=counts,
            prompts=own["prompt"].to_numpy().astype(int),
        )


def _sums(source: xr.Dataset | xr.DataArray, texts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if isinstance(source, xr.DataArray):
        counts = source["count"].values[texts].astype(float)
        maps = source.transpose("text", "layer", "neuron").isel(text=texts).values
        return maps * counts[:, None, None], counts
    values = [source["sum_abs"][int(text), _CHOSEN].values.sum(axis=0) for text in texts]
    return np.stack(values), source["count"].values[texts, _CHOSEN].sum(axis=1).astype(float)


def baselines(runs: pd.DataFrame) -> dict[str, str]:
    """The untrained run of the same seed, of every trained run that has one; the first where there are several.

    Args:
        runs: columns ``run, tone, seed``.
    """
    untrained = runs[runs["tone"] == UNTRAINED].drop_duplicates("seed").set_index("seed")["run"]
    trained = runs[(runs["tone"] != UNTRAINED) & runs["seed"].isin(untrained.index)]
    return {str(run): str(untrained[seed]) for run, seed in zip(trained["run"], trained["seed"], strict=True)}


def layer_scale(magnitude: np.ndarray) -> np.ndarray:
    """What each layer of M ``[..., layer, neuron]`` is divided by to be on one footing, ``[..., layer, 1]``: its median.

    1 for a layer whose median is 0.
    """
    median = np.median(magnitude, axis=-1, keepdims=True)
    return np.asarray(np.where(median > 0, median, 1.0))


def leading_score(magnitude: np.ndarray) -> np.ndarray:
    """How far each index stands out, ``[neuron]``: M over its layer's median, averaged over layers.

    Layers are put on one footing first, so that one loud layer does not decide.

    Args:
        magnitude: M ``[layer, neuron]`` without NaN. Without layers the score is 0.
    """
    return np.asarray((magnitude / layer_scale(magnitude)).sum(axis=-2) / max(1, magnitude.shape[-2]))


def prompts_of(source: xr.Dataset | xr.DataArray) -> np.ndarray:
    """The numbers of all prompts that any run answered, in order; of a trace or of `text_maps`."""
    name = "prompt" if isinstance(source, xr.DataArray) else "text_prompt"
    return np.unique(source[name].values).astype(int) if name in source.coords else np.empty(0, dtype=int)
