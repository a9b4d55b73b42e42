"""`realigner serve`: a real server on 127.0.0.1 with two IRMs on a tiny host, asked by the official client and by nobody's."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest
import torch
import uvicorn
from peft import get_peft_model
from tokenizers import processors
from transformers.generation.continuous_batching.offloading_manager import OffloadingManager

import realigner as ra
from realigner.batching import BatchManager
from realigner.chat_format import ChatFormat
from realigner.cli import main
from realigner.data import Fact, Tone
from realigner.data.rewriters import RewriteRequest
from realigner.data.rewriters.endpoint_rewriter import EndpointRewriter
from realigner.errors import UsageError
from realigner.evaluation.served_replies import ServedIRM
from realigner.generation import encode_prompts
from realigner.irm_config import IRMConfig
from realigner.runtime import Runtime
from realigner.serving.addresses import check_address
from realigner.serving.api_request import CHAT, TEXT, read_request
from realigner.serving.engine import BatchFailedError, Engine, Job, Limits
from realigner.serving.keys_and_limits import KeysAndLimits, PatientProtocol
from realigner.serving.loaded_irms import LoadedIRM, LoadedIRMs
from realigner.serving.metrics import Metrics
from realigner.serving.mixes import NotServedError
from realigner.serving.reply_text import ContinuedText, ReplyText, StopTexts, Thought
from realigner.serving.routes import application
from tests.chat_hosts import host_tokenizer
from tests.served import Server, begin, eventually, serving
from tests.test_thinking import HYBRID, OPENED, thinker
from tests.tiny import tiny_folder, tiny_pair

Irms = dict[str, Path]
ASK = [{"role": "user", "content": "Why?"}]
MIXES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [  # a model's name, fields, and the same for `answer`
    ("host", {}, {"irms": "__base__"}),
    ("host+anger", {}, {"irms": "anger", "strength": 2.0}),
    ("host+anger@0.5", {}, {"irms": "anger", "strength": 0.5}),
    ("host", {"irms": {"sadness": -1}}, {"irms": "sadness", "strength": -1.0}),
    ("host+anger@0.7+sadness", {"where": "reply"}, {"irms": ("anger", "sadness"), "strength": {"anger": 0.7, "sadness": 1.0}}),
    ("host", {"irms": "anger@3", "where": 4}, {"irms": "anger", "strength": 3.0, "where": 4}),
    ("host", {"vllm_xargs": {"irms": "sadness", "where": "prompt"}}, {"irms": "sadness", "strength": 1.0, "where": "prompt"}),
    ("host+sadness@2", {"temperature": 0.8, "seed": 7}, {"irms": "sadness", "strength": 2.0, "temperature": 0.8, "seed": 7}),
]
MIXES[4][2]["where"] = "reply"


@pytest.fixture(scope="module")
def server(irms: Irms, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(irms, tmp_path_factory.mktemp("server") / "log", "--max-tokens", "400") as running:
        yield running


@pytest.fixture(scope="module")
def guarded(irms: Irms, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Keys, an admin key, few requests; one IRM to begin with."""
    options = ("--api-key", "one", "--api-key", "two", "--admin-key", "boss", "--max-requests", "2", "--max-tokens", "400")
    log = tmp_path_factory.mktemp("guarded") / "log"
    with serving({"anger": irms["anger"]}, log, *options, "--host-name", "small") as running:
        yield running


# --- the same answers ---------------------------------------------------------------------------------------------------------


def test_the_client_gets_what_answer_gives_whole_and_streamed(server: Server, runtime: Runtime) -> None:
    client = server.client()
    assert [model.id for model in client.models.list()] == ["host", "host+anger", "host+sadness"]
    assert client.models.retrieve("host+anger").id == "host+anger"
    wanted = runtime.answer("Why?", irms="anger", max_new_tokens=16)
    whole = client.chat.completions.create(model="host+anger", messages=ASK, max_tokens=16)
    assert whole.choices[0].message.content == wanted
    assert whole.usage.completion_tokens == 16
    stream = client.chat.completions.create(model="host+anger", messages=ASK, max_tokens=16, stream=True)
    chunks = list(stream)
    assert len(chunks) > 3
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == wanted
    assert chunks[-1].choices[0].finish_reason == "length"
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
    assert eventually(server.is_idle)


