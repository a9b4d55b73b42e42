"""Milliseconds per training step, tokens a second, peak memory, and seconds to a fixed validation loss, on the embedded host.

    python benchmarks/training.py [--repeats 6] [--steps 120] [--settings compact,paper] [--skip-to-loss] [--json FILE]

Host in the dtype `load_host` gives, authored anger rows, batch 8, as the reference code writes them (question, three spaces,
reply) unless --template chat. Settings:

limit      The bare host: forward, loss, backward with respect to its embeddings. No optimiser. What no method that trains a
           frozen host from its first layer on can be below. The baseline of every ratio.
compact    A step of `IRMTrainer` with the recipe ``default``: forward, loss, backward, clipping, fused AdamW.
paper      The same with the paper's network.
lora       PEFT's LoRA of rank 8 on PEFT's default targets for Llama (q_proj and v_proj of every layer), by the same step.
lora-all   The same on every linear layer but the head.
padded     `compact` trained as the reference code does: every row padded to 128 tokens, logits and loss at every position,
           question and padding included. Only rows, template, network, optimiser and learning rate are those of `compact`.

All but `padded` are given the same batches, of like length as `SeededLengthSampler` makes them, and take the loss at the
reply's positions only, logits being computed nowhere else. `padded` is given the same rows. Its tokens are those of the text.

A turn is one step on each of four batches (an epoch's, evenly spaced by length). Settings alternate within a turn, batch by
batch, in an order that is reversed each time. A ratio is the median over the turns of seconds over the limit's seconds in the
same turn; `best` is the fastest step on each batch, over the same of the limit: on a shared machine it is the steadier number.

`floor` is (limit + network) / limit, in the same turns: the network alone on h0 of that many tokens, forward, backward,
clipping and optimiser. What is above the floor is what injection costs. (A step can be a little below: with an IRM, nothing
is propagated back through layer 0's attention.)

Peak memory is that of a process of its own, host included (the high-water mark of its resident set after loading), with the
longest of the batches.

Seconds to a loss: `compact` is trained for --steps steps with the recipe's learning rate; the target is its validation loss on
replies after 60% of them. Then `compact` and `padded` are each trained with each of three learning rates until their loss on
those replies is there, or until they took 3 times the steps that `compact` took first; the best of each counts. Three,
because with the recipe's own (1e-2) padding does not learn slowly but diverges, and to be faster than that says nothing of
padding. Rates are held constant, so that no run depends on when it is stopped. Evaluations do not count. These trainings come
one after the other, so a slow moment hits one of them; `by steps` is steps times `ms/step` of the table, where a moment hits
all. One seed, an evaluation every 4 steps: a difference of a step or two of these is nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback
from worker import twin

import realigner as ra
from realigner.chat_format import IGNORED, TEMPLATES
from realigner.extras import versions
from realigner.files import write_text
from realigner.hosts import EMBEDDED
from realigner.training.batches import Collator, EncodedRows, Prepared, SeededLengthSampler, prepare
from realigner.training.loss import row_losses
from realigner.training.recipe import Recipe
from realigner.training.trainer import IRMTrainer, products_dtype, trainer_arguments
from realigner.tuner import tuner_of

HERE = Path(__file__).resolve().parent
LIMIT = "limit"
ALONE = " alone"  # what the name of a floor's setting ends in
SETTINGS = (LIMIT, "compact", "paper", "lora", "lora-all", "padded")
RECIPE = Recipe(batch_size=8, schedule="constant", samples=0, report_to=[])
RECIPES = {
    "compact": RECIPE,
    "paper": RECIPE.changed(preset="paper", learning_rate=1e-4),
    "padded": RECIPE.changed(loss_on="text", loss_on_padding=True, max_length=128),
}
GOALS = {"compact": 1.15, "paper": 1.6}  # times the limit; the paper's network: or its floor
NOISE = 0.02  # of a median over a few turns: ratios that are nearer than this are called equal
SOONER = 3.0  # times sooner at a loss than padding to 128
GIVE_UP = 3  # times the steps that compact took, after which a training is stopped
RATES = (1e-2, 3e-3, 1e-3)  # learning rates; the first is the recipe's
EVALUATE_EVERY = 4  # steps
BATCHES = 4  # in a turn
MEMORY_STEPS = 3
LIMIT_S = 900  # for a process that measures memory

Batch = dict[str, torch.Tensor]
Step = Callable[[Batch], float]  # does the step, and says how many seconds it took


@dataclass
class Job:
    """The host, the rows as each recipe encodes them (the same rows, in the same order), and which rows make which batch."""

    host: Any
    tokenizer: Any
    prepared: dict[str, Prepared]
    chosen: list[list[int]]

    def batch(self, setting: str, rows: Sequence[int]) -> Batch:
        """Rows of the training split as a setting is given them."""
        name = setting if setting in RECIPES else "compact"
        encoded = EncodedRows(self.prepared[name].train)
        return collator(RECIPES[name], self.tokenizer)([encoded[row] for row in rows])

    def tokens(self) -> int:
        """Tokens of text in a turn."""
        return sum(len(self.prepared["compact"].train[row]["input_ids"]) for rows in self.chosen for row in rows)


class LoRATrainer(Trainer):  # type: ignore[misc]
    """Trainer with the loss of `IRMTrainer`."""

    def compute_loss(self, model: Any, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        sums, _ = row_losses(model, inputs, only_where_needed=True)
        return sums.sum() / num_items_in_batch


class Clock(TrainerCallback):  # type: ignore[misc]
    """Stops the time of a training without its evaluations, and ends it at a loss.

    Args:
        evaluate: gives the validation loss.
        target: the loss at which to end; None: go on to the last step.
    """

    def __init__(self, evaluate: Callable[[], float], target: float | None) -> None:
        self.evaluate, self.target = evaluate, target
        self.points: list[tuple[int, float, float]] = []  # step, seconds, validation loss
        self.seconds = self.since = 0.0

    def on_train_begin(self, *_: Any, **kwargs: Any) -> None:
        self.since = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % EVALUATE_EVERY and state.global_step < state.max_steps:
            return
        self.seconds += time.perf_counter() - self.since
        self.points.append((state.global_step, self.seconds, self.evaluate()))
        reached = self.target is not None and self.points[-1][2] <= self.target
        control.should_training_stop = control.should_training_stop or reached
        self.since = time.perf_counter()


def collator(recipe: Recipe, tokenizer: Any) -> Collator:
    """What makes batches for a recipe."""
    return Collator(tokenizer.pad_token_id, recipe.label_shift, recipe.max_length if recipe.loss_on_padding else None)


def load_job() -> Job:
    """Load the host, encode the rows, choose the batches of a turn."""
    host, tokenizer = ra.load_host(EMBEDDED, device="cpu")
    prepared = {name: prepare(ra.authored("anger"), tokenizer, host.config, recipe) for name, recipe in RECIPES.items()}
    lengths = [len(item["input_ids"]) for item in prepared["compact"].train]
    size = RECIPE.batch_size
    order = list(SeededLengthSampler(lengths, size, RECIPE.seed, epoch=lambda: 0))
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    batches.sort(key=lambda rows: max(lengths[row] for row in rows))
    spaced = [(2 * place + 1) * len(batches) // (2 * BATCHES) for place in range(BATCHES)]
    return Job(host, tokenizer, prepared, [batches[place] for place in spaced])


def timed(work: Callable[[], Any], synchronize: Callable[[], Any]) -> float:
    """Seconds that some work takes, until the device is done with it."""
    synchronize()
    started = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - started


def nothing() -> None:
    """There is nothing to wait for on a CPU."""


def limit_step(host: Any, synchronize: Callable[[], Any] = nothing) -> Step:
    """Forward, loss and backward of the bare host, with respect to its embeddings. It alters the host; give it a twin."""
    host.enable_input_require_grads()
    host.train()

    def work(batch: Batch) -> None:
        sums, counts = row_losses(host, batch, only_where_needed=True)
        (sums.sum() / counts.sum()).backward()  # type: ignore[no-untyped-call]

    return lambda batch: timed(lambda: work(batch), synchronize)


def training_step(trainer: Any, synchronize: Callable[[], Any] = nothing) -> Step:
    """A step as Trainer's own loop does it, without what it logs and without its data loader."""
    trainer.create_optimizer_and_scheduler(10**6)
    model = trainer.model
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def work(batch: Batch) -> None:
        trainer.training_step(model, batch, (batch["shift_labels"] != IGNORED).sum())
        trainer.accelerator.clip_grad_norm_(trainable, trainer.args.max_grad_norm)
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
        model.zero_grad()

    return lambda batch: timed(lambda: work(batch), synchronize)


