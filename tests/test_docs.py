"""Every runnable example in a docstring runs."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path
from typing import Any

import pytest

import realigner as ra
from realigner.data import Fact, load_tone
from realigner.data.quality_filter import QualityFilter
from realigner.data.rewriters import RewriteRequest
from realigner.data.rewriters.template_rewriter import TemplateRewriter
from realigner.evaluation.methods import METHODS
from realigner.training import make_recipe, train
from tests.planted_evaluation import planted_evaluation, written_evaluation
from tests.tiny import some_rows

SOURCE = Path(ra.__file__).parent
ROOT = Path(__file__).parents[1]
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


@pytest.mark.host
@pytest.mark.slow
def test_the_readmes_python_runs(embedded: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Block by block in one namespace, where `make demo` would have left a run; training itself is cut to one step."""
    host, tokenizer = ra.load_host()
    quick = make_recipe(steps=1, batch_size=1, evaluations=1, samples=0)
    train(host, tokenizer, some_rows(), tmp_path / "demo" / "anger-42", recipe=quick, quiet=True).model.unload()
    (tmp_path / "rows.jsonl").write_text("".join(row.model_dump_json() + "\n" for row in some_rows()))
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (SOURCE.parents[1] / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 3
    names: dict[str, Any] = {}
    for block in blocks:
        quickly = block.replace('"runs/mine", seed=42)', '"runs/mine", seed=42, steps=1, samples=0)')
        exec(compile(quickly, "README.md", "exec"), names)
    assert (tmp_path / "runs" / "mine" / "adapter_model.safetensors").is_file()


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
    assert len(blocks) == 1
    exec(compile(blocks[0], "evaluation.md", "exec"), {})
    assert len(list((tmp_path / "figures").iterdir())) == 6
