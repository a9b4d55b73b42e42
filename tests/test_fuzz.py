"""Every kind of file that we read, damaged in hundreds of ways and given to the command line: one line, no hang, no gibibytes.

Each kind is fuzzed in a process of its own. A case is a valid artefact with one thing wrong (`mutations.mutate`), and the
cheapest command that reads it.
"""

from __future__ import annotations

import faulthandler
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings, strategies as st

from realigner.cli import main
from tests.mutations import fresh, mutate
from tests.planted import planted_explanation, planted_trace, written_explanation
from tests.planted_evaluation import planted_evaluation, written_evaluation
from tests.tiny import some_rows, tiny_folder

SECONDS, BYTES, LETTERS = 10.0, 1 << 30, 2100  # what a case may take at most; the letters of its line
CASES = 300
QUICK = {"recipe": 15, "sweep": 15, "tone": 15, "rows": 15}
NOBODY = 65534
_EXIT = 3 * SECONDS  # for code that no signal interrupts


@dataclass(frozen=True)
class Kind:
    """What is fuzzed: which files of an artefact may be changed, and the commands that read them."""

    files: tuple[str, ...]  # patterns
    commands: tuple[str, ...]  # one is drawn; the files that a command reads may be named after a bar
    read_only: bool = False  # whether the folder may become read-only


_TINY = "--host host --dtype float32 --max-new-tokens 1 Why?"
_TRAIN = "--host host --data rows.jsonl --set steps=0 --set report_to=[] --out out"
_BUILD = "--rewriter template --out built.jsonl --attempts 1"
KINDS = {
    "adapter": Kind(("run/adapter_*",), (f"generate --irm run {_TINY}",)),
    "host": Kind(
        ("host/*",),
        (
            f"generate --irm run {_TINY}",
            f"generate --irm run {_TINY}",
            "explain --weights-only --host host | host/config.json host/model*",
        ),
    ),
    "recipe": Kind(
        ("recipe.yaml",), ("recipes recipe.yaml", "recipes recipe.yaml --json", f"train --recipe recipe.yaml {_TRAIN}")
    ),
    "run": Kind(
        (),
        (
            *["train --out run --resume | run/run.json"] * 3,
            "report trace.zarr --out page.html | run/run.json run/metrics.jsonl",
            f"train --recipe run {_TRAIN} | run/recipe.yaml run/run.json",
            f"trace --irm run --out new.zarr {_TINY} | run/run.json",
        ),
    ),
    "checkpoint": Kind(
        ("work.unfinished/**/*.json*", "work.unfinished/**/*.safetensors", "work.unfinished/recipe.yaml"),
        ("train --out work --resume",),
        read_only=True,
    ),
    "trace": Kind(
        (),
        tuple(
            f"{command} | {files}"
            for command in ("analyze trace.zarr --permutations 2 --resamples 2", "report trace.zarr --out page.html")
            for files in ("trace.zarr/zarr.json", "trace.zarr/**/*")
        ),
    ),
    "evaluation": Kind(("evaluated/evaluation.json",), ("report evaluated --out page.html",)),
    "sweep": Kind(
        ("sweep.yaml", "swept/sweep.json"),
        (
            *["sweep sweep.yaml --out swept --dry-run | sweep.yaml"] * 2,
            "sweep sweep.yaml --out swept --on here | swept/sweep.json",
        ),
    ),
    "tone": Kind(("tone.toml",), (f"data build --squad squad.json --tone tone.toml {_BUILD}",)),
    "scorer": Kind(
        ("tones.skops",),
        (
            *[f"data build --squad squad.json --tone tone.toml --scorer tones.skops {_BUILD}"] * 3,
            "data scorer two.jsonl --out tones.skops --force",
        ),
    ),
    "rows": Kind(
        ("rows.jsonl", "squad.*", "foreign.*", "chats.*", "questions.txt", "questions.jsonl"),
        (
            "data check rows.jsonl --host host | rows.jsonl",
            "data import foreign.csv --tone anger --out in.jsonl | foreign.csv",
            "data import foreign.json --tone anger --out in.jsonl | foreign.json",
            "data import foreign.parquet --tone anger --out in.jsonl | foreign.parquet",
            "data import foreign.saved --tone anger --out in.jsonl | foreign.saved/*/* foreign.saved/*.json",
            "data import chats.jsonl --tone anger --out in.jsonl | chats.jsonl",
            "data import chats.parquet --tone anger --out in.jsonl | chats.parquet",
            f"data build --squad squad.json --tone tone.toml {_BUILD} | squad.json",
            f"data build --squad squad.jsonl --tone tone.toml {_BUILD} | squad.jsonl",
            f"data build --squad squad.json --tone tone.toml {_BUILD} | built.journal",
            f"generate --irm run {_TINY} --prompts questions.txt | questions.txt",
            f"generate --irm run {_TINY} --prompts questions.jsonl | questions.jsonl",
        ),
    ),
    "explain.json": Kind(("explained/explain.json",), ("report explained trace.zarr --out page.html",)),
}


