"""The forms in which people keep conversations, read as messages: TRL's columns, ShareGPT's, Alpaca's."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

Messages = list[dict[str, str]]  # ``role``, ``content``, and of an assistant perhaps ``reasoning_content``

_ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("tool", "function", "observation", "ipython"), "tool"),
}
_CALLS = ("function_call", "tool_call", "tool_calls")  # roles and keys of a message in which the assistant calls a tool
_THOUGHTS = ("reasoning_content", "thinking", "reasoning")
_BESIDE_TEXT = ("tools", "images")  # columns of what a template would render and a row cannot hold
_LABELS = {**dict.fromkeys(("true", "1", "1.0"), True), **dict.fromkeys(("false", "0", "0.0"), False)}
_JSON_MESSAGES = re.compile(r'\s*\[\s*\{\s*"(?:role|content|from|value)"\s*:')


class UnfitError(Exception):
    """Why a record is no row."""


@dataclass(frozen=True)
class Form:
    """One form.

    Attributes:
        needed: its fields, and the columns where they are unless they are mapped.
        further: fields that may be missing.
        read: the messages of a record, given its values by field; None: the record is a question and a reply.
    """

    needed: Mapping[str, str]
    further: tuple[str, ...] = ()
    read: Callable[[Mapping[str, Any]], Messages] | None = None

    @property
    def columns(self) -> dict[str, str]:
        """Field -> the column where it is unless it is mapped."""
        return {**self.needed, **{key: key for key in self.further}}


def _conversation(values: Mapping[str, Any]) -> Messages:
    messages = _messages("messages", values.get("messages"))
    system = values.get("system")
    if isinstance(system, str) and system.strip() and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    return messages


def _prompt_and_completion(values: Mapping[str, Any]) -> Messages:
    if not _is_wanted(values.get("label")):
        raise UnfitError("'label' is false: a completion that is not to be learned")
    prompt = _turns("prompt", values.get("prompt"), "user")
    if prompt[-1]["role"] == "assistant":
        raise UnfitError("'prompt' ends in the middle of a reply, which the completion goes on with")
    return prompt + _turns("completion", values.get("completion"), "assistant")


def _is_wanted(label: Any) -> bool:
    """Whether a label, as any format writes it, calls a completion good; one that is missing does."""
    said = str(label).strip().casefold()
    if label is None or label != label or not said:  # NaN is how pandas writes what is missing
        return True
    if said not in _LABELS:
        raise UnfitError(f"'label' is {str(label)[:40]!r}, neither true nor false")
    return _LABELS[said]


def _instruction_and_output(values: Mapping[str, Any]) -> Messages:
    system, *asked = (_string(key, values.get(key)) for key in ("system", "instruction", "input"))
    messages = [{"role": "system", "content": system}] if system.strip() else []
    history = values.get("history")
    for number, pair in enumerate(_list("history", history) if history else (), start=1):
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise UnfitError(f"'history', item {number}, is not a question and a reply")
        messages += [{"role": role, "content": text} for role, text in zip(("user", "assistant"), pair, strict=True)]
    question = "\n".join(part.strip() for part in asked if part.strip())
    output = _string("output", values.get("output"))
    for key, text in (("instruction", question), ("output", output)):
        if not text.strip():
            raise UnfitError(f"{key!r} is {'missing' if values.get(key) is None else 'empty'}")
    return [*messages, {"role": "user", "content": question}, {"role": "assistant", "content": output}]


_BESIDE_MESSAGES = ("system", *_BESIDE_TEXT)
FORMS = {
    "question-text": Form({"question": "question", "text": "text"}),
    "messages": Form({"messages": "messages"}, _BESIDE_MESSAGES, _conversation),
    "sharegpt": Form({"messages": "conversations"}, _BESIDE_MESSAGES, _conversation),
    "prompt-completion": Form(
        {"prompt": "prompt", "completion": "completion"}, ("label", *_BESIDE_TEXT), _prompt_and_completion
    ),
    "alpaca": Form({"instruction": "instruction", "output": "output"}, ("input", "system", "history"), _instruction_and_output),
}
FIELDS = tuple(dict.fromkeys(key for form in FORMS.values() for key in form.columns))


def fitting(columns: Collection[str], mapping: Mapping[str, str], names: Collection[str] = tuple(FORMS)) -> list[str]:
    """Those of some forms whose needed columns are there; of forms that need the same columns the first."""
    found: dict[tuple[str, ...], str] = {}
    for name in names:
        needed = tuple(mapping.get(key, column) for key, column in FORMS[name].needed.items())
        if set(needed) <= set(columns):
            found.setdefault(needed, name)
    return list(found.values())


def messages_of(form: Form, values: Mapping[str, Any]) -> Messages:
    """The messages of a record as they are written in it, roles by the names that a row has.

    Raises:
        UnfitError: for what is no conversation of texts.
    """
    assert form.read is not None
    for key in _BESIDE_TEXT:
        if values.get(key) not in (None, "", "[]", [], {}):
            raise UnfitError(f"has {key}, which a row cannot hold")
    return form.read(values)


def _turns(key: str, value: Any, role: str) -> Messages:
    """Messages, or a text as one of `role`."""
    if not isinstance(value, str) or _JSON_MESSAGES.match(value):
        return _messages(key, value)
    if not value.strip():
        raise UnfitError(f"{key!r} is empty")
    return [{"role": role, "content": value}]


def _messages(key: str, value: Any) -> Messages:
    if isinstance(value, Mapping):  # how `datasets` writes a list of objects: an object of lists
        columns = [column for column in value.values() if isinstance(column, list)]
        if len({len(column) for column in columns}) == 1 and len(columns) == len(value):
            value = [dict(zip(value, turn, strict=True)) for turn in zip(*columns, strict=True)]
    turns = _list(key, value)
    messages = [_message(turn, f"{key!r}, message {number}") for number, turn in enumerate(turns, start=1)]
    if not messages:
        raise UnfitError(f"{key!r} is empty")
    if turns[-1].get("weight") == 0:  # as OpenAI's fine-tuning has it
        raise UnfitError(f"{key!r}: the last message has weight 0: a reply that is not to be learned")
    return messages


def _message(turn: Any, where: str) -> dict[str, str]:
    if not isinstance(turn, Mapping):
        raise UnfitError(f"{where}, is not an object but {type(turn).__name__}")
    said_by = turn.get("from") if turn.get("role") is None else turn["role"]
    name = said_by.strip().casefold() if isinstance(said_by, str) else ""
    if name in _CALLS or any(turn.get(key) for key in _CALLS):
        raise UnfitError(f"{where}, calls a tool, which a row cannot hold")
    if name not in _ROLES:
        shown = f"its role {said_by[:40]!r} is not known" if isinstance(said_by, str) else "its role is missing"
        raise UnfitError(f"{where}: {shown}; known are {', '.join(_ROLES)}")
    message = {"role": _ROLES[name], "content": _content(turn, where)}
    thought = next((turn[key] for key in _THOUGHTS if turn.get(key)), "")
    if not isinstance(thought, str):
        raise UnfitError(f"{where}: its thought is not a string but {type(thought).__name__}")
    if thought and message["role"] != "assistant":
        raise UnfitError(f"{where}: has a thought and is not the assistant's")
    return message | ({"reasoning_content": thought} if thought.strip() else {})


def _content(turn: Mapping[str, Any], where: str) -> str:
    content = turn.get("value") if turn.get("content") is None else turn["content"]
    if isinstance(content, str):
        return content
    if content is None:
        raise UnfitError(f"{where}: has no content")
    if not isinstance(content, list):
        raise UnfitError(f"{where}: its content is not a string but {type(content).__name__}")
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, Mapping) else part
        kind = part.get("type", "text") if isinstance(part, Mapping) else "text"
        if kind != "text" or not isinstance(text, str):
            raise UnfitError(f"{where}: has a part that is no text ({str(kind)[:40]})")
        texts.append(text)
    return "".join(texts)  # as templates write them


def _list(key: str, value: Any) -> list[Any]:
    """A list, or a string that holds one as JSON, as CSV files do."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise UnfitError(f"{key!r} is {'a string that is no JSON list' if value.strip() else 'empty'}") from None
    if value is None:
        raise UnfitError(f"{key!r} is missing")
    if not isinstance(value, list):
        raise UnfitError(f"{key!r} is not a list but {type(value).__name__}")
    return value


def _string(key: str, value: Any) -> str:
    """A text that may be missing."""
    if value is None or value != value:  # NaN is how pandas writes what is missing
        return ""
    if not isinstance(value, str):
        raise UnfitError(f"{key!r} is not a string but {type(value).__name__}")
    return value
