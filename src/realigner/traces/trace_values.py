"""Range checks on a trace's numbers, so that nothing out of range is silently analysed.

Labels, the sums of tokens and the largest values are checked when a trace is loaded; what is large (deltas, h0, the sums by
neuron) when it is read. A number is NaN where the text's run does not add to the layer, and only there.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import xarray as xr
from xarray.backends import BackendArray
from xarray.core import indexing

from realigner.dialogues import prompt_of
from realigner.errors import RealignerError
from realigner.traces import layout

_BLOCK = 1 << 22  # values looked at together
_NEVER_NEGATIVE = (*layout.TOKEN_SUMS, "sum_abs", "sum_sq", "max_abs")
_FACTS: dict[str, Any] = {"tone": str, "seed": int, "strength": (int, float), "irm": str, "sha256": str}


def check_attributes(path: Path, trace: xr.Dataset) -> dict[str, Any]:
    """A trace's attributes, the JSON among them parsed.

    Raises:
        RealignerError: naming the attribute that is not what it should be.
    """
    found = dict(trace.attrs)
    for key in ("runs", "notes"):
        try:
            found[key] = json.loads(found[key])
        except (KeyError, TypeError, ValueError, RecursionError):
            found[key] = None
        if not isinstance(found[key], dict):
            raise RealignerError(f"{path}: attribute {key!r} is not a JSON object in a string; record it again")
    if not isinstance(found.get("host"), str):
        raise RealignerError(f"{path}: attribute 'host' is not a string; record it again")
    for run, given in found["runs"].items():
        facts: dict[str, Any] = given if isinstance(given, dict) else {}
        for key, kind in _FACTS.items():
            value = facts.get(key)
            if not isinstance(value, kind) or isinstance(value, bool) or (key == "strength" and not math.isfinite(value)):
                raise RealignerError(f"{path}: attribute 'runs': {run!r}: {key!r} is missing or not what it should be")
        if facts.get("untrained") is not (facts["tone"] == layout.UNTRAINED):
            raise RealignerError(f"{path}: attribute 'runs': {run!r}: 'untrained' is missing or not what its tone says")
    notes = found["notes"]
    for key in ("base", "base_questions"):
        if not isinstance(notes.get(key, []), list) or not all(isinstance(text, str) for text in notes.get(key, [])):
            raise RealignerError(f"{path}: attribute 'notes': {key!r} is not a list of strings")
    if not isinstance(notes.get("prompts", []), list):
        raise RealignerError(f"{path}: attribute 'notes': 'prompts' is not a list")
    for number, prompt in enumerate(notes.get("prompts", []), start=1):
        if not isinstance(prompt, str):
            prompt_of(prompt, f"{path}: attribute 'notes': prompt {number}")
    if not isinstance(notes.get("settings", {}), dict):
        raise RealignerError(f"{path}: attribute 'notes': 'settings' is not a JSON object")
    return found


def checked(path: Path, trace: xr.Dataset) -> xr.Dataset:
    """The trace, its labels and small arrays checked, its large ones to be checked as they are read.

    Args:
        path: for messages.
        trace: its texts' tokens and no more; labels in memory.

    Raises:
        RealignerError: naming the array, and the text or token, that is not what it should be.
    """
    _check_axes(path, trace)
    lengths = trace["count"].values.sum(axis=1)
    _check_labels(path, trace, lengths)
    silent = _check_token_sums(path, trace, lengths)
    _check_largest(path, trace, lengths)
    large: dict[str, np.ndarray] = dict.fromkeys(layout.TEXT_SUMS, silent[:, None, :, None])
    if "delta" in trace:
        large["delta"] = np.repeat(silent, lengths, axis=0)[:, :, None]
    if "h0" in trace:
        large["h0"] = np.zeros((1, 1), dtype=bool)
    for name, missing in large.items():
        variable = trace[name].variable
        lazy = indexing.LazilyIndexedArray(_WhileRead(path, name, variable, missing))
        trace[name] = xr.Variable(variable.dims, lazy, variable.attrs, variable.encoding)
    return trace


class _WhileRead(BackendArray):
    """An array whose numbers are checked as they are read.

    Args:
        missing: where it is NaN, in its own shape, with one for all along some of the axes.
    """

    def __init__(self, path: Path, name: str, variable: xr.Variable, missing: np.ndarray) -> None:
        self.path, self.name, self.variable, self.missing = path, name, variable, missing
        self.shape, self.dtype = variable.shape, variable.dtype

    def __getitem__(self, key: indexing.ExplicitIndexer) -> Any:
        return indexing.explicit_indexing_adapter(key, self.shape, indexing.IndexingSupport.OUTER, self._read)

    def _read(self, key: tuple[Any, ...]) -> np.ndarray:
        values: np.ndarray = self.variable[key].values
        missing = self.missing
        for axis in reversed(range(len(key))):
            number = isinstance(key[axis], int | np.integer)
            chosen = key[axis] if missing.shape[axis] > 1 else 0 if number else slice(None)
            missing = missing[(slice(None),) * axis + (chosen,)]
        bad = _first_unfit(values, missing, self.name in _NEVER_NEGATIVE)
        if bad is not None:
            rest = iter(bad)
            chosen = [np.arange(size)[at] for size, at in zip(self.shape, key, strict=True)]
            place = [int(numbers if numbers.ndim == 0 else numbers[next(rest)]) for numbers in chosen]
            _refuse(self.path, self.name, values[bad], self.variable.dims, place)
        return values


def _first_unfit(values: np.ndarray, missing: np.ndarray, is_size: bool, most: float = math.inf) -> tuple[np.intp, ...] | None:
    """Where the first number is that is infinite, NaN for no reason or none for no reason, too large, or a negative size."""
    least = 0 if is_size else -math.inf
    if not values.size:
        return None
    if not missing.any() and _all_finite(values) and (not is_size or (values.min() >= least and values.max() <= most)):
        return None
    bad = (np.isfinite(values) == missing) | np.isinf(values) | (values > most) | (values < least)
    return np.unravel_index(int(bad.argmax()), bad.shape) if bad.any() else None


def _all_finite(values: np.ndarray) -> bool:
    if values.dtype != np.float16:
        return bool(np.isfinite(values).all())
    return bool((values.view(np.uint16) & 0x7C00).max() < 0x7C00)  # its exponent; numpy's own way takes four times as long


def _refuse(path: Path, name: str, value: Any, dims: Sequence[Any], place: Sequence[Any]) -> NoReturn:
    where = ", ".join(f"{dim} {int(number)}" for dim, number in zip(dims, place, strict=True))
    raise RealignerError(f"{path}: {name} is {value!s} at {where}; record it again")


def _check_axes(path: Path, trace: xr.Dataset) -> None:
    layers = trace["layer"].values
    wrong = {
        "part": trace["part"].values.tolist() != list(layout.PARTS),
        "neuron": not np.array_equal(trace["neuron"].values, np.arange(trace.sizes["neuron"])),
        "layer": bool((layers < 0).any() or (np.diff(layers) <= 0).any()),
    }
    for name, is_wrong in wrong.items():
        if is_wrong:
            raise RealignerError(f"{path}: {name} is not the numbers or names of a trace's {name}s in order; record it again")
    if (trace["count"].values < 0).any():
        counts = trace["count"].values
        place = np.unravel_index(int(counts.argmin()), counts.shape)
        _refuse(path, "count", counts[place], trace["count"].dims, place)


def _check_labels(path: Path, trace: xr.Dataset, lengths: np.ndarray) -> None:
    runs = trace.attrs["runs"]
    for at, run in enumerate(trace["text_run"].values.tolist()):
        if run not in runs:
            raise RealignerError(f"{path}: text_run is {run!r} at text {at}, which is none of its runs; record it again")
        for key in ("tone", "seed"):
            if trace[f"text_{key}"].values[at] != runs[run][key]:
                found = trace[f"text_{key}"].values.tolist()[at]
                raise RealignerError(
                    f"{path}: text_{key} is {found!r} at text {at}, its run's is {runs[run][key]!r}; record it again"
                )
        if (prompt := int(trace["text_prompt"].values[at])) < 0:
            raise RealignerError(f"{path}: text_prompt is {prompt} at text {at}; record it again")
        if lengths[at] < 1:
            raise RealignerError(f"{path}: count is 0 at text {at}: it has no token; record it again")
    text = np.repeat(np.arange(len(lengths)), lengths)
    begin = np.cumsum(lengths) - lengths
    generated = trace["is_generated"].values
    wrong = {
        "token_id": trace["token_id"].values < -1,
        "turn": trace["turn"].values < -1,
        "role": (trace["role"].values == "") != (trace["turn"].values == -1),
        "position": trace["position"].values != np.arange(len(text)) - begin[text],
    }
    wrong |= {key: trace[key].values != trace[f"text_{key}"].values[text] for key in ("run", "tone", "seed", "prompt")}
    for name, bad in wrong.items():
        if bad.any():
            at = int(bad.argmax())
            _refuse(path, name, repr(trace[name].values.tolist()[at]), ("token", "text"), (at, text[at]))
    for at, (start, length) in enumerate(zip(begin, lengths, strict=True)):
        parts = np.bincount(layout.parts_of(generated[start : start + length]), minlength=len(layout.PARTS))
        if not np.array_equal(parts, trace["count"].values[at]):
            raise RealignerError(f"{path}: is_generated does not fit count at text {at}; record it again")


def _check_token_sums(path: Path, trace: xr.Dataset, lengths: np.ndarray) -> np.ndarray:
    """Check the sums over neurons; returns which layers each text's run does not add to ``[text, layer]``."""
    text = np.repeat(np.arange(len(lengths)), lengths)
    begin = np.cumsum(lengths) - lengths
    silent = np.empty((len(lengths), trace.sizes["layer"]), dtype=bool)
    by_run: dict[str, np.ndarray] = {}
    for at, run in enumerate(trace["text_run"].values.tolist()):
        silent[at] = np.isnan(trace["energy"][int(begin[at])].values) if run not in by_run else by_run[run]
        by_run.setdefault(run, silent[at])
    for block in _blocks(len(text), trace.sizes["layer"]):
        for name in layout.TOKEN_SUMS:
            values = trace[name][block].values
            most = trace.sizes["neuron"] if name == "small" else math.inf
            bad = _first_unfit(values, silent[text[block]], True, most)
            if bad is not None:
                token, layer = bad[0] + block.start, int(trace["layer"].values[bad[1]])
                _refuse(path, name, values[bad], ("token", "text", "layer"), (token, text[token], layer))
    return silent


def _check_largest(path: Path, trace: xr.Dataset, lengths: np.ndarray) -> None:
    for block in _blocks(trace.sizes["text"], trace.sizes["rank"]):
        values = {name: trace[name][block].values for name in layout.TOPS}
        wrong = {
            "top_value": np.isinf(values["top_value"]),
            "top_position": (values["top_position"] < -1) | (values["top_position"] >= lengths[block][:, None]),
            "top_layer": ~np.isin(values["top_layer"], np.append(trace["layer"].values, -1)),
            "top_neuron": (values["top_neuron"] < -1) | (values["top_neuron"] >= trace.sizes["neuron"]),
        }
        missing = np.isnan(values["top_value"])
        for name, bad in wrong.items():
            bad = bad | ((values[name] == -1) != missing if name != "top_value" else False)
            if bad.any():
                text, rank = np.unravel_index(int(bad.argmax()), bad.shape)
                _refuse(path, name, values[name][text, rank], ("text", "rank"), (text + block.start, rank))


def _blocks(rows: int, width: int) -> Iterator[slice]:
    """Rows by and by."""
    step = max(1, _BLOCK // max(1, width))
    for start in range(0, rows, step):
        yield slice(start, min(rows, start + step))
