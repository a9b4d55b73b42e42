"""The case of an index: the IRMs that it leads in, the rows they are looked at on, and what their host does there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from transformers import PreTrainedModel, set_seed

from realigner.analysis.per_run import leading_score
from realigner.data import Row, rows_hash
from realigner.errors import RealignerError, UsageError
from realigner.explain.ablate import How, control_indices, delta_ablations, host_ablations
from realigner.explain.example_batches import Rows
from realigner.explain.measure import delimiter_ids, measure_host
from realigner.explain.predict import measurement_table
from realigner.explain.verdict import index_facts, refuse_index
from realigner.explain.weights import head_tokens, weights_of
from realigner.hosts import host_name
from realigner.irm import IRM
from realigner.traces.layout import UNTRAINED
from realigner.training.batches import prepare
from realigner.training.recipe import Recipe, read_recipe
from realigner.training.run_dir import RECIPE_FILE, read_run
from realigner.training.training_run import recipe_rows
from realigner.tuner import load_irm, tuner_of


@dataclass(frozen=True)
class Case:
    """IRMs of one host.

    Attributes:
        host, tokenizer: the bare host that they were made for.
        runs: name -> folder and recipe; from `read_runs`.
        size: of each IRM's own validation rows, how many are looked at.
        quiet: show no progress.
    """

    host: PreTrainedModel
    tokenizer: Any
    runs: Mapping[str, tuple[Path, Recipe]]
    size: int
    quiet: bool

    @property
    def name(self) -> str:
        """The host's."""
        return Path(host_name(self.host) or type(self.host).__name__).name

    def best_at(self, index: int) -> str:
        """The IRM in which an index has the best rank: trials train that run again."""
        table = self.standings(index)
        return str(table["irm"].iloc[int(table["rank"].to_numpy().argmin())])

    @property
    def first(self) -> tuple[Path, Recipe]:
        """The first run."""
        return next(iter(self.runs.values()))

    @cached_property
    def encoded(self) -> dict[str, list[dict[str, list[int]]]]:
        """Each run's rows."""
        found = {}
        for name, (folder, recipe) in self.runs.items():
            if recipe.data is None:
                raise RealignerError(f"{folder}: was trained on rows made in Python; explain needs a run on a file of rows")
            rows = recipe_rows(recipe)
            if (read_run(folder).get("data") or {}).get("sha256") not in (None, rows_hash(rows)):
                raise RealignerError(f"{recipe.data}: not the rows that {folder} was trained on; put those there to explain it")
            found[name] = self._some(rows, recipe)
        return found

    def _some(self, rows: Sequence[Row], recipe: Recipe) -> list[dict[str, list[int]]]:
        """Some of a recipe's validation rows, evenly over all of them."""
        whole = prepare(rows, self.tokenizer, self.host.config, recipe).validation
        picked = np.unique(np.linspace(0, len(whole) - 1, min(self.size, len(whole))).round().astype(int))
        return [whole[int(row)] for row in picked]

    @property
    def pad(self) -> int:
        return self.tokenizer.pad_token_id or 0

    def rows(self, run: str) -> Rows:
        """A run's rows in batches."""
        return Rows(self.encoded[run], self.pad)

    def rows_of(self, recipe: Recipe) -> Rows:
        """Validation rows of a recipe (of another seed, say, which splits otherwise) in batches."""
        return Rows(self._some(recipe_rows(recipe), recipe), self.pad)

    @cached_property
    def states(self) -> xr.Dataset:
        """From `measure_host`: all rows, all IRMs, and one as it was before training."""
        irms = {name: _network(self.host, folder) for name, (folder, _) in self.runs.items()}
        everything = Rows([row for rows in self.encoded.values() for row in rows], self.pad, batch_size=8)
        untrained = {UNTRAINED: _untrained(self.host, self.first[1])}
        return measure_host(self.host, everything, {**irms, **untrained}, delimiter_ids(self.tokenizer), self.quiet)

    @cached_property
    def measured(self) -> pd.DataFrame:
        """From `measurement_table`."""
        return measurement_table(weights_of(self.host), self.states)

    @cached_property
    def scores(self) -> dict[str, np.ndarray]:
        """How far each index stands out ``[neuron]``, of each IRM and the untrained one."""
        return {str(name): _score(self.states, str(name)) for name in self.states["irm"].values}

    @property
    def together(self) -> np.ndarray:
        """The geometric mean of the IRMs' scores ``[neuron]``."""
        return np.asarray(np.exp(np.mean([np.log(self.scores[name] + 1e-12) for name in self.runs], axis=0)))

    def chosen(self, index: int | None) -> int:
        """The index asked about, or the leading one.

        Raises:
            UsageError: for an index that the host does not have.
        """
        width = int(self.host.config.get_text_config(decoder=True).hidden_size)
        refuse_index(index, width)
        return int(self.together.argmax()) if index is None else index

    def standings(self, index: int) -> pd.DataFrame:
        """Where an index stands: ``irm, rank, ratio`` (times the median), ``leader``."""
        rows = []
        for name in self.runs:
            score = self.scores[name]
            rank = int((score >= score[index]).sum())
            rows.append({"irm": name, "rank": rank, "ratio": float(score[index]), "leader": int(score.argmax())})
        return pd.DataFrame(rows)

    def leading(self, index: int, each: int = 5, most: int = 12) -> list[int]:
        """An index, then the leading ones of every IRM, first ranks first."""
        ranked = [np.argsort(-self.scores[name], kind="stable")[:each].tolist() for name in self.runs]
        return list(dict.fromkeys([index, *(own[place] for place in range(each) for own in ranked if place < len(own))]))[:most]

    def pages(self, indices: Sequence[int]) -> dict[int, dict[str, Any]]:
        """What the host does at each of some indices, and which tokens its head has there."""
        words = head_tokens(self.host, self.tokenizer, indices)
        return {index: {"facts": index_facts(self.measured, index), **words.get(index, {})} for index in indices}

    def ablated(self, run: str, leading: Sequence[int], random: int, matched: int, hows: Sequence[How]) -> pd.DataFrame:
        """`delta_ablations` of the first of some leading indices, in one IRM; the others are among its controls."""
        index = leading[0]
        controls = control_indices(self.scores[run], index, random, matched, np.random.default_rng(index))
        controls["leading"] = list(leading[1:])
        model = load_irm(self.host, self.runs[run][0])
        try:
            layers = list(tuner_of(model).registry.network("default").layers)
            mean = self.states["delta_mean"].sel(irm=run).values[layers]
            return delta_ablations(model, self.rows(run), index, mean, controls, hows, quiet=self.quiet)
        finally:
            model.unload()

    def ablated_host(self, leading: Sequence[int], random: int) -> pd.DataFrame:
        """`host_ablations` at some leading indices and random ones, on the first run's rows."""
        index, first = leading[0], next(iter(self.runs))
        controls = control_indices(self.scores[first], index, random, 0, np.random.default_rng(index))
        groups = {"random": controls["random"], "leading": leading[1:]}
        return host_ablations(self.host, self.rows(first), index, groups, quiet=self.quiet)

    def likeness(self, run: str, index: int, table: pd.DataFrame) -> float:
        """How large the size-matched controls of an ablation are beside the index: the median of them over its score."""
        matched = table[table["group"] == "matched"]["index"].unique()
        return float(np.median(self.scores[run][matched]) / self.scores[run][index]) if len(matched) else float("nan")

    def profiles(self, index: int) -> dict[str, Any]:
        """An index layer by layer, over each layer's median; ``cancelled`` is a share."""
        states = self.states

        def over_median(values: np.ndarray) -> list[float]:
            return [float(row[index] / np.median(row)) for row in values]

        irms = [str(name) for name in states["irm"].values]
        return {
            "layer": states["layer"].values.tolist(),
            "residual": over_median(states["residual"].sel(kind="rest").values),
            "gradient": over_median(states["gradient"].values),
            "delta": {name: over_median(states["delta"].sel(irm=name).values) for name in irms},
            "cancelled": {name: states["cancelled"].sel(irm=name).values[:, index].tolist() for name in irms},
        }


