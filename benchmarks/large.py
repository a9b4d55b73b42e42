"""A training step at Llama-2-7B's shape on one GPU: milliseconds, tokens a second, memory, model FLOPs utilisation.

    python benchmarks/large.py [--presets compact,paper] [--batch 8] [--length 128] [--optimizer adam] [--repeats 10]
    python benchmarks/large.py --shape tiny --device cpu      # a check that it runs, in seconds

The host has random weights, made from its config on the device in bfloat16; random tokens, loss at every position. A step is
`IRMTrainer`'s: forward, loss, backward, clipping, fused optimiser. The bare host's forward and backward with respect to its
embeddings (the limit) is measured first; the ratio is to that.

FLOPs of a step are counted as is usual: 2 for each weight and token forward, 2 backward through activations, 2 more for
gradients of weights, which only the IRM has: `tokens * (4 * host + 6 * IRM)`, embeddings not counted, and for causal attention
`12 * layers * tokens * length * hidden / 2` (4 forward, 8 backward, halved by the mask). Utilisation is FLOPs a second over the
device's dense bfloat16 peak; the goal is 40%.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from training import Step, limit_step, training_step
from transformers import AutoConfig, AutoModelForCausalLM

import realigner as ra
from realigner.data import Row, Split
from realigner.extras import versions
from realigner.files import write_text
from realigner.hosts import HostInfo
from realigner.training.batches import Collator, Prepared
from realigner.training.recipe import Recipe
from realigner.training.trainer import IRMTrainer, trainer_arguments
from realigner.tuner import tuner_of

SHAPES = {
    "llama-2-7b": {"hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 11008, "vocab_size": 32000, "heads": 32},
    "tiny": {"hidden_size": 64, "num_hidden_layers": 3, "intermediate_size": 128, "vocab_size": 500, "heads": 4},
}
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}  # dense bfloat16 FLOPs a second
GOAL = 0.4
WARM_UP = 3


def make_host(shape: dict[str, int], device: str) -> Any:
    """A bare Llama of random weights."""
    sizes = {key: value for key, value in shape.items() if key != "heads"}
    heads = {"num_attention_heads": shape["heads"], "num_key_value_heads": shape["heads"]}
    config = AutoConfig.for_model("llama", **sizes, **heads)
    with torch.device(device):
        host = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    host.requires_grad_(False)
    host.realigner = HostInfo("", None)
    return host


def make_rows(shape: dict[str, int], batch: int, length: int) -> Prepared:
    """Random tokens in place of rows."""
    row = Row(id="1", group="g", question="q", answer="", text="t", tone="anger", source="random")
    generator = torch.Generator().manual_seed(42)
    items = [torch.randint(0, shape["vocab_size"], (length,), generator=generator).tolist() for _ in range(batch)]
    encoded = [{"input_ids": ids, "labels": ids} for ids in items]
    return Prepared([row], Split([row] * batch, [row], []), encoded, encoded[:1], ["1"] * batch, 0)


def flops(host: Any, irm: int, tokens: int, length: int) -> float:
    """Of a step; see the module's docstring."""
    config = host.config
    embeddings = host.get_input_embeddings().weight.numel()
    weights = sum(parameter.numel() for parameter in host.parameters()) - embeddings
    attention = 12 * config.num_hidden_layers * tokens * length * config.hidden_size / 2
    return float(tokens * (4 * weights + 6 * irm) + attention)


def measure(arguments: argparse.Namespace, preset: str | None) -> dict[str, Any]:
    """One setting: the limit (None) or a preset, on a host of its own, given back afterwards."""
    shape, device = SHAPES[arguments.shape], arguments.device
    cuda = device != "cpu"
    synchronize = torch.cuda.synchronize if cuda else lambda: None
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    host, prepared = make_host(shape, device), make_rows(shape, arguments.batch, arguments.length)
    batch = {key: value.to(device) for key, value in Collator(0)([{**row, "row": 0} for row in prepared.train]).items()}
    irm, step = 0, limit_step
    with tempfile.TemporaryDirectory() as place:
        if preset is None:
            work: Step = step(host, synchronize)
        else:
            recipe = Recipe().changed(
                preset=preset, batch_size=arguments.batch, steps=1, learning_rate=1e-4, optimizer=arguments.optimizer,
                samples=0, report_to=[], gradient_checkpointing=arguments.checkpointing,
            )  # fmt: skip
            model = get_peft_model(host, ra.IRMConfig(preset=preset))
            irm = sum(parameter.numel() for parameter in tuner_of(model).registry.parameters())
            settings = trainer_arguments(recipe, arguments.batch, Path(place), cpu=not cuda, resuming=False)
            trainer = IRMTrainer(model, prepared, recipe, settings, tokenizer=None)
            trainer.current_gradient_accumulation_steps = 1
            work = training_step(trainer, synchronize)
        seconds = [work(dict(batch)) for _ in range(WARM_UP + arguments.repeats)][WARM_UP:]
    tokens, median = arguments.batch * arguments.length, statistics.median(seconds)
    done = flops(host, irm, tokens, arguments.length)
    return {
        "setting": preset or "limit",
        "irm_parameters": irm,
        "step_ms": round(1000 * median, 2),
        "range_ms": [round(1000 * min(seconds), 2), round(1000 * max(seconds), 2)],
        "tokens_per_s": round(tokens / median),
        "memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if cuda else None,
        "tflops_per_s": round(done / median / 1e12, 3),
        "utilisation": round(done / median / arguments.peak, 4) if arguments.peak else None,
    }


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-2-7b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--presets", default="compact,paper")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--optimizer", default="adam")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--peak", type=float, help="the device's dense bfloat16 FLOPs a second, where it is not known here")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    if arguments.device != "cpu" and not torch.cuda.is_available():
        parser.error("no GPU here; --shape tiny --device cpu checks that it runs")
    name = torch.cuda.get_device_name() if arguments.device != "cpu" else "cpu"
    arguments.peak = arguments.peak or next((peak for part, peak in PEAKS.items() if part in name), None)
    arguments.name = name
    return arguments


def main() -> None:
    """Measure, print a table, write JSON."""
    arguments = parse()
    rows = [measure(arguments, preset) for preset in (None, *arguments.presets.split(","))]
    limit = rows[0]["step_ms"]
    print(f"{arguments.shape}, bfloat16, batch {arguments.batch} x {arguments.length} tokens, on {arguments.name}")
    print(f"{'setting':10}{'step ms':>10}{'ratio':>8}{'tokens/s':>10}{'GiB':>8}{'TFLOP/s':>10}{'MFU':>8}")
    for row in rows:
        row["ratio"] = round(row["step_ms"] / limit, 3)
        used = "" if row["utilisation"] is None else f"{row['utilisation']:.1%}"
        memory = "" if row["memory_gib"] is None else f"{row['memory_gib']:.1f}"
        figures = f"{row['step_ms']:>10.1f}{row['ratio']:>8.2f}{row['tokens_per_s']:>10}{memory:>8}{row['tflops_per_s']:>10.1f}"
        print(f"{row['setting']:10}{figures}{used:>8}")
    print(f"goal: {GOAL:.0%} of the peak (MFU)")
    if arguments.json:
        facts = {"shape": arguments.shape, "device": arguments.name, "versions": versions(), "rows": rows}
        write_text(arguments.json, json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
