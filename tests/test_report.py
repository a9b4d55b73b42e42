"""The page's contents: numbers survive being packed, it keeps to its budget, nothing comes from elsewhere, text is escaped."""

from __future__ import annotations

import base64
import gzip
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays
from markupsafe import escape

import realigner as ra
from realigner.analysis import analyze
from realigner.errors import RealignerError, UsageError
from realigner.explain.explanation import read_explanation
from realigner.explain.verdict import KINDS
from realigner.hosts import HostInfo
from realigner.report import ReportInput, gather, render
from realigner.report.charts import NONE, ChartAxis, Line, bar_chart, fmt, line_chart, log_ticks, ticks
from realigner.report.context import page_context
from realigner.report.page_tables import probability
from realigner.report.quantize import RunTokens, decode, encode, token_maps
from realigner.report.report_input import check_hosts, home_of, untraced
from realigner.report.run_styles import RunStyles
from realigner.traces import load_trace
from realigner.traces.collect import trace_for_report
from realigner.training import make_recipe, train
from tests.planted import planted_explanation, planted_trace, written_explanation
from tests.tiny import some_rows, tiny_pair


def some_runs(seed: int = 0, rank: int = 3, tokens: tuple[int, ...] = (30, 20)) -> RunTokens:
    """A run whose deltas come from a few numbers a token, as an IRM's with a narrow layer do."""
    rng = np.random.default_rng(seed)
    basis = rng.normal(size=(rank, 400)).astype(np.float32)
    basis[:, 7] += 30
    values = [(rng.normal(size=(n, rank)).astype(np.float32) * 0.01) @ basis for n in tokens]
    return RunTokens(values.__getitem__, tokens, [5] * len(tokens), 400)


def unpacked(text: str, dtype: str) -> np.ndarray:
    return np.frombuffer(gzip.decompress(base64.b64decode(text)), dtype=dtype)


@pytest.mark.parametrize("bits", [8, 16])
@given(values=arrays(np.float32, st.integers(1, 60), elements=st.floats(-1e4, 1e4, width=32) | st.just(float("nan"))))
@settings(max_examples=60, deadline=None)
def test_codes_lose_little(bits: int, values: np.ndarray) -> None:
    codes, how = encode(values, bits)
    back = decode(codes, how["soft"], how["top"], bits)
    assert np.array_equal(np.isnan(back), np.isnan(values))
    there = np.isfinite(values)
    step = np.arcsinh(how["top"] / how["soft"]) / (127 if bits == 8 else 32767)
    near = step * np.hypot(values[there], how["soft"]) * 0.51 * np.cosh(step) + 1e-6 * how["top"]
    assert (abs(back[there] - values[there]) <= near).all()


def test_few_components_keep_every_token() -> None:
    run = some_runs()
    (maps,) = token_maps([run], 100_000)
    assert maps is not None
    assert maps.facts["kind"] == "components"
    assert maps.facts["rank"] == 3
    assert maps.facts["bits"] == 16
    assert maps.facts["lost"] < 0.005
    assert [text and (text["first"], text["count"], text["at"]) for text in maps.texts] == [(0, 30, 0), (0, 20, 30)]
    basis = decode(unpacked(maps.blobs["run-0-basis"], "<i2").reshape(3, 400), maps.facts["soft"], maps.facts["top"], 16)
    weights = unpacked(maps.blobs["run-0-weights"], "<i2").reshape(50, 3) * np.array(maps.facts["scale"])
    whole = np.concatenate([run.read(0), run.read(1)])
    assert np.sqrt(np.square(weights @ basis - whole).mean() / np.square(whole).mean()) == pytest.approx(
        maps.facts["lost"], abs=1e-4
    )


def test_what_does_not_fit_is_cut_around_the_beginning_of_replies() -> None:
    runs = [some_runs(n, rank=400, tokens=(60, 50, 40)) for n in range(2)]
    tight, tighter, nothing = (token_maps(runs, budget) for budget in (2 * 400 * 30 * 1.23, 2 * 400 * 5 * 1.23, 100))
    first, second = tight
    assert first is not None
    assert second is not None
    assert [text and (text["first"], text["count"]) for text in first.texts] == [(2, 15), (2, 15), None]
    assert sum(text["count"] for text in second.texts if text) >= 30  # what the first saved by gzip is the second's
    assert first.facts["kind"] == second.facts["kind"] == "tokens"
    codes = unpacked(first.blobs["run-0-tokens"], "<i1").reshape(-1, 400)
    read = decode(codes[15], first.facts["soft"], first.facts["top"], 8)
    np.testing.assert_allclose(read, runs[0].read(1)[2], rtol=0.04, atol=0.01)
    assert [maps and maps.texts[1:] for maps in tighter] == [[None, None]] * 2
    assert nothing == [None, None]


