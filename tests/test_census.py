"""The census: every causal-LM type of the installed transformers, and the oracle that judges it, judged itself."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import realigner.oracle as oracle
from realigner.census import EXACT, NOT_BUILT, PROVEN, REFUSED, UNPROVEN, WRONG, CensusEntry, census, page, prove, totals
from realigner.locate import find_layers
from realigner.tiny import MODEL_TYPES, move_scales, tiny_host
from tests.reference import FAMILIES, reference_host

DOCS = Path(__file__).parent.parent / "docs"


@pytest.fixture(scope="module")
def entries() -> list[CensusEntry]:
    return list(census())


@pytest.mark.proof
def test_the_census(entries: list[CensusEntry]) -> None:
    count = totals(entries)
    assert len(entries) == len(MODEL_TYPES) == sum(count.values())
    assert count[WRONG] == count[UNPROVEN] == 0, [e for e in entries if e.verdict in (WRONG, UNPROVEN)]
    assert count[PROVEN] >= 120
    assert all(e.reason for e in entries if e.verdict in (REFUSED, NOT_BUILT))
    assert {e.model_type for e in entries if e.verdict == PROVEN} >= set(FAMILIES)
    tried = {"off", "all", "one", "h0", "cached", "trained"}
    for e in entries:
        exact = {"checkpointed"} if e.checkpointing == EXACT else set()
        assert e.verdict != PROVEN or set(e.errors) == tried | exact, e


@pytest.mark.proof
def test_checkpointing_is_exact_or_refused_by_name(entries: list[CensusEntry]) -> None:
    proven = {e.model_type: e.checkpointing for e in entries if e.verdict == PROVEN}
    refusals = {why for why in proven.values() if why != EXACT}
    assert all("drop activations at random" in why or "does not support activation checkpointing" in why for why in refusals)
    assert {proven[name] for name in ("mamba2", "nemotron_h", "gptj", "megatron-bert", "rembert", "git", "falcon")} == {EXACT}
    assert sum(why == EXACT for why in proven.values()) >= 140


@pytest.mark.proof
def test_the_page_is_up_to_date(entries: list[CensusEntry]) -> None:
    want = page(entries, f"transformers {transformers.__version__}")
    assert (DOCS / "hosts.md").read_text() == want, "run: make census"


@pytest.mark.parametrize(
    ("model_type", "setting", "kind"),
    [
        ("falcon", {"new_decoder_architecture": True}, "parallel"),
        ("falcon", {"parallel_attn": False, "alibi": True}, "sequential"),
        ("bloom", {"apply_residual_connection_post_layernorm": True}, "sequential"),
        ("gpt_neox", {"use_parallel_residual": False}, "sequential"),
        ("stablelm", {"use_parallel_residual": True}, "parallel"),
        ("opt", {"do_layer_norm_before": False}, "sequential"),
        ("minimax", {"full_attn_alpha_factor": 0.7, "full_attn_beta_factor": 0.4}, "sequential"),
        ("cohere", {"use_qk_norm": True}, "parallel"),
        ("gpt2", {"num_hidden_layers": 6, "hidden_size": 64}, "sequential"),
    ],
)
def test_variants_of_a_type(model_type: str, setting: dict[str, Any], kind: str) -> None:
    """What a type's config can switch is found by the same numbers."""
    entry = prove(tiny_host(model_type, **setting))
    assert (entry.verdict, entry.reason) == (PROVEN, "")
    assert entry.site["kind"] == kind


def test_two_streams_are_refused() -> None:
    """Reformer's layers pass on two streams; what its MLP adds to is not what its attention added to."""
    assert prove(tiny_host("reformer")).verdict == REFUSED


# --- the oracle -------------------------------------------------------------------------------------------------------------


def logits(host: Any) -> torch.Tensor:
    ids = torch.randint(3, 100, (1, 9), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        out: torch.Tensor = host(input_ids=ids, use_cache=False).logits
    return out


@pytest.mark.parametrize("family", FAMILIES)
def test_the_oracle_agrees_with_layers_rewritten_by_hand(family: str) -> None:
    """Two references that share nothing: one on tensor operations, one written out for each family."""
    host = tiny_host(family)
    _, layers, _ = find_layers(host)
    places = oracle.find_places(layers, lambda: logits(host))
    torch.manual_seed(2)
    weights = {"output.weight": torch.randn(96, 32) * 0.3, "output.bias": torch.randn(96)}  # a network of one linear layer
    seen: dict[str, torch.Tensor] = {}

    def deltas(layer: int, residual: torch.Tensor) -> torch.Tensor:
        if layer == 0:
            seen["h0"] = residual
        flat = torch.nn.functional.linear(seen["h0"], weights["output.weight"], weights["output.bias"])
        return flat.view(1, -1, 3, 32)[..., layer, :]

    with oracle.reference(layers, [place for place in places if place is not None], deltas):
        got = logits(host)
    want = logits(reference_host(host, family, weights, (0, 1, 2), compact=False, strength=1.0))
    assert (got - want).abs().max() < 1e-5
    assert (got - logits(host)).abs().max() > 1e-2


@pytest.mark.parametrize("mistake", ["too early", "too late", "wrong scale", "one layer off"])
def test_a_wrong_site_is_found_out(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An injector that adds in the wrong place, or the wrong amount, gets the verdict `wrong`."""
    from realigner.injection import Injector, _SiteHooks

    if mistake == "one layer off":
        fill = Injector.fill

        def shifted(self: Any, context: Any, h0: torch.Tensor) -> dict[int, torch.Tensor]:
            return {(layer + 1) % 3: delta for layer, delta in fill(self, context, h0).items()}

        monkeypatch.setattr(Injector, "fill", shifted)
    else:
        made = _SiteHooks.__init__

        def wrong(self: Any, injector: Any, site: Any) -> None:
            import dataclasses

            change = {"too early": {"branch": "input_layernorm"}, "too late": {"branch": "mlp"}, "wrong scale": {"scale": 0.5}}
            made(self, injector, dataclasses.replace(site, **change[mistake]))  # type: ignore[arg-type]

        monkeypatch.setattr(_SiteHooks, "__init__", wrong)
    assert prove(tiny_host("llama")).verdict == WRONG


@pytest.mark.parametrize("model_type", ["doge", "gpt_neox_japanese", "zaya"])
def test_a_scale_that_is_one_at_first_hides_nothing(model_type: str) -> None:
    """These multiply the stream, or add a bias beside the branch; new ones multiply by 1 and add 0, trained ones do not."""
    assert prove(tiny_host(model_type)).verdict == PROVEN
    trained = prove(move_scales(tiny_host(model_type)))
    assert trained.verdict == REFUSED
    assert "no post-attention residual the probe can prove" in trained.reason


def test_an_oracle_without_an_account_is_no_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oracle, "find_places", lambda layers, _: [None] * len(layers))
    entry = prove(tiny_host("llama"))
    assert entry.verdict == UNPROVEN
    assert "layer 0" in entry.reason


def test_the_census_survives_a_type_that_cannot_be_built(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(model_type: str) -> Any:
        raise KeyError("a config of tomorrow")

    monkeypatch.setattr("realigner.census.tiny_host", partial(broken))
    (entry,) = census(["llama"])
    assert (entry.verdict, entry.reason) == (NOT_BUILT, "KeyError: 'a config of tomorrow'")
