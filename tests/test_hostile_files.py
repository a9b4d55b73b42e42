"""Files that were made to do harm, or were broken: refused in one line, before they take memory, time, or the terminal."""

from __future__ import annotations

import ast
import base64
import html
import io
import itertools
import json
import os
import pickle
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar
from urllib.parse import quote

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
import torch
import yaml
import zarr
from hypothesis import given, settings, strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token
from numcodecs import Zstd  # type: ignore[import-untyped]
from peft import get_peft_model
from rich.console import Console

import realigner as ra
from realigner import console
from realigner.analysis import analyze
from realigner.census import CensusEntry, page
from realigner.cli import main
from realigner.cli.options import prompts_from
from realigner.data import Fact, load_tone, read_rows
from realigner.data.dataset_rows import Message
from realigner.data.importing import import_rows
from realigner.data.rewriters import RewriteRequest
from realigner.data.rewriters.endpoint_rewriter import EndpointRewriter
from realigner.data.style_classifier import masked
from realigner.errors import RealignerError, visible
from realigner.generation import answer
from realigner.irm_config import IRMConfig
from realigner.prompts import Answer
from realigner.report.page import render_page
from realigner.report.paper_figures import save_figures
from realigner.sweep.grid import RunSpec
from realigner.sweep.sweep_table import StateTable
from realigner.traces import RunLabel, load_trace, verify_trace
from realigner.traces.reference_folder import import_reference
from realigner.training import run_dir, train
from realigner.training.callbacks import Log
from realigner.training.model_card import card
from realigner.training.recipe import make_recipe, read_recipe
from tests.fake_endpoint import FakeEndpoint
from tests.tiny import some_rows, tiny_pair

# Traces.


