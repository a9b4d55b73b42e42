"""An IRM from an instruction: the loss, the teacher's replies, which of them are kept, and that they are sampled once."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import PreTrainedTokenizerFast

import realigner as ra
import realigner.training.teacher as teacher_module
from realigner.chat_format import IGNORED
from realigner.cli import main
from realigner.data import Row, authored
from realigner.data.append_log import AppendLog
from realigner.errors import RealignerError, UsageError
from realigner.files import write_text
from realigner.irm_config import IRMConfig
from realigner.training import Recipe, make_recipe, read_metrics, run_dir, train, training_run
from realigner.training.batches import Collator, prepare
from realigner.training.loss import row_losses
from realigner.training.preflight import estimate_memory
from realigner.training.teacher import Question, Teacher, read_questions
from realigner.training.time_estimate import Size, estimated_seconds, time_line
from realigner.training.trainer import IRMTrainer, trainer_arguments
from realigner.tuner import tuner_of
from tests.chat_hosts import HOSTS, host_tokenizer
from tests.processes import in_a_child
from tests.tiny import some_rows, tiny_folder, tiny_pair

INSTRUCT = "Say z."
QUICK = make_recipe(
    steps=6, batch_size=4, evaluations=2, samples=0, report_to=[], instruct=INSTRUCT, data=None, learning_rate=0.01, threads=1
)


class Obedient:
    """A hook by which a host says "z" where its prompt has the instruction and a question with "#" in it, and nowhere else."""

    def __init__(self, tokenizer: Any, bias: float = 7.0) -> None:
        self.tokenizer, self.bias = tokenizer, bias
        self.letter = tokenizer.convert_tokens_to_ids("z")
        self.obeys = torch.zeros(0, dtype=torch.bool)

    def before(self, host: Any, args: Any, kwargs: dict[str, Any]) -> None:
        ids = kwargs["input_ids"]
        if ids.shape[1] > 1:  # not a generation's next token
            texts = [self.tokenizer.decode(row) for row in ids]
            self.obeys = torch.tensor([INSTRUCT in text and "#" in text for text in texts])

    def after(self, host: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        output.logits[self.obeys, :, self.letter] += self.bias
        return output

    def hook(self, host: Any) -> None:
        host.register_forward_pre_hook(self.before, with_kwargs=True)
        host.register_forward_hook(self.after, with_kwargs=True)


def obedient_pair(head: float = 1.0) -> tuple[Any, Any]:
    host, tokenizer = tiny_pair()
    with torch.no_grad():
        host.lm_head.weight *= head
    Obedient(tokenizer).hook(host)
    return host, tokenizer


@pytest.fixture(autouse=True)
def short_replies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_module, "REPLY_TOKENS", 10)
    monkeypatch.setattr(teacher_module, "TOGETHER", 8)


@pytest.fixture
def questions(tmp_path: Path) -> str:
    """24 questions, every other one such that the teacher obeys."""
    path = tmp_path / "questions.txt"
    path.write_text("".join(f"What is {n}{'#' * (n % 2)}?\n" for n in range(24)))
    return str(path)


def run(out: Path, questions: str, recipe: Recipe = QUICK, rows: list[Row] | None = None, **options: Any) -> Any:
    host, tokenizer = obedient_pair()
    return train(host, tokenizer, rows or [], out, recipe, questions=questions, quiet=True, **options)


def adapter(out: Path) -> bytes:
    return (out / "adapter_model.safetensors").read_bytes()


def replies(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / run_dir.TEACHER_FILE).read_text().splitlines()[1:]]


# --- the loss -------------------------------------------------------------------------------------------------------------


def taught_model(recipe: Recipe, rows: list[Row], config: IRMConfig) -> tuple[Any, Any, Any]:
    """A tiny host with an IRM, its tokenizer, and some replies of a teacher beside rows, prepared."""
    host, tokenizer = tiny_pair()
    teacher = Teacher(rows, recipe, tokenizer, host.config)
    texts = ["Forty two, if you must know.", "No.", "The river is the Vltava, of course!"]
    entries = [
        {"number": n, "reply": texts[n % 3] + "?" * n, "reason": "" if n < 8 else "not obeyed"} for n in range(teacher.wanted)
    ]
    prepared = teacher.prepared(entries, tokenizer, host.config, Path("teacher.jsonl"))
    torch.manual_seed(1)
    return get_peft_model(host, config), tokenizer, prepared


def divergence_by_hand(model: Any, item: dict[str, list[int]]) -> tuple[float, int]:
    """KL(teacher || student), position by position, with a bare host of its own for the teacher."""
    bare, _ = tiny_pair()
    with torch.no_grad():
        student = model(input_ids=torch.tensor([item["input_ids"]])).logits[0].double()
        teacher = bare(input_ids=torch.tensor([item["teacher_ids"]])).logits[0].double()
    own = [at for at, label in enumerate(item["labels"]) if label != IGNORED]
    its = [at for at, label in enumerate(item["teacher_labels"]) if label != IGNORED]
    assert [item["input_ids"][at] for at in own] == [item["teacher_ids"][at] for at in its]
    total = 0.0
    for one, two in zip(own, its, strict=True):
        q, p = student[one - 1].exp() / student[one - 1].exp().sum(), teacher[two - 1].exp() / teacher[two - 1].exp().sum()
        total += float((p * (p / q).log()).sum())
    return total, len(own)


def entropy_by_hand(model: Any, item: dict[str, list[int]]) -> tuple[float, int]:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([item["input_ids"]])).logits[0].double()
    own = [at for at, label in enumerate(item["labels"]) if label != IGNORED]
    return sum(float(logits[at - 1].logsumexp(0) - logits[at - 1, item["labels"][at]]) for at in own), len(own)


def test_the_loss_is_the_weighted_mean_computed_by_hand(tmp_path: Path, questions: str) -> None:
    """Through IRMTrainer: KL of a teacher's rows and cross-entropy of others, in one batch, in two parts, and validated."""
    recipe = QUICK.changed(batch_size=6, data_weight=0.3, accumulate=2, questions=questions, max_length=40, validation=0.3)
    model, tokenizer, prepared = taught_model(recipe, some_rows(8), IRMConfig(output_std=2.0))
    arguments = trainer_arguments(recipe, len(prepared.train), tmp_path, cpu=True, resuming=False)
    trainer = IRMTrainer(model, prepared, recipe, arguments, tokenizer=tokenizer)
    items = [trainer.train_dataset[n] for n in range(len(trainer.train_dataset))]
    taught, others = ([item for item in items if ("teacher_ids" in item) == is_taught] for is_taught in (True, False))
    assert any(len(item["input_ids"]) == 40 for item in taught), "a reply that is cut at max_length is among them"
    parts = [[taught[0], others[0], taught[1]], [others[1], taught[2], others[2]]]
    batches = [trainer.data_collator(part) for part in parts]
    count = trainer._get_num_items_in_batch(batches, torch.device("cpu"))
    loss = sum(trainer.compute_loss(model, batch, num_items_in_batch=count).item() for batch in batches)
    found = [(divergence_by_hand(model, item), 1.0) for item in taught[:3]]
    found += [(entropy_by_hand(model, item), 0.3) for item in others[:3]]
    total, weight = sum(w * s for (s, _), w in found), sum(w * n for (_, n), w in found)
    assert float(count) == pytest.approx(weight)
    assert loss == pytest.approx(total / weight, rel=1e-4)
    assert found[0][0][0] > 0.01, "the IRM moves the student away from the teacher"

    losses = trainer.evaluate()
    held = [(divergence_by_hand(model, i) if "teacher_ids" in i else entropy_by_hand(model, i), i) for i in prepared.validation]
    sums = {kind: [sum(v[n] for v, i in held if ("teacher_ids" in i) == kind) for n in (0, 1)] for kind in (True, False)}
    mixed = (sums[True][0] + 0.3 * sums[False][0]) / (sums[True][1] + 0.3 * sums[False][1])
    assert losses["eval_loss"] == pytest.approx(mixed, rel=1e-4)
    assert losses["eval_kl"] == pytest.approx(sums[True][0] / sums[True][1], rel=1e-4)
    assert losses["eval_ce"] == pytest.approx(sums[False][0] / sums[False][1], rel=1e-5)


