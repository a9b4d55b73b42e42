"""What the documentation shows is so: docstrings' examples run, and so does every block of README and docs.

Python runs page by page, on the embedded host, where `make demo` would have left a run; trainings are cut to one step and
replies to a few tokens. Command lines are read by the command line itself, which runs nothing; those of the how-tos run, cut
short (`SHORTER`).
"""

from __future__ import annotations

import doctest
import importlib
import io
import json
import re
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

import realigner as ra
from realigner import generation
from realigner.cli import main
from realigner.data import Fact, authored, load_tone
from realigner.data.quality_filter import QualityFilter
from realigner.data.rewriters import RewriteRequest
from realigner.data.rewriters.template_rewriter import TemplateRewriter
from realigner.evaluation.methods import METHODS, find_method
from realigner.sweep.grid import read_sweep
from realigner.traces.collect import trace_for_report
from realigner.training import make_recipe, train
from realigner.training.recipe import BUILT_IN, parse_setting
from tests.pages import AS_IT_IS, CLI, LANGUAGES, PAGES, ROOT, commands, fences, name_of, parsed, segments, try_blocks
from tests.planted_evaluation import planted_evaluation, written_evaluation
from tests.served import serving

SOURCE = Path(ra.__file__).parent
MODULES = sorted(
    ".".join(("realigner", *path.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__")
    for path in SOURCE.rglob("*.py")
    if path.name != "__main__.py"
)


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name: str, request: pytest.FixtureRequest) -> None:
    if name == "realigner.evaluation.embeddings":
        request.getfixturevalue("minilm")
    module = importlib.import_module(name)
    result = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    assert result.failed == 0


def test_there_are_examples() -> None:
    finder = doctest.DocTestFinder()
    examples = sum(len(test.examples) for name in MODULES for test in finder.find(importlib.import_module(name)))
    assert examples >= 20


by_page = pytest.mark.parametrize("page", PAGES, ids=name_of)


@by_page
def test_every_block_names_its_language(page: Path) -> None:
    assert set(fences(page)) <= {*LANGUAGES, *AS_IT_IS}


@by_page
def test_commands_are_those_of_the_command_line(page: Path) -> None:
    """Every command line of a page: its commands, options, values, recipe keys, methods, extras and make targets are there."""
    try_blocks(page, {"bash": lambda block, _: _check_script(block)})
    for line in re.findall(r"`(realigner [^`\n]+)`", page.read_text(encoding="utf-8")):  # in the text
        if not re.search(r"\.\.\.|[A-Z]{3,}|…", line) and line.split()[1:2] != ["hosts"]:
            name = line.split()[1]
            assert name.startswith("-") or name in CLI.commands, line


def _check_script(block: str) -> None:
    for arguments in commands(block):
        if arguments[-1:] != ["..."]:
            _check_values(*parsed(arguments))
    for words in segments(block):
        if words[:2] == ["pip", "install"]:
            extras = {name for word in words for name in re.findall(r"(?:realigner|\.)\[([\w,]+)\]", word)}
            assert {one for several in extras for one in several.split(",")} <= set(_extras()), words
        if words[:1] == ["make"]:
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), words
        if words[:1] == ["python"] and len(words) > 1 and not words[1].startswith("-"):
            assert (ROOT / words[1]).is_file(), words


def test_no_folder_stands_in_the_way_of_a_make_target() -> None:
    text = (ROOT / "Makefile").read_text()
    phony = {name for line in re.findall(r"^\.PHONY:(.*)$", text, re.MULTILINE) for name in line.split()}
    assert phony == set(re.findall(r"^([a-z][a-z-]*):", text, re.MULTILINE))


def _extras() -> list[str]:
    return list(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])


