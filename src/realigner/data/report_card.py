"""A report card of a tone dataset: what it holds, how good it is, and what makes it unfit."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from realigner.data.answers import MAX_WORDS, contains_answer, word_count
from realigner.data.dataset_rows import Row, authored, question_key
from realigner.data.tokens import token_counts
from realigner.errors import RealignerError
from realigner.thoughts import reply_of

NEAR_LIMIT = 0.01  # share of near-duplicates from which a dataset is unfit
PURITY_LIMIT = 0.8  # tone purity below which a dataset is unfit
_MOST = 5000  # rows of a tone that the purity is taken on
_FEWEST = 20
_SAMPLES = 10


@dataclass(frozen=True)
class Purity:
    """How many rows are in the tone they claim, as a classifier that never saw them names it.

    The built-in tones are named by `reference_classifier`, which was trained on other replies (the authored set and the
    template). Tones it does not know are told from each other, or from `against`, by five-fold cross-validation by group;
    that finds who wrote a reply as readily as its tone, where the two go together, and a note says so.
    """

    value: float  # share of the rows that are named as their own tone
    low: float  # low, high: its 95% interval (Wilson), rows taken as independent
    high: float
    n: int  # how many rows it was taken on (at most 5,000 of a tone, drawn by the seed)
    baseline: float  # chance accuracy
    neutral: float  # share of the rows that are named neutral and claim another tone
    tones: dict[str, float]  # the share of each tone
    by: str  # the classifier, and what it tells apart


@dataclass(frozen=True)
class ReportCard:
    """Counts of a dataset and its problems; fit when there is none.

    Attributes:
        rows, groups: how many.
        conversations: how many rows are conversations; `system_prompts` and `thoughts` of them have a system prompt, a thought.
        messages: of each conversation: fewest, median, most; None when there are none.
        tones: rows of each tone.
        words: words of each reply's length (of a conversation: its last reply): fewest, median, most.
        tokens: the same in tokens of a host, question and template included, as trained; None when no tokenizer was given.
        host: name of the model whose tokenizer was used.
        answer_kept: share of replies that hold their answer word for word, among those with one; None when there are none.
        duplicates: duplicated replies; of conversations with earlier turns, duplicated as a whole.
        near_duplicates: replies nearly equal to one before them in the same tone (word triples, Jaccard 0.8 or more; exact
            copies count too); of conversations with earlier turns, all that is said is compared.
        leakage: rows whose question (all that is said before the reply), or whose whole reply, also occurs in another group: a
            split by group would not keep them apart.
        purity: see `Purity`; None where it cannot be taken, `problems` or `notes` say why.
        samples: ten rows to read, drawn by the seed.
        problems: sentences, each a reason not to train on it.
        notes: sentences worth knowing.
        word_lengths, token_lengths: of every reply, for histograms; not part of `to_dict`.
    """

    rows: int
    groups: int
    conversations: int
    system_prompts: int
    thoughts: int
    messages: tuple[int, int, int] | None
    tones: dict[str, int]
    words: tuple[int, int, int]
    tokens: tuple[int, int, int] | None
    host: str
    answer_kept: float | None
    duplicates: int
    near_duplicates: int
    leakage: int
    purity: Purity | None
    samples: tuple[Row, ...]
    problems: tuple[str, ...]
    notes: tuple[str, ...]
    word_lengths: tuple[int, ...]
    token_lengths: tuple[int, ...]

    @property
    def fit(self) -> bool:
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        values = asdict(self)
        del values["word_lengths"], values["token_lengths"]
        return {**values, "samples": [row.model_dump() for row in self.samples], "fit": self.fit}

    def lines(self) -> list[tuple[str, str]]:
        """The card as (name, value) lines."""
        lines = [
            ("rows", f"{self.rows:,} in {self.groups:,} groups"),
            ("tones", ", ".join(f"{name} {count:,}" for name, count in self.tones.items())),
            ("words", f"{self.words[0]} to {self.words[2]}, median {self.words[1]}"),
        ]
        if self.messages is not None:
            low, median, high = self.messages
            beside = f"{self.system_prompts:,} with a system prompt, {self.thoughts:,} with a thought"
            lines.append(("conversations", f"{self.conversations:,}, of {low} to {high} messages, median {median}; {beside}"))
        if self.tokens is not None:
            low, median, high = self.tokens
            lines.append(("tokens", f"{low} to {high}, median {median}, with what is before the reply ({self.host})"))
        share = self.answer_kept
        kept = "no answers are known" if share is None else f"word for word in {100 * share:.1f}% of replies"
        lines += [
            ("answer kept", kept),
            ("duplicates", f"{self.duplicates:,}"),
            ("near-duplicates", f"{self.near_duplicates:,} ({100 * self.near_duplicates / self.rows:.2f}%)"),
            ("leakage", f"{self.leakage:,} rows with a question or reply that also occurs in another group"),
        ]
        if (purity := self.purity) is not None:
            interval = f"95% interval {purity.low:.3f} to {purity.high:.3f}, n {purity.n:,}, blindly {purity.baseline:.2f}"
            lines += [
                ("tone purity", f"{purity.value:.3f} ({interval})"),
                ("named neutral", f"{purity.neutral:.3f}"),
                ("by", purity.by),
            ]
        return [*lines, *(("note", note) for note in self.notes)]


def check_rows(
    rows: Sequence[Row],
    tokenizer: Any = None,
    host: str = "",
    against: Sequence[Row] = (),
    seed: int = 42,
    must_render: bool = True,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> ReportCard:
    """Look at rows as a whole (their form was checked on reading).

    Unfit is: fewer than two groups (no split by group), a duplicated reply, 1% near-duplicates or more, a reply that
    repeats its question, a question or a reply that occurs in two groups (it would leak between splits), a tone purity
    whose interval is below 0.8.

    Args:
        rows: the dataset.
        tokenizer, host: for the lengths in tokens, and the host's name.
        against: rows of other tones to tell these from, by cross-validation. By default the built-in tones are named by the
            reference scorer, and others told from each other, or from the authored neutral replies.
        seed: of the purity's folds and of the samples.
        must_render: a row that the host's chat template cannot render makes the dataset unfit; else it is a note.
        chat_template_kwargs: variables of the template, as the rows are to be trained with.

    Raises:
        RealignerError: for no rows.
    """
    if not rows:
        raise RealignerError("no rows to check")
    from realigner.data.dedup import NearDuplicates

    seen: defaultdict[str, NearDuplicates] = defaultdict(NearDuplicates)
    near = sum(seen[row.tone].add(row.id, row.own) is not None for row in rows)
    duplicates = len(rows) - len({(row.tone, row.own.casefold()) for row in rows})
    groups: defaultdict[tuple[str, ...], set[str]] = defaultdict(set)  # in which a question, or a reply in its tone, occurs
    keys = [((question_key(row.before),), (row.tone, " ".join(row.own.casefold().split()))) for row in rows]
    for row, own in zip(rows, keys, strict=True):
        for key in own:
            groups[key].add(row.group)
    leaks = [row.id for row, own in zip(rows, keys, strict=True) if any(len(groups[key]) > 1 for key in own)]
    purity, note = _purity(rows, against, seed)
    known = [row for row in rows if row.answer]
    words = [word_count(row.text) for row in rows]
    long = sum(count > MAX_WORDS for count, row in zip(words, rows, strict=True) if row.messages is None)
    chats = [row.messages for row in rows if row.messages]
    tokens, unrendered = _tokens(tokenizer, host, rows, chat_template_kwargs)
    return ReportCard(
        rows=len(rows),
        groups=len({row.group for row in rows}),
        conversations=len(chats),
        system_prompts=sum(any(message.role == "system" for message in chat) for chat in chats),
        thoughts=sum(any(m.reasoning_content or reply_of(m.content) != m.content for m in chat) for chat in chats),
        messages=_spread([len(chat) for chat in chats]) if chats else None,
        tones=dict(sorted(Counter(row.tone for row in rows).items())),
        words=_spread(words),
        tokens=_spread(tokens) if tokens else None,
        host=host,
        answer_kept=sum(contains_answer(row.answer, row.text) for row in known) / len(known) if known else None,
        duplicates=duplicates,
        near_duplicates=near,
        leakage=len(leaks),
        purity=purity,
        samples=tuple(random.Random(seed).sample(list(rows), min(_SAMPLES, len(rows)))),
        problems=(*_problems(rows, duplicates, near, leaks, purity), *(unrendered if must_render else ())),
        notes=(
            *([note] if note else []),
            *([f"{long:,} replies have more than {MAX_WORDS} words"] if long else []),
            *(() if must_render else unrendered),
        ),
        word_lengths=tuple(words),
        token_lengths=tuple(tokens),
    )


def _problems(rows: Sequence[Row], duplicates: int, near: int, leaks: Sequence[str], purity: Purity | None) -> list[str]:
    problems = []
    groups = {row.group for row in rows}
    if len(groups) < 2:
        problems.append(f"only {len(groups)} group: splits are made by group, so training needs two or more")
    if duplicates:
        problems.append(f"{duplicates} duplicated replies")
    if near - duplicates >= NEAR_LIMIT * len(rows):
        problems.append(f"{near} replies ({100 * near / len(rows):.1f}%) nearly equal another")
    echoes = [row.id for row in rows if row.text.casefold() == row.question.casefold() and not _greets(row)]
    if echoes:
        problems.append(f"{len(echoes)} replies only repeat the question (first: row {echoes[0]!r})")
    if leaks:
        problems.append(
            f"{len(leaks)} rows have a question or a reply that also occurs in another group and would leak between splits "
            f"(first: row {leaks[0]!r})"
        )
    if purity is not None and purity.high < PURITY_LIMIT:
        problems.append(f"tone purity is {purity.value:.2f}: too many replies are in another tone")
    return problems


def _tokens(
    tokenizer: Any, host: str, rows: Sequence[Row], chat_template_kwargs: Mapping[str, Any] | None
) -> tuple[list[int], list[str]]:
    """Lengths in tokens; or none, and why they cannot be taken."""
    if tokenizer is None:
        return [], []
    try:
        return token_counts(tokenizer, rows, chat_template_kwargs), []
    except RealignerError as error:
        return [], [f"cannot be made into tokens of {host}: {error}"]


def _greets(row: Row) -> bool:
    """Whether a conversation ends in a word or two, which a reply may return."""
    return row.messages is not None and len(row.question.split()) < 3


def _purity(rows: Sequence[Row], against: Sequence[Row], seed: int) -> tuple[Purity | None, str]:
    """The purity, or None and why it was not taken; and what is to be known about it."""
    from realigner.data.style_classifier import cross_validated, masked, reference_classifier

    sample = _sampled(rows, seed)
    tones = sorted({row.tone for row in rows})
    known = reference_classifier()
    if not against and set(tones) <= set(known.tones):
        named = known.named([masked(row.text, row.answer) for row in sample])
        return _judged(sample, named, 1 / len(known.tones), "the reference scorer of the six built-in tones"), ""
    # What to tell tones from that the reference scorer does not know.
    others, name = ([], "each other") if len(tones) > 1 else (authored("neutral"), "the authored neutral replies")
    if against:
        others = [row for row in against if row.tone not in tones]
        if not others:
            raise RealignerError(f"against: has only rows of {', '.join(tones)}; give rows of another tone")
        name = f"{' and '.join(sorted({row.tone for row in others}))} (against)"
    counts = Counter(row.tone for row in (*sample, *others))
    # As many of each tone: else the scorer would name the most common one, and be right as often as that is.
    most = min(counts.values())
    sample = _sampled(sample, seed, most)
    compared = [*sample, *_sampled(others, seed, most)]
    if min(counts.values()) < _FEWEST or len(counts) < 2 or len({row.group for row in sample}) < 2:
        return None, f"tone purity was not taken: it needs {_FEWEST} rows of each tone, from two groups or more"
    scorer, probabilities = cross_validated(compared, seed=seed)
    named = [scorer.tones[n] for n in probabilities.argmax(axis=1)][: len(sample)]
    purity = _judged(sample, named, 1 / len(counts), f"cross-validation, told from {name}")
    return purity, "tone purity was taken by cross-validation, which may have found who wrote the replies and not their tone"


def _judged(sample: Sequence[Row], named: Sequence[str], baseline: float, by: str) -> Purity:
    from scipy.stats import binomtest

    right = [name == row.tone for name, row in zip(named, sample, strict=True)]
    of: defaultdict[str, list[bool]] = defaultdict(list)
    for row, fits in zip(sample, right, strict=True):
        of[row.tone].append(fits)
    neutral = sum(name == "neutral" != row.tone for name, row in zip(named, sample, strict=True)) / len(sample)
    shares = {tone: sum(fits) / len(fits) for tone, fits in sorted(of.items())}
    low, high = binomtest(sum(right), len(right)).proportion_ci(method="wilson")
    return Purity(sum(right) / len(right), float(low), float(high), len(right), baseline, neutral, shares, by)


def _sampled(rows: Sequence[Row], seed: int, most: int = _MOST) -> list[Row]:
    """At most so many rows of each tone."""
    by_tone: defaultdict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_tone[row.tone].append(row)
    chosen: list[Row] = []
    for some in by_tone.values():
        chosen += some if len(some) <= most else random.Random(seed).sample(some, most)
    return chosen


def _spread(values: Sequence[int]) -> tuple[int, int, int]:
    ordered = sorted(values)
    return ordered[0], ordered[len(ordered) // 2], ordered[-1]
