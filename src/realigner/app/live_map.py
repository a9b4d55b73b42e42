"""What IRMs add while they answer: token by token, as maps of layer by neuron index, in the report's own codes."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr

from realigner.analysis.mean_maps import leading_indices
from realigner.errors import UsageError
from realigner.report.quantize import encode, pack
from realigner.traces.layout import text_spans

MARKED = 5  # leading indices with a triangle


class LiveMap:
    """The deltas of one reply, as they are recorded.

    A *run* of the map is an IRM that acts; where several do, their sum comes first.

    Args:
        irms: IRM that acts -> the layers that it adds to.
        layers: of the map; those that no run adds to are empty.
        neurons: the width of the residual stream.
        word: token id -> its text.

    Attributes:
        id: a name that nobody guesses.
        layers: as the argument.
        trace: the recording, once the reply is over.
    """

    def __init__(
        self, irms: Mapping[str, Sequence[int]], layers: Sequence[int], neurons: int, word: Callable[[int], str]
    ) -> None:
        self.id = secrets.token_urlsafe(12)
        self.irms = list(irms)
        self.trace: xr.Dataset | None = None
        self.words: list[str] = []
        self.generated = 0  # the position of the first generated token
        self.layers, self._neurons, self._word = list(layers), neurons, word
        self._rows = {name: [self.layers.index(layer) for layer in own] for name, own in irms.items()}
        self._deltas: dict[str, list[np.ndarray]] = {name: [] for name in irms}  # a token each, [layer, neuron]
        self._lock = threading.RLock()
        self._taken = 0  # tokens that are in the sums
        shape = (len(layers), neurons)
        self._sums = {run: {kind: np.zeros(shape) for kind in ("signed", "absolute")} for run in self.runs}
        self._energy: dict[str, list[float]] = {run: [] for run in self.runs}
        self._limits: dict[str, list[float]] = {run: [] for run in self.runs}
        self._tops = dict.fromkeys(self.runs, 0.0)

    @property
    def runs(self) -> list[str]:
        """What there are maps of."""
        return [" + ".join(self.irms), *self.irms] if len(self.irms) > 1 else self.irms

    def add(self, irm: str, tokens: Mapping[str, np.ndarray], delta: torch.Tensor) -> None:
        """Take what an IRM added to some tokens (`traces.record`'s ``watch``)."""
        values = delta.cpu().numpy()
        if irm == self.irms[0]:
            words = [self._word(int(token)) for token in tokens["token_id"]]
            with self._lock:
                self.generated += int((~tokens["is_generated"]).sum())
                self.words += words
        with self._lock:
            self._deltas[irm] += list(values)

    def settle(self, trace: xr.Dataset) -> None:
        """Take the recording; from now on deltas are read from it."""
        if not trace.sizes:
            return
        spans = dict(zip(trace["text_run"].values.tolist(), text_spans(trace), strict=True))
        rows = {layer: at for at, layer in enumerate(trace["layer"].values.tolist())}
        whole = trace["delta"].values
        with self._lock:
            for name in self.irms:
                own = [rows[self.layers[row]] for row in self._rows[name]]
                values = whole[spans[name]]
                self._deltas[name] = list(values if own == list(range(len(rows))) else values[:, own])
            self.trace = trace

    @property
    def tokens(self) -> int:
        """How many tokens every IRM has reported."""
        with self._lock:
            return min(map(len, self._deltas.values()), default=0)

    def delta(self, run: str, position: int) -> np.ndarray:
        """What was added to a token ``[layer, neuron]``; NaN in layers that the run does not add to.

        Raises:
            UsageError: for a run or a token that is not there.
        """
        if run not in self.runs or not 0 <= position < self.tokens:
            raise UsageError(f"map: there is no token {position + 1} of {run!r}")
        found = np.zeros((len(self.layers), self._neurons), dtype=np.float32)
        there = np.zeros(len(self.layers), dtype=bool)
        for irm in [run] if run in self.irms else self.irms:
            found[self._rows[irm]] += self._deltas[irm][position]
            there[self._rows[irm]] = True
        found[~there] = np.nan
        return found

    def _take(self) -> None:
        """Bring the sums up to the newest token. The caller holds the lock."""
        for position in range(self._taken, self.tokens):
            for run in self.runs:
                delta = self.delta(run, position)
                size = abs(delta)
                self._sums[run]["signed"] += np.nan_to_num(delta)
                self._sums[run]["absolute"] += np.nan_to_num(size)
                known = size[np.isfinite(size)]
                self._energy[run].append(float(np.square(known, dtype=np.float64).sum()))
                self._limits[run].append(float(np.quantile(known, 0.999)) if known.size else 0.0)
                self._tops[run] = max(self._tops[run], float(known.max(initial=0.0)))
            self._taken = position + 1

    def means(self, run: str) -> dict[str, np.ndarray]:
        """A run's mean maps over all tokens so far: ``signed`` and ``absolute``, each ``[layer, neuron]``."""
        with self._lock:
            self._take()
            means = {kind: (total / max(1, self._taken)).astype(np.float32) for kind, total in self._sums[run].items()}
        for values in means.values():
            values[self.missing(run)] = np.nan
        return means

    def missing(self, run: str) -> list[int]:
        """The rows of the map that a run does not add to."""
        there = {row for irm in ([run] if run in self.irms else self.irms) for row in self._rows[irm]}
        return [row for row in range(len(self.layers)) if row not in there]

    def leading(self, run: str, count: int = MARKED) -> list[int]:
        """The indices that lead so far, as `analysis.leading_indices` ranks them."""
        coords = {"layer": self.layers, "neuron": np.arange(self._neurons)}
        table = leading_indices(xr.DataArray(self.means(run)["absolute"], coords, ("layer", "neuron")), count)
        return [int(index) for index in table["neuron"]]

    def picture(self, done: bool = False) -> dict[str, Any]:
        """What the page draws: words, energies and mean maps of every run, as JSON values."""
        with self._lock:
            self._take()
            runs = [self._shown(run) for run in self.runs] if self._taken else []
            words = self.words[: self._taken]
        return {"id": self.id, "words": words, "generated": self.generated, "runs": runs, "done": done}

    def _shown(self, run: str) -> dict[str, Any]:
        maps = self.means(run)
        return {
            "name": run,
            "marks": self.leading(run),
            "maps": [coded(maps[kind]) for kind in ("signed", "absolute")],
            "energy": [float(f"{energy:.3g}") for energy in self._energy[run]],
            "limit": float(np.mean(self._limits[run])),
            "top": self._tops[run],
            "missing": self.missing(run),
        }

    def token(self, run: str, position: int) -> dict[str, Any]:
        """One token's map, as JSON values."""
        return coded(self.delta(run, position))

    def largest(self, run: str, index: int, count: int = 5) -> list[dict[str, Any]]:
        """The tokens at which an index is largest: ``position``, ``word``, ``layer``, ``value``; one layer a token."""
        found: list[dict[str, Any]] = []
        for position in range(self.tokens):
            column = np.nan_to_num(self.delta(run, position)[:, index])
            row = int(abs(column).argmax())
            found.append({"position": position, "layer": self.layers[row], "value": float(column[row])})
        found.sort(key=lambda one: -abs(one["value"]))
        return [{**one, "word": self.words[one["position"]]} for one in found[:count]]


def coded(values: np.ndarray) -> dict[str, Any]:
    """A map in 8 bits a value, gzip and base64, and what `report/js/data.js` reads it with."""
    codes, how = encode(values, 8)
    return {"data": pack(codes), **how}