@pytest.fixture(scope="module")
def whole_trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs, one of which adds to two of the three layers, three prompts; raw deltas."""
    host, tokenizer = tiny_pair()
    torch.manual_seed(4)
    model = get_peft_model(host, IRMConfig(output_std=0.3, layers=[0, 2])).eval()
    model.add_adapter("other", IRMConfig(output_std=0.3, layers=[0, 1, 2]))
    labels = {name: RunLabel(name, tone, 1) for name, tone in (("default", "anger"), ("other", "untrained"))}
    with ra.record(model, keep="raw", labels=labels, top=50) as trace:
        for name in labels:
            model.set_adapter(name)
            answer(model, tokenizer, ["Why?", "Who is it?"], max_new_tokens=12)
    path: Path = ra.save_trace(trace, tmp_path_factory.mktemp("traces") / "t.zarr")
    load_trace(path).load()
    return path


@pytest.fixture
def trace_folder(whole_trace: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole_trace, tmp_path / "t.zarr"))


def put(path: Path, name: str, place: Any, value: Any) -> None:
    """Change values of an array on disk."""
    zarr.open_array(path / name, mode="r+")[place] = value


def put_metadata(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    root = json.loads((path / "zarr.json").read_text())
    change(root)
    (path / "zarr.json").write_text(json.dumps(root))


BAD_VALUES: list[tuple[str, Any, Any]] = [
    ("top_neuron", (1, 3), -5),
    ("top_neuron", (1, 3), 10_000),
    ("top_layer", (0, 2), 99),
    ("top_position", (0, 0), 3000),
    ("top_position", (0, 0), -1),  # the mark of "none", where there is a value
    ("top_value", (0, 0), np.inf),
    ("energy", (4, 0), np.nan),
    ("energy", (4, 1), 0.5),  # a number where the run adds nothing
    ("energy", (4, 0), -1.0),
    ("l1", (4, 0), np.inf),
    ("small", (4, 0), 1e9),
    ("count", (0, 0), -1),
    ("count", (0, 0), 2**60),
    ("count", (0, 0), 1),
    ("position", 3, 77),
    ("position", 3, -1),
    ("token_id", 3, -2),
    ("is_generated", 0, True),
    ("prompt", 3, 9),
    ("seed", 3, 9),
    ("run", 3, "nobody"),
    ("tone", 3, "joy"),
    ("text_run", 1, "nobody"),
    ("text_tone", 1, "joy"),
    ("text_prompt", 1, -3),
    ("layer", 1, 0),
    ("layer", 0, -4),
    ("neuron", 3, 2),
    ("part", 0, "reply"),
]


@pytest.mark.parametrize(("name", "place", "value"), BAD_VALUES)
def test_a_value_out_of_range_is_refused_on_load(trace_folder: Path, name: str, place: Any, value: Any) -> None:
    put(trace_folder, name, place, value)
    with pytest.raises(
        RealignerError, match=rf"{name} is|is_generated does not fit count|position is [0-9]+ at token"
    ) as caught:
        load_trace(trace_folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "place", "value"),
    [
        ("sum", (1, 0, 0, 3), np.nan),
        ("sum_abs", (1, 0, 0, 3), -0.5),
        ("sum_sq", (1, 0, 2, 3), np.inf),
        ("max_abs", (0, 0, 1, 3), 1.0),
        ("delta", (5, 0, 3), np.nan),
        ("delta", (5, 2, 3), -np.inf),
        ("delta", (5, 1, 3), 0.0),
    ],
)
def test_a_large_array_is_checked_as_it_is_read(trace_folder: Path, name: str, place: Any, value: Any) -> None:
    put(trace_folder, name, place, value)
    trace = load_trace(trace_folder)
    where = ", ".join(f"{dim} {at}" for dim, at in zip(trace[name].dims, place, strict=True))
    part: Any = trace[name][place[0] :][..., [0, place[-1]]]
    with pytest.raises(RealignerError, match=f"{name} is .* at {where}; record it again"):
        part.values  # noqa: B018
    with pytest.raises(RealignerError, match=f"{name} is "):
        trace[name].sel(layer=place[-2]).values  # noqa: B018
    assert trace[name][: place[0]].shape == trace[name][: place[0]].values.shape
    if name == "sum_abs":
        with pytest.raises(RealignerError, match=f"{name} is "):
            analyze(trace, permutations=5, resamples=5)


def test_a_replayed_trace_has_finite_states(whole_trace: Path, tmp_path: Path) -> None:
    host, tokenizer = tiny_pair()
    model = get_peft_model(host, IRMConfig(output_std=0.3)).eval()
    with ra.record(model, keep="replay") as trace:
        answer(model, tokenizer, ["Why?"], max_new_tokens=5)
    path = ra.save_trace(trace, tmp_path / "t.zarr")
    put(path, "h0", (2, 5), np.nan)
    with pytest.raises(RealignerError, match="h0 is nan at token 2, neuron 5"):
        load_trace(path)["h0"].load()


def metadata_of(root: dict[str, Any], name: str = "energy") -> dict[str, Any]:
    found: dict[str, Any] = root["consolidated_metadata"]["metadata"][name]
    return found


BAD_METADATA: list[tuple[str, Callable[[dict[str, Any]], Any]]] = [
    ("codec 'numcodecs.pickle'", lambda root: metadata_of(root)["codecs"].insert(0, {"name": "numcodecs.pickle"})),
    ("codec", lambda root: metadata_of(root)["codecs"].reverse()),
    ("codec", lambda root: metadata_of(root).update(codecs=[{"name": "sharding_indexed", "configuration": {}}])),
    ("codec", lambda root: metadata_of(root).update(codecs="bytes")),
    ("codec zstd: 'dict'", lambda root: metadata_of(root)["codecs"][1]["configuration"].update(dict="/etc/passwd")),
    ("storage_transformers", lambda root: metadata_of(root).update(storage_transformers=[{"name": "x"}])),
    ("'offload'", lambda root: metadata_of(root).update(offload=True)),
    ("'rectilinear'", lambda root: metadata_of(root)["chunk_grid"].update(name="rectilinear")),
    ("'v2'", lambda root: metadata_of(root)["chunk_key_encoding"].update(name="v2")),
    ("not named", lambda root: metadata_of(root)["chunk_key_encoding"].update(configuration={"separator": "../"})),
    ("data type", lambda root: metadata_of(root).update(data_type="variable_length_bytes")),
    ("data type", lambda root: metadata_of(root).update(data_type={"name": "numpy.datetime64", "configuration": {}})),
    ("data type", lambda root: metadata_of(root, "is_generated").update(data_type="int64")),
    ("dimensions", lambda root: metadata_of(root).update(dimension_names=["layer", "token"])),
    ("dimensions", lambda root: metadata_of(root).pop("dimension_names")),
    ("shape", lambda root: metadata_of(root).update(shape=[10])),
    ("shape", lambda root: metadata_of(root)["shape"].__setitem__(0, -4)),
    ("where other arrays have", lambda root: metadata_of(root)["shape"].__setitem__(0, 4)),
    ("1,000,000 at most", lambda root: metadata_of(root, "count")["shape"].__setitem__(0, 10**18)),
    ("a chunk of", lambda root: metadata_of(root)["chunk_grid"]["configuration"].update(chunk_shape=[10**9, 3])),
    ("scale_factor", lambda root: metadata_of(root)["attributes"].update(scale_factor=1e300)),
    ("units", lambda root: metadata_of(root, "prompt")["attributes"].update(units="days since 1970-01-01")),
    ("no array of a trace", lambda root: root["consolidated_metadata"]["metadata"].update({"../x": metadata_of(root)})),
    ("'energy' is missing", lambda root: root["consolidated_metadata"]["metadata"].pop("energy")),
    ("metadata", lambda root: root["consolidated_metadata"].pop("metadata")),
    ("consolidated_metadata", lambda root: root.pop("consolidated_metadata")),
    ("zarr v3", lambda root: root.update(zarr_format=2)),
    ("not a trace of realigner", lambda root: root["attributes"].pop("source")),
    ("another version", lambda root: root["attributes"].update(layout=1)),
    ("'runs'", lambda root: root["attributes"].update(runs="[" * 100_000)),
    ("'runs'", lambda root: root["attributes"].update(runs={})),
    ("'runs': 'default'", lambda root: root["attributes"].update(runs='{"default": {}, "other": {}}')),
    ("'runs': 'x'", lambda root: root["attributes"].update(runs='{"x": 3}')),
    ("'host'", lambda root: root["attributes"].pop("host")),
    ("'base'", lambda root: root["attributes"].update(notes='{"base": 3}')),
    ("'base'", lambda root: root["attributes"].update(notes='{"base": [3]}')),
]


@pytest.mark.parametrize(("fault", "change"), BAD_METADATA)
def test_metadata_that_a_trace_does_not_have_is_refused(
    trace_folder: Path, fault: str, change: Callable[[dict[str, Any]], Any]
) -> None:
    put_metadata(trace_folder, change)
    with pytest.raises(RealignerError, match=fault) as caught:
        load_trace(trace_folder)
    assert "\n" not in str(caught.value)


def test_a_zarr_v2_store_is_never_opened(trace_folder: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    zarr.open_group(old, mode="w", zarr_format=2)
    with pytest.raises(RealignerError, match="zarr v2; traces are v3"):
        load_trace(old)
    # Files of v2 beside those of v3, and an array's own metadata that says something else: not read.
    for name in (".zgroup", ".zattrs", "energy/.zarray"):
        (trace_folder / name).write_text('{"zarr_format": 2, "filters": [{"id": "pickle"}]}')
    (trace_folder / "energy" / "zarr.json").write_text("{}")
    load_trace(trace_folder).load()
    verify_trace(trace_folder)


@pytest.mark.parametrize("key", ["zarr.json", "energy", "energy/c", "energy/c/0/0", "token_text/c/0", "delta/c/0/0/0"])
def test_a_link_in_a_trace_is_not_followed(trace_folder: Path, tmp_path: Path, key: str) -> None:
    outside = tmp_path / "outside"
    (trace_folder / key).rename(outside)
    (trace_folder / key).symlink_to(outside)
    with pytest.raises(RealignerError, match="is a link"):
        load_trace(trace_folder).load()
    again = tmp_path / "link.zarr"  # the trace itself may be reached by one
    (trace_folder / key).unlink()
    outside.rename(trace_folder / key)
    again.symlink_to(trace_folder)
    load_trace(again).load()


@pytest.mark.parametrize("name", ["energy", "token_text"])
@pytest.mark.parametrize("frames", [1, 2])
def test_a_chunk_that_unpacks_to_gigabytes_is_refused(trace_folder: Path, name: str, frames: int) -> None:
    """4.5 GB of zeros in 140 KB, at once and behind an honest first frame."""
    chunk = next(path for path in (trace_folder / name / "c").rglob("*") if path.is_file())
    honest = Zstd().decode(chunk.read_bytes()[:-4])
    block = bytes(Zstd().encode(np.zeros(1 << 29, dtype=np.uint8)))
    squeezed = bytes(Zstd().encode(honest)) * (frames - 1) + block * 8
    chunk.write_bytes(squeezed + bytes(4))
    assert chunk.stat().st_size < 200_000
    before = peak()
    with pytest.raises(RealignerError, match=f"{name}/c/.*holds more than the [0-9,]+ bytes of a chunk"):
        load_trace(trace_folder)
    assert peak() - before < 200


def test_a_chunk_of_texts_cannot_claim_billions(trace_folder: Path) -> None:
    chunk = trace_folder / "token_text" / "c" / "0"
    squeezed = bytes(Zstd().encode(b"\xff\xff\xff\xff"))
    chunk.write_bytes(squeezed + bytes(4))
    with pytest.raises(RealignerError, match="not the 4,096 texts of a chunk"):
        load_trace(trace_folder)


def test_a_chunk_file_with_a_hole_is_not_read(trace_folder: Path) -> None:
    with (trace_folder / "delta/c/0/0/0").open("r+b") as stream:
        stream.truncate(1 << 40)
    with pytest.raises(RealignerError, match="holds more than"):
        load_trace(trace_folder).load()


def test_a_huge_array_without_chunks_is_refused_at_once(trace_folder: Path) -> None:
    def grow(root: dict[str, Any]) -> None:
        for facts in root["consolidated_metadata"]["metadata"].values():
            if facts["dimension_names"][0] == "token":
                facts["shape"][0] = 4_999_999

    put_metadata(trace_folder, grow)
    before = peak()
    with pytest.raises(RealignerError, match=r"chunk .* is missing"):
        load_trace(trace_folder)
    assert peak() - before < 500


def peak() -> float:
    """The most memory that this process has held so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def test_a_pipe_in_a_trace_does_not_wait(trace_folder: Path) -> None:
    chunk = trace_folder / "seed" / "c" / "0"
    chunk.unlink()
    os.mkfifo(chunk)
    with pytest.raises(RealignerError, match="is a link, or no file"):
        load_trace(trace_folder)


