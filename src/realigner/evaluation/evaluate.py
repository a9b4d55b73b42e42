"""Evaluate a run: its IRM, the bare host and other methods on questions that it was not trained on."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from realigner.console import progress
from realigner.data import TONES, Row, authored, read_rows, rows_hash
from realigner.data.data_split import split_rows
from realigner.data.endpoint import Endpoint
from realigner.errors import RealignerError, UsageError
from realigner.evaluation.compare import estimate
from realigner.evaluation.evaluation_file import HOST_TONE, RESULTS
from realigner.evaluation.irm_methods import irm_attached
from realigner.evaluation.judge import ASPECTS, rate
from realigner.evaluation.measured import MEASURED, Effort, Measured
from realigner.evaluation.measures import BEST
from realigner.evaluation.methods import METHODS, find_method
from realigner.evaluation.replies import Speaker, ask, dtype_of
from realigner.evaluation.results import plain, tone_results
from realigner.evaluation.served_replies import ServedIRM
from realigner.evaluation.side_effects import bare_speaker, evenly
from realigner.evaluation.strength_choice import MAX_KL, MAX_SHIFT, STRENGTHS, StrengthChoice, choose_strength
from realigner.evaluation.task import Task
from realigner.evaluation.tone_evaluation import Subject, ToneEvaluation
from realigner.files import made_folder, read_object, write_text
from realigner.irm import IRMShape
from realigner.irm_config import CONFIG_FILE, WEIGHTS_FILE, adapter_folder
from realigner.training import read_recipe, read_run
from realigner.training.recipe import Recipe
from realigner.training.run_dir import RECIPE_FILE, is_run

ASKED, OWN_VOICE, JUDGE = "asked.json", "own-voice.jsonl", "judge.json"
_TUNED_ON = 1 / 3  # of the topics that a run without test rows held out
_CONTRASTED = 120  # questions that the bare host is asked for a scorer to tell its voice from the tone
_LEAST = 8  # questions
_NETWORK = tuple(field.name for field in fields(IRMShape))  # keys of a recipe


def task_of(folder: Path, tune: bool) -> tuple[Task, Recipe]:
    """What a run was trained on, and what it held out, as a task.

    Args:
        folder: of a finished run, trained on rows.
        tune: whether something is to be chosen on tuning rows, which must then exist.

    Returns:
        The task, and the run's recipe. If the run has test rows, their questions are asked, and its validation rows, on which
        its checkpoint was chosen, are for tuning. Otherwise a third of the validation topics, if there are two or more, is for
        tuning, and the questions of the others are asked. The scorer rows are those of the topics that were trained on, in
        every tone that the data has.

    Raises:
        UsageError: for a run of several tones, or on an instruction.
        RealignerError: when it is no run, its data have changed, or it held out too little.
    """
    if not is_run(folder):
        raise RealignerError(f"{folder}: is not a finished run; give the folder that `realigner train --out` made")
    record, recipe = read_run(folder), read_recipe(folder / RECIPE_FILE)
    if recipe.instruct is not None:
        raise UsageError(f"{folder}: was trained on an instruction, which evaluate does not follow; give a run on rows alone")
    if recipe.data is None or recipe.tone in (None, "all"):
        raise UsageError(
            f"{folder}: was not trained on one tone's rows of a file or the authored set, which evaluate asks about"
        )
    rows = [row for name in TONES for row in authored(name)] if recipe.data == "authored" else read_rows(recipe.data)
    own = [row for row in rows if row.tone == recipe.tone]
    parts = split_rows(own, recipe.seed, recipe.validation, recipe.test)
    if rows_hash(own) != record["data"]["sha256"]:
        raise RealignerError(f"{recipe.data}: is not what {folder} was trained on; evaluate it with those rows")
    held, tuned = [*parts.validation, *parts.test], {row.group for row in parts.validation}
    held = [row for row in held if len(row.conversation) == 2]  # a question and its reply, with nothing before them
    if not parts.test:
        topics = sorted(tuned)
        if tune and len(topics) < 2:
            raise RealignerError(f"{folder}: held out {len(topics)} topic(s); train with test=0.3 to have some to tune on")
        random.Random(recipe.seed).shuffle(topics)
        tuned = set(topics[: max(1, round(_TUNED_ON * len(topics)))]) if len(topics) > 1 else set()
    test = [row for row in held if row.group not in tuned]
    if len(test) < _LEAST:
        raise RealignerError(
            f"{folder}: held out {len(test)} questions without earlier turns, fewer than {_LEAST}; train with test=0.3 for more"
        )
    learned = {row.group for row in parts.train}
    scorer = [row for row in rows if row.group in learned]
    return Task(recipe.tone, parts.train, [row for row in held if row.group in tuned], test, scorer), recipe


@dataclass(frozen=True)
class Result:
    """What an evaluation found.

    Attributes:
        tone: of the run.
        values: as JSON values: ``irm``, ``host``, and ``tones``, the tone -> its `results.tone_results`.
        choice: of the strength, if one was to be chosen.
    """

    tone: str
    values: dict[str, Any]
    choice: StrengthChoice | None

    @property
    def results(self) -> dict[str, Any]:
        """The results in the run's tone."""
        found: dict[str, Any] = self.values["tones"][self.tone]
        return found


