"""Layout of a run directory and its promotion from ``OUT.unfinished``.

A run that is not finished lives in ``OUT.unfinished``, and ``OUT`` exists only once it is: whatever is there is whole.

=======================  ==================================================================================================
``adapter_*``            the IRM, in PEFT's layout
``recipe.yaml``          every key of the recipe; ``realigner train --recipe OUT --out OTHER`` repeats the run
``run.json``             what came of it: data hash, split, host and its fingerprint, versions, losses
``metrics.jsonl``        loss, gradient norm, learning rate and tokens by step; the validation loss
``samples.jsonl``        replies to the paper's seven prompts at each evaluation
``teacher.jsonl``        of a run with an instruction: the teacher's replies, and why those were rejected that were
``loss.png``             the curve
``tensorboard/``         the same numbers for TensorBoard
``checkpoint-N/``        the best and the last one: the IRM, the optimiser, random states, and the sha256 of each file
``README.md``            a model card
=======================  ==================================================================================================
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import realigner.files as files
from realigner.errors import RealignerError
from realigner.files import (
    DOCUMENT,
    Artifact,
    Output,
    decoded,
    discard,
    is_ours,
    object_of,
    read_bytes,
    read_object,
    unfinished as unfinished,
    write_text,
)
from realigner.training.run_record import CheckpointRecord, FinishedRecord, MetricsEntry, RunRecord, checked

RUN_FILE = "run.json"
RECIPE_FILE = "recipe.yaml"
METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.jsonl"
TEACHER_FILE = "teacher.jsonl"
CURVE_FILE = "loss.png"
CARD_FILE = "README.md"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
STATE_FILE = "trainer_state.json"
SUMS_FILE = "sha256.json"
_CHECKPOINT = "checkpoint-"
_EARLIER = "take an earlier checkpoint (remove this one), or train anew (force)"
_METRICS_MOST = 1 << 30  # bytes
_TEACHER_MOST = 1 << 36
_PLAIN = (".safetensors", ".json", ".md")


def _read_record(folder: Path) -> None:
    """Raise unless a folder holds run.json and the recipe of a run."""
    from realigner.training.recipe import read_recipe

    record = read_object(folder / RUN_FILE)
    if not {"recipe", "seed", "tone", "host", "versions"} <= record.keys():
        raise RealignerError(f"{folder / RUN_FILE}: not a run's")
    read_recipe(folder / RECIPE_FILE)


def _any_of(*names: str) -> str:
    return "|".join(map(re.escape, names))


_NETWORK = _any_of(*ADAPTER_FILES, CARD_FILE)
# What Accelerate wrote of an optimiser that FSDP shards, until 0.1.
_SHARDED = r"optimizer\.bin|scheduler\.pt|optimizer_\d+/([\w.]+)?|pytorch_model_fsdp[\w.]*/?([\w.]+)?"
_BEING_WRITTEN = r"\.tmp\w{6}"  # how safetensors names a file until it is whole; a killed process leaves it
_IN_CHECKPOINT = (
    rf"{_NETWORK}|{_any_of(STATE_FILE, SUMS_FILE)}|optimizer\.safetensors|random-\d+\.safetensors|{_SHARDED}|{_BEING_WRITTEN}"
)
_LOGGED = _any_of(RUN_FILE, RECIPE_FILE, METRICS_FILE, SAMPLES_FILE, TEACHER_FILE, CURVE_FILE)
_LEFT = rf"\.({_LOGGED}|{_NETWORK})-\w{{8}}\.aside|{_BEING_WRITTEN}"
CHECKPOINT = Artifact("a checkpoint", lambda folder: checkpoint_state(folder), _IN_CHECKPOINT)
_HALF_CHECKPOINT = replace(CHECKPOINT, name="a checkpoint that was being written", record=lambda folder: None)
RUN = Artifact(
    "a run",
    _read_record,
    rf"{_NETWORK}|{_LOGGED}|{_LEFT}|\.{re.escape(TEACHER_FILE)}\.lock"
    r"|tensorboard/(events\.out\.tfevents\.[^/]*)?"
    rf"|\.?checkpoint-\d+/({_IN_CHECKPOINT})?",
)


@dataclass(frozen=True)
class RunPlace:
    """The reserved paths of a run: `out` once it is finished, `work` until then."""

    out: Output
    work: Output


def is_run(folder: Path) -> bool:
    """Whether a folder has a run's record, whatever else it holds."""
    try:
        _read_record(folder)
    except RealignerError:
        return False
    return True


