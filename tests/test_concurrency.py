"""Settings belong to a call: threads, streamers, tokens and caches, each against the same call by itself."""

from __future__ import annotations

import copy
import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from transformers import (
    CompileConfig,
    ContinuousBatchingConfig,
    GenerationConfig,
    T5Config,
    T5ForConditionalGeneration,
    TextIteratorStreamer,
)

import realigner as ra
from realigner.batching import BatchManager
from realigner.errors import RealignerError, UsageError
from realigner.tiny import tiny_host
from realigner.tuner import tuner_of
from tests.test_together import prompts, tokens, two_tones
from tests.tiny import tiny_pair

FAMILIES = ["llama", "gpt2", "gemma3_text", "gpt_neox"]
THREADS, ROUNDS = 4, 25


def run_in_threads(works: list[Callable[[], None]]) -> None:
    """Run each in a thread of its own, at once; the first error is raised."""
    barrier = threading.Barrier(len(works))

    def begin(work: Callable[[], None]) -> None:
        barrier.wait()
        work()

    with ThreadPoolExecutor(len(works)) as pool:
        for future in [pool.submit(begin, work) for work in works]:
            future.result(timeout=120)


def random_call(draw: random.Random) -> tuple[torch.Tensor, dict[str, Any]]:
    """Prompts and settings of one call: no IRM, one, both, another one for each row, beams, a part of the text."""
    rows = draw.choice([1, 1, 2, 3])
    ids = torch.randint(3, 100, (rows, draw.choice([5, 7])), generator=torch.Generator().manual_seed(draw.randrange(1000)))
    options: dict[str, Any] = {"max_new_tokens": draw.choice([3, 6])}
    irms = draw.choice(["none", "default", "one", "two", "rows"])
    if irms == "none":
        options["adapter_names"] = ["__base__"] * rows
    elif irms == "one":
        options["adapter_names"] = ["sadness"] * rows
    elif irms == "two":
        options["adapter_names"] = [("anger", "sadness")] * rows
    elif irms == "rows":
        options["adapter_names"] = [draw.choice(["__base__", "anger", "sadness", ("anger", "sadness")]) for _ in range(rows)]
    strength = draw.choice(["none", "number", "rows", "mapping"])
    if strength == "number":
        options["strength"] = draw.uniform(-2, 2)
    elif strength == "rows":
        options["strength"] = [draw.uniform(-2, 2) for _ in range(rows)]
    elif strength == "mapping":
        options["strength"] = {"anger": draw.uniform(-2, 2), "sadness": draw.uniform(-2, 2)}
    if draw.random() < 0.3:
        options["num_beams"] = 3
    if draw.random() < 0.3:
        options["where"] = draw.choice(["prompt", "reply", 1, 2])
    return ids, options


@pytest.mark.parametrize("family", FAMILIES)
def test_threads_give_what_each_call_gives_alone(family: str) -> None:
    """4 threads x 25 rounds on one model; some calls are given their settings, others stand in a block."""
    model = two_tones(tiny_host(family))
    before = model(input_ids=prompts()).logits
    calls = [[random_call(random.Random(100 * n + r)) for r in range(ROUNDS)] for n in range(THREADS)]
    want = [[tokens(model, ids, **options) for ids, options in part] for part in calls]
    assert len({tuple(row.tolist()) for part in want for got in part for row in got}) > THREADS * ROUNDS // 2
    got: list[list[torch.Tensor]] = [[] for _ in calls]

    def work(n: int) -> None:
        for r, (ids, options) in enumerate(calls[n]):
            if r % 2 and "strength" in options:
                rest = {key: value for key, value in options.items() if key != "strength"}
                with ra.strength(model, options["strength"]):
                    got[n].append(tokens(model, ids, **rest))
            else:
                got[n].append(tokens(model, ids, **options))

    run_in_threads([lambda n=n: work(n) for n in range(THREADS)])  # type: ignore[misc]
    for mine, alone in zip(got, want, strict=True):
        for a, b in zip(mine, alone, strict=True):
            assert torch.equal(a, b)
    assert torch.equal(model(input_ids=prompts()).logits, before)
    assert tuner_of(model).settings is tuner_of(model).injector.threads.default


