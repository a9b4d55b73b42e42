"""Verdicts on traces in which the truth is known."""

from __future__ import annotations

import json
import warnings
from typing import Any

import numpy as np
import pytest
import xarray as xr

from realigner.analysis import Analysis, analyze
from realigner.errors import UsageError
from realigner.traces import join_traces
from tests.planted import planted_trace
from tests.validation import with_twins

KEYS = ["striation", "many_indices", "neuron_over_layer", "one_leader", "shared_indices", "early", "early_in_reply", "sparser"]
AGREEMENT = ("one_leader", "shared_indices")  # of runs, two or more
RUNS = {run: (tone, seed) for run, tone, seed in with_twins(seeds=(1, 2))}


def verdicts(found: Analysis) -> dict[str, dict[str, Any]]:
    asked = [key for key in KEYS if key not in AGREEMENT or len(found.consensus.table)]
    assert [verdict["key"] for verdict in found.verdicts] == asked
    return {verdict["key"]: verdict for verdict in found.verdicts}


def test_one_planted_stripe() -> None:
    found = analyze(planted_trace(RUNS, prompts=6, neurons=400, size=3.0, seed=1), permutations=300, resamples=50)
    said = verdicts(found)
    assert {key: said[key]["verdict"] for key in KEYS[:5]} == {
        "striation": "supported",
        "many_indices": "not supported",
        "neuron_over_layer": "supported",
        "one_leader": "supported",
        "shared_indices": "supported",
    }
    assert said["early"]["verdict"] == "not supported"
    assert "Index 17 leads in 6 of 6 runs." in said["one_leader"]["words"]
    assert "3 tones, 6 runs, 6 prompts, 864 tokens)" in said["striation"]["words"]
    assert found.leading["neuron"][found.leading["rank"] == 1].tolist()[:6] == [17] * 6
    for verdict in found.verdicts:
        assert set(verdict) >= {"claim", "verdict", "words", "value", "null", "low", "high", "p", "n"}
        assert verdict["p"] is None or not verdict["p"] > verdict["p_adjusted"]


def test_too_few_permutations_decide_nothing() -> None:
    """A p that cannot be smaller is no evidence for chance."""
    trace = planted_trace(RUNS, prompts=6, neurons=400, size=3.0, seed=1)
    said = verdicts(analyze(trace, permutations=20, resamples=50))["striation"]
    assert (said["verdict"], said["p"]) == ("cannot tell", pytest.approx(1 / 21))
    assert "there are too few: 20" in said["why"]


def test_too_few_prompts_decide_nothing() -> None:
    trace = planted_trace(prompts=5, size=8.0)
    for seed in range(3):
        said = verdicts(analyze(trace, seed, permutations=200, resamples=50))["sparser"]
        assert said["value"] > 1.2 * said["untrained"]
        assert said["verdict"] == "cannot tell"
        assert "so few prompts" in said["why"]
    shared = planted_trace({run: label for run, label in RUNS.items() if label[1] == 1}, prompts=5, size=8.0)
    said = verdicts(analyze(shared, permutations=2000, resamples=50))["sparser"]
    assert said["p"] < 0.005
    assert said["verdict"] == "supported"  # a twin and three runs can be dealt in many ways
    said = verdicts(analyze(planted_trace(RUNS, prompts=9, size=8.0), permutations=2000, resamples=50))["sparser"]
    assert said["verdict"] == "supported"


def test_one_run_agrees_with_nobody() -> None:
    found = analyze(planted_trace({"a": ("anger", 1), "u": ("untrained", 1)}, prompts=6), permutations=99, resamples=50)
    assert found.consensus.table.empty
    assert not {verdict["key"] for verdict in found.verdicts} & {*AGREEMENT}
    assert "1 tone, 1 run, 6 prompts, 144 tokens)" in verdicts(found)["striation"]["words"]


def test_nothing_planted() -> None:
    said = verdicts(analyze(planted_trace(RUNS, prompts=6, neurons=80, size=0.0), permutations=300, resamples=50))
    assert not any(verdict["verdict"] == "supported" for verdict in said.values())
    assert said["striation"]["verdict"] == "not supported"
    assert "Chance explains as much." in said["striation"]["words"]
    assert said["one_leader"]["verdict"] == "not supported"


def test_what_untrained_runs_show_as_well_is_not_supported() -> None:
    """An index that untrained runs share is no finding about training, however narrow its interval."""
    said = verdicts(analyze(planted_trace(RUNS, prompts=6, size=0.0, everywhere={17: 5.0}), permutations=300, resamples=50))
    for key in ("striation", "neuron_over_layer"):
        assert said[key]["low"] > 0.1
        assert said[key]["verdict"] != "supported"
        assert "untrained" in said[key]["why"].lower()


def test_a_leader_of_the_untrained_runs_is_no_finding() -> None:
    """Index 17 leads in all runs; what training adds is at 40, in every run too."""
    trace = planted_trace(RUNS, prompts=6, stripe=40, size=3.0, everywhere={17: 8.0})
    said = verdicts(analyze(trace, permutations=300, resamples=50))["one_leader"]
    assert "Index 17 leads in 6 of 6 runs." in said["words"]
    assert said["p_adjusted"] < 0.05
    assert (said["verdict"], said["why"]) == ("not supported", "It leads in the untrained IRMs too.")


def test_one_untrained_run_is_said_to_be_one() -> None:
    trained = {run: facts for run, facts in RUNS.items() if facts[1] == 1}
    said = verdicts(analyze(planted_trace(trained, prompts=6, neurons=400, size=3.0), permutations=300, resamples=50))
    assert (said["striation"]["verdict"], said["striation"]["why"]) == ("supported", "The one untrained IRM shows less of it.")
    assert said["neuron_over_layer"]["low"] > 0
    assert said["neuron_over_layer"]["verdict"] == "cannot tell"
    assert "untrained IRMs of two seeds" in said["neuron_over_layer"]["why"]


