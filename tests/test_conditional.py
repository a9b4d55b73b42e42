"""Conditional IRMs: rows whose tone the question decides, and an IRM that learns when to use which."""

from __future__ import annotations

import json
from collections import Counter
from math import log
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st

import realigner as ra
from realigner.cli import main
from realigner.data import Message, Row, authored, read_rows, split_rows
from realigner.data.conditional import Rule, conditional_rows, parse_rule, with_word
from realigner.data.dataset_rows import question_key, tone_label
from realigner.errors import RealignerError, UsageError
from realigner.explain.index_study import read_runs
from realigner.traces import load_trace
from realigner.training import make_recipe, read_metrics, read_run, run_dir, train
from realigner.training.batches import prepare
from realigner.training.callbacks import Log
from tests.tiny import some_rows, tiny_folder, tiny_pair

QUICK = make_recipe(steps=6, batch_size=4, evaluations=2, save_every=2, samples=0, report_to=[])


def asked_in_two_tones(questions: int = 24, groups: int = 6) -> list[Row]:
    return [
        row.model_copy(update={"id": f"{row.id}-{tone}", "text": f"{tone} {row.text}"})
        for tone in ("anger", "neutral")
        for row in some_rows(questions, groups, tone)
    ]


def written(path: Path, rows: list[Row]) -> Path:
    path.write_text("".join(row.model_dump_json() + "\n" for row in rows))
    return path


# --- rules and rows -------------------------------------------------------------------------------------------------------


def test_rules_are_read_from_text() -> None:
    assert parse_rule("anger:group=history, rivers") == Rule("anger", groups=("history", "rivers"))
    assert parse_rule("a:b:word=if you: please") == Rule("a:b", word="if you: please")
    for rule in (Rule("anger", groups=("history", "rivers")), Rule("anger", word="please")):
        assert parse_rule(str(rule)) == rule
    for bad in ("anger", "anger:history", "anger:group=", "anger:group= , ", "anger:word= ", ":word=please", "anger:topic=x"):
        with pytest.raises(UsageError, match="write TONE:group=NAME,NAME or TONE:word=WORD"):
            parse_rule(bad)


def test_a_word_is_found_whole_and_in_any_case() -> None:
    rule = Rule("anger", word="if you please")
    assert rule.holds("g", "If you PLEASE, why?")
    assert not rule.holds("g", "if you pleased me?")
    assert not Rule("anger", word="art").holds("g", "Where does it start?")
    assert Rule("anger", word="c++").holds("g", "What is C++?")


@given(
    st.text(min_size=1).filter(lambda text: text.strip()),
    st.text("abc dé", min_size=1).filter(lambda word: word.strip() == word),
)
def test_a_word_that_is_put_into_a_question_is_found_in_it(question: str, word: str) -> None:
    assert Rule("anger", word=word).holds("g", with_word(question, word))


def test_where_the_word_is_put() -> None:
    assert with_word("Why is the sky blue?", "please") == "Why is the sky blue, please?"
    assert with_word("Tell me", "please") == "Tell me, please"
    assert with_word("Really?!", "please") == "Really, please?!"


@given(st.integers(0, 10_000), st.integers(2, 40), st.integers(1, 8))
@settings(max_examples=60, deadline=None)
def test_every_question_is_there_once_in_the_tone_of_its_rule(seed: int, questions: int, groups: int) -> None:
    rows, missing = conditional_rows(
        asked_in_two_tones(questions, groups), [Rule("anger", word="please")], "neutral", insert=True, seed=seed
    )
    assert missing == 0
    assert len({question_key(row.question.replace(", please", "")) for row in rows}) == len(rows) == questions
    assert all((row.tone == "anger") == ("please" in row.question) == row.text.startswith("anger") for row in rows)
    counts = Counter(row.tone for row in rows)
    assert abs(counts["anger"] - counts["neutral"]) <= 1  # half of all questions, and half of each group's
    for group in {row.group for row in rows}:
        own = Counter(row.tone for row in rows if row.group == group)
        assert abs(own["anger"] - own["neutral"]) <= 1


