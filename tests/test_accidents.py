"""After an accident nothing is left behind: the bare host's logits, the IRM's, and a load are what they were, to the bit."""

from __future__ import annotations

import json
import random
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import realigner as ra
from realigner.errors import RealignerError, UsageError
from realigner.injection import attached_injectors
from realigner.irm_config import CONFIG_FILE, WEIGHTS_FILE, IRMConfig
from realigner.traces.recording import record
from realigner.tuner import load_irm, tuner_of
from tests.tiny import tiny_pair

IDS = torch.arange(3, 12).repeat(2, 1) + torch.tensor([[0], [5]])
ERRORS = (ValueError, MemoryError, KeyboardInterrupt, RuntimeError)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(input_ids=IDS).logits
    return out


def realigned(host: Any, **config: Any) -> Any:
    torch.manual_seed(2)
    return get_peft_model(host, IRMConfig(output_std=0.3, **config)).eval()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    host, _ = tiny_pair()
    realigned(host).save_pretrained(str(tmp_path / "irm"))
    return tmp_path / "irm"


# --- in a forward ---------------------------------------------------------------------------------------------------------


def plain(model: Any, _: Any) -> None:
    with torch.no_grad():
        model(input_ids=IDS)


def of_the_host(model: Any, _: Any) -> None:
    tuner_of(model).model(input_ids=IDS)


def with_gradients(model: Any, _: Any) -> None:
    model.train()
    model(input_ids=IDS, labels=IDS).loss.backward()


def checkpointed(model: Any, _: Any) -> None:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    (model(input_ids=IDS, labels=IDS).loss + model(input_ids=IDS + 1, labels=IDS).loss).backward()


def beams(model: Any, _: Any) -> None:
    model.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=4, num_beams=3, strength=[0.5, 2.0])


def recorded(model: Any, tokenizer: Any) -> None:
    with record(model, tokenizer), ra.strength(model, 0.7):
        model.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=4)


def streamed(model: Any, tokenizer: Any) -> None:
    for _ in ra.stream(model, tokenizer, "Why?", max_new_tokens=5, strength=2.0):
        pass


def rows(model: Any, _: Any) -> None:
    with ra.strength(model, [0.5, 2.0]):
        model(input_ids=IDS, adapter_names=["default", "__base__"])


@pytest.mark.parametrize("family", ["llama", "mamba2"])
@pytest.mark.parametrize("how", [plain, of_the_host, with_gradients, checkpointed, beams, recorded, streamed, rows])
@pytest.mark.parametrize("seed", range(3))
def test_an_error_somewhere_in_a_call(family: str, how: Callable[[Any, Any], None], seed: int) -> None:
    """At a random call of a random module, one of several errors; 48 accidents."""
    host, tokenizer = tiny_pair(family)
    bare = logits(host)
    model = realigned(host)
    own = logits(model)
    chance = random.Random(f"{family} {how.__name__} {seed}")
    modules = [module for layer in tuner_of(model).sites.layers for module in layer.modules()]
    module, error = chance.choice([*modules, *tuner_of(model).registry.modules()]), chance.choice(ERRORS)
    countdown = [chance.choice([1, 1, 2, 3, 4])]

    def fail(*_: Any) -> None:
        countdown[0] -= 1
        if countdown[0] == 0:
            raise error("an accident")

    handle = module.register_forward_hook(fail) if chance.random() < 0.5 else module.register_forward_pre_hook(fail)
    try:
        how(model, tokenizer)
    except error:
        assert countdown[0] <= 0
    handle.remove()

    if family == "llama":  # a layer by itself, before any forward could clean up
        x, position = torch.randn(2, 3, 32), torch.arange(3)[None]
        with torch.no_grad():
            embeddings = host.model.rotary_emb(x, position)
            got = host.model.layers[1](x, position_embeddings=embeddings)
            model.unload()
            assert torch.equal(got, host.model.layers[1](x, position_embeddings=embeddings))
        model = realigned(host)
    model.eval()
    with model.disable_adapter():
        assert torch.equal(logits(host), bare)
    assert torch.equal(logits(model), own)
    model.unload()
    assert torch.equal(logits(host), bare)
    assert torch.equal(logits(realigned(host)), own)


def test_a_layer_that_is_recomputed_halfway() -> None:
    """Mamba2's recomputation stops before the branch; what follows is the host's own, and another batch."""
    host, _ = tiny_pair("mamba2")
    bare = logits(host)
    model = realigned(host)
    own = logits(model)
    for size in (1, 2):
        checkpointed(model, None)
        model.eval()
        with torch.no_grad(), model.disable_adapter():
            assert torch.equal(model(input_ids=IDS[:size]).logits, host(input_ids=IDS[:size]).logits)
        assert torch.equal(logits(model), own)
    model.unload()
    assert torch.equal(logits(host), bare)


# --- refused loads ----------------------------------------------------------------------------------------------------------


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        found = load_file(folder / WEIGHTS_FILE)
        change(found)
        save_file(found, folder / WEIGHTS_FILE)

    return edit


