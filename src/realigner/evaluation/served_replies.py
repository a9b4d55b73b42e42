"""Replies from a server that has the host and an IRM (`realigner serve`, vLLM), in place of a host loaded here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace

from realigner.data.endpoint import Endpoint
from realigner.errors import UsageError
from realigner.evaluation.method_protocol import Fitted
from realigner.evaluation.replies import Conversation
from realigner.prompts import Answer
from realigner.serving.mixes import Mix

_PENALTY = {"repetition_penalty": 1.1}  # the default of `generation.answer`


@dataclass(frozen=True)
class ServedIRM:
    """An IRM behind an OpenAI-compatible endpoint. It answers greedily, with a repetition penalty of 1.1.

    Args:
        url: of the endpoint, such as ``http://127.0.0.1:8000/v1``.
        model: its name there without a strength, ``host+irm``.

    Raises:
        UsageError: for a name of another form.

    Example:
        >>> ServedIRM("http://127.0.0.1:8000/v1", "smollm2+anger").named(0.7)
        'smollm2+anger@0.7'
    """

    url: str
    model: str

    def __post_init__(self) -> None:
        host, _, irm = self.model.rpartition("+")
        if not (host and irm) or "@" in self.model:
            raise UsageError(f"--model {self.model}: name the host and one IRM, without a strength (host+anger)")

    def named(self, strength: float) -> str:
        """The model's name at a strength; at 0 it is the host's with the IRM's prompts (``host+irm@0``)."""
        host, _, irm = self.model.rpartition("+")
        return Mix.of({irm: strength}).name(host)

    def answers(self, strength: float, conversations: Sequence[Conversation], max_new_tokens: int) -> list[Answer]:
        """Its replies, in the order of the conversations.

        Raises:
            RealignerError: when the server refuses one, or is gone.
        """
        name = self.named(strength)
        server = Endpoint(self.url, name, temperature=0.0, top_p=1.0, max_tokens=max_new_tokens, extra=_PENALTY)
        return server.answers(conversations)

    def bare_answers(self, conversations: Sequence[Conversation], max_new_tokens: int) -> list[Answer]:
        """The bare host's replies, to prompts in the IRM's form."""
        return self.answers(0.0, conversations, max_new_tokens)

    @contextmanager
    def answering(self, attached: AbstractContextManager[Fitted], own: float) -> Iterator[Fitted]:
        """A block in which an IRM is on the host here, which gives losses, and answers there.

        Args:
            attached: the block in which it is on the host.
            own: the strength at which it acts when none is set.
        """
        acting = own
        with attached as fitted:

            @contextmanager
            def scaled(value: float) -> Iterator[None]:
                nonlocal acting
                acting = value
                try:
                    with fitted.strength(value):
                        yield
                finally:
                    acting = own

            def answers(conversations: Sequence[Conversation], max_new_tokens: int) -> list[Answer]:
                return self.answers(acting, conversations, max_new_tokens)

            yield replace(fitted, answers=answers, scaled=scaled)
