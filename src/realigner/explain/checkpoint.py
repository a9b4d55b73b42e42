"""The tensors of a host: in memory, or in the safetensors files of a checkpoint that is never loaded.

A checkpoint is opened by reading headers alone; a tensor is then read slice by slice with `pread`, not through a memory map
(whose pages would count as ours until the file is closed), so memory stays at two blocks whatever the host's size. What its
tensors are called and how they are shaped is asked of transformers: the host is built from config.json on the meta device,
without weights, and names on disk are translated to its names as `from_pretrained` does.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import MergeModulelist, WeightConverter, WeightRenaming, rename_source_key

from realigner.errors import RealignerError
from realigner.hosts import host_name, load_config
from realigner.tiny import tiny_host

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_BLOCK = 1 << 24  # values read at once: 64 MB in float32
_FLOATS = ("F64", "F32", "F16", "BF16")
_WRAPPERS = ("base_model.model.", "base_model.", "module.", "_orig_mod.")  # what PEFT, DDP and torch.compile put before a name
_NO_SWITCHES = {
    *("model_type", "dtype", "torch_dtype", "transformers_version", "use_cache", "is_decoder"),
    # sizes that may be nothing, without another structure
    *("sliding_window", "head_dim", "num_key_value_heads", "num_experts", "num_experts_per_tok", "kv_lora_rank", "n_group"),
}
_AGAIN = "copy it again"


class Tensors(Protocol):
    """A host's tensors, by the names of its `named_parameters(remove_duplicate=False)`: tied ones by each of their names."""

    @property
    def host(self) -> nn.Module:
        """The host; of a checkpoint it has names, shapes and ties, and no weights (meta device)."""

    @property
    def example(self) -> nn.Module:
        """A host of the same structure that can run: the host itself, or a tiny random one of its type."""

    @property
    def origin(self) -> str:
        """The host's name: what it was loaded as, or its folder."""

    def blocks(self, name: str, axis: int) -> Iterator[torch.Tensor]:
        """A parameter in float32 blocks ``[other, axis]`` of about 64 MB at most: `axis` last, all other axes flattened."""


class HostTensors:
    """The tensors of a host in memory.

    Example:
        >>> from realigner.tiny import tiny_host
        >>> source = HostTensors(tiny_host("llama"))
        >>> [tuple(block.shape) for block in source.blocks("model.layers.0.mlp.down_proj.weight", axis=0)]
        [(64, 32)]
    """

    def __init__(self, host: nn.Module) -> None:
        self.host = self.example = host
        self.origin = host_name(host)
        self._parameters = dict(host.named_parameters(remove_duplicate=False))

    def blocks(self, name: str, axis: int) -> Iterator[torch.Tensor]:
        """As in `Tensors`; raises RealignerError for a tensor that is not in memory, or is quantised."""
        parameter = self._parameters[name].detach()
        if parameter.device.type == "meta":
            raise RealignerError(f"{name}: it is not in memory (layers kept on disk); measure the host's checkpoint instead")
        if type(self._parameters[name]) not in (torch.Tensor, nn.Parameter) or not parameter.is_floating_point():
            raise RealignerError(f"{name}: it is quantised ({parameter.dtype}); load the host in a float dtype")
        for cut in _cuts(parameter.shape, axis):
            yield _block(parameter[cut], axis)


