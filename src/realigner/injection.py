"""Put IRM deltas into a host's forward pass, exactly.

The contract:

1. Nothing of the host is replaced or changed: hooks are registered, and `Injector.detach` removes them all.
2. ``residual = x + branch`` becomes ``x + (branch + delta)`` (docs/design/site.md): no tensor is modified in
   place, the same form works for parallel layers, and with a delta of zero the output is bit-identical.
3. Each forward has a `ForwardContext` of its own, which holds its deltas and the settings that it began with. The thread keeps
   the context (`settings.ThreadState`) until the forward ends, normally or by an error. A checkpointed layer is recomputed
   under the context of its own forward (`_Checkpointing`), whatever has run since.
4. All deltas are computed once per forward, at layer 0; the other layers only add theirs.
5. It is an error if fewer layers than chosen were given their delta by the end of a forward: something kept hooks from running.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from realigner.errors import RealignerError, UsageError
from realigner.irm import IRM
from realigner.probe import first_hidden, first_tensor, replaced
from realigner.settings import Generation, Settings, Threads
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
        start: position in its text of this forward's first token.
        tokens: how many tokens the decoder was given; None where settings do not tell one from another.
        x0: layer 0's input ``[batch, position, neuron]``, kept to compute h0.
        terms: module name -> output, for the modules of layer 0 whose outputs are summed into its residual.
        deltas: layer -> summed, scaled delta ``[batch, position, neuron]``; None until layer 0's site ran.
        touched: how many layers were given their delta so far.
        observers: called with what each IRM reads and adds.
        grad_enabled: whether gradients were recorded when the forward began.
    """

    __slots__ = ("active", "deltas", "grad_enabled", "observers", "settings", "start", "terms", "tokens", "touched", "x0")

    def __init__(self, active: Sequence[ActiveIRM], settings: Settings, observers: Sequence[Observer] = ()) -> None:
        self.active = active
        self.settings = settings
        self.observers = observers
        self.start: int | torch.Tensor = 0
        self.tokens: int | None = None
        self.x0: torch.Tensor | None = None
        self.terms: dict[str, torch.Tensor] = {}
        self.deltas: dict[int, torch.Tensor] | None = None
        self.touched = 0
        self.grad_enabled = torch.is_grad_enabled()


