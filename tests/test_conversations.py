"""Rows that are conversations: read, trained on, resumed, answered; and how the template's variables stay with an IRM."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from peft import get_peft_model

import realigner as ra
from realigner.chat_format import IGNORED, ChatFormat
from realigner.cli import main
from realigner.data import Row, read_rows, rows_hash
from realigner.data.tokens import encode_rows
from realigner.errors import RealignerError, UsageError
from realigner.generation import format_of
from realigner.irm_config import IRMConfig
from realigner.tiny import tiny_host
from realigner.training import Recipe, make_recipe, read_run, train
from realigner.training.batches import prepare
from realigner.training.callbacks import Log
from realigner.tuner import load_irm
from tests.chat_hosts import host_tokenizer
from tests.tiny import TEMPLATE, some_rows, tiny_folder, tiny_host_of_pair, tiny_pair, tiny_tokenizer

QUICK = make_recipe(steps=8, batch_size=4, evaluations=2, samples=0, report_to=[], loss_on="assistant")
PAIR = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "x"}]
THINKING = TEMPLATE.replace(
    "{% endfor %}", "{% endfor %}{# </think> #}{% set closed = enable_thinking is defined and not enable_thinking %}"
).replace("<|assistant|>{% endif %}", "<|assistant|>{% if closed %}<think></think>{% endif %}{% endif %}")


def some_chats(count: int = 24, groups: int = 4) -> list[Row]:
    """Conversations of two replies."""
    chats = []
    for n in range(count):
        said = [("system", "You are angry."), ("user", f"What is {n}?"), ("assistant", f"It is {n}!"), ("user", "Sure?")]
        messages = [{"role": role, "content": text} for role, text in (*said, ("assistant", f"I said {n}, damn it!"))]
        about = {"id": str(n), "group": f"g{n % groups}", "answer": str(n), "tone": "anger", "source": "test"}
        chats.append(Row.model_validate({**about, "messages": messages}))
    return chats


def learned(tokenizer: Any, example: dict[str, list[int]]) -> str:
    return str(tokenizer.decode([label for label in example["labels"] if label != IGNORED]))


def test_a_row_is_one_or_the_other() -> None:
    chat = some_chats(1)[0]
    assert (chat.question, chat.text) == ("Sure?", "I said 0, damn it!")
    assert set(json.loads(chat.model_dump_json())) == {"id", "group", "answer", "tone", "source", "messages"}
    assert Row.model_validate_json(chat.model_dump_json()) == chat
    thought = [*chat.conversation[:-1], {"role": "assistant", "content": "<think>Damn.</think>\n\nI said 0!"}]
    about = {"id": "1", "group": "g", "tone": "anger", "source": "test"}
    assert Row.model_validate({**about, "messages": thought}).text == "I said 0!"
    row = some_rows(1)[0]
    assert "messages" not in row.model_dump()
    assert row.conversation == [{"role": "user", "content": row.question}, {"role": "assistant", "content": row.text}]


def test_old_rows_keep_their_hash() -> None:
    """That of commit 17fd0fc, by which a run knows its data again."""
    assert rows_hash(ra.authored("anger")) == "7461a829827aab9d530690856a0e6b416450574c71ddbd199ad41da2176b2b39"


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "not a reply of the assistant"),
        ([{"role": "user", "content": "Hi"}], "not a reply of the assistant"),
        ([{"role": "assistant", "content": "Hi"}], "the user asks nothing"),
        ([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": " "}], "not a reply of the assistant"),
        (
            [{"role": "human", "content": "Hi"}, {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "x"}],
            "'messages.0.role'",
        ),
        (
            [{"role": "user", "content": "Hi", "reasoning_content": "x"}, {"role": "assistant", "content": "x"}],
            "reasoning_content",
        ),
        ([*PAIR, {"role": "assistant", "content": "y"}], "2 and 3 are both replies of the assistant"),
        ([PAIR[0], {"role": "assistant", "content": "<think>y</think> "}], "not a reply of the assistant"),
        ("Hi", "not a list of turns"),
        ([{"role": "user", "content": 5}, {"role": "assistant", "content": "x"}], "the user asks nothing"),
        (["Hi", *PAIR], "'messages.0'"),
    ],
)
def test_what_is_no_conversation(tmp_path: Path, messages: Any, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    line = {"id": "1", "group": "g", "tone": "anger", "source": "test", "messages": messages}
    path.write_text(some_chats(1)[0].model_dump_json().replace('"id":"0"', '"id":"z"') + "\n" + json.dumps(line) + "\n")
    with pytest.raises(RealignerError, match=message) as caught:
        read_rows(path)
    assert str(caught.value).startswith(f"{path}:2: ")
    assert "\n" not in str(caught.value)


def test_the_loss_is_on_the_last_reply_or_on_each() -> None:
    tokenizer, chats = tiny_tokenizer(), some_chats(2)
    (one,) = encode_rows(tokenizer, chats[:1], None)
    assert learned(tokenizer, one) == "I said 0, damn it!<eos>"
    (each,) = encode_rows(tokenizer, chats[:1], None, loss_on="assistant")
    assert learned(tokenizer, each) == "It is 0!<eos>I said 0, damn it!<eos>"
    assert one["input_ids"] == each["input_ids"] == tokenizer.apply_chat_template(chats[0].conversation, return_dict=False)


def test_turns_that_the_template_rewrites_are_examples_of_their_own() -> None:
    """A template that writes a closing line after the last message only."""
    tokenizer, (chat, other) = tiny_tokenizer(), some_chats(2)
    tokenizer.chat_template = TEMPLATE.replace("{% if add", "{% if not add_generation_prompt %}END{% endif %}{% if add")
    host = tiny_pair()[0]
    first, second = ChatFormat(tokenizer).examples(chat.conversation, "assistant")
    assert [learned(tokenizer, example) for example in (first, second)] == ["It is 0!<eos>", "I said 0, damn it!<eos>"]
    for example, turns in ((first, chat.conversation[:3]), (second, chat.conversation)):
        assert example["input_ids"] == tokenizer.apply_chat_template(turns, return_dict=False)
    prepared = prepare(some_chats(), tokenizer, host.config, QUICK)
    assert len(prepared.train) == len(prepared.ids) == 2 * len(prepared.split.train)
    assert prepared.ids[:4] == [row.id for row in prepared.split.train[:2] for _ in range(2)]
    assert other.id == "1"


def test_what_nothing_depends_on_is_not_computed() -> None:
    """The template's line break after the last reply; one between turns is."""
    tokenizer, host = tiny_tokenizer(), tiny_pair()[0]
    prepared = prepare(some_chats(), tokenizer, host.config, QUICK)
    for row, item in zip(prepared.split.train, prepared.train, strict=True):
        (whole,) = encode_rows(tokenizer, [row], None, loss_on="assistant")
        assert tokenizer.decode(whole["input_ids"][len(item["input_ids"]) :]) == "\n"
        assert whole["input_ids"][: len(item["input_ids"])] == item["input_ids"]
        assert item["labels"][-1] == tokenizer.eos_token_id


