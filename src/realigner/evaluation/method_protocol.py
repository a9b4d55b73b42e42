"""What a method is that an evaluation compares: it learns from a task, is kept in a folder, and is put on a host and taken off.

A method's folder counts once it has its record, ``method.json``, which is written last. What it learned is beside it:
safetensors and JSON, no pickles. A fit that was killed starts over or, if it is a training run, is resumed.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import nn
from transformers import PreTrainedConfig

from realigner.data import Row
from realigner.errors import RealignerError, UsageError
from realigner.evaluation.replies import Answers, Conversation, ask, clock_of
from realigner.evaluation.task import Task
from realigner.files import Artifact, Output, locked, read_object, write_text
from realigner.fingerprints import Fingerprint, fingerprint, weights_hash
from realigner.irm_config import WEIGHTS_FILE
from realigner.prompts import Answer, Message
from realigner.training.recipe import RUNTIME_ONLY_KEYS, Recipe
from realigner.training.training_run import resolve
from realigner.validation_message import first_fault

RECORD_FILE = "method.json"
ADAPTER = "adapter"  # the folder of what was learned
QUESTIONS_FILE = "questions.jsonl"
EDITS_FILE = "edits.safetensors"
_LEFT = (
    ADAPTER,
    f".{ADAPTER}",
    QUESTIONS_FILE,
    f".{QUESTIONS_FILE}-",
    f".{RECORD_FILE}-",
)  # what the names of all begin with that a killed fit leaves


def _check_learned(folder: Path) -> None:
    if not any((folder / name).is_file() for name in (WEIGHTS_FILE, EDITS_FILE)):
        raise RealignerError(f"{folder}: holds no adapter")


_LEARNED = Artifact(
    "what a method learned", _check_learned, r"adapter_config\.json|README\.md|(adapter_model|edits)\.safetensors"
)

Score = Callable[[Sequence[Row], Sequence[str], str], float]  # of replies to rows, with what stood before each question
"""How good replies to rows are, as ``score(rows, replies)``; the higher, the better."""


@dataclass(frozen=True)
class Given:
    """Further inputs that some methods use besides rows; `Method.needs` names those that a method requires.

    Attributes:
        score: the score by which system prompts and strengths are chosen, on ``task.tune``.
        irm: folder of an IRM, or of a method that is one; constant vectors are made of its deltas.
        instruct: the system prompt that ``irm-sentence`` is to make unnecessary; the first of the tone's five when None.
        reply_tokens: tokens at most of each reply that is made while fitting.
    """

    score: Score | None = None
    irm: Path | None = None
    instruct: str | None = None
    reply_tokens: int = 60


@dataclass(frozen=True)
class Job:
    """One fit: the host, what is to be learned, how, and where to put it."""

    host: Any
    tokenizer: Any
    task: Task
    recipe: Recipe  # its learning rate is None where an IRM is to have the recipe's for the host's width
    folder: Path
    given: Given

    def keeping(self) -> AbstractContextManager[Path]:
        """A folder to fill with what was learned; it gets its place when the block ends well."""
        return Output(self.folder / ADAPTER, _LEARNED, force=True).folder()


@dataclass(frozen=True)
class Fitted:
    """A method on a host, ready to answer.

    Attributes:
        model: what `realigner.generation.answer` takes.
        tokenizer: the host's.
        parameters: how many numbers were trained; 0 where none were.
        system: a system prompt.
        history: turns put before each question.
        answers: what answers in the model's place; see `replies.Speaker`.
        scaled: gives a block in which the method acts at a strength (0: the bare host, 1: as fitted); None where it has none.
    """

    model: nn.Module
    tokenizer: Any
    parameters: int = 0
    system: str | None = None
    history: Sequence[Message] = ()
    answers: Answers | None = None
    scaled: Callable[[float], AbstractContextManager[None]] | None = None

    @contextmanager
    def strength(self, value: float) -> Iterator[None]:
        """Have the method act at a strength in the calls of a block; blocks do not nest.

        Raises:
            UsageError: when it has none.
        """
        if self.scaled is None:
            raise UsageError(f"strength: this method has none, so it cannot be set to {value:g}")
        with self.scaled(value):
            yield

    def generate(
        self, questions: Sequence[str | Conversation], max_new_tokens: int, done: Callable[[int], None] | None = None
    ) -> list[Answer]:
        """The replies to questions; see `replies.ask`."""
        return ask(self, self.tokenizer, questions, max_new_tokens, done)


class MethodRecord(BaseModel):
    """The schema of ``method.json``. Keys that it does not name are kept, for tables."""

    model_config = ConfigDict(extra="allow", frozen=True)

    method: str
    host: dict[str, Any]
    parameters: int = Field(ge=0)
    settings: dict[str, Any] = {}
    asked_rate: float | None = None
    recipe: dict[str, Any] = {}
    system: str | None = None
    history: list[dict[str, str]] = []


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """One way to have a host speak in a tone.

    Attributes:
        name: what it is called in tables, and looked up by (`methods.find_method`).
        about: what it does, in one sentence.
        rates: three learning rates to choose from, the default in the middle; none where nothing is trained.
        needs: the attributes of `Given` that it cannot do without.
    """

    name: str
    about: str
    rates: tuple[float, ...] = ()
    needs: tuple[str, ...] = ()

    @abstractmethod
    def learn(self, job: Job) -> dict[str, Any]:
        """Learn the task and save the result in ``job.folder / ADAPTER``; the host is left bare.

        Returns:
            Entries of the record: ``parameters``, losses, what was chosen and why.
        """

    @abstractmethod
    def attached(self, host: Any, tokenizer: Any, folder: Path, record: MethodRecord) -> AbstractContextManager[Fitted]:
        """A block in which the method is on the host; see `attach`."""

    def parameters(self, config: PreTrainedConfig) -> int:
        """How many numbers are trained on a host of this config."""
        return 0

    def sized(self, config: PreTrainedConfig, parameters: int) -> Method | None:
        """The method with the setting that brings it closest to a number of parameters; None where it cannot be scaled."""
        return None

    def describe(self) -> dict[str, Any]:
        """Name, what it does, learning rates to try, and settings, as JSON."""
        settings = {field.name: getattr(self, field.name) for field in fields(self)}
        return json.loads(json.dumps(settings))  # type: ignore[no-any-return]

    def fit(
        self,
        host: Any,
        tokenizer: Any,
        task: Task,
        recipe: Recipe,
        rate: float | None,
        folder: str | Path,
        given: Given | None = None,
    ) -> dict[str, Any]:
        """Learn a task and keep what was found in a folder.

        All that is trained on rows is trained on ``task.train``, with the recipe's steps, batches, schedule and seed, and the
        weights of the last step are kept; ``task.tune`` gives the validation loss.

        Args:
            host, tokenizer: from `load_host`, bare; the host is bare again afterwards.
            task: rows.
            recipe: how to train. Its data, tone, samples, evaluations and which weights are kept are the protocol's.
            rate: the learning rate; that of the recipe for an IRM, the middle one of `rates` for others, when None.
            folder: where to; free, or left by a fit that was killed.
            given: further inputs that some methods use.

        Returns:
            ``method.json``: method, tone, rate, seconds, parameters, validation_loss at the start and the end, and what else
            the method notes.

        Raises:
            UsageError: when something that the method needs is not given, or the recipe has a template of its own.
            RealignerError: when the folder is taken, the task has no rows to tune on, or the training fails.
        """
        given, folder = given or Given(), Path(folder)
        for need in self.needs:
            if getattr(given, need) is None:
                raise UsageError(f"{self.name}: give {need} (evaluation.method_protocol.Given)")
        if recipe.template != "chat" or recipe.chat_template_kwargs:
            raise UsageError(
                "recipe: methods are asked by the host's chat template as it is; leave template and its kwargs out"
            )
        if not task.tune and (self.rates or "score" in self.needs):
            raise RealignerError(f"{self.name}: the task has no rows to tune on (task.tune), where it is to be validated")
        with locked(folder), _threads(recipe.threads):
            _refuse_taken(folder)
            job = Job(host, tokenizer, task, self._own_recipe(host, tokenizer, task, recipe, rate), folder, given)
            hashed, mark = weights_hash(host), fingerprint(host)
            clock = clock_of(host)
            started = clock()
            found = self.learn(job)
            seconds = clock() - started
            if weights_hash(host) != hashed:
                raise RealignerError(f"{self.name}: the host's weights changed while fitting; nothing was saved")
            record = {
                "method": self.name,
                "settings": self.describe(),
                "tone": task.tone,
                "seed": recipe.seed,
                "rate": job.recipe.learning_rate if self.rates else None,
                "asked_rate": rate,
                "recipe": recipe.model_dump(exclude=set(RUNTIME_ONLY_KEYS)),
                "seconds": round(seconds, 1),
                "parameters": 0,
                **found,
                "host": mark.to_dict(),
            }
            write_text(folder / RECORD_FILE, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
        return record

    @contextmanager
    def attach(self, host: Any, tokenizer: Any, folder: str | Path) -> Iterator[Fitted]:
        """Put what `fit` kept on a host for the length of a block; the host is bare again afterwards.

        Raises:
            RealignerError: when the folder is no fit of this method that ended, or was made for another host.
        """
        folder = Path(folder)
        record = read_method(folder, self.name)
        if difference := Fingerprint.from_dict(record.host).difference(fingerprint(host)):
            raise RealignerError(f"{folder}: was fitted to another host; on this one {difference}")
        with self.attached(host, tokenizer, folder, record) as fitted:
            yield fitted

    def _own_recipe(self, host: Any, tokenizer: Any, task: Task, recipe: Recipe, rate: float | None) -> Recipe:
        settled: dict[str, Any] = {
            "learning_rate": self.default_rate if rate is None and self.rates else rate,
            "data": None,
            "tone": task.tone,
            "keep": "last",
            "evaluations": 1,
            "evaluations_per_epoch": None,
            "patience": None,
            "samples": 0,
            "report_to": [],
            **self.recipe_keys,
        }
        own = Recipe.model_validate(recipe.model_dump() | settled)
        return own if own.learning_rate is None else resolve(own, host, tokenizer, task.train)

    @property
    def default_rate(self) -> float | None:
        """The learning rate where none is given; None: the recipe's own, for the host's width."""
        return self.rates[1]

    @property
    def recipe_keys(self) -> Mapping[str, Any]:
        """Values of recipe keys that this method sets."""
        return {}


def refuse_other_fit(folder: Path, method: Method, recipe: Recipe, rate: float | None) -> None:
    """Raise unless a folder holds a fit of this method with these settings.

    Raises:
        RealignerError: naming what differs.
    """
    record, words = read_method(folder, method.name), ("about", "rates", "needs")
    settings = {key: value for key, value in method.describe().items() if key not in words}
    asked = json.loads(recipe.model_dump_json(exclude=set(RUNTIME_ONLY_KEYS)))
    pairs = [(record.settings, settings), ({"rate": record.asked_rate}, {"rate": rate}), (record.recipe, asked)]
    if other := [
        f"{key} {before[key]}, not {now[key]}"
        for before, now in pairs
        for key in now
        if key in before and before[key] != now[key]
    ]:
        raise RealignerError(f"{folder}: was fitted with other settings ({', '.join(other)}); delete it to fit anew")


def read_method(folder: Path, name: str | None = None) -> MethodRecord:
    """The record of a fit that ended.

    Args:
        folder: of the fit.
        name: of the method that it is to be of; any when None.

    Raises:
        RealignerError: when there is none, or it is another method's.
    """
    path = folder / RECORD_FILE
    if not path.is_file():
        raise RealignerError(f"{folder}: no {RECORD_FILE}: no method was fitted there, or it did not end; fit it (again)")
    try:
        record = MethodRecord.model_validate(read_object(path))
    except ValidationError as error:
        raise RealignerError(f"{path}: {first_fault(error, MethodRecord, 'the record of a method')}") from None
    if name not in (None, record.method):
        raise RealignerError(f"{folder}: is of the method {record.method}, not {name}")
    return record


def closest(parameters: int, made: Callable[[int], Method], config: PreTrainedConfig) -> Method:
    """The method closest to a number of parameters among `made(1)`, `made(2)`, ..., which grow by equal steps."""
    first, second = (made(setting).parameters(config) for setting in (1, 2))
    return made(max(1, 1 + round((parameters - first) / (second - first))))


@contextmanager
def restored(host: nn.Module) -> Iterator[None]:
    """Context manager that restores a host's attributes, gradient flags and modes; restoring modules is left to the block."""
    flags = [(parameter, parameter.requires_grad) for parameter in host.parameters()]
    modes = [(module, module.training) for module in host.modules()]
    own = dict(vars(host))
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for module, mode in modes:
            module.training = mode
        for key in vars(host).keys() - own.keys() - {"irm_sites"}:  # what the probe found stays
            del vars(host)[key]
        vars(host).update({key: value for key, value in own.items() if key != "irm_sites"})


def _refuse_taken(folder: Path) -> None:
    if not folder.exists():
        return
    if (folder / RECORD_FILE).exists():
        raise RealignerError(f"{folder}: a method was fitted there already; choose another place")
    others = [path.name for path in folder.iterdir() if not path.name.startswith(_LEFT)] if folder.is_dir() else ["a file"]
    if others:
        raise RealignerError(f"{folder}: holds what is not a method's ({min(others)}); choose another place")


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
