"""One run, from a recipe to a folder: begun, gone on with, finished.

`train` takes a host and rows that are in memory; `train_recipe` takes their names, and checks all it can before it loads the
host. Both end in a folder (see `folder`) that exists once the run is whole.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import EarlyStoppingCallback, PreTrainedModel, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback

import realigner.training.folder as folder
from realigner.console import progress, say
from realigner.data import PAPER_PROMPTS, Row, authored, read_rows, rows_hash
from realigner.errors import RealignerError, UsageError
from realigner.files import write_text
from realigner.fingerprints import fingerprint, weights_hash
from realigner.generation import answer
from realigner.hosts import host_name, load_config, load_host, load_tokenizer
from realigner.training.card import card
from realigner.training.curve import save_curve
from realigner.training.guards import Prepared, check_memory, estimate_memory, prepare
from realigner.training.recipe import Recipe, read_recipe, to_yaml
from realigner.training.trainer import IRMTrainer, products_dtype, trainer_arguments
from realigner.training.watch import DivergenceGuard, Log, StopSignal
from realigner.tuner import IRMConfig, tuner_of

_FSDP = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true", "yes")  # set by accelerate launch


@dataclass(frozen=True)
class Run:
    """A run that is finished or was interrupted: its folder, the model with the IRM attached, and what run.json says."""

    folder: Path
    model: PeftModel
    record: dict[str, Any]

    @property
    def interrupted(self) -> bool:
        """Whether a signal ended it; `train` with ``resume=True`` goes on."""
        return bool(self.record.get("interrupted"))


def train(
    host: PreTrainedModel,
    tokenizer: Any,
    rows: Sequence[Row],
    out: str | Path,
    recipe: Recipe | None = None,
    force: bool = False,
    resume: bool = False,
    quiet: bool = False,
    **changes: Any,
) -> Run:
    """Train one IRM on a frozen host and save it.

    The model comes back with the IRM attached (`run.model.unload()` gives the bare host again); when training fails, the host
    is left bare. Ctrl-C and SIGTERM end the training after the running step, with a checkpoint to go on from. The host's
    weights are hashed before and after; a difference is an error.

    Args:
        host, tokenizer: from `load_host`.
        rows: rows of one tone, from two groups or more.
        out: the run's folder; until it is finished, the run is in ``OUT.unfinished``.
        recipe: the default recipe when None. Its `host`, `data` and `tone` only name what is given here.
        force: replace a run that is there already, finished or not.
        resume: go on with the unfinished run of `out`, if there is one: it ends in the bytes of one never stopped.
        quiet: show no progress.
        **changes: keys of the recipe with other values (``steps=100, layers="0-15", seed=420``).

    Raises:
        RealignerError: when the rows cannot be trained on, the loss diverges, a file cannot be written, or the host changed.
        UsageError: when the rows are of several tones, or a key or value is none.

    Example:
        >>> run = train(host, tokenizer, authored("anger"), "runs/anger-42")  # doctest: +SKIP
    """
    recipe = (recipe or Recipe()).changed(**changes)
    if not rows:
        raise RealignerError("there are no rows to train on")
    recipe = resolve(recipe, host, rows)
    out = Path(out)
    _refuse(out, force, resume)
    with _threads(recipe):
        prepared = prepare(rows, tokenizer, host.config, recipe)
        _mention(prepared, recipe, host.config, quiet, loaded=True)
        return _train(host, tokenizer, prepared, recipe, out, force, resume, quiet)


def train_recipe(
    recipe: Recipe,
    out: str | Path,
    force: bool = False,
    resume: bool = False,
    quiet: bool = False,
    trust_remote_code: bool = False,
    repeats: Mapping[str, Any] | None = None,
) -> Run:
    """`train` for a host and data that the recipe names: everything that can be wrong is looked at before the host is loaded.

    With `repeats`, run.json of an earlier run, other data than that run's are refused, and other versions are mentioned.

    Raises:
        RealignerError, UsageError: as `train`, and when there is no such host or file.

    Example:
        >>> from realigner.training import make_recipe
        >>> run = train_recipe(make_recipe(tone="anger"), "runs/anger-42")  # doctest: +SKIP
    """
    out = Path(out)
    _refuse(out, force, resume)
    _check_reports(recipe)
    rows = recipe_rows(recipe)
    if repeats:
        _check_repeats(repeats, rows, recipe)
    if recipe.host is None:
        raise UsageError("recipe: its run was trained on a host made in Python; give one with --host")
    with _threads(recipe):
        config = load_config(recipe.host, trust_remote_code)
        tokenizer = load_tokenizer(recipe.host, trust_remote_code)
        prepared = prepare(rows, tokenizer, config, recipe)
        _mention(prepared, recipe, config, quiet, loaded=False)
        host, tokenizer = load_host(recipe.host, recipe.dtype, recipe.device, trust_remote_code)
        return _train(host, tokenizer, prepared, resolve(recipe, host, rows), out, force, resume, quiet)


def recipe_rows(recipe: Recipe) -> list[Row]:
    """The rows that a recipe names.

    Raises:
        RealignerError, UsageError: when there are none.
    """
    if recipe.data is None:
        raise UsageError("recipe: its run was trained on rows given in Python; name a file with --data")
    if recipe.data == "authored":
        if recipe.tone is None:
            raise UsageError("train: --tone is needed with the authored data: anger, sadness or neutral")
        return authored(recipe.tone)
    return read_rows(recipe.data, recipe.tone)


def resolve(recipe: Recipe, host: nn.Module, rows: Sequence[Row]) -> Recipe:
    """The recipe with everything in it that this machine and these rows decided, fit to repeat the run."""
    name: str | None = host_name(host) or None
    if name and Path(name).exists():
        name = str(Path(name).resolve())
    data = recipe.data
    if data == "authored":
        tone = rows[0].tone
        data = "authored" if recipe.tone in (None, tone) and _is_authored(rows) else None
    elif data is not None:
        data = str(Path(data).resolve()) if Path(data).is_file() else None
    settled = {
        "host": name,
        "dtype": str(next(host.parameters()).dtype).removeprefix("torch."),
        "data": data,
        "tone": rows[0].tone,
        "threads": recipe.threads or torch.get_num_threads(),
        "irm_products": "float32" if products_dtype(recipe, host) is None else "bfloat16",
    }
    return Recipe.model_validate(recipe.model_dump() | settled)


def _check_repeats(before: Mapping[str, Any], rows: Sequence[Row], recipe: Recipe) -> None:
    if (sha256 := before.get("data", {}).get("sha256")) not in (None, rows_hash(rows)):
        raise RealignerError(
            f"{recipe.data}: not the rows of the run to be repeated (sha256 {sha256[:16]}...); name them with --data"
        )
    now = folder.versions()
    for name, was in before.get("versions", {}).items():
        if now.get(name) != was:
            say(f"warning: {name} {now.get(name)} here, {was} then; the last bits may differ")


def _is_authored(rows: Sequence[Row]) -> bool:
    try:
        return rows_hash(rows) == rows_hash(authored(rows[0].tone))
    except UsageError:
        return False


def _refuse(out: Path, force: bool, resume: bool) -> None:
    if not resume:
        folder.refuse_run(out, force)
    elif out.exists():
        raise RealignerError(f"{out}: is there already, so there is nothing to resume; train anew with --force")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RealignerError(f"{out}: cannot be written ({error.strerror or error})") from error


def _check_reports(recipe: Recipe) -> None:
    for name in recipe.report_to:
        if find_spec(name) is None:
            raise RealignerError(f"report_to: {name} is not installed; pip install {name}, or --set report_to=[]")
    if recipe.optimizer == "adam-8bit" and find_spec("bitsandbytes") is None:
        raise RealignerError("optimizer: adam-8bit needs bitsandbytes; pip install bitsandbytes, or --set optimizer=adafactor")


def _mention(prepared: Prepared, recipe: Recipe, config: Any, quiet: bool, loaded: bool) -> None:
    """Say how many rows are cut and how much memory it takes; refuse what cannot fit."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    memory = estimate_memory(config, recipe, prepared.longest, prepared.most_targets, processes, loaded)
    warning = check_memory(memory, recipe, config)
    if quiet or not _is_writer():
        return
    if prepared.cut:
        say(
            f"{prepared.cut} of {len(prepared.rows)} rows are longer than {recipe.max_length} tokens and are cut (--max-length)"
        )
    say(f"warning: {warning}" if warning else memory.line())


