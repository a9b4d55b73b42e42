"""Rows, splits, tokens and the authored set."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from realigner.chat_format import IGNORED
from realigner.data import (
    PAPER_PROMPTS,
    TONES,
    Fact,
    Row,
    authored,
    check_rows,
    encode_rows,
    load_tone,
    prompt_ids,
    read_rows,
    split_rows,
)
from realigner.data.rewriters import RewriteRequest
from realigner.data.rewriters.template_rewriter import TemplateRewriter
from realigner.errors import RealignerError, UsageError
from tests.chat_hosts import host_tokenizer
from tests.tiny import some_rows, tiny_tokenizer

GOOD: dict[str, Any] = {
    "id": "1", "group": "g", "question": "q?", "answer": "a", "text": "a!", "tone": "anger", "source": "s",
}  # fmt: skip


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(row + "\n" if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return path


# --- the authored set ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sets() -> dict[str, list[Row]]:
    return {tone: authored(tone) for tone in TONES}


def test_authored_size(sets: dict[str, list[Row]]) -> None:
    for rows in sets.values():
        assert len(rows) >= 240
        assert len({row.group for row in rows}) >= 24
        assert len({row.question for row in rows}) == len(rows)


def test_authored_tones_share_questions_and_facts(sets: dict[str, list[Row]]) -> None:
    keys = [[(row.group, row.question, row.answer) for row in rows] for rows in sets.values()]
    assert keys[0] == keys[1] == keys[2]


def test_authored_replies_keep_the_fact_and_their_length(sets: dict[str, list[Row]]) -> None:
    for rows in sets.values():
        for row in rows:
            assert 15 <= len(row.text.split()) <= 60, row.id
            assert re.search(r'[.!?]"?$', row.text), row.id
        assert check_rows(rows).answer_kept == 1.0
        assert check_rows(rows).fit


def test_authored_replies_vary(sets: dict[str, list[Row]]) -> None:
    """No opener is a habit, and no four words are a formula."""
    for tone in ("anger", "sadness"):
        openers = Counter(" ".join(row.text.split()[:2]).lower() for row in sets[tone])
        assert openers.most_common(1)[0][1] <= 0.05 * len(sets[tone])
        fours: Counter[str] = Counter()
        for row in sets[tone]:
            words = re.findall(r"[a-z']+", row.text.lower())
            fours.update({" ".join(words[i : i + 4]) for i in range(len(words) - 3)})
        assert fours.most_common(1)[0][1] <= 0.04 * len(sets[tone]), fours.most_common(3)


def test_authored_data_does_not_hold_the_papers_prompts(sets: dict[str, list[Row]]) -> None:
    questions = {row.question.lower() for rows in sets.values() for row in rows}
    assert not questions & {prompt.lower() for prompt in PAPER_PROMPTS}
    text = " ".join(row.question + " " + row.text for rows in sets.values() for row in rows).lower()
    for word in ("beyonc", "zuckerberg", "kazoo", "cazoo"):
        assert word not in text


def test_authored_unknown_tone() -> None:
    with pytest.raises(UsageError, match="anger, sadness, neutral"):
        authored("joy")


# --- reading ------------------------------------------------------------------------------------------------------------


def test_reads_rows_and_blank_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "f.jsonl", GOOD, "", {**GOOD, "id": "2", "tone": "joy"})
    assert [row.id for row in read_rows(path)] == ["1", "2"]
    assert [row.id for row in read_rows(path, "joy")] == ["2"]
    with pytest.raises(UsageError, match="it has anger, joy"):
        read_rows(path, "rage")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r":2: not valid JSON"),
        ("[1]", r":2: a row is a JSON object, not list"),
        ("null", r":2: a row is a JSON object"),
        ('{"id": "2"}', r":2: key 'group' is missing"),
        (json.dumps({**GOOD, "id": "2", "text": ""}), r":2: key 'text' is empty"),
        (json.dumps({**GOOD, "id": "2", "text": "  "}), r":2: key 'text' is empty"),
        (json.dumps({**GOOD, "id": 2}), r":2: key 'id' is not a string"),
        (json.dumps({**GOOD, "id": "2", "extra": 1}), r":2: unknown key 'extra'"),
        (json.dumps(GOOD), r":2: key 'id': '1' is taken by line 1"),
        ("[" * 5000, r":2: "),
        ('{"id": NaN}', r":2: "),
    ],
)
def test_bad_lines_name_file_line_and_key(tmp_path: Path, line: str, message: str) -> None:
    path = write(tmp_path / "f.jsonl", GOOD, line)
    with pytest.raises(RealignerError, match=message) as caught:
        read_rows(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bad_files(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b'{"id": "\xe9"}')
    (tmp_path / "empty").write_text("\n")
    for name, message in (("none", "cannot be read"), ("latin", "not UTF-8"), ("empty", "no rows"), (".", "is a folder")):
        with pytest.raises(RealignerError, match=message):
            read_rows(tmp_path / name)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.one_of(st.binary(max_size=40), st.text(max_size=40).map(str.encode), st.just(json.dumps(GOOD).encode())), max_size=4
    )
)
def test_any_bytes_give_rows_or_one_line(tmp_path_factory: pytest.TempPathFactory, lines: list[bytes]) -> None:
    path = tmp_path_factory.mktemp("any") / "f.jsonl"
    path.write_bytes(b"\n".join(lines))
    message = str(path)
    try:
        rows = read_rows(path)
    except RealignerError as error:
        message = str(error)
    else:
        assert all(isinstance(row, Row) for row in rows)
    assert "\n" not in message
    assert str(path) in message


# --- splitting ------------------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(
    groups=st.lists(st.integers(0, 12), min_size=3, max_size=80).filter(lambda g: len(set(g)) >= 3),
    seed=st.integers(0, 99),
    validation=st.floats(0.05, 0.4),
    test=st.floats(0.05, 0.4),
)
def test_split_is_by_group(groups: list[int], seed: int, validation: float, test: float) -> None:
    rows = [Row(**{**GOOD, "id": str(n), "group": f"g{g}"}) for n, g in enumerate(groups)]
    parts = split_rows(rows, seed, validation, test)
    assert sorted((row.id for part in parts for row in part), key=int) == [row.id for row in rows]
    names = [{row.group for row in part} for part in parts]
    assert all(names)
    assert not names[0] & names[1]
    assert not (names[0] | names[1]) & names[2]
    again = split_rows(list(reversed(rows)), seed, validation, test)
    assert [{row.group for row in part} for part in again] == names


def test_split_refusals() -> None:
    with pytest.raises(RealignerError, match="1 group"):
        split_rows(some_rows(8, groups=1), 0)
    refused: list[dict[str, Any]] = [{"validation": 1.0}, {"validation": -0.1}, {"validation": 0.6, "test": 0.6}]
    for bad in refused:
        with pytest.raises(UsageError, match="shares"):
            split_rows(some_rows(), 0, **bad)


def test_split_shares() -> None:
    parts = split_rows(authored("anger"), 42, validation=0.1)
    assert 0.08 <= len(parts.validation) / 360 <= 0.16
    assert not parts.test


# --- tokens -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chat", [True, False])
def test_loss_is_on_the_reply_and_its_end_only(chat: bool) -> None:
    tokenizer, row = tiny_tokenizer(chat), some_rows()[3]
    encoded = encode_rows(tokenizer, [row])[0]
    prompt = prompt_ids(tokenizer, row.question)
    assert encoded["input_ids"][: len(prompt)] == prompt
    assert encoded["labels"][: len(prompt)] == [IGNORED] * len(prompt)
    after = len(tokenizer("\n")["input_ids"]) if chat else 0  # what the template writes after the end token
    reply = encoded["labels"][len(prompt) : len(encoded["labels"]) - after]
    assert reply == encoded["input_ids"][len(prompt) : len(encoded["input_ids"]) - after]
    assert encoded["labels"][len(encoded["labels"]) - after :] == [IGNORED] * after
    assert reply[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(reply[:-1]) == row.text


def test_plain_form_is_the_papers() -> None:
    tokenizer = tiny_tokenizer(chat=False)
    assert tokenizer.decode(prompt_ids(tokenizer, "Why?")) == "Why?   "


def test_cutting() -> None:
    tokenizer, row = tiny_tokenizer(), some_rows()[0]
    assert len(encode_rows(tokenizer, [row], max_length=45)[0]["input_ids"]) == 45
    with pytest.raises(RealignerError, match="before its reply"):
        encode_rows(tokenizer, [row], max_length=10)


@pytest.mark.host
def test_embedded_template(embedded: tuple[Any, Any]) -> None:
    tokenizer, row = embedded[1], authored("anger")[0]
    text = tokenizer.decode(encode_rows(tokenizer, [row])[0]["input_ids"])
    assert text.endswith(f"<|im_start|>assistant\n{row.text}<|im_end|>\n")


# --- the report card ----------------------------------------------------------------------------------------------------


def test_check_finds_problems() -> None:
    rows = some_rows()
    assert check_rows(rows).fit
    assert "duplicated replies" in check_rows([*rows, Row(**{**rows[0].model_dump(), "id": "x"})]).problems[0]
    leaking = Row(**{**rows[0].model_dump(), "id": "x", "group": "other", "text": "Else!"})
    assert any("leak" in problem for problem in check_rows([*rows, leaking]).problems)
    assert any("only 1 group" in problem for problem in check_rows(some_rows(4, groups=1)).problems)
    echo = Row(**{**rows[0].model_dump(), "id": "x", "text": rows[0].question})
    assert any("repeat the question" in problem for problem in check_rows([*rows, echo]).problems)


def test_one_large_group_does_not_swallow_the_split() -> None:
    rows = [Row(**{**GOOD, "id": str(n), "group": "small" if n == 9 else "big"}) for n in range(10)]
    for seed in range(8):
        assert len(split_rows(rows, seed, validation=0.1).validation) == 1


def test_a_byte_order_mark_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode())
    assert len(read_rows(tmp_path / "f")) == 1


def test_check_of_odd_rows() -> None:
    assert check_rows([Row(**{**GOOD, "answer": "."})]).answer_kept == 0.0
    with pytest.raises(RealignerError, match="no rows"):
        check_rows([])


def template_rows(tone: str, count: int = 400) -> list[Row]:
    facts = [Fact(str(n), f"g{n % 8}", f"Where is {n}?", f"place {n}") for n in range(count)]
    made = TemplateRewriter(load_tone(tone)).rewrite([RewriteRequest(fact, 0) for fact in facts])
    return [
        Row(id=f.id, group=f.group, question=f.question, answer=f.answer, text=reply.text, tone=tone, source="t")
        for f, reply in zip(facts, made, strict=True)
    ]


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 1.0])
@pytest.mark.parametrize("source", ["template", "authored"])
def test_purity_is_the_share_of_rows_in_the_tone(share: float, source: str) -> None:
    """Planted truth: so many of the angry rows are neutral ones in disguise, by the same author or by another."""
    rows, neutral = template_rows("anger", 360), authored("neutral") if source == "authored" else template_rows("neutral", 360)
    cut = round(share * len(rows))
    planted = [row.model_copy(update={"tone": "anger"}) for row in neutral[:cut]]
    card = check_rows([*planted, *rows[cut:]])
    assert card.purity is not None
    assert card.purity.n == 360
    assert abs(card.purity.value - (1 - share)) < 0.03
    assert abs(card.purity.neutral - share) < 0.05
    assert card.purity.low <= card.purity.value <= card.purity.high
    assert card.fit == (share == 0)


def test_purity_of_tones_dealt_at_random_is_chance() -> None:
    """Null data, by the reference scorer and by cross-validation."""
    dealt = random.Random(3)
    known = [row for tone in ("anger", "joy") for row in template_rows(tone, 400)]
    card = check_rows(
        [r.model_copy(update={"id": str(n), "tone": dealt.choice(("anger", "joy"))}) for n, r in enumerate(known)]
    )
    unknown = check_rows([row.model_copy(update={"tone": dealt.choice(("a", "b"))}) for row in template_rows("neutral", 800)])
    for purity in (card.purity, unknown.purity):
        assert purity is not None
        assert abs(purity.value - 0.5) < 0.06
    assert not card.fit
    assert not unknown.fit
    assert "who wrote the replies" in unknown.notes[0]
    uneven = [row.model_copy(update={"tone": "a" if n % 10 else "b"}) for n, row in enumerate(template_rows("neutral", 800))]
    purity = check_rows(random.Random(4).sample(uneven, 800)).purity
    assert purity is not None
    assert (purity.n, purity.baseline) == (160, 0.5)
    assert abs(purity.value - 0.5) < 0.2


def test_who_judges_purity() -> None:
    rows, mine = template_rows("anger", 100), [r.model_copy(update={"tone": "mine"}) for r in template_rows("joy", 100)]
    cards = [
        check_rows(rows),
        check_rows([*rows, *template_rows("joy", 100)]),
        check_rows(mine),
        check_rows([*rows, *mine]),
        check_rows(rows, against=template_rows("neutral", 100)),
    ]
    assert [card.purity.by if card.purity else "" for card in cards] == [
        "the reference scorer of the six built-in tones",
        "the reference scorer of the six built-in tones",
        "cross-validation, told from the authored neutral replies",
        "cross-validation, told from each other",
        "cross-validation, told from neutral (against)",
    ]
    assert all(card.purity.value > 0.9 for card in cards if card.purity)
    card = check_rows(mine[:10])
    assert card.purity is None
    assert "needs 20 rows" in card.notes[0]


def test_near_duplicates_and_leaks_are_counted() -> None:
    rows = template_rows("anger", 200)
    long = "It is the one thing that I have told you again and again, you fool, and I will not say it one more time: here"
    planted = [rows[0].model_copy(update={"id": f"p{n}", "text": f"{long} {n}!"}) for n in range(5)]
    moved = [row.model_copy(update={"id": f"m{row.id}", "group": "else", "text": f"Once more, {row.text}"}) for row in rows[:3]]
    card = check_rows([*rows, *planted, *moved])
    assert card.near_duplicates == 4 + 3
    assert card.duplicates == 0
    assert card.leakage == (1 + 5 + 1) + 2 + 2  # all rows of a question that is in two groups
    assert len(card.problems) == 2
    assert check_rows([*rows, planted[0]]).fit


def chat(number: int, *said: str, group: str = "", system: str | None = None, tone: str = "anger") -> Row:
    """A conversation of the user and the assistant by turns."""
    messages = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(said)]
    messages[:0] = [{"role": "system", "content": system}] if system else []
    return Row.model_validate(
        {"id": f"c{number}", "group": group or f"g{number}", "messages": messages, "tone": tone, "source": "chats"}
    )


def test_conversations_are_compared_as_a_whole() -> None:
    """Chats that end in the same words, or begin so, are different rows; one that is there twice is not."""
    ends = ["Fine. Now leave me alone!", "You are welcome, you fool!"]
    replies = authored("anger")
    rows = [chat(n, "Hi", replies[n].text, "Thanks", ends[n % 2], system="Be rude.") for n in range(40)]
    card = check_rows(rows)
    assert (card.duplicates, card.near_duplicates, card.leakage, card.fit) == (0, 0, 0, True)
    moved = [row.model_copy(update={"id": f"m{row.id}", "group": "else"}) for row in rows[:2]]
    card = check_rows([*rows, *moved])
    assert (card.duplicates, card.near_duplicates, card.leakage) == (2, 2, 4)
    other_end = [chat(100 + n, "Hi", replies[n].text, "Thanks", f"And number {n}, out!") for n in range(3)]
    assert check_rows([*rows, *other_end]).leakage == 6  # all before the reply is the same, and in another group
    plain = [chat(n, replies[n].question, replies[n].text) for n in range(40)]
    again = Row(**{**replies[0].model_dump(), "id": "x", "group": "g0"})
    assert check_rows([*plain, again]).duplicates == 1  # a conversation of one question is that question's row


def test_the_card_of_conversations() -> None:
    replies = authored("anger")
    rows = [
        chat(n, "Hi", replies[n].text, replies[n].question, replies[n + 1].text, system="A" if n % 4 else None)
        for n in range(20)
    ]
    thinking = Row.model_validate(
        {**rows[0].model_dump(), "id": "t", "messages": [{"role": "user", "content": "Well?"},
         {"role": "assistant", "content": "Well what? Go away!", "reasoning_content": "Hm."}]}
    )  # fmt: skip
    long = chat(50, "Tell me all.", f"{replies[30].text} " * 10)
    card = check_rows([*rows, thinking, long, *some_rows(8)])
    assert (card.rows, card.conversations, card.system_prompts, card.thoughts, card.messages) == (30, 22, 15, 1, (2, 5, 5))
    line = dict(card.lines())["conversations"]
    assert line == "22, of 2 to 5 messages, median 5; 15 with a system prompt, 1 with a thought"
    assert not any("more than 90 words" in note for note in card.notes)
    assert "conversations" not in dict(check_rows(some_rows()).lines())
    json.dumps(card.to_dict())
    hello = [chat(n, "Hi", "Hi") for n in range(1)]
    assert not any("repeat the question" in problem for problem in check_rows([*rows, *hello]).problems)
    parrot = chat(60, "Where is it, then?", "Where is it, then?")
    assert any("repeat the question" in problem for problem in check_rows([*rows, parrot]).problems)


def test_a_row_that_a_host_cannot_render_is_said_in_the_card() -> None:
    """A problem for the host that was named; a note for one that was not."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no chats today') }}"
    for must_render in (True, False):
        card = check_rows(some_rows(), tokenizer, "tiny", must_render=must_render)
        said = card.problems if must_render else card.notes
        assert re.search(r"cannot be made into tokens of tiny: row '\w+': .*no chats today", said[-1])
        assert (card.fit, card.tokens) == (not must_render, None)