def test_forwards_in_threads() -> None:
    """Plain forwards, with and without gradients, at once."""
    model = two_tones()
    model.train()
    strengths = [0.0, 0.5, 2.0, -1.0]

    def gradient(strength: float) -> list[torch.Tensor]:
        loss = model(input_ids=prompts(), labels=prompts(), strength=strength).loss
        trained = list(tuner_of(model).registry.network("anger").parameters())
        return [loss, *torch.autograd.grad(loss, trained)]

    want = [gradient(s) for s in strengths]
    got: list[list[list[torch.Tensor]]] = [[] for _ in strengths]
    run_in_threads([lambda n=n, s=s: got[n].extend(gradient(s) for _ in range(10)) for n, s in enumerate(strengths)])  # type: ignore[misc]
    for rounds, alone in zip(got, want, strict=True):
        assert len(rounds) == 10
        assert all(torch.equal(a, b) for one in rounds for a, b in zip(one, alone, strict=True))


def test_an_error_leaves_nothing_behind() -> None:
    model = two_tones()
    want = tokens(model, prompts())

    def fail(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tokens(model, prompts(), strength=0.25, adapter_names=["sadness"] * 4, logits_processor=[fail])
    with pytest.raises(KeyboardInterrupt), ra.strength(model, 0.25):
        tokens(model, prompts(), logits_processor=[fail])
    assert torch.equal(tokens(model, prompts()), want)


# --- streamers --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [0.0, -1.0, -3.0])
def test_a_streamed_generation_keeps_the_settings_it_began_with(strength: float) -> None:
    """The thread is begun in the block; the block is left after the first piece (transformers#27927)."""
    host, tokenizer = tiny_pair("llama")
    model = two_tones(host)
    ids = prompts(1)
    want = tokens(model, ids, strength=strength, max_new_tokens=20)
    assert not torch.equal(want, tokens(model, ids, max_new_tokens=20))
    done: list[torch.Tensor] = []
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    first = threading.Event()

    def slow(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if ids.shape[1] > 8:
            first.wait(60)  # until the block was left
        return scores

    with ra.strength(model, strength):
        thread = threading.Thread(
            target=lambda: done.append(tokens(model, ids, max_new_tokens=20, streamer=streamer, logits_processor=[slow]))
        )
        thread.start()
    model.base_model.set_adapter("sadness")  # nor does this reach it, once it has begun
    model.base_model.set_adapter("anger")
    first.set()
    text = "".join(streamer)
    thread.join()
    assert torch.equal(done[0], want)
    assert text == tokenizer.decode(want[0, 7:])
    assert torch.equal(tokens(model, ids), tokens(model, ids, strength=1.0))


def test_a_thread_of_another_is_not_in_the_block() -> None:
    """A server's threads: one request's block is not another's."""
    model = two_tones()
    want = tokens(model, prompts(1))
    inside, leave = threading.Event(), threading.Event()

    def in_block() -> None:
        with ra.strength(model, 0.0):
            inside.set()
            leave.wait(60)

    blocked = threading.Thread(target=in_block)
    blocked.start()
    inside.wait(60)
    got: list[torch.Tensor] = []
    other = threading.Thread(target=lambda: got.append(tokens(model, prompts(1))))
    other.start()
    other.join()
    leave.set()
    blocked.join()
    assert torch.equal(got[0], want)


def test_a_pools_worker_does_not_keep_a_block() -> None:
    model = two_tones()
    want = tokens(model, prompts(1))
    with ThreadPoolExecutor(1) as pool:
        with ra.strength(model, 0.0):
            pool.submit(lambda: None).result()
        assert torch.equal(pool.submit(tokens, model, prompts(1)).result(), want)


def test_blocks_that_overlap_are_refused() -> None:
    model = two_tones()
    one, two = ra.strength(model, 0.5), ra.strength(model, 2.0)
    one.__enter__()
    two.__enter__()
    with pytest.raises(RealignerError, match="overlap"):
        one.__exit__(None, None, None)


# --- tokens -----------------------------------------------------------------------------------------------------------------


def by_hand(model: Any, ids: torch.Tensor, strengths: list[float]) -> torch.Tensor:
    """The logits of one text, token after token with a cache, each at its own strength."""
    cache, logits = None, []
    for n, strength in enumerate(strengths):
        with torch.no_grad():
            out = model(input_ids=ids[:, n : n + 1], past_key_values=cache, use_cache=True, strength=strength)
        cache = out.past_key_values
        logits.append(out.logits)
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_strength_for_each_token(family: str) -> None:
    model = two_tones(tiny_host(family))
    ids = prompts(2)
    strengths = [[0.0, 1.0, 0.5, 0.5, 2.0, 0.0, -1.0], [1.0, 1.0, 0.0, 0.0, 0.0, 3.0, 0.25]]
    with torch.no_grad():
        got = model(input_ids=ids, strength=strengths).logits
        for row in range(2):
            assert (got[row : row + 1] - by_hand(model, ids[row : row + 1], strengths[row])).abs().max() < 1e-5
        assert torch.equal(model(input_ids=ids, strength=[[0.5] * 7] * 2).logits, model(input_ids=ids, strength=0.5).logits)
        with model.disable_adapter():
            bare = model(input_ids=ids).logits
        assert torch.equal(model(input_ids=ids, strength=[[0.0] * 7] * 2).logits, bare)
        mapped = model(input_ids=ids, strength={"anger": strengths}).logits
    assert torch.equal(mapped, got)


WAYS: dict[str, dict[str, Any]] = {
    "cached": {},
    "uncached": {"use_cache": False},
    "static": {"cache_implementation": "static"},
    "chunked": {"prefill_chunk_size": 3},
    "beams": {"num_beams": 3},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FAMILIES)
def test_where(family: str, way: str) -> None:
    """The prompt, the reply, its beginning: each equals the strengths of every token written out."""
    model = two_tones(tiny_host(family))
    ids, options = prompts(2), {"max_new_tokens": 6, **WAYS[way]}
    shapes: dict[Any, list[float]] = {
        "prompt": [1.0] * 7 + [0.0] * 6,
        "reply": [0.0] * 7 + [1.0] * 6,
        2: [0.0] * 7 + [1.0] * 2 + [0.0] * 4,
        "all": [1.0] * 13,
    }
    found = {where: tokens(model, ids, where=where, **options) for where in shapes}
    for where, factors in shapes.items():
        assert torch.equal(found[where], tokens(model, ids, strength=[factors] * 2, **options))
        full = found[where][:1]
        if way == "beams":
            continue
        with torch.no_grad():  # greedy: each token is the likeliest of a forward over all before it
            logits = model(input_ids=full[:, :-1], strength=[factors[: full.shape[1] - 1]]).logits[0, 6:]
        assert (logits.max(-1).values - logits.gather(-1, full[0, 7:, None])[:, 0]).max() < 1e-4
    assert torch.equal(found["all"], tokens(model, ids, **options))
    with ra.strength(model, where="reply"):
        assert torch.equal(tokens(model, ids, **options), found["reply"])


def test_where_on_a_host_whose_cache_knows_no_length() -> None:
    model = two_tones(tiny_host("mamba"))
    ids = prompts(2)
    for where in ("prompt", "reply", 2):
        cached = tokens(model, ids, where=where, max_new_tokens=6)
        assert torch.equal(cached, tokens(model, ids, where=where, max_new_tokens=6, use_cache=False))


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_a_chat_whose_strength_changes_between_turns(family: str) -> None:
    """Three turns on one cache, at 3, 0 and 1: the text of one forward in which each token has its turn's strength."""
    model = two_tones(tiny_host(family))
    text, cache = prompts(1), None
    strengths: list[float] = []
    for turn, strength in enumerate((3.0, 0.0, 1.0)):
        out = tokens(model, text, strength=strength, max_new_tokens=5, past_key_values=cache, return_dict_in_generate=True)
        cache, sequences = out.past_key_values, out.sequences
        read = sequences.shape[1] - 1  # the last token of a reply is not read in its turn
        strengths += [strength] * (read - len(strengths))
        new = sequences[:, text.shape[1] :]
        with torch.no_grad():
            logits = model(input_ids=sequences[:, :-1], strength=[strengths]).logits[0, -new.shape[1] :]
        assert (logits.max(-1).values - logits.gather(-1, new[0, :, None])[:, 0]).max() < 1e-4
        text = torch.cat([sequences, prompts(1, 3) + turn], dim=1)
    with pytest.raises(UsageError, match="only generate knows"):
        model(input_ids=text, where="reply")


# --- continuous batching ----------------------------------------------------------------------------------------------------

SMALL = ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=24, max_requests_per_batch=6, page_size=16)
SETTINGS: list[dict[str, Any]] = [
    {"adapter_names": ["__base__"]},
    {"adapter_names": ["anger"], "strength": 1.0},
    {"adapter_names": ["sadness"], "strength": -2.0},
    {"adapter_names": [("anger", "sadness")], "strength": {"anger": 2.0, "sadness": 0.5}},
    {"strength": 0.0},
    {"strength": 3.0, "where": "prompt"},
    {"strength": 3.0, "where": "reply"},
    {"strength": -3.0, "where": 3},
]


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_continuous_batching_gives_each_request_what_it_gives_alone(family: str) -> None:
    """16 requests of several lengths, 8 settings, 6 at a time, prompts in pieces: the tokens of single calls."""
    model = two_tones(tiny_host(family))
    texts = [torch.randint(3, 100, (1, 4 + n), generator=torch.Generator().manual_seed(n)) for n in range(16)]
    chosen = [SETTINGS[n % 8] for n in range(16)]
    alone = [
        tokens(model, ids, max_new_tokens=8, **one)[0, ids.shape[1] :].tolist() for ids, one in zip(texts, chosen, strict=True)
    ]
    assert len({tuple(reply) for reply in alone}) > 8
    settings = GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=-1, pad_token_id=0)
    with BatchManager(tuner_of(model), settings, SMALL) as batch:
        for ids, one in zip(texts, chosen, strict=True):
            irms = one.get("adapter_names", [None])[0]
            batch.add_request(ids[0].tolist(), strength=one.get("strength"), irms=irms, where=one.get("where"))
        results = {output.request_id: output.generated_tokens for output in (batch.next() for _ in texts)}
    assert [results[f"request_{n}"] for n in range(16)] == alone
    assert torch.equal(tokens(model, prompts()), tokens(model, prompts(), strength=1.0))

    given = {
        "strength": {name: [one.get("strength", 1.0) if not isinstance(one.get("strength"), dict) else one["strength"][name]
                            for one in chosen] for name in ("anger", "sadness")},
        "adapter_names": [one.get("adapter_names", ["anger"])[0] for one in chosen],
        "where": [one.get("where", "all") for one in chosen],
    }  # fmt: skip
    outputs = model.generate_batch([ids[0].tolist() for ids in texts], settings, SMALL, **given)
    assert [output.generated_tokens for output in outputs.values()] == alone


