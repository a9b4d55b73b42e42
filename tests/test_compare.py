"""Comparisons of methods: a planted difference is found, nothing is found where there is none, Holm as statsmodels has it."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest
from statsmodels.stats.multitest import multipletests

from realigner.errors import UsageError
from realigner.evaluation.compare import compare, estimate, share_interval


def drawn(dice: np.random.Generator, prompts: int = 40, seeds: tuple[int, ...] = (3, 3, 3, 3)) -> dict[str, np.ndarray]:
    """Methods of one kind over the same prompts, of which some are hard; skewed values ``[seed, prompt]``."""
    hard = dice.exponential(size=prompts)
    return {name: hard + dice.exponential(size=(count, prompts)) for name, count in zip("abcd", seeds, strict=False)}


def rejected(evaluations: int, prompts: int = 40, seeds: tuple[int, ...] = (3, 3, 3, 3)) -> float:
    """The share of evaluations without a difference in which some method is called different from the first."""
    dice = np.random.default_rng(0)
    found = [compare(drawn(dice, prompts, seeds), "a", draws=199, seed=n) for n in range(evaluations)]
    return float(np.mean([any(one.p_holm <= 0.05 for one in tests) for tests in found]))


def test_null_data() -> None:
    """At most 5% of 250, three standard errors allowed."""
    assert rejected(250) <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 250)


@pytest.mark.slow
def test_null_data_precisely() -> None:
    one, any_of_three = rejected(4000, seeds=(3, 3)), rejected(4000)
    other_seeds = rejected(4000, prompts=100, seeds=(1, 3))
    print(f"rejected: {one:.4f}, of three methods any {any_of_three:.4f}; 3 seeds against 1, 100 prompts: {other_seeds:.4f}")
    assert one == pytest.approx(0.05, abs=0.011)
    assert any_of_three <= 0.05 + 0.011
    assert other_seeds <= 0.06 + 0.011  # the mean of three skewed values less one is not symmetric


def test_a_planted_difference_is_found_and_only_there() -> None:
    dice = np.random.default_rng(1)
    values = drawn(dice, prompts=100)
    values["better"] = values["b"] + 0.6
    found = {one.method: one for one in compare(values, "a", draws=999)}
    assert list(found) == ["b", "c", "d", "better"]
    better = found["better"]
    assert better.p <= better.p_holm < 0.01
    assert better.difference.low < 0.6 < better.difference.high
    assert better.difference.low > 0
    assert better.difference.mean == pytest.approx(float(values["better"].mean() - values["a"].mean()))
    assert min(found[name].p_holm for name in "bcd") > 0.05
    adjusted = multipletests([one.p for one in found.values()], method="holm")[1]
    np.testing.assert_allclose([one.p_holm for one in found.values()], adjusted)


def test_the_interval_holds_the_truth() -> None:
    dice = np.random.default_rng(2)
    held = []
    for n in range(300):
        found = estimate(dice.normal(0.3, 1, size=60), resamples=300, seed=n)
        held.append(found.low <= 0.3 <= found.high)
    assert 0.91 <= np.mean(held) <= 0.985


def test_seeds_are_averaged_by_prompt_and_nan_is_left_out() -> None:
    values = np.array([[1.0, 2.0, np.nan, np.nan], [3.0, 4.0, 5.0, np.nan]])
    found = estimate(values)
    assert found.n == 3
    assert found.mean == pytest.approx((2 + 3 + 5) / 3)
    assert found.low < found.mean < found.high
    one = estimate(np.array([1.0, np.nan]))
    assert (one.mean, one.n) == (1, 1)
    assert np.isnan([one.low, one.high]).all()
    assert estimate(np.array([np.nan])).n == 0


@pytest.mark.parametrize(("prompts", "better", "worse"), [(8, 4, 0), (12, 5, 0), (96, 5, 0), (105, 9, 1), (105, 4, 2)])
def test_p_of_shares_is_the_exact_sign_tests(prompts: int, better: int, worse: int) -> None:
    """Most draws equal the value then; whichever way they fell, one draw of the ties would decide."""
    own, other = np.zeros(prompts), np.zeros(prompts)
    own[:better] = other[better : better + worse] = 1
    exact = float(binomtest(better, better + worse).pvalue)
    for seed in range(5):
        (found,) = compare({"a": other, "b": own}, "a", seed=seed)
        assert found.p == pytest.approx(exact, abs=0.02 if exact > 0.1 else 0.006)


def test_shares_that_differ_alike_everywhere_are_not_known_exactly() -> None:
    nothing, everything = np.zeros(8), np.ones(8)
    least = share_interval(1.0, 8)[0]
    for own, other, wanted in (
        (everything, nothing, (least, 1.0)),
        (nothing, everything, (-1.0, -least)),
        (everything, everything, (least - 1, 1 - least)),
    ):
        (found,) = compare({"a": other, "b": own}, "a")
        assert (found.difference.low, found.difference.high) == pytest.approx(wanted)
    (found,) = compare({"a": np.full(8, 1.5), "b": np.full(8, 1.5)}, "a")  # no shares
    assert (found.difference.low, found.difference.high) == (0, 0)


def test_pairs_only_and_the_same_again() -> None:
    dice = np.random.default_rng(3)
    a, b = dice.normal(size=(2, 30))
    a[:5], b[5:8] = np.nan, np.nan
    [one], [again] = (compare({"a": a, "b": b}, "a", draws=500) for _ in range(2))
    assert one == again
    assert one.difference.n == 22
    assert one.difference.mean == pytest.approx(float((b - a)[8:].mean()))
    [equal] = compare({"a": b, "b": b}, "a", draws=100)
    assert equal.difference.mean == 0
    assert np.isnan([equal.p, equal.p_holm]).all()


def test_what_is_refused() -> None:
    with pytest.raises(UsageError, match="no method 'lora'; there are a, b"):
        compare({"a": np.zeros(3), "b": np.zeros(3)}, "lora")
    with pytest.raises(UsageError, match="methods have 3 and 4 prompts"):
        compare({"a": np.zeros(3), "b": np.zeros(4)}, "a")
    with pytest.raises(UsageError, match="permutations=0"):
        compare({"a": np.zeros(3), "b": np.zeros(3)}, "a", draws=0)
