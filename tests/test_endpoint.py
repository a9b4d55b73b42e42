"""The openai rewriter against a real server on this machine that misbehaves in every way we know."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from realigner.data import Fact, Tone, read_rows
from realigner.data.build_dataset import build
from realigner.data.quality_filter import QualityFilter
from realigner.data.rewriters import Reply, RewriteRequest, messages, seed_of
from realigner.data.rewriters.endpoint_rewriter import EndpointRewriter
from realigner.errors import RealignerError, UsageError
from tests.fake_endpoint import FakeEndpoint, always, mixed, reply_to

pytestmark = pytest.mark.timeout(60)
TONE = Tone(name="anger", instruction="Rewrite the answer in an angry tone.")
KEY = "sk-secret-0123456789"
THREAD = "realigner-endpoint"


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for name in ("OPENAI_BASE_URL", "OPENAI_LOG", "OPENAI_CUSTOM_HEADERS"):
        monkeypatch.delenv(name, raising=False)
    yield
    assert not [thread for thread in threading.enumerate() if thread.name == THREAD]


def requests(count: int, answer: str = "number") -> list[RewriteRequest]:
    return [RewriteRequest(Fact(str(i), "numbers", f"What is {i}?", f"{answer} {i}"), 0) for i in range(count)]


def rewriter(url: str | None, **settings: Any) -> EndpointRewriter:
    return EndpointRewriter(TONE, url, "some-model", **{"timeout": 5, "retries": 0, **settings})


def drain(replies: Iterator[Reply]) -> tuple[list[Reply], str]:
    """What was yielded, and the message of what was raised."""
    found: list[Reply] = []
    try:
        found.extend(replies)
    except RealignerError as error:
        return found, str(error)
    return found, ""


def until(condition: Callable[[], bool], seconds: float = 5.0) -> bool:
    """Waits for it; whether it came true in time."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


@pytest.mark.slow
def test_a_thousand_asks_with_every_misbehaviour() -> None:
    shares = dict.fromkeys(("429", "500", "broken", "shapeless", "null", "cut", "reset"), 0.03)
    shares |= {"hang": 0.008, "trickle": 0.008, "slow": 0.1, "400": 0.005, "long": 0.01, "empty": 0.01}
    given = requests(1000)
    with FakeEndpoint(mixed(1, shares), delay=0.02, headers={"retry-after": "0.3"}) as server:
        replies = list(rewriter(server.url, concurrency=16, timeout=0.7, retries=2).rewrite(given))
    assert sorted(reply.id for reply in replies) == sorted(request.fact.id for request in given)
    answers = {request.fact.id: request.fact.answer for request in given}
    failed = [reply for reply in replies if reply.error]
    for reply in replies:
        assert reply.text in (("",) if reply.error else ("", reply_to(answers[reply.id])))
    assert all("\n" not in reply.error and len(reply.error) < 120 for reply in failed)
    # Three bad tries in a row (0.23 cubed) or a 400: some 17 of 1,000. Empty text without an error: some 10.
    assert 5 < len(failed) < 50
    assert 0 < sum(not reply.text and not reply.error for reply in replies) < 30
    assert all(server.behaved[behaviour] for behaviour in (*shares, "good"))
    assert server.most == 16  # of requests whose client had not hung up: see tests/fake_endpoint.py
    assert server.now == server.connections == 0


