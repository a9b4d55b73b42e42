"""The one exception a user is meant to see: a single line that says what, where, and what to do."""

from __future__ import annotations


class RealignerError(Exception):
    """An error the user can fix; the message is one line with the object, the place and the remedy.

    The command line prints it without a traceback and exits with code 1.
    """


class UsageError(RealignerError, ValueError):
    """The call itself was wrong (an unknown tone, a number out of range); the command line exits with code 2."""


class MissingExtraError(RealignerError, ImportError):
    """A part of realigner whose extra (``pip install "realigner[train]"``) is not installed."""
