"""Record the deltas of IRMs while a model runs: always summaries; optionally all deltas, or h0 for replay.

Deltas are taken where they are computed (once per forward, in `injection.Injector.fill`), so recording does not change the
model's outputs. The texts of a batch are added to the trace, or written to its store, when the batch is done.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
import xarray as xr
from torch import nn
from transformers import StoppingCriteriaList

from realigner.chat_format import ChatFormat, check_template_kwargs
from realigner.dialogues import readable
from realigner.errors import RealignerError, UsageError
from realigner.fingerprints import tensors_hash
from realigner.generation import format_of
from realigner.hosts import HostInfo
from realigner.injection import ActiveIRM
from realigner.irm import IRM
from realigner.prompts import Prompt, messages_of
from realigner.settings import generate_setting
from realigner.traces.layout import TOP, RunLabel, join, text_dataset
from realigner.traces.store import TraceWriter
from realigner.traces.summary import BatchSummary
from realigner.tuner import IRMModel, tuner_of

Keep = Literal["summary", "raw", "replay"]
NO_TOKEN = -1  # the id of what was given as an embedding
KEEPS = ("summary", "raw", "replay")
Watch = Callable[[str, Mapping[str, np.ndarray], torch.Tensor], None]
_opening = threading.Lock()  # recordings of one host may begin and end in several threads at once


def adapter_hash(network: IRM) -> str:
    """sha256 of an IRM's weights, which `replay` checks.

    Example:
        >>> irm = IRM(hidden_size=8, layers=(0,), widths=(4,), rank=0, output_std=1e-3)
        >>> adapter_hash(irm) == adapter_hash(irm)
        True
    """
    return tensors_hash(network.state_dict())


@contextmanager
def record(
    model: nn.Module,
    tokenizer: Any = None,
    keep: Keep = "summary",
    to: TraceWriter | None = None,
    labels: Mapping[str, RunLabel] | None = None,
    questions: Sequence[Prompt] = (),
    top: int = TOP,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    watch: Watch | None = None,
) -> Iterator[xr.Dataset]:
    """Record the deltas of the active IRMs within a block; the dataset is filled when the block ends.

    Each call of ``model.generate`` or of the model itself, in this thread or one begun in the block, adds its rows as new
    prompts. Padding is left out, as are a reply's end token and what a batch puts after a reply that has ended (by its end
    token, or by any other stopping criterion); the last token of a reply is never read by the host and has no delta.

    Args:
        model: a model with an IRM.
        tokenizer: decodes tokens; default: the one from `load_host`, if the host came from there.
        keep: ``summary``: reductions alone, in memory that does not grow with the text; ``raw``: every delta too;
            ``replay``: h0 of each token, from which `replay` computes the deltas again (as many times smaller as there are
            layers).
        to: a store that the texts of each batch are written to; the dataset then stays empty.
        labels: adapter name -> label of its texts; default: the adapter's name.
        questions: the prompts, in order: questions or conversations. They label the texts. If the host's template turns them
            into exactly the tokens that were read, these and the reply are labelled too (``turn``, ``role``; `traces.layout`).
        top: how many of the largest values of each text to keep.
        chat_template_kwargs: variables of the chat template that the prompts were made with, over those of the IRM.
        watch: called after each forward, in the thread that makes it, for each IRM: its name, the labels of the new tokens
            (``position``, ``is_generated``, ``token_id``, each ``[token]``) and what it added to them, float32
            ``[token, layer, neuron]``.

    Yields:
        A dataset as `traces.layout` describes it; strength is included in its numbers. Empty until the block ends.

    Raises:
        UsageError: for a model without an IRM, an invalid question, or a strength that changes within the block.
        RealignerError: for beam search or assisted decoding, where a row of the batch is not one text.

    Example:
        >>> with record(model, keep="raw") as trace:  # doctest: +SKIP
        ...     model.generate(**inputs)
        >>> trace.delta.dims  # doctest: +SKIP
        ('token', 'layer', 'neuron')
    """
    if keep not in KEEPS:
        raise UsageError(f"record: keep={keep!r}; choose summary, raw or replay")
    for asked in questions:
        if not isinstance(asked, str):
            messages_of(asked)
    tuner = tuner_of(model)
    info = getattr(tuner.model, "realigner", None)
    if tokenizer is None and isinstance(info, HostInfo):
        tokenizer = info.tokenizer
    check_template_kwargs(chat_template_kwargs)
    recorder = _Recorder(tuner, tokenizer, chat_template_kwargs, keep, to, labels or {}, questions, top, watch)
    trace = xr.Dataset()
    host = tuner.model
    with _opening:
        handle = host.register_forward_pre_hook(recorder.begin, with_kwargs=True)
        watched = vars(host).get("generate")
        if not isinstance(watched, _WatchedGenerate):
            watched = host.generate = _WatchedGenerate(host)
            host._get_stopping_criteria = watched.stopping_criteria
        watched.recorders.append(recorder)
    observers = (*tuner.settings.observers, recorder.observe)
    try:
        with tuner.injector.threads.using(replace(tuner.settings, observers=observers), may_overlap=True):
            yield trace
    finally:
        recorder.closed = True
        with _opening:
            handle.remove()
            watched.remove(recorder)
    recorder.finish()
    if recorder.texts:
        whole = join(recorder.texts, tuner.fingerprint.name, list(recorder.labels.values()))
        trace.update(whole)
        trace.attrs.update(whole.attrs)


class _WatchedGenerate:
    """A host's ``generate`` while recordings are open, which may be closed in any order."""

    def __init__(self, host: Any) -> None:
        self.host = host
        self.own = vars(host).get("generate")  # where it is not the class's
        self.generate = host.generate
        self.recorders: list[_Recorder] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        generate = self.generate
        for recorder in tuple(self.recorders):
            generate = recorder.around(generate, self.host.generation_config)
        return generate(*args, **kwargs)

    def stopping_criteria(self, *args: Any, **kwargs: Any) -> StoppingCriteriaList:
        """What ends the rows of a call of ``generate``: its own criteria, those of its settings, stop strings."""
        criteria = type(self.host)._get_stopping_criteria(self.host, *args, **kwargs)
        return _Noted(criteria, [recorder for recorder in self.recorders if recorder.follows()])

    def remove(self, recorder: _Recorder) -> None:
        self.recorders.remove(recorder)
        if not self.recorders:
            del self.host.generate, self.host._get_stopping_criteria
            if self.own is not None:
                self.host.generate = self.own


