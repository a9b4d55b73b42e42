"""Generate replies with a bare or realigned host, complete (`answer`) or streamed (`stream`); the same way everywhere."""

from __future__ import annotations

import atexit
import queue
import reprlib
import threading
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import nn
from transformers import (
    LogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer

from realigner.chat_format import ChatFormat, check_template_kwargs, ends_in_byte
from realigner.errors import RealignerError, UsageError
from realigner.hosts import positions_of
from realigner.prompts import Answer, Prompt
from realigner.settings import Strength, Where, part_of
from realigner.thinking_budget import ThinkingBudget
from realigner.tuner import find_tuner, tuner_of

Names = str | tuple[str, ...]

# What a host's own generation config may ask for, and a reply that is made token by token, in a batch or a stream, cannot have.
# (min_length counts the prompt, and the padding of a batch too; min_new_tokens stays.)
_TOKEN_BY_TOKEN: dict[str, Any] = {
    **{"num_beams": 1, "num_return_sequences": 1, "return_dict_in_generate": False},
    **dict.fromkeys(("prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp", "guidance_scale", "min_length")),
}


class Thought(str):
    """A piece of a thought, as `stream` gives it."""


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
    chat_template_kwargs: Mapping[str, Any] | None = None,
    thinking_budget: int = 512,
    first: int = 0,
    penalize_prompt: bool = True,
    top_p: float = 1.0,
) -> list[Answer]:
    """The replies to `prompts`, in order, as text.

    Args:
        model: a host, or a model with an IRM.
        tokenizer: the host's.
        prompts: questions or conversations; each is put through the template that the IRM was trained with, else the host's
            chat template (`format_of`).
        max_new_tokens: maximum length of each reply.
        temperature: 0 for greedy decoding, else the sampling temperature.
        repetition_penalty: above 1, tokens already in the text are made less likely (small hosts tend to loop); 1 is off.
        seed: sampling seed. A reply depends on the seed and the prompt's number, not on the batch or on other threads.
        batch_size: prompts at a time, padded on the left. In half precision, the other prompts of a batch can change the
            rounding, and with it a word of the reply.
        done: called after each batch with the number of prompts in it.
        system: a system prompt.
        strength: a number, a list with one for each prompt, or a mapping from IRM to either; see `tuner.strength`. None: as
            set by the calling thread's `tuner.strength` block, if any.
        irms: the IRMs that act: a name, a tuple of names that are summed, ``"__base__"`` for none, or a list with one of these
            for each prompt; the active ones when None.
        where: the tokens that they act on; see `tuner.strength`.
        chat_template_kwargs: variables of the chat template, such as ``{"enable_thinking": False}``, over those of the IRM.
        thinking_budget: maximum length of a thought, on hosts that think; the thought is then closed. Its tokens do not count
            towards `max_new_tokens`. Thought and reply together end where the host has no more positions.
        first: number of the first prompt. Set it when answering part of a longer list, to sample as if for the whole list.
        penalize_prompt: whether `repetition_penalty` counts the prompt's tokens too, as transformers and vLLM do, or the
            reply's alone.
        top_p: nucleus sampling: sample only from the likeliest tokens that together have this probability; 1 for all.

    Raises:
        UsageError: for an empty prompt, a bad number, or a list of settings that is not as long as `prompts`.
        RealignerError: for a prompt that is longer than the host's context, with its reply, or that its chat template rejects.

    Example:
        >>> answer(host, tokenizer, ["How many legs has a spider?"])  # doctest: +SKIP
        ['A spider has eight legs.']
    """
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):
        raise UsageError(f"prompts: give a list of prompts, not {reprlib.repr(prompts)}")
    _check_number("batch_size", batch_size, batch_size >= 1)
    names = [irms] * len(prompts) if isinstance(irms, (str, tuple)) else irms
    sampling = Sampling(max_new_tokens, thinking_budget, temperature, repetition_penalty, seed, top_p)
    chat_format = format_of(model, tokenizer, chat_template_kwargs, irms)
    ends = ends_of(model, chat_format)
    replies: list[Answer] = []
    for start in range(0, len(prompts), batch_size):
        rows = chat_format.prompts(prompts[start : start + batch_size], system)
        limits = _limits(model, chat_format, sampling, rows, first + start)
        for limit, alike in groupby(range(len(rows)), limits.__getitem__):  # no row is cut where another's positions end
            numbers = [*alike]
            part = slice(start + numbers[0], start + numbers[-1] + 1)
            own = {
                "strength": part_of(strength, part, len(prompts), "strength", "prompts"),
                "adapter_names": part_of(names, part, len(prompts), "irms", "prompts"),
            }
            settings = _settings(model, **own, where=where)
            some = [rows[number] for number in numbers]
            inputs, options, opened = _asked(model, chat_format, sampling, some, limit, first + part.start, penalize_prompt)
            with torch.no_grad():
                tokens = model.generate(**inputs, **options, **settings)  # type: ignore[operator]
            budget = next((own for own in options["logits_processor"] if isinstance(own, ThinkingBudget)), None)
            for number, row in enumerate(tokens[:, inputs["input_ids"].shape[1] :].tolist()):
                thought, text = chat_format.split(row, opened[number])
                full = None if budget is None else budget.full[number]  # what comes after is padding, often with an end token
                replies.append(Answer(text, thought, not ends.isdisjoint(row[:full])))
            if done is not None:
                done(len(some))
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
    chat_template_kwargs: Mapping[str, Any] | None = None,
    thinking_budget: int = 512,
    thoughts: bool = False,
    top_p: float = 1.0,
    stop: threading.Event | None = None,
) -> Generator[str, None, bool]:
    """Stream the reply to one prompt; the pieces together are what `answer` returns.

    Generation starts at once in a thread of its own, with the settings in effect now. Closing the iterator stops it.

    Args:
        thoughts: on hosts that think, also yield the pieces of the thought, as `Thought`.
        stop: an event that any thread may set; the reply then ends with the next token.

    Returns:
        A generator of pieces, whose return value is the answer's ``ended``.

    Raises:
        UsageError: as `answer` does; what goes wrong later is raised where the pieces are read.

    Example:
        >>> for piece in stream(model, tokenizer, "Why is the sky blue?"):  # doctest: +SKIP
        ...     print(piece, end="", flush=True)
    """
    sampling = Sampling(max_new_tokens, thinking_budget, temperature, repetition_penalty, seed, top_p)
    chat_format = format_of(model, tokenizer, chat_template_kwargs, irms)
    rows = chat_format.prompts([prompt], system)
    given = _settings(model, strength=strength, rows=None if irms is None else [irms], where=where)
    (limit,) = _limits(model, chat_format, sampling, rows, 0)
    inputs, options, opened = _asked(model, chat_format, sampling, rows, limit, 0)
    pieces = Pieces(chat_format, opened[0], thoughts, ends_of(model, chat_format))
    options["stopping_criteria"].append(_Stopped(lambda: pieces.stopped or (stop is not None and stop.is_set())))

    def generate() -> None:
        try:
            with torch.no_grad():
                model.generate(**inputs, **options, streamer=pieces)  # type: ignore[operator]
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


