"""Answer prompts with a host or a realigned model, whole or as the text comes; the same way everywhere."""

from __future__ import annotations

import atexit
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from transformers import LogitsProcessor, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from realigner.errors import RealignerError, UsageError
from realigner.prompts import Prompt, batch_prompt_ids
from realigner.settings import Strength, Where, part_of
from realigner.tuner import find_tuner, template_of, tuner_of

Names = str | tuple[str, ...]


def answer(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    max_new_tokens: int = 80,
    temperature: float = 0.0,
    repetition_penalty: float = 1.1,
    seed: int = 42,
    batch_size: int = 8,
    done: Callable[[int], None] | None = None,
    system: str | None = None,
    strength: Strength | None = None,
    irms: Names | list[Names] | None = None,
    where: Where | None = None,
) -> list[str]:
    """The replies to `prompts`, in order, as text.

    Args:
        model: a host, or a model with an IRM.
        tokenizer: the host's.
        prompts: questions or conversations; each is put through the template that the IRM was trained with, else the host's
            chat template (see `prompts.prompt_ids`).
        max_new_tokens: of each reply.
        temperature: 0 for greedy replies, else that of sampling.
        repetition_penalty: above 1, tokens already in the text are made less likely (small hosts run in circles); 1 is off.
        seed: of the sampling. A reply depends on it and on the prompt's number, not on the batch or on other threads.
        batch_size: prompts at a time, padded on the left. In half precision, what a prompt shares its batch with can change
            a rounding and so a word.
        done: called with the number of prompts answered after each batch.
        system: a system prompt.
        strength: a number, a list with one for each prompt, or a mapping from IRM to either; see `tuner.strength`. What the
            calling thread's block says when None.
        irms: the IRMs that act: a name, a tuple of names that are summed, ``"__base__"`` for none, or a list with one of these
            for each prompt; the active ones when None.
        where: the tokens that they act on; see `tuner.strength`.

    Raises:
        UsageError: for an empty prompt, a bad number, or settings of another number than there are prompts.
        RealignerError: for a prompt of more tokens than the host has positions.

    Example:
        >>> answer(host, tokenizer, ["How many legs has a spider?"])  # doctest: +SKIP
        ['A spider has eight legs.']
    """
    if isinstance(prompts, str):
        raise UsageError("prompts: give a list of prompts, not one string")
    _check_number("batch_size", batch_size, batch_size >= 1)
    names = [irms] * len(prompts) if isinstance(irms, (str, tuple)) else irms
    options = _options(max_new_tokens, temperature, repetition_penalty)
    replies: list[str] = []
    for start in range(0, len(prompts), batch_size):
        part = slice(start, start + batch_size)
        inputs = encode_prompts(tokenizer, prompts[part], _device(model), template_of(model), system)
        _check_positions(model, inputs, start)
        rows = len(inputs["input_ids"])
        own = {
            "strength": part_of(strength, part, len(prompts), "strength", "prompts"),
            "adapter_names": part_of(names, part, len(prompts), "irms", "prompts"),
        }
        settings = _settings(model, **own, where=where)
        sampling = [SeededSampling(temperature, seed, start)] if temperature > 0 else []
        with torch.no_grad():
            tokens = model.generate(**inputs, **options, **settings, logits_processor=sampling)  # type: ignore[operator]
        replies += [_text(tokenizer, row[inputs["input_ids"].shape[1] :]) for row in tokens]
        if done is not None:
            done(rows)
    return replies


def stream(
    model: nn.Module,
    tokenizer: Any,
    prompt: Prompt,
    max_new_tokens: int = 80,
    temperature: float = 0.0,
    repetition_penalty: float = 1.1,
    seed: int = 42,
    system: str | None = None,
    strength: Strength | None = None,
    irms: Names | None = None,
    where: Where | None = None,
) -> Iterator[str]:
    """The reply to one prompt, piece by piece as it is made; the pieces together are what `answer` gives.

    It is made in a thread that begins now, with the settings of now. Closing the iterator stops it.

    Raises:
        UsageError: as `answer` does; what goes wrong later is raised where the pieces are read.

    Example:
        >>> for piece in stream(model, tokenizer, "Why is the sky blue?"):  # doctest: +SKIP
        ...     print(piece, end="", flush=True)
    """
    inputs = encode_prompts(tokenizer, [prompt], _device(model), template_of(model), system)
    _check_positions(model, inputs, 0)
    options = _options(max_new_tokens, temperature, repetition_penalty)
    given = _settings(model, strength=strength, rows=None if irms is None else [irms], where=where)
    sampling = [SeededSampling(temperature, seed, 0)] if temperature > 0 else []
    pieces = _Pieces(tokenizer)

    def generate() -> None:
        try:
            with torch.no_grad():
                model.generate(  # type: ignore[operator]
                    **inputs, **options, logits_processor=sampling, streamer=pieces, stopping_criteria=[_Stopped(pieces)]
                )
            pieces.queue.put(None)
        except BaseException as error:  # raised where the pieces are read
            pieces.queue.put(error)

    thread = threading.Thread(target=generate, daemon=True)
    with ExitStack() as stack:  # the thread begins with the settings of this block
        if (tuner := find_tuner(model)) is not None:
            stack.enter_context(tuner.injector.threads.using(tuner.current(**given)))
        thread.start()
    reading = _read(pieces, thread)
    next(reading)  # from here on, closing or dropping it stops the thread
    return reading


