"""The IRMs that are on one host: by name, which are active, at what strength, and for which rows of a batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from realigner.errors import UsageError
from realigner.injection import ActiveIRM
from realigner.irm import IRM

NO_IRM = "__base__"  # PEFT's word for a row without an adapter
Strength = float | Sequence[float] | torch.Tensor | Mapping[str, float | Sequence[float] | torch.Tensor]


class IRMBank(nn.Module, BaseTunerLayer):
    """The IRMs of one host by adapter name, and the strength of each; in PEFT's words, the tuner's one layer."""

    adapter_layer_names = ("networks",)
    other_param_names = ("strengths",)
    _disable_adapters: bool = False

    def __init__(self) -> None:
        super().__init__()
        self.networks = nn.ModuleDict()
        self.strengths = BufferDict(persistent=False)
        self.rows: dict[str, torch.Tensor] | None = None  # adapter_names=: for each IRM, 1 in the rows that it is for
        self._active_adapter: list[str] = []
        self.merged_adapters: list[str] = []

    @property
    def names(self) -> list[str]:
        """The active IRMs by name (also while they are switched off)."""
        active: str | list[str] = self._active_adapter
        return [active] if isinstance(active, str) else list(active)

    def active(self) -> list[ActiveIRM]:
        """The IRMs that take part in the next forward."""
        if self._disable_adapters:
            return []
        if self.rows is not None:
            return [ActiveIRM(name, self.network(name), self.strengths[name] * mask) for name, mask in self.rows.items()]
        return [ActiveIRM(name, self.network(name), self.strengths[name]) for name in self.names]

    @contextmanager
    def scaled(self, values: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Give IRMs another strength (a scalar, or one number a row) within a block."""
        before = {name: (self.strengths[name], self.strengths[name].clone()) for name in values}
        try:
            for name, value in values.items():
                if value.shape == self.strengths[name].shape:
                    self.strengths[name].copy_(value)  # the same tensor: a compiled forward does not notice
                else:
                    self.strengths[name] = value.to(self.strengths[name])
            yield
        finally:
            for name, (tensor, value) in before.items():
                if name in self.networks:
                    self.strengths[name] = tensor.copy_(value)

    @contextmanager
    def by_row(self, names: Sequence[str | tuple[str, ...]]) -> Iterator[None]:
        """Give each row of the batch its own IRMs within a block; see `IRMModel`."""
        rows = [[] if name == NO_IRM else [name] if isinstance(name, str) else list(name) for name in names]
        for name in {name for row in rows for name in row}:
            if name not in self.networks:
                raise UsageError(f"adapter_names: {name!r} is not loaded; loaded are {', '.join(self.networks)}, or {NO_IRM}")
        device = next(iter(self.strengths.values())).device
        chosen = [name for name in self.networks if any(name in row for row in rows)]
        before = self.rows
        self.rows = {name: torch.tensor([float(name in row) for row in rows], device=device) for name in chosen}
        try:
            yield
        finally:
            self.rows = before

    def network(self, name: str) -> IRM:
        network = self.networks[name]
        assert isinstance(network, IRM)
        return network

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Nothing to do: PEFT asks after loading, and the weights were loaded onto the bank's device."""


def strength_tensors(bank: IRMBank, value: Strength, adapter: str | None) -> dict[str, torch.Tensor]:
    """A checked tensor for each IRM that is to be scaled."""
    if isinstance(value, Mapping):
        if adapter is not None:
            raise UsageError("strength: give either a mapping or adapter=, not both")
        given = dict(value)
    else:
        names = list(bank.rows or bank.names) if adapter is None else [adapter]
        given = dict.fromkeys(names, value)
    for name in given:
        if name not in bank.networks:
            raise UsageError(f"strength: adapter {name!r} is not loaded; loaded are {', '.join(bank.networks)}")
    return {name: _strength_tensor(number) for name, number in given.items()}


def _strength_tensor(value: Any) -> torch.Tensor:
    try:
        tensor = torch.as_tensor(value, dtype=torch.float32).detach()
    except (TypeError, ValueError, RuntimeError):
        tensor = torch.tensor(float("nan"))
    if isinstance(value, bool) or tensor.dim() > 1 or tensor.numel() == 0 or not bool((tensor.abs() <= 1000).all()):
        raise UsageError(f"strength: {value!r} is not a number between -1000 and 1000, or a list with one for each row")
    return tensor
