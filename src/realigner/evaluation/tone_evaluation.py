"""One tone on one host: every method is fitted, asked the same questions, and scored. What is done is kept and not done again.

An evaluation's folder has one folder for each method and seed, which holds what the method learned (`method_protocol`) and
``measured.json``. Killed at any moment, it goes on with the method that it was at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from realigner.data import Row
from realigner.data.dataset_rows import question_key
from realigner.errors import RealignerError
from realigner.evaluation.measured import MEASURED, Effort, Measured, measure
from realigner.evaluation.method_protocol import RECORD_FILE, Fitted, Given, Method, read_method, refuse_other_fit
from realigner.evaluation.replies import Answers, Speaker, dtype_of, reply_losses
from realigner.evaluation.scores import ReplyScorers, Scores
from realigner.evaluation.side_effects import NeutralText, bare_speaker, some_passages
from realigner.evaluation.task import Task
from realigner.files import made_folder
from realigner.injection import attached_injectors
from realigner.settings import Settings
from realigner.training.recipe import Recipe

_CHEAP = {"dialogues": 0, "dropped": 0, "answers": 0}  # of an effort: replies, losses, and neutral text alone


@dataclass(frozen=True)
class Subject:
    """What is evaluated: a method, or an IRM.

    Attributes:
        name: of the method, or of an IRM.
        seed: of its training.
        folder: where what it says is kept.
        facts: of its training: parameters, seconds, ...
        attach: gives a block in which it is on the host.
    """

    name: str
    seed: int
    folder: Path
    facts: Mapping[str, Any]
    attach: Callable[[], AbstractContextManager[Fitted]]


@dataclass(eq=False)
class ToneEvaluation:
    """The evaluation of methods in one tone on one host.

    Attributes:
        host, tokenizer: from `load_host`; the host is bare between the methods.
        task: what is to be learned, and what is asked.
        folder: where everything is kept.
        recipe: by which methods are trained.
        effort: how much is asked.
        done: called with how many more questions were answered.
        bare_answers: what answers in the bare host's place; see `replies.Speaker`.
    """

    host: Any
    tokenizer: Any
    task: Task
    folder: Path
    recipe: Recipe
    effort: Effort = field(default_factory=Effort)
    done: Callable[[int], None] | None = None
    bare_answers: Answers | None = None

    @cached_property
    def bare(self) -> Measured:
        """The bare host on the test questions."""
        return self._bare_on(self.task, "bare", self.effort)

    @cached_property
    def scorers(self) -> ReplyScorers:
        """The scorers of replies to the test questions."""
        return ReplyScorers(self.task, self.bare)

    @cached_property
    def tuning_scorers(self) -> ReplyScorers:
        """The scorers of replies to the tuning questions."""
        task = replace(self.task, test=self.task.tune)
        return ReplyScorers(task, self._bare_on(task, "bare-tune", self.effort.model_copy(update=_CHEAP)))

    def fit(self, method: Method, name: str, seed: int = 42, rate: float | None = None, irm: Path | None = None) -> Path:
        """Fit a method to the task unless this has been done; returns its folder.

        Args:
            method: what to fit.
            name: of its folder.
            seed: of the training.
            rate: learning rate; the method's default when None.
            irm: folder of a fitted IRM, for methods that are made of one.
        """
        folder = self.folder / f"{name}-{seed}"
        recipe = self.recipe.changed(seed=seed)
        if (folder / RECORD_FILE).is_file():
            refuse_other_fit(folder, method, recipe, rate)
        else:
            if "score" in method.needs:
                self.prepare()
            given = Given(score=self._tuning_score, irm=irm, reply_tokens=self.effort.reply_tokens)
            method.fit(self.host, self.tokenizer, self.task, recipe, rate, made_folder(folder.parent) / folder.name, given)
        return folder

    def subject(self, method: Method, folder: Path) -> Subject:
        """A method that was fitted into a folder."""
        record = read_method(folder)
        facts = record.model_dump(exclude={"host", "method", "tone", "seed"})
        seed = int(getattr(record, "seed", self.recipe.seed))
        return Subject(method.name, seed, folder, facts, lambda: method.attach(self.host, self.tokenizer, folder))

    def measured(self, subject: Subject, strength: float | None = None, tuning: bool = False, cheap: bool = False) -> Measured:
        """What a subject does on the test questions; from its folder, if it was asked before.

        Args:
            subject: who is asked.
            strength: at which it acts; at its own when None.
            tuning: ask the tuning questions, not the test's.
            cheap: leave out dialogues, requests to drop the tone, and questions about passages.
        """
        name = "tune" if tuning else "measured"
        effort = self.effort.model_copy(update=_CHEAP) if cheap else self.effort
        place = subject.folder / (f"{name}.json" if strength is None else f"{name}-{strength:g}.json")
        if place.is_file():
            return self._asked_so(Measured.load(place), effort, place)
        named = {"method": subject.name, "tone": self.task.tone, "seed": subject.seed, "facts": subject.facts}
        rows = self.task.tune if tuning else self.task.test
        found = self._measure(_at(subject.attach(), strength), rows, effort, named, strength)
        made_folder(place.parent)
        found.save(place)
        return found

    def _asked_so(self, measured: Measured, effort: Effort, place: Path) -> Measured:
        if measured.effort != effort:
            raise RealignerError(f"{place}: was measured with other settings ({measured.effort}, not {effort}); delete it")
        if self.host is not None and measured.dtype not in (None, own := dtype_of(self.host)):
            raise RealignerError(
                f"{place}: was measured on a host in {measured.dtype}, not {own}; load it so, or delete the file"
            )
        return measured

    def scores(self, measured: Measured) -> Scores:
        """The scores of a method on the test questions."""
        return self.scorers.scores(measured)

    @cached_property
    def _neutral(self) -> NeutralText:
        return NeutralText(self._speaker, self.tokenizer, some_passages(self.effort.passages))

    @property
    def _speaker(self) -> Speaker:
        return bare_speaker(self.host, self.bare_answers)

    def _bare_on(self, task: Task, name: str, effort: Effort) -> Measured:
        place = self.folder / name / MEASURED
        if place.is_file():
            return self._asked_so(Measured.load(place), effort, place)
        named = {"method": "bare", "tone": task.tone, "seed": 42, "facts": {"parameters": 0}}
        found = self._measure(nullcontext(self._speaker), task.test, effort, named, None, shuffle=True)
        made_folder(place.parent)
        found.save(place)
        return found

    def _measure(
        self,
        attached: AbstractContextManager[Speaker],
        rows: Sequence[Row],
        effort: Effort,
        named: dict[str, Any],
        strength: float | None,
        shuffle: bool = False,
    ) -> Measured:
        neutral = self._neutral if effort.passages else None
        known = {question_key(row.question) for row in (*self.task.train, *self.task.tune, *self.task.scorer, *self.task.test)}
        asked = [item for item in some_passages(effort.answers) if question_key(item.question) not in known]
        options: dict[str, Any] = {"shuffle": shuffle, "done": self.done}
        return measure(attached, self._speaker, self.tokenizer, rows, neutral, asked, effort, named, strength, **options)

    def prepare(self) -> None:
        """Measure the bare host where still missing, and train the scorers. Call this while nothing is attached to the host."""
        _ = self.scorers, self.tuning_scorers

    def _tuning_score(self, rows: Sequence[Row], replies: Sequence[str], given: str = "") -> float:
        """The mean summary of replies to the tuning questions, by which prompts and strengths are chosen."""
        assert list(rows) == list(self.task.tune)
        with ExitStack() as stack:
            for injector in attached_injectors(self.host):
                stack.enter_context(injector.threads.using(Settings(irms=())))
            losses = reply_losses(self._speaker, self.tokenizer, [row.question for row in rows], replies)
        return float(self.tuning_scorers.summary(replies, losses, given).mean())


@contextmanager
def _at(attached: AbstractContextManager[Fitted], strength: float | None) -> Iterator[Fitted]:
    with attached as fitted, nullcontext() if strength is None else fitted.strength(strength):
        yield fitted