def test_a_difference_is_over_the_prompts_that_both_runs_have() -> None:
    """In an unfinished trace the untrained twin has answered fewer prompts."""
    trace = planted_trace(prompts=9, size=3.0)
    turn = np.tile(np.repeat([0, 1, 2, 3], [4, 9, 2, 9]), 18)
    trace = trace.assign_coords(turn=("token", turn), role=("token", np.where(turn % 2, "assistant", "user").astype(object)))
    trace["energy"] = trace["energy"] * np.where(trace["prompt"] >= 6, 50, 1)[:, None].astype(np.float32)
    trace["sum_abs"] = trace["sum_abs"] * (1 + trace["text_prompt"] * xr.DataArray(np.arange(50), dims="neuron"))
    bare, prompt = trace["text_tone"].values == "untrained", trace["text_prompt"].values

    def of(texts: np.ndarray) -> dict[str, Any]:
        some = trace.isel(text=np.flatnonzero(texts), token=np.flatnonzero(np.repeat(texts, 24)))
        found = analyze(some, permutations=20, resamples=30)
        return {name: getattr(found, name) for name in ("striation", "timing", "sparsity", "turns")}

    shared, unfinished = of(prompt < 6), of(~bare | (prompt < 6))
    for name, table in unfinished.items():
        kept = ~table["statistic"].str.startswith("late_share").to_numpy() & (table["tone"] != "untrained").to_numpy()
        for column in ("difference", "untrained"):
            np.testing.assert_allclose(table[column][kept], shared[name][column][kept], rtol=1e-6, atol=1e-9)
        decided = kept & shared[name]["difference_low"].notna().to_numpy()
        assert decided.any()
        assert table["difference_low"][decided].notna().all()


def test_no_baseline_is_cannot_tell() -> None:
    trained = {run: facts for run, facts in RUNS.items() if facts[0] != "untrained"}
    said = verdicts(analyze(planted_trace(trained, prompts=6), permutations=300, resamples=20))
    assert said["striation"]["verdict"] == "cannot tell"
    assert "no untrained IRM" in said["striation"]["words"]
    assert said["neuron_over_layer"]["low"] > 0
    assert said["neuron_over_layer"]["verdict"] == "cannot tell"
    assert "The index explains more, but there is no untrained IRM" in said["neuron_over_layer"]["words"]
    assert said["one_leader"]["verdict"] == "cannot tell"
    assert said["sparser"]["verdict"] == "cannot tell"


@pytest.mark.parametrize(
    "trace",
    [
        planted_trace({"a": ("anger", 1)}, prompts=1, generated=0),
        planted_trace({"a": ("anger", 1)}, prompts=1, layers=1),
        planted_trace({"a": ("anger", 1)}, prompts=1, neurons=3, stripe=0),
        planted_trace({"a": ("anger", 1)}, prompts=1, neurons=1, stripe=0, layers=1, prompt_tokens=1, generated=0),
        planted_trace({"u": ("untrained", 1)}),
        planted_trace(keep_delta=False),
        planted_trace().map(lambda values: values * 0, keep_attrs=True).assign(count=planted_trace()["count"]),
        join_traces([planted_trace({"deep": ("anger", 1)}), planted_trace({"flat": ("sadness", 1)}, layers=2)]),
    ],
)
def test_degenerate_traces_give_verdicts_json_and_no_warning(trace: xr.Dataset) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = analyze(trace, permutations=9, resamples=9)
    text = json.dumps(found.to_dict(), allow_nan=False)
    assert set(json.loads(text)) == {"verdicts", "striation", "timing", "sparsity", "leading", "consensus"}
    assert all(verdict["verdict"] in ("supported", "not supported", "cannot tell") for verdict in verdicts(found).values())


def test_words_are_words() -> None:
    said = verdicts(analyze(planted_trace(RUNS, prompts=2, neurons=30), permutations=9, resamples=9))
    for verdict in said.values():
        assert "nan" not in verdict["words"].lower()
        assert verdict["words"].endswith(".")
    assert "5 prompts or more" in said["sparser"]["words"]


def test_not_a_trace() -> None:
    with pytest.raises(UsageError, match="not a trace"):
        analyze(xr.Dataset({"delta": (("layer", "neuron"), np.ones((2, 3)))}, {"layer": [0, 1], "neuron": [0, 1, 2]}))
    with pytest.raises(UsageError, match="no texts"):
        analyze(planted_trace().isel(text=slice(0, 0), token=slice(0, 0)))


def test_what_runs_of_one_seed_share_is_not_the_tones() -> None:
    """Three tones with one leading index in each seed, as when the initialisation decides: no verdict blames the tones."""
    stripes = [
        planted_trace({run: facts for run, facts in RUNS.items() if facts[1] == seed}, 6, neurons=400, stripe=stripe, seed=seed)
        for seed, stripe in ((1, 17), (2, 170))
    ]
    said = verdicts(analyze(join_traces(stripes), permutations=300, resamples=50))
    assert (said["one_leader"]["verdict"], said["shared_indices"]["verdict"]) == ("not supported", "not supported")
    assert said["shared_indices"]["value"] < 0.1
    alone = verdicts(analyze(stripes[0], permutations=300, resamples=50))
    assert (alone["one_leader"]["verdict"], alone["shared_indices"]["verdict"]) == ("cannot tell", "cannot tell")
    assert "two tones and two seeds" in alone["one_leader"]["words"]
