"""IRMs within an engine's model: their weights in slots, each token's strengths in a buffer, and the sum at every layer.

The contract is `injection`'s: ``residual = x + branch`` becomes ``x + (branch + delta)``, a delta of zero is exact to the bit.
What an engine adds to it:

1. All is one static graph, for torch.compile and for CUDA graphs: every IRM runs on every token, and what differs from step to
   step is in `IRMSlots.strengths`, a buffer that stays in place. A token's strength is 0 for IRMs that it does not ask for.
2. The trunks run once, at layer 0. What is kept for the other layers is their output, not the deltas: at 32 layers of width
   4096 and 8192 tokens those of one IRM alone would be 2 GiB.
3. The output matrices of all IRMs lie one upon the other, with everything folded in that multiplies a delta (its scale by
   layer, masked neurons, the weight that the branch has in the residual). So a layer costs one matrix product, whatever the
   number of IRMs.

Modules of the engine are not replaced but given a subclass of their own class, so their parameters keep their names (weights
are loaded anew by name, LoRA is put in by name). The IRMs' weights are buffers, which no loader of weights asks for.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from realigner.adapter_files import StoredIRM
from realigner.errors import RealignerError, UsageError
from realigner.irm import IRM
from realigner.sites import PLAIN_BASE, Site

_EPS = 1e-6  # of an IRM's input norm
_TINY = 1e-30  # keeps the root mean square of a row of zeros from being divided by
_ATTENTION = ("self_attn", "attn", "attention", "self_attention", "self_att", "linear_attn", "mixer", "mamba", "temporal_block")
_STREAMS = ("hidden_states", "x", "hidden_state", "inputs")  # what layers call the residual stream that they are given
_POSITIONS = ("positions", "position_ids")


# --- the weights ------------------------------------------------------------------------------------------------------------


class TrunkGroup(nn.Module):
    """The trunks of IRMs of one shape, stacked: ``h0 [token, neuron] -> [token, slot, width]``.

    Args:
        like: an IRM of that shape.
        count: how many slots there are; empty ones have weights of 0.
        dtype, device: of the weights.
    """

    weights: list[torch.Tensor]

    def __init__(self, like: IRM, count: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.count, self.width = count, like.output.in_features
        self.kinds = trunk_kind(like)
        self.activations = [module for module in like.trunk if not isinstance(module, (nn.Linear, nn.Dropout))]
        self.linears = 0
        for module in like.trunk:
            if isinstance(module, nn.Linear):
                shape = (count, *module.weight.shape)
                self._keep(f"weight_{self.linears}", torch.zeros(shape, dtype=dtype, device=device))
                self._keep(f"bias_{self.linears}", torch.zeros(shape[:2], dtype=dtype, device=device))
                self.linears += 1
        self._keep("scale", torch.ones(count, device=device))
        self._keep("normed", torch.ones(count, dtype=torch.bool, device=device))

    def _keep(self, name: str, tensor: torch.Tensor) -> None:
        self.register_buffer(name, tensor, persistent=False)

    def put(self, slot: int, irm: IRM) -> None:
        """Write an IRM's trunk into a slot."""
        for number, linear in enumerate(module for module in irm.trunk if isinstance(module, nn.Linear)):
            self.get_buffer(f"weight_{number}")[slot] = linear.weight.to(self.get_buffer(f"weight_{number}"))
            self.get_buffer(f"bias_{number}")[slot] = linear.bias.to(self.get_buffer(f"bias_{number}"))
        self.get_buffer("scale")[slot] = 1.0 / irm.input_scale
        self.get_buffer("normed")[slot] = irm.input_norm

    def forward(self, h0: torch.Tensor) -> torch.Tensor:
        """The trunks' outputs; `h0` is divided by each IRM's own scale and normed if it does so, within the first product."""
        square = h0.float().square().mean(-1, keepdim=True) + _TINY
        unit = (h0.float() * square.rsqrt()).to(h0.dtype)  # so no product overflows, however large the residual is
        scale: torch.Tensor = self.get_buffer("scale")
        size = square.sqrt() * scale  # [token, slot]
        factor = torch.where(self.get_buffer("normed"), size * (size.square() + _EPS).rsqrt(), size).to(h0.dtype)
        weight, bias = self.get_buffer("weight_0"), self.get_buffer("bias_0")
        first = nn.functional.linear(unit, weight.flatten(0, 1)).view(-1, self.count, weight.shape[1])
        x = torch.addcmul(bias, first, factor.unsqueeze(-1))
        for number in range(1, self.linears):
            x = self.activations[number - 1](x)
            weight, bias = self.get_buffer(f"weight_{number}"), self.get_buffer(f"bias_{number}")
            if self.count == 1:
                x = nn.functional.linear(x.squeeze(1), weight[0], bias[0]).unsqueeze(1)
            else:
                x = torch.baddbmm(bias.unsqueeze(1), x.transpose(0, 1), weight.transpose(1, 2)).transpose(0, 1)
        return self.activations[-1](x) if len(self.activations) == self.linears else x


