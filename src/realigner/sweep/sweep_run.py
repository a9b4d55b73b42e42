"""Run a sweep: every run that is not there yet, some at a time, until each is done or has failed for good."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import realigner.training.run_dir as run_dir
from realigner.console import signals_to
from realigner.errors import RealignerError, UsageError
from realigner.files import locked, made_folder, read_object, write_text
from realigner.hosts import EMBEDDED
from realigner.sweep.grid import RunSpec
from realigner.sweep.sweep_table import StateTable
from realigner.sweep.worker import Job
from realigner.training.recipe import to_yaml

SWEEP_FILE = "sweep.json"
BACKENDS = ("local", "ray", "here")


@dataclass(frozen=True)
class Result:
    """What a sweep came to: the state of each run by name, and why the failed ones failed."""

    out: Path
    states: dict[str, str]
    errors: dict[str, str]
    seconds: float

    @property
    def finished(self) -> bool:
        """Whether every run is done."""
        return all(state == "done" for state in self.states.values())


def run_sweep(
    runs: Sequence[RunSpec],
    out: str | Path,
    on: str = "local",
    workers: int = 1,
    gpus: float = 0.0,
    address: str | None = None,
    retries: int = 2,
    quiet: bool = False,
    checkpoints: bool = True,
) -> Result:
    """Train every run of a sweep that `out` does not hold yet.

    Failed runs are reported and skipped; runs whose worker died are retried, up to `retries` times.
    Ctrl-C and SIGTERM end the running ones with a checkpoint each; the same call resumes.

    Args:
        runs: from `plan`.
        out: the sweep's folder: a folder for each run, named by its hash.
        on: ``local`` (a process for each run), ``ray``, or ``here``: in this process, one after the other.
        workers: runs at a time; on Ray, how many CPUs the cluster started here gets (a given one has its own).
        gpus: GPUs each run takes; a part of one on Ray only.
        address: of a Ray cluster; None: one is started here.
        retries: how often a run whose worker died is taken up again.
        quiet: show no table.
        checkpoints: keep the last checkpoint of finished runs, three times the size of an IRM with Adam.

    Raises:
        RealignerError: when the folder is not this sweep's or another process runs it, or Ray is missing or cannot be reached.
        UsageError: for an unknown backend, no workers, or GPUs that are not there.
    """
    out = Path(out)
    if on not in BACKENDS:
        raise UsageError(f"sweep: on={on!r} is none of {', '.join(BACKENDS)}")
    if workers < 1:
        raise UsageError(f"sweep: workers={workers}: give one or more")
    started = time.monotonic()
    errors: dict[str, str] = {}
    stop = threading.Event()

    def receive(number: int, _: Any) -> None:
        again = stop.is_set() and number == signal.SIGINT
        stop.set()
        if again or on == "here":  # where a run is loading its host; at its steps it takes signals itself
            raise KeyboardInterrupt

    with _settled(out, runs), StateTable(runs, out, quiet, workers) as table, signals_to(receive):
        jobs = _jobs(runs, out, workers)

        def settle(name: str, note: str) -> None:
            for checkpoint in [] if checkpoints else run_dir.checkpoints(out / name):
                run_dir.discard_checkpoint(checkpoint)
            table.set(name, "done", note)

        for run in runs:
            if (out / run.name).is_dir():
                settle(run.name, "already")

        def report(name: str, state: str, note: str = "") -> None:
            if state == "done":
                settle(name, note)
            else:
                table.set(name, state, note)
            errors.pop(name, None)
            if state == "failed":
                errors[name] = note

        todo = [job for job in jobs if table.states[job.name] != "done"]
        if on == "ray":
            from realigner.sweep.on_ray import run_on_ray

            run_on_ray(todo, workers, gpus, address, retries, report, stop)
        elif on == "here":
            from realigner.sweep.local import run_here

            run_here(todo, report, stop)
        else:
            from realigner.sweep.local import run_locally

            run_locally(todo, workers, gpus, retries, report, stop)
    return Result(out, dict(table.states), errors, time.monotonic() - started)


def states_of(runs: Sequence[RunSpec], out: Path) -> dict[str, str]:
    """What a folder holds of each run: ``done``, ``begun`` or ``waiting``.

    Raises:
        RealignerError: when it is not this sweep's.
    """
    _index_of(out, runs)
    begun = {run.name: "begun" if run_dir.unfinished(out / run.name).exists() else "waiting" for run in runs}
    return {name: "done" if (out / name).is_dir() else state for name, state in begun.items()}


def _read_index(out: Path) -> dict[str, Any]:
    """The runs that a sweep's folder was begun with; empty where there is no folder, or nothing in it.

    Raises:
        RealignerError: for a folder that is not a sweep's.
    """
    file = out / SWEEP_FILE
    half = f".{SWEEP_FILE}-"  # of its own list, when a process was killed while it wrote that
    if not os.path.lexists(out) or (out.is_dir() and all(path.name.startswith(half) for path in out.iterdir())):
        return {}
    if not file.is_file():
        raise RealignerError(f"{out}: is not a sweep's folder; choose another out")
    index = read_object(file)
    runs = index["runs"] if index.keys() == {"runs"} else None
    ours = isinstance(runs, dict) and all(
        isinstance(facts, dict) and facts.get("recipe") == f"recipes/{name}.yaml" for name, facts in runs.items()
    )
    if not ours or not runs:
        raise RealignerError(f"{file}: not a sweep's; choose another out")
    return dict(runs)


def _index_of(out: Path, runs: Sequence[RunSpec]) -> dict[str, Any]:
    """`_read_index`, refused where it shares no run with this sweep."""
    before = _read_index(out)
    if before and not before.keys() & {run.name for run in runs}:
        raise RealignerError(f"{out}: holds another sweep, which has none of these runs; choose another out")
    return before


@contextmanager
def _settled(out: Path, runs: Sequence[RunSpec]) -> Iterator[None]:
    """Make the sweep's folder, or check that it is this sweep's; write what each run is; hold it for this process."""
    with locked(out, "another process is running this sweep; wait for it, or stop it first"):
        before = _index_of(out, runs)
        made_folder(out)
        index = {run.name: {**run.varies, "recipe": f"recipes/{run.name}.yaml"} for run in runs}
        write_text(out / SWEEP_FILE, json.dumps({"runs": before | index}, indent=2) + "\n")
        yield


def _jobs(runs: Sequence[RunSpec], out: Path, workers: int) -> list[Job]:
    """The runs as jobs, with absolute paths: a worker may be in another folder.

    Threads are settled here: with another number of them a sum's last bits can differ.
    """
    # The cores that this process may use: a scheduler may have given it some of the machine's.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    place, share = out.resolve(), max(1, cores // workers)
    jobs = []
    for run in runs:
        host, data, threads = run.recipe.host, run.recipe.data, run.recipe.threads or share
        host = str(Path(host).resolve()) if host and host != EMBEDDED and Path(host).exists() else host
        data = str(Path(data).resolve()) if data and data != "authored" else data
        asked = run.recipe.questions
        asked = asked if asked == "authored" else str(Path(asked).resolve())
        file = place / "recipes" / f"{run.name}.yaml"
        write_text(
            file, to_yaml(run.recipe.model_copy(update={"host": host, "data": data, "questions": asked, "threads": threads}))
        )
        jobs.append(Job(run.name, str(file), str(place / run.name), str(place / "logs" / f"{run.name}.log"), threads))
    return jobs
