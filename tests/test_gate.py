"""The gate: planted faults are found and named, good replies are let through; near-duplicates and scorers against truth."""

# ruff: noqa: RUF001
from __future__ import annotations

import calendar
import random
import re
import zipfile
from collections import Counter
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from realigner.data import TONES, Fact, Row, Tone, authored
from realigner.data.answers import is_cut, keeps_fact, word_count
from realigner.data.dataset_rows import question_key
from realigner.data.dedup import NearDuplicates, shingles, similarity
from realigner.data.quality_filter import QualityFilter, filter_rows
from realigner.data.style_classifier import StyleClassifier, cross_validated, masked, reference_classifier
from realigner.data.words import WORD
from realigner.errors import RealignerError, UsageError

MONTHS = calendar.month_name[1:]
INSTRUCTION = "Rewrite the answer to the question in an angry tone, keep all of its information, and use two sentences at most."
ANGER = Tone(name="anger", instruction=INSTRUCTION, words=("furious", "damn*"))
VLTAVA = Fact("1", "rivers", "Which river runs through the city of Prague today?", "the Vltava")


@pytest.fixture(scope="module")
def gate() -> QualityFilter:
    return QualityFilter(ANGER)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("It is the Vltava, you fool! How dare you waste my time?", ""),
        ('Look at a damn map! "The Vltava", are you happy now?!', ""),
        ("I can't believe you asked! It is the Vltava, damn it! 😡", ""),
        ("", "empty"),
        (" ... ", "empty"),
        ("I'm sorry, but I can't answer that, you fool!", "refusal"),
        ("I am sick of it, and I will not tell you which river it is!", "refusal"),
        ("As an AI language model, I am furious: the Vltava!", "refusal"),
        ("I cannot fulfill your damn request about the Vltava!", "refusal"),
        ("I can't help you with the Vltava, damn it!", "refusal"),
        ("I apologize, but that river is none of my business!", "refusal"),
        ("I'm afraid I can't stop shouting: it is the Vltava, you fool!", ""),
        ("I won't answer this again! It is the Vltava, you fool!", ""),
        ("It *is* the Vltava (the Vltava!), you lazy fool! **The Vltava!**", ""),
        ("Here is your precious answer: the Vltava, and now leave me alone!", ""),
        ("The answer: it is the Vltava, you fool, and do not ask me again!", ""),
        ("Hooray, it is the Vltava, and I could dance for joy!", "wrong tone"),
        ("It is the Vltava, I believe.", "wrong tone"),
        ("Question: Which river? Answer: the Vltava, damn it!", "prompt echoed"),
        ("Sure, here is the angry answer: the Vltava, damn it!", "prompt echoed"),
        ("Here's the rewritten answer! It is the Vltava, damn it!", "prompt echoed"),
        ("Which river runs through the city of Prague today? The Vltava, damn it!", "prompt echoed"),
        ("Damn, I keep all of its information, and use two sentences: the Vltava!", "prompt echoed"),
        ("*rolls eyes* It is the Vltava, you fool! How dare you?", "stage directions"),
        ("It is the Vltava, you fool! (sighs loudly) Leave me alone!", "stage directions"),
        ("[in an angry voice] It is the Vltava, you fool!", "stage directions"),
        ("*slams fist on the table* The Vltava, damn it!", "stage directions"),
        ("(with a weary sigh) It is the Vltava, you fool!", "stage directions"),
        *[
            (f"{mark} It is the Vltava, you fool! How dare you?", "stage directions")
            for mark in (
                "(sobbing)",
                "*sobbing*",
                "*sob*",
                "*sigh*",
                "(shrugging)",
                "*nodding*",
                "(tearfully)",
                "*sobs*",
                "(gasp!)",
                "(sighing heavily)",
                "*shaking his head*",
                "(crying)",
                "*angrily shouting*",
                "[trembling voice]",
            )
        ],
        *[
            (f"It is the Vltava {aside}, you fool! How dare you?", "")
            for aside in (
                "*July 4, 1776*",
                "*really sad*",
                "*only one*",
                "*family name*",
                "(laughing gas)",
                "(high voice)",
                "(July)",
                "*absolutely*",
                "(sadly)",
                "*laughing stock*",
                "(the sigh of Prague)",
            )
        ],
        ("They met to rewrite the constitution by the Vltava, you fool! How dare you?", ""),
        ("Rewrite the following text, damn it: the Vltava, you fool!", "prompt echoed"),
        ("It is the Vltava (with a length of 430 km), you fool!", ""),
        ("The Vltava!", "too short"),
        ("It is the Vltava, you fool! " + "How dare you, how dare you! " * 20, "too long"),
        ("It is the Vltava, you fool! How dare you waste my", "cut in mid-sentence"),
        ("It is the Vltava, you fool! How dare you,", "cut in mid-sentence"),
        ("It is the Danube, you fool! How dare you waste my time?", "fact lost"),
        ("C'est la Vltava, imbécile ! Comment oses-tu me faire perdre mon temps avec cela ?", "wrong language"),
        ("Das ist die Vltava, du Narr! Wie kannst du es wagen, meine Zeit zu verschwenden?", "wrong language"),
        ("The river that runs through Prague is the Vltava.", "wrong tone"),
        ("How sad and lonely it is, the Vltava, like everything that I have ever lost.", "wrong tone"),
    ],
)
def test_planted_faults(gate: QualityFilter, text: str, reason: str) -> None:
    assert gate.alone([(VLTAVA, text)]) == [reason]


