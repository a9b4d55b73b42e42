"""Writing so that nothing is half-written or overwritten unasked; reading so that what is wrong is one line with the place."""

from __future__ import annotations

import codecs
import glob
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from realigner.errors import RealignerError

_ASIDE = ".aside"  # the end of a file's name while it is being written
_HALF = re.compile(rb"\\u[dD][89a-fA-F]")  # JSON's escape of half a character
DOCUMENT = 64 << 20  # bytes of a file that is one document (a config, a recipe, a record) at most


def refuse_existing(path: Path, force: bool, ours: Callable[[Path], bool]) -> None:
    """Raise unless `path` is free, or `force` was given and what is there is of our own making (or an empty folder).

    Raises:
        RealignerError: naming the path and the way out.
    """
    if not (path.exists() or path.is_symlink()):
        return
    if not force:
        raise RealignerError(f"{path}: exists already; choose another place, or overwrite it (force)")
    empty = path.is_dir() and not any(path.iterdir())
    if not empty and not ours(path):
        raise RealignerError(f"{path}: force will not replace it, it is not something realigner made")


@dataclass
class Aside:
    """A folder being filled, and where it will go (may be changed until the block ends)."""

    folder: Path
    target: Path


@contextmanager
def written_folder(path: Path) -> Iterator[Aside]:
    """A folder to fill, made beside `path` and renamed to it when the block ends well; removed when it does not."""
    with _named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = Aside(Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent)), path)
    try:
        with _named(path):
            yield aside
            _open_up(aside.folder)
            replace_folder(aside.folder, aside.target)
    finally:
        shutil.rmtree(aside.folder, ignore_errors=True)


@contextmanager
def written_file(path: Path) -> Iterator[Path]:
    """A file to fill, made beside `path` and renamed to it when the block ends well; removed when it does not."""
    with _named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}-", suffix=_ASIDE, dir=path.parent)
        os.close(handle)
    aside = Path(name)
    try:
        with _named(path):
            yield aside
            aside.chmod(0o666 & ~_umask())
            aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def clear_asides(path: Path) -> None:
    """Remove what processes that were killed left of writing `path`; only where no other process can be writing it now."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}-*{_ASIDE}"):
        if leftover.is_file():
            leftover.unlink()


@contextmanager
def locked_file(path: Path, busy: str) -> Iterator[None]:
    """Hold a lock file for this process while the block runs; a process that died holds nothing.

    Args:
        path: the lock file; it is made, and stays.
        busy: what to say where another process holds it.

    Raises:
        RealignerError: at once, when another process holds it or the file cannot be written.
    """
    from filelock import FileLock, Timeout  # in the extras of all who lock

    lock = FileLock(path, timeout=0)
    with _named(path):
        try:
            lock.acquire()
        except Timeout:
            raise RealignerError(busy) from None
    try:
        yield
    finally:
        lock.release()


def write_text(path: Path, text: str) -> None:
    """Write a file aside and rename it into place."""
    with written_file(path) as aside:
        aside.write_text(text, encoding="utf-8")


def made_folder(path: str | Path) -> Path:
    """A folder, made where it is not there yet.

    Raises:
        RealignerError: when it cannot be, or something else is there.
    """
    folder = Path(path)
    with _named(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def read_bytes(path: str | Path, most: int = 1 << 30) -> bytes:
    """A file's content, without a byte order mark.

    Args:
        path: the file.
        most: bytes it may have.

    Raises:
        RealignerError: when it cannot be read, or is larger.
    """
    try:
        with Path(path).open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            data = stream.read(most + 1) if size <= most else b""  # a device has no size
    except (OSError, ValueError) as error:  # ValueError: a NUL in its name
        raise RealignerError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if max(size, len(data)) > most:
        raise RealignerError(f"{path}: larger than the {most >> 10:,} KiB that are read of such a file")
    return data.removeprefix(codecs.BOM_UTF8)


def read_object(path: str | Path) -> dict[str, Any]:
    """The JSON object that a file holds: a config, a record.

    Raises:
        RealignerError: when it cannot be read or is too large, naming the line where it is not JSON.
    """
    return object_of(read_bytes(path, DOCUMENT), path)


def object_of(data: bytes, path: str | Path, line: int = 1) -> dict[str, Any]:
    """The JSON object of `data`, which begins at `line` of a file.

    Raises:
        RealignerError: naming the line, when it is none.
    """
    value = parsed(data, path, line)
    if not isinstance(value, dict):
        raise RealignerError(f"{path}:{line}: not a JSON object")
    if _HALF.search(data):  # half a pair, perhaps: what could never be written again
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise RealignerError(f"{path}:{line}: holds half a character (a \\u escape of two without the other)") from None
    return value


def decoded(data: bytes, path: str | Path, line: int = 1) -> str:
    """Text of `data`, which begins at `line` of a file; a RealignerError that names the line when it is not UTF-8."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        byte = error.start - (data.rfind(b"\n", 0, error.start) + 1) + 1
        raise RealignerError(f"{path}:{line}: not UTF-8 text (byte {byte} of the line); save the file as UTF-8") from None


def parsed(data: bytes, path: str | Path, line: int = 1) -> Any:
    """The JSON value of `data`, which begins at `line` of a file; a RealignerError that names the line when it has none."""
    try:
        return json.loads(decoded(data, path, line))
    except json.JSONDecodeError as error:
        where = f"{path}:{line + error.lineno - 1}"
        raise RealignerError(f"{where}: not valid JSON (column {error.colno}: {error.msg})") from None
    except RecursionError:
        raise RealignerError(f"{path}:{line}: JSON nested too deeply to be one of ours") from None
    except ValueError:
        raise RealignerError(f"{path}:{line}: not JSON that can be read (a number has thousands of digits)") from None


def _open_up(folder: Path) -> None:
    """Give what was made with a temporary file's private mode the mode any new file has."""
    mask = _umask()
    for path in (folder, *folder.rglob("*")):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def replace_folder(aside: Path, path: Path) -> None:
    """Rename a folder to `path`; one that is there already makes way at the last moment."""
    if not path.exists():
        aside.rename(path)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{path.name}-old-", dir=path.parent))
    try:
        path.rename(old / path.name)
        aside.rename(path)
    finally:
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """An OSError of the block as one line that names the place."""
    try:
        yield
    except OSError as error:
        raise RealignerError(f"{path}: cannot be written ({error.strerror or error})") from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
