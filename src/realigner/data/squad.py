"""Reading SQuAD as it is found in the world, an article or a row at a time, with errors that name the place.

Layout (Rajpurkar et al. 2018): ``{"data": [{"title", "paragraphs": [{"context", "qas": [{"id", "question", "answers":
[{"text"}], "is_impossible", "plausible_answers": [{"text"}]}]}]}]}``. Also read are KorQuAD 2.0's, where an article has ``qas``
and a question one ``answer``, and the rows of Hugging Face's, ``{"id", "title", "context", "question", "answers": {"text":
[...]}}``. Articles or rows stand in the list ``data``, in a list that is the whole file, one in a line (JSONL), or in a Parquet
file. Extra keys are passed over. The answer is the first one given; of a question marked impossible it is the first plausible
one, as in the paper.
"""

from __future__ import annotations

import codecs
import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from realigner.errors import RealignerError
from realigner.files import parsed

_DEEPEST = 50  # levels of nesting that are still read
_LONGEST_LINE = 1 << 24  # bytes
_ANSWERS = ("answers", "answer", "plausible_answers")
_ROW_KEYS = {"id", "guid", "title", "context", "question", "paragraphs", "qas", *_ANSWERS}
_PACKED = {b"\x1f\x8b": "compressed (gzip)", b"PK\3\4": "a zip file", b"BZh": "compressed (bzip2)"}
_LAYOUTS = '{"data": [articles]}, or rows with id, question and answers: a JSON array, JSONL or Parquet'


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
    """The facts of a SQuAD file, in its order, one article or row in memory at a time.

    Questions without an answer, empty ones and repeated ids are passed over and counted in `skipped`; what has the wrong type
    is an error. An article without a title is its own group; rows without one are grouped by their context. Runs of white
    space become one space.

    Raises:
        RealignerError: naming the file, and the article, paragraph and question id (or the line, or the row) of what is wrong.

    Example:
        >>> for fact in read_squad("dev-v2.0.json"):  # doctest: +SKIP
        ...     print(fact.question, fact.answer)
    """
    skipped = skipped or Skipped()
    seen: set[str] = set()
    number = 0
    for where, item in _items(Path(path)):
        number += 1
        for fact in _facts(item, number, where, skipped):
            if fact.id in seen:
                skipped.counts["id used before"] += 1
            else:
                seen.add(fact.id)
                yield fact
    if not number:
        raise RealignerError(f"{path}: has no articles and no rows; a SQuAD file is {_LAYOUTS}")


def _items(path: Path) -> Iterator[tuple[str, Any]]:
    """Articles or rows with their places, by the layout of the file."""
    if path.is_dir():
        raise RealignerError(f"{path}: is a folder; give a SQuAD file")
    try:
        with path.open("rb") as stream:
            if stream.read(3) != codecs.BOM_UTF8:
                stream.seek(0)
            start = stream.tell()
            first = stream.read(4)
            if not first:
                raise RealignerError(f"{path}: is empty; give a SQuAD file")
            stream.seek(start)
            for magic, what in _PACKED.items():
                if first.startswith(magic):
                    raise RealignerError(f"{path}: is {what}; unpack it first")
            if first == b"PAR1":
                yield from _parquet_rows(path)
                return
            by_line = _is_by_line(stream, path)
            stream.seek(start)
            yield from _lines(stream, path) if by_line else _streamed(stream, path)
    except OSError as error:
        raise RealignerError(f"{path}: cannot be read ({error.strerror})") from None


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    from realigner.data.sources import read_parquet

    table = read_parquet(path)
    if "question" not in table.columns:
        raise RealignerError(f"{path}: has no column 'question'; a SQuAD file is {_LAYOUTS}")
    columns = [name for name in table.columns if name in _ROW_KEYS]
    return ((record.where, record.values) for record in table.read(columns))


def _is_by_line(stream: BinaryIO, path: Path) -> bool:
    """Whether a file is one object after the other, told by the first key that says something."""
    depth, keys = 0, list[str]()
    for event, value in _events(stream, path, _Done()):
        depth += event.startswith("start_") - event.startswith("end_")
        _check_depth(depth, path)
        if depth == 1 and event == "map_key":
            if value == "data" or value in _ROW_KEYS - {"id", "title"}:
                return bool(value != "data")
            keys.append(repr(value[:40]))
        if depth == 1 and event == "start_array":
            return False
        if depth == 0:
            break
    listed = f"its keys are {', '.join(keys[:10])}; " if keys else ""
    raise RealignerError(f"{path}: has no articles and no rows; {listed}a SQuAD file is {_LAYOUTS}")


def _lines(stream: BinaryIO, path: Path) -> Iterator[tuple[str, Any]]:
    """The values of JSON Lines."""
    number = 0
    while line := stream.readline(_LONGEST_LINE + 1):
        number += 1
        if len(line) > _LONGEST_LINE:
            raise RealignerError(f"{path}:{number}: longer than the {_LONGEST_LINE >> 20:,} MiB that a line may have")
        if line.strip():
            yield f"{path}:{number}", parsed(line, path, number)