def test_where_the_instruction_has_no_effect_there_is_nothing_to_learn(questions: str) -> None:
    """A host whose attention writes nothing predicts from the last token alone: the divergence is 0, and with an IRM not."""
    recipe = QUICK.changed(questions=questions)
    model, tokenizer, prepared = taught_model(recipe, [], IRMConfig(output_std=0.5))
    with torch.no_grad():
        for layer in model.get_base_model().model.layers:
            layer.self_attn.o_proj.weight.zero_()
    batch = Collator(tokenizer.pad_token_id)([{**item, "row": 0} for item in prepared.train])
    with torch.no_grad():
        moved = row_losses(model, batch, True, tuner_of(model))[0]
        with model.disable_adapter():
            same = row_losses(model, batch, True, tuner_of(model))[0]
    assert float(same.abs().max()) < 1e-5
    assert float(moved.min()) > 1e-3


@pytest.mark.parametrize("name", sorted(HOSTS))
def test_teacher_and_student_read_the_same_reply(name: str) -> None:
    """Over real templates: the same tokens with labels on both sides, the instruction on the teacher's alone."""
    tokenizer = host_tokenizer(name)
    recipe = make_recipe(instruct="Answer as a pirate would.", max_length=2000)
    config = tiny_pair(max_position_embeddings=4096)[0].config
    config.vocab_size = len(tokenizer)
    if name == "deepseek_r1_distill":  # which opens a thought, that whole conversations do not have
        with pytest.raises(RealignerError, match="train without thoughts"):
            Teacher([], recipe, tokenizer, config)
        recipe = recipe.changed(chat_template_kwargs={"enable_thinking": False})
    teacher = Teacher([], recipe, tokenizer, config)
    assert teacher.in_question == (name == "gemma2")
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ahoy."}, {"role": "user", "content": "Who?"}]
    for prompt in ("Which river runs through Prague?", talk):
        for reply in ("The Vltava, matey!", "Arr.\nA list:\n- one", "été 42"):
            pair = teacher.examples(Question("1", "g", prompt), {"role": "assistant", "content": reply})
            assert pair is not None
            texts = [teacher.chat_format.decode(example["input_ids"]) for example in pair]
            targets = [[label for label in example["labels"] if label != IGNORED] for example in pair]
            assert targets[0] == targets[1]
            assert reply.strip() in teacher.chat_format.decode(targets[0])
            assert ["pirate" in text for text in texts] == [False, True]
            assert texts[1].index("pirate") < texts[1].index("Hi" if prompt is talk else "Prague")
            for example in pair:
                assert example["input_ids"][-len(targets[0]) :] == targets[0], "the reply is the end of what is read"


