"""The schema of ``explain.json``: the answer to "why this index?", written by `explain`, read by the report. No torch."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, ValidationError, model_validator

from realigner.errors import RealignerError
from realigner.files import Artifact, read_object, taken
from realigner.validation_message import first_fault

RESULT_FILE = "explain.json"
Answer = Literal["supported", "not supported", "cannot tell"]
Number = Annotated[  # JSON has neither NaN nor infinities: null
    float,
    BeforeValidator(lambda value: math.nan if value is None else value),
    PlainSerializer(lambda value: value if math.isfinite(value) else None, return_type=float | None, when_used="json"),
]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True)


class Conclusion(_Part):
    """One question about an index, answered.

    Attributes:
        key, question: short name, and the question in words.
        answer: ``"supported"``, ``"not supported"`` or ``"cannot tell"``.
        words: the finding, with effect, interval and n.
        n, unit: sample size, and what it counts: runs, trials, rows or indices.
    """

    key: str = ""
    question: str
    answer: Answer
    words: str
    n: int
    unit: str


class IndexFact(_Part):
    """One measurement at an index, and its rank (1 is the largest) among `n` indices."""

    measurement: str
    about: str
    value: Number
    times_median: Number
    rank: int
    n: int


class IndexRank(_Part):
    """The rank of the index in one IRM; its score `ratio`, in multiples of the median; the leading index `leader`."""

    irm: str
    rank: int
    ratio: Number
    leader: int


class TrialResult(_Part):
    """The rank of the index in one training with one thing changed.

    Attributes:
        kind, seed: of the trial; see `verdict.KINDS`.
        place: the index's number on the trial's host (a different number if indices are permuted).
        rank, ratio: its rank and its score, in multiples of the median.
        leader, leader_ratio: the leading index (numbered as on the original host) and its score.
        loss, bare_loss: nats per target with and without the IRM, on rows that it was not trained on.
        learned: ``bare_loss - loss``.
    """

    kind: str
    seed: int
    place: int
    rank: int
    ratio: Number
    leader: int
    leader_ratio: Number = math.nan
    loss: Number
    bare_loss: Number = math.nan
    learned: Number


class Ablation(_Part):
    """The loss under one ablation, in nats per target, and its change with a 95% interval over `n` rows."""

    how: str
    index: int
    group: str
    loss: Number
    change: Number
    low: Number
    high: Number
    n: int


class Correlation(_Part):
    """Spearman's rho of a measurement with the scores of the IRMs, or of untrained ones; 95% interval over `n` indices."""

    scores: str
    measurement: str
    rho: Number
    low: Number
    high: Number
    p: Number
    p_holm: Number
    n: int


class Regression(_Part):
    """Cross-validated R^2 of the scores' ranks on all measurements; 95% interval; mean and p under permutation."""

    r2: Number
    low: Number
    high: Number
    null: Number
    p: Number
    n: int


class Profiles(_Part):
    """The index layer by layer: multiples of the layer's median, and the share of the host's residual that is cancelled."""

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
    """One leading index: its measurements, and the tokens whose logits rise (`up`) and fall (`down`) with it."""

    facts: list[IndexFact]
    up: list[str] = []
    down: list[str] = []


class Explanation(_Part):
    """The answer, and the evidence for it.

    Attributes:
        host: name of the base model.
        irms: name -> folder.
        index, cause, words: the index, why it leads (a key of `verdict.CAUSES`), and that in one sentence.
        quick: whether the small budget was used.
        steps: of each trial at most, where that was asked for.
        dtype: of the host while it was measured.
        ablated_in: the dtype of the ablations.
        conclusions: one for each question.
        facts: the measurements at the index.
        standings: its rank in each IRM.
        correlations: of each measurement with the scores.
        trials: None: none were run.
        spread_sd, spread_df: how far a score varies between training runs, see `verdict.Spread`; 0 degrees of freedom: unknown.
        ablations: IRM -> from `ablate.delta_ablations`.
        host_ablation: from `ablate.host_ablations`; empty: not run.
        explained: ``IRMs`` and ``untrained`` -> the regression of their scores on all measurements.
        profiles: the index layer by layer.
        pages: the index and other leading ones.
        measured: measurement -> its value at every index.
        folder: where it was read from; not in the file.
    """

    host: str
    irms: dict[str, str]
    index: int
    cause: str = ""
    words: str
    quick: bool
    steps: int | None = None
    dtype: str = ""
    ablated_in: str = ""
    conclusions: list[Conclusion]
    facts: Annotated[list[IndexFact], Field(min_length=1)]
    standings: list[IndexRank] = []
    correlations: list[Correlation]
    trials: list[TrialResult] | None
    spread_sd: Number = math.nan
    spread_df: int = 0
    ablations: dict[str, list[Ablation]]
    host_ablation: list[Ablation] = []
    explained: dict[str, Regression]
    profiles: Profiles
    pages: dict[int, AboutIndex]
    measured: dict[str, list[Number]] = {}
    folder: Annotated[Path, Field(exclude=True)] = Path()

    @property
    def width(self) -> int:
        """The number of indices of the host's residual stream."""
        return self.facts[0].n

    def to_dict(self) -> dict[str, Any]:
        """JSON values; NaN is None."""
        return self.model_dump(mode="json")

    def text(self) -> str:
        """The text of ``explain.json``."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    def save(self, out: str | Path, force: bool = False) -> None:
        """Write ``explain.json`` into a folder, in place of an older one only with `force`.

        Raises:
            RealignerError: when one is there, or it cannot be written.
        """
        with taken(Path(out) / RESULT_FILE, EXPLANATION, force) as place:
            place.write(self.text())


EXPLANATION = Artifact("an explanation", lambda path: read_explanation(path.parent))


def is_explanation(folder: Path) -> bool:
    """Whether a folder was written by `explain`."""
    return (folder / RESULT_FILE).is_file()


def read_explanation(folder: Path) -> Explanation:
    """Read ``explain.json`` from a folder.

    Raises:
        RealignerError: naming the file, and the key that is missing or invalid.
    """
    path = folder / RESULT_FILE
    again = "ask again with realigner explain when it is moved away (its trials are kept)"
    try:
        found = read_object(path)
    except RealignerError as error:
        raise RealignerError(f"{error}; {again}") from None
    try:
        return Explanation.model_validate({**found, "folder": folder})
    except ValidationError as error:
        raise RealignerError(f"{path}: {first_fault(error, Explanation, 'an explanation')}; {again}") from None