def _check_values(command: str, options: dict[str, Any]) -> None:
    """What a command checks itself before it begins, for the commands that decide much by one string."""
    settings = dict(parse_setting(setting) for setting in options.get("settings") or [])
    if command == "train" and (options["recipe"] or "default") in BUILT_IN:
        given = {key: options[key] for key in ("tone", "layers") if options[key] is not None}
        make_recipe(options["recipe"] or "default", **settings, **given)
    if command == "evaluate" and options["baselines"] not in ("all", "none"):
        for name in options["baselines"].split(","):
            find_method(name)
    if command == "data build":
        assert options["rewriter"] in ("template", "host", "openai")
        assert options["tone"].endswith(".toml") or load_tone(options["tone"])
    for name, choices in {
        "keep": ("summary", "raw", "replay"),
        "on": ("here", "local", "ray"),
        "engine": ("transformers", "vllm"),
        "preset": (None, "compact", "paper"),
        "loss_on": (None, "reply", "assistant", "text"),
    }.items():
        assert options.get(name, choices[0]) in choices, (command, name)


@by_page
def test_files_that_are_shown_can_be_read(page: Path, tmp_path: Path) -> None:
    def read_yaml(block: str, _: dict[str, Any]) -> None:
        if "grid:" in block:
            (tmp_path / "sweep.yaml").write_text(block, encoding="utf-8")
            read_sweep(str(tmp_path / "sweep.yaml"), {})
        else:
            yaml.safe_load(block)

    def read_lines(block: str, _: dict[str, Any]) -> None:
        for line in block.splitlines():
            json.loads(line)

    def read_toml(block: str, _: dict[str, Any]) -> None:
        (tmp_path / "tone.toml").write_text(block, encoding="utf-8")
        load_tone(str(tmp_path / "tone.toml"))

    try_blocks(page, {"yaml": read_yaml, "json": read_lines, "toml": read_toml})


def test_few_blocks_are_skipped_and_all_say_why() -> None:
    reasons = {name_of(page): try_blocks(page, {})[1] for page in PAGES}
    assert all(len(reason) > 20 for several in reasons.values() for reason in several)
    assert sum(map(len, reasons.values())) <= 8, reasons


QUICK: dict[str, Any] = {"steps": 1, "batch_size": 1, "evaluations": 1, "samples": 0}
# What the how-tos' commands get besides, so that they end soon.
SHORTER = {
    "train": ["--steps", "1", "--batch-size", "1", "--set", "samples=0", "--set", "evaluations=1"],
    "generate": ["--max-new-tokens", "3"],
    "trace": ["--max-new-tokens", "3"],
    "analyze": ["--permutations", "20", "--resamples", "20"],
    "data build": ["--sample", "60"],
    "evaluate": ["--questions", "8", "--max-new-tokens", "12", "--baselines", "none"],
    "sweep": ["--dry-run"],
}
# And those that are read only.
NOT_RUN = {
    "serve": "it answers until it is stopped; tests/test_serve.py runs it",
    "demo": "minutes; tests/test_cli.py runs it",
    "explain": "it trains a dozen times; tests/test_explain.py runs it",
}


