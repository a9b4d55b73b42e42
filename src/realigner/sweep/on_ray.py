"""A sweep on a Ray cluster: an existing one by its address, or one that is started here."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from realigner.console import say
from realigner.errors import RealignerError
from realigner.sweep.worker import Job, Report, WorkerLostError, work
from realigner.training.run_dir import METRICS_FILE, unfinished


def run_on_ray(
    jobs: Sequence[Job],
    workers: int,
    gpus: float,
    address: str | None,
    retries: int,
    report: Report,
    stop: threading.Event,
) -> None:
    """Run jobs as Ray tasks, one CPU share and `gpus` GPUs each. Ray takes a lost worker's task up again itself.

    All workers must see the sweep's folder (a shared file system).

    Raises:
        RealignerError: when Ray is not installed, there is no such cluster, or none of its machines can take a run.
    """
    if find_spec("ray") is None:
        raise RealignerError("Ray is not installed; pip install 'realigner[sweep]', or use on=local")
    ours = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    import ray

    mine = not ray.is_initialized()
    try:
        if mine:
            _connect(ray, address, workers)
    finally:  # `ray.init` takes SIGTERM over, and its way to stop saves no checkpoints
        if threading.current_thread() is threading.main_thread():
            for number, handler in ours.items():
                if handler is not None:  # None: not set in Python
                    signal.signal(number, handler)
    cpus = 1 if address is None else max((job.threads for job in jobs), default=1)
    task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=retries, retry_exceptions=[WorkerLostError], max_calls=1)(work)
    try:
        _check_room(ray, cpus, gpus, address)
        tasks = {task.remote(job): job for job in jobs}
        _follow(ray, tasks, report, stop)
    finally:
        if mine:
            ray.shutdown()


def _connect(ray: Any, address: str | None, workers: int) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    host, colon, port = (address or "").removeprefix("ray://").rpartition(":")
    if colon and port.isdecimal():  # find out at once that no cluster listens there; Ray itself would retry for minutes
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except OSError as error:
            raise RealignerError(f"ray: no cluster at {address} ({error.strerror or error})") from None
    here = {"address": "local", "num_cpus": workers, "include_dashboard": False}  # local: whatever RAY_ADDRESS says
    options: dict[str, Any] = {"address": address} if address else here
    try:
        ray.init(**options, log_to_driver=False, logging_level="ERROR")
    except (ray.exceptions.RayError, ValueError, RuntimeError, OSError) as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RealignerError(f"ray: no cluster at {address or 'this machine'} ({line})") from error


def _check_room(ray: Any, cpus: int, gpus: float, address: str | None) -> None:
    """Refuse what no machine can take, as Ray would wait for ever; a cluster given may grow, so only warn."""
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if any(machine.get("CPU", 0) >= cpus and machine.get("GPU", 0) >= gpus for machine in machines):
        return
    have = "; ".join(f"{machine.get('CPU', 0):g} and {machine.get('GPU', 0):g}" for machine in machines)
    what = f"ray: a run takes {cpus} CPUs and {gpus:g} GPUs, and no machine has them (CPUs and GPUs: {have})"
    if address is None:
        raise RealignerError(f"{what}; lower gpus")
    say(f"warning: {what}; waiting for one that has. More workers means fewer CPUs each")


def _follow(ray: Any, tasks: dict[Any, Job], report: Report, stop: threading.Event) -> None:
    """Report each task's state until all have ended."""
    pending, stopping, started = list(tasks), False, time.time()
    shown: set[str] = set()
    while pending:
        ready, pending = ray.wait(pending, timeout=0.5)
        for reference in ready:
            job = tasks[reference]
            try:
                report(job.name, ray.get(reference), "")
            except ray.exceptions.RayError as error:
                cause = getattr(error, "cause", None)  # of a RayTaskError: what the task raised
                if isinstance(error, ray.exceptions.TaskCancelledError) or isinstance(cause, KeyboardInterrupt):
                    report(job.name, "done" if Path(job.out).is_dir() else "stopped", "")
                else:
                    lost = f"its worker failed permanently ({type(error).__name__})"
                    report(job.name, "failed", str(cause) if isinstance(error, ray.exceptions.RayTaskError) else lost)
        for reference in pending:
            job = tasks[reference]
            if job.name not in shown:
                with suppress(OSError):  # not there yet
                    if (unfinished(Path(job.out)) / METRICS_FILE).stat().st_mtime >= started:
                        shown.add(job.name)
                        report(job.name, "running", "")
        if stop.is_set() and not stopping:
            stopping = True
            for reference in pending:
                ray.cancel(reference)
