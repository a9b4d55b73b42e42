"""The residual stream at every site of a host: as tensors of a forward, and how large it is.

Residual streams differ a thousandfold in size between hosts, and between the layers of one. What an IRM adds is scaled by it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from realigner.hosts import text_config
from realigner.probe import as_in_evaluation, first_hidden, first_tensor
from realigner.sites import INPUT, HostSites, Site

_TOKENS = 64  # that sizes are measured over
_DOSE = 2.26  # of deltas of 1 (see `delta_scale`); so SmolLM2, on which recipes were tuned before, has a scale of 1
_DOSE_BY_LAYER = 1.211  # the same (see `delta_scales`); so the root mean square of SmolLM2's scales is 1
_POWER = 0.5  # of a layer's residual size that its deltas are scaled by


class Residuals:
    """Residuals of the current forward, layer by layer ``[batch, position, neuron]``, by the site's arithmetic.

    Example:
        >>> from realigner.locate import find_sites
        >>> from realigner.tiny import tiny_host
        >>> host = tiny_host("llama")
        >>> with Residuals(find_sites(host)).watching() as residuals:
        ...     _ = host(input_ids=torch.tensor([[1, 2, 3]]))
        >>> residuals.layers[0].shape
        torch.Size([1, 3, 32])
    """

    def __init__(self, sites: HostSites) -> None:
        self.sites = sites
        self.layers: dict[int, torch.Tensor] = {}

    @contextmanager
    def watching(self) -> Iterator[Residuals]:
        """Record the forwards of a block; only the last is kept."""
        with ExitStack() as stack:
            for site, layer in zip(self.sites.sites, self.sites.layers, strict=True):
                # PEFT may have put a layer of its own around it (ShadowPEFT), which is given more than a tensor.
                self._watch(stack, site, layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer)
            yield self

    def _watch(self, stack: ExitStack, site: Site, layer: nn.Module) -> None:
        terms: dict[str, torch.Tensor] = {}

        def begin(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            hidden = first_hidden(args, kwargs)
            assert hidden is not None  # the probe refuses layers that are given none
            terms[INPUT] = hidden.detach()

        def keep(name: str) -> Any:
            def hook(_: nn.Module, __: Any, output: Any) -> None:
                tensor = first_tensor(output)
                if tensor is not None:
                    terms[name] = tensor.detach()

            return hook

        def end(_: nn.Module, __: Any, ___: Any) -> None:
            x = terms[INPUT]
            self.layers[site.layer] = site.residual(lambda name: terms[name].view_as(x))
            terms.clear()

        # Hooks of the layer itself: whatever is between its begin and its end has been kept by then.
        stack.callback(layer.register_forward_pre_hook(begin, with_kwargs=True).remove)
        for name in {site.branch, *(name for name, _ in site.base if name != INPUT)}:
            stack.callback(layer.get_submodule(name).register_forward_hook(keep(name)).remove)
        stack.callback(layer.register_forward_hook(end).remove)


def residual_sizes(host: nn.Module, sites: HostSites) -> list[float]:
    """The root mean square of the residual at each site: the median over 64 tokens, drawn from a seed of their own.

    The median, because a few tokens (the first, often) carry residuals a hundred times as large as the others. On text the
    sizes are within a third of those on random tokens (measured on SmolLM2). Zeros where a size is not a finite number.

    Args:
        host: bare, or with IRMs that are switched off; it is left as it was.
        sites: its sites.
    """
    config = text_config(host)
    count = min(_TOKENS, _positions(config))
    ids = torch.randint(int(config.vocab_size), (1, count), generator=torch.Generator().manual_seed(0))
    device = next(host.parameters()).device
    with ExitStack() as stack:
        for context in (as_in_evaluation(host), torch.no_grad(), _without_tuners(host)):
            stack.enter_context(context)
        for kind in {"cpu", device.type} - {"meta"}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        residuals = stack.enter_context(Residuals(sites).watching())
        sites.decoder(input_ids=ids if device.type == "meta" else ids.to(device), use_cache=False)
    states = [residuals.layers[layer].float() for layer in range(len(sites.layers))]
    sizes = [0.0 if state.is_meta else float(state.square().mean(dim=-1).sqrt().median()) for state in states]
    return [size if math.isfinite(size) else 0.0 for size in sizes]


@contextmanager
def _without_tuners(host: nn.Module) -> Iterator[None]:
    """Switch off what PEFT has put into a host (LoRA): an IRM is made for the host without it, as its fingerprint is."""
    layers = [(module, module._disable_adapters) for module in host.modules() if isinstance(module, BaseTunerLayer)]
    layers = [(layer, off) for layer, off in layers if not getattr(layer, "merged", False)]  # which would be unmerged for good
    try:
        for layer, _ in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer, off in layers:
            layer._disable_adapters = off


def _positions(config: Any) -> int:
    """Positions that a host has for certain: of few, some are not for tokens (RoBERTa counts from after padding's id)."""
    named = [getattr(config, name, None) for name in ("max_position_embeddings", "max_target_positions", "max_seq_len")]
    positions = min((value for value in named if isinstance(value, int) and value > 0), default=2 * _TOKENS)
    return positions if positions >= 2 * _TOKENS else max(1, positions // 2)


def delta_scale(sizes: Sequence[float], layers: Sequence[int]) -> float:
    """What deltas are multiplied by, so that equal steps of training move hosts of all kinds by like amounts.

    A delta stays in the residual stream, so a site's has been moved by the deltas of all chosen layers up to it: with deltas of
    1 everywhere, by ``n / size`` in units of its own size, n being the number of those layers. The scale is `_DOSE` over the
    root mean square of that over the sites from the first chosen layer on. So a host whose stream is multiplied by c has c
    times the scale.

    Args:
        sizes: of the residual at each site (`residual_sizes`).
        layers: the chosen ones.

    Example:
        >>> round(delta_scale([2.0] * 4, range(4)) / delta_scale([1.0] * 4, range(4)), 6)
        2.0
    """
    total = _moved(sizes, layers, [1.0] * len(sizes))
    return _DOSE / total if total > 0 else 1.0


def delta_scales(sizes: Sequence[float], layers: Sequence[int]) -> list[float]:
    """What the deltas of each chosen layer are multiplied by: the square root of its residual's size, times one number.

    With one scale for all, late layers, whose residuals are large, hardly learn; in units of each layer's residual they
    learn too much. The number is chosen as in `delta_scale`, by how far all deltas together move the stream, so a host whose
    stream is multiplied by c has c times the scales.

    Args:
        sizes: of the residual at each site (`residual_sizes`).
        layers: the chosen ones.

    Example:
        >>> early, late = delta_scales([0.25, 4.0], [0, 1])
        >>> round(late / early, 6)
        4.0
    """
    known = [size for size in sizes if size > 0]
    usual = float(statistics.median(known)) if known else 1.0
    own = [(size if size > 0 else usual) ** _POWER for size in sizes]
    total = _moved(sizes, layers, own)
    return [_DOSE_BY_LAYER / total * own[layer] if total > 0 else 1.0 for layer in layers]


def _moved(sizes: Sequence[float], layers: Sequence[int], deltas: Sequence[float]) -> float:
    """How far deltas of these sizes, by layer, move the stream in units of its own size: a root mean square over the sites."""
    reached = range(min(layers), len(sizes))
    moved = [sum(deltas[layer] for layer in layers if layer <= site) / sizes[site] for site in reached if sizes[site] > 0]
    return math.sqrt(sum(one * one for one in moved) / max(1, len(moved)))