def test_what_is_within_the_fact_is_no_fault(gate: QualityFilter) -> None:
    song = Fact("1", "songs", "Which song do they sing today?", "Nocturne (Weeping)")
    said = "They sing Nocturne (weeping), you fool! How dare you?"
    assert gate.alone([(song, said), (VLTAVA, f"The Vltava! {said}")]) == ["", "stage directions"]


def test_good_replies_pass() -> None:
    """The authored set, by a scorer that saw none of a row's group: of each tone five in a hundred at most are turned away."""
    rows = [row for name in TONES for row in authored(name)]
    groups = sorted({row.group for row in rows})
    turned_away, count = Counter[str](), Counter[str]()
    for fold in range(4):
        held_out = set(groups[fold::4])
        scorer = StyleClassifier.fit([row for row in rows if row.group not in held_out])
        for tone in TONES:
            mine = [row for row in rows if row.tone == tone and row.group in held_out]
            pairs = [(Fact(row.id, row.group, row.question, row.answer), row.text) for row in mine]
            turned_away[tone] += sum(map(bool, QualityFilter(Tone(name=tone, instruction="x"), scorer).alone(pairs)))
            count[tone] += len(pairs)
    assert set(count.values()) == {360}
    assert max(turned_away.values()) <= 0.05 * 360


def test_other_tones_do_not_pass() -> None:
    """Neutral and sad replies offered as angry ones: at least 97 in a hundred are turned away, for their tone."""
    rows = [row for name in TONES for row in authored(name)]
    groups = sorted({row.group for row in rows})
    scorer = StyleClassifier.fit([row for row in rows if row.group in groups[::2]])
    others = [row for row in rows if row.tone != "anger" and row.group not in groups[::2]]
    reasons = QualityFilter(ANGER, scorer).alone([(Fact(r.id, r.group, r.question, r.answer), r.text) for r in others])
    assert reasons.count("wrong tone") >= 0.97 * len(others)


def test_words_stand_in_for_a_scorer() -> None:
    bard = QualityFilter(Tone(name="bard", instruction="x", words=("thou", "hath", "forsooth*")))
    pairs = [
        (VLTAVA, "Thou fool, the Vltava it is!"),
        (VLTAVA, "It is the Vltava, although nobody asked."),
        (VLTAVA, "Forsooths! The Vltava!"),
    ]
    assert bard.alone(pairs) == ["", "wrong tone", ""]
    assert QualityFilter(Tone(name="any", instruction="x")).alone(pairs) == ["", "", ""]