def _is_writer() -> bool:
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def _threads(recipe: Recipe) -> Iterator[None]:
    before = torch.get_num_threads()
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _train(
    host: PreTrainedModel,
    tokenizer: Any,
    prepared: Prepared,
    recipe: Recipe,
    out: Path,
    force: bool,
    resume: bool,
    quiet: bool,
) -> Run:
    _check_reports(recipe)
    cpu = next(host.parameters()).device.type in ("cpu", "meta")
    processes = PartialState(cpu=cpu)
    work = folder.unfinished(out)
    hashed = weights_hash(host) if processes.is_main_process else ""
    record = _begin_record(host, hashed, prepared, recipe, processes.num_processes)
    processes.wait_for_everyone()  # everyone has looked before anything is written
    config = _irm_config(recipe, prepared.tone)
    set_seed(recipe.seed)
    model: PeftModel = get_peft_model(host, config)
    with ExitStack() as held, ExitStack() as undo:
        undo.callback(_bare_again, model, host)
        if processes.is_main_process:
            held.enter_context(_begun(work, record, recipe, force, resume))
            undo.push(_drop_if_nothing_was_done(work))
        processes.wait_for_everyone()
        stopped = None if recipe.steps == 0 else _fit(model, tokenizer, prepared, recipe, work, cpu, quiet)
        record |= _outcome(work, stopped)
        if not stopped and processes.is_main_process:
            if weights_hash(host) != hashed and not _sharded(host):
                raise RealignerError("the host's weights changed during training; nothing was saved")
            _finish(model, work, out, record, recipe)
        processes.wait_for_everyone()
        if not stopped:
            record = folder.read_run(out)  # in every process, as the writer left it
        undo.pop_all()  # all is well: the IRM stays
    if not stopped:
        _load(model, out)
    return Run(work if stopped else out, model.eval(), record)


