"""A sweep's losses by a key of its grid that is a number, as pictures: by learning rate above all."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

import realigner.training.run_dir as run_dir
from realigner.files import written_file
from realigner.sweep.grid import RunSpec, label_of
from realigner.training.loss_plot import STYLE

_NO_AXES = ("seed", "threads")  # numbers whose size means nothing
_MOST_NAMED = 10  # lines in the legend


@dataclass(frozen=True)
class Point:
    """A run at a value of the key: validation losses at the start, the best and the last; all NaN where it failed."""

    value: float
    start: float = math.nan
    best: float = math.nan
    end: float = math.nan


def loss_by_key(lines: Mapping[str, Sequence[Point]], key: str) -> Figure:
    """End losses (filled) and best losses (hollow) by a key, a colour for each line; dashed, what no training gives.

    A run that failed, or ended far above its start, is a cross at the upper edge.
    """
    points = [point for line in lines.values() for point in line]
    starts = [point.start for point in points if math.isfinite(point.start)]
    shown = [loss for point in points for loss in (point.best, point.end) if loss <= max(starts, default=math.inf)] + starts
    low, high = min(shown, default=0.0), max(shown, default=1.0)
    margin = 0.1 * (high - low or 1.0)
    top, crosses = high + 3 * margin, Counter[float]()
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
        for number, (name, line) in enumerate(lines.items()):
            colour, line = f"C{number % 10}", sorted(line, key=lambda point: point.value)
            whole = [point for point in line if math.isfinite(point.end)]
            for start in {point.start for point in whole}:
                axes.axhline(start, color=colour, linestyle="--", linewidth=1)
            at = [point.value for point in whole]
            axes.plot(at, [point.best for point in whole], color=colour, linestyle=":", marker="o", fillstyle="none")
            axes.plot(at, [point.end for point in whole], color=colour, marker="o", label=name)
            for point in line:
                if not point.end <= top:
                    height = top - margin * (0.4 + 0.5 * crosses[point.value])
                    crosses[point.value] += 1
                    axes.plot([point.value], [height], color=colour, marker="x", markersize=8)
                    said = f"{point.end:.2f}" if math.isfinite(point.end) else "failed"
                    axes.annotate(said, (point.value, height), textcoords="offset points", xytext=(7, -3), fontsize=8)
        values = [point.value for point in points]
        if key == "learning_rate" or (values and 0 < 10 * min(values) <= max(values)):
            axes.set_xscale("log")
        axes.set_ylim(low - margin, top)
        axes.set_xlabel(key)
        axes.set_ylabel("validation loss (nats per token)")
        how = [
            Line2D([], [], color="black", marker="o", label="end"),
            Line2D([], [], color="black", linestyle=":", marker="o", fillstyle="none", label="best on the way"),
            Line2D([], [], color="black", linestyle="--", label="untrained"),
            Line2D([], [], color="black", linestyle="", marker="x", label="failed, or far above"),
        ]
        named = [line for line in axes.get_lines() if str(line.get_label()) in lines and line.get_label()][:_MOST_NAMED]
        figure.legend(handles=how + named, frameon=False, fontsize=8, loc="outside right upper")
    return figure


def save_pictures(runs: Sequence[RunSpec], out: Path, failed: Collection[str]) -> list[Path]:
    """Write ``loss_by_KEY.png`` for each key of the grid with two numbers or more; returns their paths."""
    paths = []
    for key in dict.fromkeys(key for run in runs for key in run.varies if key not in _NO_AXES):
        lines = lines_by_key(runs, out, key, failed)
        if len({point.value for line in lines.values() for point in line}) >= 2:
            path = out / f"loss_by_{key}.png"
            figure = loss_by_key(lines, key)
            with written_file(path) as aside:
                figure.savefig(aside, dpi=120, format="png")
            plt.close(figure)
            paths.append(path)
    return paths


def lines_by_key(runs: Sequence[RunSpec], out: Path, key: str, failed: Collection[str]) -> dict[str, list[Point]]:
    """The runs that are done or failed as points at their numbers for a key, by the values of all other keys."""
    lines: dict[str, list[Point]] = defaultdict(list)
    for run in runs:
        record = run_dir.read_run(out / run.name) if (out / run.name).is_dir() else {}
        value: Any = getattr(run.recipe, key, None) if key in run.varies else None  # YAML takes 1e-4 for a text
        if record and key == "learning_rate":
            value = record["recipe"][key]  # auto and null have become numbers there
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or "untrained" in run.varies or not (record or run.name in failed):
            continue
        others = label_of({name: other for name, other in run.varies.items() if name != key})
        losses = record.get("validation_loss")
        best = min(filter(math.isfinite, losses), default=math.nan) if losses else math.nan
        lines[others].append(Point(value, losses[0], best, losses[-1]) if losses else Point(value))
    return dict(lines)
