"""The vLLM plugin, as far as it runs without the engine: reading IRMs, slots, sites, a step's strengths, names, requests."""

from __future__ import annotations

import asyncio
import copy
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from realigner.adapter_files import TYPES, WEIGHTS_FILE, StoredIRM, read_irm
from realigner.checkpoint_fingerprint import difference
from realigner.errors import RealignerError, UsageError
from realigner.fingerprints import Fingerprint, fingerprint
from realigner.irm import IRMShape
from realigner.irm_config import CONFIG_FILE, IRMConfig
from realigner.serving import vllm_runner
from realigner.serving.mixes import Mix, NotServedError
from realigner.serving.vllm_api import IRMMiddleware
from realigner.serving.vllm_command import irm_environment
from realigner.serving.vllm_irms import ServedIRMs
from realigner.serving.vllm_model import IRMSlots, attach
from realigner.serving.vllm_plugin import register, spare_slots
from realigner.tiny import tiny_host
from realigner.tuner import tuner_of

SHAPES: dict[str, dict[str, Any]] = {
    "compact": {},
    "first_edition": {"edition": 1},
    "paper": {"preset": "paper", "widths": [24, 24]},
    "some_layers": {"layers": [0, 2]},
    "masked": {"masked": [1, 30]},
    "scaled": {"delta_scale": [0.5, 2.0, 3.0], "input_scale": 0.25},
    "unnormed": {"input_norm": False, "input_scale": 4.0},
    "other_rank": {"rank": 3, "widths": [7, 9], "dropout": 0.1},
}


def saved(place: Path, shapes: dict[str, dict[str, Any]], host: Any = None, dtype: torch.dtype = torch.float32) -> PeftModel:
    """A host with IRMs of random weights, saved in ``place/NAME``."""
    host = host or tiny_host("llama")
    for seed, (name, shape) in enumerate(shapes.items()):
        torch.manual_seed(seed)
        config = IRMConfig(**{"preset": "compact", "output_std": 0.5, **shape})
        if seed == 0:
            model = get_peft_model(host, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
        for parameter in model.base_model.registry.networks[name].parameters():
            if parameter.dim() == 1:
                nn.init.normal_(parameter)
    model.save_pretrained(place)
    if dtype != torch.float32:
        for name in shapes:
            file = place / name / WEIGHTS_FILE
            save_file({key: value.to(dtype) for key, value in load_file(file).items()}, file)
    return model.eval()


@pytest.fixture(scope="module")
def irms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, StoredIRM]:
    place = tmp_path_factory.mktemp("irms")
    saved(place, SHAPES)
    return {name: read_irm(place / name) for name in SHAPES}


def slots_of(irms: dict[str, StoredIRM], spare: int = 0) -> IRMSlots:
    return IRMSlots(irms, spare, 16, torch.float32, torch.device("cpu"))


def stepped(slots: IRMSlots, x0: torch.Tensor, branch: torch.Tensor) -> list[torch.Tensor]:
    """A branch of zeros with the deltas, layer by layer, after a layer 0 that had this input and branch."""
    slots.x0 = x0
    slots.begin(slots.first.sites[0], branch)
    return [slots.added(layer, torch.zeros_like(branch)) for layer in range(slots.first.num_layers)]


# --- files ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHAPES)
def test_an_irm_read_without_peft_is_the_one_that_peft_reads(name: str, irms: dict[str, StoredIRM]) -> None:
    irm = irms[name]
    network = tuner_of(PeftModel.from_pretrained(tiny_host("llama"), irm.folder)).registry.networks["default"]
    h0 = torch.randn(5, 32)
    assert torch.equal(irm.network()(h0), network.eval()(h0))
    assert irm.strength == 1.0
    assert len(irm.digest) == 64


