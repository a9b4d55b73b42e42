"""All of the paper's figures of a trace, written as files, with a list of them that tells a figure that was changed since."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import xarray as xr
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from realigner.analysis import Analysis, layer_counts, leading_indices, run_maps, top_histogram
from realigner.errors import RealignerError
from realigner.files import Artifact, parsed, read_bytes, taken, write_text
from realigner.report.diagram import figure1
from realigner.report.figures import appendix_maps, figure2, figure3, figure4, figure_layers, figure_sparsity
from realigner.report.plot_style import FORMATS, save_figure
from realigner.report.run_styles import RunStyles

_MOST_RUNS = 500


def save_figures(
    trace: xr.Dataset,
    analysis: Analysis | None,
    folder: str | Path,
    records: Mapping[str, Mapping[str, Any]] | None = None,
    formats: Iterable[str] = FORMATS,
    force: bool = False,
) -> list[Path]:
    """Write all of the paper's figures of a trace.

    Args:
        trace: the trace.
        analysis: from `analyze(trace)`; None: no figure of sparsity.
        folder: is created; with `force` it may hold figures written before, as they were written, and nothing else.
        records: run -> its run.json; without any there is no Figure 1.
        formats: of png, svg, pdf.
        force: replace a folder of figures.

    Returns:
        The files, figure by figure.

    Raises:
        RealignerError: when something else is there, a file cannot be written, or the trace has more than 500 runs, each of
            which has its panel.
    """
    if (runs := len(trace.attrs["runs"])) > _MOST_RUNS:
        raise RealignerError(f"figures: the trace has {runs:,} runs; give one of {_MOST_RUNS} at most")
    folder, written = Path(folder), list[str]()
    formats = list(formats)
    with taken(folder, FIGURES, force) as place, place.folder() as aside:
        for name, figure in _all_figures(trace, analysis, records or {}):
            written += [save_figure(figure, aside / f"{name}.{form}").name for form in formats]
            plt.close(figure)
        write_text(aside / _LIST, json.dumps({"figures": {name: _sha256(aside / name) for name in written}}, indent=2) + "\n")
    return [folder / name for name in written]


def _sha256(path: Path) -> str:
    return hashlib.sha256(read_bytes(path)).hexdigest()


def _read_list(folder: Path) -> None:
    """Raise unless a folder's figures are those that its list names, as they were written."""
    found = parsed(read_bytes(folder / _LIST), folder / _LIST)["figures"]
    if {path.name: _sha256(path) for path in folder.iterdir() if path.name != _LIST} != found:
        raise RealignerError(f"{folder}: a figure was changed since it was written")


_LIST = "figures.json"
FIGURES = Artifact("figures as they were written", _read_list, r"figures\.json|[a-z0-9-]+\.(png|svg|pdf)")


def _all_figures(
    trace: xr.Dataset, analysis: Analysis | None, records: Mapping[str, Mapping[str, Any]]
) -> Iterable[tuple[str, Figure]]:
    if records:
        yield "figure1-architecture", figure1(next(iter(records.values())), int(trace.sizes["neuron"]))
    signed, size = run_maps(trace, "signed"), run_maps(trace, "absolute")
    styles = RunStyles.of(trace)
    runs, facts = styles.names, styles.facts
    marks = {run: [int(i) for i in leading_indices(size.sel(run=run), 5)["neuron"]] for run in runs}
    first = list({facts[run]["tone"]: run for run in reversed(styles.trained)}.values())[::-1]  # one of each tone
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
