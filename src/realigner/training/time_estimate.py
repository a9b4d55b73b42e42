"""How long a run will take: two forwards of the host are timed, and the rest is counted."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from realigner.chat_format import IGNORED
from realigner.training.batches import Collator, Prepared
from realigner.training.loss import row_losses, takes_logits_to_keep
from realigner.training.recipe import Recipe
from realigner.training.teacher import REPLY_TOKENS, TOGETHER, Teacher
from realigner.training.trainer import EVALUATION_ROWS, evaluation_every
from realigner.tuner import tuner_of

_STEP, _RECOMPUTED = 2.3, 1.0  # forwards that a step takes (no weight of the host has a gradient); more with checkpointing
_GENERATE = 1.4  # forwards of one position that a token takes: cache, sampling
_USUAL = 0.7  # tokens of a teacher's reply, as a share of the most that it may have


@dataclass(frozen=True)
class Size:
    """Average size and number of the rows of a run.

    Attributes:
        length, targets: tokens of a row, and how many of them have a loss.
        teacher_length: tokens that the teacher reads of it; 0 where there is none.
        train, validation: rows.
    """

    length: int
    targets: int
    teacher_length: int
    train: int
    validation: int


def size_of(material: Prepared | Teacher, recipe: Recipe) -> Size:
    """The size of what is learned; a guess, where the teacher's replies are not there yet."""
    if isinstance(material, Prepared):
        rows = material.train
        targets = sum(label != IGNORED for item in rows for label in item["labels"])
        length = sum(len(item["input_ids"]) for item in rows)
        return Size(length // len(rows), max(1, targets // len(rows)), 0, len(rows), len(material.validation))
    targets, count = round(_USUAL * REPLY_TOKENS), len(material.lengths)
    own, instructed = (round(sum(lengths) / count) + targets for lengths in zip(*material.lengths, strict=True))
    held_out = round(recipe.validation * material.wanted)
    return Size(own, targets, instructed, max(1, material.wanted - held_out), held_out)


def estimated_seconds(model: nn.Module, recipe: Recipe, size: Size, steps_left: int, replies_left: int = 0) -> float:
    """Rough estimate of the seconds that a run still takes, on one process.

    Args:
        model: the host with the IRM.
        recipe: how it is trained.
        size: of what is learned.
        steps_left: steps that are not done yet.
        replies_left: replies that a teacher has yet to sample.
    """
    tuner = tuner_of(model)
    keep, device = takes_logits_to_keep(tuner.model), next(p.device for p in model.parameters() if p.device.type != "meta")

    def row(length: int) -> dict[str, object]:
        start = max(1, length - size.targets)
        return {"input_ids": [1] * length, "labels": [IGNORED] * start + [1] * (length - start), "row": 0}

    rows = max(1, recipe.batch_size // recipe.accumulate)
    batch = {name: tensor.to(device) for name, tensor in Collator(0)([row(max(2, size.length))] * rows).items()}
    token = torch.ones((TOGETHER if replies_left else EVALUATION_ROWS, 1), dtype=torch.long, device=device)
    with torch.no_grad():
        forward = _timed(lambda: row_losses(model, batch, keep), device) / rows
        one = _timed(lambda: model(input_ids=token, use_cache=False), device) * _GENERATE
    teacher = forward * size.teacher_length / max(1, size.length)
    step = recipe.batch_size * (forward * (_STEP + _RECOMPUTED * recipe.gradient_checkpointing) + teacher)
    evaluations = math.ceil(steps_left / evaluation_every(recipe, size.train)) + 1
    evaluation = size.validation * (forward + teacher) + recipe.samples * one
    replying = math.ceil(replies_left / TOGETHER) * REPLY_TOKENS * one + replies_left * (forward + teacher)
    return steps_left * step + evaluations * evaluation + replying


def time_line(seconds: float) -> str:
    """One line for people."""
    if seconds < 45:
        return "time: less than a minute"
    minutes = round(seconds / 60)
    hours = f"{seconds / 3600:.1f} hours" if minutes >= 90 else f"{minutes} minute{'s' * (minutes > 1)}"
    return f"time: about {hours}"


def _timed(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call's second time; the first warms up."""
    for _ in range(2):
        _wait(device)
        start = time.monotonic()
        call()
        _wait(device)
    return time.monotonic() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
