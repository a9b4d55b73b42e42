"""How long a host may think, and how long it may then reply, row by row of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import LogitsProcessor, StoppingCriteria

from realigner.chat_format import ChatFormat

_WINDOW = 32  # tokens in which the end of a thought is looked for


class ThinkingBudget(LogitsProcessor):  # type: ignore[misc]
    """Closes a thought after so many tokens, by allowing nothing but its closing tag; ends a reply after so many of its own.

    Both halves are arguments of ``generate``: the object itself is a logits processor, the last one; `enough` is a stopping
    criterion. Neither changes anything in a row that stays below both numbers.

    Args:
        chat_format: of a host that thinks.
        opened: for each row, whether its prompt ends in an opened thought.
        thought: tokens of a thought at most, its tags included.
        reply: tokens of a reply at most.
    """

    def __init__(self, chat_format: ChatFormat, opened: Sequence[bool], thought: int, reply: int) -> None:
        assert chat_format.tags is not None
        self.tags, self.decode, self.may_be_tag = chat_format.tags, chat_format.decode, chat_format.may_be_tag
        self.thought, self.reply = thought, reply
        self.closing: list[int] = list(
            chat_format.tokenizer(self.tags.before_close + self.tags.close, add_special_tokens=False)["input_ids"]
        )
        self.enough = _Enough(self)
        self._thinks: list[bool | None] = [True if is_open else None for is_open in opened]  # None: it has not begun
        self._in_tag = [False] * len(opened)  # whether a row's first tokens may yet become a tag
        self._closed: list[int | None] = [None] * len(opened)  # tokens of the closing tag that are there, once it is forced
        self._begins = [0] * len(opened)  # where the reply begins, once it has
        self.full: list[int | None] = [None] * len(opened)  # tokens of a row whose reply has all that it may have
        self._prompt: int | None = None  # width of the prompts
        self._seen = 0

    @property
    def most(self) -> int:
        """Tokens that thought and reply take together at most."""
        return self.thought + len(self.closing) + self.reply

    def look(self, input_ids: torch.Tensor) -> int:
        """Take note of what the rows have generated; returns how many tokens."""
        if self._prompt is None:
            self._prompt = self._seen = input_ids.shape[1]
        count = input_ids.shape[1] - self._prompt
        if input_ids.shape[1] > self._seen:
            self._seen = input_ids.shape[1]
            for row, thinks in enumerate(self._thinks):
                if thinks is False:
                    continue
                text = self.decode(input_ids[row, self._prompt :][-_WINDOW if thinks else 0 :].tolist())
                if thinks is None:
                    thinks = self._begun(text.lstrip())
                if thinks and self.tags.close in text:
                    thinks, self._begins[row] = False, count
                self._thinks[row] = thinks
                self._in_tag[row] = thinks is None and bool(text.strip())
        return count

    def _begun(self, text: str) -> bool | None:
        """Whether a row begins with a thought; None while that cannot be told."""
        if text.startswith((self.tags.open, self.tags.close)):
            return True
        return None if self.may_be_tag(text) else False

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """``[row, position]``, ``[row, token]`` -> scores, with only the closing tag left in rows that have thought enough."""
        count = self.look(input_ids)
        for row, thinks in enumerate(self._thinks):
            if thinks and count >= self.thought:
                closed = self._closed[row]
                if closed is None:
                    closed = self._begun_tag(input_ids[row, self._prompt :].tolist())
                token = self.closing[min(closed, len(self.closing) - 1)]
                self._closed[row] = closed + 1
                scores[row] = -torch.inf
                scores[row, token] = 0.0
        return scores

    def _begun_tag(self, tokens: list[int]) -> int:
        """How many tokens of the closing tag stand at a row's end already."""
        lengths = range(min(len(tokens), len(self.closing) - 1), 0, -1)
        return next((length for length in lengths if tokens[-length:] == self.closing[:length]), 0)

    def ended(self, row: int, count: int) -> bool:
        """Whether a row's reply has all the tokens it may have."""
        return self._thinks[row] is not True and not self._in_tag[row] and count - self._begins[row] >= self.reply


class _Enough(StoppingCriteria):  # type: ignore[misc]
    def __init__(self, budget: ThinkingBudget) -> None:
        self._budget = budget

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        count = self._budget.look(input_ids)
        ended = [self._budget.ended(row, count) for row in range(len(input_ids))]
        full = self._budget.full
        full[:] = [count if before is None and now else before for before, now in zip(full, ended, strict=True)]
        return torch.tensor(ended, device=input_ids.device)
