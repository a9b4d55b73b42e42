"""Tokens a second of vLLM: bare, with IRMs, and with LoRA per request on the same engine.

    python benchmarks/serving.py [--requests 16,64] [--prompts 20,500] [--tokens 64] [--repeats 5] [--settings bare,irm,irms-8]

The embedded host, greedy, on whatever device the engine in .serve-env uses (`make serve-env`). Each setting is an engine in a
process of its own; they take turns within each repeat, so that a slow moment of the machine hits all of them, and only one
works at a time. A ratio is to the bare engine of the same repeat, and the table has the median of the repeats' ratios. Prefix
caching is off, and every repeat has prompts of its own.

`bare` is vLLM without plugins. `idle` has the plugin, and no IRM. `unused` has an IRM that no request asks for; it runs all the
same. `irm`: all requests ask for one. `irms-8`: eight are loaded, and the requests of a batch ask for them in turn.
`lora`, `lora-8`: the same with adapters of rank 8 on the queries and values, as many parameters as a compact IRM.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PYTHON = HERE.parent / ".serve-env" / "bin" / "python"
SETTINGS = ("bare", "idle", "unused", "irm", "irms-8", "lora", "lora-8")
COUNT = 8
_MARK = "RESULT "


# --- in the engine's environment --------------------------------------------------------------------------------------------


def work(setting: str, place: Path, host: str, dtype: str, most: int, longest: int) -> None:
    """Start an engine, then answer a line on standard input with one on standard output, until the input ends."""
    import random

    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    names = [f"irm{number}" for number in range(COUNT if setting.endswith("-8") else 1)]
    options: dict[str, Any] = {"enable_lora": True, "max_loras": len(names), "max_lora_rank": 8} if "lora" in setting else {}
    llm = LLM(
        host,
        dtype=dtype,
        skip_tokenizer_init=True,
        max_model_len=longest,
        max_num_seqs=most,
        enable_prefix_caching=False,
        **options,
    )
    print(_MARK + "{}", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        draw = random.Random(asked["seed"])
        drawn = [draw.choices(range(5, 40_000), k=asked["prompt"]) for _ in range(asked["requests"])]
        prompts: Any = [{"prompt_token_ids": tokens} for tokens in drawn]
        extra = [{"irms": names[n % len(names)]} if setting.startswith("irm") else None for n in range(len(prompts))]
        params = [
            SamplingParams(temperature=0, max_tokens=asked["tokens"], ignore_eos=True, detokenize=False, extra_args=each)
            for each in extra
        ]
        lora = None
        if "lora" in setting:
            lora = [
                LoRARequest(f"lora{n % len(names)}", n % len(names) + 1, f"{place}/loras/lora{n % len(names)}")
                for n in range(len(prompts))
            ]
        start = time.perf_counter()
        outputs = llm.generate(prompts, params, lora_request=lora, use_tqdm=False)
        seconds = time.perf_counter() - start
        tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
        print(_MARK + json.dumps({"seconds": seconds, "tokens": tokens}), flush=True)


# --- here -------------------------------------------------------------------------------------------------------------------


class Engine:
    """An engine in its process."""

    def __init__(self, setting: str, place: Path, host: str, dtype: str, most: int, longest: int) -> None:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
        environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        environment.pop("PYTHONPATH", None)
        names = range(COUNT if setting.endswith("-8") else 1)
        if setting.startswith("irm") or setting == "unused":
            environment["REALIGNER_IRMS"] = ",".join(f"irm{n}={place}/irms/irm{n}" for n in names)
        elif setting != "idle":
            environment["VLLM_PLUGINS"] = ""
        arguments = ["--work", setting, str(place), host, dtype, str(most), str(longest)]
        self.setting = setting
        self.log = (place / f"{setting}.log").open("w")
        self.process = subprocess.Popen(
            [str(PYTHON), __file__, *arguments],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            start_new_session=True,
        )
        self.answer()
        self._let(signal.SIGSTOP)

    def _let(self, kind: signal.Signals) -> None:
        """Stop all processes of the engine, or let them go on: idle ones spin, and would take the others' cores."""
        os.killpg(self.process.pid, kind)

    def answer(self) -> dict[str, Any]:
        """The next result."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(_MARK):
                found: dict[str, Any] = json.loads(line.removeprefix(_MARK))
                return found
        log = Path(self.log.name).read_text().splitlines()
        raise SystemExit(f"{self.setting}: the engine ended: {' | '.join(log[-3:])}")

    def turn(self, **asked: int) -> float:
        """Tokens a second over a batch of requests."""
        assert self.process.stdin is not None
        self._let(signal.SIGCONT)
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        found = self.answer()
        self._let(signal.SIGSTOP)
        return float(found["tokens"] / found["seconds"])

    def stop(self) -> None:
        """End the process."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.log.close()


