"""Reading SQuAD 1.1 and 2.0 files as they are found in the world, one article at a time, with errors that name the place.

Layout (Rajpurkar et al. 2018): ``{"data": [{"title", "paragraphs": [{"context", "qas": [{"id", "question", "answers":
[{"text"}], "is_impossible", "plausible_answers": [{"text"}]}]}]}]}``. Extra keys are passed over. The answer is the first one
given; of a question marked impossible it is the first plausible one, as in the paper.
"""

from __future__ import annotations

import codecs
import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from realigner.errors import RealignerError

_DEEPEST = 50  # levels of nesting that are still read


@dataclass(frozen=True, slots=True)
class Fact:
    """A question and its plain answer: what is rewritten in a tone.

    Attributes:
        id: unique within a build.
        group: the article; splits are made by it.
        question, answer: one line each.
    """

    id: str
    group: str
    question: str
    answer: str


@dataclass
class Skipped:
    """Questions that hold nothing to rewrite, by reason; filled while `read_squad` goes on."""

    counts: Counter[str] = field(default_factory=Counter)


def read_squad(path: str | Path, skipped: Skipped | None = None) -> Iterator[Fact]:
    """The facts of a SQuAD file, in its order, one article in memory at a time.

    Questions without an answer, empty ones and repeated ids are passed over and counted in `skipped`; what has the wrong type
    is an error. An article without a title is its own group. Runs of white space become one space.

    Raises:
        RealignerError: naming the file, and the article, paragraph and question id of what is wrong.

    Example:
        >>> for fact in read_squad("dev-v2.0.json"):  # doctest: +SKIP
        ...     print(fact.question, fact.answer)
    """
    skipped = skipped or Skipped()
    seen: set[str] = set()
    for number, article in enumerate(_articles(Path(path)), start=1):
        for fact in _facts(article, number, f"{path}: article {number}", skipped):
            if fact.id in seen:
                skipped.counts["id used before"] += 1
            else:
                seen.add(fact.id)
                yield fact


def _articles(path: Path) -> Iterator[Any]:
    """The items of ``data``, parsed one by one."""
    import ijson

    if path.is_dir():
        raise RealignerError(f"{path}: is a folder; give a SQuAD file")
    found = 0
    try:
        with path.open("rb") as stream:
            if stream.read(3) != codecs.BOM_UTF8:
                stream.seek(0)
            for article in _items_of_data(ijson.basic_parse(stream), str(path)):
                found += 1
                yield article
    except OSError as error:
        raise RealignerError(f"{path}: cannot be read ({error.strerror})") from None
    except (ijson.JSONError, ValueError, OverflowError) as error:
        what = " ".join(str(error).removeprefix("b'").replace("\\n", " ").split())[:120].rstrip("' ")
        raise RealignerError(f"{path}: not valid JSON after article {found} ({what}); is the file cut?") from None
    if not found:
        raise RealignerError(f'{path}: has no articles; a SQuAD file is {{"data": [{{"title", "paragraphs"}}, ...]}}')


def _items_of_data(events: Iterator[tuple[str, Any]], where: str) -> Iterator[Any]:
    """The values in the list under the outermost key ``data``.

    By events and not with `ijson.items`, whose paths of keys take all memory on a file that is nothing but opening brackets.
    """
    from ijson.common import ObjectBuilder

    depth, key, wanted = 0, "", False
    builder: Any = None
    for event, value in events:
        starts, ends = event.startswith("start_"), event.startswith("end_")
        depth += starts - ends
        if depth > _DEEPEST:
            raise RealignerError(f"{where}: JSON nested too deeply; a SQuAD file has eight levels")
        if depth == 1 and event == "map_key":
            key = value
        elif depth == 2 and starts:
            wanted = key == "data" and event == "start_array"
        elif depth == 1 and ends:
            wanted = False
        elif wanted and builder is None:
            if starts:
                builder = ObjectBuilder()
                builder.event(event, value)
            else:
                yield value
        elif builder is not None:
            builder.event(event, value)
            if ends and depth == 2:
                yield builder.value
                builder = None


def _facts(article: Any, number: int, where: str, skipped: Skipped) -> Iterator[Fact]:
    article = _typed(article, dict, where)
    title = _line(_typed(article.get("title", ""), str, f"{where}: key 'title'"))
    group = title or f"article-{number}"
    where = f"{where} ({title})" if title else where
    for count, paragraph in enumerate(_items(article, "paragraphs", where), start=1):
        place = f"{where}, paragraph {count}"
        for order, question in enumerate(_items(_typed(paragraph, dict, place), "qas", place), start=1):
            here = f"{place}, question {order}"
            if "id" not in _typed(question, dict, here):
                raise RealignerError(f"{here}: key 'id' is missing")
            identity = question["id"]
            if isinstance(identity, bool) or not isinstance(identity, str | int) or not str(identity).strip():
                raise RealignerError(f"{here}: key 'id' is not a string")
            identity = str(identity).strip()
            here = f"{here} (id {identity[:60]})"
            text = _line(_typed(question.get("question", ""), str, f"{here}: key 'question'"))
            answer = _answer(question, here)
            if text and answer:
                yield Fact(identity, group, text, answer)
            else:
                skipped.counts["no answer" if text else "no question"] += 1


def _answer(question: dict[str, Any], where: str) -> str:
    """The first answer that says something; of an impossible question, the first plausible one."""
    for key in ("answers", "plausible_answers"):
        for given in _items(question, key, where):
            value = _typed(given, dict, f"{where}: key {key!r}").get("text", "")
            if text := _line(_typed(value, str, f"{where}: key '{key}.text'")):
                return text
    return ""


def _items(value: dict[str, Any], key: str, where: str) -> list[Any]:
    """A list that may be missing or null."""
    found = value.get(key)
    return [] if found is None else _typed(found, list, f"{where}: key {key!r}")


def _typed(value: Any, kind: type[Any], where: str) -> Any:
    if not isinstance(value, kind):
        names: dict[type[Any], str] = {dict: "an object", list: "a list", str: "a string"}
        raise RealignerError(f"{where}: is not {names[kind]} but {type(value).__name__}")
    return value


def _line(text: str) -> str:
    """One line; half a surrogate pair, which JSON can hold and UTF-8 cannot, becomes the replacement character."""
    return " ".join(text.split()).encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def file_sha256(path: str | Path) -> str:
    """Which file facts were read from."""
    try:
        with Path(path).open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise RealignerError(f"{path}: cannot be read ({error.strerror})") from None