def refuse_run(out: Path, force: bool = False, resume: bool = False) -> None:
    """Raise unless a run may be written to `out`: it is free, or `force` was given and a run and nothing else is there.

    Raises:
        RealignerError: naming the path and the way out.
    """
    work = unfinished(out)
    if resume:
        if os.path.lexists(out):
            raise RealignerError(f"{out}: exists already, there is nothing to resume; train anew (force)")
        if os.path.lexists(work) and not is_run(work):
            raise RealignerError(f"{work}: is not a run's, it cannot be resumed; move it, or choose another place (out)")
        refuse_pickles(work)
        return
    Output(out, RUN, force).refuse()
    if not force and os.path.lexists(work):
        raise RealignerError(f"{work}: an unfinished run is there; resume it (resume), or discard it (force)")
    Output(work, RUN, force).refuse()


@contextmanager
def held(out: Path, force: bool = False, resume: bool = False) -> Iterator[RunPlace]:
    """Lock the paths of a run, finished and unfinished, from before its host is loaded until the run is renamed.

    Of several processes that train one run, the first (``RANK`` 0) holds the lock for all.

    Raises:
        RealignerError: as `refuse_run`, and when another live process holds the lock; that of a dead one does not count.
    """
    place = RunPlace(Output(out, RUN, force), Output(unfinished(out), RUN, force))
    refuse_run(out, force, resume)
    if os.environ.get("RANK", "0") != "0":
        yield place
        return
    with locked(out):
        refuse_run(out, force, resume)
        place.out.remove_leftovers()
        place.work.remove_leftovers()
        yield place


def checkpoints(work: Path) -> list[Path]:
    """The whole checkpoints in a folder, by step. What was being written when a process died is not among them."""
    found = [path for path in work.glob(f"{_CHECKPOINT}*") if path.name.removeprefix(_CHECKPOINT).isdecimal()]
    return sorted((path for path in found if (path / STATE_FILE).is_file()), key=checkpoint_step)


def refuse_pickles(work: Path) -> None:
    """Raise for a file in a checkpoint that is neither safetensors nor JSON (nor PEFT's card).

    Whatever loads a pickle runs the code in it; Trainer would read some by name (scaler.pt, rng_state.pth, adapter_model.bin).

    Raises:
        RealignerError: naming the file.
    """
    for path in (path for folder in checkpoints(work) for path in sorted(folder.rglob("*"))):
        if path.suffix not in _PLAIN or path.is_symlink() or not path.is_file():
            raise RealignerError(
                f"{path}: a checkpoint holds safetensors and JSON files and no others: a pickle can run code; "
                "remove it, or discard the run (force)"
            )


def teacher_replies(work: Path) -> int:
    """Lines in a folder's record of its teacher's replies, its head not counted."""
    path = work / TEACHER_FILE
    return max(0, read_bytes(path, _TEACHER_MOST).count(b"\n") - 1) if path.is_file() else 0


def checkpoint_step(path: Path) -> int:
    """The step a checkpoint was made after."""
    return int(path.name.removeprefix(_CHECKPOINT))


