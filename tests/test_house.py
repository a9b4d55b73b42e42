"""The structure of the package: imports point downward, no cycles between files, no two files of one name, light imports."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import realigner as ra

SOURCE = Path(ra.__file__).parent
# Bottom-up import order: a file may import from its own layer and those before it.
FLOORS = [
    "errors", "markdown", "extras", "lazy", "prompts", "thoughts", "chat_format", "files", "console", "dialogues", "irm",
    "sites", "settings", "adapter_files", "gguf_cache", "irm_sources", "hosts", "probe", "locate", "residuals", "fingerprints",
    "injection", "adapters", "batching", "irm_config", "tuner", "thinking_budget", "generation", "runtime", "chat",
    "checkpoint_fingerprint", "serving", "oracle", "tiny", "census", "validation_message", "data", "training", "sweep",
    "traces", "analysis", "explain", "evaluation", "report", "app", "demo", "cli",
]  # fmt: skip


def files() -> dict[str, Path]:
    """Every source file by its module's name; a package's ``__init__.py`` by the package's."""
    found = {}
    for path in sorted(SOURCE.rglob("*.py")):
        parts = ("realigner", *path.relative_to(SOURCE).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


FILES = files()


def imported(path: Path) -> set[str]:
    """The modules of the package that a file imports: anywhere in it, in functions and under TYPE_CHECKING too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {module for name in names for module in [name if name in FILES else name.rpartition(".")[0]] if module in FILES}


def cycles() -> list[list[str]]:
    """Files that import each other, directly or through others, each group once."""
    reached: dict[str, set[str]] = {}
    edges = {module: imported(path) - {module} for module, path in FILES.items()}
    for start in edges:
        seen, waiting = set[str](), list(edges[start])
        while waiting:
            module = waiting.pop()
            if module not in seen:
                seen.add(module)
                waiting += edges[module]
        reached[start] = seen
    groups = [[other for other in reached if other in reached[module] and module in reached[other]] for module in reached]
    return [group for group, module in zip(groups, reached, strict=True) if module in reached[module] and group[0] == module]


@pytest.mark.parametrize("module", [name for name in FILES if name not in ("realigner", "realigner.__main__")])
def test_imports_point_downward(module: str) -> None:
    layer = module.split(".")[1]
    assert layer in FLOORS, f"{layer} has no layer: add it to FLOORS and to docs/architecture.md"
    above = {name.split(".")[1] for name in imported(FILES[module]) if name != "realigner"} - set(
        FLOORS[: FLOORS.index(layer) + 1]
    )
    assert not above


def test_no_file_imports_one_that_imports_it() -> None:
    assert cycles() == []


def test_no_two_files_have_one_name() -> None:
    counts = Counter(path.name for path in FILES.values() if path.name != "__init__.py")
    assert [name for name, count in counts.items() if count > 1] == []


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("realigner", ("torch", "transformers", "peft", "numpy", "pydantic", "rich")),
        ("realigner.cli", ("torch", "transformers", "peft", "numpy", "pydantic", "xarray", "matplotlib")),
        ("realigner.irm", ("transformers", "peft")),
        ("realigner.analysis", ("torch", "transformers", "peft")),
        ("realigner.traces.layout", ("torch", "transformers", "peft")),
        ("realigner.traces.store", ("torch", "transformers", "peft")),
        ("realigner.explain.verdict", ("torch", "transformers", "peft")),
        ("realigner.explain.explanation", ("torch", "transformers", "peft", "numpy", "xarray")),
        ("realigner.report.html_report", ("torch", "transformers", "peft")),
        ("realigner.data", ("torch", "transformers", "peft")),
        ("realigner.serving.mixes", ("torch", "transformers", "peft", "pydantic")),
        ("realigner.serving.api_request", ("torch", "transformers", "peft", "pydantic")),
    ],
)
def test_light_imports(module: str, forbidden: tuple[str, ...]) -> None:
    code = f"import sys, {module}; print([m for m in {forbidden!r} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "part", ["analysis", "data", "evaluation", "explain", "report", "serving", "sweep", "traces.verify_trace", "training"]
)
def test_parts_are_there_in_a_fresh_session(part: str) -> None:
    """Without an import of their own, whatever else has been used before."""
    subprocess.run([sys.executable, "-c", f"import realigner as ra; ra.{part}"], capture_output=True, check=True)


def test_public_names_exist() -> None:
    for name in ra.__all__:
        assert getattr(ra, name) is not None
    with pytest.raises(AttributeError, match="nothing_of_ours"):
        ra.nothing_of_ours  # noqa: B018