def test_cheap_runs_leave_their_share_to_others() -> None:
    runs = [some_runs(0, rank=3), some_runs(1, rank=400, tokens=(60, 50))]
    cheap, dear = token_maps(runs, 2 * 400 * 20 * 1.23)
    assert cheap is not None
    assert dear is not None
    assert (cheap.facts["kind"], dear.facts["kind"]) == ("components", "tokens")
    assert sum(text["count"] for text in dear.texts if text) > 30


@pytest.mark.parametrize("budget", [150_000, 400_000, 3_000_000])
def test_a_page_keeps_to_its_budget(budget: int) -> None:
    runs = {f"{tone}-{seed}": (tone, seed) for tone in ("anger", "untrained") for seed in (1, 2)}
    trace = planted_trace(runs, 3, 5, 30, 6, 500)
    evidence = gather("x", trace)
    alone = len(render([replace(evidence, trace=trace.drop_vars("delta"))]))
    page = render([evidence])
    assert len(render([evidence], budget)) <= max(budget, alone + 10_000)
    assert len(page) > alone + 1_000_000


def test_numbers_for_reading() -> None:
    values = (0.0123456, 1512.0, 1.2e-5, -0.5, 0.0, float("nan"), 0.15)
    assert [fmt(value) for value in values] == ["0.0123", "1,512", "1.2e\u22125", "\u22120.5", "0", NONE, "0.15"]
    assert fmt(0.15, zeros=True) == "0.150"
    assert [probability(p) for p in (1e-9, 0.00057, 0.001, 0.04321, float("nan"))] == [
        "<0.0001",
        "0.0006",
        "0.001",
        "0.043",
        NONE,
    ]
    assert ticks(0, 1, 5) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert ticks(3, 3, 5)


def test_charts_leave_out_what_is_missing() -> None:
    lines = [Line("a", [0, 1, 2, 3], [1.0, float("nan"), 2.0, 3.0], 1, marked=3), Line("<b>", [0, 1], [float("nan")] * 2)]
    svg = str(line_chart(lines, "x", "y", "a & b"))
    assert svg.count("M") == 2
    assert "<title>a &amp; b</title>" in svg
    assert svg.count("<circle") == 1
    assert line_chart([Line("none", [], [])], "x", "y", "t") == ""
    assert str(bar_chart([0, 1, 2], (0, 1), 2, 3, "t")).count("<rect") == 2
    log = str(line_chart([Line("a", [0, 1, 2], [0.0, 1.0, 100.0])], "x", "y", "t", log=True))
    assert log.count("M") == 1
    assert ">100</text>" in log


def test_axes() -> None:
    axis = ChartAxis.over([0.5, 50.0, 0.0, float("nan")], log=True)
    assert [axis.at(value) for value in (0.5, 5, 50)] == pytest.approx([10, 52.5, 95])
    assert axis.at(0) < 10
    assert axis.ticks() == [0, 1, 3, 10, 30]
    assert ChartAxis.over([2.0, 4.0]).at(3.0) == pytest.approx(49.5)
    for values in ([], [0.0], [7.0, 7.0]):
        for log in (False, True):
            assert all(0 <= ChartAxis.over(values, log).at(value) <= 100 for value in values)
    assert log_ticks(0.001, 1e6, 5) == [0.001, 0.1, 10, 1000, 100_000]


@pytest.mark.parametrize(("neurons", "coarse"), [(50, False), (70_000, True)])
def test_the_page_says_what_its_maps_are_exact_to(neurons: int, coarse: bool) -> None:
    trace = planted_trace(prompts=1, generated=2, prompt_tokens=2, layers=6, neurons=neurons, keep_delta=False)
    assert ("rounded to 8 bits" in render([ReportInput("a", trace, {}, {})])) == coarse


