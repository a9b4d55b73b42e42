"""Causal tests by training again: the same recipe with one thing changed, and where the index stands then.

Trials go through the sweep, so a finished one is never trained twice, whatever kills the process. Hosts with one thing changed
(`edits`) are written beside them as ordinary folders; the given host is not touched.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from transformers import PreTrainedModel

import realigner.explain.edits as edits
from realigner.analysis.runs import leading_score
from realigner.console import say
from realigner.errors import RealignerError
from realigner.explain.rows import Rows
from realigner.explain.verdict import KINDS
from realigner.fingerprints import weights_hash
from realigner.hosts import load_host
from realigner.injection import ActiveIRM
from realigner.sweep.grid import Planned, Sweep, plan
from realigner.sweep.run import run_sweep
from realigner.training.recipe import Recipe
from realigner.tuner import load_irm, tuner_of

SGD_RATE = 100.0  # times Adam's learning rate: with gradients scaled down to a norm of 1, SGD's steps are as long as that
QUICK = {"reference": 2, "permuted": 1, "gain": 2, "masked": 1, "no channel": 2, "ordinary": 2}
FULL = {**dict.fromkeys(KINDS, 2), "reference": 3, "permuted": 3, "gain": 3, "masked": 3}


@dataclass(frozen=True)
class Trial:
    """One run to be trained.

    Attributes:
        kind: of `KINDS`.
        seed: of the training.
        recipe: how; its host is an edited one's folder for some kinds.
        place: where the index in question is on that host.
        order: index i of the host is ``order[i]`` there; None: where it was.
    """

    kind: str
    seed: int
    recipe: Recipe
    place: int
    order: np.ndarray | None = None

    def index_at(self, place: int) -> int:
        """Which index of the host as it was is at a place of this one's."""
        return place if self.order is None else int(np.flatnonzero(self.order == place)[0])


@dataclass(frozen=True)
class Outcome:
    """What a trial came to.

    Attributes:
        trial: what was trained.
        magnitude: mean size of its deltas ``[layer, neuron]`` over rows.
        losses: summed loss of each row ``[row]``, and `counts`: its targets.
        bare: the same of its host without it.
    """

    trial: Trial
    magnitude: np.ndarray
    losses: np.ndarray
    counts: np.ndarray
    bare: np.ndarray

    @property
    def score(self) -> np.ndarray:
        """How far each index stands out ``[neuron]``."""
        return leading_score(self.magnitude)

    @property
    def rank(self) -> int:
        """The index's place in that, 1 for the leading one; ties count against it."""
        score = self.score
        return int((score >= score[self.trial.place]).sum())