def trunk_kind(irm: IRM) -> tuple[Any, ...]:
    """What two IRMs must have in common to be stacked: the sizes of their trunks and their activations."""
    modules = [module for module in irm.trunk if not isinstance(module, nn.Dropout)]
    return tuple(tuple(m.weight.shape) if isinstance(m, nn.Linear) else type(m).__name__ for m in modules)


class IRMSlots(nn.Module):
    """The IRMs that an engine has loaded, each in a slot, and the strengths of the tokens of a step.

    Args:
        irms: name -> IRM; all of one host.
        spare: slots more, of the first one's shape, for those that are loaded later.
        max_tokens: of a step.
        dtype, device: of the engine's residual stream.

    Attributes:
        names: IRM -> its slot.
        leaving: IRM that was unloaded -> its slot, until another takes it.
        strengths: ``[token, slot]``, in float32.
        x0: layer 0's input, while a forward is there.
        read: ``[token, slots * (width + 1)]``, what layers multiply their output matrix by: the trunks' outputs and a 1 (for
            the output's bias), both times the strength; within a forward.

    Raises:
        RealignerError: when the IRMs are not of one host, or their sites differ.
    """

    def __init__(
        self, irms: Mapping[str, StoredIRM], spare: int, max_tokens: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.first = next(iter(irms.values()))
        self.dtype = dtype
        networks = {name: irm.network() for name, irm in irms.items()}
        kinds: dict[tuple[Any, ...], list[str | None]] = {}
        for name, network in networks.items():
            kinds.setdefault(trunk_kind(network), []).append(name)
        next(iter(kinds.values())).extend([None] * spare)
        self.groups = nn.ModuleList()
        places: list[tuple[TrunkGroup, int, int]] = []  # of each slot: its group, its number there, its first row of output
        names: list[str | None] = []
        rows = 0
        for slots in kinds.values():
            like = next(networks[name] for name in slots if name is not None)
            group = TrunkGroup(like, len(slots), dtype, device)
            self.groups.append(group)
            names += slots
            for number in range(len(slots)):
                places.append((group, number, rows))
                rows += group.width + 1
        self._places = places
        self.names: dict[str, int] = {}
        self.leaving: dict[str, int] = {}
        output = torch.zeros(self.first.num_layers, rows, self.first.hidden_size, dtype=dtype, device=device)
        self.register_buffer("output", output, persistent=False)
        strengths = torch.zeros(max_tokens, len(places), device=device)
        self.register_buffer("strengths", strengths, persistent=False)
        self.version = 0
        self.filled = 0  # tokens whose strengths may be other than 0
        self.connected = False  # whether a model runner fills them
        self.x0: torch.Tensor | None = None
        self.read: torch.Tensor | None = None
        self._staging = torch.zeros(max_tokens, len(places), pin_memory=True) if device.type == "cuda" else strengths
        for slot, named in enumerate(names):
            if named is not None:
                self._put(named, irms[named], networks[named], slot)

    def load(self, name: str, irm: StoredIRM) -> None:
        """Put an IRM into a free slot; no forward may be under way.

        Raises:
            UsageError: for a name that is taken.
            RealignerError: for an IRM of another host or site, and when no free slot has its shape.
        """
        if name in self.names:
            raise UsageError(f"irm: {name!r} is loaded already; unload it first, or give another name")
        network = irm.network()
        kind, taken = trunk_kind(network), set(self.names.values())
        slot = next((n for n, (group, *_) in enumerate(self._places) if n not in taken and group.kinds == kind), None)
        if slot is None:
            free = len(self._places) - len(taken)
            why = "no slot is free" if not free else f"none of the {free} free slots has its shape, {irm.shape.preset}"
            raise RealignerError(f"irm {name!r}: {why}; start the engine with it, or with more slots (REALIGNER_SLOTS)")
        self._put(name, irm, network, slot)

    def unload(self, name: str) -> None:
        """Give an IRM's slot free for another; raises UsageError when it is not loaded.

        Until another takes the slot, a request that was on its way still finds the IRM there.
        """
        if name not in self.names:
            raise UsageError(f"irm: {name!r} is not loaded; loaded are {', '.join(sorted(self.names)) or 'none'}")
        self.leaving[name] = self.names.pop(name)

    def _put(self, name: str, irm: StoredIRM, network: IRM, slot: int) -> None:
        if (irm.hidden_size, irm.num_layers) != (self.first.hidden_size, self.first.num_layers):
            made_for = f"{irm.num_layers} layers of width {irm.hidden_size}"
            raise RealignerError(f"irm {name!r}: made for a host of {made_for}, and others for another; serve it on its own")
        if irm.sites != self.first.sites:
            raise RealignerError(f"irm {name!r}: its site is not that of the others; retrain it, or serve it on its own")
        self.leaving = {left: place for left, place in self.leaving.items() if place != slot and left != name}
        group, number, row = self._places[slot]
        group.put(number, network)
        blocks = output_blocks(network)
        output = self.get_buffer("output")
        output[:, row : row + group.width + 1] = 0.0
        for layer, block in zip(network.layers, blocks, strict=True):
            output[layer, row : row + group.width + 1] = (block / irm.sites[layer].scale).to(output)
        self.names[name] = slot
        self.version += 1

    # --- a step, before the forward

    def row(self, strengths: Mapping[str, float]) -> np.ndarray[Any, Any]:
        """The strengths ``[slot]`` of a request's tokens.

        Raises:
            RealignerError: for an IRM that is not loaded; who takes requests in refuses them, so none should come this far.
        """
        row = np.zeros(len(self._places), dtype=np.float32)
        for name, strength in strengths.items():
            slot = self.names.get(name, self.leaving.get(name))
            if slot is None:
                raise RealignerError(f"irm: {name!r} is not loaded in this engine's worker; loaded are {sorted(self.names)}")
            row[slot] = strength
        return row

    def fill(self, rows: np.ndarray[Any, Any]) -> None:
        """Set the strengths of a step's tokens, ``rows [token, slot]``; those of padding become 0."""
        tokens = len(rows) if rows.any() else 0
        strengths = self.get_buffer("strengths")
        if tokens:
            self._staging[:tokens] = torch.from_numpy(rows)
            if self._staging is not strengths:
                strengths[:tokens].copy_(self._staging[:tokens], non_blocking=True)
        self.clear(tokens)

    def clear(self, tokens: int = 0) -> None:
        """Set the strengths of all tokens after the first ones to 0."""
        if self.filled > tokens:
            self.get_buffer("strengths")[tokens : self.filled] = 0.0
        self.filled = tokens

    # --- within the forward

    def begin(self, site: Site, branch: torch.Tensor) -> None:
        """At layer 0: read h0 and run the trunks."""
        assert self.x0 is not None  # the layer ran, for its branch does
        weight = site.base[0][1]
        x0 = self.x0 if weight == 1.0 else weight * self.x0
        h0 = x0 + (branch if site.scale == 1.0 else site.scale * branch)
        h0 = h0.reshape(-1, h0.shape[-1]).to(self.dtype)
        strengths, start, parts = self.get_buffer("strengths")[: h0.shape[0]], 0, []
        for group in self.groups:
            assert isinstance(group, TrunkGroup)
            own = strengths[:, start : start + group.count].unsqueeze(-1)
            start += group.count
            part = torch.cat([group(h0).float() * own, own], dim=-1).to(self.dtype)
            parts.append(part.flatten(1))
        self.read = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        self.x0 = None

    def added(self, layer: int, branch: torch.Tensor) -> torch.Tensor:
        """A layer's branch ``[..., neuron]`` with the delta of each token."""
        assert self.read is not None  # layer 0 ran
        flat = branch.reshape(-1, branch.shape[-1])
        total = torch.addmm(flat, self.read.to(flat.dtype), self.get_buffer("output")[layer].to(flat.dtype))
        if layer == self.first.num_layers - 1:
            self.read = None
        return total.view(branch.shape)


def output_blocks(irm: IRM) -> torch.Tensor:
    """Each layer's output as one matrix ``[layer, width + 1, neuron]``: the weights, then the bias, with scales and mask."""
    weight, bias = irm.output.weight.detach(), irm.output.bias.detach()
    whole = torch.cat([weight, bias[:, None]], dim=1).view(len(irm.layers), irm.hidden_size, -1)
    given = irm.delta_scale if irm.layer_scales is None else irm.layer_scales
    scales = torch.as_tensor(given, dtype=whole.dtype, device=whole.device)
    whole = whole * (scales.unsqueeze(-1) if scales.dim() else scales)
    return (whole if irm.masked is None else whole.index_fill(1, irm.masked, 0.0)).transpose(1, 2)


# --- the modules that the engine runs ---------------------------------------------------------------------------------------


class _Layer0:
    """Mixed into the first layer's class: keeps what the layer is given."""

    irms: IRMSlots
    irm_place: tuple[int, str]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        place, name = self.irm_place
        self.irms.x0 = kwargs[name] if name in kwargs else args[place]
        return super().forward(*args, **kwargs)  # type: ignore[misc]


class _Branch:
    """Mixed into the class of each layer's branch: adds the deltas to its output."""

    irms: IRMSlots
    irm_site: Site

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)  # type: ignore[misc]
        branch = output[0] if isinstance(output, tuple) else output
        if not isinstance(branch, torch.Tensor):
            raise RealignerError(f"layer {self.irm_site.layer}: {type(self).__name__} returned no tensor to add a delta to")
        if self.irm_site.layer == 0:
            self.irms.begin(self.irm_site, branch)
        total = self.irms.added(self.irm_site.layer, branch)
        return (total, *output[1:]) if isinstance(output, tuple) else total


