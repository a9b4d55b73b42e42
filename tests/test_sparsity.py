"""Sparsity against its definitions, Gaussian noise, and planted sparse values."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, strategies as st
from hypothesis.extra import numpy as arrays

from realigner.analysis import gini, sparsity
from realigner.traces import join_traces, load_trace, save_trace
from tests.planted import planted_trace
from tests.validation import token_sums, token_trace

TWINS = [("a", "anger", 1), ("u", "untrained", 1)]


def of_delta(delta: np.ndarray) -> pd.DataFrame:
    """The table of deltas ``[run, prompt, token, layer, neuron]``."""
    return sparsity(token_trace(token_sums(delta), TWINS[: len(delta)], 1, neurons=delta.shape[-1]), 99, 50)


@given(arrays.arrays(np.float32, st.integers(2, 40), elements=st.floats(0, 1, width=16)))
def test_gini_is_the_mean_difference(size: np.ndarray) -> None:
    found = gini(size)
    if not size.any():
        assert np.isnan(found)
        return
    wanted = np.abs(size[:, None].astype(float) - size).sum() / (2 * len(size) * size.sum(dtype=float))
    assert found == pytest.approx(wanted, abs=1e-5)
    assert gini(size.astype(np.float16)) == pytest.approx(found, abs=1e-6)


def test_values_by_hand() -> None:
    v = np.array([3.0, -4.0, 0.0, 5e-5])
    found = of_delta(v.reshape(1, 1, 1, 1, 4)).set_index(["run", "statistic", "layer"])["value"]
    for layer in (0, "all"):
        assert found["a", "hoyer", layer] == pytest.approx((2 - np.abs(v).sum() / np.sqrt((v**2).sum())) / 1)
        assert found["a", "participation", layer] == pytest.approx((v**2).sum() ** 2 / (4 * (v**4).sum()))
        assert found["a", "kurtosis", layer] == pytest.approx(4 * (v**4).sum() / (v**2).sum() ** 2)
        assert found["a", "small_share", layer] == 0.5


def test_gaussian_noise_gives_the_nulls() -> None:
    """science.md: Hoyer .203, Gini .414, participation .33."""
    delta = np.random.default_rng(0).normal(size=(1, 2, 10, 3, 4096))
    table = of_delta(delta)
    table = table[(table["run"] == "a") & (table["statistic"] != "small_share")]
    assert np.allclose(table["value"], table["null"], rtol=0.02)
    found = table.set_index(["statistic", "layer"])["value"]
    assert found["hoyer", "all"] == pytest.approx(0.203, abs=0.001)
    assert found["gini", "all"] == pytest.approx(0.414, abs=0.001)


def test_planted_sparse_values_are_found_by_every_statistic() -> None:
    rng = np.random.default_rng(0)
    delta = rng.normal(size=(2, 7, 5, 2, 300))
    delta[0] *= np.where(rng.random(delta[0].shape) < 0.05, 10, 1)
    table = of_delta(delta)
    of_runs = table[(table["run"] == "a") & (table["statistic"] != "small_share")].set_index(["statistic", "layer"])
    assert (of_runs["p"] < 0.05).all()
    more = of_runs.loc[["hoyer", "gini", "kurtosis"]]
    assert (more["difference_low"] > 0).all()
    assert (of_runs.loc["participation"]["difference_high"] < 0).all()
    assert table[table["run"] == "u"][["p", "untrained"]].isna().all(axis=None)
    assert table[table["run"] == "all"]["n"].unique().tolist() == [1]


def test_from_a_store_with_and_without_raw_deltas(tmp_path: Path) -> None:
    trace = planted_trace(prompts=3, generated=33)
    save_trace(trace, tmp_path / "t.zarr")
    stored = load_trace(tmp_path / "t.zarr")
    pd.testing.assert_frame_equal(sparsity(trace, 9, 9), sparsity(stored, 9, 9), rtol=1e-3, atol=1e-3)
    bare = sparsity(stored.drop_vars("delta"), 9, 9)
    raw = sparsity(stored, 9, 9)
    assert bare[bare["statistic"] == "gini"]["value"].isna().all()
    others = bare["statistic"] != "gini"
    pd.testing.assert_series_equal(bare[others]["value"], raw[others]["value"])
    size = np.abs(trace["delta"].values[:, 2].astype(float))
    wanted = [gini(size[trace["run"].values == "anger-42"]).mean()]
    found = raw[(raw["run"] == "anger-42") & (raw["statistic"] == "gini") & (raw["layer"] == 2)]["value"]
    assert found.tolist() == pytest.approx(wanted, abs=1e-3)


def test_degenerate_deltas() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        none = of_delta(np.zeros((1, 2, 3, 2, 5)))
        one = of_delta(np.ones((1, 1, 3, 2, 1)))
        tiny = of_delta(np.full((1, 6, 3, 2, 9), 1e-30))
    assert none[none["statistic"] == "small_share"]["value"].eq(1).all()
    assert none[none["statistic"] != "small_share"]["value"].isna().all()
    of_one = one[(one["layer"] == 0) & (one["run"] == "a")].set_index("statistic")["value"]
    assert np.isnan(of_one["hoyer"])
    assert of_one["participation"] == 1
    assert tiny[tiny["statistic"] == "small_share"]["value"].eq(1).all()


def test_layers_that_a_run_lacks_have_no_row() -> None:
    both = join_traces([planted_trace({"deep": ("anger", 1)}), planted_trace({"flat": ("anger", 1)}, layers=2)])
    alone = sparsity(planted_trace({"flat": ("anger", 1)}, layers=2), 9, 9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table = sparsity(both, 9, 9)
    own = table[table["run"] == "flat"]
    assert own["layer"].unique().tolist() == [0, 1, "all"]
    np.testing.assert_allclose(own["value"], alone[alone["run"] == "flat"]["value"])
    np.testing.assert_allclose(own["null"], alone[alone["run"] == "flat"]["null"])
