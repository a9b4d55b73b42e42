"""Continuous batching in which every request has settings of its own.

transformers packs requests into one row, ``[1, tokens]``, so settings go by token: before each forward a strength for
every token is written where the forward will read it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, LogitsProcessorList
from transformers.generation.continuous_batching import ContinuousBatchingManager
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessorList
from transformers.generation.continuous_batching.continuous_api import OutputRouter
from transformers.generation.continuous_batching.requests import FutureRequestState, GenerationOutput
from transformers.generation.continuous_batching.utils import WorkloadHints

from realigner.errors import RealignerError, UsageError
from realigner.settings import NO_IRM, Settings, Strength, Where, acts

_LOG = "ContinuousBatchingLogger"  # it prints tracebacks for what is raised here
_OWN = "realigner"  # what a request's `_Request` is called among its options
_PROOF = 6  # tokens that are compared with a plain forward


@dataclass(frozen=True, eq=False)
class _Request:
    """What we keep of a request, on transformers' own record of it: it is forgotten with that record.

    Attributes:
        strengths: IRM -> strength.
        where: the tokens that they act on.
        prompt: tokens of the prompt.
        processors: of its scores, after those of all requests.
    """

    strengths: dict[str, float]
    where: Where
    prompt: int
    processors: LogitsProcessorList | None = None

    def __deepcopy__(self, memo: Any) -> _Request:
        return self  # transformers copies it when it puts a request off, and the processors go on where they were


class HostBatchManager:
    """transformers' manager of continuous batches, open until `close`; what goes wrong in its thread comes out of `next`.

    Args:
        host: a causal language model.
        options: of its ``init_continuous_batching``.
        advice: what to add to the message when a batch failed.

    Raises:
        RealignerError: when the host cannot be run in continuous batches.
    """

    def __init__(self, host: Any, *options: Any, advice: str = "") -> None:
        self._host, self._advice = type(host).__name__, advice
        try:
            self._manager: ContinuousBatchingManager = host.init_continuous_batching(*options)
        except (ValueError, AttributeError, NotImplementedError) as error:
            raise RealignerError(f"{self._host}: cannot be run in continuous batches ({_line(error)})") from None
        self.queue = self._manager.add_request  # transformers' own

    def start(
        self, processors: ContinuousBatchingLogitsProcessorList | None = None, router: OutputRouter | None = None
    ) -> None:
        """Begin to answer requests, with these logits processors instead of transformers' own if given.

        Args:
            processors: of all requests.
            router: takes the replies, instead of `next`.
        """
        if processors is not None:
            self._manager.logit_processor = processors
        if router is not None:
            self._manager.output_router = router
        logger = logging.getLogger(_LOG)
        self._level = logger.level
        logger.setLevel(logging.CRITICAL + 1)
        self._manager.start()

    def next(self) -> GenerationOutput:
        """Wait for the next finished request (for the next token of any, where requests are streamed).

        Raises:
            RealignerError: when the batch failed.
        """
        while True:
            result = self._manager.get_result(timeout=1)
            error = self._manager.background_thread_status.fatal_error or (result and result.error)
            if error or (result is None and not self._manager.is_running()):
                raise RealignerError(f"{self._host}: continuous batching failed ({_line(error or 'it ended')}){self._advice}")
            if result is not None:
                return result

    @property
    def failure(self) -> str:
        """Why no more requests are answered, in one line; empty while they are."""
        status = self._manager.background_thread_status
        if self._manager.is_running() and status.can_accept_new_requests() is None:
            return ""
        return _line(status.fatal_error or "it ended")

    @property
    def pending(self) -> int:
        """Requests in the batch, and waiting to get into it."""
        processor = self._manager.batch_processor
        if processor is None:  # its thread has just begun
            return 0
        return len(processor.scheduler.active_requests) + len(processor.scheduler.waiting_requests)

    def cancel(self, request_id: str) -> None:
        """Give a request up, wherever it is; nothing more comes of it. One that is over, or unknown, is no error."""
        self._manager.cancel_request(request_id)

    def paused(self) -> AbstractContextManager[None]:
        """No forward runs while the block does; what is under way goes on afterwards.

        Raises:
            RuntimeError: when the batch has ended.
        """
        pause: AbstractContextManager[None] = self._manager.pause()
        return pause

    def close(self) -> None:
        """Stop at once, whatever is under way, and give the host its attention back."""
        try:
            self._manager.stop(block=True, timeout=30, hard_stop=True)
            self._manager.destroy()
        finally:
            logging.getLogger(_LOG).setLevel(self._level)


class BatchManager(HostBatchManager):
    """transformers' manager of continuous batches, with a strength, IRMs and `where` for each request.

    A request gives the tokens that it gives alone. While the manager is open the host runs with paged attention: let nothing
    else run on it. Requests may be added from any thread.

    Args:
        tuner: the model's (`tuner.tuner_of`).
        generation_config: of all requests; the host's own when None.
        batching_config: transformers'. Blocks of keys and values are not shared between requests and batches are not prepared
            ahead, whatever it says: both would mix settings.
        hints: by which sizes are chosen: the longest prompt's tokens, the longest reply's (0: the config's), how many requests.
        own_processors: requests may bring logits processors of their own. They are Python, so there are no CUDA graphs.
        router: takes the replies, instead of `next`.

    Attributes:
        replies: to each request (``num_return_sequences``).

    Raises:
        RealignerError: when the host cannot be run in continuous batches.

    Example:
        >>> with BatchManager(tuner_of(model)) as batch:  # doctest: +SKIP
        ...     batch.add_request(ids, strength=0.5)
        ...     print(batch.next().generated_tokens)
    """

    def __init__(
        self,
        tuner: Any,
        generation_config: GenerationConfig | None = None,
        batching_config: ContinuousBatchingConfig | None = None,
        hints: tuple[int, int, int] | None = None,
        own_processors: bool = False,
        router: OutputRouter | None = None,
    ) -> None:
        self._tuner = tuner
        host = tuner.model
        if tuner.settings.observers:
            raise UsageError("record: continuous batches cannot be recorded, their rows are not texts; use generate")
        if getattr(host, "_cached_continuous_batching_manager", None) is not None:
            raise RealignerError(
                f"{type(host).__name__}: keeps an earlier manager; call its destroy_cached_continuous_batching_manager()"
            )
        config = ContinuousBatchingConfig() if batching_config is None else batching_config
        config = replace(config, allow_block_sharing=False, use_async_batching=False)
        if own_processors:
            config = replace(config, use_cuda_graph=False)
        sizes = None
        if hints is not None:
            reply = hints[1] or (generation_config or host.generation_config).max_new_tokens or 0
            sizes = WorkloadHints(max_prompt_length=hints[0], max_generated_length=reply, num_requests=hints[2])
        super().__init__(host, generation_config, config, sizes)
        self.replies: int = self._manager.num_return_sequences
        self._strengths: dict[str, torch.Tensor] = {}
        self._own_processors = own_processors and self.replies == 1
        self.start(_AroundForward(self._manager.logit_processor, self._write, own_processors), router)

    def add_request(
        self,
        input_ids: Sequence[int],
        request_id: str | None = None,
        strength: Strength | None = None,
        irms: str | tuple[str, ...] | None = None,
        where: Where | None = None,
        processors: LogitsProcessorList | None = None,
        **options: Any,
    ) -> str:
        """Queue a request and return its id.

        Args:
            input_ids: tokens of the prompt.
            request_id: by default a new one.
            strength: a number, or a mapping from IRM to number; that of the calling thread's block when None.
            irms: the IRMs that act on it; ``"__base__"`` for none, the active ones when None.
            where: the tokens that they act on; see `tuner.strength`.
            processors: of this request's scores, as in ``generate``: each gets ``[1, position]`` and ``[1, token]``.
            options: of transformers' ``add_request`` (``max_new_tokens``, ``eos_token_id``, ``streaming``, ...).

        Raises:
            UsageError: for a strength that is not one number, or an IRM that is not loaded.
            RealignerError: when the batch failed or was closed.
        """
        if processors and not self._own_processors:
            raise UsageError("processors: open the manager with own_processors, for one reply to a request")
        registry = self._tuner.registry
        settings: Settings = registry.settings(self._tuner.settings, strength, where)
        if irms is not None:
            names = () if irms == NO_IRM else (irms,) if isinstance(irms, str) else irms
            for name in names:
                registry.check_loaded("irms:", name)
            settings = replace(settings, irms=names, rows=None)
        if any(value.dim() for value in settings.strengths.values()):
            raise UsageError("strength: a request takes one number for each IRM")
        taking_part = registry.active(replace(settings, generation=None))
        strengths = {active.name: float(active.strength) for active in taking_part}
        if request_id is None:
            with self._manager._request_lock:
                request_id = f"request_{self._manager._request_counter}"
                self._manager._request_counter += 1
        own = _Request(strengths, settings.where, len(input_ids), processors)
        if self.queue(list(input_ids), request_id, **{_OWN: own}, **options) is None:
            raise RealignerError(f"{self._host}: continuous batching failed ({self.failure})")
        return request_id

    def __enter__(self) -> BatchManager:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write(self, requests: Sequence[FutureRequestState]) -> None:
        """Put the strength of each token of the coming forward in place; called in the manager's thread."""
        tokens: dict[str, list[float]] = {name: [] for name in self._tuner.registry.networks}
        for future in requests:
            state, count = future.state, future.query_length
            request: _Request = state.logit_processor_kwargs[_OWN]
            first = state.position_offset - count - request.prompt  # the offset is that of the tokens after these
            on = [acts(request.where, first + n) for n in range(count)]
            for name, values in tokens.items():
                strength = request.strengths.get(name, 0.0)
                values += [strength if acting else 0.0 for acting in on]
        threads = self._tuner.injector.threads
        size = max(self._manager.continuous_batching_config.max_batch_tokens or 0, *map(len, tokens.values()))
        self._strengths = {name: held for name, held in self._strengths.items() if name in tokens}
        static = self._manager.batch_processor.model_runner.pad_inputs  # compiled or captured: the same tensors every time
        for name, values in tokens.items():
            held = self._strengths.get(name)
            if held is None:
                held = self._strengths[name] = torch.zeros(1, size, device=self._tuner.model.device)
            held.zero_()
            held[0, : len(values)] = torch.tensor(values)
        irms = tuple(name for name, values in tokens.items() if static or any(values))
        threads.state.settings = replace(threads.default, strengths=self._strengths, irms=irms, packed=True)


class _AroundForward(ContinuousBatchingLogitsProcessorList):  # type: ignore[misc]
    """A manager's processors; transformers shows them the requests of every batch before its forward, and so us.

    After it, they process the scores of all requests, and then each request's own processors its row.
    """

    def __init__(self, processors: ContinuousBatchingLogitsProcessorList, before: Any, own: bool) -> None:
        self.__dict__.update(vars(processors))
        self._before, self._own = before, own
        self._rows: list[Any] = []  # the records of the requests that get a token, one for each row of scores
        self.do_processing: bool = processors.do_processing or own

    def check_kwargs(self, kwargs: dict[str, Any]) -> None:
        super().check_kwargs({name: value for name, value in kwargs.items() if name != _OWN})

    def prepare_tensor_args(self, requests_in_batch: list[FutureRequestState], *args: Any, **kwargs: Any) -> Any:
        self._before(requests_in_batch)
        if self._own:
            self._rows = [request.state for request in requests_in_batch if request.has_new_token]
        return super().prepare_tensor_args(requests_in_batch, *args, **kwargs)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, *args: Any) -> torch.Tensor:
        scores = super().__call__(input_ids, scores, *args)
        if not self._own:  # it may be compiled
            return scores
        for row, state in enumerate(self._rows):
            if own := state.logit_processor_kwargs[_OWN].processors:
                text = torch.tensor([state.initial_tokens + state.generated_tokens], device=scores.device)
                scores[row] = own(text, scores[row : row + 1])[0]
        return scores


