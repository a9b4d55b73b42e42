"""Why this index: what a host's weights, states and gradients say of an index of its residual stream, and what edits prove."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from realigner.explain.edits import permuted, with_gain, without_channel
    from realigner.explain.explanation import Explanation
    from realigner.explain.measure import measure_host
    from realigner.explain.roles import roles_of
    from realigner.explain.run import explain
    from realigner.explain.weights import weights_of
    from realigner.explain.weights_only import weights_report

_HOMES = {
    "Explanation": "explanation",
    "explain": "run",
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


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'realigner.explain' has no attribute {name!r}")
    return getattr(import_module(f"realigner.explain.{_HOMES[name]}"), name)
