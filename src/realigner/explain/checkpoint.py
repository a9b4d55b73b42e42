"""The tensors of a host: in memory, or in the safetensors files of a checkpoint that is never loaded.

A checkpoint is opened by reading headers alone; a tensor is then read slice by slice with `pread`, not through a memory map
(whose pages would count as ours until the file is closed), so memory stays at two blocks whatever the host's size. Which
parameter a tensor becomes is left to transformers: `from_pretrained` is given tensors without values, which remember where they
are stored, and places them in a host on the meta device.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from realigner.errors import RealignerError
from realigner.files import expanded, read_object
from realigner.gguf_cache import quiet_transformers
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
_KEEPING = (torch.Tensor.__getitem__, torch.Tensor.to, torch.Tensor.detach, torch.Tensor.requires_grad_, torch.stack)


class HostTensors:
    """The tensors of a host in memory, by the names of its `named_parameters(remove_duplicate=False)`.

    Attributes:
        host: the host; of a `Checkpoint` it has names, shapes and ties, and no weights (meta device).
        example: a host of the same structure that can run: the host itself, or a tiny random one of its type.
        origin: the host's name: what it was loaded as, or its folder.

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
        """A parameter in float32 blocks ``[other, axis]`` of about 64 MB at most: `axis` last, all other axes flattened.

        Raises:
            RealignerError: for a tensor that is not in memory, or is quantised.
        """
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


class _Unread(torch.Tensor):
    """A tensor's shape, and as `parts` what is stored of it: itself, or what is stacked in it; empty if made in another way."""

    parts: tuple[_Stored, ...] = ()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]
        if isinstance(made, _Unread):
            parts = [part for given in tree_leaves(args) if isinstance(given, _Unread) for part in given.parts]
            whole = bool(parts) and tuple(made.shape) in (parts[0].shape, (len(parts), *parts[0].shape))
            made.parts = tuple(parts) if whole and func in _KEEPING else ()
        return made


class Checkpoint:
    """The tensors of a checkpoint on disk, under the names that its host gives them; made by `open_checkpoint`.

    Attributes:
        folder: the checkpoint's folder.
        config: its config as stored; for a multimodal host, the complete one, not only the text decoder's.
        host, origin: as of `HostTensors`.
    """

    def __init__(self, folder: Path, config: Any, host: Any, stored: list[_Stored]) -> None:
        self.folder, self.config, self.origin = folder, config, str(folder)
        unread: dict[str, torch.Tensor] = {}
        for tensor in stored:
            shaped = torch.empty(tensor.shape, device="meta").as_subclass(_Unread)
            shaped.parts = (tensor,)
            unread.setdefault(_unwrapped(tensor.name), shaped)
        try:
            with quiet_transformers():
                self.host, info = type(host).from_pretrained(
                    None,
                    config=host.config,
                    state_dict=unread,
                    device_map={"": "meta"},
                    ignore_mismatched_sizes=True,
                    output_loading_info=True,
                )
        except Exception as error:  # whatever a conversion raises
            raise RealignerError(f"{folder}: no host can be made of its tensors: {_first_line(error)}; {_AGAIN}") from error
        self._parameters = dict(self.host.named_parameters(remove_duplicate=False))
        self._strangers = sorted(info["unexpected_keys"])
        self._check(stored, info["mismatched_keys"])

    @cached_property
    def example(self) -> nn.Module:
        """A tiny random host of the same type and structure (see `example_host`)."""
        return example_host(self.config)

    def names(self) -> list[str]:
        """The parameters that are stored."""
        return [name for name in self._parameters if self._parts(name)]

    def shape(self, name: str) -> tuple[int, ...]:
        """A parameter's shape; raises RealignerError for a tensor that is in none of the files."""
        if not self._parts(name):
            hint = f" (and {self._strangers[0]} is none of this host's)" if self._strangers else ""
            raise RealignerError(f"{self.folder}: the tensor {name} is in none of its files{hint}; get the checkpoint whole")
        return tuple(self._parameters[name].shape)

    def blocks(self, name: str, axis: int) -> Iterator[torch.Tensor]:
        """As of `HostTensors`; raises RealignerError naming the file and the tensor when it cannot be read."""
        axis %= len(self.shape(name))
        parts = self._parts(name)
        stacked = len(parts[0].shape) < len(self.shape(name))
        if stacked and axis == 0:
            raise RealignerError(f"{self.folder}: {name} is kept in parts along axis 0 and cannot be read along it")
        for part in parts:
            with _opened(part.path, part.name) as file:
                view = file.get_slice(part.name)
                for cut in _cuts(part.shape, axis - stacked):
                    yield _block(view[cut], axis - stacked)

    def _parts(self, name: str) -> tuple[_Stored, ...]:
        return getattr(self._parameters[name], "parts", ())

    def _check(self, stored: list[_Stored], mismatched: Iterable[tuple[str, Any, Any]]) -> None:
        """Refuse tensors of other types and shapes than the host's, and two that are the same parameter."""
        placed = {self._bare(part.name): part for name in self._parameters for part in self._parts(name)}
        left = sorted(set(stored) - set(placed.values()), key=lambda part: part.name)
        for name, shape, wanted in mismatched:
            alike = {part: SequenceMatcher(None, part.name, name).ratio() for part in left}
            part = max(left, key=lambda part: (part.shape in (shape, shape[1:]), alike[part]))
            _refuse_quantised(part)
            raise RealignerError(f"{part.path}: {part.name} is {list(shape)}, but config.json makes {name} {list(wanted)}")
        for other in left:
            if twin := placed.get(self._bare(other.name)):
                first, second = (f"{part.name} in {part.path.name}" for part in (twin, other))
                raise RealignerError(f"{self.folder}: {first} and {second} are one parameter; get the checkpoint again")
        for part in placed.values():
            _refuse_quantised(part)

    def _bare(self, name: str) -> str:
        return _unwrapped(name).removeprefix(f"{self.host.base_model_prefix}.")