class _Noted(StoppingCriteriaList):  # type: ignore[misc]
    """Stopping criteria, which tell recorders the rows that they end: what comes after is padding."""

    def __init__(self, criteria: StoppingCriteriaList, recorders: Sequence[_Recorder]) -> None:
        super().__init__(criteria)
        self.recorders = recorders

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        done = super().__call__(*args, **kwargs)
        for recorder in self.recorders:
            recorder.finished |= done.cpu()
        return done


@dataclass
class _Step:
    """The real tokens of one forward: row and column of each in its batch, and its labels."""

    rows: torch.Tensor
    columns: torch.Tensor
    tokens: dict[str, np.ndarray]


@dataclass
class _Seen:
    """The deltas of one IRM in the current batch."""

    irm: IRM
    strength: float
    summary: BatchSummary
    steps: list[_Step] = field(default_factory=list)
    deltas: list[torch.Tensor] = field(default_factory=list)
    h0: list[torch.Tensor] = field(default_factory=list)


@dataclass(eq=False)
class _Recorder:
    """Tracks the rows of the current batch from forward to forward."""

    tuner: IRMModel
    tokenizer: Any
    chat_template_kwargs: Mapping[str, Any] | None
    keep: Keep
    to: TraceWriter | None
    given: Mapping[str, RunLabel]
    questions: Sequence[Prompt]
    top: int
    watch: Watch | None = None
    labels: dict[str, RunLabel] = field(default_factory=dict)  # of the adapters seen
    texts: list[xr.Dataset] = field(default_factory=list)
    chats: dict[str, ChatFormat] = field(default_factory=dict)  # of the adapters seen
    names: dict[int, str] = field(default_factory=dict)  # what a token id is in words
    prompts: int = 0  # prompts begun before the current batch
    rows: int = 0
    prompt_width: int | None = None  # padded width of the prompts inside generate; None outside
    ends: list[int] = field(default_factory=list)  # end tokens of the running generate
    closed: bool = False  # whether its block was left; blocks that were begun in it may be open still

    def __post_init__(self) -> None:
        self._start(0)

    def follows(self) -> bool:
        """Whether the calling thread is in the block of this recording; the calls of others are not in the trace."""
        return not self.closed and self.observe in self.tuner.settings.observers

    # Which tokens are new, real, and whose.

    def _start(self, rows: int) -> None:
        """Start a batch."""
        self.prompts += self.rows
        self.rows = rows
        self.width = 0  # tokens seen of the current batch
        self.mask: torch.Tensor | None = None
        self.finished = torch.zeros(rows, dtype=torch.bool)
        self.seen: dict[str, _Seen] = {}
        self.step: _Step | None = None
        self.steps = 0

    def around(self, generate: Any, defaults: Any) -> Any:
        """Wrap `generate`, to tell prompt from generated tokens and to refuse modes in which a row is not one text."""

        def watched(*args: Any, **kwargs: Any) -> Any:
            if not self.follows():
                return generate(*args, **kwargs)
            ids = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
            prompt: Any = ids if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
            ends = _refuse_scattered(args, kwargs, defaults, prompt)
            self.finish()
            self._start(prompt.shape[0])
            mask = kwargs.get("attention_mask")
            if isinstance(mask, torch.Tensor) and mask.dim() == 2:
                self.mask = mask.bool()  # with a static cache the host itself is given another one
            self.prompt_width, self.ends = prompt.shape[1], ends
            try:
                result = generate(*args, **kwargs)
            except BaseException:
                self._start(0)  # texts that were not finished are not texts
                raise
            finally:
                self.prompt_width = None
            whole = result if isinstance(result, torch.Tensor) else result.sequences
            self.finish(whole if ids is None else whole[:, ids.shape[1] :])
            return result

        return watched

    def begin(self, _: nn.Module, args: Any, kwargs: dict[str, Any] | None = None) -> None:
        if kwargs is None or not self.follows():  # torch forgets that a hook takes kwargs while another thread removes it
            return
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is None and isinstance(embedded := kwargs.get("inputs_embeds"), torch.Tensor):
            ids = torch.full(embedded.shape[:2], NO_TOKEN, device=embedded.device)
        if ids is None:
            raise RealignerError("record: the host was called without input_ids and inputs_embeds")
        if self.prompt_width is None:  # a plain call: every row is a new prompt
            self.finish()
            self._start(ids.shape[0])
        start, stop = self.width, self.width + ids.shape[1]
        mask = kwargs.get("attention_mask")
        if isinstance(mask, torch.Tensor) and mask.dim() == 2:
            self.mask = torch.nn.functional.pad(mask.bool(), (0, max(0, stop - mask.shape[1])), value=True)
        elif self.mask is not None:
            self.mask = torch.nn.functional.pad(self.mask, (0, max(0, stop - self.mask.shape[1])), value=True)
        ids = ids.cpu()
        real = torch.ones(ids.shape[0], stop, dtype=torch.bool) if self.mask is None else self.mask[:, :stop].cpu()
        after = torch.zeros_like(ids, dtype=torch.bool)  # the end of a row's reply: its end token, and what follows the reply
        if self.prompt_width is not None:
            new = torch.arange(start, stop) >= self.prompt_width
            after = (torch.isin(ids, torch.tensor(self.ends, dtype=ids.dtype)) & new).cumsum(1) > 0
            after |= self.finished[:, None]
            self.finished = after[:, -1]
        rows, columns = (real[:, start:] & ~after).nonzero(as_tuple=True)
        position = (real.long().cumsum(1) - 1)[rows, start + columns]
        generated = (start + columns) >= (self.prompt_width if self.prompt_width is not None else stop)
        token_id = ids[rows, columns].numpy().astype(np.int64)
        tokens = {"position": position.numpy().astype(np.int64), "is_generated": generated.numpy(), "token_id": token_id}
        self.step = _Step(rows, columns, tokens)
        self.steps += 1
        self.width = stop

    # The deltas at these tokens.

    def observe(self, active: ActiveIRM, h0: torch.Tensor, delta: torch.Tensor) -> None:
        name, step = active.name, self.step
        if self.closed:
            return
        if step is None:
            raise RealignerError("record: the decoder was called directly; call the model or its generate")
        if self.keep == "replay" and self.tuner.settings.where != "all":
            raise UsageError("record: deltas of a part of the text (where=) cannot be computed again; record with keep='raw'")
        # The shortest decimal that is the same float32: 0.7, not 0.699999988079071.
        strengths = {float(str(np.float32(value))) for value in active.strength.flatten().tolist()}
        if len(strengths) > 1:
            raise UsageError(f"record: the strength of {name!r} differs from row to row; record each setting separately")
        (strength,) = strengths
        label = self.labels.get(name)
        if label is None:
            label = self.given.get(name, RunLabel(name))
            self.labels[name] = replace(label, strength=strength, sha256=adapter_hash(active.irm))
        elif label.strength != strength:
            raise UsageError(f"record: the strength of {name!r} changed within the block; record each strength separately")
        if name not in self.seen:
            self.seen[name] = _Seen(active.irm, strength, BatchSummary(self.rows, self.top))
        seen = self.seen[name]
        if seen.steps and seen.steps[-1] is step:  # a recomputed (checkpointed) layer 0 reports twice
            return
        seen.steps.append(step)
        at = step.rows.to(delta.device), step.columns.to(delta.device)
        chosen = delta.detach()[at].float()
        seen.summary.add(chosen, step.rows.numpy(), step.tokens["is_generated"])
        if self.keep == "raw":
            seen.deltas.append(chosen.cpu())
        elif self.keep == "replay":
            seen.h0.append(h0.detach()[at].float().cpu())
        if self.watch is not None:
            self.watch(name, step.tokens, chosen)

    def finish(self, replies: torch.Tensor | None = None) -> None:
        """Store the texts of the current batch; `replies` are their generated tokens ``[row, token]``."""
        made = [[]] * self.rows if replies is None else replies.tolist()
        for name, seen in self.seen.items():
            if len(seen.steps) != self.steps:
                raise UsageError(f"record: adapter {name!r} was active for only part of a text; record each setting separately")
            texts = list(self._texts(name, seen, made))
            if self.to is not None:
                self.to.append(*((text, self.labels[name]) for text in texts))
            else:
                self.texts += texts
        self.seen = {}
        self.step = None

    def _chat(self, name: str) -> ChatFormat | None:
        """How prompts are put to an IRM."""
        if self.tokenizer is not None and name not in self.chats:
            self.chats[name] = format_of(self.tuner, self.tokenizer, self.chat_template_kwargs, name)
        return self.chats.get(name)

    def _texts(self, name: str, seen: _Seen, replies: Sequence[list[int]]) -> Iterator[xr.Dataset]:
        rows = np.concatenate([step.rows.numpy() for step in seen.steps])
        tokens = {key: np.concatenate([step.tokens[key] for step in seen.steps]) for key in seen.steps[0].tokens}
        ids = tokens["token_id"].tolist()
        for token in set(ids) - self.names.keys():
            self.names[token] = "" if self.tokenizer is None or token == NO_TOKEN else self.tokenizer.decode([token])
        tokens["token_text"] = np.array([self.names[token] for token in ids], dtype=object)
        deltas = torch.cat(seen.deltas) if seen.deltas else None
        h0 = torch.cat(seen.h0) if seen.h0 else None
        for row, summary in enumerate(seen.summary.results()):
            if summary is None:
                continue
            (own,) = np.nonzero(rows == row)
            prompt = self.prompts + row
            asked = self.questions[prompt] if prompt < len(self.questions) else ""
            of_text = {key: value[own] for key, value in tokens.items()}
            reply, labels = _said(self._chat(name), asked, of_text, replies[row])
            yield text_dataset(
                self.labels[name],
                prompt,
                readable(asked),
                seen.irm.layers,
                of_text | labels,
                summary,
                None if deltas is None else deltas[torch.from_numpy(own)].numpy(),
                None if h0 is None else h0[torch.from_numpy(own)].numpy(),
                reply,
            )


