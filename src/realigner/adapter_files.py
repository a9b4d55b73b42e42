"""The two files of a saved IRM, read by torch alone: neither PEFT nor transformers, so that any engine can.

On load nothing is forgiven: a missing or pickled weights file, a truncated one, an unknown key, a value of another type,
tensors that are none of this IRM's or no finite numbers are each refused with one line.
"""

from __future__ import annotations

import codecs
import hashlib
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from realigner.errors import RealignerError, UsageError
from realigner.files import parsed, read_bytes
from realigner.irm import EDITIONS, IRM, IRMShape
from realigner.settings import check_strength
from realigner.sites import Site, read_sites

PEFT_NAME = "irm"
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
FILE_PREFIX = "irm."  # tensors in the file are named irm.trunk.0.weight, ..., whatever host and adapter name
_PICKLE_FILE = "adapter_model.bin"
_LARGEST_CONFIG = 16 * 2**20  # bytes; one of a host of a hundred layers has a hundred thousand
_DTYPES = ("F64", "F32", "F16", "BF16")  # that the weights may have
TYPES: dict[str, tuple[type, ...]] = {  # of the config's values that IRMShape does not check; PEFT's own first
    "base_model_name_or_path": (str,),
    "revision": (str,),
    "task_type": (str,),
    "peft_version": (str,),
    "inference_mode": (bool,),
    "auto_mapping": (dict,),
    "layers_path": (str,),
    "tone": (str,),
    "template": (str,),
    "chat_template_kwargs": (dict,),
    "strength": (int, float),
    "strength_range": (tuple, list),
    "host": (dict,),
    "site": (dict,),
    "modules_to_save": (tuple, set, list),
}


@dataclass(frozen=True, eq=False)
class StoredIRM:
    """An IRM in its folder: what its config says of it. Made by `read_irm`; `network` reads the weights.

    Attributes:
        folder: where its files lie.
        shape: what network it is.
        hidden_size, num_layers: of its host.
        sites: of each of the host's layers, where its delta goes.
        values: the config's values: ``strength``, ``template``, ``host``, ...
    """

    folder: Path
    shape: IRMShape
    hidden_size: int
    num_layers: int
    sites: tuple[Site, ...]
    values: Mapping[str, Any]

    @property
    def strength(self) -> float:
        """At which it is best used."""
        value = self.values.get("strength")
        return 1.0 if value is None else float(value)

    @cached_property
    def digest(self) -> str:
        """sha256 of its files: what it does depends on nothing else."""
        digest = hashlib.sha256()
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            with (self.folder / name).open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()

    def network(self) -> IRM:
        """The network with its weights, in float32 (float64 if they are), in evaluation mode.

        Raises:
            RealignerError: when a weight is not a finite number, or the file changed under our hands.
        """
        path = self.folder / WEIGHTS_FILE
        try:
            tensors = load_file(path)
        except (SafetensorError, OSError) as error:
            raise RealignerError(f"{path}: truncated or damaged ({error})") from None
        with torch.device("meta"):
            expected = _named(self.shape.build(self.hidden_size, self.num_layers))
        check_tensors(str(path), expected, tensors)
        kind = torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors.values()) else torch.float32
        with torch.random.fork_rng(devices=[]):  # building draws weights, which are then replaced
            network = self.shape.build(self.hidden_size, self.num_layers).to("cpu", kind)
        network.load_state_dict({key.removeprefix(FILE_PREFIX): value.to(kind) for key, value in tensors.items()})
        return network.eval().requires_grad_(False)


def _named(network: IRM) -> dict[str, torch.Tensor]:
    return {FILE_PREFIX + key: value for key, value in network.state_dict().items()}


def adapter_folder(folder: str | Path) -> Path:
    """The folder that holds the adapter: itself, or its only subfolder that does (PEFT saves a named adapter into one).

    Raises:
        RealignerError: when there is none, or several, naming them.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise RealignerError(f"{folder}: there is no such adapter folder")
    if (folder / CONFIG_FILE).is_file():
        return folder
    inside = sorted(path.parent for path in folder.glob(f"*/{CONFIG_FILE}"))
    if len(inside) > 1:
        raise RealignerError(f"{folder}: holds several adapters; give one of {', '.join(map(str, inside))}")
    if not inside:
        raise RealignerError(f"{folder}: not an adapter folder, it has no {CONFIG_FILE}")
    return inside[0]


def read_values(folder: Path) -> dict[str, Any]:
    """The values of an adapter's config, as far as its being an IRM's; raises RealignerError when it is not, or damaged."""
    path = folder / CONFIG_FILE
    values = parsed(read_bytes(path, _LARGEST_CONFIG), path)
    if path.read_bytes().startswith(codecs.BOM_UTF8):  # PEFT reads the file too, and cannot
        raise RealignerError(f"{path}: begins with a byte order mark; save it without")
    if not isinstance(values, dict) or values.get("peft_type") != PEFT_NAME.upper():
        found = values.get("peft_type") if isinstance(values, dict) else type(values).__name__
        raise RealignerError(f"{path}: not an IRM (peft_type is {found!r})")
    known = {"peft_type", *TYPES, *(f.name for f in fields(IRMShape))}
    if unknown := sorted(set(values) - known):
        raise RealignerError(f"{path}: unknown key {unknown[0]!r}; the adapter may come from a newer realigner")
    return values


def check_types(values: Mapping[str, Any]) -> None:
    """Raise UsageError naming the first of a config's values that is of another type than it should be."""
    for key, types in TYPES.items():
        value = values.get(key)
        if value is not None and (not isinstance(value, types) or (isinstance(value, bool) and bool not in types)):
            raise UsageError(f"{key}: {reprlib.repr(value)} is not of type {types[-1].__name__}")


