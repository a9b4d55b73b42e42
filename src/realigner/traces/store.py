"""Traces on disk: zarr v3, readable by `xarray.open_zarr` without realigner, consistent after every text.

A trace is written text by text into ``PATH.unfinished`` and renamed to ``PATH`` at the end. What makes a text count is the
root's consolidated metadata, one small file that is replaced atomically after everything else is written: a reader, also after
the writer was killed, finds exactly the finished texts. Chunks carry checksums.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xarray as xr

from realigner.errors import RealignerError
from realigner.files import Artifact, Output, parsed, read_bytes, taken, unfinished, write_text, writing
from realigner.traces import layout
from realigner.traces.trace_files import TraceFiles
from realigner.traces.trace_values import check_attributes, checked

RawType = Literal["auto", "float16", "float32"]
_CHUNK = {"token": 16, "text": 1, "layer": 32, "neuron": 4096}  # of large arrays
_LABELS_CHUNK = 4096  # tokens in a chunk of labels
_FLOAT16 = np.finfo(np.float16)  # loses digits below `tiny`
_HEADROOM = 16.0  # float16 is chosen when later texts may be this many times larger


def _read_source(folder: Path) -> None:
    """Raise unless what the root of a store says is that it is a trace of ours."""
    root = folder / "zarr.json"
    facts = parsed(read_bytes(root), root)
    attributes = facts.get("attributes") if isinstance(facts, dict) else None
    if not isinstance(attributes, dict) or attributes.get("source") != layout.SOURCE:
        raise RealignerError(f"{root}: not a trace's")


_ARRAYS = "|".join((*layout.TOKEN_LABELS, *layout.TEXT_LABELS, *layout.ALWAYS, *layout.ON_REQUEST, "layer", "neuron", "part"))
_HALF = r"[0-9a-f]{32}\.partial"  # how zarr ends the name of a file that it is writing
_METADATA = rf"zarr\.json|zarr\.{_HALF}"
TRACE = Artifact(
    "a trace",
    _read_source,
    rf"{_METADATA}|\.zarr\.json-\w{{8}}\.aside|({_ARRAYS})/({_METADATA}|c/?|c/\d+(/\d+)*(/|\.{_HALF})?)?",
)


class TraceWriter:
    """Writes a trace text by text.

    Args:
        path: the zarr folder, which `close` creates; until then it is ``PATH.unfinished``.
        host: the host's name.
        layers: all layers that any run adds to.
        dtype: of raw deltas; ``auto``: float16 where the first text's lie well inside its range, else float32.
        force: replace an existing trace, and discard an unfinished one.
        notes: JSON values stored among the attributes.

    Raises:
        RealignerError: if `path` or ``PATH.unfinished`` exists, another process writes there, it cannot be written, or a delta
            overflows the dtype.

    Example:
        >>> with TraceWriter("t.zarr", "tiny", range(4)) as writer, record(model, to=writer):  # doctest: +SKIP
        ...     model.generate(**inputs)
    """

    def __init__(
        self,
        path: str | Path,
        host: str,
        layers: Sequence[int],
        dtype: RawType = "auto",
        force: bool = False,
        notes: Mapping[str, Any] | None = None,
    ) -> None:
        self.path, self.host, self.dtype = Path(path), host, dtype
        self.layers = sorted(layers)
        self.notes = dict(notes or {})
        self.texts = self.tokens = 0
        self.labels: list[layout.RunLabel] = []
        self._held = ExitStack()
        self._place, self._work = self._held.enter_context(held(self.path, force))
        self.folder = self._work.path

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        with self._held:
            if kind is None:
                self.close()

    def append(self, *texts: tuple[xr.Dataset, layout.RunLabel]) -> None:
        """Write texts durably; many at a time are cheaper."""
        if not texts:
            return
        import zarr

        self.labels += [label for label in dict.fromkeys(label for _, label in texts) if label not in self.labels]
        wide = [self._narrowed(layout.with_layers(text, self.layers)) for text, _ in texts]
        part = layout.join(wide, self.host, self.labels, self.notes)
        if self.tokens + part.sizes["token"] > layout.MOST["token"]:
            raise RealignerError(f"{self.folder}: more than {layout.MOST['token']:,} tokens; make several traces{self._kept()}")
        part.attrs |= {key: json.dumps(part.attrs[key]) for key in ("runs", "notes")}
        # Every chunk is written, also one of zeros: a missing chunk is damage, not a value.
        chunks = {"array.write_empty_chunks": True}
        with writing(self.folder, self._kept()), warnings.catch_warnings(), zarr.config.set(chunks):
            warnings.filterwarnings("ignore", message="Consolidated metadata is currently not part")
            if self.texts:
                _append(part, self.folder)
            else:  # aside, so that an unfinished trace has its record from the first
                options: Any = {"zarr_format": 3, "consolidated": True}
                with self._work.folder() as aside:
                    part.to_zarr(aside, mode="w", encoding=_encoding(part), **options)
        self.texts += len(texts)
        self.tokens += part.sizes["token"]

    def close(self) -> Path:
        """Rename the finished trace to `path`.

        Raises:
            RealignerError: when nothing was recorded, or something else is at `path` by now.
        """
        with self._held:
            if not self.texts:
                raise RealignerError("trace: nothing was recorded; run the model inside the record block")
            try:
                self._place.put(self.folder)
            except RealignerError as error:
                raise RealignerError(f"{error}; the trace is whole in {self.folder}: move it where you want it") from error
        return self.path

    def _narrowed(self, text: xr.Dataset) -> xr.Dataset:
        if "delta" not in text:
            return text
        import torch

        largest = float(np.nanmax(text["max_abs"].values))
        if self.dtype == "auto":
            # float16 where the first text's deltas lie well inside its range
            typical = float(np.nanmedian(np.sqrt(text["energy"].values / text.sizes["neuron"])))
            small = largest * _HEADROOM < _FLOAT16.max and (typical == 0 or typical > 16 * _FLOAT16.tiny)
            self.dtype = "float16" if small else "float32"
        if self.dtype == "float16" and largest > _FLOAT16.max:
            raise RealignerError(
                f"{self.folder}: a delta of {largest:.3g} does not fit into float16; record again with float32{self._kept()}"
            )
        # By PyTorch, which converts to float16 several times faster than numpy.
        narrow = torch.as_tensor(np.ascontiguousarray(text["delta"].values)).to(getattr(torch, self.dtype))
        return text.assign(delta=(text["delta"].dims, narrow.numpy()))

    def _kept(self) -> str:
        return f"; the {self.texts} texts before are kept there" if self.texts else ""


def _encoding(text: xr.Dataset) -> dict[str, Any]:
    from zarr.codecs import Crc32cCodec, ZstdCodec

    encoding: dict[str, Any] = {}
    for name in map(str, text.variables):
        sizes = dict(zip(text[name].dims, text[name].shape, strict=True))
        large = name in (*layout.ALWAYS, *layout.ON_REQUEST) and name not in ("count", "energy", "l1", "l4", "small")
        chunks = [
            max(1, min(_CHUNK.get(str(dim), size), size) if large else _LABELS_CHUNK if dim == "token" else size)
            for dim, size in sizes.items()
        ]
        if large and "token" in sizes:
            chunks[0] = _CHUNK["token"]
        # Deltas shrink by a tenth at most, which is not worth the time; their checksum is.
        squeeze = [] if name in layout.ON_REQUEST else [ZstdCodec(level=1)]
        encoding[name] = {"chunks": tuple(chunks), "compressors": [*squeeze, Crc32cCodec()]}
    return encoding


def _append(text: xr.Dataset, folder: Path) -> None:
    """Add a text to each array, and then, in one step, to what the root says is there.

    Not by `Dataset.to_zarr(append_dim=...)`: that writes the root's attributes first, without its metadata.
    """
    import zarr

    root = folder / "zarr.json"
    for name in map(str, text.variables):
        axis = next((at for at, dim in enumerate(text[name].dims) if dim in ("token", "text")), None)
        if axis is not None:
            array: Any = zarr.open_array(folder / name, mode="r+")
            values = text[name].values
            array.append(values.astype(np.dtypes.StringDType()) if values.dtype == object else values, axis=axis)
    facts = json.loads(root.read_text(encoding="utf-8"))
    if facts["attributes"] != text.attrs:
        write_text(root, json.dumps({**facts, "attributes": text.attrs}))
    zarr.consolidate_metadata(str(folder), zarr_format=3)


def save_trace(trace: xr.Dataset, path: str | Path, force: bool = False, dtype: RawType = "auto") -> Path:
    """Write a trace as a zarr folder.

    Args:
        trace: from `record`.
        path: the folder.
        force: replace an existing trace.
        dtype: of raw deltas; ``auto``: float16 where they lie well inside its range.

    Raises:
        RealignerError: if `path` exists (see `force`) or cannot be written, or the trace is empty.
    """
    if "text" not in trace.dims:
        raise RealignerError("trace: nothing was recorded; run the model inside the record block")
    labels = {label.run: label for label in layout.labels_of(trace)}
    host, layers, notes = str(trace.attrs["host"]), trace["layer"].values.tolist(), trace.attrs["notes"]
    with TraceWriter(path, host, layers, dtype, force, notes) as writer:
        for text in texts_of(trace):
            writer.append((text, labels[str(text["text_run"].values[0])]))
    return writer.path


def texts_of(trace: xr.Dataset) -> list[xr.Dataset]:
    """A trace text by text, in order, read lazily."""
    return [trace.isel(token=span, text=slice(at, at + 1)) for at, span in enumerate(layout.text_spans(trace))]


def is_trace(folder: Path) -> bool:
    """Whether a folder has a trace's record, whatever else it holds."""
    try:
        _read_source(folder)
    except RealignerError:
        return False
    return True


