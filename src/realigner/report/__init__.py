"""The self-contained HTML report, and the paper's figures. Names are resolved on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from realigner.lazy import lazily

if TYPE_CHECKING:
    from realigner.report.html_report import build_report, render
    from realigner.report.paper_figures import save_figures
    from realigner.report.report_input import ReportInput, gather

_HOMES = {
    "ReportInput": "report_input",
    "build_report": "html_report",
    "gather": "report_input",
    "render": "html_report",
    "save_figures": "paper_figures",
}

__all__ = ["ReportInput", "build_report", "gather", "render", "save_figures"]


def __getattr__(name: str) -> Any:
    return lazily(__name__, _HOMES)("ReportInput" if name == "Evidence" else name)  # its former name
