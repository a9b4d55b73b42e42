"""From a name to a model that answers; whole, streamed, in batches, in conversations."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from tokenizers import Tokenizer, decoders
from tokenizers.models import WordPiece
from transformers import PreTrainedTokenizerFast

import realigner as ra
from realigner import generation
from realigner.chat_format import ChatFormat, prompt_ids
from realigner.errors import RealignerError, UsageError
from realigner.generation import encode_prompts
from realigner.irm_config import CONFIG_FILE, IRMConfig
from realigner.irm_sources import find_irm
from realigner.runtime import Runtime
from tests.test_thinking import OPENED, thinker
from tests.tiny import tiny_pair, tiny_tokenizer

QUESTIONS = ["Why is the sky blue?", "How many legs has a spider?", "Who?"]
SHORT: dict[str, Any] = {"max_new_tokens": 12}


def by_hand(irms: dict[str, Path], tone: str, strength: float, question: str) -> str:
    """The reply by PEFT and transformers alone."""
    config = IRMConfig.from_pretrained(str(irms[tone]))
    host, tokenizer = ra.load_host(str(config.base_model_name_or_path), dtype="float32")
    model = ra.load_irm(host, irms[tone])
    ids = torch.tensor([prompt_ids(tokenizer, question)])
    with ra.strength(model, strength):
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, repetition_penalty=1.1, **SHORT
        )
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)).strip()


def test_it_answers_as_by_hand_at_the_irms_own_strength(irms: dict[str, Path]) -> None:
    alone = ra.load(irms["anger"], dtype="float32")
    assert alone.irms == ["anger"]
    got = alone.answer(QUESTIONS, **SHORT)
    assert got == [by_hand(irms, "anger", 2.0, question) for question in QUESTIONS]
    assert alone.answer(QUESTIONS[0], strength=-1.0, **SHORT) == by_hand(irms, "anger", -1.0, QUESTIONS[0])
    bare = ra.load(host=str(irms["anger"].parent / "host"), dtype="float32")
    assert bare.irms == []
    assert bare.answer(QUESTIONS, **SHORT) == alone.answer(QUESTIONS, strength=0.0, **SHORT) != got
    with pytest.raises(UsageError, match="no IRM"):
        bare.answer(QUESTIONS, strength=1.0)


def test_settings_of_each_prompt(runtime: Runtime) -> None:
    strengths, chosen = [0.0, -2.0, 1.0], ["anger", "sadness", ("anger", "sadness")]
    alone = [
        runtime.answer(question, strength=strength, irms=names, **SHORT)
        for question, strength, names in zip(QUESTIONS, strengths, chosen, strict=True)
    ]
    assert runtime.answer(QUESTIONS, strength=strengths, irms=chosen, **SHORT) == alone
    assert runtime.answer(QUESTIONS, strength=strengths, irms=chosen, batch_size=2, **SHORT) == alone
    assert runtime.answer(QUESTIONS[:1], where="prompt", **SHORT) != runtime.answer(QUESTIONS[:1], where="reply", **SHORT)
    for given, message in (
        ({"strength": [1.0]}, "1 given for 3 prompts"),
        ({"irms": ["anger"]}, "1 given for 3 prompts"),
        ({"irms": "joy"}, "joy"),
        ({"where": "there"}, "there"),
    ):
        with pytest.raises(UsageError, match=message):
            runtime.answer(QUESTIONS, **given, **SHORT)


def test_strengths_of_some_irms_leave_the_others_at_their_own(runtime: Runtime) -> None:
    both = Runtime(runtime.model, runtime.tokenizer, {"anger": 1.0, "sadness": 0.2})
    how = {"irms": ("anger", "sadness"), **SHORT}
    want = runtime.answer(QUESTIONS, strength={"anger": 0.7, "sadness": 0.2}, **how)
    assert both.answer(QUESTIONS, strength={"anger": 0.7}, **how) == want
    assert both.answer(QUESTIONS, strength={"anger": [0.7] * 3}, **how) == want
    assert "".join(both.stream(QUESTIONS[0], strength={"anger": 0.7}, **how)) == want[0]
    assert both.answer(QUESTIONS, strength={"anger": 0.7, "sadness": 1.0}, **how) != want
    with ra.strength(runtime.model, 1.0, adapter="sadness"):  # a block goes before an IRM's own
        assert both.answer(QUESTIONS, strength={"anger": 0.7}, **how) != want


def test_a_penalty_that_leaves_the_prompt_out(irms: dict[str, Path]) -> None:
    """Against a loop that knows no cache and no processor; prompts of different lengths in one batch."""
    bare = ra.load(host=str(irms["anger"].parent / "host"), dtype="float32")
    got = bare.answer(QUESTIONS, max_new_tokens=24, repetition_penalty=3.0, penalize_prompt=False)
    for question, reply in zip(QUESTIONS, got, strict=True):
        ids = encode_prompts(bare.tokenizer, [question], torch.device("cpu"))["input_ids"]
        said: list[int] = []
        while len(said) < 24 and bare.model.generation_config.eos_token_id not in said:
            with torch.no_grad():
                scores = bare.model(input_ids=torch.cat([ids, torch.tensor([said], dtype=torch.long)], dim=1)).logits[0, -1]
            for token in set(said):
                scores[token] = scores[token] / 3 if scores[token] > 0 else scores[token] * 3
            said.append(int(scores.argmax()))
        assert reply == bare.tokenizer.decode(said, skip_special_tokens=True).strip()
        assert reply.ended == (bare.model.generation_config.eos_token_id in said)
    assert got != bare.answer(QUESTIONS, max_new_tokens=24, repetition_penalty=3.0)


@pytest.mark.parametrize("options", [{}, {"temperature": 1.2, "seed": 3}, {"strength": -2.0, "irms": "sadness"}], ids=str)
def test_a_stream_is_the_answer_in_pieces(runtime: Runtime, options: dict[str, Any]) -> None:
    for question in QUESTIONS:
        pieces = list(runtime.stream(question, max_new_tokens=30, **options))
        assert "".join(pieces) == runtime.answer(question, max_new_tokens=30, **options)
        assert len(pieces) > 3


def test_streams_at_once_and_a_block_that_is_left(runtime: Runtime) -> None:
    strengths = [0.0, 1.0, -2.0, 3.0]
    want = [runtime.answer(QUESTIONS[0], strength=s, max_new_tokens=30) for s in strengths]
    streams = [runtime.stream(QUESTIONS[0], strength=s, max_new_tokens=30) for s in strengths]
    rounds = list(zip_longest(*streams, fillvalue=""))  # read in turns
    assert ["".join(pieces) for pieces in zip(*rounds, strict=True)] == want
    with ra.strength(runtime.model, 0.0):
        left = ra.stream(runtime.model, runtime.tokenizer, QUESTIONS[0], max_new_tokens=30)
    assert "".join(left) == want[0]


def test_a_stream_that_is_closed_stops(runtime: Runtime) -> None:
    before = threading.active_count()
    pieces = runtime.stream(QUESTIONS[0], max_new_tokens=400)
    next(pieces)
    began = time.monotonic()
    pieces.close()
    assert time.monotonic() - began < 5
    assert threading.active_count() == before


def test_an_error_in_a_stream_is_raised_where_it_is_read(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(runtime.model, "generate", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(runtime.stream("Why?"))


def test_sampling_depends_on_seed_and_prompt_alone(runtime: Runtime) -> None:
    options: dict[str, Any] = {"temperature": 1.5, "seed": 7, **SHORT}
    want = runtime.answer(QUESTIONS, **options)
    assert runtime.answer(QUESTIONS, batch_size=1, **options) == want
    assert runtime.answer(QUESTIONS, **{**options, "seed": 8}) != want
    state = torch.get_rng_state()
    runtime.answer(QUESTIONS, **options)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "own",
    [
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"return_dict_in_generate": True, "output_scores": True},
        {"prompt_lookup_num_tokens": 3},
        {"guidance_scale": 1.5},
    ],
    ids=str,
)
@pytest.mark.parametrize("thinks", [False, True])
def test_what_a_hosts_config_says_of_beams_is_generates_alone(own: dict[str, Any], thinks: bool) -> None:
    host, tokenizer = thinker(OPENED, special=True) if thinks else tiny_pair()
    prompts: list[Any] = ["Why is the sky blue?", "Who?"]
    ways: list[dict[str, Any]] = [{"max_new_tokens": 8, "thinking_budget": 6, **warm} for warm in ({}, {"temperature": 1.2})]
    plain = [ra.answer(host, tokenizer, prompts, **way) for way in ways]
    for name, value in own.items():
        setattr(host.generation_config, name, value)
    assert [ra.answer(host, tokenizer, prompts, **way) for way in ways] == plain
    assert "".join(ra.stream(host, tokenizer, prompts[0], **ways[0])) == plain[0][0]


def test_samples_follow_the_models_probabilities() -> None:
    """10,000 draws of one step: each token as often as softmax says, within four standard errors."""
    scores = torch.tensor([2.0, 0.0, -1.0, 1.0])
    draw = ra.generation.SeededSampling(temperature=0.7, seed=1, first_row=0)
    rows = draw(torch.zeros(10_000, 1), scores.expand(10_000, 4)).argmax(-1)
    found = torch.bincount(rows, minlength=4) / 10_000
    want = torch.softmax(scores / 0.7, -1)
    assert ((found - want).abs() < 4 * (want * (1 - want) / 10_000).sqrt()).all()


# --- conversations ----------------------------------------------------------------------------------------------------------


def test_conversations_and_system_prompts(runtime: Runtime) -> None:
    turns = [
        {"role": "user", "content": "Hello."},
        {"role": "assistant", "content": "What now?"},
        {"role": "user", "content": "Why is the sky blue?"},
    ]
    tokenizer = runtime.tokenizer
    text = tokenizer.decode(prompt_ids(tokenizer, turns, system="Be brief."))
    written = tokenizer.apply_chat_template(
        [{"role": "system", "content": "Be brief."}, *turns], tokenize=False, add_generation_prompt=True
    )
    assert text == written
    replies = runtime.answer([turns, "Why is the sky blue?"], system="Be brief.", **SHORT)
    assert replies == [
        runtime.answer([turns], system="Be brief.", **SHORT)[0],
        runtime.answer("Why is the sky blue?", system="Be brief.", **SHORT),
    ]
    assert "".join(runtime.stream(turns, **SHORT)) == runtime.answer([turns], **SHORT)[0]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("  ", "empty"),
        ([], "empty"),
        ([{"role": "user"}], "not a message"),
        ([{"role": "user", "content": ["parts"]}], "not a message"),
    ],
)
def test_prompts_that_are_none(prompt: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        prompt_ids(tiny_tokenizer(), prompt)


def test_what_a_template_cannot_say() -> None:
    tokenizer = tiny_tokenizer(chat=False)
    with pytest.raises(UsageError, match="no system prompt"):
        prompt_ids(tokenizer, "Why?", system="Be brief.")
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(RealignerError, match="System role not supported"):
        prompt_ids(tokenizer, "Why?")


# --- names ------------------------------------------------------------------------------------------------------------------


def test_names(irms: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REALIGNER_CACHE", str(tmp_path))
    with pytest.raises(RealignerError, match="no such adapter folder"):
        find_irm("fury")
    (tmp_path / "irms").mkdir()
    (tmp_path / "irms" / "fury").symlink_to(irms["anger"])
    assert find_irm("fury") == tmp_path / "irms" / "fury"
    assert ra.load("fury").strengths == {"fury": 2.0}
    with pytest.raises(RealignerError, match=r"ready-made IRMs are .*fury"):
        find_irm("joy")
    with pytest.raises(RealignerError, match="not found here or on the hub"):
        find_irm("nobody/nothing")
    with pytest.raises(UsageError, match="same name"):
        ra.load([irms["anger"], irms["anger"]])


def test_a_named_adapters_parent_folder(irms: dict[str, Path], tmp_path: Path) -> None:
    """`save_pretrained` puts an adapter that has a name into a folder of that name."""
    host, _ = ra.load_host(str(irms["anger"].parent / "host"))
    model = get_peft_model(host, IRMConfig(), adapter_name="anger")
    model.save_pretrained(str(tmp_path))
    assert find_irm(tmp_path) == tmp_path / "anger"
    for folder, name in (("v1.5", "v1-5"), ("train", "irm-train"), ("42", "irm-42"), ("irm", "irm-irm")):
        (tmp_path / folder).symlink_to(tmp_path / "anger")
        assert ra.load(tmp_path / folder).irms == [name]
        (tmp_path / folder).unlink()
    model.add_adapter("sadness", IRMConfig())
    model.save_pretrained(str(tmp_path))
    with pytest.raises(RealignerError, match=f"give one of {tmp_path}/anger, {tmp_path}/sadness"):
        ra.load(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(RealignerError, match=f"no {CONFIG_FILE}"):
        ra.load(tmp_path / "empty")


def test_a_stream_that_is_not_read_can_be_closed(runtime: Runtime) -> None:
    before = threading.active_count()
    runtime.stream(QUESTIONS[0], max_new_tokens=400).close()
    assert threading.active_count() == before


def test_a_streams_settings_are_those_of_the_call(runtime: Runtime) -> None:
    with pytest.raises(UsageError, match="loud"):
        runtime.stream(QUESTIONS[0], strength="loud")
    with pytest.raises(UsageError, match="joy"):
        runtime.stream(QUESTIONS[0], irms="joy")


@pytest.mark.proof
def test_an_interpreter_that_ends_while_a_stream_is_made(irms: dict[str, Path]) -> None:
    code = (
        f"import realigner as ra\nruntime = ra.load({str(irms['anger'])!r}, dtype='float32')\n"
        "pieces = runtime.stream('Why is the sky blue?', max_new_tokens=460)\nprint(len(next(pieces)) > 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == "True\n"


def test_spaces_that_are_cleaned_up_in_a_stream() -> None:
    words = ["[UNK]", "do", "n", "'", "t", "it", "s", "hello", ","]
    backend = Tokenizer(WordPiece(vocab={word: n for n, word in enumerate(words)}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece(cleanup=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=True)
    for made in ([1, 2, 3, 4], [5, 3, 6], [7, 8, 7, 8]):
        pieces = generation.Pieces(ChatFormat(tokenizer, "plain"), False, False)
        pieces.put(torch.tensor([[0]]))
        for token in made:
            pieces.put(torch.tensor([token]))
        pieces.end()
        assert "".join(map(str, pieces.queue.queue)) == tokenizer.decode(made)


def test_a_block_around_a_runtimes_call(runtime: Runtime) -> None:
    """A block goes before the strength that an IRM is best used at, for the IRMs that it names."""
    bare = runtime.answer(QUESTIONS, strength=0.0, **SHORT)
    with ra.strength(runtime.model, 0.0):
        assert runtime.answer(QUESTIONS, **SHORT) == bare
        assert "".join(runtime.stream(QUESTIONS[0], **SHORT)) == bare[0]
    with ra.strength(runtime.model, 0.0, adapter="sadness"):
        assert runtime.answer(QUESTIONS, **SHORT) == runtime.answer(QUESTIONS, strength=2.0, **SHORT) != bare


@pytest.mark.parametrize("prompt", [None, 5, {"role": "user", "content": "Why?"}, ["Why?"], [["role", "user"]]])
def test_prompts_of_another_kind(prompt: Any) -> None:
    with pytest.raises(UsageError, match=r"neither a question nor a list of messages|not a message"):
        prompt_ids(tiny_tokenizer(), prompt)


def test_what_is_no_irm(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(RealignerError, match="a file; an IRM is a folder"):
        ra.load(tmp_path / "file")
    with pytest.raises(UsageError, match="irm: it is empty"):
        ra.load([])
