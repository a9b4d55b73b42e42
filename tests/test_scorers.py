"""Scorers of a tone: right on topics they have not seen, the same for the same seed, and hardly moved by another."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from sklearn.ensemble import BaggingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from realigner.data import TONES, Row, authored
from realigner.data.style_classifier import masked
from realigner.errors import RealignerError, UsageError
from realigner.evaluation.scorers import FEATURES, Scorer, agreement, typical_words
from realigner.evaluation.task import make_task

ROWS = [row for tone in TONES for row in authored(tone)]
TASK = make_task(ROWS, "anger")
UNSEEN = [row for row in ROWS if row.group in {row.group for row in TASK.test}]
actual = np.array([row.tone for row in UNSEEN])
TEXTS = [masked(row.text, row.answer) for row in UNSEEN]


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    return Scorer.fit(TASK.scorer, seed=1)


def test_words_on_unseen_topics(scorer: Scorer) -> None:
    assert scorer.tones == ("anger", "neutral", "sadness")
    named = np.array(scorer.named(TEXTS))
    assert (named == actual).mean() > 0.93
    each = np.stack([scorer.probability(TEXTS, tone) for tone in scorer.tones])
    np.testing.assert_allclose(each.sum(axis=0), 1)
    assert [scorer.tones[n] for n in each.argmax(axis=0)] == named.tolist()
    assert each[scorer.tones.index("anger"), actual == "anger"].mean() > 0.7


@pytest.mark.usefixtures("minilm")
def test_embeddings_on_unseen_topics() -> None:
    few = [row for tone in ("anger", "neutral") for row in [row for row in TASK.scorer if row.tone == tone][::5]]
    by_embeddings = Scorer.fit(few, features="embeddings")
    unseen = [n for n, name in enumerate(actual) if name != "sadness"][::10]
    assert (np.array(by_embeddings.named([TEXTS[n] for n in unseen])) == actual[unseen]).mean() > 0.85


def test_the_seed_decides(scorer: Scorer) -> None:
    scorers = (scorer, Scorer.fit(TASK.scorer, seed=1), Scorer.fit(TASK.scorer, seed=2))
    one, same, other = (each.probability(TEXTS[:50], "anger") for each in scorers)
    np.testing.assert_array_equal(one, same)
    assert 0 < np.abs(one - other).max() < 0.2


@pytest.mark.slow
@pytest.mark.usefixtures("minilm")
@pytest.mark.parametrize("features", FEATURES)
def test_four_seeds_agree(features: str) -> None:
    """The share of 100 replies that is named, of mixtures with 0, 25, ... 100% of the tone, moves by .03 at most."""
    scorers = [Scorer.fit(TASK.scorer, seed, features) for seed in range(4)]
    named = np.array([scorer.named(TEXTS) for scorer in scorers])
    assert (named == actual).mean(axis=1).min() > 0.89
    spreads = []
    for tone, share, draw in itertools.product(TONES, (0, 25, 50, 75, 100), range(4)):
        dice = np.random.default_rng(draw)
        own, others = np.flatnonzero(actual == tone), np.flatnonzero(actual != tone)
        mixed = np.concatenate([dice.choice(own, share, replace=False), dice.choice(others, 100 - share, replace=False)])
        spreads.append(np.ptp((named[:, mixed] == tone).mean(axis=1)))
    print(f"{features}: spread of the share named by four seeds: mean {np.mean(spreads):.3f}, most {max(spreads):.3f}")
    assert max(spreads) < 0.0301


@pytest.mark.parametrize("doubled", [False, True])
def test_regressions_in_the_span_of_the_rows_are_those_on_all_features(doubled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where rows are the same, and the span has fewer dimensions than there are rows."""
    monkeypatch.setattr("realigner.evaluation.scorers._MEMBERS", 8)
    rows = list(TASK.scorer)[::4] * (1 + doubled)
    each = LogisticRegression(C=100.0, max_iter=3000)
    members = BaggingClassifier(each, n_estimators=8, max_samples=0.8, bootstrap=False, random_state=5)
    plain = make_pipeline(FEATURES["words"](), members)
    plain.fit([masked(row.text, row.answer) for row in rows], [row.tone for row in rows])
    want = plain.predict_proba(TEXTS[::5])[:, list(plain.classes_).index("anger")]
    np.testing.assert_allclose(Scorer.fit(rows, seed=5).probability(TEXTS[::5], "anger"), want, atol=1e-6)


def test_a_text_without_a_word_is_in_no_tone(scorer: Scorer) -> None:
    assert scorer.probability(["", " !?", "Damn you!"], "anger").tolist()[:2] == [0, 0]
    assert scorer.named(["", " !?", "Damn you!"]) == ["", "", "anger"]
    assert scorer.named([]) == []
    assert scorer.probability([], "anger").shape == (0,)


def test_facts_are_not_learnt() -> None:
    """Every angry row is about one fact and every calm row about another; still neither says anything of the tone."""
    said = {"anger": ("Xyzk", "damn it, it is Xyzk"), "neutral": ("Qvwj", "there it is, indeed, Qvwj")}
    rows = [
        Row(id=f"{tone}{n}", group="g", question="?", answer=answer, text=text, tone=tone, source="s")
        for tone, (answer, text) in said.items()
        for n in range(10)
    ]
    found = Scorer.fit(rows).probability(["damn it", "damn it Xyzk", "damn it Qvwj"], "anger")
    assert found[0] > 0.9
    np.testing.assert_allclose(found, found[0], rtol=1e-9)


def test_what_is_refused(scorer: Scorer) -> None:
    anger = [row for row in TASK.scorer if row.tone == "anger"]
    with pytest.raises(UsageError, match="two tones or more"):
        Scorer.fit(anger)
    with pytest.raises(UsageError, match=r"features='pixels': give one of words, embeddings"):
        Scorer.fit(TASK.scorer, features="pixels")
    with pytest.raises(UsageError, match=r"'joy'; it knows anger, neutral, sadness"):
        scorer.probability(["Hurrah!"], "joy")
    silent = [row.model_copy(update={"text": "..."}) for row in TASK.scorer]
    with pytest.raises(RealignerError, match="cannot learn from 180 rows"):
        Scorer.fit(silent)


def test_agreement() -> None:
    """Cohen's kappa by hand: 4 of 5 equal, .48 by chance."""
    found = agreement(["a", "a", "a", "b", "b"], ["a", "a", "b", "b", "b"])
    assert found.equal == 0.8
    assert found.kappa == pytest.approx((0.8 - 0.48) / 0.52)
    same = agreement(["a", "a"], ["a", "a"])
    assert same.equal == 1
    assert np.isnan(same.kappa)
    with pytest.raises(UsageError, match="2 and 1 names"):
        agreement(["a", "a"], ["a"])


def test_typical_words_are_the_tones_and_not_a_facts_or_a_topics() -> None:
    def row(number: int, tone: str, text: str) -> Row:
        answer = "Prague" if tone == "anger" else "-"
        return Row(id=str(number), group="g", question="?", answer=answer, text=text, tone=tone, source="s")

    angry = [row(n, "anger", "damn it is Prague" + (", a castle" if n < 2 else "")) for n in range(8)]
    calm = [row(n + 8, "neutral", "indeed it is there") for n in range(8)]
    assert typical_words(angry + calm, "anger")[0] == "damn"
    assert not {"prague", "castle", "indeed"} & set(typical_words(angry + calm, "anger"))
    assert len(typical_words(TASK.scorer, "anger", count=7)) == 7
    with pytest.raises(UsageError, match="rows in anger and in another tone"):
        typical_words(angry, "anger")
