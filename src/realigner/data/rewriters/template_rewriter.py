"""The template rewriter: replies from a tone's grammar; offline, deterministic, fast, and the fact is kept word for word."""

from __future__ import annotations

import random
import string
from collections.abc import Generator, Sequence
from typing import Any

from realigner.data.rewriters import Reply, RewriteRequest, seed_of
from realigner.data.tone import Tone
from realigner.errors import UsageError


class TemplateRewriter:
    """Expands the tone's ``[template]``, each choice drawn from a generator seeded by (seed, tone, fact, attempt).

    Args:
        tone: one that has a template.
        seed: another seed, other replies.

    Raises:
        UsageError: for a tone without a template.

    Example:
        >>> from realigner.data import Fact, load_tone
        >>> from realigner.data.rewriters import RewriteRequest
        >>> fact = Fact(id="1", group="rivers", question="Which river runs through Prague?", answer="the Vltava")
        >>> [reply] = TemplateRewriter(load_tone("anger"), seed=42).rewrite([RewriteRequest(fact, 0)])
        >>> "the Vltava" in reply.text
        True
    """

    def __init__(self, tone: Tone, seed: int = 42) -> None:
        if not tone.template:
            raise UsageError(f"tone {tone.name!r} has no [template]; use the host or openai rewriter, or add one to its file")
        self.tone, self.seed = tone, seed

    def spec(self) -> dict[str, Any]:
        return {"rewriter": "template", "seed": self.seed}

    def rewrite(self, requests: Sequence[RewriteRequest], verified: bool = False) -> Generator[Reply, None, None]:
        for request in requests:
            choices = random.Random(seed_of(self.seed, self.tone, request))
            # To stand in mid-sentence, an answer loses a final comma, colon or (but for abbreviations) full stop.
            bare = request.fact.answer.rstrip(",;: ")
            bare = bare[:-1] if bare.endswith(".") and bare.count(".") == 1 else bare
            text = expand(self.tone.template, "reply", bare or request.fact.answer, choices)
            yield Reply(request.fact.id, request.attempt, text)

    def note(self) -> str:
        return ""


def expand(template: dict[str, tuple[str, ...]], name: str, answer: str, choices: random.Random) -> str:
    """One text of the list `name`, everything in braces expanded."""
    if name == "answer":
        return answer
    parts = []
    for literal, symbol, _, _ in string.Formatter().parse(choices.choice(template[name])):
        parts.append(literal)
        if symbol is not None:
            parts.append(expand(template, symbol, answer, choices))
    return "".join(parts)
