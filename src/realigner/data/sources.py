"""Foreign datasets as tables of records: CSV, TSV, JSON, Parquet, what `datasets` saved, the hub."""

from __future__ import annotations

import csv
import io
import re
import stat
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from realigner.data.conversation_forms import fitting
from realigner.data.reference_csv import is_reference, question_and_reply, reference_records
from realigner.errors import RealignerError, UsageError
from realigner.files import decoded, parsed, read_bytes, read_object

_MOST = 1 << 30  # bytes of a file that is read whole, and of what a compressed one holds in a column of a group of rows
_METADATA_MOST = 100_000_000  # bytes, or entries
BATCH = 1000  # rows in memory at a time, of formats that are not read whole
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FILE_SUFFIX = re.compile(r"\.[A-Za-z]\w*")  # ".csv"; ".5" is the version of a dataset


@dataclass(frozen=True, slots=True)
class Record:
    """One record of a table."""

    where: str  # the place a person can look it up: file and line, or split and row
    number: str  # its name among its table's records, usually its number
    values: Mapping[str, Any]  # by column; a column may be missing
    fault: str = ""  # why it is no row, if that was seen while reading


@dataclass(frozen=True)
class Table:
    """What is in a foreign dataset."""

    place: str  # as the user gave it, for messages
    columns: tuple[str, ...]  # all there are; a name found twice is there twice
    read: Callable[[Collection[str]], Iterator[Record]]  # the records, given the columns that are needed; to be called once


