"""Tiny random hosts of every model type that `AutoModelForCausalLM` knows, from their config classes alone.

A config class is made tiny by its argument names: `_SIZES` gives the generic names small values, `_NAMES` the other names
that types give the same things. What a type needs besides, to run or to keep each kind of its layers, is in `OVERRIDES`.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

from realigner.errors import UsageError

MODEL_TYPES = tuple(sorted(CAUSAL))
_SIZES: dict[str, Any] = {
    "vocab_size": 101,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 64,
    "num_hidden_layers": 3,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "kv_lora_rank": 16,
    "hidden_size_per_layer_input": 16,
    "sliding_window": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "state_size": 16,
    "is_decoder": True,
    "embedding_multiplier": 12.0,
    "attention_multiplier": 0.125,
    "residual_multiplier": 0.22,
    "logits_scaling": 8.0,
}
_NAMES = {
    "vocab_size": "vocab_size_per_layer_input unpadded_vocab_size shape_vocab_size pronunciation_vocab_size",
    "bos_token_id": "decoder_start_token_id",
    "max_position_embeddings": "n_positions n_ctx max_seq_len model_max_length context_length max_target_positions "
    "original_max_position_embeddings",
    "num_hidden_layers": "n_layer n_layers num_layers num_blocks decoder_layers encoder_layers num_decoder_layers "
    "num_encoder_layers depth max_window_layers",
    "hidden_size": "d_model n_embd emb_dim dim embedding_size embedding_dim word_embed_proj_dim input_embedding_size "
    "output_embedding_size cross_attention_hidden_size hidden_size_global lru_width out_hidden_size "
    "adapter_in_dim adapter_input_size adapter_out_dim shape_embed_dim pronunciation_embed_dim ext_pw_out_channel "
    "depthwise_separable_out_channel nemo_conv_channels",
    "intermediate_size": "ffn_dim decoder_ffn_dim encoder_ffn_dim ffn_hidden_size feed_forward_size d_inner dff dim_ff "
    "shared_intermediate_size shared_experts_intermediate_size expert_ffn_hidden_size dense_intermediate_size "
    "intermediate_size_mlp prefix_dense_intermediate_size",
    "num_attention_heads": "n_head n_heads num_heads attention_heads decoder_attention_heads encoder_attention_heads "
    "num_decoder_attention_heads num_encoder_attention_heads swa_num_attention_heads index_n_heads linear_num_heads "
    "linear_num_key_heads linear_num_value_heads",
    "num_key_value_heads": "num_kv_heads kv_n_heads num_query_groups swa_num_key_value_heads global_num_key_value_heads "
    "num_global_key_value_heads",
    "head_dim": "attention_head_size kv_channels dim_head d_head d_kv d_rel rotary_dim qk_rope_head_dim "
    "qk_nope_head_dim v_head_dim index_head_dim swa_head_dim swa_v_head_dim global_head_dim linear_head_dim "
    "linear_key_head_dim linear_value_head_dim",
    "kv_lora_rank": "q_lora_rank o_lora_rank",
    "hidden_size_per_layer_input": "laurel_rank router_hidden_size",
    "sliding_window": "sliding_window_size local_attention attention_window_size attention_chunk_size chunk_size "
    "mamba_chunk_size local_attention_window_len lsh_attn_chunk_length local_attn_chunk_length",
    "num_experts": "n_routed_experts num_local_experts moe_num_experts",
    "num_experts_per_tok": "num_experts_per_token moe_topk moe_k moe_top_k",
    "moe_intermediate_size": "moe_shared_expert_intermediate_size shared_expert_intermediate_size",
    "first_k_dense_replace": "num_dense_layers",
    "n_group": "topk_group num_expert_group n_shared_experts",
    "mamba_num_heads": "mamba_n_heads",
    "mamba_head_dim": "mamba_headdim mamba_d_head",
    "state_size": "mamba_d_state ssm_state_size time_step_rank mamba_dt_rank",
}
# Given even where a type's default is None, which elsewhere means that it goes without.
_ALWAYS = {"pad_token_id", "bos_token_id", "eos_token_id", "head_dim", "num_key_value_heads", "num_experts_per_tok"}

_CONV = {"layer_types": ["conv", "conv", "full_attention"]}
_DENSE_FIRST = {"mlp_layer_types": ["dense", "sparse", "sparse"]}
_SLIDING = {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"num_hidden_layers": 3, "encoder_hash_byte_group_vocab": 64},
    "cohere2_moe": _DENSE_FIRST,
    "cohere_compass_text": {
        **_SLIDING,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
            "full_attention": None,
        },
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_v4": {"compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4}},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1},
    "dots3_note_text": {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 8,
    },
    "falcon_h1": {
        "mamba_d_ssm": 64,
        "lm_head_multiplier": 0.04,
        "mlp_multipliers": [0.9, 0.6],
        "key_multiplier": 0.4,
        "attention_in_multiplier": 1.1,
        "attention_out_multiplier": 0.9,
        "ssm_in_multiplier": 1.25,
        "ssm_out_multiplier": 0.24,
        "ssm_multipliers": [0.35, 0.25, 0.36, 0.5, 0.31],
    },
    "flint": {"mlp_only_layers": [0]},
    "gemma3n_text": {"layer_types": ["sliding_attention", "full_attention", "full_attention"], "num_kv_shared_layers": 1},
    "gpt_neo": {"attention_types": [[["global"], 1], [["local"], 1], [["global"], 1]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "linear_attention", "full_attention"]},
    "inkling_text": _DENSE_FIRST,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 0},
    "laguna": {**_SLIDING, "num_attention_heads_per_layer": [8, 8, 4]},
    "lfm2": _CONV,
    "lfm2_moe": _CONV,
    "llama4_text": {"interleave_moe_layer_step": 2},
    "longcat_flash": {"zero_expert_num": 2},
    "mamba2": {"num_heads": 8},
    "mellum": _SLIDING,
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "full_attention", "minimax_m3_sparse"], **_DENSE_FIRST},
    "ministral": _SLIDING,
    "mllama_text_model": {"cross_attention_layers": [1]},
    "nemotron_h": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
        "n_groups": 2,
    },
    "qwen4_exp_text": {
        "hc_lowrank": 16,
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
        "ple_layer_ids": [1],
        "heads_per_ngram": 2,
        "ngram_vocab_size_base": 31,
    },
    "recurrent_gemma": {"block_types": ["recurrent", "recurrent", "attention"]},
    "reformer": {"axial_pos_shape": [8, 8], "axial_pos_embds_dim": [16, 16], "hash_seed": 0},
    "xlm": {"causal": True},
    "xlnet": {"attn_type": "uni"},
    "xlstm": {"qk_dim_factor": 2.0, "v_dim_factor": 4.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid", "hybrid"]},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid", "hybrid"]},
    "zaya": {"layer_types": ["hybrid_sliding", "hybrid_sliding", "hybrid"], "sliding_window": 16, "num_experts_per_tok": 1},
}
_MUSIC = "its decoder reads audio codebooks, not text ids, and is built only from the nested decoder config"
_ASSISTANT = "a drafter that reads another model's hidden states and key/value states, not input_ids"
UNBUILDABLE: dict[str, str] = {
    "gemma3n": "its vision tower needs the timm package; gemma3n_text is its decoder",
    "gemma4_assistant": _ASSISTANT,
    "gemma4_unified_assistant": _ASSISTANT,
    "musicgen": _MUSIC,
    "musicgen_melody": _MUSIC,
}


def _spread(sizes: dict[str, Any]) -> dict[str, Any]:
    """Sizes under every name that config classes may give them."""
    return {name: value for generic, value in sizes.items() for name in (generic, *_NAMES.get(generic, "").split())}


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
