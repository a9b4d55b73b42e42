"""What a run says of itself: what it measured, at which learning rate it goes and why, whether it beats its start."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model

from realigner.cli import main
from realigner.errors import RealignerError, UsageError, visible
from realigner.irm_config import IRMConfig
from realigner.prompts import PAPER_PROMPTS
from realigner.training import host_checks, make_recipe, read_run, run_dir, train, training_run
from realigner.training.batches import prepare
from realigner.training.callbacks import Log, StartWatch
from realigner.training.rate_search import descend
from realigner.training.run_record import verdict
from realigner.training.trainer import IRMTrainer
from realigner.tuner import tuner_of
from tests.tiny import TEMPLATE, some_rows, tiny_folder, tiny_host_of_pair, tiny_pair, tiny_tokenizer

STEPS = 20
QUICK = make_recipe(steps=STEPS, batch_size=4, evaluations=5, samples=0, report_to=[], learning_rate=0.01, threads=1)


def run_tiny(out: Path, **changes: Any) -> Any:
    options = {"quiet": True, **{key: changes.pop(key) for key in ("resume", "quiet", "force") if key in changes}}
    host, tokenizer = tiny_pair()
    return train(host, tokenizer, some_rows(), out, QUICK.changed(**changes), **options)


def adapter(out: Path) -> bytes:
    return (out / "adapter_model.safetensors").read_bytes()


def validated(losses: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Plant the validation losses, the one before training first."""
    planted = iter(losses)
    monkeypatch.setattr("realigner.training.trainer._nats_per_token", lambda _: {"loss": next(planted)})


class _CrashError(Exception):
    pass


def crash_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Log.on_log

    def crash(self: Any, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
        original(self, args, state, *rest, **kwargs)
        if state.global_step == step:
            raise _CrashError

    monkeypatch.setattr(Log, "on_log", crash)


# The untrained IRM.


@pytest.mark.parametrize("crash", [None, pytest.param(10, marks=pytest.mark.slow)])
def test_the_untrained_irm_is_kept_where_no_evaluation_is_below_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, crash: int | None
) -> None:
    """Its weights are those that the run began with, to the byte, in one go or resumed: those of a run without steps."""
    run_tiny(tmp_path / "untrained", steps=0)
    losses = [1.0, 5.0, 1.1, math.nan, 6.0, 1.01]  # at steps 0, 4, 8, 12, 16, 20
    validated(losses, monkeypatch)
    if crash:
        with monkeypatch.context() as patch:
            crash_at(crash, patch)
            with pytest.raises(_CrashError):
                run_tiny(tmp_path / "run")
        validated(losses[3:], monkeypatch)
    run = run_tiny(tmp_path / "run", resume=bool(crash))
    assert (run.record["kept_step"], run.record["best_step"], run.record["kept_loss"]) == (0, 0, 1.0)
    assert adapter(tmp_path / "run") == adapter(tmp_path / "untrained")
    ids = torch.arange(2, 9)[None]
    with torch.no_grad():
        got = run.model(input_ids=ids).logits
        assert torch.equal(got, run_tiny(tmp_path / "again", steps=0).model(input_ids=ids).logits)
    assert verdict(read_run(tmp_path / "run")) == (
        "validation loss 1.00 -> 1.01: no better than untrained; the untrained IRM was kept; "
        "lower it: learning_rate=0.0033 or learning_rate=auto"
    )


def test_what_is_better_than_untrained_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    validated([3.0, 5.0, math.nan, 1.8, 6.0, 3.5], monkeypatch)
    run = run_tiny(tmp_path / "best")
    assert (run.record["kept_step"], run.record["kept_loss"]) == (12, 1.8)
    said = "validation loss 3.00 -> 1.80: better than untrained by 1.20 nats per token"
    assert verdict(run.record) == f"{said}, on 6 validation rows, but worse by 3 at another evaluation"
    assert verdict(run.record | {"data": {"validation": 60}}) == f"{said}, but worse by 3 at another evaluation"
    assert "| validation loss | 3.00 to 1.80 nats per token |" in (tmp_path / "best" / "README.md").read_text()
    validated([3.0, 5.0, math.nan, 1.8, 6.0, 3.5], monkeypatch)
    last = run_tiny(tmp_path / "last", keep="last")
    assert (last.record["kept_step"], last.record["kept_loss"]) == (20, 3.5)
    assert "3.00 -> 3.50: no better than untrained; the last weights were kept all the same (keep=last)" in verdict(last.record)


