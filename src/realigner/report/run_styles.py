"""The runs of a trace as a page shows them: in which order, in which colour, beside which baseline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import xarray as xr

COLOURS = 7  # of tones, on the page


@dataclass(frozen=True)
class Runs:
    """The runs of a trace in the order they are shown: tone by tone, baselines last.

    Attributes:
        names: of the runs.
        facts: run -> ``tone, seed, strength, irm, sha256, untrained``.
    """

    names: list[str]
    facts: Mapping[str, Mapping[str, Any]]

    @classmethod
    def of(cls, trace: xr.Dataset) -> Runs:
        facts = trace.attrs["runs"]
        there = list(dict.fromkeys(trace["text_run"].values.tolist()))
        order = sorted(there, key=lambda run: (facts[run]["untrained"], facts[run]["tone"], facts[run]["seed"], run))
        return cls(order, facts)

    @property
    def trained(self) -> list[str]:
        """Without baselines; all, where there is nothing else."""
        return [run for run in self.names if not self.facts[run]["untrained"]] or self.names

    def colour(self, run: str) -> int:
        """1 to `COLOURS` by tone, 0 for baselines."""
        if run not in self.facts or self.facts[run]["untrained"]:
            return 0
        tones = sorted({self.facts[name]["tone"] for name in self.names if not self.facts[name]["untrained"]})
        return tones.index(self.facts[run]["tone"]) % COLOURS + 1

    def dash(self, run: str) -> int:
        """0, 1, 2, ... by seed."""
        seeds = sorted({self.facts[name]["seed"] for name in self.names})
        return seeds.index(self.facts[run]["seed"]) % 4

    def twin(self, run: str) -> str | None:
        """The untrained run of the same seed, or any; None where there is none."""
        bare = [name for name in self.names if self.facts[name]["untrained"]]
        same = [name for name in bare if self.facts[name]["seed"] == self.facts[run]["seed"]]
        return next(iter([*same, *bare]), None)

    def shown(self, run: str) -> dict[str, Any]:
        """A run's facts, and how it is drawn."""
        return {"name": run, "colour": self.colour(run), "dash": self.dash(run), "twin": self.twin(run), **self.facts[run]}
