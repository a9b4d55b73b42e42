"""The probe: what it finds, in every precision, and what it refuses."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from realigner.census import FAMILIES, census, tiny_host
from realigner.errors import RealignerError
from realigner.sites import find_layers, find_sites

SEQUENTIAL = {
    "gpt2": "attn",
    "gemma2": "post_attention_layernorm",
    "gemma3_text": "post_attention_layernorm",
    "olmo2": "post_attention_layernorm",
}
PARALLEL = {"gpt_neox": "attention", "phi": "self_attn", "cohere": "self_attn", "gptj": "attn"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_known_sites(family: str, dtype: torch.dtype) -> None:
    found = find_sites(tiny_host(family).to(dtype)).summary()
    assert found["kind"] == ("parallel" if family in PARALLEL else "sequential")
    assert found["branch"] == PARALLEL.get(family, SEQUENTIAL.get(family, "self_attn"))
    assert found["scale"] == (0.22 if family == "granite" else 1.0)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_probe_leaves_the_host_as_it_was(family: str) -> None:
    host = tiny_host(family)
    host.train()
    modes = [module.training for module in host.modules()]
    state = copy.deepcopy(host.state_dict())
    rng = torch.get_rng_state()
    find_sites(host)
    assert [module.training for module in host.modules()] == modes
    assert all(torch.equal(a, b) for a, b in zip(state.values(), host.state_dict().values(), strict=True))
    assert torch.equal(rng, torch.get_rng_state())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in host.modules())


def test_a_host_without_the_residual_is_refused() -> None:
    class Tangled(nn.Module):
        """A layer whose attention adds the residual itself."""

        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            out: torch.Tensor = self.inner(hidden_states, **kwargs)
            return out * 1.5

    host = tiny_host("llama")
    host.model.layers[1] = Tangled(host.model.layers[1])
    with pytest.raises(RealignerError, match="layer 1 has no post-attention residual"):
        find_sites(host)


def test_a_skip_path_that_misses_the_delta_is_refused() -> None:
    """The reader sees x + branch, but the layer's output is built from a second copy of the branch."""
    host = tiny_host("llama")
    layer = host.model.layers[2]

    def forward(hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        attention = layer.self_attn
        normed = layer.input_layernorm(hidden_states)
        seen = hidden_states + attention(hidden_states=normed, **kwargs)[0]
        kept = hidden_states + attention.forward(hidden_states=normed, **kwargs)[0]  # not through __call__: no hook
        out: torch.Tensor = kept + layer.mlp(layer.post_attention_layernorm(seen))
        return out

    layer.forward = forward
    with pytest.raises(RealignerError, match=r"layer 2.*misses the skip path"):
        find_sites(host)


def test_layers_path() -> None:
    host = tiny_host("llama")
    assert find_layers(host, "model.layers")[2] == "model.layers"
    for wrong in ("model.nothing", "model.layers.0"):
        with pytest.raises(RealignerError, match="layers_path"):
            find_layers(host, wrong)


def test_bloom_is_refused_by_name() -> None:
    from transformers import BloomConfig, BloomForCausalLM

    host = BloomForCausalLM(BloomConfig(hidden_size=16, n_layer=2, n_head=2, vocab_size=50))
    with pytest.raises(RealignerError, match="BloomForCausalLM"):
        find_sites(host)


def test_census_supports_every_family() -> None:
    assert all(found.summary is not None for found in census())
