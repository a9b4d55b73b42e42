"""The pages of the leading indices: profiles over layers, and the tokens at which they are largest."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from realigner.analysis import Consensus
from realigner.explain.explanation import Explanation
from realigner.report.charts import fmt
from realigner.report.explanation_section import index_summary
from realigner.report.page_tables import charted
from realigner.report.run_styles import RunStyles
from realigner.traces.layout import text_spans

_MOST_PAGES = 40


def index_pages(
    trace: xr.Dataset,
    agreed: Consensus | None,
    runs: RunStyles,
    maps: Mapping[str, xr.DataArray],
    leading: Mapping[str, pd.DataFrame],
    marks: Mapping[str, Sequence[int]],
    explained: Sequence[Explanation] = (),
) -> list[dict[str, Any]]:
    """A page for each leading index of a trained run, by the number of runs; then for other explained indices."""
    place = {run: {int(index): at for at, index in enumerate(table["neuron"], 1)} for run, table in leading.items()}
    candidates = {index for run in runs.trained for index in marks[run]}

    def order(index: int) -> tuple[float, float]:
        ranks = [place[run].get(index, 10**6) for run in runs.trained]
        return -sum(rank <= 10 for rank in ranks), sum(ranks)

    chosen = sorted(candidates, key=order)[:_MOST_PAGES]
    chosen = list(dict.fromkeys([*chosen, *(index for item in explained for index in item.pages)]))
    tokens = _largest_tokens(trace, chosen)
    pages = []
    for index in chosen:
        rows: list[dict[str, Any]] = [
            {
                "run": run,
                "colour": runs.colour(run),
                "rank": place[run].get(index, 0),
                "ratio": float(leading[run]["ratio"].iloc[place[run][index] - 1]) if index in place[run] else math.nan,
                "tokens": tokens.get((run, index), []),
            }
            for run in runs.names
        ]
        own = None if agreed is None else agreed.indices[agreed.indices["neuron"] == index]
        pages.append(
            {
                "index": index,
                "leads": sum(row["rank"] == 1 for row in rows if row["run"] in runs.trained),
                "top": sum(0 < row["rank"] <= 10 for row in rows if row["run"] in runs.trained),
                "of": len(runs.trained),
                "agreement": None if own is None or own.empty else own.iloc[0].to_dict(),
                "rows": rows,
                "host": index_summary(explained, index),
                "profiles": [_profile(runs, maps[kind], index, kind) for kind in ("absolute", "signed")],
            }
        )
    return pages


def _profile(runs: RunStyles, maps: xr.DataArray, index: int, kind: str) -> dict[str, Any]:
    """An index through the layers; each run over the root mean square of its map, so that runs of different size compare."""
    layers = maps["layer"].values.tolist()
    lines = []
    for run in runs.names:
        values = maps.sel(run=run, neuron=index).values
        typical = np.sqrt(np.nanmean(np.square(maps.sel(run=run).values))) or 1.0
        lines.append(runs.line(run, layers, (values / typical).tolist()))
    name = "mean |delta|" if kind == "absolute" else "mean delta"
    title = f"Index {index} through the layers: {name} of each run over the root mean square of the run's map"
    return {"kind": kind, **charted(lines, "layer", f"{name} / map's RMS", title, kind == "absolute")}


def _largest_tokens(trace: xr.Dataset, indices: Sequence[int], most: int = 5) -> dict[tuple[str, int], list[dict[str, Any]]]:
    """For each run and index, the tokens at which it is largest, from each text's largest values; one layer a token."""
    spans = text_spans(trace)
    words, generated = trace["token_text"].values, trace["is_generated"].values
    found = []
    for text, run in enumerate(trace["text_run"].values.tolist()):
        neurons = trace["top_neuron"][text].values
        at = np.flatnonzero(np.isin(neurons, indices))
        names = ("top_value", "top_position", "top_layer")
        columns: dict[str, Any] = {name: trace[name][text].values[at] for name in names}
        found.append(pd.DataFrame(columns | {"run": run, "text": text, "neuron": neurons[at]}))
    table = pd.concat(found)
    table = table.iloc[np.argsort(-table["top_value"].abs().to_numpy(), kind="stable")]
    table = table.drop_duplicates(["run", "neuron", "text", "top_position"])
    # What comes before the question is the same in every prompt, and so are its deltas: such tokens are shown once.
    table["rounded"] = [float(f"{value:.3g}") for value in table["top_value"]]
    same = ["run", "neuron", "top_position", "rounded"]
    table["times"] = table.groupby(same)["text"].transform("size")
    table = table.drop_duplicates(same)
    chosen: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for (run, neuron), own in table.groupby(["run", "neuron"], sort=False):
        for row in own.head(most).to_dict("records"):
            text = int(row["text"])
            start, stop = spans[text].start, spans[text].stop
            here = start + int(row["top_position"])
            what = "reply" if generated[here] else "prompt"
            times, prompt = int(row["times"]), int(trace["text_prompt"].values[text]) + 1
            chosen.setdefault((str(run), int(str(neuron))), []).append(
                {
                    "before": "".join(map(str, words[max(start, here - 4) : here])),
                    "token": str(words[here]),
                    "after": "".join(map(str, words[here + 1 : min(stop, here + 4)])),
                    "where": f"in {times} prompts alike" if times > 1 else f"{what} {prompt}",
                    "layer": int(row["top_layer"]),
                    "value": fmt(float(row["top_value"])),
                }
            )
    return chosen