def alone_step(network: nn.Module, width: int, dtype: torch.dtype) -> Step:
    """An IRM's network without a host: forward, backward, clipping and optimiser, on h0 and gradients made up beforehand."""
    trainable = list(network.parameters())
    optimizer = torch.optim.AdamW(trainable, lr=1e-4, weight_decay=0.0, fused=True)
    generator = torch.Generator().manual_seed(42)

    def work(h0: torch.Tensor, gradient: torch.Tensor) -> None:
        torch.autograd.backward(network(h0).to(dtype), gradient)
        nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def step(batch: Batch) -> float:
        shape = (*batch["input_ids"].shape, width)
        h0 = torch.randn(shape, generator=generator).to(dtype)
        with torch.no_grad():
            gradient = torch.randn(network(h0).shape, generator=generator).mul_(1e-4).to(dtype)
        return timed(lambda: work(h0, gradient), nothing)

    return step


def make_trainer(
    job: Job, setting: str, folder: str, steps: int = 1, callbacks: Sequence[Any] = (), rate: float | None = None
) -> Any:
    """The trainer of a setting, on a twin of the host; at another learning rate than the recipe's, if one is given."""
    recipe = RECIPES.get(setting, RECIPE).changed(steps=steps, learning_rate=rate)
    prepared = job.prepared[setting if setting in RECIPES else "compact"]
    arguments = trainer_arguments(recipe, len(prepared.train), Path(folder), cpu=True, resuming=False)
    arguments.eval_strategy, arguments.save_strategy, arguments.eval_on_start = "no", "no", False  # a Clock evaluates
    torch.manual_seed(recipe.seed)
    host = twin(job.host)
    if setting.startswith("lora"):
        targets = {"target_modules": "all-linear"} if setting == "lora-all" else {}
        model = get_peft_model(host, LoraConfig(r=8, task_type="CAUSAL_LM", **targets))
        trainer = LoRATrainer(model, arguments, train_dataset=EncodedRows(prepared.train))
        trainer.model_accepts_loss_kwargs = True
    else:
        model = get_peft_model(host, ra.IRMConfig(preset=recipe.preset))
        trainer = IRMTrainer(model, prepared, recipe, arguments, tokenizer=job.tokenizer, callbacks=list(callbacks))
    trainer.remove_callback(PrinterCallback)
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def make_steps(job: Job, settings: Sequence[str], folder: str) -> dict[str, Step]:
    """The step of each setting, and those of the floors."""
    steps: dict[str, Step] = {LIMIT: limit_step(twin(job.host))}
    for setting in settings:
        if setting == LIMIT:
            continue
        trainer = make_trainer(job, setting, folder)
        steps[setting] = training_step(trainer)
        if setting in GOALS:
            shape = tuner_of(trainer.model).peft_config["default"]
            network = shape.build(job.host.config.hidden_size, job.host.config.num_hidden_layers)
            network.training_dtype = products_dtype(RECIPE, job.host)
            steps[setting + ALONE] = alone_step(network, job.host.config.hidden_size, job.host.dtype)
    return steps


