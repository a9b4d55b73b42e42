"""The walls: imports point downward only, and what must be light is light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import realigner as ra

SOURCE = Path(ra.__file__).parent
# From the cellar up; a room may import rooms named before it.
FLOORS = [
    "errors", "extras", "lazy", "prompts", "files", "console", "irm", "sites", "settings", "hosts", "probe", "locate",
    "injection", "adapters", "tuner", "generation", "oracle", "tiny", "census", "validation_message", "data", "training",
    "sweep", "traces", "analysis", "explain", "report", "demo", "cli",
]  # fmt: skip


def rooms_imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("realigner."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("realigner.")}
    return found


def files() -> list[Path]:
    return [
        path
        for path in SOURCE.rglob("*.py")
        if path.name not in ("__main__.py",) and path.parent / path.name != SOURCE / "__init__.py"
    ]


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_point_downward(path: Path) -> None:
    room = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    assert room in FLOORS, f"{room} has no floor: add it to FLOORS and to docs/architecture.md"
    below = set(FLOORS[: FLOORS.index(room) + 1])
    assert rooms_imported(path) <= below


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("realigner", ("torch", "transformers", "peft", "numpy", "pydantic", "rich")),
        ("realigner.cli", ("torch", "transformers", "peft", "numpy", "pydantic", "xarray", "matplotlib")),
        ("realigner.irm", ("transformers", "peft")),
        ("realigner.analysis", ("torch", "transformers", "peft")),
        ("realigner.data", ("torch", "transformers", "peft")),
    ],
)
def test_light_imports(module: str, forbidden: tuple[str, ...]) -> None:
    code = f"import sys, {module}; print([m for m in {forbidden!r} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_public_names_exist() -> None:
    for name in ra.__all__:
        assert getattr(ra, name) is not None
    with pytest.raises(AttributeError, match="nothing_of_ours"):
        ra.nothing_of_ours  # noqa: B018
