"""The report card of a dataset as a page: its lines, histograms of lengths, rows to read."""

from __future__ import annotations

import base64
from pathlib import Path

from realigner.data import ReportCard
from realigner.files import Artifact, taken
from realigner.report.figures import length_histogram
from realigner.report.page import check_signed, render_page, signature
from realigner.report.plot_style import as_png

_GENERATOR = "realigner data check"
CARD = Artifact("a report card", lambda path: check_signed(path, _GENERATOR))


def write_card(card: ReportCard, name: str, out: Path, force: bool = False) -> None:
    """Write the page, in place of an older one only with `force`.

    Raises:
        RealignerError: when something is there, or it cannot be written.
    """
    lengths = {"words of a reply": card.word_lengths}
    if card.token_lengths:
        lengths[f"tokens of a row ({card.host})"] = card.token_lengths
    pictures = {label: base64.b64encode(as_png(length_histogram(own, label))).decode() for label, own in lengths.items()}
    with taken(out, CARD, force) as place:
        place.write(render_page("card.html.j2", card=card, name=name, pictures=pictures, signature=signature(_GENERATOR)))
