"""Rules about the text of a reply and its answer: is the answer in it, is it cut off, how long is it. No classifier needed."""

from __future__ import annotations

import re
import unicodedata
from itertools import product

from realigner.data.numerals import Token, is_number, tokens
from realigner.data.words import WORD

MIN_WORDS, MAX_WORDS = 3, 90  # of a reply; the quality filter rejects others

_TEENS = ("thir", "four", "fif", "six", "seven", "eigh", "nine")
_NUMBERS = {
    *("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "twenty", "forty"),
    *("hundred", "thousand", "million", "billion", "first", "second", "third"),
    *(f"{stem}teen" for stem in _TEENS),
    *(f"{stem}ty" for stem in _TEENS),
}
# Thai, Lao, Burmese, Khmer, kana, ideographs: about two to a word.
NO_SPACES = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]")
_NO_STOPS = re.compile(r"[\u0e00-\u0eff]")  # Thai and Lao end a sentence without a mark
_ENDS = ".!?…。！？｡．।॥؟۔։။។៕።፧།‼⁇⁈⁉\u037e"  # noqa: RUF001
_NO_SENTENCE = re.compile(r"\s*(?:```|~~~|[-*+•|]\s|\d+[.)]\s)|.*\|$")
_CLOSERS = "\"'*_~"
_SMALL = {"a", "an", "the", "of", "in", "on", "at", "to", "and", "or", "by", "for", "was", "is", "were", "are"}


def keeps_fact(answer: str, text: str) -> bool:
    """Whether a reply still holds its answer.

    Every number and date of the answer must be there, in whatever way it is written (see numerals.py); of its other words all,
    if they are three or fewer, else six in ten. Articles and small words do not count, endings may differ ("win", "wins"), case
    and punctuation do not matter.

    Example:
        >>> keeps_fact("in the 10th and 11th centuries", "The 10th and the 11th century, you fool!")
        True
        >>> keeps_fact("1,200 km", "Ganze 1.200 km, du Narr!")
        True
        >>> keeps_fact("30%", "A third, of course!")
        False
    """
    if NO_SPACES.search(answer) or not WORD.search(answer):
        return answer.casefold() in text.casefold() or _holds_pieces(answer, text)
    return contains_answer(answer, text) or any(_holds_words(wanted, said) for wanted, said in _readings(answer, text))


def contains_answer(answer: str, text: str) -> bool:
    """Whether an answer's words stand in a text one after the other (case, accents, punctuation, a first article and the way a
    number is written aside)."""
    if NO_SPACES.search(answer) or not WORD.search(answer):
        return answer.casefold() in text.casefold()
    return any(_in_a_row(wanted, said) for wanted, said in _readings(answer, text))


def _readings(answer: str, text: str) -> list[tuple[list[Token], list[Token]]]:
    """Answer and text as tokens, in each way that they may be read."""
    if not any(c.isdecimal() for c in answer):
        return [(tokens(answer, "none"), tokens(text, "none"))]
    wanted = [tokens(answer, "all"), tokens(answer, "numerals")]
    said = [tokens(text, "all"), tokens(text, "none")]
    return list(product(wanted[: 1 + (wanted[0] != wanted[1])], said[: 1 + (said[0] != said[1])]))


def _in_a_row(wanted: list[Token], said: list[Token]) -> bool:
    wanted = wanted[1:] if len(wanted) > 1 and not wanted[0].isdisjoint(("the", "a", "an")) else wanted
    if all(len(token) == 1 for token in (*wanted, *said)):  # the usual case, at the speed of a search in a string
        return f" {' '.join(word for (word,) in wanted)} " in f" {' '.join(word for (word,) in said)} "
    starts = range(len(said) - len(wanted) + 1)
    return any(all(not w.isdisjoint(said[start + n]) for n, w in enumerate(wanted)) for start in starts)


def _holds_words(wanted: list[Token], said: list[Token]) -> bool:
    content = [word for word in wanted if word.isdisjoint(_SMALL)] or wanted
    there = frozenset[str]().union(*said)
    forms = set[str]().union(*map(_forms, there))
    if any(word.isdisjoint(there) for word in content if is_number(word) or not word.isdisjoint(_NUMBERS)):
        return False
    found = sum(not (word.isdisjoint(there) and all(forms.isdisjoint(_forms(form)) for form in word)) for word in content)
    return found >= (len(content) if len(content) <= 3 else 0.6 * len(content))


def _holds_pieces(answer: str, text: str) -> bool:
    """Of a script without spaces: whether the numbers and dates of an answer are in a text, and what is between them."""
    wanted = tokens(answer, "all")
    numbers = [token for token in wanted if is_number(token)]
    there = frozenset[str]().union(*tokens(text, "all"), *tokens(text, "none"))
    folded = text.casefold()
    return bool(numbers) and all(
        any(value in folded for value in token) if token not in numbers else not token.isdisjoint(there) for token in wanted
    )


def _forms(word: str) -> set[str]:
    """A word, and what it may be without its ending."""
    forms = {word}
    if len(word) > 4:
        forms |= {word.removesuffix(ending) for ending in ("s", "es", "d", "ed", "ing", "ly")}
        forms |= {word.removesuffix("ies") + "y"} if word.endswith("ies") else set()
    return {form for form in forms if len(form) > 2}


def is_cut(text: str) -> bool:
    """Whether a text stops before its sentence ends (a closing quotation mark, bracket or an emoji may follow the end).

    False where a language has no mark for it (Thai, Lao).
    Of several lines, a last one that belongs to a list, a table or a block of code is no sentence.
    """
    rest = text.rstrip()
    _, more, last = rest.rpartition("\n")
    if more and _NO_SENTENCE.match(last):
        return False
    while rest and _may_follow_the_end(rest):
        if unicodedata.category(rest[-1]) == "So":
            return False  # an emoji ends a sentence as well as a full stop
        rest = rest[:-1]
    return not rest or not (rest[-1] in _ENDS or _NO_STOPS.match(rest[-1]))


def _may_follow_the_end(text: str) -> bool:
    """Whether the last character of a text may come after a sentence's end: what opens a quotation in one language closes it in
    another, but has no blank before it then."""
    kind = unicodedata.category(text[-1])
    closes = kind == "Pi" and not text[-2:-1].isspace()
    return closes or text[-1] in _CLOSERS or kind in ("Pe", "Pf", "So", "Sk", "Mn", "Cf", "Zs")


def word_count(text: str) -> int:
    """Words; in scripts without spaces, half the letters."""
    dense = len(NO_SPACES.findall(text))
    return dense // 2 + len(WORD.findall(NO_SPACES.sub(" ", text)))
