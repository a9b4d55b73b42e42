"""Self-contained HTML pages, which make no requests."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

from jinja2 import Environment, FileSystemLoader, StrictUndefined

F = TypeVar("F", bound=Callable[..., Any])


@lru_cache(1)
def templates() -> Environment:
    """The templates of this folder."""
    loader = FileSystemLoader(str(files("realigner") / "report"))
    found = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    found.tests["finite"] = lambda value: math.isfinite(number(value))
    return found


def page_filter(function: F) -> F:
    """Let templates call a function by its name."""
    templates().filters[function.__name__] = function
    return function


def number(value: Any) -> float:
    """A float; NaN for anything that is not a number."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def render_page(template: str, **values: Any) -> str:
    """A template of this folder as HTML text."""
    return templates().get_template(template).render(**values)


def is_signed(path: Path, signature: str) -> bool:
    """Whether a file is a page with this signature, written by realigner (which `force` may replace)."""
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        return signature.encode() in stream.read(8192)