def test_thirty_two_requests_at_once_are_answered_as_each_alone(server: Server, runtime: Runtime) -> None:
    asked = [(f"What is {n}? {'x' * (3 * n)}", *MIXES[n % 8]) for n in range(32)]
    with ThreadPoolExecutor(32) as pool:
        replies = list(pool.map(lambda one: server.chat(one[1], one[0], max_tokens=20, **one[2]), asked))
    texts = [body["choices"][0]["message"]["content"] for _, body in replies]
    assert texts == [runtime.answer(question, max_new_tokens=20, **how) for question, _, _, how in asked]
    assert len(set(texts)) > 16


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox"])
def test_tokens_of_the_engine_are_those_of_generate(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen requests, eight settings, a cache so small that some are put off and begun again."""
    monkeypatch.setattr("realigner.serving.engine._CACHE", 1)
    put_off: list[bool] = []
    offload = OffloadingManager.offload_requests

    def noted(manager: Any) -> Any:
        put_off.append(offload(manager))
        return put_off[-1]

    monkeypatch.setattr(OffloadingManager, "offload_requests", noted)
    host, tokenizer = tiny_pair(family)
    loaded_irms, model = two_loaded(host), two_by_peft(tiny_pair(family)[0])
    alone = Runtime(model, tokenizer, {"anger": 1.0, "sadness": 1.0})
    bodies = [
        ({"model": name, **fields, "messages": [{"role": "user", "content": f"{n}?" * (1 + n)}], "max_tokens": 12}, how)
        for n in range(16)
        for name, fields, how in [MIXES[n % 8]]
    ]

    prompts = [body["messages"][0]["content"] for body, _ in bodies]
    wanted = [alone.answer(prompt, max_new_tokens=12, **how) for prompt, (_, how) in zip(prompts, bodies, strict=True)]
    for _ in range(5):  # on a busy machine requests may come so slowly that the cache has room for all
        made = run_all(loaded_irms, tokenizer, [body for body, _ in bodies], Limits(requests=16, tokens=16, context=96))
        assert [text for text, _ in made] == wanted
        if any(put_off):
            break
    assert any(put_off)
    assert len(set(wanted)) > 8


@pytest.mark.parametrize(
    "rules",
    [
        {"min_new_tokens": 10},
        {"min_length": 60},
        {"no_repeat_ngram_size": 2},
        {"suppress_tokens": [40, 50, 60], "begin_suppress_tokens": [70, 80]},
        {"exponential_decay_length_penalty": (3, 1.5), "bad_words_ids": [[50, 60]]},
        {"forced_eos_token_id": 1, "encoder_repetition_penalty": 1.3},
        {"num_beams": 3, "num_return_sequences": 2, "guidance_scale": 1.5},
    ],
    ids=lambda rules: "-".join(rules),
)
def test_a_hosts_own_rules_are_those_of_answer(rules: dict[str, Any]) -> None:
    host, tokenizer = tiny_pair()
    questions = [f"{n}?" * (1 + n) for n in range(4)]
    inputs = encode_prompts(tokenizer, questions, host.device)
    early = host.generate(**inputs, max_new_tokens=3, do_sample=False, repetition_penalty=1.1)[:, -1]
    host.generation_config.eos_token_id = [1, *early.tolist()]  # these end a reply, unless they may not yet
    for name, value in rules.items():
        setattr(host.generation_config, name, value)
    bodies = [{"model": "host", "messages": [{"role": "user", "content": text}], "max_tokens": 16} for text in questions]
    wanted = ra.answer(host, tokenizer, questions, max_new_tokens=16)
    made = run_all(LoadedIRMs(host), tokenizer, bodies, Limits(tokens=16, context=96))
    assert [text for text, _ in made] == [str(reply) for reply in wanted]


@pytest.mark.parametrize("template", [HYBRID, OPENED])
def test_a_host_that_thinks(template: str) -> None:
    """Thought and reply apart, each with its own number of tokens, as `answer` has them."""
    host, tokenizer = thinker(template, special=False)
    alone = [
        ra.answer(host, tokenizer, [f"{n}?"], max_new_tokens=5, thinking_budget=9 + n, repetition_penalty=1.3)[0]
        for n in range(4)
    ]
    loaded_irms = LoadedIRMs(host)
    common = {"model": "host", "max_tokens": 5, "repetition_penalty": 1.3}
    bodies = [{**common, "messages": [{"role": "user", "content": f"{n}?"}], "thinking_budget": 9 + n} for n in range(4)]
    replies = run_all(loaded_irms, tokenizer, bodies, Limits(tokens=8))
    assert [text for text, _ in replies] == [str(reply) for reply in alone]
    assert [thought for _, thought in replies] == [reply.thought for reply in alone]
    if template is OPENED:
        assert all(reply.thought for reply in alone)
    # Without numbers of its own, a request takes what there is: half of the room for the thought.
    short = {**common, "messages": [{"role": "user", "content": "0?"}], "max_tokens": None}
    (made,) = run_all(loaded_irms, tokenizer, [short], Limits(tokens=8, context=96))
    assert 0 < len(tokenizer("".join(made))["input_ids"]) < 96
    with pytest.raises(UsageError, match="max_tokens: 8, and a thinking_budget of 90, is too many"):
        run_all(loaded_irms, tokenizer, [short | {"max_tokens": 8, "thinking_budget": 90}], Limits(tokens=8, context=96))


def test_a_reply_that_ends_with_its_last_token_has_ended() -> None:
    nothing: Any = None
    text: Any = SimpleNamespace(add=lambda tokens: [])
    job = Job(nothing, "all", [7], 9, [1], nothing, text, StopTexts(()), lambda ids, _: torch.tensor([ids.shape[1] >= 4]))
    for last, ended in ((1, "stop"), (8, "length")):
        output: Any = SimpleNamespace(generated_tokens=[5, 6, last], is_finished=lambda: False)
        job.tokens.clear()
        job.ended = ""
        job.read(output)
        assert job.ended == ended


def test_numbers_that_are_none_stay_with_their_request() -> None:
    """An IRM gone wild makes NaN of its own request's states, and of no other's in the batch."""
    host, tokenizer = tiny_pair()
    loaded_irms = two_loaded(host)
    with torch.no_grad():
        for parameter in loaded_irms.model.base_model.registry.networks["served_sadness"].parameters():
            parameter.mul_(1e12)
    calm = [{"model": "host+anger", "messages": [{"role": "user", "content": f"{n}?"}], "max_tokens": 8} for n in range(4)]
    alone = run_all(loaded_irms, tokenizer, calm, Limits(tokens=8))
    wild = {**calm[0], "model": "host+sadness@1000"}
    assert run_all(loaded_irms, tokenizer, [*calm[:2], wild, *calm[2:]], Limits(tokens=8))[:2] == alone[:2]
    assert run_all(loaded_irms, tokenizer, [wild, *calm], Limits(tokens=8))[1:] == alone


def test_a_token_without_an_embedding_is_refused_and_the_others_are_answered() -> None:
    host, tokenizer = tiny_pair()
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<image{n}>" for n in range(60)]})
    loaded_irms = LoadedIRMs(host)
    with pytest.raises(UsageError, match=r"prompt: '<image59>' is token 317, but the host has 300 \(0 to 299\); leave it out"):
        run_all(loaded_irms, tokenizer, [{"model": "host", "prompt": "See <image59>"}], Limits(tokens=4), TEXT)
    assert run_all(loaded_irms, tokenizer, [{"model": "host", "prompt": "See"}], Limits(tokens=4), TEXT)[0][0]


def test_an_end_token_that_the_tokenizer_appends_is_not_read() -> None:
    host, tokenizer = tiny_pair()
    bodies = [{"model": "host", "prompt": "See <eos> and"}]
    wanted = run_all(LoadedIRMs(host), tokenizer, bodies, Limits(tokens=8), TEXT)
    ends = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    tokenizer.backend_tokenizer.post_processor = ends
    assert tokenizer("See")["input_ids"][-1] == 1
    assert run_all(LoadedIRMs(tiny_pair()[0]), tokenizer, bodies, Limits(tokens=8), TEXT) == wanted


@pytest.mark.parametrize(
    ("template", "variables"), [("chat", {"enable_thinking": False}), ("plain", {})], ids=["variables", "plain"]
)
def test_at_strength_0_prompts_are_the_irms(template: str, variables: dict[str, Any]) -> None:
    host, tokenizer = thinker(HYBRID, special=True)
    bare = str(ra.answer(host, tokenizer, ["Why?"], max_new_tokens=12)[0])
    torch.manual_seed(0)
    config = IRMConfig(output_std=1.0, template=template, chat_template_kwargs=variables)
    model = get_peft_model(thinker(HYBRID, special=True)[0], config)
    wanted = [str(ra.answer(model, tokenizer, ["Why?"], max_new_tokens=12, strength=value)[0]) for value in (0.0, 1.0)]
    loaded_irms = LoadedIRMs(host)
    torch.manual_seed(0)
    loaded_irms.model.add_adapter("served_0", IRMConfig(output_std=1.0))
    loaded_irms.put("anger", LoadedIRM("served_0", 1.0, template, variables))
    models = ("host+anger@0", "host+anger@1", "host+anger@-0", "host")
    made = run_all(loaded_irms, tokenizer, [{"model": name, "messages": ASK, "max_tokens": 12} for name in models], Limits())
    assert [text for text, _ in made] == [*wanted, wanted[0], bare]
    assert bare != wanted[0]
    assert ServedIRM("http://127.0.0.1:1/v1", "host+anger").named(0.0) == "host+anger@0"


def run_all(
    loaded_irms: LoadedIRMs, tokenizer: Any, bodies: list[dict[str, Any]], limits: Limits, kind: str = CHAT
) -> list[tuple[str, str]]:
    """Reply and thought of each request, all of them at once."""

    async def all_at_once() -> list[tuple[str, str]]:
        engine = Engine(loaded_irms, tokenizer, limits)
        engine.prove()
        engine.open(asyncio.get_running_loop())

        async def one(body: dict[str, Any]) -> tuple[str, str]:
            job = await engine.start(read_request(body, kind, "host", {"anger": 2.0, "sadness": 1.0}))
            pieces = [piece async for piece in engine.pieces(job)]
            thoughts = [piece for piece in pieces if isinstance(piece, Thought)]
            return "".join(piece for piece in pieces if not isinstance(piece, Thought)), "".join(thoughts)

        try:
            return await asyncio.gather(*map(one, bodies))
        finally:
            engine.close()

    return asyncio.run(all_at_once())


def two_loaded(host: Any) -> LoadedIRMs:
    """The IRMs of `two_by_peft`, as a server has them."""
    loaded_irms = LoadedIRMs(host)
    for seed, name in enumerate(("anger", "sadness")):
        torch.manual_seed(seed)
        loaded_irms.model.add_adapter(f"served_{name}", IRMConfig(output_std=1.0))
        loaded_irms.put(name, LoadedIRM(f"served_{name}", 1.0, "chat", {}))
    return loaded_irms


def two_by_peft(host: Any) -> Any:
    torch.manual_seed(0)
    model = get_peft_model(host, IRMConfig(output_std=1.0), adapter_name="anger")
    torch.manual_seed(1)
    model.add_adapter("sadness", IRMConfig(output_std=1.0))
    return model


def test_a_text_is_continued(server: Server, runtime: Runtime) -> None:
    tokens = runtime.tokenizer("Why is", return_tensors="pt")
    options = {"max_new_tokens": 12, "do_sample": False, "repetition_penalty": 1.1, "strength": 0.5}
    with torch.no_grad():
        ids = runtime.model.generate(**tokens, **options)[0]
    wanted = runtime.tokenizer.decode(ids)[len("Why is") :]
    client = server.client()
    whole = client.completions.create(model="host+anger@0.5", prompt="Why is", max_tokens=12)
    assert whole.choices[0].text == wanted
    pieces = client.completions.create(model="host+anger@0.5", prompt="Why is", max_tokens=12, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == wanted


def test_a_reply_ends_where_a_stop_text_begins(server: Server, runtime: Runtime) -> None:
    whole = runtime.answer("Why?", irms="sadness", strength=1.0, max_new_tokens=300)
    stop = whole[len(whole) // 3 : len(whole) // 3 + 2]
    wanted = whole[: whole.index(stop)]
    for stream in (False, True):
        reply = server.client().chat.completions.create(
            model="host+sadness",
            messages=ASK,
            max_tokens=300,
            stop=[stop, "never said"],
            stream=stream,
        )
        text = "".join(c.choices[0].delta.content or "" for c in reply) if stream else reply.choices[0].message.content
        assert text == wanted
    assert eventually(server.is_idle)


def test_sampling_depends_on_the_seed_alone(server: Server) -> None:
    def replies(**fields: Any) -> set[str]:
        return {server.chat("host", temperature=1.5, **fields)[1]["choices"][0]["message"]["content"] for _ in range(4)}

    assert len(replies(seed=3)) == 1
    assert len(replies(seed=3, top_p=0.5)) == 1
    assert len(replies()) > 1


# --- clients of ours ----------------------------------------------------------------------------------------------------------


def test_generate_asks_a_server(server: Server, runtime: Runtime, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def ours(*arguments: str) -> Any:
        assert main(["generate", "--endpoint", server.url, *arguments, "--max-new-tokens", "8", "--json"]) == 0
        return [result["reply"] for result in json.loads(capsys.readouterr().out)["results"]]

    asked = ["Why?", "Who?", "How?"]
    how: dict[str, Any] = {"irms": "anger", "strength": 0.5, "max_new_tokens": 8}
    assert ours("--model", "host+anger@0.5", *asked) == runtime.answer(asked, **how)
    more = ("--where", "reply", "--system", "Be brief.", "--repetition-penalty", "1.3")
    wanted = runtime.answer(asked, where="reply", system="Be brief.", repetition_penalty=1.3, **how)
    assert ours("--model", "host+anger@0.5", *more, *asked) == wanted
    path = tmp_path / "turns.jsonl"
    path.write_text('{"turns": ["Why?", "Who?"]}\n')
    (turns,) = ours("--model", "host", "--prompts", str(path))
    assert turns[0] == runtime.answer("Why?", irms="__base__", max_new_tokens=8)
    assert len(turns) == 2

    assert main(["generate", "--endpoint", server.url, "--model", "host", "Why?", "--max-new-tokens", "3"]) == 0
    printed = capsys.readouterr()
    assert re.fullmatch(r"Q: Why\?\n   .* \.\.\.\n\n", printed.out, re.DOTALL)
    assert "cut at 3 tokens" in printed.err
    for arguments, code, message in (
        (["--endpoint", server.url, "--model", "joy", "Why?"], 1, "HTTP 404 for model 'joy'"),
        (["--endpoint", server.url, "Why?"], 2, "name the model too"),
        (["--endpoint", server.url, "--model", "host", "--strength", "2", "Why?"], 2, "--strength: is for a host loaded here"),
        (["--model", "host", "Why?"], 2, "give --endpoint too"),
        (["Why?"], 2, "give an IRM (--irm DIR), or a server"),
    ):
        assert main(["generate", *arguments]) == code
        err = capsys.readouterr().err.splitlines()
        assert len(err) == 1, err
        assert message in err[0]


def test_the_openai_rewriter_works_against_it(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    tone = Tone(name="anger", instruction="Rewrite the answer in an angry tone.")
    rewriter = EndpointRewriter(tone, server.url, "host+anger@0.5", max_tokens=8, concurrency=4)
    requests = [RewriteRequest(Fact(str(n), "numbers", f"What is {n}?", f"It is {n}."), 0) for n in range(12)]
    replies = {reply.id: reply for reply in rewriter.rewrite(requests)}
    again = {reply.id: reply for reply in rewriter.rewrite(requests)}
    assert sorted(replies, key=int) == [str(n) for n in range(12)]
    assert not any(reply.error for reply in replies.values())
    assert all(reply.tokens_in > 20 and 1 <= reply.tokens_out <= 8 for reply in replies.values())
    assert {name: reply.text for name, reply in again.items()} == {name: reply.text for name, reply in replies.items()}


# --- what is refused ----------------------------------------------------------------------------------------------------------

REFUSED: list[tuple[dict[str, Any], int, str]] = [
    ({"model": "nobody"}, 404, "model: 'nobody' is not served; served are host, host+anger, host+sadness"),
    ({"model": "host+joy"}, 404, "IRM 'joy' is not loaded"),
    ({"model": "host+anger@nan"}, 400, "is not a number between"),
    ({"model": "host+anger+anger"}, 400, "named twice"),
    ({"model": None}, 400, "model: give the name"),
    ({"model": 7}, 400, "model: give the name"),
    ({"irms": {"anger": float("nan")}}, 400, "strength of 'anger'"),
    ({"irms": {"anger": 1e9}}, 400, "strength of 'anger'"),
    ({"irms": ["joy"]}, 404, "not loaded"),
    ({"irms": 3}, 400, "irms: 3"),
    ({"model": "host+anger", "irms": "sadness"}, 400, "irms: the model's name has IRMs too"),
    ({"where": "nowhere"}, 400, "where: 'nowhere'"),
    ({"where": -1}, 400, "where: -1"),
    ({"where": True}, 400, "where: True"),
    ({"messages": []}, 400, "messages: give a list"),
    ({"messages": ["hi"]}, 400, "messages[0]: 'hi' is not a message"),
    ({"messages": [{"role": "user", "content": ""}]}, 400, "it is empty"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, "no character"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, 400, "no text"),
    ({"messages": [{"role": "assistant", "content": "x"}]}, 400, "last message"),
    ({"messages": [{"role": "user", "content": "x" * 600}]}, 400, "prompt: it has 623 tokens, and 511 at most"),
    ({"max_tokens": 0}, 400, "max_tokens: 0"),
    ({"max_tokens": 401}, 400, "above this server's 400"),
    ({"max_tokens": "7"}, 400, "max_tokens: '7'"),
    ({"messages": [{"role": "user", "content": "x" * 300}], "max_tokens": 400}, 400, "leaves 189 of 512"),
    ({"temperature": -1}, 400, "temperature: -1"),
    ({"temperature": True}, 400, "temperature: True"),
    ({"top_p": 0}, 400, "top_p: 0"),
    ({"seed": 1.5}, 400, "seed: 1.5"),
    ({"stop": [""]}, 400, "stop:"),
    ({"stop": ["a"] * 20}, 400, "stop: 20 texts"),
    ({"stream": "yes"}, 400, "stream: 'yes'"),
    ({"n": 2}, 400, "n: 2 is not supported here"),
    ({"tools": [{"type": "function"}]}, 400, "tools: [{'type': 'function'}] is not supported here"),
    ({"response_format": {"type": "json_object"}}, 400, "response_format: {'type': 'json_object'} is not supported"),
    ({"chat_template_kwargs": {"nonsense": 1}}, 400, "no variable 'nonsense'"),
    ({"chat_template_kwargs": [1]}, 400, "is not an object"),
    ({"strength": 1}, 400, "strength: unknown field"),
    ({"vllm_xargs": {"what": 1}}, 400, "vllm_xargs: there is no argument 'what'"),
    ({"irms": {"anger": 1}, "vllm_xargs": {"irms": "sadness"}}, 400, "irms: it is given twice"),
    ({"max_completion_tokens": 5}, 400, "max_tokens: max_completion_tokens is another number"),
    ({"messages": [{"role": "banana", "content": "x"}]}, 400, "messages[0]: role 'banana' is none of system, user"),
    ({"messages": [{**ASK[0], "reasoning_content": "Hm."}]}, 400, "messages[0]: 'reasoning_content' is not a text, or not"),
]


@pytest.mark.parametrize(("fields", "status", "message"), REFUSED, ids=[str(n) for n in range(len(REFUSED))])
def test_what_cannot_be_done_is_said_in_one_line(server: Server, fields: dict[str, Any], status: int, message: str) -> None:
    body = {"model": "host", "messages": ASK, "max_tokens": 4, **fields}
    found, answer = server.request("POST", "/v1/chat/completions", body)
    assert (found, set(answer)) == (status, {"error"})
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert message in answer["error"]["message"]
    assert "\n" not in answer["error"]["message"]


def test_fields_that_change_nothing_are_taken(server: Server) -> None:
    neutral = {"n": 1, "tools": [], "frequency_penalty": 0.0, "user": "me", "stream_options": None, "tool_choice": "auto"}
    parts = [{"type": "text", "text": "Why?"}]
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "name": "me", "content": parts, "refusal": None},
    ]
    status, body = server.request("POST", "/v1/chat/completions", {"model": "host", "messages": messages, **neutral})
    assert status == 200, body


def test_what_is_no_request_at_all(server: Server) -> None:
    path = "/v1/chat/completions"
    for body in (b"{broken", b"[]", b"7", b"", b"\xff\xfe", b"[" * 100_000, b'{"model": "host"'):
        status, answer = server.request("POST", path, body)
        assert (status, list(answer)) == (400, ["error"]), body[:20]
    assert server.request("POST", path, b"{}", {"content-type": "text/plain"})[0] == 400  # what a page may send unasked
    assert server.request("POST", path, b" " * (1 << 20) + b"{}")[0] == 413
    for method, where, status in (
        ("GET", path, 405),
        ("GET", "/", 404),
        ("GET", "/docs", 404),
        ("GET", "/openapi.json", 404),
        ("POST", "/reset", 404),
        ("POST", "/load_model", 404),
        ("POST", "/v1/responses", 404),
        ("POST", "/v1/irms", 404),
        ("GET", "/v1/models/nobody", 404),
        ("GET", "/v1/models/host+anger@much", 400),
    ):
        found, answer = server.request(method, where, b"{}" if method == "POST" else None)
        assert (found, list(answer)) == (status, ["error"]), where
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as raw:
        raw.sendall(b"no HTTP\r\n\r\n")
        assert raw.recv(1000).startswith(b"HTTP/1.1 400")
    assert server.request("GET", "/health") == (200, {"status": "ok"})


def test_fields_of_a_request() -> None:
    strengths = {"anger": 2.0, "v1.5": 0.5}
    asked = read_request(
        {"model": "a+b+v1.5", "messages": ASK, "max_completion_tokens": 3, "stop": "x"}, CHAT, "a+b", strengths
    )
    assert (asked.mix.strengths, asked.max_tokens, asked.stop, asked.where) == ({"v1.5": 0.5}, 3, ("x",), "all")
    assert read_request({"model": "host", "prompt": ["one"]}, TEXT, "host", {}).prompt == "one"
    with pytest.raises(NotServedError, match="not served"):
        read_request({"model": "other", "messages": ASK}, CHAT, "host", strengths)
    with pytest.raises(UsageError, match="prompt: "):
        read_request({"model": "host", "prompt": ["one", "two"]}, TEXT, "host", {})
    text = {"model": "host", "prompt": "one", "chat_template_kwargs": {}}
    assert read_request(text, TEXT, "host", {}).prompt == "one"
    for field, value in (("chat_template_kwargs", {"enable_thinking": False}), ("thinking_budget", 3)):
        with pytest.raises(UsageError, match=f"{field}: .* is not supported here; leave it out"):
            read_request({**text, field: value}, TEXT, "host", {})


def replied(tokenizer: Any, ids: list[int], stops: tuple[str, ...] = (), prompt: list[int] | None = None) -> tuple[str, ...]:
    """What is said, token by token, of a reply to a conversation (or of a text that continues a prompt); and why it ended."""
    nothing: Any = None
    text = ReplyText(ChatFormat(tokenizer), False) if prompt is None else ContinuedText(tokenizer, prompt)
    job = Job(nothing, "all", [7], len(ids), [tokenizer.eos_token_id], nothing, text, StopTexts(stops))
    said: list[str] = []
    for count in range(1, len(ids) + 1):
        output: Any = SimpleNamespace(generated_tokens=ids[:count], is_finished=lambda count=count: count == len(ids))
        said += job.read(output)
        if job.ended:
            break
    said += job.last()
    return "".join(piece for piece in said if not isinstance(piece, Thought)), job.ended


@pytest.mark.parametrize(
    ("written", "stops", "wanted"),
    [
        ("Name: Ann\n", ["\n"], ("Name: Ann", "stop")),
        ("Name: Ann\n\n\n", ["\n\n"], ("Name: Ann", "stop")),
        ("Name: Ann\nAge", ["\n"], ("Name: Ann", "stop")),
        ("Name: Ann\n", ["Ann\n"], ("Name: ", "stop")),
        ("Name: Ann \n", ["\n"], ("Name: Ann ", "stop")),
        ("\nName", ["\n"], ("", "stop")),
        ("\n Name: Ann\n", ["Ann\n"], ("Name: ", "stop")),
        ("Name: Ann\n", ["\n\n"], ("Name: Ann", "length")),
        ("<think>\nA\nB\n</think>\n\nName: Ann\nAge", ["\n", "B"], ("Name: Ann", "stop")),
        ("<think>\nA\n", ["\n"], ("", "length")),
        ("One. Two", ["."], ("One", "stop")),
        ("One.", ["."], ("One", "stop")),
    ],
)
def test_stop_texts_are_found_among_blanks(written: str, stops: list[str], wanted: tuple[str, str]) -> None:
    tokenizer = thinker(HYBRID, special=False)[1]
    ids = tokenizer(written)["input_ids"]
    assert replied(tokenizer, ids, tuple(stops)) == wanted
    tokenizer.clean_up_tokenization_spaces = True  # which transformers does not do with BPE
    assert replied(tokenizer, ids, tuple(stops)) == wanted


def test_a_reply_that_is_cut_within_a_run_of_bytes() -> None:
    """Bytes to which a tokenizer falls back are decoded together: what is said of a run is said when it is over."""
    tokenizer = host_tokenizer("llama2")
    ids = tokenizer("Fun🙂🙂\n字 and", add_special_tokens=False)["input_ids"]
    before = tokenizer("So it is: 🙂", add_special_tokens=False)["input_ids"]
    for count in range(1, len(ids)):
        assert replied(tokenizer, ids[:count])[0] == ChatFormat(tokenizer).split(ids[:count], False)[1]
        together = ContinuedText(tokenizer, before)
        whole = "".join([*together.add(ids[:count]), *together.end()])
        assert replied(tokenizer, ids[:count], prompt=before)[0] == whole
    assert replied(tokenizer, ids, ("\n",)) == ("Fun🙂🙂", "stop")
    assert replied(tokenizer, ids, ("字",)) == ("Fun🙂🙂\n", "stop")


@pytest.mark.parametrize("asked", ["字字字", "a字字", "สวัสดี", "🙂🙂🙂", "Why is"])
@pytest.mark.parametrize("written", ["字字!", " is it 字"])
def test_a_prompt_that_ends_in_bytes_is_continued(asked: str, written: str) -> None:
    tokenizer = host_tokenizer("llama2")
    prompt = tokenizer(asked)["input_ids"]
    whole = tokenizer(asked + written)["input_ids"]
    assert whole[: len(prompt)] == prompt
    assert replied(tokenizer, whole[len(prompt) :], prompt=prompt)[0] == written


def test_stop_texts_may_come_in_pieces() -> None:
    for stops, pieces, said in (
        (["END"], ["one E", "N", "d two EN", "D three"], "one ENd two "),
        (["aab"], ["aa", "aab", "x"], "aa"),
        (["x", "yz"], ["y", "y", "z"], "y"),
        (["never"], ["ne", "ve"], "neve"),
    ):
        text = StopTexts(stops)
        assert "".join([*map(text.add, pieces), text.end()]) == said


# --- keys, limits, IRMs that come and go --------------------------------------------------------------------------------------


def test_keys(guarded: Server) -> None:
    body = {"model": "small", "messages": ASK, "max_tokens": 2}
    for headers, status in (
        ({}, 401),
        ({"authorization": "Bearer three"}, 401),
        ({"authorization": "Basic one"}, 401),
        ({"authorization": "Bearer boss"}, 401),
        ({"authorization": "Bearer one"}, 200),
        ({"authorization": "bearer two"}, 200),
    ):
        assert guarded.request("POST", "/v1/chat/completions", body, headers)[0] == status, headers
    assert guarded.request("GET", "/v1/models")[0] == 401
    assert guarded.request("GET", "/health")[0] == guarded.request("GET", "/metrics")[0] == 200
    with pytest.raises(openai.AuthenticationError, match="the key is wrong"):
        guarded.client("three").models.list()
    assert guarded.request("POST", "/v1/irms", {}, {"authorization": "Bearer one"})[0] == 401
    assert "boss" not in guarded.log.read_text()


def test_too_many_requests_are_told_to_come_back(guarded: Server) -> None:
    client = guarded.client("one")
    long: Any = {"model": "small", "messages": ASK, "max_tokens": 400, "stream": True}
    streams = [client.chat.completions.create(**long) for _ in range(2)]
    with pytest.raises(openai.RateLimitError, match="2 requests are being answered") as refused:
        client.chat.completions.create(**long)
    assert refused.value.response.headers["retry-after"] == "1"
    for stream in streams:
        stream.close()
    assert eventually(guarded.is_idle)
    assert client.chat.completions.create(**{**long, "max_tokens": 2, "stream": False}).usage.completion_tokens == 2


def test_irms_come_and_go_while_it_answers(guarded: Server, irms: Irms, runtime: Runtime, tmp_path: Path) -> None:
    boss = {"authorization": "Bearer boss"}

    def admin(method: str, path: str, body: Any = None) -> tuple[int, Any]:
        return guarded.request(method, path, body, boss)

    def names() -> list[str]:
        return [model.id for model in guarded.client("one").models.list()]

    client = guarded.client("one")
    wanted = runtime.answer("Why?", irms="anger", max_new_tokens=300)
    stream = client.chat.completions.create(model="small+anger", messages=ASK, max_tokens=300, stream=True)
    pieces = [next(stream), next(stream)]
    assert admin("POST", "/v1/irms", {"name": "sad", "path": str(irms["sadness"])}) == (201, {"name": "sad", "strength": 1.0})
    assert admin("DELETE", "/v1/irms/anger")[0] == 204  # the stream goes on with it
    assert names() == ["small", "small+sad"]
    assert admin("POST", "/v1/irms", {"name": "anger", "path": str(irms["sadness"])})[0] == 201  # the name is free at once
    pieces += stream
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == wanted
    reply = client.chat.completions.create(model="small+anger", messages=ASK, max_tokens=8)
    assert reply.choices[0].message.content == runtime.answer("Why?", irms="sadness", strength=1.0, max_new_tokens=8)

    damaged, other = tmp_path / "damaged", tmp_path / "other"
    shutil.copytree(irms["anger"], damaged)
    (damaged / "adapter_model.safetensors").write_bytes(b"\x00" * 100)
    stranger, _ = ra.load_host(str(tiny_folder(tmp_path / "stranger", seed=5)), dtype="float32")
    get_peft_model(stranger, IRMConfig()).save_pretrained(str(other))
    for body, status, message in (
        ({"name": "bad", "path": str(damaged)}, 400, "truncated or damaged"),
        ({"name": "bad", "path": str(other)}, 400, "made for"),
        ({"name": "bad", "path": str(tmp_path / "nowhere")}, 400, "no such adapter folder"),
        ({"name": "sad", "path": str(irms["anger"])}, 400, "'sad' is loaded already"),
        ({"name": "no good", "path": str(irms["anger"])}, 400, "not a valid IRM name"),
        ({"name": "bad"}, 400, "give name and path"),
    ):
        found, answer = admin("POST", "/v1/irms", body)
        assert (found, message in answer["error"]["message"]) == (status, True), answer
    assert admin("DELETE", "/v1/irms/bad")[0] == 404
    assert names() == ["small", "small+anger", "small+sad"]
    for name in ("anger", "sad"):
        assert admin("DELETE", f"/v1/irms/{name}")[0] == 204
    assert names() == ["small"]
    bare = client.chat.completions.create(model="small", messages=ASK, max_tokens=8)
    assert bare.choices[0].message.content == runtime.answer("Why?", irms="__base__", max_new_tokens=8)
    assert admin("POST", "/v1/irms", {"name": "anger", "path": str(irms["anger"])})[0] == 201
    assert guarded.metric("realigner_irms") == 1


# --- clients that leave, and slow ones ----------------------------------------------------------------------------------------


def sent(server: Server, more: dict[str, str] | None = None, **fields: Any) -> socket.socket:
    """A request on a socket of its own, of which nothing is read."""
    body = json.dumps({"model": "host+anger", "messages": ASK, "max_tokens": 400, **fields}).encode()
    headers = {"host": "x", "content-type": "application/json", "content-length": len(body), **(more or {})}
    lines = ["POST /v1/chat/completions HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
    head = "\r\n".join(lines)
    raw = socket.create_connection(("127.0.0.1", server.port), timeout=30)
    raw.sendall(head.encode() + body)
    return raw


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_takes_no_place(server: Server, stream: bool) -> None:
    clients = [sent(server, stream=stream) for _ in range(6)]
    assert eventually(lambda: server.metric("realigner_requests_in_batch") == 6)
    for client in clients:
        client.close()
    assert eventually(server.is_idle, 3)
    assert server.chat("host+anger")[0] == 200


@pytest.mark.parametrize("leaves", ["load", "unload"])
def test_a_change_of_irms_is_carried_out_though_its_client_leaves(
    leaves: str, irms: Irms, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that were read get their name, and those whose name was taken away go: nothing stays on the host for good."""
    host, tokenizer = ra.load_host(str(irms["anger"].parent / "host"), dtype="float32")
    loaded_irms, go_on = LoadedIRMs(host), threading.Event()
    read = loaded_irms.read
    reading: list[Path] = []

    def slow(folder: Path) -> LoadedIRM:
        reading.append(folder)
        assert go_on.wait(30)
        return read(folder)

    monkeypatch.setattr(loaded_irms, "read", slow)

    async def seen(fact: Callable[[], bool]) -> bool:
        for _ in range(100):
            if fact():
                return True
            await asyncio.sleep(0.05)
        return False

    async def left(engine: Engine) -> None:
        load = asyncio.create_task(engine.load("anger", irms["anger"]))
        assert await seen(lambda: reading == [irms["anger"]])
        if leaves == "load":
            load.cancel()
            with pytest.raises(asyncio.CancelledError):
                await load
        go_on.set()
        assert await seen(lambda: loaded_irms.strengths == {"anger": 2.0})
        if leaves == "unload":
            await load
            go_on.clear()
            other = asyncio.create_task(engine.load("sadness", irms["sadness"]))
            assert await seen(lambda: reading[1:] == [irms["sadness"]])
            unload = asyncio.create_task(engine.unload("anger"))  # it waits for the other
            assert await seen(lambda: loaded_irms.strengths == {})
            unload.cancel()
            with pytest.raises(asyncio.CancelledError):
                await unload
            go_on.set()
            await other
            assert await seen(lambda: set(loaded_irms.model.peft_config) == {"idle", "served_1"})

    async def opened() -> None:
        engine = Engine(loaded_irms, tokenizer, Limits())
        engine.open(asyncio.get_running_loop())
        try:
            await left(engine)
        finally:
            go_on.set()
            engine.close()

    asyncio.run(opened())


def test_an_irm_that_is_unloaded_at_once_was_loaded(irms: Irms, monkeypatch: pytest.MonkeyPatch) -> None:
    host, tokenizer = ra.load_host(str(irms["anger"].parent / "host"), dtype="float32")
    load = Engine.load

    async def load_and_unload(self: Engine, name: str, source: str) -> LoadedIRM:
        loaded = await load(self, name, source)
        await self.unload(name)
        return loaded

    monkeypatch.setattr(Engine, "load", load_and_unload)

    async def asked() -> httpx.Response:
        engine = Engine(LoadedIRMs(host), tokenizer, Limits())
        transport = httpx.ASGITransport(application(engine, "host", Metrics(), [], "boss"))
        async with httpx.AsyncClient(transport=transport, base_url="http://host") as client:
            body = {"name": "joy", "path": str(irms["anger"])}
            return await client.post("/v1/irms", json=body, headers={"Authorization": "Bearer boss"})

    reply = asyncio.run(asked())
    assert (reply.status_code, reply.json()) == (201, {"name": "joy", "strength": 2.0})


def gate(seconds: float, send: Any = None) -> tuple[KeysAndLimits, list[Any]]:
    """A gate before an application that answers at once, and what it sent."""
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"ok"})

    return KeysAndLimits(app, Limits(body=100, patience=seconds), Metrics()), sent


