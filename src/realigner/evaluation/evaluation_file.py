"""The schema of ``evaluation.json``: what `evaluate` and the study found, read by the report. No torch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from realigner.errors import RealignerError
from realigner.explain.explanation import Number
from realigner.files import read_object
from realigner.validation_message import first_fault

RESULTS = "evaluation.json"
HOST_TONE = "bare"  # the tone of the host's own voice
_LARGEST = 1e12


def _sensible(value: float) -> float:
    if abs(value) > _LARGEST:
        raise ValueError("is too large a number")
    return value


Value = Annotated[Number, AfterValidator(_sensible)]  # NaN where the file has null
Strength = Annotated[float, Field(ge=-100, le=100)]
Count = Annotated[int, Field(ge=0, le=_LARGEST)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True)


class Mean(_Part):
    """A mean over questions, and its 95% interval."""

    mean: Value
    low: Value
    high: Value
    n: Count


class Estimates(_Part):
    """A method's means over the questions; what each measures is said in `scores.Scores`."""

    summary: Mean
    named: Mean
    probability: Mean
    named_2: Mean
    content: Mean
    fact: Mean
    fluency: Mean
    nats: Mean
    target: Mean
    away: Mean
    words: Mean
    ended: Mean
    distinct_1: Mean
    distinct_2: Mean
    repeated: Mean


class Whole(_Part):
    """A method's numbers that are not means over the questions; see `scores.Scores`."""

    ms_per_token: Value = math.nan
    about: Value = math.nan
    dropped: Value = math.nan
    before_dropped: Value = math.nan
    kl: Value = math.nan
    same: Value = math.nan
    text_loss: Value = math.nan
    shift_median: Value = math.nan
    shift_max: Value = math.nan
    turn_1: Value = math.nan
    turn_2: Value = math.nan
    turn_3: Value = math.nan


class Asked(_Part):
    """How much a method was asked besides the questions; see `measured.Effort`."""

    dialogues: Count = 0
    dropped: Count = 0
    passages: Count = 0
    answers: Count = 0


class MethodSettings(_Part):
    """What a method is, in a sentence."""

    about: str = ""


class Facts(_Part):
    """What a method says of itself."""

    parameters: Count = 0
    rate: Value | None = None
    settings: MethodSettings = MethodSettings()


class ScorerFacts(_Part):
    """How far the two scorers agree on a method's replies, and the share named by words' scorers of several seeds."""

    equal: Value
    kappa: Value
    by_seed: list[Value]


class MethodResults(_Part):
    """One method in one tone; see `results.tone_results`."""

    seeds: list[int]
    strength: Strength | None = None
    facts: Facts
    given: str = ""
    seconds: list[Value | None]
    asked: Asked = Asked()
    estimates: Estimates
    whole: Whole
    shift: Annotated[list[Value], Field(max_length=10_000)]
    scorers: ScorerFacts


class Difference(_Part):
    """A method less another on the same questions; see `compare.Comparison`."""

    method: str
    against: str
    difference: Mean
    p: Value
    p_holm: Value


class Example(_Part):
    """A question with every method's reply to it and the reply's summary."""

    question: str
    summary: dict[str, Value]
    replies: dict[str, str]


class CurvePoint(_Part):
    """The IRM's means over the test questions at one strength."""

    summary: Value
    probability: Value
    named: Value
    content: Value
    fact: Value
    nats: Value
    kl: Value
    shift_median: Value


class TunedPoint(_Part):
    """The IRM at one strength on the tuning questions; see `strength_choice.Point`."""

    strength: Strength
    summary: Mean
    named: Value
    nats: Value
    kl: Value
    shift: Value
    allowed: bool


class Tuned(_Part):
    """The chosen strength; see `strength_choice.StrengthChoice`."""

    strength: Strength
    low: Strength
    high: Strength
    points: Annotated[list[TunedPoint], Field(max_length=200)]
    max_kl: Value
    max_shift: Value