def refuse_trace(path: Path, force: bool = False) -> None:
    """Raise unless a trace may be written to `path`: it is free, or `force` is given and only a trace is there.

    Raises:
        RealignerError: naming the path and the way out.
    """
    work = unfinished(path)
    Output(path, TRACE, force).refuse()
    if not force and os.path.lexists(work):
        raise RealignerError(
            f"{work}: an unfinished trace is there, which opens like any other; keep it by another name, or discard it (force)"
        )
    Output(work, TRACE, force).refuse()


@contextmanager
def held(path: Path, force: bool = False) -> Iterator[tuple[Output, Output]]:
    """Reserve a trace's path for this process; yields the final path and that of the unfinished trace.

    Raises:
        RealignerError: as `refuse_trace`, and when another process is writing there.
    """
    refuse_trace(path, force)
    with taken(path, TRACE, force) as place:
        refuse_trace(path, force)
        work = Output(unfinished(path), TRACE, force)
        work.remove_leftovers()
        yield place, work


def load_trace(path: str | Path) -> xr.Dataset:
    """Open a trace; values stay on disk until they are used. An unfinished one has the texts that were finished.

    Raises:
        RealignerError: if there is no trace, or it was not written by realigner.
    """
    path = Path(path)
    if not path.is_dir():
        left = unfinished(path)
        hint = f"; {left} is there, not finished" if left.is_dir() else ""
        raise RealignerError(f"{path}: there is no such trace (a zarr folder){hint}")
    files = TraceFiles(path)
    try:
        trace: xr.Dataset = xr.open_zarr(files, chunks=None, zarr_format=3, consolidated=True)
    except Exception as error:  # zarr raises many kinds for a damaged store
        raise RealignerError(f"{path}: not a readable zarr store ({str(error).splitlines()[0]})") from error
    trace.attrs = check_attributes(path, trace)
    if not {*layout.LATER} & {*trace.variables}:
        labels = layout.unlabelled(trace.sizes["token"]).items()
        trace = trace.assign_coords({name: ("token", values) for name, values in labels})
    try:
        for name in (*layout.TOKEN_LABELS, *layout.TEXT_LABELS, "count"):
            trace[name].load()
        # A text that was being written has tokens but is not a text yet.
        return checked(path, _of_whole_texts(path, trace))
    except RealignerError:
        raise
    except Exception as error:  # codecs raise many kinds
        _scan(path)
        raise RealignerError(f"{path}: damaged ({str(error).splitlines()[0]})") from error


