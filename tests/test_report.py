"""The page's contents: numbers survive being packed, it keeps to its budget, nothing comes from elsewhere, text is escaped."""

from __future__ import annotations

import base64
import gzip
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import realigner as ra
from realigner.analysis import analyze
from realigner.errors import RealignerError
from realigner.report import Evidence, gather, render
from realigner.report.charts import NONE, Line, bar_chart, line_chart, short, ticks
from realigner.report.pack import RunTokens, decode, encode, token_maps
from realigner.report.tables import probability
from realigner.training import make_recipe, train
from tests.planted import planted_trace
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
    assert [short(value) for value in values] == ["0.0123", "1,512", "1.2e\u22125", "\u22120.5", "0", NONE, "0.15"]
    assert short(0.15, zeros=True) == "0.150"
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
    evidence = Evidence(
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
        "consensus",
        "timing",
        "sparsity",
        "indices",
        "training",
        "methods",
    ):
        assert f'id="{part}"' in page
    assert "index-17" in page
    assert "abababababababab" in page


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
    options: dict[str, Any] = {"host": (host, tokenizer), "quiet": True, "prompts": ["What is 3?", "Why?"], "max_new_tokens": 4}
    out, (evidence,) = ra.build_report([tmp_path / "runs"], tmp_path / "report.html", **options, keep_traces=True)
    assert [set(row) for row in evidence.answers()] == [{"prompt", "base", "anger-42", "sadness-42", "untrained-42"}] * 2
    assert evidence.trained == ["anger-42", "sadness-42"]
    assert evidence.untrained_of("anger-42") == "untrained-42"
    assert set(evidence.records) == set(evidence.trained)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in host.modules())
    assert (tmp_path / "report.zarr").is_dir()
    ra.build_report([tmp_path / "report.zarr"], tmp_path / "trace.html")
    assert "Why?" in (tmp_path / "trace.html").read_text()
    with pytest.raises(RealignerError, match="exists already"):
        ra.build_report([tmp_path / "runs"], out, **options)
    ra.build_report([tmp_path / "runs" / "anger"], out, **options, force=True)
    (tmp_path / "mine.html").write_text("precious")
    with pytest.raises(RealignerError, match="not something realigner made"):
        ra.build_report([tmp_path / "report.zarr"], tmp_path / "mine.html", force=True)
    (tmp_path / "other").mkdir()
    with pytest.raises(RealignerError, match="neither"):
        ra.build_report([tmp_path / "other"], tmp_path / "x.html")
