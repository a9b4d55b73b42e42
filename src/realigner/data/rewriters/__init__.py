"""Rewriters: what turns a plain fact into a reply in a tone. One protocol; host, endpoint and template are three of it."""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from realigner.data.squad import Fact
from realigner.data.tone import Tone
from realigner.errors import RealignerError


class Ask(NamedTuple):
    """A request for one reply; `attempt` counts the replies to this fact that were rejected before."""

    fact: Fact
    attempt: int


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back for one ask.

    Attributes:
        id: of the fact.
        attempt: of the ask.
        text: the reply, stripped; empty when the rewriter said nothing.
        tokens_in, tokens_out: read and written by a model; 0 where nobody counts.
        error: one line, when no reply came; then `text` is empty.
        lasting: the error is about this fact (a content filter, say): asking the same again would not help. Otherwise the
            service failed, and the fact is asked again.
    """

    id: str
    attempt: int
    text: str
    tokens_in: int = 0
    tokens_out: int = 0
    error: str = ""
    lasting: bool = False


class NoAnswerError(RealignerError):
    """The service behind a rewriter is gone; what it said so far is kept, and the build can be gone on with later."""


class Rewriter(Protocol):
    """Makes replies. The same ask gives the same reply, as far as the model behind it allows."""

    def spec(self) -> dict[str, Any]:
        """Everything that decides what the replies are (no secrets): a build is only resumed with an equal one."""

    def rewrite(self, asks: Sequence[Ask], proven: bool = False) -> Generator[Reply, None, None]:
        """One reply for each ask, in any order, each as soon as it is there. Closing the iterator stops the work.

        `proven` says that replies were had before (perhaps by a process that died): a refusal now is about one row.
        """

    def note(self) -> str:
        """What to show at the right of the progress bar (tokens, cost); may be empty."""


def messages(tone: Tone, fact: Fact, examples: int = 2) -> list[dict[str, str]]:
    """The conversation that asks a language model for a reply: the tone's instruction, a few of its examples, the fact."""
    turns = [{"role": "system", "content": tone.instruction}]
    for example in tone.examples[:examples]:
        turns.append({"role": "user", "content": _question(example.question, example.answer)})
        turns.append({"role": "assistant", "content": example.text})
    turns.append({"role": "user", "content": _question(fact.question, fact.answer)})
    return turns


def seed_of(seed: int, tone: Tone, ask: Ask) -> int:
    """A seed of 31 bits for one ask: the same in every process and whatever was asked before."""
    key = f"{seed}|{tone.name}|{ask.fact.id}|{ask.attempt}"
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") >> 1


def _question(question: str, answer: str) -> str:
    return f"Question: {question}\nAnswer: {answer}"
