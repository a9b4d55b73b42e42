"""The look of matplotlib figures (widths, colours, fonts) and how they are written.

Widths are those of a column (3.3 inches) and of a page (6.8), text is 7 points and more at that size, colours can be told apart
with any kind of colour vision.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from realigner.files import written_file

COLUMN, PAGE = 3.3, 6.8  # inches
DPI = 300
FORMATS = ("png", "svg", "pdf")
COLOURS = "RdBu_r"  # diverging, colour-blind safe
TONES = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")  # Okabe and Ito's
BARE = "#8a93a0"  # baselines
DASHES = ("-", (0, (4, 1.5)), (0, (1, 1)), (0, (4, 1.5, 1, 1.5)))
STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 7.5,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "svg.fonttype": "none",
    "pdf.fonttype": 42,
}


def as_png(figure: Figure, dpi: int = 150) -> bytes:
    """The figure as PNG; the figure is closed."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=dpi)
    plt.close(figure)
    return stream.getvalue()


def as_svg(figure: Figure) -> str:
    """The figure as an ``<svg>`` element to put into a page, text as text, the same for the same figure; it is closed."""
    stream = io.StringIO()
    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": "realigner"}):
        figure.savefig(
            stream, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None}, transparent=True
        )
    plt.close(figure)
    text = stream.getvalue()
    return text[text.index("<svg") :]


def save_figure(figure: Figure, path: str | Path, dpi: int = DPI) -> Path:
    """Write a figure as what its name ends in: PNG, SVG (text stays text) or PDF (fonts embedded). It stays open.

    Raises:
        RealignerError: when it cannot be written.
    """
    path = Path(path)
    form = path.suffix.lstrip(".")
    metadata: dict[str, Any] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(form, {})
    with written_file(path) as aside, plt.rc_context(STYLE | {"svg.hashsalt": "realigner"}):
        figure.savefig(aside, format=form, dpi=dpi, metadata=metadata)
    return path
