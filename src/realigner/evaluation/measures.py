"""Measures of a reply that need its text and given numbers only, and the proxy summary: concept, content, fluency."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from realigner.data.answers import NO_SPACES, keeps_fact, word_count
from realigner.data.style_classifier import masked
from realigner.errors import RealignerError

BEST = 2.0  # of concept, content, fluency and their summary, as in AxBench; the least is 0
_WORD = re.compile(rf"{NO_SPACES.pattern}|(?:(?!{NO_SPACES.pattern})\w)+")
_SENTENCE_END = re.compile(r"(?<=[.!?…])\s+|(?<=[。！？])\s*|\n+")  # noqa: RUF001
_QUOTE = 4  # words that a sentence of the prompt needs for its repetition to be a copy
_COPIED = 0.8  # share of a sentence's trigrams


def words(text: str) -> list[str]:
    """A text's words in lower case; in scripts without spaces, its characters.

    Example:
        >>> words("Why, in 1961!")
        ['why', 'in', '1961']
    """
    return _WORD.findall(text.lower())


def ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    """All n-grams of words, in order, with repetitions."""
    found = words(text)
    return list(zip(*(found[start:] for start in range(n)), strict=False))


def distinct(text: str, n: int) -> float:
    """distinct-n: the number of distinct n-grams over that of all n-grams; NaN for fewer than n words.

    Example:
        >>> distinct("no no no yes", 1)
        0.5
    """
    found = ngrams(text, n)
    return len(set(found)) / len(found) if found else float("nan")


def repeated(text: str) -> float:
    """The share of 4-grams that stood in the text before; 0 for fewer than four words."""
    found = ngrams(text, 4)
    return 1 - len(set(found)) / len(found) if found else 0.0


def text_measures(text: str, answer: str, ended: bool) -> dict[str, float]:
    """The measures of one reply that its text alone decides.

    Args:
        answer: the plain fact; empty where unknown.
        ended: the host ended the reply itself, before the limit of tokens.

    Returns:
        ``words``, ``distinct_1``, ``distinct_2`` (NaN where there are too few words), ``repeated`` (share of 4-grams),
        ``ended`` and ``fact`` (0 or 1; ``fact`` is NaN without an answer).
    """
    return {
        "words": float(word_count(text)),
        "distinct_1": distinct(text, 1),
        "distinct_2": distinct(text, 2),
        "repeated": repeated(text),
        "ended": float(ended),
        "fact": float(keeps_fact(answer, text)) if answer else float("nan"),
    }


def own_part(text: str, prompt: str, tone_words: Collection[str] = ()) -> str:
    """A reply without what it repeats of what the host was given (question, system prompt, examples).

    Taken out are whole sentences of the prompt, of four words or more, wherever they stand; and sentences of the reply of which
    80% of the word trigrams stand in the prompt and every word does or is a tone word. "The largest planet is Jupiter" takes up
    words of the question, but Jupiter is its own, so it stays.

    Example:
        >>> own_part("Which planet is the largest? Jupiter, you fool!", "Which planet is the largest?")
        '? Jupiter, you fool!'
    """
    for asked in _SENTENCE_END.split(prompt):
        if len(found := words(asked)) >= _QUOTE:
            text = re.sub(r"(?<!\w)" + r"\W*".join(map(re.escape, found)) + r"(?!\w)", " ", text, flags=re.IGNORECASE)
    there, known = set(ngrams(prompt, 3)), {*words(prompt), *tone_words}
    kept = []
    for sentence in _SENTENCE_END.split(text):
        trigrams = ngrams(sentence, 3)
        copied = trigrams and np.mean([trigram in there for trigram in trigrams]) >= _COPIED
        if not (copied and known.issuperset(words(sentence))):
            kept.append(sentence.strip())
    return " ".join(filter(None, kept))


def without_words(text: str, gone: Collection[str]) -> str:
    """A text with a space in place of each of some words."""
    return masked(text, " ".join(gone))


@dataclass(frozen=True)
class FluencyScale:
    """Nats per token under the bare host as fluency from 0 to 2.

    Attributes:
        best: what the bare host's own replies have on average: 2.
        worst: what the same replies have with their words shuffled: 0.

    Raises:
        RealignerError: when shuffling makes the replies no less likely.
    """

    best: float
    worst: float

    def __post_init__(self) -> None:
        if not self.best < self.worst:
            raise RealignerError(
                f"fluency: the bare host finds shuffled replies ({self.worst:.2f} nats per token) no less likely than its own"
                f" ({self.best:.2f}); check that both were measured after the same questions"
            )

    def scores(self, nats: Sequence[float] | np.ndarray, texts: Sequence[str]) -> np.ndarray:
        """Fluency of each reply ``[reply]``: linear in its nats per token ``[reply]``, times the share that is not repetition.

        NaN nats (an empty reply) give 0.
        """
        linear = BEST * (self.worst - np.asarray(nats, dtype=float)) / (self.worst - self.best)
        whole = np.array([1 - repeated(text) for text in texts])
        return np.asarray(np.clip(np.nan_to_num(linear, nan=0.0), 0, BEST) * whole)


def harmonic_mean(*scores: np.ndarray) -> np.ndarray:
    """The harmonic mean of scores, each ``[reply]``: 0 where one is 0, NaN where one is.

    Example:
        >>> harmonic_mean(np.array([2.0, 2.0]), np.array([2.0, 0.0])).tolist()
        [2.0, 0.0]
    """
    each = np.stack([np.asarray(score, dtype=float) for score in scores])
    with np.errstate(divide="ignore"):
        return np.asarray(len(each) / (1 / each).sum(axis=0))


def proxy(probability: np.ndarray, content: np.ndarray, fluency: np.ndarray) -> np.ndarray:
    """The proxy summary of each reply ``[reply]``, 0 to 2: the harmonic mean of concept, content and fluency.

    It stands in for a judge's score, with no guarantee of agreement; a method's summary is the mean over its replies.

    Args:
        probability: P(tone) of each reply; concept is twice that.
        content: from `Content.scores`.
        fluency: from `FluencyScale.scores`.
    """
    return harmonic_mean(BEST * np.asarray(probability), content, fluency)
