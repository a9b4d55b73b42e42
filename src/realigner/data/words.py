"""What a word is, in any script."""

from __future__ import annotations

import re
import sys
import unicodedata
from itertools import pairwise


def _marks() -> str:
    """The signs that stand on, under or beside a letter (a vowel of Hindi, an accent), as ranges of a character class."""
    marks = [n for n in range(0x300, 0x20000) if unicodedata.category(chr(n)) in ("Mn", "Mc") and not 0xFE00 <= n <= 0xFE0F]
    edges = [0, *(n for n, (one, two) in enumerate(pairwise([*marks, sys.maxunicode])) if two > one + 1 for n in (n, n + 1))]
    return "".join(f"{chr(marks[first])}-{chr(marks[last])}" for first, last in zip(edges[:-1:2], edges[1::2], strict=True))


LETTER = rf"[\w{_marks()}]"  # Python's \w lacks the marks; variation selectors, which emoji have, are none
WORD = re.compile(rf"\w{LETTER}*")
