"""Tiny random hosts with a channel planted in their residual stream, and rows to train on: explanations with a known truth."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

import realigner as ra
from realigner.tiny import tiny_host
from realigner.training import Recipe

Channel = Literal["", "constant", "random sign"]
Gain = Literal["zero", "one", "median"]
WIDTH, WORDS, PLANTED = 64, 100, 17


def planted_host(seed: int, channel: Channel = "", gain: Gain = "zero", size: float = 5.0) -> Any:
    """A Llama of 4 layers x 64 neurons with gains of its own, median 1. With a channel, its embedding at `PLANTED` has `size`
    times the usual size, the same in every token or with a random sign for each; the final norm's gain there is 0, 1 or the
    median."""
    sizes: dict[str, Any] = {
        "vocab_size": WORDS,
        "hidden_size": WIDTH,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "head_dim": 16,
    }
    host = tiny_host("llama", seed, initializer_range=WIDTH**-0.5, tie_word_embeddings=False, **sizes)
    generator = torch.Generator().manual_seed(1000 + seed)
    with torch.no_grad():
        for name, parameter in host.named_parameters():
            if "norm" in name:
                parameter.copy_(torch.exp(0.3 * torch.randn(WIDTH, generator=generator)))
        if channel:
            embedding, final = host.model.embed_tokens.weight, host.model.norm.weight
            sign = torch.sign(torch.randn(len(embedding), generator=generator)) if channel == "random sign" else 1.0
            embedding[:, PLANTED] = size * embedding.square().mean().sqrt() * sign
            final[PLANTED] = {"zero": 0.0, "one": 1.0, "median": float(final.median())}[gain]
    return host


def markov_rows(seed: int, count: int = 96, length: int = 28) -> list[ra.Row]:
    """Texts of a random Markov chain over all words: something that training can learn, of the same kind in every host."""
    rng = np.random.default_rng(seed)
    chances = np.exp(2 * rng.normal(size=(WORDS - 3, WORDS - 3)))
    chances /= chances.sum(axis=1, keepdims=True)
    rows = []
    for number in range(count):
        words = [int(rng.integers(WORDS - 3))]
        while len(words) < length:
            words.append(int(rng.choice(WORDS - 3, p=chances[words[-1]])))
        text = " ".join(f"w{word}" for word in words)
        facts = {
            "id": str(number),
            "group": f"g{number % 8}",
            "question": "w0",
            "answer": "a",
            "tone": "anger",
            "source": "test",
        }
        rows.append(ra.Row(text=text, **facts))
    return rows


def word_tokenizer() -> Any:
    """``w0`` to ``w96`` as tokens, after ``<pad>``, ``<bos>`` and ``<eos>``."""
    names = ["<pad>", "<bos>", "<eos>", *(f"w{word}" for word in range(WORDS - 3))]
    backend = Tokenizer(WordLevel({name: n for n, name in enumerate(names)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")


def planted_folder(place: Path, seed: int, channel: Channel = "", gain: Gain = "zero", size: float = 5.0) -> Recipe:
    """The same as a host's folder and a file of rows; the recipe that names them."""
    planted_host(seed, channel, gain, size).save_pretrained(place / "host")
    word_tokenizer().save_pretrained(place / "host")
    (place / "rows.jsonl").write_text("".join(row.model_dump_json() + "\n" for row in markov_rows(seed)))
    return Recipe(
        host=str(place / "host"),
        data=str(place / "rows.jsonl"),
        template="plain",
        dtype="float32",
        threads=1,
        batch_size=8,
        steps=120,
        seed=seed,
        samples=0,
        report_to=[],
        evaluations=1,
    )
