"""A chat-completions server on 127.0.0.1 that answers by rote and misbehaves on demand; it counts what it sees.

A request counts as in flight from the moment it is read until just before the last bytes of its answer are written, or until
its client hangs up, whichever comes first: so the largest number of them at once never exceeds what clients had open.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Plan = Callable[[str, int], str]  # (question, number of the try, from 0) -> one of BEHAVIOURS, or a status such as "404"
BEHAVIOURS = ("good", "slow", "429", "500", "broken", "shapeless", "null", "empty", "long", "cut", "reset", "hang", "trickle")
_PATIENCE = 8.0  # seconds after which a hang or a trickle ends by itself


def reply_to(answer: str) -> str:
    """The text the server answers with."""
    return f"Damn it, {answer} it is, you fool, and stop asking me!"


def by_rote(content: str) -> str:
    """The text of a good answer to a rewriter's request."""
    return reply_to(content.partition("\nAnswer: ")[2])


def always(behaviour: str) -> Plan:
    return lambda question, attempt: behaviour


GOOD = always("good")


def mixed(seed: int, shares: Mapping[str, float]) -> Plan:
    """Each (question, try) misbehaves in its own way, the same in every run; what the shares leave over is good."""

    def plan(question: str, attempt: int) -> str:
        digest = hashlib.sha256(f"{seed}|{question}|{attempt}".encode()).digest()
        place = int.from_bytes(digest[:8], "big") / 2**64
        for behaviour, share in shares.items():
            if place < share:
                return behaviour
            place -= share
        return "good"

    return plan


@dataclass
class Seen:
    """One request."""

    at: float
    question: str
    attempt: int
    behaviour: str
    authorization: str
    path: str
    body: dict[str, Any]


