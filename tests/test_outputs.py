"""Outputs: nothing of a user's is lost, nothing is replaced unasked, nothing is left behind."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from safetensors import SafetensorError

import realigner as ra
import realigner.files as files
from realigner.cli import main
from realigner.data.importing import to_hf
from realigner.data.style_classifier import StyleClassifier
from realigner.errors import RealignerError
from realigner.files import Artifact, is_ours, locked, taken
from realigner.traces import RunLabel, TraceWriter, load_trace, store
from realigner.traces.layout import with_layers
from realigner.traces.store import TRACE, texts_of
from realigner.training import make_recipe, read_run, run_dir, train
from realigner.training.checkpoint_io import save_tree
from tests.planted import planted_explanation, planted_trace
from tests.processes import in_a_child
from tests.tiny import some_rows, tiny_folder, tiny_pair

QUICK = make_recipe(steps=2, batch_size=4, evaluations=1, samples=0)
LONGER = QUICK.changed(steps=12, save_every=3, report_to=[])
SHORT_SWEEP = {"set": {"steps": 1, "batch_size": 4, "evaluations": 1, "samples": 0}, "grid": {"tone": ["anger"], "seed": [1]}}


def squad_file(path: Path) -> Path:
    questions = [
        {"id": str(n), "question": f"What is {n}?", "answers": [{"text": str(n), "answer_start": 0}]} for n in range(8)
    ]
    article = {"title": "Numbers", "paragraphs": [{"context": "0 1 2 3 4 5 6 7", "qas": questions}]}
    path.write_text(json.dumps({"version": "1.1", "data": [article]}))
    return path


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what commands read (a host, rows), and one of each thing that they write."""
    own = tmp_path_factory.mktemp("own")
    host, tokenizer = ra.load_host(str(tiny_folder(own / "host")), dtype="float32")
    rows = some_rows()
    (own / "rows.jsonl").write_text("".join(row.model_dump_json() + "\n" for row in rows))
    mixed = [*rows, *(row.model_copy(update={"id": f"j{row.id}", "tone": "joy", "text": "Lovely, it is so!"}) for row in rows)]
    (own / "two.jsonl").write_text("".join(row.model_dump_json() + "\n" for row in mixed))
    squad_file(own / "squad.json")
    (own / "sweep.yaml").write_text(json.dumps(SHORT_SWEEP | {"data": {"anger": str(own / "rows.jsonl")}}))
    recipe = QUICK.changed(host=str(own / "host"), data=str(own / "rows.jsonl"))
    train(host, tokenizer, rows, own / "run", recipe, quiet=True).model.unload()
    trace = planted_trace()
    ra.save_trace(trace, own / "trace")
    ra.build_report([own / "trace"], own / "report.html")
    (own / "figures").mkdir()
    (own / "figures" / "sparsity.png").write_bytes(b"\x89PNG as it was drawn")
    digest = hashlib.sha256((own / "figures" / "sparsity.png").read_bytes()).hexdigest()
    (own / "figures" / "figures.json").write_text(json.dumps({"figures": {"sparsity.png": digest}}))
    to_hf(rows, own / "dataset", validation=0.3, test=0.3)
    StyleClassifier.fit(mixed).save(own / "scorer.skops")
    return own


# --- what is ours ---------------------------------------------------------------------------------------------------------


def ours() -> dict[str, Artifact]:
    from realigner.data.dataset_rows import ROWS
    from realigner.data.importing import DATASET
    from realigner.data.style_classifier import SCORER
    from realigner.report.html_report import REPORT
    from realigner.report.paper_figures import FIGURES
    from realigner.traces.store import TRACE

    return {
        "run": run_dir.RUN, "trace": TRACE, "report.html": REPORT, "figures": FIGURES, "dataset": DATASET,
        "scorer.skops": SCORER, "rows.jsonl": ROWS,
    }  # fmt: skip


@pytest.mark.parametrize("name", ["run", "trace", "report.html", "figures", "dataset", "scorer.skops", "rows.jsonl"])
def test_what_is_ours_is_told_by_every_entry_and_its_record(own: Path, tmp_path: Path, name: str) -> None:
    """Ours as it was made; not with anything of another's at any depth, nor as another kind, nor by a link."""
    artifact, copy = ours()[name], tmp_path / name
    assert is_ours(own / name, artifact)
    assert [other for other in ours() if is_ours(own / name, ours()[other])] == [name]
    copy.symlink_to(own / name)
    assert not is_ours(copy, artifact)
    copy.unlink()
    if not (own / name).is_dir():
        copy.write_bytes((own / name).read_bytes() + b"\nand my notes\n")
        assert not is_ours(copy, artifact)
        return
    shutil.copytree(own / name, copy)
    for folder in [copy, *(path for path in copy.rglob("*") if path.is_dir())]:
        mine, puts = folder / "mine", (Path.touch, Path.mkdir, lambda path: path.symlink_to(own))
        for put in puts:
            put(mine)
            assert not is_ours(copy, artifact), folder
            mine.rmdir() if mine.is_dir() and not mine.is_symlink() else mine.unlink()
    assert is_ours(copy, artifact)


