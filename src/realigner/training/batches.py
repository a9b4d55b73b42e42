"""Rows as batches: which rows make a step, and what a batch looks like."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, Sampler

from realigner.data.tokens import IGNORED

_POOL = 50  # batches' worth of rows that are sorted by length together


class SeededLengthSampler(Sampler[int]):
    """Rows in an order that depends on the seed and the epoch and on nothing else, rows of like length side by side.

    The rows are shuffled, dealt into pools of 50 batches, sorted by length within each, and cut into batches, whose order is
    shuffled. What does not fill a last batch sits the epoch out (other rows every time). transformers' sampler of this name
    leaves the batches of a pool sorted, and draws from the global random state.

    Args:
        lengths: tokens of each row.
        batch_size: rows a step, over all processes.
        seed: of the order.
        epoch: gives the number of the epoch that begins.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int, epoch: Callable[[], int]) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, epoch

    def __len__(self) -> int:
        return len(self.lengths) // self.batch_size * self.batch_size

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + 1_000_003 * self.epoch())
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        pool = _POOL * self.batch_size
        batches = []
        for start in range(0, len(order), pool):
            rows = sorted(order[start : start + pool], key=lambda row: -self.lengths[row])
            batches += [rows[at : at + self.batch_size] for at in range(0, len(rows), self.batch_size)]
        batches = [batch for batch in batches if len(batch) == self.batch_size]
        for at in torch.randperm(len(batches), generator=generator).tolist():
            yield from batches[at]


class EncodedRows(Dataset[dict[str, Any]]):
    """Encoded rows, each with its number, so that a step can name its rows."""

    def __init__(self, encoded: Sequence[dict[str, list[int]]]) -> None:
        self.encoded = encoded

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {**self.encoded[row], "row": row}


@dataclass(frozen=True)
class Collator:
    """Rows as a batch, padded on the right to the longest, and what each position is to predict.

    ``targets [batch, position]`` holds at position t the token at t + `label_shift`, or -100 where that counts for nothing.

    Attributes:
        pad: the padding token.
        label_shift: 1, or 2 as in the reference code.
        pad_to: pad to this length, and let the padding count in the loss, as in the reference code; None: do not.
    """

    pad: int
    label_shift: int = 1
    pad_to: int | None = None

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        ids = [torch.tensor(row["input_ids"]) for row in rows]
        labels = [torch.tensor(row["labels"]) for row in rows]
        mask = [torch.ones_like(row) for row in ids]
        batch = {
            "input_ids": self._stack(ids, self.pad),
            "attention_mask": self._stack(mask, 0),
            "labels": self._stack(labels, IGNORED if self.pad_to is None else self.pad),
        }
        targets = torch.full_like(batch["labels"], IGNORED)
        targets[:, : -self.label_shift] = batch["labels"][:, self.label_shift :]
        # "shift_labels" is the name under which Trainer counts the tokens that a loss is a mean over.
        return {**batch, "shift_labels": targets, "rows": torch.tensor([row["row"] for row in rows])}

    def _stack(self, rows: list[torch.Tensor], value: int) -> torch.Tensor:
        stacked = pad_sequence(rows, batch_first=True, padding_value=value)
        missing = (self.pad_to or 0) - stacked.shape[1]
        return torch.nn.functional.pad(stacked, (0, missing), value=value) if missing > 0 else stacked
