"""IRMs together: several in one batch, a strength per row, beside LoRA, in TRL's trainers, and on their way to the hub."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from huggingface_hub.errors import EntryNotFoundError
from peft import LoraConfig, PeftModel, get_peft_model
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

import realigner as ra
from realigner.errors import RealignerError, UsageError
from realigner.fingerprints import weights_hash
from realigner.irm_config import IRMConfig
from realigner.tiny import tiny_host
from realigner.tuner import tuner_of
from tests.tiny import tiny_pair


def two_tones(host: Any = None, **config: Any) -> Any:
    """A model with two IRMs, anger active."""
    torch.manual_seed(1)
    config = {"output_std": 1.0, **config}
    model = get_peft_model(tiny_host("llama") if host is None else host, IRMConfig(**config), adapter_name="anger").eval()
    model.add_adapter("sadness", IRMConfig(**config))
    return model


def prompts(batch: int = 4, length: int = 7) -> torch.Tensor:
    return torch.randint(3, 100, (batch, length), generator=torch.Generator().manual_seed(5))


def tokens(model: Any, ids: torch.Tensor, **options: Any) -> Any:
    settings: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    mask = torch.ones_like(ids)
    mask[ids == 0] = 0
    out: torch.Tensor = model.generate(input_ids=ids, attention_mask=mask, **(settings | options))
    return out


ROWS: list[Any] = ["__base__", "anger", "sadness", ("anger", "sadness")]
SCALE = {"anger": 1.0, "sadness": 0.5}


def alone(model: Any, row: Any, ids: torch.Tensor, **options: Any) -> Any:
    """One row by itself, with its IRMs set active in the ordinary way."""
    if row == "__base__":
        with model.disable_adapter():
            return tokens(model, ids, **options)
    names = [row] if isinstance(row, str) else list(row)
    model.base_model.set_adapter(names)
    try:
        with ra.strength(model, {name: SCALE[name] for name in names}):
            return tokens(model, ids, **options)
    finally:
        model.base_model.set_adapter("anger")


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"use_cache": False}], ids=["greedy", "beams", "uncached"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "olmo2", "gpt_neox"])
def test_mixed_batch(family: str, options: dict[str, Any]) -> None:
    """Four rows, four settings: none, anger at 1, sadness at 0.5, both; each gives the tokens that it gives alone."""
    model = two_tones(tiny_host(family))
    ids = prompts()
    want = torch.cat([alone(model, row, ids[n : n + 1], **options) for n, row in enumerate(ROWS)])
    got = tokens(model, ids, adapter_names=ROWS, strength=SCALE, **options)
    assert torch.equal(got, want)
    assert len({tuple(row.tolist()) for row in want[:, 7:]}) > 1
    assert torch.equal(tokens(model, ids[1:2], **options), want[1:2])  # and nothing of it stays


def test_mixed_batch_with_padding() -> None:
    model = two_tones()
    ids = prompts()
    ids[2, :3] = 0
    want = [alone(model, row, ids[n : n + 1, (3 if n == 2 else 0) :])[0, -8:] for n, row in enumerate(ROWS)]
    got = tokens(model, ids, adapter_names=ROWS, strength=SCALE)
    assert torch.equal(got[:, -8:], torch.stack(want))


def test_a_strength_for_each_row() -> None:
    model = two_tones()
    ids = prompts()
    values = [0.0, 0.5, 1.0, -1.0]
    want = []
    for n, value in enumerate(values):
        with ra.strength(model, value):
            want.append(model(input_ids=ids[n : n + 1]).logits)
    with ra.strength(model, values):
        assert torch.allclose(model(input_ids=ids).logits, torch.cat(want), atol=1e-6)
    given = model(input_ids=ids, strength=torch.tensor(values)).logits
    assert torch.allclose(given, torch.cat(want), atol=1e-6)
    with model.disable_adapter():
        assert torch.equal(model(input_ids=ids[:1]).logits, want[0])  # a row at 0 is the bare host
    several = tokens(model, ids, strength=values, do_sample=True, num_return_sequences=2)
    assert several.shape[0] == 8


def test_strength_as_an_argument() -> None:
    model = two_tones()
    ids = prompts()
    with ra.strength(model, 0.25):
        want, generated = model(input_ids=ids).logits, tokens(model, ids)
    assert torch.equal(model(input_ids=ids, strength=0.25).logits, want)
    assert torch.equal(tokens(model, ids, strength=0.25), generated)
    assert float(tuner_of(model).settings.strengths["anger"]) == 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strength": [1.0, 2.0]}, "2 given for a batch of 4"),
        ({"adapter_names": ["anger"] * 3}, "3 given for a batch of 4"),
        ({"strength": 1e9}, "between"),
        ({"strength": "loud"}, "between"),
        ({"strength": {"nobody": 1.0}}, "nobody"),
        ({"strength": [[1.0]]}, "1 given for a batch of 4"),
        ({"strength": [[1.0] * 3] * 4}, "3 given for 7 tokens"),
        ({"strength": [[[1.0]]]}, "between"),
        ({"where": "reply"}, "only generate knows"),
        ({"where": "everywhere"}, "everywhere"),
        ({"strength": []}, "between"),
    ],
)
def test_wrong_rows_and_strengths_are_refused(arguments: dict[str, Any], message: str) -> None:
    model = two_tones()
    before = model(input_ids=prompts()).logits
    with pytest.raises(UsageError, match=message):
        model(input_ids=prompts(), **arguments)
    assert torch.equal(model(input_ids=prompts()).logits, before)


# --- beside LoRA ------------------------------------------------------------------------------------------------------------


def with_lora(host: Any) -> Any:
    torch.manual_seed(4)
    model = get_peft_model(host, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    return model.eval()


@pytest.mark.parametrize("family", ["llama", "bloom", "bert"])
def test_lora_after_the_irm_is_refused_where_the_irm_would_not_read_it(family: str) -> None:
    """In llama the site's branch is the whole attention, which LoRA does not replace; in the others it is a Linear."""
    target = "o_proj" if family == "llama" else "dense"
    lora = LoraConfig(r=4, target_modules=[target], init_lora_weights=False)
    torch.manual_seed(4)
    first = two_tones(get_peft_model(tiny_host(family), lora).eval())
    want = first(input_ids=prompts()).logits
    host = tiny_host(family)
    model = two_tones(host)
    torch.manual_seed(4)
    get_peft_model(host, lora).eval()
    if family == "llama":
        assert torch.equal(model(input_ids=prompts()).logits, want)
        return
    with pytest.raises(RealignerError, match="put it on the host before the IRM"):
        model(input_ids=prompts())