@pytest.mark.proof
def test_a_build_of_a_thousand_rows_with_every_misbehaviour(tmp_path: Path) -> None:
    """The whole job: rows and rejected together are the facts, each once; most failures got their reply in the end."""
    shares = dict.fromkeys(("429", "500", "broken", "shapeless", "null", "cut", "reset"), 0.03)
    shares |= {"hang": 0.006, "trickle": 0.006, "slow": 0.1, "400": 0.005, "long": 0.01, "empty": 0.01}
    facts = [request.fact for request in requests(1000)]
    gate = QualityFilter(TONE)
    gate.among = lambda fact, text: ""  # type: ignore[method-assign]  # this server says nearly the same of every number
    out = tmp_path / "rows.jsonl"
    with FakeEndpoint(mixed(2, shares), delay=0.01, headers={"retry-after": "0.2"}) as server:
        own = rewriter(server.url, concurrency=16, timeout=0.7, retries=2)
        built = build(facts, TONE, own, out, gate, attempts=2, give_up=True, quiet=True)
    rows = [row.id.removesuffix(f"-{TONE.name}") for row in read_rows(out)]
    rejected = [json.loads(line)["id"] for line in (tmp_path / "rows.rejected.jsonl").read_text().splitlines()]
    assert sorted([*rows, *rejected], key=int) == [fact.id for fact in facts]
    assert rows == sorted(rows, key=int)
    assert 980 <= built.rows == len(rows)
    assert server.most == 16
    assert all(server.behaved[behaviour] for behaviour in (*shares, "good"))


@pytest.mark.parametrize("concurrency", [1, 4, 16])
def test_concurrency_is_exact(concurrency: int) -> None:
    with FakeEndpoint(delay=0.1) as server:
        assert len(list(rewriter(server.url, concurrency=concurrency).rewrite(requests(concurrency * 4)))) == concurrency * 4
    assert server.most == concurrency


def test_nobody_waits_for_the_slowest() -> None:
    with FakeEndpoint(lambda question, _: "slow" if question == "What is 0?" else "good", slow=1.5) as server:
        order = [reply.id for reply in rewriter(server.url, concurrency=4).rewrite(requests(60))]
    assert order[-1] == "0"
    assert len(order) == 60


def test_fewer_asks_than_workers() -> None:
    with FakeEndpoint() as server:
        assert list(rewriter(server.url, concurrency=8).rewrite([])) == []
        assert len(list(rewriter(server.url, concurrency=8).rewrite(requests(2)))) == 2


def test_a_slow_consumer_slows_the_workers() -> None:
    with FakeEndpoint() as server:
        replies = rewriter(server.url, concurrency=4).rewrite(requests(200))
        assert isinstance(next(replies), Reply)
        assert until(lambda: len(server.seen) > 64)
        time.sleep(0.5)
        assert len(server.seen) <= 1 + 64 + 4
        assert len(list(replies)) == 199


def test_requests_per_minute_counts_retries() -> None:
    with FakeEndpoint(lambda _, attempt: "good" if attempt else "500", headers={"retry-after-ms": "1"}) as server:
        list(rewriter(server.url, concurrency=8, requests_per_minute=600, retries=1).rewrite(requests(5)))
    times = [seen.at - server.seen[0].at for seen in server.seen]
    assert len(times) == 10
    assert all(at >= 0.1 * place - 0.05 for place, at in enumerate(times))


def test_what_is_sent() -> None:
    given = [requests(1)[0], requests(1)[0]._replace(attempt=1)]
    with FakeEndpoint() as server:
        own = rewriter(server.url, concurrency=1, seed=7, temperature=0.5, top_p=0.6, max_tokens=99)
        list(own.rewrite(given))
    bodies = [seen.body for seen in server.seen]
    assert bodies[0] == {
        "model": "some-model",
        "messages": messages(TONE, given[0].fact),
        "seed": seed_of(7, TONE, given[0]),
        "temperature": 0.5,
        "top_p": 0.6,
        "max_tokens": 99,
    }
    assert bodies[1]["seed"] == seed_of(7, TONE, given[1]) != bodies[0]["seed"]
    assert own.spec() == {
        "rewriter": "openai",
        "model": "some-model",
        "seed": 7,
        "temperature": 0.5,
        "top_p": 0.6,
        "max_tokens": 99,
    }


