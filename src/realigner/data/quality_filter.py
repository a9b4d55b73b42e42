"""The quality filter: accept each reply, or reject it with a reason.

`QualityFilter.alone` checks replies one by one, in batches; `QualityFilter.among` what depends on the rows accepted before
(near-duplicates, a question in two groups), in the rows' order.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from realigner.data.answers import MAX_WORDS, MIN_WORDS, NO_SPACES, is_cut, keeps_fact, word_count
from realigner.data.dataset_rows import Row, question_key
from realigner.data.dedup import NearDuplicates
from realigner.data.squad import Fact
from realigner.data.tone import Tone, built_in_tones
from realigner.data.words import LETTER, WORD
from realigner.errors import RealignerError, UsageError

if TYPE_CHECKING:
    from realigner.data.style_classifier import StyleClassifier

_ANY = Tone(name="any", language="any", instruction="Any tone.")
_UNLIKELY = 0.02  # probability of the tone's language below which another is believed

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
    r"|\brewrit(?:e|ten) (?:(?:the|this)(?: \w+){0,2} )?(?:answer|reply|response|version|sentence|text)\b|<\|"
)
_VERBS = (
    "sigh|roll|groan|shout|yell|scream|laugh|sobb?|weep|slam|growl|snarl|smil|grinn?|nodd?|shrugg?|paus|whisper|mutter|snort|scoff"
    "|trembl|gasp|stomp|glar|frown|sniff|wink|narrow|clench|throw|gritt?|wip|shak|hugg?|giggl|chuckl|shudder|shiver|bow"
)
_GOES_ON = (  # what follows a verb in -ing; a noun would make it an adjective (laughing gas)
    r"\b(?=\s*[^\w\s]|\s(?:\w+ly|and|as|at|with|in|into|to|on|up|down|away|out|off|for|through|like|an?|the|his|her|my|their"
    r"|tears|eyes|head|fists?|teeth|hands?|shoulders)\b)"
)
_MOOD = (
    "angry|furious|mocking|sarcastic|sad|weary|tearful|happy|cheerful|excited|scared|fearful|nervous|shaky|trembling|shaking"
)
_ACTING = (
    rf"(?:(?:{_VERBS})(?:s|es|ed|ing{_GOES_ON})|cries|crying{_GOES_ON}|in an? \w+ (?:voice|tone)|(?:{_MOOD}) (?:voice|tone)"
    r"|with an? (?:\w+ )?(?:sigh|smile|laugh|frown|shrug|grin|scowl|sneer|groan|nod|wink))\b"
)
_ALONE = (  # a direction as the only word in brackets or asterisks; others are emphasised (*absolutely*, *scream*)
    "(?:sigh|sob|groan|gasp|sniff|sniffle|giggle|chuckle|gulp|growl|snort|shrug|nod|wink|shudder|whimper|angrily|furiously|bitterly"
    r"|tearfully|mournfully|wearily|softly|nervously|fearfully|joyfully|cheerfully|excitedly|mockingly|sarcastically)[\s.!,…]*"
)
_DIRECTIONS = re.compile(
    rf"[(\[](?:(?:\w+ly )?{_ACTING}[^)\]\n]*|{_ALONE})[)\]]"
    rf"|(?<![*\w])\*(?!\*)(?:(?:[\w']+ ){{0,2}}{_ACTING}[^*\n]*|{_ALONE})\*(?!\*)"
)


class QualityFilter:
    """The checks for one tone.

    Args:
        tone: whose replies are checked; its language, instruction and words are used.
        scorer: tells tones apart; by default, for the built-in tones, `reference_classifier`, and for others the tone's `words`
            (none: tone is not checked).
        min_words, max_words: of a reply.
        chat: the replies end conversations. They have any length, and may begin with a question of one or two words ("Hi!").
        whole: a reply that stops in mid-sentence is rejected.

    Raises:
        UsageError: for a scorer that does not know the tone, or an unsupported language.
    """

    def __init__(
        self,
        tone: Tone,
        scorer: StyleClassifier | None = None,
        min_words: int = MIN_WORDS,
        max_words: int = MAX_WORDS,
        chat: bool = False,
        whole: bool = True,
    ) -> None:
        if tone.language not in ("any", "en") and tone.language not in dict(_identifier().rank("x")):
            raise UsageError(f"tone {tone.name!r}: language {tone.language!r} is not supported; give an ISO 639-1 code")
        if scorer is not None and tone.name not in scorer.tones:
            raise UsageError(f"scorer: was not trained on {tone.name!r}; it knows {', '.join(scorer.tones)}")
        self.tone, self.min_words, self.max_words, self.chat, self.whole = tone, min_words, max_words, chat, whole
        if scorer is None and any(tone.name == known.name for known in built_in_tones()):
            from realigner.data.style_classifier import reference_classifier

            scorer = reference_classifier()
        self.scorer = scorer
        self._instruction = _runs(tone.instruction)
        ends = {True: f"{LETTER}*", False: f"(?!{LETTER})"}
        words = [re.escape(word.casefold().rstrip("*")) + ends[word.endswith("*")] for word in tone.words]
        self._words = re.compile(f"(?<!{LETTER})(?:" + "|".join(words) + ")") if words else None
        self.restart()

    def restart(self) -> None:
        """Forget the rows accepted so far."""
        self._near = NearDuplicates()
        self._group_of: dict[str, str] = {}

    def alone(self, pairs: Sequence[tuple[Fact, str]]) -> list[str]:
        """A reason to reject each (fact, reply), empty for a good one; no reply is compared with another."""
        from realigner.data.style_classifier import masked

        reasons = [self._reason(fact, text) for fact, text in pairs]
        open_still = [n for n, reason in enumerate(reasons) if not reason]
        texts = [masked(pairs[n][1], pairs[n][0].answer) for n in open_still]
        if self.scorer is not None:
            in_tone = [name == self.tone.name for name in self.scorer.named(texts)]
        else:
            in_tone = [self._words is None or bool(self._words.search(text.casefold())) for text in texts]
        for number, fits in zip(open_still, in_tone, strict=True):
            if not fits:
                reasons[number] = "wrong tone"
        return reasons

    def among(self, fact: Fact, text: str) -> str:
        """A reason to reject a reply in view of those accepted before; empty: it is accepted, and counts from now on."""
        question = question_key(fact.question)
        if self._group_of.get(question, fact.group) != fact.group:
            return "question in another group"
        if self._near.add(fact.id, text) is not None:
            return "near-duplicate"
        self._group_of[question] = fact.group
        return ""

    def _reason(self, fact: Fact, text: str) -> str:
        plain = _plain(text)
        words = word_count(text)
        if not WORD.search(text):
            return "empty"
        kept = keeps_fact(fact.answer, text)
        if _REFUSAL.search(plain) or (not kept and _EVASION.search(plain)):
            return "refusal"
        # Whether a reply begins with its question, holds all of a long one, or eight words of the instruction in a row.
        said, question = WORD.findall(plain), WORD.findall(_plain(fact.question))
        within = len(question) >= 7 and f" {' '.join(question)} " in f" {' '.join(said)} "
        repeated = said[: len(question)] == question and not (self.chat and len(question) < 3)
        echoes = within or repeated or not self._instruction.isdisjoint(_runs(plain))
        told = _plain(fact.answer)
        if _stands_beside(told, _ECHO, plain) or echoes:
            return "prompt echoed"
        if _stands_beside(told, _DIRECTIONS, plain):
            return "stage directions"
        if words < self.min_words and not self.chat:
            return "too short"
        if words > self.max_words and not self.chat:
            return "too long"
        if self.whole and is_cut(text):
            return "cut in mid-sentence"
        if not kept:
            return "fact lost"
        return "wrong language" if self._foreign(fact, text) else ""

    def _foreign(self, fact: Fact, text: str) -> bool:
        if self.tone.language == "any":
            return False
        known = set(WORD.findall(f"{fact.question} {fact.answer}".casefold()))
        rest = " ".join(word for word in text.split() if known.isdisjoint(WORD.findall(word.casefold())))
        if len(rest) < 20 and not NO_SPACES.search(rest):
            return False  # too little to tell
        ranked = _identifier().rank(rest)
        likely = dict(ranked).get(self.tone.language)
        return likely is not None and ranked[0][0] != self.tone.language and likely < _UNLIKELY


def filter_rows(rows: Sequence[Row], own: Tone | None = None) -> tuple[list[Row], list[dict[str, Any]]]:
    """Filter imported rows: those accepted, and the others as dicts with a ``reason``.

    Tone and language are checked for built-in tones and the user's `own` only. Of a conversation the last reply is checked;
    a near-duplicate is one that repeats another as a whole.
    """
    tones = {tone.name: tone for tone in (*built_in_tones(), *([own] if own else []))}
    reasons: dict[str, str] = {}
    for name in dict.fromkeys(row.tone for row in rows):
        checks, chat_checks = (QualityFilter(tones.get(name, _ANY), chat=chat) for chat in (False, True))
        mine = [row for row in rows if row.tone == name]
        for some, chat in ((checks, False), (chat_checks, True)):
            alike = [row for row in mine if (row.messages is not None) == chat]
            pairs = [(Fact(row.id, row.group, row.question, row.answer), row.text) for row in alike]
            reasons |= {row.id: reason for row, reason in zip(alike, some.alone(pairs), strict=True)}
        for row in mine:
            reasons[row.id] = reasons[row.id] or checks.among(Fact(row.id, row.group, row.before, row.answer), row.own)
    rejected = [{**row.model_dump(), "reason": reasons[row.id]} for row in rows if reasons[row.id]]
    return [row for row in rows if not reasons[row.id]], rejected


def _plain(text: str) -> str:
    return text.casefold().replace("’", "'")  # noqa: RUF001


def _stands_beside(told: str, pattern: re.Pattern[str], text: str) -> bool:
    """Whether a text has what a pattern finds, other than as a part of the fact that it is told."""
    return any(match[0].strip() not in told for match in pattern.finditer(text))


def _runs(text: str, length: int = 8) -> set[tuple[str, ...]]:
    words = WORD.findall(text.casefold())
    return {tuple(words[start : start + length]) for start in range(len(words) - length + 1)}


@cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    try:
        return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    except OSError as error:
        where = f"py3langid's model in {tempfile.gettempdir()}"
        raise RealignerError(f"{where}: cannot be unpacked ({error.strerror or error}); free some space there") from None
