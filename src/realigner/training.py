"""One training run: TRL's SFTTrainer over the rows of a tone, ending in a folder that holds the IRM alone.

A run's folder: ``adapter_model.safetensors`` and ``adapter_config.json`` (PEFT's layout), ``run.json`` (what was run: data
hash, split, recipe, seed, versions, losses), ``log.jsonl`` (the losses by step) and ``README.md`` (a model card).
"""

from __future__ import annotations

import json
import platform
import shutil
import time
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from importlib.metadata import version
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import nn
from transformers import PreTrainedModel, TrainerCallback, set_seed

from realigner.console import Task, progress, say
from realigner.data import Row, Split, encode_rows, rows_hash, split_rows
from realigner.data.tokens import IGNORED, clip
from realigner.errors import RealignerError, UsageError
from realigner.files import refuse_existing, write_text, written_folder
from realigner.hosts import fingerprint, weights_hash
from realigner.tuner import CONFIG_FILE, WEIGHTS_FILE, IRMConfig, check_adapter, tuner_of

RUN_FILE = "run.json"
LOG_FILE = "log.jsonl"
CARD_FILE = "README.md"
_FILES = {CONFIG_FILE, WEIGHTS_FILE, RUN_FILE, LOG_FILE, CARD_FILE}


class Recipe(BaseModel):
    """How to train. The default recipe: chat template, loss on the reply only, rows of like length together.

    The learning rate is the compact preset's; the paper's preset wants a hundredth of it (the paper: 1e-4).

    Attributes:
        steps: optimiser steps.
        batch_size: rows a step.
        learning_rate: AdamW's peak; it rises over `warmup` steps and then falls linearly to 0.
        warmup: steps of warm-up.
        weight_decay: AdamW's decay.
        max_length: tokens of a row at most; longer replies are cut.
        validation: share of the rows, by group, held out for the validation loss.
        evaluations: how often the validation loss is taken, besides once before training (the mean over batches of each
            batch's mean, in nats per token).

    Example:
        >>> Recipe(steps=10).learning_rate
        0.01
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: int = Field(default=220, ge=1)
    batch_size: int = Field(default=4, ge=1)
    learning_rate: float = Field(default=1e-2, gt=0, lt=10)
    warmup: int = Field(default=5, ge=0)
    weight_decay: float = Field(default=0.0, ge=0)
    max_length: int = Field(default=256, ge=8)
    validation: float = Field(default=0.1, gt=0, lt=1)
    evaluations: int = Field(default=3, ge=1)


@dataclass(frozen=True)
class Run:
    """A finished (or interrupted) run: its folder, the model with the IRM attached, and what run.json says."""

    folder: Path
    model: PeftModel
    record: dict[str, Any]


def make_recipe(**values: Any) -> Recipe:
    """A `Recipe` from the given values, those that are None left at their defaults.

    Raises:
        UsageError: naming the field.
    """
    try:
        return Recipe(**{key: value for key, value in values.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        raise UsageError(f"{'.'.join(map(str, first['loc']))}: {first['input']!r}: {first['msg'].lower()}") from None


def train(
    host: PreTrainedModel,
    tokenizer: Any,
    rows: Sequence[Row],
    out: str | Path,
    config: IRMConfig | None = None,
    recipe: Recipe | None = None,
    seed: int = 42,
    force: bool = False,
    quiet: bool = False,
) -> Run:
    """Train one IRM on a frozen host and save it.

    The model comes back with the IRM attached (`run.model.unload()` gives the bare host again); when training fails, the host
    is left bare. Ctrl-C ends the training and saves what there is (``"interrupted": true`` in run.json). The host's weights are
    hashed before and after; a difference is an error.

    Args:
        host, tokenizer: from `load_host`.
        rows: rows of one tone, from two groups or more.
        out: the run's folder.
        config: the IRM; the compact preset on all layers when None.
        recipe: the default recipe when None.
        seed: of the initial weights, the split and the order of rows.
        force: replace a run that is there already.
        quiet: show no progress.

    Raises:
        RealignerError: when the rows cannot be split, the place cannot be written, or the host changed.
        UsageError: when the rows are of several tones.

    Example:
        >>> run = train(host, tokenizer, authored("anger"), "runs/anger-42")  # doctest: +SKIP
    """
    out, recipe, config = Path(out), recipe or Recipe(), deepcopy(config) if config else IRMConfig()
    refuse_run(out, force)
    config.tone = tone = _one_tone(rows)
    split = split_rows(rows, seed, validation=recipe.validation)
    if "logits_to_keep" not in signature(host.forward).parameters:
        raise RealignerError(f"{type(host).__name__} takes no logits_to_keep, which training needs; use another host")
    encoded = [encode_rows(tokenizer, part, None) for part in (split.train, split.validation)]
    data = _data_facts(rows, split)
    data["cut"] = sum(len(item["input_ids"]) > recipe.max_length for part in encoded for item in part)
    if data["cut"] and not quiet:
        say(f"{data['cut']} of {len(rows)} rows are longer than {recipe.max_length} tokens and are cut (--max-length)")
    parts = [clip(part, some, recipe.max_length) for part, some in zip(encoded, split, strict=False)]
    before = weights_hash(host)
    forward = host.__dict__.get("forward")
    set_seed(seed)
    model: PeftModel = get_peft_model(host, config)
    started = time.monotonic()
    try:
        with written_folder(out) as aside:
            log, interrupted = _fit(model, tokenizer, parts, recipe, seed, aside.folder, quiet)
            _restore_forward(host, forward)
            steps_done = max((entry["step"] for entry in log), default=0)
            if interrupted and not steps_done:
                raise RealignerError("interrupted before the first step was done; nothing was saved")
            if interrupted and out.exists():  # a finished run is not given up for a part of one
                aside.target = out.with_name(f"{out.name}-interrupted")
                refuse_run(aside.target, force=True)
            if weights_hash(host) != before:
                raise RealignerError("the host's weights changed during training; nothing was saved")
            record = {
                "tone": tone,
                "seed": seed,
                "recipe": recipe.model_dump(),
                "data": data,
                "host": _host_facts(host, before),
                "irm": irm_facts(model),
                "steps_done": steps_done,
                "interrupted": interrupted,
                "validation_loss": [round(e["validation_loss"], 4) for e in log if "validation_loss" in e],
                "seconds": round(time.monotonic() - started, 1),
                "versions": versions(),
            }
            _save(model, record, log, aside.folder)
    except BaseException:
        _restore_forward(host, forward)
        model.unload()
        raise
    return Run(aside.target, model, record)


def _one_tone(rows: Sequence[Row]) -> str:
    tones = sorted({row.tone for row in rows})
    if len(tones) != 1:
        raise UsageError(f"rows are of {len(tones)} tones ({', '.join(tones)}); one IRM learns one: choose with --tone")
    return tones[0]


def _host_facts(host: PreTrainedModel, sha256: str) -> dict[str, str]:
    return {"name": fingerprint(host).name, "dtype": str(host.dtype).removeprefix("torch."), "sha256": sha256}


def _data_facts(rows: Sequence[Row], split: Split) -> dict[str, Any]:
    return {
        "rows": len(rows),
        "sha256": rows_hash(rows),
        "train": len(split.train),
        "validation": len(split.validation),
        "validation_groups": sorted({row.group for row in split.validation}),
    }


def refuse_run(out: Path, force: bool) -> None:
    """Raise unless a run may be written to `out`: it is free, or `force` was given and a run is there."""
    refuse_existing(out, force, _is_run)


def _is_run(folder: Path) -> bool:
    """Whether a folder is an IRM's and holds nothing else."""
    if not (folder / CONFIG_FILE).is_file() or any(path.name not in _FILES for path in folder.iterdir()):
        return False
    try:
        check_adapter(folder)
    except RealignerError:
        return False
    return True


