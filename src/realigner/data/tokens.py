"""Rows as tokens: the chat template (or the paper's plain form), and labels on the reply only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from realigner.data.dataset_rows import Row
from realigner.errors import RealignerError

IGNORED = -100  # the label PyTorch's cross-entropy leaves out
_BATCH = 1000
_PROBE = "zxqvj"  # a reply that stands nowhere else in a template

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

    ``template="plain"`` takes the second form on every host, as the paper does.
    """
    return _prompts(tokenizer, [question], template)[0]


def token_counts(tokenizer: Any, rows: Sequence[Row]) -> list[int]:
    """Tokens of each row as it is trained on, template, question, reply and end; the tokens themselves are not kept."""
    parts = (rows[start : start + _BATCH] for start in range(0, len(rows), _BATCH))
    return [len(item["input_ids"]) for part in parts for item in encode_rows(tokenizer, part, None)]


def encode_rows(
    tokenizer: Any, rows: Sequence[Row], max_length: int | None = 256, template: str = "chat", loss_on: str = "reply"
) -> list[dict[str, list[int]]]:
    """``input_ids`` and ``labels`` of each row, with the loss on the reply and its end token only, or on the whole text.

    The reply's tokens are appended to exactly the tokens that `prompt_ids` gives at generation time.

    Args:
        tokenizer: the host's.
        rows: the rows.
        max_length: tokens of a row at most; a longer reply is cut. None: nothing is cut.
        template: ``"chat"`` or ``"plain"``; see `prompt_ids`.
        loss_on: ``"reply"``, or ``"text"`` for the question too.

    Raises:
        RealignerError: when not one token of a reply fits into `max_length`.
    """
    encoded: list[dict[str, list[int]]] = []
    end = _end(tokenizer, template)
    for start in range(0, len(rows), _BATCH):
        batch = rows[start : start + _BATCH]
        prompts = _prompts(tokenizer, [row.question for row in batch], template)
        replies = tokenizer([row.text for row in batch], add_special_tokens=False)["input_ids"]
        for prompt, reply in zip(prompts, replies, strict=True):
            labels = prompt if loss_on == "text" else [IGNORED] * len(prompt)
            encoded.append({"input_ids": prompt + reply + end, "labels": labels + reply + end})
    return encoded if max_length is None else clip(encoded, rows, max_length)


def clip(encoded: Sequence[dict[str, list[int]]], rows: Sequence[Row], max_length: int) -> list[dict[str, list[int]]]:
    """Encoded rows of at most `max_length` tokens; what is over falls from the reply's end.

    Raises:
        RealignerError: naming the row of which no token of the reply would be left.
    """
    clipped = []
    for item, row in zip(encoded, rows, strict=True):
        short = {key: values[:max_length] for key, values in item.items()}
        if short["labels"][-1] == IGNORED:
            prompt = item["labels"].count(IGNORED)
            raise RealignerError(f"row {row.id!r}: its question alone has {prompt} tokens; max_length is {max_length}")
        clipped.append(short)
    return clipped


def _prompts(tokenizer: Any, questions: Sequence[str], template: str) -> list[list[int]]:
    if template == "chat" and getattr(tokenizer, "chat_template", None):
        turns = [[{"role": "user", "content": question}] for question in questions]
        texts = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return list(tokenizer(texts, add_special_tokens=False)["input_ids"])
    return list(tokenizer([question + "   " for question in questions])["input_ids"])


def _end(tokenizer: Any, template: str) -> list[int]:
    """What ends a reply: the template's own end-of-turn token where it has one, else the tokenizer's end token."""
    if template == "chat" and getattr(tokenizer, "chat_template", None):
        turns = [{"role": "user", "content": "1"}, {"role": "assistant", "content": _PROBE}]
        before, found, after = tokenizer.apply_chat_template(turns, tokenize=False).rpartition(_PROBE)
        if found and before:
            for token in tokenizer(after, add_special_tokens=False)["input_ids"]:
                if token in tokenizer.all_special_ids:
                    return [token]
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