def measure_steps(job: Job, steps: dict[str, Step], repeats: int) -> dict[str, list[list[float]]]:
    """Seconds of each setting by turn and batch; the first turn of all warms up and is dropped."""
    batches = {setting: [job.batch(setting, rows) for rows in job.chosen] for setting in steps}
    seconds: dict[str, list[list[float]]] = {setting: [] for setting in steps}
    backwards = False
    for repeat in range(repeats + 1):
        print(f"== step time: {f'repeat {repeat} of {repeats}' if repeat else 'warming up'}", flush=True)
        for setting in steps:
            seconds[setting].append([])
        for place in range(len(job.chosen)):
            for setting in reversed(steps) if backwards else steps:
                seconds[setting][-1].append(steps[setting](batches[setting][place]))
            backwards = not backwards
    return {setting: turns[1:] for setting, turns in seconds.items()}


def peak_gib() -> float:
    """The high-water mark of this process's resident set, in GiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 2**20
    raise SystemExit("/proc/self/status does not say VmHWM; peak memory needs Linux")


def forget_peak() -> None:
    """Begin the high-water mark anew."""
    Path("/proc/self/clear_refs").write_text("5")


def work_for_memory(setting: str) -> None:
    """What a process that measures memory does: load, forget the peak of that, and take steps on the longest batch."""
    job = load_job()
    with tempfile.TemporaryDirectory() as folder:
        forget_peak()
        step = limit_step(job.host) if setting == LIMIT else training_step(make_trainer(job, setting, folder))
        for _ in range(MEMORY_STEPS):
            step(job.batch(setting, job.chosen[-1]))
    print(json.dumps({"peak_gib": peak_gib()}))


def measure_memory(settings: Sequence[str]) -> dict[str, float]:
    """Peak memory (GiB) of each setting, one process after the other."""
    peaks = {}
    for setting in settings:
        print(f"== memory: {setting}", flush=True)
        command = [
            sys.executable,
            str(Path(__file__).resolve()),
            "--worker",
            setting,
            "--template",
            RECIPES["compact"].template,
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
        if done.returncode:
            raise SystemExit(f"memory of {setting}: its process ended with {done.returncode}: {done.stderr[-2000:]}")
        peaks[setting] = float(json.loads(done.stdout.splitlines()[-1])["peak_gib"])
    return peaks


def reply_loss(model: Any, validation: Sequence[Batch]) -> float:
    """Validation loss on the replies alone, nats per token."""
    model.eval()
    with torch.no_grad():
        parts = [row_losses(model, batch, only_where_needed=True) for batch in validation]
    return float(sum(sums.sum() for sums, _ in parts) / sum(int(counts.sum()) for _, counts in parts))


def train_to(job: Job, setting: str, rate: float, steps: int, target: float | None, folder: str) -> Clock:
    """Train until a loss on the validation rows' replies, or for so many steps."""
    rows = EncodedRows(sorted(job.prepared["compact"].validation, key=lambda item: len(item["input_ids"])))
    size, collate = RECIPE.batch_size, collator(RECIPE, job.tokenizer)
    validation = [collate([rows[at] for at in range(len(rows))[start : start + size]]) for start in range(0, len(rows), size)]
    clock = Clock(lambda: reply_loss(trainer.model, validation), target)
    trainer = make_trainer(job, setting, folder, steps, [clock], rate)
    trainer.train()
    return clock


