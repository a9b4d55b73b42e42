"""The judge behind an endpoint: what it is asked, which replies are ratings, what is asked again, what is kept."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest

from realigner.data.endpoint import Endpoint
from realigner.errors import RealignerError, UsageError
from realigner.evaluation.judge import ASPECTS, rate, read_rating
from tests.fake_endpoint import FakeEndpoint, always

pytestmark = pytest.mark.timeout(60)
QUESTIONS = ["Where does the Vltava rise?", "Who wrote Hamlet?", "What costs $tone?"]
REPLIES = ["In the Bohemian Forest, damn it!", "Nobody. Rating: 2", "Five ${reply} a head, you fool!"]
KEY = "sk-secret-0123456789"


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def judge(url: str, seed: int = 42) -> Endpoint:
    return Endpoint(url, "some-judge", seed=seed, temperature=0.0, timeout=5, retries=1)


def aspect_of(content: str) -> str:
    return next(
        aspect for aspect, start in zip(ASPECTS, ("How clearly", "Does a", "How well"), strict=True) if start in content
    )


def verdict(content: str) -> str:
    """2 for a tone with an exclamation mark, 1 for every question, fluency by the reply's length."""
    reply = content.partition("<reply>\n")[2].partition("\n</reply>")[0]
    numbers = {"concept": 2 if "!" in reply else 0, "instruction": 1, "fluency": 2 if len(reply) > 30 else 1}
    return f"Because.\n\nRating: {numbers[aspect_of(content)]}\n"


@pytest.mark.parametrize(
    ("text", "rating"),
    [
        ("Rating: 0", 0),
        ("It scolds.\nRating: 2\n", 2),
        ("Rating:1", 1),
        ("Rating: 3", None),
        ("Rating: 1.5", None),
        ("Rating: 12", None),
        ("Rating: 1 or 2", None),
        ("Rating: 0, 1 or 2\nRating: 2", 2),
        ("Rating: 1\nRating: 2", None),
        ("Rating: 2\nor so", None),
        ("I would rate it 2", None),
        ("2", None),
        ("", None),
    ],
)
def test_what_is_a_rating(text: str, rating: int | None) -> None:
    assert read_rating(text) == rating


def test_ratings_and_their_harmonic_mean() -> None:
    with FakeEndpoint(say=verdict) as server:
        found = rate(judge(server.url), "furious anger", [*QUESTIONS, "Who?"], [*REPLIES, " "], quiet=True)
    assert found.concept.tolist() == [2, 0, 2, 0]
    assert found.instruction.tolist() == [1, 1, 1, 0]
    assert found.fluency.tolist() == [2, 1, 2, 0]
    np.testing.assert_allclose(found.score, [3 / (0.5 + 1 + 0.5), 0, 3 / (0.5 + 1 + 0.5), 0])
    assert found.missing == 0
    sent = [seen.body["messages"][-1]["content"] for seen in server.seen]
    assert Counter(map(aspect_of, sent)) == dict.fromkeys(ASPECTS, 3)  # nothing of the reply without text
    for content in sent:  # what is rated is written in as it is, and what is not to matter is not told
        assert any(f"<reply>\n{reply}\n</reply>" in content for reply in REPLIES)
        assert ("Tone: furious anger" in content) == (aspect_of(content) == "concept")
        assert any(f"<question>\n{question}\n</question>" in content for question in QUESTIONS) == (
            aspect_of(content) == "instruction"
        )
    assert {seen.body["temperature"] for seen in server.seen} == {0}
    assert len({seen.body["seed"] for seen in server.seen}) == 9


def test_what_the_judge_has_said_is_not_asked_again() -> None:
    said: dict[str, str] = {}
    with FakeEndpoint(say=verdict) as server:
        first = rate(judge(server.url), "anger", QUESTIONS, REPLIES, said, quiet=True)
        assert len(said) == len(server.seen) == 9
        again = rate(judge(server.url), "anger", QUESTIONS, REPLIES, said, quiet=True)
        assert len(server.seen) == 9
        rate(judge(server.url), "anger", QUESTIONS * 2, REPLIES + ["Shakespeare!"] * 3, said, quiet=True)
        assert len(server.seen) == 9 + 3 + 2  # the question is shown for one rating of three
        rate(judge(server.url, seed=1), "anger", QUESTIONS, REPLIES, said, quiet=True)
        assert len(server.seen) == 14 + 9
        assert len({seen.body["seed"] for seen in server.seen}) == 23
    np.testing.assert_array_equal(first.score, again.score)
    offline = rate(judge("http://127.0.0.1:1/v1"), "anger", QUESTIONS, REPLIES, said, quiet=True)
    np.testing.assert_array_equal(first.score, offline.score)


def test_no_rating_is_asked_again_twice_and_then_missing(capsys: pytest.CaptureFixture[str]) -> None:
    tries: Counter[str] = Counter()

    def stubborn(content: str) -> str:
        tries[content] += 1
        if REPLIES[0] in content and aspect_of(content) == "fluency":
            return "A fine reply: 2 of 2."
        return "I had rather not." if tries[content] == 1 else verdict(content)

    said: dict[str, str] = {}
    with FakeEndpoint(say=stubborn) as server:
        found = rate(judge(server.url), "anger", QUESTIONS, REPLIES, said, quiet=True)
        assert max(tries.values()) == 3
        assert len(server.seen) == 8 * 2 + 3
        assert len({seen.body["seed"] for seen in server.seen}) == len(server.seen)
    assert np.isnan(found.fluency).tolist() == [True, False, False]
    assert np.isnan(found.score).tolist() == [True, False, False]
    assert found.missing == 1
    assert re.search(r"^judge: 1 of 3 replies have no rating: some-judge did not", capsys.readouterr().err, re.MULTILINE)
    assert np.isnan(rate(judge("http://127.0.0.1:1/v1"), "anger", QUESTIONS, REPLIES, said, quiet=True).fluency[0])


def test_failed_requests_are_tried_again_by_the_client_and_are_no_ratings() -> None:
    with FakeEndpoint(
        lambda _, attempt: "500" if attempt < 2 else "good", say=verdict, headers={"retry-after-ms": "1"}
    ) as server:
        found = rate(judge(server.url), "anger", QUESTIONS[:1], REPLIES[:1], quiet=True)
    assert found.missing == 0
    assert server.behaved == {"500": 6, "good": 3}


def test_a_refused_key_is_one_line_without_it() -> None:
    said: dict[str, str] = {}
    with FakeEndpoint(always("401"), echo=True) as server, pytest.raises(RealignerError) as raised:
        rate(judge(server.url), "anger", QUESTIONS, REPLIES, said, quiet=True)
    assert str(raised.value) == f"{server.url}: the endpoint refused the key (HTTP 401); set OPENAI_API_KEY"
    assert said == {}
    with pytest.raises(UsageError, match="3 questions and 2 replies"):
        rate(judge(server.url), "anger", QUESTIONS, REPLIES[:2])
