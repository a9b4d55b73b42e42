"""Milliseconds per generated token: the embedded host bare, with an IRM, and with the peers.

    python benchmarks/injection.py [--tokens 64] [--repeats 5] [--batch 1,8] [--settings irm-compact,pyvene] [--skip-peers]

Greedy, cached, on the CPU. Every setting intervenes at every layer, at every position of the prompt and of each generated
token (irm-idle, attached and switched off, at none); worker.py proves it before it is timed. Peers have pins that exclude each
other, so each has an environment of its own under .bench, made when first needed, and a worker process in it. Workers take
turns within each repeat, so that a slow moment of the machine hits all of them; only one works at a time. A ratio is to the
bare host of the same environment and repeat.

`best` is the fastest turn over the fastest bare one: on a shared machine it is the steadier number.

`floor` (JSON, IRMs only) is what reading the IRM's weights beside the host's would cost if reading weights were all the time
there is: (bytes of host + IRM) / bytes of host. Where it is not, a ratio can be below its floor.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from realigner.chat_format import prompt_ids
from realigner.files import write_text
from realigner.hosts import embedded_folder, resolve_dtype

HERE = Path(__file__).resolve().parent
ENVIRONMENTS = HERE.parent / ".bench"
PROMPT = "How do magnets work?"
BARE = "bare"
PROJECT = "project"
# Environment -> its settings -> the package whose version belongs to the setting.
SETTINGS = {
    PROJECT: {"irm-compact": "realigner", "irm-paper": "realigner", "irm-idle": "realigner", "lora": "peft"},
    "steering-vectors": {"steering-vectors": "steering-vectors"},
    "pyvene": {"pyvene": "pyvene"},
    "nnsight": {"nnsight": "nnsight"},
}
WARM_UP_TOKENS = 4  # before each turn, not timed: another worker had the caches meanwhile
LIMIT_S = 900  # for one answer of a worker, and for one installation

Turns = dict[tuple[int, str], list[tuple[float, float]]]  # (batch, setting) -> seconds per token, bare and with it


class NotMeasuredError(Exception):
    """Why an environment or a setting cannot be measured, in one line."""


def environment(peer: str) -> Path:
    """The Python of a peer's environment; made, or made anew, when its requirements are not what was installed last."""
    requirements = HERE / "peers" / f"{peer}.txt"
    folder = ENVIRONMENTS / peer
    python, installed = folder / "bin" / "python", folder / "installed.txt"
    if installed.is_file() and installed.read_text() == requirements.read_text():
        return python
    print(f"== making .bench/{peer} (a few minutes, once)", flush=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r", str(requirements)]
    for command in ([sys.executable, "-m", "venv", "--clear", str(folder)], pip):
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise NotMeasuredError(f"its environment cannot be made: {error}") from None
        if done.returncode:
            lines = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
            errors = [line for line in lines if line.startswith("ERROR")]
            raise NotMeasuredError(f"its environment cannot be made: {(errors or lines)[-1]}")
    installed.write_text(requirements.read_text())
    return python


class Worker:
    """A process of worker.py in one environment; it waits for requests and works on nothing else."""

    def __init__(self, name: str, python: str | Path) -> None:
        self.name = name
        self.settings: dict[str, dict[str, Any]] = {}  # those that passed their check -> what the check reported
        ENVIRONMENTS.mkdir(exist_ok=True)
        self.log = ENVIRONMENTS / f"{name}.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [str(python), str(HERE / "worker.py")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
            )

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        """The answer to a request; raises NotMeasuredError with what went wrong."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        timer = threading.Timer(LIMIT_S, self.process.kill)
        timer.start()
        try:
            self.process.stdin.write(json.dumps({"do": do, **request}) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except OSError:
            line = ""
        finally:
            timer.cancel()
        if not line:
            raise NotMeasuredError(f"its worker ended (exit code {self.process.wait()}); see {self.log}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise NotMeasuredError(answer["error"])
        return answer

    def close(self) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.close()  # at the end of its input it ends
            self.process.wait(timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            self.process.kill()


def start_workers(
    wanted: dict[str, dict[str, str]], load: dict[str, Any], not_measured: dict[str, str]
) -> Iterator[tuple[Worker, dict[str, Any]]]:
    """Workers with the host loaded and their settings checked, and what they said of the host."""
    for name, packages in wanted.items():
        try:
            worker = Worker(name, sys.executable if name == PROJECT else environment(name))
        except NotMeasuredError as error:
            not_measured.update(dict.fromkeys(packages, str(error)))
            continue
        print(f"== checking {', '.join(packages)}", flush=True)
        for setting, package in packages.items():
            try:
                if not worker.settings:
                    facts = worker.ask("load", **load)
                worker.settings[setting] = worker.ask("check", setting=setting, package=package)
            except NotMeasuredError as error:
                not_measured[setting] = str(error)
        if worker.settings:
            yield worker, facts
        else:
            worker.close()


def take_turn(worker: Worker, batch: int, tokens: int, backwards: bool, not_measured: dict[str, str]) -> dict[str, float]:
    """Seconds per token of the bare host and of each setting of one worker; a setting that fails is left out from then on."""
    seconds: dict[str, float] = {}
    order = [BARE, *worker.settings]
    try:
        worker.ask("time", setting=BARE, batch=batch, tokens=WARM_UP_TOKENS)
    except NotMeasuredError as error:
        not_measured.update(dict.fromkeys(worker.settings, str(error)))
        worker.settings.clear()
        return {}
    for setting in reversed(order) if backwards else order:
        try:
            seconds[setting] = worker.ask("time", setting=setting, batch=batch, tokens=tokens)["seconds"]
        except NotMeasuredError as error:
            for failed in [*worker.settings] if setting == BARE else [setting]:
                not_measured[failed] = str(error)
                worker.settings.pop(failed, None)
    return seconds


def measure(workers: list[Worker], batches: list[int], tokens: int, repeats: int, not_measured: dict[str, str]) -> Turns:
    """All turns of all workers but those of the first round of each batch size, which warms up."""
    turns: Turns = defaultdict(list)
    for batch in batches:
        for repeat in range(repeats + 1):
            print(f"== batch {batch}: {f'repeat {repeat} of {repeats}' if repeat else 'warming up'}", flush=True)
            for worker in workers:
                seconds = take_turn(worker, batch, tokens, repeat % 2 == 1, not_measured)
                if repeat and BARE in seconds:
                    for setting in worker.settings:
                        turns[batch, setting].append((seconds[BARE], seconds[setting]))
    return turns


def make_row(batch: int, setting: str, turns: list[tuple[float, float]], worker: Worker, host_bytes: int) -> dict[str, Any]:
    """One line of the table, with the floor for an IRM."""
    facts = worker.settings[setting]
    ratios = [with_it / bare for bare, with_it in turns]
    row: dict[str, Any] = {
        "batch": batch,
        "setting": setting,
        "ms_per_token": round(1000 * statistics.median(with_it for _, with_it in turns), 2),
        "bare_ms_per_token": round(1000 * statistics.median(bare for bare, _ in turns), 2),
        "ratio": round(statistics.median(ratios), 3),
        "ratio_min": round(min(ratios), 3),
        "ratio_max": round(max(ratios), 3),
        "best": round(min(with_it for _, with_it in turns) / min(bare for bare, _ in turns), 3),
        "ratios": [round(ratio, 4) for ratio in ratios],
        "environment": worker.name,
        "versions": facts["versions"],
    }
    if setting.startswith("irm"):
        floor = (host_bytes + facts["bytes"]) / host_bytes
        row |= {"host_bytes": host_bytes, "irm_bytes": facts["bytes"], "floor": round(floor, 4)}
        row["ratio_over_floor"] = round(statistics.median(ratios) / floor, 3)
    return row


def print_table(rows: list[dict[str, Any]], not_measured: dict[str, str]) -> None:
    """The rows, and below them what was not measured and why."""
    heads = "  ".join(f"{head:>6}" for head in ("ratio", "min", "max", "best"))
    print(f"{'batch':>5}  {'setting':<16}  {'ms/token':>8}  {'bare':>8}  {heads}  versions")
    for row in rows:
        numbers = f"{row['ms_per_token']:>8.2f}  {row['bare_ms_per_token']:>8.2f}  " + "  ".join(
            f"{row[key]:>6.3f}" for key in ("ratio", "ratio_min", "ratio_max", "best")
        )
        versions = ", ".join(f"{name} {version}" for name, version in row["versions"].items())
        print(f"{row['batch']:>5}  {row['setting']:<16}  {numbers}  {versions}")
    for setting, why in not_measured.items():
        print(f"not measured: {setting}: {why}")


def machine(threads: int) -> dict[str, Any]:
    """What the numbers are measured on, and how busy it is; to be called before our own work loads it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "system": platform.platform(),
        "load_before": round(os.getloadavg()[0], 2),
    }