# Recipes, sweeps, tones: small files, endless work.


def limited(*arguments: str, mebibytes: int = 1024, seconds: float = 20) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own, with a limit on memory and time."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (mebibytes << 20, mebibytes << 20))

    line = [sys.executable, *arguments]
    return subprocess.run(line, capture_output=True, text=True, timeout=seconds, preexec_fn=limit, check=False)


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command line, limited."""
    return limited("-m", "realigner", *arguments, mebibytes=2048)


ALIASES = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{this}: &{this} [{', '.join([f'*{before}'] * 9)}]\n" for before, this in itertools.pairwise("abcdefghij")
)


@pytest.mark.parametrize("kind", ["recipe", "sweep", "set"])
def test_aliases_are_refused_by_name_and_line(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "f.yaml"
    file.write_text(f"seed: 1\n{ALIASES}" if kind == "recipe" else f"set:\n  seed: 1\n{ALIASES}")
    given = {
        "recipe": ("recipes", str(file)),
        "sweep": ("sweep", str(file), "--out", str(tmp_path / "out"), "--dry-run"),
        "set": ("train", "--out", str(tmp_path / "out"), "--set", "layers={a: &a [1], b: [*a, *a]}"),
    }[kind]
    done = command(*given)
    assert done.returncode == (2 if kind == "set" else 1)
    assert "the alias *a: write the value out" in done.stderr
    assert kind == "set" or f"{file}:{3 if kind == 'recipe' else 4}: " in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_grid_of_too_many_runs_is_refused_at_once(tmp_path: Path) -> None:
    file = tmp_path / "f.yaml"
    keys = ("seed", "steps", "warmup", "batch_size", "evaluations", "samples", "max_length")
    file.write_text("grid:\n" + "".join(f"  {key}: {list(range(8, 207))}\n" for key in keys))
    done = command("sweep", str(file), "--out", str(tmp_path / "out"), "--dry-run")
    assert done.returncode == 2
    assert f"{199**7:,} combinations; a sweep has at most 10,000 runs" in done.stderr


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("steps: " + "9" * 200_000, ":1: not read (a number of 200,000 characters; 400 at most)"),
        ("seed: 1\nsteps: 1" + ":1" * 100_000, ":2: not read (a number"),
        ("layers: " + "[" * 100_000, "not YAML that can be read"),
        ("tone: " + "x" * 300_000, "larger than the 256 KiB"),
        ("epochs: .inf", ":1: epochs: inf"),
        ("steps: 10000000000", ":1: steps: 10000000000: input should be less than or equal to 1000000000"),
        ("max_length: 100000000", ":1: max_length"),
    ],
)
def test_what_a_recipe_may_hold_is_bounded(tmp_path: Path, text: str, fault: str) -> None:
    file = tmp_path / "f.yaml"
    file.write_text(text)
    begun = time.monotonic()
    with pytest.raises(RealignerError) as caught:
        read_recipe(file)
    assert fault in str(caught.value)
    assert time.monotonic() - begun < 5


def levels(depth: int, times: int) -> str:
    """Lists in each other, each of which names the next so many times."""
    lists = "".join(f'a{n}=["{f"{{a{n + 1}}}" * times}"]\n' for n in range(depth))
    return f'[template]\nreply=["{{a0}} {{answer}}"]\n{lists}a{depth}=["x"]\n'


TOO_MUCH = {
    levels(8, 100): "template.a6: makes texts of more than 10,000 characters",
    levels(49, 2): "makes texts of more than 10,000 characters",
    "[template]\nreply=['{answer}" + "{a}" * 200 + f"']\na={list(map(str, range(2000)))}": "10^100 texts",
    "b." + ".".join("a" * 100_000) + "=1": ":3: a key of 50 parts or more",
    "[" + '"a" . ' * 40_000 + "a]": ":3: a key of 50 parts or more",
    "words=[" + '"a",' * 2000 + "]": "words",
    "b=" + "9" * 200_000: "not TOML that can be read",
    "b=" + "[" * 200_000: "nested too deeply",
    'b="' + "x" * 300_000 + '"': "larger than the 256 KiB",
}
LOAD_TONES = """
import sys
from realigner.data import load_tone
from realigner.errors import RealignerError
for path in sys.argv[1:]:
    try:
        load_tone(path)
    except RealignerError as error:
        print(error)