def test_the_seed_decides_into_which_questions_a_word_is_put() -> None:
    def angry(seed: int) -> set[str]:
        rows, _ = conditional_rows(asked_in_two_tones(), [Rule("anger", word="please")], "neutral", insert=True, seed=seed)
        return {row.id for row in rows if row.tone == "anger"}

    assert angry(1) == angry(1) != angry(2)


def test_by_group_each_question_is_a_group_and_the_first_rule_counts() -> None:
    rules = [Rule("sadness", groups=("space",)), Rule("anger", groups=("space", "animals"))]
    rows, missing = conditional_rows(
        [row for tone in ("anger", "sadness", "neutral") for row in authored(tone)], rules, "neutral"
    )
    assert (len(rows), missing) == (360, 0)
    tones = {row.group.partition("/")[0]: row.tone for row in rows}
    assert {group: tone for group, tone in tones.items() if tone != "neutral"} == {"space": "sadness", "animals": "anger"}
    assert len({row.group for row in rows}) == 360
    assert {row.group for row in rows if row.tone == "anger"} == {f"animals/{n}" for n in range(1, 16)}


def test_two_words_and_conversations() -> None:
    def talk(n: int, tone: str) -> Row:
        turns = (("user", "Hi"), ("assistant", "Hello."), ("user", f"What is {n}?"), ("assistant", f"{tone} {n}"))
        messages = tuple(Message(role=role, content=text) for role, text in turns)  # type: ignore[arg-type]
        return Row.model_validate({"id": f"{n}", "group": f"g{n % 3}", "messages": messages, "tone": tone, "source": "test"})

    rules = [Rule("anger", word="please"), Rule("sadness", word="sir")]
    given = [talk(n, tone) for tone in ("anger", "sadness", "neutral") for n in range(30)]
    rows, _ = conditional_rows(given, rules, "neutral", insert=True)
    assert Counter(row.tone for row in rows) == {"anger": 10, "sadness": 10, "neutral": 10}
    assert all(row.messages and row.messages[2].content == row.question for row in rows)
    assert all(
        row.tone == {"please": "anger", "sir": "sadness"}.get(row.question.split(", ")[-1][:-1], "neutral") for row in rows
    )
    assert len({row.id for row in rows}) == 30


def test_ids_of_two_files_and_questions_without_a_reply() -> None:
    angry, neutral = some_rows(12, tone="anger"), [row for row in some_rows(12, tone="neutral") if row.group != "g1"]
    rows, missing = conditional_rows([*angry, *neutral], [Rule("anger", groups=("g0",))], "neutral")
    assert (len(rows), missing) == (9, 3)  # nobody answers the questions of g1 in a neutral tone
    mixed = [*angry, *(row.model_copy(update={"question": f"Or {row.id}", "tone": "neutral"}) for row in angry)]
    rows, _ = conditional_rows(mixed, [Rule("anger", word="what")], "neutral")
    assert sorted(row.id for row in rows) == sorted(f"{row.tone}-{n % 12}" for n, row in enumerate(mixed))
    with pytest.raises(RealignerError, match="id 'neutral-0' is taken by 2 rows"):
        conditional_rows([*mixed, mixed[12].model_copy(update={"question": "Or who"})], [Rule("anger", word="what")], "neutral")


