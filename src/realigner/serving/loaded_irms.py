"""The IRMs that are served on one host, by name: loaded and unloaded while requests are under way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model
from transformers import PreTrainedModel

from realigner.errors import RealignerError, UsageError
from realigner.irm_config import IRMConfig, adapter_folder, check_adapter
from realigner.serving.mixes import Mix, check_name
from realigner.settings import NO_IRM


@dataclass
class LoadedIRM:
    """One IRM: PEFT's name for it, what a request needs to know of it, and how many requests are using it."""

    adapter: str
    strength: float
    template: str
    template_kwargs: Mapping[str, Any]
    users: int = 0
    gone: bool = False  # its name is free, and it leaves when its last request does


@dataclass(frozen=True)
class RequestIRMs:
    """The IRMs of one request, held until `LoadedIRMs.give_back`.

    Attributes:
        irms: PEFT's names of those that act, as `batching.BatchManager.add_request` takes them.
        strength: PEFT's name -> strength.
        template: how the prompt is put to them.
        template_kwargs: variables of the chat template that they were trained with.
    """

    irms: str | tuple[str, ...]
    strength: dict[str, float]
    template: str
    template_kwargs: Mapping[str, Any]
    held: tuple[LoadedIRM, ...] = field(default=(), repr=False)


class LoadedIRMs:
    """IRMs by name on a host, none at first. One thread calls its methods, but for `read` and `drop`.

    Args:
        host: to be served; an IRM that never acts is put on it, so that the hooks are there whatever comes and goes.

    Attributes:
        model: the host with its IRMs.
    """

    def __init__(self, host: PreTrainedModel) -> None:
        idle = IRMConfig(preset="compact", widths=(1,), rank=1, input_scale=1.0, delta_scale=1.0)
        self.model: PeftModel = get_peft_model(host, idle, adapter_name="idle")
        self._served: dict[str, LoadedIRM] = {}
        self._numbers = count()

    @property
    def strengths(self) -> dict[str, float]:
        """IRM -> the strength at which it acts when a request names none."""
        return {name: served.strength for name, served in dict(self._served).items()}  # transformers lists it in a thread

    def check_new(self, name: str) -> None:
        """Raise UsageError unless an IRM can be loaded under this name."""
        if check_name(name) in self._served:
            raise UsageError(f"irm: {name!r} is loaded already; unload it first, or give another name")

    def read(self, folder: Path) -> LoadedIRM:
        """Put an IRM's weights on the host, without a name yet; no forward may run meanwhile.

        Raises:
            RealignerError: when it is damaged, or was made for another host; the host is as before.
        """
        config = check_adapter(folder)
        if config.get("modules_to_save"):
            raise RealignerError(f"{folder}: it replaces modules of the host (modules_to_save), for every request; not served")
        adapter = f"served_{next(self._numbers)}"
        self.model.load_adapter(str(adapter_folder(folder)), adapter_name=adapter)
        variables = config.get("chat_template_kwargs") or {}
        return LoadedIRM(adapter, float(config.get("strength", 1.0)), str(config.get("template", "chat")), variables)

    def put(self, name: str, served: LoadedIRM) -> None:
        """Give an IRM that was `read` its name.

        Raises:
            UsageError: when the name is taken, or none to serve by.
        """
        self.check_new(name)
        self._served[name] = served

    def unload(self, name: str) -> str | None:
        """Take an IRM's name away; returns the adapter that may be `drop`ped now, None while requests use it.

        Raises:
            UsageError: when no IRM of this name is loaded.
        """
        if name not in self._served:
            raise UsageError(f"irm: {name[:80]!r} is not loaded; loaded are {', '.join(sorted(self._served)) or 'none'}")
        served = self._served.pop(name)
        served.gone = True
        return None if served.users else served.adapter

    def drop(self, adapter: str) -> None:
        """Forget the weights of an IRM that was unloaded; no forward may run meanwhile."""
        self.model.delete_adapter(adapter)

    def take(self, mix: Mix) -> RequestIRMs:
        """The IRMs of a request, which stay until they are given back.

        Raises:
            UsageError: when one is not loaded, or they were trained with different templates.
        """
        for name in mix.strengths:
            if name not in self._served:
                raise UsageError(f"irms: IRM {name!r} is not loaded")
        named = [self._served[name] for name in mix.strengths]
        template, variables = ("chat", {}) if not named else (named[0].template, named[0].template_kwargs)
        if any((one.template, one.template_kwargs) != (template, variables) for one in named):
            raise UsageError("irms: they were trained with different prompt templates; ask them in separate requests")
        held = tuple(self._served[name] for name in mix.acting)
        for one in held:
            one.users += 1
        strength = dict(zip((one.adapter for one in held), mix.acting.values(), strict=True))
        return RequestIRMs(tuple(strength) or NO_IRM, strength, template, variables, held)

    def give_back(self, taken: RequestIRMs) -> list[str]:
        """End a request's hold on its IRMs; returns the adapters that may be `drop`ped now."""
        for one in taken.held:
            one.users -= 1
        return [one.adapter for one in taken.held if one.gone and not one.users]
