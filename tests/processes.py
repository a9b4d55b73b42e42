"""Work in another process, to be killed at bad moments."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from pathlib import Path


def in_a_child(work: Callable[[], object], log: str | Path = os.devnull) -> int:
    """Run something in a forked process; returns its pid. What it says on standard error is added to a file."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        work()
        code = 0
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(code)