def _refuse_quantised(part: _Stored) -> None:
    if part.dtype not in _FLOATS:
        raise RealignerError(f"{part.path}: {part.name} is stored as {part.dtype}, quantised; use an unquantised checkpoint")


Tensors = HostTensors | Checkpoint


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
    folder = expanded(folder)
    if not (folder / "config.json").is_file():
        why = "the folder has no config.json" if folder.is_dir() else "there is no such folder"
        raise RealignerError(f"{folder}: {why}; give a folder that save_pretrained wrote")
    stored = _stored(folder)
    config = load_config(str(folder.resolve()))
    vars(config).pop("quantization_config", None)  # quantised tensors are refused by name, not loaded
    try:
        with torch.device("meta"):
            host = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # whatever its config makes it raise
        raise RealignerError(f"{folder / 'config.json'}: no host can be built of it: {_first_line(error)}") from error
    return Checkpoint(folder, config, host, stored)


def example_host(config: Any) -> nn.Module:
    """A tiny random host with a config's structure: its type and switches (tied head, parallel layers, biases), not its sizes.

    Copied from the config: strings, booleans, and values that are None or 0 where the type's default is not.

    Raises:
        RealignerError: where no such tiny host can be built.

    Example:
        >>> from transformers import LlamaConfig
        >>> example_host(LlamaConfig(hidden_size=4096, tie_word_embeddings=True)).lm_head.weight.shape
        torch.Size([101, 32])
    """
    found: dict[str, Any] = {}
    for own in (config.get_text_config(decoder=True), config):
        default = type(own)().to_dict()
        for name, value in own.to_dict().items():
            nothing = (value is None or (type(value) is int and value == 0)) and bool(default.get(name))
            if isinstance(value, bool) or (isinstance(value, str) and isinstance(default.get(name), str)) or nothing:
                found[name] = value
    switches = {name: value for name, value in found.items() if name not in _NO_SWITCHES and not name.endswith("_token_id")}
    try:
        host: nn.Module = tiny_host(config.model_type, **switches)
    except RealignerError:
        raise
    except Exception as error:  # as in open_checkpoint
        raise RealignerError(f"config.json: no tiny {config.model_type} of its structure: {_first_line(error)}") from error
    return host


def _stored(folder: Path) -> list[_Stored]:
    """Every tensor of a folder's safetensors files, from their headers."""
    single, index = folder / SINGLE, folder / INDEX
    if single.is_file():
        return _header(single)
    if not index.is_file():
        if shards := sorted(folder.glob("model-*-of-*.safetensors")):
            raise RealignerError(f"{index}: it is missing, though there are shards ({shards[0].name}); download it again")
        if any(folder.glob("*.bin")):
            why = "it has .bin files and no safetensors; load the host and save it again with save_pretrained"
            raise RealignerError(f"{folder}: {why}")
        raise RealignerError(f"{folder}: it has neither {SINGLE} nor {INDEX}; give a folder that save_pretrained wrote")
    placed: dict[str, list[str]] = defaultdict(list)
    try:
        for name, shard in read_object(index)["weight_map"].items():
            placed[shard].append(name)
        inside = all(Path(shard).name == shard for shard in placed)
    except (RealignerError, TypeError, KeyError, AttributeError, ValueError) as error:
        why = str(error) if isinstance(error, RealignerError) else type(error).__name__
        raise RealignerError(f"{index}: it has no readable weight_map ({why}); {_AGAIN}") from error
    if not placed or not inside:
        raise RealignerError(f"{index}: its weight_map {'names files outside the folder' if placed else 'is empty'}; {_AGAIN}")
    found: list[_Stored] = []
    for shard, names in sorted(placed.items()):
        path = folder / shard
        if not path.is_file():
            raise RealignerError(
                f"{path}: this shard is missing ({len(names)} tensors, {names[0]} among them); download it again"
            )
        held = {tensor.name: tensor for tensor in _header(path)}
        if lacking := sorted(set(names) - set(held)):
            raise RealignerError(f"{path}: it lacks the tensor {lacking[0]}, which {INDEX} places there; {_AGAIN}")
        found += [held[name] for name in names]
    return found


def _header(path: Path) -> list[_Stored]:
    with _opened(path) as file:
        views = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return [_Stored(path, name, tuple(view.get_shape()), view.get_dtype()) for name, view in views.items()]


@contextmanager
def _opened(path: Path, name: str = "") -> Iterator[Any]:
    """A file of tensors, of which one (`name`) or the header alone is read."""
    try:
        with safe_open(path, framework="pt", backend="pread") as file:
            yield file
    except (SafetensorError, OSError) as error:
        which = f", the tensor {name} cannot be read" if name else ""
        raise RealignerError(f"{path}: truncated or damaged{which} ({_first_line(error)}); {_AGAIN}") from error


def _unwrapped(name: str) -> str:
    while wrapper := next((wrapper for wrapper in _WRAPPERS if name.startswith(wrapper)), ""):
        name = name.removeprefix(wrapper)
    return name


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
