"""The loss: cross-entropy in nats over the targets, and the paper's L1 term over the deltas."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from torch import nn

from realigner.chat_format import IGNORED
from realigner.injection import ActiveIRM
from realigner.tuner import IRMModel


def row_losses(model: nn.Module, inputs: dict[str, torch.Tensor], only_where_needed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed cross-entropy (nats) and number of targets of each row, ``[batch]`` each.

    Args:
        model: anything that gives logits.
        inputs: a `Collator`'s batch.
        only_where_needed: the model takes ``logits_to_keep``: logits are computed at positions where some row has a target, and
            nowhere else. With a vocabulary of 50,000 that is a third of a step on a CPU.
    """
    targets = inputs["shift_labels"]
    options: dict[str, Any] = {"use_cache": False}
    if only_where_needed:
        kept = (targets != IGNORED).any(dim=0).nonzero()[:, 0]
        options["logits_to_keep"] = kept
        targets = targets[:, kept]
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], **options).logits
    chosen = targets != IGNORED
    each = torch.nn.functional.cross_entropy(logits[chosen].float(), targets[chosen], reduction="none")
    rows = chosen.nonzero()[:, 0]
    sums = torch.zeros(len(targets), dtype=each.dtype, device=each.device).index_add(0, rows, each)
    return sums, chosen.sum(dim=1)


def takes_logits_to_keep(host: nn.Module) -> bool:
    """Whether a host computes logits where it is told to."""
    return "logits_to_keep" in signature(host.forward).parameters


class DeltaSum:
    """Sums |delta| over the layers, neurons and tokens of a forward, with gradients: the paper's L1 term.

    Padding does not count, unless `mask` says so.
    """

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