def format_of(
    model: nn.Module,
    tokenizer: Any,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    irms: Names | Sequence[Names] | None = None,
) -> ChatFormat:
    """How conversations are put to a model: as its IRMs were trained; by the host's chat template where there is none.

    Args:
        model: a host, or a model with an IRM.
        tokenizer: the host's.
        chat_template_kwargs: variables of the chat template, over those that the IRMs were trained with.
        irms: those that act, as in `answer`; the active ones when None, or when none of these is an IRM of the model.

    Raises:
        UsageError: when the IRMs were trained with different templates, or variables.
    """
    check_template_kwargs(chat_template_kwargs)
    tuner = find_tuner(model)
    if tuner is None or not tuner.registry.names:
        return ChatFormat(tokenizer, chat_template_kwargs=chat_template_kwargs)
    given = [irms] if isinstance(irms, str) else irms or ()
    named = {name for names in given for name in ([names] if isinstance(names, str) else names)} & tuner.peft_config.keys()
    configs = [tuner.peft_config[name] for name in (sorted(named) or tuner.registry.names)]
    template, variables = configs[0].template, configs[0].chat_template_kwargs or {}
    if any((config.template, config.chat_template_kwargs or {}) != (template, variables) for config in configs):
        raise UsageError("irms: they were trained with different prompt templates; ask them in separate calls")
    return ChatFormat(tokenizer, template, {**variables, **(chat_template_kwargs or {})})


def _read(pieces: Pieces, thread: threading.Thread) -> Generator[str, None, bool]:
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
        return pieces.ended
    finally:
        stop()
        unregister(stop)


