"""Trainer callbacks: the log and samples, the guard against divergence, stopping on signals."""

from __future__ import annotations

import json
import math
import shutil
import signal
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from realigner.console import Task, say
from realigner.errors import RealignerError, visible
from realigner.training.run_dir import METRICS_FILE, SAMPLES_FILE, checkpoints
from realigner.training.run_record import lower_rate, nats

TONE_PREFIX = "tone_"  # of the names under which the validation loss of each tone is logged
_EXPLODED = 3.0  # times the loss of a uniform guess
_RECENT, _ABOVE = 5, 4  # steps that are looked at, and how many of them must be above the start


@dataclass(eq=False)
class StartWatch:
    """Notices that a run does worse than the weights that it began with: by a validation loss, or by the losses of its steps.

    A step's loss is a mean over few rows, so four of the last five must exceed the loss at the start by two standard errors of
    a mean over as many rows.
    """

    batch_size: int  # rows a step
    rate: float  # the learning rate, for the remedy
    by_steps: bool = True  # False: the loss of a step holds more than that of validation does
    _start: float = math.nan
    _limit: float = math.nan
    _recent: deque[float] = field(default_factory=lambda: deque(maxlen=_RECENT))
    _said: set[str] = field(default_factory=set)

    def note(self, entry: Mapping[str, Any]) -> str | None:
        """Process a line of metrics.jsonl; returns a warning the first time that one is due, else None."""
        step = entry["step"]
        if "validation_loss" in entry:
            loss = entry["validation_loss"]
            if step == 0:
                self._start = loss
                self._limit = loss + 2 * entry.get("spread", math.nan) / math.sqrt(self.batch_size)
            elif not loss <= self._start and not math.isnan(self._start):
                return self._once("validation", f"step {step}: the validation loss is {loss:.3f}, and was {self._start:.3f}")
            return None
        if not self.by_steps:
            return None
        if step == 1:  # of weights that are not trained yet
            self._limit += max(0.0, entry["loss"] - self._start)
        self._recent.append(entry["loss"])
        if sum(loss > self._limit for loss in self._recent) >= _ABOVE:
            mean = sum(self._recent) / len(self._recent)
            return self._once("steps", f"step {step}: the loss is {mean:.2f} over the last steps, and was {self._start:.2f}")
        return None

    def _once(self, kind: str, what: str) -> str | None:
        if kind in self._said:
            return None
        self._said.add(kind)
        return f"warning: {what} at the start: the run does worse than no training; lower it: {lower_rate(self.rate)}"


@dataclass(eq=False)
class Log(TrainerCallback):
    """Writes every step's numbers to metrics.jsonl, moves the progress bar, and asks for a checkpoint at each evaluation."""

    task: Task  # the progress bar
    work: Path | None  # the unfinished run's folder; None in processes that write nothing
    seconds: float  # how long the run was trained before
    tokens: Callable[[], int]  # gives the tokens trained on so far
    sample: Callable[[], Sequence[dict[str, str]]] | None  # answers the paper's prompts; None: no samples
    watch: StartWatch
    quiet: bool = False  # say nothing

    def __post_init__(self) -> None:
        self._start = time.monotonic() - self.seconds
        self._validation = ""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        logs = logs or {}
        entry: dict[str, Any] = {"step": state.global_step}
        if "eval_loss" in logs:
            entry["validation_loss"] = logs["eval_loss"]
            prefix = f"eval_{TONE_PREFIX}"
            if by_tone := {key.removeprefix(prefix): loss for key, loss in logs.items() if key.startswith(prefix)}:
                entry["validation_loss_by_tone"] = by_tone
            entry |= {f"validation_{part}": logs[f"eval_{part}"] for part in ("kl", "ce") if f"eval_{part}" in logs}
            if state.global_step == 0 and "eval_spread" in logs:
                entry["spread"] = logs["eval_spread"]
            self._validation = f"  validation {nats(logs['eval_loss'])}"
        elif "loss" in logs:
            entry |= {key: logs[key] for key in ("loss", "grad_norm", "learning_rate") if key in logs}
            entry["tokens"] = self.tokens()
        else:
            return
        entry["seconds"] = round(time.monotonic() - self._start, 2)
        self._append(METRICS_FILE, entry)
        if (warning := self.watch.note(entry)) and not self.quiet:
            say(warning)
        if "loss" in logs:
            self.task.advance(1, f"loss {nats(logs['loss'])}{self._validation}")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_evaluate = True

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step > 0:
            control.should_save = True
        lines = [f"step {state.global_step}: validation loss {nats(kwargs['metrics']['eval_loss'])}"]
        if self.sample is not None:
            replies = self.sample()
            for reply in replies:
                self._append(SAMPLES_FILE, {"step": state.global_step, **reply})
            lines[0] += f"  {replies[0]['prompt']}"
            lines.append("    " + " ".join(replies[0]["reply"].split()))
        if not self.quiet:
            most = shutil.get_terminal_size().columns
            for line in map(visible, lines):
                say(line if len(line) <= most else f"{line[: most - 3]}...")

    def _append(self, name: str, entry: dict[str, Any]) -> None:
        if self.work is None:
            return
        try:
            with (self.work / name).open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(entry, ensure_ascii=False) + "\n")
        except OSError as error:
            raise RealignerError(f"{self.work / name}: cannot be written ({error.strerror or error})") from error


@dataclass(eq=False)
class DivergenceGuard(TrainerCallback):
    """Stops a run whose loss or gradient is not a number, or whose loss is far above that of a uniform guess.

    It looks at each step's numbers before the step could be saved, so every checkpoint was made before anything was wrong.
    """

    work: Path  # where the checkpoints are
    vocabulary: int  # tokens of the host; a uniform guess costs log(vocabulary) nats
    rows: Callable[[], Sequence[str]]  # gives the ids of the last step's rows
    relative: bool = True  # False: the loss holds more than cross-entropy, and only what is not a number counts
    _limit: float = math.inf

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        logs = logs or {}
        if "loss" not in logs:
            return
        loss, norm = logs["loss"], logs.get("grad_norm", 0.0)
        if self._limit == math.inf and self.relative:
            self._limit = _EXPLODED * max(math.log(max(2, self.vocabulary)), loss if math.isfinite(loss) else 0.0)
        bad_loss = not math.isfinite(loss) or loss > self._limit
        if not bad_loss and math.isfinite(norm):
            return
        what = f"the loss is {loss:.3g}" if bad_loss else f"the gradient's norm is {norm}"
        ids = list(self.rows())
        named = ", ".join(ids[:8]) + (f" and {len(ids) - 8} more" if len(ids) > 8 else "")
        good = checkpoints(self.work)
        kept = f"last good checkpoint: {good[-1]}" if good else "no checkpoint was made before"
        raise RealignerError(
            f"step {state.global_step}: {what} on rows {named}; {kept}. Lower the learning rate (learning_rate="
            f"{args.learning_rate / 10:g}), or leave those rows out"
        )


class StopSignal(TrainerCallback):
    """Ends training after the running step, with a checkpoint, on SIGTERM or SIGINT; a second Ctrl-C ends it at once."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.accelerator: Any = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        stop = self.received is not None
        if self.accelerator is not None and self.accelerator.num_processes > 1:  # all processes stop, or none
            if stop:
                self.accelerator.set_trigger()
            stop = self.accelerator.check_trigger()
            if stop and self.received is None:
                self.received = signal.SIGTERM
        if stop:
            control.should_save = control.should_training_stop = True

    def receive(self, number: int, _: Any) -> None:
        """A handler of signals."""
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
