"""The one exception a user is meant to see: a single line that says what, where, and what to do."""

from __future__ import annotations

import re

# What a terminal obeys instead of showing it (C0 but for the end of a line and the tab, DEL, C1), what hides or reorders the
# text around it (bidirectional embeddings, overrides and isolates, line and paragraph separators), half a surrogate pair.
_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: object) -> str:
    """Text for a terminal: what it would obey is written as Python and JSON write it, and so seen.

    Example:
        >>> print(visible("red: " + chr(27) + "[31m"))
        red: \\u001b[31m
    """
    return _OBEYED.sub(lambda match: f"\\u{ord(match[0]):04x}", str(text))


class RealignerError(Exception):
    """An error the user can fix; the message is one line with the object, the place and the remedy.

    The command line prints it without a traceback and exits with code 1. Control characters from files, endpoints and
    names are escaped in the message (`visible`).
    """

    def __str__(self) -> str:
        return visible(super().__str__())


class UsageError(RealignerError, ValueError):
    """The call itself was wrong (an unknown tone, a number out of range); the command line exits with code 2."""


class MissingExtraError(RealignerError, ImportError):
    """A part of realigner whose extra (``pip install "realigner[train]"``) is not installed."""
