"""Maps from summaries, against the same from raw deltas."""

from __future__ import annotations

import numpy as np
import pytest

from realigner.analysis import leading_indices, run_maps, text_maps
from realigner.errors import UsageError
from realigner.traces import join_traces, texts_of
from tests.planted import planted_trace


@pytest.mark.parametrize("generated", [0, 10, None])
def test_maps_are_means_over_the_chosen_tokens(generated: int | None) -> None:
    trace = planted_trace(generated=23)
    texts = {kind: text_maps(trace, kind, generated) for kind in ("absolute", "signed", "rms", "max")}
    chosen = []
    for number, text in enumerate(texts_of(trace)):
        new = text["is_generated"].values
        keep = ~new | (np.cumsum(new) <= (999 if generated is None else generated))
        own = text["delta"].values[keep].astype(np.float64)
        chosen.append(own)
        want = {"absolute": abs(own).mean(0), "signed": own.mean(0), "rms": (own**2).mean(0) ** 0.5, "max": abs(own).max(0)}
        for kind, value in want.items():
            np.testing.assert_allclose(texts[kind].values[number], value, rtol=1e-5, atol=1e-6)
        assert int(texts["signed"]["count"][number]) == len(own)
    together = np.concatenate(chosen[:2])
    pooled = {"absolute": abs(together).mean(0), "rms": (together**2).mean(0) ** 0.5, "max": abs(together).max(0)}
    for kind, value in pooled.items():
        maps = run_maps(trace, kind, generated)  # type: ignore[arg-type]
        assert maps["run"].values.tolist() == ["anger-42", "untrained-42"]
        assert maps["tone"].values.tolist() == ["anger", "untrained"]
        np.testing.assert_allclose(maps.values[0], value, rtol=1e-5, atol=1e-6)


def test_a_planted_index_leads() -> None:
    maps = run_maps(planted_trace())
    leading = leading_indices(maps.sel(run="anger-42"))
    assert leading["neuron"][0] == 17
    assert leading["layers_in_top"][0] == 6
    assert leading["ratio"][0] > 3
    assert leading["ratio"].is_monotonic_decreasing
    assert leading_indices(maps.sel(run="untrained-42"))["ratio"][0] < 2


def test_runs_with_other_layers() -> None:
    deep = planted_trace({"deep-1": ("anger", 1)})
    flat = planted_trace({"flat-1": ("anger", 1)}, layers=2)
    maps = run_maps(join_traces([deep, flat]))
    assert np.isnan(maps.sel(run="flat-1", layer=[2, 3, 4, 5])).all()
    assert not np.isnan(maps.sel(run="flat-1", layer=[0, 1])).any()
    leading = leading_indices(maps.sel(run="flat-1"))
    assert leading["layers"].tolist() == [2] * 10
    assert not leading["ratio"].isna().any()
    with pytest.raises(UsageError, match="one run"):
        leading_indices(maps)
    assert len(leading_indices(maps.isel(run=[0]))) == 10


def test_maps_that_summaries_cannot_give() -> None:
    with pytest.raises(UsageError, match="generated=3"):
        text_maps(planted_trace(), generated=3)
    with pytest.raises(UsageError, match="kind='mean'"):
        text_maps(planted_trace(), "mean")  # type: ignore[arg-type]
