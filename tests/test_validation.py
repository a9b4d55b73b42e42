"""P-values are uniform on null data, planted effects are found: a little of it always, all of it among the slow tests."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.validation import NULLS, Planted, coverage, judged, simulate, turns_coverage

ROOT = Path(__file__).parent.parent
# the smallest sizes that are found with a power of 0.95 or more
FOUND = {
    "stripes": (0.1, ["icc", "icc, without 1", "icc, without 10", "kendall_w"]),
    "one index": (4.0, ["icc"]),
    "consensus": (4.0, ["in_top", "mean_reciprocal_rank", "the index, rank aggregation (Holm)"]),
    "timing": (1.0, ["centre_of_mass", "prompt_share"]),
    "sparsity": (0.02, ["hoyer", "gini", "participation"]),
    "turns": (0.5, ["energy_ratio", "size_ratio"]),
}


@pytest.mark.parametrize("name", NULLS)
def test_p_values_on_null_data(name: str) -> None:
    """So wide that 140 right p-values pass whatever the seed: five standard errors, and 8 of 16 where 1 is expected."""
    for key, p in simulate(NULLS[name], 16, seed=1).items():
        assert 0.14 < p.mean() < 0.86, key
        assert (p <= 0.05).sum() < 8, key


@pytest.mark.parametrize("name", FOUND)
def test_planted_effects_are_found(name: str) -> None:
    size, statistics = FOUND[name]
    found = simulate(Planted(name, size), 10, seed=2)
    for statistic in statistics:
        assert (found[statistic] <= 0.05).sum() > 5, statistic  # of 10 with a power of 0.95: 5 or fewer once in 10,000


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", NULLS)
def test_p_values_are_uniform_on_a_thousand_traces(name: str) -> None:
    """Bounds for 140 p-values at once; of 4,000 traces all lie in 3.5% to 6.5% (test_the_docs_say_what_was_measured)."""
    for key, p in simulate(NULLS[name], 1000, seed=0).items():
        found = judged(p)
        of_two = key.startswith("consensus")  # the larger p of two: it may be too large
        assert found["small_p" if of_two else "ks_p"] > 0.0005, (key, found)
        assert 0.025 <= found["rate"] <= 0.075, (key, found)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", FOUND)
def test_power(name: str) -> None:
    size, statistics = FOUND[name]
    found = simulate(Planted(name, size), 200, seed=3)
    for statistic in statistics:
        assert (found[statistic] <= 0.05).mean() >= 0.95, statistic


@pytest.mark.slow
def test_intervals_hold_the_truth() -> None:
    for noise in (1.0, 4.0):
        found = coverage(7, noise, 200, seed=0)
        assert found["interval"] > 0.9
        assert found["interval"] > found["percentiles"]


@pytest.mark.slow
@pytest.mark.parametrize(("prompts", "size"), [(5, 0.0), (7, 0.3)])
def test_intervals_hold_the_planted_ratio_of_replies(prompts: int, size: float) -> None:
    assert turns_coverage(prompts, size, 300, seed=1)["interval"] >= 0.9


def test_the_docs_say_what_was_measured() -> None:
    """What docs/statistics.md prints is within the bounds, and the sizes tried here are those that it calls found."""
    text = (ROOT / "docs" / "statistics.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.+) \| ([\d.]+) \| ([\d.]+)% \|$", text, re.MULTILINE)
    assert len(rows) > 100
    assert all(3.5 <= float(rate) <= 6.5 for _, _, rate in rows)
    for name, (size, statistics) in FOUND.items():
        lines = text.split(f"### Power: {name}\n")[1].split("\n\n")[1].splitlines()
        header, *table = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
        (row,) = (row for row in table[1:] if row[0] == f"{size:g}")
        assert all(float(row[header.index(statistic)]) >= 0.95 for statistic in statistics), name