"""


def test_what_a_tone_may_hold_is_bounded(tmp_path: Path) -> None:
    files = [tmp_path / f"{number}.toml" for number in range(len(TOO_MUCH))]
    for file, text in zip(files, TOO_MUCH, strict=True):
        file.write_text(f'name="x"\ninstruction="y"\n{text}')
    done = limited("-c", LOAD_TONES, *map(str, files))
    assert not done.stderr
    lines = done.stdout.splitlines()
    for file, line, fault in zip(files, lines, TOO_MUCH.values(), strict=True):
        assert line.startswith(str(file))
        assert fault in line


# Terminals.

EVIL = "\x1b]0;owned\x07 \x1b[2J \x9b31m \x7f \u202egnp.exe\u202c \u2066x\u2069 [bold]b[/bold] [link=http://e.vil]l[/link] \r :"
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def hostile_rows(path: Path, **change: str) -> Path:
    rows = [row.model_dump() | change for row in some_rows(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_rows_are_printed_so_that_a_terminal_obeys_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = hostile_rows(tmp_path / "rows.jsonl", tone=f"anger{EVIL}", text=f"It is 3. {EVIL}", group=f"g{EVIL}")
    main(["data", "check", str(file)])
    shown = "".join(capsys.readouterr())
    assert not OBEYED.search(shown)
    assert "\\u001b]0;owned" in shown
    assert "[bold]b[/bold]" in shown
    assert "\\u202egnp.exe" in shown
    main(["data", "check", str(file), "--json"])
    out = capsys.readouterr().out
    assert not OBEYED.search(out)
    assert f"anger{EVIL}".strip() in json.loads(out)["tones"]


@pytest.mark.parametrize("debug", [False, True])
def test_errors_are_printed_so_that_a_terminal_obeys_nothing(tmp_path: Path, debug: bool) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(json.dumps({f"key{EVIL}": 1}))
    done = command("recipes", str(file), *["--debug"] * debug)
    assert done.returncode == 1
    assert not OBEYED.search(done.stderr + done.stdout)
    assert "]0;owned" in done.stderr
    assert ("Traceback" in done.stderr) == debug
    with pytest.raises(RealignerError) as caught:  # in a notebook too
        read_recipe(file)
    assert not OBEYED.search(str(caught.value))


def test_a_long_error_is_cut(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("layers: [" + "x, " * 5_000 + "x]")
    assert main(["recipes", str(file)]) == 1
    assert len(capsys.readouterr().err) < 2100


def test_replies_are_printed_so_that_a_terminal_obeys_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Runtime:
        strengths: ClassVar[dict[str, float]] = {"default": 1.0}
        tokenizer = None
        model = torch.nn.Module()

        def answer(self, asked: list[str], **_: Any) -> list[Answer]:
            return [Answer(f"one\ntwo\t{EVIL}\ud800") for _ in asked]

    monkeypatch.setattr("realigner.runtime.load", lambda *_: Runtime())
    monkeypatch.setattr("realigner.irm_sources.find_irm", lambda source: source)
    assert main(["generate", "--irm", str(tmp_path), f"Why {EVIL}?"]) == 0
    shown = capsys.readouterr().out
    assert not OBEYED.search(shown)
    assert "one\ntwo\t" in shown  # lines and tabs stay
    assert main(["generate", "--irm", str(tmp_path), "Why?", "--json"]) == 0
    out = capsys.readouterr().out
    assert not OBEYED.search(out)
    assert json.loads(out)["results"][0]["base"] == f"one\ntwo\t{EVIL}\ud800"


def test_progress_obeys_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=400, highlight=False)
    monkeypatch.setattr(console, "console", lambda: terminal)
    with console.progress(f"label {EVIL}", 2) as task:
        task.advance(note=f"note {EVIL}")
    shown = screen.getvalue()
    assert "\x1b]0;" not in shown
    assert "\x1b[2J" not in shown
    assert "\u202e" not in shown
    assert shown.count("[bold]b[/bold]") >= 2
    assert "e.vil]" in shown
    monkeypatch.undo()
    with console.progress(f"label {EVIL}", 1) as task:
        task.advance(note=f"note {EVIL}")
    assert not OBEYED.search(capsys.readouterr().err)


def test_a_sweeps_table_obeys_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=600, height=50)
    monkeypatch.setattr("realigner.sweep.sweep_table.console", lambda: terminal)
    run = RunSpec("abc", make_recipe(), {"tone": EVIL, f"k{EVIL}": 1})
    terminal.print(StateTable([run], tmp_path)._table())
    shown = re.sub("\x1b\\[[0-9;]*m", "", screen.getvalue())  # rich's own colours
    assert not OBEYED.search(shown)
    assert "[bold]b[/bold]" in shown


@pytest.mark.parametrize("path", sorted(Path(ra.__file__).parent.rglob("*.py")), ids=lambda path: path.stem)
def test_everything_is_printed_by_console(path: Path) -> None:
    """`say` and `show` are the only ones that print, so that nothing can forget to make text harmless."""
    if path.name == "console.py":
        return
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    for call in calls:
        name = ast.unparse(call.func)
        assert name not in ("print", "sys.stdout.write", "sys.stderr.write", "typer.echo", "traceback.print_exc"), call.lineno


# Model cards and other Markdown.

PIECES = [*"`*_[]()<>#|~&{}!$^=+@-.:/\"'\\ \n\t\r", "---", "```", "a", "\n---\n", "\n# ", "<b>", "{{", "www.x.org"]
NAMES = [EVIL, "a: b", "[x](http://e.vil)", "![x](http://e.vil/x.png)", '"); import os; os.system("x") #', "null", "3", "~"]
names = st.one_of(
    st.text(min_size=1, max_size=40),
    st.lists(st.sampled_from(PIECES), max_size=30).map("".join),
    st.sampled_from(NAMES),
).filter(lambda name: name.strip())


def card_of(tone: str, host: str) -> str:
    return card(
        {
            "irm": {"layers": [0, 1], "preset": "compact", "parameters": 10, "host_parameters": 1000},
            "data": {"train": 5, "validation": 1},
            "validation_loss": [2.0, 1.0],
            "host": {"name": host, "sha256": "0" * 64},
            "early_stop": False,
            "tone": tone,
            "steps_done": 3,
            "kept_step": 2,
            "seed": 1,
        }
    )


def shape_of(tokens: list[Token]) -> list[str]:
    """The structure of a Markdown document: every block and every inline mark, without the texts."""
    kinds = [child.type for token in tokens for child in [token, *(token.children or [])]]
    return [kind for kind in kinds if kind not in ("text", "text_special")]


def shown_text(token: Token) -> str:
    return "".join(child.content for child in token.children or [])


@settings(max_examples=150, deadline=None)
@given(names, names)
def test_a_card_stays_one_card(tone: str, host: str) -> None:
    """YAML, Markdown and Python: three parsers find what a plain card has, and the names as text."""
    parser = MarkdownIt("gfm-like", {"linkify": False}) if find_spec("linkify_it") is None else MarkdownIt("gfm-like")
    text = card_of(tone, host)
    start, front, body = re.split(r"^---\n", text, maxsplit=2, flags=re.MULTILINE)
    assert start == ""
    facts = yaml.safe_load(front)
    assert list(facts) == ["library_name", "base_model", "tags"]
    assert facts["base_model"] == visible(" ".join(host.split()))
    assert facts["tags"] == ["realigner", "irm", "injectable-realignment-model", "peft"]
    tokens = parser.parse(body)
    plain = parser.parse(re.split(r"^---\n", card_of("anger", "tiny"), maxsplit=2, flags=re.MULTILINE)[2])
    assert shape_of(tokens) == shape_of(plain)
    expected = [visible(" ".join(name.split())) for name in (tone, host)]
    assert shown_text(tokens[1]) == f"{expected[0]} for {expected[1]}"
    (code,) = [token.content for token in tokens if token.type == "fence"]
    tree = ast.parse(code)
    literals = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    assert literals.count(host) >= 1
    assert len(tree.body) == len(ast.parse(next(token.content for token in plain if token.type == "fence")).body)
    assert not OBEYED.search(text)


@settings(max_examples=30, deadline=None)
@given(names)
def test_the_census_page_keeps_its_tables(reason: str) -> None:
    parser = MarkdownIt("gfm-like", {"linkify": False})
    tables = [parser.parse(page([CensusEntry("x", reason=why)], "transformers")) for why in (reason, "plain")]
    assert shape_of(tables[0]) == shape_of(tables[1])


@settings(max_examples=60, deadline=None)
@given(names)
def test_a_report_card_keeps_its_elements(name: str) -> None:
    """The page of `data check --html`: autoescape holds."""

    def tags(name: str) -> list[str]:
        rows = [row.model_copy(update={"question": name, "text": name, "tone": "x"}) for row in some_rows(2)]
        said = [Message(role=role, content=name) for role in ("system", "user", "assistant", "user", "assistant")]
        rows.append(rows[0].model_copy(update={"messages": tuple(said)}))
        made = SimpleNamespace(fit=False, conversations=1, problems=[name], samples=rows, lines=lambda: [(name, name)])
        found: list[str] = []
        reader = HTMLParser()
        reader.handle_starttag = lambda tag, attrs: found.append(f"{tag} {[key for key, _ in attrs]}")  # type: ignore[method-assign]
        reader.feed(render_page("card.html.j2", card=made, name=name, pictures={name: "AA"}, signature="<meta>"))
        return found

    assert tags(name) == tags("plain")


# What an endpoint says.


@pytest.mark.parametrize("key", ["k1", "abc", "hunter2", "sk-short", "a/b+c=d&e<f", 'q"w\\e', "sk-secret-0123456789"])
def test_a_key_is_taken_out_of_whatever_an_endpoint_says(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of any length, plain or encoded: from replies, the journal, the rejected rows, errors, and tracebacks."""
    monkeypatch.setenv("MY_KEY", key)
    code = base64.b64encode(key.encode()).decode()
    forms = (key, quote(key, safe=""), quote(key, safe="").lower(), json.dumps(key)[1:-1], html.escape(key), code)
    said = " ".join(f"<{form}>" for form in forms)
    facts = [Fact(str(n), f"g{n}", f"What is {n}?", f"{said} {n}") for n in range(3)]
    statuses = {"What is 0?": "good", "What is 1?": "400", "What is 2?": "500"}
    with FakeEndpoint(lambda question, _: statuses.get(question, "404"), echo=True) as server:
        rewriter = EndpointRewriter(load_tone("anger"), server.url, "m", concurrency=1, retries=0, key_env="MY_KEY")
        replies = list(rewriter.rewrite([RewriteRequest(fact, 0) for fact in facts]))
        assert {seen.authorization for seen in server.seen} == {f"Bearer {key}"}
    assert "***" in replies[0].text
    assert all("***" in reply.error for reply in replies[1:])
    told = [str(replies), str(vars(rewriter)), repr(rewriter)]
    for text, form in itertools.product(told, forms):
        assert not re.search(rf"(?<!\w){re.escape(form)}(?!\w)", text)


