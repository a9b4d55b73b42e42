"""The loss in nats over the targets: cross-entropy, or KL(teacher || student); and the paper's L1 term over the deltas."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from inspect import signature
from typing import Any

import torch
from torch import nn

from realigner.chat_format import IGNORED
from realigner.injection import ActiveIRM
from realigner.settings import Settings
from realigner.tuner import IRMModel


def row_losses(
    model: nn.Module, inputs: dict[str, torch.Tensor], only_where_needed: bool, tuner: IRMModel | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed loss (nats) and number of targets of each row, ``[batch]`` each.

    A row's loss is the cross-entropy of its targets; of a row that has a teacher, KL(teacher || student) over the whole
    vocabulary at each of these positions. The teacher is the bare host, which reads the row's ``teacher_ids``.

    Args:
        model: anything that gives logits.
        inputs: a `Collator`'s batch.
        only_where_needed: the model takes ``logits_to_keep``: logits are computed at positions where some row has a target, and
            nowhere else. With a vocabulary of 50,000 that is a third of a step on a CPU.
        tuner: of the model, for batches with a teacher.
    """
    taught, teacher = inputs.get("taught"), None
    if taught is not None and tuner is not None:
        with torch.no_grad(), bare(tuner):
            logits, targets = _logits(model, inputs, only_where_needed, "teacher_")
            teacher = torch.log_softmax(logits[targets != IGNORED].float(), dim=-1)
            del logits
    logits, targets = _logits(model, inputs, only_where_needed)
    chosen = targets != IGNORED
    rows, predicted = chosen.nonzero()[:, 0], logits[chosen].float()
    if taught is None or teacher is None:
        each = torch.nn.functional.cross_entropy(predicted, targets[chosen], reduction="none")
    else:
        imitates = taught[rows]
        student = torch.log_softmax(predicted[imitates], dim=-1)
        divergence = torch.nn.functional.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=-1)
        entropy = torch.nn.functional.cross_entropy(predicted[~imitates], targets[chosen][~imitates], reduction="none")
        each, rows = torch.cat([divergence, entropy]), torch.cat([rows[imitates], rows[~imitates]])
    sums = torch.zeros(len(targets), dtype=each.dtype, device=each.device).index_add(0, rows, each)
    return sums, chosen.sum(dim=1)


def _logits(
    model: nn.Module, inputs: dict[str, torch.Tensor], only_where_needed: bool, prefix: str = ""
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and the targets at their positions."""
    targets = inputs[f"{prefix}shift_labels"]
    options: dict[str, Any] = {"use_cache": False}
    if only_where_needed:
        kept = (targets != IGNORED).any(dim=0).nonzero()[:, 0]
        options["logits_to_keep"] = kept
        targets = targets[:, kept]
    ids, mask = inputs[f"{prefix}input_ids"], inputs[f"{prefix}attention_mask"]
    return model(input_ids=ids, attention_mask=mask, **options).logits, targets


def bare(tuner: IRMModel) -> AbstractContextManager[None]:
    """A block in which no IRM acts in this thread's calls."""
    return tuner.injector.threads.using(Settings(irms=()))


def takes_logits_to_keep(host: nn.Module) -> bool:
    """Whether a host's forward takes ``logits_to_keep``, to compute logits at chosen positions only."""
    return "logits_to_keep" in signature(host.forward).parameters


class DeltaSum:
    """Sums |delta| over the layers, neurons and tokens of a forward, with gradients: the paper's L1 term.

    Padding does not count, unless `mask` says so.
    """

    in_loss = True

    def __init__(self, tuner: IRMModel) -> None:
        self.tuner = tuner
        self.mask: torch.Tensor | None = None
        self.total: torch.Tensor | None = None
        self.layers = 1

    def __call__(self, active: ActiveIRM, _: torch.Tensor, delta: torch.Tensor) -> None:
        """An observer of the injector: delta ``[batch, position, layer, neuron]``."""
        size = delta.abs().sum(dim=(-2, -1), dtype=torch.float32)
        own = (size if self.mask is None else size * self.mask).sum()
        self.total = own if self.total is None else self.total + own
        self.layers = len(active.irm.layers)

    @contextmanager
    def watching(self, mask: torch.Tensor | None) -> Iterator[DeltaSum]:
        """Watch the forwards of the block; `mask` ``[batch, position]`` is 1 where a token counts."""
        self.mask, self.total = mask, None
        observers = self.tuner.injector.observers
        observers.append(self)
        try:
            yield self
        finally:
            observers.remove(self)

    def mean_by_layer(self) -> torch.Tensor:
        """``sum |delta| / layers``, to be multiplied by the recipe's l1."""
        assert self.total is not None  # a forward came before
        return self.total / self.layers
