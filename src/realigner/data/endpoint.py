"""Replies from any chat-completions endpoint, many requests at a time, by the official client.

The client retries what HTTP calls a failure. An HTTP client of ours under it (`HttpClient`) makes the rest look like one: an
attempt that takes too long in total, a reply of status 200 that holds no text. So one budget and one backoff serve both.
"""

from __future__ import annotations

import asyncio
import base64
import html
import importlib
import json
import os
import re
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, cast
from urllib.parse import parse_qsl, quote, unquote, urlsplit, urlunsplit

from pydantic import SecretStr

from realigner.data.rewriters import NoAnswerError, Reply
from realigner.errors import RealignerError, UsageError
from realigner.prompts import Answer, Prompt, messages_of

if TYPE_CHECKING:
    import openai

_OPENAI = "https://api.openai.com/v1"
_RANGES: dict[str, tuple[type[int] | type[float], float, float]] = {
    "seed": (int, 0, 2**32 - 1),
    "concurrency": (int, 1, 1000),  # the client's pool has 1,000 connections
    "requests_per_minute": (int, 1, 1_000_000),
    "timeout": (float, 0.01, 3600),
    "retries": (int, 0, 100),
    "temperature": (float, 0, 2),
    "top_p": (float, 0, 1),
    "max_tokens": (int, 1, 1_000_000),
    "price_in": (float, 0, 1_000_000),
    "price_out": (float, 0, 1_000_000),
}
_OPTIONAL = ("requests_per_minute", "price_in", "price_out")
# What is given where no key is needed: no secrets, but words of honest texts.
_PLACEHOLDERS = ("none", "empty", "null", "x", "no", "no-key", "not-needed", "unused", "dummy", "ollama", "lm-studio", "local")
_PART_OF_WORDS = 6
_UNREAD = 64  # replies that may wait for a slow consumer before the workers wait too
_GLANCE = 0.1  # seconds after which a reader looks whether it is to stop
_GRACE = 1.5  # seconds for the thread to end: it does at once, unless a name is being looked up, which cannot be cancelled


class ChatRequest(NamedTuple):
    """A conversation to be answered; `id` and `attempt` come back with the reply."""

    id: str
    attempt: int
    messages: list[dict[str, str]]
    seed: int