def test_tokens_and_bins_are_each_run_s_own() -> None:
    """Each map is a mean over its run's tokens; the yardstick of the places is each bin's share of the tokens."""
    item = ReportInput("a", planted_trace(prompts=3), {}, {})  # of 24 tokens each
    assert "Each map is a mean over 42 tokens of its own run" in render([item])
    numbers = page_context(item)["timing"]["figures"][0]["table"]
    assert numbers["head"][-1] == "all tokens"
    tokens = [round(float(row[-1]) * 24) for row in numbers["rows"]]
    assert (sum(tokens), set(tokens)) == (24, {1, 2})


def test_degenerate_traces_have_a_page() -> None:
    """One run, nothing planted, one token, missing layers, deltas of zero: a page all the same."""
    one = planted_trace({"anger-42": ("anger", 42)}, 1, 1, 1, 1, 3, 1)
    for trace in (one, planted_trace(prompts=1, generated=1, question="", reply="")):
        assert "data-facts" in render([gather("x", trace)])
    gone = planted_trace()
    for name in ("sum", "sum_abs", "sum_sq", "max_abs", "delta", "energy", "l1", "l4"):
        gone[name] = gone[name].where(gone["layer"] != 2)
    page = render([gather("x", gone)])
    facts = json.loads(page.split("data-facts>")[1].split("</script>")[0])
    assert facts["texts"][0]["missing"] == [2]


def test_page_is_self_contained_and_escaped() -> None:
    trace = planted_trace(question="<script>alert(1)</script>", reply="</script>b & c", generated=12)
    evidence = ReportInput(
        "x", trace, {"anger-42": train_record()}, {"anger-42": LOG}, analyze(trace, permutations=10, resamples=10)
    )
    page = render([evidence])
    outside = re.sub(r"<script[^>]*>.*?</script>", "", page, flags=re.DOTALL)
    assert "&lt;script&gt;alert" in outside
    assert "b &amp; c" in outside
    assert "alert(1)" not in outside.replace("&lt;script&gt;alert(1)&lt;/script&gt;", "")
    assert page.count("<script") == page.count("</script>")
    assert not re.search(r'(?:src|href)="(?!data:|#)', page)
    assert set(re.findall(r"https?://[^\"' <)]+", outside)) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert '<meta name="generator" content="realigner">' in page[:8192]
    assert "default-src 'none'" in page
    for part in (
        "summary",
        "replies",
        "maps",
        "striation",
        "timing",
        "sparsity",
        "indices",
        "training",
        "methods",
    ):
        assert f'id="{part}"' in page
    assert "consensus" not in re.sub(r"<(style|script).*?</(style|script)>", "", page, flags=re.DOTALL)  # there is one run
    assert "1 tone; 1 run, 2 prompts," in page
    assert "index-17" in page
    assert "abababababababab" in page


def test_two_runs_are_compared_and_chance_is_not_coloured() -> None:
    facts = {"a": ("anger", 1), "b": ("sadness", 1), "u": ("untrained", 1)}
    trace = planted_trace(facts, neurons=200, size=0.0)
    trace["sum_abs"][:] += 50 * (trace["text_tone"] != "untrained") * (trace["neuron"] == 7)  # which the trained runs share
    page = render([ReportInput("x", trace, {}, {}, analyze(trace, permutations=10, resamples=10))])
    assert 'id="consensus"' in page
    table = page[page.index("Rank-biased overlap of every two runs") :]
    shares = [int(share) for share in re.findall(r'<td style="--w:(\d+)%">', table[: table.index("</table>")])]
    assert len(shares) == 6  # each two of three, twice
    assert max(shares) >= 10
    assert sum(share <= 3 for share in shares) == 4  # with the untrained one


LOG = [{"step": 0, "validation_loss": 2.0}, {"step": 1, "loss": 1.5}, {"step": 1, "validation_loss": 1.0}]


