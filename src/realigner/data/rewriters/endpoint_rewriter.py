"""The openai rewriter: replies in a tone by a language model behind an OpenAI-compatible endpoint."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

from realigner.data.endpoint import ChatRequest, Endpoint
from realigner.data.rewriters import Reply, RewriteRequest, messages, seed_of
from realigner.data.tone import Tone


class EndpointRewriter(Endpoint):
    """Has a language model behind an endpoint write replies in a tone.

    Args:
        tone: what the model is told.
        endpoint, model, settings: of `Endpoint`.
    """

    def __init__(self, tone: Tone, endpoint: str | None, model: str, **settings: Any) -> None:
        self.tone = tone
        super().__init__(endpoint, model, **settings)

    def spec(self) -> dict[str, Any]:
        return {"rewriter": "openai"} | self.sampling()

    def rewrite(self, requests: Sequence[RewriteRequest], verified: bool = False) -> Generator[Reply, None, None]:
        """One reply for each request, as they finish; see `Endpoint.ask`."""
        asked = (
            ChatRequest(
                request.fact.id, request.attempt, messages(self.tone, request.fact), seed_of(self.seed, self.tone, request)
            )
            for request in requests
        )
        return self.ask(asked, verified)
