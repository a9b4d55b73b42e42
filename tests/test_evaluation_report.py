"""The chapter "Does it work?": what it says is what the evaluation found, foreign text stays text, damage is one line."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from statsmodels.stats.proportion import proportion_confint

import realigner as ra
from realigner.cli import main
from realigner.errors import RealignerError
from realigner.evaluation.compare import share_interval
from realigner.evaluation.evaluation_file import Estimates, EvaluationFile, read_evaluation
from realigner.evaluation.results import BY_REPLY
from realigner.report import gather, render
from realigner.report.charts import Spot, label_places, scatter_chart
from realigner.report.evaluation_section import evaluation_section
from realigner.report.report_input import untraced
from tests.planted import planted_explanation, planted_trace, written_explanation
from tests.planted_evaluation import planted_evaluation, written_evaluation

PLANTED = planted_evaluation()
Values = dict[str, Any]


def changed(change: Callable[[Values], object] = lambda tone: None) -> Values:
    """The planted evaluation with its one tone changed."""
    values = copy.deepcopy(PLANTED)
    change(values["tones"]["anger"])
    return values


def section(values: Values) -> Values:
    """The template values of its one tone."""
    found: Values = evaluation_section(EvaluationFile.model_validate(values), 1)["tones"][0]
    return found


def page_of(values: Values) -> str:
    return render([], evaluations=[EvaluationFile.model_validate(values)])


class Table(HTMLParser):
    """The texts of the cells of the page's main tables, a list a row."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.inside = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "table":
            self.inside = ("class", "scored") in attrs
        elif self.inside and tag == "tr":
            self.rows.append([])
        elif self.inside and tag in ("td", "th"):
            self.rows[-1].append("")
        elif self.inside and tag == "small":
            self.rows[-1][-1] += " "

    def handle_data(self, data: str) -> None:
        if self.inside and self.rows and self.rows[-1]:
            self.rows[-1][-1] += data.strip()


def test_the_schema_has_every_measure() -> None:
    assert tuple(Estimates.model_fields) != ()
    assert set(Estimates.model_fields) == set(BY_REPLY)


def test_the_table_has_the_methods_by_summary_with_their_numbers() -> None:
    methods = PLANTED["tones"]["anger"]["methods"]
    head, *rows = Table(page_of(PLANTED)).rows
    assert head[:4] == ["method", "parameters", "summary, 0 to 2", "concept"]
    means = [methods[row[0].split()[0]]["estimates"]["summary"]["mean"] for row in rows]
    assert means == sorted(means, reverse=True)
    assert len(rows) == len(methods)
    by_name = {row[0].split()[0]: row for row in rows}
    lora = by_name["lora"]
    assert lora[0] == "lora 2 seeds"
    assert lora[1] == "460,800"
    fact, nats = methods["lora"]["estimates"]["fact"], methods["lora"]["estimates"]["nats"]
    assert lora[4].endswith(f"{fact['mean']:.2f} {fact['low']:.2f} to {fact['high']:.2f}")
    assert lora[6].endswith(f"{nats['mean']:.2f}")
    assert lora[8:] == ["0.50", "0.70 0.56 to 0.81", "300"]
    assert by_name["bare"][3].startswith("▼worse than irm:")
    assert by_name["bare"][6].startswith("▲better than irm:")  # fewer nats are better
    assert not re.search("[▲▼]", "".join(by_name["irm"]))


def difference(low: float | None, high: float | None, p_holm: float | None) -> Callable[[Values], object]:
    """The IRM's concept and nats less the bare host's lie between `low` and `high`."""

    def change(tone: Values) -> None:
        for measure in ("named", "fact"):
            own = next(one for one in tone["compared"][measure] if one["method"] == "bare")
            ends = {"low": None, "high": None} if low is None or high is None else {"low": -high, "high": -low}
            mean = 0.2 if low is None or high is None else (low + high) / 2
            own |= {"difference": {"mean": -mean, "n": 40, **ends}, "p": p_holm, "p_holm": p_holm}

    return change


