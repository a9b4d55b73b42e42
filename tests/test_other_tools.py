"""IRMs in the field's tools: PEFT's auto classes, pipelines, wrappers, harnesses, trainers; hosts that others have changed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaForSequenceClassification, pipeline
from trl import GRPOConfig, GRPOTrainer

import realigner as ra
from realigner.errors import RealignerError, UsageError
from realigner.irm_config import WEIGHTS_FILE, IRMConfig
from realigner.tiny import tiny_host
from realigner.tuner import tuner_of
from tests.test_together import prompts, tokens, two_tones
from tests.tiny import tiny_folder, tiny_pair


def realigned(host: Any = None, **config: Any) -> Any:
    torch.manual_seed(1)
    return get_peft_model(tiny_host("llama") if host is None else host, IRMConfig(output_std=0.3, **config)).eval()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """An IRM whose host is a folder."""
    host, _ = ra.load_host(str(tiny_folder(tmp_path / "host")), dtype="float32")
    realigned(host).save_pretrained(str(tmp_path / "irm"))
    return tmp_path / "irm"


# --- opening ----------------------------------------------------------------------------------------------------------------


def test_auto_class_and_pipeline(saved: Path) -> None:
    model = AutoPeftModelForCausalLM.from_pretrained(str(saved))
    host, tokenizer = ra.load_host(str(saved.parent / "host"), dtype="float32")
    want = ra.load_irm(host, saved)(input_ids=prompts()).logits
    assert torch.allclose(model(input_ids=prompts()).logits.float(), want, atol=1e-5)
    written = pipeline("text-generation", model=model, tokenizer=tokenizer, max_new_tokens=6, do_sample=False)("Why?")
    ids = tokenizer("Why?", return_tensors="pt")["input_ids"]
    assert written[0]["generated_text"] == tokenizer.decode(
        tokens(model, ids, max_new_tokens=6, eos_token_id=1)[0], skip_special_tokens=True
    )


@pytest.mark.slow
def test_a_card_says_what_to_import(saved: Path) -> None:
    """And what it says is true: in a fresh process its lines open the IRM, and without the first they do not."""
    text = (saved / "README.md").read_text()
    code = text.rpartition("```python\n")[2].partition("```")[0].replace("path/to/this/folder", str(saved))
    assert code.startswith("import realigner\n")
    run = [sys.executable, "-c"]
    assert subprocess.run([*run, code], capture_output=True, check=False).returncode == 0
    without = subprocess.run([*run, code.replace("import realigner\n", "")], capture_output=True, text=True, check=False)
    assert "KeyError: 'IRM'" in without.stderr


WRAPPERS: list[Any] = [torch.nn.DataParallel, torch.compile, lambda model: torch.nn.DataParallel(WRAPPERS[1](model))]


@pytest.mark.parametrize("wrap", WRAPPERS, ids=["data parallel", "compiled", "both"])
def test_wrapped_models_have_their_irm(wrap: Any) -> None:
    model = realigned()
    with ra.strength(model, 0.25):
        want = model(input_ids=prompts()).logits
    with ra.strength(wrap(model), 0.25):
        assert torch.equal(model(input_ids=prompts()).logits, want)
    assert tuner_of(wrap(model)) is tuner_of(model)
    with torch.no_grad(), ra.strength(torch.nn.DataParallel(model), 0.25):
        assert torch.equal(torch.nn.DataParallel(model)(input_ids=prompts()).logits, want)
    with pytest.raises(UsageError, match="no IRM"):
        tuner_of(wrap(tiny_host("llama")))


def test_a_harness_that_resizes_the_vocabulary(saved: Path, tmp_path: Path) -> None:
    """lm-evaluation-harness resizes, always, and then calls ``PeftModel.from_pretrained``; and it can be saved again."""
    host, _ = ra.load_host(str(saved.parent / "host"), dtype="float32")
    want = ra.load_irm(host, saved)(input_ids=prompts()).logits
    host, tokenizer = ra.load_host(str(saved.parent / "host"), dtype="float32")
    host.resize_token_embeddings(len(tokenizer) + 4)
    model = PeftModel.from_pretrained(host, str(saved))
    got = model(input_ids=prompts()).logits
    assert torch.allclose(got[..., : min(got.shape[-1], want.shape[-1])], want[..., : got.shape[-1]], atol=1e-5)
    model.save_pretrained(str(tmp_path / "again"))
    host, _ = ra.load_host(str(saved.parent / "host"), dtype="float32")
    assert torch.equal(ra.load_irm(host, tmp_path / "again")(input_ids=prompts()).logits, want)


def test_a_classifier_has_the_same_decoder(saved: Path) -> None:
    host, _ = ra.load_host(str(saved.parent / "host"), dtype="float32")
    want = ra.load_irm(host, saved)(input_ids=prompts(), output_hidden_states=True).hidden_states[-1]
    classifier = LlamaForSequenceClassification.from_pretrained(saved.parent / "host", dtype=torch.float32)
    got = ra.load_irm(classifier.eval(), saved)(input_ids=prompts(), output_hidden_states=True).hidden_states[-1]
    assert torch.equal(got, want)


def test_attaching_under_autocast() -> None:
    model = realigned()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = realigned()
        got = inside(input_ids=prompts()).logits
    assert tuner_of(inside).sites.summary() == tuner_of(model).sites.summary()
    assert torch.equal(inside(input_ids=prompts()).logits, model(input_ids=prompts()).logits)
    assert (got.float() - model(input_ids=prompts()).logits).abs().max() < 0.1


# --- modules to save --------------------------------------------------------------------------------------------------------


def test_modules_to_save(tmp_path: Path) -> None:
    """A trained copy of the head is saved beside the IRM, is switched with it, and is gone after unloading."""
    bare = tiny_host("llama")(input_ids=prompts()).logits
    model = realigned(modules_to_save=["lm_head"])
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(2)
    want = model(input_ids=prompts()).logits
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert any("lm_head.modules_to_save" in name for name in trained)
    assert any("registry.networks" in name for name in trained)
    with model.disable_adapter():
        assert torch.equal(model(input_ids=prompts()).logits, bare)
    model.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(tiny_host("llama"), str(tmp_path)).eval()
    assert torch.equal(again(input_ids=prompts()).logits, want)
    # A second one with a copy of its own, and one without.
    again.add_adapter("b", IRMConfig(modules_to_save=["lm_head"]))
    again.add_adapter("c", IRMConfig())
    head = again.base_model.model.lm_head
    with torch.no_grad():
        head.modules_to_save["b"].weight.mul_(3)
    logits = {}
    for name in ("default", "b", "c"):
        again.set_adapter(name)
        logits[name] = again(input_ids=prompts()).logits
    assert torch.equal(logits["default"], want)
    with again.disable_adapter():
        assert torch.equal(again(input_ids=prompts()).logits, bare)
    again.base_model.set_adapter(["b", "c"])
    assert head.active_adapters == ["b"]
    with pytest.raises(UsageError, match="default and b each have a trained copy of lm_head"):
        again.base_model.set_adapter(["default", "b"])
    with pytest.raises(UsageError, match="act in every row"), torch.no_grad():
        again(input_ids=prompts(), adapter_names=["b"] * len(prompts()))
    again.set_adapter("default")
    again.delete_adapter("default")
    assert "default" not in head.modules_to_save
    again.set_adapter("b")
    assert torch.equal(again(input_ids=prompts()).logits, logits["b"])
    host = again.unload()
    assert torch.equal(host(input_ids=prompts()).logits, bare)
    assert {name for name, _ in host.named_modules()} == {name for name, _ in tiny_host("llama").named_modules()}


# --- trainers ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["model", "config"])
def test_grpo_with_vllm_is_refused_at_once(given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the trainer is made, before an engine is started, and the message has the way out (trl#2818)."""
    monkeypatch.setattr("trl.trainer.grpo_trainer.is_vllm_available", lambda *_, **__: True, raising=False)
    host, tokenizer = tiny_pair("llama")
    arguments = GRPOConfig(output_dir=str(tmp_path), use_vllm=True, use_cpu=True, bf16=False, report_to=[])
    more: dict[str, Any] = {"peft_config": IRMConfig()} if given == "config" else {}
    model = host if given == "config" else realigned(host)
    with pytest.raises(RealignerError, match="use_vllm=False"):
        GRPOTrainer(
            model,
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=arguments,
            train_dataset=Dataset.from_list([{"prompt": "Why?"}] * 8),
            processing_class=tokenizer,
            **more,
        )


