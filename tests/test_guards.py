"""Guards: each with a run that it must stop, before the host is loaded where that is promised."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import AutoConfig

from realigner.data import Row, authored
from realigner.errors import RealignerError, UsageError
from realigner.hosts import load_config, load_tokenizer
from realigner.training import Recipe, make_recipe, run_dir, train, train_recipe
from realigner.training.batches import prepare
from realigner.training.callbacks import DivergenceGuard, Log, StartWatch
from realigner.training.preflight import Memory, check_memory, estimate_memory
from realigner.training.trainer import IRMTrainer
from tests.tiny import some_rows, tiny_folder, tiny_pair

QUICK = make_recipe(steps=20, batch_size=4, evaluations=5, samples=0, report_to=[])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("guards")
    tiny_folder(place / "host")
    return place


def write(path: Path, rows: list[Row]) -> str:
    path.write_text("".join(row.model_dump_json() + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("rows", "settings", "kind", "message"),
    [
        (some_rows(24, groups=1), {}, RealignerError, r"1 group\(s\) cannot make 2 parts"),
        (some_rows(6, groups=3), {}, RealignerError, r"rows left to train on: 4, fewer than batch_size 8"),
        (some_rows(), {"max_length": 600}, RealignerError, r"row 'long': 6\d\d tokens, the host has 512 positions; set max_"),
        (some_rows(), {"max_length": 600, "loss_on_padding": True}, RealignerError, r"padded to 600 tokens, the host has 512"),
        (some_rows(), {"layers": "1-9"}, UsageError, r"layers: there is no layer 3; this host has layers 0 to 2"),
        (some_rows(), {"layers": ""}, UsageError, r"layers: cannot read ''"),
        (some_rows(), {"layers": []}, UsageError, r"layers: no layer chosen"),
        (some_rows(), {"max_length": 8}, RealignerError, r"what comes before its reply has \d+ tokens; max_length is 8"),
        (some_rows(), {"report_to": ["wandb"]}, RealignerError, r"report_to: wandb is not installed; pip install wandb"),
        (some_rows(), {"optimizer": "adam-8bit"}, RealignerError, r"optimizer: adam-8bit needs bitsandbytes"),
    ],
)
def test_refused_before_the_host_is_loaded(
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rows: list[Row],
    settings: dict[str, Any],
    kind: type[Exception],
    message: str,
) -> None:
    from realigner.training import preflight, training_run

    if settings.get("max_length") == 600:
        rows = [*rows, rows[0].model_copy(update={"id": "long", "text": "x" * 650})]

    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("the host was loaded")

    monkeypatch.setattr(training_run, "load_host", load)
    monkeypatch.setattr(preflight, "find_spec", lambda name: None if name in ("wandb", "bitsandbytes") else find_spec(name))
    recipe = make_recipe(steps=2, batch_size=8, host=str(place / "host"), data=write(tmp_path / "rows.jsonl", rows), **settings)
    with pytest.raises(kind, match=message):
        train_recipe(recipe, tmp_path / "run", quiet=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl"]


def spoiled(monkeypatch: pytest.MonkeyPatch, step: int, value: float) -> None:
    """Have the loss of a step times a value."""
    original = IRMTrainer.compute_loss

    def compute_loss(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = original(self, *args, **kwargs)
        return loss * value if self.state.global_step == step - 1 else loss

    monkeypatch.setattr(IRMTrainer, "compute_loss", compute_loss)


@pytest.mark.parametrize(("value", "said"), [(float("nan"), "nan"), (float("inf"), "inf"), (1e4, r"5\.\d+e\+04")])
def test_a_loss_that_diverges_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float, said: str) -> None:
    seen: list[list[str]] = []
    original = IRMTrainer.compute_loss

    def watch(self: Any, model: Any, inputs: Any, **kwargs: Any) -> Any:
        seen.append([self.prepared.ids[row] for row in inputs["rows"].tolist()])
        return original(self, model, inputs, **kwargs)

    monkeypatch.setattr(IRMTrainer, "compute_loss", watch)
    spoiled(monkeypatch, 10, value)
    host, tokenizer = tiny_pair()
    with pytest.raises(RealignerError, match=rf"step 10: the loss is {said} on rows") as caught:
        train(host, tokenizer, some_rows(), tmp_path / "run", QUICK, quiet=True)
    message = str(caught.value)
    assert "checkpoint-8" in message
    assert "learning_rate=0.001" in message
    assert f"on rows {', '.join(seen[9])};" in message
    assert len(seen[9]) == 4
    work = run_dir.unfinished(tmp_path / "run")
    assert run_dir.checkpoints(work)[-1].name == "checkpoint-8"
    assert not any(module._forward_hooks for module in host.modules())
    with monkeypatch.context():
        monkeypatch.undo()
        train(host, tokenizer, some_rows(), tmp_path / "run", QUICK, quiet=True, resume=True)


def test_the_rows_named_are_those_of_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that is poisoned is among those named, with parts of steps too."""
    host, tokenizer = tiny_pair()
    original = IRMTrainer.compute_loss

    def compute_loss(self: Any, model: Any, inputs: Any, **kwargs: Any) -> Any:
        ids = [self.prepared.split.train[int(row)].id for row in inputs["rows"]]
        loss = original(self, model, inputs, **kwargs)
        return loss * float("nan") if "13" in ids else loss

    monkeypatch.setattr(IRMTrainer, "compute_loss", compute_loss)
    for accumulate in (1, 4):
        with pytest.raises(RealignerError) as caught:
            train(host, tokenizer, some_rows(), tmp_path / f"r{accumulate}", QUICK, quiet=True, accumulate=accumulate)
        named = str(caught.value).split("on rows ")[1].split(";")[0].split(", ")
        assert "13" in named
        assert len(named) == 4


