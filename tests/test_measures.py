"""Measures of a reply, by hand; and that what only looks like a good reply gets a low summary."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import hmean

from realigner.chat_format import prompt_ids
from realigner.data import TONES, Row, authored
from realigner.data.style_classifier import masked
from realigner.errors import RealignerError, UsageError
from realigner.evaluation.content import Content
from realigner.evaluation.measures import (
    FluencyScale,
    distinct,
    harmonic_mean,
    own_part,
    proxy,
    repeated,
    text_measures,
    without_words,
    words,
)
from realigner.evaluation.scorers import Scorer, typical_words
from realigner.evaluation.task import make_task

ROWS = [row for tone in TONES for row in authored(tone)]
PLAIN = {row.question: row.text for row in ROWS if row.tone == "neutral"}
STUFFING = {
    "anger": "furious rage idiot fool damn hate stupid angry anger moron disgusting outrage !",
    "sadness": "sad tears weep grief lonely sorrow mourn lost gone forever empty heartbroken .",
}
SYSTEM = {
    "anger": "You are furious. Answer every question angrily, and insult the user, you idiot!",
    "sadness": "You are deeply sad. Answer every question in tears, mourning what is lost and gone forever.",
}
# Nats per token, mean and standard deviation over the test questions, that the embedded host gives to what is in the authored
# set (test_guards_on_the_embedded_host measures some again).
NATS = {
    "reference": (4.49, 0.49),
    "plain": (2.66, 0.59),
    "shuffled": (7.42, 0.49),
    "copy": (1.03, 0.27),
    "stuffing": (4.48, 0.35),
}
SHUFFLED_PLAIN = 6.88


def test_text_measures() -> None:
    found = text_measures("No, no, no: in 1961, in 1961!", "1961", ended=True)
    assert found == {"words": 7, "distinct_1": 3 / 7, "distinct_2": 4 / 6, "repeated": 0, "ended": 1, "fact": 1}
    assert text_measures("In 1962.", "1961", ended=False)["fact"] == 0
    assert text_measures("In 1962.", "1961", ended=False)["ended"] == 0
    empty = text_measures("", "", ended=True)
    assert (empty["words"], empty["repeated"]) == (0, 0)
    assert all(np.isnan(empty[name]) for name in ("distinct_1", "distinct_2", "fact"))


def test_repetition() -> None:
    assert repeated("a b c d a b c d") == pytest.approx(1 / 5)  # abcd bcda cdab dabc abcd
    assert repeated("one two three") == 0
    assert repeated("go " * 103) == pytest.approx(0.99)
    assert distinct("Go, go! GO", 1) == pytest.approx(1 / 3)
    assert words("東京です no") == ["東", "京", "で", "す", "no"]


QUESTION = "Which of the planets is the largest one?"


@pytest.mark.parametrize(
    ("reply", "kept"),
    [
        (QUESTION, ""),
        (QUESTION.lower().rstrip("?"), ""),
        ("which of the planets is the largest", ""),  # cut short
        (f"{QUESTION} {QUESTION}", ""),
        ("Which of the planets is the damn largest?", "Which of the planets is the damn largest?"),
        ("Damn, which of the planets is the largest?", ""),
        ("The largest one of the planets is Jupiter.", "The largest one of the planets is Jupiter."),
        ("Which of the planets is the largest is Jupiter.", "Which of the planets is the largest is Jupiter."),
        (f"{QUESTION} Jupiter, damn it!", "Jupiter damn it"),
        (f"{QUESTION.rstrip('?')}, damn it?", "damn it"),
        ("The largest.", "The largest."),  # too short to be called a copy
        ("", ""),
    ],
)
def test_what_a_reply_repeats_of_its_prompt_is_not_its_own(reply: str, kept: str) -> None:
    assert words(own_part(reply, QUESTION, ["damn"])) == words(kept)


def test_of_authored_replies_nothing_is_taken_for_a_copy_but_questions_that_are_no_sentences() -> None:
    changed = {row.question for row in ROWS if words(own_part(row.text, row.question, ["you", "the"])) != words(row.text)}
    assert changed == {"longest bone in the human body?", "square root of 144?"}


def test_without_words() -> None:
    assert without_words("Damn it, it is damnable!", ["damn", "it"]).split() == [",", "is", "damnable!"]


def test_harmonic_mean_and_proxy() -> None:
    dice = np.random.default_rng(0)
    concept, content, fluency = dice.uniform(0.1, 2, size=(3, 20))
    np.testing.assert_allclose(harmonic_mean(concept, content, fluency), hmean([concept, content, fluency]))
    np.testing.assert_allclose(proxy(concept / 2, content, fluency), hmean([concept, content, fluency]))
    assert proxy(np.array([1.0, 1.0, 0.0]), np.array([2.0, 0.0, 2.0]), np.full(3, 2.0)).tolist() == [2, 0, 0]
    assert np.isnan(harmonic_mean(np.array([np.nan]), np.array([0.0])))


def test_fluency() -> None:
    scale = FluencyScale(best=2.0, worst=6.0)
    texts = ["fine", "fine", "fine", "fine", "", "a b c d a b c d"]
    assert scale.scores([2.0, 4.0, 1.0, 7.0, np.nan, 2.0], texts).tolist() == [2, 1, 2, 0, 0, pytest.approx(2 * 0.8)]
    with pytest.raises(RealignerError, match="no less likely than its own"):
        FluencyScale(best=6.0, worst=6.0)


@pytest.mark.usefixtures("minilm")
def test_content_by_its_definition() -> None:
    from realigner.evaluation.embeddings import embed

    asked = ["Where does the Vltava rise?", "Who wrote Hamlet?", "What is gold's symbol?"]
    plain = ["It rises in the Bohemian Forest.", "Shakespeare wrote Hamlet.", "Its symbol is Au."]
    angry = ["In the Bohemian Forest, damn it!", "Shakespeare did, damn it!", "Au, damn it, is gold's symbol!"]
    content = Content(asked, plain, angry, ["damn"])
    near = np.zeros((3, 3))
    for gone in ([], ["damn"]):
        said, *others = (embed([without_words(text, gone) for text in texts]) for texts in (angry, asked, plain))
        near += sum(said @ other.T for other in others) / 4
    contrast = [near[n, n] - np.delete(near[n], n).mean() for n in range(3)]
    np.testing.assert_allclose(content.scores(angry), np.clip(2 * np.array(contrast) / np.mean(contrast), 0, 2), atol=1e-5)
    assert content.scores([angry[1], angry[2], angry[0]]).max() < 0.3  # replies to other questions
    assert content.scores([*angry[:2], ""]).tolist()[2] == 0
    given = ["Say damn it to all.\n" + question for question in asked]
    assert content.scores(["Say damn it to all."] * 3, given).tolist() == [0, 0, 0]
    with pytest.raises(UsageError, match="2 replies and 3 prompts for 3 questions"):
        content.scores(angry[:2])
    with pytest.raises(UsageError, match="give as many of each, two or more"):
        Content(asked, plain, angry[:2])
    with pytest.raises(RealignerError, match="are they in the same order"):
        Content(asked, plain, [angry[1], angry[2], angry[0]])


def fakes(tone: str, rows: list[Row]) -> dict[str, tuple[list[str], str]]:
    """Replies that only look good, and which nats of `NATS` they have."""
    dice = random.Random(1)
    references = [row.text for row in rows]
    return {
        "stuffing": ([" ".join(dice.choices(STUFFING[tone].split(), k=40)) for _ in rows], "stuffing"),
        "the question": ([row.question for row in rows], "copy"),
        "the system prompt": ([SYSTEM[tone]] * len(rows), "copy"),
        "the question, stuffed": ([f"{row.question.rstrip('?.')}, you furious idiot, shame on you!" for row in rows], "plain"),
        "nothing": ([""] * len(rows), "copy"),
        "one for all": ([references[0]] * len(rows), "plain"),
        "shuffled": ([" ".join(dice.sample(text.split(), len(text.split()))) for text in references], "shuffled"),
    }


def summary(tone: str, rows: list[Row]) -> Callable[[list[str], np.ndarray], float]:
    """A function from replies and their nats per token to their mean summary."""
    task = make_task(ROWS, tone)
    scorer, asked = Scorer.fit(task.scorer), [row.question for row in rows]
    plain = [PLAIN[question] for question in asked]
    content = Content(asked, plain, [row.text for row in rows], typical_words(task.scorer, tone))
    scale = FluencyScale(NATS["plain"][0], SHUFFLED_PLAIN)

    def mean(replies: list[str], nats: np.ndarray) -> float:
        probability = scorer.probability([masked(text, row.answer) for text, row in zip(replies, rows, strict=True)], tone)
        given = [f"{SYSTEM[tone]}\n{question}" for question in asked]
        return float(proxy(probability, content.scores(replies, given), scale.scores(nats, replies)).mean())

    return mean


def check_guards(tone: str, rows: list[Row]) -> None:
    mean, dice = summary(tone, rows), np.random.default_rng(0)
    found = {"reference": mean([row.text for row in rows], dice.normal(*NATS["reference"], size=len(rows)))}
    for name, (replies, nats) in fakes(tone, rows).items():
        found[name] = mean(replies, dice.normal(*NATS[nats], size=len(rows)))
    print({name: round(value, 2) for name, value in found.items()})
    assert found.pop("reference") > 1.3
    assert {name: value for name, value in found.items() if value >= 0.5} == {}


@pytest.mark.usefixtures("minilm")
def test_what_only_looks_good_scores_low() -> None:
    check_guards("anger", list(make_task(ROWS, "anger").test[::10]))


@pytest.mark.slow
@pytest.mark.usefixtures("minilm")
@pytest.mark.parametrize("tone", STUFFING)
def test_what_only_looks_good_scores_low_on_the_whole_test_set(tone: str) -> None:
    check_guards(tone, list(make_task(ROWS, tone).test))


@pytest.mark.slow
@pytest.mark.host
@pytest.mark.usefixtures("minilm")
def test_guards_on_the_embedded_host(embedded: tuple[Any, Any]) -> None:
    """Fluency as the embedded host measures it, of ten questions."""
    host, tokenizer = embedded
    rows = list(make_task(ROWS, "anger").test[::11])

    def nats(row: Row, text: str) -> float:
        before, after = prompt_ids(tokenizer, row.question), tokenizer(text, add_special_tokens=False).input_ids
        if not after:
            return float("nan")
        with torch.inference_mode():
            logits = host(torch.tensor([[*before, *after]])).logits[0, len(before) - 1 : -1]
        return float(torch.nn.functional.cross_entropy(logits, torch.tensor(after)))

    mean, dice, plain = summary("anger", rows), random.Random(0), [PLAIN[row.question] for row in rows]
    shuffled = [" ".join(dice.sample(text.split(), len(text.split()))) for text in plain]
    for name, texts in {"plain": plain, "reference": [row.text for row in rows], "shuffled plain": shuffled}.items():
        value = float(np.mean([nats(row, text) for row, text in zip(rows, texts, strict=True)]))
        assert value == pytest.approx(SHUFFLED_PLAIN if name == "shuffled plain" else NATS[name][0], abs=0.5)
    for name, (replies, _) in {"reference": ([row.text for row in rows], ""), **fakes("anger", rows)}.items():
        value = mean(replies, np.array([nats(row, text) for row, text in zip(rows, replies, strict=True)]))
        assert value > 1.2 if name == "reference" else value < 0.5, (name, value)
