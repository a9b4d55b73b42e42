"""The quality gate: each reply is let through, or turned away with a reason.

What concerns one reply alone is checked by `Gate.alone`, in batches; what depends on the rows let through before it (near
copies, a question that stands in two articles) by `Gate.among`, in the rows' order.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from realigner.data.near import NearDuplicates
from realigner.data.rows import TONES, Row, authored
from realigner.data.squad import Fact
from realigner.data.tone import Tone, built_in_tones
from realigner.errors import UsageError

if TYPE_CHECKING:
    from realigner.data.scorer import ToneScorer

EMPTY = "empty"
REFUSAL = "refusal"
ECHO = "prompt echoed"
DIRECTIONS = "stage directions"
SHORT, LONG = "too short", "too long"
CUT = "cut in mid-sentence"
LANGUAGE = "wrong language"
FACT = "fact lost"
TONE = "wrong tone"
NEAR = "near-duplicate"
LEAK = "question in another group"

MIN_WORDS, MAX_WORDS = 3, 90
_ANY = Tone(name="any", language="any", instruction="Any tone.")
_UNLIKELY = 0.02  # probability of the tone's language below which another is believed

_WORD = re.compile(r"\w+")
_NO_SPACES = re.compile(r"[\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff]")  # Thai, Lao, kana, ideographs: about two to a word
_REFUSAL = re.compile(
    r"\bas an? (?:ai|artificial intelligence|(?:large )?language model)\b"
    r"|\bi(?:'m| am) (?:just |only )?an? (?:ai|(?:large )?language model|assistant)\b"
    r"|\bi (?:can(?:no|')t|am unable to|am not able to|won't|will not) "
    r"(?:assist|help|provide|fulfill?|comply|generate|write|rewrite|answer|create|engage|respond)\b"
    r"|\bi(?:'m| am) (?:sorry|unable|afraid|not able)\b.{0,20}\b"
    r"(?:i can(?:no|')t|to (?:help|assist|provide|answer|rewrite|fulfill?))"
    r"|\bi apologi[sz]e,? but\b"
)
_ECHO = re.compile(
    r"\b(?:question|answer|reply|response|rewritten|instruction|system|user|assistant)\s?:"
    r"|^(?:sure|certainly|of course|okay|ok)\b.{0,60}:"
    r"|\bhere(?:'s| is) (?:the|a|an|your|my)\b.{0,40}\b(?:answer|reply|version|response|rewrite)\b"
    r"|\brewrit(?:e|ten|ing)\b|<\|"
)
_ACTIONS = (
    "sigh|roll|eye|groan|shout|yell|scream|laugh|sob|cr(?:y|ie)|weep|wip(?:e|ing)|slam|growl|snarl|smil|grin|nod|shak(?:e|ing)|shrug|paus"
    "|whisper|mutter|snort|scoff|tremb|gasp|bow|clear|stomp|point|glar|frown|sniff|wink|angr|sad|voice|tone|exasperat|frustrat"
)
_DIRECTIONS = re.compile(
    r"\*[^*\n]*\w+s\b[^*\n]*\*|\*\w+ly\b[^*\n]*\*"
    rf"|\((?:\w+ )?(?:{_ACTIONS})\w*[^)\n]*\)|[\[*](?:\w+ ){{0,3}}(?:{_ACTIONS})\w*[^\]*\n]*[\]*]"
)
_ENDS = ".!?…。！？।؟۔"  # noqa: RUF001
_CLOSERS = "\"'”’»)]*_~"  # noqa: RUF001
_ARTICLES = {"a", "an", "the", "of", "in", "on", "at", "to", "and", "or", "by", "for", "was", "is", "were", "are"}


class Gate:
    """The checks for one tone.

    Args:
        tone: whose replies are checked; its language, instruction and words are used.
        scorer: tells tones apart; by default, for the tones of the authored set, one trained on that set, and for others the
            tone's `words` (none: tone is not checked).
        min_words, max_words: of a reply.

    Raises:
        UsageError: for a scorer that does not know the tone.
    """

    def __init__(
        self, tone: Tone, scorer: ToneScorer | None = None, min_words: int = MIN_WORDS, max_words: int = MAX_WORDS
    ) -> None:
        if scorer is not None and tone.name not in scorer.tones:
            raise UsageError(f"scorer: was not trained on {tone.name!r}; it knows {', '.join(scorer.tones)}")
        self.tone, self.min_words, self.max_words = tone, min_words, max_words
        self.scorer = scorer or (_authored_scorer() if tone.name in TONES else None)
        self._instruction = _runs(tone.instruction)
        self._words = _lexicon(tone.words)
        self.restart()

    def restart(self) -> None:
        """Forget the rows let through."""
        self._near = NearDuplicates()
        self._group_of: dict[str, str] = {}

    def alone(self, pairs: Sequence[tuple[Fact, str]]) -> list[str]:
        """A reason for each (fact, reply), empty for a good one; no reply is compared with another."""
        reasons = [self._reason(fact, text) for fact, text in pairs]
        open_still = [n for n, reason in enumerate(reasons) if not reason]
        for number, fits in zip(open_still, self._in_tone([pairs[n] for n in open_still]), strict=True):
            if not fits:
                reasons[number] = TONE
        return reasons

    def among(self, fact: Fact, text: str) -> str:
        """A reason against a reply in view of those let through before it; none is given, it counts as let through."""
        question = " ".join(_WORD.findall(fact.question.casefold()))
        if self._group_of.get(question, fact.group) != fact.group:
            return LEAK
        if self._near.add(fact.id, text) is not None:
            return NEAR
        self._group_of[question] = fact.group
        return ""

    def _reason(self, fact: Fact, text: str) -> str:
        plain = text.casefold().replace("’", "'")  # noqa: RUF001
        words = _length(text)
        if not _WORD.search(text):
            return EMPTY
        if _REFUSAL.search(plain):
            return REFUSAL
        if _ECHO.search(plain) or self._echoes(fact, plain):
            return ECHO
        if _DIRECTIONS.search(plain):
            return DIRECTIONS
        if words < self.min_words:
            return SHORT
        if words > self.max_words:
            return LONG
        if is_cut(text):
            return CUT
        if not keeps_fact(fact.answer, text):
            return FACT
        return LANGUAGE if self._foreign(fact, text) else ""

    def _echoes(self, fact: Fact, plain: str) -> bool:
        """Whether a reply begins with its question, holds all of a long one, or eight words of the instruction in a row."""
        words = _WORD.findall(plain)
        question = _WORD.findall(fact.question.casefold().replace("’", "'"))  # noqa: RUF001
        within = len(question) >= 7 and f" {' '.join(question)} " in f" {' '.join(words)} "
        return within or words[: len(question)] == question or not self._instruction.isdisjoint(_runs(plain))

    def _foreign(self, fact: Fact, text: str) -> bool:
        if self.tone.language == "any":
            return False
        known = set(_WORD.findall(f"{fact.question} {fact.answer}".casefold()))
        rest = " ".join(word for word in text.split() if known.isdisjoint(_WORD.findall(word.casefold())))
        if len(rest) < 20 and not _NO_SPACES.search(rest):
            return False  # too little to tell
        ranked = _identifier().rank(rest)
        likely = dict(ranked).get(self.tone.language)
        return likely is not None and ranked[0][0] != self.tone.language and likely < _UNLIKELY

    def _in_tone(self, pairs: Sequence[tuple[Fact, str]]) -> list[bool]:
        if not pairs:
            return []
        if self.scorer is not None:
            from realigner.data.scorer import masked

            texts = [masked(text, fact.answer) for fact, text in pairs]
            chance = 1 / len(self.scorer.tones)
            return [bool(p >= chance) for p in self.scorer.probability(texts, self.tone.name)]
        if self._words is None:
            return [True] * len(pairs)
        return [bool(self._words.search(text.casefold())) for _, text in pairs]


def sift(rows: Sequence[Row]) -> tuple[list[Row], list[dict[str, Any]]]:
    """Rows that came from elsewhere: those that pass, and the others with a reason.

    A tone that is not built in is not told from others, and its language is not checked.
    """
    reasons: dict[str, str] = {}
    for name in dict.fromkeys(row.tone for row in rows):
        gate = Gate(next((tone for tone in built_in_tones() if tone.name == name), _ANY))
        mine = [row for row in rows if row.tone == name]
        pairs = [(Fact(row.id, row.group, row.question, row.answer), row.text) for row in mine]
        for row, pair, reason in zip(mine, pairs, gate.alone(pairs), strict=True):
            reasons[row.id] = reason or gate.among(*pair)
    rejected = [{**row.model_dump(), "reason": reasons[row.id]} for row in rows if reasons[row.id]]
    return [row for row in rows if not reasons[row.id]], rejected


def keeps_fact(answer: str, text: str) -> bool:
    """Whether a reply still says its answer.

    Every number of the answer must be there; of its other words all, if they are three or fewer, else six in ten. Articles and
    small words do not count, endings may differ ("win", "wins"), case and punctuation do not matter.

    Example:
        >>> keeps_fact("in the 10th and 11th centuries", "The 10th and the 11th century, you fool!")
        True
        >>> keeps_fact("30%", "A third, of course!")
        False
    """
    if answer.casefold() in text.casefold() or _squeezed(answer) in _squeezed(text):
        return True
    all_words = _plain_words(answer)
    wanted = [word for word in all_words if word not in _ARTICLES] or all_words
    said = _plain_words(text)
    if any(word not in said for word in wanted if any(c.isdigit() for c in word)):
        return False
    found = sum(any(_alike(word, other) for other in said) for word in wanted)
    return found >= (len(wanted) if len(wanted) <= 3 else 0.6 * len(wanted))


def _alike(one: str, other: str) -> bool:
    """Whether two words are the same but for their endings."""
    shared = next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return one == other or shared >= max(4, 0.6 * max(len(one), len(other)))


def is_cut(text: str) -> bool:
    """Whether a text stops before its sentence ends (a closing quotation mark, bracket or an emoji may follow the end)."""
    rest = text.rstrip()
    while rest and (rest[-1] in _CLOSERS or unicodedata.category(rest[-1]) in ("So", "Sk", "Mn", "Cf", "Zs")):
        if unicodedata.category(rest[-1]) == "So":
            return False  # an emoji ends a sentence as well as a full stop
        rest = rest[:-1]
    return not rest or rest[-1] not in _ENDS


def _length(text: str) -> int:
    """Words; in scripts without spaces, half the letters."""
    dense = len(_NO_SPACES.findall(text))
    return dense // 2 + len(_WORD.findall(_NO_SPACES.sub(" ", text)))


def _plain_words(text: str) -> list[str]:
    folded = "".join(c for c in unicodedata.normalize("NFKD", text.casefold()) if not unicodedata.combining(c))
    return _WORD.findall(folded.replace(",", "")) or list(folded)


def _squeezed(text: str) -> str:
    return "".join(_WORD.findall(unicodedata.normalize("NFKC", text).casefold())) or text


def _runs(text: str, length: int = 8) -> set[tuple[str, ...]]:
    words = _WORD.findall(text.casefold())
    return {tuple(words[start : start + length]) for start in range(len(words) - length + 1)}


def _lexicon(words: Sequence[str]) -> re.Pattern[str] | None:
    if not words:
        return None
    parts = [re.escape(word.casefold().rstrip("*")) + (r"\w*" if word.endswith("*") else r"(?!\w)") for word in words]
    return re.compile(r"(?<!\w)(?:" + "|".join(parts) + ")")


@cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


@cache
def _authored_scorer() -> ToneScorer:
    from realigner.data.scorer import ToneScorer

    return ToneScorer.fit([row for tone in TONES for row in authored(tone)])
