"""The schema of what a run notes of itself: ``run.json``, ``metrics.jsonl``, a checkpoint's state. No torch.

Readers check a file against it and go on with its plain values, so keys that it does not name (a later version's) stay.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from realigner.errors import RealignerError
from realigner.training.recipe import Recipe
from realigner.validation_message import first_fault

_Count = Annotated[int, Field(ge=0, lt=2**63)]
_Positive = Annotated[int, Field(ge=1, lt=2**63)]
_Finite = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Layer = Annotated[int, Field(ge=0, lt=100_000)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True, strict=True)  # strict: "0" is no number


class DataFacts(_Part):
    """The rows, by content."""

    sha256: str
    tokens_sha256: str = ""


class HostFacts(_Part):
    """The host, by name and by content."""

    name: str
    dtype: str
    sha256: str
    fingerprint: dict[str, Any]


class ResidualFacts(_Part):
    """The host's residual stream, and what the IRM's scales are for it."""

    rms: list[_Finite]
    input_scale: _Finite
    delta_scale: _Finite | list[_Finite]


class TriedRate(_Part):
    """A short run of the search for a learning rate; its loss is None where it was not a finite number."""

    rate: _Finite
    loss: float | None


class SearchFacts(_Part):
    """The search for a learning rate (`rate_search.RateSearch`)."""

    rate: _Finite
    steps: _Count
    start: float
    tried: list[TriedRate]


class SiteFacts(_Part):
    """Where the IRM is injected (`sites.HostSites.summary`)."""

    layers: str
    branch: str | list[str]
    kind: str | list[str]


class IRMFacts(_Part):
    """The network, and how large it is beside its host."""

    preset: str
    layers: list[_Layer]
    parameters: _Count
    host_parameters: _Positive
    site: SiteFacts


class RunRecord(_Part):
    """``run.json`` of a run that has started: what was decided before its first step."""

    tone: str
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    recipe: Recipe
    data: DataFacts
    host: HostFacts
    processes: _Positive
    versions: dict[str, str]
    residual: ResidualFacts | None = None  # of runs that began before it was noted
    rate_search: SearchFacts | None = None


class FinishedRecord(RunRecord):
    """``run.json`` of a finished run, which adds the outcome."""

    steps_done: _Count
    interrupted: bool
    signal: str | None
    early_stop: bool
    best_step: _Count | None
    kept_step: _Count
    kept_loss: float | None = None  # validation loss of what was kept
    validation_loss: list[float]
    tokens: _Count
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    irm: IRMFacts


class MetricsEntry(_Part):
    """A line of ``metrics.jsonl``: the numbers of one step (losses in nats per token)."""

    step: _Count
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    loss: float = 0.0
    validation_loss: float = 0.0
    validation_kl: float = 0.0
    validation_ce: float = 0.0
    validation_loss_by_tone: dict[str, float] = {}
    tokens: _Count = 0


class TeacherEntry(_Part):
    """A line of ``teacher.jsonl``: a reply of the teacher."""

    number: _Count  # of the reply, in the order in which they are sampled
    question: str  # its id
    prompt: str | dict[str, Any]  # as a line of a prompts file has it
    reply: str
    thought: str = ""
    obedience: Annotated[float, Field(allow_inf_nan=False)]  # nats per token by which the instruction makes it likelier
    reason: str  # why it was rejected; empty: it was kept


class CheckpointRecord(_Part):
    """``trainer_state.json`` of a checkpoint, which is Trainer's: what we read of it."""

    global_step: _Count
    max_steps: _Count
    best_global_step: _Count | None = None
    stateful_callbacks: dict[str, dict[str, Any] | list[Any]] = {}


_FEW = 10  # validation rows: of fewer, a loss says little


def nats(value: float) -> str:
    """A loss for people: ``3.76``, ``0.021``."""
    return f"{value:.2f}" if abs(value) >= 1 else f"{value:.3f}"


def loss_name(record: dict[str, Any]) -> str:
    """What the validation loss of a run is: where there is nothing but a teacher's replies, the divergence from it."""
    alone = "teacher" in record and record["teacher"]["kept"] == record["data"]["rows"]
    return "KL from the teacher" if alone else "validation loss"


def verdict(record: dict[str, Any]) -> str:
    """In a line, whether the IRM of a finished run does better than it did untrained; empty where no loss was taken."""
    losses, kept = record["validation_loss"], record.get("kept_loss")
    if len(losses) < 2:
        return ""
    start, end = losses[0], losses[-1] if kept is None else kept
    name = loss_name(record)
    if end < start:
        gain = f"{start - end:.2f}" if start - end >= 0.005 else f"{start - end:.1g}"
        rows = (record.get("data") or {}).get("validation") or _FEW
        few = f", on {rows} validation row{'s' * (rows > 1)}" if rows < _FEW else ""
        worse = max((loss for loss in losses if loss > start), default=start) - start  # the best of several looks may be luck
        luck = f", but worse by {worse:.2g} at another evaluation" if worse >= start - end else ""
        return f"{name} {nats(start)} -> {nats(end)}: better than untrained by {gain} nats per token{few}{luck}"
    if end == start and record["kept_step"] and record["recipe"].get("keep") == "best":  # as far as the losses are written
        return f"{name} {nats(start)} -> {nats(end)}: better than untrained by less than 0.0001 nats per token"
    done = "the untrained IRM was kept" if record["kept_step"] == 0 else "the last weights were kept all the same (keep=last)"
    rate = record["recipe"]["learning_rate"]
    way = f"; lower it: {lower_rate(rate)}" if isinstance(rate, float) else ""
    return f"{name} {nats(start)} -> {nats(losses[-1])}: no better than untrained; {done}{way}"


def lower_rate(rate: float) -> str:
    """What to set where a learning rate was too high."""
    return f"learning_rate={rate / 3:.2g} or learning_rate=auto"


def checked(values: dict[str, Any], model: type[BaseModel], where: str | Path, name: str) -> dict[str, Any]:
    """The values, when they are as the model says.

    Raises:
        RealignerError: naming the place, the key and what is wrong with it.
    """
    try:
        model.model_validate(values)
    except ValidationError as error:
        fault = first_fault(error, model, name)
        raise RealignerError(f"{where}: {fault}; it is not {name} that realigner train wrote") from None
    return values
