"""Which IRMs act on a request and how strongly: in a model's name (``smollm2+anger@0.7``) or in the field ``irms``.

One grammar for every engine. It needs neither torch nor transformers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from realigner.errors import UsageError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_MOST = 1000.0  # of a strength, either way (settings.check_strength)


class NotServedError(UsageError):
    """A request names a host or an IRM that is not served: over HTTP a 404, where other mistakes are a 400."""


@dataclass(frozen=True)
class Mix:
    """IRMs with their strengths; none of them is the bare host.

    Attributes:
        strengths: IRM -> strength, sorted by name. At 0 an IRM does not act; the prompt is put as to it all the same.

    Example:
        >>> Mix.of({"sadness": -0.5, "anger": 0.7, "joy": 0}).name("host")
        'host+anger@0.7+joy@0+sadness@-0.5'
    """

    strengths: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, strengths: Mapping[str, float]) -> Mix:
        """A mix of IRMs."""
        return cls({name: float(value) or 0.0 for name, value in sorted(strengths.items())})  # -0.0 is 0.0

    @property
    def acting(self) -> dict[str, float]:
        """The strengths of those that act."""
        return {name: value for name, value in self.strengths.items() if value}

    def name(self, host: str) -> str:
        """The model's name of a host with these IRMs."""
        return f"{host}+{self.terms()}" if self.strengths else host

    def terms(self) -> str:
        """These IRMs as `mix_of_terms` reads them."""
        return "+".join(f"{name}@{repr(value).removesuffix('.0')}" for name, value in self.strengths.items()) or "none"


def check_name(name: str) -> str:
    """Return the name of an IRM as a request may give it.

    Raises:
        UsageError: unless it is of ASCII letters, digits, ``.``, ``_`` and ``-``, 64 at most.
    """
    if _NAME.fullmatch(name) is None:
        raise UsageError(
            f"irm: {name[:80]!r} is not a valid IRM name for serving; use at most 64 ASCII letters, digits, '.', '_' and '-'"
        )
    return name


def mix_of_model(model: str, host: str, defaults: Mapping[str, float]) -> Mix:
    """The IRMs that a model's name asks for.

    Args:
        model: ``host``, ``host+irm``, ``host+irm@strength``, or several of these joined by ``+``.
        host: the name by which the host is served; it may hold a ``+`` itself.
        defaults: loaded IRM -> its own strength, which acts where a request names none.

    Raises:
        NotServedError: for another host, or an IRM that is not loaded.
        UsageError: for an IRM that is named twice, or a strength that is no number.

    Example:
        >>> mix_of_model("smollm2+anger@0.7", "smollm2", {"anger": 1.0})
        Mix(strengths={'anger': 0.7})
    """
    if model == host:
        return Mix()
    if not model.startswith(f"{host}+"):
        raise NotServedError(f"model: {model[:80]!r} is not served; served are {_served(host, defaults)}")
    return mix_of_terms(model[len(host) + 1 :], defaults, "model")


def mix_of_terms(terms: str, defaults: Mapping[str, float], where: str = "irms") -> Mix:
    """The IRMs of ``irm@strength+irm@strength``; ``none`` is the bare host. See `mix_of_model`."""
    if terms == "none" and "none" not in defaults:
        return Mix()
    found: dict[str, float] = {}
    for term in terms.split("+"):
        name, at, strength = term.partition("@")
        if name in found:
            raise UsageError(f"{where}: {name!r} is named twice; give it once")
        _check_loaded(name, defaults, where)
        found[name] = _number(strength, f"{where}: the strength of {name!r}") if at else defaults[name]
    return Mix.of(found)


def mix_of_field(value: Any, defaults: Mapping[str, float]) -> Mix:
    """The IRMs of a request's field ``irms``.

    Args:
        value: terms as in a model's name, a list of IRMs, or a mapping from IRM to strength (None: the IRM's own).
        defaults: loaded IRM -> its own strength.

    Raises:
        UsageError: for anything else, an IRM that is not loaded or named twice, or a strength that is no number.

    Example:
        >>> mix_of_field({"anger": 0.7, "sadness": None}, {"anger": 1.0, "sadness": 1.25})
        Mix(strengths={'anger': 0.7, 'sadness': 1.25})
    """
    if isinstance(value, str):
        return mix_of_terms(value, defaults)
    if isinstance(value, Mapping):
        found = {}
        for name, strength in value.items():
            _check_loaded(name, defaults, "irms")
            found[name] = defaults[name] if strength is None else _number(strength, f"irms: the strength of {name!r}")
        return Mix.of(found)
    if isinstance(value, Sequence) and all(isinstance(name, str) for name in value):
        for name in value:
            _check_loaded(name, defaults, "irms")
        if len({*value}) < len(value):
            raise UsageError("irms: an IRM is named twice; give each once")
        return Mix.of({name: defaults[name] for name in value})
    raise UsageError(f"irms: {value!r:.80} is neither terms such as 'anger@0.7', a list of IRMs, nor a mapping to strengths")


def _check_loaded(name: Any, defaults: Mapping[str, float], where: str) -> None:
    if not isinstance(name, str) or name not in defaults:
        raise NotServedError(f"{where}: IRM {name!r:.80} is not loaded; loaded are {', '.join(sorted(defaults)) or 'none'}")


def _number(value: Any, what: str) -> float:
    try:
        number = math.nan if isinstance(value, bool) or not isinstance(value, (str, int, float)) else float(value)
    except (ValueError, OverflowError):
        number = math.nan
    if not abs(number) <= _MOST:
        raise UsageError(f"{what}, {value!r:.40}, is not a number between {-_MOST:g} and {_MOST:g}")
    return number


def _served(host: str, defaults: Mapping[str, float]) -> str:
    return ", ".join([host, *(f"{host}+{name}" for name in sorted(defaults))])