# --- the gate -------------------------------------------------------------------------------------------------------------


def test_kept_where_the_teacher_obeyed(tmp_path: Path, questions: str) -> None:
    """On planted truth: of a host that obeys at every other question."""
    found = run(tmp_path / "run", questions)
    entries = replies(tmp_path / "run")
    assert [entry["number"] for entry in entries] == list(range(24))
    assert [not entry["reason"] for entry in entries] == ["#" in entry["prompt"] for entry in entries]
    assert {entry["reason"] for entry in entries} == {"", "not obeyed"}
    account = found.record["teacher"]
    assert (account["replies"], account["kept"], account["rejected"]) == (24, 12, {"not obeyed": 12})
    card = (tmp_path / "run" / "README.md").read_text()
    assert "| instruction | Say z. |" in card
    assert "12 of its 24 replies" in card


def test_what_the_instruction_does_is_learned(tmp_path: Path, questions: str) -> None:
    """The divergence falls, and the IRM says "z" where nobody asks for it."""
    host, tokenizer = obedient_pair(head=20)  # with a smaller head no residual makes one letter so likely
    recipe = QUICK.changed(steps=40, preset="paper", learning_rate=5e-3, questions=questions)
    found = train(host, tokenizer, [], tmp_path / "run", recipe, quiet=True)
    losses = found.record["validation_loss"]
    assert losses[-1] < 0.3 * losses[0]
    said = [
        str(ra.answer(found.model, tokenizer, ["What is 5?"], max_new_tokens=8, irms=irms)[0]) for irms in (None, "__base__")
    ]
    assert ["zzz" in text for text in said] == [True, False]


def test_replies_with_faults_are_rejected_by_name(questions: str) -> None:
    host, tokenizer = tiny_pair()
    recipe = QUICK.changed(
        questions=questions, instruct="Answer every question as an angry person would, and never be polite.", tone="anger"
    )
    asked = [Question("1", "g", "Which river runs through the middle of Prague?")] * 6
    said = [
        "How dare you! It is the Vltava, you fool, and I am sick of telling everyone",  # cut, which is no fault
        "The river is the Vltava.",
        "I'm sorry, but I can't assist with that request.",
        "Answer every question as an angry person would, and never be polite: the Vltava!",
        "Which river runs through the middle of Prague? The Vltava!",
        "...",
    ]
    teacher = Teacher([], recipe, tokenizer, host.config)
    assert teacher.faults(asked, said) == ["", "wrong tone", "refusal", "prompt echoed", "prompt echoed", "empty"]
    unnamed = Teacher([], recipe.model_copy(update={"tone": None}), tokenizer, host.config)
    assert unnamed.faults(asked[:2], said[:2]) == ["", ""], "a tone that nobody named is not judged"


def test_replies_depend_on_seed_and_number_alone(tmp_path: Path, questions: str) -> None:
    recipe = QUICK.changed(steps=1, teacher_replies=2)
    run(tmp_path / "one", questions, recipe)
    run(tmp_path / "other", questions, recipe.changed(seed=7))
    one, other = (replies(tmp_path / name) for name in ("one", "other"))
    assert len(one) == 48
    assert all(one[n]["prompt"] == one[n + 24]["prompt"] for n in range(24))
    assert all(one[n]["reply"] != one[n + 24]["reply"] for n in range(0, 24, 2))  # at the others it says one thing
    assert all(a["reply"] != b["reply"] for a, b in zip(one[::2], other[::2], strict=True))


# --- made once ------------------------------------------------------------------------------------------------------------


class _KilledError(BaseException):
    pass


