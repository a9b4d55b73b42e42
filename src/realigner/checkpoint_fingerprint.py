"""Whether a checkpoint on disk is the host that an IRM was made for, told by its safetensors files alone.

An engine fuses weights and splits them over devices, so what it has in memory is not what `fingerprints` samples. Its files
are: each sampled weight is found by its name and shape and read where it lies, a few hundred numbers whatever the host's size.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from realigner.errors import RealignerError
from realigner.files import read_object
from realigner.fingerprints import Fingerprint, decode_samples, off, off_in_sign, places_of, sample_key

_LAYER = re.compile(r"(?P<layers>(?:.*\.)?)(?P<index>\d+)\.(?P<rest>.+)")
_FLOATS = ("F64", "F32", "F16", "BF16")
_FLOAT_8 = ("F8_E4M3", "F8_E5M2")
_NAMES_DIFFER = "its tensors have other names or shapes"


@dataclass(frozen=True)
class _Stored:
    """A tensor in a file: its name among the layers, its shape there, and the open slice."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    view: Any

    def weights(self, places: list[int], transposed: bool) -> list[float]:
        """Values at flat places of the tensor, or of its transpose."""
        shape = self.shape[::-1] if transposed else self.shape
        found = []
        for place in places:
            index = [int(i) for i in torch.unravel_index(torch.tensor(place), shape)]
            index = index[::-1] if transposed else index
            found.append(float(self.view[tuple(slice(i, i + 1) for i in index)].flatten()[0]))
        return found


def difference(made_for: Fingerprint, folder: Path, hidden_size: int, num_layers: int, model_type: str) -> str | None:
    """The first thing in which a checkpoint differs from the host of an IRM, as a sentence on it; None: it is that host.

    Args:
        made_for: of the IRM's host.
        folder: that holds the checkpoint's ``*.safetensors``.
        hidden_size, num_layers, model_type: as the checkpoint's config has them.

    Raises:
        RealignerError: when there are no such files, one cannot be read, or the IRM's fingerprint is of before version 2.

    Example:
        >>> difference(made_for, Path("SmolLM2-135M-Instruct"), 576, 30, "llama")  # doctest: +SKIP
    """
    for key, theirs in (("hidden_size", hidden_size), ("num_layers", num_layers)):
        if getattr(made_for, key) != theirs:
            return f"{key} is {theirs}, not {getattr(made_for, key)}"
    types = sorted((made_for.model_type, model_type), key=len)
    if made_for.version == 1:
        raise RealignerError("this IRM's fingerprint of its host is of an old form; load it (realigner.load) and save it again")
    if not types[1].startswith(types[0].removesuffix("_text")):
        return f"the decoder is of type {model_type}, not {made_for.model_type}"
    with ExitStack() as stack:
        stored = list(_layers_of(stack, folder, num_layers))
        quantised = any(tensor.dtype not in _FLOATS for tensor in stored if len(tensor.shape) > 1)
        # AWQ and its kind move scales from a matrix into the norm before it.
        packed = any(tensor.name.endswith((".qweight", ".weight_packed")) for tensor in stored)
        moved = packed and not any(tensor.name.endswith("g_idx") for tensor in stored)
        for text in ("" if moved else made_for.vectors, made_for.samples):
            wanted = decode_samples(text)
            exact, by_sign, found = _pairs(wanted, stored, made_for.quantised and text is made_for.samples)
            if 4 * found < 3 * len(wanted) and not quantised:
                return _NAMES_DIFFER
            if why := off(*exact) or off_in_sign(*by_sign):
                return why
    return None


def _pairs(wanted: Mapping[str, list[float]], stored: list[_Stored], signs: bool) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Sampled weights beside those of the files: to be compared as they are, and by sign; and how many tensors were found."""
    exact: list[tuple[float, float]] = []
    by_sign: list[tuple[float, float]] = []
    found = 0
    for tensor in stored:
        if tensor.dtype not in (*_FLOATS, *_FLOAT_8):
            continue
        readings = []
        for transposed in (False, True) if len(tensor.shape) == 2 else (False,):  # GPT-2 keeps matrices as [in, out]
            shape = list(tensor.shape[::-1] if transposed else tensor.shape)
            values = wanted.get(sample_key(tensor.name, shape))
            if values is not None:
                places = places_of(tensor.name, math.prod(shape), len(values))
                read = torch.tensor(tensor.weights(places, transposed)).bfloat16().float().tolist()
                readings.append(list(zip(values, read, strict=True)))
        if readings:  # of a square matrix two
            nearest = min(readings, key=lambda pairs: sum(abs(a - b) for a, b in pairs if a == a))
            (by_sign if signs or tensor.dtype in _FLOAT_8 else exact).extend(nearest)
            found += 1
    as_tensor = [torch.tensor(pairs).reshape(-1, 2).T for pairs in (exact, by_sign)]
    return as_tensor[0], as_tensor[1], found


def _layers_of(stack: ExitStack, folder: Path, num_layers: int) -> Iterator[_Stored]:
    """The tensors of a checkpoint's decoder layers, named from the list of layers on (``3.self_attn.q_proj.weight``)."""
    files = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if index.is_file():  # a folder may hold the same weights in another form (consolidated.safetensors)
        shards = read_object(index).get("weight_map")
        named = set(map(str, shards.values())) if isinstance(shards, dict) else set()
        if lacking := sorted(named - {file.name for file in files}):
            raise RealignerError(f"{folder / lacking[0]}: is not there, and {index.name} names it; get it")
        files = [file for file in files if file.name in named]
    elif (single := folder / "model.safetensors").is_file():
        files = [single]
    if not files:
        raise RealignerError(f"{folder}: has no safetensors files, so it cannot be told whether it is the IRM's host; get them")
    views: dict[str, tuple[re.Match[str], Any]] = {}
    for path in files:
        try:
            file = stack.enter_context(safe_open(str(path), framework="pt"))
            views |= {name: (match, file.get_slice(name)) for name in file.keys() if (match := _LAYER.fullmatch(name))}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise RealignerError(f"{path}: truncated or damaged ({error})") from None
    indices: dict[str, set[int]] = {}
    for match, _ in views.values():
        indices.setdefault(match["layers"], set()).add(int(match["index"]))
    counts = Counter(match["layers"] for match, _ in views.values() if len(indices[match["layers"]]) == num_layers)
    for layers, _ in counts.most_common(1):
        for match, view in views.values():
            if match["layers"] == layers:
                yield _Stored(f"{match['index']}.{match['rest']}", tuple(view.get_shape()), view.get_dtype(), view)