class Injector:
    """Hooks on a host that add the deltas of the active IRMs to its residual stream.

    Args:
        sites: the host's injection sites, found and proven by `locate.find_sites`.
        active: called with the settings at the start of every forward; returns the IRMs that take part. If it returns none,
            the bare host runs.
        default: the settings of a call that does not set its own.

    Attributes:
        threads: the settings of each thread.
        observers: called as ``observer(active, h0, delta)`` with what each IRM reads ``[batch, position, neuron]``
            and what it adds, strength included: delta ``[batch, position, layer, neuron]`` over the layers of
            ``active.irm``. Observers for a single call are part of its settings instead. One with a true attribute
            ``in_loss`` is called again when a checkpointed layer 0 is recomputed, which takes the same operations.
    """

    def __init__(
        self, sites: HostSites, active: Callable[[Settings], Sequence[ActiveIRM]], default: Settings | None = None
    ) -> None:
        self.sites = sites
        self.active = active
        self.observers: list[Observer] = []
        self.threads = Threads(Settings() if default is None else default)
        self._handles: list[RemovableHandle] = []
        self._hooked: list[tuple[nn.Module, str, nn.Module]] = []
        self._thawed: list[nn.Parameter] = []

    def freeze(self, host: nn.Module) -> None:
        """Stop gradients to a host's weights, until `detach`."""
        self._thawed = [weight for weight in host.parameters() if weight.requires_grad]
        host.requires_grad_(False)

    def attach(self) -> None:
        """Register the hooks: two on the decoder, one on layer 0, one on each layer."""
        if "torch._dynamo" in sys.modules:  # what was compiled before would go on without them (transformers keeps such a call
            torch._dynamo.reset()  # for static caches)
        decoder, layers = self.sites.decoder, self.sites.layers
        self._handles.append(decoder.register_forward_pre_hook(self._begin, with_kwargs=True))
        self._handles.append(decoder.register_forward_hook(self._end, always_call=True))
        self._handles.append(layers[0].register_forward_pre_hook(self._read_input, with_kwargs=True))
        for site, layer in zip(self.sites.sites, layers, strict=True):
            hooks = _SiteHooks(self, site).on(layer)
            self._handles += [module.register_forward_hook(hook) for module, hook in hooks.values()]
            self._hooked += [(layer, name, module) for name, (module, _) in hooks.items()]

    def detach(self) -> None:
        """Remove every hook; the host is as it was before `freeze` and `attach`."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._hooked.clear()
        for weight in self._thawed:
            weight.requires_grad_(True)
        self._thawed.clear()
        for module, key, function in _checkpointing_functions(self.sites.decoder):
            if isinstance(function, _Checkpointing) and function.threads is self.threads:
                setattr(module, key, function.function)

    def replaced_modules(self) -> list[tuple[str, nn.Module]]:
        """What stands in the place of modules that hooks are on, if it is not these: names in their layers, and modules."""
        found = [(name, layer.get_submodule(name), hooked) for layer, name, hooked in self._hooked]
        return [(name, module) for name, module, hooked in found if module is not hooked]

    def follow_checkpointing(self) -> None:
        """Make checkpointed layers recompute under the context of their own forward.

        Runs automatically before every forward with gradients. A compiled forward does not run it: call it before the first.
        """
        for module, key, function in _checkpointing_functions(self.sites.decoder):
            if not isinstance(function, _Checkpointing):
                setattr(module, key, _Checkpointing(self.threads, function))

    def _begin(self, decoder: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        state = self.threads.state
        state.running = None  # left by a forward that Ctrl-C ended
        settings = state.settings
        active = self.active(settings)
        if not active:
            return
        state.began = True
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self.follow_checkpointing()
            if self.sites.random_in_training and any(one.irm.training for one in active):
                self._refuse_random(decoder)
        state.running = context = ForwardContext(active, settings, (*self.observers, *settings.observers))
        if settings.by_token:
            inputs = (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args)
            context.tokens = next((value.shape[1] for value in inputs if isinstance(value, torch.Tensor)), None)
            context.start = _start(settings.generation, context.tokens or 0, kwargs)

    def _refuse_random(self, decoder: nn.Module) -> None:
        if any(getattr(module, "gradient_checkpointing", False) for module in decoder.modules()):
            raise RealignerError(
                f"{type(decoder).__name__}: its layers drop activations at random (dropout) when they are checkpointed, and "
                "parts of the deltas with them; turn gradient checkpointing off"
            )

    def _end(self, decoder: nn.Module, _: Any, output: Any) -> None:
        state = self.threads.state
        context, state.running = state.running, None
        if context is None or output is None:  # no IRM, or an error is on its way
            return
        if context.deltas is None or context.touched < len(context.deltas):
            chosen = len({layer for active in context.active for layer in active.irm.layers})
            raise RealignerError(
                f"{type(decoder).__name__}: {context.touched} of {chosen} layers were given their delta; its forward does not "
                "call the modules that the IRM is attached to (was its forward patched, by a library of fused kernels say?)"
            )

    def _read_input(self, _: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        context = self.threads.state.running
        if context is not None:
            context.x0 = first_hidden(args, kwargs)

    def refuse_recomputed(self, layer: int) -> None:
        """Raise if a layer without a context is being recomputed by a checkpointing that `_Checkpointing` does not know."""
        recomputed = not torch.compiler.is_compiling() and torch._C._current_graph_task_id() >= 0  # within a backward pass
        if recomputed and self.active(self.threads.state.settings):
            raise RealignerError(
                f"layer {layer} is recomputed by a checkpointing that an IRM cannot follow; use the host's own "
                "(gradient_checkpointing_enable), or PyTorch's CheckpointWrapper"
            )

    def fill(self, context: ForwardContext, h0: torch.Tensor) -> dict[int, torch.Tensor]:
        """Compute the deltas of all layers from ``h0 [batch, position, neuron]``: summed over IRMs, in h0's dtype."""
        if context.grad_enabled and not torch.is_grad_enabled():
            raise RealignerError(
                "reentrant gradient checkpointing gives an IRM wrong gradients; use "
                "gradient_checkpointing_kwargs={'use_reentrant': False}"
            )
        if context.tokens not in (None, h0.shape[1]) and not context.settings.packed:
            raise UsageError(
                f"where and strengths for each token do not work here: for {context.tokens} tokens the host's layers have "
                f"{h0.shape[1]} positions"
            )
        recomputed = context.deltas is not None
        deltas: dict[int, torch.Tensor] = {}
        for active in context.active:
            factor = context.settings.factor(active.strength.to(h0.device), h0.shape[0], h0.shape[1], context.start)
            own = active.irm(h0)
            own = (own * factor).to(own.dtype)  # rounded once, whatever the factor's shape
            for observer in context.observers:
                if not recomputed or getattr(observer, "in_loss", False):
                    observer(active, h0, own)
            for layer, delta in zip(active.irm.layers, own.to(h0.dtype).unbind(-2), strict=True):
                deltas[layer] = deltas[layer] + delta if layer in deltas else delta
        return deltas


