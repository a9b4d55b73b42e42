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
    """``run.json`` of a run that was begun: what was decided before its first step."""

    tone: str
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    recipe: Recipe
    data: DataFacts
    host: HostFacts
    processes: _Positive
    versions: dict[str, str]


class FinishedRecord(RunRecord):
    """``run.json`` of a run that is finished: what came of it too."""

    steps_done: _Count
    interrupted: bool
    signal: str | None
    early_stop: bool
    best_step: _Count | None
    kept_step: _Count
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
    validation_loss_by_tone: dict[str, float] = {}
    tokens: _Count = 0


class CheckpointRecord(_Part):
    """``trainer_state.json`` of a checkpoint, which is Trainer's: what we read of it."""

    global_step: _Count
    max_steps: _Count
    best_global_step: _Count | None = None
    stateful_callbacks: dict[str, dict[str, Any] | list[Any]] = {}


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
