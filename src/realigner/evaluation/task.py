"""What a method has to learn, and what it is judged by: rows of one tone, split by topic into parts that share none."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from realigner.data import Row
from realigner.errors import RealignerError

PARTS = {"test": 0.3, "scorer": 0.17, "tune": 0.09}  # shares of the topics; the rest is trained on
_LEAST = {"train": 2, "test": 1, "scorer": 1, "tune": 1}  # topics
_FEWEST = 6  # topics that give every part as many, in these shares


@dataclass(frozen=True)
class Task:
    """A tone to be learned, and the rows for it.

    Attributes:
        tone: the target.
        train: rows in the tone that methods may learn from.
        tune: rows in the tone on which rates, prompts and strengths are chosen.
        test: rows in the tone whose questions are asked in the end; their replies are the reference.
        scorer: rows of several tones, from which scorers of tones are trained.
    """

    tone: str
    train: Sequence[Row]
    tune: Sequence[Row]
    test: Sequence[Row]
    scorer: Sequence[Row]

    @property
    def contrast(self) -> list[str]:
        """The other tones that scorers tell the tone from; ``bare`` is the host's own voice."""
        return sorted({row.tone for row in self.scorer} - {self.tone})


def make_task(rows: Sequence[Row], tone: str, seed: int = 42) -> Task:
    """Split rows of several tones by topic (`Row.group`); the parts depend on the topics' names and the seed alone.

    Raises:
        RealignerError: when there are too few topics, or no row is in the tone, or none in another.

    Example:
        >>> from realigner.data import authored
        >>> task = make_task(authored("anger") + authored("neutral"), "anger")
        >>> len(task.train), len(task.tune), len(task.test), len(task.scorer)
        (165, 30, 105, 120)
    """
    topics = sorted({row.group for row in rows})
    counts = {part: max(_LEAST[part], round(share * len(topics))) for part, share in PARTS.items()}
    if len(topics) < sum(counts.values()) + _LEAST["train"]:
        raise RealignerError(f"evaluation: the rows are about {len(topics)} topics (group); {_FEWEST} or more are needed")
    if len({row.tone for row in rows}) < 2 or all(row.tone != tone for row in rows):
        raise RealignerError(f"evaluation: rows in {tone} and in another tone are needed, to tell them apart")
    random.Random(seed).shuffle(topics)
    found: dict[str, list[Row]] = {}
    for part, count in counts.items():
        own, topics = set(topics[:count]), topics[count:]
        found[part] = [row for row in rows if row.group in own and (part == "scorer" or row.tone == tone)]
    left = set(topics)
    return Task(tone, [row for row in rows if row.group in left and row.tone == tone], **found)