def _mix(module: nn.Module, mixin: type, irms: IRMSlots) -> None:
    own = type(module)
    module.__class__ = type(own.__name__, (mixin, own), {"__module__": __name__})
    module.add_module("irms", irms)


@dataclass(frozen=True)
class Found:
    """The layers of an engine's model.

    Attributes:
        name: of the model's class.
        layers: its decoder layers.
        branches: of each layer, the module whose output completes the residual.
    """

    name: str
    layers: Sequence[nn.Module]
    branches: Sequence[nn.Module]


def attach(model: nn.Module, irms: IRMSlots) -> None:
    """Put IRMs into a model of the engine, whose weights are loaded, and prove that they are where they were trained to be.

    Raises:
        RealignerError: naming the model's class, when a site is not found or the proof fails.
    """
    found = find_layers(model, irms.first.sites)
    for site, layer, branch in zip(irms.first.sites, found.layers, found.branches, strict=True):
        prove(found.name, site, layer, branch, irms.dtype, irms.get_buffer("strengths").device, irms.first.hidden_size)
    first: Any = found.layers[0]
    first.irm_place = _stream_of(found.name, first)
    _mix(first, _Layer0, irms)
    for site, branch in zip(irms.first.sites, found.branches, strict=True):
        branch.irm_site = site  # type: ignore[assignment]
        _mix(branch, _Branch, irms)
    model.add_module("irms", irms)