def config(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / CONFIG_FILE
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


def cast(dtype: torch.dtype) -> Callable[[Path], None]:
    return tensors(lambda found: found.update({"irm.output.bias": found["irm.output.bias"].to(dtype)}))


def header(folder: Path) -> None:
    """Said to be 80 GB, and is not there."""
    path = folder / WEIGHTS_FILE
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    values = json.loads(data[8 : 8 + size])
    values["irm.output.bias"]["shape"] = [20_000_000_000]
    text = json.dumps(values).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])


REFUSED: dict[str, Callable[[Path], Any]] = {
    "missing": tensors(lambda found: found.pop("irm.trunk.0.bias")),
    "misshapen": tensors(lambda found: found.update({"irm.output.bias": torch.zeros(3)})),
    "extra": tensors(lambda found: found.update({"irm.more": torch.zeros(3)})),
    "foreign": tensors(lambda found: found.update({"more": torch.zeros(3)})),
    "nan": tensors(lambda found: found["irm.output.weight"][1].fill_(float("nan"))),
    "infinite": tensors(lambda found: found["irm.trunk.0.weight"][0].fill_(float("inf"))),
    **{str(t)[6:]: cast(t) for t in (torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.uint8)},
    "header": header,
    "truncated": lambda folder: (folder / WEIGHTS_FILE).write_bytes((folder / WEIGHTS_FILE).read_bytes()[:-9]),
    "empty": lambda folder: (folder / WEIGHTS_FILE).write_bytes(b""),
    "pickle": lambda folder: (folder / WEIGHTS_FILE).rename(folder / "adapter_model.bin"),
    "rank": config(rank=20_000_000),
    "widths": config(widths=[8] * 10_000),
    "layers": config(layers="0-99999," * 2000 + "1"),
    "site": config(site={"layers": "elsewhere"}),
    "host": config(host={"name": "x"}),
    "task_type": config(task_type=["CAUSAL_LM"]),
    "strength": config(strength=[1.0]),
    "modules_to_save": config(modules_to_save=["lm_head"]),
    "names": config(modules_to_save=[[]]),
    "tone": config(tone={"a": 1}),
}


@pytest.mark.parametrize("load", [load_irm, PeftModel.from_pretrained, "second"])
@pytest.mark.parametrize("kind", REFUSED)
def test_a_refused_load_leaves_the_host_bare(saved: Path, tmp_path: Path, kind: str, load: Any) -> None:
    good = Path(tmp_path / "good")
    good.mkdir()
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        (good / name).write_bytes((saved / name).read_bytes())
    host, _ = tiny_pair()
    bare = logits(host)
    model = load_irm(host, good)
    own = logits(model)
    REFUSED[kind](saved)
    if load == "second":  # beside a good one
        with pytest.raises(RealignerError) as caught:
            model.load_adapter(str(saved), adapter_name="other")
        assert list(model.peft_config) == list(tuner_of(model).registry.networks) == ["default"]
        assert torch.equal(logits(model), own)
        model.load_adapter(str(good), adapter_name="other")
        model.set_adapter("other")
    else:
        model.unload()
        with pytest.raises(RealignerError) as caught:
            load(host, str(saved))
        assert torch.equal(logits(host), bare)
        assert not attached_injectors(host)
        assert not hasattr(host, "peft_config")
        model = load_irm(host, good)
    assert "\n" not in str(caught.value)
    assert torch.equal(logits(model), own)
    model.unload()
    assert torch.equal(logits(host), bare)


def test_what_a_config_asks_for_is_compared_before_it_is_allocated(saved: Path) -> None:
    """Rank 20,000,000 would take gigabytes."""
    host, _ = tiny_pair()
    load_irm(host, saved)
    ra.unload(host)
    config(rank=20_000_000)(saved)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(RealignerError, match=r"has shape .*, not \[20000000, "):
        load_irm(host, saved)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("place", ["safe_load", "load_state_dict", "add", "_checked"])
def test_an_accident_while_loading(saved: Path, monkeypatch: pytest.MonkeyPatch, error: Any, place: str) -> None:
    """Ctrl-C, or a disk that fails, at any step."""
    from peft.utils import save_and_load

    from realigner.adapters import AdapterRegistry
    from realigner.tuner import IRMModel

    def fail(*_: Any, **__: Any) -> None:
        raise error("an accident")

    host, _ = tiny_pair()
    bare = logits(host)
    own = logits(load_irm(host, saved))
    ra.unload(host)
    owner: Any = {
        "safe_load": (save_and_load, "safe_load_file"),
        "load_state_dict": (PeftModel, "load_state_dict"),
        "add": (AdapterRegistry, "add"),
        "_checked": (IRMModel, "_checked"),
    }[place]
    assert hasattr(*owner)
    with monkeypatch.context() as patch:
        patch.setattr(owner[0], owner[1], fail)
        with pytest.raises(error):
            load_irm(host, saved)
    assert torch.equal(logits(host), bare)
    assert not attached_injectors(host)
    assert torch.equal(logits(load_irm(host, saved)), own)


