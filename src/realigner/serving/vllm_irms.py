"""Which IRMs an engine serves, by name: from the environment at its start, and loaded or unloaded while it goes on.

Each of the engine's processes has a list of its own, made alike. It reads no weights and needs no engine.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from realigner.adapter_files import StoredIRM, read_irm
from realigner.errors import RealignerError, UsageError
from realigner.serving.mixes import Mix, check_name, mix_of_field

VARIABLE = "REALIGNER_IRMS"
EVERYWHERE = "where: on vLLM an IRM acts on every token; leave it out, or serve with --engine transformers"


class ServedIRMs:
    """IRMs by name.

    Attributes:
        irms: name -> IRM.

    Example:
        >>> served = ServedIRMs.of_text("anger=runs/anger-42,sadness=runs/sadness-42")  # doctest: +SKIP
        >>> served.mix("anger@0.7").strengths  # doctest: +SKIP
        {'anger': 0.7}
    """

    def __init__(self, irms: Mapping[str, StoredIRM] | None = None) -> None:
        self.irms = dict(irms or {})

    @classmethod
    def of_text(cls, text: str) -> ServedIRMs:
        """The IRMs of ``name=folder,name=folder``.

        Raises:
            UsageError: for another form, or a name that is given twice.
            RealignerError: for a folder that holds no IRM, or one that an engine cannot serve.
        """
        served = cls()
        for part in filter(None, (part.strip() for part in text.split(","))):
            name, equals, folder = part.partition("=")
            if not equals or not folder:
                raise UsageError(f"{VARIABLE}: {part[:80]!r} is not name=folder; give name=folder,name=folder")
            served.irms[served.check_new(name.strip())] = servable(name.strip(), folder.strip())
        return served

    @property
    def defaults(self) -> dict[str, float]:
        """IRM -> the strength at which it acts when a request names none."""
        return {name: irm.strength for name, irm in self.irms.items()}

    def check_new(self, name: str) -> str:
        """Return a name that an IRM may be given; raises UsageError when it is none, or taken."""
        if check_name(name) in self.irms:
            raise UsageError(f"irm: {name!r} is given twice; give each IRM a name of its own")
        return name

    def mix(self, field: Any) -> Mix:
        """The IRMs of a request's field; see `mixes.mix_of_field`."""
        return mix_of_field(field, self.defaults)

    def salt(self, mix: Mix, own: str | None) -> str | None:
        """What keeps a mix's keys and values from requests with another: a hash of weights and strengths. None: the host's.

        Args:
            mix: of a request.
            own: the salt that the request came with.
        """
        if not mix.acting:
            return own
        parts = [f"{self.irms[name].digest}@{strength!r}" for name, strength in mix.acting.items()]
        digest = hashlib.sha256("+".join(parts).encode()).hexdigest()
        return f"irm:{digest}" + ("" if own is None else f":{own}")

    def template_kwargs(self, mix: Mix) -> dict[str, Any]:
        """The variables of the chat template that the IRMs were trained with, those at strength 0 too.

        Raises:
            UsageError: when they are not the same.
        """
        own = [self.irms[name].values.get("chat_template_kwargs") or {} for name in mix.strengths]
        if any(kwargs != own[0] for kwargs in own):
            raise UsageError("irms: they were trained with different prompt templates; ask them in separate requests")
        return dict(own[0]) if own else {}


def servable(name: str, folder: str) -> StoredIRM:
    """An IRM in a folder that an engine can serve.

    Raises:
        RealignerError: for one that it cannot: damaged, or trained on prompts in the paper's plain form, which the chat route
            does not make.
    """
    irm = read_irm(folder)
    template = irm.values.get("template") or "chat"
    if template != "chat":
        raise RealignerError(
            f"irm {name!r}: {irm.folder} was trained with template={template}, and an engine puts chats through the host's own "
            "template; train it with template=chat"
        )
    return irm
