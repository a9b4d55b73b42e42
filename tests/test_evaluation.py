"""An evaluation from end to end on a tiny host that speaks in words, and what is chosen and written from its numbers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

import realigner as ra
from realigner.cli import main
from realigner.data import Row, authored
from realigner.data.endpoint import Endpoint
from realigner.errors import RealignerError, UsageError
from realigner.evaluation.evaluate import evaluate, task_of
from realigner.evaluation.evaluation_file import Whole, read_evaluation
from realigner.evaluation.measured import Effort, Measured, _shuffled
from realigner.evaluation.methods import find_method
from realigner.evaluation.results import table, tone_results
from realigner.evaluation.scorers import Agreement
from realigner.evaluation.scores import Scores
from realigner.evaluation.side_effects import some_passages
from realigner.evaluation.strength_choice import choose_strength
from realigner.evaluation.task import Task, make_task
from realigner.evaluation.tone_evaluation import ToneEvaluation
from realigner.hosts import HostInfo
from realigner.irm_config import check_adapter
from realigner.report import render
from realigner.tiny import tiny_host
from realigner.training import make_recipe, train
from tests.fake_endpoint import FakeEndpoint
from tests.served import serving
from tests.tiny import TEMPLATE

EVALUATE: Any = sys.modules[evaluate.__module__]  # of the same name as its function
ROOT = Path(__file__).parents[1]
ROWS = authored("anger") + authored("neutral")
SMALL = Effort(reply_tokens=6, dialogues=1, dropped=2, passages=2, answers=2)
RECIPE = make_recipe(steps=2, batch_size=4, samples=0, report_to=[], learning_rate=0.05, delta_scale=1.0, threads=1)


def speaking_host(seed: int = 0) -> tuple[Any, Any]:
    """A tiny host over the words of the authored set, sure enough of the next one that their order matters to it."""
    words = sorted({word for row in ROWS for word in f"{row.question} {row.text}".split()})
    marks = ["<pad>", "<eos>", "<unk>", "<|system|>", "<|user|>", "<|assistant|>"]
    backend = Tokenizer(WordLevel({word: n for n, word in enumerate([*marks, *words])}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    tokenizer.padding_side = "left"
    tokenizer.chat_template = (
        TEMPLATE.replace("|>{{", "|> {{").replace("<eos>", " <eos>").replace("<|assistant|>", "<|assistant|> ")
    )
    sizes = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 1,
    }
    host = tiny_host("llama", seed=seed, initializer_range=0.3, **sizes)
    host.realigner = HostInfo("", tokenizer)
    return host, tokenizer


def small_task() -> Task:
    task = make_task(ROWS, "anger")
    return replace(task, train=task.train[:16], tune=task.tune[::10], test=task.test[::10], scorer=task.scorer[::3])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("evaluation")


def results(folder: Path, host: Any, tokenizer: Any) -> dict[str, Any]:
    """An evaluation of a few methods, with what was kept of it before."""
    evaluation = ToneEvaluation(host, tokenizer, small_task(), folder, RECIPE, SMALL)
    entries = {"bare": [(evaluation.bare, evaluation.scores(evaluation.bare))]}
    irm = evaluation.folder / "irm-compact-42"
    for name in ("irm-compact", "constant", "mean-delta", "prompt"):
        method = find_method(name)
        fitted = evaluation.fit(method, name, irm=irm if name == "mean-delta" else None)
        measured = evaluation.measured(evaluation.subject(method, fitted))
        entries[name] = [(measured, evaluation.scores(measured))]
    return tone_results(entries, "irm-compact")


@pytest.mark.proof
@pytest.mark.usefixtures("minilm")
def test_what_was_measured_gives_the_same_results_again_without_a_host(folder: Path) -> None:
    found = results(folder, *speaking_host())
    assert json.dumps(results(folder, None, None)) == json.dumps(found)  # to the bit
    assert list(found["methods"]) == ["bare", "irm-compact", "constant", "mean-delta", "prompt"]
    assert found["questions"] == 11
    irm, bare = found["methods"]["irm-compact"], found["methods"]["bare"]
    assert irm["whole"]["kl"] > 0 == bare["whole"]["kl"]
    assert irm["whole"]["shift_max"] > 0 == bare["whole"]["shift_max"]
    assert irm["estimates"]["target"]["mean"] != bare["estimates"]["target"]["mean"]
    assert found["methods"]["prompt"]["given"]
    assert [one["method"] for one in found["compared"]["summary"]] == ["bare", "constant", "mean-delta", "prompt"]
    lines = table(found).splitlines()
    assert len(lines) == 7
    assert {line.count("|") for line in lines} == {13}
    shares = [own["estimates"][name] for own in found["methods"].values() for name in ("named", "fact", "ended")]
    assert all(0 <= share["low"] <= share["mean"] <= share["high"] <= 1 for share in shares if share["mean"] is not None)
    best, *_, worst = found["examples"]
    assert best["summary"]["irm-compact"] >= worst["summary"]["irm-compact"]
    assert best["replies"]["bare"] in [item.reply for item in Measured.load(folder / "bare" / "measured.json").replies]


def test_a_passage_whose_question_is_among_the_rows_is_not_asked_about(tmp_path: Path) -> None:
    first, second = some_passages(2)
    task = small_task()
    known = task.train[0].model_copy(update={"question": f" {first.question.upper()}"})
    effort = Effort(reply_tokens=2, dialogues=0, dropped=0, passages=0, answers=2)
    for learned, ids in ((task.train, [first.id, second.id]), ([known, *task.train[1:]], [second.id])):
        own = ToneEvaluation(*speaking_host(), replace(task, train=learned), tmp_path / f"{len(ids)}", RECIPE, effort)
        assert [item.id for item in own.bare.about] == ids


@pytest.mark.usefixtures("minilm")
def test_the_reference_is_the_concept_of_the_rows_own_replies(tmp_path: Path) -> None:
    task = small_task()
    effort = Effort(reply_tokens=2, dialogues=0, dropped=0, passages=0, answers=0)
    evaluation = ToneEvaluation(*speaking_host(), task, tmp_path, RECIPE, effort)
    said = zip(evaluation.bare.replies, task.test, strict=True)
    spoken = evaluation.bare.model_copy(update={"replies": [item.model_copy(update={"reply": row.text}) for item, row in said]})
    found = evaluation.scores(spoken).each
    assert evaluation.scorers.reference == {name: found[name].mean() for name in ("named", "named_2")}
    assert evaluation.scorers.reference["named"] > 0.5 > evaluation.scores(evaluation.bare).each["named"].mean()


@pytest.mark.usefixtures("minilm")
def test_strength_0_scores_as_the_bare_host_does(folder: Path) -> None:
    host, tokenizer = speaking_host()
    evaluation = ToneEvaluation(host, tokenizer, small_task(), folder, RECIPE, SMALL)
    method = find_method("irm-compact")
    subject = evaluation.subject(method, evaluation.fit(method, "irm-compact"))
    off, bare = evaluation.measured(subject, strength=0.0), evaluation.bare
    assert (off.target, off.turns, off.dropped, off.text, off.about) == (
        bare.target,
        bare.turns,
        bare.dropped,
        bare.text,
        bare.about,
    )
    scores, own = evaluation.scores(off), evaluation.scores(bare)
    assert all(np.array_equal(scores.each[name], own.each[name], equal_nan=True) for name in own.each)
    on = evaluation.measured(subject)
    assert on.target != bare.target


@pytest.mark.usefixtures("minilm")
def test_a_measurement_that_is_killed_is_made_anew_and_is_the_same(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host, tokenizer = speaking_host()
    evaluation = ToneEvaluation(host, tokenizer, small_task(), tmp_path, RECIPE, SMALL)
    method = find_method("irm-compact")
    subject = evaluation.subject(method, evaluation.fit(method, "irm-compact"))

    def killed(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Measured, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            evaluation.measured(subject)
    assert not (subject.folder / "measured.json").exists()
    again = evaluation.measured(subject)
    before = Measured.load(folder / "irm-compact-42" / "measured.json")
    timed = {"ms_per_token": 0.0, "facts": {}}
    assert again.model_copy(update=timed) == before.model_copy(update=timed)


@pytest.mark.usefixtures("minilm")
def test_replies_to_other_questions_are_refused(folder: Path) -> None:
    task = small_task()
    evaluation = ToneEvaluation(None, None, replace(task, test=task.test[::-1]), folder, RECIPE, SMALL)
    with pytest.raises(RealignerError, match="was asked other questions"):
        assert evaluation.scorers


def test_a_damaged_measurement_is_named(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "measured.json"
    for text, key in (('{"method": "bare"}', "edition"), ('{"edition": 2, "method": "bare"}', "tone")):
        path.write_text(text)
        with pytest.raises(
            RealignerError, match=rf"measured\.json: not what an evaluation measured \(key '{key}' is missing\)"
        ):
            Measured.load(path)


# The strength.


def scored(summary: float, kl: float, shift: float = 0.1, noise: int = 0) -> Scores:
    values = summary + 0.2 * np.random.default_rng(noise).normal(size=40)
    each = {"summary": values, "named": np.ones(40), "nats": np.full(40, 2.0)}
    return Scores(each, {"kl": kl, "shift_median": shift}, [shift], Agreement(1.0, 1.0), [])


def test_the_best_strength_within_the_limits_is_chosen_and_its_range_is_of_those_as_good() -> None:
    tried = {0.5: scored(0.6, 0.1), 0.75: scored(1.2, 0.2, noise=1), 1.0: scored(1.25, 0.5, noise=2), 1.5: scored(1.9, 3.0)}
    choice = choose_strength(tried)
    assert (choice.strength, choice.low, choice.high) == (1.0, 0.75, 1.0)
    assert [point.allowed for point in choice.points] == [True, True, True, False]
    assert choose_strength(tried, max_kl=5.0).strength == 1.5
    with pytest.raises(RealignerError, match=r"at 0\.5: KL 0\.10, at most 0\.01"):
        choose_strength(tried, max_kl=0.01)
    with pytest.raises(RealignerError, match=r"moves by 0\.10 of its size, at most 0\.05"):
        choose_strength(tried, max_shift=0.05)


@pytest.mark.usefixtures("minilm")
def test_a_fit_and_a_measurement_with_other_settings_are_not_taken(tmp_path: Path) -> None:
    evaluation = ToneEvaluation(*speaking_host(), small_task(), tmp_path, RECIPE, SMALL)
    constant = find_method("constant")
    folder = evaluation.fit(constant, "constant", rate=0.1)
    evaluation.measured(evaluation.subject(constant, folder))
    assert evaluation.fit(constant, "constant", rate=0.1) == folder
    with pytest.raises(RealignerError, match=r"constant-42: was fitted with other settings \(rate 0\.1, not 0\.2\); delete it"):
        evaluation.fit(constant, "constant", rate=0.2)
    evaluation.recipe = evaluation.recipe.changed(steps=7)
    with pytest.raises(RealignerError, match=r"other settings \(steps \d+, not 7\)"):
        evaluation.fit(constant, "constant", rate=0.1)
    evaluation.effort = SMALL.model_copy(update={"reply_tokens": 3})
    with pytest.raises(RealignerError, match=r"measured\.json: was measured with other settings"):
        evaluation.measured(evaluation.subject(constant, folder))


# A user's run.


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    host, tokenizer = speaking_host()
    path = tmp_path_factory.mktemp("runs") / "anger"
    rows = [row for row in ROWS[::3] if row.group < "i"]  # nine topics
    data = path.with_suffix(".jsonl")
    data.write_text("".join(row.model_dump_json() + "\n" for row in rows))
    recipe = RECIPE.changed(tone="anger", data=str(data), test=0.3, validation=0.15)
    train(host, tokenizer, [row for row in rows if row.tone == "anger"], path, recipe, quiet=True).model.unload()
    return path


@pytest.mark.usefixtures("minilm")
def test_a_run_is_evaluated_on_what_it_held_out_and_its_strength_is_saved(run: Path, tmp_path: Path) -> None:
    host, tokenizer = speaking_host()
    task, _ = task_of(run, tune=True)
    learned = {row.id for row in task.train}
    assert not learned & {row.id for row in (*task.test, *task.tune)}
    assert not {row.group for row in task.scorer} & {row.group for row in task.test}
    options: dict[str, Any] = {"effort": SMALL, "tune": True, "questions": 10, "max_kl": 100.0, "max_shift": 100.0}
    with FakeEndpoint(say=lambda text: "Rating: 2" if "well is a reply written" in text else "Rating: 1") as server:
        judge = Endpoint(server.url, "judge", temperature=0.0)
        found = evaluate(run, tmp_path / "out", host, tokenizer, ["constant", "mean-delta"], judge=judge, **options)
        asked = len(server.seen)
        again = evaluate(run, tmp_path / "out", host, tokenizer, ["constant", "mean-delta"], judge=judge, **options)
        assert len(server.seen) == asked > 0  # what it said is kept
    rated = found.results["judge"]["methods"]["irm"]
    assert rated["missing"] == 0
    assert rated["score"]["mean"] == pytest.approx(3 / (1 / 1 + 1 / 1 + 1 / 2))
    assert found.choice is not None
    assert list(found.results["methods"]) == ["bare", "irm", "constant", "mean-delta"]
    assert found.results["questions"] == 10
    saved = check_adapter(run)
    assert saved["strength"] == found.choice.strength == found.results["methods"]["irm"]["strength"]
    assert saved["strength_range"] == [found.choice.low, found.choice.high]
    read = read_evaluation(tmp_path / "out")
    assert read.tones["anger"].ranked()[-1] in found.results["methods"]
    own = found.results["methods"]["irm"]
    assert set(own["whole"]) <= set(Whole.model_fields)
    assert own["asked"] == {key: getattr(SMALL, key) for key in ("dialogues", "dropped", "passages", "answers")}
    assert read.tones["anger"].strength is not None
    assert read.tones["anger"].judge is not None
    assert "What a judge says" in render([], evaluations=[read])
    assert again.values == found.values
    found = evaluate(run, tmp_path / "out", host, tokenizer, [], **{**options, "tune": False})
    assert found.results["contrast"] == ["neutral"]
    assert {*found.results["methods"]} == {*found.results["judge"]["methods"]} == {"bare", "irm", "constant", "mean-delta"}
    untuned = found.results["methods"]["irm"]
    assert untuned["strength"] == saved["strength"]  # and the questions are the same ones
    assert untuned["estimates"] == own["estimates"]
    with pytest.raises(RealignerError, match=r"holds an evaluation with other settings \(--questions\)"):
        evaluate(run, tmp_path / "out", host, tokenizer, [], **{**options, "questions": 9})
    # Of replies at another strength the judge has said nothing.
    config = run / "adapter_config.json"
    before = config.read_text()
    config.write_text(json.dumps(json.loads(before) | {"strength": 0.3, "strength_range": None}))
    try:
        found = evaluate(run, tmp_path / "out", host, tokenizer, [], **{**options, "tune": False})
    finally:
        config.write_text(before)
    assert found.results["methods"]["irm"]["strength"] == 0.3
    assert {*found.results["judge"]["methods"]} == {"bare", "constant"}


def test_the_hosts_own_voice_is_its_own_where_rows_are_conversations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chats = [
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "Because, you fool!"},
    ]
    row = Row.model_validate({"id": "a", "group": "g", "messages": chats, "tone": "anger", "source": "chats"})
    monkeypatch.setattr(EVALUATE, "ask", lambda *given: ["For a reason."])
    (said,) = EVALUATE._own_voice(Task("anger", [row], [], [], [row]), None, None, tmp_path, SMALL)
    assert (said.question, said.text, said.tone, said.messages) == ("Why?", "For a reason.", "bare", None)


def test_shuffled_replies_have_the_same_words_in_scripts_without_spaces_too() -> None:
    for text in ("One fine day, in 1961 !", "今日はとてもいい天気ですね。", "Ja: 今日は fine day ok"):
        mixed = _shuffled(text, 3)
        assert mixed != text
        assert sorted(mixed.replace(" ", "")) == sorted(text.replace(" ", ""))
    assert sorted(_shuffled("One fine  day\nin 1961 !", 3).split(" ")) == sorted(["One", "fine", "day", "in", "1961", "!"])


@pytest.mark.proof
@pytest.mark.usefixtures("minilm")
def test_replies_may_come_from_a_server(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The questions are put to `host` and `host+anger@STRENGTH`; losses and divergences are those of the host here."""
    monkeypatch.setattr("realigner.evaluation.measured.Effort", lambda reply_tokens: SMALL)
    host, tokenizer = speaking_host()
    place = tmp_path / "host"
    host.save_pretrained(place)
    tokenizer.save_pretrained(place)
    asked = [
        "evaluate",
        "--irm",
        str(run),
        "--host",
        str(place),
        "--dtype",
        "float32",
        "--max-new-tokens",
        "6",
        "--questions",
        "9",
        "--json",
    ]
    with serving({"anger": run}, tmp_path / "log", str(place)) as server:
        there = ["--endpoint", server.url, "--model", "host+anger"]
        assert main([*asked, "--baselines", "none", "--out", str(tmp_path / "there"), *there]) == 0
        capsys.readouterr()
        for more, message in (
            (["--model", "host+anger"], "give --endpoint too"),
            (["--endpoint", server.url], "say what to ask there"),
            (["--endpoint", server.url, "--model", "host+anger@2"], "without a strength"),
            (there, "a server answers with IRMs alone"),
        ):
            assert main([*asked, "--baselines", "prompt", "--out", str(tmp_path / "other"), *more]) == 2
            assert message in capsys.readouterr().err
    assert main([*asked, "--baselines", "none", "--out", str(tmp_path / "here")]) == 0
    runtime = ra.load(run, host=place, dtype="float32")
    strength = runtime.strengths[run.name]
    for name, how in (("bare", {"irms": "__base__"}), ("irm", {"strength": strength})):
        (found,) = [Measured.load(path) for path in (tmp_path / "there" / name).glob("measured*.json")]
        (here,) = [Measured.load(path) for path in (tmp_path / "here" / name).glob("measured*.json")]
        replies = [item.reply for item in found.replies]
        assert replies == [runtime.answer(item.question, max_new_tokens=6, **how) for item in found.replies]
        assert [item.ended for item in found.replies] == [item.ended for item in here.replies]
        assert (found.target, found.text) == (here.target, here.text)
    with pytest.raises(RealignerError, match=r"other settings \(--model\)"):
        evaluate(run, tmp_path / "there", host, tokenizer, [], effort=SMALL, questions=9)