@dataclass(frozen=True)
class _Stored:
    """A tensor on disk: the file, its name in it, its shape, and its type as safetensors writes it (``F16``)."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


class Checkpoint:
    """The tensors of a checkpoint on disk, under the names that its host gives them; made by `open_checkpoint`.

    Attributes:
        folder: where it lies.
        config: its config.
        host: the host without weights (meta device): names, shapes, ties.
    """

    def __init__(self, folder: Path, config: Any, host: nn.Module, stored: Iterable[_Stored]) -> None:
        self.folder, self.config, self.host, self.origin = folder, config, host, str(folder)
        self._parameters = dict(host.named_parameters(remove_duplicate=False))
        self._parts, self._strangers = _placed(list(stored), host)
        self._share_ties()
        for name, parts in self._parts.items():
            self._check(name, parts)

    @cached_property
    def example(self) -> nn.Module:
        """A tiny random host of the same type and structure (see `example_host`)."""
        return example_host(self.config)

    def names(self) -> list[str]:
        """The parameters that are stored."""
        return [name for name in self._parameters if name in self._parts]

    def shape(self, name: str) -> tuple[int, ...]:
        """A parameter's shape; raises RealignerError for a tensor that is in none of the files."""
        self._found(name)
        return tuple(self._parameters[name].shape)

    def blocks(self, name: str, axis: int) -> Iterator[torch.Tensor]:
        """As in `Tensors`; raises RealignerError naming the file and the tensor when it cannot be read."""
        axis %= len(self.shape(name))
        parts = self._found(name)
        stacked = len(parts[0].shape) < len(self.shape(name))
        if stacked and axis == 0:
            raise RealignerError(f"{self.folder}: {name} is kept in parts along axis 0 and cannot be read along it")
        for part in parts:
            with _opened(part.path) as file, _reading(part.path, part.name):
                view = file.get_slice(part.name)
                for cut in _cuts(part.shape, axis - stacked):
                    yield _block(view[cut], axis - stacked)

    def _found(self, name: str) -> list[_Stored]:
        if name in self._parts:
            return self._parts[name]
        hint = f" (and {self._strangers[0]} is none of this host's)" if self._strangers else ""
        raise RealignerError(f"{self.folder}: the tensor {name} is in none of its files{hint}; get the checkpoint whole")

    def _share_ties(self) -> None:
        """A tied parameter is stored once, under any of its names."""
        tied = defaultdict(list)
        for name, parameter in self._parameters.items():
            tied[id(parameter)].append(name)
        for names in tied.values():
            present = [name for name in names if name in self._parts]
            for name in names if present else ():
                self._parts.setdefault(name, self._parts[present[0]])

    def _check(self, name: str, parts: list[_Stored]) -> None:
        shape, wanted = parts[0].shape, tuple(self._parameters[name].shape)
        part = next((part for part in parts if part.shape != shape or part.dtype not in _FLOATS), parts[0])
        if part.dtype not in _FLOATS:
            raise RealignerError(f"{part.path}: {part.name} is kept as {part.dtype}, quantised; get the checkpoint in floats")
        if part.shape != shape or wanted not in (shape, (len(parts), *shape)):
            raise RealignerError(f"{part.path}: {part.name} is {list(part.shape)}, but config.json makes {name} {list(wanted)}")


def open_checkpoint(folder: str | Path) -> Checkpoint:
    """Open a checkpoint: its config, the headers of all its files, and no weights.

    Args:
        folder: ``config.json`` with ``model.safetensors``, or with ``model.safetensors.index.json`` and the shards it names.

    Raises:
        RealignerError: naming the file (and the tensor) when there is no config, no safetensors file or index, a shard is
            missing or truncated or lacks a tensor that the index places there, or a tensor has another shape than the config
            makes it.

    Example:
        >>> import tempfile
        >>> from realigner.tiny import tiny_host
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     tiny_host("llama").save_pretrained(folder)
        ...     open_checkpoint(folder).shape("model.norm.weight")
        (32,)
    """
    folder = Path(folder).expanduser()
    if not (folder / "config.json").is_file():
        why = "the folder has no config.json" if folder.is_dir() else "there is no such folder"
        raise RealignerError(f"{folder}: {why}; give a folder that save_pretrained wrote")
    stored = _stored(folder)
    config = load_config(str(folder.resolve()))
    try:
        with torch.device("meta"):
            host = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # whatever its config makes it raise
        raise RealignerError(f"{folder / 'config.json'}: no host can be built of it: {_first_line(error)}") from error
    return Checkpoint(folder, config, host, stored)


def example_host(config: Any) -> nn.Module:
    """A tiny random host with a config's structure: its type and switches (tied head, parallel layers, biases), not its sizes.

    What is taken over: words, yes and no, and what is nothing (None or 0) though the type's default is something.

    Raises:
        RealignerError: where no such tiny host can be built.

    Example:
        >>> from transformers import LlamaConfig
        >>> example_host(LlamaConfig(hidden_size=4096, tie_word_embeddings=True)).lm_head.weight.shape
        torch.Size([101, 32])
    """
    try:
        host: nn.Module = tiny_host(config.model_type, **_switches(config))
    except RealignerError:
        raise
    except Exception as error:  # as in open_checkpoint
        raise RealignerError(f"config.json: no tiny {config.model_type} of its structure: {_first_line(error)}") from error
    return host


