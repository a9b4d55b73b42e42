"""A sweep in this process, one run after the other: for runs so short that a process for each would cost more than they do."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from realigner.errors import RealignerError
from realigner.sweep.work import Job
from realigner.training.recipe import read_recipe
from realigner.training.run import train_recipe

Report = Callable[[str, str, str], None]


def run_here(jobs: Sequence[Job], report: Report, stop: threading.Event) -> None:
    """Train runs in order; a signal ends the running one with a checkpoint, and the rest are not begun."""
    for job in jobs:
        if stop.is_set():
            return
        report(job.name, "running", "")
        try:
            run = train_recipe(read_recipe(job.recipe), job.out, resume=True, quiet=True)
        except RealignerError as error:
            report(job.name, "failed", str(error))
            continue
        run.model.unload()
        if run.interrupted:
            stop.set()
        report(job.name, "stopped" if run.interrupted else "done", "")
