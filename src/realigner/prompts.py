"""Prompts as tokens: the chat template or the paper's plain form, the same for training, generation and traces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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


def prompt_ids(tokenizer: Any, question: str, template: str = "chat") -> list[int]:
    """The tokens a host reads before it replies: its chat template, or ``question`` and three spaces for a base model.

    Args:
        tokenizer: the host's.
        question: the user's turn.
        template: ``"chat"``, or ``"plain"`` for the second form on every host, as in the paper.
    """
    return batch_prompt_ids(tokenizer, [question], template)[0]


def batch_prompt_ids(tokenizer: Any, questions: Sequence[str], template: str = "chat") -> list[list[int]]:
    """`prompt_ids` of many questions in one call of the tokenizer."""
    if template == "chat" and getattr(tokenizer, "chat_template", None):
        turns = [[{"role": "user", "content": question}] for question in questions]
        texts = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return list(tokenizer(texts, add_special_tokens=False)["input_ids"])
    return list(tokenizer([question + "   " for question in questions])["input_ids"])


def end_ids(tokenizer: Any, template: str = "chat") -> list[int]:
    """The token that ends a reply, in a list: the chat template's end-of-turn token, else the tokenizer's end token, if any."""
    if template == "chat" and getattr(tokenizer, "chat_template", None):
        turns = [{"role": "user", "content": "1"}, {"role": "assistant", "content": _PLACEHOLDER}]
        before, found, after = tokenizer.apply_chat_template(turns, tokenize=False).rpartition(_PLACEHOLDER)
        if found and before:
            for token in tokenizer(after, add_special_tokens=False)["input_ids"]:
                if token in tokenizer.all_special_ids:
                    return [token]
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
