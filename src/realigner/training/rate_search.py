"""`learning_rate: auto`: short runs at rates a factor apart, on the run's own rows, compared by validation loss."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import PeftModel
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

import realigner.training.run_dir as run_dir
from realigner.console import progress, say
from realigner.errors import RealignerError, UsageError
from realigner.hosts import text_config
from realigner.training.batches import Prepared
from realigner.training.recipe import Recipe, read_recipe
from realigner.training.teacher import Teacher
from realigner.training.trainer import IRMTrainer, trainer_arguments
from realigner.tuner import tuner_of

_STEPS = 10  # of each short run; after the warm-up its rate stays at the peak, as it nearly does in a whole run for long
_FACTOR = math.sqrt(10)  # between rates
_MOST = 6  # short runs
_ROWS = 64  # for validation


@dataclass(frozen=True)
class RateSearch:
    """The result of a learning-rate search.

    Attributes:
        rate: the rate that was found.
        start: validation loss without training, in nats per token.
        losses: rate -> validation loss after a short run; infinite where it is not a number.
        steps: of all short runs together.
    """

    rate: float
    start: float
    losses: dict[float, float]
    steps: int

    def to_dict(self) -> dict[str, Any]:
        """The entry ``rate_search`` of run.json."""
        losses = {rate: round(loss, 4) if math.isfinite(loss) else None for rate, loss in sorted(self.losses.items())}
        table = [{"rate": rate, "loss": loss} for rate, loss in losses.items()]
        return {"rate": self.rate, "steps": self.steps, "start": round(self.start, 4), "tried": table}


def check_search(recipe: Recipe) -> None:
    """Raise if a recipe asks for a search that is not possible: with several processes, or under FSDP.

    DDP's hooks stay on the network's gradients when a short run is over, and FSDP's shards take the place of its weights.
    """
    sharded = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true", "yes")
    if recipe.learning_rate == "auto" and (sharded or int(os.environ.get("WORLD_SIZE", "1")) > 1):
        raise UsageError("learning_rate: auto: rates are searched for in one process only; do that, and give the number here")


def settled_rate(
    model: PeftModel, tokenizer: Any, material: Prepared | Teacher, recipe: Recipe, work: Path, resume: bool, quiet: bool
) -> tuple[Recipe, dict[str, Any] | None, str]:
    """The recipe with its learning rate settled; the search that found it, if any (in `work`, or now); and the reason in words.

    A search over what a teacher has yet to reply is left for later (`_taught`).
    """
    width = text_config(tuner_of(model).model).hidden_size
    default = recipe.rate(width)
    earlier = run_dir.read_run(work).get("rate_search") if resume else None
    if recipe.learning_rate != "auto":
        found = earlier if earlier and earlier["rate"] == recipe.learning_rate else None
        usual = f"the default on a host of width {width}" if recipe.learning_rate == default else "as given"
        return recipe, found, "found by the search before" if found else usual
    if recipe.steps == 0:
        return recipe.model_copy(update={"learning_rate": default}), None, "nothing is trained"
    going_on = resume and work.exists()
    if isinstance(material, Teacher) and (not going_on or read_recipe(work / run_dir.RECIPE_FILE).learning_rate == "auto"):
        return recipe, None, "it is searched for when the teacher has replied"
    if going_on:
        if earlier is None:
            raise RealignerError(
                f"{work}: cannot be resumed with learning_rate=auto: its rate was not searched for; leave learning_rate out"
            )
        return recipe.model_copy(update={"learning_rate": earlier["rate"]}), earlier, "found by the search before"
    assert isinstance(material, Prepared)
    found = find_rate(model, tokenizer, material, recipe, default, quiet).to_dict()
    why = f"found by a search of {found['steps']} steps"
    return recipe.model_copy(update={"learning_rate": found["rate"]}), found, why


def find_rate(model: PeftModel, tokenizer: Any, prepared: Prepared, recipe: Recipe, first: float, quiet: bool) -> RateSearch:
    """The learning rate with the lowest validation loss after a few steps; the IRM is afterwards as it was before.

    Args:
        model: with the untrained IRM; it may not be sharded.
        tokenizer, prepared, recipe: of the run.
        first: the rate to begin at.
        quiet: show nothing.
    """
    network = tuner_of(model).registry.network("default")
    untrained = {name: value.detach().to("cpu", copy=True) for name, value in network.state_dict().items()}
    every = math.ceil(len(prepared.validation) / _ROWS)
    rows = replace(prepared, validation=prepared.validation[::every], validation_tones=())
    cpu = next(network.parameters()).device.type == "cpu"
    with TemporaryDirectory() as folder, progress("learning rate", _MOST * _STEPS, quiet) as task:

        def loss_after(steps: int, rate: float) -> float:
            trainer = _trainer(model, tokenizer, rows, recipe, rate, Path(folder), cpu)
            try:
                if steps:
                    trainer.train()
                loss = trainer.evaluate()["eval_loss"]
            finally:
                network.training_dtype = None
                network.zero_grad()
                with torch.no_grad():
                    network.load_state_dict(untrained)
            task.advance(steps, f"loss {loss:.2f} at {rate:g}")
            return float(loss) if math.isfinite(loss) else math.inf

        start = loss_after(0, first)
        rate, losses = descend(lambda rate: loss_after(_STEPS, rate), first, start)
    found = RateSearch(rate, start, losses, _STEPS * len(losses))
    if not quiet:
        tried = ", ".join(f"{loss:.3f} at {rate:g}" for rate, loss in sorted(losses.items()))
        say(f"validation loss after {_STEPS} steps: {tried}; {start:.3f} without training")
    return found


def descend(loss_at: Callable[[float], float], first: float, start: float) -> tuple[float, dict[float, float]]:
    """From `first`, go by factors to where the loss is lowest: down while it is no better than `start`, and then on downhill.

    Returns:
        The rate, and the loss of each that was tried (`_MOST` at most).
    """
    losses: dict[float, float] = {}

    def tried(exponent: int) -> float:
        rate = float(f"{first * _FACTOR**exponent:.3g}")
        if rate not in losses:
            losses[rate] = loss_at(rate)
        return losses[rate]

    at, way = 0, -1
    while len(losses) < _MOST:
        here, there = tried(at), tried(at + way)
        if here >= start or there < here:
            at, way = at + way, way if here < start else -1
        elif at == 0 and way == -1 and len(losses) == 2:
            way = 1
        else:
            break
    return min(losses, key=lambda rate: (losses[rate], rate)), losses


def _trainer(
    model: PeftModel, tokenizer: Any, prepared: Prepared, recipe: Recipe, rate: float, folder: Path, cpu: bool
) -> IRMTrainer:
    changes: dict[str, Any] = {"learning_rate": rate, "steps": _STEPS, "epochs": None, "report_to": []}
    changes |= {"schedule": "exponential", "decay": 1.0}  # constant after the warm-up; Trainer's "constant" has none
    short = recipe.model_copy(update={**changes, "warmup": min(recipe.warmup, _STEPS // 2)})
    arguments = trainer_arguments(short, len(prepared.train), folder, cpu, resuming=True)
    arguments.save_strategy, arguments.eval_strategy = SaveStrategy.NO, IntervalStrategy.NO
    trainer = IRMTrainer(model, prepared, short, arguments, tokenizer=tokenizer)
    for unwanted in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(unwanted)
    return trainer
