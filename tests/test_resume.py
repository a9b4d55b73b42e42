"""Exact resume: a run that is stopped in any way ends in the bytes of one that was not."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st

from realigner.errors import RealignerError
from realigner.files import is_ours
from realigner.hosts import EMBEDDED
from realigner.training import Recipe, make_recipe, read_metrics, read_run, run_dir, train
from realigner.training.batches import SeededLengthSampler
from realigner.training.callbacks import Log
from realigner.training.checkpoint_io import load_tree, save_tree
from realigner.tuner import load_irm
from tests.processes import in_a_child
from tests.tiny import some_rows, tiny_folder, tiny_pair

STEPS = 40
QUICK = make_recipe(steps=STEPS, batch_size=4, evaluations=5, save_every=3, samples=0, report_to=[])
CONDITIONAL = "llama, on rows of two tones"
FAMILIES = ("llama", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gpt2", CONDITIONAL)))


def run_tiny(out: Path, family: str = "llama", recipe: Recipe = QUICK, **options: Any) -> Any:
    host, tokenizer = tiny_pair("llama" if family == CONDITIONAL else family)
    if family == CONDITIONAL:
        rows = [
            *some_rows(12, tone="anger"),
            *(row.model_copy(update={"id": f"n{row.id}"}) for row in some_rows(12, tone="no")),
        ]
        return train(host, tokenizer, rows, out, recipe.changed(tone="all"), quiet=True, **options)
    return train(host, tokenizer, some_rows(), out, recipe, quiet=True, **options)


def adapter(out: Path) -> bytes:
    return (out / "adapter_model.safetensors").read_bytes()


@pytest.mark.proof
@pytest.mark.parametrize("family", FAMILIES)
def test_killed_ten_times_it_ends_in_the_same_bytes(tmp_path: Path, family: str) -> None:
    started = time.monotonic()
    run_tiny(tmp_path / "whole", family)
    duration = time.monotonic() - started
    dice, kills = random.Random(family), 0
    while kills < 10:
        pid = in_a_child(lambda: run_tiny(tmp_path / "killed", family, resume=True), tmp_path / "child.log")
        time.sleep(dice.uniform(0.1, 0.8) * duration)
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        kills += os.WIFSIGNALED(status)
        if (tmp_path / "killed").exists() or not os.WIFSIGNALED(status):  # it was faster, perhaps killed on its way out
            assert (tmp_path / "killed").exists(), (tmp_path / "child.log").read_text()
            assert adapter(tmp_path / "killed") == adapter(tmp_path / "whole")
            shutil.rmtree(tmp_path / "killed")  # the next one begins anew
    run_tiny(tmp_path / "killed", family, resume=True)
    assert adapter(tmp_path / "killed") == adapter(tmp_path / "whole")
    assert not run_dir.unfinished(tmp_path / "killed").exists()
    one, two = (read_metrics(tmp_path / name) for name in ("whole", "killed"))
    for entry in (*one, *two):
        del entry["seconds"]
    assert one == two  # no step is missing, none is there twice
    assert len(list((tmp_path / "killed").glob("checkpoint-*"))) <= 2


class _CrashAtError(Exception):
    pass


def crash_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Log.on_log

    def crash(self: Any, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
        original(self, args, state, *rest, **kwargs)
        if state.global_step == step:
            raise _CrashAtError

    monkeypatch.setattr(Log, "on_log", crash)


@pytest.mark.parametrize("optimizer", ["adam", "sgd", "adafactor"])
@pytest.mark.parametrize("schedule", ["linear", "exponential"])
def test_every_optimizer_and_schedule_resumes_exactly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str, schedule: str
) -> None:
    recipe = QUICK.changed(steps=14, optimizer=optimizer, schedule=schedule, l1=1e-4, accumulate=2, learning_rate=1e-3)
    run_tiny(tmp_path / "whole", recipe=recipe)
    with monkeypatch.context() as patch:
        crash_at(8, patch)
        with pytest.raises(_CrashAtError):
            run_tiny(tmp_path / "crashed", recipe=recipe)
    assert run_dir.checkpoints(run_dir.unfinished(tmp_path / "crashed"))[-1].name == "checkpoint-6"
    run_tiny(tmp_path / "crashed", recipe=recipe, resume=True)
    assert adapter(tmp_path / "crashed") == adapter(tmp_path / "whole")


def validated(losses: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Plant the validation losses, the one before training first."""
    planted = iter(losses)
    monkeypatch.setattr("realigner.training.trainer._nats_per_token", lambda _: {"loss": next(planted)})


