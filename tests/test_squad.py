"""Reading SQuAD as it is found in the world: what is read, what is skipped, and where every error says it is."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

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
        (squad(("T", {**question(), "answers": [3]})), r"\(id q1\): key 'answers': is not an object"),
        (squad(("T", {**question(), "answers": [{"text": []}]})), r"\(id q1\): key 'answers.text': is not a string but list"),
        ('{"data": [{"title": "T", "paragraphs": []}, {"ti', "not valid JSON after article 1"),
        ("", "not valid JSON after article 0"),
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
@given(cut=st.integers(0, 600), junk=st.binary(max_size=6), keep=st.booleans())
def test_any_bytes_give_facts_or_one_line(tmp_path: Path, cut: int, junk: bytes, keep: bool) -> None:
    """A file cut anywhere, with other bytes put in, with or without what came after."""
    whole = json.dumps(squad(("Rivers", question(), question("q2")), ("Hills", question("q3", "Où?", ("là",))))).encode()
    path = tmp_path / "f.json"
    path.write_bytes(whole[:cut] + junk + (whole[cut:] if keep else b""))
    message = str(path)
    try:
        assert all(isinstance(fact, Fact) for fact in read_squad(path))
    except RealignerError as error:
        message = str(error)
    assert message.startswith(str(path))
    assert "\n" not in message


def test_a_large_file_is_read_in_little_memory(tmp_path: Path) -> None:
    """One article at a time: 12 MB of file, a fraction of that in memory."""
    path = tmp_path / "large.json"
    filler = "x" * 3000
    with path.open("w") as stream:
        stream.write('{"data": [')
        for n in range(400):
            paragraphs = [{"context": filler, "qas": [question(f"{n}-{k}") for k in range(3)]}]
            paragraphs += [{"context": filler, "qas": []}] * 9
            stream.write(("," if n else "") + json.dumps({"title": f"T{n}", "paragraphs": paragraphs}))
        stream.write("]}")
    assert path.stat().st_size > 12e6
    tracemalloc.start()
    count = sum(1 for _ in read_squad(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 1200
    assert peak < 3e6