@dataclass
class Bench:
    """Where trials are trained: a folder, a host by name, a recipe.

    Attributes:
        out: the folder: ``runs/`` and ``hosts/`` in it.
        host, tokenizer: the host as it is.
        recipe: of the run in question, with the steps that trials are to take.
        index: the index in question.
        gain: what the trials ``gain`` set the final norm's gain there to.
        taken: seeds of the IRMs given, which trials do not repeat.
        on, workers: as `run_sweep` has them.
        quiet: show no table.
        refused: kind of trial -> why this host or recipe has none.
    """

    out: Path
    host: PreTrainedModel
    tokenizer: Any
    recipe: Recipe
    index: int
    gain: float | str = "median"
    taken: frozenset[int] = frozenset()
    on: str = "here"
    workers: int = 1
    quiet: bool = False
    refused: dict[str, str] = field(default_factory=dict)

    def trials(self, counts: Mapping[str, int]) -> list[Trial]:
        """So many trials of each kind, the first seed of all kinds the same; none of a kind that the host refuses."""
        found = []
        for kind, count in counts.items():
            try:
                found += [self._trial(kind, seed) for seed in self._seeds(count)]
            except RealignerError as error:
                self.refused[kind] = str(error)
        return found

    def _seeds(self, count: int) -> list[int]:
        after = ((self.recipe.seed + n) % 2**32 for n in itertools.count(1))
        return list(itertools.islice((seed for seed in after if seed not in self.taken), count))

    def _trial(self, kind: str, seed: int) -> Trial:
        recipe = self.recipe.changed(seed=seed, samples=0, report_to=[], evaluations=1, keep="last", **self._changes(kind))
        if kind != "permuted":
            return Trial(kind, seed, recipe, self.index)
        order = self.order()
        return Trial(kind, seed, recipe, int(order[self.index]), order)

    def _changes(self, kind: str) -> dict[str, Any]:
        depth = int(self.host.config.get_text_config(decoder=True).num_hidden_layers)
        masked = self.recipe.masked or []
        if kind == "masked":
            return {"masked": sorted({*masked, self.index})}
        if kind == "one layer":
            return {"layers": [depth // 2]}
        if kind == "sgd":
            return {"optimizer": "sgd", "learning_rate": min(999.0, SGD_RATE * self.recipe.learning_rate)}
        made: dict[str, Callable[[], PreTrainedModel]] = {
            "permuted": lambda: edits.permuted(self.host, self.order().tolist()),
            "gain": lambda: edits.with_gain(self.host, self.index, self.gain),
            "random host": lambda: edits.randomised(self.host, seed=0),
            "no channel": lambda: edits.without_channel(self.host, self.index),
            "ordinary": lambda: edits.with_gain(edits.without_channel(self.host, self.index), self.index, self.gain),
        }
        if kind not in made:
            return {}
        name = kind.replace(" ", "-") + ("" if kind == "random host" else f"-{self.index}")
        folder = self.out / "hosts" / self.hashed / name
        if not folder.is_dir():
            edits.save_edited(made[kind](), self.tokenizer, folder)
        moved = {"masked": sorted(int(self.order()[index]) for index in masked)} if kind == "permuted" and masked else {}
        return {"host": str(folder.resolve()), **moved}

    @cached_property
    def hashed(self) -> str:
        """Which host this is, in which precision, in few characters: hosts made of another one are not taken for its."""
        return f"{weights_hash(self.host)[:8]}-{str(self.host.dtype).removeprefix('torch.')}"

    def order(self) -> np.ndarray:
        """The permutation of the trials ``permuted``: index i becomes ``order[i]``, and the one in question moves."""
        width = int(self.host.config.get_text_config(decoder=True).hidden_size)
        rng = np.random.default_rng(self.index)
        while True:
            order = rng.permutation(width)
            if width < 2 or order[self.index] != self.index:
                return np.asarray(order)

    def run(self, trials: Sequence[Trial], rows_of: Callable[[Recipe], Rows]) -> list[Outcome]:
        """Train what is not trained yet, and look at all; a kind of which one failed is left out, and `refused`.

        Args:
            trials: from `trials`.
            rows_of: the validation rows of a recipe, which its training does not see.

        Raises:
            RealignerError: when references fail, or when it was interrupted (the same call goes on).
        """
        planned = [replace(_planned(trial.recipe), varies={"trial": trial.kind, "seed": trial.seed}) for trial in trials]
        folder = self.out / "runs" / _planned(self.recipe).name
        result = run_sweep(planned, folder, self.on, self.workers, quiet=self.quiet)
        for trial, run in zip(trials, planned, strict=True):
            if run.name in result.errors:
                self.refused[trial.kind] = f"seed {trial.seed}: {result.errors[run.name]}"
        if "reference" in self.refused:
            raise RealignerError(f"explain: the run cannot be trained again: {self.refused['reference']}")
        made = [(trial, run) for trial, run in zip(trials, planned, strict=True) if trial.kind not in self.refused]
        if any(not (folder / run.name).is_dir() for _, run in made):
            raise RealignerError("explain: interrupted; the same command goes on from there")
        rows = {trial.seed: rows_of(trial.recipe) for trial, _ in made}  # trials of a seed split alike
        outcomes = []
        for name, group in itertools.groupby(made, key=lambda pair: pair[0].recipe.host):
            host = self._loaded(name)
            outcomes += [_outcome(host, trial, folder / run.name, rows[trial.seed]) for trial, run in group]
        return outcomes

    def _loaded(self, name: str | None) -> PreTrainedModel:
        """The host of a trial, edited or not."""
        if not name or not Path(name).is_relative_to((self.out / "hosts").resolve()):
            return self.host
        return load_host(name, str(self.host.dtype).removeprefix("torch."), str(self.host.device))[0]


def _outcome(host: PreTrainedModel, trial: Trial, run: Path, rows: Rows) -> Outcome:
    model = load_irm(host, run)
    try:
        magnitude, losses, counts = magnitude_and_losses(model, rows)
        with model.disable_adapter():
            bare, _ = rows.losses(model)
    finally:
        model.unload()
    return Outcome(trial, magnitude, losses, counts, bare)


def _planned(recipe: Recipe) -> Planned:
    (run,) = plan(Sweep(set=recipe.model_dump()), Path())
    return run


def magnitude_and_losses(model: Any, rows: Rows) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean size of a model's deltas ``[layer, neuron]`` over the rows' tokens, and the rows' losses and targets."""
    tuner = tuner_of(model)
    total: list[torch.Tensor] = []
    tokens = 0

    def observe(_: ActiveIRM, __: torch.Tensor, delta: torch.Tensor) -> None:
        nonlocal tokens
        real = next(masks)
        tokens += int(real.sum())
        own = delta.detach()[real.to(delta.device)].abs().double().sum(0).cpu()
        total[:] = [own if not total else total[0] + own]

    masks = iter([batch["attention_mask"].bool() for batch in rows.batches])
    tuner.injector.observers.append(observe)
    try:
        losses, counts = rows.losses(model)
    finally:
        tuner.injector.observers.remove(observe)
    return (total[0] / tokens).numpy(), losses, counts


def trial_table(outcomes: Sequence[Outcome]) -> pd.DataFrame:
    """A row a trial: ``kind, seed, place, rank, ratio`` (the index's score, times the median), ``leader`` (by its number in the
    host as it was), ``leader_ratio``, ``loss``, ``bare_loss`` (nats per target, of rows that this trial was not trained on),
    and ``learned`` (what training took off the loss)."""
    entries = []
    for outcome in outcomes:
        score, total = outcome.score, outcome.counts.sum()
        entries.append(
            {
                "kind": outcome.trial.kind,
                "seed": outcome.trial.seed,
                "place": outcome.trial.place,
                "rank": outcome.rank,
                "ratio": float(score[outcome.trial.place]),
                "leader": outcome.trial.index_at(int(score.argmax())),
                "leader_ratio": float(score.max()),
                "loss": float(outcome.losses.sum() / total),
                "bare_loss": float(outcome.bare.sum() / total),
            }
        )
    table = pd.DataFrame(entries)
    return table.assign(learned=table["bare_loss"] - table["loss"])


def say_budget(trials: Sequence[Trial], seconds_a_step: float | None) -> None:
    """What is about to be trained, before it is."""
    steps = sum(trial.recipe.steps or 0 for trial in trials)
    time = (
        f", about {steps * seconds_a_step / 60 + len(trials) * 0.3:.0f} minutes by the run's own speed"
        if seconds_a_step
        else ""
    )
    say(f"training {len(trials)} trials again, {steps} steps in all{time}; finished ones are not repeated")
