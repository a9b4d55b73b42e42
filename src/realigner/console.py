"""What people see while they wait: progress bars on a terminal, plain lines elsewhere; always on standard error."""

from __future__ import annotations

import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from realigner.errors import visible

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

_LINE_EVERY = 10.0  # seconds between plain lines


def console() -> Console:
    """A rich console on standard error (made anew, so that a redirected stream is respected)."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=True, markup=False, emoji=False)


def say(text: str) -> None:
    """One line for people, on standard error."""
    print(visible(text), file=sys.stderr, flush=True)


def program() -> str:
    """How this program is called here: ``realigner``, or its path where a shell would not find it by its name."""
    called = Path(sys.argv[0])
    if called.name != "realigner" or shutil.which("realigner") is not None:
        return "realigner"
    here = called.absolute()
    return quote(str(here.relative_to(Path.cwd()) if here.is_relative_to(Path.cwd()) else here))


def show(text: str = "", end: str = "\n") -> None:
    """A result for people, on standard output. Everything that is printed goes through here or `say`: see `visible`."""
    print(visible(text), end=end)


def show_aside(text: str, end: str = "\n") -> None:
    """What a result comes with, on standard output; dimmed on a terminal."""
    from rich.console import Console

    Console(markup=False, emoji=False, highlight=False, soft_wrap=True).print(visible(text), end=end, style="dim")


def show_table(rows: Iterable[Sequence[str]], header: Sequence[str] = (), bold_first: bool = False) -> None:
    """A table on standard output, its cells as they are: no markup, no emoji codes, nothing for the terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*header, box=None, show_header=bool(header), header_style="bold", pad_edge=bool(header))
    for row in rows:
        table.add_row(*map(visible, row))
    if bold_first:
        table.columns[0].style = "bold"
    table.columns[-1].overflow = "fold"
    Console(markup=False, emoji=False, highlight=False).print(table)


@contextmanager
def signals_to(receive: Callable[[int, Any], None]) -> Iterator[None]:
    """Have SIGTERM and SIGINT call `receive` while the block runs (in the main thread; elsewhere they cannot be taken)."""
    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, receive) for number in (signal.SIGTERM, signal.SIGINT) if main}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Have SIGTERM raise KeyboardInterrupt while the block runs, where nothing else takes it: so that `finally` is reached."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


class Task:
    """Something that advances towards a total; `note` is shown at its right (a loss, a file)."""

    def __init__(self, label: str, total: int, bar: Progress | None, unit: str, before: int = 0) -> None:
        self.label, self.total, self.done, self.note, self.unit = visible(label), total, before, "", unit
        self._bar, self._before = bar, before
        self._id = bar.add_task(self.label, total=total, completed=before, note="", rate="") if bar else None
        self._start = self._last = time.monotonic()

    def advance(self, steps: int = 1, note: str | None = None) -> None:
        self.done += steps
        self.note = self.note if note is None else visible(note)
        if self._bar is not None and self._id is not None:
            self._bar.update(self._id, advance=steps, note=self.note, rate=self._rate())
        elif time.monotonic() - self._last >= _LINE_EVERY or self.done >= self.total:
            self._last = time.monotonic()
            line = f"{self.label}: {self.done}/{self.total}  {self._rate()}{self._left()}{self.note}"
            say(line.rstrip())

    def _rate(self) -> str:
        """``12 rows/s``, for tasks that have a unit."""
        made = self.done - self._before
        speed = made / max(1e-6, time.monotonic() - self._start)
        return f"{speed:.3g} {self.unit}/s  " if self.unit and made else ""

    def _left(self) -> str:
        if not self.unit or not self._before < self.done < self.total:
            return ""
        seconds = round((time.monotonic() - self._start) * (self.total - self.done) / (self.done - self._before))
        return f"{timedelta(seconds=seconds)} left  "


@contextmanager
def progress(label: str, total: int, quiet: bool = False, unit: str = "", before: int = 0) -> Iterator[Task]:
    """A `Task` with a bar while the block runs, if standard error is a terminal and rich is installed; else a line at times.

    Args:
        label: what is being done.
        total: steps in all.
        quiet: show nothing.
        unit: what a step is, in the plural; with it, the speed is shown.
        before: steps that an earlier process did; they do not count for the speed.
    """
    if quiet or find_spec("rich") is None or not (screen := console()).is_terminal:
        task = Task(label, total, None, unit, before)
        if quiet:
            task._last = float("inf")
            task.total = sys.maxsize
        yield task
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}", markup=False),
        TimeElapsedColumn(),
        TextColumn("passed,"),
        TimeRemainingColumn(),
        TextColumn("left"),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=screen) as bar:
        yield Task(label, total, bar, unit, before)
