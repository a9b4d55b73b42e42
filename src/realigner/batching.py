"""Continuous batching in which every request has settings of its own.

transformers packs requests into one row, ``[1, tokens]``, so settings go by token: before each forward a strength for
every token is written where the forward will read it.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching import ContinuousBatchingManager
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessorList
from transformers.generation.continuous_batching.requests import FutureRequestState, GenerationOutput
from transformers.generation.continuous_batching.utils import WorkloadHints

from realigner.errors import RealignerError, UsageError
from realigner.settings import Settings, Strength, Where, acts

_LOG = "ContinuousBatchingLogger"  # it prints tracebacks for what is raised here


class _Request(NamedTuple):
    """IRM -> strength; the tokens that they act on; tokens of the prompt."""

    strengths: dict[str, float]
    where: Where
    prompt: int


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

    def start(self, processors: ContinuousBatchingLogitsProcessorList | None = None) -> None:
        """Begin to answer requests, with these logits processors instead of transformers' own if given."""
        if processors is not None:
            self._manager.logit_processor = processors
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
        sizes = None
        if hints is not None:
            reply = hints[1] or (generation_config or host.generation_config).max_new_tokens or 0
            sizes = WorkloadHints(max_prompt_length=hints[0], max_generated_length=reply, num_requests=hints[2])
        super().__init__(host, generation_config, config, sizes)
        self.replies: int = self._manager.num_return_sequences
        self._requests: dict[str, _Request] = {}
        self._finished: Counter[str] = Counter()  # replies to requests that have more to come
        self._strengths: dict[str, torch.Tensor] = {}
        self.start(_BeforeForward(self._manager.logit_processor, self._write))

    def add_request(
        self,
        input_ids: Sequence[int],
        request_id: str | None = None,
        strength: Strength | None = None,
        irms: str | tuple[str, ...] | None = None,
        where: Where | None = None,
        **options: Any,
    ) -> str:
        """Queue a request and return its id.

        Args:
            input_ids: tokens of the prompt.
            request_id: by default a new one.
            strength: a number, or a mapping from IRM to number; that of the calling thread's block when None.
            irms: the IRMs that act on it; ``"__base__"`` for none, the active ones when None.
            where: the tokens that they act on; see `tuner.strength`.
            options: of transformers' ``add_request`` (``max_new_tokens``, ``eos_token_id``, ``streaming``, ...).

        Raises:
            UsageError: for a strength that is not one number, or an IRM that is not loaded.
        """
        registry = self._tuner.registry
        rows = None if irms is None else [irms]
        settings: Settings = registry.settings(self._tuner.settings, strength, where, rows)
        if any(value.dim() for value in settings.strengths.values()):
            raise UsageError("strength: a request takes one number for each IRM")
        taking_part = registry.active(replace(settings, generation=None))
        strengths = {active.name: float(active.strength) for active in taking_part}
        if request_id is None:
            with self._manager._request_lock:
                request_id = f"request_{self._manager._request_counter}"
                self._manager._request_counter += 1
        self._requests[request_id] = _Request(strengths, settings.where, len(input_ids))
        self.queue(list(input_ids), request_id, **options)
        return request_id

    def next(self) -> GenerationOutput:
        """As the base class has it; a request whose replies are all finished is forgotten."""
        result = super().next()
        request_id = result.request_id.partition("__child#")[0]
        self._finished[request_id] += result.is_finished()
        if self._finished[request_id] >= self.replies:
            del self._finished[request_id]
            self._requests.pop(request_id, None)
        return result

    def __enter__(self) -> BatchManager:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write(self, requests: Sequence[FutureRequestState]) -> None:
        """Put the strength of each token of the coming forward in place; called in the manager's thread."""
        tokens: dict[str, list[float]] = {name: [] for name in self._tuner.registry.networks}
        for future in requests:
            state, count = future.state, future.query_length
            request = self._requests[state.request_id.partition("__child#")[0]]
            first = state.position_offset - count - request.prompt  # the offset is that of the tokens after these
            on = [acts(request.where, first + n) for n in range(count)]
            for name, values in tokens.items():
                strength = request.strengths.get(name, 0.0)
                values += [strength if acting else 0.0 for acting in on]
        threads = self._tuner.injector.threads
        size = max(self._manager.continuous_batching_config.max_batch_tokens or 0, *map(len, tokens.values()))
        static = self._manager.batch_processor.model_runner.pad_inputs  # compiled or captured: the same tensors every time
        for name, values in tokens.items():
            held = self._strengths.get(name)
            if held is None:
                held = self._strengths[name] = torch.zeros(1, size, device=self._tuner.model.device)
            held.zero_()
            held[0, : len(values)] = torch.tensor(values)
        irms = tuple(name for name, values in tokens.items() if static or any(values))
        threads.state.settings = replace(threads.default, strengths=self._strengths, irms=irms, packed=True)


class _BeforeForward(ContinuousBatchingLogitsProcessorList):  # type: ignore[misc]
    """A manager's processors; transformers shows them the requests of every batch before its forward, and so us."""

    def __init__(self, processors: ContinuousBatchingLogitsProcessorList, call: Any) -> None:
        self.__dict__.update(vars(processors))
        self._call = call

    def prepare_tensor_args(self, requests_in_batch: list[FutureRequestState], *args: Any, **kwargs: Any) -> Any:
        self._call(requests_in_batch)
        return super().prepare_tensor_args(requests_in_batch, *args, **kwargs)


def _line(error: object) -> str:
    return " ".join(str(error).split())[:200]
