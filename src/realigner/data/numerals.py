"""Words, numbers and dates of a text, the last two as the values they may stand for, however a language writes them.

``3,5`` and ``3.5`` are one number, and so are ``1,000``, ``1.000``, ``1 000`` and ``1'000``; digits may be of any script. What
can be read in two ways has both values (``1.500``: 1500 and 1.5; a comma before three digits parts thousands), and two numbers
agree when they have one in common. ``3rd`` is the ordinal number that ``3.``, ``3e`` and ``3º`` may be. A date is one thing:
``2020-05-12``, ``12.05.2020``, ``5/12/2020``, ``May 12th, 2020``, ``2020年5月12日``.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from itertools import chain
from typing import Literal

from realigner.data.words import WORD

Token = frozenset[str]  # a word, or the values that a number or a date may have
Whole = Literal["all", "numerals", "none"]

_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_MONTH = (
    r"(?P<name>jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|sept?(?:ember)?"
    r"|oct(?:ober)?|nov(?:ember)?|dec(?:ember)?)\.?"
)
_YEAR, _NUMBER, _DAY, _TH = r"(?P<year>\d{4})", r"(?P<month>\d{1,2})", r"(?P<day>\d{1,2})", "(?:st|nd|rd|th)?"
_NUMERALS = (
    rf"{_YEAR}(?P<mark>[-/.]) ?{_NUMBER}(?P=mark) ?{_DAY}",
    rf"{_DAY}(?P<mark>[-/.]) ?{_NUMBER}(?P=mark) ?{_YEAR}",
    rf"{_YEAR} ?[年년] ?{_NUMBER} ?[月월] ?{_DAY} ?[日일]",
)
_WORDS = (rf"{_DAY}{_TH} (?:of )?{_MONTH},? {_YEAR}", rf"\b{_MONTH} {_DAY}{_TH},? {_YEAR}")
_DATES = {
    name: [re.compile(rf"(?<![\d/-])(?<!\d[.,]){pattern}(?![\d/-]|[.,]\d)") for pattern in patterns]
    for name, patterns in (("numerals", _NUMERALS), ("all", _NUMERALS + _WORDS))
}
_BLANK_GROUPS = re.compile(r"(?<!\d)(?<!\d[.,'])\d{1,3}(?: \d{3})+(?!\d)(?:[.,]\d+)?")
_THOUSANDS = re.compile(r"(?<=\d)[\u00a0\u2007\u2009\u202f\u066c\u2019'](?=\d{3}(?!\d))")
_SUFFIX = r"(?:st|nd|rd|th|er|e|eme)\b"  # of ordinal numbers
_TOKEN = re.compile(
    rf"(?P<number>\d+(?:[.,]\d+|'\d{{3}}(?!\d))+|\d++(?={_SUFFIX}|(?![a-z_])))(?P<mark>{_SUFFIX}|\.(?!\d))?|{WORD.pattern}"
)


def tokens(text: str, whole: Whole = "all") -> list[Token]:
    """The words, numbers and dates of a text, in lower case, without accents.

    Args:
        text: the text.
        whole: what is one thing: dates and numbers whose thousands are parted by blanks (``"all"``), those but for dates with
            a month's name (``"numerals"``), or their parts (``"none"``).

    Example:
        >>> [sorted(token) for token in tokens("3,50 on 12.5.2020")]
        [['3.5'], ['on'], ['2020-05-12']]
    """
    folded = _folded(text)
    found: list[Token] = []
    at = 0
    for start, end, token in sorted(_wholes(folded, whole), key=lambda span: span[:2]) if whole != "none" else ():
        if start >= at:
            found += _parts(folded[at:start], apart=False)
            found.append(token)
            at = end
    return [*found, *_parts(folded[at:], apart=whole == "none")]


def is_number(token: Token) -> bool:
    """Whether a token has digits: a number, a date, or a word such as ``b52``."""
    return any(character.isdecimal() for value in token for character in value)


def _wholes(text: str, whole: Whole) -> Iterator[tuple[int, int, Token]]:
    for match in chain.from_iterable(pattern.finditer(text) for pattern in _DATES[whole]):
        given = match.groupdict()
        month = int(given["month"]) if given.get("month") else _MONTHS.index(given["name"][:3]) + 1
        orders = {(month, int(given["day"]))}
        if given.get("mark") in ("/", "-") and match.start("day") < match.start("year"):  # American, or not
            orders.add((int(given["day"]), month))
        values = {f"{given['year']}-{month:02}-{day:02}" for month, day in orders if 1 <= month <= 12 and 1 <= day <= 31}
        if values:
            yield match.start(), match.end(), frozenset(values)
    for match in _BLANK_GROUPS.finditer(text):
        if values := _values(match[0].replace(" ", "'")):
            yield match.start(), match.end(), frozenset(values)


def _parts(text: str, apart: bool) -> Iterator[Token]:
    """Words and numbers; what looks like a number and is none (``1.2.3``) as it is, or `apart`."""
    for match in _TOKEN.finditer(text):
        number = match["number"]
        values = _values(number) if number else {match[0]}
        if number and match["mark"]:  # "3rd" is an ordinal number, "3." may be one
            values = {f"#{value}" for value in values} | (values if match["mark"] == "." else set())
        if values or not apart:
            yield frozenset(values or {number})
        else:
            yield from (frozenset([_plain(part)]) for part in re.split("[.,']", number))


def _values(number: str) -> set[str]:
    """The values that a number may have, without zeros that say nothing."""
    groups, marks = re.split("[.,']", number), re.findall("[.,']", number)
    values = set()
    if _are_thousands(groups, marks):
        values.add(_plain("".join(groups)))
    has_fraction = bool(marks) and marks[-1] != "'" and marks[-1] not in marks[:-1] and _are_thousands(groups[:-1], marks[:-1])
    if has_fraction and not (values and marks[-1] == ","):
        values.add(f"{_plain(''.join(groups[:-1]))}.{groups[-1]}".rstrip("0").rstrip("."))
    return values


def _plain(digits: str) -> str:
    return digits.lstrip("0") or "0"


def _are_thousands(groups: list[str], marks: list[str]) -> bool:
    """Whether digits are parted as those of a whole number are: not at all, in threes, or as in India."""
    if not marks:
        return True
    first, *middle, last = groups
    even = len(set(marks)) == 1 and len(first) <= 3 and not first.startswith("0") and len(last) == 3
    return even and (
        all(len(g) == 3 for g in middle) or (marks[0] == "," and all(len(g) == 2 for g in middle) and len(first) < 3)
    )


def _folded(text: str) -> str:
    """Lower case without accents; digits as 0 to 9; other marks between thousands than commas and points as ``'``."""
    text = _THOUSANDS.sub("'", text.casefold())
    if not text.isascii():
        text = text.replace("º", ".").replace("ª", ".").replace("٫", ".")  # noqa: RUF001
        text = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
        text = unicodedata.normalize("NFC", "".join(str(unicodedata.decimal(c)) if c.isdecimal() else c for c in text))
    return text.replace("'s ", " ")
