"""The report card of a dataset as a page: its lines, histograms of lengths, rows to read."""

from __future__ import annotations

import base64
from pathlib import Path

from realigner.data import ReportCard
from realigner.files import write_text
from realigner.report.figures import length_histogram
from realigner.report.page import is_signed, render_page
from realigner.report.plot_style import as_png

_SIGNATURE = '<meta name="generator" content="realigner data check">'


def write_card(card: ReportCard, name: str, out: Path) -> None:
    """Write the page; what was there is replaced."""
    lengths = {"words of a reply": card.word_lengths}
    if card.token_lengths:
        lengths[f"tokens of question and reply ({card.host})"] = card.token_lengths
    pictures = {label: base64.b64encode(as_png(length_histogram(own, label))).decode() for label, own in lengths.items()}
    write_text(out, render_page("card.html.j2", card=card, name=name, pictures=pictures, signature=_SIGNATURE))


def is_card(path: Path) -> bool:
    """Whether a file is a report card written by realigner."""
    return is_signed(path, _SIGNATURE)
