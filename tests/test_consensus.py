"""Consensus against planted indices, published definitions and other implementations."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as arrays
from scipy.stats import beta

from realigner.analysis import consensus, rank_biased_overlap, robust_rank_aggregation
from realigner.analysis.consensus import benjamini_hochberg, holm
from realigner.errors import UsageError
from tests.planted import planted_trace
from tests.validation import maps, with_twins

RUNS = with_twins(seeds=(42, 420))


def scored(score: np.ndarray, prompts: int = 6) -> np.ndarray:
    """Values ``[run, prompt, layer, neuron]`` with these scores ``[run, neuron]``."""
    rng = np.random.default_rng(9)
    return score[:, None, None] * rng.gamma(1000, size=(len(score), prompts, 2, score.shape[1]))


@pytest.mark.proof
@settings(max_examples=8, deadline=None)  # statsmodels collects garbage in every call
@given(arrays.arrays(float, st.integers(1, 30), elements=st.floats(0, 1)))
def test_adjusted_p_values_are_statsmodels(p: np.ndarray) -> None:
    multitest = pytest.importorskip("statsmodels.stats.multitest")
    np.testing.assert_allclose(holm(p), multitest.multipletests(p, method="holm")[1])
    np.testing.assert_allclose(benjamini_hochberg(p), multitest.multipletests(p, method="fdr_bh")[1])
    with_nan = np.append(p, np.nan)
    np.testing.assert_allclose(holm(with_nan), np.append(holm(p), np.nan))


def test_rank_biased_overlap_is_the_sum_over_depths() -> None:
    """Webber, Moffat and Zobel's equation 4, summed to the end of the lists."""
    rng = np.random.default_rng(0)
    a, b = (1.0 + rng.permutation(500) for _ in range(2))
    total = sum(0.1 * 0.9 ** (d - 1) * ((a <= d) & (b <= d)).sum() / d for d in range(1, 501))
    assert rank_biased_overlap(a, b) == pytest.approx(total, abs=1e-9)
    assert rank_biased_overlap(a, a) == pytest.approx(1)
    assert rank_biased_overlap(np.array([1.0, 2, 3]), np.array([1.0, 2, 3])) == pytest.approx(1)


def test_robust_rank_aggregation_is_exact() -> None:
    """Against a million simulated lists, and down to where no simulation reaches."""
    rng = np.random.default_rng(0)
    for lists in (2, 5, 24):
        places = rng.random((lists, 200_000))
        k = np.arange(1, lists + 1)[:, None]
        p = robust_rank_aggregation(places)
        rho = beta.cdf(np.sort(places, axis=0), k, lists - k + 1).min(axis=0)
        order = np.argsort(rho)
        for share in (0.001, 0.01, 0.05, 0.5):
            assert p[order[int(share * len(rho))]] == pytest.approx(share, rel=0.2 if share < 0.01 else 0.05)
    tiny = robust_rank_aggregation(np.full((5, 2), 1e-4))
    assert tiny[0] == pytest.approx(1e-20, rel=0.01)  # all five below: 1e-4 to the fifth
    assert robust_rank_aggregation(np.full((3, 1), 1.0))[0] == pytest.approx(1)
    assert np.isnan(robust_rank_aggregation(np.full((1, 4), 0.1))).all()
    many = np.vstack([np.full(80, 1 / 5000), np.arange(80) / 5000 + 0.3]).T  # first in 80 lists: smaller than any number
    assert 0 < robust_rank_aggregation(many)[0] < 1e-200