def prove_batches(host: Any, prompts: Sequence[Sequence[int]], manager: HostBatchManager, advice: str) -> None:
    """Prove that continuous batches give what a host gives alone: on some hosts they do not, and say nothing.

    Prompts of unlike length are continued together, greedily; each token must be the likeliest by a plain forward, within
    rounding. (transformers 5.23 gets MPT, GPT-J, GPT-Neo and CodeGen wrong.)

    Args:
        host: the manager's.
        prompts: as tokens.
        manager: started, greedy; it is closed.
        advice: what to add to the message.

    Raises:
        RealignerError: when a token is another one.
    """
    try:
        for number, prompt in enumerate(prompts):
            manager.queue(list(prompt), str(number), max_new_tokens=_PROOF, eos_token_id=[-1])
        results = {result.request_id: result.generated_tokens for result in (manager.next() for _ in prompts)}
    finally:
        manager.close()
    for number, prompt in enumerate(prompts):
        tokens = torch.tensor([[*prompt, *results[str(number)]]], device=host.device)
        with torch.no_grad():
            logits = host(tokens, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
        chosen = logits.gather(-1, tokens[0, len(prompt) :, None])[:, 0]
        behind = (logits.max(dim=-1).values - chosen).max() / logits.abs().max()
        if behind > (1e-4 if host.dtype == torch.float32 else 0.05):
            raise RealignerError(f"{type(host).__name__}: gives other tokens in continuous batches than alone{advice}")


def _line(error: object) -> str:
    return " ".join(str(error).split())[:200]
