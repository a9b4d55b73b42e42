"""Which host an IRM belongs to, told by what the IRM depends on: the weights of the decoder's layers.

Names are relative to the list of layers, and embeddings, head and everything around the layers is left out. So a host is the
same in any precision, quantised or not, as a text-only, multimodal or classification class, compiled, with LoRA inside, with a
resized vocabulary and from another folder. What is compared are samples of the weights:

- vectors (gains of norms, biases; quantisers leave them alone) and matrices in full precision within bfloat16's rounding,
- a quantised matrix by the signs of its weights: a quantised weight keeps its sign or is 0, and those of another checkpoint
  agree in one half of the places. What cannot be read (packed for a kernel, on disk, sharded) counts neither way.
"""

from __future__ import annotations

import hashlib
import math
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from realigner.errors import RealignerError
from realigner.hosts import host_name, text_config
from realigner.locate import find_layers

_MATRICES, _VECTORS = 256, 128  # weights sampled of each
_DEQUANTISED = 64  # matrices at most that are dequantised as a whole to read them
_UNKNOWN = math.nan
_WRAPPERS = {"_orig_mod", "base_layer", "original_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_PACKED = {"qweight", "W_q", "weight_packed"}  # GPTQ and AWQ, HQQ, compressed-tensors
_NAMES_DIFFER = "its tensors have other names or shapes"


@dataclass(frozen=True)
class Fingerprint:
    """Which host an adapter was made for (see the module's docstring).

    Attributes:
        architecture: the model class, e.g. ``LlamaForCausalLM``; compared in version 1 only.
        hidden_size, num_layers: the host's sizes.
        headers: sha256 over the sorted names and shapes of the layers' weights, as they are in full precision.
        samples: up to 256 weights of matrices: for each matrix a key (6 hex digits) and weights in bfloat16 (4 digits each).
        vectors: the same for up to 128 weights of vectors.
        quantised: whether a matrix is quantised; then `samples` holds signs, and names may be missing.
        name: what it was loaded as; not compared.
        model_type: the decoder's type, e.g. ``llama``; one must be a prefix of the other (``qwen2`` and ``qwen2_vl_text``).
        version: 1 for fingerprints of the whole model, as adapters made before version 2 have them.
        vocab_size: version 1 only.
    """

    architecture: str
    hidden_size: int
    num_layers: int
    headers: str
    samples: str
    vectors: str = ""
    quantised: bool = False
    name: str = ""
    model_type: str = ""
    version: int = 1
    vocab_size: int | None = None
    _host: weakref.ref[nn.Module] | None = field(default=None, repr=False, compare=False)  # to compare version 1

    def to_dict(self) -> dict[str, Any]:
        """The fingerprint as JSON values."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name[0] != "_"}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Fingerprint:
        """Read what `to_dict` wrote; raises RealignerError naming a key that is missing, unknown or of another type."""
        known = {f.name: f for f in fields(cls) if f.name[0] != "_"}
        if unknown := sorted(map(str, values.keys() - known.keys())):
            raise RealignerError(f"host fingerprint: unknown key {unknown[0]!r}")
        for name, f in known.items():
            if name not in values and f.default is MISSING:
                raise RealignerError(f"host fingerprint: {name!r} is missing")
            kind = {"str": str, "int": int, "bool": bool}[f.type.partition(" ")[0]]  # the annotation, a text
            if name in values and type(values[name]) is not kind and not (values[name] is None and "None" in f.type):
                raise RealignerError(f"host fingerprint: {name} is not of type {kind.__name__}")
        found = cls(**values)
        if found.version not in (1, 2):
            raise RealignerError(f"host fingerprint: version {found.version!r} is unknown; it may come from a newer realigner")
        return found

    def __reduce__(self) -> tuple[Any, ...]:
        return Fingerprint.from_dict, (self.to_dict(),)

    def __deepcopy__(self, memo: dict[int, Any]) -> Fingerprint:
        return self

    def difference(self, other: Fingerprint) -> str | None:
        """The first thing in which the two hosts differ, as a sentence on `other`; None when they are the same host."""
        for key in ("hidden_size", "num_layers"):
            mine, theirs = getattr(self, key), getattr(other, key)
            if mine != theirs:
                return f"{key} is {theirs}, not {mine}"
        if self.version == 1 or other.version == 1:
            return _difference_1(self, other)
        types = sorted((str(self.model_type), str(other.model_type)), key=len)
        if not types[1].startswith(types[0].removesuffix("_text")):
            return f"the decoder is of type {other.model_type}, not {self.model_type}"
        by_sign = self.quantised or other.quantised
        if self.headers != other.headers and not by_sign:
            return _NAMES_DIFFER
        pairs = []
        for mine, theirs in ((self.vectors, other.vectors), (self.samples, other.samples)):
            a, b = decode_samples(mine), decode_samples(theirs)
            both = a.keys() & b.keys()
            if 4 * len(both) < 3 * min(len(a), len(b)):
                return _NAMES_DIFFER
            values = [pair for key in both for pair in zip(a[key], b[key], strict=False)]
            pairs.append(torch.tensor(values).reshape(-1, 2).T)
        return off(*pairs[0]) or (off_in_sign(*pairs[1]) if by_sign else off(*pairs[1]))


def fingerprint(host: nn.Module, layers: nn.Module | None = None) -> Fingerprint:
    """Which host this is (see `Fingerprint`); reads a few hundred numbers, so it is quick at any size.

    Args:
        host: a transformers model, with adapters in it or not.
        layers: the list of its decoder layers, if known; else `find_layers` finds it.

    Example:
        >>> from realigner.tiny import tiny_host
        >>> host = tiny_host("llama")
        >>> fingerprint(host).difference(fingerprint(host.bfloat16())) is None
        True
    """
    config = text_config(host)
    unwrap = getattr(host, "get_base_model", None)
    host = unwrap() if callable(unwrap) else host
    host = getattr(host, "_orig_mod", host)
    if layers is None:
        try:
            layers = find_layers(host)[1]
        except RealignerError:  # a host that no IRM can be attached to still has an identity
            layers = host
    weights = list(_weights(layers))
    # AWQ and its kind move scales from a matrix into the norm before it.
    moved = any(_stored_names(w.module) & _PACKED and not hasattr(w.module, "g_idx") for w in weights)
    return Fingerprint(
        architecture=type(host).__name__,
        hidden_size=int(getattr(config, "hidden_size", 0)),  # a few types have no such number of their own
        num_layers=int(getattr(config, "num_hidden_layers", 0)),
        headers=_headers((w.name, w.shape) for w in weights),
        samples=_sample([w for w in weights if len(w.shape) > 1], _MATRICES),
        vectors="" if moved else _sample([w for w in weights if len(w.shape) < 2], _VECTORS),
        quantised=any(w.quantised for w in weights),
        name=host_name(host),
        model_type=str(getattr(config, "model_type", "")),
        version=2,
        _host=weakref.ref(host),
    )


def tensors_hash(tensors: Mapping[str, torch.Tensor]) -> str:
    """sha256 over named tensors, bit by bit; of those not in memory (on disk) only name, dtype and shape count.

    Example:
        >>> tensors_hash({"a": torch.zeros(2)}) == tensors_hash({"a": torch.tensor([0.0, -0.0])})
        False
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        if tensor.device.type != "meta":
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def weights_hash(host: nn.Module) -> str:
    """`tensors_hash` of every parameter and buffer of the host; the same before and after training."""
    return tensors_hash(host.state_dict())


# --- the weights of a module, whatever became of them -----------------------------------------------------------------------


@dataclass(frozen=True)
class _Weight:
    """A weight by the name and shape that it has in the plain model; a linear layer's is [out, in]."""

    name: str
    shape: list[int]
    module: nn.Module
    stored: torch.Tensor | None  # as the module keeps it; None where we cannot read that
    quantised: bool = False

    def values(self, places: Sequence[int], dequantise: bool = True) -> list[float]:
        """The weights at flat places; of a quantised one -1 or 1, NaN where it is unknown."""
        tensor = self.stored
        if tensor is None or tensor.device.type == "meta" or tensor.numel() == 0:
            return [_UNKNOWN] * len(places)
        at = [tuple(int(i) for i in torch.unravel_index(torch.tensor(place), self.shape)) for place in places]
        if isinstance(self.module, Conv1D) and len(self.shape) == 2:
            at = [index[::-1] for index in at]
        with torch.no_grad():
            if not self.quantised:
                plain = type(tensor) in (torch.Tensor, nn.Parameter)  # else sharded
                return [float(tensor.detach()[index]) if plain else _UNKNOWN for index in at]
            if (state := getattr(tensor, "quant_state", None)) is not None:  # bitsandbytes, 4 bits: two weights a byte
                data, for_cpu = tensor.data.view(torch.uint8).flatten(), getattr(state, "packing_format_for_cpu", False)
                codes = [_code_for_cpu(data, place, self.shape[1]) if for_cpu else _code(data, place) for place in places]
                return [_sign(state.code[code]) for code in codes]
            if type(tensor).__name__ == "Int8Params" or _is_float8(tensor):
                return [_sign(tensor.data[index]) for index in at]
            if not dequantise:
                return [_UNKNOWN] * len(places)
            try:
                dense = tensor.dequantize().detach()
            except Exception:  # a kind of tensor of a quantiser's own can raise anything
                return [_UNKNOWN] * len(places)
            # With a zero point, a weight near 0 can change its sign.
            small = float(dense.abs().mean()) / 2
            return [_sign(dense[index]) if abs(float(dense[index])) > small else _UNKNOWN for index in at]


def _code(data: torch.Tensor, place: int) -> int:
    """The 4 bits of a weight as bitsandbytes packs them."""
    return int(data[place // 2]) >> (0 if place % 2 else 4) & 15


def _code_for_cpu(data: torch.Tensor, place: int, columns: int) -> int:
    """The same once a forward has packed them anew for a CPU with AVX512: in blocks of 32 rows and 2 columns."""
    row, column = divmod(place, columns)
    within = 2 * (row % 32) + column % 2
    byte = 32 * (row // 32 * (columns // 2) + column // 2) + within % 32
    return int(data[byte]) >> (4 if within >= 32 else 0) & 15


def _weights(root: nn.Module) -> Iterator[_Weight]:
    """The weights of the modules under `root`, in full precision or not; adapters (LoRA) in them are left out."""
    adapters = {
        id(part)
        for module in root.modules()
        for name in (*getattr(module, "adapter_layer_names", ()), *getattr(module, "other_param_names", ()))
        if isinstance(held := getattr(module, name, None), nn.Module)
        for part in held.modules()
    }
    for path, module in root.named_modules():
        if id(module) in adapters:
            continue
        prefix = "".join(f"{part}." for part in path.split(".") if part and part not in _WRAPPERS)
        own = dict(module.named_parameters(recurse=False))
        names = _stored_names(module)
        quantised = {name for name, tensor in own.items() if _is_quantised(tensor)}
        if not quantised and not names & _PACKED:
            for name, tensor in own.items():
                shape = list(getattr(tensor, "ds_shape", tensor.shape))  # ZeRO-3 keeps the shape of what it took away
                yield _Weight(prefix + name, shape[::-1] if isinstance(module, Conv1D) else shape, module, tensor)
            continue
        rows = getattr(module, "out_features", getattr(module, "outfeatures", None))
        columns = getattr(module, "in_features", getattr(module, "infeatures", None))
        if rows is not None and columns is not None:
            yield _Weight(f"{prefix}weight", [int(rows), int(columns)], module, own.get("weight"), True)
            quantised.discard("weight")
        for name in sorted(quantised):
            if own[name].dtype in _FLOATS or _is_float8(own[name]):  # else packed: its shape tells nothing
                yield _Weight(prefix + name, list(own[name].shape), module, own[name], True)
        # Some quantisers give every layer a bias of zeros.
        if isinstance(bias := getattr(module, "bias", None), torch.Tensor) and (bias.is_meta or bool(bias.any())):
            yield _Weight(f"{prefix}bias", list(bias.shape), module, bias)


def _stored_names(module: nn.Module) -> set[str]:
    return {*module._parameters, *module._buffers}


def _is_quantised(tensor: torch.Tensor) -> bool:
    if tensor.dtype not in _FLOATS:
        return True
    return type(tensor) not in (torch.Tensor, nn.Parameter) and type(tensor).__name__ != "DTensor"


def _is_float8(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() and tensor.element_size() == 1 and type(tensor) in (torch.Tensor, nn.Parameter)


def _sign(value: Any) -> float:
    number = float(value)
    return math.copysign(1.0, number) if number else _UNKNOWN


# --- samples ------------------------------------------------------------------------------------------------------------------


def _headers(named: Iterable[tuple[str, list[int]]]) -> str:
    return hashlib.sha256("\n".join(f"{name} {shape}" for name, shape in sorted(named)).encode()).hexdigest()


def _sample(weights: Sequence[_Weight], count: int) -> str:
    """`count` weights, each by a hash of its tensor's name and shape: what two hosts have in common has the same places.

    Experts are left out: whether they are one tensor or many depends on the quantiser.
    """

    own = [w for w in weights if math.prod(w.shape) and "experts" not in w.name.split(".")]
    chosen = sorted(own or weights, key=lambda w: _digest(f"{w.name} {w.shape}"))[:count]
    each, groups = max(1, count // max(1, len(chosen))), []
    for number, weight in enumerate(chosen):
        places = places_of(weight.name, math.prod(weight.shape), each)
        values = torch.tensor(weight.values(places, number < _DEQUANTISED)).bfloat16().view(torch.int16).tolist()
        groups.append(sample_key(weight.name, weight.shape) + "".join(f"{value & 0xFFFF:04x}" for value in values))
    return ".".join(groups)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def sample_key(name: str, shape: list[int]) -> str:
    """By which a weight goes in a fingerprint: 6 hex digits of its name (from the list of layers on) and shape."""
    return _digest(f"{name} {shape}")[:6]


def places_of(name: str, size: int, count: int) -> list[int]:
    """The flat places at which a weight of `size` numbers is sampled."""
    return [int(_digest(f"{name} {n}")[:14], 16) % size for n in range(count)]


def decode_samples(text: str) -> dict[str, list[float]]:
    """Key -> weights, as `_sample` wrote them."""
    return {group[:6]: _numbers(group[6:]) for group in str(text).split(".") if group}


def _numbers(text: str) -> list[float]:
    try:
        values = [int(text[i : i + 4], 16) for i in range(0, len(text), 4)]
        return torch.tensor(values, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).tolist()
    except (ValueError, TypeError, RuntimeError):
        raise RealignerError("host fingerprint: samples is not hex") from None


def off(a: torch.Tensor, b: torch.Tensor) -> str | None:
    """Whether weights in full precision differ by more than the rounding to float16 and bfloat16."""
    known = ~(a.isnan() | b.isnan())
    # Rounded twice (float16, then bfloat16) a weight can end one bfloat16 step away, 2^-7 of it at most; that happens to
    # 1 in 16. Other weights are further off, or off by a step far more often. Near 0 float16 has steps of 6e-8.
    off = (a != b) & known & ((a - b).abs() > 6e-8)
    far = off & ((a - b).abs() > 2.0**-7 * torch.maximum(a.abs(), b.abs()) + 6e-8)
    if bool(far.any()) or int(off.sum()) > 2 + 0.15 * int(known.sum()):
        return f"{int(off.sum())} of {int(known.sum())} sampled weights differ (same shape, other weights)"
    return None


def off_in_sign(a: torch.Tensor, b: torch.Tensor) -> str | None:
    """Whether signs agree too seldom: they do in 90% or more on the same host, in one half on another."""
    known = ~(a.isnan() | b.isnan() | (a == 0) | (b == 0))
    off = known & (a.sign() != b.sign())
    if int(off.sum()) > 0.25 * int(known.sum()):
        return f"{int(off.sum())} of {int(known.sum())} sampled weights have another sign (same shape, other weights)"
    return None


# --- version 1 ----------------------------------------------------------------------------------------------------------------

_PREFIXES = ("model", "transformer", "model.language_model", "model.decoder", "language_model.model")


def _difference_1(saved: Fingerprint, found: Fingerprint) -> str | None:
    """`difference` for what older releases saved: names, shapes and samples of the whole model but its head.

    Such a fingerprint is made of the host at hand, as it would have been in each form that the saved one can have had.
    """
    if saved.version != 1:
        return _difference_1(found, saved)
    type_name = found.model_type.removesuffix("_text").replace("_", "")
    if saved.architecture != found.architecture and not saved.architecture.lower().startswith(type_name):
        return f"architecture is {found.architecture}, not {saved.architecture}"
    samples = torch.tensor(_numbers(saved.samples))
    host = None if found._host is None else found._host()
    if host is None:
        return "it cannot be compared: fingerprints of version 1 are compared with a host in memory"
    for named in _forms_1(host, saved.vocab_size):
        if _headers((name, weight.shape) for name, weight in named) != saved.headers:
            continue
        chosen = named if len(named) <= 256 else [named[i * len(named) // 256] for i in range(256)]
        read: list[float] = []
        for name, weight in chosen:
            place = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big") % max(1, math.prod(weight.shape))
            gone = weight.stored is not None and not weight.quantised and place >= weight.stored.numel()
            read.append(_UNKNOWN if gone else weight.values([place], len(read) < _DEQUANTISED)[0])
        by_sign = torch.tensor([weight.quantised for _, weight in chosen])
        if len(samples) == len(read):
            values = torch.tensor(read).bfloat16().float()
            return off(samples[~by_sign], values[~by_sign]) or off_in_sign(samples[by_sign], values[by_sign])
    return _NAMES_DIFFER


def _forms_1(host: nn.Module, vocab_size: int | None) -> Iterator[list[tuple[str, _Weight]]]:
    """The host's weights by name, sorted: under its own names and as a text-only class; plain, and packed in 4 bits."""
    body, head = (getattr(host, f"get_{side}_embeddings", lambda: None)() for side in ("input", "output"))
    left_out = {id(p) for p in head.parameters()} if isinstance(head, nn.Module) else set()
    left_out -= {id(p) for p in body.parameters()} if isinstance(body, nn.Module) else set()
    extra = int(vocab_size or 0) - int(text_config(host).vocab_size)
    weights = []
    for weight in _weights(host):
        if weight.stored is None or id(weight.stored) not in left_out:
            left_out.add(id(weight.stored))  # tied weights count once
            if isinstance(weight.module, Conv1D):  # as it was stored
                weight = replace(weight, shape=weight.shape[::-1], module=host)
            elif weight.module is body:
                weight = replace(weight, shape=[weight.shape[0] + extra, *weight.shape[1:]])
            weights.append(weight)
    for prefix in (None, "", *_PREFIXES):  # "": without what is not the decoder's, a classifier's own head
        named = [(w.name, w) for w in weights]
        if prefix is not None:
            own = find_layers(host)[2].rpartition(".")[0]
            named = [((prefix or own) + w.name.removeprefix(own), w) for w in weights if w.name.startswith(f"{own}.")]
        named.sort(key=lambda pair: pair[0])
        yield named
        yield [(name, _in_4_bits(weight)) for name, weight in named]


def _in_4_bits(weight: _Weight) -> _Weight:
    """As bitsandbytes packs a linear layer's weight, which version 1 did not read."""
    linear = isinstance(weight.module, nn.Linear) and len(weight.shape) == 2
    return replace(weight, shape=[math.prod(weight.shape) // 2, 1], stored=None) if linear else weight