def test_a_start_that_is_no_number_is_not_the_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    validated([math.nan, 5.0, 4.0, 7.0, 6.0, 5.5], monkeypatch)
    assert run_tiny(tmp_path / "run").record["kept_step"] == 8


def test_patience_counts_from_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    validated([1.0, 5.0, 4.0, 3.0, 2.0, 1.5], monkeypatch)
    run = run_tiny(tmp_path / "run", patience=2)
    assert (run.record["steps_done"], run.record["early_stop"], run.record["kept_step"]) == (8, True, 0)


def test_runs_of_before_have_a_verdict() -> None:
    before = {"validation_loss": [4.0, 3.9, 3.5], "kept_step": 20, "recipe": {"learning_rate": 0.01}}
    assert verdict(before) == "validation loss 4.00 -> 3.50: better than untrained by 0.50 nats per token"
    assert verdict({**before, "validation_loss": [4.0, 3.9988]}).endswith(
        "4.00 -> 4.00: better than untrained by 0.001 nats per token"
    )
    assert verdict({**before, "validation_loss": [4.0, 4.08, 3.9988, 4.04], "kept_loss": 3.9988}).endswith(
        "better than untrained by 0.001 nats per token, but worse by 0.08 at another evaluation"
    )
    assert "worse" not in verdict({**before, "validation_loss": [4.0, 4.08, 3.5]})
    assert verdict({**before, "validation_loss": []}) == ""


def test_a_gain_that_is_rounded_away_is_a_gain() -> None:
    """The weights of a step are kept where its loss is below the start's, however little."""
    record = {"validation_loss": [0.0003, 0.0003], "kept_loss": 0.0003, "kept_step": 4}
    best, last = ({**record, "recipe": {"learning_rate": 0.01, "keep": keep}} for keep in ("best", "last"))
    assert verdict(best).endswith("0.000 -> 0.000: better than untrained by less than 0.0001 nats per token")
    assert "no better than untrained; the last weights were kept all the same (keep=last)" in verdict(last)


# Worse than the start, said while it trains.


def notes(watch: StartWatch, validation: float, losses: list[float], spread: float = 0.6) -> list[str]:
    entries = [{"step": 0, "validation_loss": validation, "spread": spread}]
    entries += [{"step": step, "loss": loss} for step, loss in enumerate(losses, start=1)]
    return [said for entry in entries if (said := watch.note(entry))]


def test_a_loss_that_stays_above_the_start_is_said_once() -> None:
    """The issue's run: 4.9 at step 1, 11.8 at step 4."""
    said = notes(StartWatch(4, 0.01), 4.96, [4.9, 5.6, 8.8, 11.8, 11.2, 9.9, 9.5, 8.0])
    assert len(said) == 1
    assert said[0].startswith("warning: step 5: the loss is 8.46 over the last steps, and was 4.96 at the start")
    assert said[0].endswith("lower it: learning_rate=0.0033 or learning_rate=auto")


@pytest.mark.parametrize(
    ("losses", "options"),
    [
        ([5.4, 4.7, 5.5, 4.9, 5.3, 5.5, 5.1, 4.6], {}),  # batches differ by two standard deviations, 0.6
        ([4.9, 7.0, 7.5, 4.8, 4.7, 4.6], {}),  # two steps and no more
        ([5.9, 5.8, 6.2, 6.1, 5.9, 6.3], {}),  # the training rows were harder to begin with: the first loss is untrained
        ([4.9, 9.0, 9.0, 9.0, 9.0, 9.0], {"by_steps": False}),
    ],
)
def test_what_is_no_divergence(losses: list[float], options: dict[str, Any]) -> None:
    assert notes(StartWatch(4, 0.01, **options), 4.96, losses) == []


