"""Striation against pingouin, statsmodels, and what was planted."""

from __future__ import annotations

import importlib
import warnings

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from hypothesis import assume, given, settings, strategies as st
from hypothesis.extra import numpy as arrays

from realigner.analysis import (
    consensus,
    eta_squared,
    icc,
    kendall_w,
    omega_squared,
    sparsity,
    striation,
    svd_share,
    text_maps,
    timing,
)
from realigner.analysis.per_run import each_run, leading_score, twins
from realigner.errors import UsageError
from realigner.report.run_styles import RunStyles
from realigner.traces import join_traces
from tests.planted import planted_trace
from tests.validation import maps, with_twins

TESTED = ["icc", "eta_squared_neuron", "omega_squared_neuron", "svd_share", "kendall_w"]
# pingouin's ICC has a confidence limit that divides by 0 where a map is perfectly striped
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def matrices(elements: st.SearchStrategy[float]) -> st.SearchStrategy[np.ndarray]:
    return arrays.arrays(float, st.tuples(st.integers(2, 6), st.integers(5, 12)), elements=elements)


reals = st.floats(-100, 100, allow_nan=False).map(lambda value: round(value, 3))
few = st.integers(0, 3).map(float)  # ties


def long(m: np.ndarray) -> pd.DataFrame:
    layers, neurons = m.shape
    where = {"layer": np.repeat(np.arange(layers), neurons), "neuron": np.tile(np.arange(neurons), layers)}
    return pd.DataFrame(where | {"value": m.ravel()})


@settings(max_examples=40, deadline=None)
@given(matrices(reals))
def test_icc_is_pingouins(m: np.ndarray) -> None:
    pingouin = pytest.importorskip("pingouin")
    assume((m.std(axis=1) > 1e-3).all())
    table = pingouin.intraclass_corr(long(m), targets="neuron", raters="layer", ratings="value").set_index("Type")
    assert icc(m) == pytest.approx(table["ICC"]["ICC(C,1)"], abs=1e-10)


@settings(max_examples=40, deadline=None)
@given(matrices(few))
def test_w_is_pingouins_with_ties(m: np.ndarray) -> None:
    pingouin = pytest.importorskip("pingouin")
    assume((m.std(axis=1) > 0).any())
    table = pingouin.friedman(long(m), dv="value", within="neuron", subject="layer")
    assert kendall_w(m) == pytest.approx(float(table["W"].iloc[0]), abs=1e-10)


@settings(max_examples=40, deadline=None)
@given(matrices(reals))
def test_shares_are_statsmodels(m: np.ndarray) -> None:
    formula = pytest.importorskip("statsmodels.formula.api")
    anova = pytest.importorskip("statsmodels.stats.anova")
    assume((m.std(axis=1) > 1e-3).all())
    table = anova.anova_lm(formula.ols("value ~ C(neuron) + C(layer)", long(m)).fit(), typ=2)
    squares, error, total = table["sum_sq"], table["sum_sq"]["Residual"], table["sum_sq"].sum()
    mean_error = error / table["df"]["Residual"]
    for share, other in (("neuron", "C(neuron)"), ("layer", "C(layer)")):
        assert getattr(eta_squared(m), share) == pytest.approx(squares[other] / total, abs=1e-10)
        omega = (squares[other] - table["df"][other] * mean_error) / (total + mean_error)
        assert getattr(omega_squared(m), share) == pytest.approx(omega, abs=1e-10)


@settings(max_examples=40, deadline=None)
@given(matrices(reals))
def test_svd_share_is_numpys(m: np.ndarray) -> None:
    assume((m.std(axis=1) > 1e-3).all())
    values = np.linalg.svd(m - m.mean(axis=1, keepdims=True), compute_uv=False) ** 2
    assert svd_share(m) == pytest.approx(values[0] / values.sum(), abs=1e-10)


def test_the_notes_example_one_huge_index_or_many_stripes() -> None:
    """ICC is high in both; W tells them apart."""
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(32, 4096))
    one, many = noise.copy(), noise + 1.5 * rng.normal(size=4096)
    one[:, 1512] += 100
    assert icc(one) > 0.6
    assert kendall_w(one) < 0.04
    assert icc(many) > 0.6
    assert kendall_w(many) > 0.6
    table = striation(maps(np.stack([one, many])[:, None], [("one", "a", 1), ("many", "b", 1)]), 50, 1)
    value = table.set_index(["run", "statistic", "without"])["value"]
    assert abs(value["one", "icc", 1]) < 0.005
    assert value["many", "icc", 10] > 0.6