def checkpoint_folder(work: Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return work / f"{_CHECKPOINT}{step}"


def checkpoint_state(path: Path) -> dict[str, Any]:
    """Trainer's own account of a checkpoint.

    Raises:
        RealignerError: when it is not one, or another step's than the folder is named for.
    """
    state = checked(read_object(path / STATE_FILE), CheckpointRecord, path / STATE_FILE, "a checkpoint's state")
    named = path.name.lstrip(".")
    if state.get("global_step") != checkpoint_step(path.with_name(named)):
        raise RealignerError(f"{path / STATE_FILE}: global_step is {state.get('global_step')!r} in {named}; {_EARLIER}")
    return state


def discard_half(aside: Path) -> None:
    """Delete a checkpoint that was being written when a process died, unless it holds anything else."""
    discard(aside, _HALF_CHECKPOINT)


def discard_checkpoint(checkpoint: Path) -> None:
    """Delete a checkpoint atomically: it is hidden by a rename first, so a killed process never leaves half a checkpoint."""
    hidden = checkpoint.with_name(f".{_CHECKPOINT}0{checkpoint_step(checkpoint)}")  # that without 0 may be being written
    discard_half(hidden)
    if is_ours(checkpoint, CHECKPOINT):
        checkpoint.rename(hidden)
        discard_half(hidden)


def seal(checkpoint: Path) -> None:
    """Note the sha256 of each file of a checkpoint that is whole (`verify` compares them), and have the disk hold them all."""
    own = [path for path in sorted(checkpoint.rglob("*")) if path.is_file()]
    sums = {path.relative_to(checkpoint).as_posix(): _sha256(path) for path in own}
    (checkpoint / SUMS_FILE).write_text(json.dumps(sums, indent=2) + "\n", encoding="utf-8")
    for path in (*own, checkpoint / SUMS_FILE):  # before an earlier checkpoint is discarded
        with path.open("rb+") as stream:
            os.fsync(stream.fileno())


def verify(checkpoint: Path) -> None:
    """Raise unless every file of a checkpoint is as it was written.

    Raises:
        RealignerError: naming the first that is damaged, was changed, or is missing.
    """
    file = checkpoint / SUMS_FILE
    sums = read_object(file)
    for name in (STATE_FILE, *ADAPTER_FILES):
        if name not in sums:
            raise RealignerError(f"{file}: {name} is not in it; {_EARLIER}")
    for name, sha256 in sums.items():
        path = checkpoint / name
        if not path.is_file():
            raise RealignerError(f"{path}: is missing; {_EARLIER}")
        huge = path.suffix == ".json" and path.stat().st_size > DOCUMENT  # which would take long to hash
        if huge or _sha256(path) != sha256:
            raise RealignerError(f"{path}: truncated or damaged, or changed since it was written; {_EARLIER}")
    checkpoint_state(checkpoint)


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise RealignerError(f"{path}: cannot be read ({error.strerror or error})") from None


def locked(out: Path) -> AbstractContextManager[None]:
    """Hold the place of a run for one process; another is refused, and a dead one holds nothing.

    Raises:
        RealignerError: when a living process holds it.
    """
    return files.locked(out, "another process is training this run; wait for it, or stop it first")


def read_run(folder: str | Path) -> dict[str, Any]:
    """run.json of a run's folder, finished or not; empty for an adapter that was not made by `train`.

    Raises:
        RealignerError: when it cannot be read or is no run's, naming the line or the key.
    """
    path = Path(folder) / RUN_FILE
    if not path.is_file():
        return {}
    model = RunRecord if path.parent.name.endswith(".unfinished") else FinishedRecord
    return checked(read_object(path), model, path, "the record of a run")


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """The numbers by step of a run's folder (``loss`` or ``validation_loss``, in nats per token); empty when it has none.

    Raises:
        RealignerError: when they cannot be read, naming the line and the key.
    """
    path = Path(folder) / METRICS_FILE
    lines = read_bytes(path, _METRICS_MOST).splitlines() if path.is_file() else []
    numbered = enumerate(lines, start=1)
    return [checked(object_of(line, path, n), MetricsEntry, f"{path}:{n}", "a line of a run's metrics") for n, line in numbered]


def cut_back(work: Path, last_step: int) -> None:
    """Drop what was logged after a checkpoint's step (it will be done, and logged, again), and what was being written."""
    for path in work.glob(".*"):
        if path.name.startswith(f".{_CHECKPOINT}"):
            discard_half(path)
        elif re.fullmatch(_LEFT, path.name) and path.is_file() and not path.is_symlink():
            path.unlink()
    for path in (path for name in (METRICS_FILE, SAMPLES_FILE) if (path := work / name).is_file()):
        whole = []
        for line in read_bytes(path, _METRICS_MOST).splitlines():
            with suppress(RealignerError, KeyError, TypeError):  # of a line that was being written when the process died
                if object_of(line, path)["step"] <= last_step:
                    whole.append(f"{decoded(line, path)}\n")
        write_text(path, "".join(whole))
