"""The command line as a user meets it: results, JSON, exit codes, and one line for whatever is wrong."""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import realigner as ra
from realigner.cli import main
from realigner.console import program
from realigner.prompts import Answer
from realigner.training import make_recipe, train
from tests.tiny import some_rows, tiny_folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny host, rows, and a run trained on them."""
    folder = tmp_path_factory.mktemp("cli")
    host, tokenizer = ra.load_host(str(tiny_folder(folder / "host")), dtype="float32")
    (folder / "rows.jsonl").write_text("".join(row.model_dump_json() + "\n" for row in some_rows()))
    recipe = make_recipe(steps=3, batch_size=4, evaluations=1, learning_rate=0.05, delta_scale=1.0)
    train(host, tokenizer, some_rows(), folder / "run", recipe=recipe, quiet=True)
    return folder


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def document(capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    """The one JSON document on standard output."""
    code, out, err = run(capsys, *arguments, "--json")
    assert code == 0, err
    return json.loads(out)


# --- what it prints -------------------------------------------------------------------------------------------------------


def test_generate_json(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("generate", "--irm", place / "run", "--max-new-tokens", 8, "--dtype", "float32", "--seed", 7)
    said = document(capsys, *options, "How many?", "Why?")
    assert (said["irm"], said["host"]) == (str(place / "run"), str(place / "host"))  # what the replies were made with
    results = said["results"]
    keys = {"prompt", "base", "base_ended", "realigned", "realigned_ended", "strength", "seed"}
    assert [set(r) for r in results] == [keys] * 2
    assert [r["prompt"] for r in results] == ["How many?", "Why?"]
    assert results[0]["strength"] == 1.0
    assert results[0]["seed"] == 7
    assert results[0]["base"] != results[0]["realigned"]
    zero = document(capsys, *options, "--strength", 0, "How many?", "Why?")["results"]
    assert all(r["base"] == r["realigned"] for r in zero)
    assert [r["base"] for r in zero] == [r["base"] for r in results]
    warm = document(capsys, *options, "--temperature", 1, "--strength", 0, "Why?")["results"][0]
    assert warm["base"] == warm["realigned"]


def test_a_reply_that_was_cut_is_marked(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("generate", "--irm", place / "run", "--max-new-tokens", 1, "--dtype", "float32", "Why?")
    assert document(capsys, *options)["results"][0]["realigned_ended"] is False
    code, out, err = run(capsys, *options)
    assert code == 0
    assert [line.endswith(" ...") for line in out.splitlines() if line.startswith("   ")] == [True, True]
    assert "cut at 1 token (--max-new-tokens)" in err
    monkeypatch.setattr("realigner.runtime.answer", lambda *_, **__: [Answer("Because.")])
    assert document(capsys, *options)["results"][0]["realigned_ended"] is True
    code, out, err = run(capsys, *options)
    assert "   realigned: Because.\n" in out
    assert "cut at" not in err


def test_prompts_from_paper_and_file(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("generate", "--irm", place / "run", "--max-new-tokens", 1, "--dtype", "float32")
    assert len(document(capsys, *options, "--prompts", "paper")["results"]) == 7
    (place / "prompts.txt").write_text("One?\n\nTwo?\n")
    results = document(capsys, *options, "--prompts", place / "prompts.txt", "Zero?")["results"]
    assert [r["prompt"] for r in results] == ["Zero?", "One?", "Two?"]


def test_prompts_of_conversations_and_dialogues(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    talk = {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}]}
    turns = {"turns": ["One?", "Two?"]}
    path = place / "prompts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in ("Why?", talk, turns)))
    options = ("generate", "--irm", place / "run", "--max-new-tokens", 3, "--dtype", "float32", "--prompts", path)
    results = document(capsys, *options)["results"]
    assert [r["prompt"] for r in results] == ["Why?", talk, turns]
    assert [isinstance(r["base"], str) for r in results] == [True, True, False]
    assert [len(results[2][key]) for key in ("base", "realigned")] == [2, 2]
    assert document(capsys, *options[:-2], "Why?")["results"][0]["base"] == results[0]["base"]
    code, out, _ = run(capsys, *options)
    assert code == 0
    assert [line for line in out.splitlines() if line.startswith(("Q: ", "   user"))] == [
        "Q: Why?",
        "Q: system: Be brief.",
        "   user: Who?",
        "Q: One?",
        "Q: Two?",
    ]
    code, _, err = run(capsys, *options, "--chat")
    assert code == 2
    assert err.startswith("realigner: --chat: --prompts has a conversation")
    path.write_text('"Why?"\n{"turns": [""]}\n')
    code, _, err = run(capsys, *options)
    assert code == 1
    assert err.strip() == f"realigner: {path}:2: key 'turns': question 1 is not a text, or an empty one"


def test_train_trace_report(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ("--dtype", "float32")
    trained = document(
        capsys, "train", "--host", place / "host", "--data", place / "rows.jsonl", "--out", tmp_path / "r", "--steps", 2,
        "--layers", "0,2", *common,
    )  # fmt: skip
    assert trained["irm"]["layers"] == [0, 2]
    traced = document(
        capsys, "trace", "--irm", tmp_path / "r", "--out", tmp_path / "t.zarr", "--max-new-tokens", 3, "Why?", *common
    )
    assert traced["sizes"]["layer"] == 2
    assert list(traced["runs"]) == ["anger-42", "untrained-42"]
    quick = ("--permutations", 20, "--resamples", 20)
    found = document(capsys, "analyze", tmp_path / "t.zarr", *quick)
    assert {row["run"] for row in found["striation"]} >= {"anger-42", "untrained-42"}
    assert {verdict["verdict"] for verdict in found["verdicts"]} <= {"supported", "not supported", "cannot tell"}
    code, out, _ = run(capsys, "analyze", tmp_path / "t.zarr", *quick)
    assert code == 0
    assert "Leading indices" in out
    chunk = next(path for path in (tmp_path / "t.zarr" / "sum_abs" / "c").rglob("*") if path.is_file())
    whole = chunk.read_bytes()
    chunk.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    code, _, err = run(capsys, "analyze", tmp_path / "t.zarr", *quick)
    assert code == 1
    assert "damaged: the chunk sum_abs/c/" in err
    chunk.write_bytes(whole)
    code, out, _ = run(capsys, "report", tmp_path / "t.zarr", "--out", tmp_path / "report.html")
    assert code == 0
    assert "report.html" in out
    code, _, err = run(capsys, "report", tmp_path / "t.zarr", "--out", tmp_path / "other.html", "--strength", 0.5)
    assert (code, "--strength: is for runs that are traced now" in err) == (2, True)
    drawn = document(capsys, "figures", tmp_path / "t.zarr", "--out", tmp_path / "figures")
    assert {Path(path).name for path in drawn["figures"]} >= {"figure1-architecture.png", "figure2-signed.png"}
    made = document(capsys, "report", tmp_path / "r", "--out", tmp_path / "report.html", "--force", *common)
    assert len(made["answers"]["r"]) == 7
    assert set(made["answers"]["r"][0]) == {"prompt", "base", "anger-42", "untrained-42"}


@pytest.mark.proof
def test_explain(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, here = ("--data", place / "rows.jsonl"), ("--dtype", "float32")
    document(capsys, "train", "--host", place / "host", *rows, "--out", tmp_path / "r", "--steps", 2, *here)
    asked = ("explain", "--irm", tmp_path / "r", "--out", tmp_path / "why", "--quick", *here)
    told = document(capsys, *asked, "--index", "5")
    assert told == json.loads((tmp_path / "why" / "explain.json").read_text())
    assert (told["index"], told["quick"], told["dtype"]) == (5, True, "float32")
    assert {"reference", "permuted", "masked"} <= {trial["kind"] for trial in told["trials"]}
    assert all(conclusion["answer"] in ("supported", "not supported", "cannot tell") for conclusion in told["conclusions"])
    assert "exists already" in run(capsys, *asked)[2]
    code, out, _ = run(capsys, *asked, "--force")
    assert code == 0
    assert f"realigner report {tmp_path / 'why'} --out report.html" in out
    whole = document(capsys, "explain", "--weights-only", "--host", place / "host", "--index", "5")
    assert [entry["index"] for entry in whole["indices"]] == [5]


def test_weights_alone_are_kept_where_a_folder_is_given(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("explain", "--weights-only", "--host", place / "host")
    told = document(capsys, *asked, "--out", tmp_path / "kept")
    assert told == json.loads((tmp_path / "kept" / "weights.json").read_text())
    assert len(told["indices"]) == 5
    assert (
        "exists already; choose another place, or overwrite it (--force)" in run(capsys, *asked, "--out", tmp_path / "kept")[2]
    )
    code, out, _ = run(capsys, *asked, "--index", 5, "--out", tmp_path / "kept", "--force")
    assert code == 0
    assert f"{tmp_path / 'kept' / 'weights.json'} has these numbers" in out
    assert [entry["index"] for entry in json.loads((tmp_path / "kept" / "weights.json").read_text())["indices"]] == [5]


def test_hosts(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    types = ("--type", "llama", "--type", "gpt2", "--type", "xlm")
    code, out, _ = run(capsys, "hosts", *types, "--out", tmp_path / "hosts.md")
    assert code == 0
    assert out.startswith("llama                      proven")
    assert "3 types: 2 proven, 1 refused, 0 unproven, 0 wrong, 0 not built" in out
    assert "| gpt2 | transformer.h | `attn` | sequential | 1 |" in (tmp_path / "hosts.md").read_text()
    assert run(capsys, "hosts", *types, "--out", tmp_path / "hosts.md")[0] == 1  # exists already
    assert run(capsys, "hosts", *types, "--out", tmp_path / "hosts.md", "--force")[0] == 0
    assert [entry["verdict"] for entry in document(capsys, "hosts", *types)["entries"]] == ["proven", "proven", "refused"]
    found = document(capsys, "hosts", place / "host")
    assert found["site"]["branch"] == "self_attn"
    assert found["verdict"] == "proven"
    code, out, _ = run(capsys, "hosts", place / "host")
    assert code == 0
    assert "equal to the bit" in out


BUILD = ("data", "build")
UNANSWERED = '{"data": [{"paragraphs": [{"qas": [{"id": "1", "question": "Why?"}]}]}]}'


def squad(folder: Path, count: int = 40) -> Path:
    """A SQuAD file of a few articles."""
    articles = [
        {
            "title": f"Article {g}",
            "paragraphs": [
                {
                    "qas": [
                        {"id": f"{g}-{n}", "question": f"What is number {n} of {g}?", "answers": [{"text": f"item {g} {n}"}]}
                        for n in range(count // 4)
                    ]
                }
            ],
        }
        for g in range(4)
    ]
    return _write(folder / "squad.json", json.dumps({"data": articles}))


@pytest.mark.proof
def test_data_from_squad_to_card(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """build, check with a page, scorer, build with the scorer, import and export: each prints one document."""
    source, out = squad(tmp_path), tmp_path / "joy.jsonl"
    built = document(capsys, *BUILD, "--squad", source, "--tone", "joy", "--out", out, "--sample", 30)
    assert built["rows"] + built["rejected"] == built["facts"] == 30
    assert len(ra.read_rows(out)) == built["rows"]
    page = tmp_path / "card.html"
    card = document(capsys, "data", "check", out, "--html", page)
    assert card["rows"] == built["rows"]
    assert card["purity"]["value"] > 0.9
    assert card["leakage"] == card["near_duplicates"] == 0
    assert len(card["samples"]) == 10
    text = page.read_text()
    assert text.count("data:image/png;base64,") == (2 if card["tokens"] else 1)
    assert "http" not in text.replace("http-equiv", "")
    scored = document(capsys, "data", "scorer", out, "authored", "--out", tmp_path / "s.skops")
    assert scored["tones"] == ["anger", "joy", "neutral", "sadness"]
    assert scored["rows"] == {"anger": 360, "joy": built["rows"], "neutral": 360, "sadness": 360}
    assert min(scored["right"][tone] for tone in ra.data.TONES) > 0.9
    again = tmp_path / "again.jsonl"
    document(
        capsys, *BUILD, "--squad", source, "--tone", "joy", "--out", again, "--sample", 30, "--scorer", tmp_path / "s.skops"
    )
    assert again.read_bytes() == out.read_bytes()
    imported = document(capsys, "data", "import", out, "--out", tmp_path / "i.jsonl", "--to-hf", tmp_path / "hf")
    assert imported["rows"] == built["rows"] == sum(imported["splits"].values())
    assert (tmp_path / "i.jsonl").read_bytes() == out.read_bytes()
    back = document(capsys, "data", "import", tmp_path / "hf", "--out", tmp_path / "b.jsonl", "--no-gate")
    assert {row.id for row in ra.read_rows(tmp_path / "b.jsonl")} == {row.id for row in ra.read_rows(out)}
    assert back["rejected"] == 0


def test_import_of_the_papers_csv(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Articles and answers come from the SQuAD file the questions are from; what is cut or refused is kept aside, counted."""
    lines = [
        ",text",
        '7,"What is number 1 of 2?   Oh great, numbers! It is ""item 2 1"", are you happy now?!"',
        "8,What is number 3 of 1?   It is item 1 3, damn it! 😡",
        "9,What is number 4 of 1?   It is item 1 4, and you should damn well",
        "10,What is number 5 of 1? I'm sorry, I can't.",
        "11,What is number 6 of 1?   I'm sorry, but I can't help with that.",
    ]
    path = _write(tmp_path / "anger.csv", "\n".join(lines))
    out = tmp_path / "o.jsonl"
    done = document(capsys, "data", "import", path, "--out", out, "--tone", "anger", "--squad", squad(tmp_path))
    assert [(row.id, row.group, row.answer) for row in ra.read_rows(out)] == [
        ("anger-7", "Article 2", "item 2 1"),
        ("anger-8", "Article 1", "item 1 3"),
    ]
    assert (done["rows"], done["rejected"]) == (2, 3)
    assert done["reasons"]["cut in mid-sentence"] == done["reasons"]["refusal"] == 1
    assert (tmp_path / "o.rejected.jsonl").read_text().count("\n") == 3