def test_all_keys_of_a_config_are_known_without_peft() -> None:
    assert {f.name for f in fields(IRMConfig)} == {*TYPES, "peft_type", *(f.name for f in fields(IRMShape))}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_any_float_type_are_read(tmp_path: Path, dtype: torch.dtype) -> None:
    saved(tmp_path, {"a": {}, "b": {}}, dtype=dtype)
    slots = slots_of({"a": read_irm(tmp_path / "a")})
    assert slots.get_buffer("output").dtype == torch.float32


def damaged(folder: Path, how: Callable[[Path], object]) -> str:
    how(folder)
    with pytest.raises(RealignerError) as caught:
        read_irm(folder).network()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_damage_is_named_in_one_line(tmp_path: Path) -> None:
    def config(change: dict[str, Any]) -> Callable[[Path], None]:
        def write(folder: Path) -> None:
            path = folder / CONFIG_FILE
            path.write_text(json.dumps({**json.loads(path.read_text()), **change}))

        return write

    def weights(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path], None]:
        return lambda folder: save_file(change(load_file(folder / WEIGHTS_FILE)), folder / WEIGHTS_FILE)

    ways: dict[str, tuple[Callable[[Path], object], str]] = {
        "cut": (lambda folder: (folder / WEIGHTS_FILE).write_bytes(b"\x08\0"), "truncated"),
        "gone": (lambda folder: (folder / WEIGHTS_FILE).unlink(), "missing"),
        "nan": (weights(lambda t: {**t, "irm.output.bias": t["irm.output.bias"] * float("nan")}), "not finite"),
        "less": (weights(lambda t: {k: v for k, v in t.items() if k != "irm.output.bias"}), "is missing"),
        "more": (weights(lambda t: {**t, "irm.more": torch.zeros(1)}), "does not have"),
        "beside": (weights(lambda t: {**t, "base_model.head": torch.zeros(1)}), "part of the host"),
        "type": (config({"strength": "much"}), "not of type"),
        "newer": (config({"gates": 3}), "newer realigner"),
        "wide": (config({"widths": [10**6]}), "shape"),
        "no_host": (config({"host": None}), "names no host"),
        "lora": (config({"peft_type": "LORA"}), "not an IRM"),
    }
    for name, (how, words) in ways.items():
        saved(tmp_path / name, {"a": {}, "b": {}})
        assert words in damaged(tmp_path / name / "a", how), name


