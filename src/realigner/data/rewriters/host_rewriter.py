"""The host rewriter: any loaded host, prompts of like length together, through transformers' continuous batching.

Sampling is seeded row by row: the noise that picks a token depends on (seed, tone, fact, attempt, position) and not on what
else is in the batch (the Gumbel-max trick: the largest of log-probability plus Gumbel noise is a sample). So a resumed build
asks for the same replies; only rounding (another batch in half precision) can change one.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
    ContinuousBatchingLogitsProcessorList,
)
from transformers.generation.continuous_batching.requests import FutureRequestState

from realigner.batching import HostBatchManager, prove_batches
from realigner.chat_format import WITHOUT_THOUGHT, ChatFormat
from realigner.data.rewriters import Reply, RewriteRequest, messages, seed_of
from realigner.data.tone import Tone
from realigner.errors import RealignerError, UsageError
from realigner.fingerprints import fingerprint
from realigner.generation import gumbel

_NUCLEUS = 64  # never more than the likeliest so many tokens are sampled from, whatever top_p says
_PAGE = 32  # tokens of a block of the cache
_MEASURED = 200  # of the longest prompts by bytes, to find the longest by tokens
_ADVICE = "; rewrite with another host"


@dataclass(eq=False, repr=False)
class HostRewriter:
    """Asks a host for replies, with the tone's instruction and two of its examples before each fact.

    Raises:
        UsageError: for a number out of range.
        RealignerError: when replies are requested: the host gives other tokens in continuous batches than alone.
    """

    host: PreTrainedModel  # host, tokenizer: from `load_host`
    tokenizer: Any
    tone: Tone  # what is asked for
    seed: int = 42  # of the sampling
    # temperature, top_p: of the sampling, which is among the 64 likeliest tokens at most; the paper's are 0.9 and 0.7.
    # Temperature 0 is greedy. (The paper's repetition penalty has no place in continuous batching; the quality filter rejects
    # what runs in circles, by length.)
    temperature: float = 0.9
    top_p: float = 0.7
    max_new_tokens: int = 120  # of a reply; the paper's 210 is for a 7-billion-parameter host
    batch_size: int = 32  # replies in the making at a time
    examples: int = 2  # of the tone, shown before the fact

    def __post_init__(self) -> None:
        for name, fits in (
            ("temperature", 0 <= self.temperature < 100),
            ("top_p", 0 < self.top_p <= 1),
            ("max_new_tokens", self.max_new_tokens >= 1),
            ("batch_size", self.batch_size >= 1),
            ("examples", self.examples >= 0),
        ):
            if not fits:
                raise UsageError(f"{name}: {getattr(self, name)} is out of range")
        self._tokens = 0
        self._checked = False
        self._format = ChatFormat(self.tokenizer)
        if self._format.tags is not None:  # a thought is no reply
            self._format = ChatFormat(self.tokenizer, chat_template_kwargs=WITHOUT_THOUGHT)

    def spec(self) -> dict[str, Any]:
        identity = fingerprint(self.host)
        host = {"host": identity.name, "architecture": identity.architecture}
        host["dtype"] = str(self.host.dtype).removeprefix("torch.")
        settings = ("seed", "temperature", "top_p", "max_new_tokens", "examples")
        return {"rewriter": "host"} | host | {name: getattr(self, name) for name in settings}

    def note(self) -> str:
        return f"{self._tokens:,} tokens written" if self._tokens else ""

    def rewrite(self, requests: Sequence[RewriteRequest], verified: bool = False) -> Generator[Reply, None, None]:
        if not requests:
            return
        self._check_host(requests)
        # By bytes, of which a token has about as many in any script.
        waiting = sorted(requests, key=lambda r: (len((r.fact.question + r.fact.answer).encode()), r.fact.id), reverse=True)
        longest = max(len(self._prompt(request)) for request in waiting[:_MEASURED])
        in_flight: dict[str, tuple[RewriteRequest, int]] = {}
        with closing(self._running(longest + _PAGE)) as manager:
            while waiting or in_flight:
                while waiting and len(in_flight) < 2 * self.batch_size:
                    request = waiting.pop()
                    prompt = self._prompt(request)
                    name = f"{request.fact.id}/{request.attempt}"
                    in_flight[name] = request, len(prompt)
                    seeds = {"seed": seed_of(self.seed, self.tone, request)} if self.temperature > 0 else {}
                    manager.queue(prompt, name, eos_token_id=self._ends(), **seeds)
                result = manager.next()
                request, read = in_flight.pop(result.request_id)
                written = len(result.generated_tokens)
                self._tokens += written
                yield Reply(request.fact.id, request.attempt, self._text(result.generated_tokens), read, written)

    def _check_host(self, requests: Sequence[RewriteRequest]) -> None:
        """Prove, once, that continuous batches give what the host gives alone (`batching.prove_batches`)."""
        if self._checked:
            return
        prompts = [self._prompt(requests[0]), self._prompt(requests[0])[3:]]
        proof = self._running(max(map(len, prompts)) + _PAGE, greedy=True)
        prove_batches(self.host, prompts, proof, _ADVICE)
        self._checked = True

    def _running(self, longest: int, greedy: bool = False) -> HostBatchManager:
        """The host's manager, started, with our sampling in place of its own; for prompts of at most `longest` tokens."""
        sizes: dict[str, Any] = {}
        if self.host.device.type == "cpu":  # elsewhere it fits itself to the free memory
            blocks = self.batch_size * (-(-(longest + self.max_new_tokens) // _PAGE) + 1)
            sizes = {"num_blocks": blocks, "max_batch_tokens": max(256, 8 * self.batch_size)}
        settings = GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            eos_token_id=self._ends(),
            pad_token_id=self.tokenizer.pad_token_id,
        )
        batching = ContinuousBatchingConfig(
            page_size=_PAGE, max_requests_per_batch=self.batch_size, use_async_batching=False, **sizes
        )
        manager = HostBatchManager(self.host, settings, batching, advice=_ADVICE)
        sampling = None
        if self.temperature > 0 and not greedy:
            processors = LogitsProcessorList([SeededSampling(self.temperature, self.top_p)])
            sampling = ContinuousBatchingLogitsProcessorList(processors)
            sampling.tensors_required = 1
        manager.start(sampling)
        return manager

    def _prompt(self, request: RewriteRequest) -> list[int]:
        turns = messages(self.tone, request.fact, self.examples)
        if self._format.is_plain:  # a base model: instruction, questions and answers, to go on with
            lines = [turns[0]["content"], ""]
            for turn in turns[1:]:
                lines.append(turn["content"] if turn["role"] == "user" else f"Rewritten: {turn['content']}\n")
            return list(self.tokenizer("\n".join([*lines, "Rewritten:"]))["input_ids"])
        try:
            return self._format.prompts([turns])[0]
        except RealignerError:  # of a template without a system role
            first = {"role": "user", "content": f"{turns[0]['content']}\n\n{turns[1]['content']}"}
            return self._format.prompts([[first, *turns[2:]]])[0]

    def _ends(self) -> list[int]:
        ends = self.host.generation_config.eos_token_id if self.host.generation_config else None
        ends = self.tokenizer.eos_token_id if ends is None else ends
        return [-1] if ends is None else list(ends) if isinstance(ends, list) else [ends]

    def _text(self, tokens: Sequence[int]) -> str:
        _, text = self._format.split(tokens, opened=False)
        if self._format.is_plain:
            text = text.split("\n")[0]  # a base model goes on with the next question
        text = " ".join(text.split())
        return text[1:-1].strip() if len(text) > 2 and text[0] == text[-1] == '"' and text.count('"') == 2 else text


class SeededSampling(ContinuousBatchingLogitsProcessor):  # type: ignore[misc]
    """Turns scores into ones whose largest is a sample, drawn with the request's own ``seed`` (an option of ``queue``)."""

    supported_kwargs: dict[str, type] = {"seed": int}  # noqa: RUF012
    ignored_kwargs: tuple[str, ...] = ()

    def __init__(self, temperature: float, top_p: float) -> None:
        self.temperature, self.top_p = temperature, top_p

    def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
        int32_tensor.fill_(0)

    def prepare_tensor_args(self, requests_with_new_token: list[FutureRequestState]) -> torch.Tensor:
        """One seed a row, from the request's seed and how far its text has come (unchanged when a request is put off)."""
        states = [request.state for request in requests_with_new_token]
        mixed = [
            (s.logit_processor_kwargs.get("seed", 0) * 1_000_003 + len(s.initial_tokens) + len(s.generated_tokens)) % 2**31
            for s in states
        ]
        return torch.tensor(mixed, dtype=torch.int32)

    def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:
        """``[row, vocabulary]`` -> the same, all but the nucleus at minus infinity, Gumbel noise added there."""
        logits, tokens = torch.topk(scores.float() / self.temperature, min(_NUCLEUS, scores.shape[-1]))
        log_probabilities = logits - torch.logsumexp(scores.float() / self.temperature, dim=-1, keepdim=True)
        probabilities = log_probabilities.exp()
        before = probabilities.cumsum(dim=-1) - probabilities  # mass of the likelier tokens; the first is always kept
        generators = [torch.Generator().manual_seed(int(seed)) for seed in tensor_arg[: scores.shape[0]]]
        noise = torch.stack([gumbel(logits.shape[-1], generator) for generator in generators])
        noisy = (log_probabilities + noise.to(scores.device)).masked_fill(before >= self.top_p, -torch.inf)
        return torch.full_like(scores, -torch.inf).scatter(-1, tokens, noisy.to(scores.dtype))
