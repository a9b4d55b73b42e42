"""One run of a sweep in a process of its own: ``python -m realigner.sweep.work PARENT RECIPE OUT``: `realigner train --resume`.

The process dies with its parent, at once: no orphan goes on training, and whoever takes the run up next finds it free.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from realigner.errors import RealignerError

_DIE_WITH_PARENT = 1  # prctl's PR_SET_PDEATHSIG


class WorkerLostError(RealignerError):
    """A worker ended without a word: killed, out of memory, its machine gone. The run can be gone on with."""


@dataclass(frozen=True)
class Job:
    """What a worker needs: all of it travels to another machine.

    Attributes:
        name: the run's.
        recipe: its recipe's file, on a file system that all workers see.
        out: its folder.
        log: where the worker's words go.
        threads: CPU threads.
    """

    name: str
    recipe: str
    out: str
    log: str
    threads: int

    def command(self) -> list[str]:
        return [sys.executable, "-m", "realigner.sweep.work", str(os.getpid()), self.recipe, self.out]


def work(job: Job, devices: str = "") -> str:
    """Train a run in a child process; returns ``done`` or ``stopped`` (a signal came).

    Args:
        job: the run.
        devices: the GPUs it may use (``CUDA_VISIBLE_DEVICES``); empty: those that its parent may.

    Raises:
        RealignerError: with the run's own message, when it failed and would fail again.
        WorkerLostError: when the process died.
    """
    Path(job.log).parent.mkdir(parents=True, exist_ok=True)
    with Path(job.log).open("ab") as log:
        start = log.tell()
        threads = str(job.threads)
        environment = os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}
        if devices:
            environment["CUDA_VISIBLE_DEVICES"] = devices
        process = subprocess.Popen(
            job.command(), stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment, start_new_session=True
        )
        try:
            code = process.wait()
        except BaseException:  # Ray cancels by an interrupt: have a checkpoint saved
            process.send_signal(signal.SIGTERM)
            process.wait()
            raise
    if code < 0:
        raise WorkerLostError(f"its process was killed by {signal.Signals(-code).name}")
    if code:
        said = Path(job.log).read_bytes()[start:].decode(errors="replace").strip().splitlines()
        raise RealignerError(said[-1].removeprefix("realigner: ") if said else f"exit code {code}")
    return "done" if Path(job.out).is_dir() else "stopped"


def die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent ends (Linux; elsewhere nothing happens)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before we asked
            os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    """The child's side."""
    parent, recipe, out = sys.argv[1:4]
    die_with(int(parent))
    sys.argv = ["realigner", "train", "--recipe", recipe, "--out", out, "--resume"]
    runpy.run_module("realigner", run_name="__main__")


if __name__ == "__main__":
    main()
