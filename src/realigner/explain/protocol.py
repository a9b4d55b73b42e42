"""Why this index? All of it in one call: measure, ablate, train again, conclude."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
from transformers import PreTrainedModel

from realigner.console import say
from realigner.errors import RealignerError
from realigner.explain.ablate import against_controls
from realigner.explain.explanation import Explanation
from realigner.explain.index_study import Case, read_runs
from realigner.explain.predict import correlations, explained, gain_to_be_seen_as_the_median
from realigner.explain.trials import FULL, QUICK, Bench, Outcome, say_budget, trial_table
from realigner.explain.verdict import Evidence, conclude, index_facts, is_channel, is_seen_oddly, masked_loss
from realigner.files import made_folder
from realigner.hosts import host_name
from realigner.traces.layout import UNTRAINED
from realigner.training.recipe import Recipe
from realigner.training.run_dir import read_run


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
        folders: of trained runs (from `train`); the one in which the index has its best rank is trained again.
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
    case = Case(host, tokenizer, read_runs(folders), effort.rows, quiet)
    if trials and any(recipe.host is None for _, recipe in case.runs.values()):
        raise RealignerError("explain: a run was trained on a host made in Python and cannot be trained again; see --no-trials")
    made_folder(out)
    chosen = case.chosen(index)
    leader = case.best_at(chosen)
    recipe = _trial_recipe(case.runs[leader][1], effort, host) if trials else None
    if not quiet:
        say(f"index {chosen}: {case.together[chosen]:.2f} times the median over {len(case.runs)} IRMs")
    leading = case.leading(chosen)
    ablations = {name: case.ablated(name, leading, effort.random, effort.matched, effort.hows) for name in case.runs}
    host_ablation = case.ablated_host(leading, effort.random)
    facts = index_facts(case.measured, chosen)
    outcomes: list[Outcome] = []
    refused: dict[str, str] = {}
    if recipe is not None:
        taken = frozenset(own.seed for _, own in case.runs.values())
        gain = gain_to_be_seen_as_the_median(case.measured, chosen)
        bench = Bench(Path(out), host, tokenizer, recipe, chosen, gain, taken, on, workers, quiet)
        asked = bench.trials(_asked(effort, facts))
        if not quiet:
            say_budget(asked, _seconds_a_step(case.runs[leader][0]))
        outcomes, refused = bench.run(asked, case.rows_of), bench.refused
    scores = {"IRMs": case.together, UNTRAINED: case.scores[UNTRAINED]}
    evidence = Evidence(
        index=chosen,
        width=len(case.together),
        standings=case.standings(chosen),
        facts=facts,
        trials=trial_table(outcomes) if outcomes else None,
        ablated={
            name: {how: against_controls(table, how) | {"size": case.likeness(name, chosen, table)} for how in effort.hows}
            for name, table in ablations.items()
        },
        host=against_controls(host_ablation, "zero"),
        masked=_masked(outcomes),
        explained={name: explained(case.measured, score) for name, score in scores.items()},
        shorter=_share_of_steps(recipe, case.runs[leader][0]),
        refused=refused,
    )
    cause, conclusions = conclude(evidence)
    found = Explanation(
        host=case.name,
        index=chosen,
        cause=cause,
        conclusions=conclusions,
        facts=facts,
        standings=evidence.standings,
        trials=evidence.trials,
        ablations=ablations,
        host_ablation=host_ablation,
        correlations=correlations(case.measured, scores),
        explained=evidence.explained,
        measured=case.measured,
        profiles=case.profiles(chosen),
        pages=case.pages(leading),
        irms={name: str(folder) for name, (folder, _) in case.runs.items()},
        dtype=str(host.dtype).removeprefix("torch."),
        quick=quick,
    )
    found.save(out)
    return found


def _asked(effort: Effort, facts: pd.DataFrame) -> dict[str, int]:
    """The trials that can say something about this index."""
    seen, channel = is_seen_oddly(facts), is_channel(facts)
    worth = {"gain": seen, "no channel": channel, "ordinary": seen and channel}
    return {kind: count for kind, count in effort.trials.items() if worth.get(kind, True)}


def _trial_recipe(recipe: Recipe, effort: Effort, host: PreTrainedModel) -> Recipe:
    """What trials train: the run's recipe, on the host that was given."""
    recipe = recipe.changed(host=host_name(host) or None)
    if effort.steps is None or (recipe.steps is not None and recipe.steps <= effort.steps):
        return recipe
    return recipe.changed(steps=effort.steps)


def _share_of_steps(recipe: Recipe | None, folder: Path) -> float:
    """Trials' steps over the run's, at most 1."""
    done = read_run(folder).get("steps_done")
    return 1.0 if recipe is None or recipe.steps is None or not done else min(1.0, recipe.steps / done)


def _seconds_a_step(folder: Path) -> float | None:
    run = read_run(folder)
    return run["seconds"] / run["steps_done"] if run.get("steps_done") else None


def _masked(outcomes: Sequence[Outcome]) -> dict[str, float]:
    references = {outcome.trial.seed: outcome for outcome in outcomes if outcome.trial.kind == "reference"}
    masked = [outcome for outcome in outcomes if outcome.trial.kind == "masked" and outcome.trial.seed in references]
    if not masked:
        return {}
    pairs = [(outcome.losses, references[outcome.trial.seed].losses, outcome.counts) for outcome in masked]
    return masked_loss(pairs, [(outcome.losses, outcome.counts) for outcome in references.values()])
