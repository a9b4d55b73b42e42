"""The row, and reading rows from JSONL with errors that name the file, the line and the key."""

from __future__ import annotations

import codecs
import hashlib
from collections.abc import Iterator, Sequence
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    StringConstraints,
    ValidationError,
    model_serializer,
    model_validator,
)

from realigner.data.words import WORD
from realigner.errors import RealignerError, UsageError
from realigner.files import Artifact, parsed
from realigner.thoughts import reply_of
from realigner.validation_message import first_fault

TONES = ("anger", "sadness", "neutral")  # the tones of the authored set
EVERY_TONE = "all"  # asks for rows of every tone

_LONGEST = 100_000  # characters of a field
LONGEST_LINE = 1 << 20  # bytes of a line
MOST_MESSAGES = 1000  # of a conversation
_NAMED = 4  # tones in a label

_Text = Annotated[str, StringConstraints(min_length=1, max_length=_LONGEST, strip_whitespace=True)]


class Message(BaseModel):
    """One turn of a conversation, as chat templates read it.

    Attributes:
        role: ``system``, ``user``, ``assistant`` or ``tool``.
        content: the text, 100,000 characters at most.
        reasoning_content: what an assistant thought before it replied; only templates of hosts that think write it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    role: Literal["system", "user", "assistant", "tool"]
    content: Annotated[str, StringConstraints(max_length=_LONGEST)]
    reasoning_content: Annotated[str, StringConstraints(max_length=_LONGEST)] | None = None

    @model_validator(mode="after")
    def _thought_by_assistant(self) -> Message:
        if self.reasoning_content is not None and self.role != "assistant":
            raise ValueError("only an assistant's message has reasoning_content")
        return self

    @model_serializer(mode="wrap")
    def _without_none(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in handler(self).items() if value is not None}


class Row(BaseModel):
    """One example of a tone: a question and its reply, or a conversation that ends in one.

    A conversation is given as `messages` in place of `question` and `text`, which are then its last question and reply. A field
    has 100,000 characters at most, a conversation 1,000 messages.

    Attributes:
        id: unique within a file.
        group: topic or article; splits are made by it, never by row.
        question: what a person asks.
        answer: the plain fact; empty where unknown (imported data often has none).
        text: the reply in the tone, holding the fact; a thought before it is not part of it.
        tone: the tone's name.
        source: where the row comes from, e.g. ``authored`` or ``squad``.
        messages: the conversation, a reply of the assistant at its end; None: `question` and `text` are all of it.

    Example:
        >>> Row(id="1", group="rivers", question="Where is the Vltava?", answer="Prague", text="In Prague, obviously!",
        ...     tone="anger", source="authored").tone
        'anger'
        >>> turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "What do you want now?"}]
        >>> Row(id="2", group="greetings", messages=turns, tone="anger", source="chats").text
        'What do you want now?'
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    id: _Text
    group: _Text
    question: _Text
    answer: Annotated[str, StringConstraints(max_length=_LONGEST, strip_whitespace=True)]
    text: _Text
    tone: _Text
    source: _Text
    messages: Annotated[tuple[Message, ...], Field(strict=False, max_length=MOST_MESSAGES)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _of_conversation(cls, values: Any) -> Any:
        """Fill in `question` and `text` of a conversation."""
        if not isinstance(values, dict) or values.get("messages") is None:
            return values
        both = sorted({"question", "text"} & set(values))
        if both:
            raise ValueError(f"has messages and {both[0]} too; give one of them")
        if not isinstance(values["messages"], list | tuple):
            raise ValueError("messages: is not a list of turns")
        turns = [turn.model_dump() if isinstance(turn, Message) else turn for turn in values["messages"]]
        asked = [turn["content"] for turn in turns if _said(turn, "user")]
        if not turns or not _said(turns[-1], "assistant") or not (reply := reply_of(turns[-1]["content"])).strip():
            raise ValueError("messages: the last one is not a reply of the assistant")
        for number, (one, two) in enumerate(pairwise(turns), start=1):
            if _said(one, "assistant") and _said(two, "assistant"):
                raise ValueError(f"messages: {number} and {number + 1} are both replies of the assistant; join them")
        if not asked or not asked[-1].strip():
            raise ValueError("messages: the user asks nothing")
        return {"answer": "", **values, "messages": turns, "question": asked[-1], "text": reply}

    @model_serializer(mode="wrap")
    def _in_one_form(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = handler(self)
        left_out = ("messages",) if self.messages is None else ("question", "text")
        return {key: value for key, value in values.items() if key not in left_out}

    @property
    def conversation(self) -> list[dict[str, str]]:
        """The messages, whichever form the row has."""
        if self.messages is not None:
            return [message.model_dump() for message in self.messages]
        return [{"role": "user", "content": self.question}, {"role": "assistant", "content": self.text}]

    @property
    def before(self) -> str:
        """What is said before the reply, system prompts aside: the question, in a conversation the turns before it too."""
        return self.question if self.messages is None else "\n".join(self._said[:-1])

    @property
    def own(self) -> str:
        """What no other row should repeat: the reply; of a conversation with earlier turns, all that is said."""
        return "\n".join(self._said) if len(self._said) > 2 else self.text

    @property
    def _said(self) -> list[str]:
        return [message.content for message in self.messages or () if message.role != "system"]


def _said(turn: Any, role: str) -> bool:
    return isinstance(turn, dict) and turn.get("role") == role and isinstance(turn.get("content"), str)


def read_rows(path: str | Path, tone: str | None = None) -> list[Row]:
    """Read every row of a JSONL file, or those of one tone (``all``: of every tone, unless one is called so).

    Raises:
        RealignerError: naming the file, the line and the key of the first thing that is wrong.
        UsageError: when the file has no row of `tone`.
    """
    path = Path(path)
    if path.is_dir():
        raise RealignerError(f"{path}: is a folder; give a JSONL file of rows")
    rows: list[Row] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        row = _parse(line, path, number)
        if row.id in seen:
            raise RealignerError(f"{path}:{number}: key 'id': {row.id!r} is taken by line {seen[row.id]}; ids must be unique")
        seen[row.id] = number
        rows.append(row)
    if not rows:
        raise RealignerError(f"{path}: has no rows; write one JSON object a line")
    if tone is None:
        return rows
    chosen = [row for row in rows if row.tone == tone]
    if not chosen and tone == EVERY_TONE:
        return rows
    if not chosen:
        raise UsageError(f"{path}: has no rows of tone {tone!r}; it has {', '.join(sorted({r.tone for r in rows}))}")
    return chosen


def _lines(path: Path) -> Iterator[bytes]:
    """A file's lines without their ends, one in memory at a time."""
    try:
        with path.open("rb") as stream:
            number = 0
            while line := stream.readline(LONGEST_LINE + 1):
                number += 1
                if len(line) > LONGEST_LINE:
                    raise RealignerError(f"{path}:{number}: longer than the {LONGEST_LINE >> 10:,} KiB that a row may take")
                yield line.rstrip(b"\n").removeprefix(codecs.BOM_UTF8 if number == 1 else b"")
    except OSError as error:
        raise RealignerError(f"{path}: cannot be read ({error.strerror or error})") from None


ROWS = Artifact("rows", read_rows)


def authored(tone: str) -> list[Row]:
    """The authored set that comes with the package: 360 questions over 24 topics, replies written one by one.

    Raises:
        UsageError: for a tone it does not have.

    Example:
        >>> len(authored("anger"))
        360
    """
    if tone not in TONES:
        raise UsageError(f"tone: the authored set has no {tone!r}; it has {', '.join(TONES)} (for others, give data a file)")
    return read_rows(Path(str(files("realigner") / "data" / "authored" / f"{tone}.jsonl")))


def tone_label(rows: Sequence[Row]) -> str:
    """The tone of the rows; of several, their names with ``+`` between them (from the fifth on, how many more there are).

    Example:
        >>> tone_label(authored("neutral") + authored("anger"))
        'anger+neutral'
    """
    names = sorted({row.tone for row in rows})
    return "+".join(names if len(names) <= _NAMED else [*names[:_NAMED], f"{len(names) - _NAMED} more"])


def question_key(question: str) -> str:
    """What two spellings of one question have in common: its words, in lower case, without punctuation."""
    return " ".join(WORD.findall(question.casefold())) or question


def rows_hash(rows: Sequence[Row]) -> str:
    """sha256 over the rows in order: which data a run was trained on."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(row.model_dump_json().encode() + b"\n")
    return digest.hexdigest()


def _parse(line: bytes, path: Path, number: int) -> Row:
    value = parsed(line, path, number)
    if not isinstance(value, dict):
        raise RealignerError(f"{path}:{number}: a row is a JSON object, not {type(value).__name__}")
    try:
        return Row.model_validate(value)
    except ValidationError as error:
        raise RealignerError(f"{path}:{number}: {first_fault(error, Row, 'a row')}") from None
