"""Rows as tokens to train on, and their labels; see `chat_format.ChatFormat`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from realigner.chat_format import IGNORED, ChatFormat
from realigner.data.dataset_rows import Row
from realigner.errors import RealignerError

Example = dict[str, list[int]]  # "input_ids" and "labels", of one length


def token_counts(tokenizer: Any, rows: Sequence[Row], chat_template_kwargs: Mapping[str, Any] | None = None) -> list[int]:
    """Tokens of each row as it is trained on, template and all; the tokens themselves are not kept."""
    return [len(example["input_ids"]) for _, example in encoded(ChatFormat(tokenizer, "chat", chat_template_kwargs), rows)]


def encode_rows(
    tokenizer: Any, rows: Sequence[Row], max_length: int | None = 256, template: str = "chat", loss_on: str = "reply"
) -> list[Example]:
    """``input_ids`` and ``labels`` of each row, with the loss on the reply and its end token only, or on the whole text.

    Args:
        tokenizer: the host's.
        rows: the rows.
        max_length: tokens of a row at most; what is over falls from the end. None: nothing is cut.
        template: ``"chat"`` or ``"plain"``; see `ChatFormat`.
        loss_on: ``"reply"``, ``"assistant"`` or ``"text"``; see `ChatFormat.examples`.

    Raises:
        RealignerError: naming the row, when its conversation cannot be rendered, or no token of its reply is left.
    """
    pairs = list(encoded(ChatFormat(tokenizer, template), rows, loss_on))
    examples = [example for _, example in pairs]
    return examples if max_length is None else clip(examples, [row for row, _ in pairs], max_length)


def encoded(
    chat_format: ChatFormat, rows: Sequence[Row], loss_on: str = "reply", loss_on_thought: bool = False
) -> Iterator[tuple[Row, Example]]:
    """Each row with its example, or its examples one after the other.

    Raises:
        RealignerError: naming the row.
    """
    for row in rows:
        try:
            examples = chat_format.examples(row.conversation, loss_on, loss_on_thought)
        except RealignerError as error:
            raise type(error)(f"row {row.id!r}: {error}") from None
        for example in examples:
            yield row, example


def clip(examples: Sequence[Example], rows: Sequence[Row], max_length: int) -> list[Example]:
    """Examples of at most `max_length` tokens, each with its row; what is over falls from the end.

    Raises:
        RealignerError: naming the row of which no token with a loss would be left.
    """
    clipped = []
    for example, row in zip(examples, rows, strict=True):
        short = {key: values[:max_length] for key, values in example.items()}
        if all(label == IGNORED for label in short["labels"]):
            prompt = next(at for at, label in enumerate(example["labels"]) if label != IGNORED)
            raise RealignerError(
                f"row {row.id!r}: what comes before its reply has {prompt} tokens; max_length is {max_length}; raise it"
            )
        clipped.append(short)
    return clipped