def train_record() -> dict[str, Any]:
    return {
        "tone": "anger",
        "seed": 1,
        "recipe": {"steps": 1},
        "data": {"rows": 2, "sha256": "ab" * 32, "train": 1, "validation": 1, "validation_groups": ["g"]},
        "host": {"name": "h", "dtype": "float32", "sha256": "cd" * 32},
        "irm": {
            "preset": "compact",
            "layers": [0, 1],
            "parameters": 10,
            "host_parameters": 100,
            "site": {"layers": "l", "branch": "b", "kind": "sequential"},
        },
        "steps_done": 1,
        "interrupted": False,
        "validation_loss": [2.0, 1.0],
        "seconds": 1.0,
        "versions": {"python": "3"},
    }


def test_collect_and_build(tmp_path: Path) -> None:
    host, tokenizer = tiny_pair()
    for tone in ("anger", "sadness"):
        recipe = make_recipe(steps=2, batch_size=4, samples=0)
        train(host, tokenizer, some_rows(tone=tone), tmp_path / "runs" / tone, recipe=recipe, quiet=True).model.unload()
    options: dict[str, Any] = {"quiet": True, "prompts": ["What is 3?", "Why?"], "max_new_tokens": 4}
    with pytest.raises(UsageError, match=r"runs is not a trace; record one first with .*trace_for_report.*realigner trace"):
        ra.build_report([tmp_path / "runs"], tmp_path / "report.html")
    trace = trace_for_report([tmp_path / "runs"], tmp_path / "report.zarr", host, tokenizer, **options)
    out, (evidence,) = ra.build_report([trace], tmp_path / "report.html")
    assert [set(row) for row in evidence.answers()] == [{"prompt", "base", "anger-42", "sadness-42", "untrained-42"}] * 2
    assert evidence.trained == ["anger-42", "sadness-42"]
    assert RunStyles.of(evidence.trace).twin("anger-42") == "untrained-42"
    assert set(evidence.records) == set(evidence.trained)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in host.modules())
    assert (tmp_path / "report.zarr").is_dir()
    ra.build_report([tmp_path / "report.zarr"], tmp_path / "trace.html")
    assert "Why?" in (tmp_path / "trace.html").read_text()
    with pytest.raises(RealignerError, match="exists already"):
        ra.build_report([trace], out)
    with pytest.raises(RealignerError, match="exists already"):
        trace_for_report([tmp_path / "runs"], trace, host, tokenizer, **options)
    trace_for_report([tmp_path / "runs" / "anger"], trace, host, tokenizer, **options, force=True)
    ra.build_report([trace], out, force=True)
    (tmp_path / "mine.html").write_text("precious")
    with pytest.raises(RealignerError, match="not something realigner made"):
        ra.build_report([tmp_path / "report.zarr"], tmp_path / "mine.html", force=True)
    (tmp_path / "other").mkdir()
    with pytest.raises(RealignerError, match="neither"):
        trace_for_report([tmp_path / "other"], tmp_path / "x.zarr", host, tokenizer)


def with_why(tmp_path: Path, **changes: Any) -> ReportInput:
    found = planted_explanation() | changes
    return replace(gather("x", planted_trace()), explained=(read_explanation(written_explanation(tmp_path / "why", found)),))


def rows_of_dots(page: str, title: str) -> dict[str, list[tuple[float, bool]]]:
    """Of a chart of dots: each row's dots, where they lie on its axis in percent, and whether they are filled."""
    chart = page.split(f'aria-label="{title}')[1].split("dot-name")[0]
    rows = re.findall(r'<div class="dot-row"><span>(.*?)</span><svg.*?</title>(.*?)</svg>', chart)
    dots = {name: re.findall(r'<circle class="(.*?)" cx="([0-9.]+)%"', drawn) for name, drawn in rows}
    return {name: [(float(at), "ring" not in look) for look, at in found] for name, found in dots.items()}


def values_of(page: str, title: str, log: bool) -> dict[str, list[float]]:
    """The same in numbers, read off the first and the last tick above zero of its axis."""
    chart = page.split(f'aria-label="{title}')[1].split("dot-name")[0].split("dot-axis")[1]
    found = [(float(at), text.replace("\u2212", "-")) for at, text in re.findall(r'x="([0-9.]+)%".*?>(.*?)</text>', chart)]
    marks = [(at, np.log10(float(text)) if log else float(text)) for at, text in found if not (log and text == "0")]
    (left, low), (right, high) = marks[0], marks[-1]
    dots = rows_of_dots(page, title)
    read = {name: [low + (at - left) / (right - left) * (high - low) for at, _ in row] for name, row in dots.items()}
    return {name: [10**value if log else value for value in row] for name, row in read.items()}


