"""The study of the paper's claims: how arms are compared, trainings of one tone, the page, and its end after kills."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from scipy.stats import rankdata

from realigner.analysis.per_run import each_run, leading_score
from realigner.data import TONES
from realigner.data.squad import file_sha256
from realigner.errors import RealignerError
from tests.planted import planted_explanation, planted_trace
from tests.tiny import tiny_folder

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE / "benchmarks"))

import study  # noqa: E402
import study_page  # noqa: E402

RUNS = {f"{tone}-{seed}": (tone, seed) for tone in ("anger", "neutral", "sadness") for seed in (42, 420)}
TWINS = {f"untrained-{seed}": ("untrained", seed) for seed in (42, 420)}


def trace_of(size: float, seed: int, runs: dict[str, tuple[str, int]] | None = None) -> xr.Dataset:
    runs = RUNS if runs is None else runs
    return planted_trace(runs | TWINS, prompts=7, generated=8, neurons=60, size=size, seed=seed, keep_delta=False)


def difference(first: xr.Dataset, second: xr.Dataset, monkeypatch: pytest.MonkeyPatch, draws: int) -> dict[str, Any]:
    monkeypatch.setattr(study, "DRAWS", draws)
    monkeypatch.setattr(study, "PAIRED_DRAWS", min(draws, 100))
    return study_page.differences({"unchanged": study.compared(first), "compared": study.compared(second)})


def test_a_planted_difference_between_arms_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    found = difference(trace_of(0.5, 1), trace_of(3.0, 2), monkeypatch, 200)
    for name in ("icc", "neuron over layer"):
        own = found[name]
        assert own["value"] == pytest.approx(own["other"] - own["plain"], abs=1e-4)
        assert 0 < own["low"] < own["value"] < own["high"]
        assert (own["rose"], own["pairs"], own["n"]) == (6, 6, 3)
    # Without the ten leading indices, the planted one among them, there is nothing in either arm.
    assert found["icc without 10"]["low"] < 0 < found["icc without 10"]["high"]
    backwards = difference(trace_of(3.0, 2), trace_of(0.5, 1), monkeypatch, 200)
    assert (backwards["icc"]["high"] < 0, backwards["icc"]["rose"]) == (True, 0)


def test_what_is_compared_is_what_the_statistics_are(monkeypatch: pytest.MonkeyPatch) -> None:
    from realigner.analysis import consensus, striation

    monkeypatch.setattr(study, "DRAWS", 20)
    trace = trace_of(2.0, 3)
    found = study.compared(trace)
    table = striation(trace, 20, 20).query("run == 'all'").set_index(["statistic", "without"])["value"]
    assert found["icc"]["value"] == pytest.approx(table["icc", 0], abs=1e-4)
    assert found["icc without 10"]["value"] == pytest.approx(table["icc", 10], abs=1e-4)
    assert found["neuron over layer"]["value"] == pytest.approx(table["omega_squared_difference", 0], abs=1e-4)
    agreement = consensus(trace, permutations=20, resamples=20)
    agreed, pairs = agreement.table.set_index(["statistic", "model"])["value"], agreement.pairs
    assert found["overlap"]["value"] == pytest.approx(agreed["rank_biased_overlap", "uniform"], abs=1e-4)
    beside = pairs[(pairs["seed_a"] == pairs["seed_b"]) & ~pairs[["tone_a", "tone_b"]].isin(["untrained"]).any(axis=1)]
    assert found["overlap, same seed"]["value"] == pytest.approx(beside["value"].mean(), abs=1e-4)
    assert (found["overlap"]["pairs"], found["overlap, same seed"]["pairs"], len(beside)) == (6, 6, 6)
    assert found["leader share"]["value"] == pytest.approx(agreed["top1_agreement", "uniform"])
    assert found["leader share"]["index"] == 17
    # Of some of its runs alone.
    some = [run for run in RUNS if run.startswith(("anger", "sadness"))]
    own = study.compared(trace, some)
    assert own["icc"]["by_run"] == {run: value for run, value in found["icc"]["by_run"].items() if run in some}
    assert (own["icc"]["n"], own["overlap"]["pairs"], own["leader share"]["n"]) == (2, 2, 4)


def test_of_indices_that_lead_as_often_the_one_of_the_best_mean_rank_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "DRAWS", 2)
    monkeypatch.setattr(study, "PAIRED_DRAWS", 2)
    trace = trace_of(0.0, 6)
    scores = np.array([leading_score(run.mean()) for run in each_run(trace) if run.tone != "untrained"])
    leaders = scores.argmax(axis=1)
    assert len(set(leaders.tolist())) == len(leaders), "no tie; plant another seed"
    found = study.compared(trace)["leader share"]
    assert found["index"] == min(leaders.tolist(), key=lambda index: rankdata(-scores, axis=1).mean(axis=0)[index])
    assert found["index"] != min(leaders)


@pytest.mark.proof
def test_arms_that_are_alike_differ_no_more_often_than_they_should(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = dict.fromkeys(study_page.STATISTICS, 0)
    count = 60
    for seed in range(count):
        for name, own in difference(trace_of(1.0, 2 * seed), trace_of(1.0, 2 * seed + 1), monkeypatch, 100).items():
            wrong[name] += not own["low"] <= 0 <= own["high"]
    assert all(number <= 0.15 * count for number in wrong.values()), wrong  # 5% is asked; 9 of 60 has a chance of 0.2%


def test_an_index_that_stands_out_in_every_training_is_said_to() -> None:
    runs = {f"anger-{seed}": ("anger", seed) for seed in (42, 420, 43, 44, 45)}
    found = study.recurrence([trace_of(5.0, 4, runs)])
    own = [(run["seed"], run["index"], run["rank"], run["leader"]) for run in found["runs"]]
    assert own == [(seed, 17, 1, 17) for _, seed in runs.values()]
    assert found["answers"] == {"supported": 10, "not supported": 0, "cannot tell": 0}
    more = {f"anger-{seed}": ("anger", seed) for seed in (43, 44, 45)}
    noise = study.recurrence([trace_of(0.0, 5, RUNS), trace_of(0.0, 6, more)])
    assert sum(noise["answers"].values()) == 10
    assert noise["answers"]["supported"] <= 3
    assert max(run["rank"] for run in noise["runs"]) > 5  # of a training that had no part in choosing the index


def test_the_runs_of_the_arms_are_the_papers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert study.layer_sets(30) == ["all", "0-9", "10-19", "20-29"]
    assert study.layer_sets(32) == ["all", "0-10", "11-21", "22-31"]
    rows = {tone: str(tmp_path / tone) for tone in TONES}
    for file in rows.values():
        Path(file).write_text("")
    monkeypatch.setattr(study.Study, "rows", lambda self: rows)
    own = study.Study(str(tiny_folder(tmp_path / "tiny")), "float32", study.SQUAD, study.FULL, 1, tmp_path, tmp_path)
    runs = {arm: own.runs(arm) for arm in study.ARMS}
    assert {arm: len(some) for arm, some in runs.items()} == {"paper": 24 + 8, "defects": 6 + 2, "compact": 24 + 8}
    assert len({run.name for some in runs.values() for run in some}) == 72
    assert [run.recipe.seed for run in own.runs("compact", more_seeds=True)] == [43, 44, 45]
    assert {run.recipe.dtype for some in runs.values() for run in some} == {"float32"}
    # Each run with the mistakes is one without, but for them.
    plain = {
        (run.recipe.tone, run.recipe.seed, run.recipe.steps): run.recipe for run in runs["paper"] if run.recipe.layers == "all"
    }
    assert len(plain) == 8
    for run in runs["defects"]:
        assert (run.recipe.label_shift, run.recipe.loss_on_padding) == (2, True)
        same = plain[run.recipe.tone, run.recipe.seed, run.recipe.steps]
        assert run.recipe == same.changed(label_shift=2, loss_on_padding=True)


def test_the_page_is_made_of_its_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from realigner.analysis import analyze

    monkeypatch.setattr(study, "DRAWS", 20)
    arms: dict[str, Any] = {}
    for number, (arm, own) in enumerate(study.ARMS.items()):
        trace = trace_of(1.0 + number, number)
        scores = {run.run: (leading_score(run.mean()) / 2).tolist() for run in each_run(trace)}
        runs = [
            {"run": run, "tone": tone, "seed": seed, "layers": "all", "steps": 6, "parameters": 1234}
            | {"first_loss": 4.5, "kept_loss": 3.25}
            for run, (tone, seed) in RUNS.items()
        ]
        made = {
            "arm": arm,
            "host": "planted",
            "dtype": "float32" if own.changed else "bfloat16",
            "layers": 6,
            "neurons": 60,
            "realigner": "0.0.0",
            "scores": scores,
            "runs": runs,
            "squad": {"file": "facts.json", "sha256": "0" * 64},
        }
        made |= study._found(analyze(trace, permutations=50, resamples=20)) | {"compared": study.compared(trace)}
        made["replies"] = [{"run": "bare", "question": "Why | so?", "reply": "Because " * 40}]
        arms[arm] = made | ({"unchanged": arms["paper"]["compared"]} if own.changed else {"seeds": study.recurrence([trace])})
    folder = tmp_path / "paper-on-planted-1.5"
    others = {"size": asdict(study.QUICK), "differences": study_page.differences(arms["defects"])}
    folder.mkdir()
    for name, facts in (
        arms | others | {"explain": planted_explanation() | {"cause": "channel", "ablated_in": "float32"}}
    ).items():
        (folder / f"{name}.json").write_text(json.dumps(facts))
    (folder / "explain.json").rename(tmp_path / "explain.json")
    before = study_page.page(folder)
    assert "Why index 17 leads has not been tested yet." in before
    assert "`make study` does that next.\n\n## Loss and replies\n" in before
    (tmp_path / "explain.json").rename(folder / "explain.json")
    text = study_page.write_page(folder).read_text()
    assert (tmp_path / "paper-on-planted-1.5.md").is_file()
    change = others["differences"]["icc"]
    interval = f"({change['low']:+.4f} to {change['high']:+.4f})"
    for part in (
        "# The paper's experiment on planted\n",
        "bfloat16 (the paper's recipe, compact network), float32 (with its code's two mistakes) |",
        "**A rehearsal (`QUICK=1`), not to be cited**: 6 steps",
        "The commonest leader, 17, leads in 6 of the 6 runs (100%; by chance ",
        "Why index 17 leads, by [`realigner explain`](../explain.md): **a channel of the host**.",
        "| The paper's recipe | all | 6 | 6 | 1 (1 to 1) |",
        f"| {change['plain']:.3f} | {change['other']:.3f} | {change['value']:+.4f} {interval} |",
        'Asked "Why \\| so?"',
        "| The paper's recipe | 6 | 6 | 4.50 | 3.25 |",
        "Because…",
    ):
        assert part in text, part
    assert "trained once more" not in text
    arms["defects"]["unchanged"] = study.compared(trace_of(1.5, 9))
    (folder / "defects.json").write_text(json.dumps(arms["defects"]))
    assert "not those above: 6 of 6 have the same leader as there." in study_page.page(folder)
    for published in (HERE / "docs" / "results").glob("paper-on-*/differences.json"):
        place = published.parent
        assert (place.parent / f"{place.name}.md").read_text() == study_page.page(place)


def test_a_table_by_layer_set_is_what_the_runs_of_each_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "DRAWS", 2)
    trace = trace_of(1.0, 7)
    scores = {run.run: leading_score(run.mean()).tolist() for run in each_run(trace)}
    runs = [{"run": run, "tone": tone, "seed": seed, "layers": "all", "steps": 6} for run, (tone, seed) in RUNS.items()]
    runs.append({"run": "untrained-42", "tone": "untrained", "seed": 42, "layers": "all", "steps": 0})
    compared = study.compared(trace)
    record: dict[str, Any] = {"runs": runs, "scores": scores, "compared": compared}
    (whole,) = study_page.by_layers(record)
    assert (whole["layers"], whole["runs"], whole["pairs"]) == ("all", 6, compared["overlap"]["pairs"])
    assert whole["overlap"] == pytest.approx(compared["overlap"]["value"], abs=1e-4)
    assert whole["icc"] == pytest.approx(compared["icc"]["value"], abs=1e-4)
    assert whole["difference"] == pytest.approx(compared["neuron over layer"]["value"], abs=1e-4)
    assert sum(count for _, count in whole["leaders"]) == 6
    # Half of the runs over other layers.
    for run in runs:
        run["layers"] = "all" if run["tone"] == "anger" else "0-2"
    first, rest = study_page.by_layers(record)
    assert (first["runs"], first["pairs"], first["overlap"], rest["runs"], rest["pairs"]) == (2, 0, None, 4, 2)
    assert rest["icc"] == pytest.approx(np.mean([compared["icc"]["by_run"][run] for run in RUNS if "anger" not in run]))
    leader = first["leaders"][0][0]
    assert study_page.standing(record, leader, "all")["first"] == first["leaders"][0][1]
    assert study_page.standing(record, leader)["runs"] == 6


def test_what_llama_2_takes_is_what_the_guards_say() -> None:
    import study_needs

    text = study_needs.DOCS.read_text()
    assert text.split(study_needs.BEGIN)[1].split(study_needs.END)[0].strip() == study_needs.needs(study_needs.llama_2_7b())


def test_without_facts_it_says_what_to_give(tmp_path: Path) -> None:
    command = [sys.executable, str(HERE / "benchmarks" / "study.py"), "--squad", str(tmp_path / "none.json")]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr.count("\n")) == (1, 1)
    assert "there is no such file; give SQuAD 2.0" in run.stderr


def test_records_and_rows_of_other_facts_are_not_taken(tmp_path: Path) -> None:
    facts = [tmp_path / name for name in ("one.json", "two.json")]
    for at, file in enumerate(facts):
        asked = [{"id": f"{at}-{n}", "question": f"How many are {n}?", "answers": [{"text": f"{n + at}"}]} for n in range(12)]
        file.write_text(json.dumps({"data": [{"title": "a", "paragraphs": [{"context": "", "qas": asked}]}]}))
    host = str(tiny_folder(tmp_path / "tiny"))
    one, two = (study.Study(host, "float32", file, study.QUICK, 1, tmp_path / "work", tmp_path / "results") for file in facts)
    assert one.rows().keys() == two.rows().keys() == {*TONES}
    assert not {*one.rows().values()} & {*two.rows().values()}
    assert [run.name for run in one.runs("paper")] != [run.name for run in two.runs("paper")]
    kept = {"changed": study.QUICK.keys(study.ARMS["paper"]), "squad": {"sha256": file_sha256(facts[0])}}
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "paper.json").write_text(json.dumps(kept))
    assert one.record("paper") == kept
    with pytest.raises(RealignerError, match="give --results"):
        two.record("paper")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_twice_it_ends_in_the_same_bytes(tmp_path: Path) -> None:
    facts = [
        {
            "id": f"{article}-{n}",
            "question": f"How many of {article} are there in year {n}?",
            "answers": [{"text": f"{n + 3} of them"}],
        }
        for article in range(12)
        for n in range(12)
    ]
    articles = [{"title": str(at), "paragraphs": [{"context": "", "qas": facts[12 * at : 12 * at + 12]}]} for at in range(12)]
    for name in ("whole", "killed"):
        tiny_folder(tmp_path / name / "tiny")
        (tmp_path / name / "facts.json").write_text(json.dumps({"data": articles}))
    command = [sys.executable, str(HERE / "benchmarks" / "study.py"), "--host", "tiny", "--squad", "facts.json", "--quick"]

    def begun(name: str) -> subprocess.Popen[bytes]:
        with (tmp_path / f"{name}.log").open("ab") as log:
            return subprocess.Popen(command, cwd=tmp_path / name, stdout=log, stderr=log, start_new_session=True)

    started = time.monotonic()
    assert begun("whole").wait() == 0, (tmp_path / "whole.log").read_text()[-2000:]
    seconds = time.monotonic() - started
    at = random.Random()
    for _ in range(2):
        process = begun("killed")
        time.sleep(at.uniform(0.1, 0.5) * seconds)
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert begun("killed").wait() == 0, (tmp_path / "killed.log").read_text()[-2000:]
    results = [next((tmp_path / name).glob("runs/study/tiny*-quick/results")) for name in ("whole", "killed")]  # by the dtype
    files = [{str(path.relative_to(place)): path for path in place.rglob("*") if path.is_file()} for place in results]
    assert files[0].keys() == files[1].keys()
    assert len(files[0]) >= 16
    for name, path in files[0].items():
        assert path.read_bytes() == files[1][name].read_bytes(), name
