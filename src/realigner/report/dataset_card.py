"""The report card of a dataset as a page: its lines, histograms of lengths, rows to read."""

from __future__ import annotations

from pathlib import Path

from realigner.data import ReportCard
from realigner.files import write_text
from realigner.report.figures import length_histogram
from realigner.report.page import is_signed, picture, render_page

_SIGNATURE = '<meta name="generator" content="realigner data check">'


def write_card(card: ReportCard, name: str, out: Path) -> None:
    """Write the page; what was there is replaced."""
    pictures = {"words of a reply": picture(length_histogram(card.word_lengths, "words of a reply"))}
    if card.token_lengths:
        label = f"tokens of question and reply ({card.host})"
        pictures[label] = picture(length_histogram(card.token_lengths, label))
    write_text(out, render_page("card.html.j2", card=card, name=name, pictures=pictures, signature=_SIGNATURE))


def is_card(path: Path) -> bool:
    """Whether a file is a report card written by realigner."""
    return is_signed(path, _SIGNATURE)
