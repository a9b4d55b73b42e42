"""Sweeps: the grid, its hashes, and runs that are killed, fail, and are begun again, here and on Ray."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from hypothesis import given, strategies as st

from realigner.errors import RealignerError, UsageError
from realigner.hosts import EMBEDDED
from realigner.sweep import RunSpec, Sweep, plan, read_sweep, run_sweep
from realigner.sweep.grid import _name
from realigner.sweep.local import deal_devices
from realigner.sweep.on_ray import _check_room
from realigner.sweep.sweep_plot import lines_by_key, save_pictures
from realigner.sweep.sweep_run import _jobs, _settled, states_of
from realigner.sweep.sweep_table import StateTable
from realigner.sweep.worker import wait_until_free
from realigner.training import Recipe, read_metrics, read_recipe, read_run, run_dir
from realigner.tuner import load_irm
from tests.tiny import some_rows, tiny_folder, tiny_pair

QUICK = {"steps": 10, "batch_size": 4, "samples": 0, "report_to": [], "save_every": 2, "evaluations": 1}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A host, a file of rows for two tones, and a sweep file over them."""
    place = tmp_path_factory.mktemp("sweep")
    tiny_folder(place / "host")
    for tone in ("anger", "joy"):
        (place / f"{tone}.jsonl").write_text("".join(row.model_dump_json() + "\n" for row in some_rows(tone=tone)))
    return place


def sweep_of(place: Path, **changes: Any) -> list[RunSpec]:
    values: dict[str, Any] = {
        "set": {**QUICK, "host": str(place / "host"), **changes.pop("set", {})},
        "grid": {"tone": ["anger", "joy"], "seed": [1, 2]},
        "data": {"anger": "anger.jsonl", "joy": "joy.jsonl"},
    }
    return plan(Sweep(**{**values, **changes}), place)


def adapters(out: Path, runs: list[RunSpec]) -> dict[str, bytes]:
    return {run.name: (out / run.name / "adapter_model.safetensors").read_bytes() for run in runs}


def test_the_papers_sweep() -> None:
    runs = plan(*read_sweep("paper"))
    assert len([run for run in runs if not run.varies.get("untrained")]) == 24
    assert len([run for run in runs if run.varies.get("untrained")]) == 8  # one for each seed and layer set
    assert {run.recipe.preset for run in runs} == {"paper"}
    assert {run.recipe.seed for run in runs} == {42, 420}
    assert all(run.recipe.steps == 0 for run in runs if run.varies.get("untrained"))


def test_the_grid(place: Path) -> None:
    runs = sweep_of(place, baselines=True)
    assert len(runs) == 4 + 2
    assert len({run.name for run in runs}) == 6
    assert runs[0].label == "tone=anger seed=1"
    assert runs[0].recipe.data == str((place / "anger.jsonl").resolve())
    again = sweep_of(place, grid={"seed": [2, 1], "tone": ["joy", "anger"]}, baselines=True)
    assert {run.name for run in again} == {run.name for run in runs}  # order is nothing
    copy = place / "copy.jsonl"
    copy.write_bytes((place / "anger.jsonl").read_bytes())
    moved = sweep_of(place, data={"anger": "copy.jsonl", "joy": "joy.jsonl"})
    assert [run.name for run in moved] == [run.name for run in runs[:4]]  # the content of data counts, not the place
    copy.write_bytes((place / "anger.jsonl").read_bytes() + b"\n")
    changed = sweep_of(place, data={"anger": "copy.jsonl", "joy": "joy.jsonl"})
    assert changed[0].name != runs[0].name
    assert changed[2].name == runs[2].name


VALUES: dict[str, st.SearchStrategy[Any]] = {
    "seed": st.integers(0, 1000),
    "steps": st.integers(1, 1000),
    "learning_rate": st.floats(1e-6, 1.0),
    "rank": st.integers(0, 99),
    "layers": st.sampled_from(["all", "0-3", "5"]),
    "preset": st.sampled_from(["compact", "paper"]),
    "device": st.sampled_from(["auto", "cpu"]),
    "threads": st.integers(1, 8),
}