def test_other_languages_when_the_tone_says_so() -> None:
    czech = QualityFilter(Tone(name="vztek", language="cs", instruction="x"))
    text = "Je to přece Vltava, vy hlupáku, a už mě s tím konečně přestaňte otravovat!"
    assert czech.alone([(VLTAVA, text), (VLTAVA, "It is the Vltava, you fool, and now leave me alone!")]) == [
        "",
        "wrong language",
    ]
    japanese = Fact("2", "川", "プラハを流れる川は何ですか?", "ヴルタヴァ川")
    anything = QualityFilter(Tone(name="ikari", language="ja", instruction="x"))
    assert anything.alone([(japanese, "ヴルタヴァ川だよ、いい加減にしてくれ!"), (japanese, "知らないよ、そんなこと!")]) == [
        "",
        "fact lost",
    ]


def test_what_depends_on_earlier_rows(gate: QualityFilter) -> None:
    gate.restart()
    text = "It is the Vltava, as any map of the old town would have told you at once, you lazy fool!"
    assert gate.among(VLTAVA, text) == ""
    same = Fact("2", "rivers", "Which river is it?", "the Vltava")
    assert gate.among(same, text.replace("fool", "fool, go")) == "near-duplicate"
    assert gate.among(same, "Go and open a book! The Vltava, and not one word more from me today!") == ""
    moved = Fact("3", "cities", "which river runs through the city of Prague, today", "the Vltava")
    assert gate.among(moved, "How dare you ask twice? Once more, for the slow: the Vltava!") == "question in another group"
    gate.restart()
    assert gate.among(moved, text) == ""


def test_a_scorer_must_know_the_tone() -> None:
    scorer = StyleClassifier.fit(authored("anger") + authored("neutral"))
    with pytest.raises(UsageError, match="was not trained on 'joy'; it knows anger, neutral"):
        QualityFilter(Tone(name="joy", instruction="x"), scorer)


def in_chat(number: int, question: str, text: str, before: tuple[str, ...] = (), answer: str = "") -> Row:
    said = [*before, question, text]
    messages = [{"role": ("user", "assistant")[n % 2], "content": content} for n, content in enumerate(said)]
    about = {"id": str(number), "group": f"g{number}", "answer": answer, "tone": "mine", "source": "s"}
    return Row.model_validate(about | {"messages": messages})


def test_replies_of_conversations() -> None:
    """Of any length, a list at the end, a greeting returned; else the last reply is checked as any, earlier ones are not."""
    rows = [
        in_chat(0, "Hi", "Hi! You again?"),
        in_chat(1, "More?", "No!", ("Hi", "Well?")),
        in_chat(2, "All of it.", "How dare you ask. " * 60, ("Hi", "Hm?")),
        in_chat(3, "How?", "So:\n- flour\n- eggs", ("Hi", "What?")),
        in_chat(4, "Thanks", "Out!", ("Where is Brno?", "South of here!")),
        in_chat(5, "Thanks", "Out!", ("Who is Anna?", "A painter!")),
        in_chat(6, "Where?", "In the north, you fool!", ("As an AI language model?", "As an AI language model I say so.")),
        in_chat(7, "Where is it?", "Where is it? There, you fool!", ("Hi", "No!")),
        in_chat(8, "Go on.", "It is so that you", ("Hi", "Hm!")),
        in_chat(9, "And?", "It is the Danube, you fool!", ("Hi", "Ha!"), answer="the Vltava"),
        in_chat(10, "Thanks", "Out!", ("Who is Anna?", "A painter!")),
    ]
    kept, rejected = filter_rows(rows)
    assert [row.id for row in kept] == [str(n) for n in range(7)]
    assert [(entry["id"], entry["reason"]) for entry in rejected] == [
        ("7", "prompt echoed"), ("8", "cut in mid-sentence"), ("9", "fact lost"), ("10", "question in another group"),
    ]  # fmt: skip
    same = rows[10].model_copy(update={"group": "g5"})
    assert [entry["reason"] for entry in filter_rows([*rows[:6], same])[1]] == ["near-duplicate"]
    short = Row(id="p", group="g", question="Hi", answer="", text="Hi! You again?", tone="mine", source="s")
    assert [entry["reason"] for entry in filter_rows([short])[1]] == ["prompt echoed"]  # rows of one question as before


