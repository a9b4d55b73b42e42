"""The answer to "why this index?", with everything it rests on, and as ``explain.json`` has it. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from realigner.analysis.tables import plain, records
from realigner.explain.verdict import CAUSES, Conclusion
from realigner.files import write_text

RESULT_FILE = "explain.json"


@dataclass(frozen=True)
class Explanation:
    """The answer, and everything it rests on.

    Attributes:
        host, index, cause: of which host, which index, and why it leads (a key of `verdict.CAUSES`).
        conclusions: one question each.
        facts: what is measured at the index; see `verdict.index_facts`.
        standings: where it stands in each IRM.
        trials: see `trials.trial_table`; None: no trials were made.
        ablations: IRM -> see `ablate.delta_ablations`.
        host_ablation: see `ablate.host_ablations`.
        correlations: see `predict.correlations`.
        explained: see `predict.explained`.
        measured: see `predict.measurement_table`.
        profiles: layer by layer at the index: ``residual``, ``gradient``, ``delta`` of each IRM, all over the layer's median;
            ``cancelled``.
        pages: the index and other leading ones -> ``facts`` (as of the index), ``up``, ``down`` (see `head_tokens`).
        irms: name -> folder.
        dtype: of the host while it was measured and ablated.
        quick: whether the small effort was made.
    """

    host: str
    index: int
    cause: str
    conclusions: list[Conclusion]
    facts: pd.DataFrame
    standings: pd.DataFrame
    trials: pd.DataFrame | None
    ablations: dict[str, pd.DataFrame]
    host_ablation: pd.DataFrame
    correlations: pd.DataFrame
    explained: Mapping[str, Mapping[str, float]]
    measured: pd.DataFrame
    profiles: dict[str, Any]
    pages: dict[int, dict[str, Any]]
    irms: dict[str, str]
    dtype: str
    quick: bool

    @property
    def words(self) -> str:
        """The verdict in one sentence."""
        return f"Index {self.index} of {self.host}: {CAUSES[self.cause]}."

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it; NaN is None."""
        tables = {"facts": self.facts, "standings": self.standings, "correlations": self.correlations}
        found = {name: records(table) for name, table in tables.items()}
        return {
            "host": self.host,
            "irms": self.irms,
            "index": self.index,
            "cause": self.cause,
            "words": self.words,
            "quick": self.quick,
            "dtype": self.dtype,
            "conclusions": [conclusion.to_dict() for conclusion in self.conclusions],
            **found,
            "trials": None if self.trials is None else records(self.trials),
            "ablations": {irm: records(table) for irm, table in self.ablations.items()},
            "host_ablation": records(self.host_ablation),
            "explained": plain(self.explained),
            "profiles": plain(self.profiles),
            "pages": {str(index): page | {"facts": records(page["facts"])} for index, page in self.pages.items()},
            "measured": {str(name): plain(self.measured[name].round(12).tolist()) for name in self.measured},
        }

    def save(self, out: str | Path) -> None:
        """Write it into a folder."""
        Path(out).mkdir(parents=True, exist_ok=True)
        write_text(Path(out) / RESULT_FILE, json.dumps(self.to_dict(), indent=2) + "\n")
