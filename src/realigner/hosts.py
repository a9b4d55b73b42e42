"""Load a frozen host and its tokenizer.

A host is named by the embedded default (`EMBEDDED`), a folder, a ``.gguf`` file, or an id on the Hugging Face hub. Hosts
come back frozen and in eval mode. Nothing from a host's repository is executed unless `trust_remote_code` is asked for.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from realigner.errors import RealignerError, UsageError
from realigner.files import expanded, read_object
from realigner.gguf_cache import (
    EMBEDDED as EMBEDDED,
    EMBEDDED_INSTALL as EMBEDDED_INSTALL,
    cache_root as cache_root,
    embedded_folder as embedded_folder,
    embedded_gguf as embedded_gguf,
    gguf_folder,
    quiet_transformers,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_DEEPEST = 10_000  # layers
_NUMBERS = (  # and true or false, of a generation config
    *(
        "max_length",
        "max_new_tokens",
        "min_length",
        "min_new_tokens",
        "num_beams",
        "num_return_sequences",
        "repetition_penalty",
    ),
    *("temperature", "top_k", "top_p", "min_p", "typical_p", "length_penalty", "no_repeat_ngram_size", "max_time"),
    *("do_sample", "use_cache", "output_attentions", "output_hidden_states", "output_scores", "output_logits"),
    *("return_dict_in_generate", "remove_invalid_values", "renormalize_logits"),
)
_LARGEST = 256 << 20  # bytes of a config, a tokenizer, a chat template
_MOVED = "if it was moved, pass host=... (any folder, file or hub id with the same weights; it is checked)"


@dataclass(frozen=True)
class HostInfo:
    """How a host was loaded; `load_host` stores it on the host as `host.realigner`.

    Attributes:
        name: the name with which `load_host` loads the same host again, from any working directory.
        tokenizer: the host's tokenizer, prepared for batches.
    """

    name: str
    tokenizer: PreTrainedTokenizerBase


def load_host(
    name: str = EMBEDDED,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    revision: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a host, frozen and in eval mode, and its tokenizer (with a pad token, padding on the left).

    Args:
        name: `EMBEDDED`, a folder, a ``.gguf`` file or a hub id.
        dtype: ``"float32"``, ``"bfloat16"``, ``"float16"``, or ``"auto"``: bfloat16 where this device multiplies it fast,
            else float32.
        device: a torch device name; ``"auto"``: the accelerator if there is one (under torchrun, this process's own), else the
            CPU; ``"balanced"``: the layers spread over all devices (Accelerate's ``device_map``).
        trust_remote_code: allow code from the host's repository to run. Off unless asked for.
        revision: a hub revision.
        tokenizer: the host's, if it is loaded already.

    Raises:
        RealignerError: when there is no such host; the message names the command that downloads it.
        UsageError: for an unknown dtype or device.

    Example:
        >>> host, tokenizer = load_host("smollm2-135m-instruct")  # doctest: +SKIP
    """
    spread = device == "balanced"
    torch_device = resolve_device("auto" if spread else device)
    torch_dtype = resolve_dtype(dtype, torch_device)
    name, source, options = _source(name, trust_remote_code, revision)
    if spread:
        options["device_map"] = "balanced"
    with _loading(name):
        config = AutoConfig.from_pretrained(source, **{key: value for key, value in options.items() if key != "device_map"})
        _check_depth(name, config)
        tokenizer = tokenizer or _tokenizer(name, source, options)
        host, found = AutoModelForCausalLM.from_pretrained(source, dtype=torch_dtype, output_loading_info=True, **options)
        _check_loaded(name, host, found)
        if not spread:
            host = cast(PreTrainedModel, host.to(torch_device))
        host.eval().requires_grad_(False)
        _prepare_tokenizer(tokenizer, host)
    host.realigner = HostInfo(name, tokenizer)
    return host, tokenizer


def load_tokenizer(
    name: str = EMBEDDED, trust_remote_code: bool = False, revision: str | None = None
) -> PreTrainedTokenizerBase:
    """Load only the tokenizer, unmodified.

    Raises:
        RealignerError: when there is no such host.
    """
    name, source, options = _source(name, trust_remote_code, revision)
    with _loading(name):
        return _tokenizer(name, source, options)


