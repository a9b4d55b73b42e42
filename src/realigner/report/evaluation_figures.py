"""The figures of an evaluation as files: concept against KL, summary by method, summary against parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from realigner.evaluation.evaluation_file import EvaluationFile, ToneResults
from realigner.files import made_folder
from realigner.report.charts import fmt, label_places
from realigner.report.method_styles import KINDS, method_kind
from realigner.report.plot_style import BARE, PAGE, STYLE, TONES, save_figure

_PALETTE = (BARE, *TONES)  # by a kind's colour
_DOTS = 100  # an inch, of the grid on which labels are placed
Point = tuple[str, float, float, str]  # label, x, y, colour


def save_evaluation_figures(
    values: EvaluationFile | Mapping[str, Any], folder: str | Path, formats: Iterable[str] = ("png", "svg")
) -> list[Path]:
    """Write the figures of an evaluation, in place of those written before.

    Args:
        values: of ``evaluation.json``, or from `read_evaluation`.
        folder: is created.
        formats: of png, svg, pdf.

    Returns:
        The files: ``evaluation-concept-kl``, ``evaluation-summary`` and ``evaluation-parameters``, in each format.

    Raises:
        pydantic.ValidationError: for values that are not an evaluation's.
        RealignerError: when a file cannot be written.
    """
    found = values if isinstance(values, EvaluationFile) else EvaluationFile.model_validate(values)
    place, written = made_folder(folder), []
    figures = {"concept-kl": concept_against_kl, "summary": summary_by_method, "parameters": summary_against_parameters}
    for name, draw in figures.items():
        figure = draw(found)
        written += [save_figure(figure, place / f"evaluation-{name}.{form}") for form in formats]
        plt.close(figure)
    return written


def concept_against_kl(found: EvaluationFile) -> Figure:
    """Concept against KL on neutral text, a panel for each tone: every method, and the IRM over strength as a line."""

    def draw(axes: Axes, own: ToneResults) -> list[Point]:
        curve = [(value, at) for value, at in sorted(own.curve.items()) if value >= 0]
        axes.plot(
            [at.kl for _, at in curve], [at.named for _, at in curve], color=TONES[0], lw=1, marker="o", ms=2.5, mfc="white"
        )
        axes.set_ylim(-0.03, 1.06)
        trail = [(fmt(value), at.kl, at.named, "") for value, at in curve]
        return [*trail, *_points(own, lambda name: own.methods[name].whole.kl, "named")]

    return _panels(found, draw, "KL, nats per token of neutral text", "concept, share of replies")


def summary_against_parameters(found: EvaluationFile) -> Figure:
    """Summary against the number of trained parameters, a panel for each tone; methods without parameters are left out."""

    def draw(axes: Axes, own: ToneResults) -> list[Point]:
        axes.set_xscale("log")
        return _points(own, lambda name: own.methods[name].facts.parameters or math.nan, "summary")

    return _panels(found, draw, "parameters", "summary, 0 to 2")


def summary_by_method(found: EvaluationFile) -> Figure:
    """Summary of each method with its 95% interval over questions, a panel for each tone; the best on average first."""
    means: dict[str, list[float]] = {}
    for own in found.tones.values():
        for name, method in own.methods.items():
            means.setdefault(name, []).append(np.nan_to_num(method.estimates.summary.mean))
    order = sorted(means, key=lambda name: float(np.mean(means[name])))
    with plt.rc_context(STYLE):
        size = (PAGE, 0.75 + 0.17 * len(order))
        figure, panels = plt.subplots(1, len(found.tones), figsize=size, layout="constrained", squeeze=False, sharey=True)
        for axes, (tone, own) in zip(panels[0], found.tones.items(), strict=True):
            for name, method in own.methods.items():
                at, summary, colour = order.index(name), method.estimates.summary, _PALETTE[method_kind(name).colour]
                axes.plot([summary.low, summary.high], [at, at], color=colour, lw=1)
                axes.plot([summary.mean], [at], "o", color=colour, ms=4)
            axes.set_title(f"{tone}, n = {own.questions}", loc="left", parse_math=False)
            axes.set_xlim(0, 2)
            axes.grid(axis="x", lw=0.4, color="#dfe3e8")
            axes.set_axisbelow(True)
            axes.set_xlabel("summary, 0 to 2")
        panels[0][0].set_yticks(range(len(order)), order)
        for label in panels[0][0].get_yticklabels():
            label.set_parse_math(False)
    return figure


def _points(own: ToneResults, across: Callable[[str], float], measure: str) -> list[Point]:
    names = own.ranked()
    heights = [getattr(own.methods[name].estimates, measure).mean for name in names]
    every = [(name, across(name), up, _PALETTE[method_kind(name).colour]) for name, up in zip(names, heights, strict=True)]
    return [point for point in every if math.isfinite(point[1]) and math.isfinite(point[2])]


def _panels(found: EvaluationFile, draw: Callable[[Axes, ToneResults], list[Point]], x_label: str, y_label: str) -> Figure:
    """A labelled scatter plot for each tone, below each other, with a key of the kinds of methods."""
    with plt.rc_context(STYLE):
        size = (PAGE, 0.4 + 2.7 * len(found.tones))
        figure, panels = plt.subplots(len(found.tones), 1, figsize=size, layout="constrained", squeeze=False)
        drawn: list[tuple[Axes, list[Point]]] = []
        for axes, (tone, own) in zip(panels[:, 0], found.tones.items(), strict=True):
            points = draw(axes, own)
            for _, x, y, colour in points:
                if colour:
                    axes.plot([x], [y], "o", color=colour, ms=4.5)
            axes.set_title(f"{tone}, n = {own.questions}", loc="left", parse_math=False)
            axes.set_ylabel(y_label)
            drawn.append((axes, points))
        panels[-1, 0].set_xlabel(x_label)
        shown = {colour for _, points in drawn for *_, colour in points}
        key = [
            Line2D([], [], ls="", marker="o", ms=4.5, color=_PALETTE[kind.colour], label=kind.label)
            for kind in KINDS
            if _PALETTE[kind.colour] in shown
        ]
        if key:
            figure.legend(handles=key, loc="outside lower center", ncols=len(key), frameon=False)
        figure.draw_without_rendering()
        for axes, points in drawn:
            _label(axes, points)
    return figure


def _label(axes: Axes, points: Sequence[Point]) -> None:
    """Write the points' labels where they keep clear of each other."""
    if not points:
        return
    scale = _DOTS / axes.figure.dpi
    box = axes.get_window_extent()
    at = axes.transData.transform([(x, y) for _, x, y, _ in points]) * scale
    top = box.y1 * scale
    spots = [(label, (float(x), top - float(y))) for (label, *_), (x, y) in zip(points, at, strict=True)]
    edges = box.x0 * scale, box.x1 * scale + 20, -10.0, box.height * scale
    for (label, x, y, colour), (_, (left, down)), (to_left, to_down, anchor, joined) in zip(
        points, spots, label_places(spots, edges), strict=True
    ):
        offset = (to_left - left) * 72 / _DOTS, (down - to_down + 4) * 72 / _DOTS
        place: Any = {"xytext": offset, "textcoords": "offset points", "annotation_clip": False, "parse_math": False}
        line: Any = {"arrowprops": {"arrowstyle": "-", "lw": 0.4, "color": BARE, "shrinkA": 0, "shrinkB": 0}} if joined else {}
        side = "left" if anchor == "start" else "right"
        text = axes.annotate(
            label, (x, y), ha=side, va="center", fontsize=7, color="black" if colour else TONES[0], **place, **line
        )
        text.set_in_layout(False)
