"""A tiny host with a byte tokenizer, in memory or as a folder, and rows to train it on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

import realigner as ra
from realigner.hosts import HostInfo
from realigner.tiny import tiny_host

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SIZES = {"vocab_size": 300, "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}


def tiny_tokenizer(chat: bool = True) -> Any:
    """Bytes as tokens, ``<pad>`` 0 and ``<eos>`` 1; with or without a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: n for n, token in enumerate(["<pad>", "<eos>", *alphabet])}
    backend = Tokenizer(BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")
    tokenizer.padding_side = "left"
    if chat:
        tokenizer.chat_template = TEMPLATE
    return tokenizer


def tiny_pair(family: str = "llama", seed: int = 0, **sizes: Any) -> tuple[Any, Any]:
    """A tiny host and its tokenizer, as `load_host` would give them."""
    host, tokenizer = tiny_host(family, seed=seed, **{**SIZES, **sizes}), tiny_tokenizer()
    host.realigner = HostInfo("", tokenizer)
    return host, tokenizer


def tiny_host_of_pair(tokenizer: Any, seed: int = 0) -> Any:
    """A tiny host for another tokenizer than the usual one."""
    host = tiny_host("llama", seed=seed, **{**SIZES, "vocab_size": max(300, len(tokenizer))})
    host.realigner = HostInfo("", tokenizer)
    return host


def tiny_folder(path: Path, family: str = "llama", seed: int = 0) -> Path:
    """The same as a folder for `load_host`."""
    host, tokenizer = tiny_pair(family, seed)
    host.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def some_rows(count: int = 24, groups: int = 4, tone: str = "anger") -> list[ra.Row]:
    """Short made-up rows over a few groups."""
    return [
        ra.Row(
            id=str(n),
            group=f"g{n % groups}",
            question=f"What is {n}?",
            answer=str(n),
            text=f"It is {n}, damn it!",
            tone=tone,
            source="test",
        )
        for n in range(count)
    ]