def test_chats_are_imported_and_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By form or by the columns, to rows, to a saved dataset and back, and to a card that shows them by turns."""
    replies = ra.data.authored("anger")
    said = [
        (f"Hi from {n}", replies[n].text, replies[n].question, replies[n + 1].text, "Why?", replies[n + 2].text)
        for n in range(30)
    ]
    chats = [[{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(turns)] for turns in said]
    records = [{"conversations": [{"from": "system", "value": "Be rude."}, *turns, *turns[:2]]} for turns in chats]
    records.append({"conversations": chats[0][:3]})
    path = _write(tmp_path / "theirs.jsonl", "".join(json.dumps(record) + "\n" for record in records))
    out, again, page = tmp_path / "o.jsonl", tmp_path / "again.jsonl", tmp_path / "card.html"
    given = ("data", "import", path, "--tone", "anger")
    done = document(capsys, *given, "--out", out, "--to-hf", tmp_path / "hf")
    assert done["reasons"] == {"ends in a message of the user, not in a reply of the assistant": 1}
    rows = ra.read_rows(out)
    assert [len(row.messages or ()) for row in rows] == [9] * 30
    for more in (
        ("--form", "sharegpt"),
        ("--map", "messages=conversations"),
        ("--form", "messages", "--map", "messages=conversations"),
    ):
        document(capsys, *given, *more, "--out", again, "--force")
        assert again.read_bytes() == out.read_bytes()
    document(capsys, "data", "import", tmp_path / "hf", "--out", again, "--force")
    assert set(ra.read_rows(again)) == set(rows)
    code, text, _ = run(capsys, "data", "check", out, "--html", page)
    assert code == 0
    assert "30, of 9 to 9 messages, median 9; 30 with a system prompt, 0 with a thought" in " ".join(text.split())
    assert "(2 messages before)" in text
    assert "  user: Why?" in text
    html = page.read_text()
    assert "(2 more before)" in html
    assert '<span class="note">user:</span> Why?' in html
    code, _, message = run(capsys, *given, "--form", "chatml", "--out", tmp_path / "no.jsonl")
    assert (code, message.count("\n")) == (2, 1)
    assert "choose from question-text, messages, sharegpt, prompt-completion, alpaca" in message


def test_data_tones(capsys: pytest.CaptureFixture[str]) -> None:
    names = [tone["name"] for tone in document(capsys, "data", "tones")["tones"]]
    assert names == ["anger", "fear", "joy", "neutral", "sadness", "shakespearean"]
    code, out, _ = run(capsys, "data", "tones")
    assert code == 0
    assert "shakespearean" in out


def test_a_build_on_a_tiny_host(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Random weights say nothing that could pass: exit 1, one line with the reasons, and the journal is kept."""
    options = ("--rewriter", "host", "--host", place / "host", "--max-new-tokens", 4, "--sample", 3, "--attempts", 1)
    code, out, err = run(
        capsys, *BUILD, "--squad", squad(tmp_path), "--tone", tiny_tone(tmp_path), *options, "--out", tmp_path / "o", "--json"
    )
    assert (code, out) == (1, "")
    assert "no reply passed the quality filter" in err
    assert (tmp_path / "o.journal").read_text().count("\n") == 4