def test_the_plugin_does_not_import_peft() -> None:
    code = (
        "import sys, realigner.serving.vllm_runner, realigner.serving.vllm_api, realigner.serving.vllm_plugin\n"
        "assert not {'peft', 'realigner.tuner'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_entry_point_imports_next_to_nothing() -> None:
    code = "import sys, realigner.serving.vllm_plugin; assert not {'torch', 'transformers', 'vllm'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- slots ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHAPES)
def test_the_deltas_are_the_networks_own(name: str, irms: dict[str, StoredIRM]) -> None:
    slots, irm = slots_of({name: irms[name]}), irms[name]
    x0, branch = torch.randn(2, 5, 32)
    x0[2] = branch[2] = 0.0  # padding
    strengths = torch.tensor([0.0, 1.0, 1.0, -2.5, 0.3])
    slots.fill(strengths[:, None].numpy())
    deltas = stepped(slots, x0, branch)
    own = irm.network()
    expected = own(x0 + branch) * strengths[:, None, None]
    for layer in range(3):
        at = expected[:, own.layers.index(layer)] if layer in own.layers else torch.zeros(5, 32)
        torch.testing.assert_close(deltas[layer], at, atol=3e-5, rtol=1e-4)
        assert torch.equal(deltas[layer][0], torch.zeros(32))
    assert slots.read is None
    assert slots.x0 is None


def test_irms_of_all_shapes_are_summed(irms: dict[str, StoredIRM]) -> None:
    slots = slots_of(irms)
    x0, branch = torch.randn(2, 4, 32)
    asked: list[dict[str, float]] = [{}, {"paper": 1.0}, dict.fromkeys(SHAPES, 0.5), {"masked": -1.0, "compact": 2.0}]
    slots.fill(np.stack([slots.row(irms_at) for irms_at in asked]))
    deltas = stepped(slots, x0, branch)
    networks = {name: irm.network() for name, irm in irms.items()}
    for token, mix in enumerate(asked):
        expected = torch.zeros(3, 32)
        for name, strength in mix.items():
            expected[list(networks[name].layers)] += strength * networks[name]((x0 + branch)[token])
        torch.testing.assert_close(torch.stack([delta[token] for delta in deltas]), expected, atol=1e-4, rtol=1e-4)


def test_a_huge_residual_does_not_overflow_in_half_precision(irms: dict[str, StoredIRM]) -> None:
    slots = IRMSlots({"a": irms["compact"]}, 0, 4, torch.float16, torch.device("cpu"))
    x0 = torch.full((2, 32), 3e4, dtype=torch.float16)
    slots.fill(np.ones((2, 1), np.float32))
    assert all(torch.isfinite(delta).all() for delta in stepped(slots, x0, torch.zeros_like(x0)))


def test_loading_and_unloading(irms: dict[str, StoredIRM]) -> None:
    slots = slots_of({"a": irms["compact"], "b": irms["masked"]}, spare=1)
    x0, branch = torch.randn(2, 3, 32)
    slots.load("c", irms["some_layers"])
    with pytest.raises(UsageError, match="loaded already"):
        slots.load("c", irms["compact"])
    with pytest.raises(RealignerError, match="no slot is free"):
        slots.load("d", irms["compact"])
    slots.unload("b")
    assert slots.row({"b": 1.0}).any()  # on its way still
    with pytest.raises(RealignerError, match="none of the 1 free slots has its shape"):
        slots.load("d", irms["paper"])
    slots.load("d", irms["unnormed"])
    with pytest.raises(RealignerError, match="not loaded"):
        slots.row({"b": 1.0})
    slots.fill(np.stack([slots.row({"d": 1.0}), slots.row({"c": 1.0}), slots.row({})]))
    deltas = torch.stack(stepped(slots, x0, branch))
    torch.testing.assert_close(deltas[:, 0], irms["unnormed"].network()((x0 + branch)[0]), atol=3e-5, rtol=1e-4)
    torch.testing.assert_close(deltas[[0, 2], 1], irms["some_layers"].network()((x0 + branch)[1]), atol=3e-5, rtol=1e-4)
    assert not deltas[1, 1].any()
    assert not deltas[:, 2].any()


def test_irms_of_other_hosts_and_sites_do_not_share_an_engine(irms: dict[str, StoredIRM]) -> None:
    irm = irms["compact"]
    elsewhere = replace(irm, sites=tuple(replace(site, branch="mlp") for site in irm.sites))
    with pytest.raises(RealignerError, match="its site is not"):
        slots_of({"a": irm, "b": elsewhere})


# --- layers as engines have them --------------------------------------------------------------------------------------------


class Norm(nn.Module):
    """An engine's norm: given a residual, it adds first."""

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
        if residual is None:
            return torch.tanh(x)
        residual = residual + x
        return torch.tanh(residual), residual


class Linear(nn.Module):
    """A layer's attention or MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(32, 32) / 6)

    def forward(self, hidden_states: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        return hidden_states @ self.weight


class Fused(nn.Module):
    """As Llama's in vLLM: the stream in two halves."""

    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = Norm(), Norm()
        self.self_attn, self.mlp = Linear(), Linear()

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor, residual: torch.Tensor | None) -> Any:
        if residual is None:
            residual, hidden_states = hidden_states, self.input_layernorm(hidden_states)
        else:
            hidden_states, residual = self.input_layernorm(hidden_states, residual)
        hidden_states = self.self_attn(positions=positions, hidden_states=hidden_states)
        hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)
        return self.mlp(hidden_states), residual


class Plain(Fused):
    """As Granite's: one stream, and a weight of the branches."""

    multiplier = 0.22

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor, residual: Any = None) -> Any:
        branch = self.self_attn(hidden_states=self.input_layernorm(hidden_states))
        hidden_states = hidden_states + branch * self.multiplier
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states)) * self.multiplier