def test_the_budget_of_tries_and_what_is_said_after_it() -> None:
    expected = {
        "429": "HTTP 429 after 2 tries: no luck with 429",
        "500": "HTTP 500 after 2 tries: no luck with 500",
        "broken": "not valid JSON after 2 tries",
        "shapeless": "no choices in the reply after 2 tries",
        "null": "no text in the reply after 2 tries",
        "cut": "peer closed connection without sending complete message body after 2 tries",
        "reset": "connection lost (ReadError) after 2 tries",
        "hang": "no answer in 1 s after 2 tries",
        "trickle": "no answer in 1 s after 2 tries",
        "400": "HTTP 400 after 1 try: no luck with 400",
        "long": "",
        "empty": "",
    }
    given = [RewriteRequest(Fact(behaviour, "g", behaviour, "five"), 3) for behaviour in expected]
    start = time.monotonic()
    with FakeEndpoint(lambda question, _: question) as server:
        replies = list(rewriter(server.url, concurrency=12, retries=1, timeout=1).rewrite(given))
    assert {reply.id: reply.error for reply in replies} == expected
    assert {reply.text for reply in replies if reply.error} == {""}
    assert {reply.id: reply.text for reply in replies if not reply.error} == {"long": reply_to("five"), "empty": ""}
    assert {reply.attempt for reply in replies} == {3}
    assert server.behaved == {b: 1 if b in ("400", "long", "empty") else 2 for b in expected}
    assert time.monotonic() - start < 8


def test_retry_after_is_honoured() -> None:
    with FakeEndpoint(lambda _, attempt: "good" if attempt else "429", headers={"retry-after": "1.2"}) as server:
        [reply] = rewriter(server.url, retries=1).rewrite(requests(1))
    assert reply.text
    assert server.seen[1].at - server.seen[0].at >= 1.2


