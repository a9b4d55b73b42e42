"""Order, colour and dash of the runs of a trace, on the page and in figures alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd
import xarray as xr

from realigner.analysis.per_run import twins
from realigner.report.charts import Line
from realigner.traces.layout import UNTRAINED

COLOURS = 7  # of tones, on the page


@dataclass(frozen=True)
class RunStyles:
    """The runs of a trace, tone by tone, untrained ones last.

    Attributes:
        names: of the runs, in this order.
        facts: run -> ``tone, seed, strength, irm, sha256, network, untrained``.
        twins: trained run -> the untrained one of its seed and layers.
    """

    names: list[str]
    facts: Mapping[str, Mapping[str, Any]]
    twins: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, trace: xr.Dataset) -> RunStyles:
        return replace(cls._ordered(trace["text_run"].values.tolist(), trace.attrs["runs"]), twins=twins(trace))

    @classmethod
    def of_table(cls, table: pd.DataFrame) -> RunStyles:
        """The runs of a table of statistics, with the columns ``run, tone, seed``."""
        runs = table.drop_duplicates("run")
        facts: dict[str, dict[str, Any]] = {
            str(run): {"tone": tone, "seed": seed, "untrained": tone == UNTRAINED}
            for run, tone, seed in zip(runs["run"], runs["tone"], runs["seed"], strict=True)
        }
        return cls._ordered(list(facts), facts)

    @classmethod
    def _ordered(cls, names: Sequence[str], facts: Mapping[str, Mapping[str, Any]]) -> RunStyles:
        order = sorted(set(names), key=lambda run: (facts[run]["untrained"], facts[run]["tone"], facts[run]["seed"], run))
        return cls(order, facts)

    @property
    def trained(self) -> list[str]:
        """Without untrained ones; all, if there is nothing else."""
        return [run for run in self.names if not self.facts[run]["untrained"]] or self.names

    def colour(self, run: str) -> int:
        """1 to `COLOURS` by tone, 0 for untrained ones."""
        if run not in self.facts or self.facts[run]["untrained"]:
            return 0
        tones = sorted({self.facts[name]["tone"] for name in self.names if not self.facts[name]["untrained"]})
        return tones.index(self.facts[run]["tone"]) % COLOURS + 1

    def dash(self, run: str) -> int:
        """0, 1, 2, ... by seed."""
        seeds = sorted({self.facts[name]["seed"] for name in self.names})
        return seeds.index(self.facts[run]["seed"]) % 4

    def twin(self, run: str) -> str | None:
        """The untrained run of the same seed and layers, else of the same seed, else any, else None."""
        if run in self.twins:
            return self.twins[run]
        bare = [name for name in self.names if self.facts[name]["untrained"]]
        same = [name for name in bare if self.facts[name]["seed"] == self.facts[run]["seed"]]
        return next(iter([*same, *bare]), None)

    def line(self, run: str, x: Sequence[float], y: Sequence[float], marked: float | None = None) -> Line:
        """A line of a run's chart."""
        return Line(run, x, y, self.colour(run), self.dash(run), marked)

    def shown(self, run: str) -> dict[str, Any]:
        """A run's facts, colour, dash and untrained twin."""
        return {"name": run, "colour": self.colour(run), "dash": self.dash(run), "twin": self.twin(run), **self.facts[run]}