def test_verdicts_on_several_hosts_stand_side_by_side(tmp_path: Path) -> None:
    mine, other = planted_explanation(), planted_explanation(3) | {"host": "other-host", "cause": "gain"}
    other["conclusions"] = [dict(own) for own in other["conclusions"]]
    first, *rest = other["conclusions"]
    first["answer"] = "cannot tell" if first["answer"] != "cannot tell" else "supported"
    other["conclusions"] = [first, *rest[:-1]]  # and one question was not asked of it
    whys = [read_explanation(written_explanation(tmp_path / str(at), found)) for at, found in enumerate((mine, other))]
    item = gather("x", planted_trace())
    page = render([replace(item, explained=(whys[0],)), replace(item, explained=(whys[1],))])
    table = page[page.index('<table class="plain compared">') :]
    table = table[: table.index("</table>")]
    for words in (
        f"{mine['host']}, index 17",
        "other-host, index 3",
        "<b>the final norm&#39;s gain</b>",
        "<td>\u2013</td>",
        "With SGD?",
    ):
        assert words in table
    row = table[table.index("It &lt;leads&gt;") :]
    answers = re.findall(r"</span> ([a-z ]+)</span>", row[: row.index("</tr>")])
    assert answers == [mine["conclusions"][0]["answer"], first["answer"]]
    assert "compared" not in re.findall(r'id="([^"]*)"', render([replace(item, explained=(whys[0],))]))


def test_why_this_index(tmp_path: Path) -> None:
    """What the chapter draws is what explain.json has."""
    found = planted_explanation()
    page = render([with_why(tmp_path)])
    title = "Index 17 in trainings"
    filled = rows_of_dots(page, title)
    assert [is_filled for _, is_filled in filled["as it was"]] == [True] * 3
    assert filled["no delta at the index"] == [(3.0, False)]  # beside the logarithmic axis
    read = values_of(page, title, log=True)
    assert read["as it was"] == pytest.approx([9.5, 8.25, 12.0], rel=0.002)
    assert read[str(escape(KINDS["gain"]))] == pytest.approx([0.25], rel=0.002)
    charts = (("zero", "anger-42: change of the loss without"), ("keep", "anger-42: change of the loss with an"))
    for how, words in (*charts, ("zero", "the bare host: change of the loss")):
        read = values_of(page, words, log=False)
        for name, group in {"index 17": "", "random indices": "random", "the other leading indices": "leading"}.items():
            own = [row["change"] for row in found["ablations"]["anger-42"] if (row["how"], row["group"]) == (how, group)]
            assert read[name] == pytest.approx(own, abs=0.001)
    assert values_of(page, "Rank correlations", log=False)["&lt;i&gt;residual&lt;/i&gt;"] == pytest.approx([0.4, 0.4], abs=1e-3)
    assert "predicts 0.25 of the variance" in page
    assert "5 trainings" in page
    assert '<a href="#why">Why</a>' in page
    chapter = page.split('id="why-1"')[1].split('<section id="indices"')[0]
    assert chapter.index("It &lt;leads&gt;") < chapter.index("no trial was made for") < chapter.index("With SGD?")
    assert chapter.count('<tr class="odd">') == 2
    assert "realigner explain --irm again/runs/anger-42 --irm again/runs/elsewhere-7 --index 17 --out" in page
    assert "<b>Why this index.</b>" in page
    assert "<b>Why this index.</b>" not in render([gather("x", planted_trace())])


def test_pages_of_indices_say_what_the_host_has(tmp_path: Path) -> None:
    found = planted_explanation()
    page = render([with_why(tmp_path)])
    assert page.count("<script") == page.count("</script>")
    outside = re.sub(r"<script[^>]*>.*?</script>", "", page, flags=re.DOTALL)
    assert "<b>&" not in outside
    assert "<i>" not in outside.split('<section id="methods"')[0]
    for index in found["pages"]:
        own = page.split(f'id="index-{index}"')[1].split("</section>")[0]
        assert '<code class="token">&lt;/script&gt;</code>' in own
        assert '<code class="token">&lt;b&gt;</code>' in own
        assert '<code class="token">⏎</code>' in own
        zero = next(r for r in found["ablations"]["anger-42"] if r["how"] == "zero" and r["index"] == int(index))
        assert f'<td class="number">{fmt(zero["change"], zeros=True)}</td>' in own
        assert "the bare host's loss changes by" in own
        assert ('href="#why-1"' in own) == (index == "17")
    assert 'href="#index-17">The page of index 17' in page


