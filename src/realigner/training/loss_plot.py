"""The loss curve of a run, as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from realigner.files import written_file

STYLE: Any = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "font.family": "DejaVu Sans"}


def loss_curve(metrics: Sequence[Mapping[str, Any]], kept: int | None = None) -> Figure:
    """Training and validation loss (nats per token) over steps; the evaluation whose weights were kept is ringed."""
    train = [(e["step"], e["loss"]) for e in metrics if "loss" in e]
    validation = [(e["step"], e["validation_loss"]) for e in metrics if "validation_loss" in e]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7, 3), layout="constrained")
        if train:
            axes.plot(*zip(*train, strict=True), color="#9aa5b1", linewidth=1, label="training (one batch)")
        if validation:
            axes.plot(*zip(*validation, strict=True), color="#b03a2e", marker="o", label="validation (other topics)")
            for step, loss in {validation[0], validation[-1], *(pair for pair in validation if pair[0] == kept)}:
                axes.annotate(f"{loss:.2f}", (step, loss), textcoords="offset points", xytext=(0, 9), ha="center", fontsize=9)
                if step == kept:
                    axes.plot([step], [loss], marker="o", markersize=12, fillstyle="none", color="#b03a2e", label="kept")
        axes.set_xlabel("step")
        axes.set_ylabel("loss (nats per token)")
        axes.margins(y=0.15)
        if train or validation:
            axes.legend(frameon=False)
    return figure


def save_curve(metrics: Sequence[Mapping[str, Any]], path: Path, kept: int | None = None) -> None:
    """Write the curve as a PNG."""
    figure = loss_curve(metrics, kept)
    with written_file(path) as aside:
        figure.savefig(aside, dpi=120, format="png")
    plt.close(figure)