def test_a_planted_index_is_found_and_what_untrained_runs_show_is_not() -> None:
    rng = np.random.default_rng(1)
    score = np.exp(0.1 * rng.normal(size=(len(RUNS), 300)))
    score[:6, 17] *= 3  # by training, in every run
    score[:, 99] *= 5  # and this one also without
    found = consensus(maps(scored(score), RUNS), permutations=200, resamples=30)
    table = found.table.set_index(["model", "statistic"])
    assert table["value"]["uniform", "top1_agreement"] == 1
    assert table["value"]["untrained", "top1_agreement"] == 1
    assert table["p"]["untrained", "top1_agreement"] < 0.01
    assert (table["n"] == 3).all()
    assert (table["unit"] == "tones").all()
    indices = found.indices.set_index("neuron")
    assert set(indices.index[:2]) == {17, 99}
    assert indices["runs_in_top"][[17, 99]].tolist() == [6, 6]
    assert indices["p_holm"][[17, 99]].max() < 0.05
    assert indices["p_untrained_holm"][17] < 0.05
    assert indices["p_untrained"][99] > 0.05
    assert indices["untrained_rank"][99] == 1
    assert indices["p_host"].isna().all()
    low, value, high, bare, apart = (
        float(table[name]["uniform", "rank_biased_overlap"]) for name in ("low", "value", "high", "untrained", "difference")
    )
    assert low <= value <= high
    counted = found.table[found.table["statistic"].isin(("top1_agreement", "in_top"))]
    assert counted[["low", "high"]].isna().all(axis=None)
    assert bare + apart == pytest.approx(value)
    assert len(found.pairs) == 8 * 7 / 2
    assert found.pairs["null"].iloc[0] == pytest.approx(0.1 * sum(0.9 ** (d - 1) * d for d in range(1, 201)) / 300, rel=1e-3)


def test_what_the_host_shows_is_taken_out() -> None:
    rng = np.random.default_rng(2)
    host = rng.normal(size=300)
    score = np.exp(0.5 * host + 0.1 * rng.normal(size=(len(RUNS), 300)))
    table = consensus(maps(scored(score), RUNS), host, 100, 5).table.set_index(["model", "statistic"])["p"]
    assert table["uniform", "rank_biased_overlap"] < 0.02
    assert table["host_residual", "rank_biased_overlap"] > 0.05
    with pytest.raises(UsageError, match="300 indices"):
        consensus(maps(scored(score), RUNS), host[:5])
    with pytest.raises(UsageError, match="finite"):
        consensus(maps(scored(score), RUNS), np.full(300, np.nan))


def test_runs_of_one_tone_are_no_independent_witnesses() -> None:
    rng = np.random.default_rng(3)
    one_tone = [("a-1", "anger", 1), ("a-2", "anger", 2), ("u-1", "untrained", 1)]
    score = np.exp(np.repeat(rng.normal(size=(1, 30)), 3, axis=0))
    found = consensus(maps(scored(score), one_tone), permutations=20, resamples=5)
    assert found.table["p"].isna().all()
    assert found.table.set_index(["model", "statistic"])["value"]["uniform", "top1_agreement"] == 1
    assert found.table[found.table["statistic"] == "rank_biased_overlap"]["value"].isna().all()
    assert found.indices["p"].isna().all()


@pytest.mark.parametrize("values", [np.zeros((8, 2, 2, 20)), np.ones((8, 1, 1, 3)), np.ones((8, 2, 2, 1))])
def test_maps_that_rank_nothing(values: np.ndarray) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = consensus(maps(values, RUNS), permutations=5, resamples=5)
    assert len(found.table) == 0
    assert len(found.pairs) == 0
    assert len(found.indices) == values.shape[-1]
    assert found.indices["p"].isna().all()


def test_one_run_one_prompt_and_no_twin() -> None:
    trace = planted_trace({"a-1": ("anger", 1)}, prompts=1, neurons=8, stripe=5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = consensus(trace, permutations=5, resamples=5)
    assert found.indices["neuron"].iloc[0] == 5
    assert found.table.empty  # one run cannot disagree with itself
    only_untrained = consensus(planted_trace({"u-1": ("untrained", 1)}), permutations=5, resamples=5)
    assert len(only_untrained.table) == 0
    assert (only_untrained.indices["runs"] == 0).all()
