"""The app: its replies are `Runtime.answer`'s, each user's own; and the page in Chromium, which asks nobody but the app."""

from __future__ import annotations

import html
import json
import re
import shutil
import socket
import threading
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import get_peft_model

import realigner as ra
from realigner.app.chat_page import Listening, Page, app_running
from realigner.app.conversations import Conversation, Conversations
from realigner.app.endpoint_talker import EndpointTalker, told
from realigner.app.exchange import SIDES, Asked, Exchange, Limits, Message, Reader
from realigner.app.live_map import LiveMap
from realigner.app.map_page import index_panel, map_page
from realigner.app.runtime_talker import RuntimeTalker
from realigner.cli import main
from realigner.errors import RealignerError, UsageError
from realigner.explain.explanation import read_explanation
from realigner.irm_config import IRMConfig
from realigner.prompts import Answer
from realigner.report import build_report
from realigner.report.quantize import decode
from realigner.runtime import Runtime
from realigner.traces import load_trace, save_trace
from realigner.traces.layout import text_spans
from tests.fake_endpoint import FakeEndpoint, always
from tests.planted import planted_explanation, written_explanation
from tests.tiny import tiny_pair

QUESTION = "How many?"
BOTH = {"anger": 0.7, "sadness": -0.5}


@pytest.fixture(scope="module")
def talker(runtime: Runtime) -> RuntimeTalker:
    return RuntimeTalker(runtime, Limits(prompt=100, tokens=400, context=300), host="tiny")


def answered(runtime: Runtime, asked: Asked, side: str) -> Answer:
    """What `Runtime.answer` gives for one side: the independent way to the same reply."""
    options: dict[str, Any] = {name: getattr(asked, name) for name in ("max_new_tokens", "temperature", "top_p", "seed")}
    acting = {name: value for name, value in asked.strengths.items() if value} if side == "realigned" else {}
    settings = {"irms": tuple(acting), "strength": acting} if acting else {"irms": "__base__"}
    messages = [*asked.history.get(side, []), {"role": "user", "content": asked.text}]
    return runtime.answer([messages], system=asked.system or None, **options, **settings)[0]


# --- replies --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how",
    [
        {"strengths": {"anger": 0.0, "sadness": 0.0}},
        {"strengths": {"anger": 1.5}},
        {"strengths": {"anger": -2.0, "sadness": 0.0}},
        {"strengths": BOTH, "system": "Be brief."},
        {"strengths": BOTH, "temperature": 0.9, "seed": 7},
        {"strengths": BOTH, "temperature": 1.3, "top_p": 0.4, "seed": 8},
    ],
    ids=str,
)
def test_replies_are_those_of_answer(talker: RuntimeTalker, runtime: Runtime, how: dict[str, Any]) -> None:
    asked = Asked(QUESTION, max_new_tokens=16, **how)
    replies = talker.begin(asked).wait()
    assert replies == {side: answered(runtime, asked, side) for side in SIDES}
    assert (replies["base"] == replies["realigned"]) == (not asked.acting)


def test_top_p_leaves_the_likeliest_token_alone(runtime: Runtime) -> None:
    """The smallest nucleus is the likeliest token: a sample of it is the greedy reply. The whole one is sampling as it was."""
    greedy = runtime.answer(QUESTION, max_new_tokens=12)
    assert runtime.answer(QUESTION, max_new_tokens=12, temperature=1.5, top_p=1e-6, seed=3) == greedy
    warm = runtime.answer(QUESTION, max_new_tokens=12, temperature=1.5, seed=3)
    assert warm != greedy
    assert runtime.answer(QUESTION, max_new_tokens=12, temperature=1.5, top_p=1.0, seed=3) == warm
    for wrong in (0.0, 1.1):
        with pytest.raises(UsageError, match="top_p"):
            runtime.answer(QUESTION, top_p=wrong)