class Pieces(BaseStreamer):  # type: ignore[misc]
    """Splits a reply into pieces that never need retracting: no partial characters, no space that may be trailing.

    Attributes:
        with_blanks: the reply so far as the host wrote it; empty while that may be a thought.
    """

    def __init__(self, chat_format: ChatFormat, opened: bool, thoughts: bool, ends: Collection[int] = ()) -> None:
        self.queue: queue.Queue[str | BaseException | None] = queue.Queue()
        self.stopped = False
        self.with_blanks = ""
        self._format, self._opened, self._thoughts, self._ends = chat_format, opened, thoughts, frozenset(ends)
        self._tokens: list[int] = []
        self._sent = {Thought: 0, str: 0}
        self._prompt = True  # the prompt comes first
        # Cleaning spaces up can rewrite the last four characters (" n't") when the next token comes.
        self._held = 4 if chat_format.cleans_up else 0

    def put(self, value: torch.Tensor) -> None:
        if self._prompt:
            self._prompt = False
            return
        self._tokens += value.flatten().tolist()
        if not any(self._sent.values()) and self._format.may_be_tag(self._format.decode(self._tokens).lstrip()):
            return
        thought, self.with_blanks = self._format.split_with_blanks(self._tokens, self._opened)
        reply, tags = self.with_blanks.strip(), self._format.tags
        if tags is not None and not reply:  # what may become the end of the thought
            thought = thought[: max(0, len(thought) - len(tags.close))]
        partial = (reply or thought).endswith("\ufffd") or ends_in_byte(self._format.tokenizer, self._tokens)
        if not partial:
            self._send(Thought, thought)
            self._send(str, reply[: len(reply) - self._held])

    @property
    def ended(self) -> bool:
        """Whether a token has come that ends a reply."""
        return not self._ends.isdisjoint(self._tokens)

    def end(self) -> None:
        thought, reply = self._format.split(self._tokens, self._opened)
        self._send(Thought, thought)
        self._send(str, reply)

    def _send(self, kind: type[str], text: str) -> None:
        if len(text) > self._sent[kind]:
            if kind is str or self._thoughts:
                self.queue.put(kind(text[self._sent[kind] :]))
            self._sent[kind] = len(text)


class _Stopped(StoppingCriteria):  # type: ignore[misc]
    """Ends a generation that nobody reads any more, or that is to stop."""

    def __init__(self, stopped: Callable[[], bool]) -> None:
        self._stopped = stopped

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self._stopped(), device=input_ids.device)


