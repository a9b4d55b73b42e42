"""Two scorers of a tone that share nothing but their rows: one reads words and characters, the other sentence embeddings."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from sklearn.ensemble import BaggingClassifier
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.kernel_approximation import Nystroem
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import cohen_kappa_score
from sklearn.pipeline import make_pipeline, make_union
from sklearn.preprocessing import FunctionTransformer

from realigner.data import Row
from realigner.data.style_classifier import TOKEN, StyleClassifier, masked
from realigner.errors import RealignerError, UsageError
from realigner.evaluation.embeddings import embed, one_thread

_MEMBERS, _SHARE = 128, 0.8  # logistic regressions in a scorer; the share of the rows that each is trained on
_FEW, _MANY = 200, 1000  # rows: with more, fewer members; with more, all features are kept
_C = 100.0  # inverse of the L2 penalty: at 10 the authored set's accuracy is the same, but P(tone) averages .68, not .80


def _word_features() -> object:
    words = TfidfVectorizer(token_pattern=TOKEN, ngram_range=(1, 2), sublinear_tf=True)
    return make_union(words, TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), sublinear_tf=True, min_df=2))


def _embedding_features() -> object:
    return FunctionTransformer(embed)


FEATURES: Mapping[str, Callable[[], object]] = {"words": _word_features, "embeddings": _embedding_features}


@dataclass(frozen=True)
class Scorer:
    """How likely a reply is in a tone. Mask the reply's fact first (`style_classifier.masked`).

    The mean of 128 logistic regressions, each trained on a random 80% of the rows (of more than 200 rows, of fewer regressions:
    each moves less with its draw). Between four seeds, the share of the study's replies that the mean of 8 names in the tone
    differs by up to .095; of the mean of 128, by up to .03.

    Attributes:
        features: what it reads: ``words`` (TF-IDF of words, word pairs and 2 to 5 characters) or ``embeddings`` (MiniLM).

    Example:
        >>> from realigner.data import authored
        >>> scorer = Scorer.fit(authored("anger") + authored("neutral"))
        >>> scorer.named(["How dare you ask me that, you fool!"])
        ['anger']
    """

    features: str
    classifier: StyleClassifier

    @classmethod
    def fit(cls, rows: Sequence[Row], seed: int = 42, features: str = "words") -> Scorer:
        """Train on rows of two tones or more (`Task.scorer`); `seed` draws each member's rows.

        Raises:
            UsageError: when the rows have one tone only, or for unknown features.
            RealignerError: when the rows have no words, or the embeddings' wheel is not installed.
        """
        if features not in FEATURES:
            raise UsageError(f"scorer: features={features!r}: give one of {', '.join(FEATURES)}")
        if len({row.tone for row in rows}) < 2:
            raise UsageError("scorer: rows of two tones or more are needed to tell tones apart")
        texts = tuple(masked(row.text, row.answer) for row in rows)
        return cls(features, _classifier(texts, tuple(row.tone for row in rows), seed, features))

    @property
    def tones(self) -> tuple[str, ...]:
        return self.classifier.tones

    def probability(self, texts: Sequence[str], tone: str) -> np.ndarray:
        """P(tone) of each text, ``[text]``; 0 for a text without a word.

        Raises:
            UsageError: for a tone that it was not trained on.
        """
        if tone not in self.tones:
            raise UsageError(f"scorer: was not trained on {tone!r}; it knows {', '.join(self.tones)}")
        with one_thread():
            found = self.classifier.probabilities(texts)[:, self.tones.index(tone)]
        return np.where([_has_word(text) for text in texts], found, 0.0)

    def named(self, texts: Sequence[str]) -> list[str]:
        """The likeliest tone of each text; nothing for a text without a word."""
        return [name if _has_word(text) else "" for text, name in zip(texts, self.classifier.named(texts), strict=True)]


def _has_word(text: str) -> bool:
    return re.search(r"\w", text) is not None


@lru_cache(maxsize=16)  # an evaluation scores tuning and test questions by the same rows
def _classifier(texts: tuple[str, ...], tones: tuple[str, ...], seed: int, features: str) -> StyleClassifier:
    count = max(8, min(_MEMBERS, _MEMBERS * _FEW // len(texts)))
    each = LogisticRegression(C=_C, max_iter=3000)
    members = BaggingClassifier(each, n_estimators=count, max_samples=_SHARE, bootstrap=False, random_state=seed)
    # A regression's weights lie in the span of its rows: in coordinates of that it is the same one, and faster.
    span = Nystroem(kernel="linear", n_components=len(texts), random_state=0) if len(texts) <= _MANY else "passthrough"
    pipeline = make_pipeline(FEATURES[features](), span, members)
    try:
        with one_thread():
            pipeline.fit(texts, tones)
    except ValueError as error:
        raise RealignerError(f"scorer: cannot learn from {len(texts)} rows ({str(error).splitlines()[0]})") from None
    return StyleClassifier(pipeline)


@dataclass(frozen=True)
class Agreement:
    """How far two scorers name the same tones.

    Attributes:
        equal: share of the texts for which they do.
        kappa: Cohen's kappa, 0 for agreement by chance; NaN where both name one and the same tone throughout.
    """

    equal: float
    kappa: float


def agreement(a: Sequence[str], b: Sequence[str]) -> Agreement:
    """The agreement of two scorers' `named` over the same texts.

    Raises:
        UsageError: when they are not of the same texts, or of none.
    """
    if not a or len(a) != len(b):
        raise UsageError(f"agreement: {len(a)} and {len(b)} names: give two scorers' names of the same texts")
    constant = len({*a, *b}) == 1
    return Agreement(float(np.mean(np.array(a) == np.array(b))), np.nan if constant else float(cohen_kappa_score(a, b)))


def typical_words(rows: Sequence[Row], tone: str, count: int = 100) -> list[str]:
    """The words by which a scorer would tell a tone's rows from the others', the most telling first; facts masked.

    A word counts where three rows or more have it, so that few are about a topic.

    Raises:
        UsageError: when the rows have one tone only, or none of this one.

    Example:
        >>> from realigner.data import authored
        >>> "damn" in typical_words(authored("anger") + authored("neutral"), "anger")
        True
    """
    is_tone = [row.tone == tone for row in rows]
    if len(set(is_tone)) < 2:
        raise UsageError(f"scorer: rows in {tone} and in another tone are needed to find its words")
    counts = TfidfVectorizer(token_pattern=r"\w+", sublinear_tf=True, min_df=3)
    try:
        found = counts.fit_transform([masked(row.text, row.answer) for row in rows])
    except ValueError:  # no word is in three rows
        return []
    weights = LogisticRegression(C=_C, max_iter=3000).fit(found, is_tone).coef_[0]
    words = counts.get_feature_names_out()
    return [str(words[n]) for n in np.argsort(-weights, kind="stable")[:count] if weights[n] > 0]
