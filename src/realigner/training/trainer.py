"""transformers' Trainer with our loss, our order of rows, and checkpoints that are whole or not there.

What is changed, and why: the loss (logits only where a target is; label shift; L1), the validation loss (exact nats per token,
whatever the batches), the order of rows (from seed and epoch alone), and checkpoints (written aside and renamed; the best and
the last kept; safetensors and JSON, where Trainer would pickle, under FSDP too).
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.utils import is_torch_tf32_available

import realigner.training.run_dir as run_dir
from realigner.chat_format import IGNORED
from realigner.errors import RealignerError
from realigner.files import writing
from realigner.irm_config import FILE_PREFIX
from realigner.training.batches import Collator, EncodedRows, Prepared, SeededLengthSampler
from realigner.training.callbacks import TONE_PREFIX
from realigner.training.checkpoint_io import load_tree, random_states, save_tree, set_random_states
from realigner.training.loss import DeltaSum, row_losses, takes_logits_to_keep
from realigner.training.recipe import Recipe
from realigner.training.weight_averaging import average_weights
from realigner.tuner import tuner_of

_SCHEDULES = {"exponential": "constant", "constant": "constant_with_warmup"}  # the first: see create_scheduler
_OPTIMIZERS = {"adam": "adamw_torch_fused", "adam-8bit": "adamw_bnb_8bit", "adafactor": "adafactor", "sgd": "sgd"}
EVALUATION_ROWS = 8
_OPTIMIZER_FILE = "optimizer.safetensors"
_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)  # of sharded weights


def steps_per_epoch(recipe: Recipe, rows: int) -> int:
    """Optimiser steps in a pass over the training rows."""
    return rows // recipe.batch_size


def total_steps(recipe: Recipe, rows: int) -> int:
    """Optimiser steps of the whole run."""
    if recipe.steps is not None:
        return recipe.steps
    assert recipe.epochs is not None  # the recipe has one of them
    return max(1, math.ceil(recipe.epochs * steps_per_epoch(recipe, rows)))


def evaluation_every(recipe: Recipe, rows: int) -> int:
    """Steps between evaluations; there is another after the last step."""
    if recipe.evaluations_per_epoch is not None:
        return max(1, math.ceil(steps_per_epoch(recipe, rows) / recipe.evaluations_per_epoch))
    return max(1, math.ceil(total_steps(recipe, rows) / recipe.evaluations))


def trainer_arguments(recipe: Recipe, rows: int, work: Path, cpu: bool, resuming: bool) -> TrainingArguments:
    """The recipe as Trainer's arguments.

    Raises:
        RealignerError: when a step's rows cannot be shared evenly among the processes.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    share = processes * recipe.accumulate
    if recipe.batch_size % share:
        raise RealignerError(
            f"batch_size {recipe.batch_size} cannot be shared by {processes} processes x accumulate {recipe.accumulate}; "
            f"make it a multiple of {share}"
        )
    arguments = TrainingArguments(
        output_dir=str(work),
        max_steps=total_steps(recipe, rows),
        per_device_train_batch_size=recipe.batch_size // share,
        per_device_eval_batch_size=EVALUATION_ROWS,
        gradient_accumulation_steps=recipe.accumulate,
        optim=_OPTIMIZERS[recipe.optimizer],
        learning_rate=recipe.peak_rate,
        lr_scheduler_type=_SCHEDULES.get(recipe.schedule, recipe.schedule),
        warmup_steps=recipe.warmup,
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        eval_strategy="steps",
        eval_steps=evaluation_every(recipe, rows),
        eval_on_start=not resuming,
        metric_for_best_model="loss",
        greater_is_better=False,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=recipe.save_every or 10**9,
        report_to=[name for name in recipe.report_to if name != "tensorboard"],
        run_name=work.name.removesuffix(".unfinished"),
        disable_tqdm=True,
        activation_checkpointing=recipe.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False} if recipe.gradient_checkpointing else None,
        torch_compile=recipe.compile,
        tf32=recipe.tf32 if is_torch_tf32_available() and not cpu else None,
        bf16=False,
        seed=recipe.seed,
        data_seed=recipe.seed,
        use_cpu=cpu,
        dataloader_pin_memory=not cpu,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # several GPUs are used by several processes, or by layers; never by nn.DataParallel
    return arguments