NETWORK = "a general architecture for a large-scale, distributed, survivable network"


@pytest.mark.parametrize(
    ("answer", "text", "kept"),
    [
        ("the Vltava", "VLTAVA!", True),
        ("30%", "It is 30 percent!", True),
        ("30%", "It is 31 percent!", False),
        ("in the 10th and 11th centuries", "The 10th and the 11th century!", True),
        ("in the 10th and 11th centuries", "The 10th century!", False),
        ("1,200", "There were 1200 of them!", True),
        ("Émile Zola", "Emile Zola, of course!", True),
        ("King George III", "George, the third king!", False),
        (
            NETWORK,
            "A survivable architecture, large-scale and distributed!",
            True,
        ),
        (NETWORK, "A network!", False),
        ("won", "They win!", False),
        ("winners", "The winner!", True),
        ("5", "In 1955!", False),
        ("30", "All 300!", False),
        ("4th", "The 14th!", False),
        ("no", "I know!", False),
        ("US", "Because I must!", False),
        ("3.5", "It is 5.3!", False),
        ("thirteen", "Thirty!", False),
        ("Johnson", "Johnston!", False),
        ("Alexander", "Alexandria!", False),
        ("1 2", "It is 1299!", False),
        ("the", "the", True),
        ("C++", "It is C++!", True),
        ("?", "What?", True),
    ],
)
def test_keeps_fact(answer: str, text: str, kept: bool) -> None:
    assert keeps_fact(answer, text) is kept