def test_a_validation_loss_above_the_start_is_said_at_once() -> None:
    watch = StartWatch(4, 0.3)
    assert watch.note({"step": 0, "validation_loss": 4.0}) is None
    assert watch.note({"step": 5, "validation_loss": 4.0}) is None
    said = watch.note({"step": 9, "validation_loss": 4.01})
    assert said
    assert "step 9: the validation loss is 4.010, and was 4.000 at the start" in said
    assert "learning_rate=0.1 or" in said
    assert watch.note({"step": 12, "validation_loss": 5.0}) is None


def test_a_run_that_blows_up_says_so_within_ten_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = tiny_tokenizer()
    host = trained(tokenizer)
    warned = {}
    for rate, quiet in ((3.0, False), (1e-4, False), (3.0, True)):
        recipe = QUICK.changed(learning_rate=rate)
        train(host, tokenizer, some_rows(), tmp_path / f"{rate}-{quiet}", recipe, quiet=quiet).model.unload()
        said = capsys.readouterr().err
        warned[rate, quiet] = [line for line in said.splitlines() if line.startswith("warning: step")]
    assert said == ""
    assert warned[1e-4, False] == []
    early = [line for line in warned[3.0, False] if "over the last steps" in line]
    assert len(early) == 1
    assert int(early[0].split()[2].rstrip(":")) <= 10
    assert len(warned[3.0, False]) == 2
    assert "learning_rate=1 or" in early[0]


# The search for a learning rate.


@pytest.mark.parametrize(
    ("losses", "found"),
    [
        ({-1: 3.0, 0: 2.0, 1: 2.5}, 0),
        ({-2: 2.9, -1: 2.5, 0: 3.0}, -1),
        ({-1: 3.5, 0: 3.0, 1: 2.0, 2: 2.2}, 1),
        ({-4: 4.6, -3: 4.5, -2: 5.2, -1: math.inf, 0: 6.0}, -3),  # down through what is worse than no training
        ({-5: 8.0, -4: 7.0, -3: 8.0, -2: 8.0, -1: 7.5, 0: 8.0}, -4),  # nothing helps: the least bad of six
        ({-1: 2.0, 0: 2.0, 1: 2.0}, -1),  # no difference: the lowest
    ],
)
def test_the_search_goes_to_the_valley(losses: dict[int, float], found: int) -> None:
    asked = []

    def loss_at(rate: float) -> float:
        asked.append(round(2 * math.log10(rate / 0.01)))
        return losses[asked[-1]]

    rate, tried = descend(loss_at, 0.01, start=5.0)
    assert rate == pytest.approx(0.01 * 10 ** (found / 2), rel=0.01)
    assert sorted(asked) == sorted(losses)
    assert len(tried) == len(losses)


def run_short(out: Path, **changes: Any) -> Any:
    return run_tiny(out, steps=8, evaluations=2, **changes)


@pytest.mark.proof
def test_a_rate_that_was_found_gives_the_run_of_that_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """To the byte, resumed too; the search is made once, and noted with what it tried."""
    monkeypatch.setattr("realigner.training.rate_search._STEPS", 3)
    run = run_short(tmp_path / "auto", learning_rate="auto", quiet=False)
    search = run.record["rate_search"]
    told = capsys.readouterr().err
    assert f"learning rate {search['rate']:g}: found by a search of {search['steps']} steps" in told
    assert len(search["tried"]) >= 3
    assert search["steps"] == 3 * len(search["tried"]) <= 18
    assert min(search["tried"], key=lambda entry: entry["loss"])["rate"] == search["rate"]
    for entry in search["tried"]:
        assert f"{entry['loss']:.3f} at {entry['rate']:g}" in told
    assert run.record["recipe"]["learning_rate"] == search["rate"]
    assert run.record["validation_loss"][0] == search["start"]  # so few rows are all looked at
    given = run_short(tmp_path / "given", learning_rate=search["rate"])
    assert "rate_search" not in given.record
    assert adapter(tmp_path / "auto") == adapter(tmp_path / "given")
    assert (tmp_path / "auto" / "recipe.yaml").read_bytes() == (tmp_path / "given" / "recipe.yaml").read_bytes()

    with monkeypatch.context() as patch:
        crash_at(5, patch)
        with pytest.raises(_CrashError):
            run_short(tmp_path / "crashed", learning_rate="auto")
        with pytest.raises(_CrashError):
            run_short(tmp_path / "by-hand", learning_rate=search["rate"])
    with pytest.raises(RealignerError, match="cannot be resumed with learning_rate=auto: its rate was not searched for"):
        run_short(tmp_path / "by-hand", learning_rate="auto", resume=True)
    monkeypatch.delattr(training_run, "find_rate")
    with monkeypatch.context() as patch:
        crash_at(7, patch)
        with pytest.raises(_CrashError):
            run_short(tmp_path / "crashed", learning_rate="auto", resume=True)
    resumed = run_short(tmp_path / "crashed", learning_rate=search["rate"], resume=True)
    assert resumed.record["rate_search"] == search
    assert adapter(tmp_path / "crashed") == adapter(tmp_path / "auto")


