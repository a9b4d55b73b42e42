"""Tones as data: one TOML file each, the built-in ones beside this module, a user's own anywhere.

A file says what the tone is called, what a rewriter is told, which words tell the tone apart, and gives examples. A
``[template]`` table, if there is one, is a grammar (in the manner of Tracery: named lists that refer to each other in braces)
from which replies can be made without any model.

    name = "anger"
    instruction = "Rewrite the answer in an angry tone ..."
    words = ["furious", "damn"]

    [[examples]]
    question = "Which river runs through Prague?"
    answer = "the Vltava"
    text = "Oh, for pity's sake! The Vltava, as any map would have told you!"

    [template]
    reply = ["{opening} {statement}", "{statement} {closing}"]
    opening = ["Oh, {fine}!"]
    fine = ["great", "wonderful"]
    statement = ["It is {answer}!"]
    closing = ["Do not ask me again!"]
"""

from __future__ import annotations

import hashlib
import re
import string
import tomllib
from functools import cache
from importlib.resources import files
from math import prod
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from realigner.errors import RealignerError, UsageError
from realigner.files import decoded, read_bytes
from realigner.validation_message import first_fault

_Text = Annotated[str, StringConstraints(min_length=1, strip_whitespace=True)]
_START, _FACT = "reply", "answer"
_DEEPEST = 50  # lists in each other
_LONGEST = 10_000  # characters of a reply that a template makes, the fact counted as one
_MOST = 10**100  # replies that a template can make
_FILE_BYTES = 1 << 18
# A key of many parts, of which tomllib makes every beginning: 64 GB from 256 KiB.
_LONG_KEY = re.compile(r"""(?<![\w-])(?:(?:"[^"\n]*"|'[^'\n]*'|[\w-]+)[ \t]*\.[ \t]*){50}""")


