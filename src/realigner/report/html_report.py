"""The report: one self-contained HTML page over traces, explanations and evaluations. It loads no model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from realigner.analysis import analyze
from realigner.errors import UsageError
from realigner.evaluation.evaluation_file import EvaluationFile, is_evaluation, read_evaluation
from realigner.files import Artifact, taken
from realigner.report.context import BUDGET, page_context
from realigner.report.evaluation_section import evaluation_section
from realigner.report.explanation_section import comparison
from realigner.report.page import check_signed, render_page, signature
from realigner.report.report_input import ReportInput, read_inputs, untraced
from realigner.traces.store import damage_named, is_trace

_GENERATOR = "realigner"
REPORT = Artifact("a report", lambda path: check_signed(path, _GENERATOR))


def build_report(sources: Sequence[str | Path], out: str | Path, force: bool = False) -> tuple[Path, list[ReportInput]]:
    """Write one report over traces, explanations and evaluations.

    Args:
        sources: zarr traces; folders of `explain`, each shown with the trace of its host; and folders or files of evaluations.
        out: the HTML file.
        force: replace an existing report.

    Returns:
        The file, and what it shows, one entry for each trace.

    Raises:
        RealignerError: for a damaged source, an explanation of another host, or an `out` that exists or cannot be written.
        UsageError: for a source that is none of these: a run must be traced first.

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
        evaluations = [read_evaluation(source) for source in places if is_evaluation(source)]
        with damage_named(*filter(is_trace, places)):
            inputs = [replace(item, analysis=analyze(item.trace)) for item in read_inputs(places)]
            page = render(inputs, evaluations=evaluations)
        place.write(page)
    return out, inputs


def render(inputs: Sequence[ReportInput], budget_bytes: int = BUDGET, evaluations: Sequence[EvaluationFile] = ()) -> str:
    """The page as HTML text; it makes no requests.

    Args:
        inputs: one for each trace; each gets a part of the page.
        budget_bytes: size of the page. Maps of single tokens get what the rest leaves of it.
        evaluations: each gets a part of the page, before the traces'.
    """
    items = [page_context(item, number, budget_bytes // max(1, len(inputs))) for number, item in enumerate(inputs)]
    compared = comparison([found for item in inputs for found in item.explained])
    works = [evaluation_section(item, number) for number, item in enumerate(evaluations, 1)]
    return render_page("report.html.j2", items=items, evaluations=works, compared=compared, signature=signature(_GENERATOR))
