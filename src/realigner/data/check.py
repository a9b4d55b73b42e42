"""A report card of a tone dataset: what it holds, and what makes it unfit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from realigner.data.rows import Row
from realigner.errors import RealignerError


@dataclass(frozen=True)
class ReportCard:
    """Counts of a dataset and its problems; fit when there is none.

    Attributes:
        rows, groups: how many.
        tones: rows of each tone.
        words: fewest, median and most words in a reply.
        answer_kept: share of replies that hold their answer word for word.
        duplicates: replies that stand more than once.
        problems: sentences, each a reason not to train on it.
    """

    rows: int
    groups: int
    tones: dict[str, int]
    words: tuple[int, int, int]
    answer_kept: float
    duplicates: int
    problems: tuple[str, ...]

    @property
    def fit(self) -> bool:
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "fit": self.fit}


def check_rows(rows: Sequence[Row]) -> ReportCard:
    """Look at rows as a whole (their form was checked on reading).

    Unfit is: fewer than two groups (no split by group), a reply that stands twice, a reply that repeats its question, one
    question in two groups (it would leak between splits).
    """
    if not rows:
        raise RealignerError("no rows to check")
    lengths = sorted(len(row.text.split()) for row in rows)
    texts = Counter((row.tone, row.text.casefold()) for row in rows)
    duplicates = sum(count - 1 for count in texts.values())
    groups_of: dict[str, set[str]] = {}
    for row in rows:
        groups_of.setdefault(row.question.casefold(), set()).add(row.group)
    leaking = sorted(question for question, groups in groups_of.items() if len(groups) > 1)
    echoes = [row.id for row in rows if row.text.casefold() == row.question.casefold()]
    groups = {row.group for row in rows}
    problems = []
    if len(groups) < 2:
        problems.append(f"only {len(groups)} group: splits are made by group, so training needs two or more")
    if duplicates:
        problems.append(f"{duplicates} replies stand more than once")
    if echoes:
        problems.append(f"{len(echoes)} replies only repeat the question (first: row {echoes[0]!r})")
    if leaking:
        problems.append(f"{len(leaking)} questions stand in two groups and would leak between splits (first: {leaking[0]!r})")
    return ReportCard(
        rows=len(rows),
        groups=len(groups),
        tones=dict(sorted(Counter(row.tone for row in rows).items())),
        words=(lengths[0], lengths[len(lengths) // 2], lengths[-1]),
        answer_kept=sum(_plain(row.answer) in row.text.casefold() for row in rows) / len(rows),
        duplicates=duplicates,
        problems=tuple(problems),
    )


def _plain(answer: str) -> str:
    words = answer.casefold().rstrip(".").split() or [""]
    return " ".join(words[1:] if words[0] in ("the", "a", "an") and len(words) > 1 else words)
