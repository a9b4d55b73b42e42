"""What else a realignment changes: the host's predictions of neutral text, its answers about a passage, its residual stream.

The text is an excerpt of SQuAD 2.0's development set (passages of Wikipedia, CC BY-SA 4.0), 48 passages of 55 to 95 words, each
with a question that it answers. A question that is among an evaluation's rows is not asked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from realigner.chat_format import IGNORED
from realigner.data.answers import contains_answer
from realigner.evaluation.replies import Answers, Speaker, ask, device_of, encode
from realigner.files import read_object
from realigner.locate import find_sites
from realigner.residuals import Residuals

_T = TypeVar("_T")
_EXCERPT = Path(__file__).with_name("squad_excerpt.json")
ANSWER_TOKENS = 24
_ASKS_FOR_TEXT = "Write a paragraph about {article}."
_ASKS_FOR_ANSWER = "{passage}\n\n{question} Answer in a few words."


@dataclass(frozen=True)
class Passage:
    """A passage about an article, and a question that it answers in one of several wordings."""

    id: str
    article: str
    passage: str
    question: str
    answers: tuple[str, ...]


@cache
def passages() -> tuple[Passage, ...]:
    """The excerpt's, in the order of their articles."""
    return tuple(Passage(**{**item, "answers": tuple(item["answers"])}) for item in read_object(_EXCERPT)["questions"])


def evenly(items: Sequence[_T], count: int) -> list[_T]:
    """So many of the items at most, evenly spaced."""
    count = min(count, len(items))
    return [items[number * len(items) // count] for number in range(count)]


def some_passages(count: int) -> tuple[Passage, ...]:
    """`count` of the passages, evenly spaced over the articles."""
    return tuple(evenly(passages(), count))


def answers_about(
    speaker: Speaker,
    tokenizer: Any,
    asked: Sequence[Passage],
    done: Callable[[int], None] | None = None,
) -> list[tuple[str, bool]]:
    """The reply to each passage's question, and whether it holds the answer."""
    prompts = [_ASKS_FOR_ANSWER.format(passage=item.passage, question=item.question) for item in asked]
    replies = ask(speaker, tokenizer, prompts, ANSWER_TOKENS, done)
    return [
        (reply, any(contains_answer(answer, reply) for answer in item.answers))
        for item, reply in zip(asked, replies, strict=True)
    ]


class NeutralText:
    """The bare host's predictions of neutral text, kept so that realigned ones can be compared with them.

    Every passage is read as the reply to a request for a paragraph about its article, so that methods which work by a prompt
    can be applied too.

    Args:
        bare: the host as it is.
        tokenizer: its tokenizer.
        texts: the passages; the logits of their tokens are kept in memory, as the host gives them.
    """

    def __init__(self, bare: Speaker, tokenizer: Any, texts: Sequence[Passage]) -> None:
        self.tokenizer, self.texts = tokenizer, texts
        self.sites = find_sites(bare.model)
        self._bare = [self._read(bare, text) for text in texts]

    def effects(self, speaker: Speaker) -> list[dict[str, Any]]:
        """How a speaker's predictions of each passage differ from the bare host's.

        Returns:
            Of each passage: ``tokens``; ``kl``, nats of KL(bare || realigned), summed over them; ``same``, at how many the
            likeliest token is the same; ``nats`` and ``bare_nats``, the losses of the passage; ``shift``, for each site the
            mean over tokens of the norm of the change of the residual stream over that of the stream.
        """
        found = []
        for text, (was, stream, targets) in zip(self.texts, self._bare, strict=True):
            logits, moved, own = self._read(speaker, text)
            assert own == targets  # the same tokens are predicted
            before, after = (torch.log_softmax(part.float(), dim=-1) for part in (was, logits))
            labels = torch.tensor(targets, device=before.device)
            divergence = torch.nn.functional.kl_div(after, before, reduction="sum", log_target=True)
            change = (moved - stream).norm(dim=-1) / stream.norm(dim=-1)  # [site, token]
            found.append(
                {
                    "tokens": len(targets),
                    "kl": float(divergence),
                    "same": int((before.argmax(dim=-1) == after.argmax(dim=-1)).sum()),
                    "nats": float(torch.nn.functional.nll_loss(after, labels, reduction="sum")),
                    "bare_nats": float(torch.nn.functional.nll_loss(before, labels, reduction="sum")),
                    "shift": change.mean(dim=-1).tolist(),
                }
            )
        return found

    def _read(self, speaker: Speaker, text: Passage) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
        """Logits ``[token, word]`` and residuals ``[site, token, neuron]`` where a passage is predicted, and its tokens."""
        (example,) = encode(speaker, self.tokenizer, [_ASKS_FOR_TEXT.format(article=text.article)], [text.passage])
        predicted = [at - 1 for at, label in enumerate(example["labels"]) if label != IGNORED]
        ids = torch.tensor([example["input_ids"]], device=device_of(speaker.model))
        speaker.model.eval()
        with Residuals(self.sites).watching() as residuals, torch.no_grad():
            logits = speaker.model(input_ids=ids, use_cache=False).logits[0]
        stream = torch.stack([residuals.layers[layer][0, predicted].float().cpu() for layer in sorted(residuals.layers)])
        return logits[predicted], stream, [example["input_ids"][at + 1] for at in predicted]


def bare_speaker(host: nn.Module, answers: Answers | None = None) -> Speaker:
    """A host as it is; `answers` answer in its place."""
    return _Bare(host, answers=answers)


@dataclass(frozen=True)
class _Bare:
    model: nn.Module
    system: str | None = None
    history: tuple[dict[str, Any], ...] = ()
    answers: Answers | None = None
