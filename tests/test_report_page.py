"""The page in headless Chromium: a stripe one column wide shows at every zoom, keys work, nothing is asked of any network."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from realigner.analysis import analyze
from realigner.evaluation.evaluation_file import EvaluationFile
from realigner.explain.explanation import read_explanation
from realigner.report import gather, render
from tests.planted import planted_explanation, planted_trace, written_explanation
from tests.planted_evaluation import METHODS, planted_evaluation

STRIPE = 1512
WIDE = {"anger-42": ("anger", 42), "sadness-42": ("sadness", 42), "untrained-42": ("untrained", 42)}
# Of the first map: the share of rows in which the strongest pixel of the stripe's cell is of the ramp's last, dark red tenth.
SHOWN = """(column) => {
  const { panels, zoom } = document.querySelector("[data-explorer]").explorer;
  const { plot, context } = panels[0].map;
  const from = Math.floor(plot.x + (column - zoom.x) * plot.width / zoom.width);
  const wide = Math.max(1, Math.ceil(plot.width / zoom.width));
  const { data } = context.getImageData(from - 1, plot.y, wide + 2, plot.height);
  let rows = 0;
  for (let y = 0; y < plot.height; y++) {
    let strong = false;
    for (let x = 0; x < wide + 2; x++) {
      const at = 4 * (y * (wide + 2) + x);
      strong = strong || (data[at] > 0x60 && data[at + 1] < 0x30 && data[at + 2] < 0x40);
    }
    rows += strong;
  }
  return rows / plot.height;
}"""


# How far the strongest pixel of the first map's layer numbers is from the page's background, 0 to 255.
CONTRAST = """() => {
  const map = document.querySelector("[data-explorer]").explorer.panels[0].map;
  const { plot, context } = map;
  const ground = getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number);
  const { data } = context.getImageData(0, plot.y, plot.x - 2, plot.height);
  let most = 0;
  for (let at = 0; at < data.length; at += 4) {
    const apart = Math.abs(data[at] - ground[0]) + Math.abs(data[at + 1] - ground[1]) + Math.abs(data[at + 2] - ground[2]);
    most = Math.max(most, apart / 3 * data[at + 3] / 255);
  }
  return most;
}"""


@pytest.fixture(scope="session")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """32 x 4096 with raw deltas, a stripe in the trained runs; no analysis."""
    trace = planted_trace(WIDE, 2, 3, 12, 32, 4096, STRIPE, 6.0)
    path = tmp_path_factory.mktemp("page") / "wide.html"
    path.write_text(render([gather("wide", trace)]), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small trace of summaries alone, analysed, two of its indices explained; two of them on one page."""
    runs = {"anger-42": ("anger", 42), "sadness-7": ("sadness", 7), "untrained-42": ("untrained", 42)}
    trace = planted_trace(runs, keep_delta=False, question="<script>alert(1)</script>", reply="</script><b>&")
    folder = tmp_path_factory.mktemp("page")
    whys = [read_explanation(written_explanation(folder / f"why-{at}", planted_explanation(at))) for at in (17, 3)]
    found = analyze(trace, permutations=20, resamples=20)
    evidence = replace(gather("small", trace), analysis=found, explained=tuple(whys))
    path = folder / "small.html"
    path.write_text(render([evidence, replace(evidence, name="again")]), encoding="utf-8")
    return path