def test_each_side_has_a_history_of_its_own(talker: RuntimeTalker, runtime: Runtime) -> None:
    conversation = Conversation()
    for turn, text in enumerate(("One?", "Two?", "Three?")):
        asked = Asked(text, conversation.messages, {"anger": 1.0 + turn}, max_new_tokens=6)
        conversation.exchange = talker.begin(asked)
        replies = conversation.exchange.wait()
        assert replies == {side: answered(runtime, asked, side) for side in SIDES}
        shown = {side: conversation.shown(side) for side in SIDES}
        conversation.settle()
        said = {
            side: [{**own, "content": own["content"].removesuffix(" ...")} for own in shown[side]] for side in SIDES
        }  # without the marks of replies that were cut
        assert conversation.messages == said
    assert [message["content"] for message in conversation.messages["base"]][::2] == ["One?", "Two?", "Three?"]
    assert conversation.messages["base"] != conversation.messages["realigned"]


def says(text: str, ended: bool) -> Reader:
    """A reader that says this."""

    def read(_: threading.Event) -> Generator[str, None, bool]:
        yield text
        return ended

    return read


def test_a_reply_that_was_cut_is_shown_so_and_kept_as_it_was_said() -> None:
    conversation = Conversation()

    def say(text: str, history: Mapping[str, Sequence[Message]], ended: bool) -> list[str]:
        readers = {"base": says(text, True), "realigned": says(text, ended)}
        conversation.exchange = Exchange(Asked("Why?", history), readers)
        conversation.exchange.wait()
        conversation.settle()
        kept = [own["content"] for own in conversation.messages["realigned"]]
        assert kept[-1] == text or not text.strip()
        return [own["content"] for own in conversation.shown("realigned")][1::2]

    assert say("One", {}, False) == ["One ..."]
    first = conversation.messages
    assert say("Two", first, True) == ["One ...", "Two"]
    assert say("Again", first, False) == ["One ...", "Again ..."]
    assert say(" ", conversation.messages, False)[:2] == ["One ...", "Again ..."]
    assert say("Three", conversation.messages, True) == ["One ...", "Again ...", "Three"]
    assert say("Alone", {}, True) == ["Alone"]
    assert [own["content"] for own in conversation.shown("base")] == ["Why?", "Alone"]


def test_users_at_once_each_get_their_own(talker: RuntimeTalker, runtime: Runtime) -> None:
    """Recordings begin and end while others are open; every map is of its own reply."""
    asked = [
        Asked(f"Number {n}?", {}, {"anger": 0.5 * n - 1, "sadness": 0.25 * (n % 3)}, max_new_tokens=4 + 3 * n, seed=n,
              temperature=float(n % 2))
        for n in range(8)
    ]  # fmt: skip
    exchanges = [talker.begin(one) for one in asked]
    for one, exchange in zip(asked, exchanges, strict=True):
        assert exchange.wait() == {side: answered(runtime, one, side) for side in SIDES}
        assert exchange.live is not None
        assert exchange.live.trace is not None
        runs = exchange.live.trace.attrs["runs"]
        assert {name: round(facts["strength"], 4) for name, facts in runs.items()} == one.acting
    host: Any = runtime.model.base_model.model
    assert "generate" not in vars(host)
    assert not host._forward_pre_hooks


def test_stop_ends_the_generation_on_the_host(talker: RuntimeTalker) -> None:
    begun = threading.active_count()
    exchange = talker.begin(Asked(QUESTION, strengths={"anger": 1.0}, max_new_tokens=400))
    live = exchange.live
    assert live is not None
    while live.tokens < 40:
        time.sleep(0.002)
    exchange.stop()
    exchange.wait()
    assert exchange.stopped
    there = live.tokens
    assert there < 300
    time.sleep(0.3)
    assert live.tokens == there
    assert threading.active_count() <= begun
    assert live.trace is not None  # what there is of it is recorded


