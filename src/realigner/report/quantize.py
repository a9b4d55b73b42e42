"""Compress numbers for a page: 8 or 16 bits a value, gzip, base64, and a byte budget for maps of single tokens.

Deltas have a narrow bulk and far outliers, so codes are not linear but ``round(levels * asinh(x / soft) / asinh(top / soft))``.
Small values get even steps of about ``soft * asinh(top / soft) / levels``, large ones the same relative step: 4% and less in
8 bits, 0.02% in 16. ``report/js/data.js`` reads what is written here.

A run's deltas often have low rank, because the IRM's last layer is fed by a narrow one. So tokens are stored as a few
components and each token's weights where that loses next to nothing, else as they are, as many as fit.
"""

from __future__ import annotations

import base64
import gzip
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

LOST = 1e-5  # share of a run's energy that components may leave out
_FEWEST = 12  # tokens of a prompt that are worth a slider
_OVERHEAD = 1.23  # base64 makes four bytes of three; gzip takes 8% and more off codes of 8 bits
_MOST_TOKENS = 4000  # of one run, for the matrix of their inner products
_LEVELS = {8: 127, 16: 32767}
_TYPES = {8: "<i1", 16: "<i2"}


def encode(values: np.ndarray, bits: int) -> tuple[np.ndarray, dict[str, Any]]:
    """Codes of `values`, and ``soft`` and ``top``, which they are read with; NaN becomes the lowest code."""
    size = abs(values[np.isfinite(values)])
    top = float(size.max(initial=0.0))
    top = top if top > 1e-30 else 1.0  # below, float32 runs out of digits
    some = size[:: max(1, size.size // 200_000)]
    middle = float(np.median(some)) if some.size else top
    soft = min(max(middle, top / 1e4), top)
    steps = np.arcsinh(np.asarray(values, dtype=np.float32) / soft) * (_LEVELS[bits] / np.arcsinh(top / soft))
    codes = np.where(np.isnan(steps), -_LEVELS[bits] - 1, np.rint(np.nan_to_num(steps)))
    return codes.astype(_TYPES[bits]), {"soft": soft, "top": top, "bits": bits}


def decode(codes: np.ndarray, soft: float, top: float, bits: int) -> np.ndarray:
    """The values that a page decodes."""
    values = soft * np.sinh(codes.astype(np.float32) * (np.arcsinh(top / soft) / _LEVELS[bits]))
    return np.where(codes == -_LEVELS[bits] - 1, np.float32("nan"), values).astype(np.float32)


def pack(values: np.ndarray) -> str:
    """Bytes as gzip in base64, the same for the same values."""
    return base64.b64encode(gzip.compress(np.ascontiguousarray(values).tobytes(), 6, mtime=0)).decode()


@dataclass
class TokenMaps:
    """The maps of one run's tokens, for the page.

    Attributes:
        facts: JSON: ``kind`` ("components" or "tokens"), how to read the codes, and the loss where there is one.
        blobs: name -> base64.
        texts: for each of the run's texts, ``{"first", "count", "at"}``: the first token that is in, how many are, and where
            they begin in the blob; None for a text that is left out.
    """

    facts: dict[str, Any]
    blobs: dict[str, str]
    texts: list[dict[str, int] | None]


@dataclass
class RunTokens:
    """The deltas of one run.

    Args:
        read: number of a text -> ``[token, cell]`` float32 without NaN, a cell being a layer's neuron.
        lengths: tokens of each text.
        prompt_tokens: of each, how many are the prompt's.
        cells: layers times neurons.
    """

    read: Callable[[int], np.ndarray]
    lengths: Sequence[int]
    prompt_tokens: Sequence[int]
    cells: int
    rank: int | None = None
    _axes: np.ndarray = field(default_factory=lambda: np.empty(0))

    def survey(self, most: float) -> None:
        """Find how many components keep all but `LOST` of the energy; `rank` stays None where it is surely more than `most`."""
        total = sum(self.lengths)
        if not 0 < total <= _MOST_TOKENS:
            return
        first = self.read(0)
        if _rank(np.linalg.eigvalsh(first @ first.T)[::-1]) > most:
            return
        gram = np.zeros((total, total))
        ends = np.cumsum([0, *self.lengths])
        for a in range(len(self.lengths)):
            left = self.read(a)
            for b in range(a, len(self.lengths)):
                block = left @ (left if b == a else self.read(b)).T
                gram[ends[a] : ends[a + 1], ends[b] : ends[b + 1]] = block
                gram[ends[b] : ends[b + 1], ends[a] : ends[a + 1]] = block.T
        values, vectors = np.linalg.eigh(gram)
        values, vectors = np.maximum(values[::-1], 0.0), vectors[:, ::-1]
        self.rank = _rank(values)
        self._axes = vectors[:, : self.rank] / np.sqrt(np.maximum(values[: self.rank], 1e-30))

    def need(self, bits: int) -> float:
        """About how many bytes of a page its components take."""
        if self.rank is None:
            return float("inf")
        return self.rank * (self.cells * bits / 8 * (_OVERHEAD if bits == 8 else 4 / 3) + sum(self.lengths) * 2 * 4 / 3)

    def components(self, bits: int, name: str) -> TokenMaps:
        """Every token, from `rank` components."""
        ends = np.cumsum([0, *self.lengths])
        # _axes [token, rank] are eigenvectors of the tokens' Gram matrix over singular values: their transpose times the
        # deltas [token, cell] is an orthonormal basis [rank, cell], summed text by text.
        basis = np.zeros((self._axes.shape[1], self.cells), dtype=np.float32)
        for text in range(len(self.lengths)):
            basis += self._axes[ends[text] : ends[text + 1]].T.astype(np.float32) @ self.read(text)
        codes, how = encode(basis * np.float32(np.sqrt(self.cells)), bits)  # of RMS 1, which the codes suit
        # Quantising breaks orthogonality, so weights are fitted to the basis as the page decodes it: W = X B^T (B B^T)^+.
        kept = decode(codes, **how)
        solve = np.linalg.pinv((kept @ kept.T).astype(float)).astype(np.float32)
        weights, lost, energy = [], 0.0, 0.0
        for text in range(len(self.lengths)):
            values = self.read(text)
            own = values @ kept.T @ solve  # [token, rank]
            weights.append(own)
            lost += float(np.square(values - own @ kept, dtype=np.float64).sum())
            energy += float(np.square(values, dtype=np.float64).sum())
        # One scale for each component brings its weights into 16 bits.
        factors = np.concatenate(weights)
        scale = abs(factors).max(axis=0) / 32767 + 1e-30
        blobs = {f"{name}-basis": pack(codes), f"{name}-weights": pack(np.rint(factors / scale).astype("<i2"))}
        facts = {"kind": "components", "rank": len(basis), "lost": float(np.sqrt(lost / energy)) if energy else 0.0, **how}
        facts["scale"] = [float(f"{one:.6g}") for one in scale]
        texts = [{"first": 0, "count": n, "at": int(at)} for n, at in zip(self.lengths, ends[:-1], strict=True)]
        return TokenMaps(facts, blobs, list(texts))

    def tokens(self, budget: float, name: str) -> TokenMaps | None:
        """As many tokens as fit, as they are, around the beginning of the replies to the first prompts; None when none fits."""
        fits = int(budget / (self.cells * _OVERHEAD))
        if not fits or not self.lengths:
            return None
        prompts = min(len(self.lengths), max(1, fits // _FEWEST))
        each = fits // prompts
        parts, texts, at = [], list[dict[str, int] | None](), 0
        for text, (length, prompt) in enumerate(zip(self.lengths, self.prompt_tokens, strict=True)):
            if text >= prompts:
                texts.append(None)
                continue
            count = min(length, each)
            first = max(0, min(prompt - each // 4, length - count))
            parts.append(self.read(text)[first : first + count])
            texts.append({"first": first, "count": count, "at": at})
            at += count
        codes, how = encode(np.concatenate(parts), 8)
        return TokenMaps({"kind": "tokens", **how}, {f"{name}-tokens": pack(codes)}, texts)


def token_maps(runs: Sequence[RunTokens], budget: float) -> list[TokenMaps | None]:
    """What is kept of each run's tokens, in `budget` bytes of a page all together.

    Cheap runs leave their share to the others. In 16 bits where everything fits so, else in 8.
    """
    for run in runs:
        run.survey(budget / (run.cells * _OVERHEAD))
    bits = 16 if sum(run.need(16) for run in runs) <= budget else 8
    needs = [run.need(bits) for run in runs]
    found: list[TokenMaps | None] = [None] * len(runs)
    left = budget
    for place, number in enumerate(sorted(range(len(runs)), key=needs.__getitem__)):
        share = left / (len(runs) - place)
        run, name = runs[number], f"run-{number}"
        maps = run.components(bits, name) if needs[number] <= share else run.tokens(share, name)
        found[number] = maps
        left -= sum(map(len, maps.blobs.values())) if maps else 0
    return found


def _rank(values: np.ndarray) -> int:
    """How many of the eigenvalues, largest first, make up all but `LOST` of their sum."""
    left_out = values.sum() - np.cumsum(values)
    return int(np.argmax(left_out <= LOST * values.sum())) + 1
