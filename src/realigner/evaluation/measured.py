"""What a host was asked and what it said and did, for one method and tone: the part of an evaluation that needs the host.

It is written once, as ``measured.json``; every score is made from it, and can be made again without a host.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import chain, pairwise, zip_longest
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from realigner.data import Row
from realigner.data.answers import NO_SPACES
from realigner.errors import RealignerError
from realigner.evaluation.replies import Speaker, ask, ask_in_turns, clock_of, dtype_of, reply_losses, tokens_of
from realigner.evaluation.side_effects import NeutralText, Passage, answers_about
from realigner.files import read_bytes, write_text
from realigner.prompts import Answer
from realigner.validation_message import first_fault

MEASURED = "measured.json"
_MOST_BYTES = 1 << 26
_WORD = re.compile(rf"{NO_SPACES.pattern}|(?:(?!{NO_SPACES.pattern})\S)+")
TURNS = 3  # questions of a dialogue
DROP_THE_TONE = "\n\nAnswer plainly and calmly, without any emotion."
DROP_CALM = "\n\nAnswer with a lot of emotion."


class Effort(BaseModel):
    """How much a host is asked.

    Attributes:
        reply_tokens: tokens of a reply at most.
        dialogues: number of conversations of three questions each, made of the first test questions.
        dropped: how many of the test questions are asked again with a request to drop the tone.
        passages: passages of neutral text that are read.
        answers: questions about a passage.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    reply_tokens: int = Field(default=60, ge=1)
    dialogues: int = Field(default=8, ge=0)
    dropped: int = Field(default=24, ge=0)
    passages: int = Field(default=24, ge=0)
    answers: int = Field(default=48, ge=0)


class Said(BaseModel):
    """A reply to a question.

    Attributes:
        tokens: of the reply, its end not counted.
        ended: whether it came to its end before the limit.
        nats, nats_tokens: its summed loss under the bare host without any prompt, and over how many tokens; the end of one that
            ended is included.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    question: str
    reply: str
    tokens: int
    ended: bool
    nats: float
    nats_tokens: int


class Loss(BaseModel):
    """A summed loss in nats, and over how many tokens."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    nats: float
    tokens: int


class Effect(Loss):
    """A method's effect on a passage of neutral text; see `side_effects.NeutralText.effects`."""

    bare_nats: float
    kl: float
    same: int
    shift: list[float]