def test_what_is_refused_says_so_in_a_line(talker: RuntimeTalker) -> None:
    talk = [{"role": "user", "content": "x" * 90}, {"role": "assistant", "content": "y" * 90}] * 2
    for asked, words in [
        (Asked(" "), "Write something"),
        (Asked("x" * 101), "message has 101 characters"),
        (Asked("x", system="y" * 101), "system prompt has 101"),
        (Asked("x", max_new_tokens=401), "from 1 to 400 tokens"),
        (Asked("x", max_new_tokens=0), "from 1 to 400"),
        (Asked("x", strengths={"anger": float("nan")}), "strength"),
        (Asked("x", strengths={"joy": 1.0}), "no IRM 'joy'"),
        (Asked("x", temperature=-1.0), "temperature"),
        (Asked("x", top_p=0.0), "top_p"),
    ]:
        with pytest.raises(UsageError, match=words):
            talker.begin(asked).wait()
    with pytest.raises(UsageError, match=r"conversation has .* tokens, and at most 300"):
        talker.begin(Asked("x", {"base": talk}))


def test_what_breaks_is_one_line(talker: RuntimeTalker) -> None:
    def broken(_: threading.Event) -> Generator[str, None, bool]:
        yield "so far"
        raise RuntimeError("CUDA out of memory")

    exchange = Exchange(Asked("x"), {"base": broken, "realigned": says("well", True)})
    with pytest.raises(RealignerError, match=r"^The reply broke off \(RuntimeError: CUDA out of memory\)\.$"):
        exchange.wait()
    assert exchange.kept("base")[-1]["content"] == "so far"


def test_conversations_are_apart_and_closed_pages_stop(talker: RuntimeTalker) -> None:
    found = Conversations()
    one, two = found.of("one"), found.of("two")
    assert one is found.of("one")
    assert one is not two
    one.exchange = talker.begin(Asked(QUESTION, strengths={"anger": 1.0}, max_new_tokens=400))
    live = one.exchange.live
    assert live is not None
    assert found.live(live.id) is live
    found.end("one")
    one.exchange.wait()
    assert one.exchange.stopped
    assert one.ended
    with pytest.raises(UsageError, match="gone"):
        found.live(live.id)
    assert found.of("one") is not one


# --- the map --------------------------------------------------------------------------------------------------------------


def test_the_map_is_what_was_recorded(talker: RuntimeTalker, runtime: Runtime, tmp_path: Path) -> None:
    """Words, deltas, means and energies against a recording made apart; the sum of two IRMs against both."""
    asked = Asked(QUESTION, strengths=BOTH, max_new_tokens=12)
    exchange = talker.begin(asked)
    exchange.wait()
    live = exchange.live
    assert live is not None
    messages = [{"role": "user", "content": QUESTION}]
    deltas = {}
    with ra.record(runtime.model, keep="raw") as trace:
        runtime.answer([messages], irms=tuple(BOTH), strength=BOTH, max_new_tokens=12)
    for name, span in zip(trace["text_run"].values.tolist(), text_spans(trace), strict=True):
        deltas[name] = trace["delta"].values[span]
    deltas["anger + sadness"] = deltas["anger"] + deltas["sadness"]
    assert live.runs == ["anger + sadness", "anger", "sadness"]
    picture = json.loads(json.dumps(live.picture(done=True)))
    assert picture["words"] == trace["token_text"].values[: live.tokens].tolist()
    assert picture["generated"] == int(trace["count"].values[0, 0])
    for run in picture["runs"]:
        own = deltas[run["name"]]
        np.testing.assert_allclose([live.delta(run["name"], at) for at in range(live.tokens)], own, rtol=1e-5, atol=1e-8)
        np.testing.assert_allclose(run["energy"], np.square(own).sum(axis=(1, 2)), rtol=1e-2)
        means = live.means(run["name"])
        np.testing.assert_allclose(means["signed"], own.mean(axis=0), rtol=1e-4, atol=1e-7)
        np.testing.assert_allclose(means["absolute"], abs(own).mean(axis=0), rtol=1e-4, atol=1e-7)
    assert live.leading("anger", 3) == ra.analysis.leading_indices(
        ra.analysis.run_maps(trace, generated=None).sel(run="anger"), count=3
    )["neuron"].tolist()  # fmt: skip
    for wrong in (("anger", 10_000), ("anger", -1), ("joy", 0)):
        with pytest.raises(UsageError, match="no token"):
            live.token(*wrong)


