"""Causal tests: train the same recipe with one thing changed, and rank the index again.

Trials run as a sweep, so that a finished one is never trained twice, even after the process was killed. Edited hosts
(`edits`) are written next to them as ordinary folders; the given host is not modified.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

import realigner.explain.edits as edits
from realigner.analysis.per_run import leading_score
from realigner.console import say
from realigner.errors import RealignerError
from realigner.explain.example_batches import ExampleBatches
from realigner.explain.explanation import TrialResult
from realigner.explain.verdict import KINDS
from realigner.fingerprints import weights_hash
from realigner.hosts import load_host
from realigner.injection import ActiveIRM
from realigner.sweep.grid import RunSpec, Sweep, plan
from realigner.sweep.sweep_run import run_sweep
from realigner.traces.summary import DeltaSums
from realigner.training.recipe import Recipe
from realigner.tuner import load_irm, tuner_of

SGD_RATE = 100.0  # times Adam's learning rate: with gradients scaled down to a norm of 1, SGD's steps are as long as that
QUICK = {"reference": 3, "permuted": 1, "gain": 2, "masked": 1, "no channel": 2, "ordinary": 2}
FULL = {**dict.fromkeys(KINDS, 2), "reference": 3, "permuted": 3, "gain": 3, "masked": 3}


@dataclass(frozen=True)
class Trial:
    """One training with one thing changed.

    Attributes:
        kind: of `KINDS`.
        seed: of the training.
        recipe: of the training; for some kinds of trial its `host` is the folder of an edited host.
        permuted_index: the number of the index in question on that host.
        order: index i of the original host is ``order[i]`` there; None: unchanged.
    """

    kind: str
    seed: int
    recipe: Recipe
    permuted_index: int
    order: np.ndarray | None = None


@dataclass(frozen=True)
class Outcome:
    """The measurements of a finished trial.

    Attributes:
        trial: what was trained.
        magnitude: M, the mean |delta| ``[layer, neuron]`` over rows.
        losses: summed loss of each row ``[row]``, and `counts`: its targets.
        bare: the same of its host without the IRM.
    """

    trial: Trial
    magnitude: np.ndarray
    losses: np.ndarray
    counts: np.ndarray
    bare: np.ndarray


@dataclass
class TrialRunner:
    """Trains the trials of one index.

    Attributes:
        out: the folder; trials are in ``runs/``, edited hosts in ``hosts/``.
        host, tokenizer: the unmodified host.
        recipe: of the run to repeat, with the number of steps of a trial; trials do not stop early.
        index: the index in question.
        gain: the final norm's gain at the index in trials of kind ``gain``.
        like: where no gain would do: the index whose head column the index in question is given instead in those trials.
        taken: seeds of the IRMs given, which trials do not repeat.
        on, workers: as in `run_sweep`.
        quiet: show no table.
        refused: kind of trial -> why this host or recipe has none.
    """

    out: Path
    host: PreTrainedModel
    tokenizer: Any
    recipe: Recipe
    index: int
    gain: float | str = "median"
    like: int | None = None
    taken: frozenset[int] = frozenset()
    on: str = "here"
    workers: int = 1
    quiet: bool = False
    refused: dict[str, str] = field(default_factory=dict)

    def trials(self, counts: Mapping[str, int]) -> list[Trial]:
        """The given number of trials of each kind, with the same seeds; none of a kind that is impossible on this host."""
        after = ((self.recipe.seed + n) % 2**32 for n in itertools.count(1))
        seeds = list(itertools.islice((seed for seed in after if seed not in self.taken), max(counts.values(), default=0)))
        alone = {"samples": 0, "report_to": [], "keep": "last", "evaluations": 1}
        alone |= {"evaluations_per_epoch": None, "patience": None}
        found = []
        for kind, count in counts.items():
            try:
                recipes = [self.recipe.changed(seed=seed, **alone, **self._changes(kind)) for seed in seeds[:count]]
            except RealignerError as error:
                self.refused[kind] = str(error)
                continue
            order = self.order() if kind == "permuted" else None
            place = self.index if order is None else int(order[self.index])
            found += [Trial(kind, recipe.seed, recipe, place, order) for recipe in recipes]
        return found

    def _changes(self, kind: str) -> dict[str, Any]:
        depth = int(self.host.config.get_text_config(decoder=True).num_hidden_layers)
        masked = self.recipe.masked or []
        if kind == "masked":
            return {"masked": sorted({*masked, self.index})}
        if kind == "one layer":
            layers, scale = self.recipe.shape.resolved_layers(depth), self.recipe.delta_scale
            middle = len(layers) // 2
            own = {"delta_scale": [scale[middle]]} if isinstance(scale, list) else {}
            return {"layers": [layers[middle]], **own}
        if kind == "sgd":
            return {"optimizer": "sgd", "learning_rate": min(999.0, SGD_RATE * self.recipe.peak_rate)}
        made: dict[str, Callable[[], PreTrainedModel]] = {
            "permuted": lambda: edits.permuted(self.host, self.order().tolist()),
            "gain": lambda: self._seen(self.host),
            "random host": lambda: edits.randomised(self.host, seed=0),
            "no channel": lambda: edits.without_channel(self.host, self.index),
            "ordinary": lambda: self._seen(edits.without_channel(self.host, self.index)),
        }
        if kind not in made:
            return {}
        name = kind.replace(" ", "-") + ("" if kind == "random host" else f"-{self.index}")
        folder = self.out / "hosts" / self.hashed / name
        if not folder.is_dir():
            edits.save_edited(made[kind](), self.tokenizer, folder)
        moved = {"masked": sorted(int(self.order()[index]) for index in masked)} if kind == "permuted" and masked else {}
        return {"host": str(folder.resolve()), **moved}

    def _seen(self, host: PreTrainedModel) -> PreTrainedModel:
        """The host with the index as visible to its head as the median."""
        if self.like is not None:
            return edits.with_column(host, self.index, self.like)
        return edits.with_gain(host, self.index, self.gain)

    @cached_property
    def hashed(self) -> str:
        """Short hash of the host's weights and dtype, which keeps edited versions of different hosts apart."""
        return f"{weights_hash(self.host)[:8]}-{str(self.host.dtype).removeprefix('torch.')}"

    def order(self) -> np.ndarray:
        """The permutation of trials of kind ``permuted``: index i becomes ``order[i]``; the index in question moves."""
        width = int(self.host.config.get_text_config(decoder=True).hidden_size)
        rng = np.random.default_rng(self.index)
        while True:
            order = rng.permutation(width)
            if width < 2 or order[self.index] != self.index:
                return np.asarray(order)

    def run(self, trials: Sequence[Trial], rows_of: Callable[[Recipe], ExampleBatches]) -> list[Outcome]:
        """Train the trials that are not trained yet, and measure all of them.

        A kind with a failed trial is left out, with the reason in `refused`.

        Args:
            trials: from `trials`.
            rows_of: gives the validation rows of a recipe, which its training does not use.

        Raises:
            RealignerError: if a reference failed, or the sweep was interrupted (the same call resumes it).
        """
        planned = [replace(_planned(trial.recipe), varies={"trial": trial.kind, "seed": trial.seed}) for trial in trials]
        folder = self.out / "runs" / _planned(self.recipe).name
        result = run_sweep(planned, folder, self.on, self.workers, quiet=self.quiet, checkpoints=False)
        for trial, run in zip(trials, planned, strict=True):
            if run.name in result.errors:
                self.refused[trial.kind] = f"seed {trial.seed}: {result.errors[run.name]}"
        if "reference" in self.refused:
            raise RealignerError(f"explain: the run cannot be trained again: {self.refused['reference']}")
        made = [(trial, run) for trial, run in zip(trials, planned, strict=True) if trial.kind not in self.refused]
        if any(not (folder / run.name).is_dir() for _, run in made):
            raise RealignerError("explain: interrupted; the same call resumes it")
        rows = {trial.seed: rows_of(trial.recipe) for trial, _ in made}  # trials of a seed split alike
        outcomes = []
        for name, group in itertools.groupby(made, key=lambda pair: pair[0].recipe.host):
            host = self.host
            if name and Path(name).is_relative_to((self.out / "hosts").resolve()):  # an edited one
                host, _ = load_host(name, str(host.dtype).removeprefix("torch."), str(host.device))
            outcomes += [_outcome(host, trial, folder / run.name, rows[trial.seed]) for trial, run in group]
        return outcomes