def find_layers(model: nn.Module, sites: Sequence[Site]) -> Found:
    """A model's decoder layers, by their number and the names in the sites.

    Raises:
        RealignerError: naming the model's class, when it has none that fit.
    """
    name, why = type(model).__name__, f"it has no list of {len(sites)} layers"
    for site in sites:
        if site.base not in (PLAIN_BASE, ((PLAIN_BASE[0][0], site.base[0][1]),)):
            raise RealignerError(f"{name}: layer {site.layer}'s residual is the sum of several modules, which the engine fuses")
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == len(sites):
            branches = [_branch_of(layer, site) for layer, site in zip(module, sites, strict=True)]
            missing = [site for site, branch in zip(sites, branches, strict=True) if branch is None]
            if not missing:
                return Found(name, list(module), [branch for branch in branches if branch is not None])
            why = f"layer {missing[0].layer} ({type(module[missing[0].layer]).__name__}) has no {missing[0].branch}"
    raise RealignerError(f"{name}: vLLM's model cannot take this IRM: {why}; serve it with transformers (realigner serve)")


def _branch_of(layer: nn.Module, site: Site) -> nn.Module | None:
    """The module that makes the branch, by its name, or by another that engines have for attention."""
    names = (site.branch, *(_ATTENTION if site.branch in _ATTENTION else ()))
    return next((module for name in names if (module := _module(layer, name)) is not None), None)


def _module(layer: nn.Module, name: str) -> nn.Module | None:
    try:
        return layer.get_submodule(name)
    except AttributeError:
        return None


def _stream_of(name: str, layer: nn.Module) -> tuple[int, str]:
    """The place and name of the argument by which a layer is given the residual stream."""
    names = list(inspect.signature(layer.forward).parameters)
    stream = next((candidate for candidate in _STREAMS if candidate in names), None)
    if stream is None:
        raise RealignerError(f"{name}: {type(layer).__name__} takes {', '.join(names)}, none of which is the residual stream")
    return names.index(stream), stream


# --- the proof --------------------------------------------------------------------------------------------------------------


class _Seen(Exception):  # noqa: N818 - not an error: it ends a layer once its reader was reached
    pass


