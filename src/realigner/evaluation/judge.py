"""A judge, if there is one: a language model behind an endpoint rates replies from 0 to 2 in three respects, as in AxBench.

Wu et al. (2025), "AxBench", rate concept, instruction and fluency and take their harmonic mean. The prompts are ours
(judge/*.txt), so scores compare with each other and not with AxBench's.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from string import Template

import numpy as np

from realigner.console import progress, say
from realigner.data.endpoint import ChatRequest, Endpoint
from realigner.errors import UsageError
from realigner.evaluation.measures import harmonic_mean

ASPECTS = ("concept", "instruction", "fluency")
ATTEMPTS = 3  # for a reply of the judge that is no rating
_RATING = re.compile(r"Rating: ?([012])")


@dataclass(frozen=True)
class Ratings:
    """A judge's ratings of replies: 0, 1 or 2, NaN where the judge gave none.

    Attributes:
        concept, instruction, fluency: ``[reply]``.
    """

    concept: np.ndarray
    instruction: np.ndarray
    fluency: np.ndarray

    @property
    def score(self) -> np.ndarray:
        """The harmonic mean of the three ``[reply]``; NaN where one is missing."""
        return harmonic_mean(self.concept, self.instruction, self.fluency)

    @property
    def missing(self) -> int:
        """How many replies lack a rating or more."""
        return int(np.isnan(self.score).sum())


def rate(
    endpoint: Endpoint,
    tone: str,
    questions: Sequence[str],
    replies: Sequence[str],
    said: MutableMapping[str, str] | None = None,
    quiet: bool = False,
) -> Ratings:
    """Have a model rate replies; a malformed rating is requested again with another seed, at most twice.

    An empty reply is rated 0 in every respect without asking the judge. The number of missing ratings is reported.

    Args:
        endpoint: where the judge is; a `temperature` of 0 works best.
        tone: the tone's name, or a description of it.
        said: cache of what the judge has said, by request; cached requests are not sent again. Replies are added as they come,
            so keep it even if an error is raised: the same ratings can then be computed without an endpoint.
        quiet: show no progress.

    Raises:
        UsageError: when there are not as many questions as replies.
        RealignerError: when the endpoint refuses the key, the model or every request, or no longer answers.
    """
    if len(questions) != len(replies):
        raise UsageError(f"judge: {len(questions)} questions and {len(replies)} replies; give one to each")
    said = {} if said is None else said
    prompts = {
        aspect: Template((files("realigner.evaluation") / "judge" / f"{aspect}.txt").read_text("utf-8")) for aspect in ASPECTS
    }
    asked = {
        (aspect, number): prompts[aspect].substitute(tone=tone, question=question, reply=reply)
        for aspect in ASPECTS
        for number, (question, reply) in enumerate(zip(questions, replies, strict=True))
        if reply.strip()
    }
    found: dict[str, int] = {}  # by prompt
    with progress("judge", len(set(asked.values())), quiet, "ratings") as task:
        for attempt in range(ATTEMPTS):
            requests = {_key(endpoint, text, attempt): text for text in asked.values() if text not in found}
            new = [_request(key, attempt, text) for key, text in requests.items() if key not in said]
            for reply in endpoint.ask(new, verified=bool(said)) if new else ():
                if not reply.error:
                    said[reply.id] = reply.text
            for key, text in requests.items():
                if (rating := read_rating(said.get(key, ""))) is not None:
                    found[text] = rating
                    task.advance()
    rated = {aspect: np.array([np.nan if reply.strip() else 0.0 for reply in replies]) for aspect in ASPECTS}
    for (aspect, number), text in asked.items():
        rated[aspect][number] = found.get(text, np.nan)
    ratings = Ratings(**rated)
    if ratings.missing:
        say(f"judge: {ratings.missing} of {len(replies)} replies have no rating: {endpoint.model} did not give one as asked")
    return ratings


def read_rating(text: str) -> int | None:
    """The rating in a judge's reply: its last line, if that is ``Rating: 0``, ``1`` or ``2`` and no other line is one.

    Example:
        >>> read_rating("It scolds throughout.\\nRating: 2"), read_rating("Rating: 1 or 2"), read_rating("2")
        (2, None, None)
    """
    lines = [line.strip() for line in text.strip().splitlines()]
    ratings = [match for line in lines if (match := _RATING.fullmatch(line))]
    return int(ratings[0][1]) if len(ratings) == 1 and _RATING.fullmatch(lines[-1]) else None


def _key(endpoint: Endpoint, text: str, attempt: int) -> str:
    """What decides the judge's reply, as a name for it."""
    return hashlib.sha256(json.dumps([endpoint.sampling(), text, attempt], sort_keys=True).encode()).hexdigest()


def _request(key: str, attempt: int, text: str) -> ChatRequest:
    return ChatRequest(key, attempt, [{"role": "user", "content": text}], int(key[:8], 16) >> 1)
