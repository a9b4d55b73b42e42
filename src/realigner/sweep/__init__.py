"""Many runs: a grid over a recipe's keys, on this machine's cores or on a Ray cluster; killed and started again at will."""

from __future__ import annotations

from typing import TYPE_CHECKING

from realigner.lazy import lazily

if TYPE_CHECKING:
    from realigner.sweep.grid import Planned, RunSpec, Sweep, plan, read_sweep
    from realigner.sweep.sweep_run import Result, run_sweep

_HOMES = {
    **dict.fromkeys(("Planned", "RunSpec", "Sweep", "plan", "read_sweep"), "grid"),
    **dict.fromkeys(("Result", "run_sweep"), "sweep_run"),
}

__all__ = ["Planned", "RunSpec", "Result", "Sweep", "plan", "read_sweep", "run_sweep"]

__getattr__ = lazily(__name__, _HOMES)
