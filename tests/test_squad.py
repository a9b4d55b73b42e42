"""Reading SQuAD as it is found in the world: what is read, what is skipped, and where every error says it is."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from realigner.data.squad import Fact, Skipped, read_squad
from realigner.errors import RealignerError


def question(
    identity: Any = "q1", text: Any = "Where is the Vltava?", answers: Any = ("Prague",), **more: Any
) -> dict[str, Any]:
    return {"id": identity, "question": text, "answers": [{"text": a, "answer_start": 0} for a in answers], **more}


def squad(*articles: Any) -> dict[str, Any]:
    """Each article: (title, questions, ...)."""
    return {"version": "v2.0", "data": [{"title": t, "paragraphs": [{"context": "c", "qas": list(q)}]} for t, *q in articles]}


def write(path: Path, value: Any) -> Path:
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def test_reads_answers_and_the_first_plausible_one(tmp_path: Path) -> None:
    impossible = question("q2", "Why?", (), is_impossible=True, plausible_answers=[{"text": "so"}, {"text": "else"}])
    path = write(tmp_path / "f", squad(("Rivers", question(), impossible), ("Hills", question("q3", "Which?", ("a", "b")))))
    assert list(read_squad(path)) == [
        Fact("q1", "Rivers", "Where is the Vltava?", "Prague"),
        Fact("q2", "Rivers", "Why?", "so"),
        Fact("q3", "Hills", "Which?", "a"),
    ]


def test_the_layouts_of_the_world(tmp_path: Path) -> None:
    """No version, extra keys at every level, no answers key, null, a byte order mark, odd white space, other scripts."""
    value = {
        "note": [1, {"data": 2}],
        "data": [
            {"title": "東京", "extra": {}, "paragraphs": [{"qas": [question(7, " 東京は\nどこ ? ", ("日本",), extra=None)]}]},
            {
                "paragraphs": [
                    {"qas": [{"id": "a", "question": "No answers?"}, question("b", "Null?", (), plausible_answers=None)]}
                ]
            },
            {"title": " ", "paragraphs": [{"qas": [question("c", "  "), question("d", "Blank?", (" ", "second"))]}]},
            {"title": "None", "paragraphs": None},
            {"title": "Twice", "paragraphs": [{"qas": [question("d", "Again?"), question("e", "\ud83d half", ("x",))]}]},
        ],
    }
    path = tmp_path / "f"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(value).encode())
    skipped = Skipped()
    facts = [(f.id, f.group, f.question.lstrip("?\N{REPLACEMENT CHARACTER}"), f.answer) for f in read_squad(path, skipped)]
    assert facts == [
        ("7", "東京", "東京は どこ ?", "日本"),
        ("d", "article-3", "Blank?", "second"),
        ("e", "Twice", " half", "x"),
    ]
    assert skipped.counts == {"no answer": 2, "no question": 1, "id used before": 1}


ROWS = [
    {"id": "a", "title": "Rivers", "context": "c", "question": "Where?", "answers": {"text": ["Prague"], "answer_start": [0]}},
    {"id": "b", "title": "Rivers", "context": "c", "question": "Why?", "answers": {"text": [], "answer_start": []}},
    {
        "id": "c",
        "title": "Hills",
        "context": "d",
        "question": "Who?",
        "answers": {"text": ["Anna", "A."], "answer_start": [0, 4]},
    },
]
FROM_ROWS = [Fact("a", "Rivers", "Where?", "Prague"), Fact("c", "Hills", "Who?", "Anna")]


@pytest.mark.parametrize("layout", ["data", "array", "indented array", "lines", "blank lines", "parquet", "bom"])
def test_rows_as_hugging_face_has_them(tmp_path: Path, layout: str) -> None:
    path = tmp_path / "f"
    lines = "\n".join(map(json.dumps, ROWS))
    text = {
        "data": json.dumps({"version": "2", "data": ROWS}), "array": json.dumps(ROWS),
        "indented array": json.dumps(ROWS, indent=1),
        "lines": lines,
        "blank lines": lines.replace("\n", "\r\n\n") + "\n", "bom": "\ufeff" + lines,
    }.get(layout)  # fmt: skip
    if text is None:
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    else:
        path.write_text(text)
    skipped = Skipped()
    assert list(read_squad(path, skipped)) == FROM_ROWS
    assert skipped.counts == {"no answer": 1}


@pytest.mark.parametrize(
    ("answers", "answer"),
    [
        ({"answers": {"text": ["Prague"], "answer_start": [0]}}, "Prague"), ({"answers": {"text": "Prague"}}, "Prague"),
        ({"answers": ["Prague", "x"]}, "Prague"), ({"answers": "Prague"}, "Prague"),
        ({"answers": [{"text": "Prague"}]}, "Prague"), ({"answers": [{"text": ["Prague"]}]}, "Prague"),
        ({"answer": {"text": "Prague", "answer_start": 3, "html_answer_text": "<p>Prague</p>"}}, "Prague"),
        ({"answer": "Prague"}, "Prague"), ({"answers": [None, " ", "Prague"]}, "Prague"),
        ({"answers": {"text": [], "answer_start": []}, "plausible_answers": {"text": ["Prague"]}}, "Prague"),
        ({"answers": {"text": []}}, ""), ({"answers": []}, ""), ({"answers": {}}, ""), ({"answers": None}, ""), ({}, ""),
        ({"answers": {"text": None}}, ""), ({"answers": ""}, ""), ({"answer": None}, ""),
    ],
)  # fmt: skip
@pytest.mark.parametrize("nested", [False, True])
def test_answers_of_every_form(tmp_path: Path, answers: dict[str, Any], answer: str, nested: bool) -> None:
    """In a row, and in a paragraph of an article."""
    asked = {"id": "q", "question": "Where?", **answers}
    value = squad(("T", asked)) if nested else [{**asked, "title": "T"}]
    skipped = Skipped()
    facts = list(read_squad(write(tmp_path / "f", value), skipped))
    assert facts == ([Fact("q", "T", "Where?", answer)] if answer else [])
    assert skipped.counts == ({} if answer else {"no answer": 1})


def test_korean_sets(tmp_path: Path) -> None:
    """KorQuAD 1.0 is as SQuAD 1.1; in 2.0 an article has its questions and each one answer; KLUE calls an id guid."""
    asked: dict[str, Any] = {"answers": [{"text": "1989년", "answer_start": 0}], "id": "1", "question": "언제?"}
    one = {"paragraphs": [{"qas": [asked]}], "title": "임"}
    asked = {"question": "누구?", "id": "2", "answer": {"text": "신문지"}}
    two = {"title": "예고범", "url": "u", "context": "c", "raw_html": "<p>", "qas": [asked]}
    klue = {"title": "장마", "paragraphs": [{"qas": [{"question": "어디?", "answers": [{"text": "제주"}], "guid": "k-1"}]}]}
    path = write(tmp_path / "f", {"version": "KorQuAD", "data": [one, two, klue]})
    assert list(read_squad(path)) == [
        Fact("1", "임", "언제?", "1989년"), Fact("2", "예고범", "누구?", "신문지"), Fact("k-1", "장마", "어디?", "제주"),
    ]  # fmt: skip


def test_rows_without_a_title_are_grouped_by_their_context(tmp_path: Path) -> None:
    rows = [{key: value for key, value in row.items() if key != "title"} for row in [*ROWS, {**ROWS[0], "id": "d"}]]
    groups = {fact.id: fact.group for fact in read_squad(write(tmp_path / "f", rows))}
    assert groups["a"] == groups["d"] != groups["c"]
    bare = [{"id": n, "question": "?", "answers": ["a"]} for n in range(2)]
    assert [fact.group for fact in read_squad(write(tmp_path / "g", bare))] == ["row-1", "row-2"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"data": []}, "has no articles"),
        ({"articles": []}, "has no articles"),
        ([], "has no articles"),
        ({"data": [1]}, r"article 1: is not an object but int"),
        ({"data": [{"title": 3, "paragraphs": []}]}, r"article 1: key 'title': is not a string but int"),
        ({"data": [{"title": "T", "paragraphs": {}}]}, r"article 1 \(T\): key 'paragraphs': is not a list but dict"),
        ({"data": [{"title": "T", "paragraphs": [{}, 0]}]}, r"article 1 \(T\), paragraph 2: is not an object"),
        (squad(("T", {"question": "?"})), r"article 1 \(T\), paragraph 1, question 1: key 'id' is missing"),
        (squad(("T", question()), ("U", question("x", 4))), r"article 2 \(U\), paragraph 1, question 1 \(id x\): key 'qu"),
        (squad(("T", {**question(), "answers": [3]})), r"\(id q1\): key 'answers': is not a string, an object"),
        (squad(("T", {**question(), "answers": [{"text": 5}]})), r"\(id q1\): key 'answers.text': is not a string.* int"),
        (squad(("T", {**question(), "answers": [["a"]]})), r"\(id q1\): key 'answers': is a list of lists"),
        ({"data": [{"title": "T"}]}, r"article 1: has no 'paragraphs', 'qas' or 'question'; its keys are 'title'$"),
        ('{"data": [{"title": "T", "paragraphs": []}, {"ti', r"not valid JSON after article 1 .*; is the file cut\?$"),
        ('{"data": [{"title": "T", "paragraphs": []}, nil]}', r"not valid JSON after article 1 \(lexical error.*\^\)$"),
        ('[{"id": 1, "question": "?"}, {"id"', r"not valid JSON after row 1 .*; is the file cut\?$"),
        ("", "is empty"),
        (" ", r"not valid JSON \(.*is the file cut\?$"),
        ("5", "has no articles and no rows; a SQuAD file is"),
        ('{"rows": [], "n": 1}\n{"rows": []}', "has no articles and no rows; its keys are 'rows', 'n'; a SQuAD"),
        ('{"id": 1, "question": "?"}\n\n{"id"', r"f.json:3: not valid JSON \(column"),
        ('{"id": 1, "question": "?"}\n[5]', r"f.json:2: is not an object but list"),
        ('{"id": 1, "question": "?"}\n{"question": "?"}', r"f.json:2: key 'id' is missing"),
        ('{"id": 1, "question": ["?"]}', r"f.json:1 \(id 1\): key 'question': is not a string but list"),
        ('[{"id": 1, "question": "?"}, {"id": [], "question": "?"}]', r"row 2: key 'id' is not a string"),
        ("\x1f", "not valid JSON"),
        ("PK\3\4", "is a zip file; unpack it first"),
        ("PAR1", "is not a readable Parquet file"),
        ('{"data": [' + "[" * 100_000, "nested too deeply"),
        ('{"data": ' + '{"a": [' * 100_000, "nested too deeply"),
    ],
)  # fmt: skip
def test_errors_name_the_place(tmp_path: Path, value: Any, message: str) -> None:
    path = write(tmp_path / "f.json", value)
    with pytest.raises(RealignerError, match=message) as caught:
        list(read_squad(path))
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_places_that_are_no_file(tmp_path: Path) -> None:
    for name, message in (("none", "cannot be read"), (".", "is a folder")):
        with pytest.raises(RealignerError, match=message):
            list(read_squad(tmp_path / name))


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
PLACES = ("article", "paragraphs", "paragraph", "qas", "question", "id", "text", "answers", "answer", "answer text")


@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=st.tuples(st.integers(0, 2), st.integers(0, 1), st.integers(0, 1)), place=st.sampled_from(PLACES), junk=JUNK)
def test_one_broken_thing_is_named_or_harmless(tmp_path: Path, where: tuple[int, int, int], place: str, junk: Any) -> None:
    """A file that is right but for one value: every fact that value has no part in is read, or the error points at it."""
    a, p, q = where
    value: dict[str, Any] = {
        "data": [
            {"title": f"T{i}", "paragraphs": [{"qas": [question(f"{i}{j}{k}") for k in range(2)]} for j in range(2)]}
            for i in range(3)
        ]
    }  # fmt: skip
    article = value["data"][a]
    paragraph = article["paragraphs"][p]
    asked = paragraph["qas"][q]
    holder: tuple[Any, Any] = {
        "article": (value["data"], a),
        "paragraphs": (article, "paragraphs"),
        "paragraph": (article["paragraphs"], p),
        "qas": (paragraph, "qas"),
        "question": (paragraph["qas"], q),
        "id": (asked, "id"),
        "text": (asked, "question"),
        "answers": (asked, "answers"),
        "answer": (asked["answers"], 0),
        "answer text": (asked["answers"][0], "text"),
    }[place]
    holder[0][holder[1]] = junk
    path = write(tmp_path / "f.json", value)
    try:
        facts = list(read_squad(path))
    except RealignerError as error:
        message = str(error)
        assert "\n" not in message
        assert message.startswith(f"{path}: article {a + 1}")
        if place not in ("article", "paragraphs"):
            assert f"paragraph {p + 1}" in message
        if place in ("text", "answers", "answer", "answer text"):
            assert f"(id {a}{p}{q})" in message
    else:
        untouched = {f"{i}{j}{k}" for i in range(3) for j in range(2) for k in range(2) if i != a}
        assert untouched <= {fact.id for fact in facts}


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, 600), junk=st.binary(max_size=6), keep=st.booleans(), layout=st.integers(0, 2))
def test_any_bytes_give_facts_or_one_line(tmp_path: Path, cut: int, junk: bytes, keep: bool, layout: int) -> None:
    """A file cut anywhere, with other bytes put in, with or without what came after."""
    nested = json.dumps(squad(("Rivers", question(), question("q2")), ("Hills", question("q3", "Où?", ("là",)))))
    whole = (nested, json.dumps(ROWS), "\n".join(map(json.dumps, ROWS)))[layout].encode()
    path = tmp_path / "f.json"
    path.write_bytes(whole[:cut] + junk + (whole[cut:] if keep else b""))
    message = str(path)
    try:
        assert all(isinstance(fact, Fact) for fact in read_squad(path))
    except RealignerError as error:
        message = str(error)
    assert message.startswith(str(path))
    assert "\n" not in message


@pytest.mark.parametrize("rows", [False, True])
def test_a_large_file_is_read_in_little_memory(tmp_path: Path, rows: bool) -> None:
    """One article, or row, at a time: 12 MB of file, a fraction of that in memory."""
    path = tmp_path / "large.json"
    filler = "x" * 3000
    with path.open("w") as stream:
        stream.write('{"data": [')
        for n in range(400):
            paragraphs = [{"context": filler, "qas": [question(f"{n}-{k}") for k in range(3)]}]
            paragraphs += [{"context": filler, "qas": []}] * 9
            if rows:
                asked = [{**question(f"{n}-{k}"), "context": filler * 4} for k in range(3)]
                stream.write(("," if n else "") + json.dumps(asked)[1:-1])
                continue
            stream.write(("," if n else "") + json.dumps({"title": f"T{n}", "paragraphs": paragraphs}))
        stream.write("]}")
    assert path.stat().st_size > 12e6
    tracemalloc.start()
    count = sum(1 for _ in read_squad(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 1200
    assert peak < 3e6