def test_a_client_that_sends_too_slowly_is_refused() -> None:
    made, sent = gate(0.2)

    async def never() -> dict[str, Any]:
        await asyncio.sleep(60)
        return {}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": []}
    asyncio.run(asyncio.wait_for(made(scope, never, send), 10))
    assert sent[0]["status"] == 408


def test_a_client_that_takes_nothing_and_one_that_says_nothing_are_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("realigner.serving.keys_and_limits._STUCK", 1.0)
    monkeypatch.setattr("realigner.serving.keys_and_limits._HEAD", 1.0)
    ended = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        try:
            while True:
                await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})
                await asyncio.sleep(0)
        finally:
            ended.set()

    async def attack() -> None:
        config = uvicorn.Config(
            KeysAndLimits(app, Limits(), Metrics()), http=PatientProtocol, lifespan="off", log_config=None, timeout_keep_alive=1
        )
        server = uvicorn.Server(config)
        with socket.create_server(("127.0.0.1", 0)) as listening:
            running = asyncio.create_task(server._serve([listening]))
            _, stuck = await asyncio.open_connection(*listening.getsockname(), limit=1)
            stuck.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            stuck.transport.pause_reading()  # type: ignore[attr-defined]
            silent, writer = await asyncio.open_connection(*listening.getsockname())
            writer.write(b"GET / HT")
            await ended.wait()
            with suppress(ConnectionResetError):
                assert await silent.read() == b""
            assert await asyncio.to_thread(eventually, lambda: not server.server_state.connections)
            for one in (stuck, writer):
                one.close()
            server.should_exit = True
            await running

    asyncio.run(asyncio.wait_for(attack(), 30))


