# ruff: noqa: RUF001 - the marks of DeepSeek
"""Small tokenizers for real chat templates: the marks, flags and splitting of the real ones, with a vocabulary of bytes.

What a template's text becomes depends on its tokenizer: which marks are single tokens, which of them swallow the blanks beside
them, whether a text begins with a space of its own, what is merged across a boundary, what the post-processor adds. The
templates are in ``chat_templates/`` (its README says where they come from).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import GemmaTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

TEMPLATES = Path(__file__).parent / "chat_templates"

_LETTERS = [("t", "h"), ("th", "e"), ("i", "n"), ("a", "n"), ("o", "u")]
_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN = _LLAMA3.replace("{1,3}", "")


def template_of(name: str) -> str:
    """The chat template of a host of these tests."""
    return (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")


@cache
def host_tokenizer(name: str) -> Any:
    """The tokenizer of a host of these tests, its template with it."""
    tokenizer = HOSTS[name]()
    tokenizer.chat_template = template_of(name)
    tokenizer.padding_side = "left"
    return tokenizer


def _special(*tokens: str, **flags: bool) -> list[AddedToken]:
    return [AddedToken(token, special=True, normalized=False, **flags) for token in tokens]


def _plain(*tokens: str) -> list[AddedToken]:
    """Added tokens that are not special: decoding keeps them."""
    return [AddedToken(token, special=False, normalized=False) for token in tokens]


def _byte_level(
    added: list[AddedToken], split: str | None, bos: str | None, eos: str, pad: str, adds_bos: bool = False, nfc: bool = False
) -> Any:
    """Byte-level BPE, as GPT-2 and everything after it: `split` is the pattern of pre-tokenization (None: GPT-2's)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [*_LETTERS, ("Ċ", "Ċ"), ("Ġ", "Ġ"), ("Ġ", "the"), (".", "Ċ"), ("!", "Ċ"), (".", "ĊĊ"), (">", "Ċ"), (":", "Ġ")]
    vocab = {token: n for n, token in enumerate([*alphabet, *("".join(merge) for merge in merges)])}
    backend = Tokenizer(BPE(vocab=vocab, merges=merges))
    if nfc:
        backend.normalizer = normalizers.NFC()
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    backend.pre_tokenizer = (
        level if split is None else pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(split), "isolated"), level])
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens(added)
    if adds_bos and bos is not None:
        backend.post_processor = processors.TemplateProcessing(f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))])
    names = {"bos_token": bos} if bos is not None else {}
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, pad_token=pad, **names)


def _sentencepiece(start: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of a SentencePiece BPE with byte fallback; `start` has the first ids."""
    merges = [*_LETTERS, ("▁", "▁"), ("▁", "the"), ("▁▁", "▁▁"), ("▁", "I"), ("▁", "[")]
    letters = ["▁", *(chr(code) for code in range(33, 127))]
    tokens = [*start, *(f"<0x{byte:02X}>" for byte in range(256)), *letters, *("".join(merge) for merge in merges)]
    return {token: n for n, token in enumerate(dict.fromkeys(tokens))}, merges


def _llama(added: list[AddedToken] | None = None, **options: Any) -> Any:
    """Llama 2's kind: a text begins with a space of its own, ``<s>`` and ``</s>`` are its special tokens."""
    vocab, merges = _sentencepiece(["<unk>", "<s>", "</s>"])
    tokenizer = LlamaTokenizer(vocab=vocab, merges=merges, **options)
    tokenizer.add_tokens(added or [])
    return tokenizer


def _gemma(*marks: str) -> Any:
    """Gemma's kind: no space of its own; line feeds and runs of blanks are added tokens that are not special."""
    vocab, merges = _sentencepiece(["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *marks])
    tokenizer = GemmaTokenizer(vocab=vocab, merges=merges, add_bos_token=True)
    tokenizer.add_tokens(_special(*marks))
    tokenizer.add_tokens(_plain(*("\n" * n for n in range(1, 5)), *("▁" * n for n in range(2, 5)), "<b>", "</b>"))
    return tokenizer


def _phi3() -> Any:
    swallowing = _special("<|assistant|>", "<|system|>", "<|end|>", "<|user|>", rstrip=True)
    return _llama([*_special("<|endoftext|>"), *swallowing], eos_token="<|endoftext|>", pad_token="<|endoftext|>")


def _llama3() -> Any:
    marks = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|python_tag|>")
    return _byte_level(_special(*marks), _LLAMA3, "<|begin_of_text|>", "<|eot_id|>", "<|end_of_text|>", adds_bos=True)


def _qwen(*plain: str) -> Any:
    marks = _special("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
    tools = _plain("<tool_call>", "</tool_call>", *plain)
    return _byte_level([*marks, *tools], _QWEN, None, "<|im_end|>", "<|endoftext|>", nfc=True)


def _qwen3() -> Any:
    return _qwen("<tool_response>", "</tool_response>", "<think>", "</think>")


def _deepseek() -> Any:
    begin, end = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
    marks = [*_special(begin, end), *_plain("<｜User｜>", "<｜Assistant｜>", "<|EOT|>", "<think>", "</think>")]
    tools = ("<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>", "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>")
    return _byte_level([*marks, *_plain(*tools)], _QWEN, begin, end, end, adds_bos=True, nfc=True)


def _smollm2() -> Any:
    marks = _special("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<file_sep>", "<jupyter_start>")
    return _byte_level(marks, None, "<|im_start|>", "<|im_end|>", "<|im_end|>")


def _smolvlm() -> Any:
    marks = _special("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<end_of_utterance>")
    return _byte_level(marks, None, "<|im_start|>", "<end_of_utterance>", "<|im_end|>")


def _gpt_oss() -> Any:
    marks = ("<|startoftext|>", "<|endoftext|>", "<|return|>", "<|channel|>", "<|start|>", "<|end|>", "<|message|>", "<|call|>")
    return _byte_level(_special(*marks), _LLAMA3, "<|startoftext|>", "<|return|>", "<|endoftext|>")


HOSTS: dict[str, Callable[[], Any]] = {
    "llama2": lambda: _llama(legacy=False, add_bos_token=True),
    "llama3": _llama3,
    "mistral": lambda: _llama(legacy=False, add_bos_token=True),
    "zephyr": lambda: _llama(legacy=True, add_bos_token=True, pad_token="</s>"),
    "phi3": _phi3,
    "gemma2": lambda: _gemma("<start_of_turn>", "<end_of_turn>"),
    "gemma3": lambda: _gemma("<start_of_turn>", "<end_of_turn>", "<start_of_image>"),
    "qwen2_5": _qwen,
    "qwen3": _qwen3,
    "qwen3_thinking_2507": _qwen3,
    "qwen3_5": _qwen3,
    "deepseek_r1_distill": _deepseek,
    "smollm2": _smollm2,
    "smolvlm": _smolvlm,
    "gpt_oss": _gpt_oss,
}
