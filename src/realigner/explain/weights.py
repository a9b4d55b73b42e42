"""Measurements of every index of a host's residual stream from its weights alone: gains, head, embedding, writing matrices.

Works on a host in memory and on a checkpoint that is never loaded (`checkpoint.Tensors`), by the same code. With g the final
norm's effective gain (Gemma's is 1 + weight), W_U the head ``[vocabulary, D]``, E the token embedding ``[vocabulary, D]``, W a
matrix that writes ``[D, other]``, and all sums in float64:

- ``final_gain`` g_i, ``head_norm`` ||W_U[:, i] - mean||, ``head_reach`` |g_i| times that, ``embedding_norm`` ||E[:, i]||, over
  ``neuron``; the head's column is taken about its mean over the vocabulary, because what is added to all logits alike moves no
  probability;
- ``attention_gain``, ``mlp_gain`` |g_i| / median over i of |g_i|, of the norm that feeds a layer's attention, its MLP;
  ``attention_write``, ``mlp_write`` ||W[i, :]||, of all matrices that write there (a mixture's experts together), over
  ``layer`` and ``neuron``.

A norm of what a branch gives (OLMo2, Gemma2) does not feed it, and ``*_write`` is before such a norm; one norm that feeds both
branches of a parallel layer counts as that of the branch that runs first. What a host does not have is NaN.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import nn

from realigner.errors import RealignerError
from realigner.explain.checkpoint import HostTensors, Tensors, open_checkpoint
from realigner.explain.norm_gradient import norm_kind
from realigner.explain.roles import Role, find_stream, roles_of
from realigner.hosts import text_config
from realigner.locate import find_layers


def weights_of(host: nn.Module | str | Path) -> xr.Dataset:
    """`measure_weights` of a host in memory, or of a checkpoint's folder.

    Raises:
        RealignerError: as `open_checkpoint`, `roles_for` and `measure_weights`.

    Example:
        >>> from realigner.tiny import tiny_host
        >>> weights_of(tiny_host("llama"))["mlp_write"].shape
        (3, 32)
    """
    source: Tensors = HostTensors(host) if isinstance(host, nn.Module) else open_checkpoint(host)
    return measure_weights(source, roles_for(source))


def measure_weights(source: Tensors, roles: Mapping[str, Role]) -> xr.Dataset:
    """Every measurement of the module's docstring, of every index.

    Args:
        source: the tensors, of a host of width D with L layers.
        roles: the role of each (`roles_for`).

    Raises:
        RealignerError: naming a tensor that is needed and missing, quantised or unreadable.

    Returns:
        Variables over ``neuron`` [D] and ``layer`` [L], float64. Attributes: ``host``, ``model_type``, ``tied`` (1 where the
        head is the token embedding, else 0), ``norm`` (``"rms"``, ``"layer"``, or ``"none"`` where none feeds the head).

    Example:
        >>> from realigner.tiny import tiny_host
        >>> source = HostTensors(tiny_host("gemma"))
        >>> measure_weights(source, roles_for(source)).attrs["norm"]
        'rms'
    """
    embedding = _weight_name(source.host, "get_input_embeddings")
    head = _weight_name(source.host, "get_output_embeddings")
    tied = bool(embedding and head) and source.host.get_parameter(embedding) is source.host.get_parameter(head)
    table = _Table(source, roles)
    gain = table.gain([name for name, role in roles.items() if role.kind == "gain" and role.place == "final"])
    norms = table.spread([head] if head in roles else [n for n, role in roles.items() if role.place == "head"])
    values: dict[str, Any] = {
        "final_gain": ("neuron", gain),
        "head_norm": ("neuron", norms),
        "head_reach": ("neuron", np.abs(gain) * norms),
        "embedding_norm": ("neuron", table.norms([embedding] if embedding in roles else [])),
    }
    for place in ("attention", "mlp"):
        for kind in ("gain", "write"):
            values[f"{place}_{kind}"] = ("layer", "neuron"), table.by_layer(place, kind)
    attrs = {
        "host": source.origin,
        "model_type": str(getattr(text_config(source.host), "model_type", "")),
        "tied": int(tied),
        "norm": head_norm_kind(source.example),
    }
    return xr.Dataset(values, {"neuron": np.arange(table.width), "layer": np.arange(table.depth)}, attrs)


class _Table:
    """The measurements of one host, tensor by tensor."""

    def __init__(self, source: Tensors, roles: Mapping[str, Role]) -> None:
        self.source, self.roles = source, roles
        self.depth = len(find_layers(source.host)[1])
        self.width = _width(source, roles)

    def nothing(self) -> np.ndarray:
        return np.full(self.width, np.nan)

    def gain(self, names: list[str]) -> np.ndarray:
        """The effective gain [D] of a norm; of several (a mixture's branches) the first."""
        if not names:
            return self.nothing()
        role = self.roles[names[0]]
        [block] = self.source.blocks(names[0], role.axis)
        return np.asarray(block.double().reshape(-1).numpy() + role.offset)

    def norms(self, names: list[str]) -> np.ndarray:
        """The root of the sum of squares over every axis but the stream's, of all these tensors together [D]."""
        if not names:
            return self.nothing()
        total = torch.zeros(self.width, dtype=torch.float64)
        for name in names:
            for block in self.source.blocks(name, self.roles[name].axis):
                total += torch.linalg.vector_norm(block, dim=0, dtype=torch.float64) ** 2
        return np.asarray(total.sqrt().numpy())

    def spread(self, names: list[str]) -> np.ndarray:
        """As `norms`, about the mean over these axes; 0 where nothing but float32's rounding is left."""
        if not names:
            return self.nothing()
        mean, squares, count = torch.zeros(self.width).double(), torch.zeros(self.width).double(), 0
        for name in names:
            for block in self.source.blocks(name, self.roles[name].axis):
                rows = block.double()
                apart, whole = rows.mean(dim=0) - mean, count + len(rows)
                squares += len(rows) * rows.var(dim=0, correction=0) + apart**2 * count * len(rows) / whole  # Chan et al. 1979
                mean += apart * len(rows) / whole
                count = whole
        return np.asarray(torch.where(squares > 1e-14 * count * mean**2, squares, 0.0).sqrt().numpy())

    def by_layer(self, place: str, kind: str) -> np.ndarray:
        """[L, D]: norms of the matrices that write there, or the gains over their median of the norms that feed it."""
        rows = []
        for layer in range(self.depth):
            names = [n for n, role in self.roles.items() if (role.kind, role.place, role.layer) == (kind, place, layer)]
            if kind == "write":
                rows.append(self.norms(names))
                continue
            size = np.abs(self.gain([name for name in names if not self.roles[name].stays]))
            median = np.median(size)
            rows.append(size / median if median > 0 else self.nothing())
        return np.stack(rows)


def roles_for(source: Tensors) -> dict[str, Role]:
    """Each tensor's role: by `roles_of` where the host can run, else carried over from its example, layer by layer.

    Raises:
        RealignerError: as `roles_of`; and naming the tensor, when the example has none like it, or it does not fit the role.

    Example:
        >>> from realigner.tiny import tiny_host
        >>> roles_for(HostTensors(tiny_host("llama")))["lm_head.weight"].place
        'head'
    """
    if source.example is source.host:
        return roles_of(source.host)
    # The example's layers by kind: by the names in them, and whether it is the last (its last norm may be the host's).
    roles = roles_of(source.example)
    examples, rest = _by_layer(source.example)
    known: dict[tuple[frozenset[str], bool], dict[str, Role | None]] = {}
    for layer, names in enumerate(examples):
        own = {inner: replace(roles[name], layer=None) if name in roles else None for inner, name in names.items()}
        kind = frozenset(map(_starred, names)), layer == len(examples) - 1
        for inner, role in known.setdefault(kind, own).items():
            if own.get(inner, role) != role:
                why = "has another part in other layers; load the host to measure it"
                raise RealignerError(f"{source.origin}: {names[inner]} {why}")
    ends_within = any(roles[name].place == "final" for name in examples[-1].values() if name in roles)

    # Carried over to the host's names: of a layer from the smallest kind that has them all, numbers within it (experts) aside.
    found: dict[str, Role] = {}
    layers, others = _by_layer(source.host)
    for layer, names in enumerate(layers):
        last, wanted = layer == len(layers) - 1, frozenset(map(_starred, names))
        like = [kind for kind in known if wanted <= kind[0] and (kind[1] == last or not ends_within)]
        if not like:
            why = f"no tiny host of its type has a layer like that of {next(iter(names.values()))}; load the host to measure it"
            raise RealignerError(f"{source.origin}: {why}")
        own = known[min(like, key=lambda kind: (len(kind[0]), kind[1] != last))]
        patterns = {_starred(inner): role for inner, role in own.items()}
        for inner, name in names.items():
            role = own[inner] if inner in own else patterns[_starred(inner)]
            if role is not None:
                found[name] = replace(role, layer=layer)
    patterns = {_starred(name): roles.get(name) for name in rest}
    for name in others:
        if _starred(name) not in patterns:
            raise RealignerError(f"{source.origin}: no tiny host of its type has a {name}; load the host to measure it")
        if (role := patterns[_starred(name)]) is not None:
            found[name] = role
    width = _width(source, found)
    for name, role in found.items():
        shape = source.host.get_parameter(name).shape
        if any(axis >= len(shape) or shape[axis] != width for axis in role.axes):
            raise RealignerError(f"{source.origin}: {name} is {list(shape)}; its axes {list(role.axes)} should be {width} long")
    return found


def _by_layer(host: nn.Module) -> tuple[list[dict[str, str]], list[str]]:
    """The parameters of each layer, by their names within it; and those outside the layers."""
    _, modules, path = find_layers(host)
    layers: list[dict[str, str]] = [{} for _ in modules]
    rest = []
    for name, _ in host.named_parameters(remove_duplicate=False):
        if match := re.match(rf"{re.escape(path)}\.(\d+)\.(.+)", name):
            layers[int(match[1])][match[2]] = name
        else:
            rest.append(name)
    return layers, rest


def _starred(name: str) -> str:
    """A name with ``*`` for each number in it."""
    return re.sub(r"(?:(?<=\.)|^)\d+(?=\.|$)", "*", name)


def head_norm_kind(host: nn.Module) -> str:
    """The norm that feeds a host's head: ``"rms"``, ``"layer"`` (it takes the mean away), ``"none"``.

    Raises:
        RealignerError: as `roles_of`.

    Example:
        >>> from realigner.tiny import tiny_host
        >>> head_norm_kind(tiny_host("gpt2"))
        'layer'
    """
    stream = find_stream(host)
    return norm_kind(host.get_submodule(stream.final), stream.sites.width) if stream.final else "none"


def head_tokens(host: Any, tokenizer: Any, indices: Sequence[int], count: int = 8) -> dict[int, dict[str, list[str]]]:
    """The tokens whose logits rise (``up``) and fall (``down``) most as the residual at an index rises.

    What the index is multiplied with on its way to the logits, but for the norm's scale: sign(g_i) W_U[:, i].

    Returns:
        Index -> ``up``, ``down``: `count` tokens each, the furthest first; none where the head does not read the stream itself.
    """
    source = HostTensors(host)
    name, roles = _weight_name(host, "get_output_embeddings"), roles_of(host)
    if name not in roles:
        return {}
    gains = [other for other, role in roles.items() if role.kind == "gain" and role.place == "final"]
    gain = _Table(source, roles).gain(gains)
    columns = host.get_parameter(name).detach().movedim(roles[name].axis, 0)
    found = {}
    for index in indices:
        pushed = columns[index].float() * (-1.0 if gain[index] < 0 else 1.0)
        order = [*pushed.topk(count).indices.tolist(), *(-pushed).topk(count).indices.tolist()]
        words = tokenizer.batch_decode([[token] for token in order])
        found[int(index)] = {"up": words[:count], "down": words[count:]}
    return found


def _width(source: Tensors, roles: Mapping[str, Role]) -> int:
    if not roles:
        raise RealignerError(f"{source.origin}: no tensor of it touches the residual stream")
    name, role = next(iter(roles.items()))
    return int(source.host.get_parameter(name).shape[role.axis])


def _weight_name(host: Any, getter: str) -> str:
    """The name of the weight of the module that `getter` gives; empty if it gives none."""
    module = getattr(host, getter, lambda: None)()
    return next((f"{name}.weight" for name, found in host.named_modules() if found is module), "")
