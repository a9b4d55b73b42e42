"""Answer prompts with a host or a realigned model, the same way everywhere: command line, report, evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from realigner.errors import UsageError
from realigner.prompts import prompt_ids
from realigner.tuner import template_of


def answer(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    max_new_tokens: int = 80,
    temperature: float = 0.0,
    repetition_penalty: float = 1.1,
    seed: int = 42,
    batch_size: int = 8,
    done: Callable[[int], None] | None = None,
) -> list[str]:
    """The replies to `prompts`, in order, as text.

    Args:
        model: a host, or a model with an IRM (at whatever strength is set).
        tokenizer: the host's.
        prompts: questions; each is put through the template that the IRM was trained with, else the host's chat template (see
            `data.prompt_ids`).
        max_new_tokens: of each reply.
        temperature: 0 for greedy replies, else that of sampling.
        repetition_penalty: above 1, tokens already in the text are made less likely (small hosts run in circles); 1 is off.
        seed: of the sampling, set anew for each batch. Greedy replies do not depend on it.
        batch_size: prompts at a time, padded on the left. In half precision, what a prompt shares its batch with can change
            a rounding and so a word.
        done: called with the number of prompts answered after each batch.

    Raises:
        UsageError: for an empty prompt or a bad number.

    Example:
        >>> answer(host, tokenizer, ["How many legs has a spider?"])  # doctest: +SKIP
        ['A spider has eight legs.']
    """
    for name, value, fits in (
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 1),
        ("batch_size", batch_size, batch_size >= 1),
        ("temperature", temperature, 0 <= temperature < 100),
        ("repetition_penalty", repetition_penalty, 0 < repetition_penalty < 100),
    ):
        if not fits:
            raise UsageError(f"{name}: {value} is out of range")
    if isinstance(prompts, str):
        raise UsageError("generate: give a list of prompts, not one string")
    for prompt in prompts:
        if not prompt.strip():
            raise UsageError("generate: a prompt is empty")
    device = next(parameter.device for parameter in model.parameters() if parameter.device.type != "meta")
    replies: list[str] = []
    for start in range(0, len(prompts), batch_size):
        inputs = encode_prompts(tokenizer, prompts[start : start + batch_size], device, template_of(model))
        sampling: dict[str, Any] = {"do_sample": temperature > 0, "repetition_penalty": repetition_penalty}
        if temperature > 0:
            sampling |= {"temperature": temperature, "top_p": 1.0, "top_k": 0}
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
            torch.manual_seed(seed)
            tokens = model.generate(**inputs, max_new_tokens=max_new_tokens, **sampling)  # type: ignore[operator]
        width = inputs["input_ids"].shape[1]
        replies += [tokenizer.decode(row[width:], skip_special_tokens=True).strip() for row in tokens]
        if done is not None:
            done(len(inputs["input_ids"]))
    return replies


def encode_prompts(
    tokenizer: Any, prompts: Sequence[str], device: torch.device, template: str = "chat"
) -> dict[str, torch.Tensor]:
    """``input_ids`` and ``attention_mask`` ``[prompt, position]``, padded on the left."""
    rows = [prompt_ids(tokenizer, prompt, template) for prompt in prompts]
    width = max(len(row) for row in rows)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return {"input_ids": ids, "attention_mask": mask}
