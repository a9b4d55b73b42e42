"""The grid: a YAML file that lists values for some keys of a recipe, and its runs."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from realigner.data import TONES
from realigner.data.squad import file_sha256
from realigner.errors import RealignerError, UsageError
from realigner.files import decoded, read_bytes
from realigner.training.recipe import (
    BUILT_IN,
    LATER_KEYS,
    MOST_YAML,
    RUNTIME_ONLY_KEYS,
    Name,
    Recipe,
    read_recipe,
    read_yaml,
)
from realigner.validation_message import first_fault

PAPER = Path(__file__).parent / "paper.yaml"
_MOST_RUNS = 10_000
_LESSON = ("instruct", "questions", "teacher_replies", "data_weight")
_TRAINING = ("tone", "data", "steps", "epochs", *_LESSON)  # what an untrained IRM does not know


class Sweep(BaseModel):
    """A sweep file.

    Attributes:
        recipe: ``default``, ``paper``, or a file (relative to the sweep's).
        set: keys of the recipe with other values, for every run.
        grid: a key of the recipe -> its values; the runs are all combinations.
        data: a tone -> its rows' file (relative to the sweep's); other tones take the recipe's `data`.
        baselines: also one untrained IRM (``steps: 0``) for each combination of everything but the tone.
        workers: runs at a time.
        gpus: GPUs a run takes, also a part of one.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    recipe: Name = "default"
    set: dict[str, Any] = Field(default_factory=dict)
    grid: dict[str, list[Any]] = Field(default_factory=dict)
    data: dict[str, Name] = Field(default_factory=dict)
    baselines: bool = False
    workers: int = Field(default=1, ge=1)
    gpus: float = Field(default=0.0, ge=0)


@dataclass(frozen=True)
class RunSpec:
    """A run of a sweep.

    Attributes:
        name: the hash of everything that decides what it is: its folder's name.
        recipe: what to train.
        varies: the keys that tell it from the others.
    """

    name: str
    recipe: Recipe
    varies: dict[str, Any]

    @property
    def label(self) -> str:
        """The keys that vary, for people."""
        return label_of(self.varies) or self.name


def read_sweep(file: str | Path, settings: Mapping[str, Any] | None = None) -> tuple[Sweep, Path]:
    """A sweep file, with more keys set for every run, and the folder that its paths are relative to.

    Raises:
        RealignerError: naming the file, the line and the key of the first thing that is wrong.
        UsageError: when there is no such file.
    """
    path = PAPER if str(file) == "paper" else Path(file)
    if not path.is_file():
        raise UsageError(f"sweep {file}: there is no such file; 'paper' is the paper's own")
    text = decoded(read_bytes(path, MOST_YAML), path)
    values, lines = read_yaml(text, str(path))
    try:
        sweep = Sweep.model_validate(values)
    except ValidationError as error:
        key = str(error.errors()[0]["loc"][0]) if error.errors()[0]["loc"] else ""
        place = f"{path}:{lines[key]}" if key in lines else str(path)
        raise RealignerError(f"{place}: {first_fault(error, Sweep, 'a sweep')}") from None
    _check(sweep, lines, path)
    if settings:
        for key, value in settings.items():
            if fault := _fault(key, value):
                raise UsageError(f"settings: {fault}")
            if key in sweep.grid or (key == "data" and sweep.data):
                where = "grid" if key in sweep.grid else "data"
                raise UsageError(f"settings: {key!r} is given by the {where} of {path}; change it there")
        for key in ("data", "questions", "host"):  # paths are meant from where the command is given
            named = settings.get(key)
            if named not in (None, "authored") and (key != "host" or Path(named).exists()):
                settings = {**settings, key: str(Path(named).resolve())}
        sweep = sweep.model_copy(update={"set": {**sweep.set, **settings}})
    return sweep, path.parent


def _check(sweep: Sweep, lines: Mapping[str, int], path: Path) -> None:
    """Every key and value of `set` and `grid` on its own, so that the first bad one is named with its line."""
    pairs = [("set", key, [value]) for key, value in sweep.set.items()]
    for part, key, choices in [*pairs, *(("grid", key, choices) for key, choices in sweep.grid.items())]:
        place = f"{path}:{lines.get(f'{part}.{key}', 1)}: {part}"
        if key == "data" and sweep.data:
            raise RealignerError(f"{place}: 'data' is given by the sweep's own data too; leave out one of them")
        if not choices:
            raise RealignerError(f"{place}: {key!r} has no values")
        for value in choices:
            if fault := _fault(key, value):
                raise RealignerError(f"{place}: {fault}")
    tones = {str(tone) for tone in sweep.grid.get("tone", [sweep.set.get("tone")])}
    for tone in sweep.data:
        if tones != {"None"} and tone not in tones:
            raise RealignerError(f"{path}:{lines.get(f'data.{tone}', 1)}: data: no run has the tone {tone!r}")