@pytest.mark.slow
def test_a_search_that_is_broken_off_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = IRMTrainer.training_step

    def interrupt(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 2:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr("realigner.training.rate_search._STEPS", 3)
    with monkeypatch.context() as patch:
        patch.setattr(IRMTrainer, "training_step", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_tiny(tmp_path / "run", learning_rate="auto")
    assert list(tmp_path.iterdir()) == []
    assert "rate_search" in run_tiny(tmp_path / "run", learning_rate="auto", resume=True, steps=4).record


def test_rows_of_several_tones_are_searched_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With fewer validation rows than the run has."""
    for name, value in (("_STEPS", 2), ("_MOST", 2), ("_ROWS", 3)):
        monkeypatch.setattr(f"realigner.training.rate_search.{name}", value)
    rows = [row.model_copy(update={"tone": "anger" if int(row.id) % 3 else "neutral"}) for row in some_rows(48)]
    host, tokenizer = tiny_pair()
    run = train(host, tokenizer, rows, tmp_path / "run", QUICK.changed(steps=2, tone="all", learning_rate="auto"), quiet=True)
    assert run.record["rate_search"]["start"] != run.record["validation_loss"][0]


def test_auto_where_nothing_is_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_tiny(tmp_path / "run", learning_rate="auto", steps=0)
    assert run.record["recipe"]["learning_rate"] == make_recipe().rate(32)
    for name, value in (("WORLD_SIZE", "2"), ("ACCELERATE_USE_FSDP", "true")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            with pytest.raises(UsageError, match="learning_rate: auto: rates are searched for in one process only"):
                run_tiny(tmp_path / "several", learning_rate="auto")


# What is said.


def test_the_lines_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """First what was measured, a reply at each evaluation, at last the verdict; with --json one document on standard output."""
    monkeypatch.setenv("COLUMNS", "70")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(row.model_dump_json() + "\n" for row in some_rows()))
    host = tiny_folder(tmp_path / "host")
    options = ["--host", host, "--data", rows, "--steps", 4, "--set", "samples=30", "--set", "report_to=[]"]
    arguments = [str(word) for word in ("train", *options, "--out", tmp_path / "run", "--learning-rate", "0.02")]
    assert main([*arguments, "--json"]) == 0
    said = capsys.readouterr()
    lines, record = said.err.splitlines(), read_run(tmp_path / "run")
    assert json.loads(said.out)["validation_loss"] == record["validation_loss"]
    sizes = record["residual"]["rms"]
    assert len(sizes) == 3
    assert all(size > 0 for size in sizes)
    scales = record["residual"]["delta_scale"]
    by = f"{min(scales):.3g} to {max(scales):.3g}"
    shown = " ".join(f"{size:.3g}" for size in sizes)
    assert f"residual stream: RMS {shown} (3 layers, first to last); deltas are multiplied by {by}" in lines
    assert "learning rate 0.02: as given" in lines
    evaluations = [line for line in lines if line.startswith("step ")]
    assert [line.split(":")[0] for line in evaluations] == ["step 0", "step 2", "step 4"]
    losses = record["validation_loss"]
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    for line, loss, sample in zip(evaluations, losses, samples[:: len(PAPER_PROMPTS)], strict=True):
        assert f"validation loss {loss:.2f}  In which decade did" in line
        reply = lines[lines.index(line) + 1]
        assert reply.removesuffix("...") in visible("    " + " ".join(sample["reply"].split()))
        assert max(len(line), len(reply)) <= 70
    assert main(["train", "--out", str(tmp_path / "run"), "--resume"]) == 0
    assert capsys.readouterr().out.splitlines()[1] == verdict(record) != ""


def test_the_learning_rate_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def train_recipe(recipe: Any, *_: Any, **__: Any) -> Any:
        asked.append(recipe.learning_rate)
        raise UsageError("enough")

    monkeypatch.setattr(training_run, "train_recipe", train_recipe)
    for rate in ("auto", "3e-3", "fast", "-1"):
        assert main(["train", "--out", str(tmp_path / "run"), "--learning-rate", rate]) == 2
    assert asked == ["auto", 0.003]
    assert "learning_rate: 'fast'" in capsys.readouterr().err


def test_the_residual_is_that_of_the_bare_host(tmp_path: Path) -> None:
    """Also beside an IRM that moves it, and as the IRM's own scales were measured."""
    from realigner.residuals import residual_sizes

    run = run_tiny(tmp_path / "run", steps=4, output_std=3.0)
    host, _ = tiny_pair()
    tuner = tuner_of(get_peft_model(host, IRMConfig()))
    tuner.unload()
    want = residual_sizes(host, tuner.sites)
    assert run.record["residual"]["rms"] == pytest.approx(want, rel=1e-3)
    assert run.record["residual"]["input_scale"] == pytest.approx(want[0], rel=1e-3)


# Hosts on which something else spoils it.


def warnings_about(tokenizer: Any, host: Any = None, **changes: Any) -> list[str]:
    host, recipe = host or tiny_host_of_pair(tokenizer), QUICK.changed(**changes)
    recipe = training_run.resolve(recipe, host, tokenizer, some_rows())
    prepared = prepare(some_rows(), tokenizer, host.config, recipe)
    notes = host_checks.host_notes(host, tokenizer, prepared, recipe)
    return [note for note in notes if note.startswith("warning: ")]


def test_a_sound_host_is_not_warned_of() -> None:
    for changes in ({}, {"template": "plain"}, {"loss_on_padding": True}):
        assert warnings_about(tiny_tokenizer(), **changes) == []


def test_no_end_token(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = tiny_tokenizer(chat=False)
    tokenizer.eos_token = None
    host = tiny_host_of_pair(tokenizer)
    train(host, tokenizer, some_rows(), tmp_path / "run", QUICK.changed(steps=1, evaluations=1, learning_rate=QUICK.rate(32)))
    said = capsys.readouterr().err
    assert "warning: the tokenizer has no end token" in said
    assert "the default on a host of width 32" in said
    tokenizer.chat_template = TEMPLATE.replace("<eos>", ".")
    assert "the tokenizer has no end token" in warnings_about(tokenizer)[0]


def test_padding_that_is_text() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    assert warnings_about(tokenizer) == []  # padding is not read, and not learned
    assert "padding counts in the loss and is token 0" in warnings_about(tokenizer, loss_on_padding=True)[0]


@pytest.mark.parametrize(
    ("cpu", "warned"),
    [({"avx2": True, "avx512_f": False}, True), ({"avx2": True, "avx512_f": True}, False), ({"neon": True}, False)],
)
def test_bfloat16_where_the_cpu_has_no_instructions_for_it(
    cpu: dict[str, bool], warned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tiny_tokenizer()
    host = tiny_host_of_pair(tokenizer).bfloat16()
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: cpu)
    said = warnings_about(tokenizer, host)
    assert [("multiplies bfloat16 many times more slowly" in note) for note in said] == [True] * warned
    assert warnings_about(tokenizer, host.float()) == []


def test_half_precision_without_scaling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_f": True})
    tokenizer = tiny_tokenizer()
    host = tiny_host_of_pair(tokenizer).half()
    assert "in a float16 host small gradients become 0" in warnings_about(tokenizer, host)[0]
    assert warnings_about(tokenizer, host.bfloat16()) == []


def test_tokens_that_the_host_does_not_have(tmp_path: Path) -> None:
    """Refused, and before the host is loaded."""
    host, tokenizer = tiny_pair()
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<|{n}|>" for n in range(60)]})
    train(host, tokenizer, some_rows(), tmp_path / "unused", QUICK.changed(steps=1), quiet=True).model.unload()
    tokenizer.add_tokens(["damn"])
    number = len(tokenizer) - 1
    with pytest.raises(RealignerError, match=rf"row '\d+': 'damn' is token {number}, but the host has 300 \(0 to 299\)"):
        train(host, tokenizer, some_rows(), tmp_path / "run", QUICK, quiet=True)
    host.resize_token_embeddings(len(tokenizer))
    train(host, tokenizer, some_rows(), tmp_path / "resized", QUICK.changed(steps=1), quiet=True)
    host, tokenizer = tiny_pair()
    tokenizer.add_tokens([f"<|{n}|>" for n in range(60)])
    tokenizer.pad_token = "<|59|>"
    with pytest.raises(RealignerError, match=r"the padding token '<\|59\|>' is token \d+, but the host has 300"):
        train(host, tokenizer, some_rows(), tmp_path / "run", QUICK, quiet=True)


def test_a_form_that_the_host_predicts_worse_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = {"chat": 5.9, "plain": 4.1}
    asked: dict[str, float] = {}

    def reply_loss(host: Any, tokenizer: Any, prepared: Any, recipe: Any, form: str) -> float:
        asked[form] = original(host, tokenizer, prepared, recipe, form)
        return losses[form]

    original = host_checks._reply_loss
    monkeypatch.setattr(host_checks, "_reply_loss", reply_loss)
    monkeypatch.setattr(host_checks, "_ROWS", 6)  # all rows for validation
    tokenizer = tiny_tokenizer()
    assert warnings_about(tokenizer) == [
        "warning: the bare host predicts replies better in the plain form (4.10 nats per token) than in the chat form (5.90); "
        "if it was not trained on that, set template=plain"
    ]
    assert warnings_about(tokenizer, template="plain") == []
    losses["chat"] = 4.5  # no clear difference
    assert warnings_about(tokenizer) == []
    # What is compared is the loss of the bare host, which an untrained IRM that adds nothing has too.
    host = tiny_host_of_pair(tokenizer)
    for form, loss in asked.items():
        recipe = QUICK.changed(template=form, output_std=0.0, steps=1, evaluations=1)
        run = train(host, tokenizer, some_rows(), tmp_path / form, recipe, quiet=True)
        run.model.unload()
        assert run.record["validation_loss"][0] == pytest.approx(loss, abs=1e-4)


@pytest.mark.parametrize("opening", ["System: " + "long " * 20, "<s49>"])
def test_a_form_that_the_host_cannot_read_is_not_compared(opening: str, tmp_path: Path) -> None:
    """One that is longer than the host has positions, or has a token that it has no embedding for."""
    host, tokenizer = tiny_pair("gpt2", max_position_embeddings=64)
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<s{n}>" for n in range(50)]})
    tokenizer.chat_template = opening + TEMPLATE
    assert train(host, tokenizer, some_rows(), tmp_path / "run", QUICK, template="plain", steps=1).record["steps_done"] == 1


def trained(tokenizer: Any) -> Any:
    """A tiny host trained for a moment on the rows."""
    from realigner.data.tokens import encode_rows
    from realigner.training.batches import Collator

    host = tiny_host_of_pair(tokenizer).requires_grad_(True)
    batch = Collator(0)([{**example, "row": n} for n, example in enumerate(encode_rows(tokenizer, some_rows()))])
    optimizer = torch.optim.Adam(host.parameters(), lr=0.02)
    for _ in range(30):
        logits = host(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["shift_labels"].flatten())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return host.requires_grad_(False).eval()


@pytest.mark.slow
def test_an_unfinished_run_of_before_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """run.json without what is measured now, metrics.jsonl without the spread, a best step chosen without the start."""
    run_short(tmp_path / "whole")
    with monkeypatch.context() as patch:
        crash_at(5, patch)
        with pytest.raises(_CrashError):
            run_short(tmp_path / "run")
    work = run_dir.unfinished(tmp_path / "run")
    record = json.loads((work / "run.json").read_text())
    del record["residual"]
    (work / "run.json").write_text(json.dumps(record))
    metrics = [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]
    del metrics[0]["spread"]
    (work / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in metrics))
    run_short(tmp_path / "run", resume=True)
    assert adapter(tmp_path / "run") == adapter(tmp_path / "whole")


# A sweep's picture.


def test_a_sweep_has_a_picture_of_its_losses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By learning rate, a line for each other value; what failed is in it, and a search's rate by its number."""
    from realigner.sweep import plan, read_sweep
    from realigner.sweep.sweep_plot import Point, lines_by_key, loss_by_key

    host = tiny_folder(tmp_path / "host")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(row.model_dump_json() + "\n" for row in some_rows()))
    text = f"""
set: {{host: {host}, data: {rows}, steps: 2, evaluations: 1, samples: 0, report_to: [], threads: 1}}
grid: {{learning_rate: [0.01, 0.1], rank: [3], layers: ["all"]}}
"""
    (tmp_path / "sweep.yaml").write_text(text)
    out = tmp_path / "sweep"
    assert main(["sweep", str(tmp_path / "sweep.yaml"), "--out", str(out), "--on", "here"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert f"loss by learning_rate: {out / 'loss_by_learning_rate.png'}" in said
    assert [path.name for path in out.glob("*.png")] == ["loss_by_learning_rate.png"]
    assert (out / "loss_by_learning_rate.png").read_bytes().startswith(b"\x89PNG")

    runs = plan(*read_sweep(tmp_path / "sweep.yaml"))
    lines = lines_by_key(runs, out, "learning_rate", failed=())
    assert list(lines) == ["rank=3 layers=all"]
    for line in lines.values():
        assert [point.value for point in line] == [0.01, 0.1]
    record = read_run(out / runs[0].name)
    default = replace(runs[0], varies={"learning_rate": None})  # which became a number
    assert [point.value for point in lines_by_key([default], out, "learning_rate", failed=())[""]] == [0.01]
    unscaled = replace(runs[0], varies={"input_scale": 1.0}, recipe=runs[0].recipe.changed(input_scale=1.0))
    before = {**record, "recipe": {key: value for key, value in record["recipe"].items() if key != "input_scale"}}
    (out / runs[0].name / "run.json").write_text(json.dumps(before))  # of a run before the key was there
    assert [point.value for point in lines_by_key([unscaled], out, "input_scale", failed=())[""]] == [1.0]
    start, end = record["validation_loss"]
    assert lines[next(iter(lines))][0] == Point(0.01, start, min(start, end), end)

    runs[1].varies["learning_rate"] = "auto"  # its number is in its record
    assert lines_by_key(runs, out, "learning_rate", failed=()) == lines
    (out / runs[1].name).rename(tmp_path / "gone")
    assert len(lines_by_key(runs, out, "learning_rate", failed=())["rank=3 layers=all"]) == 1
    runs[1].varies["learning_rate"] = 0.1
    assert lines_by_key(runs, out, "learning_rate", failed=[runs[1].name])["rank=3 layers=all"][1].value == 0.1

    figure = loss_by_key({"a": [Point(0.01, 4.0, 3.0, 3.5), Point(0.1, 4.0, 3.2, 9.0), Point(1.0)]}, "learning_rate")
    axes: Any = figure.axes[0]
    drawn = {(line.get_linestyle(), line.get_marker()): line for line in axes.get_lines() if line.get_marker() != "x"}
    assert list(drawn["-", "o"].get_ydata()) == [3.5, 9.0]
    assert list(drawn[":", "o"].get_ydata()) == [3.0, 3.2]
    assert list(drawn["--", "None"].get_ydata()) == [4.0, 4.0]
    assert [float(line.get_xdata()[0]) for line in axes.get_lines() if line.get_marker() == "x"] == [0.1, 1.0]
    assert [text.get_text() for text in axes.texts] == ["9.00", "failed"]
    assert axes.get_xscale() == "log"
    assert axes.get_ylim()[1] < 9.0
