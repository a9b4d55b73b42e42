"""Streaming reductions of deltas, in memory that does not grow with the text (except for a few numbers per token).

The deltas of several forwards are gathered, then reduced together, so that a decoding step costs one copy. Everything is
computed on the deltas' device; only results are moved.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from realigner.errors import UsageError
from realigner.traces.layout import PARTS, SMALL, TEXT_SUMS, TOKEN_SUMS, Summary, parts_of

_GATHERED = 1 << 20  # values gathered before they are reduced: 4 MiB in float32, which fits a CPU cache
_MOST = 16  # forwards gathered at most
_SAMPLED = 16  # one in so many values is looked at to guess a bound


class DeltaSums:
    """Running sums of deltas over tokens, where the deltas are.

    Attributes:
        count: tokens seen.
        sum, sum_abs, sum_sq, max_abs: of delta ``[layer, neuron]``; a plain 0 before the first token.
    """

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        self.dtype, self.count = dtype, 0
        self.sum: Any = 0.0
        self.sum_abs: Any = 0.0
        self.sum_sq: Any = 0.0
        self.max_abs: Any = 0.0

    def add(self, delta: torch.Tensor, size: torch.Tensor | None = None, square: torch.Tensor | None = None) -> None:
        """Add tokens ``[token, layer, neuron]``; `size` and `square` are their magnitudes and squares, if at hand."""
        delta = delta.to(self.dtype)
        size = delta.abs() if size is None else size
        self.count += len(delta)
        self.sum += delta.sum(0)
        self.sum_abs += size.sum(0)
        self.sum_sq += (delta.square() if square is None else square).sum(0)
        largest = size.amax(0)
        self.max_abs = torch.maximum(self.max_abs, largest) if isinstance(self.max_abs, torch.Tensor) else largest

    def mean(self, name: str = "sum_abs") -> np.ndarray:
        """A running sum divided by `count` ``[layer, neuron]``; by default M, the mean of ``|delta|``."""
        return np.asarray((getattr(self, name) / self.count).cpu().numpy())


@dataclass
class _Row:
    """One text's state."""

    generated: int = 0
    seen: int = 0
    shape: tuple[int, int] = (0, 0)  # layers, neurons
    parts: list[DeltaSums] = field(default_factory=lambda: [DeltaSums(torch.float32) for _ in PARTS])
    tokens: dict[str, list[torch.Tensor]] = field(default_factory=lambda: {key: [] for key in TOKEN_SUMS})
    top: list[torch.Tensor] = field(default_factory=list)  # candidates for the largest values, signed
    place: list[torch.Tensor] = field(default_factory=list)  # (position * layers + layer) * neurons + neuron
    candidates: int = 0
    bound: torch.Tensor | None = None  # values up to it are not among the largest