@pytest.mark.parametrize("neurons", [40, 300])
def test_the_tables_values_are_the_functions(neurons: int) -> None:
    """Values without leading indices are those of the smaller map; of W, with the ranks of the whole one."""
    rng = np.random.default_rng(3)
    values = rng.gamma(2, size=(1, 2, 5, neurons)) + rng.gamma(2, size=neurons)
    table = striation(maps(values, [("a", "anger", 1)]), 9, 9).set_index(["run", "statistic", "without"])
    m = values[0].mean(axis=0)
    order = np.argsort(-leading_score(m))
    for without in (0, 1, 10):
        left = np.delete(m, order[:without], axis=1)
        wanted = {"icc": icc(left), "svd_share": svd_share(left)}
        wanted |= {f"eta_squared_{name}": value for name, value in eta_squared(left)._asdict().items()}
        wanted |= {f"omega_squared_{name}": value for name, value in omega_squared(left)._asdict().items()}
        wanted["omega_squared_difference"] = omega_squared(left).neuron - omega_squared(left).layer
        for name, value in wanted.items():
            assert table["value"]["a", name, without] == pytest.approx(value, abs=1e-10), (name, without)
    assert table["value"]["a", "kendall_w", 0] == pytest.approx(kendall_w(m), abs=1e-12)
    assert table["value"]["a", "kendall_w", 10] == pytest.approx(kendall_w(np.delete(m, order[:10], axis=1)), abs=0.05)


def test_a_run_is_held_against_the_untrained_one_of_its_own_layers() -> None:
    every = planted_trace({"whole": ("anger", 42), "untrained-whole": ("untrained", 42)}, layers=6)
    first = planted_trace(
        {"first": ("anger", 42), "untrained-first": ("untrained", 42), "lone": ("anger", 7)}, layers=3, seed=1
    )
    trace = join_traces([every, first])
    for source in (trace, text_maps(trace)):
        assert twins(source) == {"whole": "untrained-whole", "first": "untrained-first"}
    table = striation(trace, permutations=20, resamples=20).query("statistic == 'icc' and without == 0").set_index("run")
    assert table["untrained"]["first"] == pytest.approx(table["value"]["untrained-first"])
    assert table["untrained"]["whole"] == pytest.approx(table["value"]["untrained-whole"])
    assert np.isnan(table["untrained"]["lone"])
    for found in (sparsity(trace, 20, 20).query("layer == 'all' and statistic == 'hoyer'"), timing(trace, 20, 20)):
        own = found[found["run"] == "first"].iloc[0]
        theirs = found[(found["run"] == "untrained-first") & (found["statistic"] == own["statistic"])].iloc[0]
        assert own["untrained"] == pytest.approx(theirs["value"])
    other = planted_trace({"b": ("sadness", 7), "untrained-b": ("untrained", 7)}, layers=6, seed=2)
    agreed = consensus(join_traces([trace, other]), permutations=20, resamples=20).table
    assert agreed["untrained"].notna().any()
    assert [RunStyles.of(trace).twin(run) for run in ("whole", "first")] == ["untrained-whole", "untrained-first"]


def test_a_planted_stripe_and_its_untrained_twin() -> None:
    trace = planted_trace(prompts=6, neurons=300, size=2.0)
    table = striation(trace, 200, 50)
    pd.testing.assert_frame_equal(table, striation(text_maps(trace), 200, 50), rtol=1e-4, atol=1e-5)
    rows = table[(table["statistic"] == "icc") & (table["without"] == 0)].set_index("run")
    assert rows["p"]["anger-42"] == 1 / 201
    assert rows["p"]["untrained-42"] > 0.05
    assert rows["untrained"]["anger-42"] == pytest.approx(rows["value"]["untrained-42"])
    assert rows["difference"]["anger-42"] == pytest.approx(rows["value"]["anger-42"] - rows["value"]["untrained-42"])
    assert 0 < rows["difference_low"]["anger-42"] < rows["difference"]["anger-42"] < rows["difference_high"]["anger-42"]
    assert rows["low"]["anger-42"] < rows["value"]["anger-42"] < rows["high"]["anger-42"]
    assert rows["value"]["all"] == pytest.approx(rows["value"]["anger-42"])
    assert (rows["n"]["anger-42"], rows["unit"]["anger-42"]) == (6, "prompts")
    assert (rows["n"]["all"], rows["unit"]["all"]) == (1, "tones")
    without = table[(table["statistic"] == "icc") & (table["without"] == 1) & (table["run"] == "anger-42")]
    assert without["p"].item() > 0.05  # it was the only one
    assert set(table["statistic"][table["p"].notna()]) == set(TESTED)
    assert (table["test"] != "").equals(table["p"].notna())