@pytest.mark.parametrize(
    ("low", "high", "p", "more", "fewer", "words"),
    [
        (0.1, 0.3, 0.01, "supported", "not supported", "+0.200 (95% interval +0.100 to +0.300; p 0.01 after"),
        (-0.1, 0.3, 0.01, "not supported", "not supported", "The interval includes 0."),
        (0.0, 0.3, 0.01, "not supported", "not supported", "The interval includes 0."),
        (-0.3, -0.1, 0.01, "not supported", "supported", "-0.200"),
        (0.1, 0.3, 0.2, "not supported", "not supported", "Not significant after Holm's adjustment."),
        (None, None, None, "cannot tell", "cannot tell", "+0.200."),
        (0.1, 0.3, None, "cannot tell", "cannot tell", "There are too few questions for a test."),
    ],
)
def test_a_claim_needs_an_interval_without_0(
    low: float | None, high: float | None, p: float | None, more: str, fewer: str, words: str
) -> None:
    claims = {claim["question"]: claim for claim in section(changed(difference(low, high, p)))["claims"]}
    tone, facts = (
        claims["Are its replies in anger more often than the bare host's?"],
        claims["Does it lose facts that the bare host's replies have?"],
    )
    assert (tone["answer"], facts["answer"]) == (more, fewer)
    assert words in tone["words"].replace("\u2212", "-")
    assert tone["n"] == 40
    assert ("opposite direction" in tone["words"]) == (low == -0.3)


def test_rivals_are_claims_and_holms_survivors_are_listed() -> None:
    found = section(PLANTED)
    questions = [claim["question"] for claim in found["claims"]]
    assert questions[3:] == [
        "Is it better than the best system prompt?",
        "Is it better than the mean of its own deltas, which reads nothing?",
        "Is it better than LoRA?",
    ]
    prompt = found["claims"][3]["words"]
    assert "Concept: +" in prompt
    assert "Content: \u2212" in prompt
    compared = PLANTED["tones"]["anger"]["compared"]["summary"]
    worse = [one["method"] for one in compared if one["p_holm"] < 0.05 and one["difference"]["mean"] < 0]
    assert found["holm"] == {"count": 4, "n": 40, "better": [], "worse": worse, "same": [
        one["method"] for one in compared if one["method"] not in worse]}  # fmt: skip
    assert "bare" in worse


def test_strength_says_where_concept_falls_and_whether_0_is_the_bare_host() -> None:
    assert section(PLANTED)["strength"]["falls"] == []
    assert "Concept never falls from strength 0 to 1." in page_of(PLANTED)
    assert "(KL 0); the replies differ, as they do between machines." in page_of(PLANTED)

    def bare_at_0(tone: Values) -> None:
        for measure in ("summary", "named", "content", "fact", "nats"):
            tone["curve"]["0"][measure] = round(tone["methods"]["bare"]["estimates"][measure]["mean"], 4)
        tone["curve"]["0.75"]["named"] = 0.0

    page = page_of(changed(bare_at_0))
    assert "it falls from 0.5 to 0.75." in page
    assert "At strength 0 the scores are the bare host" in page
    moved = page_of(changed(lambda tone: tone["curve"]["0"].update(kl=0.1)))
    assert "At strength 0 the scores are not the bare host" in moved
    bands = re.findall(r'<rect class="band" x="([\d.]+)" y="[\d.]+" width="([\d.]+)"', page)
    left, wide = map(float, bands[0])  # 0.75 to 1.25 of an axis from -1 to 2 over 574 units
    assert left == pytest.approx(54 + 574 * 1.75 / 3 - 2, abs=0.2)
    assert wide == pytest.approx(574 * 0.5 / 3 + 4, abs=0.2)


def test_what_is_missing_is_left_out() -> None:
    def bare_bones(tone: Values) -> None:
        del tone["curve"], tone["strength"], tone["reference"]
        tone |= {"examples": [], "against": "gone", "compared": {measure: [] for measure in tone["compared"]}}
        for method in tone["methods"].values():
            del method["asked"]
            method |= {"shift": [], "whole": {"ms_per_token": None}, "seconds": [None]}
            method["scorers"] = {"equal": None, "kappa": None, "by_seed": []}
            method["estimates"] = {name: dict.fromkeys(("mean", "low", "high")) | {"n": 0} for name in method["estimates"]}

    page = page_of(changed(bare_bones))
    headings = re.findall(r"<h3>(.*?)</h3>", page)
    assert headings == ["All methods", "Costs", "How far to trust the scorer"]
    assert "nan" not in re.sub(r"<style>.*?</style>|<script.*?</script>", "", page, flags=re.DOTALL).lower()
    named = "Of the test rows' own replies the scorer of words names 0.93 in the tone, that of embeddings 0.97"
    assert named in page_of(PLANTED)
    assert "own replies" not in page
    only = changed(lambda tone: tone.pop("strength"))
    assert "Shaded" not in page_of(only)
    assert "<h3>Strength</h3>" in page_of(only)