def _said(
    chat: ChatFormat | None, asked: Prompt, tokens: Mapping[str, np.ndarray], reply: list[int]
) -> tuple[str, dict[str, np.ndarray]]:
    """The reply's text, and the labels ``turn`` and ``role`` of a text's tokens.

    There are no labels where the tokens that were read are not those of what was asked.
    """
    if chat is None:
        return "", {}
    prompt = ~tokens["is_generated"]
    read = tokens["token_id"][prompt].tolist()
    opened = NO_TOKEN not in read and chat.opens_thought(read)
    thought, words = chat.split(reply, opened)
    try:
        if not asked or chat.prompts([asked])[0] != read:
            return words, {}
        of_prompt = chat.turns(asked)
    except RealignerError:  # it cannot be what was asked
        return words, {}
    length = len(reply) if thought and not words else chat.thought_length(reply, opened)
    roles = [message["role"] for message in messages_of(asked)]
    of_reply = np.full(int(tokens["is_generated"].sum()), len(roles))  # the reply is the message after these
    of_reply[:length] = -1  # a thought is not what is said
    turn = np.empty(len(prompt), dtype=np.int64)
    turn[prompt], turn[~prompt] = of_prompt, of_reply
    named = np.array([*roles, "assistant", ""], dtype=object)  # -1 is the last
    return words, {"turn": turn, "role": named[turn]}


def _refuse_scattered(args: Sequence[Any], kwargs: Mapping[str, Any], defaults: Any, prompt: Any) -> list[int]:
    """Refuse a `generate` in which a row of the batch is not one text; else its end tokens."""

    def setting(name: str) -> Any:
        return generate_setting(name, args, kwargs, defaults)

    for name in ("num_beams", "num_return_sequences"):
        if (setting(name) or 1) > 1:
            raise RealignerError(f"record: {name}={setting(name)} is not supported; a recorded row must be one text")
    if kwargs.get("past_key_values") is not None:
        raise RealignerError("record: generate with past_key_values is not supported; give the whole text")
    if kwargs.get("assistant_model") is not None or setting("prompt_lookup_num_tokens"):
        raise RealignerError("record: assisted decoding is not supported; rejected tokens would be recorded")
    if prompt is None:
        raise RealignerError("record: generate was called without input_ids and inputs_embeds")
    ends = setting("eos_token_id")
    return [ends] if isinstance(ends, int) else list(ends or [])
