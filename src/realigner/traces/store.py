"""Traces on disk: zarr, readable by `xarray.open_zarr` without realigner."""

from __future__ import annotations

import json
from pathlib import Path

import xarray as xr

from realigner.errors import RealignerError
from realigner.files import refuse_existing, written_folder

_SOURCE = "realigner.record"  # every trace of ours says so
_COORDINATES = ("prompt", "position", "token_id", "is_generated")


def save_trace(trace: xr.Dataset, path: str | Path, force: bool = False) -> Path:
    """Write a trace as a zarr folder, aside first and then renamed.

    Raises:
        RealignerError: when the place is taken (see `force`) or cannot be written, or the trace is empty.
    """
    path = Path(path)
    refuse_trace(path, force)
    if "delta" not in trace:
        raise RealignerError("trace: nothing was recorded; run the model inside the record block")
    plain = trace.copy()
    plain.attrs = {key: json.dumps(value) if isinstance(value, dict) else value for key, value in trace.attrs.items()}
    sizes = trace.sizes
    chunks = (1, min(64, sizes["token"]), sizes["layer"], sizes["neuron"])
    with written_folder(path) as aside:
        plain.to_zarr(aside.folder, mode="w", zarr_format=3, consolidated=False, encoding={"delta": {"chunks": chunks}})
    return path


def refuse_trace(path: Path, force: bool) -> None:
    """Raise unless a trace may be written to `path`: it is free, or `force` was given and a trace of ours is there."""

    def ours(folder: Path) -> bool:
        group = folder / "zarr.json"
        return group.is_file() and _SOURCE in group.read_text(encoding="utf-8")

    refuse_existing(path, force, ours)


def load_trace(path: str | Path) -> xr.Dataset:
    """Read a trace; values stay on disk until they are used.

    Raises:
        RealignerError: when there is no trace, or it is not one of ours.
    """
    path = Path(path)
    if not path.is_dir():
        raise RealignerError(f"{path}: there is no such trace (a zarr folder)")
    try:
        trace: xr.Dataset = xr.open_zarr(path, consolidated=False, chunks=None)
    except Exception as error:  # zarr raises many kinds for a damaged store
        raise RealignerError(f"{path}: not a readable zarr store ({str(error).splitlines()[0]})") from error
    if "delta" not in trace or trace["delta"].dims != ("run", "token", "layer", "neuron"):
        raise RealignerError(f"{path}: not a trace: it has no delta [run, token, layer, neuron]")
    missing = [name for name in _COORDINATES if name not in trace.coords]
    if missing:
        raise RealignerError(f"{path}: not a trace: coordinate {missing[0]!r} is missing")
    if isinstance(trace.attrs.get("strength"), str):
        trace.attrs["strength"] = json.loads(trace.attrs["strength"])
    return trace
