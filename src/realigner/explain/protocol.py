"""Explain an index in one call: measure, ablate, train again with one thing changed, conclude."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from realigner.analysis.per_run import leading_score
from realigner.console import say
from realigner.errors import RealignerError
from realigner.explain import verdict
from realigner.explain.ablate import How, against_controls, in_float32
from realigner.explain.explanation import EXPLANATION, RESULT_FILE, Explanation, IndexFact
from realigner.explain.index_study import IndexStudy, read_runs
from realigner.explain.predict import correlations, cross_validated_r2, gain_for_median_reach, index_of_median_reach
from realigner.explain.trials import FULL, QUICK, Outcome, TrialRunner, say_budget, trial_results
from realigner.files import taken
from realigner.hosts import host_name
from realigner.traces.layout import UNTRAINED
from realigner.training.recipe import Recipe
from realigner.training.run_dir import read_run


@dataclass(frozen=True)
class Budget:
    """How much is computed.

    Attributes:
        rows: of each IRM's own validation rows, for measurements and losses.
        random, matched: control indices of each ablation.
        hows: which ablations.
        trials: kind -> number of training runs; edits of a gain or residual are left out where it is ordinary.
        steps: of each trial at most; None: as many as the run took.
    """

    rows: int
    random: int
    matched: int
    hows: tuple[How, ...]
    trials: dict[str, int]
    steps: int | None


BUDGETS = {
    "quick": Budget(24, 20, 10, ("zero",), QUICK, 50),
    "full": Budget(64, 40, 20, ("zero", "mean", "keep"), FULL, None),
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
    force: bool = False,
) -> Explanation:
    """Find out why an index has large deltas in IRMs of one host.

    Finished trials in `out` are not trained again, so repeating an interrupted call resumes it; with `force`, a call with other
    arguments reuses them too.

    Args:
        folders: of trained runs (from `train`); the one in which the index has its best rank is trained again.
        out: the folder for trials and for ``explain.json``.
        host, tokenizer: the bare host that they were made for.
        index: of the residual stream; None: the one with the largest mean score.
        quick: use the smaller of `BUDGETS`.
        trials: whether to train again.
        on, workers: where trials are trained; see `run_sweep`.
        quiet: show no progress.
        steps: of each trial at most; None: see `BUDGETS`.
        force: replace an ``explain.json`` that is there; trials are kept in any case.

    Raises:
        RealignerError: if `out` has an ``explain.json`` or another process is using it, a folder does not hold a run, a run's
            rows are missing, or a trial failed or was interrupted.
        UsageError: for an index that the host does not have.

    Example:
        >>> found = explain(["runs/anger-42"], "why", host, tokenizer, quick=True)  # doctest: +SKIP
        >>> found.words  # doctest: +SKIP
        'Index 270 of smollm2-135m-instruct: none of the causes that were tested.'
    """
    budget = BUDGETS["quick" if quick else "full"]
    budget = budget if steps is None else replace(budget, steps=steps)
    with taken(Path(out) / RESULT_FILE, EXPLANATION, force) as place:
        runs = read_runs(folders)
        if trials and any(recipe.host is None for _, recipe in runs.values()):
            raise RealignerError("explain: a run was trained on a host made in Python and cannot be repeated; see trials=False")
        verdict.check_index(index, int(host.config.get_text_config(decoder=True).hidden_size))
        asked = Question(index, quick, budget, steps, trials, on, workers, quiet)
        explanation = _found(runs, Path(out), host, tokenizer, asked)
        place.write(explanation.text())
    return explanation


@dataclass(frozen=True)
class Question:
    """What is asked of an index, and how much may be computed for it; see `explain`."""

    index: int | None
    quick: bool
    budget: Budget
    steps: int | None
    trials: bool
    on: str
    workers: int
    quiet: bool


def _found(
    runs: Mapping[str, tuple[Path, Recipe]], out: Path, host: PreTrainedModel, tokenizer: Any, asked: Question
) -> Explanation:
    """Measure, ablate, train again, conclude."""
    index, budget, quiet = asked.index, asked.budget, asked.quiet

    # Measure the host and the IRMs: forwards and backwards over validation rows.
    study = IndexStudy.measure(host, tokenizer, runs, budget.rows, quiet)
    mean_score = study.mean_score
    index = int(mean_score.argmax()) if index is None else index
    ranks, facts = study.ranks(index), verdict.index_facts(study.measured, index)
    if not quiet:
        say(f"index {index}: {mean_score[index]:.2f} times the median over {len(runs)} IRMs")

    # Ablate it in every IRM and in the host.
    leading = study.leading(index)
    with in_float32(host) as precision:
        ablations = {name: study.ablate(name, leading, budget.random, budget.matched, budget.hows) for name in runs}
        host_ablation = study.ablate_host(leading, budget.random)

    # Train again with one thing changed.
    folder, recipe = runs[min(ranks, key=lambda own: own.rank).irm]
    outcomes: list[Outcome] = []
    refused: dict[str, str] = {}
    shorter = 1.0
    if asked.trials:
        run = read_run(folder)
        done = run.get("steps_done")
        most = [steps for steps in (done or recipe.steps, budget.steps) if steps is not None]
        recipe = recipe.changed(host=host_name(host) or recipe.host, **({"steps": min(most)} if most else {}))
        shorter = min(1.0, recipe.steps / done) if recipe.steps is not None and done else 1.0
        seeds = frozenset(own.seed for _, own in runs.values())
        runner = TrialRunner(
            out=out,
            host=host,
            tokenizer=tokenizer,
            recipe=recipe,
            index=index,
            gain=gain_for_median_reach(study.measured, index),
            like=index_of_median_reach(study.measured, index),
            taken=seeds,
            on=asked.on,
            workers=asked.workers,
            quiet=quiet,
        )
        planned = runner.trials(_informative(budget, facts))
        if not quiet:
            say_budget(planned, run["seconds"] / done if done else None)
        outcomes, refused = runner.run(planned, study.batches_of), runner.refused

    # Conclude.
    scores = {"IRMs": mean_score, UNTRAINED: study.scores[UNTRAINED]}
    predicted = {name: cross_validated_r2(study.measured, score) for name, score in scores.items()}
    results = trial_results(outcomes) or None
    ablated: dict[str, dict[str, dict[str, float]]] = {
        name: {how: against_controls(own, how) | {"size": study.size_ratio(name, index, own)} for how in budget.hows}
        for name, own in ablations.items()
    }
    spread = _spread(outcomes, index)
    cause, conclusions = verdict.conclude(
        verdict.Evidence(
            index=index,
            width=len(mean_score),
            ranks=ranks,
            facts=facts,
            trials=results,
            ablated=ablated,
            host=against_controls(host_ablation, "zero"),
            masked=_masked(outcomes),
            predicted=predicted,
            spread=spread,
            shorter=shorter,
            refused=refused,
        )
    )
    name = Path(host_name(host) or type(host).__name__).name
    return Explanation(
        host=name,
        irms={run: str(folder) for run, (folder, _) in runs.items()},
        index=index,
        cause=cause,
        words=f"Index {index} of {name}: {verdict.CAUSES[cause]}.",
        quick=asked.quick,
        steps=asked.steps,
        dtype=str(host.dtype).removeprefix("torch."),
        ablated_in=str(precision).removeprefix("torch."),
        conclusions=conclusions,
        facts=facts,
        standings=ranks,
        correlations=correlations(study.measured, scores),
        trials=results,
        spread_sd=spread.sd,
        spread_df=spread.df,
        ablations=ablations,
        host_ablation=host_ablation,
        explained=predicted,
        profiles=study.profiles(index),
        pages=study.about(leading),
        measured={str(column): study.measured[column].round(12).tolist() for column in study.measured},
        folder=out,
    )


def _informative(budget: Budget, facts: Sequence[IndexFact]) -> dict[str, int]:
    """The trials of a budget that can tell something about this index: an ordinary gain or residual is not edited."""
    readout, channel = verdict.has_atypical_readout(facts), verdict.is_channel(facts)
    changes = {"gain": readout, "no channel": channel, "ordinary": readout and channel}
    return {kind: count for kind, count in budget.trials.items() if changes.get(kind, True)}


def _masked(outcomes: Sequence[Outcome]) -> dict[str, float]:
    references = {outcome.trial.seed: outcome for outcome in outcomes if outcome.trial.kind == "reference"}
    masked = [outcome for outcome in outcomes if outcome.trial.kind == "masked" and outcome.trial.seed in references]
    if not masked:
        return {}
    pairs = [(outcome.losses, references[outcome.trial.seed].losses, outcome.counts) for outcome in masked]
    return verdict.masked_loss(pairs, [(outcome.bare - outcome.losses, outcome.counts) for outcome in references.values()])


def _spread(outcomes: Sequence[Outcome], index: int) -> verdict.Spread:
    scores = np.array([leading_score(outcome.magnitude) for outcome in outcomes if outcome.trial.kind == "reference"])
    return verdict.Spread.of(scores, verdict.top_ranks(scores.shape[-1]), index)