# --- foreign and mixed places ---------------------------------------------------------------------------------------------


def texts(at: Path, **contents: str) -> None:
    """A folder of text files; ``__`` in a name is a slash, ``_dot_`` a dot."""
    for name, content in contents.items():
        path = at / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


def copied(name: str, **contents: str) -> Callable[[Path, Path], None]:
    """One of ours with something of a user's in it."""

    def make(at: Path, own: Path) -> None:
        shutil.copytree(own / name, at)
        texts(at, **contents)

    return make


def appended(name: str, more: str) -> Callable[[Path, Path], None]:
    def make(at: Path, own: Path) -> None:
        at.write_bytes((own / name).read_bytes() + more.encode())

    return make


def a_file(content: str) -> Callable[[Path, Path], None]:
    return lambda at, own: texts(at.parent, **{at.name: content})


def a_folder(**contents: str) -> Callable[[Path, Path], None]:
    return lambda at, own: texts(at, **contents)


def some_bytes(at: Path, own: Path) -> None:
    at.write_bytes(b"\xff\xfe\x00\x01" * 100)


def a_link(at: Path, own: Path) -> None:
    texts(at.with_name(f"{at.name}-home"), thesis_dot_txt="precious")
    at.symlink_to(at.with_name(f"{at.name}-home"))


def a_pipeline(at: Path, own: Path) -> None:
    import skops.io
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    skops.io.dump(make_pipeline(StandardScaler(), LogisticRegression()).fit([[0.0], [1.0]], [0, 1]), at)


ZARR = json.dumps({"zarr_format": 3, "node_type": "group", "attributes": {"about": "made without realigner.record"}})
SIGNED = '<html><head><title>x</title></head><body><!-- <meta name="generator" content="realigner"> --> mine</body></html>'
SIGNED_IN_BODY = '<html><body><meta name="generator" content="realigner data check">mine</body></html>'
MARKED = "# My notes\n\nIt says <!-- Generated by `make census`; do not edit. -->\n"
PLACES: dict[str, Callable[[Path, Path], None]] = {
    "a thesis": a_folder(thesis_dot_txt="precious"),
    "an empty subfolder": lambda at, own: (at / "later").mkdir(parents=True),
    "a cook's recipe": a_folder(recipe_dot_yaml="title: soup\n", README_dot_md="# Soup"),
    "a runner's run": a_folder(recipe_dot_yaml="", run_dot_json='{"seed": 1, "km": 42}'),
    "a run without a record": a_folder(adapter_config_dot_json='{"peft_type": "LORA"}', adapter_model_dot_safetensors="x"),
    "a zarr that names us": a_folder(zarr_dot_json=ZARR, temperature__zarr_dot_json="{}"),
    "a zarr of others": a_folder(zarr_dot_json='{"zarr_format": 3, "node_type": "group"}', delta__c__0="1"),
    "a git repository": a_folder(_dot_git__config="[core]", src__main_dot_py="1"),
    "pictures": a_folder(**{"figure2-signed_dot_png": "x", "holiday_dot_jpg": "x"}),
    "an explanation of others": a_folder(explain_dot_json='{"why": "because"}', notes_dot_txt="mine"),
    "an empty list of runs": a_folder(sweep_dot_json='{"runs": {}}', notes_dot_txt="mine"),
    "a list of runs of others": a_folder(sweep_dot_json='{"runs": {"monday": {"km": 3}}, "by": "me"}'),
    "a DatasetDict of others": a_folder(
        dataset_dict_dot_json='{"splits": ["train"]}',
        train__dataset_info_dot_json='{"features": {"prompt": {}}}',
        train__state_dot_json="{}",
    ),
    "a link to a folder": a_link,
    "a link to nothing": lambda at, own: at.symlink_to(at.with_name("nowhere")),
    "a pipe": lambda at, own: os.mkfifo(at),
    "a text": a_file("precious"),
    "a page that quotes us": a_file(SIGNED),
    "a page that says so in its body": a_file(SIGNED_IN_BODY),
    "notes on the census": a_file(MARKED),
    "lines of JSON": a_file('{"prompt": "a", "reply": "b"}\n'),
    "a pipeline of others": a_pipeline,
    "bytes": some_bytes,
    "rows and a diary": appended("rows.jsonl", "Dear diary\n"),
    "a report and notes": appended("report.html", "<p>my notes</p>"),
    "a scorer and notes": appended("scorer.skops", "my notes"),
    "a run with notes": copied("run", notes_dot_txt="mine"),
    "a run with notes in tensorboard": copied("run", tensorboard__notes_dot_txt="mine"),
    "a run with notes in a checkpoint": copied("run", **{"checkpoint-2__notes_dot_txt": "mine"}),
    "a trace with notes": copied("trace", notes_dot_txt="mine"),
    "a trace with notes among its chunks": copied("trace", delta__c__0__notes_dot_txt="mine"),
    "figures, one of them touched up": copied("figures", sparsity_dot_png="by hand"),
    "a dataset with notes": copied("dataset", train__notes_dot_txt="mine"),
}


