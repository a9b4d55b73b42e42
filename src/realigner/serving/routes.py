"""transformers' server with an engine behind it: its application, its routes, its replies; our models, checks and admin."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import FastAPI, HTTPException
from fastapi.exceptions import RequestValidationError
from openai.types import Completion, CompletionChoice, CompletionUsage
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.responses import JSONResponse, Response, StreamingResponse
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import GenerationState

from realigner.console import say
from realigner.errors import RealignerError
from realigner.serving.api_request import CHAT, TEXT, read_request
from realigner.serving.engine import BatchFailedError, Engine, Job
from realigner.serving.keys_and_limits import ADMIN, FAILED, KeysAndLimits, begun, refusal
from realigner.serving.metrics import Metrics
from realigner.serving.mixes import NotServedError, mix_of_model
from realigner.serving.reply_text import Thought

_KEPT = {"/v1/chat/completions", "/v1/completions", "/v1/models", "/health"}  # of transformers' routes
_DONE = "data: [DONE]\n\n"


def application(engine: Engine, host: str, metrics: Metrics, keys: list[str], admin_key: str | None = None) -> KeysAndLimits:
    """The ASGI application that serves an engine.

    Args:
        engine: open.
        host: the name by which its host is served.
        metrics: in which it counts.
        keys: API keys; none asked for where there is none.
        admin_key: with which IRMs may be loaded and unloaded; None: they may not.
    """
    models, state = _Models(engine, host), _State(engine)
    chat, text = _Chat(models, state), _Text(models, state)
    for handler in (chat, text):
        handler.served = _Served(engine, host, metrics)
    app = build_server(models, chat, text, None, None, None, state)
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", None) in _KEPT]
    _more_routes(app, engine, models, metrics)
    for raised in (StarletteHTTPException, RequestValidationError, RealignerError):
        app.add_exception_handler(raised, _refused)
    app.add_exception_handler(Exception, _failed)
    metrics.watch("requests_in_batch", "Requests in the batch, or waiting to get into it.", lambda: engine.pending)
    metrics.watch("irms", "Loaded IRMs.", lambda: len(engine.loaded_irms.strengths))
    return KeysAndLimits(app, engine.limits, metrics, keys, admin_key)


async def _failed(_: Any, __: Exception) -> Response:
    """What nobody foresaw; `KeysAndLimits` writes it to the log."""
    return refusal(500, FAILED)


async def _refused(_: Any, error: Exception) -> Response:
    """What was raised, with the status that it means."""
    if isinstance(error, StarletteHTTPException):
        return refusal(error.status_code, str(error.detail), headers=dict(error.headers or {}))
    if isinstance(error, RequestValidationError):
        return refusal(
            400, "the request is not a JSON object sent as application/json; see the curl line of the server's start"
        )
    if isinstance(error, NotServedError):
        return refusal(404, str(error), "model_not_found")
    return refusal(503 if isinstance(error, BatchFailedError) else 400, str(error))


class _Models(ModelManager):  # type: ignore[misc]
    """transformers' view of what is served: one host, and the host with each IRM."""

    def __init__(self, engine: Engine, host: str) -> None:
        super().__init__(device="cpu")  # it loads nothing
        self._engine, self._host, self._created = engine, host, int(time.time())

    def get_gen_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:
        strengths = sorted(self._engine.loaded_irms.strengths.items())
        irms = [{**self._model(f"{self._host}+{name}"), "strength": strength} for name, strength in strengths]
        return [self._model(self._host), *irms]

    def named(self, name: str) -> dict[str, Any]:
        """The model of a name that a request may have, listed or not.

        Raises:
            NotServedError, UsageError: as `mix_of_model`.
        """
        mix_of_model(name, self._host, self._engine.loaded_irms.strengths)
        return next((model for model in self.get_gen_models() if model["id"] == name), self._model(name))

    def _model(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self._created, "owned_by": "realigner"}