def _fault(key: str, value: Any) -> str | None:
    """What is wrong with one value of a recipe, whatever the others are."""
    if key not in Recipe.model_fields:
        return f"a recipe has no key {key!r}; see realigner recipes default"
    try:
        Recipe.model_validate({key: value})
    except ValidationError as error:
        if error.errors()[0]["loc"]:  # else it is wrong together with a default
            return first_fault(error, Recipe, "a recipe")
    return None


def plan(sweep: Sweep, base: Path) -> list[RunSpec]:
    """The runs of a sweep, each once, in the grid's order, untrained baselines last.

    Raises:
        UsageError: naming the combination that is not a valid recipe or a tone that the authored set lacks; for a grid of more
            than 10,000 runs.
        RealignerError: when a data file is missing.
    """
    source = sweep.recipe if sweep.recipe in BUILT_IN else base / sweep.recipe
    recipe = read_recipe(source)
    count = prod(map(len, sweep.grid.values())) * (1 + sweep.baselines)
    if count > _MOST_RUNS:
        raise UsageError(f"sweep: grid: {count:,} combinations; a sweep has at most {_MOST_RUNS:,} runs, baselines included")
    digests: dict[str, str] = {}
    planned: dict[str, RunSpec] = {}
    for baseline in (False, True)[: 1 + sweep.baselines]:
        for values in itertools.product(*sweep.grid.values()):
            varies = dict(zip(sweep.grid, values, strict=True))
            run = _run_spec(recipe, sweep, base, varies, baseline, digests)
            planned.setdefault(run.name, run)
    return list(planned.values())


def _run_spec(
    recipe: Recipe, sweep: Sweep, base: Path, varies: dict[str, Any], baseline: bool, digests: dict[str, str]
) -> RunSpec:
    given = {**sweep.set, **varies}
    values = recipe.values_with(given)
    file = sweep.data.get(str(values.get("tone"))) or given.get("data")
    if file is not None and file != "authored":
        values["data"] = str((base / file).resolve())
    if given.get("questions", "authored") != "authored":
        values["questions"] = str((base / given["questions"]).resolve())
    if given.get("host") is not None and (base / given["host"]).exists():  # else a hub id, or the embedded one
        values["host"] = str((base / given["host"]).resolve())
    if baseline:
        values |= {"steps": 0, "epochs": None}
        varies = {key: value for key, value in varies.items() if key not in _TRAINING} | {"untrained": True}
    try:
        run = Recipe.model_validate(values)
    except ValidationError as error:
        raise UsageError(f"sweep: {label_of(varies) or 'the recipe'}: {first_fault(error, Recipe, 'a recipe')}") from None
    if run.has_rows and run.data == "authored" and run.tone not in TONES:
        found = "no tone is given" if run.tone is None else f"the authored set has no {run.tone!r}"
        raise UsageError(
            f"sweep: {label_of(varies) or 'the recipe'}: {found}; it has {', '.join(TONES)} (for others, give data a file)"
        )
    return RunSpec(_name(run, baseline, digests), run, varies)


def _name(recipe: Recipe, baseline: bool, digests: dict[str, str]) -> str:
    """The hash of a run: its recipe without what only decides how fast it goes, data by content and not by place."""
    values = {key: value for key, value in recipe.model_dump().items() if key not in RUNTIME_ONLY_KEYS}
    values |= recipe.by_preset
    later = {"masked": None, **LATER_KEYS}  # omitted where they ask for what was done before, so that earlier hashes hold
    values = {key: value for key, value in values.items() if key not in later or value not in (later[key], [])}
    if baseline:  # an untrained IRM is the same for all tones
        values = {key: value for key, value in values.items() if key not in _LESSON} | {"tone": None, "data": None}
    for key in ("data", "questions"):
        if not baseline and values.get(key) not in (None, "authored"):
            file = str(values[key])
            if file not in digests:
                digests[file] = file_sha256(file)
            values[key] = digests[file]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def label_of(varies: Mapping[str, Any]) -> str:
    """Keys with their values, for people."""
    texts = {key: json.dumps(v).replace(" ", "") if isinstance(v, (list, dict)) else v for key, v in varies.items()}
    return " ".join(f"{key}={text}" for key, text in texts.items())