class Opened:
    """A page that is open, and what it complained about and asked for."""

    def __init__(self, chromium: Any, path: Path, **options: Any) -> None:
        self.context = chromium.new_context(**({"viewport": {"width": 1280, "height": 900}} | options))
        self.page = self.context.new_page()
        self.errors: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda said: self.errors.append(said.text) if said.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())
        self.page.wait_for_selector("html[data-ready]")

    def set(self, name: str, value: str | bool) -> None:
        self.page.evaluate(
            """async ([name, value]) => {
              const root = document.querySelector("[data-explorer]");
              const control = root.querySelector(`[data-${name}]`);
              if (control.type === "checkbox") control.checked = value; else control.value = value;
              await root.explorer.take();
            }""",
            [name, value],
        )

    def shown(self, column: int = STRIPE) -> float:
        return float(self.page.evaluate(SHOWN, column))

    def text(self, name: str) -> str:
        return str(self.page.locator(f"[data-{name}]").first.text_content())

    def waits(self, name: str, text: str) -> None:
        from playwright.sync_api import expect

        expect(self.page.locator(f"[data-{name}]").first).to_contain_text(text)

    def close(self, path: Path) -> None:
        """Nothing was said, and nothing but the file asked for."""
        self.context.close()
        assert [error for error in self.errors if "getImageData" not in error] == []  # that is what we read pixels with
        assert set(self.requests) == {path.as_uri()}


@pytest.mark.proof
@pytest.mark.parametrize("options", [{}, {"device_scale_factor": 2}, {"viewport": {"width": 390, "height": 844}}], ids=str)
def test_a_stripe_one_column_wide_shows_at_every_zoom(chromium: Any, wide: Path, options: dict[str, Any]) -> None:
    opened = Opened(chromium, wide, color_scheme="light", **options)
    for show in ("mean", "token"):
        opened.set("show", show)
        for symlog in (False, True):
            opened.set("symlog", symlog)
            opened.page.locator("[data-zoom-all]").click()
            widths = [4096.0]
            seen = [opened.shown()]
            opened.page.evaluate(f"document.querySelector('[data-explorer]').explorer.cursor = {{ row: 3, column: {STRIPE} }}")
            while widths[-1] > 8:
                opened.page.locator("[data-zoom-in]").click()
                widths.append(opened.page.evaluate("document.querySelector('[data-explorer]').explorer.zoom.width"))
                seen.append(opened.shown())
            assert len(widths) > 8
            assert min(seen) > 0.9, dict(zip(widths, seen, strict=True))
        opened.set("symlog", False)
    opened.page.locator("[data-zoom-all]").click()
    opened.set("show", "mean")
    assert opened.shown(700) < 0.5  # where nothing was planted
    opened.set("left", "untrained-42")
    assert opened.shown() < 0.5
    opened.close(wide)


def test_difference_of_runs(chromium: Any, wide: Path) -> None:
    opened = Opened(chromium, wide, color_scheme="light")
    opened.set("right", "untrained-42")
    opened.set("view", "difference")
    assert opened.shown() > 0.95
    opened.set("right", "sadness-42")  # both have the stripe: it cancels
    assert opened.shown() < 0.2
    assert opened.page.locator("figure[data-panel=right]").is_hidden()
    opened.close(wide)


def test_slider_and_keys(chromium: Any, wide: Path) -> None:
    opened = Opened(chromium, wide)
    page = opened.page
    page.locator("[data-slider]").focus()
    page.keyboard.press("Home")
    opened.waits("title", "anger-42, token 1")
    page.keyboard.press("ArrowRight")
    assert opened.text("title") == "anger-42, token 2"
    assert "token 2 of 15 (prompt)" in opened.text("token")
    page.locator("[data-play]").click()
    opened.waits("title", "anger-42, token 4")
    page.locator("[data-play]").click()
    page.locator("canvas").first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    assert "layer 17, index 2049" in opened.text("live")
    page.keyboard.press("+")
    assert page.evaluate("document.querySelector('[data-explorer]').explorer.zoom.width") == 2048
    page.keyboard.press("0")
    page.locator("[data-go] input").fill(str(STRIPE))
    page.keyboard.press("Enter")
    assert f"index {STRIPE}" in opened.text("live")
    page.locator("canvas").first.focus()
    page.keyboard.press("Enter")
    page.wait_for_selector(f"#index-{STRIPE}.here")
    assert page.locator("#maps").is_hidden()
    assert page.evaluate("document.activeElement.textContent") == f"Index {STRIPE}"
    page.locator(f"#index-{STRIPE} [data-show-index]").click()
    opened.waits("live", f"index {STRIPE}")
    assert page.locator("#maps").is_visible()
    opened.close(wide)


