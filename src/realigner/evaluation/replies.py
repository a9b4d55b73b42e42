"""What a realigned host says, and the losses of given replies: everything of an evaluation that is asked of a host in words.

A method shows itself as a `Speaker`: what answers, and what stands before each question. A bare host is one too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from realigner.chat_format import IGNORED
from realigner.data.tokens import Example
from realigner.generation import answer, format_of
from realigner.prompts import Answer, Message
from realigner.training.batches import Collator, EncodedRows
from realigner.training.loss import row_losses, takes_logits_to_keep
from realigner.tuner import find_tuner

BATCH = 16  # questions that are answered together
_LOSS_BATCH = 8
Conversation = Sequence[Message]
Answers = Callable[[Sequence[Conversation], int], list[Answer]]  # of conversations, with so many new tokens at most


class Speaker(Protocol):
    """A host as a method realigns it.

    Attributes:
        model: what answers; see `generation.answer`.
        system: a system prompt, or None.
        history: turns before the question.
        answers: what answers in the model's place, such as a server; the model is asked for losses alone. None: the model.
    """

    @property
    def model(self) -> nn.Module: ...
    @property
    def system(self) -> str | None: ...
    @property
    def history(self) -> Sequence[Message]: ...
    @property
    def answers(self) -> Answers | None: ...


def conversation_of(speaker: Speaker, question: str | Conversation, reply: str | None = None) -> list[Message]:
    """The messages that a speaker is given for a question, and the reply to it."""
    asked = [{"role": "user", "content": question}] if isinstance(question, str) else list(question)
    system = [] if speaker.system is None else [{"role": "system", "content": speaker.system}]
    said = [] if reply is None else [{"role": "assistant", "content": reply}]
    return [*system, *speaker.history, *asked, *said]


def ask(
    speaker: Speaker,
    tokenizer: Any,
    questions: Sequence[str | Conversation],
    max_new_tokens: int,
    done: Callable[[int], None] | None = None,
) -> list[Answer]:
    """Greedy replies, in the order of the questions; those of like length are answered together.

    As in `realigner generate`, tokens already in the reply are made less likely (a repetition penalty of 1.1); those of its
    prompt are not, because the tone's own words in a system prompt, examples, or earlier replies would then be suppressed. A
    server applies its own penalty.

    Args:
        speaker: who answers.
        tokenizer: the host's.
        questions: questions, or conversations that end in one.
        max_new_tokens: tokens of a reply at most.
        done: called with how many more questions are answered.
    """
    prompts = [conversation_of(speaker, question) for question in questions]
    order = sorted(range(len(prompts)), key=lambda n: sum(len(message["content"]) for message in prompts[n]))
    replies = [Answer()] * len(prompts)
    for start in range(0, len(order), BATCH):
        part = order[start : start + BATCH]
        asked = [prompts[n] for n in part]
        if speaker.answers is not None:
            texts = speaker.answers(asked, max_new_tokens)
        else:
            texts = answer(speaker.model, tokenizer, asked, max_new_tokens, batch_size=BATCH, penalize_prompt=False)
        for n, text in zip(part, texts, strict=True):
            replies[n] = text
        if done is not None:
            done(len(part))
    return replies


def ask_in_turns(speaker: Speaker, tokenizer: Any, dialogues: Sequence[Sequence[str]], max_new_tokens: int) -> list[list[str]]:
    """The replies to each dialogue's questions, each asked after the replies to those before it."""
    said: list[list[Message]] = [[] for _ in dialogues]
    replies: list[list[str]] = [[] for _ in dialogues]
    for turn in range(max(map(len, dialogues), default=0)):
        going = [n for n, questions in enumerate(dialogues) if turn < len(questions)]
        for n in going:
            said[n].append({"role": "user", "content": dialogues[n][turn]})
        for n, reply in zip(going, ask(speaker, tokenizer, [said[n] for n in going], max_new_tokens), strict=True):
            said[n].append({"role": "assistant", "content": reply or "."})  # some templates refuse empty messages
            replies[n].append(reply)
    return replies


def tokens_of(tokenizer: Any, reply: str) -> int:
    """Tokens of a reply."""
    return len(tokenizer(reply, add_special_tokens=False)["input_ids"])


def reply_losses(
    speaker: Speaker, tokenizer: Any, questions: Sequence[str | Conversation], replies: Sequence[str]
) -> list[tuple[float, int]]:
    """Of each reply the summed loss in nats, its end included, and the number of its tokens.

    A reply that was cut (`Answer.ended`) has no end that could be lost: the end token costs some 25 nats in mid-sentence.

    Example:
        >>> losses = reply_losses(bare, tokenizer, ["Why is the sky blue?"], ["It is not."])  # doctest: +SKIP
        >>> [total / tokens for total, tokens in losses]  # doctest: +SKIP
        [3.1]
    """
    examples = encode(speaker, tokenizer, questions, replies)
    order = sorted(range(len(examples)), key=lambda n: len(examples[n]["input_ids"]))
    rows, collate = EncodedRows(examples), Collator(getattr(tokenizer, "pad_token_id", None) or 0)
    found = [(0.0, 0)] * len(examples)
    speaker.model.eval()
    with torch.no_grad():
        for start in range(0, len(order), _LOSS_BATCH):
            part = order[start : start + _LOSS_BATCH]
            batch = {key: value.to(device_of(speaker.model)) for key, value in collate([rows[n] for n in part]).items()}
            sums, counts = row_losses(speaker.model, batch, has_logits_to_keep(speaker.model))
            for n, total, count in zip(part, sums.tolist(), counts.tolist(), strict=True):
                found[n] = (total, count)
    return found


def encode(speaker: Speaker, tokenizer: Any, questions: Sequence[str | Conversation], replies: Sequence[str]) -> list[Example]:
    """Questions and replies as tokens, labels on the replies; an empty reply counts as a full stop."""
    chat_format, examples = format_of(speaker.model, tokenizer), []
    for question, reply in zip(questions, replies, strict=True):
        example = chat_format.examples(conversation_of(speaker, question, reply or "."))[-1]
        if isinstance(reply, Answer) and not reply.ended and chat_format.ends:
            labels = example["labels"]
            labels[max(at for at, label in enumerate(labels) if label != IGNORED)] = IGNORED
        examples.append(example)
    return examples


def clock_of(model: nn.Module) -> Callable[[], float]:
    """A clock in seconds: of processor time where one thread computes, which other work on the machine does not slow down."""
    return time.process_time if device_of(model).type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter


def device_of(model: nn.Module) -> torch.device:
    """Where a model's parameters are."""
    return next(parameter.device for parameter in model.parameters())


def dtype_of(model: nn.Module) -> str:
    """The type of a model's parameters, such as ``bfloat16``."""
    return str(next(model.parameters()).dtype).removeprefix("torch.")


def has_logits_to_keep(model: nn.Module) -> bool:
    """Whether the host under a model takes ``logits_to_keep``, to compute logits at chosen positions only."""
    tuner = find_tuner(model)
    inner: Any = tuner.model if tuner is not None else model
    get_base = getattr(inner, "get_base_model", None)
    return takes_logits_to_keep(get_base() if callable(get_base) else inner)
