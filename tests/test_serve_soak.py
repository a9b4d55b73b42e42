"""`realigner serve` under a thousand bad requests and a thousand good ones, from this machine to itself."""

from __future__ import annotations

import json
import math
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from tests.served import Server, eventually, serving

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
CHAT = "/v1/chat/completions"
GOOD: dict[str, Any] = {"model": "host+anger", "messages": [{"role": "user", "content": "Why?"}], "max_tokens": 4}
LONG: dict[str, Any] = {**GOOD, "max_tokens": 400}
BAD = 1000


@pytest.fixture(scope="module")
def server(irms: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(irms, tmp_path_factory.mktemp("soak") / "log", "--max-tokens", "400") as running:
        yield running


texts = st.text(max_size=30)
junk = st.recursive(
    st.one_of(st.booleans(), st.integers(), st.floats(), texts),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=3)),
    max_leaves=8,
)
strengths = st.one_of(st.just(math.nan), st.just(math.inf), st.floats(min_value=1000.1), st.booleans(), texts.map("x".__add__))
numbers = ("temperature", "top_p", "repetition_penalty", "seed", "max_tokens", "thinking_budget")


def lists_or_texts(value: Any) -> Any:
    return value if isinstance(value, list | dict | str) else [value]


bodies = st.one_of(
    texts.map(lambda name: {"model": f"host+{name}!"}),
    texts.map(lambda name: {"model": f"{name}+anger"}),
    junk.filter(lambda value: not isinstance(value, str)).map(lambda value: {"model": value}),
    texts.map(lambda name: {"model": "host", "irms": [f"{name}?"]}),
    strengths.map(lambda value: {"model": "host", "irms": {"anger": value}}),
    st.sampled_from(["nan", "inf", "-1e9", "", "one", "0x1"]).map(lambda value: {"model": f"host+anger@{value}"}),
    junk.filter(lambda value: not isinstance(value, int) and value not in ("all", "prompt", "reply")).map(
        lambda value: {"where": f"not {value}"}
    ),
    st.integers(500, 4000).map(lambda count: {"messages": [{"role": "user", "content": "é" * count}]}),
    st.lists(junk.filter(lambda value: not isinstance(value, dict)), max_size=3).map(lambda value: {"messages": value}),
    junk.map(lambda value: {"messages": [{"role": value, "content": ["x"]}]}),
    st.tuples(st.sampled_from(numbers), junk).map(lambda pair: {pair[0]: lists_or_texts(pair[1])}),
    st.tuples(texts, junk).map(lambda pair: {f"?{pair[0]}": pair[1]} if pair[1] is not None else {"?": 1}),
    st.sampled_from([{"n": 5}, {"tools": [1]}, {"stop": [""]}, {"stop": 7}, {"stream": 1}, {"max_tokens": 10**9}]),
    st.sampled_from([{"messages": [{"role": "user", "content": "\ud800"}]}, {"chat_template_kwargs": {"messages": []}}]),
)
raws = st.one_of(
    st.binary(max_size=200).filter(lambda data: not data.strip().startswith(b"{")),
    st.integers(0, len(json.dumps(GOOD)) - 1).map(lambda cut: json.dumps(GOOD)[:cut].encode()),
    st.sampled_from([b"{" * 50_000, b'{"a":' * 50_000, b" " * ((1 << 20) + 1), b'{"model": "host", "messages": Infinity}']),
)
attacks = st.one_of(
    bodies.map(lambda fields: ("body", fields)),
    raws.map(lambda data: ("raw", data)),
    st.tuples(st.sampled_from(["leave whole", "leave stream"]), st.integers(0, 400)),
    st.integers(1, 150).map(lambda count: ("half", count)),
)


def message_of(status: int, answer: Any) -> str:
    """The line of a refusal, which has OpenAI's shape."""
    assert 400 <= status < 500, (status, answer)
    assert set(answer) == {"error"}
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    line = answer["error"]["message"]
    assert line
    assert "\n" not in line
    return str(line)


def opened(server: Server, body: dict[str, Any], part: int | None = None) -> socket.socket:
    """A request on a socket of its own, or its first bytes."""
    data = json.dumps(body).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    raw = socket.create_connection(("127.0.0.1", server.port), timeout=30)
    raw.sendall((head.encode() + data)[:part])
    return raw


def test_a_thousand_bad_requests(server: Server) -> None:
    """Unknown IRMs, strengths that are no numbers, huge prompts, broken JSON, wrong types, clients that are slow or leave."""
    slow: list[socket.socket] = []
    seen: dict[str, int] = {}

    @settings(max_examples=BAD, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(attacks)
    def attack(asked: tuple[str, Any]) -> None:
        kind, value = asked
        seen[kind] = seen.get(kind, 0) + 1
        if kind == "body":
            message_of(*server.request("POST", CHAT, {**GOOD, **value}))
        elif kind == "raw":
            message_of(*server.request("POST", CHAT, value))
        elif kind == "half" and len(slow) < 100:  # kept open, and nothing more is sent
            slow.append(opened(server, GOOD, value))
        else:
            with opened(server, {**LONG, "stream": kind == "leave stream"}) as client:
                if kind == "leave stream":
                    client.recv(1 + int(value))

    attack()
    assert sum(seen.values()) >= BAD * 0.9, seen
    print(f"bad requests: {seen}; {len(slow)} slow clients")
    assert eventually(server.is_idle, 20)
    for client in slow:  # told so (408) where the head was whole; let go where it was not
        client.settimeout(60)
        answer = client.recv(1000)
        assert answer == b"" or answer.startswith(b"HTTP/1.1 408"), answer
        client.close()
    assert server.request("GET", "/health") == (200, {"status": "ok"})
    assert server.request("POST", CHAT, GOOD)[0] == 200
    assert "Traceback" not in server.log.read_text()


def test_memory_is_flat_after_a_thousand_good_requests(server: Server) -> None:
    def ask(number: int) -> int:
        mixes = ("host", "host+anger", "host+sadness@-0.5", f"host+anger@{number % 7}+sadness")
        fields = {"stream": number % 3 == 0, "temperature": number % 2, "stop": ["zz"] if number % 5 == 0 else []}
        messages = [{"role": "user", "content": f"What is {number}? " * (1 + number % 8)}]
        return server.request("POST", CHAT, {**GOOD, "model": mixes[number % 4], "messages": messages, **fields})[0]

    def a_thousand() -> float:
        with ThreadPoolExecutor(16) as pool:
            assert set(pool.map(ask, range(1000))) == {200}
        assert eventually(server.is_idle)
        return server.metric("process_resident_memory_bytes")

    before = a_thousand()
    after = a_thousand()
    print(f"resident after 1,000 good requests: {before / 2**20:.1f} MiB; after 1,000 more: {after / 2**20:.1f} MiB")
    assert after - before < 8 * 2**20
