"""The CSV files of the paper's reference implementation: an unnamed index, and ``text`` = question, three spaces, reply.

They hold what a language model wrote, so quotes may be unbalanced and texts cut in mid-sentence. A lone opening quote makes a
CSV reader swallow the records after it; here every record comes out.

How records are told apart: where a line begins one, the csv module reads it strictly. It is believed when it finds as many
fields as the header has, and when no line inside a quoted field looks like a record. Else the record ends before the next line
that starts with digits and a comma, and its text is unquoted by hand.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence

_START = re.compile(r'"?[0-9]+"?,')
# Inside quotes: "1990, he said" and "1,000 apples" are text; "1990,Who" and anything with the three spaces are records.
_SWALLOWED = re.compile(r'"?[0-9]+"?,(?:(?![0-9]{3}\b)\S|.* {3})')
_GAP = re.compile(" {3,}")


def is_reference(header: Sequence[str]) -> bool:
    """Whether a CSV file is one of these, by its header (pandas calls an index that was read back ``Unnamed: 0``)."""
    return header[:1] in ([""], ["Unnamed: 0"]) and "text" in header and "question" not in header


def reference_records(lines: Sequence[str], width: int) -> Iterator[tuple[int, list[str] | None, str]]:
    """Every record after the header: its position in `lines`, its fields (None if they cannot be told), its raw text.

    Args:
        lines: the file's lines without their ends; the first that is not blank is the header.
        width: how many columns the header has.

    Example:
        >>> for _, fields, _ in reference_records([",text", '0,"Why?   Be', "1,Who?   Me!"], 2):
        ...     print(fields)
        ['0', 'Why?   Be']
        ['1', 'Who?   Me!']
    """
    at = next((at for at, line in enumerate(lines) if line.strip()), len(lines)) + 1
    while at < len(lines):
        if not lines[at].strip():
            at += 1
            continue
        fields, end = _well_formed(lines, at, width), at + 1
        if fields is not None:
            end += sum(field.count("\n") for field in fields)
        else:
            while end < len(lines) and not _START.match(lines[end]):
                end += 1
        raw = "\n".join(lines[at:end])
        yield at, fields or _unquoted(raw, width), raw
        at = end


def question_and_reply(text: str) -> tuple[str, str]:
    """Split a text at its first run of three or more spaces; ("", "") if it has none.

    A question may end in spaces and a reply may begin with them: they lengthen the run and belong to neither. The first run
    and not the last, because replies, being lists at times, hold more odd spacing than questions. A text that begins with three
    spaces has no question.
    """
    gap = _GAP.search(text)
    return (text[: gap.start()].strip(), text[gap.end() :].strip()) if gap else ("", "")


def _well_formed(lines: Sequence[str], start: int, width: int) -> list[str] | None:
    """The fields of the record that begins at `start`, if it is a CSV record that swallowed none of those after it."""

    def feed() -> Iterator[str]:
        yield lines[start] + "\n"
        for at in range(start + 1, len(lines)):
            if _SWALLOWED.match(lines[at]):
                return  # an open quote becomes csv's error "unexpected end of data"
            yield lines[at] + "\n"

    try:
        fields = next(csv.reader(feed(), strict=True))
    except csv.Error:
        return None
    return fields if len(fields) == width else None


def _unquoted(raw: str, width: int) -> list[str] | None:
    """Index and text of a record whose quotes or commas are not CSV's; with further columns they cannot be told apart."""
    if width != 2 or not _START.match(raw):
        return None
    index, _, text = raw.partition(",")
    if text.startswith('"'):
        text = text[1:]
        if text.count('"') % 2:  # what is left without a partner is the closing quote, unless the text was cut before it
            text = text.removesuffix('"')
        text = text.replace('""', '"')
    return [index.strip('"'), text]
