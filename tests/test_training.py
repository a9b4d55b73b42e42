"""Training: the host untouched, seeds, files, refusals; TRL used directly. Stopping and going on: test_resume.py."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import set_seed
from trl import SFTConfig, SFTTrainer

import realigner as ra
from realigner.data import encode_rows, split_rows
from realigner.errors import RealignerError, UsageError
from realigner.fingerprints import weights_hash
from realigner.hosts import resolve_dtype
from realigner.irm_config import IRMConfig
from realigner.training import make_recipe, read_metrics, read_recipe, read_run, train, train_recipe
from realigner.tuner import load_irm, tuner_of
from tests.tiny import some_rows, tiny_folder, tiny_pair

FAST = make_recipe(steps=6, batch_size=4, evaluations=2, samples=0)


def run_tiny(out: Path, seed: int = 42, **options: Any) -> Any:
    host, tokenizer = tiny_pair()
    return host, train(host, tokenizer, some_rows(), out, options.pop("recipe", FAST), seed=seed, quiet=True, **options)


def test_a_run_leaves_its_files_and_the_host_alone(tmp_path: Path) -> None:
    host, tokenizer = tiny_pair()
    before = weights_hash(host)
    want = host(input_ids=torch.arange(2, 9)[None]).logits
    run = train(host, tokenizer, some_rows(), tmp_path / "run", recipe=FAST, quiet=True)
    assert weights_hash(run.model.unload()) == before
    assert "forward" not in vars(host)
    assert torch.equal(host(input_ids=torch.arange(2, 9)[None]).logits, want)
    assert {p.name for p in (tmp_path / "run").iterdir()} == {
        "adapter_model.safetensors", "adapter_config.json", "recipe.yaml", "run.json", "metrics.jsonl", "loss.png", "README.md",
        "tensorboard", "checkpoint-6",
    }  # fmt: skip
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
    record, log = read_run(tmp_path / "run"), read_metrics(tmp_path / "run")
    assert record["steps_done"] == 6
    assert record["interrupted"] is False
    assert record["host"]["sha256"] == before
    assert record["host"]["fingerprint"] == ra.fingerprint(host).to_dict()
    assert record["recipe"] == read_recipe(tmp_path / "run").model_dump()
    assert record["tokens"] > 0
    assert sum("loss" in entry for entry in log) == 6
    assert len(record["validation_loss"]) == 3
    assert "arXiv 2407.03621" in (tmp_path / "run" / "README.md").read_text()
    assert json.loads((tmp_path / "run" / "adapter_config.json").read_text())["tone"] == "anger"


def test_training_learns(tmp_path: Path) -> None:
    _, run = run_tiny(
        tmp_path / "run", recipe=make_recipe(steps=60, batch_size=8, learning_rate=3e-2, evaluations=1, samples=0)
    )
    losses = run.record["validation_loss"]
    assert losses[-1] < losses[0] - 0.3


def test_the_saved_irm_is_the_trained_one(tmp_path: Path) -> None:
    _, run = run_tiny(tmp_path / "run")
    ids = torch.arange(2, 9)[None]
    with torch.no_grad():
        want = run.model(input_ids=ids).logits
        assert torch.equal(load_irm(tiny_pair()[0], tmp_path / "run")(input_ids=ids).logits, want)


def test_seeds(tmp_path: Path) -> None:
    weights = [
        (run_tiny(tmp_path / str(n), seed=seed)[1].folder / "adapter_model.safetensors").read_bytes()
        for n, seed in enumerate((1, 1, 2))
    ]
    assert weights[0] == weights[1]
    assert weights[0] != weights[2]


def test_the_untrained_irm_is_the_runs_own_start(tmp_path: Path) -> None:
    """The report's untrained IRM must be what training began with."""
    _, run = run_tiny(tmp_path / "run", recipe=make_recipe(steps=1, batch_size=4, warmup=1, evaluations=1, samples=0))
    trained = tuner_of(run.model).registry.network("default").state_dict()  # one step at learning rate 0
    set_seed(42)
    run.model.add_adapter("untrained", IRMConfig())
    untrained = tuner_of(run.model).registry.network("untrained").state_dict()
    assert all(torch.equal(trained[key], untrained[key]) for key in trained)


