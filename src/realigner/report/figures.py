"""The paper's figures, drawn with matplotlib.

A host has more columns (neurons) than a picture has pixels, and a renderer that averages erases a stripe one column wide.
So maps are pooled by the value of largest magnitude before they are drawn.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import matplotlib
import numpy as np
import xarray as xr

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS = "RdBu_r"  # diverging, colour-blind safe
_STYLE: Any = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "font.family": "DejaVu Sans"}


def pool_columns(values: np.ndarray, columns: int) -> np.ndarray:
    """Reduce ``[row, column]`` to at most `columns` columns; each keeps its value of largest magnitude, sign and all.

    Example:
        >>> pool_columns(np.array([[0.0, -5.0, 1.0, 2.0]]), 2)
        array([[-5.,  2.]])
    """
    width = values.shape[1]
    if width <= columns:
        return values
    edges = np.linspace(0, width, columns + 1).round().astype(int)
    parts = [values[:, a:b] for a, b in pairwise(edges)]
    return np.stack([np.take_along_axis(p, abs(p).argmax(axis=1)[:, None], axis=1)[:, 0] for p in parts], axis=1)


def heat_map(
    axes: Axes, values: xr.DataArray, title: str, marks: Sequence[int] = (), columns: int = 800, absolute: bool = False
) -> None:
    """Draw one map ``[layer, neuron]`` with its own symmetric colour scale (limit: the 99.9% quantile of |value|).

    Args:
        axes: where.
        values: the map.
        title: its title.
        marks: neuron indices to mark above the map.
        columns: columns drawn at most; fewer than the map has pixels, at 100 dots an inch and up.
        absolute: the values are magnitudes: colours run from 0 up.
    """
    grid = values.transpose("layer", "neuron").values
    layers, width = values["layer"].values, grid.shape[1]
    limit = float(np.quantile(abs(grid), 0.999)) or float(abs(grid).max()) or 1.0
    image = axes.imshow(
        pool_columns(grid, columns),
        aspect="auto",
        interpolation="nearest",
        cmap="magma" if absolute else COLOURS,
        vmin=0 if absolute else -limit,
        vmax=limit,
        extent=(-0.5, width - 0.5, len(layers) - 0.5, -0.5),
    )
    axes.spines[:].set_visible(False)  # a spine would hide half of the first column
    axes.set_title(title, loc="left", pad=18 if len(marks) else 6)
    axes.set_ylabel("layer")
    axes.set_xlabel("neuron index")
    step = max(1, len(layers) // 8)
    axes.set_yticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
    _mark(axes, marks, width)
    bar = axes.figure.colorbar(image, ax=axes, pad=0.01, fraction=0.03, extend="max" if absolute else "both")
    bar.ax.tick_params(labelsize=8)


def _mark(axes: Axes, marks: Sequence[int], width: int) -> None:
    """Triangles above the map at the leading indices; labels only where they do not run into each other."""
    labelled: list[int] = []
    for index in marks:
        axes.plot(
            [index], [1.015], marker="v", markersize=4, color="black", transform=axes.get_xaxis_transform(), clip_on=False
        )
        if all(abs(index - other) > 0.035 * width for other in labelled):
            labelled.append(index)
            axes.annotate(
                str(index), (index, 1.04), xycoords=axes.get_xaxis_transform(), ha="center", fontsize=8, annotation_clip=False
            )


def figure2(values: xr.DataArray, title: str, marks: Sequence[int] = ()) -> Figure:
    """Figure 2 of the paper: the signed mean of the IRM's outputs, layer x neuron."""
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(figsize=(11, 3.6), layout="constrained")
        heat_map(axes, values, title, marks)
    return figure


def figure4(
    maps: Mapping[str, xr.DataArray], marks: Mapping[str, Sequence[int]] | None = None, absolute: bool = True
) -> Figure:
    """Figure 4 of the paper: several IRMs above each other, the untrained among them, each with its own colour scale."""
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(len(maps), 1, figsize=(11, 3.3 * len(maps)), layout="constrained", squeeze=False)
        for ax, (title, values) in zip(axes[:, 0], maps.items(), strict=True):
            heat_map(ax, values, title, (marks or {}).get(title, ()), absolute=absolute)
    return figure


def length_histogram(lengths: Sequence[int], label: str) -> Figure:
    """How many rows have which length; the median is marked."""
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(figsize=(7, 3), layout="constrained")
        low, high = min(lengths), max(lengths)
        width = max(1, -(-(high - low + 1) // 60))
        axes.hist(lengths, bins=list(range(low, high + width + 1, width)), color="#5b7a99", align="left")
        middle = sorted(lengths)[len(lengths) // 2]
        axes.axvline(middle, color="#b03a2e", linewidth=1.2, label=f"median {middle}")
        axes.set_xlabel(label)
        axes.set_ylabel("rows")
        axes.legend(frameon=False)
    return figure


def as_png(figure: Figure, dpi: int = 150) -> bytes:
    """The figure as PNG; the figure is closed."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=dpi)
    plt.close(figure)
    return stream.getvalue()
