"""What is checked before a host is loaded: that the packages are there, and the memory is enough."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import psutil
import torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM

from realigner.console import say
from realigner.errors import RealignerError
from realigner.hosts import resolve_device, resolve_dtype
from realigner.irm import IRMShape
from realigner.training.batches import Prepared
from realigner.training.recipe import Recipe
from realigner.training.teacher import Teacher

_STATE_BYTES = {"adam": 8.0, "adam-8bit": 2.1, "adafactor": 0.1, "sgd": 0.0}  # an optimiser's state, for each parameter


def check_packages(recipe: Recipe) -> None:
    """Raise unless the packages that the recipe asks for are installed."""
    for name in recipe.report_to:
        if find_spec(name) is None:
            raise RealignerError(f"report_to: {name} is not installed; pip install {name}, or set report_to=[]")
    if recipe.instruct is not None and (missing := [name for name in ("datasketch", "sklearn") if find_spec(name) is None]):
        raise RealignerError(
            f"instruct: the filter of the teacher's replies needs packages that are not installed ({', '.join(missing)}); "
            'install them: pip install "realigner[data]"'
        )
    if recipe.optimizer == "adam-8bit" and find_spec("bitsandbytes") is None:
        raise RealignerError("optimizer: adam-8bit needs bitsandbytes; pip install bitsandbytes, or set optimizer=adafactor")


def check_fit(
    prepared: Prepared | Teacher,
    recipe: Recipe,
    config: Any,
    loaded: torch.device | None,
    quiet: bool,
    trust_remote_code: bool = False,
) -> None:
    """Say how many rows are cut and how much memory the training takes (`estimate_memory`); refuse what cannot fit."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    memory = estimate_memory(config, recipe, prepared.longest, prepared.most_targets, processes, loaded, trust_remote_code)
    warning = check_memory(memory, recipe, config)
    if quiet or os.environ.get("RANK", "0") != "0":
        return
    if isinstance(prepared, Prepared) and prepared.cut:
        say(f"{prepared.cut} of {len(prepared.rows)} rows are longer than max_length={recipe.max_length} tokens and are cut")
    say(f"warning: {warning}" if warning else memory.line())


@dataclass(frozen=True)
class Memory:
    """Bytes that training will take, and how many are free. The activations are a rough figure."""

    host: float  # the host's weights
    irm: float  # the IRM's weights, their gradients and the optimiser's state
    activations: float  # what the forward keeps for the backward, logits included
    free: float | None  # on the device, or all over which the host is spread; None if unknown
    irm_parameters: int  # irm_parameters, host_parameters: how many
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
    config: Any,
    recipe: Recipe,
    longest: int,
    targets: int,
    processes: int = 1,
    loaded: torch.device | None = None,
    trust_remote_code: bool = False,
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
        loaded: where the host is, if it is in memory already: then it is not counted against what is free there.
        trust_remote_code: the config may name a class of the host's own code.
    """
    text = config.get_text_config(decoder=True)
    device = resolve_device("auto" if recipe.device == "balanced" else recipe.device)
    if loaded is not None and loaded.type != "meta":  # as parts of an offloaded host are
        device = loaded
    bytes_each = torch.finfo(resolve_dtype(recipe.dtype, device)).bits // 8
    hidden, depth = int(text.hidden_size), int(text.num_hidden_layers)
    inner = getattr(text, "intermediate_size", None) or 4 * hidden
    inner = int(inner[0] if isinstance(inner, (list, tuple)) else inner)
    with init_empty_weights(include_buffers=True):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        host = sum(parameter.numel() for parameter in model.parameters())
    irm = recipe.shape.parameter_count(hidden, depth)
    rows = recipe.batch_size // recipe.accumulate / processes
    if recipe.loss_on_padding:
        longest = targets = recipe.max_length
    layer = (8 * hidden + 4 * inner) * bytes_each + 16 * hidden
    logits = int(text.vocab_size) * (12 + 2 * bytes_each)
    if recipe.instruct is not None:  # the teacher's, and the divergence
        logits += int(text.vocab_size) * (12 + bytes_each)
    inside = layer + 2 * depth * hidden * bytes_each if recipe.gradient_checkpointing else depth * layer
    return Memory(
        host=0.0 if loaded is not None else host * bytes_each,
        irm=irm * _irm_bytes(recipe),
        activations=rows * (longest * (inside + 12 * depth * hidden) + targets * logits),
        free=free_memory(device, recipe.device == "balanced"),
        irm_parameters=irm,
        host_parameters=host,
    )


def _irm_bytes(recipe: Recipe) -> float:
    """For each parameter of the IRM: itself, its gradient, what the optimiser keeps, and the mean of its values."""
    return 8 + _STATE_BYTES[recipe.optimizer] + (4 if recipe.average else 0)


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
        ways.append(f"preset=compact saves {_gib(memory.irm - small * _irm_bytes(recipe.changed(preset='compact')))}")
    if recipe.batch_size // recipe.accumulate > 1:
        ways.append(f"accumulate={recipe.batch_size} saves up to {_gib(memory.activations * (1 - 1 / recipe.batch_size))}")
    if not recipe.gradient_checkpointing:
        ways.append("gradient_checkpointing=true keeps one layer's activations instead of all")
    if recipe.device != "balanced":
        ways.append("or more devices: device=balanced, or accelerate launch")
    if memory.host + memory.irm > memory.free:
        raise RealignerError(f"not enough memory. {memory.line()}. {'; '.join(ways)}")
    return f"{memory.line()}: it may not fit. {'; '.join(ways)}"


def free_memory(device: torch.device, of_all: bool = False) -> float | None:
    """Bytes that are free on a device, or on all GPUs; None if unknown."""
    if device.type == "cpu":
        return float(psutil.virtual_memory().available)
    if device.type == "cuda":
        devices = range(torch.cuda.device_count()) if of_all else [device]
        return float(sum(torch.cuda.mem_get_info(one)[0] for one in devices))
    return None


def _gib(size: float) -> str:
    gib = size / 2**30
    return f"{gib:.0f} GiB" if gib >= 10 else f"{gib:.1f} GiB" if gib >= 0.1 else f"{gib * 1024:.0f} MiB"