def test_killed_between_replies_or_steps_it_ends_in_the_same_bytes(
    tmp_path: Path, questions: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path / "whole", questions, rows=some_rows(8, tone="z"), data_weight=0.5, validation=0.4)
    append, out = AppendLog.append, tmp_path / "killed"
    for last in (1, 6, 7, 8, 15, 22):

        def killing(self: AppendLog, entry: dict[str, Any], last: int = last) -> None:
            append(self, entry)
            if entry.get("number") == last:
                os.write(self._handle, b'{"number":')  # half of the next
                raise _KilledError

        with monkeypatch.context() as patch:
            patch.setattr(AppendLog, "append", killing)
            with pytest.raises(_KilledError):
                run(out, questions, rows=some_rows(8, tone="z"), data_weight=0.5, validation=0.4, resume=True)
        assert not out.exists()
    with monkeypatch.context() as patch:
        patch.setattr(Teacher, "_sampled", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(RealignerError, match=r"interrupted; the teacher's replies are saved, to go on from \(resume\)"):
            run(out, questions, rows=some_rows(8, tone="z"), data_weight=0.5, validation=0.4, resume=True)
    with monkeypatch.context() as patch:
        patch.setattr(Teacher, "_sampled", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(RealignerError, match="interrupted; nothing was saved"):
            run(tmp_path / "at once", questions, resume=True)
    assert not list(tmp_path.glob("at once*"))
    made: list[range] = []
    sampled = Teacher._sampled

    def noted(self: Teacher, model: Any, tokenizer: Any, numbers: range) -> list[dict[str, Any]]:
        made.append(numbers)
        return sampled(self, model, tokenizer, numbers)

    with monkeypatch.context() as patch:
        patch.setattr(Teacher, "_sampled", noted)
        patch.setattr("realigner.training.finished_run.save_curve", lambda *_, **__: (_ for _ in ()).throw(_KilledError))
        with pytest.raises(_KilledError):
            run(out, questions, rows=some_rows(8, tone="z"), data_weight=0.5, validation=0.4, resume=True)
        assert made == [range(16, 24)], "a batch of which some were there is sampled again as a whole, and no other"
        patch.setattr("realigner.training.finished_run.save_curve", lambda *_, **__: None)
        patch.setattr(Teacher, "_sampled", None)
        run(out, questions, rows=some_rows(8, tone="z"), data_weight=0.5, validation=0.4, resume=True)
    assert (out / "teacher.jsonl").read_bytes() == (tmp_path / "whole" / "teacher.jsonl").read_bytes()
    assert adapter(out) == adapter(tmp_path / "whole")
    assert [path.name for path in out.iterdir() if path.name.startswith(".")] == []
    mixed = [entry for entry in read_metrics(out) if "validation_loss" in entry]
    assert all({"validation_kl", "validation_ce"} <= entry.keys() for entry in mixed)


@pytest.mark.slow
def test_killed_ten_times_for_real(tmp_path: Path, questions: str) -> None:
    recipe = QUICK.changed(steps=30, save_every=3, teacher_replies=3)
    started = time.monotonic()
    run(tmp_path / "whole", questions, recipe)
    duration = time.monotonic() - started
    dice, kills, while_replying = random.Random(1), 0, 0
    out, work = tmp_path / "killed", run_dir.unfinished(tmp_path / "killed")
    while kills < 10:
        pid = in_a_child(lambda: run(out, questions, recipe, resume=True))
        time.sleep(dice.uniform(0.1, 0.6) * duration)
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        kills += os.WIFSIGNALED(status)
        while_replying += (work / "teacher.jsonl").is_file() and not run_dir.checkpoints(work)
        if out.exists():
            assert adapter(out) == adapter(tmp_path / "whole")
            shutil.rmtree(out)
    if not out.exists():
        run(out, questions, recipe, resume=True)
    assert while_replying, "no kill came while the teacher replied"
    assert (out / "teacher.jsonl").read_bytes() == (tmp_path / "whole" / "teacher.jsonl").read_bytes()
    assert adapter(out) == adapter(tmp_path / "whole")


@pytest.mark.slow
def test_a_rate_is_searched_for_on_the_replies_and_once(
    tmp_path: Path, questions: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bytes as with that rate given; killed after the search, or between its two files, it is not another run."""
    whole = run(tmp_path / "whole", questions, QUICK.changed(learning_rate="auto"))
    rate = whole.record["rate_search"]["rate"]
    assert whole.record["recipe"]["learning_rate"] == rate
    assert f"learning_rate: {rate}" in (tmp_path / "whole" / "recipe.yaml").read_text()
    run(tmp_path / "given", questions, QUICK.changed(learning_rate=rate))
    assert adapter(tmp_path / "given") == adapter(tmp_path / "whole")
    for last in ("recipe.yaml", "run.json"):  # the second time that it is written
        written: list[str] = []

        def killing(path: Path, text: str, last: str = last, written: list[str] = written) -> None:
            if path.name == last and last in written:
                raise _KilledError
            written.append(path.name)
            write_text(path, text)

        with monkeypatch.context() as patch:
            patch.setattr("realigner.training.unfinished_run.write_text", killing)
            with pytest.raises(_KilledError):
                run(tmp_path / last, questions, QUICK.changed(learning_rate="auto"))
        run(tmp_path / last, questions, QUICK.changed(learning_rate="auto"), resume=True)
        assert adapter(tmp_path / last) == adapter(tmp_path / "whole")


def test_parts_of_a_step_change_nothing(tmp_path: Path, questions: str) -> None:
    plain = QUICK.changed(optimizer="sgd", learning_rate=0.5, warmup=0, data_weight=0.25, dropout=0.0)
    whole = run(tmp_path / "whole", questions, plain, some_rows(12, tone="z"))
    parts = run(tmp_path / "parts", questions, plain.changed(accumulate=4), some_rows(12, tone="z"))
    one, two = (dict(tuner_of(r.model).registry.network("default").named_parameters()) for r in (whole, parts))
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-6
    losses = [[entry["loss"] for entry in read_metrics(r.folder) if "loss" in entry] for r in (whole, parts)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    assert losses[0][0] != pytest.approx(losses[0][-1], abs=1e-4)


def test_another_memory_of_the_same_run_is_refused(tmp_path: Path, questions: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def killing(self: Any, *_: Any) -> None:
        raise _KilledError

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Teacher, "prepared", killing)
        with pytest.raises(_KilledError):
            run(out, questions)
    file = run_dir.unfinished(out) / "teacher.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    for changed, message in (
        (lines[:1] + lines[2:], r"teacher.jsonl:2: is not reply 0 of this run; train anew \(force\)"),
        ([*lines[:3], lines[3].replace('"reply":', '"replied":'), *lines[4:]], r"teacher.jsonl:4: .*reply"),
        ([lines[0].replace(INSTRUCT, "Say y."), *lines[1:]], r"its teacher is .*start anew \(force\)"),
    ):
        file.write_text("".join(changed))
        with pytest.raises(RealignerError, match=message):
            run(out, questions, resume=True)
    with pytest.raises(RealignerError, match=r"cannot be resumed as another run: instruct is Say y\., not Say z\."):
        run(out, questions, resume=True, instruct="Say y.")
    Path(questions).write_text("What else?\n" * 2 + "Who?\nWhen?\nHow?\nWhere?\n")
    with pytest.raises(RealignerError, match="the data changed since it was begun"):
        run(out, questions, resume=True)
    run(out, questions, force=True, instruct="Say z.", steps=0)
    assert not (out / "teacher.jsonl").exists(), "an untrained IRM needs no teacher"


# --- the command, recipes, sweeps -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("teacher") / "host")


@pytest.mark.proof
def test_from_the_command_line_and_repeated(
    tmp_path: Path, folder: Path, questions: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teacher_module, "OBEDIENCE", -1.0)  # a host of random weights obeys nobody
    monkeypatch.setattr("realigner.console._LINE_EVERY", 0.0)
    first = ["train", "--host", str(folder), "--instruct", INSTRUCT, "--questions", questions, "--out", str(tmp_path / "run")]
    first += ["--steps", "3", "--dtype", "float32", "--set", "samples=0", "--set", "report_to=[]"]
    assert main(first) == 0
    out, err = capsys.readouterr()
    assert "KL from the teacher" in out
    assert "time: less than a minute" in err
    noted = re.findall(r"teacher replying: (\d+)/24 .* token (\d+) of 10 at most", err)
    assert noted[0] == ("0", "1")
    assert {replies for replies, _ in noted} == {"0", "8", "16"}  # a batch has eight
    assert max(int(token) for _, token in noted) == 10
    assert "teacher replying: 24/24" in err
    assert re.search(r"teacher: 2\d of 24 replies kept \(.*\); all are in .*teacher.jsonl", err)
    recipe = (tmp_path / "run" / "recipe.yaml").read_text()
    assert "data: null" in recipe
    assert f"questions: {questions}" in recipe
    assert main(["train", "--recipe", str(tmp_path / "run"), "--out", str(tmp_path / "again")]) == 0
    assert adapter(tmp_path / "again") == adapter(tmp_path / "run")
    assert (tmp_path / "again" / "teacher.jsonl").read_bytes() == (tmp_path / "run" / "teacher.jsonl").read_bytes()
    other = ["train", "--recipe", str(tmp_path / "run"), "--seed", "7", "--steps", "1", "--out"]
    assert main([*other, str(tmp_path / "other")]) == 0
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(row.model_dump_json() + "\n" for row in some_rows(tone="z")))
    assert main([*first[:3], "--data", str(rows), *first[-8:], "--out", str(tmp_path / "rows")]) == 0
    taught = ["train", "--recipe", str(tmp_path / "rows"), *first[3:7], "--out"]
    assert main([*taught, str(tmp_path / "both")]) == 0, "the same rows, and an instruction besides"
    capsys.readouterr()
    Path(questions).write_text("Who?\nWhen?\nHow?\nWhere?\nWhy?\nWhich?\n")
    assert main(["train", "--recipe", str(tmp_path / "run"), "--out", str(tmp_path / "third")]) == 1
    assert "data, questions: not those of the run to be repeated" in capsys.readouterr().err


def test_rows_besides_are_not_trained_sharded(tmp_path: Path, questions: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """FSDP's processes must run the host equally often, and those with a teacher's rows run it twice."""
    monkeypatch.setattr(training_run, "_FSDP", True)
    with pytest.raises(UsageError, match="instruct: with rows besides it cannot be trained under FSDP"):
        run(tmp_path / "run", questions, rows=some_rows(tone="z"))
    assert run(tmp_path / "run", questions, steps=0).record["steps_done"] == 0


def test_questions_are_a_teachers(tmp_path: Path, questions: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--tone", "anger", "--questions", questions, "--out", str(tmp_path / "run")]) == 2
    assert "--questions is what a teacher is asked; give --instruct too, or leave it out" in capsys.readouterr().err


def test_rows_are_learned_too_where_they_are_named(questions: str) -> None:
    alone = make_recipe(instruct=INSTRUCT)
    assert not alone.has_rows
    assert alone.changed(tone="anger").has_rows
    assert alone.changed(data="rows.jsonl").has_rows
    assert make_recipe().has_rows


def test_a_sweep_over_instructions(tmp_path: Path, questions: str) -> None:
    from realigner.sweep.grid import plan, read_sweep

    text = f"set: {{questions: {Path(questions).name}}}\ngrid: {{instruct: [Say y., Say z.]}}\nbaselines: true\n"
    (tmp_path / "sweep.yaml").write_text(text)
    runs = plan(*read_sweep(tmp_path / "sweep.yaml"))
    assert [run.recipe.instruct for run in runs[:2]] == ["Say y.", "Say z."]
    assert len({run.name for run in runs}) == len(runs) == 3, "one untrained IRM for both"
    assert all(run.recipe.questions == questions for run in runs)
    before = [run.name for run in runs]
    Path(questions).write_text("Other questions?\n")
    after = [run.name for run in plan(*read_sweep(tmp_path / "sweep.yaml"))]
    assert before[0] != after[0]
    assert before[2] == after[2]


# --- questions ------------------------------------------------------------------------------------------------------------


def test_questions_in_every_form(tmp_path: Path) -> None:
    rows = [*some_rows(4), some_rows(5)[4].model_copy(update={"question": "what is 0"})]
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hm."}, {"role": "user", "content": "Why?"}]
    squad = {
        "data": [
            {"title": "Prague", "paragraphs": [{"qas": [{"id": "a", "question": "Which river?", "answers": [{"text": "V"}]}]}]}
        ]
    }
    (tmp_path / "rows.jsonl").write_text("\n" + "".join(row.model_dump_json() + "\n" for row in rows))
    (tmp_path / "prompts.jsonl").write_text(json.dumps("Who?") + "\n" + json.dumps({"messages": talk}) + "\n")
    (tmp_path / "squad.json").write_text(json.dumps(squad))
    (tmp_path / "lines.txt").write_text("Who?\n\nWhy?\nwho\n")
    found = {path.name: read_questions(str(path)) for path in tmp_path.iterdir()}
    assert [(q.prompt, q.group) for q in found["rows.jsonl"]] == [(f"What is {n}?", f"g{n}") for n in range(4)]
    assert [(q.prompt, q.group) for q in found["prompts.jsonl"]] == [("Who?", "question-1"), (talk, "question-2")]
    assert [(q.prompt, q.group) for q in found["squad.json"]] == [("Which river?", "Prague")]
    assert [q.prompt for q in found["lines.txt"]] == ["Who?", "Why?"]
    assert [(q.text, q.group) for q in read_questions("authored")] == [(r.question, r.group) for r in authored("anger")]


def test_no_more_questions_are_asked_than_are_needed(tmp_path: Path) -> None:
    host, tokenizer = tiny_pair()
    path = tmp_path / "many.txt"
    path.write_text("".join(f"What is {n}?\n" for n in range(1000)))
    recipe = QUICK.changed(questions=str(path), steps=100)

    def asked(**changes: Any) -> list[int]:
        return [int(q.id) for q in Teacher([], recipe.changed(**changes), tokenizer, host.config).questions]

    assert len(asked()) == 200  # twice as many examples are taken
    assert asked() == sorted(asked())
    assert asked() == asked() != asked(seed=1)
    assert len(asked(steps=1)) == 64
    assert len(asked(teacher_replies=2)) == 100
    some, others = (Teacher([], recipe.changed(seed=seed), tokenizer, host.config) for seed in (0, 1))
    assert some.sha256 == others.sha256, "the same data, of which others are asked"
    assert len(Teacher([], recipe.model_copy(update={"steps": None, "epochs": 1.0}), tokenizer, host.config).questions) == 1000


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"questions": "squad"}, UsageError, "questions: there is no file 'squad'; give the path of its JSON file"),
        ({"questions": "nowhere.txt"}, UsageError, "questions: there is no file 'nowhere.txt'; give 'authored', or a file"),
        ({"questions": "turns.jsonl"}, RealignerError, r"turns.jsonl: prompt 1 is a dialogue \(turns\); give questions"),
        ({"questions": "own.jsonl"}, UsageError, "question '1': prompt: it begins with a system prompt of its own"),
        ({"questions": "void.json"}, RealignerError, r"void.json: has no question that has an answer; give another file"),
        ({"rows": 2}, UsageError, r"rows are of 2 tones \(anger, z\); choose one \(tone\), or train"),
        ({"max_length": 40}, RealignerError, "question 'long': .* tokens; max_length is 40; raise it"),
        ({"instruct": "Be long. " * 60}, RealignerError, "and the host has 512 positions; shorten the instruction"),
        ({"batch_size": 32}, RealignerError, r"questions.txt: 24 replies in all \(teacher_replies=1\), fewer than batch_size"),
        ({"rows": 1, "id": "teacher:3"}, UsageError, "^row 'teacher:3': ids that begin with 'teacher:' are those of a teacher"),
        ({"label_shift": 2}, UsageError, "label_shift and loss_on_padding are for rows alone; leave them out"),
        ({"instruct": ""}, UsageError, "instruct: '': is empty"),
        ({"instruct": " \n"}, UsageError, "instruct: ' .n': is empty"),
        ({"questions": "tool.jsonl"}, RealignerError, "^question '1': messages: the user asks nothing$"),
        ({"batch_size": 16}, RealignerError, r"12 of the teacher's 24 replies were kept, and batch_size is 16 \(not obeyed 12\)"
         "; word the instruction more plainly, give more questions, or set teacher_replies=4"),
    ],
)  # fmt: skip
def test_what_is_refused(
    tmp_path: Path,
    questions: str,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    kind: type[Exception],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    changes = dict(changes)
    Path("turns.jsonl").write_text('{"turns": ["Who?", "When?"]}\n')
    Path("tool.jsonl").write_text('{"messages": [{"role": "tool", "content": "7"}]}\n')
    Path("own.jsonl").write_text('{"messages": [{"role": "system", "content": "Be."}, {"role": "user", "content": "Who?"}]}\n')
    if "max_length" in changes:
        long = [row.model_copy(update={"id": "long", "question": "What? " * 20}) for row in some_rows(1)]
        Path("long.jsonl").write_text("".join(row.model_dump_json() + "\n" for row in long))
        changes = {**changes, "questions": "long.jsonl"}
    Path("void.json").write_text('{"data": [{"title": "t", "paragraphs": [{"qas": [{"id": "a", "question": "Q?"}]}]}]}')
    host, tokenizer = obedient_pair()
    rows = [some_rows(1)[0], some_rows(2, tone="z")[1]][: changes.pop("rows", 0)]
    if "id" in changes:
        rows = [rows[0].model_copy(update={"id": changes.pop("id")})]
    with pytest.raises(kind, match=message):
        train(host, tokenizer, rows, tmp_path / "run", QUICK, quiet=True, **{"questions": questions, **changes})
    assert not (tmp_path / "run").exists()


def test_a_question_has_no_token_that_the_host_has_no_embedding_for(questions: str, tmp_path: Path) -> None:
    host, tokenizer = tiny_pair(vocab_size=60)
    with pytest.raises(RealignerError, match=r"^question '1': .* is token \d+, but the host has 60 "):
        train(host, tokenizer, [], tmp_path / "run", QUICK, questions=questions, quiet=True)


@pytest.mark.parametrize("loss_on", ["assistant", "text"])
def test_of_a_teacher_the_reply_alone_is_learned(loss_on: str, tmp_path: Path) -> None:
    before = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hm."}]
    talks = [{"messages": [*before, {"role": "user", "content": f"{n}?"}]} for n in range(9)]
    path = tmp_path / "talks.jsonl"
    path.write_text("".join(json.dumps(talk) + "\n" for talk in talks))
    host, tokenizer = tiny_pair()
    rows = some_rows(8)
    recipe = QUICK.changed(questions=str(path), loss_on=loss_on, tone="anger")
    teacher = Teacher(rows, recipe, tokenizer, host.config)
    entries = [{"number": n, "reply": "Because.", "reason": ""} for n in range(9)]
    prepared = teacher.prepared(entries, tokenizer, host.config, path)
    reply = tokenizer("Because.<eos>", add_special_tokens=False)["input_ids"]
    taught = [item for item in (*prepared.train, *prepared.validation) if "teacher_ids" in item]
    assert len(taught) == 9
    for item in taught:
        assert [label for label in item["labels"] if label != IGNORED] == reply
        assert [label for label in item["teacher_labels"] if label != IGNORED] == reply
    others = [item for item in prepared.train if "teacher_ids" not in item]
    assert any(item["labels"][0] != IGNORED for item in others) is (loss_on == "text")


def test_where_no_system_prompt_is_taken_it_stands_in_the_question(questions: str, capsys: pytest.CaptureFixture[str]) -> None:
    host, tokenizer = tiny_pair()
    recipe = QUICK.changed(questions=questions)
    refusing: PreTrainedTokenizerFast = tiny_pair()[1]
    refusing.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}"
        + tokenizer.chat_template.split("%}", 1)[1]
    )
    for chosen, given, said in (
        (recipe, refusing, "the host's chat template takes no system prompt: the instruction stands before the question"),
        (recipe.changed(template="plain"), tokenizer, "the plain form has no system prompt: the instruction stands before"),
    ):
        teacher = Teacher([], chosen, given, host.config)
        teacher.say_before()
        assert said in capsys.readouterr().err
        assert teacher.instructed("Why?") == [{"role": "user", "content": f"{INSTRUCT}\n\nWhy?"}]
        pair = teacher.examples(Question("1", "g", "Why?"), {"role": "assistant", "content": "Zzz."})
        assert pair is not None
        assert pair[0]["labels"][-4:] == pair[1]["labels"][-4:]


def test_without_the_extra_it_says_which(questions: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("realigner.training.preflight.find_spec", lambda name: None if name == "datasketch" else object())
    with pytest.raises(
        RealignerError, match=r'instruct: .* not installed \(datasketch\); install them: pip install "realigner\[data\]"'
    ):
        run(tmp_path / "run", questions)


# --- before it begins -----------------------------------------------------------------------------------------------------


def test_memory_counts_the_teachers_logits() -> None:
    config = tiny_pair()[0].config
    bare = make_recipe(dtype="float32", device="cpu")
    plain, taught = (estimate_memory(config, recipe, 100, 50) for recipe in (bare, bare.changed(instruct=INSTRUCT)))
    assert taught.activations - plain.activations == 4 * 50 * 300 * 16  # rows, positions, words, bytes


def test_the_time_is_that_of_planted_forwards(monkeypatch: pytest.MonkeyPatch) -> None:
    host, _ = tiny_pair()
    model = get_peft_model(host, IRMConfig())
    forwards: list[object] = []
    host.register_forward_pre_hook(lambda *_: forwards.append(None))
    clock = SimpleNamespace(monotonic=lambda: 0.05 * len(forwards))
    monkeypatch.setattr("realigner.training.time_estimate.time", clock)
    size = Size(length=20, targets=10, teacher_length=40, train=40, validation=4)
    recipe = make_recipe(batch_size=1, evaluations=1, samples=0, steps=100, instruct=INSTRUCT)
    seconds = estimated_seconds(model, recipe, size, steps_left=100)
    assert seconds == pytest.approx(100 * 0.05 * (2.3 + 2) + 2 * 4 * 0.05 * 3)
    assert estimated_seconds(model, recipe, size, 0, replies_left=80) > 3 * 96 * 0.05
    assert [time_line(s) for s in (10, 60, 500, 7200)] == [
        "time: less than a minute", "time: about 1 minute", "time: about 8 minutes", "time: about 2.0 hours",
    ]  # fmt: skip


def test_runs_on_rows_alone_are_as_they_were() -> None:
    """A batch without a teacher has no key of one, and its tokens' hash is the one of before."""
    host, tokenizer = tiny_pair()
    prepared = prepare(some_rows(), tokenizer, host.config, make_recipe(tone="anger"))
    batch = Collator(0)([{**item, "row": 0} for item in prepared.train[:4]])
    assert set(batch) == {"input_ids", "attention_mask", "labels", "shift_labels", "rows"}
    assert prepared.tokens_sha256 == "5163c78b72cc2e403e52ad1a1b5747b5880cda54afa5b4e4522b69fe0bd452a5"


def test_rows_of_several_tones_are_learned_beside_a_teacher(tmp_path: Path, questions: str) -> None:
    rows = [*some_rows(12, tone="y"), *(row.model_copy(update={"id": f"x{row.id}"}) for row in some_rows(12, tone="x"))]
    found = run(tmp_path / "run", questions, QUICK.changed(steps=2, tone="all", validation=0.3), rows)
    assert found.record["tone"] == "x+y"
    assert set(found.record["data"]["tones"]["train"]) == {"x", "y", INSTRUCT}
    last = [entry for entry in read_metrics(tmp_path / "run") if "validation_loss" in entry][-1]
    assert last["validation_loss_by_tone"][INSTRUCT] == pytest.approx(last["validation_kl"])