def open_table(source: str | Path, split: str | None = None, generic: bool = False) -> Table:
    """Recognise a dataset by what is there, or by its suffix.

    Args:
        source: a file, a folder saved by ``save_to_disk``, or a hub id (``owner/name``) where there is neither.
        split: of a saved dataset or one of the hub: this split and not all.
        generic: read a CSV file that looks like the reference's as any other.

    Raises:
        RealignerError: for what cannot be read, in one line with the place.
        UsageError: for a format or a split that is not there.
    """
    path = Path(source)
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the path
        missing = isinstance(error, FileNotFoundError | NotADirectoryError)
        if missing and _HUB_ID.fullmatch(str(source)) and not _FILE_SUFFIX.fullmatch(path.suffix):
            return _hub(str(source), split)
        raise RealignerError(f"{source}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if stat.S_ISDIR(mode):
        return _saved(path, split)
    if not stat.S_ISREG(mode):
        raise RealignerError(f"{path}: is not a file or a folder; give a file with rows")  # a pipe would wait for ever
    if split is not None:
        raise UsageError(f"{path}: is a single file without splits; leave out split {split!r}")
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise UsageError(f"{path}: its suffix {path.suffix!r} is not a known format; rename it to one of {' '.join(_READERS)}")
    return reader(path, generic)


def _bytes(path: Path) -> bytes:
    data = read_bytes(path, _MOST)
    if not data.strip():
        raise RealignerError(f"{path}: is empty; give a file with rows")
    return data


def _csv(path: Path, generic: bool, delimiter: str = ",") -> Table:
    text = decoded(_bytes(path), path).replace("\0", "")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header = [cell.strip() for cell in next((cells for _, cells in _numbered(reader, path) if cells), [])]
    if delimiter == "," and not generic and is_reference(header) and not fitting(header, {}):
        return _reference(path, text, header)

    def read(_: Collection[str]) -> Iterator[Record]:
        rows = ((line, cells) for line, cells in _numbered(reader, path) if cells)  # others are blank lines
        for number, (line, cells) in enumerate(rows, start=1):
            wrong = len(cells) != len(header)
            fault = f"{len(cells)} field(s) where the header has {len(header)}" if wrong else ""
            yield Record(f"{path}:{line}", str(number), dict(zip(header, cells, strict=False)), fault)

    return Table(str(path), tuple(header), read)


def _numbered(reader: Any, path: Path) -> Iterator[tuple[int, list[str]]]:
    """Records of a csv reader with the line each begins at."""
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise RealignerError(
                f"{path}:{line}: not valid CSV ({error}); are a field's quotes closed, and doubled inside?"
            ) from None
        yield line, cells


def _reference(path: Path, text: str, header: list[str]) -> Table:
    lines = [line.removesuffix("\r") for line in (text if "\n" in text else text.replace("\r", "\n")).split("\n")]
    column = header.index("text")

    def read(_: Collection[str]) -> Iterator[Record]:
        for number, (line, fields, raw) in enumerate(reference_records(lines, len(header)), start=1):
            where, index = f"{path}:{line + 1}", fields[0].strip() if fields else ""
            if fields is None or not (index.isascii() and index.isdigit()):
                broken = fields is None and raw[:1].isdigit()
                fault = "its quotes or commas are broken" if broken else "does not begin with an index"
                yield Record(where, str(number), {"text": raw.strip()}, fault)
                continue
            question, reply = question_and_reply(fields[column])
            fault = "" if question and reply else "question is empty" if reply else "reply is empty"
            if not question and not reply:
                fault = "no three spaces between question and reply"
            values = {**dict(zip(header, fields, strict=True)), "question": question, "text": reply}
            yield Record(where, index[:20], {"text": fields[column]} if fault else values, fault)

    return Table(str(path), ("question", *header[1:]), read)


def _json(path: Path, _: bool) -> Table:
    """JSON Lines, or one array of objects; ``.json`` is used for either."""
    data = _bytes(path)
    if data.lstrip().startswith(b"[") and path.suffix.lower() == ".json":
        found = [(f"{path}: item {number}", value) for number, value in enumerate(parsed(data, path), start=1)]
    else:
        lines = enumerate(data.split(b"\n"), start=1)
        found = [(f"{path}:{number}", parsed(line, path, number)) for number, line in lines if line.strip()]
    for where, value in found:
        if not isinstance(value, dict):
            raise RealignerError(f"{where}: a row is a JSON object, not {type(value).__name__}")
    columns = dict.fromkeys(key for _, value in found for key in value)

    def read(_: Collection[str]) -> Iterator[Record]:
        for number, (where, value) in enumerate(found, start=1):
            yield Record(where, str(number), value)

    return Table(str(path), tuple(columns), read)


def read_parquet(path: Path) -> Table:
    """A Parquet file; its rows are read a thousand at a time.

    Raises:
        RealignerError: when it is cut, damaged, or unpacks to more than there is room for.
    """
    if not path.stat().st_size:  # `open_table` has asked before
        raise RealignerError(f"{path}: is empty; give a file with rows")
    with _one_line(lambda: f"{path}: is not a readable Parquet file; is it cut?"):
        from pyarrow import parquet  # type: ignore[import-untyped]

        limits = {"thrift_string_size_limit": _METADATA_MOST, "thrift_container_size_limit": _METADATA_MOST}
        schema = parquet.ParquetFile(path, **limits).schema_arrow
        columns = tuple(str(name) for name in schema.names)
        # Texts stay as the file has them, each once, those within lists and objects too: one may be said a million times.
        leaves = parquet.ParquetFile(path, **limits).schema
        texts = [leaf.path for leaf in map(leaves.column, range(len(leaves))) if leaf.logical_type.type == "STRING"]
        file = parquet.ParquetFile(path, read_dictionary=texts, **limits)

    def read(needed: Collection[str]) -> Iterator[Record]:
        number = 0
        _check_sizes(path, file.metadata, needed)
        with _one_line(lambda: f"{path}: cannot be read past row {number}; is it cut?"), file:
            for batch in file.iter_batches(batch_size=BATCH, columns=sorted(needed)):
                for row in range(batch.num_rows):
                    number += 1
                    values = {name: column[row].as_py() for name, column in zip(batch.schema.names, batch.columns, strict=True)}
                    yield Record(f"{path}: row {number}", str(number), values)

    return Table(str(path), columns, read)


def _check_sizes(path: Path, metadata: Any, needed: Collection[str]) -> None:
    """Refuse columns that unpack to more than there is room for, by what the file says of itself."""
    for group in range(metadata.num_row_groups):
        for column in map(metadata.row_group(group).column, range(metadata.num_columns)):
            name = column.path_in_schema
            if (name in needed or name.partition(".")[0] in needed) and column.total_uncompressed_size > _MOST:
                raise RealignerError(f"{path}: column {name!r} unpacks to more than {_MOST >> 20:,} MiB; split the file")


def _saved(folder: Path, split: str | None) -> Table:
    if not any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
        raise RealignerError(f"{folder}: is a folder, but not one that `datasets` saved (save_to_disk); give a file in it")
    for path in folder.rglob("*.json"):  # which `datasets` reads whole
        read_object(path)
    with _one_line(lambda: f"{folder}: is not a readable saved dataset"), quiet_datasets():
        from datasets import load_from_disk

        found = load_from_disk(str(folder))
        parts = dict(found) if isinstance(found, dict) else {str(found.split or "rows"): found}
    if split is not None and split not in parts:
        raise UsageError(f"{folder}: has no split {split!r}; it has {', '.join(parts)}")
    return _parts(str(folder), parts if split is None else {split: parts[split]})


def _hub(name: str, split: str | None) -> Table:
    """A dataset of the hub. Nothing that comes with it is run: `datasets` reads data files only."""
    from datasets import config, load_dataset

    why = "; HF_HUB_OFFLINE is set" if config.HF_HUB_OFFLINE else ""
    with _one_line(lambda: f"{name}: is not a local file, and cannot be loaded from the hub{why}"), quiet_datasets():
        found = load_dataset(name, split=split)
        return _parts(name, dict(found) if isinstance(found, dict) else {split or "rows": found})


def _parts(place: str, parts: dict[str, Any]) -> Table:
    """The splits of a dataset one after the other; a column of class labels is read as the labels' names."""
    columns = tuple(dict.fromkeys(name for part in parts.values() for name in part.column_names))

    def read(needed: Collection[str]) -> Iterator[Record]:
        count = 0
        for name, part in parts.items():
            number = 0
            chosen = [column for column in part.column_names if column in needed]
            labels = {column: part.features[column].names for column in chosen if hasattr(part.features[column], "names")}
            with _one_line(lambda: f"{place}: split {name} cannot be read past row {number}"):  # noqa: B023
                selected = part.select_columns(chosen).with_format("arrow")
                selected.data.validate(full=True)  # Arrow trusts its files: damaged offsets would end the process
                for batch in selected.iter(batch_size=BATCH):
                    for values in batch.to_pylist():
                        number, count = number + 1, count + 1
                        for key, names in labels.items():
                            label = values[key]  # -1: not labelled
                            values[key] = names[label] if label is not None and 0 <= label < len(names) else None
                        yield Record(f"{place}: {name} row {number}", str(count), values)

    return Table(place, columns, read)


@contextmanager
def quiet_datasets() -> Iterator[None]:
    """No progress bars of `datasets` for the length of the block."""
    import datasets

    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


@contextmanager
def _one_line(message: Callable[[], str]) -> Iterator[None]:
    """Whatever a foreign library raises, as one line; the files may hold anything, so may the exceptions."""
    try:
        yield
    except (RealignerError, ImportError):  # a package that is missing says nothing of the file
        raise
    except Exception as error:
        raise RealignerError(f"{message()} ({type(error).__name__}: {' '.join(str(error).split())[:160]})") from error


_READERS: dict[str, Callable[[Path, bool], Table]] = {
    ".csv": _csv,
    ".tsv": lambda path, generic: _csv(path, generic, "\t"),
    ".jsonl": _json,
    ".ndjson": _json,
    ".json": _json,
    ".parquet": lambda path, _: read_parquet(path),
}