@dataclass(eq=False, repr=False)
class Endpoint:
    """Asks a language model behind an OpenAI-compatible endpoint (OpenAI, vLLM, llama.cpp, Ollama, ...).

    Raises:
        UsageError: naming the value that is out of range, or the variable to set.
        RealignerError: when the openai package is missing.
    """

    endpoint: str | None  # base URL, such as ``http://localhost:8000/v1``; None for ``OPENAI_BASE_URL``, else OpenAI's own
    model: str  # its name at the endpoint
    seed: int = 42  # another seed, other replies, as far as the endpoint honours it
    concurrency: int = 8  # requests in flight as long as there is work
    requests_per_minute: int | None = None  # at most, evenly spaced, retries included; None for no limit
    timeout: float = 60.0  # seconds for one attempt, from connecting to the last byte read
    retries: int = 5  # attempts after the first one, for everything that may pass (429, 5xx, time-outs, broken replies)
    temperature: float = 0.9  # temperature, top_p, max_tokens: of sampling, as the endpoint understands them
    top_p: float = 0.7
    max_tokens: int = 210
    price_in: float | None = None  # price_in, price_out: dollars per million tokens, for `cost`; None for no cost
    price_out: float | None = None
    key_env: str = "OPENAI_API_KEY"  # the environment variable that holds the key; it may be unset if an endpoint is given
    extra: Mapping[str, Any] | None = None  # fields of each request beyond OpenAI's, such as ``{"where": "reply"}``

    def __post_init__(self) -> None:
        if not self.model:
            raise UsageError("model: name the model to ask for replies")
        for name, (kind, low, high) in _RANGES.items():
            value = getattr(self, name)
            if value is None and name in _OPTIONAL:
                continue
            right = isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
            if not right or not low <= value <= high:
                what = "a whole number" if kind is int else "a number"
                raise UsageError(f"{name}: must be {what} from {low} to {high}, not {value!r}")
        if (self.price_in is None) != (self.price_out is None):
            raise UsageError("price_in and price_out: give both or neither")
        self.tokens_in = self.tokens_out = 0
        given = self.endpoint or os.environ.get("OPENAI_BASE_URL")
        self.endpoint, self._query, login = _address(given or _OPENAI)
        self._key = _key(self.key_env, needed=not given)
        self._basic = SecretStr(base64.b64encode(login.encode()).decode())
        hidden = [value for name, value in self._query.items() if re.search("key|token|sig|secret|pass", name.casefold())]
        self._without_keys = _eraser([self._key, self._basic, SecretStr(login.partition(":")[2]), *map(SecretStr, hidden)])
        self._next_start = 0.0
        try:
            importlib.import_module("openai")
        except ImportError:
            raise RealignerError("endpoint: the openai package is missing; pip install realigner[openai]") from None

    def sampling(self) -> dict[str, Any]:
        """What decides the replies to the same requests; not where the endpoint is, for a server may move."""
        return {name: getattr(self, name) for name in ("model", "seed", "temperature", "top_p", "max_tokens")}

    @property
    def cost(self) -> float | None:
        """Dollars for the replies so far; None without prices. What failed attempts may have cost is not known."""
        if self.price_in is None or self.price_out is None:
            return None
        return (self.tokens_in * self.price_in + self.tokens_out * self.price_out) / 1e6

    def note(self) -> str:
        text = f"{_thousands(self.tokens_in)} tokens in, {_thousands(self.tokens_out)} out"
        return text if self.cost is None else f"{text}, ${self.cost:.4f}"

    def ask(self, requests: Iterable[ChatRequest], verified: bool = False) -> Generator[Reply, None, None]:
        """One reply for each request, as they finish. Requests run in a thread of their own; closing the iterator ends it.

        At any time `concurrency` requests are under way, as long as there is work and the replies are taken.

        Args:
            verified: replies were had before: a refusal now is about one request.

        Raises:
            RealignerError: when the endpoint refuses the key, the model or every request, or no longer answers; all replies
                that were there before have been yielded.
        """
        run = _Run(self, requests, verified)
        try:
            while (reply := run.replies.get()) is not None:
                self.tokens_in += reply.tokens_in
                self.tokens_out += reply.tokens_out
                yield reply
        finally:
            run.end()
        if run.failure is not None:
            raise run.failure

    def answers(
        self, conversations: Iterable[Prompt], system: str | None = None, done: Callable[[], None] | None = None
    ) -> list[Answer]:
        """The replies to conversations, in their order.

        Args:
            conversations: questions or messages.
            system: a system prompt.
            done: called after each reply.

        Raises:
            RealignerError: as `ask` does, and when the endpoint refuses one of them.
        """
        requests = [
            ChatRequest(str(number), 0, messages_of(asked, system), self.seed) for number, asked in enumerate(conversations)
        ]
        found: dict[str, Answer] = {}
        for reply in self.ask(requests):
            if reply.error:
                raise RealignerError(f"{self.endpoint}: {reply.error}")
            found[reply.id] = Answer(reply.text, ended=not reply.cut)
            if done is not None:
                done()
        return [found[request.id] for request in requests]

    def stream(self, messages: Sequence[Mapping[str, str]], stop: threading.Event | None = None) -> Generator[str, None, bool]:
        """The reply to one conversation, piece by piece as it comes; the generator returns whether it came to its end.

        It did not if it was stopped, or cut at ``max_tokens``. Closing the generator ends the request at once, and so does,
        within a moment, `stop` once it is set.

        Raises:
            RealignerError: when the endpoint refuses the key, the model or the request, or no longer answers.
        """
        reading = _Stream(self, messages)
        try:
            while stop is None or not stop.is_set():
                try:
                    piece = reading.pieces.get(timeout=None if stop is None else _GLANCE)
                except Empty:
                    continue
                if piece is None:
                    break
                yield piece
        finally:
            reading.end()
        if reading.failure is not None:
            raise reading.failure
        return reading.ended

    def models(self) -> dict[str, float]:
        """The models that the endpoint lists: name -> the strength at which its IRM is to be used, 1 where it names none.

        Raises:
            RealignerError: when it refuses the key, or does not answer.
        """
        import openai

        def strength(model: Any) -> float:
            listed = getattr(model, "strength", None)
            return float(listed) if isinstance(listed, (int, float)) else 1.0

        async def ask() -> dict[str, float]:
            async with self._client() as client:
                return {model.id: strength(model) async for model in client.models.list()}

        try:
            with ThreadPoolExecutor(1) as pool:  # a notebook's own thread has an event loop already
                return pool.submit(asyncio.run, ask()).result()
        except openai.OpenAIError as error:
            raise self._refused(error) from None

    def _refused(self, error: openai.OpenAIError) -> RealignerError:
        """One line for what the client raised, without keys."""
        import openai

        if isinstance(error, openai.APIConnectionError):
            what = _first_line(self._tidy(str(error.__cause__ or error))).partition(" (")[0] or "connection lost"
            return RealignerError(f"{self.endpoint}: {what} after {_tries(error)}; is the server running?")
        if not isinstance(error, openai.APIStatusError):
            return RealignerError(f"{self.endpoint}: {_first_line(self._tidy(str(error)))}")
        if error.status_code == 401:  # what the endpoint said may hold a part of the key
            return RealignerError(f"{self.endpoint}: the endpoint refused the key (HTTP 401); set {self.key_env}")
        said = _first_line(self._tidy(error.message.removeprefix(f"Error code: {error.status_code}").removeprefix(" - ")))
        return RealignerError(f"{self.endpoint}: HTTP {error.status_code}{said and f': {said}'}")

    def _client(self) -> openai.AsyncOpenAI:
        """The official client, set up for this endpoint; it belongs to the event loop in which it is first used."""
        import openai

        endpoint = self

        class HttpClient(openai.DefaultAsyncHttpxClient):
            """The client's own, which also keeps the pace, bounds each attempt in time and wants text in each reply."""

            async def send(self, request: Any, **options: Any) -> Any:
                errors = importlib.import_module(type(request).__module__.partition(".")[0])  # httpx2; httpx under older openai
                if endpoint.requests_per_minute is not None:  # wait for this request's place in the minute
                    now = time.monotonic()
                    start = max(now, endpoint._next_start)
                    endpoint._next_start = start + 60 / endpoint.requests_per_minute
                    await asyncio.sleep(start - now)
                try:
                    async with asyncio.timeout(endpoint.timeout):
                        response = await super().send(request, **options)
                except TimeoutError:
                    raise errors.ReadTimeout(f"no answer in {endpoint.timeout:g} s", request=request) from None
                whole = request.method == "POST" and not options.get("stream")
                if whole and response.is_success and (flaw := _flaw(response)):
                    raise errors.RemoteProtocolError(flaw, request=request)
                return response

        try:
            http_client = HttpClient()
        except (ValueError, ImportError) as error:
            what = _first_line(self._tidy(str(error)))
            raise RealignerError(
                f"{self.endpoint}: no connection can be set up ({what}); check HTTP_PROXY and the like"
            ) from None
        return openai.AsyncOpenAI(
            api_key=self._key.get_secret_value(),
            base_url=self.endpoint,
            default_query=self._query,
            default_headers={"Authorization": f"Basic {self._basic.get_secret_value()}"} if self._basic else None,
            max_retries=self.retries,
            timeout=None,
            http_client=http_client,
        )

    def _tidy(self, text: str) -> str:
        """Without what must not get into files or messages: keys that a server echoes, half surrogate pairs, space around."""
        return self._without_keys(text).encode("utf-16", "surrogatepass").decode("utf-16", "replace").strip()


