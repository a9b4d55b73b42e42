"""Reading SQuAD 1.1 and 2.0 files as they are found in the world, one article at a time, with errors that name the place.

Layout (Rajpurkar et al. 2018): ``{"data": [{"title", "paragraphs": [{"context", "qas": [{"id", "question", "answers":
[{"text"}], "is_impossible", "plausible_answers": [{"text"}]}]}]}]}``. Extra keys are passed over. The answer is the first one
given; of a question marked impossible it is the first plausible one, as in the paper.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from realigner.errors import RealignerError


@dataclass(frozen=True, slots=True)
class Fact:
    """A question and its plain answer: what is rewritten in a tone.

    Attributes:
        id: unique within a build.
        group: the article; splits are made by it.
        question, answer: one line each.
    """

    id: str
    group: str
    question: str
    answer: str