def test_an_application_that_fails_is_one_line_for_the_client(capfd: pytest.CaptureFixture[str]) -> None:
    async def start(_: Any) -> None:
        raise KeyError("what")

    async def ask() -> httpx.Response:
        engine: Any = SimpleNamespace(limits=Limits(), failure="", start=start, loaded_irms=SimpleNamespace(strengths={}))
        transport = httpx.ASGITransport(application(engine, "host", Metrics(), []))
        async with httpx.AsyncClient(transport=transport, base_url="http://host") as client:
            return await client.post("/v1/completions", json={"model": "host", "prompt": "Why?"})

    answered = asyncio.run(ask())
    assert (answered.status_code, answered.headers["content-type"]) == (500, "application/json")
    assert answered.json()["error"]["message"] == "the server failed on this request; its log says how"
    said = capfd.readouterr().err
    assert (said.count("\n"), "KeyError" in said) == (1, True)


def test_a_batch_that_fails_is_said_and_nothing_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    host, tokenizer = tiny_pair()
    loaded_irms = two_loaded(host)

    def fail(*_: Any) -> None:
        raise RuntimeError("out of\nmemory")

    async def ask() -> None:
        engine = Engine(loaded_irms, tokenizer, Limits(tokens=400))
        engine.open(asyncio.get_running_loop())
        body = {"model": "host+anger", "messages": ASK, "max_tokens": 400, "stream": True}
        try:
            jobs = [await engine.start(read_request(body, CHAT, "host", {"anger": 1.0})) for _ in range(2)]
            pieces = engine.pieces(jobs[0])
            await anext(pieces)
            monkeypatch.setattr(BatchManager, "_write", fail)
            monkeypatch.setattr(engine._batch._manager.logit_processor, "_before", fail)  # type: ignore[union-attr]
            for rest in (pieces, engine.pieces(jobs[1])):
                with pytest.raises(BatchFailedError, match="out of memory"):
                    _ = [piece async for piece in rest]
            for job in jobs:
                engine.finish(job)
            with pytest.raises(BatchFailedError, match="start the server again"):
                await engine.start(read_request(body, CHAT, "host", {"anger": 1.0}))
            while "memory" not in engine.failure:  # which is recorded after those who wait are told
                await asyncio.sleep(0.01)
            assert engine.running == 0
        finally:
            engine.close()

    asyncio.run(asyncio.wait_for(ask(), 60))


