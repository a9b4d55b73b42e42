"""Explanations as `realigner explain` left them: read, checked, and put to the trace of their host. No torch."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import xarray as xr
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from realigner.errors import RealignerError
from realigner.explain.explanation import RESULT_FILE
from realigner.validation_message import first_fault

Number = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]  # JSON has no NaN


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True)


class Conclusion(_Part):
    """A question, answered; see `realigner.explain.verdict.Conclusion`."""

    question: str
    answer: Literal["supported", "not supported", "cannot tell"]
    words: str
    n: int
    unit: str


class Fact(_Part):
    """What is measured at an index, and its rank (1 the largest) among `n`."""

    measurement: str
    about: str
    value: Number
    times_median: Number
    rank: int
    n: int


class Trial(_Part):
    """A training with one thing changed, and where the index stood then."""

    kind: str
    seed: int
    place: int
    rank: int
    ratio: Number
    leader: int
    loss: Number
    learned: Number


class Ablation(_Part):
    """A change of loss, in nats per target, with its 95% interval over `n` rows."""

    how: str
    index: int
    group: str
    loss: Number
    change: Number
    low: Number
    high: Number
    n: int


class Correlation(_Part):
    """Spearman's rho of a measurement with the scores of the IRMs or of untrained ones."""

    scores: str
    measurement: str
    rho: Number
    low: Number
    high: Number
    p: Number
    p_holm: Number
    n: int


class Regression(_Part):
    """How much of the scores' ranks all measurements together foresee."""

    r2: Number
    low: Number
    high: Number
    null: Number
    p: Number
    n: int


class Profiles(_Part):
    """The index layer by layer: over the layer's median, and what is cancelled of the host's residual."""

    layer: list[int]
    residual: list[Number]
    gradient: list[Number]
    delta: dict[str, list[Number]]
    cancelled: dict[str, list[Number]]

    @model_validator(mode="after")
    def _one_a_layer(self) -> Profiles:
        lines = [self.residual, self.gradient, *self.delta.values(), *self.cancelled.values()]
        if any(len(line) != len(self.layer) for line in lines):
            raise ValueError("has not one value a layer")
        return self


class AboutIndex(_Part):
    """What is known of one leading index: its facts, and the tokens that its head's column pushes."""

    facts: list[Fact]
    up: list[str] = []
    down: list[str] = []


class Explained(_Part):
    """An explanation; see `realigner.explain.Explanation`.

    Attributes:
        folder: where it lies.
        host, index, words: of which host, which index, and the verdict.
        irms: name -> folder.
        quick: whether the small effort was made.
        dtype: of the host while it was measured.
        trials: None: none were made.
        ablations: IRM -> its ablations.
        host_ablation: those of the bare host; empty: not asked.
        explained: ``IRMs`` and ``untrained`` -> the regression on all measurements.
        pages: the index and other leading ones -> what is known of them.
    """

    folder: Path
    host: str
    index: int
    words: str
    quick: bool
    dtype: str = ""
    irms: dict[str, str]
    conclusions: list[Conclusion]
    facts: Annotated[list[Fact], Field(min_length=1)]
    trials: list[Trial] | None
    ablations: dict[str, list[Ablation]]
    host_ablation: list[Ablation] = []
    correlations: list[Correlation]
    explained: dict[str, Regression]
    profiles: Profiles
    pages: dict[int, AboutIndex]

    @property
    def width(self) -> int:
        """How many indices the host has."""
        return self.facts[0].n


def is_explained(folder: Path) -> bool:
    """Whether a folder is that of an explanation."""
    return (folder / RESULT_FILE).is_file()


def read_explained(folder: Path) -> Explained:
    """An explanation from its folder.

    Raises:
        RealignerError: naming the file, and the key that is missing or of the wrong kind.
    """
    path = folder / RESULT_FILE
    again = "ask again with realigner explain (its trials are kept)"
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RealignerError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (ValueError, RecursionError) as error:
        raise RealignerError(f"{path}: not JSON ({error}); {again}") from None
    if not isinstance(found, dict):
        raise RealignerError(f"{path}: not an explanation; {again}")
    try:
        return Explained.model_validate({**found, "folder": folder})
    except ValidationError as error:
        raise RealignerError(f"{path}: {first_fault(error, Explained, 'an explanation')}; {again}") from None


def irms_of(items: Sequence[Explained]) -> list[Path]:
    """The folders of the IRMs that are explained.

    Raises:
        RealignerError: naming the first that is gone.
    """
    for item in items:
        for name, folder in item.irms.items():
            if not Path(folder).is_dir():
                raise RealignerError(
                    f"{item.folder / RESULT_FILE}: its IRM {name} was in {folder}, which is not there (from {Path.cwd()}); "
                    "give its folder, or a trace of it, as a source too"
                )
    return [Path(folder) for item in items for folder in item.irms.values()]


def refuse_strangers(items: Sequence[Explained], hosts: Iterable[str]) -> None:
    """Raise for the first explanation of a host that is none of these (names or folders; unnamed ones may be any)."""
    names = {Path(host).name for host in hosts}
    for item in items:
        if not names & {item.host, ""}:
            raise _stranger(item, names)


def home_of(item: Explained, traces: Sequence[xr.Dataset]) -> int:
    """Which trace an explanation belongs to: one of its host, the one with most of its IRMs first.

    Raises:
        RealignerError: when none is of its host.
    """
    fitting = [place for place, trace in enumerate(traces) if _fits(item, trace)]
    if not fitting:
        raise _stranger(item, {f"{_host(trace) or 'an unnamed host'} ({trace.sizes['neuron']} indices)" for trace in traces})
    return max(fitting, key=lambda place: len(_shared(item, traces[place])))


def _stranger(item: Explained, hosts: Iterable[str]) -> RealignerError:
    return RealignerError(
        f"{item.folder}: explains index {item.index} of {item.host} ({item.width} indices), and the sources are of "
        f"{', '.join(sorted(hosts))}; give a trace or runs of {item.host} with it, or leave it out"
    )


def _host(trace: xr.Dataset) -> str:
    return Path(str(trace.attrs["host"])).name


def _fits(item: Explained, trace: xr.Dataset) -> bool:
    name = _host(trace)
    same = name == item.host if name else bool(_shared(item, trace))  # a host made in Python has no name
    whole = trace.sizes["neuron"] == item.width and {item.index, *item.pages} <= set(trace["neuron"].values.tolist())
    return same and whole


def _shared(item: Explained, trace: xr.Dataset) -> set[str]:
    return set(item.irms) & set(trace.attrs["runs"])
