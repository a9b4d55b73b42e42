"""The paper's figures: a stripe one column wide shows in every map, text is large enough, every format is written."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from matplotlib import image as reader
from matplotlib.figure import Figure
from matplotlib.text import Text

from realigner.analysis import analyze, run_maps
from realigner.errors import RealignerError
from realigner.evaluation.evaluation_file import EvaluationFile
from realigner.report.diagram import figure1
from realigner.report.evaluation_figures import (
    concept_against_kl,
    save_evaluation_figures,
    summary_against_parameters,
    summary_by_method,
)
from realigner.report.figures import (
    appendix_maps,
    figure2,
    figure4,
    length_histogram,
    pool_columns,
)
from realigner.report.paper_figures import save_figures
from realigner.report.plot_style import COLUMN, DPI, PAGE, as_png, as_svg, save_figure
from realigner.training.loss_plot import loss_curve
from tests.planted import planted_trace
from tests.planted_evaluation import METHODS, planted_evaluation

RUNS = {"anger-42": ("anger", 42), "sadness-420": ("sadness", 420), "untrained-42": ("untrained", 42)}
FIGURES = [
    "figure1-architecture", "figure2-signed", "figure3-timing-100", "figure4-absolute", "appendix-signed", "appendix-absolute",
    "layers", "sparsity",
]  # fmt: skip


def record(preset: str = "compact", **recipe: Any) -> dict[str, Any]:
    return {
        "recipe": {"preset": preset, **recipe},
        "host": {"name": "planted", "fingerprint": {"num_layers": 6}},
        "irm": {"preset": preset, "layers": [0, 2, 5], "parameters": 1234, "host_parameters": 123400},
    }


def stripe(index: int = 1512) -> xr.DataArray:
    rng = np.random.default_rng(1)
    values = rng.normal(scale=0.05, size=(32, 4096))
    values[:, index] = 1.0
    return xr.DataArray(values, dims=("layer", "neuron"), coords={"layer": range(32), "neuron": range(4096)})


def test_pooling_keeps_the_largest_magnitude_with_its_sign() -> None:
    values = np.zeros((2, 4096))
    values[0, 1512], values[1, 77] = -3.0, 2.0
    pooled = pool_columns(values, 1200)
    assert pooled.shape == (2, 1200)
    assert pooled[0].min() == -3.0
    assert pooled[1].max() == 2.0
    assert np.array_equal(pool_columns(values, 5000), values)


def columns_of(figure: Figure, axes: int, absolute: bool, path: Path) -> np.ndarray:
    """Where, from 0 to 1 across a map, the PNG's pixels are of the last colour from top to bottom."""
    pixels = reader.imread(save_figure(figure, path))[..., :3]
    height, width = pixels.shape[:2]
    x0, y0, x1, y1 = figure.axes[axes].get_position().extents
    drawn = pixels[int((1 - y1) * height) + 2 : int((1 - y0) * height) - 2, int(x0 * width) : int(x1 * width) + 1]
    last = (252, 253, 191) if absolute else (103, 0, 31)
    hit = (abs(drawn - np.array(last) / 255) < 0.08).all(axis=2)
    found: np.ndarray = np.flatnonzero(hit.mean(axis=0) > 0.93) / drawn.shape[1]  # the axis' ticks darken a few rows
    return found


@pytest.mark.parametrize("width", [COLUMN, PAGE])
@pytest.mark.parametrize("index", [0, 1512, 4095])
def test_a_stripe_one_column_wide_is_visible(index: int, width: float, tmp_path: Path) -> None:
    maps = {"a": stripe(index), "b": stripe(index)}
    places = [
        columns_of(figure2(maps, width=width), 0, False, tmp_path / "2.png"),
        columns_of(figure2(maps["a"], "x", [index], width), 0, False, tmp_path / "one.png"),
        columns_of(figure4(maps, width=width), 1, True, tmp_path / "4.png"),
        columns_of(appendix_maps(maps), 1, False, tmp_path / "a.png"),
        columns_of(appendix_maps(maps, absolute=True), 0, True, tmp_path / "b.png"),
    ]
    for found in places:
        assert len(found) >= 1
        assert abs(found - index / 4096).max() < 0.01


@pytest.mark.proof
def test_all_figures_in_all_formats(tmp_path: Path) -> None:
    trace = planted_trace(RUNS)
    analysis = analyze(trace, permutations=10, resamples=10)
    written = save_figures(trace, analysis, tmp_path / "all", {"anger-42": record()})
    assert [path.name for path in written] == [f"{name}.{form}" for name in FIGURES for form in ("png", "svg", "pdf")]
    for path in written:
        starts = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}
        assert path.read_bytes().startswith(starts[path.suffix])
    assert "<text" in (tmp_path / "all" / "figure2-signed.svg").read_text()
    assert len(save_figures(trace, None, tmp_path / "few", formats=["png"])) == len(FIGURES) - 2
    with pytest.raises(RealignerError, match="cannot be written"):
        save_figures(trace, None, tmp_path / "all" / "figure2-signed.png" / "x", formats=["png"])