# --- nothing silently wrong -------------------------------------------------------------------------------------------------


def replace_decoder(host: Any) -> None:
    """A faster forward that calls the layers' parts by other ways, as unsloth's do."""
    decoder = host.model

    def forward(self: Any, input_ids: torch.Tensor, **_: Any) -> Any:
        hidden = self.embed_tokens(input_ids)
        for layer in self.layers:
            hidden = hidden + layer.mlp.forward(layer.post_attention_layernorm.forward(hidden))
        return type(
            "Output", (), {"last_hidden_state": hidden, "past_key_values": None, "hidden_states": None, "attentions": None}
        )()

    decoder.forward = MethodType(forward, decoder)


def replace_one_attention(host: Any) -> None:
    layer = host.model.layers[1]
    original = layer.self_attn
    layer.forward = MethodType(
        lambda self, hidden_states, **kwargs: hidden_states + original.forward(hidden_states=hidden_states, **kwargs)[0], layer
    )


def replace_model(host: Any) -> None:
    """The decoder is never called as a module, so not one hook runs."""
    original = host.forward
    decoder = host.model
    host.forward = MethodType(lambda self, *args, **kwargs: original(*args, **kwargs), host)
    decoder.__class__ = type("Direct", (type(decoder),), {"__call__": lambda self, *a, **k: self.forward(*a, **k)})


