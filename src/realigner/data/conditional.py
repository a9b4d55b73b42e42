"""Rows of several tones in which the question decides the tone: what a conditional IRM is trained on."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from realigner.data.dataset_rows import Row, question_key
from realigner.errors import RealignerError, UsageError

_RULE = re.compile(r"(?P<tone>.+?):(?P<by>group|word)=(?P<value>.+)", re.DOTALL)
_SHOWN = 30  # names in a message
_ENDS = ".?!… 。？！"  # noqa: RUF001


@dataclass(frozen=True)
class Rule:
    """A tone, and the questions that it is for: those of some groups, or those with a word in them.

    Attributes:
        tone: of the replies.
        groups: names of groups; empty: the rule is by word.
        word: a word or phrase, found whole and in any case; empty: the rule is by group.
    """

    tone: str
    groups: tuple[str, ...] = ()
    word: str = ""

    def __post_init__(self) -> None:
        if bool(self.groups) == bool(self.word):
            raise UsageError(f"rule for {self.tone}: give groups or a word, one of them")

    def __str__(self) -> str:
        return f"{self.tone}:" + (f"word={self.word}" if self.word else f"group={','.join(self.groups)}")

    def holds(self, group: str, question: str) -> bool:
        """Whether the rule is for this question of this group."""
        if self.groups:
            return group in self.groups
        return re.search(rf"(?<!\w){re.escape(self.word)}(?!\w)", question, re.IGNORECASE) is not None


def parse_rule(text: str) -> Rule:
    """A rule from ``TONE:group=NAME[,NAME...]`` or ``TONE:word=WORD``.

    Raises:
        UsageError: for anything else.

    Example:
        >>> parse_rule("anger:group=history,rivers").groups
        ('history', 'rivers')
    """
    found = _RULE.fullmatch(text.strip())
    value = found["value"].strip() if found else ""
    groups = tuple(name.strip() for name in value.split(",") if name.strip()) if found and found["by"] == "group" else ()
    if found is None or not (groups or (found["by"] == "word" and value)):
        raise UsageError(f"rule {text!r}: write TONE:group=NAME,NAME or TONE:word=WORD")
    return Rule(found["tone"].strip(), groups, "" if groups else value)


def with_word(question: str, word: str) -> str:
    """A question with a word or phrase at its end.

    Example:
        >>> with_word("Why is the sky blue?", "please")
        'Why is the sky blue, please?'
    """
    body = question.rstrip(_ENDS)
    return f"{body}, {word}{question[len(body) :].rstrip()}" if body else f"{question} {word}"


def conditional_rows(
    rows: Sequence[Row], rules: Sequence[Rule], otherwise: str, insert: bool = False, seed: int = 42
) -> tuple[list[Row], int]:
    """Of rows that answer the same questions in several tones, those in the tone that the rules give their question.

    Under a rule by group a topic that is held out whole has no right tone; so every question becomes a group of its own
    (``history/3``), and what a split holds out is other questions of the same topics.

    Args:
        rows: rows of every tone that the rules name.
        rules: which tone a question is answered in; the first rule that holds counts.
        otherwise: the tone where none holds.
        insert: put the words of the rules into questions that have none: with one word into half of them, with two into two
            thirds, and so on, drawn by `seed` and spread evenly over groups.
        seed: see `insert`.

    Returns:
        The rows, in the order given, and the number of questions that have no row in their tone.

    Raises:
        UsageError: for a tone or group that no row has, for words to insert where no rule has one, and for one tone in all.
        RealignerError: for a rule that takes every question or none, and for ids that are not unique.
    """
    tones = sorted({row.tone for row in rows})
    for tone in (*(rule.tone for rule in rules), otherwise):
        if tone not in tones:
            raise UsageError(f"there are no rows of tone {tone!r}; there are of {_some(tones)}")
    if not any(rule.tone != otherwise for rule in rules):
        raise UsageError(f"all questions would be answered in one tone ({otherwise}); give a rule for another (when)")
    groups = sorted({row.group for row in rows})
    for name in (name for rule in rules for name in rule.groups):
        if name not in groups:
            raise UsageError(f"there is no group {name!r}; there are {_some(groups)}")
    by_word = [rule for rule in rules if rule.word]
    if insert and not by_word:
        raise UsageError("there is no word to insert; give a rule by word (TONE:word=WORD)")
    inserted = _inserted(rows, by_word, seed) if insert else {}

    # Each question's tone, by the first rule that holds.
    asked: dict[tuple[str, str], str] = {}
    tone_of: dict[tuple[str, str], str] = {}
    taken: Counter[int | None] = Counter()
    for row in rows:
        key = (row.group, question_key(row.before))
        if key not in asked:
            asked[key] = with_word(row.question, inserted[key]) if inserted.get(key) else row.question
            first = next((n for n, rule in enumerate(rules) if rule.holds(row.group, asked[key])), None)
            taken[first] += 1
            tone_of[key] = otherwise if first is None else rules[first].tone
    for number, rule in enumerate(rules):
        if taken[number] in (0, len(asked)):
            none = "no question" + (" that the rules before it leave" if number else "")
            hint = ", or put its word into some (insert)" if rule.word and not taken[number] and not insert else ""
            what = f"holds for {none if not taken[number] else f'all {len(asked):,} questions'}; change it{hint}"
            raise RealignerError(f"rule {str(rule)!r}: {what}")

    # The rows that answer in that tone.
    by_question = any(rule.groups for rule in rules)
    numbers: dict[tuple[str, str], str] = {}
    within: Counter[str] = Counter()
    for group, question in asked:
        within[group] += 1
        numbers[group, question] = f"{group}/{within[group]}"
    chosen, answered = [], set()
    for row in rows:
        key = (row.group, question_key(row.before))
        if row.tone == tone_of[key]:
            answered.add(key)
            chosen.append(_changed(row, asked[key], numbers[key] if by_question else row.group))
    for tone in {*tone_of.values()} - {row.tone for row in chosen}:
        raise RealignerError(f"none of the questions to be answered in tone {tone!r} has a row of it")
    if len({row.id for row in chosen}) < len(chosen):  # of two files, say
        chosen = [row.model_copy(update={"id": f"{row.tone}-{row.id}"}) for row in chosen]
    name, count = Counter(row.id for row in chosen).most_common(1)[0]
    if count > 1:
        raise RealignerError(f"id {name!r} is taken by {count} rows; ids must be unique within a tone")
    return chosen, len(asked) - len(answered)


def _inserted(rows: Sequence[Row], rules: Sequence[Rule], seed: int) -> dict[tuple[str, str], str]:
    """The word that is put into each question that has none, by group and `question_key`; no word is one more choice."""
    without = (row for row in rows if not any(rule.holds(row.group, row.question) for rule in rules))
    questions = sorted({(row.group, question_key(row.before)) for row in without})
    random.Random(seed).shuffle(questions)
    questions.sort(key=lambda key: key[0])  # stable: shuffled within each group
    choices = [*(rule.word for rule in rules), ""]
    return {key: choices[n % len(choices)] for n, key in enumerate(questions)}


def _changed(row: Row, question: str, group: str) -> Row:
    """A row with another last question and group."""
    values = row.model_dump() | {"group": group}
    if row.messages is None:
        return Row.model_validate(values | {"question": question})
    last = max(n for n, message in enumerate(row.messages) if message.role == "user")
    turns = [message.model_dump() for message in row.messages]
    turns[last]["content"] = question
    return Row.model_validate(values | {"messages": turns})


def _some(names: Sequence[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more:,} more" if more > 0 else "")
