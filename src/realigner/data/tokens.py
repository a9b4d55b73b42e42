"""Rows as tokens: the chat template (or the paper's plain form), and labels on the reply only."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from realigner.data.rows import Row
from realigner.errors import RealignerError

IGNORED = -100  # the label PyTorch's cross-entropy leaves out

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


def prompt_ids(tokenizer: Any, question: str) -> list[int]:
    """The tokens a host reads before it replies: its chat template, or ``question`` and three spaces for a base model."""
    if getattr(tokenizer, "chat_template", None):
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    return list(tokenizer(question + "   ")["input_ids"])


def encode_row(tokenizer: Any, row: Row, max_length: int = 256) -> dict[str, list[int]]:
    """``input_ids`` and ``labels`` of one row, with the loss on the reply and its end token only.

    The reply's tokens are appended to exactly the tokens that `prompt_ids` gives at generation time.

    Raises:
        RealignerError: when not one token of the reply fits into `max_length`.
    """
    prompt = prompt_ids(tokenizer, row.question)
    reply = list(tokenizer(row.text, add_special_tokens=False)["input_ids"]) + _end(tokenizer, row)
    if len(prompt) >= max_length:
        raise RealignerError(f"row {row.id!r}: its question alone has {len(prompt)} tokens; max_length is {max_length}")
    reply = reply[: max_length - len(prompt)]
    return {"input_ids": prompt + reply, "labels": [IGNORED] * len(prompt) + reply}


def encode_rows(tokenizer: Any, rows: Iterable[Row], max_length: int = 256) -> list[dict[str, list[int]]]:
    """`encode_row` for each row."""
    return [encode_row(tokenizer, row, max_length) for row in rows]


def _end(tokenizer: Any, row: Row) -> list[int]:
    """What ends a reply: the template's own end-of-turn token where it has one, else the tokenizer's end token."""
    if getattr(tokenizer, "chat_template", None):
        turns = [{"role": "user", "content": row.question}, {"role": "assistant", "content": row.text}]
        before, found, after = tokenizer.apply_chat_template(turns, tokenize=False).rpartition(row.text)
        if found and before:
            for token in tokenizer(after, add_special_tokens=False)["input_ids"]:
                if token in tokenizer.all_special_ids:
                    return [token]
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
