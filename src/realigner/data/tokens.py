"""Rows as tokens: the chat template (or the paper's plain form), and labels on the reply only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from realigner.data.dataset_rows import Row
from realigner.errors import RealignerError
from realigner.prompts import batch_prompt_ids, end_ids

IGNORED = -100  # the label PyTorch's cross-entropy leaves out
_BATCH = 1000


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
    end = end_ids(tokenizer, template)
    for start in range(0, len(rows), _BATCH):
        batch = rows[start : start + _BATCH]
        prompts = batch_prompt_ids(tokenizer, [row.question for row in batch], template)
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
