"""The wheel as others install it: at most ten dependencies, a core that works alone, extras that hold what they need."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from importlib.metadata import distribution, packages_distributions
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import realigner as ra
from realigner.extras import FOLDERS

ROOT = Path(__file__).parent.parent
SOURCE = Path(ra.__file__).parent
# What we import and a direct dependency cannot be without.
COMES_WITH = {"markupsafe": "jinja2", "filelock": "torch", "huggingface_hub": "transformers"}
OPTIONAL = {"openai": "openai"}  # imported only where it is asked for, each in an extra of its own
ENGINE = {"vllm"}  # whose plugin the files `vllm_*.py` are: it imports them


def run(*command: str, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built by hatchling of this environment, or one that pip fetches."""
    folder = tmp_path_factory.mktemp("dist")
    here = ["--no-build-isolation"] if find_spec("hatchling") else []
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", *here, "--wheel-dir", str(folder), ".")
    (built,) = folder.glob("realigner-*.whl")
    return built


@pytest.fixture(scope="module")
def requirements(wheel: Path) -> list[Requirement]:
    """What the wheel's METADATA asks for."""
    with zipfile.ZipFile(wheel) as files:
        (name,) = (name for name in files.namelist() if name.endswith(".dist-info/METADATA"))
        lines = files.read(name).decode().splitlines()
    return [Requirement(line.partition(": ")[2]) for line in lines if line.startswith("Requires-Dist: ")]


def asked_by(requirements: list[Requirement], extra: str = "") -> list[Requirement]:
    """The requirements of the core, and of an extra."""
    return [item for item in requirements if item.marker is None or item.marker.evaluate({"extra": extra})]


def closure(asked: list[Requirement]) -> set[str]:
    """Every distribution that pip would install for these, here."""
    found: set[tuple[str, str]] = set()
    waiting = [(requirement, extra) for requirement in asked for extra in ("", *requirement.extras)]
    while waiting:
        requirement, extra = waiting.pop()
        key = (canonicalize_name(requirement.name), extra)
        if key in found:
            continue
        found.add(key)
        for line in distribution(requirement.name).requires or []:
            needed = Requirement(line)
            if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                waiting += [(needed, inner) for inner in ("", *needed.extras)]
    return {name for name, _ in found}


def bare_environment(place: Path) -> Path:
    """A virtual environment with nothing in it, not even pip; its python."""
    run(sys.executable, "-m", "venv", "--without-pip", str(place))
    return place / "bin" / "python"


def check_alone(python: Path, what: str) -> None:
    """Run core_alone.py or app_alone.py there, without this environment's settings."""
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    out = run(str(python), "-I", str(ROOT / "tests" / f"{what}_alone.py"), env={**kept, "HF_HUB_OFFLINE": "1"})
    assert f"the {what} works alone" in out, out


@pytest.mark.slow  # CI runs it, as make wheel-check
@pytest.mark.parametrize("what", ["core", "app"])
def test_the_wheel_works_alone(what: str, wheel: Path, requirements: list[Requirement], tmp_path: Path) -> None:
    """The wheel in an environment of its own; what it depends on is lent by links, so that nothing is fetched."""
    python = bare_environment(tmp_path / "bare")
    site = Path(sysconfig.get_path("purelib", vars={"base": str(tmp_path / "bare"), "platbase": str(tmp_path / "bare")}))
    for name in closure(asked_by(requirements, what)) - {"realigner"}:
        lent = distribution(name)
        for top in {file.parts[0] for file in lent.files or [] if file.parts[0] not in ("..", "__pycache__")}:
            if not (site / top).exists():
                (site / top).symlink_to(str(lent.locate_file(top)))
    run(sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index", str(wheel))
    check_alone(python, what)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_wheel_works_alone_installed(wheel: Path) -> None:
    """The same, with everything fetched anew: ``pip install realigner-*.whl``, and then its ``[app]``."""
    with tempfile.TemporaryDirectory() as place:  # 1.4 GB, not to be kept
        python = bare_environment(Path(place))
        pip = (sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet")
        for what, extra in (("core", ""), ("app", "[app]")):
            run(*pip, "--constraint", "constraints.txt", f"{wheel}{extra}")
            check_alone(python, what)


def test_extras_are_there(requirements: list[Requirement]) -> None:
    core, everything = ({item.name for item in asked_by(requirements, extra)} for extra in ("", "all"))
    assert len(core) <= 10
    for extra in set(FOLDERS.values()):
        assert core < {item.name for item in asked_by(requirements, extra)} <= everything
    assert "trl" not in everything


def test_every_file_of_the_package_is_in_it(wheel: Path) -> None:
    """Prompts, tones, rows and templates too."""
    with zipfile.ZipFile(wheel) as files:
        there = set(files.namelist())
    ours = {path.relative_to(SOURCE.parent).as_posix() for path in SOURCE.rglob("*") if path.is_file()}
    assert {name for name in ours - there if "__pycache__" not in name} == set()


def imported(path: Path) -> set[str]:
    """The packages that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return found - sys.stdlib_module_names - {"realigner"}


def test_what_is_imported_is_declared(requirements: list[Requirement]) -> None:
    """A file of the core imports core dependencies only, one of the laboratory those of its extra too."""
    known = packages_distributions()
    for path in sorted(SOURCE.rglob("*.py")):
        extra = FOLDERS.get(path.relative_to(SOURCE).parts[0].removesuffix(".py"), "")
        declared = {canonicalize_name(item.name) for item in asked_by(requirements, extra)}
        others = {*OPTIONAL} if extra == "data" else ENGINE if path.name.startswith("vllm_") else set()
        for module in imported(path) - others:
            owners = {canonicalize_name(name) for name in [*known.get(module, []), COMES_WITH.get(module, "")] if name}
            assert owners & declared, f"{path.relative_to(SOURCE)}: {module} is not of {extra or 'the core'}"
