"""Relabellings, p-values and intervals: what all tables rest on."""

from __future__ import annotations

from functools import reduce
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as arrays
from scipy.stats import kstest, rankdata

from realigner.analysis.resampling import (
    Relabelling,
    exchange_least,
    exchange_p,
    interval,
    p_value,
    prompt_weights,
    ranks,
    sign_flip_p,
    sign_flips,
)

NEURONS = (9, 300)  # whole permutations, and circular ones


@given(arrays.arrays(float, st.tuples(st.integers(1, 4), st.integers(1, 9)), elements=st.integers(-3, 3)))
def test_ranks_are_scipys(values: np.ndarray) -> None:
    np.testing.assert_array_equal(ranks(values), rankdata(values, axis=-1))


@pytest.mark.parametrize("neurons", NEURONS)
def test_a_relabelling_is_one_in_every_view(neurons: int) -> None:
    rng = np.random.default_rng(0)
    rows = np.array([0, 2, 3])  # of 4
    matrix = rng.normal(size=(3, neurons))
    relabelling = Relabelling(4, neurons, 20, rng)
    drawn = np.array([one.copy() for one in relabelling.each(matrix, rows)])
    np.testing.assert_array_equal(np.sort(drawn, axis=-1), np.broadcast_to(np.sort(matrix), drawn.shape))
    assert not (drawn == matrix).all(axis=(1, 2)).any()
    np.testing.assert_allclose(relabelling.sums(matrix, rows), drawn.sum(axis=1))
    np.testing.assert_allclose(relabelling.products(matrix, rows), drawn @ drawn.swapaxes(1, 2), atol=1e-10)
    columns = rng.integers(neurons, size=(20, 2))
    np.testing.assert_array_equal(relabelling.take(matrix, rows, columns), np.take_along_axis(drawn, columns[:, None], axis=2))


@pytest.mark.parametrize("neurons", NEURONS)
def test_rows_of_one_number_move_together(neurons: int) -> None:
    matrix = np.arange(float(neurons))[None].repeat(3, axis=0)
    for drawn in Relabelling(2, neurons, 5, np.random.default_rng(0)).each(matrix, np.array([0, 1, 0])):
        np.testing.assert_array_equal(drawn[0], drawn[2])
        assert (drawn[0] != drawn[1]).any()


@pytest.mark.parametrize("neurons", NEURONS)
def test_every_place_is_as_likely(neurons: int) -> None:
    matrix = np.arange(float(neurons))[None].repeat(2, axis=0)
    relabelling = Relabelling(2, neurons, 2000, np.random.default_rng(1))
    apart = np.array([(drawn[0] - drawn[1])[0] % neurons for drawn in relabelling.each(matrix, np.arange(2))])
    first = np.array([drawn[0, 0] for drawn in relabelling.each(matrix, np.arange(2))])
    assert kstest(first / neurons, "uniform").pvalue > 0.01 or neurons < 10
    assert len(np.unique(apart)) > 0.9 * min(neurons, 250)


@pytest.mark.parametrize("values", [2, 1000])
def test_p_is_uniform_whether_values_are_many_or_few(values: int) -> None:
    rng = np.random.default_rng(0)
    p = [p_value(float(rng.integers(values)), rng.integers(values, size=99).astype(float), rng) for _ in range(2000)]
    assert kstest(p, "uniform").pvalue > 0.01
    assert 0.035 < np.mean(np.array(p) <= 0.05) < 0.065
    assert min(p) >= 0.01


def test_p_by_side_and_of_nothing() -> None:
    rng = np.random.default_rng(0)
    draws = np.linspace(-1, 1, 99)
    assert p_value(2.0, draws, rng) == 0.01
    assert p_value(2.0, draws, rng, "less") == 1.0
    assert p_value(-2.0, draws, rng, "both") == 0.01
    assert np.isnan(p_value(np.nan, draws, rng))
    assert np.isnan(p_value(1.0, np.full(5, np.nan), rng))