def test_continuous_batching_forgets_what_is_finished() -> None:
    model = two_tones()
    settings = GenerationConfig(max_new_tokens=3, do_sample=True, num_return_sequences=2, eos_token_id=-1, pad_token_id=0)
    with BatchManager(tuner_of(model), settings, SMALL) as batch:
        for ids in prompts(3).tolist():
            batch.add_request(ids)
        for _ in range(6):
            assert len(batch.next().generated_tokens) == 3
        assert not batch._manager.batch_processor.scheduler.active_requests
        assert not batch._manager.output_router.result_handlers


def test_continuous_batching_refuses_what_is_not_one_number() -> None:
    model = two_tones()
    ids = prompts(2).tolist()
    with pytest.raises(UsageError, match="3 given for 2 requests"):
        model.generate_batch(ids, None, SMALL, strength=[1.0, 2.0, 3.0])
    with BatchManager(tuner_of(model), batching_config=SMALL) as batch, pytest.raises(UsageError, match="one number"):
        batch.add_request(ids[0], strength=[1.0, 2.0])


# --- what is left behind ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "mamba"])
def test_a_forward_that_is_interrupted_leaves_nothing_behind(family: str) -> None:
    """torch calls no hook on the way out of a KeyboardInterrupt."""
    model = two_tones(tiny_host(family))
    layer = tuner_of(model).sites.layers[1]
    with torch.no_grad(), model.disable_adapter():
        bare = model(input_ids=prompts()).logits

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = layer.register_forward_pre_hook(interrupt)
    with torch.no_grad(), pytest.raises(KeyboardInterrupt):
        model(input_ids=prompts(2))
    handle.remove()
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(model(input_ids=prompts()).logits, bare)


