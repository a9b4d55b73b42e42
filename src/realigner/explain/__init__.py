"""Why are deltas large at this index? Measurements of the host, ablations, and training runs with one thing changed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from realigner.lazy import lazily

if TYPE_CHECKING:
    from realigner.explain.edits import permuted, with_gain, without_channel
    from realigner.explain.explanation import Explanation
    from realigner.explain.measure import measure_host
    from realigner.explain.protocol import explain
    from realigner.explain.roles import roles_of
    from realigner.explain.weights import weights_of
    from realigner.explain.weights_only import weights_report

_HOMES = {
    "Explanation": "explanation",
    "explain": "protocol",
    "measure_host": "measure",
    "permuted": "edits",
    "roles_of": "roles",
    "weights_of": "weights",
    "weights_report": "weights_only",
    "with_gain": "edits",
    "without_channel": "edits",
}

__all__ = [
    "Explanation",
    "explain",
    "measure_host",
    "permuted",
    "roles_of",
    "weights_of",
    "weights_report",
    "with_gain",
    "without_channel",
]

__getattr__ = lazily(__name__, _HOMES)
