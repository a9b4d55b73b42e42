"""Several processes (gloo, on the CPU): the same numbers as one, one writer, resume as it was begun or not at all."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import dispatch_model
from peft import get_peft_model
from safetensors.torch import load_file

import realigner as ra
from realigner.errors import RealignerError
from realigner.irm_config import IRMConfig
from realigner.training import read_metrics, read_run, run_dir, teacher, train
from realigner.tuner import load_irm, tuner_of
from tests.distributed_worker import RECIPE, batch, taught_recipe
from tests.tiny import some_rows, tiny_folder, tiny_pair

ROOT = Path(__file__).resolve().parents[1]


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def two(command: list[str], **more: str) -> list[subprocess.CompletedProcess[str]]:
    """Run a command in two processes, as torchrun starts them."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1", **more}
    started = []
    for rank in ("0", "1"):
        environment = os.environ | shared | {"RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": "2"}
        started.append(
            subprocess.Popen(command, env=environment, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        )
    outcomes = [process.communicate(timeout=200) for process in started]
    return [
        subprocess.CompletedProcess(command, process.returncode, out, err)
        for process, (out, err) in zip(started, outcomes, strict=True)
    ]


def worker(what: str, out: Path) -> list[subprocess.CompletedProcess[str]]:
    return two([sys.executable, "-m", "tests.distributed_worker", what, str(out)])


@pytest.fixture(scope="module")
def ddp(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run of two processes, and everything they said."""
    out = tmp_path_factory.mktemp("ddp") / "run"
    done = worker("train", out)
    said = "".join(process.stdout + process.stderr for process in done)
    assert [process.returncode for process in done] == [0, 0], said
    return out, said


@pytest.mark.proof
def test_two_processes_of_four_rows_are_one_of_eight(ddp: tuple[Path, str], tmp_path: Path) -> None:
    host, tokenizer = tiny_pair()
    train(host, tokenizer, some_rows(), tmp_path / "one", RECIPE, quiet=True)
    one, two = (load_file(path / "adapter_model.safetensors") for path in (tmp_path / "one", ddp[0]))
    assert one.keys() == two.keys()
    assert max(float((one[key] - two[key]).abs().max()) for key in one) < 1e-6
    start = dict(tuner_of(get_peft_model(tiny_pair()[0], IRMConfig())).registry.network("default").named_parameters())
    assert any(not torch.equal(one[f"irm.{key}"], value) for key, value in start.items())
    first, second = (read_metrics(path) for path in (tmp_path / "one", ddp[0]))
    assert len(first) == len(second) == 9
    for a, b in zip(first, second, strict=True):
        assert a["step"] == b["step"]
        for key in ("loss", "validation_loss", "grad_norm", "tokens"):
            assert a.get(key, 0) == pytest.approx(b.get(key, 0), abs=1e-6)


@pytest.mark.slow
def test_two_processes_with_a_teacher_are_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each samples a part of the replies, and the weights of targets hold over both: the replies and the IRM of one process."""
    (tmp_path / "questions.txt").write_text("".join(f"What is {n}?\n" for n in range(22)))
    done = worker("taught", tmp_path / "two")
    assert [process.returncode for process in done] == [0, 0], done[0].stderr
    for name in ("OBEDIENCE", "REPLY_TOKENS", "TOGETHER"):  # put back what `taught_recipe` sets
        monkeypatch.setattr(teacher, name, getattr(teacher, name))
    host, tokenizer = tiny_pair()
    train(host, tokenizer, some_rows(tone="z"), tmp_path / "one", taught_recipe(tmp_path / "questions.txt"), quiet=True)
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    assert (tmp_path / "one" / "teacher.jsonl").read_bytes() == (tmp_path / "two" / "teacher.jsonl").read_bytes()
    assert max(float((one[key] - two[key]).abs().max()) for key in one) < 1e-6
    first, second = (read_metrics(tmp_path / name) for name in ("one", "two"))
    for a, b in zip(first, second, strict=True):
        for key in ("loss", "validation_loss", "validation_kl", "validation_ce", "grad_norm"):
            assert a.get(key, 0) == pytest.approx(b.get(key, 0), abs=1e-6)
    assert any("validation_kl" in entry for entry in first)


@pytest.mark.proof
def test_nothing_is_unused_and_one_writes(ddp: tuple[Path, str]) -> None:
    out, said = ddp
    assert "unused" not in said.lower()
    assert read_run(out)["processes"] == 2
    assert sum("loss" in entry for entry in read_metrics(out)) == 6  # each step once
    assert [path.name for path in out.parent.iterdir()] == ["run"]
    load_irm(tiny_pair()[0], out)


@pytest.mark.proof
def test_another_number_of_processes_does_not_resume(ddp: tuple[Path, str], tmp_path: Path) -> None:
    work = run_dir.unfinished(tmp_path / "run")
    shutil.copytree(ddp[0], work)
    host, tokenizer = tiny_pair()
    with pytest.raises(RealignerError, match=r"number of processes changed since it was begun \(1 now, 2 before\)"):
        train(host, tokenizer, some_rows(), tmp_path / "run", RECIPE, resume=True, quiet=True)


@pytest.mark.slow  # longer than a minute
def test_two_processes_stop_together_and_resume_exactly(ddp: tuple[Path, str], tmp_path: Path) -> None:
    """SIGTERM to one of them: both stop after the same step; gone on with, the same bytes."""
    done = worker("stop", tmp_path / "run")
    assert [process.returncode for process in done] == [0, 0], done[0].stderr
    assert not (tmp_path / "run").exists()
    steps = [run_dir.checkpoint_step(path) for path in run_dir.checkpoints(run_dir.unfinished(tmp_path / "run"))]
    assert steps
    assert max(steps) < 6
    done = worker("resume", tmp_path / "run")
    assert [process.returncode for process in done] == [0, 0], done[0].stderr
    one, two = ((path / "adapter_model.safetensors").read_bytes() for path in (ddp[0], tmp_path / "run"))
    assert one == two


@pytest.mark.proof
def test_fsdp2_gradients(tmp_path: Path) -> None:
    """Sharded over two processes, the mean of their gradients is that of one process with all rows."""
    done = worker("fsdp", tmp_path / "gradients.pt")
    assert [process.returncode for process in done] == [0, 0], done[0].stderr
    got = torch.load(tmp_path / "gradients.pt", weights_only=True)
    host, _ = tiny_pair()
    torch.manual_seed(1)
    model = get_peft_model(host, IRMConfig())
    ids, targets = batch()
    logits = model(input_ids=ids, use_cache=False).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()  # type: ignore[no-untyped-call]
    want = {name: p.grad for name, p in tuner_of(model).registry.network("default").named_parameters()}
    assert got.keys() == want.keys()
    assert max(float((got[key] - want[key]).abs().max()) for key in want if want[key] is not None) < 1e-6
    assert max(float(value.abs().max()) for value in got.values()) > 1e-4


@pytest.mark.slow
def test_a_sharded_checkpoint_is_safetensors_and_exact(tmp_path: Path) -> None:
    """The whole optimiser, gathered from two processes: put back, the next step is the same to the bit; nothing is pickled."""
    done = worker("fsdp_checkpoint", tmp_path / "checkpoint")
    assert [process.returncode for process in done] == [0, 0], done[0].stderr + done[1].stderr
    assert {path.suffix for path in (tmp_path / "checkpoint").iterdir()} == {".safetensors"}


@pytest.mark.slow
@pytest.mark.parametrize("state", ["FULL_STATE_DICT", "SHARDED_STATE_DICT"])
def test_fsdp2_by_accelerate(state: str, tmp_path: Path) -> None:
    """The command line under what `accelerate launch --use_fsdp` sets: trains, and the file is a plain adapter, whole."""
    host, rows = tiny_folder(tmp_path / "host"), tmp_path / "rows.jsonl"
    rows.write_text("".join(row.model_dump_json() + "\n" for row in some_rows()))
    command = [
        sys.executable, "-m", "realigner", "train", "--host", str(host), "--data", str(rows), "--out", str(tmp_path / "run"),
        "--steps", "4", "--batch-size", "8", "--dtype", "float32", "--set", "optimizer=sgd", "--set", "evaluations=1",
        "--set", "report_to=[]", "--set", "learning_rate=0.1", "--set", "warmup=0", "--set", "threads=1", "--device", "cpu",
        "--set", "dropout=0",
    ]  # fmt: skip
    sharding = {
        "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer,IRM",
        "FSDP_STATE_DICT_TYPE": state, "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    done = two(command, **sharding)
    assert [process.returncode for process in done] == [0, 0], done[0].stderr + done[1].stderr
    alone = subprocess.run([*command, "--out", str(tmp_path / "one")], capture_output=True, text=True, cwd=ROOT)
    assert alone.returncode == 0, alone.stderr
    one, sharded = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "run"))
    assert max(float((one[key] - sharded[key]).abs().max()) for key in one) < 1e-6


def test_a_host_spread_over_places_trains_to_the_same_numbers(tmp_path: Path) -> None:
    """device_map: layers in memory and on disk (what there is here in place of several GPUs), and `balanced`."""
    place = tiny_folder(tmp_path / "host")
    weights = []
    for name in ("one", "balanced", "mixed"):
        host, tokenizer = ra.load_host(str(place), dtype="float32", device="balanced" if name == "balanced" else "cpu")
        if name == "mixed":
            places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
            layers = {f"model.layers.{n}": "cpu" for n in range(len(host.model.layers))}
            spread = {**places, **layers, "model.layers.1": "disk"}
            host = dispatch_model(host, spread, main_device="cpu", offload_dir=str(tmp_path / "disk"), force_hooks=True)
            assert next(host.model.layers[1].parameters()).device.type == "meta"
        run = train(host, tokenizer, some_rows(), tmp_path / name, RECIPE, steps=3, quiet=True)
        weights.append(torch.cat([p.detach().flatten().cpu() for p in tuner_of(run.model).registry.parameters()]))
    assert torch.equal(weights[0], weights[1])
    assert float((weights[0] - weights[2]).abs().max()) < 1e-6