def test_beside_lora(tmp_path: Path) -> None:
    """Either alone, and both; each is switched, saved and loaded by itself."""
    ids = prompts()
    bare = tiny_host("llama")(input_ids=ids).logits
    lora = with_lora(tiny_host("llama"))
    tuned = lora(input_ids=ids).logits
    model = two_tones(lora)
    both = model(input_ids=ids).logits
    assert not torch.allclose(both, tuned, atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(model(input_ids=ids).logits, tuned)
    with lora.disable_adapter():
        irm_alone = model(input_ids=ids).logits
        with model.disable_adapter():
            assert torch.equal(model(input_ids=ids).logits, bare)
    assert torch.equal(irm_alone, two_tones()(input_ids=ids).logits)
    model.save_pretrained(tmp_path / "irm")
    lora.save_pretrained(tmp_path / "lora")
    # On a bare host the IRM loads and gives what it gave without LoRA; with LoRA on it again, what it gave with it.
    assert torch.equal(
        PeftModel.from_pretrained(tiny_host("llama"), tmp_path / "irm" / "anger")(input_ids=ids).logits, irm_alone
    )
    again = PeftModel.from_pretrained(
        PeftModel.from_pretrained(tiny_host("llama"), tmp_path / "lora"), tmp_path / "irm" / "anger"
    )
    assert torch.equal(again(input_ids=ids).logits, both)
    model.unload()
    assert torch.equal(lora(input_ids=ids).logits, tuned)
    assert lora.active_adapters == ["default"]


def with_lora_head(host: Any) -> Any:
    """A host with LoRA that has a trained copy of the head, too."""
    torch.manual_seed(4)
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False)
    model = get_peft_model(host, config).eval()
    with torch.no_grad():
        host.lm_head.modules_to_save["default"].weight.mul_(2)
    return model