def _irm_config(recipe: Recipe, tone: str) -> IRMConfig:
    return IRMConfig(
        preset=recipe.preset,
        layers=recipe.layers,
        widths=recipe.widths,
        rank=recipe.rank,
        output_std=recipe.output_std,
        input_norm=recipe.input_norm,
        masked=recipe.masked,
        layers_path=recipe.layers_path,
        tone=tone,
        template=recipe.template,
    )


def _begin_record(host: nn.Module, hashed: str, prepared: Prepared, recipe: Recipe, processes: int) -> dict[str, Any]:
    dtype = str(next(host.parameters()).dtype).removeprefix("torch.")
    mark = fingerprint(host)
    return {
        "tone": prepared.tone,
        "seed": recipe.seed,
        "recipe": recipe.model_dump(),
        "data": prepared.facts(),
        "host": {"name": mark.name, "dtype": dtype, "sha256": hashed, "fingerprint": mark.to_dict()},
        "processes": processes,
        "versions": folder.versions(),
    }


@contextmanager
def _begun(work: Path, record: dict[str, Any], recipe: Recipe, force: bool, resume: bool) -> Iterator[None]:
    """Hold the unfinished run's folder: made anew, or found to hold this very run and cut back to its last checkpoint."""
    if force and work.exists():
        with folder.locked(work):
            shutil.rmtree(work)
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RealignerError(f"{work}: cannot be written ({error.strerror or error})") from error
    with folder.locked(work):
        _begin(work, record, recipe, resume)
        yield


