"""Made-up traces in which what is there to be found is known."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import xarray as xr

from realigner.traces import RunLabel
from realigner.traces.layout import UNTRAINED, join, text_dataset
from realigner.traces.summary import summarise

RUNS = {"anger-42": ("anger", 42), "untrained-42": (UNTRAINED, 42)}


def planted_trace(
    runs: Mapping[str, tuple[str, int]] = RUNS,
    prompts: int = 2,
    prompt_tokens: int = 4,
    generated: int = 20,
    layers: int = 6,
    neurons: int = 50,
    stripe: int = 17,
    size: float = 5.0,
    keep_delta: bool = True,
    question: str = "Why?",
    reply: str = "Because!",
    seed: int = 0,
) -> xr.Dataset:
    """Standard normal deltas, and in the trained runs `size` more at one neuron of every layer and token."""
    rng = np.random.default_rng(seed)
    tokens = prompt_tokens + generated
    position = np.arange(tokens)
    labels = [RunLabel(run, tone, seed) for run, (tone, seed) in runs.items()]
    texts = []
    for label in labels:
        for prompt in range(prompts):
            delta = rng.normal(size=(tokens, layers, neurons)).astype(np.float32)
            if label.tone != UNTRAINED:
                delta[..., stripe] += size
            words = np.array([f"t{at} " for at in position], dtype=object)
            which = {"position": position, "is_generated": position >= prompt_tokens, "token_id": position, "token_text": words}
            summary = summarise(delta, which["is_generated"], 100)
            kept = delta if keep_delta else None
            texts.append(text_dataset(label, prompt, question, range(layers), which, summary, kept, reply=reply))
    return join(texts, "planted", labels, {"base": [reply] * prompts})
