"""Does a reply answer its question? Its closeness to the bare host's reply and to the question, as content from 0 to 2."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from realigner.errors import RealignerError, UsageError
from realigner.evaluation.embeddings import embed
from realigner.evaluation.measures import BEST, own_part, without_words, words

_LEAST = 0.05  # cosine by which references must be closer to their own questions than to others


class Content:
    """Content of replies to a fixed list of questions, 0 to 2.

    Closeness is the mean of four cosines of embeddings: with the bare host's reply and with the question, each once with and
    once without the tone's words. Content is how much closer a reply is to its own question than, on average, to the others:
    0 where it would fit them as well, 2 for what the reference replies reach on average. What repeats the prompt does not
    count (`own_part`): with nothing else, content is 0.

    So the same reply to every question scores 0 on average before clipping, however close it is to all of them. If the zero
    were the plain mean over replies to other questions, a reply close to many of them would score higher.

    Args:
        questions: two or more.
        bare: the bare host's replies to them.
        references: the data's own replies to them in the tone, not trained on.
        tone_words: from `typical_words`.

    Raises:
        UsageError: when the lists differ in length, or there are fewer than two questions.
        RealignerError: when the references are hardly closer to their own questions than to others.
    """

    def __init__(
        self, questions: Sequence[str], bare: Sequence[str], references: Sequence[str], tone_words: Collection[str] = ()
    ) -> None:
        if len(questions) < 2 or not len(questions) == len(bare) == len(references):
            raise UsageError(
                f"content: {len(questions)} questions, {len(bare)} bare replies, {len(references)} references: give as many of"
                " each, two or more"
            )
        self.questions, self.tone_words = list(questions), frozenset(tone_words)
        # [version, text, 384]: with the tone's words, and without
        self._asked, self._answered = self._embedded(questions), self._embedded(bare)
        self.reference = float(self._contrast(references).mean())
        if self.reference < _LEAST:
            raise RealignerError(
                f"content: the reference replies are hardly closer to their own questions than to others"
                f" ({self.reference:.3f}); are they in the same order?"
            )

    def scores(self, replies: Sequence[str], prompts: Sequence[str] | None = None) -> np.ndarray:
        """Content of each reply ``[reply]``, one to each question, in their order.

        Args:
            prompts: all that the host was given before each reply, where that is more than the question: a system prompt,
                examples. What a reply repeats of it does not count.

        Raises:
            UsageError: when there are not as many replies, or prompts, as questions.
        """
        prompts = self.questions if prompts is None else prompts
        if not len(replies) == len(prompts) == len(self.questions):
            raise UsageError(
                f"content: {len(replies)} replies and {len(prompts)} prompts for {len(self.questions)} questions; give one each"
            )
        own = [own_part(reply, prompt, self.tone_words) for reply, prompt in zip(replies, prompts, strict=True)]
        content = np.clip(BEST * self._contrast(own) / self.reference, 0, BEST)
        return np.where([bool(words(text)) for text in own], content, 0.0)

    def _contrast(self, replies: Sequence[str]) -> np.ndarray:
        """Each reply's closeness to its own question, less its mean closeness to the others."""
        said = self._embedded(replies)
        versions = said @ (self._asked + self._answered).transpose(0, 2, 1)  # [version, reply, question]
        closeness = versions.mean(axis=0).astype(float) / 2
        own = closeness.diagonal()
        return np.asarray(own - (closeness.sum(axis=1) - own) / (len(own) - 1))

    def _embedded(self, texts: Sequence[str]) -> np.ndarray:
        return np.stack([embed(texts), embed([without_words(text, self.tone_words) for text in texts])])
