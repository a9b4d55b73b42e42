"""Figures and the page: stripes survive, nothing is loaded from elsewhere, text is escaped."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from matplotlib import image as reader

import realigner as ra
from realigner.analysis import run_maps
from realigner.errors import RealignerError
from realigner.report import Evidence, gather, render
from realigner.report.figures import as_png, figure2, figure4, pool_columns
from realigner.training import make_recipe, train
from realigner.training.curve import loss_curve
from tests.planted import planted_trace
from tests.tiny import some_rows, tiny_pair


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


@pytest.mark.parametrize("index", [0, 1, 1511, 1512, 4095])
def test_a_stripe_one_column_wide_is_visible(index: int) -> None:
    """In the PNG, some pixel column at the stripe's place is dark red from top to bottom of the map."""
    figure = figure2(stripe(index), "x")
    pixels = reader.imread(io.BytesIO(as_png(figure, dpi=100)))[..., :3]
    height, width = pixels.shape[:2]
    x0, y0, x1, y1 = figure.axes[0].get_position().extents
    drawn = pixels[int((1 - y1) * height) + 2 : int((1 - y0) * height) - 2, int(x0 * width) : int(x1 * width) + 1]
    red = (drawn[..., 0] > 0.35) & (drawn[..., 1] < 0.15) & (drawn[..., 2] < 0.25)
    columns = np.flatnonzero(red.mean(axis=0) > 0.95)  # the ticks of the axis darken a few rows of the first column
    assert 1 <= len(columns) <= 3
    assert abs(columns.mean() / drawn.shape[1] - index / 4096) < 0.005


def test_figures_draw() -> None:
    size = run_maps(planted_trace()).isel(run=0)
    for figure in (
        figure4({"a": size, "untrained": size * 0}, {"a": [17]}),
        loss_curve([{"step": 1, "loss": 2.0, "learning_rate": 1.0}]),
    ):
        assert as_png(figure).startswith(b"\x89PNG")


def test_page_is_self_contained_and_escaped() -> None:
    evidence = gather("x", planted_trace(question="<script>alert(1)</script>", reply="b & c"))
    page = render([Evidence("x", evidence.trace, {"anger-42": train_record()}, {})])
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "b &amp; c" in page
    assert not re.search(r'(?:src|href)="(?!data:)', page)
    assert "http" not in re.sub(r"arxiv", "", page.replace("http-equiv", ""))
    assert '<meta name="generator" content="realigner">' in page


def train_record() -> dict[str, Any]:
    return {
        "tone": "anger",
        "seed": 1,
        "recipe": {"steps": 1},
        "data": {"rows": 2, "sha256": "ab" * 32, "train": 1, "validation": 1, "validation_groups": ["g"]},
        "host": {"name": "h", "dtype": "float32", "sha256": "cd" * 32},
        "irm": {
            "preset": "compact",
            "layers": [0, 1],
            "parameters": 10,
            "host_parameters": 100,
            "site": {"layers": "l", "branch": "b", "kind": "sequential"},
        },
        "steps_done": 1,
        "interrupted": False,
        "validation_loss": [2.0, 1.0],
        "seconds": 1.0,
        "versions": {"python": "3"},
    }


def test_collect_and_build(tmp_path: Path) -> None:
    host, tokenizer = tiny_pair()
    for tone in ("anger", "sadness"):
        recipe = make_recipe(steps=2, batch_size=4, samples=0)
        train(host, tokenizer, some_rows(tone=tone), tmp_path / "runs" / tone, recipe=recipe, quiet=True).model.unload()
    options: dict[str, Any] = {"host": (host, tokenizer), "quiet": True, "prompts": ["What is 3?", "Why?"], "max_new_tokens": 4}
    out, (evidence,) = ra.build_report([tmp_path / "runs"], tmp_path / "report.html", **options, keep_traces=True)
    assert [set(row) for row in evidence.answers()] == [{"prompt", "base", "anger-42", "sadness-42", "untrained-42"}] * 2
    assert evidence.trained == ["anger-42", "sadness-42"]
    assert evidence.untrained_of("anger-42") == "untrained-42"
    assert set(evidence.records) == set(evidence.trained)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in host.modules())
    assert (tmp_path / "report.zarr").is_dir()
    ra.build_report([tmp_path / "report.zarr"], tmp_path / "trace.html")
    assert "Why?" in (tmp_path / "trace.html").read_text()
    with pytest.raises(RealignerError, match="exists already"):
        ra.build_report([tmp_path / "runs"], out, **options)
    ra.build_report([tmp_path / "runs" / "anger"], out, **options, force=True)
    (tmp_path / "mine.html").write_text("precious")
    with pytest.raises(RealignerError, match="not something realigner made"):
        ra.build_report([tmp_path / "report.zarr"], tmp_path / "mine.html", force=True)
    (tmp_path / "other").mkdir()
    with pytest.raises(RealignerError, match="neither"):
        ra.build_report([tmp_path / "other"], tmp_path / "x.html")
