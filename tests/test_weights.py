"""Weight-only measurements: against their definitions, and the same from a host in memory and from its files on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import given, strategies as st
from safetensors.torch import load_file, save_file
from transformers import Emu3Config

import realigner.explain.checkpoint as checkpoint
from realigner import RealignerError
from realigner.explain.checkpoint import INDEX, SINGLE, Checkpoint, HostTensors, open_checkpoint
from realigner.explain.weights import head_norm_kind, measure_weights, roles_for, weights_of
from realigner.hosts import embedded_folder
from realigner.tiny import tiny_host

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", {}),
    "gpt2": ("gpt2", {}),
    "mistral": ("mistral", {}),
    "qwen2": ("qwen2", {}),
    "olmo2": ("olmo2", {}),
    "opt": ("opt", {}),
    "gpt_neox": ("gpt_neox", {}),
    "gpt_neox in sequence": ("gpt_neox", {"use_parallel_residual": False}),
    "falcon": ("falcon", {}),
    "falcon in sequence": ("falcon", {"parallel_attn": False}),
    "falcon of two norms": ("falcon", {"new_decoder_architecture": True}),
    "mixtral": ("mixtral", {}),
    "norms that follow": ("openai-gpt", {}),
    "a switch that is None": ("deepseek_v3", {"q_lora_rank": None}),
    "layers of three kinds": ("nemotron_h", {}),
    "norms before in some layers, after in others": ("olmo_hybrid", {}),
    "matrices by number": ("ctrl", {}),
    "a head with a norm of its own": ("bert", {}),
    "an encoder's cousin": ("electra", {}),
}


def lively(model_type: str, seed: int = 0, **sizes: Any) -> Any:
    """A tiny host of distinct numbers everywhere, norms and biases too."""
    host = tiny_host(model_type, seed=seed, **sizes)
    generator = torch.Generator().manual_seed(seed + 1)
    for parameter in host.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return host


def rewritten(path: Path, change: Any) -> None:
    """The tensors of a safetensors file, changed and written again."""
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A llama on disk in one file."""
    lively("llama").save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """The same in shards of a few tensors."""
    lively("llama").save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    return tmp_path


# --- numbers ----------------------------------------------------------------------------------------------------------------


def test_by_the_definitions() -> None:
    host = lively("llama")
    found = weights_of(host)
    weights = {name: value.double().numpy() for name, value in host.state_dict().items()}
    gain, head = weights["model.norm.weight"], weights["lm_head.weight"]
    wanted = {
        "final_gain": gain,
        "head_norm": np.sqrt(((head - head.mean(0)) ** 2).sum(0)),
        "head_reach": np.abs(gain) * np.sqrt(((head - head.mean(0)) ** 2).sum(0)),
        "embedding_norm": np.sqrt((weights["model.embed_tokens.weight"] ** 2).sum(0)),
    }
    for name, values in wanted.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-12)
    of_layer = {
        "attention_gain": "input_layernorm",
        "mlp_gain": "post_attention_layernorm",
        "attention_write": "self_attn.o_proj",
        "mlp_write": "mlp.down_proj",
    }
    for name, module in of_layer.items():
        assert found[name].dims == ("layer", "neuron")
        for layer in range(3):
            values = weights[f"model.layers.{layer}.{module}.weight"]
            size = np.abs(values)
            wanted_here = np.sqrt((values**2).sum(1)) if name.endswith("write") else size / np.median(size)
            np.testing.assert_allclose(found[name][layer], wanted_here, rtol=1e-12)
    assert found.attrs == {"host": "", "model_type": "llama", "tied": 0, "norm": "rms"}