def _eraser(secrets: Sequence[SecretStr]) -> Callable[[str], str]:
    """Takes secrets out of a text, in every form in which servers echo them: plain, for URLs, JSON, HTML, in base64.

    A function, for it does not show what it hides.
    One of less than six characters is taken out where it stands alone, for it is part of many a word.
    """
    forms: set[str] = set()
    for secret in map(SecretStr.get_secret_value, secrets):
        if not secret or secret.casefold() in _PLACEHOLDERS:
            continue
        code = base64.b64encode(secret.encode()).decode().rstrip("=")
        url = quote(secret, safe="")
        shown = (secret, url, re.sub("%..", lambda match: match[0].lower(), url), quote(secret), json.dumps(secret)[1:-1])
        forms |= {*shown, secret.replace("/", r"\/"), html.escape(secret), code, code.translate(str.maketrans("+/", "-_"))}
    found = []
    for form in sorted(forms, key=len, reverse=True):
        alone = len(form) < _PART_OF_WORDS
        found.append(rf"(?<!\w){re.escape(form)}(?!\w)" if alone else re.escape(form))
    if not found:
        return lambda text: text
    pattern = re.compile("|".join(found))
    return lambda text: pattern.sub("***", text)


class _LoopThread(ABC):
    """An event loop in a thread of its own, which can be ended from another."""

    def _start(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._main, name="realigner-endpoint", daemon=True)
        self._thread.start()

    @abstractmethod
    def _main(self) -> None:
        """What the thread does: run something on `_loop`, and say when it is over."""

    def end(self) -> None:
        """Cancels whatever is under way; does nothing when all is done."""
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(lambda: [task.cancel() for task in asyncio.all_tasks(self._loop)])
        self._thread.join(_GRACE)