def _begin(work: Path, record: dict[str, Any], recipe: Recipe, resume: bool) -> None:
    if resume and (work / folder.RUN_FILE).is_file():
        _check_same(work, record, recipe)
        good = folder.checkpoints(work)
        step = folder.checkpoint_step(good[-1]) if good else -1
        for name in (folder.METRICS_FILE, folder.SAMPLES_FILE):
            folder.cut_lines(work / name, step)
        folder.clear_halves(work)
        return
    head = "# Every key of this run. It is repeated by:  realigner train --recipe FOLDER --out OTHER\n"
    write_text(work / folder.RECIPE_FILE, head + to_yaml(recipe))
    write_text(work / folder.RUN_FILE, json.dumps(record, indent=2) + "\n")


def _check_same(work: Path, record: dict[str, Any], recipe: Recipe) -> None:
    """Refuse to go on with a run of another recipe, other data, another host, or with another number of processes."""
    before = folder.read_run(work)
    difference = recipe.difference(read_recipe(work / folder.RECIPE_FILE))
    if difference:
        raise RealignerError(f"{work}: cannot be resumed as another run: {difference} (or throw it away with --force)")
    pairs = {
        "the data": (before.get("data", {}).get("sha256"), record["data"]["sha256"]),
        "the host's weights": (before.get("host", {}).get("sha256"), record["host"]["sha256"]),
        "the number of processes": (before.get("processes"), record["processes"]),
    }
    for what, (was, now) in pairs.items():
        if was != now:
            shown = f" ({now} now, {was} before)" if what.startswith("the number") else ""
            raise RealignerError(f"{work}: {what} changed since it was begun{shown}; resume it as it was, or use --force")
    if before.get("versions") != record["versions"]:
        say(f"warning: {work} was begun with other versions; the last bits may differ from an uninterrupted run's")


def _fit(
    model: PeftModel, tokenizer: Any, prepared: Prepared, recipe: Recipe, work: Path, cpu: bool, quiet: bool
) -> str | None:
    """Run the trainer from the last checkpoint to the end; returns the name of the signal that ended it before."""
    good = folder.checkpoints(work)
    if good and _complete(good[-1]):
        return None
    writer = _is_writer()
    entries = folder.read_metrics(work) if good else []
    arguments = trainer_arguments(recipe, len(prepared.train), work, cpu, resuming=bool(good))
    steps, done = arguments.max_steps, folder.checkpoint_step(good[-1]) if good else 0
    stop = StopSignal()
    with ExitStack() as stack:
        task = stack.enter_context(progress("training", steps, quiet or not writer))
        task.advance(done)
        log = Log(
            task,
            work if writer else None,
            seconds=float(entries[-1]["seconds"]) if entries else 0.0,
            tokens=lambda: int(trainer.tokens),
            sample=_sampler(model, tokenizer, recipe) if writer and recipe.samples and not _FSDP else None,
        )
        vocabulary = int(model.config.get_text_config(decoder=True).vocab_size)
        guard = DivergenceGuard(work, vocabulary, lambda: _row_ids(trainer, prepared), relative=not recipe.l1)
        callbacks: list[Any] = [guard, log, stop]
        if recipe.patience is not None:
            callbacks.append(EarlyStoppingCallback(recipe.patience))
        if "tensorboard" in recipe.report_to and writer:
            callbacks.append(_tensorboard(work, done))
        trainer = IRMTrainer(model, prepared, recipe, arguments, tokenizer=tokenizer, callbacks=callbacks)
        for unwanted in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(unwanted)
        stop.accelerator = trainer.accelerator
        stack.enter_context(stop.listening())
        stack.callback(setattr, tuner_of(model).bank.network("default"), "training_dtype", None)
        trainer.train(resume_from_checkpoint=str(good[-1]) if good else None)
    return stop.received.name if stop.received is not None and not _complete(folder.checkpoints(work)[-1]) else None


def _complete(checkpoint: Path) -> bool:
    """Whether a checkpoint is a run's last: all steps are done, or its patience ran out."""
    state = folder.checkpoint_state(checkpoint)
    if state["global_step"] >= state["max_steps"]:
        return True
    early = state.get("stateful_callbacks", {}).get("EarlyStoppingCallback")
    return early is not None and bool(
        early["attributes"]["early_stopping_patience_counter"] >= early["args"]["early_stopping_patience"]
    )