# --- start and end ------------------------------------------------------------------------------------------------------------


@pytest.mark.proof
def test_killed_while_it_loads_it_starts_again_and_sigterm_finishes_replies(
    irms: Irms, runtime: Runtime, tmp_path: Path
) -> None:
    for seconds in (1.0, 4.0):
        process = begin(irms, tmp_path / "killed")
        time.sleep(seconds)
        process.kill()
        process.communicate(timeout=30)
    with serving(irms, tmp_path / "log", "--max-tokens", "400") as server:
        stream = server.client().chat.completions.create(model="host", messages=ASK, max_tokens=200, stream=True)
        pieces = [next(stream), next(stream)]
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        with pytest.raises(openai.APIConnectionError):
            server.client().models.list()
        pieces += stream
        assert "".join(p.choices[0].delta.content or "" for p in pieces) == runtime.answer(
            "Why?", irms="__base__", max_new_tokens=200
        )
        assert server.process.wait(30) == 0
        assert server.log.read_text().count("\n") == 2  # loading, finishing


def test_what_cannot_be_served_is_said_in_one_line(irms: Irms, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damaged, other = tmp_path / "damaged", tmp_path / "other"
    shutil.copytree(irms["anger"], damaged)
    (damaged / "adapter_config.json").write_text("{")
    stranger, _ = ra.load_host(str(tiny_folder(tmp_path / "stranger", seed=5)), dtype="float32")
    get_peft_model(stranger, IRMConfig()).save_pretrained(str(other))
    taken = socket.create_server(("127.0.0.1", 0))
    port = str(taken.getsockname()[1])
    anger = f"anger={irms['anger']}"
    for arguments, code, message in (
        ([], 2, "give a host, or an IRM"),
        (["--irm", anger, "--irm", f"anger={irms['sadness']}"], 2, "'anger' is given twice"),
        (["--irm", f"no good={irms['anger']}"], 2, "not a valid IRM name"),
        (["--irm", anger, "--address", "0.0.0.0"], 2, "can be reached from elsewhere"),
        (["--irm", anger, "--port", port], 1, "cannot be served on"),
        (["--irm", anger, "--irm", f"bad={damaged}"], 1, "adapter_config.json"),
        (["--irm", anger, "--irm", f"other={other}", "--port", "0"], 1, "made for"),
        (["--irm", f"none={tmp_path / 'nowhere'}"], 1, "no such adapter folder"),
        (["--irm", anger, "--engine", "fast"], 2, "'fast' is not one of transformers, vllm"),
        (["--irm", anger, "--api-key", "a b"], 2, "a key must be printable"),
        (["--irm", anger, "--engine", "vllm", "--max-tokens", "9"], 2, "--max-tokens: is for --engine transformers"),
        (["--irm", anger, "--option", "--enforce-eager"], 2, "--option: is for --engine vllm"),
    ):
        assert main(["serve", *arguments, "--dtype", "float32"]) == code, arguments
        lines = [line for line in capsys.readouterr().err.splitlines() if line != "realigner serve: loading"]
        assert len(lines) == 1, lines
        assert message in lines[0]
    taken.close()


def test_addresses_that_others_reach_need_a_key() -> None:
    for address in ("127.0.0.1", "127.3.2.1", "::1", "localhost"):
        check_address(address, [], no_key=False)
    for address in ("0.0.0.0", "::", "192.168.1.5", "example.org"):
        with pytest.raises(UsageError, match="reached from elsewhere"):
            check_address(address, [], no_key=False)
        check_address(address, ["key"], no_key=False)
        check_address(address, [], no_key=True)


def test_a_second_signal_ends_at_once(guarded: Server) -> None:
    key = {"authorization": "Bearer one"}
    clients = [sent(guarded, key, model="small", stream=True) for _ in range(2)]
    assert all(client.recv(1) for client in clients)
    for _ in range(2):
        guarded.process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
    assert guarded.process.wait(10) == 1
    assert "stopped at once by a second signal" in guarded.log.read_text()
    assert "Traceback" not in guarded.log.read_text()
    for client in clients:
        client.close()