def _streamed(stream: BinaryIO, path: Path) -> Iterator[tuple[str, Any]]:
    """The values in the list under the outermost key ``data``, or in a list that is the whole file.

    By events and not with `ijson.items`, whose paths of keys take all memory on a file that is nothing but opening brackets.
    """
    from ijson.common import ObjectBuilder

    depth, number, key, level = 0, 0, "", 0  # level: the depth of the list that is read; 0: none
    builder: Any = None
    done = _Done()
    for event, value in _events(stream, path, done):
        starts, ends = event.startswith("start_"), event.startswith("end_")
        depth += starts - ends
        _check_depth(depth, path)
        if builder is not None:
            builder.event(event, value)
        elif event == "map_key" and depth == 1:
            key = value
        elif not level and event == "start_array" and (depth == 1 or (depth == 2 and key == "data")):
            level = depth
            continue
        elif level and depth < level:
            level = 0
        elif level and starts:
            builder = ObjectBuilder()
            builder.event(event, value)
        elif level:
            number += 1
            yield f"{path}: article {number}", value
        if builder is not None and ends and depth == level:
            number += 1
            found = builder.value
            done.last = f"{'row' if isinstance(found, dict) and 'question' in found else 'article'} {number}"
            yield f"{path}: {done.last}", found
            builder = None


@dataclass
class _Done:
    """What was read so far, for messages."""

    last: str = ""


def _events(stream: BinaryIO, path: Path, done: _Done) -> Iterator[tuple[str, Any]]:
    import ijson

    try:
        yield from ijson.basic_parse(stream)
    except (ijson.JSONError, ValueError, OverflowError) as error:
        what = " ".join(str(error).removeprefix("b'").replace("\\n", " ").split())[:120].rstrip("' ")
        after = f" after {done.last}" if done.last else ""
        cut = "; is the file cut?" if "EOF" in what else ""
        raise RealignerError(f"{path}: not valid JSON{after} ({what}){cut}") from None


def _check_depth(depth: int, path: Path) -> None:
    if depth > _DEEPEST:
        raise RealignerError(f"{path}: JSON nested too deeply; a SQuAD file has eight levels")


def _facts(item: Any, number: int, where: str, skipped: Skipped) -> Iterator[Fact]:
    """The facts of an article or a row."""
    item = _typed(item, dict, where)
    title = _line(_typed(_given(item, "title", ""), str, f"{where}: key 'title'"))
    if "question" in item:
        context = _given(item, "context", "")
        known = hashlib.sha256(str(context).encode("utf-8", "replace")).hexdigest()[:12]
        yield from _fact(item, title or (f"context-{known}" if context else f"row-{number}"), where, skipped)
        return
    if item.keys().isdisjoint(("paragraphs", "qas")):
        keys = ", ".join(repr(key[:40]) for key in list(item)[:10]) or "none"
        raise RealignerError(f"{where}: has no 'paragraphs', 'qas' or 'question'; its keys are {keys}")
    group = title or f"article-{number}"
    where = f"{where} ({title})" if title else where
    places = [(item, where)] if "qas" in item else []
    places += [(given, f"{where}, paragraph {n}") for n, given in enumerate(_list(item, "paragraphs", where), start=1)]
    for paragraph, place in places:
        for order, question in enumerate(_list(_typed(paragraph, dict, place), "qas", place), start=1):
            here = f"{place}, question {order}"
            yield from _fact(_typed(question, dict, here), group, here, skipped)


def _fact(question: Mapping[str, Any], group: str, where: str, skipped: Skipped) -> Iterator[Fact]:
    """The fact of a question, if it is one."""
    key = next((key for key in ("id", "guid") if key in question), None)  # guid: KLUE-MRC
    if key is None:
        raise RealignerError(f"{where}: key 'id' is missing")
    identity = question[key]
    if isinstance(identity, bool) or not isinstance(identity, str | int) or not str(identity).strip():
        raise RealignerError(f"{where}: key {key!r} is not a string")
    identity = str(identity).strip()
    where = f"{where} (id {identity[:60]})"
    text = _line(_typed(question.get("question", ""), str, f"{where}: key 'question'"))
    answer = next(filter(None, (text for key in _ANSWERS for text in _texts(question.get(key), f"{where}: key '{key}"))), "")
    if text and answer:
        yield Fact(identity, group, text, answer)
    else:
        skipped.counts["no answer" if text else "no question"] += 1


def _texts(given: Any, where: str) -> Iterator[str]:
    """The texts of answers: a string, an object with ``text``, which may be a list, or a list of these."""
    if given is None:
        return
    if isinstance(given, str):
        yield _line(given)
    elif isinstance(given, dict):
        yield from _texts(given.get("text"), f"{where}.text")
    elif isinstance(given, list):
        for one in given:
            if isinstance(one, list):
                raise RealignerError(f"{where}': is a list of lists; an answer is a string or an object with 'text'")
            yield from _texts(one, where)
    else:
        raise RealignerError(f"{where}': is not a string, an object with 'text' or a list of these but {type(given).__name__}")


def _given(value: Mapping[str, Any], key: str, default: Any) -> Any:
    """A value that may be missing or null."""
    return default if value.get(key) is None else value[key]


def _list(value: Mapping[str, Any], key: str, where: str) -> list[Any]:
    found: list[Any] = _typed(_given(value, key, []), list, f"{where}: key {key!r}")
    return found


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
