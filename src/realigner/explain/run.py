"""Why this index? All of it in one call: measure, ablate, train again, conclude."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from transformers import PreTrainedModel, set_seed

from realigner.analysis.runs import leading_score
from realigner.analysis.tables import plain, records
from realigner.console import say
from realigner.errors import RealignerError, UsageError
from realigner.explain.ablate import against_controls, control_indices, delta_ablations
from realigner.explain.measure import delimiter_ids, measure_host
from realigner.explain.predict import correlations, explained, measurement_table, weight_table
from realigner.explain.rows import Rows
from realigner.explain.trials import FULL, QUICK, Bench, Outcome, say_budget, trial_table
from realigner.explain.verdict import (
    CAUSES,
    UNUSUAL,
    Conclusion,
    Evidence,
    conclude,
    index_facts,
    is_channel,
    is_unusual,
    masked_loss,
)
from realigner.explain.weights import head_tokens, weights_of
from realigner.files import write_text
from realigner.irm import IRM
from realigner.training.folder import RECIPE_FILE, read_run
from realigner.training.guards import prepare, shape_of
from realigner.training.recipe import Recipe, read_recipe
from realigner.training.run import recipe_rows
from realigner.tuner import load_irm, tuner_of

RESULT_FILE = "explain.json"
UNTRAINED = "untrained"


@dataclass(frozen=True)
class Effort:
    """How much is done.

    Attributes:
        rows: of each IRM's own validation rows that are measured on and that losses are taken on.
        random, matched: control indices of each ablation.
        hows: which ablations.
        trials: trainings of each kind; edits of a gain and a residual that are ordinary are left out.
        steps: of each trial at most; None: as many as the run took.
    """

    rows: int
    random: int
    matched: int
    hows: tuple[Any, ...]
    trials: dict[str, int]
    steps: int | None


EFFORTS = {
    "quick": Effort(24, 20, 10, ("zero",), QUICK, 50),
    "full": Effort(64, 100, 20, ("zero", "mean", "keep"), FULL, None),
}


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
        correlations: see `predict.correlations`.
        explained: see `predict.explained`.
        measured: see `predict.measurement_table`.
        profiles: layer by layer at the index: ``residual``, ``delta`` of each IRM, both over the layer's median, ``cancelled``.
        pages: the index and other leading ones -> ``facts`` (as of the index), ``up``, ``down`` (see `head_tokens`).
        irms: name -> folder.
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
    correlations: pd.DataFrame
    explained: Mapping[str, Mapping[str, float]]
    measured: pd.DataFrame
    profiles: dict[str, Any]
    pages: dict[int, dict[str, Any]]
    irms: dict[str, str]
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
            "conclusions": [conclusion.to_dict() for conclusion in self.conclusions],
            **found,
            "trials": None if self.trials is None else records(self.trials),
            "ablations": {irm: records(table) for irm, table in self.ablations.items()},
            "explained": plain(self.explained),
            "profiles": plain(self.profiles),
            "pages": {str(index): page | {"facts": records(page["facts"])} for index, page in self.pages.items()},
            "measured": {str(name): plain(self.measured[name].round(12).tolist()) for name in self.measured},
        }


def explain(
    folders: Sequence[str | Path],
    out: str | Path,
    host: PreTrainedModel,
    tokenizer: Any,
    index: int | None = None,
    quick: bool = False,
    trials: bool = True,
    on: str = "here",
    workers: int = 1,
    quiet: bool = False,
    steps: int | None = None,
) -> Explanation:
    """Ask why an index leads in IRMs of one host.

    Finished trials in `out` are not trained again, so the same call goes on where it was killed.

    Args:
        folders: of trained runs (from `train`): their recipes say what to train again, the first one's which rows.
        out: the folder of trials, and of ``explain.json``.
        host, tokenizer: the bare host that they were made for.
        index: of the residual stream; None: the one that leads over all of them.
        quick: a small effort: see `EFFORTS`.
        trials: whether to train again.
        on, workers: where trials are trained; see `run_sweep`.
        quiet: show no progress.
        steps: of each trial at most; None: see `EFFORTS`.

    Raises:
        RealignerError: when a folder is no run's, its rows are gone, or a trial failed or was interrupted.
        UsageError: for an index that the host does not have.

    Example:
        >>> found = explain(["runs/anger-42"], "why", host, tokenizer, quick=True)  # doctest: +SKIP
        >>> found.words  # doctest: +SKIP
        'Index 270 of smollm2-135m-instruct: none of the causes that were tested.'
    """
    effort = EFFORTS["quick" if quick else "full"]
    effort = effort if steps is None else replace(effort, steps=steps)
    runs = _read(folders)
    irms = {name: _network(host, folder) for name, (folder, _) in runs.items()}
    encoded = {name: _encoded(recipe, tokenizer, host.config, effort.rows) for name, (_, recipe) in runs.items()}
    width = next(iter(irms.values())).hidden_size
    if index is not None and not 0 <= index < width:
        raise UsageError(f"explain: --index {index}: this host has indices 0 to {width - 1}")
    pad = tokenizer.pad_token_id or 0
    states = measure_host(
        host,
        Rows([row for rows in encoded.values() for row in rows], pad, batch_size=8),
        {**irms, UNTRAINED: _untrained(host, next(iter(runs.values()))[1])},
        delimiter_ids(tokenizer),
        quiet,
    )
    measured = measurement_table(weights_of(host), states)
    scores = {str(name): _score(states, str(name)) for name in states["irm"].values}
    together = np.exp(np.mean([np.log(scores[name] + 1e-12) for name in runs], axis=0))
    chosen = int(together.argmax()) if index is None else index
    facts = index_facts(measured, chosen)
    if not quiet:
        say(f"index {chosen}: {together[chosen]:.2f} times the median over {len(runs)} IRMs")
    first = next(iter(runs))
    leading = _leading(chosen, {name: scores[name] for name in runs})
    ablations = {
        name: _ablated(host, folder, Rows(encoded[name], pad), leading, states, scores, name, effort, quiet)
        for name, (folder, _) in runs.items()
    }
    outcomes: list[Outcome] = []
    if trials:
        recipe = _trial_recipe(runs[first][1], effort)
        bench = Bench(Path(out), host, tokenizer, recipe, chosen, on, workers, quiet)
        asked = bench.trials(_asked(effort, facts))
        if not quiet:
            say_budget(asked, _seconds_a_step(runs[first][0]))
        outcomes = bench.run(asked, Rows(encoded[first], pad))
    evidence = Evidence(
        chosen,
        width,
        _standings(scores, list(runs), chosen),
        facts,
        trial_table(outcomes) if outcomes else None,
        {name: {how: against_controls(table, how) for how in effort.hows} for name, table in ablations.items()},
        _masked(outcomes),
        {"IRMs": explained(measured, together), UNTRAINED: explained(measured, scores[UNTRAINED])},
    )
    cause, conclusions = conclude(evidence)
    found = Explanation(
        host=_name(host),
        index=chosen,
        cause=cause,
        conclusions=conclusions,
        facts=facts,
        standings=evidence.standings,
        trials=evidence.trials,
        ablations=ablations,
        correlations=correlations(measured, {"IRMs": together, UNTRAINED: scores[UNTRAINED]}),
        explained=evidence.explained,
        measured=measured,
        profiles=_profiles(states, chosen),
        pages=_pages(host, tokenizer, measured, leading),
        irms={name: str(folder) for name, (folder, _) in runs.items()},
        quick=quick,
    )
    Path(out).mkdir(parents=True, exist_ok=True)
    write_text(Path(out) / RESULT_FILE, json.dumps(found.to_dict(), indent=2) + "\n")
    return found


def weights_report(host: PreTrainedModel | str | Path, index: int | None = None, count: int = 5) -> dict[str, Any]:
    """What weights alone say of an index, or of those that are furthest out of the ordinary; a checkpoint is never loaded.

    Args:
        host: in memory, or a folder with config.json and safetensors.
        index: None: the `count` indices whose reach (head's column times gain) is furthest from the median, in ratio.

    Returns:
        ``host, model_type, norm, tied, neurons, layers``, and ``indices``: each with ``index``, ``words`` and ``facts``.

    Raises:
        RealignerError: naming the file or tensor that is missing or damaged.
        UsageError: for an index that the host does not have.
    """
    weights = weights_of(host)
    table, width = weight_table(weights), weights.sizes["neuron"]
    if index is not None and not 0 <= index < width:
        raise UsageError(f"explain: --index {index}: this host has indices 0 to {width - 1}")
    looked = next(table[name] for name in ("head_reach", "final_gain", "head_norm", "embedding_norm") if name in table)
    size = looked.to_numpy(dtype=float)
    apart = np.abs(np.log(np.maximum(size, 1e-30) / np.median(size)))
    chosen = [index] if index is not None else np.argsort(-apart, kind="stable")[:count].tolist()
    entries = []
    for number in chosen:
        facts = index_facts(table, number)
        odd = facts[(facts["times_median"] >= UNUSUAL) | (facts["times_median"] <= 1 / UNUSUAL)]
        told = [f"{about} {times:.2g} times the median" for about, times in zip(odd["about"], odd["times_median"], strict=True)]
        words = "; ".join(told) or "nothing out of the ordinary"
        entries.append({"index": number, "words": words, "facts": records(facts)})
    facts_of = {key: weights.attrs[key] for key in ("host", "model_type", "norm", "tied")}
    return {**facts_of, "neurons": width, "layers": weights.sizes["layer"], "indices": entries}


def _read(folders: Sequence[str | Path]) -> dict[str, tuple[Path, Recipe]]:
    """Runs by name, tone and seed, in their order; untrained ones are left out."""
    found: dict[str, tuple[Path, Recipe]] = {}
    for folder in map(Path, folders):
        if not (folder / RECIPE_FILE).is_file():
            raise RealignerError(f"{folder}: has no {RECIPE_FILE}; explain needs a run's folder, for what it trains again")
        recipe = read_recipe(folder / RECIPE_FILE)
        if recipe.steps == 0:
            continue
        name = f"{recipe.tone or folder.name}-{recipe.seed}"
        found[name if name not in found else f"{name}-{folder.resolve().name}"] = (folder, recipe)
    if not found:
        raise UsageError("explain: no trained IRM is given")
    return found


def _network(host: PreTrainedModel, folder: Path) -> IRM:
    model = load_irm(host, folder)
    network = tuner_of(model).bank.network("default")
    model.unload()
    return network.eval()


def _untrained(host: PreTrainedModel, recipe: Recipe) -> IRM:
    """The network of a run as it was before training."""
    text = host.config.get_text_config(decoder=True)
    set_seed(recipe.seed)
    network = shape_of(recipe).build(int(text.hidden_size), int(text.num_hidden_layers))
    return network.to(next(host.parameters()).device).eval()


def _encoded(recipe: Recipe, tokenizer: Any, config: Any, rows: int) -> list[dict[str, list[int]]]:
    """Some of a run's validation rows, evenly over all of them."""
    prepared = prepare(recipe_rows(recipe), tokenizer, config, recipe)
    whole = prepared.validation
    picked = np.unique(np.linspace(0, len(whole) - 1, min(rows, len(whole))).round().astype(int))
    return [whole[int(row)] for row in picked]


def _score(states: xr.Dataset, irm: str) -> np.ndarray:
    magnitude = states["delta"].sel(irm=irm).values
    return leading_score(magnitude[~np.isnan(magnitude).all(axis=1)])


def _standings(scores: dict[str, np.ndarray], irms: Sequence[str], index: int) -> pd.DataFrame:
    rows = []
    for name in irms:
        score = scores[name]
        rank = int((score >= score[index]).sum())
        rows.append({"irm": name, "rank": rank, "ratio": float(score[index]), "leader": int(score.argmax())})
    return pd.DataFrame(rows)


def _leading(index: int, scores: Mapping[str, np.ndarray], each: int = 5, most: int = 12) -> list[int]:
    """The index in question, then the leading ones of every IRM, first ranks first."""
    ranked = [np.argsort(-score, kind="stable")[:each].tolist() for score in scores.values()]
    return list(dict.fromkeys([index, *(own[place] for place in range(each) for own in ranked if place < len(own))]))[:most]


def _pages(host: PreTrainedModel, tokenizer: Any, measured: pd.DataFrame, indices: Sequence[int]) -> dict[int, dict[str, Any]]:
    words = head_tokens(host, tokenizer, indices)
    return {index: {"facts": index_facts(measured, index), **words.get(index, {})} for index in indices}


def _ablated(
    host: PreTrainedModel,
    folder: Path,
    rows: Rows,
    leading: Sequence[int],
    states: xr.Dataset,
    scores: dict[str, np.ndarray],
    name: str,
    effort: Effort,
    quiet: bool,
) -> pd.DataFrame:
    index = leading[0]
    controls = control_indices(scores[name], index, effort.random, effort.matched, np.random.default_rng(index))
    controls["leading"] = list(leading[1:])
    model = load_irm(host, folder)
    try:
        layers = list(tuner_of(model).bank.network("default").layers)
        mean = states["delta_mean"].sel(irm=name).values[layers]
        return delta_ablations(model, rows, index, mean, controls, effort.hows, quiet=quiet)
    finally:
        model.unload()


def _asked(effort: Effort, facts: pd.DataFrame) -> dict[str, int]:
    """The trials that can say something about this index."""
    seen, channel = is_unusual(facts, "final_gain") or is_unusual(facts, "head_norm"), is_channel(facts)
    says = {"gain": seen, "no channel": channel, "ordinary": seen and channel}
    return {kind: count for kind, count in effort.trials.items() if says.get(kind, True)}


def _trial_recipe(recipe: Recipe, effort: Effort) -> Recipe:
    if recipe.host is None or recipe.data is None:
        raise RealignerError("explain: the run was trained on a host or rows made in Python; only --no-trials can be asked")
    if effort.steps is None or (recipe.steps is not None and recipe.steps <= effort.steps):
        return recipe
    return recipe.changed(steps=effort.steps)


def _seconds_a_step(folder: Path) -> float | None:
    run = read_run(folder)
    return run["seconds"] / run["steps_done"] if run.get("steps_done") else None


def _masked(outcomes: Sequence[Outcome]) -> dict[str, float]:
    references = {outcome.trial.seed: outcome for outcome in outcomes if outcome.trial.kind == "reference"}
    pairs = [
        (outcome.losses, references[outcome.trial.seed].losses)
        for outcome in outcomes
        if outcome.trial.kind == "masked" and outcome.trial.seed in references
    ]
    if not pairs:
        return {}
    return masked_loss(pairs, [outcome.losses for outcome in references.values()], outcomes[0].counts)


def _profiles(states: xr.Dataset, index: int) -> dict[str, Any]:
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


def _name(host: PreTrainedModel) -> str:
    from realigner.hosts import host_name

    return Path(host_name(host) or type(host).__name__).name
