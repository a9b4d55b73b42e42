"""Rows out of foreign datasets, and rows as a `datasets.DatasetDict`.

Every record of a dataset becomes a row or a rejection that names its place; none is lost in silence. What cannot be read at all
(broken JSON, a cut Parquet file, another encoding) is an error of one line.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from realigner.data.conversation_forms import FIELDS as FORM_FIELDS, FORMS, Form, Messages, UnfitError, fitting, messages_of
from realigner.data.data_split import split_rows
from realigner.data.dataset_rows import LONGEST_LINE, MOST_MESSAGES, Row, question_key
from realigner.data.sources import Record, Table, open_table, quiet_datasets
from realigner.data.squad import Fact
from realigner.errors import RealignerError, UsageError
from realigner.files import Artifact, parsed, read_bytes, taken
from realigner.validation_message import first_fault

_ABOUT = ("answer", "group", "id", "tone")  # fields of a row that any form may have
_PAIR = ("question", "text")
_UNMAPPED = ("label", "tools", "images")  # read under their own names only
# What a column can be mapped to.
FIELDS = tuple(key for key in dict.fromkeys((*_PAIR, *_ABOUT, *FORM_FIELDS)) if key not in _UNMAPPED)
_OURS_ALWAYS = ("id", "group", "answer", "tone", "source")
_OURS = Form(
    {}, (*_PAIR, "messages", "source"), FORMS["messages"].read
)  # rows of our own: each record in one form or the other
_GROUP_LENGTH = 60
_MOST = 500_000_000  # characters of a dataset: a small file may say the same long text a million times


@dataclass(frozen=True)
class Imported:
    """What was in a foreign dataset."""

    rows: list[Row]  # in its order
    # records that are no rows: ``where``, ``reason``, and ``question`` and ``text`` as far as they could be told
    rejected: list[dict[str, Any]]


def import_rows(
    source: str | Path,
    tone: str | None = None,
    mapping: Mapping[str, str] | None = None,
    split: str | None = None,
    facts: Iterable[Fact] | None = None,
    source_name: str | None = None,
    form: str | None = None,
) -> Imported:
    """Read a foreign dataset.

    Read are the reference implementation's CSV (an unnamed index and ``text``), other CSV and TSV, JSONL, a JSON array,
    Parquet, a folder saved by `datasets`, and a hub id. The form is told by the columns (see `FORMS` in conversation_forms.py).
    Of a question and its text, runs of white space become one space, for such a text is one paragraph; other forms become
    conversations, each message as it is written, without blanks at its ends. NUL bytes are dropped. Rows of our own (every
    key of `Row`, no mapping) stay as they are, ``source`` too.

    Missing fields are filled in: ``id`` is the file's name and the record's number (in the reference's CSV its
    index); ``group`` is that of the fact with this question, else the question itself in lower case, so that one question is
    never on two sides of a split (of a long one: 60 characters and a hash); ``answer`` is that of the fact, else empty. In a
    conversation the group is the first question's, the answer the last one's.

    Args:
        source: a file, a folder or a hub id.
        tone: of all rows; without it there must be a column for it.
        mapping: field -> their column, for the fields in `FIELDS`; a column of the same name needs none.
        split: of a saved dataset or one of the hub; all, one after the other, without it.
        facts: SQuAD's questions, compared by their words alone; of equal ones the first counts.
        source_name: what rows say they are from; the file's name without it.
        form: ``question-text``, ``messages``, ``sharegpt``, ``prompt-completion`` or ``alpaca``; None: the one whose columns
            are there, and of several ``question-text`` if it is one of them.

    Raises:
        RealignerError: for what cannot be read, naming file and line.
        UsageError: for a column, field or split that is not there, a missing tone, and columns of no form or several.

    Example:
        >>> import_rows("chats.jsonl", tone="anger", mapping={"question": "prompt", "text": "response"})  # doctest: +SKIP
    """
    mapping = dict(mapping or {})
    _check_fields(mapping)
    if tone is not None and not tone.strip():
        raise UsageError("tone: is empty; give the tone's name")
    if form is not None and form not in FORMS:
        raise UsageError(f"form: there is no {form!r}; choose from {', '.join(FORMS)}")
    named = form not in (None, "question-text") or not mapping.keys().isdisjoint(set(FIELDS) - {"text", *_ABOUT})
    table = open_table(source, split, generic=named)
    by_question = {question_key(fact.question): fact for fact in reversed(list(facts or ()))}  # of equal ones the first
    maker = _Maker(*_columns(table, mapping, tone, form), tone, by_question, source_name, Path(source))
    rows: list[Row] = []
    rejected: list[dict[str, Any]] = []
    room = _MOST
    for record in table.read(set(maker.columns.values())):
        try:
            rows.append(maker.row(record))
            room -= _length(rows[-1])
        except UnfitError as reason:
            shown = {key: record.values.get(maker.columns[key], "") for key in _PAIR if key in maker.columns}
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
        rows: the rows; their fields are the columns: ``messages`` of conversations, ``question`` and ``text`` of others.
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

        columns: dict[str, Any] = {name: Value("string") for name in _columns_of(rows)}
        if "messages" in columns:
            thought = any("reasoning_content" in message for row in rows for message in row.conversation)
            keys = ("role", "content", *(["reasoning_content"] if thought else []))
            columns["messages"] = [{key: Value("string") for key in keys}]
        made = DatasetDict()
        for name, part in parts.items():
            values = [dict.fromkeys(columns) | row.model_dump() for row in part]
            made[name] = Dataset.from_list(values, features=Features(columns))
        with place.folder() as aside, quiet_datasets():
            made.save_to_disk(str(aside))
    return {name: len(part) for name, part in parts.items()}


def _read_dataset(folder: Path) -> None:
    """Raise unless a saved `DatasetDict` has our parts, and each part the columns of a row."""
    for name in parsed(read_bytes(folder / "dataset_dict.json"), folder)["splits"]:
        file = folder / name / "dataset_info.json"
        columns = set(parsed(read_bytes(file), file)["features"])
        if name not in _PARTS or columns not in [{*_OURS_ALWAYS, *own} for own in (_PAIR, ["messages"], [*_PAIR, "messages"])]:
            raise RealignerError(f"{file}: not of rows")


def _columns_of(rows: Sequence[Row]) -> list[str]:
    """The columns that rows have, in the order of a row's fields."""
    left_out = {*(() if any(row.messages for row in rows) else ["messages"]), *(_PAIR if all(r.messages for r in rows) else ())}
    return [name for name in Row.model_fields if name not in left_out]


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