def test_text_is_seven_points_and_more_and_columns_are_as_wide_as_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Figure] = []

    def keep(figure: Figure, path: Path) -> Path:
        seen.append(figure)
        path.touch()
        return path

    monkeypatch.setattr("realigner.report.paper_figures.save_figure", keep)
    trace = planted_trace(RUNS)
    save_figures(trace, analyze(trace, permutations=10, resamples=10), tmp_path / "all", {"anger-42": record()}, ["png"])
    assert len(seen) == len(FIGURES)
    for figure in seen:
        texts: list[Any] = figure.findobj(Text)
        assert figure.get_figwidth() in (COLUMN, PAGE)
        assert all(float(text.get_fontsize()) >= 7 for text in texts if text.get_text())
        pixels = reader.imread(io.BytesIO(as_png(figure, DPI)))
        assert pixels.shape[1] == round(figure.get_figwidth() * DPI)


@pytest.mark.parametrize(
    ("preset", "recipe", "said"),
    [
        ("compact", {"widths": [24, 16], "rank": 4}, ["50, scaled", "24 ReLU", "16 ReLU", ">4<", "3 \u00d7 50"]),
        ("paper", {}, [">50<", "150 ReLU", "3 \u00d7 50"]),
    ],
)
def test_the_architecture_is_the_configs(preset: str, recipe: dict[str, Any], said: list[str]) -> None:
    svg = as_svg(figure1(record(preset, **recipe), 50))
    assert svg.startswith("<svg")
    for text in [*said, "planted, frozen", "layer 5", "1.0% of the host"]:
        assert text in svg
    assert svg == as_svg(figure1(record(preset, **recipe), 50))


@pytest.mark.parametrize(("layers", "drawn"), [([3, 4], [3, 4, 5]), ([5], [4, 5]), ([0, 1, 2], [0, 1, 2]), ([0], [0, 1, 5])])
def test_the_layers_of_the_irm_are_drawn(layers: list[int], drawn: list[int]) -> None:
    made = record("paper")
    made["irm"]["layers"] = layers
    svg = as_svg(figure1(made, 50))
    assert [layer for layer in range(6) if f"layer {layer}" in svg] == drawn


def test_missing_layers_and_nothing_at_all() -> None:
    maps = run_maps(planted_trace()).isel(run=0)
    gone = maps.copy()
    gone[2] = np.nan
    for figure in (
        figure4({"a": gone, "nothing": maps * 0}, {"a": [17]}),
        loss_curve([{"step": 1, "loss": 2.0, "learning_rate": 1.0}]),
        length_histogram([1, 2, 2, 5], "words"),
    ):
        assert as_png(figure).startswith(b"\x89PNG")


def test_figures_of_an_evaluation(tmp_path: Path) -> None:
    """Every method is drawn at its numbers and named, whatever its name is."""
    methods = {f"${name}_$x" if name == "lora" else name: means for name, means in METHODS.items()}
    values = planted_evaluation(methods, ("anger", "$sadness_"), 20)
    written = save_evaluation_figures(values, tmp_path / "figures", ["svg"])
    assert [path.name for path in written] == [f"evaluation-{name}.svg" for name in ("concept-kl", "summary", "parameters")]
    svg = (tmp_path / "figures" / "evaluation-concept-kl.svg").read_text()
    assert all(f">{name}</text>" in svg for name in ("$lora_$x", "irm", "bare", "0.25"))
    found = EvaluationFile.model_validate(values)
    own = found.tones["anger"]
    for figure, shown in ((concept_against_kl(found), 5), (summary_against_parameters(found), 2)):
        drawn = [np.asarray(line.get_xydata()) for line in figure.axes[0].lines]
        spots = [tuple(points[0].tolist()) for points in drawn if len(points) == 1]
        assert len(spots) == shown
        across = own.methods["irm"].whole.kl if shown == 5 else 369_680
        up = own.methods["irm"].estimates.named.mean if shown == 5 else own.methods["irm"].estimates.summary.mean
        assert (across, up) in spots
        texts = [text for axes in figure.axes for text in axes.texts]
        assert {text.get_text() for text in texts} >= {"irm", "$lora_$x"}
        assert all(float(text.get_fontsize()) >= 7 for text in figure.findobj(Text) if text.get_text())
    best_first = [label.get_text() for label in summary_by_method(found).axes[0].get_yticklabels()][::-1]
    means = {name: sum(tone.methods[name].estimates.summary.mean for tone in found.tones.values()) for name in methods}
    assert best_first == sorted(methods, key=lambda name: -means[name])
