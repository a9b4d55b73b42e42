"""Many runs: a grid over a recipe's keys, on this machine's cores or on a Ray cluster; killed and started again at will."""

from __future__ import annotations

from typing import TYPE_CHECKING

from realigner.lazy import lazily

if TYPE_CHECKING:
    from realigner.sweep.grid import (
        RunSpec as RunSpec,
        Sweep as Sweep,
        plan as plan,
        read_sweep as read_sweep,
    )
    from realigner.sweep.sweep_run import Result as Result, run_sweep as run_sweep

_HOMES = {
    **dict.fromkeys(("RunSpec", "Sweep", "plan", "read_sweep"), "grid"),
    **dict.fromkeys(("Result", "run_sweep"), "sweep_run"),
}

__all__ = [*_HOMES]

__getattr__ = lazily(__name__, _HOMES)
