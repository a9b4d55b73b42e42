"""Choose the strength of an IRM: the best summary on the tuning questions, within limits on its side effects."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from realigner.analysis.resampling import ALPHA
from realigner.errors import RealignerError
from realigner.evaluation.compare import Estimate, compare, estimate
from realigner.evaluation.measures import BEST
from realigner.evaluation.scores import Scores
from realigner.files import read_object, write_text
from realigner.irm_config import CONFIG_FILE, adapter_folder, check_adapter

STRENGTHS = (0.25, 0.5, 0.625, 0.75, 0.875, 1.0, 1.125, 1.25, 1.5)
MAX_KL = 1.0  # nats per token of neutral text
MAX_SHIFT = 1.0  # of the residual stream at the median site, in units of its own size


@dataclass(frozen=True)
class Point:
    """An IRM at one strength, on the tuning questions.

    Attributes:
        summary: mean over the questions, 0 to 2.
        named: share of replies that the scorer names in the tone.
        nats: per token of the replies, under the bare host.
        kl: nats per token of neutral text, from the bare host.
        shift: of the residual stream at the median site, in units of its size.
        allowed: whether KL and shift are within the limits.
    """

    strength: float
    summary: Estimate
    named: float
    nats: float
    kl: float
    shift: float
    allowed: bool


@dataclass(frozen=True)
class StrengthChoice:
    """The strength with the best summary, and the range of strengths in which the IRM was not found to do worse.

    Attributes:
        low, high: ends of that range: neighbouring strengths whose summary is not clearly lower: the 95% interval of the paired
            difference from the best reaches 0, or p, adjusted by Holm over the strengths, is 0.05 or more.
        points: of all strengths that were tried.
        max_kl, max_shift: the limits.
    """

    strength: float
    low: float
    high: float
    points: list[Point]
    max_kl: float
    max_shift: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)

    def save(self, folder: str | Path) -> None:
        """Write the strength into an adapter's config, where `generate` and `runtime.load` read it.

        Raises:
            RealignerError: for a folder without an adapter, or where the file cannot be written.
        """
        path = adapter_folder(folder) / CONFIG_FILE
        check_adapter(path.parent)
        values = {**read_object(path), "strength": self.strength, "strength_range": [self.low, self.high]}
        write_text(path, json.dumps(values, indent=2, sort_keys=True))


def choose_strength(scores: Mapping[float, Scores], max_kl: float = MAX_KL, max_shift: float = MAX_SHIFT) -> StrengthChoice:
    """Choose among strengths that were tried.

    Args:
        scores: strength -> the scores of one IRM at it, on the same questions.
        max_kl, max_shift: limits; a strength beyond one of them is not chosen.

    Raises:
        RealignerError: when every strength is beyond a limit.
    """
    points = []
    for strength, found in sorted(scores.items()):
        kl, shift = found.whole["kl"], found.whole["shift_median"]
        named, nats = (float(np.nanmean(found.each[name])) for name in ("named", "nats"))
        allowed = kl <= max_kl and shift <= max_shift
        points.append(Point(strength, estimate(found.each["summary"], bounds=(0.0, BEST)), named, nats, kl, shift, allowed))
    within = [point for point in points if point.allowed]
    if not within:
        least = min(points, key=lambda point: point.kl)
        raise RealignerError(
            f"strength: all that were tried are beyond a limit (at {least.strength:g}: KL {least.kl:.2f}, at most {max_kl:g}; "
            f"the residual stream moves by {least.shift:.2f} of its size, at most {max_shift:g}); raise the limit, or train "
            "with a lower learning rate"
        )
    best = max(within, key=lambda point: point.summary.mean)
    summaries = {f"{point.strength:g}": scores[point.strength].each["summary"] for point in within}
    others = compare(summaries, against=f"{best.strength:g}")
    worse = {one.method for one in others if one.difference.high < 0 and one.p_holm < ALPHA}
    as_good = [point.strength for point in within if f"{point.strength:g}" not in worse]
    tried = [point.strength for point in points]
    low = high = tried.index(best.strength)
    while low > 0 and tried[low - 1] in as_good:
        low -= 1
    while high + 1 < len(tried) and tried[high + 1] in as_good:
        high += 1
    return StrengthChoice(best.strength, tried[low], tried[high], points, max_kl, max_shift)
