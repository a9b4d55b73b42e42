"""Scores of what was measured: each reply's, and a method's. Texts and numbers only; no host.

Everything is a function of `Measured` and the task's rows, so the same files give the same scores to the bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from realigner.data.style_classifier import masked
from realigner.errors import RealignerError
from realigner.evaluation.content import Content
from realigner.evaluation.measured import Loss, Measured
from realigner.evaluation.measures import FluencyScale, proxy, text_measures
from realigner.evaluation.scorers import Agreement, Scorer, agreement, typical_words
from realigner.evaluation.task import Task

SEEDS = (42, 43, 44, 45)  # of scorers, to see how far a score depends on one


@dataclass(frozen=True)
class Scores:
    """The scores of one method in one tone and seed.

    Attributes:
        each: name -> a number for each test question: ``probability`` (of the tone, by the words' scorer), ``named`` (1 where
            that scorer names the tone), ``probability_2`` and ``named_2`` (by the embeddings' scorer), ``content``,
            ``fluency``, ``summary`` (0 to 2), ``nats`` (per token, under the bare host), ``target`` (nats per token of the test
            row's own reply under the method), ``away`` (1 where the tone is less likely than in the bare host's reply), and
            those of `measures.text_measures`. NaN where there is none.
        whole: name -> a number: ``kl`` (nats per token of neutral text), ``same`` (share of its tokens with the same likeliest
            token), ``text_loss`` (nats per token of that text above the bare host's), ``about`` (share of right answers about
            a passage), ``shift_median`` and ``shift_max`` (over the sites, of `shift`), ``dropped`` (share named in the tone
            when asked to drop it), ``before_dropped`` (the same questions, not asked to), ``turn_1`` to ``turn_3`` (share
            named, by turn), ``ms_per_token``.
        shift: by site, the mean over tokens of the change of the residual stream's norm over the stream's.
        agreement: of the two scorers.
        by_seed: share of replies named, by words' scorers of four seeds.
    """

    each: dict[str, np.ndarray]
    whole: dict[str, float]
    shift: list[float]
    agreement: Agreement
    by_seed: list[float]


class ReplyScorers:
    """What replies in a tone are scored by: two scorers of the tone, and scales for content and fluency.

    Args:
        task: the tone and its rows; scorers are trained on ``task.scorer``.
        bare: the bare host, measured.

    Raises:
        RealignerError: when `bare` answers other questions than the test rows', or was measured without shuffled replies.
    """

    def __init__(self, task: Task, bare: Measured) -> None:
        self.task, self.bare = task, bare
        self.questions = [row.question for row in task.test]
        self._check(bare)
        if not bare.shuffled:
            raise RealignerError(f"{bare.method}: was measured without shuffled replies; measure it anew")
        self.words = Scorer.fit(task.scorer, SEEDS[0])
        references = [row.text for row in task.test]
        said = [item.reply for item in bare.replies]
        self.content = Content(self.questions, said, references, typical_words(task.scorer, task.tone))
        self.fluency = FluencyScale(mean(_per_token(bare)), mean(_each(bare.shuffled)))
        self._bare_probability = self._probability(self.words, said)

    @cached_property
    def embeddings(self) -> Scorer:
        """The second scorer."""
        return Scorer.fit(self.task.scorer, features="embeddings")

    @cached_property
    def _others(self) -> list[Scorer]:
        return [Scorer.fit(self.task.scorer, seed) for seed in SEEDS[1:]]

    def scores(self, measured: Measured) -> Scores:
        """The scores of a method that was measured on the same questions."""
        self._check(measured)
        texts = [item.reply for item in measured.replies]
        nats = _per_token(measured)
        probability = self._probability(self.words, texts)
        hidden = self._masked(texts)
        named, second = self.words.named(hidden), self.embeddings.named(hidden)
        content, fluency = self._content(texts, measured.given), self.fluency.scores(nats, texts)
        answers = [row.answer for row in self.task.test]
        own = [
            text_measures(text, answer, item.ended) for text, answer, item in zip(texts, answers, measured.replies, strict=True)
        ]
        each = {
            "probability": probability,
            "named": self._is_tone(named),
            "probability_2": self._probability(self.embeddings, texts),
            "named_2": self._is_tone(second),
            "content": content,
            "fluency": fluency,
            "summary": proxy(probability, content, fluency),
            "nats": nats,
            "target": _each(measured.target),
            "away": (probability < self._bare_probability).astype(float),
            **{name: np.array([item[name] for item in own]) for name in own[0]},
        }
        names = [named, *(scorer.named(hidden) for scorer in self._others)]
        by_seed = [float(self._is_tone(one).mean()) for one in names]
        shift = np.mean([effect.shift for effect in measured.text], axis=0).tolist() if measured.text else []
        return Scores(each, self._whole(measured, each["named"], shift), shift, agreement(named, second), by_seed)

    @cached_property
    def reference(self) -> dict[str, float]:
        """The share of the test rows' own replies that each scorer names in the tone: ``named``, ``named_2`` (see `Scores`)."""
        hidden = self._masked([row.text for row in self.task.test])
        scorers = {"named": self.words, "named_2": self.embeddings}
        return {name: mean(self._is_tone(scorer.named(hidden))) for name, scorer in scorers.items()}

    def summary(self, texts: Sequence[str], losses: Sequence[tuple[float, int]], given: str = "") -> np.ndarray:
        """The summary of replies to the test questions ``[reply]``, 0 to 2.

        Args:
            texts: the replies.
            losses: of each under the bare host, from `replies.reply_losses`.
            given: what stood before each question.
        """
        nats = np.array([total / tokens if text else np.nan for text, (total, tokens) in zip(texts, losses, strict=True)])
        fluency = self.fluency.scores(nats, texts)
        return proxy(self._probability(self.words, texts), self._content(texts, given), fluency)

    def _content(self, texts: Sequence[str], given: str) -> np.ndarray:
        return self.content.scores(texts, [f"{given}\n{question}" for question in self.questions])

    def _whole(self, measured: Measured, named: np.ndarray, shift: Sequence[float]) -> dict[str, float]:
        text, tokens = measured.text, sum(effect.tokens for effect in measured.text)
        whole = {
            "ms_per_token": measured.ms_per_token,
            "about": mean([item.right for item in measured.about]),
            "dropped": self._share(measured.dropped, range(len(measured.dropped))),
            "before_dropped": mean(named[: len(measured.dropped)]),
        }
        if text:
            whole |= {
                "kl": sum(effect.kl for effect in text) / tokens,
                "same": sum(effect.same for effect in text) / tokens,
                "text_loss": sum(effect.nats - effect.bare_nats for effect in text) / tokens,
                "shift_median": float(np.median(shift)),
                "shift_max": float(np.max(shift)),
            }
        starts = np.cumsum([0, *(len(replies) for replies in measured.turns)])
        for turn in range(max(map(len, measured.turns), default=0)):
            pairs = [
                (replies[turn], int(start) + turn)
                for replies, start in zip(measured.turns, starts, strict=False)
                if turn < len(replies)
            ]
            whole[f"turn_{turn + 1}"] = self._share([reply for reply, _ in pairs], [at for _, at in pairs])
        return whole

    def _share(self, texts: Sequence[str], of: Sequence[int]) -> float:
        """The share of replies to some of the test questions that are named in the tone."""
        hidden = [masked(text, self.task.test[number].answer) for text, number in zip(texts, of, strict=True)]
        return mean(self._is_tone(self.words.named(hidden)))

    def _probability(self, scorer: Scorer, texts: Sequence[str]) -> np.ndarray:
        return scorer.probability(self._masked(texts), self.task.tone)

    def _masked(self, texts: Sequence[str]) -> list[str]:
        return [masked(text, row.answer) for text, row in zip(texts, self.task.test, strict=True)]

    def _is_tone(self, names: Sequence[str]) -> np.ndarray:
        return np.array([name == self.task.tone for name in names], dtype=float)

    def _check(self, measured: Measured) -> None:
        if [item.question for item in measured.replies] != self.questions:
            raise RealignerError(
                f"{measured.method}: was asked other questions than the test rows for {self.task.tone}; measure it anew"
            )


def _each(losses: Sequence[Loss]) -> np.ndarray:
    return np.array([loss.nats / loss.tokens for loss in losses])


def _per_token(measured: Measured) -> np.ndarray:
    """Nats per token of each reply under the bare host; NaN for an empty one."""
    return np.array([item.nats / item.nats_tokens if item.reply else np.nan for item in measured.replies])


def mean(values: Sequence[float] | Sequence[bool] | np.ndarray) -> float:
    """The mean of those that are numbers; NaN where none is."""
    found = np.asarray(values, dtype=float)
    return float(np.nanmean(found)) if np.isfinite(found).any() else float("nan")