def evaluate(
    irm: Path,
    out: Path,
    host: Any,
    tokenizer: Any,
    baselines: Sequence[str] = (),
    tune: bool = False,
    effort: Effort | None = None,
    questions: int | None = None,
    max_kl: float = MAX_KL,
    max_shift: float = MAX_SHIFT,
    judge: Endpoint | None = None,
    server: ServedIRM | None = None,
) -> Result:
    """Evaluate a run against the bare host and other methods.

    Measurements are kept in `out`, method by method, and not repeated: after an interruption, the same call resumes.

    Args:
        irm: the run's folder.
        out: where to keep what is measured; ``evaluation.json`` is written there last.
        host, tokenizer: from `load_host`; the host is bare.
        baselines: names of `methods.METHODS`; those that are trained learn from the run's training rows by its recipe, IRMs
            with the network of their presets. Those that were measured in `out` before are compared again.
        tune: choose the strength on a part of the held-out topics, and save it with the adapter; else the IRM acts at the
            strength that its adapter names.
        effort: how much is asked.
        questions: of the held-out ones at most; all when None.
        max_kl, max_shift: limits of the chosen strength.
        judge: a language model that rates the replies too (`judge.rate`); what it says is kept in `out`.
        server: the server on which the IRM and the bare host answer; losses and divergences are still computed with `host`, and
            baselines are not possible.

    Raises:
        UsageError: for an unknown baseline, or a run that cannot be evaluated.
        RealignerError: as `task_of`, and when something cannot be measured.
    """
    effort = effort or Effort()
    if tune and not effort.passages:
        raise UsageError("effort: passages is 0, and without neutral text no strength can be chosen (tune)")
    methods = [find_method(name) for name in baselines if name != "bare"]
    task, recipe = task_of(irm, tune or any("score" in method.needs or method.rates for method in methods))
    if methods and (recipe.template != "chat" or recipe.chat_template_kwargs):
        raise UsageError(f"{irm}: was not trained in the host's own chat form, in which methods are asked; give no baselines")
    if methods and server is not None:
        raise UsageError(f"--baselines {methods[0].name}: a server answers with IRMs alone; give --baselines none")
    refuse_another(out, irm, task, effort, questions, host, server)
    measured_before = f"{Path(MEASURED).stem}*.json"  # at whatever strength
    methods += [
        method
        for method in METHODS
        if method not in methods and any(out.glob(f"{method.name}-{recipe.seed}/{measured_before}"))
    ]
    if questions is not None:
        task = replace(task, test=evenly(task.test, questions))
    if len({row.tone for row in task.scorer}) < 2:
        voice = bare_speaker(host, None if server is None else server.bare_answers)
        task = replace(task, scorer=[*task.scorer, *_own_voice(task, voice, tokenizer, out, effort)])
    networks = {name: Recipe.model_fields[name].default for name in _NETWORK}
    evaluation = ToneEvaluation(host, tokenizer, task, out, recipe.model_copy(update=networks), effort)
    own = _subject(irm, out / "irm", host, tokenizer)
    if server is not None:
        evaluation.bare_answers, here = server.bare_answers, own.attach
        own = replace(own, attach=lambda: server.answering(here(), 1.0 if tune else _strength_of(irm) or 1.0))
    choice = None
    with progress("asking", _asked(evaluation, len(methods), tune)) as bar:
        evaluation.done = bar.advance
        entries = {"bare": [(evaluation.bare, evaluation.scores(evaluation.bare))]}
        if tune:
            tried = {value: evaluation.measured(own, value, tuning=True, cheap=True) for value in STRENGTHS}
            scores = {value: evaluation.tuning_scorers.scores(found) for value, found in tried.items()}
            choice = choose_strength(scores, max_kl, max_shift)
        used = _strength_of(irm) if choice is None else None if choice.strength == 1.0 else choice.strength
        measured = evaluation.measured(own, used)
        entries["irm"] = [(measured, evaluation.scores(measured))]
        for method in methods:
            folder = evaluation.fit(method, method.name, recipe.seed, irm=irm if "irm" in method.needs else None)
            measured = evaluation.measured(evaluation.subject(method, folder), used if "irm" in method.needs else None)
            entries[method.name] = [(measured, evaluation.scores(measured))]
    results = tone_results(entries, "irm") | {"reference": evaluation.scorers.reference, "contrast": task.contrast}
    before = read_object(out / RESULTS)["tones"].get(task.tone, {}) if (out / RESULTS).is_file() else {}
    results |= {key: before[key] for key in ("strength", "judge") if before.get(key)}
    if "judge" in results:
        rated, said = results["judge"]["methods"], before["methods"]  # of replies that were made at another strength
        kept = [name for name in rated if name in entries and entries[name][0][0].strength == said[name]["strength"]]
        results["judge"] = {**results["judge"], "methods": {name: rated[name] for name in kept}}
    if judge is not None:
        measures = {name: own[0][0] for name, own in entries.items()}
        results["judge"] = {"model": judge.model, "methods": _ratings(judge, task.tone, measures, out / JUDGE)}
    if choice is not None:
        results["strength"] = plain(choice.to_dict())
        choice.save(irm)
    values = {"irm": str(irm), "host": recipe.host, "tones": {task.tone: results}}
    write_text(out / RESULTS, json.dumps(values, indent=1, ensure_ascii=False) + "\n")
    return Result(task.tone, values, choice)


