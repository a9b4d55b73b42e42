"""Self-contained HTML pages, which make no requests."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from realigner.errors import RealignerError
from realigner.files import decoded, read_bytes

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


def signature(generator: str) -> str:
    """The element by which a page says what wrote it."""
    return f'<meta name="generator" content="{generator}">'


def check_signed(path: Path, generator: str) -> None:
    """Raise unless a file is a whole page whose head says that `generator` wrote it.

    Raises:
        RealignerError: when it is not, or cannot be read.
    """
    text = decoded(read_bytes(path), path)
    head = _Head()
    head.feed(text[:8192])
    if head.generator != generator or not text.rstrip().endswith("</html>"):
        raise RealignerError(f"{path}: not a page of {generator}")


class _Head(HTMLParser):
    """What a page's head names as its generator, first."""

    def __init__(self) -> None:
        super().__init__()
        self.generator: str | None = None
        self._over = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._over = self._over or tag == "body"
        named = dict(attrs)
        if tag == "meta" and named.get("name") == "generator" and self.generator is None and not self._over:
            self.generator = named.get("content")