def read_runs(folders: Sequence[str | Path]) -> dict[str, tuple[Path, Recipe]]:
    """Runs by name, tone and seed, in their order; untrained ones are left out."""
    found: dict[str, tuple[Path, Recipe]] = {}
    for folder in map(Path, folders):
        if not (folder / RECIPE_FILE).is_file():
            raise RealignerError(f"{folder}: has no {RECIPE_FILE}; explain needs a run's folder, for what it trains again")
        recipe = read_recipe(folder / RECIPE_FILE)
        if recipe.steps == 0:
            continue
        name = f"{recipe.tone or folder.name}-{recipe.seed}"
        same = sum(other == name or other.startswith(f"{name} (") for other in found)
        found[f"{name} ({same + 1})" if same else name] = (folder, recipe)
    if not found:
        raise UsageError("explain: no trained IRM is given")
    return found


def _network(host: PreTrainedModel, folder: Path) -> IRM:
    model = load_irm(host, folder)
    network = tuner_of(model).registry.network("default")
    model.unload()
    return network.eval()


def _untrained(host: PreTrainedModel, recipe: Recipe) -> IRM:
    """The network of a run as it was before training."""
    text = host.config.get_text_config(decoder=True)
    set_seed(recipe.seed)
    network = recipe.shape.build(int(text.hidden_size), int(text.num_hidden_layers))
    return network.to(next(host.parameters()).device).eval()


def _score(states: xr.Dataset, irm: str) -> np.ndarray:
    magnitude = states["delta"].sel(irm=irm).values
    return leading_score(magnitude[~np.isnan(magnitude).all(axis=1)])