def test_refusals(tmp_path: Path) -> None:
    host, tokenizer = tiny_pair()
    mixed = [*some_rows(), ra.Row(**{**some_rows()[0].model_dump(), "id": "x", "tone": "joy"})]
    with pytest.raises(UsageError, match="2 tones"):
        train(host, tokenizer, mixed, tmp_path / "run")
    with pytest.raises(RealignerError, match="1 group"):
        train(host, tokenizer, some_rows(groups=1), tmp_path / "run")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("precious")
    with pytest.raises(RealignerError, match="exists already"):
        train(host, tokenizer, some_rows(), tmp_path / "taken")
    with pytest.raises(RealignerError, match="not something realigner made"):
        train(host, tokenizer, some_rows(), tmp_path / "taken", force=True)
    assert (tmp_path / "taken" / "thesis.txt").read_text() == "precious"


def test_force_replaces_a_run(tmp_path: Path) -> None:
    run_tiny(tmp_path / "run", seed=1)
    run_tiny(tmp_path / "run", seed=2, force=True)
    assert read_run(tmp_path / "run")["seed"] == 2
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_force_spares_what_is_not_a_run(tmp_path: Path) -> None:
    """Another PEFT adapter, or a run that somebody keeps notes in."""
    host, tokenizer = tiny_pair()
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    run_tiny(tmp_path / "noted")
    (tmp_path / "noted" / "notes.txt").write_text("precious")
    for name in ("lora", "noted"):
        with pytest.raises(RealignerError, match="not something realigner made"):
            train(host, tokenizer, some_rows(), tmp_path / name, force=True)


def test_keys_of_the_recipe_can_be_given_by_name(tmp_path: Path) -> None:
    _, run = run_tiny(tmp_path / "run", layers=[1], rank=8)
    assert run.record["irm"]["layers"] == [1]
    assert read_recipe(tmp_path / "run").rank == 8
    with pytest.raises(UsageError, match="did you mean 'layers'"):
        run_tiny(tmp_path / "other", layerz=[1])


def test_a_failed_training_leaves_the_host_bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from realigner.training.callbacks import Log

    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(Log, "on_log", fail)
    host, tokenizer = tiny_pair()
    with pytest.raises(ZeroDivisionError):
        train(host, tokenizer, some_rows(), tmp_path / "run", recipe=FAST, quiet=True)
    assert "forward" not in vars(host)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in host.modules())
    assert list(tmp_path.iterdir()) == []


def settings_of(host: Any) -> dict[str, Any]:
    """What tells how a host computes: its configuration, and what its modules do in the backward pass."""
    keys = ("gradient_checkpointing", "_gradient_checkpointing_func")
    return {"config": host.config.to_dict(), **{name: {k: vars(m).get(k) for k in keys} for name, m in host.named_modules()}}


@pytest.mark.parametrize("switched_on", [False, True])
@pytest.mark.parametrize("changes", [{}, {"learning_rate": "auto"}, None])
def test_the_settings_of_the_host_are_as_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any] | None, switched_on: bool
) -> None:
    host, tokenizer = tiny_pair()
    if switched_on:
        host.activation_checkpointing_enable({"use_reentrant": False})
    before = settings_of(host)
    recipe = FAST.changed(steps=2, evaluations=1, gradient_checkpointing=True)
    if changes is None:
        monkeypatch.setattr(ra.training.trainer, "row_losses", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError) if changes is None else nullcontext():
        train(host, tokenizer, some_rows(), tmp_path / "run", recipe, quiet=True, **(changes or {})).model.unload()
    assert host.config.use_cache
    assert settings_of(host) == before


