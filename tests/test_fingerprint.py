"""Which host is which: the same weights in every form are one host, other weights of the same shapes are another."""

from __future__ import annotations

import copy
import hashlib
import os
import pickle
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

import realigner as ra
from realigner.errors import RealignerError
from realigner.fingerprints import Fingerprint, fingerprint, tensors_hash
from realigner.irm_config import IRMConfig
from realigner.tiny import tiny_host
from realigner.tuner import _same_site

SIZES = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}


def llama(seed: int = 0, **sizes: Any) -> Any:
    return tiny_host("llama", seed, **{**SIZES, **sizes})


# --- the same host in another form ------------------------------------------------------------------------------------------


def compiled(host: Any) -> Any:
    return torch.compile(host)


def layer_compiled(host: Any) -> Any:
    host.model.layers[1] = torch.compile(host.model.layers[1])
    return host


def with_lora(host: Any) -> Any:
    return get_peft_model(host, LoraConfig(target_modules="all-linear", init_lora_weights=False))


def resized(host: Any) -> Any:
    host.resize_token_embeddings(host.config.vocab_size + 4)
    return host


def classifier(host: Any) -> Any:
    found = AutoModelForSequenceClassification.from_config(host.config)
    found.model.load_state_dict(host.model.state_dict())
    return found.eval().requires_grad_(False)


def multimodal(host: Any) -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    vision = CLIPVisionConfig(**sizes, image_size=16, patch_size=8, projection_dim=32)
    torch.manual_seed(0)
    found = LlavaForConditionalGeneration(LlavaConfig(text_config=host.config, vision_config=vision))
    found.model.language_model.load_state_dict(host.model.state_dict())
    found.lm_head.load_state_dict(host.lm_head.state_dict())
    return found.eval().requires_grad_(False)


FORMS = {
    "bfloat16": lambda host: host.bfloat16(),
    "float16": lambda host: host.half(),
    "compiled": compiled,
    "layer compiled": layer_compiled,
    "LoRA": with_lora,
    "resized": resized,
    "classifier": classifier,
    "multimodal": multimodal,
}


# --- the same host quantised --------------------------------------------------------------------------------------------------


