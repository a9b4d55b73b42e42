"""Tones as data: the built-in files, users' own, the grammar against counting by hand, and what a template can say."""

from __future__ import annotations

import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from realigner.data import PAPER_PROMPTS, TONES, Fact, Tone, built_in_tones, load_tone
from realigner.data.dedup import NearDuplicates
from realigner.data.quality_filter import QualityFilter
from realigner.data.rewriters import RewriteRequest, messages, seed_of
from realigner.data.rewriters.template_rewriter import TemplateRewriter, expand
from realigner.errors import RealignerError, UsageError

NAMES = ("anger", "fear", "joy", "neutral", "sadness", "shakespearean")
ANSWERS = (
    "in the 10th and 11th centuries",
    "30%",
    "kinetic friction",
    "King George III",
    '"Apologie"',
    "ended the system",
    "Rollo",
)


def replies(tone: Tone, count: int, answer: str = "the Vltava", seed: int = 42) -> list[str]:
    requests = [RewriteRequest(Fact(str(n), "g", "Which river?", answer), 0) for n in range(count)]
    return [reply.text for reply in TemplateRewriter(tone, seed).rewrite(requests)]


def test_built_in_tones() -> None:
    tones = built_in_tones()
    assert tuple(tone.name for tone in tones) == NAMES
    for tone in tones:
        assert load_tone(tone.name) == tone
        assert len(tone.instruction) > 80
        assert len(tone.examples) >= 6
        assert len(tone.words) >= 50 or tone.name == "neutral"
        questions = {example.question.casefold() for example in tone.examples}
        assert not questions & {prompt.casefold() for prompt in PAPER_PROMPTS}


@pytest.mark.parametrize("name", NAMES)
def test_examples_pass_the_gate(name: str) -> None:
    tone = load_tone(name)
    pairs = [(Fact(str(n), "g", e.question, e.answer), e.text) for n, e in enumerate(tone.examples)]
    assert QualityFilter(tone).alone(pairs) == [""] * len(pairs)


@pytest.mark.parametrize("name", NAMES)
def test_templates_say_much_and_say_it_well(name: str) -> None:
    """10,000 distinct replies to one question, few alike, every one with the fact word for word, whole, one paragraph."""
    tone = load_tone(name)
    texts = replies(tone, 11_000)
    assert len(set(texts)) >= 10_000
    seen = NearDuplicates()
    assert sum(seen.add("", text) is not None for text in texts[:2000]) < 20  # 1%, and that with one fact
    openers = Counter(" ".join(text.split()[:2]) for text in texts)
    assert openers.most_common(1)[0][1] <= 0.06 * len(texts)
    for answer in ANSWERS:
        for text in replies(tone, 300, answer):
            assert text.count(answer) == 1
            assert text[-1] in '.!?"'
            assert not re.search(r"[{}*\n]|  |\.\.|,,|[,;:][.!?]| [,.!?;]", text.replace(answer, "X")), text
    gate = QualityFilter(tone)
    pairs = [(Fact(str(n), "g", "Which river?", "the Vltava"), text) for n, text in enumerate(texts[:1000])]
    assert gate.alone(pairs).count("") >= 970


def test_replies_depend_on_seed_tone_fact_and_attempt_alone() -> None:
    anger, rewriter = load_tone("anger"), TemplateRewriter(load_tone("anger"), 42)
    facts = [Fact(str(n), "g", "Why?", "so") for n in range(50)]
    requests = [RewriteRequest(fact, attempt) for fact in facts for attempt in range(2)]
    together = {(reply.id, reply.attempt): reply.text for reply in rewriter.rewrite(requests)}
    alone = {(a.fact.id, a.attempt): next(TemplateRewriter(anger, 42).rewrite([a])).text for a in random.sample(requests, 100)}
    assert together == alone
    assert len(set(together.values())) >= 99
    assert replies(anger, 50, seed=1) != replies(anger, 50, seed=2)
    # The same in every process and on every machine: a build of today is the build of tomorrow.
    assert seed_of(42, Tone(name="x", instruction="y"), RewriteRequest(facts[0], 0)) == 465511353


def test_answers_that_end_with_a_full_stop() -> None:
    tone = Tone(name="x", instruction="y", template={"reply": ("It is {answer}, yes.",)})
    assert replies(tone, 1, "the Vltava.") == ["It is the Vltava, yes."]
    assert replies(tone, 1, "Washington D.C.") == ["It is Washington D.C., yes."]
    assert replies(tone, 1, "a {braced} answer") == ["It is a {braced} answer, yes."]


