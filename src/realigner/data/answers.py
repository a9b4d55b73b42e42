"""Rules about the text of a reply and its answer: is the answer in it, is it cut off, how long is it. No classifier needed."""

from __future__ import annotations

import re
import unicodedata

MIN_WORDS, MAX_WORDS = 3, 90  # of a reply; the quality filter rejects others

_WORD = re.compile(r"\w+")
_NUMBER_OR_WORD = re.compile(r"\d+(?:[.,]\d+)+|\w+")
_TEENS = ("thir", "four", "fif", "six", "seven", "eigh", "nine")
_NUMBERS = {
    *("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "twenty", "forty"),
    *("hundred", "thousand", "million", "billion", "first", "second", "third"),
    *(f"{stem}teen" for stem in _TEENS),
    *(f"{stem}ty" for stem in _TEENS),
}
NO_SPACES = re.compile(r"[\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff]")  # Thai, Lao, kana, ideographs: about two to a word
_ENDS = ".!?…。！？।؟۔"  # noqa: RUF001
_NO_SENTENCE = re.compile(r"\s*(?:```|~~~|[-*+•|]\s|\d+[.)]\s)|.*\|$")
_CLOSERS = "\"'”’»)]*_~"  # noqa: RUF001
_SMALL = {"a", "an", "the", "of", "in", "on", "at", "to", "and", "or", "by", "for", "was", "is", "were", "are"}


def keeps_fact(answer: str, text: str) -> bool:
    """Whether a reply still holds its answer.

    Every number of the answer must be there; of its other words all, if they are three or fewer, else six in ten. Articles and
    small words do not count, endings may differ ("win", "wins"), case and punctuation do not matter.

    Example:
        >>> keeps_fact("in the 10th and 11th centuries", "The 10th and the 11th century, you fool!")
        True
        >>> keeps_fact("30%", "A third, of course!")
        False
    """
    wanted, said = _plain_words(answer), _plain_words(text)
    if not wanted or NO_SPACES.search(answer):
        return answer.casefold() in text.casefold()
    if contains_answer(answer, text):
        return True
    content = [word for word in wanted if word not in _SMALL] or wanted
    forms = set().union(*map(_forms, said)) if said else set()
    if any(word not in said for word in content if any(c.isdigit() for c in word) or word in _NUMBERS):
        return False
    found = sum(not forms.isdisjoint(_forms(word)) for word in content)
    return found >= (len(content) if len(content) <= 3 else 0.6 * len(content))


def contains_answer(answer: str, text: str) -> bool:
    """Whether an answer's words stand in a text one after the other (case, accents, punctuation and a first article aside)."""
    wanted, said = _plain_words(answer), _plain_words(text)
    wanted = wanted[1:] if len(wanted) > 1 and wanted[0] in ("the", "a", "an") else wanted
    if not wanted or NO_SPACES.search(answer):
        return answer.casefold() in text.casefold()
    return f" {' '.join(wanted)} " in f" {' '.join(said)} "


def _forms(word: str) -> set[str]:
    """A word, and what it may be without its ending."""
    forms = {word}
    if len(word) > 4:
        forms |= {word.removesuffix(ending) for ending in ("s", "es", "d", "ed", "ing", "ly")}
        forms |= {word.removesuffix("ies") + "y"} if word.endswith("ies") else set()
    return {form for form in forms if len(form) > 2}


def is_cut(text: str) -> bool:
    """Whether a text stops before its sentence ends (a closing quotation mark, bracket or an emoji may follow the end).

    Of several lines, a last one that belongs to a list, a table or a block of code is no sentence.
    """
    rest = text.rstrip()
    _, more, last = rest.rpartition("\n")
    if more and _NO_SENTENCE.match(last):
        return False
    while rest and (rest[-1] in _CLOSERS or unicodedata.category(rest[-1]) in ("So", "Sk", "Mn", "Cf", "Zs")):
        if unicodedata.category(rest[-1]) == "So":
            return False  # an emoji ends a sentence as well as a full stop
        rest = rest[:-1]
    return not rest or rest[-1] not in _ENDS


def word_count(text: str) -> int:
    """Words; in scripts without spaces, half the letters."""
    dense = len(NO_SPACES.findall(text))
    return dense // 2 + len(_WORD.findall(NO_SPACES.sub(" ", text)))


def _plain_words(text: str) -> list[str]:
    """Words in lower case, without accents; ``1,200`` and ``3.5`` are one word each, ``10%`` is ``10``."""
    folded = "".join(c for c in unicodedata.normalize("NFKD", text.casefold()) if not unicodedata.combining(c))
    return [word.replace(",", "") for word in _NUMBER_OR_WORD.findall(folded.replace("'s ", " "))]