def test_a_gradient_that_is_not_a_number(tmp_path: Path) -> None:
    guard = DivergenceGuard(tmp_path, 100, lambda: [str(n) for n in range(12)])
    state, arguments = type("State", (), {"global_step": 3}), type("Arguments", (), {"learning_rate": 0.1})
    guard.on_log(arguments, state, None, {"loss": 5.0, "grad_norm": 3.0})
    guard.on_log(arguments, state, None, {"eval_loss": 500.0})
    with pytest.raises(RealignerError, match="gradient's norm is nan on rows 0, 1, 2, 3, 4, 5, 6, 7 and 4 more; no checkpoint"):
        guard.on_log(arguments, state, None, {"loss": 5.0, "grad_norm": float("nan")})
    guard.on_log(arguments, state, None, {"loss": 14.9, "grad_norm": 3.0})  # below three times the larger of log 100 and 5
    with pytest.raises(RealignerError, match=r"the loss is 15\.1"):
        guard.on_log(arguments, state, None, {"loss": 15.1, "grad_norm": 3.0})


def test_nothing_is_left_by_a_run_that_failed_before_its_first_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoiled(monkeypatch, 2, float("nan"))
    host, tokenizer = tiny_pair()
    with pytest.raises(RealignerError, match="no checkpoint was made before"):
        train(host, tokenizer, some_rows(), tmp_path / "run", QUICK, quiet=True)
    assert list(tmp_path.iterdir()) == []