def test_a_recomputation_that_fails_leaves_nothing_behind() -> None:
    """Out of memory in the backward pass, caught, and the next forward."""
    model = two_tones()
    with torch.no_grad(), model.disable_adapter():
        bare = model(input_ids=prompts()).logits
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    loss = model(input_ids=prompts(), labels=prompts()).loss

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    inside: Any = tuner_of(model).sites.layers[1].get_submodule("self_attn.q_proj")
    handle = inside.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        loss.backward()
    handle.remove()
    model.eval()
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(model(input_ids=prompts()).logits, bare)


def test_blocks_that_overlapped_leave_nothing_behind() -> None:
    model = two_tones()
    one, two = ra.strength(model, 0.5), ra.strength(model, 2.0)
    one.__enter__()
    two.__enter__()
    with pytest.raises(RealignerError, match="overlap"):
        one.__exit__(None, None, None)
    assert float(tuner_of(model).settings.strengths["anger"]) == 2.0
    two.__exit__(None, None, None)
    assert tuner_of(model).settings is tuner_of(model).injector.threads.default


def test_a_strength_is_not_the_callers_memory() -> None:
    model = two_tones()
    given = torch.tensor([0.5, 1.0, 2.0, 3.0])
    with ra.strength(model, given):
        want = model(input_ids=prompts()).logits
        given.zero_()
        assert torch.equal(model(input_ids=prompts()).logits, want)


