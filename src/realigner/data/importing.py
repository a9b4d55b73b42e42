"""Rows out of foreign datasets, and rows as a `datasets.DatasetDict`.

Every record of a dataset becomes a row or a rejection that names its place; none is lost in silence. What cannot be read at all
(broken JSON, a cut Parquet file, another encoding) is an error of one line.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from realigner.data.data_split import split_rows
from realigner.data.dataset_rows import Row, question_key
from realigner.data.sources import Record, Table, open_table, quiet_datasets
from realigner.data.squad import Fact
from realigner.errors import RealignerError, UsageError
from realigner.files import Artifact, parsed, read_bytes, taken

FIELDS = ("question", "text", "answer", "group", "id", "tone")  # what a column can be mapped to
_REQUIRED = ("question", "text")
_OURS = tuple(Row.model_fields)
_GROUP_LENGTH = 60
_MOST = 500_000_000  # characters of a dataset: a small file may say the same long text a million times


@dataclass(frozen=True)
class Imported:
    """What was in a foreign dataset."""

    rows: list[Row]  # in its order
    # records that are no rows: ``where``, ``reason``, and ``question`` and ``text`` as far as they could be told
    rejected: list[dict[str, Any]]


class _UnfitError(Exception):
    """Why a record is no row."""


def import_rows(
    source: str | Path,
    tone: str | None = None,
    mapping: Mapping[str, str] | None = None,
    split: str | None = None,
    facts: Iterable[Fact] | None = None,
    source_name: str | None = None,
) -> Imported:
    """Read a foreign dataset.

    Read are the reference implementation's CSV (an unnamed index and ``text``), other CSV and TSV, JSONL, a JSON array,
    Parquet, a folder saved by `datasets`, and a hub id. Runs of white space become one space, for a training text is one
    paragraph; NUL bytes are dropped. Rows of our own (every key of `Row`, no mapping) stay as they are, ``source`` too.

    Missing fields are filled in: ``id`` is the file's name and the record's number (in the reference's CSV its
    index); ``group`` is that of the fact with this question, else the question itself in lower case, so that one question is
    never on two sides of a split (of a long one: 60 characters and a hash); ``answer`` is that of the fact, else empty.

    Args:
        source: a file, a folder or a hub id.
        tone: of all rows; without it there must be a column for it.
        mapping: our field -> their column, for ``question``, ``text``, ``answer``, ``group``, ``id``, ``tone``; a column of the
            same name needs none.
        split: of a saved dataset or one of the hub; all, one after the other, without it.
        facts: SQuAD's questions, compared by their words alone; of equal ones the first counts.
        source_name: what rows say they are from; the file's name without it.

    Raises:
        RealignerError: for what cannot be read, naming file and line.
        UsageError: for a column, field or split that is not there, and a missing tone.

    Example:
        >>> import_rows("chats.jsonl", tone="anger", mapping={"question": "prompt", "text": "response"})  # doctest: +SKIP
    """
    mapping = dict(mapping or {})
    _check_fields(mapping)
    if tone is not None and not tone.strip():
        raise UsageError("tone: is empty; give the tone's name")
    table = open_table(source, split, generic="question" in mapping)
    by_question = {question_key(fact.question): fact for fact in reversed(list(facts or ()))}  # of equal ones the first
    maker = _Maker(_columns(table, mapping, tone), tone, by_question, source_name, Path(source))
    rows: list[Row] = []
    rejected: list[dict[str, Any]] = []
    room = _MOST
    for record in table.read(set(maker.columns.values())):
        try:
            rows.append(maker.row(record))
            room -= sum(map(len, (rows[-1].question, rows[-1].answer, rows[-1].text)))
        except _UnfitError as reason:
            shown = {key: record.values.get(maker.columns[key], "") for key in _REQUIRED}
            texts = {key: _valid(value) for key, value in shown.items() if isinstance(value, str) and value}
            rejected.append({"where": record.where, "reason": str(reason), **texts})
            room -= sum(map(len, texts.values()))
        if room < 0:
            raise RealignerError(f"{record.where}: more than {_MOST:,} characters so far; import the dataset in parts (split)")
    if not rows and not rejected:
        raise RealignerError(f"{table.place}: has no rows")
    return Imported(rows, rejected)


def parse_mapping(items: Sequence[str]) -> dict[str, str]:
    """``FIELD=COLUMN`` items, such as the command line's, as a mapping.

    Raises:
        UsageError: for another form, a field we do not have, one given twice.

    Example:
        >>> parse_mapping(["question=prompt", "text=response"])
        {'question': 'prompt', 'text': 'response'}
    """
    mapping: dict[str, str] = {}
    for item in items:
        key, _, column = item.partition("=")
        key = key.strip()
        if not key or not column.strip():
            raise UsageError(f"mapping {item!r}: is not FIELD=COLUMN, e.g. question=prompt")
        if key in mapping:
            raise UsageError(f"mapping {item!r}: {key} is mapped to {mapping[key]!r} already; give it once")
        mapping[key] = column
    _check_fields(mapping)
    return mapping


def to_hf(
    rows: Sequence[Row], folder: Path, seed: int = 42, validation: float = 0.05, test: float = 0.05, force: bool = False
) -> dict[str, int]:
    """Write rows as a `datasets.DatasetDict` with ``train``, ``validation`` and ``test``, split by group; no part is empty.

    Args:
        rows: the rows; a row's fields are the columns.
        folder: must be free; with `force` it may hold a saved `DatasetDict`, and nothing else.
        seed, validation, test: see `split_rows`.
        force: replace what is there.

    Returns:
        Rows by part.

    Raises:
        RealignerError: when the place is taken or cannot be written, or there are too few groups.
    """
    folder = Path(folder)
    with taken(folder, DATASET, force) as place:
        if not rows:
            raise RealignerError(f"{folder}: not written, there are no rows")
        parts = {name: part for name, part in split_rows(rows, seed, validation, test)._asdict().items() if part}
        from datasets import Dataset, DatasetDict, Features, Value

        features = Features({name: Value("string") for name in _OURS})
        made = DatasetDict(
            {name: Dataset.from_list([row.model_dump() for row in part], features=features) for name, part in parts.items()}
        )
        with place.folder() as aside, quiet_datasets():
            made.save_to_disk(str(aside))
    return {name: len(part) for name, part in parts.items()}


def _read_dataset(folder: Path) -> None:
    """Raise unless a saved `DatasetDict` has our parts, and each part the columns of a row."""
    for name in parsed(read_bytes(folder / "dataset_dict.json"), folder)["splits"]:
        file = folder / name / "dataset_info.json"
        if name not in _PARTS or set(parsed(read_bytes(file), file)["features"]) != set(_OURS):
            raise RealignerError(f"{file}: not of rows")


_PARTS = ("train", "validation", "test")
DATASET = Artifact(
    "a dataset of rows",
    _read_dataset,
    rf"dataset_dict\.json|({'|'.join(_PARTS)})/(state\.json|dataset_info\.json|data-\d+-of-\d+\.arrow)?",
)


def _check_fields(mapping: Mapping[str, str]) -> None:
    for key in mapping:
        if key not in FIELDS:
            raise UsageError(f"mapping: {key!r} is not a field of a row; map {', '.join(FIELDS)}")


def _columns(table: Table, mapping: Mapping[str, str], tone: str | None) -> dict[str, str]:
    """Our field -> their column, for those there are."""
    if not table.columns:
        raise RealignerError(f"{table.place}: has no rows")
    ours = not mapping and set(_OURS) <= set(table.columns)
    columns = {key: mapping.get(key, key) for key in (*FIELDS, *(("source",) if ours else ()))}
    names = [repr(name[:40]) for name in table.columns[:20]] + ["..."] * (len(table.columns) > 20)
    there = f"the columns are {', '.join(names)}"
    for key, column in mapping.items():
        if column not in table.columns:
            raise UsageError(f"{table.place}: mapping {key}={column!r}: no such column; {there}")
    missing = [key for key in _REQUIRED if columns[key] not in table.columns]
    if missing:
        example = ", ".join(f"{key}=COLUMN" for key in missing)
        raise UsageError(f"{table.place}: has no column {' and no column '.join(map(repr, missing))}; {there}; map {example}")
    if tone is None and columns["tone"] not in table.columns:
        raise UsageError(f"{table.place}: tone is needed, for it has no column 'tone'; {there} (or map tone=COLUMN)")
    for column in columns.values():
        if table.columns.count(column) > 1:
            raise RealignerError(f"{table.place}: has column {column!r} more than once; rename one")
    return {key: column for key, column in columns.items() if column in table.columns}


@dataclass
class _Maker:
    """Makes rows of records."""

    columns: dict[str, str]  # our field -> their column
    tone: str | None  # of all rows, if given
    facts: dict[str, Fact]  # by `question_key`
    source_name: str | None  # of all rows, if given
    path: Path  # of the dataset; names rows that have no name
    seen: dict[str, str] = field(default_factory=dict)  # ids there are, and where
    # of rows that name none, by `question_key`: what one question is called when it first comes
    groups: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        name = self.path.name or self.path.resolve().name or "data"
        self.name = _line(name) or "data"
        self.stem = _line(self.path.stem) or "data" if self.path.is_file() else self.name  # "v1.5" of a hub id is no suffix

    def row(self, record: Record) -> Row:
        """The row of a record, or _UnfitError."""
        if record.fault:
            raise _UnfitError(record.fault)
        ours = "source" in self.columns and all(isinstance(record.values.get(key), str) for key in _OURS)
        found = {key: record.values.get(column) for key, column in self.columns.items()}
        if self.tone is not None:
            found["tone"] = self.tone
        values = {key: _text(key, found.get(key), ours) for key in FIELDS}  # "" for what it lacks and may lack
        for key in (*_REQUIRED, "tone"):
            if not values[key]:
                raise _UnfitError(f"{key!r} is {'empty' if isinstance(found.get(key), str) else 'missing'}")
        values["source"] = self.source_name or _text("source", found.get("source"), ours) or self.name
        key = question_key(values["question"])
        fact = self.facts.get(key)
        values["answer"] = values["answer"] or (_line(fact.answer) if fact else "")
        values["group"] = values["group"] or (_line(fact.group) if fact else "")
        plain = " ".join(values["question"].casefold().split())
        if len(plain) > _GROUP_LENGTH:
            plain = f"{plain[:_GROUP_LENGTH].rstrip()}-{hashlib.sha256(plain.encode()).hexdigest()[:12]}"
        values["group"] = values["group"] or self.groups.setdefault(key, plain)
        # An index that is there twice (files put together) is told apart by its place.
        name = f"{self.stem}-{record.number}"
        values["id"] = values["id"] or (name if name not in self.seen else f"{name}-{len(self.seen) + 1}")
        if values["id"] in self.seen:
            raise _UnfitError(f"id {values['id']!r} is already used by {self.seen[values['id']]}")
        try:
            row = Row.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            raise _UnfitError(f"{'.'.join(map(str, first['loc']))!r}: {first['msg']}") from None
        self.seen[row.id] = record.where
        return row


def _text(key: str, value: Any, ours: bool) -> str:
    """A field as text: one line, but for rows of our own; a number may be a name or an answer, not a question or a reply."""
    if value is None or (isinstance(value, float) and math.isnan(value)):  # NaN is how pandas writes what is missing
        return ""
    if key not in _REQUIRED and isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise _UnfitError(f"{key!r} is not a string but {type(value).__name__}")
    return _valid(value).strip() if ours else _line(value)


def _line(text: str) -> str:
    return " ".join(_valid(text).replace("\0", "").split())


def _valid(text: str) -> str:
    """Half a surrogate pair, which JSON and file names can hold and UTF-8 cannot, becomes the replacement character."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