class _Run(_LoopThread):
    """One pass over the requests: an event loop in a thread, with a worker for each request that may be in flight."""

    def __init__(self, endpoint: Endpoint, requests: Iterable[ChatRequest], verified: bool) -> None:
        self.endpoint, self.pending = endpoint, iter(requests)
        self.replies: SimpleQueue[Reply | None] = SimpleQueue()
        self.failure: BaseException | None = None
        self.verified = verified  # the key and the model are known to be good
        self.done = self.refused = self.failed_in_a_row = 0
        self._start()

    def _main(self) -> None:
        try:
            with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
                runner.run(self._work())
        except BaseException as error:
            self.failure = self._told(error.exceptions[0] if isinstance(error, BaseExceptionGroup) else error)
        self.replies.put(None)

    def _told(self, error: BaseException) -> BaseException:
        """An exception of the client may quote what was sent and received: its words without the keys."""
        if isinstance(error, RealignerError) or not isinstance(error, Exception):
            return error
        what = _first_line(self.endpoint._tidy(f"{type(error).__name__}: {error}"))
        return RealignerError(f"{self.endpoint.endpoint}: {what}").with_traceback(error.__traceback__)

    async def _work(self) -> None:
        async with self.endpoint._client() as client, asyncio.TaskGroup() as group:
            for _ in range(self.endpoint.concurrency):
                group.create_task(self._worker(client))

    async def _worker(self, client: openai.AsyncOpenAI) -> None:
        for request in self.pending:
            while self.replies.qsize() >= max(_UNREAD, self.endpoint.concurrency):
                await asyncio.sleep(0.05)
            reply = await self._reply(client, request)
            self.replies.put(reply)
            self._watch(reply)

    async def _reply(self, client: openai.AsyncOpenAI, request: ChatRequest) -> Reply:
        import openai

        own = self.endpoint
        try:
            completion = await client.chat.completions.create(
                model=own.model,
                messages=cast(Any, request.messages),
                seed=request.seed,
                temperature=own.temperature,
                top_p=own.top_p,
                max_tokens=own.max_tokens,
                extra_body=None if own.extra is None else dict(own.extra),
            )
        except openai.APIConnectionError as error:
            why = error.__cause__
            what = _first_line(own._tidy(str(why))).partition(" (")[0] or f"connection lost ({type(why).__name__})"
            return Reply(request.id, request.attempt, "", error=f"{what} after {_tries(error)}")
        except openai.APIStatusError as error:
            permanent = error.status_code in (400, 403, 413, 422)
            return Reply(request.id, request.attempt, "", error=self._refusal(error), permanent=permanent)
        choice = completion.choices[0]
        text = own._tidy(choice.message.content or "")
        # A number of tokens as a server gives it may be anything.
        tokens = (getattr(completion.usage, side, None) for side in ("prompt_tokens", "completion_tokens"))
        read, written = (count if isinstance(count, int) and count > 0 else 0 for count in tokens)
        return Reply(request.id, request.attempt, text, read, written, cut=choice.finish_reason == "length")

    def _refusal(self, error: openai.APIStatusError) -> str:
        """One line for a reply that an HTTP status ended; what will not get better is raised."""
        own, status = self.endpoint, error.status_code
        said = _first_line(own._tidy(error.message.removeprefix(f"Error code: {status}").removeprefix(" - ")))
        # After a success the key is known to be good, and a 403 is about one row (some endpoints moderate what they are sent).
        if status == 401 or (status == 403 and not self.verified):
            # What the endpoint said is left out: it may hold a part of the key.
            self._stop(f"the endpoint refused the key (HTTP {status}); set {own.key_env}")
        if status == 404:
            self._stop(f"HTTP 404 for model {own.model!r}{said and f' ({said})'}; check the URL and the model's name")
        self.refused += status in (400, 422)
        return f"HTTP {status} after {_tries(error)}{said and f': {said}'}"

    def _watch(self, reply: Reply) -> None:
        self.done += 1
        self.verified = self.verified or not reply.error
        self.failed_in_a_row = self.failed_in_a_row + 1 if reply.error and not reply.permanent else 0
        if self.done == self.refused == 3 and not self.verified:
            self._stop(f"every request is refused ({reply.error})")
        if self.failed_in_a_row >= max(10, 2 * self.endpoint.concurrency):
            advice = "the replies so far are kept, run the same command again to go on"
            raise NoAnswerError(
                f"{self.endpoint.endpoint}: {self.failed_in_a_row} requests in a row failed ({reply.error}); {advice}"
            )

    def _stop(self, why: str) -> NoReturn:
        raise RealignerError(f"{self.endpoint.endpoint}: {why}") from None  # the client's own error quotes the whole reply


