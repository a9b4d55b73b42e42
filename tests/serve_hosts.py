"""Hosts, IRMs and replies for the tests of engines, made here in the ordinary environment: `make` writes them into a folder.

An engine runs in an environment of its own (.serve-env), so what it must answer is written as JSON.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model

from realigner.gguf_cache import EMBEDDED, embedded_folder
from realigner.hosts import load_host
from realigner.irm_config import IRMConfig
from realigner.tiny import tiny_host

# Bare, two IRMs at three strengths each, and a sum.
SETTINGS: tuple[dict[str, float], ...] = (
    *({}, {"anger": 1.0}, {"anger": -0.5}, {"anger": 1.5}, {"sadness": 1.0}, {"sadness": 0.5}, {"sadness": 2.0}),
    {"anger": 0.7, "sadness": -0.8},
)
TOKENS = 16
_SIZES = {  # what the engine's attention on a CPU asks for
    **{"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 256},
    **{"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32},
}


def make(
    place: Path, host_type: str, shapes: dict[str, dict[str, Any]] | None = None, sizes: dict[str, int] | None = None
) -> Path:
    """Write a host, two IRMs of random weights, and what `generate` replies to 4 prompts at each of the settings, one by one.

    Args:
        place: the folder to fill: ``host/`` (unless embedded), ``irms/anger/``, ``irms/sadness/``, ``replies.json``.
        host_type: a model type, for a tiny random host, or the embedded host's name.
        shapes: of the two IRMs; by default of the compact preset, the second with a part of the layers, and of edition 1 on a
            tiny host.
        sizes: of a tiny random host, where they are not those of `_SIZES`.
    """
    if host_type == EMBEDDED:
        host, folder = load_host(EMBEDDED, dtype="float32")[0], embedded_folder()
    else:
        host, folder = tiny_host(host_type, **_SIZES | (sizes or {})), place / "host"
        host.save_pretrained(folder)
    model = _with_irms(host, shapes or _shapes(host), 0.25 if host_type == EMBEDDED else 1.0)
    model.save_pretrained(place / "irms")
    vocabulary = host.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(5, vocabulary, (length,), generator=generator).tolist() for length in (6, 25, 60, 90)]
    replies = [
        {"prompt": prompt, "irms": irms, "tokens": reply(model, prompt, irms)} for prompt in prompts for irms in SETTINGS
    ]
    (place / "replies.json").write_text(json.dumps({"host": str(folder), "replies": replies}))
    return place


def reply(model: PeftModel, prompt: list[int], irms: dict[str, float]) -> list[int]:
    """The greedy reply of a model to one prompt, with IRMs at strengths."""
    ids = torch.tensor([prompt])
    with torch.no_grad():
        tokens = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            adapter_names=[tuple(irms)] if irms else ["__base__"],
            strength=irms or None,
            max_new_tokens=TOKENS,
            do_sample=False,
            pad_token_id=0,
        )
    found: list[int] = tokens[0, len(prompt) :].tolist()
    return found


def _shapes(host: Any) -> dict[str, dict[str, Any]]:
    some = {"layers": [0, 2], "masked": [3, 5]}
    return {"anger": {}, "sadness": some if host.config.num_hidden_layers > 3 else {**some, "edition": 1}}


def _with_irms(host: Any, shapes: dict[str, dict[str, Any]], std: float) -> PeftModel:
    for seed, (name, shape) in enumerate(shapes.items()):
        torch.manual_seed(seed)
        config = IRMConfig(**{"preset": "compact", "output_std": std, **shape})
        if seed == 0:
            model = get_peft_model(host, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
        for parameter in model.base_model.registry.networks[name].parameters():
            if parameter.dim() == 1:  # biases start at 0, where a mistake with them would not show
                torch.nn.init.normal_(parameter, std=std / 4)
    host.generation_config.eos_token_id = None  # replies of one length
    model.eval()
    return model
