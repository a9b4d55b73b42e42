"""The documentation as a site: links, the navigation, the reference, error messages as the source has them, search."""

from __future__ import annotations

import ast
import importlib
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import yaml
from markdown.extensions.toc import slugify
from markdown_it import MarkdownIt

import realigner as ra
from tests.pages import COMMAND_PAGE, DOCS, PAGES, ROOT, command_page, name_of

SOURCE = Path(ra.__file__).parent
ERRORS = sorted((DOCS / "errors").glob("*.md"))
PARTS = ("analysis", "data", "explain", "report", "sweep", "traces", "training")
PACKAGES = ["realigner", *(f"realigner.{name}" for name in PARTS)]
READER = MarkdownIt("commonmark").enable("table")


def links(page: Path) -> Iterator[str]:
    """What a page's links and images point to."""
    for block in READER.parse(page.read_text(encoding="utf-8")):
        for token in block.children or ():
            if target := token.attrs.get("href") or token.attrs.get("src"):
                yield str(target)


@cache
def anchors(page: Path) -> frozenset[str]:
    """The anchors of a page's headings, as the code host and the site make them."""
    tokens = READER.parse(page.read_text(encoding="utf-8"))
    heads = [tokens[n + 1] for n, token in enumerate(tokens) if token.type == "heading_open"]
    texts = ["".join(part.content for part in head.children or ()) for head in heads]
    return frozenset(slugify(text, "-") for text in texts)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    """On the code host: files that are there, and anchors that are headings of theirs. (mkdocs checks the site's own.)"""
    for link in links(page):
        target, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", link):
            assert link.startswith("https://"), link
            continue
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), link
        if anchor:
            assert anchor in anchors(file), link


def test_the_navigation_has_every_page() -> None:
    class Loader(yaml.SafeLoader):
        pass

    def pages(entry: object) -> Iterator[str]:
        if isinstance(entry, str):
            yield entry
        for part in entry.values() if isinstance(entry, dict) else entry if isinstance(entry, list) else ():
            yield from pages(part)

    named = list(pages(yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader)["nav"]))
    assert len(named) == len(set(named))
    assert {str(page.relative_to(DOCS)) for page in PAGES if page.is_relative_to(DOCS)} == set(named)


def test_the_reference_has_every_public_name() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in (DOCS / "reference").glob("*.md"))
    documented = set(re.findall(r"^::: (\S+)$", text, re.MULTILINE))
    for name in documented:  # each is there
        module, _, own = name.rpartition(".")
        assert getattr(importlib.import_module(module), own).__doc__, name
    for package in PACKAGES:
        home = importlib.import_module(package)
        for name in home.__all__:
            value = getattr(home, name)
            if callable(value) and hasattr(value, "__qualname__"):
                assert f"{value.__module__}.{value.__qualname__}" in documented, (package, name)


def test_the_command_lines_page_is_todays() -> None:
    assert COMMAND_PAGE.read_text(encoding="utf-8") == command_page(), "run: make docs"


@cache
def templates() -> list[str]:
    """Every string of the source, with a NUL where a value is put in."""
    found = []
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "\0" for part in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def messages(page: Path) -> list[str]:
    blocks = re.findall(r"^```text\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


def is_said(message: str) -> bool:
    """Whether one string of the source has all fixed parts of a message, in this order."""
    parts = [re.escape(part.strip(" :")) for part in message.split("...") if part.strip(" :;,.()")]
    pattern = re.compile(".*".join(parts), re.DOTALL)
    return bool(parts) and any(pattern.search(template) for template in templates())


@pytest.mark.parametrize("page", ERRORS, ids=name_of)
def test_error_messages_are_those_of_the_source(page: Path) -> None:
    missing = [message for message in messages(page) if not is_said(message)]
    assert missing == []


def test_there_are_enough_error_messages_and_a_wrong_one_is_found() -> None:
    assert sum(len(messages(page)) for page in ERRORS) >= 100
    assert not is_said("...: there is no such adaptor folder")
    assert not is_said("loaded are ...; ... is not loaded")


def test_search_finds(site: Path) -> None:
    """The built site: its index has the words that people look for, on the pages that are about them."""
    entries = json.loads((site / "search" / "search_index.json").read_text(encoding="utf-8"))["docs"]
    for word, page in {
        "strength": "howto/strength.html",
        "there is no such adapter folder": "errors/adapters.html",
        "IRMConfig": "reference/library.html",
        "1512": "howto/index-1512.html",
        "--learning-rate": "reference/cli.html",
    }.items():
        places = {entry["location"].partition("#")[0] for entry in entries if word in entry["title"] + entry["text"]}
        assert page in places, (word, places)


def test_the_site_asks_nobody_else(site: Path) -> None:
    """Whatever a page loads by itself lies within the site."""
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        loads = re.findall(r"<(?:script|img|iframe|source|link)\b[^>]*?\s(?:src|href)=\"?([^\s\">]+)", text)
        assert loads
        assert [target for target in loads if re.match(r"(https?:)?//", target)] == [], page
    for sheet in site.rglob("*.css"):
        assert not re.search(r"url\([\"']?(https?:)?//|@import", sheet.read_text(encoding="utf-8")), sheet


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built strict: a warning is an error."""
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    folder = tmp_path_factory.mktemp("site")
    config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=True)
    config.plugins.on_startup(command="build", dirty=False)
    build(config)
    return folder
