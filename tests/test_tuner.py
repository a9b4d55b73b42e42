"""The IRM as a PEFT method: saving, strict loading, several at once, and what is refused."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import realigner as ra
from realigner.errors import RealignerError, UsageError
from realigner.irm_config import CONFIG_FILE, WEIGHTS_FILE, IRMConfig
from realigner.tiny import tiny_host
from realigner.tuner import load_irm, tuner_of
from tests.tiny import tiny_folder, tiny_pair

IDS = torch.arange(3, 12)[None]


def realigned(host: Any = None, **config: Any) -> Any:
    torch.manual_seed(2)
    model = get_peft_model(tiny_host("llama") if host is None else host, IRMConfig(output_std=0.3, **config))
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(input_ids=IDS).logits
    return out


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = realigned()
    model.save_pretrained(str(tmp_path / "irm"))
    return tmp_path / "irm"


def test_only_the_irm_is_trainable_and_saved(saved: Path) -> None:
    model = realigned()
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable
    assert all(name.startswith("base_model.registry.networks.default.") for name in trainable)
    names = set(load_file(saved / WEIGHTS_FILE))
    assert names == {f"irm.{key}" for key in tuner_of(model).registry.network("default").state_dict()}


def test_round_trip_in_a_fresh_process_is_bit_identical(tmp_path: Path) -> None:
    """The design's snippet, word for word: importing realigner is enough for PEFT to know IRMs."""
    folder = tiny_folder(tmp_path / "host")
    host, _ = ra.load_host(str(folder), dtype="float32")
    model = realigned(host)
    model.save_pretrained(str(tmp_path / "irm"))
    torch.save(logits(model), tmp_path / "want.pt")
    code = f"""
import torch
import realigner as ra
from peft import PeftModel
from transformers import AutoModelForCausalLM
torch.set_num_threads({torch.get_num_threads()})
host = AutoModelForCausalLM.from_pretrained({str(folder)!r})
model = PeftModel.from_pretrained(host, {str(tmp_path / "irm")!r})
with torch.no_grad():
    got = model(input_ids=torch.arange(3, 12)[None]).logits
assert torch.equal(got, torch.load({str(tmp_path / "want.pt")!r})), "logits differ"
assert not any(p.requires_grad for p in model.parameters())
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.proof
@pytest.mark.parametrize(
    "order",
    ["import peft, realigner", "import realigner, importlib.util; importlib.util.find_spec('peft'); import peft"],
    ids=["peft first", "somebody asks whether peft is there"],
)
def test_peft_knows_irms_in_any_order(order: str) -> None:
    code = f"{order}\nfrom peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as m; assert 'IRM' in m"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_saving_again_gives_the_same_bytes(saved: Path, tmp_path: Path) -> None:
    model = PeftModel.from_pretrained(tiny_host("llama"), str(saved))
    model.save_pretrained(str(tmp_path / "again"))
    assert (saved / WEIGHTS_FILE).read_bytes() == (tmp_path / "again" / WEIGHTS_FILE).read_bytes()


# --- refusals on load -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", range(20))
def test_truncated_weights_are_refused(saved: Path, part: int) -> None:
    path = saved / WEIGHTS_FILE
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * part // 20])
    for load in (load_irm, PeftModel.from_pretrained):
        with pytest.raises(RealignerError, match="truncated or damaged") as caught:
            load(tiny_host("llama"), str(saved))
        assert "\n" not in str(caught.value)
        assert WEIGHTS_FILE in str(caught.value)


@pytest.mark.parametrize(
    "other",
    [
        lambda: tiny_host("llama", seed=1),
        lambda: tiny_host("mistral"),
        lambda: tiny_host("llama", num_hidden_layers=2),
        lambda: tiny_host("llama", hidden_size=64),
        lambda: tiny_host("llama", vocab_size=120),
        lambda: tiny_host("llama", intermediate_size=48),
    ],
)
def test_another_host_is_refused(saved: Path, other: Any) -> None:
    host = other()
    want = logits(host)
    with pytest.raises(RealignerError, match="made for another host"):
        PeftModel.from_pretrained(host, str(saved))
    assert torch.equal(logits(host), want)  # and left as it was


def test_the_same_host_in_bfloat16_is_accepted(saved: Path) -> None:
    PeftModel.from_pretrained(tiny_host("llama").to(torch.bfloat16), str(saved))


def edit_weights(folder: Path, change: Any) -> None:
    tensors = load_file(folder / WEIGHTS_FILE)
    change(tensors)
    save_file(tensors, folder / WEIGHTS_FILE)


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / CONFIG_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update({"irm.trunk.0.wait": t.pop("irm.trunk.0.weight")}), "trunk.0.weight is missing"),
        (lambda t: t.pop("irm.output.bias"), "output.bias is missing"),
        (lambda t: t.update({"irm.more": torch.zeros(1)}), "does not have"),
        (lambda t: t.update({"irm.output.bias": torch.zeros(3)}), "has shape"),
        (lambda t: t.clear(), "is missing"),
    ],
)
def test_wrong_tensors_are_refused(saved: Path, change: Any, message: str) -> None:
    edit_weights(saved, change)
    with pytest.raises(RealignerError, match=message):
        PeftModel.from_pretrained(tiny_host("llama"), str(saved))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LORA"}, "not an IRM"),
        ({"rank": -1}, "rank"),
        ({"layers": [0, 99]}, "no layer 99"),
        ({"preset": "huge"}, "preset"),
        ({"surprise": 1}, "unknown key 'surprise'"),
        ({"site": {"layers": "elsewhere"}}, "the probe now finds"),
        ({"host": {"name": "x"}}, "fingerprint"),
        ({"strength": 0.8, "strength_range": [0.9, 1.2]}, r"strength_range.*0\.8, between"),
        ({"strength_range": [1, "2"]}, "strength_range"),
    ],
)
def test_wrong_configs_are_refused(saved: Path, changes: dict[str, Any], message: str) -> None:
    edit_config(saved, **changes)
    with pytest.raises(RealignerError, match=message):
        load_irm(tiny_host("llama"), saved)


def test_broken_folders_are_refused(saved: Path, tmp_path: Path) -> None:
    host = tiny_host("llama")
    with pytest.raises(RealignerError, match="no such adapter folder"):
        load_irm(host, tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RealignerError, match="has no adapter_config"):
        load_irm(host, tmp_path / "empty")
    (saved / WEIGHTS_FILE).rename(saved / "adapter_model.bin")
    with pytest.raises(RealignerError, match="pickle"):
        PeftModel.from_pretrained(host, str(saved))
    (saved / CONFIG_FILE).write_text("{")
    with pytest.raises(RealignerError, match="not valid JSON"):
        load_irm(host, saved)


# --- several IRMs, strength -------------------------------------------------------------------------------------------------


def test_set_add_and_delete() -> None:
    model = realigned()
    one = logits(model)
    torch.manual_seed(9)
    model.add_adapter("second", IRMConfig(output_std=0.3, layers=[1, 2]))
    assert torch.equal(logits(model), one)
    model.set_adapter("second")
    two = logits(model)
    assert not torch.equal(one, two)
    model.base_model.set_adapter(["default", "second"])
    both = logits(model)
    with ra.strength(model, 0.0, adapter="second"):
        assert torch.equal(logits(model), one)
    with ra.strength(model, 0.0, adapter="default"):
        assert torch.equal(logits(model), two)
    assert not torch.equal(both, one)
    model.set_adapter("default")
    model.delete_adapter("second")
    assert torch.equal(logits(model), one)
    with pytest.raises((UsageError, ValueError), match="second"):
        model.set_adapter("second")


def test_two_irms_sum() -> None:
    """Where both deltas are of the same network, the sum is twice its strength."""
    model = realigned()
    model.add_adapter("twin", IRMConfig(output_std=0.3))
    bank = tuner_of(model).registry
    bank.network("twin").load_state_dict(bank.network("default").state_dict())
    with ra.strength(model, 2.0):
        want = logits(model)
    model.base_model.set_adapter(["default", "twin"])
    assert torch.allclose(logits(model), want, atol=1e-6)


def test_strength_is_restored() -> None:
    model = realigned()
    with ra.strength(model, 0.25), ra.strength(model, 3.0):
        assert float(tuner_of(model).settings.strengths["default"]) == 3.0
    assert float(tuner_of(model).settings.strengths["default"]) == 1.0
    for wrong in (float("nan"), float("inf"), 1e38):
        with pytest.raises(UsageError, match="strength"), ra.strength(model, wrong):
            pass
    with pytest.raises(UsageError, match="nobody"), ra.strength(model, 1.0, adapter="nobody"):
        pass
    with pytest.raises(UsageError, match="no IRM"), ra.strength(tiny_host("llama"), 1.0):
        pass


def test_trainability_follows_peft() -> None:
    model = realigned()
    model.add_adapter("second", IRMConfig())
    network = tuner_of(model).registry.network
    assert all(p.requires_grad for p in network("default").parameters())
    assert not any(p.requires_grad for p in network("second").parameters())
    model.set_adapter("second")
    assert all(p.requires_grad for p in network("second").parameters())
    assert not any(p.requires_grad for p in network("default").parameters())
    with model.disable_adapter():
        assert not any(p.requires_grad for p in model.parameters())


def test_what_cannot_be_says_so() -> None:
    model = realigned()
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(RealignerError, match="cannot be merged"):
            merge()
    for rows in (["nobody"], "default", [("default", "nobody")], ["default", "default"]):
        with pytest.raises(UsageError, match="adapter_names"):
            model(input_ids=IDS, adapter_names=rows)
    for name in ("trunk", "0", "a.b", "train", "keys", ""):
        with pytest.raises(UsageError, match="clashes"):
            model.add_adapter(name, IRMConfig())
    with pytest.raises(UsageError, match="there is no layer 3"):
        get_peft_model(tiny_host("llama"), IRMConfig(layers=[3]))


def test_status_and_counts_work() -> None:
    model = realigned()
    status = model.get_model_status()
    assert status.enabled is True
    assert status.active_adapters == ["default"]
    trainable, total = model.get_nb_trainable_parameters()
    assert trainable == sum(p.numel() for p in tuner_of(model).registry.parameters())
    assert total == trainable + sum(p.numel() for p in tiny_host("llama").parameters())


@pytest.mark.parametrize("family", ["llama", "minimax"])  # minimax: its residual has terms that are kept aside
def test_deepcopy_is_independent(family: str) -> None:
    model = realigned(tiny_host(family))
    twin = copy.deepcopy(model)
    want = logits(model)
    assert torch.equal(logits(twin), want)
    with ra.strength(twin, 0.0):
        assert torch.equal(logits(model), want)
        assert not torch.equal(logits(twin), want)
    assert torch.equal(logits(twin), want)
    with torch.no_grad():
        tuner_of(twin).registry.network("default").output.bias.normal_()
    assert not torch.equal(logits(twin), want)
    assert torch.equal(logits(model), want)
    pickled = pickle.loads(pickle.dumps(model))  # as processes exchange models; files of ours never hold pickles
    assert torch.equal(logits(pickled), want)


def test_low_memory_loading(saved: Path) -> None:
    model = PeftModel.from_pretrained(tiny_host("llama"), str(saved), low_cpu_mem_usage=True)
    assert torch.equal(logits(model), logits(PeftModel.from_pretrained(tiny_host("llama"), str(saved))))


def test_config_keeps_no_path_of_this_machine(tmp_path: Path) -> None:
    host, _ = tiny_pair()
    host.realigner = ra.hosts.HostInfo("some/host", None)
    host.name_or_path = "/root/.cache/secret"
    realigned(host).save_pretrained(str(tmp_path), save_embedding_layers=False)
    text = (tmp_path / CONFIG_FILE).read_text()
    assert "secret" not in text
    assert json.loads(text)["base_model_name_or_path"] == "some/host"


def test_a_second_injector_is_refused() -> None:
    """Two PeftModels on one host would overwrite each other's deltas."""
    host = tiny_host("llama")
    model = realigned(host)
    want = logits(model)
    with pytest.raises(RealignerError, match="carries an IRM already"):
        get_peft_model(host, IRMConfig(rank=3))
    assert torch.equal(logits(model), want)
    assert model.peft_config["default"].rank is None
    realigned(model.unload())


