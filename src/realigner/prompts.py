"""Prompts as tokens: the chat template or the paper's plain form, the same for training, generation and traces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from realigner.errors import RealignerError, UsageError

Prompt = str | Sequence[Mapping[str, str]]
"""A question, or a conversation: turns with ``role`` (system, user, assistant) and ``content``, the last one the user's."""

_PLACEHOLDER = "zxqvj"  # a reply that occurs nowhere else in a chat template

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


def prompt_ids(tokenizer: Any, prompt: Prompt, template: str = "chat", system: str | None = None) -> list[int]:
    """The tokens a host reads before it replies: its chat template, or the question and three spaces for a base model.

    Args:
        tokenizer: the host's.
        prompt: a question or a conversation.
        template: ``"chat"``, or ``"plain"`` for the second form on every host, as in the paper.
        system: a system prompt, put before the conversation.

    Raises:
        UsageError: for an empty prompt, something that is not a turn, or a conversation in the plain form.
        RealignerError: when the host's chat template refuses the conversation (it knows no system role, say).
    """
    return batch_prompt_ids(tokenizer, [prompt], template, system)[0]


def batch_prompt_ids(
    tokenizer: Any, prompts: Sequence[Prompt], template: str = "chat", system: str | None = None
) -> list[list[int]]:
    """`prompt_ids` of many prompts in one call of the tokenizer."""
    conversations = [_turns(prompt, system) for prompt in prompts]
    if template == "chat" and getattr(tokenizer, "chat_template", None):
        texts = [chat_text(tokenizer, turns, add_generation_prompt=True) for turns in conversations]
        return list(tokenizer(texts, add_special_tokens=False)["input_ids"])
    if any(len(turns) > 1 for turns in conversations):
        raise UsageError("prompt: the plain form has no turns and no system prompt; give one question")
    return list(tokenizer([turns[0]["content"] + "   " for turns in conversations])["input_ids"])


def chat_text(tokenizer: Any, turns: Sequence[Mapping[str, str]], **options: Any) -> str:
    """A conversation as the host's chat template writes it.

    Args:
        tokenizer: the host's.
        turns: the conversation.
        options: of ``apply_chat_template``.

    Raises:
        RealignerError: when the template refuses the conversation, or is itself not in order.
    """
    from jinja2 import TemplateSyntaxError

    try:
        text = tokenizer.apply_chat_template([dict(turn) for turn in turns], tokenize=False, **options)
    except TemplateSyntaxError as error:
        raise RealignerError(f"the host's chat template, line {error.lineno}: {' '.join(str(error.message).split())}") from None
    except Exception as error:  # a template raises whatever its author chose
        why = " ".join(str(error).split()) or type(error).__name__
        raise RealignerError(f"the host's chat template refuses the conversation: {why}") from None
    if not isinstance(text, str):
        raise RealignerError("the host's chat template writes no text")
    return text


def _turns(prompt: Prompt, system: str | None) -> list[dict[str, str]]:
    if isinstance(prompt, Mapping) or not isinstance(prompt, Sequence):
        raise UsageError(f"prompt: {prompt!r} is neither a question nor a list of turns (of conversations, give a list)")
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    for turn in turns:
        if (
            not isinstance(turn, Mapping)
            or set(turn) != {"role", "content"}
            or not all(isinstance(value, str) for value in turn.values())
        ):
            raise UsageError(f"prompt: {turn!r} is not a turn; give a dict with role and content, two strings")
    if not turns or not turns[-1]["content"].strip():
        raise UsageError("prompt: it is empty")
    turns = [dict(turn) for turn in turns]
    return turns if system is None else [{"role": "system", "content": system}, *turns]


def end_ids(tokenizer: Any, template: str = "chat") -> list[int]:
    """The token that ends a reply, in a list: the chat template's end-of-turn token, else the tokenizer's end token, if any."""
    if template == "chat" and getattr(tokenizer, "chat_template", None):
        turns = [{"role": "user", "content": "1"}, {"role": "assistant", "content": _PLACEHOLDER}]
        before, found, after = chat_text(tokenizer, turns).rpartition(_PLACEHOLDER)
        if found and before:
            for token in tokenizer(after, add_special_tokens=False)["input_ids"]:
                if token in tokenizer.all_special_ids:
                    return [token]
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
