"""Who can reach a server, and whether they need a key."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

from realigner.errors import UsageError


def is_reachable(address: str) -> bool:
    """Whether others than this machine can reach an address that is listened on.

    Example:
        >>> is_reachable("127.0.0.1"), is_reachable("0.0.0.0")
        (False, True)
    """
    try:
        return not ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address != "localhost"


def check_address(address: str, keys: Sequence[str], no_key: bool) -> None:
    """Raise UsageError for an address that others can reach, unless keys are asked for or nobody wants any.

    Example:
        >>> check_address("127.0.0.1", [], no_key=False)
    """
    if is_reachable(address) and not keys and not no_key:
        raise UsageError(
            f"address: {address} can be reached from elsewhere; give an api key, or say that you want none (no_key)"
        )


def check_keys(keys: Sequence[str]) -> None:
    """Raise UsageError unless each key can be sent in a header; what it is stays out of the message."""
    if not all(key and key.isascii() and key.isprintable() and " " not in key for key in keys):
        raise UsageError("api_key, admin_key: a key must be printable ASCII characters without spaces")
