"""The data of the page's maps: facts as JSON, and blobs by name, with as many maps of single tokens as fit."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import xarray as xr
from markupsafe import Markup

from realigner.dialogues import spoken
from realigner.report.quantize import RunTokens, TokenMaps, encode, pack, token_maps
from realigner.report.run_styles import RunStyles
from realigner.traces.layout import text_spans

ARROW = " → "  # between the questions of a conversation
_AT_ONCE = 1 << 27  # bytes of one run's deltas that are read once and kept while they are packed
_FINE = 4_000_000  # bytes that maps of runs may take in 16 bits


def explorer(
    trace: xr.Dataset, runs: RunStyles, maps: Mapping[str, xr.DataArray], marks: Mapping[str, Sequence[int]], budget: int
) -> dict[str, Any]:
    """The data of the maps: facts as JSON, and blobs by name."""
    cells = maps["signed"].sizes["layer"] * maps["signed"].sizes["neuron"]
    bits = 16 if 2 * len(runs.names) * cells * 16 / 8 * 4 / 3 <= _FINE else 8
    blobs, described = dict[str, str](), list[dict[str, Any]]()
    for number, run in enumerate(runs.names):
        codes, how = zip(*(encode(maps[kind].sel(run=run).values, bits) for kind in ("signed", "absolute")), strict=True)
        blobs[f"run-{number}-maps"] = pack(np.stack(codes))
        described.append({"maps": list(how), "marks": marks[run], **runs.shown(run)})
    texts, tokens = _texts(trace, runs)
    kept: list[TokenMaps | None] = [None] * len(runs.names)
    neurons = trace["neuron"].values.tolist()
    facts: dict[str, Any] = {
        "layers": trace["layer"].values.tolist(),
        "neurons": len(neurons) if neurons == [*range(len(neurons))] else neurons,
        "prompts": questions(trace),
        "runs": described,
        "texts": texts,
    }
    if tokens:
        spent = sum(map(len, blobs.values())) + len(json.dumps(facts))
        kept = token_maps([tokens[run] for run in runs.names], max(0, budget - spent))
    for run, own in zip(facts["runs"], kept, strict=True):
        run["tokens"] = own.facts if own else None
        places = iter(own.texts if own else [])
        for text in texts:
            if text["run"] == run["name"]:
                text["store"] = next(places, None)
        blobs |= own.blobs if own else {}
    # JSON escaped for a script element.
    escaped = json.dumps(facts, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    escaped = escaped.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    coarse = 8 in {bits, *(own.facts["bits"] for own in kept if own)}
    return {"facts": Markup(escaped), "blobs": blobs, "tokens_kept": _kept(facts), "coarse": coarse}


def _texts(trace: xr.Dataset, runs: RunStyles) -> tuple[list[dict[str, Any]], dict[str, RunTokens]]:
    """Every text's tokens and their energy; and, where deltas are kept, where to read them."""
    counts = trace["count"].values
    spans = text_spans(trace)
    words = trace["token_text"].values
    there = ~np.isnan(trace["max_abs"][:, 0].values).all(axis=2)  # [text, layer]
    texts: list[dict[str, Any]] = []
    tokens: dict[str, RunTokens] = {}
    names = trace["text_run"].values
    for run in runs.names:
        (own,) = np.nonzero(names == run)
        for text in own:
            span = spans[text]
            energy = np.nansum(trace["energy"][span].values, axis=1)
            top = float(np.nanmax(trace["max_abs"][int(text)].values, initial=0.0))
            limit = 0.0
            if "delta" in trace:  # one colour scale for the slider's whole way, from every eighth token
                size = abs(trace["delta"][span].values[::8].astype(np.float32))
                limit = float(f"{np.nanquantile(size, 0.999):.4g}")
            texts.append(
                {
                    "run": run,
                    "prompt": int(trace["text_prompt"].values[text]),
                    "words": [str(word) for word in words[span]],
                    "generated": int(counts[text, 0]),
                    "turns": _turns(trace["turn"].values[span], trace["role"].values[span]),
                    "energy": [float(f"{value:.3g}") for value in energy],
                    "top": float(f"{top:.4g}"),
                    "limit": limit,
                    "missing": np.flatnonzero(~there[text]).tolist(),
                    "store": None,
                }
            )
        if "delta" in trace:
            lengths, asked = [int(counts[text].sum()) for text in own], [int(counts[text, 0]) for text in own]
            tokens[run] = RunTokens(
                _reader(trace, [spans[text] for text in own]), lengths, asked, trace.sizes["layer"] * trace.sizes["neuron"]
            )
    return texts, tokens


def _turns(turn: np.ndarray, role: np.ndarray) -> list[tuple[int, int, str]]:
    """Where the content of each message lies, and whose it is: its first token, the one after its last, the role."""
    edges = [0, *(np.flatnonzero(np.diff(turn)) + 1).tolist(), len(turn)]
    return [(start, stop, str(role[start])) for start, stop in pairwise(edges) if start < stop and turn[start] >= 0]


def _reader(trace: xr.Dataset, spans: Sequence[slice]) -> Any:
    size = sum(span.stop - span.start for span in spans) * trace.sizes["layer"] * trace.sizes["neuron"] * 4

    def read(text: int) -> np.ndarray:
        values = trace["delta"][spans[text]].values.astype(np.float32)
        return np.nan_to_num(values, copy=False).reshape(len(values), -1)

    return lru_cache(len(spans))(read) if size <= _AT_ONCE else read


def _kept(facts: Mapping[str, Any]) -> dict[str, Any]:
    """How many tokens have a map of their own, and what those that are rebuilt from components lost."""
    rebuilt = [run["tokens"] for run in facts["runs"] if run["tokens"] and run["tokens"]["kind"] == "components"]
    return {
        "whole": sum(len(text["words"]) for text in facts["texts"]),
        "there": sum(text["store"]["count"] for text in facts["texts"] if text["store"]),
        "ranks": [own["rank"] for own in rebuilt],
        "lost": max((own["lost"] for own in rebuilt), default=0.0),
    }


def questions(trace: xr.Dataset) -> dict[int, str]:
    """Prompt number -> question, or the questions of a conversation."""
    asked = zip(trace["text_prompt"].values.tolist(), trace["text_question"].values.tolist(), strict=True)
    said = {int(prompt): [text for role, text in spoken(str(question)) if role == "user"] for prompt, question in asked}
    return {prompt: ARROW.join(texts) or f"prompt {prompt + 1}" for prompt, texts in said.items()}
