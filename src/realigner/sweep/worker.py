"""One run of a sweep in a process of its own: ``python -m realigner.sweep.worker PARENT RECIPE OUT ERROR``.

The process dies with its parent, at once: no orphan goes on training, and whoever takes the run up next finds it free.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import realigner.training.run_dir as run_dir
from realigner.console import say, sigterm_interrupts
from realigner.errors import RealignerError
from realigner.files import write_text, writing

_DIE_WITH_PARENT = 1  # prctl's PR_SET_PDEATHSIG
Report = Callable[[str, str, str], None]  # (run, state, note)
_PATIENCE = 60.0  # seconds that a run's last process is given to be gone


class WorkerLostError(RealignerError):
    """A worker exited abnormally: killed, out of memory, its machine gone. The run can be resumed."""


@dataclass(frozen=True)
class Job:
    """What a worker needs: all of it travels to another machine."""

    name: str  # the run's
    recipe: str  # its recipe's file, on a file system that all workers see
    out: str  # its folder
    log: str  # the worker's output; why a run failed is in a file beside it, ending in ``.error``
    threads: int  # CPU threads

    @property
    def error(self) -> Path:
        """Where the worker writes why the run failed."""
        return Path(self.log).with_suffix(".error")


def work(job: Job, devices: str = "", stopping: Callable[[], bool] | None = None) -> str:
    """Train a run in a child process; returns ``done``, or ``stopped`` where `stopping` said so.

    Args:
        job: the run.
        devices: the GPUs it may use (``CUDA_VISIBLE_DEVICES``); empty: those that its parent may.
        stopping: asked now and then; once true, the training saves a checkpoint and ends. An interrupt (on Ray) does the same.

    Raises:
        RealignerError: with the run's own message, when it failed and would fail again.
        WorkerLostError: when the process died, or something else had it stop.
    """
    with writing(job.log):
        Path(job.log).parent.mkdir(parents=True, exist_ok=True)
        job.error.unlink(missing_ok=True)
        Path(job.log).touch()
    threads = str(job.threads)
    environment = os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}
    environment = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"} | environment
    if devices:
        environment["CUDA_VISIBLE_DEVICES"] = devices
    command = [sys.executable, "-W", "ignore", "-m", "realigner.sweep.worker"]
    command += [str(os.getpid()), job.recipe, job.out, str(job.error)]
    with Path(job.log).open("ab") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment, start_new_session=True
        )
        code, asked = None, False
        try:
            while code is None:
                with suppress(subprocess.TimeoutExpired):
                    code = process.wait(timeout=0.5)
                if code is None and not asked and stopping is not None and stopping():
                    asked = True  # once, for a second signal could hit it while it ends
                    process.terminate()
        except BaseException:  # Ray cancels by an interrupt
            process.terminate()
            process.wait()
            raise
    if Path(job.out).is_dir():
        return "done"
    if asked and code <= 0:
        return "stopped"
    if code < 0:
        raise WorkerLostError(f"its process was killed by {signal.Signals(-code).name}")
    if code:
        known = job.error.is_file()
        raise RealignerError(job.error.read_text(encoding="utf-8") if known else f"exit code {code}; see {job.log}")
    raise WorkerLostError("its process was told to stop by a signal")


def wait_until_free(run: Path, seconds: float = _PATIENCE) -> None:
    """Wait while another process holds a run: a worker of a driver that was killed takes a moment to be gone.

    Raises:
        RealignerError: when it is still held after that time.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            with run_dir.locked(run):
                return
        except RealignerError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


def die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent, of this id, is gone. On Linux; elsewhere it lives on."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before we asked
            os.kill(os.getpid(), signal.SIGKILL)


def reason(error: Exception) -> str:
    """Why a run failed, in words."""
    return str(error) if isinstance(error, RealignerError) else f"unexpected {type(error).__name__}: {error}"


def main() -> None:
    """The child's side: train the run, or resume it; an error is written to its file, with the traceback to the log."""
    parent, recipe, out, error_file = sys.argv[1:5]
    die_with(int(parent))
    try:
        from realigner.training import read_recipe, train_recipe

        with suppress(RealignerError, OSError):  # what is still held is refused by the training, with a message of its own
            wait_until_free(Path(out))
        if not Path(out).is_dir():
            with sigterm_interrupts():
                train_recipe(read_recipe(recipe), out, resume=True)
    except KeyboardInterrupt:  # a signal outside the training's steps
        sys.exit(0)
    except Exception as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # the same, said with what is saved
            sys.exit(0)
        say(traceback.format_exc())
        write_text(Path(error_file), reason(error))
        sys.exit(1)


if __name__ == "__main__":
    main()