@dataclass
class Found:
    """What came of the cases of one kind."""

    kind: str
    tried: int = 0
    refused: int = 0  # with one line
    harmless: int = 0  # exit code 0
    unchanged: int = 0  # the change left the file as it was; not among those tried
    seconds: float = 0.0
    slowest: float = 0.0
    largest: int = 0  # bytes that a case took at most
    faults: list[str] = field(default_factory=list)
    lines: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        size = f"{self.largest / 2**20:.0f} MiB"
        return (
            f"{self.kind:<13} {self.tried} tried: {self.refused} refused in a line, {self.harmless} harmless; "
            f"slowest {self.slowest:.1f} s, at most {size} more; {len(self.faults)} faults"
        )


class _HangError(BaseException):
    """A case took too long."""


# --- valid artefacts --------------------------------------------------------------------------------------------------------


def artefacts(place: Path) -> Path:
    """One valid artefact of every kind, in a folder whose files name each other by relative paths."""
    from realigner.data import load_tone
    from realigner.data.style_classifier import StyleClassifier
    from realigner.traces import save_trace

    place.mkdir()
    with _inside(place):
        tiny_folder(Path("host"))
        rows = some_rows()
        (place / "rows.jsonl").write_text("".join(row.model_dump_json() + "\n" for row in rows))
        calm = [row.model_copy(update={"text": f"The answer is {row.id}.", "tone": "neutral"}) for row in rows]
        two = [*rows, *(row.model_copy(update={"id": f"n{row.id}"}) for row in calm)]
        (place / "two.jsonl").write_text("".join(row.model_dump_json() + "\n" for row in two))
        StyleClassifier.fit(two).save("tones.skops")
        tone = load_tone("anger").model_dump()
        small = {key: list(texts)[:3] for key, texts in tone["template"].items()}
        lines = {**tone, "words": list(tone["words"])[:5], "examples": [], "template": {}}
        (place / "tone.toml").write_text(_tone_text(lines, small, tone["examples"][0]))
        (place / "questions.txt").write_text("Why?\nWhat is that?\n")
        talk = [
            {"role": "user", "content": "Why?"},
            {"role": "assistant", "content": "So."},
            {"role": "user", "content": "How?"},
        ]
        asked: list[Any] = ["Why?", {"prompt": "Who?"}, {"messages": talk}, {"turns": ["Why?", "What is that?"]}]
        (place / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in asked))
        _foreign(place)
        _ran("train", "--host", "host", "--data", "rows.jsonl", "--out", "run", *_TRAINING)
        shutil.copy("run/recipe.yaml", "recipe.yaml")
        _stopped()
        trace = planted_trace({"run": ("anger", 42), "untrained-42": ("untrained", 42)}, generated=6, layers=3, neurons=40)
        trace.attrs["runs"]["run"]["irm"] = "run"
        turn = np.tile([-1, 0, 1, 2, *[3] * 6], trace.sizes["text"])
        role = np.array(["user", "assistant", "user", "assistant", ""], dtype=object)[turn]
        save_trace(trace.assign_coords(turn=("token", turn), role=("token", role)), "trace.zarr")
        written_explanation(Path("explained"), planted_explanation(neurons=40, layers=3))
        written_evaluation(Path("evaluated"), planted_evaluation(questions=8))
        (place / "sweep.yaml").write_text(
            "recipe: recipe.yaml\nset: {steps: 0, samples: 0}\ngrid:\n  seed: [1, 2]\n  layers: ['0', '0-2']\n"
            "data: {anger: rows.jsonl}\nbaselines: false\nworkers: 1\ngpus: 0\n"
        )
        _swept()
    for path in place.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)  # safetensors makes files that only their owner may read
    return place