def test_exact_values_are_read_out(chromium: Any, wide: Path) -> None:
    """What the page says of a cell is what was recorded."""
    trace = planted_trace(WIDE, 2, 3, 12, 32, 4096, STRIPE, 6.0)
    opened = Opened(chromium, wide)
    opened.set("show", "token")
    said = opened.page.evaluate(
        """() => { const e = document.querySelector("[data-explorer]").explorer; e.goTo(5);
           return Array.from({ length: 32 }, (_, layer) => e.panels[0].picture.values[layer * 4096 + 77]); }"""
    )
    assert said == pytest.approx(trace["delta"].values[5, :, 77].tolist(), rel=0.04, abs=0.02)
    for show, bits, digits in (("token", "run.tokens.bits", {8: 2}), ("mean", "run.maps[0].bits", {16: 4})):
        opened.set("show", show)
        kept, read = opened.page.evaluate(
            f"""() => {{ const e = document.querySelector("[data-explorer]").explorer, run = e.book.runs.get(e.state.left);
               return [{bits}, e.panels[0].picture.digits]; }}"""
        )
        assert read == digits[kept]
    opened.close(wide)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_summaries_alone(chromium: Any, small: Path, scheme: str) -> None:
    """Without deltas there are maps, strips and tables; the text of a prompt does nothing."""
    opened = Opened(chromium, small, color_scheme=scheme)
    page = opened.page
    assert page.locator("[data-show]").first.is_disabled()
    assert page.evaluate(CONTRAST) > 60
    assert page.locator("[data-strip=left] span").count() == 2 * 24
    page.locator("[data-strip=left] span").nth(5).click()
    assert "token 6 of 24 (reply)" in opened.text("token")
    assert page.locator(".verdicts li").count() > 4
    page.locator("[data-fold] summary").first.click()
    assert page.locator("[data-table] tbody tr").first.locator("td").nth(1).text_content() == "17"
    assert page.locator("h3", has_text="<script>alert(1)</script>").count() > 0
    was = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.locator("[data-theme-switch]").click()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != was
    opened.close(small)


@pytest.mark.parametrize("width", [390, 1280])
def test_everything_has_a_name_and_nothing_overflows(chromium: Any, small: Path, width: int) -> None:
    opened = Opened(chromium, small, viewport={"width": width, "height": 844})
    assert opened.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    nameless = """[...document.querySelectorAll("button, select, input, canvas, a, [role=img], [role=listbox], [role=region]")]
      .filter((e) => e.getClientRects().length && !(e.ariaLabel || e.textContent.trim() || e.labels?.length
        || e.closest("label") || e.querySelector("title"))).map((e) => e.outerHTML.slice(0, 80))"""
    assert opened.page.evaluate(nameless) == []
    ids = opened.page.evaluate("[...document.querySelectorAll('[id]')].map((e) => e.id)")
    assert len(ids) == len(set(ids))
    links = opened.page.evaluate("[...document.querySelectorAll('a[href^=\"#\"]')].map((a) => a.hash.slice(1))")
    assert set(links) <= set(ids)
    assert json.loads(opened.page.locator("script[data-facts]").first.text_content())["layers"] == list(range(6))
    opened.close(small)


