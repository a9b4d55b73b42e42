"""The paper's figures as matplotlib figures, from tables and maps of `analysis`, one function each.

A host has more columns (neurons) than a picture has pixels, and a renderer that averages erases a
stripe one column wide: maps are pooled by the value of largest magnitude before they are drawn, to fewer columns than any
resolution of 150 dots an inch and more has pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import xarray as xr
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from realigner.report.plot_style import BARE, COLOURS, COLUMN, DASHES, PAGE, STYLE, TONES
from realigner.report.run_styles import RunStyles

_PER_INCH = 140  # columns drawn at most; axes get no wider than they begin


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


def heat_map(axes: Axes, values: xr.DataArray, title: str, marks: Sequence[int] = (), absolute: bool = False) -> None:
    """Draw one map ``[layer, neuron]`` with its own symmetric colour scale (limit: the 99.9% quantile of |value|).

    Args:
        axes: where.
        values: the map; layers of NaN are left out.
        title: its title.
        marks: neuron indices to mark above the map.
        absolute: the values are magnitudes: colours run from 0 up.
    """
    values = values.dropna("layer", how="all")
    grid = values.transpose("layer", "neuron").values
    layers, width = values["layer"].values, grid.shape[1]
    limit = float(np.quantile(abs(grid), 0.999)) or float(abs(grid).max()) or 1.0
    inches = axes.get_position().width * axes.figure.get_figwidth()  # type: ignore[union-attr]
    image = axes.imshow(
        pool_columns(grid, int(_PER_INCH * inches)),
        aspect="auto",
        interpolation="none",
        cmap="magma" if absolute else COLOURS,
        vmin=0 if absolute else -limit,
        vmax=limit,
        extent=(-0.5, width - 0.5, len(layers) - 0.5, -0.5),
    )
    axes.spines[:].set_visible(False)  # a spine would hide half of the first column
    axes.set_title(title, loc="left", pad=14 if len(marks) else 4)
    axes.set_ylabel("layer")
    axes.set_xlabel("neuron index")
    step = max(1, -(-len(layers) // 8))
    axes.set_yticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
    names = values["neuron"].values.tolist()
    labelled: list[int] = []  # only marks whose labels do not run into each other
    for index in marks:
        if index not in names:
            continue
        at = names.index(index)
        axes.plot([at], [1.03], "v", markersize=3, color="black", transform=axes.get_xaxis_transform(), clip_on=False)
        if all(abs(at - other) > 0.32 / inches * width for other in labelled):
            labelled.append(at)
            place: Any = {"xycoords": axes.get_xaxis_transform(), "textcoords": "offset points"}
            axes.annotate(str(index), (at, 1.03), (0, 3), ha="center", fontsize=7, annotation_clip=False, **place)
    bar = axes.figure.colorbar(image, ax=axes, pad=0.01, fraction=0.03, extend="max" if absolute else "both")
    bar.ax.tick_params(labelsize=7, length=2)
    bar.outline.set_linewidth(0.4)
    bar.locator = matplotlib.ticker.MaxNLocator(4)
    bar.update_ticks()


def _maps(
    maps: Mapping[str, xr.DataArray],
    marks: Mapping[str, Sequence[int]],
    absolute: bool,
    width: float,
    height: float,
    across: int = 1,
) -> Figure:
    rows = -(-len(maps) // across)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(rows, across, figsize=(width, height * rows), layout="constrained", squeeze=False)
        places = axes.ravel()
        for ax in places[len(maps) :]:
            ax.set_visible(False)
        for number, (ax, (title, values)) in enumerate(zip(places, maps.items(), strict=False)):
            heat_map(ax, values, title, marks.get(title, ()), absolute)
            if number + across < len(maps):
                ax.set_xlabel("")
    return figure


def figure2(
    maps: Mapping[str, xr.DataArray] | xr.DataArray,
    title: str = "",
    marks: Mapping[str, Sequence[int]] | Sequence[int] | None = None,
    width: float = PAGE,
) -> Figure:
    """Figure 2 of the paper: the signed mean of the IRM's outputs, layer x neuron; one map, or several in rows.

    Args:
        maps: of `analysis.run_maps(trace, "signed")`: title -> one run's map; or one map.
        title: of a single map.
        marks: title -> indices to mark; or those of the single map.
        width: in inches.
    """
    if isinstance(maps, xr.DataArray):
        maps, marks = {title: maps}, {title: marks if isinstance(marks, Sequence) else ()}
    assert not isinstance(marks, Sequence)
    return _maps(maps, marks or {}, False, width, 2.0)


def figure4(
    maps: Mapping[str, xr.DataArray],
    marks: Mapping[str, Sequence[int]] | None = None,
    absolute: bool = True,
    width: float = PAGE,
) -> Figure:
    """Figure 4 of the paper: several IRMs above each other, the untrained among them, each with its own colour scale."""
    return _maps(maps, marks or {}, absolute, width, 1.8)


def appendix_maps(
    maps: Mapping[str, xr.DataArray], marks: Mapping[str, Sequence[int]] | None = None, absolute: bool = False
) -> Figure:
    """The appendix's maps: every run, two beside each other."""
    return _maps(maps, marks or {}, absolute, PAGE, 1.6, across=2)