class Parallel(Fused):
    """As GPT-NeoX's: both branches read the layer's input."""

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor, residual: Any = None) -> Any:
        normed = self.input_layernorm(hidden_states)
        return hidden_states + self.self_attn(hidden_states=normed) + self.mlp(normed)


class Engine(nn.Module):
    """A model of the engine's."""

    def __init__(self, kind: type[Fused], layers: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(kind() for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        residual = None
        for layer in self.layers:
            out = layer(torch.arange(len(x)), x, residual)
            x, residual = out if isinstance(out, tuple) else (out, None)
        return x if residual is None else x + residual

    def expected(self, x: torch.Tensor, network: Any, strengths: torch.Tensor, kind: type[Fused]) -> torch.Tensor:
        """The same, written out."""
        scale, deltas = getattr(kind, "multiplier", 1.0), None
        layers: Any = self.layers
        for number, layer in enumerate(layers):
            normed = torch.tanh(x)
            residual = x + scale * layer.self_attn(normed)
            deltas = network(residual) * strengths[:, None, None] if deltas is None else deltas
            residual = residual + deltas[:, number]
            x = residual + scale * layer.mlp(normed if kind is Parallel else torch.tanh(residual))
        return x


def for_layers(irm: StoredIRM, kind: type[Fused]) -> StoredIRM:
    how: dict[str, Any] = {"kind": "parallel", "reader": ""} if kind is Parallel else {"reader": "post_attention_layernorm"}
    return replace(irm, sites=tuple(replace(site, scale=getattr(kind, "multiplier", 1.0), **how) for site in irm.sites))


@pytest.mark.parametrize("kind", [Fused, Plain, Parallel])
def test_an_engines_layers_get_their_deltas(kind: type[Fused], irms: dict[str, StoredIRM]) -> None:
    irm = for_layers(irms["compact"], kind)
    model = Engine(kind)
    x, strengths = torch.randn(5, 32), torch.tensor([0.0, 1.0, 0.5, -1.0, 0.0])
    untouched, names = copy.deepcopy(model), [name for name, _ in model.named_parameters()]
    bare = model(x)
    slots = slots_of({"a": irm})
    attach(model, slots)
    assert torch.equal(model(x), bare)
    assert [name for name, _ in model.named_parameters()] == names  # weights can be loaded anew
    slots.fill(strengths[:, None].numpy())
    with torch.no_grad():
        found, expected = model(x), untouched.expected(x, irm.network(), strengths, kind)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(found[0], bare[0])
    assert not torch.allclose(found[1], bare[1], atol=1e-2)


def test_one_compiled_graph_serves_all_steps(irms: dict[str, StoredIRM]) -> None:
    model = Engine(Fused)
    slots = slots_of({"a": for_layers(irms["compact"], Fused)})
    attach(model, slots)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for strengths in ([0.0] * 5, [1.0, 0.0, -1.0, 2.0, 0.5], [0.3] * 5):
            slots.fill(np.array(strengths, np.float32)[:, None])
            x = torch.randn(5, 32)
            torch.testing.assert_close(compiled(x), model(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        (Plain, {"scale": 1.0}, "is not the layer's input plus"),  # a host whose branches have another weight
        (Fused, {"branch": "elsewhere"}, "has no elsewhere"),
        (Fused, {"reader": "pre_feedforward_layernorm"}, "has no pre_feedforward_layernorm"),
        (Parallel, {"kind": "sequential", "reader": "post_attention_layernorm"}, "reader is never run"),
        (Fused, {"base": (("norm", 1.0), ("", 1.0))}, "several modules"),
    ],
)
def test_a_model_without_the_site_is_refused_by_name(
    kind: type[Fused], change: dict[str, Any], words: str, irms: dict[str, StoredIRM]
) -> None:
    irm = for_layers(irms["compact"], Fused)
    irm = replace(irm, sites=tuple(replace(site, **change) for site in irm.sites))
    with pytest.raises(RealignerError, match=words) as caught:
        attach(Engine(kind), slots_of({"a": irm}))
    assert str(caught.value).startswith("Engine: ")
    assert "\n" not in str(caught.value)


def test_a_model_of_another_depth_is_refused(irms: dict[str, StoredIRM]) -> None:
    with pytest.raises(RealignerError, match=r"Engine: .*no list of 3 layers"):
        attach(Engine(Fused, layers=4), slots_of({"a": irms["compact"]}))


# --- a step's strengths -----------------------------------------------------------------------------------------------------


def state(irms_asked: Any) -> SimpleNamespace:
    return SimpleNamespace(sampling_params=SimpleNamespace(extra_args=irms_asked))


def test_a_step_of_the_first_runner(irms: dict[str, StoredIRM]) -> None:
    slots = slots_of({"a": irms["compact"], "b": irms["masked"]})
    requests = {"x": state({"irms": {"a": 0.5}}), "y": state(None), "z": state({"irms": {"b": 2.0}, "other": 1})}
    batch = SimpleNamespace(req_ids=["x", "y", "z"])
    runner = SimpleNamespace(model=SimpleNamespace(irms=slots), requests=requests, input_batch=batch)

    def strengths(names: list[str], tokens: list[int]) -> list[list[float]]:
        batch.req_ids = names
        vllm_runner.fill_step(runner, np.array(tokens))
        found: list[list[float]] = slots.get_buffer("strengths")[: sum(tokens) + 2].tolist()
        return found

    assert strengths(["x", "y", "z"], [2, 1, 1]) == [[0.5, 0], [0.5, 0], [0, 0], [0, 2], [0, 0], [0, 0]]
    assert strengths(["z", "x"], [1, 1]) == [[0, 2], [0.5, 0], [0, 0], [0, 0]]  # what was behind is 0 again
    assert strengths(["y"], [3]) == [[0, 0]] * 5
    slots.unload("b")
    slots.load("c", irms["masked"])
    requests["w"] = state({"irms": {"c": 1.0}})
    assert strengths(["w"], [1])[0] == [0, 1]
    vllm_runner.fill_step(SimpleNamespace(model=SimpleNamespace()), np.array([1]))  # a model without IRMs


def test_a_field_that_came_past_the_front_end_stops_the_engine() -> None:
    with pytest.raises(RealignerError, match="came past"):
        vllm_runner.mix_of_request(SimpleNamespace(extra_args={"irms": "anger"}))


# --- the host ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def host_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("host")
    tiny_host("llama").save_pretrained(place)
    return place


def differs(made_for: Any, folder: Path, model_type: str = "llama") -> str | None:
    return difference(fingerprint(made_for), folder, 32, 3, model_type)


def test_the_host_is_known_by_its_files(host_folder: Path, tmp_path: Path) -> None:
    host = tiny_host("llama")
    assert differs(host, host_folder) is None
    host.bfloat16().save_pretrained(tmp_path)
    assert differs(tiny_host("llama"), tmp_path) is None
    assert "sampled weights differ" in (differs(tiny_host("llama", seed=1), host_folder) or "")
    assert "type mistral" in (differs(host, host_folder, "mistral") or "")
    assert "names or shapes" in (differs(tiny_host("qwen3"), host_folder, "qwen3") or "")
    assert "num_layers is 4" in (difference(fingerprint(host), host_folder, 32, 4, "llama") or "")


def test_one_weight_changed_by_training_is_seen_in_every_matrix(host_folder: Path, tmp_path: Path) -> None:
    tensors = load_file(host_folder / "model.safetensors")
    tuned = {key: value * 1.1 if "down_proj" in key else value for key, value in tensors.items()}
    save_file(tuned, tmp_path / "model.safetensors")
    assert "sampled weights differ" in (differs(tiny_host("llama"), tmp_path) or "")


@pytest.mark.parametrize("model_type", ["gpt2", "gemma2", "mixtral", "qwen3_moe", "gpt_neox"])
def test_files_of_other_families_are_known(model_type: str, tmp_path: Path) -> None:
    host = tiny_host(model_type)
    host.save_pretrained(tmp_path)
    assert difference(fingerprint(host), tmp_path, 32, 3, model_type) is None
    assert difference(fingerprint(tiny_host(model_type, seed=1)), tmp_path, 32, 3, model_type) is not None


def test_a_host_whose_files_cannot_be_compared_is_refused(tmp_path: Path, host_folder: Path) -> None:
    with pytest.raises(RealignerError, match="no safetensors files"):
        differs(tiny_host("llama"), tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x10")
    with pytest.raises(RealignerError, match="truncated or damaged"):
        differs(tiny_host("llama"), tmp_path)
    old = Fingerprint("LlamaForCausalLM", 32, 3, "", "", version=1)
    with pytest.raises(RealignerError, match="old form"):
        difference(old, host_folder, 32, 3, "llama")


# --- names and requests -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> ServedIRMs:
    place = tmp_path_factory.mktemp("served")
    saved(place, {"anger": {"strength": 1.25}, "sadness": {"chat_template_kwargs": {"enable_thinking": False}}})
    return ServedIRMs.of_text(f"anger={place}/anger, sadness={place}/sadness")


def test_irms_are_named_in_the_environment(served: ServedIRMs, tmp_path: Path) -> None:
    assert served.defaults == {"anger": 1.25, "sadness": 1.0}
    assert ServedIRMs.of_text("").irms == {}
    folder = served.irms["anger"].folder
    for text, words in {
        f"a={folder},a={folder}": "given twice",
        str(folder): "is not name=folder",
        f"a+b={folder}": "not a valid IRM name",
        f"a={tmp_path}/nothing": "no such adapter folder",
    }.items():
        with pytest.raises(RealignerError, match=words):
            ServedIRMs.of_text(text)
    with pytest.raises(RealignerError, match="no such adapter folder"):
        irm_environment({"a": "~nosuchuser/x"})
    saved(tmp_path, {"a": {"template": "plain"}, "b": {}})
    with pytest.raises(RealignerError, match=r"template=plain.*template=chat"):
        ServedIRMs.of_text(f"a={tmp_path}/a")


def test_the_salt_tells_mixes_apart_and_leaves_the_host_alone(served: ServedIRMs) -> None:
    mixes = [served.mix(text) for text in ("anger", "anger@1", "sadness@1", "anger@1+sadness@1", "anger@-1")]
    assert len({served.salt(mix, None) for mix in mixes}) == len(mixes)
    assert served.salt(served.mix("anger@1.25"), None) == served.salt(served.mix("anger"), None)
    assert served.salt(Mix(), None) is None
    assert served.salt(Mix(), "own") == "own"
    assert served.salt(served.mix("sadness@0"), "own") == "own"
    assert served.salt(served.mix("anger@1+sadness@0"), None) == served.salt(served.mix("anger@1"), None)
    assert served.salt(mixes[0], "own") != served.salt(mixes[0], None)


def rewritten(served: ServedIRMs, route: str = "/v1/chat/completions", **request: Any) -> dict[str, Any]:
    asked = json.dumps(request).encode()
    middleware = IRMMiddleware(None, served, ["org/host", "host"])  # type: ignore[arg-type]
    found: dict[str, Any] = json.loads(middleware.rewritten(route, asked))
    return found


def test_requests_become_the_engines(served: ServedIRMs) -> None:
    assert rewritten(served, model="host+anger@0.7") == {"model": "host", "vllm_xargs": {"irms": "anger@0.7"}}
    asked: dict[str, Any] = {"model": "org/host+anger+sadness@-1", "vllm_xargs": {"seed": 1}}
    assert rewritten(served, **asked) == {"model": "org/host", "vllm_xargs": {"seed": 1, "irms": "anger@1.25+sadness@-1"}}
    assert rewritten(served, model="host", irms={"anger": 0.5})["vllm_xargs"] == {"irms": "anger@0.5"}
    assert rewritten(served, model="host+anger@0") == {"model": "host"}
    middleware = IRMMiddleware(None, served, ["org/host"])  # type: ignore[arg-type]
    for escaped in (rb'{"model": "org\/host+anger"}', rb'{"model":"org/host\u002banger"}'):
        assert json.loads(middleware.rewritten("/v1/completions", escaped))["vllm_xargs"] == {"irms": "anger@1.25"}
    assert rewritten(served, model="host", vllm_xargs={"irms": "anger"})["vllm_xargs"] == {"irms": "anger@1.25"}
    for untouched in ({"model": "host"}, {"model": "other"}, {"model": "hostess"}, {"model": "host", "irms": None}):
        assert rewritten(served, **untouched) == untouched
    deep = b'{"irms": ' + b"[" * 100_000
    assert middleware.rewritten("/v1/completions", deep) == deep
    chat = rewritten(served, model="host+sadness", messages=[])
    assert chat["chat_template_kwargs"] == {"enable_thinking": False}
    bare = rewritten(served, model="host+sadness@0", messages=[])  # the host, its prompts as the IRM's
    assert bare == {"model": "host", "messages": [], "chat_template_kwargs": {"enable_thinking": False}}
    own = rewritten(served, model="host+sadness", messages=[], chat_template_kwargs={"enable_thinking": True})
    assert own["chat_template_kwargs"] == {"enable_thinking": True}
    response = rewritten(served, "/v1/responses", model="host+sadness", input="Why?")
    assert response["chat_template_kwargs"] == {"enable_thinking": False}
    assert "chat_template_kwargs" not in rewritten(served, "/v1/completions", model="host+sadness", prompt="Why?")


@pytest.mark.parametrize("route", ["/inference/v1/generate", "/cohere/v2/chat", "/v1/embeddings", "/v1/systemone", "/score"])
def test_routes_that_drop_irms_refuse_them(route: str, served: ServedIRMs) -> None:
    for named in ({"model": "host+anger"}, {"model": "host", "irms": "anger"}, {"vllm_xargs": {"irms": "anger@0.5"}}):
        with pytest.raises(UsageError, match=f"irms: {route} drops them; ask /v1/chat/completions"):
            rewritten(served, route, **named)
    assert rewritten(served, route, model="host+anger@0") == {"model": "host"}
    assert rewritten(served, route, model="host") == {"model": "host"}
    own = {"model": "host", "sampling_params": {"extra_args": {"irms": "anger@0.5"}}}  # the engine reads them there itself
    assert rewritten(served, route, **own) == own


@pytest.mark.parametrize("route", ["/tokenize", "/v1/messages/count_tokens"])
def test_a_prompts_tokens_are_counted_as_they_are_asked(route: str, served: ServedIRMs) -> None:
    counted = rewritten(served, route, model="host+sadness", messages=[])
    assert (counted["model"], counted["chat_template_kwargs"]) == ("host", {"enable_thinking": False})


@pytest.mark.parametrize(
    ("request_", "kind", "words"),
    [
        ({"model": "host+joy"}, NotServedError, "'joy' is not loaded"),
        ({"model": "host+"}, NotServedError, "'' is not loaded"),
        ({"model": "host+anger@much"}, UsageError, "is not a number"),
        ({"model": "host+anger", "irms": "sadness"}, UsageError, "one place"),
        ({"model": "host+anger", "vllm_xargs": {"irms": "sadness"}}, UsageError, "one place"),
        ({"model": "host", "irms": 7}, UsageError, "neither terms"),
        ({"model": "host", "vllm_xargs": {"irms": "joy"}}, NotServedError, "'joy' is not loaded"),
        ({"model": "host+anger", "use_beam_search": True}, UsageError, "beam"),
        ({"model": "host+anger", "where": "reply"}, UsageError, "acts on every token"),
        ({"model": "host", "vllm_xargs": {"irms": "anger", "where": 5}}, UsageError, "acts on every token"),
        ({"model": "host+anger", "vllm_xargs": [1]}, UsageError, "vllm_xargs: .* not an object"),
        ({"model": "host+sadness", "messages": [], "chat_template_kwargs": "x"}, UsageError, "kwargs: 'x' is not an object"),
        ({"model": "host+anger+sadness", "messages": []}, UsageError, "different prompt templates"),
    ],
)
def test_bad_requests_are_named(request_: dict[str, Any], kind: type[Exception], words: str, served: ServedIRMs) -> None:
    with pytest.raises(kind, match=words):
        rewritten(served, **request_)


def asked(app: Any, method: str, path: str, body: bytes, headers: list[tuple[bytes, bytes]]) -> tuple[int, dict[str, Any]]:
    sent: list[Any] = []
    half = len(body) // 2
    parts = [body[:half], body[half:]]

    async def receive() -> Any:
        return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": method, "path": path, "headers": headers}
    asyncio.run(app(scope, receive, send))
    return sent[0]["status"], json.loads(b"".join(message.get("body", b"") for message in sent[1:]))


def test_the_middleware_lists_answers_and_passes_on(served: ServedIRMs) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        body = b'{"data": [{"id": "host", "root": "/x"}, {"id": "lora"}]}'
        if scope["method"] == "POST":
            body = (await receive())["body"]
            lengths = [value for key, value in scope["headers"] if key == b"content-length"]
            assert lengths in ([], [str(len(body)).encode()])
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"9")]})
        await send({"type": "http.response.body", "body": body})

    middleware = IRMMiddleware(app, served, ["host"])
    status, models = asked(middleware, "GET", "/v1/models", b"", [])
    assert status == 200
    assert [card["id"] for card in models["data"]] == ["host", "lora", "host+anger", "host+sadness"]
    assert models["data"][2]["parent"] == "host"
    assert models["data"][2]["strength"] == 1.25
    headers = [(b"content-type", b"application/json; charset=utf-8"), (b"content-length", b"27")]
    status, body = asked(middleware, "POST", "/v1/completions", b'{"model": "host+anger@0.5"}', headers)
    assert (status, body) == (200, {"model": "host", "vllm_xargs": {"irms": "anger@0.5"}})
    status, body = asked(middleware, "POST", "/v1/completions", b'{"model": "host+joy"}', headers)
    assert status == 404
    assert body["error"]["code"] == 404
    assert "joy" in body["error"]["message"]
    status, body = asked(middleware, "POST", "/v1/completions", b'{"model": "host+anger@x"}', headers)
    assert status == 400
    status, body = asked(middleware, "POST", "/inference/v1/generate", b'{"model": "host+anger"}', headers)
    assert status == 400
    assert "\n" not in body["error"]["message"]