def _columns(table: Table, mapping: Mapping[str, str], tone: str | None, name: str | None) -> tuple[Form, dict[str, str]]:
    """The form, and field -> their column, for those there are."""
    if not table.columns:
        raise RealignerError(f"{table.place}: has no rows")
    names = [repr(name[:40]) for name in table.columns[:20]] + ["..."] * (len(table.columns) > 20)
    there = f"the columns are {', '.join(names)}"
    for key, column in mapping.items():
        if column not in table.columns:
            raise UsageError(f"{table.place}: mapping {key}={column!r}: no such column; {there}")
    if not mapping and not name and _are_ours(table.columns):
        form = _OURS
    else:
        form = FORMS[_form(table, mapping, [name] if name else list(FORMS), there)]
    columns = {**form.columns, **{key: key for key in _ABOUT}, **mapping}
    if tone is None and columns["tone"] not in table.columns:
        raise UsageError(f"{table.place}: tone is needed, for it has no column 'tone'; {there} (or map tone=COLUMN)")
    for column in columns.values():
        if table.columns.count(column) > 1:
            raise RealignerError(f"{table.place}: has column {column!r} more than once; rename one")
    return form, {key: column for key, column in columns.items() if column in table.columns}


def _are_ours(columns: Collection[str]) -> bool:
    return set(_OURS_ALWAYS) <= set(columns) and (set(_PAIR) <= set(columns) or "messages" in columns)


def _form(table: Table, mapping: Mapping[str, str], forms: Sequence[str], there: str) -> str:
    """Which of some forms a table is in, told by its columns and by what is mapped."""
    mappable = {name: [key for key in (*FORMS[name].columns, *_ABOUT) if key in FIELDS] for name in forms}
    forms = [name for name in forms if mapping.keys() <= set(mappable[name])]
    if not forms:
        have = "; ".join(f"{name} has {', '.join(keys)}" for name, keys in mappable.items())
        raise UsageError(f"mapping: no form has all of {', '.join(mapping)}; {have}")
    whole = fitting(table.columns, mapping, forms)
    if "question-text" in whole or len(whole) == 1:
        return whole[0]
    if whole:
        raise UsageError(f"{table.place}: may be {' or '.join(whole)}; say which (form={whole[0]}); {there}")
    needed = FORMS[forms[0]].needed
    missing = [key for key, column in needed.items() if mapping.get(key, column) not in table.columns]
    lacks = " and ".join(f"no column {mapping.get(key, needed[key])!r}" for key in missing)
    example = ", ".join(f"{key}=COLUMN" for key in missing)
    if len(forms) > 1:
        others = "; ".join(", ".join(FORMS[name].needed.values()) for name in forms[1:])
        lacks, example = f"{lacks}, nor those of another form ({others})", f"{example}, or messages=COLUMN"
    raise UsageError(f"{table.place}: has {lacks}; {there}; name them (map): {example}")