@pytest.mark.parametrize(
    ("replace", "message"),
    [(replace_decoder, "0 of 3 layers"), (replace_one_attention, "2 of 3 layers"), (replace_model, "never run")],
)
def test_an_irm_that_never_fires_is_an_error(replace: Callable[[Any], None], message: str) -> None:
    model = realigned()
    replace(tuner_of(model).model)
    with pytest.raises(RealignerError, match=message):
        model(input_ids=prompts(), use_cache=False)
    with pytest.raises(RealignerError, match=message):
        tokens(model, prompts(), use_cache=False)
    with model.disable_adapter():
        model(input_ids=prompts(), use_cache=False)  # nothing is to fire


def test_some_layers_only_are_all_that_is_asked_for() -> None:
    model = realigned(layers=[1])
    assert model(input_ids=prompts()).logits.isfinite().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused(saved: Path, value: float) -> None:
    weights = load_file(saved / WEIGHTS_FILE)
    weights["irm.trunk.0.weight"][0, 0] = value
    save_file(weights, saved / WEIGHTS_FILE, metadata={"format": "pt"})
    host, _ = ra.load_host(str(saved.parent / "host"))
    with pytest.raises(RealignerError, match=r"irm\.trunk\.0\.weight .*not finite"):
        ra.load_irm(host, saved)


def test_a_host_is_probed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import realigner.probe as probe

    forwards: list[int] = []
    run = probe.run

    def counted(*args: Any, **kwargs: Any) -> Any:
        forwards.append(1)
        return run(*args, **kwargs)

    monkeypatch.setattr(probe, "run", counted)
    host = tiny_host("llama")
    for _ in range(3):
        realigned(host).unload()
        ra.find_sites(host)
    assert len(forwards) == 4
    host.to(torch.float64)
    ra.find_sites(host)
    assert len(forwards) == 8


def test_sites_are_read_back_from_a_config() -> None:
    for family in ("llama", "gemma2", "granite", "gpt_neox", "mamba"):
        found = ra.find_sites(tiny_host(family))
        summary = json.loads(json.dumps(found.summary()))
        for read, site in zip(ra.sites.read_sites(summary, len(found.layers)), found.sites, strict=True):
            for key in ("layer", "kind", "branch", "reader", "scale"):
                assert getattr(read, key) == getattr(site, key)
            assert [name for name, _ in read.base] == [name for name, _ in site.base]
    with pytest.raises(RealignerError, match="not a description of 5 layers"):
        ra.sites.read_sites({"branch": ["a"], "kind": "single", "scale": 1.0, "reader": ""}, 5)


def test_two_adapters_of_one_model_load_into_wrapped_ones() -> None:
    compiled: Any = torch.compile(two_tones())
    assert tuner_of(compiled).registry.names == ["anger"]