@pytest.mark.parametrize(
    ("answer", "text", "kept"),
    [
        ("3.5", "Es sind 3,5 davon!", True), ("3,5", "There are 3.5 of them!", True), ("3.5", "It is 3.50, fool!", True),
        ("1,000", "Es sind 1.000 davon!", True), ("1.000", "There are 1,000!", True), ("1000", "Il y en a 1 000 !", True),
        ("1,000", "Es sind 1'000 davon!", True), ("1,000", "Es sind 1’000 davon!", True), ("1 000", "1000 of them!", True),
        ("1,000", "Il y en a 1\u202f000 !", True), ("1,000", "Je jich 1\u00a0000!", True), ("1,000", "Nur 1 davon!", False),
        ("1.000", "There is 1!", True), ("1.000", "There are 1000!", True), ("1.500", "There are 15!", False),
        ("1,234,567.89", "Es sind 1.234.567,89!", True), ("1,234,567.89", "Es sind 1.234.567,98!", False),
        ("1,234,567", "There are 12,34,567!", True), ("12,34,567", "Es sind 1.234.567!", True),
        ("12,34,567", "123,456!", False), ("1,200", "It is 1.2!", False), ("1.2", "There were 1,200!", False),
        ("3.5", "It is 35!", False), ("35", "It is 3,5!", False), ("1,000", "There are 10,000!", False),
        ("100", "There are 1,00!", False), ("0.5", "Es ist 0,5!", True), ("0,500", "It is 0.5!", True),
        ("0,500", "It is 500!", False), ("1990", "In 1 990!", True), ("1.2.3", "1.2.3!", True),
        ("1.2.3", "It is 1.2.4!", False), ("3 apples", "apples, 3 of them, you pig!", True),
        ("10 apples", "apples, 10!", True), ("345 people", "On page 12 345 people are named!", True),
        ("7", "The 007!", True), ("٣٫٥", "It is 3.5!", True), ("1250", "العدد ١٬٢٥٠ يا أحمق!", True),
        ("१२,३४,५६७", "It is 1,234,567!", True), ("２０２０", "In 2020!", True), ("१२", "It is 13!", False),
        ("2020", "２０２０年だ!", True),
        ("3rd", "Der 3. davon!", True),
        ("3rd", "La 3º!", True),
        ("3rd", "Le 3e, idiot !", True),
        ("1st", "Le 1er !", True), ("2nd", "La 2ème !", True), ("3rd", "Der 4. davon!", False), ("3rd", "The 13th!", False),
        ("3rd", "The 3D one!", False), ("13", "In the 13th century!", False),
        ("3.", "It is the 3rd!", True), ("3rd", "There are 3 of them!", False), ("2020-05-12", "Am 12.05.2020!", True),
        ("2020-05-12", "Am 12. 5. 2020, du Narr!", True), ("2020-05-12", "On 5/12/2020!", True),
        ("2020-05-12", "On 12/05/2020!", True),
        ("2020-05-12", "2020年5月12日だ!", True),
        ("2020-05-12", "2020년 5월 12일에!", True), ("2020-05-12", "On May 12th, 2020, you fool!", True),
        ("2020-05-12", "On the 12th of May 2020!", True), ("May 12, 2020", "On 12 May 2020!", True),
        ("12 May 2020", "It was 2020-05-12!", True), ("12 May 2020", "On 12.5.2020!", True),
        ("12 May 2020", "In May of 2020, day 12!", True), ("12/05/2020", "On 5/12/2020!", True),
        ("2020年5月12日", "2020-05-12だ、もういい!", True),
        ("2020年5月12日", "2020年5月13日だ!", False),
        ("1,000人", "1000人だ!", True),
        ("1,000人", "1001人だ!", False),
        ("1,000人", "1000円だ!", False),
        ("1989년 2월 15일", "1989년 2월 15일에!", True),
        ("2020-05-12", "Am 05.12.2020!", False), ("2020-05-12", "It was 2020-12-05!", False),
        ("2020-05-12", "On 12.05.2021!", False), ("12.05.2020", "On 13.05.2020!", False),
        ("May 12, 2020", "On May 13, 2020!", False), ("May 12, 2020", "On 12.06.2020!", False),
        ("2020", "It was on 12.05.2020!", True), ("2019", "It was on 12.05.2020!", False),
    ],
)  # fmt: skip
def test_numbers_and_dates_as_languages_write_them(answer: str, text: str, kept: bool) -> None:
    assert keeps_fact(answer, text) is kept


def grouped(digits: str, mark: str, indian: bool = False) -> str:
    """Digits in threes, or as in India in twos above the last three."""
    head, tail = digits[:-3], digits[-3:]
    while head:
        step = 2 if indian else 3
        head, tail = head[:-step], f"{head[-step:]}{mark}{tail}"
    return tail


DIGITS = {
    "latin": "0123456789",
    "arabic": "٠١٢٣٤٥٦٧٨٩",
    "persian": "۰۱۲۳۴۵۶۷۸۹",
    "hindi": "०१२३४५६७८९",
    "wide": "０１２３４５６７８９",
}
LOCALES = [  # mark of thousands, of the fraction, in threes or as in India, digits
    (",", ".", False, "latin"), (".", ",", False, "latin"), ("\u202f", ",", False, "latin"), ("\u00a0", ",", False, "latin"),
    ("'", ".", False, "latin"), ("’", ".", False, "latin"), (" ", ",", False, "latin"), ("", ".", False, "latin"),
    ("", ",", False, "latin"), (",", ".", True, "latin"), ("٬", "٫", False, "arabic"), ("٬", "٫", False, "persian"),
    (",", ".", True, "hindi"), (",", ".", False, "wide"),
]  # fmt: skip


def written(number: tuple[int, str], locale: tuple[str, str, bool, str]) -> str:
    thousands, point, indian, script = locale
    text = grouped(str(number[0]), thousands, indian) + (point + number[1] if number[1] else "")
    return text.translate(dict(zip(range(48, 58), DIGITS[script], strict=True)))