def test_the_key_is_in_the_header_and_nowhere_else(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    caplog.set_level(logging.DEBUG)
    statuses = {"What is 0?": "good", "What is 1?": "400", "What is 2?": "500", "What is 3?": "401"}
    with FakeEndpoint(lambda question, _: statuses[question], echo=True) as server:
        own = rewriter(server.url, concurrency=1)
        replies, message = drain(own.rewrite(requests(4, answer=KEY)))
    assert {seen.authorization for seen in server.seen} == {f"Bearer {KEY}"}
    assert [reply.text for reply in replies] == [reply_to("*** 0"), "", ""]
    assert "you sent Bearer ***" in replies[1].error
    said = [repr(own), str(own.spec()), own.note(), str(vars(own)), str(replies), message, caplog.text]
    assert message == f"{server.url}: the endpoint refused the key (HTTP 401); set OPENAI_API_KEY"
    # The fact holds the key in this test, so requests do; no log shows a body either.
    assert not any(KEY in text for text in said)
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list


def test_secrets_in_the_url() -> None:
    with FakeEndpoint(lambda question, _: "good" if question == "What is 0?" else "500", echo=True) as server:
        url = server.url.replace("http://", "http://user:pass%40word@") + "/?api-version=2024-10-21#here"
        own = rewriter(url, concurrency=1)
        replies = list(own.rewrite(requests(2)))
    assert own.endpoint == server.url
    assert server.seen[0].path == "/v1/chat/completions?api-version=2024-10-21"
    assert server.seen[0].authorization == "Basic dXNlcjpwYXNzQHdvcmQ="
    assert "dXNlcjpwYXNzQHdvcmQ=" not in replies[1].error
    assert not any(secret in str(vars(own)) for secret in ("pass@word", "pass%40word", "dXNlcjpwYXNzQHdvcmQ="))


def test_without_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(UsageError, match=r"^OPENAI_API_KEY is not set: "):
        rewriter(None)
    with pytest.raises(UsageError, match=r"^MY_KEY is not set: "):
        rewriter(None, key_env="MY_KEY")
    with FakeEndpoint() as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        for url in (server.url, None):
            [reply] = rewriter(url).rewrite(requests(1, answer="none"))
            assert reply.text == reply_to("none 0")  # the placeholder is not cut out of texts
    assert {seen.authorization for seen in server.seen} == {"Bearer none"}


@pytest.mark.parametrize("key", ["sk-1\nsk-2", "sk 1", "sk-ü"])
def test_a_key_that_cannot_be_one(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(UsageError, match=r"^OPENAI_API_KEY: holds a space or a character that no key has") as raised:
        rewriter("http://127.0.0.1:1/v1")
    assert key not in str(raised.value)


@pytest.mark.parametrize(
    ("status", "message"),
    [
        ("401", "the endpoint refused the key (HTTP 401); set MY_KEY"),
        ("403", "the endpoint refused the key (HTTP 403); set MY_KEY"),
        ("404", "HTTP 404 for model 'some-model' (no luck with What is 0?); check the URL and the model's name"),
    ],
)
def test_fatal_statuses_end_it_at_once(status: str, message: str) -> None:
    with FakeEndpoint(always(status)) as server:
        replies, said = drain(rewriter(server.url, concurrency=1, retries=5, key_env="MY_KEY").rewrite(requests(50)))
    assert (replies, said) == ([], f"{server.url}: {message}")
    assert len(server.seen) == 1


def test_a_403_after_a_success_is_about_one_row() -> None:
    with FakeEndpoint(lambda question, _: "403" if question == "What is 1?" else "good") as server:
        replies, said = drain(rewriter(server.url, concurrency=1).rewrite(requests(3)))
    assert [reply.error for reply in replies] == ["", "HTTP 403 after 1 try: no luck with What is 1?", ""]
    assert said == ""


def test_a_proxy_that_cannot_be_used_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "gopher://user:secret@127.0.0.1:1")
    replies, said = drain(rewriter("http://127.0.0.1:1/v1").rewrite(requests(3)))
    assert replies == []
    assert said.startswith("http://127.0.0.1:1/v1: no connection can be set up (")
    assert "secret" not in said
    assert "\n" not in said


def test_three_refusals_at_the_start_are_fatal_and_later_ones_are_not() -> None:
    with FakeEndpoint(always("400")) as server:
        replies, said = drain(rewriter(server.url, concurrency=8).rewrite(requests(50)))
    assert 3 <= len(replies) < 3 + 8  # what others had finished by then is kept too
    assert said.startswith(f"{server.url}: every request is refused (HTTP 400 after 1 try: no luck with What is ")
    with FakeEndpoint(lambda question, _: "400" if question != "What is 2?" else "good") as server:
        replies, said = drain(rewriter(server.url, concurrency=1).rewrite(requests(9)))
    assert (len(replies), said) == (9, "")


def test_a_dead_endpoint_ends_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/v1"
    start = time.monotonic()
    replies, said = drain(rewriter(url, concurrency=6, retries=1).rewrite(requests(100)))
    assert 12 <= len(replies) < 12 + 6
    advice = "the replies so far are kept, run the same command again to go on"
    assert said == f"{url}: 12 requests in a row failed (All connection attempts failed after 2 tries); {advice}"
    assert time.monotonic() - start < 6


def test_one_success_in_between_and_it_is_not_dead() -> None:
    with FakeEndpoint(lambda question, _: "good" if question[8:-1].endswith("9") else "500") as server:
        replies, said = drain(rewriter(server.url, concurrency=1).rewrite(requests(45)))
    assert (len(replies), said) == (45, "")


def close(replies: Iterator[Reply]) -> None:
    replies.close()  # type: ignore[attr-defined]


def interrupt(replies: Iterator[Reply]) -> None:
    """A real Ctrl-C, while the consumer waits for a reply that does not come."""
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        next(replies)


def fail(replies: Iterator[Reply]) -> None:
    with pytest.raises(ZeroDivisionError):
        replies.throw(ZeroDivisionError())  # type: ignore[attr-defined]


@pytest.mark.parametrize("end", [close, interrupt, fail])
@pytest.mark.parametrize("behaviour", ["hang", "trickle"])
def test_ending_early_leaves_nothing_behind(end: Any, behaviour: str) -> None:
    with FakeEndpoint(lambda question, _: "good" if question == "What is 0?" else behaviour) as server:
        replies = rewriter(server.url, concurrency=8, timeout=60, retries=5).rewrite(requests(1000))
        assert next(replies).id == "0"
        assert until(lambda: server.now == server.connections == 8)
        start = time.monotonic()
        end(replies)
        assert not [thread for thread in threading.enumerate() if thread.name == THREAD]
        assert until(lambda: server.now == server.connections == 0, seconds=1)
        assert time.monotonic() - start < 2


@pytest.mark.parametrize("behaviour", ["good", "hang"])
def test_an_iterator_left_open_does_not_hold_up_the_exit(behaviour: str) -> None:
    code = (
        "import sys; from tests.test_endpoint import requests, rewriter\n"
        "replies = rewriter(sys.argv[1], concurrency=4).rewrite(requests(30)); next(replies)\n"
        "held = [replies]; held.append(held)"  # a cycle: it is only taken apart when no thread runs any more
    )
    with FakeEndpoint(lambda question, _: "good" if question == "What is 0?" else behaviour) as server:
        command = [sys.executable, "-c", code, server.url]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, cwd=Path(__file__).parents[1])
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_tokens_and_cost() -> None:
    with FakeEndpoint() as server:
        own = rewriter(server.url, price_in=0.15, price_out=0.6)
        assert own.note() == "0 tokens in, 0 out, $0.0000"
        replies = list(own.rewrite(requests(120)))
        assert {(reply.tokens_in, reply.tokens_out) for reply in replies} == {(100, 20)}
        assert own.note() == "12.0k tokens in, 2.4k out, $0.0032"
        assert own.cost == pytest.approx(120 * (100 * 0.15 + 20 * 0.6) / 1e6)
        [mute] = own.rewrite([RewriteRequest(Fact("mute", "g", "Is it mute?", "yes"), 0)])
        assert (mute.tokens_in, mute.tokens_out, own.tokens_in) == (0, 0, 12000)
        free = rewriter(server.url)
        list(free.rewrite(requests(1)))
        assert (free.cost, free.note()) == (None, "100 tokens in, 20 out")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("seed", -1),
        ("seed", 1.5),
        ("concurrency", 0),
        ("concurrency", True),
        ("concurrency", "8"),
        ("requests_per_minute", 0),
        ("timeout", 0),
        ("timeout", float("nan")),
        ("timeout", float("inf")),
        ("timeout", None),
        ("retries", -1),
        ("temperature", 2.1),
        ("top_p", 1.1),
        ("max_tokens", 0),
        ("price_in", -1),
        ("price_out", 1),  # without price_in
        ("model", ""),
        ("endpoint", "localhost:8000/v1"),
        ("endpoint", "ftp://localhost/v1"),
        ("endpoint", "http://"),
        ("endpoint", "http://localhost:70000/v1"),
        ("endpoint", "user:secret@localhost"),
    ],
)
def test_bad_values_are_named(field: str, value: Any) -> None:
    settings = {"endpoint": "http://127.0.0.1:1/v1", "model": "m", field: value}
    with pytest.raises(UsageError, match=field) as raised:
        EndpointRewriter(TONE, **settings)
    assert "\n" not in str(raised.value)
    assert "secret" not in str(raised.value)


def test_texts_can_be_written_to_files() -> None:
    assert rewriter("http://127.0.0.1:1/v1")._tidy(" half \ud83d, whole \U0001f600\n") == "half \ufffd, whole \U0001f600"


def test_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(RealignerError, match=r"^[^\n]*the openai package is missing; pip install realigner\[openai\]$"):
        rewriter("http://127.0.0.1:1/v1")


def test_openai_is_imported_late() -> None:
    code = (
        "import sys, realigner.data.rewriters.endpoint_rewriter; print({'openai', 'torch', 'transformers'} & set(sys.modules))"
    )
    source = Path(__file__).parents[1] / "src"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=source)
    assert done.stdout.strip() == "set()"
