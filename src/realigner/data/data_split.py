"""Split rows into train, validation and test by group, so that no topic or article is on both sides."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from realigner.data.dataset_rows import Row
from realigner.errors import RealignerError, UsageError


class Split(NamedTuple):
    """Rows of each part, in file order."""

    train: list[Row]
    validation: list[Row]
    test: list[Row]


def split_rows(rows: Sequence[Row], seed: int, validation: float = 0.1, test: float = 0.0, by_tone: bool = False) -> Split:
    """Deal whole groups, shuffled by `seed`, to test and validation until each has its share of rows.

    A group that would make a part twice as large as it should be is left in train, as long as a smaller one will do.

    Args:
        rows: the rows; their order does not change which group goes where.
        seed: the same seed and groups give the same split.
        validation, test: shares of the rows, each 0 or more, together below 1.
        by_tone: each tone has its share in each part, as far as its groups allow, and never fewer than one group in train.

    Raises:
        UsageError: for shares that cannot be.
        RealignerError: when there are too few groups for the parts asked for.

    Example:
        >>> from realigner.data import authored
        >>> parts = split_rows(authored("anger"), seed=42)
        >>> {row.group for row in parts.train} & {row.group for row in parts.validation}
        set()
    """
    if not (0 <= validation < 1 and 0 <= test < 1 and validation + test < 1):
        raise UsageError(f"split: shares validation={validation} and test={test} must be 0 or more and together below 1")
    sizes: dict[str, Counter[str]] = {}  # group -> rows of each tone, or of all
    for row in rows:
        sizes.setdefault(row.group, Counter())[row.tone if by_tone else ""] += 1
    totals = sum(sizes.values(), Counter[str]())
    groups = sorted(sizes)
    parts = 1 + (validation > 0) + (test > 0)
    if len(groups) < parts:
        raise RealignerError(f"split: {len(groups)} group(s) cannot make {parts} parts; splits are made by group, never by row")
    random.Random(seed).shuffle(groups)
    part_of: dict[str, int] = {}
    left = Counter(tone for group in groups for tone in sizes[group])  # groups of each tone that no part has taken
    for part, share in ((2, test), (1, validation)):
        kept = 1 + (part == 2 and validation > 0)  # groups of a tone that the parts after this one need
        taken: Counter[str] = Counter()
        # The tone with the fewest groups first: a group of several tones counts for each.
        for tone in sorted(totals, key=lambda tone: (left[tone], tone)) if share else ():
            wanted = share * totals[tone]
            own = [group for group in groups if tone in sizes[group]]
            smallest = sorted(own, key=lambda group: (sizes[group][tone], group))
            # Of a second time around, when every group was too large: then the smallest does the least harm.
            for group, second in (*((group, False) for group in reversed(own)), *((group, True) for group in smallest)):
                if taken[tone] >= wanted or (second and taken[tone]):
                    break
                fits = second or taken[tone] + sizes[group][tone] <= 2 * wanted
                if fits and all(left[name] > kept for name in sizes[group]):
                    part_of[group] = part
                    taken += sizes[group]
                    left -= Counter(sizes[group].keys())
            groups = [group for group in groups if group not in part_of]
        if share > 0 and not taken:
            raise RealignerError(f"split: no tone has the {parts} groups that {parts} parts take; give rows of more groups")
    by_part: tuple[list[Row], list[Row], list[Row]] = ([], [], [])
    for row in rows:
        by_part[part_of.get(row.group, 0)].append(row)
    return Split(*by_part)