# --- starting ---------------------------------------------------------------------------------------------------------------


def test_an_unknown_engine_is_refused_in_one_line(served: ServedIRMs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REALIGNER_IRMS", f"anger={served.irms['anger'].folder}")
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(__version__="9.9", __path__=[]))
    with pytest.raises(RealignerError, match=r"vLLM 9.9 is not known to realigner") as caught:
        register()
    assert "\n" not in str(caught.value)


def test_the_number_of_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    assert spare_slots(2) == 0
    monkeypatch.setenv("REALIGNER_ADMIN", "1")
    assert spare_slots(2) == 4
    monkeypatch.setenv("REALIGNER_SLOTS", "8")
    assert spare_slots(2) == 6
    for bad in ("1", "many", "-3", "9999"):
        monkeypatch.setenv("REALIGNER_SLOTS", bad)
        with pytest.raises(UsageError, match="REALIGNER_SLOTS"):
            spare_slots(2)


@pytest.mark.parametrize("setting", ["pipeline_parallel_size", "prefill_context_parallel_size"])
def test_what_splits_a_step_is_refused(setting: str) -> None:
    parallel = SimpleNamespace(**{"pipeline_parallel_size": 1, setting: 2})
    with pytest.raises(RealignerError, match=setting):
        vllm_runner.refuse_setup(SimpleNamespace(parallel_config=parallel))
