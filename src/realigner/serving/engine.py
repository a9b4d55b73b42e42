"""A host that answers requests in one continuous batch, each with its own IRMs, strengths and sampling.

Its methods belong to one event loop; the batch runs in transformers' thread, prompts are made in one of ours.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import (
    ContinuousBatchingConfig,
    GenerationConfig,
    LogitsProcessorList,
)
from transformers.generation.continuous_batching.continuous_api import OutputRouter
from transformers.generation.continuous_batching.requests import GenerationOutput

from realigner.batching import BatchManager, HostBatchManager, prove_batches
from realigner.chat_format import ChatFormat, check_template_kwargs
from realigner.errors import RealignerError, UsageError
from realigner.generation import Sampling
from realigner.hosts import positions_of
from realigner.irm_config import check_adapter
from realigner.irm_sources import find_irm
from realigner.serving.api_request import ApiRequest
from realigner.serving.loaded_irms import LoadedIRM, LoadedIRMs, RequestIRMs
from realigner.serving.reply_text import ContinuedText, ReplyText, StopTexts, Thought
from realigner.tuner import tuner_of

_PAGE = 32  # tokens of a block of keys and values
_CACHE = 16_384  # tokens whose keys and values are kept, unless two requests alone need more
_BATCH = 32  # requests in one forward at most
_FORMATS = 64  # ways of putting prompts that are kept
_CONTEXT = 8192  # tokens of a prompt and its reply, unless more are asked for
_CLOSING = 16  # tokens of a tag that closes a thought at most
_THOUGHT = 512  # tokens of a thought at most, where a request does not say
_LOOK = 2.0  # seconds after which a request that hears nothing asks whether the batch still runs
_Changed = TypeVar("_Changed")
_ADVICE = "; serve another host, or this one with --engine vllm"


class BatchFailedError(RealignerError):
    """The batch does not run any more; nothing is answered until the server is started again (HTTP 503)."""


@dataclass(frozen=True)
class Limits:
    """Limits of a server.

    Attributes:
        requests: maximum running plus queued.
        tokens: maximum per reply, and the default of a request that names none.
        context: maximum tokens of prompt plus reply; None: the host's positions, up to 8,192.
        body: maximum bytes of a request.
        patience: maximum seconds that a client may take to send a request.
    """

    requests: int = 64
    tokens: int = 512
    context: int | None = None
    body: int = 1 << 20
    patience: float = 10.0

    def __post_init__(self) -> None:
        for name in ("requests", "tokens", "context", "body"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"max_{name}: {value} is below 1")


class _Router(OutputRouter):  # type: ignore[misc]
    """Hands replies to an event loop; transformers' own keeps what nobody waits for any more."""

    def __init__(self, loop: asyncio.AbstractEventLoop, take: Callable[[list[GenerationOutput]], None]) -> None:
        super().__init__()
        self._loop, self._take = loop, take

    def deliver(self, output: GenerationOutput) -> None:
        self.deliver_batch([output])

    def deliver_batch(self, outputs: list[GenerationOutput]) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._take, outputs)


@dataclass(eq=False)
class Job:
    """One request that is being answered; `Engine.finish` it, whatever happens.

    Attributes:
        taken: its IRMs.
        where: the tokens that they act on.
        prompt: as tokens.
        most: tokens of thought and reply at most.
        ends: tokens that end the reply.
        processors: of its scores.
        text: of its tokens.
        stops: texts that end the reply.
        enough: of a host that thinks: whether the reply itself is long enough.
        stream: whether each token is wanted when it is there.
        id: the server's own, whatever the client calls its request.
        outputs: from the batch.
        tokens: of thought and reply so far.
        ended: why the reply ended, once it has: ``"stop"`` or ``"length"``.
    """

    taken: RequestIRMs
    where: str | int
    prompt: list[int]
    most: int
    ends: list[int]
    processors: LogitsProcessorList
    text: ReplyText | ContinuedText
    stops: StopTexts
    enough: Any = None
    stream: bool = True
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    outputs: asyncio.Queue[GenerationOutput] = field(default_factory=asyncio.Queue)
    tokens: list[int] = field(default_factory=list)
    ended: str = ""

    def read(self, output: GenerationOutput) -> list[str]:
        """Take note of what the batch made; the pieces of text that can be said now."""
        new = output.generated_tokens[len(self.tokens) :]
        said: list[str] = []
        for tokens in [new] if self.enough is None else [[token] for token in new]:
            self.tokens += tokens
            pieces = list(self.text.add(tokens))
            rest = self.stops.rest(*self.text.so_far()) if self.stops.stops else ""
            said += [*self._said(pieces), *filter(None, [rest])]
            if self.stops.found:
                self.ended = "stop"
            elif self.enough is not None and bool(self.enough(torch.tensor([self.prompt + self.tokens]), None)):
                self.ended = "stop" if self._at_its_end() else "length"
            if self.ended:
                return said
        if output.is_finished():
            self.ended = "stop" if self._at_its_end() else "length"
        return said

    def _at_its_end(self) -> bool:
        return bool(self.tokens) and self.tokens[-1] in self.ends

    def last(self) -> list[str]:
        """The pieces of text that were held back."""
        said = [*self._said(self.text.end()), *filter(None, [self.stops.end()])]
        if self.stops.found:
            self.ended = "stop"
        return said

    def _said(self, pieces: Iterable[str]) -> list[str]:
        return [said for piece in pieces if (said := piece if isinstance(piece, Thought) else self.stops.add(piece))]