class Ratings(_Part):
    """A judge's mean ratings of a method's replies, 0 to 2, and of how many it gave none; see `judge.Ratings`."""

    concept: Mean
    instruction: Mean
    fluency: Mean
    score: Mean
    missing: Count


class Reference(_Part):
    """The share of the test rows' own replies that each scorer names in the tone; see `scores.ReplyScorers`."""

    named: Value
    named_2: Value


class Judged(_Part):
    """What a language model says of the methods' replies."""

    model: str
    methods: dict[str, Ratings]


class ToneResults(_Part):
    """The results in one tone; see `results.tone_results`.

    Attributes:
        reference: how the scorers name the test rows' own replies; None in a file from before this was noted.
        contrast: the other tones that scorers tell the tone from; empty in a file from before this was noted.
        curve: strength -> the IRM's means at it; empty where it was not measured.
        strength: the choice of one, if one was made.
        judge: its ratings, if one was asked.
    """

    questions: Count
    methods: Annotated[dict[str, MethodResults], Field(min_length=1, max_length=200)]
    against: str
    compared: dict[str, list[Difference]]
    examples: list[Example]
    reference: Reference | None = None
    contrast: list[str] = []
    curve: Annotated[dict[Strength, CurvePoint], Field(max_length=200)] = {}
    strength: Tuned | None = None
    judge: Judged | None = None

    @model_validator(mode="after")
    def _of_these_methods(self) -> ToneResults:
        named = {one.method for own in self.compared.values() for one in own}
        named |= set(self.judge.methods) if self.judge else set()
        named |= {method for example in self.examples for method in (*example.summary, *example.replies)}
        if unknown := sorted(named - set(self.methods)):
            raise ValueError(f"names the method {unknown[0]!r}, which has no results")
        return self

    @property
    def only_own_voice(self) -> bool:
        """Whether scorers tell the tone from nothing but the host's own voice."""
        return self.contrast == [HOST_TONE]

    @property
    def irm(self) -> MethodResults | None:
        """The IRM that other methods are compared with; None where it has no results."""
        return self.methods.get(self.against)

    def ranked(self) -> list[str]:
        """The methods, the best summary first."""
        return sorted(self.methods, key=lambda name: -_or_lowest(self.methods[name].estimates.summary.mean))

    def difference(self, measure: str, method: str) -> Difference | None:
        """A method's comparison with the IRM in a measure, if there is one."""
        return next((one for one in self.compared.get(measure, []) if one.method == method), None)


class EvaluationFile(_Part):
    """An evaluation.

    Attributes:
        host: name of the base model; None for one that was made in Python.
        irm: folder of the IRM; empty for a study of methods.
        tones: tone -> results.
        path: where it was read from; not in the file.
    """

    host: str | None = None
    irm: str = ""
    tones: Annotated[dict[str, ToneResults], Field(min_length=1, max_length=20)]
    path: Annotated[Path, Field(exclude=True)] = Path()


def _or_lowest(value: float) -> float:
    return value if math.isfinite(value) else -math.inf


def is_evaluation(place: Path) -> bool:
    """Whether a place is a folder with an ``evaluation.json``, or a JSON file itself."""
    return (place / RESULTS).is_file() or (place.suffix == ".json" and place.is_file())


def read_evaluation(place: Path) -> EvaluationFile:
    """Read an evaluation from its folder, or from the file itself.

    Raises:
        RealignerError: naming the file, and the key that is missing or invalid.
    """
    path = place if place.is_file() else place / RESULTS
    again = "run realigner evaluate again, which makes it anew"
    try:
        found = read_object(path)
    except RealignerError as error:
        raise RealignerError(f"{error}; {again}") from None
    try:
        return EvaluationFile.model_validate({**found, "path": path})
    except ValidationError as error:
        fault = first_fault(error, EvaluationFile, "an evaluation")
        raise RealignerError(f"{path}: not an evaluation ({fault}); {again}") from None
