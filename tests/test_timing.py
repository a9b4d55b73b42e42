"""Timing against definitions, planted tokens and the summaries' largest values."""

from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from realigner.analysis import layer_counts, timing, top_histogram
from realigner.errors import UsageError
from tests.planted import planted_trace
from tests.validation import token_trace, with_twins

SPREAD = ("entropy", "gini", "largest_share")
ASKED = ("template_share", "question_share", "last_share")
ANSWERED = ("question_share", "last_share", "opening_share", "reply_centre_of_mass")
ONE = [("a", "anger", 1)]
TWINS = [("a", "anger", 1), ("u", "untrained", 1)]


def values(trace: xr.Dataset, run: str = "a", without: int = 0) -> pd.DataFrame:
    table = timing(trace, 99, 50)
    return table[(table["run"] == run) & (table["without"] == without)].set_index("statistic")


def of_energy(energy: list[float], prompt_tokens: int, runs: list[tuple[str, str, int]] = ONE, prompts: int = 6) -> xr.Dataset:
    one = np.array(energy).reshape(1, 1, -1, 1)
    return token_trace({"energy": np.broadcast_to(one, (len(runs), prompts, len(energy), 1)).copy()}, runs, prompt_tokens)


def test_values_by_hand() -> None:
    found = values(of_energy([4, 2, 1, 1], 1))["value"]
    share = np.array([4, 2, 1, 1]) / 8
    assert found["entropy"] == pytest.approx(-(share * np.log(share)).sum() / np.log(4))
    assert found["gini"] == pytest.approx(np.abs(share[:, None] - share).sum() / (2 * 4))
    assert found["largest_share"] == 0.5
    assert found["prompt_share"] == pytest.approx(0.5 / 0.25)
    assert found["first_share"] == 0.5
    assert found["centre_of_mass"] == pytest.approx((share * [0, 1 / 3, 2 / 3, 1]).sum())
    assert found["reply_centre_of_mass"] == pytest.approx((np.array([2, 1, 1]) / 4 * [0, 1 / 2, 1]).sum())
    without = values(of_energy([4, 2, 1, 1], 1), without=1)["value"]
    assert without["first_share"] == 0.5
    assert np.isnan(without["prompt_share"])  # no prompt is left


def test_places_by_hand_whatever_the_reply_s_length() -> None:
    prompt = [8.0, 1, 2, 3, 4, 5, 6, 7]  # two of the template, five of the question, the last
    for generated in (10, 32, 50, 90):
        energy = [*prompt, *range(1, generated + 1)]
        found = values(of_energy(energy, 8))["value"]
        even = (sum(prompt) + 55) / 18
        assert found["template_share"] == pytest.approx(9 / 2 / even)
        assert found["question_share"] == pytest.approx(20 / 5 / even)
        assert found["last_share"] == pytest.approx(7 / even)
        assert found["opening_share"] == pytest.approx(5.5 / even)
        if generated >= 32:
            assert found["reply_centre_of_mass"] == pytest.approx((np.arange(1, 33) * np.arange(32)).sum() / 31 / (16 * 33))


def test_what_is_on_the_last_token_of_the_prompt_is_found_there() -> None:
    rng = np.random.default_rng(0)
    energy = rng.gamma(20, size=(1, 6, 60, 1))
    energy[:, :, 11] *= 500
    found = values(token_trace({"energy": energy}, ONE, 12))
    assert found["value"]["last_share"] > 15
    assert found["p"]["last_share"] <= 0.02
    assert found["p"]["reply_centre_of_mass"] > 0.05
    assert found["p"]["centre_of_mass"] == 0.01  # it is early in these texts; in shorter ones it would not be


def test_a_place_that_gets_less_is_found_too() -> None:
    energy = np.random.default_rng(0).gamma(20, size=(1, 6, 60, 1))
    energy[:, :, 3:11] *= 0.3  # the message
    found = values(token_trace({"energy": energy}, ONE, 12))
    assert found["value"]["question_share"] < 0.6
    assert found["p"]["question_share"] <= 0.02


def test_tokens_without_messages_have_no_place() -> None:
    trace = of_energy([1.0, 2, 3, 4, 5, 6], 3)
    for other in (trace.drop_vars(["turn", "role"]), trace.assign_coords(turn=("token", np.full(trace.sizes["token"], -1)))):
        found = values(other)["value"]
        assert found[["template_share", "question_share", "last_share", "opening_share"]].isna().all()
        assert np.isfinite(found["reply_centre_of_mass"])


def test_an_even_text_is_what_the_nulls_say() -> None:
    found = values(of_energy([1.0] * 10, 4))
    places = ("template_share", "question_share", "last_share", "opening_share", "reply_centre_of_mass")
    for name in ("entropy", "gini", "largest_share", "prompt_share", "first_share", "centre_of_mass", *places):
        assert found["value"][name] == pytest.approx(found["null"][name], abs=1e-12), name


def test_energy_planted_early_is_found_and_late_is_not() -> None:
    fall = list(np.exp(-np.arange(40) / 10))
    placed = ["prompt_share", "first_share", "centre_of_mass"]
    early, late = values(of_energy(fall, 12)), values(of_energy(fall[::-1], 12))
    assert (early["p"][placed] == 0.01).all()
    assert (late["p"][placed] > 0.9).all()
    assert early["p"][["entropy", "gini"]].isna().all()  # there is no untrained run