def command(name: str, own: Path, out: Path) -> list[str]:
    """A command line that writes to `out`. One thread: OpenMP's do not outlive a fork."""
    local = ["--host", str(own / "host"), "--dtype", "float32"]
    steps = ["--steps", "2", "--batch-size", "4", "--set", "samples=0", "--set", "evaluations=1"]
    rows = str(own / "rows.jsonl")
    lines: dict[str, list[str]] = {
        "demo": ["demo", "--steps", "2"],
        "train": ["train", *local, "--data", rows, *steps],
        "sweep": [
            "sweep",
            str(own / "sweep.yaml"),
            "--on",
            "here",
            "--set",
            f"host={own / 'host'}",
            "--set",
            "dtype=float32",
            "--set",
            "threads=1",
        ],
        "trace": ["trace", "--irm", str(own / "run"), *local, "--max-new-tokens", "2", "Why?"],
        "explain": ["explain", "--irm", str(own / "run"), *local, "--quick", "--no-trials"],
        "report": ["report", str(own / "trace")],
        "figures": ["figures", str(own / "trace")],
        "hosts": ["hosts", "--type", "llama"],
        "build": ["data", "build", "--squad", str(own / "squad.json"), "--tone", "anger"],
        "import": ["data", "import", rows, "--no-gate"],
        "to-hf": ["data", "import", rows, "--no-gate", "--validation", "0.3", "--test", "0.3"],
        "check": ["data", "check", rows, "--host", str(own / "host")],
        "condition": ["data", "condition", "authored", "--when", "anger:group=space"],
        "scorer": ["data", "scorer", str(own / "two.jsonl")],
    }
    return [*lines[name], {"to-hf": "--to-hf", "check": "--html"}.get(name, "--out"), str(out)]


COMMANDS = (
    "demo",
    "train",
    "sweep",
    "trace",
    "explain",
    "report",
    "figures",
    "hosts",
    "build",
    "import",
    "to-hf",
    "condition",
    "check",
    "scorer",
)
RESUMES = ("sweep", "demo")  # the same command again uses what is there


