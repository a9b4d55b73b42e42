"""What a request over HTTP asks for, checked field by field; nothing is left out in silence.

The fields are OpenAI's, and ours: ``irms``, ``where``, ``repetition_penalty``, ``thinking_budget``, ``chat_template_kwargs``.
A field that we cannot do is refused, unless its value changes nothing. It needs neither torch nor transformers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from realigner.dialogues import ROLES
from realigner.errors import UsageError
from realigner.serving.mixes import Mix, mix_of_field, mix_of_model

CHAT, TEXT = "chat", "text"  # /v1/chat/completions, /v1/completions
_OURS = {"irms", "where", "repetition_penalty", "thinking_budget", "chat_template_kwargs", "vllm_xargs"}
_READ = {"model", "max_tokens", "temperature", "top_p", "seed", "stop", "stream"} | _OURS
_OF_KIND = {CHAT: {"messages", "max_completion_tokens"}, TEXT: {"prompt"}}
_OF_NO_EFFECT = {  # on what is replied
    *("user", "metadata", "store", "service_tier", "stream_options", "parallel_tool_calls", "prediction", "moderation"),
    *("prompt_cache_key", "prompt_cache_options", "prompt_cache_retention", "safety_identifier"),
}
_NEUTRAL: dict[str, tuple[Any, ...]] = {  # field that we cannot do -> values that ask for nothing
    **{"n": (1,), "best_of": (1,), "echo": (False,), "suffix": ("",), "logprobs": (False,), "top_logprobs": (0,)},
    **{"presence_penalty": (0,), "frequency_penalty": (0,), "logit_bias": ({},), "modalities": (["text"],), "audio": ()},
    **{"tools": ([],), "functions": ([],), "tool_choice": ("none", "auto"), "function_call": ("none", "auto")},
    **{"response_format": ({"type": "text"},), "web_search_options": (), "generation_config": (), "reasoning_effort": ()},
    "verbosity": ("medium",),
}
_NEUTRAL_OF_TEXT: dict[str, tuple[Any, ...]] = {"chat_template_kwargs": ({},), "thinking_budget": ()}
_MOST_STOPS, _LONGEST_STOP = 16, 1000  # characters
_WHERES = ("all", "prompt", "reply")  # settings.WHERES, which needs torch
_COLDEST = 1e-3  # of temperatures; below, scores divided by it are no numbers, and sampling is greedy
_LARGEST = 2**53  # of a whole number: what JSON keeps


@dataclass(frozen=True)
class ApiRequest:
    """A request.

    Attributes:
        model: the name that it gave.
        mix: the IRMs that act, and how strongly.
        where: the tokens that they act on; see `tuner.strength`.
        prompt: messages, or a text that is to be continued.
        max_tokens: of the reply at most; None for the server's number.
        temperature, top_p, repetition_penalty: as in `generation.answer`, with its defaults.
        thinking_budget: as there; None: 512, or less where there is less room.
        seed: of the sampling; None for another one each time.
        stop: texts that end the reply and are left out of it.
        stream: send the reply as it comes.
        template_kwargs: variables of the chat template.
    """

    model: str
    mix: Mix
    where: str | int
    prompt: list[dict[str, str]] | str
    max_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    repetition_penalty: float = 1.1
    thinking_budget: int | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stream: bool = False
    template_kwargs: Mapping[str, Any] | None = None


def read_request(body: Mapping[str, Any], kind: str, host: str, strengths: Mapping[str, float]) -> ApiRequest:
    """Check the JSON body of a request.

    Args:
        body: as parsed.
        kind: `CHAT` or `TEXT`.
        host: the name by which the host is served.
        strengths: loaded IRM -> its own strength.

    Raises:
        NotServedError: for a model that is not served.
        UsageError: naming the field, for anything else.

    Example:
        >>> body = {"model": "smollm2+anger", "messages": [{"role": "user", "content": "Why?"}], "where": "reply"}
        >>> read_request(body, CHAT, "smollm2", {"anger": 0.5}).mix
        Mix(strengths={'anger': 0.5})
    """
    given = {name: value for name, value in body.items() if value is not None}
    neutral = _NEUTRAL | _NEUTRAL_OF_TEXT if kind == TEXT else _NEUTRAL
    for name, value in given.items():
        if name in neutral and not any(_same(value, nothing) for nothing in neutral[name]):
            raise UsageError(f"{name}: {value!r:.60} is not supported here; leave it out")
        if name not in _READ | _OF_KIND[kind] | _OF_NO_EFFECT | set(_NEUTRAL):
            raise UsageError(f"{name[:60]}: unknown field")
    given |= _extra_arguments(given)
    temperature = _number("temperature", given.get("temperature", 0.0), 0, 100)
    limits = [given[name] for name in ("max_completion_tokens", "max_tokens") if name in given]
    if len(limits) == 2 and limits[0] != limits[1]:
        raise UsageError("max_tokens: max_completion_tokens is another number; give one of them")
    return ApiRequest(
        model=_model(given, host, strengths),
        mix=_mix(given, host, strengths),
        where=_where(given.get("where", "all")),
        prompt=_messages(given.get("messages")) if kind == CHAT else _text(given.get("prompt")),
        max_tokens=_whole("max_tokens", limits[0], 1) if limits else None,
        temperature=0.0 if temperature < _COLDEST else temperature,
        top_p=_number("top_p", given.get("top_p", 1.0), 1e-6, 1),
        repetition_penalty=_number("repetition_penalty", given.get("repetition_penalty", 1.1), 0.01, 100),
        thinking_budget=_whole("thinking_budget", given["thinking_budget"], 0) if "thinking_budget" in given else None,
        seed=_whole("seed", given["seed"], -_LARGEST) if "seed" in given else None,
        stop=_stops(given.get("stop", [])),
        stream=_flag("stream", given.get("stream", False)),
        template_kwargs=_mapping("chat_template_kwargs", given["chat_template_kwargs"])
        if "chat_template_kwargs" in given
        else None,
    )


def _same(value: Any, neutral: Any) -> bool:
    return bool(value == neutral) and isinstance(value, bool) == isinstance(neutral, bool)  # 0.0 is 0, False is not


def _extra_arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """Our fields where vLLM has them, so that one client works with both."""
    extra = _mapping("vllm_xargs", given.get("vllm_xargs", {}))
    for name in extra:
        if name not in ("irms", "where"):
            raise UsageError(f"vllm_xargs: there is no argument {name!r:.60}; there are irms and where")
    found = {name: value for name, value in extra.items() if value is not None}
    if twice := sorted(found.keys() & given.keys()):
        raise UsageError(f"{twice[0]}: it is given twice, in vllm_xargs too; give it in one place")
    return found


def _model(given: Mapping[str, Any], host: str, strengths: Mapping[str, float]) -> str:
    model = given.get("model")
    if not isinstance(model, str) or not model:
        served = ", ".join([host, *(f"{host}+{name}" for name in sorted(strengths))])
        raise UsageError(f"model: give the name of one as a string; served are {served}")
    mix_of_model(model, host, strengths)  # which refuses others
    return model


def _mix(given: Mapping[str, Any], host: str, strengths: Mapping[str, float]) -> Mix:
    if "irms" not in given:
        return mix_of_model(given["model"], host, strengths)
    if given["model"] != host:
        raise UsageError(f"irms: the model's name has IRMs too; give model={host!r} with irms, or leave irms out")
    return mix_of_field(given["irms"], strengths)


def _where(value: Any) -> str | int:
    if isinstance(value, str) and value.isascii() and value.isdecimal() and len(value) < 10:
        return int(value)
    if value in _WHERES or (isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _LARGEST):
        return value  # type: ignore[no-any-return]
    raise UsageError(f"where: {value!r:.60} is not one of {', '.join(_WHERES)}, or how many tokens of the reply")


def _messages(value: Any) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise UsageError("messages: give a list of messages, each with role and content")
    return [_message(number, message) for number, message in enumerate(value)]


def _message(number: int, value: Any) -> dict[str, str]:
    """One message: a content in parts becomes one text, what is null or names the speaker is left out."""
    where = f"messages[{number}]"
    if not isinstance(value, Mapping) or not isinstance(value.get("role"), str):
        raise UsageError(f"{where}: {value!r:.60} is not a message; give an object with role and content")
    if value["role"] not in ROLES and value["role"] != "developer":
        raise UsageError(f"{where}: role {value['role']!r:.60} is none of {', '.join(ROLES)}")
    message = {key: item for key, item in value.items() if item is not None and key != "name"}
    if isinstance(content := message.get("content"), list):
        texts = [part.get("text") for part in content if isinstance(part, Mapping) and part.get("type") == "text"]
        if len(texts) < len(content) or not all(isinstance(text, str) for text in texts):
            raise UsageError(f"{where}: its content has a part that is no text; give texts alone")
        message["content"] = "\n".join(map(str, texts))
    if not isinstance(message.get("content"), str):
        raise UsageError(f"{where}: its content is not a text")
    thought = message.get("reasoning_content", "")
    if not isinstance(thought, str) or (thought and value["role"] != "assistant"):
        raise UsageError(f"{where}: 'reasoning_content' is not a text, or not the assistant's")
    for key in message:
        if key not in ("role", "content", "reasoning_content"):
            raise UsageError(f"{where}: {key!r:.60} is not supported here; leave it out")
    return message | {"role": "system"} if message["role"] == "developer" else message


def _text(value: Any) -> str:
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if not isinstance(value, str) or not value:
        raise UsageError(f"prompt: {value!r:.60} is not a text; give one string")
    return value


def _stops(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) and 0 < len(stop) <= _LONGEST_STOP for stop in stops):
        raise UsageError(f"stop: {value!r:.60} is neither a text nor a list of texts")
    if len(stops) > _MOST_STOPS:
        raise UsageError(f"stop: {len(stops)} texts; give at most {_MOST_STOPS}")
    return tuple(stops)


def _number(name: str, value: Any, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high or math.isnan(value):
        raise UsageError(f"{name}: {value!r:.60} is not a number from {low:g} to {high:g}")
    return float(value)


def _whole(name: str, value: Any, low: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= _LARGEST:
        raise UsageError(f"{name}: {value!r:.60} is not a whole number from {low} on")
    return value


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise UsageError(f"{name}: {value!r:.60} is not true or false")
    return value


def _mapping(name: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise UsageError(f"{name}: {value!r:.60} is not an object")
    return value
