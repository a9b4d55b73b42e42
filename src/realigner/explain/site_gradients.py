"""The loss's gradient at every site of a host."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from realigner.injection import ActiveIRM, Injector
from realigner.sites import HostSites


class _Nothing(nn.Module):
    """An IRM that adds zeros whose gradient is kept: the loss's gradient at each site is what a trained one would follow."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = tuple(range(layers))
        self.h0: torch.Tensor | None = None
        self.delta: torch.Tensor | None = None

    def forward(self, h0: torch.Tensor) -> torch.Tensor:
        self.h0 = h0.detach()
        self.delta = torch.zeros(*h0.shape[:-1], len(self.layers), h0.shape[-1], device=h0.device, requires_grad=True)
        return self.delta


class SiteGradients:
    """h0 and the loss's gradient at every site of a bare host: ``dL/d(delta) [batch, position, layer, neuron]`` at delta 0.

    Example:
        >>> from realigner.locate import find_sites
        >>> from realigner.tiny import tiny_host
        >>> host = tiny_host("llama")
        >>> with SiteGradients(find_sites(host)).watching() as gradients:
        ...     host(input_ids=torch.tensor([[1, 2, 3]])).logits.sum().backward()
        >>> gradients.at_sites.shape
        torch.Size([1, 3, 3, 32])
    """

    def __init__(self, sites: HostSites) -> None:
        self.irm = _Nothing(len(sites.layers))
        active = ActiveIRM("gradient", self.irm, torch.tensor(1.0))  # type: ignore[arg-type]
        self.injector = Injector(sites, lambda _: [active])

    @contextmanager
    def watching(self) -> Iterator[SiteGradients]:
        """Attach to the host for a block; it must be bare."""
        self.injector.attach()
        try:
            yield self
        finally:
            self.injector.detach()

    @property
    def h0(self) -> torch.Tensor:
        """What an IRM reads ``[batch, position, neuron]``."""
        assert self.irm.h0 is not None  # a forward came before
        return self.irm.h0

    @property
    def at_sites(self) -> torch.Tensor:
        """The gradients of the last backward."""
        assert self.irm.delta is not None
        assert self.irm.delta.grad is not None
        return self.irm.delta.grad
