"""A report card of a tone dataset: what it holds, how good it is, and what makes it unfit."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import sqrt
from typing import Any

import numpy as np

from realigner.data.near import NearDuplicates
from realigner.data.rows import Row, authored
from realigner.data.squad import Fact
from realigner.data.tokens import encode_rows
from realigner.data.tone import load_tone
from realigner.errors import RealignerError

NEAR_LIMIT = 0.01  # share of near-duplicates from which a dataset is unfit
PURITY_LIMIT = 0.8  # tone purity below which a dataset is unfit
_MOST = 5000  # rows of a tone that the purity is taken on
_FEWEST = 20
_SAMPLES = 10


@dataclass(frozen=True)
class Purity:
    """How well the tone can be told, by a classifier that saw none of a row's group (five-fold cross-validation by group).

    On planted truth it is the share of rows that are in the tone, within 0.03 as long as seven in ten are; where most are not,
    it reads up to 0.1 too high (the classifier learns from labels that are wrong).

    Attributes:
        value: share of the rows put into their own tone.
        low, high: its 95% interval (Wilson).
        n: how many rows it was taken on (at most 5,000 of a tone, drawn by the seed).
        baseline: the share that always naming the commonest tone would reach.
        tones: the share of each tone.
        against: what the tones were told from.
    """

    value: float
    low: float
    high: float
    n: int
    baseline: float
    tones: dict[str, float]
    against: str


@dataclass(frozen=True)
class ReportCard:
    """Counts of a dataset and its problems; fit when there is none.

    Attributes:
        rows, groups: how many.
        tones: rows of each tone.
        words: words of each reply's length: fewest, median, most.
        tokens: the same in tokens of a host, question and template included, as trained; None when no tokenizer was given.
        host: that host.
        answer_kept: share of replies that hold their answer word for word, among those with one; None when there are none.
        duplicates: replies that stand more than once.
        near_duplicates: replies nearly equal to one before them in the same tone (word triples, Jaccard 0.8 or more; exact
            copies count too).
        leakage: rows whose question, or whose whole reply, stands in another group too: a split by group would not keep them
            apart.
        purity: see `Purity`; None where it cannot be taken, `problems` or `notes` say why.
        samples: ten rows to read, drawn by the seed.
        problems: sentences, each a reason not to train on it.
        notes: sentences worth knowing.
        word_lengths, token_lengths: of every reply, for histograms; not part of `to_dict`.
    """

    rows: int
    groups: int
    tones: dict[str, int]
    words: tuple[int, int, int]
    tokens: tuple[int, int, int] | None
    host: str
    answer_kept: float | None
    duplicates: int
    near_duplicates: int
    leakage: int
    purity: Purity | None
    samples: tuple[Row, ...]
    problems: tuple[str, ...]
    notes: tuple[str, ...]
    word_lengths: tuple[int, ...]
    token_lengths: tuple[int, ...]

    @property
    def fit(self) -> bool:
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        values = asdict(self)
        del values["word_lengths"], values["token_lengths"]
        return {**values, "samples": [row.model_dump() for row in self.samples], "fit": self.fit}

    def lines(self) -> list[tuple[str, str]]:
        """What a card says, line by line."""
        lines = [
            ("rows", f"{self.rows:,} in {self.groups:,} groups"),
            ("tones", ", ".join(f"{name} {count:,}" for name, count in self.tones.items())),
            ("words", f"{self.words[0]} to {self.words[2]}, median {self.words[1]}"),
        ]
        if self.tokens is not None:
            lines.append(
                ("tokens", f"{self.tokens[0]} to {self.tokens[2]}, median {self.tokens[1]}, with the question ({self.host})")
            )
        kept = (
            "no answers are known" if self.answer_kept is None else f"word for word in {100 * self.answer_kept:.1f}% of replies"
        )
        lines += [
            ("answer kept", kept),
            ("duplicates", f"{self.duplicates:,}"),
            ("near-duplicates", f"{self.near_duplicates:,} ({100 * self.near_duplicates / self.rows:.2f}%)"),
            ("leakage", f"{self.leakage:,} rows with a question or reply that stands in another group"),
        ]
        if (purity := self.purity) is not None:
            interval = f"{purity.value:.3f} (95% interval {purity.low:.3f} to {purity.high:.3f}, n {purity.n:,}, baseline"
            lines.append(("tone purity", f"{interval} {purity.baseline:.2f}), told from {purity.against}"))
        return [*lines, *(("note", note) for note in self.notes)]


def check_rows(
    rows: Sequence[Row], tokenizer: Any = None, host: str = "", against: Sequence[Row] = (), seed: int = 42
) -> ReportCard:
    """Look at rows as a whole (their form was checked on reading).

    Unfit is: fewer than two groups (no split by group), a reply that stands twice, 1% near-duplicates or more, a reply that
    repeats its question, a question or a reply that stands in two groups (it would leak between splits), a tone purity below
    0.8.

    Args:
        rows: the dataset.
        tokenizer, host: for the lengths in tokens, and the host's name.
        against: rows of other tones to tell a single tone from. By default: neutral replies that the template rewriter makes
            of the same facts (angry ones for a neutral dataset); where answers are unknown, the authored set.
        seed: of the purity's folds and of the samples.

    Raises:
        RealignerError: for no rows.
    """
    if not rows:
        raise RealignerError("no rows to check")
    near = _near_duplicates(rows)
    duplicates = len(rows) - len({(row.tone, row.text.casefold()) for row in rows})
    leaks = _leaks(rows)
    purity, note = _purity(rows, against, seed)
    known = [row for row in rows if row.answer]
    words = [len(row.text.split()) for row in rows]
    tokens = [] if tokenizer is None else _token_lengths(rows, tokenizer)
    return ReportCard(
        rows=len(rows),
        groups=len({row.group for row in rows}),
        tones=dict(sorted(Counter(row.tone for row in rows).items())),
        words=_spread(words),
        tokens=_spread(tokens) if tokens else None,
        host=host,
        answer_kept=sum(_plain(row.answer) in row.text.casefold() for row in known) / len(known) if known else None,
        duplicates=duplicates,
        near_duplicates=near,
        leakage=len(leaks),
        purity=purity,
        samples=tuple(random.Random(seed).sample(list(rows), min(_SAMPLES, len(rows)))),
        problems=tuple(_problems(rows, duplicates, near, leaks, purity)),
        notes=(note,) if note else (),
        word_lengths=tuple(words),
        token_lengths=tuple(tokens),
    )


def _problems(rows: Sequence[Row], duplicates: int, near: int, leaks: Sequence[str], purity: Purity | None) -> list[str]:
    problems = []
    groups = {row.group for row in rows}
    if len(groups) < 2:
        problems.append(f"only {len(groups)} group: splits are made by group, so training needs two or more")
    if duplicates:
        problems.append(f"{duplicates} replies stand more than once")
    if near - duplicates >= NEAR_LIMIT * len(rows):
        problems.append(f"{near} replies ({100 * near / len(rows):.1f}%) nearly equal another")
    echoes = [row.id for row in rows if row.text.casefold() == row.question.casefold()]
    if echoes:
        problems.append(f"{len(echoes)} replies only repeat the question (first: row {echoes[0]!r})")
    if leaks:
        problems.append(
            f"{len(leaks)} rows have a question or a reply that stands in another group and would leak between splits "
            f"(first: row {leaks[0]!r})"
        )
    if purity is not None and purity.high < PURITY_LIMIT:
        problems.append(f"tone purity is {purity.value:.2f}: too many replies cannot be told from {purity.against}")
    return problems


def _near_duplicates(rows: Sequence[Row]) -> int:
    seen: dict[str, NearDuplicates] = {}
    return sum(seen.setdefault(row.tone, NearDuplicates()).add(row.id, row.text) is not None for row in rows)


def _leaks(rows: Sequence[Row]) -> list[str]:
    """Ids of rows whose question, or whose reply in its tone, stood in another group before."""
    home: dict[tuple[str, ...], str] = {}
    leaks = []
    for row in rows:
        keys = ((_letters(row.question),), (row.tone, _letters(row.text)))
        elsewhere = [home.setdefault(key, row.group) != row.group for key in keys]
        if any(elsewhere):
            leaks.append(row.id)
    return leaks


def _purity(rows: Sequence[Row], against: Sequence[Row], seed: int) -> tuple[Purity | None, str]:
    """The purity, or None and why it was not taken."""
    from realigner.data.scorer import cross_validated

    sample = _sampled(rows, seed)
    others, name = _others(sample, against)
    compared = [*sample, *_sampled(others, seed)]
    counts = Counter(row.tone for row in compared)
    if min(counts.values()) < _FEWEST or len({row.group for row in sample}) < 2:
        return None, f"tone purity was not taken: it needs {_FEWEST} rows of each tone, from two groups or more"
    scorer, probabilities = cross_validated(compared, seed=seed)
    named = np.array(scorer.tones)[probabilities.argmax(axis=1)]
    right = named[: len(sample)] == np.array([row.tone for row in sample])
    tones = {tone: float(right[[row.tone == tone for row in sample]].mean()) for tone in sorted({row.tone for row in sample})}
    low, high = _wilson(int(right.sum()), len(right))
    baseline = max(counts.values()) / len(compared)
    return Purity(float(right.mean()), low, high, len(right), baseline, tones, name), ""


def _others(rows: Sequence[Row], against: Sequence[Row]) -> tuple[list[Row], str]:
    """What to tell the tones from, and its name."""
    tones = sorted({row.tone for row in rows})
    if against:
        others = [row for row in against if row.tone not in tones]
        if not others:
            raise RealignerError(f"--against: has only rows of {', '.join(tones)}; give rows of another tone")
        return others, f"{' and '.join(sorted({row.tone for row in others}))} (--against)"
    if len(tones) > 1:
        return [], "each other"
    other = "neutral" if tones[0] != "neutral" else "anger"
    known = [row for row in rows if row.answer]
    if len(known) < len(rows) / 2:
        return authored(other), f"the authored {other} replies (other questions)"
    return _template_rows(known, other), f"{other} replies made of the same facts by template"


def _template_rows(rows: Sequence[Row], tone: str) -> list[Row]:
    from realigner.data.rewriters import Ask
    from realigner.data.rewriters.template import TemplateRewriter

    asks = [Ask(Fact(row.id, row.group, row.question, row.answer), 0) for row in rows]
    replies = TemplateRewriter(load_tone(tone)).rewrite(asks)
    return [
        row.model_copy(update={"id": f"{row.id}-{tone}", "tone": tone, "text": reply.text})
        for row, reply in zip(rows, replies, strict=True)
    ]


def _sampled(rows: Sequence[Row], seed: int) -> list[Row]:
    """At most so many rows of each tone."""
    by_tone: dict[str, list[Row]] = {}
    for row in rows:
        by_tone.setdefault(row.tone, []).append(row)
    chosen: list[Row] = []
    for some in by_tone.values():
        chosen += some if len(some) <= _MOST else random.Random(seed).sample(some, _MOST)
    return chosen


def _token_lengths(rows: Sequence[Row], tokenizer: Any, batch: int = 2000) -> list[int]:
    lengths: list[int] = []
    for start in range(0, len(rows), batch):
        lengths += [len(item["input_ids"]) for item in encode_rows(tokenizer, rows[start : start + batch], None)]
    return lengths


def _spread(values: Sequence[int]) -> tuple[int, int, int]:
    ordered = sorted(values)
    return ordered[0], ordered[len(ordered) // 2], ordered[-1]


def _wilson(right: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """The 95% interval of a share (Wilson 1927)."""
    p, scale = right / n, 1 + z * z / n
    middle, half = (p + z * z / (2 * n)) / scale, z * sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / scale
    return max(0.0, middle - half), min(1.0, middle + half)


def _letters(text: str) -> str:
    """Letters and digits only, so that spaces, case and punctuation make no difference."""
    return "".join(c for c in text.casefold() if c.isalnum()) or text


def _plain(answer: str) -> str:
    words = answer.casefold().rstrip(".").split() or [""]
    return " ".join(words[1:] if words[0] in ("the", "a", "an") and len(words) > 1 else words)
