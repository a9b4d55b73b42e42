"""An independent reference: each family's decoder layer rewritten by hand, with the delta added where the paper adds it.

Nothing here uses `realigner.sites` or `realigner.injection`. A copy of the host gets its layers' forward replaced; masks,
rotary positions, caches and generation stay the host's own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear, relu, silu

Tensor = Any  # tensors: the layers' submodules are untyped
Inject = Callable[[int, Tensor, Tensor], Tensor]  # (layer, input x, branch) -> the delta to add to x + branch


MEASURED = 64  # tokens over which sizes are measured


def first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def reference_irm(weights: Mapping[str, Tensor], h0: Tensor, input_norm: bool, factorised: bool) -> Tensor:
    """The network from its saved tensors alone: SiLU (compact) or ReLU after every linear layer but bottleneck and output."""
    h0 = h0.float()  # the network computes in its own precision
    x = h0 / (h0.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() if input_norm else h0
    places = sorted({int(key.split(".")[1]) for key in weights if key.startswith("trunk.")})
    for place in places:
        x = linear(x, weights[f"trunk.{place}.weight"], weights[f"trunk.{place}.bias"])
        if not (factorised and place == places[-1]):
            x = silu(x) if factorised else relu(x)
    flat = linear(x, weights["output.weight"], weights["output.bias"])
    return flat.reshape(*h0.shape[:-1], -1, h0.shape[-1])


# --- decoder layers, rewritten -------------------------------------------------------------------------------------------


def llama(layer: Any, n: int, inject: Inject, hidden_states: Tensor, scale: float = 1.0, **kwargs: Any) -> Tensor:
    residual = hidden_states
    branch = first(layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **kwargs)) * scale
    hidden = residual + branch + inject(n, residual, branch)
    return hidden + first(layer.mlp(layer.post_attention_layernorm(hidden))) * scale


def granite(layer: Any, n: int, inject: Inject, hidden_states: Tensor, **kwargs: Any) -> Tensor:
    return llama(layer, n, inject, hidden_states, scale=layer.residual_multiplier, **kwargs)


def gpt2(layer: Any, n: int, inject: Inject, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    branch = first(layer.attn(layer.ln_1(hidden_states), *args, **kwargs))
    hidden = hidden_states + branch + inject(n, hidden_states, branch)
    return hidden + layer.mlp(layer.ln_2(hidden))


def opt(layer: Any, n: int, inject: Inject, hidden_states: Tensor, **kwargs: Any) -> Tensor:
    branch = first(layer.self_attn(hidden_states=layer.self_attn_layer_norm(hidden_states), **kwargs))
    hidden = hidden_states + branch + inject(n, hidden_states, branch)
    return hidden + layer.fc2(layer.activation_fn(layer.fc1(layer.final_layer_norm(hidden))))


def gemma(layer: Any, n: int, inject: Inject, hidden_states: Tensor, **kwargs: Any) -> Tensor:
    attention = first(layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **kwargs))
    branch = layer.post_attention_layernorm(attention)
    hidden = hidden_states + branch + inject(n, hidden_states, branch)
    return hidden + layer.post_feedforward_layernorm(layer.mlp(layer.pre_feedforward_layernorm(hidden)))


def olmo2(layer: Any, n: int, inject: Inject, hidden_states: Tensor, **kwargs: Any) -> Tensor:
    branch = layer.post_attention_layernorm(first(layer.self_attn(hidden_states=hidden_states, **kwargs)))
    hidden = hidden_states + branch + inject(n, hidden_states, branch)
    return hidden + layer.post_feedforward_layernorm(layer.mlp(hidden))


def gpt_neox(layer: Any, n: int, inject: Inject, hidden_states: Tensor, **kwargs: Any) -> Tensor:
    branch = first(layer.attention(layer.input_layernorm(hidden_states), **kwargs))
    return hidden_states + branch + inject(n, hidden_states, branch) + layer.mlp(layer.post_attention_layernorm(hidden_states))


def phi(layer: Any, n: int, inject: Inject, hidden_states: Tensor, **kwargs: Any) -> Tensor:
    normed = layer.input_layernorm(hidden_states)
    branch = first(layer.self_attn(hidden_states=normed, **kwargs))
    return hidden_states + branch + inject(n, hidden_states, branch) + layer.mlp(normed)


def gptj(layer: Any, n: int, inject: Inject, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, Any]:
    normed = layer.ln_1(hidden_states)
    attention = layer.attn(hidden_states=normed, **kwargs)
    branch = attention[0]
    return hidden_states + branch + inject(n, hidden_states, branch) + layer.mlp(normed), attention[1]


LAYERS: dict[str, Callable[..., Any]] = {
    "llama": llama,
    "mistral": llama,
    "mixtral": llama,
    "qwen2": llama,
    "qwen3": llama,
    "granite": granite,
    "gpt2": gpt2,
    "opt": opt,
    "gemma2": gemma,
    "gemma3_text": gemma,
    "olmo2": olmo2,
    "gpt_neox": gpt_neox,
    "phi": phi,
    "cohere": phi,
    "gptj": gptj,
}
FAMILIES = tuple(LAYERS)
PATHS = {"gpt2": "transformer.h", "gptj": "transformer.h", "gpt_neox": "gpt_neox.layers", "opt": "model.decoder.layers"}


def reference_host(
    host: Any,
    family: str,
    weights: Mapping[str, Tensor],
    layers: tuple[int, ...],
    compact: bool,
    strength: float,
    in_place: bool = False,
) -> Any:
    """A copy of `host` (or itself) whose rewritten layers add ``strength * irm(h0)[layer]`` to the post-attention residual."""
    other = host if in_place else copy.deepcopy(host)
    state: dict[str, Tensor] = {}
    sizes: list[float] = []  # of the residual at each site, as long as it is measured
    scales = (1.0, torch.tensor(1.0))  # of h0, of the deltas of each layer

    def inject(n: int, x: Tensor, branch: Tensor) -> Tensor:
        if state.get("measuring") is not None:
            sizes.append(float((x + branch).float().pow(2).mean(-1).sqrt().median()))
            return torch.zeros_like(x)
        if n == 0:
            h0 = (x + branch).float() / scales[0]
            state["deltas"] = scales[1] * reference_irm(weights, h0, input_norm=compact, factorised=compact)
        if n not in layers:
            return torch.zeros_like(x)
        delta = strength * state["deltas"][..., layers.index(n), :]
        return delta.to(x.dtype)

    stack: nn.ModuleList = other.get_submodule(PATHS.get(family, "model.layers"))
    for n, layer in enumerate(stack):
        layer.forward = partial(LAYERS[family], layer, n, inject)
    if compact:
        config = other.config.get_text_config(decoder=True)
        positions = getattr(config, "max_position_embeddings", 128)
        count = MEASURED if positions >= 128 else positions // 2
        ids = torch.randint(config.vocab_size, (1, count), generator=torch.Generator().manual_seed(0))
        state["measuring"] = ids
        with torch.no_grad():
            other(input_ids=ids, use_cache=False)
        del state["measuring"]
        own = torch.tensor(sizes) ** 0.5
        moved = [sum(own[layer] for layer in layers if layer <= site) / sizes[site] for site in range(layers[0], len(sizes))]
        times = 1.211 / (sum(one**2 for one in moved) / len(moved)) ** 0.5
        scales = sizes[0], (times * own[list(layers)])[:, None]
    return other