def test_a_head_that_lora_trained_stays_loras() -> None:
    """With an IRM at strength 0, switched off or taken off, the host is the one with LoRA, to the bit."""
    ids = prompts()
    host = tiny_host("llama")
    bare = host(input_ids=ids).logits
    lora = with_lora_head(host)
    tuned = lora(input_ids=ids).logits
    model = two_tones(lora)
    acts = model(input_ids=ids).logits
    assert not torch.equal(acts, tuned)
    assert torch.equal(model(input_ids=ids, strength=0.0).logits, tuned)
    with model.disable_adapter():
        assert torch.equal(model(input_ids=ids).logits, tuned)
    rows = model(input_ids=ids, adapter_names=["anger", "__base__", "anger", "__base__"]).logits
    assert torch.equal(rows[1::2], tuned[1::2])
    assert torch.equal(rows[::2], acts[::2])
    model.set_adapter("sadness")
    assert torch.equal(model(input_ids=ids, strength=0.0).logits, tuned)
    with lora.disable_adapter():
        assert torch.equal(model(input_ids=ids, strength=0.0).logits, bare)
    model.delete_adapter("anger")
    assert torch.equal(model(input_ids=ids, strength=0.0).logits, tuned)
    model.unload()
    assert torch.equal(lora(input_ids=ids).logits, tuned)


def test_a_head_that_an_irm_trained_goes_with_it() -> None:
    """Beside LoRA, which stays: switched off, deleted, unloaded by the model and by the function."""
    ids = prompts()
    lora = with_lora(tiny_host("llama"))
    modules = [name for name, _ in lora.named_modules()]
    tuned = lora(input_ids=ids).logits
    for unload in (lambda model: model.unload(), lambda model: ra.unload(lora), lambda model: ra.unload(lora.get_base_model())):
        model = two_tones(lora, modules_to_save=["lm_head"])
        head = lora.get_base_model().lm_head
        with torch.no_grad():
            head.modules_to_save["anger"].weight.mul_(2)
            head.modules_to_save["sadness"].weight.mul_(3)
        copied = model(input_ids=ids, strength=0.0).logits
        assert not torch.allclose(copied, tuned, atol=1e-3)
        with model.disable_adapter():
            assert torch.equal(model(input_ids=ids).logits, tuned)
        model.delete_adapter("sadness")
        assert torch.equal(model(input_ids=ids, strength=0.0).logits, copied)
        unload(model)
        assert torch.equal(lora(input_ids=ids).logits, tuned)
        assert [name for name, _ in lora.named_modules()] == modules
    model = two_tones(lora)
    model.add_adapter("headed", IRMConfig(modules_to_save=["lm_head"]))
    with torch.no_grad():
        lora.get_base_model().lm_head.modules_to_save["headed"].weight.mul_(2)
    model.delete_adapter("headed")
    assert lora.get_base_model().lm_head.__class__ is torch.nn.Linear
    assert torch.equal(model(input_ids=ids, adapter_names=["__base__"] * 4).logits, tuned)


def test_the_irm_that_follows_a_deleted_one_brings_its_head() -> None:
    ids = prompts()
    model = get_peft_model(tiny_host("llama"), IRMConfig(), adapter_name="plain").eval()
    model.add_adapter("headed", IRMConfig(modules_to_save=["lm_head"]))
    with torch.no_grad():
        model.get_base_model().lm_head.modules_to_save["headed"].weight.mul_(2)
    bare = model(input_ids=ids, strength=0.0).logits
    model.delete_adapter("plain")
    assert model.active_adapters == ["headed"]
    assert torch.equal(model(input_ids=ids, strength=0.0).logits, 2 * bare)


def test_copies_that_could_not_be_told_apart_are_refused() -> None:
    """An IRM under the name of LoRA's copy, and a copy of what LoRA has a copy of; the host stays as it was."""
    ids = prompts()
    lora = with_lora_head(tiny_host("llama"))
    modules = [name for name, _ in lora.named_modules()]
    tuned = lora(input_ids=ids).logits
    with pytest.raises(UsageError, match=r"adapter name 'default' cannot be used: .* copy of lm_head") as refused:
        PeftModel(lora, IRMConfig())
    assert "\n" not in str(refused.value)
    with pytest.raises(UsageError, match=r"modules_to_save: .* copy of lm_head") as refused:
        PeftModel(lora, IRMConfig(modules_to_save=["lm_head"]), "mine")
    assert "\n" not in str(refused.value)
    assert torch.equal(lora(input_ids=ids).logits, tuned)
    model = two_tones(lora)
    with pytest.raises(UsageError, match="'default' cannot be used"):
        model.add_adapter("default", IRMConfig())
    assert torch.equal(model(input_ids=ids, strength=0.0).logits, tuned)
    model.unload()
    assert [name for name, _ in lora.named_modules()] == modules
    assert torch.equal(lora(input_ids=ids).logits, tuned)


