"""The pages of the documentation: their code blocks, found by sybil, and how the blocks of each language are tried.

`python -m tests.pages` writes the one page that is made from the command line (part of `make docs`).

A block that cannot be tried carries its reason in the page, in a comment before it: ``<!--- skip: next "why" -->``.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import SkipTest

import typer.cli
from sybil import Example, Sybil
from sybil.parsers.markdown import CodeBlockParser, SkipParser

from realigner.cli import app

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
_STUDY = DOCS / "results" / "evaluation"  # what the study keeps, cards of adapters among it
_WRITTEN = [page for page in DOCS.rglob("*.md") if _STUDY not in page.parents]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *_WRITTEN])
LANGUAGES = ("python", "bash", "toml", "yaml", "json")  # that are tried
AS_IT_IS = ("text", "console")  # what something printed
CLI: Any = typer.main.get_command(app)
COMMAND_PAGE = DOCS / "reference" / "cli.md"
Try = Callable[[str, dict[str, Any]], None]  # a block's text, and the page's namespace


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def try_blocks(page: Path, tries: Mapping[str, Try]) -> tuple[int, list[str]]:
    """Try a page's blocks of some languages from top to bottom, in one namespace.

    Returns:
        How many were tried, and the reasons of those that were skipped.
    """
    tried, reasons = 0, list[str]()

    def trying(language: str) -> Callable[[Example], None]:
        def evaluate(example: Example) -> None:
            nonlocal tried
            if language in tries:
                tries[language](str(example.parsed), example.namespace)
                tried += 1

        return evaluate

    parsers = [CodeBlockParser(language, trying(language)) for language in LANGUAGES]
    for example in Sybil(parsers=[SkipParser(), *parsers]).parse(page).examples():
        try:
            example.evaluate()
        except SkipTest as skipped:
            reasons.append(str(skipped))
    return tried, reasons


def fences(page: Path) -> list[str]:
    """The language of each block of a page, empty where none is given."""
    marks = re.findall(r"^ *(```+)(.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return [language.strip() for _, language in marks[::2]]


def segments(block: str) -> Iterator[list[str]]:
    """The simple commands of a shell script, as words: its lines, divided at pipes and the like, without redirections."""
    for line in block.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
        lexer.commenters, lexer.whitespace_split = "#", True
        words, skip = list[str](), False
        for token in lexer:
            if set(token) <= set("|&;"):
                yield words
                words = []
            elif set(token) <= set("<>"):
                skip = True
            elif skip:
                skip = False
            else:
                words.append(token)
        yield words


def commands(block: str, launched: bool = True) -> Iterator[list[str]]:
    """The arguments of every ``realigner`` command in a shell script; `launched`: also behind srun, accelerate, torchrun."""
    for words in segments(block):
        for at, word in enumerate(words):
            first = at == 0 or words[at - 1] in ("srun", "-m", "time") or "=" in words[at - 1]
            if word == "realigner" and first and (at == 0 or launched):
                yield words[at + 1 :]
                break


def parsed(arguments: list[str]) -> tuple[str, dict[str, Any]]:
    """A command line's command and options as the command line itself reads them; nothing is run.

    Raises:
        typer.exceptions.TyperException: for a command or an option that there is not, or a value that it does not take.
    """
    group, name = CLI, ""
    context = group.make_context("realigner", list(arguments))
    rest = [*context._protected_args, *context.args]
    while hasattr(group, "resolve_command"):
        part, command, rest = group.resolve_command(context, rest)
        name = f"{name} {part}".strip()
        if hasattr(command, "resolve_command"):
            context = command.make_context(part, rest, parent=context)
            rest = [*context._protected_args, *context.args]
        else:
            context = command.make_context(part, rest, parent=context)
        group = command
    return name, dict(context.params)


def command_page() -> str:
    """The reference of the command line."""
    context: Any = CLI.make_context("realigner", [], resilient_parsing=True)
    text: str = typer.cli.get_docs_for_click(obj=CLI, ctx=context, name="realigner", title="Command line")
    return text.strip() + "\n"


if __name__ == "__main__":
    COMMAND_PAGE.write_text(command_page(), encoding="utf-8")
