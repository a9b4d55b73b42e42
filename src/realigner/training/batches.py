"""Rows as batches: split and encode them, choose which rows make a step, pad them."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, Sampler

from realigner.chat_format import IGNORED, ChatFormat
from realigner.data.data_split import Split, split_rows
from realigner.data.dataset_rows import EVERY_TONE, Row, rows_hash, tone_label
from realigner.data.tokens import Example, clip, encoded
from realigner.errors import RealignerError, UsageError
from realigner.hosts import positions_of
from realigner.training.recipe import Recipe

_POOL = 50  # batches' worth of rows that are sorted by length together


@dataclass(frozen=True)
class Prepared:
    """Rows that are ready to be trained on."""

    rows: Sequence[Row]  # all of them
    split: Split  # by group
    train: list[Example]  # train, validation: encoded and cut (`tokens.encoded`), in the split's order
    validation: list[Example]
    ids: list[str]  # of the row that each example of `train` comes from
    cut: int  # how many examples were longer than the recipe allows
    skips_thought: bool = False  # whether replies stand after empty thoughts (`ChatFormat.skips_thought`)
    validation_tones: Sequence[str] = ()  # of the row that each example of `validation` comes from, where there are several

    @property
    def tone(self) -> str:
        """`tone_label` of all rows."""
        return tone_label(self.rows)

    @cached_property
    def sha256(self) -> str:
        """`rows_hash` of all rows."""
        return rows_hash(self.rows)

    @property
    def tokens_sha256(self) -> str:
        """sha256 over the tokens and labels, which tells when a chat template encodes the same rows differently."""
        digest = hashlib.sha256()
        for item in (*self.train, *self.validation):
            read = [item[key] for key in ("input_ids", "labels", "teacher_ids") if key in item]
            digest.update(json.dumps(read).encode() + b"\n")
        return digest.hexdigest()

    def texts(self) -> Iterator[tuple[str, list[int]]]:
        """Each example's name, for messages, and its tokens."""
        names = [f"row {name!r}" for name in self.ids] + ["a row for validation"] * len(self.validation)
        for name, example in zip(names, (*self.train, *self.validation), strict=True):
            yield name, example["input_ids"]

    @property
    def longest(self) -> int:
        """Tokens of the longest row, for the teacher too."""
        return max(
            len(ids) for item in (*self.train, *self.validation) for ids in (item["input_ids"], item.get("teacher_ids", ()))
        )

    @property
    def most_targets(self) -> int:
        """Targets of the row that has most of them: logits are computed for no more positions."""
        return max(sum(label != IGNORED for label in item["labels"]) for item in (*self.train, *self.validation))

    def facts(self) -> dict[str, Any]:
        """The entry ``data`` of run.json."""
        tones = {part: Counter(row.tone for row in getattr(self.split, part)) for part in ("train", "validation")}
        several = {"tones": {part: dict(sorted(own.items())) for part, own in tones.items()}} if len(tones["train"]) > 1 else {}
        return {
            "rows": len(self.rows),
            **several,
            "sha256": self.sha256,
            "tokens_sha256": self.tokens_sha256,
            "train": len(self.train),
            "validation": len(self.validation),
            "test": len(self.split.test),
            "validation_groups": sorted({row.group for row in self.split.validation}),
            "cut": self.cut,
        }


def prepare(
    rows: Sequence[Row],
    tokenizer: Any,
    config: Any,
    recipe: Recipe,
    prompted: Mapping[str, Example] | None = None,
    split: Split | None = None,
) -> Prepared:
    """Split and encode rows, and refuse what cannot be trained on.

    Args:
        rows: from two groups or more; of one tone, unless the recipe's is ``all``.
        tokenizer: the host's.
        config: the host's (for its numbers of positions and layers).
        recipe: how the rows are split and encoded.
        prompted: row id -> what the teacher reads, for rows whose replies are a teacher's. It ends in the same reply tokens,
            which are labelled in ``teacher_labels`` of the row's example, beside ``teacher_ids``.
        split: the parts of the rows; None: as given by the recipe's shares and seed.

    Raises:
        UsageError: when the rows are of several tones, or a layer is named that the host does not have.
        RealignerError: when there are too few rows or groups, or a row is longer than the host has positions.
    """
    tones = sorted({row.tone for row in rows})
    if len(tones) != 1 and recipe.tone != EVERY_TONE:
        some = ", ".join(tones[:10]) + (f" and {len(tones) - 10:,} more" if len(tones) > 10 else "")
        raise UsageError(
            f"rows are of {len(tones):,} tones ({some}); choose one (tone), or train on all of them (tone={EVERY_TONE})"
        )
    if (depth := getattr(config.get_text_config(decoder=True), "num_hidden_layers", None)) is not None:
        recipe.shape.resolved_layers(int(depth))
    if split is None:
        split = split_rows(rows, recipe.seed, recipe.validation, recipe.test, by_tone=len(tones) > 1)
    elif not split.train or not split.validation:
        raise UsageError("split: its parts train and validation need a row or more each")
    chat_format = ChatFormat(tokenizer, recipe.template, recipe.chat_template_kwargs)
    prompted = prompted or {}

    def examples(row: Row) -> Iterator[tuple[Row, Example]]:
        loss_on = "reply" if row.id in prompted else recipe.loss_on  # a teacher has said nothing else
        return encoded(chat_format, [row], loss_on, recipe.loss_on_thought)

    parts = [
        [(row, to_last_label(item)) for row in part for _, item in examples(row)] for part in (split.train, split.validation)
    ]
    if len(parts[0]) < recipe.batch_size:
        raise RealignerError(
            f"rows left to train on: {len(parts[0])}, fewer than batch_size {recipe.batch_size}; give more rows, or set "
            f"batch_size={len(parts[0])}"
        )
    cut = sum(len(item["input_ids"]) > recipe.max_length for part in parts for _, item in part)
    train, validation = (clip([item for _, item in part], [row for row, _ in part], recipe.max_length) for part in parts)
    for item, (row, _) in zip((*train, *validation), (*parts[0], *parts[1]), strict=True):
        if row.id in prompted:
            item |= _for_teacher(item, prompted[row.id])

    if (positions := positions_of(config)) is not None:
        limit = f"the host has {positions} positions; set max_length={positions}"
        if recipe.loss_on_padding and recipe.max_length > positions:
            raise RealignerError(f"rows are padded to {recipe.max_length} tokens, {limit}")
        for item, (row, _) in zip((*train, *validation), (*parts[0], *parts[1]), strict=True):
            if (tokens := max(len(item["input_ids"]), len(item.get("teacher_ids", ())))) > positions:
                raise RealignerError(f"row {row.id!r}: {tokens} tokens, {limit} to cut it")
    skips_thought = any(chat_format.skips_thought(row.conversation) for row in split.train)
    ids, validation_tones = [row.id for row, _ in parts[0]], [row.tone for row, _ in parts[1]] if len(tones) > 1 else []
    return Prepared(rows, split, train, validation, ids, cut, skips_thought, validation_tones)


