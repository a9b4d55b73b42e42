"""The injection site of a decoder layer as data: which modules make its post-attention residual, and with which weights.

Nothing here runs a model or registers a hook, so that any engine can use it: `locate.find_sites` finds and proves sites on a
transformers model, `injection` adds deltas there, and an adapter's config carries them (`HostSites.summary`, `read_sites`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from realigner.errors import RealignerError

INPUT = ""  # in a residual's base: the layer's input
PLAIN_BASE = ((INPUT, 1.0),)


@dataclass(frozen=True)
class Site:
    """The place in one layer where a delta joins the residual stream.

    The residual is ``sum(weight * base) + scale * branch``; for most hosts simply the layer's input plus the branch.

    Attributes:
        kind: ``"sequential"``: a later module (the reader) reads the residual, and so does all that follows. ``"parallel"``:
            the layer's output is ``residual + scale * other``, where the other branch does not read the residual (GPT-NeoX,
            Phi). ``"single"``: the layer has one branch (Mamba) and the residual is its output.
        base: the terms of the residual other than the branch, as pairs (`INPUT` or the name of a module of the layer, weight).
        branch: the module whose output completes the residual; the delta is added to that output.
        scale: the branch's weight in the residual (1, except in Granite and similar models); a delta is divided by it.
        reader: the module that reads the residual; empty unless sequential.
        which: which of the reader's tensor inputs it is.
        other: the second branch of a parallel layer.
        layer: index of the layer.

    Example:
        >>> site = Site("sequential", PLAIN_BASE, "self_attn", 1.0, "post_attention_layernorm")
        >>> site.residual({INPUT: torch.ones(2), "self_attn": torch.ones(2)}.get)
        tensor([2., 2.])
    """

    kind: str
    base: tuple[tuple[str, float], ...]
    branch: str
    scale: float
    reader: str = ""
    which: int = 0
    other: str = ""
    layer: int = 0

    @property
    def terms(self) -> tuple[tuple[str, float], ...]:
        """All terms of the residual with their weights, the branch last."""
        return (*self.base, (self.branch, self.scale))

    def residual(self, output: Callable[[str], torch.Tensor]) -> torch.Tensor:
        """The residual ``[batch, position, neuron]``, summed in the order in which the layer sums it.

        Args:
            output: gives the output of a module of the layer by name, and the layer's input for `INPUT`.
        """
        total: torch.Tensor | None = None
        for name, weight in self.terms:
            term = output(name) if weight == 1.0 else weight * output(name)
            total = term if total is None else total + term
        assert total is not None  # there is a branch
        return total


@dataclass(frozen=True)
class HostSites:
    """The injection sites of a host.

    Attributes:
        decoder: the module that runs the layers.
        layers: the decoder's layers.
        path: name of the layers' module list within the host.
        width: width of the residual stream.
        sites: one site per layer.
        random_in_training: whether the decoder or a layer applies dropout of its own in training mode (OPT, BART). Gradient
            checkpointing requires that mode.
    """

    decoder: nn.Module
    layers: nn.ModuleList
    path: str
    width: int
    sites: tuple[Site, ...]
    random_in_training: bool = False

    def summary(self) -> dict[str, Any]:
        """The sites as JSON for an adapter's config; one value where all layers agree, else a list."""
        found: dict[str, Any] = {"layers": self.path}
        for key in ("branch", "kind", "scale", "reader"):
            values = [getattr(site, key) for site in self.sites]
            found[key] = values[0] if len(set(values)) == 1 else values
        if any(site.base != PLAIN_BASE for site in self.sites):
            found["base"] = [{name: round(weight, 6) for name, weight in site.base} for site in self.sites]
        return found


def read_sites(summary: Mapping[str, Any], num_layers: int) -> tuple[Site, ...]:
    """The sites that `HostSites.summary` describes, for engines that do not run our probe.

    Raises:
        RealignerError: when the summary lacks a key, or has another number of layers.

    Example:
        >>> summary = {"layers": "model.layers", "branch": "self_attn", "kind": "sequential", "scale": 1.0, "reader": "mlp"}
        >>> read_sites(summary, 2)[1].reader
        'mlp'
    """

    def of_layer(key: str, layer: int) -> Any:
        value = summary[key]
        return value[layer] if isinstance(value, list) else value

    try:
        bases = [tuple(base.items()) for base in summary.get("base", [dict(PLAIN_BASE)] * num_layers)]
        if len(bases) != num_layers:
            raise IndexError
        return tuple(
            Site(
                of_layer("kind", n),
                bases[n],
                of_layer("branch", n),
                float(of_layer("scale", n)),
                of_layer("reader", n),
                layer=n,
            )
            for n in range(num_layers)
        )
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise RealignerError(f"site: not a description of {num_layers} layers ({type(error).__name__}: {error})") from None