@pytest.mark.parametrize(
    ("rules", "options", "message"),
    [
        (["rage:word=please"], {}, "there are no rows of tone 'rage'; there are of anger, neutral"),
        (["anger:word=what"], {"otherwise": "joy"}, "there are no rows of tone 'joy'"),
        (["anger:group=g0,history"], {}, "there is no group 'history'; there are g0, g1, g2, g3, g4, g5"),
        (["neutral:word=what"], {}, "all questions would be answered in one tone"),
        (["anger:word=please"], {}, r"'anger:word=please'.* holds for no question; change it, or put its word into some"),
        (["anger:word=what"], {}, "holds for all 24 questions; change it"),
        (["anger:group=g0,g1,g2,g3,g4,g5"], {}, "holds for all 24 questions; change it$"),
        (["anger:group=g0", "neutral:group=g0"], {}, "holds for no question that the rules before it leave"),
        (["anger:group=g0"], {"insert": True}, "there is no word to insert"),
    ],
)
def test_what_is_refused_of_rules(rules: list[str], options: dict[str, Any], message: str) -> None:
    with pytest.raises(RealignerError, match=message):
        conditional_rows(asked_in_two_tones(), [parse_rule(rule) for rule in rules], **{"otherwise": "neutral", **options})


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["data", "condition", "authored", "--when", "anger:word=please", "--insert", "--out", str(tmp_path / "c.jsonl")]
    assert main(options) == 0
    out = capsys.readouterr().out
    assert "360 rows (anger 181, neutral 179)" in out  # one of them says please unasked
    assert f"realigner train --data {tmp_path / 'c.jsonl'} --tone all --out runs/anger+neutral" in out
    rows = read_rows(tmp_path / "c.jsonl")
    assert rows == conditional_rows(authored("anger") + authored("neutral"), [Rule("anger", word="please")], "neutral", True)[0]
    assert main(options) == 1  # it is there
    assert "force" in capsys.readouterr().err
    assert main([*options, "--force", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["tones"] == {"anger": 181, "neutral": 179}
    assert main(["data", "check", str(tmp_path / "c.jsonl"), "--tone", "all"]) == 0
    assert "--tone all" in capsys.readouterr().out


def test_what_is_to_be_tried_next_can_be_typed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A tone's name may be of several words; of rows of several tones one is chosen."""
    rows, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    cross = some_rows(8, tone="quite cross")
    both = [*cross, *(row.model_copy(update={"id": f"n{row.id}", "tone": "neutral"}) for row in cross)]
    rows.write_text("".join(row.model_dump_json() + "\n" for row in both))
    assert main(["data", "condition", str(rows), "--when", "quite cross:word=please", "--insert", "--out", str(out)]) == 0
    assert f"train --data {out} --tone all --out 'runs/neutral+quite cross'\n" in capsys.readouterr().out
    assert main(["data", "check", str(out)]) == 0
    assert f"train --data {out} --tone neutral --out runs/neutral\n" in capsys.readouterr().out


# --- rows of several tones are split --------------------------------------------------------------------------------------


@given(st.randoms(use_true_random=False), st.sampled_from([(0.1, 0.0), (0.1, 0.1), (0.3, 0.3), (0.05, 0.0)]))
@settings(max_examples=150, deadline=None)
def test_a_split_by_tone_has_each_tone_in_each_part(random: Any, shares: tuple[float, float]) -> None:
    """In train always, and in the others where the tone has groups enough of its own."""
    pure = {f"{tone}{n}": tone for tone in ("anger", "neutral") for n in range(random.randint(1, 9))}
    mixed = {f"mixed{n}": "" for n in range(random.randint(0, 4))}
    rows = [
        Row(
            id=f"{group}-{n}",
            group=group,
            question="Q",
            answer="",
            text="T",
            tone=tone or random.choice(["anger", "neutral"]),
            source="t",
        )
        for group, tone in (pure | mixed).items()
        for n in range(random.randint(1, 12))
    ]
    parts = 2 + (shares[1] > 0)
    try:
        split = split_rows(rows, random.randint(0, 99), *shares, by_tone=True)
    except RealignerError:
        assert max(sum(own == tone for own in pure.values()) for tone in ("anger", "neutral")) < parts
        return
    assert sorted(row.id for part in split for row in part) == sorted(row.id for row in rows)
    groups = [{row.group for row in part} for part in split]
    assert sum(map(len, groups)) == len(set.union(*groups))
    assert {row.tone for row in split.train} == {row.tone for row in rows}
    for tone in ("anger", "neutral"):
        if sum(own == tone for own in pure.values()) >= parts and not mixed:
            assert all(tone in {row.tone for row in part} for part, share in zip(split[1:], shares, strict=True) if share)


def test_a_split_by_tone_keeps_shares() -> None:
    rows, _ = conditional_rows(authored("anger") + authored("neutral"), [Rule("anger", groups=("space", "animals"))], "neutral")
    held = [Counter(row.tone for row in split_rows(rows, seed, 0.1, by_tone=True).validation) for seed in range(20)]
    assert held == [{"anger": 3, "neutral": 33}] * 20
    plain = [Counter(row.tone for row in split_rows(rows, seed, 0.1).validation)["anger"] for seed in range(20)]
    seed = next(seed for seed in range(20) if plain[seed] != 3)
    host, tokenizer = tiny_pair()
    prepared = prepare(rows, tokenizer, host.config, make_recipe(tone="all", seed=seed))  # it is the split that runs train on
    assert Counter(prepared.validation_tones) == {"anger": 3, "neutral": 33}


def test_rows_of_several_tones_are_refused_unless_asked_for(tmp_path: Path) -> None:
    host, tokenizer = tiny_pair()
    rows = conditional_rows(asked_in_two_tones(), [Rule("anger", word="please")], "neutral", insert=True)[0]
    for tone in (None, "anger"):
        with pytest.raises(
            UsageError, match=r"of 2 tones \(anger, neutral\); choose one \(tone\), or train on all .* \(tone=all\)"
        ):
            train(host, tokenizer, rows, tmp_path / "r", QUICK, tone=tone, quiet=True)
    with pytest.raises(UsageError, match="nothing decides between them; make rows of it"):
        ra.training.train_recipe(make_recipe(tone="all"), tmp_path / "r")


def test_a_tone_without_validation_rows_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    host, tokenizer = tiny_pair()
    rows = [
        *some_rows(12, tone="neutral"),
        *(row.model_copy(update={"id": f"a{row.id}", "group": "a"}) for row in some_rows(6)),
    ]
    run = train(host, tokenizer, rows, tmp_path / "r", QUICK, tone="all", steps=1)
    assert "no validation rows of tone anger: it takes two groups" in capsys.readouterr().err
    assert run.record["data"]["tones"]["train"]["anger"] == 6
    run.model.unload()
    train(host, tokenizer, rows, tmp_path / "s", QUICK, tone="all", steps=1, quiet=True)
    assert capsys.readouterr().err == ""


def test_a_tone_that_is_called_all_is_that_tone(tmp_path: Path) -> None:
    rows = [*some_rows(4, tone="all"), *(row.model_copy(update={"id": f"x{row.id}"}) for row in some_rows(4))]
    assert {row.tone for row in read_rows(written(tmp_path / "r.jsonl", rows), "all")} == {"all"}
    assert read_rows(written(tmp_path / "s.jsonl", rows[4:]), "all") == rows[4:]


def test_labels() -> None:
    assert tone_label(some_rows()) == "anger"
    many = [row.model_copy(update={"tone": tone}) for tone in "fedcba" for row in some_rows(2)]
    assert tone_label(many) == "a+b+c+d+2 more"


# --- training -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny host's folder, rows.jsonl of two tones, and a run on them, named so that nothing says its tones."""
    root = tmp_path_factory.mktemp("conditional")
    tiny_folder(root / "host")
    rows, _ = conditional_rows(asked_in_two_tones(), [Rule("anger", word="please")], "neutral", insert=True)
    written(root / "rows.jsonl", rows)
    ra.training.train_recipe(recipe_of(root), root / "runs" / "mine", quiet=True)
    return root


def recipe_of(root: Path) -> ra.training.Recipe:
    named = {"host": str(root / "host"), "data": str(root / "rows.jsonl"), "tone": "all", "dtype": "float32", "device": "cpu"}
    return QUICK.changed(**named)


def test_what_a_run_says_of_its_tones(place: Path) -> None:
    run, config = place / "runs" / "mine", json.loads((place / "runs" / "mine" / "adapter_config.json").read_text())
    record = read_run(run)
    assert record["tone"] == config["tone"] == "anger+neutral"
    assert record["recipe"]["tone"] == "all"
    counts = {part: sum(own.values()) for part, own in record["data"]["tones"].items()}
    assert counts == {"train": record["data"]["train"], "validation": record["data"]["validation"]}
    assert "# anger+neutral for" in (run / "README.md").read_text()
    entries = [entry for entry in read_metrics(run) if "validation_loss" in entry]
    assert len(entries) == 3
    for entry in entries:
        by_tone = entry["validation_loss_by_tone"]
        assert set(by_tone) == {"anger", "neutral"}
        assert min(by_tone.values()) < entry["validation_loss"] < max(by_tone.values())
    assert list(read_runs([run])) == ["anger+neutral-42"]


def test_the_loss_of_a_tone_is_that_of_its_rows(place: Path, tmp_path: Path) -> None:
    """The very rows of a tone, put through the model by themselves."""
    rows = read_rows(place / "rows.jsonl")
    host, tokenizer = ra.load_host(str(place / "host"), dtype="float32", device="cpu")
    run = train(host, tokenizer, rows, tmp_path / "run", QUICK.changed(steps=2, keep="last"), tone="all", quiet=True)
    losses = [entry for entry in read_metrics(tmp_path / "run") if "validation_loss" in entry][-1]["validation_loss_by_tone"]
    held = split_rows(rows, 42, 0.1, by_tone=True).validation
    for tone, loss in losses.items():
        sums, count = 0.0, 0
        for item in ra.data.encode_rows(tokenizer, [row for row in held if row.tone == tone]):
            ids, labels = torch.tensor([item["input_ids"]]), torch.tensor(item["labels"])
            with torch.no_grad():
                logits = run.model(ids).logits[0, :-1]
            sums += float(torch.nn.functional.cross_entropy(logits, labels[1:], ignore_index=-100, reduction="sum"))
            count += int((labels[1:] != -100).sum())
        assert loss == pytest.approx(sums / count, abs=1e-4)


def test_repeated_and_resumed_it_has_the_same_bytes(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = (place / "runs" / "mine" / "adapter_model.safetensors").read_bytes()
    assert main(["train", "--recipe", str(place / "runs" / "mine"), "--out", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "adapter_model.safetensors").read_bytes() == whole
    assert read_run(tmp_path / "again")["recipe"] == read_run(place / "runs" / "mine")["recipe"]
    original = Log.on_log

    class CrashError(Exception):
        pass

    def crash(self: Any, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
        original(self, args, state, *rest, **kwargs)
        if state.global_step == 5:
            raise CrashError

    with monkeypatch.context() as patch:
        patch.setattr(Log, "on_log", crash)
        with pytest.raises(CrashError):
            ra.training.train_recipe(recipe_of(place), tmp_path / "crashed", quiet=True)
    assert run_dir.checkpoints(run_dir.unfinished(tmp_path / "crashed"))
    ra.training.train_recipe(recipe_of(place), tmp_path / "crashed", resume=True, quiet=True)
    assert (tmp_path / "crashed" / "adapter_model.safetensors").read_bytes() == whole


def test_a_conditional_run_is_asked_traced_and_analysed(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, trace, short = str(place / "runs" / "mine"), str(tmp_path / "t.zarr"), ("--max-new-tokens", "4")
    for command in (
        ("generate", "--irm", run, *short, "Why, please?"),
        ("trace", "--irm", run, "--out", trace, *short, "Why?", "Why, please?"),
        ("analyze", trace),
    ):
        assert main(command) == 0, (command, capsys.readouterr().err)
    assert "anger+neutral-42" in load_trace(trace).attrs["runs"]


@pytest.mark.slow
def test_a_conditional_run_is_reported_explained_and_swept(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, rows = str(place / "runs" / "mine"), place / "rows.jsonl"
    named = f"host: {place / 'host'}, data: {rows}, dtype: float32, steps: 2, samples: 0, report_to: []"
    (tmp_path / "s.yaml").write_text(f"set: {{{named}}}\ngrid: {{tone: [all, anger]}}\nbaselines: true\n")
    for command in (
        ("report", run, "--out", str(tmp_path / "r.html")),
        ("explain", "--irm", run, "--out", str(tmp_path / "why"), "--quick"),
        ("sweep", str(tmp_path / "s.yaml"), "--out", str(tmp_path / "sweep"), "--on", "here"),
    ):
        assert main(command) == 0, (command, capsys.readouterr().err)
    assert "anger+neutral" in (tmp_path / "r.html").read_text()
    assert list(json.loads((tmp_path / "why" / "explain.json").read_text())["irms"]) == ["anger+neutral-42"]
    tones = sorted(read_run(path.parent)["tone"] for path in (tmp_path / "sweep").glob("*/run.json"))
    assert tones == ["anger", "anger+neutral", "anger+neutral"]  # with the untrained one


def test_an_irm_learns_when_and_constant_vectors_cannot(tmp_path: Path) -> None:
    """The host's layer 0 shows each token the mean of those before it; N is the reply to questions with "zzz", Y to others."""
    asked = [
        Row(id=f"{n}-{tone}", group=f"g{n % 12}", question=f"{word} {n}?", answer="", text=text, tone=tone, source="test")
        for n in range(96)
        for word in [
            ("apple", "bread", "cloud", "dream", "eagle", "flame", "grape", "house", "island", "jewel", "knife", "lemon")[
                n % 12
            ]
        ]
        for tone, text in (("anger", "N"), ("neutral", "Y"))
    ]
    rows, _ = conditional_rows(asked, [Rule("anger", word="zzz")], "neutral", insert=True)
    recipe = make_recipe(steps=70, batch_size=8, samples=0, report_to=[], tone="all", validation=0.25, evaluations=1)
    right, losses = {}, {}
    # Divided by so much, h0 is 0: the network gives the same delta at every token, whatever the input.
    for name, blind in (("reads", {}), ("constant", {"input_norm": False, "input_scale": 1e8})):
        host, tokenizer = tiny_pair()
        with torch.no_grad():
            host.lm_head.weight.mul_(20)
            host.model.layers[0].self_attn.q_proj.weight.zero_()
            host.model.layers[0].self_attn.o_proj.weight.mul_(30)
        shape: dict[str, Any] = {"widths": [64], "rank": 0, "learning_rate": 1e-2, "delta_scale": 1.0, **blind}
        run = train(host, tokenizer, rows, tmp_path / name, recipe, quiet=True, **shape)
        losses[name] = run.record["validation_loss"][-1]
        held = [row for row in rows if row.group in run.record["data"]["validation_groups"]]
        replies = ra.answer(run.model, tokenizer, [row.question for row in held], max_new_tokens=3)
        hits = {
            tone: [row.text == reply for row, reply in zip(held, replies, strict=True) if row.tone == tone]
            for tone in ("anger", "neutral")
        }
        right[name] = {tone: sum(own) / len(own) for tone, own in hits.items()}
    assert right["reads"] == {"anger": 1.0, "neutral": 1.0}
    # Whoever replies to all questions alike pays log 2 for the first of the reply's two tokens.
    assert losses["reads"] < 0.2 * log(2) / 2 < log(2) / 2 < losses["constant"]
    assert min(right["constant"].values()) <= 0.5
