"""Copies of a host with one thing changed, as plain transformers models, for causal tests of an index.

Every edit works on a deep copy, in weights only, and is verified by a forward before the copy is returned: a permuted host has
the host's logits; a removed channel is 0 at every layer's input and output. Edits that cannot be exact are refused.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import realigner.probe as probe
from realigner.errors import RealignerError, UsageError
from realigner.explain.roles import Stream, find_stream, short_input
from realigner.files import NEVER, expanded, taken
from realigner.hosts import HostInfo

_TOKENS = 24
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}  # of the largest logit; else _HALF
_HALF = 0.15  # rounding, amplified from layer to layer
_IN_FLOAT64, _IN_FLOAT32 = 300_000_000, 2_000_000_000  # hosts of no more parameters are compared in that precision


def permuted(host: PreTrainedModel, permutation: Sequence[int]) -> PreTrainedModel:
    """A host that computes the same function with its residual stream permuted: index i becomes ``permutation[i]``.

    In every parameter with a role ``new[..., permutation[i]] = old[..., i]`` along the stream's axis; tied weights stay tied,
    and the inverse permutation gives the weights back bit for bit.

    Raises:
        UsageError: when it is no permutation of the host's stream.
        RealignerError: as `roles_of`; or when the logits of a short input are not the host's: its indices are not alike. Hosts
            of up to 3e8 parameters are compared in float64 (to 1e-10 of the largest logit), others in float32 (1e-5), those of
            half precision and more than 2e9 parameters in that (0.15, which finds gross mistakes only).

    Example:
        >>> from realigner.tiny import tiny_host
        >>> other = permuted(tiny_host("llama"), list(range(32))[::-1])
        >>> torch.equal(other.model.norm.weight, tiny_host("llama").model.norm.weight.flip(0))
        True
    """
    stream = _stream_of(host)
    order = torch.tensor([int(new) for new in permutation])
    if sorted(order.tolist()) != list(range(stream.sites.width)):
        raise UsageError(f"permutation: not an order of the host's {stream.sites.width} indices 0 to {stream.sites.width - 1}")
    for name in stream.buffers:
        owner, _, leaf = name.rpartition(".")
        if leaf in host.get_submodule(owner)._non_persistent_buffers_set:  # its permutation would not be saved
            raise RealignerError(f"{type(host).__name__}: {name} is computed from the config, not stored; refused")
    edited = _copied(host)
    old = torch.argsort(order)  # new[j] = old[old[j]]
    axes_of = {**{name: role.axes for name, role in stream.roles.items()}, **stream.buffers}
    done: dict[int, tuple[str, tuple[int, ...]]] = {}  # tied tensors are permuted once
    for name, tensor in [*edited.named_parameters(remove_duplicate=False), *edited.named_buffers(remove_duplicate=False)]:
        if name not in axes_of:
            continue
        first, axes = done.setdefault(id(tensor), (name, axes_of[name]))
        if sorted(axes) != sorted(axes_of[name]):
            raise RealignerError(f"{type(host).__name__}: {first} and {name} are one tensor with two roles; refused")
        for axis in axes if first == name else ():
            tensor.data.copy_(tensor.data.index_select(axis, old.to(tensor.device)))
    # Proof: the same logits.
    dtype = _precision(host)
    want, got = _logits(host, dtype), _logits(edited, dtype)
    off = float((got - want).abs().max() / want.abs().max().clamp(min=1e-30))
    if not off <= _TOLERANCE.get(dtype, _HALF):
        why = f"; {stream.broken[0]} takes its stream apart" if stream.broken else ""
        raise RealignerError(f"{type(host).__name__}: permuted, its logits are off by {off:.2g} of the largest{why}; refused")
    return edited


def with_gain(host: PreTrainedModel, index: int, value: float | str = "median") -> PreTrainedModel:
    """A host with the gain of its final norm changed at one index.

    Args:
        host: a transformers causal language model.
        index: of the residual stream.
        value: the size of the effective gain (Gemma's weight plus 1), which keeps its sign; ``"median"``: that of all indices.

    Raises:
        RealignerError: as `roles_of`; or when the final norm has no gain.
        UsageError: for an index that the stream lacks.

    Example:
        >>> from realigner.tiny import tiny_host
        >>> with_gain(tiny_host("gemma"), 3, 0.5).model.norm.weight[3]
        tensor(-0.5000)
    """
    stream = _stream_of(host, index)
    final = [(name, role) for name, role in stream.roles.items() if role.kind == "gain" and role.place == "final"]
    if not final:
        raise RealignerError(f"{type(host).__name__}: its final norm has no gain; there is none to change")
    if isinstance(value, str) and value != "median":
        raise UsageError(f'value: "median" or a number, not {value!r}')
    edited = _copied(host)
    for name, role in final:
        if math.isnan(role.offset):
            raise RealignerError(f"{name}: its weight does not multiply as it is; refused")
        parameter = edited.get_parameter(name)
        gains = parameter.double() + role.offset
        size = float(gains.abs().median()) if isinstance(value, str) else value
        sign = -1.0 if bool((gains.select(role.axis, index) < 0).all()) else 1.0
        parameter.select(role.axis, index).fill_(sign * size - role.offset)
    return edited


def with_column(host: PreTrainedModel, index: int, like: int, seed: int = 0) -> PreTrainedModel:
    """A host whose head column at one index is replaced by another index's column, shuffled over tokens.

    For an index whose column is the same for every token, so that no gain makes the head see it. A tied head is untied first,
    so that the embedding stays as it was.

    Args:
        host: a transformers causal language model.
        index: index of the residual stream whose column is replaced.
        like: index whose column is copied.
        seed: of the shuffle.

    Raises:
        RealignerError: as `roles_of`; or when the head is not one matrix ``[vocabulary, neuron]``.
        UsageError: for an index that the stream lacks.

    Example:
        >>> from realigner.tiny import tiny_host
        >>> head = with_column(tiny_host("llama"), 3, 5).lm_head.weight
        >>> torch.equal(head[:, 3].sort().values, head[:, 5].sort().values)
        True
    """
    width = _stream_of(host, index).sites.width
    edited = _copied(host)
    _untied(edited)
    head = getattr(edited.get_output_embeddings(), "weight", None)
    if head is None or head.ndim != 2 or head.shape[1] != width:
        raise RealignerError(f"{type(host).__name__}: its head is not one matrix over the stream; there is no column to change")
    order = torch.randperm(len(head), generator=torch.Generator().manual_seed(seed)).to(head.device)
    head[:, index] = head[order, like]
    return edited


def without_channel(host: PreTrainedModel, index: int) -> PreTrainedModel:
    """A host whose residual stream is 0 at one index in every layer.

    Zeroed at the index: the embeddings, what the writing matrices and their biases give, and the gain and shift of norms that
    are part of the stream. A head that is tied to the embedding is untied first, so that it keeps its column: without it, what
    an IRM adds there would go unseen by the head, which is another change.

    Raises:
        RealignerError: as `roles_of`; or when the stream is not exactly 0 there in a forward.
        UsageError: for an index that the stream lacks.

    Example:
        >>> from realigner.tiny import tiny_host
        >>> without_channel(tiny_host("llama"), 3).model.embed_tokens.weight[:, 3].abs().max()
        tensor(0.)
    """
    stream = _stream_of(host, index)
    edited = _copied(host)
    _untied(edited)
    for part, silent in _writing(edited, stream, index):
        part.fill_(silent)
    # Proof: exactly 0 before and after every layer.
    loud: list[int] = []

    def check(layer: int, hidden: torch.Tensor | None) -> None:
        if hidden is None or bool((hidden[..., index] != 0).any()):
            loud.append(layer)

    handles = []
    for number, layer in enumerate(edited.get_submodule(stream.sites.path).children()):
        handles += [
            layer.register_forward_pre_hook(lambda _, *given, n=number: check(n, probe.first_hidden(*given)), with_kwargs=True),
            layer.register_forward_hook(lambda _, __, output, n=number: check(n, probe.first_tensor(output))),
        ]
    _forward(edited)
    for handle in handles:
        handle.remove()
    if loud:
        why = f"index {index} cannot be silenced by weights (layer {min(loud)}); refused"
        raise RealignerError(f"{type(edited).__name__}: {why}")
    return edited


@contextmanager
def silenced(host: PreTrainedModel, stream: Stream, index: int) -> Iterator[None]:
    """`without_channel` in place, within a block; the weights are restored bit for bit.

    Example:
        >>> from realigner.tiny import tiny_host
        >>> host = tiny_host("llama")
        >>> with silenced(host, find_stream(host), 3):
        ...     host.model.embed_tokens.weight[:, 3].abs().max().item()
        0.0
    """
    head = _tied_head(host)
    shared = None if head is None else head.weight
    if head is not None:
        head.weight = _own_copy(head.weight)
    parts = list(_writing(host, stream, index))
    before = [part.clone() for part, _ in parts]
    try:
        for part, silent in parts:
            part.fill_(silent)
        yield
    finally:
        for (part, _), own in zip(parts, before, strict=True):
            part.copy_(own)
        if head is not None and shared is not None:
            head.weight = shared


def _tied_head(host: PreTrainedModel) -> Any:
    """The head if its weight is tied to the token embedding, else None."""
    head, embedding = host.get_output_embeddings(), host.get_input_embeddings()
    tied = head is not None and embedding is not None and getattr(head, "weight", 0) is getattr(embedding, "weight", 1)
    return head if tied else None


def _untied(edited: PreTrainedModel) -> None:
    """Give a head that is tied to the token embedding a weight of its own."""
    if (head := _tied_head(edited)) is not None:
        head.weight = _own_copy(head.weight)
        for config in (edited.config, edited.config.get_text_config(decoder=True)):
            config.tie_word_embeddings = False


def _own_copy(weight: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(weight.detach().clone(), requires_grad=False)


def _writing(host: nn.Module, stream: Stream, index: int) -> Iterator[tuple[torch.Tensor, float]]:
    """Everything that writes into the stream at an index, and the value with which it writes 0."""
    done = set[int]()
    for name, role in stream.roles.items():
        parameter = host.get_parameter(name)
        if role.stays and id(parameter) not in done:
            done.add(id(parameter))
            axis = role.also[0] if role.kind == "read" else role.axis
            yield parameter.data.select(axis, index), -role.offset if role.kind == "gain" else 0.0


def randomised(host: PreTrainedModel, seed: int) -> PreTrainedModel:
    """A host of the same config, dtype and device with random weights, as transformers initialises them with a seed.

    Example:
        >>> from realigner.tiny import tiny_host
        >>> torch.equal(randomised(tiny_host("llama", seed=1), 5).lm_head.weight, tiny_host("llama", seed=5).lm_head.weight)
        True
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = type(host)._from_config(copy.deepcopy(host.config), dtype=host.dtype)
    fresh.generation_config = copy.deepcopy(host.generation_config)
    fresh = fresh.to(next(host.parameters()).device)
    info = getattr(host, "realigner", None)
    if isinstance(info, HostInfo):
        fresh.realigner = info
    return _as_edited(cast(PreTrainedModel, fresh))


def save_edited(host: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> Path:
    """Write a host and its tokenizer as a folder for `load_host`, atomically.

    Returns:
        The folder.

    Raises:
        RealignerError: when something is there already, or it cannot be written.

    Example:
        >>> save_edited(with_gain(host, 1512), tokenizer, "hosts/gain-1512")  # doctest: +SKIP
    """
    path = expanded(folder)
    with taken(path, NEVER) as place, place.folder() as aside:
        host.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
    return path


# --- copying and changing -----------------------------------------------------------------------------------------------


def _stream_of(host: PreTrainedModel, index: int = 0) -> Stream:
    """The stream of a host that can be edited, which has this index."""
    for name, weight in host.named_parameters():
        if type(weight) not in (torch.Tensor, nn.Parameter) or not weight.is_floating_point():
            raise RealignerError(f"{type(host).__name__}: its weights are quantised ({name}); load it in float to edit it")
    stream = find_stream(host)
    if not 0 <= index < stream.sites.width:
        raise UsageError(f"index: the host's residual stream has 0 to {stream.sites.width - 1}, not {index}")
    return stream


def _copied(host: PreTrainedModel) -> PreTrainedModel:
    """A deep copy to edit, without the host's name."""
    info = getattr(host, "realigner", None)
    return _as_edited(copy.deepcopy(host, {id(info): info}))  # its tokenizer is no part of the edit


def _as_edited(host: PreTrainedModel) -> PreTrainedModel:
    info = getattr(host, "realigner", None)
    if isinstance(info, HostInfo):
        host.realigner = HostInfo("", info.tokenizer)
    host.name_or_path = host.config._name_or_path = ""
    host.eval().requires_grad_(False)
    return host


# --- proving ------------------------------------------------------------------------------------------------------------------


def _precision(host: PreTrainedModel) -> torch.dtype:
    """The highest precision in which a copy fits comfortably."""
    count = sum(parameter.numel() for parameter in host.parameters())
    if count <= _IN_FLOAT64 and next(host.parameters()).device.type in ("cpu", "cuda"):
        return torch.float64
    return torch.float32 if count <= _IN_FLOAT32 and host.dtype not in _TOLERANCE else host.dtype


def _logits(host: PreTrainedModel, dtype: torch.dtype) -> torch.Tensor:
    """The logits of a short input, in float64, of a copy of the host in a precision."""
    if host.dtype != dtype:
        host = _copied(host).to(dtype)
    if dtype != torch.float64:
        return _forward(host)
    experts = getattr(host.config, "_experts_implementation", None)
    try:
        host.config._experts_implementation = "eager"  # the grouped product has no float64
        with _InFloat64():  # type: ignore[no-untyped-call]
            return _forward(host)
    finally:
        host.config._experts_implementation = experts


def _forward(host: nn.Module) -> torch.Tensor:
    with probe.as_in_evaluation(host), torch.no_grad():
        out: torch.Tensor = host(input_ids=short_input(host, _TOKENS), use_cache=False).logits
    return out.double()


class _InFloat64(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Skips casts from float64 to float32, which transformers' norms and routers make in every precision."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        cast_down = func.overloadpacket is torch.ops.aten._to_copy and kwargs.get("dtype") is torch.float32
        if cast_down and args[0].dtype is torch.float64:
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)