def parse() -> argparse.Namespace:
    """The command line; names an unknown setting."""
    known = [setting for packages in SETTINGS.values() for setting in packages]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch", default="1,8", help="batch sizes, separated by commas")
    parser.add_argument("--settings", default=",".join(known), help="default: all, %(default)s")
    parser.add_argument("--skip-peers", action="store_true", help="only what runs in the project's own environment")
    parser.add_argument("--dtype", default="auto", help="of the host: auto, float32, bfloat16 or float16")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "injection.json")
    arguments = parser.parse_args()
    arguments.settings = arguments.settings.split(",")
    for setting in arguments.settings:
        if setting not in known:
            parser.error(f"unknown setting {setting!r}; choose from {', '.join(known)}")
    try:
        arguments.batch = [int(size) for size in arguments.batch.split(",")]
    except ValueError:
        parser.error(f"--batch: cannot read {arguments.batch!r}; write 1,8")
    if min(*arguments.batch, arguments.tokens, arguments.repeats) < 1:
        parser.error("--batch, --tokens and --repeats: give numbers of 1 or more")
    return arguments


def main() -> int:
    """Make the environments, check the settings, measure, print a table, write JSON."""
    arguments = parse()
    wanted = {
        name: {setting: package for setting, package in packages.items() if setting in arguments.settings}
        for name, packages in SETTINGS.items()
        if name == PROJECT or not arguments.skip_peers
    }
    folder = embedded_folder()
    dtype = str(resolve_dtype(arguments.dtype, torch.device("cpu"))).removeprefix("torch.")
    prompt = prompt_ids(AutoTokenizer.from_pretrained(folder), PROMPT)
    threads = torch.get_num_threads()
    measured_on = machine(threads)
    if measured_on["load_before"] > 0.5:
        print(f"the machine is busy (load {measured_on['load_before']}): expect numbers that are off")
    load = {"folder": str(folder), "prompt": prompt, "dtype": dtype, "threads": threads}

    not_measured: dict[str, str] = {}
    workers: list[Worker] = []
    rows: list[dict[str, Any]] = []
    host_bytes = 0
    try:
        for worker, facts in start_workers({name: kept for name, kept in wanted.items() if kept}, load, not_measured):
            workers.append(worker)
            host_bytes = facts["host_bytes"]
        turns = measure(workers, arguments.batch, arguments.tokens, arguments.repeats, not_measured)
    finally:
        for worker in workers:
            worker.close()
    for batch in arguments.batch:
        for worker in workers:
            rows += [make_row(batch, name, turns[batch, name], worker, host_bytes) for name in worker.settings]
    print_table(rows, not_measured)
    facts = {"tokens": arguments.tokens, "repeats": arguments.repeats, "dtype": dtype, "prompt_tokens": len(prompt)}
    result = facts | {"machine": measured_on, "rows": rows, "not_measured": not_measured}
    write_text(arguments.out, json.dumps(result, indent=2) + "\n")
    print(f"written to {arguments.out}")
    return 0 if rows else 1


if __name__ == "__main__":
    sys.exit(main())