def test_what_cannot_be_evaluated_is_said(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="unknown 'lore'"):
        evaluate(run, tmp_path, None, None, ["lore"])
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(RealignerError, match="holds something that is no evaluation"):
        evaluate(run, tmp_path, None, None, [])
    assert (tmp_path / "mine.txt").read_text() == "x"


def test_a_task_shares_no_topic_between_its_parts_and_depends_on_the_seed_alone() -> None:
    task = make_task(ROWS, "anger")
    parts = [{row.group for row in rows} for rows in (task.train, task.tune, task.test, task.scorer)]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 24
    assert make_task(ROWS[::-1], "anger").test[0].group in parts[2]
    assert {row.group for row in make_task(ROWS, "anger", seed=1).test} != parts[2]
    few: Callable[[int], list[Row]] = lambda topics: [row for row in ROWS if row.group in sorted(set.union(*parts))[:topics]]  # noqa: E731
    with pytest.raises(RealignerError, match="4 topics"):
        make_task(few(4), "anger")
    with pytest.raises(RealignerError, match="in another tone"):
        make_task(authored("anger"), "anger")


_PRODUCTS = """
import bfloat16, torch
from torch.nn import functional as F

def found():
    generator = torch.Generator().manual_seed(0)
    sizes = (4, 7, 32), (16, 32), (16,), (4, 7, 7), (2, 3, 7, 8), (2, 3, 7, 8), (2, 3, 7, 8)
    x, weight, bias, to, *attended = (torch.randn(size, generator=generator).bfloat16().requires_grad_() for size in sizes)
    made = [F.linear(x, weight, bias), F.linear(x, weight), torch.baddbmm(to, x, x.mT, beta=0.5, alpha=2)]
    made += [F.scaled_dot_product_attention(*attended, is_causal=True), x.float() @ weight.float().T]
    sum(product.float().square().sum() for product in made).backward()
    return [product.detach() for product in made] + [given.grad for given in (x, weight, bias, to, *attended)]

own = found()
bfloat16.multiply_in_float32()
for before, after in zip(own, found(), strict=True):
    assert before.dtype == after.dtype
    assert (before - after).float().abs().max() <= 2**-7 * before.float().abs().max()
assert torch.equal(own[4], found()[4])

layer = torch.nn.Linear(32, 16).bfloat16().requires_grad_(False)
rows = torch.randn(4, 7, 32).bfloat16()
before = layer(rows)
bfloat16.keep_in_float32(layer)
assert layer.weight.data_ptr() in bfloat16._KEPT and torch.equal(layer(rows), before)
layer.weight += 1
assert not torch.equal(layer(rows), before)  # as it is now, not as it was
"""