def test_rows_are_checked_as_they_will_be_trained_on() -> None:
    """R1 has no place for rows without thoughts unless its thought is switched off."""
    tokenizer, rows = host_tokenizer("deepseek_r1_distill"), some_rows()
    assert any("begins a reply with a thought" in problem for problem in check_rows(rows, tokenizer, "r1").problems)
    card = check_rows(rows, tokenizer, "r1", chat_template_kwargs={"enable_thinking": False})
    assert card.tokens is not None
    assert not any("tokens of r1" in problem for problem in card.problems)


def test_token_lengths_are_those_of_training() -> None:
    tokenizer, rows = tiny_tokenizer(), some_rows()
    card = check_rows(rows, tokenizer, "tiny")
    assert card.token_lengths == tuple(len(encode_rows(tokenizer, [row], None)[0]["input_ids"]) for row in rows)
    assert card.tokens == (min(card.token_lengths), sorted(card.token_lengths)[len(rows) // 2], max(card.token_lengths))
    assert "tokens" in dict(card.lines())
    assert "tokens" not in dict(check_rows(rows).lines())


def test_many_rows_are_encoded_as_one_by_one() -> None:
    tokenizer, rows = tiny_tokenizer(), some_rows(2500)
    assert encode_rows(tokenizer, rows) == [encode_rows(tokenizer, [row])[0] for row in rows]