def test_an_index_that_everything_hangs_on_does_not_press_the_others_into_a_point(tmp_path: Path) -> None:
    """It is named beside the axis; the others lie where their values are."""
    table = planted_explanation()["host_ablation"]
    far = next(row for row in table if row["group"] == "random")
    page = render([with_why(tmp_path, host_ablation=[row | {"change": 900.5} if row is far else row for row in table])])
    drawn = values_of(page, "the bare host: change of", log=False)["random indices"]
    assert f"beyond the axis: index {far['index']} ({fmt(900.5)})" in page
    rest = [row["change"] for row in table if row["group"] == "random" and row is not far]
    assert drawn == pytest.approx(rest, abs=2e-3)


def test_explanations_that_lack_something_are_shown(tmp_path: Path) -> None:
    """No trials, no ablations, no head that reads the stream; an index far beyond those that lead."""
    alone = {"17": {"facts": planted_explanation()["facts"]}}
    page = render(
        [
            with_why(
                tmp_path, trials=None, ablations={}, host_ablation=[], correlations=[], explained={}, pages=alone, quick=True
            )
        ]
    )
    assert "no training; ablations in float32 on 0 rows" in page
    assert "pushed up" not in page
    assert "What the host itself needs" not in page
    assert (
        "realigner explain --irm again/runs/anger-42 --irm again/runs/elsewhere-7 --index 17 --quick --no-trials --out" in page
    )


def _without(key: str, inner: str) -> dict[str, Any]:
    found = planted_explanation()
    rows = found[key]["anger-42"] if key == "ablations" else found[key]
    (rows if isinstance(rows, dict) else rows[0]).pop(inner)
    return {key: found[key]}


DAMAGED: dict[str, dict[str, Any]] = {
    "'words' is missing": {"words": ...},
    "'trials' is missing": {"trials": ...},
    "'facts' is empty": {"facts": []},
    "'trials.0.ratio' is missing": _without("trials", "ratio"),
    "'ablations.anger-42.0.low' is missing": _without("ablations", "low"),
    "'profiles.residual' is missing": _without("profiles", "residual"),
    "'profiles' has not one value a layer": {"profiles": planted_explanation()["profiles"] | {"residual": [1.0]}},
    "'index' .*integer": {"index": "x"},
    "'pages' is not a table": {"pages": []},
}


@pytest.mark.parametrize("message", DAMAGED)
def test_damaged_explanations_are_named(tmp_path: Path, message: str) -> None:
    found = {key: value for key, value in (planted_explanation() | DAMAGED[message]).items() if value is not ...}
    folder = written_explanation(tmp_path / "why", found)
    with pytest.raises(RealignerError, match=rf"why/explain.json: key {message}.*; ask again") as caught:
        ra.build_report([folder], tmp_path / "x.html")
    assert "\n" not in str(caught.value)


def test_explanations_of_before_are_read_and_written_the_same(tmp_path: Path) -> None:
    found = planted_explanation()
    read = read_explanation(written_explanation(tmp_path / "why", found))
    assert (
        read.to_dict() | {"conclusions": found["conclusions"]}
        == {"cause": "", "standings": [], "measured": {}, "ablated_in": "", "spread_sd": None, "spread_df": 0, "steps": None}
        | found
    )
    read.save(tmp_path / "again")
    assert read_explanation(tmp_path / "again").to_dict() == read.to_dict()
    assert json.loads((tmp_path / "again" / "explain.json").read_text())["profiles"]["delta"]["untrained"][0] is None


@pytest.mark.parametrize("text", ["{", "", "[1]", "[" * 100_000, "\udcff"])
def test_what_is_no_json_is_named(tmp_path: Path, text: str) -> None:
    folder = written_explanation(tmp_path / "why", {})
    (folder / "explain.json").write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(RealignerError, match=r"why/explain.json(:1)?: (not |JSON nested).*ask again with realigner explain"):
        read_explanation(folder)