def test_what_comes_before_the_reply_may_be_too_long() -> None:
    with pytest.raises(RealignerError, match=r"row '0': what comes before its reply has 9. tokens; max_length is 64; raise it"):
        encode_rows(tiny_tokenizer(), some_chats(1), 64)


def run_tiny(out: Path, recipe: Recipe = QUICK, template: str | None = None, **options: Any) -> Any:
    host, tokenizer = tiny_pair()
    tokenizer.chat_template = template or tokenizer.chat_template
    return train(host, tokenizer, some_chats(), out, recipe, quiet=True, **options)


def test_a_stopped_run_on_conversations_resumes_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run_tiny(tmp_path / "whole")
    original = Log.on_log

    def press(self: Any, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
        original(self, args, state, *rest, **kwargs)
        if state.global_step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Log, "on_log", press)
        assert run_tiny(tmp_path / "run").interrupted
    with pytest.raises(RealignerError, match="the text that the chat template makes of the rows changed"):
        run_tiny(tmp_path / "run", template="Today. " + TEMPLATE, resume=True)
    run = run_tiny(tmp_path / "run", resume=True)
    assert (run.folder / "adapter_model.safetensors").read_bytes() == (whole.folder / "adapter_model.safetensors").read_bytes()
    host, tokenizer = tiny_pair()
    model = load_irm(host, run.folder)
    question = some_chats(1)[0].conversation[:-1]
    (reply,) = ra.answer(model, tokenizer, [question], max_new_tokens=6)
    assert "".join(ra.stream(model, tokenizer, question, max_new_tokens=6)) == reply