def figure3(histogram: pd.DataFrame, k: int = 1000, width: float = PAGE) -> Figure:
    """Figure 3 of the paper: where in a text the k largest |values| of each run lie.

    Args:
        histogram: of `analysis.top_histogram`: ``run, tone, position, count``.
        k: how many they were.
        width: in inches.
    """
    return _bars(histogram, "position", "place in the text", f"of the {k:,} largest", width)


def figure_layers(counts: pd.DataFrame, k: int = 1000, width: float = PAGE) -> Figure:
    """How many of the k largest |values| of each run lie in each layer; from `analysis.layer_counts`."""
    return _bars(counts, "layer", "layer", f"of the {k:,} largest", width)


def _bars(table: pd.DataFrame, x: str, x_label: str, y_label: str, width: float) -> Figure:
    styles = RunStyles.of_table(table)
    runs = styles.names
    across = 4 if width > COLUMN + 1 else 2
    rows = -(-len(runs) // across)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            rows, across, figsize=(width, 0.5 + 1.15 * rows), layout="constrained", squeeze=False, sharex=True, sharey=True
        )
        for number, ax in enumerate(axes.ravel()):
            if number >= len(runs):
                ax.set_visible(False)
                continue
            own = table[table["run"] == runs[number]].sort_values(x)
            place = own[x].to_numpy(dtype=float)
            gap = float(np.median(np.diff(place))) if len(place) > 1 else 1.0
            ax.bar(place, own["count"], width=0.9 * gap, color=_colour(styles, runs[number]))
            ax.set_title(runs[number], loc="left")
            ax.tick_params(labelbottom=number + across >= len(runs))
        figure.supxlabel(x_label, fontsize=7.5)
        figure.supylabel(y_label, fontsize=7.5)
    return figure


def figure_sparsity(table: pd.DataFrame) -> Figure:
    """Sparsity by layer, one line for each run (`table` of `analysis.sparsity`): Hoyer's, and the paper's share of |v| < 1e-4.

    Dotted: Gaussian noise.
    """
    statistics = {"hoyer": "Hoyer's sparsity", "small_share": "share of |v| < 0.0001"}
    by_layer = table[(table["layer"].astype(str) != "all") & (table["run"] != "all")]
    styles = RunStyles.of_table(by_layer)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(statistics), figsize=(PAGE, 2.5), layout="constrained", squeeze=False)
        for ax, (statistic, name) in zip(axes[0], statistics.items(), strict=True):
            own = by_layer[by_layer["statistic"] == statistic]
            for run in styles.names:
                line = own[own["run"] == run].assign(layer=lambda t: t["layer"].astype(int)).sort_values("layer")
                look: Any = {"color": _colour(styles, run), "linestyle": DASHES[styles.dash(run)]}
                ax.plot(line["layer"], line["value"], lw=1, label=run, **look)
            null = own["null"].dropna()
            if len(null):
                ax.axhline(float(null.iloc[0]), color="black", lw=0.8, linestyle=":")
            ax.set_xlabel("layer")
            ax.set_ylabel(name)
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def _colour(styles: RunStyles, run: str) -> str:
    return (BARE, *TONES)[styles.colour(run)]


def length_histogram(lengths: Sequence[int], label: str) -> Figure:
    """How many rows have which length; the median is marked."""
    with plt.rc_context(STYLE | {"font.size": 10, "axes.labelsize": 10, "xtick.labelsize": 9, "ytick.labelsize": 9}):
        figure, axes = plt.subplots(figsize=(7, 3), layout="constrained")
        low, high = min(lengths), max(lengths)
        width = max(1, -(-(high - low + 1) // 60))
        axes.hist(lengths, bins=[edge - 0.5 for edge in range(low, high + width + 1, width)], color="#5b7a99")
        middle = sorted(lengths)[len(lengths) // 2]
        axes.axvline(middle, color="#b03a2e", linewidth=1.2, label=f"median {middle}")
        axes.set_xlabel(label)
        axes.set_ylabel("rows")
        axes.legend(frameon=False)
    return figure