def test_the_gain_that_multiplies_is_measured() -> None:
    """Gemma multiplies by 1 + weight, and a head's columns are those of a tied embedding; GPT-2 keeps matrices transposed."""
    gemma = lively("gemma")
    found = weights_of(gemma)
    np.testing.assert_allclose(found["final_gain"], 1 + gemma.model.norm.weight.double(), rtol=1e-12)
    head = gemma.lm_head.weight.double().numpy()
    np.testing.assert_allclose(found["embedding_norm"], np.sqrt((head**2).sum(0)), rtol=1e-12)
    np.testing.assert_allclose(found["head_norm"], np.sqrt(len(head)) * head.std(0), rtol=1e-12)
    assert found.attrs["tied"] == 1
    gpt2 = lively("gpt2")
    wanted = gpt2.transformer.h[1].mlp.c_proj.weight.double().square().sum(0).sqrt()
    np.testing.assert_allclose(weights_of(gpt2)["mlp_write"][1], wanted, rtol=1e-12)


@pytest.mark.parametrize("value", [5.0, 1e-4, 1e4 / 3])
def test_a_column_that_is_the_same_for_every_token_has_no_reach(value: float) -> None:
    """It adds the same to all logits, so that no probability depends on it; one token that differs is reach."""
    host = lively("llama", vocab_size=3000)
    host.lm_head.weight.data[:, 3] = value
    assert float(weights_of(host)["head_reach"][3]) == 0.0
    host.lm_head.weight.data[7, 3] += value
    assert float(weights_of(host)["head_norm"][3]) == pytest.approx(value, rel=1e-3)


def test_experts_write_together() -> None:
    host = lively("mixtral")
    wanted = host.model.layers[2].mlp.experts.down_proj.double().square().sum((0, 2)).sqrt()
    np.testing.assert_allclose(weights_of(host)["mlp_write"][2], wanted, rtol=1e-12)


def test_what_a_host_does_not_have_is_nan() -> None:
    after = weights_of(lively("olmo2"))  # norms of what branches give, none that feeds them
    assert after[["attention_gain", "mlp_gain"]].to_array().isnull().all()
    assert after[["final_gain", "attention_write", "mlp_write"]].to_array().notnull().all()
    both = weights_of(lively("gemma2"))  # norms before and after: those before are taken
    assert both[["attention_gain", "mlp_gain"]].to_array().notnull().all()
    host = lively("gemma2")
    size = np.abs(1 + host.model.layers[0].pre_feedforward_layernorm.weight.double().numpy())
    np.testing.assert_allclose(both["mlp_gain"][0], size / np.median(size), rtol=1e-12)


@pytest.mark.parametrize(("model_type", "kind"), [("llama", "rms"), ("gpt2", "layer"), ("cohere", "layer"), ("gemma", "rms")])
def test_the_kind_of_norm(model_type: str, kind: str) -> None:
    assert head_norm_kind(lively(model_type)) == kind


def test_a_planted_gain_stands_out() -> None:
    host = lively("llama", hidden_size=64)
    host.model.norm.weight.data.fill_(1.7)
    host.model.norm.weight.data[23] = 5e-05
    found = weights_of(host.half())
    assert int(np.abs(found["final_gain"]).argmin()) == int(found["head_reach"].values.argmin()) == 23
    assert float(found["final_gain"][23]) == pytest.approx(5e-05, rel=1e-2)


# --- on disk as in memory ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_files_give_what_the_host_gives(kind: str, tmp_path: Path) -> None:
    model_type, sizes = KINDS[kind]
    host = lively(model_type, num_hidden_layers=4, **sizes)
    host.save_pretrained(tmp_path, max_shard_size="40KB")
    source = open_checkpoint(tmp_path)
    assert roles_for(source) == roles_for(HostTensors(host))
    found = measure_weights(source, roles_for(source))
    wanted = weights_of(host)
    xr.testing.assert_allclose(found, wanted, rtol=1e-6, atol=0)
    assert found.attrs == {**wanted.attrs, "host": str(tmp_path)}


def test_the_files_of_a_host_with_vision(tmp_path: Path) -> None:
    """Their config is the whole one, of another type than its text's."""
    host = lively("emu3")
    whole = Emu3Config(text_config=host.config.to_dict(), architectures=["Emu3ForCausalLM"])
    host.save_pretrained(tmp_path)
    whole.save_pretrained(tmp_path)
    xr.testing.assert_allclose(weights_of(tmp_path), weights_of(host), rtol=1e-6, atol=0)