def _read(pieces: _Pieces, thread: threading.Thread) -> Iterator[str]:
    def stop() -> None:
        pieces.stopped = True
        thread.join()

    # An interpreter that is on its way out never lets the thread finish, and has emptied this module when it comes to us.
    unregister = atexit.unregister
    atexit.register(stop)
    try:
        yield ""
        while (piece := pieces.queue.get()) is not None:
            if isinstance(piece, BaseException):
                raise piece
            yield piece
    finally:
        stop()
        unregister(stop)


class _Pieces(BaseStreamer):  # type: ignore[misc]
    """A reply's text in pieces that never have to be taken back: no half characters, no space that may be the last."""

    def __init__(self, tokenizer: Any) -> None:
        self.queue: queue.Queue[str | BaseException | None] = queue.Queue()
        self.stopped = False
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._sent = 0
        self._prompt = True  # the prompt comes first
        # Cleaning spaces up can rewrite the last four characters (" n't") when the next token comes.
        self._held = 4 if getattr(tokenizer, "clean_up_tokenization_spaces", False) else 0

    def put(self, value: torch.Tensor) -> None:
        if self._prompt:
            self._prompt = False
            return
        self._tokens += value.flatten().tolist()
        text = _text(self._tokenizer, self._tokens)
        if not text.endswith("\ufffd"):
            self._send(text[: len(text) - self._held])

    def end(self) -> None:
        self._send(_text(self._tokenizer, self._tokens))

    def _send(self, text: str) -> None:
        if len(text) > self._sent:
            self.queue.put(text[self._sent :])
            self._sent = len(text)


class _Stopped(StoppingCriteria):  # type: ignore[misc]
    """Ends a generation that nobody reads any more."""

    def __init__(self, pieces: _Pieces) -> None:
        self._pieces = pieces

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self._pieces.stopped, device=input_ids.device)


class SeededSampling(LogitsProcessor):  # type: ignore[misc]
    """Turns scores ``[row, token]`` into ones whose largest is a sample: Gumbel noise from seed, row and step alone.

    torch's own sampling draws from one state for the whole process, which threads would share.

    Args:
        temperature: above 0.
        seed: of all rows.
        first_row: number of the batch's first row.
    """

    def __init__(self, temperature: float, seed: int, first_row: int) -> None:
        self.temperature, self.seed, self.first_row = temperature, seed, first_row
        self._generators: list[torch.Generator] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if not self._generators:
            seeds = [self.seed * 1_000_003 + self.first_row + row for row in range(len(scores))]
            self._generators = [torch.Generator().manual_seed(seed % 2**63) for seed in seeds]
        noise = torch.stack([gumbel(scores.shape[-1], generator) for generator in self._generators])
        return scores.float() / self.temperature + noise.to(scores.device)


def gumbel(count: int, generator: torch.Generator) -> torch.Tensor:
    """Gumbel noise ``[count]`` on the CPU: the largest of log-probabilities plus it is a sample of them."""
    uniform = torch.rand(count, generator=generator, dtype=torch.float64)
    return -torch.log(-torch.log(uniform.clamp(1e-12, 1 - 1e-12))).float()


def encode_prompts(
    tokenizer: Any, prompts: Sequence[Prompt], device: torch.device, template: str = "chat", system: str | None = None
) -> dict[str, torch.Tensor]:
    """``input_ids`` and ``attention_mask`` ``[prompt, position]``, padded on the left."""
    rows = batch_prompt_ids(tokenizer, prompts, template, system)
    width = max(len(row) for row in rows)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return {"input_ids": ids, "attention_mask": mask}


def _check_positions(model: nn.Module, inputs: Mapping[str, torch.Tensor], first: int) -> None:
    """Raise for a prompt that is longer than the host can read; some hosts would fail on it, others take all memory."""
    config = getattr(model, "config", None)
    positions = None if config is None else getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if not isinstance(positions, int) or positions <= 0:  # some configs give no limit, or -1
        return
    for number, tokens in enumerate(inputs["attention_mask"].sum(dim=1).tolist(), start=first + 1):
        if tokens > positions:
            raise RealignerError(f"prompt {number}: it has {tokens:,} tokens, and the host {positions:,} positions; shorten it")


def _options(max_new_tokens: int, temperature: float, repetition_penalty: float) -> dict[str, Any]:
    _check_number("max_new_tokens", max_new_tokens, max_new_tokens >= 1)
    _check_number("temperature", temperature, 0 <= temperature < 100)
    _check_number("repetition_penalty", repetition_penalty, 0 < repetition_penalty < 100)
    return {"max_new_tokens": max_new_tokens, "repetition_penalty": repetition_penalty, "do_sample": False}


def _check_number(name: str, value: float, fits: bool) -> None:
    if not fits:
        raise UsageError(f"{name}: {value} is out of range")


def _settings(model: nn.Module, **given: Any) -> dict[str, Any]:
    """Those that were given, as arguments of ``generate``; a bare host takes none."""
    chosen = {key: value for key, value in given.items() if value is not None}
    if chosen:
        tuner_of(model)
    return chosen


def _device(model: nn.Module) -> torch.device:
    return next(parameter.device for parameter in model.parameters() if parameter.device.type != "meta")


def _text(tokenizer: Any, tokens: Any) -> str:
    return str(tokenizer.decode(tokens, skip_special_tokens=True)).strip()