def test_a_host_can_be_trained_again_once_the_irm_is_gone(saved: Path, tmp_path: Path) -> None:
    """After training and `unload`, after a load, and after one that is refused."""
    shutil.copytree(saved, tmp_path / "bad")
    weights = load_file(tmp_path / "bad" / WEIGHTS_FILE)
    weights["irm.output.bias"][0] = float("nan")
    save_file(weights, tmp_path / "bad" / WEIGHTS_FILE)
    host = tiny_host("llama")
    frozen = [weight for weight, _ in zip(host.parameters(), range(2), strict=False)]
    host.requires_grad_(True)
    for weight in frozen:
        weight.requires_grad_(False)

    def learns() -> list[bool]:
        return [weight.requires_grad for weight in host.parameters()]

    before = learns()
    model = get_peft_model(host, IRMConfig())
    model.train()
    assert not any(learns())
    model.unload()
    assert learns() == before
    assert not any(module.training for module in host.modules())
    load_irm(host, saved).unload()
    assert learns() == before
    with pytest.raises(RealignerError, match="not finite"):
        load_irm(host, tmp_path / "bad")
    assert learns() == before


def test_the_only_adapter_is_not_deleted() -> None:
    with pytest.raises(UsageError, match="unload"):
        realigned().delete_adapter("default")