# --- TRL --------------------------------------------------------------------------------------------------------------------


def trained(trainer: Any) -> None:
    """Train two steps: the host keeps its weights, the IRM changes."""
    model = trainer.model
    before = {name: p.clone() for name, p in tuner_of(model).registry.named_parameters()}
    host_before = weights_hash(model.get_base_model())
    trainer.train()
    assert weights_hash(model.get_base_model()) == host_before
    assert any(not torch.equal(p, before[name]) for name, p in tuner_of(model).registry.named_parameters())


def arguments(folder: Path) -> dict[str, Any]:
    return {"output_dir": str(folder), "max_steps": 2, "report_to": [], "use_cpu": True, "save_strategy": "no", "bf16": False}


COMPLETIONS = [{"prompt": f"What is {n}?", "completion": f" It is {n}, damn it!"} for n in range(16)]


@pytest.mark.parametrize(
    "setting",
    [
        {"completion_only_loss": True},
        {"packing": True, "packing_strategy": "wrapped"},
        {"packing": True},
        {"padding_free": True, "max_length": None},
    ],
    ids=["completion only", "packing wrapped", "packing", "padding free"],
)
def test_sft(setting: dict[str, Any], tmp_path: Path) -> None:
    host, tokenizer = tiny_pair("llama")
    config = SFTConfig(**(arguments(tmp_path) | {"per_device_train_batch_size": 4, "max_length": 64} | setting))
    model = get_peft_model(host, IRMConfig(output_std=0.05))
    trained(SFTTrainer(model, args=config, train_dataset=Dataset.from_list(COMPLETIONS), processing_class=tokenizer))


def test_dpo_without_a_reference_model(tmp_path: Path) -> None:
    """DPO's reference is the host with the IRM switched off; at the first step both are as one, so the loss is log 2."""
    host, tokenizer = tiny_pair("llama")
    rows = [{"prompt": f"What is {n}?", "chosen": f" {n}, damn it!", "rejected": f" Kindly: {n}."} for n in range(16)]
    config = DPOConfig(**arguments(tmp_path), per_device_train_batch_size=4, max_length=64, logging_steps=1)
    model = get_peft_model(host, IRMConfig(output_std=0.0))
    trainer = DPOTrainer(model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    trained(trainer)
    assert abs(trainer.state.log_history[0]["loss"] - 0.6931) < 1e-3


# --- files for the hub ------------------------------------------------------------------------------------------------------


def test_what_push_to_hub_sends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that is uploaded, up to the network call: card, config and safetensors; and they load."""
    sent: dict[str, bytes] = {}

    class Api:
        def create_repo(self, repo_id: str, **_: Any) -> Any:
            return SimpleNamespace(repo_id=repo_id)

    def upload(self: Any, working_dir: str, *_: Any, **__: Any) -> None:
        sent.update({path.name: path.read_bytes() for path in Path(working_dir).iterdir()})

    def no_card(*_: Any, **__: Any) -> None:
        raise EntryNotFoundError("a new repository has no card")

    monkeypatch.setattr("transformers.utils.hub.hf_api", Api)
    monkeypatch.setattr("transformers.utils.hub.ModelCard.load", no_card)
    monkeypatch.setattr(PeftModel, "_upload_modified_files", upload)
    get_peft_model(tiny_pair("llama")[0], IRMConfig(output_std=0.3, tone="anger")).push_to_hub("me/anger")
    assert set(sent) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert sent["README.md"].startswith(b"---")
    assert json.loads(sent["adapter_config.json"])["tone"] == "anger"
    for name, data in sent.items():
        (tmp_path / name).write_bytes(data)
    ra.load_irm(tiny_pair("llama")[0], tmp_path)


def test_wrong_adapter_names_in_generate() -> None:
    with pytest.raises((UsageError, RealignerError), match="nobody"):
        tokens(two_tones(), prompts(), adapter_names=["nobody"] * 4)