def _switches(config: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for own in (config.get_text_config(decoder=True), config):
        default = type(own)().to_dict()
        for name, value in own.to_dict().items():
            nothing = (value is None or (type(value) is int and value == 0)) and bool(default.get(name))
            if isinstance(value, bool) or (isinstance(value, str) and isinstance(default.get(name), str)) or nothing:
                found[name] = value
    return {name: value for name, value in found.items() if name not in _NO_SWITCHES and not name.endswith("_token_id")}


def _stored(folder: Path) -> list[_Stored]:
    """Every tensor of a folder's safetensors files, from their headers."""
    if (folder / SINGLE).is_file():
        return _header(folder / SINGLE)
    if not (folder / INDEX).is_file():
        raise RealignerError(_without_index(folder))
    placed: dict[str, list[str]] = defaultdict(list)
    for name, shard in _weight_map(folder / INDEX).items():
        placed[shard].append(name)
    found: list[_Stored] = []
    for shard, names in sorted(placed.items()):
        path = folder / shard
        if not path.is_file():
            raise RealignerError(f"{path}: this shard is missing ({len(names)} tensors, {names[0]} among them); get it again")
        held = _header(path)
        lacking = sorted(set(names) - {tensor.name for tensor in held})
        if lacking:
            raise RealignerError(f"{path}: it lacks the tensor {lacking[0]}, which {INDEX} places there; {_AGAIN}")
        found += [tensor for tensor in held if tensor.name in set(names)]
    return found


def _without_index(folder: Path) -> str:
    shards = sorted(folder.glob("model-*-of-*.safetensors"))
    if shards:
        return f"{folder / INDEX}: it is missing, though there are shards ({shards[0].name}); get it again"
    if any(folder.glob("*.bin")):
        return f"{folder}: it has .bin files and no safetensors; load the host and save it again with save_pretrained"
    return f"{folder}: it has neither {SINGLE} nor {INDEX}; give a folder that save_pretrained wrote"


def _weight_map(path: Path) -> Mapping[str, str]:
    try:
        placed = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        inside = all(isinstance(shard, str) and Path(shard).name == shard for shard in placed.values())
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise RealignerError(f"{path}: it has no readable weight_map ({type(error).__name__}); {_AGAIN}") from error
    if not placed or not inside:
        raise RealignerError(f"{path}: its weight_map {'names files outside the folder' if placed else 'is empty'}; {_AGAIN}")
    return dict(placed)


def _header(path: Path) -> list[_Stored]:
    with _opened(path) as file:
        views = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return [_Stored(path, name, tuple(view.get_shape()), view.get_dtype()) for name, view in views.items()]


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        opened = safe_open(path, framework="pt", backend="pread")
    except (SafetensorError, OSError) as error:
        raise RealignerError(f"{path}: truncated or damaged ({_first_line(error)}); {_AGAIN}") from error
    with opened as file:
        yield file


@contextmanager
def _reading(path: Path, name: str) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise RealignerError(f"{path}: the tensor {name} cannot be read ({_first_line(error)}); {_AGAIN}") from error


def _placed(stored: list[_Stored], host: Any) -> tuple[dict[str, list[_Stored]], list[str]]:
    """The parts on disk of each of the host's parameters, and the names on disk that are none of its.

    Parts of one parameter are the experts of a mixture, which transformers stacks. What it makes of several tensors in any
    other way is left out of both.
    """
    transforms = get_model_conversion_mapping(host)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    stacking = {
        pattern
        for converter in converters
        if len(converter.source_patterns) == 1 and all(isinstance(step, MergeModulelist) for step in converter.operations)
        for pattern in converter.source_patterns
    }
    own, parameters = host.state_dict(), dict(host.named_parameters(remove_duplicate=False))
    parts: dict[str, list[_Stored]] = defaultdict(list)
    strangers = []
    for tensor in sorted(stored, key=lambda tensor: _natural(tensor.name)):
        bare = _unwrapped(tensor.name)
        name, pattern = rename_source_key(bare, renamings, converters, host.base_model_prefix, own)
        if bare in own and name not in own:
            name, pattern = bare, None
        if name in parameters and (pattern is None or pattern in stacking):
            parts[name].append(tensor)
        elif name not in own:
            strangers.append(tensor.name)
    _refuse_twins(parts, parameters)
    return dict(parts), strangers


def _refuse_twins(parts: Mapping[str, list[_Stored]], parameters: Mapping[str, torch.Tensor]) -> None:
    for name, tensors in parts.items():
        if len(tensors) > 1 and len(tensors[0].shape) == parameters[name].dim():
            first, second = (f"{tensor.name} in {tensor.path.name}" for tensor in tensors[:2])
            raise RealignerError(f"{tensors[0].path.parent}: {first} and {second} are both {name}; get the checkpoint again")


def _unwrapped(name: str) -> str:
    while wrapper := next((wrapper for wrapper in _WRAPPERS if name.startswith(wrapper)), ""):
        name = name.removeprefix(wrapper)
    return name


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts numbers in names as numbers: expert 10 after expert 9."""
    return [(int(piece), "") if piece.isdigit() else (-1, piece) for piece in re.split(r"(\d+)", name)]


def _cuts(shape: tuple[int, ...], axis: int) -> Iterator[tuple[slice, ...]]:
    """Slices that cover a tensor, whole along `axis`, of at most `_BLOCK` values where that can be."""
    size = math.prod(shape)
    cut = next((at for at, length in enumerate(shape) if at != axis and length > 1), None)
    if size <= _BLOCK or cut is None:
        yield tuple(slice(0, length) for length in shape)
        return
    step = max(1, _BLOCK * shape[cut] // size)
    for start in range(0, shape[cut], step):
        stop = min(start + step, shape[cut])
        for inner in _cuts((*shape[:cut], stop - start, *shape[cut + 1 :]), axis):
            yield (*inner[:cut], slice(start, stop), *inner[cut + 1 :])


def _block(values: torch.Tensor, axis: int) -> torch.Tensor:
    values = values.to("cpu", torch.float32)
    return values.movedim(axis, -1).reshape(-1, values.shape[axis])


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