def _for_teacher(example: Example, prompted: Example) -> Example:
    """What the teacher reads, cut where the reply was cut in the example."""
    targets = [sum(label != IGNORED for label in item["labels"]) for item in (example, prompted)]
    stop = len(prompted["input_ids"]) - (targets[1] - targets[0])
    return {"teacher_ids": prompted["input_ids"][:stop], "teacher_labels": prompted["labels"][:stop]}


def to_last_label(example: Example) -> Example:
    """An example without what follows its last label (a template's line break), on which nothing depends."""
    stop = 1 + max(at for at, label in enumerate(example["labels"]) if label != IGNORED)
    return {key: values[:stop] for key, values in example.items()}


@dataclass(eq=False)
class SeededLengthSampler(Sampler[int]):
    """Rows in an order that depends on the seed and the epoch and on nothing else, rows of like length side by side.

    The rows are shuffled, dealt into pools of 50 batches, sorted by length within each, and cut into batches, whose order is
    shuffled. The incomplete last batch is dropped; which rows varies by epoch. (transformers' LengthGroupedSampler leaves the
    batches of a pool sorted, and draws from the global random state.)
    """

    lengths: Sequence[int]  # tokens of each row
    batch_size: int  # rows a step, over all processes
    seed: int  # of the order
    epoch: Callable[[], int]  # gives the number of the epoch that begins

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


@dataclass(eq=False)
class EncodedRows(Dataset[dict[str, Any]]):
    """Encoded rows, each with its number, so that a step can name its rows."""

    encoded: Sequence[dict[str, list[int]]]

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {**self.encoded[row], "row": row}


@dataclass(frozen=True)
class Collator:
    """Collates rows into a batch, padded on the right to the longest, with the target of each position.

    ``shift_labels [batch, position]`` holds at position t the label at t + `label_shift`, or -100 where there is no target.
    If rows have a teacher, ``taught [batch]`` says which, and ``teacher_*`` hold the teacher's inputs for those rows, in order.
    """

    pad: int  # the padding token
    label_shift: int = 1  # 1, or 2 as in the reference code
    # pad to this length, and let the padding count in the loss, as in the reference code; None: do not
    pad_to: int | None = None

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = self._batch([row["input_ids"] for row in rows], [row["labels"] for row in rows])
        taught = [row for row in rows if "teacher_ids" in row]
        if taught:
            teacher = self._batch([row["teacher_ids"] for row in taught], [row["teacher_labels"] for row in taught])
            batch |= {f"teacher_{key}": value for key, value in teacher.items()}
            batch["taught"] = torch.tensor(["teacher_ids" in row for row in rows])
        return {**batch, "rows": torch.tensor([row["row"] for row in rows])}

    def _batch(self, ids: Sequence[Sequence[int]], labels: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
        tokens = [torch.tensor(row) for row in ids]
        batch = {
            "input_ids": self._stack(tokens, self.pad),
            "attention_mask": self._stack([torch.ones_like(row) for row in tokens], 0),
            "labels": self._stack([torch.tensor(row) for row in labels], IGNORED if self.pad_to is None else self.pad),
        }
        targets = torch.full_like(batch["labels"], IGNORED)
        targets[:, : -self.label_shift] = batch["labels"][:, self.label_shift :]
        # "shift_labels" is the name under which Trainer counts the tokens that a loss is a mean over.
        return {**batch, "shift_labels": targets}

    def _stack(self, rows: list[torch.Tensor], value: int) -> torch.Tensor:
        stacked = pad_sequence(rows, batch_first=True, padding_value=value)
        missing = (self.pad_to or 0) - stacked.shape[1]
        return torch.nn.functional.pad(stacked, (0, missing), value=value) if missing > 0 else stacked