class Engine:
    """A host and a `LoadedIRMs` of IRMs, answering until `close`.

    Args:
        loaded_irms: with the IRMs to begin with.
        tokenizer: the host's.
        limits: how much is taken on; a context of None becomes the host's.
        first_token: called with the seconds to the first token of each reply that is streamed.

    Attributes:
        context: tokens of a prompt and its reply at most.

    Raises:
        RealignerError: when the host cannot be run in continuous batches, or gives other tokens there than alone.
    """

    def __init__(
        self,
        loaded_irms: LoadedIRMs,
        tokenizer: Any,
        limits: Limits,
        first_token: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        self.loaded_irms, self.tokenizer, self.limits = loaded_irms, tokenizer, limits
        self._first_token = first_token
        self._host = tuner_of(loaded_irms.model).model
        self._vocabulary = len(self._host.get_input_embeddings().weight)
        context = limits.context or _CONTEXT
        self.context = min(positions_of(self._host.config) or context, context)
        self._jobs: dict[str, Job] = {}
        self._formats: dict[str, ChatFormat] = {}
        self._changing = asyncio.Lock()
        self._under_way: set[asyncio.Task[Any]] = set()
        self._prompts, self._changes = ThreadPoolExecutor(1, "realigner-prompts"), ThreadPoolExecutor(1, "realigner-irms")
        self._batch: BatchManager | None = None

    def prove(self) -> None:
        """Prove that the host gives the same tokens in continuous batches as alone, before `open`."""
        words = self.tokenizer("The quick brown fox jumps over the lazy dog", add_special_tokens=False)["input_ids"][:16]
        prompts = [prompt for prompt in (words, words[3:]) if prompt]
        manager = HostBatchManager(self._host, self._generation(), self._batching(), advice=_ADVICE)
        manager.start()
        prove_batches(self._host, prompts, manager, _ADVICE)

    def open(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin to answer, in this event loop."""
        router = _Router(loop, self._take)
        tuner = tuner_of(self.loaded_irms.model)
        self._batch = BatchManager(tuner, self._generation(), self._batching(), own_processors=True, router=router)

    def close(self) -> None:
        """Stop at once, whatever is under way."""
        if self._batch is not None:
            self._batch.close()
            self._batch = None
        for threads in (self._prompts, self._changes):
            threads.shutdown(wait=False, cancel_futures=True)

    def _generation(self) -> GenerationConfig:
        """Greedy: the host's own rules, and what a request asks for, are processors of each request (`_rules`)."""
        return GenerationConfig(do_sample=False, max_new_tokens=self.limits.tokens, eos_token_id=-1)

    def _batching(self) -> ContinuousBatchingConfig:
        requests = min(self.limits.requests, _BATCH)
        tokens = max(2 * self.context, min(requests * self.context, _CACHE))
        return ContinuousBatchingConfig(
            page_size=_PAGE,
            num_blocks=-(-tokens // _PAGE) + 8,
            max_batch_tokens=max(256, 8 * requests),
            max_requests_per_batch=requests,
        )

    @property
    def failure(self) -> str:
        """Why nothing is answered, in one line; empty while all is well."""
        return "it is closed" if self._batch is None else self._batch.failure

    @property
    def running(self) -> int:
        """Requests that are being answered or wait."""
        return len(self._jobs)

    @property
    def pending(self) -> int:
        """Those that transformers has, which learns a little later of one that was given up."""
        return 0 if self._batch is None else self._batch.pending

    async def start(self, asked: ApiRequest) -> Job:
        """Begin to answer a request.

        Raises:
            UsageError: for a prompt that is empty or too long, or more tokens than are given.
            RealignerError: when the host's chat template refuses the prompt.
            BatchFailedError: when nothing is answered any more.
        """
        taken = self.loaded_irms.take(asked.mix)
        try:
            job: Job = await asyncio.get_running_loop().run_in_executor(self._prompts, self._job, asked, taken)
            if self._batch is None or self._batch.failure:
                raise BatchFailedError(f"the batch failed ({self.failure}); start the server again")
        except BaseException:
            self._give_back(taken)
            raise
        self._jobs[job.id] = job
        try:
            self._batch.add_request(
                job.prompt,
                job.id,
                strength=taken.strength,
                irms=taken.irms,
                where=job.where,
                processors=job.processors,
                max_new_tokens=job.most,
                eos_token_id=job.ends or [-1],
                streaming=job.stream,
            )
        except RealignerError as error:
            self.finish(job)
            raise BatchFailedError(f"{error}; start the server again") from None
        return job

    async def pieces(self, job: Job) -> AsyncGenerator[str, None]:
        """A reply piece by piece; pieces of a thought are `Thought`.

        Raises:
            BatchFailedError: when no more comes.
        """
        began = time.perf_counter()
        while not job.ended:
            output = await self._output(job)
            if job.stream and not job.tokens:  # others come whole
                self._first_token(time.perf_counter() - began)
            for piece in job.read(output):
                yield piece
        for piece in job.last():
            yield piece
        self.finish(job)

    async def _output(self, job: Job) -> GenerationOutput:
        while True:
            try:
                async with asyncio.timeout(_LOOK):
                    output = await job.outputs.get()
            except TimeoutError:
                if not self.failure:
                    continue
                raise BatchFailedError(f"the batch failed ({self.failure}); start the server again") from None
            if output.error is not None:
                raise BatchFailedError(f"the batch failed ({' '.join(output.error.split())[:200]}); start the server again")
            return output

    def finish(self, job: Job) -> None:
        """End a request: give up what is not finished, and its hold on IRMs. Of one that is over, nothing happens."""
        if self._jobs.pop(job.id, None) is None:
            return
        if self._batch is not None:
            self._batch.cancel(job.id)
        self._give_back(job.taken)

    def _take(self, outputs: Sequence[GenerationOutput]) -> None:
        """Hand what the batch made to those who wait for it; others gave up."""
        for output in outputs:
            if (job := self._jobs.get(output.request_id)) is not None:
                job.outputs.put_nowait(output)

    # A request as tokens, in the thread of prompts.

    def _job(self, asked: ApiRequest, taken: RequestIRMs) -> Job:
        if isinstance(asked.prompt, str):
            chat_format = self._format("plain", {})
            prompt = self._text_ids(chat_format, asked.prompt)
        else:
            chat_format = self._format(taken.template, {**taken.template_kwargs, **(asked.template_kwargs or {})})
            prompt = chat_format.prompts([asked.prompt])[0]
        self._check_tokens(prompt)
        left = self.context - len(prompt)
        if left < 1:
            raise UsageError(f"prompt: it has {len(prompt):,} tokens, and {self.context - 1:,} at most are read; shorten it")
        if (asked.max_tokens or 0) > self.limits.tokens:
            raise UsageError(f"max_tokens: {asked.max_tokens:,} is above this server's {self.limits.tokens:,}")
        thought, closing = asked.thinking_budget, 0 if chat_format.tags is None else _CLOSING
        if thought is None:  # half of the room at most, or what the reply leaves of it
            room = left - closing
            thought = max(0, min(_THOUGHT, room // 2 if asked.max_tokens is None else room - asked.max_tokens))
        tokens = asked.max_tokens or max(1, min(self.limits.tokens, left - (thought + closing if closing else 0)))
        opened = chat_format.opens_thought(prompt)
        seed = secrets.randbits(48) if asked.seed is None else asked.seed
        sampling = Sampling(tokens, thought, asked.temperature, asked.repetition_penalty, seed, asked.top_p)
        options = sampling.options(self._host, chat_format, [opened], 0)
        if options["max_new_tokens"] > left:
            more = f", and a thinking_budget of {thought:,}," if closing else ""
            place = f"the prompt has {len(prompt):,} tokens, which leaves {left:,} of {self.context:,}"
            raise UsageError(f"max_tokens: {tokens:,}{more} is too many; {place}")
        enough = None
        if (budget := sampling.budget(chat_format, [opened])) is not None:  # another one than the batch's thread asks
            enough = budget.enough
            enough(torch.tensor([prompt]), None)  # it has to see where the reply begins
        return Job(
            taken,
            asked.where,
            prompt,
            options["max_new_tokens"],
            options.get("eos_token_id", []),
            self._rules(prompt, options),
            ContinuedText(self.tokenizer, prompt) if isinstance(asked.prompt, str) else ReplyText(chat_format, opened),
            StopTexts(asked.stop),
            enough,
            stream=asked.stream or bool(asked.stop) or enough is not None,
        )

    def _rules(self, prompt: Sequence[int], options: Mapping[str, Any]) -> LogitsProcessorList:
        """The processors of scores that ``generate`` has for a prompt and options: the host's own rules, and the request's.

        The batch's config cannot hold the host's: some depend on the prompt's length, and transformers drops those there.
        """
        config, device = deepcopy(self._host.generation_config), self._host.device
        config.update(**options, max_length=len(prompt) + options["max_new_tokens"])
        ends = options.get("eos_token_id")
        config._eos_token_tensor = torch.tensor(ends, device=device) if ends else None  # as generate has them there
        rules: LogitsProcessorList = self._host._get_logits_processor(
            config,
            input_ids_seq_length=len(prompt),
            encoder_input_ids=torch.tensor([prompt], device=device),
            logits_processor=LogitsProcessorList(options["logits_processor"]),
            device=device,
        )
        return rules

    def _check_tokens(self, prompt: Sequence[int]) -> None:
        """Raise for a token that the host has no embedding for, which would end the batch for everyone."""
        if (most := max(prompt)) >= self._vocabulary:
            token = self.tokenizer.convert_ids_to_tokens(most)
            known = self._vocabulary
            raise UsageError(f"prompt: {token!r} is token {most}, but the host has {known} (0 to {known - 1}); leave it out")

    def _text_ids(self, chat_format: ChatFormat, text: str) -> list[int]:
        try:
            ids = chat_format.text_prompt(text)
        except (TypeError, UnicodeError, ValueError):  # half a surrogate pair
            raise UsageError("prompt: it holds what is no character; repair it") from None
        if not ids:
            raise UsageError("prompt: it has no tokens; write a text")
        return ids

    def _format(self, template: str, variables: Mapping[str, Any]) -> ChatFormat:
        """A `ChatFormat`, kept: it looks into the template when it is first used."""
        check_template_kwargs(variables)
        key = json.dumps([template, variables], sort_keys=True)
        if key not in self._formats:
            if len(self._formats) >= _FORMATS:
                self._formats.clear()
            self._formats[key] = ChatFormat(self.tokenizer, template, variables)
        return self._formats[key]

    # IRMs that come and go.

    async def load(self, name: str, source: str | Path) -> LoadedIRM:
        """Add an IRM while others act, and return it. Whoever leaves meanwhile (is cancelled) does not end it halfway.

        Raises:
            RealignerError: when there is none, it is damaged, for another host, or its name is taken; all goes on as before.
        """
        return await asyncio.shield(self._begin(self._load(name, source)))

    async def _load(self, name: str, source: str | Path) -> LoadedIRM:
        async with self._changing:
            self.loaded_irms.check_new(name)
            served = await asyncio.get_running_loop().run_in_executor(self._changes, self._read, Path(source))
            self.loaded_irms.put(name, served)
            return served

    async def unload(self, name: str) -> None:
        """Take an IRM away; requests that use it are finished. Whoever leaves meanwhile does not end it halfway.

        Raises:
            UsageError: when it is not loaded.
        """
        if (adapter := self.loaded_irms.unload(name)) is not None:
            await asyncio.shield(self._begin(self._drop(adapter)))

    def _begin(self, change: Coroutine[Any, Any, _Changed]) -> asyncio.Task[_Changed]:
        """A change of the IRMs as a task that runs to its end, whether anyone waits for it or not."""
        task = asyncio.get_running_loop().create_task(change)
        self._under_way.add(task)  # else it might be collected before it has run
        task.add_done_callback(self._under_way.discard)
        return task

    def _read(self, source: Path) -> LoadedIRM:
        folder = find_irm(source)
        check_adapter(folder)
        try:
            with self._paused():
                return self.loaded_irms.read(folder)
        except RealignerError:
            raise
        except Exception as error:  # what PEFT and torch raise over a file, or for want of memory
            raise RealignerError(f"{folder}: cannot be loaded ({' '.join(str(error).split())[:200]})") from error

    async def _drop(self, adapter: str) -> None:
        async with self._changing:
            await asyncio.get_running_loop().run_in_executor(self._changes, self._drop_now, adapter)

    def _drop_now(self, adapter: str) -> None:
        if not self.failure:
            with self._paused():
                self.loaded_irms.drop(adapter)

    def _paused(self) -> AbstractContextManager[None]:
        return nullcontext() if self._batch is None else self._batch.paused()

    def _give_back(self, taken: RequestIRMs) -> None:
        for adapter in self.loaded_irms.give_back(taken):
            self._begin(self._drop(adapter))