def test_irms_that_are_switched_on_during_a_forward() -> None:
    """It began while they were off, so there is nothing to complain of."""
    model = two_tones()
    tuner = tuner_of(model)

    def switch_on(*_: Any) -> None:
        tuner.enable_adapter_layers()

    tuner.disable_adapter_layers()
    bare = model(input_ids=prompts()).logits
    handle = tuner.sites.layers[1].register_forward_pre_hook(switch_on)
    assert torch.equal(model(input_ids=prompts()).logits, bare)
    handle.remove()
    assert not torch.equal(model(input_ids=prompts()).logits, bare)


def test_an_irm_that_is_deleted_during_a_generation() -> None:
    model = two_tones()
    model.base_model.set_adapter(["anger", "sadness"])

    def delete(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if ids.shape[1] == 9:
            model.delete_adapter("sadness")
        return scores

    with pytest.raises(UsageError, match="'sadness' is not loaded; loaded are anger"):
        tokens(model, prompts(), logits_processor=[delete])
    assert torch.equal(tokens(model, prompts()), tokens(model, prompts(), strength=1.0))


def test_a_pool_of_anyio_does_not_keep_a_block() -> None:
    anyio = pytest.importorskip("anyio")
    model = two_tones()
    want = tokens(model, prompts(1))

    async def serve() -> torch.Tensor:
        with ra.strength(model, 0.0):
            await anyio.to_thread.run_sync(lambda: None)
        got: torch.Tensor = await anyio.to_thread.run_sync(tokens, model, prompts(1))
        return got

    assert torch.equal(anyio.run(serve), want)


# --- where a prompt ends ----------------------------------------------------------------------------------------------------


def test_where_without_a_prompt() -> None:
    """Generation then begins with the BOS token, which is the prompt."""
    model = two_tones()
    options = {
        "max_new_tokens": 6,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
        "where": "reply",
        "strength": 5.0,
    }
    one = torch.ones(1, 1, dtype=torch.long)
    assert torch.equal(model.generate(**options), model.generate(input_ids=one, attention_mask=one, **options))


@pytest.mark.parametrize("where", ["prompt", "reply", 2])
def test_where_with_the_beginning_in_a_cache(where: Any) -> None:
    """The whole text or its new tokens alone: the same."""
    model = two_tones()
    first = tokens(model, prompts(1), strength=0.0, return_dict_in_generate=True)
    text = torch.cat([first.sequences, prompts(1, 3)], dim=1)
    new = text[:, first.past_key_values.get_seq_length() :]
    options = {
        "max_new_tokens": 6,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
        "where": where,
        "strength": 5.0,
    }
    options["attention_mask"] = torch.ones_like(text)
    whole, part = (
        model.generate(input_ids=ids, past_key_values=copy.deepcopy(first.past_key_values), **options) for ids in (text, new)
    )
    assert torch.equal(whole[:, -6:], part[:, -6:])


def test_where_on_an_encoder_decoder() -> None:
    """The prompt is what the decoder is given, not the encoder's text."""
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 3, "num_heads": 4, "vocab_size": 101}
    model = two_tones(T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).eval())
    shapes: dict[Any, list[float]] = {"prompt": [50.0, 0.0], "reply": [0.0, 50.0], 2: [0.0, 50.0, 50.0, 0.0]}
    found = [tokens(model, prompts(2), where=where, strength=50.0) for where in shapes]
    for got, strengths in zip(found, shapes.values(), strict=True):
        assert torch.equal(got, tokens(model, prompts(2), strength=[strengths] * 2))
    assert len({tuple(got[0].tolist()) for got in found}) == 3


@pytest.mark.parametrize("where", ["prompt", "reply", 1])
def test_where_when_the_decoder_is_not_given_its_start_token(where: Any) -> None:
    """``generate`` puts one before the text, and it counts: as if it had been given."""
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 3, "num_heads": 4, "vocab_size": 101}
    model = two_tones(T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).eval())
    without = prompts(1, 3)
    given = torch.cat([torch.zeros(1, 1, dtype=torch.long), without], dim=1)
    both = [tokens(model, prompts(1), decoder_input_ids=ids, where=where, strength=20.0) for ids in (without, given)]
    assert torch.equal(*both)


