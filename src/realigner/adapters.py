"""The IRMs that are on one host, by name, and which of them take part in a call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from realigner.errors import UsageError
from realigner.injection import ActiveIRM
from realigner.irm import IRM
from realigner.settings import NO_IRM, Settings, Strength, Where, check_strength, check_where


class AdapterRegistry(nn.Module, BaseTunerLayer):
    """The IRMs of one host by adapter name; in PEFT's words, the tuner's one layer.

    Args:
        default: the settings of a call that sets none; in them the registry keeps a strength of 1 for each of its IRMs.
    """

    adapter_layer_names = ("networks",)
    _disable_adapters: bool = False

    def __init__(self, default: Settings) -> None:
        super().__init__()
        self.networks = nn.ModuleDict()
        self.default = default
        self._active_adapter: list[str] = []
        self.merged_adapters: list[str] = []

    @property
    def names(self) -> list[str]:
        """The active IRMs by name (also while they are switched off)."""
        active: str | list[str] = self._active_adapter
        return [active] if isinstance(active, str) else list(active)

    def add(self, name: str, network: IRM, device: torch.device) -> None:
        """Keep an IRM under a name, at strength 1."""
        self.networks[name] = network
        self.default.strengths[name] = torch.ones((), device=device)

    def network(self, name: str) -> IRM:
        self.check_loaded("adapter", name)  # a generation may name one that was deleted since it began
        network = self.networks[name]
        assert isinstance(network, IRM)
        return network

    def active(self, settings: Settings) -> list[ActiveIRM]:
        """The IRMs that take part in a forward with these settings."""
        names = self.enabled() if settings.irms is None else settings.irms
        rows = settings.rows if names else None
        strengths = {**self.default.strengths, **settings.strengths}
        if rows is None:
            return [ActiveIRM(name, self.network(name), strengths[name]) for name in names]
        return [ActiveIRM(name, self.network(name), _times(strengths[name], mask)) for name, mask in rows.items()]

    def enabled(self) -> tuple[str, ...]:
        """The active IRMs by name; none while they are switched off."""
        return () if self._disable_adapters else tuple(self.names)

    def settings(
        self,
        current: Settings,
        strength: Strength | None = None,
        where: Where | None = None,
        rows: Sequence[str | tuple[str, ...]] | None = None,
        adapter: str | None = None,
    ) -> Settings:
        """The current settings with some changed; see `tuner.strength` and `tuner.IRMModel`.

        Raises:
            UsageError: for a value out of range, or an IRM that is not loaded.
        """
        if strength is not None:
            if isinstance(strength, Mapping) and adapter is not None:
                raise UsageError("strength: give either a mapping or adapter=, not both")
            chosen = self.networks if adapter is None else [adapter]
            named = strength if isinstance(strength, Mapping) else dict.fromkeys(chosen, strength)
            for name in named:
                self.check_loaded("strength: adapter", name)
            device = next(iter(self.default.strengths.values())).device
            strengths = {name: check_strength(value, device) for name, value in named.items()}
            current = replace(current, strengths={**current.strengths, **strengths})
        if where is not None:
            current = replace(current, where=check_where(where))
        return current if rows is None else replace(current, rows=self._masks(rows))

    def _masks(self, rows: Sequence[str | tuple[str, ...]]) -> dict[str, torch.Tensor]:
        """IRM -> 1 in the rows that name it, of shape [row]."""
        if isinstance(rows, str):
            raise UsageError("adapter_names: give a list with an entry for each row of the batch, or use set_adapter")
        chosen = [[] if row == NO_IRM else [row] if isinstance(row, str) else list(row) for row in rows]
        for name in {name for row in chosen for name in row}:
            self.check_loaded("adapter_names:", name)
        device = next(iter(self.default.strengths.values())).device
        names = [name for name in self.networks if any(name in row for row in chosen)]
        return {name: torch.tensor([float(name in row) for row in chosen], device=device) for name in names}

    def check_loaded(self, what: str, name: str) -> None:
        """Raise UsageError, with `what` before the name, unless an IRM of this name is loaded."""
        if name not in self.networks:
            raise UsageError(f"{what} {name!r} is not loaded; loaded are {', '.join(self.networks) or 'none'}")

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        # Strengths follow the IRMs from device to device, but keep their precision.
        for name, value in self.default.strengths.items():
            device = value.device if value.is_meta else fn(value).device
            if device != value.device:
                with torch.inference_mode(False):  # tensors made in that mode could not take part in training
                    self.default.strengths[name] = torch.ones((), device=device)
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move an IRM to where its strength is: PEFT asks after loading, which leaves buffers and its own choice of device."""
        self.networks[adapter_name].to(self.default.strengths[adapter_name].device)


def _times(strength: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """A strength of shape [], [row] or [row, position], 0 in the rows that a mask ``[row]`` leaves out."""
    if strength.dim() > 0 and len(strength) != len(mask):
        raise UsageError(f"strength: {len(strength)} given, but adapter_names has {len(mask)} rows")
    return strength * (mask if strength.dim() < 2 else mask[:, None])
