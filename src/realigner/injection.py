"""Put IRM deltas into a host's forward pass, exactly.

The contract:

1. Nothing of the host is replaced or changed: hooks are registered, and `Injector.detach` removes them all.
2. ``residual = x + branch`` becomes ``x + (branch + delta)`` (form A of docs/architecture.md): nothing is mutated, it
   holds for parallel layers, and a delta of zero is bit-exact.
3. The deltas of a forward live in a `ForwardContext` made for that forward. Where gradients are recorded it is handed down as a
   keyword argument, never kept in module state, so that a second forward before the first backward, and a recomputed
   (checkpointed) layer, see their own deltas. Where none are, nothing is ever recomputed: the injector keeps the context for
   the length of the forward, and each layer costs one hook.
4. All deltas are computed once per forward, at layer 0; the other layers add.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from realigner.errors import RealignerError, UsageError
from realigner.irm import IRM
from realigner.probe import CONTEXT_KEY, INPUT, first_hidden, first_tensor, replaced
from realigner.sites import HostSites, Site


class ActiveIRM(NamedTuple):
    """An IRM that takes part in a forward: its name, the network, and its strength (a scalar tensor, or one number a row)."""

    name: str
    irm: IRM
    strength: torch.Tensor


Observer = Callable[[ActiveIRM, torch.Tensor, torch.Tensor], None]


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
        observers: called as ``observer(active, h0, delta)`` with what each IRM reads ``[batch, position, neuron]``
            and what it adds, strength included: delta ``[batch, position, layer, neuron]`` over the layers of
            ``active.irm``. Used to record traces.
    """

    def __init__(self, sites: HostSites, active: Callable[[], Sequence[ActiveIRM]]) -> None:
        self.sites = sites
        self.active = active
        self.carries = all(site.carrier for site in sites.sites)  # whether a context reaches every layer as a keyword argument
        self.observers: list[Observer] = []
        self.repeats = 1  # how often `generate` repeats each row of its batch (beams, several replies)
        self._state: ForwardContext | None = None  # the running forward's, where none is handed down
        self._handles: list[RemovableHandle] = []
        self._sites: list[_SiteHooks] = []
        self._carrying = False

    def attach(self) -> None:
        """Register the hooks: two on the decoder, one on layer 0, one on each layer."""
        decoder, layers = self.sites.decoder, self.sites.layers
        self._handles.append(decoder.register_forward_pre_hook(self._begin, with_kwargs=True))
        self._handles.append(decoder.register_forward_hook(self._end, always_call=True))
        self._handles.append(layers[0].register_forward_pre_hook(self._read_input, with_kwargs=True))
        self._sites = [_SiteHooks(self, site) for site in self.sites.sites]
        for hooks, layer in zip(self._sites, layers, strict=True):
            self._handles += hooks.attach(layer)

    def carry(self) -> None:
        """Register, once, the hooks that take a handed-down context: another on each layer, for forwards with gradients.

        Called by itself in time, but for code that is compiled: a hook must be there before the first compiled call.
        """
        if self.carries and not self._carrying:
            self._carrying = True
            for hooks, layer in zip(self._sites, self.sites.layers, strict=True):
                carrier = layer.get_submodule(hooks.site.carrier)
                self._handles.append(carrier.register_forward_pre_hook(hooks.take, with_kwargs=True))

    def detach(self) -> None:
        """Remove every hook; the host is as it was before `attach`."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._carrying = False

    def _begin(self, decoder: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        active = self.active()
        if not active:
            return None
        context = ForwardContext(active)
        if context.grad_enabled:
            if not self._carrying and not torch.compiler.is_compiling():
                self.carry()
            if self._carrying:
                return args, {**kwargs, CONTEXT_KEY: context}
            if decoder.training and getattr(decoder, "gradient_checkpointing", False):
                raise RealignerError(
                    f"{type(decoder).__name__}: its layers take no keyword arguments, so gradient checkpointing would "
                    "recompute them without their deltas; turn checkpointing off"
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
            own = active.irm(h0) * self._by_row(active.strength, h0.shape[0])
            for observer in self.observers:
                observer(active, h0, own)
            for layer, delta in zip(active.irm.layers, own.to(h0.dtype).unbind(-2), strict=True):
                deltas[layer] = deltas[layer] + delta if layer in deltas else delta
        return deltas

    def _by_row(self, strength: torch.Tensor, batch: int) -> torch.Tensor:
        """The strength in a shape that multiplies ``delta [batch, position, layer, neuron]``."""
        if strength.dim() == 0:
            return strength
        rows = len(strength)
        if batch == rows * self.repeats:
            strength = strength.repeat_interleave(self.repeats)
        elif batch != rows:
            raise UsageError(f"strength or adapter_names: {rows} given for a batch of {batch} rows; give one for each row")
        return strength[:, None, None, None]


def refuse_attached(decoder: nn.Module) -> None:
    """Raise if a host's decoder carries an injector already: two would not know of each other's deltas."""
    if any(isinstance(getattr(hook, "__self__", None), Injector) for hook in decoder._forward_pre_hooks.values()):
        raise RealignerError("this host carries an IRM already; add another with model.add_adapter, or model.unload() it first")


class _SiteHooks:
    """The hooks of one layer: take the context on the way in if it is handed down, add the delta on the way out.

    What they keep is kept within one call of the layer only; a recomputed layer takes it anew.
    """

    def __init__(self, injector: Injector, site: Site) -> None:
        self.injector = injector
        self.site = site
        self.context: ForwardContext | None = None
        self.terms: dict[str, torch.Tensor] = {}  # layer 0: outputs of the modules in the residual's base

    def attach(self, layer: nn.Module) -> list[RemovableHandle]:
        handles = []
        if self.site.layer == 0:
            for name, _ in self.site.base:
                if name != INPUT:
                    handles.append(layer.get_submodule(name).register_forward_hook(self._keeper(name)))
        handles.append(layer.get_submodule(self.site.branch).register_forward_hook(self.add))
        return handles

    def take(self, _: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        if CONTEXT_KEY not in kwargs:
            return None
        self.context = kwargs[CONTEXT_KEY]
        return args, {key: value for key, value in kwargs.items() if key != CONTEXT_KEY}

    def _keeper(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def keep(_: nn.Module, __: Any, output: Any) -> None:
            tensor = first_tensor(output)
            if tensor is not None:
                self.terms[name] = tensor

        return keep

    def add(self, _: nn.Module, __: Any, output: Any) -> Any:
        # The one hook that runs in every layer for every token: kept lean.
        context = self.context
        if context is not None:
            self.context = None
        elif (context := self.injector._state) is None:
            return None
        branch = output if isinstance(output, torch.Tensor) else first_tensor(output)
        if branch is None:
            raise RealignerError(f"layer {self.site.layer}: {self.site.branch} returned no tensor to add a delta to")
        deltas = self._deltas(context, branch) if self.site.layer == 0 else context.deltas
        if deltas is None:
            raise RealignerError(f"layer {self.site.layer} ran before layer 0; its deltas are not known yet")
        delta = deltas.get(self.site.layer)
        if delta is None:
            return None
        if self.site.scale != 1.0:
            delta = delta / self.site.scale
        if delta.dtype != branch.dtype or delta.device != branch.device:
            delta = delta.to(device=branch.device, dtype=branch.dtype)
        if delta.shape != branch.shape:  # some layers flatten batch and position
            delta = delta.reshape(branch.shape)
        return replaced(output, branch + delta)

    def _deltas(self, context: ForwardContext, branch: torch.Tensor) -> dict[int, torch.Tensor]:
        if context.x0 is None:
            raise RealignerError("layer 0 ran without hidden states; the IRM has nothing to read")
        h0 = self._residual(context.x0, branch.view_as(context.x0))
        deltas = self.injector.fill(context, h0)
        if context.deltas is None:  # a recomputed layer 0 must not replace what later layers already used
            context.deltas = deltas
        return deltas

    def _residual(self, x0: torch.Tensor, branch: torch.Tensor) -> torch.Tensor:
        """h0 ``[batch, position, neuron]``: the base and the branch, summed as the layer will sum them."""
        total: torch.Tensor | None = None
        for name, weight in self.site.base:
            term = x0 if name == INPUT else self.terms.pop(name).view_as(x0)
            term = term if weight == 1.0 else weight * term
            total = term if total is None else total + term
        scaled = branch if self.site.scale == 1.0 else self.site.scale * branch
        return scaled if total is None else total + scaled