def file_tensors(folder: Path) -> dict[str, list[int]]:
    """Tensor -> shape of an adapter's weights, from the file's header.

    Raises:
        RealignerError: when it is missing, truncated or pickled, or a tensor is not of floating-point numbers.
    """
    weights = folder / WEIGHTS_FILE
    if not weights.is_file():
        pickled = (folder / _PICKLE_FILE).exists()
        why = f"{_PICKLE_FILE} is a pickle and is not read" if pickled else "its weights are missing"
        raise RealignerError(f"{folder}: no {WEIGHTS_FILE}; {why}")
    shapes: dict[str, list[int]] = {}
    try:
        with safe_open(str(weights), framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118 (not a mapping)
                tensor = handle.get_slice(name)
                shapes[name] = tensor.get_shape()
                if (dtype := tensor.get_dtype()) not in _DTYPES:
                    known = ", ".join(_DTYPES)
                    raise RealignerError(f"{weights}: tensor {reprlib.repr(name)} is of type {dtype}; an IRM's are {known}")
    except (SafetensorError, OSError) as error:
        raise RealignerError(f"{weights}: truncated or damaged ({error})") from None
    return shapes


def check_tensors(
    where: str, expected: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor] | Mapping[str, list[int]]
) -> None:
    """Raise RealignerError unless tensors (or shapes) of a file are those that an IRM has, and finite."""
    for key, tensor in expected.items():
        if key not in given:
            raise RealignerError(f"{where}: tensor {key} is missing")
        found = given[key]
        shape = list(found.shape) if isinstance(found, torch.Tensor) else found
        if shape != list(tensor.shape):
            raise RealignerError(f"{where}: tensor {key} has shape {shape}, not {list(tensor.shape)}")
        if isinstance(found, torch.Tensor) and not (found.is_floating_point() and bool(torch.isfinite(found).all())):
            raise RealignerError(f"{where}: tensor {key} has values that are not finite numbers")
    for key in given:
        if key not in expected:
            raise RealignerError(f"{where}: has a tensor {reprlib.repr(key)} that this IRM does not have")


def read_irm(folder: str | Path) -> StoredIRM:
    """Read a saved IRM without a host: its config, and the header of its weights.

    Args:
        folder: of the adapter, or of one that holds only it.

    Raises:
        RealignerError: naming the file and what is wrong with it: missing, damaged, not an IRM's, of no host; or holding
            parts of the host that were trained beside it (`modules_to_save`), which an engine does not take.

    Example:
        >>> read_irm("runs/anger-42").network()(h0).shape  # doctest: +SKIP
        torch.Size([5, 30, 576])
    """
    folder = adapter_folder(folder)
    path, weights = folder / CONFIG_FILE, folder / WEIGHTS_FILE
    values, shapes = read_values(folder), file_tensors(folder)
    try:
        check_types(values)
        check_strength(1.0 if values.get("strength") is None else values["strength"])
        host, site = values.get("host") or {}, values.get("site")
        width, depth = host.get("hidden_size"), host.get("num_layers")
        if not isinstance(width, int) or not isinstance(depth, int) or site is None:
            raise RealignerError("it names no host and site; attach it to its host once and save it again")
        given = {f.name: values[f.name] for f in fields(IRMShape) if f.name in values}
        shape = IRMShape(**{**given, "edition": given.get("edition") or EDITIONS[0]})  # which earlier files do not name
        sites = read_sites(site, depth)
        with torch.device("meta"):
            expected = _named(shape.build(width, depth))
    except RealignerError as error:
        raise RealignerError(f"{path}: {error}") from None
    if beside := sorted(key for key in shapes if not key.startswith(FILE_PREFIX)):
        raise RealignerError(f"{weights}: holds {beside[0]}, a part of the host that was trained too; only IRMs are served")
    check_tensors(str(weights), expected, shapes)
    return StoredIRM(folder, shape, width, depth, sites, values)
