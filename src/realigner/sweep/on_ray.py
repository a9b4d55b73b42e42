"""A sweep on a Ray cluster: an existing one by its address, or one that is started here."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from realigner.errors import RealignerError
from realigner.sweep.work import Job, WorkerLostError, work
from realigner.training.folder import METRICS_FILE, unfinished


def run_on_ray(
    jobs: Sequence[Job],
    workers: int,
    gpus: float,
    address: str | None,
    retries: int,
    report: Callable[[str, str, str], None],
    stop: threading.Event,
) -> None:
    """Run jobs as Ray tasks, one CPU share and `gpus` GPUs each. Ray takes a lost worker's task up again itself.

    All workers must see the sweep's folder (a shared file system).

    Raises:
        RealignerError: when Ray is not installed, or there is no such cluster.
    """
    if find_spec("ray") is None:
        raise RealignerError("Ray is not installed; pip install 'realigner[sweep]', or use --on local")
    import ray

    mine = not ray.is_initialized()
    if mine:
        _connect(ray, address, workers)
    task = ray.remote(
        num_cpus=1 if address is None else max((job.threads for job in jobs), default=1),
        num_gpus=gpus,
        max_retries=retries,
        retry_exceptions=[WorkerLostError],
        max_calls=1,
    )(work)
    try:
        tasks = {task.remote(job): job for job in jobs}
        _follow(ray, tasks, report, stop)
    finally:
        if mine:
            ray.shutdown()


def _connect(ray: Any, address: str | None, workers: int) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    _knock(address)
    options: dict[str, Any] = {"address": address} if address else {"num_cpus": workers, "include_dashboard": False}
    try:
        ray.init(**options, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, ValueError, RuntimeError, OSError) as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RealignerError(f"ray: no cluster at {address or 'this machine'} ({line})") from error


def _knock(address: str | None) -> None:
    """Find out at once that nobody listens at an address; Ray itself would ask for minutes."""
    host, colon, port = (address or "").removeprefix("ray://").rpartition(":")
    if colon and port.isdecimal():
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except OSError as error:
            raise RealignerError(f"ray: no cluster at {address} ({error.strerror or error})") from None


def _follow(ray: Any, tasks: dict[Any, Job], report: Callable[[str, str, str], None], stop: threading.Event) -> None:
    """Report each task's state until all have ended."""
    pending, stopping = list(tasks), False
    shown: set[str] = set()
    while pending:
        ready, pending = ray.wait(pending, timeout=0.5)
        for reference in ready:
            _report_end(ray, reference, tasks[reference], report)
        for reference in pending:
            job = tasks[reference]
            if job.name not in shown and (unfinished(Path(job.out)) / METRICS_FILE).is_file():
                shown.add(job.name)
                report(job.name, "running", "")
        if stop.is_set() and not stopping:
            stopping = True
            for reference in pending:
                ray.cancel(reference)


def _report_end(ray: Any, reference: Any, job: Job, report: Callable[[str, str, str], None]) -> None:
    try:
        report(job.name, ray.get(reference), "")
    except ray.exceptions.TaskCancelledError:
        report(job.name, "stopped", "")
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, KeyboardInterrupt):
            report(job.name, "stopped", "")
        else:
            report(job.name, "failed", str(error.cause))
    except ray.exceptions.RayError as error:
        report(job.name, "failed", f"its worker died for good ({type(error).__name__})")