class Packed(nn.Module):
    """A linear layer as GPTQ or AWQ keep it: buffers by their names, whose bits only a kernel understands."""

    def __init__(self, linear: nn.Linear, awq: bool) -> None:
        super().__init__()
        self.in_features, self.out_features, self.dense = linear.in_features, linear.out_features, [linear.weight]
        rows, columns = (
            (linear.in_features, linear.out_features // 8) if awq else (linear.in_features // 8, linear.out_features)
        )
        self.register_buffer("qweight", torch.randint(-(2**31), 2**31 - 1, (rows, columns), dtype=torch.int32))
        self.register_buffer("qzeros", torch.zeros(1, linear.out_features // 8, dtype=torch.int32))
        self.register_buffer("scales", torch.ones(1, linear.out_features, dtype=torch.float16))
        if not awq:
            self.register_buffer("g_idx", torch.zeros(linear.in_features, dtype=torch.int32))
        self.register_buffer("bias", torch.zeros(linear.out_features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.dense[0])


class Float8(nn.Linear):
    """A linear layer in float8 with a scale for the whole, as checkpoints of DeepSeek's kind have it."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        scale = linear.weight.abs().max() / 400
        self.weight = nn.Parameter((linear.weight / scale).to(torch.float8_e4m3fn), requires_grad=False)
        self.weight_scale_inv = nn.Parameter(scale.reshape(1, 1), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight.float() * self.weight_scale_inv)


def replaced(host: Any, kind: Callable[[nn.Linear], nn.Module]) -> Any:
    for path, module in list(host.model.layers.named_modules()):
        if isinstance(module, nn.Linear):
            owner, _, leaf = path.rpartition(".")
            setattr(host.model.layers.get_submodule(owner), leaf, kind(module))
    return host


def bitsandbytes(**settings: Any) -> Callable[[Any, Path], Any]:
    def quantise(host: Any, folder: Path) -> Any:
        if os.environ.get("CI") != "true":  # where a missing one is a failure
            pytest.importorskip("bitsandbytes")
        from transformers import BitsAndBytesConfig

        host.save_pretrained(folder)
        found = AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=BitsAndBytesConfig(**settings), dtype=torch.float32
        )
        return found.eval().requires_grad_(False)

    return quantise


def quanto(weights: str) -> Callable[[Any, Path], Any]:
    def quantise(host: Any, folder: Path) -> Any:
        from optimum import quanto

        quanto.quantize(host, weights=getattr(quanto, weights))
        quanto.freeze(host)
        return host

    return quantise


READABLE: dict[str, Callable[[Any, Path], Any]] = {
    "nf4": bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    "fp4": bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="fp4"),
    "int8": bitsandbytes(load_in_8bit=True),
    "float8": lambda host, folder: replaced(host, Float8),
    "qint8": quanto("qint8"),
    "qint4": quanto("qint4"),
}
UNREADABLE: dict[str, Callable[[Any, Path], Any]] = {
    "gptq": lambda host, folder: replaced(host, lambda linear: Packed(linear, awq=False)),
    "awq": lambda host, folder: replaced(host, lambda linear: Packed(linear, awq=True)),
}
QUANTISED = READABLE | UNREADABLE


def each(forms: Iterable[str]) -> list[Any]:
    """Forms as parameters of a test; `make proofs` brings bitsandbytes, and quanto compiles for a minute the first time."""
    longer = ("nf4", "fp4", "int8", "qint8", "qint4")
    return [pytest.param(form, marks=pytest.mark.proof) if form in longer else form for form in forms]


def same(a: Any, b: Any) -> bool:
    pair = fingerprint(a), fingerprint(b)
    found = [one.difference(other) is None for one in pair for other in pair]
    assert found[1] == found[2]
    return found[1]


@pytest.mark.parametrize("form", FORMS)
def test_a_host_in_another_form_is_the_same_host(form: str) -> None:
    assert same(llama(), FORMS[form](llama()))
    assert not same(llama(), FORMS[form](llama(seed=1)))


@pytest.mark.parametrize("kind", each(QUANTISED))
@pytest.mark.usefixtures("compiler")
def test_a_quantised_host_is_the_same_host(kind: str, tmp_path: Path) -> None:
    """In both directions, on top of every other form, and between two quantisers."""
    quantised = QUANTISED[kind](llama(), tmp_path / "a")
    assert same(llama(), quantised)
    assert same(llama().bfloat16(), quantised)
    assert same(multimodal(llama()), quantised)
    assert same(READABLE["float8"](llama(), tmp_path), quantised)


@pytest.mark.parametrize("kind", each(READABLE))
@pytest.mark.usefixtures("compiler")
def test_another_checkpoint_quantised_is_refused(kind: str, tmp_path: Path) -> None:
    """The gains of these hosts' norms are all 1: the signs of the matrices alone tell them apart."""
    for seed in range(1, 6):
        assert not same(llama(), READABLE[kind](llama(seed), tmp_path / str(seed)))


@pytest.mark.parametrize("kind", UNREADABLE)
def test_other_shapes_are_refused_where_nothing_else_is_known(kind: str, tmp_path: Path) -> None:
    assert not same(llama(), UNREADABLE[kind](llama(intermediate_size=96), tmp_path))


@pytest.mark.parametrize("kind", each(["nf4", "gptq"]))
def test_gains_of_norms_tell_quantised_hosts_apart(kind: str, tmp_path: Path) -> None:
    other = llama()
    for layer in other.model.layers:
        layer.input_layernorm.weight.mul_(1.1)
    assert not same(llama(), QUANTISED[kind](other, tmp_path))


@pytest.mark.proof
def test_layers_of_conv1d(tmp_path: Path) -> None:
    """GPT-2 keeps its matrices transposed; quantised they are linear layers."""
    host = tiny_host("gpt2", hidden_size=64)
    assert same(host, READABLE["nf4"](host, tmp_path / "a"))
    assert not same(host, READABLE["nf4"](tiny_host("gpt2", 1, hidden_size=64), tmp_path / "b"))


def test_a_host_of_experts() -> None:
    """A quantiser that splits the experts, or leaves them alone, changes nothing of the rest."""
    host, other = tiny_host("mixtral"), tiny_host("mixtral")
    replaced(other, lambda linear: Packed(linear, awq=False))
    assert same(host, other)
    for layer in other.model.layers:
        layer.mlp.experts = nn.ModuleList(Packed(nn.Linear(32, 64), awq=False) for _ in range(4))
    assert same(host, other)


def test_a_fine_tune_is_another_host() -> None:
    """Every matrix moved a little, as full fine-tuning does; or the query and value projections alone, as merged LoRA does."""
    host = llama()
    for parameter in host.parameters():
        if parameter.dim() > 1:
            parameter.add_(0.02 * parameter.std() * torch.randn_like(parameter))
    assert not same(llama(), host)
    host = llama()
    for name, parameter in host.named_parameters():
        if "q_proj" in name or "v_proj" in name:
            parameter.add_(0.2 * parameter.std() * torch.randn_like(parameter))
    assert not same(llama(), host)


def test_embeddings_and_head_are_no_part_of_it() -> None:
    host = llama()
    host.model.embed_tokens.weight.mul_(2)
    host.lm_head.weight.mul_(2)
    assert same(llama(), host)


def test_few_numbers_are_read() -> None:
    found = fingerprint(llama(num_hidden_layers=60))
    assert len(found.samples) == 256 * 11 - 1
    assert len(found.vectors) == 120 * 11 - 1


def test_layers_can_be_given() -> None:
    host = llama()
    assert fingerprint(host, host.model.layers) == fingerprint(host)


def test_it_travels() -> None:
    found = fingerprint(llama())
    assert pickle.loads(pickle.dumps(found)) == copy.deepcopy(found) == Fingerprint.from_dict(found.to_dict()) == found
    assert found.to_dict()["version"] == 2
    with pytest.raises(RealignerError, match="newer realigner"):
        Fingerprint.from_dict(found.to_dict() | {"version": 3})


def test_tensors_hash_is_of_names_and_bits() -> None:
    a = torch.randn(3)
    assert tensors_hash({"a": a}) == tensors_hash({"a": a.clone()}) != tensors_hash({"b": a})
    assert tensors_hash({"a": a}) != tensors_hash({"a": a.double()})


# --- an IRM on it -------------------------------------------------------------------------------------------------------------


def attached(host: Any) -> Any:
    return get_peft_model(host, IRMConfig(preset="compact", layers="0-1"))


# Not a classifier: PEFT's class for task CAUSAL_LM asks for a host that generates. Compiling layers is slow: see below.
@pytest.mark.parametrize("form", each(sorted((FORMS | QUANTISED).keys() - {"classifier", "layer compiled"})))
@pytest.mark.usefixtures("compiler")
def test_an_irm_goes_from_one_form_to_the_other(form: str, tmp_path: Path) -> None:
    def made(seed: int = 0) -> Any:
        host = llama(seed)
        return FORMS[form](host) if form in FORMS else QUANTISED[form](host, tmp_path / f"host-{seed}")

    attached(llama()).save_pretrained(str(tmp_path / "plain"), save_embedding_layers=False)
    ra.load_irm(made(), tmp_path / "plain")
    attached(made()).save_pretrained(str(tmp_path / "other"), save_embedding_layers=False)
    ra.load_irm(llama(), tmp_path / "other")
    if form not in UNREADABLE:
        with pytest.raises(RealignerError, match="made for"):
            ra.load_irm(llama(seed=1), tmp_path / "other")
        with pytest.raises(RealignerError, match="made for"):
            ra.load_irm(made(seed=1), tmp_path / "plain")


def test_a_site_is_the_same_where_layers_are_compiled() -> None:
    here = {"layers": "model.layers", "branch": "self_attn", "scale": 1.0}
    there = {"layers": "_orig_mod.model.layers", "branch": ["self_attn", "_orig_mod.self_attn"], "scale": 1.0}
    assert _same_site(here, there)
    assert _same_site(there, here)
    assert not _same_site(here, there | {"branch": ["self_attn", "mlp"]})


# --- fingerprints of version 1 ------------------------------------------------------------------------------------------------


def version_1(host: Any) -> dict[str, Any]:
    """As releases up to 0.1 made it: names, shapes and one weight of each of the whole model, but for its head."""
    head = {id(p) for p in host.get_output_embeddings().parameters()} if host.get_output_embeddings() is not None else set()
    head -= {id(p) for p in host.get_input_embeddings().parameters()}
    named = sorted((name.replace(".base_layer.", "."), p) for name, p in host.named_parameters() if id(p) not in head)
    chosen = named if len(named) <= 256 else [named[i * len(named) // 256] for i in range(256)]
    samples = ""
    for name, parameter in chosen:
        place = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big") % parameter.numel()
        plain = type(parameter) in (torch.Tensor, nn.Parameter)
        value = parameter.detach().flatten()[place].float() if plain else torch.tensor(float("nan"))
        samples += f"{int(value.bfloat16().view(torch.int16)) & 0xFFFF:04x}"
    config = host.config.get_text_config(decoder=True)
    return {
        "architecture": type(host).__name__,
        "hidden_size": getattr(config, "hidden_size", 0),
        "num_layers": config.num_hidden_layers,
        "vocab_size": config.vocab_size,
        "headers": hashlib.sha256("\n".join(f"{name} {list(p.shape)}" for name, p in named).encode()).hexdigest(),
        "samples": samples,
        "name": "",
    }


def differs_from_old(old: Any, host: Any) -> str | None:
    return Fingerprint.from_dict(version_1(old)).difference(fingerprint(host))


@pytest.mark.parametrize("form", each(sorted(FORMS | QUANTISED)))
@pytest.mark.usefixtures("compiler")
def test_version_1_is_still_compared(form: str, tmp_path: Path) -> None:
    def made(seed: int = 0) -> Any:
        host = llama(seed)
        return FORMS[form](host) if form in FORMS else QUANTISED[form](host, tmp_path / f"host-{seed}")

    assert differs_from_old(llama(), made()) is None
    if form not in UNREADABLE:
        assert "differ" in str(differs_from_old(llama(), made(seed=1)))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "gpt_neox", "mixtral"])
def test_version_1_of_every_kind(family: str, tmp_path: Path) -> None:
    assert differs_from_old(tiny_host(family), tiny_host(family).bfloat16()) is None
    assert "differ" in str(differs_from_old(tiny_host(family), tiny_host(family, seed=1)))
    assert differs_from_old(tiny_host(family), tiny_host(family, num_hidden_layers=2)) == "num_layers is 2, not 3"


def test_version_1_of_a_host_whose_layers_must_be_named() -> None:
    """BLT has several lists of layers; under its own names it is compared all the same."""
    assert differs_from_old(tiny_host("blt"), tiny_host("blt")) is None


@pytest.mark.proof
def test_version_1_made_on_a_quantised_or_multimodal_host(tmp_path: Path) -> None:
    quantised = READABLE["nf4"](llama(), tmp_path)
    assert differs_from_old(quantised, quantised) is None
    assert differs_from_old(quantised, llama()) is None
    assert differs_from_old(multimodal(llama()), multimodal(llama())) is None
    assert "architecture" in str(differs_from_old(multimodal(llama()), llama()))  # the vision tower cannot be checked
    found = pickle.loads(pickle.dumps(fingerprint(llama())))
    assert "in memory" in str(Fingerprint.from_dict(version_1(llama())).difference(found))