def _of_whole_texts(path: Path, trace: xr.Dataset) -> xr.Dataset:
    """The texts that were finished, their tokens, the runs they are of."""
    begun, there = trace.attrs["runs"], set(trace["text_run"].values.tolist())
    tokens = int(trace["count"].values.sum())
    if tokens > trace.sizes["token"]:
        raise RealignerError(f"{path}: damaged: count is {tokens} tokens in all, where {trace.sizes['token']} are there")
    whole: xr.Dataset = trace.isel(token=slice(0, max(0, tokens)))
    return whole.assign_attrs(runs={run: facts for run, facts in begun.items() if run in there})


@contextmanager
def damage_named(*paths: str | Path) -> Iterator[None]:
    """Context manager for reading traces: on an error from a library, find the chunk that cannot be read and name it."""
    try:
        yield
    except RealignerError:
        raise
    except Exception:  # codecs raise many kinds
        for path in paths:
            verify_trace(path)
        raise


def verify_trace(path: str | Path) -> int:
    """Verify the checksum of every chunk of a trace; returns the number of chunks.

    Raises:
        RealignerError: naming the first chunk that is missing or damaged.
    """
    chunks = _scan(Path(path))
    load_trace(path)
    return chunks


def _scan(path: Path) -> int:
    import zarr

    if not (path / "zarr.json").is_file():
        raise RealignerError(f"{path}: there is no such trace (a zarr folder)")
    chunks = 0
    for name, array in zarr.open_group(TraceFiles(path), mode="r", use_consolidated=True).arrays():
        shape, size = array.shape, array.chunks
        for place in np.ndindex(*(-(-whole // part) for whole, part in zip(shape, size, strict=True))):
            key = "/".join(("c", *map(str, place)))
            try:
                array[tuple(slice(at * part, (at + 1) * part) for at, part in zip(place, size, strict=True))]
            except RealignerError:
                raise
            except Exception as error:  # codecs raise many kinds
                raise RealignerError(
                    f"{path}: damaged: the chunk {name}/{key} cannot be read ({str(error).splitlines()[0]}); record it again"
                ) from error
            chunks += 1
    return chunks