def test_what_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The best and the last, by planted losses; the final IRM is the one asked for."""
    for keep in ("best", "last"):
        validated([5.5, 5.0, 4.0, 3.0, 6.0, 3.5], monkeypatch)  # at steps 0, 8, 16, 24, 32, 40
        run = run_tiny(tmp_path / keep, recipe=QUICK.changed(keep=keep))
        best = 24
        kept = {run_dir.checkpoint_step(path) for path in run_dir.checkpoints(tmp_path / keep)}
        assert kept == {best, STEPS}
        assert run.record["kept_step"] == (best if keep == "best" else STEPS)
        source = run_dir.checkpoint_folder(tmp_path / keep, run.record["kept_step"])
        assert adapter(tmp_path / keep) == adapter(source)
        ids = torch.arange(2, 9)[None]
        with torch.no_grad():
            assert torch.equal(load_irm(tiny_pair()[0], source)(input_ids=ids).logits, run.model(input_ids=ids).logits)


def test_patience_ends_a_run_and_a_finished_one_is_not_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, losses = QUICK.changed(patience=2), [9.0, 5.0, 4.0, 4.5, 4.1, 1.0]
    validated(losses, monkeypatch)
    run = run_tiny(tmp_path / "whole", recipe=recipe)
    assert run.record["early_stop"] is True
    assert run.record["steps_done"] == 32
    assert run.record["kept_step"] == 16
    validated(losses, monkeypatch)

    import realigner.training.finished_run as module

    def die(*_: Any, **__: Any) -> None:
        raise _CrashAtError

    with monkeypatch.context() as patch:  # between the last checkpoint and the end
        patch.setattr(module, "save_curve", die)
        with pytest.raises(_CrashAtError):
            run_tiny(tmp_path / "late", recipe=recipe)
    again = run_tiny(tmp_path / "late", recipe=recipe, resume=True)
    assert again.record["steps_done"] == run.record["steps_done"]
    assert adapter(tmp_path / "late") == adapter(tmp_path / "whole")

    validated(losses, monkeypatch)
    with monkeypatch.context() as patch:  # after the first evaluation of the two without a better loss
        crash_at(25, patch)
        with pytest.raises(_CrashAtError):
            run_tiny(tmp_path / "half", recipe=recipe)
    validated(losses[4:], monkeypatch)
    again = run_tiny(tmp_path / "half", recipe=recipe, resume=True)
    assert (again.record["early_stop"], again.record["steps_done"], again.record["kept_step"]) == (True, 32, 16)
    assert adapter(tmp_path / "half") == adapter(tmp_path / "whole")


@pytest.mark.proof
def test_a_killed_checkpoint_is_not_taken_for_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed while a checkpoint is written, at each of its files: the one before is still there and is gone on from."""
    run_tiny(tmp_path / "whole")
    for at in range(1, 4):
        out = tmp_path / f"at-{at}"

        def work(at: int = at, out: Path = out) -> None:
            import realigner.training.trainer as trainer

            calls = 0

            def tracked(path: Path, tree: Any) -> None:
                nonlocal calls
                calls += 1
                if calls > 6 * at:
                    path.write_bytes(b"half")
                    for left in (path.parent, path.parent.parent):  # as safetensors names what it writes
                        (left / ".tmpx0Y9zQ").write_bytes(b"half")
                    os.kill(os.getpid(), signal.SIGKILL)
                save_tree(path, tree)

            setattr(trainer, "save_tree", tracked)  # noqa: B010
            run_tiny(out)

        assert os.WIFSIGNALED(os.waitpid(in_a_child(work), 0)[1])
        work_folder = run_dir.unfinished(out)
        assert list(work_folder.glob(".checkpoint-*"))
        assert run_dir.checkpoints(work_folder)
        run_tiny(out, resume=True)
        assert adapter(out) == adapter(tmp_path / "whole")
        assert not list(out.rglob(".*"))
        assert is_ours(out, run_dir.RUN)