def test_runs_with_other_layers_are_measured_on_their_own() -> None:
    deep = planted_trace({"deep-1": ("anger", 1)}, prompts=3)
    flat = planted_trace({"flat-1": ("anger", 1)}, prompts=3, layers=3)
    both = striation(join_traces([deep, flat]), 20, 20)
    alone = striation(flat, 20, 20)
    for name in TESTED:
        found, wanted = (table[(table["run"] == "flat-1") & (table["statistic"] == name)]["value"] for table in (both, alone))
        np.testing.assert_allclose(found.to_numpy(), wanted.to_numpy())
    assert len(next(run for run in each_run(join_traces([deep, flat])) if run.run == "flat-1").layers) == 3


@pytest.mark.parametrize(
    ("values", "finite"),
    [
        (np.ones((1, 3, 1, 30)), False),  # one layer
        (np.ones((1, 3, 4, 30)), False),  # constant
        (np.zeros((1, 3, 4, 30)), False),  # no deltas
        (np.ones((1, 3, 4, 1)), False),  # one neuron
        (np.arange(24.0).reshape(1, 1, 4, 6) ** 2, True),  # one prompt, fewer than 10 neurons
        (np.arange(24.0).reshape(1, 2, 2, 6) ** 2, True),
    ],
)
def test_degenerate_maps_give_nan_and_no_warning(values: np.ndarray, finite: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table = striation(maps(values, [("a", "anger", 1)]), 9, 9)
    of_all = table[(table["without"] == 0) & table["statistic"].isin(TESTED)]
    assert of_all["value"].notna().all() == finite
    assert of_all["p"].notna().all() == finite
    assert table[table["without"] == 10]["value"].isna().all()
    if values.shape[1] == 1:
        assert table[["low", "high"]].isna().all(axis=None)


def test_runs_that_answered_other_prompts() -> None:
    """Each is measured on its own; a prompt that one lacks is not taken for 0."""
    rng = np.random.default_rng(0)
    source = maps(rng.random((2, 6, 4, 30)) + rng.random(30), [("a", "anger", 1), ("u", "untrained", 1)])
    fewer = source.isel(text=[0, 1, 2, 6, 7, 8, 9, 10, 11])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table = striation(fewer, 20, 50)
    own = table[(table["run"] == "a") & (table["statistic"] == "icc") & (table["without"] == 0)]
    assert own["n"].item() == 3
    assert own["value"].item() == pytest.approx(icc(source.values[:3].mean(axis=0)))
    assert own[["low", "difference_low"]].notna().all(axis=None)


def test_a_constant_layer_among_others() -> None:
    rng = np.random.default_rng(0)
    values = rng.random((1, 2, 4, 30))
    values[:, :, 1] = 0.1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table = striation(maps(values, [("a", "anger", 1)]), 9, 9)
    assert table[table["statistic"].isin(TESTED)][["value", "p"]].notna().all(axis=None)


def test_what_cannot_be_asked() -> None:
    with pytest.raises(UsageError, match="not of shape"):
        icc(np.ones(4))
    with pytest.raises(UsageError, match="NaN"):
        kendall_w(np.array([[1.0, np.nan], [1, 2]]))
    with pytest.raises(UsageError, match="no texts"):
        striation(xr.DataArray(np.ones((2, 3)), dims=("layer", "neuron")))
    with pytest.raises(UsageError, match="permutations=0"):
        striation(maps(np.ones((1, 1, 2, 3)), with_twins()[:1]), 0)
    with pytest.raises(UsageError, match="not a trace"):
        striation(xr.Dataset({"delta": (("layer", "neuron"), np.ones((2, 3)))}, {"layer": [0, 1], "neuron": range(3)}))


def test_many_prompts_are_resampled_one_by_one_to_the_same_table(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = planted_trace(prompts=5)
    together = striation(trace, 9, 120)
    monkeypatch.setattr(importlib.import_module("realigner.analysis.striation"), "_PAIRED", 0)
    pd.testing.assert_frame_equal(together, striation(trace, 9, 120))


def test_the_same_seed_gives_the_same_table() -> None:
    trace = planted_trace(prompts=3)
    pd.testing.assert_frame_equal(striation(trace, 20, 20, seed=3), striation(trace, 20, 20, seed=3))
