"""A sweep on this machine: some processes at a time."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue

import psutil

from realigner.errors import RealignerError, UsageError
from realigner.sweep.work import Job, WorkerLostError, work


def run_locally(
    jobs: Sequence[Job],
    workers: int,
    gpus: float,
    retries: int,
    report: Callable[[str, str, str], None],
    stop: threading.Event,
) -> None:
    """Run jobs, `workers` at a time, each in a process; with `gpus`, each worker gets that many GPUs for itself.

    Raises:
        UsageError: for a part of a GPU (Ray deals those out).
    """
    if gpus != int(gpus):
        raise UsageError(f"sweep: --gpus {gpus}: a part of a GPU is dealt out by Ray only (--on ray)")
    free: SimpleQueue[str] = SimpleQueue()
    for worker in range(workers):
        free.put(",".join(str(worker * int(gpus) + n) for n in range(int(gpus))))
    with ThreadPoolExecutor(workers) as pool:
        running = [pool.submit(_until_done, job, retries, report, stop, free) for job in jobs]
        pending = set(running)
        while pending:
            stop.wait(0.2)
            if stop.is_set():
                _stop_children()
                for future in running:
                    future.cancel()
            pending = {future for future in pending if not future.done()}
    for future in running:
        if not future.cancelled():
            future.result()


def _until_done(
    job: Job,
    retries: int,
    report: Callable[[str, str, str], None],
    stop: threading.Event,
    free: SimpleQueue[str],
) -> None:
    if stop.is_set():
        return
    devices = free.get()
    try:
        for attempt in range(retries + 1):
            report(job.name, "running", f"attempt {attempt + 1}" if attempt else "")
            try:
                report(job.name, work(job, devices), "")
                return
            except WorkerLostError as error:
                lost = str(error)
                report(job.name, "lost, again", lost)
            except RealignerError as error:
                report(job.name, "failed", str(error))
                return
            if stop.is_set():
                return
        report(job.name, "failed", f"its worker died {retries + 1} times: {lost}")
    finally:
        free.put(devices)


def _stop_children() -> None:
    """Ask the running trainings to save a checkpoint and end."""
    for child in psutil.Process(os.getpid()).children():
        try:
            if "realigner.sweep.work" in child.cmdline():
                child.terminate()
        except psutil.Error:  # it ended meanwhile
            continue
    threading.Event().wait(1.0)