def _outcome(host: PreTrainedModel, trial: Trial, run: Path, rows: ExampleBatches) -> Outcome:
    """M over the rows' tokens, and the rows' losses with and without the IRM."""
    model = load_irm(host, run)
    sums, masks = DeltaSums(), iter([batch["attention_mask"].bool() for batch in rows.batches])

    def observe(_: ActiveIRM, __: torch.Tensor, delta: torch.Tensor) -> None:
        sums.add(delta.detach()[next(masks).to(delta.device)])

    observers = tuner_of(model).injector.observers
    try:
        observers.append(observe)
        losses, counts = rows.losses(model)
        observers.remove(observe)
        with model.disable_adapter():
            bare, _ = rows.losses(model)
    finally:
        model.unload()
    return Outcome(trial, sums.mean(), losses, counts, bare)


def _planned(recipe: Recipe) -> RunSpec:
    (run,) = plan(Sweep(set=recipe.model_dump()), Path())
    return run


def trial_results(outcomes: Sequence[Outcome]) -> list[TrialResult]:
    """The rank of the index and the losses of each trial; ties count against the index."""
    found = []
    for outcome in outcomes:
        trial, score, targets = outcome.trial, leading_score(outcome.magnitude), outcome.counts.sum()
        leader = int(score.argmax())
        loss, bare = float(outcome.losses.sum() / targets), float(outcome.bare.sum() / targets)
        ratio = float(score[trial.permuted_index])
        found.append(
            TrialResult(
                kind=trial.kind,
                seed=trial.seed,
                place=trial.permuted_index,
                rank=int((score >= ratio).sum()),
                ratio=ratio,
                leader=leader if trial.order is None else int(np.flatnonzero(trial.order == leader)[0]),
                leader_ratio=float(score.max()),
                loss=loss,
                bare_loss=bare,
                learned=bare - loss,
            )
        )
    return found


def say_budget(trials: Sequence[Trial], seconds_a_step: float | None) -> None:
    """Announce how many trials are to be trained, and about how long that takes."""
    steps = sum(trial.recipe.steps or 0 for trial in trials)
    minutes = steps * (seconds_a_step or 0) / 60 + len(trials) * 0.3
    time = f", about {minutes:.0f} minutes at the run's own speed" if seconds_a_step else ""
    say(f"training {len(trials)} trials, {steps} steps in total{time}; finished ones are not repeated")
