"""A file that only grows: what a long job has done so far, safe against being killed at any byte.

One line of JSON an entry; the first line says which job it is. A line that was being written when the process died has no end
of line and is cut off when the journal is opened again; everything before it counts.
"""

from __future__ import annotations

import json
import os
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from realigner.errors import RealignerError
from realigner.files import locked, object_of

_KIND = "journal"  # the key by which the first line of a journal is recognised


@dataclass(eq=False)
class AppendLog:
    """The journal of one job, open for appending and locked against other processes.

    Raises:
        RealignerError: for a journal of another job, a damaged one, one in use by another process, a file that is
            not a journal, or a place that cannot be written.

    Example:
        >>> with AppendLog(Path("rows.journal"), {"seed": 42}) as journal:  # doctest: +SKIP
        ...     journal.append({"id": "1", "text": "It is the Vltava!"})
    """

    path: Path  # made if it is not there
    spec: dict[str, Any]  # what the job is: a journal of the same job is resumed, one of another refused
    restart: bool = False  # replace a journal of another job

    def __post_init__(self) -> None:
        self.spec = {_KIND: 1, **self.spec}
        self.entries: list[dict[str, Any]] = []  # what was there when it was opened
        self._handle = -1

    def __enter__(self) -> AppendLog:
        if self.path.is_symlink():
            raise RealignerError(f"{self.path}: is a link; move it or choose another out")
        with ExitStack() as stack:
            stack.enter_context(locked(self.path, "another process is working on it; wait for it, or stop it"))
            try:
                self._handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
                stack.callback(os.close, self._handle)
                self._read()
            except OSError as error:
                raise RealignerError(f"{self.path}: cannot be written ({error.strerror or error})") from None
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def append(self, entry: dict[str, Any]) -> None:
        """Write one entry, whole or (when the disk is full) not at all.

        Raises:
            RealignerError: when it cannot be written; entries written before stay.
        """
        line = json.dumps(entry, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
        whole = os.fstat(self._handle).st_size
        try:
            while line:
                line = line[os.write(self._handle, line) :]
        except OSError as error:
            os.ftruncate(self._handle, whole)
            raise RealignerError(
                f"{self.path}: cannot be written ({error.strerror or error}); what was done so far is kept: free some "
                "space and run the same command again to go on"
            ) from None

    def _read(self) -> None:
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        line = content.partition(b"\n")[0]
        start = json.dumps({_KIND: 1}, separators=(",", ":"))[:-1].encode()
        if whole or not start.startswith(line[: len(start)]):  # else it was killed before it could say which job it is of
            try:
                first = json.loads(line)
            except (ValueError, RecursionError):
                first = None
            if not isinstance(first, dict) or _KIND not in first:
                raise RealignerError(f"{self.path}: exists but is not a realigner journal; move it or choose another out")
        else:
            first = self.spec
        if first != self.spec:
            if not self.restart:
                key = next((key for key in (*self.spec, *first) if first.get(key) != self.spec.get(key)), "format")
                differs = f"its {key} is {json.dumps(first.get(key))}, asked for is {json.dumps(self.spec.get(key))}"[:200]
                raise RealignerError(f"{self.path}: belongs to another build ({differs}); start anew (force)")
            whole = 0
        self.entries = []
        for number, line in enumerate(content[:whole].splitlines()[1:], start=2):
            try:
                self.entries.append(object_of(line, self.path, number))
            except RealignerError:
                if not self.restart:
                    raise RealignerError(f"{self.path}:{number}: is damaged; start anew (force)") from None
                self.entries, whole = [], 0
                break
        if whole < len(content):
            os.ftruncate(self._handle, whole)
        if not whole:
            self.append(self.spec)