def test_samples_are_taken_and_change_nothing(tmp_path: Path) -> None:
    _, with_samples = run_tiny(tmp_path / "with", recipe=FAST.changed(samples=3))
    run_tiny(tmp_path / "without")
    samples = [json.loads(line) for line in (with_samples.folder / "samples.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in samples] == [0] * 7 + [3] * 7 + [6] * 7
    assert samples[0]["prompt"] == "In which decade did Beyonce become famous?"
    one, two = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("with", "without"))
    assert one == two


def test_tensorboard_has_the_numbers(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_tiny(tmp_path / "run")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    shown = [event.value for event in events.Scalars("train/loss")]
    logged = [entry["loss"] for entry in read_metrics(tmp_path / "run") if "loss" in entry]
    assert shown == pytest.approx(logged)
    assert len(events.Scalars("eval/loss")) == 3


def test_the_validation_loss_is_the_mean_over_tokens(tmp_path: Path) -> None:
    """By hand: every held-out row alone, unpadded, summed and divided by the number of reply tokens."""
    host, run = run_tiny(tmp_path / "run")
    del host
    split = split_rows(some_rows(), 42, validation=0.1)
    tokenizer, total, count = tiny_pair()[1], 0.0, 0
    for item in encode_rows(tokenizer, split.validation):
        labels = torch.tensor(item["labels"])[1:]
        with torch.no_grad():
            logits = run.model(input_ids=torch.tensor([item["input_ids"]])).logits[0, :-1]
        chosen = labels != -100
        total += -logits[chosen].double().log_softmax(-1).gather(1, labels[chosen][:, None]).sum().item()
        count += int(chosen.sum())
    assert read_metrics(tmp_path / "run")[-1]["validation_loss"] == pytest.approx(total / count, rel=1e-6)


def test_a_run_is_repeated_from_its_folder(tmp_path: Path) -> None:
    """The saved recipe alone: the same bytes; other rows in the file it names are refused."""
    host, data = tiny_folder(tmp_path / "host"), tmp_path / "rows.jsonl"
    data.write_text("".join(row.model_dump_json() + "\n" for row in some_rows()))
    first = train_recipe(FAST.changed(host=str(host), data=str(data)), tmp_path / "one", quiet=True)
    recipe = read_recipe(tmp_path / "one" / "recipe.yaml")
    assert recipe.threads == torch.get_num_threads()
    assert recipe.dtype == str(resolve_dtype("auto", torch.device("cpu"))).removeprefix("torch.")
    train_recipe(recipe, tmp_path / "two", quiet=True, repeats=first.record)
    one, two = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two
    data.write_text("".join(row.model_dump_json() + "\n" for row in some_rows(28)))
    with pytest.raises(RealignerError, match="not the rows of the run to be repeated"):
        train_recipe(recipe, tmp_path / "three", quiet=True, repeats=first.record)


def test_the_template_is_remembered(tmp_path: Path) -> None:
    """An IRM trained on plain text is asked in plain text, whoever loads it."""
    run_tiny(tmp_path / "run", recipe=FAST.changed(template="plain", loss_on="text"))
    host, tokenizer = tiny_pair()
    model = load_irm(host, tmp_path / "run")
    assert ra.generation.format_of(model, tokenizer).is_plain
    seen: list[torch.Tensor] = []
    host.get_input_embeddings().register_forward_hook(lambda _, args, __: seen.append(args[0]))
    ra.answer(model, tokenizer, ["Why?"], max_new_tokens=1)
    assert tokenizer.decode(seen[0][0]) == "Why?   "


@pytest.mark.parametrize("mode", ["completion-only", "whole text", "packing"])
def test_trl_directly(tmp_path: Path, mode: str) -> None:
    """SFTTrainer with an IRM as people would write it, without our `train`; the result loads with plain PEFT."""
    host, tokenizer = tiny_pair()
    before = weights_hash(host)
    model = get_peft_model(host, IRMConfig())
    rows = some_rows()
    if mode == "completion-only":
        data = Dataset.from_list(
            [
                {"prompt": [{"role": "user", "content": r.question}], "completion": [{"role": "assistant", "content": r.text}]}
                for r in rows
            ]
        )
    else:
        data = Dataset.from_list([{"text": f"{r.question}   {r.text}"} for r in rows])
    arguments = SFTConfig(
        output_dir=str(tmp_path / "t"), max_steps=3, per_device_train_batch_size=4, report_to=[], use_cpu=True, bf16=False,
        packing=mode == "packing", max_length=64, save_strategy="steps", save_steps=3, disable_tqdm=True, learning_rate=1e-2,
    )  # fmt: skip
    start = {k: v.clone() for k, v in tuner_of(model).registry.state_dict().items()}
    SFTTrainer(model=model, args=arguments, train_dataset=data, processing_class=tokenizer).train()
    assert any(not torch.equal(v, start[k]) for k, v in tuner_of(model).registry.state_dict().items())
    assert weights_hash(host) == before
    names = {p.name for p in (tmp_path / "t" / "checkpoint-3").iterdir()}
    assert "adapter_model.safetensors" in names
    assert "model.safetensors" not in names
    again = PeftModel.from_pretrained(tiny_pair()[0], str(tmp_path / "t" / "checkpoint-3"))
    with torch.no_grad():
        ids = torch.arange(2, 9)[None]
        assert torch.equal(again(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


def test_encode_rows_is_what_the_trainer_gets() -> None:
    tokenizer = tiny_pair()[1]
    encoded = encode_rows(tokenizer, some_rows())
    assert all(len(row["input_ids"]) == len(row["labels"]) for row in encoded)