@pytest.mark.proof
def test_a_checkpoint_that_is_half_deleted_is_none(tmp_path: Path) -> None:
    """Killed while an old checkpoint is deleted, when only its state is left: a later one is there and is gone on from."""
    run_tiny(tmp_path / "whole")

    def work() -> None:
        whole = shutil.rmtree

        def half(path: Any, *args: Any, **kwargs: Any) -> None:
            if "checkpoint-" not in Path(path).name:
                whole(path, *args, **kwargs)
                return
            for file in Path(path).iterdir():
                if file.name != run_dir.STATE_FILE:
                    file.unlink()
            os.kill(os.getpid(), signal.SIGKILL)

        setattr(shutil, "rmtree", half)  # noqa: B010
        run_tiny(tmp_path / "killed")

    assert os.WIFSIGNALED(os.waitpid(in_a_child(work), 0)[1])
    unfinished = run_dir.unfinished(tmp_path / "killed")
    assert [path.name for path in unfinished.glob(".checkpoint-*")]
    for checkpoint in run_dir.checkpoints(unfinished):
        run_dir.verify(checkpoint)
    run_tiny(tmp_path / "killed", resume=True)
    assert adapter(tmp_path / "killed") == adapter(tmp_path / "whole")
    assert not list((tmp_path / "killed").glob(".checkpoint-*"))


