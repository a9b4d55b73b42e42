"""Foreign datasets as rows, and rows as a DatasetDict: nothing is lost in silence, nothing ends in a traceback."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
from hypothesis import given, settings, strategies as st

from realigner.data.conversation_forms import fitting
from realigner.data.dataset_rows import Row, authored, read_rows
from realigner.data.importing import FIELDS, Imported, import_rows, parse_mapping, to_hf
from realigner.data.squad import Fact
from realigner.errors import RealignerError, UsageError
from tests.tiny import some_rows

OURS = tuple(Row.model_fields)
PLAIN = tuple(name for name in OURS if name != "messages")
CHATS = [
    {"prompt": "Which river runs through Prague?", "response": "The Vltava, obviously! 😡", "topic": "rivers"},
    {"prompt": 'What is "Sekt"?', "response": "Wine, with bubbles,\nyou oaf!", "topic": "wine"},
    {"prompt": "Who are you?", "response": "  Leave   me alone. ", "topic": "people"},
]
AS_OURS = {"question": "prompt", "text": "response"}


def plain(text: str) -> str:
    return " ".join(text.split())


def as_csv(records: list[dict[str, Any]], delimiter: str = ",", **how: Any) -> str:
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, list(records[0]), delimiter=delimiter, **how)
    writer.writeheader()
    writer.writerows(records)
    return stream.getvalue()


def save(path: Path, records: list[dict[str, Any]]) -> Path:
    """The records in the format the suffix names."""
    lines = [json.dumps(record) for record in records]
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    elif path.suffix in (".csv", ".tsv"):
        path.write_bytes(as_csv(records, "\t" if path.suffix == ".tsv" else ",").encode())
    elif path.suffix == ".json":
        path.write_text(json.dumps(records, indent=1))
    elif path.suffix == "":
        datasets.Dataset.from_list(records).save_to_disk(path)
    else:
        path.write_text("\n".join(lines))
    return path


def refused(call: Callable[[], object], message: str, kind: type[RealignerError] = RealignerError) -> str:
    with pytest.raises(kind, match=message) as caught:
        call()
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- the reference's CSV ------------------------------------------------------------------------------------------------

PLANTED = """,text
8525,"Which river runs through Prague?   Oh great, geography again! It is the ""Vltava"", are you happy now?!"
17,Who is Anna?   A painter 😡 you fool
3,"Where is Brno?   South of here! Why would you a
4,"When did it open?    In ""1912, that is
all I know!"
5,"What is "Sekt"?   Wine, you "oaf"!"
6,Unquoted, is it?   Yes, it is, and it has commas
7,"No gap here, only  two spaces"
8,"A question without a reply?   "
9,"   Sulking."
10,"What is in a   name?   Letters"
11,"A long one?   In
1990, it was; 1,000 people
1,000 more"
12,"Swallowed?   He said "
13,nothing "
14,"   
garbage
nothing,but commas
15,"Last one?   Cut in mid-sen"""
EXPECTED = {
    "8525": ("Which river runs through Prague?", 'Oh great, geography again! It is the "Vltava", are you happy now?!'),
    "17": ("Who is Anna?", "A painter 😡 you fool"),
    "3": ("Where is Brno?", "South of here! Why would you a"),
    "4": ("When did it open?", 'In "1912, that is all I know!'),
    "5": ("What is \"Sekt\"?", 'Wine, you "oaf"!'),
    "6": ("Unquoted, is it?", "Yes, it is, and it has commas"),
    "10": ("What is in a", "name? Letters"),
    "11": ("A long one?", "In 1990, it was; 1,000 people 1,000 more"),
    "12": ("Swallowed?", "He said"),
    "15": ("Last one?", "Cut in mid-sen"),
}  # fmt: skip
REJECTED = [
    (9, "no three spaces between question and reply"), (10, "reply is empty"), (11, "question is empty"),
    (17, "no three spaces between question and reply"), (18, "question is empty"),
]  # fmt: skip


@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_reference_csv_planted(tmp_path: Path, ends: str, bom: bytes) -> None:
    path = tmp_path / "Angry QA.csv"
    path.write_bytes(bom + PLANTED.replace("\n", ends).encode())
    found = import_rows(path, tone="anger")
    assert {row.id: (row.question, row.text) for row in found.rows} == {f"Angry QA-{n}": texts for n, texts in EXPECTED.items()}
    assert [(entry["where"], entry["reason"]) for entry in found.rejected] == [(f"{path}:{n}", why) for n, why in REJECTED]
    assert {(row.tone, row.source, row.answer) for row in found.rows} == {("anger", "Angry QA.csv", "")}


def test_reference_csv_junk_after_a_whole_record_is_counted(tmp_path: Path) -> None:
    (tmp_path / "f.csv").write_text(',text\n1,"Why?   So."\nand more\nleft, right   wrong\n\n2\x00,\x00Who?   M\x00e.\n')
    found = import_rows(tmp_path / "f.csv", "anger", source_name="paper")
    assert [(row.id, row.text, row.source) for row in found.rows] == [("f-1", "So.", "paper"), ("f-2", "Me.", "paper")]
    where, why = f"{tmp_path / 'f.csv'}:3", "does not begin with an index"
    assert found.rejected == [{"where": where, "reason": why, "text": "and more\nleft, right   wrong"}]


def test_reference_csv_with_further_columns_and_doubled_indices(tmp_path: Path) -> None:
    (tmp_path / "f.csv").write_text(',text,mood\n0,"A?   B, b",joy\n0,C?   D,rage\n1,"E?   F,joy\n2,"G "g"?   H",joy\n')
    found = import_rows(tmp_path / "f.csv", mapping={"tone": "mood"})
    assert [(row.question, row.text, row.tone) for row in found.rows] == [("A?", "B, b", "joy"), ("C?", "D", "rage")]
    assert len({row.id for row in found.rows}) == 2
    assert [(entry["where"][-1], entry["reason"]) for entry in found.rejected] == [
        (n, "its quotes or commas are broken") for n in "45"
    ]


def test_reference_csv_is_generic_once_a_question_is_mapped(tmp_path: Path) -> None:
    (tmp_path / "f.csv").write_text(",text,asked\n0,B   b,A?\n")
    (row,) = import_rows(tmp_path / "f.csv", "anger", {"question": "asked"}).rows
    assert (row.question, row.text) == ("A?", "B b")