def test_layers_are_those_of_the_decoder_that_the_irm_is_on() -> None:
    """Of a host with an encoder, whose config counts that one's layers."""
    host, tokenizer = tiny_pair("bart", encoder_layers=5, decoder_layers=3)
    model = get_peft_model(host, IRMConfig(output_std=0.3), adapter_name="anger").eval()
    talker = RuntimeTalker(Runtime(model, tokenizer, {"anger": 1.0}), host="tiny")
    assert talker.layers == (0, 1, 2)
    assert talker.neurons == host.config.d_model
    exchange = talker.begin(Asked(QUESTION, strengths={"anger": 1.0}, max_new_tokens=3))
    exchange.wait()
    assert exchange.live is not None
    means = exchange.live.means("anger")["absolute"]
    assert means.shape == (3, host.config.d_model)
    assert (means > 0).any(axis=1).all()


def test_what_is_downloaded_opens(talker: RuntimeTalker, tmp_path: Path) -> None:
    exchange = talker.begin(Asked(QUESTION, strengths={"anger": 1.0}, max_new_tokens=12))
    exchange.wait()
    assert exchange.live is not None
    assert exchange.live.trace is not None
    trace = load_trace(save_trace(exchange.live.trace, tmp_path / "t.zarr"))
    assert trace["text_reply"].values.tolist() == [exchange.replies["realigned"]]
    assert trace["text_question"].values.tolist() == [QUESTION]
    page, _ = build_report([tmp_path / "t.zarr"], tmp_path / "report.html")
    assert "anger" in page.read_text()
    # From the page: what is downloaded goes when another reply is; Gradio's copy of it, which may be under way, stays.
    copy = tmp_path / "place" / "gradio" / "report.html"
    copy.parent.mkdir(parents=True)
    copy.touch()
    shown, session = Page(talker, [], tmp_path / "place"), SimpleNamespace(session_hash="a")
    written = []
    for temperature in (0.0, 0.8):
        conversation = shown.conversations.of("a")
        conversation.exchange = talker.begin(Asked(QUESTION, conversation.messages, {"anger": 1.0}, "", 6, temperature, 1.0, 3))
        conversation.exchange.wait()
        conversation.settle()
        text = Path(shown.report(session)).read_text()
        assert f"{'Sampled' if temperature else 'Greedy'} replies of at most 6 tokens" in text
        written.append({path.name for path in (tmp_path / "place" / "recordings").iterdir()})
    assert [len(some) for some in written] == [1, 1]
    assert not written[0] & written[1]
    assert copy.exists()


def test_an_index_has_its_profile_facts_and_verdict(tmp_path: Path) -> None:
    explained = read_explanation(written_explanation(tmp_path / "why", planted_explanation(3)))
    live = LiveMap({"anger": (0, 2)}, (0, 1, 2), explained.width, lambda token: f"<b>{token}")
    with pytest.raises(UsageError, match="no index 3"):
        index_panel(live, "anger", 3)
    for token in (5, 6):
        delta = torch.zeros(1, 2, explained.width)
        delta[0, 1, 3] = token
        labels = {"token_id": np.array([token]), "is_generated": np.array([token > 5]), "position": np.array([token])}
        live.add("anger", labels, delta)
    assert live.generated == 1
    assert live.missing("anger") == [1]
    assert live.largest("anger", 3)[0] == {"position": 1, "layer": 2, "value": 6.0, "word": "<b>6"}
    plain = index_panel(live, "anger", 3, position=1)
    assert "&lt;b&gt;6" in plain
    assert "<b>6" not in plain
    assert "Layer by layer" in plain
    full = index_panel(live, "anger", 3, [explained])
    assert html.escape(explained.words) in full
    assert "Measured at index 3" in full
    page = map_page((0, 1, 2), explained.width)
    assert "class HeatMap" in page
    assert "http" not in page.replace("http-equiv", "").replace("http://www.w3.org", "")
    code = live.token("anger", 0)
    assert set(code) == {"data", "soft", "top", "bits"}
    assert decode(np.array([127]), code["soft"], code["top"], 8)[0] == pytest.approx(5.0, rel=1e-3)


