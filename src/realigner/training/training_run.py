"""Start, resume and finalize a training run.

`train` takes a host and rows that are in memory; `train_recipe` takes their names, and checks all it can before it loads the
host. Both end in a folder (see `run_dir`) that exists once the run is whole.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import EarlyStoppingCallback, PreTrainedModel, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback

import realigner.training.run_dir as run_dir
from realigner.chat_format import has_chat_template
from realigner.console import progress, say, signals_to
from realigner.data import TONES, Row, Split, authored, read_rows
from realigner.data.dataset_rows import EVERY_TONE
from realigner.errors import RealignerError, UsageError
from realigner.extras import versions
from realigner.files import discard
from realigner.fingerprints import fingerprint, weights_hash
from realigner.generation import answer
from realigner.hosts import host_name, load_config, load_host, load_tokenizer, text_config
from realigner.irm_config import IRMConfig
from realigner.prompts import PAPER_PROMPTS
from realigner.training.batches import Prepared, prepare
from realigner.training.callbacks import DivergenceGuard, Log, StartWatch, StopSignal
from realigner.training.finished_run import evaluations_without_gain, finish, is_complete, outcome
from realigner.training.host_checks import check_tokens, host_notes, residual_facts, residual_line
from realigner.training.loss import bare
from realigner.training.preflight import check_fit, check_packages
from realigner.training.rate_search import check_search, find_rate, settled_rate
from realigner.training.recipe import Recipe
from realigner.training.teacher import Teacher
from realigner.training.time_estimate import estimated_seconds, size_of, time_line
from realigner.training.trainer import IRMTrainer, as_before, products_dtype, total_steps, trainer_arguments
from realigner.training.unfinished_run import check_same, unfinished_run, write_account
from realigner.tuner import tuner_of

_FSDP = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true", "yes")  # set by accelerate launch


@dataclass(frozen=True)
class Run:
    """A run that is finished or was interrupted.

    Attributes:
        folder: where it is; ``OUT.unfinished`` where it was interrupted.
        model: the host with the IRM attached.
        record: the contents of its run.json.
    """

    folder: Path
    model: PeftModel
    record: dict[str, Any]

    @property
    def interrupted(self) -> bool:
        """Whether a signal ended it; `train` with ``resume=True`` continues it."""
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
    split: Split | None = None,
    **changes: Any,
) -> Run:
    """Train one IRM on a frozen host and save it.

    The model comes back with the IRM attached (`run.model.unload()` gives the bare host again); when training fails, the host
    is left bare. Ctrl-C and SIGTERM end the training after the running step, with a checkpoint to go on from. The host's
    weights are hashed before and after; a difference is an error.

    Args:
        host, tokenizer: from `load_host`.
        rows: from two groups or more; of one tone, unless the recipe's `tone` is ``all``. May be none where the recipe has an
            instruction (`instruct`).
        out: the run's folder; until it is finished, the run is in ``OUT.unfinished``.
        recipe: the default recipe when None. Its `host`, `data` and `tone` only name what is given here.
        force: replace a run that is there already, finished or not.
        resume: continue the unfinished run of `out`, if there is one: the result is byte-identical to an uninterrupted run.
        quiet: show no progress.
        split: which of the rows are trained on, and which are for the validation loss; as the recipe says when None.
        **changes: keys of the recipe with other values (``steps=100, layers="0-15", seed=420``).

    Raises:
        RealignerError: when the rows cannot be trained on, the loss diverges, a file cannot be written, or the host changed.
        UsageError: when the rows are of several tones and the recipe does not ask for all, or a key or value is invalid.

    Example:
        >>> run = train(host, tokenizer, authored("anger"), "runs/anger-42")  # doctest: +SKIP
    """
    recipe = (recipe or Recipe()).changed(**changes)
    if isinstance(rows, (str, Path)) or not all(isinstance(row, Row) for row in rows):
        raise UsageError(
            "rows: not a sequence of Row; read_rows reads a file of them, authored gives those that come with the package"
        )
    if not rows and recipe.instruct is None:
        raise RealignerError("there are no rows to train on")
    if split is not None and recipe.instruct is not None:
        raise UsageError("split: of a teacher's replies, which come later; leave it out (instruct)")
    device, alone = next(host.parameters()).device, "LOCAL_RANK" not in os.environ and not hasattr(host, "hf_device_map")
    if device.type == "cuda" and device.index and alone:  # Trainer would move the host
        raise UsageError(f"device: training takes the first GPU that it sees; choose with CUDA_VISIBLE_DEVICES={device.index}")
    with run_dir.held(Path(out), force, resume) as place:
        recipe = resolve(recipe, host, tokenizer, rows)
        check_packages(recipe)
        check_search(recipe)
        prepared = _material(rows, tokenizer, host.config, recipe, split)
        check_fit(prepared, recipe, host.config, loaded=device, quiet=quiet)
        return _train(host, tokenizer, prepared, recipe, place, resume, quiet)


def train_recipe(
    recipe: Recipe,
    out: str | Path,
    force: bool = False,
    resume: bool = False,
    quiet: bool = False,
    trust_remote_code: bool = False,
    repeats: Mapping[str, Any] | None = None,
) -> Run:
    """`train` for a host and data that the recipe names; everything that can be is checked before the host is loaded.

    `repeats` is the run.json of an earlier run to repeat: other data than that run's are refused, and other versions cause a
    warning.

    Raises:
        RealignerError, UsageError: as `train`, and when there is no such host or file.

    Example:
        >>> from realigner.training import make_recipe
        >>> run = train_recipe(make_recipe(tone="anger"), "runs/anger-42")  # doctest: +SKIP
    """
    with run_dir.held(Path(out), force, resume) as place:
        check_packages(recipe)
        check_search(recipe)
        rows = recipe_rows(recipe)
        if recipe.host is None:
            raise UsageError("recipe: its run was trained on a host made in Python; give one (host)")
        config = load_config(recipe.host, trust_remote_code)
        tokenizer = load_tokenizer(recipe.host, trust_remote_code)
        prepared = _material(rows, tokenizer, config, recipe)
        if repeats:
            _check_repeat(repeats, prepared, recipe)
        check_fit(prepared, recipe, config, loaded=None, quiet=quiet, trust_remote_code=trust_remote_code)
        host, tokenizer = load_host(recipe.host, recipe.dtype, recipe.device, trust_remote_code, tokenizer=tokenizer)
        return _train(host, tokenizer, prepared, resolve(recipe, host, tokenizer, rows), place, resume, quiet)


def _material(
    rows: Sequence[Row], tokenizer: Any, config: Any, recipe: Recipe, split: Split | None = None
) -> Prepared | Teacher:
    """What a run learns from: rows, or what a teacher has yet to reply."""
    if recipe.instruct is None:
        prepared = prepare(rows, tokenizer, config, recipe, split=split)
        check_tokens(prepared.texts(), tokenizer, config)
        return prepared
    if rows and _FSDP:  # a process whose rows have no teacher would not run the host a second time, as others do
        raise UsageError("instruct: with rows besides it cannot be trained under FSDP; leave the rows out, or use DDP")
    return Teacher(rows, recipe, tokenizer, config)


def _check_repeat(repeats: Mapping[str, Any], prepared: Prepared | Teacher, recipe: Recipe) -> None:
    """Refuse other data than that of the run to be repeated; warn of other versions."""
    sha256, then, now = repeats.get("data", {}).get("sha256"), repeats.get("versions", {}), versions()
    if sha256 not in (None, prepared.sha256):
        what = f"{recipe.data}: not the rows" if recipe.instruct is None else "data, questions: not those"
        raise RealignerError(f"{what} of the run to be repeated (sha256 {sha256[:16]}...); name them (data)")
    for name in then:
        if now.get(name) != then[name]:
            say(f"warning: {name} {now.get(name)} here, {then[name]} then; the last bits may differ")


def recipe_rows(recipe: Recipe) -> list[Row]:
    """The rows that a recipe names; none, where it has an instruction and names no rows.

    Raises:
        RealignerError, UsageError: when there are none and there should be.
    """
    if not recipe.has_rows:
        return []
    if recipe.data is None:
        raise UsageError("recipe: its run was trained on rows given in Python; name a file (data)")
    if recipe.data == "authored":
        if recipe.tone is None:
            raise UsageError("train: tone is needed with the authored data: anger, sadness or neutral")
        if recipe.tone == EVERY_TONE:
            raise UsageError(
                "train: the authored set answers each question in every tone, and nothing decides between them; "
                "make rows of it (data condition) and name them (data)"
            )
        return authored(recipe.tone)
    return read_rows(recipe.data, recipe.tone)


def resolve(recipe: Recipe, host: nn.Module, tokenizer: Any, rows: Sequence[Row]) -> Recipe:
    """The recipe with what this machine and these rows decided filled in, so that it repeats the run."""
    name: str | None = host_name(host) or None
    data, tone = recipe.data if rows else None, recipe.tone
    if tone != EVERY_TONE and rows:
        tone = rows[0].tone
    if data == "authored":
        if recipe.tone not in (None, tone) or tone not in TONES or list(rows) != authored(tone):
            data = None  # rows given in Python
    elif data is not None:
        data = str(Path(data).resolve()) if Path(data).is_file() else None
    settled = {
        "host": name,
        "dtype": str(next(host.parameters()).dtype).removeprefix("torch."),
        "data": data,
        "tone": tone,
        "questions": str(Path(recipe.questions).resolve()) if Path(recipe.questions).is_file() else recipe.questions,
        "template": recipe.template if has_chat_template(tokenizer) else "plain",
        "threads": recipe.threads or torch.get_num_threads(),
        "learning_rate": recipe.rate(text_config(host).hidden_size) if recipe.learning_rate is None else recipe.learning_rate,
        "edition": recipe.by_preset["edition"],
        "irm_products": "float32" if products_dtype(recipe, host) is None else "bfloat16",
    }
    return recipe.model_copy(update=settled)


def _train(
    host: PreTrainedModel,
    tokenizer: Any,
    material: Prepared | Teacher,
    recipe: Recipe,
    place: run_dir.RunPlace,
    resume: bool,
    quiet: bool,
) -> Run:
    cpu = next(host.parameters()).device.type in ("cpu", "meta")
    processes = PartialState(cpu=cpu)
    out, work, writer = place.out.path, place.work.path, processes.is_main_process
    with ExitStack() as held, ExitStack() as undo:
        held.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(recipe.threads or torch.get_num_threads())
        held.enter_context(as_before(host.modules(), "gradient_checkpointing", "_gradient_checkpointing_func"))

        # What run.json says before training.
        if writer and not quiet:
            if isinstance(material, Teacher):
                material.say_before()
            else:
                _say_notes(host, tokenizer, material, recipe)
        hashed, mark = weights_hash(host) if writer else "", fingerprint(host)
        dtype = str(next(host.parameters()).dtype).removeprefix("torch.")
        record = {
            "tone": material.tone,
            "seed": recipe.seed,
            "recipe": recipe.model_dump(),
            "data": material.facts(),
            "host": {"name": mark.name, "dtype": dtype, "sha256": hashed, "fingerprint": mark.to_dict()},
            "processes": processes.num_processes,
            "versions": versions(),
        }
        processes.wait_for_everyone()  # everyone has looked before anything is written

        # Attach, train, and take note of the outcome; an error leaves the host bare.
        named: dict[str, Any] = {"layers_path": recipe.layers_path, "template": recipe.template, "tone": material.tone}
        named["chat_template_kwargs"] = recipe.chat_template_kwargs or None
        config = IRMConfig(**vars(recipe.shape), **named)
        set_seed(recipe.seed)
        model: PeftModel = get_peft_model(host, config)
        undo.callback(lambda: (model.unload(), host.eval()))
        record["residual"] = residual_facts(model)
        if writer and not quiet:
            say(residual_line(record["residual"]))
        recipe, search, why = settled_rate(model, tokenizer, material, recipe, work, resume, quiet or not writer)
        record |= {"recipe": recipe.model_dump(), **({"rate_search": search} if search else {})}
        if writer and not quiet:
            say(f"learning rate {recipe.learning_rate}: {why}" if recipe.learning_rate == "auto" else _rate_line(recipe, why))
        if writer:
            held.enter_context(unfinished_run(place, record, recipe, resume))
        processes.wait_for_everyone()
        if writer and not quiet and recipe.steps != 0 and processes.num_processes == 1:
            _say_time(model, material, recipe, work)
        stopped = None
        if recipe.steps != 0:
            prepared = material
            if isinstance(prepared, Teacher):
                prepared, recipe = _taught(prepared, model, tokenizer, recipe, record, work, quiet or not writer)
            stopped = _fit(model, tokenizer, prepared, recipe, work, cpu, quiet)
        record |= outcome(work, stopped, recipe)

        # A stopped run stays unfinished; a whole one gets its name, and the model the weights that were kept.
        if not stopped and writer:
            if weights_hash(host) != hashed and not _sharded(host):
                discard(work, run_dir.RUN)  # or the next call would resume it
                raise RealignerError("the host's weights changed during training; nothing was saved")
            finish(model, place, record, recipe)
        processes.wait_for_everyone()
        if not stopped:
            record = run_dir.read_run(out)  # in every process, as the writer left it
        undo.pop_all()
    bank = tuner_of(model).registry
    if not stopped and not _sharded(bank):
        weights = load_file(out / run_dir.ADAPTER_FILES[1])
        bank.network("default").load_state_dict({key.removeprefix("irm."): value for key, value in weights.items()})
    return Run(work if stopped else out, model.eval(), record)


def _say_notes(host: nn.Module, tokenizer: Any, prepared: Prepared, recipe: Recipe) -> None:
    """Say what may spoil the training."""
    for note in host_notes(host, tokenizer, prepared, recipe):
        say(note)
    if unseen := {row.tone for row in prepared.rows} - {row.tone for row in prepared.split.validation}:
        say(f"note: no validation rows of tone {', '.join(sorted(unseen))}: it takes two groups or more of each tone")


def _rate_line(recipe: Recipe, why: str) -> str:
    return f"learning rate {recipe.peak_rate:g}: {why}"


def _say_time(model: PeftModel, material: Prepared | Teacher, recipe: Recipe, work: Path) -> None:
    """Say how long the rest of a run will take."""
    size, good = size_of(material, recipe), run_dir.checkpoints(work)
    left = total_steps(recipe, size.train) - (run_dir.checkpoint_step(good[-1]) if good else 0)
    replies = material.missing(work) if isinstance(material, Teacher) else 0
    say(time_line(estimated_seconds(model, recipe, size, max(0, left), replies)))


def _taught(
    teacher: Teacher, model: PeftModel, tokenizer: Any, recipe: Recipe, record: dict[str, Any], work: Path, quiet: bool
) -> tuple[Prepared, Recipe]:
    """Have the teacher reply, prepare the replies to be learned, and search for a learning rate where that is asked for.

    What came of it is noted in `record` and in the run's folder.
    """
    place, tuner = work / run_dir.TEACHER_FILE, tuner_of(model)
    replies = teacher.replies(model, tokenizer, work, quiet)
    prepared = teacher.prepared(replies, tokenizer, model.config, place)
    check_tokens(prepared.texts(), tokenizer, model.config)
    record["data"] |= {key: value for key, value in prepared.facts().items() if key != "sha256"}
    record["teacher"] = teacher.outcome(replies)
    if not quiet:
        teacher.say_after(replies, place)
        with bare(tuner):
            _say_notes(tuner.model, tokenizer, prepared, recipe)
    writer = PartialState().is_main_process
    if writer:
        check_same(work, record, recipe)
    if recipe.learning_rate == "auto":
        width = text_config(tuner.model).hidden_size
        record["rate_search"] = found = find_rate(model, tokenizer, prepared, recipe, recipe.rate(width), quiet).to_dict()
        recipe = recipe.model_copy(update={"learning_rate": found["rate"]})
        record["recipe"] = recipe.model_dump()
        if not quiet:
            say(_rate_line(recipe, f"found by a search of {found['steps']} steps"))
    if writer:
        write_account(work, record, recipe)
    return prepared, recipe


def _fit(
    model: PeftModel, tokenizer: Any, prepared: Prepared, recipe: Recipe, work: Path, cpu: bool, quiet: bool
) -> str | None:
    """Run the trainer from the last checkpoint to the end; returns the name of the signal that ended it before."""
    good = run_dir.checkpoints(work)
    if good and is_complete(good[-1]):
        return None
    writer = os.environ.get("RANK", "0") == "0"
    entries = run_dir.read_metrics(work) if good else []
    arguments = trainer_arguments(recipe, len(prepared.train), work, cpu, resuming=bool(good))
    steps, done = arguments.max_steps, run_dir.checkpoint_step(good[-1]) if good else 0
    stop = StopSignal()

    def sample() -> list[dict[str, str]]:
        most = recipe.samples
        replies = answer(model, tokenizer, PAPER_PROMPTS, max_new_tokens=most, thinking_budget=recipe.thinking_budget)
        return [{"prompt": prompt, "reply": reply} for prompt, reply in zip(PAPER_PROMPTS, replies, strict=True)]

    def row_ids() -> list[str]:
        rows = torch.cat([trainer.accelerator.gather(rows) for rows in trainer.step_rows])
        return [prepared.ids[int(row)] for row in rows]

    with ExitStack() as stack:
        task = stack.enter_context(progress("training", steps, quiet or not writer, before=done))
        mixed = recipe.instruct is not None and any("teacher_ids" not in example for example in prepared.train)
        watch = StartWatch(recipe.batch_size, recipe.peak_rate, by_steps=not recipe.l1 and not mixed)
        for entry in entries:  # of a resumed run: what was to be said was said
            watch.note(entry)
        log = Log(
            task,
            work if writer else None,
            seconds=float(entries[-1]["seconds"]) if entries else 0.0,
            tokens=lambda: int(trainer.tokens),
            sample=sample if writer and recipe.samples and not _FSDP else None,
            watch=watch,
            quiet=quiet or not writer,
        )
        vocabulary = int(model.config.get_text_config(decoder=True).vocab_size)
        callbacks: list[Any] = [DivergenceGuard(work, vocabulary, row_ids, relative=not recipe.l1), log, stop]
        if recipe.patience is not None:
            callbacks.append(early := EarlyStoppingCallback(recipe.patience))
            if good:  # Trainer would count from 0 again
                early.early_stopping_patience_counter = evaluations_without_gain(run_dir.checkpoint_state(good[-1]))
        if "tensorboard" in recipe.report_to and writer:
            from torch.utils.tensorboard import SummaryWriter
            from transformers.integrations import TensorBoardCallback

            callbacks.append(TensorBoardCallback(SummaryWriter(str(work / "tensorboard"), purge_step=done + 1)))
        trainer = IRMTrainer(model, prepared, recipe, arguments, tokenizer=tokenizer, callbacks=callbacks)
        for unwanted in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(unwanted)
        stop.accelerator = trainer.accelerator
        stack.enter_context(signals_to(stop.receive))
        stack.callback(setattr, tuner_of(model).registry.network("default"), "training_dtype", None)
        trainer.train(resume_from_checkpoint=str(good[-1]) if good else None)
    return stop.received.name if stop.received is not None and not is_complete(run_dir.checkpoints(work)[-1]) else None


def _sharded(module: nn.Module) -> bool:
    return any(hasattr(parameter, "full_tensor") for parameter in module.parameters())
