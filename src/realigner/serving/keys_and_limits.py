"""Before and after every request: keys, sizes, how many at once, patience with slow clients; and nothing left behind.

An ASGI application around the one that answers. It reads a request's body whole before that one sees it, and cancels it when
the client leaves; whatever a request began (`begun`) is then ended, however it came to its end.
"""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from contextvars import ContextVar
from typing import Any

import h11
from starlette.responses import JSONResponse
from uvicorn.protocols.http.h11_impl import H11Protocol

from realigner.console import say
from realigner.serving.engine import Limits
from realigner.serving.metrics import Metrics

ANSWERED = ("/v1/chat/completions", "/v1/completions")  # what takes a place in the batch
ADMIN = "/v1/irms"
_ROUTES = (*ANSWERED, ADMIN, "/v1/models", "/health", "/metrics")  # by which requests are counted
_LEFT = 499  # how nginx counts a client that left
_THROWN_AWAY = 16 << 20  # bytes of a request that is refused
_HEAD = 10.0  # seconds that a request's head may take
_STUCK = 30.0  # seconds that a client may take nothing of what is sent
_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}

FAILED = "the server failed on this request; its log says how"

begun: ContextVar[list[Callable[[], None]]] = ContextVar("begun")  # what to call at the end of the request that is answered


def refusal(status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None) -> JSONResponse:
    """An error as OpenAI's API has it, with one line."""
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    line = " ".join(message.split())[:1000]
    error = {"message": line, "type": kind, "param": None, "code": code}
    return JSONResponse({"error": error}, status_code=status, headers=headers)


class KeysAndLimits:
    """Lets requests through to an application, if they may come in.

    Args:
        app: that answers.
        limits: sizes, numbers and patience.
        metrics: in which requests are counted.
        keys: one of them must come with each request below ``/v1``; none asked for where there is none.
        admin_key: that of the routes which load and unload IRMs.
    """

    def __init__(
        self, app: Any, limits: Limits, metrics: Metrics, keys: Sequence[str] = (), admin_key: str | None = None
    ) -> None:
        self._app, self._limits, self._metrics = app, limits, metrics
        self._keys, self._admin_key = [key.encode() for key in keys], admin_key
        self._running = 0
        metrics.watch("requests_running", "Requests that are being answered or wait.", lambda: self._running)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status, path = time.perf_counter(), _LEFT, scope["path"]

        async def counted(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._admit(scope, receive, counted)
        except Exception as error:
            say(f"realigner serve: {scope['method']} {path}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
            if status == _LEFT:
                with suppress(Exception):
                    await refusal(500, FAILED)(scope, receive, counted)
        finally:
            route = next((route for route in _ROUTES if path == route or path.startswith(f"{route}/")), "other")
            self._metrics.requests.labels(route, str(status)).inc()
            self._metrics.seconds.labels(route).observe(time.perf_counter() - began)

    async def _admit(self, scope: Any, receive: Any, send: Any) -> None:
        refused, takes_place = self._unauthorised(scope), scope["path"] in ANSWERED
        body: bytes | None = b""
        try:
            async with asyncio.timeout(self._limits.patience):
                body = await self._body(receive, 0 if refused else self._limits.body)
        except TimeoutError:
            refused = refused or refusal(408, f"the request did not come in {self._limits.patience:g} s; send it faster")
        except _LeftError:
            return
        if refused is None and body is None:
            refused = refusal(413, f"the request is larger than {self._limits.body:,} bytes; shorten it")
        if refused is None and takes_place and self._running >= self._limits.requests:
            busy = f"{self._running} requests are being answered or wait; try again later"
            refused = refusal(429, busy, "rate_limit_exceeded", {"retry-after": "1"})
        if refused is not None:
            refused.headers["connection"] = "close"  # the rest of the request may still be on its way
            await refused(scope, receive, send)
            return
        self._running += takes_place
        ends: list[Callable[[], None]] = []
        token = begun.set(ends)
        try:
            await self._answer(scope, body or b"", receive, send)
        finally:
            begun.reset(token)
            self._running -= takes_place
            for end in ends:
                end()

    def _unauthorised(self, scope: Any) -> JSONResponse | None:
        path = scope["path"]
        admin = path == ADMIN or path.startswith(f"{ADMIN}/")
        keys = ([] if self._admin_key is None else [self._admin_key.encode()]) if admin else self._keys
        if not path.startswith("/v1") or (not keys and not admin):
            return None
        if not keys:
            return refusal(404, f"{path}: IRMs are loaded and unloaded only where the server was started with an admin key")
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        scheme, _, key = given.partition(b" ")
        matches = [hmac.compare_digest(key.strip(), known) for known in keys]  # of all: how long it takes says nothing
        if scheme.lower() == b"bearer" and any(matches):
            return None
        message = "the key is wrong" if given else "a key is needed: send it as Authorization: Bearer KEY"
        return refusal(401, message, "invalid_api_key", {"www-authenticate": "Bearer"})

    async def _body(self, receive: Any, most: int) -> bytes | None:
        """The body of a request; None where it is larger.

        What is too large is read to its end all the same, within bounds: a client that is still sending would not see why it
        is refused.
        """
        body, size = bytearray(), 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise _LeftError
            size += len(message.get("body", b""))
            if size <= most:
                body += message.get("body", b"")
            if not message.get("more_body", False) or size > _THROWN_AWAY:
                return bytes(body) if size <= most else None

    async def _answer(self, scope: Any, body: bytes, receive: Any, send: Any) -> None:
        """Have the application answer, until it has or the client leaves."""
        unread, complete, left = True, False, asyncio.Event()

        async def replayed() -> dict[str, Any]:
            nonlocal unread
            if unread:
                unread = False
                return {"type": "http.request", "body": body, "more_body": False}
            await left.wait()
            return {"type": "http.disconnect"}

        async def noted(message: Any) -> None:
            nonlocal complete
            await send(message)
            complete = message["type"] == "http.response.body" and not message.get("more_body", False)

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass

        work, watching = asyncio.ensure_future(self._app(scope, replayed, noted)), asyncio.ensure_future(watch())
        try:
            await asyncio.wait({work, watching}, return_when=asyncio.FIRST_COMPLETED)
            if work.done() or complete:
                await work
        finally:
            left.set()
            for task in (work, watching):
                task.cancel()
            await asyncio.gather(work, watching, return_exceptions=True)


class _LeftError(Exception):
    pass


class PatientProtocol(H11Protocol):
    """uvicorn's HTTP, with an end to its patience: for a request's head, and for a client that takes nothing."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._waiting = self._stuck = self.loop.time()
        self._look()

    def _look(self) -> None:
        """Every second: abort what has waited too long for its client."""
        if self not in self.connections:
            return
        now = self.loop.time()
        answering = self.cycle is not None and not self.cycle.response_complete
        if answering or self.conn.their_state is not h11.IDLE:
            self._waiting = now
        if not self.transport.get_write_buffer_size():
            self._stuck = now
        if now - self._stuck > _STUCK or now - self._waiting > _HEAD + self.timeout_keep_alive:
            self.transport.abort()
            return
        self.loop.call_later(1, self._look)

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP gets an error of the same shape as others."""
        body = bytes(refusal(400, msg).body)
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)), (b"connection", b"close")]
        with suppress(h11.LocalProtocolError):  # in the middle of a reply there is nothing to say
            for event in (h11.Response(status_code=400, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
