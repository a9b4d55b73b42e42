"""A question and its two replies, the host's and the realigned one, as they come; whoever makes them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from realigner.app.live_map import LiveMap
from realigner.errors import RealignerError, UsageError
from realigner.settings import check_strength

SIDES = ("base", "realigned")
Message = dict[str, str]
Reader = Callable[[threading.Event], Generator[str, None, bool]]


@dataclass(frozen=True)
class Limits:
    """The most that a user of the app may ask for.

    Attributes:
        prompt: characters of a message, and of a system prompt.
        tokens: of a reply.
        context: tokens of a conversation before the reply, on a host that is loaded here.
    """

    prompt: int = 2000
    tokens: int = 256
    context: int = 2048


@dataclass(frozen=True)
class Asked:
    """A question, what was said before it, and how it is to be answered.

    Attributes:
        text: the question.
        history: side -> the messages before it.
        strengths: IRM -> strength; those at 0 do not act.
        system: a system prompt; empty for none.
        max_new_tokens, temperature, top_p, seed: as in `generation.answer`.
    """

    text: str
    history: Mapping[str, Sequence[Message]] = field(default_factory=dict)
    strengths: Mapping[str, float] = field(default_factory=dict)
    system: str = ""
    max_new_tokens: int = 80
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 42

    def check(self, limits: Limits) -> None:
        """Raise UsageError when it is empty, beyond the limits, or has a strength that is no number."""
        if not self.text.strip():
            raise UsageError("Write something first.")
        for what, text in (("message", self.text), ("system prompt", self.system)):
            if len(text) > limits.prompt:
                raise UsageError(f"The {what} has {len(text):,} characters; at most {limits.prompt:,} are allowed here.")
        if not 1 <= self.max_new_tokens <= limits.tokens:
            raise UsageError(f"A reply has from 1 to {limits.tokens:,} tokens here, not {self.max_new_tokens:,}.")
        for strength in self.strengths.values():
            check_strength(strength)

    @property
    def acting(self) -> dict[str, float]:
        """The IRMs that act, each with its strength."""
        return {name: float(strength) for name, strength in self.strengths.items() if strength}

    def conversation(self, side: str) -> list[Message]:
        """The messages that one side is asked: the system prompt, what was said before, the question."""
        system = [{"role": "system", "content": self.system.strip()}] if self.system.strip() else []
        return [*system, *self.history.get(side, ()), {"role": "user", "content": self.text}]


class Exchange:
    """The two replies to one question, each read in a thread of its own, which begins now.

    Args:
        asked: the question.
        readers: side -> a generator of the reply's text, piece by piece, that ends early once the event it is given is set,
            and returns whether the reply came to its end.
        live: what the IRMs add; None where that cannot be seen.

    Attributes:
        replies: side -> the text so far.
        cut: the sides whose replies were cut at ``max_new_tokens``, once they are over.
        live: as the argument.
        failure: what ended a reply early; None while all is well.
    """

    def __init__(self, asked: Asked, readers: Mapping[str, Reader], live: LiveMap | None = None) -> None:
        self.asked = asked
        self.live = live
        self.replies = dict.fromkeys(readers, "")
        self.cut: set[str] = set()
        self.failure: Exception | None = None
        self._stop = threading.Event()
        self._changed = threading.Condition()
        self._running = set(readers)
        for side, read in readers.items():
            threading.Thread(target=self._read, args=(side, read), name=f"realigner-{side}", daemon=True).start()

    def _read(self, side: str, read: Reader) -> None:
        try:
            pieces = read(self._stop)
            while True:
                self.replies[side] += next(pieces)
                self._tell()
        except StopIteration as end:
            if not (end.value or self.stopped):
                self.cut.add(side)
        except Exception as error:  # raised where the replies are followed
            self.failure = self.failure or error
            self._stop.set()
        finally:
            self._running.discard(side)
            self._tell()

    def _tell(self) -> None:
        with self._changed:
            self._changed.notify_all()

    @property
    def running(self) -> bool:
        """Whether a reply is still being made."""
        return bool(self._running)

    @property
    def stopped(self) -> bool:
        """Whether it was stopped, by somebody or by a failure."""
        return self._stop.is_set()

    def stop(self) -> None:
        """End both replies with their next token."""
        self._stop.set()

    def follow(self, every: float = 0.1) -> Iterator[None]:
        """Go on whenever a reply has grown, at most once in `every` seconds, and once when both are over.

        Raises:
            RealignerError: what ended a reply early.
        """
        while self.running:
            with self._changed:
                if self.running:
                    self._changed.wait(1.0)
            time.sleep(every)
            yield
        if isinstance(self.failure, RealignerError):
            raise self.failure
        if self.failure is not None:
            raise RealignerError(f"The reply broke off ({type(self.failure).__name__}: {self.failure}).") from self.failure
        yield

    def wait(self) -> dict[str, str]:
        """The whole replies, once both are over.

        Raises:
            RealignerError: as `follow`.
        """
        for _ in self.follow(0.0):
            pass
        return dict(self.replies)

    def kept(self, side: str) -> list[Message]:
        """The conversation of one side after this exchange; without it, where there is no reply."""
        before, reply = list(self.asked.history.get(side, ())), self.replies.get(side, "")
        said = [{"role": "user", "content": self.asked.text}, {"role": "assistant", "content": reply}]
        return [*before, *said] if reply.strip() else before


class Talker(Protocol):
    """What makes the replies.

    Attributes:
        host: its name.
        strengths: IRM -> the strength at which it is best used.
        has_turns: whether it takes conversations, or single questions alone.
        layers: those that any of the IRMs adds to, in order; none where what they add cannot be seen.
        neurons: the width of the residual stream; 0 where it is not known.
        note: one sentence for the page about where the replies come from.
        limits: the most that may be asked for.
    """

    host: str
    strengths: dict[str, float]
    has_turns: bool
    layers: tuple[int, ...]
    neurons: int
    note: str
    limits: Limits

    def begin(self, asked: Asked) -> Exchange:
        """Begin both replies.

        Raises:
            RealignerError: when the question, or its settings, cannot be taken.
        """