# --- 1,000 configs ----------------------------------------------------------------------------------------------------------

JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 40),
    st.floats(allow_nan=True),
    st.text(max_size=6),
    st.lists(st.one_of(st.integers(-2, 9), st.text(max_size=2)), max_size=4),
)
GOOD: dict[str, Any] = {
    "preset": st.sampled_from(["compact", "paper"]),
    "layers": st.one_of(
        st.sampled_from(["all", "0-2", "0,2", "1"]), st.lists(st.integers(0, 2), min_size=1, max_size=3, unique=True)
    ),
    "widths": st.one_of(st.none(), st.lists(st.integers(1, 12), min_size=1, max_size=3)),
    "rank": st.one_of(st.none(), st.integers(0, 9)),
    "output_std": st.one_of(st.none(), st.floats(0, 2)),
    "input_norm": st.one_of(st.none(), st.booleans()),
    "strength_range": st.one_of(st.none(), st.tuples(st.floats(0, 1), st.floats(1, 3))),
    "tone": st.one_of(st.none(), st.text(st.characters(codec="utf-8"), max_size=9)),
    "layers_path": st.sampled_from([None, "model.layers"]),
}
HOST = tiny_host("llama")


@st.composite
def config_values(draw: st.DrawFn) -> dict[str, Any]:
    """Mostly good values, now and then one of any kind."""
    values = {name: draw(strategy) for name, strategy in GOOD.items() if draw(st.booleans())}
    if draw(st.booleans()):
        values[draw(st.sampled_from(sorted(GOOD)))] = draw(JUNK)
    return values