def products_dtype(recipe: Recipe, host: nn.Module) -> torch.dtype | None:
    """What the IRM's matrix products are computed in while it is trained; None: float32, as its weights are."""
    wanted = recipe.irm_products
    if wanted == "auto":
        wanted = "bfloat16" if next(host.parameters()).dtype == torch.bfloat16 else "float32"
    return torch.bfloat16 if wanted == "bfloat16" else None


@contextmanager
def as_before(objects: Iterable[object], *names: str) -> Iterator[None]:
    """On leaving, these attributes of some objects are again what they were, or missing where they were."""
    found = [(vars(one), {name: vars(one)[name] for name in names if name in vars(one)}) for one in objects]
    try:
        yield
    finally:
        for values, before in found:
            for name in names:
                values.pop(name, None)
            values.update(before)


class RowTrainer(Trainer):
    """Trains any model on prepared rows, with the same row order, schedule, loss and validation loss as an IRM.

    Args:
        model: what is trained; it gives logits as its host does.
        prepared: the rows.
        recipe: how to.
        arguments: the recipe as Trainer's (`trainer_arguments`).
        tokenizer: the host's.
        host: what the model is made of.
        frozen: modules that stay in evaluation mode: a host's dropout is no part of what is compared.
        **options: of Trainer.

    Attributes:
        step_rows: the rows of the last step, as numbers in `prepared.train`.
        tokens: tokens trained on so far, by all processes, padding not counted.
    """

    def __init__(
        self,
        model: nn.Module,
        prepared: Prepared,
        recipe: Recipe,
        arguments: TrainingArguments,
        tokenizer: Any,
        host: nn.Module,
        frozen: Sequence[nn.Module] = (),
        **options: Any,
    ) -> None:
        self._frozen = frozen
        self.recipe = recipe
        self.prepared = prepared
        self.step_rows: list[torch.Tensor] = []
        self.tokens: torch.Tensor | int = 0
        self._only_where_needed = takes_logits_to_keep(host)
        pad = getattr(tokenizer, "pad_token_id", None) or 0
        longest_first = sorted(range(len(prepared.validation)), key=lambda n: -len(prepared.validation[n]["input_ids"]))
        self._tones = np.array([prepared.validation_tones[n] for n in longest_first if prepared.validation_tones])
        self.lr_scheduler: Any = None
        with as_before([host.config], "use_cache"):  # Trainer turns the cache off for good, `row_losses` in each call
            super().__init__(
                model=model,
                args=arguments,
                train_dataset=EncodedRows(prepared.train),
                eval_dataset=EncodedRows([prepared.validation[n] for n in longest_first]),
                data_collator=Collator(pad, recipe.label_shift, recipe.max_length if recipe.loss_on_padding else None),
                compute_metrics=self._validation_losses,
                **options,
            )
        self.model_accepts_loss_kwargs = True  # so that Trainer counts the tokens of a whole step
        self.label_names = ["shift_labels"]

    # The order of rows and the learning rate.

    def _get_train_sampler(self, train_dataset: Any = None) -> SeededLengthSampler:
        lengths = [len(item["input_ids"]) for item in self.prepared.train]
        every = steps_per_epoch(self.recipe, len(lengths))
        return SeededLengthSampler(lengths, self.recipe.batch_size, self.recipe.seed, lambda: self.state.global_step // every)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Trainer's schedules, and the paper's: a factor after each epoch."""
        if self.recipe.schedule == "exponential" and self.lr_scheduler is None:
            every, warmup, decay = steps_per_epoch(self.recipe, len(self.prepared.train)), self.recipe.warmup, self.recipe.decay

            def factor(step: int) -> float:
                return float(min(1.0, (step + 1) / (warmup + 1)) * decay ** (step // every))

            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, factor)
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    # The losses.

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Nats, the mean over the targets of the whole step (all parts, all processes)."""
        for module in self._frozen:
            module.training = False
        self._note(inputs)
        sums, counts = row_losses(model, inputs, self._only_where_needed)
        loss = sums.sum() / (counts.sum() if num_items_in_batch is None else num_items_in_batch)
        scaled: torch.Tensor = loss * self.accelerator.num_processes  # gradients are averaged over the processes
        return scaled

    def _note(self, inputs: dict[str, Any]) -> None:
        self.step_rows.append(inputs["rows"])
        self.tokens = self.tokens + self.accelerator.gather(inputs["attention_mask"].sum()).sum()

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Trainer's, of one part of a step; remembers the rows of the whole step."""
        if len(self.step_rows) >= self.recipe.accumulate:
            self.step_rows.clear()
        loss: torch.Tensor = super().training_step(*args, **kwargs)
        return loss

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[None, torch.Tensor, torch.Tensor]:
        """Each row's summed loss, its number of targets, their weight (1), and whether it has a teacher (0), ``[row, 4]``."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            sums, counts = row_losses(model, inputs, self._only_where_needed)
        found = sums, counts, torch.ones_like(sums), torch.zeros_like(sums)
        return None, torch.stack([part.double() for part in found], dim=1), counts

    def _validation_losses(self, prediction: Any) -> dict[str, float]:
        """Nats per token over all rows, and over those of each tone, where there are several."""
        losses = _nats_per_token(prediction)
        for tone in sorted({*self._tones}):
            sums, counts = np.asarray(prediction.predictions)[self._tones == tone].T[:2]
            losses[f"{TONE_PREFIX}{tone}"] = float(sums.sum() / counts.sum())
        return losses


class IRMTrainer(RowTrainer):
    """Trains the IRM of a PEFT model on prepared rows, or on a teacher's replies, with checkpoints."""

    def __init__(
        self, model: nn.Module, prepared: Prepared, recipe: Recipe, arguments: TrainingArguments, tokenizer: Any, **options: Any
    ) -> None:
        self._tuner = tuner_of(model)
        self._tuner.registry.network("default").training_dtype = products_dtype(recipe, self._tuner.model)
        self._deltas = DeltaSum(self._tuner) if recipe.l1 else None
        super().__init__(model, prepared, recipe, arguments, tokenizer, self._tuner.model, **options)

    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        """Trainer's, which keeps the mean of the weights of the last steps if the recipe wants it (`average`)."""
        made_before = self.optimizer is not None
        optimizer = super().create_optimizer(model)
        if not made_before and (share := self.recipe.average):
            average_weights(optimizer, after=round((1 - share) * self.args.max_steps))
        return optimizer

    # The losses.

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Nats, the weighted mean over the targets of the whole step (all parts, all processes), and the L1 term."""
        self._note(inputs)
        if self._deltas is None:
            sums, counts = row_losses(model, inputs, self._only_where_needed, self._tuner)
        else:
            mask = None if self.recipe.loss_on_padding else inputs["attention_mask"]
            with self._deltas.watching(mask) as deltas:
                sums, counts = row_losses(model, inputs, self._only_where_needed, self._tuner)
        if self.recipe.instruct is not None:
            weights = self._row_weights(inputs)
            sums, counts = weights * sums, weights * counts
        if num_items_in_batch is None:
            num_items_in_batch = counts.sum()
        loss = sums.sum() / num_items_in_batch
        if self._deltas is not None:
            loss = loss + self.recipe.l1 * deltas.mean_by_layer()
        scaled: torch.Tensor = loss * self.accelerator.num_processes  # gradients are averaged over the processes
        return scaled

    def _row_weights(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """What a target of each row counts ``[row]``: 1 for a teacher's, the recipe's `data_weight` for others."""
        weights = torch.full((len(inputs["rows"]),), self.recipe.data_weight, device=inputs["rows"].device)
        return weights if "taught" not in inputs else weights.masked_fill(inputs["taught"], 1.0)

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, torch.Tensor]], device: torch.device) -> Any:
        """Trainer's count of the targets of a whole step; weighted, where some have a teacher."""
        if self.recipe.instruct is None or not batch_samples:
            return super()._get_num_items_in_batch(batch_samples, device)
        counts = [(batch["shift_labels"] != IGNORED).sum(dim=1) * self._row_weights(batch) for batch in batch_samples]
        return self.accelerator.gather(torch.cat(counts).sum().to(device)).sum()

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[None, torch.Tensor, torch.Tensor]:
        """Each row's summed loss, its number of targets, their weight, and whether it has a teacher, ``[row, 4]``."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            sums, counts = row_losses(model, inputs, self._only_where_needed, self._tuner)
        taught = inputs.get("taught", torch.zeros_like(counts))
        weights = torch.ones_like(sums) if self.recipe.instruct is None else self._row_weights(inputs)
        return None, torch.stack([part.double() for part in (sums, counts, weights, taught)], dim=1), counts

    def _evaluate(self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False) -> dict[str, float]:
        metrics: dict[str, float] = super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)
        if self.state.global_step == 0:  # which Trainer does not look at: the untrained IRM may be the best
            self._determine_best_metric(metrics, trial)
        return metrics

    # Checkpoints.

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self.args.should_save and output_dir is not None:  # the IRM alone: no tokenizer, no pickled arguments
            model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
            model.save_pretrained(output_dir, state_dict=state_dict, save_embedding_layers=False)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        work, step, writer = Path(self.args.output_dir), self.state.global_step, self.args.should_save
        folder = run_dir.checkpoint_folder(work, step)
        aside = folder.with_name(f".{folder.name}")
        if writer:
            run_dir.discard_half(aside)
        try:
            with writing(folder):
                if writer:
                    aside.mkdir(parents=True)
                self.accelerator.wait_for_everyone()
                if callable(mean_in_place := getattr(_bare(self.optimizer), "eval", None)):
                    mean_in_place()  # `train` is called by Trainer, before the next step
                self.store_flos()
                self.save_model(str(aside), _internal_call=True)
                self._save_optimizer_and_scheduler(str(aside))
                self._save_rng_state(str(aside))
                if writer:
                    callbacks = [c for c in (*self.callback_handler.callbacks, self.control) if isinstance(c, ExportableState)]
                    self.state.stateful_callbacks = {type(callback).__name__: callback.state() for callback in callbacks}
                    self.state.best_model_checkpoint = None  # found by best_global_step, wherever the run is moved
                    self.state.save_to_json(str(aside / run_dir.STATE_FILE))
                self.accelerator.wait_for_everyone()
                if writer:
                    run_dir.seal(aside)
                    run_dir.discard_checkpoint(folder)
                    aside.rename(folder)
        except BaseException:
            if writer:
                shutil.rmtree(aside, ignore_errors=True)
            raise
        if writer:
            kept_steps = {self.state.global_step, self.state.best_global_step}
            for path in run_dir.checkpoints(work):
                if run_dir.checkpoint_step(path) not in kept_steps:
                    run_dir.discard_checkpoint(path)
        self.accelerator.wait_for_everyone()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        optimizer = self._optimizer_state()
        if self.args.should_save:
            state = {"optimizer": optimizer, "schedule": self.lr_scheduler.state_dict()}
            del state["schedule"]["lr_lambdas"]  # functions; made anew
            state["tokens"] = int(self.tokens)
            save_tree(Path(output_dir, _OPTIMIZER_FILE), state)

    def _optimizer_state(self) -> dict[str, Any]:
        """The optimiser's state; of sharded weights the whole one, gathered from all processes."""
        if not self.is_fsdp_enabled:
            return dict(self.optimizer.state_dict())
        return get_optimizer_state_dict(self.model_wrapped, _bare(self.optimizer), options=_WHOLE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        state = load_tree(Path(checkpoint, _OPTIMIZER_FILE))
        if self.is_fsdp_enabled:
            set_optimizer_state_dict(self.model_wrapped, _bare(self.optimizer), state["optimizer"], options=_WHOLE)
        else:
            self.optimizer.load_state_dict(state["optimizer"])
        self.lr_scheduler.load_state_dict({**state["schedule"], "lr_lambdas": [None] * len(state["schedule"]["base_lrs"])})
        self.tokens = state["tokens"]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        weights = load_file(Path(resume_from_checkpoint, run_dir.ADAPTER_FILES[1]))
        own: dict[str, Any] = {name.removeprefix(FILE_PREFIX): value for name, value in weights.items()}
        set_model_state_dict(tuner_of(self.model).registry.network("default"), own, options=_WHOLE)

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Nothing: gradients are float32 and not scaled, and Trainer would unpickle a file of that name."""

    def _save_rng_state(self, output_dir: str) -> None:
        save_tree(self._rng_file(output_dir), random_states())

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            set_random_states(load_tree(self._rng_file(checkpoint)))

    def _rng_file(self, folder: str) -> Path:
        return Path(folder, f"random-{self.args.process_index}.safetensors")


def _bare(optimizer: Any) -> Any:
    """The optimiser itself, which Accelerate wraps."""
    return getattr(optimizer, "optimizer", optimizer)


def _nats_per_token(prediction: Any) -> dict[str, float]:
    """The loss over all rows (`IRMTrainer.prediction_step`), of a teacher's and the others apart if there are both; the spread.

    The spread is the standard deviation of the rows' own losses.
    """
    sums, counts, weights, taught = np.asarray(prediction.predictions).T
    losses = {"loss": float((weights * sums).sum() / (weights * counts).sum()), "spread": float((sums / counts).std())}
    if 0 < taught.sum() < len(taught):
        for name, part in (("kl", taught == 1), ("ce", taught == 0)):
            losses[name] = float(sums[part].sum() / counts[part].sum())
    return losses
