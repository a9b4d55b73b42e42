"""A sweep on this machine: in processes, some at a time, or in this one, one run after the other."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from queue import SimpleQueue

from realigner.errors import RealignerError, UsageError
from realigner.sweep.worker import Job, Report, WorkerLostError, reason, work


def run_locally(jobs: Sequence[Job], workers: int, gpus: float, retries: int, report: Report, stop: threading.Event) -> None:
    """Run jobs, `workers` at a time, each in a process; with `gpus`, each worker gets that many GPUs for itself.

    Raises:
        UsageError: for a part of a GPU (Ray deals those out), or more GPUs than there are.
    """
    free: SimpleQueue[str] = SimpleQueue()
    for devices in deal_devices(gpus, workers):
        free.put(devices)
    with ThreadPoolExecutor(workers) as pool:
        running = [pool.submit(_until_done, job, retries, report, stop, free) for job in jobs]
        wait(running)
    for future in running:
        future.result()


def deal_devices(gpus: float, workers: int) -> list[str]:
    """The GPUs of each worker (``CUDA_VISIBLE_DEVICES``), of those that this process may use; empty where none are asked for.

    Raises:
        UsageError: for a part of a GPU, or more GPUs than there are.
    """
    if gpus != int(gpus):
        raise UsageError(f"sweep: gpus={gpus}: only Ray shares out a part of a GPU (on=ray)")
    each = int(gpus)
    if not each:
        return [""] * workers
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        import torch

        visible = ",".join(str(number) for number in range(torch.cuda.device_count()))
    names = [name.strip() for name in visible.split(",") if name.strip()]
    if len(names) < each * workers:
        raise UsageError(f"sweep: {workers} workers with {each} GPUs each, but there are {len(names)}; lower workers or gpus")
    return [",".join(names[worker * each : (worker + 1) * each]) for worker in range(workers)]


def _until_done(job: Job, retries: int, report: Report, stop: threading.Event, free: SimpleQueue[str]) -> None:
    if stop.is_set():
        return
    devices, lost = free.get(), ""
    try:
        for attempt in range(retries + 1):
            if stop.is_set():
                report(job.name, "stopped", "")
                return
            report(job.name, "running", f"attempt {attempt + 1}" if attempt else "")
            try:
                report(job.name, work(job, devices, stop.is_set), "")
                return
            except WorkerLostError as error:
                lost = str(error)
                report(job.name, "retrying", lost)
        report(job.name, "failed", f"its worker died {retries + 1} times: {lost}")
    except RealignerError as error:
        report(job.name, "failed", str(error))
    finally:
        free.put(devices)


def run_here(jobs: Sequence[Job], report: Report, stop: threading.Event) -> None:
    """Train runs in this process, in order: for runs so short that a process for each would cost more than they do.

    A signal ends the running one, with a checkpoint if it was at its steps, and the rest are not begun.
    """
    from realigner.training import read_recipe, train_recipe

    for job in jobs:
        if stop.is_set():
            return
        report(job.name, "running", "")
        try:
            run = train_recipe(read_recipe(job.recipe), job.out, resume=True, quiet=True)
        except KeyboardInterrupt:
            report(job.name, "stopped", "")
            return
        except Exception as error:  # a run that fails does not keep the others from training
            if stop.is_set():  # a signal, said with what is saved
                report(job.name, "stopped", "")
                return
            report(job.name, "failed", reason(error))
            continue
        run.model.unload()
        if run.interrupted:
            stop.set()
        report(job.name, "stopped" if run.interrupted else "done", "")
