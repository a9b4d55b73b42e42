"""Encoded rows in batches of similar length, for measuring hosts and computing losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import nn

from realigner.training.batches import Collator
from realigner.training.loss import row_losses, takes_logits_to_keep
from realigner.tuner import tuner_of


class ExampleBatches:
    """Encoded rows (``input_ids`` and ``labels`` of each, from `data.tokens.encode_rows`) as batches.

    Attributes:
        batches: as `Collator` makes them.
    """

    def __init__(self, encoded: Sequence[Mapping[str, Sequence[int]]], pad: int, batch_size: int = 16) -> None:
        self.order = sorted(range(len(encoded)), key=lambda row: len(encoded[row]["input_ids"]))
        collate = Collator(pad)
        items = [{**encoded[row], "row": row} for row in self.order]
        self.batches = [collate(items[start : start + batch_size]) for start in range(0, len(items), batch_size)]

    def losses(self, model: nn.Module) -> tuple[np.ndarray, np.ndarray]:
        """Summed loss in nats and number of targets of each row ``[row]``."""
        device = next(model.parameters()).device
        host = tuner_of(model).model if hasattr(model, "peft_config") else model
        keep = takes_logits_to_keep(host)
        sums, counts = [], []
        with torch.no_grad():
            for batch in self.batches:
                total, count = row_losses(model, {name: tensor.to(device) for name, tensor in batch.items()}, keep)
                sums.append(total.double().cpu().numpy())
                counts.append(count.cpu().numpy())
        back = np.argsort(self.order)
        return np.concatenate(sums)[back], np.concatenate(counts)[back]