@pytest.mark.parametrize(("family", "cache"), [("mamba2", "cache_params"), ("rwkv", "state")])
def test_where_after_a_cache_that_knows_no_length(family: str, cache: str) -> None:
    """New tokens alone, with the mask of the whole text, after a cache: the strengths of every token written out."""
    model = two_tones(tiny_host(family))
    first = tokens(model, prompts(1), strength=0.0, return_dict_in_generate=True)
    text = torch.cat([first.sequences, prompts(1, 3)], dim=1)
    seen = first.sequences.shape[1] - 1
    mask = torch.ones_like(text)
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    shapes: dict[Any, list[float]] = {
        "prompt": [0.0] * seen + [5.0] * 4 + [0.0],
        "reply": [0.0] * text.shape[1] + [5.0],
        2: [0.0] * text.shape[1] + [5.0, 5.0, 0.0],
    }
    found = []
    for where, strengths in shapes.items():
        kept = {cache: copy.deepcopy(first.past_key_values)}
        got = model.generate(input_ids=text[:, seen:], where=where, strength=5.0, **kept, **options)[:, -6:]
        assert torch.equal(got, model.generate(input_ids=text, strength=[strengths], use_cache=False, **options)[:, -6:])
        found.append(tuple(got[0].tolist()))
    assert len(set(found)) == 3


@pytest.mark.parametrize("family", ["cpmant", "prophetnet"])
def test_where_is_refused_on_a_host_whose_layers_have_other_positions_than_the_text(family: str) -> None:
    model = two_tones(tiny_host(family))
    for setting in ({"where": "reply"}, {"strength": [[1.0] * 9]}):
        with pytest.raises(UsageError, match=r"for 9 tokens the host's layers have \d+ positions"):
            tokens(model, prompts(1, 9), **setting)
    assert tokens(model, prompts(1, 9), strength=[2.0]).shape == (1, 17)


def test_where_is_refused_with_guidance() -> None:
    model = two_tones()
    for setting in ({"where": "reply"}, {"strength": [[1.0, 0.0]] * 2}):
        with pytest.raises(UsageError, match="not with guidance_scale"):
            tokens(model, prompts(2), guidance_scale=2.0, **setting)
        tokens(model, prompts(2), guidance_scale=1.0, **setting)
    tokens(model, prompts(2), guidance_scale=2.0, strength=[1.0, 0.5])


def test_a_step_that_the_bare_host_compiled_is_compiled_again() -> None:
    """transformers compiles the steps of a static cache on accelerators and keeps them with the host; here it is made to."""
    compiled = CompileConfig(backend="eager", mode=None, fullgraph=False)
    compiled._compile_all_devices = True
    options = {"cache_implementation": "static", "compile_config": compiled, "max_new_tokens": 8}
    host = tiny_host("llama")
    bare = host.generate(prompts(1), do_sample=False, eos_token_id=None, pad_token_id=0, **options)
    assert hasattr(host, "_compiled_call")
    model = two_tones(host)
    want = tokens(model, prompts(1), strength=3.0, max_new_tokens=8)
    assert torch.equal(tokens(model, prompts(1), strength=3.0, **options), want)
    assert not torch.equal(bare, want)
    model.unload()
    assert torch.equal(host.generate(prompts(1), do_sample=False, eos_token_id=None, pad_token_id=0, **options), bare)


def test_a_generation_config_as_the_second_argument() -> None:
    model = two_tones()
    config = GenerationConfig(num_beams=3, max_new_tokens=5, eos_token_id=None, pad_token_id=0)
    want = tokens(model, prompts(2), strength=[0.0, 2.0], num_beams=3, max_new_tokens=5)
    assert torch.equal(model.generate(prompts(2), config, strength=[0.0, 2.0]), want)


@pytest.mark.proof
def test_where_is_compiled_once() -> None:
    """Nothing that counts tokens is compiled in."""
    model = two_tones()
    want = tokens(model, prompts(2), where="reply", strength=3.0, max_new_tokens=12)
    graphs = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    host = model.get_base_model()
    torch._dynamo.reset()
    host.forward = torch.compile(host.forward, backend=backend)
    assert torch.equal(tokens(model, prompts(2), where="reply", strength=3.0, max_new_tokens=12), want)
    assert len(graphs) < 5
