"""A trace run by run: the sums of each run's texts, its mean map M, its untrained twin, and each index's leading score.

A trace may be larger than memory, so texts are read one run at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from realigner.errors import UsageError
from realigner.traces.layout import PARTS, UNTRAINED, text_spans

CHOSEN_PARTS = PARTS.index("opening") + 1  # M is a mean over the prompt and the first 10 generated tokens


@dataclass(frozen=True)
class RunTexts:
    """The deltas of one run, text by text, in the layers that its IRM adds to.

    Attributes:
        run, tone, seed: the run.
        layers: labels of its layers.
        neurons: labels of the indices.
        sums: ``[text, layer, neuron]``, the sum of |delta| over the prompt and the first 10 generated tokens.
        counts: ``[text]``, the number of those tokens.
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
        """M ``[layer, neuron]``: the mean of |delta| over those tokens.

        Zeros, and one layer at least, without any layer or token, or with values that are not finite.
        """
        if not len(self.layers) or not self.counts.sum() or not np.isfinite(self.sums).all():
            return np.zeros((max(1, len(self.layers)), len(self.neurons)))
        return mean_over_tokens(self.sums, self.counts)


def mean_over_tokens(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The mean over all tokens of several texts ``[layer, neuron]``.

    Args:
        sums: each text's sum over its tokens ``[text, layer, neuron]``.
        counts: each text's tokens ``[text]``.
    """
    return np.asarray(sums.sum(axis=0, dtype=float) / max(1.0, float(counts.sum())))


def text_sums(trace: xr.Dataset, texts: np.ndarray, name: str, parts: int) -> tuple[np.ndarray, np.ndarray]:
    """One of a trace's reductions over the first parts of some texts, read text by text.

    Args:
        name: ``sum``, ``sum_abs`` or ``sum_sq`` (summed over parts), or ``max_abs`` (the largest).
        parts: how many of `traces.layout.PARTS`, from the first on.

    Returns:
        ``[text, layer, neuron]``, and the number of tokens ``[text]``.
    """
    reduce = np.max if name == "max_abs" else np.sum
    values = [reduce(trace[name][int(text), :parts].values, axis=0) for text in texts]
    return np.stack(values), trace["count"].values[texts, :parts].sum(axis=1).astype(float)


def text_table(trace: xr.Dataset) -> pd.DataFrame:
    """A row per text: ``run, tone, seed, prompt``, and ``start, stop``, its place on the token axis.

    Raises:
        UsageError: if this is not a trace, or it has no texts.
    """
    missing = [name for name in ("text_run", "text_tone", "text_seed", "text_prompt", "count") if name not in trace.variables]
    if missing:
        raise UsageError(f"analysis: not a trace ({missing[0]!r} is missing); give what ra.record or load_trace returned")
    if not trace.sizes["text"]:
        raise UsageError("analysis: the trace has no texts; record at least one prompt")
    spans = text_spans(trace)
    return pd.DataFrame(
        {
            "run": [str(run) for run in trace["text_run"].values],
            "tone": [str(tone) for tone in trace["text_tone"].values],
            "seed": trace["text_seed"].values.astype(int),
            "prompt": trace["text_prompt"].values.astype(int),
            "start": [span.start for span in spans],
            "stop": [span.stop for span in spans],
        }
    )


def split_by_run(texts: pd.DataFrame) -> Iterator[tuple[dict[str, Any], pd.DataFrame]]:
    """Each run's ``run, tone, seed``, and its rows of a `text_table`."""
    for run, own in texts.groupby("run", sort=False):
        yield {"run": str(run), "tone": str(own["tone"].iloc[0]), "seed": int(own["seed"].iloc[0])}, own


def table_of(source: xr.Dataset | xr.DataArray) -> pd.DataFrame:
    """The `text_table` of a trace, or that of `text_maps`, which has no places.

    Raises:
        UsageError: for anything else.
    """
    if not isinstance(source, xr.DataArray):
        return text_table(source)
    missing = [name for name in ("run", "tone", "seed", "prompt", "count") if name not in source.coords]
    if missing or "text" not in source.dims:
        raise UsageError("analysis: these maps have no texts; give a trace, or what text_maps(trace) returned")
    return pd.DataFrame({key: source[key].values for key in ("run", "tone", "seed", "prompt")})


def each_run(source: xr.Dataset | xr.DataArray) -> Iterator[RunTexts]:
    """The runs of a trace, or of `text_maps` of kind ``absolute``, one by one, each in the layers that it has.

    Raises:
        UsageError: for anything else.
    """
    texts = table_of(source)
    for label, own in split_by_run(texts):
        numbers = own.index.to_numpy()
        if isinstance(source, xr.DataArray):
            counts = source["count"].values[numbers].astype(float)
            sums = source.transpose("text", "layer", "neuron").isel(text=numbers).values * counts[:, None, None]
        else:
            sums, counts = text_sums(source, numbers, "sum_abs", CHOSEN_PARTS)
        there = ~np.isnan(sums).all(axis=(0, 2))
        yield RunTexts(
            **label,
            layers=source["layer"].values[there],
            neurons=source["neuron"].values,
            sums=sums[:, there],
            counts=counts,
            prompts=own["prompt"].to_numpy().astype(int),
        )


def twins(source: xr.Dataset | xr.DataArray) -> dict[str, str]:
    """Trained run -> its untrained twin, if it has one: the first untrained run of the same seed, layers and network.

    Args:
        source: a trace, or `text_maps`.

    Raises:
        UsageError: for anything else.
    """
    shapes: dict[str, tuple[int, str, bytes]] = {}
    facts = source.attrs.get("runs", {})
    tones: dict[str, str] = {}
    for label, own in split_by_run(table_of(source)):
        if isinstance(source, xr.DataArray):
            first = source.transpose("text", "layer", "neuron")[int(own.index[0])].values[:, 0]
        else:  # a token's sums are NaN in the layers that its run does not add to
            first = source["energy"][int(own["start"].iloc[0])].values
        network = str(facts.get(label["run"], {}).get("network", ""))
        shapes[label["run"]] = label["seed"], network, np.isnan(first).tobytes()
        tones[label["run"]] = label["tone"]
    untrained = {shapes[run]: run for run in reversed(shapes) if tones[run] == UNTRAINED}
    return {run: untrained[shape] for run, shape in shapes.items() if tones[run] != UNTRAINED and shape in untrained}


def layer_scale(magnitude: np.ndarray) -> np.ndarray:
    """The median of each layer of M ``[..., layer, neuron]``, by which layers are made comparable, ``[..., layer, 1]``.

    1 for a layer whose median is 0.
    """
    median = np.median(magnitude, axis=-1, keepdims=True)
    return np.asarray(np.where(median > 0, median, 1.0))


def leading_score(magnitude: np.ndarray) -> np.ndarray:
    """The relative magnitude of each index ``[neuron]``: M over its layer's median, averaged over layers.

    Dividing by the layer's median keeps one layer of large deltas from dominating.

    Args:
        magnitude: M ``[layer, neuron]`` without NaN. Without layers the score is 0.
    """
    return np.asarray((magnitude / layer_scale(magnitude)).sum(axis=-2) / max(1, magnitude.shape[-2]))


def prompts_of(source: xr.Dataset | xr.DataArray) -> np.ndarray:
    """The sorted numbers of all prompts in a trace or in `text_maps`."""
    name = "prompt" if isinstance(source, xr.DataArray) else "text_prompt"
    return np.unique(source[name].values).astype(int) if name in source.coords else np.empty(0, dtype=int)