class _State(GenerationState):  # type: ignore[misc]
    """What ``/health`` asks."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(continuous_batching=True)
        self._engine = engine

    def is_cb_alive(self) -> bool:
        return not self._engine.failure


class _Served:
    """One of transformers' handlers with our answers."""

    def __init__(self, engine: Engine, host: str, metrics: Metrics) -> None:
        self.engine, self.host, self.metrics = engine, host, metrics

    async def answer(self, handler: Any, kind: str, body: dict[str, Any]) -> Response:
        asked = read_request(body, kind, self.host, self.engine.loaded_irms.strengths)
        job = await self.engine.start(asked)
        begun.get().append(lambda: self._over(job))
        self.metrics.tokens.labels("prompt").inc(len(job.prompt))
        for name in asked.mix.acting:
            self.metrics.acted.labels(name).inc()
        if asked.stream:
            return StreamingResponse(self._events(handler, job, asked.model), media_type="text/event-stream")
        pieces = [piece async for piece in self.engine.pieces(job)]
        thought = "".join(piece for piece in pieces if isinstance(piece, Thought))
        text = "".join(piece for piece in pieces if not isinstance(piece, Thought))
        return JSONResponse(handler.whole(job.id, asked.model, text, thought, job.ended, _usage(job)))

    async def _events(self, handler: Any, job: Job, model: str) -> AsyncGenerator[str, None]:
        try:
            yield handler.first(job.id, model)
            async for piece in self.engine.pieces(job):
                yield handler.piece(job.id, model, piece)
            yield handler.last(job.id, model, job.ended, _usage(job))
            yield _DONE
        except RealignerError as error:  # the status is sent already
            say(f"realigner serve: {error}")
            yield f"data: {json.dumps({'error': {'message': str(error), 'type': 'server_error', 'code': None}})}\n\n"

    def _over(self, job: Job) -> None:
        self.metrics.tokens.labels("reply").inc(len(job.tokens))
        self.engine.finish(job)


def _usage(job: Job) -> CompletionUsage:
    read, written = len(job.prompt), len(job.tokens)
    return CompletionUsage(prompt_tokens=read, completion_tokens=written, total_tokens=read + written)


class _Chat(ChatCompletionHandler):  # type: ignore[misc]
    """``/v1/chat/completions``."""

    served: _Served

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Response:
        return await self.served.answer(self, CHAT, body)

    def whole(self, job: str, model: str, text: str, thought: str, ended: str, usage: CompletionUsage) -> Any:
        return self._build_completion(job, text, model, ended, usage, reasoning_content=thought or None)

    def first(self, job: str, model: str) -> str:
        return str(self._build_chunk_sse(job, role="assistant", content="", model=model))

    def piece(self, job: str, model: str, text: str) -> str:
        kind = "reasoning_content" if isinstance(text, Thought) else "content"
        return str(self._build_chunk_sse(job, model=model, **{kind: str(text)}))

    def last(self, job: str, model: str, ended: str, usage: CompletionUsage) -> str:
        return str(self._build_chunk_sse(job, model=model, finish_reason=ended, usage=usage))


class _Text(CompletionHandler):  # type: ignore[misc]
    """``/v1/completions``."""

    served: _Served

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Response:
        return await self.served.answer(self, TEXT, body)

    def whole(self, job: str, model: str, text: str, thought: str, ended: Any, usage: CompletionUsage) -> Any:
        choice = CompletionChoice(text=text, index=0, logprobs=None, finish_reason=ended)
        made = Completion(
            id=job, created=int(time.time()), model=model, choices=[choice], object="text_completion", usage=usage
        )
        return made.model_dump(exclude_none=True)

    def first(self, job: str, model: str) -> str:
        return str(self._build_chunk_sse(job, model))

    def piece(self, job: str, model: str, text: str) -> str:
        return str(self._build_chunk_sse(job, model, text=text))

    def last(self, job: str, model: str, ended: str, usage: CompletionUsage) -> str:
        return str(self._build_chunk_sse(job, model, finish_reason=ended, usage=usage))


def _more_routes(app: FastAPI, engine: Engine, models: _Models, metrics: Metrics) -> None:
    """Routes that transformers' server has not."""

    async def counted() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def model(name: str) -> Response:
        return JSONResponse(models.named(name))

    async def load(body: dict[str, Any]) -> Response:
        name, path = body.get("name"), body.get("path")
        if not isinstance(name, str) or not isinstance(path, str) or set(body) != {"name", "path"}:
            raise HTTPException(400, "irm: give name and path, two strings, and nothing else")
        loaded = await engine.load(name, path)
        say(f"realigner serve: loaded {name} from {path}")
        return JSONResponse({"name": name, "strength": loaded.strength}, status_code=201)

    async def unload(name: str) -> Response:
        if name not in engine.loaded_irms.strengths:
            raise HTTPException(404, f"irm: {name[:80]!r} is not loaded")
        await engine.unload(name)
        say(f"realigner serve: unloaded {name}")
        return Response(status_code=204)

    app.add_api_route("/metrics", counted, methods=["GET"])
    app.add_api_route("/v1/models/{name:path}", model, methods=["GET"])
    app.add_api_route(ADMIN, load, methods=["POST"])
    app.add_api_route(ADMIN + "/{name}", unload, methods=["DELETE"])