def test_of_one_tone_alone_concept_is_said_to_be_unlikeness_to_the_host() -> None:
    asked, alone = (
        "Are its replies in anger more often than the bare host",
        "the scorers were trained to tell its rows from the bare",
    )
    page = page_of(changed(lambda tone: tone.update(contrast=["bare"])))
    assert "Are its replies more often like the data" in page
    assert alone in page
    assert asked not in page
    for contrast in ([], ["bare", "sadness"], ["sadness"]):
        page = page_of(changed(lambda tone, own=contrast: tone.update(contrast=own)))  # type: ignore[misc]
        assert asked in page
        assert alone not in page


def test_a_judges_ratings_are_shown() -> None:
    def judged(tone: Values) -> None:
        mean = {"mean": 1.5, "low": 1.25, "high": 1.75, "n": 39}
        aspects = ("concept", "instruction", "fluency", "score")
        ratings = {name: {key: {**mean, "mean": at / 4} for key in aspects} for at, name in enumerate(("bare", "irm"))}
        tone["judge"] = {"model": "<judge>", "methods": {name: {**own, "missing": 1} for name, own in ratings.items()}}

    table = section(changed(judged))["judged"]["table"]
    assert table["rows"] == [["irm", *["0.25 (1.25 to 1.75)"] * 4, "1"], ["bare", *["0.00 (1.25 to 1.75)"] * 4, "1"]]
    assert "&lt;judge&gt; rated each reply" in page_of(changed(judged))
    assert "What a judge says" not in page_of(PLANTED)


def test_foreign_text_stays_text() -> None:
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(2)>'\"{{ 7 * 7 }}"

    def names(tone: Values) -> None:
        for example in tone["examples"]:
            example["question"] = evil
            example["replies"] = dict.fromkeys(example["replies"], evil)
        tone["methods"]["prompt"] |= {"given": evil}
        tone["methods"]["prompt"]["facts"]["settings"]["about"] = evil
        tone["methods"][evil] = tone["methods"].pop("mean-delta")
        for found in tone["compared"].values():
            next(one for one in found if one["method"] == "mean-delta")["method"] = evil
        for example in tone["examples"]:
            for part in (example["summary"], example["replies"]):
                part[evil] = part.pop("mean-delta")

    values = changed(names)
    values |= {"host": evil, "irm": evil, "tones": {evil: values["tones"]["anger"]}}
    page = page_of(values)
    assert "alert(1)" in page
    assert "<script>alert" not in page
    assert "<img" not in page
    assert "{{ 7 * 7 }}" in page
    assert "{{ 7 * 7 }}" not in "".join(re.findall(r'id="[^"]*"', page))


def without(*keys: str) -> Callable[[Values], object]:
    def change(tone: Values) -> None:
        for key in keys[:-1]:
            tone = tone[key]
        del tone[keys[-1]]

    return change


DAMAGED: dict[str, Callable[[Values], object]] = {
    "'tones.anger.methods' is missing": without("methods"),
    "'tones.anger.methods.lora.estimates.nats' is missing": without("methods", "lora", "estimates", "nats"),
    "'tones.anger.methods' is not a table": lambda tone: tone.update(methods=[]),
    "'tones.anger.methods' is empty": lambda tone: tone.update(methods={}),
    "'tones.anger.questions' .*integer": lambda tone: tone.update(questions="many"),
    "'tones.anger.methods.lora.facts.parameters' .*greater": lambda tone: tone["methods"]["lora"]["facts"].update(
        parameters=-1
    ),
    "'tones.anger.methods.lora.whole.kl' is too large a number": lambda tone: tone["methods"]["lora"]["whole"].update(kl=1e300),
    "'tones.anger.curve.x.*' .*number": lambda tone: tone["curve"].update(x=tone["curve"]["1"]),
    "'tones.anger.curve.nan.*'": lambda tone: tone["curve"].update(nan=tone["curve"]["1"]),
    "'tones.anger' names the method 'gone', which has no results": lambda tone: tone["examples"][0]["replies"].update(gone="x"),
}