def measure_to_loss(job: Job, steps: int, folder: str) -> dict[str, Any]:
    """Steps and seconds to the same validation loss, of compact and of padded, at each learning rate."""
    print(f"== to a loss: compact, {steps} steps", flush=True)
    points = train_to(job, "compact", RATES[0], steps, None, folder).points
    target = next(loss for step, _, loss in points if step >= 0.6 * steps)
    most = GIVE_UP * next(step for step, _, loss in points if loss <= target)
    trained = []
    for setting in ("compact", "padded"):
        for rate in RATES:
            if (setting, rate) != ("compact", RATES[0]):
                print(f"== to a loss: {setting}, rate {rate:g}, until {target:.3f} or for {most} steps", flush=True)
                points = train_to(job, setting, rate, most, target, folder).points
            step, seconds, loss = next((point for point in points if point[2] <= target), points[-1])
            trained.append(
                {
                    "setting": setting,
                    "rate": rate,
                    "reached": loss <= target,
                    "steps": step,
                    "seconds": round(seconds, 1),
                    "best_loss": round(min(point[2] for point in points), 4),
                    "points": points,
                }
            )
    return {"target": round(target, 4), "trained": trained}


def make_row(setting: str, seconds: dict[str, list[list[float]]], tokens: int, peaks: dict[str, float]) -> dict[str, Any]:
    """One line of the table."""
    turns, limits = ([sum(turn) for turn in seconds[name]] for name in (setting, LIMIT))
    ratios = [own / limit for own, limit in zip(turns, limits, strict=True)]
    best, best_limit = (sum(min(steps) for steps in zip(*seconds[name], strict=True)) for name in (setting, LIMIT))
    row: dict[str, Any] = {
        "setting": setting,
        "ms_per_step": round(1000 * statistics.median(turns) / BATCHES, 1),
        "tokens_per_s": round(tokens / statistics.median(turns)),
        "ratio": round(statistics.median(ratios), 3),
        "ratio_min": round(min(ratios), 3),
        "ratio_max": round(max(ratios), 3),
        "best": round(best / best_limit, 3),
        "peak_gib": round(peaks[setting], 3) if setting in peaks else None,
        "seconds": seconds[setting],
    }
    if setting + ALONE in seconds:
        alone = [sum(turn) for turn in seconds[setting + ALONE]]
        floors = [1 + own / limit for own, limit in zip(alone, limits, strict=True)]
        best_alone = sum(min(steps) for steps in zip(*seconds[setting + ALONE], strict=True))
        row |= {"floor": round(statistics.median(floors), 3), "floor_best": round(1 + best_alone / best_limit, 3)}
    return row