def prove(
    name: str, site: Site, layer: nn.Module, branch: nn.Module, dtype: torch.dtype, device: torch.device, width: int
) -> None:
    """Run a layer with noise for its branch, and see that its residual is what the site says it is.

    In a sequential layer what the reader is given must be ``x + scale * branch``, in one tensor or in two; in others the
    layer's output must move by ``scale`` times what the branch does. Attention is not run.

    Raises:
        RealignerError: naming the model and the layer.
    """
    where = f"{name}: layer {site.layer} ({type(layer).__name__})"
    generator = torch.Generator().manual_seed(site.layer)
    x, first, second = torch.randn(3, 4, width, generator=generator).to(device, dtype)
    reader = _module(layer, site.reader) if site.reader else None
    if site.kind == "sequential" and reader is None:
        raise RealignerError(f"{where} has no {site.reader}, the module that reads the residual; serve it with transformers")
    expected = site.base[0][1] * x + site.scale * first if reader is not None else site.scale * (first - second)
    errors: list[str] = []
    for alone, attention_alone in ((True, True), (False, True), (True, False), (False, False)):  # or with more in a tuple
        for shape in ((4, width), (1, 4, width)):
            try:
                noises = [noise.view(shape) if alone else (noise.view(shape), None) for noise in (first, second)]
                runs = [_run(layer, branch, reader, x.view(shape), noise, attention_alone) for noise in noises]
            except (TypeError, ValueError, AttributeError, RuntimeError, KeyError, IndexError, AssertionError) as error:
                errors.append(f"{type(error).__name__}: {error}".partition("\n")[0])
                continue
            actual = runs[0] if reader is not None else runs[0] - runs[1]
            tolerance = 1e-4 if dtype == torch.float32 else 0.06
            if actual.shape == expected.shape and torch.allclose(actual.float(), expected.float(), tolerance, tolerance):
                return
            what = f"what {site.reader} is given" if reader is not None else "what it returns"
            errors.insert(0, f"{what} is not the layer's input plus {site.scale:g} * {site.branch}")
    raise RealignerError(f"{where} cannot take this IRM: {errors[0]}; serve it with transformers (realigner serve)")


@torch.no_grad()
def _run(
    layer: nn.Module, branch: nn.Module, reader: nn.Module | None, x: torch.Tensor, noise: Any, attention_alone: bool
) -> torch.Tensor:
    """Run a layer with `noise` in its branch's place; the sum of what its reader is given, or of what it returns."""
    seen: list[torch.Tensor] = []

    def read(*args: Any, **kwargs: Any) -> Any:
        seen.extend(value for value in (*args, *kwargs.values()) if _is_stream(value, x))
        raise _Seen

    attention = [child for name in _ATTENTION if (child := getattr(layer, name, None)) is not None and child is not branch]
    replaced: list[tuple[nn.Module, Callable[..., Any]]] = [(branch, lambda *args, **kwargs: noise)]
    replaced += [(child, _given(x, attention_alone)) for child in attention if isinstance(child, nn.Module)]
    if reader is not None:
        replaced.append((reader, read))
    values: dict[str, Any] = {**dict.fromkeys(_STREAMS, x.clone()), **dict.fromkeys(_POSITIONS, _places(x))}
    parameters = inspect.signature(layer.forward).parameters.values()
    named = [p for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    needed = [p for p in named if p.name in values or p.default is p.empty]
    with _forwards(replaced):
        try:
            output = layer(**{p.name: values.get(p.name) for p in needed})
            if reader is not None:
                raise RuntimeError("its reader is never run")
            outputs = output if isinstance(output, tuple) else (output,)
            seen.extend(value for value in outputs if _is_stream(value, x))
        except _Seen:
            pass
    return torch.stack(seen).sum(0).reshape(-1, x.shape[-1])


def _is_stream(value: Any, x: torch.Tensor) -> bool:
    return isinstance(value, torch.Tensor) and value.shape == x.shape and value.is_floating_point()


def _places(x: torch.Tensor) -> torch.Tensor:
    return torch.arange(x.shape[-2], device=x.device)


def _given(x: torch.Tensor, alone: bool) -> Callable[..., Any]:
    """In attention's place: returns what it is given."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        given = next((value for value in (*args, *kwargs.values()) if _is_stream(value, x)), x)
        return given if alone else (given, None)

    return forward


@contextmanager
def _forwards(replaced: Sequence[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Other forwards for a while; a class's own comes back when an instance's is deleted."""
    kept = [(module, vars(module).get("forward")) for module, _ in replaced]
    try:
        for module, forward in replaced:
            module.forward = forward
        yield
    finally:
        for module, own in kept:
            vars(module).pop("forward", None)
            if own is not None:
                module.forward = own