# --- on an endpoint -------------------------------------------------------------------------------------------------------


def test_an_endpoint_is_asked_by_names_with_strengths() -> None:
    models = ("host", "host+anger", "host+joy")
    with FakeEndpoint(say=lambda text: f"So: {text} " * 5, models=models) as server:
        talker = EndpointTalker(server.url, limits=Limits(tokens=50))
        assert (talker.host, list(talker.strengths), talker.layers) == ("host", ["anger", "joy"], ())
        history = {"realigned": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}]}
        asked = Asked("Why?", history, {"anger": 0.7, "joy": -0.5}, "Be.", 20, 0.5, 0.9, 3)
        exchange = talker.begin(asked)
        assert exchange.wait() == dict.fromkeys(SIDES, "So: Why? " * 5)
        assert exchange.live is None
        assert exchange.cut == set()
        bodies = {seen.body["model"]: seen.body for seen in server.seen}
        assert sorted(bodies) == ["host+anger@0+joy@0", "host+anger@0.7+joy@-0.5"]
        sent = bodies["host+anger@0.7+joy@-0.5"]
        assert sent["messages"] == asked.conversation("realigned")
        assert [sent[key] for key in ("temperature", "top_p", "seed", "max_tokens", "stream")] == [0.5, 0.9, 3, 20, True]
        assert len(bodies["host+anger@0+joy@0"]["messages"]) == 2
    with FakeEndpoint(models=models) as server:  # behind a login, with a query
        url = server.url.replace("http://", "http://user:word@") + "/?api-version=2024-10-21"
        EndpointTalker(url).begin(Asked("Why?")).wait()
        assert len(server.seen) >= 2
        for seen in server.seen:
            assert seen.authorization == "Basic dXNlcjp3b3Jk"
            assert seen.path.endswith("?api-version=2024-10-21")


def test_a_reply_that_an_endpoint_cut_is_known_as_cut() -> None:
    with FakeEndpoint(plan=always("long")) as server:
        exchange = EndpointTalker(server.url, "host", ["anger"]).begin(Asked("Why?"))
        exchange.wait()
        assert exchange.cut == {*SIDES}


def test_an_endpoint_that_hangs_is_left_when_stopped_and_one_that_refuses_says_why() -> None:
    with FakeEndpoint(plan=always("hang")) as server:
        exchange = EndpointTalker(server.url, "host", ["anger"]).begin(Asked("Why?"))
        while len(server.seen) < 2:
            time.sleep(0.01)
        begun = time.monotonic()
        exchange.stop()
        exchange.wait()
        assert time.monotonic() - begun < 3
        assert exchange.cut == set()
    with FakeEndpoint(plan=always("400"), echo=True) as server:
        talker = EndpointTalker(server.url, "host", ["anger"])
        with pytest.raises(RealignerError, match="HTTP 400: no luck with Why") as refused:
            talker.begin(Asked("Why?")).wait()
        assert "\n" not in str(refused.value)
    with pytest.raises(RealignerError, match="is the server running"):
        EndpointTalker(server.url)


def test_the_host_and_its_irms_are_told_from_the_models() -> None:
    assert told(["a", "a+x", "b"], "a", [], "url") == ("a", ["x"])
    assert told([], "a", ["x"], "url") == ("a", ["x"])
    for models in (["a", "b"], []):
        with pytest.raises(UsageError, match="name the host"):
            told(models, None, [], "url")
    with pytest.raises(UsageError, match="lists no IRM of a"):
        told(["a"], None, [], "url")