def make_adapters(place: Path, dtype: str) -> str:
    """Eight IRMs and eight LoRA adapters of the embedded host; returns the host's folder."""
    import torch
    from peft import LoraConfig, get_peft_model

    from realigner.gguf_cache import embedded_folder
    from realigner.hosts import load_host
    from realigner.irm_config import IRMConfig
    from realigner.tuner import unload

    host, _ = load_host(dtype="float32")
    for number in range(COUNT):
        torch.manual_seed(number)
        model = get_peft_model(host, IRMConfig(preset="compact", output_std=0.05), adapter_name=f"irm{number}")
        model.save_pretrained(place / "irms")
        unload(host)
    for number in range(COUNT):
        config = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        model = get_peft_model(load_host(dtype="float32")[0], config)
        model.save_pretrained(place / "loras" / f"lora{number}")
    return str(embedded_folder())


def table(result: dict[str, Any]) -> str:
    """The medians as Markdown."""
    loads = [tuple(load) for load in result["loads"]]
    names = " | ".join(f"{requests} requests, {prompt}-token prompts" for requests, prompt in loads)
    lines = [f"| setting | {names} |", "| --- |" + " ---: |" * len(loads)]
    for setting, rates in result["tokens_per_second"].items():
        cells = []
        for load in range(len(loads)):
            ratios = [mine / bare for mine, bare in zip(rates[load], result["tokens_per_second"]["bare"][load], strict=True)]
            cells.append(f"{statistics.median(rates[load]):.0f} ({statistics.median(ratios):.2f})")
        lines.append(f"| {setting} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", default="16,64")
    parser.add_argument("--prompts", default="20,500")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--settings", default=",".join(SETTINGS))
    parser.add_argument("--dtype", default="auto", help="auto: bfloat16 where this device multiplies it fast, else float32")
    parser.add_argument("--json", type=Path, default=HERE / "results" / "serving.json")
    args = parser.parse_args()
    if not PYTHON.exists():
        raise SystemExit("the engine's environment is not installed; run: make serve-env")
    from realigner.hosts import resolve_device, resolve_dtype

    dtype = str(resolve_dtype(args.dtype, resolve_device("auto"))).removeprefix("torch.")
    loads = [(int(requests), int(prompt)) for requests in args.requests.split(",") for prompt in args.prompts.split(",")]
    settings = ["bare", *(name for name in args.settings.split(",") if name != "bare")]
    result: dict[str, Any] = {}
    most, longest = max(load[0] for load in loads), max(load[1] for load in loads) + args.tokens
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that no engine is left behind
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        host = make_adapters(place, dtype)
        engines = []
        try:
            for setting in settings:
                print(f"starting {setting}", file=sys.stderr)
                engines.append(Engine(setting, place, host, dtype, most, longest))
            rates: dict[str, list[list[float]]] = {setting: [] for setting in settings}
            result |= {"dtype": dtype, "tokens": args.tokens, "loads": [], "tokens_per_second": rates}
            for number, (requests, prompt) in enumerate(loads):
                for measured in rates.values():
                    measured.append([])
                for repeat in range(-1, args.repeats):  # the first warms up
                    asked = {"requests": requests, "prompt": prompt, "tokens": args.tokens, "seed": 1000 * number + repeat}
                    order = engines if repeat % 2 else engines[::-1]
                    for engine in order:
                        rate = engine.turn(**asked)
                        if repeat >= 0:
                            rates[engine.setting][number].append(rate)
                    print(f"{requests} requests, prompts of {prompt}: repeat {repeat + 1} of {args.repeats}", file=sys.stderr)
                result["loads"].append([requests, prompt])
                args.json.parent.mkdir(parents=True, exist_ok=True)
                args.json.write_text(json.dumps(result, indent=1))  # what was measured outlives an interruption
        finally:
            for engine in engines:
                engine.stop()
    print(f"Tokens generated a second (ratio to the bare engine), {dtype}, {args.tokens} tokens a reply:\n\n{table(result)}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        name, folder_, host_, dtype_, most_, longest_ = sys.argv[2:]
        work(name, Path(folder_), host_, dtype_, int(most_), int(longest_))
    else:
        main()
