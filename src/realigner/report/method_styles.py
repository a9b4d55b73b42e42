"""Kinds of methods and their colours, on the page and in figures alike."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MethodKind:
    """A kind of method.

    Attributes:
        label: what it is.
        colour: number of the page's and the figures' colour.
    """

    label: str
    colour: int


BARE = MethodKind("the bare host", 0)
IRM = MethodKind("IRMs", 1)
PROMPT = MethodKind("prompts", 2)
ADAPTER = MethodKind("adapters and prefixes", 3)
VECTOR = MethodKind("constant vectors", 4)
OTHER = MethodKind("other methods", 5)
KINDS = (BARE, IRM, PROMPT, ADAPTER, VECTOR, OTHER)
_NAMED = {
    "bare": BARE,
    **dict.fromkeys(("prompt", "few-shot"), PROMPT),
    **dict.fromkeys(("psr", "reft", "lora", "shadow", "ia3", "prefix"), ADAPTER),
    **dict.fromkeys(("random", "mean-difference", "constant", "shared", "mean-delta"), VECTOR),
}


def method_kind(name: str) -> MethodKind:
    """The kind of a method, by its name in an evaluation: ``lora``, ``shadow@460800``, ``irm-compact, tuned``.

    Example:
        >>> method_kind("shadow@460800").label, method_kind("irm-compact, tuned").label
        ('adapters and prefixes', 'IRMs')
    """
    base = name.split("@")[0].split(",")[0]
    if base in ("irm", "untrained") or base.startswith("irm-"):
        return IRM
    return _NAMED.get(base, OTHER)