@pytest.mark.proof
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(config_values())
def test_a_config_round_trips_or_is_a_named_error(values: dict[str, Any]) -> None:
    round_trip(values)


@pytest.mark.slow
@settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(config_values())
def test_a_thousand_configs(values: dict[str, Any]) -> None:
    round_trip(values)


def round_trip(values: dict[str, Any]) -> None:
    """Valid: attached, saved and loaded again, it gives the same logits, and the same config. Invalid: an error with a name."""
    refusal = ""
    try:
        model = get_peft_model(HOST, IRMConfig(**values)).eval()
    except RealignerError as error:
        refusal = str(error)
    if refusal:
        assert "\n" not in refusal
        assert any(refusal.startswith(name) for name in values)
        assert not any(m._forward_hooks for m in HOST.modules())
        return
    try:
        want = logits(model)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            model.unload()
            model = load_irm(HOST, folder)
            assert torch.equal(logits(model), want)
            model.save_pretrained(f"{folder}/again")
            for name in (CONFIG_FILE, WEIGHTS_FILE):
                assert Path(folder, name).read_bytes() == Path(folder, "again", name).read_bytes()
    finally:
        model.unload()


def test_a_load_that_fails_leaves_nothing_behind(saved: Path, tmp_path: Path) -> None:
    """The host is as it was and takes the next IRM; a second IRM that fails leaves the first alone."""
    shutil.copytree(saved, tmp_path / "bad")
    weights = load_file(tmp_path / "bad" / WEIGHTS_FILE)
    weights["irm.output.bias"][0] = float("nan")
    save_file(weights, tmp_path / "bad" / WEIGHTS_FILE, metadata={"format": "pt"})
    host = tiny_host("llama")
    bare = logits(host)
    with pytest.raises(RealignerError, match="not finite"):
        PeftModel.from_pretrained(host, tmp_path / "bad")
    assert torch.equal(logits(host), bare)
    assert not hasattr(host, "peft_config")
    model = PeftModel.from_pretrained(host, saved)
    want = logits(model)
    assert not torch.equal(want, bare)
    for name in ("other", "default"):  # a new one, and one that is there
        with pytest.raises(RealignerError, match="not finite"):
            model.load_adapter(str(tmp_path / "bad"), adapter_name=name)
        assert list(model.peft_config) == list(tuner_of(model).registry.networks) == ["default"]
        assert torch.equal(logits(model), want)
    model.load_adapter(str(saved), adapter_name="other")


def test_sites_are_found_anew_in_a_changed_layer() -> None:
    host = tiny_host("llama")
    before = ra.find_sites(host)
    assert ra.find_sites(host) is before
    layer: Any = before.layers[1]
    layer.self_attn = copy.deepcopy(layer.self_attn)
    assert ra.find_sites(host) is not before