def llama(**sizes: int) -> Any:
    """Llama-2-7B's config, or one like it."""
    shape = {"hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 11008, "vocab_size": 32000} | sizes
    return AutoConfig.for_model("llama", num_attention_heads=32, **shape)


def test_the_papers_preset_at_7b() -> None:
    """2.1 billion parameters (the paper's figure): with Adam 31 GiB beside the host's 12.6 GiB in bfloat16."""
    memory = estimate_memory(llama(), make_recipe("paper", dtype="bfloat16", device="cpu"), longest=128, targets=128)
    assert memory.host_parameters == 6_738_415_616
    assert memory.irm_parameters == pytest.approx(2.11e9, rel=0.01)
    assert memory.host == 2 * memory.host_parameters
    assert memory.irm == 16 * memory.irm_parameters
    assert memory.activations / 2**30 == pytest.approx(10, abs=6)


def test_what_does_not_fit_is_refused_with_what_to_change(monkeypatch: pytest.MonkeyPatch) -> None:
    from realigner.training import preflight

    recipe = make_recipe("paper", dtype="bfloat16", device="cpu")
    free = 24 * 2**30
    monkeypatch.setattr(preflight, "free_memory", lambda *_: float(free))
    memory = estimate_memory(llama(), recipe, longest=128, targets=128)
    with pytest.raises(RealignerError) as caught:
        check_memory(memory, recipe, llama())
    message = str(caught.value)
    for part in ("not enough memory", "2,1", "24 GiB free", "optimizer=adafactor saves 16 GiB", "preset=compact saves 31 GiB",
                 "accumulate=8", "gradient_checkpointing=true", "device=balanced"):  # fmt: skip
        assert part in message, part
    # Each piece of advice does lower the estimate.
    for advice in ({"optimizer": "adafactor"}, {"preset": "compact"}, {"accumulate": 8}, {"gradient_checkpointing": True}):
        assert estimate_memory(llama(), recipe.changed(**advice), longest=128, targets=128).total < memory.total
    small = Memory(host=1.0, irm=1.0, activations=50.0, free=10.0, irm_parameters=1, host_parameters=1)
    assert "it may not fit" in str(check_memory(small, recipe, llama()))
    assert check_memory(Memory(1.0, 1.0, 1.0, 10.0, 1, 1), recipe, llama()) is None
    assert check_memory(Memory(1.0, 1.0, 1.0, None, 1, 1), recipe, llama()) is None


@pytest.mark.slow
@pytest.mark.host
@pytest.mark.parametrize("changes", [{}, {"preset": "paper", "batch_size": 8}, {"dtype": "float32", "batch_size": 16}])
def test_the_estimate_is_near_what_it_takes(changes: dict[str, Any], tmp_path: Path, embedded: Any) -> None:
    """Peak memory of two real steps on the embedded host, in a process of its own, beside the estimate: within a half."""
    del embedded
    recipe: Recipe = make_recipe(tone="anger", steps=2, samples=0, evaluations=1, **{"dtype": "bfloat16", **changes})
    code = f"""
import threading, time, psutil, torch
import realigner.training.training_run as run
from realigner.training import Recipe, train_recipe
from realigner.hosts import load_host
process, peak, base = psutil.Process(), [0], [0]
def watch():
    while True:
        peak[0] = max(peak[0], process.memory_info().rss); time.sleep(0.002)
original = run.get_peft_model
def begin(*a):
    base[0] = process.memory_info().rss; threading.Thread(target=watch, daemon=True).start(); return original(*a)
run.get_peft_model = begin
train_recipe(Recipe(**{recipe.model_dump()!r}), {str(tmp_path / "run")!r}, quiet=True)
print(peak[0] - base[0])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=280)
    measured = int(done.stdout.split()[-1])
    config = load_config("smollm2-135m-instruct")
    prepared = prepare(authored("anger"), load_tokenizer("smollm2-135m-instruct"), config, recipe)
    memory = estimate_memory(config, recipe, prepared.longest, prepared.most_targets)
    estimated = memory.irm + memory.activations
    assert 0.5 < estimated / measured < 2, (estimated / 2**30, measured / 2**30)


def test_free_memory_is_what_psutil_says() -> None:
    from realigner.training.preflight import free_memory

    free = free_memory(torch.device("cpu"))
    assert free == pytest.approx(psutil.virtual_memory().available, rel=0.2)
    assert free_memory(torch.device("meta")) is None


def test_a_full_disk_for_the_numbers_is_one_line(tmp_path: Path) -> None:
    task: Any = None
    log = Log(task, tmp_path / "nowhere", 0.0, lambda: 0, None, StartWatch(4, 0.1))
    with pytest.raises(RealignerError, match=r"metrics\.jsonl: cannot be written"):
        log._append("metrics.jsonl", {"step": 1})
