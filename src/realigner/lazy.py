"""Names of a package that are resolved on first use, so that importing it brings nothing heavy (PEP 562)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazily(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """A package's ``__getattr__``.

    Args:
        package: its ``__name__``.
        homes: name -> the module in the package that has it; empty: the name is itself a module of the package.

    Raises:
        MissingExtraError: by what it returns, when a name's extra is not installed.

    Example:
        >>> lazily("realigner", {"tiny_host": "tiny"})("tiny_host").__module__
        'realigner.tiny'
    """

    def resolve(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        home = homes[name]
        try:
            value = getattr(import_module(f"{package}.{home}"), name) if home else import_module(f"{package}.{name}")
        except ImportError as error:
            from realigner.extras import raise_missing_extra

            raise_missing_extra(error, f"{package}.{name}")
            raise
        setattr(sys.modules[package], name, value)
        return value

    return resolve