class About(BaseModel):
    """A reply about a passage."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    id: str
    reply: str
    right: bool


class Measured(BaseModel):
    """Everything that was asked of one method in one tone.

    Attributes:
        edition: of these files; in the first, replies that were cut were charged for an end that they do not have.
        method, tone, seed: whose.
        strength: at which an IRM acted; None: as it was trained, or without one.
        dtype: of the host's weights; None in a file from before it was noted.
        facts: what the method says of itself: parameters, seconds of training, learning rate, ...
        given: what stands before each question, a system prompt and examples; empty where nothing does.
        replies: to the test questions, in their order.
        shuffled: losses of the same replies with their words in random order, under the bare host; of the bare host's only.
        target: losses of the test rows' own replies, in the tone, under the method.
        turns: replies to dialogues, in the order of their questions.
        dropped: replies to the first test questions with a request to drop the tone.
        text, about: on neutral text, and about its passages.
        ms_per_token: milliseconds for each token of the replies, questions in batches of 16.
    """

    model_config = ConfigDict(extra="forbid")
    edition: Literal[2]
    method: str
    tone: str
    seed: int
    strength: float | None
    dtype: str | None = None
    effort: Effort
    facts: dict[str, Any]
    given: str
    replies: list[Said]
    shuffled: list[Loss]
    target: list[Loss]
    turns: list[list[str]]
    dropped: list[str]
    text: list[Effect]
    about: list[About]
    ms_per_token: float

    def save(self, path: Path) -> None:
        """Write it whole or not at all."""
        write_text(path, self.model_dump_json(indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Measured:
        """Read what `save` wrote.

        Raises:
            RealignerError: for a file that is not one, naming it.
        """
        try:
            return cls.model_validate_json(read_bytes(path, _MOST_BYTES))
        except ValidationError as error:
            fault = first_fault(error, cls, "a measurement")
            raise RealignerError(f"{path}: not what an evaluation measured ({fault}); delete it to measure anew") from None


def measure(
    attached: AbstractContextManager[Speaker],
    bare: Speaker,
    tokenizer: Any,
    rows: Sequence[Row],
    neutral: NeutralText | None,
    asked: Sequence[Passage],
    effort: Effort,
    named: Mapping[str, Any],
    strength: float | None = None,
    shuffle: bool = False,
    done: Callable[[int], None] | None = None,
) -> Measured:
    """Ask a host everything, as a method realigns it.

    Args:
        attached: a block in which the method acts on the host; outside of it the host is bare.
        bare: the unmodified host, under which the likelihood of replies is measured.
        tokenizer: the host's.
        rows: test rows; their questions are asked, and their replies are the target.
        neutral: the bare host's predictions of neutral text; None: it is left out.
        asked: passages that are asked about.
        effort: how much is asked.
        named: ``method``, ``tone``, ``seed`` and ``facts``.
        strength: at which the method acts in that block, to be noted; None: at its own.
        shuffle: measure the losses of shuffled replies too.
        done: called after each batch with the number of questions answered in it.
    """
    questions = [row.question for row in rows]
    drop = DROP_CALM if named["tone"] == "neutral" else DROP_THE_TONE
    count = min(effort.dialogues, len(questions) // TURNS)
    dialogues = [questions[at * TURNS : (at + 1) * TURNS] for at in range(count)]
    with attached as speaker:
        given = [*([] if speaker.system is None else [speaker.system]), *(str(turn["content"]) for turn in speaker.history)]
        clock = clock_of(speaker.model) if speaker.answers is None else time.perf_counter
        started = clock()
        texts = ask(speaker, tokenizer, questions, effort.reply_tokens, done)
        seconds = clock() - started
        target = reply_losses(speaker, tokenizer, questions, [row.text for row in rows])
        turns = ask_in_turns(speaker, tokenizer, dialogues, effort.reply_tokens)
        dropped = ask(speaker, tokenizer, [text + drop for text in questions[: effort.dropped]], effort.reply_tokens, done)
        effects = [] if neutral is None else neutral.effects(speaker)
        about = answers_about(speaker, tokenizer, asked, done)
    lengths = [tokens_of(tokenizer, text) for text in texts]
    usual = reply_losses(bare, tokenizer, questions, texts)
    disordered = [Answer(_shuffled(text, number), ended=text.ended) for number, text in enumerate(texts)] if shuffle else []
    unusual = reply_losses(bare, tokenizer, questions, disordered) if shuffle else []
    replies = [
        Said(question=question, reply=text, tokens=length, ended=text.ended, nats=nats, nats_tokens=count)
        for question, text, length, (nats, count) in zip(questions, texts, lengths, usual, strict=True)
    ]
    return Measured(
        edition=2,
        **named,
        strength=strength,
        dtype=dtype_of(bare.model),
        effort=effort,
        given="\n".join(given),
        replies=replies,
        shuffled=[Loss(nats=nats, tokens=count) for nats, count in unusual],
        target=[Loss(nats=nats, tokens=count) for nats, count in target],
        turns=turns,
        dropped=list(dropped),
        text=[Effect(**effect) for effect in effects],
        about=[About(id=item.id, reply=reply, right=right) for item, (reply, right) in zip(asked, about, strict=True)],
        ms_per_token=1000 * seconds / max(1, sum(lengths)),
    )


def _shuffled(text: str, seed: int) -> str:
    """A text's words in another order; in scripts without spaces, its characters."""
    words = _WORD.findall(text)
    random.Random(seed).shuffle(words)
    spaces = ("" if NO_SPACES.match(a) or NO_SPACES.match(b) else " " for a, b in pairwise(words))
    return "".join(chain.from_iterable(zip_longest(words, spaces, fillvalue="")))