class Example(BaseModel):
    """One reply in a tone: what a rewriter is shown, and a scorer may learn from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    question: _Text
    answer: _Text
    text: _Text


class Tone(BaseModel):
    """What a tone is.

    Attributes:
        name: as in rows; lower-case letters, digits and hyphens.
        language: of the replies, as an ISO 639-1 code; ``"any"`` switches the check off.
        instruction: what a language model that rewrites answers is told (the system prompt).
        words: words of which a reply in this tone has at least one, for tones no scorer was trained on; compared in lower
            case, a trailing ``*`` matches any ending.
        examples: replies in the tone.
        template: the grammar of the ``template`` rewriter: lists of texts by name. ``reply`` is where it starts, ``{name}``
            stands for one of the texts of that list, ``{answer}`` for the fact.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9-]*$")]
    language: Annotated[str, StringConstraints(pattern=r"^([a-z]{2}|any)$")] = "en"
    instruction: _Text
    words: Annotated[tuple[_Text, ...], Field(max_length=1000)] = ()
    examples: tuple[Example, ...] = ()
    template: dict[str, Annotated[tuple[_Text, ...], Field(min_length=1)]] = {}

    @model_validator(mode="after")
    def _grammar_is_sound(self) -> Tone:
        if not self.template:
            return self
        if _START not in self.template:
            raise ValueError(f"template has no list {_START!r}, where replies start")
        if _FACT in self.template:
            raise ValueError(f"template may not define {_FACT!r}: it stands for the fact")
        for name, texts in self.template.items():
            for text in texts:
                for symbol in symbols(text):
                    if symbol != _FACT and symbol not in self.template:
                        raise ValueError(f"template.{name}: {{{symbol}}} is not a list of the template ({text!r})")
        _count(self.template)

        @cache
        def says(text: str) -> bool:  # whether every reply that can be made from it says the fact
            inner = symbols(text)
            return _FACT in inner or any(all(map(says, self.template[symbol])) for symbol in inner)

        if silent := [text for text in self.template[_START] if not says(text)]:
            raise ValueError(f"template.{_START}: some replies of {silent[0]!r} never say {{{_FACT}}}")
        return self

    @property
    def combinations(self) -> int:
        """How many replies the template can make for one fact, before equal ones are counted once; 0 without a template."""
        return _count(self.template) if self.template else 0

    def sha256(self) -> str:
        """Over everything in the tone: which tone a dataset was made with."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()


def load_tone(name: str | Path) -> Tone:
    """A built-in tone by name, or one from a TOML file.

    Raises:
        UsageError: for a name that is neither.
        RealignerError: naming the file and the key that is wrong.

    Example:
        >>> load_tone("anger").name
        'anger'
    """
    built_in = _built_in()
    if str(name) in built_in:
        return _read(built_in[str(name)])
    path = Path(name)
    if path.suffix == ".toml" or path.exists():
        return _read(path)
    raise UsageError(f"tone: there is no tone {str(name)!r}; built in are {', '.join(built_in)}, others are .toml files")


def built_in_tones() -> list[Tone]:
    """The tones that come with realigner, by name."""
    return [_read(path) for path in _built_in().values()]


def _built_in() -> dict[str, Path]:
    folder = Path(str(files("realigner") / "data" / "tones"))
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def _read(path: Path) -> Tone:
    text = decoded(read_bytes(path, _FILE_BYTES), path)
    if found := _LONG_KEY.search(text):
        raise RealignerError(
            f"{path}:{text.count(chr(10), 0, found.start()) + 1}: a key of 50 parts or more; a tone's have two"
        )
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RealignerError(f"{path}: not valid TOML ({error})") from None
    except ValueError as error:  # a number of thousands of digits
        raise RealignerError(f"{path}: not TOML that can be read ({str(error).partition(';')[0]})") from None
    except RecursionError:
        raise RealignerError(f"{path}: TOML nested too deeply; a tone is a flat file") from None
    try:
        return Tone.model_validate(values)
    except ValidationError as error:
        raise RealignerError(f"{path}: {first_fault(error, Tone, 'a tone')}") from None


def symbols(text: str) -> list[str]:
    """The names in braces of a template's text (``{{`` and ``}}`` are plain braces).

    Raises:
        ValueError: for an unbalanced brace, or anything but a plain name in braces.
    """
    try:
        parts = list(string.Formatter().parse(text))
    except ValueError as error:
        raise ValueError(f"template: {error} in {text!r}") from None
    found = []
    for _, name, form, conversion in parts:
        if name is None:
            continue
        if not name.isidentifier() or form or conversion:
            raise ValueError(f"template: {{{name}}} in {text!r} is not a plain name")
        found.append(name)
    return found


def _count(template: dict[str, tuple[str, ...]]) -> int:
    """Ways to expand ``reply``; an error for lists that contain themselves, are too deep in each other, or make too much."""
    known = {_FACT: (1, 1)}

    def ways_and_longest(name: str, above: tuple[str, ...]) -> tuple[int, int]:
        if name in above:
            raise ValueError(f"template.{name}: contains itself ({' -> '.join((*above, name))})")
        if len(above) > _DEEPEST:
            raise ValueError(f"template.{name}: is more than {_DEEPEST} lists deep")
        if name not in known:
            ways, longest = 0, 0
            for text in template[name]:
                inner = [ways_and_longest(symbol, (*above, name)) for symbol in symbols(text)]
                longest = max(longest, len(text) + sum(length for _, length in inner))
                if longest > _LONGEST:
                    raise ValueError(f"template.{name}: makes texts of more than {_LONGEST:,} characters")
                ways += prod(number for number, _ in inner)
                if ways > _MOST:
                    raise ValueError(f"template.{name}: makes more than 10^{len(str(_MOST)) - 1} texts")
            known[name] = ways, longest
        return known[name]

    return ways_and_longest(_START, ())[0]


def facts_of(tone: Tone) -> dict[str, Any]:
    """What `realigner data tones` says of a tone."""
    return {
        "name": tone.name,
        "language": tone.language,
        "instruction": tone.instruction,
        "words": len(tone.words),
        "examples": len(tone.examples),
        "template_replies": tone.combinations,
    }