def irm_facts(model: nn.Module, adapter: str = "default") -> dict[str, Any]:
    """The IRM's preset, layers and size, and the host it is attached to, for run.json and reports."""
    tuner = tuner_of(model)
    network = tuner.bank.network(adapter)
    config = tuner.peft_config[adapter]
    return {
        "preset": config.preset,
        "layers": list(network.layers),
        "parameters": sum(p.numel() for p in network.parameters()),
        "host_parameters": sum(p.numel() for p in tuner.model.parameters()),
        "site": tuner.sites.summary(),
    }


def versions() -> dict[str, str]:
    """The versions that decide a result."""
    names = ("realigner", "torch", "transformers", "peft", "trl", "accelerate")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def read_run(folder: str | Path) -> dict[str, Any]:
    """run.json of a run's folder; empty for an adapter that was not made by `train`."""
    path = Path(folder) / RUN_FILE
    if not path.is_file():
        return {}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise RealignerError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(record, dict):
        raise RealignerError(f"{path}: not a JSON object")
    return record


def read_log(folder: str | Path) -> list[dict[str, float]]:
    """The losses by step of a run's folder; empty when it has none."""
    path = Path(folder) / LOG_FILE
    if not path.is_file():
        return []
    entries = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise RealignerError(f"{path}:{number}: not valid JSON ({error})") from None
    return entries


