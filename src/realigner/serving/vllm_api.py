"""IRMs over vLLM's HTTP routes: in a model's name, in the field ``irms``, and in the list of models.

A request becomes one that the engine's own routes take: the host as its model, the IRMs in ``vllm_xargs``. So an unchanged
client works, on the routes that hand this field on (chat, completions, responses, messages); on others, which would answer as
the bare host, IRMs are refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from typing import Any

from realigner.errors import RealignerError, UsageError
from realigner.serving.mixes import NotServedError, mix_of_model
from realigner.serving.vllm_irms import EVERYWHERE, ServedIRMs, servable

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]
_NAMES_IRMS = re.compile(rb'"irms"|"where"|"model"\s*:\s*"[^"]*(?:\+|\\u002[bB])')
_ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")
_ALL_ROUTES = {  # that hand `vllm_xargs` on, or answer the same with any IRM
    *_ROUTES,
    *(f"{route}/render" for route in _ROUTES),
    *("/v1/chat/completions/batch", "/invocations", "/v1/messages/count_tokens", "/tokenize", "/detokenize"),
}
_LARGEST = 256 << 20  # bytes of a request's body that are read here


class IRMMiddleware:
    """ASGI middleware between the check of keys and the routes.

    Args:
        app: what comes next.
        served: the IRMs.
        hosts: the names by which the host is served.
    """

    def __init__(self, app: App, served: ServedIRMs, hosts: Sequence[str]) -> None:
        self.app, self.served, self.hosts = app, served, hosts

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Serve a request."""
        path = scope.get("path", "").removeprefix(scope.get("root_path", "")).rstrip("/")
        if scope["type"] != "http":
            await self.app(scope, receive, send)
        elif scope["method"] == "GET" and path == "/v1/models":
            await self._list(scope, receive, send)
        elif scope["method"] == "POST" and _is_json(scope):
            await self._ask(path, scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _ask(self, path: str, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        body, rest = await _read(receive)
        if body is None:
            await self.app(scope, rest, send)
            return
        try:
            changed = self.rewritten(path, body)
        except NotServedError as error:
            await _answer(send, 404, str(error), "NotFoundError")
            return
        except UsageError as error:
            await _answer(send, 400, str(error), "BadRequestError")
            return
        length = str(len(changed)).encode()
        headers = [(key, length if key.lower() == b"content-length" else value) for key, value in scope["headers"]]
        await self.app({**scope, "headers": headers}, _once(changed, rest), send)

    def rewritten(self, path: str, body: bytes) -> bytes:
        """A request's body as the engine's routes take it; the same one where it names no IRM, or is none of ours.

        Args:
            path: of its route.
            body: as it came.

        Raises:
            NotServedError: for an IRM that is not loaded.
            UsageError: for a strength that is no number, IRMs in two places or with different variables of the chat template,
                ``where``, or a route or beam search, which drop them.
        """
        if _NAMES_IRMS.search(body) is None:  # most are large and name none
            return body
        try:
            request = json.loads(body)
        except (ValueError, RecursionError):  # the route says so
            return body
        if not isinstance(request, dict):
            return body
        model = str(request.get("model"))
        xargs, kwargs = (_object(request, name) for name in ("vllm_xargs", "chat_template_kwargs"))
        if any(where not in (None, "all") for where in (request.get("where"), xargs.get("where"))):
            raise UsageError(EVERYWHERE)
        host = None if model in self.hosts else next((host for host in self.hosts if model.startswith(f"{host}+")), None)
        named = [request.pop("irms", None), xargs.pop("irms", None)]
        fields = [field for field in named if field is not None]
        if len(fields) + (host is not None) > 1:
            raise UsageError("irms: the model, the field irms and vllm_xargs name IRMs more than once; name them in one place")
        if host is not None:
            mix = mix_of_model(model, host, self.served.defaults)
            request["model"] = host
        elif fields:
            mix = self.served.mix(fields[0])
        else:
            return body
        if mix.acting and path not in _ALL_ROUTES:
            raise UsageError(f"irms: {path[:80]} drops them; ask {', '.join(_ROUTES)}")
        if mix.acting and request.get("use_beam_search"):
            raise UsageError("use_beam_search: vLLM's beams drop a request's IRMs; sample, or decode greedily")
        if mix.acting:
            request["vllm_xargs"] = {**xargs, "irms": mix.terms()}
        if {"messages", "input"} & request.keys() and (own := self.served.template_kwargs(mix)):
            request["chat_template_kwargs"] = {**own, **kwargs}
        return json.dumps(request).encode()

    async def _list(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """The route's list of models, and each of its hosts with each IRM."""
        start: Message = {}
        parts: list[bytes] = []

        async def keep(message: Message) -> None:
            if message["type"] == "http.response.start":
                start.update(message)
                return
            parts.append(message.get("body", b""))
            if not message.get("more_body"):
                body = self.listed(b"".join(parts)) if start["status"] == 200 else b"".join(parts)
                headers = [pair for pair in start["headers"] if pair[0].lower() != b"content-length"]
                await send({**start, "headers": [*headers, (b"content-length", str(len(body)).encode())]})
                await send({**message, "body": body})

        await self.app(scope, receive, keep)

    def listed(self, body: bytes) -> bytes:
        """A list of models with ours in it."""
        models = json.loads(body)
        for card in [card for card in models["data"] if card["id"] in self.hosts]:
            for name, irm in self.served.irms.items():
                own = {"id": f"{card['id']}+{name}", "root": str(irm.folder), "parent": card["id"]}
                models["data"].append({**card, **own, "strength": irm.strength})
        return json.dumps(models).encode()


def add_admin(app: Any, served: ServedIRMs, args: Any) -> None:
    """Routes that load and unload IRMs, as `realigner serve` has them: ``POST /v1/irms``, ``DELETE /v1/irms/NAME``.

    They read any folder of the machine that they are given, so they are there only where they were asked for.
    """
    from fastapi import Request
    from fastapi.responses import JSONResponse, Response

    if (getattr(args, "api_server_count", None) or 1) > 1:
        raise RealignerError("REALIGNER_ADMIN: several API servers would each have IRMs of their own; set --api-server-count 1")

    async def load(request: Request) -> Response:
        try:
            given = await request.json()
            if not isinstance(given, dict) or set(given) != {"name", "path"} or not all(map(_is_text, given.values())):
                raise UsageError("irm: give name and path, two strings, and nothing else")
            name = served.check_new(given["name"])
            irm = servable(name, given["path"])
            if wrong := await _all_workers(request.app.state.engine_client, "load_irm", name, str(irm.folder)):
                raise RealignerError(wrong)
        except (RealignerError, ValueError) as error:
            return JSONResponse(_error(400, str(error), "BadRequestError"), 400)
        served.irms[name] = irm
        return JSONResponse({"name": name, "strength": irm.strength}, 201)

    async def unload(request: Request) -> Response:
        name, engine = request.path_params["name"], request.app.state.engine_client
        if name not in served.irms:
            return JSONResponse(_error(404, f"irm: {name[:80]!r} is not loaded", "NotFoundError"), 404)
        del served.irms[name]  # no request for it comes in any more
        await engine.pause_generation(mode="wait", clear_cache=False)  # those that did are finished
        try:
            wrong = await _all_workers(engine, "unload_irm", name)
        finally:
            await engine.resume_generation()
        return Response(status_code=204) if wrong is None else JSONResponse(_error(400, wrong, "BadRequestError"), 400)

    for route in (load, unload):
        route.__annotations__ = {"request": Request, "return": None}  # FastAPI reads them, and in this file they are texts
    app.add_api_route("/v1/irms", load, methods=["POST"], response_model=None)
    app.add_api_route("/v1/irms/{name}", unload, methods=["DELETE"], response_model=None)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


async def _all_workers(engine: Any, method: str, *args: str) -> str | None:
    """Call a method of all workers; the first thing that is wrong. What some could do and others not is undone."""
    answers = await engine.collective_rpc(method, args=args)
    wrong = next((answer for answer in answers if answer), None)
    if wrong and method == "load_irm" and not all(answers):
        await engine.collective_rpc("unload_irm", args=args[:1])
    return wrong


# --- messages ---------------------------------------------------------------------------------------------------------------


def _object(request: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = request.get(name)
    if value is not None and not isinstance(value, dict):
        raise UsageError(f"{name}: {value!r:.60} is not an object")
    return value or {}


def _is_json(scope: Mapping[str, Any]) -> bool:
    kind = next((value for key, value in scope["headers"] if key.lower() == b"content-type"), b"application/json")
    return bool(kind.lower().split(b";")[0].strip().endswith(b"json"))


async def _read(receive: Receive) -> tuple[bytes | None, Receive]:
    """A request's whole body and what gives the rest; or None, if it is too large or ends early, and what gives all of it."""
    messages: list[Message] = []
    size = 0
    while True:
        message = await receive()
        messages.append(message)
        size += len(message.get("body", b""))
        if message["type"] != "http.request" or size > _LARGEST:
            return None, _again(messages, receive)
        if not message.get("more_body"):
            return b"".join(message.get("body", b"") for message in messages), receive


def _again(messages: list[Message], receive: Receive) -> Receive:
    async def again() -> Message:
        return messages.pop(0) if messages else await receive()

    return again


def _once(body: bytes, rest: Receive) -> Receive:
    return _again([{"type": "http.request", "body": body, "more_body": False}], rest)


def _error(status: int, message: str, kind: str) -> dict[str, Any]:
    param = "model" if message.startswith("model") else "irms"
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}


async def _answer(send: Send, status: int, message: str, kind: str) -> None:
    body = json.dumps(_error(status, message, kind)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