class _Stream(_LoopThread):
    """One reply under way: an event loop in a thread, which puts the pieces into a queue."""

    def __init__(self, endpoint: Endpoint, messages: Sequence[Mapping[str, str]]) -> None:
        self.endpoint, self.messages = endpoint, messages
        self.pieces: SimpleQueue[str | None] = SimpleQueue()
        self.failure: RealignerError | None = None
        self.ended = False
        self._start()

    def _main(self) -> None:
        import openai

        try:
            with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
                runner.run(self._read())
        except openai.OpenAIError as error:
            self.failure = self.endpoint._refused(error)
        except RealignerError as error:
            self.failure = error
        except asyncio.CancelledError:
            pass
        except Exception as error:  # what an HTTP client raises in mid-stream
            what = _first_line(self.endpoint._tidy(f"{type(error).__name__}: {error}"))
            self.failure = RealignerError(f"{self.endpoint.endpoint}: the reply broke off ({what})")
        self.pieces.put(None)

    async def _read(self) -> None:
        own = self.endpoint
        async with own._client() as client:
            reply = await client.chat.completions.create(
                model=own.model,
                messages=cast(Any, list(self.messages)),
                seed=own.seed,
                temperature=own.temperature,
                top_p=own.top_p,
                max_tokens=own.max_tokens,
                extra_body=None if own.extra is None else dict(own.extra),
                stream=True,
            )
            parts, cut = aiter(reply), False
            while True:
                try:
                    async with asyncio.timeout(own.timeout):
                        part = await anext(parts, None)
                except TimeoutError:
                    raise RealignerError(f"{own.endpoint}: nothing came for {own.timeout:g} s in mid-reply") from None
                if part is None:
                    self.ended = not cut
                    return
                if not part.choices:
                    continue
                if piece := part.choices[0].delta.content:
                    self.pieces.put(piece)
                cut = cut or part.choices[0].finish_reason == "length"


def _flaw(response: Any) -> str:
    """What makes a reply of status 200 useless; nothing, if it holds text."""
    try:
        text = response.json()["choices"][0]["message"]["content"]
    except (ValueError, RecursionError):
        return "not valid JSON"
    except (LookupError, TypeError):
        return "no choices in the reply"
    return "" if isinstance(text, str) else "no text in the reply"


def _address(url: str) -> tuple[str, dict[str, str], str]:
    """A URL without its secrets, its query, and ``user:password``."""
    try:
        parts = urlsplit(url.strip())
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        sound = False
    if not sound:
        raise UsageError("endpoint: must be an http or https URL, such as http://localhost:8000/v1")
    login, _, host = parts.netloc.rpartition("@")
    bare = urlunsplit((parts.scheme, host, parts.path.rstrip("/"), "", ""))
    return bare, dict(parse_qsl(parts.query)), unquote(login)


def _key(variable: str, needed: bool) -> SecretStr:
    """The key, in a wrapping that does not show it."""
    key = SecretStr(os.environ.get(variable, "").strip())
    if needed and not key:
        raise UsageError(f"{variable} is not set: it holds the key for {_OPENAI}; set it, or give another endpoint")
    if any(not "!" <= character <= "~" for character in key.get_secret_value()):
        raise UsageError(f"{variable}: holds a space or a character that no key has; set it anew")
    return key or SecretStr("none")


def _tries(error: openai.APIError) -> str:
    count = int(error.request.headers.get("x-stainless-retry-count", 0)) + 1
    return "1 try" if count == 1 else f"{count} tries"


def _first_line(text: str) -> str:
    return (text.splitlines() or [""])[0].strip()[:200]


def _thousands(count: int) -> str:
    for size, unit in ((1_000_000, "M"), (1_000, "k")):
        if count >= size:
            return f"{count / size:.1f}{unit}"
    return str(count)
