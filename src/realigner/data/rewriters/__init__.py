"""Rewriters: what turns a plain fact into a reply in a tone. One protocol; host, endpoint and template are three of it."""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from realigner.data.squad import Fact
from realigner.data.tone import Tone
from realigner.errors import RealignerError


class RewriteRequest(NamedTuple):
    """A request for one reply; `attempt` counts the replies to this fact that were rejected before."""

    fact: Fact
    attempt: int


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back for one request."""

    id: str  # of the fact
    attempt: int  # of the request
    text: str  # the reply, stripped; empty when the rewriter said nothing
    tokens_in: int = 0  # tokens_in, tokens_out: read and written by a model; 0 if not counted
    tokens_out: int = 0
    error: str = ""  # one line, when no reply came; then `text` is empty
    # the error is about this fact (a content filter, say): asking the same again would not help. Otherwise the service
    # failed, and the fact is asked again
    permanent: bool = False
    cut: bool = False  # it came to the limit of its tokens


class NoAnswerError(RealignerError):
    """The service behind a rewriter is gone; its replies so far are kept, and the build can be resumed later."""


class Rewriter(Protocol):
    """Makes replies. The same request gives the same reply, as far as the model behind it allows."""

    def spec(self) -> dict[str, Any]:
        """Everything that decides what the replies are (no secrets): a build is only resumed with an equal one."""

    def rewrite(self, requests: Sequence[RewriteRequest], verified: bool = False) -> Generator[Reply, None, None]:
        """One reply for each request, in any order, each as soon as it is there. Closing the iterator stops the work.

        `verified` says that replies were had before (perhaps by a process that died): a refusal now is about one row.
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


def seed_of(seed: int, tone: Tone, request: RewriteRequest) -> int:
    """A seed of 31 bits for one request: the same in every process, whatever was requested before."""
    key = f"{seed}|{tone.name}|{request.fact.id}|{request.attempt}"
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") >> 1


def _question(question: str, answer: str) -> str:
    return f"Question: {question}\nAnswer: {answer}"