def test_modules_that_are_saved_beside_an_irm_are_checked_too(tmp_path: Path) -> None:
    host, _ = tiny_pair()
    bare = logits(host)
    realigned(host, modules_to_save=["lm_head"]).save_pretrained(str(tmp_path))
    ra.unload(host)
    path = tmp_path / WEIGHTS_FILE
    found = load_file(path)
    key = next(key for key in found if "lm_head" in key)
    for wrong in (torch.zeros(3), torch.full_like(found[key], float("nan")), None):
        save_file({k: v for k, v in found.items() if k != key} | ({} if wrong is None else {key: wrong}), path)
        with pytest.raises(RealignerError, match="lm_head"):
            load_irm(host, tmp_path)
        assert torch.equal(logits(host), bare)
        assert not isinstance(host.lm_head, PeftModel)
        assert isinstance(host.lm_head, torch.nn.Linear)
    save_file(found, path)
    load_irm(host, tmp_path)


def test_an_irm_without_its_model_can_be_taken_off() -> None:
    host, _ = tiny_pair()
    bare = logits(host)
    realigned(host)
    with pytest.raises(RealignerError, match=r"realigner\.unload"):
        realigned(host)
    ra.unload(host)
    assert torch.equal(logits(host), bare)
    realigned(host)


# --- settings -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [[0.0, 1.0, 2.0, 3.0], [1.0, 2.0, 3.0]])
def test_strengths_with_beams_are_one_for_each_prompt(given: list[float]) -> None:
    """Four for two prompts with two beams would be reordered with the beams."""
    host, _ = tiny_pair()
    model = realigned(host)
    options: dict[str, Any] = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 4}
    for repeats in ({"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}):
        with pytest.raises(UsageError, match="give one for each prompt"):
            model.generate(input_ids=IDS, **options, **repeats, strength=given)
        with pytest.raises(UsageError, match="give one for each prompt"):
            model.generate(input_ids=IDS, **options, **repeats, adapter_names=["default", "__base__"] * 2)
        assert model.generate(input_ids=IDS, **options, **repeats, strength=given[:2]) is not None


@pytest.mark.parametrize(
    "value", [[True, False], True, [[0.5, True]], torch.tensor([True, False]), (1.0, False), [1j, 0.5], torch.ones(2, 1, 1)]
)
def test_strengths_are_numbers(value: Any) -> None:
    host, _ = tiny_pair()
    model = realigned(host)
    with pytest.raises(UsageError, match="strength"), ra.strength(model, value):
        pass


def test_an_irm_that_is_attached_in_inference_mode() -> None:
    host, _ = tiny_pair()
    want = logits(realigned(host))
    ra.unload(host)
    with torch.inference_mode():
        model = realigned(host)
        block = ra.strength(model, [0.5, 2.0])
        block.__enter__()
    block.__exit__(None, None, None)
    assert torch.equal(logits(model), want)
    for value in (0.5, [0.5, 2.0]):
        with ra.strength(model, value):
            model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in tuner_of(model).registry.parameters())


def test_an_irm_that_is_moved_in_inference_mode_can_be_trained() -> None:
    model = realigned(tiny_pair()[0])
    with torch.inference_mode():
        model.to("cpu")
        model(input_ids=IDS)
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in tuner_of(model).registry.parameters())


@pytest.mark.parametrize("order", ["first first", "strength between"])
def test_recordings_that_are_closed_out_of_order(order: str) -> None:
    host, tokenizer = tiny_pair()
    model = realigned(host)
    ids = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "max_new_tokens": 3}
    one, two = record(model, tokenizer), record(model, tokenizer) if order == "first first" else ra.strength(model, 0.5)
    first: Any = one.__enter__()
    if order == "strength between":
        second: Any = two.__enter__()
        model.generate(**ids)
        one.__exit__(None, None, None)
        assert first.sizes["text"] == 2
        assert float(tuner_of(model).settings.strengths["default"]) == 0.5
    else:
        model.generate(**ids)
        second = two.__enter__()
        model.generate(**ids)
        one.__exit__(None, None, None)
        model.generate(**ids)
        assert (first.sizes["text"], len(second)) == (4, 0)
    two.__exit__(None, None, None)
    if order == "first first":
        assert second.sizes["text"] == 4
    assert "generate" not in vars(host)
    assert tuner_of(model).settings is tuner_of(model).injector.threads.default
    assert not host._forward_pre_hooks


def test_a_config_of_a_file_without_its_weights(saved: Path) -> None:
    """PEFT's way to make another IRM of the same kind; a model whose IRM was taken off does not put it back."""
    host, _ = tiny_pair()
    bare = logits(host)
    torch.manual_seed(2)
    model = get_peft_model(host, IRMConfig.from_pretrained(str(saved))).eval()
    assert not torch.equal(logits(model), bare)
    model.unload()
    with pytest.raises(RealignerError, match="never run"):
        logits(model)
    assert torch.equal(logits(host), bare)