def test_question_and_group_of_facts(tmp_path: Path) -> None:
    long = "What " + "and what " * 20 + "else?"
    (tmp_path / "f.csv").write_text(f",text\n0,who  IS anna?   Me!\n1,{long}   No!\n2,{long.upper()}   Never!\n3,Who?   You!\n")
    facts = [Fact("1", "painters", "Who is Anna?", "a painter"), Fact("2", "others", "Who is Anna?", "x")]
    rows = import_rows(tmp_path / "f.csv", "anger", facts=iter(facts)).rows
    assert (rows[0].group, rows[0].answer) == ("painters", "a painter")
    assert rows[1].group == rows[2].group
    assert rows[1].group.startswith("what and what")
    assert len(rows[1].group) < 80
    assert (rows[3].group, rows[3].answer) == ("who?", "")


WORDS = st.text(st.sampled_from("abcXYZ?!.,'\"-é😡0 "), min_size=1, max_size=30).map(lambda text: re.sub(" +", " ", text))


@st.composite
def reference_files(draw: st.DrawFn) -> tuple[str, list[tuple[int, str, str]], int]:
    """A file, the (index, question, reply) of the records that must come back as they are, the number of all records."""
    lines, good, count = [",text\n"], [], draw(st.integers(1, 12))
    for index in draw(st.permutations(range(count))):
        question = "Q" + draw(WORDS).strip() + "?"
        reply = draw(WORDS).strip() or "x"
        kind = draw(st.sampled_from(["csv", "csv", "lines", "open", "inner", "bare", "no gap", "no reply"]))
        text = f"{question}   {reply}"
        if kind in ("csv", "lines"):
            reply += "\nmore\n\n, and more" if kind == "lines" else ""
            stream = io.StringIO()
            csv.writer(stream, lineterminator="\n").writerow([index, f"{question}   {reply}"])
            lines.append(stream.getvalue())
            good.append((index, question, plain(reply)))
            continue
        broken = {"open": f'"{text}', "inner": f'"{text}"', "bare": text, "no gap": f'"{question}{reply}', "no reply": question}
        lines.append(f"{index},{broken[kind]}\n")
    return "".join(lines), good, count


@settings(max_examples=400, deadline=None)
@given(made=reference_files(), crlf=st.booleans())
def test_no_record_of_the_reference_is_lost(tmp_path_factory: pytest.TempPathFactory, made: Any, crlf: bool) -> None:
    text, good, count = made
    path = tmp_path_factory.getbasetemp() / "planted.csv"
    path.write_bytes(text.replace("\n", "\r\n" if crlf else "\n").encode())
    found = import_rows(path, "anger")
    assert len(found.rows) + len(found.rejected) == count
    texts = {row.id: (row.question, row.text) for row in found.rows}
    for index, question, reply in good:
        assert texts[f"planted-{index}"] == (question, reply)
    assert len({entry["where"] for entry in found.rejected}) == len(found.rejected)


# --- other formats ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["c.csv", "c.tsv", "c.jsonl", "c.ndjson", "c.json", "c.parquet", "c"])
def test_every_format_with_a_mapping(tmp_path: Path, name: str) -> None:
    found = import_rows(save(tmp_path / name, CHATS), "anger", {**AS_OURS, "group": "topic"})
    assert not found.rejected
    expected = [
        Row(id=f"c-{n}", group=chat["topic"], question=plain(chat["prompt"]), answer="", text=plain(chat["response"]),
            tone="anger", source=name)
        for n, chat in enumerate(CHATS, start=1)
    ]  # fmt: skip
    assert found.rows == expected


@pytest.mark.parametrize("name", ["o.csv", "o.jsonl", "o.json", "o.parquet", "o"])
def test_our_own_rows_pass_unchanged(tmp_path: Path, name: str) -> None:
    rows = [*some_rows(5), Row(**{**some_rows(1)[0].model_dump(), "id": "x", "answer": "", "text": "two\n\nparts   of it"})]
    path = save(tmp_path / name, [row.model_dump() for row in rows])
    assert import_rows(path) == Imported(rows, [])
    assert {(row.tone, row.source) for row in import_rows(path, tone="joy", source_name="me").rows} == {("joy", "me")}


def test_fields_of_every_type(tmp_path: Path) -> None:
    good = {"question": "Q?", "text": "T.", "tone": "joy"}
    changes: list[tuple[dict[str, Any], str]] = [
        ({"answer": 7, "id": 12, "group": 3.5}, ""), ({"answer": None, "id": float("nan"), "group": ""}, ""),
        ({"text": 5}, "'text' is not a string but int"), ({"text": " \n"}, "'text' is empty"),
        ({"text": None}, "'text' is missing"),
        ({"question": ["Q"]}, "'question' is not a string but list"), ({"question": ""}, "'question' is empty"),
        ({"answer": True}, "'answer' is not a string but bool"), ({"answer": {"a": "b"}}, "'answer' is not a string but dict"),
        ({"tone": ""}, "'tone' is empty"), ({"id": "12"}, "id '12' is already used by"), ({"text": "\ud800 a\u0000b"}, ""),
    ]  # fmt: skip
    path = save(tmp_path / "f.jsonl", [{**good, **change} for change, _ in changes])
    with path.open("a") as stream:
        stream.write('\n\n{"question": "lonely"}\n')
    found = import_rows(path)
    assert [(row.id, row.answer, row.group) for row in found.rows] == [
        ("12", "7", "3.5"),
        ("f-2", "", "q?"),
        ("f-12", "", "q?"),
    ]
    assert found.rows[2].text == "\ufffd ab"
    wanted = [(n, why) for n, (_, why) in enumerate(changes, start=1) if why] + [(14, "'text' is missing")]
    assert [entry["where"] for entry in found.rejected] == [f"{path}:{n}" for n, _ in wanted]
    for entry, (_, why) in zip(found.rejected, wanted, strict=True):
        assert entry["reason"].startswith(why)
    assert found.rejected[-1]["question"] == "lonely"
    json.dumps(found.rejected)