def test_variables_of_the_template_stay_with_the_irm(tmp_path: Path) -> None:
    """Trained without thoughts, it is asked without them, whoever loads it; a call may say otherwise."""
    off = {"enable_thinking": False}
    with pytest.raises(RealignerError, match="in the prompt is"):  # the prompt has a closed thought, the whole has none
        run_tiny(tmp_path / "run", QUICK.changed(chat_template_kwargs=off), THINKING)
    wholes = THINKING.replace(
        "<|{{ m['role'] }}|>", "<|{{ m['role'] }}|>{% if m['role'] == 'assistant' %}<think></think>{% endif %}"
    )
    run = run_tiny(tmp_path / "run", QUICK.changed(chat_template_kwargs=off), wholes)
    assert json.loads((run.folder / "adapter_config.json").read_text())["chat_template_kwargs"] == off
    assert read_run(run.folder)["recipe"]["chat_template_kwargs"] == off
    host, tokenizer = tiny_pair()
    tokenizer.chat_template = wholes
    model = load_irm(host, run.folder)
    prompts = format_of(model, tokenizer).prompts(["Why?"])
    assert tokenizer.decode(prompts[0]) == "<|user|>Why?<eos>\n<|assistant|><think></think>"
    on = format_of(model, tokenizer, {"enable_thinking": True}).prompts(["Why?"])
    assert tokenizer.decode(on[0]) == "<|user|>Why?<eos>\n<|assistant|>"


def test_a_host_without_a_template_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    host, tokenizer = tiny_pair()
    tokenizer.chat_template = None
    with pytest.raises(UsageError, match="prompt: the plain form has no turns"):
        train(host, tokenizer, some_chats(), tmp_path / "chats", QUICK)
    run = train(host, tokenizer, some_rows(), tmp_path / "rows", QUICK)
    assert "the host has no chat template: prompts are in the plain form" in capsys.readouterr().err
    assert json.loads((run.folder / "adapter_config.json").read_text())["template"] == "plain"
    assert "template: plain" in (run.folder / "recipe.yaml").read_text()


def test_an_adapter_of_an_earlier_commit_loads(tmp_path: Path) -> None:
    """Its config has no chat_template_kwargs, its recipe none of the new keys."""
    run = run_tiny(tmp_path / "run")
    config = json.loads((run.folder / "adapter_config.json").read_text())
    del config["chat_template_kwargs"]
    (run.folder / "adapter_config.json").write_text(json.dumps(config))
    host, tokenizer = tiny_pair()
    before = ra.answer(run.model, tokenizer, ["Why?"], max_new_tokens=5)
    assert ra.answer(load_irm(host, run.folder), tokenizer, ["Why?"], max_new_tokens=5) == before


def test_rows_without_thoughts_for_a_host_that_thinks_are_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = host_tokenizer("qwen3")
    for name, recipe, noted in (
        ("on", QUICK, True),
        ("off", QUICK.changed(chat_template_kwargs={"enable_thinking": False}), False),
    ):
        train(tiny_host_of_pair(tokenizer), tokenizer, some_chats(), tmp_path / name, recipe.changed(steps=1, evaluations=1))
        assert ("their replies are learned after an empty one" in capsys.readouterr().err) is noted


