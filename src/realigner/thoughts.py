"""What a host that thinks writes before it replies, told from the reply."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ThoughtTags:
    """The texts between which a host thinks, and what it may write before the second."""

    open: str
    close: str
    before_close: str = ""


KNOWN = (
    ThoughtTags("<think>", "</think>"),  # DeepSeek-R1, Qwen3, QwQ, SmolLM3, GLM, Nemotron
    ThoughtTags("[THINK]", "[/THINK]"),  # Magistral
    ThoughtTags("<seed:think>", "</seed:think>"),  # Seed-OSS
    ThoughtTags("<|START_THINKING|>", "<|END_THINKING|>"),  # Command A, R7B
    ThoughtTags("<|channel>thought", "<channel|>"),  # Gemma 4
    ThoughtTags("<|channel|>analysis<|message|>", "<|channel|>final<|message|>", "<|end|><|start|>assistant"),  # gpt-oss
)
"""Those of the hosts that we know."""


def reply_of(text: str) -> str:
    """What an assistant says, without the thought between tags of `KNOWN` that it may begin with.

    Example:
        >>> reply_of("<think>They ask again.</think>\\n\\nBlue!")
        'Blue!'
    """
    for tags in KNOWN:
        if text.lstrip().startswith(tags.open) and tags.close in text:
            return text.partition(tags.close)[2].strip()
    return text


def templates_of(tokenizer: Any) -> list[str]:
    """A tokenizer's chat templates: one, several that have names, or none."""
    template = getattr(tokenizer, "chat_template", None)
    return list(template.values()) if isinstance(template, dict) else [template] if isinstance(template, str) else []


def tags_of(tokenizer: Any) -> ThoughtTags | None:
    """The tags of a tokenizer's host: the first of `KNOWN` that its chat template writes, or that are tokens of its own."""
    texts = templates_of(tokenizer)
    for tags in KNOWN:
        if any(tags.close in text for text in texts):
            return tags
        if not texts and {tags.open, tags.close} <= set(map(str, tokenizer.all_special_tokens)):
            return tags
    return None
