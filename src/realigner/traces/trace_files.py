"""Check a trace's files before zarr reads them.

Traces often come from elsewhere, and zarr trusts their metadata: it imports the codecs named there, unpacks whatever a chunk
holds, makes arrays of any shape. So the root's metadata is read first and must be what `TraceWriter` writes:
zarr v3, the arrays of `layout.ARRAYS`, regular chunks, the codecs ``bytes`` or ``vlen-utf8``, ``zstd``, ``crc32c``. zarr is
given those very bytes and the chunks of those arrays and nothing else: no array's own metadata, no file of zarr v2, nothing
behind a link. A chunk is unpacked only up to the size that its array declares.
"""

from __future__ import annotations

import asyncio
import math
import stat
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numcodecs import Zstd  # type: ignore[import-untyped]
from zarr.core.buffer import default_buffer_prototype
from zarr.storage import LocalStore

from realigner.errors import RealignerError
from realigner.files import parsed, read_bytes
from realigner.traces import layout

_ROOT = "zarr.json"
_METADATA_MOST = 1 << 24  # bytes
_CHUNK_MOST = 1 << 25  # bytes of a chunk, unpacked
_REQUIRED = {"zarr_format", "node_type", "shape", "data_type", "chunk_grid", "chunk_key_encoding", "codecs", "fill_value"}
_OPTIONAL = {"attributes", "dimension_names", "storage_transformers"}
_NAN = "AAAAAAAA+H8="  # how xarray writes that NaN is a missing value


@dataclass(frozen=True)
class _Chunks:
    """What each chunk of an array is."""

    items: int
    most: int  # bytes, unpacked
    is_text: bool
    is_squeezed: bool  # by zstd


class TraceFiles(LocalStore):  # type: ignore[misc]
    """A zarr store that holds a trace and nothing else, for reading.

    Raises:
        RealignerError: naming the file, for metadata that is not a trace's; while chunks are read, for one that is missing, a
            link, or unpacks to more than it should.
    """

    def __init__(self, root: Path | str, *, read_only: bool = True) -> None:
        super().__init__(root, read_only=read_only)
        self.metadata = _root_metadata(self.root)
        group = parsed(self.metadata, self.root / _ROOT)
        try:
            self.chunks = _checked(group)
        except _UnfitError as error:
            raise RealignerError(f"{self.root / _ROOT}: {error}; record it again") from None
        for name in self.chunks:
            if (self.root / name).is_symlink():
                raise RealignerError(f"{self.root / name}: is a link; a trace holds its own files")

    async def get(self, key: str, prototype: Any = None, byte_range: Any = None) -> Any:
        """The checked metadata, or a chunk of one of its arrays."""
        buffer = (prototype or default_buffer_prototype()).buffer
        name, *rest = key.split("/")
        if byte_range is None and key == _ROOT:
            return buffer.from_bytes(self.metadata)
        if byte_range is None and name in self.chunks and rest[:1] == ["c"]:
            return buffer.from_bytes(await asyncio.to_thread(self._chunk, name, key))
        return None

    def get_sync(self, key: str, **_: Any) -> Any:
        raise NotImplementedError("a trace is read by `get`, which checks what it reads")

    async def get_partial_values(self, *_: Any) -> Any:
        raise NotImplementedError("a trace is read by `get`, which checks what it reads")

    async def exists(self, key: str) -> bool:
        return key == _ROOT

    def _chunk(self, name: str, key: str) -> bytes:
        """A chunk's bytes, once they are known to unpack to what the array declares."""
        path, chunk = self.root / key, self.chunks[name]
        try:
            facts = path.stat()
            if path.resolve() != self.root.resolve() / key or not stat.S_ISREG(facts.st_mode):
                raise RealignerError(f"{path}: is a link, or no file; a trace holds its own files")
            large = f"{path}: holds more than the {chunk.most:,} bytes of a chunk; record it again"
            if facts.st_size > 1.01 * chunk.most + 1024:  # zstd makes nothing longer than that
                raise RealignerError(large)
            data: bytes = path.read_bytes()
        except OSError as error:
            what = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
            raise RealignerError(f"{self.root}: damaged: the chunk {key} {what}; record it again") from None
        if chunk.is_squeezed:
            plain = np.zeros(chunk.most, dtype=np.uint8)
            try:
                Zstd().decode(data[:-4], plain)  # the last four bytes are the checksum
            except ValueError:  # it does not fit in
                raise RealignerError(large) from None
            except RuntimeError:  # damaged: whoever reads it will see that the checksum is wrong
                return data
            if chunk.is_text and int.from_bytes(plain[:4].tobytes(), "little") != chunk.items:
                raise RealignerError(f"{path}: damaged: not the {chunk.items:,} texts of a chunk; record it again")
        return data


class _UnfitError(Exception):
    """What is wrong with metadata."""


def _root_metadata(root: Path) -> bytes:
    path = root / _ROOT
    if path.is_symlink():
        raise RealignerError(f"{path}: is a link; a trace holds its own files")
    if not path.is_file():
        old = any((root / name).exists() for name in (".zgroup", ".zarray"))
        raise RealignerError(f"{root}: not a readable zarr store ({'zarr v2; traces are v3' if old else f'no {_ROOT}'})")
    return read_bytes(path, _METADATA_MOST)