def _fit(
    model: PeftModel, tokenizer: Any, parts: Sequence[Any], recipe: Recipe, seed: int, aside: Path, quiet: bool
) -> tuple[list[dict[str, float]], bool]:
    """Run the trainer; returns the log and whether Ctrl-C ended it."""
    from datasets import Dataset
    from transformers.trainer_callback import PrinterCallback
    from trl import SFTConfig

    arguments = SFTConfig(
        output_dir=str(aside / "trainer"),
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.batch_size,
        per_device_eval_batch_size=8,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=recipe.warmup,
        weight_decay=recipe.weight_decay,
        train_sampling_strategy="group_by_length",
        eval_strategy="steps",
        eval_steps=max(1, -(-recipe.steps // recipe.evaluations)),
        eval_on_start=True,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        gradient_checkpointing=False,
        bf16=False,
        seed=seed,
        data_seed=seed,
        use_cpu=model.device.type == "cpu",
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    with progress("training", recipe.steps, quiet) as task:
        watch = _Watch(task)
        trainer = _trainer_class()(
            model=model,
            args=arguments,
            train_dataset=Dataset.from_list(parts[0]),
            eval_dataset=Dataset.from_list(parts[1]),
            processing_class=tokenizer,
            callbacks=[watch],
        )
        trainer.remove_callback(PrinterCallback)
        interrupted = False
        try:
            trainer.train()
        except KeyboardInterrupt:
            interrupted = True
    model.eval()
    return watch.log, interrupted


def _trainer_class() -> type[Any]:
    """TRL's SFTTrainer, computing logits only where some row has a label (made here because importing TRL is slow).

    TRL's own fused loss projects every position onto the vocabulary, twice, when there is no Triton: a third of a step on a
    CPU. The loss is the same: cross-entropy in nats, summed over the replies' tokens, divided by their number.
    """
    from trl import SFTTrainer

    class ReplyTrainer(SFTTrainer):
        def compute_loss(
            self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            labels = inputs["labels"][:, 1:]
            rest = {key: value for key, value in inputs.items() if key != "labels"}
            kept = (labels != IGNORED).any(dim=0).nonzero()[:, 0]
            outputs = model(**rest, logits_to_keep=kept, use_cache=False)
            labels = labels[:, kept]
            chosen = labels != IGNORED
            total = torch.nn.functional.cross_entropy(outputs.logits[chosen].float(), labels[chosen], reduction="sum")
            loss = total / (chosen.sum() if num_items_in_batch is None else num_items_in_batch)
            return (loss, outputs) if return_outputs else loss

    return ReplyTrainer


class _Watch(TrainerCallback):
    """Keeps the losses and moves the progress bar."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.log: list[dict[str, float]] = []
        self.validation = ""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        logs = logs or {}
        if "eval_loss" in logs:
            self.log.append({"step": state.global_step, "validation_loss": logs["eval_loss"]})
            self.validation = f"  validation {logs['eval_loss']:.2f}"
        elif "loss" in logs:
            self.log.append({"step": state.global_step, "loss": logs["loss"], "learning_rate": logs["learning_rate"]})
            self.task.advance(1, f"loss {logs['loss']:.2f}{self.validation}")


def _restore_forward(host: nn.Module, before: Any) -> None:
    # TRL puts its fused loss into host.forward; the host is to be as it was.
    if before is None:
        host.__dict__.pop("forward", None)
    else:
        host.__dict__["forward"] = before


def _save(model: PeftModel, record: dict[str, Any], log: Sequence[dict[str, float]], folder: Path) -> None:
    shutil.rmtree(folder / "trainer", ignore_errors=True)
    model.save_pretrained(str(folder), save_embedding_layers=False)
    write_text(folder / RUN_FILE, json.dumps(record, indent=2) + "\n")
    write_text(folder / LOG_FILE, "".join(json.dumps(entry) + "\n" for entry in log))
    write_text(folder / CARD_FILE, _card(record))


def _card(record: dict[str, Any]) -> str:
    irm, data, losses = record["irm"], record["data"], record["validation_loss"]
    host = record["host"]["name"] or "a host built from a config"
    fell = f"{losses[0]:.2f} to {losses[-1]:.2f}" if losses else "not taken"
    return f"""---
library_name: peft
base_model: {host}
tags: [realigner, irm, injectable-realignment-model, peft]
---

# {record["tone"]} for {host}

An injectable realignment model (IRM): it reads the host's first post-attention residual and adds a perturbation to the
residual stream of {len(irm["layers"])} layers. The host's weights are unchanged (sha256 `{record["host"]["sha256"][:16]}...`,
the same before and after training).

| | |
| --- | --- |
| tone | {record["tone"]} |
| preset | {irm["preset"]} |
| parameters | {irm["parameters"]:,} ({100 * irm["parameters"] / irm["host_parameters"]:.2f}% of the host) |
| training rows | {data["train"]} (and {data["validation"]} for validation, other topics) |
| steps | {record["steps_done"]}{" (interrupted)" if record["interrupted"] else ""} |
| validation loss | {fell} nats per token |
| seed | {record["seed"]} |

```python
import realigner as ra
from peft import PeftModel

host, tokenizer = ra.load_host("{host}")
model = PeftModel.from_pretrained(host, "path/to/this/folder")
with ra.strength(model, 1.0):
    print(ra.answer(model, tokenizer, ["How do magnets work?"]))
```

Method: Smith et al. 2024, "The Mysterious Case of Neuron 1512", arXiv 2407.03621. Everything about the run is in
`{RUN_FILE}`; the losses by step are in `{LOG_FILE}`.
"""