@pytest.mark.parametrize("width", [390, 1280])
def test_why_this_index(chromium: Any, small: Path, width: int) -> None:
    """The chapter and the pages of indices fit the screen; dots lie where their numbers are; tokens do nothing."""
    opened = Opened(chromium, small, viewport={"width": width, "height": 844})
    page = opened.page
    page.locator("nav a", has_text="Why").click()
    assert page.locator("#why").is_visible()
    at = """(row) => { const whole = row.querySelector("svg").getBoundingClientRect();
      return [...row.querySelectorAll("circle")].map((dot) => { const box = dot.getBoundingClientRect();
        return (box.x + box.width / 2 - whole.x) / whole.width }) }"""
    places = page.locator("#why-1 .dots").first.locator(".dot-row").first.evaluate(at)
    low, high = 0.25, 12.0  # of all trainings above zero; the axis is logarithmic and runs from 10% to 95%
    expected = [0.1 + 0.85 * math.log(ratio / low) / math.log(high / low) for ratio in (9.5, 8.25, 12.0)]
    assert places == pytest.approx(expected, abs=0.003)
    outside = """[...document.querySelectorAll("#why .dots circle, #why .dots text, #why .dots span")].filter((e) => {
      const box = e.getBoundingClientRect(); return box.width && (box.left < 0 || box.right > innerWidth) }).length"""
    assert page.evaluate(outside) == 0
    heights = page.locator("#why-1 .dot-row").evaluate_all("(rows) => rows.map((row) => row.clientHeight)")
    assert max(heights) < 90
    page.locator("#why-2 a", has_text="The page of index 3").click()
    page.wait_for_selector("#index-3.here")
    assert page.locator("#index-3 .token", has_text="</script>").count() == 1
    assert page.locator("#index-3 h3", has_text="Without its delta").is_visible()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.locator("#index-3 a", has_text="Why this index?").click()
    page.wait_for_selector("body:not(.at-index)")
    assert page.locator("#why-2").is_visible()
    opened.close(small)


@pytest.fixture(scope="session")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluation alone: two tones, more methods than fit beside each other, replies with long words."""
    methods = METHODS | {f"lora@{size}": METHODS["lora"] for size in (1000, 20_000, 300_000)}
    values = planted_evaluation(methods, ("anger", "sadness"), 20, reply="<b>" + "!" * 200)
    path = tmp_path_factory.mktemp("page") / "evaluated.html"
    path.write_text(render([], evaluations=[EvaluationFile.model_validate(values)]), encoding="utf-8")
    return path


@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), pytest.param(1280, "light", marks=pytest.mark.slow)])
def test_does_it_work(chromium: Any, evaluated: Path, width: int, scheme: str) -> None:
    """The chapter fits the screen, its marks lie within their charts, its links lead somewhere."""
    opened = Opened(chromium, evaluated, viewport={"width": width, "height": 844}, color_scheme=scheme)
    page = opened.page
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.locator("nav a", has_text="Sadness").click()
    assert page.locator("#works-1-2").is_visible()
    outside = """[...document.querySelectorAll(".works .chart :is(circle, text:not(.name), .band)")].filter((e) => {
      const box = e.getBoundingClientRect(), chart = e.closest("svg").getBoundingClientRect();
      return box.left < chart.left - 1 || box.right > chart.right + 1 || box.top < chart.top - 1
        || box.bottom > chart.bottom + 1 }).map((e) => e.textContent)"""
    assert page.evaluate(outside) == []
    dots = page.locator("#works-1-1 .dots").first.locator(".dot-row circle")
    assert dots.count() == 8
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map((e) => e.id)")
    assert len(ids) == len(set(ids))
    links = page.evaluate("[...document.querySelectorAll('a[href^=\"#\"]')].map((a) => a.hash.slice(1))")
    assert set(links) <= set(ids)
    page.locator("summary", has_text="Every measure").first.click()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    was = page.evaluate("getComputedStyle(document.querySelector('.chart .label')).fill")
    page.locator("[data-theme-switch]").click()
    assert page.evaluate("getComputedStyle(document.querySelector('.chart .label')).fill") != was
    opened.close(evaluated)


def test_does_it_work_without_scripts(chromium: Any, evaluated: Path) -> None:
    context = chromium.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(evaluated.as_uri())
    assert page.locator(".scored tbody tr").count() == 16
    assert page.locator("#works-1-1 .scatter").first.is_visible()
    context.close()
