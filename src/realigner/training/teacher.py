"""An IRM from an instruction: the teacher is the host with the instruction as its system prompt, and replies to questions.

The replies are sampled once, before the first step, and kept in the run's folder as they come (``teacher.jsonl``), so that a
run that is killed goes on with those that are there. What is learned is not their words but the teacher's distribution at each
of their positions (`loss.row_losses`), so a reply that was cut at `REPLY_TOKENS` is as good as another.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from pydantic import ValidationError

from realigner.chat_format import IGNORED, ChatFormat
from realigner.console import Task, progress, say
from realigner.data.append_log import AppendLog
from realigner.data.dataset_rows import EVERY_TONE, TONES, Row, authored, question_key, read_rows, rows_hash, tone_label
from realigner.data.squad import Fact, read_squad
from realigner.data.tokens import Example
from realigner.dialogues import Dialogue, read_prompts, written
from realigner.errors import RealignerError, UsageError
from realigner.files import read_bytes, value_of
from realigner.generation import answer
from realigner.hosts import positions_of
from realigner.prompts import Message, Prompt, messages_of
from realigner.settings import NO_IRM
from realigner.thoughts import reply_of
from realigner.training.batches import Collator, Prepared, prepare, to_last_label
from realigner.training.host_checks import check_tokens
from realigner.training.loss import bare, row_losses, takes_logits_to_keep
from realigner.training.recipe import Recipe
from realigner.training.run_dir import TEACHER_FILE, teacher_replies
from realigner.training.run_record import TeacherEntry, checked
from realigner.tuner import tuner_of
from realigner.validation_message import first_fault

if TYPE_CHECKING:
    from realigner.data.quality_filter import QualityFilter

TEMPERATURE = 0.7  # of the replies' sampling
REPLY_TOKENS = 96  # of a reply at most
# Nats per token by which the instruction must make a reply likelier, for it to count as obeyed.
OBEDIENCE = 0.03
TOGETHER = 32  # replies that are sampled in one batch (on a CPU it takes 1.5 times as long as one of 8)
_SCORED = 4  # replies whose likelihood is computed at a time: logits of all their tokens take memory
_FEWEST = 64  # questions that are asked at least, if there are so many
_PASSES = 2  # of the training over the replies, at least
_ID = "teacher:"  # before the number of a reply, as a row's id
_LABEL = 60  # characters of an instruction that stands for a tone


@dataclass(frozen=True)
class Question:
    """What the teacher is asked."""

    id: str
    group: str  # its topic or article; the split is made by it
    prompt: Prompt

    @property
    def text(self) -> str:
        """The last thing that is said."""
        return self.prompt if isinstance(self.prompt, str) else str(self.prompt[-1]["content"])


def read_questions(source: str) -> list[Question]:
    """The questions of the authored set, or of a file, each once.

    A ``.jsonl`` file holds rows (their questions and groups are taken) or prompts (`dialogues.read_prompts`); a ``.json`` or
    ``.parquet`` file is SQuAD's; any other is text with a question a line. A question that has no group is its own.

    Raises:
        RealignerError: for a file that cannot be read, naming the place of what is wrong.
        UsageError: when there is no such file.

    Example:
        >>> len(read_questions("authored"))
        360
    """
    path = Path(source)
    if source == "authored":
        found = [Question(row.id, row.group, row.question) for row in authored(TONES[0])]
    elif not path.is_file():
        hint = "give the path of its JSON file, such as dev-v2.0.json" if source == "squad" else "give 'authored', or a file"
        raise UsageError(f"questions: there is no file {source!r}; {hint}")
    elif path.suffix.lower() in (".json", ".parquet"):
        found = [Question(fact.id, fact.group, fact.question) for fact in read_squad(path)]
    elif path.suffix.lower() == ".jsonl" and _holds_rows(path):
        found = [Question(row.id, row.group, _asked(row)) for row in read_rows(path)]
    else:
        found = []
        for number, prompt in enumerate(read_prompts(path), start=1):
            if isinstance(prompt, Dialogue):
                raise RealignerError(f"{path}: prompt {number} is a dialogue (turns); give questions, or messages")
            found.append(Question(str(number), f"question-{number}", prompt))
    if not found:
        raise RealignerError(f"{source}: has no question that has an answer; give another file (questions)")
    by_words: dict[str, Question] = {}
    for question in found:
        by_words.setdefault(question_key(json.dumps(written(question.prompt))), question)
    return list(by_words.values())


def _holds_rows(path: Path) -> bool:
    line = next(filter(None, map(bytes.strip, islice(read_bytes(path).split(b"\n"), 1000))), b"")
    first = value_of(line, path) if line else None
    return isinstance(first, dict) and "group" in first


def _asked(row: Row) -> Prompt:
    return row.question if row.messages is None else row.conversation[:-1]


class Teacher:
    """What a run with an instruction learns from, before the replies are there.

    Args:
        rows: others to learn, of one tone; may be none.
        recipe: with an instruction.
        tokenizer: the host's.
        config: the host's (its positions are looked at).

    Attributes:
        questions: the questions that are asked.
        offered: how many questions there are to choose from.
        sha256: of the rows and all questions.

    Raises:
        RealignerError, UsageError: for questions that cannot be read, or do not fit into the host.
    """

    def __init__(self, rows: Sequence[Row], recipe: Recipe, tokenizer: Any, config: Any) -> None:
        assert recipe.instruct is not None  # the caller's
        tones = sorted({row.tone for row in rows})
        if len(tones) > 1 and recipe.tone != EVERY_TONE:
            raise UsageError(
                f"rows are of {len(tones)} tones ({', '.join(tones)}); choose one (tone), or train on all (tone={EVERY_TONE})"
            )
        if taken := next((row.id for row in rows if row.id.startswith(_ID)), None):
            raise UsageError(f"row {taken!r}: ids that begin with {_ID!r} are those of a teacher's replies; give it another")
        self.rows, self.recipe, self.instruct = rows, recipe, recipe.instruct
        found = read_questions(recipe.questions)
        self.offered = len(found)
        asked = [[question.id, question.group, written(question.prompt)] for question in found]
        self.sha256 = hashlib.sha256((rows_hash(rows) + json.dumps(asked)).encode()).hexdigest()  # whichever are chosen
        self.questions = _chosen(found, recipe)
        self.chat_format = ChatFormat(tokenizer, recipe.template, recipe.chat_template_kwargs)
        self.in_question = not self._takes_system()
        prompts = [self._prompts(question) for question in self.questions]
        check_tokens(
            ((f"question {q.id!r}", ids) for q, both in zip(self.questions, prompts, strict=True) for ids in both),
            tokenizer,
            config,
        )
        self.lengths = [(len(own), len(instructed)) for own, instructed in prompts]
        some: Message = {"role": "assistant", "content": "1"}
        self.examples(self.questions[0], some)  # of a template that cannot write one, at once
        for number, question in enumerate(self.questions):
            self._row(number, question, some)
        self.most_targets = REPLY_TOKENS + 1
        self.longest = max(map(max, self.lengths)) + self.most_targets
        positions = positions_of(config)
        for question, (own, _) in zip(self.questions, self.lengths, strict=True):
            if own >= recipe.max_length:
                raise RealignerError(f"question {question.id!r}: {own} tokens; max_length is {recipe.max_length}; raise it")
        if positions is not None and positions < self.longest:
            raise RealignerError(
                f"question and instruction have {self.longest - self.most_targets} tokens, a reply up to {self.most_targets}, "
                f"and the host has {positions} positions; shorten the instruction, or leave long questions out"
            )
        if recipe.steps != 0 and self.wanted < recipe.batch_size:
            raise RealignerError(
                f"{recipe.questions}: {self.wanted} replies in all (teacher_replies={recipe.teacher_replies}), fewer than "
                f"batch_size {recipe.batch_size}; give more questions, or set teacher_replies"
            )

    @property
    def tone(self) -> str:
        """That of the rows, or the recipe's; where there is neither, the beginning of the instruction stands for it."""
        if self.rows:
            return tone_label(self.rows)
        return self._own_tone

    @property
    def _own_tone(self) -> str:
        """The tone of the teacher's replies: the one tone that is named, or what the instruction calls it."""
        if self._named_tone is not None:
            return self._named_tone
        line = " ".join(self.instruct.split())
        return line if len(line) <= _LABEL else line[: _LABEL - 3] + "..."

    @property
    def _named_tone(self) -> str | None:
        if self.recipe.tone == EVERY_TONE:
            return None
        return self.recipe.tone or (self.rows[0].tone if self.rows else None)

    @cached_property
    def filter(self) -> QualityFilter:
        """What a reply must pass besides obeying: it is no refusal, repeats no prompt, and is in the tone, if known."""
        from realigner.data.quality_filter import QualityFilter
        from realigner.data.style_classifier import reference_classifier
        from realigner.data.tone import Tone

        known = self._named_tone in reference_classifier().tones
        name = str(self._named_tone) if known else "instructed"
        return QualityFilter(Tone(name=name, language="any", instruction=self.instruct), chat=True, whole=False)

    def facts(self) -> dict[str, Any]:
        """The entry ``data`` of run.json, as far as it is known before the replies are there."""
        return {"rows": len(self.rows), "questions": len(self.questions), "sha256": self.sha256, "train": 0, "validation": 0}

    # Prompts and replies as tokens.

    def instructed(self, prompt: Prompt) -> list[dict[str, str]]:
        """A prompt with the instruction: as the system prompt, or before what the user says first, where there can be none."""
        if not self.in_question:
            return messages_of(prompt, self.instruct)
        messages = messages_of(prompt)
        first = next((n for n, message in enumerate(messages) if message["role"] == "user"), 0)
        messages[first]["content"] = f"{self.instruct}\n\n{messages[first]['content']}"
        return messages

    def _takes_system(self) -> bool:
        if self.chat_format.is_plain:
            return False
        try:
            self.chat_format.prompts(["1"], self.instruct)
        except RealignerError:
            return False
        return True

    def _prompts(self, question: Question) -> list[list[int]]:
        """A question as the student reads it and as the teacher does."""
        try:
            return self.chat_format.prompts([question.prompt, self.instructed(question.prompt)])
        except RealignerError as error:
            raise type(error)(f"question {question.id!r}: {error}") from None

    def examples(self, question: Question, reply: Message) -> tuple[Example, Example] | None:
        """A reply as the student reads it and as the teacher does; None where its tokens depend on what is before them."""
        both = []
        for messages in (messages_of(question.prompt), self.instructed(question.prompt)):
            (example,) = self.chat_format.examples([*messages, reply], "reply", self.recipe.loss_on_thought)
            both.append(to_last_label(example))
        replies = [[label for label in example["labels"] if label != IGNORED] for example in both]
        return (both[0], both[1]) if replies[0] == replies[1] else None

    def _message(self, entry: dict[str, Any]) -> Message:
        thought = {"reasoning_content": entry["thought"]} if self.recipe.loss_on_thought and entry.get("thought") else {}
        return {"role": "assistant", "content": entry["reply"], **thought}

    def _row(self, number: int, question: Question, reply: Message) -> Row:
        """A reply as a row; of a question that cannot stand in one, an error."""
        about = {"id": f"{_ID}{number}", "group": question.group, "tone": self._own_tone, "source": "teacher"}
        try:
            return Row.model_validate({**about, "messages": [*messages_of(question.prompt), reply]})
        except ValidationError as error:
            raise RealignerError(f"question {question.id!r}: {first_fault(error, Row, 'a row')}") from None

    # The replies.

    @property
    def wanted(self) -> int:
        """Replies, over all questions."""
        return len(self.questions) * self.recipe.teacher_replies

    def missing(self, work: Path) -> int:
        """Replies that a run's folder does not have yet."""
        return self.wanted - teacher_replies(work)

    def replies(self, model: Any, tokenizer: Any, work: Path, quiet: bool) -> list[dict[str, Any]]:
        """The replies as in ``teacher.jsonl`` (`TeacherEntry`), those that are not there yet sampled now.

        Of several processes each samples a part, and the first writes.

        Args:
            model: the host with an IRM, which takes no part.
            tokenizer: the host's.
            work: the unfinished run's folder.
            quiet: show no progress.

        Raises:
            RealignerError: for a file that is not this run's, or cannot be written.
        """
        processes = PartialState()
        path = work / TEACHER_FILE
        with ExitStack() as stack:
            entries: list[dict[str, Any]] = []
            if processes.is_main_process:
                journal = stack.enter_context(AppendLog(path, {"teacher": self.instruct, "seed": self.recipe.seed}))
                entries += [self._known(entry, number, path) for number, entry in enumerate(journal.entries)]
            (entries,) = broadcast_object_list([entries])
            task: Task = stack.enter_context(
                progress("teacher replying", self.wanted, quiet or not processes.is_main_process, "replies", len(entries))
            )
            # A batch of which some were written is sampled again as a whole, since rounding can depend on who shares it.
            step = TOGETHER * processes.num_processes
            for start in range(len(entries) // TOGETHER * TOGETHER, self.wanted, step):
                own = start + TOGETHER * processes.process_index
                with _tokens_noted(model, task):
                    made = self._sampled(model, tokenizer, range(own, min(own + TOGETHER, self.wanted)))
                new = [entry for entry in gather_object(made) if entry["number"] >= len(entries)]
                if processes.is_main_process:
                    for entry in new:
                        journal.append(entry)
                entries += new
                kept = sum(not entry["reason"] for entry in entries)
                task.advance(len(new), f"{100 * kept / len(entries):.0f}% kept")
        return entries

    def _known(self, entry: dict[str, Any], number: int, path: Path) -> dict[str, Any]:
        """A line of the file, when it is the reply of that number."""
        where = f"{path}:{number + 2}"
        checked(entry, TeacherEntry, where, "a reply of a teacher")
        if number >= self.wanted or (entry["number"], entry["question"]) != (number, self._question(number).id):
            raise RealignerError(f"{where}: is not reply {number} of this run; train anew (force)")
        return entry

    def _question(self, number: int) -> Question:
        return self.questions[number % len(self.questions)]

    def _sampled(self, model: Any, tokenizer: Any, numbers: range) -> list[dict[str, Any]]:
        """Replies by number, each with how well it obeys and a reason to reject it."""
        if not numbers:
            return []
        asked = [self._question(number) for number in numbers]
        texts = answer(
            model,
            tokenizer,
            [self.instructed(question.prompt) for question in asked],
            max_new_tokens=REPLY_TOKENS,
            temperature=TEMPERATURE,
            seed=self.recipe.seed,
            batch_size=TOGETHER,
            irms=NO_IRM,
            thinking_budget=self.recipe.thinking_budget,
            first=numbers.start,
        )
        made: list[dict[str, Any]] = [
            {"number": number, "question": question.id, "prompt": written(question.prompt), "reply": str(text)}
            | ({"thought": text.thought} if text.thought else {})
            for number, question, text in zip(numbers, asked, texts, strict=True)
        ]
        pairs = [
            self.examples(*pair) if reply_of(pair[1]["content"]).strip() else None
            for pair in zip(asked, map(self._message, made), strict=True)
        ]
        comparable = [n for n, pair in enumerate(pairs) if pair is not None]
        obedience = dict(zip(comparable, obedience_of(model, tokenizer, [pair for pair in pairs if pair]), strict=True))
        faults = self.faults(asked, [entry["reply"] for entry in made])
        for n, (entry, fault) in enumerate(zip(made, faults, strict=True)):
            entry["obedience"] = round(obedience.get(n, 0.0), 4)
            unlike = "" if n in obedience else "other tokens after the instruction"
            entry["reason"] = fault or unlike or ("" if entry["obedience"] >= OBEDIENCE else "not obeyed")
        return made

    def faults(self, questions: Sequence[Question], replies: Sequence[str]) -> list[str]:
        """A reason to reject each reply, whatever its obedience; empty for a good one."""
        facts = [Fact(question.id, question.group, question.text, "") for question in questions]
        return self.filter.alone(list(zip(facts, replies, strict=True)))

    # What is learned.

    def prepared(self, entries: Sequence[dict[str, Any]], tokenizer: Any, config: Any, path: Path) -> Prepared:
        """The replies that were kept, with the rows, ready to be trained on.

        Raises:
            RealignerError: when too few were kept.
        """
        rows, prompted = list(self.rows), {}
        for entry in entries:
            if entry["reason"]:
                continue
            question, reply = self._question(entry["number"]), self._message(entry)
            pair = self.examples(question, reply)
            if pair is None:
                raise RealignerError(
                    f"{path}: reply {entry['number']} has other tokens than when it was kept; train anew (force)"
                )
            row = self._row(entry["number"], question, reply)
            rows.append(row)
            prompted[row.id] = pair[1]
        kept, groups = len(prompted), {row.group for row in rows}
        needed = self.recipe.batch_size
        if kept < needed or len(groups) < 2:
            more = min(64, 4 * self.recipe.teacher_replies)
            lack = f"batch_size is {needed}" if kept < needed else f"they are of one group, {rows[0].group!r}"
            raise RealignerError(
                f"{path}: {kept} of the teacher's {len(entries)} replies were kept, and {lack} ({_counted(entries)}); word the "
                f"instruction more plainly, give more questions, or set teacher_replies={more}"
            )
        return prepare(rows, tokenizer, config, self.recipe, prompted)

    def outcome(self, entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The entry ``teacher`` of run.json."""
        reasons = Counter(entry["reason"] for entry in entries)
        kept = reasons.pop("", 0)
        return {
            "instruct": self.instruct,
            "instruction_in": "question" if self.in_question else "system",
            "questions": len(self.questions),
            "replies": len(entries),
            "kept": kept,
            "rejected": dict(reasons.most_common()),
            "obedience": round(sum(entry["obedience"] for entry in entries) / max(1, len(entries)), 4),
            "temperature": TEMPERATURE,
        }

    def say_before(self) -> None:
        """Print notes for the user before the replies are sampled."""
        if len(self.questions) < self.offered:
            say(f"{len(self.questions)} of {self.offered:,} questions are asked; {self.recipe.steps} steps need no more")
        if self.in_question:
            why = "the plain form has" if self.chat_format.is_plain else "the host's chat template takes"
            say(f"{why} no system prompt: the instruction stands before the question")

    def say_after(self, entries: Sequence[dict[str, Any]], path: Path) -> None:
        """How many replies were kept."""
        kept = sum(not entry["reason"] for entry in entries)
        say(f"teacher: {kept} of {len(entries)} replies kept ({_counted(entries)}); all are in {path}")


def _counted(entries: Sequence[dict[str, Any]]) -> str:
    reasons = Counter(entry["reason"] for entry in entries if entry["reason"])
    return ", ".join(f"{reason} {count}" for reason, count in reasons.most_common()) or "none rejected"


def _chosen(questions: list[Question], recipe: Recipe) -> list[Question]:
    """Those questions that are asked, in their order."""
    if recipe.steps is None:
        return questions
    most = max(_FEWEST, -(-recipe.steps * recipe.batch_size // (_PASSES * recipe.teacher_replies)))
    if len(questions) <= most:
        return questions
    return [questions[n] for n in sorted(random.Random(recipe.seed).sample(range(len(questions)), most))]


@contextmanager
def _tokens_noted(model: Any, task: Task) -> Iterator[None]:
    """Beside a task, the token that the replies of a batch are at: until all are whole, none is counted."""
    read = count(1)

    def note(*_: Any) -> None:
        if (token := next(read)) <= REPLY_TOKENS:
            task.advance(0, f"token {token} of {REPLY_TOKENS} at most")

    handle = tuner_of(model).model.register_forward_hook(note)
    try:
        yield
    finally:
        handle.remove()


def obedience_of(model: Any, tokenizer: Any, pairs: Sequence[tuple[Example, Example]]) -> list[float]:
    """Nats per token by which the instruction makes each reply likelier, under the bare host."""
    if not pairs:
        return []
    tuner = tuner_of(model)
    keep, device = takes_logits_to_keep(tuner.model), next(p.device for p in model.parameters() if p.device.type != "meta")
    collate = Collator(tokenizer.pad_token_id or 0)
    ratios: list[float] = []
    with torch.no_grad(), bare(tuner):
        for start in range(0, len(pairs), _SCORED):
            losses = []
            for side in zip(*pairs[start : start + _SCORED], strict=True):
                batch = collate([{**example, "row": n} for n, example in enumerate(side)])
                sums, counts = row_losses(model, {key: value.to(device) for key, value in batch.items()}, keep)
                losses.append((sums / counts).double())
            ratios += (losses[0] - losses[1]).tolist()
    return ratios