@pytest.mark.parametrize("model_type", ["mixtral", "axk1"])
def test_files_in_transformers_own_names(model_type: str, tmp_path: Path) -> None:
    """Experts stacked already; and names that must not be translated a second time (AXK1's post_mlp_layernorm)."""
    host = lively(model_type)
    host.save_pretrained(tmp_path, save_original_format=False)
    assert open_checkpoint(tmp_path).names() == [name for name, _ in host.named_parameters(remove_duplicate=False)]
    xr.testing.assert_allclose(weights_of(tmp_path), weights_of(host), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    host = lively("llama").to(dtype)
    host.save_pretrained(tmp_path)
    xr.testing.assert_allclose(weights_of(tmp_path), weights_of(host), rtol=1e-6, atol=0)


def test_only_what_is_measured_is_needed(folder: Path) -> None:
    wanted = weights_of(folder)
    unread = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
    rewritten(folder / SINGLE, lambda tensors: {n: t for n, t in tensors.items() if not any(part in n for part in unread)})
    xr.testing.assert_identical(weights_of(folder), wanted)


@pytest.mark.parametrize("prefix", ["base_model.model.", "module.", "_orig_mod."])
def test_a_wrappers_prefix_is_taken_off(folder: Path, prefix: str) -> None:
    wanted = weights_of(folder)
    rewritten(folder / SINGLE, lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()})
    xr.testing.assert_identical(weights_of(folder), wanted)


def test_the_base_models_names_will_do(tmp_path: Path) -> None:
    """GPT-2's own files call ``transformer.h.0`` ``h.0``, and keep masks, which are no parameters."""
    host = lively("gpt2")
    host.save_pretrained(tmp_path)
    masks = {"h.0.attn.bias": torch.ones(1, 1, 64, 64)}
    rewritten(tmp_path / SINGLE, lambda tensors: {n.removeprefix("transformer."): t for n, t in tensors.items()} | masks)
    xr.testing.assert_allclose(weights_of(tmp_path), weights_of(host), rtol=1e-6, atol=0)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=3), st.data(), st.integers(1, 40))
def test_blocks_cover_a_tensor_once(shape: list[int], data: st.DataObject, most: int) -> None:
    axis = data.draw(st.integers(0, len(shape) - 1))
    seen = torch.zeros(shape)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "_BLOCK", most)
        for cut in checkpoint._cuts(tuple(shape), axis):
            assert seen[cut].shape[axis] == shape[axis]
            assert seen[cut].numel() <= max(most, shape[axis])
            seen[cut] += 1
    assert (seen == 1).all()


def test_small_blocks_give_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    host = lively("mixtral")
    host.save_pretrained(tmp_path)
    wanted = weights_of(host)
    monkeypatch.setattr(checkpoint, "_BLOCK", 100)
    xr.testing.assert_allclose(weights_of(tmp_path), wanted, rtol=1e-6, atol=0)
    sizes = [block.numel() for block in open_checkpoint(tmp_path).blocks("model.layers.0.mlp.experts.down_proj", 1)]
    assert max(sizes) <= 100


@pytest.mark.host
def test_the_embedded_host(embedded: tuple[Any, Any]) -> None:
    wanted, found = weights_of(embedded[0]), weights_of(embedded_folder())
    xr.testing.assert_allclose(found, wanted, rtol=1e-6, atol=0)
    assert found.to_array().notnull().all()
    assert found.attrs == {"host": str(embedded_folder()), "model_type": "llama", "tied": 1, "norm": "rms"}


# --- what is wrong with a checkpoint ----------------------------------------------------------------------------------------


def refused(folder: Path, *parts: str) -> None:
    """Refused in one line that names all of these."""
    with pytest.raises(RealignerError) as error:
        weights_of(folder)
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_no_checkpoint(tmp_path: Path, folder: Path) -> None:
    refused(tmp_path / "nowhere", "nowhere", "no such folder")
    (folder / SINGLE).rename(folder / "pytorch_model.bin")
    refused(folder, ".bin files", "save_pretrained")
    (folder / "pytorch_model.bin").unlink()
    refused(folder, SINGLE, INDEX)
    (folder / "config.json").unlink()
    refused(folder, "config.json")