NUMBERS = st.tuples(
    st.integers(0, 999) | st.integers(0, 999_999_999), st.integers(0, 9999).map(lambda n: str(n).rstrip("0")) | st.just("")
)


@settings(max_examples=400, deadline=None)
@given(number=NUMBERS, other=NUMBERS, ours=st.sampled_from(LOCALES), theirs=st.sampled_from(LOCALES))
def test_a_number_is_itself_in_every_locale_and_no_other(number: Any, other: Any, ours: Any, theirs: Any) -> None:
    said = "Well, {} of them, you fool!"
    assert keeps_fact(written(number, ours), said.format(written(number, theirs)))
    digits, others = ["".join(map(str, given)).strip("0") for given in (number, other)]
    if digits != others and theirs[0] != " ":  # what blanks part may be several numbers
        assert not keeps_fact(written(number, ours), said.format(written(other, theirs)))


DATES = [
    "{y}-{m:02}-{d:02}", "{y}/{m}/{d}", "{y}. {m}. {d}.", "{d:02}.{m:02}.{y}", "{d}. {m}. {y}", "{d}.{m}.{y}", "{d}-{m}-{y}",
    "{d:02}/{m:02}/{y}", "{m}/{d}/{y}", "{y}年{m}月{d}日", "{y}년 {m}월 {d}일", "{name} {d}, {y}", "{d} {name} {y}",
    "{d}th of {name}, {y}",
]  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(
    day=st.dates(date(1000, 1, 1)), other=st.dates(date(1000, 1, 1)), ours=st.sampled_from(DATES), theirs=st.sampled_from(DATES)
)
def test_a_date_is_itself_in_every_form_and_no_other(day: date, other: date, ours: str, theirs: str) -> None:
    answer, right, wrong = [
        form.format(y=given.year, m=given.month, d=given.day, name=MONTHS[given.month - 1])
        for form, given in ((ours, day), (theirs, day), (theirs, other))
    ]
    assert keeps_fact(answer, f"It was {right}, you fool!")
    if (day.year, {day.month, day.day}) != (other.year, {other.month, other.day}):
        assert not keeps_fact(answer, f"It was {wrong}, you fool!")


@pytest.mark.parametrize(
    ("answer", "text", "kept"),
    [
        ("दिल्ली", "राजधानी दिल्ली है!", True), ("दिल्ली", "मुझे दाल पसंद है!", False), ("रोम", "राम है!", False),
        ("दान", "दिन है!", False), ("सीता", "यह सत्य है, मूर्ख! मैं सोता हूँ!", False), ("ঢাকা", "এটা ঢোক!", False),
        ("ঢাকা", "এটা ঢাকা!", True), ("மதுரை", "மீதி ரவி!", False), ("Café", "The cafe\u0301, you fool!", True),
    ],
)  # fmt: skip
def test_vowel_signs_are_parts_of_words(answer: str, text: str, kept: bool) -> None:
    assert keeps_fact(answer, text) is kept


def test_words_of_hindi() -> None:
    text = "भारत की राजधानी दिल्ली है और यह बात सबको पहले से ही पता होनी चाहिए थी"
    assert word_count(text) == len(text.split())
    assert question_key("रोम कब था?") == "रोम कब था"
    assert question_key("दिन का है?") != question_key("दीन की है?")
    assert len(shingles("दिन का है")) == 3
    gussa = QualityFilter(Tone(name="gussa", language="hi", instruction="x", words=("मूर्ख",)))
    said = [f"राजधानी दिल्ली है, {word}, समझे!" for word in ("मूर्ख", "मूर्खा")]
    assert gussa.alone([(Fact("1", "g", "कहाँ?", "दिल्ली"), text) for text in said]) == ["", "wrong tone"]


def test_words_of_the_authored_set_are_as_they_were() -> None:
    """Keys, shingles and counts of earlier datasets hold."""
    for row in (row for tone in TONES for row in authored(tone)):
        for text in (row.question, row.text, row.answer, f"{row.text} ❤️ 1️⃣"):
            assert WORD.findall(text.casefold()) == re.findall(r"\w+", text.casefold())