def test_against_the_untrained_run() -> None:
    rng = np.random.default_rng(0)
    energy = rng.gamma(20, size=(2, 7, 30, 1))
    energy[0] *= rng.lognormal(size=(7, 30, 1))
    found = values(token_trace({"energy": energy}, TWINS, 10))
    assert found["p"]["entropy"] < 0.05
    assert found["difference"]["entropy"] < found["difference_high"]["entropy"] < 0
    assert found["difference"]["entropy"] == pytest.approx(found["value"]["entropy"] - found["untrained"]["entropy"])
    of_all = values(token_trace({"energy": energy}, TWINS, 10), "all")
    assert of_all["p"]["entropy"] < 0.05
    assert of_all["p"][["centre_of_mass", "reply_centre_of_mass"]].notna().all()
    assert of_all["p"][["prompt_share", "first_share"]].isna().all()
    assert (of_all["unit"] == "tones").all()


def test_largest_values_are_those_of_the_raw_deltas() -> None:
    trace = planted_trace(prompts=3, neurons=40, layers=4)
    for k in (7, 100):
        for run in ("anger-42", "untrained-42"):
            own = trace.isel(token=np.flatnonzero(trace["run"].values == run))
            size = np.abs(own["delta"].values)
            chosen = np.unravel_index(np.argsort(-size, axis=None)[:k], size.shape)
            position = own["position"].values[chosen[0]]
            table = top_histogram(trace, k)
            counts = table[table["run"] == run].set_index("position")["count"]
            np.testing.assert_array_equal(counts.to_numpy(), np.bincount(position, minlength=24))
            layers = layer_counts(trace, k)
            np.testing.assert_array_equal(layers[layers["run"] == run]["count"], np.bincount(chosen[1], minlength=4))
            bins = top_histogram(trace, k, 4)
            bins = bins[bins["run"] == run]
            assert bins["position"].tolist() == [0.125, 0.375, 0.625, 0.875]
            np.testing.assert_array_equal(bins["count"], np.bincount(position // 6, minlength=4))
            assert bins["tokens"].tolist() == [3 * 6] * 4
            late = timing(trace, 9, 9).set_index(["run", "statistic", "without"])["value"][run, "late_share_100", 0]
            if k == 100:
                assert late == pytest.approx(((position > 11.5) + 0.5 * (position == 11.5)).mean())


def test_more_values_than_are_kept() -> None:
    trace = planted_trace(prompts=1)
    with pytest.raises(UsageError, match="keeps 100 of a text"):
        top_histogram(trace, 101)
    with pytest.raises(UsageError, match="k=0"):
        layer_counts(trace, 0)
    assert "late_share_1000" not in set(timing(trace, 9, 9)["statistic"])
    tiny = planted_trace(prompts=2, prompt_tokens=1, generated=1, layers=2, neurons=5, stripe=1)
    assert top_histogram(tiny, 1000).groupby("run")["count"].sum().tolist() == [40, 40]  # all there are


def test_both_ends_of_a_short_text_have_as_many_tokens() -> None:
    bins = top_histogram(planted_trace(prompts=1, generated=37, layers=1), 20, 20)
    tokens = bins["tokens"][bins["run"] == "anger-42"].tolist()
    assert tokens == [2] * 10 + [3] + [2] * 9


def test_most_of_all_values_lie_nowhere_in_particular() -> None:
    """The half of all values that is in the second half of a text says nothing."""
    trace = planted_trace(prompts=1, layers=2, neurons=4, stripe=1)  # 192 values
    assert "late_share_100" not in set(timing(trace, 9, 9)["statistic"])
    assert "late_share_100" in set(timing(planted_trace(prompts=2, layers=2, neurons=4, stripe=1), 9, 9)["statistic"])


@pytest.mark.parametrize(
    ("energy", "prompt_tokens", "finite"),
    [
        ([0.0] * 6, 3, []),  # no deltas
        ([1.0], 1, ["largest_share", "first_share"]),  # one token
        ([1.0] * 6, 6, [*SPREAD, "first_share", "centre_of_mass", *ASKED]),  # nothing was answered
        ([1.0] * 6, 3, [*SPREAD, "prompt_share", "first_share", "centre_of_mass", *ANSWERED]),  # no token of the template
    ],
)
def test_degenerate_texts(energy: list[float], prompt_tokens: int, finite: list[str]) -> None:
    for prompts in (1, 6):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = values(of_energy(energy, prompt_tokens, prompts=prompts))
        assert sorted(found.index[found["value"].notna()]) == sorted(finite)
        assert found["low"].notna().any() == (prompts > 1 and len(finite) > 0)


def test_layers_that_a_run_lacks_count_nothing() -> None:
    rng = np.random.default_rng(0)
    energy = rng.random((1, 6, 9, 3))
    whole = values(token_trace({"energy": energy[..., :2]}, ONE, 3))["value"]
    energy[..., 2] = np.nan
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pd.testing.assert_series_equal(values(token_trace({"energy": energy}, ONE, 3))["value"], whole)


def test_rows_and_columns() -> None:
    table = timing(token_trace({"energy": np.random.default_rng(0).random((4, 5, 9, 2))}, with_twins(), 4), 19, 9)
    assert list(table.columns[:12]) == (
        ["run", "tone", "seed", "statistic", "without", "value", "null", "low", "high", "p", "n", "unit"]
    )
    assert len(table) == (4 + 1) * 11 * 2
    assert (table["test"] != "").equals(table["p"].notna())
