"""Layout of a run directory and its promotion from ``OUT.unfinished``.

A run that is not finished lives in ``OUT.unfinished``, and ``OUT`` exists only once it is: whatever is there is whole.

=======================  ==================================================================================================
``adapter_*``            the IRM, in PEFT's layout
``recipe.yaml``          every key of the recipe; ``realigner train --recipe OUT --out OTHER`` repeats the run
``run.json``             what came of it: data hash, split, host and its fingerprint, versions, losses
``metrics.jsonl``        loss, gradient norm, learning rate and tokens by step; the validation loss
``samples.jsonl``        replies to the paper's seven prompts at each evaluation
``loss.png``             the curve
``tensorboard/``         the same numbers for TensorBoard
``checkpoint-N/``        the best and the last one: the IRM, the optimiser, random states
``README.md``            a model card
=======================  ==================================================================================================
"""

from __future__ import annotations

import platform
import shutil
from contextlib import AbstractContextManager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from realigner.errors import RealignerError
from realigner.files import (
    decoded,
    locked_file,
    object_of,
    read_bytes,
    read_object,
    refuse_existing,
    replace_folder,
    write_text,
)
from realigner.training.run_record import CheckpointRecord, FinishedRecord, MetricsEntry, RunRecord, checked

RUN_FILE = "run.json"
RECIPE_FILE = "recipe.yaml"
METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.jsonl"
CURVE_FILE = "loss.png"
CARD_FILE = "README.md"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
STATE_FILE = "trainer_state.json"
_LOCK = ".lock"
_TENSORBOARD = "tensorboard"
_FILES = {*ADAPTER_FILES, RUN_FILE, RECIPE_FILE, METRICS_FILE, SAMPLES_FILE, CURVE_FILE, CARD_FILE, _LOCK, _TENSORBOARD}
_CHECKPOINT = "checkpoint-"


def unfinished(out: Path) -> Path:
    """Where a run lives until it is finished."""
    return out.with_name(f"{out.name}.unfinished")


def is_run(folder: Path) -> bool:
    """Whether a folder is a run's, finished or not, and holds nothing else."""
    if not folder.is_dir() or not ((folder / RUN_FILE).is_file() or (folder / RECIPE_FILE).is_file()):
        return False
    return all(path.name in _FILES or path.name.lstrip(".").startswith(_CHECKPOINT) for path in folder.iterdir())


def refuse_run(out: Path, force: bool) -> None:
    """Raise unless a run may be written to `out`: it is free, or `force` was given and a run is there.

    Raises:
        RealignerError: naming the path and the way out.
    """
    refuse_existing(out, force, is_run)
    work = unfinished(out)
    if not force and work.exists():
        raise RealignerError(f"{work}: an unfinished run is there; resume it (resume), or discard it (force)")
    refuse_existing(work, force, is_run)


def checkpoints(work: Path) -> list[Path]:
    """The whole checkpoints in a folder, by step. What was being written when a process died is not among them."""
    found = [path for path in work.glob(f"{_CHECKPOINT}*") if path.name.removeprefix(_CHECKPOINT).isdecimal()]
    return sorted((path for path in found if (path / STATE_FILE).is_file()), key=checkpoint_step)


def checkpoint_step(path: Path) -> int:
    """The step a checkpoint was made after."""
    return int(path.name.removeprefix(_CHECKPOINT))


def checkpoint_folder(work: Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return work / f"{_CHECKPOINT}{step}"


def checkpoint_state(path: Path) -> dict[str, Any]:
    """Trainer's own account of a checkpoint."""
    return checked(read_object(path / STATE_FILE), CheckpointRecord, path / STATE_FILE, "a checkpoint's state")


def locked(work: Path) -> AbstractContextManager[None]:
    """Hold an unfinished run for one process; another is refused, and a dead one holds nothing.

    Raises:
        RealignerError: when a living process holds it.
    """
    return locked_file(work / _LOCK, f"{work}: another process is training this run; wait for it, or stop it first")


def finish(work: Path, out: Path) -> None:
    """Give a run that is whole its final name."""
    (work / _LOCK).unlink(missing_ok=True)
    replace_folder(work, out)


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
    lines = read_bytes(path).splitlines() if path.is_file() else []
    numbered = enumerate(lines, start=1)
    return [checked(object_of(line, path, n), MetricsEntry, f"{path}:{n}", "a line of a run's metrics") for n, line in numbered]


def cut_back(work: Path, last_step: int) -> None:
    """Drop what was logged after a checkpoint's step (it will be done, and logged, again), and what was being written."""
    for path in work.glob(f".{_CHECKPOINT}*"):
        shutil.rmtree(path, ignore_errors=True)
    for path in (path for name in (METRICS_FILE, SAMPLES_FILE) if (path := work / name).is_file()):
        whole = []
        for line in read_bytes(path).splitlines():
            with suppress(RealignerError, KeyError, TypeError):  # of a line that was being written when the process died
                if object_of(line, path)["step"] <= last_step:
                    whole.append(f"{decoded(line, path)}\n")
        write_text(path, "".join(whole))


def versions() -> dict[str, str]:
    """The versions that decide a result."""
    names = ("realigner", "torch", "transformers", "peft", "accelerate")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}