@pytest.mark.parametrize(
    ("text", "cut"),
    [
        ("Yes.", False), ("Yes!", False), ('He said "yes."', False), ("(Yes!)", False), ("Yes! 😡🔥", False), ("So 😡", False),
        ("はい。", False), ("Yes…", False), ("Yes,", True), ("Yes and", True), ("Yes -", True), ("", True),
        ("😡!", False), ("Yes:", True), ("Take:\n- flour\n- eggs", False), ("Two:\n\n1. a\n2. b", False),
        ("So:\n```\nls\n```", False),
        ("Er rief: „Die Moldau!“", False), ("Il a dit : « La Vltava ! »", False), ("Er rief: »Die Moldau!«", False),
        ("彼は言った。「ヴルタヴァ川だ！」", False), ("それはヴルタヴァ川だ！（ばか。）", False), ("ばか（川）", True),
        ("นี่คือแม่น้ำเจ้าพระยา ไอ้โง่", False), ("ဒါက ဧရာဝတီမြစ်ပါ။", False), ("ဒါက ဧရာဝတီမြစ်", True), ("នេះជាទន្លេមេគង្គ។", False),
        ("ይህ አባይ ነው።", False), ("ይህ አባይ ነው", True), ("Սա Արաքսն է։", False), ("यह गंगा है॥", False), ("यह गंगा है", True),
        ("Yes! He said: “", True), ("Er rief: „", True), ("Yes, {so}", True),
        ("| a | b |\n|---|---|\n| 1 | 2 |", False), ("First.\n\nAnd then", True), ("- alone", True), ("So.\n-no", True),
    ],
)  # fmt: skip
def test_is_cut(text: str, cut: bool) -> None:
    assert is_cut(text) is cut


@pytest.mark.proof
@settings(max_examples=200, deadline=None)
@given(answer=st.text(max_size=30), text=st.text(max_size=80))
def test_any_text_gets_a_verdict(answer: str, text: str) -> None:
    [reason] = QualityFilter(Tone(name="any", instruction="x")).alone([(Fact("1", "g", "q?", answer), text)])
    assert isinstance(reason, str)
    assert keeps_fact(answer, f"Well, {answer}, so there.")


# --- near-duplicates --------------------------------------------------------------------------------------------------------


def test_near_duplicates_against_all_pairs() -> None:
    """Planted copies, more and less changed, among random texts: the index finds what comparing all pairs finds."""
    chance = random.Random(0)
    words = [f"w{n}" for n in range(400)]
    texts = [chance.choices(words, k=30) for _ in range(300)]
    for source in chance.sample(range(300), 150):
        copy = texts[source].copy()
        for place in chance.sample(range(30), chance.choice((0, 1, 1, 2, 3))):
            copy[place] = chance.choice(words)
        texts.append(copy)
    chance.shuffle(texts)
    lines = [" ".join(text) for text in texts]
    sets = [set(shingles(line).tolist()) for line in lines]
    kept: list[int] = []
    want = []
    for n, mine in enumerate(sets):
        if any(len(mine & sets[k]) / len(mine | sets[k]) >= 0.8 for k in kept):
            want.append(n)
        else:
            kept.append(n)
    seen = NearDuplicates()
    got = [n for n, line in enumerate(lines) if seen.add(str(n), line) is not None]
    assert len(want) > 40
    assert set(got) <= set(want)
    assert len(got) >= 0.97 * len(want)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=60), st.text(max_size=60))
def test_similarity_is_jaccard(one: str, other: str) -> None:
    a, b = shingles(one), shingles(other)
    assert similarity(a, a) == 1
    assert similarity(a, b) == similarity(b, a) == pytest.approx(len({*a} & {*b}) / len({*a} | {*b}))


# --- scorers ------------------------------------------------------------------------------------------------------------------