def judge(rows: dict[str, dict[str, Any]], to_loss: dict[str, Any] | None) -> list[str]:
    """The goals, and whether they were met in this run."""
    lines = []
    for setting, goal in GOALS.items():
        if setting in rows:
            row = rows[setting]
            met = row["ratio"] <= goal
            at_floor = setting == "paper" and row["ratio"] <= row["floor"] * (1 + NOISE)
            said = "met" if met else "met (at its floor)" if at_floor else "missed"
            lines.append(f"{setting}: {row['ratio']:.2f} of the limit, goal {goal}, floor {row['floor']:.2f}: {said}")
    if "compact" in rows and "lora" in rows:
        times = rows["compact"]["ratio"] / rows["lora"]["ratio"]
        said = "met" if times <= 1 else f"met (within {NOISE:.0%})" if times <= 1 + NOISE else "missed"
        lines.append(f"compact: {times:.3f} of LoRA's step, goal 1: {said}")
    if to_loss:
        lines += judge_to_loss(rows, to_loss)
    return lines


def judge_to_loss(rows: dict[str, dict[str, Any]], to_loss: dict[str, Any]) -> list[str]:
    """What each training took; padded beside compact at the recipe's own rate, and each at its best."""
    lines = [f"to a validation loss of {to_loss['target']:.3f} on replies:"]
    costs: dict[tuple[str, float], tuple[bool, float, float]] = {}  # whether it was not reached; seconds by the clock, by steps
    for one in to_loss["trained"]:
        setting, rate = one["setting"], one["rate"]
        by_steps = one["steps"] * (rows[setting]["ms_per_step"] / 1000 if setting in rows else one["seconds"] / one["steps"])
        took = f"{one['steps']} steps, {one['seconds']:.0f} s by the clock, {by_steps:.0f} s by steps"
        said = took if one["reached"] else f"not reached in {took} (best {one['best_loss']:.2f})"
        lines.append(f"  {setting:<8} rate {rate:<6g} {said}")
        costs[setting, rate] = (not one["reached"], one["seconds"], by_steps)
    own = {setting: costs[setting, RATES[0]] for setting in ("compact", "padded")}
    best = {setting: min(costs[setting, rate] for rate in RATES) for setting in ("compact", "padded")}
    for name, pair in (("at the recipe's rate", own), ("each at its best rate", best)):
        clock, steps = (pair["padded"][part] / pair["compact"][part] for part in (1, 2))
        more = "more than " if pair["padded"][0] else ""
        met = "met" if clock >= SOONER else "missed"
        lines.append(
            f"compact, {name}: {more}{clock:.1f} times sooner than padded (by steps {steps:.1f}), goal {SOONER:g}: {met}"
        )
    return lines


