"""Hosts that think: thought and reply apart, each with its own number of tokens; whole, streamed and in batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers import AddedToken

import realigner as ra
from realigner.chat_format import WITHOUT_THOUGHT, ChatFormat
from realigner.errors import RealignerError, UsageError
from realigner.generation import Thought
from tests.chat_hosts import host_tokenizer
from tests.tiny import TEMPLATE, tiny_host_of_pair, tiny_tokenizer

CLOSED = "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
HYBRID = TEMPLATE.replace("<|assistant|>{% endif %}", "<|assistant|>" + CLOSED + "{% endif %}")
OPENED = TEMPLATE.replace("<|assistant|>{% endif %}", "<|assistant|><think>\n{% endif %}") + "{# </think> #}"
QUESTIONS = ["Why is the sky blue?", "Who?", "How many legs has a spider?"]


def thinker(template: str, special: bool, seed: int = 0) -> tuple[Any, Any]:
    """A tiny host and a tokenizer that has the tags of a thought as tokens, or as text."""
    tokenizer = tiny_tokenizer()
    if special:
        tokenizer.add_tokens([AddedToken("<think>", special=False), AddedToken("</think>", special=False)])
    tokenizer.chat_template = template
    return tiny_host_of_pair(tokenizer, seed), tokenizer


class Scripted:
    """Makes a host write given texts, one for each row of a batch, and end tokens after them."""

    def __init__(self, host: Any, tokenizer: Any) -> None:
        self.host, self.tokenizer = host, tokenizer
        self.texts: list[str] = []
        self.step = 0
        host.register_forward_hook(self.write)
        self.generate = host.generate
        host.generate = self.begin

    def begin(self, *args: Any, **kwargs: Any) -> Any:
        self.step = 0
        return self.generate(*args, **kwargs)

    def write(self, _: Any, __: Any, output: Any) -> Any:
        for row, logits in enumerate(output.logits[:, -1]):
            tokens = self.tokenizer(self.texts[row])["input_ids"] + [self.tokenizer.eos_token_id]
            logits[:] = 0
            logits[tokens[min(self.step, len(tokens) - 1)]] = 100
        self.step += 1
        return output


@pytest.fixture(params=[True, False], ids=["tokens", "text"])
def special(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def test_thought_and_reply_are_told_apart(special: bool) -> None:
    host, tokenizer = thinker(HYBRID, special)
    script = Scripted(host, tokenizer)
    script.texts = [
        "<think>Blue, because of 雨.</think>\n\nIt scatters.",
        "It does not think </think> at all.",
        "<think></think>No.",
    ]
    replies = ra.answer(host, tokenizer, QUESTIONS, max_new_tokens=60, thinking_budget=60)
    assert replies == ["It scatters.", "It does not think </think> at all.", "No."]
    assert [reply.thought for reply in replies] == ["Blue, because of 雨.", "", ""]
    for question, text, reply in zip(QUESTIONS, script.texts.copy(), replies, strict=True):
        script.texts = [text]
        pieces = list(ra.stream(host, tokenizer, question, max_new_tokens=60, thoughts=True))
        assert "".join(piece for piece in pieces if isinstance(piece, Thought)).strip() == reply.thought
        assert "".join(piece for piece in pieces if not isinstance(piece, Thought)) == reply
        assert "".join(ra.stream(host, tokenizer, question, max_new_tokens=60)) == reply


def test_a_prompt_that_opens_the_thought(special: bool) -> None:
    host, tokenizer = thinker(OPENED, special)
    script = Scripted(host, tokenizer)
    script.texts = ["Because it\nis.\n</think>\n\nSo.", "never ends", "</think>None."]
    replies = ra.answer(host, tokenizer, QUESTIONS, max_new_tokens=60, thinking_budget=40)
    assert replies[0] == "So."
    assert replies[0].thought == "Because it\nis."
    assert (replies[1], replies[1].thought) == ("", "never ends")  # it ended within its thought
    assert (replies[2], replies[2].thought) == ("None.", "")


def test_a_reply_that_was_cut_while_others_think_has_not_ended(special: bool) -> None:
    """On hosts whose end token pads too."""
    host, tokenizer = thinker(HYBRID, special)
    tokenizer.pad_token = tokenizer.eos_token
    Scripted(host, tokenizer).texts = ["x" * 50, "<think>" + "y" * 40 + "</think>So."]
    cut, whole = ra.answer(host, tokenizer, QUESTIONS[:2], max_new_tokens=5, thinking_budget=100)
    assert (cut, cut.ended) == ("xxxxx", False)
    assert (whole, whole.ended) == ("So.", True)


CHANNELS = "<|channel|>analysis<|message|>Tall, blue.<|end|><|start|>assistant<|channel|>final<|message|>"


@pytest.mark.parametrize(
    ("text", "thought", "reply"),
    [
        (CHANNELS + "Because so.", "Tall, blue.", "Because so."),
        ("<|channel|>final<|message|>Because so.", "", "Because so."),
        ("<|channel|>analysis<|message|>Tall, blue", "Tall, blue", ""),
        ("analysis", "", "analysis"),
    ],
    ids=["both", "no-thought", "no-reply", "no-tag"],
)
def test_tags_of_several_special_tokens(text: str, thought: str, reply: str) -> None:
    tokenizer = host_tokenizer("gpt_oss")
    host = tiny_host_of_pair(tokenizer)
    Scripted(host, tokenizer).texts = [text]
    options: dict[str, Any] = {"max_new_tokens": len(tokenizer(reply or "1")["input_ids"])}  # the tags are not the reply's
    (whole,) = ra.answer(host, tokenizer, ["Why?"], **options)
    assert (whole.thought, str(whole)) == (thought, reply)
    pieces = list(ra.stream(host, tokenizer, "Why?", thoughts=True, **options))
    assert "".join(piece for piece in pieces if isinstance(piece, Thought)) == thought
    assert "".join(piece for piece in pieces if not isinstance(piece, Thought)) == reply


@pytest.mark.parametrize("budget", [0, 1, 7])
def test_each_has_its_own_number_of_tokens(special: bool, budget: int) -> None:
    host, tokenizer = thinker(OPENED, special)
    script = Scripted(host, tokenizer)
    script.texts = ["a" * 60, "bb</think>" + "c" * 60, "d" * 60]
    options: dict[str, Any] = {"thinking_budget": budget, "max_new_tokens": 5}
    seen: list[torch.Tensor] = []
    generate = host.generate

    def watched(*args: Any, **kwargs: Any) -> Any:
        seen.append(generate(*args, **kwargs))
        return seen[-1]

    host.generate = watched
    replies = ra.answer(host, tokenizer, QUESTIONS, **options)
    # The script goes on while the tag is forced; the reply is what it says afterwards, five tokens of it.
    assert [(reply.thought, str(reply)) for reply in (replies[0], replies[2])] == [
        ("a" * budget, "aaaaa"),
        ("d" * budget, "ddddd"),
    ]
    if budget > 2:
        assert (replies[1].thought, replies[1]) == ("bb", "ccccc")  # the tag was begun, or written, in time
    most = budget + len(tokenizer("</think>")["input_ids"]) + 5
    assert seen[0].shape[1] - len(ChatFormat(tokenizer).prompts([QUESTIONS[2]])[0]) == most


def test_a_long_prompt_cuts_no_other_reply_short() -> None:
    """Where a thought and a reply need more positions than the host has left, each prompt has those that it has alone."""
    host, tokenizer = thinker(OPENED, special=True)
    host.config.max_position_embeddings = 128
    questions = ["Why?", "Who?", "Why is it that " + "x" * 60, "How?"]
    options: dict[str, Any] = {"max_new_tokens": 20, "thinking_budget": 60, "temperature": 1.5}
    finished: list[int] = []
    together = ra.answer(host, tokenizer, questions, done=finished.append, **options)
    alone = [ra.answer(host, tokenizer, [question], first=n, **options)[0] for n, question in enumerate(questions)]
    assert [(reply.thought, str(reply)) for reply in together] == [(reply.thought, str(reply)) for reply in alone]
    assert len(tokenizer(together[0].thought + together[0])["input_ids"]) > 28
    assert sum(finished) == len(questions)


def test_what_pads_a_shorter_reply_is_no_text() -> None:
    host, tokenizer = thinker(OPENED, special=True)
    host.generation_config.pad_token_id = tokenizer("!")["input_ids"][0]
    Scripted(host, tokenizer).texts = ["So</think>Because.", "So</think>No.", "Never ends"]
    replies = ra.answer(host, tokenizer, QUESTIONS, max_new_tokens=20, thinking_budget=60)
    assert [(reply.thought, str(reply)) for reply in replies] == [("So", "Because."), ("So", "No."), ("Never ends", "")]


def test_below_both_numbers_nothing_changes(special: bool) -> None:
    """A random host's tokens are those of generate alone."""
    host, tokenizer = thinker(HYBRID, special, seed=3)
    replies = ra.answer(host, tokenizer, QUESTIONS, max_new_tokens=9, thinking_budget=50)
    chat_format = ChatFormat(tokenizer)
    for question, reply in zip(QUESTIONS, replies, strict=True):
        prompt = torch.tensor(chat_format.prompts([question]))
        tokens = host.generate(prompt, max_new_tokens=9, do_sample=False, repetition_penalty=1.1)
        assert reply == tokenizer.decode(tokens[0, prompt.shape[1] :], skip_special_tokens=True).strip()
        assert reply.thought == ""
        assert "".join(ra.stream(host, tokenizer, question, max_new_tokens=9)) == reply