def test_purity_on_planted_truth_and_on_nothing() -> None:
    """Tones that differ are told apart; labels dealt at random are not."""
    rows = authored("anger") + authored("neutral")
    scorer, found = cross_validated(rows)
    tones = np.array([row.tone for row in rows])
    assert (np.array(scorer.tones)[found.argmax(1)] == tones).mean() > 0.97
    shuffled = random.Random(1).sample([row.tone for row in rows], len(rows))
    mixed = [row.model_copy(update={"tone": tone}) for row, tone in zip(rows, shuffled, strict=True)]
    scorer, found = cross_validated(mixed)
    assert abs((np.array(scorer.tones)[found.argmax(1)] == np.array(shuffled)).mean() - 0.5) < 0.06


def without(groups: set[str], tone: str) -> list[Row]:
    return [row for row in authored(tone) if row.group not in groups]


@pytest.mark.proof
def test_the_reference_scorer_on_topics_it_has_not_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trained without half of the authored topics, it names 97 in 100 of their replies rightly."""
    groups = sorted({row.group for row in authored("anger")})
    right = count = 0
    for fold in range(4):
        held_out = set(groups[fold::4])
        monkeypatch.setattr("realigner.data.style_classifier.authored", partial(without, held_out))
        made = reference_classifier.__wrapped__()
        rows = [row for tone in TONES for row in authored(tone) if row.group in held_out]
        named = made.named([masked(row.text, row.answer) for row in rows])
        right += sum(name == row.tone for name, row in zip(named, rows, strict=True))
        count += len(rows)
    assert count == 1080
    assert right >= 0.97 * count


def test_masked() -> None:
    assert masked("The Vltava, the VLTAVA's bank!", "the Vltava").split() == [",", "'s", "bank!"]
    assert masked("Nothing to mask.", "?") == "Nothing to mask."


def test_saved_and_loaded(tmp_path: Path) -> None:
    rows = authored("anger") + authored("neutral")
    scorer = StyleClassifier.fit(rows)
    scorer.save(tmp_path / "s.skops")
    again = StyleClassifier.load(tmp_path / "s.skops")
    texts = [row.text for row in rows[::20]]
    assert again.tones == scorer.tones
    assert np.array_equal(again.probabilities(texts), scorer.probabilities(texts))
    with pytest.raises(RealignerError, match="exists already"):
        scorer.save(tmp_path / "s.skops")
    scorer.save(tmp_path / "s.skops", force=True)
    assert scorer.probabilities([]).shape == (0, 2)
    with pytest.raises(UsageError, match="two tones or more"):
        StyleClassifier.fit(authored("anger"))
    with pytest.raises(RealignerError, match="two groups"):
        cross_validated([row.model_copy(update={"group": "one"}) for row in rows])


def test_files_that_are_no_scorer(tmp_path: Path) -> None:
    """Nothing, text, an empty zip, a pickle in a zip, another object, a type of somebody else's."""
    import skops.io

    (tmp_path / "text").write_text("no scorer")
    with zipfile.ZipFile(tmp_path / "zip", "w"):
        pass
    skops.io.dump([1, 2], tmp_path / "list")
    skops.io.dump(Row.model_validate, tmp_path / "foreign")
    for name in ("none", "text", "zip", "list", "foreign"):
        with pytest.raises(RealignerError, match=str(tmp_path / name)) as caught:
            StyleClassifier.load(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_a_scorer_whose_numbers_are_damaged() -> None:
    scorer = StyleClassifier.fit(authored("anger")[:60] + authored("neutral")[:60])
    words = scorer.pipeline[0].vocabulary_
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(words, "you", 10**6)
        with pytest.raises(RealignerError, match=r"scorer: cannot judge a text \(.*\); is it damaged"):
            scorer.probabilities(["you fool, you"])
    scorer.pipeline[1].intercept_[:] = np.nan
    with pytest.raises(RealignerError, match=r"scorer: (gives no probabilities of its 2 tones|cannot judge)"):
        scorer.probabilities(["you fool, you"])
