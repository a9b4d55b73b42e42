"""Writing so that nothing is half-written or overwritten unasked; reading so that what is wrong is one line with the place.

Whatever a command makes is an `Artifact`: a name, what it may hold, and how its record is read. `is_ours` tells it from what
others made, `taken` holds its place from before the work begins until it has its name.
"""

from __future__ import annotations

import codecs
import errno
import json
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from realigner.errors import RealignerError

_T = TypeVar("_T")
_ASIDE = ".aside"  # the end of a file's or folder's name while it is being written
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV)  # of file systems without hard links
_RUST = re.compile(r"\(os error (\d+)\)")  # how Rust's libraries (safetensors, tokenizers) end a message about the disk
_HALF = re.compile(rb"\\u[dD][89a-fA-F]")  # JSON's escape of half a character
DOCUMENT = 64 << 20  # bytes of a file that is one document (a config, a recipe, a record) at most
_PIECE = 1 << 20  # bytes read at a time where a file does not say how many it has


@dataclass(frozen=True)
class Artifact:
    """A kind of output, and how one of ours is told from what others made.

    Attributes:
        name: what it is called in messages ("a run").
        record: reads what is at a path; raises anything at all when it is not of this kind.
        entries: of a folder: a regular expression for the relative path of each entry that it may hold, at any depth
            (a folder's path ends in a slash). Empty: it is a single file.
    """

    name: str
    record: Callable[[Path], object]
    entries: str = ""


def _not_ours(path: Path) -> None:
    raise RealignerError(f"{path}: is never replaced")


NEVER = Artifact("anything", _not_ours)  # of a place where nothing is ever replaced


def expanded(path: str | Path) -> Path:
    """A path with ``~`` and ``~user`` as home folders; one of a user that is not known here stays as it is.

    Example:
        >>> str(expanded("~nosuchuser/runs"))
        '~nosuchuser/runs'
    """
    return Path(os.path.expanduser(path))  # noqa: PTH111 - Path's own raises RuntimeError for such a user


def is_ours(path: Path, artifact: Artifact) -> bool:
    """Whether what is at a path is of this kind and nothing else, so that `force` may replace it.

    A folder is ours when every entry in it, at any depth, is one that we write, and its record parses; a file when its record
    parses. What is empty holds nothing that could be lost. Links and special files are never ours, and are not followed.
    """
    try:
        if path.is_symlink():
            return False
        if artifact.entries:
            empty = True
            for entry in _entries(path):
                empty = False
                if not re.fullmatch(artifact.entries, entry):
                    return False
            if empty:
                return path.is_dir()
        elif not path.is_file():
            return False
        elif not path.stat().st_size:
            return True
        artifact.record(path)
    except Exception:  # a parser may raise anything for what is not its own
        return False
    return True


def _entries(folder: Path, inside: str = "") -> Iterator[str]:
    """The relative path of everything in a folder.

    Raises:
        OSError: for what cannot be listed, and for what is neither a file nor a folder.
    """
    with os.scandir(folder) as found:
        for entry in found:
            name = f"{inside}{entry.name}"
            if entry.is_dir(follow_symlinks=False):
                yield f"{name}/"
                yield from _entries(Path(entry.path), f"{name}/")
            elif entry.is_file(follow_symlinks=False):
                yield name
            else:
                raise OSError(f"{name}: a link or a special file")


def discard(path: Path, artifact: Artifact) -> bool:
    """Delete a folder if it is ours (`is_ours`); returns whether it is gone."""
    if is_ours(path, artifact):
        shutil.rmtree(path, ignore_errors=True)
    return not path.exists()


