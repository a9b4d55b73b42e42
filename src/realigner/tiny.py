"""Tiny random hosts of every model type that `AutoModelForCausalLM` knows, from their config classes alone.

A config class is made tiny by its argument names. ``tiny_hosts.json`` has the tables: ``sizes`` gives the generic names small
values, ``other_names`` are what types call the same things, ``overrides`` what a type needs besides, to run or to keep each
kind of its layers, ``unbuildable`` the reasons for those that are left out.
"""

from __future__ import annotations

import json
from dataclasses import fields
from importlib.resources import files
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

from realigner.errors import UsageError

MODEL_TYPES = tuple(sorted(CAUSAL))
_TABLES: dict[str, dict[str, Any]] = json.loads((files("realigner") / "tiny_hosts.json").read_text(encoding="utf-8"))
_SIZES, _NAMES, OVERRIDES, UNBUILDABLE = (_TABLES[key] for key in ("sizes", "other_names", "overrides", "unbuildable"))
# Given even where a type's default is None, which elsewhere means that it goes without.
_ALWAYS = {"pad_token_id", "bos_token_id", "eos_token_id", "head_dim", "num_key_value_heads", "num_experts_per_tok"}


def _spread(sizes: dict[str, Any]) -> dict[str, Any]:
    """Sizes under every name that config classes may give them."""
    return {name: value for generic, value in sizes.items() for name in (generic, *_NAMES.get(generic, ()))}


def _arguments(config_class: type[PreTrainedConfig], sizes: dict[str, Any]) -> dict[str, Any]:
    """The arguments that make a config class tiny, its nested configs included."""
    default, alias = vars(config_class()), config_class.attribute_map
    overrides = OVERRIDES.get(config_class.model_type, {})
    asked = {**sizes, **{alias[name]: value for name, value in sizes.items() if name in alias}}
    tiny = {**_spread(_SIZES), **_spread(sizes), **asked}
    depth = alias.get("num_hidden_layers", "num_hidden_layers")
    layers = asked.get(depth, overrides.get(depth, _SIZES["num_hidden_layers"]))
    names = {field.name for field in fields(config_class)}
    arguments: dict[str, Any] = {}
    for name in names - {name for name in names if alias.get(name) in names}:
        value = default.get(alias.get(name, name))
        if name in asked or (name in tiny and (value is not None or name in _ALWAYS)):
            arguments[name] = tiny[name]
        elif isinstance(value, PreTrainedConfig):
            arguments[name] = _arguments(type(value), sizes)
        elif isinstance(value, list | tuple) and len(value) == default.get(depth):
            kinds = [kind for place, kind in enumerate(value) if kind not in value[:place]]
            if len(kinds) < len(value):  # a kind per layer, where indices of layers would all differ
                arguments[name] = ([kinds[0]] * (layers - len(kinds)) + kinds)[-layers:]
    for name, value in overrides.items():
        per_layer = isinstance(value, list) and name.endswith(("types", "block_type", "per_layer"))
        arguments[name] = asked.get(name, (value * layers)[-layers:] if per_layer else value)
    if "kv_lora_rank" in arguments and "num_key_value_heads" not in asked:
        arguments["num_key_value_heads"] = arguments["num_attention_heads"]
    return arguments


def tiny_config(model_type: str, **sizes: Any) -> PreTrainedConfig:
    """The config of a tiny host of a model type: three layers of width 32, with each kind of layer that the type has.

    Args:
        model_type: A model type that `AutoModelForCausalLM` knows.
        **sizes: Other sizes, by their generic names (`hidden_size`, `num_hidden_layers`, ...), which the type's own names
            follow, or by any argument of the config class.

    Raises:
        UsageError: Where there is no such type, or it cannot be built.

    Example:
        >>> tiny_config("gpt2", hidden_size=64).n_embd
        64
    """
    if model_type in UNBUILDABLE:
        raise UsageError(f"model_type: no tiny {model_type}: {UNBUILDABLE[model_type]}")
    if model_type not in MODEL_TYPES:
        raise UsageError(f"model_type: unknown type {model_type!r}; known are {', '.join(MODEL_TYPES)}")
    config_class: type[PreTrainedConfig] = CONFIG_MAPPING[model_type]
    own = {name: value for name, value in sizes.items() if name not in _SIZES}
    return config_class(**{**own, **_arguments(config_class, sizes)})


def tiny_host(model_type: str, seed: int = 0, **sizes: Any) -> PreTrainedModel:
    """A random host of a model type, three layers of width 32 (`sizes` as in `tiny_config`), frozen and in eval mode.

    Example:
        >>> tiny_host("llama").config.num_hidden_layers
        3
    """
    config = tiny_config(model_type, **sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        host: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    host.eval().requires_grad_(False)
    return host


def move_scales(host: PreTrainedModel, seed: int = 1) -> PreTrainedModel:
    """Move norms, biases and learned scales (parameters of one axis at most) off their initial values, in place.

    Ones and zeros hide how a host uses them: a learned factor on the residual stream is no factor at 1.

    Example:
        >>> bool((move_scales(tiny_host("llama")).model.norm.weight == 1).any())
        False
    """
    generator = torch.Generator().manual_seed(seed)
    for parameter in host.parameters():
        if parameter.ndim < 2:
            parameter.data += (0.3 * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype)
    return host
