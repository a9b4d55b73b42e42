"""Replies by a server with OpenAI's API, such as ``realigner serve``: it says nothing of what its IRMs add."""

from __future__ import annotations

import threading
from collections.abc import Generator, Sequence
from contextlib import closing
from typing import Any

from realigner.app.exchange import Asked, Exchange, Limits, Reader
from realigner.data.endpoint import Endpoint
from realigner.errors import UsageError
from realigner.serving.mixes import Mix

_UNNAMED = "?"  # asked under no name: the models are listed first


class EndpointTalker:
    """A `Talker` on an endpoint, where models are named ``HOST+IRM@STRENGTH+...``.

    Args:
        url: the server's, such as ``http://127.0.0.1:8000/v1``.
        host: the model's name there without an IRM; by default the one that the server lists.
        irms: the IRMs; by default those that the server lists with the host (``HOST+IRM``).
        limits: what users may ask for.

    Raises:
        UsageError: when the host or the IRMs cannot be told from what the server lists.
        RealignerError: when the server does not answer, or refuses the key (``OPENAI_API_KEY``).
    """

    layers: tuple[int, ...] = ()
    neurons = 0
    has_turns = True

    def __init__(self, url: str, host: str | None = None, irms: Sequence[str] = (), limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self._url = url  # with a login and a query, which an endpoint's own address leaves out
        self.endpoint = Endpoint(url, host or _UNNAMED, retries=1)
        models = self.endpoint.models() if host is None or not irms else {}
        self.host, irms = told(list(models), host, irms, url)
        self.strengths = {name: models.get(f"{self.host}+{name}", 1.0) for name in irms}
        self.note = (
            f"Replies come from {self.endpoint.endpoint}. An endpoint sends text alone, not what its IRMs add, so there is no "
            "map here: for the map, start the app with the IRM itself (realigner app --irm DIR)."
        )

    def begin(self, asked: Asked) -> Exchange:
        """Begin both replies.

        Raises:
            UsageError: for a question or settings beyond the limits.
        """
        asked.check(self.limits)
        if unknown := [name for name in asked.strengths if name not in self.strengths]:
            raise UsageError(f"There is no IRM {unknown[0]!r} here.")
        return Exchange(asked, {side: self._reader(asked, side) for side in ("base", "realigned")})

    def _reader(self, asked: Asked, side: str) -> Reader:
        mix = Mix.of(asked.acting if side == "realigned" else dict.fromkeys(asked.acting, 0.0))  # prompts of one form
        sampling: dict[str, Any] = {"temperature": asked.temperature, "top_p": asked.top_p, "seed": asked.seed}
        server = Endpoint(self._url, mix.name(self.host), retries=1, max_tokens=asked.max_new_tokens, **sampling)

        def read(stop: threading.Event) -> Generator[str, None, bool]:
            with closing(server.stream(asked.conversation(side), stop)) as pieces:
                return (yield from pieces)

        return read


def told(models: Sequence[str], host: str | None, irms: Sequence[str], url: str) -> tuple[str, list[str]]:
    """The host and its IRMs, of the models that a server lists.

    Raises:
        UsageError: when there are several hosts, or no IRMs.

    Example:
        >>> told(["smollm2", "smollm2+anger", "smollm2+joy"], None, [], "http://127.0.0.1:8000/v1")
        ('smollm2', ['anger', 'joy'])
    """
    if host is None:
        bare = [name for name in models if not any(name.startswith(f"{other}+") for other in models)]
        if len(bare) != 1:
            listed = f"lists {', '.join(bare[:8])}" if bare else "lists no model"
            raise UsageError(f"{url}: {listed}; name the host (model)")
        host = bare[0]
    found = list(irms) or [name.removeprefix(f"{host}+") for name in models if name.startswith(f"{host}+")]
    if not found:
        raise UsageError(f"{url}: lists no IRM of {host} ({host}+NAME); name those that it serves (irm)")
    return host, found