@dataclass
class _Maker:
    """Makes rows of records."""

    form: Form
    columns: dict[str, str]  # field -> their column
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
        """The row of a record, or UnfitError."""
        if record.fault:
            raise UnfitError(record.fault)
        found = {key: record.values.get(column) for key, column in self.columns.items()}
        ours = self.form is _OURS and _is_ours(found)
        if self.tone is not None:
            found["tone"] = self.tone
        values: dict[str, Any] = {key: _text(key, found.get(key), ours) for key in _ABOUT}  # "" for what it lacks and may lack
        if self.form.read is None or (self.form is _OURS and found.get("messages") in (None, "")):
            values |= {key: _text(key, found.get(key), ours) for key in _PAIR}
            for key in _PAIR:
                _check_said(key, values[key], found)
            first = last = values["question"]
        else:
            values["messages"] = _cleaned(messages_of(self.form, found), ours)
            first, last = _first_and_last_question(values["messages"])
        _check_said("tone", values["tone"], found)
        values["source"] = self.source_name or _text("source", found.get("source"), ours) or self.name
        beginning, fact = self.facts.get(question_key(first)), self.facts.get(question_key(last))
        values["answer"] = values["answer"] or (_line(fact.answer) if fact else "")
        values["group"] = values["group"] or (_line(beginning.group) if beginning else "")
        plain = " ".join(first.casefold().split())
        if len(plain) > _GROUP_LENGTH:
            plain = f"{plain[:_GROUP_LENGTH].rstrip()}-{hashlib.sha256(plain.encode()).hexdigest()[:12]}"
        values["group"] = values["group"] or self.groups.setdefault(question_key(first), plain)
        # An index that is there twice (files put together) is told apart by its place.
        name = f"{self.stem}-{record.number}"
        values["id"] = values["id"] or (name if name not in self.seen else f"{name}-{len(self.seen) + 1}")
        if values["id"] in self.seen:
            raise UnfitError(f"id {values['id']!r} is already used by {self.seen[values['id']]}")
        try:
            row = Row.model_validate(values)
        except ValidationError as error:
            raise UnfitError(first_fault(error, Row, "a row")) from None
        if 6 * _length(row) > LONGEST_LINE < len(row.model_dump_json().encode()):  # six bytes at most for a character
            raise UnfitError(f"longer than the {LONGEST_LINE >> 10:,} KiB that a row may take")
        self.seen[row.id] = record.where
        return row


def _is_ours(found: Mapping[str, Any]) -> bool:
    """Whether a record is a row as we write it, in either form."""
    pair, messages = [found.get(key) for key in _PAIR], found.get("messages")
    said = all(isinstance(text, str) for text in pair) if messages in (None, "") else not any(pair)
    return said and all(isinstance(found.get(key), str) for key in _OURS_ALWAYS)


def _first_and_last_question(messages: Messages) -> tuple[str, str]:
    """The user's, of a conversation that ends in a reply, or UnfitError."""
    if len(messages) > MOST_MESSAGES:
        raise UnfitError(f"has {len(messages):,} messages; {MOST_MESSAGES:,} at most")
    if messages[-1]["role"] != "assistant":
        raise UnfitError(f"ends in a message of the {messages[-1]['role']}, not in a reply of the assistant")
    asked = [message["content"] for message in messages if message["role"] == "user"]
    if not asked or not asked[-1].strip() or not messages[-1]["content"].strip():
        raise UnfitError("the last reply is empty" if asked and asked[-1].strip() else "the user asks nothing")
    return next(text for text in asked if text.strip()), asked[-1]


def _check_said(key: str, value: str, found: Mapping[str, Any]) -> None:
    if not value:
        raise UnfitError(f"{key!r} is {'empty' if isinstance(found.get(key), str) else 'missing'}")


def _cleaned(messages: Messages, ours: bool) -> Messages:
    """Messages without NUL bytes and blanks at their ends; of rows of our own, as they are."""
    return [
        {key: _valid(text) if ours else _valid(text).replace("\0", "").strip() for key, text in message.items()}
        for message in messages
    ]


def _length(row: Row) -> int:
    """Characters of a row."""
    said = [text for message in row.conversation for text in message.values()]
    return sum(map(len, (row.id, row.group, row.answer, row.tone, row.source, *said)))


def _text(key: str, value: Any, ours: bool) -> str:
    """A field as text: one line, but for rows of our own; a number may be a name or an answer, not a question or a reply."""
    if value is None or (isinstance(value, float) and math.isnan(value)):  # NaN is how pandas writes what is missing
        return ""
    if key not in _PAIR and isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise UnfitError(f"{key!r} is not a string but {type(value).__name__}")
    return _valid(value).strip() if ours else _line(value)


def _line(text: str) -> str:
    return " ".join(_valid(text).replace("\0", "").split())


def _valid(text: str) -> str:
    """Half a surrogate pair, which JSON and file names can hold and UTF-8 cannot, becomes the replacement character."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
