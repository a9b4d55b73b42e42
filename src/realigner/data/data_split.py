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


def split_rows(rows: Sequence[Row], seed: int, validation: float = 0.1, test: float = 0.0) -> Split:
    """Deal whole groups, shuffled by `seed`, to test and validation until each has its share of rows.

    A group that would make a part twice as large as it should be is left in train, as long as a smaller one will do.

    Args:
        rows: the rows; their order does not change which group goes where.
        seed: the same seed and groups give the same split.
        validation, test: shares of the rows, each 0 or more, together below 1.

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
    sizes = Counter(row.group for row in rows)
    groups = sorted(sizes)
    parts = 1 + (validation > 0) + (test > 0)
    if len(groups) < parts:
        raise RealignerError(f"split: {len(groups)} group(s) cannot make {parts} parts; splits are made by group, never by row")
    random.Random(seed).shuffle(groups)
    part_of: dict[str, int] = {}
    for part, share in ((2, test), (1, validation)):
        wanted, taken = share * len(rows), 0
        spare = len(groups) - (1 + (part == 2 and validation > 0))  # groups the parts after this one do not need
        for group in reversed(groups.copy()):
            if taken >= wanted or spare == 0:
                break
            if taken + sizes[group] <= 2 * wanted:
                part_of[group], taken, spare = part, taken + sizes[group], spare - 1
                groups.remove(group)
        if share > 0 and not taken:  # every group is too large: the smallest does the least harm
            smallest = min(groups, key=lambda group: (sizes[group], group))
            part_of[smallest] = part
            groups.remove(smallest)
    by_part: tuple[list[Row], list[Row], list[Row]] = ([], [], [])
    for row in rows:
        by_part[part_of.get(row.group, 0)].append(row)
    return Split(*by_part)
