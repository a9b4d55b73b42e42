"""A file that only grows: what a long job has done so far, safe against being killed at any byte.

One line of JSON an entry; the first line says which job it is. A line that was being written when the process died has no end
of line and is cut off when the journal is opened again; everything before it counts.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout

from realigner.errors import RealignerError


class Journal:
    """The journal of one job, open for appending.

    Args:
        path: the file; made if it is not there.
        spec: what the job is; a journal of another one is refused.

    Attributes:
        entries: what was there when it was opened.

    Raises:
        RealignerError: for a journal of another job, a damaged one, one in use by another process, or a place that cannot be
            written.

    Example:
        >>> with Journal(Path("rows.jsonl.journal"), {"seed": 42}) as journal:  # doctest: +SKIP
        ...     journal.append({"id": "1", "text": "It is the Vltava!"})
    """

    def __init__(self, path: Path, spec: dict[str, Any]) -> None:
        self.path, self.spec = path, spec
        self.entries: list[dict[str, Any]] = []
        self._handle = -1
        self._lock = FileLock(f"{path}.lock")

    def __enter__(self) -> Journal:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
            self._handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            self._read()
        except Timeout:
            raise RealignerError(f"{self.path}: another process is working on it; wait for it, or stop it") from None
        except OSError as error:
            self._close()
            raise RealignerError(f"{self.path}: cannot be written ({error.strerror or error})") from None
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._close()

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

    def remove(self) -> None:
        """The job is done: take the journal away."""
        self.path.unlink(missing_ok=True)

    def _read(self) -> None:
        with self.path.open("rb") as stream:
            content = stream.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.ftruncate(self._handle, whole)
        if not whole:
            self.append(self.spec)
            return
        for number, line in enumerate(content[:whole].splitlines(), start=1):
            try:
                self.entries.append(json.loads(line))
            except ValueError:
                raise RealignerError(f"{self.path}:{number}: is damaged; start anew with --force") from None
        first = self.entries.pop(0)
        if first != self.spec:
            raise RealignerError(
                f"{self.path}: belongs to another build ({_difference(first, self.spec)}); start anew with --force"
            )

    def _close(self) -> None:
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1
        if self._lock.is_locked:
            self._lock.release()
            Path(self._lock.lock_file).unlink(missing_ok=True)


def _difference(there: Any, asked: dict[str, Any]) -> str:
    """The first key in which two jobs differ."""
    there = there if isinstance(there, dict) else {}
    key = next((key for key in (*asked, *there) if there.get(key) != asked.get(key)), "format")
    return f"its {key} is {json.dumps(there.get(key))}, asked for is {json.dumps(asked.get(key))}"[:200]
