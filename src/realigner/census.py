"""The families of hosts that injection is proven on, as tiny random hosts that any machine builds in a moment.

`realigner hosts` probes each and prints what was found; the tests prove the injection itself on the same ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from realigner.errors import RealignerError, UsageError
from realigner.sites import find_sites

_SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 64,
    "vocab_size": 101,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "mixtral": {"num_local_experts": 2},
    "qwen2": {},
    "qwen3": {},
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4},
    "gpt_neox": {},
    "gemma2": {},
    "gemma3_text": {},
    "olmo2": {},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "phi": {},
    "granite": {"residual_multiplier": 0.22},
    "cohere": {},
    "gptj": {"n_embd": 32, "n_layer": 3, "n_head": 4, "rotary_dim": 8},
}


class Found(NamedTuple):
    """What the probe found on a family: its summary, or why it is refused."""

    family: str
    summary: dict[str, Any] | None
    refusal: str = ""


def tiny_host(family: str, seed: int = 0, **sizes: Any) -> PreTrainedModel:
    """A random host of a family, three layers of width 32 (give `sizes` to change its config), frozen and in eval mode.

    Example:
        >>> tiny_host("llama").config.num_hidden_layers
        3
    """
    if family not in FAMILIES:
        raise UsageError(f"family: unknown family {family!r}; known are {', '.join(FAMILIES)}")
    config = AutoConfig.for_model(family, **{**_SIZES, **FAMILIES[family], **sizes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        host: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    host.eval().requires_grad_(False)
    return host


def census() -> Iterator[Found]:
    """Probe every family."""
    for family in FAMILIES:
        try:
            yield Found(family, find_sites(tiny_host(family)).summary())
        except RealignerError as error:
            yield Found(family, None, str(error))
