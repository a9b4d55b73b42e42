"""The paper's figures, for print: one call each, tables of `analysis` and maps in, a matplotlib Figure out.

Widths are those of a column (3.3 inches) and of a page (6.8), text is 7 points and more at that size, colours are told apart by
every kind of colour vision. A host has more columns (neurons) than a picture has pixels, and a renderer that averages erases a
stripe one column wide: maps are pooled by the value of largest magnitude before they are drawn, to fewer columns than any
resolution of 150 dots an inch and more has pixels.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import xarray as xr

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from realigner.files import written_file

COLUMN, PAGE = 3.3, 6.8  # inches
DPI = 300
FORMATS = ("png", "svg", "pdf")
COLOURS = "RdBu_r"  # diverging, colour-blind safe
TONES = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")  # Okabe and Ito's
BARE = "#8a93a0"  # baselines
_DASHES = ("-", (0, (4, 1.5)), (0, (1, 1)), (0, (4, 1.5, 1, 1.5)))
_STYLE: Any = {
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
    columns = int(_PER_INCH * axes.get_position().width * axes.figure.get_figwidth())  # type: ignore[union-attr]
    image = axes.imshow(
        pool_columns(grid, columns),
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
    _mark(axes, [(names.index(mark), mark) for mark in marks if mark in names], width)
    bar = axes.figure.colorbar(image, ax=axes, pad=0.01, fraction=0.03, extend="max" if absolute else "both")
    bar.ax.tick_params(labelsize=7, length=2)
    bar.outline.set_linewidth(0.4)
    bar.locator = matplotlib.ticker.MaxNLocator(4)
    bar.update_ticks()


def _mark(axes: Axes, marks: Sequence[tuple[int, int]], width: int) -> None:
    """Triangles above the map at the leading indices; labels only where they do not run into each other."""
    inches = axes.get_position().width * axes.figure.get_figwidth()  # type: ignore[union-attr]
    labelled: list[int] = []
    for at, index in marks:
        axes.plot([at], [1.03], "v", markersize=3, color="black", transform=axes.get_xaxis_transform(), clip_on=False)
        if all(abs(at - other) > 0.32 / inches * width for other in labelled):
            labelled.append(at)
            place: Any = {"xycoords": axes.get_xaxis_transform(), "textcoords": "offset points"}
            axes.annotate(str(index), (at, 1.03), (0, 3), ha="center", fontsize=7, annotation_clip=False, **place)


def _maps(
    maps: Mapping[str, xr.DataArray],
    marks: Mapping[str, Sequence[int]],
    absolute: bool,
    width: float,
    height: float,
    across: int = 1,
) -> Figure:
    rows = -(-len(maps) // across)
    with plt.rc_context(_STYLE):
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
    """Figure 2 of the paper: the signed mean of the IRM's outputs, layer x neuron; one map, or several above each other.

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
    runs = _ordered(table)
    across = 4 if width > COLUMN + 1 else 2
    rows = -(-len(runs) // across)
    with plt.rc_context(_STYLE):
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
            ax.bar(place, own["count"], width=0.9 * gap, color=_colour(table, runs[number]))
            ax.set_title(runs[number], loc="left")
            ax.tick_params(labelbottom=number + across >= len(runs))
        figure.supxlabel(x_label, fontsize=7.5)
        figure.supylabel(y_label, fontsize=7.5)
    return figure


def figure_sparsity(table: pd.DataFrame, statistics: Sequence[str] = ("hoyer", "small_share"), width: float = PAGE) -> Figure:
    """Sparsity by layer, a line a run; dotted: Gaussian noise.

    Args:
        table: of `analysis.sparsity`.
        statistics: a panel each; ``small_share`` is the paper's share of |v| < 1e-4.
        width: in inches.
    """
    names = {"hoyer": "Hoyer's sparsity", "small_share": "share of |v| < 0.0001", "gini": "Gini", "kurtosis": "kurtosis",
             "participation": "participation ratio"}  # fmt: skip
    by_layer = table[table["layer"].astype(str) != "all"]
    runs = [run for run in _ordered(by_layer) if run != "all"]
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(1, len(statistics), figsize=(width, 2.5), layout="constrained", squeeze=False)
        for ax, statistic in zip(axes[0], statistics, strict=True):
            own = by_layer[by_layer["statistic"] == statistic]
            for run in runs:
                line = own[own["run"] == run].assign(layer=lambda t: t["layer"].astype(int)).sort_values("layer")
                ax.plot(line["layer"], line["value"], color=_colour(table, run), linestyle=_dash(table, run), lw=1, label=run)
            null = own["null"].dropna()
            if len(null):
                ax.axhline(float(null.iloc[0]), color="black", lw=0.8, linestyle=":")
            ax.set_xlabel("layer")
            ax.set_ylabel(names.get(statistic, statistic))
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def _ordered(table: pd.DataFrame) -> list[str]:
    """Runs by tone and seed, baselines last."""
    runs = table.drop_duplicates("run")
    key = [(tone == "untrained", tone, seed) for tone, seed in zip(runs["tone"], runs["seed"], strict=True)]
    return [run for _, run in sorted(zip(key, runs["run"], strict=True))]


def _colour(table: pd.DataFrame, run: str) -> str:
    tones = sorted(set(table["tone"]) - {"untrained", "all"})
    tone = table.loc[table["run"] == run, "tone"].iloc[0]
    return TONES[tones.index(tone) % len(TONES)] if tone in tones else BARE


def _dash(table: pd.DataFrame, run: str) -> Any:
    seeds = sorted(set(table.loc[table["run"] != "all", "seed"]))
    return _DASHES[seeds.index(table.loc[table["run"] == run, "seed"].iloc[0]) % len(_DASHES)]


def length_histogram(lengths: Sequence[int], label: str) -> Figure:
    """How many rows have which length; the median is marked."""
    with plt.rc_context(_STYLE | {"font.size": 10, "axes.labelsize": 10, "xtick.labelsize": 9, "ytick.labelsize": 9}):
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
    with written_file(path) as aside, plt.rc_context(_STYLE | {"svg.hashsalt": "realigner"}):
        figure.savefig(aside, format=form, dpi=dpi, metadata=metadata)
    return path


def save_figures(
    trace: xr.Dataset,
    analysis: Any,
    folder: str | Path,
    records: Mapping[str, Mapping[str, Any]] | None = None,
    formats: Iterable[str] = FORMATS,
) -> list[Path]:
    """Write all of the paper's figures of a trace.

    Args:
        trace: the trace.
        analysis: of `analyze(trace)`; without it, there is no figure of sparsity.
        folder: where; it is made.
        records: run -> its run.json; without any, there is no Figure 1.
        formats: of png, svg, pdf.

    Returns:
        The files, figure by figure.
    """
    folder, written = Path(folder), list[Path]()
    formats = list(formats)
    for name, figure in _all_figures(trace, analysis, records or {}):
        written += [save_figure(figure, folder / f"{name}.{form}") for form in formats]
        plt.close(figure)
    return written


def _all_figures(trace: xr.Dataset, analysis: Any, records: Mapping[str, Mapping[str, Any]]) -> Iterable[tuple[str, Figure]]:
    from realigner.analysis import layer_counts, leading_indices, run_maps, top_histogram
    from realigner.report.diagram import figure1

    if records:
        yield "figure1-architecture", figure1(next(iter(records.values())), int(trace.sizes["neuron"]))
    signed, size = run_maps(trace, "signed"), run_maps(trace, "absolute")
    facts = trace.attrs["runs"]
    runs = sorted(signed["run"].values.tolist(), key=lambda r: (facts[r]["untrained"], facts[r]["tone"], facts[r]["seed"]))
    trained = [run for run in runs if not facts[run]["untrained"]] or runs
    marks = {run: [int(i) for i in leading_indices(size.sel(run=run), 5)["neuron"]] for run in runs}
    first = list({facts[run]["tone"]: run for run in reversed(trained)}.values())[::-1]  # one of each tone
    bare = [run for run in runs if facts[run]["untrained"]][:1]
    yield "figure2-signed", figure2({run: signed.sel(run=run) for run in first[:2]}, marks=marks)
    for k in (100, 1000, 10_000):
        if k <= trace.sizes["rank"]:
            yield f"figure3-timing-{k}", figure3(top_histogram(trace, k, bins=20), k)
    yield "figure4-absolute", figure4({run: size.sel(run=run) for run in [*first, *bare]}, marks)
    yield "appendix-signed", appendix_maps({run: signed.sel(run=run) for run in runs}, marks)
    yield "appendix-absolute", appendix_maps({run: size.sel(run=run) for run in runs}, marks, absolute=True)
    k = min(1000, trace.sizes["rank"])
    yield "layers", figure_layers(layer_counts(trace, k), k)
    if analysis is not None:
        yield "sparsity", figure_sparsity(analysis.sparsity)