def _checked(group: Any) -> dict[str, _Chunks]:
    """The arrays of a trace by the root's metadata, or _UnfitError."""
    group = _object(group, "it")
    attributes = _object(group.get("attributes"), "attributes")
    if attributes.get("source") != layout.SOURCE:
        raise _UnfitError("not a trace of realigner")
    if attributes.get("layout") != layout.LAYOUT:
        raise _UnfitError("a trace of another version of realigner")
    if (group.get("zarr_format"), group.get("node_type")) != (3, "group"):
        raise _UnfitError("not a group of zarr v3")
    listed = _object(_object(group.get("consolidated_metadata"), "consolidated_metadata").get("metadata"), "metadata")
    sizes: dict[str, int] = {}
    chunks = {name: _checked_array(name, _object(facts, name), sizes) for name, facts in listed.items()}
    optional = {*layout.ON_REQUEST, *(() if chunks.keys() & {*layout.LATER} else layout.LATER)}
    for name in layout.ARRAYS:
        if name not in chunks and name not in optional:
            raise _UnfitError(f"not a trace: {name!r} is missing")
    return chunks


def _checked_array(name: str, facts: dict[str, Any], sizes: dict[str, int]) -> _Chunks:
    """One array; `sizes` are those of the dimensions so far."""
    if name not in layout.ARRAYS:
        raise _UnfitError(f"{name[:80]!r} is no array of a trace")
    dims, kinds = layout.ARRAYS[name]
    if odd := (facts.keys() - _REQUIRED - _OPTIONAL) | (_REQUIRED - facts.keys()):
        raise _UnfitError(f"{name}: key {min(odd)[:80]!r} is not as a trace has it")
    if facts.get("storage_transformers"):
        raise _UnfitError(f"{name}: storage_transformers: a trace has none")
    kind = facts["data_type"]
    if kind not in kinds:
        raise _UnfitError(f"{name}: data type {str(kind)[:80]!r}, where a trace has {' or '.join(kinds)}")
    if (facts["zarr_format"], facts["node_type"]) != (3, "array") or isinstance(facts["fill_value"], list | dict):
        raise _UnfitError(f"{name}: not an array of zarr v3")
    if facts.get("dimension_names") != list(dims):
        raise _UnfitError(f"{name}: its dimensions are not {', '.join(dims)}")
    shape: Any = facts["shape"]
    chunk: Any = _configured(facts["chunk_grid"], "regular", name).get("chunk_shape")
    for what, numbers in (("shape", shape), ("chunk_shape", chunk)):
        if not isinstance(numbers, list) or len(numbers) != len(dims) or not all(type(n) is int and n > 0 for n in numbers):
            raise _UnfitError(f"{name}: its {what} is not {len(dims)} whole numbers above 0")
    for dim, size in zip(dims, shape, strict=True):
        if sizes.setdefault(dim, size) != size:
            raise _UnfitError(f"{name}: {size:,} along {dim}, where other arrays have {sizes[dim]:,}")
        if size > layout.MOST[dim]:
            raise _UnfitError(f"{name}: {size:,} along {dim}; a trace has {layout.MOST[dim]:,} at most")
    keys = _configured(facts["chunk_key_encoding"], "default", name)
    if keys not in ({}, {"separator": "/"}):
        raise _UnfitError(f"{name}: its chunks are not named as a trace's")
    is_text = kind == "string"
    is_squeezed = _check_codecs(name, facts["codecs"], is_text)
    _check_attributes(name, facts.get("attributes", {}))
    items = math.prod(chunk)
    most = items * (8 if is_text else np.dtype(kind).itemsize)
    if most > _CHUNK_MOST:
        raise _UnfitError(f"{name}: a chunk of {most:,} bytes; a trace's have {_CHUNK_MOST:,} at most")
    return _Chunks(items, _CHUNK_MOST if is_text else most, is_text, is_squeezed)


def _check_codecs(name: str, codecs: Any, is_text: bool) -> bool:
    """Whether an array is squeezed; _UnfitError for any codec that a trace does not have."""
    names = [codec.get("name") if isinstance(codec, dict) else codec for codec in codecs] if isinstance(codecs, list) else []
    first = "vlen-utf8" if is_text else "bytes"
    if names not in ([first, "zstd", "crc32c"], [first, "crc32c"]) or (is_text and "zstd" not in names):
        known = ("bytes", "vlen-utf8", "zstd", "crc32c")
        odd = next((str(codec)[:80] for codec in names if codec not in known), ", ".join(map(str, names))[:80])
        raise _UnfitError(f"{name}: codec {odd!r}; a trace has {first}, zstd, crc32c, in this order")
    allowed: dict[str, dict[str, Collection[Any]]] = {
        "bytes": {"endian": ("little",)},
        "zstd": {"level": range(-7, 23), "checksum": (False, True)},
    }
    for codec in codecs:
        given = _configured(codec, codec["name"], name)
        known_settings = allowed.get(codec["name"], {})
        for key, value in given.items():
            if key not in known_settings or isinstance(value, list | dict) or value not in known_settings[key]:
                raise _UnfitError(f"{name}: codec {codec['name']}: {key[:80]!r} is not as a trace has it")
    return "zstd" in names


def _check_attributes(name: str, attributes: Any) -> None:
    """xarray takes orders from attributes (scales, units, types): a trace's name the missing value and the coordinates."""
    for key, value in _object(attributes, f"{name}: attributes").items():
        coordinates = key == "coordinates" and isinstance(value, str) and set(value.split()) <= set(layout.ARRAYS)
        if not coordinates and (key, value) != ("_FillValue", _NAN):
            raise _UnfitError(f"{name}: attribute {key[:80]!r} is not as a trace has it")


def _configured(value: Any, wanted: str, name: str) -> dict[str, Any]:
    """The configuration of something that metadata names."""
    found = _object(value, name)
    if found.get("name") != wanted or not set(found) <= {"name", "configuration"}:
        raise _UnfitError(f"{name}: {str(found.get('name'))[:80]!r}, where a trace has {wanted!r}")
    return _object(found.get("configuration", {}), name)


def _object(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _UnfitError(f"not a trace: {what} is not a JSON object")
    return value