@dataclass(frozen=True)
class Output:
    """A place that is held for writing (see `taken`)."""

    path: Path
    artifact: Artifact
    force: bool = False

    def refuse(self) -> None:
        """Raise unless the place is free, or what is there is ours (or empty) and may be replaced.

        Raises:
            RealignerError: naming the path and the way out.
        """
        if not os.path.lexists(self.path):
            return
        if not self.force or self.path.name in ("", ".."):
            raise RealignerError(f"{self.path}: exists already; choose another place, or overwrite it (force)")
        if not is_ours(self.path, self.artifact):
            raise RealignerError(
                f"{self.path}: force will not replace it, it is not something realigner made ({self.artifact.name} and nothing "
                "else); move it, or choose another place"
            )

    def remove_leftovers(self) -> None:
        """Delete what a killed process was filling beside the place, unless it holds anything else; called under the lock."""
        half = replace(self.artifact, record=lambda folder: None)
        for leftover in self.path.parent.glob(f".*{_ASIDE}"):
            if re.fullmatch(rf"\.{re.escape(self.path.name)}-[a-z0-9_]{{8}}{re.escape(_ASIDE)}", leftover.name):
                if leftover.is_dir():
                    discard(leftover, half)
                else:
                    with suppress(OSError):
                        leftover.unlink()

    @contextmanager
    def file(self) -> Iterator[Path]:
        """A file to fill, made beside the place and given its name when the block ends well; removed when it does not."""
        with writing(self.path), _aside_file(self.path) as aside:
            yield aside
            self.put(aside)

    @contextmanager
    def folder(self) -> Iterator[Path]:
        """A folder to fill, made beside the place and given its name when the block ends well; removed when it does not."""
        with writing(self.path), _aside_folder(self.path) as aside:
            try:
                yield aside
            except RealignerError as error:
                if str(aside) not in str(error):
                    raise
                raise RealignerError(str(error).replace(str(aside), str(self.path))) from error
            _open_up(aside)
            self.put(aside)

    def write(self, text: str) -> None:
        """Give the place a text."""
        with self.file() as aside:
            aside.write_text(text, encoding="utf-8")

    def put(self, made: Path) -> None:
        """Give what was made, a file or a folder, its place, asking once more what is there.

        Where nothing may be replaced, nothing is, whoever made it meanwhile: a file comes by a hard link, which fails where a
        name is taken, a folder by a rename, which fails on all but an empty folder. With `force`, a folder makes way first and
        is looked at again before it is deleted; if it is not ours (any more), it is put back.

        Raises:
            RealignerError: when something is there; what was made stays where it is.
        """
        self.refuse()
        with writing(self.path):
            if not os.path.lexists(self.path):
                self._name(made)
            elif made.is_dir():
                self._replace_folder(made)
            else:
                made.replace(self.path)

    def _name(self, made: Path) -> None:
        try:
            if made.is_dir():
                made.rename(self.path)
            else:
                _link(made, self.path)
        except OSError as error:
            if os.path.lexists(self.path):
                raise RealignerError(f"{self.path}: exists by now; choose another place, or overwrite it (force)") from error
            raise

    def _replace_folder(self, made: Path) -> None:
        away = Path(tempfile.mkdtemp(prefix=f".{self.path.name}-old-", dir=self.path.parent))
        old = away / self.path.name
        try:
            self.path.rename(old)
            Output(old, self.artifact, force=True).refuse()
            self._name(made)
        except BaseException:
            if old.exists() and not os.path.lexists(self.path):
                old.rename(self.path)
            with suppress(OSError):  # not empty: what could not be put back is not deleted
                away.rmdir()
            raise
        shutil.rmtree(away, ignore_errors=True)


def unfinished(path: Path) -> Path:
    """Where something that takes long is until it is finished: ``PATH.unfinished``.

    Raises:
        RealignerError: for a path without a name of its own, like ``.``.
    """
    if path.name in ("", ".."):
        raise RealignerError(f"{path}: give the name of a new folder")
    return path.with_name(f"{path.name}.unfinished")


@contextmanager
def taken(path: str | Path, artifact: Artifact, force: bool = False) -> Iterator[Output]:
    """Hold an output's place while the block runs: refused where something is there or another process holds it.

    It is asked what is there before and after the lock is had, and again when the output gets its place (`Output.put`).

    Raises:
        RealignerError: at once, naming the path and the way out.
    """
    output = Output(Path(path), artifact, force)
    output.refuse()
    with locked(output.path):
        output.refuse()
        output.remove_leftovers()
        yield output


@contextmanager
def claimed(place: AbstractContextManager[_T]) -> Iterator[_T]:
    """Hold a place (`taken`, `locked`) so that what the block calls in this thread may take it anew, one at a time.

    A command claims its place before its long work (loading a host), and the function that does the work takes it as it would
    for anybody.
    """
    with ExitStack() as held:
        _OURS.claiming = True
        try:
            entered = held.enter_context(place)
        finally:
            _OURS.claiming = False
        yield entered


class _Claims(threading.local):
    """The lock files that this thread has claimed, each with whether it is taken within."""

    def __init__(self) -> None:
        self.claiming = False
        self.files: dict[Path, bool] = {}


_OURS = _Claims()


