"""A style classifier (a *scorer* of tones): TF-IDF of words and word pairs, and logistic regression; the fact is masked.

It reads how a reply is said, not what it says: the words of the answer are taken out first. Saved with skops (no pickle; on
loading, only types of scikit-learn and NumPy are allowed).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.pipeline import Pipeline, make_pipeline

from realigner.data.dataset_rows import TONES, Row, authored
from realigner.data.rewriters import RewriteRequest
from realigner.data.rewriters.template_rewriter import TemplateRewriter
from realigner.data.squad import Fact
from realigner.data.tone import built_in_tones
from realigner.errors import RealignerError, UsageError
from realigner.files import Artifact, read_bytes, taken

_ZIP_END = b"PK\5\6"  # how the last 22 bytes of a zip file begin, which has no comment
_TEMPLATE_REPLIES = 300  # of each tone, beside the authored set's 360
_TRAIN_AGAIN = "is it damaged? train it again (data scorer)"
TOKEN = r"\w+(?:'\w+)?|[!?]"  # an exclamation mark is a word of its own: it is half of anger


class StyleClassifier:
    """How likely a reply is in each of the tones it was trained on.

    Example:
        >>> from realigner.data import authored
        >>> scorer = StyleClassifier.fit(authored("anger") + authored("neutral"))
        >>> scorer.tones
        ('anger', 'neutral')
        >>> scorer.named(["How dare you ask me that, you fool!"])
        ['anger']
    """

    def __init__(self, pipeline: Pipeline, place: str = "scorer") -> None:
        self.pipeline = pipeline
        self.place = place  # where it was read from, for messages

    @property
    def tones(self) -> tuple[str, ...]:
        return tuple(str(name) for name in self.pipeline.classes_)

    @classmethod
    def fit(cls, rows: Sequence[Row], seed: int = 42) -> StyleClassifier:
        """Train on rows of two tones or more.

        Raises:
            UsageError: when the rows have one tone only.
            RealignerError: when they have hardly a word in common.
        """
        if len({row.tone for row in rows}) < 2:
            raise UsageError("scorer: rows of two tones or more are needed to tell tones apart")
        pipeline = _pipeline(seed)
        try:
            pipeline.fit([masked(row.text, row.answer) for row in rows], [row.tone for row in rows])
        except ValueError as error:
            raise RealignerError(f"scorer: cannot learn from {len(rows)} rows ({_first_line(error)})") from None
        return cls(pipeline)

    def probabilities(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """``[text, tone]``, each row summing to 1; mask the texts first (`masked`).

        Raises:
            RealignerError: for a scorer whose numbers are damaged.
        """
        if not texts:
            return np.zeros((0, len(self.tones)))
        try:
            found = np.asarray(self.pipeline.predict_proba(list(texts)), dtype=np.float64)
        except (MemoryError, KeyboardInterrupt):
            raise
        except Exception as error:  # its arrays may hold anything, and what is in them is used as indices
            raise RealignerError(f"{self.place}: cannot judge a text ({_first_line(error)}); {_TRAIN_AGAIN}") from error
        if found.shape != (len(texts), len(self.tones)) or not np.isfinite(found).all():
            raise RealignerError(f"{self.place}: gives no probabilities of its {len(self.tones)} tones; {_TRAIN_AGAIN}")
        return found

    def named(self, texts: Sequence[str]) -> list[str]:
        """The likeliest tone of each text."""
        return [self.tones[n] for n in self.probabilities(texts).argmax(axis=1)] if texts else []

    def save(self, path: str | Path, force: bool = False) -> None:
        """Write a skops file, in place of an older scorer only with `force`."""
        import skops.io

        with taken(path, SCORER, force) as place, place.file() as aside:
            skops.io.dump(self.pipeline, aside)

    @classmethod
    def load(cls, path: str | Path) -> StyleClassifier:
        """Read what `save` wrote.

        Raises:
            RealignerError: for a file that is not one, or that holds types a scorer has no use for.
        """
        import skops.io
        from skops.io.exceptions import UntrustedTypesFoundException

        try:
            pipeline = skops.io.load(path)
        except FileNotFoundError:
            raise RealignerError(f"{path}: there is no such scorer") from None
        except UntrustedTypesFoundException as error:
            raise RealignerError(f"{path}: holds types that are not trusted ({_first_line(error)})") from None
        except Exception as error:  # a damaged file makes the parsers below skops raise anything
            raise RealignerError(f"{path}: not a scorer saved by realigner ({_first_line(error)})") from None
        if not isinstance(pipeline, Pipeline) or not hasattr(pipeline, "classes_"):
            raise RealignerError(f"{path}: holds no scorer")
        return cls(pipeline, str(path))


@cache
def reference_classifier() -> StyleClassifier:
    """Tells the built-in tones apart; trained on the authored set, 300 template replies a tone, and the tones' examples.

    Judged on authored topics it has not seen, it names 98 in 100 rightly (tests/test_gate.py).
    """
    rows = [row for name in TONES for row in authored(name)]
    facts = [Fact(str(n), "reference", "Which one?", f"number {n}") for n in range(_TEMPLATE_REPLIES)]
    for tone in built_in_tones():
        requests = [RewriteRequest(fact, 0) for fact in facts]
        replies = [(reply.text, f"number {reply.id}") for reply in TemplateRewriter(tone).rewrite(requests)]
        replies += [(example.text, example.answer) for example in tone.examples]
        for number, (text, answer) in enumerate(replies):
            row = Row(id=str(number), group="-", question="-", answer=answer, text=text, tone=tone.name, source="reference")
            rows.append(row)
    return StyleClassifier.fit(rows)


def masked(text: str, answer: str) -> str:
    """A reply without the words of its answer, so that only how it is said is left."""
    words = set(re.findall(r"\w+", answer.lower()))
    return re.sub(r"\w+", lambda word: " " if word[0].lower() in words else word[0], text) if words else text


def cross_validated(rows: Sequence[Row], folds: int = 5, seed: int = 42) -> tuple[StyleClassifier, NDArray[np.float64]]:
    """The probabilities of each row's tones by a scorer that saw none of the row's group; ``[row, tone]``.

    Returns:
        A scorer of all rows (for its tone names), and the out-of-fold probabilities.

    Raises:
        UsageError: for one tone only.
        RealignerError: for fewer than two groups.
    """
    groups = [row.group for row in rows]
    folds = min(folds, len(set(groups)))
    if folds < 2:
        raise RealignerError("scorer: rows of two groups or more are needed for cross-validation")
    texts, tones = [masked(row.text, row.answer) for row in rows], [row.tone for row in rows]
    whole = StyleClassifier.fit(rows, seed)
    out = np.zeros((len(rows), len(whole.tones)))
    try:
        for train, test in StratifiedGroupKFold(folds, shuffle=True, random_state=seed).split(texts, tones, groups):
            part = _pipeline(seed).fit([texts[n] for n in train], [tones[n] for n in train])
            columns = [whole.tones.index(name) for name in part.classes_]
            out[np.ix_(test, columns)] = part.predict_proba([texts[n] for n in test])
    except ValueError as error:
        raise RealignerError(f"scorer: too few rows, or tones that share no group ({_first_line(error)})") from None
    return whole, out


def _read_scorer(path: Path) -> None:
    """Raise unless a file is a scorer of ours and nothing else, not another pipeline that skops saved."""
    if read_bytes(path)[-22:-18] != _ZIP_END:
        raise RealignerError(f"{path}: something was added to it")
    words, *rest = (step for _, step in StyleClassifier.load(path).pipeline.steps)
    if getattr(words, "token_pattern", None) != TOKEN or [type(step) for step in rest] != [LogisticRegression]:
        raise RealignerError(f"{path}: not a scorer of ours")


SCORER = Artifact("a scorer", _read_scorer)


def _pipeline(seed: int) -> Pipeline:
    words = TfidfVectorizer(token_pattern=TOKEN, ngram_range=(1, 2), sublinear_tf=True, min_df=2, max_features=100_000)
    return make_pipeline(words, LogisticRegression(C=10.0, max_iter=300, random_state=seed))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]
