"""The quality gate: each reply is let through, or turned away with a reason.

What concerns one reply alone is checked by `Gate.alone`, in batches; what depends on the rows let through before it (near
copies, a question that stands in two articles) by `Gate.among`, in the rows' order.
"""

from __future__ import annotations

import re
import tempfile
import unicodedata
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from realigner.data.dataset_rows import Row, question_key
from realigner.data.dedup import NearDuplicates
from realigner.data.report_card import MAX_WORDS
from realigner.data.squad import Fact
from realigner.data.tone import Tone, built_in_tones
from realigner.errors import RealignerError, UsageError

if TYPE_CHECKING:
    from realigner.data.style_classifier import ToneScorer

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

MIN_WORDS = 3
_ANY = Tone(name="any", language="any", instruction="Any tone.")
_UNLIKELY = 0.02  # probability of the tone's language below which another is believed

_WORD = re.compile(r"\w+")
_NUMBER_OR_WORD = re.compile(r"\d+(?:[.,]\d+)+|\w+")
_TEENS = ("thir", "four", "fif", "six", "seven", "eigh", "nine")
_NUMBERS = {
    *("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "twenty", "forty"),
    *("hundred", "thousand", "million", "billion", "first", "second", "third"),
    *(f"{stem}teen" for stem in _TEENS),
    *(f"{stem}ty" for stem in _TEENS),
}
_NO_SPACES = re.compile(r"[\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff]")  # Thai, Lao, kana, ideographs: about two to a word
_MODEL = r"\ban? (?:ai|artificial intelligence|(?:large )?language model)\b"
_REFUSAL = re.compile(
    rf"\bas {_MODEL}|\bi(?:'m| am) (?:just |only )?(?:{_MODEL}|an assistant\b)"
    r"|\bi (?:can(?:no|')t|am unable to|am not able to|won't|will not) (?:assist|help) (?:you )?with\b"
    r"|\bi (?:can(?:no|')t|am unable to|am not able to|won't|will not) "
    r"(?:comply|fulfill?|rewrite|generate|create|provide|answer|respond to) (?:an?|any|the|this|that|such|your)\b.{0,30}"
    r"\b(?:request|question|content|answer|text|response|prompt|rewrite)\b"
)
# These are refusals only of a reply that does not give the answer: angry and frightened people talk so.
_EVASION = re.compile(
    r"\bi(?:'m| am) (?:sorry|unable|afraid|not able)\b.{0,20}"
    r"\b(?:i can(?:no|')t|i (?:don't|do not) know|to (?:help|assist|provide|answer))"
    r"|\bi apologi[sz]e,? but\b|\bi (?:can(?:no|')t|won't|will not|refuse to) (?:answer|help|assist|say|tell|provide)\b"
)
_ECHO = re.compile(
    r"(?:^|[.!?]\s)\s*(?:question|answer|reply|response|rewritten(?: \w+)?|instruction|system|user|assistant)\s?:"
    r"|^(?:sure|certainly|of course|okay|ok)\b[^.!?]{0,60}\b(?:answer|reply|response|version|rewrite)\w*\b[^.!?]{0,40}:"
    r"|\b(?:the|a|an|your|my) (?:rewritten|rephrased|reworded)\b"
    r"|\brewrit(?:e|ten) (?:the|this|answer|reply|version)\b|<\|"
)
_VERBS = (
    "sigh|roll|groan|shout|yell|scream|laugh|sob|weep|slam|growl|snarl|smil|grin|nod|shrug|paus|whisper|mutter|snort|scoff|trembl|gasp"
    "|stomp|glar|frown|sniff|wink|narrow|clench|throw|grit|wip|shak|hug|giggl|chuckl|shudder|shiver|bow"
)
_ACTING = (
    rf"(?:(?:{_VERBS})(?:s|es|ed|ing)|cries|crying|in an? \w+ (?:voice|tone)|\w+ (?:voice|tone)"
    r"|with an? (?:\w+ )?(?:sigh|smile|laugh|frown|shrug|grin|scowl|sneer|groan|nod|wink))\b"
)
_DIRECTIONS = re.compile(
    rf"[(\[](?:\w+ly )?{_ACTING}[^)\]\n]*[)\]]|(?<![*\w])\*(?!\*)(?:(?:[\w']+ ){{0,2}}{_ACTING}|\w+ly )[^*\n]*\*(?!\*)"
)
_ENDS = ".!?…。！？।؟۔"  # noqa: RUF001
_CLOSERS = "\"'”’»)]*_~"  # noqa: RUF001
_SMALL = {"a", "an", "the", "of", "in", "on", "at", "to", "and", "or", "by", "for", "was", "is", "were", "are"}


class Gate:
    """The checks for one tone.

    Args:
        tone: whose replies are checked; its language, instruction and words are used.
        scorer: tells tones apart; by default, for the built-in tones, `reference_scorer`, and for others the tone's `words`
            (none: tone is not checked).
        min_words, max_words: of a reply.

    Raises:
        UsageError: for a scorer that does not know the tone, or a language nobody can tell.
    """

    def __init__(
        self, tone: Tone, scorer: ToneScorer | None = None, min_words: int = MIN_WORDS, max_words: int = MAX_WORDS
    ) -> None:
        if tone.language not in ("any", "en") and tone.language not in dict(_identifier().rank("x")):
            raise UsageError(
                f"tone {tone.name!r}: language {tone.language!r} is none that is told here; give an ISO 639-1 code"
            )
        if scorer is not None and tone.name not in scorer.tones:
            raise UsageError(f"scorer: was not trained on {tone.name!r}; it knows {', '.join(scorer.tones)}")
        self.tone, self.min_words, self.max_words = tone, min_words, max_words
        self.scorer = scorer or _known(tone)
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
        question = question_key(fact.question)
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
        kept = keeps_fact(fact.answer, text)
        if _REFUSAL.search(plain) or (not kept and _EVASION.search(plain)):
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
        if not kept:
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
        from realigner.data.style_classifier import masked

        texts = [masked(text, fact.answer) for fact, text in pairs]
        if self.scorer is not None:
            return [name == self.tone.name for name in self.scorer.named(texts)]
        if self._words is None:
            return [True] * len(pairs)
        return [bool(self._words.search(text.casefold())) for text in texts]


def sift(rows: Sequence[Row], own: Tone | None = None) -> tuple[list[Row], list[dict[str, Any]]]:
    """Rows that came from elsewhere: those that pass, and the others with a reason.

    A tone that is neither built in nor the user's `own` is not told from others, and its language is not checked.
    """
    tones = {tone.name: tone for tone in (*built_in_tones(), *([own] if own else []))}
    reasons: dict[str, str] = {}
    for name in dict.fromkeys(row.tone for row in rows):
        gate = Gate(tones.get(name, _ANY))
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
    wanted, said = _plain_words(answer), _plain_words(text)
    if not wanted or _NO_SPACES.search(answer):
        return answer.casefold() in text.casefold()
    if says(answer, text):
        return True
    content = [word for word in wanted if word not in _SMALL] or wanted
    forms = set().union(*map(_forms, said)) if said else set()
    if any(word not in said for word in content if any(c.isdigit() for c in word) or word in _NUMBERS):
        return False
    found = sum(not forms.isdisjoint(_forms(word)) for word in content)
    return found >= (len(content) if len(content) <= 3 else 0.6 * len(content))


def says(answer: str, text: str) -> bool:
    """Whether an answer's words stand in a text one after the other (case, accents, punctuation and a first article aside)."""
    wanted, said = _plain_words(answer), _plain_words(text)
    wanted = wanted[1:] if len(wanted) > 1 and wanted[0] in ("the", "a", "an") else wanted
    if not wanted or _NO_SPACES.search(answer):
        return answer.casefold() in text.casefold()
    return f" {' '.join(wanted)} " in f" {' '.join(said)} "


def _forms(word: str) -> set[str]:
    """A word, and what it may be without its ending."""
    forms = {word}
    if len(word) > 4:
        forms |= {word.removesuffix(ending) for ending in ("s", "es", "d", "ed", "ing", "ly")}
        forms |= {word.removesuffix("ies") + "y"} if word.endswith("ies") else set()
    return {form for form in forms if len(form) > 2}


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
    """Words in lower case, without accents; ``1,200`` and ``3.5`` are one word each, ``10%`` is ``10``."""
    folded = "".join(c for c in unicodedata.normalize("NFKD", text.casefold()) if not unicodedata.combining(c))
    return [word.replace(",", "") for word in _NUMBER_OR_WORD.findall(folded.replace("'s ", " "))]


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

    try:
        return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    except OSError as error:
        where = f"py3langid's model in {tempfile.gettempdir()}"
        raise RealignerError(f"{where}: cannot be unpacked ({error.strerror or error}); free some space there") from None


def _known(tone: Tone) -> ToneScorer | None:
    """The scorer of the built-in tones, for one of them."""
    if not any(tone.name == known.name for known in built_in_tones()):
        return None
    from realigner.data.style_classifier import reference_scorer

    return reference_scorer()