def test_explanations_go_to_the_trace_of_their_host(tmp_path: Path) -> None:
    def read(**changes: Any) -> Any:
        return read_explanation(written_explanation(tmp_path / "why", planted_explanation() | changes))

    def trace(host: str, run: str = "sadness-1", neurons: int = 50) -> Any:
        return planted_trace({run: (run[:-2], 1)}, 1, neurons=neurons, keep_delta=False).assign_attrs(host=host)

    assert home_of(read(), [trace("other"), trace("a/planted"), trace("planted")]) == 1
    assert home_of(read(), [trace("planted"), trace("planted", "anger-42")]) == 1
    assert home_of(read(), [trace("", "anger-42")]) == 0
    for traces in ([trace("other")], [trace("")], [trace("planted", neurons=49)], []):
        with pytest.raises(RealignerError, match=r"why: explains index 17 of planted \(50 indices\), and .*; give a trace"):
            home_of(read(), traces)


def test_the_irms_that_were_explained_are_traced(tmp_path: Path) -> None:
    host, tokenizer = tiny_pair()
    host.realigner = HostInfo("hosts/tiny", tokenizer)
    recipe = make_recipe(steps=1, batch_size=4, samples=0)
    train(host, tokenizer, some_rows(), tmp_path / "anger", recipe=recipe, quiet=True).model.unload()
    width, depth = host.config.hidden_size, host.config.num_hidden_layers
    found = planted_explanation(3, max(width, 30), depth, "tiny")
    assert width >= 30
    folder = written_explanation(tmp_path / "why", found | {"irms": {"anger-42": str(tmp_path / "anger")}})
    assert untraced([folder]) == [tmp_path / "anger"]
    options: dict[str, Any] = {"quiet": True, "prompts": ["Why?"], "max_new_tokens": 2}
    trace = trace_for_report(untraced([folder]), tmp_path / "report.zarr", host, tokenizer, **options)
    out, (evidence,) = ra.build_report([trace, folder], tmp_path / "report.html")
    assert evidence.trained == ["anger-42"]
    assert evidence.explained[0].index == 3
    assert 'id="why-1"' in out.read_text()
    ra.build_report([folder, tmp_path / "report.zarr", folder], tmp_path / "again.html")
    assert 'id="why-2"' in (tmp_path / "again.html").read_text()
    written_explanation(folder, found | {"irms": {"anger-42": "gone/anger"}})
    with pytest.raises(RealignerError, match=r"why/explain.json: its IRM anger-42 was in gone/anger, which is not there"):
        ra.build_report([folder], tmp_path / "gone.html")
    assert untraced([folder, tmp_path / "anger"]) == [tmp_path / "anger"]
    assert untraced([tmp_path / "anger", trace]) == []  # the trace has this run
    assert untraced([tmp_path, trace]) == []  # and all runs of this folder
    assert gather("t", load_trace(trace)).records.keys() == {"anger-42"}
    for name in ("other-run.unfinished", "other-run"):  # what is being trained is no run yet
        assert untraced([tmp_path, trace]) == []
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").touch()
    assert untraced([tmp_path, trace]) == [tmp_path]
    written_explanation(folder, found | {"host": "other"})
    with pytest.raises(RealignerError, match=r"why: explains index 3 of other .* the sources are of tiny \("):
        ra.build_report([folder, tmp_path / "report.zarr"], tmp_path / "other.html")
    with pytest.raises(RealignerError, match=r"why: explains index 3 of other .* the sources are of tiny;"):
        check_hosts([folder, tmp_path / "anger"], "hosts/tiny")  # before anything is traced
    assert not (tmp_path / "other.html").exists()
    shutil.rmtree(tmp_path / "anger")  # and trained again, otherwise
    train(host, tokenizer, some_rows(), tmp_path / "anger", recipe=recipe.changed(steps=2), quiet=True).model.unload()
    assert untraced([tmp_path / "anger", trace]) == [tmp_path / "anger"]
    assert gather("t", load_trace(trace)).records == {}
    (tmp_path / "anger" / "adapter_model.safetensors").write_bytes(b"damaged")
    assert gather("t", load_trace(trace)).records == {}
