"""Injection against an independent reference, on every family and on the embedded host."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import get_peft_model

import realigner as ra
from realigner.fingerprints import weights_hash
from realigner.irm_config import IRMConfig
from realigner.tiny import tiny_host
from realigner.tuner import tuner_of
from tests.reference import FAMILIES, reference_host

STRENGTH = 0.7
PAD = 0


def attach(host: Any, compact: bool = True, layers: Any = "all", std: float = 0.8) -> Any:
    """An IRM with deltas large enough to matter."""
    torch.manual_seed(1)
    preset = "compact" if compact else "paper"
    model = get_peft_model(host, IRMConfig(preset=preset, layers=layers, output_std=std if compact else None))
    return model.eval()


def ids(batch: int = 2, length: int = 9) -> torch.Tensor:
    return torch.randint(3, 100, (batch, length), generator=torch.Generator().manual_seed(5))


def pair(family: str, compact: bool = True, layers: Any = "all") -> tuple[Any, Any, Any]:
    """Bare host, realigned model, and reference host."""
    host = tiny_host(family)
    bare = copy.deepcopy(host)
    model = attach(host, compact, layers)
    network = tuner_of(model).registry.network("default")
    weights = {key: value.detach() for key, value in network.state_dict().items()}
    return bare, model, reference_host(bare, family, weights, network.layers, compact, STRENGTH)


@pytest.mark.parametrize("compact", [True, False], ids=["compact", "paper"])
@pytest.mark.parametrize("family", FAMILIES)
def test_full_forward(family: str, compact: bool) -> None:
    bare, model, reference = pair(family, compact)
    with torch.no_grad(), ra.strength(model, STRENGTH):
        got, want = model(input_ids=ids()).logits, reference(input_ids=ids()).logits
        assert (got - want).abs().max() < 1e-5
        if compact:  # large deltas: the test would notice a delta that does nothing
            seen = 5e-3 if family == "cohere" else 1e-2  # Cohere's logits are multiplied by 1/16
            assert (got - bare(input_ids=ids()).logits).abs().max() > seen


@pytest.mark.parametrize("family", FAMILIES)
def test_some_layers_only(family: str) -> None:
    _, model, reference = pair(family, layers=[1])
    assert tuner_of(model).registry.network("default").output.out_features == 32
    with torch.no_grad(), ra.strength(model, STRENGTH):
        assert (model(input_ids=ids()).logits - reference(input_ids=ids()).logits).abs().max() < 1e-5


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("cached", [True, False], ids=["cached", "uncached"])
@pytest.mark.parametrize("family", FAMILIES)
def test_generation(family: str, cached: bool, beams: int) -> None:
    _, model, reference = pair(family)
    options: dict[str, Any] = {
        "max_new_tokens": 8,
        "do_sample": False,
        "num_beams": beams,
        "use_cache": cached,
        "eos_token_id": None,
    }
    options |= {
        "attention_mask": torch.ones_like(ids()),
        "pad_token_id": PAD,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    with ra.strength(model, STRENGTH):
        got = model.generate(input_ids=ids(), **options)
    want = reference.generate(input_ids=ids(), **options)
    assert torch.equal(got.sequences, want.sequences)
    assert all((a - b).abs().max() < 1e-4 for a, b in zip(got.logits, want.logits, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_left_padded_batch(family: str) -> None:
    """A padded batch equals the reference, and each row equals itself alone."""
    _, model, reference = pair(family)
    long, short = ids(1, 9), ids(1, 5) + 1
    batch = torch.cat([long, torch.cat([torch.full((1, 4), PAD), short], dim=1)])
    mask = torch.ones_like(batch)
    mask[1, :4] = 0
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD}
    with ra.strength(model, STRENGTH):
        got = model.generate(input_ids=batch, attention_mask=mask, **options)
        alone = model.generate(input_ids=short, attention_mask=torch.ones_like(short), **options)
    want = reference.generate(input_ids=batch, attention_mask=mask, **options)
    assert torch.equal(got, want)
    assert torch.equal(got[1, 9:], alone[0, 5:])


@pytest.mark.parametrize("family", FAMILIES)
def test_strength_zero_and_unload_are_exact(family: str) -> None:
    bare, model, _ = pair(family)
    before = weights_hash(bare)
    with torch.no_grad():
        want = bare(input_ids=ids()).logits
        with ra.strength(model, 0.0):
            assert torch.equal(model(input_ids=ids()).logits, want)
        with model.disable_adapter():
            assert torch.equal(model(input_ids=ids()).logits, want)
        assert not torch.equal(model(input_ids=ids()).logits, want)
        host = model.unload()
        assert torch.equal(host(input_ids=ids()).logits, want)
    assert weights_hash(host) == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in host.modules())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_strength_zero(family: str, dtype: torch.dtype) -> None:
    host = tiny_host(family).to(dtype)
    want = host(input_ids=ids()).logits
    model = attach(host)
    with torch.no_grad(), ra.strength(model, 0.0):
        assert torch.equal(model(input_ids=ids()).logits, want)
    assert tuner_of(model).registry.network("default").output.weight.dtype == torch.float32


# --- the embedded host ----------------------------------------------------------------------------------------------------


@pytest.mark.proof
@pytest.mark.host
def test_embedded_host(embedded: tuple[Any, Any]) -> None:
    """In float32: full forward, cached, left-padded and beam generation within 1e-4 of the reference; exact when off."""
    host, tokenizer = embedded
    bare = copy.deepcopy(host)
    before = weights_hash(host)
    model = attach(host, std=0.02)
    network = tuner_of(model).registry.network("default")
    reference = reference_host(bare, "llama", network.state_dict(), network.layers, True, STRENGTH)
    batch = ra.generation.encode_prompts(tokenizer, ["How do magnets work?", "Why?"], host.device)
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
    try:
        with torch.no_grad(), ra.strength(model, STRENGTH):
            got, want = model(**batch).logits, reference(**batch).logits
            real = batch["attention_mask"].bool()
            assert (got - want)[real].abs().max() < 1e-4
            assert (want - bare(**batch).logits)[real].abs().max() > 0.1
            for beams in (1, 3):
                a = model.generate(**batch, **options, num_beams=beams)
                assert torch.equal(a, reference.generate(**batch, **options, num_beams=beams))
        with torch.no_grad():
            plain = bare(**batch).logits
            with ra.strength(model, 0.0):
                assert torch.equal(model(**batch).logits, plain)
    finally:
        model.unload()
    with torch.no_grad():
        assert torch.equal(host(**batch).logits, plain)
    assert weights_hash(host) == before