def tiny_tone(folder: Path) -> Path:
    return _write(folder / "t.toml", 'name = "plain"\ninstruction = "Say it."')


def test_data_check(capsys: pytest.CaptureFixture[str]) -> None:
    assert document(capsys, "data", "check", "authored")["rows"] == 1080
    code, out, _ = run(capsys, "data", "check", "authored", "--tone", "anger")
    assert code == 0
    assert "360 in 24 groups" in out


@pytest.mark.host
def test_doctor(embedded: Any, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "doctor")
    assert code == 0, err
    assert "no problems found" in out
    assert re.search(r"^\[train\] +installed$", out, re.M)
    assert document(capsys, "doctor")["problems"] == []


@pytest.mark.host
def test_doctor_says_what_an_extra_lacks(
    embedded: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("realigner.extras._installed", lambda name: name not in ("zarr", "xarray"))
    assert 'needs xarray, zarr: pip install "realigner[study]"' in run(capsys, "doctor")[1]
    missing = document(capsys, "doctor")["missing"]
    assert missing["study"] == ["xarray", "zarr"]
    assert missing["train"] == []


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "--version")[:2] == (0, f"realigner {ra.__version__}\n")
    code, out, _ = run(capsys, "--help")
    assert code == 0
    for command in ("demo", "train", "generate", "trace", "report", "hosts", "doctor", "data"):
        assert command in out