@pytest.mark.parametrize("text", ["{", "[]", '{"model_type": "no_such_type"}', '{"model_type": "clip"}'])
def test_a_config_of_no_host(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    refused(folder, str(folder))


def test_a_missing_index(sharded: Path) -> None:
    (sharded / INDEX).unlink()
    refused(sharded, INDEX, "missing")


@pytest.mark.parametrize(
    "text", ["{", "{}", "[]", '{"weight_map": {}}', '{"weight_map": {"a": "../b"}}', '{"weight_map": {"a": 1}}']
)
def test_an_index_that_is_none(sharded: Path, text: str) -> None:
    (sharded / INDEX).write_text(text)
    refused(sharded, INDEX, "weight_map")


def test_a_missing_shard(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    refused(sharded, str(shard), "missing")


@pytest.mark.parametrize("kept", [0, 5, 40, -1])
def test_a_truncated_shard(sharded: Path, kept: int) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:kept])
    refused(sharded, str(shard), "truncated")


def test_a_truncated_single_file(folder: Path) -> None:
    (folder / SINGLE).write_bytes((folder / SINGLE).read_bytes()[:-100])
    refused(folder, SINGLE, "truncated")


def test_a_shard_truncated_after_opening(folder: Path) -> None:
    source = open_checkpoint(folder)
    (folder / SINGLE).write_bytes((folder / SINGLE).read_bytes()[:-100])
    with pytest.raises(RealignerError, match="truncated"):
        measure_weights(source, roles_for(source))


def test_a_tensor_that_the_index_places_where_it_is_not(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    shards = sorted(set(index["weight_map"].values()))
    wrong = shards[shards.index(index["weight_map"]["model.norm.weight"]) - 1]
    index["weight_map"]["model.norm.weight"] = wrong
    (sharded / INDEX).write_text(json.dumps(index))
    refused(sharded, str(sharded / wrong), "model.norm.weight")


def test_a_tensor_that_is_nowhere(folder: Path) -> None:
    rewritten(folder / SINGLE, lambda tensors: {n: t for n, t in tensors.items() if n != "model.layers.2.mlp.down_proj.weight"})
    refused(folder, str(folder), "model.layers.2.mlp.down_proj.weight")


def test_other_names(folder: Path) -> None:
    rewritten(folder / SINGLE, lambda tensors: {n.replace("o_proj", "out"): t for n, t in tensors.items()})
    refused(folder, "model.layers.0.self_attn.o_proj.weight", "model.layers.0.self_attn.out.weight is none of this host's")


def test_a_tensor_of_another_shape(folder: Path) -> None:
    rewritten(folder / SINGLE, lambda tensors: tensors | {"model.norm.weight": torch.ones(31)})
    refused(folder, SINGLE, "model.norm.weight", "[31]", "[32]")


def test_a_tensor_in_integers(folder: Path) -> None:
    rewritten(folder / SINGLE, lambda tensors: tensors | {"lm_head.weight": tensors["lm_head.weight"].to(torch.int8)})
    refused(folder, SINGLE, "lm_head.weight", "I8")


def test_a_tensor_under_two_names(folder: Path) -> None:
    twin = "base_model.model.model.norm.weight"
    rewritten(folder / SINGLE, lambda tensors: tensors | {twin: torch.ones(32)})
    refused(folder, twin, "model.norm.weight")


def test_a_host_that_is_not_in_memory() -> None:
    host = tiny_host("llama")
    source = HostTensors(host.to("meta"))
    with pytest.raises(RealignerError, match=r"model\.norm\.weight: it is not in memory"):
        list(source.blocks("model.norm.weight", 0))


def test_opening_reads_no_weights(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Checkpoint, "blocks", lambda *_: pytest.fail("weights were read"))
    assert len(open_checkpoint(folder).names()) == 30
