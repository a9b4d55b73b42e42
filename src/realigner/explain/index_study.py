"""IRMs of one host measured on their validation rows: scores, ranks and ablations of any index."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from transformers import PreTrainedModel, set_seed

from realigner.analysis.per_run import leading_score
from realigner.data import Row, rows_hash
from realigner.data.dataset_rows import EVERY_TONE
from realigner.errors import RealignerError, UsageError
from realigner.explain.ablate import How, control_indices, delta_ablations, host_ablations
from realigner.explain.example_batches import ExampleBatches
from realigner.explain.explanation import Ablation, AboutIndex, IndexRank, Profiles
from realigner.explain.measure import delimiter_ids, measure_host
from realigner.explain.predict import measurement_table
from realigner.explain.verdict import index_facts
from realigner.explain.weights import head_tokens, weights_of
from realigner.irm_config import check_adapter
from realigner.traces.layout import UNTRAINED
from realigner.training.batches import prepare
from realigner.training.recipe import SCALES, Recipe, read_recipe
from realigner.training.run_dir import RECIPE_FILE, read_run
from realigner.training.training_run import recipe_rows
from realigner.tuner import load_irm, tuner_of


@dataclass(frozen=True)
class IndexStudy:
    """Measurements of several IRMs and their host; made by `IndexStudy.measure`.

    Attributes:
        host, tokenizer: the bare host.
        runs: name -> folder and recipe; from `read_runs`.
        rows: name -> encoded validation rows of the run.
        states: from `measure_host`: over all rows, of all IRMs, and of one before training (`UNTRAINED`).
        measured: from `measurement_table`.
        scores: `leading_score` ``[neuron]`` of each IRM and of the untrained one.
        size: how many of a recipe's validation rows are used, at most.
        quiet: show no progress.
    """

    host: PreTrainedModel
    tokenizer: Any
    runs: Mapping[str, tuple[Path, Recipe]]
    rows: Mapping[str, list[dict[str, list[int]]]]
    states: xr.Dataset
    measured: pd.DataFrame
    scores: Mapping[str, np.ndarray]
    size: int
    quiet: bool

    @classmethod
    def measure(
        cls, host: PreTrainedModel, tokenizer: Any, runs: Mapping[str, tuple[Path, Recipe]], size: int, quiet: bool
    ) -> IndexStudy:
        """Run the forwards and backwards of at most `size` validation rows of each run, and read the host's weights.

        Raises:
            RealignerError: if a run has no file of rows, or it has changed since the training.
        """
        rows, irms = {}, {}
        for name, (folder, recipe) in runs.items():
            if recipe.instruct is not None:
                raise RealignerError(f"{folder}: was trained on an instruction; explain needs a run on a file of rows alone")
            if recipe.data is None:
                raise RealignerError(f"{folder}: was trained on rows made in Python; explain needs a run on a file of rows")
            if recipe.label_shift != 1 or recipe.loss_on_padding:
                raise RealignerError(
                    f"{folder}: was trained with label_shift or loss_on_padding, on another loss than explain measures; "
                    "give another run"
                )
            own = recipe_rows(recipe)
            if (read_run(folder).get("data") or {}).get("sha256") not in (None, rows_hash(own)):
                raise RealignerError(f"{recipe.data}: not the rows that {folder} was trained on; put those there to explain it")
            rows[name] = _some_rows(host, tokenizer, own, recipe, size)
        for name, (folder, _) in runs.items():
            model = load_irm(host, folder)
            irms[name] = tuner_of(model).registry.network("default")
            model.unload()
            irms[name].eval()
        # The first run's network as it was before training.
        _, first = next(iter(runs.values()))
        text = host.config.get_text_config(decoder=True)
        set_seed(first.seed)
        untrained = first.shape.build(int(text.hidden_size), int(text.num_hidden_layers))
        irms[UNTRAINED] = untrained.to(next(host.parameters()).device).eval()
        everything = ExampleBatches([row for own in rows.values() for row in own], tokenizer.pad_token_id or 0, batch_size=8)
        states = measure_host(host, everything, irms, delimiter_ids(tokenizer), quiet)
        measured = measurement_table(weights_of(host), states)
        scores = {name: leading_score(states["delta"].sel(irm=name).dropna("layer", how="all").values) for name in irms}
        return cls(host, tokenizer, runs, rows, states, measured, scores, size, quiet)

    @property
    def mean_score(self) -> np.ndarray:
        """The geometric mean of the IRMs' scores ``[neuron]``."""
        return np.asarray(np.exp(np.mean([np.log(self.scores[name] + 1e-12) for name in self.runs], axis=0)))

    def ranks(self, index: int) -> list[IndexRank]:
        """The rank of an index in each IRM; ties count against it."""
        found = []
        for name in self.runs:
            score = self.scores[name]
            rank = int((score >= score[index]).sum())
            found.append(IndexRank(irm=name, rank=rank, ratio=float(score[index]), leader=int(score.argmax())))
        return found

    def leading(self, index: int, each: int = 5, most: int = 12) -> list[int]:
        """An index, then the leading ones of every IRM, by rank."""
        ranked = [np.argsort(-self.scores[name], kind="stable")[:each].tolist() for name in self.runs]
        return list(dict.fromkeys([index, *(own[place] for place in range(each) for own in ranked if place < len(own))]))[:most]

    def about(self, indices: Sequence[int]) -> dict[int, AboutIndex]:
        """The host's measurements at some indices, and the tokens whose logits each index moves most."""
        words = head_tokens(self.host, self.tokenizer, indices)
        return {index: AboutIndex(facts=index_facts(self.measured, index), **words.get(index, {})) for index in indices}

    def batches(self, run: str) -> ExampleBatches:
        """A run's validation rows in batches."""
        return ExampleBatches(self.rows[run], self.tokenizer.pad_token_id or 0)

    def batches_of(self, recipe: Recipe) -> ExampleBatches:
        """Validation rows of a recipe in batches; which rows these are depends on its seed."""
        rows = _some_rows(self.host, self.tokenizer, recipe_rows(recipe), recipe, self.size)
        return ExampleBatches(rows, self.tokenizer.pad_token_id or 0)

    def ablate(self, run: str, leading: Sequence[int], random: int, matched: int, hows: Sequence[How]) -> list[Ablation]:
        """`delta_ablations` of the first of some leading indices in one IRM; the others are among its controls."""
        index = leading[0]
        controls = control_indices(self.scores[run], index, random, matched, np.random.default_rng(index))
        controls["leading"] = list(leading[1:])
        model = load_irm(self.host, self.runs[run][0])
        try:
            layers = list(tuner_of(model).registry.network("default").layers)
            mean = self.states["delta_mean"].sel(irm=run).values[layers]
            return delta_ablations(model, self.batches(run), index, mean, controls, hows, quiet=self.quiet)
        finally:
            model.unload()

    def ablate_host(self, leading: Sequence[int], random: int) -> list[Ablation]:
        """`host_ablations` at some leading indices and at random ones, on the first run's rows."""
        index, first = leading[0], next(iter(self.runs))
        controls = control_indices(self.scores[first], index, random, 0, np.random.default_rng(index))
        groups = {"random": controls["random"], "leading": leading[1:]}
        return host_ablations(self.host, self.batches(first), index, groups, quiet=self.quiet)

    def size_ratio(self, run: str, index: int, ablations: Sequence[Ablation]) -> float:
        """The median score of an ablation's size-matched controls over that of the index."""
        matched = sorted({entry.index for entry in ablations if entry.group == "matched"})
        return float(np.median(self.scores[run][matched]) / self.scores[run][index]) if matched else float("nan")

    def profiles(self, index: int) -> Profiles:
        """The index layer by layer."""
        states = self.states

        def over_median(values: np.ndarray) -> list[float]:
            return [float(row[index] / np.median(row)) for row in values]

        return Profiles(
            layer=states["layer"].values.tolist(),
            residual=over_median(states["residual"].sel(kind="rest").values),
            gradient=over_median(states["gradient"].values),
            delta={name: over_median(states["delta"].sel(irm=name).values) for name in self.scores},
            cancelled={name: states["cancelled"].sel(irm=name).values[:, index].tolist() for name in self.scores},
        )


