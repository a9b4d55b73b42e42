"""Training on a task's rows, for every method that is not an IRM's run: the same batches, order, steps, schedule and loss."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from realigner.console import Task as ProgressTask, progress
from realigner.data import Row, Split
from realigner.evaluation.method_protocol import Job
from realigner.evaluation.task import Task
from realigner.hosts import text_config
from realigner.training.batches import Prepared, prepare
from realigner.training.callbacks import DivergenceGuard
from realigner.training.host_checks import check_tokens
from realigner.training.trainer import RowTrainer, trainer_arguments

_LAST = 20  # steps whose losses are averaged


def rows_of(task: Task) -> tuple[list[Row], Split]:
    """The rows of a run, and their parts: all of ``task.train`` is trained on, ``task.tune`` is for the validation loss."""
    train, tune = list(task.train), list(task.tune)
    return train + tune, Split(train, tune, [])


def prepared_rows(job: Job) -> Prepared:
    """A task's rows, encoded."""
    rows, split = rows_of(job.task)
    prepared = prepare(rows, job.tokenizer, job.host.config, job.recipe, split=split)
    check_tokens(prepared.texts(), job.tokenizer, job.host.config)
    return prepared


def train_on_rows(model: nn.Module, job: Job, frozen: Sequence[nn.Module]) -> dict[str, Any]:
    """Train the parameters of a model that want gradients; the weights of the last step stay.

    Args:
        model: the host with something to be trained.
        job: the rows and the recipe.
        frozen: the host's own modules, which stay in evaluation mode.

    Returns:
        Entries of the method's record; losses in nats per token, those of validation at the start and the end.

    Raises:
        RealignerError: when the rows cannot be trained on, or the loss diverges.
    """
    prepared, recipe = prepared_rows(job), job.recipe
    cpu = next(job.host.parameters()).device.type in ("cpu", "meta")
    with tempfile.TemporaryDirectory() as work:
        arguments = trainer_arguments(recipe, len(prepared.train), Path(work), cpu, resuming=True)
        arguments.eval_strategy, arguments.save_strategy = IntervalStrategy.NO, SaveStrategy.NO

        def row_ids() -> list[str]:
            return [prepared.ids[int(row)] for rows in trainer.step_rows for row in rows]

        with progress(f"training {job.folder.name}", arguments.max_steps) as bar:
            guard = DivergenceGuard(Path(work), int(text_config(job.host).vocab_size), row_ids)
            trainer = RowTrainer(
                model, prepared, recipe, arguments, job.tokenizer, job.host, frozen, callbacks=[guard, _Steps(bar)]
            )
            trainer.remove_callback(PrinterCallback)
            before = trainer.evaluate()["eval_loss"]
            trainer.train()
            after = trainer.evaluate()["eval_loss"]
    model.eval()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry][-_LAST:]
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        "rows": len(prepared.train),
        "steps": trainer.state.global_step,
        "tokens": int(trainer.tokens),
        "training_loss": round(sum(losses) / len(losses), 4),
        "validation_loss": [round(before, 4), round(after, 4)],
    }


class _Steps(TrainerCallback):  # type: ignore[misc]
    """Moves a progress bar."""

    def __init__(self, bar: ProgressTask) -> None:
        self._bar = bar

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar.advance()