@pytest.mark.parametrize("message", DAMAGED)
def test_damaged_evaluations_are_named(message: str, tmp_path: Path) -> None:
    folder = written_evaluation(tmp_path / "out", changed(DAMAGED[message]))
    with pytest.raises(RealignerError, match=rf"out/evaluation\.json: not an evaluation \(key {message}") as caught:
        ra.build_report([folder], tmp_path / "x.html")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "x.html").exists()


def test_evaluations_are_sources_alone_and_beside_others(tmp_path: Path) -> None:
    folder = written_evaluation(tmp_path / "out", PLANTED)
    file = tmp_path / "study.json"
    file.write_text(json.dumps(PLANTED))
    assert untraced([folder, file]) == []
    assert read_evaluation(file).tones == read_evaluation(folder).tones
    path, shown = ra.build_report([folder, file], tmp_path / "alone.html")
    assert shown == []
    assert re.findall(r'<section id="(works[-\d]+)"', path.read_text()) == ["works-1-1", "works-2-1"]
    (tmp_path / "anger").mkdir()
    why = written_explanation(tmp_path / "why", planted_explanation() | {"irms": {"anger-42": str(tmp_path / "anger")}})
    assert untraced([why, folder]) == [tmp_path / "anger"]
    assert untraced([folder, tmp_path / "anger"]) == [tmp_path / "anger"]
    both = render([gather("small", planted_trace(keep_delta=False))], evaluations=[read_evaluation(folder)])
    assert both.index('id="works-1-1"') < both.index('id="maps"')
    assert 'href="#maps"' in both


def test_the_command_takes_an_evaluation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = written_evaluation(tmp_path / "out", PLANTED)
    assert main(["report", str(folder), "--out", str(tmp_path / "report.html")]) == 0
    assert "Does it work?" in (tmp_path / "report.html").read_text()
    (folder / "evaluation.json").write_text('{"host": ')
    assert main(["report", str(folder), "--out", str(tmp_path / "again.html")]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "evaluation.json:1: not valid JSON" in said
    assert "run realigner evaluate again" in said


def test_labels_keep_clear_of_each_other_and_of_points() -> None:
    rng = np.random.default_rng(3)
    points = [(f"method-{at}", (float(x), float(y))) for at, (x, y) in enumerate(rng.uniform((150, 60), (450, 300), (20, 2)))]
    points += [("one place", (300.0, 170.0)), ("the same", (300.0, 170.0))]
    places = label_places(points, (54, 640, 10, 340))
    boxes = []
    for (label, _), (x, y, anchor, _) in zip(points, places, strict=True):
        wide = 6.3 * len(label)
        boxes.append((x if anchor == "start" else x - wide, y - 9, x + wide if anchor == "start" else x, y + 1))
    for at, a in enumerate(boxes):
        assert 54 <= a[0] <= a[2] <= 640
        for b in boxes[at + 1 :]:
            assert min(a[2], b[2]) <= max(a[0], b[0]) or min(a[3], b[3]) <= max(a[1], b[1])
        for _, (x, y) in points:
            assert not (a[0] < x < a[2] and a[1] < y < a[3])


def test_spots_lie_where_their_numbers_are() -> None:
    spots = [Spot("a", 1.0, 0.0), Spot("b", 100.0, 1.0), Spot("c", 10.0, 0.5), Spot("out", 0.0, 0.5), Spot("none", math.nan, 1)]
    svg = scatter_chart(spots, "x", "y", "t", log=True)
    (a, b, c) = (tuple(map(float, at)) for at in re.findall(r'<circle[^>]* cx="([\d.]+)" cy="([\d.]+)"', svg))
    assert c == pytest.approx(((a[0] + b[0]) / 2, (a[1] + b[1]) / 2), abs=0.1)
    assert a[0] < b[0]
    assert a[1] > b[1]
    assert scatter_chart(spots[3:], "x", "y", "t", log=True) == ""


@pytest.mark.parametrize(("right", "n"), [(0, 8), (4, 8), (8, 8), (23, 24)])
def test_intervals_of_shares_are_wilsons(right: int, n: int) -> None:
    assert share_interval(right / n, n) == pytest.approx(proportion_confint(right, n, method="wilson"), abs=1e-6)
    assert all(map(math.isnan, share_interval(0.5, 0)))