def read_runs(folders: Sequence[str | Path]) -> dict[str, tuple[Path, Recipe]]:
    """The trained runs by name (``tone-seed``), in the order given.

    Raises:
        RealignerError: for a folder without a recipe.
        UsageError: if no run is trained.
    """
    found: dict[str, tuple[Path, Recipe]] = {}
    for folder in map(Path, folders):
        if not (folder / RECIPE_FILE).is_file():
            raise RealignerError(f"{folder}: has no {RECIPE_FILE}; explain needs the folder of a run, which it trains again")
        irm = check_adapter(folder)
        scales = {key: irm.get(key) or 1.0 for key in SCALES}  # the same in every trial, whatever its host
        recipe = read_recipe(folder / RECIPE_FILE).changed(**scales)
        if recipe.steps == 0:
            continue
        tone = read_run(folder)["tone"] if recipe.tone == EVERY_TONE else recipe.tone
        name = f"{tone or folder.name}-{recipe.seed}"
        same = sum(other == name or other.startswith(f"{name} (") for other in found)
        found[f"{name} ({same + 1})" if same else name] = (folder, recipe)
    if not found:
        raise UsageError("explain: no trained IRM is given")
    return found


def _some_rows(
    host: PreTrainedModel, tokenizer: Any, rows: Sequence[Row], recipe: Recipe, size: int
) -> list[dict[str, list[int]]]:
    """So many of a recipe's validation rows, evenly spaced."""
    whole = prepare(rows, tokenizer, host.config, recipe).validation
    picked = np.unique(np.linspace(0, len(whole) - 1, min(size, len(whole))).round().astype(int))
    return [whole[int(row)] for row in picked]
