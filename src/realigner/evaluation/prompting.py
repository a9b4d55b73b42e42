"""Methods that train nothing: the bare host, the best of five system prompts, a few examples before the question."""

from __future__ import annotations

import random
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from realigner.console import progress
from realigner.evaluation.method_protocol import Fitted, Job, Method, MethodRecord
from realigner.prompts import messages_of

_GENERIC = "any"  # the table of prompts for tones that have none of their own


@cache
def _tables() -> dict[str, list[str]]:
    found = tomllib.loads((files("realigner.evaluation") / "system_prompts.toml").read_text(encoding="utf-8"))
    return {tone: table["prompts"] for tone, table in found.items()}


def system_prompts(tone: str) -> list[str]:
    """The five system prompts for a tone; of a tone that has none of its own, five with its name.

    Example:
        >>> system_prompts("pirate")[0]
        'Answer in a pirate tone.'
    """
    tables = _tables()
    return list(tables[tone]) if tone in tables else [prompt.format(tone=tone) for prompt in tables[_GENERIC]]


@dataclass(frozen=True, kw_only=True)
class Prompting(Method):
    """A method that only adds a system prompt or turns before the question."""

    @contextmanager
    def attached(self, host: Any, tokenizer: Any, folder: Path, record: MethodRecord) -> Iterator[Fitted]:
        yield Fitted(host, tokenizer, system=record.system, history=record.history)


@dataclass(frozen=True, kw_only=True)
class Bare(Prompting):
    """The host as it is."""

    def learn(self, job: Job) -> dict[str, Any]:
        return {}


@dataclass(frozen=True, kw_only=True)
class BestPrompt(Prompting):
    """The system prompt, of the tone's five, whose replies to the questions of ``task.tune`` have the highest score."""

    def learn(self, job: Job) -> dict[str, Any]:
        assert job.given.score is not None  # needed
        rows, prompts = list(job.task.tune), system_prompts(job.task.tone)
        scores = []
        with progress("trying system prompts", len(prompts) * len(rows)) as bar:
            for prompt in prompts:
                fitted = Fitted(job.host, job.tokenizer, system=prompt)
                asked = [row.question if row.messages is None else row.conversation[:-1] for row in rows]
                replies = fitted.generate(asked, job.given.reply_tokens, bar.advance)
                scores.append(float(job.given.score(rows, replies, prompt)))
        tried = dict(zip(prompts, scores, strict=True))
        return {"system": max(tried, key=lambda prompt: tried[prompt]), "scores": tried}


@dataclass(frozen=True, kw_only=True)
class FewShot(Prompting):
    """Rows of ``task.train``, chosen by the seed, as turns before the question.

    Attributes:
        shots: how many.
    """

    shots: int = 3

    def learn(self, job: Job) -> dict[str, Any]:
        rows = random.Random(job.recipe.seed).sample(list(job.task.train), min(self.shots, len(job.task.train)))
        said: list[dict[str, str]] = []
        for row in rows:
            said += [*messages_of(row.question), {"role": "assistant", "content": row.text}]
        return {"history": said, "row_ids": [row.id for row in rows]}
