"""Tiny hosts that have learned something: twelve families, trained on the authored set's plain replies, for training to act on.

A random host says nothing of training: its residual stream and its gradients are not those of a model that has learned. These
are trained for a few hundred steps on neutral and sad replies, so that an IRM for anger has something to change.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments, set_seed

from realigner.chat_format import ChatFormat
from realigner.data import Row, authored
from realigner.data.tokens import clip, encoded
from realigner.hosts import HostInfo
from realigner.tiny import tiny_host
from realigner.training import Recipe, train
from realigner.training.batches import Collator, EncodedRows
from tests.tiny import TEMPLATE

FAMILIES = ("llama", "qwen2", "gpt2", "gpt_neox", "gemma2", "phi", "falcon", "bloom", "opt", "olmo2", "cohere", "granite")
DEEP = "llama, a hundredfold"  # its residual at the first site is a hundredth of that at the last
_WORDS = 1000
_HUNDREDFOLD = 40.0  # what large writing matrices are multiplied by
_SIZES: dict[str, Any] = {
    "vocab_size": _WORDS,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}


_OWN: dict[str, dict[str, Any]] = {
    "cohere": {"logit_scale": 1.0}
}  # its 1/16 is for wide hosts: at this width nothing is learned


def small_tokenizer() -> Any:
    """A tokenizer of 1,000 tokens, learned from the authored set, with a chat template."""
    texts = [text for tone in ("anger", "sadness", "neutral") for row in authored(tone) for text in (row.question, row.text)]
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<pad>", "<eos>", "<|system|>", "<|user|>", "<|assistant|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator(texts, BpeTrainer(vocab_size=_WORDS, special_tokens=special, initial_alphabet=alphabet))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")
    tokenizer.padding_side = "left"
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def trained_host(family: str, folder: Path, steps: int = 300, seed: int = 0) -> tuple[Any, Any]:
    """A tiny host that was trained on neutral and sad replies, and its tokenizer, as `load_host` would give them.

    Args:
        family: a model type, or `DEEP`.
        folder: a place for what Trainer writes.
        steps: of 16 rows.
        seed: of its weights and the order of rows.
    """
    tokenizer = small_tokenizer()
    host = tiny_host(family if family in FAMILIES else "llama", seed=seed, **_SIZES, **_OWN.get(family, {}))
    if family == DEEP:
        with torch.no_grad():  # what is written from the first MLP on is large
            for name, weight in host.named_parameters():
                later = not name.startswith("model.layers.0.") or "mlp" in name
                if name.endswith(("o_proj.weight", "down_proj.weight")) and later:
                    weight.mul_(_HUNDREDFOLD)
    rows = [row for tone in ("neutral", "sadness") for row in authored(tone)]
    examples = clip([item for _, item in encoded(ChatFormat(tokenizer), rows, "text")], rows, 96)
    set_seed(seed)
    host.train().requires_grad_(True)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=16,
        learning_rate=3e-3,
        warmup_steps=20,
        lr_scheduler_type="cosine",
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=seed,
        remove_unused_columns=False,
    )
    collate = Collator(0)

    def batch(items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        made = collate(items)
        return {key: made[key] for key in ("input_ids", "attention_mask", "labels")}

    Trainer(host, arguments, train_dataset=EncodedRows(examples), data_collator=batch).train()
    host.eval().requires_grad_(False)
    host.realigner = HostInfo("", tokenizer)
    return host, tokenizer


def losses_by_step(host: Any, tokenizer: Any, rows: list[Row], out: Path, **keys: Any) -> list[float]:
    """The validation loss before training and after every step of the default recipe (`keys` of it changed)."""
    recipe = Recipe(samples=0, report_to=[], max_length=96, **keys)
    run = train(host, tokenizer, rows, out, recipe, evaluations=recipe.steps, quiet=True)
    run.model.unload()
    losses: list[float] = run.record["validation_loss"]
    return losses


def longest_above(losses: list[float]) -> int:
    """Steps that the validation loss is above its start's without a break, at most."""
    longest = now = 0
    for loss in losses[1:]:
        now = now + 1 if loss > losses[0] else 0
        longest = max(longest, now)
    return longest