def _tokenizer(name: str, source: str, options: dict[str, Any]) -> PreTrainedTokenizerBase:
    tokenizer = cast(PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(source, **options))
    if not isinstance(most := tokenizer.model_max_length, (int, float)):
        raise RealignerError(f"host {name}: its tokenizer_config.json says model_max_length {most!r}, which is no number")
    return tokenizer


def load_config(name: str = EMBEDDED, trust_remote_code: bool = False, revision: str | None = None) -> Any:
    """Load only the config: numbers of layers, hidden size, positions.

    Raises:
        RealignerError: when there is no such host.
    """
    name, source, options = _source(name, trust_remote_code, revision)
    with _loading(name):
        return AutoConfig.from_pretrained(source, **options)


@contextmanager
def _loading(name: str) -> Iterator[None]:
    """Load quietly; a damaged host can make its parsers raise anything, which becomes one line."""
    try:
        with quiet_transformers():
            yield
    except (RealignerError, MemoryError, torch.OutOfMemoryError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # a panic of tokenizers, which is written in Rust, is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise RealignerError(_why_not(name, error)) from error


def _source(name: str, trust_remote_code: bool, revision: str | None) -> tuple[str, str, dict[str, Any]]:
    """A host's name that holds in every working directory, where transformers finds it, and the options that takes."""
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    path = Path(os.path.abspath(expanded(name)))  # noqa: PTH100 - a link keeps its name
    if name.lower() == EMBEDDED:
        return EMBEDDED, str(embedded_folder()), options
    if name.endswith(".gguf"):
        if not path.is_file():
            raise RealignerError(f"host {name}: there is no such file; {_MOVED}")
        with _loading(name):
            return str(path), str(gguf_folder(path)), options
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise RealignerError(f"host {name}: the folder has no config.json; give a folder save_pretrained wrote")
        for file in path.iterdir():  # what transformers reads whole
            if file.suffix in (".json", ".jinja", ".txt") and file.is_file() and file.stat().st_size > _LARGEST:
                raise RealignerError(f"host {name}: {file.name} is larger than {_LARGEST >> 20} MiB; download it again")
        return _own_name(str(path)), str(path), options
    if name.startswith(("/", "./", "../", "~")) or name.count("/") > 1:
        raise RealignerError(f"host {name}: there is no such folder; {_MOVED}")
    return name, name, options | {"revision": revision}


def folder_of(name: str) -> str:
    """The path or hub id by which transformers finds a host; for the embedded host, its cache folder (created if necessary).

    Example:
        >>> folder_of("org/model")
        'org/model'
    """
    try:
        return str(embedded_folder()) if name == EMBEDDED else name
    except RealignerError:  # not installed here, which matters only to whoever loads it
        return name


def resolve_device(device: str) -> torch.device:
    """The torch device for a name; ``"auto"`` takes the accelerator if there is one.

    Raises:
        UsageError: for a device that is not here, and for Apple's MPS, whose lack of float64 the proof of sites cannot do with.
    """
    if device == "auto":
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        accelerator = None if accelerator is None or accelerator.type == "mps" else accelerator
        if accelerator is not None and "LOCAL_RANK" in os.environ:
            return torch.device(accelerator.type, int(os.environ["LOCAL_RANK"]))
        return accelerator or torch.device("cpu")
    if device.partition(":")[0] == "mps":
        raise UsageError("device: mps has no float64, which the proof of a host's sites needs; use cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UsageError(
            f"device: {device!r} is unknown or not available here; use auto, balanced, cpu, cuda, cuda:1, ..."
        ) from None


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The torch dtype for a name; ``"auto"`` is bfloat16 where this device multiplies it faster than float32, else float32."""
    if dtype != "auto":
        if dtype not in DTYPES:
            raise UsageError(f"dtype: unknown dtype {dtype!r}; use auto, {', '.join(DTYPES)}")
        return DTYPES[dtype]
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        # A training step in bfloat16 and in float32, with AVX512-BF16 and without AMX: on an AMD EPYC 3.9 s and 6.2 s, on an
        # Intel Xeon 6.0 s and 3.3 s. Only AMD's CPUs have SSE4a.
        cpu = torch.cpu.get_capabilities()
        fast = device.type == "cpu" and (cpu.get("amx_bf16") or (cpu.get("avx512_bf16") and cpu.get("sse4a")))
    return torch.bfloat16 if fast else torch.float32


def has_slow_bfloat16(device: torch.device) -> bool:
    """Whether PyTorch multiplies bfloat16 in plain loops there, as on x86 CPUs without AVX-512: on an AMD EPYC of 2021 60 times
    as slow as float32.
    """
    cpu = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return bool(cpu.get("avx2")) and not cpu.get("avx512_f")


def host_name(host: nn.Module) -> str:
    """The name with which `load_host` loads this host again; paths are absolute. Empty for a host built from a config."""
    info = getattr(host, "realigner", None)
    if isinstance(info, HostInfo):
        return info.name
    name = str(getattr(host, "name_or_path", "") or "")
    return _own_name(os.path.abspath(name)) if name and Path(name).exists() else name  # noqa: PTH100


def _own_name(path: str) -> str:
    return EMBEDDED if Path(path) == cache_root().absolute() / "hosts" / EMBEDDED else path


def text_config(host: nn.Module) -> Any:
    """The config of the host's text decoder (multimodal hosts nest it inside their own)."""
    config = getattr(host, "config", None)
    if config is None:
        raise RealignerError(f"{type(host).__name__} is not a transformers model: it has no config")
    return config.get_text_config(decoder=True)


def positions_of(config: Any) -> int | None:
    """The most positions that a host's config gives it, or None: some give no limit, or -1."""
    positions = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 0 else None


def _prepare_tokenizer(tokenizer: PreTrainedTokenizerBase, host: PreTrainedModel) -> None:
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    tokenizer.padding_side = "left"
    if host.generation_config is not None and host.generation_config.pad_token_id is None:
        host.generation_config.pad_token_id = tokenizer.pad_token_id


def _check_depth(name: str, config: Any) -> None:
    """Raise for a number of layers that no host has, before they are made."""
    depth = getattr(config.get_text_config(decoder=True), "num_hidden_layers", None)
    if depth is not None and not 0 < depth <= _DEEPEST:
        raise RealignerError(f"host {name}: its config.json says num_hidden_layers {depth}; from 1 to {_DEEPEST} are loaded")


def _check_loaded(name: str, host: PreTrainedModel, found: dict[str, Any]) -> None:
    """Raise where transformers made up weights, or could not generate by the config that it has read."""
    if (missing := sorted(found["missing_keys"])) and getattr(host, "hf_quantizer", None) is None:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise RealignerError(f"host {name}: its weights lack {missing[0]}{more}; download it again")
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(host.generation_config, key, None)
        for number in value if isinstance(value, list) else () if value is None else (value,):
            if type(number) is not int or not -1 <= number < 2**31:
                raise RealignerError(f"host {name}: its generation_config.json says {key} {value!r}, which is no token")
    for key in _NUMBERS:
        value = getattr(host.generation_config, key, None)
        if not isinstance(value, (int, float, type(None))):
            raise RealignerError(f"host {name}: its generation_config.json says {key} {value!r}, which is no number")


def _damage(folder: Path) -> str:
    """The first file of a host that is damaged in itself, and how; empty when each is well-formed."""
    for path in sorted([*folder.glob("*.json"), *folder.glob("*.safetensors")]):
        try:
            if path.suffix == ".json":
                read_object(path)
            else:
                with safe_open(path, framework="pt"):
                    pass
        except RealignerError as error:
            return str(error)
        except (SafetensorError, OSError) as error:
            return f"{path}: truncated or damaged ({error})"
    return ""


def _why_not(name: str, error: BaseException) -> str:
    if Path(name).is_dir() and (damage := _damage(Path(name))):
        return f"host {name}: cannot be loaded: {damage}; get that file again"
    first = " ".join(str(error).split())[:300]
    if not first or isinstance(error, (AttributeError, KeyError, IndexError, TypeError, RecursionError)):
        first = f"{type(error).__name__} {first}".strip() + "; are its JSON files as they were made?"
    if "trust_remote_code" in str(error):
        return f"host {name}: it needs code from its own repository; if you trust it, pass trust_remote_code=True"
    if isinstance(error, OSError) and not Path(name).exists():
        return f"host {name}: not found here or on the hub; try: hf download {name}   (or use {EMBEDDED}) [{first}]"
    return f"host {name}: cannot be loaded: {first}"