@contextmanager
def locked(
    path: Path, busy: str = "another process is writing there; wait for it, stop it, or choose another place"
) -> Iterator[None]:
    """Hold a place by a lock file beside it; a process that died holds nothing.

    The lock file is removed while it is still held. Whoever had it open and gets the lock then has that of a file without a
    name: filelock looks for that (since 3.24) and does not take it. The folders above are made; those that are empty at the
    end are removed again.

    Args:
        path: the place; what is there is not looked at.
        busy: what to say where another holds it.

    Raises:
        RealignerError: at once, when another holds it or the lock file cannot be written.
    """
    with writing(path):
        place = path.resolve() if path.name in ("", "..") else path.parent.resolve() / path.name
    file = place.with_name(f".{place.name}.lock") if place.name else place / ".lock"
    claiming, claims = _OURS.claiming, _OURS.files
    if claims.get(file):
        raise RealignerError(f"{path}: {busy}")
    with nullcontext() if file in claims else _lock_file(file, path, busy):
        mine = file in claims
        if mine or claiming:
            claims[file] = mine
        try:
            yield
        finally:
            if mine:
                claims[file] = False
            elif claiming:
                del claims[file]


@contextmanager
def _lock_file(file: Path, path: Path, busy: str) -> Iterator[None]:
    from filelock import FileLock, Timeout  # in the extras of all who lock

    made = [folder for folder in file.parents if not folder.exists()]
    lock = FileLock(file, timeout=0)
    with writing(path):
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout:
            raise RealignerError(f"{path}: {busy}") from None
    try:
        yield
    finally:
        with suppress(OSError):
            if not file.stat().st_size:  # else it was there before and is somebody's
                file.unlink()
        lock.release()
        with suppress(OSError):
            for folder in made:
                folder.rmdir()


@contextmanager
def written_file(path: Path) -> Iterator[Path]:
    """A file to fill, made beside `path` and renamed to it when the block ends well; removed when it does not.

    What is there is replaced: for files inside a folder that is ours.
    """
    with writing(path), _aside_file(path) as aside:
        yield aside
        aside.replace(path)


def write_text(path: Path, text: str) -> None:
    """Write a file aside and rename it into place (`written_file`)."""
    with written_file(path) as aside:
        aside.write_text(text, encoding="utf-8")


@contextmanager
def _aside_file(path: Path) -> Iterator[Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}-", suffix=_ASIDE, dir=path.parent)
    os.close(handle)
    aside = Path(name)
    try:
        aside.chmod(0o666 & ~_umask())
        yield aside
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def _aside_folder(path: Path) -> Iterator[Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}-", suffix=_ASIDE, dir=path.parent))
    try:
        yield aside
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _link(made: Path, path: Path) -> None:
    """Give a file a second name and take the first away; a name that is taken is an error, unlike in a rename."""
    try:
        path.hardlink_to(made)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)) from None
        made.rename(path)
        return
    made.unlink()


def made_folder(path: str | Path) -> Path:
    """A folder, made where it is not there yet.

    Raises:
        RealignerError: when it cannot be, or something else is there.
    """
    folder = Path(path)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def writing(path: str | Path, remedy: str = "") -> Iterator[None]:
    """What the disk refuses in the block, in whichever library's words, as one line that names the place and what to do.

    Raises:
        RealignerError: for an error of the disk (`disk_fault`); others pass.
    """
    try:
        yield
    except RealignerError:
        raise
    except Exception as error:
        if (why := disk_fault(error)) is None:
            raise
        raise RealignerError(f"{path}: cannot be written ({why}){remedy}") from error


def disk_fault(error: BaseException) -> str | None:
    """What the operating system said, where an error is about that; libraries in Rust say it in errors that are no OSError."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    number = _RUST.search(str(error))
    return os.strerror(int(number[1])) if number else None


def read_bytes(path: str | Path, most: int = 1 << 26) -> bytes:
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
            data = stream.read(size) if size <= most else b""
            while size <= most and len(data) <= most and (more := stream.read(_PIECE)):  # a pipe or a device: it says 0
                data += more
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
    value = value_of(data, path, line)
    if not isinstance(value, dict):
        raise RealignerError(f"{path}:{line}: not a JSON object")
    return value


def value_of(data: bytes, path: str | Path, line: int = 1) -> Any:
    """`parsed`, and its texts can be written again: no half characters.

    Raises:
        RealignerError: naming the line, when it is no JSON, or holds half a character.
    """
    value = parsed(data, path, line)
    if _HALF.search(data):  # half a pair, perhaps
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


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