def _start(generation: Generation | None, tokens: int, kwargs: dict[str, Any]) -> int | torch.Tensor:
    """The place in its text of the first of a forward's tokens."""
    if generation is None:
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
    generation.seen += tokens
    return seen


def attached_injectors(host: nn.Module) -> list[Injector]:
    """The injectors whose hooks are on a host."""
    hooks = [hook for module in host.modules() for hook in module._forward_pre_hooks.values()]
    found = {id(owner): owner for hook in hooks if isinstance(owner := getattr(hook, "__self__", None), Injector)}
    return list(found.values())


def refuse_attached(host: nn.Module) -> None:
    """Raise if a host carries an injector already: two would not know of each other's deltas."""
    if attached_injectors(host):
        raise RealignerError(
            "this host carries an IRM already; add another with model.add_adapter, or take it off first (realigner.unload)"
        )


class _Checkpointing:
    """A host's checkpointing function, with what it recomputes put under the context of the forward that it belongs to.

    Args:
        threads: of the injector.
        function: called as ``function(layer_forward, *args)``; runs it now, and again in the backward pass.
    """

    def __init__(self, threads: Threads, function: Callable[..., Any]) -> None:
        self.threads = threads
        self.function = function

    def __call__(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        context = self.threads.state.running
        return self.function(forward if context is None else partial(self._within, context, forward), *args, **kwargs)

    def _within(self, context: ForwardContext, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        state = self.threads.state  # of the thread that recomputes: on a GPU, autograd's
        before, state.running = state.running, context
        try:
            return forward(*args, **kwargs)
        finally:  # a recomputation often stops halfway, by an exception
            state.running = before


def _checkpointing_functions(decoder: nn.Module) -> Iterator[tuple[nn.Module, str, Any]]:
    """The modules of a decoder that checkpoint, the attribute that holds the function, and the function."""
    for module in decoder.modules():
        for key in ("_gradient_checkpointing_func", "checkpoint_fn"):  # transformers'; PyTorch's CheckpointWrapper (FSDP)
            if callable(function := vars(module).get(key)):
                yield module, key, function


class _SiteHooks:
    """The hooks of one layer: keep what its residual is the sum of (layer 0), add the delta."""

    def __init__(self, injector: Injector, site: Site) -> None:
        self.injector = injector
        self.site = site

    def on(self, layer: nn.Module) -> dict[str, tuple[nn.Module, Callable[..., Any]]]:
        """The modules to hook, by name in the layer, and the hook of each."""
        kept = [name for name, _ in self.site.base if name != INPUT] if self.site.layer == 0 else []
        hooks = {name: partial(self._keep, name) for name in kept} | {self.site.branch: self.add}
        return {name: (layer.get_submodule(name), hook) for name, hook in hooks.items()}

    def _keep(self, name: str, _: nn.Module, __: Any, output: Any) -> None:
        context, tensor = self.injector.threads.state.running, first_tensor(output)
        if context is not None and tensor is not None:
            context.terms[name] = tensor

    def add(self, _: nn.Module, __: Any, output: Any) -> Any:
        # The one hook that runs in every layer for every token: kept lean.
        context: ForwardContext | None = self.injector.threads.state.running
        if context is None:
            self.injector.refuse_recomputed(self.site.layer)
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
        terms = {**context.terms, INPUT: x0, self.site.branch: branch}
        deltas = self.injector.fill(context, self.site.residual(lambda name: terms[name].view_as(x0)))
        if context.deltas is None:  # a recomputed layer 0 must not replace what later layers already used
            context.deltas = deltas
        return deltas