class BatchSummary:
    """Reduces the deltas of one IRM over the texts of one batch.

    Args:
        rows: texts in the batch.
        top: how many of the largest values to keep of each text.
    """

    def __init__(self, rows: int, top: int) -> None:
        if top < 1:
            raise UsageError(f"top: {top} values are kept of each text; give 1 or more")
        self.top = top
        self.rows = [_Row() for _ in range(rows)]
        self._waiting: list[tuple[torch.Tensor, np.ndarray, np.ndarray]] = []
        self._values = 0

    def add(self, delta: torch.Tensor, rows: np.ndarray, is_generated: np.ndarray) -> None:
        """Add the deltas of one forward at real tokens.

        Args:
            delta: ``[token, layer, neuron]``, rows after each other, positions in order within a row.
            rows: each token's row.
            is_generated: whether it was generated.
        """
        self._waiting.append((delta, rows, is_generated))
        self._values += delta.numel()
        if self._values >= _GATHERED or len(self._waiting) >= _MOST:
            self._reduce()

    def _reduce(self) -> None:
        if not self._waiting:
            return
        waiting, rows, generated = zip(*self._waiting, strict=True)
        rows, generated = np.concatenate(rows), np.concatenate(generated)
        deltas = torch.cat(waiting) if len(waiting) > 1 else waiting[0]
        self._waiting, self._values = [], 0
        for number, row in enumerate(self.rows):
            (chosen,) = np.nonzero(rows == number)
            if len(chosen):
                alone = len(chosen) == len(rows)
                own = deltas if alone else deltas[torch.as_tensor(chosen, device=deltas.device)]
                self._reduce_row(row, own, generated[chosen])

    def _reduce_row(self, row: _Row, delta: torch.Tensor, generated: np.ndarray) -> None:
        """Tokens of one row, in order, ``[token, layer, neuron]``."""
        delta = delta.float()
        row.shape = (delta.shape[1], delta.shape[2])
        size, square = delta.abs(), delta.square()
        row.tokens["energy"].append(square.sum(-1))
        row.tokens["l1"].append(size.sum(-1))
        row.tokens["l4"].append(square.square().sum(-1))
        row.tokens["small"].append((size < SMALL).sum(-1, dtype=torch.float32))
        parts = parts_of(generated, row.generated)
        row.generated += int(generated.sum())
        for part in np.unique(parts):
            (at,) = np.nonzero(parts == part)
            where = slice(int(at[0]), int(at[-1]) + 1)  # parts follow each other, so these are neighbours
            row.parts[part].add(delta[where], size[where], square[where])
        self._keep_largest(row, delta.flatten(), size.flatten())
        row.seen += len(delta)

    def _keep_largest(self, row: _Row, values: torch.Tensor, size: torch.Tensor) -> None:
        """Add values that may be among the row's largest to its candidates; prune these when there are twice too many."""
        offset = row.seen * row.shape[0] * row.shape[1]
        bound, sample = row.bound, size[::_SAMPLED]
        wanted = round(1.3 * self.top / _SAMPLED) + 10
        if bound is None and len(size) >= 4 * self.top and wanted <= len(sample):
            # A bound that at least `top` of the values exceed, from a sample; it may fail.
            guess = sample.topk(wanted).values[-1]
            bound = guess if int((size > guess).sum()) >= self.top else None
        at = torch.nonzero(size > bound)[:, 0] if bound is not None else torch.arange(len(size), device=size.device)
        row.top.append(values[at])
        row.place.append(at + offset)
        row.candidates += len(at)
        if row.candidates >= 2 * self.top:
            self._sort_out(row)

    def _sort_out(self, row: _Row) -> None:
        """Keep the largest candidates, in order; nothing up to the smallest of them can be among them any more."""
        values, place = torch.cat(row.top), torch.cat(row.place)
        size, chosen = values.abs().topk(min(self.top, len(values)))
        row.top, row.place, row.candidates = [values[chosen]], [place[chosen]], len(chosen)
        if len(chosen) == self.top:
            row.bound = size[-1]

    def results(self) -> list[Summary | None]:
        """Each text's summary, in numpy; None for a row that had no token."""
        self._reduce()
        return [self._result(row) if row.seen else None for row in self.rows]

    def _result(self, row: _Row) -> Summary:
        self._sort_out(row)
        (values,), (places,) = row.top, row.place
        layers, neurons = row.shape
        place, empty = places.cpu().numpy(), self.top - len(values)
        position, within = np.divmod(place, layers * neurons)
        layer, neuron = np.divmod(within, neurons)

        def padded(values: np.ndarray, kind: type, missing: float) -> np.ndarray:
            return np.pad(values.astype(kind), (0, empty), constant_values=missing)

        def over_part(part: DeltaSums, key: str) -> np.ndarray:
            return getattr(part, key).cpu().numpy() if part.count else np.zeros(row.shape, dtype=np.float32)

        return Summary(
            count=np.array([part.count for part in row.parts], dtype=np.int64),
            text_sums={key: np.stack([over_part(part, key) for part in row.parts]) for key in TEXT_SUMS},
            token_sums={key: torch.cat(values).cpu().numpy() for key, values in row.tokens.items()},
            top_value=padded(values.cpu().numpy(), np.float32, np.nan),
            top_position=padded(position, np.int32, -1),
            top_layer=padded(layer, np.int32, -1),
            top_neuron=padded(neuron, np.int32, -1),
        )


def summarise(delta: np.ndarray, is_generated: np.ndarray, top: int, block: int | None = None) -> Summary:
    """The summary of one whole text ``[token, layer, neuron]`` (an imported one), `block` tokens at a time."""
    batch = BatchSummary(1, top)
    block = block or max(1, _GATHERED // max(1, delta[0].size))
    for start in range(0, len(delta), block):
        part = torch.as_tensor(np.ascontiguousarray(delta[start : start + block]))
        batch.add(part, np.zeros(len(part), dtype=np.int64), is_generated[start : start + block])
    (result,) = batch.results()
    assert result is not None  # a text has tokens
    return result
