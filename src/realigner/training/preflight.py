"""What is checked before a host is loaded: that the data can be split, that it fits the host's positions and the memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM

from realigner.data import Row, Split, encode_rows, rows_hash, split_rows
from realigner.data.tokens import IGNORED, clip
from realigner.errors import RealignerError, UsageError
from realigner.hosts import resolve_device, resolve_dtype
from realigner.irm import IRMShape
from realigner.training.recipe import Recipe

_STATE_BYTES = {"adam": 8.0, "adam-8bit": 2.1, "adafactor": 0.1, "sgd": 0.0}  # an optimiser's state, for each parameter


@dataclass(frozen=True)
class Prepared:
    """Rows that are ready to be trained on.

    Attributes:
        rows: all of them, of one tone.
        split: by group.
        train, validation: encoded and cut (`encode_rows`), in the split's order.
        cut: how many rows were longer than the recipe allows.
    """

    rows: Sequence[Row]
    split: Split
    train: list[dict[str, list[int]]]
    validation: list[dict[str, list[int]]]
    cut: int

    @property
    def tone(self) -> str:
        return self.rows[0].tone

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(len(item["input_ids"]) for item in (*self.train, *self.validation))

    @property
    def most_targets(self) -> int:
        """Targets of the row that has most of them: logits are computed for no more positions."""
        return max(sum(label != IGNORED for label in item["labels"]) for item in (*self.train, *self.validation))

    def facts(self) -> dict[str, Any]:
        """What run.json says of the data."""
        return {
            "rows": len(self.rows),
            "sha256": rows_hash(self.rows),
            "train": len(self.train),
            "validation": len(self.validation),
            "test": len(self.split.test),
            "validation_groups": sorted({row.group for row in self.split.validation}),
            "cut": self.cut,
        }


def prepare(rows: Sequence[Row], tokenizer: Any, config: Any, recipe: Recipe) -> Prepared:
    """Split and encode rows, and refuse what cannot be trained on.

    Args:
        rows: of one tone, from two groups or more.
        tokenizer: the host's.
        config: the host's (its positions and layers are looked at).
        recipe: how to.

    Raises:
        UsageError: when the rows are of several tones, or a layer is named that the host does not have.
        RealignerError: when there are too few rows or groups, or a row is longer than the host has positions.
    """
    tones = sorted({row.tone for row in rows})
    if len(tones) != 1:
        raise UsageError(f"rows are of {len(tones)} tones ({', '.join(tones)}); an IRM is trained on one: choose it (tone)")
    text = config.get_text_config(decoder=True)
    if (depth := getattr(text, "num_hidden_layers", None)) is not None:
        shape_of(recipe).resolved_layers(int(depth))
    split = split_rows(rows, recipe.seed, validation=recipe.validation, test=recipe.test)
    if len(split.train) < recipe.batch_size:
        raise RealignerError(
            f"{len(split.train)} rows are left to train on, fewer than batch_size {recipe.batch_size}; "
            f"give more rows, or set batch_size={len(split.train)}"
        )
    whole = [encode_rows(tokenizer, part, None, recipe.template, recipe.loss_on) for part in (split.train, split.validation)]
    cut = sum(len(item["input_ids"]) > recipe.max_length for part in whole for item in part)
    train, validation = (clip(part, some, recipe.max_length) for part, some in zip(whole, split, strict=False))
    prepared = Prepared(rows, split, train, validation, cut)
    _check_positions(prepared, getattr(text, "max_position_embeddings", None), recipe)
    return prepared


def _check_positions(prepared: Prepared, positions: Any, recipe: Recipe) -> None:
    if not isinstance(positions, int) or positions <= 0:
        return  # no limit of its own
    if recipe.loss_on_padding and recipe.max_length > positions:
        raise RealignerError(f"rows are padded to {recipe.max_length} tokens, the host has {positions} positions; "
                             f"set max_length={positions}")  # fmt: skip
    for part, rows in ((prepared.train, prepared.split.train), (prepared.validation, prepared.split.validation)):
        for item, row in zip(part, rows, strict=True):
            if len(item["input_ids"]) > positions:
                raise RealignerError(
                    f"row {row.id!r}: {len(item['input_ids'])} tokens, the host has {positions} positions; "
                    f"max_length={positions} cuts it"
                )


def shape_of(recipe: Recipe) -> IRMShape:
    """The network that a recipe asks for."""
    return IRMShape(
        recipe.preset, recipe.layers, recipe.widths, recipe.rank, recipe.output_std, recipe.input_norm, recipe.masked
    )


@dataclass(frozen=True)
class Memory:
    """Bytes that training will take on one device, and how many are free there. The activations are a rough figure.

    Attributes:
        host: the host's weights.
        irm: the IRM's weights, their gradients and the optimiser's state.
        activations: what the forward keeps for the backward, logits included.
        free: on the device; None if unknown.
        irm_parameters, host_parameters: how many.
    """

    host: float
    irm: float
    activations: float
    free: float | None
    irm_parameters: int
    host_parameters: int

    @property
    def total(self) -> float:
        return self.host + self.irm + self.activations

    def line(self) -> str:
        """One line for people."""
        free = "" if self.free is None else f"; {_gib(self.free)} free"
        host = f"host {_gib(self.host)}; " if self.host else ""  # none: it is in memory already
        return (
            f"memory: about {_gib(self.total)} ({host}IRM of {self.irm_parameters:,} parameters with its "
            f"gradients and optimizer {_gib(self.irm)}; activations {_gib(self.activations)}){free}"
        )


def estimate_memory(
    config: Any, recipe: Recipe, longest: int, targets: int, processes: int = 1, loaded: bool = False
) -> Memory:
    """What training by a recipe will take, from the host's config alone.

    The weights are counted exactly. Activations are estimated, for each token and layer, as 8 numbers a neuron and 4 for each
    unit of the MLP in the host's dtype, and 4 a neuron in float32 (norms, deltas), plus the logits; measured on Llama-shaped
    hosts it is within a third.

    Args:
        config: the host's.
        recipe: how.
        longest: tokens of the longest row.
        targets: positions of a row that logits are computed for, at most.
        processes: over which a step's rows are shared.
        loaded: the host is in memory already, and is not counted against what is free.
    """
    text = config.get_text_config(decoder=True)
    device = resolve_device("auto" if recipe.device == "balanced" else recipe.device)
    bytes_each = torch.finfo(resolve_dtype(recipe.dtype, device)).bits // 8
    hidden, depth = int(text.hidden_size), int(text.num_hidden_layers)
    inner = getattr(text, "intermediate_size", None) or 4 * hidden
    inner = int(inner[0] if isinstance(inner, (list, tuple)) else inner)
    with init_empty_weights(include_buffers=True):
        host = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    irm = shape_of(recipe).parameter_count(hidden, depth)
    rows = recipe.batch_size // recipe.accumulate / processes
    if recipe.loss_on_padding:
        longest = targets = recipe.max_length
    layer = (8 * hidden + 4 * inner) * bytes_each + 16 * hidden
    logits = int(text.vocab_size) * (12 + 2 * bytes_each)
    inside = layer + 2 * depth * hidden * bytes_each if recipe.gradient_checkpointing else depth * layer
    return Memory(
        host=0.0 if loaded else host * bytes_each,
        irm=irm * (8 + _STATE_BYTES[recipe.optimizer]),
        activations=rows * (longest * (inside + 12 * depth * hidden) + targets * logits),
        free=free_memory(device),
        irm_parameters=irm,
        host_parameters=host,
    )


def check_memory(memory: Memory, recipe: Recipe, config: Any) -> str | None:
    """A warning where the estimate is more than what is free; None where it fits.

    Raises:
        RealignerError: when the weights and the optimiser alone do not fit, saying what to change.
    """
    if memory.free is None or memory.total <= memory.free:
        return None
    text = config.get_text_config(decoder=True)
    ways = []
    if recipe.optimizer == "adam":
        ways.append(f"optimizer=adafactor saves {_gib(8 * memory.irm_parameters)}")
    if recipe.preset == "paper":
        small = IRMShape(layers=recipe.layers).parameter_count(int(text.hidden_size), int(text.num_hidden_layers))
        ways.append(f"preset=compact saves {_gib(memory.irm - small * (8 + _STATE_BYTES[recipe.optimizer]))}")
    if recipe.batch_size // recipe.accumulate > 1:
        ways.append(f"accumulate={recipe.batch_size} saves up to {_gib(memory.activations * (1 - 1 / recipe.batch_size))}")
    if not recipe.gradient_checkpointing:
        ways.append("gradient_checkpointing=true keeps one layer's activations instead of all")
    ways.append("or more devices: device=balanced, or accelerate launch")
    if memory.host + memory.irm > memory.free:
        raise RealignerError(f"not enough memory. {memory.line()}. {'; '.join(ways)}")
    return f"{memory.line()}: it may not fit. {'; '.join(ways)}"


def free_memory(device: torch.device) -> float | None:
    """Bytes that are free on a device; None if unknown."""
    if device.type == "cpu":
        return float(psutil.virtual_memory().available)
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    return None


def _gib(size: float) -> str:
    gib = size / 2**30
    return f"{gib:.0f} GiB" if gib >= 10 else f"{gib:.1f} GiB" if gib >= 0.1 else f"{gib * 1024:.0f} MiB"