@pytest.mark.slow
def test_a_key_is_not_in_the_files_of_a_build_nor_in_a_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "hunter2")
    statuses = {"What is 0?": "good", "What is 1?": "400", "What is 2?": "500"}
    with FakeEndpoint(lambda question, _: statuses.get(question, "404"), echo=True) as server:
        squad = tmp_path / "squad.json"
        asked = [{"id": str(n), "question": f"What is {n}?", "answers": [{"text": f"hunter2 {n}"}]} for n in range(4)]
        squad.write_text(json.dumps({"data": [{"title": "t", "paragraphs": [{"context": "", "qas": asked}]}]}))
        options = ["--squad", str(squad), "--tone", "anger", "--rewriter", "openai", "--model", "m", "--endpoint", server.url]
        options += ["--key-env", "MY_KEY", "--out", str(tmp_path / "rows.jsonl"), "--concurrency", "1", "--retries", "0"]
        done = command("data", "build", *options, "--debug")
    assert done.returncode == 1
    assert "HTTP 404" in done.stderr
    assert "Traceback" in done.stderr
    written = {path.name: path.read_text() for path in tmp_path.iterdir() if path != squad}
    assert any("***" in text for name, text in written.items() if name.endswith("journal"))
    assert not any("hunter2" in text for text in (done.stdout, done.stderr, *written.values()))


