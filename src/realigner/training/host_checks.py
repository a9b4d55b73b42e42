"""Checks on a host before training: the size of its residual stream, and problems that would spoil the training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from realigner.chat_format import PLAIN_NOTE, THOUGHT_NOTE, ChatFormat, has_chat_template
from realigner.data.tokens import clip, encoded
from realigner.errors import RealignerError, UsageError
from realigner.hosts import has_slow_bfloat16, positions_of
from realigner.probe import as_in_evaluation
from realigner.training.batches import Collator, Prepared
from realigner.training.loss import row_losses, takes_logits_to_keep
from realigner.training.recipe import Recipe
from realigner.tuner import tuner_of

_SHOWN_SIZES = 8  # of residuals, in a line
_ROWS = 4  # of validation, in both forms
_CLEARLY = 0.5  # nats per token by which the other form is better


def residual_facts(model: PeftModel) -> dict[str, Any]:
    """The entry ``residual`` of run.json: root mean square of the residual at each site, and what the IRM made of it."""
    tuner = tuner_of(model)
    network = tuner.registry.network("default")
    scales = {"input_scale": network.input_scale, "delta_scale": network.delta_scale}
    return {"rms": [float(f"{size:.4g}") for size in tuner.residual_sizes], **scales}


def residual_line(residual: Mapping[str, Any]) -> str:
    """`residual_facts` in a line."""
    sizes = [f"{size:.3g}" for size in residual["rms"]]
    if len(sizes) > _SHOWN_SIZES:
        inner = range(1, _SHOWN_SIZES - 1)
        sizes = [sizes[0], *(sizes[at * len(sizes) // (_SHOWN_SIZES - 1)] for at in inner), sizes[-1]]
    layers = f"{len(residual['rms'])} layers, first to last"
    scales = residual["delta_scale"]
    by = f"{min(scales):.3g} to {max(scales):.3g}" if isinstance(scales, list) else f"{scales:.3g}"
    return f"residual stream: RMS {' '.join(sizes)} ({layers}); deltas are multiplied by {by}"


def check_tokens(texts: Iterable[tuple[str, Sequence[int]]], tokenizer: Any, config: Any) -> None:
    """Raise for a token that the host has no embedding for.

    Args:
        texts: name and tokens of each.
        tokenizer, config: the host's.

    Raises:
        RealignerError: naming the token and the first text that has it.
    """
    vocabulary = getattr(config.get_text_config(decoder=True), "vocab_size", None)
    if not isinstance(vocabulary, int):
        return
    remedy = (
        f"but the host has {vocabulary} (0 to {vocabulary - 1}); take the host's own tokenizer, or "
        "host.resize_token_embeddings(len(tokenizer))"
    )
    for name, ids in texts:
        if (most := max(ids)) >= vocabulary:
            raise RealignerError(f"{name}: {tokenizer.convert_ids_to_tokens(most)!r} is token {most}, {remedy}")
    if (pad := getattr(tokenizer, "pad_token_id", None) or 0) >= vocabulary:
        raise RealignerError(f"the padding token {tokenizer.pad_token!r} is token {pad}, {remedy}")


def host_notes(host: nn.Module, tokenizer: Any, prepared: Prepared, recipe: Recipe) -> Iterator[str]:
    """Notes and warnings about a host before training, one line each; `recipe` is resolved."""
    if recipe.template == "plain" and not has_chat_template(tokenizer):
        yield PLAIN_NOTE
    if prepared.skips_thought:
        yield THOUGHT_NOTE
    if not ChatFormat(tokenizer, recipe.template, recipe.chat_template_kwargs).ends:
        yield (
            "warning: the tokenizer has no end token, so no reply has an end that could be learned, and generation will not "
            "stop; set tokenizer.eos_token"
        )
    pad = getattr(tokenizer, "pad_token_id", None)
    if recipe.loss_on_padding and pad != tokenizer.eos_token_id and pad not in tokenizer.all_special_ids:
        shown = "token 0" if pad is None else repr(tokenizer.pad_token)
        yield f"warning: padding counts in the loss and is {shown}, which is text; set tokenizer.pad_token to the end token"
    if recipe.dtype == "float16":
        yield "warning: in a float16 host small gradients become 0, and large numbers infinite; set dtype=bfloat16 or float32"
    if recipe.dtype == "bfloat16" and has_slow_bfloat16(next(host.parameters()).device):
        yield "warning: this CPU multiplies bfloat16 many times more slowly than float32; set dtype=auto or float32"
    if has_chat_template(tokenizer):
        yield from _form_note(host, tokenizer, prepared, recipe)


def _form_note(host: nn.Module, tokenizer: Any, prepared: Prepared, recipe: Recipe) -> Iterator[str]:
    """A warning where the host predicts the rows' replies clearly better in the form that the recipe does not take."""
    forms = (recipe.template, "plain" if recipe.template == "chat" else "chat")
    try:
        chosen, other = (_reply_loss(host, tokenizer, prepared, recipe, form) for form in forms)
    except (RealignerError, UsageError):  # rows that have no such form, or a host that cannot read it
        return
    if chosen - other > _CLEARLY:
        yield (
            f"warning: the bare host predicts replies better in the {forms[1]} form ({other:.2f} nats per token) than in the "
            f"{forms[0]} form ({chosen:.2f}); if it was not trained on that, set template={forms[1]}"
        )


def _reply_loss(host: nn.Module, tokenizer: Any, prepared: Prepared, recipe: Recipe, form: str) -> float:
    """Nats per token of the replies of a few rows, in one form, under the bare host."""
    chat_format = ChatFormat(tokenizer, form, recipe.chat_template_kwargs if form == "chat" else None)
    rows, examples = zip(*encoded(chat_format, prepared.split.validation[:_ROWS]), strict=True)
    collator = Collator(getattr(tokenizer, "pad_token_id", None) or 0)
    cut = clip(examples, rows, recipe.max_length)
    check_tokens(((row.id, example["input_ids"]) for row, example in zip(rows, cut, strict=True)), tokenizer, host.config)
    positions = positions_of(host.config)
    if positions is not None and positions < max(len(example["input_ids"]) for example in cut):
        raise RealignerError(f"the {form} form of the rows is longer than {positions} positions")
    batch = collator([{**example, "row": n} for n, example in enumerate(cut)])
    device = next(host.parameters()).device
    with as_in_evaluation(host), torch.no_grad():
        # A host that is offloaded moves its inputs itself.
        inputs = batch if device.type == "meta" else {name: values.to(device) for name, values in batch.items()}
        sums, counts = row_losses(host, inputs, takes_logits_to_keep(host))
    return float(sums.sum() / counts.sum())