# --- the command ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "app: no IRM is given and none is ready-made"),
        (("--irm", "nowhere"), "nowhere: there is no such adapter folder"),
        (("--irm", "x", "--address", "0.0.0.0"), "address: 0.0.0.0 can be reached from elsewhere; ask for a login"),
        (("--irm", "x", "--auth", "secretword"), "--auth: give a user and a password"),
        (("--model", "host"), "--model: names a model at an endpoint"),
        (("--endpoint", "http://127.0.0.1:9/v1", "--host", "x"), "--host: is for a host loaded here"),
        (("--endpoint", "nonsense"), "endpoint: must be an http or https URL"),
    ],
)
def test_wrong_usage_is_one_line(
    arguments: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("REALIGNER_CACHE", str(tmp_path))
    monkeypatch.setattr("realigner.irm_sources.SHIPPED", tmp_path)
    assert main(["app", *arguments]) in (1, 2)
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith(f"realigner: {words}")
    assert "secretword" not in said


def test_a_taken_port_and_an_explanation_of_another_host_are_refused(talker: RuntimeTalker, tmp_path: Path) -> None:
    other = read_explanation(written_explanation(tmp_path / "why", planted_explanation(3)))
    with pytest.raises(UsageError, match="explains index 3"), app_running(talker, Listening(port=0), [other]):
        pass
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=f"port: {port} is taken on 127.0.0.1"), app_running(talker, Listening(port=port)):
            pass
    away = Listening("192.0.2.1", 0, ("me", "secretword"))
    with pytest.raises(UsageError, match=r"address: cannot listen on 192\.0\.2\.1"), app_running(talker, away):
        pass


def test_the_python_of_the_docs_runs(irms: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).parents[1] / "docs" / "app.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(compile(block.replace('"runs/anger-42"', repr(str(irms["anger"]))), "app.md", "exec"), {})
    assert "('token', 'layer', 'neuron')" in capsys.readouterr().out


# --- in the browser -------------------------------------------------------------------------------------------------------


class Opened:
    """The app in a page of Chromium of its own, with what it asked for and complained about."""

    def __init__(self, chromium: Any, url: str, **options: Any) -> None:
        self.url = url
        self.context = chromium.new_context(**({"viewport": {"width": 1280, "height": 900}} | options))
        self.page = self.context.new_page()
        self.page.set_default_timeout(30_000)
        self.requests: list[str] = []
        self.errors: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto(url)
        self.page.wait_for_selector("#question textarea")
        self.map = self.page.frame_locator("#map iframe")

    def ask(self, text: str = QUESTION, button: str = "ask") -> None:
        self.page.fill("#question textarea", text)
        self.page.click(f"#{button}")

    def finished(self) -> dict[str, str]:
        """The replies, once the map says that both are made."""
        self.map.locator("html[data-done=true]").wait_for(state="attached")
        return self.replies()

    def replies(self) -> dict[str, str]:
        """The newest reply on each side, as the page shows it."""
        sides = self.page.locator(".said")
        return {side: str(sides.nth(at).locator("[data-testid=bot] .md").last.text_content()) for at, side in enumerate(SIDES)}

    def strength(self, at: int, value: float) -> None:
        """Move the slider of an IRM, by its number."""
        box = self.page.locator(".strength input[type=number]").nth(at)
        box.fill(str(value))
        box.press("Enter")
        box.blur()

    def drawn(self) -> str:
        """The picture of the map."""
        return str(self.map.locator("canvas").first.evaluate("map => map.toDataURL()"))

    def close(self) -> None:
        """Nothing broke, and nothing but the app was asked."""
        self.context.close()
        assert self.errors == []
        assert [url for url in self.requests if not url.startswith((self.url, "blob:", "data:", "about:"))] == []