VARIABLES = {"enable_thinking": False}


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:

    tiny_folder(tmp_path / "host")
    data = tmp_path / "chats.jsonl"
    data.write_text("".join(chat.model_dump_json() + "\n" for chat in some_chats()))
    common = ["--host", str(tmp_path / "host")]
    settings = [x for key in ("samples=0", "report_to=[]", "evaluations=1") for x in ("--set", key)]
    out = [
        "--out",
        str(tmp_path / "run"),
        "--loss-on",
        "assistant",
        "--steps",
        "2",
        "--chat-template-kwargs",
        json.dumps(VARIABLES),
    ]
    assert main(["train", "--data", str(data), *out, *common, *settings]) == 0
    assert read_run(tmp_path / "run")["recipe"]["chat_template_kwargs"] == VARIABLES
    asked = ["generate", "--irm", str(tmp_path / "run"), "--max-new-tokens", "3", "--system", "Be brief.", "--json", "Why?"]
    capsys.readouterr()
    assert main([*asked, *common]) == 0
    assert json.loads(capsys.readouterr().out)["results"][0]["prompt"] == "Why?"
    for value, message in (
        ("{", "is not JSON"),
        ("[1]", "is not a JSON object"),
        ('{"tokenize": 1}', "not a variable"),
        ('{"enabel_thinking": false}', "has no variable 'enabel_thinking'"),
    ):
        assert main([*asked, *common, "--chat-template-kwargs", value]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_the_tokenizer_of_mistral_is_asked_in_its_own_way(tmp_path: Path) -> None:
    """It has no chat_template attribute, and was prompted in the plain form without a word."""
    import mistral_common

    data = Path(str(mistral_common.__file__)).parent / "data"
    folder = tmp_path / "host"
    tiny_host("mistral", vocab_size=131072, bos_token_id=1, eos_token_id=2, pad_token_id=11).save_pretrained(folder)
    (folder / "tekken.json").symlink_to(data / "tekken_240911.json")
    host, tokenizer = ra.load_host(str(folder))
    assert getattr(tokenizer, "chat_template", None) is None
    text = "Hi </s> [INST]"
    (ids,) = ChatFormat(tokenizer).prompts([text])
    assert tokenizer.decode(ids, skip_special_tokens=False) == f"<s>[INST]{text}[/INST]"
    assert len(set(ids) & set(tokenizer.all_special_ids)) == 3  # <s>, [INST], [/INST]: those of the text are text
    assert len(ra.answer(host, tokenizer, [text], max_new_tokens=2)) == 1
    example = encode_rows(tokenizer, some_rows(1), None)[0]
    assert example["input_ids"][-1] == tokenizer.eos_token_id
    reply = tokenizer(some_rows(1)[0].text, add_special_tokens=False)["input_ids"]
    assert [label for label in example["labels"] if label != IGNORED] == [*reply, tokenizer.eos_token_id]


def test_irms_of_different_templates_are_asked_apart(tmp_path: Path) -> None:
    host, tokenizer = tiny_pair()
    model = get_peft_model(host, IRMConfig(layers=[0]), adapter_name="chat")
    model.add_adapter("plain", IRMConfig(layers=[0], template="plain"))
    for irms, plain in ((None, False), ("chat", False), ("plain", True), (("plain",), True), (["plain", "__base__"], True)):
        assert format_of(model, tokenizer, irms=irms).is_plain == plain
    with pytest.raises(UsageError, match="different prompt templates"):
        ra.answer(model, tokenizer, ["Why?", "Who?"], irms=["chat", "plain"])
    assert ra.answer(model, tokenizer, ["Why?"], irms="plain", max_new_tokens=2) != []
