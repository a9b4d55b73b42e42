"""A reply's tokens as pieces of text that are never taken back, and where a text that ends it stands."""

from __future__ import annotations

import queue
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from realigner.chat_format import ChatFormat, ends_in_byte
from realigner.generation import Pieces, Thought

__all__ = ["ContinuedText", "ReplyText", "StopTexts", "Thought"]
_WINDOW = 8  # tokens of a prompt that are decoded with those that continue it, at least


class ReplyText:
    """The reply to a conversation: `generation.stream`'s pieces, thoughts apart.

    Args:
        chat_format: by which the prompt was made.
        opened: whether the prompt ends in an opened thought.
    """

    def __init__(self, chat_format: ChatFormat, opened: bool) -> None:
        self._pieces = Pieces(chat_format, opened, thoughts=True)
        self._pieces.put(torch.empty(0, dtype=torch.long))  # where `generate` shows the prompt

    def add(self, tokens: Sequence[int]) -> Iterator[str]:
        """What can be said after more tokens; a thought's pieces are `Thought`."""
        self._pieces.put(torch.tensor(tokens))
        yield from self._made()

    def end(self) -> Iterator[str]:
        """What was held back."""
        self._pieces.end()
        yield from self._made()

    def so_far(self) -> tuple[str, int]:
        """The reply as the host wrote it, thoughts left out; and how many blanks there are before its first piece."""
        text = self._pieces.with_blanks.rstrip("\ufffd")
        return text, len(text) - len(text.lstrip())

    def _made(self) -> Iterator[str]:
        while True:
            try:
                piece = self._pieces.queue.get_nowait()
            except queue.Empty:
                return
            assert isinstance(piece, str)
            yield piece


class ContinuedText:
    """A text that is continued: its tokens' characters and nothing else, blanks included.

    Args:
        tokenizer: the host's.
        prompt: tokens that were read; a blank between them and the first new one is seen only with them.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int]) -> None:
        start = max(0, len(prompt) - _WINDOW)
        while start and ends_in_byte(tokenizer, prompt[start : start + 1]):  # within a character, perhaps
            start -= 1
        self._tokenizer, self._tokens = tokenizer, list(prompt[start:])
        self._before = len(self._text())
        self._sent = 0

    def add(self, tokens: Sequence[int]) -> Iterator[str]:
        self._tokens += tokens
        if not ends_in_byte(self._tokenizer, self._tokens):
            yield from self._more(self.so_far()[0])

    def end(self) -> Iterator[str]:
        yield from self._more(self._text()[self._before :])

    def so_far(self) -> tuple[str, int]:
        """The text as the host wrote it; and 0, for no blanks are left out before its first piece."""
        return self._text()[self._before :].rstrip("\ufffd"), 0

    def _text(self) -> str:
        return str(self._tokenizer.decode(self._tokens, skip_special_tokens=True))

    def _more(self, text: str) -> Iterator[str]:
        if len(text) > self._sent:
            yield text[self._sent :]
            self._sent = len(text)


class StopTexts:
    """Ends a text where one of some texts begins; holds back what may become one.

    Example:
        >>> stops = StopTexts(["END"])
        >>> [stops.add(piece) for piece in ("one E", "N", "d two EN", "D three")], stops.found
        (['one ', '', 'ENd two ', ''], True)
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = tuple(stops)
        self.found = False
        self._held = ""
        self._said = 0

    def add(self, piece: str) -> str:
        """The part of the text that may be said now."""
        if self.found:
            return ""
        text, self._held = self._held + piece, ""
        at = self._first_in(text)
        if at is not None:
            self.found = True
            return text[:at]
        keep = max((n for stop in self.stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        self._held = text[len(text) - keep :]
        self._said += len(text) - keep
        return text[: len(text) - keep]

    def rest(self, text: str, blanks: int) -> str:
        """What is still to be said of a whole text that a stop text is in; without one, nothing yet.

        Args:
            text: the pieces so far and what they leave out: blanks that may be the last, characters that are not sure yet.
            blanks: characters of it before the first piece.
        """
        at = None if self.found else self._first_in(text)
        if at is None:
            return ""
        self.found = True
        return text[blanks + self._said : at]

    def _first_in(self, text: str) -> int | None:
        return min((text.index(stop) for stop in self.stops if stop in text), default=None)

    def end(self) -> str:
        """What was held back, at the text's end."""
        held, self._held = self._held, ""
        return "" if self.found else held