@pytest.fixture(scope="module")
def why(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An explanation of the tiny host's index 3."""
    made = planted_explanation(3, neurons=32, layers=3, host="tiny")
    return written_explanation(tmp_path_factory.mktemp("why") / "why", made)


@pytest.fixture(scope="module")
def url(talker: RuntimeTalker, why: Path) -> Iterator[str]:
    with app_running(talker, Listening(port=0, users=2), [read_explanation(why)]) as found:
        yield found


def shown(runtime: Runtime, asked: Asked, side: str) -> str:
    """What `Runtime.answer` gives, as a page shows it: without NULs, which a host of bytes may say; marked if it was cut."""
    reply = answered(runtime, asked, side)
    return reply.replace("\0", "") + ("" if reply.ended else " ...")


def test_a_question_in_the_browser(chromium: Any, url: str, talker: RuntimeTalker, runtime: Runtime, tmp_path: Path) -> None:
    """Ask; move a slider and ask again; click a token and an index; download; all of it by requests to the app alone."""
    opened = Opened(chromium, url)
    assert "made with an IRM" in str(opened.page.text_content("body"))
    opened.ask()
    first, map_of_first = opened.finished(), opened.drawn()
    asked = Asked(QUESTION, strengths={"anger": 2.0})  # the first IRM acts, at its own strength
    assert first == {side: shown(runtime, asked, side) for side in SIDES}

    opened.strength(0, -1.5)
    opened.strength(1, 0.75)
    opened.page.click("#again")
    opened.map.locator("option", has_text="anger + sadness").first.wait_for(state="attached")
    second = opened.finished()
    again = Asked(QUESTION, strengths={"anger": -1.5, "sadness": 0.75})
    assert second == {side: shown(runtime, again, side) for side in SIDES}
    assert second["base"] == first["base"]
    assert second["realigned"] != first["realigned"]
    assert opened.drawn() != map_of_first

    mean = opened.drawn()
    opened.map.locator("[data-strip=left] span").nth(12).click()
    opened.map.locator("[data-token]", has_text="token 13 of").wait_for()
    for _ in range(100):
        if opened.drawn() != mean:
            break
        time.sleep(0.05)
    assert opened.drawn() != mean
    opened.map.locator("[data-go] input").fill("3")
    opened.map.locator("[data-go] button").click()
    panel = opened.map.locator("[data-panel-of-index]")
    panel.get_by_text("Measured at index 3").wait_for()
    assert "Index 3 of tiny: a <channel> of the host." in str(panel.text_content())
    assert "token 13" in str(panel.text_content())

    opened.page.get_by_text("Download the last reply").click()
    for button, name in (("trace", "trace.zarr.zip"), ("report", "report.html")):
        with opened.page.expect_download() as download:
            opened.page.click(f"#{button}")
        assert download.value.suggested_filename == name
        download.value.save_as(tmp_path / name)
    shutil.unpack_archive(tmp_path / "trace.zarr.zip", tmp_path)
    trace = load_trace(tmp_path / "trace.zarr")
    assert trace["text_reply"].values.tolist() == [answered(runtime, again, "realigned")] * 2
    assert "anger" in (tmp_path / "report.html").read_text()
    opened.close()


@pytest.mark.proof
def test_two_browsers_at_once_each_get_their_own_tokens(chromium: Any, url: str, runtime: Runtime) -> None:
    strengths = (1.0, -2.0)
    both = [Opened(chromium, url) for _ in strengths]
    for opened, strength in zip(both, strengths, strict=True):
        opened.strength(0, strength)
    for opened in both:
        opened.ask("Who are you?")
    found = [opened.finished() for opened in both]
    for replies, strength in zip(found, strengths, strict=True):
        assert replies == {side: shown(runtime, Asked("Who are you?", strengths={"anger": strength}), side) for side in SIDES}
    assert found[0]["realigned"] != found[1]["realigned"]
    assert found[0]["base"] == found[1]["base"]
    for opened in both:
        opened.close()


@pytest.mark.slow  # on a busy machine the reply may be whole before the page can stop it
def test_stop_in_the_browser(chromium: Any, url: str, talker: RuntimeTalker, runtime: Runtime) -> None:
    opened = Opened(chromium, url)
    opened.page.get_by_text("Sampling").click()
    box = opened.page.get_by_label("number input for Tokens of a reply at most")
    box.fill("400")
    box.press("Enter")
    box.blur()
    opened.ask()
    opened.map.locator("[data-strip=left] span").nth(45).wait_for(state="attached")
    opened.page.click("#stop")
    replies = opened.finished()
    whole = shown(runtime, Asked(QUESTION, strengths={"anger": 2.0}, max_new_tokens=400), "realigned")
    assert len(replies["realigned"]) < len(whole)
    assert whole.startswith(replies["realigned"].rstrip())
    assert not [thread for thread in threading.enumerate() if thread.name in ("realigner-base", "realigner-realigned")]
    opened.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_in_light_and_dark(chromium: Any, url: str, scheme: str) -> None:
    """390 px wide nothing goes beyond the edge, in the page or in the map; the map has the page's colours."""
    opened = Opened(chromium, url, viewport={"width": 390, "height": 844}, color_scheme=scheme)
    opened.ask()
    opened.finished()
    opened.map.locator("[data-strip=left] span").nth(12).click()
    wide = "() => [document.documentElement.scrollWidth, document.body.scrollWidth]"
    assert max(opened.page.evaluate(wide)) <= 390
    assert max(opened.map.locator("html").evaluate(wide)) <= 390
    grounds = [opened.page.locator("body"), opened.map.locator("body")]
    colours = [ground.evaluate("body => getComputedStyle(body).backgroundColor") for ground in grounds]
    assert colours[0] == colours[1]
    lightness = sum(map(int, re.findall(r"\d+", colours[0])[:3])) / 765
    assert (lightness > 0.8) == (scheme == "light")
    opened.close()


def test_errors_are_plain_words_in_the_page(chromium: Any, url: str) -> None:
    opened = Opened(chromium, url)
    opened.page.click("#ask")
    opened.page.get_by_text("Write something first.").wait_for()
    opened.strength(0, 0)
    opened.ask()
    opened.map.get_by_text("No IRM acts: every slider is at 0").wait_for()
    opened.finished()
    opened.page.get_by_text("Download the last reply").click()
    opened.page.click("#trace")
    opened.page.get_by_text("Nothing was recorded: no IRM acted").wait_for()
    assert "Traceback" not in str(opened.page.text_content("body"))
    opened.close()


def test_a_login_is_asked_for(chromium: Any, talker: RuntimeTalker) -> None:
    with app_running(talker, Listening(port=0, login=("me", "s3cret"))) as found:
        context = chromium.new_context()
        page = context.new_page()
        page.goto(found)
        page.get_by_label("password").wait_for()
        assert page.locator("#question").count() == 0
        for password, there in (("wrong", 0), ("s3cret", 1)):
            page.get_by_label("username").fill("me")
            page.get_by_label("password").fill(password)
            page.get_by_role("button", name="Login").click()
            (page.locator("#question textarea") if there else page.get_by_text("Incorrect Credentials")).wait_for()
        context.close()


def test_an_endpoint_has_no_map_and_the_page_says_so(chromium: Any) -> None:
    with (
        FakeEndpoint(say=lambda text: f"So: {text}", models=("host", "host+anger")) as server,
        app_running(EndpointTalker(server.url), Listening(port=0)) as found,
    ):
        opened = Opened(chromium, found)
        assert "there is no map here" in str(opened.page.text_content("#map"))
        opened.strength(0, 0.7)
        opened.ask("Why?")
        opened.page.get_by_text("So: Why?").nth(1).wait_for()
        assert sorted(seen.body["model"] for seen in server.seen) == ["host+anger@0", "host+anger@0.7"]
        opened.close()