def test_thinking_is_switched_off_by_the_templates_variable() -> None:
    host, tokenizer = thinker(HYBRID, True)
    seen: list[torch.Tensor] = []
    host.get_input_embeddings().register_forward_hook(lambda _, args, __: seen.append(args[0]))
    ra.answer(host, tokenizer, ["Why?"], max_new_tokens=1, chat_template_kwargs=WITHOUT_THOUGHT)
    assert tokenizer.decode(seen[0][0]) == "<|user|>Why?<eos>\n<|assistant|><think></think>"
    tokenizer.chat_template = OPENED  # which knows no such variable
    ra.answer(host, tokenizer, ["Why?"], max_new_tokens=1, chat_template_kwargs=WITHOUT_THOUGHT)
    assert tokenizer.decode(seen[-1][0]) == "<|user|>Why?<eos>\n<|assistant|>"


def test_a_thought_is_left_out_of_prompts_of_which_the_template_has_no_variable() -> None:
    tokenizer = host_tokenizer("gpt_oss")
    chat_format = ChatFormat(tokenizer, chat_template_kwargs=WITHOUT_THOUGHT)
    (prompt,) = chat_format.prompts(["Why?"])
    assert chat_format.decode(prompt).endswith("Why?<|end|><|start|>assistant<|channel|>final<|message|>")
    (example,) = chat_format.examples([{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}])
    learned = [token for token, label in zip(example["input_ids"], example["labels"], strict=True) if label == token]
    assert chat_format.decode(learned) == "So.<|return|>"
    assert example["input_ids"] == prompt + learned


def test_numbers_and_variables_out_of_range() -> None:
    host, tokenizer = thinker(OPENED, True)
    with pytest.raises(UsageError, match="thinking_budget: -1"):
        ra.answer(host, tokenizer, ["Why?"], thinking_budget=-1)
    for bad, message in (
        ({"tokenize": False}, "'tokenize' is not a variable"),
        ({"a": {1, 2}}, "not JSON values"),
        ({1: 2}, "not a mapping"),
        ([1], "not a mapping"),
        ({"a": "b" * 70_000}, "65,536 at most"),
        ({"a": float("nan")}, "not JSON values"),
        ({"enable_thinking": "false"}, "enable_thinking is 'false'; it is true or false"),
        ({"enabel_thinking": False}, "has no variable 'enabel_thinking'"),
    ):
        with pytest.raises(UsageError, match=message):
            ra.answer(host, tokenizer, ["Why?"], chat_template_kwargs=bad)  # type: ignore[arg-type]
    with pytest.raises(RealignerError, match="begins a reply with a thought"):
        ChatFormat(tokenizer).examples([{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}])