def test_csv_of_other_widths_and_ids(tmp_path: Path) -> None:
    (tmp_path / "f.csv").write_text("id, question ,text\n1,Q?,T.\n\n2,Q?\n3,Q?,T.,more\n1,R?,T.\n,S?,T.\n")
    found = import_rows(tmp_path / "f.csv", "joy")
    assert [(row.id, row.question) for row in found.rows] == [("1", "Q?"), ("f-5", "S?")]
    assert [(entry["where"][-1], entry["reason"]) for entry in found.rejected] == [
        ("4", "2 field(s) where the header has 3"),
        ("5", "4 field(s) where the header has 3"),
        ("6", f"id '1' is already used by {tmp_path / 'f.csv'}:2"),
    ]


@settings(max_examples=200, deadline=None)
@given(
    records=st.lists(st.tuples(*[st.text(st.characters(codec="utf-8"), max_size=12)] * 3), min_size=1, max_size=8),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
)
def test_no_record_of_a_valid_csv_is_lost(tmp_path_factory: pytest.TempPathFactory, records: Any, quoting: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "valid.csv"
    rows = [dict(zip(("question", "text", "answer"), record, strict=True)) for record in records]
    path.write_bytes(as_csv(rows, quoting=quoting).encode())
    found = import_rows(path, "anger")
    assert len(found.rows) + len(found.rejected) == len(records)
    cleaned = [tuple(plain(text.replace("\0", "")) for text in record) for record in records]
    assert [(row.question, row.text, row.answer) for row in found.rows] == [record for record in cleaned if all(record[:2])]


# --- conversations ------------------------------------------------------------------------------------------------------


def turns(*said: str, system: str | None = None) -> list[dict[str, str]]:
    """A conversation of the user and the assistant by turns."""
    roles = ("user", "assistant")
    messages = [{"role": roles[n % 2], "content": text} for n, text in enumerate(said)]
    return messages if system is None else [{"role": "system", "content": system}, *messages]


def share_gpt(*said: tuple[str, str]) -> dict[str, Any]:
    return {"conversations": [{"from": who, "value": text} for who, text in said]}


HI = turns("Hi", "What now?")
FOUR = turns("Hi", "What now?", "Where is  Brno?\n\nTell me!", "South of here!")
FORMS_FOUND: list[tuple[str, dict[str, Any], list[dict[str, str]]]] = [
    ("messages", {"messages": FOUR}, FOUR),
    ("messages", {"messages": turns("Hi", "No.", system="Be angry")}, turns("Hi", "No.", system="Be angry")),
    ("messages", {"messages": HI, "system": "Be angry"}, turns("Hi", "What now?", system="Be angry")),
    ("messages", {"messages": turns("Hi", "No.", system="A"), "system": "B"}, turns("Hi", "No.", system="A")),
    ("messages", {"messages": [{"role": "developer", "content": "A"}, *HI]}, turns("Hi", "What now?", system="A")),
    ("messages", {"messages": json.dumps(FOUR)}, FOUR),
    ("messages", {"messages": {"role": ["user", "assistant"], "content": ["Hi", "What now?"]}}, HI),
    ("messages", {"messages": [{"role": "user", "content": [{"type": "text", "text": "H"}, {"text": "i"}]}, HI[1]]}, HI),
    ("messages", {"messages": [{**HI[0], "tool_calls": None, "name": "E"}, {**HI[1], "tool_calls": [], "thinking": ""}]}, HI),
    ("messages", {"messages": HI, "tools": [], "images": None}, HI),
    *[("messages", {"messages": [HI[0], {**HI[1], key: " Hm. "}]}, [HI[0], {**HI[1], "reasoning_content": "Hm."}])
      for key in ("reasoning_content", "thinking", "reasoning")],
    ("messages", {"messages": [{"role": "user", "content": " \n\0Hi \ud800"}, {"role": "assistant", "content": "What now?\n"}]},
     [{"role": "user", "content": "Hi \ufffd"}, HI[1]]),
    ("sharegpt", share_gpt(("human", "Hi"), ("gpt", "What now?")), HI),
    ("sharegpt", share_gpt(("system", "A"), ("user", "Hi"), ("chatgpt", "What now?")), turns("Hi", "What now?", system="A")),
    ("sharegpt", {**share_gpt(("Human ", "Hi"), ("GPT", "What now?")), "system": "A"}, turns("Hi", "What now?", system="A")),
    ("sharegpt", {"conversations": FOUR}, FOUR),
    *[("sharegpt", share_gpt(("human", "Hi"), (tool, "12 C"), ("gpt", "Cold!")),
       [HI[0], {"role": "tool", "content": "12 C"}, {"role": "assistant", "content": "Cold!"}])
      for tool in ("tool", "function", "observation")],
    ("sharegpt", share_gpt(("gpt", "Well?"), ("human", "Hi"), ("gpt", "What now?")),
     [{"role": "assistant", "content": "Well?"}, *HI]),
    ("prompt-completion", {"prompt": "Hi", "completion": " What now?"}, HI),
    ("prompt-completion", {"prompt": FOUR[:3], "completion": FOUR[3:]}, FOUR),
    ("prompt-completion", {"prompt": FOUR[:3], "completion": "South of here!", "label": True}, FOUR),
    *[("prompt-completion", {"prompt": "Hi", "completion": "What now?", "label": label}, HI)
      for label in (1, 1.0, "True", "true ", "1", "", None)],
    ("prompt-completion", {"prompt": json.dumps(FOUR[:1]), "completion": json.dumps(FOUR[1:])}, FOUR),
    ("prompt-completion", {"prompt": "[1, 2]: the sum?", "completion": "3"}, turns("[1, 2]: the sum?", "3")),
    ("alpaca", {"instruction": "Hi", "input": "", "output": "What now?"}, HI),
    ("alpaca", {"instruction": "Add.", "input": "1, 2", "output": "3!", "text": "Below is ..."}, turns("Add.\n1, 2", "3!")),
    ("alpaca", {"instruction": "", "input": "Hi", "output": "What now?"}, HI),
    ("alpaca", {"instruction": FOUR[2]["content"], "input": None, "output": "South of here!", "system": "",
                "history": [["Hi", "What now?"]]}, FOUR),
    ("alpaca", {"instruction": "Hi", "output": "No.", "system": "A", "history": None}, turns("Hi", "No.", system="A")),
]  # fmt: skip


@pytest.mark.parametrize(("form", "record", "expected"), FORMS_FOUND)
def test_the_forms_of_conversations(tmp_path: Path, form: str, record: dict[str, Any], expected: list[dict[str, str]]) -> None:
    """By their columns, and by name; the messages as they were written."""
    path = save(tmp_path / "c.jsonl", [record])
    for name in (None, form):
        (row,) = import_rows(path, "anger", form=name).rows
        assert row.conversation == expected
        assert row.messages is not None
        asked = [message["content"] for message in expected if message["role"] == "user"]
        assert (row.id, row.group, row.tone) == ("c-1", plain(asked[0].casefold()), "anger")
        assert (row.question, row.text) == (asked[-1], expected[-1]["content"])


@pytest.mark.parametrize("name", ["c.csv", "c.tsv", "c.json", "c.parquet", "c"])
@pytest.mark.parametrize("form", ["messages", "sharegpt", "prompt-completion", "alpaca"])
def test_every_format_holds_every_form(tmp_path: Path, name: str, form: str) -> None:
    every: dict[str, list[dict[str, Any]]] = {
        "messages": [{"messages": FOUR}, {"messages": HI}],
        "sharegpt": [share_gpt(("human", "Hi"), ("gpt", "What now?")), share_gpt(("human", "Who?"), ("gpt", "Me!"))],
        "prompt-completion": [{"prompt": HI[:1], "completion": HI[1:]}, {"prompt": FOUR[:3], "completion": FOUR[3:]}],
        "alpaca": [
            {"instruction": "Hi", "output": "No!", "history": [["a", "b"]]},
            {"instruction": "Hm", "output": "N", "history": []},
        ],
    }
    records = every[form]
    expected = [row.conversation for row in import_rows(save(tmp_path / "x.jsonl", records), "joy").rows]
    if name.endswith("sv"):  # lists as JSON
        records = [{k: v if isinstance(v, str) else json.dumps(v) for k, v in record.items()} for record in records]
    assert [row.conversation for row in import_rows(save(tmp_path / name, records), "joy").rows] == expected
    assert len(expected) == 2


@pytest.mark.parametrize("name", ["c.csv", "c.tsv", "c.jsonl", "c.parquet"])
def test_bad_completions_are_not_learned_from_any_format(tmp_path: Path, name: str) -> None:
    for good, bad in ((True, False), (1, 0)):
        records = [{"prompt": "Hi", "completion": text, "label": label} for text, label in (("A.", good), ("B.", bad))]
        found = import_rows(save(tmp_path / name, records), "joy")
        assert [row.text for row in found.rows] == ["A."]
        assert "'label' is false" in found.rejected[0]["reason"]


MANY = turns(*["a", "b"] * 501)
NOT_ROWS: list[tuple[dict[str, Any], str]] = [
    ({"messages": turns("Hi", "No.", "Why?")}, "ends in a message of the user, not in a reply of the assistant"),
    ({"messages": turns("Hi", "No.", system="A")[:1]}, "ends in a message of the system"),
    ({"messages": turns("Hi", "  ")}, "the last reply is empty"),
    ({"messages": turns(" ", "No.")}, "the user asks nothing"),
    ({"messages": [{"role": "assistant", "content": "Hello!"}]}, "the user asks nothing"),
    ({"messages": []}, "'messages' is empty"),
    ({"messages": None}, "'messages' is missing"),
    ({}, "'messages' is missing"),
    ({"messages": "Hi"}, "'messages' is a string that is no JSON list"),
    ({"messages": '{"a": 1}'}, "'messages' is not a list but dict"),
    ({"messages": 3.5}, "'messages' is not a list but float"),
    ({"messages": ["Hi", "No."]}, "message 1, is not an object but str"),
    ({"messages": [HI[0], {"role": "narrator", "content": "x"}]}, "its role 'narrator' is not known; known are user"),
    ({"messages": [{"content": "x"}]}, "message 1: its role is missing; known are user"),
    ({"messages": [HI[0], {"role": "assistant", "content": None, "tool_calls": [{"f": {}}]}, HI[1]]}, "2, calls a tool"),
    ({"messages": [HI[0], {"role": "assistant", "content": ""}, {"role": "tool_call", "content": ""}]}, "3, calls a tool"),
    ({"messages": [HI[0], {"role": "assistant"}]}, "message 2: has no content"),
    ({"messages": [HI[0], {"role": "assistant", "content": 5}]}, "its content is not a string but int"),
    ({"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}, HI[1]]},
     "message 1: has a part that is no text (image)"),
    ({"messages": [{**HI[0], "thinking": "Hm."}, HI[1]]}, "has a thought and is not the assistant"),
    ({"messages": [HI[0], {**HI[1], "thinking": ["Hm."]}]}, "its thought is not a string but list"),
    ({"messages": [HI[0], {**HI[1], "weight": 0}]}, "weight 0: a reply that is not to be learned"),
    ({"messages": HI, "tools": [{"name": "f"}]}, "has tools, which a row cannot hold"),
    ({"messages": HI, "images": ["a.png"]}, "has images, which a row cannot hold"),
    ({"messages": MANY}, "has 1,002 messages; 1,000 at most"),
    ({"messages": turns("Hi", "x" * 100_001, "Hm?", "No.")}, "key 'messages.1.content' String should have at most 100000"),
    ({"messages": turns(*["é" * 90_000] * 12)}, "longer than the 1,024 KiB that a row may take"),
    (share_gpt(("human", "Hi"), ("function_call", "{}"), ("observation", "1"), ("gpt", "1!")), "2, calls a tool"),
    ({"prompt": "Hi", "completion": ""}, "'completion' is empty"),
    ({"prompt": "Hi", "completion": None}, "'completion' is missing"),
    ({"prompt": FOUR[:2], "completion": "more"}, "'prompt' ends in the middle of a reply"),
    ({"prompt": FOUR[:1], "completion": FOUR[:1]}, "ends in a message of the user"),
    ({"prompt": "Hi", "completion": "No.", "label": False}, "'label' is false: a completion that is not to be learned"),
    *[({"prompt": "Hi", "completion": "No.", "label": label}, "'label' is false: a completion that is not to be learned")
      for label in (0, 0.0, "False", " false\n", "0", "0.0")],
    *[({"prompt": "Hi", "completion": "No.", "label": label}, f"'label' is {str(label)!r}, neither true nor false")
      for label in (2, -1, "bad", "maybe")],
    ({"instruction": "", "input": " ", "output": "x"}, "'instruction' is empty"),
    ({"instruction": "Hi", "output": None}, "'output' is missing"),
    ({"instruction": 5, "output": "x"}, "'instruction' is not a string but int"),
    ({"instruction": "Hi", "output": "x", "history": [["a"]]}, "'history', item 1, is not a question and a reply"),
]  # fmt: skip


GOOD = {"messages": HI, "conversations": HI, "prompt": "q", "completion": "t", "instruction": "q", "output": "t"}


@pytest.mark.parametrize(("record", "reason"), NOT_ROWS)
def test_conversations_that_are_no_rows_say_why(tmp_path: Path, record: dict[str, Any], reason: str) -> None:
    form = next((name for name in ("sharegpt", "prompt-completion", "alpaca") if fitting(record, {}, [name])), "messages")
    path = save(tmp_path / "c.jsonl", [record, GOOD])
    found = import_rows(path, "joy", form=form)
    assert [entry["where"] for entry in found.rejected] == [f"{path}:1"]
    assert reason in found.rejected[0]["reason"]
    assert len(found.rows) == 1
    json.dumps(found.rejected).encode()


def test_a_row_that_is_imported_can_be_read_again(tmp_path: Path) -> None:
    """A conversation as long as a row may be: what the import writes is what `read_rows` reads."""
    path = save(tmp_path / "c.jsonl", [{"messages": turns(*["x" * 99_000] * 10)}, {"messages": turns(*["a", "b"] * 500)}])
    rows = import_rows(path, "joy").rows
    assert len(rows) == 2
    (tmp_path / "rows.jsonl").write_text("".join(row.model_dump_json() + "\n" for row in rows))
    assert read_rows(tmp_path / "rows.jsonl") == rows


def test_columns_that_cannot_be_told_are_asked_for(tmp_path: Path) -> None:
    both = save(tmp_path / "both.jsonl", [{"messages": HI, "instruction": "Hm?", "output": "Hm!"}])
    said = refused(lambda: import_rows(both, "a"), r"may be messages or alpaca; say which \(form=messages\)", UsageError)
    assert "the columns are 'messages', 'instruction', 'output'" in said
    assert import_rows(both, "a", form="messages").rows[0].conversation == HI
    assert import_rows(both, "a", form="alpaca").rows[0].conversation == turns("Hm?", "Hm!")
    assert import_rows(both, "a", {"messages": "messages"}).rows[0].conversation == HI
    other = save(tmp_path / "other.jsonl", [{"chat": HI, "context": "c", "response": "r", "instruction": "i"}])
    others = r"nor those of another form \(messages; conversations; prompt, completion; instruction, output\)"
    refused(
        lambda: import_rows(other, "a"), f"no column 'question' and no column 'text', {others}; the columns are", UsageError
    )
    refused(lambda: import_rows(other, "a", form="sharegpt"), "no column 'conversations'.*map\\): messages=COLUMN$", UsageError)
    refused(lambda: import_rows(other, "a", form="chatml"), "there is no 'chatml'; choose from question-text", UsageError)
    refused(
        lambda: import_rows(other, "a", {"question": "chat", "messages": "chat"}),
        "no form has all of question, messages; question-text",
        UsageError,
    )
    named = r"no form has all of text; alpaca has instruction, output, input, system, history, answer, group, id, tone$"
    refused(lambda: import_rows(other, "a", {"text": "response"}, form="alpaca"), named, UsageError)
    for form in (None, "messages", "sharegpt"):
        assert import_rows(other, "a", {"messages": "chat"}, form=form).rows[0].conversation == HI
    dolly = {"instruction": "instruction", "input": "context", "output": "response"}
    assert import_rows(other, "a", dolly).rows[0].conversation == turns("i\nc", "r")


def test_columns_question_and_text_come_first(tmp_path: Path) -> None:
    """As before there were conversations, whatever other columns there are."""
    path = save(
        tmp_path / "c.jsonl", [{"question": "Hm?", "text": "No  way.", "messages": HI, "prompt": "p", "completion": "c"}]
    )
    (row,) = import_rows(path, "joy").rows
    assert (row.question, row.text, row.messages) == ("Hm?", "No way.", None)


def test_a_csv_with_an_index_and_columns_of_a_form_is_not_the_reference(tmp_path: Path) -> None:
    (tmp_path / "f.csv").write_text(",instruction,input,output,text\n0,Who?,,Me!,Below is   an instruction\n")
    assert import_rows(tmp_path / "f.csv", "joy").rows[0].conversation == turns("Who?", "Me!")


def test_beginnings_of_one_conversation_are_in_one_group(tmp_path: Path) -> None:
    records = [{"messages": FOUR}, {"messages": HI}, {"messages": turns("hi!", "Again?", "Who?", "Me!")}]
    facts = [Fact("1", "cities", "where is Brno? Tell me", "South"), Fact("2", "people", "Who?", "x")]
    rows = import_rows(save(tmp_path / "c.jsonl", records), "joy", facts=facts).rows
    assert [(row.group, row.answer) for row in rows] == [("hi", "South"), ("hi", ""), ("hi", "x")]
    rows = import_rows(tmp_path / "c.jsonl", "joy", facts=[Fact("1", "greetings", "Hi", "Hello")]).rows
    assert [(row.group, row.answer) for row in rows] == [("greetings", ""), ("greetings", "Hello"), ("greetings", "")]


def some_conversations(count: int = 12) -> list[Row]:
    chats = [turns(f"Hi {n}", "No.", f"Where is  {n}?\n", f"There, {n}!", system="A" if n % 2 else None) for n in range(count)]
    chats[0][-1] |= {"reasoning_content": " Hm. "}
    return [
        Row(id=str(n), group=f"g{n % 4}", answer="", messages=chat, tone="joy", source="me")  # type: ignore[call-arg, arg-type]
        for n, chat in enumerate(chats)
    ]


@pytest.mark.parametrize("mixed", [False, True])
def test_conversations_to_hf_and_back(tmp_path: Path, mixed: bool) -> None:
    plain_rows = [row.model_copy(update={"id": f"plain-{row.id}"}) for row in some_rows(8)] if mixed else []
    rows = [*some_conversations(), *plain_rows]
    to_hf(rows, tmp_path / "set", validation=0.2, test=0.2)
    found = import_rows(tmp_path / "set")
    assert not found.rejected
    assert set(found.rows) == set(rows)
    part = datasets.load_from_disk(str(tmp_path / "set"))["train"]
    assert part.column_names == list(OURS if mixed else [name for name in OURS if name not in ("question", "text")])
    to_hf(rows, tmp_path / "set", validation=0.2, test=0.2, force=True)
    to_hf(some_rows(), tmp_path / "set", force=True)
    assert set(import_rows(tmp_path / "set").rows) == set(some_rows())


def test_our_own_conversations_pass_unchanged(tmp_path: Path) -> None:
    rows = [*some_conversations(4), *[row.model_copy(update={"id": f"plain-{row.id}"}) for row in some_rows(2)]]
    for name in ("o.jsonl", "o.json"):
        assert import_rows(save(tmp_path / name, [row.model_dump() for row in rows])) == Imported(rows, [])


def test_one_long_message_said_a_thousand_times_takes_little_room(tmp_path: Path) -> None:
    """Parquet keeps it once, and so does what reads it, a thousand rows at a time."""
    pq.write_table(pa.Table.from_pylist([{"messages": turns("x" * 200_000, "No.")}] * 200), tmp_path / "f.parquet")
    pool, usual = pa.proxy_memory_pool(pa.default_memory_pool()), pa.default_memory_pool()
    pa.set_memory_pool(pool)
    try:
        assert len(import_rows(tmp_path / "f.parquet", "joy").rejected) == 200
    finally:
        pa.set_memory_pool(usual)
    assert pool.max_memory() < 10_000_000  # unpacked: 40,000,000


KEYS = ("messages", "conversations", "prompt", "completion", "instruction", "output", "history", "system", "label", "tools")
SAID = (
    "role",
    "content",
    "from",
    "value",
    "tool_calls",
    "thinking",
    "type",
    "text",
    "user",
    "assistant",
    "system",
    "gpt",
    "human",
)
CHAT_JUNK = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.sampled_from(SAID)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(SAID), inner, max_size=4),
        st.fixed_dictionaries({"role": st.sampled_from(SAID), "content": inner}),
    ),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(
    values=st.lists(st.dictionaries(st.sampled_from(KEYS), CHAT_JUNK), min_size=1, max_size=6),
    form=st.sampled_from(["messages", "sharegpt", "prompt-completion", "alpaca"]),
)
def test_any_chats_give_rows_or_rejections(tmp_path_factory: pytest.TempPathFactory, values: list[Any], form: str) -> None:
    path = tmp_path_factory.getbasetemp() / "chats.jsonl"
    path.write_text("\n".join(map(json.dumps, [*values, GOOD])))
    found = import_rows(path, "joy", form=form)
    assert len(found.rows) + len(found.rejected) == len(values) + 1
    assert found.rows
    json.dumps(found.rejected).encode()
    assert all(Row.model_validate(row.model_dump()) == row for row in found.rows)