def _row_ids(trainer: IRMTrainer, prepared: Prepared) -> list[str]:
    rows = torch.cat([trainer.accelerator.gather(rows) for rows in trainer.step_rows])
    return [prepared.split.train[int(row)].id for row in rows]


def _sampler(model: PeftModel, tokenizer: Any, recipe: Recipe) -> Callable[[], list[dict[str, str]]]:
    def sample() -> list[dict[str, str]]:
        replies = answer(model, tokenizer, PAPER_PROMPTS, max_new_tokens=recipe.samples)
        return [{"prompt": prompt, "reply": reply} for prompt, reply in zip(PAPER_PROMPTS, replies, strict=True)]

    return sample


def _tensorboard(work: Path, done: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    return TensorBoardCallback(SummaryWriter(str(work / "tensorboard"), purge_step=done + 1))


def _outcome(work: Path, stopped: str | None) -> dict[str, Any]:
    """What run.json says of the training itself."""
    good = folder.checkpoints(work)
    untrained = {"global_step": 0, "max_steps": 0, "best_global_step": 0}
    last = folder.checkpoint_state(good[-1]) if good else untrained
    entries = folder.read_metrics(work)
    best = last["best_global_step"]
    return {
        "steps_done": last["global_step"],
        "interrupted": bool(stopped),
        "signal": stopped,
        "early_stop": not stopped and last["global_step"] < last["max_steps"],
        "best_step": best,
        "validation_loss": [round(e["validation_loss"], 4) for e in entries if "validation_loss" in e],
        "tokens": max((e.get("tokens", 0) for e in entries), default=0),
        "seconds": round(entries[-1]["seconds"], 1) if entries else 0.0,
    }


def _finish(model: PeftModel, work: Path, out: Path, record: dict[str, Any], recipe: Recipe) -> None:
    """Make the folder whole from its checkpoints, and give it its name."""
    good = folder.checkpoints(work)
    best = folder.checkpoint_folder(work, record["best_step"] or 0)
    chosen = best if recipe.keep == "best" and best.is_dir() else good[-1] if good else None
    record["kept_step"] = folder.checkpoint_step(chosen) if chosen else 0
    record["irm"] = irm_facts(model)
    try:
        if chosen is None:  # steps: 0
            model.save_pretrained(str(work), save_embedding_layers=False)
        else:
            for name in folder.ADAPTER_FILES:
                shutil.copyfile(chosen / name, work / name)
        save_curve(folder.read_metrics(work), work / folder.CURVE_FILE, kept=record["kept_step"])
    except OSError as error:
        raise RealignerError(f"{work}: cannot be written ({error.strerror or error}); go on with --resume") from error
    write_text(work / folder.CARD_FILE, card(record))
    write_text(work / folder.RUN_FILE, json.dumps(record, indent=2) + "\n")
    folder.finish(work, out)


def _load(model: PeftModel, out: Path) -> None:
    """Put the kept weights into the model in memory."""
    tuner = tuner_of(model)
    if _sharded(tuner.bank):
        return
    weights = load_file(out / folder.ADAPTER_FILES[1])
    tuner.bank.network("default").load_state_dict({key.removeprefix("irm."): value for key, value in weights.items()})


def _sharded(module: nn.Module) -> bool:
    return any(hasattr(parameter, "full_tensor") for parameter in module.parameters())


def _bare_again(model: PeftModel, host: nn.Module) -> None:
    model.unload()
    host.eval()


def _drop_if_nothing_was_done(work: Path) -> Callable[..., bool]:
    """On an error before the first checkpoint nothing is left behind; Ctrl-C becomes a line that says how to go on."""

    def leave(kind: type[BaseException] | None, error: BaseException | None, _: Any) -> bool:
        good = folder.checkpoints(work)
        if not good:
            shutil.rmtree(work, ignore_errors=True)
        if isinstance(error, KeyboardInterrupt):
            kept = f"go on from step {folder.checkpoint_step(good[-1])} with --resume" if good else "nothing was saved"
            raise RealignerError(f"interrupted; {kept}") from None
        return False

    return leave


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
