"""IRMs as methods: ordinary runs of `realigner train`, on the rows of a task or from a sentence, or left untrained."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from realigner.errors import RealignerError
from realigner.evaluation.method_protocol import ADAPTER, QUESTIONS_FILE, Fitted, Job, Method, MethodRecord, restored
from realigner.evaluation.prompting import system_prompts
from realigner.evaluation.row_training import rows_of
from realigner.files import write_text
from realigner.irm import IRMShape
from realigner.training.recipe import PAPER_RATE
from realigner.training.training_run import Run, train
from realigner.tuner import load_irm, strength

_WIDTH_OF_RANK = 8  # a hidden layer's width over the rank, as the compact preset has it


@contextmanager
def irm_attached(host: Any, tokenizer: Any, folder: Path, parameters: int) -> Iterator[Fitted]:
    """A block in which an IRM is on a host.

    Args:
        host, tokenizer: from `load_host`; the host is bare.
        folder: of a method that is an IRM, or of an IRM itself.
        parameters: how many were trained.
    """
    with restored(host):
        model = load_irm(host, folder).eval()
        try:
            yield Fitted(model, tokenizer, parameters, scaled=partial(strength, model))
        finally:
            model.unload()


@dataclass(frozen=True, kw_only=True)
class IRMMethod(Method):
    """An IRM trained on the rows by `training.train`; its run is in ``adapter``, and every command takes it.

    Attributes:
        preset: of its network.
        widths, rank: of its network; the preset's when None.
        steps: those of the recipe when None; 0: the IRM as it is initialised.
    """

    preset: str = "compact"
    widths: tuple[int, ...] | None = None
    rank: int | None = None
    steps: int | None = None

    @property
    def default_rate(self) -> float | None:
        return PAPER_RATE if self.preset == "paper" else None

    @property
    def recipe_keys(self) -> Mapping[str, Any]:
        shape = {"preset": self.preset, "widths": None if self.widths is None else list(self.widths), "rank": self.rank}
        return {key: value for key, value in shape.items() if value is not None} | (
            {} if self.steps is None else {"steps": self.steps, "epochs": None}
        )

    def learn(self, job: Job) -> dict[str, Any]:
        rows, split = rows_of(job.task)
        with restored(job.host):
            return run_facts(train(job.host, job.tokenizer, rows, split=split, recipe=job.recipe, **_place(job)))

    @contextmanager
    def attached(self, host: Any, tokenizer: Any, folder: Path, record: MethodRecord) -> Iterator[Fitted]:
        with irm_attached(host, tokenizer, folder, record.parameters) as fitted:
            yield fitted

    def parameters(self, config: PreTrainedConfig) -> int:
        text = config.get_text_config(decoder=True)
        shape = IRMShape(preset=self.preset, widths=self.widths, rank=self.rank)
        return 0 if self.steps == 0 else shape.parameter_count(text.hidden_size, text.num_hidden_layers)

    def sized(self, config: PreTrainedConfig, parameters: int) -> Method | None:
        """The compact preset's hidden layer and rank, both narrower or wider alike; the paper's shape is what it is."""
        if self.preset == "paper" or self.steps == 0:
            return None
        made: list[Method] = []
        while not made or made[-1].parameters(config) < parameters:
            rank = len(made) + 1
            made.append(replace(self, widths=(_WIDTH_OF_RANK * rank,), rank=rank))
        return min(made[-2:], key=lambda method: abs(method.parameters(config) - parameters))


@dataclass(frozen=True, kw_only=True)
class SentenceIRM(IRMMethod):
    """An IRM that makes a system prompt unnecessary: the host with the prompt teaches it, on the questions of ``task.train``.

    The prompt is that given (`Given.instruct`), else the first of the tone's five. The losses are KL divergences from the
    prompted host, over its replies to questions that the run holds out of those.
    """

    def learn(self, job: Job) -> dict[str, Any]:
        instruct = job.given.instruct or system_prompts(job.task.tone)[0]
        questions = job.folder / QUESTIONS_FILE
        write_text(questions, "".join(row.model_dump_json() + "\n" for row in job.task.train))
        recipe = job.recipe.changed(instruct=instruct, questions=str(questions))
        with restored(job.host):
            run = train(job.host, job.tokenizer, [], recipe=recipe, **_place(job))
            return {**run_facts(run), "instruct": instruct, "teacher": run.record["teacher"]}


def _place(job: Job) -> dict[str, Any]:
    """Where a run goes. One that a killed fit left is gone on with, or, if it had ended, done anew."""
    out = job.folder / ADAPTER
    return {"out": out, "resume": not os.path.lexists(out), "force": os.path.lexists(out)}


def run_facts(run: Run) -> dict[str, Any]:
    """What a method notes of a run, whose IRM is taken off.

    Raises:
        RealignerError: when the run was interrupted.
    """
    run.model.unload()
    record = run.record
    if run.interrupted:
        raise RealignerError(f"{run.folder}: interrupted at step {record['steps_done']}; fit again to go on")
    return {
        "parameters": record["irm"]["parameters"] if record["steps_done"] else 0,
        "rate": record["recipe"]["learning_rate"] if record["steps_done"] else None,
        "rows": record["data"]["train"],
        "steps": record["steps_done"],
        "tokens": record["tokens"],
        "validation_loss": record["validation_loss"],
    }