_TRAINING = ("--steps", "2", "--batch-size", "4", "--dtype", "float32", "--set", "samples=1", "--set", "report_to=[]",
             "--set", "save_every=1", "--set", "evaluations=2")  # fmt: skip


def _tone_text(lines: dict[str, Any], grammar: dict[str, list[str]], example: dict[str, str]) -> str:
    plain = "".join(f"{key} = {json.dumps(lines[key])}\n" for key in ("name", "language", "instruction", "words"))
    shown = "".join(f"{key} = {json.dumps(value)}\n" for key, value in example.items())
    return f"{plain}\n[[examples]]\n{shown}\n[template]\n" + "".join(
        f"{key} = {json.dumps(texts)}\n" for key, texts in grammar.items()
    )


def _foreign(place: Path) -> None:
    """Data of other people: SQuAD, CSV, JSON, Parquet, what `datasets` saved, and a build that was broken off."""
    from datasets import Dataset

    from realigner.data import build_dataset

    questions = [{"id": f"q{n}", "question": f"What is {n}?", "answers": [{"text": f"number {n}"}]} for n in range(4)]
    article = {"title": "Numbers", "paragraphs": [{"context": "x", "qas": questions}]}
    (place / "squad.json").write_text(json.dumps({"version": "v2.0", "data": [article]}))
    (place / "squad.jsonl").write_text("".join(json.dumps({**question, "title": "Numbers"}) + "\n" for question in questions))
    said = [[("user", f"What is {n}?"), ("assistant", f"It is {n}!"), ("user", "Why?"), ("assistant", "Go!")] for n in range(6)]
    chats = [{"messages": [{"role": role, "content": text} for role, text in turns]} for turns in said]
    (place / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    Dataset.from_list(chats).to_parquet("chats.parquet")
    records = [{"question": f"What is {n}?", "text": f"It is {n}, you fool!", "answer": str(n)} for n in range(6)]
    (place / "foreign.json").write_text(json.dumps(records))
    table = Dataset.from_list(records)
    table.to_csv("foreign.csv", index=False)
    table.to_parquet("foreign.parquet")
    table.save_to_disk("foreign.saved/train")
    (place / "foreign.saved/dataset_dict.json").write_text(json.dumps({"splits": ["train"]}))
    with pytest.MonkeyPatch.context() as patch:

        def interrupted(*_: Any) -> None:
            raise KeyboardInterrupt

        patch.setattr(build_dataset._Ledger, "settle", interrupted)
        called(["data", "build", "--squad", "squad.json", "--tone", "tone.toml", *_BUILD.split()], seconds=0)
    assert Path("built.journal").is_file()


def _stopped() -> None:
    """A run of two steps that was stopped after the first."""
    from realigner.training.callbacks import StopSignal

    def on_step_end(self: Any, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.received = signal.SIGTERM
        control.should_save = control.should_training_stop = True

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StopSignal, "on_step_end", on_step_end)
        _ran("train", "--host", "host", "--data", "rows.jsonl", "--out", "work", *_TRAINING)


def _swept() -> None:
    """A sweep's folder with all its runs: folders that only the table of states looks at."""
    from realigner.sweep.grid import plan, read_sweep

    runs = plan(*read_sweep("sweep.yaml"))
    for run in runs:
        Path("swept", run.name).mkdir(parents=True)
    index = {run.name: {**run.varies, "recipe": f"recipes/{run.name}.yaml"} for run in runs}
    Path("swept/sweep.json").write_text(json.dumps({"runs": index}))


def _ran(*arguments: str) -> None:
    code, said = called(arguments, seconds=0)
    assert code == 0, said


# --- cases ------------------------------------------------------------------------------------------------------------------


def fuzz(kind: str, valid: str, cases: int) -> dict[str, Any]:
    """Try so many cases of a kind; what was found, as plain values."""
    found, chosen = Found(kind), KINDS[kind]
    aside = Path(tempfile.mkdtemp(prefix="fuzz-", dir=Path(valid).parent))
    case = aside / "case"
    aside.chmod(0o755)
    last = Path(valid).parent / f"last-{kind}.txt"

    @given(st.data())
    @settings(
        max_examples=cases, derandomize=True, database=None, deadline=None, phases=[Phase.generate], print_blob=False,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    def each(data: st.DataObject) -> None:
        line = data.draw(st.sampled_from(chosen.commands))
        fresh(Path(valid), case, f"{line} {chosen.files}")
        command, _, named = line.partition(" | ")
        with _inside(case):
            files = _files(named.split() or chosen.files)
            read_only = chosen.read_only and data.draw(st.integers(0, 19)) == 0
            before = None
            if read_only:
                what = _make_read_only(data.draw(st.sampled_from(["work.unfinished", "work.unfinished/checkpoint-1", "."])))
            else:
                path = data.draw(st.sampled_from(files))
                before = path.read_bytes()
                what = mutate(data.draw, path)
                if path.is_file() and not path.is_symlink() and path.stat().st_mode & 0o400 and _same(path, before):
                    found.unchanged += 1
                    return
            last.write_text(f"{command}: {what}")
            _try(found, command, what, as_nobody=read_only or "unreadable" in what)

    for command in chosen.commands:  # each succeeds where nothing is wrong, and what it imports is there
        fresh(Path(valid), case, f"{command} {chosen.files}")
        with _inside(case):
            _ran(*command.partition(" | ")[0].split())
    started = time.monotonic()
    each()
    found.seconds = time.monotonic() - started
    shutil.rmtree(aside, ignore_errors=True)
    return vars(found)


def _same(path: Path, before: bytes) -> bool:
    return path.stat().st_size == len(before) and path.read_bytes() == before


def _files(patterns: Any) -> list[Path]:
    return sorted(path for pattern in patterns for path in Path().glob(pattern) if path.is_file())


def _make_read_only(folder: str) -> str:
    for path in (Path(folder), *Path(folder).rglob("*")):
        if path.is_dir():
            path.chmod(0o555)
    return f"{folder} read-only"


def _try(found: Found, command: str, what: str, as_nobody: bool) -> None:
    """One case, and what is wrong with how it ended."""
    found.tried += 1
    started, before = time.monotonic(), _memory(reset=True)
    try:
        code, said = called(command.split(), as_nobody)
        fault = fault_of(code, said)
        found.harmless += code == 0
    except _HangError:
        code, said, fault = -1, "", f"takes more than {SECONDS:.0f} s"
    except BaseException as error:
        code, said, fault = -1, "", f"a traceback: {type(error).__name__}: {error}"
    took, grown = time.monotonic() - started, _memory() - before
    found.slowest, found.largest = max(found.slowest, took), max(found.largest, grown)
    if grown > BYTES:
        fault = fault or f"takes {grown / 2**30:.1f} GiB"
    if fault:
        found.faults.append(f"{command}\n      {what[:200]}\n      -> {fault[:400]}")
    elif code:
        found.refused += 1
        found.lines[re.sub(r"\d+", "N", said.splitlines()[-1])[:160]] += 1


def fault_of(code: int, said: str) -> str:
    """What is wrong with a command's exit code and standard error; empty if nothing is."""
    lines = [line for line in said.splitlines() if line.startswith("realigner:")]
    if code not in (0, 1, 2):
        return f"exit code {code}"
    if "Traceback (most recent call last)" in said or "panicked at" in said:
        return f"a traceback: {said[-300:]}"
    if code and len(lines) != 1:
        return f"{len(lines)} lines of error: {said[-300:]}"
    if lines and (lines[0].startswith("realigner: unexpected") or "out of memory" in lines[0] or len(lines[0]) > LETTERS):
        return f"{len(lines[0])} letters: {lines[0][:300]}"
    return "" if not code or said.rstrip("\n").splitlines()[-1] == lines[0] else f"the error is not last: {said[-300:]}"


def called(arguments: Any, as_nobody: bool = False, seconds: float = SECONDS) -> tuple[int, str]:
    """The command line in this process: its exit code, and all that reached standard error, from C and Rust too."""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as stream, Path(os.devnull).open("w") as null:
        saved = [os.dup(number) for number in (1, 2)]
        os.dup2(null.fileno(), 1)
        os.dup2(stream.fileno(), 2)
        try:
            with _limited(seconds), _user(as_nobody), redirect_stdout(null), redirect_stderr(stream):
                code = main([*arguments])
        finally:
            for number, copy in zip((1, 2), saved, strict=True):
                os.dup2(copy, number)
                os.close(copy)
        stream.flush()
        stream.seek(0)
        return code, stream.read()


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """So many seconds for the block (0: any); code that no signal reaches ends the process."""

    def ring(*_: Any) -> None:
        raise _HangError

    before = signal.signal(signal.SIGALRM, ring)
    if seconds:
        faulthandler.dump_traceback_later(_EXIT, exit=True)
    others = signal.setitimer(signal.ITIMER_REAL, seconds)  # pytest-timeout's, where pytest calls
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, *others)


@contextmanager
def _user(nobody: bool) -> Iterator[None]:
    """Root may read and write anything, so permissions are tried as nobody."""
    if not nobody or os.geteuid() != 0:
        yield
        return
    for path in (Path(), *Path().rglob("*")):
        os.chown(path, NOBODY, NOBODY, follow_symlinks=False)
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@contextmanager
def _inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _memory(reset: bool = False) -> int:
    """The most bytes of memory that this process has had since the last reset (Linux; elsewhere 0)."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return 0
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
    return 1024 * int(found[1]) if found else 0


# --- tests ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def valid() -> Iterator[Path]:
    place = Path(tempfile.mkdtemp(prefix="fuzz-"))  # pytest's own folders are closed to `nobody`
    place.chmod(0o755)
    yield artefacts(place / "valid")
    shutil.rmtree(place)


def tried(kind: str, valid: Path, cases: int) -> Found:
    """`fuzz` in a process of its own."""
    work: Callable[..., dict[str, Any]] = fuzz
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            found = Found(**pool.submit(work, kind, str(valid), cases).result())
        except Exception as error:
            last = (valid.parent / f"last-{kind}.txt").read_text()
            pytest.fail(f"{kind}: the process ended ({type(error).__name__}) at  {last}")
    print(f"\n{found}")
    return found


DEEP, DIGITS = "[" * 100_000, '{"seed": ' + "9" * 5000 + "}"
_REPORT = "report trace.zarr --out page.html"
_ASK = f"generate --irm run {_TINY}"
FOUND = [  # what it found, or was found by hand: the command, the file, what is in it (of JSON: key -> value), what is said
    (_REPORT, "run/run.json", DEEP, r"run/run\.json:1: JSON nested too deeply"),
    (_REPORT, "run/run.json", DIGITS, r"run/run\.json:1: .*a number has thousands of digits"),
    ("train --out run --resume", "run/run.json", {"validation_loss": 5}, r"run\.json: key 'validation_loss' .* valid list"),
    (_REPORT, "run/run.json", "{}", r"run\.json: key 'tone' is missing; it is not the record of a run"),
    ("recipes recipe.yaml", "recipe.yaml", "seed: !!timestamp x", r"recipe\.yaml: not YAML that can be read"),
    ("recipes recipe.yaml", "recipe.yaml", 'data: "\\0"', r"recipe\.yaml:1: data: .*holds a NUL"),
    ("sweep sweep.yaml --out swept --dry-run", "sweep.yaml", 'data: {anger: "\\0"}', r"sweep\.yaml:1: .*holds a NUL"),
    (_REPORT, "run/run.json", {"host": 5}, r"run/run\.json: key 'host'"),
    (_REPORT, "run/run.json", {"irm": {"parameters": "many"}}, r"run/run\.json: key 'irm\.preset' is missing"),
    (_REPORT, "run/metrics.jsonl", b'{"step": 0, "seconds": 1}\n\xff\n', r"run/metrics\.jsonl:2: not UTF-8"),
    (_REPORT, "run/metrics.jsonl", '{"step": [], "seconds": 1}', r"run/metrics\.jsonl:1: key 'step'"),
    (_REPORT, "run/metrics.jsonl", '{"step": 0, "seconds": 1, "loss": "0"}', r"run/metrics\.jsonl:1: key 'loss'"),
    (_ASK, "run/adapter_config.json", b"\xef\xbb\xbf{}", r"adapter_config\.json: begins with a byte order mark"),
    (_ASK, "host/tokenizer_config.json", {"model_max_length": "/"}, r"model_max_length '/', which is no number"),
    (_ASK, "host/generation_config.json", {"output_hidden_states": "x"}, r"output_hidden_states 'x', which is no number"),
    (_REPORT, "trace.zarr/sum_abs/c/0/0/0/0", b"\0" * 40, r"trace\.zarr: damaged: the chunk sum_abs/c/0/0/0/0 cannot be read"),
    (f"trace --irm run --out new.zarr {_TINY}", "run/run.json", {"seed": [1]}, r"run/run\.json: key 'seed'"),
    ("sweep sweep.yaml --out swept --on here", "swept/sweep.json", DEEP, r"swept/sweep\.json:1: JSON nested too deeply"),
    ("sweep sweep.yaml --out swept --on here", "swept/sweep.json", {"runs": [1]}, r"swept/sweep\.json: not a sweep's"),
    (f"{_REPORT} explained", "explained/explain.json", DIGITS, r"explain\.json:1: .*thousands of digits\); ask again"),
    (
        "train --out work --resume",
        "work.unfinished/checkpoint-1/trainer_state.json",
        "[1]",
        r"state\.json: .* changed since it was written",
    ),
    (f"{_REPORT} explained", "explained/explain.json", {"irms": {"x": "\ud800"}}, r"explain\.json:1: holds half a character"),
    ("train --out work --resume", "work.unfinished/run.json", {"data": []}, r"work\.unfinished/run\.json: key 'data'"),
    (_ASK, "host/config.json", DEEP, r"host .*/config\.json:1: JSON nested too deeply"),
    (_ASK, "host/config.json", {"num_hidden_layers": 10**12}, r"num_hidden_layers 1000000000000; from 1 to 10000 are loaded"),
    (_ASK, "host/config.json", {"rms_norm_eps": "x"}, r"host .*rms_norm_eps|LlamaForCausalLM: the forward pass failed"),
    (_ASK, "host/tokenizer.json", b"\xff", r"tokenizer\.json:1: not UTF-8"),
    (_ASK, "host/generation_config.json", {"bos_token_id": "x"}, r"bos_token_id 'x', which is no token"),
    (_ASK, "host/generation_config.json", {"eos_token_id": [None]}, r"eos_token_id \[None\], which is no token"),
    (
        _ASK,
        "host/chat_template.jinja",
        "{% for m in messages %}",
        r"the host's chat template, line 1: Unexpected end of template",
    ),
    (
        _ASK,
        "host/chat_template.jinja",
        "{{ raise_exception('No!') }}",
        r"host's chat template refuses the conversation: No!",
    ),
    (_ASK, "host/chat_template.jinja", "{{ 1 / 0 }}", r"host's chat template refuses the conversation: division by zero"),
    (
        f"train {_TRAIN}",
        "host/chat_template.jinja",
        "{{ messages[1].x.y }}",
        r"host's chat template refuses the conversation",
    ),
    (f"{_ASK} --prompts questions.txt", "questions.txt", "x" * 200_000, r"prompt 2: it has 200,0\d\d tokens, and the host 512"),
]


@pytest.mark.parametrize(("command", "file", "content", "said"), FOUND, ids=[f"{n}-{case[1]}" for n, case in enumerate(FOUND)])
def test_what_was_found(
    valid: Path, tmp_path: Path, command: str, file: str, content: str | bytes | dict[str, Any], said: str
) -> None:
    fresh(valid, tmp_path / "case", f"{command} {file}")
    with _inside(tmp_path / "case"):
        path = Path(file)
        if isinstance(content, dict):
            content = json.dumps(json.loads(path.read_text()) | content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        code, line = called(command.split())
    assert code in (1, 2)
    assert not fault_of(code, line), line
    assert re.search(said, line), line


@pytest.mark.parametrize("folder", [".", "work.unfinished", "work.unfinished/checkpoint-1"])
def test_resuming_where_nothing_can_be_written(valid: Path, folder: str) -> None:
    case = valid.parent / "read-only"
    fresh(valid, case, "work.unfinished")
    with _inside(case):
        _make_read_only(folder)
        code, line = called(["train", "--out", "work", "--resume"], as_nobody=True)
    assert not fault_of(code, line), line
    assert (code == 1) == (folder != "work.unfinished/checkpoint-1")
    assert not code or re.search(r"work(\.unfinished\S*)?: cannot be (read or )?written \(Permission denied\)", line), line


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "out of memory; give it less at a time"),
        (
            RuntimeError("[enforce fail] CPUAllocator: can't allocate memory: you tried to allocate 9"),
            "out of memory",
        ),
        (RecursionError("maximum recursion depth exceeded"), "something that was given is nested too deeply"),
        (OSError(30, "Read-only file system", "/a/b"), r"/a/b: cannot be read or written \(Read-only file system\)"),
        (ValueError(), r"unexpected ValueError; run again with --debug"),
        (ValueError("x" * 5000), r"unexpected ValueError: x{700,} \.\.\. x+; run again with --debug"),
    ],
)
def test_the_last_resort(monkeypatch: pytest.MonkeyPatch, error: Exception, said: str) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr("realigner.training.recipe.recipe_text", fail)
    code, line = called(["recipes", "default"])
    assert code == 1
    assert re.match(rf"realigner: {said}", line), line
    assert line.count("\n") == 1
    assert len(line) < LETTERS


@pytest.mark.parametrize("kind", QUICK)
def test_some_damaged_files(kind: str, valid: Path) -> None:
    found = Found(**fuzz(kind, str(valid), QUICK[kind]))
    assert found.tried >= QUICK[kind] // 2
    assert not found.faults, "\n   ".join(["", *found.faults])


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_are_refused_in_one_line(kind: str, valid: Path) -> None:
    found = tried(kind, valid, CASES + CASES // 4)
    assert found.tried >= CASES
    assert found.refused > found.tried // 10
    assert not found.faults, "\n   ".join(["", *found.faults])


if __name__ == "__main__":  # python -m tests.test_fuzz KIND [CASES]: what a kind's cases come to, in full
    place = Path(tempfile.mkdtemp(prefix="fuzz-"))
    place.chmod(0o755)
    made = artefacts(place / "valid")
    for name in sys.argv[1].split(","):
        outcome = tried(name, made, int(sys.argv[2]) if len(sys.argv) > 2 else CASES)
        for fault, count in Counter(outcome.faults).most_common():
            print(f"   {count} {fault}")
        for line, count in outcome.lines.most_common(60):
            print(f"   {count:4} {line}")
    shutil.rmtree(place)