def _ratings(judge: Endpoint, tone: str, measures: Mapping[str, Measured], place: Path) -> dict[str, Any]:
    """A judge's mean ratings of each method's replies; what it says is kept in a file, whatever happens."""
    said: dict[str, str] = read_object(place) if place.is_file() else {}
    found = {}
    for name, measured in measures.items():
        texts = [item.reply for item in measured.replies]
        try:
            ratings = rate(judge, tone, [item.question for item in measured.replies], texts, said)
        finally:
            write_text(place, json.dumps(said, ensure_ascii=False, indent=1) + "\n")
        each = {aspect: asdict(estimate(getattr(ratings, aspect), bounds=(0.0, BEST))) for aspect in (*ASPECTS, "score")}
        found[name] = plain({**each, "missing": ratings.missing})
    return found


def refuse_another(
    out: Path, irm: Path, task: Task, effort: Effort, questions: int | None, host: Any, server: ServedIRM | None
) -> None:
    """Note in a folder what is evaluated there, or raise where it is something else.

    Raises:
        RealignerError: naming what differs.
    """
    path = made_folder(out) / ASKED
    if not path.is_file() and any(not found.name.startswith(f".{ASKED}-") for found in out.iterdir()):  # left by a kill
        raise RealignerError(f"{out}: holds something that is no evaluation; choose another folder")
    asked = {
        "--irm": hashlib.sha256((adapter_folder(irm) / WEIGHTS_FILE).read_bytes()).hexdigest(),
        "the run's rows": rows_hash([*task.train, *task.tune, *task.test, *task.scorer]),
        "--max-new-tokens": effort.reply_tokens,
        "how much is asked": effort.model_dump(exclude={"reply_tokens"}),
        "--questions": questions,
        "--dtype": dtype_of(host),
        "--model": None if server is None else server.model,
    }
    if path.is_file():
        before = read_object(path)
        if other := [key for key, value in asked.items() if before.get(key) != value]:
            raise RealignerError(f"{out}: holds an evaluation with other settings ({', '.join(other)}); choose another folder")
    write_text(path, json.dumps(asked, indent=1) + "\n")


def _subject(irm: Path, folder: Path, host: Any, tokenizer: Any) -> Subject:
    record = read_run(irm)
    parameters = int(record["irm"]["parameters"])
    facts = {"parameters": parameters, "seconds": record["seconds"], "validation_loss": record["validation_loss"]}
    return Subject("irm", int(record["seed"]), folder, facts, lambda: irm_attached(host, tokenizer, irm, parameters))


def _strength_of(irm: Path) -> float | None:
    """The strength that an adapter names; None where it is that of its training."""
    named = float(read_object(adapter_folder(irm) / CONFIG_FILE).get("strength", 1.0))
    return None if named == 1.0 else named


def _own_voice(task: Task, bare: Speaker, tokenizer: Any, out: Path, effort: Effort) -> list[Row]:
    """The bare host's replies to questions that were trained on, as rows of another tone, for scorers to tell from the tone."""
    path = out / OWN_VOICE
    if not path.is_file():
        asked = evenly(task.train, _CONTRASTED)
        with progress("the bare host's own replies", len(asked)) as bar:
            replies = ask(bare, tokenizer, [row.question for row in asked], effort.reply_tokens, bar.advance)
        said = [
            Row(
                **{key: getattr(row, key) for key in ("id", "group", "question", "answer", "source")}, text=text, tone=HOST_TONE
            )
            for row, text in zip(asked, replies, strict=True)
            if text
        ]
        write_text(path, "".join(row.model_dump_json() + "\n" for row in said))
    return read_rows(path)


def _asked(evaluation: ToneEvaluation, methods: int, tune: bool) -> int:
    """How many questions are asked in all, for the progress bar."""
    effort, test = evaluation.effort, len(evaluation.task.test)
    each = test + min(effort.dropped, test) + effort.answers
    return (2 + methods) * each + tune * (1 + len(STRENGTHS)) * len(evaluation.task.tune)
