"""Conversations and dialogues from a prompts file to the labels of a trace's tokens."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from peft import get_peft_model

import realigner as ra
from realigner.analysis import analyze, turns
from realigner.chat_format import WITHOUT_THOUGHT
from realigner.dialogues import Asked, Dialogue, all_replies, play, read_prompts, readable, spoken, written
from realigner.errors import RealignerError, UsageError
from realigner.generation import answer
from realigner.irm_config import IRMConfig
from realigner.prompts import messages_of
from realigner.report.context import page_context
from realigner.report.html_report import render
from realigner.report.report_input import ReportInput, gather
from realigner.traces.layout import LATER, RunLabel
from tests.planted import planted_trace
from tests.test_thinking import HYBRID, OPENED, Scripted, thinker
from tests.tiny import tiny_pair
from tests.validation import fading, talk_trace, turns_coverage

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Who?"},
    {"role": "assistant", "content": "Ada."},
    {"role": "user", "content": "When?"},
]
DIALOGUE = Dialogue(("Who was she?", "When?", "Where?"))


@pytest.fixture
def model() -> Any:
    """Its replies are six printable characters, so that a reply read again is the tokens that were generated."""
    host, tokenizer = tiny_pair()
    plain = [
        n for n in range(len(tokenizer)) if tokenizer.decode([n]).isascii() and tokenizer.decode([n]).strip().isprintable()
    ]
    plain = [n for n in plain if tokenizer.decode([n]).strip() and n > 1]
    host.generation_config.suppress_tokens = sorted(set(range(host.config.vocab_size)) - set(plain))
    torch.manual_seed(4)
    return get_peft_model(host, IRMConfig(output_std=0.3, layers=[0, 2])).eval()


def of_prompt(trace: xr.Dataset, number: int) -> xr.Dataset:
    return trace.isel(token=np.flatnonzero(trace["prompt"].values == number))


def labelled(trace: xr.Dataset, tokenizer: Any) -> list[tuple[int, str, str]]:
    """The turn, the role and the text of each stretch of tokens of one turn."""
    found: list[tuple[int, str, list[int]]] = []
    for turn, role, token in zip(*(trace[key].values.tolist() for key in ("turn", "role", "token_id")), strict=True):
        if not found or found[-1][0] != turn:
            found.append((turn, role, []))
        found[-1][2].append(token)
    return [(turn, role, tokenizer.decode(ids)) for turn, role, ids in found]


# Prompts files.


def test_a_prompts_file_holds_questions_conversations_and_dialogues(tmp_path: Path) -> None:
    lines = ["Why?", {"prompt": " How? "}, {"messages": CHAT}, {"turns": list(DIALOGUE.questions)}]
    (tmp_path / "p.jsonl").write_text("\n\n".join(map(json.dumps, lines)) + "\n")
    asked = read_prompts(tmp_path / "p.jsonl")
    assert asked == ["Why?", " How? ", CHAT, DIALOGUE]
    assert [written(prompt) for prompt in asked] == ["Why?", " How? ", *lines[2:]]
    (tmp_path / "p.txt").write_text('Why?\n\n  {"prompt": "How?"}\n')
    assert read_prompts(tmp_path / "p.txt") == ["Why?", '{"prompt": "How?"}']
    assert readable(CHAT) == "system: Be brief.\nuser: Who?\nassistant: Ada.\nuser: When?"
    assert readable([{"role": "user", "content": "a\n  b"}]) == "user: a b"
    assert spoken(readable(CHAT)) == [(turn["role"], turn["content"]) for turn in CHAT]
    assert spoken("Why?\nuser: x") == [("user", "Why?\nuser: x")]
    assert readable(DIALOGUE) == "user: Who was she?\nuser: When?\nuser: Where?"


USER = {"role": "user", "content": "Hi"}


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("Why?", "not valid JSON"),
        ("7", "not a prompt; give a string, or an object with one of prompt, messages, turns"),
        ('{"prompt": "a", "turns": ["b"]}', "not a prompt"),
        ('{"question": "a"}', "not a prompt"),
        ('" "', "key 'prompt': not a text, or an empty one"),
        ('{"prompt": ["a"]}', "key 'prompt': not a text"),
        ('{"turns": "a"}', "key 'turns': not a list"),
        ('{"turns": []}', "key 'turns': not a list with something in it"),
        ('{"turns": ["a", ""]}', "key 'turns': question 2 is not a text, or an empty one"),
        ('{"turns": [{"role": "user", "content": "a"}]}', "key 'turns': question 1"),
        (json.dumps({"messages": [USER, {"role": "assistant"}]}), "key 'messages': message 2: 'content' is missing"),
        (json.dumps({"messages": [USER | {"role": "bot"}]}), "key 'messages': message 1: role 'bot' is none of system, user"),
        (json.dumps({"messages": [USER | {"weight": 1}]}), "key 'messages': message 1: 'weight' is unknown"),
        (json.dumps({"messages": ["Hi"]}), "key 'messages': message 1: not an object"),
        (json.dumps({"messages": [USER | {"reasoning_content": "x"}]}), "message 1: 'reasoning_content'"),
        (json.dumps({"messages": [USER, {"role": "assistant", "content": "x"}]}), "the last message is not the user's"),
        (json.dumps({"messages": [USER | {"content": " "}]}), "or it is empty"),
        ('"half \\ud800"', "holds half a character"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_what_is_wrong_with_a_prompts_file_is_named(tmp_path: Path, line: str, fault: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(f'"Why?"\n{line}\n')
    with pytest.raises(RealignerError) as error:
        read_prompts(path)
    assert str(error.value).startswith(f"{path}:2: ")
    assert fault in str(error.value)
    assert len(str(error.value)) < 300 + len(str(path))


def test_prompts_files_without_prompts(tmp_path: Path) -> None:
    for name in ("p.jsonl", "p.txt"):
        (tmp_path / name).write_text("\n \n")
        with pytest.raises(RealignerError, match="no prompt"):
            read_prompts(tmp_path / name)
    with pytest.raises(UsageError, match="one question or more"):
        Dialogue(())


# Dialogues.


def test_dialogues_advance_together_and_each_hears_its_own_replies() -> None:
    calls = []

    def reply(asked: list[Any]) -> list[str]:
        calls.append(len(asked))
        return [f"({len(said)}) {said[0]['content']}" for said in asked]

    said = play([DIALOGUE, "Why?", Dialogue(("A?", "B?")), CHAT, Dialogue(("C?",))], reply)
    assert calls == [2, 1]
    first, third = messages_of(said[0]), messages_of(said[2])
    assert [turn["content"] for turn in first] == ["Who was she?", "(1) Who was she?", "When?", "(3) Who was she?", "Where?"]
    assert [turn["role"] for turn in first] == ["user", "assistant"] * 2 + ["user"]
    assert [turn["content"] for turn in third] == ["A?", "(1) A?", "B?"]
    assert said[1] == "Why?"
    assert said[3] == CHAT
    assert said[4] == [{"role": "user", "content": "C?"}]
    replies = all_replies([DIALOGUE, CHAT], reply)
    assert replies == [[f"({n}) Who was she?" for n in (1, 3, 5)], ["(4) Be brief."]]


# Labels.


def test_tokens_are_labelled_with_their_turn_and_role(model: Any) -> None:
    tokenizer = model.realigner.tokenizer
    with ra.record(model, questions=["Why?", CHAT]) as trace:
        replies = answer(model, tokenizer, ["Why?", CHAT], max_new_tokens=4)
    one, other = (of_prompt(trace, n) for n in (0, 1))
    assert labelled(one, tokenizer) == [
        (-1, "", "<|user|>"),
        (0, "user", "Why?"),
        (-1, "", "<eos>\n<|assistant|>"),
        (1, "assistant", replies[0][:-1]),  # the last token of a reply is never read
    ]
    assert labelled(other, tokenizer) == [
        (-1, "", "<|system|>"),
        (0, "system", "Be brief."),
        (-1, "", "<eos>\n<|user|>"),
        (1, "user", "Who?"),
        (-1, "", "<eos>\n<|assistant|>"),
        (2, "assistant", "Ada."),
        (-1, "", "<eos>\n<|user|>"),
        (3, "user", "When?"),
        (-1, "", "<eos>\n<|assistant|>"),
        (4, "assistant", replies[1][:-1]),
    ]
    assert trace["text_question"].values.tolist() == ["Why?", readable(CHAT)]


def test_nothing_is_guessed_about_other_tokens(model: Any) -> None:
    tokenizer = model.realigner.tokenizer
    with ra.record(model, questions=["Why?", "How?"]) as trace:
        answer(model, tokenizer, ["Why not?"], max_new_tokens=3)  # another question than was said
        answer(model, tokenizer, ["How?"], max_new_tokens=3, system="Be brief.")  # with something before it
        answer(model, tokenizer, ["Who?", "When?"], max_new_tokens=3)  # more than was said
    assert (trace["turn"].values == -1).all()
    assert set(trace["role"].values) == {""}
    assert trace["turn"].dtype == np.int64
    with (
        pytest.raises(UsageError, match="prompt: it is empty"),
        ra.record(model, questions=[[{"role": "user", "content": ""}]]),
    ):
        pass


def test_an_earlier_reply_is_given_the_deltas_that_it_was_made_with(model: Any) -> None:
    tokenizer = model.realigner.tokenizer
    options: dict[str, Any] = {"max_new_tokens": 6, "repetition_penalty": 1.1}

    def ask(conversations: Any) -> Sequence[str]:
        return answer(model, tokenizer, conversations, **options)

    with ra.strength(model, 0.7):
        first = [{"role": "user", "content": DIALOGUE.questions[0]}]
        with ra.record(model, keep="raw", questions=[first]) as early:
            reply = ask([first])[0]
        (said,) = play([DIALOGUE], ask)
        with ra.record(model, keep="raw", questions=[said]) as late:
            ask([said])
    assert said[1] == {"role": "assistant", "content": reply}
    made = early.isel(token=np.flatnonzero(early["is_generated"].values))
    read = late.isel(token=np.flatnonzero(late["turn"].values == 1))
    assert len(read["token"] if "token" in read.coords else read["token_id"]) == 6
    assert not read["is_generated"].any()
    assert read["token_id"].values[:5].tolist() == made["token_id"].values.tolist()
    assert read["position"].values[:5].tolist() == made["position"].values.tolist()
    np.testing.assert_allclose(read["delta"].values[:5], made["delta"].values, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(read["energy"].values[:5], made["energy"].values, rtol=1e-4)
    assert [turn for turn, _, _ in labelled(late, tokenizer) if turn >= 0] == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("template", [HYBRID, OPENED])
def test_a_thought_is_not_part_of_what_is_said(template: str) -> None:
    host, tokenizer = thinker(template, special=True)
    script = Scripted(host, tokenizer)
    begun = "<think>" if template == HYBRID else ""
    script.texts = [f"{begun}Hm, hm.</think>\n\nSo.", f"{begun}Hm and hm"]
    model = get_peft_model(host, IRMConfig(output_std=0.3)).eval()
    with ra.record(model, tokenizer, questions=["Why?", "How?"]) as trace:
        replies = answer(model, tokenizer, ["Why?", "How?"], max_new_tokens=20)
    assert trace["text_reply"].values.tolist() == replies == ["So.", ""]
    own = trace.isel(token=np.flatnonzero(trace["is_generated"].values & (trace["turn"].values >= 0)))
    assert labelled(own, tokenizer) == [(1, "assistant", "So.")]
    assert set(trace["role"].values[trace["turn"].values < 0]) == {""}
    assert labelled(of_prompt(trace, 1), tokenizer)[1][:2] == (0, "user")


def test_the_variables_of_the_template_are_those_of_the_call() -> None:
    host, tokenizer = thinker(HYBRID, special=True)
    model = get_peft_model(host, IRMConfig(output_std=0.3)).eval()
    for variables, known in ((WITHOUT_THOUGHT, True), (None, False)):
        with ra.record(model, tokenizer, questions=["Why?"], chat_template_kwargs=variables) as trace:
            answer(model, tokenizer, ["Why?"], max_new_tokens=3, chat_template_kwargs=WITHOUT_THOUGHT)
        assert (0 in trace["turn"].values) == known
    with (
        pytest.raises(UsageError, match="chat_template_kwargs"),
        ra.record(model, tokenizer, chat_template_kwargs={"tools": set()}),
    ):
        pass


def test_each_irm_goes_by_its_own_template(model: Any) -> None:
    tokenizer = model.realigner.tokenizer
    model.add_adapter("plain", IRMConfig(output_std=0.1, layers=[1], template="plain"))
    with ra.record(model, questions=["Why?", "Who?"]) as trace:
        for name, question in (("default", "Why?"), ("plain", "Who?")):
            model.base_model.set_adapter([name])
            answer(model, tokenizer, [question], max_new_tokens=3)
    assert trace["text_run"].values.tolist() == ["default", "plain"]
    assert labelled(of_prompt(trace, 0), tokenizer)[:2] == [(-1, "", "<|user|>"), (0, "user", "Why?")]
    assert labelled(of_prompt(trace, 1), tokenizer)[:2] == [(0, "user", "Who?"), (-1, "", "   ")]


# Traces of before.


def without_labels(path: Path, names: tuple[str, ...] = LATER) -> Path:
    """The same store as it was written before there were these labels."""
    root = path / "zarr.json"
    facts = json.loads(root.read_text())
    arrays = facts["consolidated_metadata"]["metadata"]
    for name in names:
        del arrays[name]
        shutil.rmtree(path / name)
    for array in arrays.values():
        if "coordinates" in array["attributes"]:
            array["attributes"]["coordinates"] = " ".join(set(array["attributes"]["coordinates"].split()) - set(names))
    root.write_text(json.dumps(facts))
    return path


def test_older_traces_are_read_joined_and_written(model: Any, tmp_path: Path) -> None:
    with ra.record(model, keep="raw", questions=["Why?", CHAT]) as trace:
        answer(model, model.realigner.tokenizer, ["Why?", CHAT], max_new_tokens=4)
    new = ra.load_trace(ra.save_trace(trace, tmp_path / "new.zarr", dtype="float32"))
    xr.testing.assert_identical(new.astype(object), trace.astype(object))
    shutil.copytree(tmp_path / "new.zarr", tmp_path / "old.zarr")
    old = ra.load_trace(without_labels(tmp_path / "old.zarr"))
    assert (old["turn"].values == -1).all()
    assert set(old["role"].values) == {""}
    assert ra.traces.verify_trace(tmp_path / "old.zarr") == ra.traces.verify_trace(tmp_path / "new.zarr") - 2
    unlabelled = new.assign_coords({name: old[name] for name in LATER})
    xr.testing.assert_identical(old.astype(object), unlabelled.astype(object))
    later = new.assign_coords({name: new[name] + 2 for name in ("prompt", "text_prompt")})
    joined = ra.traces.join_traces([old, later])
    tokens = old.sizes["token"]
    assert joined["turn"].values.tolist() == [-1] * tokens + new["turn"].values.tolist()
    again = ra.load_trace(ra.save_trace(joined, tmp_path / "joined.zarr"))
    assert again["role"].values.tolist() == joined["role"].values.tolist()
    assert gather("old", old).trace is old


def test_labels_are_checked(model: Any, tmp_path: Path) -> None:
    with ra.record(model, questions=["Why?"]) as trace:
        answer(model, model.realigner.tokenizer, ["Why?"], max_new_tokens=4)
    role, turn = trace["role"].values.copy(), trace["turn"].values.copy()
    role[0], turn[1] = "user", -2
    for name, values in (("role", role), ("turn", turn)):
        path = ra.save_trace(trace.assign_coords({name: ("token", values)}), tmp_path / f"{name}.zarr")
        with pytest.raises(RealignerError, match=rf"{name}.zarr: {name} is .* at token "):
            ra.load_trace(path)
        half = ra.save_trace(trace, tmp_path / f"without-{name}.zarr")
        with pytest.raises(RealignerError, match=f"{name!r} is missing"):
            ra.load_trace(without_labels(half, (name,)))
    for notes, fault in (
        ({"prompts": [{"turns": []}]}, "prompt 1: key 'turns'"),
        ({"base_questions": [1]}, "'base_questions'"),
    ):
        path = ra.save_trace(trace.assign_attrs(notes=notes), tmp_path / "notes.zarr", force=True)
        with pytest.raises(RealignerError, match=fault):
            ra.load_trace(path)


# Does it last?

TWINS = [("a", "anger", 1), ("u", "untrained", 1)]


def replies(table: Any, run: str, statistic: str) -> Any:
    return table[(table["run"] == run) & (table["statistic"] == statistic)].set_index("reply")


def test_values_of_replies_by_hand() -> None:
    """Two prompts, two replies of two tokens; 4 neurons in one layer; the template's and the user's tokens have 1,000."""
    energy = np.array([[[[1.0, 3.0], [1.0, 0.0]], [[4.0, 4.0], [4.0, 0.0]]], [[[1.0, 1.0]] * 2] * 2])
    table = turns(talk_trace(energy, TWINS), 99, 50)
    found = replies(table, "a", "energy")
    assert found["value"].tolist() == [3.0, 1.25]  # means of 2 and 4, of 0.5 and 2
    assert found["n"].tolist() == [2, 2]
    assert found["tokens"].tolist() == [4, 4]
    assert found["p"].isna().all()
    (size,) = replies(table, "u", "size")["value"].unique()
    assert size == 0.25  # |delta| 1 in one of 4 neurons
    ratio = replies(table, "a", "energy_ratio")
    assert ratio.index.tolist() == ["last"]
    assert ratio["value"].tolist() == pytest.approx([np.sqrt(0.25 * 0.5)])
    assert ratio["null"].tolist() == [1.0]
    assert ratio["untrained"].tolist() == [1.0]
    assert ratio["difference"].tolist() == pytest.approx([np.sqrt(0.125) - 1])
    assert replies(table, "all", "energy")["tokens"].tolist() == [4, 4]  # the twin's do not count


def test_layers_without_an_irm_and_replies_without_energy_do_not_count() -> None:
    energy = np.exp(fading(np.random.default_rng(0), 6, 0.5))
    one = talk_trace(energy, TWINS[:1])
    wide = one.reindex(layer=[0, 1])
    for statistic in ("energy", "size", "energy_ratio"):
        a, b = (replies(turns(trace, 99, 50), "a", statistic) for trace in (one, wide))
        assert a["value"].tolist() == b["value"].tolist()
    energy[0, 0, 1] = 0.0
    silent = replies(turns(talk_trace(energy, TWINS[:1]), 99, 50), "a", "energy_ratio")
    assert silent["n"].tolist() == [5]
    assert np.isfinite(silent["value"].iloc[0])
    nothing = replies(turns(talk_trace(0 * energy, TWINS[:1]), 99, 50), "a", "energy_ratio")
    assert nothing["value"].isna().all()
    assert nothing["p"].isna().all()


def test_a_planted_decay_is_found_and_none_is_not(recwarn: pytest.WarningsRecorder) -> None:
    rng = np.random.default_rng(3)
    log = np.concatenate([fading(rng, 8, 0.4), fading(rng, 8, 0.0)])
    table = turns(talk_trace(np.exp(log), TWINS), 499, 500)
    (fades,), (stays,) = (replies(table, run, "energy_ratio").to_dict("records") for run in ("a", "u"))
    assert fades["low"] < np.exp(-0.8) < fades["high"] < 1
    assert fades["p"] < 0.01
    assert stays["low"] < 1 < stays["high"]
    assert stays["p"] > 0.05
    assert fades["difference_high"] < 0
    growing = turns(talk_trace(np.exp(log[:, :, ::-1]), TWINS), 499, 500)
    assert replies(growing, "a", "energy_ratio")["p"].iloc[0] > 0.99  # one-sided
    assert not recwarn.list


@pytest.mark.parametrize("falls", [True, False])
def test_one_conversation_of_two_replies_tells_nothing(falls: bool) -> None:
    """There are two orders: p is anywhere in the half of its own, whatever the size of the change."""
    energy = np.array([4.0, 1.0] if falls else [1.0, 4.0]).reshape(1, 1, 2, 1)
    found = [replies(turns(talk_trace(energy, TWINS[:1]), 99, 2, seed), "a", "size_ratio")["p"].iloc[0] for seed in range(40)]
    assert abs(np.mean(found) - (0.25 if falls else 0.75)) < 0.1  # four standard errors
    assert 0.3 < np.ptp(found) < 0.7


def test_few_conversations_are_no_evidence_for_chance() -> None:
    """Three conversations of two replies have eight orders: however clear, p is below 0.05 by luck alone."""
    trace = planted_trace({"a": ("anger", 1)}, prompts=3)  # of 24 tokens each
    turn = np.tile(np.repeat([0, 1, 2, 3], [4, 9, 2, 9]), 3)
    role = np.where(turn % 2, "assistant", "user").astype(object)
    trace = trace.assign_coords(turn=("token", turn), role=("token", role))
    trace["energy"] = trace["energy"] * np.where(turn == 1, 100, 1)[:, None].astype(np.float32)
    for seed in range(4):
        (said,) = (one for one in analyze(trace, seed, permutations=200, resamples=20).verdicts if one["key"] == "fading")
        assert (said["verdict"], "so few conversations" in said["why"]) == ("cannot tell", True)


def test_a_first_and_a_last_reply_can_be_drawn_in_few_ways() -> None:
    """Of 4 replies in 4 x 3 ways, not in 4!: energy that falls as steeply as can be is no evidence for chance."""
    trace = planted_trace({"a": ("anger", 1)}, prompts=1)  # of 24 tokens
    turn = np.arange(24) // 3
    trace = trace.assign_coords(turn=("token", turn), role=("token", np.array(["user", "assistant"], dtype=object)[turn % 2]))
    trace["energy"] = trace["energy"] * np.exp(-2 * turn)[:, None].astype(np.float32)
    for seed in range(4):
        (said,) = (one for one in analyze(trace, seed, permutations=500, resamples=5).verdicts if one["key"] == "fading")
        assert (said["verdict"], "so few conversations" in said["why"]) == ("cannot tell", True)


def test_the_interval_holds_the_planted_ratio() -> None:
    """Of 40 with a coverage of 0.95: fewer than 32 once in 3,000."""
    assert turns_coverage(7, 0.3, 40, seed=2)["interval"] >= 0.8


def test_conversations_of_unequal_length_are_compared_each_with_itself() -> None:
    rng = np.random.default_rng(0)
    energy = np.exp(fading(rng, 6, 0.3))
    trace = talk_trace(energy, TWINS[:1])
    short = trace["turn"].values.copy()
    tokens = energy.shape[3] + 3
    short[: 3 * tokens][short[: 3 * tokens] < 2] = -1  # the first prompt has lost its first two messages
    role = np.where(short < 0, "", trace["role"].values).astype(object)
    table = turns(trace.assign_coords(turn=("token", short), role=("token", role)), 99, 50)
    means = energy[0].mean(axis=-1)
    logs = np.log([means[0, 2] / means[0, 1], *(means[1:, 2] / means[1:, 0])])
    assert replies(table, "a", "energy_ratio")["value"].iloc[0] == pytest.approx(np.exp(logs.mean()))
    assert replies(table, "a", "energy")["n"].tolist() == [6, 6, 5]


def test_without_two_replies_there_is_no_such_analysis() -> None:
    trace = planted_trace()
    assert not len(turns(trace))
    found = analyze(trace, permutations=19, resamples=10)
    assert "turns" not in found.to_dict()
    assert "fading" not in [verdict["key"] for verdict in found.verdicts]
    item = ReportInput("t", trace, {}, {}, found)
    assert "does it last" not in render([item])


# From a dialogue to its report.


def talks(model: Any) -> xr.Dataset:
    """Two runs that play two dialogues and answer a question."""
    tokenizer = model.realigner.tokenizer
    model.add_adapter("second", IRMConfig(output_std=0.1, layers=[0, 2]))
    prompts: list[Asked] = [DIALOGUE, Dialogue(("<b>Why?</b>", "How so?")), "A single one?"]
    parts = []
    for name in ("default", "second"):
        model.base_model.set_adapter([name])

        def ask(conversations: Any) -> Sequence[str]:
            return answer(model, tokenizer, conversations, max_new_tokens=5)

        said = play(prompts, ask)
        labels = {"default": RunLabel("anger-1", "anger", 1), "second": RunLabel("untrained-1", "untrained", 1)}
        with ra.record(model, keep="raw", questions=said, labels=labels) as trace:
            ask(said)
        parts.append(trace)
    notes = {"prompts": [written(prompt) for prompt in prompts]}
    return ra.traces.join_traces(parts).assign_attrs(notes=notes)


def test_a_dialogue_is_analysed_and_reported(model: Any, tmp_path: Path) -> None:
    trace = talks(model)
    found = analyze(trace, permutations=99, resamples=50)
    assert found.turns["reply"].unique().tolist() == [1, 2, 3, "last"]
    energy = replies(found.turns, "anger-1", "energy")
    assert energy["n"].tolist() == [2, 2, 1]
    assert energy["tokens"].tolist() == [10, 9, 4]  # the last token of a reply that was just made is never read
    first = trace.isel(token=np.flatnonzero((trace["run"].values == "anger-1") & (trace["turn"].values == 1)))
    by_prompt = [np.nansum(of_prompt(first, n)["energy"].values, axis=1).mean() for n in (0, 1)]
    assert energy["value"].iloc[0] == pytest.approx(np.mean(by_prompt))
    (verdict,) = [verdict for verdict in found.verdicts if verdict["key"] == "fading"]
    assert verdict["value"] == replies(found.turns, "all", "energy_ratio")["value"].iloc[0]
    assert {row["statistic"] for row in found.to_dict()["turns"]} == {"energy", "size", "energy_ratio", "size_ratio"}
    item = ReportInput("talks", trace, {}, {}, found)
    dialogue, other, single = item.answers()
    assert dialogue["prompt"] == readable(DIALOGUE)
    assert [len(row["anger-1"]) for row in (dialogue, other)] == [3, 2]
    assert single["prompt"] == "A single one?"
    assert isinstance(single["anger-1"], str)
    context = page_context(item)
    page = render([item])
    assert "does it last over a conversation?" in page
    assert "Who was she? → When? → Where?" in page
    assert "<b>Why?" not in page
    cells = context["replies"][0]["cells"]
    assert [question for question, _ in cells[0]["turns"]] == list(DIALOGUE.questions)
    commands = context["commands"]
    begin, end = commands.index("cat > prompts.jsonl <<'END'"), commands.index("END")
    (tmp_path / "prompts.jsonl").write_text("\n".join(commands[begin + 1 : end]))
    assert read_prompts(tmp_path / "prompts.jsonl")[0] == DIALOGUE
    assert commands[end + 1].startswith("realigner trace --irm RUN --prompts prompts.jsonl --out again/trace.zarr --keep raw")
    texts = json.loads(str(context["facts"]))["texts"]
    (text,) = (text for text in texts if text["run"] == "anger-1" and text["prompt"] == 0)
    assert [role for _, _, role in text["turns"]] == ["user", "assistant"] * 3
    start, stop, _ = text["turns"][0]
    assert "".join(text["words"][start:stop]) == "Who was she?"
    assert text["turns"][-1][1] == len(text["words"])


def test_the_examples_of_the_docs(model: Any, tmp_path: Path) -> None:
    text = (Path(__file__).parents[1] / "docs" / "traces.md").read_text(encoding="utf-8")
    (tmp_path / "p.jsonl").write_text(text.split("```json\n")[1].split("```")[0], encoding="utf-8")
    assert [type(prompt) for prompt in read_prompts(tmp_path / "p.jsonl")] == [str, str, list, Dialogue]
    (block,) = (part.split("```")[0] for part in text.split("```python\n") if "Dialogue, play" in part)
    names: dict[str, Any] = {"ra": ra, "model": model, "tokenizer": model.realigner.tokenizer}
    exec(compile(block, "traces.md", "exec"), names)
    assert sorted({*names["trace"]["role"].values}) == ["", "assistant", "user"]
    with pytest.raises(UsageError, match="neither a question nor a list"), ra.record(model, questions=[DIALOGUE]):  # type: ignore[list-item]
        pass
