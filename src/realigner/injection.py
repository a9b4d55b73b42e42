"""Put IRM deltas into a host's forward pass, exactly.

The contract:

1. Nothing of the host is replaced or changed: hooks are registered, and `Injector.detach` removes them all.
2. ``residual = x + branch`` becomes ``x + (branch + delta)`` (form A of docs/architecture.md): nothing is mutated, it
   holds for parallel layers, and a delta of zero is bit-exact.
3. The deltas of a forward live in a `ForwardContext` made for that forward and handed down as a keyword argument, never in
   module state. So a second forward before the first backward, and a recomputed (checkpointed) layer, see their own deltas.
4. All deltas are computed once per forward, at layer 0; the other layers add.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from realigner.errors import RealignerError
from realigner.irm import IRM
from realigner.sites import CONTEXT_KEY, HostSites, Site, first_hidden, first_tensor


class ActiveIRM(NamedTuple):
    """An IRM that takes part in a forward: its name, the network, and its strength (a scalar tensor)."""

    name: str
    irm: IRM
    strength: torch.Tensor


Observer = Callable[[ActiveIRM, torch.Tensor], None]


class ForwardContext:
    """The deltas of one forward pass.

    Attributes:
        active: the IRMs that take part, in order.
        x0: layer 0's input ``[batch, position, neuron]``, kept to form h0.
        deltas: layer -> summed, scaled delta ``[batch, position, neuron]``; None until layer 0's site ran.
        grad_enabled: whether gradients were recorded when the forward began.
    """

    __slots__ = ("active", "deltas", "grad_enabled", "x0")

    def __init__(self, active: Sequence[ActiveIRM]) -> None:
        self.active = active
        self.x0: torch.Tensor | None = None
        self.deltas: dict[int, torch.Tensor] | None = None
        self.grad_enabled = torch.is_grad_enabled()


class Injector:
    """Hooks on a host that add the deltas of the active IRMs to its residual stream.

    Args:
        sites: what `sites.find_sites` proved of the host.
        active: called at the start of every forward; returns the IRMs that take part. None active: the bare host runs.

    Attributes:
        observers: called as ``observer(active, delta)`` with what each IRM adds in a forward, strength included: delta
            ``[batch, position, layer, neuron]`` over the layers of ``active.irm``. Used to record traces.
    """

    def __init__(self, sites: HostSites, active: Callable[[], Sequence[ActiveIRM]]) -> None:
        self.sites = sites
        self.active = active
        self.observers: list[Observer] = []
        self._state: ForwardContext | None = None  # for hosts whose layers take no keyword arguments
        self._handles: list[RemovableHandle] = []

    def attach(self) -> None:
        """Register the hooks: two on the decoder, one on layer 0, two on each layer."""
        decoder, layers = self.sites.decoder, self.sites.layers
        self._handles.append(decoder.register_forward_pre_hook(self._begin, with_kwargs=True))
        self._handles.append(decoder.register_forward_hook(self._end, always_call=True))
        self._handles.append(layers[0].register_forward_pre_hook(self._read_input, with_kwargs=True))
        for site, layer in zip(self.sites.sites, layers, strict=True):
            self._handles += _SiteHooks(self, site).attach(layer)

    def detach(self) -> None:
        """Remove every hook; the host is as it was before `attach`."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @property
    def carried(self) -> bool:
        """Whether the context reaches every layer as a keyword argument (else it is kept for the length of a forward)."""
        return all(site.carrier for site in self.sites.sites)

    def _begin(self, decoder: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        active = self.active()
        if not active:
            return None
        context = ForwardContext(active)
        if self.carried:
            return args, {**kwargs, CONTEXT_KEY: context}
        if decoder.training and getattr(decoder, "gradient_checkpointing", False):
            raise RealignerError(
                f"{type(decoder).__name__}: its layers take no keyword arguments, so gradient checkpointing would recompute "
                "them without their deltas; turn checkpointing off"
            )
        self._state = context
        return None

    def _end(self, *_: Any) -> None:
        self._state = None

    def _read_input(self, _: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        context = kwargs.get(CONTEXT_KEY, self._state)
        if context is not None:
            context.x0 = first_hidden(args, kwargs)

    def fill(self, context: ForwardContext, h0: torch.Tensor) -> dict[int, torch.Tensor]:
        """Compute the deltas of all layers from ``h0 [batch, position, neuron]``: summed over IRMs, in h0's dtype."""
        if context.grad_enabled and not torch.is_grad_enabled():
            raise RealignerError(
                "reentrant gradient checkpointing gives an IRM wrong gradients; use "
                "gradient_checkpointing_kwargs={'use_reentrant': False}"
            )
        deltas: dict[int, torch.Tensor] = {}
        for active in context.active:
            own = active.irm(h0) * active.strength
            for observer in self.observers:
                observer(active, own)
            own = own.to(h0.dtype)
            for place, layer in enumerate(active.irm.layers):
                delta = own[..., place, :]
                deltas[layer] = deltas[layer] + delta if layer in deltas else delta
        return deltas


def refuse_attached(decoder: nn.Module) -> None:
    """Raise if a host's decoder carries an injector already: two would not know of each other's deltas."""
    if any(isinstance(getattr(hook, "__self__", None), Injector) for hook in decoder._forward_pre_hooks.values()):
        raise RealignerError("this host carries an IRM already; add another with model.add_adapter, or model.unload() it first")


class _SiteHooks:
    """The two hooks of one layer: take the context on the way in, add the delta on the way out.

    The context is held only between the two, within one call of the layer; a recomputed layer takes it anew.
    """

    def __init__(self, injector: Injector, site: Site) -> None:
        self.injector = injector
        self.site = site
        self.context: ForwardContext | None = None

    def attach(self, layer: nn.Module) -> list[RemovableHandle]:
        handles = [layer.get_submodule(self.site.branch).register_forward_hook(self.add)]
        if self.site.carrier:
            carrier = layer.get_submodule(self.site.carrier)
            handles.append(carrier.register_forward_pre_hook(self.take, with_kwargs=True))
        return handles

    def take(self, _: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        if CONTEXT_KEY not in kwargs:
            self.context = None
            return None
        self.context = kwargs[CONTEXT_KEY]
        return args, {key: value for key, value in kwargs.items() if key != CONTEXT_KEY}

    def add(self, _: nn.Module, __: Any, output: Any) -> Any:
        context = self.context if self.site.carrier else self.injector._state
        self.context = None
        if context is None:
            return None
        branch = first_tensor(output)
        if branch is None:
            raise RealignerError(f"layer {self.site.layer}: {self.site.branch} returned no tensor to add a delta to")
        if self.site.layer == 0:
            deltas = self._deltas(context, branch)
        else:
            if context.deltas is None:
                raise RealignerError(f"layer {self.site.layer} ran before layer 0; its deltas are not known yet")
            deltas = context.deltas
        delta = deltas.get(self.site.layer)
        if delta is None:
            return None
        if self.site.scale != 1.0:
            delta = delta / self.site.scale
        moved = branch + delta.to(device=branch.device, dtype=branch.dtype).view_as(branch)
        return (moved, *output[1:]) if isinstance(output, tuple) else moved

    def _deltas(self, context: ForwardContext, branch: torch.Tensor) -> dict[int, torch.Tensor]:
        if context.x0 is None:
            raise RealignerError("layer 0 ran without hidden states; the IRM has nothing to read")
        branch = branch.view_as(context.x0)
        h0 = context.x0 + (branch if self.site.scale == 1.0 else self.site.scale * branch)
        deltas = self.injector.fill(context, h0)
        if context.deltas is None:  # a recomputed layer 0 must not replace what later layers already used
            context.deltas = deltas
        return deltas