@given(one=st.fixed_dictionaries({}, optional=VALUES), two=st.fixed_dictionaries({}, optional=VALUES))
def test_the_hash_is_of_what_a_run_is(one: dict[str, Any], two: dict[str, Any]) -> None:
    """Equal exactly where the two recipes are the same run (`Recipe.difference`)."""
    first, second = Recipe(**one), Recipe(**two)
    assert (_name(first, False, {}) == _name(second, False, {})) == (first.difference(second) is None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("grid: {sed: [1]}\n", ":1: grid: a recipe has no key 'sed'"),
        ("recipe: default\n\nset: {stepz: 1}\n", ":3: set: a recipe has no key 'stepz'"),
        ("recipe: default\ngrid: {seed: []}\n", ":2: grid: 'seed' has no values"),
        ("grid:\n  tone: [anger]\n  sed: [1]\n", ":3: grid: a recipe has no key 'sed'"),
        ("grid: {seed: 1}\n", ":1: key 'grid.seed'"),
        ("recipe: default\nworkers: 0\n", ":2: key 'workers'"),
        ("recipe: default\nrobots: 3\n", ":2: unknown key 'robots'"),
        ("grid: [\n", "not valid YAML"),
        ("grid:\n  tone: [anger]\n  seed: [1, -3]\n", ":3: grid: key 'seed' Input should be greater than or equal to 0"),
        ("set:\n  steps: 3\n  host: 5\n", ":3: set: key 'host' is not a string"),
        ("grid: {tone: [anger]}\ndata:\n  angre: a.jsonl\n", ":3: data: no run has the tone 'angre'"),
        (
            "grid:\n  tone: [anger]\n  data: [a.jsonl]\ndata: {anger: b.jsonl}\n",
            ":3: grid: 'data' is given by the sweep's own data",
        ),
        ("data: {anger: b.jsonl}\nset: {tone: anger, data: a.jsonl}\n", ":2: set: 'data' is given by the sweep's own data"),
        ("grid:\n  tone: [anger]\n  tone: [joy]\n", ":3: not read (duplicate key 'tone', first on line 2)"),
    ],
)
def test_bad_sweeps_name_the_line(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(text)
    with pytest.raises(RealignerError) as caught:
        read_sweep(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_refusals(place: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"sweep: seed=-3: key 'seed'"):
        sweep_of(place, grid={"seed": [-3]})
    with pytest.raises(RealignerError, match=r"gone\.jsonl: cannot be read"):
        sweep_of(place, grid={"tone": ["anger"]}, data={"anger": "gone.jsonl"})
    with pytest.raises(UsageError, match="there is no such file"):
        read_sweep(tmp_path / "none.yaml")
    with pytest.raises(UsageError, match=r"settings: 'seed' is given by the grid of .*paper\.yaml"):
        read_sweep("paper", {"seed": 1})
    (tmp_path / "own.yaml").write_text("grid: {tone: [anger]}\ndata: {anger: a.jsonl}\n")
    with pytest.raises(UsageError, match=r"settings: 'data' is given by the data of .*own\.yaml"):
        read_sweep(str(tmp_path / "own.yaml"), {"data": "b.jsonl"})
    (tmp_path / "own.yaml").unlink()
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(RealignerError, match="is not a sweep's folder"):
        run_sweep(sweep_of(place), tmp_path)
    with pytest.raises(UsageError, match="on='cloud' is none of local, ray"):
        run_sweep(sweep_of(place), tmp_path / "new", on="cloud")
    with pytest.raises(UsageError, match="a part of a GPU"):
        run_sweep(sweep_of(place), tmp_path / "new", gpus=0.5, quiet=True)
    with pytest.raises(RealignerError, match="holds another sweep, which has none of these runs"):
        run_sweep(sweep_of(place, set={"steps": 11}), tmp_path / "new", quiet=True)
    with pytest.raises(RealignerError, match="holds another sweep, which has none of these runs"):
        states_of(sweep_of(place, set={"steps": 11}), tmp_path / "new")
    with pytest.raises(UsageError, match=r"sweep: tone=joy: the authored set has no 'joy'; it has anger"):
        sweep_of(place, grid={"tone": ["anger", "joy"]}, data={})
    with pytest.raises(UsageError, match="sweep: the recipe: no tone is given"):
        plan(Sweep(), place)
    with (
        _settled(tmp_path / "new", sweep_of(place)),
        pytest.raises(RealignerError, match="another process is running this sweep"),
    ):
        run_sweep(sweep_of(place), tmp_path / "new", quiet=True)
    (tmp_path / "new" / "sweep.json").write_text("[]")
    with pytest.raises(RealignerError, match=r"sweep\.json:1: not a JSON object"):
        run_sweep(sweep_of(place), tmp_path / "new", quiet=True)


def test_an_enlarged_grid_keeps_the_index(place: Path, tmp_path: Path) -> None:
    for seeds in ([1], [1, 2]):
        with _settled(tmp_path, sweep_of(place, grid={"tone": ["anger"], "seed": seeds}, data={"anger": "anger.jsonl"})):
            assert len(json.loads((tmp_path / "sweep.json").read_text())["runs"]) == len(seeds)
    with _settled(tmp_path, sweep_of(place, grid={"tone": ["anger"], "seed": [2]}, data={"anger": "anger.jsonl"})):
        assert len(json.loads((tmp_path / "sweep.json").read_text())["runs"]) == 2


def test_finished_runs_without_their_checkpoints(place: Path, tmp_path: Path) -> None:
    runs = sweep_of(place, grid={"tone": ["anger"], "seed": [1]}, data={"anger": "anger.jsonl"})
    run = tmp_path / "sweep" / runs[0].name
    assert run_sweep(runs, tmp_path / "sweep", "here", quiet=True).finished
    before = adapters(tmp_path / "sweep", runs)
    assert len(run_dir.checkpoints(run)) == 1
    assert run_sweep(runs, tmp_path / "sweep", "here", quiet=True, checkpoints=False).finished  # of those that are there too
    assert not list(run.glob("*checkpoint*"))
    assert adapters(tmp_path / "sweep", runs) == before
    assert run_sweep(runs, tmp_path / "other", "here", quiet=True, checkpoints=False).finished
    assert not list((tmp_path / "other").glob("*/*checkpoint*"))
    assert adapters(tmp_path / "other", runs) == before


def test_a_run_that_breaks_in_this_process_does_not_stop_the_others(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from realigner import training

    runs = sweep_of(place, grid={"tone": ["anger"], "seed": [1, 2]}, data={"anger": "anger.jsonl"})
    train_recipe, calls = training.train_recipe, []

    def first_breaks(*args: Any, **options: Any) -> Any:
        calls.append(args)
        if len(calls) == 1:
            raise MemoryError("no room")
        return train_recipe(*args, **options)

    monkeypatch.setattr(training, "train_recipe", first_breaks)
    result = run_sweep(runs, tmp_path / "sweep", "here", quiet=True)
    assert result.errors == {runs[0].name: "unexpected MemoryError: no room"}
    assert result.states[runs[1].name] == "done"

    def interrupted(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(training, "train_recipe", interrupted)
    assert run_sweep(runs, tmp_path / "other", "here", quiet=True).states == {runs[0].name: "stopped", runs[1].name: "waiting"}


def test_a_host_in_a_sweep_file_is_where_the_file_is(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for host, found in (("host", str((place / "host").resolve())), ("org/nowhere", "org/nowhere")):
        sweep = Sweep(set={"host": host, "tone": "anger", "data": "anger.jsonl"})
        assert plan(sweep, place)[0].recipe.host == found


def test_a_file_of_the_command_line_is_where_the_command_is(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    chosen, base = read_sweep("paper", {"data": "anger.jsonl", "host": "host"})
    run = plan(chosen, base)[0]
    assert run.recipe.data == str(place.resolve() / "anger.jsonl")
    recipe = read_recipe(_jobs([run], tmp_path, 2)[0].recipe)  # what travels has whole paths
    assert (recipe.host, recipe.data) == (str((place / "host").resolve()), run.recipe.data)
    assert recipe.threads == max(1, len(os.sched_getaffinity(0)) // 2)


def test_pictures_of_numbers_that_yaml_takes_for_texts(place: Path, tmp_path: Path) -> None:
    """``1e-4`` without a point is a text to YAML, and a number to a recipe."""
    path = place / "texts.yaml"
    path.write_text("set: {tone: anger}\nbaselines: true\ngrid:\n  l1: [1e-4, 1e-3]\n  learning_rate: [1e-2, 1.0e-1]\n")
    runs = plan(*read_sweep(path))
    failed = [run.name for run in runs]
    for key, values in (("l1", {1e-4, 1e-3}), ("learning_rate", {0.01, 0.1})):
        lines = lines_by_key(runs, tmp_path, key, failed)
        assert {point.value for line in lines.values() for point in line} == values
    assert [made.name for made in save_pictures(runs, tmp_path, failed)] == ["loss_by_l1.png", "loss_by_learning_rate.png"]


def test_gpus_are_dealt_from_those_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3,5,7")
    assert deal_devices(2, 2) == ["2,3", "5,7"]
    assert deal_devices(0, 3) == ["", "", ""]
    with pytest.raises(UsageError, match="3 workers with 2 GPUs each, but there are 4"):
        deal_devices(2, 3)


def test_what_no_machine_of_a_cluster_can_take(capsys: pytest.CaptureFixture[str]) -> None:
    """Ray itself would wait for ever."""
    nodes = [{"Alive": True, "Resources": {"CPU": 2.0}}, {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}}]
    ray = SimpleNamespace(nodes=lambda: nodes)
    _check_room(ray, 2, 0, None)
    with pytest.raises(RealignerError, match=r"takes 1 CPUs and 1 GPUs, and no machine has them .*: 2 and 0\)"):
        _check_room(ray, 1, 1, None)
    _check_room(ray, 4, 0, "host:6379")
    assert "waiting for one that has" in capsys.readouterr().err


def test_a_run_that_is_still_held_is_waited_for(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with (
        ThreadPoolExecutor(1) as other,
        run_dir.locked(run),
        pytest.raises(RealignerError, match="another process"),
    ):
        other.submit(wait_until_free, run, 0.6).result()
    wait_until_free(run, 5)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("epochs", [None, 3])
def test_the_table_knows_the_time_left(place: Path, tmp_path: Path, epochs: float | None) -> None:
    """Also where a recipe counts epochs: a checkpoint knows the steps."""
    count = {"steps": 40} if epochs is None else {"steps": None, "epochs": epochs}
    run = sweep_of(place, set=count)[0]
    work = run_dir.unfinished(tmp_path / run.name)
    (work / "checkpoint-10").mkdir(parents=True)
    (work / "checkpoint-10" / run_dir.STATE_FILE).write_text('{"global_step": 10, "max_steps": 40}')
    (work / run_dir.METRICS_FILE).write_text('{"step": 9, "loss": 3}\n{"step": 10, "loss": 2.5, "seconds": 5.0}\n')
    table = StateTable([run], tmp_path, quiet=True)
    assert table._progress(run) == ("10/40", "2.50", 15.0)
    table.set(run.name, "running")
    assert table._table().title == "0/1 done, about 0:00:15 left"


@pytest.fixture(scope="module")
def local(place: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[RunSpec], Path]:
    """A whole sweep of two tones and two seeds, one of whose runs fails, with baselines."""
    runs = sweep_of(place, baselines=True)
    broken = RunSpec("broken", runs[0].recipe.changed(layers="0-77"), {"tone": "anger", "seed": 77})
    out = tmp_path_factory.mktemp("local") / "out"
    result = run_sweep([broken, *runs], out, workers=2, quiet=True)
    assert result.errors == {"broken": "layers: there is no layer 3; this host has layers 0 to 2"}
    assert not result.finished
    assert {name for name, state in result.states.items() if state == "done"} == {run.name for run in runs}
    return runs, out


@pytest.mark.proof
def test_a_failed_run_does_not_stop_the_others(local: tuple[list[RunSpec], Path]) -> None:
    runs, out = local
    assert "there is no layer 3" in (out / "logs" / "broken.log").read_text()
    for run in runs:
        load_irm(tiny_pair()[0], out / run.name)
        assert read_run(out / run.name)["steps_done"] == run.recipe.steps
    index = json.loads((out / "sweep.json").read_text())["runs"]
    assert index[runs[0].name]["tone"] == "anger"
    assert len(set(adapters(out, runs).values())) == 4  # two seeds, trained or not; the two tones' rows say the same


@pytest.mark.proof
def test_a_finished_run_is_not_trained_again(local: tuple[list[RunSpec], Path]) -> None:
    runs, out = local
    before = {run.name: (out / run.name).stat().st_mtime_ns for run in runs}
    result = run_sweep(runs, out, workers=2, quiet=True)
    assert result.finished
    assert {run.name: (out / run.name).stat().st_mtime_ns for run in runs} == before
    assert set(states_of(runs, out).values()) == {"done"}


def workers_of(out: Path) -> Iterator[psutil.Process]:
    """The trainings of a sweep that run now."""
    for process in psutil.process_iter():
        try:
            command = process.cmdline()
        except psutil.Error:
            continue
        if "realigner.sweep.worker" in command and any(part.startswith(f"{out}{os.sep}") for part in command):
            yield process


def wait_for(condition: Callable[[], Any], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def begun(out: Path) -> bool:
    """Whether some run has done a step or more and is not finished."""
    return any(path.stat().st_size > 300 for path in out.glob("*.unfinished/metrics.jsonl"))


def driver(place: Path, out: Path, *more: str) -> subprocess.Popen[bytes]:
    """`realigner sweep` in a process of its own, on runs that take some seconds."""
    file = place / "sweep.yaml"
    values = {**QUICK, "steps": 250, "save_every": 20, "host": str(place / "host")}
    file.write_text(
        json.dumps({"set": values, "grid": {"seed": [1, 2, 3, 4]}, "data": {"anger": "anger.jsonl"}})
        .replace('"seed": [1', '"tone": ["anger"], "seed": [1')
    )  # fmt: skip
    command = [sys.executable, "-m", "realigner", "sweep", str(file), "--out", str(out), "--workers", "2", *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def trained_once(out: Path, runs: int, steps: int) -> None:
    """Every run is there, whole, and logged each of its steps once."""
    finished = [path for path in out.iterdir() if (path / "run.json").is_file()]
    assert len(finished) == runs
    assert not list(out.glob("*.unfinished"))
    for path in finished:
        assert [entry["step"] for entry in read_metrics(path) if "loss" in entry] == list(range(1, steps + 1))


@pytest.mark.slow
@pytest.mark.parametrize("on", ["local", "ray"])
def test_killed_workers_and_drivers(place: Path, tmp_path: Path, on: str) -> None:
    """A worker is killed, then the driver; begun again, all is done once, in the bytes of a sweep left alone."""
    out = tmp_path / "out"
    process = driver(place, out, "--on", on)
    wait_for(lambda: begun(out))
    next(workers_of(out)).kill()
    wait_for(lambda: len(list(out.glob("*.unfinished"))) >= 2 or list(out.glob("*/run.json")))
    wait_for(lambda: begun(out))
    process.kill()
    process.wait()
    wait_for(lambda: not list(workers_of(out)), 30)  # no orphan goes on
    done = {path.parent.name: path.stat().st_mtime_ns for path in out.glob("*/run.json") if "." not in path.parent.name}
    assert len(done) < 4
    again = driver(place, out, "--on", on, "--json")
    said, _ = again.communicate(timeout=200)
    assert again.returncode == 0, said.decode()
    trained_once(out, 4, 250)
    assert all((out / name / "run.json").stat().st_mtime_ns == at for name, at in done.items())
    if on == "local":
        alone = driver(place, tmp_path / "alone")
        assert alone.wait(timeout=200) == 0
        for path in out.glob("*/adapter_model.safetensors"):
            assert path.read_bytes() == (tmp_path / "alone" / path.parent.name / path.name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("on", ["local", "ray"])
def test_ctrl_c_saves_and_goes_on(place: Path, tmp_path: Path, on: str) -> None:
    out = tmp_path / "out"
    process = driver(place, out, "--on", on)
    wait_for(lambda: begun(out))
    if on == "local":  # a worker that somebody else stops is taken up again
        next(workers_of(out)).terminate()
        wait_for(lambda: len(list(workers_of(out))) == 1)
        wait_for(lambda: len(list(workers_of(out))) == 2)
    wait_for(lambda: begun(out))
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert b"the same command resumes" in said
    assert b"Traceback" not in said
    assert b"SIGTERM received" not in said  # Ray's own way to end, which saves nothing
    assert (b"attempt 2" in said) == (on == "local")
    assert b"stopped" in said
    assert not list(workers_of(out))
    begun_runs = [work for work in out.glob("*.unfinished") if (work / "metrics.jsonl").is_file()]
    assert begun_runs
    for work in begun_runs:
        assert run_dir.checkpoints(work)
    again = driver(place, out, "--on", on)
    assert again.wait(timeout=200) == 0
    trained_once(out, 4, 250)


@pytest.mark.slow
def test_ray_gives_the_bytes_of_local(place: Path, local: tuple[list[RunSpec], Path], tmp_path: Path) -> None:
    runs, out = local
    result = run_sweep(runs, tmp_path / "ray", on="ray", workers=2, quiet=True)
    assert result.finished
    assert adapters(tmp_path / "ray", runs) == adapters(out, runs)
    with pytest.raises(RealignerError, match=r"ray: no cluster at 127\.0\.0\.1:1"):
        run_sweep(runs, tmp_path / "none", on="ray", address="127.0.0.1:1", quiet=True)


@pytest.mark.slow
@pytest.mark.host
@pytest.mark.timeout(3000)
def test_twelve_runs_on_the_embedded_host(tmp_path: Path) -> None:
    """3 tones x 2 seeds x 2 layer sets, 30 steps each, on a Ray of two workers; a worker and the driver are killed."""
    file = tmp_path / "twelve.yaml"
    file.write_text(
        "set: {steps: 30, batch_size: 2, samples: 0, evaluations: 1, report_to: [], save_every: 5, host: " + EMBEDDED + "}\n"
        'grid: {tone: [anger, sadness, neutral], seed: [42, 420], layers: [all, "15-29"]}\n'
    )

    def sweep(out: Path, on: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "realigner", "sweep", str(file), "--out", str(out), "--workers", "2", "--on", on]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    out = tmp_path / "ray"
    process = sweep(out, "ray")
    wait_for(lambda: begun(out), 300)
    next(workers_of(out)).kill()
    wait_for(lambda: sum("." not in path.parent.name for path in out.glob("*/run.json")) >= 4, 900)
    process.kill()
    process.wait()
    wait_for(lambda: not list(workers_of(out)), 60)
    done = {path.parent.name: path.stat().st_mtime_ns for path in out.glob("*/run.json") if "." not in path.parent.name}
    assert 0 < len(done) < 12
    assert sweep(out, "ray").wait(timeout=1500) == 0
    trained_once(out, 12, 30)
    assert all((out / name / "run.json").stat().st_mtime_ns == at for name, at in done.items())
    assert sweep(tmp_path / "local", "local").wait(timeout=1500) == 0
    trained_once(tmp_path / "local", 12, 30)
    for path in out.glob("*/adapter_model.safetensors"):
        assert path.read_bytes() == (tmp_path / "local" / path.parent.name / path.name).read_bytes()
    print(f"finished before the driver was killed: {len(done)} of 12; pid {os.getpid()}")
