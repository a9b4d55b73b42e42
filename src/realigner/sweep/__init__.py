"""Many runs: a grid over a recipe's keys, on this machine's cores or on a Ray cluster; killed and started again at will."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from realigner.sweep.grid import Planned, Sweep, plan, read_sweep
    from realigner.sweep.run import Result, run_sweep

_HOMES = {"Planned": "grid", "Result": "run", "Sweep": "grid", "plan": "grid", "read_sweep": "grid", "run_sweep": "run"}

__all__ = ["Planned", "Result", "Sweep", "plan", "read_sweep", "run_sweep"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'realigner.sweep' has no attribute {name!r}")
    return getattr(import_module(f"realigner.sweep.{_HOMES[name]}"), name)