@pytest.fixture(scope="module")
def places(own: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tree; also each place as OUT.unfinished."""
    tree = tmp_path_factory.mktemp("places")
    for name, make in PLACES.items():
        make(tree / name, own)
        make(tree / f"free {name}.unfinished", own)
    return tree


def snapshot(path: Path) -> dict[str, str]:
    """Everything at, in and beside a path (what begins with its name), by content."""
    found = {}
    for start in sorted(path.parent.glob(f"*{path.name}*")):
        for entry in [start, *sorted(start.rglob("*"))] if start.is_dir() and not start.is_symlink() else [start]:
            name = str(entry.relative_to(path.parent))
            if entry.is_symlink():
                found[name] = f"link {entry.readlink()}"
            elif entry.is_file():
                found[name] = hashlib.sha256(entry.read_bytes()).hexdigest()
            else:
                found[name] = "folder" if entry.is_dir() else "special"
    return found


def last_line(error: str) -> str:
    """What a command that failed said last, and that it is the only line about that."""
    assert "unexpected" not in error
    assert "Traceback" not in error
    assert error.count("realigner: ") <= 1, error
    return error.splitlines()[-1]


class _Stopped:
    """In place of a host's loading: what comes after is another test's."""

    def __init__(self, *_: object, **__: object) -> None:
        raise RealignerError("stopped before the host is loaded")


@pytest.fixture(scope="module", autouse=True)
def _built_once() -> Iterator[None]:
    """typer builds its commands anew for each call, which takes longer than to refuse one."""
    import realigner.cli as cli

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "app", typer.main.get_command(cli.app))
        yield


def said(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> tuple[int, str]:
    code = main(arguments)
    return code, capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_no_command_loses_what_is_not_ours(
    own: Path, places: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """33 foreign and mixed places as OUT, with and without --force: nothing is gone or changed, nothing is added, one line."""
    monkeypatch.setattr("realigner.runtime.load_host_of", _Stopped)
    monkeypatch.setattr("realigner.demo.load_host", _Stopped)
    for place in PLACES:
        before = snapshot(places / place)
        for options in ([], ["--force"])[: 1 if name == "sweep" else 2]:
            code, error = said(capsys, [*command(name, own, places / place), *options])
            assert code == 1, (place, options, error)
            assert last_line(error).startswith("realigner: "), (place, options, error)
            assert snapshot(places / place) == before, (place, options)


@pytest.mark.parametrize("options", [[], ["--force"], ["--resume"]], ids=["plain", "force", "resume"])
@pytest.mark.parametrize("name", ["train", "trace"])
def test_nor_from_the_unfinished_one(
    own: Path, places: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str, options: list[str]
) -> None:
    if name == "trace" and options == ["--resume"]:
        return
    monkeypatch.setattr("realigner.runtime.load_host_of", _Stopped)
    monkeypatch.setattr("realigner.training.training_run.load_host", _Stopped)
    for place in PLACES:
        out = places / f"free {place}"
        before = snapshot(out)
        code, error = said(capsys, [*command(name, own, out), *options])
        assert code == 1, (place, error)
        assert last_line(error).startswith("realigner: "), (place, error)
        assert snapshot(out) == before, place


@pytest.mark.parametrize("out", [".", "..", "/", "here/.."])
@pytest.mark.parametrize("name", COMMANDS)
def test_a_place_without_a_name_is_refused_in_one_line(
    own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str, out: str
) -> None:
    monkeypatch.setattr("realigner.runtime.load_host_of", _Stopped)
    monkeypatch.setattr("realigner.demo.load_host", _Stopped)
    (tmp_path / "empty" / "here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "empty" / "here" if out == "." else tmp_path / "empty")
    if name == "sweep" and out == ".":
        return  # an empty folder is as good a place for a sweep as any
    for options in ([], ["--force"])[: 1 if name == "sweep" else 2]:
        line = command(name, own, tmp_path)
        code, error = said(capsys, [*line[:-1], out, *options])
        assert code == 1, error
        assert last_line(error).startswith("realigner: ")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["empty", "here"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", ["demo", "explain", "sweep"])
def test_what_works_beside_foreign_files_spares_them(
    own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """These write into a folder that may hold other things; the whole work, not cut short."""
    monkeypatch.setattr("realigner.demo.load_host", lambda *_: tiny_pair())
    monkeypatch.setattr("realigner.demo.authored", lambda tone: some_rows())
    monkeypatch.setattr("realigner.demo._say_replies", lambda *_: None)  # the ready-made IRM is the embedded host's
    for place, make in list(PLACES.items())[:: 4 if name == "demo" else 1]:  # a demo takes seconds
        make(tmp_path / place, own)
        before = snapshot(tmp_path / place)
        for options in ([], ["--force"])[: 1 if name == "sweep" else 2]:
            code, error = said(capsys, [*command(name, own, tmp_path / place), *options])
            assert "unexpected" not in error, (place, error)
            after = snapshot(tmp_path / place)
            assert code == 0 or error.splitlines()[-1].startswith("realigner: "), (place, error)
            assert before.items() <= after.items(), place
            assert not [entry for entry in after if entry.endswith((".lock", ".aside"))], place


def test_what_lies_beside_a_dataset_is_asked_for_too(own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A user's ``.rejected.jsonl`` and ``.build.json``, and rows that appear while a build of others goes on."""
    for name, ending in (("build", ".rejected.jsonl"), ("build", ".build.json"), ("import", ".rejected.jsonl")):
        beside = tmp_path / f"rows{ending}"
        beside.write_text("precious")
        for options in ([], ["--force"]):
            code, error = said(capsys, [*command(name, own, tmp_path / "rows.jsonl"), *options])
            assert code == 1
            assert f"{beside}: " in error
        assert beside.read_text() == "precious"
        beside.unlink()
        assert list(tmp_path.iterdir()) == []


# --- lines 8 to 12 --------------------------------------------------------------------------------------------------------


def begun_trace(path: Path) -> None:
    trace = planted_trace()
    with contextlib.suppress(KeyboardInterrupt), TraceWriter(path, "planted", range(6)) as writer:
        writer.append((with_layers(texts_of(trace)[0], range(6)), RunLabel("anger-42", "anger", 42)))
        raise KeyboardInterrupt


def test_an_unfinished_trace_is_kept_unless_forced(
    own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun_trace(tmp_path / "t.zarr")
    before = snapshot(tmp_path / "t.zarr")
    assert "t.zarr.unfinished/zarr.json" in before
    with pytest.raises(RealignerError, match=r"unfinished trace is there, which opens like any other; .* \(force\)"):
        ra.save_trace(planted_trace(), tmp_path / "t.zarr")
    with monkeypatch.context() as patch:
        patch.setattr("realigner.runtime.load_host_of", _Stopped)
        code, error = said(capsys, command("trace", own, tmp_path / "t.zarr"))
        assert code == 1
        assert "t.zarr.unfinished: an unfinished trace is there" in error
    assert snapshot(tmp_path / "t.zarr") == before
    assert load_trace(tmp_path / "t.zarr.unfinished").sizes["text"] == 1
    ra.save_trace(planted_trace(), tmp_path / "t.zarr", force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["t.zarr"]


def test_an_explanation_is_not_replaced_unasked(own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    why = tmp_path / "why"
    texts(why, explain_dot_json=json.dumps(planted_explanation()), notes_dot_txt="mine")
    before = snapshot(why)
    code, error = said(capsys, command("explain", own, why))
    assert code == 1
    assert "why/explain.json: exists already" in error
    assert snapshot(why) == before
    assert main([*command("explain", own, why), "--force"]) == 0
    after = snapshot(why)
    assert after.keys() == before.keys()
    assert {key for key in after if after[key] != before[key]} == {"why/explain.json"}


def test_a_finished_run_is_not_replaced_by_one_that_was_loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A finishes while B loads its host: B is refused at once; and where A holds no lock, before B's rename."""
    host, tokenizer = tiny_pair()

    def a_run(out: Path, seed: int) -> Any:
        return train(host, tokenizer, some_rows(), out, QUICK, quiet=True, seed=seed)

    a_run(tmp_path / "elsewhere", 1).model.unload()
    kept = snapshot(tmp_path / "elsewhere")
    original = run_dir.read_metrics

    def arrives(folder: Path) -> Any:  # by a copy, a download, another machine: whoever takes no lock
        if not (tmp_path / "run").exists():
            shutil.copytree(tmp_path / "elsewhere", tmp_path / "run")
        return original(folder)

    with monkeypatch.context() as patch:
        patch.setattr(run_dir, "read_metrics", arrives)
        with pytest.raises(
            RealignerError, match=r"run: exists already.*the run is whole in .*run\.unfinished: resume it"
        ) as caught:
            a_run(tmp_path / "run", 2)
    assert "\n" not in str(caught.value)
    assert read_run(tmp_path / "run")["seed"] == 1
    assert {name.replace("elsewhere", "run"): value for name, value in kept.items()}.items() <= snapshot(
        tmp_path / "run"
    ).items()
    shutil.rmtree(tmp_path / "run")
    run = train(host, tokenizer, some_rows(), tmp_path / "run", QUICK, quiet=True, seed=2, resume=True)
    assert run.record["seed"] == 2


@pytest.mark.parametrize(
    "where",
    ["save_tree", pytest.param("save_pretrained", marks=pytest.mark.slow), pytest.param("add_scalar", marks=pytest.mark.slow)],
)
def test_a_full_disk_in_whichever_librarys_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """safetensors' error is no OSError, nor need any other library's be: one line, and what there is to go on from."""
    full = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    host, tokenizer = tiny_pair()
    work = run_dir.unfinished(tmp_path / "run")

    def later(original: Any, error: Exception) -> Any:
        def write(*arguments: Any, **options: Any) -> Any:
            if list(work.glob("checkpoint-6")):
                raise error
            return original(*arguments, **options)

        return write

    with monkeypatch.context() as patch:
        if where == "save_tree":
            patch.setattr("realigner.training.trainer.save_tree", later(save_tree, full))
        elif where == "save_pretrained":
            from peft import PeftModel

            patch.setattr(PeftModel, "save_pretrained", later(PeftModel.save_pretrained, full))
        else:
            from torch.utils.tensorboard import SummaryWriter

            patch.setattr(SummaryWriter, "add_scalar", later(SummaryWriter.add_scalar, OSError(28, "No space left on device")))
        recipe = LONGER.changed(report_to=["tensorboard"] if where == "add_scalar" else [])
        with pytest.raises(RealignerError) as caught:
            train(host, tokenizer, some_rows(), tmp_path / "run", recipe, quiet=True)
    message = str(caught.value)
    assert "\n" not in message
    assert "cannot be written (No space left on device)" in message
    assert "the last good checkpoint is checkpoint-6, to resume from when there is room (resume)" in message
    assert not [path.name for path in tmp_path.rglob("*") if path.name.startswith(".")]
    assert not any(module._forward_hooks for module in host.modules())
    train(host, tokenizer, some_rows(), tmp_path / "run", recipe, quiet=True, resume=True)


def test_a_full_disk_before_the_first_checkpoint_leaves_nothing(tmp_path: Path) -> None:
    """Real, by a limit on the size of files; with no step to train, and with one."""

    def work() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        lines = []
        for steps in (0, 2):
            host, tokenizer = tiny_pair()
            resource.setrlimit(resource.RLIMIT_FSIZE, (7_000, resource.RLIM_INFINITY))
            try:
                train(host, tokenizer, some_rows(), tmp_path / "out" / "run", QUICK, quiet=True, steps=steps, report_to=[])
            except Exception as error:
                lines.append(f"{type(error).__name__}: {error}")
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        (tmp_path / "lines").write_text("\n".join(lines))

    os.waitpid(in_a_child(work), 0)
    lines = (tmp_path / "lines").read_text().splitlines()
    assert len(lines) == 2
    for line in lines:
        assert line.startswith("RealignerError: ")
        assert "cannot be written (File too large); nothing was saved" in line
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped after checkpoint-6."""
    out = tmp_path_factory.mktemp("stopped")
    host, tokenizer = tiny_pair()
    from realigner.training.callbacks import Log

    original = Log.on_log

    def crash(self: Any, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
        original(self, args, state, *rest, **kwargs)
        if state.global_step == 8:
            raise RealignerError("stopped")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Log, "on_log", crash)
        with pytest.raises(RealignerError, match="stopped"):
            train(host, tokenizer, some_rows(), out / "run", LONGER, quiet=True)
    return out


def changed_state(**values: Any) -> Callable[[Path], None]:
    def change(work: Path) -> None:
        file = work / "checkpoint-6" / run_dir.STATE_FILE
        file.write_text(json.dumps(json.loads(file.read_text()) | values, indent=2, sort_keys=True) + "\n")

    return change


def renamed(work: Path) -> None:
    (work / "checkpoint-6").rename(work / "checkpoint-9")


def flipped(name: str) -> Callable[[Path], None]:
    def flip(work: Path) -> None:
        file = work / "checkpoint-6" / name
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)

    return flip


def unlogged(work: Path) -> None:
    lines = (work / run_dir.METRICS_FILE).read_text().splitlines()
    (work / run_dir.METRICS_FILE).write_text("".join(f"{line}\n" for line in lines if json.loads(line)["step"] < 5))


@pytest.mark.parametrize(
    ("tamper", "named"),
    [
        (changed_state(global_step=4), "trainer_state.json"),
        (changed_state(global_step=60), "trainer_state.json"),
        (changed_state(max_steps=6), "trainer_state.json"),
        (changed_state(best_global_step=3), "trainer_state.json"),
        (changed_state(epoch=0.0), "trainer_state.json"),
        (renamed, "checkpoint-9"),
        (flipped("adapter_model.safetensors"), "adapter_model.safetensors"),
        (flipped("optimizer.safetensors"), "optimizer.safetensors"),
        (flipped("random-0.safetensors"), "random-0.safetensors"),
        (lambda work: (work / "checkpoint-6" / "random-0.safetensors").unlink(), "random-0.safetensors: is missing"),
        (lambda work: (work / "checkpoint-6" / run_dir.SUMS_FILE).unlink(), run_dir.SUMS_FILE),
        (lambda work: (work / "checkpoint-6" / run_dir.SUMS_FILE).write_text("{}"), "trainer_state.json is not in it"),
        (unlogged, "metrics.jsonl: has no step 6"),
    ],
)
def test_a_checkpoint_that_was_changed_is_not_resumed(
    stopped: Path, tmp_path: Path, tamper: Callable[[Path], object], named: str
) -> None:
    shutil.copytree(stopped / "run.unfinished", tmp_path / "run.unfinished")
    tamper(tmp_path / "run.unfinished")
    host, tokenizer = tiny_pair()
    with pytest.raises(RealignerError) as caught:
        train(host, tokenizer, some_rows(), tmp_path / "run", LONGER, quiet=True, resume=True)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.unfinished"]


@pytest.mark.slow
def test_a_users_file_in_a_checkpoint_outlives_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Old checkpoints are deleted while a run goes on, but not with somebody's notes in one."""

    def noting(path: Path, tree: Any) -> None:
        save_tree(path, tree)
        first = run_dir.checkpoint_folder(run_dir.unfinished(tmp_path / "run"), 3)
        if first.is_dir():
            (first / "notes.txt").write_text("mine")

    monkeypatch.setattr("realigner.training.trainer.save_tree", noting)
    host, tokenizer = tiny_pair()
    train(host, tokenizer, some_rows(), tmp_path / "run", LONGER, quiet=True)
    assert (tmp_path / "run" / "checkpoint-3" / "notes.txt").read_text() == "mine"
    assert not (tmp_path / "run" / "checkpoint-6").exists()


# --- the lock -------------------------------------------------------------------------------------------------------------


def test_the_lock_holds_against_many(tmp_path: Path) -> None:
    """Four processes take and leave a place as fast as they can, each lock file removed while held: never two at once."""
    place, inside = tmp_path / "place", tmp_path / "inside"

    def work(until: float = time.monotonic() + 2.0) -> None:
        had = 0
        while time.monotonic() < until:
            with contextlib.suppress(RealignerError), locked(place):
                os.close(os.open(inside, os.O_CREAT | os.O_EXCL))  # fails where another is inside
                had += 1
                inside.unlink()
        (tmp_path / f"had-{os.getpid()}").write_text(str(had))

    for pid in [in_a_child(work) for _ in range(4)]:
        assert os.waitpid(pid, 0)[1] == 0
    counts = [int(path.read_text()) for path in tmp_path.glob("had-*")]
    assert len(counts) == 4
    assert sum(counts) > 200
    assert not [path.name for path in tmp_path.iterdir() if not path.name.startswith("had-")]


def test_a_lock_is_had_once_and_a_users_file_of_its_name_stays(tmp_path: Path) -> None:
    artifact = Artifact("a text", lambda path: None)

    def take() -> None:
        with taken(tmp_path / "x", artifact):
            pass

    with taken(tmp_path / "x", artifact), pytest.raises(RealignerError, match="another process is writing there"):
        take()  # not even the thread that has it has it twice
    with files.claimed(taken(tmp_path / "x", artifact)):  # but where it is claimed for what follows, one at a time
        with taken(tmp_path / "x", artifact), pytest.raises(RealignerError, match="another process"):
            take()
        with taken(tmp_path / "x", artifact) as place:
            place.write("text")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    (tmp_path / ".x.lock").write_text("the key to my house")
    with taken(tmp_path / "x", artifact, force=True) as place:
        place.write("more")
    assert (tmp_path / ".x.lock").read_text() == "the key to my house"
    (tmp_path / "x").unlink()
    with taken(tmp_path / "x", artifact) as place:
        (tmp_path / "x").write_text("somebody else's")
        with pytest.raises(RealignerError, match=r"exists (by now|already)"):
            place.write("text")
    assert (tmp_path / "x").read_text() == "somebody else's"


# --- two at once ----------------------------------------------------------------------------------------------------------


class Child:
    """A command in a process of its own that waits at a gate: before it has the lock, or before its output gets its name."""

    def __init__(self, arguments: list[str], folder: Path, gate: str = "") -> None:
        self.told = folder / f"{len(list(folder.iterdir()))}-told"
        self.told.touch()
        self.at, self.go = self.told.with_suffix(".at"), self.told.with_suffix(".go")
        self.pid = in_a_child(lambda: self._work(arguments, gate))

    def _work(self, arguments: list[str], gate: str) -> None:
        waited = False

        def wait() -> None:
            nonlocal waited
            if not waited:
                waited = True
                self.at.touch()
                while not self.go.exists():
                    time.sleep(0.01)

        lock_file, put = files._lock_file, files.Output.put
        if gate == "lock":
            files._lock_file = lambda *given: (wait(), lock_file(*given))[1]  # type: ignore[func-returns-value]
        elif gate == "put":
            files.Output.put = lambda self, made: (wait(), put(self, made))[1]  # type: ignore[method-assign, func-returns-value]
        error = io.StringIO()
        with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
            code = main(arguments)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        self.told.write_text(json.dumps([code, error.getvalue()]))

    def until_at_the_gate(self) -> None:
        deadline = time.monotonic() + 120
        while not self.at.exists():
            assert time.monotonic() < deadline
            assert os.waitpid(self.pid, os.WNOHANG) == (0, 0), self.told.read_text()
            time.sleep(0.01)

    def result(self) -> tuple[int, str]:
        self.go.touch()
        os.waitpid(self.pid, 0)
        code, error = json.loads(self.told.read_text() or '[-1, "died"]')
        return code, error


@pytest.fixture
def small_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("realigner.demo.load_host", lambda *_: tiny_pair())
    monkeypatch.setattr("realigner.demo.authored", lambda tone: some_rows())
    monkeypatch.setattr("realigner.traces.collect.PAPER_PROMPTS", ["Why?"])


def two_at_once(own: Path, tmp_path: Path, name: str, order: str) -> None:
    told, out = tmp_path / "told", tmp_path / "at" / "out"
    told.mkdir()
    (tmp_path / "at").mkdir()
    line = command(name, own, out)
    if order == "B begins while A works":
        first = Child(line, told, "put")
        first.until_at_the_gate()
        for more in ([], ["--force"])[: 1 if name == "sweep" else 2]:
            code, error = Child([*line, *more], told).result()
            assert code == 1, error
            assert "another process" in last_line(error) or "unfinished" in last_line(error), error
        code, error = first.result()
        assert code == 0, error
    elif order == "A finishes while B begins":
        second = Child(line, told, "lock")
        second.until_at_the_gate()
        assert Child(line, told).result()[0] == 0
        made = snapshot(out)
        code, error = second.result()
        assert code == (0 if name in RESUMES else 1), error
        assert name in RESUMES or "exists already" in last_line(error), error
        kept = {key: value for key, value in made.items() if not key.endswith(("sweep.json", ".yaml"))}
        assert kept.items() <= snapshot(out).items()
        return
    else:  # at the same instant
        pair = [Child(line, told, "lock") for _ in range(2)]
        for child in pair:
            child.until_at_the_gate()
        for child in pair:
            child.go.touch()
        results = [child.result() for child in pair]
        won = [error for code, error in results if code == 0]
        lost = [last_line(error) for code, error in results if code]
        assert won, results
        if name not in RESUMES:
            assert len(lost) == 1, results
        assert all("another process" in line or "exists already" in line for line in lost), results
    left = [path.name for path in (tmp_path / "at").rglob("*") if path.name.endswith((".lock", ".aside", ".unfinished"))]
    assert left == []


ORDERS = ("B begins while A works", "A finishes while B begins", "at the same instant")


@pytest.mark.parametrize("hold", ["taken", "run", "trace"])
def test_a_folder_that_a_killed_process_was_filling_is_deleted_unless_a_users_file_is_in_it(
    own: Path, tmp_path: Path, hold: str
) -> None:
    kind, name = {"taken": (TRACE, "out"), "run": (run_dir.RUN, "out.unfinished"), "trace": (TRACE, "out.unfinished")}[hold]
    whole = own / ("run" if hold == "run" else "trace")
    left, users, other = (tmp_path / f".{name}-{end}.aside" for end in ("a1b2c3d4", "e5f6a7b8", "long-a1b2c3d4"))
    for folder in (left, users, other):
        shutil.copytree(whole, folder)
        record = folder / ("run.json" if hold == "run" else "zarr.json")
        record.write_text(record.read_text()[:20])
    (users / "notes.txt").write_text("mine")
    places: dict[str, Callable[[], Any]] = {
        "taken": lambda: taken(tmp_path / "out", kind),
        "run": lambda: run_dir.held(tmp_path / "out"),
        "trace": lambda: store.held(tmp_path / "out"),
    }
    with places[hold]():
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([users.name, other.name])


@pytest.mark.parametrize(("name", "order"), [("import", order) for order in ORDERS] + [("train", ORDERS[0])])
def test_two_at_once(own: Path, tmp_path: Path, name: str, order: str) -> None:
    two_at_once(own, tmp_path, name, order)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "import"])
def test_two_of_every_command_at_once(own: Path, tmp_path: Path, small_demo: None, name: str, order: str) -> None:
    two_at_once(own, tmp_path, name, order)


def ended(own: Path, tmp_path: Path, name: str, number: signal.Signals) -> None:
    """A signal just before the output gets its name."""
    told = tmp_path / "told"
    told.mkdir()
    child = Child(command(name, own, tmp_path / "at" / "out"), told, "put")
    child.until_at_the_gate()
    os.kill(child.pid, number)
    code, error = child.result()
    if name == "sweep":  # its only run was whole
        assert code == 0, error
    else:
        assert code == 1, error
        assert "interrupted" in last_line(error)
    left = [path for path in (tmp_path / "at").rglob("*") if path.is_file() or path.name.endswith(".aside")]
    if name in ("train", "sweep", "demo"):  # a training keeps what is to be resumed
        left = [path for path in left if path.name.endswith((".lock", ".aside"))]
    elif name == "trace":
        left = [path for path in left if "out.unfinished" not in path.parts]
    elif name == "build":
        left = [path for path in left if path.name != "out.journal"]
    assert left == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_nothing(own: Path, tmp_path: Path, number: signal.Signals) -> None:
    ended(own, tmp_path, "import", number)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "import"])
def test_a_signal_to_any_command_leaves_nothing(
    own: Path, tmp_path: Path, small_demo: None, name: str, number: signal.Signals
) -> None:
    ended(own, tmp_path, name, number)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", COMMANDS)
def test_any_command_on_a_full_disk_says_so_and_leaves_nothing(own: Path, tmp_path: Path, small_demo: None, name: str) -> None:
    """Real: no file may grow beyond 10 bytes."""
    told = tmp_path / "told"
    told.mkdir()

    def limited(arguments: list[str]) -> list[str]:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, resource.RLIM_INFINITY))
        return arguments

    line = command(name, own, tmp_path / "at" / "out")
    child = Child.__new__(Child)
    child.told = told / "told"
    child.told.touch()
    child.at, child.go = told / "at", told / "go"
    child.pid = in_a_child(lambda: child._work(limited(line), ""))
    code, error = child.result()
    assert code == 1, error
    assert "File too large" in error, error
    last_line(error)
    left = [path for path in (tmp_path / "at").rglob("*") if path.is_file()]
    left = [path for path in left if name != "sweep" or path.suffix not in (".json", ".yaml", ".log", ".error")]
    assert left == [] or name == "build", left