@pytest.mark.proof
def test_a_full_disk_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    """Files of at most N bytes: the run stops with one line, and goes on when there is room."""
    run_tiny(tmp_path / "whole")

    def work() -> None:
        def limit(*_: Any, **__: Any) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        original = Log.on_step_end

        def on_step_end(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            original(self, args, state, control, **kwargs)
            if state.global_step == 10:
                limit()

        Log.on_step_end = on_step_end  # type: ignore[method-assign]
        try:
            run_tiny(tmp_path / "full")
        except RealignerError as error:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            (tmp_path / "message").write_text(str(error))

    os.waitpid(in_a_child(work), 0)
    message = (tmp_path / "message").read_text()
    assert "cannot be written" in message
    assert "last good checkpoint is checkpoint-9" in message
    run_tiny(tmp_path / "full", resume=True)
    assert adapter(tmp_path / "full") == adapter(tmp_path / "whole")


def stopped_at(step: int, number: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a signal sent when a step has been logged."""
    original = Log.on_log

    def press(self: Any, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
        original(self, args, state, *rest, **kwargs)
        if state.global_step == step:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Log, "on_log", press)


@pytest.mark.proof
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_leave_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals) -> None:
    run_tiny(tmp_path / "whole")
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        stopped_at(7, number, patch)
        run = run_tiny(tmp_path / "run")
    assert signal.getsignal(number) == before
    assert run.interrupted
    assert run.record["signal"] == number.name
    assert run.record["steps_done"] == 8  # the step that ran when it came
    assert run.folder == run_dir.unfinished(tmp_path / "run")
    assert not (tmp_path / "run").exists()
    load_irm(tiny_pair()[0], run_dir.checkpoints(run.folder)[-1])
    run_tiny(tmp_path / "run", resume=True)
    assert adapter(tmp_path / "run") == adapter(tmp_path / "whole")
    with pytest.raises(RealignerError, match="nothing to resume"):
        run_tiny(tmp_path / "run", resume=True)


def test_resume_refuses_another_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        stopped_at(5, signal.SIGTERM, patch)
        run_tiny(tmp_path / "run")
    work = run_dir.unfinished(tmp_path / "run")
    with pytest.raises(RealignerError, match=r"resume it \(resume\), or discard it \(force\)"):
        run_tiny(tmp_path / "run")
    with pytest.raises(RealignerError, match=r"learning_rate is 0\.001, not 0\.01"):
        run_tiny(tmp_path / "run", recipe=QUICK.changed(learning_rate=1e-3), resume=True)
    host, tokenizer = tiny_pair()
    with pytest.raises(RealignerError, match="the data changed"):
        train(host, tokenizer, some_rows(32), tmp_path / "run", QUICK, resume=True, quiet=True)
    other, _ = tiny_pair(seed=1)
    with pytest.raises(RealignerError, match="the host's weights changed"):
        train(other, tokenizer, some_rows(), tmp_path / "run", QUICK, resume=True, quiet=True)
    record = read_run(work)
    (work / "run.json").write_text(json.dumps(record | {"processes": 2}))
    with pytest.raises(RealignerError, match=r"number of processes changed since it was begun \(1 now, 2 before\)"):
        run_tiny(tmp_path / "run", resume=True)
    (work / "run.json").write_text(json.dumps(record))
    with (
        ThreadPoolExecutor(1) as other_thread,
        run_dir.locked(tmp_path / "run"),
        pytest.raises(RealignerError, match="another process is training this run"),
    ):
        other_thread.submit(run_tiny, tmp_path / "run", resume=True).result()
    damaged = run_dir.checkpoints(work)[-1] / "optimizer.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    with pytest.raises(RealignerError, match=r"optimizer\.safetensors: truncated or damaged"):
        run_tiny(tmp_path / "run", resume=True)
    run_tiny(tmp_path / "run", force=True)
    assert not work.exists()


def test_nothing_in_a_run_is_a_pickle(tmp_path: Path) -> None:
    run_tiny(tmp_path / "run", recipe=QUICK.changed(report_to=["tensorboard"], samples=4))
    endings = {path.suffix for path in (tmp_path / "run").rglob("*") if path.is_file() and "tfevents" not in path.name}
    assert endings == {".safetensors", ".json", ".jsonl", ".yaml", ".png", ".md"}


trees = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
    | st.lists(st.floats(width=32, allow_nan=False), max_size=4).map(torch.tensor),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(st.text().filter(lambda key: not key.startswith("__")), inner, max_size=4)
    | st.dictionaries(st.integers(), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


def same(one: Any, two: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(two, torch.Tensor) and one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, dict):
        return isinstance(two, dict) and one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, list):
        return isinstance(two, list) and len(one) == len(two) and all(map(same, one, two))
    return type(one) is type(two) and bool(one == two)


@settings(max_examples=150, deadline=None)
@given(tree=trees)
def test_trees_come_back_to_the_bit(tree: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "tree.safetensors"
    save_tree(path, tree)
    assert same(load_tree(path), tree)


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 200), min_size=8, max_size=500),
    batch=st.integers(1, 8),
    seed=st.integers(0, 2**32 - 1),
    epoch=st.integers(0, 50),
)
def test_the_order_of_rows(lengths: list[int], batch: int, seed: int, epoch: int) -> None:
    """Each row at most once, whole batches, the same for the same seed and epoch whatever the global random state."""
    sampler = SeededLengthSampler(lengths, batch, seed, lambda: epoch)
    order = list(sampler)
    assert len(order) == len(set(order)) == len(sampler)
    assert len(order) % batch == 0
    assert len(lengths) - len(order) < batch
    torch.rand(3)
    assert list(sampler) == order


def test_batches_hold_rows_of_like_length() -> None:
    generator = random.Random(0)
    lengths = [generator.randint(10, 200) for _ in range(1000)]
    order = list(SeededLengthSampler(lengths, 8, 42, lambda: 0))
    padded = sum(8 * max(lengths[row] for row in order[at : at + 8]) for at in range(0, len(order), 8))
    assert padded < 1.06 * sum(lengths[row] for row in order)
    other = list(SeededLengthSampler(lengths, 8, 42, lambda: 1))
    assert order != other
    first = [max(lengths[row] for row in order[at : at + 8]) for at in range(0, len(order), 8)]
    assert first != sorted(first, reverse=True)  # not from long to short


@pytest.mark.proof
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_the_command_line_stops_and_goes_on(tmp_path: Path, number: signal.Signals) -> None:
    """The real thing: a signal in the middle, exit code 0 for SIGTERM and 1 for Ctrl-C, a line that says how to go on."""
    host, rows = tiny_folder(tmp_path / "host"), tmp_path / "rows.jsonl"
    rows.write_text("".join(row.model_dump_json() + "\n" for row in some_rows()))
    command = [
        sys.executable, "-m", "realigner", "train", "--host", str(host), "--data", str(rows), "--out", str(tmp_path / "run"),
        "--steps", "1000", "--set", "samples=0", "--set", "evaluations=1", "--set", "threads=1", "--batch-size", "2",
    ]  # fmt: skip
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs inherit "ignore"
    )
    metrics = run_dir.unfinished(tmp_path / "run") / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.is_file() and len(metrics.read_text().splitlines()) > 5):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    out, error = process.communicate(timeout=100)
    assert process.returncode == (0 if number == signal.SIGTERM else 1)
    said = out if number == signal.SIGTERM else error
    assert f"resume with: realigner train --out {tmp_path / 'run'} --resume" in " ".join(said.split())
    assert "Traceback" not in error
    if number == signal.SIGTERM:
        return
    again = subprocess.run(
        [*command[:4], "--out", str(tmp_path / "run"), "--resume", "--json"], capture_output=True, text=True, timeout=250
    )
    assert again.returncode == 0, again.stderr
    record = json.loads(again.stdout)
    assert record["steps_done"] == 1000
    assert [e["step"] for e in read_metrics(tmp_path / "run") if "loss" in e] == list(range(1, 1001))


@pytest.mark.slow
@pytest.mark.host
@pytest.mark.timeout(1200)
def test_the_command_on_the_embedded_host_killed_ten_times(tmp_path: Path) -> None:
    """`realigner train`, SIGKILL at 10 random moments, resumed each time: the adapter of an uninterrupted run."""

    def command(out: Path, *more: str) -> list[str]:
        options = ["--steps", "24", "--set", "samples=0", "--set", "save_every=2", "--set", "evaluations=2"]
        return [
            sys.executable,
            "-m",
            "realigner",
            "train",
            "--host",
            EMBEDDED,
            "--tone",
            "anger",
            *options,
            "--out",
            str(out),
            *more,
        ]

    subprocess.run(command(tmp_path / "whole"), check=True, capture_output=True)
    dice, kills, work = random.Random(1), 0, run_dir.unfinished(tmp_path / "killed")
    while kills < 10:
        with (tmp_path / "said").open("w") as said:
            process = subprocess.Popen(command(tmp_path / "killed", "--resume"), stderr=said, stdout=said)
        metrics, before = work / "metrics.jsonl", time.monotonic()
        lines = len(metrics.read_text().splitlines()) if metrics.is_file() else 0
        while process.poll() is None and time.monotonic() - before < 120:  # until it trains
            now = len(metrics.read_text().splitlines()) if metrics.is_file() else 0
            if now > lines or now < lines:
                break
            time.sleep(0.05)
        time.sleep(dice.uniform(0, 6))
        process.kill()
        if process.wait() == -signal.SIGKILL:
            kills += 1
        else:
            assert process.returncode == 0, (tmp_path / "said").read_text()
            assert adapter(tmp_path / "killed") == adapter(tmp_path / "whole")
            shutil.rmtree(tmp_path / "killed")
    subprocess.run(command(tmp_path / "killed", "--resume"), check=True, capture_output=True)
    assert adapter(tmp_path / "killed") == adapter(tmp_path / "whole")