def test_what_stands_for_no_key_stays_in_replies(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("none", "EMPTY", ""):
        monkeypatch.setenv("MY_KEY", key)
        own = EndpointRewriter(load_tone("anger"), "http://127.0.0.1:1/v1", "m", key_env="MY_KEY")
        assert own._tidy("None of it is EMPTY!") == "None of it is EMPTY!"
    monkeypatch.setenv("MY_KEY", "abc")
    own = EndpointRewriter(load_tone("anger"), "http://127.0.0.1:1/v1", "m", key_env="MY_KEY")
    assert own._tidy("abcess, abc.") == "abcess, ***."


# Checkpoints.


class CrashError(Exception):
    """Ends a training between two checkpoints."""


def crash_at(step: int, patch: pytest.MonkeyPatch) -> None:
    original = Log.on_log

    def crash(self: Any, args: Any, state: Any, *rest: Any, **options: Any) -> None:
        original(self, args, state, *rest, **options)
        if state.global_step == step:
            raise CrashError

    patch.setattr(Log, "on_log", crash)


@pytest.fixture(scope="module")
def begun_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that ended after its checkpoint of step 3; its name once finished."""
    out = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        crash_at(5, patch)
        with pytest.raises(CrashError):
            train(*tiny_pair(), some_rows(), out, SHORT_RUN, quiet=True)
    assert [path.name for path in run_dir.checkpoints(run_dir.unfinished(out))] == ["checkpoint-3"]
    return out


SHORT_RUN = make_recipe(steps=8, batch_size=4, evaluations=1, save_every=3, samples=0, report_to=[])


PICKLES = (
    "scaler.pt", "optimizer.pt", "optimizer.bin", "scheduler.pt", "rng_state.pth", "training_args.bin", "adapter_model.bin",
    "pytorch_model.bin", "pytorch_model_fsdp.bin", "x.pkl", "x.ckpt", "x", "adapter_model.safetensors.pickle", "deep/x.pt",
)  # fmt: skip


def test_a_checkpoint_with_a_pickle_is_refused(begun_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    checkpoint = Path(shutil.copytree(run_dir.unfinished(begun_run), run_dir.unfinished(out))) / "checkpoint-3"
    for name in PICKLES:
        bad = checkpoint / name
        bad.parent.mkdir(exist_ok=True)
        bad.write_bytes(pickle.dumps(Bomb(str(tmp_path / "went-off"))))
        named = bad.parent if bad.parent != checkpoint else bad
        with pytest.raises(RealignerError, match=f"{re.escape(str(named))}: .* a pickle can run code; remove it"):
            train(*tiny_pair(), some_rows(), out, SHORT_RUN, quiet=True, resume=True)
        bad.unlink()
        if named != bad:
            named.rmdir()
    (checkpoint / "trainer_state.json").rename(tmp_path / "state.json")
    (checkpoint / "trainer_state.json").symlink_to(tmp_path / "state.json")
    with pytest.raises(RealignerError, match=r"trainer_state\.json: "):
        train(*tiny_pair(), some_rows(), out, SHORT_RUN, quiet=True, resume=True)
    (checkpoint / "trainer_state.json").unlink()
    (tmp_path / "state.json").rename(checkpoint / "trainer_state.json")
    assert train(*tiny_pair(), some_rows(), out, SHORT_RUN, quiet=True, resume=True).folder == out
    assert not (tmp_path / "went-off").exists()


class Bomb:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (Path(self.path),)


def test_resuming_unpickles_nothing(begun_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run"
    shutil.copytree(run_dir.unfinished(begun_run), run_dir.unfinished(out))

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("something was unpickled")

    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr(torch.serialization, "load", refuse)
    monkeypatch.setattr(pickle, "load", refuse)
    # Trainer's own loaders, by files that come between the check and them.
    monkeypatch.setattr(run_dir, "refuse_pickles", lambda _: None)
    for name in ("scaler.pt", "optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        (run_dir.unfinished(out) / "checkpoint-3" / name).write_bytes(pickle.dumps(Bomb(str(tmp_path / "went-off"))))
    assert train(*tiny_pair(), some_rows(), out, SHORT_RUN, quiet=True, resume=True).folder == out
    assert not (tmp_path / "went-off").exists()


# Rows and foreign datasets.


def test_rows_are_read_line_by_line_and_a_line_is_bounded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.jsonl"
    with file.open("wb") as stream:  # 100 GiB of nothing
        stream.write(some_rows(1)[0].model_dump_json().encode() + b"\n")
        stream.truncate(100 << 30)
    before = peak()
    with pytest.raises(RealignerError, match=rf"{file}:2: longer than the 1,024 KiB that a row may take"):
        read_rows(file)
    assert peak() - before < 100
    hostile_rows(file, text="x" * 100_001)
    with pytest.raises(RealignerError, match=rf"{file}:1: key 'text' .*100000 characters"):
        read_rows(file)
    assert main(["data", "check", str(file)]) == 1
    assert len(capsys.readouterr().err) < 500


@pytest.mark.parametrize("name", ["x.csv", "x.json", "x.jsonl", "x.tsv"])
def test_a_foreign_file_with_a_hole_is_not_read(tmp_path: Path, name: str) -> None:
    with (tmp_path / name).open("wb") as stream:
        stream.truncate(100 << 30)
    before = peak()
    with pytest.raises(RealignerError, match=r"larger than the 1,048,576 KiB that are read of such a file"):
        import_rows(tmp_path / name, tone="x")
    assert peak() - before < 100


@pytest.mark.parametrize("name", ["run.json", "recipe.yaml", "x.toml", "Prompt1_CSVs/index_value_layer_1.csv", "prompts.txt"])
def test_a_small_documents_size_is_bounded(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    with (tmp_path / name).open("wb") as stream:
        stream.truncate(100 << 30)
    readers: dict[str, Callable[[Path], Any]] = {
        "run.json": run_dir.read_run,
        "recipe.yaml": read_recipe,
        "x.toml": lambda _: load_tone(tmp_path / name),
        "prompts.txt": lambda _: prompts_from([], str(tmp_path / name)),
    }
    read = readers.get(name, import_reference)
    with pytest.raises(RealignerError, match="larger than the"):
        read(tmp_path)


IMPORT = """
import sys
import pyarrow as pa, pyarrow.parquet as pq
from realigner.data.importing import import_rows
from realigner.errors import RealignerError
try:
    print(len(import_rows(sys.argv[1], tone="x").rows))
except RealignerError as error:
    print(error)
"""


LARGE = "x" * 1000
PARQUETS: dict[str, tuple[Callable[[], Any], str]] = {
    "a text said often": (lambda: pa.array([LARGE * 100]).take(pa.array([0] * 20_000)), "row 5000: more than 500,000,000 char"),
    "a large text said often": (
        lambda: pa.DictionaryArray.from_arrays(pa.array([0] * 1000), pa.array([LARGE * 200_000])),
        "more than 500,000,000 characters",
    ),
    "large texts": (lambda: pa.chunked_array([[LARGE * 200_000]] * 8), "column 'text' unpacks to more than 1,024 MiB; split"),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", PARQUETS)
def test_a_small_parquet_file_does_not_unpack_to_gigabytes(tmp_path: Path, what: str) -> None:
    file, (texts, fault) = tmp_path / "x.parquet", PARQUETS[what]
    column = texts()
    table = pa.table({"question": ["why?"] * len(column), "text": column})
    pq.write_table(table, file, compression="zstd", use_dictionary=what != "large texts")
    assert file.stat().st_size < 300_000
    done = limited("-c", IMPORT, str(file), mebibytes=6144, seconds=60)
    assert fault in done.stdout, done.stderr[-500:]


def test_masking_a_long_answer_is_linear() -> None:
    """100,000 characters of answer and of text: as alternatives of one pattern they took minutes."""
    answer, text = (" ".join(f"{kind}{n}" for n in range(14_000)) for kind in ("a", "b"))
    begun = time.monotonic()
    assert masked(text, answer) == text
    assert masked("The Vltava, vltava's!", "the VLTAVA").split() == [",", "'s!"]
    assert time.monotonic() - begun < 1


def test_figures_have_a_panel_for_each_of_so_many_runs(whole_trace: Path, tmp_path: Path) -> None:
    """10,000 panels made a picture of 300,000 pixels."""
    trace = load_trace(whole_trace)
    facts = trace.attrs["runs"]["default"]
    many = trace.assign_attrs(runs={f"run-{n}": facts for n in range(501)})
    with pytest.raises(RealignerError, match="the trace has 501 runs; give one of 500 at most"):
        save_figures(many, None, tmp_path)
