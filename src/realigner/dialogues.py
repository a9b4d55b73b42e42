"""Prompts files, and dialogues: questions asked one after the other, each answered by the model itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from realigner.errors import RealignerError, UsageError
from realigner.files import decoded, read_bytes, value_of
from realigner.prompts import Prompt

_Reply = TypeVar("_Reply", bound=str)
ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Dialogue:
    """Questions that are asked one after the other, each answered by the model in the light of what was said before.

    Not a conversation with two messages of the user in a row: that is a prompt like any other, which gets one reply.

    Attributes:
        questions: one or more, none of them empty.

    Raises:
        UsageError: for no question, or an empty one.

    Example:
        >>> Dialogue(("Who was Ada Lovelace?", "When was she born?")).questions[-1]
        'When was she born?'
    """

    questions: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.questions or not all(isinstance(question, str) and question.strip() for question in self.questions):
            raise UsageError("dialogue: give one question or more, none of them empty")


Asked = Prompt | Dialogue
"""What a prompts file holds."""


def read_prompts(path: str | Path) -> list[Asked]:
    """The prompts of a file.

    A text file has a prompt a line. A ``.jsonl`` file has a JSON value a line: a string (a question), ``{"prompt": "..."}``,
    ``{"messages": [...]}`` (a conversation whose last message is the user's or a tool's) or ``{"turns": ["...", "..."]}`` (a
    `Dialogue`). Empty lines are left out.

    Args:
        path: the file, 64 MiB at most.

    Raises:
        RealignerError: when it cannot be read or has no prompt, naming the line and the key that is not what it should be.

    Example:
        >>> read_prompts("prompts.jsonl")  # doctest: +SKIP
        ['Why?', [{'role': 'user', 'content': 'Hi'}], Dialogue(questions=('Who?', 'When?'))]
    """
    data, asked = read_bytes(path), list[Asked]()
    if Path(path).suffix.lower() == ".jsonl":
        for number, line in enumerate(data.split(b"\n"), start=1):
            if line.strip():
                asked.append(prompt_of(value_of(line, path, number), f"{path}:{number}"))
    else:
        asked += [line.strip() for line in decoded(data, path).splitlines() if line.strip()]
    if not asked:
        raise RealignerError(f"{path}: it has no prompt; write one a line")
    return asked


def prompt_of(value: Any, where: str) -> Asked:
    """The prompt that a JSON value is, as lines of a prompts file have it.

    Raises:
        RealignerError: naming `where` and the key that is not what it should be.
    """
    if isinstance(value, str):
        value = {"prompt": value}
    if not isinstance(value, dict) or len(value) != 1 or not value.keys() <= {"prompt", "messages", "turns"}:
        raise RealignerError(f"{where}: not a prompt; give a string, or an object with one of prompt, messages, turns")
    ((key, given),) = value.items()
    if key == "prompt":
        if not isinstance(given, str) or not given.strip():
            raise RealignerError(f"{where}: key 'prompt': not a text, or an empty one")
        return given
    if not isinstance(given, list) or not given:
        raise RealignerError(f"{where}: key {key!r}: not a list with something in it")
    if key == "turns":
        for nth, question in enumerate(given, start=1):
            if not isinstance(question, str) or not question.strip():
                raise RealignerError(f"{where}: key 'turns': question {nth} is not a text, or an empty one")
        return Dialogue(tuple(given))
    for nth, message in enumerate(given, start=1):
        if fault := _fault_of(message):
            raise RealignerError(f"{where}: key 'messages': message {nth}: {fault}")
    if given[-1]["role"] not in ("user", "tool") or not given[-1]["content"].strip():
        raise RealignerError(f"{where}: key 'messages': the last message is not the user's (or a tool's), or it is empty")
    return given


def _fault_of(message: Any) -> str:
    """What is wrong with a message, or nothing."""
    if not isinstance(message, dict):
        return "not an object with role and content"
    if missing := [key for key in ("role", "content") if not isinstance(message.get(key), str)]:
        return f"{missing[0]!r} is missing or not a text"
    if message["role"] not in ROLES:
        return f"role {message['role'][:80]!r} is none of {', '.join(ROLES)}"
    thought = message.get("reasoning_content", "")
    if not isinstance(thought, str) or (thought and message["role"] != "assistant"):
        return "'reasoning_content' is not a text, or not the assistant's"
    odd = sorted(message.keys() - {"role", "content", "reasoning_content"})
    return f"{odd[0][:80]!r} is unknown" if odd else ""


def play(prompts: Sequence[Asked], answer: Callable[[list[Prompt]], Sequence[str]]) -> list[Prompt]:
    """The prompts with each dialogue replaced by its conversation up to the last question, which is not answered here.

    Args:
        prompts: dialogues advance together, a question at a time; others stay as they are.
        answer: gives the replies to conversations.

    Example:
        >>> play(["Why?", Dialogue(("Who?", "When?"))], lambda asked: ["Ada."] * len(asked))[1]
        [{'role': 'user', 'content': 'Who?'}, {'role': 'assistant', 'content': 'Ada.'}, {'role': 'user', 'content': 'When?'}]
    """
    return _played(prompts, answer)[0]


def all_replies(prompts: Sequence[Asked], answer: Callable[[list[Prompt]], Sequence[_Reply]]) -> list[list[_Reply]]:
    """The replies to each prompt: to every question of a dialogue, else one.

    Args:
        prompts, answer: as for `play`.

    Example:
        >>> all_replies(["Why?", Dialogue(("Who?", "When?"))], lambda asked: [f"{len(said)}" for said in asked])
        [['4'], ['1', '3']]
    """
    conversations, earlier = _played(prompts, answer)
    return [[*before, last] for before, last in zip(earlier, answer(conversations), strict=True)]


def _played(
    prompts: Sequence[Asked], answer: Callable[[list[Prompt]], Sequence[_Reply]]
) -> tuple[list[Prompt], list[list[_Reply]]]:
    """The conversations up to each prompt's last question, and the replies in them that were given here."""
    said: list[Any] = [
        [{"role": "user", "content": prompt.questions[0]}] if isinstance(prompt, Dialogue) else prompt for prompt in prompts
    ]
    replies: list[list[_Reply]] = [[] for _ in prompts]
    dialogues = {at: prompt.questions for at, prompt in enumerate(prompts) if isinstance(prompt, Dialogue)}
    for nth in range(1, max(map(len, dialogues.values()), default=0)):
        going = [at for at, questions in dialogues.items() if len(questions) > nth]
        for at, reply in zip(going, answer([said[at] for at in going]), strict=True):
            answered, asked = {"role": "assistant", "content": str(reply)}, {"role": "user", "content": dialogues[at][nth]}
            said[at] = [*said[at], answered, asked]
            replies[at].append(reply)
    return said, replies