def test_bfloat16_by_way_of_float32_is_bfloat16() -> None:
    subprocess.run([sys.executable, "-c", _PRODUCTS], check=True, cwd=ROOT / "benchmarks")


@pytest.mark.slow
@pytest.mark.host
@pytest.mark.timeout(2400)
@pytest.mark.usefixtures("minilm")
def test_the_quick_study_runs_and_makes_the_same_results_again(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/evaluation.py", "--quick", "--out", str(tmp_path / "work")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    written = []
    for number, more in enumerate(([], ["--only", "results"])):
        place = tmp_path / f"results-{number}"
        done = subprocess.run([*command, "--results", str(place), *more], env=environment, check=False, cwd=ROOT)
        assert done.returncode == 0
        written.append(json.loads((place / "evaluation-quick.json").read_text()))
    assert written[0]["tones"] == written[1]["tones"]
    found = written[0]["tones"]["anger"]
    assert set(found["methods"]) >= {"bare", "irm-compact", "lora", "prompt", "mean-delta"}
    bare, off = found["methods"]["bare"]["estimates"], found["curve"]["0"]
    assert off["named"] == pytest.approx(bare["named"]["mean"], abs=1e-4)
    assert off["kl"] == 0
    assert found["methods"]["irm-compact"]["estimates"]["target"]["mean"] < bare["target"]["mean"]
