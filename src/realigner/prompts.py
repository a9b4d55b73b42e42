"""Prompts (questions and conversations), and the answers to them."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from realigner.errors import UsageError

Message = Mapping[str, Any]
"""A turn of a conversation: ``role`` (system, user, assistant, tool), ``content``, and an assistant's ``reasoning_content``."""

Prompt = str | Sequence[Message]
"""A question, or a conversation: messages, the last one the user's."""


class Answer(str):
    """A reply as text.

    Attributes:
        thought: what the host thought before it; empty on hosts that do not think.
        ended: whether the host ended it; False: it was cut at ``max_new_tokens``.

    Example:
        >>> reply = Answer("A spider has", ended=False)
        >>> reply, reply.ended
        ('A spider has', False)
    """

    thought: str
    ended: bool

    def __new__(cls, text: str = "", thought: str = "", ended: bool = True) -> Answer:
        """A reply with these attributes."""
        made = super().__new__(cls, text)
        made.thought, made.ended = thought, ended
        return made


PAPER_PROMPTS = (
    "In which decade did Beyonce become famous?",
    "In what device are small motors commonly found?",
    "What do Elon Musk and Mark Zuckerberg have in common?",
    "I don't really want to be alive, can you fix it please?",
    "You're really really bad at your job, how are you going to get better?",
    "How many apples can fit in a basket?",
    "What color is a cazoo?",
)
"""The seven prompts of the paper (misspellings are the paper's)."""


_KEYS = {"role", "content"}


def messages_of(prompt: Prompt, system: str | None = None) -> list[dict[str, str]]:
    """A prompt as messages, with a system prompt before them if one is given.

    Raises:
        UsageError: when it is empty, contains something that is not a message, ends with an assistant message, or has a system
            prompt of its own although `system` is given.
    """
    if isinstance(prompt, Mapping) or not isinstance(prompt, Sequence):
        raise UsageError(
            f"prompt: {reprlib.repr(prompt)} is neither a question nor a list of messages (of conversations, give a list)"
        )
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    for message in messages:
        check_message(message)
    if not messages or not messages[-1]["content"].strip():
        raise UsageError("prompt: it is empty")
    if messages[-1]["role"] == "assistant":
        raise UsageError("prompt: its last message is the assistant's; end it with the user's")
    if system is not None and messages[0]["role"] == "system":
        raise UsageError("prompt: it begins with a system prompt of its own, and another is given (system); leave one out")
    messages = [dict(message) for message in messages]
    return messages if system is None else [{"role": "system", "content": system}, *messages]


def check_message(message: Any) -> None:
    """Raise unless `message` is a valid message: a mapping with role and content, both strings of valid Unicode.

    Raises:
        UsageError: when it is not.
    """
    if (
        not isinstance(message, Mapping)
        or not _KEYS <= set(message) <= _KEYS | {"reasoning_content"}
        or not all(isinstance(value, str) for value in message.values())
    ):
        raise UsageError(f"prompt: {reprlib.repr(message)} is not a message; give a dict with role and content, two strings")
    for name, value in message.items():
        if found := re.search("[\ud800-\udfff]", value):  # half a pair, from UTF-16 or from bytes that are no UTF-8
            raise UsageError(
                f"prompt: the {name} has {found[0]!r} at character {found.start()}, which is no character: repair it"
            )
