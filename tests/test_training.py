"""Training: the host untouched, seeds, files, Ctrl-C, refusals; TRL used directly."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import set_seed
from trl import SFTConfig, SFTTrainer

import realigner as ra
from realigner.data import encode_rows
from realigner.errors import RealignerError, UsageError
from realigner.hosts import weights_hash
from realigner.training import make_recipe, read_log, read_run, train
from realigner.tuner import IRMConfig, load_irm, tuner_of
from tests.tiny import some_rows, tiny_folder, tiny_pair

FAST = make_recipe(steps=6, batch_size=4, evaluations=2)


def run_tiny(out: Path, seed: int = 42, **options: Any) -> Any:
    host, tokenizer = tiny_pair()
    return host, train(host, tokenizer, some_rows(), out, recipe=options.pop("recipe", FAST), seed=seed, quiet=True, **options)


def test_a_run_leaves_its_files_and_the_host_alone(tmp_path: Path) -> None:
    host, tokenizer = tiny_pair()
    before = weights_hash(host)
    want = host(input_ids=torch.arange(2, 9)[None]).logits
    run = train(host, tokenizer, some_rows(), tmp_path / "run", recipe=FAST, quiet=True)
    assert weights_hash(run.model.unload()) == before
    assert "forward" not in vars(host)
    assert torch.equal(host(input_ids=torch.arange(2, 9)[None]).logits, want)
    assert {p.name for p in (tmp_path / "run").iterdir()} == {
        "adapter_model.safetensors", "adapter_config.json", "run.json", "log.jsonl", "README.md",
    }  # fmt: skip
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
    record, log = read_run(tmp_path / "run"), read_log(tmp_path / "run")
    assert record["steps_done"] == 6
    assert record["interrupted"] is False
    assert record["host"]["sha256"] == before
    assert sum("loss" in entry for entry in log) == 6
    assert len(record["validation_loss"]) == 3
    assert "arXiv 2407.03621" in (tmp_path / "run" / "README.md").read_text()
    assert json.loads((tmp_path / "run" / "adapter_config.json").read_text())["tone"] == "anger"


def test_training_learns(tmp_path: Path) -> None:
    _, run = run_tiny(tmp_path / "run", recipe=make_recipe(steps=60, batch_size=8, learning_rate=1e-2, evaluations=1))
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
    _, run = run_tiny(tmp_path / "run", recipe=make_recipe(steps=1, batch_size=4, warmup=1, evaluations=1))
    trained = tuner_of(run.model).bank.network("default").state_dict()  # one step at learning rate 0
    set_seed(42)
    run.model.add_adapter("untrained", IRMConfig())
    untrained = tuner_of(run.model).bank.network("untrained").state_dict()
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
    for bad in ({"steps": 0}, {"learning_rate": -1.0}, {"batch_size": "x"}, {"validation": 2.0}):
        with pytest.raises(UsageError, match=next(iter(bad))):
            make_recipe(**bad)


def test_force_replaces_a_run(tmp_path: Path) -> None:
    run_tiny(tmp_path / "run", seed=1)
    run_tiny(tmp_path / "run", seed=2, force=True)
    assert read_run(tmp_path / "run")["seed"] == 2
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def interrupt_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Press Ctrl-C when a step has been logged."""
    from realigner import training

    original = training._Watch.on_log

    def press(self: Any, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
        original(self, args, state, *rest, **kwargs)
        if state.global_step == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(training._Watch, "on_log", press)


def test_interrupt_in_process_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt_at(monkeypatch, step=3)
    _, run = run_tiny(tmp_path / "run")
    assert run.record["interrupted"] is True
    assert run.record["steps_done"] == 3
    load_irm(tiny_pair()[0], tmp_path / "run")


def train_command(folder: Path) -> list[str]:
    """A training on a tiny host that would go on for a long time."""
    host, rows = tiny_folder(folder / "host"), folder / "rows.jsonl"
    rows.write_text("".join(row.model_dump_json() + "\n" for row in some_rows()))
    options = {
        "--host": host,
        "--data": rows,
        "--out": folder / "run",
        "--steps": 100000,
        "--batch-size": 2,
        "--dtype": "float32",
    }
    return [sys.executable, "-m", "realigner", "train", *(str(part) for pair in options.items() for part in pair)]


def test_interrupted_at_once_saves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from realigner import training

    def press(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(training._Watch, "on_log", press)
    with pytest.raises(RealignerError, match="nothing was saved"):
        run_tiny(tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_run_does_not_replace_a_finished_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_tiny(tmp_path / "run", seed=1)
    interrupt_at(monkeypatch, step=2)
    _, run = run_tiny(tmp_path / "run", seed=2, force=True)
    assert run.folder == tmp_path / "run-interrupted"
    assert read_run(tmp_path / "run")["seed"] == 1
    assert read_run(run.folder)["interrupted"] is True


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


def test_the_config_given_is_not_changed(tmp_path: Path) -> None:
    config = IRMConfig(layers=[1])
    run_tiny(tmp_path / "run", config=config)
    assert config.tone is None
    assert config.host is None


def test_a_failed_training_leaves_the_host_bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from realigner import training

    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(training._Watch, "on_log", fail)
    host, tokenizer = tiny_pair()
    with pytest.raises(ZeroDivisionError):
        train(host, tokenizer, some_rows(), tmp_path / "run", recipe=FAST, quiet=True)
    assert "forward" not in vars(host)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in host.modules())
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_leaves_a_usable_checkpoint(tmp_path: Path) -> None:
    """The real thing: SIGINT to the command line in the middle of training."""
    process = subprocess.Popen(
        train_command(tmp_path),
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs inherit "ignore"
    )
    lines: list[str] = []
    reader = threading.Thread(target=lambda: lines.extend(iter(process.stderr.readline, "")))  # type: ignore[union-attr]
    reader.start()
    deadline = time.monotonic() + 150
    while not any(line.startswith("training:") for line in lines):
        assert time.monotonic() < deadline, lines
        assert process.poll() is None, lines
        time.sleep(0.2)
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(timeout=100) == 1
    reader.join()
    assert "interrupted after step" in lines[-1]
    assert not any("Traceback" in line for line in lines)
    assert read_run(tmp_path / "run")["interrupted"] is True
    loaded, _ = ra.load_host(str(tmp_path / "host"))
    load_irm(loaded, tmp_path / "run")
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".run")]


def test_kill_leaves_no_half_written_run(tmp_path: Path) -> None:
    process = subprocess.Popen(train_command(tmp_path), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 100
    while not [p for p in tmp_path.iterdir() if p.name.startswith(".run-")]:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    process.kill()
    process.wait()
    assert not (tmp_path / "run").exists()


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
    start = {k: v.clone() for k, v in tuner_of(model).bank.state_dict().items()}
    SFTTrainer(model=model, args=arguments, train_dataset=data, processing_class=tokenizer).train()
    assert any(not torch.equal(v, start[k]) for k, v in tuner_of(model).bank.state_dict().items())
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
