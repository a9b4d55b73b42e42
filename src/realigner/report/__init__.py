"""Figures for papers, and the self-contained HTML report."""

from realigner.report.render import Evidence, build_report, gather, render

__all__ = ["Evidence", "build_report", "gather", "render"]
