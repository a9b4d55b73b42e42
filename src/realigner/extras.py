"""What is installed: versions, and the extras; an import that fails for want of one becomes one line that says which."""

from __future__ import annotations

import platform
import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution, requires, version
from traceback import walk_tb

from realigner.errors import MissingExtraError

# Module or folder of the research tools -> its extra. What an extra holds is read from the installed package's metadata.
FOLDERS = {
    **dict.fromkeys(("data", "validation_message"), "data"),
    "training": "train",
    "sweep": "sweep",
    **dict.fromkeys(("traces", "analysis", "explain", "report", "demo"), "study"),
    "evaluation": "evaluate",
    "serving": "serve",
    "app": "app",
}


def versions() -> dict[str, str]:
    """The versions that decide a result."""
    names = ("realigner", "torch", "transformers", "peft", "accelerate")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def missing_packages() -> dict[str, list[str]]:
    """Extra -> the packages it asks for that are not installed; none where it is whole.

    Example:
        >>> missing_packages()["train"]
        []
    """
    return {extra: _missing(extra) for extra in dict.fromkeys(FOLDERS.values())}


def raise_missing_extra(error: ImportError, what: str) -> None:
    """Raise `MissingExtraError` if `error` came of a part of realigner whose extra is not whole; else return.

    Args:
        error: what was caught; a `MissingExtraError` is raised anew, in the words of what was asked for.
        what: the command or name that was asked for, as the message is to call it.
    """
    if not isinstance(error, ModuleNotFoundError | MissingExtraError):
        return
    extra = next((FOLDERS[part] for part in _parts(error) if part in FOLDERS), None)  # of the part that was entered first
    if extra and (missing := _missing(extra)):
        what += f" needs packages that are not installed ({', '.join(missing)})"
        raise MissingExtraError(f'{what}; install them: pip install "realigner[{extra}]"') from error


def _parts(error: BaseException | None) -> Iterator[str]:
    """The files and folders of realigner that an error came through, the outermost first."""
    while error is not None:
        for frame, _ in walk_tb(error.__traceback__):
            package, _, rest = str(frame.f_globals.get("__name__")).partition(".")
            if package == "realigner":
                yield rest.partition(".")[0]
        error = error.__cause__


def _missing(extra: str) -> list[str]:
    return [name for name in _packages(extra) if not _installed(name)]


def _packages(extra: str) -> list[str]:
    """The distributions an extra asks for. (Where one extra includes another, hatchling writes out what is in it.)"""
    try:
        requirements = requires("realigner") or []
    except PackageNotFoundError:  # a source tree on the path
        return []
    return [re.split(r"[^\w.-]", line)[0] for line in requirements if re.search(rf"extra == ['\"]{extra}['\"]", line)]


def _installed(name: str) -> bool:
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True