class SeededSampling(LogitsProcessor):  # type: ignore[misc]
    """Gumbel-max sampling: adds noise to scores ``[row, token]`` so that their argmax is a sample.

    The noise depends on seed, row and step alone; torch's own sampling draws from one process-wide state that threads share.

    Args:
        temperature: above 0.
        seed: one for all rows.
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
    """Gumbel noise ``[count]`` on the CPU: the argmax of log-probabilities plus this noise is a sample from them."""
    uniform = torch.rand(count, generator=generator, dtype=torch.float64)
    return -torch.log(-torch.log(uniform.clamp(1e-12, 1 - 1e-12))).float()


def encode_prompts(
    tokenizer: Any, prompts: Sequence[Prompt], device: torch.device, template: str = "chat", system: str | None = None
) -> dict[str, torch.Tensor]:
    """``input_ids`` and ``attention_mask`` ``[prompt, position]``, padded on the left."""
    return padded(ChatFormat(tokenizer, template).prompts(prompts, system), tokenizer, device)


def padded(rows: Sequence[Sequence[int]], tokenizer: Any, device: torch.device) -> dict[str, torch.Tensor]:
    """Rows of tokens as ``input_ids`` and ``attention_mask`` ``[row, position]``, padded on the left."""
    width = max(len(row) for row in rows)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    ids = torch.tensor([[pad] * (width - len(row)) + [*row] for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return {"input_ids": ids, "attention_mask": mask}


def _limits(
    model: nn.Module, chat_format: ChatFormat, sampling: Sampling, rows: Sequence[Sequence[int]], first: int
) -> list[int]:
    """For each row, how many tokens of thought and reply it may get: those asked for, or the positions that the host has left.

    Raises:
        RealignerError: when these are fewer than a reply's: some hosts would fail on it, others take all memory.
    """
    most, reply = sampling.most(chat_format), sampling.max_new_tokens
    config = getattr(model, "config", None)
    positions = None if config is None else positions_of(config)
    if positions is None:
        return [most] * len(rows)
    lengths = [len(row) for row in rows]
    for number, tokens in enumerate(lengths, start=first + 1):
        if tokens > positions:
            raise RealignerError(f"prompt {number}: it has {tokens:,} tokens, and the host {positions:,} positions; shorten it")
        if tokens + reply > positions:
            raise RealignerError(
                f"prompt {number}: its {tokens:,} tokens and a reply of {reply:,} need more than the host's {positions:,} "
                "positions; shorten it, or ask for fewer (max_new_tokens)"
            )
    return [min(most, positions - tokens) for tokens in lengths]


def _asked(
    model: nn.Module,
    chat_format: ChatFormat,
    sampling: Sampling,
    rows: Sequence[Sequence[int]],
    limit: int,
    first: int,
    penalize_prompt: bool = True,
) -> tuple[dict[str, torch.Tensor], dict[str, Any], list[bool]]:
    """Rows that may get `limit` tokens, as ``generate`` takes them: inputs, options, and which of them open a thought."""
    inputs = padded(rows, chat_format.tokenizer, _device(model))
    opened = [chat_format.opens_thought(row) for row in rows]
    uncounted = 0 if penalize_prompt else inputs["input_ids"].shape[1]
    options = sampling.options(model, chat_format, opened, first, uncounted)
    return inputs, {**options, "max_new_tokens": limit}, opened


@dataclass(frozen=True)
class Sampling:
    """Validated generation settings."""

    max_new_tokens: int
    thinking_budget: int
    temperature: float
    repetition_penalty: float
    seed: int
    top_p: float = 1.0

    def __post_init__(self) -> None:
        _check_number("max_new_tokens", self.max_new_tokens, self.max_new_tokens >= 1)
        _check_number("thinking_budget", self.thinking_budget, self.thinking_budget >= 0)
        _check_number("temperature", self.temperature, 0 <= self.temperature < 100)
        _check_number("repetition_penalty", self.repetition_penalty, 0 < self.repetition_penalty < 100)
        _check_number("top_p", self.top_p, 0 < self.top_p <= 1)

    def budget(self, chat_format: ChatFormat, opened: Sequence[bool]) -> ThinkingBudget | None:
        """What limits thoughts and replies, on a host that thinks: for rows of which some open a thought."""
        if chat_format.tags is None:
            return None
        return ThinkingBudget(chat_format, opened, self.thinking_budget, self.max_new_tokens)

    def most(self, chat_format: ChatFormat) -> int:
        """Tokens that thought and reply take together at most."""
        budget = self.budget(chat_format, [])
        return self.max_new_tokens if budget is None else budget.most

    def options(
        self, model: nn.Module, chat_format: ChatFormat, opened: Sequence[bool], first_row: int, uncounted: int = 0
    ) -> dict[str, Any]:
        """The arguments of ``generate`` for the rows of a batch.

        Args:
            opened: of each row, whether its prompt opens a thought.
            first_row: number of the prompt that is the first row.
            uncounted: positions at the start that the repetition penalty leaves out.
        """
        options: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "repetition_penalty": float(self.repetition_penalty)}
        options |= {"do_sample": False, **_TOKEN_BY_TOKEN, "logits_processor": [], "stopping_criteria": []}
        if uncounted:
            penalty = RepetitionPenaltyLogitsProcessor(options["repetition_penalty"], prompt_ignore_length=uncounted)
            options |= {"repetition_penalty": 1.0, "logits_processor": [penalty]}
        if (pad := chat_format.tokenizer.pad_token_id) is not None:  # some hosts' own is a token of text
            options["pad_token_id"] = pad
        if self.temperature > 0 and self.top_p < 1:
            nucleus = [TemperatureLogitsWarper(float(self.temperature)), TopPLogitsWarper(float(self.top_p))]
            options["logits_processor"] += [*nucleus, SeededSampling(1.0, self.seed, first_row)]
        elif self.temperature > 0:
            options["logits_processor"].append(SeededSampling(self.temperature, self.seed, first_row))
        if (budget := self.budget(chat_format, opened)) is not None:
            options["max_new_tokens"] = budget.most
            options["logits_processor"].append(budget)
            options["stopping_criteria"].append(budget.enough)
        if ends := ends_of(model, chat_format):
            options["eos_token_id"] = sorted(ends)
        return options


def ends_of(model: nn.Module, chat_format: ChatFormat) -> set[int]:
    """The tokens that end a reply: the host's, and those by which the form ends one (rows that IRMs learn from end so)."""
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    own = {ends} if isinstance(ends, int) else set(ends or [])
    return own | set(chat_format.ends)


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