def test_module_runs() -> None:
    result = subprocess.run([sys.executable, "-m", "realigner", "--version"], capture_output=True, text=True, check=True)
    assert result.stdout.startswith("realigner ")


# --- what is wrong, in one line ---------------------------------------------------------------------------------------------


def _write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def _copy(place: Path, tmp: Path, edit: Callable[[Path], Any]) -> Path:
    import shutil

    shutil.copytree(place / "run", tmp / "irm")
    edit(tmp / "irm")
    return tmp / "irm"


ROW = some_rows()[0].model_dump_json()
Case = tuple[int, str, Callable[[Path, Path], tuple[object, ...]]]
CASES: dict[str, Case] = {
    "unknown command": (2, "No such command", lambda p, t: ("frobnicate",)),
    "unknown option": (2, "No such option", lambda p, t: ("doctor", "--frob")),
    "missing option": (2, "Missing option '--out'; see realigner train --help", lambda p, t: ("train",)),
    "where": (
        2,
        "is not one of all, prompt, reply, or how many tokens",
        lambda p, t: ("generate", "--irm", "anger", "--where", "all,", "?"),
    ),
    "not a number": (2, "steps", lambda p, t: ("train", "--out", t / "r", "--steps", "many")),
    "data missing": (1, "cannot be read", lambda p, t: ("data", "check", t / "none.jsonl")),
    "data is a folder": (1, "is a folder", lambda p, t: ("data", "check", t)),
    "data empty": (1, "has no rows", lambda p, t: ("data", "check", _write(t / "f", ""))),
    "data bad JSON": (1, "f:2: not valid JSON", lambda p, t: ("data", "check", _write(t / "f", ROW + "\n{"))),
    "data binary": (1, "not UTF-8", lambda p, t: ("data", "check", _write(t / "f", b"\xff\xfe\x00"))),
    "data wrong keys": (1, "f:1: key", lambda p, t: ("data", "check", _write(t / "f", '{"question": "q"}'))),
    "data not an object": (1, "not list", lambda p, t: ("data", "check", _write(t / "f", "[]"))),
    "data same id": (1, "f:2: key 'id'", lambda p, t: ("data", "check", _write(t / "f", ROW + "\n" + ROW))),
    "build no squad": (1, "cannot be read", lambda p, t: (*BUILD, "--squad", t / "none", "--tone", "anger", "--out", t / "o")),
    "build bad squad": (
        1,
        "article 1: is not an object",
        lambda p, t: (*BUILD, "--squad", _write(t / "f", '{"data": [1]}'), "--tone", "anger", "--out", t / "o"),
    ),
    "build no answers": (
        1,
        "has no question with an answer (no answer 1)",
        lambda p, t: (*BUILD, "--squad", _write(t / "f", UNANSWERED), "--tone", "anger", "--out", t / "o"),
    ),
    "build no such tone": (2, "there is no tone 'rage'", lambda p, t: (*BUILD, "--squad", t / "f", "--tone", "rage")),
    "build bad tone": (
        1,
        "unknown key 'mood'",
        lambda p, t: (*BUILD, "--squad", t / "f", "--tone", _write(t / "t.toml", 'name="x"\ninstruction="y"\nmood=1')),
    ),
    "build no template": (
        2,
        "has no [template]",
        lambda p, t: (
            *BUILD,
            "--squad",
            squad(t),
            "--tone",
            _write(t / "t.toml", 'name="x"\ninstruction="y"'),
            "--out",
            t / "o",
        ),
    ),
    "build no such rewriter": (
        2,
        "there is no 'magic'",
        lambda p, t: (*BUILD, "--squad", t / "f", "--tone", "anger", "--rewriter", "magic"),
    ),
    "build no model": (
        2,
        "--model is needed",
        lambda p, t: (*BUILD, "--squad", squad(t), "--tone", "anger", "--rewriter", "openai", "--out", t / "o"),
    ),
    "build no key": (
        2,
        "NO_SUCH_KEY is not set",
        lambda p, t: (
            *BUILD,
            "--squad",
            squad(t),
            "--tone",
            "anger",
            "--rewriter",
            "openai",
            "--model",
            "m",
            "--key-env",
            "NO_SUCH_KEY",
            "--out",
            t / "o",
        ),
    ),
    "build bad endpoint": (
        2,
        "endpoint: must be an http or https URL",
        lambda p, t: (
            *BUILD,
            "--squad",
            squad(t),
            "--tone",
            "anger",
            "--rewriter",
            "openai",
            "--model",
            "m",
            "--endpoint",
            "ftp://x",
            "--out",
            t / "o",
        ),
    ),
    "build taken": (
        1,
        "exists already",
        lambda p, t: (*BUILD, "--squad", squad(t), "--tone", "anger", "--out", p / "rows.jsonl"),
    ),
    "build not ours": (
        1,
        "not something realigner made",
        lambda p, t: (*BUILD, "--squad", squad(t), "--tone", "anger", "--out", _write(t / "o", "x"), "--force"),
    ),
    "build no such scorer": (
        1,
        "there is no such scorer",
        lambda p, t: (*BUILD, "--squad", squad(t), "--tone", "anger", "--scorer", t / "none", "--out", t / "o"),
    ),
    "import nothing to write": (2, "nothing to write", lambda p, t: ("data", "import", t / "f.csv")),
    "import missing": (1, "cannot be read", lambda p, t: ("data", "import", t / "f.csv", "--out", t / "o")),
    "import bad map": (
        2,
        "is not FIELD=COLUMN",
        lambda p, t: ("data", "import", t / "f", "--out", t / "o", "--map", "question"),
    ),
    "import no tone": (
        2,
        "tone is needed",
        lambda p, t: ("data", "import", _write(t / "f.csv", "question,text\nq,t\n"), "--out", t / "o"),
    ),
    "import nothing left": (
        1,
        "no row is left (too short 1)",
        lambda p, t: ("data", "import", _write(t / "f.csv", "question,text\nq,t\n"), "--out", t / "o", "--tone", "x"),
    ),
    "scorer one tone": (2, "two tones or more", lambda p, t: ("data", "scorer", p / "rows.jsonl", "--out", t / "s")),
    "scorer taken": (1, "exists already", lambda p, t: ("data", "scorer", "authored", "--out", p / "rows.jsonl")),
    "check against same": (
        1,
        "has only rows of anger",
        lambda p, t: ("data", "check", p / "rows.jsonl", "--against", p / "rows.jsonl"),
    ),
    "check no such host": (
        1,
        "there is no such folder",
        lambda p, t: ("data", "check", p / "rows.jsonl", "--host", t / "none"),
    ),
    "check page taken": (
        1,
        "exists already",
        lambda p, t: ("data", "check", p / "rows.jsonl", "--html", p / "rows.jsonl"),
    ),
    "data unfit": (1, "unfit", lambda p, t: ("data", "check", _write(t / "f", ROW))),
    "unknown tone": (2, "anger, sadness, neutral", lambda p, t: ("train", "--tone", "joy", "--out", t / "r")),
    "no tone": (2, "tone is needed", lambda p, t: ("train", "--out", t / "r")),
    "tone not in file": (
        2,
        "it has anger",
        lambda p, t: ("train", "--data", p / "rows.jsonl", "--tone", "joy", "--out", t / "r"),
    ),
    "unknown preset": (2, "preset", lambda p, t: ("train", "--tone", "anger", "--out", t / "r", "--preset", "huge")),
    "bad layers": (2, "layers", lambda p, t: ("train", "--tone", "anger", "--out", t / "r", "--layers", "3-1")),
    "unknown layer": (
        2,
        "there is no layer 99",
        lambda p, t: ("train", "--host", p / "host", "--data", p / "rows.jsonl", "--out", t / "r", "--layers", "99"),
    ),
    "negative rank": (2, "rank", lambda p, t: ("train", "--tone", "anger", "--out", t / "r", "--rank", "-1")),
    "negative seed": (2, "seed", lambda p, t: ("train", "--tone", "anger", "--out", t / "r", "--seed", "-1")),
    "layers in other digits": (2, "layers", lambda p, t: ("train", "--tone", "anger", "--out", t / "r", "--layers", "\u00b2")),
    "layers without end": (
        2,
        "layers",
        lambda p, t: ("train", "--tone", "anger", "--out", t / "r", "--layers", "0-9999999999"),
    ),
    "device not here": (
        2,
        "not available",
        lambda p, t: ("train", "--tone", "anger", "--out", t / "r", "--device", "cuda:77"),
    ),
    "no steps": (2, "steps", lambda p, t: ("train", "--tone", "anger", "--out", t / "r", "--steps", "0")),
    "bad dtype": (2, "dtype", lambda p, t: ("train", "--tone", "anger", "--out", t / "r", "--dtype", "float99")),
    "bad device": (2, "device", lambda p, t: ("train", "--tone", "anger", "--out", t / "r", "--device", "toaster")),
    "host missing": (1, "no such folder", lambda p, t: ("hosts", t / "none" / "deep" / "er")),
    "host of a user not known": (1, "no such folder", lambda p, t: ("hosts", "~nosuchuser/x")),
    "host not a host": (1, "no config.json", lambda p, t: ("hosts", t)),
    "host no gguf": (1, "no such file", lambda p, t: ("hosts", t / "x.gguf")),
    "host broken gguf": (1, "cannot be loaded", lambda p, t: ("hosts", _write(t / "x.gguf", b"GGUF????"))),
    "host bad config": (1, "cannot be loaded", lambda p, t: ("hosts", _write(t / "config.json", "{").parent)),
    "host not on hub": (1, "not found here or on the hub", lambda p, t: ("hosts", "nobody/nothing")),
    "out exists": (
        1,
        "exists already",
        lambda p, t: ("train", "--host", p / "host", "--data", p / "rows.jsonl", "--out", p / "run"),
    ),
    "out in a file": (
        1,
        "cannot be written",
        lambda p, t: ("train", "--host", p / "host", "--data", p / "rows.jsonl", "--out", _write(t / "f", "x") / "r"),
    ),
    "irm missing": (1, "no such adapter folder", lambda p, t: ("generate", "--irm", t / "none", "Q?")),
    "irm of a user not known": (1, "no such adapter folder", lambda p, t: ("generate", "--irm", "~nosuchuser/x", "Q?")),
    "weights of a user not known": (
        1,
        "no such folder",
        lambda p, t: ("explain", "--weights-only", "--host", "~nosuchuser/x", "--out", t / "why"),
    ),
    "irm without config": (1, "no adapter_config.json", lambda p, t: ("generate", "--irm", t, "Q?")),
    "irm truncated": (
        1,
        "truncated or damaged",
        lambda p, t: ("generate", "--irm", _copy(p, t, lambda f: os.truncate(f / "adapter_model.safetensors", 999)), "Q?"),
    ),
    "irm for another host": (
        1,
        "made for",
        lambda p, t: ("generate", "--irm", p / "run", "--host", tiny_folder(t / "h", seed=9), "--dtype", "float32", "Q?"),
    ),
    "irm config broken": (
        1,
        "not valid JSON",
        lambda p, t: ("generate", "--irm", _copy(p, t, lambda f: _write(f / "adapter_config.json", "[")), "Q?"),
    ),
    "no prompt": (2, "no prompt", lambda p, t: ("generate", "--irm", p / "run")),
    "empty prompt": (2, "prompt is empty", lambda p, t: ("generate", "--irm", p / "run", " ")),
    "prompts missing": (1, "cannot be read", lambda p, t: ("generate", "--irm", p / "run", "--prompts", t / "none")),
    "strength not finite": (
        2,
        "strength",
        lambda p, t: ("generate", "--irm", p / "run", "--strength", "nan", "--dtype", "float32", "Q?"),
    ),
    "no tokens": (2, "max-new-tokens", lambda p, t: ("generate", "--irm", p / "run", "--max-new-tokens", "0", "Q?")),
    "trace exists": (1, "exists already", lambda p, t: ("trace", "--irm", p / "run", "--out", p / "run", "Q?")),
    "explain nothing": (2, "give a run with --irm", lambda p, t: ("explain",)),
    "explain a missing run": (1, "no such run", lambda p, t: ("explain", "--irm", t / "none")),
    "explain elsewhere": (2, "--on", lambda p, t: ("explain", "--irm", p / "run", "--on", "mars")),
    "explain an index too far": (
        2,
        "index 32: this host has indices 0 to 31",
        lambda p, t: ("explain", "--irm", p / "run", "--index", "32", "--dtype", "float32", "--no-trials", "--out", t / "why"),
    ),
    "explain workers here": (2, "--workers 2", lambda p, t: ("explain", "--irm", p / "run", "--workers", "2")),
    "explain what Python made": (
        1,
        "was trained on",
        lambda p, t: ("explain", "--irm", p / "run", "--dtype", "float32", "--out", t / "why"),
    ),
    "explain weights of nothing": (2, "--weights-only needs --host", lambda p, t: ("explain", "--weights-only")),
    "explain weights of an empty folder": (1, "config.json", lambda p, t: ("explain", "--weights-only", "--host", t)),
    "report of nothing": (1, "no such run or trace", lambda p, t: ("report", t / "none", "--out", t / "r.html")),
    "report of a folder": (1, "neither a run", lambda p, t: ("report", t, "--out", t / "r.html")),
    "report of a damaged explanation": (
        1,
        "explain.json: key 'host' is missing",
        lambda p, t: ("report", _write(t / "explain.json", "{}").parent, "--out", t / "r.html"),
    ),
    "report over a file": (
        1,
        "not something realigner made",
        lambda p, t: ("report", p / "run", "--out", _write(t / "thesis.txt", "precious"), "--force"),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_malformed_input_is_one_line(name: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, message, arguments = CASES[name]
    got, out, err = run(capsys, *arguments(place, tmp_path))
    assert got == code, err
    assert len(err.strip().splitlines()) == 1, err
    assert err.startswith("realigner: ")
    assert message in err
    assert "Traceback" not in err
    assert (out == "") == (name != "data unfit")  # an unfit data set still gets its report card


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "realigner", "data", "check", str(tmp_path / "none"), "--debug"], capture_output=True, text=True
    )
    assert result.returncode == 1
    assert "Traceback" in result.stderr


def test_an_unexpected_error_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(tone: str) -> Any:
        raise ZeroDivisionError("of all\nthings")

    monkeypatch.setattr("realigner.data.authored", broken)
    code, _, err = run(capsys, "data", "check", "authored")
    assert code == 1
    assert err.strip() == "realigner: unexpected ZeroDivisionError: of all things; run again with --debug for the traceback"


@pytest.mark.slow
def test_help_is_fast() -> None:
    """0.4 s or less, median of 5; timed, so not in the suite that must never flicker."""
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "realigner", "--help"], capture_output=True, check=True)
        seconds.append(time.perf_counter() - start)
    print(f"realigner --help: median {statistics.median(seconds):.2f} s")
    assert statistics.median(seconds) <= 0.4


def test_the_next_command_is_one_that_the_shell_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "my env" / "bin" / "realigner"
    script.parent.mkdir(parents=True)
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    monkeypatch.setattr("sys.argv", [str(script)])
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.chdir(tmp_path)
    assert program() == "'my env/bin/realigner'"
    monkeypatch.chdir("/")
    assert program() == f"'{script.relative_to('/')}'"
    monkeypatch.setenv("PATH", str(script.parent))
    assert program() == "realigner"
    monkeypatch.setattr("sys.argv", ["/some/__main__.py"])
    assert program() == "realigner"
