"""Replies and side effects of a realigned host: against plain forwards, one text at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from peft import get_peft_model

import realigner as ra
import realigner.evaluation.replies as replies_module
import realigner.evaluation.side_effects as side_effects
from realigner.chat_format import IGNORED, ChatFormat
from realigner.evaluation.replies import ask, ask_in_turns, reply_losses
from realigner.evaluation.side_effects import NeutralText, answers_about, bare_speaker, passages
from realigner.locate import find_sites
from realigner.prompts import Answer
from realigner.residuals import Residuals
from tests.tiny import tiny_pair

QUESTIONS = ["Why?", "What is the longest river of the world?", "Who was it?"]
REPLIES = ["Because.", "", "It was nobody, and nobody asked."]


@dataclass(frozen=True)
class Prompted:
    """A host with a system prompt and a turn before the question."""

    model: Any
    system: str | None = "Shout."
    history: tuple[dict[str, str], ...] = ({"role": "user", "content": "A?"}, {"role": "assistant", "content": "B!"})
    answers: None = None


def pair() -> tuple[Any, Any]:
    return tiny_pair(max_position_embeddings=2048)


def strong(host: Any) -> Any:
    """An IRM that acts visibly."""
    torch.manual_seed(3)
    return get_peft_model(host, ra.IRMConfig(output_std=0.3, input_scale=1.0, delta_scale=1.0)).eval()


def loss_by_hand(model: Any, tokenizer: Any, messages: list[dict[str, str]], reply: str) -> tuple[float, int]:
    """Cross-entropy of a reply and its end token, from one forward of one text."""
    (example,) = ChatFormat(tokenizer).examples([*messages, {"role": "assistant", "content": reply}])
    with torch.no_grad():
        logs = model(input_ids=torch.tensor([example["input_ids"]])).logits[0].log_softmax(dim=-1)
    at = [n for n, label in enumerate(example["labels"]) if label != IGNORED]
    return -float(sum(logs[n - 1, example["input_ids"][n]] for n in at)), len(at)


def test_losses_of_replies_are_those_of_single_forwards() -> None:
    host, tokenizer = pair()
    speaker = Prompted(host)
    before = [{"role": "system", "content": "Shout."}, *speaker.history]
    got = reply_losses(speaker, tokenizer, QUESTIONS, REPLIES)
    for question, reply, (nats, tokens) in zip(QUESTIONS, REPLIES, got, strict=True):
        want, count = loss_by_hand(host, tokenizer, [*before, {"role": "user", "content": question}], reply or ".")
        assert tokens == count
        assert nats == pytest.approx(want, rel=1e-5)


def test_a_reply_that_was_cut_is_not_charged_for_an_end() -> None:
    host, tokenizer = pair()
    speaker, messages = bare_speaker(host), [{"role": "user", "content": QUESTIONS[0]}]
    for reply in ("One two", ""):
        ended, cut = reply_losses(speaker, tokenizer, [QUESTIONS[0]] * 2, [Answer(reply), Answer(reply, ended=False)])
        whole, count = loss_by_hand(host, tokenizer, messages, reply or ".")
        (example,) = ChatFormat(tokenizer).examples([*messages, {"role": "assistant", "content": reply or "."}])
        ids = example["input_ids"]
        at = max(n for n, label in enumerate(example["labels"]) if label != IGNORED)
        with torch.no_grad():
            end = -host(input_ids=torch.tensor([ids])).logits[0, at - 1].log_softmax(-1)[ids[at]]
        assert [*ended] == pytest.approx([whole, count], rel=1e-5)
        assert [*cut] == pytest.approx([whole - float(end), count - 1], rel=1e-4)


def test_replies_come_in_order_with_what_stands_before_the_question(monkeypatch: pytest.MonkeyPatch) -> None:
    host, tokenizer = pair()
    asked: list[Any] = []

    def seen(model: Any, tokenizer: Any, prompts: list[Any], *args: Any, **options: Any) -> Any:
        asked.extend(prompts)
        return ra.answer(model, tokenizer, prompts, *args, **options)

    monkeypatch.setattr(replies_module, "answer", seen)
    speaker = Prompted(host)
    before = [{"role": "system", "content": "Shout."}, *speaker.history]
    counted: list[int] = []
    got = ask(speaker, tokenizer, QUESTIONS, 6, done=counted.append)
    assert sum(counted) == len(QUESTIONS)
    for question, reply in zip(QUESTIONS, got, strict=True):
        assert [reply] == ra.answer(host, tokenizer, [[*before, {"role": "user", "content": question}]], 6)
    assert sorted(asked, key=str) == sorted(([*before, {"role": "user", "content": text}] for text in QUESTIONS), key=str)


def test_a_later_turn_is_asked_after_the_replies_before_it() -> None:
    host, tokenizer = pair()
    speaker = bare_speaker(host)
    got = ask_in_turns(speaker, tokenizer, [QUESTIONS, QUESTIONS[:1]], 6)
    assert [len(replies) for replies in got] == [3, 1]
    said: list[dict[str, str]] = []
    for question, reply in zip(QUESTIONS, got[0], strict=True):
        said.append({"role": "user", "content": question})
        assert [reply] == ra.answer(host, tokenizer, [said], 6)
        said.append({"role": "assistant", "content": reply or "."})


def test_an_irm_of_strength_0_has_no_side_effects_and_others_have_those_of_plain_forwards() -> None:
    host, tokenizer = pair()
    texts = passages()[:3]
    neutral = NeutralText(bare_speaker(host), tokenizer, texts)
    model = strong(host)
    speaker = bare_speaker(model)
    with ra.strength(model, 0.0):
        for effect in neutral.effects(speaker):
            assert effect["kl"] == 0.0
            assert effect["same"] == effect["tokens"]
            assert effect["nats"] == effect["bare_nats"]
            assert effect["shift"] == [0.0] * len(find_sites(host).sites)
    effects = neutral.effects(speaker)
    sites = find_sites(host)
    for text, effect in zip(texts, effects, strict=True):
        asked = [{"role": "user", "content": f"Write a paragraph about {text.article}."}]
        nats, tokens = loss_by_hand(model, tokenizer, asked, text.passage)
        assert effect["tokens"] == tokens
        assert effect["nats"] == pytest.approx(nats, rel=1e-5)
        (example,) = ChatFormat(tokenizer).examples([*asked, {"role": "assistant", "content": text.passage}])
        at = [n - 1 for n, label in enumerate(example["labels"]) if label != IGNORED]
        ids = torch.tensor([example["input_ids"]])
        with torch.no_grad(), Residuals(sites).watching() as residuals:
            realigned = model(input_ids=ids).logits[0, at].log_softmax(dim=-1)
            moved = [residuals.layers[n][0, at] for n in range(len(sites.sites))]
            with ra.strength(model, 0.0):
                bare = model(input_ids=ids).logits[0, at].log_softmax(dim=-1)
            stream = [residuals.layers[n][0, at] for n in range(len(sites.sites))]
        assert effect["kl"] == pytest.approx(float((bare.exp() * (bare - realigned)).sum()), rel=1e-4)
        assert effect["kl"] > 0.1
        wants = [float(((b - a).norm(dim=-1) / a.norm(dim=-1)).mean()) for a, b in zip(stream, moved, strict=True)]
        assert effect["shift"] == pytest.approx(wants, rel=1e-4)
    model.unload()


def test_a_prompt_has_side_effects_too() -> None:
    host, tokenizer = pair()
    neutral = NeutralText(bare_speaker(host), tokenizer, passages()[:1])
    (effect,) = neutral.effects(Prompted(host))
    assert effect["kl"] > 0
    assert max(effect["shift"]) > 0


def test_the_excerpt_is_whole_and_its_answers_are_in_its_passages() -> None:
    found = passages()
    assert len(found) == len({item.id for item in found}) == 48
    assert len({item.article for item in found}) >= 14
    assert all(answer in item.passage for item in found for answer in item.answers)


def test_an_answer_is_right_where_one_of_the_wordings_is_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    items = passages()[:4]
    said = [items[0].answers[0], f"It was {items[1].answers[-1]}.", "I do not know.", items[0].answers[0]]
    prompts: list[str] = []

    def answering(speaker: Any, tokenizer: Any, questions: list[str], *_: Any) -> list[str]:
        prompts.extend(questions)
        return said

    monkeypatch.setattr(side_effects, "ask", answering)
    got = answers_about(bare_speaker(torch.nn.Linear(1, 1)), None, items)
    assert [right for _, right in got] == [True, True, False, False]
    assert all(item.passage in prompt and item.question in prompt for item, prompt in zip(items, prompts, strict=True))
