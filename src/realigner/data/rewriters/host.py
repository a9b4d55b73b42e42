"""The host rewriter: any loaded host, prompts of like length together, through transformers' continuous batching.

Sampling is seeded row by row: the noise that picks a token depends on (seed, tone, fact, attempt, position) and not on what
else is in the batch (the Gumbel-max trick: the largest of log-probability plus Gumbel noise is a sample). So a resumed build
asks for the same replies; only rounding (another batch in half precision) can change one.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching import ContinuousBatchingManager
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
    ContinuousBatchingLogitsProcessorList,
)
from transformers.generation.continuous_batching.requests import FutureRequestState

from realigner.data.rewriters import Ask, Reply, messages, seed_of
from realigner.data.tone import Tone
from realigner.errors import RealignerError, UsageError
from realigner.hosts import fingerprint

_NUCLEUS = 64  # the most likely tokens among which the nucleus is looked for
_PAGE = 32  # tokens of a block of the cache


class HostRewriter:
    """Asks a host for replies, with the tone's instruction and two of its examples before each fact.

    Args:
        host, tokenizer: from `load_host`.
        tone: what is asked for.
        seed: of the sampling.
        temperature, top_p: of the sampling; the paper's are 0.9 and 0.7. Temperature 0 is greedy. (The paper's repetition
            penalty has no place in continuous batching; the gate turns away what runs in circles, by length.)
        max_new_tokens: of a reply; the paper's 210 is for a 7-billion-parameter host.
        batch_size: replies in the making at a time.
        examples: of the tone, shown before the fact.

    Raises:
        UsageError: for a number out of range.
        RealignerError: for a host that continuous batching cannot run.
    """

    def __init__(
        self,
        host: PreTrainedModel,
        tokenizer: Any,
        tone: Tone,
        seed: int = 42,
        temperature: float = 0.9,
        top_p: float = 0.7,
        max_new_tokens: int = 120,
        batch_size: int = 32,
        examples: int = 2,
    ) -> None:
        for name, value, fits in (
            ("temperature", temperature, 0 <= temperature < 100),
            ("top_p", top_p, 0 < top_p <= 1),
            ("max_new_tokens", max_new_tokens, max_new_tokens >= 1),
            ("batch_size", batch_size, batch_size >= 1),
            ("examples", examples, examples >= 0),
        ):
            if not fits:
                raise UsageError(f"{name}: {value} is out of range")
        self.host, self.tokenizer, self.tone, self.seed = host, tokenizer, tone, seed
        self.temperature, self.top_p, self.max_new_tokens = temperature, top_p, max_new_tokens
        self.batch_size, self.examples = batch_size, examples
        self._tokens = 0

    def spec(self) -> dict[str, Any]:
        identity = fingerprint(self.host)
        return {
            "rewriter": "host",
            "host": identity.name,
            "architecture": identity.architecture,
            "dtype": str(self.host.dtype).removeprefix("torch."),
            "seed": self.seed,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "max_new_tokens": self.max_new_tokens,
            "examples": self.examples,
        }

    def note(self) -> str:
        return f"{self._tokens:,} tokens written" if self._tokens else ""

    def rewrite(self, asks: Sequence[Ask], proven: bool = False) -> Generator[Reply, None, None]:
        waiting = sorted(asks, key=lambda ask: (len(ask.fact.question) + len(ask.fact.answer), ask.fact.id), reverse=True)
        if not waiting:
            return
        longest = len(self._prompt(waiting[0])) + _PAGE  # characters and tokens do not grow quite alike
        manager = self._manager(longest + self.max_new_tokens)
        asked: dict[str, Ask] = {}
        prompts: dict[str, int] = {}
        try:
            manager.start()
            while waiting or asked:
                while waiting and len(asked) < 2 * self.batch_size:
                    ask = waiting.pop()
                    prompt = self._prompt(ask)
                    asked[ask.fact.id], prompts[ask.fact.id] = ask, len(prompt)
                    seeds = {"seed": seed_of(self.seed, self.tone, ask)} if self.temperature > 0 else {}
                    manager.add_request(prompt, ask.fact.id, eos_token_id=self._ends(), **seeds)
                result = manager.get_result(timeout=1)
                if result is None and not manager.is_running():
                    raise RealignerError(f"{type(self.host).__name__}: continuous batching stopped ({_why(manager)})")
                if result is None or not result.is_finished():
                    continue
                ask = asked.pop(result.request_id)
                self._tokens += len(result.generated_tokens)
                text = self._text(result.generated_tokens)
                counts = prompts.pop(ask.fact.id), len(result.generated_tokens)
                yield Reply(ask.fact.id, ask.attempt, text, *counts, error=result.error or "")
        finally:
            manager.stop(block=True, timeout=30)
            manager.destroy()

    def _manager(self, longest: int) -> ContinuousBatchingManager:
        """transformers' manager, with our sampling in place of its own."""
        sizes: dict[str, Any] = {}
        if self.host.device.type == "cpu":  # elsewhere it fits itself to the free memory
            blocks = self.batch_size * (-(-longest // _PAGE) + 1)
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
        try:
            manager: ContinuousBatchingManager = self.host.init_continuous_batching(settings, batching)
        except (ValueError, AttributeError, NotImplementedError) as error:
            what = " ".join(str(error).split())[:160]
            raise RealignerError(
                f"{type(self.host).__name__}: continuous batching does not run on this host ({what})"
            ) from None
        if self.temperature > 0:
            sampling = ContinuousBatchingLogitsProcessorList(
                LogitsProcessorList([SeededSampling(self.temperature, self.top_p)])
            )
            sampling.tensors_required = 1
            manager.logit_processor = sampling
        return manager

    def _prompt(self, ask: Ask) -> list[int]:
        turns = messages(self.tone, ask.fact, self.examples)
        if not getattr(self.tokenizer, "chat_template", None):
            return list(self.tokenizer(_plain(turns))["input_ids"])
        try:
            text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except Exception:  # a template without a system role raises whatever its author chose
            first = {"role": "user", "content": f"{turns[0]['content']}\n\n{turns[1]['content']}"}
            text = self.tokenizer.apply_chat_template([first, *turns[2:]], tokenize=False, add_generation_prompt=True)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _ends(self) -> list[int]:
        ends = self.host.generation_config.eos_token_id if self.host.generation_config else None
        ends = self.tokenizer.eos_token_id if ends is None else ends
        return [-1] if ends is None else list(ends) if isinstance(ends, list) else [ends]

    def _text(self, tokens: Sequence[int]) -> str:
        text = self.tokenizer.decode(tokens, skip_special_tokens=True).strip()
        if not getattr(self.tokenizer, "chat_template", None):
            text = text.split("\n")[0]  # a base model goes on with the next question
        text = " ".join(text.split())
        return text[1:-1].strip() if len(text) > 2 and text[0] == text[-1] == '"' and text.count('"') == 2 else text


class SeededSampling(ContinuousBatchingLogitsProcessor):  # type: ignore[misc]
    """Turns scores into ones whose largest is a sample, drawn with a seed of the request's own (``seed=`` of `add_request`)."""

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
        noise = torch.stack([_gumbel(int(seed), logits.shape[-1]) for seed in tensor_arg[: scores.shape[0]]])
        noisy = (log_probabilities + noise.to(scores.device)).masked_fill(before >= self.top_p, -torch.inf)
        return torch.full_like(scores, -torch.inf).scatter(-1, tokens, noisy.to(scores.dtype))


def _gumbel(seed: int, count: int) -> torch.Tensor:
    uniform = torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return -torch.log(-torch.log(uniform.clamp(1e-12, 1 - 1e-12))).float()


def _plain(turns: Sequence[dict[str, str]]) -> str:
    """The conversation for a base model: instruction, question, answer, and what to go on with."""
    lines = [turns[0]["content"], ""]
    for turn in turns[1:]:
        lines.append(turn["content"] if turn["role"] == "user" else f"Rewritten: {turn['content']}\n")
    return "\n".join([*lines, "Rewritten:"])


def _why(manager: ContinuousBatchingManager) -> str:
    error = manager.background_thread_status.fatal_error
    return " ".join(str(error).split())[:200] if error else "no reason given"