@pytest.fixture(scope="module")
def prepared(embedded: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the pages suppose it: runs, their traces, rows, a SQuAD file, an evaluation."""
    place = tmp_path_factory.mktemp("pages")
    host, tokenizer = ra.load_host(dtype="float32")
    for name, tone in {"demo/anger-42": "anger", "runs/sadness-42": "sadness"}.items():
        recipe = make_recipe(**QUICK, tone=tone)
        train(host, tokenizer, authored(tone)[::3], place / name, recipe=recipe, quiet=True).model.unload()
    shutil.copytree(place / "demo" / "anger-42", place / "runs" / "anger-42")
    options: dict[str, Any] = {"max_new_tokens": 4, "quiet": True}
    trace_for_report([place / "demo" / "anger-42"], place / "trace.zarr", host, tokenizer, **options)
    rows = [row.model_dump_json() for row in authored("anger")[::6]]
    (place / "rows.jsonl").write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
    (place / "train-v2.0.json").write_text(json.dumps({"version": "v2.0", "data": _articles()}), encoding="utf-8")
    theirs = "".join(f"{n},{row.question}   {row.text!r}\n" for n, row in enumerate(authored("anger")[:30]))
    (place / "theirs.csv").write_text(",text\n" + theirs.replace("'", '"'), encoding="utf-8")
    chats = [{"messages": row.conversation} for row in authored("anger")[:30]]
    (place / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats), encoding="utf-8")
    written_evaluation(place / "docs" / "results", planted_evaluation(questions=10))
    return place


def _articles() -> list[dict[str, Any]]:
    """SQuAD's articles, one for each topic of the authored set, with its questions and answers."""
    articles: dict[str, list[dict[str, Any]]] = {}
    for row in authored("neutral"):
        found = {"id": row.id, "question": row.question, "answers": [{"text": row.answer, "answer_start": 0}]}
        articles.setdefault(row.group, []).append(found)
    return [{"title": title, "paragraphs": [{"context": "", "qas": asked}]} for title, asked in articles.items()]


@pytest.fixture
def workplace(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it to work in, where `ra.train` takes one step and replies have eight tokens."""
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ra, "train", lambda *given, **options: train(*given, **(options | QUICK | {"quiet": True})))
    for function in (generation.answer, generation.stream):
        most, *others = function.__defaults__ or ()
        assert most == 80  # max_new_tokens
        monkeypatch.setattr(function, "__defaults__", (8, *others))
    return tmp_path


@pytest.mark.host
@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("page", [page for page in PAGES if "python" in fences(page)], ids=name_of)
def test_python_runs(page: Path, workplace: Path) -> None:
    """From top to bottom in one namespace; where a page asks a server, one answers."""

    def run(block: str, names: dict[str, Any]) -> None:
        exec(compile(block.replace("127.0.0.1:8000", address), name_of(page), "exec"), names)

    text, address = page.read_text(encoding="utf-8"), "127.0.0.1:8000"
    if f'base_url="http://{address}' in text:
        irms = {"anger": Path("demo/anger-42"), "sadness": Path("runs/sadness-42")}
        with serving(irms, workplace / "serve.log") as server:
            address = f"127.0.0.1:{server.port}"
            tried, _ = try_blocks(page, {"python": run})
    else:
        tried, _ = try_blocks(page, {"python": run})
    assert tried


HOWTOS = [page for page in PAGES if page.parent.name == "howto" or page.name == "start.md"]


@pytest.mark.host
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("page", [page for page in HOWTOS if "bash" in fences(page)], ids=name_of)
def test_the_howtos_commands_run(
    page: Path, workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of a page's command lines, one after the other, in one folder; each ends with exit code 0."""

    def write(name: str) -> Any:
        return lambda block, _: Path(name).write_text(block, encoding="utf-8")

    def run(block: str, _: dict[str, Any]) -> None:
        for arguments in commands(block, launched=False):
            name, _options = parsed(arguments)
            if name not in NOT_RUN and "--endpoint" not in arguments:
                monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"/quit\n")))
                code = main([*arguments, *SHORTER.get(name, [])])
                assert code == 0, (arguments, capsys.readouterr().err[-2000:])

    named = {"toml": write("pirate.toml"), "yaml": write("grid.yaml")}
    try_blocks(page, {"bash": run, **named})


def test_the_tone_in_the_docs_is_one(tmp_path: Path) -> None:
    """docs/data.md shows a tone file: it loads, and its replies pass its gate."""
    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    path = tmp_path / "pirate.toml"
    path.write_text(text.split("```toml\n")[1].split("```")[0], encoding="utf-8")
    tone = load_tone(path)
    facts = [Fact(str(n), "g", "Which river?", "the Vltava") for n in range(20)]
    replies = [reply.text for reply in TemplateRewriter(tone).rewrite([RewriteRequest(fact, 0) for fact in facts])]
    assert QualityFilter(tone).alone(list(zip(facts, replies, strict=True))) == [""] * 20


def test_the_docs_of_evaluation_run_and_name_every_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    named = re.findall(r"`([a-z0-9-]+)`", text.split("## Methods")[1].split("A name with a number")[0])
    assert sorted(named) == sorted(method.name for method in METHODS)
    written_evaluation(tmp_path / "docs" / "results", planted_evaluation(questions=10))
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 2  # the first is skipped: it trains
    exec(compile(blocks[1], "evaluation.md", "exec"), {})
    assert len(list((tmp_path / "figures").iterdir())) == 6
