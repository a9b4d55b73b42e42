"""The probe: what it finds, in every precision, and what it refuses."""

from __future__ import annotations

import copy
from contextlib import suppress
from functools import partial
from typing import Any

import pytest
import torch

from realigner.errors import RealignerError
from realigner.locate import find_layers, find_sites
from realigner.tiny import tiny_host
from tests.reference import FAMILIES

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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["lfm2", "lfm2_moe", "jamba"])
def test_half_precision_finds_the_same_sites_or_none(family: str, dtype: torch.dtype) -> None:
    """A branch too small to show (initial weights: convolutions give 5e-6 where the input is 2e-2) is not taken for none: such
    a host is refused. With branches of a trained host's size the sites are those of float32."""
    host = tiny_host(family)
    with suppress(RealignerError):
        assert find_sites(copy.deepcopy(host).to(dtype)).summary() == find_sites(host).summary()
    with torch.no_grad():
        for parameter in host.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
    assert find_sites(copy.deepcopy(host).to(dtype)).summary() == find_sites(host).summary()


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


def with_forward(index: int, forward: Any) -> Any:
    """A tiny Llama, one layer of which computes something else."""
    host = tiny_host("llama")
    host.model.layers[index].forward = partial(forward, host.model.layers[index])
    return host


def attended(layer: Any, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    out: torch.Tensor = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **kwargs)[0]
    return out


def test_a_host_without_the_residual_is_refused() -> None:
    def forward(layer: Any, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        seen = torch.tanh(hidden_states + attended(layer, hidden_states, **kwargs))
        out: torch.Tensor = seen + layer.mlp(layer.post_attention_layernorm(seen))
        return out

    with pytest.raises(RealignerError, match="layer 1 has no post-attention residual"):
        find_sites(with_forward(1, forward))


def test_a_skip_path_that_misses_the_delta_is_refused() -> None:
    """The reader sees x + branch, but the layer's output is built from a second copy of the branch."""

    def forward(layer: Any, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        seen = hidden_states + attended(layer, hidden_states, **kwargs)
        normed = layer.input_layernorm(hidden_states)
        kept = hidden_states + layer.self_attn.forward(hidden_states=normed, **kwargs)[0]  # not through __call__: no hook
        out: torch.Tensor = kept + layer.mlp(layer.post_attention_layernorm(seen))
        return out

    with pytest.raises(RealignerError, match=r"layer 2.*more than the residual"):
        find_sites(with_forward(2, forward))


def test_an_mlp_that_reads_the_input_too_is_refused() -> None:
    def forward(layer: Any, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        seen = hidden_states + attended(layer, hidden_states, **kwargs)
        gate = torch.sigmoid(layer.input_layernorm(hidden_states))
        out: torch.Tensor = seen + gate * layer.mlp(layer.post_attention_layernorm(seen))
        return out

    with pytest.raises(RealignerError, match=r"layer 0.*more than the residual"):
        find_sites(with_forward(0, forward))


def test_layers_that_run_twice_or_share_a_branch_are_refused() -> None:
    host = tiny_host("llama")
    layers = host.model.layers
    layers[2] = layers[1]
    with pytest.raises(RealignerError, match="layer 1 runs 2 times"):
        find_sites(host)
    host = tiny_host("llama")
    host.model.layers[2].self_attn = host.model.layers[0].self_attn
    with pytest.raises(RealignerError, match="layer 2 shares the module self_attn with layer 0"):
        find_sites(host)


def test_several_lists_of_layers_are_refused() -> None:
    """BLT has an encoder, a global and a decoder stack; which is meant is the user's to say."""
    host = tiny_host("blt")
    with pytest.raises(RealignerError, match=r"local_decoder.layers.*name one with layers_path"):
        find_sites(host)
    assert find_layers(host, "model.local_decoder.layers")[2] == "model.local_decoder.layers"


def test_layers_path() -> None:
    host = tiny_host("llama")
    assert find_layers(host, "model.layers")[2] == "model.layers"
    for wrong in ("model.nothing", "model.layers.0"):
        with pytest.raises(RealignerError, match="layers_path"):
            find_layers(host, wrong)