def questions_in(prompt: Asked) -> int:
    """How many replies a prompt gets."""
    return len(prompt.questions) if isinstance(prompt, Dialogue) else 1


def readable(prompt: Asked) -> str:
    """A prompt as text: a question as it is; of a conversation or a dialogue, a line a turn, which begins with its role.

    Example:
        >>> print(readable([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]))
        system: Be brief.
        user: Why?
    """
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, Dialogue):
        return "\n".join(f"user: {' '.join(question.split())}" for question in prompt.questions)
    return "\n".join(f"{turn['role']}: {' '.join(turn['content'].split())}" for turn in prompt)


def spoken(text: str) -> list[tuple[str, str]]:
    """The role and the text of each turn, of what `readable` gives.

    Example:
        >>> spoken(readable(Dialogue(("Who?", "When?")))), spoken("Why?")
        ([('user', 'Who?'), ('user', 'When?')], [('user', 'Why?')])
    """
    turns = [line.partition(": ") for line in text.split("\n")]
    return [(role, said) for role, _, said in turns] if all(role in ROLES for role, _, _ in turns) else [("user", text)]


def written(prompt: Asked) -> Any:
    """A prompt as a line of a prompts file holds it."""
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, Dialogue):
        return {"turns": list(prompt.questions)}
    return {"messages": [dict(turn) for turn in prompt]}
