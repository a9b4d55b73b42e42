"""The live table of a sweep: states, steps, losses and time left; plain lines where there is no terminal."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.live import Live
from rich.table import Table
from rich.text import Text

import realigner.training.run_dir as run_dir
from realigner.console import console, say
from realigner.errors import RealignerError, visible
from realigner.files import object_of
from realigner.sweep.grid import RunSpec
from realigner.training.run_record import MetricsEntry, checked

_STYLES = {"done": "green", "running": "cyan", "failed": "red", "retrying": "yellow", "stopped": "yellow"}
_ORDER = ("running", "retrying", "failed", "stopped", "waiting", "done")


@dataclass(eq=False)
class StateTable:
    """What each run is doing, shown as it changes."""

    runs: Sequence[RunSpec]
    out: Path  # the sweep's folder; numbers are read from the runs' own metrics.jsonl
    quiet: bool = False  # show nothing
    workers: int = 1

    def __post_init__(self) -> None:
        self.states = {run.name: "waiting" for run in self.runs}
        self._totals: dict[str, int] = {}
        self._labels = {run.name: run.label for run in self.runs}
        self._live = Live(console=console(), get_renderable=self._table, refresh_per_second=1)
        self._screen = console().is_terminal and not self.quiet

    def __enter__(self) -> StateTable:
        if self._screen:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._screen:
            self._live.stop()

    def set(self, name: str, state: str, note: str = "") -> None:
        """A run's new state; without a terminal, a line."""
        changed = self.states[name] != state
        self.states[name] = state
        if changed and not self._screen and not self.quiet:
            done = sum(state == "done" for state in self.states.values())
            say(f"sweep: {done}/{len(self.states)} done  {name} {state}{f' ({note})' if note else ''}  {self._labels[name]}")

    def _table(self) -> Table:
        progress = {run.name: self._progress(run) for run in self.runs}
        table = Table(title=self._summary(progress), title_justify="left", box=None, header_style="bold")
        keys = list(dict.fromkeys(key for run in self.runs for key in run.varies))
        for name in ("run", *keys, "state", "step", "loss", "left"):
            table.add_column(Text(visible(name)))
        shown: Sequence[RunSpec] = self.runs
        if len(shown) + 3 > console().height:  # what does not fit is cut off below: first what moves
            shown = sorted(shown, key=lambda run: _ORDER.index(self.states[run.name]))
        for run in shown:
            state, (step, loss, left) = self.states[run.name], progress[run.name]
            values = [Text(visible(run.varies.get(key, ""))) for key in keys]
            style = _STYLES.get(state, "dim")
            shown_left = _time(left) if state == "running" else ""
            table.add_row(run.name, *values, Text(state, style), step, loss, shown_left)
        return table

    def _summary(self, progress: dict[str, tuple[str, str, float | None]]) -> str:
        """How many are done, and the time left: the slowest running one's, then the waiting ones at the pace so far."""
        done = sum(state == "done" for state in self.states.values())
        trained = [run for run in self.runs if run.recipe.steps != 0]  # baselines take no time to speak of
        left = [seconds for name, (_, _, seconds) in progress.items() if self.states[name] == "running" and seconds is not None]
        waiting = sum(self.states[run.name] == "waiting" for run in trained)
        took: list[float] = []
        for run in trained:
            with suppress(RealignerError, KeyError):  # being written
                took.append(run_dir.read_run(self.out / run.name)["seconds"])
        if not left and not took:
            return f"{done}/{len(self.runs)} done"
        each = sum(took) / len(took) if took else max(left)
        return f"{done}/{len(self.runs)} done, about {_time(max(left, default=0.0) + waiting * each / self.workers)} left"

    def _progress(self, run: RunSpec) -> tuple[str, str, float | None]:
        """Step, loss and seconds left, from the last line that the run wrote."""
        for place in (self.out / run.name, run_dir.unfinished(self.out / run.name)):
            entry = _last_line(place / run_dir.METRICS_FILE)
            if entry is not None:
                loss, step = entry.get("loss", entry.get("validation_loss")), int(entry["step"])
                total = self._totals.get(run.name, run.recipe.steps)
                if total is None:  # its recipe counts epochs: its first checkpoint says
                    with suppress(IndexError, KeyError, RealignerError):  # none yet, or just being replaced
                        state = run_dir.checkpoint_state(run_dir.checkpoints(place)[-1])
                        total = self._totals[run.name] = int(state["max_steps"])
                left = entry["seconds"] / step * (total - step) if total and step else None
                return f"{step}/{total}" if total else str(step), "" if loss is None else f"{loss:.2f}", left
        return "", "", None


def _last_line(path: Path) -> dict[str, Any] | None:
    try:
        with path.open("rb") as stream:
            stream.seek(0, 2)
            stream.seek(max(0, stream.tell() - 2000))
            lines = stream.read().splitlines()
        return checked(object_of(lines[-1], path), MetricsEntry, path, "a line of a run's metrics") if lines else None
    except (OSError, RealignerError):  # not there yet, or being written
        return None


def _time(seconds: float | None) -> str:
    return "" if seconds is None else str(timedelta(seconds=round(seconds)))