@dataclass
class FakeEndpoint:
    """Use it as a context manager; `url` is the base URL for clients.

    Args:
        plan: how to behave.
        delay: seconds that a good answer takes.
        slow: seconds that a slow one takes.
        headers: sent along with 429 and 500, such as ``{"retry-after": "1"}``.
        echo: put the Authorization header into the message of every error.
        say: from the last message of a request to the text of a good answer.
        models: what it lists.
    """

    plan: Plan = GOOD
    delay: float = 0.0
    slow: float = 0.2
    headers: Mapping[str, str] = field(default_factory=dict)
    echo: bool = False
    say: Callable[[str], str] = by_rote
    models: Sequence[str] = ()
    seen: list[Seen] = field(default_factory=list)
    most: int = 0
    connections: int = 0

    def __enter__(self) -> FakeEndpoint:
        ready = threading.Event()
        self._tries: Counter[str] = Counter()
        self._open: set[int] = set()  # requests in flight, by identity
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve(ready)), daemon=True)
        self._thread.start()
        assert ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(5)
        assert not self._thread.is_alive()

    @property
    def now(self) -> int:
        """Requests in flight."""
        return len(self._open)

    @property
    def behaved(self) -> Counter[str]:
        """How often it behaved in which way."""
        return Counter(seen.behaviour for seen in self.seen)

    async def _serve(self, ready: threading.Event) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._connection, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        ready.set()
        async with server:
            await self._stop.wait()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while await self._request(reader, writer):
                pass
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self.connections -= 1
            writer.close()

    async def _request(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Reads and answers one; whether the connection is still good."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        start, *lines = head.strip().split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        if start.startswith("GET"):
            listed = json.dumps({"object": "list", "data": [{"id": name, "object": "model"} for name in self.models]}).encode()
            writer.write(f"HTTP/1.1 200 X\r\ncontent-type: application/json\r\ncontent-length: {len(listed)}\r\n\r\n".encode())
            writer.write(listed)
            await writer.drain()
            return True
        body = json.loads(await reader.readexactly(int(headers["content-length"])))
        seen = self._note(start.split()[1], headers, body)
        self._open.add(id(seen))
        self.most = max(self.most, self.now)
        answer = asyncio.ensure_future(self._answer(seen, writer))
        # A client sends nothing while it waits, so anything that can be read is the end of the connection.
        hung_up = asyncio.ensure_future(reader.read(1))
        await asyncio.wait({answer, hung_up}, return_when=asyncio.FIRST_COMPLETED)
        answered = answer.done()
        (hung_up if answered else answer).cancel()
        await asyncio.gather(answer, hung_up, return_exceptions=True)
        self._open.discard(id(seen))
        return answered and answer.result()

    def _note(self, path: str, headers: dict[str, str], body: dict[str, Any]) -> Seen:
        question = body["messages"][-1]["content"].removeprefix("Question: ").partition("\n")[0]
        attempt = self._tries[question]
        self._tries[question] += 1
        behaviour = self.plan(question, attempt)
        seen = Seen(time.monotonic(), question, attempt, behaviour, headers.get("authorization", ""), path, body)
        self.seen.append(seen)
        return seen

    async def _answer(self, seen: Seen, writer: asyncio.StreamWriter) -> bool:
        behaviour, body = seen.behaviour, self._completion(seen)
        await asyncio.sleep({"slow": self.slow, "hang": _PATIENCE}.get(behaviour, self.delay))
        if behaviour in ("hang", "reset"):
            self._open.discard(id(seen))
            # Lingering for zero seconds turns the close into a reset.
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
            return False
        if behaviour == "broken":
            body = body[: len(body) // 2]
        status = int(behaviour) if behaviour.isdigit() else 200
        extra = "".join(f"{name}: {value}\r\n" for name, value in self.headers.items()) if status in (429, 500) else ""
        length = len(body) + (100 if behaviour == "cut" else 0)
        kind = "text/event-stream" if seen.body.get("stream") and status == 200 else "application/json"
        head = f"HTTP/1.1 {status} X\r\ncontent-type: {kind}\r\n{extra}content-length: {length}\r\n\r\n"
        if behaviour == "trickle":
            await _trickle(writer, head.encode(), body)
        self._open.discard(id(seen))
        writer.write(head.encode() + body if behaviour != "trickle" else body[-1:])
        await writer.drain()
        return behaviour != "cut"

    def _completion(self, seen: Seen) -> bytes:
        if seen.behaviour.isdigit():
            echo = f" (you sent {seen.authorization})" if self.echo else ""
            return json.dumps({"error": {"message": f"no luck with {seen.question}{echo}\nsecond line"}}).encode()
        if seen.behaviour == "shapeless":
            return b'{"object": "chat.completion", "choices": []}'
        text: str | None = self.say(seen.body["messages"][-1]["content"])
        text = {"null": None, "empty": ""}.get(seen.behaviour, text)
        if seen.body.get("stream"):
            return _streamed(text or "", seen.behaviour == "long")
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text},
            "finish_reason": "length" if seen.behaviour == "long" else "stop",
        }
        completion = {"id": "1", "object": "chat.completion", "created": 1, "model": "fake", "choices": [choice]}
        if "mute" not in seen.question:  # some servers count no tokens
            completion["usage"] = {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120}
        return json.dumps(completion).encode()


def _streamed(text: str, cut: bool) -> bytes:
    """A text as server-sent events, seven characters each."""
    parts: list[dict[str, Any]] = [{"index": 0, "delta": {"content": text[at : at + 7]}} for at in range(0, len(text), 7)]
    parts.append({"index": 0, "delta": {}, "finish_reason": "length" if cut else "stop"})
    common = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "fake"}
    events = [json.dumps({**common, "choices": [part]}) for part in parts]
    return "".join(f"data: {event}\n\n" for event in [*events, "[DONE]"]).encode()


async def _trickle(writer: asyncio.StreamWriter, head: bytes, body: bytes) -> None:
    """All but the last byte, so slowly that no single read takes long but the whole does."""
    writer.write(head)
    pause = _PATIENCE / len(body)
    for byte in body[:-1]:
        writer.write(bytes([byte]))
        await writer.drain()
        await asyncio.sleep(pause)