def test_sign_flips() -> None:
    rng = np.random.default_rng(0)
    every = sign_flips(3, 100, rng)
    assert len(np.unique(every, axis=0)) == len(every) == 7  # without the one that changes nothing
    assert sign_flips(30, 100, rng).shape == (100, 30)
    assert np.isnan(sign_flip_p(np.ones(4), 100, rng))
    assert np.isnan(sign_flip_p(np.zeros(9), 100, rng))
    assert np.isnan(sign_flip_p(np.array([1.0, 2, 3, 4, np.nan]), 100, rng))
    assert sign_flip_p(np.arange(1.0, 10), 600, rng) <= 2 / 512
    assert sign_flip_p(np.arange(1.0, 10), 600, rng, "greater") == 1 / 512
    assert sign_flip_p(np.arange(1.0, 10), 600, rng, "less") == 1.0


def test_a_control_that_runs_share_is_exchanged_with_them() -> None:
    """Skewed values, three runs and one control: uniform, where flipping signs is not."""
    rng = np.random.default_rng(0)
    third = np.full(3, 1 / 3)
    exchanged, flipped = [], []
    for _ in range(1500):
        values = rng.exponential(size=(4, 7)) ** 3
        apart = values[:3] - values[3]
        exchanged.append(exchange_p([apart], third, 199, rng))
        flipped.append(sign_flip_p(apart.mean(axis=0), 199, rng))
    assert kstest(exchanged, "uniform").pvalue > 0.01
    assert 0.035 < np.mean(np.array(exchanged) <= 0.05) < 0.065
    assert kstest(flipped, "uniform").pvalue < 0.001
    assert exchange_p([np.ones((3, 7))], third, 999, rng) < 0.01
    assert np.isnan(exchange_p([np.ones((3, 4))], third, 9, rng))
    assert np.isnan(exchange_p([np.zeros((3, 9))], third, 9, rng))
    assert np.isnan(exchange_p([np.where(np.arange(9) < 5, np.nan, np.ones((3, 9)))], third, 9, rng))


@pytest.mark.parametrize("weights", [[[1.0]], [[0.5], [0.5]], [[1 / 3] * 3], [[1 / 4, 1 / 4, 1 / 2]], [[0.5, 0.25], [0.25]]])
def test_the_smallest_p_of_a_deal(weights: list[list[float]]) -> None:
    """Of all deals in two prompts, those that are the most extreme."""
    rng, sums = np.random.default_rng(0), [np.zeros(1)]
    for own in weights * 2:
        shares, values = np.array([-sum(own), *own]), rng.random(len(own) + 1)
        sums.append(np.array([shares @ order for order in permutations(values)]))
    size = np.abs(reduce(np.add.outer, sums)).ravel()
    share = np.isclose(size, size.max(), rtol=1e-9).mean()
    assert exchange_least([np.array(own) for own in weights], 2) == pytest.approx(share)


@settings(max_examples=25)
@given(st.integers(2, 40), st.integers(0, 9))
def test_intervals(n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = rng.normal(size=n)
    draws = prompt_weights(n, 400, rng) @ values / n
    low, high = interval(float(values.mean()), draws, n)
    assert low < values.mean() < high
    wide = np.quantile(draws, 0.975) - np.quantile(draws, 0.025)
    assert high - low > wide * np.sqrt(n / (n - 1))
    assert interval(float(values.mean()), draws, n, (0.0, 0.0)) == (max(low, 0.0), min(high, 0.0))
    assert np.isnan(interval(np.nan, draws, n)).all()
    assert np.isnan(interval(1.0, draws, 1)).all()


def test_one_prompt_cannot_be_resampled() -> None:
    assert np.isnan(prompt_weights(1, 3, np.random.default_rng(0))).all()
    assert (prompt_weights(4, 3, np.random.default_rng(0)).sum(axis=1) == 4).all()
