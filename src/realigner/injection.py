"""Put IRM deltas into a host's forward pass, exactly.

The contract:

1. Nothing of the host is replaced or changed: hooks are registered, and `Injector.detach` removes them all.
2. ``residual = x + branch`` becomes ``x + (branch + delta)`` (form A of docs/architecture.md): nothing is mutated, it
   holds for parallel layers, and a delta of zero is bit-exact.
3. The deltas of a forward live in a `ForwardContext` made for that forward, with the settings it began with. Where gradients
   are recorded it is handed down as a keyword argument, so that a second forward before the first backward, and a recomputed
   (checkpointed) layer, see their own deltas. Where none are, nothing is ever recomputed: it is kept with the thread
   (`settings.ThreadState`) for the length of the forward, and each layer costs one hook.
4. All deltas are computed once per forward, at layer 0; the other layers add.
5. A forward that ends with fewer layers touched than chosen is an error: something kept the hooks from running.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from realigner.errors import RealignerError
from realigner.irm import IRM
from realigner.probe import CONTEXT_KEY, first_hidden, first_tensor, replaced
from realigner.settings import Settings, Threads
from realigner.sites import INPUT, HostSites, Site


class ActiveIRM(NamedTuple):
    """An IRM that takes part in a forward: its name, the network, and its strength (shape [], [row] or [row, position])."""

    name: str
    irm: IRM
    strength: torch.Tensor


Observer = Callable[[ActiveIRM, torch.Tensor, torch.Tensor], None]


class ForwardContext:
    """The deltas of one forward pass.

    Attributes:
        active: the IRMs that take part, in order.
        settings: those of the call when the forward began.
        start: the place in its text of the first token.
        x0: layer 0's input ``[batch, position, neuron]``, kept to form h0.
        deltas: layer -> summed, scaled delta ``[batch, position, neuron]``; None until layer 0's site ran.
        touched: how many layers were given their delta so far.
        grad_enabled: whether gradients were recorded when the forward began.
    """

    __slots__ = ("active", "deltas", "grad_enabled", "settings", "start", "touched", "x0")

    def __init__(self, active: Sequence[ActiveIRM], settings: Settings, start: int | torch.Tensor) -> None:
        self.active = active
        self.settings = settings
        self.start = start
        self.x0: torch.Tensor | None = None
        self.deltas: dict[int, torch.Tensor] | None = None
        self.touched = 0
        self.grad_enabled = torch.is_grad_enabled()


class Injector:
    """Hooks on a host that add the deltas of the active IRMs to its residual stream.

    Args:
        sites: what `locate.find_sites` proved of the host.
        active: called with the settings at the start of every forward; returns the IRMs that take part. None active: the bare
            host runs.
        default: the settings of a call that is given none.

    Attributes:
        threads: the settings of each thread.
        observers: called as ``observer(active, h0, delta)`` with what each IRM reads ``[batch, position, neuron]``
            and what it adds, strength included: delta ``[batch, position, layer, neuron]`` over the layers of
            ``active.irm``. Those of a call alone are in its settings.
    """

    def __init__(
        self, sites: HostSites, active: Callable[[Settings], Sequence[ActiveIRM]], default: Settings | None = None
    ) -> None:
        self.sites = sites
        self.active = active
        self.carries = all(site.carrier for site in sites.sites)  # whether a context reaches every layer as a keyword argument
        self.observers: list[Observer] = []
        self.threads = Threads(Settings() if default is None else default)
        self._handles: list[RemovableHandle] = []
        self._sites: list[_SiteHooks] = []
        self._carrying = False

    def attach(self) -> None:
        """Register the hooks: two on the decoder, one on layer 0, one on each layer."""
        decoder, layers = self.sites.decoder, self.sites.layers
        self._handles.append(decoder.register_forward_pre_hook(self._begin, with_kwargs=True))
        self._handles.append(decoder.register_forward_hook(self._end, with_kwargs=True, always_call=True))
        self._handles.append(layers[0].register_forward_pre_hook(self._read_input, with_kwargs=True))
        self._sites = [_SiteHooks(self, site) for site in self.sites.sites]
        for hooks, layer in zip(self._sites, layers, strict=True):
            self._handles += hooks.attach(layer)

    def carry(self) -> None:
        """Register, once, the hooks that take a handed-down context: another on each layer, for forwards with gradients.

        Called by itself in time, but for code that is compiled: a hook must be there before the first compiled call.
        """
        if self.carries and not self._carrying:
            for hooks, layer in zip(self._sites, self.sites.layers, strict=True):
                carrier = layer.get_submodule(hooks.site.carrier)
                self._handles.append(carrier.register_forward_pre_hook(hooks.take, with_kwargs=True))
            self._carrying = True  # last: other threads hand contexts down from now on

    def detach(self) -> None:
        """Remove every hook; the host is as it was before `attach`."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._carrying = False

    def _begin(self, decoder: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        state = self.threads.state
        state.running = state.taken = None  # left by a forward that was interrupted, or by a failed recomputation
        state.terms.clear()
        settings = state.settings
        active = self.active(settings)
        if not active:
            return None
        state.began = True
        context = ForwardContext(active, settings, _start(settings, args, kwargs))
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
        state.running = context
        return None

    def _end(self, decoder: nn.Module, _: Any, kwargs: dict[str, Any], output: Any) -> None:
        state = self.threads.state
        context = kwargs.get(CONTEXT_KEY, state.running)
        state.running = state.taken = None
        state.terms.clear()
        if context is None or output is None:  # no IRM, or an error is on its way
            return
        if context.deltas is None or context.touched < len(context.deltas):
            chosen = len({layer for active in context.active for layer in active.irm.layers})
            raise RealignerError(
                f"{type(decoder).__name__}: {context.touched} of {chosen} layers were given their delta; its forward does not "
                "call the modules that the IRM is attached to (was it replaced, by a faster one say?)"
            )

    def _read_input(self, _: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        context = kwargs.get(CONTEXT_KEY, self.threads.state.running)
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
            factor = context.settings.factor(active.strength.to(h0.device), h0.shape[0], h0.shape[1], context.start)
            own = active.irm(h0)
            own = (own * factor).to(own.dtype)  # rounded once, whatever the factor's shape
            for observer in (*self.observers, *context.settings.observers):
                observer(active, h0, own)
            for layer, delta in zip(active.irm.layers, own.to(h0.dtype).unbind(-2), strict=True):
                deltas[layer] = deltas[layer] + delta if layer in deltas else delta
        return deltas


def _start(settings: Settings, args: Any, kwargs: dict[str, Any]) -> int | torch.Tensor:
    """The place in its text of a forward's first token; only where settings ask for it, else 0."""
    generation = settings.generation
    if generation is None or (settings.where == "all" and all(s.dim() < 2 for s in settings.strengths.values())):
        return 0
    try:
        start: int | torch.Tensor = kwargs["past_key_values"].get_seq_length()
        if isinstance(start, torch.Tensor):
            start = start.clone()  # a static cache counts on in place
        return start
    except (KeyError, AttributeError, ValueError):  # no cache, or one that knows no length (Mamba's)
        if not kwargs.get("use_cache"):
            return 0
    seen = generation.seen
    inputs = (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args)
    generation.seen += next((value.shape[1] for value in inputs if isinstance(value, torch.Tensor)), 0)
    return seen


def refuse_attached(decoder: nn.Module) -> None:
    """Raise if a host's decoder carries an injector already: two would not know of each other's deltas."""
    if any(isinstance(getattr(hook, "__self__", None), Injector) for hook in decoder._forward_pre_hooks.values()):
        raise RealignerError("this host carries an IRM already; add another with model.add_adapter, or model.unload() it first")


class _SiteHooks:
    """The hooks of one layer: take the context on the way in if it is handed down, add the delta on the way out."""

    def __init__(self, injector: Injector, site: Site) -> None:
        self.injector = injector
        self.site = site

    def attach(self, layer: nn.Module) -> list[RemovableHandle]:
        handles = []
        if self.site.layer == 0:
            for name, _ in self.site.base:
                if name != INPUT:
                    handles.append(layer.get_submodule(name).register_forward_hook(partial(self._keep, name)))
        handles.append(layer.get_submodule(self.site.branch).register_forward_hook(self.add))
        return handles

    def take(self, _: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        if CONTEXT_KEY not in kwargs:
            return None
        self.injector.threads.state.taken = kwargs[CONTEXT_KEY]
        return args, {key: value for key, value in kwargs.items() if key != CONTEXT_KEY}

    def _keep(self, name: str, _: nn.Module, __: Any, output: Any) -> None:
        tensor = first_tensor(output)
        if tensor is not None:
            self.injector.threads.state.terms[name] = tensor

    def add(self, _: nn.Module, __: Any, output: Any) -> Any:
        # The one hook that runs in every layer for every token: kept lean.
        state = self.injector.threads.state
        context: ForwardContext | None = state.taken
        if context is not None:
            state.taken = None
        elif (context := state.running) is None:
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
        context.touched += 1
        if self.site.scale != 1.0:
            delta = delta / self.site.scale
        if delta.dtype != branch.dtype or delta.device != branch.device:
            delta = delta.to(device=branch.device, dtype=branch.dtype)
        if delta.shape != branch.shape:  # some layers flatten batch and position
            delta = delta.reshape(branch.shape)
        return replaced(output, branch + delta)

    def _deltas(self, context: ForwardContext, branch: torch.Tensor) -> dict[int, torch.Tensor]:
        x0 = context.x0
        if x0 is None:
            raise RealignerError("layer 0 ran without hidden states; the IRM has nothing to read")
        terms = {**self.injector.threads.state.terms, INPUT: x0, self.site.branch: branch}
        deltas = self.injector.fill(context, self.site.residual(lambda name: terms[name].view_as(x0)))
        if context.deltas is None:  # a recomputed layer 0 must not replace what later layers already used
            context.deltas = deltas
        return deltas
