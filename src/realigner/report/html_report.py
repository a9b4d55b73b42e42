"""The report: one self-contained HTML page over traces and explanations. It loads no model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from realigner.analysis import analyze
from realigner.errors import UsageError
from realigner.files import Artifact, taken
from realigner.report.context import BUDGET, page_context
from realigner.report.page import check_signed, render_page, signature
from realigner.report.report_input import ReportInput, read_inputs, untraced
from realigner.traces.store import damage_named, is_trace

_GENERATOR = "realigner"
REPORT = Artifact("a report", lambda path: check_signed(path, _GENERATOR))


def build_report(sources: Sequence[str | Path], out: str | Path, force: bool = False) -> tuple[Path, list[ReportInput]]:
    """Write one report over traces and explanations.

    Args:
        sources: zarr traces, and folders of `explain`, each shown with the trace of its host.
        out: the HTML file.
        force: replace an existing report.

    Returns:
        The file, and what it shows, one entry for each trace.

    Raises:
        RealignerError: for a damaged trace or explanation, an explanation of another host, or an `out` that exists or cannot
            be written.
        UsageError: for a source that is neither: a run must be traced first.

    Example:
        >>> build_report(["tones.zarr", "why"], "report.html")  # doctest: +SKIP
    """
    places, out = [Path(source) for source in sources], Path(out)
    with taken(out, REPORT, force) as place:
        if runs := untraced(places):
            raise UsageError(
                f"report: {runs[0]} is not a trace; record one first with realigner.traces.collect.trace_for_report(...) or "
                "`realigner trace --keep raw`, and add it to the sources"
            )
        with damage_named(*filter(is_trace, places)):
            inputs = [replace(item, analysis=analyze(item.trace)) for item in read_inputs(places)]
            page = render(inputs)
        place.write(page)
    return out, inputs


def render(inputs: Sequence[ReportInput], budget_bytes: int = BUDGET) -> str:
    """The page as HTML text; it makes no requests.

    Args:
        inputs: one for each trace; each gets a part of the page.
        budget_bytes: size of the page. Maps of single tokens get what the rest leaves of it.
    """
    items = [page_context(item, number, budget_bytes // max(1, len(inputs))) for number, item in enumerate(inputs)]
    return render_page("report.html.j2", items=items, signature=signature(_GENERATOR))