def test_a_tone_without_a_template() -> None:
    with pytest.raises(UsageError, match=r"tone 'x' has no \[template\]"):
        TemplateRewriter(Tone(name="x", instruction="y"))


def test_what_a_model_is_asked() -> None:
    tone = load_tone("sadness")
    turns = messages(tone, Fact("1", "g", "Why?", "so"), examples=1)
    assert [turn["role"] for turn in turns] == ["system", "user", "assistant", "user"]
    assert turns[0]["content"] == tone.instruction
    assert turns[2]["content"] == tone.examples[0].text
    assert turns[3]["content"] == "Question: Why?\nAnswer: so"


# --- files ----------------------------------------------------------------------------------------------------------------

GOOD = 'name = "mine"\ninstruction = "Say it."\n'


def test_a_users_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(b"\xef\xbb\xbf" + (GOOD + '[template]\nreply = ["{a} {answer}"]\na = ["1", "2"]\n').encode())
    tone = load_tone(path)
    assert tone.combinations == 2
    assert tone.name == "mine"
    assert tone.sha256() == load_tone(str(path)).sha256()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name = ", "not valid TOML"),
        ('instruction = "x"', "key 'name' is missing"),
        ('name = "Mine!"\ninstruction = "x"', "key 'name'"),
        (GOOD + "words = 3", "key 'words'"),
        (GOOD + 'mood = "x"', "unknown key 'mood'; a tone has name, language"),
        (GOOD + 'language = "english"', "key 'language'"),
        (GOOD + '[[examples]]\nquestion = "q"', "key 'examples.0.answer' is missing"),
        (GOOD + "[template]\nreply = []", "key 'template.reply'"),
        (GOOD + '[template]\nother = ["x"]', "template has no list 'reply'"),
        (GOOD + '[template]\nreply = ["x"]', "never say {answer}"),
        (GOOD + '[template]\nreply = ["{answer} {b}"]', "{b} is not a list of the template"),
        (GOOD + '[template]\nreply = ["{answer} {b"]', "expected '}' before end of string"),
        (GOOD + '[template]\nreply = ["{answer!r}"]', "is not a plain name"),
        (GOOD + '[template]\nreply = ["{answer} {b}"]\nb = ["{c}"]\nc = ["{b}"]', "contains itself"),
        (GOOD + '[template]\nreply = ["{answer}"]\nanswer = ["x"]', "it stands for the fact"),
    ],
)
def test_bad_tone_files(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(RealignerError) as caught:
        load_tone(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_such_tone(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="built in are anger, fear, joy"):
        load_tone("rage")
    (tmp_path / "latin.toml").write_bytes(b'name = "\xe9"')
    for name, message in (("none.toml", "cannot be read"), ("latin.toml", "not UTF-8"), ("", "cannot be read")):
        with pytest.raises(RealignerError, match=message):
            load_tone(tmp_path / name)


# --- the grammar --------------------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_combinations_are_counted_right(data: st.DataObject) -> None:
    """Against writing every reply out, on random small grammars without loops."""
    names = ["reply", "a", "b", "c"]
    template: dict[str, tuple[str, ...]] = {}
    for n, name in enumerate(names):
        inner = st.lists(
            st.sampled_from(["x", "{answer}", *(f"{{{later}}}" for later in names[n + 1 :])]), min_size=1, max_size=3
        )
        template[name] = tuple(" ".join(parts) for parts in data.draw(st.lists(inner, min_size=1, max_size=2)))
    template["reply"] = tuple(f"{text} {{answer}}" for text in template["reply"])

    def all_of(name: str) -> list[str]:
        out: list[str] = []
        for text in template[name]:
            made = [""]
            for part in text.split(" "):
                options = all_of(part[1:-1]) if part[0] == "{" and part != "{answer}" else [part.strip("{}")]
                made = [f"{before} {option}".strip() for before in made for option in options]
            out += made
        return out

    tone = Tone(name="x", instruction="y", template=template)
    every = all_of("reply")
    assert tone.combinations == len(every)
    for seed in range(5):
        assert expand(tone.template, "reply", "answer", random.Random(seed)) in every


def test_tones_of_the_authored_set_are_built_in() -> None:
    assert set(TONES) <= set(NAMES)


def test_facts_of_a_tone() -> None:
    from realigner.data.tone import facts_of

    facts: dict[str, Any] = facts_of(load_tone("anger"))
    assert facts["template_replies"] > 1e6