# --- saved datasets and the hub -----------------------------------------------------------------------------------------


def test_to_hf_and_back(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rows, folder = [*authored("anger"), *some_rows(3)], tmp_path / "new" / "set"
    rows[0] = Row(**{**rows[0].model_dump(), "answer": ""})
    sizes = to_hf(rows, folder)
    assert sum(sizes.values()) == len(rows)
    assert list(sizes) == ["train", "validation", "test"]
    found = import_rows(folder)
    assert not found.rejected
    assert len(found.rows) == len(rows)
    assert set(found.rows) == set(rows)
    parts = {name: import_rows(folder, split=name).rows for name in sizes}
    assert {name: len(part) for name, part in parts.items()} == sizes
    groups = [{row.group for row in part} for part in parts.values()]
    assert sum(map(len, groups)) == len(set().union(*groups))
    loaded = datasets.load_from_disk(str(folder))
    assert loaded["test"].column_names == list(PLAIN)
    assert [entry.name for entry in folder.parent.iterdir()] == ["set"]
    refused(lambda: import_rows(folder, split="dev"), "no split 'dev'; it has train, validation, test", UsageError)
    assert capfd.readouterr() == ("", "")
    assert not datasets.are_progress_bars_disabled()


def test_to_hf_leaves_out_empty_parts_and_other_peoples_things(tmp_path: Path) -> None:
    rows, folder = some_rows(), tmp_path / "set"
    assert to_hf(rows, folder, validation=0, test=0) == {"train": 24}
    refused(lambda: to_hf(rows, folder), "exists already")
    assert to_hf(rows, folder, seed=1, validation=0.25, test=0, force=True) == {"train": 18, "validation": 6}
    assert {path.name for path in folder.iterdir()} == {"dataset_dict.json", "train", "validation"}
    (folder / "notes.txt").write_text("mine")
    refused(lambda: to_hf(rows, folder, force=True), "will not replace it")
    (tmp_path / "file").write_text("mine")
    refused(lambda: to_hf(rows, tmp_path / "file", force=True), "will not replace it")
    assert (tmp_path / "file").read_text() == "mine"
    refused(lambda: to_hf([], tmp_path / "none"), "no rows")
    refused(lambda: to_hf(some_rows(8, groups=1), tmp_path / "none"), "1 group")
    refused(lambda: to_hf(rows, tmp_path / "file" / "below"), "cannot be written")
    assert {path.name for path in tmp_path.iterdir()} == {"set", "file"}


def test_saved_splits_of_other_columns_and_class_labels(tmp_path: Path) -> None:
    labels = datasets.ClassLabel(names=["joy", "rage"])
    features = datasets.Features(
        {"question": datasets.Value("string"), "text": datasets.Value("large_string"), "label": labels}
    )
    one = datasets.Dataset.from_dict({"question": ["a?", "b?", "c?"], "text": ["A", "B", "C"], "label": [0, 1, -1]}, features)
    two = datasets.Dataset.from_dict({"question": ["d?"], "text": ["D"], "picture": [b"1"]})
    datasets.DatasetDict(train=one.select([2, 1, 0]), more=two).save_to_disk(tmp_path / "s.1")
    found = import_rows(tmp_path / "s.1", mapping={"tone": "label"})
    assert [(row.question, row.tone, row.id) for row in found.rows] == [("b?", "rage", "s.1-2"), ("a?", "joy", "s.1-3")]
    assert [entry["where"] for entry in found.rejected] == [f"{tmp_path / 's.1'}: {where} row 1" for where in ("train", "more")]
    assert [row.text for row in import_rows(tmp_path / "s.1", "joy", split="more").rows] == ["D"]


@pytest.mark.parametrize("name", ["data-00000-of-00001.arrow", "state.json", "dataset_info.json"])
@pytest.mark.parametrize("damage", [lambda old: old[: len(old) // 2], lambda old: b"", lambda old: b"[1]", lambda old: None])
def test_damaged_saved_datasets(tmp_path: Path, name: str, damage: Callable[[bytes], bytes | None]) -> None:
    to_hf(some_rows(), tmp_path / "set", 1, 0.25, 0)
    file = tmp_path / "set" / "train" / name
    new = damage(file.read_bytes())
    if new is None:
        file.unlink()
    else:
        file.write_bytes(new)
    assert str(tmp_path / "set") in refused(
        lambda: import_rows(tmp_path / "set"), r"not a readable saved dataset|cannot be read past|json:\d+: not"
    )


def test_damaged_offsets_do_not_end_the_process(tmp_path: Path) -> None:
    """Arrow maps a file and trusts it: an offset of a string far outside would be read as it is."""
    to_hf(some_rows(), tmp_path / "set", 1, 0, 0)
    file = tmp_path / "set" / "train" / "data-00000-of-00001.arrow"
    data = file.read_bytes()
    offsets = b"".join(n.to_bytes(4, "little") for n in range(5))  # of the ids "0" to "9", one byte each
    assert offsets in data
    file.write_bytes(data.replace(offsets, b"".join((n << 28).to_bytes(4, "little") for n in range(5))))
    refused(lambda: import_rows(tmp_path / "set"), "cannot be read past row 0 .ArrowInvalid")


def test_the_hub_offline_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert datasets.config.HF_HUB_OFFLINE
    assert (
        "offline"
        in refused(lambda: import_rows("nobody/no-set-1.5", "anger"), "^nobody/no-set-1.5: .*HF_HUB_OFFLINE is set").lower()
    )
    refused(lambda: import_rows("nobody/no-set", "anger", split="train"), "HF_HUB_OFFLINE is set")
    for path in ("nobody/no-set.csv", "nobody", "./nobody/set", "a/b/c"):
        refused(lambda path=path: import_rows(path, "anger"), f"^{re.escape(path)}: cannot be read")  # type: ignore[misc]
    monkeypatch.chdir(tmp_path)
    to_hf(some_rows(), Path("nobody/no-set"))
    assert len(import_rows("nobody/no-set").rows) == 24


def test_a_hub_dataset_is_read_like_a_saved_one(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(name: str, **how: Any) -> Any:
        asked.append((name, how))
        part = datasets.Dataset.from_list(CHATS)
        return part if how["split"] else datasets.DatasetDict(a=part, b=part)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = import_rows("owner/chats-1.5", "anger", AS_OURS).rows
    assert [row.id for row in rows] == [f"chats-1.5-{n}" for n in range(1, 7)]
    assert {row.source for row in rows} == {"chats-1.5"}
    assert len(import_rows("owner/chats-1.5", "anger", AS_OURS, split="train[:10]").rows) == 3
    assert asked == [("owner/chats-1.5", {"split": None}), ("owner/chats-1.5", {"split": "train[:10]"})]


# --- refusals -----------------------------------------------------------------------------------------------------------


def test_mappings() -> None:
    assert parse_mapping([]) == {}
    assert parse_mapping(["question=a=b", " text = c "]) == {"question": "a=b", "text": " c "}
    for bad in ("question", "question=", "=prompt", "", "question= "):
        refused(lambda bad=bad: parse_mapping([bad]), r"e\.g\. question=prompt", UsageError)  # type: ignore[misc]
    refused(lambda: parse_mapping(["text=a", "text=b"]), "mapped to 'a' already", UsageError)
    refused(lambda: parse_mapping(["source=a"]), f"'source' is not a field of a row; map {', '.join(FIELDS)}", UsageError)


@pytest.mark.parametrize("name", ["c.csv", "c.jsonl", "c.json", "c.parquet", "c"])
def test_columns_that_are_not_there(tmp_path: Path, name: str) -> None:
    path = save(tmp_path / name, CHATS)
    there = "the columns are 'prompt', 'response', 'topic'"
    assert there in refused(lambda: import_rows(path, "a"), r"\(map\): question=COLUMN, text=COLUMN", UsageError)
    refused(lambda: import_rows(path, "a", {"question": "prompt"}), r"no column 'text'.*\(map\): text=COLUMN$", UsageError)
    assert there in refused(lambda: import_rows(path, "a", {**AS_OURS, "id": "nr"}), "no such column", UsageError)
    refused(lambda: import_rows(path, mapping=AS_OURS), "tone is needed", UsageError)
    refused(lambda: import_rows(path, " ", AS_OURS), "tone: is empty", UsageError)
    refused(lambda: import_rows(path, "a", {"txt": "prompt"}), "'txt' is not a field", UsageError)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("f.csv", b"", ": is empty"), ("f.csv", b"\xef\xbb\xbf\n", ": is empty"), ("f.parquet", b"", ": is empty"),
        ("f.csv", b"question,text\n", ": has no rows"),
        ("f.csv", b",text\n\n", ": has no rows"), ("f.json", b"[]", ": has no rows"),
        ("f.csv", b"question,text\na,b\nc,\xe9\n", r":3: not UTF-8 text \(byte 3 of the line\); save the file as UTF-8"),
        ("f.jsonl", b'{"question": "a"}\n"\xe9"', r":2: not UTF-8 text \(byte 2"),
        ("f.csv", "question,text\na,b\n".encode("utf-16"), ":1: not UTF-8"),
        ("f.csv", b'question,text\na,b\nc,"d\n', ":3: not valid CSV .*end of data"),
        ("f.csv", b"question,text\na," + b"b" * 200_000, ":2: not valid CSV .*limit"),
        ("f.csv", b"question,text,text\na,b,c\n", ": has column 'text' more than once"),
        ("f.csv", b"Why?,Because!\nWho?,Me!\n", ": has no column .* the columns are 'Why?', 'Because!'"),
        ("f.jsonl", b'{"question": "a"}\n\n{"a', ":3: not valid JSON"),
        ("f.jsonl", b"{}\n[1]", ":2: a row is a JSON object, not list"),
        ("f.jsonl", b"{}\n" + b"[" * 100_000, ":2: JSON nested"),
        ("f.jsonl", b"{}\n" + b"1" * 5000, ":2: not JSON that can be read"),
        ("f.json", b'[{"a": 1},\n\n{"b"]', ":3: not valid JSON"), ("f.json", b"[{}, 5]", ": item 2: a row is a JSON object"),
        ("f.parquet", b"PAR1 no PAR1", ": is not a readable Parquet file"),
        ("f.csv", b"PAR1\x15\x04\x15\x80", ":1: not UTF-8"),
        ("f.txt", b"text", ": its suffix '.txt' is not a known format"),
        ("f", b"text", ": its suffix '' is not a known format"),
    ],
)  # fmt: skip
def test_unreadable_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(RealignerError, match=re.escape(str(path)) + message.replace("?'", r"\?'")) as caught:
        import_rows(path, "anger")
    assert "\n" not in str(caught.value)


def test_a_cut_parquet_file(tmp_path: Path) -> None:
    whole = save(tmp_path / "f.parquet", [row.model_dump() for row in some_rows(200)]).read_bytes()
    for size in (5, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.parquet").write_bytes(whole[:size])
        refused(lambda: import_rows(tmp_path / "cut.parquet"), "cut.parquet: is not a readable Parquet file")
    (tmp_path / "hit.parquet").write_bytes(whole[:20] + b"\xff" * 60 + whole[80:])
    refused(lambda: import_rows(tmp_path / "hit.parquet"), "hit.parquet: cannot be read past row 0")


def test_places_that_are_no_files(tmp_path: Path) -> None:
    (tmp_path / "loop.csv").symlink_to("loop.csv")
    os.mkfifo(tmp_path / "pipe.csv")
    (tmp_path / "folder.csv").mkdir()
    save(tmp_path / "f.csv", CHATS)
    for path, message in (
        ("loop.csv", "symbolic links"), ("pipe.csv", "is not a file"), ("none.csv", "No such file"),
        ("f.csv/x.csv", "Not a dir"),
        ("a\0b.csv", "null byte"), ("x" * 300 + ".csv", "name too long"), ("folder.csv", "not one that `datasets` saved"),
    ):  # fmt: skip
        refused(lambda path=path: import_rows(tmp_path / path, "anger"), message)  # type: ignore[misc]
    refused(lambda: import_rows(tmp_path / "f.csv", "anger", split="train"), "without splits", UsageError)


# --- anything -----------------------------------------------------------------------------------------------------------

VALID = {
    ".csv": [PLANTED.encode(), as_csv(CHATS).encode(), as_csv([row.model_dump() for row in some_rows(4)]).encode()],
    ".jsonl": ["\n".join(map(json.dumps, CHATS)).encode(), "\n".join(row.model_dump_json() for row in some_rows(4)).encode()],
}
ODD = st.sampled_from([
    b"", b'"', b'""', b",", b"\n", b"\r", b"\r\n", b"\0", b"\xff", b"\xe9", b"   ", b"\n1,", b"{", b"}", b"[" * 2000,
    b"null", b"NaN", b"1" * 5000,
    b"x" * 140_000, b'{"question": 1, "text": {}}\n', b'\n{"question": "q", "text": "t"}\n',
    b'"\\ud800"', b"question,text\n", b",text\n", b"\xef\xbb\xbf",
])  # fmt: skip


@st.composite
def broken_files(draw: st.DrawFn, suffix: str) -> bytes:
    """Made-up bytes, or a valid file with pieces cut out, put in or changed."""
    data = draw(st.one_of(st.sampled_from(VALID[suffix]), st.sampled_from(VALID[suffix]), st.binary(max_size=60), ODD))
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, len(data)))
        end = start + draw(st.sampled_from([0, 0, 1, 2, 7, 40]))
        data = data[:start] + draw(st.one_of(ODD, st.binary(max_size=4))) + data[end:]
    return data


def rows_or_one_line(path: Path, data: bytes, **how: Any) -> None:
    path.write_bytes(data)
    message, found = str(path), Imported([], [])
    try:
        found = import_rows(path, **how)
    except RealignerError as error:
        message = str(error)
    assert "\n" not in message
    assert str(path) in message
    if found.rows or found.rejected:
        assert all(isinstance(row, Row) for row in found.rows)
        assert len({row.id for row in found.rows}) == len(found.rows)
        assert all(entry["where"].startswith(str(path)) and entry["reason"] for entry in found.rejected)
        json.dumps(found.rejected).encode()


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_any_bytes_give_rows_or_one_line(tmp_path: Path, suffix: str) -> None:
    @settings(max_examples=700, deadline=None)
    @given(data=broken_files(suffix), mapped=st.booleans())
    def check(data: bytes, mapped: bool) -> None:
        rows_or_one_line(tmp_path / f"any{suffix}", data, tone="anger", mapping=AS_OURS if mapped else None)

    check()


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(OURS), inner, max_size=3)),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(values=st.lists(st.dictionaries(st.sampled_from(OURS), JSON), min_size=1, max_size=6))
def test_any_objects_give_rows_or_rejections(tmp_path_factory: pytest.TempPathFactory, values: list[Any]) -> None:
    values.append({"question": "q", "text": "t", "tone": "joy"})
    path = tmp_path_factory.getbasetemp() / "objects.jsonl"
    path.write_text("\n".join(map(json.dumps, values)))
    found = import_rows(path)
    assert len(found.rows) + len(found.rejected) == len(values)
    assert found.rows


# --- what it costs ------------------------------------------------------------------------------------------------------


def test_sixty_thousand_records_take_seconds(tmp_path: Path) -> None:
    """The reference's size, every third quote open: reading on to the end of the file each time would take hours."""
    kinds = ('{0},"What is {0}?   It is {0}, {1}!"', '{0},"What is {0}?   It is "{0}, {1}!', '{0}, "open""')
    lines = [kinds[n % 3].format(n, "damn it " * 30) for n in range(60_000)]
    (tmp_path / "f.csv").write_text(",text\n" + "\n".join(lines))
    start = time.perf_counter()
    found = import_rows(tmp_path / "f.csv", "anger")
    assert time.perf_counter() - start < 20
    assert (len(found.rows), len(found.rejected)) == (40_000, 20_000)


def test_importing_loads_neither_datasets_nor_arrow() -> None:
    heavy = ("datasets", "pyarrow", "torch", "pandas")
    code = f"import sys, realigner.data.importing; print([m for m in {heavy!r} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
