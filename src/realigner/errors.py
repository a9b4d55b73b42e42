"""The one exception a user is meant to see: a single line that says what, where, and what to do."""

from __future__ import annotations


class RealignerError(Exception):
    """Something the user can mend; the message is one line naming the thing, the place and the way out.

    The command line prints it without a traceback and exits with code 1.
    """


class UsageError(RealignerError):
    """The call itself was wrong (an unknown tone, a bad flag value); the command line exits with code 2."""