def print_table(rows: dict[str, dict[str, Any]]) -> None:
    """The rows."""
    heads = "  ".join(f"{head:>6}" for head in ("ratio", "min", "max", "best", "floor"))
    print(f"{'setting':<10}  {'ms/step':>8}  {'tokens/s':>8}  {heads}  {'peak GiB':>8}")
    for row in rows.values():
        keys = ("ratio", "ratio_min", "ratio_max", "best", "floor")
        numbers = "  ".join(f"{row[key]:>6.3f}" if row.get(key) is not None else f"{'':>6}" for key in keys)
        peak = "" if row["peak_gib"] is None else f"{row['peak_gib']:.2f}"
        print(f"{row['setting']:<10}  {row['ms_per_step']:>8.0f}  {row['tokens_per_s']:>8}  {numbers}  {peak:>8}")


def parse() -> argparse.Namespace:
    """The command line; names an unknown setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=6, help="turns in which step time is taken")
    parser.add_argument("--steps", type=int, default=120, help="training steps of compact on the way to a loss")
    parser.add_argument("--settings", default=",".join(SETTINGS), help="default: all, %(default)s")
    parser.add_argument("--skip-memory", action="store_true", help="no processes that measure peak memory")
    parser.add_argument("--skip-to-loss", action="store_true", help="no training to a loss")
    parser.add_argument("--json", type=Path, default=HERE / "results" / "training.json", metavar="FILE")
    parser.add_argument(
        "--template",
        choices=TEMPLATES,
        default="plain",
        help="of the rows: the reference's plain text, or the host's chat template",
    )
    parser.add_argument("--worker", choices=SETTINGS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    wanted = options.settings.split(",")
    for setting in wanted:
        if setting not in SETTINGS:
            parser.error(f"unknown setting {setting!r}; choose from {', '.join(SETTINGS)}")
    options.settings = [setting for setting in SETTINGS if setting == LIMIT or setting in wanted]
    if options.repeats < 1 or options.steps < EVALUATE_EVERY:
        parser.error(f"--repeats: give 1 or more; --steps: {EVALUATE_EVERY} or more")
    return options


def main() -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    options = parse()
    for name, recipe in RECIPES.items():
        RECIPES[name] = recipe.changed(template=options.template)
    if options.worker:
        work_for_memory(options.worker)
        return
    load = [round(os.getloadavg()[0], 2)]
    if load[0] > 0.5:
        print(f"the machine is busy (load {load[0]}): expect numbers that are off")
    peaks = {} if options.skip_memory else measure_memory(options.settings)
    job = load_job()
    with tempfile.TemporaryDirectory() as folder:
        seconds = measure_steps(job, make_steps(job, options.settings, folder), options.repeats)
        load.append(round(os.getloadavg()[0], 2))
        to_loss = None if options.skip_to_loss else measure_to_loss(job, options.steps, folder)
    load.append(round(os.getloadavg()[0], 2))
    rows = {setting: make_row(setting, seconds, job.tokens(), peaks) for setting in options.settings}
    shape = f"batch {RECIPE.batch_size}, {job.tokens() / BATCHES:.0f} tokens of text a step"
    dtype = str(job.host.dtype).removeprefix("torch.")
    print(f"{EMBEDDED}, {dtype}, {shape} ({options.template}), {options.repeats} repeats")
    print(f"ratio to '{LIMIT}'; load {load} before, between, after")
    print_table(rows)
    goals = judge(rows, to_loss)
    print("\n".join(goals))
    machine = {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "system": platform.platform(), "load": load}
    facts = {"host": EMBEDDED, "dtype": dtype, "batch_size": RECIPE.batch_size, "tokens_per_turn": job.tokens()}
    result = facts | {
        "template": options.template,
        "repeats": options.repeats,
        "machine": machine,
        "versions": versions(),
        "rows": list(rows.values()),
        "to_loss": to_loss,
        "goals": goals,
    }
    write_text(options.json, json.dumps(result, indent=2) + "\n")
    print(f"written to {options.json}")


if __name__ == "__main__":
    main()
